"""What the optimizers that step in phase space share: plans, gradients, energy, state."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.arguments import finite
from ..phase_space import PhaseSpace

Closure = Callable[[], Any]
Owed = tuple[float, float]
_SAVED = "phase_space"  #: the one key in the `state` of a state_dict


class PhaseOptimizer(torch.optim.Optimizer):
    """A `PhaseSpace` for each parameter group, stepped together; base of `Leapfrog` and `BAOAB`.

    One kernel call at a gradient ends the stage before it and begins the next. What the former left
    to do is `_owed`, a pair (kick, damp) for each group: p ← damp·p − kick·∇L. It is (0, 1) where p
    and q belong to the same time, and None before the first step.
    """

    def __init__(
        self, params: Any, defaults: dict[str, Any], *, momentum: Any, exact: bool, seed: int
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed: expected an integer, got {type(seed).__name__}")
        self.phase_spaces: list[PhaseSpace] = []
        self._momentum, self._exact, self._seed = momentum, bool(exact), seed
        self._owed: list[Owed | None] = []
        self._kinetic: list[Tensor | None] = []  # K of the momenta as they are, where known
        self._before: list[tuple[Tensor, float]] = []  # after a staggered step: see `energy`
        self._loss: Tensor | None = None
        self._evaluated: tuple[Any, list[int], list[Any]] | None = None
        super().__init__(params, defaults)
        if not isinstance(momentum, str):
            self._momentum = "zeros"  # the tensors were for the groups that are there

    # ---- what a subclass says --------------------------------------------------------------------

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises for an option of the group that cannot be; called before every step."""
        finite(type(self).__name__, "lr", group["lr"])

    def _half_damp(self, group: dict[str, Any], h: float) -> float:
        """The factor of p over half a stage of size h."""
        return 1.0

    def _move(self, i: int, kick: float, h: float, damp: float | Tensor) -> Tensor | None:
        """p ← damp·p − kick·∇L, then the motion of group i over h; K of the new p, where known."""
        raise NotImplementedError

    def _cap(self, loss: Tensor | None) -> Tensor | None:
        """A factor of all momenta at the beginning of a step, or None."""
        return None

    # ---- steps -----------------------------------------------------------------------------------

    def _staggered_step(self, loss: Any) -> None:
        """One stage on the gradients that are there; p ends half a step behind q."""
        self._check_groups()
        potential = None if loss is None else self._as_loss("loss", loss)
        factor = self._begin_step(potential)
        self._loss, self._evaluated = potential, None
        for i, group in enumerate(self.param_groups):
            h, before = group["lr"], self._kinetic_energy(i)
            if factor is not None:
                before = before * factor.to(before.device).square()
            owed = self._owed[i] or (0.5 * h, self._half_damp(group, h))
            kick, damp, left = self._stage(group, owed, h, synchronised=False)
            self._before[i:] = [(before, owed[0] / kick if kick else 0.0)]
            self._advance(i, kick, h, damp, factor)
            self._owed[i] = left

    def _closure_step(self, closure: Closure, fractions: Sequence[float]) -> Tensor:
        """Kick, motion and kick per fraction of a step; p and q end at the same time."""
        self._check_groups()
        start = self._potential(closure)
        factor = self._begin_step(start)
        for stage, w in enumerate(fractions):
            if stage:
                self._potential(closure)
            self._before, self._evaluated = [], None
            for i, group in enumerate(self.param_groups):
                h = w * group["lr"]
                owed = self._owed[i] or (0.0, 1.0)
                kick, damp, left = self._stage(group, owed, h, synchronised=True)
                self._advance(i, kick, h, damp, factor)
                self._owed[i] = left
            factor = None
        self._potential(closure)
        for i, rest in enumerate(self._owed):
            self._kick(i, *(rest or (0.0, 1.0)))
            self._owed[i] = 0.0, 1.0
        self._remember(closure)
        return start

    def _stage(
        self, group: dict[str, Any], owed: Owed, h: float, *, synchronised: bool
    ) -> tuple[float, float, Owed]:
        """kick and damp of a stage of size h, with what the one before owed; and what it owes."""
        (kick, damp), half = owed, self._half_damp(group, h)
        if synchronised:  # owed: p ← half (p − (h/2) ∇L); then p ← half p − (h/2) ∇L
            return half * kick + 0.5 * h, half * damp, (half * 0.5 * h, half)
        return kick + 0.5 * h, half * damp, (0.5 * h, half)

    def _begin_step(self, loss: Tensor | None) -> Tensor | None:
        """The factor of all momenta for the first kick of the step."""
        return self._cap(loss)

    def _advance(self, i: int, kick: float, h: float, damp: float, factor: Tensor | None) -> None:
        self._kinetic[i] = None  # whatever happens below
        scaled = damp if factor is None else damp * factor.to(self.phase_spaces[i].device)
        self._kinetic[i] = self._move(i, self._sign(i) * kick, h, scaled)

    def _kick(self, i: int, kick: float, damp: float) -> None:
        self._kinetic[i] = None
        self.phase_spaces[i].kick_(self._sign(i) * kick, damp=damp)

    def _sign(self, i: int) -> float:
        return -1.0 if self.param_groups[i].get("maximize") else 1.0

    def _check_groups(self) -> None:
        for group in self.param_groups:
            self._check_group(group)
        if len(self.param_groups) > 1:  # or the first group would move before the second objects
            for group in self.param_groups:
                for q in group["params"]:
                    if q.grad is not None and q.grad.layout != torch.strided:
                        raise TypeError(
                            f"{type(self).__name__}: gradients must be dense, got layout "
                            f"{q.grad.layout}. Use an embedding with sparse=False"
                        )

    # ---- closures --------------------------------------------------------------------------------

    def _potential(self, closure: Closure) -> Tensor:
        """L at q, with ∇L in the parameters' grad: evaluated, unless `_remember`ed and still so."""
        if self._loss is None or not self._remembers(closure):
            self._evaluated = None
            with torch.enable_grad():
                value = closure()
            self._loss = self._as_loss("closure: the value it returns", value)
        return self._loss

    def _as_loss(self, name: str, value: Any) -> Tensor:
        """0-d, in memory of its own: a loss overwritten later must not change the energy."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return torch.full((), value, dtype=torch.float64, device=self._device)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: expected a number or a tensor of one element, got {got}")
        return value.detach().reshape(()).to(self._device, copy=True)

    def _remember(self, closure: Closure) -> None:
        grads = [q.grad for group in self.param_groups for q in group["params"]]
        self._evaluated = (_weakly(closure), self._versions(), grads)

    def _remembers(self, closure: Closure) -> bool:
        if self._evaluated is None:
            return False
        reference, versions, grads = self._evaluated
        return (
            reference() is closure
            and all(
                g is q.grad
                for g, q in zip(grads, (q for x in self.param_groups for q in x["params"]))
            )
            and versions == self._versions()
        )

    def _versions(self) -> list[int]:
        """Version counters of all parameters and gradients: in-place changes raise them."""
        return [
            version
            for group in self.param_groups
            for q in group["params"]
            for version in (q._version, -1 if q.grad is None else q.grad._version)
        ]

    # ---- energy ----------------------------------------------------------------------------------

    def energy(self, loss: Tensor | None = None) -> Tensor:
        """H = K + L where the loss was last known: a 0-d fp64 tensor; nothing waits for the device.

        After step(closure), K = ½ pᵀM⁻¹p and L at the end of the step. After step() the loss is
        that of the positions q_t before the step, given here or as step(loss=loss), and K is
        interpolated to the same time from both sides: (K_{t−½} + K_{t+½})/2, which differs from
        K_t by O(dt²). With maximize, L is minus the loss.

        Raises RuntimeError when no loss is known, ValueError when groups disagree on maximize.
        """
        loss = self._loss if loss is None else self._as_loss("loss", loss)
        if loss is None:
            raise RuntimeError(
                "energy: the loss is not known; call step(closure), step(loss=loss) or energy(loss)"
            )
        kinetic = [self._kinetic_energy(i) for i in range(len(self.phase_spaces))]
        for i, (before, weight) in enumerate(self._before):
            kinetic[i] = before + weight * (kinetic[i] - before)
        return self._total(kinetic) + self._potential_energy(loss)

    def _potential_energy(self, loss: Tensor) -> Tensor:
        signs = {self._sign(i) for i in range(len(self.param_groups))}
        if len(signs) > 1:
            raise ValueError("energy: all groups must agree on maximize, or there is no one H")
        return signs.pop() * loss.to(torch.float64)

    def _total(self, kinetic: Sequence[Tensor]) -> Tensor:
        first, *others = (k.to(self._device) for k in kinetic)
        return sum(others, first)

    @property
    def _device(self) -> torch.device:
        """Where losses and energies are kept: the device of the first parameter."""
        return next((x.device for x in self.phase_spaces if x.params), torch.device("cpu"))

    def _kinetic_energy(self, i: int) -> Tensor:
        kinetic = self._kinetic[i]
        if kinetic is None:
            kinetic = self._kinetic[i] = self.phase_spaces[i].kinetic_energy()
        return kinetic

    # ---- the torch.optim.Optimizer contract ------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; "momentum" in the dict says where the momenta of the group begin."""
        momentum = self._momentum
        if isinstance(param_group, dict):
            if "dt" in param_group:
                raise ValueError('param_group: the step size of a group is "lr", got "dt"')
            param_group = dict(param_group)
            momentum = param_group.pop("momentum", momentum)
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            self._check_group(group)
            space = self._plan(group, len(self.phase_spaces), momentum)
        except BaseException:
            self.param_groups.pop()
            raise
        self.phase_spaces.append(space)
        self._owed.append(None)
        self._kinetic.append(None)
        self._before, self._evaluated = [], None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch.optim. The next step(closure) evaluates the closure at its beginning."""
        self._evaluated = None
        super().zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim: all that makes a resumed run equal to the bit."""
        self.state[_SAVED] = self._saved()  # type: ignore[index]
        try:
            return super().state_dict()
        finally:
            self.state.clear()

    def __getstate__(self) -> dict[str, Any]:  # of copy and pickle
        state = super().__getstate__()
        settings = {name: getattr(self, name) for name in self._settings()}
        return {**state, "state": {_SAVED: self._saved()}, "settings": settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict ends here, once it has matched the groups; so do copy and pickle.
        state = dict(state)
        saved = state.pop("state").get(_SAVED)
        if saved is None or saved["class"] != type(self).__name__:
            raise ValueError(
                f"state_dict: expected one of a {type(self).__name__}, got one of "
                f"{'another optimizer' if saved is None else saved['class']}"
            )
        self.__dict__.update(state.pop("settings", {}))
        spaces = []
        for i, (group, plan) in enumerate(zip(state["param_groups"], saved["plans"])):
            self._check_group(group)
            spaces.append(self._plan(group, i, "zeros"))
            spaces[i].load_state_dict(plan)
        super().__setstate__({**state, "state": defaultdict(dict)})
        self.phase_spaces = spaces
        self._evaluated = None
        self._restore(saved)

    def _settings(self) -> list[str]:
        return ["_momentum", "_exact", "_seed"]

    def _saved(self) -> dict[str, Any]:
        return {
            "class": type(self).__name__,
            "plans": [space.state_dict() for space in self.phase_spaces],
            "owed": list(self._owed),
            "kinetic": list(self._kinetic),
            "before": list(self._before),
            "loss": self._loss,
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        devices = [space.device for space in self.phase_spaces]
        self._owed = [None if owed is None else (owed[0], owed[1]) for owed in saved["owed"]]
        self._kinetic = [None if k is None else k.to(d) for k, d in zip(saved["kinetic"], devices)]
        self._before = [(k.to(d), w) for (k, w), d in zip(saved["before"], devices)]
        self._loss = None if saved["loss"] is None else saved["loss"].to(self._device)

    def _plan(self, group: dict[str, Any], i: int, momentum: Any) -> PhaseSpace:
        return PhaseSpace(
            group["params"],
            inv_mass=group["inv_mass"],
            momentum=momentum,
            exact=self._exact,
            seed=(self._seed * 1_000_003 + i) % 2**63,  # no two groups draw the same numbers
        )


def _weakly(closure: Closure) -> Callable[[], Any]:
    """A reference that does not keep the closure, and the batch it holds, in memory."""
    try:
        return weakref.ref(closure)
    except TypeError:
        return lambda: None  # cannot be referred to: never taken for the same
