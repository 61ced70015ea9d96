"""What happens in power_iteration before, between and after the passes over W."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .dense import eigenvectors, gram_schmidt, product
from .power_iteration_pass import KINDS, LONG_OPTIONS, OPTIONS, ROWS, Sample, residual_of, sample
from .ragged import find_item
from .vectors import (
    orthonormalise,
    rotate,
    rows_of,
    store_gram,
    store_rows,
    store_transposed,
    uniform,
)


@triton.jit(do_not_specialize=["items", "seed"])
def begin_kernel(
    table,
    items: tl.int64,
    largest,  # C [panels]
    scale,  # fp64 [items], written; NaN for a matrix that is not finite
    start,  # C [Σn·K], a [n, K] per matrix, read unless RANDOM
    basis,  # C [Σn·J], d is written
    basis_shares,  # fp64 [blocks, J, J], zero on entry
    steps,  # int64 [M], of all matrices of the call, written: no pass so far
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
    top = maximum(largest, table + ROWS * items + item, BLOCK).to(tl.float64)
    power = (top.to(tl.int64, bitcast=True) >> 52) << 52
    power = power.to(tl.float64, bitcast=True)
    power = tl.minimum(power, LIMIT)
    power = tl.maximum(power, 1.0 / LIMIT)
    power = tl.where(top > 0, power, 1.0)
    tl.store(scale + item, tl.where(top < float("inf"), power, float("nan")))

    place = tl.load(table + 6 * items + item)
    d = basis + place * J + (J - K) * n
    number = tl.load(table + 4 * items + item)
    tl.store(steps + number, 0)
    base = tl.full((), seed, tl.int64).to(tl.uint64) * 0x9E3779B97F4A7C15
    base += number.to(tl.uint64) * 0xD1342543DE82EF95
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
def maximum(x, starts, BLOCK: tl.constexpr):
    """The largest of x from starts[0] to starts[1]; x ≥ 0."""
    top = tl.zeros((BLOCK,), x.dtype.element_ty)
    end = tl.load(starts + 1)
    for first in range(tl.load(starts), end, BLOCK):
        index = first + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.load(x + index, mask=index < end, other=0.0))
    return tl.max(top, axis=0)


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
    rows_norm = maximum(panel_norms + panels, starts, BLOCK)
    columns_norm = maximum(column_norms, table + (ROWS + 1) * items + 1 + item, BLOCK)
    bound = tl.minimum(tl.sqrt(rows_norm * columns_norm), tl.sqrt(tl.sum(squares, axis=0)))
    # Not less for the rounding of scaled entries and of at most m + n + 64 additions.
    bound *= 1.0 + 4.0 * EPS + (m + n + 64).to(tl.float64) * 2.220446049250313e-16
    tl.store(upper + place, tl.where(finite, bound * power, float("nan")))

    residual = residual_of(table, items, item, theta, residual_shares, K, C)
    tl.store(converged + place, (finite & (tl.max(residual, axis=0) <= tol)).to(tl.int8))
    residual = tl.where(finite, residual, float("nan"))
    tl.store(residual_out + place * K + vector, residual, mask=vector < K)


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


def samples() -> list[Sample]:
    """Typical launches, to compile ahead of time."""
    out = []
    for dtype, k in KINDS:
        if dtype == tl.bfloat16:
            continue  # these see vectors only
        shape: dict[str, Any] = {"K": k, "J": 3 * k}
        eps = {"C": dtype, "EPS": 2.0**-52 if dtype == tl.float64 else 2.0**-23}
        block = {"BLOCK": long_block(k, 2048)}
        columns = {"COLUMNS": update_columns(3 * k)}
        first = {"CG": True, "FIRST": True}
        out.append(sample(update_kernel, dtype, OPTIONS, **eps, **shape, **columns, **first))
        if dtype == tl.float32:
            begin = {"C": dtype, "RANDOM": True, "LIMIT": 2.0**124}
            solve = {"CG": True, "LEAST": 1e-8}
            out.append(sample(begin_kernel, dtype, LONG_OPTIONS, **begin, **shape, **block))
            out.append(sample(solve_kernel, dtype, solve_options(k), **solve, **shape))
            out.append(sample(finish_kernel, dtype, LONG_OPTIONS, **eps, **shape, **block))
    return out
