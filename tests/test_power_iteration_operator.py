"""Operators given by their products: matrices, Jacobians, Hessians, attention maps, batches."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vjp, vmap

import gti_kernels as gti
from gti_kernels import testing

METHODS = ("cg", "power")
every_method = pytest.mark.parametrize("method", METHODS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def numbers(*shape, dtype=torch.float64, seed=0):
    return testing.numbers(*shape, dtype=dtype, device="cpu", seed=seed)


def with_gap(m: int, n: int, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    spectrum = 3.0 * 0.6 ** torch.arange(min(m, n), dtype=torch.float64)
    return testing.with_spectrum(spectrum, m, n, dtype=dtype, seed=seed)


def of_matrix(w: torch.Tensor, **options) -> gti.SingularTriples:
    return gti.power_iteration_operator(
        lambda x: w @ x, lambda y: w.mT @ y, w.shape, dtype=w.dtype, **options
    )


# ---- explicit matrices ---------------------------------------------------------------------------


@every_method
@every_dtype
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 1), (1, 9), (3, 7, 5), (2, 3, 5, 6)])
@pytest.mark.parametrize("k", [1, 3])
def test_matrices_against_svd(method, dtype, shape, k):
    if k > min(shape[-2:]):
        return
    *batch, m, n = shape
    count = math.prod(batch)
    w = torch.stack([with_gap(m, n, dtype, seed=i) for i in range(count)]).reshape(shape)
    w = w * torch.arange(1, count + 1, dtype=dtype).reshape(*batch, 1, 1)
    tol = 1e-10 if dtype == torch.float64 else 1e-5
    r = of_matrix(w, k=k, method=method, tol=tol)
    assert bool(r.converged.all()) and r.sigma.dtype == r.u.dtype == r.upper.dtype == dtype
    assert (r.sigma.shape, r.u.shape) == ((*batch, k), (*batch, m, k))
    assert (r.v.shape, r.steps.shape, r.upper.shape) == ((*batch, n, k), (*batch,), (*batch,))
    true = torch.linalg.svdvals(w.double())[..., :k]
    accuracy = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(r.sigma.double(), true, rtol=accuracy, atol=0)
    error = (w @ r.v - r.u * r.sigma.unsqueeze(-2)).norm(dim=-2)
    assert bool((error <= 1e-5 * true[..., :1]).all())
    eye = torch.eye(k, dtype=dtype)
    for x in (r.u, r.v):
        torch.testing.assert_close(x.mT @ x, eye.expand(*batch, k, k), rtol=0, atol=1e-5)


@every_method
@pytest.mark.parametrize("k", [1, 2])
def test_it_is_the_loop_of_power_iteration(method, k):
    """The same start, the same steps, the same numbers, whatever has stopped beside it."""
    w = numbers(4, 20, 15) * torch.tensor([1.0, 1.0, 0.0, 1.0])[:, None, None]
    w[1] = with_gap(20, 15)
    expected = gti.power_iteration(
        w, k=k, method=method, tol=1e-6, max_steps=60, seed=3, backend="reference"
    )
    got = of_matrix(w, k=k, method=method, tol=1e-6, max_steps=60, seed=3)
    assert got.steps.tolist() == expected.steps.tolist() and len(set(got.steps.tolist())) > 1
    assert torch.equal(got.converged, expected.converged)
    torch.testing.assert_close(got.sigma, expected.sigma, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.v, expected.v, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.residual, expected.residual, rtol=1e-3, atol=1e-12)


def test_what_has_stopped_is_handed_zeros():
    w = torch.stack([numbers(20, 20), torch.eye(20, dtype=torch.float64)])
    asked = []

    def matvec(x):
        asked.append(x.clone())
        return w @ x

    r = gti.power_iteration_operator(matvec, lambda y: w.mT @ y, w.shape, dtype=w.dtype)
    assert r.steps[1] == 1 < r.steps[0] == len(asked)
    assert all(x.shape == (2, 20, 1) for x in asked)
    assert asked[0].all() and not any(x[1].any() for x in asked[1:])


def test_steps_and_warm_start():
    w = testing.with_spectrum(1 - torch.arange(60.0) / 60, 70, 60)
    fixed = of_matrix(w, tol=0.0, max_steps=7)
    assert int(fixed.steps) == 7
    cold = of_matrix(w, tol=1e-8)
    again = of_matrix(w, tol=1e-6, start=cold)
    assert int(again.steps) == 1 and bool(again.converged)
    moved = w + 1e-3 * numbers(70, 60)
    warm, afresh = (of_matrix(moved, tol=1e-5, start=s) for s in (cold, None))
    assert int(warm.steps) < int(afresh.steps)
    of_tensor = gti.power_iteration(w, tol=1e-8)  # results of both are starts for both
    assert int(of_matrix(w, tol=1e-6, start=of_tensor).steps) == 1
    slow = of_matrix(w, tol=1e-14, max_steps=2)
    assert int(slow.steps) == 2 and not bool(slow.converged)


def test_upper_is_the_bound_that_always_holds():
    r = of_matrix(numbers(2, 5, 4))
    assert r.upper.tolist() == [math.inf, math.inf]


@pytest.mark.parametrize(
    "dtype,scale",
    [
        (torch.float32, 1e30),
        (torch.float32, 1e-30),
        (torch.float64, 1e250),
        (torch.float64, 1e-250),
    ],
)
def test_scales(dtype, scale):
    """Squares of σ² would leave the range: W is scaled after its first product."""
    unit = with_gap(12, 9)
    w = (unit * scale).to(dtype)
    for k in (1, 2):
        r = of_matrix(w, tol=1e-5, k=k)
        assert bool(r.converged) and int(r.steps) > 1
        true = torch.linalg.svdvals(unit)[:k] * scale
        torch.testing.assert_close(r.sigma.double(), true, rtol=1e-5, atol=0)


@every_method
def test_a_zero_operator(method):
    r = of_matrix(torch.zeros(3, 5, 4), method=method, k=2)
    assert not r.sigma.any() and bool(r.converged.all()) and not r.residual.any()
    eye = torch.eye(2).expand(3, 2, 2)
    torch.testing.assert_close(r.u.mT @ r.u, eye)
    torch.testing.assert_close(r.v.mT @ r.v, eye)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_operator_is_nan_and_the_others_are_right(bad):
    w = torch.stack([with_gap(6, 5, seed=i) for i in range(3)])
    expected = of_matrix(w)
    w[1, 2, 3] = bad
    r = of_matrix(w)
    for i in range(3):
        one = (r.sigma[i], r.u[i], r.v[i], r.residual[i], r.upper[i])
        if i == 1:
            assert all(bool(x.isnan().all()) for x in one) and not bool(r.converged[i])
        else:
            assert torch.equal(r.sigma[i], expected.sigma[i]) and bool(r.converged[i])
            assert torch.equal(r.u[i], expected.u[i]) and torch.equal(r.v[i], expected.v[i])


def test_an_operator_that_goes_bad_later():
    calls = []

    def matvec(x):
        calls.append(1)
        return w @ x if len(calls) < 3 else torch.full_like(w @ x, math.nan)

    w = numbers(8, 8)
    r = gti.power_iteration_operator(matvec, lambda y: w.mT @ y, w.shape, dtype=w.dtype)
    assert bool(r.sigma.isnan().all()) and int(r.steps) == 3 and not bool(r.converged)


def test_an_empty_batch():
    def never(x):
        raise AssertionError("nothing to multiply")

    r = gti.power_iteration_operator(never, never, (2, 0, 5, 4), k=2)
    assert [tuple(x.shape) for x in r[:4]] == [(2, 0, 2), (2, 0, 5, 2), (2, 0, 4, 2), (2, 0, 2)]
    assert r.steps.shape == r.converged.shape == r.upper.shape == (2, 0)


# ---- what it is for ------------------------------------------------------------------------------


def test_the_jacobian_of_a_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 6)).double()
    x = numbers(9)
    dense = torch.func.jacrev(net)(x)
    pull = vjp(net, x)[1]
    r = gti.power_iteration_operator(
        vmap(lambda t: jvp(net, (x,), (t,))[1], in_dims=-1, out_dims=-1),
        vmap(lambda t: pull(t)[0], in_dims=-1, out_dims=-1),
        (6, 9),
        k=3,
        tol=1e-9,
        dtype=torch.float64,
    )
    assert bool(r.converged)
    torch.testing.assert_close(r.sigma, torch.linalg.svdvals(dense)[:3], rtol=1e-12, atol=0)
    assert not any(t.requires_grad for t in r)


def test_jacobians_at_many_points_in_one_call():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    xs = numbers(7, 5)
    dense = vmap(torch.func.jacrev(net))(xs)
    pull = vjp(vmap(net), xs)[1]
    r = gti.power_iteration_operator(
        lambda t: jvp(vmap(net), (xs,), (t[..., 0],))[1].unsqueeze(-1),
        lambda t: pull(t[..., 0])[0].unsqueeze(-1),
        (7, 4, 5),
        tol=1e-9,
        dtype=torch.float64,
    )
    assert bool(r.converged.all())
    torch.testing.assert_close(r.sigma, torch.linalg.svdvals(dense)[:, :1], rtol=1e-12, atol=0)


def test_the_hessian_of_a_loss_through_double_backward():
    """Indefinite: σ is the largest |eigenvalue|, and u·v has its sign."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = numbers(10, 3), numbers(10, 2)
    parameters = list(net.parameters())
    sizes = [p.numel() for p in parameters]

    def loss(flat):
        pieces = [t.view_as(p) for t, p in zip(flat.split(sizes), parameters)]
        names = [name for name, _ in net.named_parameters()]
        return (functional_call(net, dict(zip(names, pieces)), (x,)) - y).square().mean()

    point = torch.cat([p.detach().flatten() for p in parameters])
    eigenvalues = torch.linalg.eigvalsh(torch.func.hessian(loss)(point))
    top = eigenvalues[eigenvalues.abs().argmax()]

    def matvec(t):  # records a graph of its own in each call
        at = point.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(at), at, create_graph=True)
        return torch.autograd.grad(slope @ t[:, 0], at)[0].unsqueeze(-1)

    n = point.numel()
    for sign in (1.0, -1.0):
        r = gti.power_iteration_operator(
            lambda t, sign=sign: sign * matvec(t), None, (n, n), tol=1e-9, dtype=torch.float64
        )
        assert bool(r.converged) and float(r.sigma) == pytest.approx(float(top.abs()), rel=1e-10)
        assert float((r.u * r.v).sum()) == pytest.approx(sign * float(top.sign()), abs=1e-6)


