"""The road of CUDA C++ kernels up to the launch: sources, compiler, cache, the two commands. What
needs a GPU is in test_gpu.py."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from cuda_sources import AXPY

from gti_kernels import backends
from gti_kernels.cuda_kernels import __main__, compiler, runtime
from gti_kernels.cuda_kernels.compiler import Resources, Specialisation
from gti_kernels.rows import BUILT

TREE = Path(__file__).parent.parent
FLOAT = (("REAL", "float"),)


def why_no_nvrtc() -> str | None:
    try:
        compiler.compiler_version()
    except ImportError as error:
        return str(error)
    return None


needs_nvrtc = pytest.mark.skipif(why_no_nvrtc() is not None, reason=str(why_no_nvrtc()))


@pytest.fixture
def axpy(tmp_path, monkeypatch):
    """A source axpy.cu as the only one, an empty cache; returns the cache's folder."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "axpy.cu").write_text(AXPY)
    monkeypatch.setattr(compiler, "FOLDERS", (sources,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "_warned", [])
    return compiler.cache_folder()


@pytest.fixture
def builds(monkeypatch):
    """Counts compilations."""
    calls = []
    build = compiler.build
    monkeypatch.setattr(compiler, "build", lambda *job: calls.append(job) or build(*job))
    return calls


def launcher(monkeypatch, *kernels):
    module = types.ModuleType("gti_kernels.cuda_kernels.axpy")
    module.SPECIALISATIONS = kernels
    monkeypatch.setitem(sys.modules, module.__name__, module)


def entry_of(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


# ---- compiling ----------------------------------------------------------------------------------


@needs_nvrtc
@pytest.mark.parametrize("arch", ["80", "90a", "100"])
def test_a_kernel_is_compiled_for_an_architecture(axpy, arch):
    made = compiler.cubin("axpy", "axpy", FLOAT, arch)
    assert made.code[:4] == b"\x7fELF" and b"axpy" in made.code
    flags = int.from_bytes(made.code[48:52], "little")  # of the ELF header; CUDA 13 moved it
    assert int(arch.rstrip("a")) in (flags & 0xFF, flags >> 8 & 0xFF)
    assert 4 <= made.resources.registers <= 40
    assert made.resources == Resources(made.resources.registers, 0, 0, 0)


@needs_nvrtc
@pytest.mark.parametrize("entry", ["reverse", "everyone", "cluster"])
def test_the_kernels_that_gpu_tests_launch_compile(axpy, entry):
    assert compiler.cubin("axpy", entry, FLOAT, "90a").resources.stack == 0


@needs_nvrtc
def test_one_entry_is_compiled_alone(axpy):
    made = compiler.cubin("axpy", "axpy", FLOAT, "90a")
    assert b".text.axpy" in made.code and b".text.stack" not in made.code


@needs_nvrtc
def test_resources_of_a_stack_frame_and_of_spills(axpy):
    assert compiler.cubin("axpy", "stack", FLOAT, "90a").resources.stack == 256
    spill = compiler.cubin("axpy", "spill", FLOAT, "80").resources
    assert spill.spills > 0 and spill.registers == 64


def test_resources_of_a_report():
    log = """ptxas info    : Compiling entry function 'f' for 'sm_90a'
ptxas info    : Function properties for f
ptxas         .     48 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 64 bytes cumulative stack size, 400 bytes smem
"""
    assert compiler.resources(log) == Resources(40, 400, 32, 64)
    log = log.replace(" 64 bytes cumulative stack size,", "")
    assert compiler.resources(log) == Resources(40, 400, 32, 48)
    with pytest.raises(RuntimeError, match="no report"):
        compiler.resources("")


@needs_nvrtc
def test_errors_name_source_kernel_and_architecture(axpy):
    with pytest.raises(RuntimeError, match=r"(?s)axpy.cu does not compile: axpy for sm_90a.*REAL"):
        compiler.cubin("axpy", "axpy", (), "90a")
    with pytest.raises(
        RuntimeError, match=r"(?s)axpy.cu does not compile: nothing REAL=float .*nothing"
    ):
        compiler.cubin("axpy", "nothing", FLOAT, "90a")
    with pytest.raises(FileNotFoundError, match=r"no CUDA source other.cu"):
        compiler.cubin("other", "axpy", FLOAT, "90a")
    assert not axpy.exists() or not list(axpy.iterdir())


def test_a_cuda_core_that_is_too_old_is_named(monkeypatch):
    """Before 0.5 the package is there, but what a kernel needs is in cuda.core.experimental."""
    monkeypatch.setitem(sys.modules, "cuda.core", types.ModuleType("cuda.core"))
    compiler.cuda_core.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"needs cuda-core >= 0\.5\.1"):
            compiler.cuda_core()
    finally:
        compiler.cuda_core.cache_clear()


def test_architecture_of_a_device():
    names = [compiler.architecture(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))]
    assert names == ["80", "89", "90a", "100", "120"]


