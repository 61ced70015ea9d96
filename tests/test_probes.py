"""The step map, its tangents and the drift, against closed forms and dense Jacobians."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from probe_systems import Quadratic, cnn_system, quadratic_system, reference_step, value
from torch import Tensor, nn

from gti_kernels.probes import energy_drift as energy_drift_module
from gti_kernels.probes import tangent_map
from gti_kernels.probes.energy_drift import energy_drift
from gti_kernels.probes.hamiltonian_system import HamiltonianSystem, State, fan_in_inverse_mass
from gti_kernels.probes.intervals import mean_interval, slope_interval
from gti_kernels.probes.omega_invariance import omega_invariance
from gti_kernels.probes.round_trip import round_trip
from gti_kernels.probes.tangent_map import Differentiator, push_step


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models here are so small that more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the step map ---------------------------------------------------------------------------------


def test_one_step_is_damp_kick_drift_kick_damp():
    system = quadratic_system(damping=0.3)
    z = system.start()
    q, p, dt = z.q[0].clone(), z.p[0].clone(), 0.1
    a, c = system.batches[2][0], math.exp(-0.3 * 0.1 / 2)
    p = c * p - dt / 2 * a @ q
    q = q + dt * 0.5 * p
    p = c * (p - dt / 2 * a @ q)
    with system.session():
        system.step(z, 2, dt)
    torch.testing.assert_close(z.q[0], q, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(z.p[0], p, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_round_trip_of_a_quadratic_is_rounding(damping):
    result = round_trip(quadratic_system(damping=damping), dt=0.2, steps=20)
    assert result.reach > 0.3  # it went somewhere
    assert result.state < 3 * result.state_floor < 1e-14
    assert result.energy < 1e-14 and result.buffers == 0.0 and result.buffers_floor == 0.0


def test_both_half_kicks_of_a_step_use_its_own_batch():
    """With the next step's batch in the second half kick the way back would take another path."""
    system = quadratic_system(batches=4)
    z, start = system.start(), system.start()
    with system.session():
        system.step(z, 1, 0.2)
        system.step(z, 1, -0.2)
        same = float((z.q[0] - start.q[0]).norm())
        system.step(z, 1, 0.2)
        system.step(z, 2, -0.2)
    assert same < 1e-15 < 1e-3 < float((z.q[0] - start.q[0]).norm())


def test_order_two():
    """Harmonic oscillator q'' = −q: the error at a fixed time falls as dt²."""
    model = Quadratic(torch.ones(1, dtype=torch.float64))
    eye = torch.eye(1, dtype=torch.float64)
    system = HamiltonianSystem(model, value, [(eye, eye)], inv_mass=1.0, temperature=0.0)
    errors, dts = [], [0.1, 0.05, 0.025, 0.0125]
    for dt in dts:
        z = system.start()
        with system.session():
            for t in range(round(2.0 / dt)):
                system.step(z, t, dt)
        errors.append(abs(float(z.q[0]) - math.cos(2.0)))
    slope, _ = slope_interval(np.log(dts), np.log(errors))
    assert slope == pytest.approx(2.0, abs=0.1)


def test_mass_and_time_scale_together():
    """(M, dt, p) → (cM, √c dt, √c p) leaves every q as it is; momenta at a temperature scale so."""
    ends = []
    for inv_mass, dt in ((1.0, 0.1), (0.25, 0.2)):
        system = quadratic_system(inv_mass=inv_mass)
        z = system.start()
        with system.session():
            for t in range(7):
                system.step(z, t, dt)
        ends.append(z.q[0])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-13, atol=1e-14)


def test_fan_in_mass():
    assert fan_in_inverse_mass(torch.zeros(7, 4)) == 0.5
    assert fan_in_inverse_mass(torch.zeros(8, 16, 3, 3)) == 0.125  # 1/12 is clipped
    assert fan_in_inverse_mass(torch.zeros(100)) == 1.0


@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
def test_updated_statistics_are_those_of_a_train_mode_pass(momentum):
    system = cnn_system("running")
    for layer in system.layers.values():
        layer.momentum = momentum
    with system.session():
        z = system.start()
        system.update_statistics(z, 1)
    reference = copy.deepcopy(system.model).train()
    reference(system.batches[1][0])
    for name, b in reference.named_buffers():
        torch.testing.assert_close(z.b[name], b, rtol=1e-5, atol=1e-6, msg=name)


