"""Top singular triples in Triton: three ragged launches per pass over every W of a list.

Per matrix there is a basis X of row vectors [J, n]: v, s, d (method "cg", J = 3k) or v, d ("power",
J = 2k), with Y = X Wᵀ and Z = Y W beside it; d are the k directions whose images a pass finds.

  pass    one program per panel of rows: moves Y along with the last rotation, y = W d, the panel's
          shares of z = Wᵀy (the panel is read twice, the second time from cache) and of Y Yᵀ
  solve   one program per matrix: Rayleigh–Ritz in the span of X; the rotation T [J, J]
  update  one program per block of columns: adds the shares of z, X ← T X, Z ← T Z, the residual and
          the next d, the block's share of X Xᵀ

X is not orthonormal: its Gram matrix X Xᵀ is measured, and solve orthonormalises in coordinates, in
fp64. Shares are added in a fixed order. A matrix that has converged is found out by its residual, and
its programs return at once: the host launches `max_steps` passes and never waits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..conventions import compute_dtype
from .ragged import TRITON_DTYPE, device_table, find_item, on_device, pointer, prefix, widen

#: The largest k: 3k vectors fill a tile of 32, the largest whose eigenproblem stays in registers.
MOST_TRIPLES = 8

# The table of a launch: int64 rows of one number per matrix, then first panels and first column
# blocks (items + 1 numbers each). Rows:
#   0 address of W   1 m   2 n   3 shape   4 number of the matrix in the call
#   5, 6, 7 matrices before it: Σm, Σn, Σ panels·n   8 panels
ROWS = tl.constexpr(9)

# Rows of a panel by the shape of W: narrow, flat, any other; 3 is 2 with every row on a 16-byte
# boundary. The kernels choose a tile of as many rows by the same number.
PANEL_ROWS = [64, 4, 16, 16]
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
LONG_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}  # of one program per matrix

# A vector that is this much shorter after orthogonalisation (squared) has nothing new in it.
DEPENDENT = tl.constexpr(1e-4)


@triton.jit(do_not_specialize=["items"])
def largest_kernel(
    table,
    items: tl.int64,
    largest,  # C [panels], written
    DTYPE: tl.constexpr,
    C: tl.constexpr,  # dtype of arithmetic
):
    """largest[panel] = max |W| over the panel, infinite where W holds a NaN."""
    program = tl.program_id(0).to(tl.int64)
    item = find_item(table + ROWS * items, items, program)
    panel = program - tl.load(table + ROWS * items + item)
    a = pointer(tl.load(table + item), DTYPE, False)
    m = tl.load(table + items + item)
    n = tl.load(table + 2 * items + item)
    kind = tl.load(table + 3 * items + item)
    if kind == 0:
        _largest(a, largest + program, panel, m, n, C, 64, 32)
    elif kind == 1:
        _largest(a, largest + program, panel, m, n, C, 4, 512)
    else:
        _largest(a, largest + program, panel, m, n, C, 16, 128)


@triton.jit
def _largest(a, out, panel, m, n, C: tl.constexpr, PANEL: tl.constexpr, COLUMNS: tl.constexpr):
    row = panel * PANEL + tl.arange(0, PANEL)
    top = tl.zeros((PANEL, COLUMNS), C)
    for first in range(0, n, COLUMNS):
        x = tl.abs(_tile(a, row, first + tl.arange(0, COLUMNS), m, n, C))
        top = tl.maximum(top, tl.where(x < float("inf"), x, float("inf")))
    tl.store(out, tl.max(tl.max(top, axis=1), axis=0))


@triton.jit
def _tile(a, row, column, m, n, C: tl.constexpr):
    """W[row, column] in C, zero outside."""
    inside = (row < m)[:, None] & (column < n)[None, :]
    return widen(tl.load(a + row[:, None] * n + column[None, :], mask=inside, other=0.0), C)


@triton.jit(do_not_specialize=["items", "seed"])
def begin_kernel(
    table,
    items: tl.int64,
    largest,  # C [panels]
    scale,  # fp64 [items], written; NaN for a matrix that is not finite
    start,  # C [Σn·K], a [n, K] per matrix, read unless RANDOM
    basis,  # C [Σn·J], d is written
    basis_shares,  # fp64 [blocks, J, J], zero on entry
    seed: tl.int64,
    RANDOM: tl.constexpr,
    LIMIT: tl.constexpr,  # largest power of two with a normal inverse in C
    K: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For each matrix: a power of two that brings its largest entry to [1, 2), orthonormal d."""
    KP: tl.constexpr = triton.next_power_of_2(K)
    item = tl.program_id(0).to(tl.int64)
    n = tl.load(table + 2 * items + item)
    first = tl.load(table + ROWS * items + item)
    end = tl.load(table + ROWS * items + item + 1)
    lanes = tl.arange(0, BLOCK)
    top = tl.zeros((BLOCK,), C)
    for i in range(first, end, BLOCK):
        top = tl.maximum(top, tl.load(largest + i + lanes, mask=i + lanes < end, other=0.0))
    top = tl.max(top, axis=0).to(tl.float64)
    # The exponent bits of an fp64 number are that power of two. It and its inverse must be normal
    # numbers of the arithmetic: for W near its limits the largest entry is merely of moderate size.
    power = (top.to(tl.int64, bitcast=True) >> 52) << 52
    power = power.to(tl.float64, bitcast=True)
    power = tl.minimum(power, LIMIT)
    power = tl.maximum(power, 1.0 / LIMIT)
    power = tl.where(top > 0, power, 1.0)
    tl.store(scale + item, tl.where(top < float("inf"), power, float("nan")))

    place = tl.load(table + 6 * items + item)
    d = basis + place * J + (J - K) * n
    start += place * K
    matrix = tl.load(table + 4 * items + item).to(tl.uint64)
    base = tl.full((), seed, tl.int64).to(tl.uint64) * 0x9E3779B97F4A7C15
    base += matrix * 0xD1342543DE82EF95
    vector = tl.arange(0, KP)[:, None]
    for i in range(0, n, BLOCK):
        row = (i + lanes)[None, :]
        inside = (vector < K) & (row < n)
        if RANDOM:
            x = _uniform(base, row * K + vector + 1).to(C)
        else:
            x = tl.load(start + row * K + vector, mask=inside, other=0.0)
            x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
        tl.store(d + vector * n + row, x, mask=inside)
    _orthonormal(d, n, K, KP, C, BLOCK)
    vector = tl.arange(0, KP)
    share = basis_shares + tl.load(table + (ROWS + 1) * items + 1 + item) * (J * J)
    tl.store(share + (J - K + vector) * (J + 1), 1.0, mask=vector < K)


