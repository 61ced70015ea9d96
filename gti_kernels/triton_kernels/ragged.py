"""What several kernels share: a ragged list as one launch, block access, a fixed-order sum.

A list of tensors becomes one launch through a table in device memory (`gti_kernels.tables`): a row
of addresses per operand, a row of element counts, and the running number of blocks. A program finds
its tensor by binary search in the last row, casts the address to a pointer and works on its block.
A list of any length costs one launch, and nothing of it travels as kernel arguments.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tables import prefix

#: Triton's name of each dtype the kernels read
TRITON_DTYPE = {
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


def fp64_bits(x: float) -> int:
    """The bits of an fp64 number as an int64, so that it fits into a table."""
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


class Group(NamedTuple):
    """The tensors of a list that share their dtypes: one launch."""

    dtypes: tuple[Any, ...]  # Triton's, one per operand; None where it is a number
    wide: bool  # every address is a multiple of 16 bytes
    items: int
    blocks: int
    rows: tuple[tuple[int, ...], ...]  # one per operand, then counts, then first blocks


def elementwise_groups(operands: Sequence[Sequence[Tensor | float]], block: int) -> list[Group]:
    """Lists of L tensors of the same sizes (or numbers, one per tensor), grouped by their dtypes.

    Empty tensors are left out. The row of a number holds its fp64 bits.
    """
    found: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
    for item in zip(*operands, strict=True):
        count = item[0].numel()  # type: ignore[union-attr]
        if count:
            dtypes = tuple(TRITON_DTYPE[x.dtype] if isinstance(x, Tensor) else None for x in item)
            row = [x.data_ptr() if isinstance(x, Tensor) else fp64_bits(x) for x in item]
            found.setdefault(dtypes, []).append((*row, count))
    groups = []
    for dtypes, items in found.items():
        columns = tuple(zip(*items, strict=True))
        starts = tuple(prefix([triton.cdiv(n, block) for n in columns[-1]]))
        wide = not any(
            a % 16 for d, column in zip(dtypes, columns, strict=False) if d for a in column
        )
        groups.append(Group(dtypes, wide, len(items), starts[-1], (*columns, starts)))
    return groups


def samples() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Kernel, signature, constants and options of typical launches, to compile ahead of time."""
    signature = {"x": "*fp64", "out": "*fp64", "count": "i64"}
    return [(sum_kernel, signature, {"BLOCK": SUM_BLOCK, "ROUNDS": SUM_ROUNDS}, SUM_OPTIONS)]
