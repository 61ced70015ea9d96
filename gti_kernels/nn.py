"""Spectral normalisation as a parametrization of torch modules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .conventions import compute_dtype
from .ops.arguments import FLOATS, finite
from .ops.library import is_plain_eager, refuse_lost_derivatives, without_transforms
from .ops.power_iteration import power_iteration, start_from

_is_batched = torch._C._functorch.is_legacy_batchedtensor  # of autograd.grad(is_grads_batched=True)
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FIRST_STEPS = 15  #: most passes over W at registration


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
) -> nn.Module:
    """Parametrizes module.<name> as W/σ, σ the estimate of its largest singular value.

    Interface and buffers are those of torch.nn.utils.parametrizations.spectral_norm, and so are
    remove_parametrizations, state_dict and the modes: in training mode each use of the weight takes
    `n_power_iterations` power steps v ← WᵀWv/‖WᵀWv‖ from the last v; in eval mode v stays. Then
    u = W v/‖W v‖ and σ = ‖W v‖. The gradient is that of W/σ with dσ/dW = u vᵀ,

        ∂L/∂W = (G − ⟨G, W/σ⟩ u vᵀ) / σ,    G = ∂L/∂(W/σ),

    v taken as a constant: exact for a given v, and that of W/σ₁ where v has converged. Second
    derivatives are those for a given v, too.

    Where it differs from torch's:
    - σ and u belong to the new v (torch's u is that of the v before): σ is larger, nearer to σ₁,
      and the same in the next forward in eval mode.
    - σ ≤ eps counts as 0: then W is passed on as it is, with its gradient, and u and v last. A
      zero weight gives a zero weight and a finite gradient.
    - A weight with NaN or Inf gives NaN; u and v stay.
    - bf16 and fp16 are read as they are; u, v, σ and all sums are fp32 (fp64 for fp64).
    - u and v are replaced, never written: a graph may hold them, and the module may be used many
      times before backward. So a captured CUDA graph, and replicas of nn.DataParallel, do not pass
      new vectors on.
    - W/σ is kept for backward and must not be written before it, as the max_norm of nn.Embedding
      does.
    - The start vector at registration comes from a counter, not from torch's generator.

    Args:
        module: its weight has at least one dim; a vector w becomes w/‖w‖. dtype fp64, fp32, bf16
            or fp16.
        name: of the parameter.
        n_power_iterations: n ≥ 1; a forward in training mode reads W n + 1 times, in eval mode
            once, and W/σ is written once. A backward reads G twice and W/σ once.
        dim: the axis of outputs; the matrix is [W.shape[dim], −1]. Default 0, but 1 for
            nn.ConvTranspose. A W that is not contiguous, or dim ≠ 0, costs a copy of W.

    Returns:
        module. Works under torch.compile (fullgraph), autocast, torch.func.grad, jvp and vmap, in
        any nesting; under vmap over weights the new vectors are not kept. Transforms of torch.func
        inside a compiled function are refused: transform outside of it. Of a compiled one only
        first derivatives are right, as for `gti_kernels.top_singular_values`.

    Raises:
        ValueError, IndexError, TypeError: the argument, what was expected, what came.

    Source: Miyato, Kataoka, Koyama, Yoshida 2018 (arXiv:1802.05957).

    >>> import torch, gti_kernels as gti
    >>> layer = gti.nn.spectral_norm(torch.nn.Linear(20, 40), n_power_iterations=20)
    >>> bool((torch.linalg.matrix_norm(layer.weight, 2) - 1).abs() < 0.01)
    True
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"spectral_norm: name must be that of a parameter or buffer of {type(module).__name__},"
            f" got {name!r}"
        )
    if is_lazy(weight):
        raise ValueError(
            f"spectral_norm: {name} must have a shape, got a lazy parameter. Run one forward of "
            f"the module before"
        )
    if weight.ndim < 1 or weight.dtype not in FLOATS:
        raise TypeError(
            f"spectral_norm: {name} must have at least one dim and dtype "
            f"{', '.join(map(str, FLOATS))}, got shape {tuple(weight.shape)} of {weight.dtype}"
        )
    if dim is None:
        dim = 1 if isinstance(module, _TRANSPOSED) else 0
    parametrize.register_parametrization(
        module, name, SpectralNorm(weight, n_power_iterations, dim, eps)
    )
    return module


