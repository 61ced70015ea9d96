"""A penalty on the top singular values of a model's weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from . import backends
from .conventions import compute_dtype
from .ops.arguments import FLOATS, finite
from .ops.library import without_transforms
from .ops.power_iteration import SingularTriples, _check_settings, sigma_with_vectors, start_from

Layers = Callable[[str, nn.Module], bool] | Iterable[str] | None
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
Place = tuple[nn.Module, str]  #: a module and the name of its weight there


class SpectralPenalty:
    """Σ_l (σ_l − target)² over the weights of a model, σ_l the top singular value of weight l.

    Each call computes all σ_l in one call of `power_iteration`, from near where the last call ended
    (the last v and a random tenth, see `_start`), and is differentiable:
    ∂/∂W_l = 2 (σ_l − target) u_l v_lᵀ. Add it to the loss:

        loss = task(model(x), y) + strength * penalty()

    Args:
        model: its weights are the parameters of at least 2 dims, each read as the matrix [out, −1],
            a shared one counted once. Of a parametrized weight it is the weight the module uses
            (σ of W/σ is 1 under `nn.spectral_norm`, and in training mode asking for it takes a
            power step). Frozen weights count, but get no gradient.
        target: what σ_l is drawn to.
        every: the penalty is computed in the first call and in each `every`-th after it; the calls
            between return 0, which has no gradient and costs nothing. Multiply the strength by
            `every` to keep its mean.
        layers: which weights. None: all. Names, of weights ("encoder.0.weight") or of modules (all
            within); or a predicate of the weight's name and the module that holds it:
            `lambda name, module: isinstance(module, torch.nn.Conv2d)`. They are chosen here, once:
            a parameter that is replaced later is followed, a module that is replaced or added is
            not.
        method, max_steps, tol, seed, backend: as in `power_iteration`.

    `sigmas` has the values of the last computed call by name. `state_dict` and `load_state_dict`
    carry the number of calls and the vectors v from which the next call starts. Under torch.compile
    a call is a graph break: call it outside of the compiled function, and outside of
    torch.utils.checkpoint, whose recomputation would count as a call. A call under vmap keeps
    nothing.

    Raises:
        ValueError, TypeError: the argument, what was expected, what came; among them `layers` that
        select nothing.

    >>> import torch, gti_kernels as gti
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> _ = model.weight.data.copy_(torch.diag(torch.tensor([3.0, 1.0])))
    >>> penalty = gti.SpectralPenalty(model, target=1.0, tol=1e-6)
    >>> penalty().backward()
    >>> model.weight.grad.round(decimals=3).abs()  # 2 (σ − 1) u vᵀ
    tensor([[4., 0.],
            [0., 0.]])
    >>> {name: round(float(s), 3) for name, s in penalty.sigmas.items()}
    {'weight': 3.0}
    """

    def __init__(
        self,
        model: nn.Module,
        target: float = 1.0,
        every: int = 1,
        layers: Layers = None,
        *,
        method: str = "cg",
        max_steps: int = 200,
        tol: float = 1e-4,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"SpectralPenalty: model must be a module, got {type(model).__name__}")
        self.target = finite("SpectralPenalty", "target", target)
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"SpectralPenalty: every must be an integer >= 1, got {every!r}")
        _check_settings(1, method, max_steps, tol, seed)
        backends.check_name("SpectralPenalty", backend)
        self.every = every
        self.settings = (method, max_steps, tol)
        self.seed, self.backend = seed, backend
        self.calls = 0
        self._places = _select(_places(model), layers)
        self._sigma: Tensor | None = None  # [L]
        self._v: list[Tensor] = []

    @torch._disable_dynamo
    def __call__(self) -> Tensor:
        """Σ_l (σ_l − target)², or 0 in the calls between; 0-d, fp32 (fp64 if any weight is)."""
        if self.calls % self.every != 0 and self._sigma is not None:
            self.calls += 1
            held = [x for place in self._places.values() for x in _behind(*place)]
            real = max((compute_dtype(x.dtype) for x in held), key=lambda dtype: dtype.itemsize)
            return torch.zeros((), dtype=real, device=held[0].device)
        weights = [getattr(module, attribute) for module, attribute in self._places.values()]
        with torch._C._DisableFuncTorch():  # what is kept is of no transform
            start = self._start(weights)
        sigma, *vectors = sigma_with_vectors(
            weights,
            1,
            *self.settings,
            start,
            self.seed,
            self.backend,
        )
        self.calls += 1
        sigma_, *vs = map(without_transforms, (sigma[:, 0].detach(), *vectors[len(weights) :]))
        if not _is_wrapped(sigma_):  # a vmap ends
            self._sigma, self._v = sigma_, vs
        return (sigma - self.target).square().sum()

    def _start(self, weights: list[Tensor]) -> SingularTriples | None:
        """The last v, each with a random part of length about a tenth; all random where the length
        is another now.

        The gradient goes along u vᵀ: under it v stays a singular vector while its σ falls below the
        next one, and an iteration that begins exactly there has a zero residual and sees no other.
        The random part costs some steps, far fewer than a cold start.
        """
        if not self._v:
            return None
        random = torch.Generator(self._v[0].device).manual_seed(self.seed + self.calls)
        starts = []
        for v, w in zip(self._v, weights):
            n = math.prod(w.shape[1:])
            noise = torch.randn((n, 1), generator=random, dtype=v.dtype, device=v.device)
            starts.append(
                v.add(noise, alpha=0.1 / math.sqrt(n)) if v.shape == noise.shape else noise
            )
        return start_from(starts)

    @property
    def sigmas(self) -> dict[str, Tensor]:
        """σ of each weight in the last call that computed them, 0-d, detached; empty before."""
        return {} if self._sigma is None else dict(zip(self._places, self._sigma))

    def state_dict(self) -> dict[str, Any]:
        """The number of calls, and by weight the last σ and v."""
        return {"calls": self.calls, "sigma": self.sigmas, "v": dict(zip(self._places, self._v))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where the penalty whose `state_dict` this is stood; for the same weights."""
        missing = {"calls", "sigma", "v"} - set(state)
        if missing:
            raise ValueError(f"SpectralPenalty: state_dict must have {sorted(missing)}")
        for key in ("sigma", "v"):
            if state[key] and set(state[key]) != set(self._places):
                raise ValueError(
                    f"SpectralPenalty: state_dict must be for the weights {list(self._places)}, "
                    f"got {key} of {list(state[key])}"
                )
        calls, values = state["calls"], [*state["sigma"].values(), *state["v"].values()]
        if type(calls) is not int or calls < 0 or not all(isinstance(x, Tensor) for x in values):
            raise TypeError(
                f"SpectralPenalty: state_dict must have an integer >= 0 for calls and tensors for "
                f"sigma and v, got {calls!r} and {sorted({type(x).__name__ for x in values})}"
            )
        module, _ = next(iter(self._places.values()))
        device = next(module.parameters()).device
        self.calls = calls
        self._v = [state["v"][name].to(device, copy=True) for name in self._places if state["v"]]
        sigma = [state["sigma"][name].to(device) for name in self._places if state["sigma"]]
        self._sigma = torch.stack(sigma) if sigma else None


