"""csrc/cuda/gram.cu and its launcher without a GPU, in the emulation of cuda_emulation/ with 128
threads a block. What only a GPU can show is in test_gpu.py."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from cuda_emulation import emulate

import gti_kernels as gti
from gti_kernels import testing
from gti_kernels.cuda_kernels import inner_products, ragged

DTYPES = [torch.float64, torch.float32]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SIZES = (3, 0, 129, 64, 1, 257) + (2,) * 40


@pytest.fixture
def emulated(monkeypatch):
    """emulated(order): the backend "cuda" runs in the emulation."""
    return lambda order=0: emulate.use(monkeypatch, ragged, order, None, 128)


def integers(*lead: int, sizes=SIZES, dtype=torch.float64, seed=0) -> list[torch.Tensor]:
    """Small ones, whose products and sums are exact in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-9, 10, (*lead, n), generator=generator).to(dtype) for n in sizes]


def exactly(a, b, w) -> torch.Tensor:
    x, y = (torch.cat(t, -1).double() for t in (a, b))
    return (x if w is None else x * torch.cat(w).double()) @ y.mT


#: Tiles of 4, 8, 16, 32 rows (of 2 and 4 for fp64), one or more, down and across.
CUTS = [
    *((torch.float64, *cut) for cut in ((2, 1, True), (4, 3, False), (3, 9, True))),
    *((torch.float32, *cut) for cut in ((3, 8, False), (4, 3, True), (40, 5, False))),
    *((torch.bfloat16, *cut) for cut in ((13, 16, False), (3, 21, True))),
]


@pytest.mark.parametrize("dtype, m, l, weighted", CUTS, ids=str)
def test_integers_bit_for_bit(emulated, dtype, m, l, weighted):
    """Ragged lists with empty tensors, odd lengths and tails; every tile, to the last row."""
    emulator = emulated()
    a, b = integers(m, dtype=dtype), integers(l, dtype=dtype, seed=1)
    w = integers(dtype=dtype, seed=2) if weighted else None
    assert torch.equal(gti.gram(a, b, w, backend="cuda").matrix, exactly(a, b, w))
    assert len(emulator.launches) == 2
    larger = max(a, b, key=lambda x: len(x[0]))
    own = gti.gram(larger, weight=w, backend="cuda")
    assert torch.equal(own.matrix, exactly(larger, larger, w))
    assert torch.equal(own.error_bound, own.error_bound.T)


@every_dtype
def test_within_the_bound_and_the_bound_is_small(emulated, dtype):
    """Against the reference, whose own bound is of second order; many and few stretches."""
    emulated()
    for m, l, n, batch in ((3, 4, 700, ()), (21, 2, 90, ()), (4, 4, 300, (3,))):
        a, b, w = (
            testing.numbers(*shape, n, dtype=dtype, device="cpu", seed=i)
            for i, shape in enumerate(((*batch, m), (*batch, l), ()))
        )
        b *= 2.0**10  # norms that differ: none may stand in for another
        w *= 2.0**-20
        for right, weight in ((b, w), (None, w), (b, None), (None, None)):
            got = gti.gram(a, right, weight, backend="cuda")
            truth = gti.gram(a, right, weight, backend="reference")
            error = (got.matrix - truth.matrix).abs()
            assert (error <= got.error_bound + truth.error_bound).all()
            scale = torch.ones(n).double() if weight is None else weight.double().abs()
            s, t = (
                (scale * x.double().square()).sum(-1).sqrt()
                for x in (a, a if right is None else right)
            )
            size = s[..., :, None] * t[..., None, :]
            rest = 1e-26 if dtype == torch.float64 else 7e-14
            largest = 1.001 * (2**-53 * truth.matrix.abs() + rest * size)
            assert (got.error_bound <= largest).all()
            assert dtype == torch.float64 or (got.error_bound >= 2e-15 * size).all()
            if right is None:
                assert torch.equal(got.matrix, got.matrix.mT)


@every_dtype
def test_a_batch_is_one_launch_and_its_problems_to_the_bit(emulated, dtype):
    emulator = emulated()
    a, b, w = (
        testing.numbers(*s, dtype=dtype, device="cpu", seed=i)
        for i, s in enumerate(((5, 4, 150), (5, 3, 150), (150,)))
    )
    for right, weight in ((b, w), (None, None)):
        emulator.launches.clear()
        together = gti.gram(a, right, weight, backend="cuda")
        assert len(emulator.launches) == 2
        for i in range(5):
            alone = gti.gram(a[i], None if right is None else right[i], weight, backend="cuda")
            assert torch.equal(together.matrix[i], alone.matrix)
            assert torch.equal(together.error_bound[i], alone.error_bound)


