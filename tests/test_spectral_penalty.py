"""Σ (σ − target)² of a model's weights: value, gradient, warm start, and which weights count."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import gti_kernels as gti
from gti_kernels import spectral_penalty
from gti_kernels.ops import power_iteration as op


def model(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 4)
    )
    return net.to(dtype)


WEIGHTS = ("0.weight", "3.weight", "4.weight")


def exact(net: nn.Module, names=WEIGHTS, target: float = 1.0) -> torch.Tensor:
    weights = [net.get_parameter(name) for name in names]
    sigma = torch.stack([torch.linalg.matrix_norm(w.flatten(1), 2) for w in weights])
    return (sigma - target).square().sum()


@pytest.fixture
def calls(monkeypatch):
    """Number of weights and start of each call for singular values."""
    seen = []

    def spy(weights, k, method, max_steps, tol, start, seed, backend):
        seen.append((len(weights), start))
        return op.sigma_with_vectors(weights, k, method, max_steps, tol, start, seed, backend)

    monkeypatch.setattr(spectral_penalty, "sigma_with_vectors", spy)
    return seen


# ---- value and gradient --------------------------------------------------------------------------


@pytest.mark.parametrize("target", [1.0, 0.0, 2.5])
def test_value_and_gradient(target):
    net, reference = model(), model()
    penalty = gti.SpectralPenalty(net, target=target, tol=1e-12, max_steps=2000)
    value = penalty()
    value.backward()
    expected = exact(reference, target=target)
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    assert tuple(penalty.sigmas) == WEIGHTS
    for name, p in net.named_parameters():
        if name in WEIGHTS:
            torch.testing.assert_close(
                p.grad, reference.get_parameter(name).grad, rtol=1e-8, atol=1e-8
            )
            true = torch.linalg.matrix_norm(p.detach().flatten(1), 2)
            assert float(penalty.sigmas[name]) == pytest.approx(float(true), rel=1e-11)
        else:
            assert p.grad is None


def test_descent_reaches_the_target():
    net = model(torch.float32)
    penalty = gti.SpectralPenalty(net, target=0.7)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.4)
    for _ in range(300):
        optimizer.zero_grad()
        penalty().backward()
        optimizer.step()
    for name in WEIGHTS:
        norm = torch.linalg.matrix_norm(net.get_parameter(name).detach().flatten(1), 2)
        assert float(norm) == pytest.approx(0.7, abs=0.02)
    assert not any(s.requires_grad for s in penalty.sigmas.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    net = model(dtype)
    value = gti.SpectralPenalty(net, tol=1e-6)()
    value.backward()
    assert value.dtype == torch.float32 and net[0].weight.grad.dtype == dtype
    torch.testing.assert_close(value, exact(net.float()), rtol=1e-4, atol=1e-6)


# ---- one call, warm start, every -----------------------------------------------------------------


def test_one_call_for_all_layers_from_the_last_vectors(calls):
    net = model()
    penalty = gti.SpectralPenalty(net)
    for _ in range(3):
        penalty().backward()
    assert [count for count, _ in calls] == [3, 3, 3]
    starts = [start for _, start in calls]
    assert starts[0] is None and all(s is not None for s in starts[1:])
    assert not any(v.requires_grad for v in starts[1].v)
    first = op.sigma_with_vectors(
        [net[i].weight for i in (0, 3, 4)], 1, "cg", 200, 1e-4, None, 0, "auto"
    )
    for v, last in zip(starts[1].v, first[4:]):
        assert 0.98 < float((v * last).sum() / v.norm()) < 1 - 1e-4
    assert not torch.equal(starts[1].v[0], starts[2].v[0])


def test_the_warm_start_saves_steps():
    """With two passes a call the values climb to the true ones, call by call."""
    net = model()
    penalty = gti.SpectralPenalty(net, method="power", max_steps=2, tol=0.0)
    values = []
    for _ in range(60):
        penalty()
        values.append(torch.stack(list(penalty.sigmas.values())))
    with torch.no_grad():
        true = torch.stack(
            [torch.linalg.matrix_norm(net[i].weight.flatten(1), 2) for i in (0, 3, 4)]
        )
    assert bool((values[0] < 0.8 * true).any())
    assert bool((values[-1] > 0.98 * true).all())


def test_a_vector_that_is_no_longer_the_top_one_is_left():
    """The penalty's own gradient step: v stays singular, with a σ below the second."""
    net = nn.Linear(300, 200, bias=False).double()
    penalty = gti.SpectralPenalty(net, target=0.5, tol=1e-6)
    penalty().backward()
    with torch.no_grad():
        net.weight -= 0.5 * net.weight.grad
        top = float(torch.linalg.matrix_norm(net.weight, 2))
    penalty()
    assert float(penalty.sigmas["weight"]) == pytest.approx(top, rel=1e-5)


