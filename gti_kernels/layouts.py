"""How the tensors of a plan lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_dense(q: Tensor) -> bool:
    """Whether counting through its elements from the first one visits each once."""
    return not q.is_neg() and torch.empty_like(q, device="meta").stride() == q.stride()


def layout(x: Tensor) -> tuple[Any, ...]:
    """What a plan expects to find again: shape, strides, dtype, device."""
    return tuple(x.shape), x.stride(), x.dtype, x.device


def words(found: tuple[Any, ...]) -> str:
    """A `layout` in words."""
    shape, stride, dtype, device = found
    return f"{shape} with strides {stride} of {dtype} on {device}"


def laid_out_like(q: Tensor, x: Tensor) -> Tensor:
    """x with the strides of q, so that a kernel can walk through both as flat memory."""
    if x.stride() == q.stride() and not x.is_neg():
        return x
    return torch.empty_like(q, dtype=x.dtype, requires_grad=False).copy_(x)


def allocate(
    like: Sequence[Tensor], dtypes: Sequence[torch.dtype]
) -> tuple[list[Tensor], list[Tensor]]:
    """One zeroed tensor like each, in the dtypes given, as views of one memory per dtype; and
    these memories. Views share their version counter, so autograd is told of a step once."""
    ends: dict[torch.dtype, int] = {}
    starts = []
    for x, dtype in zip(like, dtypes):
        start = -(-ends.get(dtype, 0) // 16) * 16  # on a boundary of 64 bytes or more
        starts.append(start)
        ends[dtype] = start + x.numel()
    device = like[0].device if like else None
    memory = {d: torch.zeros(n, dtype=d, device=device) for d, n in ends.items()}
    views = [
        memory[d].as_strided(x.shape, torch.empty_like(x, device="meta").stride(), start)
        for x, d, start in zip(like, dtypes, starts)
    ]
    return views, list(memory.values())
