"""exact=True: every bit returns, backends give the same bits, a way back that errs is told."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch.nn.functional import cross_entropy

import gti_kernels as gti
from gti_kernels import exact_grid, testing
from gti_kernels.models.simple_cnn import SimpleCNN

BACKENDS = ("cpu", "reference")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def numbers(*shape, dtype=torch.float64, seed=0):
    return testing.numbers(*shape, dtype=dtype, device="cpu", seed=seed)


def copies(xs):
    return [x.detach().clone() for x in xs]


def same_bits(xs, ys):
    """Signs of zeros included."""
    return all(
        x.dtype == y.dtype and torch.equal(x, y) and torch.equal(x.signbit(), y.signbit())
        for x, y in zip(xs, ys, strict=True)
    )


def sines(q):
    return [torch.sin(x) for x in q]


@every_backend
@every_dtype
def test_a_negative_zero_returns_with_its_sign(dtype, backend):
    zeros = torch.tensor([-0.0, 0.0, 1.0, -0.0] * 5, dtype=dtype)
    start = zeros.clone(), zeros.flip(0).to(torch.float64)
    for q in (zeros.clone(), zeros.clone()[:, None].expand(20, 2).clone().T):
        p = start[1].expand_as(q)
        space = gti.PhaseSpace(
            q, inv_mass=1.0, momentum=p, momentum_dtype=p.dtype, exact=True, backend=backend
        )
        assert same_bits(space.momenta, [p])
        for dt in (0.1, -0.1):
            space.leapfrog_(torch.cos, dt, steps=3)
            assert same_bits([q], [start[0].expand_as(q)]) == (dt < 0)
        assert same_bits(space.momenta, [p])
        space.load_state_dict(space.state_dict())
        assert same_bits([q], [start[0].expand_as(q)])


# ---- the kernels ---------------------------------------------------------------------------------

SHAPES = [(1,), (0,), (7,), (33, 3), (16385,), (40001,), ()]


def walked(backend, dtype, mass, threads=1):
    torch.set_num_threads(threads)
    q = [numbers(*s, dtype=dtype, seed=i) for i, s in enumerate(SHAPES)]
    q[3] = q[3].t().contiguous().t()  # another order in memory
    p = [numbers(*x.shape, dtype=dtype, seed=9 + i) for i, x in enumerate(q)]
    q[2].mul_(1e-9)  # a tensor of another scale
    w = 0.7 if mass == "number" else [numbers(*x.shape, seed=5).abs() + 0.1 for x in q]
    space = gti.PhaseSpace(q, inv_mass=w, momentum=p, exact=True, backend=backend)
    energies = []
    for step in range(3):
        kick = 0.1 if step else 3.0  # increments that do not fit in the mantissa of an fp32
        energy = space.kick_drift_(kick, 0.02, damp=0.9, grads=sines(q))
        energies.append(float(energy))
    space.kick_(0.3, grads=[None if i == 4 else g for i, g in enumerate(sines(q))])
    space.drift_(-0.1)
    space.scale_momenta_(0.8)
    checksums = list(space._engine.moves.checksums)
    return copies(q), space.momenta, [*space._engine.Q, *space._engine.P], checksums, energies


@pytest.mark.parametrize("mass", ["number", "tensors"])
@every_dtype
def test_backends_and_thread_counts_give_the_same_bits(dtype, mass):
    q, p, grid, checksums, energies = walked("reference", dtype, mass)
    for threads in (1, 2):
        q2, p2, grid2, checksums2, energies2 = walked("cpu", dtype, mass, threads)
        assert same_bits(q, q2) and same_bits(p, p2) and same_bits(grid, grid2)
        assert checksums == checksums2 and any(checksums)
        assert energies == pytest.approx(energies2, rel=1e-13)


@every_backend
def test_increments_are_the_nearest_integers(backend):
    """Against exact rational arithmetic of Python's integers: ties to even, both signs."""
    g = torch.tensor(
        [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.3, 2.0**50 - 0.5, -(2.0**50) + 1.5, 1e9 + 0.5]
    )
    g = g.double()
    q = torch.zeros(len(g), dtype=torch.float64)
    space = gti.PhaseSpace(q, inv_mass=1.0, exact=True, backend=backend)
    unit = exact_grid.UNIT_P
    space.kick_(-unit, grads=[g])
    expected = [round(x) for x in g.tolist()]
    assert space._engine.P[0].tolist() == expected
    assert space.momenta[0].tolist() == [x * unit for x in expected]
    # A drift rounds rate·P, with P wider than a mantissa too.
    space._engine.P[0].copy_(
        torch.tensor([2**61 + 1, -(2**61) - 3, 2**53 + 1, 3, -3, 5, 0, 1, -1, 7])
    )
    rate = 2.0**-12
    space.drift_(rate * exact_grid.UNIT_Q / unit)
    wide = [float(x) for x in space._engine.P[0].tolist()]  # int to float rounds to nearest even
    assert space._engine.Q[0].tolist() == [round(rate * x) for x in wide]
    assert torch.equal(q, exact_grid.UNIT_Q * space._engine.Q[0].double())


