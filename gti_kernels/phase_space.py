"""The plan object: positions, momenta and masses of a parameter list, stepped at memory speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .ops.arguments import check_disjoint, check_float_tensors, finite, inv_mass_list, tensor_list
from .ops.kinetic_energy import kinetic_energy
from .ops.leapfrog import compose, drift_, kick_, kick_drift_, stage_sizes
from .probes.hamiltonian_system import fan_in_inverse_mass

Scalar = float | Tensor


class PhaseSpace:
    """Positions q (the parameters), momenta p and masses M of a parameter list, as one plan.

        H = ½ pᵀM⁻¹p + L(q);  kick: p ← damp·p − step·∇L;  drift: q ← q + step·M⁻¹p

    Args:
        params: the positions q, a tensor or tensors; leaves that require grad are fine. Not copied.
        inv_mass: M⁻¹, the diagonal: "fan_in" (clip(1/√fan_in, 1/8, 8) for weights of two or more
            dimensions, 1 for all others), a float, one float per tensor, or tensors like params.
        momentum: "zeros", "gaussian" (p ~ N(0, M), by `seed`) or tensors like params (copied).
        momentum_dtype: torch.float32 or float64; None: float64 for fp64 parameters, else float32.
        exact: bit-exact reversal.
        backend: "auto", "reference", "cpu" or "triton"; see `gti_kernels.explain`.

    Attributes:
        params, momenta: q and p, lists of tensors. inv_mass: list of floats, or of tensors.

    Raises:
        TypeError, ValueError: argument, expectation, what came; nothing has been touched.

    >>> import torch, gti_kernels as gti
    >>> q = torch.tensor([1.0, 2.0])
    >>> space = gti.PhaseSpace(q, inv_mass=1.0)
    >>> space.kick_drift_(0.5, 1.0, grads=[q.clone()])  # p = −q/2, K = ½ p²
    tensor(0.6250, dtype=torch.float64)
    >>> q
    tensor([0.5000, 1.0000])
    """

    def __init__(
        self,
        params: Tensor | Iterable[Tensor],
        *,
        inv_mass: str | float | Sequence[float] | Tensor | Sequence[Tensor] = "fan_in",
        momentum: str | Tensor | Sequence[Tensor] = "zeros",
        momentum_dtype: torch.dtype | None = None,
        exact: bool = False,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        if exact:
            raise NotImplementedError("PhaseSpace: exact=True is not there yet")
        self._single = isinstance(params, Tensor)
        self.params: list[Tensor] = [params] if isinstance(params, Tensor) else list(params)
        check_float_tensors("PhaseSpace", params=self.params)
        check_disjoint("PhaseSpace", {"params": self.params}, {})
        if momentum_dtype not in (None, torch.float32, torch.float64):
            raise ValueError(
                f"PhaseSpace: momentum_dtype must be None, torch.float32 or torch.float64, got "
                f"{momentum_dtype!r}"
            )
        if isinstance(inv_mass, str):
            if inv_mass != "fan_in":
                raise ValueError(
                    f"PhaseSpace: inv_mass must be 'fan_in', numbers or tensors, got {inv_mass!r}"
                )
            self.inv_mass: list[Any] = [
                fan_in_inverse_mass(q) if q.numel() else 1.0 for q in self.params
            ]
        else:
            self.inv_mass = inv_mass_list("PhaseSpace", inv_mass, self.params)
        self.seed, self.backend, self.exact = int(seed), backend, exact
        self.step_count = 0  #: drifts so far; one of the keys of stochastic rounding
        self.momenta: list[Tensor] = self._initial_momenta(momentum, momentum_dtype)

    def _initial_momenta(self, momentum: Any, dtype: torch.dtype | None) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        momenta = []
        given = None if isinstance(momentum, str) else tensor_list(momentum)
        if given is None and momentum not in ("zeros", "gaussian"):
            raise ValueError(
                f"PhaseSpace: momentum must be 'zeros', 'gaussian' or tensors, got {momentum!r}"
            )
        if given is not None:
            check_float_tensors("PhaseSpace", params=self.params, momentum=given)
            if len(given) != len(self.params):
                raise ValueError(
                    f"PhaseSpace: momentum must have one tensor for each of the "
                    f"{len(self.params)} parameters, got {len(given)}"
                )
        for i, q in enumerate(self.params):
            wide = dtype or (torch.float64 if q.dtype == torch.float64 else torch.float32)
            p = torch.zeros_like(q, dtype=wide, requires_grad=False)  # of the layout of q
            if given is not None:
                if given[i].shape != q.shape:
                    raise ValueError(
                        f"PhaseSpace: momentum[{i}] must have the shape of params[{i}], "
                        f"{tuple(q.shape)}, got {tuple(given[i].shape)}"
                    )
                p.copy_(given[i].detach())
            elif momentum == "gaussian":
                w = self.inv_mass[i]
                noise = torch.randn(q.shape, generator=generator, dtype=torch.float64)
                if isinstance(w, Tensor):
                    noise = noise / w.detach().double().cpu().sqrt()
                elif w > 0:
                    noise = noise / math.sqrt(w)
                else:
                    raise ValueError(
                        f"PhaseSpace: momentum='gaussian' needs inv_mass > 0, got {w} for "
                        f"params[{i}]"
                    )
                p.copy_(noise)
            momenta.append(p)
        return momenta

    # ---- steps -----------------------------------------------------------------------------------

    @torch.no_grad()
    def kick_(
        self, step: Scalar, *, damp: Scalar = 1.0, grads: Sequence[Tensor | None] | None = None
    ) -> None:
        """p ← damp·p − step·∇L.

        grads: ∇L, one tensor (or None) for each parameter; by default the parameters' `.grad`. A
        parameter whose gradient is None keeps its momentum.
        """
        which, found = self._gradients("kick_", grads)
        p = [self.momenta[i] for i in which]
        kick_(p, found, _scalar("kick_", "step", step), damp=_scalar("kick_", "damp", damp))

    @torch.no_grad()
    def drift_(self, step: Scalar) -> None:
        """q ← q + step·M⁻¹p."""
        self._drift(_scalar("drift_", "step", step), range(len(self.params)))

    @torch.no_grad()
    def kick_drift_(
        self,
        kick: Scalar,
        drift: Scalar,
        *,
        damp: Scalar = 1.0,
        grads: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """`kick_`, then `drift_`, in one pass; returns ½ pᵀM⁻¹p of the new p, 0-d fp64.

        A parameter whose gradient is None is not kicked, but it drifts.
        """
        which, found = self._gradients("kick_drift_", grads)
        h, d = _scalar("kick_drift_", "kick", kick), _scalar("kick_drift_", "drift", drift)
        c = _scalar("kick_drift_", "damp", damp)
        if len(which) == len(self.params) and not self._mixed():
            return kick_drift_(
                self.params,
                self.momenta,
                found,
                h,
                d,
                inv_mass=self.inv_mass,
                damp=c,
                backend=self.backend,
            )
        kick_([self.momenta[i] for i in which], found, h, damp=c, backend=self.backend)
        self._drift(d, range(len(self.params)))
        return self.kinetic_energy()

    @torch.no_grad()
    def kinetic_energy(self) -> Tensor:
        """K = ½ pᵀM⁻¹p, a 0-d fp64 tensor on the device."""
        mass = [
            w.to(p.dtype) if isinstance(w, Tensor) else w
            for w, p in zip(self.inv_mass, self.momenta)
        ]
        return kinetic_energy(self.momenta, inv_mass=mass, backend=self.backend)

    @torch.no_grad()
    def scale_momenta_(self, factor: Scalar) -> None:
        """p ← factor·p."""
        torch._foreach_mul_(self.momenta, factor)

    def leapfrog_(
        self,
        grad_fn: Callable[[Any], Any],
        dt: float,
        *,
        steps: int = 1,
        damping: float = 0.0,
        order: int = 2,
        composition: str = "yoshida",
    ) -> None:
        """`steps` steps of `gti_kernels.leapfrog_` with this plan's positions and momenta."""
        sizes = stage_sizes("leapfrog_", dt, steps, order, composition)
        q = self.params[0] if self._single else self.params

        def gradient() -> list[Tensor]:
            return [
                g.clone() if g is x else g for g, x in zip(tensor_list(grad_fn(q)), self.params)
            ]

        compose(
            sizes,
            finite("leapfrog_", "damping", damping),
            gradient,
            lambda g, kick, drift, damp: self.kick_drift_(kick, drift, damp=damp, grads=g),
            lambda g, kick, damp: self.kick_(kick, damp=damp, grads=g),
        )

    # ---- saving ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Momenta and counters; the positions are the model's own."""
        return {"momenta": [p.clone() for p in self.momenta], "step_count": self.step_count}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, to the bit."""
        for mine, saved in zip(self.momenta, state["momenta"], strict=True):
            mine.copy_(saved)
        self.step_count = state["step_count"]

    # ---- pieces ----------------------------------------------------------------------------------

    def _mixed(self) -> bool:
        return any(q.dtype != p.dtype for q, p in zip(self.params, self.momenta))

    def _drift(self, step: float, which: Iterable[int]) -> None:
        self.step_count += 1
        if not self._mixed():
            drift_(self.params, self.momenta, step, inv_mass=self.inv_mass, backend=self.backend)
            return
        for i in which:
            q, p, w = self.params[i], self.momenta[i], self.inv_mass[i]
            q.copy_(q.to(p.dtype) + step * w * p)

    def _gradients(
        self, op: str, grads: Sequence[Tensor | None] | None
    ) -> tuple[list[int], list[Tensor]]:
        """Which parameters have a gradient, and those gradients in the dtype of their momenta."""
        every = [q.grad for q in self.params] if grads is None else tensor_list(grads)  # type: ignore[arg-type]
        if len(every) != len(self.params):
            raise ValueError(
                f"{op}: grads must have one entry for each of the {len(self.params)} parameters, "
                f"got {len(every)}"
            )
        which, found = [], []
        for i, g in enumerate(every):
            if g is None:
                continue
            if g.layout != torch.strided:
                raise TypeError(
                    f"{op}: the gradient of params[{i}] must be dense, got layout {g.layout}. Use "
                    f"an embedding with sparse=False, or pass grads with .to_dense()"
                )
            if g.shape != self.params[i].shape:
                raise ValueError(
                    f"{op}: the gradient of params[{i}] must have its shape, "
                    f"{tuple(self.params[i].shape)}, got {tuple(g.shape)}"
                )
            which.append(i)
            found.append(g.detach().to(self.momenta[i].dtype))
        return which, found


def _scalar(op: str, name: str, x: Scalar) -> float:
    return float(x) if isinstance(x, Tensor) and x.ndim == 0 else finite(op, name, x)
