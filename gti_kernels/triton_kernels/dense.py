"""Small matrices in fp64, held by one program: tiles [P, P], P a power of two up to 32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gram_schmidt(
    gram, COUNT: tl.constexpr, OLD: tl.constexpr, P: tl.constexpr, LEAST: tl.constexpr
):
    """E [P, P] and q [P] for COUNT vectors with this Gram matrix, taken in their order.

    E·(vectors) is orthonormal; q_j is the share of ‖vector j‖² that those before it leave. Where
    q_j ≤ LEAST, or less than half is left by the first OLD vectors of one that follows them, the
    vector has nothing new: q_j = 0, and row j of E is zero.
    """
    i = tl.arange(0, P)
    square = diagonal(gram, P)
    usable = (square > 1e-280) & (square < float("inf"))
    scale = tl.where(usable, 1.0 / tl.sqrt(tl.where(usable, square, 1.0)), 0.0)
    c = tl.where(usable[:, None] & usable[None, :], gram, 0.0) * scale[:, None] * scale[None, :]
    e = tl.where(i[:, None] == i[None, :], scale[:, None], 0.0)
    q = tl.where(usable, 1.0, 0.0).to(tl.float64)
    for j in range(COUNT):
        q = tl.where((j == OLD) & (i >= OLD) & (q < 0.5), 0.0, q)
        kept = q > LEAST
        inverse = tl.gather(
            tl.where(kept, 1.0 / tl.sqrt(tl.where(kept, q, 1.0)), 0.0), i * 0 + j, 0
        )
        c_j = tl.reshape(tl.gather(c, i[None, :] * 0 + j, 0), (P,)) * inverse
        e_j = tl.reshape(tl.gather(e, i[None, :] * 0 + j, 0), (P,)) * inverse
        later = tl.where(i > j, c_j, 0.0)  # c is symmetric: a part of its column
        c -= later[:, None] * c_j[None, :]
        e = tl.where(i[:, None] == j, e_j[None, :], e - later[:, None] * e_j[None, :])
        q -= later * later
    return e, q


@triton.jit
def eigenvectors(h, P: tl.constexpr):
    """Unit eigenvectors (rows) and eigenvalues of a symmetric h, unordered: Jacobi, P/2 rotations
    at once. Partners differ by exclusive or with the number of the turn: in P − 1 turns all meet.
    """
    i = tl.arange(0, P)
    same = i[:, None] == i[None, :]
    vectors = tl.where(same, 1.0, 0.0).to(tl.float64)
    values = diagonal(h, P)
    total = tl.sum(h * h)
    h = tl.where(same, 0.0, h)
    off = tl.sum(h * h)
    sweep = 0
    while (off > 1e-32 * total) & (sweep < 12):
        for turn in range(1, P):
            partner = i ^ turn
            across = tl.reshape(tl.gather(h, partner[:, None], 1), (P,))
            tau = (tl.gather(values, partner, 0) - values) / tl.where(across == 0, 1.0, 2 * across)
            up = (tau > 0) | ((tau == 0) & (i < partner))  # of two partners, one turns each way
            tan = tl.where(up, 1.0, -1.0) / (tl.abs(tau) + tl.sqrt(1.0 + tau * tau))
            tan = tl.where(across == 0, 0.0, tan)
            cos = 1.0 / tl.sqrt(1.0 + tan * tan)
            sin = cos * tan
            rows = tl.broadcast_to(partner[:, None], (P, P))
            columns = tl.broadcast_to(partner[None, :], (P, P))
            values -= tan * across
            h = tl.where(rows == i[None, :], 0.0, h)
            h = cos[:, None] * h - sin[:, None] * tl.gather(h, rows, 0)
            h = cos[None, :] * h - sin[None, :] * tl.gather(h, columns, 1)
            vectors = cos[:, None] * vectors - sin[:, None] * tl.gather(vectors, rows, 0)
        off = tl.sum(h * h)
        sweep += 1
    return vectors, values


@triton.jit
def diagonal(a, P: tl.constexpr):
    return tl.reshape(tl.gather(a, tl.arange(0, P)[:, None], 1), (P,))


@triton.jit
def product(a, b, P: tl.constexpr):
    """a b of two tiles [P, P]."""
    if P > 16:  # the sum below would not fit into registers
        return tl.dot(a, b, input_precision="ieee", out_dtype=tl.float64)
    else:
        return tl.sum(a[:, :, None] * b[None, :, :], axis=1)
