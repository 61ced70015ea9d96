"""PhaseSpace: the steps, what the plan reads anew, stochastic rounding, and what it refuses."""

from __future__ import annotations

import gc
import math
import weakref

import numpy
import pytest
import torch

import gti_kernels as gti
from gti_kernels import testing
from gti_kernels.conventions import symplectic_matrix
from gti_kernels.reference import phase_space as reference

BACKENDS = ("cpu", "reference")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def numbers(*shape, dtype=torch.float64, seed=0):
    return testing.numbers(*shape, dtype=dtype, device="cpu", seed=seed)


def parameters(*shapes, dtype=torch.float32):
    out = [torch.nn.Parameter(numbers(*s, dtype=dtype, seed=i)) for i, s in enumerate(shapes)]
    for i, p in enumerate(out):
        p.grad = numbers(*p.shape, dtype=dtype, seed=50 + i)
    return out


def copies(xs):
    return [x.detach().clone() for x in xs]


def same_bits(xs, ys):
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


# ---- the steps -----------------------------------------------------------------------------------

SHAPES = [(1,), (0,), (7,), (33, 3), (16385,), (40001,), ()]


@pytest.mark.parametrize("mass", ["number", "tensors"])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@every_dtype
def test_backends_and_thread_counts_give_the_same_bits(dtype, wide, mass):
    runs = []
    for backend, threads in (("reference", 1), ("cpu", 1), ("cpu", 2)):
        torch.set_num_threads(threads)
        q = [numbers(*s, dtype=dtype, seed=i) for i, s in enumerate(SHAPES)]
        q[3] = q[3].t().contiguous().t()  # another order in memory
        w = 0.7 if mass == "number" else [numbers(*x.shape, dtype=dtype, seed=5).abs() for x in q]
        space = gti.PhaseSpace(
            q, inv_mass=w, momentum="zeros", momentum_dtype=wide, seed=3, backend=backend
        )
        energies = []
        for _ in range(3):
            grads = [torch.sin(x) for x in q]
            energies.append(float(space.kick_drift_(0.1, 0.2, damp=0.9, grads=grads)))
        space.kick_(0.3, grads=[None if i == 4 else g for i, g in enumerate(grads)])
        space.drift_(-0.1)
        space.kick_drift_(0.3, 0.1, grads=[None if i == 2 else g for i, g in enumerate(grads)])
        assert all(p.dtype == wide for p in space.momenta)
        runs.append((q, space.momenta, energies))
    for q, p, energies in runs[1:]:
        assert same_bits(q, runs[0][0]) and same_bits(p, runs[0][1])
        assert energies == pytest.approx(runs[0][2], rel=1e-13)


@every_backend
@every_dtype
def test_a_step_is_its_formula(dtype, backend):
    """In exact arithmetic, to the rounding of each dtype; the energy is that of the stored p."""
    q, p = [numbers(70, dtype=dtype)], [numbers(70, dtype=dtype, seed=1)]
    g, w = [numbers(70, dtype=dtype, seed=2)], [numbers(70, dtype=dtype, seed=3).abs()]
    space = gti.PhaseSpace(q, inv_mass=w, momentum=p, backend=backend)
    p_new = 0.75 * p[0].double() - 0.375 * g[0].double()
    q_new = q[0].double() + 0.25 * w[0].double() * p_new
    energy = space.kick_drift_(0.375, 0.25, damp=0.75, grads=g)
    compute = 2.0**-52 if dtype == torch.float64 else 2.0**-23
    torch.testing.assert_close(space.momenta[0].double(), p_new, rtol=4 * compute, atol=4 * compute)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(q[0].double(), q_new, rtol=ulp, atol=8 * compute)
    stored = space.momenta[0].double().clone()
    assert float(energy) == pytest.approx(float(0.5 * (w[0] * stored * stored).sum()), rel=1e-13)
    assert float(space.kinetic_energy()) == pytest.approx(float(energy), rel=1e-13)
    space.scale_momenta_(0.5)
    assert torch.equal(space.momenta[0].double(), 0.5 * stored)