# ---- the cache ----------------------------------------------------------------------------------


@needs_nvrtc
def test_a_second_request_reads_the_cache(axpy, builds):
    first = compiler.cubin("axpy", "axpy", FLOAT, "90a")
    assert compiler.cubin("axpy", "axpy", FLOAT, "90a") == first
    assert len(builds) == 1 and entry_of(axpy).name.startswith("axpy-axpy-sm_90a-")


@needs_nvrtc
def test_the_key_holds_everything_a_cubin_depends_on(monkeypatch):
    keys = {compiler.key(AXPY, "axpy", FLOAT, "90a")}
    keys.add(compiler.key(AXPY + " ", "axpy", FLOAT, "90a"))
    keys.add(compiler.key(AXPY, "stack", FLOAT, "90a"))
    keys.add(compiler.key(AXPY, "axpy", (("REAL", "double"),), "90a"))
    keys.add(compiler.key(AXPY, "axpy", (*FLOAT, ("TILE", 4)), "90a"))
    keys.add(compiler.key(AXPY, "axpy", FLOAT, "100"))
    monkeypatch.setattr(compiler, "STANDARD", "c++17")
    keys.add(compiler.key(AXPY, "axpy", FLOAT, "90a"))
    monkeypatch.undo()
    monkeypatch.setattr(compiler, "compiler_version", lambda: "99.9")
    keys.add(compiler.key(AXPY, "axpy", FLOAT, "90a"))
    assert len(keys) == 8
    monkeypatch.undo()
    assert compiler.key(AXPY, "axpy", FLOAT, "90a") in keys
    same = [compiler.key(AXPY, "axpy", (("TILE", x),), "90a") for x in (4, "4")]
    assert same[0] == same[1]


@needs_nvrtc
def test_a_changed_source_is_compiled_anew(axpy, builds):
    before = compiler.cubin("axpy", "axpy", FLOAT, "90a")
    (compiler.FOLDERS[0] / "axpy.cu").write_text(AXPY.replace("a * x[i]", "a - x[i]"))
    assert compiler.cubin("axpy", "axpy", FLOAT, "90a").code != before.code
    assert len(builds) == 2


@needs_nvrtc
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "header"])
def test_a_corrupt_entry_is_rebuilt_silently(axpy, builds, damage, recwarn):
    good = compiler.cubin("axpy", "axpy", FLOAT, "90a")
    path = entry_of(axpy)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-100] ^= 1
    elif damage == "header":
        data[70] ^= 1  # of the report of resources
    path.write_bytes({"cut": data[:500], "empty": b""}.get(damage, data))
    assert compiler.cubin("axpy", "axpy", FLOAT, "90a") == good
    assert len(builds) == 2 and not recwarn
    assert compiler.cubin("axpy", "axpy", FLOAT, "90a") == good
    assert len(builds) == 2


@needs_nvrtc
def test_processes_that_race_all_get_the_kernel(axpy):
    code = f"""
import sys, threading
from pathlib import Path
from gti_kernels.cuda_kernels import compiler
compiler.FOLDERS = (Path({str(compiler.FOLDERS[0])!r}),)
build = compiler.build
def slow(*job):  # all have looked into the empty cache before one writes
    print("building", flush=True)
    sys.stdin.readline()
    return build(*job)
compiler.build = slow
print(len(compiler.cubin("axpy", "axpy", {FLOAT!r}, "90a").code))
"""
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    assert [r.stdout.readline() for r in racers] == ["building\n"] * 3
    for r in racers:
        r.stdin.write("go\n")
        r.stdin.flush()
    sizes = {r.communicate(timeout=120)[0] for r in racers}
    assert [r.returncode for r in racers] == [0] * 3
    assert sizes == {f"{len(compiler._read(entry_of(axpy)).code)}\n"}


