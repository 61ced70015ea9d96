"""The steps of a plan in CUDA C++: mixed dtypes, stochastic rounding, and the grid."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.phase_space import signed
from ..tables import Upload, fp64_bits, on_device, prefix, upload
from . import ragged
from .compiler import Specialisation
from .kinetic_energy import fixed_sum
from .ragged import run

STEM = "phase_space"
Grads = Sequence[Tensor | None]
Row = Sequence[int]


def phase_specialisation(q: torch.dtype, p: torch.dtype) -> Specialisation:
    """The step for parameters and momenta of these dtypes."""
    return ragged.specialisation("phase_step", q, MOMENTUM=ragged.ELEMENT[p])


def grid_specialisation(q: torch.dtype) -> Specialisation:
    """The step on the grid; the source asks for a momentum too."""
    return ragged.specialisation("grid_step", q, MOMENTUM=0)


SPECIALISATIONS = (
    *(phase_specialisation(q, p) for q in ragged.ELEMENT for p in (torch.float64, torch.float32)),
    *(grid_specialisation(q) for q in ragged.ELEMENT),
)


class Plan:
    """The steps of one plan: `phase_step` and `grid_step` as in `reference.phase_space`, to the bit
    (but for the order of the energy's sum), for dense tensors.

    What a plan keeps in place (momenta, masses, the grid) goes into a table on the device at the
    first step; every later call must have the same. Parameters and gradients may move: their
    addresses are uploaded where they are others than before. One launch per combination of dtypes.
    """

    def __init__(self) -> None:
        self._launches: list[_Launch] | None = None

    def phase_step(
        self,
        q: list[Tensor],
        p: list[Tensor],
        grad: Grads,
        inv_mass: Sequence[float | Tensor],
        kicks: bool,
        drifts: bool,
        kick: float | Tensor,
        damp: float | Tensor,
        drift: float | Tensor,
        key: int,
    ) -> Tensor:
        """kick, damp and drift may be 0-d tensors on the device, which are read there."""
        device = q[0].device if q else torch.device("cpu")
        if self._launches is None:
            kinds = [phase_specialisation(x.dtype, y.dtype) for x, y in zip(q, p, strict=True)]
            rows = [_addresses(p), *_masses(inv_mass), range(len(q))]
            self._launches = _launches(kinds, rows, q, device)
        partials = _empty(self._launches, torch.float64, device)
        with on_device(device):
            factors = [y for x in (kick, damp, drift) for y in _factor(x)]
            for each in self._launches:
                moving = each.moving(q if drifts else None, grad if kicks else None)
                each.run([*moving, *factors, signed(key), None, each.of(partials)])
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
        kicks: bool,
        drifts: bool,
        back: bool,
        kick: float,
        drift: float,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The checksum and whether all stayed inside are on the device, for who wants to wait."""
        device = q[0].device if q else torch.device("cpu")
        if self._launches is None:
            units = [unit_q, [1 / v for v in unit_p], [v / u for u, v in zip(unit_q, unit_p)]]
            rows = [_addresses(P), _addresses(Q), _addresses(remainder), *_masses(inv_mass)]
            rows += [list(map(fp64_bits, unit)) for unit in units]
            rows += [prefix([x.numel() for x in q])[:-1]]
            kinds = [grid_specialisation(x.dtype) for x in q]
            self._launches = _launches(kinds, rows, q, device)
        partials = _empty(self._launches, torch.float64, device)
        checksums = _empty(self._launches, torch.int64, device)
        outside = _empty(self._launches, torch.int64, device)
        with on_device(device):
            for each in self._launches:
                moving = each.moving(q if drifts else None, grad if kicks else None)
                results = [each.of(x) for x in (partials, checksums, outside)]
                each.run([*moving, kick, drift, scale, -1 if back else 0, *results])
            energy = fixed_sum(partials) if drifts else partials.new_zeros(())
            return checksums.sum(), ~outside.any(), energy


class _Launch:
    """The tensors of a plan that one launch takes, and their table."""

    def __init__(
        self,
        kernel: Specialisation,
        rows: list[Row],
        index: list[int],
        blocks: slice,
        device: torch.device,
    ) -> None:
        self._kernel, self._index, self._blocks, self._device = kernel, index, blocks, device
        self._table = Upload(rows, device)
        self._moving: dict[str, tuple[Row, Upload]] = {}

    def of(self, partials: Tensor) -> Tensor:
        """The part of the results of all blocks that is this launch's."""
        return partials[self._blocks]

    def moving(self, q: Sequence[Tensor] | None, grad: Grads | None) -> list[Tensor | None]:
        """The addresses of this step on the device; None for a list that takes no part."""
        return [self._uploaded("q", q), self._uploaded("grad", grad)]

    def _uploaded(self, name: str, xs: Grads | None) -> Tensor | None:
        if xs is None:
            return None
        row = tuple(_addresses([xs[i] for i in self._index]))
        known = self._moving.get(name)
        if known is None or known[0] != row:
            known = self._moving[name] = row, upload((row,), self._device)
        return known[1].table()

    def run(self, args: list[Any]) -> None:
        blocks = self._blocks.stop - self._blocks.start
        args = [self._table.table(), len(self._index), *args]
        run(STEM, self._kernel, blocks, args, self._device)


def _launches(
    kinds: Sequence[Specialisation], rows: Sequence[Row], q: list[Tensor], device: torch.device
) -> list[_Launch]:
    """One for each kind. Empty tensors are left out."""
    found: dict[Hashable, list[int]] = {}
    for i, (kind, x) in enumerate(zip(kinds, q, strict=True)):
        if x.numel():
            found.setdefault(kind, []).append(i)
    out, first = [], 0
    for index in found.values():
        counts = [q[i].numel() for i in index]
        starts = prefix([-(-n // ragged.chunk()) for n in counts])
        table = [*([row[i] for i in index] for row in rows), counts, starts]
        blocks = slice(first, first + starts[-1])
        out.append(_Launch(kinds[index[0]], table, index, blocks, device))
        first = blocks.stop
    return out


def _empty(launches: list[_Launch], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number for each block."""
    return torch.empty(launches[-1]._blocks.stop if launches else 0, dtype=dtype, device=device)


def _addresses(xs: Sequence[Tensor | float | None]) -> list[int]:
    """0 where there is no tensor."""
    return [x.data_ptr() if isinstance(x, Tensor) else 0 for x in xs]


def _masses(inv_mass: Sequence[float | Tensor]) -> list[Row]:
    """Rows of addresses and of numbers."""
    numbers = [fp64_bits(1.0 if isinstance(w, Tensor) else w) for w in inv_mass]
    return [_addresses(inv_mass), numbers]


def _factor(x: float | Tensor) -> tuple[float, Tensor | None]:
    return ragged.factor(x.to(torch.float64) if isinstance(x, Tensor) else x)