@triton.jit
def _uniform(base, count):
    """`start_vectors` of the reference: splitmix64's finaliser of base + count·γ, to (−1, 1)."""
    x = count.to(tl.uint64) * 0x94D049BB133111EB + base
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return ((x >> 40).to(tl.int32).to(tl.float32) * 2.0 + 1.0) * 5.9604644775390625e-08 - 1.0


@triton.jit
def _orthonormal(
    x, length, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr
):
    """The K rows of x [K, length] made orthonormal in place.

    Gram–Schmidt in the coordinates of the Gram matrix, again until the rows it started from were far
    from dependent. A row that leaves nothing is replaced by one of a fixed random basis.
    """
    lanes = tl.arange(0, BLOCK)
    vector = tl.arange(0, KP)
    # The reference draws [length, K + 1] for matrix −1 under seed 0.
    base = tl.full((), 0, tl.uint64) - 0xD1342543DE82EF95
    turn = 0
    least = 0.0
    while (least < 0.25) & (turn < 5):
        tl.debug_barrier()  # x may have been written by another thread
        gram = tl.zeros((KP, KP), tl.float64)
        for i in range(0, length, BLOCK):
            rows = _rows(x, length, i + lanes, K, KP)
            gram += tl.sum(rows[:, None, :] * rows[None, :, :], axis=2)
        e, left = _gram_schmidt(gram, KP, 1e-12)
        lost = (left <= 1e-12) & (vector < K)
        least = tl.min(tl.where(vector < K, left, 1.0), axis=0)
        for i in range(0, length, BLOCK):
            row = i + lanes
            rows = _rows(x, length, row, K, KP)
            new = tl.sum(e[:, :, None] * rows[None, :, :], axis=1)
            fill = _uniform(base, row[None, :] * (K + 1) + vector[:, None] + 1)
            new = tl.where(lost[:, None], fill.to(tl.float64), new).to(C)
            inside = (vector < K)[:, None] & (row < length)[None, :]
            tl.debug_barrier()
            tl.store(x + vector[:, None] * length + row[None, :], new, mask=inside)
        base += 0xD1342543DE82EF95  # other numbers, should these be dependent too
        turn += 1
    tl.debug_barrier()


@triton.jit
def _rows(x, length, index, COUNT: tl.constexpr, P: tl.constexpr):
    """x[:, index] of x [COUNT, length] in fp64, zero outside: [P, index]."""
    i = tl.arange(0, P)[:, None]
    inside = (i < COUNT) & (index < length)[None, :]
    return tl.load(x + i * length + index[None, :], mask=inside, other=0.0).to(tl.float64)


@triton.jit
def _gram_schmidt(gram, P: tl.constexpr, LEAST: tl.constexpr):
    """E [P, P] and q [P] for vectors with this Gram matrix: E·(vectors) is orthonormal, each from
    itself and those before it; q is what is left of its square. Where q ≤ LEAST, its row is zero."""
    i = tl.arange(0, P)
    diagonal = i[:, None] == i[None, :]
    square = tl.sum(tl.where(diagonal, gram, 0.0), axis=1)
    usable = (square > 1e-280) & (square < float("inf"))
    scale = tl.where(usable, 1.0 / tl.sqrt(tl.where(usable, square, 1.0)), 0.0)
    c = tl.where(usable[:, None] & usable[None, :], gram, 0.0) * scale[:, None] * scale[None, :]
    e = tl.where(diagonal, scale[:, None], 0.0)
    left = tl.zeros((P,), tl.float64)
    for j in range(P):
        own = (i == j)[:, None]
        c_j = tl.sum(tl.where(own, c, 0.0), axis=0)
        e_j = tl.sum(tl.where(own, e, 0.0), axis=0)
        q = tl.sum(tl.where(i == j, c_j, 0.0), axis=0)
        inverse = tl.where(q > LEAST, 1.0 / tl.sqrt(tl.where(q > LEAST, q, 1.0)), 0.0)
        c_j *= inverse
        e_j *= inverse
        later = tl.where(i > j, c_j, 0.0)[:, None]  # c is symmetric
        c -= later * c_j[None, :]
        e = tl.where(own, e_j[None, :], e - later * e_j[None, :])
        left = tl.where(i == j, q, left)
    return e, left


