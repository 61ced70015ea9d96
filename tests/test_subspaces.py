"""Darboux pairs of every kind, and ε_Ω on them."""

from __future__ import annotations

import math

import pytest
import torch
from probe_systems import cnn_system, quadratic_system, spd
from torch import Tensor, nn

import gti_kernels as gti
from gti_kernels.conventions import symplectic_matrix
from gti_kernels.probes.hamiltonian_system import HamiltonianSystem

KINDS = ("random", "gradient", "hessian")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models here are so small that more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def directions(pairs: tuple[list[Tensor], list[Tensor]]) -> Tensor:
    """[k, N], and the second half of the pairs is the same in p."""
    dq, dp = (torch.cat([t.flatten(1) for t in side], dim=1) for side in pairs)
    k = len(dq) // 2
    assert torch.equal(dq[:k], dp[k:]) and not dq[k:].any() and not dp[:k].any()
    return dq[:k]


@pytest.mark.parametrize("subspace", KINDS)
@pytest.mark.parametrize("layer", [None, "features.4", ""])
def test_pairs_are_a_darboux_basis(subspace, layer):
    system = cnn_system("group")
    dq, dp = gti.darboux_pairs(system, 2, subspace, layer=layer)
    assert all(t.dtype == torch.float64 for t in [*dq, *dp])
    omega = gti.two_form(dq, dp).omega
    assert float((omega - symplectic_matrix(2)).abs().max()) < 1e-14
    if layer:
        inside = [name.startswith(f"{layer}.") for name in system.names]
        assert any(inside)
        for x, own in zip(dq, inside, strict=True):
            assert bool(x.any()) == own


def test_gradients_come_in_order():
    system = quadratic_system()
    d = directions(gti.darboux_pairs(system, 3, "gradient"))
    w = system.q[0].detach()
    gradients = [a @ w for a, _ in system.batches]
    torch.testing.assert_close(d[0], gradients[0] / gradients[0].norm(), rtol=1e-12, atol=1e-12)
    for i in range(3):  # Gram and Schmidt: the i-th gradient lies in the first i + 1 directions
        rest = gradients[i] - d[: i + 1].T @ (d[: i + 1] @ gradients[i])
        assert float(rest.norm()) < 1e-12 * float(gradients[i].norm())


def test_hessian_directions_are_its_largest_eigenvectors():
    system = quadratic_system()
    d = directions(gti.darboux_pairs(system, 2, "hessian"))
    values, vectors = torch.linalg.eigh(spd(5, 0))
    for i in range(2):
        cosine = abs(float(d[i] @ vectors[:, -1 - i]))
        assert cosine == pytest.approx(1.0, abs=1e-9)
    assert float(values[-1]) > float(values[-2])


def test_hessian_of_a_layer_is_its_block():
    system = cnn_system("group")
    d = directions(gti.darboux_pairs(system, 1, "hessian", layer="head"))[0]
    with system.session():
        z = system.start(torch.float64)
        sizes = [q.numel() for q in system.q]

        def head(v: Tensor) -> Tensor:
            parts = v.split(sizes[-2:])
            q = [*z.q[:-2], *(x.reshape(y.shape) for x, y in zip(parts, z.q[-2:]))]
            return system.loss(q, z.b, 0)

        at = torch.cat([x.flatten() for x in z.q[-2:]])
        block = torch.autograd.functional.hessian(head, at)
    largest = torch.linalg.eigh(block)[1][:, -1]
    assert system.names[-2:] == ["head.weight", "head.bias"]
    assert abs(float(d[-len(largest) :] @ largest)) == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize("norm", ["group", "frozen"])
@pytest.mark.parametrize("subspace", KINDS)
def test_a_leapfrog_step_keeps_every_subspace(norm, subspace):
    result = gti.omega_invariance(cnn_system(norm), 0.05, 5, pairs=2, subspace=subspace)
    assert result.epsilon <= 1e-11
    assert result.epsilon <= 10 * result.floor


