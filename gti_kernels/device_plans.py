"""The plans of a GPU, for kernels of CUDA C++ and of Triton: the calls and the bits of the compiled
plans of the CPU (python/phase_space.cpp).

What stays where it is (momenta, masses, the grid) goes to the device once, in a table for each
kernel of the list. Parameters and gradients may move: the compiled `Addresses` reads and checks
them, and they are uploaded where one is another than before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import backends
from .reference.phase_space import MASK, STEP_KEY, signed
from .tables import Upload, capturing, fp64_bits, on_device, prefix

Factor = float | Tensor
Row = Sequence[int]


@dataclass(frozen=True)
class Launch:
    """The tensors of a plan that share a kernel, at a step."""

    kind: Any  # which kernel, as its module names it
    blocks: slice  # of those of all launches
    table: Tensor  # int64 rows of what stays, then counts [items] and first blocks [items + 1]
    items: slice  # of the tensors of all launches
    qs: Tensor | None  # [items] addresses of the parameters, 0: skipped; None: no drift
    gs: Tensor | None  # of the gradients; None: no kick
    aligned: bool  # all addresses are multiples of 16 bytes


class _Plan:
    """kernels: a module with `chunk`, a kind for each combination of dtypes, a function that runs a
    `Launch`, and `fixed_sum`. addresses, numbers: rows of the tables, one entry for each tensor."""

    def __init__(
        self,
        kernels: ModuleType,
        params: list[Tensor],
        owned: list[Tensor],
        kinds: Sequence[Any],
        addresses: Sequence[Row],
        numbers: Sequence[Row],
    ) -> None:
        self.kernels = kernels
        self.device = params[0].device if params else torch.device("cpu")
        known: Any = Addresses if backends.compiled is None else backends.compiled.Addresses
        self._addresses = known(params, owned)
        groups: dict[Any, list[int]] = {}
        for i, (kind, q) in enumerate(zip(kinds, params, strict=True)):
            if q.numel():
                groups.setdefault(kind, []).append(i)
        self._groups: list[tuple[Any, Upload, slice, slice, bool]] = []
        self._order: list[int] = []
        self._blocks = 0
        for kind, index in groups.items():
            counts = [params[i].numel() for i in index]
            starts = prefix([-(-n // kernels.chunk()) for n in counts])
            fixed = [[row[i] for i in index] for row in addresses]
            others = [[row[i] for i in index] for row in numbers]
            items = slice(len(self._order), len(self._order) + len(index))
            blocks = slice(self._blocks, self._blocks + starts[-1])
            table = Upload([*fixed, *others, counts, starts], self.device)
            aligned = not any(a % 16 for row in fixed for a in row)
            self._groups.append((kind, table, items, blocks, aligned))
            self._order += index
            self._blocks = blocks.stop
        self._in_order = self._order == list(range(len(params)))
        self._version = -1  # of the addresses on the device
        self._launches: dict[tuple[bool, bool], list[Launch]] = {}  # on these, by kicks and drifts

    def ready(self) -> bool:
        """Whether a kick with the parameters' `.grad` can be."""
        return bool(self._addresses.ready())

    def skipped(self) -> tuple[int, ...]:
        """Places of the parameters that took no part in the last step."""
        return tuple(self._addresses.skipped())

    def _refreshed(
        self, grads: Any, skipped: tuple[int, ...], kicks: bool, drifts: bool
    ) -> list[Launch] | None:
        """None where the plan is not what it was or a gradient is odd."""
        if not self._addresses.refresh(grads, skipped, kicks, drifts):
            return None
        version = self._addresses.version()
        if version != self._version:
            rows = self._addresses.rows()
            rows = rows if self._in_order else rows[:, self._order]
            even = not bool((rows % 16).any())
            self._moving = Upload(rows, self.device)  # may fail; nothing has changed then
            self._version, self._even, self._launches = version, even, {}
        # Asked for at each step, whose stream may be another.
        moving, *tables = (x.table() for x in (self._moving, *(group[1] for group in self._groups)))
        found = self._launches.get((kicks, drifts))
        if found is None:
            qs, gs = moving.view(2, -1)
            found = self._launches[kicks, drifts] = [
                Launch(
                    kind,
                    blocks,
                    table,
                    items,
                    qs[items] if drifts else None,
                    gs[items] if kicks else None,
                    aligned and self._even,
                )
                for (kind, _, items, blocks, aligned), table in zip(self._groups, tables)
            ]
        return found

    def _new(self, dtype: torch.dtype) -> Tensor:
        """A number for each block of all launches."""
        return torch.empty(self._blocks, dtype=dtype, device=self.device)


class PhasePlan(_Plan):
    """`reference.phase_space.phase_step` of one list; the order of the energy's sum is another.

    In a CUDA graph each replay rounds with other random bits, those of as many steps one by one.
    """

    def __init__(
        self,
        kernels: ModuleType,
        params: list[Tensor],
        momenta: list[Tensor],
        inv_mass: Sequence[float | Tensor],
        owned: list[Tensor],
    ) -> None:
        kinds = [
            kernels.phase_kind(q.dtype, p.dtype, isinstance(w, Tensor))
            for q, p, w in zip(params, momenta, inv_mass, strict=True)
        ]
        addresses = [_addresses(momenta), _addresses(inv_mass)]
        super().__init__(
            kernels, params, owned, kinds, addresses, [_numbers(inv_mass), range(len(params))]
        )
        self._zero, self._replayed = torch.zeros(2, dtype=torch.int64, device=self.device)
        self._energy = torch.zeros((), dtype=torch.float64, device=self.device)
        self._captured = 0

    def step(
        self,
        grads: Any,
        skipped: tuple[int, ...],
        kicks: bool,
        drifts: bool,
        kick: Factor,
        damp: Factor,
        drift: Factor,
        key: int,
        threads: int = 1,
    ) -> Tensor | None:
        """The kinetic energy where it drifts; None, and nothing touched, where the plan is not what
        it was or a gradient is odd. Factors may be 0-d tensors on the device, read there."""
        with on_device(self.device):
            launches = self._refreshed(grads, skipped, kicks, drifts)
            if launches is None:
                return None
            partials, counted = self._new(torch.float64), self._zero
            if drifts and capturing(self.device):
                # The key is that of the first replay; the device counts on.
                counted, key = self._replayed, key - self._captured * STEP_KEY
                self._captured += 1
            factors = self.kernels.factors((kick, damp, drift), self.device)
            for launch in launches:
                mine = partials[launch.blocks]
                self.kernels.phase_step(launch, factors, signed(key), counted, mine)
            if counted is self._replayed:
                counted.add_(signed(STEP_KEY))
            return self.kernels.fixed_sum(partials) if drifts else self._energy


