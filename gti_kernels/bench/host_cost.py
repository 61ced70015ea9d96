"""The lines of `gti bench` for what a call costs on tensors too small to matter."""

from __future__ import annotations

from collections.abc import Callable

import torch

import gti_kernels as gti

from .case import Call, Case, Work


def _host(op: str, count: int) -> Callable[[str], Work]:
    def build(device: str) -> Work:
        lists = [[torch.randn(4, device=device) for _ in range(count)] for _ in range(3)]
        q, p, grad = lists if count > 1 else [tensors[0] for tensors in lists]
        ps, grads = lists[1:]
        squares = [t.view(2, 2) for t in ps]
        tangents = squares if count > 1 else squares[0]
        calls: dict[str, Call] = {
            "kick_": lambda: gti.kick_(p, grad, 1e-9),
            "drift_": lambda: gti.drift_(q, p, 1e-9),
            "kick_drift_": lambda: gti.kick_drift_(q, p, grad, 1e-9, 1e-9),
            "kinetic_energy": lambda: gti.kinetic_energy(p),
            "two_form": lambda: gti.two_form(tangents, tangents),
            "power_iteration": lambda: gti.power_iteration(tangents, max_steps=1, tol=0.0),
        }
        return Work(
            op=calls[op],
            peers={"_foreach_add_": lambda: torch._foreach_add_(ps, grads, alpha=-1e-9)},
        )

    return build


def default_cases() -> list[Case]:
    """The lines of the default suite."""
    out = []
    for op in ("kick_", "drift_", "kick_drift_", "kinetic_energy", "two_form", "power_iteration"):
        tensors, bar = _host(op, 1), 6.0
        out.append(Case(op, "host cost", "1 tensor [4]", "float32", tensors, {}, bar, calls=200))
    for op in ("kick_", "drift_", "kick_drift_", "kinetic_energy", "two_form", "power_iteration"):
        bars = {"_foreach_add_": 1 / 1.5}
        out.append(
            Case(op, "host cost", "62 tensors [4]", "float32", _host(op, 62), bars, calls=50)
        )
    return out