@every_backend
def test_the_exact_step_is_the_step(backend):
    """The grid is fine: an exact walk follows the plain one to rounding."""
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        q = numbers(400, dtype=dtype)
        p, w = numbers(400, dtype=dtype, seed=1), numbers(400, dtype=dtype, seed=2).abs()
        runs = []
        for exact in (True, False):
            x = q.clone()
            plan = gti.PhaseSpace(x, inv_mass=w, momentum=p, exact=exact, backend=backend)
            plan.leapfrog_(torch.sin, 0.1, steps=20, damping=0.4, order=4)
            plan.scale_momenta_(0.5)
            runs.append((x, plan.momenta[0], plan.kinetic_energy()))
        for a, b in zip(*runs):
            torch.testing.assert_close(a, b, rtol=bound, atol=bound)


# ---- there and back ------------------------------------------------------------------------------


@every_backend
@every_dtype
@pytest.mark.parametrize("order, composition", [(2, "yoshida"), (4, "yoshida"), (4, "suzuki")])
def test_every_bit_returns(order, composition, dtype, backend):
    q, p = [numbers(*s, dtype=dtype) for s in ((50,), (4, 3))], None
    q[0][:3] = torch.tensor([1e-7, -3e-5, 0.0])  # far below the scale of the tensor
    p = [numbers(*x.shape, dtype=dtype, seed=1) for x in q]
    q0, p0 = copies(q), copies(p)
    options = dict(damping=0.3, order=order, composition=composition, inv_mass=[0.7, 2.0])
    options |= dict(exact=True, backend=backend)
    for _ in range(4):  # several calls out, one back
        gti.leapfrog_(q, p, sines, 0.1, steps=5, **options)
    assert (q[0] - q0[0]).abs().max() > 0.1
    gti.leapfrog_(q, p, sines, -0.1, steps=20, **options)
    assert same_bits(q, q0) and same_bits(p, p0)


@every_backend
def test_every_bit_returns_when_gradients_come_and_go(backend):
    """Each step another set of gradients that are None, damped each by another factor."""
    q = [numbers(*s, dtype=torch.float32) for s in ((5,), (4, 3), (700,))]
    p = [numbers(*x.shape, dtype=torch.float32, seed=1) for x in q]
    space = gti.PhaseSpace(q, inv_mass=0.7, momentum=p, exact=True, backend=backend)
    sets = [(), (1,), (0, 2), (1,), (1,), (0, 1, 2), (2,), ()] * 3
    h, seen = 0.1, []

    def grads(skipped):
        return [None if i in skipped else g for i, g in enumerate(sines(q))]

    def everything():
        return [*copies(q), *space.momenta, *copies(space._engine.Q), *copies(space._engine.P)]

    for t, skipped in enumerate(sets):
        seen.append(everything())
        space.kick_drift_(h, h, damp=1.0 - 0.01 * (t % 5), grads=grads(skipped))
        assert space.skipped == skipped
    for t, skipped in reversed(list(enumerate(sets))):
        damp = 1.0 - 0.01 * (t % 5)
        if t % 2:
            assert space.undo_drift_() == h
        else:
            space.drift_(-h)
        there = everything()
        for other in {(), (0,), (1,), (0, 2), (0, 1, 2)} - {skipped}:
            with pytest.raises(RuntimeError, match=f"leaves the way out at step {t}: .*None"):
                space.kick_(-h / damp, damp=1 / damp, grads=grads(other))
        assert same_bits(everything(), there)
        if t % 2:
            moves = space.state_dict()["moves"]
            space.redo_kick_(space.undo_kick_(grads(skipped)), grads(skipped))
            assert same_bits(everything(), there)
            assert str(space.state_dict()["moves"]) == str(moves)
            space.undo_kick_(grads(skipped))
        else:
            space.kick_(-h / damp, damp=1 / damp, grads=grads(skipped))
        assert same_bits(everything(), seen[t])
    assert space._engine.own == {} and space._engine.log == 0