def test_scalars_may_be_tensors():
    runs = []
    for wrap in (float, lambda x: torch.tensor(x, dtype=torch.float64)):
        params = parameters((40,), (3, 5))
        space = gti.PhaseSpace(params)
        space.kick_drift_(wrap(0.1), wrap(0.3), damp=wrap(0.9))
        space.kick_(wrap(0.2), damp=wrap(0.8))
        space.drift_(wrap(-0.1))
        space.scale_momenta_(wrap(0.7))
        runs.append([*copies(params), *space.momenta])
    assert same_bits(*runs)


@every_backend
@every_dtype
@pytest.mark.parametrize("exact", [False, True])
def test_a_parameter_without_gradient_is_left_alone(exact, dtype, backend):
    """As in torch.optim: position and momentum stay, bit by bit, damping included; the energy has
    its momentum all the same."""
    params = parameters((5,), (20_000,), (3, 4), dtype=dtype)
    momentum_dtype = None if exact else torch.float64  # by way of phase_step on every backend
    space = gti.PhaseSpace(
        params,
        inv_mass=[1.0, 0.5, 2.0],
        momentum="gaussian",
        momentum_dtype=momentum_dtype,
        exact=exact,
        backend=backend,
    )
    assert space.skipped == ()
    grads = [p.grad for p in params]
    for missing in ((1,), (0, 2), (1,), (0, 1, 2)):
        for i, p in enumerate(params):
            p.grad = None if i in missing else grads[i]
        for damp in (1.0, 0.5):
            q0, p0 = copies(params), copies(space.momenta)
            versions = [p._version for p in params]
            space.kick_(0.25, damp=damp)
            energy = space.kick_drift_(0.5, 0.125, damp=damp)
            written = [p._version > v for p, v in zip(params, versions)]
            assert written == [i not in missing for i in range(3)]
            assert space.skipped == missing
            for i in range(3):
                stays = i in missing
                assert torch.equal(params[i], q0[i]) == stays
                assert torch.equal(space.momenta[i], p0[i]) == stays
            assert float(energy) == pytest.approx(float(space.kinetic_energy()), rel=1e-6)
    q0, p0 = copies(params), copies(space.momenta)
    space.drift_(0.5, skipped=[2])
    assert [torch.equal(a, b) for a, b in zip(params, q0)] == [False, False, True]
    assert same_bits(space.momenta, p0)
    for wrong in ([3], [-1]):
        with pytest.raises(ValueError, match="skipped must hold places of the 3 parameters"):
            space.drift_(0.5, skipped=wrong)


@every_backend
def test_the_kinetic_energy_of_what_is_skipped(backend):
    q = [numbers(70), numbers(20_001, seed=1)]
    w = [numbers(*x.shape, seed=2).abs() for x in q]
    for mass in ([0.7, 1.3], w):
        space = gti.PhaseSpace(q, inv_mass=mass, momentum=[x.clone() for x in q], backend=backend)
        expected = sum(float((0.5 * m * x * x).sum()) for m, x in zip(mass, space.momenta))
        before = copies(q)
        assert float(space.kick_drift_(0.1, 0.1, grads=[None, None])) == pytest.approx(expected)
        assert same_bits(q, before)


def test_gaussian_momenta_have_the_variance_of_the_mass():
    q = [torch.zeros(200, 300), torch.zeros(50_000), torch.zeros(30_000)]
    w = [4.0, 0.25, torch.full((30_000,), 9.0)]
    for q_t, w_t in zip(q, w):
        (p,) = gti.PhaseSpace(q_t, inv_mass=w_t, momentum="gaussian", seed=1).momenta
        mass = 1 / float(w_t) if isinstance(w_t, float) else 1 / 9
        assert float(p.var()) == pytest.approx(mass, rel=0.03)
        assert abs(float(p.mean())) < 4 * math.sqrt(mass / p.numel())
    a, b, c = (gti.PhaseSpace(q, momentum="gaussian", seed=s).momenta for s in (1, 1, 2))
    assert same_bits(a, b) and not same_bits(a, c)


def test_fan_in_masses():
    shapes = [(8, 4, 3, 3), (5, 10_000), (7,), (3, 1), (2, 0)]
    space = gti.PhaseSpace([torch.zeros(s) for s in shapes])
    assert space.inv_mass == [1 / 6, 0.125, 1.0, 1.0, 1.0]


