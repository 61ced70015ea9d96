"""The plan object: positions, momenta and masses of a parameter list, stepped at memory speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.weak import WeakIdKeyDictionary

from . import backends
from .conventions import fan_in_inverse_mass
from .ops.arguments import (
    check_alike,
    check_disjoint,
    check_float_tensors,
    finite,
    inv_mass_list,
    subclasses,
    tensor_list,
)
from .ops.kinetic_energy import kinetic_energy
from .ops.leapfrog import compose, drift_, kick_, kick_drift_, stage_sizes
from .reference import phase_space as reference

Scalar = float | Tensor
Grads = Sequence[Tensor | None]

# Units of the grid, relative to the scale of a tensor: its largest |x|, but at least 1/16 so that a
# small tensor may grow; 1 where all are zero. Integers stay below 2⁶²: q may grow to 2¹⁴ times its
# scale; p to 2²² times, as damping does not make its integers shrink. An increment stays below 2⁵¹.
UNIT_Q, UNIT_P = 2.0**-48, 2.0**-40


class Move(NamedTuple):
    """What one kick, drift or scaling did on the grid: all that its way back needs."""

    kind: str  # "kick", "drift" or "scale"
    step: float  # of the kick or the drift
    factor: float  # damp, or the factor of the scaling
    scale: float  # s before
    checksum: int  # of the increments of the kick


class PhaseSpace:
    """Positions q (the parameters), momenta p and masses M of a parameter list, as one plan.

        H = ½ pᵀM⁻¹p + L(q);  kick: p ← damp·p − step·∇L;  drift: q ← q + step·M⁻¹p

    The plan keeps the momenta and a table of addresses, so that a step costs the host little beyond
    the reading of `.grad`. Addresses are read anew at each step: `.grad` may be another tensor, or
    the parameter's data may have moved. A parameter of another shape, dtype, device or memory
    layout than when the plan was made is an error.

    With exact=True a walk can be taken back to the last bit. q and p live on grids of integers,

        q = u·Q + r,   p = s (v·P + r'),   u, v powers of two per tensor, s one number

    (Q, P int64; the remainders r, r' stay as they were at the start). A kick subtracts integers
    ⌊step/(s·v)·∇L⌉ from P, a drift adds integers ⌊step·s·(v/u)·M⁻¹·P⌉ to Q, so the opposite call
    can subtract the same; damping and `scale_momenta_` only touch s. The plan remembers its moves
    (five numbers each). A call that undoes the last one — the negative step, 1/damp, in reverse
    order — takes it back from there: the momentum and the position return to the bit. For a kick
    ∇L must be the same to the bit: a checksum of the increments tells, and the call raises and
    names the step where it is not. u is 2⁻⁴⁸ of the largest |q| of a tensor, v 2⁻⁴⁰ of the largest
    |p|, either at least 1/16, and 1 where all are zero. The bits are the same on every backend.

    Args:
        params: the positions q, a tensor or tensors; fp64, fp32, bf16 or fp16, one device. Leaves
            that require grad are fine: no step is recorded. Not copied.
        inv_mass: M⁻¹, the diagonal: "fan_in" (clip(1/√fan_in, 1/8, 8) for weights of two or more
            dimensions, 1 for all others), a float, one float per tensor, or tensors like params.
        momentum: "zeros", "gaussian" (p ~ N(0, M), by `seed`) or tensors like params (copied).
        momentum_dtype: torch.float32 or float64; None: float64 for fp64 parameters, else float32.
        exact: the reversible grid, at three times the memory of the momenta and at about twice
            the time of a step. It synchronises a GPU once per call.
        seed: of gaussian momenta and of stochastic rounding.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see `gti_kernels.explain`.

    Attributes:
        params, momenta: q and p, lists of tensors (with exact=True, momenta are made when read).
        inv_mass: list of floats, or of tensors. step_count: drifts so far, less those undone.

    Steps and factors are floats, or 0-d tensors (on a GPU: read there, without a sync). Arithmetic
    is fp64 if q or p is, else fp32; q of 16 bits is rounded stochastically, a function of seed,
    step_count, and the places of tensor and element, so that steps far below its precision count on
    average.

    Raises:
        TypeError, ValueError: argument, expectation, what came; nothing has been touched.
        RuntimeError: the plan is stale, or the way back leaves the way out. OverflowError: a
        coordinate would leave the grid. In both cases the state is as before the call.

    >>> import torch, gti_kernels as gti
    >>> q = torch.tensor([1.0, 2.0])
    >>> space = gti.PhaseSpace(q, inv_mass=1.0, exact=True)
    >>> space.kick_drift_(0.5, 1.0, grads=[q.clone()])  # p = −q/2, K = ½ p²
    tensor(0.6250, dtype=torch.float64)
    >>> q
    tensor([0.5000, 1.0000])
    >>> space.leapfrog_(torch.sin, 0.1, steps=50, damping=0.3)
    >>> space.leapfrog_(torch.sin, -0.1, steps=50, damping=0.3)
    >>> q, space.momenta
    (tensor([0.5000, 1.0000]), [tensor([-0.5000, -1.0000])])
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
        self._single = isinstance(params, Tensor)
        self.params: list[Tensor] = [params] if isinstance(params, Tensor) else list(params)
        check_float_tensors("PhaseSpace", params=self.params)
        if (reason := subclasses(params=self.params)) is not None:
            raise TypeError(f"PhaseSpace: {reason}. Pass plain tensors or parameters")
        check_disjoint("PhaseSpace", {"params": self.params}, {})
        if momentum_dtype not in (None, torch.float32, torch.float64):
            raise ValueError(
                f"PhaseSpace: momentum_dtype must be None, torch.float32 or torch.float64, got "
                f"{momentum_dtype!r}"
            )
        self.device = self.params[0].device if self.params else torch.device("cpu")
        backends.choose("kick_drift_", self.device, backend, {})  # refuses what cannot run
        self.seed, self.backend, self.exact = int(seed), backend, bool(exact)
        self.inv_mass = self._masses(inv_mass)
        self.step_count = 0
        self._layouts = [_layout(q) for q in self.params]
        dtypes = [
            momentum_dtype or (torch.float64 if q.dtype == torch.float64 else torch.float32)
            for q in self.params
        ]
        given = self._given_momenta(momentum)
        momenta, self._momentum_memory = _allocate(self.params, dtypes)
        for p, values in zip(momenta, given):
            p.copy_(values)
        self._engine: _Floats | _Grid
        self._engine = _Grid(self, momenta) if self.exact else _Floats(self, momenta)

    @property
    def momenta(self) -> list[Tensor]:
        """p, one tensor like each parameter."""
        return self._engine.momenta()

    def _masses(self, inv_mass: Any) -> list[Any]:
        if not isinstance(inv_mass, str):
            mass = inv_mass_list("PhaseSpace", inv_mass, self.params)
            for i, (w, q) in enumerate(zip(mass, self.params)):
                if isinstance(w, Tensor) and (w.shape != q.shape or w.device != q.device):
                    raise ValueError(
                        f"PhaseSpace: inv_mass[{i}] must have shape and device of params[{i}], "
                        f"{tuple(q.shape)} on {q.device}, got {tuple(w.shape)} on {w.device}"
                    )
            return mass
        if inv_mass != "fan_in":
            raise ValueError(
                f"PhaseSpace: inv_mass must be 'fan_in', numbers or tensors, got {inv_mass!r}"
            )
        return [fan_in_inverse_mass(q) for q in self.params]

    def _given_momenta(self, momentum: Any) -> list[Any]:
        if isinstance(momentum, str):
            if momentum == "zeros":
                return [torch.zeros(())] * len(self.params)
            if momentum == "gaussian":
                return self._drawn_momenta()
            raise ValueError(
                f"PhaseSpace: momentum must be 'zeros', 'gaussian' or tensors, got {momentum!r}"
            )
        given = tensor_list(momentum)
        check_float_tensors("PhaseSpace", params=self.params, momentum=given)
        if len(given) != len(self.params):
            raise ValueError(
                f"PhaseSpace: momentum must have one tensor for each of the {len(self.params)} "
                f"parameters, got {len(given)}"
            )
        for i, (p, q) in enumerate(zip(given, self.params)):
            if p.shape != q.shape:
                raise ValueError(
                    f"PhaseSpace: momentum[{i}] must have the shape of params[{i}], "
                    f"{tuple(q.shape)}, got {tuple(p.shape)}"
                )
        return [p.detach() for p in given]

    def _drawn_momenta(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = []
        for i, (q, w) in enumerate(zip(self.params, self.inv_mass)):
            wide = w.detach().double().cpu() if isinstance(w, Tensor) else torch.tensor(w).double()
            if not bool((wide > 0).all()):
                raise ValueError(
                    f"PhaseSpace: momentum='gaussian' needs inv_mass > 0 everywhere, inv_mass[{i}] "
                    f"is not"
                )
            noise = torch.randn(q.shape, generator=generator, dtype=torch.float64)
            drawn.append(noise / wide.sqrt())
        return drawn

    # ---- steps -----------------------------------------------------------------------------------

    def kick_(self, step: Scalar, *, damp: Scalar = 1.0, grads: Grads | None = None) -> None:
        """p ← damp·p − step·∇L.

        grads: ∇L, one tensor (or None) for each parameter, of its shape and dtype; by default the
        parameters' `.grad`. A parameter whose gradient is None keeps its momentum (with exact=True
        damping acts on it all the same: s is one number for all).
        """
        self._step("kick_", step, damp, None, grads)

    def drift_(self, step: Scalar) -> None:
        """q ← q + step·M⁻¹p."""
        self._step("drift_", None, 1.0, step, None)

    def kick_drift_(
        self, kick: Scalar, drift: Scalar, *, damp: Scalar = 1.0, grads: Grads | None = None
    ) -> Tensor:
        """`kick_`, then `drift_`, in one pass; returns ½ pᵀM⁻¹p of the new p, 0-d fp64 [energy].

        A parameter whose gradient is None is not kicked, but it drifts.
        """
        return self._step("kick_drift_", kick, damp, drift, grads)

    def kinetic_energy(self) -> Tensor:
        """K = ½ pᵀM⁻¹p, a 0-d fp64 tensor on the device."""
        p = self.momenta
        mass = [
            w.detach().to(x.dtype) if isinstance(w, Tensor) else w for w, x in zip(self.inv_mass, p)
        ]
        return kinetic_energy(p, inv_mass=mass, backend=self.backend)

    def scale_momenta_(self, factor: Scalar) -> None:
        """p ← factor·p. With exact=True factor must be positive: it goes into s."""
        self._engine.scale_(self._scalar("scale_momenta_", "factor", factor))

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
        """`steps` steps of `gti_kernels.leapfrog_` with this plan's q and p; same arguments.

        grad_fn is called with params as they were given: a tensor, or the list. With exact=True
        the two half kicks that meet between steps stay two moves, so that T steps in one call and
        T calls of one step can undo each other; they still share their gradient.
        """
        sizes = stage_sizes("leapfrog_", dt, steps, order, composition)
        q = self.params[0] if self._single else self.params

        def gradient() -> list[Tensor]:
            found = tensor_list(grad_fn(q))
            return [g.clone() if g is x else g for g, x in zip(found, self.params)] + found[
                len(self.params) :
            ]

        compose(
            sizes,
            finite("leapfrog_", "damping", damping),
            gradient,
            lambda g, kick, drift, damp: self.kick_drift_(kick, drift, damp=damp, grads=g),
            lambda g, kick, damp: self.kick_(kick, damp=damp, grads=g),
            merged=not self.exact,
        )

    def _step(
        self,
        op: str,
        kick: Scalar | None,
        damp: Scalar,
        drift: Scalar | None,
        grads: Grads | None,
    ) -> Tensor:
        if kick is not None:
            kick, damp = self._scalar(op, "kick", kick), self._scalar(op, "damp", damp)
        if drift is not None:
            drift = self._scalar(op, "drift", drift)
        if grads is not None and not isinstance(grads, list):
            grads = tensor_list(grads)  # type: ignore[arg-type]
        return self._engine.step(op, kick, damp, drift, grads)

    def _scalar(self, op: str, name: str, x: Scalar) -> Any:
        """A finite float, or the 0-d tensor where reading it would wait for a device."""
        if isinstance(x, Tensor) and x.ndim == 0 and not x.requires_grad:
            if x.device.type != "cpu" and not self.exact:
                return x
            x = float(x)
        return finite(op, name, x)

    # ---- checks ----------------------------------------------------------------------------------

    def checked_gradients(self, op: str, grads: Grads | None) -> list[Tensor | None]:
        """The gradients, each laid out like its parameter. Raises where the plan is stale or a
        gradient is not what it must be."""
        self.check_layouts(op)
        every = [q.grad for q in self.params] if grads is None else list(grads)
        if len(every) != len(self.params):
            raise ValueError(
                f"{op}: grads must have one entry for each of the {len(self.params)} parameters, "
                f"got {len(every)}"
            )
        there = {i: g for i, g in enumerate(every) if g is not None}
        for i, g in there.items():
            q = self.params[i]
            if isinstance(g, Tensor) and g.layout != torch.strided:
                raise TypeError(
                    f"{op}: the gradient of params[{i}] must be dense, got layout {g.layout}. "
                    f"Make the layer with sparse=False, or pass grads made with .to_dense()"
                )
            check_float_tensors(op, grads=[g])
            if g.shape != q.shape or g.dtype != q.dtype or g.device != q.device:
                raise ValueError(
                    f"{op}: the gradient of params[{i}] must have its shape, dtype and device, "
                    f"{_words(_layout(q))}, got {_words(_layout(g))}"
                )
        written = {"params": self.params, "momenta": self._momentum_memory}
        check_disjoint(op, written, {"grads": list(there.values())})
        return [
            None if g is None else _laid_out_like(q, g.detach()) for q, g in zip(self.params, every)
        ]

    def check_layouts(self, op: str) -> None:
        """Raises where a parameter is not what it was when the plan was made."""
        for i, (q, layout) in enumerate(zip(self.params, self._layouts, strict=True)):
            now = _layout(q)
            freed = q.numel() > 0 and q.untyped_storage().nbytes() == 0
            if now != layout or freed:
                raise RuntimeError(
                    f"{op}: the plan is stale: params[{i}] was {_words(layout)} and is now "
                    f"{'without memory' if freed else _words(now)}. Make a new PhaseSpace"
                )

    def wrote(self, *, q: bool, p: bool) -> None:
        """Tells autograd what has been written."""
        if q:
            increment_version(self.params)
        if p:
            increment_version(self._momentum_memory)

    # ---- saving ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Momenta, counters and, with exact=True, the grid and the moves; all as copies. The
        positions are the model's own to save; with exact=True they are here too."""
        return {"step_count": self.step_count, "seed": self.seed, **self._engine.state()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, to the bit."""
        if ("Q" in state) != self.exact:
            raise ValueError(
                f"load_state_dict: the state of a plan with exact={'Q' in state} does not fit one "
                f"with exact={self.exact}"
            )
        saved = state["Q"] if self.exact else state["momenta"]
        shapes = [tuple(x.shape) for x in saved]
        if shapes != [tuple(q.shape) for q in self.params]:
            raise ValueError(
                f"load_state_dict: expected momenta of shapes "
                f"{[tuple(q.shape) for q in self.params]}, got {shapes}"
            )
        self._engine.load(state)
        self.step_count, self.seed = state["step_count"], state["seed"]


# The plans behind leapfrog_(exact=True) by the first tensor of p, as long as that lives, each with
# what it was made of and the versions of q and p after its last step.
_walks: WeakIdKeyDictionary = WeakIdKeyDictionary()


def exact_leapfrog_(
    q: Tensor | Sequence[Tensor],
    p: Tensor | Sequence[Tensor],
    inv_mass: Any,
    backend: str,
    walk: Callable[[PhaseSpace], None],
) -> None:
    """`walk` with the plan of q and p: that of the last such call if nobody else has written q or p
    since, else a new one."""
    qs, ps = tensor_list(q), tensor_list(p)
    check_alike("leapfrog_", q=qs, p=ps)
    check_disjoint("leapfrog_", {"q": qs, "p": ps}, {})
    mass = inv_mass_list("leapfrog_", inv_mass, qs)
    if not ps:
        return

    def signature() -> Any:
        tensors = [(id(x), x._version) for x in (*qs, *ps)]
        masses = [id(w) if isinstance(w, Tensor) else w for w in mass]
        return tensors, masses, backend, isinstance(q, Tensor)

    space, known = _walks.get(ps[0], (None, None))
    if space is None or known != signature():
        space = PhaseSpace(
            q,
            inv_mass=inv_mass,
            momentum=ps,
            momentum_dtype=torch.float64,
            exact=True,
            backend=backend,
        )
    try:
        walk(space)
    finally:
        with torch.no_grad():
            for x, exact in zip(ps, space.momenta, strict=True):
                x.copy_(exact)
        _walks[ps[0]] = space, signature()


class _Floats:
    """Steps on floating-point numbers."""

    def __init__(self, space: PhaseSpace, momenta: list[Tensor]) -> None:
        self.space, self.p = space, momenta
        self.mass = [
            _laid_out_like(q, w.detach().to(p.dtype)) if isinstance(w, Tensor) else w
            for q, p, w in zip(space.params, momenta, space.inv_mass)
        ]
        self.plan = None
        if _compiled(space):
            owned = [*space._momentum_memory, *(w for w in self.mass if isinstance(w, Tensor))]
            self.plan = backends.compiled.PhasePlan(  # type: ignore[union-attr]
                space.params, momenta, self.mass, owned
            )
        else:
            self.kernels = _kernels(space)

    def momenta(self) -> list[Tensor]:
        return self.p

    def step(self, op: str, kick: Any, damp: Any, drift: Any, grads: Any) -> Tensor:
        space = self.space
        kicks, drifts = kick is not None, drift is not None
        kick, drift = kick if kicks else 0.0, drift if drifts else 0.0
        key = (
            space.seed * 0x9E3779B97F4A7C15 + space.step_count * reference.STEP_KEY
        ) & reference.MASK
        energy = None
        if self.plan is not None:
            numbers = (kicks, drifts, kick, damp, drift, key, torch.get_num_threads())
            energy = self.plan.step(grads, *numbers)
        if energy is None:
            with torch.no_grad():
                if kicks:
                    grads = space.checked_gradients(op, grads)
                else:
                    space.check_layouts(op)
                    grads = [None] * len(space.params)
                if self.plan is None:
                    energy = self._elsewhere(kicks, drifts, kick, damp, drift, grads, key)
                else:
                    energy = self.plan.step(grads, *numbers)
        if energy is None:
            raise RuntimeError(
                f"{op}: the plan is stale: the memory of its momenta or masses has moved. Make a "
                f"new PhaseSpace"
            )
        space.wrote(q=drifts, p=kicks)
        space.step_count += drifts
        return energy

    def _elsewhere(
        self,
        kicks: bool,
        drifts: bool,
        kick: Any,
        damp: Any,
        drift: Any,
        grads: list[Tensor | None],
        key: int,
    ) -> Tensor:
        """Without a compiled plan: the ops where they take these tensors, else plain torch."""
        q, p, backend = self.space.params, self.p, self.space.backend
        same = isinstance(self.kernels, ModuleType) and all(
            x.dtype == y.dtype for x, y in zip(q, p)
        )
        floats = not any(isinstance(x, Tensor) for x in (kick, damp, drift))
        if same and floats and not (kicks and None in grads):
            options: dict[str, Any] = {"inv_mass": self.mass, "backend": backend}
            if kicks and drifts:
                return kick_drift_(q, p, grads, kick, drift, damp=damp, **options)  # type: ignore[arg-type]
            if kicks:
                kick_(p, grads, kick, damp=damp, backend=backend)  # type: ignore[arg-type]
            else:
                drift_(q, p, drift, **options)
            return torch.zeros((), dtype=torch.float64, device=self.space.device)
        return self.kernels.phase_step(
            q, p, grads, self.mass, kicks, drifts, kick, damp, drift, key
        )

    def scale_(self, factor: Any) -> None:
        if self.p:
            torch._foreach_mul_(self.p, factor)

    def state(self) -> dict[str, Any]:
        return {"momenta": [p.clone() for p in self.p]}

    def load(self, state: dict[str, Any]) -> None:
        for p, saved in zip(self.p, state["momenta"]):
            p.copy_(saved)


class _Grid:
    """Steps on a grid of integers, which can be taken back."""

    def __init__(self, space: PhaseSpace, momenta: list[Tensor]) -> None:
        self.space = space
        self.scale = 1.0  # s
        self.moves: list[Move] = []
        self.dtypes = [p.dtype for p in momenta]
        q = [x.detach() for x in space.params]
        self.unit_q = [_unit(x, UNIT_Q) for x in q]
        self.unit_p = [_unit(x, UNIT_P) for x in momenta]
        self._allocate()
        with torch.no_grad():
            for grid, x, unit in zip([*self.Q, *self.P], [*q, *momenta], self._units()):
                grid.copy_((x.double() / unit).round())
            self.rest_q = _remainders(q, self.Q, self.unit_q)
            self.rest_p = _remainders(momenta, self.P, self.unit_p)
        space._momentum_memory = self.memory
        self._make_plan()

    def _units(self) -> list[float]:
        return [*self.unit_q, *self.unit_p]

    def _allocate(self) -> None:
        q = self.space.params
        both, self.memory = _allocate([*q, *q], [torch.int64] * (2 * len(q)))
        self.Q, self.P = both[: len(q)], both[len(q) :]

    def _make_plan(self) -> None:
        space = self.space
        self.mass = [
            _laid_out_like(q, w.detach().double()) if isinstance(w, Tensor) else w
            for q, w in zip(space.params, space.inv_mass)
        ]
        self.versions = self._versions()
        self.plan = None
        if _compiled(space):
            bits = [x.view(torch.float64) for x in (*self.Q, *self.P)]  # what bindings can see
            n = len(self.Q)
            owned = [x.view(torch.float64) for x in self.memory]
            owned += [x for x in (*self.mass, *self.rest_q) if isinstance(x, Tensor)]
            self.plan = backends.compiled.GridPlan(  # type: ignore[union-attr]
                space.params,
                bits[:n],
                bits[n:],
                self.rest_q,
                self.mass,
                owned,
                self.unit_q,
                self.unit_p,
            )
        else:
            self.kernels = _kernels(space)

    def momenta(self) -> list[Tensor]:
        out = []
        for P, r, v, dtype in zip(self.P, self.rest_p, self.unit_p, self.dtypes):
            wide = v * P.double()
            out.append((self.scale * (wide if r is None else wide + r.double())).to(dtype))
        return out

    # ---- moves -----------------------------------------------------------------------------------

    def step(self, op: str, kick: Any, damp: Any, drift: Any, grads: Any) -> Tensor:
        self._check_versions(op)
        if kick is not None and damp <= 0.0:
            raise ValueError(f"{op}: damp must be positive with exact=True, got {damp}")
        back_kick = kick is not None and self._undoes_kick(kick, damp)
        below = -2 if back_kick else -1
        back_drift = drift is not None and self._is(below, "drift", -drift)
        if kick is not None and not back_kick:
            back_drift = False  # the kick will be the last move
        if kick is None or drift is None or back_kick == back_drift:
            return self._move(op, kick, damp, drift, grads, back_kick or back_drift)
        self._move(op, kick, damp, None, grads, back_kick)
        return self._move(op, None, 1.0, drift, None, back_drift)

    def _is(self, index: int, kind: str, step: float) -> bool:
        """Whether the last move, or the one before it, was of this kind and step."""
        if len(self.moves) < -index or self.moves[index].kind != kind:
            return False
        return math.isclose(self.moves[index].step, step, rel_tol=1e-9)

    def _undoes_kick(self, kick: float, damp: float) -> bool:
        """p ← (p + k·∇L)/c undoes p ← c·p − k·∇L."""
        return self._is(-1, "kick", -kick / damp) and math.isclose(
            self.moves[-1].factor, 1.0 / damp, rel_tol=1e-9
        )

    def _move(self, op: str, kick: Any, damp: Any, drift: Any, grads: Any, back: bool) -> Tensor:
        """One pass, all of it forward or all of it back."""
        kicks, drifts = kick is not None, drift is not None
        before, known = self.scale, None
        if back:
            # The numbers of the way out, not those of the call, which are rounded.
            if kicks:
                known = self.moves[-1]
                kick, after = known.step / self.scale, known.scale
            else:
                after = self.scale
            if drifts:
                drift = self.moves[-2 if kicks else -1].step * after
        else:
            after = self.scale * damp if kicks else self.scale
            if kicks and not 1e-250 < after < 1e250:
                raise OverflowError(_overflow(op, "the factor s of the momenta", f"{after:g}"))
            step_kick, step_drift = kick, drift
            kick = kick / after if kicks else 0.0
            drift = drift * after if drifts else 0.0
        kick, drift = kick if kicks else 0.0, drift if drifts else 0.0
        if kicks and grads is None:
            grads = [q.grad for q in self.space.params]  # held: a failed step reads them again
        checksum, inside, energy = self._pass(op, kicks, drifts, back, kick, drift, after, grads)
        if (known is not None and checksum != known.checksum) or (not back and not inside):
            if drifts:
                self._pass(op, False, True, not back, 0.0, drift, after, None)
            if kicks:
                self._pass(op, True, False, not back, kick, 0.0, after, grads)
            self.space.wrote(q=drifts, p=kicks)
            self.versions = self._versions()
            if not back:
                raise OverflowError(_overflow(op, "a coordinate or an increment", "too large"))
            raise RuntimeError(
                f"{op}: the way back leaves the way out at step {self.space.step_count}: the "
                f"gradient there is not the same to the bit. Use the same batch, random state and "
                f"buffers, and torch.use_deterministic_algorithms(True)"
            )
        self.scale = after
        if back:
            del self.moves[-(kicks + drifts) :]
            self.space.step_count -= drifts
        else:
            if kicks:
                self.moves.append(Move("kick", step_kick, damp, before, checksum))
            if drifts:
                self.moves.append(Move("drift", step_drift, 1.0, after, 0))
            self.space.step_count += drifts
        self.space.wrote(q=drifts, p=kicks)
        self.versions = self._versions()
        return energy

    def _pass(
        self,
        op: str,
        kicks: bool,
        drifts: bool,
        back: bool,
        kick: float,
        drift: float,
        scale: float,
        grads: Any,
    ) -> tuple[int, bool, Tensor]:
        numbers = (kicks, drifts, back, kick, drift, scale)
        space, result = self.space, None
        if self.plan is not None:
            result = self.plan.step(grads, *numbers, torch.get_num_threads())
        if result is not None:
            return result
        with torch.no_grad():
            if kicks:
                grads = space.checked_gradients(op, grads)
            else:
                space.check_layouts(op)
                grads = [None] * len(space.params)
            if self.plan is None:
                result = self.kernels.grid_step(
                    space.params,
                    self.rest_q,
                    self.Q,
                    self.P,
                    grads,
                    self.mass,
                    self.unit_q,
                    self.unit_p,
                    *numbers,
                )
                if result is not None:
                    checksum, inside, energy = result
                    return int(checksum) & reference.MASK, bool(inside), energy
            else:
                result = self.plan.step(grads, *numbers, torch.get_num_threads())
        if result is None:
            raise RuntimeError(
                f"{op}: the plan is stale: the memory of its grid has moved. Make a new PhaseSpace"
            )
        return result

    def scale_(self, factor: float) -> None:
        last = self.moves[-1] if self.moves else None
        if not factor > 0.0:
            raise ValueError(f"scale_momenta_: factor must be positive, got {factor}")
        if last and last.kind == "scale" and math.isclose(last.factor, 1 / factor, rel_tol=1e-9):
            self.scale = self.moves.pop().scale
            return
        if not 1e-250 < self.scale * factor < 1e250:
            raise OverflowError(
                _overflow("scale_momenta_", "the factor s of the momenta", f"{self.scale * factor}")
            )
        self.moves.append(Move("scale", 0.0, factor, self.scale, 0))
        self.scale *= factor

    # ---- what others wrote -----------------------------------------------------------------------

    def _versions(self) -> list[int]:
        return [0 if q.is_inference() else q._version for q in self.space.params]

    def _check_versions(self, op: str) -> None:
        versions = self._versions()
        if versions != self.versions:
            i = next(i for i, (a, b) in enumerate(zip(versions, self.versions)) if a != b)
            raise RuntimeError(
                f"{op}: the plan is stale: params[{i}] was written since the last step, but with "
                f"exact=True its grid holds the position. Make a new PhaseSpace"
            )

    # ---- saving ----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        def copies(xs: Sequence[Tensor | None]) -> list[Tensor | None]:
            return [None if x is None else x.clone() for x in xs]

        return {
            "Q": copies(self.Q),
            "P": copies(self.P),
            "rest_q": copies(self.rest_q),
            "rest_p": copies(self.rest_p),
            "unit_q": list(self.unit_q),
            "unit_p": list(self.unit_p),
            "scale": self.scale,
            "moves": [tuple(m) for m in self.moves],
        }

    def load(self, state: dict[str, Any]) -> None:
        self.unit_q, self.unit_p = list(state["unit_q"]), list(state["unit_p"])
        self.scale, self.moves = state["scale"], [Move(*m) for m in state["moves"]]
        for grid, saved in zip([*self.Q, *self.P], [*state["Q"], *state["P"]]):
            grid.copy_(saved)
        params = self.space.params
        self.rest_q, self.rest_p = (
            [
                None if r is None else torch.empty_like(q, dtype=r.dtype).copy_(r)
                for q, r in zip(params, state[name])
            ]
            for name in ("rest_q", "rest_p")
        )
        for q, Q, r, u in zip(params, self.Q, self.rest_q, self.unit_q):
            wide = u * Q.double()
            q.copy_(reference.by_way_of_fp32(wide if r is None else wide + r.double(), q.dtype))
        self._make_plan()


def _compiled(space: PhaseSpace) -> bool:
    """Whether the compiled CPU kernels take this plan."""
    return (
        backends.compiled is not None
        and space.device.type == "cpu"
        and space.backend in ("auto", "cpu")
        and all(_is_dense(q) for q in space.params)
    )


def _kernels(space: PhaseSpace) -> Any:
    """Where there is no compiled plan: what has the functions phase_step and grid_step, a module or
    the plan's own tables for them."""
    chosen = backends.choose("kick_drift_", space.device, space.backend, {})
    dense = all(_is_dense(q) for q in space.params)
    if dense and chosen == "cuda":
        from .cuda_kernels.phase_space import Plan

        return Plan()
    if dense and chosen == "triton":
        from .triton_kernels import phase_space as triton

        return triton
    return reference


def _is_dense(q: Tensor) -> bool:
    return not q.is_neg() and torch.empty_like(q, device="meta").stride() == q.stride()


def _layout(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), x.stride(), x.dtype, x.device


def _words(layout: tuple[Any, ...]) -> str:
    shape, stride, dtype, device = layout
    return f"{shape} with strides {stride} of {dtype} on {device}"


def _laid_out_like(q: Tensor, x: Tensor) -> Tensor:
    """x with the strides of q, so that a kernel can walk through both as flat memory."""
    if x.stride() == q.stride() and not x.is_neg():
        return x
    return torch.empty_like(q, dtype=x.dtype, requires_grad=False).copy_(x)


def _allocate(
    like: Sequence[Tensor], dtypes: Sequence[torch.dtype]
) -> tuple[list[Tensor], list[Tensor]]:
    """One zeroed tensor like each, in the dtypes given, as views of one memory per dtype; and
    these memories. Views share their version counter, so autograd is told of a step once."""
    ends: dict[torch.dtype, int] = {}
    starts = []
    for x, dtype in zip(like, dtypes):
        start = -(-ends.get(dtype, 0) // 16) * 16  # on a boundary of 64 bytes or more
        starts.append(start)
        ends[dtype] = start + x.numel()
    device = like[0].device if like else None
    memory = {d: torch.zeros(n, dtype=d, device=device) for d, n in ends.items()}
    views = [
        memory[d].as_strided(x.shape, torch.empty_like(x, device="meta").stride(), start)
        for x, d, start in zip(like, dtypes, starts)
    ]
    return views, list(memory.values())


def _unit(x: Tensor, relative: float) -> float:
    """A power of two: `relative` times the scale of x, rounded up to one."""
    largest = float(x.abs().max()) if x.numel() else 0.0
    if not math.isfinite(largest):
        raise ValueError(
            "PhaseSpace: exact=True needs finite positions and momenta, got NaN or inf"
        )
    scale = max(largest, 0.0625) if largest > 0 else 1.0
    return 2.0 ** math.ceil(math.log2(scale)) * relative


def _remainders(
    xs: Sequence[Tensor], grids: Sequence[Tensor], units: Sequence[float]
) -> list[Tensor | None]:
    """x − unit·grid, which is exact, or None where it is zero everywhere."""
    rest = [(x.double() - u * g.double()) for x, g, u in zip(xs, grids, units)]
    return [torch.empty_like(x).copy_(r) if bool(r.any()) else None for x, r in zip(xs, rest)]


def _overflow(op: str, what: str, value: str) -> str:
    return (
        f"{op}: {what} would leave the grid of exact=True ({value}); the state is as before. Take "
        f"a smaller dt or less damping, or start a new PhaseSpace from here"
    )
