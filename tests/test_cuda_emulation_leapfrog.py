"""csrc/cuda/leapfrog.cu and kinetic_energy.cu with their launchers without a GPU: the sources run
in the emulation of cuda_emulation/, with 64 threads a block. What only a GPU can show is in
test_gpu.py."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_emulation import emulate

import gti_kernels as gti
from gti_kernels import testing
from gti_kernels.cuda_kernels import compiler, kinetic_energy, leapfrog, ragged
from gti_kernels.rows import DTYPES

OPS = ("kick_", "drift_", "kick_drift_", "kinetic_energy")
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def emulated(monkeypatch):
    """emulated(order, text): the backend "cuda" runs in the emulation."""
    monkeypatch.setattr(kinetic_energy, "SUM_THREADS", 64)
    return lambda order=0, text=None: emulate.use(monkeypatch, ragged, order, text)


def lists(count: int, sizes, dtype=torch.float32) -> list[list[torch.Tensor]]:
    """`count` lists of tensors of the same sizes."""
    return [
        [
            testing.numbers(n, dtype=dtype, device="cpu", seed=31 * a + i)
            for i, n in enumerate(sizes)
        ]
        for a in range(count)
    ]


def copy(x):
    return x.clone() if isinstance(x, torch.Tensor) else [copy(y) for y in x]


def bits(tensors) -> list[bytes]:
    return [t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors]


@pytest.mark.parametrize(
    "op, dtype",
    [*((op, "float32") for op in OPS), *(("kick_drift_", d) for d in ("float64", "bfloat16"))],
)
def test_parity_with_the_reference(emulated, op, dtype):
    emulated()
    comparisons = testing.compare(op, dtype, "cuda")
    assert comparisons
    for c in comparisons:
        assert c.error <= c.bound, c


@pytest.mark.parametrize("mass", [0.75, "of each element"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_element_is_rounded_once_from_the_stored_momentum(emulated, dtype, mass):
    """The definition in twice the precision of the arithmetic, rounded where the kernel rounds."""
    emulated()
    working = getattr(torch, dtype)
    # Few bits a number, so that in fp32 (fp64) arithmetic nothing is rounded before the store.
    q, p, g, w = (
        [(8 * t).round() / 8 for t in tensors]
        for tensors in lists(4, (5, 1037, 2048), torch.float64)
    )
    inverse = [x.abs() for x in w] if mass == "of each element" else [mass] * 3
    half = [[t.to(working, copy=True) for t in tensors] for tensors in (q, p, g)]
    given = [t.to(working) for t in inverse] if mass == "of each element" else mass
    energy = gti.kick_drift_(*half, 0.25, -0.5, inv_mass=given, damp=0.5, backend="cuda")
    total = 0.0
    for q_t, p_t, g_t, m_t, q_got, p_got in zip(q, p, g, inverse, *half[:2], strict=True):
        momentum = (0.5 * p_t - 0.25 * g_t).to(working)
        assert torch.equal(p_got, momentum)
        assert torch.equal(q_got, (q_t - 0.5 * m_t * momentum.double()).to(working))
        total += 0.5 * (m_t * momentum.double() ** 2).sum()
    assert energy == total  # sums of such numbers have no rounding either


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_of_every_size_of_number(emulated, dtype):
    """Stores round to nearest, ties to even, subnormal and overflowing numbers too."""
    emulated()
    p = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for step in (0.0, 0.37, 1e4):
        grad = p.flip(0).clone()
        expected = torch.addcmul(
            0.93 * p.float(), grad.float(), torch.full((), -step, dtype=torch.float32)
        )
        got = p.clone()
        gti.kick_(got, grad, step, damp=0.93, backend="cuda")
        # addcmul rounds the product once more: only where that decides may a result differ.
        exact = 0.93 * p.double() - step * grad.double()
        assert torch.equal(got.isnan(), expected.to(dtype).isnan())
        sound = ~got.isnan()
        differs = sound & (got != expected.to(dtype))
        assert differs.sum() < 20
        spacing = (torch.nextafter(got, got.new_tensor(math.inf)).double() - got.double()).abs()
        near = (got.double() - exact).abs() <= 0.5001 * spacing
        assert near[differs].all()


def test_a_ragged_list_of_many_tensors_is_one_launch(emulated):
    """More tensors than 64 threads find in two looks; empty ones among them."""
    emulator = emulated()
    sizes = [(7 * i) % 11 for i in range(4300)] + [3000, 0, 5000]
    q, p, g = lists(3, sizes)
    expected = copy([q, p])
    energy = gti.kick_drift_(q, p, g, 0.1, 0.2, backend="cuda")
    truth = gti.kick_drift_(*expected, g, 0.1, 0.2, backend="reference")
    assert len(emulator.launches) == 2  # and the sum of the energies
    for got, right in zip([*q, *p], [*expected[0], *expected[1]], strict=True):
        assert torch.allclose(got, right, rtol=1e-6, atol=1e-6)
    assert abs(energy - truth) <= 1e-12 * truth
    assert torch.equal(gti.kinetic_energy(p, backend="cuda"), energy)
    assert len(emulator.launches) == 4


def test_mixed_dtypes_are_a_launch_each(emulated):
    emulator = emulated()
    q, p, g = ([a, b.double(), c.bfloat16(), d] for a, b, c, d in lists(3, (100, 2000, 1500, 7)))
    expected = copy([q, p])
    energy = gti.kick_drift_(q, p, g, 0.1, 0.2, inv_mass=[1.0, 0.5, 2.0, 3.0], backend="cuda")
    truth = gti.kick_drift_(*expected, g, 0.1, 0.2, inv_mass=[1.0, 0.5, 2.0, 3.0], backend="cpu")
    assert len(emulator.launches) == 4
    assert abs(energy - truth) <= 1e-12 * truth
    for got, right in zip([*q, *p], [*expected[0], *expected[1]], strict=True):
        assert torch.allclose(got, right, rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_odd_addresses_give_the_bits_of_even_ones(emulated, dtype):
    """Views that begin between 16-byte boundaries, each operand elsewhere or one alone; nothing
    beside them is touched. The energy is that of the momentum as stored."""
    emulated()
    sizes = (1, 13, 1024, 2311)
    even = lists(4, sizes, getattr(torch, dtype))
    moved = copy(even)
    expected = gti.kick_drift_(*moved[:3], 0.1, 0.2, inv_mass=moved[3], backend="cuda")
    for shifts in ((0, 1, 2, 3), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)):
        buffers = [
            [torch.cat([t.new_full((by,), 7.0), t, t.new_full((9,), 7.0)]) for t in tensors]
            for by, tensors in zip(shifts, even, strict=True)
        ]
        views = [
            [t[by : by + n] for t, n in zip(tensors, sizes, strict=True)]
            for by, tensors in zip(shifts, buffers, strict=True)
        ]
        for by, view in zip(shifts, views, strict=True):
            assert all(t.data_ptr() % 16 == by * t.element_size() % 16 for t in view)
        energy = gti.kick_drift_(*views[:3], 0.1, 0.2, inv_mass=views[3], backend="cuda")
        assert energy == expected
        assert bits([*views[0], *views[1]]) == bits([*moved[0], *moved[1]])
        for by, buffer in zip(shifts, buffers, strict=True):
            for t, n in zip(buffer, sizes, strict=True):
                assert t[:by].eq(7.0).all() and t[by + n :].eq(7.0).all()
        assert gti.kinetic_energy(views[1], inv_mass=views[3], backend="cuda") == energy


def test_factors_on_the_device(emulated):
    """0-d tensors in place of numbers: the same bits, and read when the kernel runs."""
    emulated()
    q, p, g = lists(3, (1500, 40))
    mirror = copy([q, p])
    expected = leapfrog.kick_drift_(*mirror, g, 0.1, -0.3, [0.5, 2.0], 0.97)
    leapfrog.kick_(mirror[1], g, 0.2, 0.9)
    leapfrog.drift_(mirror[0], mirror[1], 0.7, [1.0, 1.0])
    kick, drift, damp = (torch.tensor(x, dtype=torch.float64) for x in (0.1, -0.3, 0.97))
    energy = leapfrog.kick_drift_(q, p, g, kick, drift, [0.5, 2.0], damp)
    kick.fill_(0.2), drift.fill_(0.7), damp.fill_(0.9)
    leapfrog.kick_(p, g, kick, damp)
    leapfrog.drift_(q, p, drift, [1.0, 1.0])
    assert energy == expected and bits([*q, *p]) == bits([*mirror[0], *mirror[1]])


def test_same_bits_for_any_order_of_threads(emulated):
    """A result that depends on it would betray a barrier that is missing."""
    q, p, g, w = lists(4, [1 + i % 5 for i in range(200)] + [9000])
    results = []
    for order in (0, 1, 7):
        emulated(order)
        moved = copy([q, p])
        energy = gti.kick_drift_(*moved, g, 0.1, 0.2, inv_mass=w, backend="cuda")
        results.append(bits([energy, *moved[0], *moved[1]]))
        assert gti.kinetic_energy(moved[1], inv_mass=w, backend="cuda") == energy
    assert all(r == results[0] for r in results)


def test_sum_of_many_chunks(emulated):
    """More partial sums than one block has under way; nothing depends on memory that is fresh."""
    emulated()
    x = testing.numbers(5000, dtype=torch.float64, device="cpu", seed=3)
    torch.use_deterministic_algorithms(True)
    total = kinetic_energy.fixed_sum(x)
    assert abs(total - math.fsum(x.tolist())) <= 1e-12 and total.shape == ()
    assert kinetic_energy.fixed_sum(x[:0]) == 0 and kinetic_energy.fixed_sum(x[:1]) == x[0]


def test_empty_lists_and_tensors(emulated):
    emulator = emulated()
    empty = [torch.empty(0), torch.empty(3, 0)]
    assert gti.kick_drift_(copy(empty), copy(empty), empty, 0.1, 0.2, backend="cuda") == 0
    gti.kick_([], [], 0.1, backend="cuda")
    assert gti.kinetic_energy([], backend="cuda") == 0
    assert not emulator.launches


def test_the_emulation_finds_a_missing_barrier(emulated):
    """Of the block's sum of the energy: in some order of the threads the result is wrong."""
    text = compiler.source("kinetic_energy")
    at = text.index("__syncthreads();", text.index("parts[threadIdx.x / 32] = x;"))
    p = lists(1, (4000,))[0]
    emulated()
    right = gti.kinetic_energy(p, backend="cuda")
    found = []
    for order in (0, 1, 7):
        emulated(order, text[:at] + text[at + len("__syncthreads();") :])
        found.append(gti.kinetic_energy(p, backend="cuda") != right)
    assert any(found)
