"""Checks of scalar arguments that the probes share."""

from __future__ import annotations

import math
from collections.abc import Iterable


def finite(name: str, value: float, *, positive: bool = False) -> float:
    """`value` as a float; ValueError when it is not finite, or with `positive` not > 0."""
    wanted = "a finite number > 0" if positive else "a finite number"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected {wanted}, got {type(value).__name__}")
    if not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"{name}: expected {wanted}, got {value}")
    return float(value)


def step_sizes(dts: Iterable[float]) -> tuple[float, ...]:
    """`dts` as a tuple; ValueError when it is empty or one of them is not finite and > 0."""
    if not isinstance(dts, Iterable):
        raise TypeError(f"dts: expected a sequence of step sizes, got {type(dts).__name__}")
    sizes = tuple(finite(f"dts[{i}]", dt, positive=True) for i, dt in enumerate(dts))
    if not sizes:
        raise ValueError("dts: expected at least one step size, got none")
    return sizes


def whole(name: str, value: int, *, least: int = 1) -> int:
    """`value` as an int; ValueError when it is below `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer >= {least}, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value}")
    return value