# --- tangents and the 2-form ----------------------------------------------------------------------


@pytest.mark.parametrize("regime", ["batch", "running", "frozen"])
def test_pushed_tangents_are_the_dense_jacobian(regime):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)
    ).double()
    x, y = torch.randn(9, 3).double(), torch.randn(9, 2).double()
    system = HamiltonianSystem(
        model, F.mse_loss, [(x, y)], inv_mass=1.0, regime=regime, temperature=0.1
    )
    dt, names = 0.2, ["1.running_mean", "1.running_var"]
    with system.session():
        z = system.start()
        flat = torch.cat([v.flatten() for v in [*z.q, *z.p, *(z.b[k] for k in names)]])
        frozen = (z.b[names[0]].clone(), z.b[names[1]].clone())
        jacobian = torch.autograd.functional.jacobian(
            lambda v: reference_step(v, frozen, x, y, dt, regime), flat
        )
        m = flat.numel() if regime == "running" else flat.numel() - 8  # b is no variable elsewhere
        columns = torch.eye(m, flat.numel(), dtype=torch.float64)
        sizes = [v.numel() for v in [*z.q, *z.p]] + [4, 4]
        parts = columns.split(sizes, dim=1)
        shaped = [s.reshape(m, *v.shape).clone() for s, v in zip(parts, [*z.q, *z.p])]
        db = dict(zip(names, (s.clone() for s in parts[-2:]))) if regime == "running" else {}
        tangents = State(shaped[: len(z.q)], shaped[len(z.q) :], db)
        push_step(system, z, tangents, 0, dt, Differentiator(5))
    pushed = torch.cat([t.flatten(1) for t in [*tangents.q, *tangents.p, *db_of(tangents)]], 1)
    expected = jacobian.T[:m, : pushed.shape[1]]
    torch.testing.assert_close(pushed, expected, rtol=1e-12, atol=1e-12)
    state = torch.cat([v.flatten() for v in [*z.q, *z.p]])
    n = state.numel()
    moved = reference_step(flat.requires_grad_(), frozen, x, y, dt, regime)[:n]
    torch.testing.assert_close(state, moved.detach(), rtol=1e-12, atol=1e-12)


def db_of(tangents: State) -> list[Tensor]:
    return list(tangents.b.values())


def test_differential_without_vmap_is_the_same(monkeypatch):
    system = cnn_system("running")
    batched = omega_invariance(system, 0.05, 2, pairs=2)

    def refuse(*_args, **_options):
        raise RuntimeError("vmap: not possible")

    monkeypatch.setattr(tangent_map, "vmap", refuse)
    looped = omega_invariance(system, 0.05, 2, pairs=2)
    assert looped.epsilon == pytest.approx(batched.epsilon, rel=1e-9)
    assert looped.epsilon > 1e-8