@triton.jit(do_not_specialize=["items", "step"])
def pass_kernel(
    table,
    items: tl.int64,
    scale,  # fp64 [items]
    steps,  # int64 [M], of all matrices of the call, updated: passes so far
    theta,  # fp64 [items, K]: of the Ritz vectors after the last pass
    residual_shares,  # fp64 [blocks, K]: Σ r² of them
    rotation,  # fp64 [items, J, J]: of the last step
    basis,  # C [Σn·J]: d is read
    images,  # C [Σm·J], updated: Y
    image_shares,  # fp64 [panels, J, J], written: each panel's share of Y Yᵀ
    shares,  # C [Σ panels·n·K], written: each panel's share [K, n] of Wᵀ(W d)
    column_shares,  # fp64 [Σ panels·n], written if FIRST: each panel's share of Σ_rows |W|
    panel_norms,  # fp64 [2, panels], written if FIRST: Σ W², max over rows of Σ_columns |W|
    step: tl.int32,
    tol: tl.float64,
    DTYPE: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    J: tl.constexpr,
    FIRST: tl.constexpr,
):
    """y = W d and the shares of z = Wᵀy, for the scaled W and every matrix that has to go on."""
    program = tl.program_id(0).to(tl.int64)
    item = find_item(table + ROWS * items, items, program)
    panel = program - tl.load(table + ROWS * items + item)
    steps += tl.load(table + 4 * items + item)
    if FIRST:
        live = tl.load(scale + item) > 0  # not for NaN
    else:
        # Panel 0 may have counted this step already. One that fell behind has stopped.
        live = tl.load(steps) >= step - 1
        residual = _residual(table, items, item, theta, residual_shares, K, C)
        live = live & ((tol == 0) | (tl.max(residual, axis=0) > tol))
    if live:
        if panel == 0:
            tl.store(steps, step.to(tl.int64))
        m = tl.load(table + items + item)
        n = tl.load(table + 2 * items + item)
        kind = tl.load(table + 3 * items + item)
        inverse = (1.0 / tl.load(scale + item)).to(C)
        d = basis + tl.load(table + 6 * items + item) * J + (J - K) * n
        y = images + tl.load(table + 5 * items + item) * J
        t = rotation + item * (J * J)
        place = tl.load(table + 7 * items + item) + panel * n
        z = shares + place * K
        columns = column_shares + place
        gram = image_shares + program * (J * J)
        norms = panel_norms + program
        count = tl.num_programs(0)
        address = tl.load(table + item)
        a = pointer(address, DTYPE, False)
        if kind == 0:
            _pass(
                a, inverse, d, t, y, z, gram, columns, norms, count, panel, m, n, C, K, J, FIRST,
                64, 32
            )  # fmt: skip
        elif kind == 1:
            _pass(
                a, inverse, d, t, y, z, gram, columns, norms, count, panel, m, n, C, K, J, FIRST,
                4, 512
            )  # fmt: skip
        elif kind == 2:
            _pass(
                a, inverse, d, t, y, z, gram, columns, norms, count, panel, m, n, C, K, J, FIRST,
                16, 128
            )  # fmt: skip
        else:
            _pass(
                pointer(address, DTYPE, True), inverse, d, t, y, z, gram, columns, norms, count,
                panel, m, tl.multiple_of(n, 8), C, K, J, FIRST, 16, 128
            )  # fmt: skip


@triton.jit
def _residual(table, items, item, theta, residual_shares, K: tl.constexpr, C: tl.constexpr):
    """‖WᵀWv − θv‖/θ₁ of the Ritz vectors of a matrix, zero from K on: [K as a power of two]."""
    KP: tl.constexpr = triton.next_power_of_2(K)
    blocks = table + (ROWS + 1) * items + 1 + item
    vector = tl.arange(0, KP)
    square = tl.zeros((64, KP), tl.float64)
    end = tl.load(blocks + 1)
    for first in range(tl.load(blocks), end, 64):
        block = (first + tl.arange(0, 64))[:, None]
        inside = (block < end) & (vector < K)[None, :]
        square += tl.load(residual_shares + block * K + vector[None, :], mask=inside, other=0.0)
    top = tl.load(theta + item * K)
    length = tl.sqrt(tl.sum(square, axis=0))
    return tl.where(top > 0, length / tl.where(top > 0, top, 1.0), 0.0).to(C).to(tl.float64)


