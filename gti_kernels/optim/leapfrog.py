"""The symplectic leapfrog as a torch optimizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..interrupts import Uninterrupted
from ..ops.arguments import finite
from ..ops.leapfrog import stage_sizes
from .phase_optimizer import Closure, Owed, PhaseOptimizer, _quotient
from .walked_steps import Step, WalkedSteps

_EPSILON = 1e-12


class Leapfrog(PhaseOptimizer):
    """Training as mechanics: parameters q, momenta p, H = ½ pᵀM⁻¹p + L(q). A torch optimizer.

    step() takes one gradient, the one in the parameters' grad (staggered form, γ = damping):

        p_{t+½} = e^{−γ dt} p_{t−½} − dt ∇L(q_t);   q_{t+1} = q_t + dt M⁻¹ p_{t+½}

    in one pass over memory. It is SGD with lr = dt² M⁻¹ and momentum e^{−γ dt}; the first momenta
    are taken for p_{−½}. Where `lr` changes, the kick is the mean of the two steps beside it.

    step(closure) keeps p and q at the same time (damp–kick–drift–kick–damp, c = e^{−γ dt/2}):

        p ← c p − (dt/2) ∇L(q);   q ← q + dt M⁻¹ p;   p ← c (p − (dt/2) ∇L(q))

    The closure clears the gradients, computes the loss, calls backward and returns the loss; it is
    called at both ends of a step. Its last gradient serves for the beginning of the next step if
    that gets the same closure object and neither parameters nor gradients have changed since
    (writing into `.data`, as `q.data.mul_(2)`, is not seen). So
    define the closure once for a fixed batch, and anew (or call zero_grad() before the step) for
    each new batch. The two forms may alternate: what p is behind q, the next step makes up.

    Args:
        params: tensors, (name, tensor) pairs, or dicts with "params" and options of the group
            ("lr", "inv_mass", "damping", "maximize", "momentum"), as in torch.optim.
        dt: step size [time]; kept in each group as "lr", so that schedulers find it. A float, or a
            0-d tensor of fp64 or fp32: on a GPU it is read there, so that a step captured in a CUDA
            graph, after one before the capture, takes what it holds at each replay.
        inv_mass: M⁻¹, the diagonal: "fan_in" (clip(1/√fan_in, 1/8, 8) for weights of two or more
            dimensions, 1 for all others), a float, one float per tensor, or tensors like params.
            Read when the group is added.
        damping: γ [1/time], without sign restriction. γ = 0 is symplectic, else Ω ~ e^{−γt}.
        order: 2 or 4; 4 composes step(closure) of Verlet stages and needs a closure.
        composition: of order 4, "yoshida" (3 stages) or "suzuki" (5); see `gti_kernels.leapfrog_`.
        energy_cap: α. At the beginning of a step with H = K + L > α H₀, H₀ being the H of the first
            step, p ← p √(max(ε, α H₀ − L) / max(ε, K)), ε = 1e-12, so that H = α H₀ as long as
            L < α H₀ (momenta of parameters that are skipped stay). It needs H₀ > 0 to make sense,
            and the loss: step(closure) or step(loss=loss). `cap_engagements` counts.
        exact: q and p live on an integer grid, and `reverse` returns to every bit; see
            `gti_kernels.PhaseSpace`. The grid holds the positions: parameters must not be written
            by others, and load_state_dict restores them (call it after the model's own).
        momentum: "zeros", "gaussian" (variance M, by seed) or tensors like params.
        seed: of gaussian momenta and of stochastic rounding (bf16 and fp16 parameters).
        maximize: climb the loss; its sign in H is then reversed.

    A parameter whose grad is None is skipped: it keeps its momentum and stays, as in torch's
    optimizers. Sparse gradients are refused. Works with
    GradScaler, gradient accumulation, DistributedDataParallel and LR schedulers. A closure that
    raises, or whose gradients are refused, and Ctrl-C leave a state from which the next step goes
    on: p owes what the interrupted one had left. Ctrl-C waits until all groups have moved. Move the
    model to its device before; torch.utils.swap_tensors refuses parameters that a plan holds.

    Raises:
        TypeError, ValueError: argument, expectation, what came; no tensor is touched.
        OverflowError: with exact, the step would leave the grid. It has not been made: for a kick
            after the first one of step(closure), the closure is called again where the step began.
        RuntimeError: the plan is stale; parameters were moved, or exchanged in param_groups.

    >>> import torch, gti_kernels as gti
    >>> q = torch.nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float64))
    >>> optimizer = gti.optim.Leapfrog([q], dt=0.1, inv_mass=1.0)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = 0.5 * q.square().sum()
    ...     loss.backward()
    ...     return loss
    >>> for _ in range(10):
    ...     loss = optimizer.step(closure)
    >>> q.detach(), round(float(optimizer.energy()), 3)  # q(1) ≈ cos 1 = 0.5403, H₀ = 0.5
    (tensor([0.5400, 0.0000], dtype=torch.float64), 0.499)

    Source: Hairer, Lubich & Wanner, Geometric Numerical Integration (2006), I.1.4, II.4; McLachlan
    & Perlmutter (2001) for damping.
    """

    def __init__(
        self,
        params: Any,
        dt: float | Tensor,
        inv_mass: Any = "fan_in",
        damping: float = 0.0,
        order: int = 2,
        composition: str = "yoshida",
        energy_cap: float | None = None,
        exact: bool = False,
        momentum: Any = "zeros",
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        self._fractions = stage_sizes("Leapfrog", 1.0, 1, order, composition)
        if energy_cap is not None:
            energy_cap = finite("Leapfrog", "energy_cap", energy_cap)
            if energy_cap <= 0.0:
                raise ValueError(f"Leapfrog: energy_cap must be > 0 or None, got {energy_cap}")
        self._energy_cap = energy_cap
        self._initial_energy: Tensor | None = None
        self._walked = WalkedSteps()  # with exact
        self._unfinished: Step | None = None  # the last step with exact; or one that is half undone
        self._numbers: list[list[tuple[Any, Any, Any]]] = []  # of one that is half undone
        self._drifted: dict[int, Any] = {}  # sizes of the drifts undone in a stage, by group
        self._moved: list[bool] = []  # of each group in the present stage: whether it drifts
        self._known: tuple[Any, ...] = ()  # before the step: what `_unbegin` restores
        defaults = {
            "lr": dt if isinstance(dt, Tensor) else finite("Leapfrog", "dt", dt),
            "inv_mass": inv_mass,
            "damping": damping,
            "maximize": bool(maximize),
        }
        super().__init__(params, defaults, momentum=momentum, exact=exact, seed=seed)
        self._engagements = torch.zeros((), dtype=torch.int64, device=self._device)

    @torch._disable_dynamo
    def step(self, closure: Closure | None = None, *, loss: Any = None) -> Any:  # type: ignore[override]
        """One step; returns the loss at its beginning with a closure, else None.

        loss: of step() without closure, the loss whose gradient is in grad, for `energy` and the
        cap; nothing waits for its value.
        """
        if self._exact:
            self._known = self._loss, list(self._before), self._initial_energy
        if closure is None:
            if len(self._fractions) > 1:
                raise ValueError(
                    "step: order 4 takes several gradients a step; pass a closure, or use order=2"
                )
            return self._staggered_step(loss)
        if loss is not None:
            raise ValueError("step: expected a closure, which returns the loss, or loss; got both")
        return self._closure_step(closure, self._fractions)

    @torch._disable_dynamo
    def reverse(self, closure: Closure) -> Tensor:
        """Walks back the last step; returns the loss where it ends.

        The closure is that of the step walked back: it is called at both ends of a step(closure),
        and at the positions before a step() without one. With `exact` any number of steps, of
        either form, returns every bit, whatever lr, damping, cap and the set of gradients that are
        None were. Else this undoes, up to rounding, a step that did not break off, of the present
        form, lr, damping and set (another set is refused), as was the step before it; momenta that
        the energy cap has scaled stay scaled. Where the closure raises, or its gradients are
        refused, no group takes that kick back, though positions may have gone back; the next
        `reverse` goes on from there.
        """
        self._check_groups()
        with Uninterrupted():
            if self._unfinished is None:
                self._unfinished = self._last_step()
        owed, stages = self._unfinished
        self._before = []
        while stages:
            stage, last = stages[-1], len(stages) - 1
            with Uninterrupted():
                for space in self.phase_spaces[: len(stage)]:
                    space.check("reverse", kicks=False)
                for i, drifts in enumerate(stage):
                    if drifts:
                        h = self._drifted[i] = self._undo_drift(i, last)
                        half = self._half_damp(self.param_groups[i], h)
                        # for a step, should closure raise or give another gradient
                        self._owed[i] = -0.5 * h / half, 1.0 / half
                        stage[i] = False
            self._potential(closure)
            with Uninterrupted():
                behind = not last and not all(map(_synchronised, owed))
                ahead = [self._kinetic_energy(i) for i in range(len(stage) if behind else 0)]
                self._kinetic = [None] * len(self._kinetic)
                kicks = self._undo_kicks(len(stage), last)
                stages.pop()
                if not stages:
                    self._owed[: len(owed)] = owed  # groups added since have not walked
                    self._unfinished = None
                    if len(self._drifted) == len(ahead):  # else half of it was undone elsewhere
                        self._before = [
                            (k.clone(), _quotient(0.5 * self._drifted[i], self._sign(i) * kicks[i]))
                            for i, k in enumerate(ahead)
                        ]
                self._drifted = {}
        self._remember(closure)
        return self._potential(closure).clone()

    @property
    def cap_engagements(self) -> Tensor:
        """How often the energy cap has scaled the momenta: 0-d int64, on the device."""
        return self._engagements.clone()

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_rate(group, "damping")

    def _half_damp(self, group: dict[str, Any], h: Any) -> Any:
        exponent = -0.5 * group["damping"] * h
        return exponent.exp() if isinstance(exponent, Tensor) else math.exp(exponent)

    def _begin_step(self, loss: Tensor | None) -> Tensor | None:
        factor = self._cap(loss)
        if self._exact:
            if self._unfinished is not None:
                self._walked.push(*self._unfinished)
            self._unfinished = tuple(self._owed), []
        return factor

    def _move(self, i: int, kick: Any, h: Any, damp: Any) -> Tensor:
        kinetic = self.phase_spaces[i].kick_drift_(kick, h, damp=damp)
        self._moved.append(True)
        return kinetic

    def _kick(self, i: int, kick: Any, damp: Any) -> None:
        super()._kick(i, kick, damp)
        self._moved.append(False)

    def _each(self, move: Callable[..., None], *numbers: Any) -> None:
        """One stage, of each group; with exact of none if one cannot take it."""
        self._moved = []
        if not self._exact:
            super()._each(move, *numbers)
            self._unfinished = None
            return
        assert self._unfinished is not None  # since `_begin_step`
        owed = list(self._owed)
        try:
            super()._each(move, *numbers)
        except BaseException:
            for space, drifts in zip(self.phase_spaces, self._moved):
                if drifts:
                    space.undo_drift_()
                space.undo_kick_()
            self._owed, self._kinetic = owed, [None] * len(owed)
            if not self._unfinished[1]:
                self._unbegin()
            raise
        self._unfinished[1].append(self._moved)

    # ---- the way back ----------------------------------------------------------------------------

    def _undo_stages(self, closure: Closure) -> None:
        if self._exact and self._unfinished is not None:
            self.reverse(closure)
            self._unbegin()

    def _unbegin(self) -> None:
        """The step has not been; q, p and what they owe are as before it."""
        self._loss, self._before, self._initial_energy = self._known
        self._unfinished = self._evaluated = None
        if self._energy_cap is not None:
            self._engagements.add_(self._over, alpha=-1)

    def _last_step(self) -> Step:
        """The last step with exact; else what a step of the present lr and damping would have done
        to end as things are."""
        if not self._walked if self._exact else None in self._owed:
            raise RuntimeError("reverse: expected a step to walk back, got none")
        if self._exact:
            return self._walked.pop()
        owed = [owed or (0.0, 1.0) for owed in self._owed]
        step: Step = (tuple(owed), [])
        self._numbers = []
        synchronised = all(map(_synchronised, owed))
        for w in self._fractions if synchronised else (1.0,):
            numbers = []
            for i, group in enumerate(self.param_groups):
                h = w * self._step_size(group)
                kick, damp, owed[i] = self._stage(group, owed[i], h, synchronised=synchronised)
                numbers.append((self._sign(i) * kick, h, damp))
            self._numbers.append(numbers)
            step[1].append([True] * len(owed))
        if synchronised:
            self._numbers.append(
                [(self._sign(i) * kick, 0.0, damp) for i, (kick, damp) in enumerate(owed)]
            )
            step[1].append([False] * len(owed))
        return step

    def _undo_drift(self, i: int, stage: int) -> float:
        """Takes back the drift of group i; returns its size."""
        space = self.phase_spaces[i]
        if self._exact:
            return space.undo_drift_()
        _, h, _ = self._numbers[stage][i]
        space.drift_(-h, skipped=space.skipped)
        return h

    def _undo_kicks(self, groups: int, stage: int) -> list[Any]:
        """Takes back the kicks of a stage and returns their sizes; an error leaves all of them as
        they were."""
        spaces = self.phase_spaces[:groups]
        if self._exact:
            moves: list[Any] = []
            try:
                for space in spaces:
                    moves.append(space.undo_kick_(step=len(self._walked) + 1))
            except BaseException:
                for space, move in zip(spaces, moves):
                    space.redo_kick_(move)
                raise
            return [move.step for move in moves]
        for space in spaces:
            if tuple([j for j, q in enumerate(space.params) if q.grad is None]) != space.skipped:
                raise RuntimeError(
                    "reverse: the gradients that are None are not those of the step walked back, "
                    "which has already moved the parameters. Use exact=True, which remembers them"
                )
        self._check_kicks()
        for space, (kick, _, damp) in zip(spaces, self._numbers[stage]):
            space.kick_(-kick / damp, damp=1.0 / damp)
        return [kick for kick, _, _ in self._numbers[stage]]

    def _cap(self, loss: Tensor | None) -> Tensor | None:
        if self._energy_cap is None:
            return None
        if loss is None:
            raise ValueError(
                "step: energy_cap needs the loss; call step(closure) or step(loss=loss)"
            )
        if not self._exact:  # which takes the count back where the step cannot be
            self.phase_spaces[0].check("Leapfrog", kicks=True)
        kinetic = self._total([self._kinetic_energy(i) for i in range(len(self.phase_spaces))])
        potential = self._potential_energy(loss)
        energy = kinetic + potential
        if self._initial_energy is None:
            self._initial_energy = energy
        limit = self._energy_cap * self._initial_energy
        self._over = over = energy > limit
        self._engagements.add_(over)
        room = (limit - potential).clamp(min=_EPSILON)
        return torch.where(over, (room / kinetic.clamp(min=_EPSILON)).sqrt(), 1.0)

    def _settings(self) -> list[str]:
        return [*super()._settings(), "_fractions", "_energy_cap"]

    def _saved(self) -> dict[str, Any]:
        return {
            **super()._saved(),
            "initial_energy": self._initial_energy,
            "engagements": self._engagements.clone(),
            "walked": self._walked.state(),
            "unfinished": copy.deepcopy((self._unfinished, self._numbers)),
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        initial = saved["initial_energy"]
        self._initial_energy = None if initial is None else initial.to(self._device)
        self._engagements = saved["engagements"].to(self._device, copy=True)
        self._walked, self._drifted = WalkedSteps.of(saved["walked"]), {}
        self._unfinished, self._numbers = copy.deepcopy(saved["unfinished"])


def _synchronised(owed: Owed | None) -> bool:
    """Whether p and q are known to belong to the same time."""
    return owed is not None and not isinstance(owed[0], Tensor) and owed == (0.0, 1.0)
