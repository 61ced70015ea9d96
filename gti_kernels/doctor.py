"""`gti doctor`: what is installed, which backends run, which do not and why."""

from __future__ import annotations

import argparse
import importlib.util

from .backends import available, build_info

EXTRAS = {
    "probes": ("sklearn", "matplotlib", "rich", "tqdm"),
    "cuda": ("cuda.core", "cuda.bindings"),
    "test": ("pytest", "pytest_benchmark", "hypothesis", "mpmath"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`gti doctor` has no options."""
    parser.description = "Print what is installed, which backends run, which do not and why."


def run(args: argparse.Namespace) -> int:
    """Prints the report. Exit status 0: a backend that is missing is no error."""
    print("installed")
    for name, value in build_info().items():
        print(f"  {name:<12} {value}")
    print("backends")
    for name, reason in available().items():
        print(f"  {name:<12} {'runs' if reason is None else 'does not run: ' + reason}")
    print("extras")
    for extra, modules in EXTRAS.items():
        missing = [m for m in modules if not _found(m)]
        wanted = f'missing {", ".join(missing)}: pip install "gti_kernels[{extra}]"'
        print(f"  {extra:<12} {wanted if missing else 'complete'}")
    return 0


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent package
        return False