def test_what_can_be_undone():
    q = numbers(5)
    with pytest.raises(RuntimeError, match="only a plan with exact=True"):
        gti.PhaseSpace(q).undo_drift_()
    space = gti.PhaseSpace(q, exact=True)
    with pytest.raises(RuntimeError, match="last move to take back must be a drift"):
        space.undo_drift_()
    space.drift_(0.1)
    with pytest.raises(RuntimeError, match="last move to take back must be a kick"):
        space.undo_kick_([q.clone()])
    assert space.undo_drift_() == 0.1 and space.step_count == 0


def test_the_moves_are_packed():
    """10 bytes a step at constant dt, of which 8 are the checksum; 8 more for a number that
    changes."""

    def size(space):
        return sum(x.nbytes for x in flat(space.state_dict()["moves"]))

    def flat(x):
        if isinstance(x, torch.Tensor):
            return [x]
        return [t for y in (x.values() if isinstance(x, dict) else x) for t in flat(y)]

    for changing, bytes_a_step in ((0, 10), (1, 18), (2, 26)):
        q = [torch.ones(2)]
        space = gti.PhaseSpace(q, inv_mass=1.0, exact=True)
        sizes = []
        for t in range(200):
            damp = 0.99 + 1e-5 * t if changing else 0.99
            space.kick_drift_(1e-3, 1e-3 + 1e-8 * t * (changing > 1), damp=damp, grads=sines(q))
            sizes.append(size(space))
        assert {b - a for a, b in zip(sizes[1:], sizes[2:])} == {bytes_a_step}


@pytest.mark.parametrize("log", [0, 1, -1, 2**52, 3 * 2**51, -(2**51), 2**51 + 1, -829 * 2**52 + 5])
def test_powers_of_two(log):
    with mpmath.workdps(40):
        exact = mpmath.mpf(2) ** (mpmath.mpf(log) / 2**52)
        assert abs(exact_grid.power_of_two(log) / exact - 1) < 3 * 2.0**-53


def test_a_hundred_thousand_steps_on_a_quadratic():
    q, p = numbers(8), numbers(8, seed=1)
    stiffness = numbers(8, seed=2).abs() + 0.1
    q0, p0 = q.clone(), p.clone()
    space = gti.PhaseSpace(q, inv_mass=0.5, momentum=p, exact=True)
    start = space.momenta[0]
    steps, h, damp = 100_000, 0.01, math.exp(-1e-6)
    for _ in range(steps):
        space.kick_drift_(h, h, damp=damp, grads=[stiffness * q])
    assert (q - q0).abs().max() > 0.1
    for _ in range(steps):
        space.drift_(-h)
        space.kick_(-h / damp, damp=1 / damp, grads=[stiffness * q])
    assert torch.equal(q, q0) and torch.equal(start, p0) and torch.equal(space.momenta[0], p0)


