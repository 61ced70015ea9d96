"""Checks of the Triton kernels, run by test_triton_interpreter.py in a process of its own.

`TRITON_INTERPRET=1` must be set before triton is imported, so pytest does not collect this file by
itself. On a machine with a GPU, `pytest tests/triton_cases.py` runs the same checks on it.

The rule is that of `testing.compare`. Where fp32 is stored as bf16 the interpreter truncates (a GPU
rounds to nearest), so the leapfrog has it here as its own function: a kernel's error against the
reference in fp64 is at most four times that of the reference in the working dtype, plus two units
in the last place of the largest number; for bf16 in the interpreter one more for each element.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

INTERPRETING = bool(triton.knobs.runtime.interpret)
if not INTERPRETING and not torch.cuda.is_available():
    pytest.skip("no GPU, and TRITON_INTERPRET is not set", allow_module_level=True)
DEVICE = torch.device("cpu" if INTERPRETING else "cuda")
if INTERPRETING and not hasattr(triton._C.libtriton.interpreter, "fma_fp64"):
    pytest.skip("this Triton's interpreter rounds an fma twice", allow_module_level=True)
on_gpu_only = pytest.mark.skipif(INTERPRETING, reason="needs a GPU")

import gti_kernels  # noqa: E402
from gti_kernels import device_plans, testing  # noqa: E402
from gti_kernels.reference import gram as ref_gram  # noqa: E402
from gti_kernels.reference import kinetic_energy as ref_energy  # noqa: E402
from gti_kernels.reference import leapfrog as ref_leapfrog  # noqa: E402
from gti_kernels.reference import phase_space as ref_phase  # noqa: E402
from gti_kernels.reference import power_iteration as ref_power  # noqa: E402
from gti_kernels.reference import two_form as ref_form  # noqa: E402
from gti_kernels.triton_kernels import (  # noqa: E402
    gram,
    inner_products,
    leapfrog,
    phase_space,
    power_iteration,
    two_form,
)
from gti_kernels.triton_kernels import kinetic_energy as energy  # noqa: E402

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BLOCK = leapfrog.BLOCK
SIZES = [1, 0, 7, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 3 * BLOCK]


def normal(shape: tuple[int, ...] | int, dtype: torch.dtype, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    shape = (shape,) if isinstance(shape, int) else shape
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).to(DEVICE)


def normals(sizes: list[int], dtypes: list[torch.dtype], seed: int) -> list[Tensor]:
    return [normal(n, dtypes[i % len(dtypes)], 1000 * seed + i) for i, n in enumerate(sizes)]


def copies(xs: list[Tensor]) -> list[Tensor]:
    return [x.clone() for x in xs]


def doubles(xs: list) -> list:
    return [x.double() if isinstance(x, Tensor) else x for x in xs]


def check_stored(got: list[Tensor], working: list[Tensor], exact: list[Tensor]) -> None:
    for g, w, e in zip(got, working, exact, strict=True):
        if g.numel() == 0:
            continue
        eps = torch.finfo(g.dtype).eps
        limit = 4 * (w.double() - e).abs().max() + 2 * eps * e.abs().max()
        if INTERPRETING and g.dtype == torch.bfloat16:
            limit = limit + eps * e.abs()
        assert ((g.double() - e).abs() <= limit).all()


# --- leapfrog, kinetic_energy ---------------------------------------------------------------------


@pytest.mark.parametrize("mass", ["numbers", "tensors"])
@pytest.mark.parametrize("dtype", [*DTYPES, "mixed"], ids=str)
def test_leapfrog_parity(dtype: torch.dtype | str, mass: str) -> None:
    dtypes = DTYPES if dtype == "mixed" else [dtype]
    q, p, g, w = (normals(SIZES, dtypes, seed) for seed in range(4))
    inv_mass = [0.1 + 0.3 * i for i in range(len(SIZES))] if mass == "numbers" else w
    for kick, drift, damp in ((0.1, 0.3, 1.0), (-0.7, -0.2, 0.9)):
        runs = []
        for op, wide in ((leapfrog, False), (ref_leapfrog, False), (ref_leapfrog, True)):
            cast = doubles if wide else list
            a = [cast(copies(x)) for x in (q, p)]
            b = [cast(copies(x)) for x in (q, p)]
            gs, ms = cast(g), cast(inv_mass)
            op.kick_(a[1], gs, kick, damp)
            op.drift_(a[0], a[1], drift, ms)
            k = op.kick_drift_(*b, gs, kick, drift, ms, damp)
            runs.append((*a[0], *a[1], *b[0], *b[1]))
            if op is leapfrog:
                stored, energy_of_stored = b[1], k
        check_stored(*map(list, runs))
        # The energy is that of the p in memory, so it does not share the tolerance of the step.
        assert energy_of_stored.shape == () and energy_of_stored.dtype == torch.float64
        expected = ref_energy.kinetic_energy(stored, inv_mass)
        total = ref_energy.kinetic_energy(stored, [1.0] * len(stored))
        assert abs(energy_of_stored - expected) <= 1e-13 * total
        assert abs(energy.kinetic_energy(stored, inv_mass) - expected) <= 1e-13 * total


def test_leapfrog_leaves_the_rest_of_memory_alone() -> None:
    """Views that start off a 16-byte boundary, with guards on both sides."""
    sizes = [1, BLOCK - 1, BLOCK, BLOCK + 5]
    q, p, g = (normal(sum(sizes) + 20, torch.float32, seed) for seed in range(3))
    before_q, before_p, before_g = q.clone(), p.clone(), g.clone()
    inside = torch.zeros(q.numel(), dtype=torch.bool, device=DEVICE)
    views: list[list[Tensor]] = [[], [], []]
    start = 1
    for n in sizes:
        for view, x in zip(views, (q, p, g), strict=True):
            view.append(x[start : start + n])
        inside[start : start + n] = True
        start += n + 3
    leapfrog.kick_drift_(*views, 0.5, 0.25, [1.0] * len(sizes), 0.75)
    assert torch.equal(g, before_g)
    for x, before in ((q, before_q), (p, before_p)):
        assert torch.equal(x[~inside], before[~inside])
        assert not (x[inside] == before[inside]).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_leapfrog_reads_factors_from_memory(dtype: torch.dtype) -> None:
    q, p, g = (normals(SIZES, [dtype], seed) for seed in range(3))
    runs = []
    for wrap in (float, lambda x: torch.tensor(x, dtype=torch.float64, device=DEVICE)):
        a, b = copies(q), copies(p)
        leapfrog.kick_(b, g, wrap(0.1), wrap(0.9))
        leapfrog.drift_(a, b, wrap(-0.7), [0.3] * len(q))
        k = leapfrog.kick_drift_(a, b, g, wrap(0.1), 0.2, q, wrap(0.8))
        runs.append([*a, *b, k])
    for x, y in zip(*runs, strict=True):
        assert torch.equal(x, y) or (x.isnan() & y.isnan()).all()


def test_leapfrog_scalars_are_fp64() -> None:
    """0.1 as fp32 is off by 1.5e-9: fp64 tensors must not see that."""
    for scalar in (0.1, 1 / 3, 1e-60, -1e-3):
        p, g = normal(9, torch.float64, 0), normal(9, torch.float64, 1)
        q = torch.zeros_like(p)
        expected = -scalar * g
        got = torch.zeros_like(p)
        leapfrog.kick_([got], [g], scalar, 1.0)
        assert torch.allclose(got, expected, rtol=1e-15, atol=0)
        leapfrog.drift_([q], [p], scalar, [1 / 7])
        assert torch.allclose(q, scalar * p / 7, rtol=1e-15, atol=0)
        got = p.clone()
        leapfrog.kick_([got], [g], 0.0, scalar)
        assert torch.allclose(got, scalar * p, rtol=1e-15, atol=0)


def test_long_and_empty_lists() -> None:
    sizes = [1 + i % 3 for i in range(300)]
    q, p, g = (normals(sizes, [torch.float64], seed) for seed in range(3))
    mass = [1.0 + i for i in range(300)]
    a, b = (copies(q), copies(p)), (copies(q), copies(p))
    k = leapfrog.kick_drift_(*a, g, 0.1, 0.2, mass, 0.9)
    expected = ref_leapfrog.kick_drift_(*b, g, 0.1, 0.2, mass, 0.9)
    for x, y in zip((*a[0], *a[1]), (*b[0], *b[1]), strict=True):
        assert torch.allclose(x, y, rtol=1e-14, atol=1e-14)
    assert math.isclose(k, expected, rel_tol=1e-13)
    empty = [torch.empty(0, device=DEVICE)]
    assert leapfrog.kick_drift_(empty, empty, empty, 0.1, 0.1, [1.0], 1.0) == 0
    assert energy.kinetic_energy([], []) == 0
    leapfrog.kick_([], [], 0.1, 1.0)


def test_energy_of_many_blocks_twice() -> None:
    """More partial sums than one program of the second kernel adds up; the same bits twice."""
    from gti_kernels.triton_kernels.ragged import SUM_BLOCK, SUM_ROUNDS, fixed_sum

    n = SUM_BLOCK * SUM_ROUNDS + 3
    x = normal(n, torch.float64, 0)
    total = fixed_sum(x)
    assert abs(total - x.sum()) <= 1e-13 * x.abs().sum()
    assert torch.equal(total, fixed_sum(x.clone()))
    p = normals([5 * energy.BLOCK + 1, 3], [torch.float32], 0)
    assert torch.equal(energy.kinetic_energy(p, [0.3, 2.0]), energy.kinetic_energy(p, [0.3, 2.0]))


# --- phase_space: the same bits as the reference --------------------------------------------------

PHASE_SIZES = [1, 0, 7, phase_space.BLOCK, phase_space.BLOCK + 5]


def same_bits(xs: list[Tensor], ys: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("mass, numbers", [("numbers", "host"), ("tensors", "device")])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_phase_step_bits(dtype: torch.dtype, wide: torch.dtype, mass: str, numbers: str) -> None:
    q, g = (normals(PHASE_SIZES, [dtype], seed) for seed in (0, 2))
    p, w = (normals(PHASE_SIZES, [wide], seed) for seed in (1, 3))
    grads: list[Tensor | None] = [None if i == 2 else x for i, x in enumerate(g)]
    inv_mass = [0.1 + 0.3 * i for i in range(len(q))] if mass == "numbers" else w
    runs = []
    for backend in ("reference", "triton"):
        a, b = copies(q), copies(p)
        factors = [0.1, 0.9, 0.01]
        if numbers == "device":
            factors = [torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in factors]
        plan = device_plans.PhasePlan(phase_space, a, b, inv_mass, [])

        def step(grads: Any, skipped: tuple[int, ...], *numbers: Any) -> Tensor:
            if backend == "triton":
                return plan.step(grads, skipped, *numbers)
            return ref_phase.phase_step(a, b, grads, inv_mass, *numbers, skipped)

        energy = step(grads, (), True, True, *factors, 2**64 - 12345)
        assert same_bits([a[2], b[2]], [q[2], p[2]])  # no gradient: nothing of it moves
        step([None] * len(q), (0, 4), False, True, 0.0, 1.0, 0.03, 77)
        none = step(grads, (), True, False, 0.3, 0.7, 0.0, 77)
        assert float(none) == 0.0
        runs.append((a, b, float(energy)))
    assert same_bits(runs[0][0], runs[1][0])
    if INTERPRETING or dtype.itemsize != 2:  # a 0-d tensor may be rounded to fp32 by torch
        assert same_bits(runs[0][1], runs[1][1])
    assert math.isclose(runs[0][2], runs[1][2], rel_tol=1e-12)


def test_what_a_replay_counts_is_added_to_the_key() -> None:
    """The kernel reads it on the device: a replayed CUDA graph rounds with other random bits."""
    runs = []
    for counted, key in ((0, 5), (2**62 + 12345, 5 - 2**62 - 12345), (0, 6)):
        q, p = [normal(700, torch.bfloat16, 0)], [normal(700, torch.float32, 1)]
        plan = device_plans.PhasePlan(phase_space, q, p, [1.0], [])
        plan._zero.fill_(counted)
        plan.step(None, (), False, True, 0.0, 1.0, 0.01, key)
        runs.append(q)
    assert same_bits(runs[0], runs[1]) and not same_bits(runs[0], runs[2])


@pytest.mark.parametrize("mass, own", [("numbers", None), ("tensors", 3)])  # own: another s
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grid_step_bits(dtype: torch.dtype, mass: str, own: int | None) -> None:
    q, g, r = (normals(PHASE_SIZES, [dtype], seed) for seed in range(3))
    draw = torch.Generator().manual_seed(5)
    P, Q = (
        [torch.randint(-(2**n), 2**n, x.shape, generator=draw).to(DEVICE) for x in q]
        for n in (61, 54)
    )
    w = normals(PHASE_SIZES, [torch.float64], 3)
    rest: list[Tensor | None] = [None if i == 3 else x for i, x in enumerate(r)]
    grads: list[Tensor | None] = [None if i == 2 else x for i, x in enumerate(g)]
    inv_mass = [0.1 + 0.3 * i for i in range(len(q))] if mass == "numbers" else w
    units = [2.0 ** (-48 + i) for i in range(len(q))], [2.0**-40] * len(q)
    runs = []
    for backend in ("reference", "triton"):
        a, b, c = copies(q), copies(Q), copies(P)
        seen = [[x.view(torch.float64) for x in xs] for xs in (b, c)]
        plan = device_plans.GridPlan(phase_space, a, *seen, rest, inv_mass, [], *units)

        def step(*numbers: float, grads: list[Tensor | None] = grads) -> tuple[int, bool, float]:
            *numbers, s = numbers
            others = {} if own is None else {own: 3.0 * s}
            if backend == "triton":
                results = plan.step(grads, (2,), *numbers, s, others)
            else:
                scale = [others.get(i, s) for i in range(len(q))]
                lists = (a, rest, b, c, grads, inv_mass, *units)
                results = ref_phase.grid_step(*lists, scale, *numbers, (2,))
            return int(results[0]) & ref_phase.MASK, bool(results[1]), float(results[2])

        told = [step(True, True, False, 0.1, 1e-7, 0.5), step(True, False, False, 0.2, 0.0, 0.5)]
        mid = [*copies(a), *copies(b), *copies(c)]
        assert same_bits([a[2], b[2], c[2]], [q[2], Q[2], P[2]])
        told += [step(True, False, True, 0.2, 0.0, 0.5), step(False, True, True, 0.0, 1e-7, 0.5)]
        told += [step(True, False, True, 0.1, 0.0, 0.5)]
        assert same_bits([*b, *c], [*Q, *P])  # every bit has come back
        assert all(inside for _, inside, _ in told)
        for bad in (math.nan, 1e30 if dtype.itemsize > 2 else math.inf):
            broken = [None if x is None else x.clone() for x in grads]
            broken[-1][-1] = bad
            for back in (False, True):
                assert not step(True, True, back, 0.1, 1e-7, 0.5, grads=broken)[1]
                step(False, True, not back, 0.0, 1e-7, 0.5)
                step(True, False, not back, 0.1, 0.0, 0.5, grads=broken)
            assert same_bits([*b, *c], [*Q, *P])
        c[-1][-1] = 2**62 - 1  # a coordinate leaves, no increment
        edge = [None if x is None else torch.full_like(x, -1e-3) for x in grads]
        assert not step(True, False, False, 0.1, 0.0, 0.5, grads=edge)[1]
        for x in c:
            x.zero_()
        c[-1][-1] = (
            1000 if float(inv_mass[-1].view(-1)[-1] if mass == "tensors" else 1) > 0 else -1000
        )
        for room in (2**20, 1):  # a position leaves, no increment
            b[-1][-1] = 2**62 - room
            assert step(False, True, False, 0.0, 1.0, 0.5)[1] == (room > 1)
        runs.append((mid, told))
    assert same_bits(runs[0][0], runs[1][0])
    for (sum_a, _, k_a), (sum_b, _, k_b) in zip(runs[0][1], runs[1][1], strict=True):
        assert sum_a == sum_b and math.isclose(k_a, k_b, rel_tol=1e-9)
    assert runs[0][1][0][0] == runs[0][1][4][0] != 0


@pytest.mark.parametrize("exact", [False, True])
def test_phase_space_runs_on_triton(exact: bool) -> None:
    runs = []
    for backend in ("triton", "reference"):
        q = [normal(n, torch.bfloat16, n) for n in (40, 1025)]
        start = copies(q)
        space = gti_kernels.PhaseSpace(q, momentum="gaussian", exact=exact, backend=backend)
        walk = {"steps": 2, "damping": 0.1}
        space.leapfrog_(lambda q: [torch.sin(x) for x in q], 0.1, **walk)
        runs.append([*copies(q), *space.momenta])
        if exact:
            space.leapfrog_(lambda q: [torch.sin(x) for x in q], -0.1, **walk)
            assert same_bits(q, start)
    assert same_bits(*runs)


# --- two_form -------------------------------------------------------------------------------------


def tangents(m: int, sizes: list[int], dtypes: list[torch.dtype], seed: int) -> list[Tensor]:
    return [normal((m, n), dtypes[t % len(dtypes)], 100 * seed + t) for t, n in enumerate(sizes)]


def check_form(dq: list[Tensor], dp: list[Tensor], metric: bool = True) -> None:
    omega, bound, gram = two_form.two_form(dq, dp, metric)
    exact, _, exact_gram = ref_form.two_form(dq, dp, True)
    norm = exact_gram.diagonal().sqrt()
    assert torch.equal(omega, -omega.T) and not omega.diagonal().any()
    assert ((omega - exact).abs() <= bound).all()
    fine = 1e-15 if dq[0].dtype == torch.float64 else 5e-14
    assert (bound <= fine * torch.outer(norm, norm)).all()
    assert (gram is None) == (not metric)
    if gram is not None:
        assert torch.equal(gram, gram.T)
        assert ((gram - exact_gram).abs() <= fine * torch.outer(norm, norm)).all()


@pytest.mark.parametrize("m", [1, 2, 3, 5, 16, 17, 40])
def test_two_form_parity(m: int) -> None:
    few = [1, 0, 33] if m >= 16 else [1, 0, 130, 300]
    check_form(tangents(m, few, [torch.float32], 1), tangents(m, few, [torch.float32], 2))
    few = [9] if m >= 16 else few
    check_form(tangents(m, few, [torch.float64], 1), tangents(m, few, [torch.float64], 2), m < 40)


@pytest.mark.parametrize("dtypes", [DTYPES, DTYPES[1:], [torch.bfloat16], [torch.float16]], ids=str)
def test_two_form_mixed(dtypes: list[torch.dtype]) -> None:
    sizes = [5, 260, 1, 64]
    check_form(tangents(3, sizes, dtypes, 1), tangents(3, sizes, dtypes, 2), metric=False)


@pytest.mark.parametrize(
    "dtype, m, sizes",
    [
        (torch.float32, 2, [4_000, 3]),  # several blocks a program
        (torch.float32, 4, [1 + i % 2 for i in range(40)]),  # several tensors a program
        (torch.float64, 4, [1 + i % 2 for i in range(40)]),
        (torch.float64, 2, [2_000, 3]),
        (torch.bfloat16, 7, [200, 100]),
        (torch.float16, 33, [40]),
    ],
    ids=str,
)
def test_two_form_of_integers_is_bitwise(dtype: torch.dtype, m: int, sizes: list[int]) -> None:
    g = torch.Generator().manual_seed(0)
    dq, dp = (
        [torch.randint(-9, 10, (m, n), generator=g).to(dtype).to(DEVICE) for n in sizes]
        for _ in "qp"
    )
    q, p = torch.cat(dq, 1).double(), torch.cat(dp, 1).double()
    for metric in (False, True) if m < 33 else (True,):
        omega, _, gram = two_form.two_form(dq, dp, metric)
        assert torch.equal(omega, q @ p.T - p @ q.T)
        if gram is not None:
            assert torch.equal(gram, q @ q.T + p @ p.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("m", [3, 6])
def test_two_form_twice_gives_the_same_bits(m: int, dtype: torch.dtype) -> None:
    dq, dp = tangents(m, [600, 7], [dtype], 1), tangents(m, [600, 7], [dtype], 2)
    first, second = two_form.two_form(dq, dp, True), two_form.two_form(copies(dq), dp, True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_copied_for_an_older_triton_give_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = tangents(6, [90, 7], [dtype], 1), tangents(6, [90, 7], [dtype], 2)
    weight = [w[0] for w in tangents(1, [90, 7], [dtype], 3)]
    results = []
    for takes_halves in (False, INTERPRETING or inner_products.DOT_OF_HALVES):
        monkeypatch.setattr(inner_products, "DOT_OF_HALVES", takes_halves)
        results.append([*two_form.two_form(x, y, True), *gram.gram(x, None, weight)])
        results[-1] += gram.gram(x, y, None)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("metric", [False, True])
def test_two_form_of_a_batch_is_its_problems(metric: bool) -> None:
    q, p = normal((3, 2, 9), torch.float32, 1), normal((3, 2, 9), torch.float32, 2)
    together = gti_kernels.two_form(q, p, metric=metric, backend="triton")
    for i in range(3):
        alone = two_form.two_form([q[i]], [p[i]], metric)
        for x, y in zip(together, alone, strict=True):
            assert (x is None and y is None) or torch.equal(x[i], y)


def test_two_form_sums_in_several_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with more partial sums than one round of the second kernel takes."""
    monkeypatch.setattr(inner_products, "REDUCE_BLOCK", 2)
    for dtype in (torch.float32, torch.float64):
        check_form(tangents(2, [3_100], [dtype], 1), tangents(2, [3_100], [dtype], 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("m", [3, 6])
def test_two_form_bound_holds_where_all_cancels(dtype: torch.dtype, m: int) -> None:
    """dp = S dq with S diagonal has Ω = 0, and products that range over 40 decimal orders."""
    n = 150
    scale = 10.0 ** torch.linspace(-10, 10, n, dtype=torch.float64)
    dq = (normal((m, n), torch.float64, 0).cpu() * scale).to(dtype)
    dp = (dq * torch.linspace(-1, 1, n, dtype=dtype)).to(dtype)
    omega, bound, _ = two_form.two_form([dq.to(DEVICE)], [dp.to(DEVICE)], False)
    for i in range(m):
        for j in range(m):
            exact = sum(
                Fraction(a) * Fraction(b) - Fraction(c) * Fraction(d)
                for a, b, c, d in zip(
                    *(x.tolist() for x in (dq[i], dp[j], dp[i], dq[j])), strict=True
                )
            )
            assert abs(Fraction(omega[i, j].item()) - exact) <= Fraction(bound[i, j].item())


def test_two_form_nan_stays_in_its_row_and_column() -> None:
    for m, dtype in ((5, torch.float32), (3, torch.float32), (3, torch.float64)):
        for spoil_p in (False, True):
            dq, dp = tangents(m, [50], [dtype], 1), tangents(m, [50], [dtype], 2)
            clean, _, clean_gram = two_form.two_form(dq, dp, True)
            (dp if spoil_p else dq)[0][1, 7] = float("nan")
            omega, bound, gram = two_form.two_form(dq, dp, True)
            hit = torch.zeros(m, m, dtype=torch.bool, device=DEVICE)
            hit[1], hit[:, 1] = True, True
            for x, y in ((omega, clean), (gram, clean_gram)):
                assert torch.equal(x.isnan(), hit) and torch.equal(x[~hit], y[~hit])
            assert torch.equal(bound.isnan(), hit)


# --- gram -----------------------------------------------------------------------------------------


def check_gram(a: list[Tensor], b: list[Tensor] | None, w: list[Tensor] | None) -> None:
    got, bound = gram.gram(a, b, w)
    exact, truth_bound = ref_gram.gram(a, b, w)
    y = a if b is None else b
    weight = [x.new_ones(x.shape[-1]) for x in a] if w is None else w
    size = [
        sum((v.double().abs() * t.double().square()).sum(-1) for t, v in zip(x, weight)).sqrt()
        for x in (a, y)
    ]
    size = size[0][..., :, None] * size[1][..., None, :]
    assert got.shape == exact.shape == (*a[0].shape[:-1], y[0].shape[-2])
    assert ((got - exact).abs() <= bound + truth_bound).all()
    # Of size where the sum is, and no larger.
    compensated = any(t.dtype == torch.float64 for t in (*a, *weight))
    assert (bound <= (1.2e-16 * exact.abs() + 1e-26 * size if compensated else 2e-14 * size)).all()
    assert compensated or (bound >= 2e-15 * size).all()
    if b is None:
        assert torch.equal(got, got.mT) and torch.equal(bound, bound.mT)


@pytest.mark.parametrize("weight", [None, torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_gram_parity(dtype: torch.dtype, weight: torch.dtype | None) -> None:
    sizes = [1, 0, 130, 9]
    w = None if weight is None else [t * 2.0**-20 for t in normals(sizes, [weight], 3)]
    for m, l in ((1, 3), (3, 2), (2, 5)):
        a, b = tangents(m, sizes, [dtype], 1), tangents(l, sizes, [dtype], 2)
        b = [t * 2.0**8 for t in b]  # norms that differ: none may stand in for another
        check_gram(a, b, w)
        check_gram(b, None, w)


def test_gram_of_many_vectors() -> None:
    """More than one tile down, across, both."""
    for m, l in ((20, 3), (34, 33)):
        a, b, w = (
            tangents(m, [70, 3], [torch.float32], 1),
            tangents(l, [70, 3], DTYPES[1:2], 2),
            None,
        )
        check_gram(a, b, w)
        check_gram(b, None, normals([70, 3], [torch.float32], 3))
    a, b = tangents(6, [9], [torch.float64], 1), tangents(9, [9], [torch.float64], 2)
    check_gram(a, b, normals([9], [torch.float64], 3))
    check_gram(b, None, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gram_of_a_batch_is_its_problems(dtype: torch.dtype) -> None:
    a, b, w = normal((3, 4, 150), dtype, 1), normal((3, 2, 150), dtype, 2), normal(150, dtype, 3)
    for right, weight in ((b, w), (None, w), (b, None)):
        together = gti_kernels.gram(a, right, weight, backend="triton")
        for i in range(3):
            alone = gti_kernels.gram(
                a[i], None if right is None else right[i], weight, backend="triton"
            )
            assert torch.equal(together.matrix[i], alone.matrix)
            assert torch.equal(together.error_bound[i], alone.error_bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_gram_of_integers_is_bitwise(dtype: torch.dtype) -> None:
    """Several blocks a program, several programs, several tensors; weights that are negative."""
    sizes = [1_500, 3, 700]
    g = torch.Generator().manual_seed(0)
    a, b, w = (
        [torch.randint(-9, 10, (*m, n), generator=g).to(dtype).to(DEVICE) for n in sizes]
        for m in ((3,), (4,), ())
    )
    x, y, scale = (torch.cat(t, -1).double() for t in (a, b, w))
    assert torch.equal(gram.gram(a, b, w)[0], (x * scale) @ y.T)
    assert torch.equal(gram.gram(b, None, w)[0], (y * scale) @ y.T)
    assert torch.equal(gram.gram(b, None, None)[0], y @ y.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gram_bound_holds_where_all_cancels(dtype: torch.dtype) -> None:
    """Rows that are orthogonal but for the last bits, of 40 decimal orders, with weights."""
    n = 75
    scale = (10.0 ** torch.linspace(-10, 10, n, dtype=torch.float64)).to(dtype)
    for seed in range(4):
        x, y = normal((2, n), dtype, seed).cpu() * scale
        a, b = torch.stack([torch.cat([x, y])]), torch.stack([torch.cat([y, -x])])
        w = normal(n, dtype, seed + 9).cpu().abs().repeat(2)
        b[0, 0] *= 1 + torch.finfo(dtype).eps * seed
        got, bound = (t.item() for t in gram.gram(*([t.to(DEVICE)] for t in (a, b, w))))
        rows = (map(Fraction, t.flatten().tolist()) for t in (a, b, w))
        exact = sum((p * q * r for p, q, r in zip(*rows, strict=True)), Fraction(0))
        assert abs(Fraction(got) - exact) <= Fraction(bound)


def test_gram_nan_stays_in_its_row_or_column() -> None:
    for m, dtype in ((3, torch.float64), (5, torch.float32)):
        a, b = normal((m, 50), dtype, 1), normal((2, 50), dtype, 2)
        clean = gram.gram([a], [b], None)
        a[1, 7] = b[0, 49] = float("nan")
        hit = torch.zeros(m, 2, dtype=torch.bool, device=DEVICE)
        hit[1], hit[:, 0] = True, True
        for x, before in zip(gram.gram([a], [b], None), clean, strict=True):
            assert torch.equal(x.isnan(), hit) and torch.equal(x[~hit], before[~hit])


# --- power_iteration ------------------------------------------------------------------------------


def weights(shapes: list[tuple[int, int, int]], dtypes: list[torch.dtype]) -> list[Tensor]:
    return [normal(s, dtypes[t % len(dtypes)], 50 + t) for t, s in enumerate(shapes)]


def run(op, ws: list[Tensor], **settings):  # type: ignore[no-untyped-def]
    defaults = {"k": 1, "method": "cg", "max_steps": 12, "tol": 0.0, "start": None, "seed": 0}
    return op.power_iteration(ws, **(defaults | settings))


# Narrow, flat, line by line on 16-byte boundaries, or not; tails everywhere; k = min(m, n).
RAGGED = {
    1: [(70, 30), (3, 600), (17, 136), (5, 133), (9, 1)],
    2: [(70, 9), (18, 72), (2, 67)],
    3: [(4, 515), (17, 67)],
    4: [(20, 66), (6, 4)],
    8: [(19, 66)],
}


def triples(k: int, method: str, steps: int) -> testing.Sample:
    def make(dtype: torch.dtype, device: str):  # type: ignore[no-untyped-def]
        ws = []
        for i, (m, n) in enumerate(RAGGED[k]):
            s = 0.6 ** torch.arange(min(m, n, 12), dtype=torch.float64)
            ws.append(testing.with_spectrum(s, m, n, dtype=dtype, seed=i).to(device))
        settings = {"k": k, "method": method, "max_steps": steps, "tol": 0.0, "seed": -5}
        return [ws], settings

    return testing.Sample(f"k={k}, {method}", make)


@pytest.mark.parametrize(
    "dtype, k, method",
    [
        ("float64", 1, "cg"),
        ("float32", 1, "cg"),
        ("bfloat16", 1, "cg"),
        ("float16", 1, "power"),
        ("float64", 2, "power"),
        ("bfloat16", 2, "cg"),
        ("float32", 3, "cg"),
        ("float64", 4, "cg"),
        ("float32", 8, "power"),
    ],
)
def test_power_iteration_parity(dtype: str, k: int, method: str) -> None:
    cases = [triples(k, method, 3 if dtype == "float64" and k == 1 else 2)]
    for c in testing.compare("power_iteration", dtype, "triton", DEVICE.type, cases):
        assert c.error <= c.bound, c


def test_more_triples_than_triton_finds_are_the_references() -> None:
    w = normal((12, 10), torch.float32, 0)
    explanation = gti_kernels.explain("power_iteration", w, k=9)
    assert "at most 8 triples" in explanation.passed_over["triton"]
    with pytest.raises(RuntimeError, match="at most 8 triples"):
        gti_kernels.power_iteration(w, k=9, backend="triton")
    assert gti_kernels.power_iteration(w, k=9, max_steps=2).sigma.shape == (9,)


def test_power_iteration_of_mixed_dtypes_and_twice_the_same_bits() -> None:
    """A list is as its parts are, one dtype at a time, and the same bits each time."""
    ws = weights([(1, 12, 9), (2, 2, 70), (1, 20, 8), (1, 6, 6)], DTYPES)
    start = [normal((w.shape[0], w.shape[2], 2), torch.float64, 7) for w in ws]
    settings = {"k": 2, "max_steps": 2, "method": "power"}
    got = run(power_iteration, ws, start=start, **settings)
    again = run(power_iteration, copies(ws), start=start, **settings)
    index = 0
    for t, w in enumerate(ws):
        alone = run(power_iteration, [w], start=[start[t]], **settings)
        here = slice(index, index := index + w.shape[0])
        for x, y, z in zip(got, again, alone, strict=True):
            if isinstance(x, list):
                assert torch.equal(x[t], z[0]) and torch.equal(x[t], y[t])
            else:
                assert torch.equal(x[here], z) and torch.equal(x, y)


@pytest.mark.parametrize("method", ["cg", "power"])
def test_triples_of_known_spectra(method: str) -> None:
    """Ties, rank below k, W = 0: orthonormal vectors, σ of the SVD, W v = σ u."""
    spectra = [[2.0, 2.0, 0.1], [1.0], [2.0] * 3, [5.0, 3e-5, 1e-6]]
    ws = [testing.with_spectrum(torch.tensor(s), 3, 5, seed=i) for i, s in enumerate(spectra)]
    ws.append(torch.zeros(3, 5, dtype=torch.float64))
    stack = torch.stack(ws).to(DEVICE)
    w = stack if method == "cg" else stack.mT.contiguous()
    # The power method with a fixed number of steps: those after convergence must do no harm.
    settings = {"max_steps": 30, "tol": 1e-6} if method == "cg" else {"max_steps": 6}
    sigma, (u,), (v,), residual, _, converged, upper = run(
        power_iteration, [w], k=2, method=method, **settings
    )
    top = torch.linalg.svdvals(w.cpu())[:, :2].to(DEVICE)
    assert converged.all() or method == "power"
    assert (residual <= 1e-6).all() and (upper >= top[:, 0]).all()
    assert (sigma - top).abs().max() <= 1e-5 and (sigma.diff() <= 1e-9).all()
    assert (sigma[:, 0] <= top[:, 0] * (1 + 1e-14)).all()
    eye = torch.eye(2, dtype=torch.float64, device=DEVICE)
    assert (u.mT @ u - eye).abs().max() <= 1e-12 and (v.mT @ v - eye).abs().max() <= 1e-12
    assert torch.allclose(w @ v, sigma[:, None, :] * u, atol=1e-9)


def test_steps_after_convergence_do_no_harm() -> None:
    """Residuals that are rounding are no directions, least of all where 3k > n."""
    w = normal((9, 7), torch.float64, 1)
    out = run(power_iteration, [w[None]], k=3, tol=0.0, max_steps=24)
    sigma, _, (v,), residual, *_ = out
    top = torch.linalg.svdvals(w)[:3]
    assert ((sigma[0] - top).abs() <= 1e-14 * top[0]).all() and (residual <= 1e-14).all()
    assert (v[0].mT @ v[0] - torch.eye(3).to(v)).abs().max() <= 1e-14


def test_power_iteration_converges_and_each_stops_by_itself() -> None:
    """Known spectra: σ to the square of the residual, true residual as reported, never over σ₁."""
    ws, tops = [], []
    for t, s in enumerate(([1.0, 0.1, 0.01], [5.0, 4.0, 3.0, 2.0], [2.0, 2.0, 1.0], [3.0, 0.0])):
        u, _ = torch.linalg.qr(normal((14, len(s)), torch.float64, t))
        v, _ = torch.linalg.qr(normal((11, len(s)), torch.float64, 10 + t))
        ws.append((u * torch.tensor(s, device=DEVICE)) @ v.T)
        tops.append(s[0])
    stack = [torch.stack(ws)]
    sigma, u, v, residual, steps, converged, upper = run(
        power_iteration, stack, tol=1e-6, max_steps=15
    )
    assert converged.all() and (steps < 15).all() and steps.unique().numel() > 1
    top = torch.tensor(tops, dtype=torch.float64, device=DEVICE)
    assert ((sigma[:, 0] - top).abs() <= 1e-10 * top).all()
    assert (sigma[:, 0] <= top * (1 + 1e-14)).all() and (upper >= top).all()
    w = stack[0]
    assert torch.allclose(w @ v[0], sigma[..., None] * u[0], atol=1e-12)
    r = w.mT @ (w @ v[0]) - sigma[..., None] ** 2 * v[0]
    assert torch.allclose(r.norm(dim=1) / sigma**2, residual, rtol=1e-3, atol=1e-13)

    expected = run(ref_power, stack, tol=1e-6, max_steps=15)
    assert torch.equal(steps, expected[4]) and torch.equal(converged, expected[5])
    assert torch.allclose(upper, expected[6], rtol=1e-13)

    near = [w + 1e-3 * normal(tuple(w.shape), torch.float64, 99)]
    expected = run(ref_power, near, tol=1e-6, max_steps=15, start=v)
    warm = run(power_iteration, near, tol=1e-6, max_steps=15, start=v)
    assert warm[5][:2].all() and (warm[4][:2] <= steps[:2]).all() and warm[4][1] < steps[1]
    assert torch.equal(warm[4], expected[4]) and torch.equal(warm[5], expected[5])
    assert torch.allclose(warm[0], expected[0], rtol=1e-12)


def test_power_iteration_of_zero_nan_and_extreme_items() -> None:
    ws = [
        torch.zeros(1, 4, 5),
        torch.stack([normal((3, 3), torch.float32, 1).cpu(), torch.full((3, 3), float("inf"))]),
        normal((1, 6, 80), torch.float32, 2).cpu() * 1e30,
        normal((1, 6, 8), torch.float32, 3).cpu() * 1e-30,
        normal((1, 6, 8), torch.float64, 4).cpu() * 1e200,
        torch.full((1, 5, 7), 60000.0, dtype=torch.float16),
        torch.full((1, 5, 7), 1e-45),
        torch.full((1, 2, 3), float("nan"), dtype=torch.float64),
        torch.zeros(0, 3, 3),
    ]
    ws = [w.to(DEVICE) for w in ws]
    ws[1][1, 0, 0] = 1.0
    sigma, u, v, residual, steps, converged, upper = run(power_iteration, ws, tol=1e-5, max_steps=9)
    assert [x.shape for x in u] == [(w.shape[0], w.shape[1], 1) for w in ws]
    bad = [2, 8]
    for i in range(9):
        finite = [x[i].isfinite().all().item() for x in (sigma, residual, upper)]
        assert finite == [i not in bad] * 3 and converged[i].item() == (i not in bad)
    assert steps[bad].tolist() == [0, 0]
    assert u[1][1].isnan().all() and v[1][1].isnan().all() and u[7].isnan().all()
    assert sigma[0] == 0 and residual[0] == 0 and upper[0] == 0 and steps[0] == 1
    assert abs(u[0].norm() - 1) < 1e-6 and abs(v[0].norm() - 1) < 1e-6
    top = [torch.linalg.svdvals(w.cpu().double())[..., 0].item() for w in (ws[2], ws[3], ws[4])]
    for i, s in zip((3, 4, 5), top, strict=True):
        assert math.isclose(sigma[i].item(), s, rel_tol=1e-5) and upper[i] >= s * (1 - 1e-12)
    assert math.isclose(sigma[6].item(), 60000 * math.sqrt(35), rel_tol=1e-3)
    smallest = torch.finfo(torch.float32).tiny * torch.finfo(torch.float32).eps
    assert math.isclose(sigma[7].item(), smallest * math.sqrt(35), rel_tol=1e-5)


def test_power_iteration_starts_as_the_reference_does() -> None:
    """One pass: v is the normalised start, from the counter or given; a useless one is replaced."""
    ws = weights([(2, 3, 70), (1, 5, 9)], [torch.float64])
    for seed in (0, 12345678901234567890, -1):
        got = run(power_iteration, ws, max_steps=1, seed=seed)
        index = 0
        for t, w in enumerate(ws):
            for b in range(w.shape[0]):
                x = ref_power.start_vectors(seed, index, w.shape[2], 1, DEVICE).double()
                assert torch.allclose(got[2][t][b], x / x.norm(), rtol=1e-15, atol=1e-16)
                index += 1
    many = [normal((8, 3, 4), torch.float64, 5)]
    got, expected = (run(op, many, max_steps=3)[2][0] for op in (power_iteration, ref_power))
    assert ((got * expected).sum(1) > 0.9).all()  # v keeps its sign
    start = [torch.zeros(2, 70, 1, dtype=torch.float64, device=DEVICE)]
    start[0][1, 3] = -2.0
    got = run(power_iteration, ws[:1], max_steps=1, start=start)
    expected = run(ref_power, ws[:1], max_steps=1, start=start)
    assert torch.allclose(got[2][0].abs(), expected[2][0].abs(), rtol=1e-15, atol=1e-16)
    empty = run(power_iteration, [torch.zeros(0, 3, 4, device=DEVICE)])
    assert empty[0].shape == (0, 1) and empty[1][0].shape == (0, 3, 1) and empty[4].shape == (0,)


# --- on a GPU only --------------------------------------------------------------------------------


@on_gpu_only
def test_graph_capture() -> None:
    q, p, g = (normals([5000, 3], [torch.float32], seed) for seed in range(3))
    dq, dp = tangents(4, [900], [torch.float32], 1), tangents(4, [900], [torch.float32], 2)
    ws = weights([(2, 40, 60)], [torch.float32])

    def work():  # type: ignore[no-untyped-def]
        k = leapfrog.kick_drift_(q, p, g, 0.1, 0.2, [1.0, 2.0], 0.9)
        form, products = two_form.two_form(dq, dp, True)[0], gram.gram(dq, dp, None)[0]
        return k, form, products, run(power_iteration, ws)[0]

    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    saved = copies([*q, *p])
    for x in (*dq, *ws):
        x.mul_(1.5)
    graph.replay()
    got = [x.clone() for x in out]
    for x, y in zip([*q, *p], saved, strict=True):
        x.copy_(y)
    for a, b in zip(got, work(), strict=True):
        assert torch.equal(a, b)
    fresh = [torch.ones(4, device=DEVICE)]
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(graph):
        leapfrog.kick_(fresh, fresh, 0.1, 1.0)


@on_gpu_only
def test_no_host_sync() -> None:
    p, g = normals([5000], [torch.float32], 0), normals([5000], [torch.float32], 1)
    ws = weights([(2, 40, 60)], [torch.float32])
    run(power_iteration, ws)
    torch.cuda.set_sync_debug_mode("error")
    try:
        leapfrog.kick_drift_(p, copies(p), g, 0.1, 0.1, [1.0], 1.0)
        step = torch.full((), 0.1, device=DEVICE)
        gti_kernels.kick_(p, g, step, damp=step)
        gti_kernels.drift_(p, g, step)
        gti_kernels.kick_drift_(p, copies(p), g, step, 0.1)
        two_form.two_form([ws[0][0]], [ws[0][1]], True)
        gram.gram([ws[0][0]], None, [p[:60]])
        run(power_iteration, ws)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu_only
def test_more_than_2_to_31_elements() -> None:
    n = 2**31 + 5 * BLOCK + 3
    if torch.cuda.mem_get_info()[0] < 6 * n:
        pytest.skip("needs 13 GB of GPU memory")
    p = torch.ones(n, dtype=torch.bfloat16, device=DEVICE)
    leapfrog.kick_([p], [p.clone()], 0.5, 1.0)
    assert p[0] == 0.5 and p[-1] == 0.5 and p[2**31] == 0.5
    assert energy.kinetic_energy([p], [1.0]) == n / 8
    m = 2
    x = p.view(-1)[: n - n % m].view(m, -1)
    omega, _, gram = two_form.two_form([x], [x], True)
    assert not omega.any() and (gram == x.shape[1] / 2).all()
