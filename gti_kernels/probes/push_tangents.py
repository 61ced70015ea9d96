"""Tangents through K steps of the map: exactly, or by central differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.two_form import two_form
from .arguments import finite, whole
from .batch_statistics import join
from .hamiltonian_system import HamiltonianSystem, State, check_system
from .rounding import walk
from .tangent_map import MEMORY, Differentiator, chunk_of, push_step

#: Increments that "fd" tries, in units of ‖z₀‖ / ‖tangent‖, of 1 / ‖tangent‖ where z₀ = 0.
SWEEP = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)


@dataclass(frozen=True)
class PushedTangents:
    """dq, dp: the tangents after K steps, lists over parameters of [m, *shape], fp64.

    method: "forward over reverse", "double backward" or "central differences". chunk: tangents at a
    time. increment: of central differences, in units of `SWEEP`, else 0; kinks: the numbers of the
    tangents whose difference crossed a jump or a kink of the force (of ReLU, max-pool, Huber loss),
    and is not to be trusted. rounding: what rounding explains of a pushed tangent, relative to its
    size.
    """

    dq: list[Tensor]
    dp: list[Tensor]
    method: str
    chunk: int
    increment: float
    kinks: tuple[int, ...]
    rounding: float


def push_tangents(
    system: HamiltonianSystem,
    dq: Tensor | Sequence[Tensor],
    dp: Tensor | Sequence[Tensor],
    dt: float,
    steps: int,
    method: str = "jvp",
    chunk: int | None = None,
    *,
    memory: int = MEMORY,
) -> PushedTangents:
    """(dq, dp) ← DΦ(z₀)·(dq, dp), Φ = Φ_dt^{(K−1)} ∘ … ∘ Φ_dt^{(0)} the K = `steps` steps.

    z₀ = (q, p) is the system's start. In the regime "running" the derivative goes through the
    running statistics too, which depend on the parameters; other buffers that a forward pass writes
    (the vectors of spectral norm, say) count as constants.

    Args:
        dq, dp: m tangents, [m, N] each (N in the order of the parameters), or lists over parameters
            of [m, *shape]; any float dtype, pushed in fp64. Not written.
        method: "jvp" — exact: forward over reverse through the step map. One evaluation of the
            gradient serves all tangents of a chunk, with one batched Hessian-vector product for
            each half kick: 2K of them, and K + 1 where a step's last half kick and the next one's
            first ask for the same: on a single batch, but not in the regime "running", which has
            updated the statistics between them, nor with random layers, which draw anew. A model
            with an op that has no forward rule gets two backward passes for each tangent, with a
            warning; one with an op that cannot be differentiated twice at all is refused, by the
            name of the op. "fd" — central differences, 22K gradients and 4K to 12K for each
            tangent, about half as many where steps share them; the increment is the one of `SWEEP`
            where the difference changes least, and a second difference that does not fall by four
            at each of two halvings tells of a kink.
        chunk: tangents at a time; None: as many as fit `memory` bytes (1 GiB), estimated from what
            one gradient saves of its activations. The result does not depend on it but for
            rounding.

    Returns a `PushedTangents`. TypeError, ValueError: arguments of other shapes, dt not finite,
    steps < 1; RuntimeError: not differentiable. The model is left as it was, whatever happens.

    >>> import torch, gti_kernels as gti
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    >>> batches = [(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(4)]
    >>> system = gti.HamiltonianSystem(model, torch.nn.functional.mse_loss, batches)
    >>> dq, dp = gti.darboux_pairs(system, pairs=2)
    >>> pushed = gti.push_tangents(system, dq, dp, dt=0.05, steps=5)
    >>> omega = gti.two_form(pushed.dq, pushed.dp).omega
    >>> bool((omega - gti.two_form(dq, dp).omega).abs().max() < 1e-13)
    True
    """
    check_system(system)
    dt, steps = finite("dt", dt), whole("steps", steps)
    with torch.inference_mode(False):
        tangents = State(_tangents(system, "dq", dq), _tangents(system, "dp", dp), {})
    if len(tangents.q[0]) != len(tangents.p[0]):
        raise ValueError(
            f"dp: expected as many tangents as dq, {len(tangents.q[0])}, got {len(tangents.p[0])}"
        )
    check_method("method", method)
    if chunk is not None:
        chunk = whole("chunk", chunk)
    memory = whole("memory", memory)
    refuse_sharded(system)
    with system.session():
        return push(system, tangents, dt, steps, method, chunk, memory)


def push(
    system: HamiltonianSystem,
    tangents: State,
    dt: float,
    steps: int,
    method: str,
    chunk: int | None = None,
    memory: int = MEMORY,
) -> PushedTangents:
    """`push_tangents` inside a session, without checks; writes the tangents ("jvp")."""
    z = system.start(torch.float64)
    if method == "fd":
        return _differences(system, z, tangents, dt, steps)
    chunk = chunk_of(system, z, memory) if chunk is None else chunk
    differential = Differentiator(min(chunk, len(tangents.q[0])))
    if system.regime == "running":
        m = len(tangents.q[0])
        for layer in system.layers:
            for name in (join(layer, "running_mean"), join(layer, "running_var")):
                tangents.b[name] = torch.zeros(
                    m, *z.b[name].shape, dtype=torch.float64, device=system.device
                )
    for t in range(steps):
        push_step(system, z, tangents, t, dt, differential)
    return PushedTangents(
        tangents.q,
        tangents.p,
        differential.method,
        differential.chunk,
        0.0,
        (),
        walk(torch.float64, 6 * steps),
    )


def check_method(name: str, method: str) -> None:
    """ValueError unless "jvp" or "fd"."""
    if method not in ("jvp", "fd"):
        raise ValueError(f'{name}: expected "jvp" or "fd", got {method!r}')


def refuse_sharded(system: HamiltonianSystem) -> None:
    """TypeError for parameters that have no second derivatives."""
    if any(hasattr(q, "full_tensor") for q in system.q):
        raise TypeError(
            "system: expected plain parameters, got sharded ones (DTensor), which have no second "
            "derivatives; probe an unsharded copy of the model"
        )


def _tangents(system: HamiltonianSystem, name: str, x: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """[m, *shape] for every parameter, fp64, in the parameter's layout, in memory of their own."""
    if isinstance(x, Tensor):
        if x.ndim != 2 or x.shape[1] != system.size or len(x) == 0:
            raise ValueError(
                f"{name}: expected [m, N] with m >= 1 and N = {system.size}, got {tuple(x.shape)}"
            )
        x = system.unflattened(x)
    if len(x) != len(system.q):
        raise ValueError(
            f"{name}: expected one tensor for each of the {len(system.q)} trainable parameters, "
            f"got {len(x)}"
        )
    for i, (t, q) in enumerate(zip(x, system.q, strict=True)):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name}[{i}]: expected a float tensor, got {got}")
        if t.shape[1:] != q.shape or len(t) == 0 or len(t) != len(x[0]):
            raise ValueError(
                f"{name}[{i}]: expected [m, {', '.join(map(str, q.shape))}] with the same m >= 1 "
                f"in every tensor, got {tuple(t.shape)}"
            )
        if t.device != q.device:
            raise ValueError(f"{name}[{i}]: expected a tensor on {q.device}, got {t.device}")
    return [t.detach().to(torch.float64, copy=True).contiguous() for t in x]


