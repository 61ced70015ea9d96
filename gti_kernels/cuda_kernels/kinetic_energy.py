"""Kinetic energy in CUDA C++: one read of p, fp64 sums of chunks, one more launch to add them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tables import device_table, elementwise_groups, on_device
from . import ragged
from .compiler import Specialisation
from .ragged import run

STEM = "kinetic_energy"
SUM_THREADS = 1024  # of the one block that adds what blocks have summed


def specialisation(dtype: torch.dtype, mass: bool) -> Specialisation:
    """The kernel for one dtype, M⁻¹ a tensor or a number."""
    return ragged.specialisation(STEM, dtype, MASS=mass)


def sum_specialisation() -> Specialisation:
    """The kernel of `fixed_sum`: of no dtype, but the source asks for one."""
    return Specialisation("sum", (("ELEMENT", 0), ("MASS", 0), ("THREADS", SUM_THREADS)))


SPECIALISATIONS = (
    *(specialisation(dtype, mass) for dtype in ragged.ELEMENT for mass in (False, True)),
    sum_specialisation(),
)


def kinetic_energy(p: list[Tensor], inv_mass: Sequence[float] | list[Tensor]) -> Tensor:
    """K = ½ Σ_t Σ_i (M⁻¹)_{t,i} p_{t,i}², a 0-d fp64 tensor.

    p: L tensors of any shape and float dtype; inv_mass: L floats, or L tensors shaped like p.
    """
    device = p[0].device if p else torch.device("cpu")
    groups = elementwise_groups([p, inv_mass], ragged.chunk())
    partials = torch.empty(sum(g.blocks for g in groups), dtype=torch.float64, device=device)
    first = 0
    with on_device(device):
        for g in groups:
            dtype, mass = g.dtypes
            assert dtype is not None
            out = partials[first : first + g.blocks]
            args = [device_table(g.rows, device), g.items, out]
            run(STEM, specialisation(dtype, mass is not None), g.blocks, args, device)
            first += g.blocks
        return fixed_sum(partials)


def fixed_sum(x: Tensor) -> Tensor:
    """Σ x of fp64 [count] as a 0-d tensor: the same bits for the same numbers."""
    if x.numel() <= 1:
        return x.sum()
    out = x.new_empty(())
    run(STEM, sum_specialisation(), 1, [x, x.numel(), out], x.device)
    return out
