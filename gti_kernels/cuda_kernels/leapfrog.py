"""Kick and drift in CUDA C++: any list in one pass over memory, the energy from the same pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tables import device_table, elementwise_groups, on_device
from . import ragged
from .compiler import Specialisation
from .kinetic_energy import fixed_sum
from .ragged import Factor, factor, run

STEM = "leapfrog"
InvMass = Sequence[float] | list[Tensor]


def specialisation(dtype: torch.dtype, kick: bool, drift: bool, mass: bool) -> Specialisation:
    """The kernel for one dtype, the steps it takes, M⁻¹ a tensor or a number."""
    return ragged.specialisation(STEM, dtype, KICK=kick, DRIFT=drift, MASS=mass)


STEPS = ((True, False, False), *((kick, True, m) for kick in (False, True) for m in (False, True)))
SPECIALISATIONS = tuple(
    specialisation(dtype, *steps) for dtype in ragged.ELEMENT for steps in STEPS
)


def kick_(p: list[Tensor], grad: list[Tensor], step: Factor, damp: Factor) -> None:
    """p ← damp·p − step·grad, in place, for every tensor of the list."""
    unread = [1.0] * len(p)
    _launch(p, unread, grad, unread, step, 0.0, damp)


def drift_(q: list[Tensor], p: list[Tensor], step: Factor, inv_mass: InvMass) -> None:
    """q ← q + step·M⁻¹p, in place, for every tensor of the list."""
    _launch(p, q, [1.0] * len(p), inv_mass, 0.0, step, 1.0)


def kick_drift_(
    q: list[Tensor],
    p: list[Tensor],
    grad: list[Tensor],
    kick: Factor,
    drift: Factor,
    inv_mass: InvMass,
    damp: Factor,
) -> Tensor:
    """p ← damp·p − kick·grad, then q ← q + drift·M⁻¹p with that p; returns its ½ pᵀM⁻¹p (fp64)."""
    partials = _launch(p, q, grad, inv_mass, kick, drift, damp)
    with on_device(partials.device):
        return fixed_sum(partials)


def _launch(
    p: list[Tensor],
    q: Sequence[Tensor | float],  # numbers where q, or grad, takes no part
    grad: Sequence[Tensor | float],
    inv_mass: Sequence[Tensor | float],
    kick: Factor,
    drift: Factor,
    damp: Factor,
) -> Tensor:
    """One launch per combination of dtypes; returns the energies of chunks [blocks]."""
    device = p[0].device if p else torch.device("cpu")
    groups = elementwise_groups([p, q, grad, inv_mass], ragged.chunk())
    partials = torch.empty(sum(g.blocks for g in groups), dtype=torch.float64, device=device)
    factors = [*factor(kick), *factor(drift), *factor(damp)]
    first = 0
    with on_device(device):
        for g in groups:
            dtype, *others = g.dtypes
            assert dtype is not None
            moved, kicked, mass = (other is not None for other in others)
            out = partials[first : first + g.blocks]
            args = [device_table(g.rows, device), g.items, *factors, out]
            run(STEM, specialisation(dtype, kicked, moved, mass), g.blocks, args, device)
            first += g.blocks
    return partials