@triton.jit
def _pass(
    a,
    inverse,
    d,
    t,
    y,
    z,
    gram,
    columns,
    norms,
    count,
    panel,
    m,
    n,
    C: tl.constexpr,
    K: tl.constexpr,
    J: tl.constexpr,
    FIRST: tl.constexpr,
    PANEL: tl.constexpr,
    WIDTH: tl.constexpr,
):
    KP: tl.constexpr = triton.next_power_of_2(K)
    P: tl.constexpr = triton.next_power_of_2(J)
    PART: tl.constexpr = WIDTH // (2 * KP if FIRST else KP)  # the extra sums need registers
    COLUMNS: tl.constexpr = PART if PART > 16 else 16
    row = panel * PANEL + tl.arange(0, PANEL)
    vector = tl.arange(0, KP)[:, None]
    total = tl.zeros((KP, PANEL, COLUMNS), C)
    row_sum = tl.zeros((PANEL,), tl.float64)
    square = tl.zeros((PANEL,), tl.float64)
    blocks = (n + COLUMNS - 1) // COLUMNS
    for b in range(blocks):
        column = b * COLUMNS + tl.arange(0, COLUMNS)
        inside = (vector < K) & (column < n)[None, :]
        w = _tile(a, row, column, m, n, C) * inverse
        x = tl.load(d + vector * n + column[None, :], mask=inside, other=0.0)
        total += w[None, :, :] * x[:, None, :]
        if FIRST:
            w64 = w.to(tl.float64)
            row_sum += tl.sum(tl.abs(w64), axis=1)
            square += tl.sum(w64 * w64, axis=1)
    y_rows = tl.sum(total, axis=2)
    if FIRST:
        tl.store(norms, tl.sum(square, axis=0))
        tl.store(norms + count, tl.max(row_sum, axis=0))
    for b in range(blocks):
        # Backwards: what was read last is the likeliest to be in cache still.
        column = (blocks - 1 - b) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (vector < K) & (column < n)[None, :]
        w = _tile(a, row, column, m, n, C) * inverse
        share = tl.sum(w[None, :, :] * y_rows[:, :, None], axis=1)
        tl.store(z + vector * n + column[None, :], share, mask=inside)
        if FIRST:
            w64 = tl.abs(w.to(tl.float64))
            tl.store(columns + column, tl.sum(w64, axis=0), mask=column < n)

    if not FIRST:
        i = tl.arange(0, P)[:, None]
        moved = _combine(t, y, m, row, J, J, P).to(C)
        tl.debug_barrier()  # every thread has read what is written now
        tl.store(y + i * m + row[None, :], moved, mask=(i < J - K) & (row < m)[None, :])
    tl.store(
        y + (J - K + vector) * m + row[None, :], y_rows, mask=(vector < K) & (row < m)[None, :]
    )
    tl.debug_barrier()
    _store_gram(y, m, row, gram, J, P)


@triton.jit
def _combine(t, x, length, index, COUNT: tl.constexpr, J: tl.constexpr, P: tl.constexpr):
    """Σ_j t[:, j] x[j, index] over the first COUNT rows of x [·, length]: fp64 [P, index]."""
    i = tl.arange(0, P)
    out = tl.zeros((P, index.shape[0]), tl.float64)
    for j in tl.static_range(COUNT):
        x_j = tl.load(x + j * length + index, mask=index < length, other=0.0).to(tl.float64)
        out += tl.load(t + i * J + j, mask=i < J, other=0.0)[:, None] * x_j[None, :]
    return out


@triton.jit
def _store_gram(x, length, index, out, J: tl.constexpr, P: tl.constexpr):
    """out[i, j] = Σ over `index` of x[i]·x[j], for x [J, length]."""
    i = tl.arange(0, P)
    rows = _rows(x, length, index, J, P)
    for j in range(J):
        x_j = tl.load(x + j * length + index, mask=index < length, other=0.0).to(tl.float64)
        tl.store(out + j * J + i, tl.sum(rows * x_j[None, :], axis=1), mask=i < J)


@triton.jit(do_not_specialize=["items", "step"])
def solve_kernel(
    table,
    items: tl.int64,
    steps,  # int64 [M], of all matrices of the call
    image_shares,  # fp64 [panels, J, J]
    basis_shares,  # fp64 [blocks, J, J]
    rotation,  # fp64 [items, J, J], written
    theta,  # fp64 [items, K], written, descending
    step: tl.int32,
    CG: tl.constexpr,
    K: tl.constexpr,
    J: tl.constexpr,
):
    """Rayleigh–Ritz: T, whose rows are the new v and, for CG, the new s in coordinates of X."""
    P: tl.constexpr = triton.next_power_of_2(J)
    item = tl.program_id(0).to(tl.int64)
    if tl.load(steps + tl.load(table + 4 * items + item)) == step:
        i = tl.arange(0, P)
        row, col = i[:, None], i[None, :]
        y = _sum(image_shares, table + ROWS * items + item, J, P)
        x = _sum(basis_shares, table + (ROWS + 1) * items + 1 + item, J, P)
        if not CG:
            x = tl.where((row >= K) & (col >= K), x, 0.0)  # of d alone
        e, left = _gram_schmidt(x, P, DEPENDENT)
        h = _product(_product(e, y, P), tl.trans(e), P)
        # What was dropped (in the first step: all but d) comes after every singular value.
        h = tl.where((row == col) & (left <= DEPENDENT)[:, None], -1.0, h)
        q, values = _eigenvectors(h, P)
        before = (values[None, :] > values[:, None]) | (
            (values[None, :] == values[:, None]) & (col < row)
        )
        rank = tl.sum(before.to(tl.int32), axis=1)
        tl.store(theta + item * K + rank, tl.maximum(values, 0.0), mask=rank < K)

        # The top k, and once more for s: the move away from the old v, orthonormal to the new.
        top = tl.where(i < K, i, tl.where(i < J - K, i - K, -1))
        best = _product((top[:, None] == rank[None, :]).to(tl.float64), q, P)
        kept = tl.sum(tl.where(col == top[:, None], best, 0.0), axis=1)
        begun = tl.sum(tl.where(col == top[:, None] + J - K, best, 0.0), axis=1)
        negative = tl.where(kept == 0, begun, kept) < 0  # v keeps its sign; at first, that of d
        best = tl.where(negative[:, None], -best, best)
        best = tl.where((row >= K) & (col < K), 0.0, best)
        f, _ = _gram_schmidt(_product(best, tl.trans(best), P), P, DEPENDENT)
        t = _product(_product(f, best, P), e, P)
        tl.store(rotation + item * (J * J) + row * J + col, t, mask=(row < J) & (col < J))