def test_running_statistics_break_it_on_every_subspace():
    for subspace in KINDS:
        result = gti.omega_invariance(cnn_system("running"), 0.05, 2, pairs=2, subspace=subspace)
        assert result.epsilon > 100 * result.floor


def test_damping_is_taken_out_and_both_numbers_are_given():
    result = gti.omega_invariance(quadratic_system(damping=0.8), 0.2, 10, pairs=3)
    assert result.epsilon < 1e-12
    assert result.with_damping == pytest.approx(1 - math.exp(-0.8 * 2.0), rel=1e-12)
    plain = gti.omega_invariance(quadratic_system(), 0.2, 10, pairs=3)
    assert plain.with_damping == plain.epsilon


def test_log_volume_is_that_of_the_pushed_tangents():
    system = quadratic_system(damping=0.8)
    result = gti.omega_invariance(system, 0.2, 10, pairs=2)
    before = gti.darboux_pairs(system, 2)
    pushed = gti.push_tangents(system, *before, 0.2, 10)
    change = gti.volume_change(before, (pushed.dq, pushed.dp))
    assert result.log_volume == pytest.approx(float(change), abs=1e-12)
    whole = gti.omega_invariance(system, 0.2, 10, pairs=5)  # all of phase space
    assert whole.log_volume == pytest.approx(-0.8 * 2.0 * 5, abs=1e-11)


def test_draws_differ_and_give_an_interval():
    system = cnn_system("running")
    result = gti.omega_invariance(system, 0.05, 1, pairs=1, draws=3, layer="features.4")
    assert len(set(result.values)) == 3
    low, high = result.interval
    assert low < result.epsilon < high


def test_bad_arguments():
    system = quadratic_system()
    for call in (gti.darboux_pairs, lambda s, **o: gti.omega_invariance(s, 0.1, 1, **o)):
        with pytest.raises(ValueError, match="subspace: expected one of"):
            call(system, pairs=1, subspace="krylov")
        with pytest.raises(ValueError, match="layer: expected the name of a submodule"):
            call(system, pairs=1, layer="head")
        with pytest.raises(ValueError, match="pairs: expected at most N = 5"):
            call(system, pairs=6)
        with pytest.raises(ValueError, match="pairs: expected at most one gradient for each of"):
            call(system, pairs=4, subspace="gradient")
        with pytest.raises(ValueError, match="pairs"):
            call(system, pairs=0)
    same = quadratic_system()
    same.batches[1] = same.batches[0]
    with pytest.raises(ValueError, match="independent gradients"):
        gti.darboux_pairs(same, 2, "gradient")


class Product(nn.Module):
    """L = w₀ w₁, whose Hessian has the eigenvalues ±1."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, 0.7], dtype=torch.float64))

    def forward(self, x):
        return self.w.prod() * x


@pytest.mark.parametrize("draw", range(4))
def test_opposite_eigenvalues_are_told_apart(draw):
    batches = [(torch.ones(1, dtype=torch.float64), torch.zeros(1))]
    system = HamiltonianSystem(Product(), lambda output, _: output.sum(), batches)
    for pairs in (1, 2):
        dq, _ = gti.darboux_pairs(system, pairs, "hessian", draw=draw)
        d = dq[0][:pairs]
        torch.testing.assert_close(d.abs(), torch.full_like(d, 0.5**0.5), rtol=1e-6, atol=0)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.a.weight
        self.b = self.c = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.b(self.c(self.a(x))))


@pytest.mark.parametrize(
    ("layer", "within"), [("a", [0]), ("head", [0]), ("b", [1, 2]), ("c", [1, 2]), ("", [0, 1, 2])]
)
def test_layers_with_shared_parameters(layer, within):
    batches = [(torch.arange(5), torch.arange(5))]
    system = HamiltonianSystem(Tied(), nn.functional.cross_entropy, batches)
    dq, _ = gti.darboux_pairs(system, 2, layer=layer)
    assert [i for i, x in enumerate(dq) if bool(x.any())] == within
    with pytest.raises(ValueError, match="layer: expected the name"):
        gti.darboux_pairs(system, 2, layer=["a"])
