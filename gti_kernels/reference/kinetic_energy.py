"""Kinetic energy in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kinetic_energy(p: list[Tensor], inv_mass: Sequence[float | Tensor]) -> Tensor:
    """K = ½ Σ_t Σ_i (M⁻¹)_{t,i} p_{t,i}², a 0-d fp64 tensor.

    p: L tensors of any shape and float dtype; inv_mass: L floats, or L tensors shaped like p.
    """
    total = torch.zeros((), dtype=torch.float64, device=p[0].device if p else None)
    for p_t, w_t in zip(p, inv_mass, strict=True):
        p64 = p_t.double()
        w64 = w_t.double() if isinstance(w_t, Tensor) else w_t
        total += 0.5 * (w64 * p64 * p64).sum()
    return total