@every_dtype
def test_long_stretches(emulated, monkeypatch, dtype):
    """Sums that are flushed on the way, for a few stretches."""
    emulated()
    monkeypatch.setattr(inner_products, "BLOCKS", 3)
    a, w = (
        integers(3, sizes=(9000, 5, 4000), dtype=dtype),
        integers(sizes=(9000, 5, 4000), dtype=dtype),
    )
    assert torch.equal(gti.gram(a, weight=w, backend="cuda").matrix, exactly(a, a, w))


def test_ill_conditioned_products(emulated):
    """Terms of 16 orders of magnitude that cancel, against exact arithmetic: within the bound."""
    emulated()
    generator = torch.Generator().manual_seed(5)
    hardest = 0.0
    for seed in range(12):
        dtype = torch.float64 if seed % 2 else torch.float32
        half = torch.randn(2, 3, 101, generator=generator, dtype=torch.float64)
        half *= 10.0 ** torch.randint(-4, 5, (3, 101), generator=generator)
        x, y = half.to(dtype)
        a, b = torch.cat([x, y], 1), torch.cat([y, -x], 1)
        b[:, 0] *= 1 + torch.finfo(dtype).eps
        w = torch.randn(101, generator=generator).to(dtype).repeat(2) if seed % 3 else None
        got = gti.gram(a, b, w, backend="cuda")
        weights = [1] * 202 if w is None else w.tolist()
        for i in range(3):
            terms = [
                Fraction(p) * Fraction(q) * Fraction(r)
                for p, q, r in zip(a[i].tolist(), b[i].tolist(), weights, strict=True)
            ]
            exact = sum(terms)
            error = abs(Fraction(got.matrix[i, i].item()) - exact)
            assert error <= Fraction(got.error_bound[i, i].item())
            hardest = max(hardest, float(sum(map(abs, terms)) / abs(exact)))
    assert hardest > 1e15


def test_nan_stays_in_its_row_or_column(emulated):
    emulated()
    for m, l, dtype in ((7, 3, torch.float32), (5, 6, torch.float64)):
        a, b = (integers(n, sizes=(600,), dtype=dtype, seed=n)[0] for n in (m, l))
        right = exactly([a], [b], None)
        a[m - 1, 599] = b[0, 3] = math.nan
        got = gti.gram(a, b, backend="cuda")
        hit = torch.zeros(m, l, dtype=torch.bool)
        hit[m - 1], hit[:, 0] = True, True
        assert torch.equal(got.matrix.isnan(), hit) and torch.equal(got.error_bound.isnan(), hit)
        assert torch.equal(got.matrix[~hit], right[~hit])


@every_dtype
def test_same_bits_for_any_order_of_threads_and_odd_addresses(emulated, dtype):
    a, w = (
        [testing.numbers(*m, n, dtype=dtype, device="cpu", seed=n) for n in (256, 1, 640)]
        for m in ((20,), ())
    )
    odd = [[torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in x] for x in (a, w)]
    results = []
    for order, x, weight in ((0, a, w), (1, a, w), (7, a, w), (0, odd[0], w), (0, a, odd[1])):
        emulated(order)
        results.append(gti.gram(x, weight=weight, backend="cuda"))
    for got in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(got, results[0], strict=True))


def test_weights_of_another_dtype(emulated):
    """The narrower is read as the wider; beside fp64 all are."""
    emulator = emulated()
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    sizes = (70, 300, 9, 41)
    a = [t.to(d) for t, d in zip(integers(5, sizes=sizes), dtypes, strict=True)]
    w = [t.to(d) for t, d in zip(integers(sizes=sizes, seed=1), dtypes[1:] + dtypes[:1])]
    for count, launches in ((2, 2), (3, 2), (4, 2)):
        emulator.launches.clear()
        got = gti.gram(a[:count], weight=w[:count], backend="cuda")
        assert torch.equal(got.matrix, exactly(a[:count], a[:count], w[:count]))
        assert len(emulator.launches) == launches
