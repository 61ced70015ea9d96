"""The symplectic leapfrog as a torch optimizer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..ops.arguments import finite
from ..ops.leapfrog import stage_sizes
from .phase_optimizer import Closure, PhaseOptimizer

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
    that gets the same closure object and neither parameters nor gradients have changed since. So
    define the closure once for a fixed batch, and anew (or call zero_grad() before the step) for
    each new batch. The two forms may alternate: what p is behind q, the next step makes up.

    Args:
        params: tensors, (name, tensor) pairs, or dicts with "params" and options of the group
            ("lr", "inv_mass", "damping", "maximize", "momentum"), as in torch.optim.
        dt: step size [time]; kept in each group as "lr", so that schedulers find it.
        inv_mass: M⁻¹, the diagonal: "fan_in" (clip(1/√fan_in, 1/8, 8) for weights of two or more
            dimensions, 1 for all others), a float, one float per tensor, or tensors like params.
            Read when the group is added.
        damping: γ [1/time], without sign restriction. γ = 0 is symplectic, else Ω ~ e^{−γt}.
        order: 2 or 4; 4 composes step(closure) of Verlet stages and needs a closure.
        composition: of order 4, "yoshida" (3 stages) or "suzuki" (5); see `gti_kernels.leapfrog_`.
        energy_cap: α. At the beginning of a step with H = K + L > α H₀, H₀ being the H of the first
            step, p ← p √(max(ε, α H₀ − L) / max(ε, K)), ε = 1e-12, so that H = α H₀ as long as
            L < α H₀. It needs H₀ > 0 to make sense, and the loss: step(closure) or
            step(loss=loss). `cap_engagements` counts.
        exact: q and p live on an integer grid, and `reverse` returns to every bit; see
            `gti_kernels.PhaseSpace`.
        momentum: "zeros", "gaussian" (variance M, by seed) or tensors like params.
        seed: of gaussian momenta and of stochastic rounding (bf16 and fp16 parameters).
        maximize: climb the loss; its sign in H is then reversed.

    A parameter whose grad is None is passed over; sparse gradients are refused. Works with
    GradScaler, gradient accumulation, DistributedDataParallel and LR schedulers. A closure that
    raises leaves a state from which the next step goes on: p owes what the interrupted one had
    left. Move the model to its device before.

    Raises:
        TypeError, ValueError: argument, expectation, what came; no tensor is touched.

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
        dt: float,
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
        defaults = {
            "lr": finite("Leapfrog", "dt", dt),
            "inv_mass": inv_mass,
            "damping": damping,
            "maximize": bool(maximize),
        }
        super().__init__(params, defaults, momentum=momentum, exact=exact, seed=seed)
        self._engagements = torch.zeros((), dtype=torch.int64, device=self._device)

    @torch.no_grad()
    def step(self, closure: Closure | None = None, *, loss: Any = None) -> Any:  # type: ignore[override]
        """One step; returns the loss at its beginning with a closure, else None.

        loss: of step() without closure, the loss whose gradient is in grad, for `energy` and the
        cap; nothing waits for its value.
        """
        if closure is None:
            if len(self._fractions) > 1:
                raise ValueError(
                    "step: order 4 takes several gradients a step; pass a closure, or use order=2"
                )
            return self._staggered_step(loss)
        if loss is not None:
            raise ValueError("step: expected a closure, which returns the loss, or loss; got both")
        return self._closure_step(closure, self._fractions)

    @torch.no_grad()
    def reverse(self, closure: Closure) -> Any:
        """Walks back the last step; returns the loss where it ends.

        The closure is that of the step walked back. After step() it is called at the positions
        before that step; after step(closure) at both ends of it. Without `exact` this undoes, up to
        rounding, a step of the present lr and damping; momenta that the energy cap has scaled stay
        scaled.
        """
        self._check_groups()
        if None in self._owed:
            raise RuntimeError("reverse: expected a step to walk back, got none")
        self._before = []
        if all(owed == (0.0, 1.0) for owed in self._owed):
            back = [-w for w in reversed(self._fractions)]  # a palindrome undoes itself
            self._closure_step(closure, back, capped=False)
            return self._loss
        return self._reverse_staggered_step(closure)

    @property
    def cap_engagements(self) -> Tensor:
        """How often the energy cap has scaled the momenta: 0-d int64, on the device of the loss."""
        return (
            torch.zeros((), dtype=torch.int64) if self._engagements is None else self._engagements
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        finite("Leapfrog", "damping", group["damping"])

    def _half_damp(self, group: dict[str, Any], h: float) -> float:
        return math.exp(-0.5 * group["damping"] * h)

    def _move(self, i: int, kick: float, h: float, damp: float | Tensor) -> Tensor:
        return self.phase_spaces[i].kick_drift_(kick, h, damp=damp)

    def _cap(self, loss: Tensor | None) -> Tensor | None:
        if self._energy_cap is None:
            return None
        if loss is None:
            raise ValueError(
                "step: energy_cap needs the loss; call step(closure) or step(loss=loss)"
            )
        kinetic = self._total([self._kinetic_energy(i) for i in range(len(self.phase_spaces))])
        potential = self._potential_energy(loss)
        energy = kinetic + potential
        if self._initial_energy is None:
            self._initial_energy = energy
        limit = self._energy_cap * self._initial_energy
        over = energy > limit
        self._engagements = self._engagements + over
        room = (limit - potential).clamp(min=_EPSILON)
        return torch.where(over, (room / kinetic.clamp(min=_EPSILON)).sqrt(), 1.0)

    def _reverse_staggered_step(self, closure: Closure) -> Tensor:
        self._evaluated = None
        for i, (group, space) in enumerate(zip(self.param_groups, self.phase_spaces)):
            half = self._half_damp(group, group["lr"])
            space.drift_(-group["lr"])
            self._owed[i] = -0.5 * group["lr"] / half, 1.0 / half  # should the closure raise
        loss = self._potential(closure)
        for i, (group, space) in enumerate(zip(self.param_groups, self.phase_spaces)):
            half = self._half_damp(group, group["lr"])
            self._kinetic[i] = None
            space.kick_(-self._sign(i) * group["lr"] / half**2, damp=1.0 / half**2)
            self._owed[i] = 0.5 * group["lr"], half
        self._evaluated = None
        return loss

    def _settings(self) -> list[str]:
        return [*super()._settings(), "_fractions", "_energy_cap"]

    def _saved(self) -> dict[str, Any]:
        return {
            **super()._saved(),
            "initial_energy": self._initial_energy,
            "engagements": self._engagements,
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        initial = saved["initial_energy"]
        self._initial_energy = None if initial is None else initial.to(self._device)
        self._engagements = saved["engagements"].to(self._device)
