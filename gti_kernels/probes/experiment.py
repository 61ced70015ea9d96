"""`gti certify`: a short training on images, then the certificate of each normalisation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import nn

from ..extras import require
from ..models.data import LabelledImages, load_images
from ..models.mlp import MLP
from ..models.normalization import REGIMES
from ..models.resnet18 import ResNet18
from ..models.simple_cnn import SimpleCNN
from .certificate import Certificate, certify
from .certificate_text import (
    DOSE_HEADER,
    HEADER,
    LEGEND,
    dose_cells,
    findings,
    table_cells,
    thresholds_line,
    time_line,
)
from .clock import add_seconds
from .dose_response import MOMENTA, dose_response

TRAINING_BATCHES, TRAINING_BATCH = 168, 64
PROBE_BATCH = 32
DOSE_DT = 0.05
PRINTING = "the table of gti certify"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gti certify`."""
    parser.description = (
        "Train a small network on images for a moment, then measure round trip, invariance of "
        "the symplectic 2-form and energy drift for each normalisation. Prints the certificate and "
        "writes certificate.json, certificate.md and figures."
    )
    parser.add_argument("--model", choices=("mlp", "simple-cnn", "resnet18"), default="simple-cnn")
    parser.add_argument(
        "--norm", choices=tuple(REGIMES), nargs="+", default=list(REGIMES), help="default: all five"
    )
    parser.add_argument(
        "--dt", type=_positive(float), nargs="+", default=[0.01, 0.02, 0.05, 0.1], help="step sizes"
    )
    parser.add_argument(
        "--pairs", type=_positive(int), default=4, help="pairs of tangents of the 2-form probe"
    )
    parser.add_argument(
        "--steps",
        type=_positive(int),
        default=10,
        help="steps each way; the drift takes 3 times as many",
    )
    parser.add_argument("--seeds", type=_positive(int), default=1, help="number of repeats")
    parser.add_argument("--device", default="cpu", help='"cpu", "cuda", "cuda:1", ...')
    parser.add_argument(
        "--backend", choices=("auto", "reference", "cpu", "triton", "cuda"), default="auto"
    )
    parser.add_argument(
        "--data",
        default="digits",
        help='"digits" (scikit-learn), or an .npz file with images x, labels y',
    )
    parser.add_argument("--out", default="certificate", help="folder for the results")


def run(args: argparse.Namespace) -> int:
    """Train, measure, print, save. Returns 0 when everything was measured, 2 for unusable input.

    The exit status is not the verdict: that batch statistics fail a probe is a finding, no failure.
    """
    try:
        console = require("rich.console", PRINTING).Console()
        tqdm = require("tqdm", "the progress bar of gti certify").tqdm
        require("matplotlib", "drawing the figures of gti certify")
        data = load_images(args.data)
        device = _device(args.device)
    except (ImportError, OSError, ValueError) as error:
        print(f"gti certify: {error}", file=sys.stderr)
        return 2
    measurements = len(args.norm) * args.seeds * (1 + 2 * len(args.dt))
    doses = 2 * len(MOMENTA) if "running" in args.norm else 0
    bar = tqdm(
        total=len(_trained(args.norm)) + measurements + doses,
        file=sys.stderr,
        disable=not sys.stderr.isatty(),
        bar_format="{l_bar}{bar}| {n}/{total} [{elapsed}<{remaining}] {postfix}",
    )

    def report(what: str) -> None:
        bar.update()
        bar.set_postfix_str(what)

    # The small networks' layers are too small to share out: a second thread would only cost time.
    with bar, threads(torch.get_num_threads() if args.model == "resnet18" else 1):
        certificate = measure(args, data, device, report)
    print_certificate(certificate, console)
    for path in certificate.save(args.out):
        print(f"wrote {path}")
    return 0


def measure(
    args: argparse.Namespace,
    data: LabelledImages,
    device: torch.device,
    report: Callable[[str], None],
) -> Certificate:
    """Train one network per architecture and certify each normalisation of `args.norm`."""
    begin = perf_counter()
    models: dict[str, nn.Module] = {}
    for norm in _trained(args.norm):
        report(f"training {norm}")
        models[norm] = train(build(args.model, data, norm), data, device)
    training = perf_counter() - begin

    batches = data.batches(PROBE_BATCH, max(args.steps * args.seeds, 1), seed=1)
    certificates = [
        certify(
            models[_architecture(norm)],
            F.cross_entropy,
            batches,
            dts=args.dt,
            steps=args.steps,
            pairs=args.pairs,
            seeds=args.seeds,
            regime=REGIMES[norm],
            name=norm,
            backend=args.backend,
            on_measure=report,
        )
        for norm in dict.fromkeys(args.norm)
    ]
    certificate = certificates[0]
    for other in certificates[1:]:
        certificate = certificate.join(other)
    if "running" in args.norm:
        seconds: dict[str, float] = {}
        doses = dose_response(
            models["batch"],
            F.cross_entropy,
            batches,
            dt=DOSE_DT,
            steps=args.steps,
            pairs=args.pairs,
            backend=args.backend,
            seconds=seconds,
            on_measure=report,
        )
        add_seconds(certificate.seconds, seconds)
        certificate = replace(certificate, doses=doses)
    certificate.seconds["training"] = training
    extra = {"model": args.model, "data": args.data, "training_batches": TRAINING_BATCHES}
    return replace(certificate, settings={**extra, **certificate.settings})


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch uses `count` CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def build(name: str, data: LabelledImages, norm: str) -> nn.Module:
    """An untrained network for the data, the same start for the same normalisation every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "mlp":
            return MLP(data.x[0].numel(), data.classes, norm)
        network = SimpleCNN if name == "simple-cnn" else ResNet18
        return network(data.x.shape[1], data.classes, norm)


def train(model: nn.Module, data: LabelledImages, device: torch.device) -> nn.Module:
    """A short plain training with SGD: enough to be in a typical place of parameter space."""
    model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in data.batches(TRAINING_BATCH, TRAINING_BATCHES, seed=0):
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(device)), y.to(device)).backward()
        optimizer.step()
    return model


def print_certificate(certificate: Certificate, console: object) -> None:
    """The table in colour, then legend, thresholds, findings, doses and times."""
    table_class = require("rich.table", PRINTING).Table

    def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> object:
        drawn = table_class(*header, box=None, pad_edge=False, padding=(0, 1))
        for row in rows:
            cells = (f"[red]{cell}[/red]" if "✗" in cell else cell for cell in row)
            drawn.add_row(*cells, style="dim" if "floor" in row else "")
        return drawn

    echo = console.print  # type: ignore[attr-defined]
    echo(table(HEADER, table_cells(certificate)))
    echo(LEGEND)
    echo(thresholds_line(certificate), highlight=False)
    for line in findings(certificate):
        echo(line, highlight=False, markup=False)
    if certificate.doses:
        echo(table(DOSE_HEADER, dose_cells(certificate)))
    echo(time_line(certificate), highlight=False)


def _trained(norms: list[str]) -> list[str]:
    return list(dict.fromkeys(_architecture(norm) for norm in norms))


def _architecture(norm: str) -> str:
    """batch, running and frozen are one trained BatchNorm network in three regimes."""
    return "batch" if norm in ("batch", "running", "frozen") else norm


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f'--device: expected a device like "cpu" or "cuda", got {name!r} ({reason})'
        ) from error
    return device


def _positive(kind: type) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a positive {kind.__name__}, got {text!r}")
        return value

    return parse
