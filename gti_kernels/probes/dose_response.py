"""Dose and response: what the momentum of the running statistics does to the probes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .arguments import finite
from .batch_statistics import tracked_layers
from .clock import add_seconds
from .hamiltonian_system import HamiltonianSystem
from .omega_invariance import omega_invariance
from .round_trip import round_trip

MOMENTA = (0.0, 0.001, 0.01, 0.03, 0.1)


@dataclass(frozen=True)
class Dose:
    """Responses to one momentum m (b ← (1 − m) b + m·batch moments).

    In the regime "running": state (round trip) and epsilon (ε_Ω). In the regime "batch": buffers
    and energy (round trip), where the state returns whatever m is.
    """

    momentum: float
    state: float
    epsilon: float
    buffers: float
    energy: float


def dose_response(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[tuple[Any, Any]],
    *,
    momenta: Sequence[float] = MOMENTA,
    dt: float = 0.05,
    steps: int = 10,
    pairs: int = 4,
    seed: int = 0,
    backend: str = "auto",
    seconds: dict[str, float] | None = None,
    on_measure: Callable[[str], None] = lambda _: None,
) -> tuple[Dose, ...]:
    """Round trip and ε_Ω of a BatchNorm model for each momentum, everything else equal.

    model: has BatchNorm layers with running statistics, else ValueError; their momentum is as
    before afterwards. Other arguments as for `HamiltonianSystem`, `round_trip` and
    `omega_invariance`; `seconds` collects the clock of the systems; `on_measure` is called with a
    word before each probe.
    """
    layers = tracked_layers(model)
    if not layers:
        raise ValueError(
            "model: expected BatchNorm layers with running statistics, got none; "
            "a model without them has no dose"
        )
    momenta = [finite(f"momenta[{i}]", m) for i, m in enumerate(momenta)]
    batches = list(batches)
    before = {name: layer.momentum for name, layer in layers.items()}
    doses = []
    try:
        for m in momenta:
            for layer in layers.values():
                layer.momentum = m
            running, batch = (
                HamiltonianSystem(
                    model, loss_fn, batches, regime=regime, seed=seed, backend=backend
                )
                for regime in ("running", "batch")
            )
            on_measure(f"momentum {m:g}: round trip")
            there, here = round_trip(running, dt, steps), round_trip(batch, dt, steps)
            on_measure(f"momentum {m:g}: 2-form")
            omega = omega_invariance(running, dt, steps, pairs)
            doses.append(Dose(m, there.state, omega.epsilon, here.buffers, here.energy))
            if seconds is not None:
                for system in (running, batch):
                    add_seconds(seconds, system.clock.seconds)
                add_seconds(seconds, {"probes": there.seconds + here.seconds + omega.seconds})
    finally:
        for name, layer in layers.items():
            layer.momentum = before[name]
    return tuple(doses)