def test_every(calls):
    net = model()
    penalty = gti.SpectralPenalty(net, every=3)
    values = [penalty() for _ in range(7)]
    assert [bool(v.requires_grad) for v in values] == [True, False, False] * 2 + [True]
    assert [float(v) for v in values[1:3] + values[4:6]] == [0.0] * 4
    assert float(values[0]) > 0 and len(calls) == 3
    assert all(v.dtype == torch.float64 and v.shape == () for v in values)
    assert set(penalty.sigmas) == set(WEIGHTS)
    total = net(torch.zeros(1, 3, 4, 4, dtype=torch.float64)).sum() + penalty()
    total.backward()  # a call between may be added to any loss


def test_two_values_before_one_backward():
    net = model()
    penalty = gti.SpectralPenalty(net, tol=1e-12, max_steps=2000)
    (penalty() + penalty()).backward()
    reference = model()
    (2 * exact(reference)).backward()
    for name in WEIGHTS:
        torch.testing.assert_close(
            net.get_parameter(name).grad, reference.get_parameter(name).grad, rtol=1e-7, atol=1e-7
        )


def test_state_dict(calls):
    net = model()
    penalty = gti.SpectralPenalty(net, every=2)
    for _ in range(3):
        penalty()
    file = io.BytesIO()
    torch.save(penalty.state_dict(), file)
    file.seek(0)
    other = gti.SpectralPenalty(net, every=2)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.calls == 3 and other.sigmas == penalty.sigmas
    del calls[:]
    for _ in range(2):
        a, b = penalty(), other()
        assert torch.equal(a, b)
    starts = [start for _, start in calls]
    assert len(starts) == 2
    assert all(torch.equal(x, y) for x, y in zip(starts[0].v, starts[1].v))
    fresh = gti.SpectralPenalty(net)
    fresh.load_state_dict(gti.SpectralPenalty(net).state_dict())  # before any call
    assert fresh.sigmas == {} and float(fresh()) > 0


def test_a_state_of_other_weights_is_refused():
    penalty, other = gti.SpectralPenalty(model()), gti.SpectralPenalty(nn.Linear(2, 2))
    other()
    with pytest.raises(ValueError, match=r"must be for the weights \['0.weight'.*\['weight'\]"):
        penalty.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="state_dict must have .*'v'"):
        penalty.load_state_dict({"calls": 1})
    assert penalty.calls == 0 and penalty.sigmas == {}


# ---- which weights -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, WEIGHTS),
        (["4.weight", "0.weight"], ("0.weight", "4.weight")),
        (["3"], ("3.weight",)),
        ("3", ("3.weight",)),
        (lambda name, module: isinstance(module, nn.Conv2d), ("0.weight",)),
        (lambda name, module: name.startswith(("3", "4")), ("3.weight", "4.weight")),
    ],
)
def test_layers(layers, expected):
    penalty = gti.SpectralPenalty(model(), layers=layers, tol=1e-10, max_steps=2000)
    torch.testing.assert_close(penalty(), exact(model(), expected), rtol=1e-9, atol=1e-12)
    assert tuple(penalty.sigmas) == expected


def test_shared_weights_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 6)
            self.block = nn.Linear(6, 6)
            self.again = self.block
            self.head = nn.Linear(6, 10, bias=False)
            self.head.weight = self.embedding.weight

    penalty = gti.SpectralPenalty(Tied())
    penalty()
    assert list(penalty.sigmas) == ["embedding.weight", "block.weight"]


def test_frozen_weights_count_without_a_gradient():
    net = model()
    net[3].weight.requires_grad_(False)
    penalty = gti.SpectralPenalty(net, tol=1e-12, max_steps=2000)
    value = penalty()
    value.backward()
    torch.testing.assert_close(value, exact(model()), rtol=1e-10, atol=0)
    assert net[3].weight.grad is None and net[0].weight.grad is not None
    for p in net.parameters():
        p.requires_grad_(False)
    assert not penalty().requires_grad


