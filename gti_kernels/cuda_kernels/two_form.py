"""The symplectic 2-form in CUDA C++: Ω = G − Gᵀ with G = DQ DPᵀ of `inner_products`, sums in fp64
on its tensor cores, or for fp64 elements compensated.
"""

from __future__ import annotations

from torch import Tensor

from ..tables import on_device
from .inner_products import finish_specialisation, inner_products, specialisations
from .ragged import run

STEM = "two_form"
SPECIALISATIONS = specialisations(STEM)


def two_form(
    dq: list[Tensor], dp: list[Tensor], metric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ω_ij = Σ_a dq_ia dp_ja − dp_ia dq_ja, its bound, and S_ij = Σ_a dq_ia dq_ja + dp_ia dp_ja.

    dq, dp: lists of contiguous [m, N_t] or [B, m, N_t], any float dtype; where one is fp64 the
    others are copied to it. Returns Ω, bound and S or None, [m, m] or [B, m, m], all fp64. The
    bound is that of `inner_products`, with Σ|x| ≤ ‖dq_i‖‖dp_j‖ + ‖dp_i‖‖dq_j‖.
    """
    *batch, m, _ = dq[0].shape
    products = inner_products(STEM, dq, dp, metric=metric)
    omega = products.sums.new_empty(*batch, m, m)
    bound = omega.new_empty(omega.shape)
    gram = omega.new_empty(omega.shape) if metric else None
    sizes = [m, 1 + metric, products.sums.shape[-1], products.factor, products.underflow]
    args = [products.sums, products.norms, *sizes, omega, bound, gram]
    with on_device(omega.device):
        finish = finish_specialisation(STEM, products.exact)
        run(STEM, finish, omega.numel() // m, args, omega.device)
    return omega, bound, gram
