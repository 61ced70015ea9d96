"""Timing of cases: interleaved rounds, medians, and the bandwidth of the machine beside them."""

from __future__ import annotations

import functools
import math
import statistics
import time
from dataclasses import dataclass, field, replace

import torch

from ..testing import compare
from .case import Call, Case, Work


def _seconds(call: Call, calls: int, device: str) -> float:
    if device != "cpu":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def race(work: Work, rounds: int, calls: int, device: str) -> dict[str, list[float]]:
    """Seconds of the op (under "gti") and each peer, one after the other, `rounds` times."""
    contenders = {"gti": work.op, **work.peers}
    for name, call in contenders.items():  # warm: caches, thread pools, compilation
        for _ in range(0 if name in work.few else 3):
            call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name, call in contenders.items():
            if name not in work.few or turn < 2:
                times[name].append(_seconds(call, calls, device))
    return times


def bandwidth(device: str, rounds: int = 9) -> dict[str, float]:
    """Bytes per second of this machine: reading 512 MiB once (4 GiB on a GPU), and copying half of
    that (both ways counted)."""
    x = torch.ones((128 if device == "cpu" else 1024) * 2**20, device=device)
    half, target = x[: x.numel() // 2], torch.empty(x.numel() // 2, device=device)
    readers: list[Call] = [lambda: x.sum(), lambda: torch.dot(x, x), lambda: x.amax()]
    for call in readers:
        call()
    target.copy_(half)
    read = [min(_seconds(call, 1, device) for call in readers) for _ in range(rounds)]
    copy = [_seconds(lambda: target.copy_(half), 1, device) for _ in range(rounds)]
    size = x.numel() * x.element_size()
    return {"read": size / statistics.median(read), "copy": size / statistics.median(copy)}


@dataclass(frozen=True)
class Result:
    """One measured line. ratios: peer time / op time, the median over rounds of the paired
    ratios."""

    op: str
    name: str
    shape: str
    dtype: str
    parity: bool
    bars: dict[str, float]
    most_us: float | None
    least_share: float
    seconds: float | None = None
    peers: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    bytes_moved: int = 0
    floor: str = "read"
    share_of_floor: float | None = None
    failure: str = ""  #: why there is no time

    @property
    def met(self) -> bool:
        """Parity is green and every bar is reached."""
        if not self.parity or self.seconds is None:
            return False
        cheap = self.most_us is None or self.seconds * 1e6 <= self.most_us
        fast = (self.share_of_floor or 0.0) >= self.least_share
        return (
            cheap and fast and all(self.ratios[peer] >= least for peer, least in self.bars.items())
        )


@functools.cache
def _parity(op: str, dtype: str, device: str) -> bool:
    return all(c.error <= c.bound for c in compare(op, dtype, "auto", device))


def measure(case: Case, rounds: int, device: str) -> Result:
    """Checks the op's parity, then times the case, and the bandwidth right after it. A case that
    fails, for lack of memory say, is a result too: the others still count."""
    result = Result(
        case.op,
        case.name,
        case.shape,
        case.dtype,
        False,
        case.bars,
        None if math.isinf(case.most_us) else case.most_us,
        case.least_share,
    )
    try:
        if not _parity(case.op, case.dtype, device):
            return replace(result, failure="parity is red")
        result = replace(result, parity=True)
        work = case.build(device)
        if device != "cpu":  # compiling its peers for a GPU takes longer than all else
            peers = {k: v for k, v in work.peers.items() if not k.startswith("compiled")}
            work = replace(work, peers=peers)
        times = race(work, rounds, case.calls, device)
    except Exception as error:  # cuda.core has a class of its own
        return replace(result, failure=f"{type(error).__name__}: {error}")
    own = statistics.median(times["gti"])
    speed = bandwidth(device, rounds=5)[work.floor] if work.bytes_moved else math.inf
    others = {name: t for name, t in times.items() if name != "gti"}
    return replace(
        result,
        seconds=own,
        peers={name: statistics.median(t) for name, t in others.items()},
        ratios={
            name: statistics.median(b / a for a, b in zip(times["gti"], t))
            for name, t in others.items()
        },
        bytes_moved=work.bytes_moved,
        floor=work.floor,
        share_of_floor=work.bytes_moved / speed / own if work.bytes_moved else None,
    )
