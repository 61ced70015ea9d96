"""Invariance of the symplectic 2-form under the step map."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..conventions import symplectic_matrix
from ..ops.two_form import two_form
from .arguments import finite, whole
from .batch_statistics import join
from .hamiltonian_system import HamiltonianSystem, State
from .intervals import Interval, mean_interval
from .rounding import walk
from .tangent_map import push_tangents


@dataclass(frozen=True)
class OmegaInvariance:
    """epsilon: ε_Ω, the mean over the draws; floor: what rounding explains of it (the largest
    draw's).

    interval: 95 % Student interval of the mean, None for one draw; values: ε_Ω of every draw.
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
    seconds: float


def omega_invariance(
    system: HamiltonianSystem,
    dt: float,
    steps: int,
    pairs: int = 4,
    tangents: str = "jvp",
    *,
    draws: int = 1,
) -> OmegaInvariance:
    """ε_Ω(dt): how far K = `steps` steps are from a (conformally) symplectic map.

        ε_Ω = ‖e^{γ K dt} SᵀJS − J_{2k}‖_F / ‖J_{2k}‖_F,   S = DΦ(z₀) S₀

    S₀ [2N, 2k] holds the pairs (d_i, 0), (0, d_i) of k = `pairs` random orthonormal directions d_i
    of R^N, so that S₀ᵀJS₀ = J_{2k}; ω(z₁, z₂) = q₁·p₂ − p₁·q₂. A force that is the gradient of a
    potential, held fixed within a step, gives 0 at every dt.

    tangents: "jvp" — exact derivatives, forward over reverse, kinks of ReLU or max-pool do no harm;
        costs 2K batched Hessian-vector products. In the regime "running" the derivative follows the
        running statistics as well. "fd" — central differences, a cross-check; 8kK gradients.
    draws: repeats with other directions; more than one gives an interval.

    All in fp64, on copies; the memory is that of 4k + 2 parameter lists, and of the activations 2k
    times.
    floor: two_form's error bound, plus u √(6K) ‖S‖_F² relative to ‖J_{2k}‖_F for "jvp"; for "fd"
    the rounding u √(6K) ‖z₀‖ divided by the increment takes the place of u √(6K) (truncation, which
    kinks dominate, is not in it).

    Returns an `OmegaInvariance`. TypeError, ValueError: arguments out of range, pairs > N, sharded
    parameters (DTensor has no second derivatives). The model is left as it was, whatever happens.

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
    dt = finite("dt", dt)
    steps = whole("steps", steps)
    pairs = whole("pairs", pairs)
    draws = whole("draws", draws)
    if pairs > system.size:
        raise ValueError(f"pairs: expected at most N = {system.size} directions, got {pairs}")
    if tangents not in ("jvp", "fd"):
        raise ValueError(f'tangents: expected "jvp" or "fd", got {tangents!r}')
    if any(hasattr(q, "full_tensor") for q in system.q):
        raise TypeError(
            "system: expected plain parameters, got sharded ones (DTensor), which have no second "
            "derivatives; probe an unsharded copy of the model"
        )
    begin = system.clock.now()
    push = _push_exact if tangents == "jvp" else _push_differences
    values, floors = [], []
    with system.session():
        for draw in range(draws):
            z = system.start(torch.float64)
            s, relative_rounding = push(system, z, _directions(system, pairs, draw), dt, steps)
            with system.clock("kernels"):
                form = two_form(s.q, s.p, metric=True, backend=system.backend)
            assert form.metric is not None  # asked for
            growth = math.exp(system.damping * steps * dt)
            size = math.sqrt(2 * pairs)  # ‖J_2k‖_F
            values.append(
                float((growth * form.omega.cpu() - symplectic_matrix(pairs)).norm()) / size
            )
            rounding = float(form.error_bound.norm()) + relative_rounding * float(
                form.metric.trace()
            )
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
        seconds=system.clock.now() - begin,
    )


def _directions(system: HamiltonianSystem, pairs: int, draw: int) -> State:
    """The 2k tangents (d_i, 0), (0, d_i), [2k, *shape] per tensor, fp64; db = 0."""
    generator = torch.Generator().manual_seed(system.seed + 7919 * (draw + 1))
    noise = torch.randn(system.size, pairs, generator=generator, dtype=torch.float64)
    d = torch.linalg.qr(noise)[0].T
    blocks = d.split([q.numel() for q in system.q], dim=1)
    dq, dp = [], []
    for block, q in zip(blocks, system.q, strict=True):
        zero = torch.zeros_like(block)
        dq.append(torch.cat([block, zero]).reshape(-1, *q.shape).to(system.device))
        dp.append(torch.cat([zero, block]).reshape(-1, *q.shape).to(system.device))
    db: dict[str, Tensor] = {}
    if system.regime == "running":
        for layer in system.layers:
            for slot in ("running_mean", "running_var"):
                name = join(layer, slot)
                db[name] = (
                    system.buffers[name].new_zeros(2 * pairs, *system.buffers[name].shape).double()
                )
    return State(dq, dp, db)


def _push_exact(
    system: HamiltonianSystem, z: State, s: State, dt: float, steps: int
) -> tuple[State, float]:
    for t in range(steps):
        push_tangents(system, z, s, t, dt)
    return s, walk(torch.float64, 6 * steps)


def _push_differences(
    system: HamiltonianSystem, z: State, s: State, dt: float, steps: int
) -> tuple[State, float]:
    """(Φ(z + h d) − Φ(z − h d)) / 2h for each tangent d, h = 1e-7 ‖z₀‖."""
    length = math.sqrt(sum(float(x.square().sum()) for x in z.q + z.p))
    h = 1e-7 * length  # less than u^{1/3}, best for smooth potentials: fewer kinks within ±h
    pushed = State([torch.empty_like(x) for x in s.q], [torch.empty_like(x) for x in s.p], {})
    for i in range(len(s.q[0])):
        ends = []
        for sign in (1, -1):
            end = z.copy()
            for x, d in zip(end.q + end.p, s.q + s.p, strict=True):
                x.add_(d[i], alpha=sign * h)
            for t in range(steps):
                system.step(end, t, dt)
            ends.append(end)
        for out, a, b in zip(
            pushed.q + pushed.p, ends[0].q + ends[0].p, ends[1].q + ends[1].p, strict=True
        ):
            out[i] = (a - b) / (2 * h)
    return pushed, walk(torch.float64, 6 * steps) * length / h
