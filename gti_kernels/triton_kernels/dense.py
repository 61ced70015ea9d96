"""Small matrices in fp64, held by one program: tiles [P, P], P a power of two up to 32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gram_schmidt(gram, P: tl.constexpr, LEAST: tl.constexpr):
    """E [P, P] and q [P] for vectors with this Gram matrix, taken in their order.

    E·(vectors) is orthonormal; q_j is the share of ‖vector j‖² that those before it leave. Where
    q_j ≤ LEAST the vector has nothing new, and row j of E is zero.
    """
    i = tl.arange(0, P)
    diagonal = i[:, None] == i[None, :]
    square = tl.sum(tl.where(diagonal, gram, 0.0), axis=1)
    usable = (square > 1e-280) & (square < float("inf"))
    scale = tl.where(usable, 1.0 / tl.sqrt(tl.where(usable, square, 1.0)), 0.0)
    c = tl.where(usable[:, None] & usable[None, :], gram, 0.0) * scale[:, None] * scale[None, :]
    e = tl.where(diagonal, scale[:, None], 0.0)
    left = tl.zeros((P,), tl.float64)
    for j in range(P):
        own = i == j
        c_j = tl.sum(tl.where(own[:, None], c, 0.0), axis=0)
        e_j = tl.sum(tl.where(own[:, None], e, 0.0), axis=0)
        q = tl.sum(tl.where(own, c_j, 0.0), axis=0)
        inverse = tl.where(q > LEAST, 1.0 / tl.sqrt(tl.where(q > LEAST, q, 1.0)), 0.0)
        c_j *= inverse
        e_j *= inverse
        later = tl.where(i > j, c_j, 0.0)[:, None]  # c is symmetric: this is its column
        c -= later * c_j[None, :]
        e = tl.where(own[:, None], e_j[None, :], e - later * e_j[None, :])
        left = tl.where(own, q, left)
    return e, left


@triton.jit
def eigenvectors(h, P: tl.constexpr):
    """Unit eigenvectors (rows) and eigenvalues of a symmetric h, unordered: Jacobi, P/2 rotations
    at once. Partners differ by exclusive or with the number of the turn: in P − 1 turns all meet.
    """
    i = tl.arange(0, P)
    row, col = i[:, None], i[None, :]
    vectors = tl.where(row == col, 1.0, 0.0).to(tl.float64)
    sweep = 0
    while (sweep < 12) & _is_full(h, P):
        for turn in range(1, P):
            partner = i ^ turn
            rows = tl.broadcast_to(partner[:, None], (P, P))
            across = tl.sum(tl.where(col == partner[:, None], h, 0.0), axis=1)
            own = tl.sum(tl.where(row == col, h, 0.0), axis=1)
            tau = (tl.gather(own, partner, axis=0) - own) / tl.where(across == 0, 1.0, 2.0 * across)
            up = (tau > 0) | ((tau == 0) & (i < partner))  # of two partners, one turns each way
            tan = tl.where(up, 1.0, -1.0) / (tl.abs(tau) + tl.sqrt(1.0 + tau * tau))
            tan = tl.where(across == 0, 0.0, tan)
            cos = 1.0 / tl.sqrt(1.0 + tan * tan)
            sin = cos * tan
            h = cos[:, None] * h - sin[:, None] * tl.gather(h, rows, axis=0)
            h = cos[None, :] * h - sin[None, :] * tl.gather(h, tl.trans(rows), axis=1)
            h = tl.where(col == partner[:, None], 0.0, h)  # exactly, so that sweeps come to an end
            vectors = cos[:, None] * vectors - sin[:, None] * tl.gather(vectors, rows, axis=0)
        sweep += 1
    return vectors, tl.sum(tl.where(row == col, h, 0.0), axis=1)


@triton.jit
def _is_full(h, P: tl.constexpr):
    """Whether anything off the diagonal could still change an eigenvector."""
    i = tl.arange(0, P)
    square = h * h
    off = tl.where(i[:, None] == i[None, :], 0.0, square)
    return tl.sum(tl.sum(off, axis=1), axis=0) > 1e-40 * tl.sum(tl.sum(square, axis=1), axis=0)


@triton.jit
def product(a, b, P: tl.constexpr):
    """a b of two tiles [P, P]."""
    if P > 16:  # the sum below would not fit into registers
        return tl.dot(a, b, input_precision="ieee", out_dtype=tl.float64)
    else:
        return tl.sum(a[:, :, None] * b[None, :, :], axis=1)
