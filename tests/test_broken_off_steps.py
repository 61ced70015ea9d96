"""Steps and ways back that break off: an error, an overflow of the grid or Ctrl-C in the middle."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading

import pytest
import torch
from test_leapfrog_optimizer import closure_of, grid_state, parameter, same, values

import gti_kernels as gti
from gti_kernels.exact_moves import DRIFT, KICK
from gti_kernels.interrupts import Uninterrupted


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def ctrl_c_raises():
    """A process that a shell has begun in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def two_groups(**options):
    """The gradient of one parameter may be None, which then is not damped with the others."""
    a, b, c = parameter(0.3, -1.2), parameter(0.5), parameter(0.7, 0.1)
    groups = [{"params": [a, c]}, {"params": [b], "lr": 0.15, "damping": 0.1}]
    optimizer = gti.optim.Leapfrog(groups, 0.1, damping=0.3, momentum="gaussian", **options)
    return (a, b, c), optimizer


def closure_over(params, optimizer, *, with_c=True):
    a, b, c = params
    return closure_of(
        optimizer,
        lambda: 5.0 + a.sin().sum() + 2.0 * b.cos().sum() + ((c * a).sum() if with_c else 0.0),
    )


def take_step(optimizer, form, closure):
    optimizer.step(closure) if form == "closure" else optimizer.step(loss=closure())


def everything(optimizer):
    """All bits that the next step and the way back depend on. K is left out: once forgotten, it
    comes from another kernel."""
    state = optimizer.state_dict()["state"]["phase_space"]
    del state["kinetic"]
    walked, (last, _) = state.pop("walked"), state.pop("unfinished")
    steps = [walked["kinds"][i] for i in walked["steps"].tolist()]
    if last is not None:  # not on the stack yet
        steps.append((last[0], tuple(map(tuple, last[1]))))
    for plan in state["plans"]:
        del plan["skipped"]
    return [steps, state, [q.detach().clone() for s in optimizer.phase_spaces for q in s.params]]


def alike(x, y):
    if isinstance(x, torch.Tensor):
        return isinstance(y, torch.Tensor) and torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(alike(x[k], y[k]) for k in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(alike, x, y))
    return x == y


def back_to_the_start(optimizer, closure):
    with pytest.raises(RuntimeError, match="a step to walk back"):
        while True:
            optimizer.reverse(closure)


# ---- overflow of the grid ------------------------------------------------------------------------


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize(
    ("form", "order", "at"),
    [("staggered", 2, 1)] + [("closure", n, at) for n in (2, 4) for at in range(1, n + 1)],
)
def test_an_exact_step_that_overflows_anywhere_has_not_been(form, order, at, group):
    """at: the evaluation in the step whose gradient is too large."""
    params, optimizer = two_groups(exact=True, order=order, energy_cap=0.9)
    closure, start = closure_over(params, optimizer), grid_state(optimizer)

    def steep():
        loss = closure()
        if closure.calls == 1:
            first_loss.append(loss.item())
        if closure.calls == at:
            params[group].grad.fill_(1e30)
        return loss

    other = "staggered" if order == 2 else form  # what the broken step comes after
    for step_before in (None, form, other):
        if step_before is not None:
            take_step(optimizer, step_before, closure)
            energy = optimizer.energy()
        before, closure.calls, first_loss = everything(optimizer), 0, []
        with pytest.raises(OverflowError, match="the state is as before. Take a smaller dt"):
            optimizer.zero_grad()
            take_step(optimizer, form, steep)
        assert alike(everything(optimizer), before)
        if step_before is not None:
            torch.testing.assert_close(optimizer.energy(), energy, rtol=1e-11, atol=0.0)
    assert 0 < int(optimizer.cap_engagements) <= 2
    if form == "closure":
        assert optimizer.step(steep).item() == first_loss[0]  # that of these positions
    back_to_the_start(optimizer, closure)
    assert same(grid_state(optimizer), start)


@pytest.mark.parametrize("form", ["staggered", "closure"])
def test_the_way_back_begins_at_the_step_before_an_overflow(form):
    params, optimizer = two_groups(exact=True)
    closure, start = closure_over(params, optimizer), grid_state(optimizer)
    take_step(optimizer, form, closure)
    params[1].grad.fill_(1e30)
    with pytest.raises(OverflowError):
        optimizer.step()
    optimizer.reverse(closure)
    assert same(grid_state(optimizer), start)


