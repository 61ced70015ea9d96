"""Kick and drift in plain torch: one rounding per stored element, as the fused kernels do it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..conventions import compute_dtype
from .kinetic_energy import kinetic_energy

InvMass = Sequence[float | Tensor]
Factor = float | Tensor


def _wide(t: Tensor) -> Tensor:
    return t.to(compute_dtype(t.dtype))


def kick_(p: list[Tensor], grad: list[Tensor], step: Factor, damp: Factor) -> None:
    """p ← damp·p − step·grad, in place, for every tensor of the list."""
    for p_t, g_t in zip(p, grad, strict=True):
        p_t.copy_(damp * _wide(p_t) - step * _wide(g_t))


def drift_(q: list[Tensor], p: list[Tensor], step: Factor, inv_mass: InvMass) -> None:
    """q ← q + step·M⁻¹p, in place, for every tensor of the list."""
    for q_t, p_t, w_t in zip(q, p, inv_mass, strict=True):
        scale = step * _wide(w_t) if isinstance(w_t, Tensor) else step * w_t
        q_t.copy_(_wide(q_t) + scale * _wide(p_t))


def kick_drift_(
    q: list[Tensor],
    p: list[Tensor],
    grad: list[Tensor],
    kick: Factor,
    drift: Factor,
    inv_mass: InvMass,
    damp: Factor,
) -> Tensor:
    """p ← damp·p − kick·grad, then q ← q + drift·M⁻¹p with that p; returns ½ pᵀM⁻¹p of it
    (fp64)."""
    kick_(p, grad, kick, damp)
    drift_(q, p, drift, inv_mass)
    return kinetic_energy(p, inv_mass)
