"""The lines of `gti bench` for two_form; with `--suite full` on a CPU also gram and tangents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import gti_kernels as gti

from ..models.simple_cnn import SimpleCNN
from ..probes.hamiltonian_system import HamiltonianSystem, State
from ..probes.tangent_map import Differentiator, force
from .case import Case, Work

READ_BYTES = 700_000_000  # of all inputs


def two_form(device: str, m: int, n: int) -> Work:
    """two_form of m pairs of tangent vectors of length n, fp32."""
    generator = torch.Generator(device).manual_seed(0)
    dq = torch.randn(m, n, generator=generator, device=device)
    dp = torch.randn(m, n, generator=generator, device=device)

    def naive(dq: Tensor, dp: Tensor) -> Tensor:
        return dq @ dp.T - dp @ dq.T

    def upcast() -> Tensor:
        q, p = dq.double(), dp.double()
        return q @ p.T - p @ q.T

    compiled = torch.compile(naive)
    return Work(
        op=lambda: gti.two_form(dq, dp),
        peers={
            "naive fp32": lambda: naive(dq, dp),
            "upcast to fp64": upcast,
            "compiled naive": lambda: compiled(dq, dp),
        },
        bytes_moved=2 * dq.numel() * dq.element_size(),
    )


def _read(m: int) -> Work:
    """two_form beside its peers and one read of the inputs by torch's fastest reduction."""
    n = READ_BYTES // (2 * m * 4)
    work = two_form("cpu", m, n)
    x = torch.randn(2 * m * n)
    peers = {k: v for k, v in work.peers.items() if k != "compiled naive"}
    return Work(work.op, {**peers, "one read": lambda: torch.dot(x, x)}, work.bytes_moved)


def _gram(m: int, n: int) -> Work:
    """gram with weights beside the product in fp32 and in fp64."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(m, n, generator=generator)
    w = torch.rand(n, generator=generator)

    def upcast() -> Tensor:
        wide = a.double()
        return (wide * w.double()) @ wide.T

    return Work(
        op=lambda: gti.gram(a, weight=w),
        peers={"naive fp32": lambda: (a * w) @ a.T, "upcast to fp64": upcast},
        bytes_moved=a.numel() * 4,
    )


def certificate_system(batches: int) -> HamiltonianSystem:
    """The CNN of the certificate (group norm) on images of the digits' size, batches of 32."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = SimpleCNN(1, 10, "group")
    data = [
        (
            torch.randn(32, 1, 8, 8, generator=generator),
            torch.randint(0, 10, (32,), generator=generator),
        )
        for _ in range(batches)
    ]
    return HamiltonianSystem(model, F.cross_entropy, data)


def _push(pairs: int, steps: int, batches: int) -> Work:
    """push_tangents of 2k tangents beside one gradient for each tangent and step."""
    system = certificate_system(batches)
    dq, dp = gti.darboux_pairs(system, pairs)

    def gradients() -> None:
        with system.session():
            z = system.start(torch.float64)
            for t in range(steps):
                for _ in range(2 * pairs):
                    system.gradient(z, t)

    return Work(
        op=lambda: gti.push_tangents(system, dq, dp, 0.05, steps),
        peers={"gradient/tangent/step": gradients},
    )


def _epsilon(pairs: int, steps: int, batches: int) -> Work:
    """ε_Ω beside the gradients and Hessian-vector products that it cannot do without: two
    evaluations a step, and one, and one to begin with, where the batch stays."""
    system = certificate_system(batches)
    tangents = State(*gti.darboux_pairs(system, pairs), {})
    visits = range(steps + 1) if batches == 1 else [t for t in range(steps) for _half in (0, 1)]

    def derivatives() -> None:
        with system.session():
            z = system.start(torch.float64)
            differential = Differentiator(2 * pairs)
            for t in visits:
                force(system, z, tangents, t, differential)

    return Work(
        op=lambda: gti.omega_invariance(system, 0.05, steps, pairs),
        peers={"gradients and HVPs": derivatives},
    )


def default_cases() -> list[Case]:
    """The lines of the default suite."""
    out = []
    out.append(
        Case(
            "two_form",
            "fp64 accumulation",
            "m = 4, N = 11 M",
            "float32",
            lambda device: two_form(device, 4, 11_000_000),
            {"naive fp32": 2.0, "upcast to fp64": 8.0},
        )
    )
    return out


def full_cases() -> list[Case]:
    """The lines that `--suite full` adds."""
    out = []
    for m, most in ((4, 1.2), (8, 1.5), (16, 2.2)):
        bars = {"one read": 1 / most, "upcast to fp64": 6.0}
        if m == 4:
            bars["naive fp32"] = 2.0
        out.append(
            Case(
                "two_form",
                "fp64 accumulation",
                f"m = {m}, 700 MB",
                "float32",
                lambda _device, m=m: _read(m),  # type: ignore[misc]
                bars,
            )
        )
    out.append(
        Case("gram", "weighted", "m = 8, N = 5 M", "float32", lambda _device: _gram(8, 5_000_000))
    )
    # The inverse of a ratio of push_tangents is its cost in gradients per tangent and step.
    for kind, batches in (("one batch", 1), ("new batches", 4)):
        shape = f"SimpleCNN, {kind} of 32, 5 steps"
        out.append(
            Case(
                "two_form",
                "push_tangents, 8 tangents",
                shape,
                "float64",
                lambda _device, batches=batches: _push(4, 5, batches),  # type: ignore[misc]
                {"gradient/tangent/step": 1 / 2.5},
            )
        )
        out.append(
            Case(
                "two_form",
                "ε_Ω, 4 pairs",
                shape,
                "float64",
                lambda _device, batches=batches: _epsilon(4, 5, batches),  # type: ignore[misc]
                {"gradients and HVPs": 1 / 1.3},
            )
        )
    return out
