"""Kick, drift and the leapfrog integrator, in place over a whole parameter list.

Phase space (q, p), H = ½ pᵀM⁻¹p + L(q). A kick moves p along −∇L, a drift moves q along M⁻¹p; each
is the exact flow of one half of H, so any composition is symplectic (Hairer, Lubich, Wanner 2006,
"Geometric Numerical Integration", II.5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, get_num_threads, is_grad_enabled
from torch.autograd.graph import increment_version

from .. import backends
from ..reference import leapfrog as reference
from .arguments import (
    InvMass,
    check_alike,
    check_disjoint,
    finite,
    inv_mass_list,
    scalars,
    tensor_list,
    unlike_layouts,
)
from .library import is_plain_eager, refuse_derivative, register

Tensors = Tensor | Sequence[Tensor]
Scalar = float | Tensor

_REMEDY = "Call it under torch.no_grad(), or pass detached tensors"
_YOSHIDA = 1.0 / (2.0 - 2.0 ** (1.0 / 3.0))
_SUZUKI = 1.0 / (4.0 - 4.0 ** (1.0 / 3.0))
#: Step fractions of a composition of Verlet steps, by order and name of the composition.
_STAGES = {
    (4, "yoshida"): (_YOSHIDA, 1.0 - 2.0 * _YOSHIDA, _YOSHIDA),
    (4, "suzuki"): (_SUZUKI, _SUZUKI, 1.0 - 4.0 * _SUZUKI, _SUZUKI, _SUZUKI),
    (2, "yoshida"): (1.0,),
    (2, "suzuki"): (1.0,),
}


def kick_(
    p: Tensors, grad: Tensors, step: Scalar, *, damp: Scalar = 1.0, backend: str = "auto"
) -> None:
    """p ← damp·p − step·grad, in place.

    Args:
        p: momenta, a tensor or a list of tensors; fp64, fp32, bf16 or fp16, one device. Written.
        grad: ∇L, shaped like p, same dtypes.
        step: time step of the kick [time]; damp: factor without unit, e^{−γ·dt} for a damping γ.
            Floats, or 0-d tensors of fp64 or fp32 on the device of p: on a GPU they are read by the
            kernel, so a new value neither waits for the device nor recompiles, and is not checked.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see `gti_kernels.explain`.

    Accuracy: fp32 arithmetic for bf16, fp16 and fp32, fp64 for fp64; each element is rounded to its
    dtype once.

    Raises:
        TypeError, ValueError: argument, expectation, what came. RuntimeError: a derivative is
        wanted (p requires grad outside torch.no_grad()), or the named backend cannot run. p is as
        before.

    >>> import torch, gti_kernels as gti
    >>> p = torch.tensor([1.0, 2.0])
    >>> gti.kick_(p, torch.tensor([10.0, 10.0]), 0.1)
    >>> p
    tensor([0., 1.])
    """
    plain = is_plain_eager()
    if plain and type(step) is type(damp) is float and _kick_on_cpu(p, grad, step, damp, backend):
        return
    ps, grads = tensor_list(p), tensor_list(grad)
    refuse_derivative("kick_", [*ps, *grads, step, damp], _REMEDY)
    step, damp = scalars("kick_", ps, traced=not plain, step=step, damp=damp)
    if plain:
        _kick_(ps, grads, step, damp, backend)
    else:
        torch.ops.gti_kernels.kick_(ps, grads, *_alike(step, damp), backend)


def drift_(
    q: Tensors, p: Tensors, step: Scalar, *, inv_mass: InvMass = 1.0, backend: str = "auto"
) -> None:
    """q ← q + step·M⁻¹p, in place.

    Args:
        q: positions, a tensor or a list of tensors; fp64, fp32, bf16 or fp16, one device. Written.
        p: momenta, shaped like q, same dtypes.
        step: time step of the drift [time], a float or a 0-d tensor, as in `kick_`.
        inv_mass: M⁻¹, the diagonal: a float, one float per tensor, or tensors like q, whose entries
            are not looked at (a `gti_kernels.PhaseSpace` does, once).
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see `gti_kernels.explain`.

    Accuracy and errors as in `kick_`.

    >>> import torch, gti_kernels as gti
    >>> q = torch.tensor([1.0, 2.0])
    >>> gti.drift_(q, torch.tensor([4.0, 8.0]), 0.5, inv_mass=0.25)
    >>> q
    tensor([1.5000, 3.0000])
    """
    plain = is_plain_eager()
    if plain and type(step) is float and _drift_on_cpu(q, p, step, inv_mass, backend):
        return
    qs, ps = tensor_list(q), tensor_list(p)
    mass = inv_mass_list("drift_", inv_mass, qs)
    refuse_derivative("drift_", [*qs, *ps, *mass, step], _REMEDY)
    (step,) = scalars("drift_", qs, traced=not plain, step=step)
    if plain:
        _drift_(qs, ps, step, mass, [], backend)
    else:
        torch.ops.gti_kernels.drift_(qs, ps, step, *_split(mass), backend)


def kick_drift_(
    q: Tensors,
    p: Tensors,
    grad: Tensors,
    kick: Scalar,
    drift: Scalar,
    *,
    inv_mass: InvMass = 1.0,
    damp: Scalar = 1.0,
    backend: str = "auto",
) -> Tensor:
    """p ← damp·p − kick·grad, then q ← q + drift·M⁻¹p with the new p: both in one pass over memory.

    20 bytes move per fp32 parameter: grad, p and q are read, p and q written; the kinetic energy
    comes out of the same pass.

    Args:
        q, p: positions and momenta, tensors or lists of the same shapes; fp64, fp32, bf16 or fp16,
            one device. Written.
        grad: ∇L(q), shaped like q, same dtypes.
        kick, drift: time steps [time]; damp: factor of p before the kick, without unit. Floats or
            0-d tensors, as in `kick_`.
        inv_mass: M⁻¹, as in `drift_`.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see `gti_kernels.explain`.

    Returns:
        ½ pᵀM⁻¹p of the new p as it was stored, a 0-d fp64 tensor [energy].

    Accuracy and errors as in `kick_` and `kinetic_energy`; q and p must not share memory.

    >>> import torch, gti_kernels as gti
    >>> q, p = torch.tensor([1.0]), torch.tensor([0.0])
    >>> gti.kick_drift_(q, p, torch.tensor([2.0]), 0.5, 0.25)  # p = −1, q = 1 − 0.25
    tensor(0.5000, dtype=torch.float64)
    >>> q, p
    (tensor([0.7500]), tensor([-1.]))
    """
    plain = is_plain_eager()
    if plain and type(kick) is type(drift) is type(damp) is float:
        energy = _kick_drift_on_cpu(q, p, grad, kick, drift, inv_mass, damp, backend)
        if energy is not None:
            return energy
    qs, ps, grads = tensor_list(q), tensor_list(p), tensor_list(grad)
    mass = inv_mass_list("kick_drift_", inv_mass, qs)
    refuse_derivative("kick_drift_", [*qs, *ps, *grads, *mass, kick, drift, damp], _REMEDY)
    kick, drift, damp = scalars(
        "kick_drift_", qs, traced=not plain, kick=kick, drift=drift, damp=damp
    )
    if plain:
        return _kick_drift_(qs, ps, grads, kick, drift, mass, [], damp, backend)
    kick, drift, damp = _alike(kick, drift, damp)
    return torch.ops.gti_kernels.kick_drift_(
        qs, ps, grads, kick, drift, *_split(mass), damp, backend
    )


def leapfrog_(
    q: Tensors,
    p: Tensors,
    grad_fn: Callable[[Any], Tensors],
    dt: Scalar,
    *,
    steps: int = 1,
    inv_mass: InvMass = 1.0,
    damping: float = 0.0,
    order: int = 2,
    composition: str = "yoshida",
    exact: bool = False,
    backend: str = "auto",
) -> None:
    """`steps` steps of size dt of the (conformally) symplectic leapfrog, in place.

    One step of order 2, with h = dt and γ = damping:

        p ← e^{−γh/2} p;  p ← p − (h/2) ∇L(q);  q ← q + h M⁻¹p;
        p ← p − (h/2) ∇L(q);  p ← e^{−γh/2} p

    The step is a palindrome, so the same call with −dt undoes it exactly, damping included, up to
    rounding. This differs from the form often printed, which damps before the kick in both halves:
    that one is not its own reverse. γ = 0 keeps Ω; γ > 0 scales it by e^{−γt}. Order 4 composes
    such steps, of sizes

        composition="yoshida": wh, (1 − 2w)h, wh with w = 1/(2 − 2^{1/3})  (Yoshida 1990)
        composition="suzuki": wh, wh, (1 − 4w)h, wh, wh with w = 1/(4 − 4^{1/3})  (Suzuki 1990)

    Suzuki's five stages are all shorter than h and leave, on the Kepler problem, a twentieth of
    the energy error of Yoshida's three.

    Args:
        q, p: positions and momenta, tensors or lists of the same shapes and dtypes. Written.
            Parameters that require grad are accepted: the updates are not recorded.
        grad_fn: called with q, returns ∇L(q) as a tensor, or a list for a list. The last half kick
            of a stage shares its gradient with the next: steps·stages + 1 calls, with 1 stage a
            step for order 2, and 3 or 5 for order 4.
        dt: time step [time], a float or a 0-d tensor, as in `kick_`; negative goes back.
        inv_mass, backend: as in `kick_drift_`. damping: γ [1/time].
        exact: steps on the grid of integers of `gti_kernels.PhaseSpace`: the call with −dt then
            returns every bit of q and p, damping included, where grad_fn is reproducible to the
            bit; it raises where that is not so. What the way back needs is remembered as long as p
            lives, nobody else writes q or p, and the calls get these very tensors, no other views
            of their memory: those begin a walk of their own.

    Errors as in `kick_`; an exception in grad_fn leaves q and p between two stages.

    >>> import torch, gti_kernels as gti
    >>> q, p = torch.tensor([1.0], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64)
    >>> gti.leapfrog_(q, p, lambda q: q, 0.1, steps=10)  # q(1) ≈ cos 1 = 0.5403
    >>> q
    tensor([0.5400], dtype=torch.float64)
    """
    qs, ps = tensor_list(q), tensor_list(p)
    refuse_derivative("leapfrog_", [dt], "Pass dt.detach()")
    (dt,) = scalars("leapfrog_", qs, dt=dt)
    sizes = stage_sizes("leapfrog_", dt, steps, order, composition)
    damping = finite("leapfrog_", "damping", damping)
    if exact:
        from ..phase_space import exact_leapfrog_

        options: dict[str, Any] = {"order": order, "composition": composition}
        options |= {"steps": steps, "damping": damping}
        exact_leapfrog_(
            q, p, inv_mass, backend, lambda plan: plan.leapfrog_(grad_fn, dt, **options)
        )
        return
    single = isinstance(q, Tensor)

    def gradient() -> list[Tensor]:
        grad = grad_fn(q)
        if isinstance(grad, Tensor) != single:
            raise TypeError(
                f"leapfrog_: grad_fn must return {'a tensor' if single else 'a list'} as q is one, "
                f"got {type(grad).__name__}"
            )
        grads = tensor_list(grad)
        if len(grads) != len(qs):
            raise ValueError(
                f"leapfrog_: grad_fn must return one gradient for each of the {len(qs)} tensors of "
                f"q, got {len(grads)}"
            )
        # A quadratic's gradient may be q itself, which the drift is about to overwrite.
        return [g.clone() if g is q_t else g.detach() for g, q_t in zip(grads, qs)]

    compose(
        sizes,
        damping,
        gradient,
        lambda grad, kick, drift, damp: kick_drift_(
            qs, ps, grad, kick, drift, inv_mass=inv_mass, damp=damp, backend=backend
        ),
        lambda grad, kick, damp: kick_(ps, grad, kick, damp=damp, backend=backend),
    )


def stage_sizes(op: str, dt: Scalar, steps: int, order: int, composition: str) -> list[Any]:
    """The sizes of the Verlet steps that make up `steps` steps of size dt."""
    if order not in (2, 4):
        raise ValueError(f"{op}: order must be 2 or 4, got {order!r}")
    if composition not in ("yoshida", "suzuki"):
        raise ValueError(f"{op}: composition must be 'yoshida' or 'suzuki', got {composition!r}")
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"{op}: steps must be an integer of at least 0, got {steps!r}")
    dt = dt.to(torch.float64) if isinstance(dt, Tensor) else finite(op, "dt", dt)
    return [w * dt for w in _STAGES[order, composition]] * steps


def exp(x: Scalar) -> Scalar:
    """eˣ, of a tensor without reading it."""
    return x.exp() if isinstance(x, Tensor) else math.exp(x)


def compose(
    sizes: Sequence[Scalar],
    damping: float,
    gradient: Callable[[], list[Tensor]],
    kick_drift: Callable[[list[Tensor], Scalar, Scalar, Scalar], object],
    kick: Callable[[list[Tensor], Scalar, Scalar], object],
    *,
    merged: bool = True,
) -> None:
    """One damp–kick–drift–kick–damp step per size. The half kicks that meet share a gradient, and
    are one kick where `merged`."""
    left: tuple[Scalar, Scalar] | None = None  # the half kick and half damping of the stage before
    for h in sizes:
        half = exp(-0.5 * damping * h)
        grad = gradient()
        with torch.no_grad():
            if merged and left is not None:
                kick_drift(grad, half * left[0] + 0.5 * h, h, half * left[1])
            else:
                if left is not None:
                    kick(grad, *left)
                kick_drift(grad, 0.5 * h, h, half)
        left = half * 0.5 * h, half
    if left is not None:
        grad = gradient()
        with torch.no_grad():
            kick(grad, *left)


# ---- the compiled kernels: they take a call in which nothing is odd, and leave all else untouched
# --


def _kick_on_cpu(p: Any, grad: Any, step: Any, damp: Any, backend: str) -> bool:
    compiled = backends.compiled
    if compiled is None or backend not in ("auto", "cpu"):
        return False
    recording, threads = is_grad_enabled(), get_num_threads()
    try:
        done = compiled.kick_(p, grad, step, damp, recording, threads)
    except TypeError:  # a factor that is no float: the checks have the words
        return False
    if done:
        increment_version(p)
    return done


def _drift_on_cpu(q: Any, p: Any, step: Any, inv_mass: Any, backend: str) -> bool:
    compiled = backends.compiled
    if compiled is None or backend not in ("auto", "cpu"):
        return False
    recording, threads = is_grad_enabled(), get_num_threads()
    try:
        done = compiled.drift_(q, p, step, inv_mass, recording, threads)
    except TypeError:
        return False
    if done:
        increment_version(q)
    return done


def _kick_drift_on_cpu(
    q: Any, p: Any, grad: Any, kick: Any, drift: Any, inv_mass: Any, damp: Any, backend: str
) -> Tensor | None:
    compiled = backends.compiled
    if compiled is None or backend not in ("auto", "cpu"):
        return None
    recording, threads = is_grad_enabled(), get_num_threads()
    try:
        energy = compiled.kick_drift_(q, p, grad, kick, drift, inv_mass, damp, recording, threads)
    except TypeError:
        return None
    if energy is not None:
        single = isinstance(q, Tensor) and isinstance(p, Tensor)
        increment_version((q, p) if single else [*tensor_list(q), *tensor_list(p)])
    return energy


# ---- implementations of the registered ops -------------------------------------------------------


def _kick_(p: list[Tensor], grad: list[Tensor], step: Scalar, damp: Scalar, backend: str) -> None:
    step, damp = scalars("kick_", p, step=step, damp=damp)
    if type(step) is type(damp) is float:
        with torch.no_grad():
            if _kick_on_cpu(p, grad, step, damp, backend):
                return
    device, limits = limits_of_kick(p, grad)
    _kernels(backends.choose("kick_", device, backend, limits)).kick_(p, grad, step, damp)
    increment_version(p)


def _drift_(
    q: list[Tensor],
    p: list[Tensor],
    step: Scalar,
    inv_mass: list[Any],
    inv_mass_tensors: list[Tensor],
    backend: str,
) -> None:
    mass = inv_mass_tensors or inv_mass
    (step,) = scalars("drift_", q, step=step)
    if type(step) is float:
        with torch.no_grad():
            if _drift_on_cpu(q, p, step, mass, backend):
                return
    device, limits = limits_of_drift(q, p, inv_mass=mass)
    _kernels(backends.choose("drift_", device, backend, limits)).drift_(q, p, step, mass)
    increment_version(q)


def _kick_drift_(
    q: list[Tensor],
    p: list[Tensor],
    grad: list[Tensor],
    kick: Scalar,
    drift: Scalar,
    inv_mass: list[Any],
    inv_mass_tensors: list[Tensor],
    damp: Scalar,
    backend: str,
) -> Tensor:
    mass = inv_mass_tensors or inv_mass
    kick, drift, damp = scalars("kick_drift_", q, kick=kick, drift=drift, damp=damp)
    if type(kick) is type(drift) is type(damp) is float:
        with torch.no_grad():
            energy = _kick_drift_on_cpu(q, p, grad, kick, drift, mass, damp, backend)
        if energy is not None:
            return energy
    device, limits = limits_of_kick_drift(q, p, grad, inv_mass=mass)
    kernels = _kernels(backends.choose("kick_drift_", device, backend, limits))
    energy = kernels.kick_drift_(q, p, grad, kick, drift, mass, damp)
    increment_version(q)
    increment_version(p)
    return energy


def _kernels(backend: str) -> Any:
    if backend == "cuda":
        from ..cuda_kernels import leapfrog as cuda

        return cuda
    if backend == "triton":
        from ..triton_kernels import leapfrog as triton

        return triton
    if backend == "reference":
        return reference
    raise AssertionError(f"the {backend} kernels take whatever passes the checks")


# ---- checks, shared by the ops and by explain ----------------------------------------------------


def limits_of_kick(
    p: Tensors, grad: Tensors, step: float = 0.0, **_: Any
) -> tuple[torch.device, dict[str, str]]:
    """Checks the arguments; the device, and backend → why it cannot take these tensors."""
    return _limits("kick_", {"p": tensor_list(p)}, {"grad": tensor_list(grad)})


def limits_of_drift(
    q: Tensors, p: Tensors, step: float = 0.0, *, inv_mass: InvMass = 1.0, **_: Any
) -> tuple[torch.device, dict[str, str]]:
    """Checks the arguments; the device, and backend → why it cannot take these tensors."""
    read = {"p": tensor_list(p), **_mass_tensors("drift_", inv_mass, q)}
    return _limits("drift_", {"q": tensor_list(q)}, read)


def limits_of_kick_drift(
    q: Tensors,
    p: Tensors,
    grad: Tensors,
    kick: float = 0.0,
    drift: float = 0.0,
    *,
    inv_mass: InvMass = 1.0,
    **_: Any,
) -> tuple[torch.device, dict[str, str]]:
    """Checks the arguments; the device, and backend → why it cannot take these tensors."""
    read = {"grad": tensor_list(grad), **_mass_tensors("kick_drift_", inv_mass, q)}
    return _limits("kick_drift_", {"q": tensor_list(q), "p": tensor_list(p)}, read)


def _mass_tensors(op: str, inv_mass: InvMass, q: Tensors) -> dict[str, list[Tensor]]:
    mass = inv_mass_list(op, inv_mass, tensor_list(q))
    return {"inv_mass": mass} if mass and isinstance(mass[0], Tensor) else {}


def _limits(
    op: str, written: dict[str, list[Tensor]], read: dict[str, list[Tensor]]
) -> tuple[torch.device, dict[str, str]]:
    first = next(iter(written.values()))
    device = first[0].device if first and isinstance(first[0], Tensor) else torch.device("cpu")
    compiled = backends.compiled
    if compiled is not None and compiled.alike(list(written.values()), list(read.values())):
        return device, {}
    check_alike(op, **written, **read)
    check_disjoint(op, written, read)
    layout = unlike_layouts(**written, **read)
    return device, {} if layout is None else dict.fromkeys(("cpu", "triton", "cuda"), layout)


def _split(mass: list[Any]) -> tuple[list[float], list[Tensor]]:
    return ([], mass) if mass and isinstance(mass[0], Tensor) else (mass, [])


def _alike(*numbers: Any) -> Sequence[Any]:
    """All floats, or all tensors: the schemas of the registered ops know no mixture."""
    device = next((x.device for x in numbers if isinstance(x, Tensor)), None)
    if device is None:
        return numbers
    return [
        x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=device)
        for x in numbers
    ]


def _fake_kick_(
    p: list[Tensor], grad: list[Tensor], step: Scalar, damp: Scalar, backend: str
) -> None:
    check_alike("kick_", p=p, grad=grad)


def _fake_drift_(
    q: list[Tensor],
    p: list[Tensor],
    step: Scalar,
    inv_mass: list[float],
    inv_mass_tensors: list[Tensor],
    backend: str,
) -> None:
    check_alike("drift_", q=q, p=p)


def _fake_kick_drift_(
    q: list[Tensor],
    p: list[Tensor],
    grad: list[Tensor],
    kick: Scalar,
    drift: Scalar,
    inv_mass: list[float],
    inv_mass_tensors: list[Tensor],
    damp: Scalar,
    backend: str,
) -> Tensor:
    check_alike("kick_drift_", q=q, p=p, grad=grad)
    return torch.empty((), dtype=torch.float64, device=q[0].device if q else None)


# Each op twice: with floats, and (`.scalars`) with 0-d tensors, which a traced call does not read.
for _overload, _number in (("", "float"), (".scalars", "Tensor")):
    register(
        f"kick_{_overload}(Tensor(a!)[] p, Tensor[] grad, {_number} step, {_number} damp, "
        "str backend) -> ()",
        _kick_,
        _fake_kick_,
    )
    register(
        f"drift_{_overload}(Tensor(a!)[] q, Tensor[] p, {_number} step, float[] inv_mass, "
        "Tensor[] inv_mass_tensors, str backend) -> ()",
        _drift_,
        _fake_drift_,
    )
    register(
        f"kick_drift_{_overload}(Tensor(a!)[] q, Tensor(b!)[] p, Tensor[] grad, {_number} kick, "
        f"{_number} drift, float[] inv_mass, Tensor[] inv_mass_tensors, {_number} damp, "
        "str backend) -> Tensor",
        _kick_drift_,
        _fake_kick_drift_,
    )
