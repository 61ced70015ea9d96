"""Langevin dynamics as a torch optimizer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..ops.arguments import finite
from ..phase_space import PhaseSpace
from .phase_optimizer import Closure, PhaseOptimizer


class BAOAB(PhaseOptimizer):
    """Langevin dynamics: samples parameters q with density ∝ exp(−L(q)/T). A torch optimizer.

        dq = M⁻¹p dt,   dp = −∇L(q) dt − γ p dt + √(2γT) M^{1/2} dW

    One step of size dt, T = temperature, γ = friction, c = e^{−γ dt}, ξ ~ N(0, 1) each element:

        B  p ← p − (dt/2) ∇L(q)
        A  q ← q + (dt/2) M⁻¹ p
        O  p ← c p + √(T (1 − c²)) M^{1/2} ξ     (the exact Ornstein–Uhlenbeck flow)
        A  q ← q + (dt/2) M⁻¹ p
        B  p ← p − (dt/2) ∇L(q)

    On a quadratic L with frequency ω (ω² an eigenvalue of M⁻¹∇∇L, ω dt < 2) the positions have
    the variance of exp(−L/T) exactly, whatever dt; momenta, at the end of step(closure), have
    T M (1 − (ω dt/2)²). Elsewhere the error of averages over q is O(dt²).

    step() takes one gradient, the one in the parameters' grad, and leaves p half a kick behind q
    (the last B is merged with the next first one; the q are the same); step(closure) ends with p
    and q at the same time. Both forms, closures, groups and `energy()` are as in
    `gti_kernels.optim.Leapfrog`. With a mean loss over n data, T = 1/n samples the posterior.

    Args:
        params, dt, inv_mass, maximize: as in `gti_kernels.optim.Leapfrog`.
        temperature: T >= 0 [energy]. friction: γ >= 0 [1/time]. Both are options of a group and may
            change between steps.
        seed: of the noise and of gaussian momenta; state_dict carries the generator's state.
        momentum: "gaussian" (variance T M), "zeros" or tensors like params.

    Raises:
        TypeError, ValueError: argument, expectation, what came; no tensor is touched.

    >>> import torch, gti_kernels as gti
    >>> q = torch.nn.Parameter(torch.zeros(100_000, dtype=torch.float64))
    >>> optimizer = gti.optim.BAOAB([q], dt=0.5, temperature=2.0, inv_mass=1.0)
    >>> for _ in range(50):
    ...     optimizer.zero_grad()
    ...     (0.5 * q.square().sum()).backward()
    ...     optimizer.step()
    >>> round(float(q.detach().var()), 1)  # T / ω²
    2.0

    Source: Leimkuhler & Matthews, Rational construction of stochastic numerical methods for
    molecular sampling (2013).
    """

    def __init__(
        self,
        params: Any,
        dt: float | Tensor,
        temperature: float = 1.0,
        friction: float = 1.0,
        inv_mass: Any = "fan_in",
        momentum: Any = "gaussian",
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        self._generators: dict[torch.device, torch.Generator] = {}
        defaults = {
            "lr": dt if isinstance(dt, Tensor) else finite("BAOAB", "dt", dt),
            "temperature": temperature,
            "friction": friction,
            "inv_mass": inv_mass,
            "maximize": bool(maximize),
        }
        super().__init__(params, defaults, momentum=momentum, exact=False, seed=seed)

    @torch._disable_dynamo
    def step(self, closure: Closure | None = None, *, loss: Any = None) -> Any:  # type: ignore[override]
        """One step; returns the loss at its beginning with a closure, else None.

        loss: of step() without closure, the loss whose gradient is in grad, for `energy`.
        """
        if closure is None:
            return self._staggered_step(loss)
        if loss is not None:
            raise ValueError("step: expected a closure, which returns the loss, or loss; got both")
        return self._closure_step(closure, (1.0,))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_rate(group, "friction")
        for name in ("temperature", "friction"):
            if finite("BAOAB", name, group[name]) < 0.0:
                raise ValueError(f"BAOAB: {name} must be >= 0, got {group[name]}")

    def _move(self, i: int, kick: Any, h: Any, damp: Any) -> Tensor:
        group, space = self.param_groups[i], self.phase_spaces[i]
        space.kick_drift_(kick, 0.5 * h, damp=damp)
        if isinstance(h, Tensor):
            c = (-group["friction"] * h).exp()
            amplitude = (group["temperature"] * (1.0 - c * c)).clamp(min=0.0).sqrt()
        else:
            c = math.exp(-group["friction"] * h)
            amplitude = math.sqrt(group["temperature"] * max(0.0, 1.0 - c * c))
        # p ← c p + amplitude·M^{1/2} ξ is a damped kick whose gradient is noise.
        return space.kick_drift_(-amplitude, 0.5 * h, damp=c, grads=self._noise(space))

    def _noise(self, space: PhaseSpace) -> list[Tensor | None]:
        """M^{1/2} ξ for each momentum that had a gradient."""
        noise: list[Tensor | None] = []
        for j, (q, p, w) in enumerate(zip(space.params, space.momenta, space.inv_mass)):
            if j in space.skipped:
                noise.append(None)
                continue
            xi = torch.empty_like(p).normal_(generator=self._generator(p.device))
            xi.mul_(w.rsqrt() if isinstance(w, Tensor) else 1.0 / math.sqrt(w))
            noise.append(xi.to(q.dtype))
        return noise

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed % 2**63)
        return self._generators[device]

    def _plan(self, group: dict[str, Any], i: int, momentum: Any) -> PhaseSpace:
        space = super()._plan(group, i, momentum)
        for j, w in enumerate(space.inv_mass):
            if not (bool((w > 0).all()) if isinstance(w, Tensor) else w > 0.0):
                raise ValueError(f"BAOAB: inv_mass[{j}] must be > 0, got {w}")
        if isinstance(momentum, str) and momentum == "gaussian":
            space.scale_momenta_(math.sqrt(group["temperature"]))
        return space

    def _saved(self) -> dict[str, Any]:
        devices = {space.device for space in self.phase_spaces}
        states = {str(device): self._generator(device).get_state() for device in devices}
        return {**super()._saved(), "generators": states}

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        self._generators = {}
        for device, state in saved["generators"].items():
            self._generator(torch.device(device)).set_state(state.cpu())
