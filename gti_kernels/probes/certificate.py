"""The certificate: three probes, several step sizes, stated thresholds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import step_sizes, whole
from .certificate_text import markdown, text_table
from .clock import add_seconds
from .dose_response import Dose
from .energy_drift import EnergyDrift, energy_drift
from .hamiltonian_system import HamiltonianSystem
from .omega_invariance import OmegaInvariance, check_arguments, omega_invariance
from .round_trip import RoundTrip, round_trip

PROBES = ("state", "energy", "buffers", "epsilon", "drift")


@dataclass(frozen=True)
class Thresholds:
    """The largest values that pass; for `slope`, the smallest.

    state, energy, buffers: relative round-trip errors. epsilon: ε_Ω. drift: D / |H₀| per step.
    slope: of log D against log dt. Below 1, D/dt does not vanish with dt: H changes by something
    that is no step of the dynamics. A drift at or below its rounding floor passes whatever the
    slope.
    """

    state: float = 1e-5
    energy: float = 1e-5
    buffers: float = 1e-5
    epsilon: float = 1e-8
    drift: float = 1e-3
    slope: float = 1.0


@dataclass(frozen=True)
class Run:
    """The three probes of one model in one regime at one dt from one seed."""

    name: str
    regime: str
    dt: float
    seed: int
    round_trip: RoundTrip
    omega: OmegaInvariance
    drift: EnergyDrift

    def value(self, probe: str) -> float:
        """The relative error that the probe (one of `PROBES`) measured."""
        if probe == "drift":
            return self.drift.drift[self.drift.dts.index(self.dt)] / abs(self.drift.energy)
        return self.omega.epsilon if probe == "epsilon" else getattr(self.round_trip, probe)

    def floor(self, probe: str) -> float:
        """What rounding alone explains of `value(probe)`."""
        if probe == "drift":
            return self.drift.floor / abs(self.drift.energy)
        return (
            self.omega.floor if probe == "epsilon" else getattr(self.round_trip, f"{probe}_floor")
        )

    def passes(self, probe: str, thresholds: Thresholds) -> bool:
        """Whether the value is within its threshold; NaN is not."""
        within = self.value(probe) <= getattr(thresholds, probe)
        if probe == "drift" and self.value(probe) > self.floor(probe):
            # No slope: no two dts rise above the floor, or there was only one dt.
            within = within and (
                math.isnan(self.drift.slope) or self.drift.slope >= thresholds.slope
            )
        return within


@dataclass(frozen=True)
class Row:
    """One line of the table: a model at one dt, over all its seeds.

    value, floor: by probe, of the seed with the largest value; passed: by probe, over every seed.
    passing: number of the `seeds` seeds that pass all probes. slope: mean over the seeds.
    """

    name: str
    dt: float
    value: dict[str, float]
    floor: dict[str, float]
    passed: dict[str, bool]
    slope: float
    passing: int
    seeds: int


@dataclass(frozen=True)
class Certificate:
    """What `certify` measured: `runs` with all numbers, `rows` as the table shows them.

    thresholds: what the verdicts compare with; settings: how it was measured; seconds: wall time in
    "probes" (all of it), and within them in "kernels" and "gradients"; doses: see `dose_response`.
    """

    runs: tuple[Run, ...]
    thresholds: Thresholds
    settings: dict[str, Any]
    seconds: dict[str, float]
    doses: tuple[Dose, ...] = field(default=())

    @property
    def rows(self) -> list[Row]:
        """One row per model and dt, in the order measured."""
        groups: dict[tuple[str, float], list[Run]] = {}
        for run in self.runs:
            groups.setdefault((run.name, run.dt), []).append(run)
        return [self._row(runs) for runs in groups.values()]

    @property
    def names(self) -> list[str]:
        """The models, in the order measured."""
        return list(dict.fromkeys(run.name for run in self.runs))

    @property
    def passed(self) -> bool:
        """Whether every probe of every run is within its threshold."""
        return all(run.passes(probe, self.thresholds) for run in self.runs for probe in PROBES)

    def table(self) -> str:
        """The table as plain text: value, verdict and rounding floor per probe."""
        return text_table(self)

    def to_json(self) -> str:
        """Everything as JSON; numbers that are not finite become null."""
        content = {
            "passed": self.passed,
            "settings": self.settings,
            "thresholds": asdict(self.thresholds),
            "seconds": self.seconds,
            "rows": [asdict(row) for row in self.rows],
            "runs": [asdict(run) for run in self.runs],
            "doses": [asdict(dose) for dose in self.doses],
        }
        return json.dumps(_finite_or_null(content), indent=1, allow_nan=False) + "\n"

    def save(self, directory: str | Path) -> list[Path]:
        """Write certificate.json, certificate.md and the figures (PNG); returns their paths.

        The figures need matplotlib: pip install "gti_kernels[probes]".
        """
        from .figures import save_figures

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        data, text = folder / "certificate.json", folder / "certificate.md"
        data.write_text(self.to_json(), encoding="utf-8")
        figures = save_figures(self, folder)
        text.write_text(markdown(self, [figure.name for figure in figures]), encoding="utf-8")
        return [data, text, *figures]

    def join(self, other: Certificate) -> Certificate:
        """Both certificates' runs in one; settings and thresholds are those of `self`."""
        seconds = dict(self.seconds)
        add_seconds(seconds, other.seconds)
        return replace(
            self, runs=self.runs + other.runs, seconds=seconds, doses=self.doses + other.doses
        )

    def _row(self, runs: list[Run]) -> Row:
        def worst(probe: str) -> Run:
            return max(
                runs, key=lambda run: math.inf if math.isnan(run.value(probe)) else run.value(probe)
            )

        t = self.thresholds
        return Row(
            name=runs[0].name,
            dt=runs[0].dt,
            value={probe: worst(probe).value(probe) for probe in PROBES},
            floor={probe: worst(probe).floor(probe) for probe in PROBES},
            passed={probe: all(run.passes(probe, t) for run in runs) for probe in PROBES},
            slope=sum(run.drift.slope for run in runs) / len(runs),
            passing=sum(all(run.passes(probe, t) for probe in PROBES) for run in runs),
            seeds=len(runs),
        )


