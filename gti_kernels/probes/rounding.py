"""What rounding alone explains: stored roundings as a random walk."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .hamiltonian_system import HamiltonianSystem, State


def walk(dtype: torch.dtype, roundings: int) -> float:
    """u √n, u = eps / 2: the relative size of n independent roundings of one number.

    It leaves out what the dynamics amplify: an estimate, no bound.
    """
    return torch.finfo(dtype).eps / 2 * math.sqrt(roundings)


def coarsest(tensors: list[Tensor]) -> torch.dtype:
    """The dtype with the largest eps among the tensors."""
    return max((x.dtype for x in tensors), key=lambda dtype: torch.finfo(dtype).eps)


def energy_change(system: HamiltonianSystem, state: State, size: float, draws: int = 4) -> float:
    """rms of H(z + ξ) − H(z), ξ_i = ±size·z_i at random, plus the rounding of two fp64 H."""
    wide = state.copy(torch.float64)
    energy = system.energy(wide)
    generator = torch.Generator().manual_seed(system.seed)

    def shaken(x: Tensor) -> Tensor:
        bits = torch.randint(0, 2, x.shape, generator=generator, dtype=torch.int8, device="cpu")
        return x * (1 + size * (bits * 2 - 1).to(x.device))

    changes = [
        system.energy(State([shaken(q) for q in wide.q], [shaken(p) for p in wide.p], wide.b))
        - energy
        for _ in range(draws)
    ]
    rms = math.sqrt(sum(change * change for change in changes) / draws)
    return rms + walk(torch.float64, 2) * abs(energy)
