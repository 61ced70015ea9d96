"""Seconds spent in gti kernels and in gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch


class Clock:
    """Adds up wall time by name: `with clock("kernels"): ...`; a CUDA device is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {"kernels": 0.0, "gradients": 0.0}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self.seconds[name] += self.now() - start

    def now(self) -> float:
        """Seconds of a monotonic clock, after the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter()


def add_seconds(total: dict[str, float], part: dict[str, float]) -> None:
    """total[name] += part[name] for every name of `part`, in place."""
    for name, seconds in part.items():
        total[name] = total.get(name, 0.0) + seconds
