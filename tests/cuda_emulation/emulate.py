"""Kernels of csrc/cuda, built with g++ and run on the CPU, in place of `cuda_kernels.runtime`."""

from __future__ import annotations

import ctypes
import functools
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gti_kernels import backends
from gti_kernels.cuda_kernels import compiler

HERE = Path(__file__).parent
COMPILE = ("g++", "-std=c++20", "-Og", "-fPIC", "-fsanitize=alignment", "-Wno-unknown-pragmas",
           "-ffp-contract=off")  # fmt: skip  # what is to be fused is written as fma
_folder = tempfile.TemporaryDirectory(prefix="cuda_emulation")

#: 0: threads in the order of their numbers, 1: the other way round, more: shuffled; −1: block by
#: block, each as far as it gets without the others.
Order = int


class Emulator:
    """`kernel` and `launch` as in `runtime`. Blocks that wait for each other run at once, others
    one after the other."""

    def __init__(self, order: Order = 0, text: str | None = None) -> None:
        self.order = order
        self.text = text  # of the source, where it is not that of the stem
        self.launches: list[dict[str, Any]] = []

    def kernel(self, stem: str, entry: str, defines: tuple, device: Any) -> Any:
        text = self.text or compiler.source(stem)
        return build(text, entry, tuple(defines))

    def launch(
        self,
        kernel: Any,
        grid: int,
        block: int,
        args: Sequence[Any],
        *,
        shared_bytes: int = 0,
        cluster: int | None = None,
        cooperative: bool = False,
    ) -> None:
        self.launches.append({"grid": grid, "cluster": cluster, "cooperative": cooperative})
        words = (ctypes.c_uint64 * len(args))(*map(_word, args))
        resident = grid if cooperative else cluster or 1
        error = kernel(grid, block, cluster or 1, shared_bytes, resident, self.order, words)
        if error:
            raise RuntimeError(error.decode())


def use(
    monkeypatch: Any, launcher: Any, order: Order = 0, text: str | None = None, threads: int = 64
) -> Emulator:
    """The backend "cuda" of a launcher (the module that loads and launches) runs in the emulation,
    with so many threads a block."""
    emulator = Emulator(order, text)
    monkeypatch.setattr(launcher, "kernel", emulator.kernel)
    monkeypatch.setattr(launcher, "launch", emulator.launch)
    monkeypatch.setattr(launcher, "THREADS", threads)
    monkeypatch.setitem(backends.available(), "cuda", None)
    monkeypatch.setattr(backends, "obstacle", lambda op, backend, device, limits: None)
    return emulator


def _word(x: Any) -> int:
    """The 64 bits of a parameter."""
    if isinstance(x, Tensor):
        return x.data_ptr()
    if isinstance(x, float):
        return int.from_bytes(struct.pack("<d", x), "little")
    return (x or 0) % (1 << 64)


@functools.cache
def _driver() -> Path:
    """driver.cpp beside its header, which is compiled once for all kernels."""
    folder = Path(_folder.name)
    for name in ("driver.cpp", "emulation.h"):
        shutil.copy(HERE / name, folder)
    _run(*COMPILE, "-x", "c++-header", str(folder / "emulation.h"))
    return folder / "driver.cpp"


def _run(*line: str) -> None:
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@functools.cache
def build(text: str, entry: str, defines: tuple[tuple[str, Any], ...]) -> Any:
    """The function `emulate` of driver.cpp for a source text."""
    folder = Path(tempfile.mkdtemp(dir=_folder.name))
    source, code, library = folder / "source.cu", folder / "driver.o", folder / "driver.so"
    source.write_text(text, encoding="utf-8")
    macros = [f'-DSOURCE="{source}"', f"-DENTRY={entry}", *(f"-D{k}={v}" for k, v in defines)]
    # Linked apart: the library of the sanitizer is not needed.
    _run(*COMPILE, *macros, "-c", str(_driver()), "-o", str(code))
    _run("g++", "-shared", str(code), "-o", str(library))
    emulate = ctypes.CDLL(str(library)).emulate
    emulate.restype = ctypes.c_char_p
    u32, size = ctypes.c_uint, ctypes.c_size_t
    words = ctypes.POINTER(ctypes.c_uint64)
    emulate.argtypes = [u32, u32, u32, size, u32, ctypes.c_int, words]
    return emulate
