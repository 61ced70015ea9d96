"""One evaluation of the force where two half kicks ask for the same one, and never elsewhere."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gti_kernels as gti
from gti_kernels.probes import tangent_map
from gti_kernels.probes.hamiltonian_system import HamiltonianSystem
from gti_kernels.probes.last_force import LastForce

STEPS = 3


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models here are so small that more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Counting(nn.Module):
    """Hidden state of the model's own: each evaluation changes what the next one gives."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1.0)
        return x * (1.0 + 0.1 * self.calls)


#: kind of model → its layer, its regime
KINDS = {
    "pure": (nn.Tanh, "batch"),
    "group": (lambda: nn.GroupNorm(2, 4), "batch"),
    "batch": (lambda: nn.BatchNorm1d(4), "batch"),
    "running": (lambda: nn.BatchNorm1d(4), "running"),
    "frozen": (lambda: nn.BatchNorm1d(4), "frozen"),
    "without layers": (nn.Tanh, "running"),
    "dropout": (lambda: nn.Dropout(0.4), "batch"),
    "counting": (Counting, "batch"),
}


def system(kind: str, batches: int) -> HamiltonianSystem:
    layer, regime = KINDS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), layer(), nn.Tanh(), nn.Linear(4, 2))
    data = [(torch.randn(9, 3), torch.randn(9, 2)) for _ in range(batches)]
    return HamiltonianSystem(model, F.mse_loss, data, regime=regime, temperature=0.1, damping=0.3)


def counted(monkeypatch, owner, name: str) -> list[int]:
    """[number of calls] of a function that is called as before."""
    count, function = [0], getattr(owner, name)

    def wrapper(*args):
        count[0] += 1
        return function(*args)

    monkeypatch.setattr(owner, name, wrapper)
    return count


def never_shared(monkeypatch) -> None:
    def evaluated(_self, _inputs, _batch, _seed, evaluate):
        return evaluate()

    monkeypatch.setattr(LastForce, "__call__", evaluated)


def walk(kind: str, batches: int, exact: bool) -> list[Tensor]:
    """Every tensor of the state after each step."""
    it = system(kind, batches)
    with it.session():
        z = it.start()
        grid = it.grid(z) if exact else None
        trail = []
        for t in range(STEPS):
            it.step(z, t, 0.2, grid)
            trail += [x.clone() for x in [*z.q, *z.p, *z.b.values()]]
    return trail


def push(kind: str, batches: int) -> list[Tensor]:
    it = system(kind, batches)
    pushed = gti.push_tangents(it, *gti.darboux_pairs(it, 2), 0.2, STEPS)
    return pushed.dq + pushed.dp


def assert_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# What a step's second evaluation would do beside its value: BatchNorm and the counting layer write
# buffers, dropout draws anew, "running" has updated the statistics.
SHARED_IN_WALKS = {"pure", "group", "frozen", "without layers"}
# Pushing tangents writes no running statistics in the regime "batch", which does not read them.
SHARED_BY_TANGENTS = SHARED_IN_WALKS | {"batch"}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_walk_has_the_bits_of_one_that_shares_nothing(monkeypatch, kind, batches, exact):
    count = counted(monkeypatch, HamiltonianSystem, "gradient")
    got = walk(kind, batches, exact)
    shared = kind in SHARED_IN_WALKS and batches == 1
    assert count == [STEPS + 1 if shared else 2 * STEPS]
    never_shared(monkeypatch)
    assert_same_bits(got, walk(kind, batches, exact))


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "counting"])
def test_tangents_have_the_bits_of_those_that_share_nothing(monkeypatch, kind, batches):
    count = counted(monkeypatch, tangent_map, "force")
    got = push(kind, batches)
    shared = kind in SHARED_BY_TANGENTS and batches == 1
    assert count == [STEPS + 1 if shared else 2 * STEPS]
    never_shared(monkeypatch)
    assert_same_bits(got, push(kind, batches))


