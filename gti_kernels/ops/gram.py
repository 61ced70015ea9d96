"""Weighted inner products of many long vectors, with an error bound for each entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, get_num_threads, is_grad_enabled

from .. import backends
from ..reference import gram as reference
from .arguments import check_float_tensors, subclasses, tensor_list
from .library import is_plain_eager, refuse_derivative, register
from .two_form import as_rows, check_rows, is_batch

Tensors = Tensor | Sequence[Tensor]


class Gram(NamedTuple):
    """Result of `gram`, fp64, [m, l] or [B, m, l]."""

    matrix: Tensor  #: symmetric to the bit where b is a
    error_bound: Tensor  #: |matrix − exact| ≤ error_bound, entry by entry


def gram(
    a: Tensors, b: Tensors | None = None, weight: Tensors | None = None, *, backend: str = "auto"
) -> Gram:
    """G = A diag(w) Bᵀ, that is G_ij = Σ_c w_c a_ic b_jc: the contraction of neural tangent kernels
    and pullback metrics.

    Args:
        a: [m, N], or B problems [B, m, N], or a list over parameters of [m, *shape].
        b: [l, N], [B, l, N] or a list of [l, *shape], dtypes as in a; None: a, and G is symmetric.
        weight: w, [N], the same for every problem of a batch, or a list of [*shape]; of any sign;
            None: ones. fp64, fp32, bf16 or fp16, one device. Nothing is written or concatenated.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see `gti_kernels.explain`.

    Returns:
        Gram(matrix, error_bound), fp64. Products of up to three elements up to fp32 have one
        rounding, that of their sum in fp64; where a, b or weight is fp64, products and sums are
        compensated (Dot2; Ogita, Rump, Oishi 2005). error_bound holds for the inputs as they are
        unless w·a over- or underflows: roughly 6e-14·s_i t_j up to fp32 and u·|G_ij| + 1e-20·s_i
        t_j for fp64 (N up to 1e8), with s_i² = Σ_c |w_c| a_ic² and t_j² = Σ_c |w_c| b_jc². A NaN in
        vector i of a makes row i NaN, one in b a column, the rest is right. Without weights, a GPU
        with next to no fp64 sums as in `two_form`.

    Raises:
        TypeError, ValueError: the argument, what was expected, what came. RuntimeError: a
        derivative is wanted (there is none), or the named backend cannot run.

    >>> import torch, gti_kernels as gti
    >>> a = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    >>> gti.gram(a, weight=torch.tensor([1.0, -1.0])).matrix
    tensor([[-3., -2.],
            [-2., -1.]], dtype=torch.float64)
    """
    if is_plain_eager() and (out := _on_cpu(a, b, weight, backend)) is not None:
        return Gram(*out)
    lists = tensor_list(a), [] if b is None else tensor_list(b), _weights(weight)
    refuse_derivative("gram", [t for tensors in lists for t in tensors], "Pass detached vectors")
    arguments = (*lists, b is None, weight is not None, is_batch("gram", "a", a), backend)
    if is_plain_eager():
        return Gram(*_gram(*arguments))
    return Gram(*torch.ops.gti_kernels.gram(*arguments))


def _weights(weight: Tensors | None) -> list[Tensor]:
    return [] if weight is None else tensor_list(weight)


def _on_cpu(a: Any, b: Any, weight: Any, backend: str) -> Any:
    """Matrix and bound, or None where the call is not for the compiled kernel or an argument is
    odd."""
    if backends.compiled is None or backend not in ("auto", "cpu"):
        return None
    return backends.compiled.gram(a, b, weight, is_grad_enabled(), get_num_threads())


def _gram(
    a: list[Tensor],
    b: list[Tensor],
    weight: list[Tensor],
    symmetric: bool,
    weighted: bool,
    batched: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    device, limits = _limits(a, b, weight, symmetric, weighted, batched)
    chosen = backends.choose("gram", device, backend, limits)
    x, y = as_rows(a, batched), None if symmetric else as_rows(b, batched)
    w = [t.flatten().contiguous().resolve_neg() for t in weight] if weighted else None
    if chosen == "cpu":
        lists = [z[0] if batched and z else z for z in (x, y, w)]
        with torch.no_grad():
            out = _on_cpu(lists[0], lists[1], lists[2], "cpu")
        assert out is not None, "the compiled kernel takes whatever passes the checks"
        return out
    return _kernel(chosen)(x, y, w)


def _kernel(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """gram of a backend that takes lists of [m, N_t] or [B, m, N_t]."""
    if backend == "cuda":
        from ..cuda_kernels import gram as cuda

        return cuda.gram
    if backend == "triton":
        from ..triton_kernels import gram as triton

        return triton.gram
    return reference.gram


def limits_of_gram(
    a: Tensors, b: Tensors | None = None, weight: Tensors | None = None
) -> tuple[torch.device, dict[str, str]]:
    """Checks the arguments; the device, and backend → why it cannot take these tensors."""
    right = [] if b is None else tensor_list(b)
    return _limits(
        tensor_list(a),
        right,
        _weights(weight),
        b is None,
        weight is not None,
        is_batch("gram", "a", a),
    )


def _limits(
    a: list[Tensor],
    b: list[Tensor],
    weight: list[Tensor],
    symmetric: bool,
    weighted: bool,
    batched: bool,
) -> tuple[torch.device, dict[str, str]]:
    check_float_tensors("gram", a=a, b=b, weight=weight)
    check_rows("gram", "a", a, batched)
    axis = 2 if batched else 1
    if not symmetric:
        check_rows("gram", "b", b, batched)
    for name, tensors in (
        ("b", None if symmetric else b),
        ("weight", weight if weighted else None),
    ):
        if tensors is None:
            continue
        if len(tensors) != len(a):
            raise ValueError(
                f"gram: a and {name} must have the same length, got {len(a)} and {len(tensors)}"
            )
        for i, (x, y) in enumerate(zip(a, tensors)):
            rows = () if name == "weight" else (*x.shape[: axis - 1], tensors[0].shape[axis - 1])
            if y.shape != (*rows, *x.shape[axis:]):
                raise ValueError(
                    f"gram: {name}[{i}] must have shape {(*rows, *x.shape[axis:])} beside a[{i}] "
                    f"of shape {tuple(x.shape)}, got {tuple(y.shape)}"
                )
            if name == "b" and y.dtype != x.dtype:
                raise TypeError(
                    f"gram: b[{i}] must have the dtype of a[{i}], {x.dtype}, got {y.dtype}. "
                    f"Convert it with .to({x.dtype})"
                )
    reason = subclasses(a=a, b=b, weight=weight)
    return a[0].device, {} if reason is None else dict.fromkeys(("cpu", "triton", "cuda"), reason)


def _fake(
    a: list[Tensor],
    b: list[Tensor],
    weight: list[Tensor],
    symmetric: bool,
    weighted: bool,
    batched: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_float_tensors("gram", a=a, b=b, weight=weight)
    axis = 1 if batched else 0
    shape = (*a[0].shape[: axis + 1], (a if symmetric else b)[0].shape[axis])
    return a[0].new_empty(shape, dtype=torch.float64), a[0].new_empty(shape, dtype=torch.float64)


register(
    "gram(Tensor[] a, Tensor[] b, Tensor[] weight, bool symmetric, bool weighted, bool batched, "
    "str backend) -> (Tensor, Tensor)",
    _gram,
    _fake,
)
