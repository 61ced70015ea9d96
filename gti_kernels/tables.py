"""Tables in device memory: what a launch over a ragged list knows of its tensors."""

from __future__ import annotations

import contextlib
import struct
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


def prefix(counts: Sequence[int]) -> list[int]:
    """0, c₀, c₀ + c₁, …: one number more than counts."""
    out = [0]
    for c in counts:
        out.append(out[-1] + c)
    return out


def fp64_bits(x: float) -> int:
    """The bits of an fp64 number as an int64, so that it fits into a table."""
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


class Group(NamedTuple):
    """The tensors of a list that share their dtypes: one launch."""

    dtypes: tuple[torch.dtype | None, ...]  # one per operand; None where it is a number
    wide: bool  # every address is a multiple of 16 bytes
    items: int
    blocks: int
    rows: tuple[tuple[int, ...], ...]  # one per operand, then counts, then first blocks


def elementwise_groups(operands: Sequence[Sequence[Tensor | float]], block: int) -> list[Group]:
    """Lists of L tensors of the same sizes (or of L numbers), grouped by their dtypes and cut into
    blocks of `block` elements.

    Empty tensors are left out. The row of a list of numbers holds their fp64 bits.
    """
    counts = [x.numel() for x in operands[0]]  # type: ignore[union-attr]
    dtypes: list[Sequence[torch.dtype | None]] = []
    columns: list[Sequence[int]] = []
    for xs in operands:
        if xs and isinstance(xs[0], Tensor):
            dtypes.append([x.dtype for x in xs])  # type: ignore[union-attr]
            columns.append([x.data_ptr() for x in xs])  # type: ignore[union-attr]
        else:
            dtypes.append([None] * len(xs))
            columns.append(array("q", array("d", xs).tobytes()))  # type: ignore[type-var]
    found: dict[tuple[torch.dtype | None, ...], list[int]] = {}
    for i, (count, kinds) in enumerate(zip(counts, zip(*dtypes, strict=True), strict=True)):
        if count:
            found.setdefault(kinds, []).append(i)
    groups = []
    for kinds, items in found.items():
        rows = [tuple([column[i] for i in items]) for column in (*columns, counts)]
        starts = tuple(prefix([-(-n // block) for n in rows[-1]]))
        wide = not any(a % 16 for kind, row in zip(kinds, rows, strict=False) if kind for a in row)
        groups.append(Group(kinds, wide, len(items), starts[-1], (*rows, starts)))
    return groups


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device: make it the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Upload:
    """Rows of numbers (lists, or an int64 tensor on the host), concatenated, as int64 in the memory
    of a device; nobody waits for it."""

    def __init__(self, rows: Sequence[Sequence[int]] | Tensor, device: torch.device) -> None:
        self.device = device
        if not isinstance(rows, Tensor):
            rows = torch.tensor([x for row in rows for x in row], dtype=torch.int64, device="cpu")
        self._numbers = rows.reshape(-1)
        self._kept = False
        if device.type != "cuda":
            return
        if capturing(device):
            raise RuntimeError(
                "new tensors inside a CUDA graph capture, where their addresses cannot be "
                "uploaded: make the same call with the same tensors once before the capture"
            )
        self._stream = torch.cuda.current_stream(device)
        self._numbers = self._numbers.pin_memory().to(device, non_blocking=True)
        self._written = self._stream.record_event()

    def table(self) -> Tensor:
        """The numbers, for a launch on the current stream."""
        if self.device.type != "cuda":
            return self._numbers
        stream = torch.cuda.current_stream(self.device)
        if capturing(self.device):
            if not self._kept:
                _kept_for_graphs.append(self._numbers)  # a replay reads it at any later time
                self._kept = True
        elif stream != self._stream:
            stream.wait_event(self._written)
            self._numbers.record_stream(stream)
        return self._numbers


# A table is a function of its numbers, so it is kept under them: a parameter list that stays where
# it is costs one upload in all.
_uploads: OrderedDict[tuple[Any, ...], Upload] = OrderedDict()
_kept_for_graphs: list[Tensor] = []
TABLES_KEPT = 64


def upload(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Upload:
    """The upload of these rows: a new one, or one of the last that were asked for."""
    key = (device, rows)
    found = _uploads.get(key)
    if found is None:
        found = _uploads[key] = Upload(rows, device)
        while len(_uploads) > TABLES_KEPT:
            _uploads.popitem(last=False)
    else:
        _uploads.move_to_end(key)
    return found


def device_table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """rows, concatenated, as int64 [Σ lengths] on `device`, without waiting for it."""
    return upload(rows, device).table()
