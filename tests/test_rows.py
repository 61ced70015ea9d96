"""The rows against the tree and the registered ops: a row that lies turns the suite red."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

import gti_kernels as gti
from gti_kernels import backends, rows, testing
from gti_kernels.rows import BUILT, ROWS

TREE = Path(__file__).parent.parent
STEMS = sorted({row.stem for row in ROWS})
FILES = {
    "reference": ["gti_kernels/reference/{}.py"],
    "cpu": ["csrc/include/gti/{}.h", "csrc/cpu/{}.cpp", "python/{}.cpp"],
    "triton": ["gti_kernels/triton_kernels/{}.py"],
    "cuda": ["gti_kernels/cuda_kernels/{}.py", "csrc/cuda/{}.cu"],
}
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def schema(row):
    return getattr(torch.ops.gti_kernels, row.name).default._schema


def test_names_are_unique():
    assert len({row.name for row in ROWS}) == len(ROWS) == len(rows.BY_NAME)


@pytest.mark.parametrize("backend", FILES)
@pytest.mark.parametrize("stem", STEMS)
def test_files_of_a_stem_exist_where_and_only_where_they_are_built(stem, backend):
    there = [(TREE / path.format(stem)).is_file() for path in FILES[backend]]
    assert there == [(stem, backend) in BUILT] * len(there)
    assert (TREE / f"gti_kernels/ops/{stem}.py").is_file()


def test_built_names_known_stems_and_backends_only():
    assert {stem for stem, _ in BUILT} == set(STEMS)
    assert {backend for _, backend in BUILT} <= set(backends.NAMES) - {"auto"}


@every_row
def test_public_function_lives_in_the_file_of_its_stem(row):
    function = getattr(gti, row.name)
    assert inspect.isfunction(function)
    assert row.name in gti.__all__
    assert function.__module__ == f"gti_kernels.ops.{row.stem}"
    assert inspect.signature(function).parameters["backend"].default == "auto"


@every_row
def test_dtypes_are_torch_dtypes_and_work(row):
    assert row.dtypes == rows.DTYPES
    for dtype in row.dtypes:
        args, kwargs = testing.samples(row.name)[0].make(getattr(torch, dtype), "cpu")
        getattr(gti, row.name)(*args, **kwargs)


@every_row
def test_mutates_names_parameters_and_the_schema_says_the_same(row):
    assert set(row.mutates) <= set(inspect.signature(getattr(gti, row.name)).parameters)
    written = tuple(
        a.name for a in schema(row).arguments if a.alias_info is not None and a.alias_info.is_write
    )
    assert written == row.mutates
    assert all(r.alias_info is None for r in schema(row).returns)


@every_row
def test_backends_of_a_row_are_known_and_end_with_the_reference(row):
    assert set(row.backends) == set(backends.NAMES) - {"auto"}
    assert row.backends[-1] == "reference"


@every_row
def test_differentiable_is_what_happens(row):
    args, kwargs = testing.samples(row.name)[0].make(torch.float64, "cpu")
    for t in args[0]:
        t.requires_grad_()
    if row.differentiable == "no":
        with pytest.raises(RuntimeError, match="has no derivative"):
            getattr(gti, row.name)(*args, **kwargs)
    else:
        sigma = gti.top_singular_values(*args, **kwargs)
        assert sigma.requires_grad


def test_every_registered_op_has_a_row():
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("gti_kernels::")
    }
    assert registered == set(rows.BY_NAME)


def test_table_has_a_line_for_each_row():
    lines = rows.table().splitlines()
    assert len(lines) == len(ROWS) + 2
    for row, line in zip(ROWS, lines[2:]):
        assert line.startswith(f"| `{row.name}` |")
        missing = sum((row.stem, b) not in BUILT for b in backends.NAMES[1:])
        assert line.count("—") == missing
