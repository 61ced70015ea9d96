"""The CPU kernels at the widths of vectors that this processor does not choose: the same sources,
built for one width alone. As a program: what the tests below run in a process of its own."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

TREE = Path(__file__).parent.parent
NAME = "gti_kernels._compiled"
WIDTHS = {"AVX512": 64, "AVX2": 32}  # bytes; of all other processors 16
OWN = WIDTHS.get(torch.backends.cpu.get_cpu_capability(), 16)
FLAGS = ["-std=c++20", "-w", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast"]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """width → the compiled part for it."""
    import pybind11

    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler, "a C++ compiler is needed to build the kernels"
    folder = tmp_path_factory.mktemp("levels")
    pybind = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    own = [f"-I{TREE / path}" for path in ("csrc/include", "csrc/cpu", "python")]

    def run(*arguments: object) -> None:
        done = subprocess.run(
            [compiler, *FLAGS, *map(str, arguments)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    def compiled(sources: str, name: str, *flags: str) -> list[Path]:
        paths = sorted(TREE.glob(sources))
        objects = [folder / f"{name}-{path.stem}.o" for path in paths]
        jobs = [(*flags, *own, *pybind, "-c", path, "-o", o) for path, o in zip(paths, objects)]
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda job: run(*job), jobs))
        return objects

    # The header that takes longest, once.
    (folder / "all.h").write_text("#include <pybind11/pybind11.h>\n")
    run("-x", "c++-header", *pybind, folder / "all.h", "-o", folder / "all.h.gch")
    bindings = compiled("python/*.cpp", "binding", "-include", str(folder / "all.h"))

    def build(width: int) -> Path:
        target = folder / f"_compiled-{width}.so"
        kernels = compiled("csrc/cpu/*.cpp", str(width), "-Og", f"-DGTI_LEVEL={width}")
        run("-shared", *bindings, *kernels, "-o", target)
        return target

    return build


def walks() -> str:
    """The bits of steps of `PhaseSpace`, which are to be the same on every machine."""
    import gti_kernels as gti

    digest = hashlib.sha256()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for exact in (False, True):
            generator = torch.Generator().manual_seed(3)
            params = [torch.randn(n, generator=generator).to(dtype) for n in (1, 7, 8, 30, 20_001)]
            space = gti.PhaseSpace(params, inv_mass=0.7, momentum="gaussian", exact=exact)
            energies = []
            for _ in range(3):
                grads = [x.detach().sin() for x in space.params]
                energies.append(space.kick_drift_(0.05, 0.05, damp=0.99, grads=grads))
            for x in [*space.params, *space.momenta, *energies]:
                digest.update(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("width", [w for w in (16, 32, 64) if w != OWN])
def test_kernels_of_other_widths_are_as_right(build, width):
    """Every sample is within its bound, and walks have the bits of this processor's own width."""
    done = subprocess.run(
        [sys.executable, __file__, build(width)], capture_output=True, text=True, cwd=TREE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == walks()


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location(NAME, sys.argv[1])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    from gti_kernels import backends, rows, testing

    assert backends.compiled is module
    for row in rows.ROWS:
        for dtype in row.dtypes:
            for output in testing.compare(row.name, dtype, "cpu"):
                assert output.error <= output.bound, (row.name, dtype, output)
    print(walks())