def test_a_saved_walk_goes_on_to_the_bit():
    for exact in (False, True):
        params, other = parameters((40,), (3, 5)), parameters((40,), (3, 5))
        space = gti.PhaseSpace(params, momentum="gaussian", exact=exact, seed=4)
        space.kick_drift_(0.1, 0.1)
        state = space.state_dict()
        with torch.no_grad():
            for a, b in zip(other, params):
                a.copy_(b)
        again = gti.PhaseSpace(other, exact=exact)
        again.load_state_dict(state)
        for x in (space, again):
            x.kick_drift_(0.1, 0.1, damp=0.9)
        assert same_bits(copies(params), copies(other))
        assert same_bits(space.momenta, again.momenta) and again.step_count == 2
    with pytest.raises(ValueError, match="expected momenta of shapes"):
        gti.PhaseSpace(torch.zeros(3), exact=True).load_state_dict(state)


# ---- the integrator ------------------------------------------------------------------------------

# max |ΔH| over 20 periods of the Kepler problem, e = 0.6, by steps a period
KEPLER = {
    (2, "yoshida"): {100: 1.495e-2, 200: 3.676e-3, 400: 9.153e-4},
    (4, "yoshida"): {100: 7.021e-4, 200: 4.771e-5, 400: 3.037e-6},
    (4, "suzuki"): {100: 3.799e-5, 200: 2.351e-6, 400: 1.466e-7},
}


def kepler_error(steps, order, composition, exact=False):
    e = 0.6
    q = torch.tensor([1 - e, 0.0], dtype=torch.float64)
    p = torch.tensor([0.0, math.sqrt((1 + e) / (1 - e))], dtype=torch.float64)
    space = gti.PhaseSpace(q, inv_mass=1.0, momentum=p, exact=exact)
    path = []

    def pull(q):
        return q / q.norm() ** 3

    for _ in range(20 * steps):
        space.leapfrog_(pull, 2 * math.pi / steps, order=order, composition=composition)
        path.append((q.clone(), space.momenta[0].clone()))
    qs, ps = (torch.stack(x) for x in zip(*path))
    energy = 0.5 * ps.square().sum(1) - 1 / qs.norm(dim=1)
    return float((energy + 0.5).abs().max())


@pytest.mark.parametrize("order, composition", KEPLER)
def test_energy_errors_of_the_kepler_problem(order, composition):
    golden = KEPLER[order, composition]
    steps = (200, 400) if composition == "suzuki" else (100,)  # test_leapfrog.py has the others
    errors = {n: kepler_error(n, order, composition) for n in steps}
    for n, error in errors.items():
        assert error == pytest.approx(golden[n], rel=1e-3)
    if composition == "suzuki":
        assert math.log2(errors[200] / errors[400]) == pytest.approx(order, abs=0.1)


def test_exact_has_the_same_energy_error():
    assert kepler_error(100, 4, "suzuki", exact=True) == pytest.approx(3.799e-5, rel=1e-3)


def oscillator_step(h, gamma):
    """One damp-kick-drift-kick-damp step of H = (p² + q²)/2 as a 2 x 2 matrix on (q, p)."""
    half = math.exp(-gamma * h / 2)
    damp = torch.tensor([[1.0, 0.0], [0.0, half]], dtype=torch.float64)
    kick = torch.tensor([[1.0, 0.0], [-h / 2, 1.0]], dtype=torch.float64)
    drift = torch.tensor([[1.0, h], [0.0, 1.0]], dtype=torch.float64)
    return damp @ kick @ drift @ kick @ damp


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("order, composition", KEPLER)
def test_the_oscillator_follows_its_closed_form(order, composition, gamma, exact):
    h, n = 0.1, 50
    w, s = 1 / (2 - 2 ** (1 / 3)), 1 / (4 - 4 ** (1 / 3))
    stages = [1.0] if order == 2 else [w, 1 - 2 * w, w]
    if composition == "suzuki":
        stages = [s, s, 1 - 4 * s, s, s]
    step = torch.eye(2, dtype=torch.float64)
    for stage in stages:
        step = oscillator_step(stage * h, gamma) @ step
    start = torch.tensor([0.8, -0.3], dtype=torch.float64)
    q = start[:1].clone()
    space = gti.PhaseSpace(q, inv_mass=1.0, momentum=start[1:], exact=exact)
    space.leapfrog_(lambda q: q, h, steps=n, damping=gamma, order=order, composition=composition)
    expected = torch.linalg.matrix_power(step, n) @ start
    # The grid of p is 2⁻⁴⁰ of its scale.
    bound = 1e-10 if exact else 1e-12
    assert (torch.cat([q, space.momenta[0]]) - expected).abs().max() <= bound


