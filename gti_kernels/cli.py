"""The command `gti`: certify, bench, verify, doctor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__, bench, doctor, verify
from .probes import experiment


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="gti", description="Kernels that measure the geometry of neural-network training."
    )
    parser.add_argument("--version", action="version", version=f"gti_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module, summary in (
        ("certify", experiment, "train a small network, measure the probes, write the certificate"),
        ("bench", bench, "time each op beside its peers and the machine's bandwidth"),
        ("verify", verify, "hold each op, backend and dtype against the float64 reference"),
        ("doctor", doctor, "what is installed, which backends run, which do not and why"),
    ):
        command = commands.add_parser(name, help=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"gti {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