class SpectralNorm(nn.Module):
    """The parametrization W → W/σ of `spectral_norm`; holds its vectors as buffers _u [m], _v [n]
    (none for a 1-D weight)."""

    _u: Tensor
    _v: Tensor

    def __init__(
        self, weight: Tensor, n_power_iterations: int = 1, dim: int = 0, eps: float = 1e-12
    ) -> None:
        super().__init__()
        if not isinstance(dim, int):
            raise TypeError(f"spectral_norm: dim must be an integer, got {dim!r}")
        if not -weight.ndim <= dim < weight.ndim:
            raise IndexError(
                f"spectral_norm: dim must be in [{-weight.ndim}, {weight.ndim - 1}] for a weight "
                f"of shape {tuple(weight.shape)}, got {dim}"
            )
        if not isinstance(n_power_iterations, int) or n_power_iterations < 1:
            raise ValueError(
                f"spectral_norm: n_power_iterations must be an integer >= 1, got "
                f"{n_power_iterations!r}"
            )
        if weight.numel() == 0:
            raise ValueError(
                f"spectral_norm: the weight must have elements, got shape {tuple(weight.shape)}"
            )
        self.n_power_iterations, self.dim = n_power_iterations, dim % weight.ndim
        self.eps = finite("spectral_norm", "eps", eps)
        if self.eps < 0:
            raise ValueError(f"spectral_norm: eps must be at least 0, got {eps!r}")
        if weight.ndim > 1:
            first = power_iteration(_matrix(weight.detach(), self.dim), max_steps=_FIRST_STEPS)
            self.register_buffer("_u", first.u[:, 0])
            self.register_buffer("_v", first.v[:, 0])

    def forward(self, weight: Tensor) -> Tensor:
        if weight.ndim == 1:
            norm = torch.linalg.vector_norm(weight, dtype=compute_dtype(weight.dtype))
            return weight / _divisor(norm, self.eps)
        passes = self.n_power_iterations + 1 if self.training else 1
        refuse_lost_derivatives("spectral_norm")
        plain, function = is_plain_eager(), _Normalized
        if not torch.compiler.is_compiling():  # the compiler takes only the plainest form
            if torch._C._get_tracing_state() is not None:
                raise RuntimeError(
                    "spectral_norm: torch.jit.trace would take σ for a constant. Use torch.export, "
                    "or torch.nn.utils.parametrize.remove_parametrizations before tracing"
                )
            function = _NormalizedEager if plain else _NormalizedTransformed
        out, u, v, sigma = function.apply(weight, self._v, passes, self.eps, self.dim)
        if self.training:
            u, v = u.detach().squeeze(1), v.detach().squeeze(1)
            if plain and sigma.is_cpu:
                if math.isnan(sigma.item()):
                    return out
                u, v = u.clone(), v.clone()
            else:
                known = sigma.detach() == sigma.detach()  # not NaN
                u = without_transforms(torch.where(known, u, self._u))
                v = without_transforms(torch.where(known, v, self._v))
            if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
                with torch.inference_mode(False):  # load_state_dict could not write them
                    u, v = u.clone(), v.clone()
            mapped = not torch.compiler.is_compiling() and _is_wrapped(v)
            if not mapped:  # a vmap ends, the buffers stay
                self._buffers["_u"], self._buffers["_v"] = u, v
        return out

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The W that module.weight = weight stores: the weight itself, as in torch."""
        return weight


def _matrix(weight: Tensor, dim: int) -> Tensor:
    """[m, n] with the axis `dim` as rows."""
    return (weight if dim == 0 else weight.movedim(dim, 0)).flatten(1)


class _Normalized(torch.autograd.Function):
    """(W/σ, u [m, 1], v [n, 1], σ) after `passes` passes over W from v; W/σ, u and σ are
    differentiable, in W for a fixed v."""

    @staticmethod
    def forward(  # type: ignore[override]
        weight: Tensor, v: Tensor, passes: int, eps: float, dim: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        matrix, start = _matrix(weight, dim), start_from(v)
        out = power_iteration(matrix, method="power", max_steps=passes, tol=0.0, start=start)
        sigma = out.sigma.squeeze(0)
        return weight / _divisor(sigma, eps), out.u, out.v, sigma

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *_, ctx.eps, ctx.dim = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradient(ctx.saved_tensors, ctx.eps, ctx.dim, grads), None, None, None, None


def _gradient(
    saved: tuple[Tensor, ...], eps: float, dim: int, grads: tuple[Tensor | None, ...]
) -> Tensor:
    """(G − (⟨G, W/σ⟩ u − σ ∂L/∂σ u − (1 − u uᵀ) ∂L/∂u) vᵀ)/σ; G where σ ≤ eps."""
    grad, grad_u, _, grad_sigma = grads
    normalized, u, v, sigma = saved
    if grad is not None and grad.is_sparse:  # of nn.Embedding(sparse=True)
        grad = grad.to_dense()
    divisor = _divisor(sigma, eps)
    inner = 0.0 if grad is None else _dot(grad, normalized, sigma.dtype)
    if grad_sigma is not None:
        inner = inner - divisor * grad_sigma
    along_v = inner * u
    if grad_u is not None:  # only of a second derivative
        along_v = along_v - (grad_u - (u * grad_u).sum() * u)
    along_v = along_v * (sigma > eps)
    column, row = _outer_factors(along_v, v, normalized.shape, dim)
    if grad is None:
        out = -column * row
    else:
        out = torch.addcmul(grad.to(u.dtype), column, row, value=-1)
    # Where this is recorded for another derivative nothing is written in place.
    out = out / divisor if torch.is_grad_enabled() else out.div_(divisor)
    return out.to(normalized.dtype)


class _NormalizedEager(_Normalized):
    """_Normalized at less cost for plain eager calls: no separate setup_context, a third of a small
    call; and on the CPU, where a scalar may be read, a backward that writes the gradient once."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        output = _Normalized.forward(*inputs)
        _Normalized.setup_context(ctx, inputs, output)
        return output

    setup_context = torch.autograd.Function.setup_context

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint gives them but once
        return _gradient_at_once(saved, ctx.eps, ctx.dim, grads), None, None, None, None


