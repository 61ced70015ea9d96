"""Small systems that the tests of the probes share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gti_kernels.models.simple_cnn import SimpleCNN
from gti_kernels.probes.hamiltonian_system import HamiltonianSystem


class Quadratic(nn.Module):
    """L = ½ wᵀ A w, where the batch is the matrix A."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())

    def forward(self, a: Tensor) -> Tensor:
        return 0.5 * self.w @ a @ self.w


def value(output: Tensor, _target: Tensor) -> Tensor:
    return output


def spd(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return b @ b.T / n + torch.eye(n, dtype=torch.float64)


def quadratic_system(batches: int = 3, n: int = 5, **options) -> HamiltonianSystem:
    model = Quadratic(torch.linspace(-1, 1, n, dtype=torch.float64))
    data = [(spd(n, seed), torch.zeros(())) for seed in range(batches)]
    return HamiltonianSystem(model, value, data, **{"inv_mass": 0.5, "temperature": 0.1, **options})


def images(count: int = 4, size: int = 16, classes: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(size, 1, 8, 8, generator=generator),
            torch.randint(0, classes, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def cnn(norm: str) -> nn.Module:
    torch.manual_seed(1)
    model = SimpleCNN(1, 4, norm, width=4)
    for x, _ in images():  # running statistics of the data, not those of initialisation
        model.train()(x)
    return model


def cnn_system(norm: str, **options) -> HamiltonianSystem:
    regime = {"running": "running", "frozen": "frozen"}.get(norm, "batch")
    return HamiltonianSystem(cnn(norm), F.cross_entropy, images(), regime=regime, **options)


def reference_step(
    z: Tensor, b: tuple[Tensor, Tensor], x: Tensor, y: Tensor, dt: float, regime: str
) -> Tensor:
    """One step of Linear(3→4)–BatchNorm–tanh–Linear(4→2) by hand; z = (q, p, mean, var), M = 1."""
    n = 12 + 4 + 4 + 8 + 2
    q, p, mean, var = z[:n], z[n : 2 * n], z[2 * n : 2 * n + 4], z[2 * n + 4 :]

    def hidden(q: Tensor) -> Tensor:
        return x @ q[:12].reshape(4, 3).T

    if regime == "running":
        h = hidden(q)
        mean, var = 0.9 * mean + 0.1 * h.mean(0), 0.9 * var + 0.1 * h.var(0)
    if regime == "frozen":
        mean, var = b

    def force(q: Tensor) -> Tensor:
        own = q.clone()  # ∂L/∂q alone: `mean` and `var` depend on q, not on this copy
        h = hidden(own)
        m, v = (h.mean(0), h.var(0, unbiased=False)) if regime == "batch" else (mean, var)
        h = torch.tanh((h - m) / torch.sqrt(v + 1e-5) * own[12:16] + own[16:20])
        out = h @ own[20:28].reshape(2, 4).T + own[28:]
        return torch.autograd.grad(((out - y) ** 2).mean(), own, create_graph=True)[0]

    p = p - dt / 2 * force(q)
    q = q + dt * p
    p = p - dt / 2 * force(q)
    return torch.cat([q, p, mean, var])
