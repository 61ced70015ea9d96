"""csrc/cuda/two_form.cu and its launcher without a GPU: the source runs in the emulation of
cuda_emulation/, with 128 threads a block and fp64 matrix instructions in its place. What only a GPU
can show is in test_gpu.py."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from cuda_emulation import emulate

import gti_kernels as gti
from gti_kernels import testing
from gti_kernels.cuda_kernels import compiler, inner_products, ragged

#: m and metric of every kernel: tiles of 4, 8, 16, 32 rows (of 2 and 4 for fp64), one or more.
CUTS = ((2, True), (4, False), (7, True), (16, False), (21, True), (40, False))
KERNELS = [(dtype, *cut) for dtype in ("float64", "float32") for cut in CUTS]
KERNELS += [("bfloat16", *cut) for cut in CUTS[1:6:2]] + [("float16", 7, True)]


@pytest.fixture
def emulated(monkeypatch):
    """emulated(order, text): the backend "cuda" runs in the emulation."""
    return lambda order=0, text=None: emulate.use(monkeypatch, ragged, order, text, 128)


def integers(m: int, sizes, dtype=torch.float64, seed=0) -> list[torch.Tensor]:
    """Small ones, whose products and sums are exact in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-9, 10, (m, n), generator=generator).to(dtype) for n in sizes]


def exactly(dq, dp) -> tuple[torch.Tensor, torch.Tensor]:
    q, p = (torch.cat([t.flatten(1).double() for t in x], 1) for x in (dq, dp))
    return q @ p.T - p @ q.T, q @ q.T + p @ p.T


def bits(form: gti.TwoForm) -> list[bytes]:
    return [x.numpy().tobytes() for x in form if x is not None]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_parity_with_the_reference(emulated, dtype):
    emulated()
    comparisons = testing.compare("two_form", dtype, "cuda")
    assert comparisons
    for c in comparisons:
        assert c.error <= c.bound, c


@pytest.mark.parametrize("dtype, m, metric", KERNELS)
def test_integers_bit_for_bit(emulated, dtype, m, metric):
    """Ragged lists with empty tensors, odd lengths and tails; every tile, to the last row."""
    emulator = emulated()
    working = getattr(torch, dtype)
    sizes = (3, 0, 129, 64, 1, 257) + (2,) * 140
    dq, dp = integers(m, sizes, working), integers(m, sizes, working, seed=1)
    form = gti.two_form(dq, dp, metric=metric, backend="cuda")
    omega, gram = exactly(dq, dp)
    assert torch.equal(form.omega, omega)
    assert form.metric is None if not metric else torch.equal(form.metric, gram)
    assert form.error_bound.diagonal().eq(0).all() and not form.omega.diagonal().any()
    assert len(emulator.launches) == 2


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("blocks", [1, 7])
def test_long_stretches(emulated, monkeypatch, blocks, dtype):
    """Sums that are flushed on the way, for any number of stretches."""
    emulated()
    monkeypatch.setattr(inner_products, "BLOCKS", blocks)
    working = getattr(torch, dtype)
    for m, metric in ((3, True), (9, False)):
        dq, dp = (integers(m, (9000, 5, 4000), working, seed=s) for s in (2, 3))
        form = gti.two_form(dq, dp, metric=metric, backend="cuda")
        omega, gram = exactly(dq, dp)
        assert torch.equal(form.omega, omega)
        assert not metric or torch.equal(form.metric, gram)
        q, p = torch.cat(dq, 1).double(), torch.cat(dp, 1).double()
        products = q.norm(dim=1)[:, None] * p.norm(dim=1)[None, :]
        size = (products + products.T).fill_diagonal_(0)
        relative = 7e-14 if working != torch.float64 else 2**-53
        assert (form.error_bound <= relative * size + 1e-300).all()


def test_skew_and_symmetric_to_the_bit_within_the_bound(emulated):
    emulated()
    for dtype in (torch.float64, torch.float32):
        dq, dp = (
            testing.numbers(18, 200, dtype=dtype, device="cpu", seed=s, scale=1e3) for s in (0, 1)
        )
        form = gti.two_form(dq, dp, metric=True, backend="cuda")
        assert torch.equal(form.omega, -form.omega.T) and torch.equal(form.metric, form.metric.T)
        truth = gti.two_form(dq.double(), dp.double(), metric=True, backend="reference")
        bound = form.error_bound + truth.error_bound
        assert ((form.omega - truth.omega).abs() <= bound).all()
        assert (form.omega != 0).sum() == 18 * 17


@pytest.mark.parametrize("m", [4, 19])
def test_an_isotropic_subspace_is_zero(emulated, m):
    """dp = S dq with S diagonal, exact in fp32: G is symmetric to the bit, tile by tile."""
    emulated()
    dq = testing.numbers(m, 3001, dtype=torch.float32, device="cpu", seed=4)
    scale = 2.0 ** torch.randint(-6, 7, (3001,), generator=torch.Generator().manual_seed(0))
    form = gti.two_form(dq, dq * scale, backend="cuda")
    assert not form.omega.any() and (form.error_bound.fill_diagonal_(1) > 0).all()


