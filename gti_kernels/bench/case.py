"""One line of the benchmark: an op, its peers, and the bytes it cannot avoid moving."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Call = Callable[[], Any]

#: Weight shapes of ResNet-18 (11.7 M parameters, 21 matrices), torchvision's order.
RESNET18_WEIGHTS = (
    (64, 3, 7, 7),
    *[(64, 64, 3, 3)] * 4,
    *[(128, 64, 3, 3), (128, 128, 3, 3), (128, 64, 1, 1), (128, 128, 3, 3), (128, 128, 3, 3)],
    *[(256, 128, 3, 3), (256, 256, 3, 3), (256, 128, 1, 1), (256, 256, 3, 3), (256, 256, 3, 3)],
    *[(512, 256, 3, 3), (512, 512, 3, 3), (512, 256, 1, 1), (512, 512, 3, 3), (512, 512, 3, 3)],
    (1000, 512),
)
#: All 62 parameters: each convolution is followed by the scale and shift of its normalisation.
RESNET18_PARAMETERS = tuple(
    shape
    for weight in RESNET18_WEIGHTS
    for shape in ((weight, weight[:1], weight[:1]) if len(weight) == 4 else (weight, weight[:1]))
)


@dataclass(frozen=True)
class Work:
    """What a case runs: the op, its peers by name, and the bytes it cannot avoid moving."""

    op: Call
    peers: dict[str, Call]
    bytes_moved: int = 0
    floor: str = "read"  #: "read" or "copy": the bandwidth that bounds it
    few: tuple[str, ...] = ()  #: peers so slow that two rounds, without a warm-up, must do


@dataclass(frozen=True)
class Case:
    """One line of the benchmark: data, and how to make its work."""

    op: str
    name: str
    shape: str
    dtype: str
    build: Callable[[str], Work]  #: from the device
    bars: dict[str, float] = field(default_factory=dict)  #: peer → least ratio peer time / op time
    most_us: float = math.inf  #: host cost of one call, in microseconds
    calls: int = 1  #: calls in one timing
    least_share: float = 0.0  #: of the bandwidth of the floor
