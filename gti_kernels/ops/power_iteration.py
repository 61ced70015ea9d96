"""Top singular values and vectors of many weight matrices in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends
from ..conventions import compute_dtype
from ..reference import power_iteration as reference
from .arguments import check_float_tensors, subclasses, tensor_list
from .library import is_plain_eager, refuse_derivative, refuse_lost_derivatives, register
from .results import Field, Result
from .singular_vectors import attached

#: The largest k of a kernel.
_MOST_TRIPLES = {"cpu": 16, "triton": 8, "cuda": 8}
Outputs = tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor, Tensor, Tensor]


class SingularTriples(Result):
    """Result of `power_iteration`, detached. Leading axes "…" are those of a batched tensor, or [L]
    for a list of L weights (then u and v are lists)."""

    sigma = Field()  #: […, k], descending up to rounding
    u = Field()  #: […, m, k] left singular vectors, orthonormal columns
    v = Field()  #: […, n, k] right singular vectors, orthonormal columns
    residual = Field()  #: […, k]  ‖WᵀWv − θv‖ / θ₁, θ = vᵀWᵀWv
    steps = Field()  #: […] int64, passes over W
    converged = Field()  #: […] bool, all residuals ≤ tol
    upper = Field()  #: […]  min(‖W‖_F, √(‖W‖₁‖W‖_∞)) ≥ σ₁; of subnormal numbers to a unit


def power_iteration(
    weights: Tensor | Sequence[Tensor],
    *,
    k: int = 1,
    method: str = "cg",
    max_steps: int = 200,
    tol: float = 1e-4,
    start: SingularTriples | None = None,
    seed: int = 0,
    backend: str = "auto",
) -> SingularTriples:
    """The k largest singular triples of each matrix: W v = σ u, Wᵀu = σ v.

    Iterates on A = WᵀW; one pass over W yields z = Wᵀ(W v) and is one step. method="power" takes v
    ← z/‖z‖. method="cg" is the locally optimal three-term recurrence (LOBPCG of block size k
    without preconditioner; Knyazev 2001): the best v in span[v, r, s], r the residual, s the last
    move; it needs about a sixth of the steps. Each matrix stops when its residual ‖WᵀWv − θv‖/θ is
    at most tol.

    Args:
        weights: [m, n], or a batch [..., m, n], or a list of L tensors of at least 2 dims, each
            read as [out, −1] (of a convolution this is the norm of the reshaped kernel, not of the
            convolution operator). Shapes and dtypes of a list may differ: fp64, fp32, bf16, fp16.
        k: number of triples, 1 ≤ k ≤ min(m, n).
        max_steps: most passes over a matrix. tol: on the residual; 0 means exactly max_steps
            passes.
        start: an earlier result for weights of the same shapes, on any device and of any dtype;
            its v is where the iteration begins. (Under torch.compile(fullgraph=True), one of an
            eager call whose v has been read once.) A v that is still a singular vector, but no
            longer that of the largest σ (a step along u vᵀ does that), has no residual and is not
            left. Otherwise v is random from `seed` and the number of the matrix.
        backend: "auto", "reference", "cpu" (k ≤ 16), "triton" or "cuda" (k ≤ 8); see
            `gti_kernels.explain`.

    Returns:
        SingularTriples. Vectors are fp32 (fp64 for fp64 weights), sigma, residual and upper too
        (fp64 if any weight is). σ = ‖Wv‖ never exceeds the true σ₁ beyond rounding; its error is
        second order in the residual, that of u and v first order. In fp64 a σ below some 1e-8 σ₁ is
        rounding (its square is below that of WᵀW): such ones may not descend, nor have W v = σ u.
        W = 0 gives σ = 0 with unit vectors. NaN or Inf in a matrix gives NaN and converged False
        for it alone. Slow convergence does not raise.

    Raises:
        TypeError, ValueError: the argument, what was expected, what came. RuntimeError: transformed
        by torch.func (use `top_singular_values`), or the named backend cannot run.

    >>> import torch, gti_kernels as gti
    >>> r = gti.power_iteration(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    >>> round(float(r.sigma), 4), bool(r.converged)
    (3.0, True)
    """
    usual = type(k) is type(max_steps) is type(seed) is int and type(tol) in (float, int)
    usual = usual and (start is None or isinstance(start, SingularTriples))
    if usual and backend in ("auto", "cpu") and is_plain_eager():
        out = _on_cpu(weights, start and start.v, k, method, max_steps, tol, seed)
        if out is not None:
            return SingularTriples.from_kernel(*out)
    _check_settings(k, method, max_steps, tol, seed)
    ws, batched = _weight_list(weights)
    with torch.no_grad():
        starts = _starts(start, ws, batched, k)
        options = (batched, k, method, max_steps, float(tol), starts, _int64(seed), backend)
        if is_plain_eager() and not ws[0].is_meta:
            out = _power_iteration(ws, *options)
        else:
            refuse_derivative("power_iteration", ws, "Use gti_kernels.top_singular_values")
            out = torch.ops.gti_kernels.power_iteration(ws, *options)
    sigma, u, v, residual, steps, converged, upper = out
    if not batched:
        return SingularTriples(sigma, u, v, residual, steps, converged, upper)
    batch = ws[0].shape[:-2]
    return SingularTriples(
        sigma.view(*batch, k),
        u[0].view(*batch, ws[0].shape[-2], k),
        v[0].view(*batch, ws[0].shape[-1], k),
        residual.view(*batch, k),
        steps.view(batch),
        converged.view(batch),
        upper.view(batch),
    )


def top_singular_values(
    weights: Tensor | Sequence[Tensor],
    *,
    k: int = 1,
    method: str = "cg",
    max_steps: int = 200,
    tol: float = 1e-4,
    start: SingularTriples | None = None,
    seed: int = 0,
    backend: str = "auto",
) -> Tensor:
    """The k largest singular values of each matrix, differentiable: dσ/dW = u vᵀ.

    Arguments as in `power_iteration`; returns its sigma, […, k] or [L, k]. The derivative is exact
    for a simple σ up to the error of u and v (first order in the residual); at a tie it is one
    element of the subdifferential. Derivatives of any order are those of σ: a second one solves a
    dense fp64 system of the smaller side of each matrix, and is huge, infinite or NaN where σ is
    zero or not simple. For it, weights that require grad are kept for backward and must not be
    written before it. Works with backward, torch.func.grad, vmap and jvp (but not jvp of jvp), and
    under torch.compile(fullgraph=True), there for first derivatives: a second one of a compiled
    function torch refuses, but backend="eager" gives it without that of u and v, wrong. Transforms
    of torch.func inside a compiled function are left to eager mode, so not with fullgraph.

    >>> import torch, gti_kernels as gti
    >>> W = torch.diag(torch.tensor([3.0, 1.0])).requires_grad_()
    >>> gti.top_singular_values(W, tol=1e-6).sum().backward()
    >>> W.grad.round(decimals=3).abs()
    tensor([[1., 0.],
            [0., 0.]])
    """
    sigma, *_ = sigma_with_vectors(weights, k, method, max_steps, tol, start, seed, backend)
    return sigma.reshape(*weights.shape[:-2], k) if isinstance(weights, Tensor) else sigma


def sigma_with_vectors(
    weights: Tensor | Sequence[Tensor],
    k: int,
    method: str,
    max_steps: int,
    tol: float,
    start: SingularTriples | None,
    seed: int,
    backend: str,
) -> tuple[Tensor, ...]:
    """σ [M, k], differentiable, then u and v of each weight, detached: for a next start."""
    _check_settings(k, method, max_steps, tol, seed)
    backends.check_name("power_iteration", backend)
    ws, batched = _weight_list(weights)
    refuse_lost_derivatives("top_singular_values", ws)
    starts = _starts(start, ws, batched, k)
    options = (batched, k, method, max_steps, float(tol), _int64(seed), backend, len(ws))
    # A Function with a jvp breaks fullgraph compilation, so the compiler sees one without.
    function = _Sigma if torch.compiler.is_compiling() else _SigmaForward
    return function.apply(options, *ws, *starts)


def start_from(v: Tensor | Sequence[Tensor]) -> SingularTriples:
    """A result of which only v is known: enough for `start`."""
    nothing: Any = None
    return SingularTriples(nothing, nothing, v, nothing, nothing, nothing, nothing)


def _check_settings(k: int, method: str, max_steps: int, tol: float, seed: int) -> None:
    if type(k) is not int or k < 1:
        raise ValueError(f"power_iteration: k must be an integer >= 1, got {k!r}")
    if method not in ("cg", "power"):
        raise ValueError(f"power_iteration: method must be 'cg' or 'power', got {method!r}")
    if not isinstance(max_steps, int) or not 1 <= max_steps < 2**63:
        raise ValueError(
            f"power_iteration: max_steps must be an integer >= 1 and < 2**63, got {max_steps!r}"
        )
    if not (isinstance(tol, (int, float)) and 0 <= tol < math.inf):
        raise ValueError(
            f"power_iteration: tol must be finite and at least 0, an int or a float, got {tol!r}"
        )
    if not isinstance(seed, int):
        raise TypeError(f"power_iteration: seed must be an integer, got {seed!r}")


def _int64(seed: int) -> int:
    """The seed modulo 2⁶⁴, signed."""
    return (seed + 2**63) % 2**64 - 2**63


def _weight_list(weights: Tensor | Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    """A list of weights, each one matrix [out, −1] (False), or one batch [..., m, n] (True)."""
    batched = isinstance(weights, Tensor)
    ws = tensor_list(weights)
    if not ws:
        raise ValueError("power_iteration: weights must not be an empty list")
    check_float_tensors("power_iteration", weights=ws)
    for i, w in enumerate(ws):
        if w.is_nested:
            raise TypeError(
                f"power_iteration: weights[{i}] must be a dense tensor, got a nested tensor. Pass "
                f"the list of its parts, .unbind()"
            )
        if w.ndim < 2:
            raise ValueError(
                f"power_iteration: weights[{i}] must have at least 2 dims, got shape "
                f"{tuple(w.shape)}. Leave biases and normalisation parameters out"
            )
    return ws, batched


def _sizes(w: Tensor, batched: bool) -> tuple[int, int, int]:
    """B, m, n: how many matrices of which shape a weight holds."""
    if batched:
        return math.prod(w.shape[:-2]), w.shape[-2], w.shape[-1]
    return 1, w.shape[0], math.prod(w.shape[1:])


def _starts(start: SingularTriples | None, ws: list[Tensor], batched: bool, k: int) -> list[Tensor]:
    """The right vectors of an earlier result as tensors [B, n, k] of the compute type."""
    if start is None:
        return []
    if not isinstance(start, SingularTriples):
        raise TypeError(
            f"power_iteration: start must be an earlier result, got {type(start).__name__}"
        )
    vs = tensor_list(start.v)
    if len(vs) != len(ws):
        raise ValueError(
            f"power_iteration: start must be a result for {len(ws)} weights, got one for {len(vs)}"
        )
    out = []
    for i, (v, w) in enumerate(zip(vs, ws)):
        b, _, n = _sizes(w, batched)
        if v.numel() != b * n * k or (v.ndim > 1 and v.shape[-2:] != (n, k)):
            raise ValueError(
                f"power_iteration: start.v[{i}] must hold {k} vectors of length {n} for each of "
                f"{b} matrices, got shape {tuple(v.shape)}"
            )
        v = v.detach().reshape(b, n, k).to(w.device, compute_dtype(w.dtype))
        out.append(v.contiguous())
    return out


def limits_of_power_iteration(
    weights: Tensor | Sequence[Tensor], *, k: int = 1, **_: Any
) -> tuple[torch.device, dict[str, str]]:
    """Checks the arguments; the device, and backend → why it cannot take this call."""
    ws, batched = _weight_list(weights)
    for i, w in enumerate(ws):
        m, n = _sizes(w, batched)[1:]
        if not isinstance(k, int) or not 1 <= k <= min(m, n):
            raise ValueError(
                f"power_iteration: k must be an integer between 1 and min(m, n) = {min(m, n)} of "
                f"weights[{i}], got {k!r}"
            )
    reason = subclasses(weights=ws)
    limits = {} if reason is None else dict.fromkeys(_MOST_TRIPLES, reason)
    for backend, most in _MOST_TRIPLES.items():
        if k > most:
            limits[backend] = f"it finds at most {most} triples a matrix"
    return ws[0].device, limits


def note(
    backend: str,
    /,
    weights: Tensor | Sequence[Tensor],
    *,
    k: int = 1,
    method: str = "cg",
    max_steps: int = 200,
    tol: float = 1e-4,
    start: SingularTriples | None = None,
    seed: int = 0,
    **_: Any,
) -> str:
    """Where a call starts from, for `explain`."""
    _check_settings(k, method, max_steps, tol, seed)
    ws, batched = _weight_list(weights)
    _starts(start, ws, batched, k)
    sizes = [(w.dtype.itemsize, *_sizes(w, batched)) for w in ws]
    count, others = sum(b for _, b, *_ in sizes), "at random"
    if start is not None:
        others = "from the earlier result"
    if backend in ("triton", "cuda"):
        # An estimate, not measured: Jacobi rotations of a Gram matrix of 64 rows are hundreds of
        # rounds with a barrier each.
        return (
            f"{count} of {count} matrices start {others}: on a GPU none from the Gram matrix of a "
            "short side, whose eigenvectors are estimated to take as long as the steps they save"
        )
    if backend != "cpu":
        return ""
    assert backends.compiled is not None
    uses_gram = backends.compiled.power_iteration_uses_gram
    settings = (k, method, max_steps, float(tol), start is not None)
    gram = sum(b for size, b, m, n in sizes if uses_gram(size, m, n, *settings))
    return (
        f"{gram} of {count} matrices start from the Gram matrix of their short side, "
        f"the others {others}"
    )


def _power_iteration(
    weights: list[Tensor],
    batched: bool,
    k: int,
    method: str,
    max_steps: int,
    tol: float,
    start: list[Tensor],
    seed: int,
    backend: str,
) -> Outputs:
    """σ [M, k], u and v (lists of [m, k], [n, k]; batched: [B, m, k], [B, n, k]), residual [M, k],
    steps, converged and upper [M] of M matrices."""
    device, limits = limits_of_power_iteration(weights[0] if batched else list(weights), k=k)
    chosen = backends.choose("power_iteration", device, backend, limits)
    weights = [w.clone() if w._is_zerotensor() else w for w in weights]  # zeros without memory
    flat = [w.reshape(_sizes(w, batched)).contiguous().resolve_neg() for w in weights]
    if chosen == "cpu":
        ws = flat[0] if batched else [w[0] for w in flat]
        vs = None if not start else start[0] if batched else start
        out = _on_cpu(ws, vs, k, method, max_steps, tol, seed)
        assert out is not None, "the compiled kernel takes whatever passes the checks"
        sigma, u, v, *rest = SingularTriples.from_kernel(*out)
        return (sigma, [u], [v], *rest) if batched else (sigma, u, v, *rest)
    settings = (k, method, max_steps, tol, start or None, seed)
    if chosen == "triton":
        from ..triton_kernels import power_iteration as triton

        out = triton.power_iteration(flat, *settings)
    elif chosen == "cuda":
        from ..cuda_kernels import power_iteration as cuda

        out = cuda.power_iteration(flat, *settings)
    else:
        with torch.autocast(device.type, enabled=False):
            out = reference.power_iteration(flat, *settings)
    sigma, u, v, residual, steps, converged, upper = out
    if not batched:
        u, v = [x.squeeze(0) for x in u], [x.squeeze(0) for x in v]
    real = _result_dtype(weights)
    return sigma.to(real), u, v, residual.to(real), steps, converged, upper.to(real)


def _on_cpu(
    weights: Any, start: Any, k: int, method: Any, max_steps: Any, tol: Any, seed: Any
) -> Any:
    """The fields of the result, or None where the compiled part is missing or something is odd."""
    if backends.compiled is None:
        return None
    try:
        return backends.compiled.power_iteration(
            weights, start, k, method, max_steps, tol, seed & (2**64 - 1), torch.get_num_threads()
        )
    except TypeError:  # a setting of another type: the checks have the words
        return None


def _result_dtype(weights: list[Tensor]) -> torch.dtype:
    """fp64 if any weight is, else fp32."""
    double = any(w.dtype == torch.float64 for w in weights)
    return torch.float64 if double else torch.float32


class _Sigma(torch.autograd.Function):
    """(σ, u…, v…) of the weights; only σ has a derivative."""

    @staticmethod
    def forward(options: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        batched, k, method, max_steps, tol, seed, backend, count = options
        ws, starts = list(tensors[:count]), list(tensors[count:])
        out = torch.ops.gti_kernels.power_iteration(
            ws, batched, k, method, max_steps, tol, starts, seed, backend
        )
        return (out[0], *out[1], *out[2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        options, *tensors = inputs
        count = options[-1]
        ctx.mark_non_differentiable(*output[1:])
        ws = tensors[:count]
        live = [w if want else None for w, want in zip(ws, ctx.needs_input_grad[1:])]
        ctx.save_for_backward(*live, *output[1:])
        ctx.save_for_forward(*ws, *output[1:])
        ctx.counts = [_sizes(w, options[0])[0] for w in tensors[:count]]
        ctx.extra = len(tensors) - count

    @staticmethod
    def backward(ctx: Any, grad_sigma: Tensor, *_: Tensor) -> tuple[Any, ...]:
        return _gradients(ctx, grad_sigma, False)


def _gradients(ctx: Any, grad_sigma: Tensor, moving: bool) -> tuple[Any, ...]:
    """Those of _Sigma; moving: u and v are functions of W."""
    grads: list[Tensor | None] = []
    wanted = ctx.needs_input_grad[1:]
    for (w, u, v), g, want in zip(_triples(ctx), grad_sigma.split(ctx.counts), wanted):
        if not want:  # frozen
            grads.append(None)
            continue
        if moving:
            u, v = attached(_matrices(w, u, v), u, v)
        g = g.to(u.dtype) if u.ndim == 2 else g.to(u.dtype).unsqueeze(-2)  # [1, k], [B, 1, k]
        # Σ_k g u vᵀ without a matmul, which autocast would narrow.
        outer = sum((u * g)[..., i, None] * v[..., None, :, i] for i in range(u.shape[-1]))
        grads.append(outer.reshape(w.shape).to(w.dtype))  # type: ignore[union-attr]
    return (None, *grads, *[None] * ctx.extra)


def _triples(ctx: Any) -> list[tuple[Tensor, ...]]:
    """Each weight with its u and v."""
    saved, count = ctx.saved_tensors, len(ctx.counts)  # once: a checkpoint gives them but once
    return list(zip(saved[:count], saved[count : 2 * count], saved[2 * count :]))


def _matrices(w: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """w as u and v see it: [m, n] or [B, m, n]."""
    return w.reshape(*u.shape[:-1], v.shape[-2])


class _SigmaForward(_Sigma):
    """_Sigma with the rules of forward mode and vmap, which the compiler does not take, and with
    derivatives of higher order."""

    @staticmethod
    def backward(ctx: Any, grad_sigma: Tensor, *_: Tensor) -> tuple[Any, ...]:
        # Where this is differentiated in turn, backward or forward.
        moving = torch.is_grad_enabled() or forward_ad._current_level >= 0
        return _gradients(ctx, grad_sigma, moving)

    @staticmethod
    def jvp(ctx: Any, _options: None, *tangents: Tensor | None) -> tuple[Any, ...]:
        triples = _triples(ctx)
        real = _result_dtype([u for _, u, _ in triples])
        parts = []
        for (w, u, v), t in zip(triples, tangents):
            t = torch.zeros_like(w) if t is None else t
            u, v = attached(_matrices(w, u, v), u, v)
            with torch.autocast(u.device.type, enabled=False):
                moved = _matrices(t, u, v).to(u.dtype) @ v
            parts.append((moved * u).sum(-2).reshape(-1, u.shape[-1]).to(real))
        return (torch.cat(parts), *[None] * (2 * len(triples)))

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, options: tuple[Any, ...], *tensors: Tensor
    ) -> tuple[Any, Any]:
        """The mapped axis becomes a batch axis of each weight."""
        batched, k, *rest, count = options
        size = info.batch_size
        moved = [
            t.unsqueeze(0).expand(size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(tensors, in_dims[1:])
        ]
        sigmas, us, vs = [], [], []
        for i, (w, t) in enumerate(zip(moved[:count], tensors)):
            b, m, n = _sizes(t, batched) if in_dims[1 + i] is None else _sizes(w[0], batched)
            starts = [x.reshape(size * b, n, k) for x in moved[count:][i : i + 1]]
            one = (True, k, *rest, 1)
            start = [x.contiguous() for x in starts]
            sigma, u, v = _SigmaForward.apply(one, w.reshape(size * b, m, n), *start)
            sigmas.append(sigma.reshape(size, b, k))
            us.append(u.reshape(size, b, m, k) if batched else u)
            vs.append(v.reshape(size, b, n, k) if batched else v)
        out = (torch.cat(sigmas, 1), *us, *vs)
        return out, (0,) * len(out)


def _fake(
    weights: list[Tensor],
    batched: bool,
    k: int,
    method: str,
    max_steps: int,
    tol: float,
    start: list[Tensor],
    seed: int,
    backend: str,
) -> Outputs:
    check_float_tensors("power_iteration", weights=weights)
    real = _result_dtype(weights)
    make = weights[0].new_empty
    u, v, count = [], [], 0
    for w in weights:
        b, m, n = _sizes(w, batched)
        c = compute_dtype(w.dtype)
        u.append(w.new_empty((b, m, k) if batched else (m, k), dtype=c))
        v.append(w.new_empty((b, n, k) if batched else (n, k), dtype=c))
        count += b
    return (
        make((count, k), dtype=real),
        u,
        v,
        make((count, k), dtype=real),
        make(count, dtype=torch.int64),
        make(count, dtype=torch.bool),
        make(count, dtype=real),
    )


register(
    "power_iteration(Tensor[] weights, bool batched, int k, str method, int max_steps, float tol, "
    "Tensor[] start, int seed, str backend) -> "
    "(Tensor, Tensor[], Tensor[], Tensor, Tensor, Tensor, Tensor)",
    _power_iteration,
    _fake,
)