class Attention(nn.Module):
    """Integer inputs, attention, a channels-last weight, an unused parameter, a float target."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embedding = nn.Embedding(7, 4)
        self.mix = nn.Conv2d(1, 3, 3, padding=1).to(memory_format=torch.channels_last)
        self.unused = nn.Parameter(torch.ones(2, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).unsqueeze(1)
        q, k, v = self.mix(x).unsqueeze(2).unbind(1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1).mean(1)


def test_models_of_other_kinds():
    batches = [(torch.randint(0, 7, (6, 5)), torch.randn(6, 4)) for _ in range(2)]
    # A named backend does not fall back: layouts that differ would be refused.
    system = HamiltonianSystem(Attention(), F.mse_loss, batches, backend="reference")
    exact = omega_invariance(system, 0.1, 2, pairs=2)
    assert exact.epsilon < 10 * exact.floor < 1e-12
    assert omega_invariance(system, 0.1, 2, pairs=2, tangents="fd").epsilon < 1e-8
    assert round_trip(system, 0.1, 3).state < 1e-6
    with system.session():
        z = system.start()
        system.step(z, 0, 0.1)
        for q, p, g, live in zip(z.q, z.p, system.gradient(z, 1), system.q):
            assert q.stride() == p.stride() == g.stride() == live.stride()


@pytest.mark.parametrize("damping", [0.0, 0.8])
def test_a_quadratic_keeps_the_two_form(damping):
    """With damping Ω shrinks by e^{−γ K dt} = 0.2; the factor is taken out."""
    result = omega_invariance(quadratic_system(damping=damping), dt=0.2, steps=10, pairs=3)
    assert result.epsilon <= 10 * result.floor < 1e-12


def test_exact_and_difference_tangents_agree():
    system = cnn_system("running", temperature=1e-3)
    exact = omega_invariance(system, 0.05, 3, pairs=2)
    differences = omega_invariance(system, 0.05, 3, pairs=2, tangents="fd")
    assert exact.epsilon > 1e-7
    assert differences.epsilon == pytest.approx(exact.epsilon, rel=1e-2)
    quadratic = omega_invariance(quadratic_system(), 0.1, 3, pairs=2, tangents="fd")
    assert quadratic.epsilon < quadratic.floor < 1e-6


def test_repeated_draws_give_an_interval():
    result = omega_invariance(cnn_system("running"), 0.05, 1, pairs=1, draws=3)
    assert len(set(result.values)) == 3
    low, high = result.interval
    assert low < result.epsilon < high
    assert result.interval == pytest.approx(mean_interval(result.values))


# --- energy drift ---------------------------------------------------------------------------------


def test_slope_and_interval_on_known_data():
    assert slope_interval([0, 1, 2, 3], [1, 4, 7, 10])[0] == pytest.approx(3.0)
    # Residuals ±0.1 about y = 2x: s² = 0.04/2, stderr = s/√5; t_{0.975} of 2 degrees is 4.30265.
    slope, (low, high) = slope_interval([0, 1, 2, 3], [0.1, 1.9, 3.9, 6.1])
    half = 4.30265272991 * math.sqrt(0.04 / 2 / 5)
    assert (slope, low, high) == pytest.approx((2.0, 2.0 - half, 2.0 + half))
    assert slope_interval([0, 1], [0, 5]) == (pytest.approx(5.0), None)
    assert math.isnan(slope_interval([1.0], [1.0])[0])


def test_mean_interval_on_known_data():
    # Mean 2, standard error √(1/3), t_{0.975} of 2 degrees is 4.30265.
    half = 4.30265272991 / math.sqrt(3)
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0 - half, 2.0 + half))
    assert mean_interval([1.0]) is None


def test_drift_and_offset_look_at_the_last_fifth(monkeypatch):
    energies = [4.0, 9.0, -3.0, 5.0, 2.0, 7.0, 1.0, 8.0, 5.0, 5.5, 5.25]  # T = 10
    monkeypatch.setattr(energy_drift_module, "_energies", lambda *_: energies)
    result = energy_drift(quadratic_system(), (0.1,), 10)
    assert result.drift == (pytest.approx((0.5 + 0.25) / 2),)  # t = 8 and 9
    assert result.offset == (pytest.approx((5.5 + 5.25) / 2 - 4.0),)
    assert result.energy == 4.0 and math.isnan(result.slope)


def test_drift_of_a_fixed_potential_has_slope_three():
    """H_{t+1} − H_t = −dt² (G_{t+1} − G_t): third order, on nearly the same arc."""
    result = energy_drift(quadratic_system(batches=1), dts=(1e-3, 2e-3, 4e-3), steps=5)
    assert result.slope == pytest.approx(3.0, abs=0.1)
    low, high = result.slope_interval
    assert low < result.slope < high
    assert all(d > result.floor for d in result.drift)


def test_changing_batches_are_seen_in_the_drift():
    dts = (0.002, 0.004, 0.008)
    fixed, changing = (energy_drift(quadratic_system(batches=b), dts, 10) for b in (1, 3))
    assert changing.slope == pytest.approx(1.0, abs=0.2)
    assert changing.drift[0] > 100 * fixed.drift[0]


def test_dt_zero_is_bracketed_and_bisected(monkeypatch):
    def energies(_system, dt, steps):
        return [1.0] + [1.0 + math.log(dt / 0.03)] * steps

    monkeypatch.setattr(energy_drift_module, "_energies", energies)
    system = quadratic_system()
    assert energy_drift(system, (0.01, 0.02, 0.1), 10).dt_zero == pytest.approx(0.03, rel=0.01)
    assert energy_drift(system, (0.01, 0.02), 10).dt_zero is None


def test_a_decay_beyond_fp64_is_refused_on_the_way_back():
    system = quadratic_system(damping=20.0)
    with pytest.raises(ValueError, match="dt: expected damping.* at most 709 .* dt = -100"):
        round_trip(system, 100.0, 2)
    assert system.decay(100.0) == 0.0