@triton.jit
def _sum(shares, starts, J: tl.constexpr, P: tl.constexpr):
    """Σ of shares [·, J, J] from starts[0] to starts[1]: [P, P], zero from J on."""
    COUNT: tl.constexpr = 2048 // (P * P)
    i = tl.arange(0, P)
    entry = i[:, None] * J + i[None, :]
    inside = (i < J)[:, None] & (i < J)[None, :]
    total = tl.zeros((COUNT, P, P), tl.float64)
    end = tl.load(starts + 1)
    for first in range(tl.load(starts), end, COUNT):
        k = (first + tl.arange(0, COUNT))[:, None, None]
        total += tl.load(
            shares + k * (J * J) + entry[None, :, :], mask=(k < end) & inside[None, :, :], other=0.0
        )
    return tl.sum(total, axis=0)


@triton.jit
def _product(a, b, P: tl.constexpr):
    if P > 16:
        return tl.dot(a, b, input_precision="ieee", out_dtype=tl.float64)
    return tl.sum(a[:, :, None] * b[None, :, :], axis=1)


@triton.jit
def _eigenvectors(h, P: tl.constexpr):
    """Unit eigenvectors (rows) and eigenvalues of a symmetric matrix: Jacobi, P/2 rotations at once.

    The partners of a round differ by exclusive or with its number: in P − 1 rounds every pair meets.
    """
    i = tl.arange(0, P)
    row, col = i[:, None], i[None, :]
    q = tl.where(row == col, 1.0, 0.0).to(tl.float64)
    sweep = 0
    while (sweep < 12) & _is_full(h, P):
        for turn in range(1, P):
            partner = i ^ turn
            across = tl.sum(tl.where(col == partner[:, None], h, 0.0), axis=1)
            own = tl.sum(tl.where(row == col, h, 0.0), axis=1)
            other = tl.gather(own, partner, axis=0)
            tau = (other - own) / tl.where(across == 0, 1.0, 2.0 * across)
            up = (tau > 0) | ((tau == 0) & (i < partner))
            tan = tl.where(up, 1.0, -1.0) / (tl.abs(tau) + tl.sqrt(1.0 + tau * tau))
            tan = tl.where(across == 0, 0.0, tan)
            cos = 1.0 / tl.sqrt(1.0 + tan * tan)
            sin = cos * tan
            rows = tl.broadcast_to(partner[:, None], (P, P))
            h = cos[:, None] * h - sin[:, None] * tl.gather(h, rows, axis=0)
            q = cos[:, None] * q - sin[:, None] * tl.gather(q, rows, axis=0)
            h = cos[None, :] * h - sin[None, :] * tl.gather(h, tl.trans(rows), axis=1)
            h = tl.where(col == partner[:, None], 0.0, h)
        sweep += 1
    return q, tl.sum(tl.where(row == col, h, 0.0), axis=1)


@triton.jit
def _is_full(h, P: tl.constexpr):
    """Whether anything stands off the diagonal that would change the eigenvectors."""
    i = tl.arange(0, P)
    square = h * h
    off = tl.where(i[:, None] == i[None, :], 0.0, square)
    return tl.sum(tl.sum(off, axis=1), axis=0) > 1e-44 * tl.sum(tl.sum(square, axis=1), axis=0)


