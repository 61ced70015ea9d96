"""Round trip: K steps forward, K steps back, and what has not returned."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .arguments import finite, whole
from .hamiltonian_system import HamiltonianSystem, check_system
from .rounding import coarsest, energy_change, walk


@dataclass(frozen=True)
class RoundTrip:
    """Relative errors of a round trip, each with what rounding alone explains (`*_floor`).

    state: ‖z_back − z₀‖ / ‖z₀‖ over z = (q, p); energy: |H_back − H₀| / |H₀|, H in inference mode
    on the probe batch; buffers: ‖b_back − b₀‖ / ‖b₀‖ over the float buffers (0 without buffers).
    reach: ‖z_K − z₀‖ / ‖z₀‖, how far the trip went. seconds: wall time.
    """

    dt: float
    steps: int
    state: float
    energy: float
    buffers: float
    state_floor: float
    energy_floor: float
    buffers_floor: float
    reach: float
    seconds: float


def round_trip(
    system: HamiltonianSystem, dt: float, steps: int, *, exact: bool = False
) -> RoundTrip:
    """Δ_NEG(dt): K = `steps` steps with +dt over batches 0…K−1, then K with −dt over K−1…0.

        z_back = Φ_{−dt}^{(0)} ∘ … ∘ Φ_{−dt}^{(K−1)} ∘ Φ_dt^{(K−1)} ∘ … ∘ Φ_dt^{(0)} (z₀)

    In exact arithmetic z_back = z₀ for every palindromic step map, at every dt. What exceeds the
    floor is state that the map does not carry (running statistics), or dynamics that amplify
    rounding.

    Runs in the dtype of the parameters and costs 4K gradients, 2K + 1 where all steps share one
    (see `HamiltonianSystem`). Floors: u √(6K) for state and buffers (u the unit roundoff; three
    stored roundings per step and coordinate as a random walk; what the dynamics amplify is left
    out); for the energy, the rms change of H when every coordinate is off by that much, relatively,
    with random sign.

    exact=True takes the same steps on the grid of integers of `gti_kernels.PhaseSpace`, which
    rounding cannot leave: the floors of state and energy are 0, and a state that returns does so
    with error exactly 0 (group norm, frozen batch norm). Hidden state that acts on the force makes
    a gradient differ from that of the way out, which raises RuntimeError and names the step.

    Returns a `RoundTrip`. TypeError, ValueError: dt not finite or zero, steps < 1. A trajectory
    that overflows gives NaN or inf and no exception. The model is left as it was, whatever happens.

    >>> import torch, gti_kernels as gti
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    >>> batches = [(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(4)]
    >>> system = gti.HamiltonianSystem(model, torch.nn.functional.mse_loss, batches)
    >>> result = gti.round_trip(system, dt=0.05, steps=10)
    >>> result.state < 1e-6 < result.reach
    True
    >>> gti.round_trip(system, dt=0.05, steps=10, exact=True).state
    0.0

    Source: Hairer, Lubich & Wanner, Geometric Numerical Integration (2006), ch. V (symmetric
    methods).
    """
    check_system(system)
    dt = finite("dt", dt)
    if dt == 0:
        raise ValueError("dt: expected a number other than 0, got 0")
    steps = whole("steps", steps)
    begin = system.clock.now()
    with system.session():
        start = system.start()
        energy = system.energy(start)
        z = start.copy()
        grid = system.grid(z) if exact else None
        for t in range(steps):
            system.step(z, t, dt, grid)
        reach = _relative_change(z.q + z.p, start.q + start.p)
        for t in reversed(range(steps)):
            system.step(z, t, -dt, grid)
        floor = walk(coarsest(z.q), 6 * steps)
        state_floor = 0.0 if exact else floor
        change = 0.0 if exact else energy_change(system, start, floor)
        buffers = [name for name, b in system.buffers.items() if b.is_floating_point()]
        return RoundTrip(
            dt=dt,
            steps=steps,
            state=_relative_change(z.q + z.p, start.q + start.p),
            energy=_ratio(abs(system.energy(z) - energy), abs(energy)),
            buffers=_relative_change([z.b[k] for k in buffers], [start.b[k] for k in buffers]),
            state_floor=state_floor,
            energy_floor=_ratio(change, abs(energy)),
            buffers_floor=floor if buffers else 0.0,
            reach=reach,
            seconds=system.clock.now() - begin,
        )


def _relative_change(new: list[Tensor], old: list[Tensor]) -> float:
    """‖new − old‖ / ‖old‖ over lists of tensors, in fp64."""
    change = sum(
        float((a.double() - b.double()).square().sum()) for a, b in zip(new, old, strict=True)
    )
    size = sum(float(b.double().square().sum()) for b in old)
    return _ratio(math.sqrt(change), math.sqrt(size))


def _ratio(change: float, size: float) -> float:
    if size > 0 or math.isnan(change):
        return change / size if size > 0 else math.nan
    return math.inf if change > 0 else 0.0
