"""Singular triples of matrices with prescribed spectra: bounds, honest residuals, edge cases."""

from __future__ import annotations

import math

import pytest
import torch

import gti_kernels as gti
from gti_kernels import testing
from gti_kernels.conventions import compute_dtype
from gti_kernels.ops import power_iteration as ops
from gti_kernels.reference.power_iteration import start_vectors

BACKENDS = ("cpu", "reference")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_method = pytest.mark.parametrize("method", ["cg", "power"])


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices: threads only get in each other's way. A test that wants more says so."""
    torch.set_num_threads(1)


def numbers(*shape, dtype=torch.float64, seed=0):
    return testing.numbers(*shape, dtype=dtype, device="cpu", seed=seed)


def index(n: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.float64)


def spectra(n: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    exponents = torch.rand(n, generator=generator, dtype=torch.float64).sort().values
    return {
        "geometric": 0.7 ** index(n),
        "arithmetic": 1 - index(n) / n,
        "condition 1e4": 1e-4**exponents,
        "condition 1e16": 1e-16**exponents,
        "tie": torch.cat([torch.ones(2), 0.5 ** index(n)[1:-1]])[:n],
        "all equal": torch.ones(n),
        "rank 1": torch.ones(1),
    }


def svdvals(w: torch.Tensor) -> torch.Tensor:
    """In fp64, away from over- and underflow."""
    w = w.double()
    scale = 2.0 ** math.floor(math.log2(float(w.abs().max()))) if w.any() else 1.0
    return torch.linalg.svdvals(w / scale) * scale


def check_triples(w: torch.Tensor, r: gti.SingularTriples, tol: float = 1e-4) -> None:
    """What holds for the result of any one matrix w [m, n], converged or not."""
    eps = torch.finfo(r.v.dtype).eps
    size = float(w.double().abs().max())
    a, u, v = w.double() / size, r.u.double()[:, 0], r.v.double()[:, 0]
    true, sigma = torch.linalg.svdvals(a), float(r.sigma) / size
    # The result of a list is in the widest compute type: read back, sigma has its own rounding.
    assert sigma <= float(true[0]) * (1 + 32 * eps)
    assert float(r.upper) / size >= float(true[0]) * (1 - 2.0**-50)
    assert float(u.norm()) == pytest.approx(1, abs=8 * eps)
    assert float(v.norm()) == pytest.approx(1, abs=8 * eps)
    assert float((a @ v - sigma * u).norm()) <= 64 * eps * sigma
    theta = float((a @ v).square().sum())
    residual = float((a.T @ (a @ v) - theta * v).norm()) / theta
    assert float(r.residual) == pytest.approx(residual, rel=1e-3, abs=64 * eps)
    assert bool(r.converged) == (float(r.residual) <= tol)
    # Some σ² lies within the residual of θ.
    assert float((true.square() - theta).abs().min()) <= (residual + 64 * eps) * theta


def random_matrices(count: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """[count, m, n] of one random shape: spectra, ranks, ties and scales differ by matrix."""

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    m, n = (int(x) for x in torch.randint(1, 65, (2,), generator=generator))
    r = min(m, n)
    u, v = (
        torch.linalg.qr(torch.randn(count, x, r, generator=generator, dtype=torch.float64))[0]
        for x in (m, n)
    )
    s = torch.stack(
        [
            uniform(0, 1, count // 5, r),
            10 ** uniform(-8, 0, count // 5, r),  # log-uniform
            (torch.arange(r) < uniform(1, r + 1, count // 5, 1)).double(),  # ties, low rank
            0.5 ** torch.arange(r).expand(count // 5, r),
            1 - 10 ** uniform(-6, 0, count // 5, r),  # a cluster at the top
        ]
    ).reshape(count, r)
    most = 2 if dtype == torch.float16 else 30
    return (10 ** uniform(-most, most, count, 1, 1) * (u * s[:, None]) @ v.mT).to(dtype)


@every_dtype
def test_twenty_thousand_matrices_lie_within_their_bounds(dtype):
    """5,000 of each dtype against fp64: σ ≤ σ₁ ≤ upper, and some σᵢ² within the residual of σ²."""
    generator = torch.Generator().manual_seed(1)
    eps, tol = torch.finfo(compute_dtype(dtype)).eps, 1e-5
    for _ in range(50):
        w = random_matrices(100, dtype, generator)
        # A gap of 1e-6 at the top takes up to 2,000 steps, by the start as much as by the gap.
        r = gti.power_iteration(w, tol=tol, max_steps=10_000, backend="cpu")
        assert bool(r.converged.all()) and bool((r.residual <= tol).all())
        size = w.double().abs().amax((1, 2)).clamp(min=1e-300)
        true = torch.linalg.svdvals(w.double() / size[:, None, None])
        sigma, residual, upper = (
            x.double() for x in (r.sigma[:, 0] / size, r.residual[:, 0], r.upper / size)
        )
        assert bool((sigma <= true[:, 0] * (1 + 32 * eps)).all())
        assert bool((upper >= true[:, 0] * (1 - 2.0**-50)).all())
        nearest = (true.square() - sigma.square()[:, None]).abs().amin(1)
        assert bool((nearest <= (residual + 64 * eps) * sigma.square()).all())
        # A start nearly orthogonal to v₁ may settle on a neighbour of σ₁ in a cluster.
        torch.testing.assert_close(sigma, true[:, 0], rtol=1e-2, atol=0)


# ---- prescribed spectra --------------------------------------------------------------------------


@every_backend
@every_method
@every_dtype
def test_spectra(dtype, method, backend):
    for name, s in spectra(40).items():
        for m, n in ((60, 40), (40, 60)):
            w = testing.with_spectrum(s, m, n, dtype=dtype, seed=m)
            tol = 1e-5
            r = gti.power_iteration(w, method=method, tol=tol, max_steps=60, backend=backend)
            check_triples(w, r, tol)
            if method == "cg" or name in ("geometric", "rank 1"):
                assert bool(r.converged), name
            if bool(r.converged):
                assert float(r.sigma) == pytest.approx(float(svdvals(w)[0]), rel=1e-4)


@every_backend
@pytest.mark.parametrize(
    "shape", [(1, 37), (37, 1), (1, 1), (2, 500), (500, 2), (3000, 8), (8, 3000)]
)
def test_thin_matrices(shape, backend):
    for dtype in DTYPES:
        w = numbers(*shape, dtype=dtype)
        r = gti.power_iteration(w, tol=1e-5, backend=backend)
        assert bool(r.converged)
        check_triples(w, r, 1e-5)
        assert float(r.sigma) == pytest.approx(float(svdvals(w)[0]), rel=1e-5)


@every_dtype
def test_every_small_shape(dtype):
    """Tails of every length in both directions, one call."""
    ws = [numbers(m, n, dtype=dtype, seed=97 * m + n) for m in range(1, 20) for n in range(1, 41)]
    true = torch.stack([svdvals(w)[0] for w in ws])
    r = gti.power_iteration(ws, tol=1e-5, max_steps=400, backend="cpu")
    assert bool(r.converged.all())
    torch.testing.assert_close(r.sigma[:, 0].double(), true, rtol=1e-5, atol=0)
    assert bool((r.upper.double() >= true * (1 - 2.0**-50)).all())
    for i in range(0, len(ws), 7):
        one = gti.SingularTriples(*(x[i] for x in r))
        check_triples(ws[i], one, 1e-5)


@pytest.mark.parametrize("shape", [(65536, 8), (1500, 700), (700, 1501), (16, 65536), (20001, 40)])
@pytest.mark.parametrize("threads", [1, 2])
def test_large_matrices(shape, threads):
    torch.set_num_threads(threads)
    s = 0.8 ** index(min(*shape, 30))
    for dtype in (torch.float32, torch.bfloat16):
        w = testing.with_spectrum(s, *shape, dtype=dtype)
        r = gti.power_iteration(w, tol=1e-5, backend="cpu")
        u, v = r.u.double()[:, 0], r.v.double()[:, 0]
        assert bool(r.converged)
        assert float(r.sigma) == pytest.approx(1.0, rel=1e-6 if dtype == torch.float32 else 1e-2)
        a = w.double()
        assert float((a @ v - float(r.sigma) * u).norm()) <= 1e-5
        assert float((a.T @ u - float(r.sigma) * v).norm()) <= 2e-5
        one_inf = (a.abs().sum(0).max() * a.abs().sum(1).max()).sqrt()
        least = float(torch.minimum(a.norm(), one_inf))
        assert least * (1 - 1e-6) <= float(r.upper) <= least * 1.02


@every_backend
@pytest.mark.parametrize("shape", [(30, 20), (600, 400)], ids=["small", "large"])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e30),
        (torch.float32, 1e-30),
        (torch.float32, 1e-42),
        (torch.bfloat16, 1e30),
        (torch.bfloat16, 1e-30),
        (torch.float16, 6e4),
        (torch.float16, 1e-6),
        (torch.float64, 1e300),
        (torch.float64, 1e100),
        (torch.float64, 1e-300),
        (torch.float64, 1e-320),
    ],
)
def test_scales(dtype, scale, shape, backend):
    unit = testing.with_spectrum(0.5 ** index(20), *shape)
    w = (unit / unit.abs().max() * scale).to(dtype)
    assert bool(w.isfinite().all()) and bool(w.any())
    r = gti.power_iteration(w, tol=1e-5, backend=backend)
    # At 1e-42 σ itself is subnormal in fp32: its spacing is what is left.
    spacing = torch.finfo(r.sigma.dtype).smallest_normal * torch.finfo(r.sigma.dtype).eps
    assert bool(r.converged)
    if float(r.sigma) != math.inf:  # σ may leave the range of its dtype
        true = float(svdvals(w)[0])
        assert float(r.sigma) == pytest.approx(true, rel=1e-5, abs=spacing)
        assert float(r.upper) >= true * (1 - 1e-12) - spacing
    assert float(r.u.double().norm()) == pytest.approx(1, abs=1e-6)


# ---- steps ---------------------------------------------------------------------------------------


@every_backend
def test_cg_needs_a_fraction_of_the_steps_and_a_warm_start_fewer(backend):
    w = testing.with_spectrum(1 - index(100) / 100, 120, 100)
    steps = {
        method: int(
            gti.power_iteration(w, method=method, max_steps=2000, tol=1e-4, backend=backend).steps
        )
        for method in ("cg", "power")
    }
    assert 5 * steps["cg"] <= steps["power"] < 2000
    cold = gti.power_iteration(w, tol=1e-6, backend=backend)
    moved = w + 1e-4 * numbers(120, 100)
    again = gti.power_iteration(moved, tol=1e-4, start=cold, backend=backend)
    afresh = gti.power_iteration(moved, tol=1e-4, backend=backend)
    assert int(again.steps) < int(afresh.steps)
    same = gti.power_iteration(w, tol=1e-5, start=cold, backend=backend)
    assert int(same.steps) == 1 and bool(same.converged)


@every_backend
@every_method
def test_tol_0_means_exactly_max_steps(method, backend):
    w = testing.with_spectrum(0.5 ** index(5), 7, 5)
    for steps in (1, 2, 17):
        r = gti.power_iteration(
            [w, torch.eye(3), torch.ones(4, 1)],
            method=method,
            tol=0.0,
            max_steps=steps,
            backend=backend,
        )
        assert r.steps.tolist() == [steps] * 3
    slow = gti.power_iteration(w, method=method, tol=1e-14, max_steps=2, backend=backend)
    assert int(slow.steps) == 2 and not bool(slow.converged)


@every_backend
def test_more_steps_never_lower_sigma(backend):
    w = numbers(30, 20)
    for method in ("cg", "power"):
        sigmas = [
            float(
                gti.power_iteration(w, method=method, tol=0.0, max_steps=k, backend=backend).sigma
            )
            for k in range(1, 15)
        ]
        assert all(b >= a * (1 - 1e-14) for a, b in zip(sigmas, sigmas[1:]))


@every_backend
def test_the_power_method_step_by_step(backend):
    w = numbers(9, 6)
    v = start_vectors(5, 0, 6, 1, torch.device("cpu")).double()
    for steps in range(1, 6):
        v = v / v.norm()
        r = gti.power_iteration(
            w, method="power", tol=0.0, max_steps=steps, seed=5, backend=backend
        )
        torch.testing.assert_close(r.v, v, rtol=0, atol=1e-13)
        assert float(r.sigma) == pytest.approx(float((w @ v).norm()), rel=1e-13)
        v = w.T @ (w @ v)


@every_backend
def test_cg_step_by_step_is_the_best_of_its_search_space(backend):
    """Two passes: the best v in span[v, Av]; no step is better."""
    w = numbers(9, 6)
    a = w.T @ w
    v = start_vectors(0, 0, 6, 1, torch.device("cpu")).double()
    basis = torch.linalg.qr(torch.cat([v, a @ v], 1))[0]
    best = torch.linalg.eigvalsh(basis.T @ a @ basis)[-1].sqrt()
    r = gti.power_iteration(w, tol=0.0, max_steps=2, backend=backend)
    assert float(r.sigma) == pytest.approx(float(best), rel=1e-12)
    basis = torch.linalg.qr(torch.cat([v, a @ v, a @ a @ v], 1))[0]
    best = torch.linalg.eigvalsh(basis.T @ a @ basis)[-1].sqrt()
    r = gti.power_iteration(w, tol=0.0, max_steps=3, backend=backend)
    assert float(r.sigma) == pytest.approx(float(best), rel=1e-12)


# ---- start vectors -------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345])
def test_start_vectors_are_the_same_bits_on_every_backend(seed, backend):
    """After one pass v is the start vector, made a unit vector; its elements have 24 bits."""
    ws = [numbers(4, 37), numbers(5, 3, 4), numbers(40, 1)]
    r = gti.power_iteration(ws, tol=0.0, max_steps=1, seed=seed, backend=backend)
    for i, v in enumerate(r.v):
        start = start_vectors(seed, i, v.shape[0], 1, v.device).double()
        torch.testing.assert_close(v * start.norm(), start, rtol=0, atol=1e-13)
    batch = numbers(3, 4, 11)
    r = gti.power_iteration(batch, tol=0.0, max_steps=1, seed=seed, backend=backend)
    for i, v in enumerate(r.v):
        start = start_vectors(seed, i, 11, 1, v.device).double()
        torch.testing.assert_close(v * start.norm(), start, rtol=0, atol=1e-13)


@every_backend
def test_seeds_are_reproducible(backend):
    w = numbers(2, 9, 7)
    a, b, c = (gti.power_iteration(w, max_steps=3, seed=s, backend=backend) for s in (1, 1, 2))
    assert torch.equal(a.v, b.v) and not torch.equal(a.v, c.v)
    assert not torch.equal(a.v[0], a.v[1])


def test_start_vectors_look_random():
    x = start_vectors(0, 0, 100_000, 1, torch.device("cpu")).double().flatten()
    assert abs(float(x.mean())) < 0.01 and abs(float(x.square().mean()) - 1 / 3) < 0.01
    assert float(x.abs().max()) < 1 and x.unique().numel() > 99_000
    assert abs(float((x[1:] * x[:-1]).mean())) < 0.01


# ---- edge cases ----------------------------------------------------------------------------------


@every_backend
@every_method
@every_dtype
def test_a_zero_matrix(dtype, method, backend):
    r = gti.power_iteration(torch.zeros(5, 7, dtype=dtype), method=method, backend=backend)
    assert float(r.sigma) == 0.0 and float(r.upper) == 0.0 and float(r.residual) == 0.0
    assert bool(r.converged)
    assert float(r.u.norm()) == pytest.approx(1) and float(r.v.norm()) == pytest.approx(1)


@every_backend
@every_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_item_is_nan_and_the_others_are_right(bad, dtype, backend):
    good = numbers(5, 9, 7, dtype=dtype)
    expected = gti.power_iteration(good, tol=1e-5, backend=backend)
    for row, column in ((0, 0), (8, 6), (4, 3)):
        w = good.clone()
        w[2, row, column] = bad
        r = gti.power_iteration(w, tol=1e-5, backend=backend)
        as_list = gti.power_iteration(list(w), tol=1e-5, backend=backend)
        for i in range(5):
            if i == 2:
                numbers_of = (r.sigma[i], r.u[i], r.v[i], r.residual[i], r.upper[i])
                assert all(bool(x.isnan().all()) for x in numbers_of)
                assert not bool(r.converged[i]) and not bool(as_list.converged[i])
                assert bool(as_list.sigma[i].isnan().all())
            else:
                assert torch.equal(r.sigma[i], expected.sigma[i])
                assert torch.equal(r.u[i], expected.u[i]) and torch.equal(r.v[i], expected.v[i])
                assert torch.equal(as_list.sigma[i], expected.sigma[i])
                assert bool(r.converged[i])


@pytest.mark.parametrize("at", [(0, 0), (899, 499), (400, 8)])
def test_a_nan_in_a_large_matrix(at):
    w = torch.ones(900, 500)
    w[at] = math.nan
    r = gti.power_iteration([w, torch.eye(3)], backend="cpu")
    assert r.sigma.isnan().flatten().tolist() == [True, False]
    assert r.converged.tolist() == [False, True]


@every_backend
def test_an_empty_batch(backend):
    r = gti.power_iteration(torch.zeros(0, 4, 3), backend=backend)
    shapes = [tuple(x.shape) for x in r]
    assert shapes == [(0, 1), (0, 4, 1), (0, 3, 1), (0, 1), (0,), (0,), (0,)]
    r = gti.power_iteration(torch.zeros(2, 0, 4, 3), backend=backend)
    assert r.sigma.shape == (2, 0, 1) and r.u.shape == (2, 0, 4, 1)
    assert r.converged.dtype == torch.bool and r.steps.dtype == torch.int64


@every_backend
def test_shapes_and_dtypes(backend):
    r = gti.power_iteration(numbers(2, 3, 6, 4, dtype=torch.bfloat16), backend=backend)
    assert (r.sigma.shape, r.u.shape, r.v.shape) == ((2, 3, 1), (2, 3, 6, 1), (2, 3, 4, 1))
    assert r.sigma.dtype == r.u.dtype == r.v.dtype == r.upper.dtype == torch.float32
    ws = [numbers(6, 2, 3, 3, dtype=torch.float16), numbers(5, 4), numbers(2, 9).float()]
    r = gti.power_iteration(ws, tol=1e-6, backend=backend)
    assert r.sigma.shape == (3, 1) and r.sigma.dtype == torch.float64
    assert [tuple(v.shape) for v in r.v] == [(18, 1), (4, 1), (9, 1)]
    assert [v.dtype for v in r.v] == [compute_dtype(w.dtype) for w in ws]
    true = torch.stack([svdvals(w.flatten(1))[0] for w in ws])
    torch.testing.assert_close(r.sigma[:, 0], true, rtol=1e-6, atol=0)


@every_backend
def test_a_start_of_no_use_is_replaced(backend):
    w = numbers(6, 4)
    earlier = gti.power_iteration(w, backend=backend)
    for useless in (0.0, math.nan):
        start = earlier._replace(v=torch.full_like(earlier.v, useless))
        r = gti.power_iteration(w, tol=1e-9, start=start, backend=backend)
        assert float(r.sigma) == pytest.approx(float(svdvals(w)[0]), rel=1e-9)


@every_dtype
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape", [(64, 9001), (9001, 64), (7, 60000), (60000, 13)])
def test_a_short_side_starts_from_its_gram_matrix(shape, k, dtype):
    w = testing.with_spectrum(1 - 0.01 * index(min(shape)), *shape, dtype=dtype)
    assert gti.explain("power_iteration", w, k=k).note.startswith("1 of 1 matrices")
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(gti.power_iteration(w, k=k, tol=1e-5, backend="cpu"))
    r = results[0]
    assert all(map(torch.equal, r, results[1]))
    assert bool(r.converged) and int(r.steps) == (2 if shape[0] > shape[1] else 3)
    torch.testing.assert_close(r.sigma.double(), svdvals(w)[:k], rtol=1e-6, atol=0)
    check_several(w, r, atol=1000 * torch.finfo(r.u.dtype).eps)


@pytest.mark.parametrize(
    "options",
    [{"tol": 0.0}, {"method": "power"}, {"max_steps": 3}, {"k": 40}],
    ids=["exactly max_steps", "power", "few steps", "many triples"],
)
def test_no_gram_matrix_where_it_does_not_pay(options):
    w = numbers(64, 9001, dtype=torch.float32)
    assert gti.explain("power_iteration", w, **options).note in ("", NO_GRAM)
    assert gti.explain("power_iteration", numbers(64, 64)).note == NO_GRAM
    start = gti.power_iteration(w)
    note = gti.explain("power_iteration", w, start=start).note
    assert note == NO_GRAM.replace("at random", "from the earlier result")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_on_a_gpu_no_gram_matrix_is_formed_and_explain_says_so(backend):
    w = numbers(2, 64, 9001, dtype=torch.float32)
    start = gti.power_iteration(w, max_steps=1)
    note = ops.note(backend, w)
    assert note.startswith("2 of 2 matrices start at random: on a GPU none from the Gram matrix")
    warm = ops.note(backend, w, start=start)
    assert warm == note.replace("at random", "from the earlier result")
    with pytest.raises(ValueError, match="max_steps"):
        ops.note(backend, w, max_steps=0)


NO_GRAM = "0 of 1 matrices start from the Gram matrix of their short side, the others at random"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("power", [-0.65, 0.65, math.nan])
def test_a_gram_matrix_out_of_range_is_no_start(power, dtype):
    w = numbers(9001, 20, dtype=dtype)
    scale = torch.finfo(dtype).max ** power
    r = gti.power_iteration(w * scale, tol=1e-6, backend="cpu")
    if math.isnan(power):
        assert math.isnan(float(r.sigma)) and not bool(r.converged)
    else:
        assert bool(r.converged)
        rel = 1e-9 if dtype == torch.float64 else 1e-6
        assert float(r.sigma) / scale == pytest.approx(float(svdvals(w)[0]), rel=rel)


@every_backend
@every_method
@every_dtype
def test_several_triples(dtype, method, backend):
    w = testing.with_spectrum(0.6 ** index(12), 20, 12, dtype=dtype)
    k = 4
    r = gti.power_iteration(w, k=k, method=method, tol=1e-5, max_steps=300, backend=backend)
    eps = torch.finfo(r.u.dtype).eps
    assert bool(r.converged) and r.sigma.shape == (k,)
    torch.testing.assert_close(r.sigma.double(), svdvals(w)[:k], rtol=1e-4, atol=0)
    check_several(w, r, atol=200 * eps)
    start = gti.power_iteration(w, k=k, tol=1e-5, start=r, backend=backend)
    assert int(start.steps) <= 2


def check_several(w: torch.Tensor, r: gti.SingularTriples, atol: float) -> None:
    """W v = σ u for orthonormal u and v, relative to σ₁ = 1."""
    assert bool((r.sigma[..., :-1] >= r.sigma[..., 1:] - atol).all())
    eye = torch.eye(r.sigma.shape[-1], dtype=torch.float64)
    u, v = r.u.double(), r.v.double()
    for x in (u, v):
        torch.testing.assert_close(x.mT @ x, eye.expand_as(x.mT @ x), rtol=0, atol=atol)
    assert float((w.double() @ v - u * r.sigma.double()[..., None, :]).abs().max()) <= atol


@every_dtype
@pytest.mark.parametrize("method", ["cg", "power"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (40, 64), (33, 147), (1025, 96), (70, 2080)])
@pytest.mark.parametrize("k", [2, 3, 16])
def test_several_triples_of_every_kind_of_row(shape, k, method, dtype):
    """Packed, in pairs, with and without tails, small and large; k odd, even, the most."""
    k = min(k, *shape)
    w = testing.with_spectrum(0.7 ** index(min(shape)), *shape, dtype=dtype)
    tol = 1e-5 if dtype == torch.float64 else 1e-3
    r = gti.power_iteration(w, k=k, method=method, tol=tol, max_steps=2000, backend="cpu")
    assert bool(r.converged)
    eps = torch.finfo(r.u.dtype).eps
    # The residual bounds the error of θ = σ², relative to θ₁ = 1.
    torch.testing.assert_close(r.sigma.double() ** 2, svdvals(w)[:k] ** 2, rtol=0, atol=2 * tol)
    check_several(w, r, atol=4000 * eps)


@every_method
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("shape", [(30, 20), (600, 400)])
def test_the_compiled_kernel_goes_the_way_of_the_reference(shape, k, method):
    w = numbers(*shape)
    for steps in (1, 2, 5):
        options = dict(k=k, method=method, max_steps=steps, tol=0.0)
        cpu, ref = (gti.power_iteration(w, backend=b, **options) for b in BACKENDS)
        torch.testing.assert_close(cpu.sigma, ref.sigma, rtol=1e-9, atol=0)
        torch.testing.assert_close(cpu.residual, ref.residual, rtol=1e-6, atol=0)
        torch.testing.assert_close(cpu.v.abs(), ref.v.abs(), rtol=0, atol=1e-8)  # a sign is free


def test_several_triples_are_the_same_bits_for_any_number_of_threads():
    batch = [numbers(700, 900, dtype=torch.bfloat16), numbers(900, 1024), numbers(30, 40)]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gti.power_iteration(batch, k=3, max_steps=5, tol=0, backend="cpu"))
    for r in results[1:]:
        assert torch.equal(r.sigma, results[0].sigma)
        assert all(map(torch.equal, r.u, results[0].u)) and all(map(torch.equal, r.v, results[0].v))


@every_backend
def test_as_many_triples_as_there_are(backend):
    batch = numbers(2, 4, 6)
    r = gti.power_iteration(batch, k=4, tol=1e-10, max_steps=500, backend=backend)
    torch.testing.assert_close(r.sigma, torch.linalg.svdvals(batch))
    back = r.u @ torch.diag_embed(r.sigma) @ r.v.mT
    torch.testing.assert_close(back, batch)
    low = testing.with_spectrum(torch.tensor([2.0, 1.0]), 6, 5)
    r = gti.power_iteration(low, k=4, tol=1e-8, backend=backend)
    torch.testing.assert_close(r.u.T @ r.u, torch.eye(4, dtype=torch.float64))
    assert r.sigma[2:].abs().max() <= 1e-12


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_steps_after_convergence_do_no_harm(backend, dtype):
    """Residuals that are rounding are no directions, least of all where 3k > n."""
    sigma = torch.tensor([2, 2, 2, 1, 1, 1, 0.5, 0.5, 0.5, 0.25], dtype=dtype)
    w = testing.with_spectrum(sigma, 30, 12)
    r = gti.power_iteration(w, k=5, tol=0.0, max_steps=90, backend=backend)
    eps = torch.finfo(dtype).eps
    assert ((r.sigma - sigma[:5]).abs() < 100 * eps).all()
    assert (r.v.mT @ r.v - torch.eye(5, dtype=r.v.dtype)).abs().max() < 300 * eps


def test_shapes_on_the_meta_device():
    r = gti.power_iteration([torch.empty(4, 3, 2, device="meta"), torch.empty(3, 5, device="meta")])
    assert r.sigma.shape == (2, 1) and r.v[0].shape == (6, 1) and r.u[1].is_meta


def test_a_zero_without_memory():
    assert float(gti.power_iteration(torch._efficientzerotensor(3, 4)).sigma) == 0.0


@every_backend
def test_a_start_of_another_dtype_and_seeds_of_any_size(backend):
    w = numbers(6, 4)
    first = gti.power_iteration(w, tol=1e-3)
    for start in (first._replace(v=first.v.float()), first._replace(v=first.v.half())):
        r = gti.power_iteration(w, start=start, tol=1e-2, backend=backend)
        assert int(r.steps) == 1 and r.v.dtype == torch.float64
    same = [
        gti.top_singular_values(w, seed=seed, max_steps=2, backend=backend)
        for seed in (-1, 2**64 - 1, 2**70 - 1)
    ]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])


# ---- matrices whose residuals vanish -------------------------------------------------------------


def sparse_integers(m: int, n: int, kind: int, generator: torch.Generator) -> torch.Tensor:
    """Matrices that are known to the last bit after a few steps, so that what is left is zero or
    subnormal: a few ones, all ones, products of small integers, multiples of the identity."""

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator).double()

    if kind == 0:
        w = torch.zeros(m, n, dtype=torch.float64)
        for _ in range(int(draw(4))):
            w[int(draw(m)), int(draw(n))] = float(draw(3)) + 1
        return w
    if kind == 1:
        return torch.ones(m, n, dtype=torch.float64)
    if kind == 2:
        r = int(draw(3)) + 1
        return draw(3, m, r) @ draw(3, r, n)
    return torch.eye(m, n, dtype=torch.float64) * (float(draw(7)) + 1) / 8


@every_method
@every_dtype
def test_what_is_left_of_a_residual_may_be_subnormal(dtype, method):
    generator = torch.Generator().manual_seed(2)
    eps = torch.finfo(compute_dtype(dtype)).eps
    for number in range(600):
        m, n = (int(x) for x in torch.randint(1, 40, (2,), generator=generator))
        k = int(torch.randint(1, min(m, n, 16) + 1, (), generator=generator))
        w = sparse_integers(m, n, number % 4, generator).to(dtype)
        tol, steps = ((0.0, 10), (0.0, 60), (1e-7, 60), (1e-12, 60), (1e-4, 100))[number // 4 % 5]
        r = gti.power_iteration(w, k=k, tol=tol, max_steps=steps, method=method, backend="cpu")
        true = torch.linalg.svdvals(w.double())
        for x in r:
            assert bool(torch.isfinite(x).all())
        assert bool(r.converged) == bool((r.residual <= tol).all())
        assert float(r.sigma[0]) <= float(true[0]) * (1 + 32 * eps)
        assert float(r.upper) >= float(true[0]) * (1 - 2.0**-50)
        for x in (r.u, r.v):
            gram = x.double().T @ x.double()
            torch.testing.assert_close(gram, torch.eye(k).double(), atol=100 * eps, rtol=0)
        if method == "cg" and steps > 10:
            assert float(r.sigma[0]) == pytest.approx(float(true[0]), rel=1e-4)


@every_backend
def test_a_start_in_what_is_almost_the_null_space(backend):
    w = torch.diag(torch.tensor([1.0, 1e-22]))
    start = gti.power_iteration(w, max_steps=1)._replace(v=torch.tensor([[0.0], [1.0]]))
    for method in ("power", "cg"):
        r = gti.power_iteration(
            w, method=method, tol=0.0, max_steps=20, start=start, backend=backend
        )
        # The start is a singular vector: that its neighbour is larger takes luck.
        assert any(float(r.sigma) == pytest.approx(s, rel=0.02) for s in (1.0, 1e-22))
        for x in r:
            assert bool(torch.isfinite(x).all())
    layer = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([0.0, 1.0])))
    gti.nn.spectral_norm(layer, n_power_iterations=3)
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(w)
    assert bool(torch.isfinite(layer.weight).all())


