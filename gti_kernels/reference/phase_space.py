"""The steps of a plan in plain torch: on floating-point numbers, and on a grid of integers."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..tables import prefix

Grads = Sequence[Tensor | None]

MASK = 2**64 - 1
CHECKSUM_KEY = 0x9E3779B97F4A7C15
STEP_KEY = 0xD1342543DE82EF95  # what a drift adds to the key of stochastic rounding
INCREMENT_LIMIT, COORDINATE_LIMIT = 2.0**51, 2**62


def phase_step(
    q: list[Tensor],
    p: list[Tensor],
    grad: Grads,
    inv_mass: Sequence[float | Tensor],
    kicks: bool,
    drifts: bool,
    kick: float,
    damp: float,
    drift: float,
    key: int,
    skipped: Collection[int] = (),
) -> Tensor:
    """p ← damp·p − kick·∇L, then q ← q + drift·M⁻¹p, each if the step has it.

    A tensor whose gradient is None in a kick, or whose place is in `skipped`, keeps p and q.
    Arithmetic is fp64 if q or
    p is, else fp32. A q of 16 bits is rounded up or down at random, by `key`; other numbers are
    rounded to nearest. Returns ½ pᵀM⁻¹p of the new p, skipped ones included, where it drifts, else
    0 (fp64).
    """
    energy = torch.zeros((), dtype=torch.float64, device=q[0].device if q else None)
    for i, (q_t, p_t, g_t, w_t) in enumerate(zip(q, p, grad, inv_mass, strict=True)):
        compute = torch.promote_types(torch.promote_types(q_t.dtype, p_t.dtype), torch.float32)
        stays = i in skipped or (kicks and g_t is None)
        if kicks and not stays:
            assert g_t is not None
            p_t.copy_(damp * p_t.to(compute) - kick * g_t.to(compute))
        if drifts and not stays:
            wide = p_t.to(compute)
            if isinstance(w_t, Tensor):
                moved = q_t.to(compute) + drift * (w_t.to(compute) * wide)
            else:
                moved = q_t.to(compute) + (drift * w_t) * wide
            if q_t.element_size() == 2:
                moved = stochastically_rounded(moved.float(), q_t.dtype, mixed(key + i))
            q_t.copy_(moved)
        if drifts:
            energy += 0.5 * (w_t * p_t.double().square()).sum()
    return energy


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
    """P ← P ∓ ⌊kick/s/unit_p·∇L⌉, then Q ← Q ± ⌊(drift·s·unit_p/unit_q·w)·P⌉ and q = unit_q·Q +
    remainder; the lower signs where `back`.

    Q, P: int64. inv_mass: floats, or fp64 tensors. scale: s of each tensor. A tensor whose
    gradient is None in a kick, or whose place is in `skipped`, keeps P and Q. ⌊·⌉ is the
    nearest integer, ties to even; each product is rounded to fp64. An increment outside its limit
    counts as zero, so that the opposite step undoes this one all the same. Returns the checksum of
    the kick's increments (int64), whether all stayed inside their limits (bool), and
    ½ Σ w (s·unit_p·P)² of the new P, skipped ones included, where it drifts (fp64), as 0-d
    tensors.
    """
    device = q[0].device if q else None
    checksum = torch.zeros((), dtype=torch.int64, device=device)
    inside = torch.ones((), dtype=torch.bool, device=device)
    energy = torch.zeros((), dtype=torch.float64, device=device)
    sign = -1 if back else 1
    first = prefix([x.numel() for x in q])
    for i, g in enumerate(grad):
        P_t, Q_t, w, s = P[i], Q[i], inv_mass[i], scale[i]
        stays = i in skipped or (kicks and g is None)
        if kicks and not stays:
            assert g is not None
            x = (kick / s / unit_p[i]) * g.double()
            small = x.abs() < INCREMENT_LIMIT
            by = torch.where(small, x, 0.0).round().to(torch.int64)
            P_t.sub_(sign * by)
            checksum += _checksum(by, first[i])
            inside &= small.all() & _in_limits(P_t)
        if drifts and not stays:
            rate = (drift * s) * (unit_p[i] / unit_q[i]) * w
            x = rate * P_t.double()
            small = x.abs() < INCREMENT_LIMIT
            Q_t.add_(sign * torch.where(small, x, 0.0).round().to(torch.int64))
            inside &= small.all() & _in_limits(Q_t)
            r = remainder[i]
            q[i].copy_(by_way_of_fp32(off_grid(Q_t, unit_q[i], r), q[i].dtype))
        if drifts:
            energy += 0.5 * (w * (s * unit_p[i] * P_t.double()).square()).sum()
    return checksum, inside, energy


def off_grid(integers: Tensor, unit: float, remainder: Tensor | None) -> Tensor:
    """unit·integers + remainder in fp64; a remainder of −0 at 0 keeps its sign."""
    x = unit * integers.double()
    if remainder is None:
        return x
    return torch.where(integers == 0, remainder.double(), x + remainder.double())


def _in_limits(x: Tensor) -> Tensor:
    return ((x >= -COORDINATE_LIMIT) & (x < COORDINATE_LIMIT)).all()


def by_way_of_fp32(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (fp64) in dtype; 16 bits are rounded from fp32, as the kernels do it."""
    return x.to(dtype) if dtype == torch.float64 else x.float().to(dtype)