def test_an_overflow_in_the_closure_is_no_overflow_of_the_grid():
    params, optimizer = two_groups(exact=True)
    closure, start = closure_over(params, optimizer), grid_state(optimizer)

    def failing():
        if closure.calls == at:
            raise OverflowError
        return closure()

    at = -1
    for first in (0, 1):  # at the beginning of a step; at its end
        optimizer.step(closure)
        closure.calls, at, positions = 0, first, grid_state(optimizer)
        optimizer.zero_grad()
        with pytest.raises(OverflowError):
            optimizer.step(failing)
        assert same(grid_state(optimizer), positions) == (first == 0)
        assert closure.calls == first  # nothing has been walked back
    back_to_the_start(optimizer, closure)
    assert same(grid_state(optimizer), start)


def test_an_overflow_whose_step_cannot_be_taken_back_is_still_whole():
    """Its beginning is found to have another gradient: `reverse` with the right one goes on."""
    params, optimizer = two_groups(exact=True)
    closure, start = closure_over(params, optimizer), grid_state(optimizer)

    def unsteady():
        loss = closure()
        if closure.calls > 1:
            params[1].grad.mul_({2: 1e30, 3: 1.5}[closure.calls])
        return loss

    with pytest.raises(RuntimeError, match="the gradient there is not the same to the bit"):
        optimizer.step(unsteady)
    optimizer.step(closure)
    back_to_the_start(optimizer, closure)
    assert same(grid_state(optimizer), start)


def test_the_cap_counts_steps_that_were_made():
    for exact in (False, True):
        q = parameter(1.0)
        optimizer = gti.optim.Leapfrog([q], 0.1, energy_cap=0.5, exact=exact, momentum="gaussian")
        q.grad = torch.ones_like(q).to_sparse()
        with pytest.raises(TypeError, match="dense"):
            optimizer.step(loss=0.0)
        assert optimizer.cap_engagements.item() == 0
        q.grad = torch.ones_like(q)
        optimizer.step(loss=0.0)
        assert optimizer.cap_engagements.item() == 1


# ---- the way back --------------------------------------------------------------------------------


def none(q):
    return None


def sparse(q):
    return q.grad.to_sparse()


def other_bits(q):
    return torch.nextafter(q.grad, 2.0 * q.grad) * 1.001


def momenta(optimizer):
    return [p.clone() for space in optimizer.phase_spaces for p in space.momenta]


@pytest.mark.parametrize("form", ["staggered", "closure"])
@pytest.mark.parametrize(
    ("exact", "spoilt", "error", "words"),
    [
        (False, none, RuntimeError, "None"),
        (False, sparse, TypeError, "dense"),
        (True, none, RuntimeError, "None"),
        (True, sparse, TypeError, "dense"),
        (True, other_bits, RuntimeError, "not the same to the bit"),
    ],
)
def test_groups_go_back_all_or_none(exact, spoilt, error, words, form):
    params, optimizer = two_groups(exact=exact)
    closures = [closure_over(params, optimizer, with_c=not exact or t % 2 < 1) for t in range(4)]
    start = [*momenta(optimizer), *(q.detach().clone() for q in params)]
    for closure in closures:
        take_step(optimizer, form, closure)

    def spoiling():
        loss = closure()
        if closure.calls == spoil_at:
            params[1].grad = spoilt(params[1])
            seen.append(momenta(optimizer))
        return loss

    for t, closure in reversed(list(enumerate(closures))):
        for kick in range(2 if form == "closure" else 1):  # the last first
            closure.calls, spoil_at, seen = 0, kick + 1, []
            with pytest.raises(error, match=words):
                optimizer.reverse(spoiling)
            assert same(momenta(optimizer), *seen)
        if t == 2 and exact:  # forward from here, too
            optimizer.step(closure)
            optimizer.reverse(closure)
        optimizer.reverse(closure)
    for x, y in zip([*momenta(optimizer), *(q.detach() for q in params)], start, strict=True):
        torch.testing.assert_close(x, y, rtol=0.0, atol=0.0 if exact else 1e-12)


@pytest.mark.parametrize("exact", [False, True])
def test_energy_after_a_way_back_is_that_of_before(exact):
    params, optimizer = two_groups(exact=exact)
    closure = closure_over(params, optimizer)
    optimizer.step(closure)
    before = optimizer.energy()
    optimizer.step(closure)
    assert (optimizer.energy() - before).abs() > 1e-6
    optimizer.reverse(closure)
    torch.testing.assert_close(optimizer.energy(), before, rtol=1e-11, atol=0.0)


