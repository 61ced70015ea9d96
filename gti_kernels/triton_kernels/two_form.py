"""The symplectic 2-form in Triton: Ω = G − Gᵀ with G = DQ DPᵀ, sums in fp64.

G holds every product of Ω exactly once, and G − Gᵀ is skew to the bit. A program takes one tile of
G and one stretch of the coordinates and stores its partial sums; a second kernel adds the stretches
in a fixed order and forms Ω, its error bound and the metric.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tables import device_table, on_device, prefix
from .ragged import TRITON_DTYPE, find_item, pointer, widen

UNIT = 2.0**-53  # fp64 unit roundoff
PROGRAMS = 1024  # aimed at; no property of the device, so that no bit of a result depends on it
REDUCE_ROWS, REDUCE_BLOCK = 16, 128
FINISH_COLUMNS = 64


class Tile(NamedTuple):
    """How `tile_kernel` is cut: as large as 255 registers a thread hold."""

    T: int  # rows
    BLOCK: int  # coordinates
    DOT: bool
    num_warps: int

    @classmethod
    def of(cls, m: int, exact: bool, metric: bool) -> Tile:
        if exact or m <= 4:
            return cls(2 if m <= 2 else 4, 128, False, 8 if exact and metric else 4)
        if m <= 16:
            return cls(16, 32 if metric else 64, True, 4)
        return cls(32, 16 if metric else 32, True, 8)


@triton.jit(do_not_specialize=["items", "m", "tiles", "blocks", "stretch", "first", "stretches"])
def tile_kernel(
    table,  # int64 rows: addresses of dq, dp [m, N_t], their row strides, N_t, first blocks
    items: tl.int64,
    sums,  # fp64 [1 + METRIC, T·tiles, T·tiles, 1 + EXACT, stretches], written: G and S
    norms,  # fp64 [2, T·tiles, stretches], written: Σ dq², Σ dp²
    m: tl.int32,
    tiles: tl.int32,
    blocks: tl.int64,  # in all
    stretch: tl.int64,  # blocks of one program
    first: tl.int64,  # place of this launch's first stretch in sums
    stretches: tl.int64,
    DTYPE: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,  # matrix instructions (fp64), else one sum per tile entry and lane
    EXACT: tl.constexpr,  # fp64 inputs: compensated
    METRIC: tl.constexpr,
):
    """Partial sums over one stretch: G_ij = dq_i·dp_j and S_ij = dq_i·dq_j + dp_i·dp_j.

    EXACT: each is a high part and a low part.
    """
    tile = tl.program_id(0)  # fastest: programs that read the same coordinates run together
    place = tl.program_id(1).to(tl.int64)
    tile_i = tile // tiles
    tile_j = tile % tiles
    row_i = tile_i * T + tl.arange(0, T)
    row_j = tile_j * T + tl.arange(0, T)
    metric_m = tl.where(tile_i <= tile_j, m, 0)  # S is summed above the diagonal, and there only

    SHAPE: tl.constexpr = (T, T) if DOT else (T, T, BLOCK)
    g = tl.zeros(SHAPE, tl.float64)
    g_low = tl.zeros(SHAPE, tl.float64)
    s = tl.zeros(SHAPE, tl.float64)
    s_low = tl.zeros(SHAPE, tl.float64)
    q_norm = tl.zeros((T, BLOCK), tl.float64)
    p_norm = tl.zeros((T, BLOCK), tl.float64)

    starts = table + 5 * items
    block = place * stretch
    last = tl.minimum(block + stretch, blocks)
    item = find_item(starts, items, block)
    # A stage count asks for loads ahead of their use, which Triton grants unasked to tl.dot only.
    for b in tl.range(block, last, num_stages=3):
        item += (tl.load(starts + item + 1) <= b).to(tl.int64)
        q = pointer(tl.load(table + item), DTYPE, False)
        p = pointer(tl.load(table + items + item), DTYPE, False)
        q_stride = tl.load(table + 2 * items + item)
        p_stride = tl.load(table + 3 * items + item)
        count = tl.load(table + 4 * items + item)
        column = (b - tl.load(starts + item)) * BLOCK + tl.arange(0, BLOCK)
        q_i = _rows(q, row_i, q_stride, m, column, count)
        p_j = _rows(p, row_j, p_stride, m, column, count)
        g, g_low = _outer(g, g_low, q_i, p_j, DOT, EXACT)
        q_norm += q_i * q_i
        p_norm += p_j * p_j
        if METRIC:
            q_j = _rows(q, row_j, q_stride, metric_m, column, count)
            p_i = _rows(p, row_i, p_stride, metric_m, column, count)
            s, s_low = _outer(s, s_low, q_i, q_j, DOT, EXACT)
            s, s_low = _outer(s, s_low, p_i, p_j, DOT, EXACT)

    padded = tiles.to(tl.int64) * T
    parts: tl.constexpr = 2 if EXACT else 1
    out = sums + (row_i[:, None] * padded + row_j[None, :]) * (parts * stretches) + first + place
    if DOT:
        g += g_low
    else:
        g, g_low = _lane_sum(g, g_low, T * T, BLOCK, EXACT)
    tl.store(out, tl.reshape(g, (T, T)))
    if EXACT:
        tl.store(out + stretches, tl.reshape(g_low, (T, T)))
    if METRIC:
        if DOT:
            s += s_low
        else:
            s, s_low = _lane_sum(s, s_low, T * T, BLOCK, EXACT)
        out += padded * padded * (parts * stretches)
        tl.store(out, tl.reshape(s, (T, T)))
        if EXACT:
            tl.store(out + stretches, tl.reshape(s_low, (T, T)))
    if tile_i == tile_j:
        q_sum, _ = _lane_sum(q_norm, q_norm, T, BLOCK, False)
        p_sum, _ = _lane_sum(p_norm, p_norm, T, BLOCK, False)
        tl.store(norms + row_i * stretches + first + place, q_sum)
        tl.store(norms + (padded + row_i) * stretches + first + place, p_sum)


@triton.jit
def _rows(base, row, stride, m, column, count):
    """base[row, column] in fp64, zero outside [m, count]."""
    mask = (row < m)[:, None] & (column < count)[None, :]
    x = tl.load(base + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)
    return widen(x, tl.float64)


@triton.jit
def _outer(high, low, a, b, DOT: tl.constexpr, EXACT: tl.constexpr):
    """high + low += a_i b_j. A product of two numbers of at most 24 bits has no error in fp64; that
    of two fp64 numbers comes from an fma, and TwoSum keeps what each sum loses (Dot2: Ogita, Rump,
    Oishi 2005). The launch forbids contraction: a sum with an unrounded product would not be it."""
    if DOT:
        # A product is added one call later (low holds it), or the compiler would make high its
        # accumulator: one chain of additions over all coordinates, and a bound that much weaker.
        high += low
        low = tl.dot(a, tl.trans(b), out_dtype=tl.float64, input_precision="ieee")
    else:
        a = tl.broadcast_to(a[:, None, :], high.shape)
        b = tl.broadcast_to(b[None, :, :], high.shape)
        product = a * b
        if EXACT:
            high, low = _two_sum(high, low, product, tl.fma(a, b, -product))
        else:
            high += product
    return high, low


@triton.jit
def _two_sum(high, low, x, x_low):
    """(high + low) + (x + x_low); the rounding error of high + x goes to the low part (Knuth)."""
    total = high + x
    back = total - high
    return total, (low + x_low) + ((high - (total - back)) + (x - back))


@triton.jit
def _lane_sum(x, y, ROWS: tl.constexpr, LANES: tl.constexpr, EXACT: tl.constexpr):
    """x of ROWS·LANES numbers → [ROWS], summed over the lanes; EXACT: y likewise, its low part.

    By halves: log2(LANES) additions for each number, whatever the layout in registers.
    """
    for level in tl.static_range(LANES.bit_length() - 1):
        x0, x1 = tl.split(tl.reshape(x, (ROWS, LANES >> (level + 1), 2)))
        if EXACT:
            y0, y1 = tl.split(tl.reshape(y, (ROWS, LANES >> (level + 1), 2)))
            x, y = _two_sum(x0, y0, x1, y1)
        else:
            x = x0 + x1
    x = tl.reshape(x, (ROWS,))
    if EXACT:
        y = tl.reshape(y, (ROWS,))
    return x, y


@triton.jit(do_not_specialize=["rows", "stretches"])
def reduce_kernel(
    x,  # fp64 [rows, 1 + EXACT, stretches]
    out,  # fp64 [rows, 1 + EXACT], written
    rows: tl.int64,
    stretches: tl.int64,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Sums over the stretches, ROWS of them."""
    parts: tl.constexpr = 2 if EXACT else 1
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    high = tl.zeros((ROWS, BLOCK), tl.float64)
    low = tl.zeros((ROWS, BLOCK), tl.float64)
    for first in range(0, stretches, BLOCK):
        place = first + tl.arange(0, BLOCK)
        here = x + row[:, None] * (parts * stretches) + place[None, :]
        inside = (row < rows)[:, None] & (place < stretches)[None, :]
        new = tl.load(here, mask=inside, other=0.0)
        if EXACT:
            new_low = tl.load(here + stretches, mask=inside, other=0.0)
            high, low = _two_sum(high, low, new, new_low)
        else:
            high += new
    high, low = _lane_sum(high, low, ROWS, BLOCK, EXACT)
    tl.store(out + row * parts, high, mask=row < rows)
    if EXACT:
        tl.store(out + row * parts + 1, low, mask=row < rows)