@pytest.mark.parametrize("order, composition", KEPLER)
@pytest.mark.parametrize("gamma", [0.0, 0.4])
def test_a_step_is_conformally_symplectic(gamma, order, composition):
    """MᵀJM = e^{−γt} J for the linear map of a quadratic potential with masses."""
    n, h, steps = 5, 0.2, 3
    a = numbers(n, n)
    stiffness, mass = a @ a.T, numbers(n, seed=1).abs() + 0.1
    columns = []
    for unit in torch.eye(2 * n, dtype=torch.float64):
        q = unit[:n].clone()
        space = gti.PhaseSpace(q, inv_mass=mass, momentum=unit[n:])
        space.leapfrog_(
            lambda q: stiffness @ q,
            h,
            steps=steps,
            damping=gamma,
            order=order,
            composition=composition,
        )
        columns.append(torch.cat([q, space.momenta[0]]))
    m, j = torch.stack(columns, 1), symplectic_matrix(n)
    defect = m.T @ j @ m - math.exp(-gamma * h * steps) * j
    assert defect.abs().max() <= 1e-12 * m.abs().max() ** 2


# ---- stochastic rounding -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_backend
def test_steps_below_the_precision_count_on_average(dtype, backend):
    """A thousand steps of 1/50 of a unit in the last place; rounded to nearest none would count."""
    n, ulp = 4000, torch.finfo(dtype).eps
    q = torch.ones(n, dtype=dtype)
    space = gti.PhaseSpace(q, inv_mass=1.0, momentum=torch.full((n,), 0.02 * ulp), backend=backend)
    for _ in range(1000):
        space.drift_(1.0)
    moved = (q.double() - 1.0) / ulp
    assert float(moved.mean()) == pytest.approx(20.0, abs=5 * math.sqrt(20 / n))
    assert 0.5 * 20 < float(moved.var()) < 2 * 20  # elements are rounded independently


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_unbiased_everywhere(dtype):
    """Normal, subnormal and tiny numbers: two neighbours, with the odds that keep the mean."""
    ulp = torch.finfo(dtype).eps
    n = 20_000
    values = [1.3, -1.3, 3.14159e-3, -70.7, 2.0**-15 * 1.23456, 1.7e-6, -4e-8, 1e-9, 0.0]
    for x in (v for v in values if dtype == torch.float16 or abs(v) > 1e-7 or v == 0.0):
        exact = float(torch.tensor(x))
        got = reference.stochastically_rounded(torch.full((n,), x), dtype, 77).double()
        spacing = max(abs(exact) * ulp, 2.0**-24 if dtype == torch.float16 else 0.0)
        assert float((got - exact).abs().max()) <= spacing
        assert abs(float(got.mean()) - exact) <= 5 * spacing / math.sqrt(4 * n) + 1e-12 * abs(x)
    special = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 3e38, -3.4e38])
    got = reference.stochastically_rounded(special, dtype, 1)
    assert got[:2].tolist() == [math.inf, -math.inf] and bool(got[2].isnan())
    assert got[3] == 0 and math.copysign(1, float(got[3])) == -1
    if dtype == torch.float16:
        assert got[4:].tolist() == [math.inf, -math.inf]


