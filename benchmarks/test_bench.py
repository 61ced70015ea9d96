"""The cases of `gti bench` under pytest-benchmark: `pytest benchmarks/`. Times are never
asserted."""

import pytest

from gti_kernels.bench import cases
from gti_kernels.testing import compare

CONTENDERS = [
    pytest.param(case, name, id=f"{case.op}-{case.name}-{case.shape}-{name}".replace(" ", "_"))
    for case in cases()
    for name in ("gti", *case.bars)
]


@pytest.mark.parametrize(("case", "name"), CONTENDERS)
def test_case(benchmark, case, name):
    assert all(c.error <= c.bound for c in compare(case.op, case.dtype, "cpu"))
    work = case.build("cpu")
    benchmark.group = f"{case.op} {case.name} {case.shape}"
    benchmark(work.op if name == "gti" else work.peers[name])
