"""What torch expects of an op: schemas, compilation, version counters, derivatives or a refusal."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import gti_kernels as gti
from gti_kernels import backends, testing

OPS = torch.ops.gti_kernels
BACKENDS = ("cpu", "reference")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def numbers(*shape, dtype=torch.float64, seed=0):
    return testing.numbers(*shape, dtype=dtype, device="cpu", seed=seed)


def top(w: torch.Tensor) -> torch.Tensor:
    """σ₁ by the library, tight enough to differentiate."""
    return gti.top_singular_values(w, tol=1e-11).sum()


# ---- registration --------------------------------------------------------------------------------

MIXED = ([numbers(3), numbers(4, 2, dtype=torch.float32)], [numbers(3), numbers(4, 2).float()])
ARGUMENTS = {
    "kick_": (*MIXED, 0.5, 0.9, "auto"),
    "drift_": (*MIXED, 0.5, [0.5, 2.0], [], "auto"),
    "kick_drift_": (*MIXED, [numbers(3), numbers(4, 2).float()], 0.5, 0.1, [], [], 0.9, "auto"),
    "kinetic_energy": (MIXED[0], [1.0, 0.5], [], "auto"),
    "two_form": ([numbers(3, 5)], [numbers(3, 5, seed=1)], True, False, "auto"),
    "gram": ([numbers(3, 5)], [numbers(2, 5)], [numbers(5)], False, True, False, "auto"),
    "power_iteration": (
        [numbers(3, 5), numbers(4, 2, 3).float()],
        *(False, 1, "cg", 5, 0.0, [], 0, "auto"),
    ),
}
ARGUMENTS["kick_drift_"] = (
    *ARGUMENTS["kick_drift_"][:5],
    *([], [numbers(3).abs(), numbers(4, 2).abs().float()], 0.9, "auto"),
)


@pytest.mark.parametrize("op", ARGUMENTS)
def test_opcheck(op):
    torch.library.opcheck(getattr(OPS, op).default, copy.deepcopy(ARGUMENTS[op]))


@pytest.mark.parametrize("metric", [False, True])
def test_fake_results_have_the_shapes_of_the_real_ones(metric):
    def shapes(tree):
        flat, _ = torch.utils._pytree.tree_flatten(tree)
        return [(t.shape, t.dtype) for t in flat if isinstance(t, torch.Tensor)]

    def run():
        q = [torch.ones(3), torch.ones(4, 2, dtype=torch.bfloat16)]
        p, w = [torch.ones_like(t) for t in q], torch.ones(2, 4, 6, dtype=torch.bfloat16)
        gti.leapfrog_(q, p, lambda q: [torch.zeros_like(t) for t in q], 0.1, steps=2)
        z = [torch.ones(5, 2, 3), torch.ones(5, 4, dtype=torch.float16)]
        return (
            gti.kick_drift_(q, p, [torch.ones_like(t) for t in q], 0.1, 0.1),
            gti.kinetic_energy(p),
            gti.two_form(z, z, metric=metric),
            gti.two_form(z[0], z[0], metric=metric),
            gti.gram(z[0], weight=torch.ones(3)),
            gti.power_iteration(w, k=2),
            gti.power_iteration([w, torch.ones(3, 3, dtype=torch.float64)]),
            gti.top_singular_values(w),
        )

    from torch._subclasses.fake_tensor import FakeTensorMode

    real = shapes(run())
    with FakeTensorMode():
        assert shapes(run()) == real


# ---- compilation ---------------------------------------------------------------------------------


def step(q, p):
    gti.leapfrog_(q, p, lambda q: [2.0 * t for t in q], 0.1, steps=2, damping=0.3, inv_mass=0.5)
    gti.leapfrog_(q, p, lambda q: [2.0 * t for t in q], 0.1, order=4, inv_mass=[0.5, 1.0])
    gti.kick_(p, [t * t for t in q], 0.25, damp=0.5)
    gti.drift_(q, p, 0.5, inv_mass=[t.abs() + 1.0 for t in p])
    energy = gti.kick_drift_(q, p, [t + 1.0 for t in q], 0.1, 0.2)
    return energy + gti.kinetic_energy(p, inv_mass=2.0)


def geometry(z, w):
    form = gti.two_form(z, z.flip(0), metric=True)
    triples = gti.power_iteration([w, w.T], tol=1e-12)
    return form.omega, form.error_bound, form.metric, triples.sigma, triples.steps, triples.u[1]


def test_compiled_steps_are_the_eager_ones():
    q, p = [numbers(5), numbers(3, 2, seed=1)], [numbers(5, seed=2), numbers(3, 2, seed=3)]
    qc, pc = copy.deepcopy(q), copy.deepcopy(p)
    energy = step(q, p)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(qc, pc)
    for a, b in zip([energy, *q, *p], [compiled, *qc, *pc]):
        assert torch.equal(a, b)


def test_a_compiled_step_reads_its_factors_anew_and_is_not_compiled_again():
    q, p, g = numbers(5), numbers(5, seed=1), numbers(5, seed=2)
    eager_q, eager_p = q.clone(), p.clone()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def walk(q, p, g, h, damp):
        gti.kick_(p, g, h, damp=damp)
        gti.drift_(q, p, h)
        return gti.kick_drift_(q, p, g, h, 0.5, damp=damp)

    compiled = 0
    for i in range(4):
        h, damp = (torch.tensor(x, dtype=torch.float64) for x in (0.1 * i, 0.9 - 0.1 * i))
        energy = walk(q, p, g, h, damp)
        gti.kick_(eager_p, g, 0.1 * i, damp=0.9 - 0.1 * i)
        gti.drift_(eager_q, eager_p, 0.1 * i)
        expected = gti.kick_drift_(eager_q, eager_p, g, 0.1 * i, 0.5, damp=0.9 - 0.1 * i)
        assert torch.equal(q, eager_q) and torch.equal(p, eager_p) and torch.equal(energy, expected)
        compiled = compiled or counter.frame_count
    assert counter.frame_count == compiled


def test_opcheck_with_factors_as_tensors():
    for op in ("kick_", "drift_", "kick_drift_"):
        args = [
            torch.tensor(x, dtype=torch.float64) if isinstance(x, float) else x
            for x in copy.deepcopy(ARGUMENTS[op])
        ]
        torch.library.opcheck(getattr(OPS, op).scalars, tuple(args))


def test_compiled_geometry_is_the_eager_one():
    args = numbers(4, 6), numbers(7, 5)
    compiled = torch.compile(geometry, fullgraph=True, backend="aot_eager")(*args)
    assert all(map(torch.equal, geometry(*args), compiled))


def test_inductor_compiles_an_op():
    p = numbers(5)
    compiled = torch.compile(lambda p: gti.kinetic_energy([p], inv_mass=0.5), fullgraph=True)
    assert torch.equal(compiled(p), gti.kinetic_energy(p, inv_mass=0.5))


def test_one_compilation_serves_all_shapes():
    def two(w):  # with the default tol, which is a symbol where shapes are
        return gti.top_singular_values(w, k=2).sum()

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(two, fullgraph=True, dynamic=True, backend=counter)
    for shape in [(5, 7), (6, 8), (9, 4), (30, 40)]:
        w = numbers(*shape).requires_grad_()
        (got,) = torch.autograd.grad(compiled(w), w)
        torch.testing.assert_close(got, grad(two)(w.detach()))
    assert counter.frame_count == 1


def normalized(w: torch.Tensor) -> torch.Tensor:
    return NORM(w).square().sum()


NORM = gti.nn.SpectralNorm(numbers(4, 5)).eval()
#: The refusals of ops/library.py, by name or by their words: dynamo shows either.
REFUSED = "refuse_lost_derivatives|refuse_derivative|cannot trace torch.func|has no derivative"
TRANSFORMS = {
    "grad": lambda f: grad(f),
    "jvp": lambda f: lambda w: jvp(f, (w,), (torch.ones_like(w),))[1],
    "vmap": lambda f: lambda w: vmap(f)(torch.stack([w, 2 * w])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("f", [top, normalized])
def test_a_transform_inside_a_compiled_function_is_refused(transform, f):
    torch.compiler.reset()
    with pytest.raises(Exception, match=REFUSED):
        torch.compile(TRANSFORMS[transform](f), backend="eager", fullgraph=True)(numbers(4, 5))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_inside_a_compiled_function_is_left_to_eager_mode(transform):
    def broken(w):
        torch._dynamo.graph_break()
        return w.sin().sum()

    torch.compiler.reset()
    transformed, w = TRANSFORMS[transform](top), numbers(4, 5)
    try:
        torch.compile(TRANSFORMS[transform](broken), backend="eager")(w)
    except AssertionError:
        pytest.skip("this torch leaves nothing inside such a transform to eager mode")
    torch.testing.assert_close(torch.compile(transformed, backend="eager")(w), transformed(w))


def test_forward_mode_around_a_compiled_function_is_no_silent_zero():
    torch.compiler.reset()
    w, compiled = numbers(4, 5), torch.compile(top, backend="eager")
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(compiled(forward_ad.make_dual(w, w))).tangent
    torch.testing.assert_close(tangent, top(w))


@pytest.mark.parametrize(
    "f",
    [
        lambda w: gti.power_iteration(w).sigma.sum(),
        lambda w: gti.two_form(w, w.flip(0)).omega.sum(),
    ],
)
def test_an_op_without_derivative_refuses_in_a_compiled_function_too(f):
    torch.compiler.reset()
    with pytest.raises(Exception, match=REFUSED):
        torch.compile(grad(f), backend="eager", fullgraph=True)(numbers(4, 5))


@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4)])
def test_compiled_singular_values_have_their_gradient(shape):
    w = numbers(*shape).requires_grad_()
    compiled = torch.compile(
        lambda w: gti.top_singular_values(w, tol=1e-11).square().sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    (got,) = torch.autograd.grad(compiled(w), w)
    (expected,) = torch.autograd.grad(torch.linalg.svdvals(w)[..., 0].square().sum(), w)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


# ---- version counters ----------------------------------------------------------------------------


@every_backend
def test_writing_bumps_version_counters(backend):
    for q, p in (
        (torch.ones(3), torch.ones(3)),
        ([torch.ones(3), torch.ones(2)], [torch.ones(3), torch.ones(2)]),
    ):
        ones = (
            torch.ones_like(p) if isinstance(p, torch.Tensor) else [torch.ones_like(t) for t in p]
        )
        lists = q if isinstance(q, list) else [q], p if isinstance(p, list) else [p]
        versions = lambda: [[t._version for t in ts] for ts in lists]  # noqa: E731

        def check(call, q_written, p_written):
            before = versions()
            call()
            for written, old, new in zip((q_written, p_written), before, versions()):
                assert all((n > o) == written for o, n in zip(old, new))

        check(lambda: gti.kick_(p, ones, 0.1, backend=backend), False, True)
        check(lambda: gti.drift_(q, p, 0.1, backend=backend), True, False)
        check(lambda: gti.kick_drift_(q, p, ones, 0.1, 0.1, backend=backend), True, True)
        check(lambda: gti.leapfrog_(q, p, lambda q: ones, 0.1, backend=backend), True, True)
        check(lambda: gti.kinetic_energy(p, backend=backend), False, False)


@every_backend
@pytest.mark.parametrize(
    "write",
    [
        lambda x, b: gti.kick_(x, torch.ones(3), 0.1, backend=b),
        lambda x, b: gti.drift_(x, torch.ones(3), 0.1, backend=b),
        lambda x, b: gti.kick_drift_(x, torch.ones(3), torch.ones(3), 0.1, 0.1, backend=b),
        lambda x, b: gti.kick_drift_(torch.ones(3), x, torch.ones(3), 0.1, 0.1, backend=b),
    ],
)
def test_backward_through_an_overwritten_tensor_raises(write, backend):
    weight, x = torch.ones(3, requires_grad=True), torch.ones(3)
    loss = (weight * x).sum()  # saves x
    write(x, backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- no derivative: a refusal, never a silent zero -----------------------------------------------

OTHER = torch.ones(4)
REFUSALS = {
    "kick_ p": lambda t: gti.kick_(t, OTHER, 0.1),
    "kick_ grad": lambda t: gti.kick_(OTHER.clone(), t, 0.1),
    "drift_ q": lambda t: gti.drift_(t, OTHER, 0.1),
    "drift_ p": lambda t: gti.drift_(OTHER.clone(), t, 0.1),
    "drift_ inv_mass": lambda t: gti.drift_(OTHER.clone(), OTHER, 0.1, inv_mass=t),
    "kick_drift_ q": lambda t: gti.kick_drift_(t, OTHER.clone(), OTHER, 0.1, 0.1),
    "kick_drift_ grad": lambda t: gti.kick_drift_(OTHER.clone(), OTHER.clone(), t, 0.1, 0.1),
    "kick_drift_ inv_mass": lambda t: gti.kick_drift_(
        OTHER.clone(), OTHER.clone(), OTHER, 0.1, 0.1, inv_mass=[t]
    ),
    "kinetic_energy p": lambda t: gti.kinetic_energy([t]),
    "kinetic_energy inv_mass": lambda t: gti.kinetic_energy(OTHER, inv_mass=t),
    "two_form dq": lambda t: gti.two_form(t.reshape(2, 2), OTHER.reshape(2, 2)),
    "two_form dp": lambda t: gti.two_form(OTHER.reshape(2, 2), t.reshape(2, 2)),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_an_argument_that_requires_grad_is_refused_outside_no_grad(case):
    t = torch.ones(4, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"^{case.split()[0]} has no derivative.*requires grad"):
        REFUSALS[case](t)
    assert torch.equal(t, torch.ones(4)) and t._version == 0
    with torch.no_grad():
        REFUSALS[case](t)


@pytest.mark.parametrize("case", [*REFUSALS, "power_iteration weights"])
@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap", "dual"])
def test_transforms_are_refused(case, transform):
    calls = {
        **REFUSALS,
        "power_iteration weights": lambda t: gti.power_iteration(t.reshape(2, 2)),
    }
    ones = torch.ones(4)

    def call(t):
        calls[case](t)
        return t.sum()

    with pytest.raises(RuntimeError, match=f"^{case.split()[0]} (has no|cannot be transformed)"):
        if transform == "jvp":
            jvp(call, (ones,), (torch.ones(4),))
        elif transform == "grad":
            grad(call)(ones)
        elif transform == "vmap":
            vmap(call)(torch.ones(2, 4))
        else:
            with forward_ad.dual_level():
                call(forward_ad.make_dual(ones, torch.ones(4)))


def test_power_iteration_is_detached():
    r = gti.power_iteration(numbers(4, 3).requires_grad_())
    assert not any(t.requires_grad for t in r)


def test_leapfrog_takes_parameters():
    q = nn.Parameter(torch.ones(3))
    p = torch.zeros(3)
    gti.leapfrog_(q, p, lambda q: torch.autograd.grad(q.square().sum(), q)[0], 0.5)
    assert torch.equal(p, torch.full((3,), -0.875)) and q.is_leaf and q.requires_grad
    torch.testing.assert_close(q.detach(), torch.full((3,), 0.75))


# ---- the derivative of singular values -----------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "backend"),
    [((5, 4), "cpu"), ((5, 4), "reference"), ((3, 4, 5), "cpu"), ((2, 2, 3, 4), "cpu")],
)
def test_gradcheck_of_a_tensor(shape, backend):
    assert torch.autograd.gradcheck(
        lambda w: gti.top_singular_values(w, tol=1e-11, backend=backend),
        numbers(*shape).requires_grad_(),
        check_forward_ad=True,
    )


@every_backend
def test_gradcheck_of_a_list_with_a_convolution(backend):
    inputs = [numbers(4, 3).requires_grad_(), numbers(3, 2, 2, 2, seed=1).requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda *w: gti.top_singular_values(list(w), tol=1e-11, backend=backend),
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
    )


def test_gradcheck_of_several_singular_values():
    w = testing.with_spectrum(torch.tensor([4.0, 2.0, 1.0]), 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: gti.top_singular_values(w, k=2, tol=1e-12), w)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 4, 3)])
def test_second_derivatives(shape):
    w = numbers(*shape).requires_grad_()

    def top_two(w):
        return gti.top_singular_values(w, k=2, tol=1e-13, max_steps=2000)

    assert torch.autograd.gradgradcheck(top_two, w, check_fwd_over_rev=True)


def test_derivatives_of_higher_order_against_svdvals():
    w, t = numbers(4, 3), numbers(4, 3, seed=1)

    def ours(w):
        return gti.top_singular_values(w, tol=1e-13, max_steps=2000).pow(3).sum()

    def expected(w):
        return torch.linalg.svdvals(w)[:1].pow(3).sum()

    for outer, inner in ((jacrev, jacrev), (jacfwd, jacrev), (jacrev, jacfwd)):
        torch.testing.assert_close(outer(inner(ours))(w), hessian(expected)(w))

    def third(f):
        return grad(lambda w: (grad(lambda w: (grad(f)(w) * t).sum())(w) * t).sum())(w)

    torch.testing.assert_close(third(ours), third(expected))
    batch = numbers(3, 4, 3, seed=2)
    torch.testing.assert_close(vmap(hessian(ours))(batch), vmap(hessian(expected))(batch))


def test_second_derivatives_of_a_list():
    ws = [numbers(4, 3, 2, 2), numbers(6, 2), numbers(7, 9).bfloat16()]
    live = [ws[0].requires_grad_(), ws[2].requires_grad_()]  # the other is frozen

    def product(sigma):
        loss = sum(s.double().square() for s in sigma)
        grads = torch.autograd.grad(loss, live, create_graph=True)
        return torch.autograd.grad(sum(g.double().sum() for g in grads), live)

    got = product(gti.top_singular_values(ws, tol=1e-9)[:, 0])
    expected = product([torch.linalg.svdvals(w.flatten(1).double())[0] for w in ws])
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(got[1], expected[1], rtol=0.02, atol=0.02)


def test_forward_mode_inside_forward_mode():
    with pytest.raises(RuntimeError, match="jacfwd inside of another"):
        jacfwd(jacfwd(top))(numbers(3, 4))
    w, x = numbers(3, 4), numbers(3, seed=1)

    def of_input(x):  # the weight has no tangents
        return top(w) * x.pow(3).sum()

    torch.testing.assert_close(jacfwd(jacfwd(of_input))(x), hessian(of_input)(x))

    def forward_only(w, s):
        return jacfwd(lambda s: vmap(jacfwd(jacfwd(normalized)))(w * s))(s)

    def reverse_only(w, s):
        return jacrev(lambda s: vmap(jacrev(jacrev(normalized)))(w * s))(s)

    args = numbers(2, 4, 5), torch.tensor(2.0, dtype=torch.float64)
    torch.testing.assert_close(forward_only(*args), reverse_only(*args))


def test_a_dual_level_around_a_first_derivative():
    w, t = numbers(4, 3).requires_grad_(), numbers(4, 3, seed=1)
    products = []
    for sigma in (lambda w: gti.top_singular_values(w, tol=1e-13), torch.linalg.svdvals):
        with forward_ad.dual_level():
            loss = sigma(forward_ad.make_dual(w, t))[0] ** 3
            (g,) = torch.autograd.grad(loss, w)  # no graph of it is made
            products.append(forward_ad.unpack_dual(g).tangent)
    torch.testing.assert_close(*products)


def test_a_compiled_hessian_left_to_eager_mode():
    def product(w):
        return (hessian(top)(w) * t).sum((-1, -2))

    w, t = numbers(4, 3), numbers(4, 3, seed=1)
    torch.testing.assert_close(torch.compile(product, backend="eager")(w), product(w))


def test_frozen_weights_are_not_kept_for_backward():
    with torch.inference_mode():
        inferred = numbers(3, 3)
    w, frozen = numbers(4, 3).requires_grad_(), numbers(5, 2)
    loss = gti.top_singular_values([w, inferred, frozen]).sum()
    frozen.zero_()
    (got,) = torch.autograd.grad(loss, w)
    torch.testing.assert_close(got, grad(top)(w.detach()), rtol=1e-3, atol=1e-3)


def test_a_layer_outlives_a_vmap_over_its_weight():
    layer = gti.nn.spectral_norm(nn.Linear(3, 4, dtype=torch.float64))
    name, x = "parametrizations.weight.original", numbers(3)
    before = layer.parametrizations.weight[0]._v
    vmap(lambda w: functional_call(layer, {name: w}, x))(numbers(2, 4, 3))
    assert layer.parametrizations.weight[0]._v is before
    assert layer(x).isfinite().all()


def test_func_grad_and_jvp_against_finite_differences():
    w, direction = numbers(5, 4), numbers(5, 4, seed=1)
    h = 1e-6
    slope = (top(w + h * direction) - top(w - h * direction)) / (2 * h)
    torch.testing.assert_close((grad(top)(w) * direction).sum(), slope, rtol=1e-7, atol=0)
    torch.testing.assert_close(jvp(top, (w,), (direction,))[1], slope, rtol=1e-7, atol=0)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_vmap_over_any_axis(axis):
    batch = numbers(3, 5, 4)
    sigma = torch.linalg.svdvals(batch)[:, 0]
    torch.testing.assert_close(vmap(top, in_dims=axis)(batch.movedim(0, axis)), sigma)
    torch.testing.assert_close(
        vmap(grad(top))(batch), torch.stack([grad(top)(w) for w in batch]), rtol=1e-8, atol=1e-8
    )


def test_vmap_with_shared_and_nested_weights():
    a, b = numbers(3, 5, 4), numbers(4, 2, seed=1)

    def both(a, b):
        return gti.top_singular_values([a, b], tol=1e-11)[:, 0]

    expected = torch.stack(
        [torch.linalg.svdvals(a)[:, 0], torch.linalg.svdvals(b)[0].expand(3)], dim=1
    )
    torch.testing.assert_close(vmap(both, in_dims=(0, None))(a, b), expected)
    stacked = numbers(2, 3, 5, 4)
    torch.testing.assert_close(
        vmap(vmap(top), in_dims=1, out_dims=1)(stacked), torch.linalg.svdvals(stacked)[..., 0]
    )
    tangents = numbers(3, 5, 4, seed=2)
    together = vmap(lambda w, t: jvp(top, (w,), (t,))[1])(a, tangents)
    one_by_one = torch.stack([jvp(top, (w,), (t,))[1] for w, t in zip(a, tangents)])
    torch.testing.assert_close(together, one_by_one, rtol=1e-8, atol=1e-8)


def test_used_twice_in_one_graph():
    w = numbers(5, 4).requires_grad_()
    (once,) = torch.autograd.grad(top(w), w)
    (product,) = torch.autograd.grad(top(w) * top(2.0 * w), w)
    torch.testing.assert_close(product, 4.0 * top(w).detach() * once)


@every_backend
def test_under_autocast(backend):
    w = numbers(40, 30, dtype=torch.float32).requires_grad_()
    expected = torch.linalg.svdvals(w)[0]
    (expected_grad,) = torch.autograd.grad(expected, w)
    with torch.autocast("cpu", torch.bfloat16):
        sigma = gti.top_singular_values(w, tol=1e-6, backend=backend)
        (got,) = torch.autograd.grad(sigma.sum(), w)
    torch.testing.assert_close(sigma.squeeze(), expected)
    torch.testing.assert_close(got, expected_grad, rtol=0, atol=1e-4)


@every_backend
def test_half_precision_weights(backend):
    w = testing.with_spectrum(0.5 ** torch.arange(6.0), 8, 6, dtype=torch.bfloat16).requires_grad_()
    sigma = gti.top_singular_values(w, tol=1e-6, backend=backend)
    sigma.sum().backward()
    u, s, v = torch.linalg.svd(w.detach().double())
    torch.testing.assert_close(sigma[0].double(), s[0], rtol=1e-6, atol=0)
    assert w.grad.dtype == torch.bfloat16
    torch.testing.assert_close(w.grad.double(), torch.outer(u[:, 0], v[0]), rtol=0.01, atol=1e-4)


# ---- inputs of every kind ------------------------------------------------------------------------


@every_backend
def test_inference_mode(backend):
    with torch.inference_mode():
        q, p, g, w = torch.ones(3), torch.ones(3), torch.ones(3), torch.eye(3)
        energy = gti.kick_drift_(q, p, g, 0.5, 2.0, backend=backend)
        gti.kick_(p, g, 0.5, backend=backend)
        gti.drift_(q, p, 1.0, backend=backend)
        assert float(gti.kinetic_energy(p, backend=backend)) == 0.0
        assert float(gti.two_form(w, w, backend=backend).omega.abs().sum()) == 0.0
        assert float(gti.top_singular_values(w, backend=backend)) == pytest.approx(1.0)
    assert float(energy) == 0.375 and q.tolist() == [2.0] * 3 and p.tolist() == [0.0] * 3


def layouts() -> dict[str, list[torch.Tensor]]:
    """Tensors of one shape, [4, 6, 2, 2], that lie differently in memory."""
    whole = numbers(8, 12, 4, 4)
    plain, last = numbers(4, 6, 2, 2), numbers(4, 6, 2, 2).to(memory_format=torch.channels_last)
    return {
        "channels_last": [last, last * 2.0, last * 3.0, last.abs()],
        "mixed": [plain, last * 2.0, plain * 3.0, last.abs()],
        "transposed": [numbers(2, 2, 6, 4, seed=i).permute(3, 2, 1, 0).abs() for i in range(4)],
        "strided": [whole[a::2, b::2, ::2, ::2] for a, b in ((0, 0), (0, 1), (1, 0), (1, 1))],
        "negated": [torch._neg_view(plain * i) for i in (1.0, 2.0, 3.0)] + [plain.abs()],
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layouts(layout, dtype):
    def fresh():
        if layout == "strided":  # interleaved views of one memory are refused
            return [t.to(dtype).repeat(2, 1, 1, 1)[::2] for t in layouts()[layout]]
        if layout == "negated":
            return [torch._neg_view(t.neg().to(dtype)) for t in layouts()[layout]]
        return [t.to(dtype) for t in layouts()[layout]]

    q, p, g, w = fresh()
    w = w.abs()
    dense = [t.clone(memory_format=torch.contiguous_format).resolve_neg() for t in (q, p, g, w)]
    strides = q.stride(), p.stride()
    for a, b, c, d in ((q, p, g, w), dense):
        gti.drift_(a, b, 0.5, inv_mass=d)
        gti.kick_(b, c, 0.25, damp=0.5)
    energy = gti.kick_drift_(q, p, g, 0.5, 0.25, inv_mass=[w])
    expected = gti.kick_drift_(*dense[:3], 0.5, 0.25, inv_mass=dense[3:])
    torch.testing.assert_close(q, dense[0])
    torch.testing.assert_close(p, dense[1])
    torch.testing.assert_close(energy, expected)
    torch.testing.assert_close(gti.kinetic_energy(p, inv_mass=w), expected)
    assert (q.stride(), p.stride()) == strides
    torch.testing.assert_close(
        gti.two_form([q], [p], metric=True).metric,
        gti.two_form([dense[0]], [dense[1]], metric=True).metric,
    )
    torch.testing.assert_close(
        gti.power_iteration([q], tol=1e-6).sigma[0, 0],
        torch.linalg.svdvals(dense[0].flatten(1))[0],
    )


def test_channels_last_runs_on_the_compiled_kernel():
    q, p, g, _ = layouts()["channels_last"]
    gti.kick_drift_(q, p, g, 0.5, 0.25, backend="cpu")
    assert gti.explain("drift_", q, p, 0.5).backend == "cpu"


@every_backend
def test_transposed_weights(backend):
    w = numbers(7, 5)
    a = gti.power_iteration(w.T, tol=1e-11, backend=backend)
    b = gti.power_iteration(w.T.contiguous(), tol=1e-11, backend=backend)
    torch.testing.assert_close(a.sigma, b.sigma)
    torch.testing.assert_close(a.u, b.u, rtol=0, atol=1e-9)
    batch = numbers(7, 3, 5).movedim(1, 0)
    sigma = gti.power_iteration(batch, tol=1e-11, backend=backend).sigma
    torch.testing.assert_close(sigma[:, 0], torch.linalg.svdvals(batch)[:, 0])


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_subclasses_of_tensor(backend):
    def sub(*shape, seed=0):
        return numbers(*shape, seed=seed).as_subclass(Subclass)

    q, p, g = sub(3), sub(3, seed=1), sub(3, seed=2)
    dense = [t.as_subclass(torch.Tensor).clone() for t in (q, p, g)]
    energy = gti.kick_drift_(q, p, g, 0.5, 0.25, backend=backend)
    expected = gti.kick_drift_(*dense, 0.5, 0.25)
    torch.testing.assert_close(energy.as_subclass(torch.Tensor), expected)
    gti.kick_(p, g, 0.5, backend=backend)
    gti.drift_(q, p, 0.5, backend=backend)
    gti.kick_(dense[1], dense[2], 0.5)
    gti.drift_(dense[0], dense[1], 0.5)
    torch.testing.assert_close(q.as_subclass(torch.Tensor), dense[0])
    torch.testing.assert_close(
        gti.kinetic_energy(p, backend=backend).as_subclass(torch.Tensor),
        gti.kinetic_energy(dense[1]),
    )
    z, w = sub(2, 5), sub(4, 3)
    assert float(gti.two_form(z, 2.0 * z, backend=backend).omega.abs().max()) == 0.0
    sigma = gti.top_singular_values(w, tol=1e-10, backend=backend)
    assert float(sigma) == pytest.approx(float(torch.linalg.svdvals(numbers(4, 3))[0]))


@every_backend
def test_parameters(backend):
    q, p = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with torch.no_grad():
        gti.kick_([p], [torch.ones(3)], 0.5, backend=backend)
        gti.drift_([q], [p], 1.0, backend=backend)
    assert p.tolist() == [0.5] * 3 and q.tolist() == [1.5] * 3
    assert q.grad_fn is None and q.requires_grad
    layer = nn.Linear(4, 3)
    sigma = gti.power_iteration([layer.weight], tol=1e-6, backend=backend).sigma
    torch.testing.assert_close(sigma[0, 0], torch.linalg.svdvals(layer.weight.detach())[0])


def test_tuples_and_generators_are_lists():
    q, p = (torch.ones(2), torch.ones(3)), (torch.ones(2), torch.ones(3))
    gti.drift_(q, p, 1.0)
    assert [t.tolist() for t in q] == [[2.0] * 2, [2.0] * 3]
    assert float(gti.kinetic_energy(t for t in p)) == 2.5


# ---- threads -------------------------------------------------------------------------------------


def test_one_openmp_runtime_in_the_process():
    # In a process of its own: other packages of the suite bring runtimes of theirs.
    code = """
