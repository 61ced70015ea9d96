"""What the launchers of power_iteration in CUDA C++ and in Triton share: memory for the results of
a list of weights, whose dtypes are launched one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .conventions import compute_dtype
from .tables import on_device, prefix


class Scalars(NamedTuple):
    """Of all M matrices of a call; written by the kernels."""

    sigma: Tensor  # fp64 [M, k]
    residual: Tensor  # fp64 [M, k]
    upper: Tensor  # fp64 [M]
    steps: Tensor  # int64 [M]
    converged: Tensor  # bool [M]


class Weights(NamedTuple):
    """Those of a call that have one dtype; C is the dtype of their vectors."""

    tensors: list[Tensor]  # [B, m, n], contiguous
    numbers: list[int]  # of the first matrix of each in the whole call
    start: Tensor | None  # C [Σ n·k], a [n, k] for each matrix
    u: Tensor  # C [Σ m·k], a [m, k] for each matrix, written
    v: Tensor  # C [Σ n·k], a [n, k] for each matrix, written


def for_each_dtype(
    weights: list[Tensor],
    k: int,
    start: list[Tensor] | None,
    launch: Callable[[Weights, Scalars], None],
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """σ [M, k], u, v (lists of [B, m, k], [B, n, k]), residual [M, k], steps, converged, upper [M].

    weights: tensors [B, m, n], each with its own B, m, n and dtype, M matrices in all; start:
    tensors [B, n, k] or None (random). σ, residual and upper are fp64.
    """
    device = weights[0].device
    numbers = prefix([w.shape[0] for w in weights])
    sigma, residual = torch.empty(2, numbers[-1], k, dtype=torch.float64, device=device)
    upper = torch.empty(numbers[-1], dtype=torch.float64, device=device)
    steps = torch.empty(numbers[-1], dtype=torch.int64, device=device)
    converged = torch.empty(numbers[-1], dtype=torch.bool, device=device)
    us: list[Tensor] = [weights[0]] * len(weights)
    vs = list(us)
    groups: dict[torch.dtype, list[int]] = {}
    for t, w in enumerate(weights):
        groups.setdefault(w.dtype, []).append(t)
    with on_device(device):
        for dtype, members in groups.items():
            tensors, c = [weights[t].contiguous() for t in members], compute_dtype(dtype)
            v0 = None if start is None else torch.cat([start[t].reshape(-1).to(c) for t in members])
            lengths = [[w.shape[0] * w.shape[axis] * k for w in tensors] for axis in (1, 2)]
            u, v = (torch.empty(sum(x), dtype=c, device=device) for x in lengths)
            launch(
                Weights(tensors, [numbers[t] for t in members], v0, u, v),
                Scalars(sigma, residual, upper, steps, converged),
            )
            for out, flat, axis in ((us, u, 1), (vs, v, 2)):
                for t, x in zip(members, flat.split(lengths[axis - 1]), strict=True):
                    out[t] = x.view(weights[t].shape[0], weights[t].shape[axis], k)
    return sigma, us, vs, residual, steps, converged, upper
