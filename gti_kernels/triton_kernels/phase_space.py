"""The steps of a plan in Triton: stochastic rounding, numbers read on the device, and the grid."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.phase_space import signed
from ..tables import device_table, elementwise_groups, on_device, prefix
from .ragged import (
    TRITON_DTYPE,
    find_item,
    fixed_sum,
    in_memory,
    load_block,
    pointer,
    store_block,
    widen,
)

Grads = Sequence[Tensor | None]

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


@triton.jit(do_not_specialize=["items", "key", "mul1", "mul2"])
def phase_kernel(
    table,  # int64 rows: p, q, ∇L, M⁻¹ (or its bits), place in the list, counts, first blocks
    items: tl.int64,
    partials,  # fp64 [blocks], written where it drifts
    numbers,  # fp64 [3] on the device: kick, damp, drift; read where FROM_MEMORY
    kick: tl.float64,
    damp: tl.float64,
    drift: tl.float64,
    key: tl.int64,
    mul1: tl.int64,  # of splitmix64
    mul2: tl.int64,
    BLOCK: tl.constexpr,
    P: tl.constexpr,  # dtypes in memory
    Q: tl.constexpr,
    G: tl.constexpr,  # None: no kick
    W: tl.constexpr,  # None: one M⁻¹ per tensor
    DRIFTS: tl.constexpr,
    FROM_MEMORY: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """p ← damp·p − kick·∇L, then q ← q + drift·M⁻¹p; partials[b] = ½ Σ M⁻¹p², unless it is a kick
    alone. With neither kick nor drift: partials alone."""
    block = tl.program_id(0).to(tl.int64)
    item = find_item(table + 6 * items, items, block)
    start = (block - tl.load(table + 6 * items + item)) * BLOCK
    count = tl.minimum(tl.load(table + 5 * items + item) - start, BLOCK).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    if FROM_MEMORY:
        kick = tl.load(numbers)
        damp = tl.load(numbers + 1)
        drift = tl.load(numbers + 2)
    else:
        kick = tl.full((), kick, tl.float64)
        damp = tl.full((), damp, tl.float64)
        drift = tl.full((), drift, tl.float64)
    p = pointer(tl.load(table + item), P, False) + start
    momentum = load_block(p, lanes, count, False, COMPUTE)
    if G is not None:
        g = pointer(tl.load(table + 2 * items + item), G, False) + start
        gradient = load_block(g, lanes, count, False, COMPUTE)
        momentum = damp.to(COMPUTE) * momentum - kick.to(COMPUTE) * gradient
        stored = momentum.to(P)
        store_block(p, lanes, count, stored, False)
        momentum = widen(stored, COMPUTE)
    if DRIFTS or G is None:
        if W is None:
            w = fp64_row(table, 3, items, item)
            velocity = momentum
            rate = (drift * w).to(COMPUTE)
        else:
            weights = pointer(tl.load(table + 3 * items + item), W, False) + start
            w = load_block(weights, lanes, count, False, COMPUTE)
            velocity = w * momentum
            rate = drift.to(COMPUTE)
        p64 = momentum.to(tl.float64)
        tl.store(partials + block, 0.5 * tl.sum(w.to(tl.float64) * p64 * p64, axis=0))
    if DRIFTS:
        address = tl.load(table + items + item)
        q = pointer(address, Q, False) + start
        moved = load_block(q, lanes, count, False, COMPUTE) + rate * velocity
        if Q.primitive_bitwidth == 16:
            mine = key + fp64_row(table, 4, items, item).to(tl.int64)
            mine = xor_shift(mine, 30) * mul1
            mine = xor_shift(xor_shift(mine, 27) * mul2, 31)
            random = random_bits(start + lanes, mine)
            if Q is tl.bfloat16:
                half = stochastic_bf16(moved.to(tl.float32), random)
            else:
                half = stochastic_f16(moved.to(tl.float32), random)
            store_block(pointer(address, tl.int16, False) + start, lanes, count, half, False)
        else:
            store_block(q, lanes, count, moved.to(Q), False)


def phase_step(
    q: list[Tensor],
    p: list[Tensor],
    grad: Grads,
    inv_mass: Sequence[float | Tensor],
    kicks: bool,
    drifts: bool,
    kick: float | Tensor,
    damp: float | Tensor,
    drift: float | Tensor,
    key: int,
    skipped: Collection[int] = (),
) -> Tensor:
    """As `reference.phase_space.phase_step`, to the bit; kick, damp and drift may be 0-d tensors on
    the device, which are read there. One launch per combination of dtypes."""
    device = q[0].device if q else torch.device("cpu")
    stays = {*skipped, *(i for i, g in enumerate(grad) if kicks and g is None)}
    grads = [0.0 if g is None or not kicks or i in stays else g for i, g in enumerate(grad)]
    # A number in place of a position: it takes no part.
    moved = [0.0 if i in stays else x for i, x in enumerate(q)]
    places = [float(i) for i in range(len(q))]
    groups = elementwise_groups([p, moved, grads, inv_mass, places], BLOCK)
    partials = torch.zeros(sum(g.blocks for g in groups), dtype=torch.float64, device=device)
    on_host, numbers = in_memory((kick, damp, drift), device)
    first = 0
    with on_device(device):
        for group in groups:
            P, Q, G, W = (TRITON_DTYPE[d] for d in group.dtypes[:4])
            out = partials[first : first + group.blocks]
            first += group.blocks
            if G is None and not drifts:
                continue
            phase_kernel[(group.blocks,)](
                device_table(group.rows, device),
                group.items,
                out,
                partials if numbers is None else numbers,
                *on_host,
                signed(key),
                signed(0xBF58476D1CE4E5B9),
                signed(0x94D049BB133111EB),
                BLOCK=BLOCK,
                P=P,
                Q=Q,
                G=G,
                W=W,
                DRIFTS=drifts and Q is not None,
                FROM_MEMORY=numbers is not None,
                COMPUTE=tl.float64 if tl.float64 in (P, Q) else tl.float32,
                **OPTIONS,
            )
        return fixed_sum(partials)


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
    table,  # int64 rows: P, remainder, Q, q, ∇L, M⁻¹ (or its bits), bits of unit_q, unit_p and of
    # the number of elements of the tensors before and of s (0: it is `scale`); counts, first blocks
    items: tl.int64,
    energies,  # fp64 [blocks]
    checksums,  # int64 [blocks]
    outside,  # int32 [blocks]
    kick: tl.float64,
    drift: tl.float64,
    scale: tl.float64,
    sign: tl.int64,  # 0, or −1 where back: (x ^ sign) − sign is ±x
    checksum_key: tl.int64,
    BLOCK: tl.constexpr,
    T: tl.constexpr,  # dtype of q, ∇L and remainder
    R: tl.constexpr,  # None: no remainder
    G: tl.constexpr,  # None: no kick
    W: tl.constexpr,  # None: one M⁻¹ per tensor
    DRIFTS: tl.constexpr,
):
    """P ← P ∓ ⌊kick/s/unit_p·∇L⌉, then Q ← Q ± ⌊(drift·s·unit_p/unit_q·w)·P⌉, q = unit_q·Q + r; and
    energies[b], unless it is a kick alone. With neither kick nor drift: energies alone."""
    block = tl.program_id(0).to(tl.int64)
    item = find_item(table + 11 * items, items, block)
    start = (block - tl.load(table + 11 * items + item)) * BLOCK
    count = tl.minimum(tl.load(table + 10 * items + item) - start, BLOCK).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    mask = lanes < count
    unit_q = fp64_row(table, 6, items, item)
    unit_p = fp64_row(table, 7, items, item)
    own = fp64_row(table, 9, items, item)
    s = tl.where(own == 0.0, tl.full((), scale, tl.float64), own)
    P = pointer(tl.load(table + item), tl.int64, False) + start
    momentum = tl.load(P + lanes, mask=mask, other=0)
    inside = tl.full((BLOCK,), True, tl.int1)
    if G is not None:
        g = pointer(tl.load(table + 4 * items + item), G, False) + start
        step = tl.full((), kick, tl.float64) / s / unit_p
        by = nearest(step * load_block(g, lanes, count, False, tl.float64))
        place = fp64_row(table, 8, items, item).to(tl.int64) + (start + 1) + lanes
        z = by + place * checksum_key
        product = (z & 0xFFFFFFFF) * ((z >> 32) & 0xFFFFFFFF)
        tl.store(checksums + block, tl.sum(tl.where(mask, product, 0), axis=0))
        momentum -= (by ^ sign) - sign
        store_block(P, lanes, count, momentum, False)
        inside = within(by, 1 << 51) & within(momentum, 1 << 62)
    if DRIFTS or G is None:
        p64 = momentum.to(tl.float64)
        if W is None:
            w = fp64_row(table, 5, items, item)
        else:
            weights = pointer(tl.load(table + 5 * items + item), W, False) + start
            w = load_block(weights, lanes, count, False, tl.float64)
        speed = (s * unit_p) * p64
        tl.store(energies + block, 0.5 * tl.sum(w * speed * speed, axis=0))
    if DRIFTS:
        rate = (tl.full((), drift, tl.float64) * s) * (unit_p / unit_q)
        by = nearest((rate * w) * p64)
        Q = pointer(tl.load(table + 2 * items + item), tl.int64, False) + start
        position = tl.load(Q + lanes, mask=mask, other=0) + ((by ^ sign) - sign)
        store_block(Q, lanes, count, position, False)
        inside = inside & within(by, 1 << 51) & within(position, 1 << 62)
        moved = unit_q * position.to(tl.float64)
        if R is not None:
            r = pointer(tl.load(table + items + item), R, False) + start
            moved += load_block(r, lanes, count, False, tl.float64)
        address = tl.load(table + 3 * items + item)
        if T is tl.bfloat16:
            half = nearest_bf16(moved.to(tl.float32))
            store_block(pointer(address, tl.int16, False) + start, lanes, count, half, False)
        else:
            if T is tl.float16:
                moved = moved.to(tl.float32)
            store_block(pointer(address, T, False) + start, lanes, count, moved.to(T), False)
    tl.store(outside + block, tl.sum(tl.where(inside | (lanes >= count), 0, 1), axis=0))


def grid_step(
    q: list[Tensor],
    remainder: Sequence[Tensor | None],
    Q: list[Tensor],
    P: list[Tensor],
    grad: Grads,
    inv_mass: Sequence[float | Tensor],
    unit_q: Sequence[float],
    unit_p: Sequence[float],
    scale: Sequence[float],
    kicks: bool,
    drifts: bool,
    back: bool,
    kick: float,
    drift: float,
    skipped: Collection[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.phase_space.grid_step`, to the bit (but for the order of the energy's sum)."""
    device = q[0].device if q else torch.device("cpu")
    rest = [0.0 if r is None else r for r in remainder]
    stays = {*skipped, *(i for i, g in enumerate(grad) if kicks and g is None)}
    grads = [0.0 if g is None or not kicks or i in stays else g for i, g in enumerate(grad)]
    moved = [0.0 if i in stays else x for i, x in enumerate(q)]
    # Where all have the same s the table need not change with it.
    same = len(set(scale)) <= 1
    own = [0.0] * len(q) if same else scale
    before = [float(n) for n in prefix([x.numel() for x in q])[:-1]]
    operands: list[Sequence[Tensor | float]] = [P, rest, Q, moved, grads, inv_mass]
    operands += [unit_q, unit_p, before, own]
    groups = elementwise_groups(operands, BLOCK)
    blocks = sum(g.blocks for g in groups)
    energies = torch.zeros(blocks, dtype=torch.float64, device=device)
    checksums = torch.zeros(blocks, dtype=torch.int64, device=device)
    outside = torch.zeros(blocks, dtype=torch.int32, device=device)
    first = 0
    with on_device(device):
        for group in groups:
            T, R, G, W = (TRITON_DTYPE[group.dtypes[i]] for i in (3, 1, 4, 5))
            mine = slice(first, first + group.blocks)
            first += group.blocks
            if G is None and not drifts:
                continue
            grid_kernel[(group.blocks,)](
                device_table(group.rows, device),
                group.items,
                energies[mine],
                checksums[mine],
                outside[mine],
                kick,
                drift,
                scale[0],
                -1 if back else 0,
                signed(0x9E3779B97F4A7C15),
                BLOCK=BLOCK,
                T=T,
                R=R,
                G=G,
                W=W,
                DRIFTS=drifts and T is not None,
                **GRID_OPTIONS,
            )
        return checksums.sum(), ~outside.any(), fixed_sum(energies)


