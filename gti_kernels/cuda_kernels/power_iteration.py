"""Top singular triples in CUDA C++ (k = 1): one launch for all steps of the matrices of a class.

The classes stand at the head of `csrc/cuda/power_iteration.cu`: a matrix belongs to one block, to a
cluster or to many blocks of a cooperative launch, and its rows are in shared memory if they fit.
The plan of a list of shapes says which; it is made once and kept.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..conventions import compute_dtype
from ..tables import device_table, on_device, prefix
from .compiler import Specialisation
from .ragged import ELEMENT
from .runtime import kernel, launch

STEM = ENTRY = "power_iteration"
BLOCK, CLUSTER, GRID = 0, 1, 2  # what a team is
THREADS = 256  # of a block, in every class
ON_CHIP, STAGED, WIDE = 0, 1, 2  # where W is read from

#: Numbers of a row of the kernel's table: address, m, n, number of the matrix in the call, places
#: in u and in v; blocks, mode, rows of a panel, panels in the ring.
COLUMNS = 10
SLOT_BYTES = 128  # of a block of a grid, for its sums


def specialisation(dtype: torch.dtype, team: int) -> Specialisation:
    """The kernel for weights of a dtype and one kind of team."""
    defines = (("ELEMENT", ELEMENT[dtype]), ("TEAM", team), ("THREADS", THREADS))
    return Specialisation(ENTRY, defines, 90 if team == CLUSTER else 80)


SPECIALISATIONS = tuple(
    specialisation(dtype, team) for dtype in ELEMENT for team in (BLOCK, CLUSTER, GRID)
)


class Limits(NamedTuple):
    """What a device offers."""

    shared_bytes: int  #: of a block at most
    blocks: int  #: that run at once with so much: one a multiprocessor
    cluster: int  #: most blocks of a cluster; 0 where there are none


class Place(NamedTuple):
    """Where a matrix is worked on: the last four numbers of its row, and what it needs."""

    size: int
    mode: int
    rows: int
    stages: int
    shared_bytes: int
    region_bytes: int  # of a block in device memory (GRID)


class Launch(NamedTuple):
    """Matrices of one kind of team."""

    team: int
    size: int  #: blocks of a team
    grid: int
    shared_bytes: int
    team_bytes: int
    x_bytes: int
    region_bytes: int
    matrices: tuple[int, ...]  #: which of the list, largest first
    places: tuple[Place, ...]


def power_iteration(
    weights: list[Tensor],
    k: int,
    method: str,
    max_steps: int,
    tol: float,
    start: list[Tensor] | None,
    seed: int,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """σ [M, k], u, v (lists of [B, m, k], [B, n, k]), residual [M, k], steps, converged, upper [M].

    weights: tensors [B, m, n], each with its own B, m, n and dtype, M matrices in all; start:
    tensors [B, n, k] or None (random). σ, residual and upper are fp64. Here k = 1. Works inside a
    CUDA-graph capture after one call with the same tensors.
    """
    if k != 1:
        raise ValueError(f"k = {k}: the CUDA kernel finds the top triple only (k = 1)")
    device = weights[0].device
    numbers = prefix([w.shape[0] for w in weights])  # of the first matrix of each tensor
    scalars = torch.empty(3, numbers[-1], dtype=torch.float64, device=device)
    steps = torch.empty(numbers[-1], dtype=torch.int64, device=device)
    converged = torch.empty(numbers[-1], dtype=torch.bool, device=device)
    u: list[Tensor] = [weights[0]] * len(weights)
    v = list(u)
    groups: dict[torch.dtype, list[int]] = {}
    for t, w in enumerate(weights):
        groups.setdefault(w.dtype, []).append(t)
    with on_device(device):
        for members in groups.values():
            us, vs = _one_dtype(
                [weights[t] for t in members],
                [numbers[t] for t in members],
                [start[t] for t in members] if start is not None else None,
                (int(method == "power"), max_steps, tol, seed % (1 << 64)),
                (*scalars, steps, converged),
            )
            for t, u_t, v_t in zip(members, us, vs, strict=True):
                u[t], v[t] = u_t, v_t
    sigma, residual, upper = scalars
    return sigma[:, None], u, v, residual[:, None], steps, converged, upper


def _one_dtype(
    weights: list[Tensor],  # [B, m, n]
    numbers: list[int],  # of the first matrix of each in the whole call
    start: list[Tensor] | None,
    settings: tuple[int, int, float, int],  # power, max_steps, tol, seed
    out: tuple[Tensor, ...],  # σ, residual, upper, steps, converged of the whole call, written
) -> tuple[list[Tensor], list[Tensor]]:
    """All launches for weights of one dtype; returns u and v."""
    weights = [w.contiguous() for w in weights]
    dtype, device = weights[0].dtype, weights[0].device
    c = compute_dtype(dtype)
    lengths_m = [w.shape[0] * w.shape[1] for w in weights]
    lengths_n = [w.shape[0] * w.shape[2] for w in weights]
    u = torch.empty(sum(lengths_m), dtype=c, device=device)
    v = torch.empty(sum(lengths_n), dtype=c, device=device)
    v0 = None
    if start is not None:
        v0 = torch.cat([x.reshape(-1).to(c) for x in start])

    shapes = tuple(tuple(w.shape) for w in weights)
    launches = plan(shapes, dtype, limits(device))
    key = tuple((w.data_ptr(), number) for w, number in zip(weights, numbers, strict=True))
    table = device_table(_table(key, shapes, dtype, launches), device) if launches else None
    done = 0
    for one in launches:
        count = len(one.matrices)
        teams = one.grid // one.size
        memory = counters = None
        if one.team == GRID:
            memory = torch.empty(teams * one.team_bytes, dtype=torch.uint8, device=device)
            counters = torch.zeros(count + teams, dtype=torch.int32, device=device)
        needed = specialisation(dtype, one.team)
        compiled = kernel(STEM, needed.entry, needed.defines, device)
        power, max_steps, tol, seed = settings
        seed -= (seed >> 63) << 64  # its bits as an int64
        launch(
            compiled,
            one.grid,
            THREADS,
            [
                table[COLUMNS * done : COLUMNS * (done + count)],  # type: ignore[index]
                *(count, one.size, power, max_steps, tol, seed, v0),
                *(memory, one.team_bytes, one.x_bytes, one.region_bytes, counters),
                *(u, v, *out),
            ],
            shared_bytes=one.shared_bytes,
            cluster=one.size if one.team == CLUSTER else None,
            cooperative=one.team == GRID,
        )
        done += count
    us = [x.view(w.shape[0], w.shape[1], 1) for x, w in zip(u.split(lengths_m), weights)]
    vs = [x.view(w.shape[0], w.shape[2], 1) for x, w in zip(v.split(lengths_n), weights)]
    return us, vs


def _table(
    key: tuple[tuple[int, int], ...],  # address and number of the first matrix, per tensor
    shapes: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    launches: tuple[Launch, ...],
) -> tuple[tuple[int, ...], ...]:
    """The rows of all launches, one after the other."""
    matrices = []
    place_m = place_n = 0
    for (address, number), (batch, m, n) in zip(key, shapes, strict=True):
        for b in range(batch):
            here = address + b * m * n * dtype.itemsize
            matrices.append((here, m, n, number + b, place_m, place_n))
            place_m, place_n = place_m + m, place_n + n
    return tuple(
        (*matrices[i], *place[:4])
        for one in launches
        for i, place in zip(one.matrices, one.places, strict=True)
    )


@lru_cache(maxsize=64)
def plan(
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, limits: Limits
) -> tuple[Launch, ...]:
    """The launches for tensors of shapes [B, m, n]: one for each kind and size of team."""
    found: dict[tuple[int, int], list[tuple[int, int, Place]]] = {}
    index = 0
    for batch, m, n in shapes:
        if batch:
            team, size, place = _choose(m, n, dtype, limits)
            members = found.setdefault((team, size), [])
            members += [(-m * n, index + b, place) for b in range(batch)]
            index += batch
    launches = []
    for (team, size), members in sorted(found.items(), reverse=True):
        _, matrices, places = zip(*sorted(members, key=lambda x: x[:2]), strict=True)
        most = max(len(members), 1) if team != GRID else min(len(members), limits.blocks // size)
        lengths = [n for batch, _, n in shapes for _ in range(batch)]
        x_bytes = (
            max(p.size * _width(lengths[i], dtype, p.size) for i, p in zip(matrices, places))
            * compute_dtype(dtype).itemsize
        )
        region_bytes = max(p.region_bytes for p in places)
        launches.append(
            Launch(
                team,
                size,
                most * size,
                max(p.shared_bytes for p in places),
                x_bytes + size * region_bytes,
                x_bytes,
                region_bytes,
                matrices,
                places,
            )
        )
    return tuple(launches)


def _choose(m: int, n: int, dtype: torch.dtype, limits: Limits) -> tuple[int, int, Place]:
    """Kind and size of the team of a matrix [m, n], and its place there.

    The smallest team in whose shared memory W fits: a block, a cluster, a quarter of the device
    (four matrices at a time), the device. Else W streams through all of the device.
    """
    whole = _team_for(m, limits.blocks)
    teams = [(BLOCK, 1, 1)]
    teams += [(CLUSTER, size, size) for size in (8, 16) if size <= limits.cluster]
    quarter = limits.blocks // 4
    if quarter > 1:
        teams.append((GRID, quarter, _team_for(m, quarter)))
    teams.append((GRID, limits.blocks, whole))
    for team, size, used in teams:
        place = _on_chip(m, n, dtype, team, used, limits)
        if place is not None:
            return team, size, place
    place = _staged(m, n, dtype, whole, limits) or _wide(m, n, dtype, whole)
    return GRID, limits.blocks, place


def _team_for(m: int, blocks: int) -> int:
    """Blocks that share m rows: with fewer than 8 rows each, their shares of z outweigh W."""
    return max(1, min(blocks, m // 8))


class _Sizes(NamedTuple):
    """Of a matrix and a team, as the kernel lays out its memory."""

    padded: int  # n in whole chunks of 16 bytes
    groups: int  # of threads, each with rows of its own
    vectors: int  # bytes of the slices of vectors of a block
    rows: int  # of a block at most


def _sizes(m: int, n: int, dtype: torch.dtype, size: int) -> _Sizes:
    chunk = 16 // dtype.itemsize
    chunks = -(-n // chunk)
    positions = min(THREADS, 1 << (chunks - 1).bit_length())
    rows = -(-m // size)
    vectors = (5 * _width(n, dtype, size) + 3 * rows) * compute_dtype(dtype).itemsize
    return _Sizes(chunks * chunk, THREADS // positions, -(-vectors // 16) * 16, rows)


def _width(n: int, dtype: torch.dtype, size: int) -> int:
    """Columns of a block's slice: whole 32-byte sectors."""
    chunk = 16 // dtype.itemsize
    return -(-(-(-n // chunk) * chunk) // size // 8) * 8


def _control_bytes() -> int:
    return 1024 + 16 * THREADS


def _before_w(m: int, n: int, dtype: torch.dtype, team: int, size: int) -> int:
    """Bytes of shared memory in front of W."""
    s = _sizes(m, n, dtype, size)
    slice_ = 0 if team == GRID else _width(n, dtype, size)
    elements = slice_ + (1 + s.groups) * s.padded
    return _control_bytes() + s.vectors + elements * compute_dtype(dtype).itemsize


def _shown(n: int, dtype: torch.dtype) -> int:
    """Bytes of a block's region in device memory: its sums and its share of z."""
    chunk = 16 // dtype.itemsize
    return SLOT_BYTES + -(-n // chunk) * chunk * compute_dtype(dtype).itemsize


def _on_chip(
    m: int, n: int, dtype: torch.dtype, team: int, size: int, limits: Limits
) -> Place | None:
    s = _sizes(m, n, dtype, size)
    needed = _before_w(m, n, dtype, team, size) + s.rows * s.padded * dtype.itemsize
    if needed > limits.shared_bytes:
        return None
    return Place(size, ON_CHIP, 0, 0, needed, _shown(n, dtype) if team == GRID else 0)


def _staged(m: int, n: int, dtype: torch.dtype, size: int, limits: Limits) -> Place | None:
    s = _sizes(m, n, dtype, size)
    before = _before_w(m, n, dtype, GRID, size)
    for least in (3, 2):
        for rows in (8, 4, 2, 1):
            panel = rows * s.groups * s.padded * dtype.itemsize
            stages = min(4, (limits.shared_bytes - before) // panel)
            if stages >= least:
                needed = before + stages * panel
                return Place(size, STAGED, rows, stages, needed, _shown(n, dtype))
    return None


def _wide(m: int, n: int, dtype: torch.dtype, size: int) -> Place:
    s = _sizes(m, n, dtype, size)
    region = SLOT_BYTES + s.groups * s.padded * compute_dtype(dtype).itemsize + s.vectors
    return Place(size, WIDE, 0, 0, _control_bytes(), region)


@lru_cache
def limits(device: torch.device) -> Limits:
    """What a CUDA device offers to this kernel."""
    properties: Any = torch.cuda.get_device_properties(device)
    shared = properties.shared_memory_per_block_optin
    cluster = 0
    if properties.major >= 9:
        needed = specialisation(torch.float32, CLUSTER)
        compiled = kernel(STEM, needed.entry, needed.defines, device)
        cluster = compiled.largest_cluster(THREADS, shared)
    return Limits(shared, properties.multi_processor_count, cluster)
