"""What was done on the grid of exact reversal, packed: the way back takes it off the end."""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor

KICK, DRIFT, SCALING = range(3)
_NEW_STEP, _NEW_LOG, _NEW_SKIPPED = 4, 8, 16


class Move(NamedTuple):
    """One kick, drift or scaling of the momenta."""

    kind: int
    step: float  # of a kick or drift
    log: int  # log₂ of damp or of the factor, in the unit of `exact_grid`
    skipped: tuple[int, ...]  # places of the tensors that took no part


class Moves:
    """A stack of moves.

    A move costs one byte, which says what it is and which of its numbers differ from those of the
    last move of its kind; only these are kept, 8 bytes each. A kick has a checksum of 8 bytes more.
    So a walk at a constant dt takes 10 bytes a step, 8 of which are the checksum.
    """

    def __init__(self) -> None:
        self.kinds = bytearray()
        self.steps = [array("d") for _ in range(3)]  # of each kind, where they changed
        self.logs = [array("q") for _ in range(3)]
        self.skipped: list[list[tuple[int, ...]]] = [[] for _ in range(3)]
        self.checksums = array("Q")

    def push(
        self, kind: int, step: float, log: int, skipped: tuple[int, ...], checksum: int = 0
    ) -> None:
        """Appends a move; checksum: of a kick."""
        byte = kind
        for new, stack, value in self._stacks(kind, step, log, skipped):
            if not stack or stack[-1] != value:
                stack.append(value)
                byte |= new
        self.kinds.append(byte)
        if kind == KICK:
            self.checksums.append(checksum)

    def last(self) -> Move | None:
        """The last move, or None."""
        if not self.kinds:
            return None
        kind = self.kinds[-1] & 3
        return Move(kind, self.steps[kind][-1], self.logs[kind][-1], self.skipped[kind][-1])

    def pop(self) -> None:
        """Forgets the last move."""
        byte = self.kinds.pop()
        kind = byte & 3
        for new, stack, _ in self._stacks(kind):
            if byte & new:
                stack.pop()
        if kind == KICK:
            self.checksums.pop()

    def _stacks(
        self, kind: int, step: float = 0.0, log: int = 0, skipped: tuple[int, ...] = ()
    ) -> tuple[tuple[int, Any, Any], ...]:
        return (
            (_NEW_STEP, self.steps[kind], step),
            (_NEW_LOG, self.logs[kind], log),
            (_NEW_SKIPPED, self.skipped[kind], skipped),
        )

    def state(self) -> dict[str, Any]:
        """As tensors of the same sizes, and lists."""
        return {
            "kinds": tensor_of(self.kinds, torch.uint8),
            "steps": [tensor_of(x, torch.float64) for x in self.steps],
            "logs": [tensor_of(x, torch.int64) for x in self.logs],
            "skipped": [list(x) for x in self.skipped],
            "checksums": tensor_of(self.checksums, torch.int64),  # the bits
        }

    @classmethod
    def of(cls, state: dict[str, Any]) -> Moves:
        """What `state` was taken of."""
        moves = cls()
        moves.kinds = bytearray(bytes_of(state["kinds"]))
        moves.steps = [array("d", bytes_of(x)) for x in state["steps"]]
        moves.logs = [array("q", bytes_of(x)) for x in state["logs"]]
        moves.skipped = [[tuple(places) for places in x] for x in state["skipped"]]
        moves.checksums = array("Q", bytes_of(state["checksums"]))
        return moves


def tensor_of(numbers: bytearray | array[Any], dtype: torch.dtype) -> Tensor:
    """The same bytes as a tensor, for state_dict."""
    if not numbers:
        return torch.empty(0, dtype=dtype, device="cpu")
    return torch.frombuffer(bytearray(numbers), dtype=dtype)


def bytes_of(x: Tensor) -> bytes:
    """What `tensor_of` was given."""
    return x.cpu().numpy().tobytes()
