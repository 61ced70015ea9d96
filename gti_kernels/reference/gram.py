"""Weighted inner products in plain torch, every product exact and every sum compensated."""

from __future__ import annotations

import torch
from torch import Tensor

from .two_form import TINY, UNIT, dot2, exact_product


def gram(
    a: list[Tensor], b: list[Tensor] | None, weight: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """G_ij = Σ_c w_c a_ic b_jc and its error bound.

    a: list of [m, N_t] or of [B, m, N_t], b: of [l, N_t] or of [B, l, N_t], None for a; weight: of
    [N_t], None for ones. Any float dtype. Returns G and bound, [m, l] or [B, m, l], fp64. An entry
    beyond 2⁹⁹⁶ gives NaN.
    """
    x = torch.cat([t.double() for t in a], dim=-1)
    y = x if b is None else torch.cat([t.double() for t in b], dim=-1)
    *batch, m, n = x.shape
    l = y.shape[-2]
    w = x.new_ones(n) if weight is None else torch.cat([t.double() for t in weight])
    value, bound = x.new_zeros(*batch, m, l), x.new_zeros(*batch, m, l)
    # Σ|w a b| ≤ √(Σ|w|a²) √(Σ|w|b²); a tree of depth d leaves (d·u)² of it, the last rounding u of
    # the result.
    # What underflows in w z loses up to TINY, and that times the other factor in the product.
    lost = [16 * n * TINY * (1.0 + z.abs().amax(-1)) for z in (x, y)]
    norms = [((w * z * z).abs().sum(-1) + e).sqrt() for z, e in zip((x, y), lost)]
    depth = max(1, (2 * n).bit_length() + 4)
    for i in range(m):
        high, low = exact_product(w, x[..., i, :])
        for j in range(i if b is None else 0, l):
            y_j = y[..., j, :]
            g = dot2(torch.cat([high, low], -1), torch.cat([y_j, y_j], -1))
            size = norms[0][..., i] * norms[1][..., j]
            value[..., i, j], bound[..., i, j] = g, UNIT * g.abs() + 4 * (depth * UNIT) ** 2 * size
            if b is None:
                value[..., j, i], bound[..., j, i] = value[..., i, j], bound[..., i, j]
    return value, bound + lost[0][..., :, None] + lost[1][..., None, :]
