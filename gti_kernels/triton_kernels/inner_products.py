"""Inner products between rows in Triton, to full precision: what two_form and gram share.

G = X diag(w) Yᵀ with sums in fp64. A program takes one tile of G and one stretch of the coordinates
and stores its partial sums; a second kernel adds the stretches in a fixed order. Each op then forms
its result and error bound in a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tables import device_table, on_device, prefix
from .ragged import TRITON_DTYPE, find_item, pointer, widen

UNIT = 2.0**-53  # fp64 unit roundoff
PROGRAMS = 1024  # aimed at; no property of the device, so that no bit of a result depends on it
LONGEST = 256  # blocks of a program, if it can be: the more, the weaker the error bound
MOST_STRETCHES = 65535  # of a grid's second axis
REDUCE_ROWS, REDUCE_BLOCK = 16, 128
FINISH_COLUMNS = 64
#: Whether an fp64 tl.dot takes operands that were loaded in 16 bits: the compiler of Triton 3.6,
#: which torch 2.10 and 2.11 bring, ends in an assertion.
DOT_OF_HALVES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


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


@triton.jit(do_not_specialize=["items", "m", "l", "down", "across", "blocks", "stretch", "first"])
def tile_kernel(
    table,  # int64 rows: addresses of x [B, m, N_t], y [B, l, N_t], w [N_t]; N_t, first blocks
    items: tl.int64,
    sums,  # fp64 [B, 1 + METRIC, T·down, T·across, 1 + EXACT, stretches], written: G and S
    norms,  # fp64 [B, T·down + T·across, stretches], written: Σ |w| x², Σ |w| y²; SYMMETRIC: once
    m: tl.int32,
    l: tl.int32,
    down: tl.int32,  # tiles
    across: tl.int32,
    blocks: tl.int64,  # in all
    stretch: tl.int64,  # blocks of one program
    first: tl.int64,  # place of this launch's first stretch in sums
    stretches: tl.int64,
    DTYPE: tl.constexpr,  # of x and y
    WEIGHT: tl.constexpr,  # of w, or None
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,  # matrix instructions (fp64), else one sum per tile entry and lane
    EXACT: tl.constexpr,  # fp64 inputs: compensated
    METRIC: tl.constexpr,
    SYMMETRIC: tl.constexpr,  # y is x: tiles on and above the diagonal only
    ONE_TILE: tl.constexpr,
):
    """Partial sums over one stretch: G_ij = Σ w x_i y_j and S_ij = x_i·x_j + y_i·y_j.

    EXACT: each is a high part and a low part.
    """
    # The tile is fastest: programs that read the same coordinates run together.
    problem = (tl.program_id(0) // (down * across)).to(tl.int64)
    tile = tl.program_id(0) % (down * across)
    place = tl.program_id(1).to(tl.int64)
    tile_i = tile // across
    tile_j = tile % across
    row_i = tile_i * T + tl.arange(0, T)
    row_j = tile_j * T + tl.arange(0, T)
    metric_m = tl.where(tile_i <= tile_j, m, 0)  # S is summed above the diagonal, and there only

    SHAPE: tl.constexpr = (T, T) if DOT else (T, T, BLOCK)
    g = tl.zeros(SHAPE, tl.float64)
    g_low = tl.zeros(SHAPE, tl.float64)
    s = tl.zeros(SHAPE, tl.float64)
    s_low = tl.zeros(SHAPE, tl.float64)
    x_norm = tl.zeros((T, BLOCK), tl.float64)
    y_norm = tl.zeros((T, BLOCK), tl.float64)

    starts = table + 4 * items
    block = place * stretch
    last = tl.minimum(block + stretch, blocks)
    if SYMMETRIC:
        last = tl.where(tile_i <= tile_j, last, block)
    item = find_item(starts, items, block)
    # A stage count asks for loads ahead of their use, which Triton grants unasked to tl.dot only.
    for b in tl.range(block, last, num_stages=3):
        item += (tl.load(starts + item + 1) <= b).to(tl.int64)
        x = pointer(tl.load(table + item), DTYPE, False)
        y = pointer(tl.load(table + items + item), DTYPE, False)
        count = tl.load(table + 3 * items + item)
        x += problem * m * count
        y += problem * l * count
        column = (b - tl.load(starts + item)) * BLOCK + tl.arange(0, BLOCK)
        x_i = _rows(x, row_i, m, column, count)
        if SYMMETRIC and ONE_TILE:
            y_j = x_i
        else:
            y_j = _rows(y, row_j, l, column, count)
        # A product of two numbers of at most 24 bits has no error in fp64.
        wx_i = x_i
        wx_low = x_i
        if WEIGHT is not None:
            w = pointer(tl.load(table + 2 * items + item), WEIGHT, False)
            w = widen(tl.load(w + column, mask=column < count, other=0.0), tl.float64)
            w = tl.broadcast_to(w[None, :], (T, BLOCK))
            wx_i = x_i * w
            if EXACT:
                wx_low = tl.fma(x_i, w, -wx_i)
            y_norm += tl.abs(w * y_j * y_j)
        else:
            y_norm += y_j * y_j
        if not SYMMETRIC:
            x_norm += tl.abs(wx_i * x_i)
        g, g_low = _outer(g, g_low, wx_i, wx_low, y_j, DOT, EXACT, WEIGHT is not None)
        if METRIC:
            x_j = _rows(x, row_j, metric_m, column, count)
            y_i = _rows(y, row_i, metric_m, column, count)
            s, s_low = _outer(s, s_low, x_i, x_i, x_j, DOT, EXACT, False)
            s, s_low = _outer(s, s_low, y_i, y_i, y_j, DOT, EXACT, False)

    rows = down.to(tl.int64) * T
    columns = across.to(tl.int64) * T
    parts: tl.constexpr = 2 if EXACT else 1
    forms: tl.constexpr = 2 if METRIC else 1
    entry = (problem * forms * rows + row_i[:, None]) * columns + row_j[None, :]
    out = sums + entry * (parts * stretches) + first + place
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
        out += rows * columns * (parts * stretches)
        tl.store(out, tl.reshape(s, (T, T)))
        if EXACT:
            tl.store(out + stretches, tl.reshape(s_low, (T, T)))
    above: tl.constexpr = 0 if SYMMETRIC else 1
    norms += problem * (above * rows + columns) * stretches + first + place
    if tile_i == 0:
        y_sum, _ = _lane_sum(y_norm, y_norm, T, BLOCK, False)
        tl.store(norms + (above * rows + row_j) * stretches, y_sum)
    if not SYMMETRIC and tile_j == 0:
        x_sum, _ = _lane_sum(x_norm, x_norm, T, BLOCK, False)
        tl.store(norms + row_i * stretches, x_sum)


@triton.jit
def _rows(base, row, rows, column, count):
    """base[row, column] in fp64, zero outside [rows, count]."""
    mask = (row < rows)[:, None] & (column < count)[None, :]
    x = tl.load(base + row.to(tl.int64)[:, None] * count + column[None, :], mask=mask, other=0.0)
    return widen(x, tl.float64)


@triton.jit
def _outer(high, low, a, a_low, b, DOT: tl.constexpr, EXACT: tl.constexpr, WEIGHTED: tl.constexpr):
    """high + low += a_i b_j; EXACT and WEIGHTED: (a_i + a_low_i) b_j. The error of a product of two
    fp64 numbers comes from an fma, and TwoSum keeps what each sum loses (Dot2: Ogita, Rump, Oishi
    2005). The launch forbids contraction: a sum with an unrounded product would not be it."""
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
            product_low = tl.fma(a, b, -product)
            if WEIGHTED:
                a_low = tl.broadcast_to(a_low[:, None, :], high.shape)
                product_low = tl.fma(a_low, b, product_low)
            high, low = two_sum(high, low, product, product_low)
        else:
            high += product
    return high, low


@triton.jit
def two_sum(high, low, x, x_low):
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
            x, y = two_sum(x0, y0, x1, y1)
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
            high, low = two_sum(high, low, new, new_low)
        else:
            high += new
    high, low = _lane_sum(high, low, ROWS, BLOCK, EXACT)
    tl.store(out + row * parts, high, mask=row < rows)
    if EXACT:
        tl.store(out + row * parts + 1, low, mask=row < rows)


@triton.jit
def error_bound(value, size, factor, underflow):
    """|value − exact|: one rounding of the value, and what its sum of magnitudes at most `size`
    lost."""
    return 1.1102230246251565e-16 * tl.abs(value) + factor * size + underflow


class Products(NamedTuple):
    """What the last kernel of an op starts from. B problems, X and Y rows padded to whole tiles."""

    sums: Tensor  # [B, 1 + metric, X, Y, 1 + exact]
    norms: Tensor  # [B, X + Y]: Σ |w| x², Σ |w| y²; symmetric: [B, X]
    exact: bool
    factor: float  # of the bound: |sum − exact| ≤ factor·√(Σ |w| x²)·√(Σ |w| y²) + underflow
    underflow: float  # and what squares that vanished lack


def inner_products(
    x: list[Tensor],
    y: list[Tensor] | None,
    weight: list[Tensor] | None = None,
    metric: bool = False,
) -> Products:
    """Σ_a w_a x_ia y_ja, with metric also Σ_a x_ia x_ja + y_ia y_ja above the diagonal and on it.

    x, y: lists of contiguous [B, m, N_t] and [B, l, N_t], B left out where there is one problem; y
    None: x, and only entries above the diagonal and on it. weight: of [N_t]. Any float dtype, that
    of y as in x; 16-bit tensors are copied to fp32 where Triton cannot multiply them.

    The bound. Let a term of size |x| pass through at most h additions, u = 2⁻⁵³. Plain sums: w x
    and, without w, the product have no error, so with its rounding the error is at most
    ((1 + u)ʰ⁺¹ − 1) Σ|x|. Compensated sums: fma and TwoSum keep each rounding error. A product's
    low part is at most 2.1u|x| and itself wrong by 2.1u²|x| with w, u|x| and exact without. Errors
    and lows together are at most (h + 2)u(1 + u)ʰ⁺¹ Σ|x|, and adding them up (2h + 1 additions)
    loses at most (2h + 1)u of that; the last rounding is u|value|. Cauchy and Schwarz: Σ|x| is at
    most the product of the norms. The factors (h + 2)u and 4(h + 2)²u² leave room for the rounding
    of the norms (relative error at most (h + 4)u) as long as h < 2²⁵.
    """
    *batch, m, _ = x[0].shape
    symmetric, device = y is None, x[0].device
    problems, l = batch[0] if batch else 1, (y or x)[0].shape[-2]
    exact = any(t.dtype == torch.float64 for t in (*x, *(weight or ())))
    tile = Tile.of(max(m, l), exact, metric)
    if tile.DOT and not DOT_OF_HALVES:
        x, y, weight = _wide(x), y and _wide(y), weight and _wide(weight)
    ys = x if y is None else y
    ws: Sequence[Tensor | None] = [None] * len(x) if weight is None else weight
    down, across = triton.cdiv(m, tile.T), triton.cdiv(l, tile.T)

    groups: dict[tuple[torch.dtype, torch.dtype | None], list[tuple[int, ...]]] = {}
    for x_t, y_t, w_t in zip(x, ys, ws, strict=True):
        if x_t.numel():
            w_at, w_dtype = (0, None) if w_t is None else (w_t.data_ptr(), w_t.dtype)
            row = (x_t.data_ptr(), y_t.data_ptr(), w_at, x_t.shape[-1])
            groups.setdefault((x_t.dtype, w_dtype), []).append(row)
    launches, stretches, longest, length = [], 0, 0, 0
    for dtypes, items in groups.items():
        starts = prefix([triton.cdiv(row[3], tile.BLOCK) for row in items])
        stretch = max(4, triton.cdiv(starts[-1], max(32, PROGRAMS // (down * across))))
        stretch = max(min(stretch, LONGEST), triton.cdiv(starts[-1], MOST_STRETCHES))
        launches.append((dtypes, items, starts, stretch, stretches))
        stretches += triton.cdiv(starts[-1], stretch)
        longest = max(longest, stretch)
        length += sum(row[3] for row in items)

    def new(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float64, device=device)

    rows, columns = down * tile.T, across * tile.T
    sums = new(problems, 1 + metric, rows, columns, 1 + exact, stretches)
    norms = new(problems, columns if symmetric else rows + columns, stretches)
    with on_device(device):
        for (dtype, w_dtype), items, starts, stretch, first in launches:
            table = (*zip(*items, strict=True), tuple(starts))
            tile_kernel[(problems * down * across, triton.cdiv(starts[-1], stretch))](
                device_table(table, device),
                len(items),
                sums,
                norms,
                m,
                l,
                down,
                across,
                starts[-1],
                stretch,
                first,
                stretches,
                DTYPE=TRITON_DTYPE[dtype],
                WEIGHT=TRITON_DTYPE[w_dtype],
                EXACT=exact,
                METRIC=metric,
                SYMMETRIC=symmetric,
                ONE_TILE=down * across == 1,
                enable_fp_fusion=not exact,
                **tile._asdict(),
            )
        sums_of_all, norms_of_all = new(*sums.shape[:-1]), new(*norms.shape[:-1])
        for partial, total, pairs in ((sums, sums_of_all, exact), (norms, norms_of_all, False)):
            entries = total.numel() // (1 + pairs)
            reduce_kernel[(triton.cdiv(entries, REDUCE_ROWS),)](
                partial,
                total,
                entries,
                stretches,
                ROWS=REDUCE_ROWS,
                BLOCK=REDUCE_BLOCK,
                EXACT=pairs,
                num_warps=4,
                enable_fp_fusion=False,
            )
    # The order of additions inside matrix instructions is not specified: count a whole block.
    # 17: at most 8 halvings of a block, 7 in the second kernel, two at the end.
    depth = longest + triton.cdiv(stretches, REDUCE_BLOCK) + 17 + (tile.BLOCK if tile.DOT else 0)
    factor = 4 * ((depth + 2) * UNIT) ** 2 if exact else (depth + 2) * UNIT
    underflow = 4 * length * 2.0**-1074 if exact else 0.0
    return Products(sums_of_all, norms_of_all, exact, factor, underflow)


def _wide(tensors: list[Tensor]) -> list[Tensor]:
    return [t.float() if t.element_size() == 2 else t for t in tensors]


def samples() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Kernel, signature, constants and options of typical launches, to compile ahead of time."""
    integers = dict.fromkeys(("items", "blocks", "stretch", "first", "stretches"), "i64")
    pointers = {"table": "*i64", "sums": "*fp64", "norms": "*fp64"}
    integers |= dict.fromkeys(("m", "l", "down", "across"), "i32")
    fp64, fp32, bf16 = tl.float64, tl.float32, tl.bfloat16
    forms = [(fp32, m, metric) for m in (4, 16, 256) for metric in (False, True)]
    forms += [(bf16, 4, False), (fp64, 4, False), (fp64, 4, True)]
    if DOT_OF_HALVES:
        forms += [(bf16, m, metric) for m in (16, 256) for metric in (False, True)]
    kinds: list[tuple[Any, Any, int, bool, bool]] = [(d, None, m, x, False) for d, m, x in forms]
    kinds += [(fp32, fp32, m, False, True) for m in (16, 256)]
    kinds += [(fp64, None, 4, False, True), (fp64, fp64, 4, False, False)]
    out = []
    for dtype, weight, m, metric, symmetric in kinds:
        exact = fp64 in (dtype, weight)
        constants = Tile.of(m, exact, metric)._asdict()
        options = {"num_warps": constants.pop("num_warps"), "enable_fp_fusion": not exact}
        constants |= {"DTYPE": dtype, "WEIGHT": weight, "EXACT": exact, "METRIC": metric}
        constants |= {"SYMMETRIC": symmetric, "ONE_TILE": m <= constants["T"]}
        out.append((tile_kernel, pointers | integers, constants, options))
    options = {"num_warps": 4, "enable_fp_fusion": False}
    reduce = {"x": "*fp64", "out": "*fp64", "rows": "i64", "stretches": "i64"}
    sizes = {"ROWS": REDUCE_ROWS, "BLOCK": REDUCE_BLOCK}
    return [*out, *((reduce_kernel, reduce, sizes | {"EXACT": e}, options) for e in (False, True))]