def _differences(
    system: HamiltonianSystem, z: State, s: State, dt: float, steps: int
) -> PushedTangents:
    """(Φ(z + h d) − Φ(z − h d)) / 2h for each tangent d, h = increment · ‖z₀‖ / ‖d‖; 1 for
    ‖z₀‖ = 0."""
    length = math.sqrt(sum(float(x.square().sum()) for x in z.q + z.p)) or 1.0
    m = len(s.q[0])
    generator = torch.Generator().manual_seed(system.seed)
    signs = torch.randint(0, 2, (m,), generator=generator, device="cpu") * 2 - 1

    def image(d: list[Tensor], h: float) -> list[Tensor]:
        end = z.copy()
        for x, y in zip(end.q + end.p, d, strict=True):
            x.add_(y, alpha=h)
        for t in range(steps):
            system.step(end, t, dt)
        return end.q + end.p

    def norm(xs: list[Tensor]) -> float:
        return math.sqrt(sum(float(x.square().sum()) for x in xs))

    def central(d: list[Tensor], h: float) -> tuple[list[Tensor], list[Tensor]]:
        ends = image(d, h), image(d, -h)
        slope = [(a - b) / (2 * h) for a, b in zip(*ends, strict=True)]
        return slope, [a + b for a, b in zip(*ends, strict=True)]

    # The increment: where the derivative of all tangents' sum changes least from one to the next.
    total = [torch.tensordot(signs.to(x), x, dims=1) for x in s.q + s.p]
    scale = length / max(norm(total), torch.finfo(torch.float64).tiny)
    slopes = [central(total, r * scale)[0] for r in SWEEP]
    changes = [
        norm([a - b for a, b in zip(x, y, strict=True)]) for x, y in itertools.pairwise(slopes)
    ]
    increment = SWEEP[1 + min(range(len(changes)), key=changes.__getitem__)]

    here = image(total, 0.0)
    size = max(norm(here), increment * length)  # of the images
    floor = 64 * walk(torch.float64, 6 * steps) * size

    def bend(ends: list[Tensor]) -> float:
        return norm([a - 2 * b for a, b in zip(ends, here, strict=True)])

    def kinked(d: list[Tensor], h: float, ends: list[Tensor]) -> bool:
        # ‖Φ₊ − 2Φ + Φ₋‖ falls by four with half of h where Φ is smooth. A jump of Φ adds a
        # constant, a kink at a distance δ adds a multiple of h − δ, which one halving may not tell.
        coarse = bend(ends)
        for part in (2, 4):
            if not coarse > floor:
                return False
            fine = bend(central(d, h / part)[1])
            if not 3.0 < coarse / max(fine, floor / 64) < 5.0:
                return True
            coarse = fine
        return False

    pushed = State([torch.empty_like(x) for x in s.q], [torch.empty_like(x) for x in s.p], {})
    kinks = []
    for i in range(m):
        d = [x[i] for x in s.q + s.p]
        h = increment * length / max(norm(d), torch.finfo(torch.float64).tiny)
        slope, ends = central(d, h)
        for out, x in zip(pushed.q + pushed.p, slope, strict=True):
            out[i] = x
        if kinked(d, h, ends):
            kinks.append(i)
    rounding = walk(torch.float64, 6 * steps) / increment
    return PushedTangents(
        pushed.q, pushed.p, "central differences", 1, increment, tuple(kinks), rounding
    )


