"""Weighted inner products in plain torch, every product exact and every sum compensated."""

from __future__ import annotations

import torch
from torch import Tensor

from .two_form import UNIT, dot2, exact_product


def gram(
    a: list[Tensor], b: list[Tensor] | None, weight: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """G_ij = Σ_c w_c a_ic b_jc and its error bound.

    a: list of [m, N_t] or of [B, m, N_t], b: of [l, N_t] or of [B, l, N_t], None for a; weight: of
    [N_t], None for ones. Any float dtype. Returns G and bound, [m, l] or [B, m, l], fp64.
    """
    if a[0].ndim == 3:
        bs = [None] * len(a[0]) if b is None else [list(y) for y in zip(*b, strict=True)]
        pairs = zip(zip(*a, strict=True), bs, strict=True)
        values, bounds = zip(*(gram(list(x), y, weight) for x, y in pairs))
        return torch.stack(values), torch.stack(bounds)
    x = torch.cat([t.double() for t in a], dim=1)
    y = x if b is None else torch.cat([t.double() for t in b], dim=1)
    w = x.new_ones(x.shape[1]) if weight is None else torch.cat([t.double() for t in weight])
    value, bound = x.new_zeros(len(x), len(y)), x.new_zeros(len(x), len(y))
    # Σ|w a b| ≤ √(Σ|w|a²) √(Σ|w|b²); a tree of depth d leaves (d·u)² of it, the last rounding u of
    # the result.
    norms = [(w.abs() * z.square()).sum(1).sqrt() for z in (x, y)]
    depth = max(1, (2 * x.shape[1]).bit_length() + 4)
    tiny = torch.finfo(torch.float64).smallest_normal * UNIT  # products below it vanish
    for i in range(len(x)):
        high, low = exact_product(w, x[i])
        for j in range(i if b is None else 0, len(y)):
            value[i, j] = dot2(torch.cat([high, low]), torch.cat([y[j], y[j]]))
            size = norms[0][i] * norms[1][j]
            bound[i, j] = UNIT * value[i, j].abs() + 4 * (depth * UNIT) ** 2 * size
            if b is None:
                value[j, i], bound[j, i] = value[i, j], bound[i, j]
    return value, bound + 8 * x.shape[1] * tiny
