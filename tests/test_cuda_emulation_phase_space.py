"""csrc/cuda/phase_space.cu with its launcher under PhaseSpace and without a GPU: the source runs
in the emulation of cuda_emulation/, with 64 threads a block. What only a GPU can show is in
test_gpu.py."""

from __future__ import annotations

import importlib
import itertools
import math
import mmap
import re
import sys

import pytest
import torch
from cuda_emulation import emulate

import gti_kernels as gti
from gti_kernels import device_plans, tables, testing
from gti_kernels.cuda_kernels import compiler, kinetic_energy, phase_space, ragged
from gti_kernels.reference import phase_space as reference

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALVES)
WIDE = (torch.float32, torch.float64)
# Tails of a piece, of a chunk of 2048 elements; empty; more than one chunk; a number.
SHAPES = ((1,), (0,), (7,), (33, 3), (2048,), (5001,), ())

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_mass = pytest.mark.parametrize("mass", ["numbers", "tensors"])


@pytest.fixture
def emulated(monkeypatch):
    """emulated(order, text): the backend "cuda" runs in the emulation."""
    monkeypatch.setattr(kinetic_energy, "SUM_THREADS", 64)
    return lambda order=0, text=None: emulate.use(monkeypatch, ragged, order, text)


def numbers(*shape, dtype, seed=0):
    return testing.numbers(*shape, dtype=dtype, device="cpu", seed=seed)


def positions(dtype, shapes=SHAPES):
    """Numbers of very different sizes; one tensor in another order in memory."""
    q = [numbers(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes)]
    for x in q:
        if x.numel() > 7:
            x.view(-1)[::3] *= 2.0**-20
    return [x.t().contiguous().t() if x.ndim == 2 else x for x in q]


def masses(kind, q, dtype):
    if kind == "numbers":
        return [0.5 + 0.3 * i for i in range(len(q))]
    return [numbers(*x.shape, dtype=dtype, seed=5 + i).abs() for i, x in enumerate(q)]


def same_bits(xs, ys):
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def some(grads, but):
    return [None if i == but else g for i, g in enumerate(grads)]


# ---- the same bits as on every other backend ----------------------------------------------------


def walk(backend, q, **options):
    """Every kind of step; the energies."""
    space = gti.PhaseSpace(q, backend=backend, **options)
    energies = []
    for _ in range(3):
        grads = [torch.sin(x) for x in q]
        energies.append(float(space.kick_drift_(0.1, 0.2, damp=0.9, grads=grads)))
    space.kick_(0.3, damp=0.7, grads=some(grads, 5))
    space.drift_(-0.1, skipped=(1, 5))
    energies.append(float(space.kick_drift_(0.3, 0.1, grads=some(grads, 2))))
    space.scale_momenta_(0.75)
    space.drift_(0.05)
    return space, energies


@every_mass
@pytest.mark.parametrize("wide", WIDE)
@every_dtype
def test_steps_have_the_bits_of_the_cpu_and_of_the_reference(emulated, dtype, wide, mass):
    emulated()
    runs = []
    for backend in ("cpu", "cuda", "reference"):
        q = positions(dtype)
        w = masses(mass, q, wide)
        space, energies = walk(backend, q, inv_mass=w, momentum_dtype=wide, seed=3)
        runs.append((q, space.momenta, energies))
    for q, p, energies in runs[1:]:
        assert same_bits(q, runs[0][0]) and same_bits(p, runs[0][1])
        assert energies == pytest.approx(runs[0][2], rel=1e-14)


@every_mass
@every_dtype
def test_exact_steps_have_the_bits_of_the_cpu_and_of_the_reference(emulated, dtype, mass):
    """Positions, integers and the checksums of all kicks."""
    emulated()
    runs = []
    for backend in ("cpu", "cuda", "reference"):
        q = positions(dtype)
        w = masses(mass, q, torch.float64)
        options = {"inv_mass": w, "momentum_dtype": torch.float32, "exact": True}
        space, energies = walk(backend, q, **options)
        grid = space._engine
        assert dtype in HALVES or grid.rest_q[5] is not None  # the remainder takes part
        runs.append((q, grid.Q, grid.P, list(grid.moves.checksums), energies))
    for q, Q, P, checksums, energies in runs[1:]:
        assert same_bits(q, runs[0][0])
        assert same_bits(Q, runs[0][1]) and same_bits(P, runs[0][2])
        assert checksums == runs[0][3]
        assert energies == pytest.approx(runs[0][4], rel=1e-13)


