"""Energy drift against the step size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

import torch

from .arguments import step_sizes, whole
from .hamiltonian_system import HamiltonianSystem, check_system
from .intervals import Interval, slope_interval
from .rounding import energy_change, walk


@dataclass(frozen=True)
class EnergyDrift:
    """`drift` and `offset` have one entry per dt of `dts`; the rest holds for all of them.

    drift: D(dt) = median |H_{t+1} − H_t| over the last fifth; offset: mean of H_t − H₀ over the
    last fifth (its sign is what dt_zero is about); floor: what rounding explains of D; energy: H₀.
    slope: m of log₁₀ D = m log₁₀ dt + b over the dts whose finite D exceeds its floor;
    slope_interval: 95 % Student interval, None for fewer than three such dts. dt_zero: the dt where
    `offset` changes sign, None when the dts do not bracket it. seconds: wall time.
    """

    dts: tuple[float, ...]
    steps: int
    energy: float
    drift: tuple[float, ...]
    offset: tuple[float, ...]
    floor: float
    slope: float
    slope_interval: Interval | None
    dt_zero: float | None
    seconds: float


def energy_drift(system: HamiltonianSystem, dts: Sequence[float], steps: int) -> EnergyDrift:
    """D(dt) = median over t in [⌊0.8 T⌋, T) of |H_{t+1} − H_t|, T = `steps`, of each dt; its slope;
    dt_zero.

        log₁₀ D = m log₁₀ dt + b

    H = ½ pᵀM⁻¹p + L in inference mode on the probe batch; energies and steps in fp64.
    With one batch, no damping and a potential that the map and H agree on, the modified energy H +
    dt² G is conserved, so H_{t+1} − H_t = −dt² (G_{t+1} − G_t) and m = 3 for small dt; kinks of the
    potential lower it. With several batches D also holds the change of potential from batch to
    batch, and m falls towards 1; statistics that the force does not see (the regimes "batch" and
    "running") lower it to 1 or 0. dt_zero (the sign change of the mean of H_t − H₀ over the last
    fifth) is bracketed by neighbouring dts whose offsets exceed the
    floor times √T, and bisected to 1 % of dt.

    Costs 2T gradients, T + 1 where all steps share them (see `HamiltonianSystem`), and T + 1
    energies per dt. floor: the rms change of H under three random roundings of every coordinate,
    one step's worth.

    Returns an `EnergyDrift`. TypeError, ValueError: no dt, a dt that is not > 0, steps < 5. A
    trajectory that overflows has drift NaN or inf. The model is left as it was, whatever happens.

    >>> import torch, gti_kernels as gti
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    >>> batches = [(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(4)]
    >>> system = gti.HamiltonianSystem(model, torch.nn.functional.mse_loss, batches)
    >>> result = gti.energy_drift(system, dts=(0.01, 0.02, 0.05), steps=20)
    >>> len(result.drift), result.drift[0] < result.drift[2]
    (3, True)

    Source: Hairer, Lubich & Wanner, Geometric Numerical Integration (2006), IX.1 (modified energy).
    """
    check_system(system)
    dts, steps = step_sizes(dts), whole("steps", steps, least=5)
    begin = system.clock.now()
    with system.session():
        start = system.start(torch.float64)
        floor = energy_change(system, start, walk(torch.float64, 3))
        runs = [_energies(system, dt, steps) for dt in dts]
        drift = [tail_drift(run) for run in runs]
        offset = [_tail_offset(run) for run in runs]
        dt_zero = _dt_zero(system, dts, offset, steps, floor * math.sqrt(steps))
    slope, interval = drift_slope(dts, drift, floor)
    return EnergyDrift(
        dts=dts,
        steps=steps,
        energy=runs[0][0],
        drift=tuple(drift),
        offset=tuple(offset),
        floor=floor,
        slope=slope,
        slope_interval=interval,
        dt_zero=dt_zero,
        seconds=system.clock.now() - begin,
    )


def _energies(system: HamiltonianSystem, dt: float, steps: int) -> list[float]:
    z = system.start(torch.float64)
    energies = [system.energy(z)]
    for t in range(steps):
        system.step(z, t, dt)
        energies.append(system.energy(z))
    return energies


def drift_slope(
    dts: Sequence[float], drift: Sequence[float], floor: float = 0.0
) -> tuple[float, Interval | None]:
    """m of log₁₀ D = m log₁₀ dt + b by least squares, and its 95 % Student interval.

    Fitted are the dts whose D is finite and exceeds `floor`; with fewer than two m is NaN, with
    fewer than three the interval is None.
    """
    fitted = [(dt, d) for dt, d in zip(dts, drift, strict=True) if floor < d < math.inf]
    return slope_interval([math.log10(dt) for dt, _ in fitted], [math.log10(d) for _, d in fitted])


def tail_drift(energies: Sequence[float]) -> float:
    """D = median of |H_{t+1} − H_t| over t in [⌊0.8 T⌋, T), H_0 to H_T; NaN if one of these
    is."""
    steps = len(energies) - 1
    tail = range(int(0.8 * steps), steps)
    changes = [abs(energies[t + 1] - energies[t]) for t in tail]
    return math.nan if any(math.isnan(c) for c in changes) else median(changes)


def _tail_offset(energies: list[float]) -> float:
    steps = len(energies) - 1
    return fmean(energies[int(0.8 * steps) + 1 :]) - energies[0]


def _dt_zero(
    system: HamiltonianSystem, dts: tuple[float, ...], offset: list[float], steps: int, floor: float
) -> float | None:
    """The first sign change, in ascending dt, of offsets above the floor; bisection in log dt."""
    points = sorted((dt, o) for dt, o in zip(dts, offset, strict=True) if floor < abs(o) < math.inf)
    for (low, o_low), (high, o_high) in pairwise(points):
        if o_low * o_high < 0:
            while high / low > 1.01:
                middle = math.sqrt(low * high)
                o_middle = _tail_offset(_energies(system, middle, steps))
                if o_low * o_middle > 0:
                    low = middle
                else:
                    high = middle
            return math.sqrt(low * high)
    return None
