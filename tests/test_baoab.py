"""gti.optim.BAOAB: its stationary distribution in closed form, and the torch contract."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

import gti_kernels as gti

F64 = torch.float64
N = 20_000  # independent oscillators


def oscillators(stiffness, inv_mass, dt, *, closure):
    """Positions, momenta of N oscillators L = ½ k q² after 100 steps from q = 0, T = 1.5."""
    q = nn.Parameter(torch.zeros(N, dtype=F64))
    optimizer = gti.optim.BAOAB([q], dt, temperature=1.5, inv_mass=inv_mass, seed=1)

    def force():
        q.grad = stiffness * q.detach()
        return 0.5 * stiffness * q.detach().square().sum()

    for _ in range(100):
        if closure:
            optimizer.step(force)
        else:
            force()
            optimizer.step()
    return q.detach(), optimizer.phase_spaces[0].momenta[0]


def near(variance):
    """Five standard deviations of the variance of N Gaussians."""
    return pytest.approx(variance, rel=5 * math.sqrt(2 / N))


CASES = [  # (k, M⁻¹, dt): ω dt = dt √(k M⁻¹) is 0.3, 1.0, 1.5, 1.6
    (1.0, 1.0, 0.3),
    (4.0, 1.0, 0.5),
    (1.0, 0.25, 3.0),
    (0.5, 8.0, 0.8),
]


@pytest.mark.parametrize(("stiffness", "inv_mass", "dt"), CASES)
@pytest.mark.parametrize("closure", [False, True])
def test_positions_of_a_quadratic_have_the_exact_variance(stiffness, inv_mass, dt, closure):
    q, _ = oscillators(stiffness, inv_mass, dt, closure=closure)
    assert q.var().item() == near(1.5 / stiffness)
    assert abs(q.mean().item()) < 5 * math.sqrt(1.5 / stiffness / N)


@pytest.mark.parametrize(("stiffness", "inv_mass", "dt"), CASES)
def test_momenta_of_a_quadratic_have_the_variance_of_the_scheme(stiffness, inv_mass, dt):
    """T M (1 − (ω dt/2)²) where p and q are at the same time (Leimkuhler & Matthews 2013)."""
    q, p = oscillators(stiffness, inv_mass, dt, closure=True)
    frequency = math.sqrt(stiffness * inv_mass)
    assert p.var().item() == near(1.5 / inv_mass * (1 - (frequency * dt / 2) ** 2))
    correlation = (q * p).mean() / (q.std() * p.std())
    assert abs(correlation.item()) < 5 / math.sqrt(N)


def test_parameters_of_16_bits():
    q = nn.Parameter(torch.zeros(N, dtype=torch.bfloat16))
    optimizer = gti.optim.BAOAB([q], 0.5, temperature=1.5, inv_mass=1.0, seed=1)
    for _ in range(60):
        q.grad = q.detach().clone()
        optimizer.step()
    assert q.detach().double().var().item() == near(1.5)


def test_parameters_without_gradient_are_left_alone():
    params = [nn.Parameter(torch.ones(5, dtype=F64)) for _ in range(3)]
    optimizer = gti.optim.BAOAB(params, 0.1)
    (space,) = optimizer.phase_spaces
    for out in (0, 2, 1):
        for i, q in enumerate(params):
            q.grad = None if i == out else torch.ones_like(q)
        q0, p0 = ([x.detach().clone() for x in xs] for xs in (params, space.momenta))
        optimizer.step(loss=torch.tensor(0.0))
        for i, (q, p) in enumerate(zip(params, space.momenta)):
            assert torch.equal(q, q0[i]) == torch.equal(p, p0[i]) == (i == out)


def test_ornstein_uhlenbeck_step_is_exact_for_a_free_particle():
    """p after time t: mean e^{−γt} p₀, variance T M (1 − e^{−2γt}), in one step or in four."""
    for steps in (1, 4):
        q = nn.Parameter(torch.zeros(N, dtype=F64))
        optimizer = gti.optim.BAOAB(
            [q],
            2.0 / steps,
            temperature=0.5,
            friction=0.4,
            inv_mass=0.25,
            momentum=[torch.full((N,), 10.0, dtype=F64)],
        )
        for _ in range(steps):
            q.grad = torch.zeros_like(q)
            optimizer.step()
        p = optimizer.phase_spaces[0].momenta[0]
        assert p.mean().item() == pytest.approx(10 * math.exp(-0.8), abs=5 * math.sqrt(2.0 / N))
        assert p.var().item() == near(0.5 / 0.25 * (1 - math.exp(-1.6)))


def test_without_friction_it_is_the_leapfrog():
    ends = []
    for make in (
        lambda q, p: gti.optim.BAOAB([q], 0.1, friction=0.0, inv_mass=0.7, momentum=[p]),
        lambda q, p: gti.optim.Leapfrog([q], 0.1, inv_mass=0.7, momentum=[p]),
    ):
        q = nn.Parameter(torch.tensor([1.0, 2.0], dtype=F64))
        optimizer = make(q, torch.tensor([0.3, -0.2], dtype=F64))
        for _ in range(20):
            q.grad = q.detach().clone()
            optimizer.step()
        ends.append(q.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-13, atol=1e-14)


def test_at_temperature_zero_it_is_damped_and_comes_to_rest():
    q = nn.Parameter(torch.tensor([1.0, 2.0], dtype=F64))
    optimizer = gti.optim.BAOAB([q], 0.2, temperature=0.0, inv_mass=1.0)
    assert optimizer.phase_spaces[0].momenta[0].abs().max().item() == 0.0
    for _ in range(300):
        q.grad = q.detach().clone()
        optimizer.step()
    assert q.abs().max().item() < 1e-10


def test_initial_momenta_and_masses_by_element():
    mass = torch.linspace(1.0, 4.0, N, dtype=F64)
    q = nn.Parameter(torch.zeros(N, dtype=F64))
    optimizer = gti.optim.BAOAB([q], 0.3, temperature=2.0, inv_mass=[1.0 / mass], seed=5)
    scaled = optimizer.phase_spaces[0].momenta[0] / mass.sqrt()
    assert scaled.var().item() == near(2.0)
    for _ in range(60):
        q.grad = q.detach().clone()
        optimizer.step(loss=0.5 * q.detach().square().sum())
    assert q.var().item() == near(2.0)
    # K of the staggered momenta is T N/2 times about 1; L = T N/2.
    assert optimizer.energy().item() == pytest.approx(2.0 * N, rel=0.05)


def test_seeds_and_groups_draw_different_numbers():
    def momenta_after(seed):
        a, b = (nn.Parameter(torch.zeros(50)) for _ in range(2))
        optimizer = gti.optim.BAOAB([{"params": [a]}, {"params": [b]}], 0.1, seed=seed)
        for q in (a, b):
            q.grad = torch.zeros_like(q)
        optimizer.step()
        return [space.momenta[0].clone() for space in optimizer.phase_spaces]

    first, again, other = momenta_after(0), momenta_after(0), momenta_after(1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("copied", ["file", "deepcopy"])
def test_a_resumed_run_draws_the_same_noise(copied):
    def begin():
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        return model, gti.optim.BAOAB(model.parameters(), 0.1, temperature=0.1, seed=7)

    def advance(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()

    model, optimizer = begin()
    advance(model, optimizer, 3)
    if copied == "file":
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        saved = torch.load(file)
        model2, optimizer2 = begin()
        model2.load_state_dict(saved[0])
        optimizer2.load_state_dict(saved[1])
    else:
        model2, optimizer2 = copy.deepcopy((model, optimizer))
    advance(model, optimizer, 3)
    advance(model2, optimizer2, 3)
    for x, y in zip(model.parameters(), model2.parameters(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"temperature": -1.0}, ValueError, "temperature must be >= 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be finite"),
        ({"friction": -0.1}, ValueError, "friction must be >= 0"),
        ({"friction": None}, TypeError, "friction must be a float"),
        ({"dt": math.inf}, ValueError, "dt must be finite"),
        ({"inv_mass": 0.0}, ValueError, "inv_mass"),
        ({"inv_mass": [torch.zeros(3)]}, ValueError, "inv_mass"),
        ({"seed": "0"}, TypeError, "seed"),
    ],
)
def test_bad_arguments(options, error, words):
    with pytest.raises(error, match=words):
        gti.optim.BAOAB(**{"params": [nn.Parameter(torch.zeros(3))], "dt": 0.1, **options})


def test_bad_steps_touch_nothing():
    q = nn.Parameter(torch.ones(3))
    optimizer = gti.optim.BAOAB([q], 0.1)
    p = optimizer.phase_spaces[0].momenta[0].clone()
    q.grad = torch.ones(3)
    optimizer.param_groups[0]["temperature"] = -1.0
    with pytest.raises(ValueError, match="temperature"):
        optimizer.step()
    optimizer.param_groups[0]["temperature"] = 1.0
    with pytest.raises(ValueError, match="got both"):
        optimizer.step(lambda: q.sum(), loss=1.0)
    assert torch.equal(q.detach(), torch.ones(3))
    assert torch.equal(optimizer.phase_spaces[0].momenta[0], p)


def test_a_state_saved_before_the_first_step_has_the_noise_of_its_seed():
    def make(seed):
        q = nn.Parameter(torch.ones(3, dtype=torch.float64))
        return q, gti.optim.BAOAB([q], 0.1, seed=seed)

    (q, saved), (other, loaded) = make(1), make(2)
    loaded.load_state_dict(saved.state_dict())
    for x, optimizer in ((q, saved), (other, loaded)):
        x.grad = torch.ones_like(x)
        optimizer.step()
    assert torch.equal(q, other)
