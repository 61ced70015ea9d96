"""The pass of power_iteration over W: y = W d, and the shares of z = Wᵀy and of the Gram matrix.

The table of a launch and the tiles of W, which other kernels read too, stand here.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .ragged import find_item, pointer, widen
from .vectors import rotate, store_gram, store_rows

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
        residual = residual_of(table, items, item, theta, residual_shares, K, C)
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
def residual_of(table, items, item, theta, residual_shares, K: tl.constexpr, C: tl.constexpr):
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


#: Dtype of W and k of typical launches; then types of parameters, which have one name everywhere.
KINDS = ((tl.float32, 1), (tl.bfloat16, 1), (tl.float64, 1), (tl.float32, 8))
KNOWN = dict.fromkeys(("items", "seed", "panels"), "i64") | {"step": "i32", "tol": "fp64"}
KNOWN |= {"table": "*i64", "steps": "*i64", "converged": "*i8"}
IN_C = {"largest", "start", "basis", "images", "products", "shares", "u", "v"}
Sample = tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]


def sample(kernel: Any, compute: Any, options: dict[str, Any], **constants: Any) -> Sample:
    """Kernel, signature, constants and options of a launch, to compile ahead of time."""
    c = "*fp64" if compute == tl.float64 else "*fp32"
    signature = {
        name: KNOWN.get(name, c if name in IN_C else "*fp64")
        for name in kernel.arg_names
        if name not in constants
    }
    return kernel, signature, constants, options


def samples() -> list[Sample]:
    """Typical launches, to compile ahead of time."""
    out = []
    for dtype, k in KINDS:
        C = tl.float64 if dtype == tl.float64 else tl.float32
        dtypes = {"DTYPE": dtype, "C": C}
        if k == 1:
            out.append(sample(largest_kernel, C, OPTIONS, **dtypes))
        for first in (True, False):
            out.append(sample(pass_kernel, C, OPTIONS, **dtypes, K=k, J=3 * k, FIRST=first))
    return out
