"""Kick, drift and the leapfrog integrator: rounding, closed forms, order, symplecticity."""

from __future__ import annotations

import math

import pytest
import torch

import gti_kernels as gti
from gti_kernels import testing
from gti_kernels.conventions import symplectic_matrix
from gti_kernels.ops.leapfrog import compose, stage_sizes

BACKENDS = ("cpu", "reference")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def numbers(*shape, dtype=torch.float64, seed=0):
    return testing.numbers(*shape, dtype=dtype, device="cpu", seed=seed)


# ---- the kernels, element by element -------------------------------------------------------------


def assert_rounded_once(got: torch.Tensor, exact: torch.Tensor, size: torch.Tensor) -> None:
    """got is exact (fp64) rounded to its dtype, but for a few roundings of the compute type at the
    size of the terms."""
    ulp = torch.finfo(got.dtype).eps
    compute = 2.0**-52 if got.dtype == torch.float64 else 2.0**-23
    smallest = torch.finfo(got.dtype).smallest_normal * ulp
    bound = 0.5 * ulp * exact.abs() + 4 * compute * size + smallest
    assert bool(((got.double() - exact).abs() <= bound).all())


@every_backend
@every_dtype
def test_each_element_is_rounded_once(dtype, backend):
    """Tails of every length, and lengths around a chunk."""
    for n in [*range(41), 16383, 16385, 40001]:
        q, p, g, w = (numbers(n, dtype=dtype, seed=4 * n + i) for i in range(4))
        w = w.abs()
        q64, p64, g64, w64 = (t.double() for t in (q, p, g, w))
        kicked, drifted = p.clone(), q.clone()
        gti.kick_(kicked, g, 0.375, damp=0.75, backend=backend)
        assert_rounded_once(kicked, 0.75 * p64 - 0.375 * g64, p64.abs() + g64.abs())
        gti.drift_(drifted, p, -0.5, inv_mass=w, backend=backend)
        assert_rounded_once(drifted, q64 - 0.5 * w64 * p64, q64.abs() + (w64 * p64).abs())
        for mass in (0.625, w):
            m64 = mass if isinstance(mass, float) else w64
            both_q, both_p = q.clone(), p.clone()
            energy = gti.kick_drift_(
                both_q, both_p, g, 0.375, 0.25, inv_mass=mass, damp=0.75, backend=backend
            )
            new = both_p.double()  # as it was stored
            assert_rounded_once(both_p, 0.75 * p64 - 0.375 * g64, p64.abs() + g64.abs())
            assert_rounded_once(both_q, q64 + 0.25 * m64 * new, q64.abs() + (m64 * new).abs())
            assert float(energy) == pytest.approx(float(0.5 * (m64 * new * new).sum()), rel=1e-13)
            kinetic = gti.kinetic_energy(both_p, inv_mass=mass, backend=backend)
            assert float(energy) == pytest.approx(float(kinetic), rel=1e-13)


@every_backend
def test_kick_drift_is_a_kick_and_a_drift(backend):
    q, p, g = ([numbers(70_000, seed=i), numbers(5, seed=i + 9)] for i in range(3))
    q2, p2 = [t.clone() for t in q], [t.clone() for t in p]
    gti.kick_drift_(q, p, g, 0.1, 0.2, inv_mass=[0.5, 2.0], damp=0.9, backend=backend)
    gti.kick_(p2, g, 0.1, damp=0.9, backend=backend)
    gti.drift_(q2, p2, 0.2, inv_mass=[0.5, 2.0], backend=backend)
    for a, b in zip([*q, *p], [*q2, *p2]):
        torch.testing.assert_close(a, b, rtol=1e-15, atol=1e-15)


@every_backend
def test_nothing_beside_the_tensor_is_written(backend):
    for n in range(1, 20):
        memory = torch.full((n + 32,), 7.0)
        p = memory[16 : 16 + n]
        gti.kick_(p, torch.ones(n), 1.0, backend=backend)
        gti.drift_(p, torch.ones(n), 0.5, backend=backend)
        gti.kick_drift_(p, torch.ones(n), torch.ones(n), 0.5, 1.0, backend=backend)
        assert p.tolist() == [7.0] * n
        assert memory[:16].tolist() == [7.0] * 16 and memory[16 + n :].tolist() == [7.0] * 16


@every_backend
def test_mixed_dtypes_in_a_list(backend):
    q, p = [[torch.ones(9, dtype=d) for d in DTYPES] for _ in range(2)]
    energy = gti.kick_drift_(q, p, [t.clone() for t in p], 0.5, 2.0, backend=backend)
    assert float(energy) == 4 * 9 * 0.125
    assert all(t.tolist() == [2.0] * 9 for t in q) and all(t.tolist() == [0.5] * 9 for t in p)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_factors_may_be_tensors(dtype, backend):
    q, p, g = ([numbers(n, seed=n + i) for n in (5, 40)] for i in range(3))
    runs = []
    for wrap in (float, lambda x: torch.tensor(x, dtype=dtype)):
        a, b = ([x.clone() for x in xs] for xs in (q, p))
        gti.kick_(b, g, wrap(0.375), damp=wrap(0.75), backend=backend)
        gti.kick_(b[0], g[0], wrap(0.5), backend=backend)  # one float, one tensor
        gti.drift_(a, b, wrap(-0.25), backend=backend)
        gti.kick_drift_(a, b, g, wrap(0.125), 0.5, damp=wrap(0.875), backend=backend)
        runs.append([*a, *b])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
    with pytest.raises(RuntimeError, match="kick_ has no derivative"):
        gti.kick_(p, g, torch.tensor(0.1, requires_grad=True), backend=backend)


