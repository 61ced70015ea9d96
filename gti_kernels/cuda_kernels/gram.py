"""Weighted inner products in CUDA C++: G = A diag(w) Bᵀ of `inner_products`, sums in fp64 on its
tensor cores, or for fp64 elements compensated.
"""

from __future__ import annotations

from torch import Tensor

from ..tables import on_device
from .inner_products import finish_specialisation, inner_products, specialisations
from .ragged import run

STEM = "gram"
SPECIALISATIONS = specialisations(STEM)


def gram(
    a: list[Tensor], b: list[Tensor] | None, weight: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """G_ij = Σ_c w_c a_ic b_jc and its error bound, which `inner_products` derives.

    a, b: lists of contiguous [m, N_t] and [l, N_t], or [B, m, N_t] and [B, l, N_t]; b None: a, and
    G is symmetric to the bit. weight: of [N_t], None for ones. Any float dtype; where a weight has
    another than its a, the narrower is copied to the wider, and where one is fp64 all are. Returns
    G and bound, [m, l] or [B, m, l], fp64.
    """
    *batch, m, _ = a[0].shape
    l = m if b is None else b[0].shape[-2]
    products = inner_products(STEM, a, b, weight)
    value = products.sums.new_empty(*batch, m, l)
    bound = value.new_empty(value.shape)
    sizes = [m, l, products.sums.shape[-1], products.factor, products.underflow]
    args = [products.sums, products.norms, *sizes, value, bound]
    with on_device(value.device):
        finish = finish_specialisation(STEM, products.exact, b is None)
        run(STEM, finish, value.numel() // l, args, value.device)
    return value, bound
