"""Sums in pairs of fp32 numbers, which the launchers choose where a device has next to no fp64: in
the emulation of cuda_emulation/ with 128 threads a block, and chosen by force."""

from __future__ import annotations

import pytest
import torch
from cuda_emulation import emulate

import gti_kernels as gti
from gti_kernels import testing
from gti_kernels.cuda_kernels import inner_products, ragged


@pytest.fixture(autouse=True)
def pairs(monkeypatch):
    emulate.use(monkeypatch, ragged, 0, None, 128)
    monkeypatch.setattr(inner_products, "scarce_fp64", lambda device: True)


def cancelling(batch: int, m: int, n: int, seed: int, spread: int, dtype=torch.float32):
    """Rows whose products range over 4·spread decimal orders and cancel but for the last bits."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(2, batch, m, n, generator=generator, dtype=torch.float64)
    half *= 10.0 ** torch.randint(-spread, spread + 1, (2, batch, m, n), generator=generator)
    x, y = half.to(dtype)
    a, b = torch.cat([x, y], -1), torch.cat([y, -x], -1)
    order = torch.randperm(2 * n, generator=generator)
    b[..., 0] *= 1 + torch.finfo(dtype).eps
    return a[..., order], b[..., order]


def sizes(a, b):
    s, t = (x.double().norm(dim=-1) for x in (a, b))
    return s[..., :, None] * t[..., None, :]


def test_which_devices(monkeypatch):
    monkeypatch.undo()
    for capability, scarce in (((8, 0), False), ((8, 6), True), ((9, 0), False), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert inner_products.scarce_fp64(torch.device("cuda", 0)) == scarce
    assert not inner_products.scarce_fp64(torch.device("cpu"))


@pytest.mark.parametrize("spread", [0, 2, 5])
@pytest.mark.parametrize("n", [3, 40, 500])
def test_the_bound_holds_where_all_cancels(n, spread):
    """1,200 entries each; the truth is that of the reference, compensated in fp64."""
    a, b = cancelling(75, 4, n, 100 * n + spread, spread)
    got = gti.gram(a, b, backend="cuda")
    truth = gti.gram(a.double(), b.double(), backend="reference")
    error = (got.matrix - truth.matrix).abs()
    assert (error <= got.error_bound + truth.error_bound).all()
    assert (got.error_bound <= 4e-13 * sizes(a, b)).all()
    # As hard as it should be: products summed in fp32 would be wrong by far more.
    naive = (torch.einsum("bin,bjn->bij", a, b) - truth.matrix).abs()
    assert naive.max() > 1e4 * error.max() or n == 3


def test_the_bound_of_two_form_and_its_metric():
    for m, metric in ((4, False), (3, True), (6, True)):
        dq, dp = cancelling(40, m, 150, m, 3)
        got = gti.two_form(dq, dp, metric=metric, backend="cuda")
        truth = gti.two_form(dq.double(), dp.double(), metric=metric, backend="reference")
        assert ((got.omega - truth.omega).abs() <= got.error_bound + truth.error_bound).all()
        assert torch.equal(got.omega, -got.omega.mT)
        if metric:
            size = truth.metric.diagonal(dim1=-2, dim2=-1).sqrt()
            size = size[..., :, None] * size[..., None, :]
            assert ((got.metric - truth.metric).abs() <= 4e-13 * size).all()
            assert torch.equal(got.metric, got.metric.mT)


def test_an_isotropic_subspace():
    """dp = S dq, S diagonal, rounded to fp32: far closer than the bound, which takes the worst."""
    generator = torch.Generator().manual_seed(0)
    dq, s = (torch.randn(*shape, generator=generator) for shape in ((4, 40_000), (40_000,)))
    dp = dq * s
    omega = gti.two_form(dq, dp, backend="cuda").omega
    truth = gti.two_form(dq.double(), dp.double(), backend="reference").omega
    assert ((omega - truth).abs() <= 1e-15 * (dq.abs().double() @ dp.abs().double().T)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_integers_bit_for_bit(dtype):
    """More than a pair takes in, tails, several tiles."""
    for m, l, n in ((3, 4, 5000), (9, 5, 130)):
        generator = torch.Generator().manual_seed(n)
        a, b = (torch.randint(-9, 10, (k, n), generator=generator).to(dtype) for k in (m, l))
        assert torch.equal(gti.gram(a, b, backend="cuda").matrix, a.double() @ b.double().T)
        own = gti.gram(a, backend="cuda").matrix
        assert torch.equal(own, a.double() @ a.double().T)


def test_products_that_underflow_or_overflow():
    a, b = (testing.numbers(2, 90, dtype=torch.float32, device="cpu", seed=s) for s in (0, 1))
    for scale in (1e-18, 1e-21, 1e-30):
        got = gti.gram(a * scale, b * scale, backend="cuda")
        truth = gti.gram((a * scale).double(), (b * scale).double(), backend="reference")
        assert ((got.matrix - truth.matrix).abs() <= got.error_bound + truth.error_bound).all()
    assert gti.gram(a * 1e25, b * 1e25, backend="cuda").matrix.isnan().all()


def test_a_weight_or_fp64_goes_the_other_way():
    a, w = testing.numbers(3, 90, dtype=torch.float32, device="cpu", seed=0), torch.ones(90)
    got = gti.gram(a, weight=w, backend="cuda"), gti.gram(a.double(), backend="cuda")
    truth = gti.gram(a.double(), backend="reference").matrix
    for x in got:
        assert (x.matrix - truth).abs().max() <= 1e-14 * truth.abs().max()