@triton.jit(do_not_specialize=["items", "step"])
def update_kernel(
    table,
    items: tl.int64,
    steps,  # int64 [M], of all matrices of the call
    theta,  # fp64 [items, K]
    rotation,  # fp64 [items, J, J]
    shares,  # C [Σ panels·n·K]
    basis,  # C [Σn·J], updated: X
    products,  # C [Σn·(J − K)], updated: Z of v and, for CG, of s
    basis_shares,  # fp64 [blocks, J, J], written: each block's share of X Xᵀ
    residual_shares,  # fp64 [blocks, K], written: each block's share of Σ r²
    column_shares,  # fp64 [Σ panels·n], read if FIRST
    column_norms,  # fp64 [blocks], written if FIRST: max over columns of Σ_rows |W|
    step: tl.int32,
    CG: tl.constexpr,
    C: tl.constexpr,
    EPS: tl.constexpr,  # of C
    K: tl.constexpr,
    J: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """On one block of columns: z = Σ of its shares, X and Z rotated, the residual, the next d."""
    P: tl.constexpr = triton.next_power_of_2(J)
    program = tl.program_id(0).to(tl.int64)
    starts = table + (ROWS + 1) * items + 1
    item = find_item(starts, items, program)
    if tl.load(steps + tl.load(table + 4 * items + item)) == step:
        n = tl.load(table + 2 * items + item)
        place_n = tl.load(table + 6 * items + item)
        place = tl.load(table + 7 * items + item)
        panels = tl.load(table + 8 * items + item)
        column = (program - tl.load(starts + item)) * COLUMNS + tl.arange(0, COLUMNS)
        i = tl.arange(0, P)
        row = i[:, None]
        t = rotation + item * (J * J)
        x = basis + place_n * J
        z = products + place_n * (J - K)

        new_x = _combine(t, x, n, column, J, J, P).to(C)
        new_z = _combine(t, z, n, column, J - K, J, P)
        for c in tl.static_range(K):
            z_c = _gather(shares + place * K + c * n, K * n, column, n, panels, C, COLUMNS)
            t_c = tl.load(t + i * J + (J - K + c), mask=i < J, other=0.0)
            new_z += t_c[:, None] * z_c.to(tl.float64)[None, :]
        new_z = new_z.to(C)
        value = tl.load(theta + item * K + i, mask=i < K, other=0.0)[:, None]
        r = tl.where(row < K, new_z.to(tl.float64) - value * new_x.to(tl.float64), 0.0)
        tl.store(residual_shares + program * K + i, tl.sum(r * r, axis=1), mask=i < K)
        if not CG:
            # d = z, but a z that is all rounding points to the others: there v is kept with it.
            least = 16 * EPS * tl.load(theta + item * K)
            r += tl.maximum(value, tl.where(least > 0, least, 1.0)) * new_x.to(tl.float64)
        inside = (column < n)[None, :]
        tl.debug_barrier()  # every thread has read what is written now
        tl.store(x + row * n + column[None, :], new_x, mask=(row < J - K) & inside)
        tl.store(x + (J - K + row) * n + column[None, :], r.to(C), mask=(row < K) & inside)
        tl.store(z + row * n + column[None, :], new_z, mask=(row < J - K) & inside)
        tl.debug_barrier()
        _store_gram(x, n, column, basis_shares + program * (J * J), J, P)
        if FIRST:
            sums = _gather(column_shares + place, n, column, n, panels, tl.float64, COLUMNS)
            tl.store(column_norms + program, tl.max(sums, axis=0))


@triton.jit
def _gather(shares, stride, column, n, panels, C: tl.constexpr, COLUMNS: tl.constexpr):
    total = tl.zeros((16, COLUMNS), C)
    for first in range(0, panels, 16):
        panel = first + tl.arange(0, 16)
        inside = (panel < panels)[:, None] & (column < n)[None, :]
        total += tl.load(shares + panel[:, None] * stride + column[None, :], mask=inside, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["items", "panels"])
def finish_kernel(
    table,
    items: tl.int64,
    panels: tl.int64,  # in all
    scale,  # fp64 [items]
    theta,  # fp64 [items, K]
    residual_shares,  # fp64 [blocks, K]
    rotation,  # fp64 [items, J, J]
    panel_norms,  # fp64 [2, panels]
    column_norms,  # fp64 [blocks]
    basis,  # C [Σn·J]
    images,  # C [Σm·J], used up
    u,  # C [Σm·K], written: a [m, K] per matrix
    v,  # C [Σn·K], written: a [n, K] per matrix
    sigma,  # fp64 [M, K], of all matrices of the call, written; so are the next three
    residual_out,  # fp64 [M, K]
    converged,  # int8 [M]
    upper,  # fp64 [M]
    tol: tl.float64,
    C: tl.constexpr,
    EPS: tl.constexpr,
    K: tl.constexpr,
    J: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """σ = ‖W v‖, u = W v/σ, the bound from above; NaN for a matrix that is not finite."""
    KP: tl.constexpr = triton.next_power_of_2(K)
    P: tl.constexpr = triton.next_power_of_2(J)
    item = tl.program_id(0).to(tl.int64)
    m = tl.load(table + items + item)
    n = tl.load(table + 2 * items + item)
    place_m = tl.load(table + 5 * items + item)
    place_n = tl.load(table + 6 * items + item)
    place = tl.load(table + 4 * items + item)
    y = images + place_m * J
    t = rotation + item * (J * J)
    power = tl.load(scale + item)
    finite = power > 0
    lanes = tl.arange(0, BLOCK)
    vector = tl.arange(0, KP)

    square = tl.zeros((P,), tl.float64)
    i = tl.arange(0, P)
    for first in range(0, m, BLOCK):
        row = first + lanes
        new = _combine(t, y, m, row, J, J, P).to(C)
        square += tl.sum(new.to(tl.float64) * new.to(tl.float64), axis=1)
        tl.debug_barrier()
        inside = (i < K)[:, None] & (row < m)[None, :]
        tl.store(y + i[:, None] * m + row[None, :], new, mask=inside)
    length = tl.sqrt(tl.where(i < K, square, 0.0))
    tl.store(sigma + place * K + i, tl.where(finite, length * power, float("nan")), mask=i < K)
    # A σ that is all rounding has no u: any completes the basis.
    least = tl.max(length, axis=0) * tl.minimum(EPS * tl.maximum(m, n).to(tl.float64), 0.01)
    for first in range(0, m, BLOCK):
        row = (first + lanes)[None, :]
        inside = ((i < K) & (length <= least))[:, None] & (row < m)
        tl.store(y + i[:, None] * m + row, tl.zeros((P, BLOCK), C), mask=inside)
    if finite:
        _orthonormal(y, m, K, KP, C, BLOCK)
    _transpose(y, u + place_m * K, m, finite, K, KP, BLOCK)
    _transpose(basis + place_n * J, v + place_n * K, n, finite, K, KP, BLOCK)

    first = tl.load(table + ROWS * items + item)
    end = tl.load(table + ROWS * items + item + 1)
    squares = tl.zeros((BLOCK,), tl.float64)
    rows = tl.zeros((BLOCK,), tl.float64)
    columns = tl.zeros((BLOCK,), tl.float64)
    for panel in range(first, end, BLOCK):
        inside = panel + lanes < end
        squares += tl.load(panel_norms + panel + lanes, mask=inside, other=0.0)
        part = tl.load(panel_norms + panels + panel + lanes, mask=inside, other=0.0)
        rows = tl.maximum(rows, part)
    first = tl.load(table + (ROWS + 1) * items + 1 + item)
    end = tl.load(table + (ROWS + 1) * items + 2 + item)
    for block in range(first, end, BLOCK):
        part = tl.load(column_norms + block + lanes, mask=block + lanes < end, other=0.0)
        columns = tl.maximum(columns, part)
    bound = tl.sqrt(tl.max(rows, axis=0) * tl.max(columns, axis=0))
    bound = tl.minimum(bound, tl.sqrt(tl.sum(squares, axis=0)))
    # Not less for the rounding of scaled entries and of at most m + n + 64 additions.
    bound *= 1.0 + 4.0 * EPS + (m + n + 64).to(tl.float64) * 2.220446049250313e-16
    tl.store(upper + place, tl.where(finite, bound * power, float("nan")))

    rho = _residual(table, items, item, theta, residual_shares, K, C)
    stop = finite & (tl.max(rho, axis=0) <= tol)
    rho = tl.where(finite, rho, float("nan"))
    tl.store(residual_out + place * K + vector, rho, mask=vector < K)
    tl.store(converged + place, stop.to(tl.int8))


@triton.jit
def _transpose(x, out, length, finite, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr):
    """out [length, K] = xᵀ of x [K, length], or NaN."""
    vector = tl.arange(0, KP)[:, None]
    for first in range(0, length, BLOCK):
        row = (first + tl.arange(0, BLOCK))[None, :]
        inside = (vector < K) & (row < length)
        part = tl.load(x + vector * length + row, mask=inside, other=0.0)
        tl.store(out + row * K + vector, tl.where(finite, part, float("nan")), mask=inside)


def power_iteration(
    weights: list[Tensor],
    k: int,
    method: str,
    max_steps: int,
    tol: float,
    start: list[Tensor] | None,
    seed: int,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """σ [M, k], u, v (lists of [B, m, k], [B, n, k]), residual [M, k], steps, converged, upper [M].

    weights: tensors [B, m, n], each with its own B, m, n and dtype, M matrices in all; start:
    tensors [B, n, k] or None (random). σ, residual and upper are fp64. k ≤ MOST_TRIPLES.
    """
    device = weights[0].device
    numbers = prefix([w.shape[0] for w in weights])  # of the first matrix of each tensor
    sigma, residual = torch.empty(2, numbers[-1], k, dtype=torch.float64, device=device)
    upper = torch.empty(numbers[-1], dtype=torch.float64, device=device)
    steps = torch.zeros(numbers[-1], dtype=torch.int64, device=device)
    converged = torch.zeros(numbers[-1], dtype=torch.int8, device=device)
    u: list[Tensor] = [weights[0]] * len(weights)
    v = list(u)
    groups: dict[torch.dtype, list[int]] = {}
    for t, w in enumerate(weights):
        groups.setdefault(w.dtype, []).append(t)
    with on_device(device):
        for members in groups.values():
            us, vs = _one_dtype(
                [weights[t] for t in members],
                [numbers[t] for t in members],
                [start[t] for t in members] if start is not None else None,
                (k, method == "cg", max_steps, tol, seed),
                (sigma, residual, converged, upper, steps),
            )
            for t, u_t, v_t in zip(members, us, vs, strict=True):
                u[t], v[t] = u_t, v_t
    return sigma, u, v, residual, steps, converged.view(torch.bool), upper


def _one_dtype(
    weights: list[Tensor],  # [B, m, n]
    numbers: list[int],  # of the first matrix of each in the whole call
    start: list[Tensor] | None,
    settings: tuple[int, bool, int, float, int],
    out: tuple[Tensor, ...],  # σ, residual, converged, upper, steps of the whole call, written
) -> tuple[list[Tensor], list[Tensor]]:
    """All launches for weights of one dtype; returns u and v."""
    k, cg, max_steps, tol, seed = settings
    *results, steps = out
    weights = [w.contiguous() for w in weights]
    device = weights[0].device
    c = compute_dtype(weights[0].dtype)
    items = sum(w.shape[0] for w in weights)
    lengths_m = [w.shape[0] * w.shape[1] * k for w in weights]
    lengths_n = [w.shape[0] * w.shape[2] * k for w in weights]

    def new(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    u, v = new(sum(lengths_m), dtype=c), new(sum(lengths_n), dtype=c)
    if items:
        j = 3 * k if cg else 2 * k
        shape: dict[str, Any] = {"K": k, "J": j}
        columns = update_columns(j)
        key = tuple((w.data_ptr(), *w.shape, i) for w, i in zip(weights, numbers, strict=True))
        rows = _table(key, weights[0].element_size(), columns)
        table = device_table(rows, device)
        panels, blocks = rows[-2][-1], rows[-1][-1]
        length = rows[7][-1] + rows[8][-1] * rows[2][-1]
        largest, shares, column_shares = new(panels, dtype=c), new(length * k, dtype=c), new(length)
        scale, theta, rotation = new(items), new(items, k), new(items, j, j)
        panel_norms, column_norms = new(2, panels), new(blocks)
        image_shares, residual_shares = new(panels, j, j), new(blocks, k)
        basis_shares = torch.zeros(blocks, j, j, dtype=torch.float64, device=device)
        basis = torch.zeros(v.numel() // k * j, dtype=c, device=device)
        images = torch.zeros(u.numel() // k * j, dtype=c, device=device)
        products = torch.zeros(v.numel() // k * (j - k), dtype=c, device=device)
        starts = basis if start is None else torch.cat([x.reshape(-1).to(c) for x in start])

        C = TRITON_DTYPE[c]
        dtypes: dict[str, Any] = {"DTYPE": TRITON_DTYPE[weights[0].dtype], "C": C}
        eps, limit = torch.finfo(c).eps, 0.25 / torch.finfo(c).tiny
        block = {"BLOCK": long_block(k, max(*rows[1], *rows[2]))}
        largest_kernel[(panels,)](table, items, largest, **dtypes, **OPTIONS)
        begin_kernel[(items,)](
            table, items, largest, scale, starts, basis, basis_shares, _signed(seed),
            RANDOM=start is None, LIMIT=limit, C=C, **shape, **block, **LONG_OPTIONS
        )  # fmt: skip
        for step in range(1, max_steps + 1):
            first = {"FIRST": step == 1}
            pass_kernel[(panels,)](
                table, items, scale, steps, theta, residual_shares, rotation, basis, images,
                image_shares, shares, column_shares, panel_norms, step, tol,
                **dtypes, **shape, **first, **OPTIONS
            )  # fmt: skip
            solve_kernel[(items,)](
                table, items, steps, image_shares, basis_shares, rotation, theta, step,
                CG=cg, **shape, **OPTIONS
            )  # fmt: skip
            update_kernel[(blocks,)](
                table, items, steps, theta, rotation, shares, basis, products, basis_shares,
                residual_shares, column_shares, column_norms, step,
                CG=cg, C=C, EPS=eps, COLUMNS=columns, **shape, **first, **OPTIONS
            )  # fmt: skip
        finish_kernel[(items,)](
            table, items, panels, scale, theta, residual_shares, rotation, panel_norms,
            column_norms, basis, images, u, v, *results, tol,
            C=C, EPS=eps, **shape, **block, **LONG_OPTIONS
        )  # fmt: skip
    us = [x.view(w.shape[0], w.shape[1], k) for x, w in zip(u.split(lengths_m), weights)]
    vs = [x.view(w.shape[0], w.shape[2], k) for x, w in zip(v.split(lengths_n), weights)]
    return us, vs


def update_columns(j: int) -> int:
    """Columns of W to a block of update_kernel: its tile of J rows fits into registers."""
    return 1024 // triton.next_power_of_2(j)


def long_block(k: int, longest: int) -> int:
    """Entries of a vector to a turn of the kernels with one program per matrix."""
    return min(2048 // triton.next_power_of_2(k) ** 2, max(64, triton.next_power_of_2(longest)))


def _signed(seed: int) -> int:
    """The 64 low bits of a seed as an int64."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


@lru_cache(maxsize=64)
def _table(
    key: tuple[tuple[int, ...], ...], element_size: int, columns: int
) -> tuple[tuple[int, ...], ...]:
    """The rows of the table; key: address, B, m, n and number of the first matrix, per tensor."""
    rows: list[list[int]] = [[] for _ in range(9)]
    place_m = place_n = place_shares = 0
    for address, batch, m, n, number in key:
        even = address % 16 == 0 and n * element_size % 16 == 0 and n % 8 == 0
        kind = (
            0 if n <= 64 else 1 if m <= 4 else 3 if even and m * n * element_size % 16 == 0 else 2
        )
        panels = triton.cdiv(m, PANEL_ROWS[kind])
        for b in range(batch):
            matrix = (address + b * m * n * element_size, m, n, kind, number + b)
            row = (*matrix, place_m, place_n, place_shares, panels)
            for column, x in zip(rows, row, strict=True):
                column.append(x)
            place_m, place_n, place_shares = place_m + m, place_n + n, place_shares + panels * n
    blocks = [triton.cdiv(n, columns) for n in rows[2]]
    return tuple(map(tuple, (*rows, prefix(rows[8]), prefix(blocks))))


def samples() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Kernel, signature, constants and options of typical launches, to compile ahead of time."""
    out: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]] = []
    known = dict.fromkeys(("items", "seed", "panels"), "i64") | {"step": "i32", "tol": "fp64"}
    known |= {"table": "*i64", "steps": "*i64", "converged": "*i8"}
    in_c = {"largest", "start", "basis", "images", "products", "shares", "u", "v"}

    def add(kernel: Any, c: str, options: dict[str, Any], **constants: Any) -> None:
        signature = {
            name: known.get(name, "*" + c if name in in_c else "*fp64")
            for name in kernel.arg_names
            if name not in constants
        }
        out.append((kernel, signature, constants, options))

    for dtype, k in ((tl.float32, 1), (tl.bfloat16, 1), (tl.float64, 1), (tl.float32, 8)):
        C, c = (tl.float64, "fp64") if dtype == tl.float64 else (tl.float32, "fp32")
        dtypes = {"DTYPE": dtype, "C": C}
        shape = {"K": k, "J": 3 * k}
        if k == 1:
            add(largest_kernel, c, OPTIONS, **dtypes)
        for first in (True, False):
            add(pass_kernel, c, OPTIONS, **dtypes, **shape, FIRST=first)
        if dtype == tl.bfloat16:
            continue  # what follows sees vectors only
        eps = {"C": C, "EPS": 2.0**-52 if c == "fp64" else 2.0**-23}
        block = {"BLOCK": long_block(k, 2048)}
        columns = {"COLUMNS": update_columns(3 * k)}
        add(update_kernel, c, OPTIONS, **eps, **shape, **columns, CG=True, FIRST=True)
        if dtype == tl.float32:
            begin = {"C": C, "RANDOM": True, "LIMIT": 2.0**124}
            add(begin_kernel, c, LONG_OPTIONS, **begin, **shape, **block)
            add(solve_kernel, c, OPTIONS, **shape, CG=True)
            add(finish_kernel, c, LONG_OPTIONS, **eps, **shape, **block)
    return out
