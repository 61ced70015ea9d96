"""Darboux pairs of every kind, and ε_Ω on them."""

from __future__ import annotations

import math

import pytest
import torch
from probe_systems import cnn_system, quadratic_system, spd, value
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


class Saddle(nn.Module):
    """L = Σ w_2i w_2i+1: eigenvalues 1 and −1, each N/2 times."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(0.5, 1.0, n, dtype=torch.float64))

    def forward(self, _x: Tensor) -> Tensor:
        return (self.w[::2] * self.w[1::2]).sum()


@pytest.mark.parametrize("n", [2, 10])
@pytest.mark.parametrize("pairs", [1, 2])
def test_hessian_directions_tell_opposite_eigenvalues_apart(n, pairs):
    system = HamiltonianSystem(Saddle(n), value, [(torch.zeros(1), torch.zeros(()))])
    for draw in range(3):
        for d in directions(gti.darboux_pairs(system, pairs, "hessian", draw=draw)):
            h = d.reshape(-1, 2).flip(1).flatten()
            torch.testing.assert_close(h, (d @ h) * d, rtol=0, atol=1e-12)
            assert abs(float(d @ h)) == pytest.approx(1.0)


def test_a_layer_has_its_shared_parameters():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(3, 2)
            self.head = nn.Linear(2, 3)
            self.again = self.head
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.embedding(x))

    batches = [(torch.arange(3), torch.randn(3, 3))]
    system = HamiltonianSystem(Tied(), nn.functional.mse_loss, batches)
    assert system.names == ["embedding.weight", "head.bias"]
    for layer, whole in {"embedding": 6, "head": 9, "again": 9, "": 9}.items():
        d = directions(gti.darboux_pairs(system, whole, layer=layer))
        assert bool(d[:, :6].any()) and bool(d[:, 6:].any()) == (whole == 9)


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
        for layer in ("head", ["head"]):
            with pytest.raises(ValueError, match="layer: expected the name of a submodule.*head"):
                call(system, pairs=1, layer=layer)
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
    same.batches[0] = (torch.full((5, 5), math.nan), torch.zeros(()))
    with pytest.raises(ValueError, match="finite Hessian"):
        gti.darboux_pairs(same, 2, "hessian")
