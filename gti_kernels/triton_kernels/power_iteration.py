"""Top singular triples in Triton: three ragged launches per pass over every W of a list.

Each matrix has a basis of row vectors X [J, n]: v, s, d for "cg" (J = 3k), v, d for "power" (2k),
with their images Y = X Wᵀ, Z = Y W. d are the k directions of the pass. One step:

  pass    a program per panel of rows: the last rotation of Y, y = W d, the panel's shares of
          z = Wᵀy (reading the panel again, from cache) and of the Gram matrix Y Yᵀ
  solve   a program per matrix: Rayleigh–Ritz in the span of X gives the rotation T [J, J]
  update  a program per block of columns: z = Σ shares; X ← T X, Z ← T Z; the residual, the next d;
          the block's share of the Gram matrix X Xᵀ

X is only about orthonormal: its Gram matrix is measured, and solve orthonormalises in coordinates.
So a direction that is all but dependent on the others is left out (see `least_share`): in fp64 with
k > 1 the last digits may take a step more than in the reference, which works on the vectors. A
residual is orthogonal to v and s as long as it is more than rounding. One that is not half so is
left out too: taking v and s out of it in coordinates would multiply the rounding of their images,
which follow by linearity, from step to step.
Shares are added in a fixed order. A matrix that has converged is recognised by its residual and its
programs return at once: the host launches `max_steps` passes and never waits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..conventions import compute_dtype
from ..tables import device_table, on_device, prefix
from .dense import eigenvectors, gram_schmidt, product
from .ragged import TRITON_DTYPE, find_item, pointer, widen
from .vectors import (
    orthonormalise,
    rotate,
    rows_of,
    store_gram,
    store_rows,
    store_transposed,
    uniform,
)

# The table of a launch: int64 rows of one number per matrix, then first panels and first column
# blocks (items + 1 numbers each). Rows:
#   0 address of W   1 m   2 n   3 shape   4 number of the matrix in the call
#   5, 6, 7 sums over the matrices before it: m, n, panels·n   8 panels
ROWS = tl.constexpr(9)

# Rows and columns of a tile by the shape of W: narrow, flat, any other; 3 is 2 with every row on a
# 16-byte boundary. A panel has the rows of its tile.
TILE_ROWS = tl.constexpr((64, 4, 16, 16))
TILE_COLUMNS = tl.constexpr((32, 512, 128, 128))

OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
LONG_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}  # where a program has a whole matrix


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
    rows = panel_rows(kind)
    end = tl.minimum((panel + 1) * rows, m) * n
    top = tl.zeros((2048,), C)
    for first in range(panel * rows * n, end, 2048):
        index = first + tl.arange(0, 2048)
        x = tl.abs(widen(tl.load(a + index, mask=index < end, other=0.0), C))
        top = tl.maximum(top, tl.where(x < float("inf"), x, float("inf")))
    tl.store(largest + program, tl.max(top, axis=0))


@triton.jit
def panel_rows(kind):
    return tl.where(kind == 0, TILE_ROWS[0], tl.where(kind == 1, TILE_ROWS[1], TILE_ROWS[2]))


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
    # The exponent bits of an fp64 number are that power of two. It and its inverse must be normal
    # numbers of the arithmetic: for W near its limits the largest entry is merely of moderate size.
    top = _maximum(largest, table + ROWS * items + item, BLOCK).to(tl.float64)
    power = (top.to(tl.int64, bitcast=True) >> 52) << 52
    power = power.to(tl.float64, bitcast=True)
    power = tl.minimum(power, LIMIT)
    power = tl.maximum(power, 1.0 / LIMIT)
    power = tl.where(top > 0, power, 1.0)
    tl.store(scale + item, tl.where(top < float("inf"), power, float("nan")))

    place = tl.load(table + 6 * items + item)
    d = basis + place * J + (J - K) * n
    matrix = tl.load(table + 4 * items + item).to(tl.uint64)
    base = tl.full((), seed, tl.int64).to(tl.uint64) * 0x9E3779B97F4A7C15
    base += matrix * 0xD1342543DE82EF95
    vector = tl.arange(0, KP)[:, None]
    for first in range(0, n, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        inside = (vector < K) & (column < n)
        if RANDOM:
            x = uniform(base, column * K + vector + 1).to(C)
        else:
            x = tl.load(start + place * K + column * K + vector, mask=inside, other=0.0)
            x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
        tl.store(d + vector * n + column, x, mask=inside)
    orthonormalise(d, n, K, KP, C, BLOCK)
    corner = basis_shares + tl.load(table + (ROWS + 1) * items + 1 + item) * (J * J)
    vector = tl.arange(0, KP)
    tl.store(corner + (J - K + vector) * (J + 1), 1.0, mask=vector < K)


@triton.jit
def _maximum(x, starts, BLOCK: tl.constexpr):
    """The largest of x from starts[0] to starts[1]; x ≥ 0."""
    top = tl.zeros((BLOCK,), x.dtype.element_ty)
    end = tl.load(starts + 1)
    for first in range(tl.load(starts), end, BLOCK):
        index = first + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.load(x + index, mask=index < end, other=0.0))
    return tl.max(top, axis=0)


@triton.jit(do_not_specialize=["items", "step"])
def pass_kernel(
    table,
    items: tl.int64,
    scale,  # fp64 [items]
    steps,  # int64 [M], of all matrices of the call, updated: passes so far
    theta,  # fp64 [items, K]: of the Ritz vectors of the last step
    residual_shares,  # fp64 [blocks, K]: of Σ r² of them
    rotation,  # fp64 [items, J, J]: of the last step
    basis,  # C [Σn·J]
    images,  # C [Σm·J], updated
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
    """y = W d and the shares of z = Wᵀy, for the scaled W and every matrix that is to go on."""
    program = tl.program_id(0).to(tl.int64)
    item = find_item(table + ROWS * items, items, program)
    panel = program - tl.load(table + ROWS * items + item)
    steps += tl.load(table + 4 * items + item)
    if FIRST:
        live = tl.load(scale + item) > 0  # not for NaN
    else:
        # Panel 0 may have counted this step already; what is further behind has stopped before.
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
        P: tl.constexpr = triton.next_power_of_2(J)
        rows = panel_rows(kind)
        row = tl.arange(0, 64)
        row = tl.where(row < rows, panel * rows + row, m)  # a panel has no more than 64
        if not FIRST:
            rotated = rotate(rotation + item * (J * J), y, m, row, J, J, P).to(C)
            tl.debug_barrier()  # every thread has read what is written now
            store_rows(y, m, row, rotated, J - K, P)

        place = tl.load(table + 7 * items + item) + panel * n
        z = shares + place * K
        column_sums = column_shares + place
        norms = panel_norms + program
        count = tl.num_programs(0)
        for shape in tl.static_range(4):
            if kind == shape:
                _pass(
                    pointer(tl.load(table + item), DTYPE, shape == 3), inverse, d,
                    y + (J - K) * m, z, column_sums, norms, count, panel, m,
                    tl.multiple_of(tl.load(table + 2 * items + item), 8 if shape == 3 else 1),
                    C, K, FIRST, shape
                )  # fmt: skip
        tl.debug_barrier()
        store_gram(y, m, row, image_shares + program * (J * J), J, P)


@triton.jit
def _residual(table, items, item, theta, residual_shares, K: tl.constexpr, C: tl.constexpr):
    """‖WᵀWv − θv‖/θ₁ of the k Ritz vectors of a matrix, then zero: [K as a power of two]."""
    KP: tl.constexpr = triton.next_power_of_2(K)
    starts = table + (ROWS + 1) * items + 1 + item
    vector = tl.arange(0, KP)[None, :]
    square = tl.zeros((64, KP), tl.float64)
    end = tl.load(starts + 1)
    for first in range(tl.load(starts), end, 64):
        block = first + tl.arange(0, 64)[:, None]
        inside = (block < end) & (vector < K)
        square += tl.load(residual_shares + block * K + vector, mask=inside, other=0.0)
    top = tl.load(theta + item * K)
    length = tl.sqrt(tl.sum(square, axis=0))
    return tl.where(top > 0, length / tl.where(top > 0, top, 1.0), 0.0).to(C).to(tl.float64)


@triton.jit
def _pass(
    a,
    inverse,
    d,
    y,
    z,
    column_sums,
    norms,
    count,
    panel,
    m,
    n,
    C: tl.constexpr,
    K: tl.constexpr,
    FIRST: tl.constexpr,
    SHAPE: tl.constexpr,
):
    KP: tl.constexpr = triton.next_power_of_2(K)
    PANEL: tl.constexpr = TILE_ROWS[SHAPE]
    # There is a sum for each entry of the tile and each direction; FIRST needs registers for more.
    SPREAD: tl.constexpr = 2 * KP if FIRST else (KP + 1) // 2
    COLUMNS: tl.constexpr = TILE_COLUMNS[SHAPE] // SPREAD
    row = panel * PANEL + tl.arange(0, PANEL)
    vector = tl.arange(0, KP)[:, None]
    total = tl.zeros((KP, PANEL, COLUMNS), C)
    row_sum = tl.zeros((PANEL,), tl.float64)
    square = tl.zeros((PANEL,), tl.float64)
    blocks = (n + COLUMNS - 1) // COLUMNS
    for b in range(blocks):
        column = b * COLUMNS + tl.arange(0, COLUMNS)
        w = _tile(a, row, column, m, n, C) * inverse
        inside = (vector < K) & (column < n)[None, :]
        x = tl.load(d + vector * n + column[None, :], mask=inside, other=0.0)
        total += w[None, :, :] * x[:, None, :]
        if FIRST:
            w64 = w.to(tl.float64)
            row_sum += tl.sum(tl.abs(w64), axis=1)
            square += tl.sum(w64 * w64, axis=1)
    y_rows = tl.sum(total, axis=2)
    store_rows(y, m, row, y_rows, K, KP)
    if FIRST:
        tl.store(norms, tl.sum(square, axis=0))
        tl.store(norms + count, tl.max(row_sum, axis=0))
    for b in range(blocks):
        # Backwards: what was read last is the likeliest to be in cache still.
        column = (blocks - 1 - b) * COLUMNS + tl.arange(0, COLUMNS)
        w = _tile(a, row, column, m, n, C) * inverse
        store_rows(z, n, column, tl.sum(w[None, :, :] * y_rows[:, :, None], axis=1), K, KP)
        if FIRST:
            w64 = tl.abs(w.to(tl.float64))
            tl.store(column_sums + column, tl.sum(w64, axis=0), mask=column < n)


@triton.jit
def _tile(a, row, column, m, n, C: tl.constexpr):
    """W[row, column] in C, zero outside."""
    inside = (row < m)[:, None] & (column < n)[None, :]
    return widen(tl.load(a + row[:, None] * n + column[None, :], mask=inside, other=0.0), C)


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
    LEAST: tl.constexpr,  # of the square of a vector must be new, or it is left out
    K: tl.constexpr,
    J: tl.constexpr,
):
    """Rayleigh–Ritz: the rows of T are the new v and, for CG, the new s in coordinates of X."""
    P: tl.constexpr = triton.next_power_of_2(J)
    item = tl.program_id(0).to(tl.int64)
    if tl.load(steps + tl.load(table + 4 * items + item)) == step:
        i = tl.arange(0, P)
        row, col = i[:, None], i[None, :]
        x = _sum(basis_shares, table + (ROWS + 1) * items + 1 + item, J, P)
        y = _sum(image_shares, table + ROWS * items + item, J, P)
        if not CG:
            x = tl.where((row >= K) & (col >= K), x, 0.0)  # the span of d alone
        e, left = gram_schmidt(x, J, J - K, P, LEAST)
        h = product(product(e, y, P), tl.trans(e), P)
        # What was dropped (in the first step, all but d) ranks below every θ.
        h = tl.where((row == col) & (left <= LEAST)[:, None], -1.0, h)
        vectors, values = eigenvectors(h, P)
        before = values[None, :] > values[:, None]
        before = before | ((values[None, :] == values[:, None]) & (col < row))
        rank = tl.sum(before.to(tl.int32), axis=1)
        tl.store(theta + item * K + rank, tl.maximum(values, 0.0), mask=rank < K)

        # The top k; then, for s, the top k without their parts in the old v, orthonormal to them.
        wanted = tl.where(i < K, i, tl.where(i < J - K, i - K, -1))[:, None]
        best = product((wanted == rank[None, :]).to(tl.float64), vectors, P)
        old = tl.sum(tl.where(col == wanted, best, 0.0), axis=1)
        new = tl.sum(tl.where(col == wanted + J - K, best, 0.0), axis=1)
        negative = tl.where(old == 0, new, old) < 0  # v keeps its sign; the first has that of d
        best = tl.where(negative[:, None], -best, best)
        best = tl.where((row >= K) & (col < K), 0.0, best)
        f, _ = gram_schmidt(product(best, tl.trans(best), P), J - K, J, P, LEAST)
        t = product(product(f, best, P), e, P)
        tl.store(rotation + item * (J * J) + row * J + col, t, mask=(row < J) & (col < J))


@triton.jit
def _sum(shares, starts, J: tl.constexpr, P: tl.constexpr):
    """Σ of shares [·, J, J] from starts[0] to starts[1]: [P, P], zero from J on."""
    COUNT: tl.constexpr = 2048 // (P * P)
    i = tl.arange(0, P)
    entry = (i[:, None] * J + i[None, :])[None, :, :]
    inside = ((i < J)[:, None] & (i < J)[None, :])[None, :, :]
    total = tl.zeros((COUNT, P, P), tl.float64)
    end = tl.load(starts + 1)
    for first in range(tl.load(starts), end, COUNT):
        share = (first + tl.arange(0, COUNT))[:, None, None]
        total += tl.load(shares + share * (J * J) + entry, mask=(share < end) & inside, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["items", "step"])
def update_kernel(
    table,
    items: tl.int64,
    steps,  # int64 [M], of all matrices of the call
    theta,  # fp64 [items, K]
    rotation,  # fp64 [items, J, J]
    shares,  # C [Σ panels·n·K]
    basis,  # C [Σn·J], updated
    products,  # C [Σn·(J − K)], updated: Z but for d
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
        t = rotation + item * (J * J)
        x = basis + place_n * J
        z = products + place_n * (J - K)

        new_x = rotate(t, x, n, column, J, J, P).to(C)
        new_z = rotate(t, z, n, column, J - K, J, P)
        for c in tl.static_range(K):
            z_c = _gather(shares + place * K + c * n, K * n, column, n, panels, COLUMNS)
            t_c = tl.load(t + i * J + (J - K + c), mask=i < J, other=0.0)
            new_z += t_c[:, None] * z_c.to(tl.float64)[None, :]
        new_z = new_z.to(C)
        value = tl.load(theta + item * K + i, mask=i < K, other=0.0)[:, None]
        r = new_z.to(tl.float64) - value * new_x.to(tl.float64)
        tl.store(residual_shares + program * K + i, tl.sum(r * r, axis=1), mask=i < K)
        if not CG:
            # d = z. But z is all rounding, and near the others, where θ is: there v holds it up.
            least = 16 * EPS * tl.load(theta + item * K)
            r += tl.maximum(value, tl.where(least > 0, least, 1.0)) * new_x.to(tl.float64)
        tl.debug_barrier()  # every thread has read what is written now
        store_rows(x, n, column, new_x, J - K, P)
        store_rows(x + (J - K) * n, n, column, r.to(C), K, P)
        store_rows(z, n, column, new_z, J - K, P)
        tl.debug_barrier()
        store_gram(x, n, column, basis_shares + program * (J * J), J, P)
        if FIRST:
            sums = _gather(column_shares + place, n, column, n, panels, COLUMNS)
            tl.store(column_norms + program, tl.max(sums, axis=0))


@triton.jit
def _gather(shares, stride, column, n, panels, COLUMNS: tl.constexpr):
    """Σ over panels of shares[panel, column], rows `stride` apart."""
    total = tl.zeros((16, COLUMNS), shares.dtype.element_ty)
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
    item = tl.program_id(0).to(tl.int64)
    m = tl.load(table + items + item)
    n = tl.load(table + 2 * items + item)
    place = tl.load(table + 4 * items + item)
    place_m = tl.load(table + 5 * items + item)
    place_n = tl.load(table + 6 * items + item)
    power = tl.load(scale + item)
    finite = power > 0
    y = images + place_m * J
    vector = tl.arange(0, KP)

    square = tl.zeros((KP,), tl.float64)
    for first in range(0, m, BLOCK):
        index = first + tl.arange(0, BLOCK)
        rows = rotate(rotation + item * (J * J), y, m, index, J, J, KP).to(C)
        square += tl.sum(rows.to(tl.float64) * rows.to(tl.float64), axis=1)
        tl.debug_barrier()  # every thread has read what is written now
        store_rows(y, m, index, rows, K, KP)
    length = tl.sqrt(tl.where(vector < K, square, 0.0))
    out = tl.where(finite, length * power, float("nan"))
    tl.store(sigma + place * K + vector, out, mask=vector < K)
    if finite:
        # A σ that is all rounding has no u of its own: any vector completes the basis.
        least = tl.max(length, axis=0) * tl.minimum(EPS * tl.maximum(m, n).to(tl.float64), 0.01)
        tl.debug_barrier()
        for first in range(0, m, BLOCK):
            index = first + tl.arange(0, BLOCK)
            rows = tl.where((length > least)[:, None], rows_of(y, m, index, K, KP), 0.0)
            tl.debug_barrier()
            store_rows(y, m, index, rows.to(C), K, KP)
        orthonormalise(y, m, K, KP, C, BLOCK)
    store_transposed(y, u + place_m * K, m, finite, K, KP, BLOCK)
    store_transposed(basis + place_n * J, v + place_n * K, n, finite, K, KP, BLOCK)

    starts = table + ROWS * items + item
    end = tl.load(starts + 1)
    squares = tl.zeros((BLOCK,), tl.float64)
    for first in range(tl.load(starts), end, BLOCK):
        index = first + tl.arange(0, BLOCK)
        squares += tl.load(panel_norms + index, mask=index < end, other=0.0)
    rows_norm = _maximum(panel_norms + panels, starts, BLOCK)
    columns_norm = _maximum(column_norms, table + (ROWS + 1) * items + 1 + item, BLOCK)
    bound = tl.minimum(tl.sqrt(rows_norm * columns_norm), tl.sqrt(tl.sum(squares, axis=0)))
    # Not less for the rounding of scaled entries and of at most m + n + 64 additions.
    bound *= 1.0 + 4.0 * EPS + (m + n + 64).to(tl.float64) * 2.220446049250313e-16
    tl.store(upper + place, tl.where(finite, bound * power, float("nan")))

    residual = _residual(table, items, item, theta, residual_shares, K, C)
    tl.store(converged + place, (finite & (tl.max(residual, axis=0) <= tol)).to(tl.int8))
    residual = tl.where(finite, residual, float("nan"))
    tl.store(residual_out + place * K + vector, residual, mask=vector < K)


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
    tensors [B, n, k] or None (random). σ, residual and upper are fp64. k ≤ 8:
    3k vectors must fit into a tile of 32, the largest that stays in registers.
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
                CG=cg, LEAST=least_share(c), **shape, **solve_options(k)
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


def solve_options(k: int) -> dict[str, Any]:
    """A tile of 32 × 32 needs the registers of more threads."""
    return OPTIONS if 3 * k <= 16 else LONG_OPTIONS


def least_share(c: torch.dtype) -> float:
    """What Gram–Schmidt in coordinates keeps is orthogonal to fp64 rounding over this share: that
    must stay below the rounding of fp32 vectors. For fp64 ones it is a share met near the end only.
    """
    return 1e-4 if c == torch.float64 else 1e-8


def update_columns(j: int) -> int:
    """Columns of W to a block of update_kernel: its tile of J rows fits into registers."""
    return 1024 // triton.next_power_of_2(j)


def long_block(k: int, longest: int) -> int:
    """Entries of a vector to a turn of the kernels with one program per matrix."""
    fit = min(512, 2048 // triton.next_power_of_2(k) ** 2)
    return min(fit, max(64, triton.next_power_of_2(longest)))


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
        panels = triton.cdiv(m, TILE_ROWS.value[kind])
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
            add(solve_kernel, c, solve_options(k), **shape, CG=True, LEAST=1e-8)
            add(finish_kernel, c, LONG_OPTIONS, **eps, **shape, **block)
    return out
