"""Training as a Hamiltonian system: phase space, energy, step map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..conventions import fan_in_inverse_mass
from ..ops.kinetic_energy import kinetic_energy
from ..ops.leapfrog import kick_, kick_drift_
from ..phase_space import PhaseSpace
from .arguments import finite
from .batch_statistics import functional_normalization, join, tracked_layers
from .clock import Clock
from .last_force import LastForce
from .live_state import preserved_random_state, preserved_training_flags, seed_generators
from .torch_functions import PlainFunctions

REGIMES = ("batch", "running", "frozen")
R = TypeVar("R")


@dataclass
class State:
    """A point (q, p, b) of the extended phase space, or m tangents at one ([m, *shape] each).

    q: L tensors, the trainable parameters; p: L momenta of the same shapes and dtypes;
    b: all else that a forward pass reads, by name: buffers and parameters without requires_grad.
    last_force: of the last half kick, which the next one may share.
    """

    q: list[Tensor]
    p: list[Tensor]
    b: dict[str, Tensor]
    last_force: LastForce = field(default_factory=LastForce, init=False, repr=False, compare=False)

    def copy(self, dtype: torch.dtype | None = None) -> State:
        """The same point in memory of its own; `dtype` replaces every float dtype."""
        return State(
            [_own(x, dtype) for x in self.q],
            [_own(x, dtype) for x in self.p],
            {name: _own(x, dtype) for name, x in self.b.items()},
        )


class HamiltonianSystem:
    """Training seen as mechanics: positions q = θ (the parameters), momenta p, potential L(q).

        H(q, p) = ½ pᵀM⁻¹p + L(q)

    Step t of the map Φ_dt (damp–kick–drift–kick–damp, c = e^{−γ dt/2}, L_t the loss on batch t):

        p ← c p − (dt/2) ∇L_t(q),   q ← q + dt M⁻¹p,   p ← c (p − (dt/2) ∇L_t(q))

    Both half kicks of step t use batch t, so each step is palindromic: with γ = 0 it is symplectic,
    with γ > 0 conformally symplectic (Ω → e^{−γ dt} Ω), and step t with −dt undoes step t with +dt.
    The price is two gradients per step, since the next step's first half kick has another batch;
    with one batch (also [batch] * 10) it asks for the same gradient, which is evaluated once: T + 1
    in T steps, as long as evaluating it writes no buffer and draws no random number.

    The system never writes to the model: it steps copies of parameters and buffers, and calls the
    model on them. What it borrows (training flags, random state) is returned after every probe,
    also when the probe raises or is interrupted. Random layers see the same draw in every visit to
    step t (the generators are seeded from `seed` and t, and fill tensors in the order of their
    indices, whatever their layout), so that forward and reverse steps and tangents agree.

    Parameters
    ----------
    model: nn.Module with float parameters; those that require grad make up q (N numbers in L
    tensors).
    loss_fn: (output, target) -> scalar tensor, the mean loss of a batch.
    batches: iterable of (x, y), read once into a list; x is a tensor or a tuple of positional
    arguments.
        Step t uses batch t mod len(batches). The first batch is the probe batch of `energy`.
    inv_mass: M⁻¹, one number > 0 for all tensors, a list with one number per tensor, or "fan_in":
        clip(1/√fan_in, 1/8, 8) for weights of two or more dimensions, 1 for all others.
    damping: γ >= 0, per unit of time.
    regime: how BatchNorm layers act, the only place where the regimes differ.
        "batch"   torch's train mode: the force uses batch statistics; each of the two gradients of
        a
                  step also updates the running statistics, which are hidden state.
        "running" each step first updates the running statistics from its batch by the rule of a
                  train-mode forward pass (momentum m of the layer), then holds them fixed for both
                  half kicks. The map depends on history and the force is no gradient. A forward
                  pass has to apply every layer once.
        "frozen"  running statistics are calibrated at the start of a probe (mean over all batches
                  and applications of a layer of the moments at q) and held fixed.
    seed: of the initial momenta and of random layers.
    temperature: T; initial momenta are normal with covariance T·M (on average K = NT/2). 0: at
    rest.
    backend: of the gti kernels, "auto" | "reference" | "cpu" | "triton" | "cuda".

    Attributes
    ----------
    q: the model's live parameters (list of L tensors); p: the initial momenta (replace them at
    will); clock.seconds: wall time so far in "kernels" and "gradients".

    Raises
    ------
    TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Leimkuhler & Reich, Simulating Hamiltonian Dynamics (2004), ch. 4; Hairer, Lubich &
    Wanner, Geometric Numerical Integration (2006), I.1.4, V.1; McLachlan & Perlmutter (2001) for
    the conformal case.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        batches: Iterable[tuple[Any, Any]],
        inv_mass: str | float | Sequence[float] = "fan_in",
        damping: float = 0.0,
        regime: str = "batch",
        seed: int = 0,
        *,
        temperature: float = 1e-4,
        backend: str = "auto",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if not callable(loss_fn):
            raise TypeError(
                f"loss_fn: expected a callable (output, target) -> scalar tensor, "
                f"got {type(loss_fn).__name__}"
            )
        if regime not in REGIMES:
            raise ValueError(f"regime: expected one of {REGIMES}, got {regime!r}")
        named = {name: q for name, q in model.named_parameters() if q.requires_grad}
        if not named:
            raise ValueError(
                "model: expected at least one parameter that requires grad, got none; "
                "call model.requires_grad_(True)"
            )
        for name, q in named.items():
            if not q.is_floating_point():
                raise TypeError(
                    f"model: expected float parameters, got {q.dtype} in {name!r}; keep real and "
                    f"imaginary parts, as torch.view_as_real gives them, in a float parameter"
                )
        devices = {q.device for q in named.values()}
        if len(devices) > 1:
            raise ValueError(f"model: expected all parameters on one device, got {devices}")
        self.model = model
        self.loss_fn = loss_fn
        self.names = list(named)
        self.q = list(named.values())
        self.device = self.q[0].device
        with preserved_random_state(self.device):
            self.batches, self._numbers = _as_batches(batches, self.device)
        if not self.batches:
            raise ValueError("batches: expected at least one pair (x, y), got none")
        self.inv_mass = _inverse_mass(inv_mass, self.q)
        self.damping = finite("damping", damping)
        if self.damping < 0:
            raise ValueError(f"damping: expected a number >= 0, got {damping}")
        self.temperature = finite("temperature", temperature)
        if self.temperature < 0:
            raise ValueError(f"temperature: expected a number >= 0, got {temperature}")
        self.regime = regime
        self.seed = seed
        self.backend = backend
        self.layers = tracked_layers(model)
        self.p = self._draw_momenta()
        self.clock = Clock(self.device)

    @property
    def size(self) -> int:
        """N, the number of trainable parameters."""
        return sum(q.numel() for q in self.q)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The model's live buffers by name."""
        return dict(self.model.named_buffers())

    def unflattened(self, rows: Tensor) -> list[Tensor]:
        """[m, N] as [m, *shape] for each trainable parameter."""
        parts = rows.split([q.numel() for q in self.q], dim=1)
        return [
            x.reshape(len(x), *q.shape).contiguous() for x, q in zip(parts, self.q, strict=True)
        ]

    def flattened(self, tensors: Sequence[Tensor]) -> Tensor:
        """[m, *shape] for each trainable parameter as [m, N]."""
        parts = [x.reshape(len(x), q.numel()) for x, q in zip(tensors, self.q, strict=True)]
        return torch.cat(parts, dim=1)

    @contextmanager
    def session(self) -> Iterator[None]:
        """The model is set up for steps; flags and random state return at the end of the block."""
        with (
            torch.inference_mode(False),
            preserved_random_state(self.device),
            preserved_training_flags(self.model),
            torch.autocast(self.device.type, enabled=False),
        ):
            self._set_training()
            yield

    def start(self, dtype: torch.dtype | None = None) -> State:
        """A copy (q, p, b) of the model's present state; `dtype` replaces every float dtype.

        Call it in a `session`: "frozen" calibrates the running statistics here.
        """
        fixed = {k: x for k, x in self.model.named_parameters() if k not in self.names}
        state = State(list(self.q), self.p, {**fixed, **self.buffers}).copy(dtype)
        if self.regime == "frozen" and self.layers:
            self._calibrate(state)
        return state

    def grid(self, state: State) -> PhaseSpace:
        """The positions and momenta of `state` on a grid of integers, to be given to `step`."""
        return PhaseSpace(
            state.q,
            inv_mass=self.inv_mass,
            momentum=state.p,
            momentum_dtype=torch.float64,
            exact=True,
            backend=self.backend,
        )

    def step(self, state: State, t: int, dt: float, grid: PhaseSpace | None = None) -> None:
        """Φ_dt of step t, in place: (q, p, b) at time t to time t + 1; −dt goes back.

        grid: of `self.grid(state)`; then −dt goes back to the bit.
        """
        damp = self.decay(dt)
        self.update_statistics(state, t)
        force = self._shared_gradient(state, t)
        if grid is not None:
            with self.clock("kernels"):
                grid.kick_drift_(dt / 2, dt, damp=damp, grads=force)
            force = self._shared_gradient(state, t)
            with self.clock("kernels"):
                grid.kick_(damp * dt / 2, damp=damp, grads=force)
                for p, exact in zip(state.p, grid.momenta, strict=True):
                    p.copy_(exact)
            return
        with self.clock("kernels"):
            kick_drift_(
                state.q,
                state.p,
                force,
                dt / 2,
                dt,
                inv_mass=self.inv_mass,
                damp=damp,
                backend=self.backend,
            )
        force = self._shared_gradient(state, t)
        with self.clock("kernels"):
            kick_(state.p, force, damp * dt / 2, damp=damp, backend=self.backend)

    def decay(self, dt: float) -> float:
        """e^{−γ dt/2}, of half a step."""
        exponent = -self.damping * dt / 2
        if exponent > 709.0:
            raise ValueError(
                f"dt: expected damping·|dt|/2 of at most 709 on the way back, where p grows by "
                f"e^(damping·|dt|/2), got damping = {self.damping:g}, dt = {dt:g}"
            )
        return math.exp(exponent)

    def update_statistics(self, state: State, t: int) -> None:
        """In the regime "running": b ← (1 − m) b + m·(moments of batch t at q); else nothing."""
        if self.regime == "running" and self.layers:
            with torch.no_grad():
                moments = self.batch_moments(state.q, state.b, t)
                for name, m in self.count_batch(state).items():
                    state.b[name] = torch.lerp(state.b[name], moments[name], m)

    def batch_moments(self, q: Sequence[Tensor], b: dict[str, Tensor], t: int) -> dict[str, Tensor]:
        """Mean and unbiased variance of batch t in every BatchNorm layer, named like the buffers;
        of a layer applied several times the mean of these, which "running" refuses.

        All layers normalise by the batch, as in a train-mode forward pass; b is not written.
        """
        with functional_normalization(self.layers) as moments:
            self.output(q, b, t)
        for layer in self.layers if self.regime == "running" else ():
            if (times := len(moments.get(layer, []))) != 1:
                raise ValueError(
                    f"model: expected a forward pass to apply every BatchNorm layer once in the "
                    f'regime "running", got {layer!r} applied {times} times; give each application '
                    f'a layer of its own, or take the regime "batch"'
                )
        return {
            join(layer, slot): torch.stack(values).mean(0)
            for layer, applications in moments.items()
            for slot, values in zip(
                ("running_mean", "running_var"), zip(*applications, strict=True)
            )
        }

    def count_batch(self, state: State) -> dict[str, float]:
        """Adds 1 to every num_batches_tracked; returns m by name of running mean and variance."""
        momenta: dict[str, float] = {}
        for name, layer in self.layers.items():
            count = join(name, "num_batches_tracked")
            state.b[count] = state.b[count] + 1
            m = 1.0 / float(state.b[count]) if layer.momentum is None else layer.momentum
            momenta[join(name, "running_mean")] = momenta[join(name, "running_var")] = m
        return momenta

    def gradient(self, state: State, t: int) -> list[Tensor]:
        """∇L_t(q), L tensors like q. In the regime "batch" it also updates b, as torch does."""

        def gradients(q: list[Tensor]) -> list[Tensor]:
            grads = torch.autograd.grad(self.loss(q, state.b, t), q, allow_unused=True)
            return [
                torch.zeros_like(x) if g is None else laid_out_like(x, g)
                for x, g in zip(state.q, grads, strict=True)
            ]

        with self.clock("gradients"), torch.enable_grad():
            return self.held(state, gradients)

    def held(self, state: State, run: Callable[[list[Tensor]], R]) -> R:
        """run(q), q leaves of a graph with the values of state.q, while the model holds them and
        state.b: what a backward pass evaluates anew (torch.utils.checkpoint) reads these."""
        q = [x.detach().requires_grad_() for x in state.q]
        tensors = {**dict(zip(self.names, q, strict=True)), **state.b}
        holder = _Holder(self.model, run)
        return functional_call(holder, {f"model.{name}": x for name, x in tensors.items()}, (q,))

    def _shared_gradient(self, state: State, t: int) -> list[Tensor]:
        """The gradient, or that of the half kick before where it is the same."""
        return state.last_force(
            [*state.q, *state.b.values()],
            self.batch_number(t),
            self.random_seed(t),
            lambda: self.gradient(state, t),
        )

    def loss(self, q: Sequence[Tensor], b: dict[str, Tensor], t: int) -> Tensor:
        """L_t(q) with buffers b, 0-d, in the dtype of q."""
        output, y = self.output(q, b, t), self.target(t, q[0].dtype)
        with PlainFunctions():
            value = self.loss_fn(output, y)
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"loss_fn: expected a scalar tensor, got {got}; reduce it, as with .mean()"
            )
        return value

    def output(self, q: Sequence[Tensor], b: dict[str, Tensor], t: int) -> Any:
        """The model's output on batch t with parameters q, buffers b, random draw of step t."""
        seed_generators(self.device, self.random_seed(t))
        x = self._fitted(self.batches[self.batch_number(t)][0], q[0].dtype)
        with PlainFunctions():
            return functional_call(self.model, {**dict(zip(self.names, q, strict=True)), **b}, x)

    def energy(self, state: State) -> float:
        """H(q, p) in inference mode on the probe batch (the first one), evaluated in fp64."""
        wide = state.copy(torch.float64)
        self.model.eval()
        try:
            with torch.no_grad():
                potential = float(self.loss(wide.q, wide.b, 0))
        finally:
            self._set_training()
        with self.clock("kernels"):
            kinetic = kinetic_energy(state.p, inv_mass=self.inv_mass, backend=self.backend)
        return potential + float(kinetic)

    def target(self, t: int, dtype: torch.dtype) -> Any:
        """The target y of batch t, in fp64 when the parameters are (`dtype`)."""
        return self._fitted(self.batches[self.batch_number(t)][1], dtype)

    def batch_number(self, t: int) -> int:
        """Which batch step t uses; the first of those that are one and the same tuple."""
        return self._numbers[t % len(self.batches)]

    def random_seed(self, t: int) -> int:
        """What the generators are seeded with before each forward pass of step t."""
        return (self.seed * 1_000_003 + t) % 2**63

    def _fitted(self, x: Any, dtype: torch.dtype) -> Any:
        return cast(x, dtype) if dtype == torch.float64 else x

    def _set_training(self) -> None:
        self.model.train()
        if self.regime != "batch":
            for layer in self.layers.values():
                layer.training = False

    def _calibrate(self, state: State) -> None:
        with torch.no_grad():
            every = [self.batch_moments(state.q, state.b, t) for t in range(len(self.batches))]
        for name in every[0]:
            mean = torch.stack([moments[name] for moments in every]).mean(0)
            state.b[name] = mean.to(state.b[name].dtype)

    def _draw_momenta(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        momenta = []
        for q, w in zip(self.q, self.inv_mass, strict=True):
            noise = torch.randn(q.shape, generator=generator, dtype=torch.float64, device="cpu")
            # The layout of q, so that the kernels can walk through both as flat memory.
            momenta.append(_own(q, None).copy_(math.sqrt(self.temperature / w) * noise))
        return momenta


class _Holder(nn.Module):
    """A module around the model whose forward pass is run(q)."""

    def __init__(self, model: nn.Module, run: Callable[[list[Tensor]], Any]) -> None:
        super().__init__()
        self.model, self.forward = model, run


def check_system(system: Any) -> None:
    """TypeError for what is no system."""
    if not isinstance(system, HamiltonianSystem):
        raise TypeError(
            f"system: expected a HamiltonianSystem, got {type(system).__name__}. Make one of a "
            f"model: HamiltonianSystem(model, loss_fn, batches)"
        )


def cast(x: Any, dtype: torch.dtype) -> Any:
    """Float tensors (also inside a tuple) as `dtype`; everything else as it is."""
    if isinstance(x, tuple):
        return tuple(cast(item, dtype) for item in x)
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def laid_out_like(z: Tensor, x: Tensor) -> Tensor:
    """x with the strides of z, so that a kernel can walk through both as flat memory."""
    return x if x.stride() == z.stride() else torch.empty_like(z).copy_(x)


def _own(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    x = x.detach()
    return x.clone() if dtype is None or not x.is_floating_point() else x.to(dtype, copy=True)


def _as_batches(
    items: Iterable[Any], device: torch.device
) -> tuple[list[tuple[Any, Any]], list[int]]:
    """The batches on the device, and of each the first number of its tuple in `items`."""
    batches: list[tuple[Any, Any]] = []
    numbers: list[int] = []
    alive: list[Any] = []  # no two of them share an id
    first: dict[int, int] = {}
    for number, item in enumerate(items):
        alive.append(item)
        # A list may have changed since.
        same = first.setdefault(id(item), number) if isinstance(item, tuple) else number
        batches.append(batches[same] if same < number else _as_batch(item, device))
        numbers.append(same)
    return batches, numbers


def _as_batch(item: Any, device: torch.device) -> tuple[Any, Any]:
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        got = f"{len(item)} items" if isinstance(item, (tuple, list)) else type(item).__name__
        raise ValueError(f"batches: expected pairs (x, y), got {got}")
    return _to_device(item[0], device), _to_device(item[1], device)


def _to_device(x: Any, device: torch.device) -> Any:
    if isinstance(x, (tuple, list)):
        return tuple(_to_device(item, device) for item in x)
    return x.to(device) if isinstance(x, Tensor) else x


def _inverse_mass(inv_mass: str | float | Sequence[float], q: Sequence[Tensor]) -> list[float]:
    if isinstance(inv_mass, str):
        if inv_mass != "fan_in":
            raise ValueError(f'inv_mass: expected "fan_in" or numbers > 0, got {inv_mass!r}')
        return [fan_in_inverse_mass(x) for x in q]
    if isinstance(inv_mass, (list, tuple)):
        if len(inv_mass) != len(q):
            raise ValueError(
                f"inv_mass: expected {len(q)} numbers, one per trainable parameter tensor, "
                f"got {len(inv_mass)}"
            )
        return [finite(f"inv_mass[{i}]", w, positive=True) for i, w in enumerate(inv_mass)]
    return [finite("inv_mass", inv_mass, positive=True)] * len(q)  # type: ignore[arg-type]