def cnn_walk(steps):
    """A damped walk of a CNN under an energy cap, as an optimizer takes it; and its way back."""
    torch.set_num_threads(1)  # small work
    torch.manual_seed(0)
    model = SimpleCNN(1, 10, norm="group", width=8)
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    params = list(model.parameters())
    space = gti.PhaseSpace(params, momentum="gaussian", exact=True)
    space.scale_momenta_(0.1)
    q0, p0 = copies(params), space.momenta
    h, damp, capped = 0.02, math.exp(-1e-3), []

    def backward():
        model.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss.detach().double()

    cap = None
    for t in range(steps):
        loss = backward()
        energy = loss + space.kick_drift_(h, h, damp=damp)
        cap = energy if cap is None else cap
        limit = (0.99 - 0.3 * min(t, 100) / 100) * cap  # falls for a while
        if energy > limit:
            kinetic = space.kinetic_energy()
            factor = ((limit - loss).clamp(min=1e-12) / kinetic.clamp(min=1e-12)).sqrt()
            space.scale_momenta_(factor)
            capped.append((t, float(factor)))
    assert not same_bits(params, q0)
    yield params, q0, space, p0, capped
    for t in reversed(range(steps)):
        if capped and capped[-1][0] == t:
            space.scale_momenta_(1 / capped.pop()[1])
        space.drift_(-h)
        backward()
        space.kick_(-h / damp, damp=1 / damp)
    yield params, q0, space, p0, capped


def test_a_cnn_under_damping_and_energy_cap_returns():
    walk = cnn_walk(120)
    *_, capped = next(walk)
    assert len(capped) > 20
    params, q0, space, p0, _ = next(walk)
    assert same_bits(params, q0) and same_bits(space.momenta, p0)
    assert space.step_count == 0


def test_a_walk_saved_and_loaded_goes_back():
    q, p = [numbers(40, dtype=torch.float32)], [numbers(40, dtype=torch.float32, seed=1)]
    q0 = copies(q)
    space = gti.PhaseSpace(q, inv_mass=1.0, momentum=p, exact=True)
    space.leapfrog_(sines, 0.1, steps=20, damping=0.2)
    space.scale_momenta_(0.9)
    state, middle = space.state_dict(), space.momenta
    other = [torch.zeros(40)]
    fresh = gti.PhaseSpace(other, inv_mass=1.0, exact=True)
    fresh.load_state_dict(state)
    assert same_bits(other, q) and same_bits(fresh.momenta, middle)
    space.leapfrog_(sines, 0.1)  # the saved state is a copy
    fresh.scale_momenta_(1 / 0.9)
    fresh.leapfrog_(sines, -0.1, steps=20, damping=0.2)
    assert same_bits(other, q0) and same_bits(fresh.momenta, p)
    with pytest.raises(ValueError, match="exact=True does not fit one with exact=False"):
        gti.PhaseSpace(other, inv_mass=1.0).load_state_dict(state)


def test_leapfrog_starts_anew_where_somebody_wrote():
    q, p = numbers(5), numbers(5, seed=1)
    gti.leapfrog_(q, p, torch.sin, 0.1, steps=3, exact=True)
    q.add_(1.0)
    q0, p0 = q.clone(), p.clone()
    gti.leapfrog_(q, p, torch.sin, 0.1, steps=3, exact=True)
    gti.leapfrog_(q, p, torch.sin, -0.1, steps=3, exact=True)
    assert torch.equal(q, q0) and torch.equal(p, p0)


def test_leapfrog_starts_anew_where_a_mass_was_written():
    q, p, w = torch.zeros(3), torch.ones(3), torch.ones(3)
    gti.leapfrog_(q, p, torch.zeros_like, 1.0, inv_mass=w, exact=True)
    w.mul_(2)
    gti.leapfrog_(q, p, torch.zeros_like, 1.0, inv_mass=w, exact=True)
    assert q.tolist() == [3.0] * 3


@every_backend
def test_data_that_somebody_replaced_is_refused(backend):
    q = torch.nn.Parameter(numbers(5))
    space = gti.PhaseSpace(q, exact=True, backend=backend)
    q.data = q.data.clone()  # moved, but the same
    space.kick_drift_(0.1, 0.1, grads=[torch.ones_like(q)])
    q.data = q.data + 1.0
    before = q.detach().clone()
    with pytest.raises(RuntimeError, match=r"data of params\[0\] was replaced"):
        space.kick_drift_(0.1, 0.1, grads=[torch.ones_like(q)])
    assert torch.equal(q, before)