@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_of_every_number(emulated, dtype, wide):
    """Subnormal, overflowing and infinite ones too, many times; NaN stays NaN."""
    emulated()
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    momentum = numbers(2**16, dtype=wide).mul(2.0 ** -(torch.arange(2**16) % 37).double())
    runs = []
    for backend in ("cpu", "cuda"):
        q = every.clone()
        space = gti.PhaseSpace(q, inv_mass=1.0, momentum=momentum.to(wide), momentum_dtype=wide,
                               seed=11, backend=backend)  # fmt: skip
        for step in (0.0, 1e-9, 1e-5, 0.01, 1.0, 40.0):
            space.drift_(step)
        runs.append(q)
    a, b = runs
    assert torch.equal(a.isnan(), b.isnan()) and a.isnan().sum() > 100
    sound = ~a.isnan()
    assert torch.equal(a[sound].view(torch.int16), b[sound].view(torch.int16))
    assert not torch.equal(a[sound], every[sound])


# ---- the way back -------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [2, 4])
@every_dtype
def test_an_exact_walk_returns_every_bit(emulated, dtype, order):
    """Forward and back, damped, with a scaling half way as the energy cap makes it."""
    emulated()
    q = positions(dtype)
    space = gti.PhaseSpace(q, momentum="gaussian", exact=True, backend="cuda")
    start = [x.clone() for x in (*q, *space.momenta)]
    options = {"steps": 5, "damping": 0.3, "order": order}

    def force(q):
        return [torch.sin(x) for x in q]

    space.leapfrog_(force, 0.1, **options)
    space.scale_momenta_(0.8)
    space.leapfrog_(force, 0.1, **options)
    assert not same_bits(q[-2:], start[len(q) - 2 : len(q)])
    space.leapfrog_(force, -0.1, **options)
    space.scale_momenta_(1 / 0.8)
    space.leapfrog_(force, -0.1, **options)
    assert same_bits([*q, *space.momenta], start)
    assert not space._engine.moves.kinds


def test_a_way_back_with_another_gradient_is_found(emulated):
    """One bit of one gradient: the step is named, and the state is as before the call."""
    emulated()
    q = positions(torch.float32)
    space = gti.PhaseSpace(q, exact=True, backend="cuda")
    grads = [torch.sin(x) for x in q]
    space.kick_drift_(0.1, 0.2, damp=0.9, grads=grads)
    space.drift_(-0.2)
    before = [x.clone() for x in (*q, *space._engine.P)]
    wrong = [g.clone() for g in grads]
    wrong[5][-1] = torch.nextafter(wrong[5][-1], torch.tensor(9.0))
    with pytest.raises(RuntimeError, match="leaves the way out at step 0"):
        space.kick_(-0.1 / 0.9, damp=1 / 0.9, grads=wrong)
    assert same_bits([*q, *space._engine.P], before)
    space.kick_(-0.1 / 0.9, damp=1 / 0.9, grads=grads)
    assert not space._engine.moves.kinds


@pytest.mark.parametrize("step", [(1e6, 0.1), (0.1, 1e6), (math.inf, 0.1), (math.nan, 0.1)])
def test_overflow_of_the_grid_is_found_and_undone(emulated, step):
    """In the last element of a list, of a kick or of a drift; a gradient that is inf or NaN too."""
    emulated()
    kick, drift = step
    q = positions(torch.float64)
    space = gti.PhaseSpace(q, exact=True, backend="cuda")
    before = [x.clone() for x in (*q, *space._engine.P, *space._engine.Q)]
    grads = [0.5 * torch.ones_like(x) for x in q]
    grads[-1].fill_(kick)
    with pytest.raises(OverflowError, match="would leave the grid"):
        space.kick_drift_(1.0, drift, grads=grads)
    assert same_bits([*q, *space._engine.P, *space._engine.Q], before)


