"""Lines of `gti bench --suite full` for plans: exact steps beside plain ones, and host cost."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

import gti_kernels as gti

from .bench import RESNET18_PARAMETERS, Case, Work

#: Host cost of a step in microseconds per tensor.
MOST_US = 0.3


def _parameters(shapes: Sequence[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    for q in params:
        q.grad = torch.randn_like(q)
    return params


def exact_step(_: str) -> Work:
    """A step of gti.optim.Leapfrog that can be taken back to the last bit, and a plain one."""

    def step(exact: bool) -> Callable[[], None]:
        params = _parameters(RESNET18_PARAMETERS)
        return gti.optim.Leapfrog(params, dt=1e-3, damping=1.0, exact=exact).step

    return Work(op=step(True), peers={"plain step": step(False)})


def host_cost(count: int, optimizer: bool) -> Work:
    """A step over tensors of 4 elements, whose gradients are in .grad."""
    params = _parameters([(4,)] * count)
    a, b = ([torch.randn(4) for _ in range(count)] for _ in range(2))
    space, step = gti.PhaseSpace(params), gti.optim.Leapfrog(params, dt=1e-6).step
    return Work(
        op=step if optimizer else functools.partial(space.kick_drift_, 1e-6, 1e-6),
        peers={"_foreach_add_": lambda: torch._foreach_add_(a, b, alpha=-1e-9)},
    )


def phase_space_cases() -> list[Case]:
    """Exact steps, and the host cost of steps over many small tensors."""
    out = [
        Case(
            "kick_drift_",
            "exact Leapfrog.step",
            "62 tensors of ResNet-18",
            "float32",
            exact_step,
            {"plain step": 1 / 2.5},
        )
    ]
    for name, optimizer in (("PhaseSpace.kick_drift_", False), ("Leapfrog.step", True)):
        for count in (1000, 2000):
            out.append(
                Case(
                    "kick_drift_",
                    f"host cost of {name}",
                    f"{count:,} tensors [4]",
                    "float32",
                    lambda _, count=count, optimizer=optimizer: host_cost(count, optimizer),  # type: ignore[misc]
                    {},
                    MOST_US * count,
                    calls=10,
                )
            )
    return out