def test_round_trip_is_exactly_zero_without_hidden_state():
    torch.set_num_threads(1)
    batches = [(torch.randn(8, 1, 8, 8), torch.arange(8)) for _ in range(3)]
    for norm, regime in (("group", "batch"), ("batch", "frozen")):
        torch.manual_seed(1)
        model = SimpleCNN(1, 10, norm=norm, width=4)
        system = gti.HamiltonianSystem(model, cross_entropy, batches, damping=0.1, regime=regime)
        trip = gti.round_trip(system, dt=0.05, steps=6, exact=True)
        assert trip.state == 0.0 and trip.energy == 0.0 and trip.buffers == 0.0
        assert trip.state_floor == 0.0 and trip.energy_floor == 0.0
        assert trip.reach > 1e-4
        plain = gti.round_trip(system, dt=0.05, steps=6)
        assert plain.state > 0.0 and plain.reach == pytest.approx(trip.reach, rel=1e-3)


def test_round_trip_names_the_step_where_hidden_state_acts():
    batches = [(torch.randn(8, 1, 8, 8), torch.arange(8)) for _ in range(3)]
    model = SimpleCNN(1, 10, norm="batch", width=4)
    system = gti.HamiltonianSystem(model, cross_entropy, batches, regime="running")
    with pytest.raises(RuntimeError, match="at step 6: the gradient there is not the same"):
        gti.round_trip(system, dt=0.05, steps=6, exact=True)


# ---- what goes wrong -----------------------------------------------------------------------------


@every_backend
def test_a_gradient_off_by_one_bit_is_found_at_its_step(backend):
    q, p = [numbers(300, dtype=torch.float32), numbers(2, 3, dtype=torch.float32)], None
    p = [numbers(*x.shape, dtype=torch.float32, seed=1) for x in q]
    space = gti.PhaseSpace(q, inv_mass=1.0, momentum=p, exact=True, backend=backend)
    q0 = copies(q)
    h, damp = 0.1, 0.99

    def forward(t):
        space.kick_drift_(h, h, damp=damp, grads=sines(q))

    for t in range(10):
        forward(t)
    for t in reversed(range(10)):
        space.drift_(-h)
        grads = sines(q)
        if t == 4:
            wrong = copies(grads)
            wrong[0][123] = torch.nextafter(wrong[0][123], torch.tensor(9.0))
            swapped = copies(grads)
            swapped[0][[7, 8]] = swapped[0][[8, 7]]  # the same sum
            missing = [grads[0], None]
            before, p_before = copies(q), space.momenta
            for bad in (wrong, swapped, missing):
                with pytest.raises(RuntimeError, match="leaves the way out at step 4"):
                    space.kick_(-h / damp, damp=1 / damp, grads=bad)
                assert same_bits(q, before) and same_bits(space.momenta, p_before)
        space.kick_(-h / damp, damp=1 / damp, grads=grads)
    assert same_bits(q, q0) and same_bits(space.momenta, p)


@every_backend
def test_overflow_is_an_error_before_it_happens(backend):
    q, p = [numbers(70)], [numbers(70, seed=1)]
    space = gti.PhaseSpace(q, inv_mass=1.0, momentum=p, exact=True, backend=backend)
    space.leapfrog_(sines, 0.1, steps=3)
    q0, p0, grid = copies(q), space.momenta, copies([*space._engine.Q, *space._engine.P])
    bad = [sines(q)[0] for _ in range(3)]
    bad[0][5], bad[1][69], bad[2][0] = math.inf, math.nan, 1e300
    for g in bad:
        for step in (
            lambda: space.kick_(0.1, grads=[g]),
            lambda: space.kick_drift_(0.1, 0.1, damp=0.5, grads=[g]),
        ):
            with pytest.raises(OverflowError, match="smaller dt or less damping"):
                step()
    with pytest.raises(OverflowError, match="would leave the grid"):
        space.drift_(1e12)
    with pytest.raises(OverflowError, match="factor s"):
        space.scale_momenta_(1e-300)
    assert same_bits(q, q0) and same_bits(space.momenta, p0)
    assert same_bits([*space._engine.Q, *space._engine.P], grid)
    for edge, sign in ((2**62 - 1, -1.0), (-(2**62), 1.0)):  # a coordinate leaves, no increment
        space._engine.P[0][3] = edge
        with pytest.raises(OverflowError, match="would leave the grid"):
            space.kick_(sign * 2.0**-30, grads=[torch.ones(70, dtype=torch.float64)])
        assert int(space._engine.P[0][3]) == edge
        space.kick_(-sign * 2.0**-30, grads=[torch.ones(70, dtype=torch.float64)])
    with pytest.raises(ValueError, match="finite positions and momenta"):
        gti.PhaseSpace(torch.tensor([1.0, math.inf]), exact=True)


