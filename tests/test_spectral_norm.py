"""W/σ against torch's parametrization, its derivative in every mode of torch, and its traps."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gti_kernels as gti
from gti_kernels import testing
from gti_kernels.nn import SpectralNorm

MODULES = {
    "Linear": lambda: nn.Linear(7, 5),
    "Conv2d": lambda: nn.Conv2d(3, 6, 3),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 3, 2),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "Embedding": lambda: nn.Embedding(11, 4),
}
every_module = pytest.mark.parametrize("kind", MODULES)


def numbers(*shape, dtype=torch.float64, seed=0):
    return testing.numbers(*shape, dtype=dtype, device="cpu", seed=seed)


def normed(weight: torch.Tensor, **options) -> nn.Module:
    """A module whose `weight` is `weight`/σ."""
    module = nn.Module()
    module.weight = nn.Parameter(weight.clone())
    return gti.nn.spectral_norm(module, **options)


def norm_of(module: nn.Module) -> SpectralNorm:
    return module.parametrizations.weight[0]


def original(module: nn.Module) -> nn.Parameter:
    return module.parametrizations.weight.original


def matrix(weight: torch.Tensor, dim: int = 0) -> torch.Tensor:
    return weight.movedim(dim, 0).flatten(1)


def with_gap(*shape, dtype=torch.float64) -> torch.Tensor:
    """σ₂ = σ₁/2: converges quickly."""
    m, n = shape[0], math.prod(shape[1:])
    spectrum = 1.7 * 0.5 ** torch.arange(min(m, n), dtype=torch.float64)
    return testing.with_spectrum(spectrum, m, n, dtype=dtype).reshape(shape)


# ---- torch's interface ---------------------------------------------------------------------------


@every_module
@pytest.mark.parametrize("steps", [1, 3])
def test_the_vectors_are_those_of_torch_after_the_same_steps(kind, steps):
    torch.manual_seed(0)
    plain = MODULES[kind]().double()
    theirs = torch_spectral_norm(copy.deepcopy(plain), n_power_iterations=steps)
    ours = gti.nn.spectral_norm(plain, n_power_iterations=steps)
    ours.load_state_dict(theirs.state_dict())  # the same keys and shapes
    dim = norm_of(ours).dim
    assert dim == norm_of(theirs).dim
    for _ in range(3):
        before = norm_of(theirs)._v.clone()
        a, _ = ours.weight, theirs.weight
        torch.testing.assert_close(norm_of(ours)._v, norm_of(theirs)._v, rtol=1e-12, atol=1e-12)
        # σ and u are of the new v: never below torch's, which mixes the new v with the last u.
        w, v = matrix(original(ours), dim), norm_of(ours)._v
        sigma = torch.linalg.vector_norm(w @ v)
        torch.testing.assert_close(norm_of(ours)._u, w @ v / sigma, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(a, original(ours) / sigma, rtol=1e-12, atol=0)
        theirs_sigma = norm_of(theirs)._u @ w @ norm_of(theirs)._v
        assert bool(sigma >= theirs_sigma * (1 - 1e-14))
        assert not torch.equal(before, v)
    for module in (ours, theirs):
        norm_of(module).n_power_iterations = 2000
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-9, atol=1e-9)
    top = torch.linalg.matrix_norm(matrix(ours.weight, dim), 2)
    assert float(top) == pytest.approx(1, abs=1e-9)


@every_module
def test_the_gradient_is_that_of_torch_at_converged_vectors(kind):
    torch.manual_seed(1)
    theirs = torch_spectral_norm(MODULES[kind]().double(), n_power_iterations=3000)
    assert theirs.weight.isfinite().all()
    ours = gti.nn.spectral_norm(MODULES[kind]().double())
    ours.load_state_dict(theirs.state_dict())
    g = numbers(*theirs.weight.shape)
    for module in (ours.eval(), theirs.eval()):
        module.weight.backward(g)
    torch.testing.assert_close(original(ours).grad, original(theirs).grad, rtol=1e-8, atol=1e-8)


def test_eval_uses_the_stored_vectors_and_training_moves_them():
    layer = gti.nn.spectral_norm(nn.Linear(9, 6))
    after_training = layer.weight
    layer.eval()
    state = copy.deepcopy(layer.state_dict())
    torch.testing.assert_close(layer.weight, after_training, rtol=1e-6, atol=0)
    for _ in range(3):
        layer.weight  # noqa: B018
    assert all(torch.equal(state[key], x) for key, x in layer.state_dict().items())
    with torch.no_grad():
        original(layer).copy_(numbers(6, 9).float())
    v = state["parametrizations.weight.0._v"]
    sigma = torch.linalg.vector_norm(original(layer) @ v)
    torch.testing.assert_close(layer.weight, original(layer) / sigma)
    layer.train()
    layer.weight  # noqa: B018
    assert not torch.equal(norm_of(layer)._v, v)


def test_a_warm_start_follows_the_weight():
    layer = normed(with_gap(30, 20, dtype=torch.float32))
    for step in range(30):
        with torch.no_grad():
            original(layer).add_(0.01 * numbers(30, 20, seed=step).float() / 30)
        weight = layer.weight.detach()
    assert float(torch.linalg.matrix_norm(weight, 2)) == pytest.approx(1, abs=1e-3)


def test_state_dict_carries_the_vectors():
    torch.manual_seed(0)
    a, b = (gti.nn.spectral_norm(nn.Conv2d(3, 6, 3)) for _ in range(2))
    for _ in range(5):
        a.weight  # noqa: B018
    b.load_state_dict(a.state_dict())
    assert torch.equal(norm_of(a)._v, norm_of(b)._v)
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(norm_of(a)._v, norm_of(b)._v)
    c = copy.deepcopy(a)
    assert torch.equal(c.weight, a.weight)
    assert norm_of(c)._v is not norm_of(a)._v
    assert set(a.state_dict()) == set(torch_spectral_norm(nn.Conv2d(3, 6, 3)).state_dict())


def test_remove_parametrizations():
    layer = gti.nn.spectral_norm(nn.Linear(4, 4))
    layer.eval()
    expected = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, expected)
    assert isinstance(layer.weight, nn.Parameter) and not parametrize.is_parametrized(layer)
    kept = gti.nn.spectral_norm(nn.Linear(4, 4))
    raw = original(kept).detach().clone()
    parametrize.remove_parametrizations(kept, "weight", leave_parametrized=False)
    assert torch.equal(kept.weight, raw)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_vector_becomes_a_unit_vector(dtype):
    layer = gti.nn.spectral_norm(nn.LayerNorm(7, dtype=dtype))
    with torch.no_grad():
        original(layer).copy_(numbers(7))
    torch.testing.assert_close(layer.weight, nn.functional.normalize(original(layer), dim=0))
    with torch.no_grad():
        original(layer).zero_()
    layer.weight.sum().backward()
    assert not layer.weight.any() and original(layer).grad.isfinite().all()
    assert not list(norm_of(layer).buffers())


def test_a_dim_of_outputs_may_be_chosen():
    weight = numbers(4, 3, 5)
    for dim in (0, 1, 2, -1):
        layer = normed(weight, dim=dim, n_power_iterations=500)
        assert norm_of(layer)._u.shape == (weight.shape[dim],)
        top = torch.linalg.matrix_norm(matrix(layer.weight, dim), 2)
        assert float(top) == pytest.approx(1, abs=1e-9)


def test_a_weight_may_be_assigned():
    layer, w = gti.nn.spectral_norm(nn.Linear(3, 4)), numbers(4, 3).float()
    layer.weight = w
    assert torch.equal(original(layer), w) and isinstance(original(layer), nn.Parameter)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_sparse_gradient(kind, dim):
    rows, grads = torch.tensor([[1, 4, 4]]), []
    for sparse in (True, False):
        torch.manual_seed(0)
        layer = gti.nn.spectral_norm(kind(6, 3, sparse=sparse), dim=dim)
        layer(rows).square().sum().backward()
        grads.append(original(layer).grad)
    torch.testing.assert_close(*grads)
    assert grads[0].layout == torch.strided


def test_a_module_on_the_meta_device_is_given_its_state_later():
    source = gti.nn.spectral_norm(nn.Linear(3, 4))
    layer = gti.nn.spectral_norm(nn.Linear(3, 4, device="meta"))
    assert norm_of(layer)._u.is_meta and layer(torch.empty(2, 3, device="meta")).shape == (2, 4)
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(layer.eval().weight, source.eval().weight)


def test_a_state_can_be_loaded_after_inference_mode():
    layer, other = (gti.nn.spectral_norm(nn.Linear(3, 4)) for _ in range(2))
    with torch.inference_mode():
        layer(torch.ones(1, 3))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(norm_of(layer)._v, norm_of(other)._v)


def test_tracing_is_refused():
    layer = gti.nn.spectral_norm(nn.Linear(3, 4)).eval()
    with pytest.raises(RuntimeError, match="torch.jit.trace would take.*torch.export"):
        torch.jit.trace(layer, torch.ones(1, 3))
    exported = torch.export.export(layer, (torch.ones(1, 3),)).module()
    torch.testing.assert_close(exported(torch.ones(1, 3)), layer(torch.ones(1, 3)))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("training", [True, False])
def test_a_checkpoint_gives_the_same_gradient(training, dim):
    x, grads = numbers(2, 3), []
    for run in (lambda f, x: f(x), functools.partial(checkpoint, use_reentrant=False)):
        torch.manual_seed(0)
        layer = gti.nn.spectral_norm(nn.Linear(3, 4).double(), dim=dim).train(training)
        with torch.no_grad():
            norm_of(layer)._v.copy_(torch.linalg.svd(original(layer).movedim(dim, 0))[2][0])
        run(layer, x).square().sum().backward()
        grads.append(original(layer).grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("size, factor", [(1e-40, 1.0), (1e-30, 1e30)])
def test_a_gradient_that_overflows_is_no_error(size, factor):
    module = normed(numbers(3, 4).float() * size, eps=0.0)
    (module.weight * factor).sum().backward()
    assert not torch.isfinite(original(module).grad).all()


def test_errors():
    empty = nn.Module()
    empty.weight = nn.Parameter(torch.ones(3, 0))
    with pytest.raises(ValueError, match="name must be that of a parameter.*Linear.*'kernel'"):
        gti.nn.spectral_norm(nn.Linear(2, 2), "kernel")
    for steps in (0, -1, 1.5):
        with pytest.raises(ValueError, match="n_power_iterations must be an integer >= 1"):
            gti.nn.spectral_norm(nn.Linear(2, 2), n_power_iterations=steps)
    for dim in (2, -3):
        with pytest.raises(IndexError, match=r"dim must be in \[-2, 1\]"):
            gti.nn.spectral_norm(nn.Linear(2, 2), dim=dim)
    for dim in (1.0, "0"):
        with pytest.raises(TypeError, match="dim must be an integer"):
            gti.nn.spectral_norm(nn.Linear(2, 2), dim=dim)
    with pytest.raises(TypeError, match="eps must be a float"):
        gti.nn.spectral_norm(nn.Linear(2, 2), eps="a")
    with pytest.raises(ValueError, match="eps must be at least 0, got -1"):
        gti.nn.spectral_norm(nn.Linear(2, 2), eps=-1.0)
    with pytest.raises(ValueError, match=r"must have elements, got shape \(3, 0\)"):
        gti.nn.spectral_norm(empty)
    with pytest.raises(TypeError, match="complex64"):
        gti.nn.spectral_norm(nn.Linear(2, 2, dtype=torch.complex64))
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError):
        gti.nn.spectral_norm(layer, n_power_iterations=0)
    assert not parametrize.is_parametrized(layer)


# ---- the derivative ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 2, 3)])
@pytest.mark.parametrize("dim", [0, 1])
def test_gradcheck(shape, dim):
    """Of a given v the derivative is exact, converged or not; forward and reverse, batched."""
    norm = SpectralNorm(numbers(*shape), dim=dim).eval()
    norm._v = nn.functional.normalize(numbers(*norm._v.shape, seed=4), dim=0)
    w = numbers(*shape, seed=1).requires_grad_()
    assert gradcheck(
        norm,
        (w,),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert gradgradcheck(norm, (w,))


def test_gradcheck_of_the_normalised_weight_itself():
    """With the vectors converged in each call: the derivative of W/σ₁."""
    norm = SpectralNorm(numbers(5, 4), n_power_iterations=300)
    w = with_gap(5, 4).requires_grad_()
    assert gradcheck(norm, (w,), check_forward_ad=True)
    g = numbers(5, 4)
    (got,) = torch.autograd.grad(norm(w), w, g)
    (expected,) = torch.autograd.grad(w / torch.linalg.matrix_norm(w, 2), w, g)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(6, 4), (300, 700), (64, 3, 7, 7)])
@pytest.mark.parametrize("layout", ["contiguous", "expanded", "transposed"])
def test_the_gradient_of_any_layout(shape, layout):
    w = with_gap(*shape, dtype=torch.float32)
    layer = normed(w).eval()
    g = numbers(*shape, dtype=torch.float32, seed=1)
    if layout == "expanded":
        g = g[:1].expand(shape)
    elif layout == "transposed":
        g = g.transpose(0, 1).contiguous().transpose(0, 1)
    layer.weight.backward(g)
    v = norm_of(layer)._v.double()
    a, g = w.double(), g.double()
    y = matrix(a) @ v
    sigma, u = y.norm(), y / y.norm()
    inner = (g * a / sigma).sum()
    expected = (g - inner * torch.outer(u, v).view(shape)) / sigma
    torch.testing.assert_close(original(layer).grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_channels_last_weight_keeps_its_layout():
    layer = normed(numbers(6, 4, 3, 3, dtype=torch.float32))
    plain = layer.weight.detach().clone()
    last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    assert last.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last.weight, layer.weight, rtol=1e-5, atol=1e-6)
    assert plain.isfinite().all()


def test_twice_in_one_graph():
    """Each forward in training mode has vectors of its own; later ones do not touch them."""
    layer = gti.nn.spectral_norm(nn.Linear(6, 4).double())
    x = numbers(3, 6)
    expected, reference = [], copy.deepcopy(layer)
    for scale in (1.0, -2.0):
        out = scale * reference(x).square().sum()
        expected.append(torch.autograd.grad(out, original(reference))[0])
    real, fake = layer(x).square().sum(), -2.0 * layer(x).square().sum()
    layer.eval()
    layer(x)
    (real + fake).backward()
    torch.testing.assert_close(original(layer).grad, sum(expected), rtol=1e-13, atol=1e-13)


def test_no_graph_holds_a_buffer():
    """A write to the buffers, as DistributedDataParallel does, does not reach a graph."""
    for training in (True, False):
        layer = normed(numbers(5, 4)).train(training)
        out = layer.weight
        for buffer in layer.buffers():
            buffer.zero_()
        out.sum().backward()
        assert original(layer).grad.isfinite().all()


def test_vectors_are_replaced_and_detached():
    layer = gti.nn.spectral_norm(nn.Linear(6, 4))
    before = norm_of(layer)._v
    version, values = before._version, before.clone()
    layer.weight.sum().backward()
    after = norm_of(layer)._v
    assert after is not before and torch.equal(before, values) and before._version == version
    assert not after.requires_grad and after.grad_fn is None
    assert [name for name, _ in norm_of(layer).named_buffers()] == ["_u", "_v"]


def test_the_weight_may_change_before_backward():
    layer = normed(numbers(5, 4))
    other = copy.deepcopy(layer)
    g = numbers(5, 4, seed=1)
    (expected,) = torch.autograd.grad(other.weight, original(other), g)
    out = layer.weight
    with torch.no_grad():
        original(layer).mul_(3.0)
    (got,) = torch.autograd.grad(out, original(layer), g)
    assert torch.equal(got, expected)


# ---- σ = 0, NaN ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_zero_weight(dtype, dim):
    layer = normed(torch.zeros(5, 4, dtype=dtype), dim=dim)
    g = numbers(5, 4, dtype=dtype)
    for training in (True, False):
        layer.train(training)
        out = layer.weight
        assert out.dtype == dtype and not out.any()
        (got,) = torch.autograd.grad(out, original(layer), g)
        assert torch.equal(got, g)
        assert all(float(x.norm()) == pytest.approx(1) for x in layer.buffers())
    with torch.no_grad():  # and it comes back
        original(layer).copy_(numbers(5, 4))
    layer.train()
    for _ in range(50):
        weight = layer.weight
    assert float(torch.linalg.matrix_norm(weight.double(), 2)) == pytest.approx(1, abs=0.02)


def test_eps_is_where_a_weight_counts_as_zero():
    w = 1e-3 * with_gap(5, 4)
    g = numbers(5, 4)
    for dim in (0, 1):
        small = normed(w, eps=1e-2, dim=dim)
        out = small.weight
        assert torch.equal(out, w)
        assert torch.equal(torch.autograd.grad(out, original(small), g)[0], g)
        assert torch.equal(jvp(norm_of(small), (w,), (g,))[1], g)
        assert float(torch.linalg.matrix_norm(normed(w, eps=1e-4).weight, 2)) > 0.99


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_weight_does_not_spoil_the_vectors(bad):
    layer = gti.nn.spectral_norm(nn.Linear(4, 3))
    good = original(layer).detach().clone()
    state = copy.deepcopy(dict(norm_of(layer).named_buffers()))
    with torch.no_grad():
        original(layer)[1, 2] = bad
    assert layer.weight.isnan().any()
    for name, buffer in norm_of(layer).named_buffers():
        assert torch.equal(buffer, state[name])
    with torch.no_grad():
        original(layer).copy_(good)
    assert layer.weight.isfinite().all()


@pytest.mark.parametrize("scale", [1e-11, 1e25])
def test_scales(scale):
    layer = normed(scale * with_gap(8, 6, dtype=torch.float32), n_power_iterations=20)
    assert float(torch.linalg.matrix_norm(layer.weight, 2)) == pytest.approx(1, abs=1e-5)


# ---- dtypes, autocast ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 30), (8, 3, 3, 3)])
def test_half_precision_sums_in_fp32(dtype, shape):
    w = with_gap(*shape, dtype=dtype)
    layer = normed(w, n_power_iterations=5)
    assert all(x.dtype == torch.float32 for x in layer.buffers())
    out = layer.weight
    v = norm_of(layer)._v.double()
    y = matrix(w).double() @ v
    sigma = y.norm()
    exact = (w.double() / sigma).to(dtype)
    assert out.dtype == dtype
    torch.testing.assert_close(out, exact, rtol=torch.finfo(dtype).eps, atol=0)
    g = numbers(*shape, dtype=dtype, seed=1)
    (got,) = torch.autograd.grad(out, original(layer), g)
    inner = (g.double() * out.double()).sum()
    expected = (g.double() - inner * torch.outer(y / sigma, v).view(shape)) / sigma
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    layer.to(dtype)  # rounds the buffers, too
    assert layer.weight.isfinite().all() and norm_of(layer)._v.dtype == torch.float32


def test_autocast_does_not_narrow_the_sums():
    layer = normed(with_gap(20, 10, dtype=torch.float32))
    other = copy.deepcopy(layer)
    g = numbers(20, 10, dtype=torch.float32)

    def transformed():
        w = original(layer).detach()
        return grad(lambda w: (norm_of(layer)(w) * g).sum())(w)

    for derivative in (
        lambda: torch.autograd.grad(layer.weight, original(layer), g)[0],
        transformed,
    ):
        with torch.autocast("cpu", torch.bfloat16):
            got = derivative()
        (expected,) = torch.autograd.grad(other.weight, original(other), g)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        assert norm_of(layer)._v.dtype == torch.float32
        torch.testing.assert_close(norm_of(layer)._v, norm_of(other)._v)


# ---- transforms and compilation ------------------------------------------------------------------


def test_functional_call_and_grad():
    layer = gti.nn.spectral_norm(nn.Linear(6, 4).double())
    x = numbers(3, 6)
    params = {name: p.detach().clone() for name, p in layer.named_parameters()}
    other = copy.deepcopy(layer)

    def loss(params):
        return functional_call(layer, params, (x,)).square().sum()

    for _ in range(3):
        got = grad(loss)(params)
        other.zero_grad()
        other(x).square().sum().backward()
        for name, p in other.named_parameters():
            torch.testing.assert_close(got[name], p.grad, rtol=1e-12, atol=1e-12)
        v = norm_of(layer)._v  # the warm start moves on, as a plain tensor
        assert not torch._C._functorch.is_functorch_wrapped_tensor(v)
        torch.testing.assert_close(v, norm_of(other)._v, rtol=1e-12, atol=1e-12)


def test_forward_mode_and_vmap_are_not_silently_zero():
    norm = SpectralNorm(numbers(5, 4)).eval()
    w, t = numbers(5, 4, seed=1), numbers(5, 4, seed=2)
    step = 1e-6
    expected = (norm(w + step * t) - norm(w - step * t)) / (2 * step)
    torch.testing.assert_close(jvp(norm, (w,), (t,))[1], expected, rtol=1e-7, atol=1e-7)
    ws = torch.stack([w, 2 * t, w + t], 1)
    out = vmap(norm, in_dims=1)(ws)
    torch.testing.assert_close(out, torch.stack([norm(x) for x in ws.unbind(1)]))
    per_item = vmap(grad(lambda w, t: (norm(w) * t).sum()), in_dims=(None, 0))(w, ws.movedim(1, 0))
    for got, direction in zip(per_item, ws.unbind(1)):
        p = w.clone().requires_grad_()
        (one,) = torch.autograd.grad(norm(p), p, direction)
        torch.testing.assert_close(got, one)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_fullgraph(training, backend):
    torch._dynamo.reset()
    layer = gti.nn.spectral_norm(nn.Linear(6, 4).double()).train(training)
    other, x = copy.deepcopy(layer), numbers(3, 6)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(3):
        layer.zero_grad()
        other.zero_grad()
        got, expected = compiled(x).square().sum(), other(x).square().sum()
        got.backward()
        expected.backward()
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(original(layer).grad, original(other).grad)
        torch.testing.assert_close(norm_of(layer)._v, norm_of(other)._v, rtol=1e-12, atol=1e-12)


def test_deterministic_mode_changes_nothing():
    w, g = with_gap(20, 10), numbers(20, 10)

    def run():
        layer = normed(w)
        out = layer.weight
        return out, torch.autograd.grad(out, original(layer), g)[0], norm_of(layer)._v

    expected = run()
    torch.use_deterministic_algorithms(True)
    assert all(map(torch.equal, run(), expected))


def test_a_gradient_penalty_goes_through_it():
    """Second derivatives of a network with respect to its input and then its weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    ours, theirs = copy.deepcopy(net), copy.deepcopy(net)
    for i in (0, 2):
        gti.nn.spectral_norm(ours[i])
        torch_spectral_norm(theirs[i], n_power_iterations=500)
    theirs(numbers(1, 5))
    ours.load_state_dict(theirs.state_dict())
    grads = []
    for model in (ours.eval(), theirs.eval()):
        x = numbers(6, 5).requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (slope.square().sum(1) - 1).square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) >= 3
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