def certify(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[tuple[Any, Any]],
    *,
    dts: Sequence[float] = (0.01, 0.02, 0.05, 0.1),
    steps: int = 10,
    pairs: int = 4,
    seeds: int = 1,
    inv_mass: str | float | Sequence[float] = "fan_in",
    damping: float = 0.0,
    regime: str = "batch",
    tangents: str = "jvp",
    thresholds: Thresholds | None = None,
    name: str = "model",
    backend: str = "auto",
    on_measure: Callable[[str], None] = lambda _: None,
) -> Certificate:
    """Round trip, Ω-invariance and energy drift of training `model`, at each dt, against
    thresholds.

    Answers: is this training loop, at this step size, a reversible and symplectic map, or does
    hidden state or a force without a potential break it? See `round_trip`, `omega_invariance` and
    `energy_drift` for the quantities, `Thresholds` for the verdicts, `HamiltonianSystem` for model,
    loss_fn, batches, inv_mass, damping, regime and backend.

    dts: step sizes > 0. steps: K of round trip and Ω-invariance; the drift takes 3K, on one batch
        (so that the potential is fixed), at each dt and its half (for the slope). pairs, tangents:
        of `omega_invariance`.
    seeds: repeats with seed 0, 1, ... for momenta, directions and random layers; repeat s starts at
        batch s·K. The table shows the largest errors, and how many seeds pass.
    name: of the model in the table. on_measure: called with a description before each measurement.

    Returns a `Certificate`; it passes when every value is within its threshold at every dt and
    seed. Errors as of the probes. The model is left as it was, also when a probe raises or is
    interrupted.

    >>> import torch, gti_kernels as gti
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    >>> batches = [(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(4)]
    >>> certificate = gti.certify(model, torch.nn.functional.mse_loss, batches, dts=(0.01, 0.02))
    >>> certificate.passed
    True
    """
    dts = step_sizes(dts)
    steps, pairs = whole("steps", steps), whole("pairs", pairs)
    seeds = whole("seeds", seeds)
    limits = Thresholds() if thresholds is None else thresholds
    drift_dts = sorted({*dts, *(dt / 2 for dt in dts)})
    # One system reads the batches once, and checks every argument before anything is measured.
    first = HamiltonianSystem(model, loss_fn, batches, inv_mass, damping, regime, backend=backend)
    for dt in dts:
        check_arguments(first, dt, steps, pairs, tangents)
    seconds = {"probes": 0.0, "kernels": 0.0, "gradients": 0.0}
    runs: list[Run] = []
    for seed in range(seeds):
        shift = seed * steps % len(first.batches)
        window = first.batches[shift:] + first.batches[:shift]
        system, one_batch = (
            HamiltonianSystem(
                model, loss_fn, part, inv_mass, damping, regime, seed, backend=backend
            )
            for part in (window, window[:1])
        )
        on_measure(f"{name}: drift")
        drift = energy_drift(one_batch, drift_dts, max(5, 3 * steps))
        seconds["probes"] += drift.seconds
        for dt in dts:
            on_measure(f"{name}, dt {dt:g}: round trip")
            trip = round_trip(system, dt, steps)
            on_measure(f"{name}, dt {dt:g}: 2-form")
            omega = omega_invariance(system, dt, steps, pairs, tangents)
            seconds["probes"] += trip.seconds + omega.seconds
            runs.append(Run(name, regime, dt, seed, trip, omega, drift))
        for used in (system, one_batch):
            add_seconds(seconds, used.clock.seconds)
    settings = {
        "dts": list(dts),
        "steps": steps,
        "drift_steps": max(5, 3 * steps),
        "pairs": pairs,
        "seeds": seeds,
        "inv_mass": inv_mass if isinstance(inv_mass, (str, float, int)) else list(inv_mass),
        "damping": damping,
        "tangents": tangents,
        "temperature": first.temperature,
        "backend": backend,
        "device": str(first.device),
        "dtype": str(first.q[0].dtype),
        "parameters": first.size,
        "torch": torch.__version__,
    }
    return Certificate(tuple(runs), limits, settings, seconds)


def _finite_or_null(x: Any) -> Any:
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if isinstance(x, dict):
        return {key: _finite_or_null(value) for key, value in x.items()}
    return [_finite_or_null(value) for value in x] if isinstance(x, (list, tuple)) else x
