"""Tangents through several steps: dense Jacobians, closed forms, models of every kind."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from probe_systems import cnn_system, quadratic_system, reference_step, value
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import gti_kernels as gti
from gti_kernels.probes import push_tangents as module
from gti_kernels.probes.hamiltonian_system import HamiltonianSystem, State
from gti_kernels.probes.tangent_map import Differentiator, chunk_of, force, push_step
from gti_kernels.probes.torch_functions import PlainFunctions


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models here are so small that more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten(1) for t in tensors], dim=1)


def unit_tangents(n: int) -> tuple[Tensor, Tensor]:
    """The 2n unit vectors of phase space."""
    return torch.eye(2 * n, n).double(), torch.eye(2 * n, n).double().roll(n, 0)


def perceptron(middle: nn.Module, **options) -> HamiltonianSystem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), middle, nn.Linear(4, 2)).double()
    batches = [(torch.randn(9, 3).double(), torch.randn(9, 2).double()) for _ in range(2)]
    return HamiltonianSystem(model, F.mse_loss, batches, **{"temperature": 0.1, **options})


def batch_norm_system(regime: str) -> HamiltonianSystem:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)
    ).double()
    batch = torch.randn(9, 3).double(), torch.randn(9, 2).double()
    return HamiltonianSystem(
        model, F.mse_loss, [batch], inv_mass=1.0, regime=regime, temperature=0.1
    )


# ---- dense Jacobians -----------------------------------------------------------------------------


@pytest.mark.parametrize("regime", ["batch", "running", "frozen"])
def test_three_steps_are_the_dense_jacobian(regime):
    system, dt = batch_norm_system(regime), 0.2
    (x, y), n = system.batches[0], system.size
    with system.session():
        z = system.start()
    statistics = z.b["1.running_mean"], z.b["1.running_var"]
    start = torch.cat([v.flatten() for v in [*z.q, *z.p, *statistics]])

    def three(v: Tensor) -> Tensor:
        for _ in range(3):
            v = reference_step(v, statistics, x, y, dt, regime)
        return v[: 2 * n]

    jacobian = torch.autograd.functional.jacobian(three, start)[:, : 2 * n]
    pushed = gti.push_tangents(system, *unit_tangents(n), dt, 3)
    assert pushed.method == "forward over reverse" and pushed.kinks == ()
    torch.testing.assert_close(
        torch.cat([flat(pushed.dq), flat(pushed.dp)], 1), jacobian.T, rtol=1e-12, atol=1e-12
    )


def dense(system: HamiltonianSystem, dt: float, steps: int) -> Tensor:
    """DΦ by autograd through the steps written out, without the package's step map."""
    sizes = [q.numel() for q in system.q]
    with system.session():
        z = system.start(torch.float64)

        def shaped(v: Tensor) -> list[Tensor]:
            return [x.reshape(q.shape) for x, q in zip(v.split(sizes), system.q)]

        def force(q: Tensor, t: int) -> Tensor:
            own = q + 0.0
            loss = system.loss(shaped(own), z.b, t)
            return torch.autograd.grad(loss, own, create_graph=True)[0]

        mass = torch.tensor(system.inv_mass, dtype=torch.float64)
        mass = mass.repeat_interleave(torch.tensor(sizes))

        def steps_of(v: Tensor) -> Tensor:
            q, p = v.chunk(2)
            for t in range(steps):
                p = p - dt / 2 * force(q, t)
                q = q + dt * mass * p
                p = p - dt / 2 * force(q, t)
            return torch.cat([q, p])

        start = torch.cat([v.flatten() for v in [*z.q, *z.p]])
        return torch.autograd.functional.jacobian(steps_of, start)


@pytest.mark.parametrize("middle", [nn.Tanh(), nn.Dropout(0.4), nn.ReLU(), nn.GroupNorm(2, 4)])
def test_models_of_many_kinds_are_the_dense_jacobian(middle):
    """Dropout: the mask of a step is the same in both half kicks and for every tangent."""
    system = perceptron(middle)
    pushed = gti.push_tangents(system, *unit_tangents(system.size), 0.3, 3, chunk=7)
    got = torch.cat([flat(pushed.dq), flat(pushed.dp)], 1)
    torch.testing.assert_close(got, dense(system, 0.3, 3).T, rtol=1e-12, atol=1e-12)