@every_backend
def test_a_nan_within_the_iteration_is_not_converged(backend):
    """Products that leave the range of fp32: never NaN with converged."""
    for scale in (1e-30, 1e-38, 1e30):
        w = scale * torch.eye(5, 3)
        w[0, 0] *= 0.5
        r = gti.power_iteration(w, k=3, tol=0.0, max_steps=30, backend=backend)
        assert bool(torch.isfinite(r.sigma).all()) or not bool(r.converged)
        assert float(r.sigma[0]) == pytest.approx(scale, rel=1e-5)


@every_backend
def test_vmap_with_one_start_for_all(backend):
    w = numbers(5, 4)
    start = gti.power_iteration(w, backend=backend)
    ws = torch.stack([w, 2 * w])
    got = torch.func.vmap(
        lambda w: gti.top_singular_values(w, start=start, backend=backend), randomness="error"
    )(ws)
    torch.testing.assert_close(got[:, 0], torch.linalg.svdvals(ws)[:, 0], rtol=1e-6, atol=0)
    lists = torch.func.vmap(
        lambda w: gti.top_singular_values(
            [w, w.T], start=start._replace(v=[start.v, start.u]), backend=backend
        )
    )(ws)
    torch.testing.assert_close(lists[:, 1], got, rtol=1e-6, atol=0)


def test_explain_refuses_a_start_that_the_call_would():
    w = numbers(5, 4)
    for start in ("x", gti.power_iteration(numbers(5, 3))):
        with pytest.raises((TypeError, ValueError), match=r"power_iteration: start"):
            gti.explain("power_iteration", w, start=start)