def samples() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Kernel, signature, constants and options of typical launches, to compile ahead of time."""
    f64, f32, b16, f16 = (
        TRITON_DTYPE[d] for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    )
    phase = {"table": "*i64", "items": "i64", "partials": "*fp64", "numbers": "*fp64"}
    phase |= {"kick": "fp64", "damp": "fp64", "drift": "fp64"}
    phase |= {"key": "i64", "mul1": "i64", "mul2": "i64"}
    grid = {"table": "*i64", "items": "i64", "energies": "*fp64", "checksums": "*i64"}
    grid |= {"outside": "*i32", "kick": "fp64", "drift": "fp64", "scale": "fp64"}
    grid |= {"sign": "i64", "checksum_key": "i64"}
    mixed = [
        (f32, b16, b16, None, True, False),
        (f32, f16, f16, f32, True, True),
        (f64, f32, f32, f64, True, False),
        (f32, f32, f32, None, True, True),
    ]
    return [
        (
            phase_kernel,
            phase,
            {"BLOCK": BLOCK, "P": p, "Q": q, "G": g, "W": w, "DRIFTS": drifts}
            | {"FROM_MEMORY": memory, "COMPUTE": f64 if f64 in (p, q) else f32},
            OPTIONS,
        )
        for p, q, g, w, drifts, memory in mixed
    ] + [
        (
            grid_kernel,
            grid,
            {"BLOCK": BLOCK, "T": t, "R": r, "G": g, "W": w, "DRIFTS": drifts},
            GRID_OPTIONS,
        )
        for t, r, g, w, drifts in [
            (f32, None, f32, None, True),
            (f32, f32, f32, f64, True),
            (f32, None, f32, None, False),
            (f64, f64, None, None, True),
            (b16, None, b16, None, True),
        ]
    ]
