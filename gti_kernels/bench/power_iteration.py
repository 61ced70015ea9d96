"""The lines of `gti bench` for power_iteration; with `--suite full` on a CPU also from a cold start
to a stated error, half precision, a short side, and the parametrization."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

import gti_kernels as gti

from .case import RESNET18_WEIGHTS, Case, Work


def _eager_power(matrices: list[Tensor], starts: list[Tensor], steps: int) -> list[Tensor]:
    """The loop a good engineer writes: two matrix-vector products a step, W stays in cache
    between."""
    sigmas = []
    for w, v in zip(matrices, starts):
        w_t = w.t()
        for _ in range(steps):
            u = torch.mv(w, v)
            z = torch.mv(w_t, u)
            v = z / torch.linalg.vector_norm(z)
        sigmas.append(torch.linalg.vector_norm(u))
    return sigmas


def _eager_batched_power(w: Tensor, v: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        u = torch.bmm(w, v)
        z = torch.bmm(w.mT, u)
        v = z / torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return torch.linalg.vector_norm(u, dim=1)


def _power_list(device: str, method: str) -> Work:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=generator).to(device) for s in RESNET18_WEIGHTS]
    matrices = [w.flatten(1) for w in weights]
    starts = [torch.randn(w.shape[1], generator=generator).to(device) for w in matrices]
    compiled = torch.compile(_eager_power)
    return Work(
        op=lambda: gti.power_iteration(weights, method=method, max_steps=10, tol=0),
        peers={
            "eager mv": lambda: _eager_power(matrices, starts, 10),
            "compiled mv": lambda: compiled(matrices, starts, 10),
            "svdvals": lambda: [torch.linalg.svdvals(w)[0] for w in matrices],
        },
        bytes_moved=10 * sum(w.numel() * w.element_size() for w in weights),
        few=("svdvals",),
    )


def _power_batch(device: str, method: str) -> Work:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1024, 64, 64, generator=generator).to(device)
    v = torch.randn(1024, 64, 1, generator=generator).to(device)
    compiled = torch.compile(_eager_batched_power)
    return Work(
        op=lambda: gti.power_iteration(w, method=method, max_steps=10, tol=0),
        peers={
            "eager bmm": lambda: _eager_batched_power(w, v, 10),
            "compiled bmm": lambda: compiled(w, v, 10),
            "svdvals": lambda: torch.linalg.svdvals(w)[:, 0],
        },
        bytes_moved=w.numel() * w.element_size(),  # each matrix stays in a core's cache
        few=("svdvals",),
    )


def spectrum(name: str, n: int) -> Tensor | None:
    """Singular values from 1 downwards, or None: those of Gaussian entries."""
    steps = torch.arange(n, dtype=torch.float64) / (n - 1)
    return {"log-uniform": 1e-6**steps, "arithmetic": 1.0 - steps * (n - 1) / n}.get(name)


def matrices_with(name: str, count: int, n: int) -> Tensor:
    """[count, n, n] fp32 with the spectrum of that name and random singular vectors."""
    generator = torch.Generator().manual_seed(0)
    s = spectrum(name, n)
    out = torch.empty(count, n, n)
    for w in out:
        w.normal_(generator=generator)
        if s is not None:
            q, _ = torch.linalg.qr(w.double())
            other, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
            w.copy_((q * s) @ other)
    return out


def true_sigma(w: Tensor) -> float:
    """σ₁ in fp64 by ARPACK."""
    a = w.double().numpy()
    a = a if a.shape[0] <= a.shape[1] else a.T
    operator = LinearOperator((a.shape[0],) * 2, lambda x: a @ (a.T @ x), dtype=np.float64)
    return float(eigsh(operator, k=1, tol=1e-10, return_eigenvectors=False)[0] ** 0.5)


def power_until(matrices: Sequence[Tensor], starts: Sequence[Tensor], tol: float) -> list[Tensor]:
    """The loop of a good engineer that stops on the same residual: W stays in cache between its two
    products and from step to step, and the residual ‖z − θv‖/θ costs nothing more."""
    sigmas = []
    for w, v in zip(matrices, starts):
        w_t, v = w.t(), v / torch.linalg.vector_norm(v)
        for _ in range(100_000):
            u = torch.mv(w, v)
            z = torch.mv(w_t, u)
            theta = torch.dot(u, u)
            if float(torch.linalg.vector_norm(z - theta * v) / theta) <= tol:
                break
            v = z / torch.linalg.vector_norm(z)
        sigmas.append(theta.sqrt())
    return sigmas


def _cold(weights: list[Tensor], tol: float) -> Work:
    """From random vectors to a relative error of σ of 1e-6."""
    result = gti.power_iteration(weights, tol=tol, max_steps=2000)
    matrices = [w.flatten(1) for w in weights]
    for i in range(0, len(weights), 8):
        exact = true_sigma(matrices[i])
        error = abs(float(result.sigma[i, 0]) / exact - 1)
        if error > 1e-6:
            raise RuntimeError(f"matrix {i}: relative error {error:.1e} of σ at residual {tol:.0e}")
    generator = torch.Generator().manual_seed(1)
    starts = [torch.randn(w.shape[1], generator=generator) for w in matrices]
    peers = {
        "svdvals": lambda: [torch.linalg.svdvals(w)[0] for w in matrices],
        "eager mv, same residual": lambda: power_until(matrices, starts, tol),
    }
    op = lambda: gti.power_iteration(weights, tol=tol, max_steps=2000)  # noqa: E731
    return Work(op, peers, few=tuple(peers))


def _cold_list(device: str) -> Work:
    generator = torch.Generator().manual_seed(0)
    return _cold([torch.randn(s, generator=generator) for s in RESNET18_WEIGHTS], 3e-4)


def _cold_batch(name: str, tol: float) -> Callable[[str], Work]:
    return lambda device: _cold(list(matrices_with(name, 64, 1024)), tol)


def _bfloat16(device: str) -> Work:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(4096, 4096, generator=generator).bfloat16()
    start = torch.randn(4096, generator=generator).bfloat16()
    w_t = w.t()

    def eager() -> Tensor:
        v = start
        for _ in range(10):
            u = torch.mv(w, v)
            z = torch.mv(w_t, u)
            v = z / torch.linalg.vector_norm(z)
        return torch.linalg.vector_norm(u)

    op = lambda: gti.power_iteration(w, method="power", max_steps=10, tol=0)  # noqa: E731
    return Work(op, {"eager bf16 mv": eager}, bytes_moved=10 * 2 * w.numel())


def _short_side(device: str) -> Work:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(65536, 64, generator=generator)
    peers = {
        "eigvalsh of the Gram matrix": lambda: torch.linalg.eigvalsh(w.t() @ w)[-1].sqrt(),
        "svdvals": lambda: torch.linalg.svdvals(w)[0],
    }
    return Work(lambda: gti.power_iteration(w), peers, 4 * w.numel(), few=("svdvals",))


def _parametrization(device: str) -> Work:
    """Forward and backward of the weights of all layers, one power step each, in training mode."""
    torch.manual_seed(0)

    def layers(parametrize: Callable[[nn.Module], nn.Module]) -> list[nn.Module]:
        out = []
        for shape in RESNET18_WEIGHTS:
            size = shape[1], shape[0]
            plain = nn.Conv2d(*size, shape[2], bias=False) if len(shape) == 4 else nn.Linear(*size)
            out.append(parametrize(plain))
        return out

    grads = [torch.randn(s) for s in RESNET18_WEIGHTS]

    def step(modules: list[nn.Module]) -> None:
        torch.autograd.backward([m.weight for m in modules], grads)  # type: ignore[arg-type]
        for m in modules:
            m.zero_grad()

    own = layers(gti.nn.spectral_norm)
    peer = layers(torch.nn.utils.parametrizations.spectral_norm)
    return Work(lambda: step(own), {"torch's": lambda: step(peer)})


def default_cases() -> list[Case]:
    """The lines of the default suite."""
    out = []
    resnet, batch = "21 matrices of ResNet-18", "[1024, 64, 64]"
    for method in ("power", "cg"):
        out.append(
            Case(
                "power_iteration",
                f"10 passes, {method}",
                resnet,
                "float32",
                lambda device, method=method: _power_list(device, method),  # type: ignore[misc]
                {"eager mv": 1.8} if method == "power" else {},
            )
        )
        out.append(
            Case(
                "power_iteration",
                f"10 passes, {method}",
                batch,
                "float32",
                lambda device, method=method: _power_batch(device, method),  # type: ignore[misc]
                {"eager bmm": 8.0, "svdvals": 60.0} if method == "power" else {},
            )
        )
    return out


def full_cases() -> list[Case]:
    """The lines that `--suite full` adds."""
    op, bars = "power_iteration", {"svdvals": 15.0, "eager mv, same residual": 8.0}
    resnet = "21 matrices of ResNet-18"
    out = [Case(op, "cold start to error 1e-6", resnet, "float32", _cold_list, bars)]
    for name, tol in (("Gaussian", 3e-4), ("log-uniform", 3e-4), ("arithmetic", 1e-4)):
        shape = f"64 of 1024 x 1024, {name}"
        build = _cold_batch(name, tol)
        out.append(Case(op, "cold start to error 1e-6", shape, "float32", build, bars))
    bars = {"eager bf16 mv": 3.0}
    out.append(Case(op, "10 passes, power", "4096 x 4096", "bfloat16", _bfloat16, bars))
    out.append(Case(op, "one short side", "65536 x 64", "float32", _short_side))
    bars = {"torch's": 2.0}
    name = "nn.spectral_norm, forward and backward"
    return [*out, Case(op, name, resnet, "float32", _parametrization, bars)]
