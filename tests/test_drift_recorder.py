"""gti.DriftRecorder: energies of any optimizer, the drift and its slope."""

from __future__ import annotations

import math
from statistics import median

import pytest
import torch
from torch import nn

import gti_kernels as gti
from gti_kernels.optim import drift_recorder

F64 = torch.float64


def train(make, dt, steps=40, every=1):
    """A small regression on one batch in fp64; the recorder of the run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).to(F64)
    x, y = torch.randn(16, 3, dtype=F64), torch.randn(16, 1, dtype=F64)
    optimizer = make(model.parameters(), dt)
    recorder = gti.DriftRecorder(optimizer, every)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        recorder.record(loss)
        losses.append(loss.item())
    return recorder, losses


OPTIMIZERS = {
    "AdamW": lambda params, dt: torch.optim.AdamW(params, lr=dt),
    "SGD with momentum": lambda params, dt: torch.optim.SGD(params, lr=dt, momentum=0.9),
    "Euler": lambda params, dt: torch.optim.SGD(params, lr=dt),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_baselines_record_the_loss(name):
    recorder, losses = train(OPTIMIZERS[name], 0.01)
    assert recorder.losses == recorder.energies == losses
    tail = [abs(losses[t + 1] - losses[t]) for t in range(int(0.8 * 39), 39)]
    assert recorder.drift() == pytest.approx(median(tail), rel=1e-12)


def test_leapfrog_records_its_hamiltonian():
    recorder, losses = train(gti.optim.Leapfrog, 0.02)
    assert recorder.losses == losses
    assert recorder.energies[-1] == recorder.optimizer.energy(torch.tensor(losses[-1], dtype=F64))
    spread = max(recorder.energies[2:]) - min(recorder.energies[2:])
    assert spread < 0.02 * (max(losses) - min(losses))  # H stays while L falls


def test_energy_of_a_step_with_closure_is_that_of_its_end():
    """Record what step(closure) returns, the loss at its beginning: D is dt³ all the same."""
    drifts = []
    for dt in (0.1, 0.05):
        q = nn.Parameter(torch.tensor([1.0, 0.5], dtype=F64))
        optimizer = gti.optim.Leapfrog([q], dt, inv_mass=1.0)
        recorder = gti.DriftRecorder(optimizer)

        def closure(q=q, optimizer=optimizer):
            optimizer.zero_grad()
            loss = 0.25 * q.pow(4).sum()
            loss.backward()
            return loss

        for _ in range(round(4 / dt)):
            recorder.record(optimizer.step(closure))
        assert max(abs(h - recorder.energies[0]) for h in recorder.energies) < 0.2 * dt**2
        drifts.append(recorder.drift())
    assert math.log2(drifts[0] / drifts[1]) == pytest.approx(3, abs=0.3)


def test_slopes():
    """|H_{t+1} − H_t| is dt³ for the leapfrog (dt² G is conserved with H), dt for gradient descent
    from one place."""
    dts = (0.005, 0.01, 0.02)
    steps = [round(0.4 / dt) for dt in dts]  # the same time for each dt
    leapfrog, euler = (
        gti.drift_slope(dts, [train(make, dt, n)[0].drift() for dt, n in zip(dts, steps)])
        for make in (gti.optim.Leapfrog, OPTIMIZERS["Euler"])
    )
    assert leapfrog[0] == pytest.approx(3.0, abs=0.3)
    assert euler[0] == pytest.approx(1.0, abs=0.1)
    assert leapfrog[1][0] < leapfrog[0] < leapfrog[1][1]


def test_slope_leaves_out_what_is_no_measurement():
    assert gti.drift_slope((1.0, 10.0, 100.0), (0.0, 10.0, 1000.0))[0] == pytest.approx(2.0)
    assert gti.drift_slope((1.0, 10.0, 100.0), (math.inf, 10.0, 1000.0))[0] == pytest.approx(2.0)
    assert gti.drift_slope((1.0, 10.0, 100.0), (0.5, 10.0, 1000.0), 1.0)[0] == pytest.approx(2.0)
    assert math.isnan(gti.drift_slope((1.0, 10.0), (math.nan, 1.0))[0])


def test_every():
    all_of_it, _ = train(OPTIMIZERS["Euler"], 0.01)
    some, _ = train(OPTIMIZERS["Euler"], 0.01, every=4)
    assert some.energies == all_of_it.energies[::4]


def test_more_records_than_the_device_holds(monkeypatch):
    monkeypatch.setattr(drift_recorder, "_CAPACITY", 8)
    recorder, losses = train(OPTIMIZERS["Euler"], 0.01, steps=21)
    assert recorder.losses == losses
    recorder.record(torch.tensor(1.0))
    assert recorder.losses == [*losses, 1.0]


def test_a_record_does_not_wait_for_the_device_or_keep_the_graph(monkeypatch):
    q = nn.Parameter(torch.ones(3))
    recorder = gti.DriftRecorder(torch.optim.SGD([q], lr=0.1))
    for name in ("item", "tolist", "__float__", "__bool__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a host sync"))
    loss = q.square().sum()
    recorder.record(loss)
    with torch.no_grad():
        loss.zero_()  # a loss that is overwritten later
    monkeypatch.undo()
    assert recorder.losses == [3.0]


def test_nan_in_the_tail_is_nan_and_few_records_are_refused():
    recorder = gti.DriftRecorder(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    for loss in range(5):
        recorder.record(torch.tensor(float(loss)))
    with pytest.raises(ValueError, match="at least 6"):
        recorder.drift()
    recorder.record(torch.tensor(math.nan))
    assert math.isnan(recorder.drift())


def test_bad_arguments():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(TypeError, match="optimizer"):
        gti.DriftRecorder([torch.ones(1)])
    with pytest.raises(ValueError, match="every"):
        gti.DriftRecorder(optimizer, every=0)
    with pytest.raises(TypeError, match="loss"):
        gti.DriftRecorder(optimizer).record(1.0)
    with pytest.raises(TypeError, match="loss"):
        gti.DriftRecorder(optimizer).record(torch.ones(2))