@every_backend
def test_a_position_that_somebody_wrote_is_refused(backend):
    q = [torch.ones(3), torch.ones(2)]
    space = gti.PhaseSpace(q, exact=True, backend=backend)
    q[1].mul_(2.0)
    with pytest.raises(RuntimeError, match="params\\[1\\] was written since the last step"):
        space.drift_(0.1)
    assert q[1].tolist() == [2.0, 2.0]


def test_damping_and_scaling_that_cannot_be_undone_are_refused():
    space = gti.PhaseSpace([torch.ones(3)], exact=True)
    with pytest.raises(ValueError, match="factor must be positive"):
        space.scale_momenta_(0.0)
    with pytest.raises(ValueError, match="damp must be positive"):
        space.kick_(0.1, damp=0.0, grads=[torch.ones(3)])


@every_backend
def test_an_error_on_the_way_back_names_the_step_of_order_four_too(backend):
    q, p = numbers(9), numbers(9, seed=1)
    for dt, steps in ((0.1, 5), (-0.1, 2)):
        gti.leapfrog_(q, p, torch.sin, dt, steps=steps, order=4, exact=True, backend=backend)
    with pytest.raises(RuntimeError, match="leaves the way out at step 3: "):
        gti.leapfrog_(q, p, lambda q: 1.01 * q.sin(), -0.1, order=4, exact=True, backend=backend)


def test_a_walk_in_inference_mode_returns():
    with torch.inference_mode():
        q, p = numbers(9), numbers(9, seed=1)
        start = copies([q, p])
        for dt in (0.1, -0.1):
            gti.leapfrog_(q, p, torch.sin, dt, steps=4, damping=0.2, exact=True)
        assert same_bits([q, p], start)


def test_a_state_of_another_memory_layout_is_refused():
    def space(layout):
        q = numbers(2, 3, 4, 5).contiguous(memory_format=layout)
        return gti.PhaseSpace(q, inv_mass=1.0, exact=True)

    there, here = space(torch.channels_last), space(torch.contiguous_format)
    with pytest.raises(ValueError, match="memory layout"):
        there.load_state_dict(here.state_dict())
    there.load_state_dict(space(torch.channels_last).state_dict())


def test_a_gradient_that_is_no_number_leaves_all_as_it_was():
    q = numbers(9)
    space = gti.PhaseSpace(q, inv_mass=1.0, exact=True)
    before = copies([q, *space.momenta])
    with pytest.raises(OverflowError, match=r"no number.*energy cap"):
        space.kick_drift_(0.1, 0.1, grads=[torch.full_like(q, math.nan)])
    assert same_bits([q, *space.momenta], before)


@every_backend
@every_dtype
def test_an_increment_beyond_its_limit_is_an_error_though_the_coordinate_would_fit(dtype, backend):
    q = torch.ones(21, dtype=dtype)
    space = gti.PhaseSpace(q, inv_mass=1.0, momentum=torch.ones(21), exact=True, backend=backend)
    before = copies([q, *space.momenta])
    ones = [torch.ones_like(q)]
    for step in (2047.0, -2047.0):  # 2¹¹ of the scale of p
        space.kick_(step, grads=ones)
    for step in (7.9, -7.9):  # 2³ of the scale of q
        space.drift_(step)
    for beyond in (
        lambda: space.kick_(2049.0, grads=ones),
        lambda: space.kick_drift_(-2049.0, 1e-6, grads=ones),
        lambda: space.drift_(8.1),
        lambda: space.drift_(-100.0),
        lambda: space.kick_drift_(0.0, 8.1, grads=ones),
    ):
        with pytest.raises(OverflowError, match="would leave the grid"):
            beyond()
    assert same_bits([q, *space.momenta], before)
