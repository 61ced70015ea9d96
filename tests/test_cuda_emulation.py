"""csrc/cuda/power_iteration.cu and its launcher without a GPU: the source runs in the emulation of
cuda_emulation/, with 64 threads a block. What only a GPU can show is in test_gpu.py."""

from __future__ import annotations

import math
import random
import types
from collections import Counter

import pytest
import torch
from cuda_emulation import emulate
from torch import Tensor

import gti_kernels as gti
from gti_kernels import testing
from gti_kernels.cuda_kernels import compiler
from gti_kernels.cuda_kernels import power_iteration as cuda
from gti_kernels.cuda_kernels.power_iteration import BLOCK, CLUSTER, GRID, ON_CHIP, STAGED, WIDE
from gti_kernels.reference import power_iteration as reference
from gti_kernels.rows import DTYPES

#: Name → team, blocks of it, mode. 5 blocks are more than some matrices here have use for.
CLASSES = {
    "block": (BLOCK, 1, ON_CHIP),
    "cluster": (CLUSTER, 4, ON_CHIP),
    "grid": (GRID, 5, ON_CHIP),
    "staged": (GRID, 5, STAGED),
    "wide": (GRID, 5, WIDE),
}
every_class = pytest.mark.parametrize("kind", list(CLASSES))
CLASSES |= {"pair": (GRID, 2, ON_CHIP), "wide pair": (GRID, 2, WIDE)}
ROOM = cuda.Limits(shared_bytes=300_000, blocks=12, clusters=((4, 3),))
SOURCE = compiler.source("power_iteration")


@pytest.fixture
def emulated(monkeypatch):
    """emulated(kind or None, order, text, limits): the backend "cuda" runs in the emulation, with
    every matrix in one class, or where the plan puts it."""

    def use(kind=None, order=0, text=None, limits=ROOM) -> emulate.Emulator:
        emulator = emulate.use(monkeypatch, cuda, order, text)
        monkeypatch.setattr(cuda, "limits", lambda compiled: limits)
        chosen = forced(*CLASSES.get(kind, kind)) if kind else choose
        monkeypatch.setattr(cuda, "_choose", chosen)
        cuda.plan.cache_clear()
        return emulator

    choose = cuda._choose
    yield use
    cuda.plan.cache_clear()


def forced(team, size, mode):
    def choose(one, limits, _):
        used = cuda._team_for(one.m, size) if team == GRID else size
        place = cuda._place(one, mode, team, used, limits)
        assert place is not None
        return team, size, place

    return choose