def test_a_symplectic_map_keeps_all_volume_and_damping_takes_its_share():
    for damping in (0.0, 0.7):
        system = perceptron(nn.Tanh(), damping=damping)
        before = unit_tangents(system.size)
        pushed = gti.push_tangents(system, *before, 0.3, 3)
        change = gti.volume_change(before, (flat(pushed.dq), flat(pushed.dp)))
        assert float(change) == pytest.approx(-damping * 3 * 0.3 * system.size, abs=1e-10)


def test_volume_of_dependent_and_of_undefined_tangents():
    q = torch.eye(2, 4)
    assert float(gti.volume_change((q, q), (3 * q, 3 * q))) == pytest.approx(2 * math.log(3))
    assert float(gti.volume_change((q, q), (q[:1].expand(2, 4), q[:1].expand(2, 4)))) == -math.inf
    assert gti.volume_change((q, q), (q * math.nan, q)).isnan()
    batch = torch.eye(2, 4).expand(3, 2, 4)
    assert gti.volume_change((batch, batch), (2 * batch, 2 * batch)).shape == (3,)


def test_volume_refuses_another_number_of_tangents_after():
    two, three = torch.eye(2, 4), torch.eye(3, 4)
    with pytest.raises(ValueError, match=r"after: expected as many .* \(2,\), got \(3,\)"):
        gti.volume_change((two, two), (three, three))