@every_backend
def test_nan_stays_where_it_is(backend):
    p, g = torch.ones(20), torch.ones(20)
    g[3], g[18] = math.nan, math.inf
    gti.kick_(p, g, 0.5, backend=backend)
    assert p[3].isnan() and p[18] == -math.inf
    assert p.isfinite().sum() == 18


# ---- the integrator ------------------------------------------------------------------------------

ECCENTRICITY, PERIODS = 0.6, 20
# max |ΔH| over 20 periods by steps a period
KEPLER = {
    2: {100: 1.495e-2, 200: 3.676e-3, 400: 9.153e-4},
    4: {100: 7.021e-4, 200: 4.771e-5, 400: 3.037e-6},
}


def kepler_error(order: int, steps: int, backend: str = "cpu") -> float:
    e = ECCENTRICITY
    q = torch.tensor([1 - e, 0.0], dtype=torch.float64)
    p = torch.tensor([0.0, math.sqrt((1 + e) / (1 - e))], dtype=torch.float64)
    path = []
    for _ in range(PERIODS * steps):
        gti.leapfrog_(q, p, pull, 2 * math.pi / steps, order=order, backend=backend)
        path.append((q.clone(), p.clone()))
    qs, ps = (torch.stack(x) for x in zip(*path))
    energy = 0.5 * ps.square().sum(1) - 1 / qs.norm(dim=1)
    return float((energy + 0.5).abs().max())


def pull(q: torch.Tensor) -> torch.Tensor:
    return q / q.norm() ** 3


@pytest.mark.parametrize("order", [2, 4])
def test_energy_errors_of_the_kepler_problem(order):
    errors = {steps: kepler_error(order, steps) for steps in KEPLER[order]}
    for steps, golden in KEPLER[order].items():
        assert errors[steps] == pytest.approx(golden, rel=1e-3)
    assert math.log2(errors[200] / errors[400]) == pytest.approx(order, abs=0.1)


def test_the_reference_has_the_same_energy_error():
    assert kepler_error(2, 100, "reference") == pytest.approx(KEPLER[2][100], rel=1e-3)


def oscillator_step(h: float, gamma: float) -> torch.Tensor:
    """One damp-kick-drift-kick-damp step of H = (p² + q²)/2 as a 2 x 2 matrix on (q, p)."""
    half = math.exp(-gamma * h / 2)
    damp = torch.tensor([[1.0, 0.0], [0.0, half]], dtype=torch.float64)
    kick = torch.tensor([[1.0, 0.0], [-h / 2, 1.0]], dtype=torch.float64)
    drift = torch.tensor([[1.0, h], [0.0, 1.0]], dtype=torch.float64)
    return damp @ kick @ drift @ kick @ damp


@every_backend
@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_the_oscillator_follows_its_closed_form(gamma, order, backend):
    h, n = 0.1, 50
    w = 1 / (2 - 2 ** (1 / 3))
    stages = [h] if order == 2 else [w * h, (1 - 2 * w) * h, w * h]
    step = torch.eye(2, dtype=torch.float64)
    for stage in stages:
        step = oscillator_step(stage, gamma) @ step
    start = torch.tensor([0.8, -0.3], dtype=torch.float64)
    q, p = start[:1].clone(), start[1:].clone()
    gti.leapfrog_(q, p, lambda q: q, h, steps=n, damping=gamma, order=order, backend=backend)
    expected = torch.linalg.matrix_power(step, n) @ start
    assert (torch.cat([q, p]) - expected).abs().max() <= 1e-12
    if gamma == 0 and order == 2:  # q_n = A cos(nθ) with cos θ = 1 − h²/2
        theta = math.acos(1 - h * h / 2)
        r = math.sqrt(1 - h * h / 4)
        q_n = 0.8 * math.cos(n * theta) - 0.3 / r * math.sin(n * theta)
        assert float(q) == pytest.approx(q_n, abs=1e-12)


@every_backend
@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_negative_dt_goes_back(damping, order, backend):
    q, p = numbers(30), numbers(30, seed=1)
    q0, p0 = q.clone(), p.clone()
    options = dict(steps=20, damping=damping, order=order, inv_mass=0.7, backend=backend)
    gti.leapfrog_(q, p, torch.sin, 0.1, **options)
    assert (q - q0).abs().max() > 0.1
    gti.leapfrog_(q, p, torch.sin, -0.1, **options)
    torch.testing.assert_close(q, q0, rtol=0, atol=1e-12)
    torch.testing.assert_close(p, p0, rtol=0, atol=1e-12)