def normal(m: int, n: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    return testing.numbers(m, n, dtype=dtype, device="cpu", seed=seed)


def run(ws: list[Tensor], **settings) -> gti.SingularTriples:
    return gti.power_iteration(ws, backend="cuda", **settings)


def bits(r: gti.SingularTriples) -> list[bytes]:
    flat = [x for part in r for x in (part if isinstance(part, list) else [part])]
    return [x.contiguous().numpy().tobytes() for x in flat]


# ---- right numbers ------------------------------------------------------------------------------

# Tails in m and n, rows of odd length, narrow, flat, more columns than threads.
SHAPES = ((1, 9), (9, 1), (7, 5), (16, 16), (70, 33), (11, 301), (45, 264))


@every_class
@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_with_the_reference(emulated, monkeypatch, dtype, kind):
    def make(method):
        def arguments_of(dtype, device):
            ws = [
                testing.with_spectrum(
                    0.6 ** torch.arange(min(m, n), dtype=torch.float64), m, n, dtype=dtype, seed=i
                )
                for i, (m, n) in enumerate(SHAPES)
            ]
            return [ws], {"method": method, "max_steps": 12, "tol": 0.0}

        return arguments_of

    samples = [testing.Sample(method, make(method)) for method in ("cg", "power")]
    monkeypatch.setattr(testing, "samples", lambda op: samples)
    emulator = emulated(kind)
    for c in testing.compare("power_iteration", dtype, "cuda"):
        assert c.error <= c.bound, c
    team, size, _ = CLASSES[kind]
    for one in emulator.launches:
        assert one["cooperative"] == (team == GRID)
        assert one["cluster"] == (size if team == CLUSTER else None)
        assert one["grid"] == (ROOM.blocks if team == GRID else size * len(SHAPES))


@pytest.mark.parametrize("rows, stages", [(8, 2), (8, 3), (4, 4), (2, 3), (1, 2)])
def test_every_ring_of_panels(emulated, monkeypatch, rows, stages):
    """As with shared memory of other sizes; several panels a block, the last one not whole."""
    emulated("staged")

    monkeypatch.setattr(cuda, "_choose", forced(GRID, 2, STAGED))
    monkeypatch.setattr(cuda, "_rings", lambda *_: [(rows, stages)])
    ws = [normal(m, n, torch.bfloat16, m) for m, n in ((90, 600), (131, 132), (3, 520))]
    got = run(ws, max_steps=6, tol=0.0)
    exact = gti.power_iteration([w.double() for w in ws], max_steps=6, tol=0.0, backend="reference")
    assert torch.allclose(got.sigma.double(), exact.sigma, rtol=1e-5, atol=0)
    for a, b in zip((*got.u, *got.v), (*exact.u, *exact.v), strict=True):
        assert torch.allclose(a.double(), b, rtol=0, atol=1e-4)


@every_class
def test_special_matrices_in_one_list(emulated, kind):
    emulated(kind)
    base = testing.with_spectrum(torch.tensor([3.0, 1.0, 0.5]).double(), 20, 17).float()
    bad, infinite = base.clone(), base.clone()
    bad[19, 16], infinite[3, 2] = math.nan, -math.inf
    ws = [
        torch.zeros(12, 30),
        bad,
        base,
        infinite,
        base * 1e30,
        base * 1e-30,
        torch.full((5, 6), 5.0e37),
        torch.full((5, 6), 1.0e-37),
        torch.outer(torch.arange(1.0, 9.0), torch.arange(1.0, 6.0)),
        2.0 * torch.eye(24),
        torch.full((1, 1), -4.0),
    ]
    r = run(ws, tol=1e-5, max_steps=100)
    sound = [i for i in range(len(ws)) if i not in (1, 3)]
    for i in (1, 3):
        assert r.sigma[i].isnan() and r.residual[i].isnan() and r.upper[i].isnan()
        assert r.u[i].isnan().all() and r.v[i].isnan().all()
        assert not r.converged[i] and r.steps[i] == 0
    assert r.converged[sound].all()
    for i in sound:
        exact = torch.linalg.svdvals(ws[i].double())[0]
        assert abs(r.sigma[i].double() - exact) <= 3e-6 * exact
        assert r.upper[i] >= exact * (1 - 1e-6)
        assert r.upper[i] <= 1.0001 * torch.linalg.matrix_norm(ws[i].double())
        for x in (r.u[i], r.v[i]):
            assert abs(x.double().norm() - 1) < 1e-6
    assert r.steps[0] == 1 and r.sigma[0] == 0


def test_fp64_scales(emulated):
    emulated("block")
    base = testing.with_spectrum(torch.tensor([3.0, 1.0]).double(), 9, 8)
    for method in ("cg", "power"):
        for scale in (1e300, 1e100, 1e-100, 1e-300):
            r = run([base * scale], tol=1e-10, method=method)
            assert r.converged.all() and abs(float(r.sigma) / (3 * scale) - 1) < 1e-12


@every_class
def test_tol_zero_means_max_steps(emulated, kind):
    emulated(kind)
    for method in ("cg", "power"):
        r = run([normal(9, 20), torch.eye(4)], tol=0.0, max_steps=25, method=method)
        assert (r.steps == 25).all()
        assert abs(r.sigma[1] - 1) < 1e-5 and r.residual[1] < 1e-5  # long after convergence


@every_class
def test_upper_is_the_lesser_of_two_bounds(emulated, kind):
    emulated(kind)
    # Of the first ‖W‖₁‖W‖_∞ is less, of the second, of rank 1, ‖W‖_F.
    ws = [torch.eye(40), normal(40, 1) @ normal(1, 30, seed=1)]
    r = run(ws, max_steps=1)
    frobenius = torch.linalg.matrix_norm(ws[1].double())
    assert 1.0 <= r.upper[0] < 1.0001
    assert frobenius <= r.upper[1] < 1.0001 * frobenius


# ---- the loop -----------------------------------------------------------------------------------


@every_class
def test_start_vectors(emulated, kind):
    """From an earlier result; from the reference's random vector; a useless start is replaced."""
    emulated(kind)
    w = testing.with_spectrum(0.8 ** torch.arange(30).double(), 60, 30).float()
    cold = run([w], tol=1e-4)
    warm = run([w + 1e-4 * normal(60, 30)], tol=1e-4, start=cold)
    assert warm.converged.all() and warm.steps < cold.steps / 2
    one = run([w], max_steps=1, seed=5)
    v = reference.start_vectors(5, 0, 30, 1, torch.device("cpu"))
    assert torch.allclose(one.v[0], v / v.norm(), atol=1e-6)
    for useless in (0.0, math.nan):
        start = cold._replace(v=[torch.full((30, 1), useless)])
        again = run([w], max_steps=1, start=start, seed=5)
        assert torch.equal(again.v[0], one.v[0])


@every_class
def test_a_matrix_gets_the_same_bits_alone_and_in_a_list(emulated, kind):
    emulated(kind)
    ws = [normal(24, 40), torch.eye(9), normal(31, 8, seed=2)]
    first = run(ws, tol=1e-3)
    together = run(ws, tol=1e-3, start=first)
    assert len(set(together.steps.tolist())) > 1 or first.steps.unique().numel() > 1
    for i, w in enumerate(ws):
        alone = run([w], tol=1e-3, start=first._replace(v=[first.v[i]]))
        assert torch.equal(alone.v[0], together.v[i]) and torch.equal(alone.u[0], together.u[i])
        assert alone.sigma[0] == together.sigma[i] and alone.steps[0] == together.steps[i]


@every_class
def test_same_bits_for_any_order_of_threads(emulated, kind):
    """A result that depends on it would betray a barrier that is missing."""
    ws = [normal(40, 300, torch.bfloat16), normal(33, 7, torch.bfloat16), normal(1, 5).bfloat16()]
    results = []
    for order in (0, 0, 1, 7, -1):
        emulated(kind, order)
        results.append(bits(run(ws, max_steps=5, tol=0.0)))
    assert all(r == results[0] for r in results)


def test_mixed_dtypes_batches_and_odd_addresses(emulated):
    """One launch for each dtype; a batch of matrices that begin at odd addresses."""
    emulator = emulated(limits=ROOM._replace(shared_bytes=20_000))
    ws = [normal(30, 41), normal(12, 16, torch.float64), normal(200, 130), normal(9, 9).half()]
    r = run(ws, max_steps=60, tol=1e-5)
    for i, w in enumerate(ws):
        assert abs(r.sigma[i] / torch.linalg.svdvals(w.double())[0] - 1) < 1e-5
    assert r.sigma.dtype == torch.float64 and r.v[0].dtype == torch.float32
    assert len(emulator.launches) == 3
    batch = testing.numbers(3, 5, 7, dtype=torch.float32, device="cpu", seed=0)
    r = gti.power_iteration(batch, backend="cuda", tol=1e-5)
    assert torch.allclose(r.sigma[:, 0], torch.linalg.svdvals(batch)[:, 0], rtol=1e-5)
    shifted = normal(1, 8 * 16 + 1).view(-1)[1:].view(8, 16)
    r = run([shifted], tol=1e-5)
    assert torch.allclose(r.sigma[0], torch.linalg.svdvals(shifted)[:1], rtol=1e-5)
    empty = gti.power_iteration(torch.empty(0, 3, 4), backend="cuda")
    assert empty.sigma.shape == (0, 1)


# ---- one launch for all classes -----------------------------------------------------------------

# In the one list 14 blocks run at once in clusters of 2, in the other there are 9 blocks: quarters
# of 3 and of 2, beside which 2 and 1 are left over. Shapes from a block to more than fits, some of
# them as often as a team has to take several.
MIXED = cuda.Limits(shared_bytes=12_000, blocks=15, clusters=((2, 7),))
MIXED_K = cuda.Limits(shared_bytes=44_000, blocks=9)
BLOCKS = [(9, 20), (7, 33), (40, 40), (1, 5), *((4 + i, 11) for i in range(13))]
MIXED_SHAPES = [(50, 60), (31, 301), *5 * [(80, 60)], *BLOCKS, *2 * [(90, 33)], (200, 100)]
MIXED_SHAPES += [(16, 2000), *2 * [(120, 70)], (51, 60)]
MIXED_K_SHAPES = [(9, 20), *5 * [(80, 60)], (200, 100), (25, 40), (50, 60), (120, 70), (7, 33)]


@pytest.mark.parametrize(
    "dtype, k", [(torch.float32, 1), (torch.bfloat16, 1), (torch.float32, 3), (torch.bfloat16, 2)]
)
def test_a_list_of_all_classes_is_one_launch(emulated, dtype, k):
    """Each matrix gets the bits that it gets alone in its class, in any order of the threads."""
    limits, shapes = (MIXED, MIXED_SHAPES) if k == 1 else (MIXED_K, MIXED_K_SHAPES)
    ws = [normal(m, n, dtype, seed) for seed, (m, n) in enumerate(shapes)]
    bad = [shapes.index((80, 60)), shapes.index((7, 33))]
    for i in bad:
        ws[i][5, 3] = math.nan
    settings = {"k": k, "max_steps": 4, "tol": 0.0}
    start = gti.power_iteration([w.double() for w in ws], backend="reference", k=k, max_steps=1)
    start = start._replace(v=[v.float() for v in start.v])
    results = []
    for order in (0, -1):
        emulator = emulated(order=order, limits=limits)
        results.append(run(ws, start=start, **settings))
        assert emulator.launches == [
            {"grid": 14 if k == 1 else 9, "cluster": 2 if k == 1 else None, "cooperative": True}
        ]
    assert bits(results[0]) == bits(results[1])
    together = results[0]

    one = cuda.plan(tuple((1, *s) for s in shapes), dtype, limits, k, 3 * k)
    teams = [(GRID, 14), (GRID, 3), (CLUSTER, 2), (BLOCK, 1)]
    assert [s[:2] for s in one.sections] == (
        teams if k == 1 else [(GRID, 9), (GRID, 2), (BLOCK, 1)]
    )
    assert any(s.items > s.teams > 1 for s in one.sections)
    modes = {place.mode for place in one.places}
    assert modes == ({ON_CHIP, STAGED, WIDE} if k == 1 else {ON_CHIP})
    for section in one.sections:
        for at in range(section.begin, section.begin + section.items):
            i, place = one.matrices[at], one.places[at]
            emulated((section.kind, section.size, place.mode), limits=limits)
            alone = run([ws[i]], start=start._replace(v=[start.v[i]]), **settings)
            assert torch.equal(alone.u[0].nan_to_num(7.0), together.u[i].nan_to_num(7.0)), i
            assert torch.equal(alone.v[0].nan_to_num(7.0), together.v[i].nan_to_num(7.0)), i
            assert torch.equal(alone.sigma[0].nan_to_num(7.0), together.sigma[i].nan_to_num(7.0))
            assert torch.equal(alone.upper[0].nan_to_num(7.0), together.upper[i].nan_to_num(7.0))

    exact = gti.power_iteration(
        [w.double() for w in ws], backend="reference", start=start, **settings
    )
    assert together.sigma.isnan().nonzero()[:, 0].unique().tolist() == sorted(bad)
    assert torch.allclose(together.sigma.double(), exact.sigma, rtol=1e-4, equal_nan=True)


def test_matrices_of_a_block_and_of_a_cluster_do_not_wait_for_the_grid(emulated):
    """A block has one matrix at the most: the device puts the next where one has ended."""
    shapes = [(50, 60), (9, 20), (90, 33), (7, 33), (40, 40)]
    ws = [normal(m, n, seed=m) for m, n in shapes]
    emulator = emulated(limits=MIXED)
    r = run(ws, tol=1e-5)
    assert emulator.launches == [{"grid": 8, "cluster": 2, "cooperative": False}]
    for i, w in enumerate(ws):
        assert abs(r.sigma[i] / torch.linalg.svdvals(w)[0] - 1) < 1e-5


def test_a_list_of_all_classes_where_there_are_no_clusters(emulated):
    emulator = emulated(limits=MIXED._replace(clusters=()))
    ws = [normal(m, n, seed=m) for m, n in ((50, 60), (9, 20), (200, 100), (80, 60), (16, 2000))]
    r = run(ws, tol=1e-5)
    assert emulator.launches == [{"grid": 15, "cluster": None, "cooperative": True}]
    for i, w in enumerate(ws):
        assert abs(r.sigma[i] / torch.linalg.svdvals(w)[0] - 1) < 1e-5


# ---- the plan -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_every_item_has_one_team_and_memory_of_its_own(seed):
    """The blocks of a section as the kernel counts them."""
    draw = random.Random(seed)
    heights = (8, 64, 500, 768, 1000, 3072)
    shapes = [
        (draw.choice((0, 1, 2, 9)), draw.choice(heights), 8 * draw.randint(1, 200))
        for _ in range(draw.randint(1, 8))
    ]
    shapes.append((1, 9, 9))
    clusters = draw.choice(((), ((8, 15),), ((8, 15), (16, 7))))
    limits = cuda.Limits(draw.choice((232_448, 100_000)), draw.choice((132, 78)), clusters)
    dtype, k = draw.choice((torch.float32, torch.bfloat16)), draw.choice((1, 1, 2))
    one = cuda.plan(tuple(shapes), dtype, limits, k, 3 * k)
    assert sorted(one.matrices) == list(range(sum(batch for batch, *_ in shapes)))
    at_once = dict(limits.clusters)[one.cluster] * one.cluster if one.cluster else limits.blocks
    assert one.grid <= at_once or not one.cooperative
    assert one.grid % (one.cluster or 1) == 0
    begin = memory = counters = 0
    for s in one.sections:
        assert (s.begin, s.memory, s.counters) == (begin, memory, counters)
        begin += s.items
        taken = Counter()
        for block in range(one.grid):
            number, rank = divmod((block + one.grid - s.first) % one.grid, s.size)
            if number < s.teams:
                taken.update((index, rank) for index in range(number, s.items, s.teams))
                assert s.kind != CLUSTER or rank == block % one.cluster
        assert taken == {(i, rank): 1 for i in range(s.items) for rank in range(s.size)}
        if s.kind == GRID:
            memory += s.teams * (s.x_bytes + s.size * s.region_bytes)
            counters += s.teams + s.items
        for place in one.places[s.begin : begin]:
            assert place.size <= s.size and (place.size == s.size or s.kind == GRID)
            assert place.x_bytes <= s.x_bytes and place.region_bytes <= s.region_bytes
            assert place.shared_bytes <= one.shared_bytes <= limits.shared_bytes
    assert (begin, memory, counters) == (len(one.matrices), one.memory_bytes, one.counters)


def test_work_is_dealt_to_the_blocks_in_turn():
    """A section begins behind the last block that the one before it gave an item."""
    limits = cuda.Limits(shared_bytes=232_448, blocks=132, clusters=((8, 15), (16, 7)))
    # 3072 x 768: a quarter, 30 of 120 blocks; 768 x 768: a cluster; 64 x 576: a block.
    one = cuda.plan(((1, 3072, 768), (12, 768, 768), (50, 64, 576)), torch.bfloat16, limits)
    assert one.cooperative and (one.grid, one.cluster) == (120, 8)
    assert [(s.kind, s.size, s.first) for s in one.sections] == [
        (GRID, 30, 0),
        (CLUSTER, 8, 32),
        (BLOCK, 1, 8),
    ]


def test_plan_for_a_large_device():
    limits = cuda.Limits(shared_bytes=232_448, blocks=132, clusters=((8, 15), (16, 7)))

    def where(m, n, dtype=torch.bfloat16, limits=limits):
        team, size, place = cuda._choose(cuda.Problem(m, n, dtype), limits, None)
        assert place.shared_bytes <= limits.shared_bytes
        return team, size, place.mode

    assert where(64, 576) == (BLOCK, 1, ON_CHIP)
    assert where(768, 768) == (CLUSTER, 8, ON_CHIP)
    assert where(1024, 1024) == (CLUSTER, 16, ON_CHIP)
    assert where(3072, 768) == (GRID, 33, ON_CHIP)
    assert where(4096, 4096) == (GRID, 132, STAGED)
    assert where(4096, 11008) == (GRID, 132, STAGED)
    assert where(64, 200_000) == (GRID, 132, WIDE)
    assert where(768, 768, limits=limits._replace(clusters=()))[0] == GRID


@pytest.mark.parametrize("side", [4, 6, 16, 24])
def test_every_shape_has_a_place_for_several_triples(side):
    limits = cuda.Limits(shared_bytes=232_448, blocks=132, clusters=((8, 15), (16, 7)))
    k = side // 2 if side in (4, 16) else side // 3
    for m, n in ((8, 8), (128, 128), (768, 768), (32000, 4096), (8, 10**6), (10**6, 8)):
        for dtype in (torch.bfloat16, torch.float64):
            one = cuda.Problem(m, n, dtype, k, side)
            team, _, place = cuda._choose(one, limits, None)
            assert team != CLUSTER and place.mode != STAGED
            assert place.shared_bytes <= limits.shared_bytes
            assert cuda._choose(one, limits, WIDE)[2].mode == WIDE
    assert cuda._choose(cuda.Problem(64, 64, torch.bfloat16, k, side), limits, None)[0] == BLOCK
    with pytest.raises(ValueError, match=rf"\[8, 8\] of .* with k = {k} .*mode {STAGED}"):
        cuda._choose(cuda.Problem(8, 8, torch.bfloat16, k, side), limits, STAGED)


def test_a_mode_can_be_asked_for(emulated):
    emulator = emulated()
    ws = [normal(40, 64)[None], normal(30, 41)[None]]
    results = [
        cuda.power_iteration(ws, 1, "cg", 12, 0.0, None, 0, mode)
        for mode in (None, ON_CHIP, STAGED, WIDE)
    ]
    assert [one["cooperative"] for one in emulator.launches] == [False, False, True, True]
    for sigma, *_ in results:
        assert torch.allclose(sigma, results[0][0], rtol=1e-6)
    emulated(limits=ROOM._replace(shared_bytes=3000))
    with pytest.raises(ValueError, match=rf"\[40, 64\] of torch.float32 .*mode {ON_CHIP}"):
        cuda.power_iteration(ws, 1, "cg", 12, 0.0, None, 0, ON_CHIP)


@pytest.mark.parametrize(
    "major, at_once, clusters",
    [(8, {}, ()), (9, {8: 15}, ((8, 15),)), (9, {8: 15, 16: 7}, ((8, 15), (16, 7)))],
)
def test_limits_of_a_device(monkeypatch, major, at_once, clusters):
    class Compiled:
        device = torch.device("cuda:0")

        def largest_cluster(self, block, shared_bytes):
            return max(at_once)

        def clusters_at_once(self, size, block, shared_bytes):
            assert (block, shared_bytes) == (cuda.THREADS, 232_448)
            return at_once[size]

    properties = types.SimpleNamespace(
        major=major, shared_memory_per_block_optin=232_448, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = cuda.limits(Compiled())
    assert found == cuda.Limits(232_448, 132, clusters)
    for size, count in clusters:
        beside = found.with_clusters(size)
        assert (beside.blocks, beside.clusters) == (size * count, ((size, count),))


def test_more_triples_than_the_kernel_finds():
    _, limits = gti.ops.power_iteration.limits_of_power_iteration(torch.ones(9, 9), k=9)
    assert limits["cuda"] == "it finds at most 8 triples a matrix" == limits["triton"]
    with pytest.raises(ValueError, match="k = 9: .* at most 8"):
        cuda.power_iteration([torch.ones(1, 9, 9)], 9, "cg", 5, 0.0, None, 0)


# ---- several triples ----------------------------------------------------------------------------

every_subspace_class = pytest.mark.parametrize("kind", ["block", "pair", "wide pair"])


@pytest.mark.parametrize(
    "kind, dtype",
    [*(("block", dtype) for dtype in DTYPES), ("pair", "float32"), ("wide pair", "bfloat16")],
)
def test_several_triples_agree_with_the_reference(emulated, monkeypatch, kind, dtype):
    def make(method, k):
        def arguments_of(dtype, device):
            shapes = ((k, 11), (70, 33), (9, 301))
            spectrum = 0.6 ** torch.arange(16, dtype=torch.float64)
            ws = [
                testing.with_spectrum(spectrum[: min(m, n)], m, n, dtype=dtype, seed=i)
                for i, (m, n) in enumerate(shapes)
            ]
            return [ws], {"k": k, "method": method, "max_steps": 12, "tol": 0.0}

        return arguments_of

    emulator = emulated(kind)
    cases = [("power", 2), ("cg", 8 if dtype == "float32" else 3)]
    samples = [testing.Sample(f"{method}, k={k}", make(method, k)) for method, k in cases]
    monkeypatch.setattr(testing, "samples", lambda op: samples)
    for c in testing.compare("power_iteration", dtype, "cuda"):
        assert c.error <= c.bound, c
    assert len(emulator.launches) == len(cases)  # one a call
    assert all(one["cooperative"] == (kind != "block") for one in emulator.launches)


@pytest.mark.parametrize(
    "method, kind", [("cg", "block"), ("power", "block"), ("cg", "pair"), ("power", "wide pair")]
)
def test_several_triples_of_special_matrices(emulated, kind, method):
    emulated(kind)
    base = testing.with_spectrum(torch.tensor([3.0, 1.5, 1.0, 0.1]).double(), 20, 17).float()
    bad, infinite = base.clone(), base.clone()
    bad[19, 16], infinite[3, 2] = math.nan, -math.inf
    ws = [
        torch.zeros(12, 30),
        bad,
        base,
        infinite,
        base * 1e30,
        base * 1e-30,
        torch.full((5, 6), 5.0e37),
        torch.full((5, 6), 1.0e-37),
        testing.with_spectrum(torch.tensor([2.0, 1.0]).double(), 9, 12).float(),  # rank < k
        2.0 * torch.eye(24),
        testing.with_spectrum(torch.tensor([2.0, 2, 2, 2, 0.1]).double(), 31, 9).float(),
    ]
    r = run(ws, k=3, tol=1e-5, max_steps=80, method=method)
    sound = [i for i in range(len(ws)) if i not in (1, 3)]
    for i in (1, 3):
        assert r.sigma[i].isnan().all() and r.residual[i].isnan().all() and r.upper[i].isnan()
        assert r.u[i].isnan().all() and r.v[i].isnan().all()
        assert not r.converged[i] and r.steps[i] == 0
    assert r.converged[sound].all() and (r.residual[sound] <= 1e-5).all()
    assert len(set(r.steps.tolist())) > 2  # each stops on its own
    for i in sound:
        exact = torch.linalg.svdvals(ws[i].double())
        assert (r.sigma[i].double() - exact[:3]).abs().max() <= 3e-6 * exact[0]
        assert (r.sigma[i].diff() <= 1e-6 * exact[0]).all()
        assert exact[0] * (1 - 1e-6) <= r.upper[i]
        assert r.upper[i] <= 1.0001 * torch.linalg.matrix_norm(ws[i].double())
        for x in (r.u[i].double(), r.v[i].double()):
            assert (x.T @ x - torch.eye(3)).abs().max() < 1e-6
        image = (ws[i].double() / exact[0].clamp(min=1e-300)) @ r.v[i].double()
        scaled = r.u[i].double() * (r.sigma[i].double() / exact[0].clamp(min=1e-300))
        assert (image - scaled).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["cg", "power"])
def test_several_triples_stay_once_they_are_found(emulated, dtype, method):
    """Long after convergence: residuals are rounding, the search space exceeds the matrix."""
    emulated("block")
    ws = [
        testing.with_spectrum(torch.tensor(s).double(), m, n, dtype=dtype)
        for s, m, n in (
            ([2.0, 2, 2, 1, 1, 1, 0.5, 0.5, 0.5, 0.25], 30, 12),
            ([1.0, 0.6, 0.36, 0.2, 0.1], 11, 301),
            ([1.0, 1e-3, 1e-6], 25, 31),
        )
    ]
    eps = torch.finfo(dtype).eps
    for k in (2, 5):
        r = run(ws, k=k, tol=0.0, max_steps=60, method=method)
        # The error of σ is second order in the residual.
        assert (r.steps == 60).all() and (r.residual < math.sqrt(eps)).all()
        for i, w in enumerate(ws):
            exact = torch.linalg.svdvals(w.double())[:k]
            assert (r.sigma[i].double() - exact).abs().max() <= 32 * eps * exact[0]
            for x in (r.u[i].double(), r.v[i].double()):
                assert (x.T @ x - torch.eye(k)).abs().max() < 32 * eps


def test_several_triples_take_the_steps_of_the_reference(emulated):
    """Where the last move counts: without it a step is one of steepest descent."""
    emulated("block")
    w = testing.with_spectrum(1 - torch.arange(40).double() / 41, 64, 40).float()
    steps = [int(gti.power_iteration([w], k=2, backend=b).steps) for b in ("cuda", "reference")]
    assert abs(steps[0] - steps[1]) <= 1


@every_subspace_class
def test_several_start_vectors(emulated, kind):
    emulated(kind)
    w = testing.with_spectrum(0.8 ** torch.arange(30).double(), 60, 30).float()
    cold = run([w], k=4, tol=1e-4)
    warm = run([w + 1e-4 * normal(60, 30)], k=4, tol=1e-4, start=cold)
    assert warm.converged.all() and warm.steps < cold.steps / 2
    one, truth = (
        gti.power_iteration([w], k=4, max_steps=1, seed=-5, backend=backend)
        for backend in ("cuda", "reference")
    )
    assert torch.allclose(one.sigma, truth.sigma, rtol=1e-5)
    # A column that is zero, not finite or a copy of another is replaced.
    v = cold.v[0].clone()
    v[:, 1], v[:, 2], v[3, 3] = 0.0, v[:, 0], math.nan
    again = run([w], k=4, tol=1e-4, start=cold._replace(v=[v]))
    assert again.converged.all() and torch.allclose(again.sigma, cold.sigma, rtol=1e-4)


@every_subspace_class
def test_several_triples_have_the_same_bits_in_any_list_and_order(emulated, kind):
    ws = [normal(40, 300), normal(33, 7), torch.eye(9), normal(3, 65)]
    results = []
    for order in (0, 1, 7, -1):
        emulated(kind, order)
        results.append(run(ws, k=3, max_steps=4, tol=1e-3))
    assert all(bits(r) == bits(results[0]) for r in results)
    for i, w in enumerate(ws):
        # The number of a matrix in the call decides its random start.
        alone = run([torch.zeros(3, 3)] * i + [w], k=3, max_steps=4, tol=1e-3)
        assert torch.equal(alone.v[i], results[0].v[i]) and torch.equal(alone.u[i], results[0].u[i])
        assert alone.steps[i] == results[0].steps[i]


# ---- what the emulation finds -------------------------------------------------------------------


def without(text: str, after: str = "") -> str:
    """The source without the first `text` that follows `after`."""
    begin = SOURCE.index(text, SOURCE.index(after))
    return SOURCE[:begin] + SOURCE[begin + len(text) :]


MISSING = {
    "barrier before the sum of shares": (
        "grid",
        without("__syncthreads();", "parts[threadIdx.x] = sum;"),
    ),
    "barrier of a panel": ("staged", without("__syncthreads();", "wait_for_copies<0>();\n    __s")),
    "wait for copies": ("block", without("wait_for_copies<0>();", "copy_rows(p, 0, p.rows")),
}


@pytest.mark.parametrize("name", MISSING)
def test_the_emulation_finds_what_is_missing(emulated, name):
    kind, text = MISSING[name]
    assert text != SOURCE
    ws = [normal(90, 264, torch.bfloat16), normal(90, 40, torch.bfloat16)]
    results = set()
    for order in (0, 1, 7):
        emulated(kind, order)
        right = bits(run(ws, max_steps=3, tol=0.0))
        emulated(kind, order, text)
        results.add(bits(run(ws, max_steps=3, tol=0.0)) == right)
    assert False in results


def test_the_emulation_finds_deadlocks_and_writes_outside(emulated, monkeypatch):
    emulator = emulated("grid")
    launch = emulator.launch

    def short(kernel, grid, block, args, *, shared_bytes, **rest):
        launch(kernel, grid, block, args, shared_bytes=shared_bytes - 64, **rest)

    monkeypatch.setattr(cuda, "launch", short)
    with pytest.raises(RuntimeError, match="outside of shared memory"):
        run([normal(90, 264)], max_steps=2)

    def one_by_one(kernel, grid, block, args, *, cooperative, **rest):
        launch(kernel, grid, block, args, **rest)

    monkeypatch.setattr(cuda, "launch", one_by_one)
    with pytest.raises(RuntimeError, match="deadlock"):
        run([normal(90, 264)], max_steps=2)


def test_the_emulation_finds_shared_memory_of_a_block_that_has_ended(emulated):
    """As where blocks of a cluster do not wait for each other at the end of a matrix."""
    text = without("barrier(static_cast<int>(section->kind), size, arrivals + number, target);")
    emulated("cluster", -1, text)
    with pytest.raises(RuntimeError, match="a block that has ended"):
        run([normal(40, 30)], max_steps=2)


@pytest.mark.parametrize("method", ["cg", "power"])
@pytest.mark.parametrize("kind", ["block", "grid"])
def test_what_is_left_of_a_residual_may_be_subnormal(emulated, kind, method):
    """Small integers, known to the last bit after a few steps: see the test of the CPU kernels."""
    emulated(kind)
    one, corner, ones = torch.zeros(9, 8), torch.zeros(12, 9), torch.ones(7, 8)
    one[3, 5], corner[:4, :4] = 1.0, torch.eye(4)
    pair = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    for k, ws in ((1, [pair, torch.diag(torch.tensor([1.0, 1e-22]))]), (6, [one, corner, ones])):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            r = run([w.to(dtype) for w in ws], k=k, tol=0.0, max_steps=40, method=method)
            for i, w in enumerate(ws):
                for x in (r.sigma[i], r.residual[i], r.u[i], r.v[i]):
                    assert bool(torch.isfinite(x).all())
                true = torch.linalg.svdvals(w.to(dtype).double())
                torch.testing.assert_close(r.sigma[i, 0].double(), true[0], rtol=1e-5, atol=0)
