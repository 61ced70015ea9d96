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

from .ragged import TRITON_DTYPE, device_table, find_item, on_device, pointer, prefix, widen

UNIT = 2.0**-53  # fp64 unit roundoff
PROGRAMS = 2048  # aimed at; no property of the device, so that no bit of a result depends on it
FINISH_COLUMNS, FINISH_BLOCK = 16, 64


class Tile(NamedTuple):
    """How `tile_kernel` is cut: as large as 255 registers a thread hold."""

    T: int  # rows
    BLOCK: int  # coordinates
    DOT: bool
    num_warps: int

    @classmethod
    def of(cls, m: int, exact: bool, metric: bool) -> Tile:
        if exact or m <= 4:
            size = 2 if m <= 2 else 4
            if exact:
                return cls(size, 128, False, 8 if metric else 4)
            return cls(size, 128 if metric else 256, False, 4)
        if m <= 16:
            return cls(16, 64, True, 8 if metric else 4)
        return cls(32, 32, True, 8)


@triton.jit(do_not_specialize=["items", "m", "tiles", "blocks", "stretch", "first", "stretches"])
def tile_kernel(
    table,  # int64 rows: addresses of dq, dp [m, N_t], their row strides, N_t, first blocks
    items: tl.int64,
    sums,  # fp64 [slots, T·tiles, T·tiles, stretches], written
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

    Slots: G, its low part if EXACT, S, its low part.
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
    for b in range(block, last):
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
    out = sums + (row_i[:, None] * padded + row_j[None, :]) * stretches + first + place
    slot = padded * padded * stretches
    if DOT:
        g += g_low
    else:
        g, g_low = _lane_sum(g, g_low, T * T, BLOCK, EXACT)
    tl.store(out, tl.reshape(g, (T, T)))
    if EXACT:
        tl.store(out + slot, tl.reshape(g_low, (T, T)))
    if METRIC:
        if DOT:
            s += s_low
        else:
            s, s_low = _lane_sum(s, s_low, T * T, BLOCK, EXACT)
        out += slot * (2 if EXACT else 1)
        tl.store(out, tl.reshape(s, (T, T)))
        if EXACT:
            tl.store(out + slot, tl.reshape(s_low, (T, T)))
    if tile_i == tile_j:
        q_sum, p_sum = _lane_sum(q_norm, p_norm, T, BLOCK, False)
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
    """x, y of ROWS·LANES numbers → [ROWS], summed over the lanes; EXACT: y is the low part of x.

    By halves: log2(LANES) additions for each number, whatever the layout in registers.
    """
    for level in tl.static_range(LANES.bit_length() - 1):
        x0, x1 = tl.split(tl.reshape(x, (ROWS, LANES >> (level + 1), 2)))
        y0, y1 = tl.split(tl.reshape(y, (ROWS, LANES >> (level + 1), 2)))
        if EXACT:
            x, y = _two_sum(x0, y0, x1, y1)
        else:
            x = x0 + x1
            y = y0 + y1
    return tl.reshape(x, (ROWS,)), tl.reshape(y, (ROWS,))


@triton.jit(do_not_specialize=["m", "padded", "stretches"])
def finish_kernel(
    sums,  # fp64 [slots, padded, padded, stretches]
    norms,  # fp64 [2, padded, stretches]
    omega,  # fp64 [m, m], written
    bound,  # fp64 [m, m], written
    metric,  # fp64 [m, m], written if METRIC
    m: tl.int64,
    padded: tl.int64,
    stretches: tl.int64,
    factor: tl.float64,
    underflow: tl.float64,
    EXACT: tl.constexpr,
    METRIC: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row i and COLUMNS columns j: Ω_ij = G_ij − G_ji, its bound, S_ij."""
    i = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    slot = padded * padded * stretches
    same = i + j * 0
    a, a_low = _stretch_sum(sums, i * padded + j, slot, stretches, j < m, COLUMNS, BLOCK, EXACT)
    b, b_low = _stretch_sum(sums, j * padded + i, slot, stretches, j < m, COLUMNS, BLOCK, EXACT)
    if EXACT:
        high, low = _two_sum(a, a_low, -b, -b_low)
        w = high + low
    else:
        w = a - b
    q_i, p_i = _norms(norms, same, padded, stretches, underflow, m, COLUMNS, BLOCK)
    q_j, p_j = _norms(norms, j, padded, stretches, underflow, m, COLUMNS, BLOCK)
    out = i * m + j
    tl.store(omega + out, w, mask=j < m)  # its diagonal, x − x, is 0 or NaN
    limit = 1.1102230246251565e-16 * tl.abs(w) + factor * (q_i * p_j + p_i * q_j) + underflow
    tl.store(bound + out, tl.where(i == j, w, limit), mask=j < m)
    if METRIC:
        sums += slot * (2 if EXACT else 1)
        upper = tl.minimum(i, j) * padded + tl.maximum(i, j)
        s, s_low = _stretch_sum(sums, upper, slot, stretches, j < m, COLUMNS, BLOCK, EXACT)
        if EXACT:
            s += s_low
        tl.store(metric + out, s, mask=j < m)


@triton.jit
def _stretch_sum(
    sums,
    entry,
    slot,
    stretches,
    mask,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Σ over the stretches of sums[entry, :] (and of its low part, one slot on): [COLUMNS]."""
    x = tl.zeros((COLUMNS, BLOCK), tl.float64)
    y = tl.zeros((COLUMNS, BLOCK), tl.float64)
    for first in range(0, stretches, BLOCK):
        place = first + tl.arange(0, BLOCK)
        here = sums + entry[:, None] * stretches + place[None, :]
        inside = mask[:, None] & (place < stretches)[None, :]
        if EXACT:
            new = tl.load(here, mask=inside, other=0.0)
            x, y = _two_sum(x, y, new, tl.load(here + slot, mask=inside, other=0.0))
        else:
            x += tl.load(here, mask=inside, other=0.0)
    return _lane_sum(x, y, COLUMNS, BLOCK, EXACT)


@triton.jit
def _norms(norms, row, padded, stretches, underflow, m, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """‖dq_row‖ and ‖dp_row‖, not less for squares that underflowed."""
    q, _ = _stretch_sum(norms, row, 0, stretches, row < m, COLUMNS, BLOCK, False)
    p, _ = _stretch_sum(norms, padded + row, 0, stretches, row < m, COLUMNS, BLOCK, False)
    return tl.sqrt(q + underflow), tl.sqrt(p + underflow)


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
    new = {"dtype": torch.float64, "device": device}
    sums = torch.empty((1 + exact) * (1 + metric), padded, padded, stretches, **new)
    norms = torch.empty(2, padded, stretches, **new)
    omega, bound = torch.empty(m, m, **new), torch.empty(m, m, **new)
    gram = torch.empty(m, m, **new) if metric else None
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
        # The order of additions inside matrix instructions is not specified: count a whole block.
        # 16: at most 8 halvings of a block, 6 in the second kernel, two at the end.
        depth = (
            longest + triton.cdiv(stretches, FINISH_BLOCK) + 16 + (tile.BLOCK if tile.DOT else 0)
        )
        finish_kernel[(m, triton.cdiv(m, FINISH_COLUMNS))](
            sums,
            norms,
            omega,
            bound,
            gram,
            m,
            padded,
            stretches,
            4 * ((depth + 2) * UNIT) ** 2 if exact else (depth + 1) * UNIT,
            4 * length * 2.0**-1074 if exact else 0.0,
            EXACT=exact,
            METRIC=metric,
            COLUMNS=FINISH_COLUMNS,
            BLOCK=FINISH_BLOCK,
            num_warps=4,
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
    finish = dict.fromkeys(("sums", "norms", "omega", "bound", "metric"), "*fp64")
    finish |= dict.fromkeys(("m", "padded", "stretches"), "i64")
    finish |= dict.fromkeys(("factor", "underflow"), "fp64")
    sizes = {"COLUMNS": FINISH_COLUMNS, "BLOCK": FINISH_BLOCK, "METRIC": True}
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return out + [(finish_kernel, finish, sizes | {"EXACT": e}, options) for e in (False, True)]
