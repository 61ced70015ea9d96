"""Top singular triples of operators that are known by their products alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..reference import power_iteration as reference
from .library import refuse_derivative
from .power_iteration import SingularTriples, _check_settings, _starts

Product = Callable[[Tensor], Tensor]

#: Most of |⟨v, z⟩ − ‖y‖²| / (‖v‖‖z‖ + ‖y‖²), y = W v, z = Wᵀy: far above the rounding of products
#: in half precision, far below what the product with another operator leaves.
_ADJOINT = 0.05


def power_iteration_operator(
    matvec: Product,
    rmatvec: Product | None,
    shape: Sequence[int],
    *,
    k: int = 1,
    method: str = "cg",
    max_steps: int = 200,
    tol: float = 1e-4,
    start: SingularTriples | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> SingularTriples:
    """The k largest singular triples of W: R^n → R^m, or of a batch of such operators, from
    products W x and Wᵀy: of Jacobians, Hessians, attention maps.

    The same loop as `power_iteration`; one step calls `matvec` once, then `rmatvec` once, each on k
    vectors an operator. The operators of a batch advance together, each until its residual is at
    most tol; one that has stopped is handed zeros while others go on.

    Args:
        matvec: x [..., n, k] → W x [..., m, k], "..." the batch axes of `shape`. Columns of zeros
            may come; the function must be linear and give the same result each time.
        rmatvec: y [..., m, k] → Wᵀy [..., n, k], or None where W is symmetric (m = n, as of a
            Hessian): then rmatvec is matvec, and σ is the largest |eigenvalue|, its sign that of
            u·v.
        shape: (..., m, n).
        k, method, max_steps, tol, seed: as in `power_iteration`. start: an earlier result for
            operators of the same shape.
        dtype: of all vectors, fp32 or fp64; device: where they are. Default: torch's own. A
            function may compute in what it likes; what it returns must be of this dtype.

    Returns:
        SingularTriples, detached; sigma [..., k], u [..., m, k], v [..., n, k]. upper is inf:
        products alone give no bound from above. W is scaled by a power of two after its first
        product, so that no square over- or underflows. A product that is NaN or Inf gives NaN and
        converged False for its operator alone. Slow convergence does not raise.

    Raises:
        TypeError, ValueError: the argument, what was expected, what came; among them a function
        that returns another shape, dtype or device, or an rmatvec that is not the transpose of
        matvec (the first pass tells: ⟨v, Wᵀ(W v)⟩ = ‖W v‖²). RuntimeError: transformed by
        torch.func. torch.compile does not look inside.

    The Jacobian of a function at a point, without forming it:

    >>> import torch, gti_kernels as gti
    >>> f, x = torch.sin, torch.tensor([0.0, 1.0, 2.0])  # the Jacobian is diag(cos x)
    >>> forward = lambda t: torch.func.jvp(f, (x,), (t,))[1]
    >>> backward = torch.func.vjp(f, x)[1]
    >>> r = gti.power_iteration_operator(
    ...     torch.vmap(forward, in_dims=-1, out_dims=-1),
    ...     torch.vmap(lambda t: backward(t)[0], in_dims=-1, out_dims=-1),
    ...     (3, 3),
    ... )
    >>> round(float(r.sigma), 4), bool(r.converged)
    (1.0, True)
    """
    _check_settings(k, method, max_steps, tol, seed)
    _check_functions(matvec, rmatvec)
    batch, m, n = _check_shape(shape, k)
    if rmatvec is None and m != n:
        raise ValueError(
            f"power_iteration_operator: rmatvec=None says that W is symmetric, but shape is "
            f"{(*batch, m, n)}. Pass the product with the transpose"
        )
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"power_iteration_operator: dtype must be float32 or float64, got {dtype}. Convert "
            f"inside matvec and rmatvec: x.to(torch.bfloat16) on the way in, .float() on the way "
            f"out"
        )
    like = torch.empty((), dtype=dtype, device=device)
    if like.is_meta:
        raise ValueError(
            "power_iteration_operator: device must be one that holds numbers, got meta"
        )
    v0 = _start_vectors(start, batch, m, n, k, seed, like)
    u, v, sigma, residual, steps, converged = _in_lockstep(
        matvec, rmatvec, v0, batch, m, method, max_steps, float(tol)
    )
    return SingularTriples(
        sigma.to(dtype).view(*batch, k),
        u.view(*batch, m, k),
        v.view(*batch, n, k),
        residual.to(dtype).view(*batch, k),
        steps.view(batch),
        converged.view(batch),
        torch.where(sigma[:, 0].isnan(), math.nan, math.inf).to(dtype).view(batch),
    )


def _check_functions(matvec: Product, rmatvec: Product | None) -> None:
    for name, function in (("matvec", matvec), ("rmatvec", rmatvec)):
        if not callable(function) and (name, function) != ("rmatvec", None):
            raise TypeError(
                f"power_iteration_operator: {name} must be a function, got "
                f"{type(function).__name__}"
            )


def _check_shape(shape: Sequence[int], k: int) -> tuple[tuple[int, ...], int, int]:
    sizes = tuple(shape) if isinstance(shape, Sequence) else ()
    if len(sizes) < 2 or not all(isinstance(s, int) and s >= 0 for s in sizes):
        raise ValueError(f"power_iteration_operator: shape must be (..., m, n), got {shape!r}")
    *batch, m, n = sizes
    if k > min(m, n):
        raise ValueError(
            f"power_iteration_operator: k must be an integer between 1 and min(m, n) = "
            f"{min(m, n)}, got {k!r}"
        )
    return tuple(batch), m, n


def _start_vectors(
    start: SingularTriples | None,
    batch: tuple[int, ...],
    m: int,
    n: int,
    k: int,
    seed: int,
    like: Tensor,
) -> Tensor:
    """[B, n, k] for B operators."""
    count = math.prod(batch)
    out = like.new_empty(count, n, k)
    if start is not None:
        return out.copy_(_starts(start, [like.expand(*batch, m, n)], True, k)[0])
    for b in range(count):
        out[b] = reference.start_vectors(seed, b, n, k, like.device)
    return out


def _in_lockstep(
    matvec: Product,
    rmatvec: Product | None,
    v0: Tensor,
    batch: tuple[int, ...],
    m: int,
    method: str,
    max_steps: int,
    tol: float,
) -> list[Tensor]:
    """u [B, m, k], v [B, n, k], σ [B, k], residual [B, k], steps [B], converged [B]."""
    count, n, k = v0.shape
    plain = torch.autocast(v0.device.type, enabled=False)  # not for what happens in the functions
    nan = v0.new_full((count, k), math.nan, dtype=torch.float64)
    u = v0.new_full((count, m, k), math.nan)
    steps = torch.zeros(count, dtype=torch.int64, device=v0.device)
    out = [u, torch.full_like(v0, math.nan), nan, nan.clone(), steps, steps.bool()]

    iterations = [reference.iterate(v, method, max_steps, tol) for v in v0]
    with plain:
        asked = {b: next(iteration) for b, iteration in enumerate(iterations)}
    scale = None
    while asked:
        x = torch.zeros_like(v0)
        for b, x_b in asked.items():
            x[b, :, : x_b.shape[1]] = x_b  # fewer than k columns where a residual is zero
        y = _product("matvec", matvec, x, batch, m)
        first = scale is None
        scale = _power_of_two(y) if scale is None else scale
        y = y / scale
        if rmatvec is None:
            z = _product("matvec", matvec, y, batch, n) / scale
        else:
            z = _product("rmatvec", rmatvec, y, batch, n) / scale
        if first:
            _check_adjoint(x, y, z, rmatvec is None)
        finite = (torch.isfinite(y).all(2).all(1) & torch.isfinite(z).all(2).all(1)).tolist()
        for b, x_b in list(asked.items()):
            steps[b] += 1
            j = x_b.shape[1]
            try:
                if not finite[b]:
                    del asked[b]
                    continue
                with plain:
                    asked[b] = iterations[b].send((y[b, :, :j], z[b, :, :j]))
            except StopIteration as end:
                del asked[b]
                for field, value in zip(out, end.value):
                    field[b] = value
    if scale is not None:
        out[2] *= scale[:, 0]
    return out


def _power_of_two(y: Tensor) -> Tensor:
    """[B, 1, 1], such that the largest entry of each y/scale is in [½, 1)."""
    largest = y.abs().amax((1, 2), keepdim=True)
    most = math.frexp(torch.finfo(y.dtype).max)[1] - 2
    power = torch.ldexp(torch.ones_like(largest), torch.frexp(largest)[1].clamp(-most, most))
    return torch.where((largest > 0) & torch.isfinite(largest), power, 1.0)


def _product(name: str, function: Product, x: Tensor, batch: tuple[int, ...], rows: int) -> Tensor:
    """function(x) as [B, rows, k], detached and checked; x [B, n, k]."""
    y = function(x.clone().view(*batch, *x.shape[1:]))  # which may write to it
    expected = (*batch, rows, x.shape[2])
    if not isinstance(y, Tensor) or y.layout != torch.strided:
        got = y.layout if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"power_iteration_operator: {name} must return a dense tensor, got {got}")
    if y.shape != expected:
        raise ValueError(
            f"power_iteration_operator: {name} must return shape {expected} for an argument of "
            f"shape {(*batch, *x.shape[1:])}, got {tuple(y.shape)}. torch.vmap(f, in_dims=-1, "
            f"out_dims=-1) makes a function of columns from one of vectors"
        )
    if y.dtype != x.dtype:
        raise TypeError(
            f"power_iteration_operator: {name} must return dtype {x.dtype}, got {y.dtype}. Convert "
            f"with .to({x.dtype}), or pass dtype="
        )
    if y.device != x.device:
        raise ValueError(
            f"power_iteration_operator: {name} must return tensors on {x.device}, got {y.device}. "
            f"Pass device="
        )
    with torch.no_grad():  # a recorded product is detached, one inside a transform is refused
        refuse_derivative("power_iteration_operator", (y,), "Call it outside of the transform")
    return y.detach().reshape(x.shape[0], rows, x.shape[2])


def _check_adjoint(x: Tensor, y: Tensor, z: Tensor, symmetric: bool) -> None:
    squares = y.square().sum(1)
    size = torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(z, dim=1) + squares
    if bool((((x * z).sum(1) - squares).abs() > _ADJOINT * size).any()):
        wrong = (
            "W is not symmetric: pass rmatvec, the product with the transpose"
            if symmetric
            else "rmatvec must be the product with the transpose of the operator of matvec"
        )
        raise ValueError(
            f"power_iteration_operator: {wrong} (⟨v, Wᵀ(W v)⟩ is not ‖W v‖²). Functions that "
            f"change from call to call, as with dropout, fail too"
        )