@triton.jit(do_not_specialize=["m", "padded"])
def finish_kernel(
    sums,  # fp64 [1 + METRIC, padded, padded, 1 + EXACT]
    norms,  # fp64 [2, padded]
    omega,  # fp64 [m, m], written
    bound,  # fp64 [m, m], written
    metric,  # fp64 [m, m], written if METRIC
    m: tl.int64,
    padded: tl.int64,
    factor: tl.float64,
    underflow: tl.float64,
    EXACT: tl.constexpr,
    METRIC: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One row i and COLUMNS columns j: Ω_ij = G_ij − G_ji, its bound, S_ij."""
    i = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = j < m
    parts: tl.constexpr = 2 if EXACT else 1
    g_ij = sums + (i * padded + j) * parts
    g_ji = sums + (j * padded + i) * parts
    a = tl.load(g_ij, mask=inside, other=0.0)
    b = tl.load(g_ji, mask=inside, other=0.0)
    if EXACT:
        a_low = tl.load(g_ij + 1, mask=inside, other=0.0)
        b_low = tl.load(g_ji + 1, mask=inside, other=0.0)
        high, low = _two_sum(a, a_low, -b, -b_low)
        w = high + low
    else:
        w = a - b
    # Not less for squares that underflowed.
    q_i = tl.sqrt(tl.load(norms + i) + underflow)
    p_i = tl.sqrt(tl.load(norms + padded + i) + underflow)
    q_j = tl.sqrt(tl.load(norms + j, mask=inside, other=0.0) + underflow)
    p_j = tl.sqrt(tl.load(norms + padded + j, mask=inside, other=0.0) + underflow)
    limit = 1.1102230246251565e-16 * tl.abs(w) + factor * (q_i * p_j + p_i * q_j) + underflow
    out = i * m + j
    tl.store(omega + out, w, mask=inside)  # its diagonal, x − x, is 0 or NaN
    tl.store(bound + out, tl.where(i == j, w, limit), mask=inside)
    if METRIC:
        upper = padded * padded + tl.minimum(i, j) * padded + tl.maximum(i, j)
        s = tl.load(sums + upper * parts, mask=inside, other=0.0)
        if EXACT:
            s += tl.load(sums + upper * parts + 1, mask=inside, other=0.0)
        tl.store(metric + out, s, mask=inside)


def two_form(
    dq: list[Tensor], dp: list[Tensor], metric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ω_ij = Σ_a dq_ia dp_ja − dp_ia dq_ja, its bound, and S_ij = Σ_a dq_ia dq_ja + dp_ia dp_ja.

    dq, dp: lists of [m, N_t], any float dtype. Returns Ω [m, m], bound [m, m], S [m, m] or None,
    all fp64.

    The bound. Let every term of Ω_ij pass through at most h additions, x its exact value, u = 2⁻⁵³.
    Plain sums: products are exact, so the error before the last subtraction is at most
    ((1 + u)ʰ − 1) Σ|x|, and that subtraction adds u|Ω|. Compensated sums: TwoSum and fma keep each
    rounding error; these errors and lows together are at most (h + 1)u(1 + u)ʰ⁺¹ Σ|x|, adding them
    up (2h + 1 additions) and the last rounding lose at most (2h + 1)u of that and u|Ω|. Cauchy and
    Schwarz: Σ|x| ≤ ‖dq_i‖‖dp_j‖ + ‖dp_i‖‖dq_j‖. The factors (h + 1)u and 4(h + 2)²u² below leave
    room for the rounding of the norms (relative error at most (h + 2)u) as long as h < 2²⁵.
    """
    m, device = dq[0].shape[0], dq[0].device
    exact = any(t.dtype == torch.float64 for t in dq)
    tile = Tile.of(m, exact, metric)
    tiles = triton.cdiv(m, tile.T)

    groups: dict[torch.dtype, list[tuple[int, ...]]] = {}
    for q_t, p_t in zip(dq, dp, strict=True):
        if q_t.numel():
            row = (q_t.data_ptr(), p_t.data_ptr(), q_t.stride(0), p_t.stride(0), q_t.shape[1])
            groups.setdefault(q_t.dtype, []).append(row)
    launches, stretches, longest, length = [], 0, 0, 0
    for dtype, items in groups.items():
        starts = prefix([triton.cdiv(row[4], tile.BLOCK) for row in items])
        stretch = max(4, triton.cdiv(starts[-1], max(32, PROGRAMS // tiles**2)))
        launches.append((dtype, items, starts, stretch, stretches))
        stretches += triton.cdiv(starts[-1], stretch)
        longest = max(longest, stretch)
        length += sum(row[4] for row in items)

    padded = tiles * tile.T

    def new(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float64, device=device)

    sums = new(1 + metric, padded, padded, 1 + exact, stretches)
    norms = new(2, padded, stretches)
    omega, bound = new(m, m), new(m, m)
    gram = new(m, m) if metric else None
    with on_device(device):
        for dtype, items, starts, stretch, first in launches:
            rows = (*zip(*items, strict=True), tuple(starts))
            tile_kernel[(tiles * tiles, triton.cdiv(starts[-1], stretch))](
                device_table(rows, device),
                len(items),
                sums,
                norms,
                m,
                tiles,
                starts[-1],
                stretch,
                first,
                stretches,
                DTYPE=TRITON_DTYPE[dtype],
                EXACT=exact,
                METRIC=metric,
                enable_fp_fusion=not exact,
                **tile._asdict(),
            )
        totals = []
        for x, pairs in ((sums, exact), (norms, False)):
            total = new(*x.shape[:-1])
            rows_of_x = total.numel() // (1 + pairs)
            reduce_kernel[(triton.cdiv(rows_of_x, REDUCE_ROWS),)](
                x,
                total,
                rows_of_x,
                stretches,
                ROWS=REDUCE_ROWS,
                BLOCK=REDUCE_BLOCK,
                EXACT=pairs,
                num_warps=4,
                enable_fp_fusion=False,
            )
            totals.append(total)
        # The order of additions inside matrix instructions is not specified: count a whole block.
        # 17: at most 8 halvings of a block, 7 in the second kernel, two at the end.
        depth = (
            longest + triton.cdiv(stretches, REDUCE_BLOCK) + 17 + (tile.BLOCK if tile.DOT else 0)
        )
        finish_kernel[(m, triton.cdiv(m, FINISH_COLUMNS))](
            *totals,
            omega,
            bound,
            gram,
            m,
            padded,
            4 * ((depth + 2) * UNIT) ** 2 if exact else (depth + 1) * UNIT,
            4 * length * 2.0**-1074 if exact else 0.0,
            EXACT=exact,
            METRIC=metric,
            COLUMNS=FINISH_COLUMNS,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return omega, bound, gram


def samples() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Kernel, signature, constants and options of typical launches, to compile ahead of time."""
    integers = dict.fromkeys(("items", "blocks", "stretch", "first", "stretches"), "i64")
    pointers = {"table": "*i64", "sums": "*fp64", "norms": "*fp64"}
    integers |= {"m": "i32", "tiles": "i32"}
    out = []
    kinds = [(tl.float32, m, metric) for m in (4, 16, 256) for metric in (False, True)]
    kinds += [(tl.bfloat16, 4, False), (tl.float64, 4, False), (tl.float64, 4, True)]
    for dtype, m, metric in kinds:
        exact = dtype == tl.float64
        constants = Tile.of(m, exact, metric)._asdict()
        options = {"num_warps": constants.pop("num_warps"), "enable_fp_fusion": not exact}
        constants |= {"DTYPE": dtype, "EXACT": exact, "METRIC": metric}
        out.append((tile_kernel, pointers | integers, constants, options))
    options = {"num_warps": 4, "enable_fp_fusion": False}
    reduce = {"x": "*fp64", "out": "*fp64", "rows": "i64", "stretches": "i64"}
    sizes = {"ROWS": REDUCE_ROWS, "BLOCK": REDUCE_BLOCK}
    out += [(reduce_kernel, reduce, sizes | {"EXACT": e}, options) for e in (False, True)]
    finish = dict.fromkeys(("sums", "norms", "omega", "bound", "metric"), "*fp64")
    finish |= {"m": "i64", "padded": "i64", "factor": "fp64", "underflow": "fp64"}
    constants = {"EXACT": True, "METRIC": True, "COLUMNS": FINISH_COLUMNS}
    return [*out, (finish_kernel, finish, constants, options | {"num_warps": 1})]
