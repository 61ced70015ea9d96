"""The plan object: positions, momenta and masses of a parameter list, stepped at memory speed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, get_num_threads
from torch.autograd.graph import increment_version
from torch.utils.weak import WeakIdKeyDictionary

from . import backends, device_plans
from .conventions import fan_in_inverse_mass
from .exact_grid import Grid, missing, versions
from .exact_moves import Move
from .interrupts import Uninterrupted
from .layouts import allocate, is_dense, laid_out_like, layout, words
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
from .ops.leapfrog import compose, stage_sizes
from .reference import phase_space as reference

Scalar = float | Tensor
Grads = Sequence[Tensor | None]


class PhaseSpace:
    """Positions q (the parameters), momenta p and masses M of a parameter list, as one plan.

        H = ½ pᵀM⁻¹p + L(q);  kick: p ← damp·p − step·∇L;  drift: q ← q + step·M⁻¹p

    The plan keeps the momenta and a table of addresses, so that a step costs the host little beyond
    the reading of `.grad`, on every device. Addresses are read anew at each step: `.grad` may be
    another tensor, or the parameter's data may have moved; a GPU gets those that have changed. A
    parameter of another shape, dtype, device or memory layout than when the plan was made is an
    error.

    With exact=True a walk can be taken back to the last bit. q and p live on grids of integers,

        q = u·Q + r,   p = s (v·P + r'),   u, v powers of two per tensor, s one number

    (Q, P int64; the remainders r, r' stay as they were at the start). A kick subtracts integers
    ⌊step/(s·v)·∇L⌉ from P, a drift adds integers ⌊step·s·(v/u)·M⁻¹·P⌉ to Q, so the opposite call
    can subtract the same; damping and `scale_momenta_` only touch s. The plan remembers its moves:
    10 bytes a step at constant dt and damping, 8 more for each number that changes. A call that
    undoes the last move — the negative step, 1/damp, in reverse order — takes it back from there:
    the momentum and the position return to the bit. For a kick ∇L must be the same to the bit, and
    None for the same parameters: a checksum of the increments tells, and the call raises and names
    the step where it is not. u is 2⁻⁴⁸ of the largest |q| of a tensor, v 2⁻⁴⁰ of the largest
    |p|, either at least 1/16, and 1 where all are zero. One move may change Q and P by less than
    2⁵¹ (8 of these sizes of q, 2048 of p), and they stay within ±2⁶². The bits are the same on
    every backend.

    Args:
        params: the positions q, a tensor or tensors; fp64, fp32, bf16 or fp16, one device. Leaves
            that require grad are fine: no step is recorded. Not copied.
        inv_mass: M⁻¹, the diagonal: "fan_in" (clip(1/√fan_in, 1/8, 8) for weights of two or more
            dimensions, 1 for all others), a float, one float per tensor, or tensors like params.
        momentum: "zeros", "gaussian" (p ~ N(0, M), by `seed`) or tensors like params (copied).
        momentum_dtype: torch.float32 or float64; None: float64 for fp64 parameters, else float32.
        exact: the reversible grid, at three times the memory of the momenta and at about twice
            the time of a step. It waits for a GPU once per call: the host keeps the checksum of a
            kick, and a step that overflows is taken back before anything else can run on it.
        seed: of gaussian momenta and of stochastic rounding.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see `gti_kernels.explain`.

    Attributes:
        params, momenta: q and p, lists of tensors (with exact=True, momenta are made when read).
        inv_mass: list of floats, or of tensors. step_count: drifts so far, less those undone.
        skipped: places of the parameters whose gradient was None in the last kick.

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
        self.stages = 1  # drifts of a step, as errors count steps
        self.takes_back = True  # with exact: whether a call that undoes the last move takes it back
        self._layouts = [layout(q) for q in self.params]
        dtypes = [
            momentum_dtype or (torch.float64 if q.dtype == torch.float64 else torch.float32)
            for q in self.params
        ]
        given = self._given_momenta(momentum)
        momenta, self._momentum_memory = allocate(self.params, dtypes)
        for p, values in zip(momenta, given):
            p.copy_(values)
        self.skipped: tuple[int, ...] = ()
        self._engine: _Floats | Grid
        self._engine = Grid(self, momenta) if self.exact else _Floats(self, momenta)

    @property
    def momenta(self) -> list[Tensor]:
        """p, one tensor like each parameter."""
        return self._engine.momenta()

    def _masses(self, inv_mass: Any) -> list[Any]:
        if not isinstance(inv_mass, str):
            mass = inv_mass_list("PhaseSpace", inv_mass, self.params)
            for i, (w, q) in enumerate(zip(mass, self.params)):
                if not isinstance(w, Tensor):
                    continue
                if w.shape != q.shape or w.device != q.device:
                    raise ValueError(
                        f"PhaseSpace: inv_mass[{i}] must have shape and device of params[{i}], "
                        f"{tuple(q.shape)} on {q.device}, got {tuple(w.shape)} on {w.device}"
                    )
                check_float_tensors("PhaseSpace", inv_mass=[w])
                if not w.is_meta and not bool(((w >= 0) & w.isfinite()).all()):
                    raise ValueError(
                        f"PhaseSpace: inv_mass[{i}] must be finite and not negative everywhere, "
                        f"but is not"
                    )
            return [w.detach().clone() if isinstance(w, Tensor) else w for w in mass]
        if inv_mass != "fan_in":
            raise ValueError(
                f"PhaseSpace: inv_mass must be 'fan_in', numbers or tensors, got {inv_mass!r}"
            )
        return [fan_in_inverse_mass(q) for q in self.params]

    def _given_momenta(self, momentum: Any) -> list[Any]:
        if isinstance(momentum, str):
            if momentum == "zeros":
                return [torch.zeros((), device="cpu")] * len(self.params)
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
        generator = torch.Generator("cpu").manual_seed(self.seed % 2**63)
        drawn = []
        for i, (q, w) in enumerate(zip(self.params, self.inv_mass)):
            wide = torch.as_tensor(w, dtype=torch.float64, device="cpu")
            if not bool((wide > 0).all()):
                raise ValueError(
                    f"PhaseSpace: momentum='gaussian' needs inv_mass > 0 everywhere, inv_mass[{i}] "
                    f"is not"
                )
            noise = torch.randn(q.shape, generator=generator, dtype=torch.float64, device="cpu")
            drawn.append(noise / wide.sqrt())
        return drawn

    # ---- steps -----------------------------------------------------------------------------------

    def kick_(self, step: Scalar, *, damp: Scalar = 1.0, grads: Grads | None = None) -> None:
        """p ← damp·p − step·∇L.

        grads: ∇L, one tensor (or None) for each parameter, of its shape and dtype; by default the
        parameters' `.grad`. A parameter whose gradient is None is skipped, as torch's optimizers
        do: its momentum stays, damping included.
        """
        self._step("kick_", step, damp, None, grads)

    def drift_(self, step: Scalar, *, skipped: Iterable[int] = ()) -> None:
        """q ← q + step·M⁻¹p, but for the parameters at the places `skipped`."""
        places = tuple(sorted(set(skipped)))
        if places and not 0 <= places[0] <= places[-1] < len(self.params):
            raise ValueError(
                f"drift_: skipped must hold places of the {len(self.params)} parameters, got "
                f"{places}"
            )
        self._step("drift_", None, 1.0, step, None, places)

    def kick_drift_(
        self, kick: Scalar, drift: Scalar, *, damp: Scalar = 1.0, grads: Grads | None = None
    ) -> Tensor:
        """`kick_`, then `drift_`, in one pass; returns ½ pᵀM⁻¹p of the new p, 0-d fp64 [energy].

        A parameter whose gradient is None is skipped: q and p stay, and p counts in the energy.
        """
        return self._step("kick_drift_", kick, damp, drift, grads)

    def undo_kick_(self, grads: Grads | None = None, *, step: int | None = None) -> Move:
        """With exact=True: takes the last move back, which was a kick with these gradients; returns
        it, for `redo_kick_`. An error names `step`, by default the number of drifts so far."""
        grid = self._grid("undo_kick_")
        every = [q.grad for q in self.params] if grads is None else list(grads)
        with self._whole():
            return grid.take_back_kick("undo_kick_", every, step)[0]

    def redo_kick_(self, move: Move, grads: Grads | None = None) -> None:
        """With exact=True: makes again what `undo_kick_` with these gradients has taken back."""
        grid = self._grid("redo_kick_")
        every = [q.grad for q in self.params] if grads is None else list(grads)
        with self._whole():
            grid.redo_kick("redo_kick_", move, every)

    def undo_drift_(self) -> float:
        """With exact=True: takes the last move back, which was a drift; returns its step."""
        with self._whole():
            step, _ = self._grid("undo_drift_").take_back_drift("undo_drift_")
        return step

    def _grid(self, op: str) -> Grid:
        if not isinstance(self._engine, Grid):
            raise RuntimeError(f"{op}: only a plan with exact=True remembers its moves")
        return self._engine

    def kinetic_energy(self) -> Tensor:
        """K = ½ pᵀM⁻¹p, a 0-d fp64 tensor on the device."""
        p = self.momenta
        mass = [
            w.detach().to(x.dtype) if isinstance(w, Tensor) else w for w, x in zip(self.inv_mass, p)
        ]
        return kinetic_energy(p, inv_mass=mass, backend=self.backend)

    def scale_momenta_(self, factor: Scalar) -> None:
        """p ← factor·p. With exact=True factor must be positive: it goes into s."""
        factor = self._scalar("scale_momenta_", "factor", factor)
        with self._whole():
            self._engine.scale_(factor)  # type: ignore[arg-type]

    def leapfrog_(
        self,
        grad_fn: Callable[[Any], Any],
        dt: Scalar,
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
        dt = self._scalar("leapfrog_", "dt", dt)
        sizes = stage_sizes("leapfrog_", dt, steps, order, composition)
        self.stages = max(1, len(sizes) // max(steps, 1))
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
        skipped: tuple[int, ...] = (),
    ) -> Tensor:
        if kick is not None:
            kick, damp = self._scalar(op, "kick", kick), self._scalar(op, "damp", damp)
        if drift is not None:
            drift = self._scalar(op, "drift", drift)
        if grads is not None and not isinstance(grads, list):
            grads = tensor_list(grads)  # type: ignore[arg-type]
        with self._whole():
            return self._engine.step(op, kick, damp, drift, grads, skipped)

    def _whole(self) -> AbstractContextManager[None]:
        """Ctrl-C waits where integers and the moves that are remembered must agree."""
        return Uninterrupted() if self.exact else nullcontext()

    def _scalar(self, op: str, name: str, x: Scalar) -> Any:
        """A finite float, or the 0-d tensor where reading it would wait for a device."""
        if type(x) is float:
            return finite(op, name, x)
        if isinstance(x, Tensor) and x.ndim == 0 and not x.requires_grad:
            if x.device.type != "cpu" and not self.exact:
                return x
            x = float(x)
        return finite(op, name, x)

    # ---- what runs it ----------------------------------------------------------------------------

    def plan(self, name: str, *tensors: Any) -> Any:
        """A PhasePlan or GridPlan of the backend, of the CPU or of a GPU; None where plain torch
        steps: for parameters with gaps, and where there are no kernels."""
        chosen = backends.choose("kick_drift_", self.device, self.backend, {})
        if chosen == "reference" or not all(is_dense(q) for q in self.params):
            return None
        if chosen == "cpu":
            return getattr(backends.compiled, name)(self.params, *tensors)
        kernels = importlib.import_module(f".{chosen}_kernels.phase_space", __package__)
        return getattr(device_plans, name)(kernels, self.params, *tensors)

    # ---- checks ----------------------------------------------------------------------------------

    def checked(self, op: str, grads: Grads | None, kicks: bool) -> list[Tensor | None]:
        """The gradients of a kick, each laid out like its parameter; None for each where the step
        has none. Raises where the plan is stale or a gradient is not what it must be."""
        self._check_layouts(op)
        if not kicks:
            return [None] * len(self.params)
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
                    f"{words(layout(q))}, got {words(layout(g))}"
                )
        written = {"params": self.params, "momenta": self._momentum_memory}
        check_disjoint(op, written, {"grads": list(there.values())})
        return [
            None if g is None else laid_out_like(q, g.detach()) for q, g in zip(self.params, every)
        ]

    def check(self, op: str, *, kicks: bool) -> None:
        """Raises what a drift would raise, or a kick with the parameters' `.grad`; but overflow."""
        self._engine.check(op, kicks)

    def _check_layouts(self, op: str) -> None:
        """Raises where a parameter is not what it was when the plan was made."""
        for i, (q, then) in enumerate(zip(self.params, self._layouts, strict=True)):
            now = layout(q)
            freed = q.numel() > 0 and q.untyped_storage().nbytes() == 0
            if now != then or freed:
                raise RuntimeError(
                    f"{op}: the plan is stale: params[{i}] was {words(then)} and is now "
                    f"{'without memory' if freed else words(now)}. Make a new PhaseSpace"
                )

    def wrote(self, *, q: bool, p: bool, skipped: tuple[int, ...]) -> None:
        """Tells autograd what has been written."""
        if q and not skipped:
            increment_version(self.params)
        elif q:
            stays = set(skipped)
            increment_version([x for i, x in enumerate(self.params) if i not in stays])
        if p:
            increment_version(self._momentum_memory)

    # ---- saving ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Momenta, counters and, with exact=True, the grid and the moves; all as copies. The
        positions are the model's own to save; with exact=True they are here too."""
        counters = {"step_count": self.step_count, "seed": self.seed, "skipped": self.skipped}
        return {**counters, **self._engine.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, to the bit as far as momenta have the same dtype."""
        self.check_state_dict(state)
        with torch.no_grad(), self._whole():
            self._engine.load(state)
            self.step_count, self.seed = state["step_count"], state["seed"]
            self.skipped = tuple(state["skipped"])

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where `load_state_dict` would."""
        if ("Q" in state) != self.exact:
            raise ValueError(
                f"load_state_dict: the state of a plan with exact={'Q' in state} does not fit one "
                f"with exact={self.exact}"
            )
        shapes = [tuple(x.shape) for x in state["Q" if self.exact else "momenta"]]
        if shapes != [tuple(q.shape) for q in self.params]:
            raise ValueError(
                f"load_state_dict: expected momenta of shapes "
                f"{[tuple(q.shape) for q in self.params]}, got {shapes}"
            )
        if self.exact and list(map(_order, state["Q"])) != list(map(_order, self.params)):
            raise ValueError(
                "load_state_dict: with exact=True the parameters must have the memory layout they "
                "were saved with, as checksums go by it. Convert the model before the plan is made"
            )
        dtypes = [q.dtype for q in self.params]
        if self.exact and list(state["dtypes"]) != dtypes:
            raise ValueError(
                f"load_state_dict: with exact=True the parameters must have the dtypes they were "
                f"saved with, {list(state['dtypes'])}, got {dtypes}. Convert the model before the "
                f"plan is made"
            )


def _order(x: Tensor) -> list[int]:
    """Tells in which order the elements of a tensor lie in memory."""
    return [stride for size, stride in zip(x.shape, x.stride()) if size > 1]


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
        tensors = [*qs, *ps, *(w for w in mass if isinstance(w, Tensor))]
        numbers = [None if isinstance(w, Tensor) else w for w in mass]
        return [*map(id, tensors)], versions(tensors), numbers, backend, isinstance(q, Tensor)

    space, known, _ = _walks.get(ps[0], (None, None, None))
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
        # The others are held, or a new tensor could be taken for one of them by its id.
        _walks[ps[0]] = space, signature(), ps[1:]


class _Floats:
    """Steps on floating-point numbers."""

    def __init__(self, space: PhaseSpace, momenta: list[Tensor]) -> None:
        self.space, self.p = space, momenta
        self.mass = [
            laid_out_like(q, w.detach().to(p.dtype)) if isinstance(w, Tensor) else w
            for q, p, w in zip(space.params, momenta, space.inv_mass)
        ]
        self.rounds = any(q.element_size() == 2 for q in space.params)  # stochastically
        owned = [*space._momentum_memory, *(w for w in self.mass if isinstance(w, Tensor))]
        self.plan = space.plan("PhasePlan", momenta, self.mass, owned)

    def momenta(self) -> list[Tensor]:
        return self.p

    def step(
        self, op: str, kick: Any, damp: Any, drift: Any, grads: Any, skipped: tuple[int, ...]
    ) -> Tensor:
        space = self.space
        kicks, drifts = kick is not None, drift is not None
        kick, drift = kick if kicks else 0.0, drift if drifts else 0.0
        key, energy = 0, None
        if self.rounds:
            key = space.seed * 0x9E3779B97F4A7C15 + space.step_count * reference.STEP_KEY
            key &= reference.MASK
        numbers = (kicks, drifts, kick, damp, drift, key)
        # Without the compiled part a plan cannot check by itself.
        if self.plan is not None and backends.compiled is not None:
            energy = self.plan.step(grads, skipped, *numbers, get_num_threads())
        if energy is None:
            with torch.no_grad():
                grads = space.checked(op, grads, kicks)
                if self.plan is not None:
                    energy = self.plan.step(grads, skipped, *numbers, get_num_threads())
                else:
                    args: Any = (space.params, self.p, grads, self.mass, *numbers, skipped)
                    energy = reference.phase_step(*args)
        if energy is None:
            raise RuntimeError(
                f"{op}: the plan is stale: the memory of its momenta or masses has moved. Make a "
                f"new PhaseSpace"
            )
        if kicks:
            skipped = missing(grads) if self.plan is None else self.plan.skipped()
            space.skipped = skipped
        space.wrote(q=drifts, p=kicks, skipped=skipped)
        space.step_count += drifts
        return energy

    def check(self, op: str, kicks: bool) -> None:
        if not kicks or self.plan is None or backends.compiled is None or not self.plan.ready():
            self.space.checked(op, None, kicks)

    def scale_(self, factor: Any) -> None:
        if self.p:
            torch._foreach_mul_(self.p, factor)

    def state(self) -> dict[str, Any]:
        return {"momenta": [p.clone() for p in self.p]}

    def load(self, state: dict[str, Any]) -> None:
        for p, saved in zip(self.p, state["momenta"]):
            p.copy_(saved)
