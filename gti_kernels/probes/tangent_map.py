"""The tangent map of a step: exact derivatives of Φ_dt applied to m tangents at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..ops.leapfrog import kick_, kick_drift_
from .batch_statistics import functional_normalization
from .hamiltonian_system import HamiltonianSystem, State, laid_out_like
from .live_state import kept_values

#: Bytes that the activations of one batch of tangents may take (`chunk_of`).
MEMORY = 2**30
#: Memory of m tangents in units of what a gradient saves, over m + 1: the activations, their
#: gradients, and as much again while these are formed, for each tangent and for the point itself.
_SHARES = 3

#: What torch says of an op without a forward rule, and of one that torch.func does not take.
_NO_FORWARD_RULE = (
    *("forward AD", "forward-mode", "jvp", "setup_context", "functorch transforms"),
    *("torch.func", "ZeroTensor"),
)
#: What it says where vmap does not take the model: of a layout that only the tensor without the
#: tangents has, and of memory that it asks for.
_NO_VMAP = ("vmap", "view size is not compatible", "data pointer of Tensor")


class Differentiator:
    """Differentials of functions of the parameters, `chunk` tangents at a time.

    Forward over reverse, vmapped, all tangents sharing one evaluation of the function itself. Where
    torch refuses that for the model (an op without a forward rule, say), two backward passes for
    each tangent instead: said once in a warning, and in `method`.
    """

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self.method = "forward over reverse"

    def __call__(self, f: Callable[..., Any], point: tuple, tangents: tuple) -> tuple[Any, Any]:
        """f(point) and Df(point)·tangent for tangents stacked along a new first axis."""
        m = tree_flatten(tangents)[0][0].shape[0]
        if self.method == "double backward":
            return self._backward_twice(f, point, tangents, m)
        chunk, parts, first = self.chunk, [], 0
        value = None
        while first < m:
            part = tree_map(lambda x, a=first, b=first + chunk: x[a:b], tangents)
            try:
                value, derivative = self._forward(f, point, part, batched=chunk > 1)
            except (RuntimeError, NotImplementedError) as error:
                if chunk > 1 and (
                    isinstance(error, torch.OutOfMemoryError) or _says(error, _NO_VMAP)
                ):
                    # Models that vmap does not take (as with writes into tensors of their own), or
                    # too little memory: one at a time.
                    self.chunk = chunk = 1
                    continue
                if not _says(error, _NO_FORWARD_RULE + _NO_VMAP):
                    raise
                return self._second_try(f, point, tangents, m, error)
            parts.append(derivative)
            first += chunk
        return value, parts[0] if len(parts) == 1 else tree_map(lambda *x: torch.cat(x), *parts)

    def _forward(
        self, f: Callable[..., Any], point: tuple, tangents: tuple, batched: bool
    ) -> tuple[Any, Any]:
        def along(*tangent: Any) -> tuple[Any, Any]:
            value, derivative = jvp(f, point, tangent)  # type: ignore[misc]
            return value, derivative

        if batched:
            # The value is the same for every tangent (out_dims None), unknown to the stub.
            return vmap(along, out_dims=(None, 0), randomness="same")(*tangents)  # type: ignore[arg-type]
        value, derivative = along(*tree_map(lambda x: x[0], tangents))
        return value, tree_map(lambda x: x.unsqueeze(0), derivative)

    def _second_try(
        self, f: Callable[..., Any], point: tuple, tangents: tuple, m: int, error: Exception
    ) -> tuple[Any, Any]:
        try:
            out = self._backward_twice(f, point, tangents, m)
        except (RuntimeError, NotImplementedError) as second:
            if isinstance(second, torch.OutOfMemoryError):
                raise
            if str(second) == str(error):  # nothing of differentiation
                raise error from None
            raise RuntimeError(
                f"system: the model has an op that cannot be differentiated twice. Forward over "
                f'reverse: "{_first_line(error)}"; backward twice: "{_first_line(second)}". '
                f'Replace the op, or use central differences (method="fd")'
            ) from second
        self.method = "double backward"
        warnings.warn(
            f"tangents by two backward passes each, slower: no forward over reverse for this model "
            f'("{_first_line(error)}")',
            stacklevel=2,
        )
        return out

    def _backward_twice(
        self, f: Callable[..., Any], point: tuple, tangents: tuple, m: int
    ) -> tuple[Any, Any]:
        """J t = ∂⟨Jᵀu, t⟩/∂u: the adjoint, linear in u, is differentiated again."""
        leaves, shape = tree_flatten(point)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in leaves]
            values, out_shape = tree_flatten(f(*tree_unflatten(leaves, shape)))
            used = [v for v in values if v.requires_grad]
            _refuse_dead_ends(used)
            u = [torch.zeros_like(v, requires_grad=True) for v in used]
            adjoint = (
                torch.autograd.grad(used, leaves, u, create_graph=True, allow_unused=True)
                if used
                else [None] * len(leaves)
            )
            rows = []
            for i in range(m):
                pairs = [
                    (a, t[i])
                    for a, t in zip(adjoint, tree_flatten(tangents)[0], strict=True)
                    if a is not None and a.requires_grad
                ]
                derivative = iter(
                    torch.autograd.grad(
                        [a for a, _ in pairs],
                        u,
                        [t for _, t in pairs],
                        retain_graph=True,
                        allow_unused=True,
                    )
                    if pairs
                    else [None] * len(u)
                )
                row = [next(derivative) if v.requires_grad else None for v in values]
                rows.append([torch.zeros_like(v) if x is None else x for v, x in zip(values, row)])
        stacked = [torch.stack(xs) for xs in zip(*rows, strict=True)]
        return (
            tree_unflatten([v.detach() for v in values], out_shape),
            tree_unflatten(stacked, out_shape),
        )


def chunk_of(system: HamiltonianSystem, state: State, memory: int) -> int:
    """How many tangents `memory` bytes hold, by what one gradient saves of its activations."""
    saved: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        if x.layout == torch.strided:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda x: x)
    layers = system.layers if system.regime == "batch" else {}
    restore = kept_values(state.b[name] for name in system.buffers)
    try:
        with torch.enable_grad(), hooks, sdpa_kernel(SDPBackend.MATH):
            q = [x.detach().requires_grad_() for x in state.q]
            with functional_normalization(layers):
                system.loss(q, state.b, 0)
    except RuntimeError:  # torch.func within the model takes no such hooks
        return 1
    finally:
        restore()
    size = _SHARES * (8 * system.size + sum(saved.values()))
    return max(1, memory // max(1, size) - 1)


def push_step(
    system: HamiltonianSystem,
    state: State,
    tangents: State,
    t: int,
    dt: float,
    differential: Differentiator,
) -> None:
    """Step t of the map and of its derivative, both in place.

        (q, p, b) ← Φ_dt(q, p, b),   (dq, dp, db) ← DΦ_dt(q, p, b) · (dq, dp, db)

    state: (q, p, b) in fp64; tangents: m tangents, [m, *shape] per tensor, db only for the running
    statistics in the regime "running" (the updated statistics depend on q, and later forces on
    them), else empty. The kicks and drifts are linear, so the tangents go through the same kernels
    as the state, with the Hessian-vector products H·dq + (∂∇L/∂b)·db in place of the gradient.
    Where the next step's first half kick asks for the same products, they are not formed again
    (`LastForce`).
    """
    damp = system.decay(dt)
    if system.regime == "running" and system.layers:
        _push_statistics(system, state, tangents, t, differential)
    for half in (0, 1):
        value, derivative = tangents.last_force(
            [*state.q, *state.b.values(), *tangents.q, *tangents.b.values()],
            system.batch_number(t),
            system.random_seed(t),
            lambda: force(system, state, tangents, t, differential),
        )
        with system.clock("kernels"):
            for z, f in ((state, value), (tangents, derivative)):
                if half == 0:
                    kick_drift_(
                        z.q,
                        z.p,
                        f,
                        dt / 2,
                        dt,
                        inv_mass=system.inv_mass,
                        damp=damp,
                        backend=system.backend,
                    )
                else:
                    kick_(z.p, f, damp * dt / 2, damp=damp, backend=system.backend)


def force(
    system: HamiltonianSystem, state: State, tangents: State, t: int, differential: Differentiator
) -> tuple[list[Tensor], list[Tensor]]:
    """∇L_t(q; b) and its derivative along the tangents."""
    layers = system.layers if system.regime in ("batch", "running") else {}
    restore = kept_values(state.b[name] for name in system.buffers)

    def gradient(q: list[Tensor], b: dict[str, Tensor]) -> list[Tensor]:
        restore()  # one evaluation advances them, however many this takes
        running = {**state.b, **b} if system.regime == "running" else None
        with functional_normalization(layers, running):
            if torch._C._functorch.maybe_current_level() is not None:
                return grad(system.loss)(q, state.b, t)
            loss = system.loss(q, state.b, t)  # to be differentiated backwards
            grads = torch.autograd.grad(loss, q, create_graph=True, allow_unused=True)
            return [torch.zeros_like(x) if g is None else g for x, g in zip(q, grads, strict=True)]

    point = (state.q, {name: state.b[name] for name in tangents.b})
    # The math backend of attention is the one with forward derivatives.
    with system.clock("gradients"), sdpa_kernel(SDPBackend.MATH):
        before = differential.method
        along = (tangents.q, tangents.b)
        value, derivative = system.held(state, lambda _: differential(gradient, point, along))
        if differential.method != before:
            system.held(state, lambda _: _check_symmetry(gradient, point, differential))
        return (
            [laid_out_like(q, f) for q, f in zip(state.q, value, strict=True)],
            [laid_out_like(dq, df) for dq, df in zip(tangents.q, derivative, strict=True)],
        )


def _check_symmetry(
    gradient: Callable[..., list[Tensor]], point: tuple, differential: Differentiator
) -> None:
    """RuntimeError where xᵀH y and yᵀH x of two random vectors differ: some ops' formulas (torch's
    as well) are wrong when they are differentiated twice backwards, without a word."""
    q, *others = point
    generator = torch.Generator().manual_seed(0)
    xy = [
        torch.randn(2, *x.shape, generator=generator, dtype=x.dtype, device="cpu").to(x.device)
        for x in q
    ]
    zeros = tree_map(lambda x: x.new_zeros(2, *x.shape), others)
    _, h = differential(gradient, point, (xy, *zeros))
    one = sum(float((a[0] * b[1]).sum()) for a, b in zip(xy, h, strict=True))
    other = sum(float((a[1] * b[0]).sum()) for a, b in zip(xy, h, strict=True))
    size = sum(float((a[0] * b[1]).abs().sum()) for a, b in zip(xy, h, strict=True))
    if abs(one - other) > 1e-8 * size:
        raise RuntimeError(
            f"system: expected symmetric second derivatives, got xᵀH y = {one:.9g} and "
            f"yᵀH x = {other:.9g} by two backward passes: an op of the model has a wrong second "
            f'derivative. Replace it, or use central differences (method="fd")'
        )


def _push_statistics(
    system: HamiltonianSystem, state: State, tangents: State, t: int, differential: Differentiator
) -> None:
    """b ← (1 − m) b + m·μ(q), db ← (1 − m) db + m Dμ·dq, μ the moments of batch t."""

    def moments(q: list[Tensor]) -> dict[str, Tensor]:
        return system.batch_moments(q, state.b, t)

    with system.clock("gradients"):
        value, derivative = differential(moments, (state.q,), (tangents.q,))
    for name, m in system.count_batch(state).items():
        state.b[name] = torch.lerp(state.b[name], value[name], m)
        tangents.b[name] = torch.lerp(tangents.b[name], derivative[name], m)


def hessian_products(system: HamiltonianSystem, state: State, dq: list[Tensor]) -> list[Tensor]:
    """H·dq for m vectors dq, [m, *shape] per tensor, H the Hessian of the first batch's loss."""
    return force(system, state, State(dq, dq, {}), 0, Differentiator(len(dq[0])))[1]


def _refuse_dead_ends(values: list[Tensor]) -> None:
    """Raises where a gradient in the graph of `values` has no derivative itself.

    Such a node ends the graph, so that autograd.grad goes around it without a word (as with
    once_differentiable).
    """
    stack: list[Any] = [v.grad_fn for v in values]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
    if any(node.name() == "torch::autograd::Error" for node in seen):
        python = torch.autograd.function.BackwardCFunction
        names = sorted({type(node).__name__ for node in seen if isinstance(node, python)})
        raise RuntimeError(f"once_differentiable forbids it, in one of {', '.join(names)}")


def _says(error: Exception, words: tuple[str, ...]) -> bool:
    return any(x in str(error) for x in words)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
