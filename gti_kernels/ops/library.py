"""The torch library `gti_kernels`, and when a call goes through it.

A call in plain eager mode goes straight to the op's implementation: the dispatcher would cost more
than the checks. Under torch.compile, fake tensors and the like it goes through
torch.ops.gti_kernels, whose implementation is the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_is_compiling = torch.compiler.is_compiling
_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state  # of torch.jit.trace
_transforms_active = torch._C._are_functorch_transforms_active
_transform_level = torch._C._functorch.maybe_current_level

LIBRARY = torch.library.Library("gti_kernels", "DEF")


def register(
    schema: str, implementation: Callable[..., object], fake: Callable[..., object]
) -> None:
    """Defines an op with its one implementation for every device and its fake kernel."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gti_kernels::{name}", fake, lib=LIBRARY)


def is_plain_eager() -> bool:
    """True where a tensor is what it seems: no compiler, no transform, no mode watches the call."""
    return not (
        _is_compiling()
        or _modes()
        or _tracing_state() is not None
        or _transform_level() is not None
        or forward_ad._current_level >= 0
    )


def without_transforms(x: Tensor) -> Tensor:
    """x without the wrappers of torch.func.grad and jvp: what is to outlive the transform."""
    if is_plain_eager() or _is_compiling():
        return x
    while torch._C._functorch.is_gradtrackingtensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def refuse_lost_derivatives(op: str, arguments: Iterable[Tensor] = ()) -> None:
    """Raises where torch would make a silent zero of a derivative: where torch.compile meets
    torch.func or forward mode (without fullgraph it then leaves the call to eager mode), and where
    an argument has tangents of two forward modes, of which an autograd.Function gets one."""
    transformed = _transforms_active()
    if _is_compiling():
        if transformed or forward_ad._current_level >= 0:
            raise RuntimeError(
                f"{op}: torch.compile cannot trace torch.func and forward-mode autograd through "
                f"it. Compile without fullgraph=True, or transform outside of the compiled function"
            )
    elif transformed:
        stack = torch._C._functorch.get_interpreter_stack() or ()
        forward = torch._C._functorch.TransformType.Jvp
        levels = [x.level() for x in stack if x.key() == forward]
        if len(levels) > 1 and any(len(_levels(x) & {*levels}) > 1 for x in arguments):
            raise RuntimeError(
                f"{op}: torch.func.jvp or jacfwd inside of another has no derivative here. Use "
                f"grad, vjp or jacrev for one of them"
            )


def _levels(x: Tensor) -> set[int]:
    """Of the transforms of torch.func that have wrapped x."""
    levels = set()
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        levels.add(torch._C._functorch.maybe_get_level(x))
        x = torch._C._functorch.get_unwrapped(x)
    return levels


def refuse_derivative(op: str, arguments: Iterable[Any], remedy: str) -> None:
    """Raises where a derivative through `op` is wanted: it would be silently zero."""
    if torch.is_grad_enabled():
        for t in arguments:
            if isinstance(t, Tensor) and t.requires_grad:
                raise RuntimeError(
                    f"{op} has no derivative, but an argument requires grad while gradients "
                    f"are recorded. {remedy}"
                )
    if _is_compiling():
        return refuse_lost_derivatives(op)
    if _transform_level() is not None or forward_ad._current_level >= 0:
        for t in arguments:
            if not isinstance(t, Tensor):
                continue  # the checks have the words
            wrapped = torch._C._functorch.is_functorch_wrapped_tensor(t)
            if wrapped or forward_ad.unpack_dual(t).tangent is not None:
                raise RuntimeError(
                    f"{op} cannot be transformed: an argument is batched or carries a derivative "
                    f"of torch.func or forward-mode autograd. {remedy}"
                )
