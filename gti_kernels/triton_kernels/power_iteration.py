"""Top singular triples in Triton (k = 1): one ragged launch per pass over every W of a list.

A pass is y = W d, z = Wᵀy for one direction d per matrix. A program reads a panel of rows twice,
for y and, while it is still in cache, for its share of z; the shares are added in a fixed order.
All else (Rayleigh–Ritz, the next direction, the residual) is done by one program per matrix. A
matrix that has converged is marked and its programs return at once: the host launches `max_steps`
passes and never waits.
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
from .ragged import TRITON_DTYPE, find_item, pointer, widen

# The table of a launch: int64 rows of one number per matrix, then first panels and first column
# blocks (items + 1 numbers each). Rows:
#   0 address of W   1 m   2 n   3 shape   4 number of the matrix in the call, for its random start
#   5, 6, 7 place of its first entry in buffers of length Σm, Σn and in the shares of z   8 panels
ROWS = tl.constexpr(9)

# Rows of a panel by the shape of W: narrow, flat, any other; 3 is 2 with every row on a 16-byte
# boundary. The kernels choose a tile of as many rows by the same number.
PANEL_ROWS = [64, 4, 16, 16]
GATHER_PANELS, GATHER_COLUMNS = 16, 256
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


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
    scale,  # fp64 [items], written
    done,  # int32 [items], written: 1 for a matrix that is not finite
    v,  # C [Σn], the start on entry unless RANDOM, written: unit vectors
    seed: tl.int64,
    RANDOM: tl.constexpr,
    LIMIT: tl.constexpr,  # largest power of two with a normal inverse in C
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For each matrix: a power of two that brings its largest entry to [1, 2), its unit start."""
    item = tl.program_id(0).to(tl.int64)
    n = tl.load(table + 2 * items + item)
    first = tl.load(table + ROWS * items + item)
    panels = tl.load(table + 8 * items + item)
    lanes = tl.arange(0, BLOCK)
    top = tl.zeros((BLOCK,), C)
    for i in range(0, panels, BLOCK):
        part = tl.load(largest + first + i + lanes, mask=i + lanes < panels, other=0.0)
        top = tl.maximum(top, part)
    top = tl.max(top, axis=0).to(tl.float64)
    tl.store(done + item, (top == float("inf")).to(tl.int32))
    # The exponent bits of an fp64 number are that power of two. It and its inverse must be normal
    # numbers of the arithmetic: for W near its limits the largest entry is merely of moderate size.
    power = (top.to(tl.int64, bitcast=True) >> 52) << 52
    power = power.to(tl.float64, bitcast=True)
    power = tl.minimum(power, LIMIT)
    power = tl.maximum(power, 1.0 / LIMIT)
    tl.store(scale + item, tl.where(top > 0, power, 1.0))

    v += tl.load(table + 6 * items + item)
    matrix = tl.load(table + 4 * items + item).to(tl.uint64)
    base = tl.full((), seed, tl.int64).to(tl.uint64) * 0x9E3779B97F4A7C15
    base += matrix * 0xD1342543DE82EF95
    square = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, n, BLOCK):
        row = i + lanes
        if RANDOM:
            x = tl.where(row < n, _uniform(base, row + 1), 0.0).to(C)
            tl.store(v + row, x, mask=row < n)
        else:
            x = tl.load(v + row, mask=row < n, other=0.0)
        square += x.to(tl.float64) * x.to(tl.float64)
    length = tl.sqrt(tl.sum(square, axis=0))
    usable = (length > 0) & (length < float("inf"))
    tl.debug_barrier()  # x may have been written by another thread
    if usable:
        for i in range(0, n, BLOCK):
            row = i + lanes
            x = tl.load(v + row, mask=row < n, other=0.0).to(tl.float64)
            tl.store(v + row, (x / length).to(C), mask=row < n)
    else:
        _store_fill(v, n, C, BLOCK)


@triton.jit
def _uniform(base, count):
    """`start_vectors` of the reference: splitmix64's finaliser of base + count·γ, to (−1, 1)."""
    x = count.to(tl.uint64) * 0x94D049BB133111EB + base
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return ((x >> 40).to(tl.int32).to(tl.float32) * 2.0 + 1.0) * 5.9604644775390625e-08 - 1.0


