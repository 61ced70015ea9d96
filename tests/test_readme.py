"""The README says what the rows say, and its examples run."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

from gti_kernels import rows

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_support_table_is_generated_from_the_rows():
    assert rows.table() in README


def test_python_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_commands_of_the_readme_exist():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make (\w+)`", README):
        assert f"\n{target}:" in makefile


MODULES = [
    *("backends", "testing", "nn", "spectral_penalty", "ops.power_iteration_operator"),
    *("optim.leapfrog", "optim.baoab", "optim.drift_recorder"),
    *("probes.push_tangents", "probes.subspaces", "probes.omega_invariance"),
    *sorted({f"ops.{row.stem}" for row in rows.ROWS}),
]


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    results = doctest.testmod(importlib.import_module(f"gti_kernels.{module}"))
    assert results.attempted > 0
    assert results.failed == 0