import torch, gti_kernels as gti
gti.two_form(torch.ones(2, 100_000), torch.ones(2, 100_000), backend="cpu")
torch.ones(1000, 1000).exp_()
for line in open("/proc/self/maps"):
    print(line.split()[-1])
"""
    maps = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    names = ("libgomp", "libiomp", "libomp")
    runtimes = {p for p in maps if Path(p).name.startswith(names)}
    assert len(runtimes) == 1, runtimes


LARGE = torch.ones(1024, 1024)


def test_the_number_of_threads_is_obeyed():
    """A fresh thread with one OpenMP thread starts no others."""

    def threads_started(count: int) -> int:
        torch.set_num_threads(count)
        before = set(Path("/proc/self/task").iterdir())
        gti.power_iteration(LARGE, max_steps=2, tol=0.0, backend="cpu")
        gti.kinetic_energy(LARGE, backend="cpu")
        z = LARGE.reshape(4, -1)
        gti.two_form(z, z, backend="cpu")
        return len(set(Path("/proc/self/task").iterdir()) - before)

    started: list[int] = []

    def run():  # a new thread has no team yet
        started.append(threads_started(1))
        started.append(threads_started(3))

    worker = threading.Thread(target=run)
    worker.start()
    worker.join()
    assert started == [0, 2]


def kernel_calls() -> dict[str, Callable[[], object]]:
    """The compiled kernels without any torch op beside them: torch ops let go of the GIL too."""
    compiled, z, zero = backends.compiled, LARGE.reshape(16, -1), torch.zeros_like(LARGE)
    return {
        "kinetic_energy": lambda: compiled.kinetic_energy(LARGE, 1.0, False, 1),
        "kick_": lambda: compiled.kick_(LARGE, zero, 0.0, 1.0, False, 1),
        "two_form": lambda: compiled.two_form(z, z, False, False, 1),
        "power_iteration": lambda: compiled.power_iteration(LARGE, None, 1, "cg", 5, 0.0, 0, 1),
    }


@pytest.mark.parametrize("name", ["kinetic_energy", "kick_", "two_form", "power_iteration"])
def test_the_gil_is_released(name):
    """Nobody is asked to hand the GIL over, so the other thread gets on only when a kernel lets
    go of it."""
    call, counts = kernel_calls()[name], []
    other_got_on, seen = threading.Event(), []

    def work():
        for _ in range(200):
            counts.append(call())
            if other_got_on.is_set():
                seen.append(True)
                return

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        worker = threading.Thread(target=work)
        worker.start()
        other_got_on.set()
        worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert seen and counts[0] not in (None, False)


def test_two_threads_at_once_get_right_results():
    w = numbers(300, 400, dtype=torch.float32)
    z = numbers(6, 30000)

    def run(p: torch.Tensor) -> list[torch.Tensor]:
        p = p.clone()
        out: list[torch.Tensor] = []
        for _ in range(5):
            gti.kick_(p, p.clone(), 0.1)
            triples = gti.power_iteration([w, w.T], max_steps=20, tol=0.0)
            form = gti.two_form(z, z.flip(0))
            out += [p.clone(), gti.kinetic_energy(p), *triples.u, triples.sigma, form.omega]
        return out

    starts = [numbers(200_000, seed=i) for i in range(2)]
    expected = [run(p) for p in starts]
    got: list[list[torch.Tensor]] = [[], []]

    def work(i: int) -> None:
        got[i] = run(starts[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for a, b in zip(expected, got):
        assert len(a) == len(b) and all(map(torch.equal, a, b))


def test_a_checkpoint_gives_the_same_gradient():
    w = numbers(5, 4).requires_grad_()
    (got,) = torch.autograd.grad(checkpoint(top, w, use_reentrant=False), w)
    torch.testing.assert_close(got, grad(top)(w.detach()))


# ---- a default device that is not that of the tensors --------------------------------------------


@every_backend
@pytest.mark.parametrize("exact", [False, True])
def test_the_default_device_does_not_matter_to_plans(exact, backend):
    def momenta():
        q = numbers(5, 4)
        space = gti.PhaseSpace(q, momentum="gaussian", exact=exact, backend=backend)
        space.kick_drift_(0.1, 0.1, grads=[q.sin()])
        space.load_state_dict(space.state_dict())
        return space.momenta[0]

    with torch.device("meta"):
        got = momenta()
    assert torch.equal(got, momenta())


@pytest.mark.parametrize(
    "make",
    [
        lambda q: gti.optim.Leapfrog([q], 0.1, momentum="gaussian", energy_cap=2.0, exact=True),
        lambda q: gti.optim.BAOAB([q], 0.1),
    ],
    ids=["Leapfrog", "BAOAB"],
)
def test_the_default_device_does_not_matter_to_optimizers(make):
    def positions():
        q = nn.Parameter(numbers(5, 4))
        optimizer = make(q)

        def closure():
            optimizer.zero_grad()
            loss = q.square().sum()
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
            optimizer.load_state_dict(optimizer.state_dict())
        return q.detach()

    with torch.device("meta"):
        got = positions()
    assert torch.equal(got, positions())


def test_the_default_device_does_not_matter_to_ops_and_probes():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    batches = [(numbers(8, 3, seed=i), numbers(8, 1, seed=9 + i)) for i in range(3)]
    w = numbers(5, 4)

    def results():
        for regime in ("batch", "running", "frozen"):
            system = gti.HamiltonianSystem(model, nn.functional.mse_loss, batches, regime=regime)
            yield gti.round_trip(system, 0.01, 2).state
            yield gti.energy_drift(system, (0.01, 0.02), 6).drift
            yield gti.omega_invariance(system, 0.01, 2).epsilon
            yield gti.omega_invariance(system, 0.01, 2, tangents="fd").epsilon
        for backend in BACKENDS:
            yield gti.power_iteration([w, w.T], k=2, backend=backend).sigma.tolist()
            yield gti.two_form(w, w.flip(0), metric=True, backend=backend).omega.tolist()
            yield gti.gram(w, backend=backend).matrix.tolist()
        yield gti.SpectralPenalty(model)().item()

    with torch.device("meta"):
        got = list(results())
    assert got == list(results())


@pytest.mark.parametrize(
    "call",
    [
        lambda w: w / gti.power_iteration(w).sigma,
        lambda w: gti.two_form(w, w.flip(0)).omega,
        lambda w: gti.gram(w).matrix,
        lambda w: gti.kinetic_energy([w]),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_computes_anew(call):
    w = numbers(4, 3)
    traced = torch.jit.trace(call, w, check_trace=False)
    torch.testing.assert_close(traced(2 * w), call(2 * w), rtol=1e-10, atol=0)