@pytest.mark.parametrize("then", ["a step that fails", "a step"])
def test_a_plain_way_back_that_broke_off_and_then_a_step(then):
    params, optimizer = two_groups()
    closure, start = closure_over(params, optimizer), [*momenta(optimizer)]
    optimizer.step(closure)

    def failing():
        if closure.calls == 1:
            raise ValueError
        return closure()

    closure.calls = 0
    with pytest.raises(ValueError):
        optimizer.reverse(failing)
    if then == "a step":
        optimizer.step(closure)
    else:  # keeps the place
        params[0].grad = params[0].detach().to_sparse()
        with pytest.raises(TypeError, match="dense"):
            optimizer.step()
    optimizer.reverse(closure)
    torch.testing.assert_close(momenta(optimizer), start, rtol=0.0, atol=1e-12)


def test_a_stale_plan_of_one_group_moves_none_back():
    params, optimizer = two_groups(exact=True)
    take_step(optimizer, "staggered", closure_over(params, optimizer))
    with torch.no_grad():
        params[1].add_(1.0)
    before = grid_state(optimizer)
    with pytest.raises(RuntimeError, match="plan is stale"):
        optimizer.reverse(closure_over(params, optimizer))
    assert same(grid_state(optimizer), before)


# ---- Ctrl-C --------------------------------------------------------------------------------------


@contextlib.contextmanager
def interrupted(point):
    """Ctrl-C before the line of the package that is the point-th to run; yields whether it ran."""
    package, count = os.path.dirname(gti.__file__), -1

    def trace(frame, event, _):
        nonlocal count
        if not frame.f_code.co_filename.startswith(package):
            return None
        if event == "line":
            count += 1
            if count == point:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lambda: count >= point
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)


def every_point(stride, start):
    """Points to interrupt at until there is none left. `start` makes something new and returns what
    breaks off, and what tells whether all is well."""
    point = 0
    while True:
        act, check = start()
        with interrupted(point) as reached:
            act()
        check()
        if not reached():
            break
        point += stride
    assert point > 100
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def groups_of(number, **options):
    params, optimizer = two_groups(energy_cap=1.0, **options)
    if number == 1:
        optimizer = gti.optim.Leapfrog(
            params, 0.1, damping=0.3, momentum="gaussian", energy_cap=1.0, **options
        )
    return params, optimizer


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("form", ["closure", "staggered"])
def test_ctrl_c_anywhere_in_an_exact_step_loses_no_bit(form, number):
    def start():
        params, optimizer = groups_of(number, exact=True)
        closure, begin = closure_over(params, optimizer), grid_state(optimizer)
        take_step(optimizer, form, closure)

        def check():
            for _ in range(2):
                take_step(optimizer, form, closure)
            back_to_the_start(optimizer, closure)
            assert same(grid_state(optimizer), begin)

        return lambda: take_step(optimizer, form, closure), check

    every_point(7, start)


@pytest.mark.parametrize("number", [1, 2])
def test_ctrl_c_anywhere_in_a_plain_step_leaves_it_whole_or_not_begun(number):
    params, optimizer = groups_of(number)
    closure = closure_over(params, optimizer)
    ends = []
    for _ in range(3):
        optimizer.step(loss=closure())
        ends.append(everything(optimizer)[1:])

    def start():
        params, optimizer = groups_of(number)
        closure = closure_over(params, optimizer)
        optimizer.step(loss=closure())
        loss = closure()

        def check():
            made = alike(everything(optimizer)[1:], ends[1])
            if not made:
                optimizer.step(loss=loss)
            assert alike(everything(optimizer)[1:], ends[1])
            optimizer.step(loss=closure())
            assert alike(everything(optimizer)[1:], ends[2])

        return lambda: optimizer.step(loss=loss), check

    every_point(7, start)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("form", ["closure", "staggered"])