def test_omega_of_a_damped_quadratic_decays_exponentially():
    system = quadratic_system(damping=0.8)
    generator = torch.Generator().manual_seed(0)
    dq, dp = (torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    before = gti.two_form(dq, dp).omega
    pushed = gti.push_tangents(system, dq, dp, 0.2, 10)
    after = gti.two_form(pushed.dq, pushed.dp).omega
    assert float((after - math.exp(-0.8 * 2.0) * before).abs().max()) <= 1e-12
    assert float(before.abs().max()) > 0.5


# ---- chunks, memory, fallbacks -------------------------------------------------------------------


def test_any_chunk_gives_the_same_tangents():
    system = cnn_system("running")
    dq, dp = gti.darboux_pairs(system, 2)
    results = [gti.push_tangents(system, dq, dp, 0.05, 2, chunk=c) for c in (1, 3, 4, None)]
    assert [r.chunk for r in results] == [1, 3, 4, 4]
    for r in results[1:]:
        for a, b in zip(r.dq + r.dp, results[0].dq + results[0].dp):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_memory_budget_sets_the_chunk():
    system = cnn_system("group")
    with system.session():
        z = system.start(torch.float64)
        one = 2**24 / module.chunk_of(system, z, 2**24)
        assert module.chunk_of(system, z, 2**26) == pytest.approx(2**26 / one, rel=0.1)
        assert module.chunk_of(system, z, 1) == 1
    activations = 16 * 4 * 8 * 8 * 8  # one layer's output of one batch, in bytes
    assert one > 4 * activations
    pairs = gti.darboux_pairs(system, 2)
    assert gti.push_tangents(system, *pairs, 0.05, 1, memory=int(3.5 * one)).chunk == 2


@pytest.mark.parametrize("norm", ["none", "group", "running"])
def test_a_chunk_fits_its_memory(norm):
    """The allocations of one pass, live at once, against the budget that gave the chunk."""
    system, memory = cnn_system(norm), 2**22
    with system.session():
        z = system.start(torch.float64)
        chunk = module.chunk_of(system, z, memory)
        tangents = State(*gti.darboux_pairs(system, chunk), {})
        tangents = State([x[:chunk] for x in tangents.q], [x[:chunk] for x in tangents.p], {})
        for _ in range(2):  # once for what torch makes at the first call
            with torch.profiler.profile(profile_memory=True) as profile:
                force(system, z, tangents, 0, Differentiator(chunk))
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert chunk > 3 and memory / 4 < peak <= memory


class Sine(torch.autograd.Function):
    """Not for torch.func: no setup_context, no jvp."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()


class SineOnce(Sine):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()


class Apply(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_without_a_forward_rule_two_backward_passes():
    exact, system = perceptron(Apply(torch.sin)), perceptron(Apply(Sine.apply))
    dq, dp = gti.darboux_pairs(system, 3)
    with pytest.warns(UserWarning, match="two backward passes") as warned:
        pushed = gti.push_tangents(system, dq, dp, 0.2, 3)
    assert len([w for w in warned if "backward" in str(w.message)]) == 1
    assert pushed.method == "double backward"
    expected = gti.push_tangents(exact, dq, dp, 0.2, 3)
    for a, b in zip(pushed.dq + pushed.dp, expected.dq + expected.dp):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_two_backward_passes_follow_the_running_statistics():
    def system(function) -> HamiltonianSystem:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), Apply(function), nn.Linear(4, 2)
        ).double()
        batch = torch.randn(9, 3).double(), torch.randn(9, 2).double()
        return HamiltonianSystem(model, F.mse_loss, [batch], regime="running", temperature=0.1)

    dq, dp = gti.darboux_pairs(system(torch.sin), 3)
    expected = gti.push_tangents(system(torch.sin), dq, dp, 0.2, 3)
    with pytest.warns(UserWarning, match="two backward passes"):
        pushed = gti.push_tangents(system(Sine.apply), dq, dp, 0.2, 3)
    for a, b in zip(pushed.dq + pushed.dp, expected.dq + expected.dp):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_an_op_without_a_second_derivative_is_refused_by_name():
    system = perceptron(Apply(SineOnce.apply))
    dq, dp = gti.darboux_pairs(system, 1)
    with pytest.raises(RuntimeError, match="SineOnceBackward"):
        gti.push_tangents(system, dq, dp, 0.2, 1)


class Product(torch.autograd.Function):
    """x·y, whose backward forgets that its derivative by x depends on y."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * y.detach(), g * x


def test_a_second_derivative_that_is_not_symmetric_is_refused():
    system = perceptron(Apply(lambda x: Product.apply(x, x.tanh().flip(-1))))
    dq, dp = gti.darboux_pairs(system, 1)
    with (
        pytest.warns(UserWarning, match="two backward passes"),
        pytest.raises(RuntimeError, match="symmetric second derivatives"),
    ):
        gti.push_tangents(system, dq, dp, 0.2, 1)


# ---- draws and layouts ---------------------------------------------------------------------------


class Across(nn.Module):
    """A random layer that sees its input transposed: torch's transforms lay it out in another
    order than a plain forward pass does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.mix, self.layer = nn.Linear(4, 4), layer

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x.unsqueeze(1).expand(-1, 5, -1).transpose(0, 1)).transpose(1, 2)
        return torch.tanh(self.layer(x)).mean(0).T


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.4),
        nn.Dropout1d(0.4),
        nn.AlphaDropout(0.4),
        nn.RReLU(),
        Apply(lambda x: x * torch.bernoulli(torch.full_like(x, 0.5))),
        Apply(lambda x: x + torch.randn_like(x)),
        nn.TransformerEncoderLayer(9, 3, 5, dropout=0.3, activation="gelu"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_tangents_see_the_draws_of_the_walk(layer):
    """The pushed state is the stepped one, to rounding, whatever the layouts of activations."""
    torch.manual_seed(0)
    system = perceptron(Across(layer.double()))
    for chunk in (1, 4):
        with system.session():
            z, w = (system.start(torch.float64) for _ in range(2))
            tangents = State(*gti.darboux_pairs(system, 2), {})
            for t in range(2):
                system.step(z, t, 0.3)
                push_step(system, w, tangents, t, 0.3, Differentiator(chunk))
        for a, b in zip(z.q + z.p, w.q + w.p):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_weight_norm_has_its_true_second_derivative():
    """Torch's own, differentiated twice backwards, is not symmetric; differences do not need it."""
    torch.manual_seed(0)
    system = perceptron(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)).double())
    dq, dp = gti.darboux_pairs(system, 3)
    pushed = gti.push_tangents(system, dq, dp, 0.3, 3)
    expected = gti.push_tangents(system, dq, dp, 0.3, 3, "fd")
    assert pushed.method == "forward over reverse"
    for a, b in zip(pushed.dq + pushed.dp, expected.dq + expected.dp):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    assert gti.omega_invariance(system, 0.3, 3, pairs=3).epsilon < 1e-13


