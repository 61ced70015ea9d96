"""The symplectic 2-form in CUDA C++: Ω = G − Gᵀ with G = DQ DPᵀ, sums in fp64 on its tensor cores,
or for fp64 elements compensated. One launch for all tiles, one that adds the stretches of columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..tables import device_table, on_device, prefix
from . import ragged
from .compiler import Specialisation
from .ragged import run

STEM = "two_form"
UNIT = 2.0**-53  # fp64 unit roundoff
BLOCKS = 4096  # aimed at; no property of the device, so that no bit of a result depends on it
FLUSH = 512  # columns that one accumulator of the tensor cores takes in


class Tile(NamedTuple):
    """How `tile_sums` is cut, as the source has it."""

    rows: int  # the macro TILE
    metric: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, m: int, metric: bool, dtype: torch.dtype) -> Tile:
        if dtype == torch.float64:
            return cls(2 if metric or m <= 2 else 4, metric, dtype)
        most = 32 if dtype == torch.float32 and not metric else 16
        return cls(next(rows for rows in (4, 8, 16, most) if rows >= min(m, most)), metric, dtype)

    @property
    def exact(self) -> bool:
        return self.dtype == torch.float64

    @property
    def columns(self) -> int:
        """Of a unit, the least that a warp takes."""
        if self.exact:
            return 32 if self.metric else 64
        lanes = 4 * 16 // self.dtype.itemsize
        if self.rows >= 16:
            return lanes
        return lanes * (2 if self.metric else 4) * (8 // self.rows)

    def split(self, m: int) -> int:
        """A block has split × split tiles, whose warps share rows through the L1 cache."""
        return 2 if m > self.rows else 1

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        forms = 2 if self.metric else 1
        sums = 2 * self.rows**2 if self.exact else 64 * max(1, self.rows // 8) ** 2
        return ragged.THREADS // 32 * 8 * (forms * sums + 2 * self.rows)

    @property
    def specialisation(self) -> Specialisation:
        return ragged.specialisation("tile_sums", self.dtype, TILE=self.rows, METRIC=self.metric)


def finish_specialisation(exact: bool) -> Specialisation:
    """The kernel that adds the stretches: for plain sums or compensated ones."""
    dtype = torch.float64 if exact else torch.float32
    return ragged.specialisation("finish", dtype, TILE=4, METRIC=False)


SPECIALISATIONS = (
    *dict.fromkeys(
        Tile.of(m, metric, dtype).specialisation
        for dtype in ragged.ELEMENT
        for metric in (False, True)
        for m in (2, 4, 8, 16, 32)
    ),
    *map(finish_specialisation, (False, True)),
)


def two_form(
    dq: list[Tensor], dp: list[Tensor], metric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ω_ij = Σ_a dq_ia dp_ja − dp_ia dq_ja, its bound, and S_ij = Σ_a dq_ia dq_ja + dp_ia dp_ja.

    dq, dp: lists of contiguous [m, N_t], any float dtype; where one is fp64 the others are copied
    to it. Returns Ω [m, m], bound [m, m], S [m, m] or None, all fp64.

    The bound. Let a term of Ω_ij pass through at most h additions before the last kernel, u = 2⁻⁵³,
    Σ|x| ≤ ‖dq_i‖‖dp_j‖ + ‖dp_i‖‖dq_j‖ the sum of the terms. Up to fp32: products are exact, so
    these additions lose at most ((1 + u)ʰ − 1) Σ|x|. The last kernel adds the stretches with
    TwoSum: beside u|Ω| for its last rounding it loses terms of order u² only. For fp64 elements
    every sum is compensated, and with h additions in all 4(h + 2)²u² Σ|x| is left. As in Triton's
    `two_form`, which has the proof, the factors leave room for the rounding of the norms.
    """
    if any(t.dtype == torch.float64 for t in dq):
        dq, dp = [t.double() for t in dq], [t.double() for t in dp]
    m, device = dq[0].shape[0], dq[0].device
    groups: dict[torch.dtype, list[tuple[int, int, int]]] = {}
    for q_t, p_t in zip(dq, dp, strict=True):
        if q_t.numel():
            row = (q_t.data_ptr(), p_t.data_ptr(), q_t.shape[1])
            groups.setdefault(q_t.dtype, []).append(row)

    launches = []
    stretches = depth = 0
    for dtype, items in groups.items():
        tile = Tile.of(m, metric, dtype)
        split = tile.split(m)
        across = -(-m // (split * tile.rows))
        streams = ragged.THREADS // 32 // split**2
        starts = prefix([-(-row[2] // tile.columns) for row in items])
        stretch = max(4 * streams, -(-starts[-1] // max(1, BLOCKS // across**2)))
        launches.append((tile, split, across**2, items, starts, stretch, stretches))
        stretches += -(-starts[-1] // stretch)
        units = -(-stretch // streams)  # of a warp at most
        # 17: the sum of warps and of halves; 37: the sum of lanes and of warps, the last kernel's.
        if tile.exact:
            depth = max(depth, units * tile.columns // 32 + 37)
        else:
            columns = units * tile.columns
            depth = max(depth, min(FLUSH, columns) + -(-columns // FLUSH) + 17)
    exact = torch.float64 in groups
    length = sum(row[2] for items in groups.values() for row in items)

    def new(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float64, device=device)

    sums = new(1 + metric, m, m, 1 + exact, stretches)
    norms = new(2, m, stretches)
    omega, bound = new(m, m), new(m, m)
    gram = new(m, m) if metric else None
    with on_device(device):
        for tile, split, pairs, items, starts, stretch, first in launches:
            rows = (*zip(*items, strict=True), tuple(starts))
            sizes = [len(items), m, split, starts[-1], stretch, first, stretches]
            args = [device_table(rows, device), *sizes, sums, norms]
            blocks = pairs * -(-starts[-1] // stretch)
            run(STEM, tile.specialisation, blocks, args, device, tile.shared_bytes)
        if exact:
            depth += -(-stretches // 32)
            factor, underflow = 4 * ((depth + 2) * UNIT) ** 2, 4 * length * 2.0**-1074
        else:
            factor, underflow = (depth + 2) * UNIT, 0.0
        args = [sums, norms, m, stretches, factor, underflow, omega, bound, gram]
        run(STEM, finish_specialisation(exact), m, args, device)
    return omega, bound, gram
