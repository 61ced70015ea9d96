"""Steps on a grid of integers, which can be taken back to the last bit.

    q = u·Q + r,   p = s (v·P + r')

Q, P are int64; u, v powers of two per tensor; the remainders r, r' stay as they were at the start.
Damping and rescaling of the momenta only touch s. It lives on a grid too: log₂ s is an integer, in
units of 2⁻⁵², so that a factor is taken back by a subtraction. s is one number for all tensors but
those that a damped kick has skipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, get_num_threads

from . import backends
from .exact_moves import DRIFT, KICK, SCALING, Move, Moves
from .layouts import allocate, laid_out_like, layout
from .reference import phase_space as reference

if TYPE_CHECKING:
    from .phase_space import PhaseSpace

# Units of the grid, relative to the scale of a tensor: its largest |x|, but at least 1/16 so that a
# small tensor may grow; 1 where all are zero. Integers stay below 2⁶²: q may grow to 2¹⁴ times its
# scale; p to 2²² times, as damping does not make its integers shrink. An increment stays below 2⁵¹.
UNIT_Q, UNIT_P = 2.0**-48, 2.0**-40

_LOG_BITS = 52  # of the fraction of log₂ s
_LOG_LIMIT = 830 << _LOG_BITS  # s and 1/s stay far from overflow
_LN_2 = 0.6931471805599453


class Grid:
    """The engine of a `PhaseSpace` with exact=True."""

    def __init__(self, space: PhaseSpace, momenta: list[Tensor]) -> None:
        self.space = space
        self.log = 0  # log₂ s
        self.own: dict[int, int] = {}  # by how much log₂ s of a tensor differs from that
        self.moves = Moves()
        self.dtypes = [p.dtype for p in momenta]
        q = [x.detach() for x in space.params]
        self.unit_q = [_unit(x, UNIT_Q) for x in q]
        self.unit_p = [_unit(x, UNIT_P) for x in momenta]
        both, self.memory = allocate([*q, *q], [torch.int64] * (2 * len(q)))
        self.Q, self.P = both[: len(q)], both[len(q) :]
        with torch.no_grad():
            for grid, x, unit in zip(both, [*q, *momenta], [*self.unit_q, *self.unit_p]):
                grid.copy_((x.double() / unit).round())
            self.rest_q = _remainders(q, self.Q, self.unit_q)
            self.rest_p = _remainders(momenta, self.P, self.unit_p)
        space._momentum_memory = self.memory
        self._make_plan()

    def _make_plan(self) -> None:
        space = self.space
        self.mass = [
            laid_out_like(q, w.detach().double()) if isinstance(w, Tensor) else w
            for q, w in zip(space.params, space.inv_mass)
        ]
        self.versions = self._versions()
        self.places = [q.data_ptr() for q in space.params]
        bits = [x.view(torch.float64) for x in (*self.Q, *self.P)]  # what bindings can see
        n = len(self.Q)
        owned = [x.view(torch.float64) for x in self.memory]
        owned += [x for x in (*self.mass, *self.rest_q) if isinstance(x, Tensor)]
        tensors = (bits[:n], bits[n:], self.rest_q, self.mass, owned)
        self.plan = space.plan("GridPlan", *tensors, self.unit_q, self.unit_p)

    def momenta(self) -> list[Tensor]:
        """p, made anew."""
        out = []
        scales = self._scales()
        for P, r, v, s, dtype in zip(self.P, self.rest_p, self.unit_p, scales, self.dtypes):
            out.append((s * reference.off_grid(P, v, r)).to(dtype))
        return out

    def _scales(self) -> list[float]:
        """s of each tensor."""
        scales = [power_of_two(self.log)] * len(self.P)
        for i, offset in self.own.items():
            scales[i] = power_of_two(self.log + offset)
        return scales

    # ---- moves -----------------------------------------------------------------------------------

    def step(
        self, op: str, kick: Any, damp: Any, drift: Any, grads: Any, skipped: tuple[int, ...]
    ) -> Tensor:
        """One call of the plan: forward, or back where it undoes what was done last."""
        if kick is not None:
            if damp <= 0.0:
                raise ValueError(f"{op}: damp must be positive with exact=True, got {damp}")
            if grads is None:
                grads = [q.grad for q in self.space.params]  # held: an error reads them again
            skipped = missing(grads)
            if self.space.takes_back and self._undoes_kick(kick, damp):
                _, energy = self.take_back_kick(op, grads)
                if drift is None:
                    return energy
                kick, damp = None, 1.0
        if self.space.takes_back and kick is None and self._undoes_drift(drift):
            return self.take_back_drift(op)[1]
        log = 0 if kick is None else _log_of(damp)
        return self._forward(op, kick, log, drift, grads, skipped)

    def _undoes_drift(self, drift: float) -> bool:
        last = self.moves.last()
        if last is None or last.kind != DRIFT:
            return False
        return math.isclose(last.step, -drift, rel_tol=1e-9)

    def _undoes_kick(self, kick: float, damp: float) -> bool:
        """p ← (p + k·∇L)/c undoes p ← c·p − k·∇L."""
        last = self.moves.last()
        return (
            last is not None
            and last.kind == KICK
            and math.isclose(last.step, -kick / damp, rel_tol=1e-9)
            and _opposite(last.log, damp)
        )

    def _forward(
        self, op: str, kick: Any, log: int, drift: Any, grads: Any, skipped: tuple[int, ...]
    ) -> Tensor:
        self._check_versions(op)
        kicks, drifts = kick is not None, drift is not None
        self._scale(op, log, skipped)
        numbers = (kick if kicks else 0.0, drift if drifts else 0.0)
        try:
            done = self._pass(op, kicks, drifts, False, *numbers, grads, skipped)
            checksum, inside, energy = done
            if not inside:
                if drifts:
                    self._pass(op, False, True, True, *numbers, None, skipped)
                if kicks:
                    self._pass(op, True, False, True, *numbers, grads, skipped)
                what = "a coordinate or an increment"
                raise OverflowError(_overflow(op, what, "too large, or no number"))
        except BaseException:
            self._scale(op, -log, skipped)
            raise
        if kicks:
            self.moves.push(KICK, kick, log, skipped, checksum)
            self.space.skipped = skipped
        if drifts:
            self.moves.push(DRIFT, drift, 0, skipped)
        self.space.step_count += drifts
        return energy

    def take_back_kick(
        self, op: str, grads: Sequence[Tensor | None], step: int | None = None
    ) -> tuple[Move, Tensor]:
        """Undoes the last move, a kick, which had these gradients; returns it."""
        self._check_versions(op)
        last, skipped = self._last(op, KICK, "a kick"), missing(grads)
        numbers = (last.step, 0.0, grads, last.skipped)
        if step is None:
            step = math.ceil(self.space.step_count / self.space.stages)
        where = f"{op}: the way back leaves the way out at step {step}: "
        if skipped != last.skipped:
            i = min(set(skipped) ^ set(last.skipped))
            raise RuntimeError(
                f"{where}the gradient of params[{i}] is {'' if i in skipped else 'not '}None, but "
                f"was {'not' if i in skipped else 'None'} on the way out"
            )
        checksum, _, energy = self._pass(op, True, False, True, *numbers)
        if checksum != self.moves.checksums[-1]:
            self._pass(op, True, False, False, *numbers)
            raise RuntimeError(
                f"{where}the gradient there is not the same to the bit. Use the same batch, random "
                f"state and buffers, and torch.use_deterministic_algorithms(True)"
            )
        self._scale(op, -last.log, last.skipped)
        self.moves.pop()
        self.space.skipped = skipped
        return last, energy

    def redo_kick(self, op: str, move: Move, grads: Sequence[Tensor | None]) -> None:
        """Makes again what `take_back_kick` returned."""
        self._forward(op, move.step, move.log, None, grads, missing(grads))

    def take_back_drift(self, op: str) -> tuple[float, Tensor]:
        """Undoes the last move, a drift; returns its step, and the kinetic energy."""
        self._check_versions(op)
        last = self._last(op, DRIFT, "a drift")
        *_, energy = self._pass(op, False, True, True, 0.0, last.step, None, last.skipped)
        self.moves.pop()
        self.space.step_count -= 1
        return last.step, energy

    def _last(self, op: str, kind: int, name: str) -> Any:
        last = self.moves.last()
        if last is None or last.kind != kind:
            raise RuntimeError(f"{op}: the last move to take back must be {name}")
        return last

    def _pass(
        self,
        op: str,
        kicks: bool,
        drifts: bool,
        back: bool,
        kick: float,
        drift: float,
        grads: Any,
        skipped: tuple[int, ...],
    ) -> tuple[int, bool, Tensor]:
        """One pass over memory, with the present s."""
        numbers = (kicks, drifts, back, kick, drift)
        space, result = self.space, None
        own = {i: power_of_two(self.log + offset) for i, offset in self.own.items()}
        scale = (power_of_two(self.log), own, get_num_threads())
        # Without the compiled part a plan cannot check by itself.
        if self.plan is not None and backends.compiled is not None:
            result = self.plan.step(grads, skipped, *numbers, *scale)
        if result is None:
            with torch.no_grad():
                grads = space.checked(op, grads, kicks)
                if self.plan is not None:
                    result = self.plan.step(grads, skipped, *numbers, *scale)
                else:
                    tensors = (space.params, self.rest_q, self.Q, self.P, grads, self.mass)
                    units = (self.unit_q, self.unit_p, self._scales())
                    args: Any = (*tensors, *units, *numbers, skipped)
                    checksum, inside, energy = reference.grid_step(*args)
                    result = int(checksum) & reference.MASK, bool(inside), energy
        if result is None:
            raise RuntimeError(
                f"{op}: the plan is stale: the memory of its grid has moved. Make a new PhaseSpace"
            )
        space.wrote(q=drifts, p=kicks, skipped=skipped)
        if drifts:
            self.versions = self._versions()
        return result

    def check(self, op: str, kicks: bool) -> None:
        self._check_versions(op)
        if not kicks or self.plan is None or backends.compiled is None or not self.plan.ready():
            self.space.checked(op, None, kicks)

    def scale_(self, factor: float) -> None:
        """p ← factor·p for all tensors."""
        last = self.moves.last()
        if not factor > 0.0:
            raise ValueError(f"scale_momenta_: factor must be positive, got {factor}")
        if last is not None and last.kind == SCALING and _opposite(last.log, factor):
            self.log -= last.log
            self.moves.pop()
            return
        log = _log_of(factor)
        self._scale("scale_momenta_", log, ())
        self.moves.push(SCALING, 0.0, log, ())

    def _scale(self, op: str, log: int, skipped: tuple[int, ...]) -> None:
        """s ← 2^log·s, but for the tensors that are skipped."""
        if log == 0:
            return
        own = dict(self.own) if skipped else self.own
        for i in skipped:
            own[i] = own.get(i, 0) - log
            if own[i] == 0:
                del own[i]
        reach = abs(self.log + log) + max(map(abs, own.values()), default=0)
        if reach > _LOG_LIMIT:
            s = power_of_two(max(min(self.log + log, _LOG_LIMIT), -_LOG_LIMIT))
            raise OverflowError(_overflow(op, "the factor s of the momenta", f"{s:.0e}"))
        self.log, self.own = self.log + log, own

    # ---- what others wrote -----------------------------------------------------------------------

    def _versions(self) -> list[int]:
        return versions(self.space.params)

    def _check_versions(self, op: str) -> None:
        versions = self._versions()
        if versions != self.versions:
            i = next(i for i, (a, b) in enumerate(zip(versions, self.versions)) if a != b)
            raise RuntimeError(
                f"{op}: the plan is stale: params[{i}] was written since the last step, but with "
                f"exact=True its grid holds the position. Make a new PhaseSpace"
            )
        places = [q.data_ptr() for q in self.space.params]
        if places != self.places:
            for i, (q, was, now) in enumerate(zip(self.space.params, self.places, places)):
                alike = layout(q) == self.space._layouts[i]  # else the plan itself says so
                if now not in (was, 0) and alike and not torch.equal(q, self._position(i)):
                    raise RuntimeError(
                        f"{op}: the plan is stale: the data of params[{i}] was replaced, but with "
                        f"exact=True its grid holds the position. Make a new PhaseSpace"
                    )
            self.places = places

    def _position(self, i: int) -> Tensor:
        """q of the i-th tensor, from the grid."""
        wide = reference.off_grid(self.Q[i], self.unit_q[i], self.rest_q[i])
        return reference.by_way_of_fp32(wide, self.space.params[i].dtype)

    # ---- saving ----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything, as copies."""

        def copies(xs: Sequence[Tensor | None]) -> list[Tensor | None]:
            return [None if x is None else x.clone() for x in xs]

        return {
            "dtypes": [q.dtype for q in self.space.params],
            "Q": copies(self.Q),
            "P": copies(self.P),
            "rest_q": copies(self.rest_q),
            "rest_p": copies(self.rest_p),
            "unit_q": list(self.unit_q),
            "unit_p": list(self.unit_p),
            "log": self.log,
            "own": dict(self.own),
            "moves": self.moves.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned, and the positions."""
        self.unit_q, self.unit_p = list(state["unit_q"]), list(state["unit_p"])
        self.log, self.own = state["log"], dict(state["own"])
        self.moves = Moves.of(state["moves"])
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
        for i, q in enumerate(params):
            q.copy_(self._position(i))
        self._make_plan()


def versions(xs: Sequence[Tensor]) -> list[int]:
    """The version counters."""
    try:
        return [x._version for x in xs]
    except RuntimeError:  # an inference tensor has none
        return [0 if x.is_inference() else x._version for x in xs]


def missing(grads: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Places of the gradients that are None."""
    return tuple([i for i, g in enumerate(grads) if g is None])


def power_of_two(log: int) -> float:
    """2^(log·2⁻⁵²), from sums, products and quotients alone: the same bits on every machine."""
    whole = (log + (1 << (_LOG_BITS - 1))) >> _LOG_BITS
    x = math.ldexp(log - (whole << _LOG_BITS), -_LOG_BITS) * _LN_2
    series = 1.0
    if x:
        for n in range(18, 0, -1):  # eˣ for |x| ≤ ln(2)/2
            series = 1.0 + series * x / n
    return math.ldexp(series, whole)


def _log_of(factor: float) -> int:
    return round(math.ldexp(math.log2(factor), _LOG_BITS))


def _opposite(log: int, factor: float) -> bool:
    """Whether `factor` undoes one of this logarithm, to a relative 1e-9."""
    return abs(log + _log_of(factor)) < 1 << (_LOG_BITS - 30)


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
    """x − unit·grid, which is exact, or None where it is +0 everywhere."""
    rest = [(x.double() - u * g.double()) for x, g, u in zip(xs, grids, units)]
    zero = [not bool(r.view(torch.int64).any()) for r in rest]
    return [None if z else torch.empty_like(x).copy_(r) for x, r, z in zip(xs, rest, zero)]


def _overflow(op: str, what: str, value: str) -> str:
    return (
        f"{op}: {what} would leave the grid of exact=True ({value}); the state is as before. Take "
        f"a smaller dt or less damping, or a higher energy cap, or start a new PhaseSpace from here"
    )