@triton.jit
def _store_fill(out, n, C: tl.constexpr, BLOCK: tl.constexpr):
    """A fixed random unit vector [n]: what stands for a direction where there is none."""
    # The reference draws [n, 2] for matrix −1 under seed 0 and takes the first column.
    base = tl.full((), 0, tl.uint64) - 0xD1342543DE82EF95
    lanes = tl.arange(0, BLOCK)
    square = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, n, BLOCK):
        x = _uniform(base, 2 * (i + lanes) + 1).to(tl.float64)
        square += tl.where(i + lanes < n, x * x, 0.0)
    length = tl.sqrt(tl.sum(square, axis=0))
    for i in range(0, n, BLOCK):
        x = _uniform(base, 2 * (i + lanes) + 1).to(tl.float64) / length
        tl.store(out + i + lanes, x.to(C), mask=i + lanes < n)


@triton.jit(do_not_specialize=["items"])
def pass_kernel(
    table,
    items: tl.int64,
    scale,  # fp64 [items]
    done,  # int32 [items]
    d,  # C [Σn]: directions
    y,  # C [Σm], written: W d
    shares,  # C [Σ panels·n], written: each panel's share of Wᵀ(W d)
    column_shares,  # fp64 [Σ panels·n], written if FIRST: each panel's share of Σ_rows |W|
    panel_norms,  # fp64 [2, panels], written if FIRST: Σ W², max over rows of Σ_columns |W|
    DTYPE: tl.constexpr,
    C: tl.constexpr,
    FIRST: tl.constexpr,
):
    """y = W d and the shares of z = Wᵀy, for the scaled W and every matrix that is not done."""
    program = tl.program_id(0).to(tl.int64)
    item = find_item(table + ROWS * items, items, program)
    if tl.load(done + item) == 0:
        panel = program - tl.load(table + ROWS * items + item)
        address = tl.load(table + item)
        m = tl.load(table + items + item)
        n = tl.load(table + 2 * items + item)
        kind = tl.load(table + 3 * items + item)
        inverse = (1.0 / tl.load(scale + item)).to(C)
        d += tl.load(table + 6 * items + item)
        y += tl.load(table + 5 * items + item)
        place = tl.load(table + 7 * items + item) + panel * n
        z = shares + place
        columns = column_shares + place
        norms = panel_norms + program
        count = tl.num_programs(0)
        PART: tl.constexpr = 2 if FIRST else 1  # the extra sums need registers
        a = pointer(address, DTYPE, False)
        if kind == 0:
            _pass(a, inverse, d, y, z, columns, norms, count, panel, m, n, C, FIRST, 64, 32 // PART)
        elif kind == 1:
            _pass(a, inverse, d, y, z, columns, norms, count, panel, m, n, C, FIRST, 4, 512 // PART)
        elif kind == 2:
            _pass(
                a, inverse, d, y, z, columns, norms, count, panel, m, n, C, FIRST, 16, 128 // PART
            )
        else:
            a = pointer(address, DTYPE, True)
            n = tl.multiple_of(n, 8)
            _pass(
                a, inverse, d, y, z, columns, norms, count, panel, m, n, C, FIRST, 16, 128 // PART
            )


@triton.jit
def _pass(
    a,
    inverse,
    d,
    y,
    z,
    columns,
    norms,
    count,
    panel,
    m,
    n,
    C: tl.constexpr,
    FIRST: tl.constexpr,
    PANEL: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = panel * PANEL + tl.arange(0, PANEL)
    total = tl.zeros((PANEL, COLUMNS), C)
    row_sum = tl.zeros((PANEL,), tl.float64)
    square = tl.zeros((PANEL,), tl.float64)
    blocks = (n + COLUMNS - 1) // COLUMNS
    for b in range(blocks):
        column = b * COLUMNS + tl.arange(0, COLUMNS)
        w = _tile(a, row, column, m, n, C) * inverse
        total += w * tl.load(d + column, mask=column < n, other=0.0)[None, :]
        if FIRST:
            w64 = w.to(tl.float64)
            row_sum += tl.sum(tl.abs(w64), axis=1)
            square += tl.sum(w64 * w64, axis=1)
    y_rows = tl.sum(total, axis=1)
    tl.store(y + row, y_rows, mask=row < m)
    if FIRST:
        tl.store(norms, tl.sum(square, axis=0))
        tl.store(norms + count, tl.max(row_sum, axis=0))
    for b in range(blocks):
        # Backwards: what was read last is the likeliest to be in cache still.
        column = (blocks - 1 - b) * COLUMNS + tl.arange(0, COLUMNS)
        w = _tile(a, row, column, m, n, C) * inverse
        tl.store(z + column, tl.sum(w * y_rows[:, None], axis=0), mask=column < n)
        if FIRST:
            w64 = tl.abs(w.to(tl.float64))
            tl.store(columns + column, tl.sum(w64, axis=0), mask=column < n)


@triton.jit(do_not_specialize=["items"])
def gather_kernel(
    table,
    items: tl.int64,
    done,  # int32 [items]
    shares,  # C [Σ panels·n]
    z,  # C [Σn], written
    column_shares,  # fp64 [Σ panels·n], read if FIRST
    column_norms,  # fp64 [column blocks], written if FIRST: max over columns of Σ_rows |W|
    C: tl.constexpr,
    FIRST: tl.constexpr,
    PANELS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """z = Σ of its shares, one block of columns of one matrix."""
    program = tl.program_id(0).to(tl.int64)
    starts = table + (ROWS + 1) * items + 1
    item = find_item(starts, items, program)
    if tl.load(done + item) == 0:
        n = tl.load(table + 2 * items + item)
        panels = tl.load(table + 8 * items + item)
        place = tl.load(table + 7 * items + item)
        column = (program - tl.load(starts + item)) * COLUMNS + tl.arange(0, COLUMNS)
        total = _gather(shares + place, column, n, panels, C, PANELS, COLUMNS)
        tl.store(z + tl.load(table + 6 * items + item) + column, total, mask=column < n)
        if FIRST:
            sums = _gather(column_shares + place, column, n, panels, tl.float64, PANELS, COLUMNS)
            tl.store(column_norms + program, tl.max(sums, axis=0))


@triton.jit
def _gather(
    shares, column, n, panels, C: tl.constexpr, PANELS: tl.constexpr, COLUMNS: tl.constexpr
):
    total = tl.zeros((PANELS, COLUMNS), C)
    for first in range(0, panels, PANELS):
        panel = first + tl.arange(0, PANELS)
        inside = (panel < panels)[:, None] & (column < n)[None, :]
        total += tl.load(shares + panel[:, None] * n + column[None, :], mask=inside, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["items", "length_n", "length_m", "step", "last"])
def update_kernel(
    table,
    items: tl.int64,
    done,  # int32 [items], updated
    steps,  # int64 [M], of all matrices of the call, written
    theta,  # fp64 [items], written: ‖W v‖²
    residual,  # fp64 [items], written
    vectors,  # C [6, Σn], updated: v, r, s and Wᵀ W of each
    images,  # C [3, Σm], updated: W v, W r, W s
    length_n: tl.int64,  # Σn
    length_m: tl.int64,  # Σm
    step: tl.int32,  # passes so far
    last: tl.int32,  # 1 on the last one
    tol: tl.float64,
    CG: tl.constexpr,
    C: tl.constexpr,
    EPS: tl.constexpr,  # of C
    BLOCK: tl.constexpr,
):
    """After a pass: the best v of span[v, r, s], its residual, and the next direction."""
    item = tl.program_id(0).to(tl.int64)
    if tl.load(done + item) == 0:
        m = tl.load(table + items + item)
        n = tl.load(table + 2 * items + item)
        y = images + tl.load(table + 5 * items + item)
        v = vectors + tl.load(table + 6 * items + item)
        tl.store(steps + tl.load(table + 4 * items + item), step.to(tl.int64))
        _update(
            y, v, m, n, done + item, theta + item, residual + item, length_n, length_m, last, tol,
            CG, C, EPS, BLOCK
        )  # fmt: skip


@triton.jit
def _update(
    y,
    v,
    m,
    n,
    done,
    theta_out,
    residual_out,
    length_n,
    length_m,
    last,
    tol,
    CG: tl.constexpr,
    C: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    y_r = y + length_m
    y_s = y + 2 * length_m
    r = v + length_n
    s = v + 2 * length_n
    z = v + 3 * length_n
    z_r = v + 4 * length_n
    z_s = v + 5 * length_n

    if CG:
        t0, t1, t2, s0, s1, s2 = _ritz(y, y_r, y_s, m, C, BLOCK)
    square = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, m, BLOCK):
        row = i + lanes
        a = tl.load(y + row, mask=row < m, other=0.0)
        if CG:
            b = tl.load(y_r + row, mask=row < m, other=0.0)
            c = tl.load(y_s + row, mask=row < m, other=0.0)
            tl.store(y_s + row, s0 * a + s1 * b + s2 * c, mask=row < m)
            a = t0 * a + t1 * b + t2 * c
            tl.store(y + row, a, mask=row < m)
        square += a.to(tl.float64) * a.to(tl.float64)
    theta = tl.sum(square, axis=0)
    tl.store(theta_out, theta)

    rr = tl.zeros((BLOCK,), tl.float64)
    zz = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, n, BLOCK):
        row = i + lanes
        a = tl.load(v + row, mask=row < n, other=0.0)
        za = tl.load(z + row, mask=row < n, other=0.0)
        if CG:
            b = tl.load(r + row, mask=row < n, other=0.0)
            c = tl.load(s + row, mask=row < n, other=0.0)
            tl.store(s + row, s0 * a + s1 * b + s2 * c, mask=row < n)
            a = t0 * a + t1 * b + t2 * c
            tl.store(v + row, a, mask=row < n)
            zb = tl.load(z_r + row, mask=row < n, other=0.0)
            zc = tl.load(z_s + row, mask=row < n, other=0.0)
            tl.store(z_s + row, s0 * za + s1 * zb + s2 * zc, mask=row < n)
            za = t0 * za + t1 * zb + t2 * zc
            tl.store(z + row, za, mask=row < n)
        d = za - a * theta.to(C)
        tl.store(r + row, d, mask=row < n)
        rr += d.to(tl.float64) * d.to(tl.float64)
        zz += za.to(tl.float64) * za.to(tl.float64)
    length = tl.sqrt(tl.sum(rr, axis=0))
    rho = tl.where(theta > 0, length / tl.where(theta > 0, theta, 1.0), 0.0).to(C)
    tl.store(residual_out, rho.to(tl.float64))
    stop = (rho.to(tl.float64) <= tol) & (tol > 0)
    tl.store(done, stop.to(tl.int32))
    tl.debug_barrier()  # the loops below may read what another thread wrote
    if (last == 0) & (stop == 0):
        if CG:
            _orthonormal(r, v, s, n, length, C, EPS, BLOCK)
        else:
            z_length = tl.sqrt(tl.sum(zz, axis=0))
            if z_length > 0:
                for i in range(0, n, BLOCK):
                    row = i + lanes
                    x = tl.load(z + row, mask=row < n, other=0.0).to(tl.float64) / z_length
                    tl.store(v + row, x.to(C), mask=row < n)
            else:
                _store_fill(v, n, C, BLOCK)


@triton.jit
def _ritz(y, y_r, y_s, m, C: tl.constexpr, BLOCK: tl.constexpr):
    """Coefficients of the new v and of the new s in v, r, s, from the images under W.

    In the first step, and where r or s was dropped, its vectors are zero: a zero row of the Gram
    matrix, which no top eigenvector has a part in.
    """
    lanes = tl.arange(0, BLOCK)
    g00 = tl.zeros((BLOCK,), tl.float64)
    g01 = tl.zeros((BLOCK,), tl.float64)
    g02 = tl.zeros((BLOCK,), tl.float64)
    g11 = tl.zeros((BLOCK,), tl.float64)
    g12 = tl.zeros((BLOCK,), tl.float64)
    g22 = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, m, BLOCK):
        row = i + lanes
        a = tl.load(y + row, mask=row < m, other=0.0).to(tl.float64)
        b = tl.load(y_r + row, mask=row < m, other=0.0).to(tl.float64)
        c = tl.load(y_s + row, mask=row < m, other=0.0).to(tl.float64)
        g00 += a * a
        g01 += a * b
        g02 += a * c
        g11 += b * b
        g12 += b * c
        g22 += c * c
    e0, e1, e2 = _top_eigenvector(
        tl.sum(g00, axis=0),
        tl.sum(g01, axis=0),
        tl.sum(g02, axis=0),
        tl.sum(g11, axis=0),
        tl.sum(g12, axis=0),
        tl.sum(g22, axis=0),
    )
    # s: the move (0, e1, e2) made orthonormal to e. In closed form: (−h, e0 e1/h, e0 e2/h).
    h = tl.sqrt(e1 * e1 + e2 * e2)
    keep = (h > 0) & (e0 > 2.2e-14)
    share = tl.where(keep, e0 / tl.where(keep, h, 1.0), 0.0)
    s0 = tl.where(keep, -h, 0.0)
    return e0.to(C), e1.to(C), e2.to(C), s0.to(C), (share * e1).to(C), (share * e2).to(C)


@triton.jit
def _orthonormal(r, v, s, n, length, C: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """r ← r made orthonormal to v and s, or zero where nothing is left (Gram–Schmidt, thrice)."""
    lanes = tl.arange(0, BLOCK)
    divisor = tl.where(length > 0, length, 1.0)
    va = tl.full((), 0.0, tl.float64)
    sa = tl.full((), 0.0, tl.float64)
    for turn in range(4):
        # Subtract the parts found in the turn before, and find those that rounding has left.
        rr = tl.zeros((BLOCK,), tl.float64)
        rv = tl.zeros((BLOCK,), tl.float64)
        rs = tl.zeros((BLOCK,), tl.float64)
        for i in range(0, n, BLOCK):
            row = i + lanes
            a = tl.load(v + row, mask=row < n, other=0.0).to(tl.float64)
            b = tl.load(s + row, mask=row < n, other=0.0).to(tl.float64)
            x = tl.load(r + row, mask=row < n, other=0.0).to(tl.float64)
            x = ((x - va * a - sa * b) / divisor).to(C)
            tl.store(r + row, x, mask=row < n)
            x = x.to(tl.float64)
            rr += x * x
            rv += x * a
            rs += x * b
        va = tl.sum(rv, axis=0)
        sa = tl.sum(rs, axis=0)
        norm = tl.sqrt(tl.sum(rr, axis=0))
        # Turn 2 leaves the r that is judged; turn 3 takes out a last remainder and the length.
        keep = (length > 0) & (norm > 100 * EPS)
        divisor = tl.where(turn == 2, tl.where(keep, norm, float("inf")), 1.0)
        tl.debug_barrier()


@triton.jit
def _top_eigenvector(a00, a01, a02, a11, a12, a22):
    """Unit eigenvector, first entry ≥ 0, of the largest eigenvalue of a symmetric 3×3 matrix."""
    one = a00 * 0.0 + 1.0
    zero = a00 * 0.0
    # Columns of V are (x0, x1, x2) for eigenvalue a00, y for a11, z for a22.
    x0, x1, x2 = one, zero, zero
    y0, y1, y2 = zero, one, zero
    z0, z1, z2 = zero, zero, one
    sweep = 0
    off = a01 * a01 + a02 * a02 + a12 * a12
    trace = a00 + a11 + a22
    while (sweep < 8) & (off > 1e-44 * trace * trace):  # cyclic Jacobi: five sweeps at the most
        c, s, t = _rotation(a00, a11, a01)
        a00, a11, a01 = a00 - t * a01, a11 + t * a01, zero
        a02, a12 = c * a02 - s * a12, s * a02 + c * a12
        x0, y0 = c * x0 - s * y0, s * x0 + c * y0
        x1, y1 = c * x1 - s * y1, s * x1 + c * y1
        x2, y2 = c * x2 - s * y2, s * x2 + c * y2
        c, s, t = _rotation(a00, a22, a02)
        a00, a22, a02 = a00 - t * a02, a22 + t * a02, zero
        a01, a12 = c * a01 - s * a12, s * a01 + c * a12
        x0, z0 = c * x0 - s * z0, s * x0 + c * z0
        x1, z1 = c * x1 - s * z1, s * x1 + c * z1
        x2, z2 = c * x2 - s * z2, s * x2 + c * z2
        c, s, t = _rotation(a11, a22, a12)
        a11, a22, a12 = a11 - t * a12, a22 + t * a12, zero
        a01, a02 = c * a01 - s * a02, s * a01 + c * a02
        y0, z0 = c * y0 - s * z0, s * y0 + c * z0
        y1, z1 = c * y1 - s * z1, s * y1 + c * z1
        y2, z2 = c * y2 - s * z2, s * y2 + c * z2
        sweep += 1
        off = a01 * a01 + a02 * a02 + a12 * a12
    use_y = a11 > a00
    best = tl.where(use_y, a11, a00)
    e0 = tl.where(use_y, y0, x0)
    e1 = tl.where(use_y, y1, x1)
    e2 = tl.where(use_y, y2, x2)
    use_z = a22 > best
    e0 = tl.where(use_z, z0, e0)
    e1 = tl.where(use_z, z1, e1)
    e2 = tl.where(use_z, z2, e2)
    sign = tl.where(e0 < 0, -1.0, 1.0) / tl.sqrt(e0 * e0 + e1 * e1 + e2 * e2)
    return sign * e0, sign * e1, sign * e2


@triton.jit
def _rotation(app, aqq, apq):
    """Cosine, sine and tangent of the Jacobi rotation that removes apq."""
    tau = (aqq - app) / tl.where(apq == 0, 1.0, 2.0 * apq)
    t = tl.where(tau < 0, -1.0, 1.0) / (tl.abs(tau) + tl.sqrt(1.0 + tau * tau))
    t = tl.where(apq == 0, 0.0, t)
    c = 1.0 / tl.sqrt(1.0 + t * t)
    return c, t * c, t


@triton.jit(do_not_specialize=["items", "panels"])
def finish_kernel(
    table,
    items: tl.int64,
    panels: tl.int64,  # in all
    scale,  # fp64 [items]
    largest,  # C [panels]
    theta,  # fp64 [items]
    residual,  # fp64 [items]
    panel_norms,  # fp64 [2, panels]
    column_norms,  # fp64 [column blocks]
    y,  # C [Σm]: W v
    v,  # C [Σn]
    u,  # C [Σm], written
    v_out,  # C [Σn], written
    sigma,  # fp64 [M], of all matrices of the call, written; so are the next three
    residual_out,  # fp64 [M]
    converged,  # int8 [M]
    upper,  # fp64 [M]
    tol: tl.float64,
    C: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """σ = ‖W v‖, u = W v/σ, the bound from above; NaN for a matrix that is not finite."""
    item = tl.program_id(0).to(tl.int64)
    m = tl.load(table + items + item)
    n = tl.load(table + 2 * items + item)
    y += tl.load(table + 5 * items + item)
    u += tl.load(table + 5 * items + item)
    v += tl.load(table + 6 * items + item)
    v_out += tl.load(table + 6 * items + item)
    first = tl.load(table + ROWS * items + item)
    end = tl.load(table + ROWS * items + item + 1)
    first_column = tl.load(table + (ROWS + 1) * items + 1 + item)
    end_column = tl.load(table + (ROWS + 1) * items + 2 + item)
    lanes = tl.arange(0, BLOCK)

    square = tl.zeros((BLOCK,), tl.float64)
    rows = tl.zeros((BLOCK,), tl.float64)
    columns = tl.zeros((BLOCK,), tl.float64)
    top = tl.zeros((BLOCK,), C)
    for i in range(first, end, BLOCK):
        inside = i + lanes < end
        top = tl.maximum(top, tl.load(largest + i + lanes, mask=inside, other=0.0))
        square += tl.load(panel_norms + i + lanes, mask=inside, other=0.0)
        rows = tl.maximum(rows, tl.load(panel_norms + panels + i + lanes, mask=inside, other=0.0))
    for i in range(first_column, end_column, BLOCK):
        part = tl.load(column_norms + i + lanes, mask=i + lanes < end_column, other=0.0)
        columns = tl.maximum(columns, part)
    finite = tl.max(top, axis=0) < float("inf")
    power = tl.load(scale + item)
    length = tl.sqrt(tl.load(theta + item))
    rho = tl.load(residual + item)
    bound = tl.sqrt(tl.max(rows, axis=0) * tl.max(columns, axis=0))
    bound = tl.minimum(bound, tl.sqrt(tl.sum(square, axis=0)))
    # Not less for the rounding of scaled entries and of at most m + n + 64 additions.
    bound *= 1.0 + 4.0 * EPS + (m + n + 64).to(tl.float64) * 2.220446049250313e-16
    place = tl.load(table + 4 * items + item)
    tl.store(sigma + place, tl.where(finite, length * power, float("nan")))
    tl.store(residual_out + place, tl.where(finite, rho, float("nan")))
    tl.store(upper + place, tl.where(finite, bound * power, float("nan")))
    tl.store(converged + place, (finite & (rho <= tol)).to(tl.int8))
    nan = tl.full((BLOCK,), float("nan"), C)
    for i in range(0, n, BLOCK):
        a = tl.load(v + i + lanes, mask=i + lanes < n, other=0.0)
        tl.store(v_out + i + lanes, tl.where(finite, a, nan), mask=i + lanes < n)
    if finite & (length == 0):
        _store_fill(u, m, C, BLOCK)
    else:
        for i in range(0, m, BLOCK):
            a = tl.load(y + i + lanes, mask=i + lanes < m, other=0.0).to(tl.float64) / length
            tl.store(u + i + lanes, tl.where(finite, a.to(C), nan), mask=i + lanes < m)


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
    tensors [B, n, k] or None (random). σ, residual and upper are fp64. Here k = 1.
    """
    if k != 1:
        raise ValueError(f"k = {k}: the Triton kernel finds the top triple only (k = 1)")
    device = weights[0].device
    numbers = prefix([w.shape[0] for w in weights])  # of the first matrix of each tensor
    scalars = torch.empty(3, numbers[-1], dtype=torch.float64, device=device)
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
                (method, max_steps, tol, seed),
                (*scalars, steps, converged),
            )
            for t, u_t, v_t in zip(members, us, vs, strict=True):
                u[t], v[t] = u_t, v_t
    sigma, residual, upper = scalars
    return sigma[:, None], u, v, residual[:, None], steps, converged.view(torch.bool), upper


def _one_dtype(
    weights: list[Tensor],  # [B, m, n]
    numbers: list[int],  # of the first matrix of each in the whole call
    start: list[Tensor] | None,
    settings: tuple[str, int, float, int],
    out: tuple[Tensor, ...],  # σ, residual, upper, steps, converged of the whole call, written
) -> tuple[list[Tensor], list[Tensor]]:
    """All launches for weights of one dtype; returns u and v."""
    method, max_steps, tol, seed = settings
    sigma, residual, upper, steps, converged = out
    weights = [w.contiguous() for w in weights]
    device = weights[0].device
    c = compute_dtype(weights[0].dtype)
    items = sum(w.shape[0] for w in weights)
    lengths_m = [w.shape[0] * w.shape[1] for w in weights]
    lengths_n = [w.shape[0] * w.shape[2] for w in weights]
    sum_m, sum_n = sum(lengths_m), sum(lengths_n)

    def new(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    u, v = new(sum_m, dtype=c), new(sum_n, dtype=c)
    if items:
        key = tuple((w.data_ptr(), *w.shape, i) for w, i in zip(weights, numbers, strict=True))
        rows = _table(key, weights[0].element_size())
        table = device_table(rows, device)
        panels, blocks = rows[-2][-1], rows[-1][-1]
        shares_length = rows[7][-1] + rows[8][-1] * rows[2][-1]
        shares, column_shares = new(shares_length, dtype=c), new(shares_length)
        largest, panel_norms, column_norms = new(panels, dtype=c), new(2, panels), new(blocks)
        done, scale = new(items, dtype=torch.int32), new(items)
        theta, rho = torch.zeros(2, items, dtype=torch.float64, device=device)
        vectors = torch.zeros(6, sum_n, dtype=c, device=device)
        images = torch.zeros(3, sum_m, dtype=c, device=device)
        if start is not None:
            torch.cat([x.reshape(-1).to(c) for x in start], out=vectors[0])

        C = TRITON_DTYPE[c]
        kinds: dict[str, Any] = {"DTYPE": TRITON_DTYPE[weights[0].dtype], "C": C}
        eps, limit = torch.finfo(c).eps, 0.25 / torch.finfo(c).tiny
        block = min(2048, max(64, triton.next_power_of_2(max(*rows[1], *rows[2]))))
        wide: dict[str, Any] = {"BLOCK": block, "num_warps": max(1, block // 256)}
        wide["enable_fp_fusion"] = True
        largest_kernel[(panels,)](table, items, largest, **kinds, **OPTIONS)
        begin_kernel[(items,)](
            table, items, largest, scale, done, vectors, _signed(seed),
            RANDOM=start is None, LIMIT=limit, C=C, **wide
        )  # fmt: skip
        for step in range(1, max_steps + 1):
            # Power: the next v is the direction. CG: the first pass takes v, the others r.
            which = 1 if method == "cg" and step > 1 else 0
            first = step == 1
            pass_kernel[(panels,)](
                table, items, scale, done, vectors[which], images[which], shares, column_shares,
                panel_norms, FIRST=first, **kinds, **OPTIONS
            )  # fmt: skip
            gather_kernel[(blocks,)](
                table, items, done, shares, vectors[3 + which], column_shares, column_norms,
                C=C, FIRST=first, PANELS=GATHER_PANELS, COLUMNS=GATHER_COLUMNS, **OPTIONS
            )  # fmt: skip
            update_kernel[(items,)](
                table, items, done, steps, theta, rho, vectors, images, sum_n, sum_m, step,
                int(step == max_steps), tol, CG=method == "cg", C=C, EPS=eps, **wide
            )  # fmt: skip
        finish_kernel[(items,)](
            table, items, panels, scale, largest, theta, rho, panel_norms, column_norms, images,
            vectors, u, v, sigma, residual, converged, upper, tol, C=C, EPS=eps, **wide
        )  # fmt: skip
    us = [x.view(w.shape[0], w.shape[1], 1) for x, w in zip(u.split(lengths_m), weights)]
    vs = [x.view(w.shape[0], w.shape[2], 1) for x, w in zip(v.split(lengths_n), weights)]
    return us, vs


def _signed(seed: int) -> int:
    """The 64 low bits of a seed as an int64."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


@lru_cache(maxsize=64)
def _table(key: tuple[tuple[int, ...], ...], element_size: int) -> tuple[tuple[int, ...], ...]:
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
    blocks = [triton.cdiv(n, GATHER_COLUMNS) for n in rows[2]]
    return tuple(map(tuple, (*rows, prefix(rows[8]), prefix(blocks))))


def samples() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Kernel, signature, constants and options of typical launches, to compile ahead of time."""
    out: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]] = []
    integers = dict.fromkeys(("items", "seed", "length_n", "length_m", "panels"), "i64")
    numbers = integers | {"tol": "fp64", "step": "i32", "last": "i32", "table": "*i64"}
    numbers |= {"done": "*i32", "steps": "*i64", "converged": "*i8"}
    in_fp64 = {"scale", "theta", "residual", "residual_out", "sigma", "upper"}
    in_fp64 |= {"column_shares", "panel_norms", "column_norms"}

    def add(kernel: Any, c: str, constants: dict[str, Any], options: dict[str, Any]) -> None:
        signature = {
            name: numbers.get(name, "*fp64" if name in in_fp64 else "*" + c)
            for name in kernel.arg_names
            if name not in constants
        }
        out.append((kernel, signature, constants, options))

    for dtype in (tl.float32, tl.bfloat16, tl.float64):
        C, c = (tl.float64, "fp64") if dtype == tl.float64 else (tl.float32, "fp32")
        kinds = {"DTYPE": dtype, "C": C}
        add(largest_kernel, c, kinds, OPTIONS)
        for first in (True, False):
            add(pass_kernel, c, kinds | {"FIRST": first}, OPTIONS)
        if dtype == tl.bfloat16:
            continue  # what follows sees vectors only
        constants = {"C": C, "BLOCK": 2048}
        eps = {"EPS": 2.0**-52 if c == "fp64" else 2.0**-23}
        wide = {"num_warps": 8, "enable_fp_fusion": True}
        tile = {"C": C, "FIRST": True, "PANELS": GATHER_PANELS, "COLUMNS": GATHER_COLUMNS}
        add(update_kernel, c, constants | eps | {"CG": True}, wide)
        if dtype == tl.float32:
            add(begin_kernel, c, constants | {"RANDOM": True, "LIMIT": 2.0**124}, wide)
            add(gather_kernel, c, tile, OPTIONS)
            add(update_kernel, c, constants | eps | {"CG": False}, wide)
            add(finish_kernel, c, constants | eps, wide)
    return out
