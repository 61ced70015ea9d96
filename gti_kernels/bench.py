"""`gti bench`: each op beside its peers, in one run, interleaved, medians.

A case names its op, its peers and its floor: the bytes it must move over the bandwidth this machine
shows in the same run. Peers are what a good engineer would write or call otherwise; all get the
same inputs. An op whose parity with the reference is red gets no time.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import gti_kernels as gti

from .backends import build_info
from .conventions import fan_in_inverse_mass
from .extras import require
from .models.simple_cnn import SimpleCNN
from .testing import compare

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


# ---- the cases ----------------------------------------------------------------------------------


def _eager_power(matrices: list[Tensor], starts: list[Tensor], steps: int) -> list[Tensor]:
    """The loop a good engineer writes: two matrix-vector products a step, W stays in cache
    between."""
    sigmas = []
    for w, v in zip(matrices, starts):
        w_t = w.t()
        for _ in range(steps):
            u = torch.mv(w, v)
            z = torch.mv(w_t, u)
            v = z / torch.linalg.vector_norm(z)
        sigmas.append(torch.linalg.vector_norm(u))
    return sigmas


def _eager_batched_power(w: Tensor, v: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        u = torch.bmm(w, v)
        z = torch.bmm(w.mT, u)
        v = z / torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return torch.linalg.vector_norm(u, dim=1)


def _power_list(device: str, method: str) -> Work:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=generator).to(device) for s in RESNET18_WEIGHTS]
    matrices = [w.flatten(1) for w in weights]
    starts = [torch.randn(w.shape[1], generator=generator).to(device) for w in matrices]
    compiled = torch.compile(_eager_power)
    return Work(
        op=lambda: gti.power_iteration(weights, method=method, max_steps=10, tol=0),
        peers={
            "eager mv": lambda: _eager_power(matrices, starts, 10),
            "compiled mv": lambda: compiled(matrices, starts, 10),
            "svdvals": lambda: [torch.linalg.svdvals(w)[0] for w in matrices],
        },
        bytes_moved=10 * sum(w.numel() * w.element_size() for w in weights),
        few=("svdvals",),
    )


def _power_batch(device: str, method: str) -> Work:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1024, 64, 64, generator=generator).to(device)
    v = torch.randn(1024, 64, 1, generator=generator).to(device)
    compiled = torch.compile(_eager_batched_power)
    return Work(
        op=lambda: gti.power_iteration(w, method=method, max_steps=10, tol=0),
        peers={
            "eager bmm": lambda: _eager_batched_power(w, v, 10),
            "compiled bmm": lambda: compiled(w, v, 10),
            "svdvals": lambda: torch.linalg.svdvals(w)[:, 0],
        },
        bytes_moved=w.numel() * w.element_size(),  # each matrix stays in a core's cache
        few=("svdvals",),
    )


def kick_drift(device: str, shapes: Sequence[tuple[int, ...]]) -> Work:
    """kick_drift_ with kinetic energy over parameters of these shapes, fp32."""

    def tensors(seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        return [torch.randn(s, generator=generator, device=device) for s in shapes]

    q, p, grad = tensors(0), tensors(1), tensors(2)
    mass = [
        min(8.0, max(0.125, torch.Size(s[1:]).numel() ** -0.5)) if len(s) > 1 else 1.0
        for s in shapes
    ]
    weight = torch.tensor(mass, device=device, dtype=torch.float64)
    h, damp = 1e-3, 0.999

    def foreach() -> Tensor:
        torch._foreach_mul_(p, damp)
        torch._foreach_add_(p, grad, alpha=-h)
        torch._foreach_add_(q, torch._foreach_mul(p, mass), alpha=h)
        return 0.5 * (torch.stack(torch._foreach_norm(p)).double().square() * weight).sum()

    def loop(q: list[Tensor], p: list[Tensor], grad: list[Tensor]) -> Tensor:
        energy = torch.zeros((), dtype=torch.float64, device=device)
        for q_t, p_t, g_t, w in zip(q, p, grad, mass):
            p_t.mul_(damp).add_(g_t, alpha=-h)
            q_t.add_(p_t, alpha=h * w)
            flat = p_t.view(-1)
            energy += 0.5 * w * torch.dot(flat, flat)
        return energy

    compiled = torch.compile(loop)
    total = sum(t.numel() * t.element_size() for t in q)
    source = torch.randn(5 * total // 8, device=device)  # fp32: as many bytes read as written
    target = torch.empty_like(source)
    return Work(
        op=lambda: gti.kick_drift_(q, p, grad, h, h, inv_mass=mass, damp=damp),
        peers={
            "_foreach": foreach,
            "per-tensor loop": lambda: loop(q, p, grad),
            "compiled loop": lambda: compiled(q, p, grad),
            "copy of the same bytes": lambda: target.copy_(source),
        },
        bytes_moved=5 * total,
        floor="copy",
    )


def optimizer_step(device: str, shapes: Sequence[tuple[int, ...]]) -> Work:
    """A whole step of gti.optim.Leapfrog over parameters of these shapes, fp32."""
    work = kick_drift(device, shapes)
    params = [torch.nn.Parameter(torch.randn(s, device=device)) for s in shapes]
    for q in params:
        q.grad = torch.randn_like(q)
    step = gti.optim.Leapfrog(params, dt=1e-3, damping=1.0).step
    others = [[torch.randn_like(q).detach() for q in params] for _ in range(3)]
    mass = [fan_in_inverse_mass(q) for q in params]

    def foreach() -> None:  # by hand, and without the energy, which a step alone does not need
        q, p, grad = others
        torch._foreach_mul_(p, math.exp(-1e-3))
        torch._foreach_add_(p, grad, alpha=-1e-3)
        torch._foreach_add_(q, torch._foreach_mul(p, mass), alpha=1e-3)

    copy = "copy of the same bytes"
    return replace(work, op=step, peers={"_foreach": foreach, copy: work.peers[copy]})


def training_step(device: str) -> Work:
    """Gradient and step of a small CNN on one batch: Leapfrog, and SGD on a copy of it."""

    def trainer(make: Callable[[Any], torch.optim.Optimizer]) -> Call:
        torch.manual_seed(0)
        model = SimpleCNN(1, 10, norm="group").to(device)
        x, y = torch.randn(64, 1, 8, 8, device=device), torch.randint(10, (64,), device=device)
        optimizer = make(model.parameters())

        def step() -> None:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        return step

    return Work(
        op=trainer(lambda params: gti.optim.Leapfrog(params, dt=0.1, damping=1.0)),
        peers={
            "SGD(momentum)": trainer(lambda params: torch.optim.SGD(params, 0.01, momentum=0.9))
        },
    )


def two_form(device: str, m: int, n: int) -> Work:
    """two_form of m pairs of tangent vectors of length n, fp32."""
    generator = torch.Generator(device).manual_seed(0)
    dq = torch.randn(m, n, generator=generator, device=device)
    dp = torch.randn(m, n, generator=generator, device=device)

    def naive(dq: Tensor, dp: Tensor) -> Tensor:
        return dq @ dp.T - dp @ dq.T

    def upcast() -> Tensor:
        q, p = dq.double(), dp.double()
        return q @ p.T - p @ q.T

    compiled = torch.compile(naive)
    return Work(
        op=lambda: gti.two_form(dq, dp),
        peers={
            "naive fp32": lambda: naive(dq, dp),
            "upcast to fp64": upcast,
            "compiled naive": lambda: compiled(dq, dp),
        },
        bytes_moved=2 * dq.numel() * dq.element_size(),
    )


def _host(op: str, count: int) -> Callable[[str], Work]:
    def build(device: str) -> Work:
        lists = [[torch.randn(4, device=device) for _ in range(count)] for _ in range(3)]
        q, p, grad = lists if count > 1 else [tensors[0] for tensors in lists]
        ps, grads = lists[1:]
        squares = [t.view(2, 2) for t in ps]
        tangents = squares if count > 1 else squares[0]
        calls: dict[str, Call] = {
            "kick_": lambda: gti.kick_(p, grad, 1e-9),
            "drift_": lambda: gti.drift_(q, p, 1e-9),
            "kick_drift_": lambda: gti.kick_drift_(q, p, grad, 1e-9, 1e-9),
            "kinetic_energy": lambda: gti.kinetic_energy(p),
            "two_form": lambda: gti.two_form(tangents, tangents),
            "power_iteration": lambda: gti.power_iteration(tangents, max_steps=1, tol=0.0),
        }
        return Work(
            op=calls[op],
            peers={"_foreach_add_": lambda: torch._foreach_add_(ps, grads, alpha=-1e-9)},
        )

    return build


def cases(device: str = "cpu", suite: str = "default") -> list[Case]:
    """The lines of the benchmark, in order. The full suite adds the long ones on a CPU and on a GPU
    what the project holds itself to there; the bars of the default lines are those for a CPU."""
    if device == "cpu":
        if suite == "default":
            return _cases()
        from .bench_phase_space import phase_space_cases
        from .bench_power_iteration import full_cases
        from .bench_two_form import two_form_cases

        return _cases() + phase_space_cases() + full_cases() + two_form_cases()
    without_bars = [replace(case, bars={}, most_us=math.inf) for case in _cases()]
    if suite == "default":
        return without_bars
    from .bench_gpu import gpu_cases

    return gpu_cases() + without_bars


def _cases() -> list[Case]:
    resnet, batch = "21 matrices of ResNet-18", "[1024, 64, 64]"
    out = []
    for method in ("power", "cg"):
        out.append(
            Case(
                "power_iteration",
                f"10 passes, {method}",
                resnet,
                "float32",
                lambda device, method=method: _power_list(device, method),  # type: ignore[misc]
                {"eager mv": 1.8} if method == "power" else {},
            )
        )
        out.append(
            Case(
                "power_iteration",
                f"10 passes, {method}",
                batch,
                "float32",
                lambda device, method=method: _power_batch(device, method),  # type: ignore[misc]
                {"eager bmm": 8.0, "svdvals": 60.0} if method == "power" else {},
            )
        )
    out.append(
        Case(
            "kick_drift_",
            "with kinetic energy",
            "62 tensors of ResNet-18",
            "float32",
            lambda device: kick_drift(device, RESNET18_PARAMETERS),
            {"_foreach": 2.0, "per-tensor loop": 2.0, "copy of the same bytes": 1 / 1.2},
        )
    )
    optimizer_cases: tuple[tuple[str, Any, dict[str, float], float], ...] = (
        ("62 tensors of ResNet-18", RESNET18_PARAMETERS, {"copy of the same bytes": 1 / 1.1}, 2.5),
        ("2,000 tensors [1000]", ((1000,),) * 2000, {}, 3.0),
    )
    for shape, shapes, bars, least in optimizer_cases:
        out.append(
            Case(
                "kick_drift_",
                "Leapfrog.step",
                shape,
                "float32",
                lambda device, shapes=shapes: optimizer_step(device, shapes),  # type: ignore[misc]
                {"_foreach": least, **bars},
            )
        )
    out.append(
        Case(
            "kick_drift_",
            "training with Leapfrog",
            "SimpleCNN, batch 64",
            "float32",
            training_step,
            {"SGD(momentum)": 1 / 1.05},
        )
    )
    out.append(
        Case(
            "two_form",
            "fp64 accumulation",
            "m = 4, N = 11 M",
            "float32",
            lambda device: two_form(device, 4, 11_000_000),
            {"naive fp32": 2.0, "upcast to fp64": 8.0},
        )
    )
    for op in ("kick_", "drift_", "kick_drift_", "kinetic_energy", "two_form", "power_iteration"):
        tensors, bar = _host(op, 1), 6.0
        out.append(Case(op, "host cost", "1 tensor [4]", "float32", tensors, {}, bar, calls=200))
    for op in ("kick_", "drift_", "kick_drift_", "kinetic_energy", "two_form", "power_iteration"):
        bars = {"_foreach_add_": 1 / 1.5}
        out.append(
            Case(op, "host cost", "62 tensors [4]", "float32", _host(op, 62), bars, calls=50)
        )
    return out


# ---- timing -------------------------------------------------------------------------------------


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
        _parity(case.op, case.dtype, device),
        case.bars,
        None if math.isinf(case.most_us) else case.most_us,
        case.least_share,
    )
    if not result.parity:
        return replace(result, failure="parity is red")
    try:
        work = case.build(device)
        if device != "cpu":  # compiling its peers for a GPU takes longer than all else
            peers = {k: v for k, v in work.peers.items() if not k.startswith("compiled")}
            work = replace(work, peers=peers)
        times = race(work, rounds, case.calls, device)
    except (RuntimeError, ValueError) as error:
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


# ---- the command --------------------------------------------------------------------------------


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
    require("matplotlib", "gti bench --plot").use("Agg")
    pyplot = require("matplotlib.pyplot", "gti bench --plot")
    rows = [(r, peer) for r in results for peer in r.peers][::-1]
    figure, axes = pyplot.subplots(figsize=(10, 0.32 * len(rows) + 1.2), layout="constrained")
    for at, (result, peer) in enumerate(rows):
        ratio = result.ratios[peer]
        axes.barh(at, ratio, color="#4c78a8" if ratio >= 1 else "#e45756")
        axes.text(ratio * 1.04, at, f"{ratio:.2f}x", va="center", fontsize=8)
        if peer in result.bars:
            axes.plot([result.bars[peer]] * 2, [at - 0.45, at + 0.45], color="black", lw=2)
    axes.set_yticks(range(len(rows)))
    axes.set_yticklabels([f"{r.op} {r.name}, {r.shape}: {peer}" for r, peer in rows], fontsize=8)
    axes.set_xscale("log")
    axes.axvline(1.0, color="grey", lw=0.8)
    axes.set_xlabel("time of the peer / time of gti_kernels (black tick: the bar)")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
