"""The regimes of batch normalisation, what a probe gives back, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from probe_systems import Quadratic, cnn, cnn_system, images, quadratic_system, value
from torch import Tensor, nn

import gti_kernels as gti
from gti_kernels.probes.dose_response import dose_response
from gti_kernels.probes.energy_drift import energy_drift
from gti_kernels.probes.hamiltonian_system import HamiltonianSystem
from gti_kernels.probes.omega_invariance import omega_invariance
from gti_kernels.probes.round_trip import round_trip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models here are so small that more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the regimes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "group", "frozen"])
def test_a_force_with_a_potential_passes(norm):
    system = cnn_system(norm)
    trip, omega = round_trip(system, 0.05, 5), omega_invariance(system, 0.05, 3, pairs=2)
    assert trip.state < 1e-6 and trip.energy < 1e-6 and trip.buffers == 0.0
    assert trip.reach > 1e-3
    assert omega.epsilon < 10 * omega.floor < 1e-12


def test_batch_statistics_leave_buffers_and_inference_energy_off():
    system = cnn_system("batch")
    trip, omega = round_trip(system, 0.05, 5), omega_invariance(system, 0.05, 3, pairs=2)
    assert trip.state < 1e-6 and omega.epsilon < 1e-12
    assert trip.buffers > 1e-3 and trip.energy > 1e-5


def test_running_statistics_break_round_trip_and_two_form_with_the_dose():
    momenta = (0.0, 0.001, 0.01, 0.1)
    model = cnn("running")
    for layer in (layers := [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]):
        layer.momentum = 0.2
    doses = dose_response(
        model, F.cross_entropy, images(), momenta=momenta, dt=0.05, steps=3, pairs=2
    )
    for response in ("state", "epsilon", "buffers"):
        values = [getattr(dose, response) for dose in doses]
        assert values == sorted(values) and values[-1] > 10 * values[1], response
    assert doses[0].state < 1e-6 and doses[0].epsilon < 1e-12 and doses[0].buffers == 0.0
    assert doses[1].state > 1e-5 and doses[1].epsilon > 1e-9
    assert [layer.momentum for layer in layers] == [0.2] * 3
    with pytest.raises(ValueError, match="BatchNorm"):
        dose_response(cnn("group"), F.cross_entropy, images())


def test_frozen_calibrates_without_touching_the_model():
    system = cnn_system("frozen")
    with system.session():
        z = system.start()
    x = torch.stack([system.model.features[0](x) for x, _ in system.batches])
    name = "features.1.running_mean"
    expected = x.mean((0, 1, 3, 4)).detach()
    torch.testing.assert_close(z.b[name], expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(dict(system.model.named_buffers())[name], expected, rtol=1e-3)


class Often(nn.Module):
    """A BatchNorm layer that a forward pass applies `times` times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.times = nn.Linear(3, 4), nn.BatchNorm1d(4), times

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(self.times):
            x = self.norm(x).sin()
        return x


@pytest.mark.parametrize("times", [0, 2])
def test_running_refuses_a_layer_that_is_not_applied_once(times):
    batches = [(torch.randn(5, 3), torch.randn(5, 4))]
    system = HamiltonianSystem(Often(times), F.mse_loss, batches, regime="running")
    for probe in PROBES.values():
        with pytest.raises(ValueError, match=f"model: .*once.*'norm' applied {times} times"):
            probe(system)


def test_frozen_takes_the_mean_over_all_applications():
    x = torch.randn(5, 3)
    system = HamiltonianSystem(Often(2), F.mse_loss, [(x, torch.randn(5, 4))], regime="frozen")
    with system.session():
        z = system.start()
    one = system.model.first(x)
    two = F.batch_norm(one, None, None, training=True).sin()
    for name, expected in {
        "norm.running_mean": (one.mean(0) + two.mean(0)) / 2,
        "norm.running_var": (one.var(0) + two.var(0)) / 2,
    }.items():
        torch.testing.assert_close(z.b[name], expected)


# --- what is given back ---------------------------------------------------------------------------


