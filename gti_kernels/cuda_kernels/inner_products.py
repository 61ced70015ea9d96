"""Inner products between rows in CUDA C++: what the launchers of two_form and gram share; the
kernels are in `csrc/cuda/inner_products.cuh`. One launch for all problems, tiles and tensors of a
dtype; each op adds the stretches of columns in a second one.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ..tables import device_table, on_device, prefix
from . import ragged
from .compiler import Specialisation
from .ragged import run

UNIT = 2.0**-53  # fp64 unit roundoff
BLOCKS = 4096  # aimed at; no property of the device, so that no bit of a result depends on it
FLUSH = 512  # columns that one accumulator of the tensor cores takes in
PAIR_PRODUCTS = 32  # that a pair of fp32 numbers takes in
#: Compute capabilities with 1/64 of the rate of fp32 in fp64
SCARCE_FP64 = ((8, 6), (8, 9), (12, 0))


def scarce_fp64(device: torch.device) -> bool:
    """Whether sums of products up to fp32 go through pairs of fp32 numbers on this device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in SCARCE_FP64


class Tile(NamedTuple):
    """How `tile_sums` is cut, as the source has it."""

    rows: int  # the macro TILE
    dtype: torch.dtype
    metric: bool = False
    weighted: bool = False
    symmetric: bool = False
    pairs: bool = False

    @classmethod
    def of(
        cls,
        m: int,
        dtype: torch.dtype,
        metric: bool = False,
        weighted: bool = False,
        symmetric: bool = False,
        pairs: bool = False,
    ) -> Tile:
        if dtype == torch.float64 or pairs:
            return cls(2 if metric or m <= 2 else 4, dtype, metric, weighted, symmetric, pairs)
        most = 32 if dtype == torch.float32 and not metric and not weighted else 16
        rows = next(rows for rows in (4, 8, 16, most) if rows >= min(m, most))
        return cls(rows, dtype, metric, weighted, symmetric)

    @property
    def exact(self) -> bool:
        return self.dtype == torch.float64

    @property
    def by_lane(self) -> bool:
        """Lanes own columns; no tensor cores."""
        return self.exact or self.pairs

    @property
    def columns(self) -> int:
        """Of a unit, the least that a warp takes."""
        if self.by_lane:
            return 32 if self.metric else 64
        lanes = 4 * 16 // self.dtype.itemsize
        if self.rows >= 16:
            return lanes
        few = self.metric or self.weighted or (self.dtype.itemsize == 2 and not self.symmetric)
        return lanes * (2 if few else 4) * (8 // self.rows)

    def split(self, m: int) -> int:
        """A block has split × split tiles, whose warps share rows through the L1 cache."""
        return 2 if m > self.rows else 1

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        forms = 2 if self.metric else 1
        sums = 2 * self.rows**2 if self.by_lane else 64 * max(1, self.rows // 8) ** 2
        return ragged.THREADS // 32 * 8 * (forms * sums + 2 * self.rows)


class Sums(NamedTuple):
    """What the last kernel of an op starts from. B problems, m rows of x, l of y."""

    sums: Tensor  # [B, 1 + metric, m, l, 1 + exact, stretches]
    norms: Tensor  # [B, m + l, stretches]: Σ |w| x², Σ |w| y²; symmetric: [B, m, stretches]
    exact: bool
    factor: float  # of the bound: |sum − exact| ≤ factor·√(Σ |w| x²)·√(Σ |w| y²) + underflow
    underflow: float  # and what squares that vanished lack


def widest(*lists: list[Tensor] | None) -> list[list[Tensor] | None]:
    """The lists with one dtype for each place; with fp64 everywhere if it is anywhere: sums are
    compensated for all tensors or for none."""
    given = [x for x in lists if x is not None]
    exact = any(t.dtype == torch.float64 for x in given for t in x)
    dtypes = []
    for tensors in zip(*given, strict=True):
        dtype = torch.float64 if exact else tensors[0].dtype
        for t in tensors[1:]:
            dtype = torch.promote_types(dtype, t.dtype)
        dtypes.append(dtype)
    return [x and [t.to(d) for t, d in zip(x, dtypes, strict=True)] for x in lists]


def inner_products(
    stem: str,
    x: list[Tensor],
    y: list[Tensor] | None,
    weight: list[Tensor] | None = None,
    metric: bool = False,
) -> Sums:
    """Σ_a w_a x_ia y_ja, with metric also Σ_a x_ia x_ja + y_ia y_ja above the diagonal and on it,
    for each of a number of stretches of columns.

    x, y: lists of contiguous [B, m, N_t] and [B, l, N_t], B left out where there is one problem; y
    None: x, and only entries above the diagonal and on it. weight: of [N_t]. Any float dtype; where
    those of one place differ, or one of any place is fp64, the others are copied to it.

    The bound. Let a term pass through at most h additions before the last kernel, u = 2⁻⁵³, Σ|x|
    the sum of the terms' magnitudes, by Cauchy and Schwarz at most the product of the norms. Up to
    fp32: w x and a product of two have no error, a product of three is rounded with its sum by one
    fma, so these additions lose at most ((1 + u)ʰ − 1) Σ|x|. The last kernel adds the stretches
    with TwoSum: beside u|value| for its last rounding it loses terms of order u² only. For fp64
    elements every sum is compensated, and with h additions in all 4(h + 2)²u² Σ|x| is left. As in
    Triton's `inner_products`, which has the proof, the factors leave room for the rounding of the
    norms. On a device with next to no fp64 sums without weights are of pairs of fp32 numbers:
    (3·32 + 6)·2⁻⁴⁸ Σ|x| is lost in a pair, as the source derives, and 2⁻¹⁵⁰ for each product that
    underflows in fp32; one that overflows there makes its entry NaN.
    """
    x_, y_, w_ = widest(x, y, weight)
    assert x_ is not None
    *batch, m, _ = x_[0].shape
    symmetric, device = y_ is None, x_[0].device
    ys = x_ if y_ is None else y_
    problems, l = batch[0] if batch else 1, ys[0].shape[-2]
    larger = max(m, l)
    exact = any(t.dtype == torch.float64 for t in x_)
    pairwise = not exact and w_ is None and scarce_fp64(device)
    groups: dict[torch.dtype, list[tuple[int, ...]]] = {}
    for i, (x_t, y_t) in enumerate(zip(x_, ys, strict=True)):
        if x_t.numel():
            w_at = 0 if w_ is None else w_[i].data_ptr()
            row = (x_t.data_ptr(), y_t.data_ptr(), w_at, x_t.shape[-1])
            groups.setdefault(x_t.dtype, []).append(row)

    launches = []
    stretches = depth = 0
    for dtype, items in groups.items():
        tile = Tile.of(larger, dtype, metric, w_ is not None, symmetric, pairwise)
        split = tile.split(larger)
        span = split * tile.rows
        pairs = -(-m // span) * -(-l // span)
        streams = ragged.THREADS // 32 // split**2
        starts = prefix([-(-row[3] // tile.columns) for row in items])
        stretch = max(4 * streams, -(-starts[-1] // max(1, BLOCKS // pairs)))
        here = -(-starts[-1] // stretch)
        launches.append((tile, split, pairs, items, starts, stretch, here, stretches))
        stretches += here
        units = -(-stretch // streams)  # of a warp at most
        # 17: the sum of warps and of halves; 37: the sum of lanes and of warps, the last kernel's.
        if tile.exact:
            depth = max(depth, units * tile.columns // 32 + 37)
        elif tile.pairs:
            flushes = units * tile.columns * (1 + metric) // 32 // PAIR_PRODUCTS + 1
            depth = max(depth, 2 * flushes + 37)
        else:
            columns = units * tile.columns
            depth = max(depth, min(FLUSH, columns) + -(-columns // FLUSH) + 17)
    length = sum(row[3] for items in groups.values() for row in items)

    def new(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float64, device=device)

    sums = new(problems, 1 + metric, m, l, 1 + exact, stretches)
    norms = new(problems, m if symmetric else m + l, stretches)
    with on_device(device):
        for tile, split, pairs, items, starts, stretch, here, first in launches:
            rows = (*zip(*items, strict=True), tuple(starts))
            sizes = [len(items), m, l, split, starts[-1], stretch, here, first]
            args = [device_table(rows, device), *sizes, stretches, sums, norms]
            blocks = pairs * here * problems
            run(stem, specialisation(stem, tile), blocks, args, device, tile.shared_bytes)
    if exact:
        depth += -(-stretches // 32)
        factor, underflow = 4 * ((depth + 2) * UNIT) ** 2, 4 * length * 2.0**-1074
    elif pairwise:
        factor = (3 * PAIR_PRODUCTS + 6) * 2.0**-48 + (depth + 2) * UNIT
        underflow = 4 * length * 2.0**-149
    else:
        factor, underflow = (depth + 2) * UNIT, 0.0
    return Sums(sums, norms, exact, factor, underflow)


def specialisation(stem: str, tile: Tile) -> Specialisation:
    """`tile_sums` of a source, which sets the macros of the other itself."""
    options = {"METRIC": tile.metric}
    if stem == "gram":
        options = {"WEIGHTED": tile.weighted, "SYMMETRIC": tile.symmetric}
    options["PAIRS"] = tile.pairs
    return ragged.specialisation("tile_sums", tile.dtype, TILE=tile.rows, **options)


def finish_specialisation(stem: str, exact: bool, symmetric: bool = False) -> Specialisation:
    """The kernel that adds the stretches: for plain sums or compensated ones."""
    dtype = torch.float64 if exact else torch.float32
    tile = Tile(4, dtype, symmetric=symmetric)
    return replace(specialisation(stem, tile), entry="finish")


def specialisations(stem: str) -> tuple[Specialisation, ...]:
    """All that a source is asked for."""
    gram, no, both = stem == "gram", (False,), (False, True)
    symmetric = both if gram else no
    tiles = dict.fromkeys(
        Tile.of(m, dtype, *options)
        for *options, dtype, m in product(
            no if gram else both, symmetric, symmetric, both, ragged.ELEMENT, (2, 4, 8, 16, 32)
        )
        if not options[-1] or (dtype != torch.float64 and not options[1])
    )
    return (
        *(specialisation(stem, tile) for tile in tiles),
        *(finish_specialisation(stem, *of) for of in product(both, symmetric)),
    )
