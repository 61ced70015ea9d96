"""The C++: torch-free, Python-free, warning-free, without intrinsics of one instruction set."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gti_kernels import backends
from gti_kernels.rows import BUILT

TREE = Path(__file__).parent.parent
CSRC = sorted(p for p in (TREE / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))
PYTHON = sorted((TREE / "python").glob("*.[ch]*"))
SOURCES = sorted((TREE / "csrc/cpu").glob("*.cpp"))


def name(path: Path) -> str:
    return str(path.relative_to(TREE))


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def test_there_are_sources():
    ops = {stem for stem, backend in BUILT if backend == "cpu"}
    assert {p.stem for p in SOURCES} == ops | {"phase_space"}  # a plan, no op
    assert len(CSRC) > len(SOURCES) and PYTHON


@pytest.mark.parametrize("path", CSRC, ids=name)
def test_csrc_knows_neither_torch_nor_python(path):
    banned = re.compile(r"torch|ATen|c10|Python\.h|pybind11|numpy", re.IGNORECASE)
    assert not [header for header in includes(path) if banned.search(header)]
    assert not re.search(r"\bPyObject\b|\bat::|\bc10::|\btorch::|\bpybind11\b", path.read_text())


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_bindings_know_no_torch(path):
    assert not [header for header in includes(path) if re.search(r"torch|ATen|c10", header)]


@pytest.mark.parametrize("path", CSRC + PYTHON, ids=name)
def test_no_intrinsics_of_one_instruction_set(path):
    text = path.read_text()
    assert not re.search(r"\b_mm\d*_|__builtin_ia32|\bsv[a-z]+_f(32|64)|\bv[a-z]+q_f(32|64)", text)
    assert not [h for h in includes(path) if re.search(r"intrin\.h|arm_neon|arm_sve", h)]


def test_no_flag_for_one_machine():
    text = (TREE / "setup.py").read_text()
    assert not re.search(r"-march|-mtune|-mavx|-ffast-math|-Ofast", text)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_each_source_compiles_alone_without_a_warning(path):
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler, "a C++ compiler is needed to check the sources"
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fopenmp"]
    folders = [f"-I{TREE / 'csrc/include'}", f"-I{TREE / 'csrc/cpu'}"]
    run = subprocess.run([compiler, *flags, *folders, str(path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_extension_links_no_torch_and_no_cuda():
    tool = shutil.which("readelf") or shutil.which("objdump")
    assert tool, "readelf or objdump of binutils is needed to look at the extension"
    option = "-d" if tool.endswith("readelf") else "-p"
    listing = subprocess.run(
        [tool, option, backends.compiled.__file__], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*?(lib[\w+-]+\.so[\w.]*)", listing)
    assert any(lib.startswith("libstdc++") or lib.startswith("libc.") for lib in needed)
    assert not [lib for lib in needed if re.search(r"torch|c10|cuda|cudart|mkl|python", lib)]