@needs_nvrtc
def test_threads_may_be_the_first_to_compile(axpy):
    code = f"""
import threading
from pathlib import Path
from gti_kernels.cuda_kernels import compiler
compiler.FOLDERS = (Path({str(compiler.FOLDERS[0])!r}),)
start, made = threading.Barrier(4), []
def one(entry):
    start.wait()
    made.append(compiler.cubin("axpy", entry, {FLOAT!r}, "90a"))
entries = ("axpy", "stack", "reverse", "cluster")
threads = [threading.Thread(target=one, args=(e,)) for e in entries]
for t in threads: t.start()
for t in threads: t.join()
print(len(made))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "4\n", run.stderr


@needs_nvrtc
def test_without_a_writable_folder_it_compiles_in_memory_and_warns_once(axpy, builds, recwarn):
    axpy.parent.parent.mkdir(parents=True)
    axpy.parent.write_text("a file where the folder should be")
    for entry in ("axpy", "stack"):
        assert compiler.cubin("axpy", entry, FLOAT, "90a").code
    assert len(builds) == 2
    (warning,) = [w for w in recwarn if "cache cannot be used" in str(w.message)]
    assert "XDG_CACHE_HOME" in str(warning.message)


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="no space"):
        compiler._write(tmp_path / "x.cubin", compiler.Cubin(b"code", Resources(1, 2, 3, 4)))
    assert not list(tmp_path.iterdir())


def test_the_folder_of_the_cache(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert compiler.cache_folder() == Path("/elsewhere/gti_kernels/cuda")
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert compiler.cache_folder() == Path("/home/someone/.cache/gti_kernels/cuda")


# ---- the commands -------------------------------------------------------------------------------

CLUSTER = Specialisation("cluster", FLOAT, minimum=90)


@needs_nvrtc
def test_precompile_writes_what_the_run_time_looks_up(axpy, builds, monkeypatch, capsys):
    launcher(monkeypatch, Specialisation("axpy", FLOAT), CLUSTER)
    assert __main__.main(["precompile", "--arch", "80,90a"]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("axpy.cu")]
    places = [x.split("  NVRTC")[0] for x in lines]
    heads = ["axpy REAL=float  sm_80", "axpy REAL=float  sm_90a", "cluster REAL=float  sm_90a"]
    assert places == [f"axpy.cu  {head}" for head in heads]
    for line in lines:
        assert "registers, 0 B shared memory, 0 B spills, 0 B stack" in line
    assert len(builds) == 3
    compiler.cubin("axpy", "cluster", FLOAT, compiler.architecture((9, 0)))
    assert len(builds) == 3


@needs_nvrtc
def test_precompile_into_a_folder(axpy, monkeypatch, tmp_path, capsys):
    launcher(monkeypatch, Specialisation("axpy", FLOAT))
    assert __main__.main(["precompile", "--arch", "90a", "--out", str(tmp_path / "out")]) == 0
    assert entry_of(tmp_path / "out").suffix == ".cubin" and not axpy.exists()
    (tmp_path / "file").touch()
    assert __main__.main(["precompile", "--out", str(tmp_path / "file")]) == 2


@needs_nvrtc
def test_precompile_says_where_a_source_has_no_launcher(axpy, capsys):
    assert __main__.main(["precompile", "--arch", "80"]) == 0
    assert "axpy.cu: no launcher yet" in capsys.readouterr().out


@needs_nvrtc
def test_an_error_in_a_launcher_is_not_taken_for_no_launcher(axpy, monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "gti_kernels.cuda_kernels.axpy":
                raise ModuleNotFoundError("No module named 'other'", name="other")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="other"):
        compiler.sources()


@needs_nvrtc
def test_precompile_fails_where_a_kernel_does_not_compile(axpy, monkeypatch, capsys):
    launcher(monkeypatch, Specialisation("axpy"), Specialisation("axpy", FLOAT))
    assert __main__.main(["precompile", "--arch", "90a"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out and "1 failed" in out and "axpy REAL=float  sm_90a" in out


def test_architectures_are_those_a_device_looks_up(capsys):
    assert __main__.architectures("80,90a,100") == ["80", "90a", "100"]
    for text, hint in (
        ("90", "90a instead of 90"),
        ("100a", "100"),
        ("sm_80", "numbers"),
        ("", ""),
    ):
        with pytest.raises(SystemExit):
            __main__.main(["check", "--arch", text])
        assert hint in capsys.readouterr().err


@needs_nvrtc
@pytest.mark.parametrize("entry, arch", [("stack", "90a"), ("spill", "80")])
def test_check_fails_on_a_stack_frame_and_on_spills(axpy, monkeypatch, capsys, entry, arch):
    launcher(monkeypatch, Specialisation("axpy", FLOAT))
    assert __main__.main(["check", "--arch", arch]) == 0
    launcher(monkeypatch, Specialisation("axpy", FLOAT), Specialisation(entry, FLOAT))
    assert __main__.main(["check", "--arch", arch]) == 1
    lines = capsys.readouterr().out.splitlines()
    compilers = 2 if shutil.which("nvcc") else 1
    assert sum(line.endswith("FAILED") for line in lines) == compilers
    assert lines[-1] == f"{compilers} failed"


@pytest.mark.parametrize("spills, stack, good", [(0, 0, True), (4, 0, False), (0, 8, False)])
def test_spills_and_stack_each_fail_under_check_only(spills, stack, good):
    def compile_one(*job):
        return Resources(32, 0, spills, stack)

    job = ("axpy", Specialisation("axpy"), "80")
    assert [fine for _, fine in __main__._lines("x", compile_one, [job], True)] == [good]
    assert [fine for _, fine in __main__._lines("x", compile_one, [job], False)] == [True]


@needs_nvrtc
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
def test_check_compiles_with_nvcc_too(axpy, monkeypatch, capsys):
    launcher(monkeypatch, CLUSTER)
    assert __main__.main(["check", "--arch", "80,90a"]) == 0
    assert "cluster REAL=float  sm_90a  nvcc: " in capsys.readouterr().out
    launcher(monkeypatch, Specialisation("axpy"))
    assert __main__.main(["check", "--arch", "90a"]) == 1


# ---- sources ------------------------------------------------------------------------------------


def test_sources_of_the_checkout_are_those_that_are_built():
    ops = {stem for stem, backend in BUILT if backend == "cuda"}
    assert set(compiler.sources()) == {*ops, "phase_space"}  # of a plan, which is no op
    assert all(compiler.sources().values())


def test_headers_are_part_of_the_text_once(axpy):
    folder = compiler.FOLDERS[0]
    (folder / "b.cuh").write_text("#pragma once\nint b;\n")
    (folder / "a.cuh").write_text('#pragma once\n#include "b.cuh"\nint a;\n')
    (folder / "axpy.cu").write_text('#include "a.cuh"\n#include "b.cuh"\n' + AXPY)
    assert compiler.source("axpy").split()[:4] == ["int", "b;", "int", "a;"]
    assert compiler.source("axpy").count("int b;") == 1
    assert "#include" not in compiler.source("axpy")
    (folder / "b.cuh").unlink()
    with pytest.raises(FileNotFoundError, match=r"no CUDA source b\.cuh"):
        compiler.source("axpy")


def test_an_installed_wheel_brings_the_sources(tmp_path):
    for module in ("setuptools", "pybind11"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f'{module} is not installed: pip install "gti_kernels[test]"')
    tree = tmp_path / "tree"
    shutil.copytree(
        TREE / "gti_kernels",
        tree / "gti_kernels",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(TREE / name, tree)
    (tree / "csrc/cuda").mkdir(parents=True)
    (tree / "csrc/cuda/axpy.cu").write_text('#include "header.cuh"\n' + AXPY)
    (tree / "csrc/cuda/header.cuh").write_text("// a header\n")
    command = [sys.executable, "setup.py", "-q", "sdist", "bdist_wheel"]
    run = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = "from gti_kernels.cuda_kernels import compiler as c; print(c.__file__, c.source('axpy'))"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(site)) and AXPY in run.stdout and "a header" in run.stdout
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    listing = subprocess.run(["tar", "tf", str(sdist)], capture_output=True, text=True, check=True)
    assert "csrc/cuda/axpy.cu\n" in listing.stdout


# ---- what a launch needs ------------------------------------------------------------------------


def fake_kernel() -> runtime.Kernel:
    return runtime.Kernel(None, "axpy", torch.device("cpu"), Resources(8, 0, 0, 0))


def test_arguments_of_a_launch():
    x = torch.ones(3)
    half = ctypes.c_float(0.5)
    values = runtime.arguments(fake_kernel(), [half, x, None, 3, 2.0, True])
    assert values == [half, x.data_ptr(), 0, 3, 2.0, True]
    with pytest.raises(ValueError, match="argument 1 must be on cpu, got a tensor on meta"):
        runtime.arguments(fake_kernel(), [x, torch.ones(3, device="meta")])


def test_dimensions_of_a_launch():
    assert runtime.three(5) == (5, 1, 1)
    assert runtime.three((5, 4)) == (5, 4, 1) and runtime.three((5, 4, 3)) == (5, 4, 3)
    for wrong in (0, (), (1, 1, 1, 1), (4, -1)):
        with pytest.raises(ValueError, match="positive"):
            runtime.three(wrong)


def test_the_grid_is_counted_in_blocks():
    assert runtime.options((8, 6), 128, 1024, (4, 2)) == {
        "grid": (2, 3, 1),
        "cluster": (4, 2, 1),
        "block": (128, 1, 1),
        "shmem_size": 1024,
    }
    assert runtime.options(7, (32, 4))["grid"] == (7, 1, 1)
    with pytest.raises(ValueError, match="not made of clusters"):
        runtime.options(6, 32, 0, 4)


def test_options_are_those_of_the_installed_cuda_core():
    core = pytest.importorskip("cuda.core")
    given = runtime.options(1, 1, 0, 1, cooperative=True)
    assert len(given) == 5 and all(hasattr(core.LaunchConfig, name) for name in given)


# ---- without a GPU, without cuda-core -----------------------------------------------------------


def test_without_cuda_core_the_error_names_the_extra(tmp_path):
    code = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "cuda" or name.startswith("cuda."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
import gti_kernels as gti
from gti_kernels.cuda_kernels import __main__, compiler, runtime
for call in (
    lambda: compiler.cubin("axpy", "axpy", (), "90a"),
    compiler.cuda_core,
    compiler.compiler_version,
):
    try:
        call()
    except ImportError as error:
        print(error)
print(__main__.main(["precompile"]))
print(gti.build_info()["nvrtc"])
"""
    (tmp_path / "axpy.cu").write_text(AXPY)
    code = code.replace(
        "for call in",
        f"import pathlib\ncompiler.FOLDERS = (pathlib.Path({str(tmp_path)!r}),)\nfor call in",
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *errors, status, nvrtc = run.stdout.splitlines()
    assert len(errors) == 3 and (status, nvrtc) == ("2", "missing")
    assert all('pip install "gti_kernels[cuda]"' in x for x in [*errors, run.stderr])


def test_importing_it_touches_no_gpu_and_not_cuda_core():
    code = """
import sys, torch
import gti_kernels
from gti_kernels.cuda_kernels import __main__, compiler, runtime
print("cuda.core" in sys.modules, torch.cuda.is_initialized())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["False"] * 2, run.stderr


def test_available_tells_why_cuda_kernels_do_not_run(monkeypatch):
    if not torch.cuda.is_available():
        assert runtime.why_not() == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def missing():
        raise ImportError("no NVRTC here")

    monkeypatch.setattr(compiler, "compiler_version", missing)
    monkeypatch.setattr(runtime, "cuda_core", lambda: None)
    monkeypatch.setattr(backends, "BUILT", frozenset({("two_form", "cuda")}))
    assert backends._why_no_cuda() == "no NVRTC here"
    monkeypatch.setattr(compiler, "compiler_version", lambda: "13.0")
    assert backends._why_no_cuda() is None
    reason = backends.obstacle("two_form", "cuda", torch.device("cpu"), {})
    monkeypatch.setattr(backends, "available", lambda: {"cuda": None})
    reason = backends.obstacle("two_form", "cuda", torch.device("cpu"), {})
    assert reason == "the tensors are on cpu"
    assert backends.obstacle("two_form", "cuda", torch.device("cuda"), {}) is None
    monkeypatch.setattr(backends, "BUILT", frozenset({("two_form", "cpu")}))
    assert backends._why_no_cuda() == "no CUDA C++ kernel has been written yet"