def test_numbers_that_fit_stay():
    """Whatever is drawn, what 16 bits can hold is not moved."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[every.isfinite()]
        q = every.clone()
        gti.PhaseSpace(q, inv_mass=1.0).drift_(1.0)
        assert torch.equal(q.view(torch.int16)[q != 0], every.view(torch.int16)[q != 0])


def test_draws_depend_on_seed_step_tensor_and_element():
    def draw(seed=0, steps=1, tensors=1):
        q = [torch.ones(1000, dtype=torch.bfloat16) for _ in range(tensors)]
        p = [torch.full((1000,), 2.0**-8)] * tensors
        space = gti.PhaseSpace(q, inv_mass=1.0, momentum=p, seed=seed)
        for _ in range(steps):
            for x in q:
                x.fill_(1.0)
            space.drift_(1.0)
        return [x > 1.0 for x in q]

    (a,) = draw()
    assert torch.equal(a, *draw())
    first, second = draw(tensors=2)
    assert torch.equal(a, first)
    for other in (draw(seed=1)[0], draw(steps=2)[0], second):
        assert 400 < int((a ^ other).sum()) < 600
    assert 400 < int(a.sum()) < 600 and 200 < int((a[:-1] & ~a[1:]).sum()) < 300


# ---- the plan ------------------------------------------------------------------------------------


def test_a_new_gradient_and_a_moved_parameter_are_read_anew():
    params = parameters((6,), (2, 3))
    space = gti.PhaseSpace(params, inv_mass=1.0)
    space.kick_(1.0)
    for p in params:
        p.grad = torch.ones_like(p)
    params[0].data = torch.zeros(6)  # other memory, same layout
    before = copies(space.momenta)
    space.kick_drift_(1.0, 1.0)
    torch.testing.assert_close(space.momenta[0], before[0] - 1.0)
    torch.testing.assert_close(params[0].detach(), space.momenta[0])


def test_gradients_of_another_layout_are_read_right():
    params = parameters((4, 5), (3, 2, 2, 2))
    params[0].grad = params[0].grad.t().contiguous().t()
    params[1].grad = params[1].grad.to(memory_format=torch.channels_last)
    space = gti.PhaseSpace(params, inv_mass=1.0)
    space.kick_(1.0)
    for p, m in zip(params, space.momenta):
        assert torch.equal(m, -p.grad)
    lazy = parameters((1,), (2,))
    z = torch.tensor([1.0 + 2.0j])
    lazy[0].grad, lazy[1].grad = z.conj().imag, torch.stack([z[0], z[0]]).conj().imag
    assert lazy[0].grad.is_neg()
    space = gti.PhaseSpace(lazy, inv_mass=1.0)
    space.kick_(1.0)
    assert [m.tolist() for m in space.momenta] == [[2.0], [2.0, 2.0]]


def test_strided_parameters_are_stepped():
    memory = numbers(6, 8, dtype=torch.float32)
    q = memory[:, ::2]
    untouched, expected = memory[:, 1::2].clone(), q + 1.0
    space = gti.PhaseSpace(q, inv_mass=1.0)
    space.kick_drift_(-1.0, 1.0, grads=[torch.ones(6, 4)])
    assert torch.equal(q, expected) and torch.equal(memory[:, 1::2], untouched)


def stale(change):
    params = parameters((6,), (2, 3))
    space = gti.PhaseSpace(params)
    change(params, space)
    return params, space


def resized(params, space):
    params[1].data = torch.ones(3, 2)


def widened(params, space):
    params[1].data = torch.ones(2, 3, dtype=torch.float64)


def freed(params, space):
    params[1].untyped_storage().resize_(0)


def transposed(params, space):
    params[1].data = torch.ones(3, 2).t()


@pytest.mark.parametrize("change", [resized, widened, freed, transposed])
@pytest.mark.parametrize("exact", [False, True])
def test_a_stale_plan_is_an_error(change, exact):
    params = parameters((6,), (2, 3))
    space = gti.PhaseSpace(params, exact=exact)
    change(params, space)
    for p in params:
        p.grad = None
    first, momenta = params[0].detach().clone(), copies(space.momenta)
    for step in 2 * [lambda: space.drift_(0.1), lambda: space.kick_drift_(0.1, 0.1)]:
        with pytest.raises(RuntimeError, match="plan is stale: params\\[1\\]"):
            step()
    assert torch.equal(params[0], first) and same_bits(space.momenta, momenta)


def test_parameters_that_came_to_share_memory_are_refused():
    params, space = stale(lambda params, space: None)
    params[1].data = params[0].data.view(2, 3)
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match="share memory"):
        space.kick_drift_(0.1, 0.1)
    params[1].data = space.momenta[0].view(2, 3)
    with pytest.raises(ValueError, match="share memory"):
        space.kick_drift_(0.1, 0.1)
    assert torch.equal(params[0], before)


def test_a_parameter_that_moves_onto_a_gradient_is_refused():
    """The plan remembers which gradients it found apart from what it writes."""
    params = parameters((6,), (2, 3))
    space = gti.PhaseSpace(params)
    for _ in range(2):
        space.kick_drift_(0.1, 0.1)
    memory = params[0].grad
    params[1].data = memory.view(2, 3)
    before = memory.clone()
    with pytest.raises(ValueError, match="share memory"):
        space.kick_drift_(0.1, 0.1)
    assert torch.equal(memory, before)


def test_a_plan_holds_no_memory_that_a_parameter_has_left():
    memory = numpy.zeros(6, dtype=numpy.float32)
    param, gone = torch.nn.Parameter(torch.from_numpy(memory)), weakref.ref(memory)
    del memory
    space = gti.PhaseSpace(param)
    assert gone() is not None
    param.data = torch.zeros(6)
    assert gone() is None
    space.drift_(0.1)
    gone = weakref.ref(param)
    del param, space
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("exact", [False, True])
def test_the_integrator_skips_a_parameter_without_gradient(exact):
    q, p = [numbers(5), numbers(4, seed=1)], [numbers(5, seed=2), numbers(4, seed=3)]
    space = gti.PhaseSpace(q, inv_mass=1.0, momentum=p, exact=exact)
    start = [*copies(q), *space.momenta]
    walk = {"steps": 6, "damping": 0.4, "order": 4}
    space.leapfrog_(lambda q: [torch.sin(q[0]), None], 0.1, **walk)
    assert same_bits([q[1], space.momenta[1]], [start[1], start[3]])
    assert (q[0] - start[0]).abs().max() > 0.1
    space.leapfrog_(lambda q: [torch.sin(q[0]), None], -0.1, **walk)
    for x, y in zip([*q, *space.momenta], start):
        torch.testing.assert_close(x, y, rtol=0, atol=0 if exact else 1e-12)


def test_autograd_is_told_of_a_step():
    for exact in (False, True):
        params = parameters((3,))
        space = gti.PhaseSpace(params, inv_mass=1.0, exact=exact)
        loss = (params[0] ** 2).sum()
        space.kick_drift_(0.1, 0.1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# ---- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params, options, error, words",
    [
        ([torch.ones(2, dtype=torch.int64)], {}, TypeError, "params\\[0\\] must have dtype"),
        (["x"], {}, TypeError, "params\\[0\\] must be a tensor, got str"),
        ([torch.ones(2).to_sparse()], {}, TypeError, "must be a dense tensor"),
        ([torch.ones(2), torch.ones(2, device="meta")], {}, ValueError, "must be on one device"),
        ([torch.ones(4).expand(3, 4)], {}, ValueError, "must not overlap itself"),
        ([torch.ones(2)], {"inv_mass": "fan_out"}, ValueError, "inv_mass must be 'fan_in'"),
        ([torch.ones(2)], {"inv_mass": math.inf}, ValueError, "inv_mass must be finite"),
        ([torch.ones(2)], {"inv_mass": -1.0}, ValueError, "finite and not negative"),
        ([torch.ones(2)], {"inv_mass": [1.0, 2.0]}, ValueError, "one entry for each of the 1"),
        ([torch.ones(2)], {"inv_mass": torch.ones(3)}, ValueError, "shape and device of params"),
        ([torch.ones(2)], {"inv_mass": torch.tensor([1.0, math.nan])}, ValueError, "everywhere"),
        ([torch.ones(2)], {"inv_mass": torch.tensor([1.0, math.inf])}, ValueError, "everywhere"),
        ([torch.ones(2)], {"inv_mass": torch.tensor([1.0, -1.0])}, ValueError, "everywhere"),
        ([torch.ones(2)], {"inv_mass": torch.ones(2, dtype=torch.cfloat)}, TypeError, "have dtype"),
        ([torch.ones(2)], {"momentum": "hot"}, ValueError, "'zeros', 'gaussian' or tensors"),
        ([torch.ones(2)], {"momentum": torch.ones(3)}, ValueError, "must have the shape of"),
        ([torch.ones(2)], {"momentum": [torch.ones(2)] * 2}, ValueError, "one tensor for each"),
        ([torch.ones(2)], {"momentum": "gaussian", "inv_mass": 0.0}, ValueError, "inv_mass > 0"),
        ([torch.ones(2)], {"momentum_dtype": torch.bfloat16}, ValueError, "momentum_dtype must be"),
        ([torch.ones(2)], {"backend": "fpga"}, ValueError, "backend must be one of"),
    ],
)
def test_plans_that_cannot_be_made(params, options, error, words):
    with pytest.raises(error, match=words):
        gti.PhaseSpace(params, **options)


@pytest.mark.parametrize("exact", [False, True])
@every_backend
def test_steps_that_cannot_be_taken(backend, exact):
    params = parameters((3,), (2, 2))
    space = gti.PhaseSpace(params, exact=exact, backend=backend)
    good = [torch.ones(3), torch.ones(2, 2)]
    before, momenta = copies(params), copies(space.momenta)
    cases = [
        (lambda: space.kick_(0.1, grads=good[:1]), ValueError, "one entry for each of the 2"),
        (lambda: space.kick_(0.1, grads=[torch.ones(4), None]), ValueError, "shape, dtype and"),
        (lambda: space.kick_(0.1, grads=[good[0].double(), None]), ValueError, "float64"),
        (lambda: space.kick_(0.1, grads=[3.0, None]), TypeError, "must be a tensor, got float"),
        (lambda: space.kick_(0.1, grads=[good[0].to_sparse(), None]), TypeError, "sparse=False"),
        (lambda: space.kick_(0.1, grads=[params[0].detach(), None]), ValueError, "share memory"),
        (lambda: space.kick_(math.nan, grads=good), ValueError, "kick must be finite"),
        (lambda: space.kick_(0.1, damp=math.inf, grads=good), ValueError, "damp must be finite"),
        (lambda: space.drift_(math.inf), ValueError, "drift must be finite"),
        (lambda: space.drift_(torch.ones(2)), TypeError, "drift must be a Python float"),
        (lambda: space.drift_("x"), TypeError, "drift must be a float"),
        (lambda: space.leapfrog_(None, 0.1, order=3), ValueError, "order must be 2 or 4"),
        (
            lambda: space.leapfrog_(None, 0.1, composition="ruth"),
            ValueError,
            "'yoshida' or 'suzuki'",
        ),
        (lambda: space.leapfrog_(None, math.nan), ValueError, "dt must be finite"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()
    assert same_bits(copies(params), before) and same_bits(space.momenta, momenta)
    params[0].grad = torch.ones(3).to_sparse()
    with pytest.raises(TypeError, match="the gradient of params\\[0\\] must be dense"):
        space.kick_drift_(0.1, 0.1)
    assert same_bits(copies(params), before) and same_bits(space.momenta, momenta)


def test_an_exception_in_the_gradient_leaves_a_plan_that_goes_on():
    for exact in (False, True):
        q = [torch.ones(3)]
        space = gti.PhaseSpace(q, inv_mass=1.0, exact=exact)
        calls = []

        def gradient(q):
            calls.append(0)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return [x.clone() for x in q]

        with pytest.raises(KeyboardInterrupt):
            space.leapfrog_(gradient, 0.1, steps=5)
        space.leapfrog_(gradient, 0.1, steps=5)
        assert bool(q[0].isfinite().all()) and space.step_count == 7


def test_nothing_and_empty_tensors():
    for exact in (False, True):
        space = gti.PhaseSpace([], exact=exact)
        space.leapfrog_(lambda q: [], 0.1)
        assert float(space.kick_drift_(0.1, 0.1)) == 0.0 == float(space.kinetic_energy())
        empty = gti.PhaseSpace([torch.empty(0, 3)], exact=exact)
        assert float(empty.kick_drift_(0.1, 0.1, grads=[torch.empty(0, 3)])) == 0.0