def test_ill_conditioned_products_of_fp64(emulated):
    """Sums of condition 1e16 and more, against exact arithmetic: within the reported bound."""
    emulated()
    generator = torch.Generator().manual_seed(5)
    for seed in range(3):
        n = 201
        dq, dp = (
            torch.randn(3, n, generator=generator, dtype=torch.float64)
            * 10.0 ** torch.randint(-8, 9, (3, n), generator=generator)
            for _ in range(2)
        )
        dq[:, n // 2 + 1 :] = dq[:, : n // 2]
        dp[:, n // 2 + 1 :] = -dp[:, : n // 2] * (1 + 1e-16 * seed)
        form = gti.two_form(dq, dp, backend="cuda")
        for i in range(3):
            for j in range(i):
                q, p = dq.tolist(), dp.tolist()
                exact = sum(
                    Fraction(a) * Fraction(d) - Fraction(b) * Fraction(c)
                    for a, b, c, d in zip(q[i], p[i], q[j], p[j], strict=True)
                )
                error = abs(Fraction(form.omega[i, j].item()) - exact)
                assert error <= Fraction(form.error_bound[i, j].item())
                size = dq[i].norm() * dp[j].norm() + dp[i].norm() * dq[j].norm()
                assert form.error_bound[i, j] <= 2**-53 * abs(exact) + 1e-25 * size


def test_nan_stays_in_its_row_and_column(emulated):
    emulated()
    for m, dtype in ((7, torch.float32), (6, torch.float64)):
        dq, dp = integers(m, (600,), dtype)[0], integers(m, (600,), dtype, seed=1)[0]
        omega, gram = exactly([dq], [dp])
        dq[m - 1, 599] = math.nan
        form = gti.two_form(dq, dp, metric=True, backend="cuda")
        for got, right in ((form.omega, omega), (form.metric, gram)):
            assert got[m - 1].isnan().all() and got[:, m - 1].isnan().all()
            assert torch.equal(got[: m - 1, : m - 1], right[: m - 1, : m - 1])
        assert form.error_bound[m - 1].isnan().all()


@pytest.mark.parametrize("m, metric", [(4, True), (20, False)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_same_bits_for_any_order_of_threads_and_odd_addresses(emulated, dtype, m, metric):
    dq, dp = (
        [testing.numbers(m, n, dtype=dtype, device="cpu", seed=s + n) for n in (256, 1, 640)]
        for s in (0, 1)
    )
    results = []
    for order in (0, 1, 7):
        emulated(order)
        results.append(bits(gti.two_form(dq, dp, metric=metric, backend="cuda")))
    for odd in (0, 1):
        lists = [dq, dp]
        lists[odd] = [
            torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in lists[odd]
        ]
        assert all(t.data_ptr() % 16 for t in lists[odd])
        results.append(bits(gti.two_form(*lists, metric=metric, backend="cuda")))
    assert all(r == results[0] for r in results)


def test_mixed_dtypes(emulated):
    """A launch for each dtype; beside fp64 all are read as fp64."""
    emulator = emulated()
    dtypes = (torch.bfloat16, torch.float32, torch.bfloat16, torch.float64)
    dq, dp = (
        [t.to(d) for t, d in zip(integers(5, (70, 300, 9, 41), seed=s), dtypes, strict=True)]
        for s in (0, 1)
    )
    for count, launches in ((3, 3), (4, 2)):
        emulator.launches.clear()
        form = gti.two_form(dq[:count], dp[:count], backend="cuda")
        assert torch.equal(form.omega, exactly(dq[:count], dp[:count])[0])
        assert len(emulator.launches) == launches


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("metric", [False, True])
def test_a_batch_is_one_launch_and_its_problems_to_the_bit(emulated, dtype, metric):
    emulator = emulated()
    dq, dp = (
        testing.numbers(4, 6, 150, dtype=getattr(torch, dtype), device="cpu", seed=s)
        for s in (0, 1)
    )
    together = gti.two_form(dq, dp, metric=metric, backend="cuda")
    assert len(emulator.launches) == 2
    for i in range(4):
        alone = gti.two_form(dq[i], dp[i], metric=metric, backend="cuda")
        for x, y in zip(together, alone, strict=True):
            assert x is None or torch.equal(x[i], y)


def test_more_vectors_than_a_block_takes(emulated):
    emulated()
    dq, dp = integers(130, (5,), torch.float32), integers(130, (5,), torch.float32, seed=1)
    form = gti.two_form(dq, dp, backend="cuda")
    assert torch.equal(form.omega, exactly(dq, dp)[0])


@pytest.mark.parametrize("stem", ["two_form", "gram"])
def test_sizes_of_the_launcher_are_those_of_the_source(stem):
    """A kernel's macros lead back to its tile, whose sums are flushed after whole units."""
    for spec in inner_products.specialisations(stem):
        if spec.entry != "tile_sums":
            continue
        macros = dict(spec.defines)
        dtype = {v: k for k, v in ragged.ELEMENT.items()}[macros["ELEMENT"]]
        options = (bool(macros.get(name)) for name in ("METRIC", "WEIGHTED", "SYMMETRIC", "PAIRS"))
        tile = inner_products.Tile(macros["TILE"], dtype, *options)
        assert inner_products.specialisation(stem, tile) == spec
        assert inner_products.FLUSH % tile.columns == 0 or tile.by_lane
        assert tile.shared_bytes <= 100_000


def test_the_emulation_finds_a_missing_barrier(emulated):
    """Before the warps' sums are added: the first has more units than the others, one of which
    reads too early."""
    text = compiler.source("two_form")
    at = text.index("__syncthreads();", text.index("work.run<kPlain>(list"))
    dq, dp = integers(8, (300,), torch.float32), integers(8, (300,), torch.float32, seed=1)
    found = []
    for order in (0, 1, 7):
        emulated(order, text[:at] + text[at + len("__syncthreads();") :])
        form = gti.two_form(dq, dp, backend="cuda")
        found.append(not torch.equal(form.omega, exactly(dq, dp)[0]))
    assert any(found)