class Busy(nn.Module):
    """Batch normalisation, dropout, a frozen weight, and a submodule in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.4)
        self.head = nn.Linear(5, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.norm(self.first(x)))))


def busy_model() -> nn.Module:
    model = Busy().train()
    model.norm.eval()
    model.first.weight.grad = torch.full_like(model.first.weight, 7.0)
    return model


def busy_batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(3)]


def fingerprint(model: nn.Module) -> dict:
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "grads": {
            k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()
        },
        "requires": {k: p.requires_grad for k, p in model.named_parameters()},
        "objects": {k: id(p) for k, p in model.named_parameters()},
        "training": {k: m.training for k, m in model.named_modules()},
        "hooks": {k: len(m._forward_hooks) for k, m in model.named_modules()},
        "random": torch.get_rng_state(),
    }


def assert_same(after: dict, before: dict) -> None:
    for key in before:
        if key == "random":
            assert torch.equal(after[key], before[key])
            continue
        assert after[key].keys() == before[key].keys()
        for name, old in before[key].items():
            new = after[key][name]
            same = torch.equal(new, old) if isinstance(old, Tensor) else new == old
            assert same, (key, name)


PROBES = {
    "round_trip": lambda s: round_trip(s, 0.05, 2),
    "omega_jvp": lambda s: omega_invariance(s, 0.05, 2, pairs=1),
    "omega_fd": lambda s: omega_invariance(s, 0.05, 1, pairs=1, tangents="fd"),
    "energy_drift": lambda s: energy_drift(s, (0.05, 0.1), 5),
}


@pytest.mark.parametrize("regime", ["batch", "running", "frozen"])
@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("stop", [None, RuntimeError, KeyboardInterrupt])
def test_everything_is_as_before(probe, regime, stop):
    model, batches, calls = busy_model(), busy_batches(), 0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if stop is not None and calls == 4:
            raise stop("in the middle")
        return F.cross_entropy(output, target)

    before = fingerprint(model)
    system = HamiltonianSystem(model, loss, batches, regime=regime)
    if stop is None:
        PROBES[probe](system)
    else:
        with pytest.raises(stop, match="in the middle"):
            PROBES[probe](system)
    assert_same(fingerprint(model), before)


def test_dropout_draws_the_same_mask_on_the_way_back():
    system = HamiltonianSystem(busy_model(), F.cross_entropy, busy_batches(), regime="frozen")
    assert round_trip(system, 0.05, 5).state < 1e-6
    assert omega_invariance(system, 0.05, 3, pairs=2).epsilon < 1e-12
    with system.session():
        z = system.start()
        first, again, other = (system.gradient(z, t)[0] for t in (0, 0, 3))  # 3 is batch 0, too
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("regime", ["batch", "running", "frozen"])
def test_probes_leave_inference_mode(regime):
    system = HamiltonianSystem(busy_model(), F.cross_entropy, busy_batches(), regime=regime)

    def measure() -> list:
        dq, dp = gti.darboux_pairs(system, 1)
        pushed = gti.push_tangents(system, [2.0 * x for x in dq], dp, 0.05, 2)
        numbers = [astuple(probe(system))[:-1] for probe in PROBES.values()]  # without seconds
        return [*numbers, *(x.sum().item() for x in pushed.dq + pushed.dp)]

    expected = measure()
    with torch.inference_mode():
        assert measure() == expected and torch.is_inference_mode_enabled()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": 3}, TypeError, "model"),
        ({"loss_fn": None}, TypeError, "loss_fn"),
        ({"batches": []}, ValueError, "batches"),
        ({"batches": [torch.zeros(2)]}, ValueError, "batches"),
        ({"inv_mass": "fan_out"}, ValueError, "inv_mass"),
        ({"inv_mass": [1.0, 2.0]}, ValueError, "inv_mass: expected 1 numbers"),
        ({"inv_mass": [-1.0]}, ValueError, r"inv_mass\[0\]"),
        ({"damping": -0.1}, ValueError, "damping"),
        ({"damping": math.nan}, ValueError, "damping"),
        ({"regime": "eval"}, ValueError, "regime"),
        ({"temperature": -1.0}, ValueError, "temperature"),
    ],
)
def test_system_refuses(change, error, words):
    model = Quadratic(torch.ones(2))
    arguments = {"model": model, "loss_fn": value, "batches": [(torch.eye(2), torch.zeros(()))]}
    with pytest.raises(error, match=words):
        HamiltonianSystem(**{**arguments, **change})


def test_system_refuses_a_model_without_trainable_parameters():
    model = Quadratic(torch.ones(2)).requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad_"):
        HamiltonianSystem(model, value, [(torch.eye(2), torch.zeros(()))])


def test_probes_refuse():
    system = quadratic_system()
    for dt in (0.0, math.inf, "0.1"):
        with pytest.raises((TypeError, ValueError), match="dt"):
            round_trip(system, dt, 3)
    with pytest.raises(ValueError, match="steps"):
        round_trip(system, 0.1, 0)
    with pytest.raises(ValueError, match="pairs: expected at most N = 5"):
        omega_invariance(system, 0.1, 1, pairs=6)
    with pytest.raises(ValueError, match="tangents"):
        omega_invariance(system, 0.1, 1, tangents="exact")
    for dt in (0.1, -0.1):
        with pytest.raises(
            ValueError, match=r"damping \* steps \* \|dt\| <= 709.*20 \* 400 \* 0.1"
        ):
            omega_invariance(quadratic_system(damping=20.0), dt, 400)
    with pytest.raises(ValueError, match="dts"):
        energy_drift(system, (), 10)
    with pytest.raises(ValueError, match=r"dts\[1\]"):
        energy_drift(system, (0.1, -0.1), 10)
    with pytest.raises(ValueError, match="steps"):
        energy_drift(system, (0.1,), 4)
    with pytest.raises(ValueError, match="loss_fn: expected a scalar"):
        round_trip(HamiltonianSystem(Busy(), lambda out, y: out, busy_batches()), 0.1, 1)


def test_step_sizes_may_be_an_array():
    for dts in (np.array([0.1, 0.2]), iter((0.1, 0.2))):
        assert energy_drift(quadratic_system(), dts, 5).dts == (0.1, 0.2)
    with pytest.raises(ValueError, match="dts: expected at least one"):
        energy_drift(quadratic_system(), np.array([]), 5)
    with pytest.raises(TypeError, match="dts: expected a sequence of step sizes, got float"):
        energy_drift(quadratic_system(), 0.1, 5)


@pytest.mark.parametrize(
    "probe",
    [
        *PROBES.values(),
        lambda s: gti.push_tangents(s, torch.ones(1, 2), torch.ones(1, 2), 0.1, 1),
        lambda s: gti.darboux_pairs(s, 1),
    ],
)
def test_probes_refuse_what_is_no_system(probe):
    with pytest.raises(TypeError, match="system: expected a HamiltonianSystem, got Quadratic"):
        probe(Quadratic(torch.ones(2)))


def test_system_refuses_complex_parameters():
    with pytest.raises(TypeError, match="model: expected float parameters, got .*complex64 in 'w'"):
        HamiltonianSystem(
            Quadratic(torch.ones(2, dtype=torch.complex64)), value, [(torch.eye(2), 0)]
        )


def test_dose_response_refuses_before_it_measures():
    for m in (math.nan, "0.1"):
        with pytest.raises((TypeError, ValueError), match=r"momenta\[1\]"):
            dose_response(
                cnn("running"), F.cross_entropy, images(), momenta=(0.1, m), on_measure=pytest.fail
            )


def test_sharded_parameters_are_refused_with_words():
    system = quadratic_system()
    system.q[0].full_tensor = lambda: None
    with pytest.raises(TypeError, match="DTensor"):
        omega_invariance(system, 0.1, 1, pairs=1)


def test_divergence_is_reported_and_not_raised():
    result = round_trip(quadratic_system(), dt=1e200, steps=3)
    assert not result.state < 1.0
