"""The symplectic 2-form in Triton: Ω = G − Gᵀ with G = DQ DPᵀ of `inner_products`.

G holds every product of Ω exactly once, and G − Gᵀ is skew to the bit.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..tables import on_device
from .inner_products import FINISH_COLUMNS, error_bound, inner_products, two_sum


@triton.jit(do_not_specialize=["m", "padded"])
def finish_kernel(
    sums,  # fp64 [B, 1 + METRIC, padded, padded, 1 + EXACT]
    norms,  # fp64 [B, 2, padded]
    omega,  # fp64 [B, m, m], written
    bound,  # fp64 [B, m, m], written
    metric,  # fp64 [B, m, m], written if METRIC
    m: tl.int64,
    padded: tl.int64,
    factor: tl.float64,
    underflow: tl.float64,
    EXACT: tl.constexpr,
    METRIC: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One row i of a problem and COLUMNS columns j: Ω_ij = G_ij − G_ji, its bound, S_ij."""
    problem = tl.program_id(0).to(tl.int64) // m
    i = tl.program_id(0).to(tl.int64) % m
    j = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = j < m
    parts: tl.constexpr = 2 if EXACT else 1
    forms: tl.constexpr = 2 if METRIC else 1
    sums += problem * forms * padded * padded * parts
    norms += problem * 2 * padded
    g_ij = sums + (i * padded + j) * parts
    g_ji = sums + (j * padded + i) * parts
    a = tl.load(g_ij, mask=inside, other=0.0)
    b = tl.load(g_ji, mask=inside, other=0.0)
    if EXACT:
        a_low = tl.load(g_ij + 1, mask=inside, other=0.0)
        b_low = tl.load(g_ji + 1, mask=inside, other=0.0)
        high, low = two_sum(a, a_low, -b, -b_low)
        w = high + low
    else:
        w = a - b
    # Not less for squares that underflowed.
    q_i = tl.sqrt(tl.load(norms + i) + underflow)
    p_i = tl.sqrt(tl.load(norms + padded + i) + underflow)
    q_j = tl.sqrt(tl.load(norms + j, mask=inside, other=0.0) + underflow)
    p_j = tl.sqrt(tl.load(norms + padded + j, mask=inside, other=0.0) + underflow)
    limit = error_bound(w, q_i * p_j + p_i * q_j, factor, underflow)
    out = (problem * m + i) * m + j
    tl.store(omega + out, w, mask=inside)  # its diagonal, x − x, is 0 or NaN
    tl.store(bound + out, tl.where(i == j, w, limit), mask=inside)
    if METRIC:
        upper = padded * padded + tl.minimum(i, j) * padded + tl.maximum(i, j)
        s = tl.load(sums + upper * parts, mask=inside, other=0.0)
        if EXACT:
            s += tl.load(sums + upper * parts + 1, mask=inside, other=0.0)
        tl.store(metric + out, s, mask=inside)


def two_form(
    dq: list[Tensor], dp: list[Tensor], metric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ω_ij = Σ_a dq_ia dp_ja − dp_ia dq_ja, its bound, and S_ij = Σ_a dq_ia dq_ja + dp_ia dp_ja.

    dq, dp: lists of contiguous [m, N_t] or [B, m, N_t], any float dtype. Returns Ω, bound and S or
    None, [m, m] or [B, m, m], all fp64. The bound is that of `inner_products` for G, whose
    additions count the one that forms Ω.
    """
    *batch, m, _ = dq[0].shape
    products = inner_products(dq, dp, metric=metric)
    omega = products.sums.new_empty(*batch, m, m)
    bound = omega.new_empty(omega.shape)
    gram = omega.new_empty(omega.shape) if metric else None
    with on_device(omega.device):
        finish_kernel[(omega.numel() // m, triton.cdiv(m, FINISH_COLUMNS))](
            products.sums,
            products.norms,
            omega,
            bound,
            gram,
            m,
            products.sums.shape[2],
            products.factor,
            products.underflow,
            EXACT=products.exact,
            METRIC=metric,
            COLUMNS=FINISH_COLUMNS,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return omega, bound, gram


def samples() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Kernel, signature, constants and options of typical launches, to compile ahead of time."""
    finish = dict.fromkeys(("sums", "norms", "omega", "bound", "metric"), "*fp64")
    finish |= {"m": "i64", "padded": "i64", "factor": "fp64", "underflow": "fp64"}
    constants = {"EXACT": True, "METRIC": True, "COLUMNS": FINISH_COLUMNS}
    return [(finish_kernel, finish, constants, {"num_warps": 1, "enable_fp_fusion": False})]
