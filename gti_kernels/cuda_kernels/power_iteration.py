"""Top singular triples in CUDA C++: one launch for all matrices of a dtype and all steps.

The classes stand at the head of `csrc/cuda/power_iteration.cu`: a matrix belongs to one block, to a
cluster or to many blocks of a cooperative launch, and its rows are in shared memory if they fit.
The plan of a list of shapes says which; it is made once and kept. Clusters leave some
multiprocessors of a device out: beside them the largest teams have fewer blocks, so their sums
are rounded otherwise than in a list without clusters.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..conventions import compute_dtype
from ..power_iteration_lists import Scalars, Weights, for_each_dtype
from ..reference.phase_space import signed
from ..tables import device_table
from .compiler import Specialisation
from .ragged import ELEMENT
from .runtime import PORTABLE_CLUSTER, Kernel, kernel, launch

STEM = ENTRY = "power_iteration"
BLOCK, CLUSTER, GRID = 0, 1, 2  # kinds of teams
THREADS = 256  # of a block, in every class
ON_CHIP, STAGED, WIDE = 0, 1, 2  # where W is read from

SLOT_BYTES = 128  # of a block of a grid, for its sums

#: Of k > 1: the most triples; bytes of a Gram matrix of 3·8 vectors and 16 more sums, and of the
#: small matrices in front of everything else in shared memory.
MOST_TRIPLES = 8
SUMS_BYTES = (24 * 25 // 2 + 16) * 8
DENSE_BYTES = 25600


def specialisation(dtype: torch.dtype, k: int = 1) -> Specialisation:
    """The kernel for weights of a dtype, for k = 1 or for any k > 1."""
    defines = (("ELEMENT", ELEMENT[dtype]), ("SUBSPACE", int(k > 1)), ("THREADS", THREADS))
    return Specialisation(ENTRY, defines)


SPECIALISATIONS = tuple(specialisation(dtype, k) for dtype in ELEMENT for k in (1, 2))


class Limits(NamedTuple):
    """What a device offers."""

    shared_bytes: int  #: of a block at most
    blocks: int  #: that run at once with so much: one a multiprocessor
    clusters: tuple[tuple[int, int], ...] = ()  #: blocks of a cluster, clusters that run at once

    def with_clusters(self, size: int) -> Limits:
        """What is left in a launch with clusters of so many blocks: they do not tile the device."""
        at_once = dict(self.clusters)[size]
        return Limits(self.shared_bytes, size * at_once, ((size, at_once),))


class Problem(NamedTuple):
    """A matrix [m, n] and what is wanted of it."""

    m: int
    n: int
    dtype: torch.dtype
    k: int = 1
    side: int = 3  #: vectors of the search space


class Place(NamedTuple):
    """Where a matrix is worked on: the last four numbers of its row, and what it needs."""

    size: int
    mode: int
    rows: int
    stages: int
    shared_bytes: int
    x_bytes: int  # in device memory, of the team (GRID)
    region_bytes: int  # in device memory, of a block (GRID)


class Section(NamedTuple):
    """Matrices of one kind and size of team: a row of the kernel's first table."""

    kind: int
    size: int  #: blocks of a team
    teams: int  #: that work side by side
    first: int  #: block of the first team
    begin: int  #: of its matrices among all
    items: int
    memory: int  #: bytes before its own (GRID)
    counters: int  #: before its own (GRID)
    x_bytes: int
    region_bytes: int


class Launch(NamedTuple):
    """All matrices of a dtype."""

    sections: tuple[Section, ...]  #: the largest teams first
    matrices: tuple[int, ...]  #: which of the list, in each section the largest first
    places: tuple[Place, ...]
    grid: int
    cluster: int | None
    cooperative: bool
    shared_bytes: int
    memory_bytes: int
    counters: int


