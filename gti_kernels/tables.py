"""Tables in device memory: what a launch over a ragged list knows of its tensors."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def prefix(counts: Sequence[int]) -> list[int]:
    """0, c₀, c₀ + c₁, …: one number more than counts."""
    out = [0]
    for c in counts:
        out.append(out[-1] + c)
    return out


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# A table is a function of its numbers, so it is kept under them: a parameter list that stays where
# it is costs one upload in all. Values: table, stream it was written on, event after the write.
_tables: OrderedDict[tuple[Any, ...], tuple[Tensor, Any, Any]] = OrderedDict()
_kept_for_graphs: dict[tuple[Any, ...], Tensor] = {}
TABLES_KEPT = 64


def device_table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """rows, concatenated, as int64 [Σ lengths] on `device`, without waiting for it."""
    key = (device, rows)
    if device.type != "cuda":
        return torch.tensor([x for row in rows for x in row], dtype=torch.int64)
    stream = torch.cuda.current_stream(device)
    capturing = torch.cuda.is_current_stream_capturing()
    entry = _tables.get(key)
    if entry is None:
        if capturing:
            raise RuntimeError(
                "new tensors inside a CUDA graph capture, where their addresses cannot be "
                "uploaded: make the same call with the same tensors once before the capture"
            )
        host = torch.tensor([x for row in rows for x in row], dtype=torch.int64).pin_memory()
        entry = (host.to(device, non_blocking=True), stream, stream.record_event())
        _tables[key] = entry
        while len(_tables) > TABLES_KEPT:
            _tables.popitem(last=False)
    else:
        _tables.move_to_end(key)
    table, home, written = entry
    if capturing:
        _kept_for_graphs[key] = table  # a replay reads it at any later time
    elif stream != home:
        stream.wait_event(written)
        table.record_stream(stream)
    return table
