"""K = ½ pᵀM⁻¹p: exact cases, every tail, every kind of mass."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

import gti_kernels as gti
from gti_kernels import testing

BACKENDS = ("cpu", "reference")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def numbers(*shape, dtype=torch.float64, seed=0):
    return testing.numbers(*shape, dtype=dtype, device="cpu", seed=seed)


def exact(p: list[torch.Tensor], w: list) -> Fraction:
    total = Fraction(0)
    for p_t, w_t in zip(p, w):
        masses = w_t.flatten().tolist() if isinstance(w_t, torch.Tensor) else [w_t] * p_t.numel()
        for x, m in zip(p_t.flatten().tolist(), masses):
            total += Fraction(m) * Fraction(x) ** 2
    return total / 2


@every_backend
@every_dtype
def test_integers_are_summed_exactly(dtype, backend):
    p = torch.arange(-50, 51).to(dtype)
    energy = gti.kinetic_energy(p, backend=backend)
    assert energy.dtype == torch.float64 and energy.shape == ()
    assert float(energy) == sum(i * i for i in range(51))
    assert float(gti.kinetic_energy(p, inv_mass=0.25, backend=backend)) == float(energy) / 4
    mass = torch.full_like(p, 2.0)
    mass[0] = 0.0
    expected = 2 * float(energy) - 2500
    assert float(gti.kinetic_energy(p, inv_mass=[mass], backend=backend)) == expected


@every_backend
@every_dtype
def test_tails_of_every_length(dtype, backend):
    for n in range(41):
        p, w = numbers(n, dtype=dtype, seed=n), numbers(n, dtype=dtype, seed=n + 99).abs()
        for mass in (0.7, w):
            got = Fraction(float(gti.kinetic_energy(p, inv_mass=mass, backend=backend)))
            want = exact([p], [mass])
            assert abs(got - want) <= Fraction(2.0**-48) * want


@every_backend
def test_a_list_is_the_sum_of_its_tensors(backend):
    p = [numbers(70_000, dtype=torch.float32), numbers(3, 5, dtype=torch.bfloat16), numbers(17)]
    w = [0.5, 2.0, 0.0]
    parts = [float(gti.kinetic_energy(t, inv_mass=x, backend=backend)) for t, x in zip(p, w)]
    whole = float(gti.kinetic_energy(p, inv_mass=w, backend=backend))
    assert whole == pytest.approx(sum(parts), rel=1e-14)
    assert Fraction(whole) == pytest.approx(exact(p, w), rel=1e-12)


@every_backend
def test_nothing_to_add(backend):
    assert float(gti.kinetic_energy([], backend=backend)) == 0.0
    assert float(gti.kinetic_energy(torch.ones(0), backend=backend)) == 0.0
    assert float(gti.kinetic_energy(torch.ones(3), inv_mass=0.0, backend=backend)) == 0.0


@every_backend
@every_dtype
def test_nan_and_infinity_go_through(dtype, backend):
    for bad in (float("nan"), float("inf")):
        for at in (0, 8, 16):
            p = torch.ones(17, dtype=dtype)
            p[at] = bad
            energy = gti.kinetic_energy(p, backend=backend)
            assert energy.isnan() if bad != bad else energy.isinf()


@every_backend
def test_terms_are_formed_in_fp64(backend):
    p = torch.tensor([3e30, 1e-30], dtype=torch.float32)  # the square overflows fp32
    assert float(gti.kinetic_energy(p[:1], backend=backend)) == 0.5 * float(p[0]) ** 2
    assert float(gti.kinetic_energy(p[1:], backend=backend)) == 0.5 * float(p[1]) ** 2


@every_backend
def test_many_chunks(backend):
    torch.set_num_threads(2)
    p = torch.ones(1_000_003, dtype=torch.float32)
    assert float(gti.kinetic_energy(p, backend=backend)) == 500_001.5
    p[::2] = 2.0
    expected = 0.5 * (500_002 * 4 + 500_001)
    assert float(gti.kinetic_energy(p, backend=backend)) == expected
    mass = torch.zeros_like(p)
    mass[-1] = 1.0
    assert float(gti.kinetic_energy(p, inv_mass=mass, backend=backend)) == 0.5 * float(p[-1]) ** 2
