"""The symplectic 2-form on tangent vectors, with an error bound for each entry."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, get_num_threads, is_grad_enabled

from .. import backends
from ..reference import two_form as reference
from .arguments import check_alike, subclasses, tensor_list
from .library import is_plain_eager, refuse_derivative, register
from .results import Field, Result


class TwoForm(Result):
    """Result of `two_form`, all fp64, [m, m] or [B, m, m]."""

    omega = Field()  #: skew to the bit, zero diagonal
    error_bound = Field()  #: |omega − exact| ≤ error_bound, entry by entry
    metric = Field()  #: symmetric to the bit, or None


def two_form(
    dq: Tensor | Sequence[Tensor],
    dp: Tensor | Sequence[Tensor],
    *,
    metric: bool = False,
    backend: str = "auto",
) -> TwoForm:
    """Ω_ij = ω(z_i, z_j) = dq_i·dp_j − dp_i·dq_j of m tangent vectors z_i = (dq_i, dp_i).

    ω(z, w) = zᵀ J w with J = [[0, I], [−I, 0]] and the order (q, p), see `gti_kernels.conventions`.
    From the same single read of the inputs: with metric=True also S_ij = dq_i·dq_j + dp_i·dp_j.

    Args:
        dq, dp: [m, N] each, or B such problems [B, m, N], or lists over parameters of [m, *shape];
            the same shapes and dtypes; fp64, fp32, bf16 or fp16, one device. Not written, not
            concatenated; on the CPU Ω and S of a list are those of its concatenation, bit for bit.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see `gti_kernels.explain`.

    Returns:
        TwoForm(omega, error_bound, metric). Products of elements up to fp32 are exact in fp64,
        where they are summed; for fp64 elements products and sums are compensated (Dot2; Ogita,
        Rump, Oishi 2005, "Accurate Sum and Dot Product"). error_bound holds for the inputs as they
        are, roughly 6e-14·‖z_i‖‖z_j‖ up to fp32 and u·|Ω_ij| + 1e-20·‖z_i‖‖z_j‖ for fp64 (N up to
        1e8). A NaN in vector i makes row and column i NaN, the rest is right. Where a GPU has next
        to no fp64 (compute capability 8.6, 8.9, 12.0), "cuda" sums products up to fp32 in pairs of
        fp32 numbers: roughly 4e-13·‖z_i‖‖z_j‖, and NaN where a product exceeds 3e38. On the CPU the
        bound supposes that subnormal numbers count (torch.set_flush_denormal(False), the default).

    Raises:
        TypeError, ValueError: the argument, what was expected, what came. RuntimeError: a
        derivative is wanted (there is none), or the named backend cannot run.

    >>> import torch, gti_kernels as gti
    >>> dq, dp = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> gti.two_form(dq, dp).omega  # a Darboux pair
    tensor([[ 0.,  1.],
            [-1.,  0.]], dtype=torch.float64)
    """
    compiled = backends.compiled
    if compiled is not None and backend in ("auto", "cpu") and is_plain_eager():
        out = compiled.two_form(dq, dp, metric, is_grad_enabled(), get_num_threads())
        if out is not None:  # else an argument is not what the kernel takes
            return TwoForm.from_kernel(*out)
    dqs, dps, batched = tensor_list(dq), tensor_list(dp), is_batch("two_form", "dq", dq)
    refuse_derivative("two_form", [*dqs, *dps], "Pass detached tangents")
    if is_plain_eager():
        omega, bound, gram = _two_form(dqs, dps, metric, batched, backend)
    else:
        omega, bound, gram = torch.ops.gti_kernels.two_form(dqs, dps, metric, batched, backend)
    return TwoForm(omega, bound, gram if metric else None)


def is_batch(op: str, name: str, x: Any) -> bool:
    """Whether x is to be [B, m, N]: a tensor, not a list of them, with more than two axes."""
    if isinstance(x, Tensor) and x.ndim < 2:
        raise ValueError(
            f"{op}: {name}[0] must be [m, N], [B, m, N] or a list, got one tensor of shape "
            f"{tuple(x.shape)}. Of one vector pass {name}[None]"
        )
    return isinstance(x, Tensor) and x.ndim > 2


def _two_form(
    dq: list[Tensor], dp: list[Tensor], metric: bool, batched: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    device, limits = _limits(dq, dp, batched)
    chosen = backends.choose("two_form", device, backend, limits)
    q, p = as_rows(dq, batched), as_rows(dp, batched)
    if chosen == "cpu":
        assert backends.compiled is not None
        qp = (q[0], p[0]) if batched else (q, p)
        out = backends.compiled.two_form(*qp, metric, False, get_num_threads())
        omega, bound, result = TwoForm.from_kernel(*out)
    else:
        omega, bound, result = _kernel(chosen)(q, p, metric)
    return omega, bound, omega.new_empty(0) if result is None else result


def _kernel(backend: str) -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    """two_form of a backend that takes lists of [m, N_t] or [B, m, N_t]."""
    if backend == "cuda":
        from ..cuda_kernels import two_form as cuda

        return cuda.two_form
    if backend == "triton":
        from ..triton_kernels import two_form as triton

        return triton.two_form
    return reference.two_form


def limits_of_two_form(
    dq: Tensor | Sequence[Tensor], dp: Tensor | Sequence[Tensor], *, metric: bool = False
) -> tuple[torch.device, dict[str, str]]:
    """Checks the arguments; the device, and backend → why it cannot take these tensors."""
    return _limits(tensor_list(dq), tensor_list(dp), is_batch("two_form", "dq", dq))


def _limits(
    dqs: list[Tensor], dps: list[Tensor], batched: bool
) -> tuple[torch.device, dict[str, str]]:
    check_alike("two_form", dq=dqs, dp=dps)
    check_rows("two_form", "dq", dqs, batched)
    reason = subclasses(dq=dqs, dp=dps)
    return dqs[0].device, {} if reason is None else dict.fromkeys(("cpu", "triton", "cuda"), reason)


def check_rows(op: str, name: str, tensors: Sequence[Tensor], batched: bool) -> None:
    """[m, *shape] with the same m >= 1 in every tensor, or [B, m, N]; at least one coordinate."""
    if not tensors:
        raise ValueError(f"{op}: {name} must hold at least one tensor, got an empty list")
    axis = 1 if batched else 0
    m = tensors[0].shape[axis] if tensors[0].ndim > axis else 0
    for i, t in enumerate(tensors):
        axes = t.ndim == 3 and len(t) > 0 if batched else t.ndim >= 1
        if not axes or t.shape[axis] != m or m == 0:
            wanted = "[B, m, N] with B, m >= 1" if batched else "[m, *shape] with the same m >= 1"
            raise ValueError(
                f"{op}: {name}[{i}] must be {wanted} in every tensor, got {tuple(t.shape)} "
                f"(m = {m}). Stack vectors along the {'second' if batched else 'first'} axis"
            )
    if sum(t.numel() for t in tensors) == 0:
        raise ValueError(
            f"{op}: {name} must have at least one coordinate, got {tuple(tensors[0].shape)}"
        )


def as_rows(tensors: Sequence[Tensor], batched: bool) -> list[Tensor]:
    """Each as [m, N_t] or [B, m, N_t], for the kernels."""
    shapes = [
        (t.shape[:2], t.shape[2:]) if batched else (t.shape[:1], t.shape[1:]) for t in tensors
    ]
    return [
        t.reshape(*lead, math.prod(rest)).contiguous().resolve_neg()
        for t, (lead, rest) in zip(tensors, shapes)
    ]


def _fake(
    dq: list[Tensor], dp: list[Tensor], metric: bool, batched: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    check_alike("two_form", dq=dq, dp=dp)
    lead = dq[0].shape[: 2 if batched else 1]
    shape = (*lead, lead[-1])
    make = dq[0].new_empty
    return (
        make(shape, dtype=torch.float64),
        make(shape, dtype=torch.float64),
        make(shape if metric else (0,), dtype=torch.float64),
    )


register(
    "two_form(Tensor[] dq, Tensor[] dp, bool metric, bool batched, str backend) -> "
    "(Tensor, Tensor, Tensor)",
    _two_form,
    _fake,
)
