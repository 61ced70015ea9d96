"""`gti bench`: each op beside its peers, in one run, interleaved, medians.

A case names its op, its peers and its floor: the bytes it must move over the bandwidth this machine
shows in the same run. Peers are what a good engineer would write or call otherwise; all get the
same inputs. An op whose parity with the reference is red gets no time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from dataclasses import asdict, replace
from typing import Any

import torch

from ..backends import build_info
from ..extras import require
from .case import Case
from .timing import Result, bandwidth, measure


def cases(device: str = "cpu", suite: str = "default") -> list[Case]:
    """The lines of the benchmark, in order. The full suite adds the long ones on a CPU and on a GPU
    what the project holds itself to there; the bars of the default lines are those for a CPU."""
    from . import gpu, host_cost, leapfrog, power_iteration, two_form

    default = [
        *power_iteration.default_cases(),
        *leapfrog.default_cases(),
        *two_form.default_cases(),
        *host_cost.default_cases(),
    ]
    if device == "cpu":
        if suite == "default":
            return default
        families = (power_iteration, leapfrog, two_form)
        return default + [case for family in families for case in family.full_cases()]
    without_bars = [replace(case, bars={}, most_us=math.inf) for case in default]
    return without_bars if suite == "default" else gpu.full_cases() + without_bars


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gti bench`."""
    parser.description = (
        "Time each op beside its peers and the machine's bandwidth, interleaved, medians. Exit "
        "status 1 if an op's parity is red or a line fails."
    )
    parser.add_argument("--op", help="only cases of this op")
    parser.add_argument("--rounds", type=int, default=15, help="timings of each (default: 15)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--suite",
        choices=("default", "full"),
        default="default",
        help="full: also the long lines (7 minutes); on a GPU the large lists and shapes of "
        "its bars (up to 45 GB)",
    )
    parser.add_argument("--json", metavar="FILE", help="write machine, bandwidth and results")
    parser.add_argument("--plot", metavar="FILE", help="write a PNG of the ratios")


def run(args: argparse.Namespace) -> int:
    """Prints a line per case and its peers; writes what was asked for."""
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    every = cases(args.device, args.suite)
    chosen = [c for c in every if args.op in (None, c.op)]
    if not chosen:
        names = sorted({c.op for c in every})
        raise ValueError(f"--op: expected one of {names}, got {args.op!r}")
    warnings.filterwarnings("ignore", module="torch._dynamo|torch._inductor")
    torch._dynamo.config.recompile_limit = 64
    speed = bandwidth(args.device)
    info = build_info()
    machine = f"{info['platform']}, {info['threads']} threads, torch {info['torch']}"
    if args.device == "cuda":
        machine = (
            f"{info['cuda device']}, triton {info['triton']}, nvrtc {info['nvrtc']}, {machine}"
        )
    read, copy = speed["read"] / 1e9, speed["copy"] / 1e9
    print(f"{machine}; measured bandwidth: read {read:.1f} GB/s, copy {copy:.1f} GB/s (both ways)")
    results = []
    for case in chosen:
        results.append(measure(case, args.rounds, args.device))
        print("\n".join(lines(results[-1])))
        sys.stdout.flush()
        torch._dynamo.reset()
        if args.json:  # after each line: a run that is cut short leaves what it has
            report = {"machine": info, "bandwidth": speed, "results": [_plain(r) for r in results]}
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump(report, file, indent=1, ensure_ascii=False)
    missed = [r for r in results if not r.met]
    print(f"{len(results) - len(missed)} of {len(results)} lines meet their bars")
    if args.plot:
        plot(results, args.plot)
    return 1 if any(r.failure for r in results) else 0


def _plain(result: Result) -> dict[str, Any]:
    return {**asdict(result), "met": result.met}


def lines(result: Result) -> list[str]:
    """The printed form of a result."""
    head = f"{result.op}  {result.name}  {result.shape}  {result.dtype}"
    if result.seconds is None:
        return [f"{head}: {result.failure}, no time"]
    text = f"{head}: {_time(result.seconds)}"
    if result.most_us is not None:
        text += f" (at most {result.most_us:.0f} us)"
    if result.share_of_floor is not None:
        text += (
            f", {result.bytes_moved / 1e6:.0f} MB moved, "
            f"{100 * result.share_of_floor:.0f} % of the {result.floor} bandwidth"
        )
    if result.least_share:
        text += f" (bar {100 * result.least_share:.0f} %)"
    out = [text]
    for peer, seconds in result.peers.items():
        bar = f"  (bar {result.bars[peer]:.2f}x)" if peer in result.bars else ""
        out.append(f"    {peer:<24} {_time(seconds):>12}  {result.ratios[peer]:8.2f}x{bar}")
    if not result.met:
        out.append("    bar not met")
    return out


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.2f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def plot(results: list[Result], path: str) -> None:
    """Horizontal bars: how many times longer each peer takes, with the project's bar as a tick."""
    blue, red, grey = "#4c78a8", "#e45756", "#9aa7b4"
    require("matplotlib", "gti bench --plot").use("Agg")
    pyplot = require("matplotlib.pyplot", "gti bench --plot")
    rows = [(r, peer) for r in results for peer in r.peers][::-1]
    figure, axes = pyplot.subplots(figsize=(10, 0.32 * len(rows) + 1.2), layout="constrained")
    for at, (result, peer) in enumerate(rows):
        ratio, bar = result.ratios[peer], result.bars.get(peer)
        axes.barh(at, ratio, color=grey if bar is None else blue if ratio >= bar else red)
        axes.text(ratio * 1.04, at, f"{ratio:.2f}x", va="center", fontsize=8)
        if bar is not None:
            axes.plot([bar] * 2, [at - 0.45, at + 0.45], color="black", lw=2)
    axes.set_yticks(range(len(rows)))
    axes.set_yticklabels([f"{r.op} {r.name}, {r.shape}: {peer}" for r, peer in rows], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(right=2.0 * axes.get_xlim()[1])  # room for the numbers
    axes.margins(y=0.4 / max(len(rows), 1))
    axes.axvline(1.0, color="grey", lw=0.8)
    axes.set_xlabel(
        "time of the peer / time of gti_kernels\n(tick: the bar; red: below it; grey: no bar)"
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
