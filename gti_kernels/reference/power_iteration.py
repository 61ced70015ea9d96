"""Top singular triples in plain torch, one matrix at a time."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from ..conventions import compute_dtype

#: Yields x, is sent (W x, WᵀW x), returns u, v, σ, residual, steps, converged; see `iterate`.
Iteration = Generator[Tensor, tuple[Tensor, Tensor], tuple[Tensor, ...]]


def power_iteration(
    weights: list[Tensor],
    k: int,
    method: str,
    max_steps: int,
    tol: float,
    start: list[Tensor] | None,
    seed: int,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """σ [M, k], u, v (lists of [B, m, k], [B, n, k]), residual [M, k], steps, converged, upper [M].

    weights: tensors [B, m, n], each with its own B, m, n and dtype, M matrices in all; start:
    tensors [B, n, k] or None (random, see `start_vectors`). σ, residual and upper are fp64. See
    `gti_kernels.power_iteration` for the mathematics.
    """
    u: list[Tensor] = []
    v: list[Tensor] = []
    scalars: list[tuple[Tensor, ...]] = []
    index = 0
    for t, w_t in enumerate(weights):
        _, m, n = w_t.shape
        us, vs = [], []
        for b in range(w_t.shape[0]):
            v0 = start_vectors(seed, index, n, k, w_t.device) if start is None else start[t][b]
            u_b, v_b, *rest = _one(w_t[b], v0, k, method, max_steps, tol)
            us.append(u_b)
            vs.append(v_b)
            scalars.append(tuple(rest))
            index += 1
        c = compute_dtype(w_t.dtype)
        u.append(torch.stack(us) if us else w_t.new_empty(0, m, k, dtype=c))
        v.append(torch.stack(vs) if vs else w_t.new_empty(0, n, k, dtype=c))
    device = weights[0].device
    if not scalars:
        double = torch.empty(0, k, dtype=torch.float64, device=device)
        count = torch.empty(0, dtype=torch.int64, device=device)
        return double, u, v, double.clone(), count, count.bool(), double[:, 0].clone()
    sigma, residual, steps, converged, upper = (torch.stack(x) for x in zip(*scalars, strict=True))
    return sigma, u, v, residual, steps, converged, upper


def start_vectors(seed: int, matrix: int, n: int, k: int, device: torch.device) -> Tensor:
    """[n, k] fp32 numbers, uniform on (−1, 1), from a counter: the same bits on every backend.

    Element e = row·k + column of matrix number `matrix` is the splitmix64 finaliser (Steele, Lea,
    Flood 2014) of seed, matrix and e; its top 24 bits make the number, exact in fp32.
    """
    mask = (1 << 64) - 1
    base = (seed * 0x9E3779B97F4A7C15 + matrix * 0xD1342543DE82EF95) & mask
    x = torch.arange(1, n * k + 1, dtype=torch.int64, device=device) * _signed(0x94D049BB133111EB)
    x = x + _signed(base)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ _shift(x, 31)
    return ((_shift(x, 40).to(torch.float32) * 2.0 + 1.0) * 2.0**-24 - 1.0).reshape(n, k)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical, not arithmetic


def _one(
    w: Tensor, v0: Tensor, k: int, method: str, max_steps: int, tol: float
) -> tuple[Tensor, ...]:
    """u [m, k], v [n, k], σ [k], residual [k], steps, converged, upper of one matrix w [m, n]."""
    m, n = w.shape
    c = compute_dtype(w.dtype)
    largest = w.abs().max().double()
    if not bool(torch.isfinite(largest)):
        nan = float("nan")
        nans = w.new_full((k,), nan, dtype=torch.float64)
        return (
            w.new_full((m, k), nan, dtype=c),
            w.new_full((n, k), nan, dtype=c),
            nans,
            nans,
            torch.tensor(0, device=w.device),
            torch.tensor(False, device=w.device),
            nans[0],
        )
    # A power of two brings the largest entry to [1, 2): no overflow, not a bit of W is changed.
    scale = 2.0 ** (torch.floor(torch.log2(largest))) if largest > 0 else torch.ones_like(largest)
    a = (w.to(torch.float64) / scale).to(c)

    iteration = iterate(v0.to(c), method, max_steps, tol)
    x = next(iteration)
    while True:
        y = a @ x
        try:
            x = iteration.send((y, a.T @ y))
        except StopIteration as end:
            u, v, sigma, residual, steps, converged = end.value
            break
    a64 = a.double().abs()
    frobenius = torch.linalg.vector_norm(a64)
    one_inf = (a64.sum(0).max() * a64.sum(1).max()).sqrt()
    upper = torch.minimum(frobenius, one_inf) * (1 + 4 * torch.finfo(c).eps)
    return u, v, sigma * scale, residual, steps, converged, upper * scale


def iterate(v0: Tensor, method: str, max_steps: int, tol: float) -> Iteration:
    """The iteration on an operator W that is known by its products alone.

    A generator: it yields x [n, j], j ≤ k, and expects the images y = W x [m, j] and z = Wᵀy [n, j]
    to be sent; this is one pass. It returns u [m, k], v [n, k], σ [k], residual [k], steps,
    converged. v0: [n, k], fp32 or fp64, the type of all vectors; σ and residual are fp64.
    """
    n, k = v0.shape
    c = v0.dtype
    v = _orthonormal(v0, [])
    y, z = yield v
    m = y.shape[0]
    s = v.new_zeros(n, 0)
    y_s, z_s = y.new_zeros(m, 0), z.new_zeros(n, 0)
    steps = 1
    while True:
        theta, rotation = torch.linalg.eigh(y.double().T @ y.double())
        theta, rotation = theta.flip(0), rotation.flip(1).to(c)
        v, y, z = v @ rotation, y @ rotation, z @ rotation
        r = z - v * theta.to(c)
        length = torch.linalg.vector_norm(r, dim=0)
        residual = torch.zeros_like(length) if theta[0] == 0 else (length / theta[0]).to(c)
        converged = bool((residual <= tol).all())
        if steps == max_steps or (converged and tol > 0):
            break
        if method == "power":
            v = _orthonormal(z, [])
            y, z = yield v
        else:
            # Locally optimal: the best V in span[V, R, S]. The residual R of a Ritz basis is
            # orthogonal to the old span, so only R needs orthonormalising, and only R a pass.
            r = _orthonormal(r, [v, s], complete=False)
            y_r, z_r = yield r
            basis = [torch.cat(x, 1) for x in ([v, r, s], [y, y_r, y_s], [z, z_r, z_s])]
            _, vectors = torch.linalg.eigh(basis[1].double().T @ basis[1].double())
            top = vectors.flip(1)[:, :k]
            top = top * torch.where(top.diagonal() < 0, -1.0, 1.0)  # v keeps its sign
            step = top.clone()
            step[:k] = 0.0  # the move away from V; in coordinates, orthonormal to the new V
            s_top = _orthonormal(step, [top], complete=False)
            v, y, z = (x @ top.to(c) for x in basis)
            s, y_s, z_s = (x @ s_top.to(c) for x in basis)
        steps += 1

    sigma = torch.linalg.vector_norm(y, dim=0)
    keep = sigma > sigma.max() * min(torch.finfo(c).eps * max(m, n), 0.01)
    u = _orthonormal(torch.where(keep, y / torch.where(keep, sigma, 1.0), 0.0), [])
    return (
        u,
        v,
        sigma.double(),
        residual.double(),
        torch.tensor(steps, device=v.device),
        torch.tensor(converged, device=v.device),
    )


def _orthonormal(x: Tensor, against: list[Tensor], complete: bool = True) -> Tensor:
    """Columns of x made orthonormal, and orthogonal to the blocks in `against`.

    A column that leaves nothing is replaced by a column of a fixed random basis (complete=True),
    or dropped. Gram–Schmidt twice is enough (Giraud, Langou, Rozložník 2005).
    """
    done: list[Tensor] = []
    fill = iter(start_vectors(0, -1, x.shape[0], x.shape[1] + 1, x.device).to(x.dtype).T)
    for column in x.T:
        while True:
            before = torch.linalg.vector_norm(column)
            column = column / before.clamp(min=torch.finfo(x.dtype).tiny)
            for _ in range(2):
                for block in [*against, *(d.unsqueeze(1) for d in done)]:
                    column = column - block @ (block.T @ column)
            after = torch.linalg.vector_norm(column)
            if before > 0 and after > 100 * torch.finfo(x.dtype).eps:
                column = column / after
                for block in [*against, *(d.unsqueeze(1) for d in done)]:
                    column = column - block @ (block.T @ column)
                done.append(column / torch.linalg.vector_norm(column))
                break
            if not complete:
                break
            column = next(fill)
    return torch.stack(done, 1) if done else x.new_zeros(x.shape[0], 0)
