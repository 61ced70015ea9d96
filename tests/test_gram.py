"""G = A diag(w) Bᵀ: exact cases, ill-conditioned ones against rational arithmetic."""

from __future__ import annotations

import math
import mmap
from fractions import Fraction

import pytest
import torch

import gti_kernels as gti
from gti_kernels import testing

BACKENDS = ("cpu", "reference")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def numbers(*shape, dtype=torch.float64, seed=0):
    return testing.numbers(*shape, dtype=dtype, device="cpu", seed=seed)


def integers(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, shape, generator=generator).to(dtype)


def exact(a, b, w) -> Fraction:
    """Σ w a b without any rounding."""
    rows = (map(Fraction, x.tolist()) for x in (a, b, w))
    return sum((x * y * z for x, y, z in zip(*rows)), Fraction(0))


@every_backend
@every_dtype
@pytest.mark.parametrize("weighted", [False, True])
def test_integers_are_exact(weighted, dtype, backend):
    for m, l, n in ((1, 1, 1), (2, 5, 3), (5, 2, 40), (4, 9, 2049), (13, 8, 33)):
        a, b = integers(m, n, dtype=dtype, seed=m), integers(l, n, dtype=dtype, seed=n + 50)
        w = integers(n, dtype=dtype, seed=9) if weighted else None
        scaled = a.double() * (1.0 if w is None else w.double())
        assert torch.equal(gti.gram(a, b, w, backend=backend).matrix, scaled @ b.double().T)
        own = gti.gram(a, weight=w, backend=backend)
        assert torch.equal(own.matrix, scaled @ a.double().T)
        assert torch.equal(own.error_bound, own.error_bound.T)