def volume_change(
    before: tuple[Sequence[Tensor], Sequence[Tensor]],
    after: tuple[Sequence[Tensor], Sequence[Tensor]],
    *,
    backend: str = "auto",
) -> Tensor:
    """log of the ratio of the m-volumes that m tangents span, after and before a map.

        ½ log det S₁ − ½ log det S₀,   S_ij = dq_i·dq_j + dp_i·dp_j

    before, after: (dq, dp), as `two_form` takes them; e.g. the arguments and the result of
    `push_tangents`. All 2N tangents together give log |det DΦ|: −γ K dt N for a conformally
    symplectic map, 0 for a symplectic one. A subspace may stretch or shrink under either.

    Returns an fp64 tensor, 0-d or [B] for a batch; NaN for NaN. S comes from `two_form` with full
    precision; the logarithm's error is about u times the condition number of S, so tangents that
    have become dependent give −inf or a number that is rounding. Errors as of `two_form`, and
    ValueError for another number of tangents after than before.

    >>> import torch, gti_kernels as gti
    >>> q, p = torch.eye(2, 4), torch.zeros(2, 4)
    >>> gti.volume_change((q, p), (2.0 * q, p))  # log 4
    tensor(1.3863, dtype=torch.float64)
    """
    metrics = [two_form(*x, metric=True, backend=backend).metric for x in (before, after)]
    if metrics[0].shape != metrics[1].shape:
        raise ValueError(
            f"after: expected as many tangents as before, {tuple(metrics[0].shape[:-1])}, got "
            f"{tuple(metrics[1].shape[:-1])}"
        )
    halves = []
    for metric in metrics:
        sign, log = torch.linalg.slogdet(metric)
        halves.append(0.5 * torch.where(sign > 0, log, torch.where(log.isnan(), log, -math.inf)))
    return halves[1] - halves[0]
