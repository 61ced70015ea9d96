"""Blocks of row vectors, x [count, length] in memory; a program holds [P, index], P a power of two.

The threads that store an entry are not those that loaded it: a barrier stands before every store in
place, and after it where the entries are read again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dense import gram_schmidt


@triton.jit
def rows_of(x, length, index, COUNT: tl.constexpr, P: tl.constexpr):
    """x[:, index] of x [COUNT, length], zero outside: fp64 [P, index]."""
    i = tl.arange(0, P)[:, None]
    inside = (i < COUNT) & (index < length)[None, :]
    return tl.load(x + i * length + index[None, :], mask=inside, other=0.0).to(tl.float64)


@triton.jit
def store_rows(x, length, index, rows, COUNT: tl.constexpr, P: tl.constexpr):
    """x[:, index] ← rows [P, index], for x [COUNT, length]."""
    i = tl.arange(0, P)[:, None]
    inside = (i < COUNT) & (index < length)[None, :]
    tl.store(x + i * length + index[None, :], rows, mask=inside)


@triton.jit
def rotate(t, x, length, index, COUNT: tl.constexpr, J: tl.constexpr, P: tl.constexpr):
    """Σ_j t[:, j] x[j, index] over the first COUNT rows of x [·, length]: fp64 [P, index]."""
    i = tl.arange(0, P)
    out = tl.zeros((P, index.shape[0]), tl.float64)
    for j in range(COUNT):
        t_j = tl.load(t + i * J + j, mask=i < J, other=0.0)
        x_j = tl.load(x + j * length + index, mask=index < length, other=0.0)
        out += t_j[:, None] * x_j.to(tl.float64)[None, :]
    return out


@triton.jit
def store_gram(x, length, index, out, J: tl.constexpr, P: tl.constexpr):
    """out[i, j] = Σ of x[i]·x[j] over `index`, for x [J, length]."""
    i = tl.arange(0, P)
    rows = rows_of(x, length, index, J, P)
    for j in range(J):
        x_j = tl.load(x + j * length + index, mask=index < length, other=0.0).to(tl.float64)
        tl.store(out + j * J + i, tl.sum(rows * x_j[None, :], axis=1), mask=i < J)


@triton.jit
def orthonormalise(
    x, length, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr
):
    """The rows of x [K, length] made orthonormal in place, by coordinates from their Gram matrix;
    again, while they were near dependent. One that leaves nothing becomes a fixed random vector."""
    i = tl.arange(0, KP)
    # The reference draws [length, K + 1] for matrix −1 under seed 0.
    base = tl.full((), 0, tl.uint64) - 0xD1342543DE82EF95
    least = tl.full((), 0.0, tl.float64)
    turn = 0
    while (least < 0.25) & (turn < 5):
        tl.debug_barrier()  # x may have been written by another thread
        gram = tl.zeros((KP, KP), tl.float64)
        for first in range(0, length, BLOCK):
            rows = rows_of(x, length, first + tl.arange(0, BLOCK), K, KP)
            gram += tl.sum(rows[:, None, :] * rows[None, :, :], axis=2)
        e, left = gram_schmidt(gram, K, K, KP, 1e-12)
        left = tl.where(i < K, left, 1.0)
        least = tl.min(left, axis=0)
        for first in range(0, length, BLOCK):
            index = first + tl.arange(0, BLOCK)
            rows = rows_of(x, length, index, K, KP)
            fill = uniform(base, index[None, :] * (K + 1) + i[:, None] + 1).to(tl.float64)
            rows = tl.sum(e[:, :, None] * rows[None, :, :], axis=1)
            rows = tl.where((left <= 1e-12)[:, None], fill, rows).to(C)
            tl.debug_barrier()  # every thread has read what is written now
            store_rows(x, length, index, rows, K, KP)
        base += 0xD1342543DE82EF95  # other numbers, should these be dependent too
        turn += 1
    tl.debug_barrier()


@triton.jit
def uniform(base, count):
    """`start_vectors` of the reference: splitmix64's finaliser of base + count·γ, to (−1, 1)."""
    x = count.to(tl.uint64) * 0x94D049BB133111EB + base
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return ((x >> 40).to(tl.int32).to(tl.float32) * 2.0 + 1.0) * 5.9604644775390625e-08 - 1.0


@triton.jit
def store_transposed(
    x, out, length, finite, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr
):
    """out [length, K] = xᵀ of x [K, length], or NaN."""
    vector = tl.arange(0, KP)[:, None]
    for first in range(0, length, BLOCK):
        index = first + tl.arange(0, BLOCK)[None, :]
        inside = (vector < K) & (index < length)
        part = tl.load(x + vector * length + index, mask=inside, other=0.0)
        tl.store(out + index * K + vector, tl.where(finite, part, float("nan")), mask=inside)
