"""Every op on every backend against the float64 reference, and against itself: same bits."""

from __future__ import annotations

import pytest
import torch

import gti_kernels as gti
from gti_kernels import backends, testing
from gti_kernels.ops.results import Result
from gti_kernels.reference import gram, kinetic_energy, leapfrog, power_iteration, two_form
from gti_kernels.rows import ROWS

BACKENDS = ("reference", "cpu")
RUNS = [(row.name, dtype) for row in ROWS for dtype in row.dtypes]
HALVES = [torch.bfloat16, torch.float16]
REFERENCE = {
    "power_iteration": power_iteration,
    "kick_": leapfrog,
    "drift_": leapfrog,
    "kick_drift_": leapfrog,
    "kinetic_energy": kinetic_energy,
    "two_form": two_form,
    "gram": gram,
}


def calls(op: str, dtype: str) -> list[tuple[list, dict]]:
    """Arguments of the samples, made once: the LAPACK calls that make some of them do not give the
    same bits with any number of threads."""
    return [sample.make(getattr(torch, dtype), "cpu") for sample in testing.samples(op)]


def copy(x):
    if isinstance(x, torch.Tensor):
        return x.clone()
    return [copy(y) for y in x] if isinstance(x, list) else x


def outputs(op: str, calls: list[tuple[list, dict]], backend: str) -> list[torch.Tensor]:
    """All that the calls return or write, one after the other."""
    flat: list[torch.Tensor] = []
    for args, kwargs in copy([list(call) for call in calls]):
        result = getattr(gti, op)(*args, **kwargs, backend=backend)
        for x in [*args, *(result if isinstance(result, (tuple, Result)) else [result])]:
            flat += [t for t in (x if isinstance(x, list) else [x]) if isinstance(t, torch.Tensor)]
    return flat


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert torch.equal(bits(x), bits(y))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "dtype"), RUNS)
def test_error_is_within_its_bound(op, dtype, backend):
    torch.set_num_threads(1)  # other numbers give the same bits, see below
    comparisons = testing.compare(op, dtype, backend)
    assert comparisons
    for c in comparisons:
        assert c.error <= c.bound, c


@pytest.mark.parametrize(("op", "dtype"), RUNS)
def test_same_bits_with_any_number_of_threads_and_in_dirty_memory(op, dtype):
    samples = calls(op, dtype)
    torch.set_num_threads(1)
    once = outputs(op, samples, "cpu")
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(once, outputs(op, samples, "cpu"))
    torch.use_deterministic_algorithms(True)  # fresh memory is filled with NaN
    assert torch.empty(1).isnan()
    assert_same_bits(once, outputs(op, samples, "cpu"))
    assert_same_bits(once, outputs(op, samples, "auto"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_reference_in_dirty_memory(row):
    samples = calls(row.name, "float32")
    torch.set_num_threads(1)
    once = outputs(row.name, samples, "reference")
    torch.use_deterministic_algorithms(True)
    assert_same_bits(once, outputs(row.name, samples, "reference"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_named_backend_is_the_one_that_runs(row, monkeypatch):
    torch.set_num_threads(1)
    used: list[str] = []

    class Compiled:
        def __getattr__(self, name):
            if name == row.name:  # not what only checks
                used.append("cpu")
            return getattr(module, name)

    module = backends.compiled
    monkeypatch.setattr(backends, "compiled", Compiled())
    original = getattr(REFERENCE[row.name], row.name)
    monkeypatch.setattr(
        REFERENCE[row.name], row.name, lambda *a: (used.append("reference"), original(*a))[1]
    )
    for backend in BACKENDS:
        used.clear()
        args, kwargs = testing.samples(row.name)[0].make(torch.float32, "cpu")
        getattr(gti, row.name)(*args, **kwargs, backend=backend)
        assert set(used) == {backend}


# ---- rounding of bf16 and fp16 -------------------------------------------------------------------


def every_value(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def assert_same_halves(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, except that any NaN will do for a NaN."""
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got[~nan].view(torch.int16), expected[~nan].view(torch.int16))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_survives_a_step_of_zero(dtype, backend):
    p = every_value(dtype)
    gti.kick_(p, torch.zeros_like(p), 0.0, backend=backend)
    assert_same_halves(p, every_value(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("part", [0.5, 0.5 - 2**-10, 0.5 + 2**-10, -0.5, -0.5 - 2**-10, 1.0, 2**-9])
def test_rounding_at_every_tie(dtype, backend, part):
    """p + part·ulp(p) for every p: halfway between neighbours, just below, just above; at the
    largest p it overflows, at the smallest it is subnormal."""
    p = every_value(dtype)
    magnitude = (p.view(torch.int16) & 0x7FFF).clamp(max=0x7FFF)
    ulp = ((magnitude + 1).view(dtype).float() - magnitude.view(dtype).float()).to(dtype)
    finite = magnitude.view(dtype).isfinite()
    largest = torch.finfo(dtype).max
    before = torch.tensor(largest, dtype=dtype).view(torch.int16) - 1
    ulp[finite & ~ulp.isfinite()] = (largest - before.view(dtype).float()).to(dtype)
    ulp[~finite] = 0.0
    expected = (p.float() + part * ulp.float()).to(dtype)  # exact in fp32 but for the last step
    kicked = p.clone()
    gti.kick_(kicked, ulp, -part, backend=backend)
    assert_same_halves(kicked, expected)
    drifted = p.clone()
    gti.drift_(drifted, ulp, part, backend=backend)
    assert_same_halves(drifted, expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_of_sums_of_any_two_halves(dtype):
    generator = torch.Generator().manual_seed(1)
    p = every_value(dtype)
    for step in (1.0, -0.5, 2.0**-7):  # products by a power of two are exact
        g = p[torch.randperm(p.numel(), generator=generator)]
        expected = (p.float() - step * g.float()).to(dtype)
        got = p.clone()
        gti.kick_(got, g, step, backend="cpu")
        assert_same_halves(got, expected)