def test_a_frozen_weight_costs_no_outer_product():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.size = max(self.size, out.numel())
            return out

    net = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 3))
    net[0].weight.requires_grad_(False)
    value = gti.SpectralPenalty(net)()
    with Largest() as seen:
        value.backward()
    assert seen.size == 3 * 40


def test_parametrized_weights_are_those_the_module_uses():
    net = model()
    parametrizations.weight_norm(net[3])
    gti.nn.spectral_norm(net[4], n_power_iterations=200)
    penalty = gti.SpectralPenalty(net, tol=1e-10, max_steps=2000)
    value = penalty()
    assert tuple(penalty.sigmas) == WEIGHTS
    assert float(penalty.sigmas["4.weight"]) == pytest.approx(1, abs=1e-8)
    true = torch.linalg.matrix_norm(net[3].weight, 2)
    assert float(penalty.sigmas["3.weight"]) == pytest.approx(float(true), rel=1e-10)
    value.backward()
    assert net[3].parametrizations.weight.original0.grad.any()
    # Along W/σ the penalty is flat.
    assert float(net[4].parametrizations.weight.original.grad.abs().max()) < 1e-6
    parametrize.remove_parametrizations(net[3], "weight")
    assert float(penalty()) == pytest.approx(float(value), rel=1e-9)


def test_empty_and_one_dimensional_weights_are_left_out():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 0), nn.LayerNorm(2))
    penalty = gti.SpectralPenalty(net)
    penalty()
    assert list(penalty.sigmas) == ["0.weight"]


def test_a_bad_weight_is_forgotten_when_it_is_mended():
    net = model()
    penalty = gti.SpectralPenalty(net, tol=1e-8)
    expected = penalty()
    weight = net[3].weight.detach().clone()
    with torch.no_grad():
        net[3].weight[0, 0] = float("nan")
    assert penalty().isnan() and penalty.sigmas["0.weight"].isfinite()
    assert penalty.sigmas["3.weight"].isnan()
    with torch.no_grad():
        net[3].weight.copy_(weight)
    torch.testing.assert_close(penalty(), expected, rtol=1e-6, atol=0)


# ---- the modes of torch --------------------------------------------------------------------------


