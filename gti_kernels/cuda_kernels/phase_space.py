"""The steps of a plan in CUDA C++: mixed dtypes, stochastic rounding, and the grid."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.phase_space import STEP_KEY, signed
from ..tables import Upload, capturing, fp64_bits, on_device, prefix, upload
from . import ragged
from .compiler import Specialisation
from .kinetic_energy import fixed_sum
from .ragged import Factor, factor, run

STEM = "phase_space"
Grads = Sequence[Tensor | None]
Row = Sequence[int]


def phase_specialisation(q: torch.dtype, p: torch.dtype) -> Specialisation:
    """The step for parameters and momenta of these dtypes."""
    return ragged.specialisation("phase_step", q, MOMENTUM=ragged.ELEMENT[p])


def grid_specialisation(q: torch.dtype) -> Specialisation:
    """The step on the grid: without momenta, but the source asks for a dtype."""
    return ragged.specialisation("grid_step", q, MOMENTUM=0)


SPECIALISATIONS = (
    *(phase_specialisation(q, p) for q in ragged.ELEMENT for p in (torch.float64, torch.float32)),
    *(grid_specialisation(q) for q in ragged.ELEMENT),
)


class Plan:
    """The steps of one plan of dense tensors: `phase_step` or `grid_step` of
    `reference.phase_space`, to the bit (but for the order of the energy's sum). One launch per
    combination of dtypes.

    At the first step a table of all that stays where it is (momenta, masses, the grid) goes to the
    device; a later step returns None, with nothing touched, where any of it has moved. Parameters
    and gradients may move: a row of their addresses is uploaded where it is another than before.

    In a CUDA graph each replay rounds with other random bits, those of as many steps one by one.
    """

    def __init__(self) -> None:
        self._places: list[int] | None = None  # of what stays
        self._launches: list[_Launch] = []

    def phase_step(
        self,
        q: list[Tensor],
        p: list[Tensor],
        grad: Grads,
        inv_mass: Sequence[float | Tensor],
        kicks: bool,
        drifts: bool,
        kick: Factor,
        damp: Factor,
        drift: Factor,
        key: int,
        skipped: Collection[int] = (),
    ) -> Tensor | None:
        """kick, damp and drift may be 0-d tensors on the device, which are read there."""
        if self._places is None:
            kinds = [phase_specialisation(x.dtype, y.dtype) for x, y in zip(q, p, strict=True)]
            table: list[Row] = [_addresses(p), *_masses(inv_mass), range(len(q))]
            self._prepare(q, [*p, *inv_mass], kinds, table)
        elif self._has_moved():
            return None
        partials = self._new(torch.float64)
        qs, gs = _moving(q, drifts, skipped), _moving(grad, kicks, skipped)
        with on_device(self._device):
            factors = [y for x in (kick, damp, drift) for y in factor(x)]
            moving = [(each.row("q", qs), each.row("grad", gs)) for each in self._launches]
            replayed = None
            if drifts and capturing(self._device):
                # The key is that of the first replay; the device counts on.
                replayed, key = self._replayed, key - self._captured * STEP_KEY
                self._captured += 1
            for each, rows in zip(self._launches, moving):
                each.run([*rows, *factors, signed(key), replayed, each.of(partials)])
            if replayed is not None:
                replayed.add_(signed(STEP_KEY))
            return fixed_sum(partials) if drifts else partials.new_zeros(())

    def grid_step(
        self,
        q: list[Tensor],
        remainder: Sequence[Tensor | None],
        Q: list[Tensor],
        P: list[Tensor],
        grad: Grads,
        inv_mass: Sequence[float | Tensor],
        unit_q: Sequence[float],
        unit_p: Sequence[float],
        scale: Sequence[float],
        kicks: bool,
        drifts: bool,
        back: bool,
        kick: float,
        drift: float,
        skipped: Collection[int] = (),
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The checksum and whether all stayed inside are on the device, for who wants to wait."""
        if self._places is None:
            units = [unit_q, [1 / v for v in unit_p], [v / u for u, v in zip(unit_q, unit_p)]]
            table = [_addresses(P), _addresses(Q), _addresses(remainder), *_masses(inv_mass)]
            table += [[fp64_bits(x) for x in unit] for unit in units]
            table += [prefix([x.numel() for x in q])[:-1]]
            kinds = [grid_specialisation(x.dtype) for x in q]
            self._prepare(q, [*P, *Q, *remainder, *inv_mass], kinds, table)
        elif self._has_moved():
            return None
        partials, checksums, outside = map(self._new, (torch.float64, torch.int64, torch.int64))
        qs, gs = _moving(q, drifts, skipped), _moving(grad, kicks, skipped)
        scales = [fp64_bits(s) for s in scale] if len(set(scale)) > 1 else None
        with on_device(self._device):
            sign = -1 if back else 0
            moving = [
                (each.row("q", qs), each.row("grad", gs), each.row("scale", scales))
                for each in self._launches
            ]
            for each, (*rows, own) in zip(self._launches, moving):
                results = map(each.of, (partials, checksums, outside))
                each.run([*rows, kick, drift, scale[0], own, sign, *results])
            energy = fixed_sum(partials) if drifts else partials.new_zeros(())
            return checksums.sum(), ~outside.any(), energy

    def _prepare(
        self,
        q: list[Tensor],
        fixed: Sequence[Tensor | float | None],
        kinds: Sequence[Specialisation],
        table: Sequence[Row],
    ) -> None:
        """Groups the tensors by kernel, without those that are empty, and uploads their tables."""
        self._device = q[0].device if q else torch.device("cpu")
        groups: dict[Specialisation, list[int]] = {}
        for i, (kind, x) in enumerate(zip(kinds, q, strict=True)):
            if x.numel():
                groups.setdefault(kind, []).append(i)
        launches, first = [], 0
        for kind, index in groups.items():
            counts = [q[i].numel() for i in index]
            starts = prefix([-(-n // ragged.chunk()) for n in counts])
            mine = [*([row[i] for i in index] for row in table), counts, starts]
            blocks = slice(first, first + starts[-1])
            launches.append(_Launch(kind, index, Upload(mine, self._device), blocks))
            first += starts[-1]
        self._replayed = torch.zeros((), dtype=torch.int64, device=self._device)
        self._captured = 0
        self._launches, self._blocks = launches, first
        self._fixed = [x for x in fixed if isinstance(x, Tensor)]
        self._places = _addresses(self._fixed)  # last: an upload may fail

    def _has_moved(self) -> bool:
        return [x.data_ptr() for x in self._fixed] != self._places

    def _new(self, dtype: torch.dtype) -> Tensor:
        """A number for each block of all launches."""
        return torch.empty(self._blocks, dtype=dtype, device=self._device)


class _Launch:
    """The tensors of a plan that share a kernel."""

    def __init__(
        self, kernel: Specialisation, index: list[int], table: Upload, blocks: slice
    ) -> None:
        self._kernel, self._index, self._table, self._blocks = kernel, index, table, blocks
        self._rows: dict[str, tuple[Row, Upload]] = {}

    def of(self, results: Tensor) -> Tensor:
        """Those of this launch, of the results of all blocks."""
        return results[self._blocks]

    def row(self, name: str, numbers: list[int] | None) -> Tensor | None:
        """Those of its tensors on the device, of one for each tensor of the plan."""
        if numbers is None:
            return None
        row = tuple([numbers[i] for i in self._index])
        known = self._rows.get(name)
        if known is None or known[0] != row:
            known = self._rows[name] = row, upload((row,), self._table.device)
        return known[1].table()

    def run(self, args: list[Any]) -> None:
        blocks = self._blocks.stop - self._blocks.start
        args = [self._table.table(), len(self._index), *args]
        run(STEM, self._kernel, blocks, args, self._table.device)


def _addresses(xs: Sequence[Tensor | float | None]) -> list[int]:
    """0 where there is no tensor."""
    return [x.data_ptr() if isinstance(x, Tensor) else 0 for x in xs]


def _moving(xs: Grads, takes_part: bool, skipped: Collection[int]) -> list[int] | None:
    """Addresses of this step, 0 for a tensor that is skipped; None where the list takes no part."""
    if not takes_part:
        return None
    if not skipped:
        return [x.data_ptr() for x in xs]  # type: ignore[union-attr]
    return [0 if i in skipped else x.data_ptr() for i, x in enumerate(xs)]  # type: ignore[union-attr]


def _masses(inv_mass: Sequence[float | Tensor]) -> list[Row]:
    """A row of addresses and one of numbers."""
    numbers = [fp64_bits(1.0 if isinstance(w, Tensor) else w) for w in inv_mass]
    return [_addresses(inv_mass), numbers]