# ---- what is moved through memory ----------------------------------------------------------------


class LargeResults(TorchDispatchMode):
    """Names of the ops that make a new tensor as large as the weight."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            fresh = isinstance(t, torch.Tensor) and t.numel() >= self.numel
            if fresh and t.untyped_storage().data_ptr() not in before:
                self.names.append(func.__name__.split(".")[0])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_new_weight_per_forward_and_no_copy(dtype):
    layer = normed(numbers(16, 3, 5, 5, dtype=dtype))
    with LargeResults(16 * 75) as made:
        out = layer.weight
    assert made.names == ["div"]
    if dtype == torch.float32:
        with LargeResults(16 * 75) as made:
            out.backward(torch.ones_like(out).contiguous())
        assert len([n for n in made.names if n != "ones_like"]) <= 2


def test_weights_it_cannot_take():
    with pytest.raises(ValueError, match="spectral_norm: weight must have a shape.*forward"):
        gti.nn.spectral_norm(nn.LazyLinear(4))
    layer = nn.Linear(3, 3)
    for bad in (torch.ones(()), torch.ones(3, 3, dtype=torch.int32)):
        layer.weight = nn.Parameter(bad, requires_grad=False)
        with pytest.raises(TypeError, match="spectral_norm: weight must have at least one dim"):
            gti.nn.spectral_norm(layer)