def power_iteration(
    weights: list[Tensor],
    k: int,
    method: str,
    max_steps: int,
    tol: float,
    start: list[Tensor] | None,
    seed: int,
    mode: int | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """As `for_each_dtype`. k ≤ 8: the Gram matrix of 3k vectors is in shared memory. mode: where
    every W is read from (ON_CHIP, STAGED, WIDE) in place of what the plan finds best: ValueError
    where a matrix does not fit. Works inside a CUDA-graph capture after one call with the same
    tensors.
    """
    if k > MOST_TRIPLES:
        raise ValueError(f"k = {k}: the CUDA kernel finds at most {MOST_TRIPLES} triples a matrix")
    settings = (k, method == "power", max_steps, tol, signed(seed))
    return for_each_dtype(weights, k, start, lambda group, out: _launch(group, out, settings, mode))


def _launch(
    group: Weights,
    out: Scalars,
    settings: tuple[int, bool, int, float, int],  # k, power, max_steps, tol, seed
    mode: int | None,
) -> None:
    """The launch for weights of one dtype."""
    dtype, device = group.tensors[0].dtype, group.u.device
    k, power, max_steps, tol, seed = settings
    shapes = tuple(tuple(w.shape) for w in group.tensors)
    if not any(batch for batch, *_ in shapes):
        return
    needed = specialisation(dtype, k)
    compiled = kernel(STEM, needed.entry, needed.defines, device)
    one = plan(shapes, dtype, limits(compiled), k, (2 if power else 3) * k, mode)
    key = tuple((w.data_ptr(), i) for w, i in zip(group.tensors, group.numbers, strict=True))
    table = device_table((*one.sections, *_items(key, shapes, dtype, one)), device)
    items = len(one.sections) * len(Section._fields)  # where their rows begin
    memory = counters = None
    if one.cooperative:
        memory = torch.empty(one.memory_bytes, dtype=torch.uint8, device=device)
        counters = torch.zeros(one.counters, dtype=torch.int32, device=device)
    launch(
        compiled,
        one.grid,
        THREADS,
        [
            *(table, len(one.sections), table[items:]),
            *(k, int(power), max_steps, tol, seed, group.start),
            *(memory, counters, group.u, group.v, *out),
        ],
        shared_bytes=one.shared_bytes,
        cluster=one.cluster,
        cooperative=one.cooperative,
    )


def _items(
    key: tuple[tuple[int, int], ...],  # address and number of the first matrix, per tensor
    shapes: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    one: Launch,
) -> list[tuple[int, ...]]:
    """The rows of the matrices, in the order of the launch."""
    matrices = []
    place_m = place_n = 0
    for (address, number), (batch, m, n) in zip(key, shapes, strict=True):
        for b in range(batch):
            here = address + b * m * n * dtype.itemsize
            matrices.append((here, m, n, number + b, place_m, place_n))
            place_m, place_n = place_m + m, place_n + n
    return [(*matrices[i], *place[:4]) for i, place in zip(one.matrices, one.places, strict=True)]


@lru_cache(maxsize=64)
def plan(
    shapes: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    limits: Limits,
    k: int = 1,
    side: int = 3,
    mode: int | None = None,
) -> Launch:
    """The launch for tensors of shapes [B, m, n], which hold at least one matrix.

    side: vectors of the search space, 3k or (method "power") 2k.
    """
    shapes = tuple(shape for shape in shapes if shape[0])

    def choose_all(limits: Limits) -> list[tuple[int, int, Place]]:
        return [_choose(Problem(m, n, dtype, k, side), limits, mode) for _, m, n in shapes]

    chosen = choose_all(limits)
    cluster = max((size for kind, size, _ in chosen if kind == CLUSTER), default=None)
    if cluster:  # a launch has clusters of one size
        limits = limits.with_clusters(cluster)
        chosen = choose_all(limits)
    found: dict[tuple[int, int], list[tuple[int, int, Place]]] = {}
    index = 0
    for (batch, m, n), (kind, size, place) in zip(shapes, chosen, strict=True):
        members = found.setdefault((kind, size), [])
        members += [(-m * n, index + b, place) for b in range(batch)]
        index += batch

    # Where no team needs the whole grid to run at once, a block has one matrix at the most, and the
    # device balances them. Else the items are dealt to the blocks that run at once: a section
    # begins behind the last block that the section before it gave an item.
    cooperative = any(kind == GRID for kind, _ in found)
    grid = _whole(sum(size * len(members) for (_, size), members in found.items()), cluster or 1)
    if cooperative:
        grid = min(grid, limits.blocks)
    sections: list[Section] = []
    matrices: list[int] = []
    places: list[Place] = []
    first = memory = counters = 0
    for (kind, size), members in sorted(found.items(), reverse=True):
        members.sort(key=lambda x: x[:2])
        items, teams = len(members), min(len(members), grid // size)
        x_bytes = max(place.x_bytes for *_, place in members)
        region_bytes = max(place.region_bytes for *_, place in members)
        if kind == CLUSTER:
            first = _whole(first, size) % grid
        sections.append(
            Section(
                *(kind, size, teams, first, len(matrices), items),
                *(memory, counters, x_bytes, region_bytes),
            )
        )
        matrices += [i for _, i, _ in members]
        places += [place for *_, place in members]
        first = (first + ((items - 1) % teams + 1) * size) % grid
        if kind == GRID:
            memory += teams * (x_bytes + size * region_bytes)
            counters += teams + items
    return Launch(
        tuple(sections),
        tuple(matrices),
        tuple(places),
        grid,
        cluster,
        cooperative,
        max(place.shared_bytes for place in places),
        memory,
        counters,
    )


def _choose(one: Problem, limits: Limits, mode: int | None) -> tuple[int, int, Place]:
    """Kind and size of the team of a matrix, and its place there.

    The smallest team in whose shared memory W fits: a block, a cluster (k = 1), a quarter of the
    device (four matrices at a time), the device. Else W streams through all of the device: staged
    where a few rows fit (k = 1). For k > 1 a block has all vectors in shared memory too.
    """
    whole = (GRID, limits.blocks, _team_for(one.m, limits.blocks))
    teams = [(BLOCK, 1, 1)]
    if one.k == 1:
        teams += [(CLUSTER, size, size) for size, _ in limits.clusters]
    quarter = limits.blocks // 4
    if quarter > 1:
        teams.append((GRID, quarter, _team_for(one.m, quarter)))
    places = [(ON_CHIP, *t) for t in (*teams, whole)] + [(STAGED, *whole), (WIDE, *whole)]
    for kind, team, size, used in places:
        if mode is None or kind == mode:
            place = _place(one, kind, team, used, limits)
            if place is not None:
                return team, size, place
    raise ValueError(
        f"power_iteration: a matrix [{one.m}, {one.n}] of {one.dtype} with k = {one.k} cannot be "
        f"worked on in mode {mode} here; mode=None finds a place for every matrix"
    )


def _place(one: Problem, mode: int, team: int, size: int, limits: Limits) -> Place | None:
    """The place of a matrix in a mode and a team of so many blocks, or None where it does not fit.

    The kernel's `lay_out` counts the same bytes.
    """
    s = _sizes(one, size)
    element, c = one.dtype.itemsize, compute_dtype(one.dtype).itemsize
    shared, x_bytes, region = 1024 + 16 * THREADS, 0, 0  # Control
    if one.k > 1:
        vectors = one.side * (2 * s.padded + one.m) * c
        shares = one.k * s.groups * s.padded * c
        shared += DENSE_BYTES
        if team == BLOCK:
            shared = _whole(shared + vectors + shares, 16)
        else:
            x_bytes, region = _whole(SUMS_BYTES + vectors, 16), SLOT_BYTES + SUMS_BYTES + shares
    else:
        vectors = _whole((5 * s.width + 3 * s.rows) * c, 16)
        share, shares = s.padded * c, s.groups * s.padded * c
        if team == GRID:
            x_bytes = size * s.width * c
            region = SLOT_BYTES + (shares + vectors if mode == WIDE else share)
        else:
            shared += s.width * c
        if mode != WIDE:
            shared += vectors + share + shares

    rows = stages = 0
    if mode == ON_CHIP:
        shared += s.rows * s.padded * element
    elif mode == STAGED:
        if one.k > 1:
            return None
        for rows, stages in _rings(s, element, limits.shared_bytes - shared):
            shared += rows * stages * s.groups * s.padded * element
            break
        else:
            return None
    if shared > limits.shared_bytes:
        return None
    return Place(size, mode, rows, stages, shared, x_bytes, region)


def _rings(s: _Sizes, element: int, room: int) -> Iterator[tuple[int, int]]:
    """Rows of a panel and panels of a ring that fit, the best first."""
    for least in (3, 2):
        for rows in (8, 4, 2, 1):
            stages = min(4, room // (rows * s.groups * s.padded * element))
            if stages >= least:
                yield rows, stages


def _team_for(m: int, blocks: int) -> int:
    """Blocks that share m rows: with fewer than 8 rows each, their shares of z outweigh W."""
    return max(1, min(blocks, m // 8))


class _Sizes(NamedTuple):
    """Of a matrix and a team, as the kernel lays out its memory."""

    padded: int  # n in whole chunks of 16 bytes
    groups: int  # of threads, each with rows of its own
    width: int  # columns of a block's slice: whole 32-byte sectors
    rows: int  # of a block at most


def _sizes(one: Problem, size: int) -> _Sizes:
    chunk = 16 // one.dtype.itemsize
    chunks = -(-one.n // chunk)
    positions = min(THREADS, 1 << (chunks - 1).bit_length())
    width = _whole(-(-chunks * chunk // size), 8)
    return _Sizes(chunks * chunk, THREADS // positions, width, -(-one.m // size))


def _whole(x: int, unit: int) -> int:
    """x, up to a multiple of unit."""
    return -(-x // unit) * unit


@lru_cache
def limits(compiled: Kernel) -> Limits:
    """What a kernel's device offers to it."""
    properties: Any = torch.cuda.get_device_properties(compiled.device)
    shared = properties.shared_memory_per_block_optin
    clusters = []
    if properties.major >= 9:
        most = compiled.largest_cluster(THREADS, shared)
        for size in (PORTABLE_CLUSTER, 2 * PORTABLE_CLUSTER):
            at_once = compiled.clusters_at_once(size, THREADS, shared) if size <= most else 0
            if at_once:
                clusters.append((size, at_once))
    return Limits(shared, properties.multi_processor_count, tuple(clusters))
