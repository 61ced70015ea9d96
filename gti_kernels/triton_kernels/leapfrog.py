"""Kick and drift in Triton: any list in one pass over memory, the energy from the same pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tables import device_table, elementwise_groups, on_device
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

InvMass = Sequence[float] | list[Tensor]
Factor = float | Tensor

# 16 elements a thread: four 16-byte loads of each fp32 operand are in flight.
BLOCK = 2048
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["items"])
def leapfrog_kernel(
    table,  # int64 rows: addresses of p, q, ∇L, M⁻¹ (or the bits of M⁻¹), counts, first blocks
    items: tl.int64,
    partials,  # fp64 [blocks], written where both steps are taken
    numbers,  # fp64 [3] on the device: kick, drift, damp; read where FROM_MEMORY
    kick: tl.float64,  # declared fp64: undeclared, a Python float arrives as fp32
    drift: tl.float64,
    damp: tl.float64,
    BLOCK: tl.constexpr,
    P: tl.constexpr,  # dtypes in memory
    Q: tl.constexpr,  # None: no drift
    G: tl.constexpr,  # None: no kick
    W: tl.constexpr,  # None: one M⁻¹ per tensor
    ALIGNED: tl.constexpr,
    FROM_MEMORY: tl.constexpr,
    COMPUTE: tl.constexpr,  # fp64 if any operand is, else fp32
):
    """Kick: p ← damp·p − kick·∇L. Drift: q ← q + drift·M⁻¹p. Both: partials[b] = ½ Σ M⁻¹p²."""
    block = tl.program_id(0).to(tl.int64)
    item = find_item(table + 5 * items, items, block)
    start = (block - tl.load(table + 5 * items + item)) * BLOCK
    count = tl.minimum(tl.load(table + 4 * items + item) - start, BLOCK).to(tl.int32)
    p = pointer(tl.load(table + item), P, ALIGNED) + start
    q = tl.load(table + items + item)
    g = tl.load(table + 2 * items + item)
    w = tl.load(table + 3 * items + item)
    if Q is not None:
        q = pointer(q, Q, ALIGNED) + start
    if G is not None:
        g = pointer(g, G, ALIGNED) + start
    if W is None:
        w = w.to(tl.float64, bitcast=True)
    else:
        w = pointer(w, W, ALIGNED) + start
    out = partials + block
    if FROM_MEMORY:
        kick = tl.load(numbers)
        drift = tl.load(numbers + 1)
        damp = tl.load(numbers + 2)
    else:
        kick = tl.full((), kick, tl.float64)
        drift = tl.full((), drift, tl.float64)
        damp = tl.full((), damp, tl.float64)
    if count == BLOCK:
        _step(p, q, g, w, out, count, kick, drift, damp, BLOCK, P, Q, G, W, COMPUTE, True)
    else:
        _step(p, q, g, w, out, count, kick, drift, damp, BLOCK, P, Q, G, W, COMPUTE, False)


@triton.jit
def _step(
    p,
    q,
    g,
    w,
    out,
    count,
    kick,
    drift,
    damp,
    BLOCK: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    COMPUTE: tl.constexpr,
    FULL: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    momentum = load_block(p, lanes, count, FULL, COMPUTE)
    if G is not None:
        gradient = load_block(g, lanes, count, FULL, COMPUTE)
        momentum = damp.to(COMPUTE) * momentum - kick.to(COMPUTE) * gradient
        stored = momentum.to(P)
        store_block(p, lanes, count, stored, FULL)
        # The drift and the energy belong to the p in memory, rounded.
        momentum = widen(stored, COMPUTE)
    if Q is not None:
        position = load_block(q, lanes, count, FULL, COMPUTE)
        if W is None:
            scale = (drift * w).to(COMPUTE)
        else:
            w = load_block(w, lanes, count, FULL, COMPUTE)
            scale = drift.to(COMPUTE) * w
        store_block(q, lanes, count, (position + scale * momentum).to(Q), FULL)
        if G is not None:
            p64 = momentum.to(tl.float64)
            tl.store(out, 0.5 * tl.sum(w.to(tl.float64) * p64 * p64, axis=0))


def kick_(p: list[Tensor], grad: list[Tensor], step: Factor, damp: Factor) -> None:
    """p ← damp·p − step·grad, in place, for every tensor of the list."""
    unread = [1.0] * len(p)
    _launch(p, unread, grad, unread, step, 0.0, damp)


def drift_(q: list[Tensor], p: list[Tensor], step: Factor, inv_mass: InvMass) -> None:
    """q ← q + step·M⁻¹p, in place, for every tensor of the list."""
    _launch(p, q, [1.0] * len(p), inv_mass, 0.0, step, 1.0)


def kick_drift_(
    q: list[Tensor],
    p: list[Tensor],
    grad: list[Tensor],
    kick: Factor,
    drift: Factor,
    inv_mass: InvMass,
    damp: Factor,
) -> Tensor:
    """p ← damp·p − kick·grad, then q ← q + drift·M⁻¹p with that p; returns its ½ pᵀM⁻¹p (fp64)."""
    partials = _launch(p, q, grad, inv_mass, kick, drift, damp)
    with on_device(partials.device):
        return fixed_sum(partials)


def _launch(
    p: list[Tensor],
    q: Sequence[Tensor | float],  # numbers where q, or grad, takes no part
    grad: Sequence[Tensor | float],
    inv_mass: Sequence[Tensor | float],
    kick: Factor,
    drift: Factor,
    damp: Factor,
) -> Tensor:
    """One launch per combination of dtypes; returns the partial energies [blocks]."""
    device = p[0].device if p else torch.device("cpu")
    groups = elementwise_groups([p, q, grad, inv_mass], BLOCK)
    partials = torch.empty(sum(g.blocks for g in groups), dtype=torch.float64, device=device)
    # The factors, as numbers or in memory; what is unread may be anything.
    on_host, numbers = in_memory((kick, drift, damp), device)
    first = 0
    with on_device(device):
        for group in groups:
            p_dtype, q_dtype, g_dtype, w_dtype = (TRITON_DTYPE[d] for d in group.dtypes)
            leapfrog_kernel[(group.blocks,)](
                device_table(group.rows, device),
                group.items,
                partials[first : first + group.blocks],
                partials if numbers is None else numbers,
                *on_host,
                BLOCK=BLOCK,
                P=p_dtype,
                Q=q_dtype,
                G=g_dtype,
                W=w_dtype,
                ALIGNED=group.wide,
                FROM_MEMORY=numbers is not None,
                COMPUTE=tl.float64 if torch.float64 in group.dtypes else tl.float32,
                **OPTIONS,
            )
            first += group.blocks
    return partials


def samples() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Kernel, signature, constants and options of typical launches, to compile ahead of time."""
    signature = {"table": "*i64", "items": "i64", "partials": "*fp64", "numbers": "*fp64"}
    signature |= {"kick": "fp64", "drift": "fp64", "damp": "fp64"}
    f64, f32, b16, f16 = tl.float64, tl.float32, tl.bfloat16, tl.float16
    kinds = [
        (f32, f32, f32, None, True),
        (f32, f32, f32, f32, False),
        (f32, None, f32, None, True),
        (b16, b16, None, None, True),
        (f16, f16, f16, None, True),
        (f64, f64, f64, f64, True),
    ]
    return [
        (
            leapfrog_kernel,
            signature,
            {"BLOCK": BLOCK, "P": p, "Q": q, "G": g, "W": w, "ALIGNED": wide}
            | {"FROM_MEMORY": not wide, "COMPUTE": f64 if p == f64 else f32},
            OPTIONS,
        )
        for p, q, g, w, wide in kinds
    ]
