"""What the launchers of kernels over a list of tensors share; in CUDA C++: `csrc/cuda/ragged.cuh`.

A list of any length costs one launch for each combination of dtypes. Factors may be numbers or 0-d
fp64 tensors on the device, which nobody waits for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .compiler import Specialisation
from .runtime import kernel, launch

#: The macro ELEMENT
ELEMENT = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
THREADS = 256  # of a block
Factor = float | Tensor


def chunk() -> int:
    """Elements that a block takes, as `csrc/cuda/ragged.cuh` has them."""
    return 32 * THREADS


def specialisation(entry: str, dtype: torch.dtype, **macros: int) -> Specialisation:
    """A kernel for tensors of a dtype."""
    numbers = ((name, int(value)) for name, value in macros.items())
    return Specialisation(entry, (("ELEMENT", ELEMENT[dtype]), *numbers, ("THREADS", THREADS)))


def run(
    stem: str,
    needed: Specialisation,
    blocks: int,
    args: list[Any],
    device: torch.device,
    shared_bytes: int = 0,
) -> None:
    """Launches a kernel; its blocks have the THREADS of its macro. shared_bytes: of a block, at
    least what `block_sum` takes."""
    threads = int(dict(needed.defines)["THREADS"])
    compiled = kernel(stem, needed.entry, needed.defines, device)
    launch(compiled, blocks, threads, args, shared_bytes=max(shared_bytes, threads // 32 * 8))


def factor(x: Factor) -> tuple[float, Tensor | None]:
    """Number and address of a factor as a kernel takes it: the address where there is one."""
    return (0.0, x.to(torch.float64)) if isinstance(x, Tensor) else (float(x), None)
