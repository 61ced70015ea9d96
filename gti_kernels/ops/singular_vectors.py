"""Singular vectors as functions of their matrix, for second derivatives of singular values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attached(w: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """u [..., m, k] and v [..., n, k], singular vectors of w [..., m, n], with their derivatives in
    w, of any order; until one is asked for, this costs a copy of u and v.

    With T the tangent of w, a = T v and b = Tᵀu, the tangents x of u and y of v solve

        σ x − W y = a − u uᵀa,    σ y − Wᵀx = b − v vᵀb,    uᵀx = vᵀy = 0

    for each triple: a dense system of the smaller side of w, in fp64. The tangents, and so the
    second derivatives of σ, are huge, infinite or NaN where σ is zero or not simple.
    """
    return _Attached.apply(w, u, v)


class _Attached(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return u.clone(), v.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_u: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        w, u, v = ctx.saved_tensors
        # The system is symmetric: its solution for the gradients is the adjoint of the tangents.
        u, v = (x.double() for x in attached(w, u, v))
        x, y = _solve(w.double(), u, v, grad_u.double(), grad_v.double())
        return (x @ v.mT + u @ y.mT).to(w.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, Tensor]:
        w, u, v = ctx.saved_tensors
        dtype, t = u.dtype, tangent.double()
        u, v = (x.double() for x in attached(w, u, v))
        x, y = _solve(w.double(), u, v, t @ v, t.mT @ u)
        return x.to(dtype), y.to(dtype)


def _solve(w: Tensor, u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of `attached`."""
    if w.shape[-1] > w.shape[-2]:
        y, x = _solve(w.mT, v, u, b, a)
        return x, y
    sigma = (u * (w @ v)).sum(-2, keepdim=True)
    a = a - u * (u * a).sum(-2, keepdim=True)
    b = b - v * (v * b).sum(-2, keepdim=True)
    right, gram = sigma * b + w.mT @ a, w.mT @ w
    eye = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
    columns = []
    for i in range(v.shape[-1]):  # (σ² − WᵀW) y = right; σ² v vᵀ y = 0 makes it regular
        left = sigma[..., i, None] ** 2 * (eye + v[..., i, None] * v[..., None, :, i]) - gram
        columns.append(torch.linalg.solve_ex(left, right[..., i])[0])
    y = torch.stack(columns, -1)
    return (a + w @ y) / sigma, y
