"""The steps of a plan in Triton: stochastic rounding, numbers read on the device, and the grid."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_plans import Factor, Launch
from ..reference.phase_space import signed
from .ragged import (
    TRITON_DTYPE,
    find_item,
    in_memory,
    load_block,
    pointer,
    store_block,
    widen,
)
from .ragged import fixed_sum as fixed_sum

BLOCK = 1024
# No product is contracted with the sum that follows it: the bits are those of the other backends.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
GRID_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def fp64_row(table, row: tl.constexpr, items, item):
    """A number of the table, which holds its bits."""
    return tl.load(table + row * items + item).to(tl.float64, bitcast=True)


@triton.jit
def bits_of(x):
    """fp32 as unsigned bits, int64."""
    return x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF


@triton.jit
def nearest_bf16(x):
    """fp32 to bf16, to nearest even, as int16. By hand: the interpreter truncates."""
    b = bits_of(x)
    rounded = (b + 0x7FFF + ((b >> 16) & 1)) >> 16
    return tl.where((b & 0x7FFFFFFF) > 0x7F800000, (b >> 16) | 0x40, rounded).to(tl.int16)


@triton.jit
def times(x, y: tl.constexpr):
    """x·y modulo 2³² for int64 0 ≤ x < 2³²."""
    return ((((x >> 16) * y & 0xFFFFFFFF) << 16) + (x & 0xFFFF) * y) & 0xFFFFFFFF


@triton.jit
def random_bits(place, key):
    """32 random bits for each place (int64): a function of key and place."""
    x = times(place & 0xFFFFFFFF, 0x9E3779B9) + (key & 0xFFFFFFFF)
    x = (x + times((place >> 32) & 0xFFFFFFFF, 0x85EBCA6B)) & 0xFFFFFFFF
    x = times(x ^ (x >> 16), 0x21F0AAAD) ^ ((key >> 32) & 0xFFFFFFFF)
    x = times(x ^ (x >> 15), 0xD35A2D97)
    return x ^ (x >> 15)


@triton.jit
def stochastic_bf16(x, random):
    """fp32 up or down to bf16, as int16."""
    b = bits_of(x)
    a = b & 0x7FFFFFFF
    special = (b >> 16) | tl.where(a > 0x7F800000, 0x40, 0)
    return tl.where(a >= 0x7F800000, special, (b + (random >> 16)) >> 16).to(tl.int16)


@triton.jit
def stochastic_f16(x, random):
    """fp32 up or down to fp16, as int16."""
    b = bits_of(x)
    a = b & 0x7FFFFFFF
    r = random >> 19
    normal = (a - 0x38000000 + r) >> 13
    small = tl.where(a < 0x38800000, a, 0).to(tl.int32).to(tl.float32, bitcast=True)
    # Below 2⁻¹⁴ halves are multiples of 2⁻²⁴.
    multiple = (small * 16777216.0 + r.to(tl.float32) * 0.0001220703125).to(tl.int64)
    h = tl.where(a < 0x38800000, multiple, normal)
    h = tl.where((a >= 0x47800000) | (h > 0x7C00), 0x7C00, h)
    h = tl.where(a > 0x7F800000, 0x7E00, h)
    return (h | ((b >> 16) & 0x8000)).to(tl.int16)


@triton.jit
def xor_shift(x, bits: tl.constexpr):
    """x ^ (x >> bits) for an int64 whose shift is to bring in zeros."""
    return x ^ ((x >> bits) & ((1 << (64 - bits)) - 1))


@triton.jit
def part(addresses, item, count, TAKES_PART: tl.constexpr):
    """The address of an operand, and how many of its elements take part: none where it is null."""
    if TAKES_PART:
        address = tl.load(addresses + item)
        return address, tl.where(address == 0, 0, count)
    return item * 0, count


@triton.jit(do_not_specialize=["items", "key", "mul1", "mul2"])
def phase_kernel(
    table,  # int64 rows: p, M⁻¹ (0: a number), bits of that number, place in the list, counts,
    # first blocks
    items: tl.int64,
    qs,  # int64 [items] addresses of q and ∇L, 0: it is skipped; read where DRIFTS, KICKS
    gs,
    partials,  # fp64 [blocks], written where it drifts
    numbers,  # fp64 [3] on the device: kick, damp, drift; read where FROM_MEMORY
    counted,  # int64 on the device: is added to the key
    kick: tl.float64,
    damp: tl.float64,
    drift: tl.float64,
    key: tl.int64,
    mul1: tl.int64,  # of splitmix64
    mul2: tl.int64,
    BLOCK: tl.constexpr,
    P: tl.constexpr,  # dtypes in memory, of p and M⁻¹
    Q: tl.constexpr,  # of q and ∇L
    MASS: tl.constexpr,  # M⁻¹ is a tensor
    KICKS: tl.constexpr,
    DRIFTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    FROM_MEMORY: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """p ← damp·p − kick·∇L, then q ← q + drift·M⁻¹p; partials[b] = ½ Σ M⁻¹p²."""
    block = tl.program_id(0).to(tl.int64)
    item = find_item(table + 5 * items, items, block)
    start = (block - tl.load(table + 5 * items + item)) * BLOCK
    count = tl.minimum(tl.load(table + 4 * items + item) - start, BLOCK).to(tl.int32)
    if FROM_MEMORY:
        kick = tl.load(numbers)
        damp = tl.load(numbers + 1)
        drift = tl.load(numbers + 2)
    else:
        kick = tl.full((), kick, tl.float64)
        damp = tl.full((), damp, tl.float64)
        drift = tl.full((), drift, tl.float64)
    mine = key + tl.load(counted) + tl.load(table + 3 * items + item)
    mine = xor_shift(mine, 30) * mul1
    mine = xor_shift(xor_shift(mine, 27) * mul2, 31)
    p = pointer(tl.load(table + item), P, ALIGNED) + start
    w = pointer(tl.load(table + items + item), P, ALIGNED) + start
    mass = fp64_row(table, 2, items, item)
    g, kicked = part(gs, item, count, KICKS)
    q, moved = part(qs, item, count, DRIFTS)
    g = pointer(g, Q, ALIGNED) + start
    if Q.primitive_bitwidth == 16:
        q = pointer(q, tl.int16, ALIGNED) + start  # the interpreter truncates to bf16
    else:
        q = pointer(q, Q, ALIGNED) + start
    if (count == BLOCK) & (kicked == BLOCK) & (moved == BLOCK):
        _advance(p, q, g, w, mass, partials + block, start, count, kicked, moved, kick, damp, drift,
                 mine, BLOCK, P, Q, MASS, KICKS, DRIFTS, COMPUTE, True)  # fmt: skip
    else:
        _advance(p, q, g, w, mass, partials + block, start, count, kicked, moved, kick, damp, drift,
                 mine, BLOCK, P, Q, MASS, KICKS, DRIFTS, COMPUTE, False)  # fmt: skip


@triton.jit
def _advance(
    p,
    q,
    g,
    w,
    mass,
    out,
    start,
    count,
    kicked,
    moved,
    kick,
    damp,
    drift,
    key,
    BLOCK: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    MASS: tl.constexpr,
    KICKS: tl.constexpr,
    DRIFTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    FULL: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    momentum = load_block(p, lanes, count, FULL, COMPUTE)
    if KICKS:
        gradient = load_block(g, lanes, kicked, FULL, COMPUTE)
        stored = (damp.to(COMPUTE) * momentum - kick.to(COMPUTE) * gradient).to(P)
        store_block(p, lanes, kicked, stored, FULL)
        # The drift and the energy belong to the p in memory, rounded.
        if FULL:
            momentum = widen(stored, COMPUTE)
        else:
            momentum = tl.where(lanes < kicked, widen(stored, COMPUTE), momentum)
    if DRIFTS:
        if MASS:
            weights = load_block(w, lanes, count, FULL, COMPUTE)
            rate = drift.to(COMPUTE)
            velocity = weights * momentum
            mass = weights.to(tl.float64)
        else:
            rate = (drift * mass).to(COMPUTE)
            velocity = momentum
        p64 = momentum.to(tl.float64)
        tl.store(out, 0.5 * tl.sum(mass * p64 * p64, axis=0))
        if FULL:
            position = tl.load(q + lanes)
        else:
            position = tl.load(q + lanes, mask=lanes < moved, other=0)
        if Q.primitive_bitwidth == 16:
            position = position.to(Q, bitcast=True)
        position = widen(position, COMPUTE) + rate * velocity
        if Q.primitive_bitwidth == 16:
            random = random_bits(start + lanes, key)
            if Q is tl.bfloat16:
                rounded = stochastic_bf16(position.to(tl.float32), random)
            else:
                rounded = stochastic_f16(position.to(tl.float32), random)
        else:
            rounded = position.to(Q)
        store_block(q, lanes, moved, rounded, FULL)


def chunk() -> int:
    """Elements of a program."""
    return BLOCK


def phase_kind(q: torch.dtype, p: torch.dtype, mass: bool) -> tuple[Any, Any, bool]:
    """The step for parameters and momenta of these dtypes, M⁻¹ a tensor or a number."""
    return TRITON_DTYPE[q], TRITON_DTYPE[p], mass


def factors(numbers: tuple[Factor, ...], device: torch.device) -> Any:
    """Kick, damp and drift as `phase_step` takes them."""
    return in_memory(numbers, device)


def phase_step(launch: Launch, factors: Any, key: int, counted: Tensor, partials: Tensor) -> None:
    """`reference.phase_space.phase_step`, to the bit, with `counted` added to the key; partials:
    energies of blocks, written where it drifts."""
    on_host, numbers = factors
    Q, P, mass = launch.kind
    phase_kernel[(_count(launch.blocks),)](
        launch.table,
        _count(launch.items),
        launch.table if launch.qs is None else launch.qs,
        launch.table if launch.gs is None else launch.gs,
        partials,
        partials if numbers is None else numbers,
        counted,
        *on_host,
        key,
        signed(0xBF58476D1CE4E5B9),
        signed(0x94D049BB133111EB),
        BLOCK=BLOCK,
        P=P,
        Q=Q,
        MASS=mass,
        KICKS=launch.gs is not None,
        DRIFTS=launch.qs is not None,
        ALIGNED=launch.aligned,
        FROM_MEMORY=numbers is not None,
        COMPUTE=tl.float64 if tl.float64 in (P, Q) else tl.float32,
        **OPTIONS,
    )


@triton.jit
def nearest(x):
    """The integer nearest to x, ties to even, for |x| < 2⁵¹; an integer beyond that for any other.

    1.5·2⁵² + n holds n in its low bits; 0x4338 << 48 are the bits of 1.5·2⁵².
    """
    return (x + 6755399441055744.0).to(tl.int64, bitcast=True) - (0x4338 << 48)


@triton.jit
def within(x, limit: tl.constexpr):
    return (x >= -limit) & (x < limit)


@triton.jit(do_not_specialize=["items", "sign", "checksum_key"])
def grid_kernel(
    table,  # int64 rows: P, Q, remainder (0: zero), M⁻¹ (0: a number); bits of that number, unit_q,
    # 1/unit_p, unit_p/unit_q; elements of the tensors before; counts, first blocks
    items: tl.int64,
    qs,  # int64 [items] addresses of q and ∇L, 0: it is skipped; read where DRIFTS, KICKS
    gs,
    scales,  # bits of s of each tensor; read where OWN, else it is `scale`
    energies,  # fp64 [blocks], written where it drifts
    checksums,  # int64 [blocks]
    outside,  # int64 [blocks]: numbers beyond their limits
    kick: tl.float64,
    drift: tl.float64,
    scale: tl.float64,
    sign: tl.int64,  # 0, or −1 where back: (x ^ sign) − sign is ±x
    checksum_key: tl.int64,
    BLOCK: tl.constexpr,
    T: tl.constexpr,  # dtype of q, ∇L and remainder
    MASS: tl.constexpr,  # M⁻¹ is a tensor
    KICKS: tl.constexpr,
    DRIFTS: tl.constexpr,
    OWN: tl.constexpr,
):
    """P ← P ∓ ⌊kick/s/unit_p·∇L⌉, then Q ← Q ± ⌊(drift·s·unit_p/unit_q·w)·P⌉, q = unit_q·Q + r."""
    block = tl.program_id(0).to(tl.int64)
    item = find_item(table + 10 * items, items, block)
    start = (block - tl.load(table + 10 * items + item)) * BLOCK
    count = tl.minimum(tl.load(table + 9 * items + item) - start, BLOCK).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    unit_q = fp64_row(table, 5, items, item)
    per_unit_p = fp64_row(table, 6, items, item)
    ratio = fp64_row(table, 7, items, item)
    if OWN:
        s = fp64_row(scales, 0, items, item)
    else:
        s = tl.full((), scale, tl.float64)
    P = pointer(tl.load(table + item), tl.int64, False) + start
    momentum = tl.load(P + lanes, mask=lanes < count, other=0)
    inside = tl.full((BLOCK,), True, tl.int1)
    checksum = tl.zeros((BLOCK,), tl.int64)
    if KICKS:
        g, kicked = part(gs, item, count, True)
        g = pointer(g, T, False) + start
        step = tl.full((), kick, tl.float64) / s * per_unit_p
        by = nearest(step * load_block(g, lanes, kicked, False, tl.float64))
        place = tl.load(table + 8 * items + item) + (start + 1) + lanes
        z = by + place * checksum_key
        product = (z & 0xFFFFFFFF) * ((z >> 32) & 0xFFFFFFFF)
        checksum = tl.where(lanes < kicked, product, 0)
        momentum -= (by ^ sign) - sign
        store_block(P, lanes, kicked, momentum, False)
        inside = within(by, 1 << 51) & within(momentum, 1 << 62) | (lanes >= kicked)
    if DRIFTS:
        p64 = momentum.to(tl.float64)
        if MASS:
            weights = pointer(tl.load(table + 3 * items + item), tl.float64, False) + start
            w = load_block(weights, lanes, count, False, tl.float64)
        else:
            w = fp64_row(table, 4, items, item)
        speed = (s * (ratio * unit_q)) * p64
        tl.store(energies + block, 0.5 * tl.sum(w * speed * speed, axis=0))
        q, moved = part(qs, item, count, True)
        by = nearest(((tl.full((), drift, tl.float64) * s) * ratio * w) * p64)
        Q = pointer(tl.load(table + items + item), tl.int64, False) + start
        position = tl.load(Q + lanes, mask=lanes < moved, other=0) + ((by ^ sign) - sign)
        store_block(Q, lanes, moved, position, False)
        inside &= within(by, 1 << 51) & within(position, 1 << 62) | (lanes >= moved)
        r, remaining = part(table + 2 * items, item, count, True)
        r = load_block(pointer(r, T, False) + start, lanes, remaining, False, tl.float64)
        shown = unit_q * position.to(tl.float64) + r
        shown = tl.where(shown == 0.0, r, shown)  # only where Q = 0: r with the sign of its zero
        if T is tl.bfloat16:
            half = nearest_bf16(shown.to(tl.float32))
            store_block(pointer(q, tl.int16, False) + start, lanes, moved, half, False)
        else:
            if T is tl.float16:
                shown = shown.to(tl.float32)
            store_block(pointer(q, T, False) + start, lanes, moved, shown.to(T), False)
    tl.store(checksums + block, tl.sum(checksum, axis=0))
    tl.store(outside + block, tl.sum(tl.where(inside, 0, 1), axis=0).to(tl.int64))


def grid_kind(q: torch.dtype, mass: bool) -> tuple[Any, bool]:
    """The step on the grid for parameters of this dtype, M⁻¹ a tensor or a number."""
    return TRITON_DTYPE[q], mass


def grid_step(
    launch: Launch,
    numbers: tuple[float, float, float, Tensor | None],
    sign: int,
    partials: Tensor,
    checksums: Tensor,
    outside: Tensor,
) -> None:
    """`reference.phase_space.grid_step`, to the bit. numbers: kick, drift, s of all and, where they
    differ, of each tensor; sign: 0, or −1 for the way back; the rest: results of blocks."""
    *on_host, scales = numbers
    T, mass = launch.kind
    grid_kernel[(_count(launch.blocks),)](
        launch.table,
        _count(launch.items),
        launch.table if launch.qs is None else launch.qs,
        launch.table if launch.gs is None else launch.gs,
        launch.table if scales is None else scales,
        partials,
        checksums,
        outside,
        *on_host,
        sign,
        signed(0x9E3779B97F4A7C15),
        BLOCK=BLOCK,
        T=T,
        MASS=mass,
        KICKS=launch.gs is not None,
        DRIFTS=launch.qs is not None,
        OWN=scales is not None,
        **GRID_OPTIONS,
    )


def _count(places: slice) -> int:
    return int(places.stop - places.start)


def samples() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Kernel, signature, constants and options of typical launches, to compile ahead of time."""
    f64, f32, b16, f16 = (
        TRITON_DTYPE[d] for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    )
    phase = {"table": "*i64", "items": "i64", "qs": "*i64", "gs": "*i64", "partials": "*fp64"}
    phase |= {"numbers": "*fp64", "counted": "*i64"}
    phase |= {"kick": "fp64", "damp": "fp64", "drift": "fp64"}
    phase |= {"key": "i64", "mul1": "i64", "mul2": "i64"}
    grid = {"table": "*i64", "items": "i64", "qs": "*i64", "gs": "*i64", "scales": "*i64"}
    grid |= {"energies": "*fp64", "checksums": "*i64", "outside": "*i64"}
    grid |= {"kick": "fp64", "drift": "fp64", "scale": "fp64", "sign": "i64", "checksum_key": "i64"}
    mixed = [
        (f32, b16, False, True, True, True, False),
        (f32, f16, True, True, True, False, True),
        (f64, f32, True, True, True, True, False),
        (f32, f32, False, True, True, True, True),
        (f32, f32, False, True, False, True, False),
    ]
    return [
        (
            phase_kernel,
            phase,
            {"BLOCK": BLOCK, "P": p, "Q": q, "MASS": mass, "KICKS": kicks, "DRIFTS": drifts}
            | {"ALIGNED": wide, "FROM_MEMORY": memory, "COMPUTE": f64 if f64 in (p, q) else f32},
            OPTIONS,
        )
        for p, q, mass, kicks, drifts, wide, memory in mixed
    ] + [
        (
            grid_kernel,
            grid,
            {"BLOCK": BLOCK, "T": t, "MASS": mass, "KICKS": kicks, "DRIFTS": drifts, "OWN": own},
            GRID_OPTIONS,
        )
        for t, mass, kicks, drifts, own in [
            (f32, False, True, True, False),
            (f32, True, True, True, True),
            (f32, False, True, False, False),
            (f64, False, False, True, False),
            (b16, False, True, True, False),
        ]
    ]
