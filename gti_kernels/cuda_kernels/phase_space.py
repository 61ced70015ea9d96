"""The steps of a plan in CUDA C++: mixed dtypes, stochastic rounding, and the grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..device_plans import Launch
from . import ragged
from .compiler import Specialisation
from .kinetic_energy import fixed_sum as fixed_sum
from .ragged import Factor, factor, run

STEM = "phase_space"


def chunk() -> int:
    """Elements of a block."""
    return ragged.chunk()


def phase_kind(q: torch.dtype, p: torch.dtype, mass: bool) -> Specialisation:
    """The step for parameters and momenta of these dtypes. mass: M⁻¹ is a tensor, which the kernel
    sees by itself."""
    return ragged.specialisation("phase_step", q, MOMENTUM=ragged.ELEMENT[p])


def grid_kind(q: torch.dtype, mass: bool) -> Specialisation:
    """The step on the grid: without momenta, but the source asks for a dtype."""
    return ragged.specialisation("grid_step", q, MOMENTUM=0)


SPECIALISATIONS = (
    *(phase_kind(q, p, False) for q in ragged.ELEMENT for p in (torch.float64, torch.float32)),
    *(grid_kind(q, False) for q in ragged.ELEMENT),
)


def factors(numbers: tuple[Factor, ...], device: torch.device) -> list[Any]:
    """Kick, damp and drift as `phase_step` takes them."""
    return [y for x in numbers for y in factor(x)]


def phase_step(
    launch: Launch, factors: list[Any], key: int, counted: Tensor, partials: Tensor
) -> None:
    """`reference.phase_space.phase_step`, to the bit, with `counted` added to the key; partials:
    energies of chunks, written where it drifts."""
    _run(launch, [*factors, key, counted, partials])


def grid_step(
    launch: Launch,
    numbers: tuple[float, float, float, Tensor | None],
    sign: int,
    partials: Tensor,
    checksums: Tensor,
    outside: Tensor,
) -> None:
    """`reference.phase_space.grid_step`, to the bit. numbers: kick, drift, s of all and, where they
    differ, of each tensor; sign: 0, or −1 for the way back; the rest: results of chunks."""
    _run(launch, [*numbers, sign, partials, checksums, outside])


def _run(launch: Launch, args: list[Any]) -> None:
    items, blocks = (x.stop - x.start for x in (launch.items, launch.blocks))
    args = [launch.table, items, launch.qs, launch.gs, *args]
    run(STEM, launch.kind, blocks, args, launch.table.device)
