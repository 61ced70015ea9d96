"""Subspaces of phase space on which a map's derivative is looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.power_iteration_operator import power_iteration_operator
from .arguments import whole
from .hamiltonian_system import HamiltonianSystem, check_system
from .tangent_map import hessian_products

SUBSPACES = ("random", "gradient", "hessian")


def darboux_pairs(
    system: HamiltonianSystem,
    pairs: int = 4,
    subspace: str = "random",
    *,
    layer: str | None = None,
    draw: int = 0,
) -> tuple[list[Tensor], list[Tensor]]:
    """2k tangents (d_i, 0), (0, d_i) of k = `pairs` orthonormal directions d_i of R^N: Ω = J_{2k}.

    Args:
        subspace: "random" — of normal numbers, orthonormalised by QR in fp64. "gradient" — the
            gradients of batches 0…k−1 at the start, orthonormalised in this order, so that d_1 is
            the direction of ∇L_0. "hessian" — eigenvectors of the Hessian of L_0 at the start,
            those of the k largest |eigenvalues|, by `power_iteration_operator` (residual 1e-6, at
            most 1000 products) and one more product of 2k vectors, which tells λ from −λ. Where
            the k-th and the next |eigenvalue| are equal, and of a multiple eigenvalue, any of them.
        layer: name of a submodule of the model: directions within its parameters alone (shared
            ones too), and of the Hessian its block. None: all parameters.
        draw: number of the random draw, also of the iteration's start.

    Returns dq, dp: lists over parameters of [2k, *shape], fp64. ValueError, TypeError: arguments
    out of range, k above the number of parameters (or, for "gradient", of batches with
    independent gradients).

    >>> import torch, gti_kernels as gti
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    >>> batches = [(torch.randn(8, 3), torch.randn(8, 1))]
    >>> system = gti.HamiltonianSystem(model, torch.nn.functional.mse_loss, batches)
    >>> dq, dp = gti.darboux_pairs(system, pairs=2, layer="1")
    >>> [tuple(x.shape) for x in dq], bool(dq[0].any())
    ([(4, 4, 3), (4, 4), (4, 1, 4), (4, 1)], False)
    """
    check_system(system)
    pairs, draw = whole("pairs", pairs), whole("draw", draw, least=0)
    if subspace not in SUBSPACES:
        raise ValueError(f"subspace: expected one of {SUBSPACES}, got {subspace!r}")
    with system.session():
        return split_pairs(system, directions(system, pairs, subspace, layer, draw))


def directions(
    system: HamiltonianSystem, pairs: int, subspace: str, layer: str | None, draw: int
) -> Tensor:
    """[pairs, N] orthonormal rows, fp64, inside a session."""
    inside = _mask(system, layer)
    count = int(inside.sum())
    if pairs > count:
        where = f"N = {count}" if layer is None else f"the {count} parameters of {layer!r}"
        raise ValueError(f"pairs: expected at most {where} directions, got {pairs}")
    if subspace == "random":
        generator = torch.Generator().manual_seed(system.seed + 7919 * (draw + 1))
        noise = torch.randn(count, pairs, generator=generator, dtype=torch.float64, device="cpu")
        columns = torch.linalg.qr(noise)[0].to(system.device)
    elif subspace == "gradient":
        columns = _gradients(system, inside, pairs)
    else:
        columns = _eigenvectors(system, inside, pairs, draw)
    out = columns.new_zeros(pairs, system.size)
    out[:, inside] = columns.T
    return out


def split_pairs(system: HamiltonianSystem, d: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The 2k tangents (d_i, 0), (0, d_i) as lists over parameters; d: [k, N]."""
    zero = torch.zeros_like(d)
    return system.unflattened(torch.cat([d, zero])), system.unflattened(torch.cat([zero, d]))


def _mask(system: HamiltonianSystem, layer: str | None) -> Tensor:
    """[N], true for the parameters of `layer`."""
    modules = dict(system.model.named_modules(remove_duplicate=False))
    if layer is not None and (not isinstance(layer, str) or layer not in modules):
        raise ValueError(f"layer: expected the name of a submodule of the model, got {layer!r}")
    within = {id(q) for q in modules[layer or ""].parameters()}
    parts = [
        torch.full((q.numel(),), id(q) in within, dtype=torch.bool, device=system.device)
        for q in system.q
    ]
    return torch.cat(parts)


def _gradients(system: HamiltonianSystem, inside: Tensor, pairs: int) -> Tensor:
    if pairs > len(system.batches):
        raise ValueError(
            f"pairs: expected at most one gradient for each of the {len(system.batches)} batches, "
            f"got {pairs}"
        )
    rows = []
    for t in range(pairs):
        gradient = system.gradient(system.start(torch.float64), t)
        rows.append(torch.cat([g.flatten() for g in gradient])[inside])
    q, r = torch.linalg.qr(torch.stack(rows, dim=1))
    size = r.diagonal().abs()
    if not bool((size > 1e-10 * size.max()).all()):
        raise ValueError(
            f"pairs: expected {pairs} batches with independent gradients, got dependent or zero "
            f"ones"
        )
    return q * r.diagonal().sign()


def _eigenvectors(system: HamiltonianSystem, inside: Tensor, pairs: int, draw: int) -> Tensor:
    state = system.start(torch.float64)
    count = int(inside.sum())

    def product(x: Tensor) -> Tensor:
        full = x.new_zeros(x.shape[1], system.size)
        full[:, inside] = x.T
        h = hessian_products(system, state, system.unflattened(full))
        return system.flattened(h)[:, inside].T.contiguous()

    triples = power_iteration_operator(
        product,
        None,
        (count, count),
        k=pairs,
        max_steps=500,
        tol=1e-6,
        seed=system.seed + draw,
        dtype=torch.float64,
        device=system.device,
    )
    # A singular vector v of λ and −λ mixes both; it spans their eigenvectors with u = H v / |λ|.
    basis = torch.linalg.qr(torch.cat([triples.v, triples.u], dim=1))[0]
    image = basis.T @ product(basis)
    if not bool(torch.isfinite(image).all()):
        raise ValueError("subspace: expected a finite Hessian at the start, got NaN or Inf")
    values, vectors = torch.linalg.eigh(image)
    return basis @ vectors[:, values.abs().argsort(descending=True)[:pairs]]