def test_attention_maps():
    q, k = numbers(2, 3, 10, 4), numbers(2, 3, 10, 4, seed=1)
    attention = (q @ k.mT / 2).softmax(-1)
    r = of_matrix(attention, k=2, tol=1e-9)
    assert bool(r.converged.all())
    torch.testing.assert_close(
        r.sigma, torch.linalg.svdvals(attention)[..., :2], rtol=1e-12, atol=0
    )


# ---- the modes of torch --------------------------------------------------------------------------


def test_no_graph_is_kept():
    w = numbers(6, 5).requires_grad_()
    products = []

    def matvec(x):
        y = w @ x
        assert y.requires_grad and torch.is_grad_enabled()
        products.append(weakref.ref(y))
        return y

    r = gti.power_iteration_operator(matvec, lambda y: w.mT @ y, (6, 5), dtype=w.dtype)
    assert not any(t.requires_grad for t in r)
    gc.collect()
    assert products and all(product() is None for product in products)


def test_inside_a_transform_it_refuses_a_silent_zero():
    w = numbers(4, 4)
    for transform in (
        lambda: grad(lambda w: of_matrix(w).sigma.sum())(w),
        lambda: jvp(lambda w: of_matrix(w).sigma, (w,), (w,)),
        lambda: vmap(lambda w: of_matrix(w).sigma)(w.expand(2, 4, 4)),
    ):
        with pytest.raises(RuntimeError, match="power_iteration_operator cannot be transformed"):
            transform()


