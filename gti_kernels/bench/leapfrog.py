"""The lines of `gti bench` for steps: of kick_drift_, of the optimizer and of training with it;
with `--suite full` on a CPU also exact steps, and the host cost of plans."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import gti_kernels as gti

from ..conventions import fan_in_inverse_mass
from ..models.simple_cnn import SimpleCNN
from .case import RESNET18_PARAMETERS, Call, Case, Work

#: Host cost of a step in microseconds per tensor.
MOST_US = 0.3


def kick_drift(device: str, shapes: Sequence[tuple[int, ...]]) -> Work:
    """kick_drift_ with kinetic energy over parameters of these shapes, fp32."""

    def tensors(seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        return [torch.randn(s, generator=generator, device=device) for s in shapes]

    q, p, grad = tensors(0), tensors(1), tensors(2)
    mass = [
        min(8.0, max(0.125, torch.Size(s[1:]).numel() ** -0.5)) if len(s) > 1 else 1.0
        for s in shapes
    ]
    weight = torch.tensor(mass, device=device, dtype=torch.float64)
    h, damp = 1e-3, 0.999

    def foreach() -> Tensor:
        torch._foreach_mul_(p, damp)
        torch._foreach_add_(p, grad, alpha=-h)
        torch._foreach_add_(q, torch._foreach_mul(p, mass), alpha=h)
        return 0.5 * (torch.stack(torch._foreach_norm(p)).double().square() * weight).sum()

    def loop(q: list[Tensor], p: list[Tensor], grad: list[Tensor]) -> Tensor:
        energy = torch.zeros((), dtype=torch.float64, device=device)
        for q_t, p_t, g_t, w in zip(q, p, grad, mass):
            p_t.mul_(damp).add_(g_t, alpha=-h)
            q_t.add_(p_t, alpha=h * w)
            flat = p_t.view(-1)
            energy += 0.5 * w * torch.dot(flat, flat)
        return energy

    compiled = torch.compile(loop)
    total = sum(t.numel() * t.element_size() for t in q)
    source = torch.randn(5 * total // 8, device=device)  # fp32: as many bytes read as written
    target = torch.empty_like(source)
    return Work(
        op=lambda: gti.kick_drift_(q, p, grad, h, h, inv_mass=mass, damp=damp),
        peers={
            "_foreach": foreach,
            "per-tensor loop": lambda: loop(q, p, grad),
            "compiled loop": lambda: compiled(q, p, grad),
            "copy of the same bytes": lambda: target.copy_(source),
        },
        bytes_moved=5 * total,
        floor="copy",
    )


def optimizer_step(device: str, shapes: Sequence[tuple[int, ...]]) -> Work:
    """A whole step of gti.optim.Leapfrog over parameters of these shapes, fp32."""
    work = kick_drift(device, shapes)
    params = [torch.nn.Parameter(torch.randn(s, device=device)) for s in shapes]
    for q in params:
        q.grad = torch.randn_like(q)
    step = gti.optim.Leapfrog(params, dt=1e-3, damping=1.0).step
    others = [[torch.randn_like(q).detach() for q in params] for _ in range(3)]
    mass = [fan_in_inverse_mass(q) for q in params]

    def foreach() -> None:  # by hand, and without the energy, which a step alone does not need
        q, p, grad = others
        torch._foreach_mul_(p, math.exp(-1e-3))
        torch._foreach_add_(p, grad, alpha=-1e-3)
        torch._foreach_add_(q, torch._foreach_mul(p, mass), alpha=1e-3)

    copy = "copy of the same bytes"
    return replace(work, op=step, peers={"_foreach": foreach, copy: work.peers[copy]})


def training_step(device: str) -> Work:
    """Gradient and step of a small CNN on one batch: Leapfrog, and SGD on a copy of it."""

    def trainer(make: Callable[[Any], torch.optim.Optimizer]) -> Call:
        torch.manual_seed(0)
        model = SimpleCNN(1, 10, norm="group").to(device)
        x, y = torch.randn(64, 1, 8, 8, device=device), torch.randint(10, (64,), device=device)
        optimizer = make(model.parameters())

        def step() -> None:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        return step

    return Work(
        op=trainer(lambda params: gti.optim.Leapfrog(params, dt=0.1, damping=1.0)),
        peers={
            "SGD(momentum)": trainer(lambda params: torch.optim.SGD(params, 0.01, momentum=0.9))
        },
    )


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


def default_cases() -> list[Case]:
    """The lines of the default suite."""
    out = []
    out.append(
        Case(
            "kick_drift_",
            "with kinetic energy",
            "62 tensors of ResNet-18",
            "float32",
            lambda device: kick_drift(device, RESNET18_PARAMETERS),
            {"_foreach": 2.0, "per-tensor loop": 2.0, "copy of the same bytes": 1 / 1.2},
        )
    )
    optimizer_cases: tuple[tuple[str, Any, dict[str, float], float], ...] = (
        ("62 tensors of ResNet-18", RESNET18_PARAMETERS, {"copy of the same bytes": 1 / 1.1}, 2.5),
        ("2,000 tensors [1000]", ((1000,),) * 2000, {}, 3.0),
    )
    for shape, shapes, bars, least in optimizer_cases:
        out.append(
            Case(
                "kick_drift_",
                "Leapfrog.step",
                shape,
                "float32",
                lambda device, shapes=shapes: optimizer_step(device, shapes),  # type: ignore[misc]
                {"_foreach": least, **bars},
            )
        )
    out.append(
        Case(
            "kick_drift_",
            "training with Leapfrog",
            "SimpleCNN, batch 64",
            "float32",
            training_step,
            {"SGD(momentum)": 1 / 1.05},
        )
    )
    return out


def full_cases() -> list[Case]:
    """The lines that `--suite full` adds: exact steps, and the host cost of many small tensors."""
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