# ---- central differences -------------------------------------------------------------------------


def test_differences_pick_their_increment():
    system = perceptron(nn.Tanh())
    dq, dp = gti.darboux_pairs(system, 3)
    exact = gti.push_tangents(system, dq, dp, 0.3, 3)
    got = gti.push_tangents(system, dq, dp, 0.3, 3, "fd")
    assert got.method == "central differences" and got.increment in module.SWEEP
    assert got.kinks == ()
    error = max(
        float((a - b).abs().max())
        for a, b in zip(got.dq + got.dp, exact.dq + exact.dp, strict=True)
    )
    assert error < 1e-8


class Kinked(nn.Module):
    """½‖w‖² + max(0, w_1 − 1), where w begins at the kink."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, _x: Tensor) -> Tensor:
        return 0.5 * self.w.square().sum() + torch.relu(self.w[1] - 1.0)


def test_differences_report_kinks():
    batches = [(torch.zeros(1), torch.zeros(()))]
    system = HamiltonianSystem(Kinked(), value, batches, temperature=0.1)
    got = gti.push_tangents(system, *unit_tangents(3), 0.3, 1, "fd")
    exact = gti.push_tangents(system, *unit_tangents(3), 0.3, 1)
    errors = (flat(got.dq) - flat(exact.dq)).abs().amax(1)
    assert got.kinks == (1,) and exact.kinks == ()
    assert bool(errors[1] > 1e-2) and bool((errors[[0, 2, 3, 4, 5]] < 1e-8).all())
    omega = gti.omega_invariance(system, 0.3, 1, pairs=3, tangents="fd")
    assert omega.kinks > 0 and gti.omega_invariance(system, 0.3, 1, pairs=3).kinks == 0


class Bent(nn.Module):
    """max(0, w_1 − c)², whose force has a kink at c."""

    def __init__(self, w: float, c: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((3,), w, dtype=torch.float64))
        self.c = c

    def forward(self, _x: Tensor) -> Tensor:
        return torch.relu(self.w[1] - self.c).square()


@pytest.mark.parametrize("w", [0.0, 1.0])
@pytest.mark.parametrize("distance", [0.0, 0.2, 0.26, 0.3, 0.36, 0.45, 0.8, 1.5])
def test_differences_report_kinks_at_any_part_of_the_increment(w, distance, monkeypatch):
    monkeypatch.setattr(module, "SWEEP", (1e-4, 1e-5))
    unit = 1e-5 * (w * math.sqrt(3) or 1.0)
    batches = [(torch.zeros(1), torch.zeros(()))]
    system = HamiltonianSystem(Bent(w, w + distance * unit), value, batches, temperature=0.0)
    got = gti.push_tangents(system, *unit_tangents(3), 0.3, 1, "fd")
    assert (1 in got.kinks) == (distance < 1) and not {0, 2, 3, 5} & {*got.kinks}


def test_differences_at_zero():
    system = perceptron(nn.Tanh(), temperature=0.0)
    for q in system.q:
        nn.init.zeros_(q)
    dq, dp = gti.darboux_pairs(system, 2)
    exact = gti.push_tangents(system, dq, dp, 0.3, 2)
    got = gti.push_tangents(system, dq, dp, 0.3, 2, "fd")
    for a, b in zip(got.dq + got.dp, exact.dq + exact.dp):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


def test_the_number_of_gradients_of_differences(monkeypatch):
    system, calls = perceptron(nn.Tanh()), 0
    gradient = system.gradient

    def counted(*args):
        nonlocal calls
        calls += 1
        return gradient(*args)

    monkeypatch.setattr(system, "gradient", counted)
    dq, dp = gti.darboux_pairs(system, 1)
    gti.push_tangents(system, dq, dp, 0.3, 3, "fd")
    assert (22 + 2 * 4) * 3 <= calls <= (22 + 2 * 12) * 3


# ---- what is borrowed, what is refused -----------------------------------------------------------


@pytest.mark.parametrize("method", ["jvp", "fd"])
def test_arguments_and_model_are_left_as_they_were(method):
    system = cnn_system("batch")
    dq, dp = gti.darboux_pairs(system, 1)
    before = [x.clone() for x in [*dq, *dp, *system.model.state_dict().values()]]
    random = torch.get_rng_state()
    gti.push_tangents(system, dq, dp, 0.05, 1, method)
    after = [*dq, *dp, *system.model.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize(
    ("dq", "dp", "options", "error", "words"),
    [
        (torch.ones(2, 4), torch.ones(2, 5), {}, ValueError, r"dq: expected \[m, N\].*N = 5"),
        (torch.ones(0, 5), torch.ones(0, 5), {}, ValueError, "m >= 1"),
        (torch.ones(2, 5), torch.ones(3, 5), {}, ValueError, "dp: expected as many tangents"),
        ([torch.ones(2, 5)] * 2, torch.ones(2, 5), {}, ValueError, "dq: expected one tensor"),
        ([torch.ones(2, 4)], [torch.ones(2, 5)], {}, ValueError, r"dq\[0\]: expected \[m, 5\]"),
        ([torch.ones(2, 5).int()], torch.ones(2, 5), {}, TypeError, r"dq\[0\].*int32"),
        (torch.ones(2, 5), torch.ones(2, 5), {"method": "exact"}, ValueError, "method"),
        (torch.ones(2, 5), torch.ones(2, 5), {"chunk": 0}, ValueError, "chunk"),
        (torch.ones(2, 5), torch.ones(2, 5), {"memory": 0}, ValueError, "memory"),
        (torch.ones(2, 5), torch.ones(2, 5), {"steps": 0}, ValueError, "steps"),
        (torch.ones(2, 5), torch.ones(2, 5), {"dt": math.nan}, ValueError, "dt"),
    ],
)
def test_bad_arguments(dq, dp, options, error, words):
    with pytest.raises(error, match=words):
        gti.push_tangents(quadratic_system(), dq, dp, **{"dt": 0.1, "steps": 1, **options})


# ---- models that are not made for it -------------------------------------------------------------


def assert_tangents(system: HamiltonianSystem, tolerance: float = 1e-8) -> None:
    """Those of central differences, for any chunk; and ε_Ω is that of a symplectic map."""
    pairs = gti.darboux_pairs(system, 2)
    got = gti.push_tangents(system, *pairs, 0.1, 2)
    for other in (
        gti.push_tangents(system, *pairs, 0.1, 2, chunk=1),
        gti.push_tangents(system, *pairs, 0.1, 2, "fd"),
    ):
        for x, y in zip(got.dq + got.dp, other.dq + other.dp, strict=True):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
    assert gti.omega_invariance(system, 0.1, 2, pairs=2).epsilon < 1e-11


def data(*shape: int, count: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(shape, generator=generator), torch.randn(shape[0], 2, generator=generator))
        for _ in range(count)
    ]


class Checkpointed(nn.Module):
    def __init__(self, how: bool):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.how = nn.Linear(3, 4), nn.Linear(4, 2), how

    def forward(self, x):
        def inner(x):
            return torch.tanh(self.a(x))

        return self.b(checkpoint(inner, x, use_reentrant=False) if self.how else inner(x))


@pytest.mark.filterwarnings("ignore:tangents by two backward passes")
def test_checkpoints_recompute_at_the_positions_of_the_walk():
    ends = []
    for how in (False, True):
        system = HamiltonianSystem(Checkpointed(how), F.mse_loss, data(6, 3))
        with system.session():
            z = system.start()
            for t in range(5):
                system.step(z, t, 0.3)
        ends.append(torch.cat([x.flatten() for x in z.q]))
        assert_tangents(system)
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, y: F.mse_loss(o, y[0]),
        lambda o, y: F.mse_loss(o, torch.zeros_like(o)),
        lambda o, y: nn.MSELoss()(o, target=y[0].to(o.dtype)),
        lambda o, y: F.mse_loss(o, y[0], reduction="sum"),
        lambda o, y: F.mse_loss(o, y[0], reduction="none").mean(),
    ],
)
def test_mean_squares_of_targets_of_any_kind(loss):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    system = HamiltonianSystem(model, loss, [(x, (y,)) for x, y in data(6, 3)])
    assert_tangents(system)
    gti.darboux_pairs(system, 1, "hessian")


class Scaled(nn.Module):
    """With a scalar and an empty parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.nothing, self.scale = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.tensor(1.5))
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x) * self.scale


