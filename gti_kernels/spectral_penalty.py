"""A penalty on the top singular values of a model's weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import backends
from .ops.arguments import finite
from .ops.library import without_transforms
from .ops.power_iteration import SingularTriples, _check_settings, sigma_with_vectors, start_from

Layers = Callable[[str, nn.Module], bool] | Iterable[str] | None
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
    a call is a graph break: call it outside of the compiled function.

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

    def __call__(self) -> Tensor:
        """Σ_l (σ_l − target)², or 0 in the calls between; 0-d, fp32 (fp64 if any weight is)."""
        if self.calls % self.every != 0 and self._sigma is not None:
            self.calls += 1
            return self._sigma.new_zeros(())
        sigma, *vectors = sigma_with_vectors(
            [getattr(module, attribute) for module, attribute in self._places.values()],
            1,
            *self.settings,
            self._start(),
            self.seed,
            self.backend,
        )
        self.calls += 1
        self._sigma = without_transforms(sigma[:, 0].detach())
        self._v = [without_transforms(v) for v in vectors[len(self._places) :]]
        return (sigma - self.target).square().sum()

    def _start(self) -> SingularTriples | None:
        """The last v, each with a random part of length about a tenth.

        The gradient goes along u vᵀ: under it v stays a singular vector while its σ falls below the
        next one, and an iteration that begins exactly there has a zero residual and sees no other.
        The random part costs some steps, far fewer than a cold start.
        """
        if not self._v:
            return None
        random = torch.Generator(self._v[0].device).manual_seed(self.seed + self.calls)
        starts = []
        for v in self._v:
            noise = torch.randn(v.shape, generator=random, dtype=v.dtype, device=v.device)
            starts.append(v.add(noise, alpha=0.1 / math.sqrt(v.shape[0])))
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
        module, _ = next(iter(self._places.values()))
        device = next(module.parameters()).device
        self.calls = state["calls"]
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
            if weight.ndim >= 2 and weight.numel() > 0:
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
    return chosen


def _within(weight: str, name: str) -> bool:
    return weight == name or weight.startswith(f"{name}.")