def test_autocast_is_left_to_the_functions():
    w = with_gap(20, 20, torch.float32)
    expected = of_matrix(w, tol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(
            TypeError, match="matvec must return dtype torch.float32, got.*bfloat16"
        ):
            of_matrix(w)

        def exact(x):
            return (w.unsqueeze(-1) * x.unsqueeze(0)).sum(1)

        def exact_transpose(y):
            return (w.unsqueeze(-1) * y.unsqueeze(1)).sum(0)

        got = gti.power_iteration_operator(exact, exact_transpose, (20, 20), tol=1e-6)
    torch.testing.assert_close(got.sigma, expected.sigma, rtol=1e-6, atol=0)
    assert bool(got.converged)


def test_a_function_may_compute_in_half_precision():
    w = with_gap(30, 20, torch.float32)
    half = w.bfloat16()
    r = gti.power_iteration_operator(
        lambda x: (half @ x.bfloat16()).float(),
        lambda y: (half.T @ y.bfloat16()).float(),
        (30, 20),
        tol=2e-2,
    )
    assert bool(r.converged) and float(r.sigma) == pytest.approx(3.0, rel=2e-2)


def test_torch_compile_goes_around_it():
    torch._dynamo.reset()
    w = with_gap(8, 6)
    compiled = torch.compile(lambda w: of_matrix(2.0 * w, tol=1e-8).sigma, backend="aot_eager")
    torch.testing.assert_close(compiled(w), of_matrix(2.0 * w, tol=1e-8).sigma)


# ---- errors --------------------------------------------------------------------------------------

W = with_gap(5, 4)


def product(x):
    return W @ x


def transpose(y):
    return W.T @ y


CALLS = {
    "shape of one axis": ((product, transpose, (5,)), {}, ValueError, r"shape must be \(\.\.\., m"),
    "shape of floats": ((product, transpose, (5.0, 4)), {}, ValueError, "shape must be"),
    "k too large": ((product, transpose, (5, 4)), {"k": 5}, ValueError, "between 1 and.* 4, got 5"),
    "k of another type": ((product, transpose, (5, 4)), {"k": 1.0}, ValueError, "k must be"),
    "method": ((product, transpose, (5, 4)), {"method": "qr"}, ValueError, "method must be"),
    "tol": ((product, transpose, (5, 4)), {"tol": math.nan}, ValueError, "tol must be finite"),
    "symmetric but oblong": ((product, None, (5, 4)), {}, ValueError, "rmatvec=None says"),
    "half": ((product, transpose, (5, 4)), {"dtype": torch.bfloat16}, TypeError, "inside matvec"),
    "dtype returned": (
        (lambda x: product(x).float(), transpose, (5, 4)),
        {},
        TypeError,
        r"matvec must return dtype torch.float64, got torch.float32. Convert",
    ),
    "dtype returned by rmatvec": (
        (product, lambda y: transpose(y).float(), (5, 4)),
        {},
        TypeError,
        "rmatvec must return dtype",
    ),
    "vectors for columns": (
        (lambda x: product(x)[:, 0], transpose, (5, 4)),
        {},
        ValueError,
        r"matvec must return shape \(5, 1\) for.*\(4, 1\), got \(5,\).*torch.vmap",
    ),
    "rmatvec's shape": (
        (product, lambda y: y, (5, 4)),
        {},
        ValueError,
        r"rmatvec must return shape \(4, 1\)",
    ),
    "no tensor": (
        (lambda x: 1.0, transpose, (5, 4)),
        {},
        TypeError,
        "must return a dense tensor, got fl",
    ),
    "sparse": (
        (lambda x: product(x).to_sparse(), transpose, (5, 4)),
        {},
        TypeError,
        "matvec must return a dense tensor, got torch.sparse_coo",
    ),
    "no function": ((None, transpose, (5, 4)), {}, TypeError, "matvec must be a function, got N"),
    "a matrix": ((product, W.T, (5, 4)), {}, TypeError, "rmatvec must be a function, got Tensor"),
    "shape of a number": ((product, transpose, 5), {}, ValueError, "shape must be .*, got 5"),
    "k of a bool": ((product, transpose, (5, 4)), {"k": True}, ValueError, "k must be"),
    "meta": ((product, transpose, (5, 4)), {"device": "meta"}, ValueError, "that holds numbers"),
    "device": (
        (lambda x: product(x).to("meta"), transpose, (5, 4)),
        {},
        ValueError,
        "matvec must return tensors on cpu, got meta. Pass device=",
    ),
    "start": ((product, transpose, (5, 4)), {"start": W}, TypeError, "start must be an earlier"),
    "start of another size": (
        (product, transpose, (5, 4)),
        {"start": gti.power_iteration(torch.eye(3))},
        ValueError,
        "1 vectors of length 4",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_errors(name):
    args, options, error, message = CALLS[name]
    with pytest.raises(error, match=message):
        gti.power_iteration_operator(*args, **{"dtype": torch.float64, **options})


@pytest.mark.parametrize("seed", range(5))
def test_a_transpose_that_is_none(seed):
    w = numbers(12, 12, seed=seed)
    wrong = {
        "rmatvec must be the product with the transpose": lambda y: w @ y,
        "the transpose of the operator": lambda y: -(w.T @ y),
        "as with dropout": nn.Dropout(0.5),
    }
    for words, rmatvec in wrong.items():
        with pytest.raises(ValueError, match=words):
            gti.power_iteration_operator(lambda x: w @ x, rmatvec, (12, 12), dtype=w.dtype)
    with pytest.raises(ValueError, match="W is not symmetric: pass rmatvec"):
        gti.power_iteration_operator(lambda x: w @ x, None, (12, 12), dtype=w.dtype)


def test_a_function_may_write_to_its_argument():
    d = torch.arange(1.0, 5.0, dtype=torch.float64).unsqueeze(1)
    r = gti.power_iteration_operator(
        lambda x: x.mul_(d), lambda y: y.mul_(d), (4, 4), dtype=torch.float64, tol=1e-8
    )
    assert float(r.sigma) == pytest.approx(4.0) and bool(r.converged)


def test_the_type_and_device_are_those_of_torch_by_default():
    w = torch.eye(3)
    assert gti.power_iteration_operator(lambda x: w @ x, None, (3, 3)).v.dtype == torch.float32
    r = gti.power_iteration_operator(lambda x: w @ x, None, (3, 3), device="cpu")
    assert r.v.device.type == "cpu"
