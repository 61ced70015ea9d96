"""Kinetic energy of a list of momenta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, get_num_threads, is_grad_enabled

from .. import backends
from ..reference import kinetic_energy as reference
from .arguments import (
    InvMass,
    check_alike,
    check_float_tensors,
    inv_mass_list,
    tensor_list,
    unlike_layouts,
)
from .library import is_plain_eager, refuse_derivative, register


def kinetic_energy(
    p: Tensor | Sequence[Tensor], *, inv_mass: InvMass = 1.0, backend: str = "auto"
) -> Tensor:
    """K = ½ pᵀM⁻¹p = ½ Σ_t Σ_i (M⁻¹)_{t,i} p_{t,i}², summed in fp64.

    Args:
        p: momenta, a tensor or a list of L tensors of any shape; fp64, fp32, bf16 or fp16, one
            device; a list may mix dtypes.
        inv_mass: M⁻¹, the diagonal: a float, one float per tensor, or tensors of the shape and
            dtype of p.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see `gti_kernels.explain`.

    Returns:
        0-d fp64 tensor on the device of p; 0 for an empty list. Terms are formed in fp64, so for
        fp32 and narrower p the relative error is that of the sum: at most 1e-12 for 10⁹ elements.

    Raises:
        TypeError, ValueError: the argument, what was expected and what came. RuntimeError: a
        derivative is wanted (there is none), or the named backend cannot run.

    >>> import torch, gti_kernels as gti
    >>> gti.kinetic_energy(torch.tensor([3.0, 4.0]), inv_mass=0.5)
    tensor(6.2500, dtype=torch.float64)
    """
    if is_plain_eager() and (energy := _on_cpu(p, inv_mass, backend)) is not None:
        return energy
    ps = tensor_list(p)
    mass = inv_mass_list("kinetic_energy", inv_mass, ps)
    refuse_derivative("kinetic_energy", [*ps, *mass], "Pass detached tensors")
    if is_plain_eager():
        return _kinetic_energy(ps, mass, [], backend)
    scalars, tensors = ([], mass) if mass and isinstance(mass[0], Tensor) else (mass, [])
    return torch.ops.gti_kernels.kinetic_energy(ps, scalars, tensors, backend)


def _on_cpu(p: Any, inv_mass: Any, backend: str) -> Tensor | None:
    """The energy, or None where the call is not for the compiled kernel or an argument is odd."""
    if backends.compiled is None or backend not in ("auto", "cpu"):
        return None
    recording, threads = is_grad_enabled(), get_num_threads()
    return backends.compiled.kinetic_energy(p, inv_mass, recording, threads)


def _kinetic_energy(
    p: list[Tensor], inv_mass: list[Any], inv_mass_tensors: list[Tensor], backend: str
) -> Tensor:
    mass = inv_mass_tensors or inv_mass
    with torch.no_grad():
        energy = _on_cpu(p, mass, backend)
    if energy is not None:
        return energy
    device, limits = limits_of_kinetic_energy(p, inv_mass=mass)
    chosen = backends.choose("kinetic_energy", device, backend, limits)
    if chosen == "cuda":
        from ..cuda_kernels import kinetic_energy as cuda

        return cuda.kinetic_energy(p, mass)
    if chosen == "triton":
        from ..triton_kernels import kinetic_energy as triton

        return triton.kinetic_energy(p, mass)
    return reference.kinetic_energy(p, mass)


def limits_of_kinetic_energy(
    p: Tensor | Sequence[Tensor], *, inv_mass: InvMass = 1.0
) -> tuple[torch.device, dict[str, str]]:
    """Checks the arguments; the device, and backend → why it cannot take these tensors."""
    ps = tensor_list(p)
    mass = inv_mass_list("kinetic_energy", inv_mass, ps)
    lists = {"p": ps}
    if mass and isinstance(mass[0], Tensor):
        lists["inv_mass"] = mass
    check_alike("kinetic_energy", **lists)
    layout = unlike_layouts(**lists)
    limits = {} if layout is None else dict.fromkeys(("cpu", "triton", "cuda"), layout)
    return (ps[0].device if ps else torch.device("cpu")), limits


def _fake(
    p: list[Tensor], inv_mass: list[float], inv_mass_tensors: list[Tensor], backend: str
) -> Tensor:
    check_float_tensors("kinetic_energy", p=p)
    return torch.empty((), dtype=torch.float64, device=p[0].device if p else None)


register(
    "kinetic_energy(Tensor[] p, float[] inv_mass, Tensor[] inv_mass_tensors, str backend) -> "
    "Tensor",
    _kinetic_energy,
    _fake,
)
