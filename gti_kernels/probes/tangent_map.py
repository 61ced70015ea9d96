"""The tangent map of a step: exact derivatives of Φ_dt applied to m tangents at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from ..ops.leapfrog import kick_, kick_drift_
from .batch_statistics import functional_normalization
from .hamiltonian_system import HamiltonianSystem, State, laid_out_like


def push_tangents(
    system: HamiltonianSystem, state: State, tangents: State, t: int, dt: float
) -> None:
    """Step t of the map and of its derivative, both in place.

        (q, p, b) ← Φ_dt(q, p, b),   (dq, dp, db) ← DΦ_dt(q, p, b) · (dq, dp, db)

    state: (q, p, b) in fp64; tangents: m tangents, [m, *shape] per tensor, db only for the running
    statistics in the regime "running" (the updated statistics depend on q, and later forces on
    them), else empty. The kicks and drifts are linear, so the tangents go through the same kernels
    as the state, with the Hessian-vector products H·dq + (∂∇L/∂b)·db in place of the gradient
    (forward over reverse, all m tangents in one batched pass).
    """
    damp = math.exp(-system.damping * dt / 2)
    if system.regime == "running" and system.layers:
        _push_statistics(system, state, tangents, t)
    for half in (0, 1):
        force, d_force = _force(system, state, tangents, t)
        with system.clock("kernels"):
            for z, f in ((state, force), (tangents, d_force)):
                if half == 0:
                    kick_drift_(
                        z.q,
                        z.p,
                        f,
                        dt / 2,
                        dt,
                        inv_mass=system.inv_mass,
                        damp=damp,
                        backend=system.backend,
                    )
                else:
                    kick_(z.p, f, damp * dt / 2, damp=damp, backend=system.backend)


def _force(
    system: HamiltonianSystem, state: State, tangents: State, t: int
) -> tuple[list[Tensor], list[Tensor]]:
    """∇L_t(q; b) and its derivative along the tangents."""
    layers = system.layers if system.regime in ("batch", "running") else {}
    # A float target gets tangents, zeros: without any, torch.func.jvp of mse_loss's gradient fails.
    y = system.target(t, torch.float64)
    ys = [y] if isinstance(y, Tensor) and y.is_floating_point() else []
    dys = [x.new_zeros(tangents.q[0].shape[:1] + x.shape) for x in ys]

    def force(q: list[Tensor], b: dict[str, Tensor], ys: list[Tensor]) -> list[Tensor]:
        running = {**state.b, **b} if system.regime == "running" else None
        with functional_normalization(layers, running):
            return grad(system.loss)(q, state.b, t, *ys)

    point = (state.q, {name: state.b[name] for name in tangents.b}, ys)
    # The math backend of attention is the one with forward derivatives.
    with system.clock("gradients"), sdpa_kernel(SDPBackend.MATH):
        value, derivative = _differential(force, point, (tangents.q, tangents.b, dys))
        return (
            [laid_out_like(q, f) for q, f in zip(state.q, value, strict=True)],
            [laid_out_like(dq, df) for dq, df in zip(tangents.q, derivative, strict=True)],
        )


def _push_statistics(system: HamiltonianSystem, state: State, tangents: State, t: int) -> None:
    """b ← (1 − m) b + m·μ(q), db ← (1 − m) db + m Dμ·dq, μ the moments of batch t."""

    def moments(q: list[Tensor]) -> dict[str, Tensor]:
        return system.batch_moments(q, state.b, t)

    with system.clock("gradients"):
        value, derivative = _differential(moments, (state.q,), (tangents.q,))
    for name, m in system.count_batch(state).items():
        state.b[name] = torch.lerp(state.b[name], value[name], m)
        tangents.b[name] = torch.lerp(tangents.b[name], derivative[name], m)


def _differential(f: Callable[..., Any], point: tuple, tangents: tuple) -> tuple[Any, Any]:
    """f(point) and Df(point)·tangent for tangents stacked along a new first axis."""

    def along(*tangent: Any) -> tuple[Any, Any]:
        value, derivative = jvp(f, point, tangent)  # type: ignore[misc]
        return value, derivative

    try:
        # The value is the same for every tangent (out_dims None), which the stub does not know of.
        return vmap(along, out_dims=(None, 0), randomness="same")(*tangents)  # type: ignore[arg-type]
    except RuntimeError as error:
        # Models that vmap does not take (as with writes into tensors of their own), or too little
        # memory for all tangents at once: one at a time.
        if "vmap" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise
    rows = [along(*_row(tangents, i)) for i in range(tangents[0][0].shape[0])]
    return rows[0][0], _stack([derivative for _, derivative in rows])


def _row(tree: Any, i: int) -> Any:
    return tree_map(lambda x: x[i], tree)


def _stack(trees: list[Any]) -> Any:
    return tree_map(lambda *xs: torch.stack(xs), *trees)
