"""The symplectic 2-form in plain torch, every product exact and every sum compensated."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 2.0**-53  #: fp64 unit roundoff
TINY = 2.0**-1074  #: the smallest fp64 number: what underflows loses less than that


def two_form(
    dq: list[Tensor], dp: list[Tensor], metric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ω_ij = Σ_a dq_ia dp_ja − dp_ia dq_ja, its error bound, and S_ij = Σ_a dq_ia dq_ja + dp_ia
    dp_ja.

    dq, dp: lists of [m, N_t] or of [B, m, N_t], any float dtype. Returns Ω [m, m], bound [m, m],
    S [m, m] or None, each with B in front where the inputs have it, all fp64. Only i < j is summed;
    Ω_ji = −Ω_ij and Ω_ii = 0 hold to the bit. An entry beyond 2⁹⁹⁶ gives NaN.
    """
    q = torch.cat([t.double() for t in dq], dim=-1)
    p = torch.cat([t.double() for t in dp], dim=-1)
    *batch, m, n = q.shape
    omega = q.new_zeros(*batch, m, m)
    gram = q.new_zeros(*batch, m, m)
    for i in range(m):
        for j in range(i, m):
            q_i, p_i, q_j, p_j = q[..., i, :], p[..., i, :], q[..., j, :], p[..., j, :]
            if i < j:
                omega[..., i, j] = dot2(torch.cat([q_i, -p_i], -1), torch.cat([p_j, q_j], -1))
                omega[..., j, i] = -omega[..., i, j]
            if metric or i == j:
                gram[..., i, j] = dot2(torch.cat([q_i, p_i], -1), torch.cat([q_j, p_j], -1))
                gram[..., j, i] = gram[..., i, j]
    # Σ|q_i p_j| + |p_i q_j| ≤ ‖z_i‖‖z_j‖; a tree of depth d leaves (d·u)² of it, and u of the
    # result for the last rounding.
    squares = gram.diagonal(dim1=-2, dim2=-1)
    norm = (squares + 16 * n * TINY).sqrt()
    depth = max(1, (2 * n).bit_length() + 2)
    bound = UNIT * omega.abs() + 4 * (depth * UNIT) ** 2 * norm[..., :, None] * norm[..., None, :]
    bound += 16 * n * TINY
    # 0 · NaN: a vector with a NaN has no zero on the diagonal either.
    omega += torch.diag_embed(torch.where(squares.isnan(), squares, 0.0))
    bound.diagonal(dim1=-2, dim2=-1).copy_(omega.diagonal(dim1=-2, dim2=-1))
    return omega, bound, (gram if metric else None)


def dot2(a: Tensor, b: Tensor) -> Tensor:
    """Σ a_i b_i over the last axis of fp64 tensors as if in twice the precision (Ogita, Rump, Oishi
    2005, Dot2).

    Products are split without error; sums go up a binary tree that keeps each rounding
    error (Knuth's TwoSum) instead of left to right: the same statement, a smaller constant.
    """
    high, low = exact_product(a, b)
    while high.shape[-1] > 1:
        if high.shape[-1] % 2:
            high, low = torch.nn.functional.pad(high, (0, 1)), torch.nn.functional.pad(low, (0, 1))
        x, y = high[..., 0::2], high[..., 1::2]
        total = x + y
        back = total - x
        low = low[..., 0::2] + low[..., 1::2] + ((x - (total - back)) + (y - back))
        high = total
    return (high + low).sum(-1)


def exact_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a b = high + low without error, high the rounded product (Dekker)."""
    high = a * b
    a1, a2 = _split(a)
    b1, b2 = _split(b)
    return high, a2 * b2 - (((high - a1 * b1) - a2 * b1) - a1 * b2)


def _split(a: Tensor) -> tuple[Tensor, Tensor]:
    """a = a1 + a2 without error, each half with at most 26 bits (Veltkamp)."""
    c = 134217729.0 * a
    a1 = c - (c - a)
    return a1, a - a1