@every_backend
@every_dtype
@pytest.mark.parametrize("weight", ["none", "same dtype", "float64", "float32"])
def test_error_bound_holds_against_rational_arithmetic(weight, dtype, backend):
    """Rows that are nearly orthogonal: the terms cancel to their last bits."""
    worst = 0.0
    for seed in range(60):
        n = 2 * (1 + seed)
        half, scale = numbers(2, n // 2, seed=seed), 2.0 ** (numbers(n // 2, seed=seed + 1) * 3)
        a = torch.cat([half[:1] * scale, half[1:] * scale], 1).to(dtype)
        b = torch.cat([half[1:], -half[:1]], 1).to(dtype)
        b[0, 0] *= 1 + torch.finfo(dtype).eps
        of = {"same dtype": dtype, "float64": torch.float64, "float32": torch.float32}
        w = numbers(n // 2, seed=seed + 2).repeat(2).to(of[weight]) if weight in of else None
        got = gti.gram(a, b, w, backend=backend)
        wide = torch.ones(n) if w is None else w
        truth = exact(a[0], b[0], wide)
        error, bound = abs(Fraction(float(got.matrix)) - truth), float(got.error_bound)
        assert error <= Fraction(bound)
        sizes = [math.sqrt(exact(x[0].abs(), x[0].abs(), wide.abs())) for x in (a, b)]
        compensated = torch.float64 in (dtype, of.get(weight))
        u, rest = (2.0**-53, 1e-20) if compensated else (2.0**-53, 7e-14)
        assert bound <= 1.001 * (u * abs(float(truth)) + rest * sizes[0] * sizes[1]) + 1e-300
        if truth:
            worst = max(worst, float(sizes[0] * sizes[1] / abs(truth)))
    assert worst > 0.01 / torch.finfo(dtype).eps  # the cases are as hard as they should be


@every_dtype
@pytest.mark.parametrize("weighted", [False, True])
def test_many_columns_and_any_number_of_threads(weighted, dtype):
    a, b = integers(5, 70_003, dtype=dtype), integers(3, 70_003, dtype=dtype, seed=1)
    w = integers(70_003, dtype=dtype, seed=2) if weighted else None
    scaled = a.double() * (1.0 if w is None else w.double())
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(gti.gram(a, b, w, backend="cpu").matrix, scaled @ b.double().T)
        assert torch.equal(gti.gram(a, weight=w, backend="cpu").matrix, scaled @ a.double().T)


@every_backend
def test_a_list_is_its_concatenation(backend):
    shapes = ((3,), (0,), (1,), (20, 30), (2, 2, 2))
    a, b = ([numbers(r, *s, seed=i + r) for i, s in enumerate(shapes)] for r in (4, 3))
    w = [numbers(*s, seed=i + 90) for i, s in enumerate(shapes)]
    flat = [torch.cat([t.flatten(1) for t in ts], 1) for ts in (a, b)]
    got = gti.gram(a, b, w, backend=backend)
    expected = gti.gram(*flat, torch.cat([t.flatten() for t in w]), backend=backend)
    assert torch.equal(got.matrix, expected.matrix)
    assert torch.equal(got.error_bound, expected.error_bound)


@every_backend
@every_dtype
def test_a_batch_is_its_problems_to_the_bit(dtype, backend):
    a, b, w = (numbers(*s, dtype=dtype) for s in ((3, 4, 50), (3, 2, 50), (50,)))
    together = gti.gram(a, b, w, backend=backend), gti.gram(a, backend=backend)
    assert together[0].matrix.shape == (3, 4, 2) and together[1].matrix.shape == (3, 4, 4)
    for i in range(3):
        alone = gti.gram(a[i], b[i], w, backend=backend), gti.gram(a[i], backend=backend)
        for x, y in zip(together, alone):
            assert torch.equal(x.matrix[i], y.matrix)
            assert torch.equal(x.error_bound[i], y.error_bound)


@every_backend
@every_dtype
def test_a_nan_spoils_its_row_or_column_alone(dtype, backend):
    a, b = integers(6, 37, dtype=dtype), integers(5, 37, dtype=dtype, seed=1)
    good = gti.gram(a, b, backend=backend)
    a[4, 36] = b[2, 8] = math.nan
    got = gti.gram(a, b, backend=backend)
    nan = torch.zeros(6, 5, dtype=torch.bool)
    nan[4] = nan[:, 2] = True
    for x, before in zip(got, good):
        assert torch.equal(x.isnan(), nan)
        assert torch.equal(x[~nan], before[~nan])


@every_backend
def test_a_tensor_without_coordinates_changes_nothing_wherever_it_stands(backend):
    a, b, w = integers(3, 7), integers(9, 7, seed=1), numbers(7).abs()
    for lists in ((a,), (a, b), (a, None, w), (a, b, w)):
        expected = gti.gram(*lists, backend=backend)
        for at in (0, 1):
            got = [None if x is None else [x] for x in lists]
            for x, empty in zip(got, (torch.empty(3, 0), torch.empty(9, 0), torch.empty(0))):
                if x is not None:
                    x.insert(at, empty.double())
            got = gti.gram(*got, backend=backend)
            assert torch.equal(got.matrix, expected.matrix)
            assert torch.equal(got.error_bound, expected.error_bound)


@every_backend
def test_scalars_in_a_list_are_one_coordinate(backend):
    a, b, w = integers(3, 7), integers(2, 7, seed=1), numbers(7)
    parts = [[x[:, 0], x[:, 1:]] for x in (a, b)]
    got = gti.gram(*parts, [w[0], w[1:]], backend=backend)
    expected = gti.gram(a, b, w, backend=backend)
    torch.testing.assert_close(got.matrix, expected.matrix, rtol=1e-15, atol=1e-15)
    with pytest.raises(ValueError, match=r"gram: a\[0\] must be .*a\[None\]"):
        gti.gram(torch.ones(3), backend=backend)


@every_backend
def test_the_bound_does_not_vanish_with_the_squares(backend):
    """Entries whose squares underflow beside large ones, and products that cancel."""
    wrong = 0
    for seed in range(40):
        x, y = numbers(2, 400, seed=seed) * 2.0 ** (4 * numbers(2, 400, seed=seed + 50))
        order = numbers(800, seed=seed).argsort()
        a = (torch.cat([x, y]) * 2.0**-565)[order]
        b = (torch.cat([y, -x]) * 2.0**40)[order]
        got = gti.gram(a[None], b[None], backend=backend)
        error = abs(Fraction(float(got.matrix)))  # of zero
        wrong += error > 0
        assert error <= Fraction(float(got.error_bound))
    assert wrong


def test_a_pullback_metric_is_that_of_the_jacobian():
    jacobian, weight = numbers(30, 200), numbers(200, seed=1).abs()
    got = gti.gram(jacobian, weight=weight)
    torch.testing.assert_close(got.matrix, jacobian @ torch.diag(weight) @ jacobian.T)
    assert float(torch.linalg.eigvalsh(got.matrix)[0]) > 0


def test_more_than_two_to_the_31_columns():
    """4 GiB of zeros that are never stored (untouched pages), numbers on both sides of 2^31."""
    n = 2**31 + 5
    memory = mmap.mmap(-1, 2 * n, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    a = torch.frombuffer(memory, dtype=torch.bfloat16).view(1, n)
    columns = torch.tensor([0, 2**31 - 1, 2**31, n - 1])
    a[0, columns] = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.bfloat16)
    assert float(gti.gram(a, backend="cpu").matrix) == 1 + 4 + 16 + 64


A, B = torch.ones(2, 3), torch.ones(4, 3)
BAD = [
    ((None,), {}, TypeError, r"a\[0\]"),
    (([],), {}, ValueError, "a must hold at least one"),
    ((torch.ones(0, 3),), {}, ValueError, r"a\[0\].*m >= 1"),
    ((torch.ones(2, 0),), {}, ValueError, "a must have at least one coordinate"),
    ((torch.ones(3),), {}, ValueError, r"a\[0\]"),
    ((torch.ones(2, 3, 4, 5),), {}, ValueError, r"a\[0\]"),
    ((A.int(),), {}, TypeError, r"a\[0\].*int32"),
    ((A, B[:, :2]), {}, ValueError, r"b\[0\] must have shape \(4, 3\)"),
    ((A, torch.ones(0, 3)), {}, ValueError, r"b\[0\].*m >= 1"),
    ((A, B.double()), {}, TypeError, r"b\[0\] must have the dtype"),
    ((A, [B, B]), {}, ValueError, "a and b must have the same length"),
    ((torch.ones(2, 3, 4), torch.ones(1, 3, 4)), {}, ValueError, r"b\[0\] must have shape"),
    ((A,), {"weight": torch.ones(2)}, ValueError, r"weight\[0\] must have shape \(3,\)"),
    ((A,), {"weight": torch.ones(3).long()}, TypeError, r"weight\[0\].*int64"),
    ((A,), {"weight": []}, ValueError, "a and weight must have the same length"),
    ((A, B.to("meta")), {}, ValueError, "one device"),
    ((A,), {"backend": "gpu"}, ValueError, "backend"),
    ((A,), {"backend": "triton"}, RuntimeError, "cannot run this call"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_arguments(number):
    args, kwargs, error, words = BAD[number]
    with pytest.raises(error, match=f"^gram: .*{words}"):
        gti.gram(*args, **kwargs)


def test_a_derivative_is_refused():
    with pytest.raises(RuntimeError, match="gram has no derivative"):
        gti.gram(A, weight=torch.ones(3, requires_grad=True))