def _checksum(by: Tensor, first: int) -> Tensor:
    """Σ lo·hi modulo 2⁶⁴ over the halves of by + (1 + place)·CHECKSUM_KEY."""
    # The place of an element is the one in memory, the same on every backend.
    flat = in_memory_order(by)
    place = torch.arange(first + 1, first + 1 + flat.numel(), device=by.device)
    z = flat + place * signed(CHECKSUM_KEY)
    return ((z & 0xFFFFFFFF) * ((z >> 32) & 0xFFFFFFFF)).sum()


def in_memory_order(x: Tensor) -> Tensor:
    """The elements of a dense tensor as a vector, by address."""
    order = sorted(range(x.ndim), key=lambda d: x.stride(d), reverse=True)
    return x.permute(order).reshape(-1)


def signed(x: int) -> int:
    """An integer modulo 2⁶⁴ as an int64."""
    x &= MASK
    return x - 2**64 if x >= 2**63 else x


def mixed(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014)."""
    x &= MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


# ---- stochastic rounding -------------------------------------------------------------------------

LOW = 0xFFFFFFFF


def random_bits(place: Tensor, key: int) -> Tensor:
    """32 random bits for each place (int64); a function of key and place alone."""
    x = (_times(place & LOW, 0x9E3779B9) + (key & LOW) + _times(place >> 32, 0x85EBCA6B)) & LOW
    x = _times(x ^ (x >> 16), 0x21F0AAAD) ^ (key >> 32)
    x = _times(x ^ (x >> 15), 0xD35A2D97)
    return x ^ (x >> 15)


def _times(x: Tensor, y: int) -> Tensor:
    """x·y modulo 2³² for 0 ≤ x < 2³²: in two halves, as int64 would overflow."""
    return (((x >> 16) * y & LOW) * 65536 + (x & 0xFFFF) * y) & LOW


def stochastically_rounded(x: Tensor, dtype: torch.dtype, key: int, first: int = 0) -> Tensor:
    """x (fp32) in dtype (bf16 or fp16): up or down, with the probabilities that keep the mean.

    first: place of the first element.
    """
    order = sorted(range(x.ndim), key=lambda d: x.stride(d), reverse=True)
    flat = x.permute(order)
    place = torch.arange(first, first + x.numel(), device=x.device)
    random = random_bits(place, key).reshape(flat.shape)
    bits = flat.contiguous().view(torch.int32).to(torch.int64) & LOW
    rounded = _to_bf16(bits, random) if dtype == torch.bfloat16 else _to_f16(bits, random)
    out = rounded.to(torch.int16).view(dtype)  # the low 16 bits
    return out.permute([order.index(d) for d in range(x.ndim)])


def _to_bf16(b: Tensor, random: Tensor) -> Tensor:
    a = b & 0x7FFFFFFF
    special = (b >> 16) | torch.where(a > 0x7F800000, 0x40, 0)
    return torch.where(a >= 0x7F800000, special, (b + (random >> 16)) >> 16)


def _to_f16(b: Tensor, random: Tensor) -> Tensor:
    a, r = b & 0x7FFFFFFF, random >> 19
    normal = (a - 0x38000000 + r) >> 13
    small = torch.where(a < 0x38800000, a, 0).to(torch.int32).view(torch.float32)
    # Below 2⁻¹⁴ halves are multiples of 2⁻²⁴.
    multiple = (small * 2.0**24 + r.to(torch.float32) * 2.0**-13).to(torch.int64)
    h = torch.where(a < 0x38800000, multiple, normal)
    h = torch.where((a >= 0x47800000) | (h > 0x7C00), 0x7C00, h)
    h = torch.where(a > 0x7F800000, 0x7E00, h)
    return h | ((b >> 16) & 0x8000)