def _places(model: nn.Module) -> dict[str, Place]:
    """Name of each weight → the module that holds it and its attribute there."""
    out: dict[str, Place] = {}
    seen: set[int] = set()
    inside = {
        id(m)
        for module in model.modules()
        if parametrize.is_parametrized(module)
        for m in module.parametrizations.modules()  # type: ignore[union-attr]
    }
    for path, module in model.named_modules():
        if id(module) in inside:
            continue
        held: dict[str, Any] = dict(module._parameters)
        if parametrize.is_parametrized(module):
            for name, behind in module.parametrizations.items():  # type: ignore[union-attr,operator]
                held[name] = getattr(behind, "original", behind)
        for name, parameter in held.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            with torch.no_grad():
                weight = getattr(module, name)
            if is_lazy(parameter) or (weight.ndim >= 2 and weight.numel() > 0):
                out[f"{path}.{name}" if path else name] = (module, name)
    return out


def _select(places: dict[str, Place], layers: Layers) -> dict[str, Place]:
    if layers is None:
        chosen = places
    elif isinstance(layers, (type, nn.Module)) or not (
        callable(layers) or isinstance(layers, Iterable)
    ):
        raise TypeError(
            f"SpectralPenalty: layers must be names or a predicate, got {layers!r}. For those of a "
            f"type pass lambda name, module: isinstance(module, torch.nn.Conv2d)"
        )
    elif callable(layers):
        chosen = {name: place for name, place in places.items() if layers(name, place[0])}
    else:
        names = [layers] if isinstance(layers, str) else list(layers)
        for name in names:
            if not isinstance(name, str):
                raise TypeError(
                    f"SpectralPenalty: layers must be names or a predicate, got {name!r}"
                )
            if not any(_within(place, name) for place in places):
                raise ValueError(
                    f"SpectralPenalty: layers must name weights of at least 2 dims or modules that "
                    f"hold some, got {name!r}. There are: {', '.join(places)}"
                )
        chosen = {n: place for n, place in places.items() if any(_within(n, x) for x in names)}
    if not chosen:
        raise ValueError(
            "SpectralPenalty: layers must select at least one weight of at least 2 dims. There "
            f"are: {', '.join(places) or 'none'}"
        )
    for name, place in chosen.items():
        for x in _behind(*place):
            if is_lazy(x):
                raise ValueError(
                    f"SpectralPenalty: {name} must have a shape, got a lazy parameter. Run one "
                    f"forward of the model before"
                )
            if x.dtype not in FLOATS:
                raise TypeError(
                    f"SpectralPenalty: {name} must have dtype {', '.join(map(str, FLOATS))}, got "
                    f"{x.dtype}. Leave it out by `layers`"
                )
    return chosen


def _behind(module: nn.Module, name: str) -> list[Tensor]:
    """The parameter of that name, or those behind a parametrized one."""
    if parametrize.is_parametrized(module, name):
        behind: nn.Module = module.parametrizations[name]  # type: ignore[union-attr,index,assignment]
        return [*behind.parameters(recurse=False), *behind.buffers(recurse=False)]
    return [getattr(module, name)]


def _within(weight: str, name: str) -> bool:
    return weight == name or weight.startswith(f"{name}.")
