"""What several kernels share: a ragged list as one launch, block access, a fixed-order sum.

A list of tensors becomes one launch through a table in device memory (`gti_kernels.tables`): a row
of addresses per operand, a row of element counts, and the running number of blocks. A program finds
its tensor by binary search in the last row, casts the address to a pointer and works on its block.
A list of any length costs one launch, and nothing of it travels as kernel arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Triton's name of each dtype the kernels read; of a number in place of a tensor: None
TRITON_DTYPE = {
    None: None,
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int64: tl.int64,
}


@triton.jit
def find_item(starts, items, block):
    """The item i with starts[i] <= block < starts[i + 1]; starts: int64 [items + 1], ascending."""
    low = block * 0
    high = low + items - 1
    while low < high:
        middle = (low + high + 1) // 2
        here = tl.load(starts + middle) <= block
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle - 1)
    return low


@triton.jit
def pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An int64 address as a typed pointer. ALIGNED says it is a multiple of 16 bytes: the compiler
    cannot see that through an integer, and without it no load is wider than one element."""
    base = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base


@triton.jit
def load_block(base, lanes, count, FULL: tl.constexpr, COMPUTE: tl.constexpr):
    """base[lanes] in COMPUTE, zero from `count` on. A mask would keep a full block from being read
    in 16-byte pieces, so that block has none."""
    if FULL:
        x = tl.load(base + lanes)
    else:
        x = tl.load(base + lanes, mask=lanes < count, other=0.0)
    return widen(x, COMPUTE)


@triton.jit
def store_block(base, lanes, count, x, FULL: tl.constexpr):
    """base[lanes] ← x, which has the dtype of memory already."""
    if FULL:
        tl.store(base + lanes, x)
    else:
        tl.store(base + lanes, x, mask=lanes < count)


@triton.jit
def widen(x, COMPUTE: tl.constexpr):
    """x in COMPUTE (fp32 or fp64). By way of fp32: the interpreter knows no bf16 to fp64."""
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x.to(COMPUTE)


@triton.jit(do_not_specialize=["count"])
def sum_kernel(x, out, count: tl.int64, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    """out[c] = Σ of the c-th BLOCK·ROUNDS numbers of x [count], fp64, in an order that is fixed."""
    chunk = tl.program_id(0)
    first = chunk.to(tl.int64) * (BLOCK * ROUNDS)
    total = tl.zeros((BLOCK,), tl.float64)
    for r in range(ROUNDS):
        index = first + r * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(x + index, mask=index < count, other=0.0)
    tl.store(out + chunk, tl.sum(total, axis=0))


def in_memory(
    factors: Sequence[float | Tensor], device: torch.device
) -> tuple[Sequence[float | Tensor], Tensor | None]:
    """The factors of a step for a kernel: as numbers and None; or, where any is a 0-d tensor, zeros
    and all of them as fp64 [n] on the device, which nobody waits for."""
    if not any(isinstance(x, Tensor) for x in factors):
        return factors, None
    each = [
        x.to(torch.float64)
        if isinstance(x, Tensor)
        else torch.full((), x, dtype=torch.float64, device=device)
        for x in factors
    ]
    return [0.0] * len(factors), torch.stack(each)


SUM_BLOCK, SUM_ROUNDS = 1024, 8
SUM_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def fixed_sum(x: Tensor) -> Tensor:
    """Σ x of fp64 [count] as a 0-d tensor: the same bits for the same numbers."""
    if x.numel() == 0:
        return x.new_zeros(())
    while x.numel() > 1:
        out = x.new_empty(triton.cdiv(x.numel(), SUM_BLOCK * SUM_ROUNDS))
        sum_kernel[(out.numel(),)](
            x, out, x.numel(), BLOCK=SUM_BLOCK, ROUNDS=SUM_ROUNDS, **SUM_OPTIONS
        )
        x = out
    return x.reshape(())


def samples() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Kernel, signature, constants and options of typical launches, to compile ahead of time."""
    signature = {"x": "*fp64", "out": "*fp64", "count": "i64"}
    return [(sum_kernel, signature, {"BLOCK": SUM_BLOCK, "ROUNDS": SUM_ROUNDS}, SUM_OPTIONS)]
