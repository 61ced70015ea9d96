"""Top singular triples in Triton: three ragged launches per pass over every W of a list.

Each matrix has a basis of row vectors X [J, n]: v, s, d for "cg" (J = 3k), v, d for "power" (2k),
with their images Y = X Wᵀ, Z = Y W. d are the k directions of the pass. One step:

  pass    a program per panel of rows: the last rotation of Y, y = W d, the panel's shares of
          z = Wᵀy (reading the panel again, from cache) and of the Gram matrix Y Yᵀ
  solve   a program per matrix: Rayleigh–Ritz in the span of X gives the rotation T [J, J]
  update  a program per block of columns: z = Σ shares; X ← T X, Z ← T Z; the residual, the next d;
          the block's share of the Gram matrix X Xᵀ

X is only about orthonormal: its Gram matrix is measured, and solve orthonormalises in coordinates.
So a direction that is all but dependent on the others is left out (see `least_share`): in fp64 with
k > 1 the last digits may take a step more than in the reference, which works on the vectors. A
residual is orthogonal to v and s as long as it is more than rounding. One that is not half so is
left out too: taking v and s out of it in coordinates would multiply the rounding of their images,
which follow by linearity, from step to step.
Shares are added in a fixed order. A matrix that has converged is recognised by its residual and its
programs return at once: the host launches `max_steps` passes and never waits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..power_iteration_lists import Scalars, Weights, for_each_dtype
from ..reference.phase_space import signed
from ..tables import device_table, prefix
from .power_iteration_pass import LONG_OPTIONS, OPTIONS, TILE_ROWS, largest_kernel, pass_kernel
from .power_iteration_step import (
    begin_kernel,
    finish_kernel,
    least_share,
    long_block,
    solve_kernel,
    solve_options,
    update_columns,
    update_kernel,
)
from .ragged import TRITON_DTYPE


def power_iteration(
    weights: list[Tensor],
    k: int,
    method: str,
    max_steps: int,
    tol: float,
    start: list[Tensor] | None,
    seed: int,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """As `for_each_dtype`. k ≤ 8: 3k vectors must fit into a tile of 32, the largest that stays in
    registers."""
    settings = (k, method == "cg", max_steps, tol, signed(seed))
    return for_each_dtype(weights, k, start, lambda group, out: _launch(group, out, settings))


def _launch(group: Weights, out: Scalars, settings: tuple[int, bool, int, float, int]) -> None:
    """All launches for weights of one dtype. settings: k, cg, max_steps, tol, seed."""
    k, cg, max_steps, tol, seed = settings
    weights, u, v, steps = group.tensors, group.u, group.v, out.steps
    items, device, c = sum(w.shape[0] for w in weights), u.device, u.dtype
    if not items:
        return

    def new(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    j = 3 * k if cg else 2 * k
    shape: dict[str, Any] = {"K": k, "J": j}
    columns = update_columns(j)
    key = tuple((w.data_ptr(), *w.shape, i) for w, i in zip(weights, group.numbers, strict=True))
    rows = _table(key, weights[0].element_size(), columns)
    table = device_table(rows, device)
    panels, blocks = rows[-2][-1], rows[-1][-1]
    length = rows[7][-1] + rows[8][-1] * rows[2][-1]
    largest, shares, column_shares = new(panels, dtype=c), new(length * k, dtype=c), new(length)
    scale, theta, rotation = new(items), new(items, k), new(items, j, j)
    panel_norms, column_norms = new(2, panels), new(blocks)
    image_shares, residual_shares = new(panels, j, j), new(blocks, k)
    basis_shares = torch.zeros(blocks, j, j, dtype=torch.float64, device=device)
    basis = torch.zeros(v.numel() // k * j, dtype=c, device=device)
    images = torch.zeros(u.numel() // k * j, dtype=c, device=device)
    products = torch.zeros(v.numel() // k * (j - k), dtype=c, device=device)
    starts = basis if group.start is None else group.start

    C = TRITON_DTYPE[c]
    dtypes: dict[str, Any] = {"DTYPE": TRITON_DTYPE[weights[0].dtype], "C": C}
    eps, limit = torch.finfo(c).eps, 0.25 / torch.finfo(c).tiny
    block = {"BLOCK": long_block(k, max(*rows[1], *rows[2]))}
    largest_kernel[(panels,)](table, items, largest, **dtypes, **OPTIONS)
    begin_kernel[(items,)](
        table, items, largest, scale, starts, basis, basis_shares, steps, seed,
        RANDOM=group.start is None, LIMIT=limit, C=C, **shape, **block, **LONG_OPTIONS
    )  # fmt: skip
    for step in range(1, max_steps + 1):
        first = {"FIRST": step == 1}
        pass_kernel[(panels,)](
            table, items, scale, steps, theta, residual_shares, rotation, basis, images,
            image_shares, shares, column_shares, panel_norms, step, tol,
            **dtypes, **shape, **first, **OPTIONS
        )  # fmt: skip
        solve_kernel[(items,)](
            table, items, steps, image_shares, basis_shares, rotation, theta, step,
            CG=cg, LEAST=least_share(c), **shape, **solve_options(k)
        )  # fmt: skip
        update_kernel[(blocks,)](
            table, items, steps, theta, rotation, shares, basis, products, basis_shares,
            residual_shares, column_shares, column_norms, step,
            CG=cg, C=C, EPS=eps, COLUMNS=columns, **shape, **first, **OPTIONS
        )  # fmt: skip
    finish_kernel[(items,)](
        table, items, panels, scale, theta, residual_shares, rotation, panel_norms,
        column_norms, basis, images, u, v, out.sigma, out.residual,
        out.converged.view(torch.int8), out.upper, tol,
        C=C, EPS=eps, **shape, **block, **LONG_OPTIONS
    )  # fmt: skip


@lru_cache(maxsize=64)
def _table(
    key: tuple[tuple[int, ...], ...], element_size: int, columns: int
) -> tuple[tuple[int, ...], ...]:
    """The rows of the table; key: address, B, m, n and number of the first matrix, per tensor."""
    rows: list[list[int]] = [[] for _ in range(9)]
    place_m = place_n = place_shares = 0
    for address, batch, m, n, number in key:
        even = address % 16 == 0 and n * element_size % 16 == 0 and n % 8 == 0
        kind = (
            0 if n <= 64 else 1 if m <= 4 else 3 if even and m * n * element_size % 16 == 0 else 2
        )
        panels = triton.cdiv(m, TILE_ROWS.value[kind])
        for b in range(batch):
            matrix = (address + b * m * n * element_size, m, n, kind, number + b)
            row = (*matrix, place_m, place_n, place_shares, panels)
            for column, x in zip(rows, row, strict=True):
                column.append(x)
            place_m, place_n, place_shares = place_m + m, place_n + n, place_shares + panels * n
    blocks = [triton.cdiv(n, columns) for n in rows[2]]
    return tuple(map(tuple, (*rows, prefix(rows[8]), prefix(blocks))))
