"""ω(z₁, z₂) = q₁·p₂ − p₁·q₂: exact cases, ill-conditioned ones against rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

import gti_kernels as gti
from gti_kernels import testing
from gti_kernels.conventions import symplectic_matrix

BACKENDS = ("cpu", "reference")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def numbers(*shape, dtype=torch.float64, seed=0):
    return testing.numbers(*shape, dtype=dtype, device="cpu", seed=seed)


def integers(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, shape, generator=generator).to(dtype)


def exact(q: torch.Tensor, p: torch.Tensor, i: int, j: int) -> tuple[Fraction, Fraction]:
    """Ω_ij and S_ij without any rounding."""
    qi, pi, qj, pj = ([Fraction(x) for x in row.tolist()] for row in (q[i], p[i], q[j], p[j]))
    omega = sum((a * d - b * c for a, b, c, d in zip(qi, pi, qj, pj)), Fraction(0))
    metric = sum((a * c + b * d for a, b, c, d in zip(qi, pi, qj, pj)), Fraction(0))
    return omega, metric


def assert_skew(t: gti.TwoForm) -> None:
    """To the bit: a sum that is kept once for both."""
    nan = t.omega.isnan()
    assert torch.equal(nan, nan.T)
    zero = torch.zeros((), dtype=torch.float64)
    assert torch.equal(t.omega.where(~nan, zero), -t.omega.T.where(~nan, zero))
    assert bool((t.omega.diagonal().nan_to_num() == 0).all())
    if t.metric is not None:
        assert torch.equal(t.metric.nan_to_num(), t.metric.T.nan_to_num())


# ---- cases without rounding ----------------------------------------------------------------------


@every_backend
@every_dtype
def test_integers_are_exact(dtype, backend):
    for m, n in ((1, 1), (2, 3), (3, 40), (5, 2049), (7, 100), (8, 17), (13, 33)):
        q, p = integers(m, n, dtype=dtype, seed=m), integers(m, n, dtype=dtype, seed=n + 50)
        t = gti.two_form(q, p, metric=True, backend=backend)
        q, p = q.double(), p.double()
        assert torch.equal(t.omega, q @ p.T - p @ q.T)
        assert torch.equal(t.metric, q @ q.T + p @ p.T)
        assert_skew(t)


@every_backend
@every_dtype
def test_a_darboux_basis_gives_j(dtype, backend):
    n = 20
    q = torch.cat([torch.eye(n), torch.zeros(n, n)]).to(dtype)
    p = torch.cat([torch.zeros(n, n), torch.eye(n)]).to(dtype)
    t = gti.two_form(q, p, metric=True, backend=backend)
    assert torch.equal(t.omega, symplectic_matrix(n))
    assert torch.equal(t.metric, torch.eye(2 * n, dtype=torch.float64))


@every_backend
def test_a_lagrangian_subspace_has_no_area(backend):
    """dp = S dq with S symmetric."""
    q, s = integers(6, 30), integers(30, 30, seed=1)
    s = s + s.T
    assert float(gti.two_form(q, q @ s, backend=backend).omega.abs().max()) == 0.0
    q, s = numbers(6, 3000), numbers(3000, seed=1)
    t = gti.two_form(q, q * s, backend=backend)
    products = 2.0**-53 * (q.abs() @ (q * s).abs().T + (q * s).abs() @ q.abs().T)
    assert bool((t.omega.abs() <= t.error_bound + products).all())


@every_backend
def test_a_symplectic_map_keeps_omega(backend):
    n, m = 12, 5
    z = integers(2 * n, m)
    before = gti.two_form(z[:n].T, z[n:].T, backend=backend).omega
    for seed in range(4):  # shears (I S; 0 I) and (I 0; T I) generate the group
        s, t = integers(n, n, seed=seed), integers(n, n, seed=seed + 9)
        q, p = z[:n], z[n:]
        q = q + (s + s.T) @ p
        p = p + (t + t.T) @ q
        after = gti.two_form(q.T, p.T, backend=backend).omega
        assert torch.equal(before, after)


# ---- rounding ------------------------------------------------------------------------------------


def ill_conditioned(n: int, dtype: torch.dtype, spread: int, seed: int):
    """Two vectors whose Ω cancels down to the last bits of a few terms: up to 1e16 in fp64."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        exponents = torch.randint(-spread, spread + 1, (n,), generator=generator)
        return (numbers(n, seed=seed) * 2.0 ** exponents.double()).to(dtype)

    q1, p2 = draw(), draw() * 1.5
    q2 = p2.clone()
    last = torch.randint(0, n, (max(1, n // 8),), generator=generator)
    q2[last] = (q2[last].double() * (1 + torch.finfo(dtype).eps)).to(dtype)
    order = torch.randperm(n, generator=generator)  # the terms that cancel stand far apart
    return torch.stack([q1, q2[order]]), torch.stack([q1[order], p2])


@every_backend
@every_dtype
def test_error_bound_holds_against_rational_arithmetic(dtype, backend):
    spread = {torch.float64: 30, torch.float32: 15, torch.bfloat16: 15, torch.float16: 2}[dtype]
    worst = 0.0
    for seed in range(120):
        n = 1 + seed if seed < 100 else 3 * seed
        q, p = ill_conditioned(n, dtype, seed % (spread + 1), seed)
        t = gti.two_form(q, p, metric=True, backend=backend)
        omega, metric = exact(q, p, 0, 1)
        error, bound = abs(Fraction(float(t.omega[0, 1])) - omega), float(t.error_bound[0, 1])
        assert error <= Fraction(bound)
        assert (
            abs(Fraction(float(t.metric[0, 1])) - metric) <= Fraction(bound) + abs(metric) / 10**13
        )
        z = [math.sqrt(exact(q, p, i, i)[1]) for i in range(2)]
        u_size, rest = (2.0**-53, 1e-20) if dtype == torch.float64 else (0.0, 7e-14)
        assert bound <= u_size * abs(float(t.omega[0, 1])) * 1.001 + rest * z[0] * z[1] + 1e-300
        if omega:
            terms = sum(
                abs(Fraction(a) * Fraction(b)) for a, b in zip(q[0].tolist(), p[1].tolist())
            )
            worst = max(worst, float(terms / abs(omega)))
    assert worst > 0.1 / torch.finfo(dtype).eps  # the cases are as hard as they should be


@every_backend
@every_dtype
def test_many_vectors_and_tails_of_every_length(dtype, backend):
    for n in range(1, 41):
        m = 1 + n % 9
        q, p = numbers(m, n, dtype=dtype, seed=n), numbers(m, n, dtype=dtype, seed=99 + n)
        t = gti.two_form(q, p, metric=True, backend=backend)
        assert_skew(t)
        for i in range(m):
            j = (i + 1 + n) % m
            omega, metric = exact(q, p, i, j)
            assert abs(Fraction(float(t.omega[i, j])) - omega) <= Fraction(
                float(t.error_bound[i, j])
            )
            size = math.sqrt(float(t.metric[i, i] * t.metric[j, j]))
            assert abs(float(Fraction(float(t.metric[i, j])) - metric)) <= 1e-13 * size


@every_dtype
@pytest.mark.parametrize("m", [16, 31, 64, 256])
def test_many_vectors(m, dtype):
    q, p = numbers(m, 1000, dtype=dtype), numbers(m, 1000, dtype=dtype, seed=1)
    t = gti.two_form(q, p, metric=True, backend="cpu")
    assert_skew(t)
    wide_q, wide_p = q.double(), p.double()
    size = torch.outer(t.metric.diagonal(), t.metric.diagonal()).sqrt()
    omega = wide_q @ wide_p.T - wide_p @ wide_q.T
    metric = wide_q @ wide_q.T + wide_p @ wide_p.T
    assert bool(((t.omega - omega).abs() <= 1e-13 * size).all())
    assert bool(((t.metric - metric).abs() <= 1e-13 * size).all())


@every_dtype
def test_many_columns_and_any_number_of_threads(dtype):
    """Several panels and segments, with integers: no rounding to hide behind."""
    q, p = (integers(5, 70_003, dtype=dtype, seed=s) for s in (0, 1))
    omega = q.double() @ p.double().T - p.double() @ q.double().T
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        t = gti.two_form(q, p, metric=True, backend="cpu")
        assert torch.equal(t.omega, omega)
        assert torch.equal(
            t.metric.diagonal(), q.double().square().sum(1) + p.double().square().sum(1)
        )


@every_backend
@every_dtype
def test_a_list_is_its_concatenation(dtype, backend):
    shapes = ((3,), (0,), (1,), (20, 30), (8191,), (2, 2, 2))
    q, p = (
        [numbers(4, *s, dtype=dtype, seed=i + o) for i, s in enumerate(shapes)] for o in (0, 50)
    )
    a = gti.two_form(q, p, metric=True, backend=backend)
    b = gti.two_form(
        *(torch.cat([t.flatten(1) for t in ts], 1) for ts in (q, p)),
        metric=True,
        backend=backend,
    )
    assert bool(((a.omega - b.omega).abs() <= a.error_bound + b.error_bound).all())
    torch.testing.assert_close(a.metric, b.metric, rtol=1e-13, atol=1e-9)


@every_backend
def test_dtypes_may_differ_within_a_list(backend):
    q, p = ([integers(3, 50, dtype=d, seed=i + o) for i, d in enumerate(DTYPES)] for o in (0, 9))
    t = gti.two_form(q, p, backend=backend)
    q, p = (torch.cat([t.double() for t in ts], 1) for ts in (q, p))
    assert torch.equal(t.omega, q @ p.T - p @ q.T)


# ---- NaN, Inf, large and small -------------------------------------------------------------------


@every_backend
@every_dtype
@pytest.mark.parametrize("at", [0, 7, 8, 36])
@pytest.mark.parametrize("side", [0, 1])
def test_a_nan_spoils_its_row_and_column_alone(side, at, dtype, backend):
    m, n, bad = 6, 37, 4
    z = [integers(m, n, dtype=dtype, seed=s) for s in range(2)]
    good = gti.two_form(*z, metric=True, backend=backend)
    z[side][bad, at] = math.nan
    t = gti.two_form(*z, metric=True, backend=backend)
    others = [i for i in range(m) if i != bad]
    for got, before in zip((t.omega, t.error_bound, t.metric), good):
        assert bool(got[bad].isnan().all()) and bool(got[:, bad].isnan().all())
        assert torch.equal(got[others][:, others], before[others][:, others])


@every_backend
def test_an_infinity_never_looks_finite(backend):
    for dtype in DTYPES:
        q, p = torch.ones(2, 5, dtype=dtype), torch.ones(2, 5, dtype=dtype)
        q[0, 3] = math.inf
        t = gti.two_form(q, p, backend=backend)
        assert not bool(t.omega[0, 1].isfinite())
        assert not bool(t.error_bound[0, 1].isfinite())


@every_backend
@pytest.mark.parametrize("scale", [2.0**-200, 2.0**200])
def test_powers_of_two_scale(scale, backend):
    q, p = numbers(3, 100), numbers(3, 100, seed=1)
    a, b = (gti.two_form(q * s, p * s, backend=backend).omega for s in (1.0, scale))
    assert torch.equal(a * scale * scale, b)


@every_backend
def test_metric_is_none_unless_asked_for(backend):
    t = gti.two_form(numbers(2, 3), numbers(2, 3), backend=backend)
    assert t.metric is None and t.omega.dtype == t.error_bound.dtype == torch.float64


# ---- batches, long inputs ------------------------------------------------------------------------


@every_backend
@every_dtype
@pytest.mark.parametrize("metric", [False, True])
def test_a_batch_is_its_problems_to_the_bit(metric, dtype, backend):
    for b, m, n in ((1, 2, 5), (3, 5, 70)):
        q, p = numbers(b, m, n, dtype=dtype), numbers(b, m, n, dtype=dtype, seed=1)
        together = gti.two_form(q, p, metric=metric, backend=backend)
        assert together.omega.shape == together.error_bound.shape == (b, m, m)
        for i in range(b):
            alone = gti.two_form(q[i], p[i], metric=metric, backend=backend)
            assert torch.equal(together.omega[i], alone.omega)
            assert torch.equal(together.error_bound[i], alone.error_bound)
            assert torch.equal(together.metric[i], alone.metric) if metric else True
    turned = gti.two_form(q.mT.contiguous().mT, p, metric=metric, backend=backend)
    assert torch.equal(turned.omega, together.omega)


def test_a_batch_of_long_problems():
    q, p = (integers(2, 3, 40_000, seed=s) for s in (0, 1))
    omega = gti.two_form(q, p).omega
    assert torch.equal(omega, q @ p.mT - p @ q.mT)


@every_backend
def test_bad_batches(backend):
    for shape in ((0, 2, 3), (2, 0, 3), (2, 3, 0)):
        with pytest.raises(ValueError, match=r"^two_form: dq"):
            gti.two_form(torch.ones(shape), torch.ones(shape), backend=backend)
    with pytest.raises(ValueError, match=r"^two_form: dp\[0\]"):
        gti.two_form(torch.ones(2, 3, 4), torch.ones(3, 3, 4), backend=backend)


def test_lists_of_mixed_dtypes_keep_their_bound():
    """A list with one fp64 entry is compensated throughout."""
    for seed in range(5):
        q, p = ill_conditioned(3000, torch.float32, 12, seed)
        extra = [torch.zeros(2, 1, dtype=torch.float64)]
        t = gti.two_form([q, *extra], [p, *extra], backend="cpu")
        error = abs(Fraction(float(t.omega[0, 1])) - exact(q, p, 0, 1)[0])
        assert error <= Fraction(float(t.error_bound[0, 1]))


def test_a_list_gives_the_bits_of_its_concatenation():
    q, p = (numbers(5, 40_003, dtype=torch.float32, seed=s) for s in (0, 1))
    whole = gti.two_form(q, p, metric=True, backend="cpu")
    sizes = [1, 0, 7, 19_000, 64, 20_931]
    parts = gti.two_form(
        *([t.contiguous() for t in x.split(sizes, dim=1)] for x in (q, p)),
        metric=True,
        backend="cpu",
    )
    assert torch.equal(whole.omega, parts.omega) and torch.equal(whole.metric, parts.metric)
    torch.testing.assert_close(whole.error_bound, parts.error_bound, rtol=1e-12, atol=0.0)


def dots_that_cancel(cases: int, n: int, seed: int):
    """[cases, 2, n] pairs whose Ω loses up to 53 bits, and Ω from exact integers.

    Entries are integers of at most 52 bits times one power of two a case, so that every product is
    an integer of Python; the last column holds what is left of the others' sum, rounded.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(bits: int) -> torch.Tensor:
        wide = torch.randint(-(2**bits), 2**bits, (cases, n), generator=generator)
        return wide >> torch.randint(0, bits, (cases, n), generator=generator)

    a, b = draw(26), draw(26)
    q, p = torch.stack([a, a], 1), torch.stack([b, b], 1)
    # Row 2 differs from row 1 in a few bits of two columns: Ω_12 is a sum of a few small products.
    at = torch.arange(cases)
    for _ in range(2):
        column = torch.randint(0, n, (cases,), generator=generator)
        q[at, 1, column] += torch.randint(-3, 4, (cases,), generator=generator)
    return q, p


@every_backend
def test_ten_thousand_ill_conditioned_dots_are_within_their_bound(backend):
    """Condition Σ|q_i p_j| / |Ω| up to 1e16, against exact integers."""
    cases, n = (10_000, 24) if backend == "cpu" else (300, 24)
    q, p = dots_that_cancel(cases, n, 0)
    scale = 2.0 ** torch.randint(-200, 200, (cases, 1, 1)).double()
    t = gti.two_form(q.double() * scale, p.double() * scale, backend=backend)
    wide = [[[int(x) for x in row] for row in case] for case in q.tolist()]
    tall = [[[int(x) for x in row] for row in case] for case in p.tolist()]
    worst = 0.0
    for i, (x, y) in enumerate(zip(wide, tall)):
        omega = sum(c * d for c, d in zip(x[0], y[1])) - sum(c * d for c, d in zip(y[0], x[1]))
        s = Fraction(float(scale[i])) ** 2
        error = abs(Fraction(float(t.omega[i, 0, 1])) - omega * s)
        assert error <= Fraction(float(t.error_bound[i, 0, 1]))
        if omega:
            size = sum(abs(c * d) for c, d in zip(x[0], y[1]))
            worst = max(worst, float(size / abs(omega)))
    assert worst > 1e14


def test_an_isotropic_subspace_of_four_million_numbers():
    """dp = S dq, S symmetric: 0 where S dq is exact, else within 1e-13 Σ|q_i p_j|."""
    n, m = 4_000_000, 4
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(m, n, generator=generator)
    s = torch.randn(n, generator=generator)
    sign = torch.exp2(torch.randint(-2, 3, (n,), generator=generator).float())
    assert float(gti.two_form(q, q * sign, backend="cpu").omega.abs().max()) == 0.0
    p = q * s
    form = gti.two_form(q, p, backend="cpu")
    size = q.double().abs() @ p.double().abs().T
    truth = gti.two_form(q.double(), p.double(), backend="cpu")  # compensated
    assert float(truth.error_bound.max()) < 1e-16 * float(size.max())
    off = ~torch.eye(m, dtype=torch.bool)
    assert bool(((form.omega - truth.omega).abs() <= 1e-13 * size)[off].all())
    naive = q @ p.T - p @ q.T
    assert float((naive - truth.omega).abs().max()) > 1e3 * float(
        (form.omega - truth.omega).abs().max()
    )


def test_every_panel_boundary():
    """Lengths around a panel, a flush of the lanes and a segment; every dtype has its own rows."""
    for n in (63, 64, 65, 255, 257, 2047, 2049, 16_383, 16_385, 32_769):
        for m in (3, 5):
            q, p = (integers(m, n, dtype=torch.float32, seed=n + s) for s in (0, 1))
            t = gti.two_form(q, p, metric=True, backend="cpu")
            q, p = q.double(), p.double()
            assert torch.equal(t.omega, q @ p.T - p @ q.T)
            assert torch.equal(t.metric, q @ q.T + p @ p.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [4, 8, 10])
def test_whole_panels_and_shared_ones_agree(m, dtype):
    """Columns that fill a panel by themselves and columns that share one: the same sums."""
    dq, dp = (numbers(m, 3000, dtype=dtype, seed=s) for s in (1, 2))
    whole = gti.two_form(dq, dp, backend="cpu")
    parts = gti.two_form(list(dq.split(50, dim=1)), list(dp.split(50, dim=1)), backend="cpu")
    assert torch.equal(whole.omega, parts.omega)
    torch.testing.assert_close(whole.error_bound, parts.error_bound, rtol=1e-12, atol=0.0)


# ---- what has hardly any coordinates, or any size ------------------------------------------------


@every_backend
def test_a_tensor_without_coordinates_changes_nothing_wherever_it_stands(backend):
    dq, dp = numbers(4, 9), numbers(4, 9, seed=1)
    expected = gti.two_form(dq, dp, metric=True, backend=backend)
    empty = torch.empty(4, 0, dtype=dq.dtype)
    for q, p in (([empty, dq], [empty, dp]), ([dq, empty], [dp, empty])):
        got = gti.two_form(q, p, metric=True, backend=backend)
        for x, y in zip(got, expected):
            assert torch.equal(x, y)


@every_backend
def test_scalars_in_a_list_are_one_coordinate(backend):
    dq, dp = numbers(4, 9), numbers(4, 9, seed=1)
    lists = [[x[:, 0], x[:, 1:3], x[:, 3:].reshape(4, 2, 3)] for x in (dq, dp)]
    got = gti.two_form(*lists, metric=True, backend=backend)
    expected = gti.two_form(dq, dp, metric=True, backend=backend)
    torch.testing.assert_close(got.omega, expected.omega, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(got.metric, expected.metric, rtol=1e-15, atol=1e-15)
    with pytest.raises(ValueError, match=r"two_form: dq\[0\] must be .*dq\[None\]"):
        gti.two_form(torch.ones(3), torch.ones(3), backend=backend)


@every_backend
def test_the_bound_of_what_underflows(backend):
    q, p = torch.zeros(2, 2, 1, dtype=torch.float64)
    q[0] = p[1] = 1e-200
    got = gti.two_form(q, p, backend=backend)
    exact = Fraction(1e-200) ** 2
    assert abs(exact - Fraction(float(got.omega[0, 1]))) <= Fraction(float(got.error_bound[0, 1]))