@pytest.mark.parametrize(
    ("kind", "batches", "gradients"),
    [
        ("pure", 1, 2 * STEPS + 1),
        ("pure", 2, 4 * STEPS - 1),  # the last step's second half kick, on the way out and back
        ("dropout", 1, 4 * STEPS - 1),  # there the step is the same, and its random draw, too
        ("batch", 1, 4 * STEPS),
        ("running", 1, 4 * STEPS),
    ],
)
def test_a_round_trip_is_the_same_with_fewer_gradients(monkeypatch, kind, batches, gradients):
    count = counted(monkeypatch, HamiltonianSystem, "gradient")

    def values() -> dict[str, float]:
        return {**asdict(gti.round_trip(system(kind, batches), 0.2, STEPS)), "seconds": 0.0}

    got = values()
    assert count == [gradients]
    never_shared(monkeypatch)
    assert got == values()


def test_energies_between_the_steps_change_nothing(monkeypatch):
    count = counted(monkeypatch, HamiltonianSystem, "gradient")
    got = gti.energy_drift(system("dropout", 1), (0.1, 0.2), 5)
    assert count == [20]
    assert gti.energy_drift(system("pure", 1), (0.1, 0.2), 5).drift[0] > 0
    assert count == [20 + 12]
    never_shared(monkeypatch)
    assert got.drift == gti.energy_drift(system("dropout", 1), (0.1, 0.2), 5).drift


def test_the_same_tuple_again_is_the_same_batch(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    batch, other = ((torch.randn(9, 3), torch.randn(9, 2)) for _ in range(2))
    count = counted(monkeypatch, HamiltonianSystem, "gradient")

    def steps(batches) -> list[Tensor]:
        it = HamiltonianSystem(model, F.mse_loss, batches, temperature=0.1)
        with it.session():
            z = it.start()
            for t in range(4):
                it.step(z, t, 0.2)
        return [*z.q, *z.p]

    one = steps([batch])
    assert count == [5]
    assert_same_bits(steps(batch for _ in range(3)), one)
    assert count == [10]
    steps([batch, batch, other])  # two gradients where the batch is new
    assert count == [10 + 2 + 1 + 2 + 2]
    reused = [torch.zeros(9, 3), torch.zeros(9, 2)]  # a list whose tensors are replaced

    def loader():
        for x, y in (batch, other):
            reused[:] = x, y
            yield reused

    assert_same_bits(steps(loader()), steps([batch, other]))


def test_central_differences_share_too(monkeypatch):
    def differences() -> list[Tensor]:
        it = system("pure", 1)
        pushed = gti.push_tangents(it, *gti.darboux_pairs(it, 1), 0.2, STEPS, "fd")
        return pushed.dq + pushed.dp

    got = differences()
    never_shared(monkeypatch)
    assert_same_bits(got, differences())


def test_what_makes_a_force_another_one():
    x, y = torch.zeros(2), torch.zeros(2)
    calls = []

    def pure() -> int:
        calls.append(len(calls))
        return calls[-1]

    def random() -> int:
        torch.rand(1)
        return pure()

    force = LastForce()
    assert force([x, y], 0, 7, pure) == force([x, y], 0, 7, pure) == 0
    assert force([x, y], 0, 8, pure) == 0  # nothing random: the seed does not matter
    assert force([x, y], 1, 8, pure) == 1  # another batch
    gti.drift_(y, x, 0.5)  # written by a kernel, with the value it had
    assert force([x, y], 1, 8, pure) == 2
    assert force([x, y.clone()], 1, 8, pure) == 3  # another tensor of the same value
    assert force([x], 1, 8, pure) == 4
    assert force([x], 1, 9, random) == 4  # still the last one, which drew nothing
    assert force([x, y], 1, 9, random) == force([x, y], 1, 9, random) == 5
    assert force([x, y], 1, 8, random) == 6  # another draw


def test_a_force_that_failed_is_no_last_force():
    x = torch.zeros(2)

    def broken() -> int:
        raise KeyboardInterrupt

    force = LastForce()
    assert force([x], 0, 0, lambda: 1) == 1
    with pytest.raises(KeyboardInterrupt):
        force([x], 1, 0, broken)
    assert force([x], 1, 0, lambda: 2) == 2