@every_backend
@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("gamma", [0.0, 0.4])
def test_a_step_is_conformally_symplectic(gamma, order, backend):
    """MᵀJM = e^{−γt} J for the linear map of a quadratic potential with masses."""
    n, h, steps = 5, 0.2, 3
    a = numbers(n, n)
    stiffness, mass = a @ a.T, numbers(n, seed=1).abs() + 0.1
    columns = []
    for unit in torch.eye(2 * n, dtype=torch.float64):
        q, p = unit[:n].clone(), unit[n:].clone()
        gti.leapfrog_(
            q,
            p,
            lambda q: stiffness @ q,
            h,
            steps=steps,
            inv_mass=mass,
            damping=gamma,
            order=order,
            backend=backend,
        )
        columns.append(torch.cat([q, p]))
    m, j = torch.stack(columns, 1), symplectic_matrix(n)
    defect = m.T @ j @ m - math.exp(-gamma * h * steps) * j
    assert defect.abs().max() <= 1e-12 * m.abs().max() ** 2


@pytest.mark.parametrize("order", [2, 4])
def test_dt_may_be_a_tensor(order):
    def walk(dt):
        q, p = torch.tensor([0.3], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
        space = gti.PhaseSpace(q.clone(), inv_mass=1.0, momentum=p)
        for step in (lambda *a, **b: gti.leapfrog_(q, p, *a, **b), space.leapfrog_):
            step(torch.sin, dt, steps=3, damping=0.2, order=order)
        return q, p, space.params[0], space.momenta[0]

    dt = torch.tensor(0.1)
    for got, expected in zip(walk(dt), walk(dt.item()), strict=True):
        assert torch.equal(got, expected)


def test_a_tensor_dt_is_not_read_on_the_way(monkeypatch):
    """As on a GPU, where reading it would wait: the factors of all kicks stay 0-d tensors."""

    def factors(dt):
        found = []
        sizes = stage_sizes("leapfrog_", dt, 2, 4, "yoshida")
        compose(sizes, 0.2, list, *[lambda grads, *numbers: found.extend(numbers)] * 2)
        return found

    dt = torch.tensor(0.1)
    expected = factors(dt.item())
    with monkeypatch.context() as patch:
        for name in ("item", "__float__", "__bool__", "tolist"):
            patch.setattr(torch.Tensor, name, None, raising=False)
        got = factors(dt)
    assert [x.item() for x in got] == pytest.approx(expected, rel=1e-15)


def test_gradients_are_shared_between_steps():
    for order, stages in ((2, 1), (4, 3)):
        calls = []
        gti.leapfrog_(
            torch.ones(2), torch.ones(2), lambda q: calls.append(0) or q, 0.1, steps=7, order=order
        )
        assert len(calls) == 7 * stages + 1


def test_no_step_changes_nothing():
    q, p = torch.ones(2), torch.ones(2)
    gti.leapfrog_(q, p, torch.sin, 0.1, steps=0)
    assert (q._version, p._version) == (0, 0)
    gti.leapfrog_([], [], lambda q: [], 0.1, steps=3)


def test_steps_in_one_call_are_steps_in_many():
    q, p = numbers(6), numbers(6, seed=1)
    q2, p2 = q.clone(), p.clone()
    gti.leapfrog_(q, p, torch.sin, 0.1, steps=10, damping=0.2)
    for _ in range(10):
        gti.leapfrog_(q2, p2, torch.sin, 0.1, damping=0.2)
    torch.testing.assert_close(q, q2, rtol=0, atol=1e-13)
    torch.testing.assert_close(p, p2, rtol=0, atol=1e-13)


@every_backend
def test_21000_tensors_of_one_element(backend):
    memory = numbers(3, 21_000)
    q, p, g = ([*row.clone().split(1)] for row in memory)
    for shape in ((0,), (3, 0)):
        q, p, g = ([*ts, torch.empty(shape, dtype=torch.float64)] for ts in (q, p, g))
    energy = gti.kick_drift_(q, p, g, 0.5, 0.25, inv_mass=2.0, backend=backend)
    new = memory[1] - 0.5 * memory[2]
    torch.testing.assert_close(torch.cat([t.flatten() for t in p]), new)
    torch.testing.assert_close(torch.cat([t.flatten() for t in q]), memory[0] + 0.5 * new)
    assert float(energy) == pytest.approx(float(new.square().sum()), rel=1e-12)


@every_backend
def test_empty_lists_and_tensors(backend):
    gti.kick_([], [], 0.1, backend=backend)
    gti.drift_([], [], 0.1, inv_mass=[], backend=backend)
    assert float(gti.kick_drift_([], [], [], 0.1, 0.1, backend=backend)) == 0.0
    empty = [torch.empty(0, 3) for _ in range(3)]
    assert float(gti.kick_drift_(*empty, 0.1, 0.1, backend=backend)) == 0.0
