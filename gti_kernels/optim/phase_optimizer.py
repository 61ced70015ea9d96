"""What the optimizers that step in phase space share: plans, gradients, energy, state."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ..interrupts import Uninterrupted
from ..ops.arguments import check_disjoint, finite, scalars
from ..phase_space import PhaseSpace

Closure = Callable[[], Any]
Owed = tuple[Any, Any]  #: floats, or 0-d tensors on a device
_SAVED = "phase_space"  #: the one key in the `state` of a state_dict
_ANEW = "Make a new optimizer, or add them by add_param_group"


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
        self._kept: dict[int, Tensor] = {}  # the memory of K on a GPU
        self._before: list[tuple[Tensor, float]] = []  # after a staggered step: see `energy`
        self._loss: Tensor | None = None
        self._evaluated: tuple[Any, list[Any], list[Any]] | None = None
        super().__init__(params, defaults)
        # Not empty: torch.distributed.checkpoint would step an optimizer without state to make one.
        self.state[_SAVED] = {}  # type: ignore[index]
        if not isinstance(momentum, str):
            self._momentum = "zeros"  # the tensors were for the groups that are there

    # ---- what a subclass says --------------------------------------------------------------------

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises for an option of the group that cannot be; called before every step."""
        lr, name = group["lr"], type(self).__name__
        if not isinstance(lr, Tensor):
            finite(name, "lr", lr)
            return
        device = group["params"][0].device if group["params"] else lr.device
        if lr.device.type == "cpu":
            device = lr.device  # it is read
        scalars(name, [torch.empty(0, device=device)], lr=lr)

    def _check_rate(self, group: dict[str, Any], name: str) -> None:
        """Raises where exp(−rate·lr) is too far from 1: over the longest stage of order 4, of 1.7
        steps, it must stay within fp64 and the e^{±575} of the exact grid's s."""
        rate, lr = finite(type(self).__name__, name, group[name]), group["lr"]
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            return  # to read it would wait for the device
        if abs(rate * float(lr)) > 300.0:
            raise ValueError(
                f"{type(self).__name__}: |{name}·lr| must be at most 300, as momenta decay by "
                f"exp(−{name}·lr), got {name}={rate}, lr={float(lr)}"
            )

    def _half_damp(self, group: dict[str, Any], h: Any) -> Any:
        """The factor of p over half a stage of size h."""
        return 1.0

    def _move(self, i: int, kick: Any, h: Any, damp: Any) -> Tensor | None:
        """p ← damp·p − kick·∇L, then the motion of group i over h; K of the new p, where known."""
        raise NotImplementedError

    def _cap(self, loss: Tensor | None) -> Tensor | None:
        """A factor of all momenta at the beginning of a step, or None."""
        return None

    # ---- steps -----------------------------------------------------------------------------------
    # torch.compile goes around `step` and `reverse`: there is nothing to fuse, and the way back
    # depends on the order of what is written. A compiled model within the closure stays compiled.

    def _staggered_step(self, loss: Any) -> None:
        """One stage on the gradients that are there; p ends half a step behind q."""
        self._check_groups()
        self._check_kicks()
        potential = None if loss is None else self._as_loss("loss", loss)

        def move(i: int, factor: Tensor | None) -> None:
            group = self.param_groups[i]
            h, before = self._step_size(group), self._kinetic_energy(i)
            if factor is not None:
                before = before * factor.to(before.device).square()
            elif before.is_cuda:
                before = before.clone()  # its memory gets the new one
            owed = self._owed[i] or (0.5 * h, self._half_damp(group, h))
            kick, damp, left = self._stage(group, owed, h, synchronised=False)
            self._before[i:] = [(before, _quotient(owed[0], kick))]
            self._advance(i, kick, h, damp, factor)
            self._leave(i, left)

        with Uninterrupted():
            factor = self._begin_step(potential)
            self._loss, self._evaluated = potential, None
            self._each(move, factor)

    def _closure_step(self, closure: Closure, fractions: Sequence[float]) -> Tensor:
        """Kick, motion and kick per fraction of a step; p and q end at the same time."""
        self._check_groups()
        start = self._potential(closure)

        def move(i: int, w: float | None, factor: Tensor | None) -> None:
            owed, group = self._owed[i] or (0.0, 1.0), self.param_groups[i]
            if w is None:
                self._kick(i, *owed)
                self._owed[i] = 0.0, 1.0
                return
            h = w * self._step_size(group)
            kick, damp, left = self._stage(group, owed, h, synchronised=True)
            self._advance(i, kick, h, damp, factor)
            self._leave(i, left)

        for stage, w in enumerate((*fractions, None)):  # None: the kick at the end
            if stage:
                self._potential(closure)
            self._check_kicks()
            try:
                with Uninterrupted():
                    factor = None if stage else self._begin_step(start)
                    self._before, self._evaluated = [], None
                    self._each(move, w, factor)
            except OverflowError:
                self._undo_stages(closure)
                raise
        self._remember(closure)
        return start

    def _each(self, move: Callable[..., None], *numbers: Any) -> None:
        """One stage, of each group."""
        for i in range(len(self.phase_spaces)):
            move(i, *numbers)

    def _undo_stages(self, closure: Closure) -> None:
        """Takes back the stages of a step that cannot go on, where that can be."""

    def _step_size(self, group: dict[str, Any]) -> Any:
        """dt: a float; or a 0-d tensor where reading it would wait for a device."""
        lr = group["lr"]
        if isinstance(lr, Tensor) and (self._exact or lr.device.type == "cpu"):
            return float(lr)
        return lr.to(torch.float64) if isinstance(lr, Tensor) else lr

    def _leave(self, i: int, owed: Owed) -> None:
        """What group i owes from now on. Tensors stay where they are, as `_keep` has it."""
        before = self._owed[i]
        if before is not None and all(isinstance(x, Tensor) for x in (*before, *owed)):
            for kept, new in zip(before, owed):
                kept.copy_(new)
        else:
            self._owed[i] = owed

    def _keep(self, i: int, kinetic: Tensor | None) -> None:
        """K of group i as it is now. On a GPU it stays where it is, so that a step captured in a
        graph begins with what the replay before it left."""
        if kinetic is not None and kinetic.is_cuda:
            kept = self._kept.setdefault(i, torch.empty_like(kinetic))
            kinetic = kept.copy_(kinetic)
        self._kinetic[i] = kinetic

    def _stage(
        self, group: dict[str, Any], owed: Owed, h: Any, *, synchronised: bool
    ) -> tuple[Any, Any, Owed]:
        """kick and damp of a stage of size h, with what the one before owed; and what it owes."""
        (kick, damp), half = owed, self._half_damp(group, h)
        if synchronised:  # owed: p ← half (p − (h/2) ∇L); then p ← half p − (h/2) ∇L
            return half * kick + 0.5 * h, half * damp, (half * 0.5 * h, half)
        return kick + 0.5 * h, half * damp, (0.5 * h, half)

    def _begin_step(self, loss: Tensor | None) -> Tensor | None:
        """The factor of all momenta for the first kick of the step."""
        return self._cap(loss)

    def _advance(self, i: int, kick: Any, h: Any, damp: Any, factor: Tensor | None) -> None:
        self._kinetic[i] = None  # whatever happens below
        scaled = damp if factor is None else damp * factor.to(self.phase_spaces[i].device)
        self._keep(i, self._move(i, self._sign(i) * kick, h, scaled))

    def _kick(self, i: int, kick: Any, damp: Any) -> None:
        self._kinetic[i] = None
        self.phase_spaces[i].kick_(self._sign(i) * kick, damp=damp)

    def _sign(self, i: int) -> float:
        return -1.0 if self.param_groups[i].get("maximize") else 1.0

    def _check_groups(self) -> None:
        if len(self.param_groups) != len(self.phase_spaces):
            raise RuntimeError(
                f"param_groups: expected the {len(self.phase_spaces)} groups that were added, got "
                f"{len(self.param_groups)}. {_ANEW}"
            )
        for i, (group, space) in enumerate(zip(self.param_groups, self.phase_spaces)):
            self._check_group(group)
            params = group["params"]
            if len(params) != len(space.params) or not all(map(is_, params, space.params)):
                raise RuntimeError(
                    f"param_groups[{i}]: expected the params that were added, got others. {_ANEW}"
                )

    def _check_kicks(self) -> None:
        """The first group objects before it moves, and exact ones are taken back."""
        if len(self.phase_spaces) > 1 and not self._exact:
            for space in self.phase_spaces[1:]:
                space.check(type(self).__name__, kicks=True)

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
        if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
            shown = isinstance(value, Tensor)
            got = f"{tuple(value.shape)} of {value.dtype}" if shown else type(value).__name__
            raise TypeError(f"{name}: expected a real number or tensor of one element, got {got}")
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

    def _versions(self) -> list[tuple[int, int, bool, int]]:
        """What changes with a parameter, or with what is in its gradient, but for writing through
        `.data`, which raises no version counter."""
        return [
            (q._version, q.data_ptr(), q.requires_grad, -1 if q.grad is None else q.grad._version)
            for group in self.param_groups
            for q in group["params"]
        ]

    # ---- energy ----------------------------------------------------------------------------------

    @property
    def knows_loss(self) -> bool:
        """Whether `energy` needs no loss: step(closure) and step(loss=loss) have told it."""
        return self._loss is not None

    def energy(self, loss: Tensor | None = None) -> Tensor:
        """H = K + L where the loss was last known: a 0-d fp64 tensor; nothing waits for the device.

        After step(closure), K = ½ pᵀM⁻¹p and L at the end of the step. After step() the loss is
        that of the positions q_t before the step, given here or as step(loss=loss), and K is
        interpolated to the same time from both sides: (K_{t−½} + K_{t+½})/2, which differs from
        K_t by O(dt²); so it is after `reverse`. With maximize, L is minus the loss.

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
        if self._kinetic[i] is None:
            self._keep(i, self.phase_spaces[i].kinetic_energy())
        kinetic = self._kinetic[i]
        assert kinetic is not None
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
            every = [q for each in self.param_groups for q in each["params"]]
            check_disjoint(type(self).__name__, {"params": every}, {})
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
            self.state[_SAVED] = {}  # type: ignore[index]

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
        plans = zip(state["param_groups"], saved["plans"], strict=True)
        for i, (group, plan) in enumerate(plans):
            self._check_group(group)
            spaces.append(self._plan(group, i, "zeros"))
            spaces[i].check_state_dict(plan)
        for space, plan in zip(spaces, saved["plans"]):  # with exact it writes the parameters
            space.load_state_dict(plan)
        super().__setstate__({**state, "state": defaultdict(dict, {_SAVED: {}})})
        self.phase_spaces = spaces
        self._evaluated = None
        self._restore(saved)

    def _settings(self) -> list[str]:
        return ["_momentum", "_exact", "_seed"]

    def _saved(self) -> dict[str, Any]:
        return {
            "class": type(self).__name__,
            "plans": [space.state_dict() for space in self.phase_spaces],
            "owed": [None if owed is None else tuple(map(_copied, owed)) for owed in self._owed],
            "kinetic": [_copied(k) for k in self._kinetic],
            "before": [(k, _copied(w)) for k, w in self._before],
            "loss": self._loss,
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        devices = [space.device for space in self.phase_spaces]
        self._owed = [
            None if owed is None else (_copied(owed[0], d), _copied(owed[1], d))
            for owed, d in zip(saved["owed"], devices)
        ]
        self._kept = {}
        self._kinetic = [_copied(k, d) for k, d in zip(saved["kinetic"], devices)]
        self._before = [(k.to(d), _copied(w, d)) for (k, w), d in zip(saved["before"], devices)]
        self._loss = None if saved["loss"] is None else saved["loss"].to(self._device)

    def _plan(self, group: dict[str, Any], i: int, momentum: Any) -> PhaseSpace:
        space = PhaseSpace(
            group["params"],
            inv_mass=group["inv_mass"],
            momentum=momentum,
            exact=self._exact,
            seed=(self._seed * 1_000_003 + i) % 2**63,  # no two groups draw the same numbers
        )
        space.takes_back = False  # a step of another sign of lr is a step of its own
        return space


def _copied(x: Any, device: torch.device | None = None) -> Any:
    """x; a tensor in memory of its own."""
    return x.to(device, copy=True) if isinstance(x, Tensor) else x


def _quotient(x: Any, y: Any) -> Any:
    """x/y, or 0 where y is."""
    if isinstance(y, Tensor):
        return torch.where(y == 0.0, 0.0, x / y)
    return x / y if y else 0.0


def _weakly(closure: Closure) -> Callable[[], Any]:
    """A reference that does not keep the closure, and the batch it holds, in memory."""
    try:
        return weakref.ref(closure)
    except TypeError:
        return lambda: None  # cannot be referred to: never taken for the same