def _gradient_at_once(
    saved: tuple[Tensor, ...], eps: float, dim: int, grads: tuple[Tensor | None, ...]
) -> Tensor:
    """`_gradient`, on the CPU by way of Python's floats and written once."""
    grad, *others = grads
    normalized, u, v, sigma = saved
    readable = sigma.device.type == "cpu" and dim == 0 and u.dtype == normalized.dtype
    first = not torch.is_grad_enabled() and all(g is None for g in others)
    if grad is None or not (first and readable and is_plain_eager()):
        return _gradient(saved, eps, dim, grads)
    if grad.is_sparse or _is_batched(grad):
        return _gradient(saved, eps, dim, grads)
    value = sigma.item()
    if value <= eps:
        return grad
    inner = torch.dot(grad.reshape(-1), normalized.reshape(-1)).item()
    beta, alpha = 1 / value, -inner / value
    if max(beta, abs(alpha)) > torch.finfo(u.dtype).max:  # addr refuses such a scalar
        return _gradient(saved, eps, dim, grads)
    out = torch.addr(grad.reshape(u.shape[0], -1), u.view(-1), v.view(-1), beta=beta, alpha=alpha)
    return out.view(normalized.shape)


class _NormalizedTransformed(_Normalized):
    """_Normalized with the rules of forward mode and vmap."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        normalized, u, v, sigma = ctx.saved_tensors
        # torch switches tangents off here, and so would make zeros of those of a jvp around this
        # one; the saved outputs do not have this one's yet.
        with forward_ad._set_fwd_grad_enabled(True):
            divisor = _divisor(sigma, ctx.eps)
            row = _outer_factors(u, v, normalized.shape, ctx.dim)[1]
            others = [axis for axis in range(normalized.ndim) if axis != ctx.dim]
            of_y = (tangent.to(u.dtype) * row).sum(others).unsqueeze(1)  # y = W v
            of_y = of_y * (sigma > ctx.eps)
            of_sigma = (u * of_y).sum()
            out = (tangent - of_sigma * normalized) / divisor
            return out.to(normalized.dtype), (of_y - of_sigma * u) / divisor, None, of_sigma

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, weight: Tensor, v: Tensor, *settings: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """One after the other."""
        ws, vs = (
            [x] * info.batch_size if d is None else x.unbind(d)
            for x, d in zip((weight, v), in_dims)
        )
        outs = [_NormalizedTransformed.apply(*pair, *settings) for pair in zip(ws, vs)]
        return tuple(torch.stack(x) for x in zip(*outs)), (0, 0, 0, 0)


def _divisor(sigma: Tensor, eps: float) -> Tensor:
    """σ, or 1 where it is no more than eps."""
    return torch.threshold(sigma, eps, 1.0)


def _dot(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.dot(a.reshape(-1).to(dtype), b.reshape(-1).to(dtype))


def _outer_factors(u: Tensor, v: Tensor, shape: torch.Size, dim: int) -> tuple[Tensor, Tensor]:
    """u and v in shapes whose product is u vᵀ in the shape of W."""
    if len(shape) == 2 and dim == 0:
        return u, v.mT
    column, row = [1] * len(shape), list(shape)
    column[dim], row[dim] = shape[dim], 1
    return u.view(column), v.view(row)
