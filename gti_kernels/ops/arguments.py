"""Checks that several ops share. Each raises before anything is touched, and names the argument,
what was expected, what came, and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

InvMass = float | Sequence[float] | Tensor | Sequence[Tensor]


def tensor_list(x: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """A list of tensors as it is, a single tensor (or what is no list at all) as a list of one."""
    if isinstance(x, list):
        return x
    return list(x) if isinstance(x, Iterable) and not isinstance(x, Tensor) else [x]


def finite(op: str, name: str, x: Any) -> float:
    """`x` as a finite Python float."""
    if type(x) is float and math.isfinite(x):
        return x
    if isinstance(x, Tensor):
        raise TypeError(
            f"{op}: {name} must be a Python float, got a tensor. Pass {name}.item() where a host "
            f"sync is acceptable"
        )
    try:
        value = float(x)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: {name} must be a float, got {type(x).__name__}") from None
    if not math.isfinite(value):
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return value


def scalars(op: str, like: Sequence[Any], *, traced: bool = False, **numbers: Any) -> list[Any]:
    """Each number as a finite float; or as it is, where it is a 0-d tensor of fp64 or fp32 on the
    device of `like`. One on a CPU is read, unless the call is `traced`."""
    device = like[0].device if like and isinstance(like[0], Tensor) else torch.device("cpu")
    out: list[Any] = []
    for name, x in numbers.items():
        if not isinstance(x, Tensor):
            out.append(finite(op, name, x))
            continue
        if x.ndim != 0:
            raise ValueError(
                f"{op}: {name} must be a float or a 0-d tensor, got a tensor of shape "
                f"{tuple(x.shape)}"
            )
        if x.dtype not in (torch.float64, torch.float32):
            raise TypeError(
                f"{op}: {name} must be a float or a tensor of float64 or float32, got {x.dtype}. "
                f"Convert it with .to(torch.float64)"
            )
        if x.device != device:
            raise ValueError(
                f"{op}: {name} must be a float or a tensor on {device}, where the others are, got "
                f"one on {x.device}. Move it with .to({str(device)!r})"
            )
        read = device.type == "cpu" and not traced
        out.append(finite(op, name, float(x.detach())) if read else x.detach())
    return out


def inv_mass_list(op: str, inv_mass: InvMass, like: Sequence[Tensor]) -> list[Any]:
    """M⁻¹ as a list, one entry for each tensor of `like`: all floats or all tensors."""
    if isinstance(inv_mass, (float, int)):
        values: list[Any] = [float(inv_mass)] * len(like)
        if 0.0 <= inv_mass < math.inf:
            return values
    else:
        values = tensor_list(inv_mass)  # type: ignore[arg-type]
        if len(values) != len(like):
            raise ValueError(
                f"{op}: inv_mass must have one entry for each of the {len(like)} tensors, got "
                f"{len(values)}"
            )
        if values and all(isinstance(w, Tensor) for w in values):
            return values
        if any(isinstance(w, Tensor) for w in values):
            raise TypeError(f"{op}: inv_mass must be all floats or all tensors, got both")
        values = [finite(op, f"inv_mass[{i}]", w) for i, w in enumerate(values)]
    if any(not 0.0 <= w < math.inf for w in values):
        raise ValueError(f"{op}: inv_mass must be finite and not negative, got {inv_mass!r}")
    return values


def check_float_tensors(op: str, **lists: Sequence[Any]) -> None:
    """Every entry is a strided tensor of fp64, fp32, bf16 or fp16, all on one device."""
    device = None
    for name, tensors in lists.items():
        for i, t in enumerate(tensors):
            if not isinstance(t, Tensor):
                raise TypeError(f"{op}: {name}[{i}] must be a tensor, got {type(t).__name__}")
            if t.layout != torch.strided:
                raise TypeError(
                    f"{op}: {name}[{i}] must be a dense tensor, got layout {t.layout}. Pass "
                    f"{name}[{i}].to_dense()"
                )
            if t.dtype not in FLOATS:
                raise TypeError(
                    f"{op}: {name}[{i}] must have dtype float64, float32, bfloat16 or float16, got "
                    f"{t.dtype}. Convert it with .to(torch.float32)"
                )
            if device is None:
                device = t.device
            if t.device != device:
                raise ValueError(
                    f"{op}: all tensors must be on one device; {name}[{i}] is on {t.device}, "
                    f"others on {device}. Move it with .to({str(device)!r})"
                )


def check_alike(op: str, **lists: Sequence[Any]) -> None:
    """`check_float_tensors`, and entries of the same place have the same shape and dtype."""
    check_float_tensors(op, **lists)
    (first, tensors), *others = lists.items()
    for name, other in others:
        if len(other) != len(tensors):
            raise ValueError(
                f"{op}: {first} and {name} must have the same length, got {len(tensors)} and "
                f"{len(other)}"
            )
        for i, (a, b) in enumerate(zip(tensors, other)):
            if a.shape != b.shape:
                raise ValueError(
                    f"{op}: {name}[{i}] must have the shape of {first}[{i}], {tuple(a.shape)}, got "
                    f"{tuple(b.shape)}"
                )
            if a.dtype != b.dtype:
                raise TypeError(
                    f"{op}: {name}[{i}] must have the dtype of {first}[{i}], {a.dtype}, got "
                    f"{b.dtype}. Convert it with .to({a.dtype})"
                )


def check_disjoint(
    op: str, written: Mapping[str, Sequence[Tensor]], read: Mapping[str, Sequence[Tensor]]
) -> None:
    """No two written tensors share memory, and none shares memory with a tensor that is read."""
    spans = [
        (*_span(t), f"{name}[{i}]", kind)
        for kind, lists in ((True, written), (False, read))
        for name, tensors in lists.items()
        for i, t in enumerate(tensors)
        if t.numel() and not t.is_meta
    ]
    for name, tensors in written.items():
        for i, t in enumerate(tensors):
            if _may_overlap_itself(t):
                raise ValueError(
                    f"{op}: {name}[{i}] is written and must not overlap itself, got strides "
                    f"{t.stride()} for shape {tuple(t.shape)}. Pass {name}[{i}].clone()"
                )
    spans.sort(key=lambda s: s[0])
    end, last = -1, ""  # of the written span that reaches furthest
    far, reader = -1, ""  # of any span that reaches furthest
    for low, high, name, is_written in spans:
        other = last if low < end else reader if is_written and low < far else ""
        if other:
            raise ValueError(
                f"{op}: {name} and {other} share memory, but {op} writes to one of them. "
                f"Clone one of the two"
            )
        if is_written and high > end:
            end, last = high, name
        if high > far:
            far, reader = high, name


def _may_overlap_itself(t: Tensor) -> bool:
    """True unless each stride steps over all that the smaller ones reach."""
    reach = 0
    for stride, size in sorted((s, n) for n, s in zip(t.shape, t.stride()) if n != 1):
        if stride <= reach and t.numel():
            return True
        reach += (size - 1) * stride
    return False


def _span(t: Tensor) -> tuple[int, int]:
    """First and one past the last byte that a strided tensor can touch."""
    low = t.data_ptr()
    extent = sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
    return low, low + (extent + 1) * t.element_size()


def subclasses(**lists: Sequence[Tensor]) -> str | None:
    """Why a kernel may not look into the memory of these tensors, or None."""
    for name, tensors in lists.items():
        for i, t in enumerate(tensors):
            if type(t) not in (Tensor, torch.nn.Parameter):
                return f"{name}[{i}] is a {type(t).__name__}, which may keep its values elsewhere"
    return None


def unlike_layouts(**lists: Sequence[Tensor]) -> str | None:
    """Why entries of the same place cannot be walked through as flat memory together, or None."""
    (first, tensors), *others = lists.items()
    if (reason := subclasses(**lists)) is not None:
        return reason
    for i, a in enumerate(tensors):
        if not _is_dense(a):
            return (
                f"{first}[{i}] is a view with gaps or overlaps: strides {a.stride()} for shape "
                f"{tuple(a.shape)}"
            )
        for name, other in others:
            b = other[i]
            if any(n != 1 and s != r for n, s, r in zip(a.shape, a.stride(), b.stride())):
                return (
                    f"{first}[{i}] and {name}[{i}] lie differently in memory: strides "
                    f"{a.stride()} and {b.stride()}"
                )
    return None


def _is_dense(t: Tensor) -> bool:
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(t.shape, t.stride()) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return not t.is_neg()