def test_functional_call_and_grad():
    net = model()
    parameters = {name: p.detach().clone() for name, p in net.named_parameters()}

    class WithPenalty(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
            self.penalty = gti.SpectralPenalty(net, tol=1e-12, max_steps=2000)

        def forward(self):
            return self.penalty()

    module = WithPenalty()
    for _ in range(2):
        got = grad(lambda p: functional_call(module, {f"net.{n}": t for n, t in p.items()}, ()))(
            parameters
        )
        reference = model()
        exact(reference).backward()
        for name in WEIGHTS:
            expected = reference.get_parameter(name).grad
            torch.testing.assert_close(got[name], expected, rtol=1e-7, atol=1e-7)
        for tensor in [*module.penalty.state_dict()["v"].values(), *module.penalty.sigmas.values()]:
            assert not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def test_autocast_changes_nothing():
    net = model(torch.float32)
    a, b = (gti.SpectralPenalty(net, tol=1e-6) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        value = a()
        grads = torch.autograd.grad(value, [net[i].weight for i in (0, 3, 4)])
    expected = b()
    assert torch.equal(value, expected)
    for got, e in zip(grads, torch.autograd.grad(expected, [net[i].weight for i in (0, 3, 4)])):
        assert torch.equal(got, e)


def test_under_torch_compile():
    torch._dynamo.reset()
    net = model(torch.float32)
    penalty, other = (gti.SpectralPenalty(net, tol=1e-6) for _ in range(2))
    x = torch.randn(2, 3, 4, 4)

    @torch.compile(backend="aot_eager")
    def loss(x):
        return net(x).square().mean() + penalty()

    net.eval()
    for _ in range(3):
        torch.testing.assert_close(loss(x), net(x).square().mean() + other())
    assert penalty.calls == 3


def test_a_deep_copy_goes_its_own_way():
    net = model()
    pair = {"net": net, "penalty": gti.SpectralPenalty(net)}
    pair["penalty"]()
    copied = copy.deepcopy(pair)
    with torch.no_grad():
        copied["net"][3].weight.mul_(2.0)
    copied["penalty"]()
    ratio = copied["penalty"].sigmas["3.weight"] / pair["penalty"].sigmas["3.weight"]
    assert float(ratio) == pytest.approx(2.0, rel=1e-3)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be an integer >= 1, got 0"),
        ({"every": 1.5}, ValueError, "every must be"),
        ({"target": float("nan")}, ValueError, "target must be finite"),
        ({"target": torch.ones(())}, TypeError, "target must be a Python float"),
        ({"layers": ["7.weight"]}, ValueError, "got '7.weight'. There are: 0.weight, 3.weight"),
        ({"layers": ["1.weight"]}, ValueError, "weights of at least 2 dims"),
        ({"layers": [nn.Linear]}, TypeError, "names or a predicate"),
        ({"layers": nn.Linear}, TypeError, "names or a predicate.*isinstance"),
        ({"layers": nn.Linear(2, 2)}, TypeError, "names or a predicate"),
        ({"layers": 3}, TypeError, "names or a predicate, got 3"),
        ({"backend": "gpu"}, ValueError, "SpectralPenalty: backend must be one of"),
        ({"layers": []}, ValueError, "must select at least one"),
        ({"layers": lambda name, module: False}, ValueError, "must select at least one"),
        ({"max_steps": 0}, ValueError, "max_steps"),
        ({"method": "qr"}, ValueError, "method must be"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        gti.SpectralPenalty(model(), **options)


def test_what_is_no_module():
    with pytest.raises(TypeError, match="model must be a module, got list"):
        gti.SpectralPenalty([torch.ones(2, 2)])
    with pytest.raises(ValueError, match="There are: none"):
        gti.SpectralPenalty(nn.LayerNorm(3))


# ---- what changes between two calls --------------------------------------------------------------


def test_a_call_under_vmap_keeps_nothing():
    net = nn.Linear(3, 2, bias=False).double()
    penalty = gti.SpectralPenalty(net)
    w = torch.stack([x * net.weight.detach() for x in (1.0, 2.0)])

    class Penalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self):
            return penalty()

    def value(w):
        return torch.func.functional_call(Penalised(), {"net.weight": w}, ())

    for _ in range(2):
        got = torch.func.vmap(value)(w)
        assert penalty.sigmas == {} and penalty.state_dict()["v"] == {}
        expected = [(torch.linalg.svdvals(x)[0] - 1).square() for x in w]
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-4, atol=0)
    for _ in range(2):
        hessian = torch.func.hessian(value)(w[0])
        assert bool(torch.isfinite(hessian).all())
    penalty().backward()
    assert set(penalty.sigmas) == {"weight"}
    torch.func.vmap(value)(w)  # from the v of before
    assert float(penalty()) == pytest.approx(float(expected[0]), rel=1e-4)


def test_a_replaced_parameter_of_another_width_is_followed():
    net = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 3))
    penalty = gti.SpectralPenalty(net)
    penalty()
    for shape in ((12, 6), (12, 8)):
        net[0].weight = nn.Parameter(torch.randn(shape))
        penalty()
        sigma = torch.linalg.svdvals(net[0].weight.detach())[0]
        torch.testing.assert_close(penalty.sigmas["0.weight"], sigma, rtol=1e-4, atol=0)


def test_zero_between_calls_is_what_a_value_would_be():
    net = nn.Linear(4, 3)
    penalty = gti.SpectralPenalty(net, every=2)
    penalty()
    net.double()
    zero = penalty()
    assert zero == 0 and zero.dtype == penalty().dtype == torch.float64


@pytest.mark.parametrize(
    "change", [{"calls": "x"}, {"calls": -1}, {"calls": True}, {"v": {"weight": 3}}]
)
def test_a_state_of_other_types_is_refused_and_nothing_changes(change):
    penalty = gti.SpectralPenalty(nn.Linear(4, 3))
    penalty()
    before = penalty.state_dict()
    with pytest.raises(TypeError, match="SpectralPenalty: state_dict must have an integer"):
        penalty.load_state_dict({**before, "calls": 7, **change})
    assert penalty.calls == before["calls"]
    penalty()


def test_what_cannot_be_penalised_is_refused_at_once():
    net = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"0\.weight must have a shape.*forward"):
        gti.SpectralPenalty(net)
    assert set(gti.SpectralPenalty(net, layers="1")._places) == {"1.weight"}
    net(torch.ones(1, 3))
    assert set(gti.SpectralPenalty(net)._places) == {"0.weight", "1.weight"}
    codes = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    net[1].register_parameter("codes", codes)
    with pytest.raises(TypeError, match=r"1\.codes must have dtype.*layers"):
        gti.SpectralPenalty(net)
    gti.SpectralPenalty(net, layers=["0", "1.weight"])()
