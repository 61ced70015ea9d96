"""Samples of every op, and the one rule by which a kernel is right.

The truth is the reference in float64 on the very inputs of the kernel. A kernel's error against it
may be at most `MULTIPLE` times the error of the reference in the working dtype, plus `FLOOR`
roundings of the largest value. (The error of the reference in float64 is taken from float32, scaled
by the ratio of the roundings: it has no truth above it.) Where an op returns an error bound of its
own (two_form, gram), that bound is the rule instead.

>>> from gti_kernels import testing
>>> all(c.error <= c.bound for c in testing.compare("kick_", "float32", "reference"))
True
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gti_kernels

from .rows import BY_NAME

MULTIPLE = 4.0
FLOOR = 32.0

#: Shapes that meet every branch of the kernels: scalars, empty tensors, one element, tails of every
#: length up to a vector, several chunks.
SHAPES = ((), (0,), (1,), (7,), (16,), (5, 3), (64, 3, 3, 3), (129,), (300, 257), (40001,))


@dataclass(frozen=True)
class Sample:
    """One call of an op: make(dtype, device) gives fresh positional and keyword arguments."""

    name: str
    make: Callable[[torch.dtype, str], tuple[list[Any], dict[str, Any]]]


@dataclass(frozen=True)
class Comparison:
    """The largest error of one output of one call, and the largest that is right."""

    op: str
    sample: str
    dtype: str
    backend: str
    output: str
    error: float
    bound: float


def numbers(*shape: int, dtype: torch.dtype, device: str, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers, drawn in float64 and rounded once, to dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")).to(
        device, dtype
    )


def with_spectrum(
    s: Tensor, m: int, n: int, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    """A random [m, n] matrix U diag(s) Vᵀ with the singular values s, at most min(m, n) of them."""
    generator = torch.Generator().manual_seed(seed)
    k = s.numel()
    u, v = (
        torch.linalg.qr(torch.randn(x, k, generator=generator, dtype=torch.float64, device="cpu"))[
            0
        ]
        for x in (m, n)
    )
    return ((u * s.double()) @ v.T).to(dtype)


def _tensors(dtype: torch.dtype, device: str, seed: int) -> list[Tensor]:
    return [
        numbers(*shape, dtype=dtype, device=device, seed=seed + i) for i, shape in enumerate(SHAPES)
    ]


def _leapfrog_samples(op: str) -> list[Sample]:
    arguments = {"kick_": 2, "drift_": 2, "kick_drift_": 3, "kinetic_energy": 1}[op]
    factors = {"kick_": [0.13], "drift_": [-0.21], "kick_drift_": [0.13, -0.21]}.get(op, [])

    def make(mass: str) -> Callable[[torch.dtype, str], tuple[list[Any], dict[str, Any]]]:
        def arguments_of(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
            lists: list[Any] = [_tensors(dtype, device, 100 * a) for a in range(arguments)]
            kwargs: dict[str, Any] = {}
            if op in ("kick_", "kick_drift_"):
                kwargs["damp"] = 0.97
            if mass == "scalar mass":
                kwargs["inv_mass"] = 0.7
            elif mass == "mass of each tensor":
                kwargs["inv_mass"] = [0.3 + 0.1 * i for i in range(len(SHAPES))]
            elif mass == "mass of each element":
                kwargs["inv_mass"] = [t.abs() for t in _tensors(dtype, device, 900)]
            return [*lists, *factors], kwargs

        return arguments_of

    masses = ["no mass"]
    if op != "kick_":
        masses = ["scalar mass", "mass of each tensor", "mass of each element"]
    return [Sample(mass, make(mass)) for mass in masses]


def _two_form_samples() -> list[Sample]:
    def make(
        m: int, sizes: tuple[int, ...], metric: bool
    ) -> Callable[[torch.dtype, str], tuple[list[Any], dict[str, Any]]]:
        def arguments_of(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
            dq = [numbers(m, n, dtype=dtype, device=device, seed=i) for i, n in enumerate(sizes)]
            dp = [
                numbers(m, n, dtype=dtype, device=device, seed=50 + i) for i, n in enumerate(sizes)
            ]
            return [dq, dp], {"metric": metric}

        return arguments_of

    cases = [
        (1, (5,), True),
        (2, (9,), False),
        (4, (8192,), True),
        (5, (3, 0, 17001, 64), True),
        (9, (40000,), False),
        (17, (2049, 1), True),
    ]
    return [Sample(f"m={m}, N={sum(s)}", make(m, s, metric)) for m, s, metric in cases]


def _gram_samples() -> list[Sample]:
    def make(
        m: int, rows: int | None, sizes: tuple[int, ...], weighted: bool
    ) -> Callable[[torch.dtype, str], tuple[list[Any], dict[str, Any]]]:
        def arguments_of(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
            def draw(rows: int, seed: int) -> list[Tensor]:
                return [
                    numbers(rows, n, dtype=dtype, device=device, seed=seed + i)
                    for i, n in enumerate(sizes)
                ]

            weight = [w[0] for w in draw(1, 90)] if weighted else None
            return [draw(m, 0), None if rows is None else draw(rows, 50)], {"weight": weight}

        return arguments_of

    cases = [
        (1, None, (5,), False),
        (3, 6, (9,), True),
        (4, None, (40000,), True),
        (5, 9, (3, 0, 17001, 64), True),
        (9, 2, (2049, 1), False),
        (17, None, (300,), False),
    ]
    return [
        Sample(f"m={m}, l={rows or m}, N={sum(sizes)}", make(m, rows, sizes, weighted))
        for m, rows, sizes, weighted in cases
    ]


def _power_iteration_samples() -> list[Sample]:
    shapes = ((1, 9), (9, 1), (7, 5), (16, 16), (33, 129), (129, 33), (300, 700), (64, 3, 3, 3))

    def make(method: str) -> Callable[[torch.dtype, str], tuple[list[Any], dict[str, Any]]]:
        def arguments_of(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
            weights = []
            for i, (m, *rest) in enumerate(shapes):
                n = torch.Size(rest).numel()
                s = 0.7 ** torch.arange(min(m, n), dtype=torch.float64, device="cpu")
                w = with_spectrum(s, m, n, dtype=dtype, seed=i)
                weights.append(w.reshape(m, *rest).to(device))
            return [weights], {"method": method, "max_steps": 30, "tol": 0.0}

        return arguments_of

    return [Sample(method, make(method)) for method in ("cg", "power")]


def samples(op: str) -> list[Sample]:
    """The samples of a registered op."""
    if op == "two_form":
        return _two_form_samples()
    if op == "gram":
        return _gram_samples()
    if op == "power_iteration":
        return _power_iteration_samples()
    return _leapfrog_samples(op)


def _double(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.double().clone()
    return [_double(y) for y in x] if isinstance(x, list) else x


def _call(op: str, args: list[Any], kwargs: dict[str, Any], backend: str) -> dict[str, Any]:
    """Output name → tensor or list of tensors; what is written in place counts as an output."""
    result = getattr(gti_kernels, op)(*args, **kwargs, backend=backend)
    written = dict(zip(BY_NAME[op].mutates, args))
    if op == "power_iteration":
        signs = [_signs(v) if kwargs.get("k", 1) > 1 else 1.0 for v in result.v]
        u, v = ([x * s for x, s in zip(xs, signs)] for xs in (result.u, result.v))
        return {"sigma": result.sigma, "u": u, "v": v}
    if op == "two_form":
        outputs = {"omega": result.omega}
        return outputs if result.metric is None else {**outputs, "metric": result.metric}
    if op == "gram":
        return {"matrix": result.matrix}
    if result is not None:
        written["energy"] = result
    return written


def _signs(v: Tensor) -> Tensor:
    """Signs that make the largest entry of each column positive: with k > 1 the Ritz vectors of the
    first step have any sign, as eigenvectors have."""
    return torch.sign(v.gather(-2, v.abs().argmax(-2, keepdim=True)))


def _largest(x: Any) -> float:
    parts = [
        t.double().abs().max().item() for t in (x if isinstance(x, list) else [x]) if t.numel()
    ]
    return max(parts, default=0.0)


def _difference(a: Any, b: Any) -> Any:
    if isinstance(a, list):
        return [_difference(x, y) for x, y in zip(a, b, strict=True)]
    return a.double() - b.double()


def compare(
    op: str,
    dtype: str,
    backend: str,
    device: str = "cpu",
    cases: Sequence[Sample] | None = None,
) -> list[Comparison]:
    """Every output of every sample of an op (or of `cases`) on a backend, held against the float64
    reference."""
    rows = []
    working = getattr(torch, dtype)
    lower = torch.float32 if working == torch.float64 else working
    ratio = torch.finfo(working).eps / torch.finfo(lower).eps
    for sample in samples(op) if cases is None else cases:
        args, kwargs = sample.make(working, device)
        truth = _call(op, _double(args), {k: _double(v) for k, v in kwargs.items()}, "reference")
        own = _call(op, *sample.make(lower, device), "reference")
        got = _call(op, args, kwargs, backend)
        for name, value in got.items():
            error = _largest(_difference(value, truth[name]))
            first = value[0] if isinstance(value, list) else value
            rounding = FLOOR * torch.finfo(first.dtype).eps * _largest(truth[name])
            bound = MULTIPLE * ratio * _largest(_difference(own[name], truth[name])) + rounding
            if (op, name) in (("two_form", "omega"), ("gram", "matrix")):
                function, wide = (
                    getattr(gti_kernels, op),
                    {k: _double(v) for k, v in kwargs.items()},
                )
                bounds = function(*args, **kwargs, backend=backend).error_bound
                bounds = bounds + function(*_double(args), **wide, backend="reference").error_bound
                excess = (value - truth[name]).abs() - bounds
                error, bound = float((excess + bounds).max()), float(bounds.max())
                error = error if float(excess.max()) <= 0 else max(error, 2.0 * bound)
            rows.append(Comparison(op, sample.name, dtype, backend, name, error, bound))
    return rows
