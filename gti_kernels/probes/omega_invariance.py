"""Invariance of the symplectic 2-form under the step map."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..conventions import symplectic_matrix
from ..ops.two_form import two_form
from .arguments import finite, whole
from .hamiltonian_system import HamiltonianSystem, State, check_system
from .intervals import Interval, mean_interval
from .push_tangents import check_method, push, refuse_sharded
from .subspaces import SUBSPACES, directions, split_pairs

#: exp of more is beyond fp64
_LARGEST_EXPONENT = 709.0


@dataclass(frozen=True)
class OmegaInvariance:
    """epsilon: ε_Ω, the mean over the draws; floor: what rounding explains of it (the largest
    draw's).

    interval: 95 % Student interval of the mean, None for one draw; values: ε_Ω of every draw.
    with_damping: the mean of ‖SᵀJS − J_{2k}‖_F / ‖J_{2k}‖_F, damping's own e^{−γKdt} left in.
    log_volume: the mean of log of the volume that the tangents span, see `volume_change`.
    kinks: number of tangents, of all draws, whose central difference crossed a kink; 0 for "jvp".
    seconds: wall time.
    """

    dt: float
    steps: int
    pairs: int
    tangents: str
    epsilon: float
    floor: float
    interval: Interval | None
    values: tuple[float, ...]
    with_damping: float
    log_volume: float
    kinks: int
    seconds: float


def omega_invariance(
    system: HamiltonianSystem,
    dt: float,
    steps: int,
    pairs: int = 4,
    tangents: str = "jvp",
    *,
    draws: int = 1,
    subspace: str = "random",
    layer: str | None = None,
    chunk: int | None = None,
) -> OmegaInvariance:
    """ε_Ω(dt): how far K = `steps` steps are from a (conformally) symplectic map.

        ε_Ω = ‖e^{γ K dt} SᵀJS − J_{2k}‖_F / ‖J_{2k}‖_F,   S = DΦ(z₀) S₀

    S₀ [2N, 2k] holds the pairs (d_i, 0), (0, d_i) of k = `pairs` orthonormal directions d_i of R^N
    (`darboux_pairs`: subspace, layer), so that S₀ᵀJS₀ = J_{2k}; ω(z₁, z₂) = q₁·p₂ − p₁·q₂. A force
    that is the gradient of a potential, held fixed within a step, gives 0 at every dt.

    tangents: "jvp" — exact derivatives, forward over reverse, kinks of ReLU or max-pool do no harm;
        costs 2K batched Hessian-vector products, K + 1 on one batch (see `push_tangents`). In the
        regime "running" the derivative follows the running statistics as well. "fd" — central
        differences, a cross-check; 22K gradients and up to 12K for each of the 2k tangents. chunk:
        tangents at a time, of `push_tangents`.
    draws: repeats with other directions (for "hessian", other starts); more than one gives an
        interval.

    All in fp64, on copies; the memory is that of 6k + 3 parameter lists (8k + 3 with several
    chunks), and of the activations for each tangent of a chunk.
    floor: two_form's error bound, plus u √(6K) ‖S‖_F² relative to ‖J_{2k}‖_F for "jvp"; for "fd"
    the rounding u √(6K) divided by the relative increment takes the place of u √(6K) (truncation,
    which kinks dominate, is not in it).

    Returns an `OmegaInvariance`. TypeError, ValueError: arguments out of range, pairs > N, γKdt >
    709, sharded parameters (DTensor has no second derivatives). The model is left as it was,
    whatever happens.

    >>> import torch, gti_kernels as gti
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    >>> batches = [(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(4)]
    >>> system = gti.HamiltonianSystem(model, torch.nn.functional.mse_loss, batches)
    >>> result = gti.omega_invariance(system, dt=0.05, steps=5, pairs=2)
    >>> result.epsilon < 1e-13
    True

    Source: Leimkuhler & Reich, Simulating Hamiltonian Dynamics (2004), ch. 3; McLachlan &
    Perlmutter, Conformal Hamiltonian systems (2001).
    """
    check_arguments(system, dt, steps, pairs, tangents)
    dt = float(dt)
    draws = whole("draws", draws)
    if subspace not in SUBSPACES:
        raise ValueError(f"subspace: expected one of {SUBSPACES}, got {subspace!r}")
    if chunk is not None:
        chunk = whole("chunk", chunk)
    begin = system.clock.now()
    values, floors, undamped, volumes, kinks = [], [], [], [], 0
    with system.session():
        for draw in range(draws):
            dq, dp = split_pairs(system, directions(system, pairs, subspace, layer, draw))
            s = push(system, State(dq, dp, {}), dt, steps, tangents, chunk)
            with system.clock("kernels"):
                form = two_form(s.dq, s.dp, metric=True, backend=system.backend)
            kinks += len(s.kinks)
            growth = math.exp(system.damping * steps * dt)
            size = math.sqrt(2 * pairs)  # ‖J_2k‖_F
            before = symplectic_matrix(pairs, device=system.device)
            undamped.append(float((form.omega - before).norm()) / size)
            volumes.append(0.5 * float(torch.linalg.slogdet(form.metric)[1]))  # 1 before
            values.append(float((growth * form.omega - before).norm()) / size)
            rounding = float(form.error_bound.norm()) + s.rounding * float(form.metric.trace())
            floors.append(growth * rounding / size)
    return OmegaInvariance(
        dt=dt,
        steps=steps,
        pairs=pairs,
        tangents=tangents,
        epsilon=sum(values) / draws,
        floor=max(floors),
        interval=mean_interval(values),
        values=tuple(values),
        with_damping=sum(undamped) / draws,
        log_volume=sum(volumes) / draws,
        kinks=kinks,
        seconds=system.clock.now() - begin,
    )


def check_arguments(
    system: HamiltonianSystem, dt: float, steps: int, pairs: int, tangents: str
) -> None:
    """TypeError or ValueError unless `omega_invariance` takes these."""
    check_system(system)
    dt, steps, pairs = finite("dt", dt), whole("steps", steps), whole("pairs", pairs)
    if pairs > system.size:
        raise ValueError(f"pairs: expected at most N = {system.size} directions, got {pairs}")
    check_method("tangents", tangents)
    refuse_sharded(system)
    if system.damping * steps * abs(dt) > _LARGEST_EXPONENT:
        raise ValueError(
            f"dt, steps: expected damping * steps * |dt| <= {_LARGEST_EXPONENT:.0f}, so that "
            f"e^(damping * steps * dt) is finite, got {system.damping:g} * {steps} * {abs(dt):g}; "
            f"take fewer or smaller steps"
        )
