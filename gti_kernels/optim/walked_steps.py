"""The steps of an exact `Leapfrog`, as its way back needs them."""

from __future__ import annotations

from array import array
from typing import Any

import torch

from ..exact_moves import bytes_of, tensor_of

Owed = tuple[float, float]
#: What each group owed before the step; and for each stage, of each group that took it, whether
#: there is a drift after the kick.
Step = tuple[tuple[Owed | None, ...], list[list[bool]]]


class WalkedSteps:
    """A stack of steps: what each group owed before it, and its stages. The numbers of kicks and
    drifts are known to the phase spaces.

    Steps that are alike are kept once; one more of a kind costs 4 bytes.
    """

    def __init__(self) -> None:
        self.kinds: list[Any] = []
        self.places: dict[Any, int] = {}  # of the kinds
        self.steps = array("i")

    def __len__(self) -> int:
        return len(self.steps)

    def push(self, owed: tuple[Owed | None, ...], stages: list[list[bool]]) -> None:
        """Appends a step."""
        kind = owed, tuple(map(tuple, stages))
        place = self.places.setdefault(kind, len(self.kinds))
        if place == len(self.kinds):
            self.kinds.append(kind)
        self.steps.append(place)

    def pop(self) -> Step:
        """Takes the last step off."""
        owed, stages = self.kinds[self.steps.pop()]
        return owed, [list(stage) for stage in stages]

    def state(self) -> dict[str, Any]:
        """As a dict, for state_dict."""
        return {"kinds": list(self.kinds), "steps": tensor_of(self.steps, torch.int32)}

    @classmethod
    def of(cls, state: dict[str, Any]) -> WalkedSteps:
        """What `state` was taken of."""
        walked = cls()
        walked.kinds = list(state["kinds"])
        walked.places = {kind: i for i, kind in enumerate(walked.kinds)}
        walked.steps = array("i", bytes_of(state["steps"]))
        return walked