@pytest.mark.parametrize("limit", ["increment", "increment of a drift", "coordinate"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_limits_of_the_grid(emulated, limit, sign):
    """The largest number inside, the smallest outside: flags and bits of the CPU."""
    emulated()
    for inside in (True, False):
        Q = torch.zeros(5, dtype=torch.int64)
        P = torch.zeros(5, dtype=torch.int64)
        grad = torch.zeros(5, dtype=torch.float64)
        drifts = limit == "increment of a drift"
        if drifts:
            P[3] = sign * (2**51 - 1 if inside else 2**51 + 1)
        elif limit == "increment":
            grad[3] = -sign * (2.0**51 - 1 if inside else 2.0**51 + 1)
        else:
            edge = 2**62 - 2 if sign > 0 else -(2**62) + 1
            P[3], grad[3] = edge, -sign * (1.0 if inside else 2.0)
        q = torch.zeros(5, dtype=torch.float64)
        seen = [[x.view(torch.float64)] for x in (Q, P)]
        plan = device_plans.GridPlan(phase_space, [q], *seen, [None], [1.0], [], [1.0], [1.0])
        grads = None if drifts else [grad]
        _, found, _ = plan.step(grads, (), not drifts, drifts, False, 1.0, 1.0, 1.0, {})
        assert found == inside


# ---- memory -------------------------------------------------------------------------------------


def test_a_list_of_many_tensors_is_one_launch(emulated):
    """More than 20,000 tensors, empty ones among them."""
    emulator = emulated()
    runs = []
    for backend in ("cpu", "cuda"):
        q = [torch.full((i % 3,), 0.1 + i, dtype=torch.bfloat16) for i in range(20_100)]
        q[7777] = numbers(5000, dtype=torch.bfloat16)
        grads = [torch.sin(x) for x in q]
        space = gti.PhaseSpace(q, inv_mass=0.5, seed=9, backend=backend)
        energy = space.kick_drift_(0.1, 0.2, damp=0.9, grads=grads)
        runs.append((q, space.momenta, float(energy)))
    assert same_bits(runs[0][0], runs[1][0]) and same_bits(runs[0][1], runs[1][1])
    assert runs[0][2] == pytest.approx(runs[1][2], rel=1e-13)
    assert len(emulator.launches) == 2  # and the sum of the energies


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is only promised")
@pytest.mark.parametrize("exact", [False, True])
def test_more_than_2_to_the_32_elements(emulated, monkeypatch, exact):
    """The last four chunks of one tensor, the only ones that run, so that its memory costs nothing:
    right addresses, random bits and checksums."""
    n, tail = 2**32 + 5000, 2048 + 5000
    chunks = -(-n // 2048)

    def promised(dtype, last=None):
        memory = mmap.mmap(-1, n * dtype.itemsize, flags=mmap.MAP_PRIVATE | 0x4000)  # no reserve
        x = torch.frombuffer(memory, dtype=dtype)
        if last is not None:
            x[-tail:] = last
        return x

    source, emulator = compiler.source, emulated()
    here = f"(blockIdx.x + {chunks - 4}u)"
    monkeypatch.setattr(compiler, "source", lambda stem: source(stem).replace("blockIdx.x", here))
    monkeypatch.setattr(
        ragged, "launch", lambda kernel, grid, *a, **k: emulator.launch(kernel, 4, *a, **k)
    )
    monkeypatch.setattr(device_plans._Plan, "_new", lambda self, d: torch.zeros(chunks, dtype=d))
    monkeypatch.setattr(phase_space, "fixed_sum", torch.sum)
    q, g = (numbers(tail, dtype=torch.bfloat16, seed=i) for i in range(2))
    big_q, big_g = promised(q.dtype, q), promised(g.dtype, g)
    mass = [0.5]
    if exact:
        Q, P = (torch.zeros(tail, dtype=torch.int64) for _ in range(2))
        big_Q, big_P = promised(Q.dtype), promised(P.dtype)
        units, step = ([2.0**-30], [2.0**-40]), (True, True, False, 0.1, 0.2)
        seen = [[x.view(torch.float64)] for x in (big_Q, big_P)]
        plan = device_plans.GridPlan(phase_space, [big_q], *seen, [None], mass, [], *units)
        checksum, inside, energy = plan.step([big_g], (), *step, 1.0, {})
        _, right, expected = reference.grid_step(
            [q], [None], [Q], [P], [g], mass, *units, [1.0], *step
        )
        assert inside == bool(right)
        assert checksum == int(reference._checksum(-P, n - tail)) & reference.MASK
        assert torch.equal(big_Q[-tail:], Q) and torch.equal(big_P[-tail:], P)
    else:
        p = torch.zeros(tail, dtype=torch.float32)
        big_p = promised(p.dtype)
        plan = device_plans.PhasePlan(phase_space, [big_q], [big_p], mass, [])
        energy = plan.step([big_g], (), True, True, 0.1, 0.9, 0.2, 7)
        expected = reference.phase_step(
            [q.float()], [p], [g.float()], mass, True, True, 0.1, 0.9, 0.2, 7
        )
        assert torch.equal(big_p[-tail:], p)
        q = reference.stochastically_rounded(
            q.float() + 0.1 * p, q.dtype, reference.mixed(7), n - tail
        )
    assert torch.equal(big_q[-tail:], q)
    assert float(energy) == pytest.approx(float(expected), rel=1e-13)


def test_mixed_dtypes_are_a_launch_each(emulated):
    emulator = emulated()
    runs = []
    for backend in ("cpu", "cuda"):
        q = [numbers(300 * i + 5, dtype=DTYPES[i % 4], seed=i) for i in range(8)]
        for exact in (False, True):
            space = gti.PhaseSpace(q, exact=exact, seed=2, backend=backend)
            space.kick_drift_(0.1, 0.2, grads=[torch.cos(x) for x in q])
        runs.append((q, space.momenta))
    assert same_bits(runs[0][0], runs[1][0]) and same_bits(runs[0][1], runs[1][1])
    assert len(emulator.launches) == 2 * (4 + 1)


@pytest.mark.parametrize("exact", [False, True])
@every_dtype
def test_odd_addresses_give_the_bits_of_even_ones(emulated, dtype, exact):
    """Parameters, gradients and masses that begin between 16-byte boundaries, one or all of them;
    nothing beside the parameters is touched."""
    emulated()
    sizes = (1, 13, 2048, 2311)
    even = [[numbers(n, dtype=dtype, seed=9 * a + n) for n in sizes] for a in range(2)]
    mass = [numbers(n, dtype=torch.float32, seed=n).abs() for n in sizes]

    def shifted(tensors, by):
        return [
            torch.cat([t.new_full((by,), 7.0), t, t.new_full((9,), 7.0)])[by : by + t.numel()]
            for t in tensors
        ]

    results = []
    for shifts in ((0, 0, 0), (1, 2, 3), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        q, grads, w = (shifted(x, by) for x, by in zip((*even, mass), shifts))
        assert all(
            x.data_ptr() % 16 == by * x.element_size() % 16
            for xs, by in zip((q, grads, w), shifts)
            for x in xs
        )
        space = gti.PhaseSpace(q, inv_mass=w, exact=exact, seed=4, backend="cuda")
        energy = space.kick_drift_(0.1, 0.2, grads=grads)
        results.append([*q, *space.momenta, energy])
        for x, n in zip(q, sizes):
            whole = x.as_strided((n + 9 + shifts[0],), (1,), 0)
            assert whole[: shifts[0]].eq(7.0).all() and whole[shifts[0] + n :].eq(7.0).all()
    assert all(same_bits(r, results[0]) for r in results[1:])


def test_tables_are_uploaded_once_and_addresses_where_they_change(emulated, monkeypatch):
    emulated()
    made = []

    class Counted(tables.Upload):
        def __init__(self, rows, device):
            made.append(rows)
            super().__init__(rows, device)

    monkeypatch.setattr(device_plans, "Upload", Counted)
    q = [torch.nn.Parameter(numbers(n, dtype=torch.float32)) for n in (100, 3000)]
    for x in q:
        x.grad = torch.ones_like(x)
    space = gti.PhaseSpace(q, backend="cuda")
    space.kick_drift_(0.1, 0.2)
    assert len(made) == 2  # the table; the addresses
    for _ in range(2):
        space.kick_drift_(0.1, 0.2)
        space.drift_(0.1)
        space.kick_(0.1)
    assert len(made) == 2
    old = q[1].grad
    q[1].grad = 2 * old
    space.kick_drift_(0.1, 0.2)
    places = [x.data_ptr() for x in q]
    assert made[2].tolist() == [places, [x.grad.data_ptr() for x in q]]
    q[0].grad = None
    space.kick_(0.1)
    assert made[3].tolist() == [places, [0, q[1].grad.data_ptr()]]
    q[1].data = q[1].data.clone()
    p = space.momenta[1].clone()
    before = q[1].detach().clone()
    space.drift_(0.5)
    places = [x.data_ptr() for x in q]
    assert made[4].tolist() == [places, [0, q[1].grad.data_ptr()]]
    assert torch.equal(q[1].detach(), before + 0.5 * space.inv_mass[1] * p)
    before = q[1].detach().clone()
    space.drift_(0.5, skipped=[1])
    assert made[5].tolist() == [[places[0], 0], [0, q[1].grad.data_ptr()]]
    assert torch.equal(q[1].detach(), before)
    assert len(made) == 6


def test_an_upload_that_fails_is_made_up_for(emulated, monkeypatch):
    """As inside a CUDA graph capture: the next step must not run on the addresses of the last."""
    emulated()
    q = [numbers(50, dtype=torch.float32), numbers(60, dtype=torch.float64)]
    grads = [torch.sin(x) for x in q]
    space, mirror = (gti.PhaseSpace([x.clone() for x in q], backend=b) for b in ("cuda", "cpu"))
    for s in (space, mirror):
        s.kick_drift_(0.1, 0.2, grads=grads)
    before = [x.clone() for x in (*space.params, *space.momenta)]
    others = [torch.cos(x) for x in q]

    def fail(*args):
        raise RuntimeError("new tensors inside a CUDA graph capture")

    with monkeypatch.context() as patch:
        patch.setattr(device_plans, "Upload", fail)
        with pytest.raises(RuntimeError, match="inside a CUDA graph"):
            space.kick_drift_(0.1, 0.2, grads=others)
    assert same_bits([*space.params, *space.momenta], before) and space.step_count == 1
    for s in (space, mirror):
        s.kick_drift_(0.1, 0.2, grads=others)
    assert same_bits([*space.params, *space.momenta], [*mirror.params, *mirror.momenta])


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize("exact", [False, True])
def test_memory_of_the_plan_that_has_moved_is_an_error(emulated, exact, backend):
    emulated()
    q = [numbers(50, dtype=torch.float32)]
    space = gti.PhaseSpace(q, inv_mass=[torch.ones(50)], exact=exact, backend=backend)
    space.drift_(0.1)
    before = q[0].clone()
    kept = space._engine.mass
    kept[0].data = kept[0].clone()
    with pytest.raises(RuntimeError, match="drift_: the plan is stale: the memory of its"):
        space.drift_(0.1)
    assert torch.equal(q[0], before)


def test_a_saved_exact_walk_goes_on_with_the_units_it_had(emulated):
    """The table of the plan holds units and addresses of remainders: it is made anew."""
    emulated()
    spaces = []
    for scale in (1.0, 64.0):
        q = [scale * x for x in positions(torch.float32)]
        spaces.append(gti.PhaseSpace(q, exact=True, backend="cuda"))
        spaces[-1].kick_drift_(0.1, 0.1, grads=[torch.sin(x) for x in q])
    walked, other = spaces
    other.load_state_dict(walked.state_dict())
    for space in spaces:
        space.kick_drift_(0.1, 0.1, damp=0.9, grads=[torch.cos(x) for x in space.params])
    assert same_bits(walked.params, other.params)
    assert same_bits(walked.momenta, other.momenta)


def test_empty_lists(emulated):
    emulator = emulated()
    for q in ([], [torch.empty(0), torch.empty(3, 0)]):
        for exact in (False, True):
            space = gti.PhaseSpace(q, exact=exact, backend="cuda")
            assert space.kick_drift_(0.1, 0.2, grads=[torch.empty_like(x) for x in q]) == 0
    assert not emulator.launches


# ---- launches -----------------------------------------------------------------------------------


def test_factors_on_the_device(emulated):
    """0-d tensors in place of numbers, fp32 ones too: the same bits."""
    emulated()
    runs = []
    for wrap in (float, lambda x: torch.tensor(x), lambda x: torch.tensor(x, dtype=torch.float64)):
        q = positions(torch.bfloat16)
        p = [numbers(*x.shape, dtype=torch.float32, seed=2) for x in q]
        p[3] = p[3].t().contiguous().t()
        grads = [torch.sin(x) for x in q]
        plan = device_plans.PhasePlan(phase_space, q, p, [0.5] * len(q), [])
        factors = [wrap(x) for x in (0.125, 0.875, 0.25)]  # fp32 has them exactly
        energy = plan.step(grads, (), True, True, *factors, 5)
        plan.step(None, (), False, True, 0.0, 1.0, wrap(-0.5), 6)
        runs.append([*q, *p, energy])
    assert same_bits(runs[0], runs[1]) and same_bits(runs[0], runs[2])


def test_same_bits_for_any_order_of_threads(emulated):
    """A result that depends on it would betray a barrier that is missing."""
    results = []
    for order in (0, 1, 7):
        emulated(order)
        q = positions(torch.float32, ((9000,), *[(1 + i % 5,) for i in range(200)]))
        found = []
        for exact in (False, True):
            space = gti.PhaseSpace(q, momentum="gaussian", exact=exact, backend="cuda")
            found.append(space.kick_drift_(0.1, 0.2, grads=[torch.sin(x) for x in q]))
        checksums = list(space._engine.moves.checksums)
        results.append(([*q, *space.momenta, *found], checksums))
    for tensors, checksums in results[1:]:
        assert same_bits(tensors, results[0][0]) and checksums == results[0][1]


def test_replays_of_a_graph_round_as_as_many_steps(emulated, monkeypatch):
    """Two drifts are captured; each replay runs the same launches with the same arguments."""
    runs = []
    for captured in (False, True):
        emulator = emulated()
        q = positions(torch.bfloat16)
        grads = [torch.ones_like(x) for x in q]
        space = gti.PhaseSpace(q, momentum="gaussian", seed=4, backend="cuda")
        space.kick_drift_(1e-3, 1e-3, grads=grads)  # uploads the tables
        if not captured:
            for _ in range(6):
                space.kick_drift_(1e-3, 1e-3, grads=grads)
            runs.append(q)
            continue
        kept = []
        launch = emulator.launch
        monkeypatch.setattr(
            ragged, "launch", lambda *a, **k: (kept.append((a, k)), launch(*a, **k))
        )
        monkeypatch.setattr(device_plans, "capturing", lambda device: True)
        counter = space._engine.plan._replayed
        counts = []
        for _ in range(2):
            space.kick_drift_(1e-3, 1e-3, grads=grads)
            counts.append(len(kept))
        for _ in range(2):  # what a replay does: the launches, and what they were followed by
            for i, (args, options) in enumerate(kept):
                launch(*args, **options)
                if i + 1 in counts:
                    counter.add_(reference.signed(reference.STEP_KEY))
        runs.append(q)
    assert same_bits(*runs)


# ---- what the compiler makes of it --------------------------------------------------------------


def ptx_of(text, **macros):
    """By NVRTC itself: cuda.core asks a driver whether it can load what it makes."""
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")

    def call(name, *args):
        status, *results = getattr(nvrtc, name)(*args)
        assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, (name, status)
        return results[0] if results else None

    options = [f"-D{name}={value}".encode() for name, value in macros.items()]
    options += [b"--gpu-architecture=compute_90a", f"--std={compiler.STANDARD}".encode()]
    program = call("nvrtcCreateProgram", text.encode(), b"source.cu", 0, [], [])
    call("nvrtcCompileProgram", program, len(options), options)
    ptx = b" " * call("nvrtcGetPTXSize", program)
    call("nvrtcGetPTX", program, ptx)
    return ptx.decode()


def why_no_nvrtc():
    try:
        compiler.compiler_version()
    except ImportError as error:
        return str(error)
    return None


@pytest.mark.skipif(why_no_nvrtc() is not None, reason=str(why_no_nvrtc()))
# Each dtype of either once; the kernel of the grid depends on the first alone.
@pytest.mark.parametrize("element, momentum", [(0, 0), (1, 1), (2, 1), (3, 0)])
def test_no_product_is_contracted_with_the_sum_that_follows(element, momentum):
    """In PTX: an instruction that says how it rounds is never fused; fma is for the energy alone,
    one for each element that a thread holds, in each of the two loops."""
    ptx = ptx_of(compiler.source("phase_space"), ELEMENT=element, MOMENTUM=momentum, THREADS=256)
    bodies = {x.split("(")[0]: x for x in ptx.split(".entry ")[1:]}
    compute = 8 if 0 in (element, momentum) else 4
    held = {"phase_step": 4 * 16 // compute, "grid_step": 2 * 2}
    assert set(bodies) == set(held)
    for entry, body in bodies.items():
        assert not re.search(r"\b(fma|mad)\.\S*f32", body)
        assert len(re.findall(r"\bfma\.rn\.f64", body)) == 2 * held[entry]


def test_specialisations_are_those_a_plan_asks_for():
    asked = {
        phase_space.phase_kind(q, p, mass)
        for q, p, mass in itertools.product(DTYPES, WIDE, (False, True))
    }
    asked |= {phase_space.grid_kind(q, mass) for q in DTYPES for mass in (False, True)}
    assert set(phase_space.SPECIALISATIONS) == asked