def test_scalar_and_empty_parameters():
    system = HamiltonianSystem(Scaled(), F.mse_loss, data(6, 3))
    assert_tangents(system)
    for subspace in ("random", "gradient", "hessian"):
        dq, dp = gti.darboux_pairs(system, 2, subspace)
        assert [x.shape for x in dq] == [(4, *q.shape) for q in system.q]
        pushed = gti.push_tangents(system, dq, dp, 0.1, 2)
        volume = gti.volume_change((dq, dp), (pushed.dq, pushed.dp))
        assert abs(float(volume)) < 1
    gti.certify(system.model, F.mse_loss, data(6, 3), dts=(0.01, 0.02))


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.recurrent, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        packed = pack_padded_sequence(x, [5, 4, 3, 2, 2, 1], batch_first=True)
        return self.head(self.recurrent(packed)[1][0][0])


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x):
        self.n += 1
        return self.b(torch.tanh(self.a(x) * (1 + 0.1 * self.n)))


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.register_buffer("mix", torch.eye(6).to_sparse())

    def forward(self, x):
        return torch.tanh(torch.sparse.mm(self.mix.to(x.dtype), self.layer(x)))


class Field(nn.Module):
    """The derivative of a network by its input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x):
        return torch.vmap(torch.func.grad(lambda row: self.net(row).sum()))(x)[:, :2]


def channels_last() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 2)).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Packed, (6, 5, 3)),
        (Counting, (6, 3)),
        (Sparse, (6, 3)),
        (Field, (6, 3)),
        (channels_last, (6, 3, 4, 4)),
    ],
)
@pytest.mark.filterwarnings("ignore:tangents by two backward passes")
@pytest.mark.filterwarnings("ignore:.*sparse")
def test_models_that_torch_func_does_not_take(make, shape):
    batches = data(*shape)
    if make is channels_last:
        batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches]
    assert_tangents(HamiltonianSystem(make(), F.mse_loss, batches))


def test_an_error_of_the_model_stays_what_it_is():
    model = nn.Sequential(nn.Linear(3, 2), nn.Unflatten(1, (3, 3)))
    system = HamiltonianSystem(model, F.mse_loss, data(6, 3))
    dq, dp = (torch.ones(1, system.size, dtype=torch.float64) for _ in range(2))
    with pytest.raises(RuntimeError, match="unflatten") as raised:
        gti.push_tangents(system, dq, dp, 0.1, 1)
    assert "differentiated" not in str(raised.value)


def test_the_chunk_counts_what_attention_keeps_on_the_way():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(8, 8)

        def forward(self, x):
            h = self.q(x)
            return F.scaled_dot_product_attention(*(t[:, None] for t in (h, h, x)))[:, 0]

    x = torch.randn(2, 512, 8)
    system = HamiltonianSystem(Attention(), F.mse_loss, [(x, x)])
    with system.session():
        chunk = chunk_of(system, system.start(torch.float64), 2**26)
    scores = 2 * 512 * 512 * 8  # bytes of one matrix of attention
    assert 1 <= chunk <= 2**26 / scores


@pytest.mark.parametrize("bag", [False, True])
def test_sparse_gradients_of_embeddings_are_dense_here(bag):
    torch.manual_seed(0)
    kind = nn.EmbeddingBag if bag else nn.Embedding
    layers = [kind(5, 3, sparse=True), nn.Tanh(), nn.Flatten(), nn.Linear(3 if bag else 6, 2)]
    batches = [(torch.randint(5, (6, 2)), torch.randn(6, 2)) for _ in range(2)]
    system = HamiltonianSystem(nn.Sequential(*layers), F.mse_loss, batches)
    assert gti.round_trip(system, 0.1, 2, exact=True).state == 0.0
    if not bag:  # whose derivative torch cannot differentiate
        assert_tangents(system)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_squared_errors_are_those_of_torch(reduction, weighted):
    o, y, w = torch.randn(3, 4), torch.randn(3, 4), torch.rand(3, 4)
    options = {"reduction": reduction, **({"weight": w} if weighted else {})}
    with PlainFunctions():
        got = F.mse_loss(o, y, **options)
    torch.testing.assert_close(got, F.mse_loss(o, y, **options))
