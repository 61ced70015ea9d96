"""Kinetic energy in Triton: one read of p, fp64 partial sums, a second kernel that adds them up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tables import device_table, elementwise_groups, on_device
from .ragged import TRITON_DTYPE, find_item, fixed_sum, load_block, pointer

BLOCK = 4096
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["items"])
def energy_kernel(
    table,  # int64: addresses of p and of M⁻¹ (or the bits of M⁻¹), counts, first blocks
    items: tl.int64,
    partials,  # fp64 [blocks], written
    BLOCK: tl.constexpr,
    P: tl.constexpr,
    W: tl.constexpr,  # dtype of M⁻¹, or None: one number per tensor
    ALIGNED: tl.constexpr,
):
    """partials[b] = ½ Σ M⁻¹ p² over block b."""
    block = tl.program_id(0).to(tl.int64)
    item = find_item(table + 3 * items, items, block)
    start = (block - tl.load(table + 3 * items + item)) * BLOCK
    count = tl.minimum(tl.load(table + 2 * items + item) - start, BLOCK).to(tl.int32)
    p = pointer(tl.load(table + item), P, ALIGNED) + start
    w = tl.load(table + items + item)
    if W is None:
        w = w.to(tl.float64, bitcast=True)
    else:
        w = pointer(w, W, ALIGNED) + start
    if count == BLOCK:
        total = _energy(p, w, count, BLOCK, W, True)
    else:
        total = _energy(p, w, count, BLOCK, W, False)
    tl.store(partials + block, total)


@triton.jit
def _energy(p, w, count, BLOCK: tl.constexpr, W: tl.constexpr, FULL: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    p64 = load_block(p, lanes, count, FULL, tl.float64)
    if W is not None:
        w = load_block(w, lanes, count, FULL, tl.float64)
    return 0.5 * tl.sum(w * p64 * p64, axis=0)


def kinetic_energy(p: list[Tensor], inv_mass: Sequence[float] | list[Tensor]) -> Tensor:
    """K = ½ Σ_t Σ_i (M⁻¹)_{t,i} p_{t,i}², a 0-d fp64 tensor.

    p: L tensors of any shape and float dtype; inv_mass: L floats, or L tensors shaped like p.
    """
    device = p[0].device if p else torch.device("cpu")
    groups = elementwise_groups([p, inv_mass], BLOCK)
    partials = torch.empty(sum(g.blocks for g in groups), dtype=torch.float64, device=device)
    first = 0
    with on_device(device):
        for g in groups:
            energy_kernel[(g.blocks,)](
                device_table(g.rows, device),
                g.items,
                partials[first : first + g.blocks],
                BLOCK=BLOCK,
                P=TRITON_DTYPE[g.dtypes[0]],
                W=TRITON_DTYPE[g.dtypes[1]],
                ALIGNED=g.wide,
                **OPTIONS,
            )
            first += g.blocks
        return fixed_sum(partials)


def samples() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Kernel, signature, constants and options of typical launches, to compile ahead of time."""
    signature = {"table": "*i64", "items": "i64", "partials": "*fp64"}
    dtypes = [(tl.float32, None), (tl.bfloat16, tl.float32), (tl.float64, tl.float64)]
    return [
        (
            energy_kernel,
            signature,
            {"BLOCK": BLOCK, "P": p, "W": w, "ALIGNED": True},
            {"num_warps": 4},
        )
        for p, w in dtypes
    ]