def test_ctrl_c_anywhere_in_reverse_loses_nothing(form, exact, number):
    def start():
        params, optimizer = groups_of(number, exact=exact)
        closure, begin = closure_over(params, optimizer), [*momenta(optimizer), *params]
        begin = [x.detach().clone() for x in begin]
        for _ in range(3):
            take_step(optimizer, form, closure)
        optimizer.reverse(closure)

        def check():
            if exact:
                back_to_the_start(optimizer, closure)
            # Each way of a drift, there or back, counts as one.
            while not exact and (optimizer._unfinished or optimizer.phase_spaces[0].step_count < 6):
                optimizer.reverse(closure)
            bound = dict(rtol=0.0, atol=0.0 if exact else 1e-12)
            torch.testing.assert_close([*momenta(optimizer), *values(params)], begin, **bound)

        return lambda: optimizer.reverse(closure), check

    every_point(7, start)


def test_ctrl_c_anywhere_in_an_exact_plan_loses_no_bit():
    def start():
        q, p = torch.tensor([0.3, -1.2]), torch.tensor([0.5, 0.1])
        space = gti.PhaseSpace(q, inv_mass=0.7, momentum=p, exact=True)

        def act():
            space.kick_drift_(0.1, 0.1, damp=0.9, grads=[q.sin()])
            space.scale_momenta_(0.5)
            space.scale_momenta_(2.0)
            space.undo_drift_()
            space.redo_kick_(space.undo_kick_([q.sin()]), [q.sin()])
            space.scale_momenta_(0.5)

        def check():
            while (move := space._engine.moves.last()) is not None:
                if move.kind == KICK:
                    space.undo_kick_([q.sin()])
                elif move.kind == DRIFT:
                    space.undo_drift_()
                else:
                    space.scale_momenta_(2.0)
            assert torch.equal(q, torch.tensor([0.3, -1.2])) and torch.equal(space.momenta[0], p)
            assert space.step_count == space._engine.log == 0

        return act, check

    every_point(3, start)


def test_ctrl_c_waits_for_the_outermost():
    reached = []
    with pytest.raises(KeyboardInterrupt):
        with Uninterrupted():
            with Uninterrupted():
                signal.raise_signal(signal.SIGINT)
                reached.append("inside")
            reached.append("between")
        reached.append("behind")
    assert reached == ["inside", "between"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_and_handlers_are_left_alone():
    def inside():
        with Uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    for handler in (signal.SIG_IGN, signal.default_int_handler):
        seen: list = []
        before = signal.signal(signal.SIGINT, handler)
        try:
            inside() if handler is signal.SIG_IGN else None
            thread = threading.Thread(target=inside)
            thread.start()
            thread.join()
        finally:
            signal.signal(signal.SIGINT, before)
        assert set(seen) == {handler}


# ---- groups that are not what they were ----------------------------------------------------------


def test_groups_that_somebody_changed_are_refused_before_anything_moves():
    for change in ("group", "param of one element", "param", "fewer"):
        params, optimizer = two_groups()
        closure_over(params, optimizer)()
        before = values(params)
        if change == "group":
            optimizer.param_groups.pop()
        elif change == "param of one element":
            optimizer.param_groups[1]["params"][0] = parameter(9.0)
        elif change == "param":
            optimizer.param_groups[0]["params"][1] = parameter(9.0, 9.0)
        else:
            optimizer.param_groups[0]["params"].pop()
        with pytest.raises(RuntimeError, match="add_param_group"):
            optimizer.step()
        assert same(values(params), before)


@pytest.mark.parametrize("exact", [False, True])
def test_a_decay_out_of_range_is_refused_before_anything_moves(exact):
    params, optimizer = two_groups(exact=exact)
    closure = closure_over(params, optimizer)
    before = values(params)
    for damping in (1e5, -1e5):
        optimizer.param_groups[1]["damping"] = damping
        for form in ("closure", "staggered"):
            with pytest.raises(ValueError, match="damping·lr. must be at most 300"):
                take_step(optimizer, form, closure)
    with pytest.raises(ValueError, match="friction·lr. must be at most 300"):
        gti.optim.BAOAB([parameter(1.0)], -0.1, friction=1e5)
    assert same(values(params), before)


def test_a_loss_that_is_not_real_is_refused():
    params, optimizer = two_groups()
    closure_over(params, optimizer)()
    before = values(params)
    with pytest.raises(TypeError, match="expected a real number or tensor of one element"):
        optimizer.step(loss=torch.tensor(1j))
    with pytest.raises(TypeError, match="expected a real number or tensor of one element"):
        optimizer.step(lambda: torch.tensor(1j))
    assert same(values(params), before)
