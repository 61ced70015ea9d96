"""Conventions every part of the library shares, as code.

Phase space is z = (q, p): positions (parameters) first, momenta second. The energy is
H(q, p) = ½ pᵀM⁻¹p + L(q) with a diagonal mass M.

Axis letters, the same in Python, headers and kernels:

====== ==========================================================================
letter meaning
====== ==========================================================================
B      matrices of one shape stored in one tensor (batch)
L      matrices or parameters in a list
m, n   rows (out) and columns (in) of a weight matrix; m tangent vectors in two_form
k      singular triples asked for
N      coordinates of a tangent vector, or elements of a parameter list
====== ==========================================================================
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def symplectic_matrix(
    n: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> Tensor:
    """J = [[0, I], [−I, 0]], shape [2n, 2n], so that ω(z₁, z₂) = z₁ᵀ J z₂ = q₁·p₂ − p₁·q₂."""
    eye = torch.eye(n, dtype=dtype, device=device)
    zero = torch.zeros_like(eye)
    return torch.cat([torch.cat([zero, eye], 1), torch.cat([-eye, zero], 1)], 0)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic on elements of `dtype`: fp32 for bf16, fp16 and fp32, fp64 for
    fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fan_in_inverse_mass(q: Tensor) -> float:
    """The mass preconditioning "fan_in": clip(1/√fan_in, 1/8, 8) for a weight [out, ...], fan_in =
    numel/out; 1 for vectors and tensors without elements."""
    if q.ndim < 2 or q.numel() == 0:
        return 1.0
    return min(8.0, max(0.125, 1.0 / math.sqrt(q[0].numel())))
