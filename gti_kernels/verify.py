"""`gti verify`: the error of each op, backend and dtype against the float64 reference, beside its
bound."""

from __future__ import annotations

import argparse

from .backends import available
from .rows import BUILT, ROWS
from .testing import compare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gti verify`."""
    parser.description = (
        "Hold each op, backend and dtype against the float64 reference. Exit status 1 if an error "
        "is over its bound."
    )
    parser.add_argument("--device", default="cpu", help="where the samples live (default: cpu)")
    parser.add_argument("--op", choices=[row.name for row in ROWS], help="one op only")


def run(args: argparse.Namespace) -> int:
    """Prints one line per op, backend and dtype: the sample that comes closest to its bound."""
    backends = [
        b for b, reason in available().items() if reason is None and _serves(b, args.device)
    ]
    print(f"{'op':<16} {'backend':<10} {'dtype':<9} {'worst output':<34} {'error':>9} {'bound':>9}")
    failed = 0
    for row in ROWS:
        if args.op not in (None, row.name):
            continue
        for backend in backends:
            if (row.stem, backend) not in BUILT:
                continue
            for dtype in row.dtypes:
                rows = compare(row.name, dtype, backend, args.device)
                worst = max(rows, key=lambda c: c.error / c.bound if c.bound else c.error)
                good = worst.error <= worst.bound
                failed += not good
                where = f"{worst.output} ({worst.sample})"
                print(
                    f"{row.name:<16} {backend:<10} {dtype:<9} {where:<34} {worst.error:9.1e} "
                    f"{worst.bound:9.1e} {'ok' if good else 'OVER'}"
                )
    for name, reason in available().items():
        if name not in backends:
            print(f"not run: {name} ({reason or 'not for ' + args.device + ' tensors'})")
    print(f"{failed} over their bound" if failed else "every error is within its bound")
    return 1 if failed else 0


def _serves(backend: str, device: str) -> bool:
    return backend == "reference" or (backend == "cpu") == device.startswith("cpu")
