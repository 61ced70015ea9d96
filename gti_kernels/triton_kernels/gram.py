"""Weighted inner products in Triton: G = A diag(w) Bᵀ of `inner_products`."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..tables import on_device
from .inner_products import FINISH_COLUMNS, error_bound, inner_products


@triton.jit(do_not_specialize=["m", "l", "rows", "columns"])
def gram_kernel(
    sums,  # fp64 [B, 1, rows, columns, 1 + EXACT]
    norms,  # fp64 [B, rows + columns]; SYMMETRIC: [B, columns]
    gram,  # fp64 [B, m, l], written
    bound,  # fp64 [B, m, l], written
    m: tl.int64,
    l: tl.int64,
    rows: tl.int64,
    columns: tl.int64,
    factor: tl.float64,
    underflow: tl.float64,
    EXACT: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One row i of a problem and COLUMNS columns j: G_ij and its bound."""
    problem = tl.program_id(0).to(tl.int64) // m
    i = tl.program_id(0).to(tl.int64) % m
    j = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = j < l
    above = columns - columns if SYMMETRIC else rows  # of a norm of B: norms of A before it
    parts: tl.constexpr = 2 if EXACT else 1
    row = tl.minimum(i, j) if SYMMETRIC else i
    column = tl.maximum(i, j) if SYMMETRIC else j
    entry = sums + ((problem * rows + row) * columns + column) * parts
    g = tl.load(entry, mask=inside, other=0.0)
    if EXACT:
        g += tl.load(entry + 1, mask=inside, other=0.0)
    norms += problem * (above + columns)
    # Not less for squares that underflowed.
    a_i = tl.sqrt(tl.load(norms + i) + underflow)
    b_j = tl.sqrt(tl.load(norms + above + j, mask=inside, other=0.0) + underflow)
    out = (problem * m + i) * l + j
    tl.store(gram + out, g, mask=inside)
    tl.store(bound + out, error_bound(g, a_i * b_j, factor, underflow), mask=inside)


def gram(
    a: list[Tensor], b: list[Tensor] | None, weight: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """G_ij = Σ_c w_c a_ic b_jc and its error bound, which `inner_products` derives.

    a, b: lists of contiguous [m, N_t] and [l, N_t], or [B, m, N_t] and [B, l, N_t]; b None: a, and
    G is symmetric to the bit. weight: of [N_t], None for ones. Any float dtype. Returns G and
    bound, [m, l] or [B, m, l], fp64.
    """
    *batch, m, _ = a[0].shape
    l = m if b is None else b[0].shape[-2]
    products = inner_products(a, b, weight)
    value = products.sums.new_empty(*batch, m, l)
    bound = value.new_empty(value.shape)
    with on_device(value.device):
        gram_kernel[(value.numel() // l, triton.cdiv(l, FINISH_COLUMNS))](
            products.sums,
            products.norms,
            value,
            bound,
            m,
            l,
            *products.sums.shape[2:4],
            products.factor,
            products.underflow,
            EXACT=products.exact,
            SYMMETRIC=b is None,
            COLUMNS=FINISH_COLUMNS,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return value, bound


def samples() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Kernel, signature, constants and options of typical launches, to compile ahead of time."""
    signature = dict.fromkeys(("sums", "norms", "gram", "bound"), "*fp64")
    signature |= dict.fromkeys(("m", "l", "rows", "columns"), "i64")
    signature |= {"factor": "fp64", "underflow": "fp64"}
    options = {"num_warps": 1, "enable_fp_fusion": False}
    constants = {"COLUMNS": FINISH_COLUMNS}
    return [
        (gram_kernel, signature, constants | {"EXACT": e, "SYMMETRIC": e}, options)
        for e in (False, True)
    ]