class GridPlan(_Plan):
    """`reference.phase_space.grid_step` of one list; the order of the energy's sum is another."""

    def __init__(
        self,
        kernels: ModuleType,
        params: list[Tensor],
        Q: list[Tensor],
        P: list[Tensor],
        remainders: Sequence[Tensor | None],
        inv_mass: Sequence[float | Tensor],
        owned: list[Tensor],
        unit_q: Sequence[float],
        unit_p: Sequence[float],
    ) -> None:
        kinds = [
            kernels.grid_kind(q.dtype, isinstance(w, Tensor))
            for q, w in zip(params, inv_mass, strict=True)
        ]
        addresses = [_addresses(xs) for xs in (P, Q, remainders, inv_mass)]
        units = [unit_q, [1 / v for v in unit_p], [v / u for u, v in zip(unit_q, unit_p)]]
        before = prefix([q.numel() for q in params])[:-1]
        numbers = [_numbers(inv_mass), *(_numbers(unit) for unit in units), before]
        super().__init__(kernels, params, owned, kinds, addresses, numbers)

    def step(
        self,
        grads: Any,
        skipped: tuple[int, ...],
        kicks: bool,
        drifts: bool,
        back: bool,
        kick: float,
        drift: float,
        scale: float,
        own: Mapping[int, float],
        threads: int = 1,
    ) -> tuple[int, bool, Tensor] | None:
        """Checksum, inside and energy; None, and nothing touched, where the plan is not what it was
        or a gradient is odd. Waits for the device, once: the host keeps the checksums.

        scale: s of all tensors but those in `own`, by place.
        """
        queued = self.enqueue(grads, skipped, kicks, drifts, back, kick, drift, scale, own)
        if queued is None:
            return None
        found, energy = queued
        checksum, outside = found.tolist()
        return checksum & MASK, not outside, energy

    def enqueue(
        self,
        grads: Any,
        skipped: tuple[int, ...],
        kicks: bool,
        drifts: bool,
        back: bool,
        kick: float,
        drift: float,
        scale: float,
        own: Mapping[int, float],
    ) -> tuple[Tensor, Tensor] | None:
        """As `step`, without waiting: the checksum and the number of blocks with a number outside
        of its limits, int64 [2]; the energy."""
        with on_device(self.device):
            launches = self._refreshed(grads, skipped, kicks, drifts)
            if launches is None:
                return None
            scales = None
            if own:
                each = [fp64_bits(own.get(i, scale)) for i in self._order]
                scales = Upload([each], self.device).table()
            partials, checksums, outside = map(self._new, (torch.float64, torch.int64, torch.int64))
            for launch in launches:
                own_scales = None if scales is None else scales[launch.items]
                self.kernels.grid_step(
                    launch,
                    (kick, drift, scale, own_scales),
                    -1 if back else 0,
                    *(x[launch.blocks] for x in (partials, checksums, outside)),
                )
            energy = self.kernels.fixed_sum(partials) if drifts else partials.new_zeros(())
            return torch.stack([checksums.sum(), outside.sum()]), energy


class Addresses:
    """`Addresses` of the compiled part where that is not built, for gradients that were checked."""

    def __init__(self, params: list[Tensor], owned: list[Tensor]) -> None:
        self._params, self._owned = params, owned
        self._places = _addresses(owned)
        self._rows = [[0] * len(params), [0] * len(params)]
        self._skipped: tuple[int, ...] = ()
        self._version = 0

    def refresh(
        self, grads: Sequence[Tensor | None], skipped: tuple[int, ...], kicks: bool, drifts: bool
    ) -> bool:
        if _addresses(self._owned) != self._places:
            return False
        if kicks:
            skipped = tuple([i for i, g in enumerate(grads) if g is None])
        rows, left_out = list(self._rows), set(skipped)
        for k, xs in enumerate((self._params if drifts else None, grads if kicks else None)):
            if xs is not None:
                rows[k] = [0 if i in left_out else a for i, a in enumerate(_addresses(xs))]
        self._version += rows != self._rows
        self._rows, self._skipped = rows, skipped
        return True

    def rows(self) -> Tensor:
        return torch.tensor(self._rows, dtype=torch.int64, device="cpu")

    def version(self) -> int:
        return self._version

    def skipped(self) -> tuple[int, ...]:
        return self._skipped


def _addresses(xs: Sequence[Tensor | float | None]) -> list[int]:
    """0 where there is no tensor."""
    return [x.data_ptr() if isinstance(x, Tensor) else 0 for x in xs]


def _numbers(xs: Sequence[float | Tensor]) -> list[int]:
    """The bits of numbers; of 1 where there is a tensor."""
    return [fp64_bits(1.0 if isinstance(x, Tensor) else x) for x in xs]
