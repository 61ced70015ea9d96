"""gti.optim.Leapfrog: its mathematics, and the contract of a torch optimizer."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
import weakref

import pytest
import torch
from torch import nn

import gti_kernels as gti
from gti_kernels.models.simple_cnn import SimpleCNN
from gti_kernels.optim.walked_steps import WalkedSteps

F64 = torch.float64


@pytest.fixture(autouse=True)
def one_thread():
    """The networks here are too small to gain from more."""
    torch.set_num_threads(1)


def parameter(*values, dtype=F64):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def kepler(e=0.6):
    """q, p and potential of the Kepler problem; H₀ = −1/2, period 2π."""
    q = parameter(1.0 - e, 0.0)
    p = torch.tensor([0.0, math.sqrt((1 + e) / (1 - e))], dtype=F64)
    return q, p, lambda: -1.0 / q.norm()


def closure_of(optimizer, potential):
    def closure():
        closure.calls += 1
        optimizer.zero_grad()
        loss = potential()
        loss.backward()
        return loss

    closure.calls = 0
    return closure


def run(optimizer, potential, steps):
    """Steps without closure."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss = potential()
        loss.backward()
        optimizer.step(loss=loss)


def cnn(norm="group", dtype=torch.float32):
    torch.manual_seed(0)
    model = SimpleCNN(1, 10, norm=norm, width=4).to(dtype)
    x, y = torch.randn(16, 1, 8, 8, dtype=dtype), torch.randint(10, (16,))
    return model, lambda: nn.functional.cross_entropy(model(x), y)


def values(model_or_params):
    params = getattr(model_or_params, "parameters", lambda: model_or_params)()
    return [q.detach().clone() for q in params]


def same(xs, ys):
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


# ---- mathematics ---------------------------------------------------------------------------------

#: MATH.md: max |ΔH| over 20 periods at 100, 200 steps a period.
GOLDEN = {
    (2, "yoshida"): (1.495e-2, 3.676e-3),
    (4, "yoshida"): (7.021e-4, 4.771e-5),
    (4, "suzuki"): (3.799e-5, 2.351e-6),
}


@pytest.mark.parametrize(("order", "composition"), GOLDEN)
def test_kepler_energy_error_is_the_golden_one_and_has_the_order(order, composition):
    errors = []
    for steps in (100, 200):
        q, p, _ = kepler()
        optimizer = gti.optim.Leapfrog(
            [q],
            2 * math.pi / steps,
            inv_mass=1.0,
            order=order,
            composition=composition,
            momentum=[p],
        )

        def closure():
            r = q.detach().norm()
            q.grad = q.detach() / r**3
            return -1.0 / r

        worst = 0.0
        for _ in range(2 * steps):  # the maximum is met in the first of the 20 periods
            optimizer.step(closure)
            worst = max(worst, abs(float(optimizer.energy()) + 0.5))
        errors.append(worst)
    assert errors == pytest.approx(GOLDEN[order, composition], rel=6e-3)


@pytest.mark.parametrize("order", [2, 4])
def test_order_by_slope_of_the_position_error(order):
    errors = []
    for steps in (20, 40, 80):
        q = parameter(1.0)
        optimizer = gti.optim.Leapfrog([q], 1.0 / steps, inv_mass=1.0, order=order)
        closure = closure_of(optimizer, lambda: 0.5 * q.square().sum())
        for _ in range(steps):
            optimizer.step(closure)
        errors.append(abs(q.item() - math.cos(1.0)))
    slope = math.log2(errors[0] / errors[2]) / 2
    assert slope == pytest.approx(order, abs=0.1)


def test_staggered_form_is_of_order_two_from_momenta_half_a_step_back():
    errors = []
    for steps in (20, 40, 80):
        dt = 1.0 / steps
        q = parameter(1.0)
        start = [torch.tensor([math.sin(dt / 2)], dtype=F64)]  # p(−dt/2), p = −sin t
        optimizer = gti.optim.Leapfrog([q], dt, inv_mass=1.0, momentum=start)
        run(optimizer, lambda: 0.5 * q.square().sum(), steps)
        errors.append(abs(q.item() - math.cos(1.0)))
    assert math.log2(errors[0] / errors[2]) / 2 == pytest.approx(2, abs=0.1)


def test_step_without_closure_is_sgd_with_momentum():
    (a, loss_a), (b, loss_b) = cnn(dtype=F64), cnn(dtype=F64)
    dt, damping = 0.2, 0.5
    leapfrog = gti.optim.Leapfrog(a.parameters(), dt, inv_mass=1.0, damping=damping)
    sgd = torch.optim.SGD(b.parameters(), lr=dt**2, momentum=math.exp(-damping * dt))
    for _ in range(10):
        for model_loss, optimizer in ((loss_a, leapfrog), (loss_b, sgd)):
            optimizer.zero_grad()
            model_loss().backward()
            optimizer.step()
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize(("order", "composition"), GOLDEN)
def test_step_with_closure_is_leapfrog_(damping, order, composition):
    q, p, potential = kepler(0.3)
    q2, p2 = q.detach().clone(), p.clone()
    optimizer = gti.optim.Leapfrog(
        [q], 0.1, 0.7, damping=damping, order=order, composition=composition, momentum=[p]
    )
    closure = closure_of(optimizer, potential)
    for _ in range(7):
        optimizer.step(closure)
    gti.leapfrog_(
        q2,
        p2,
        lambda x: x / x.norm() ** 3,
        0.1,
        steps=7,
        inv_mass=0.7,
        damping=damping,
        order=order,
        composition=composition,
    )
    torch.testing.assert_close(q.detach(), q2, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(optimizer.phase_spaces[0].momenta[0], p2, rtol=1e-12, atol=1e-13)


def test_the_two_forms_may_alternate():
    """Positions of the staggered and of the synchronised form are the same trajectory."""
    ends = []
    for pattern in ("ccccccccc", "ssscccsss", "csscsccss"):
        q, p, potential = kepler(0.3)
        optimizer = gti.optim.Leapfrog([q], 0.05, inv_mass=1.0, momentum=[p])
        closure = closure_of(optimizer, potential)
        closure_first = pattern[0] == "c"
        if not closure_first:  # p_0 to p_{−½}, which a first step() expects
            g = q.detach() / q.detach().norm() ** 3
            optimizer.phase_spaces[0].kick_(-0.025, grads=[g])
        for form in pattern:
            if form == "c":
                optimizer.step(closure)
            else:
                run(optimizer, potential, 1)
        ends.append(q.detach().clone())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-13, atol=1e-14)


def test_a_changed_lr_kicks_by_the_mean_of_the_steps_beside():
    q = parameter(1.0)
    optimizer = gti.optim.Leapfrog([q], 0.1, inv_mass=1.0)
    q.grad = torch.tensor([2.0], dtype=F64)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.3
    optimizer.step()
    assert optimizer.phase_spaces[0].momenta[0].item() == pytest.approx(-2.0 * (0.1 + 0.2))


def test_energy_of_the_staggered_form_is_that_of_the_same_time():
    """|H_t − H₀| is O(dt²), the synchronised error, not the O(dt) of p half a step away."""
    worst = []
    for steps in (50, 100, 200):
        q = parameter(1.0)
        dt = 2.0 / steps
        start = [torch.tensor([math.sin(dt / 2)], dtype=F64)]
        optimizer = gti.optim.Leapfrog([q], dt, inv_mass=1.0, momentum=start)
        errors = []
        for _ in range(steps):
            run(optimizer, lambda: 0.5 * q.square().sum(), 1)
            errors.append(abs(optimizer.energy().item() - 0.5))
        worst.append(max(errors))
    assert math.log2(worst[0] / worst[2]) / 2 == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_energy_on_the_way_back_is_that_of_the_way_out(maximize, exact):
    q = parameter(1.0, -0.3)
    options = {"maximize": maximize, "exact": exact, "damping": 0.1, "momentum": "gaussian"}
    optimizer = gti.optim.Leapfrog([q], 0.05, inv_mass=1.0, **options)
    potential = lambda: (-1.0 if maximize else 1.0) * (1 - q.cos()).sum()  # noqa: E731
    closure, energies = closure_of(optimizer, potential), []
    for form in "sccss":
        if form == "c":
            optimizer.step(closure)
        else:
            optimizer.step(loss=closure())
        energies.append(optimizer.energy().item())
    # Without exact only a step after one of its own form can be taken back.
    for _ in range(2 if exact else 1):
        optimizer.reverse(closure)
        assert optimizer.energy().item() == pytest.approx(energies.pop(), rel=1e-9)


def test_a_loss_that_is_overwritten_does_not_change_the_energy():
    q = parameter(2.0)
    optimizer = gti.optim.Leapfrog([q], 0.1)
    loss = q.detach().square().sum()
    q.grad = 2 * q.detach()
    optimizer.step(loss=loss)
    before = optimizer.energy()
    loss.zero_()
    assert torch.equal(optimizer.energy(), before)


def test_maximize_climbs_and_keeps_its_energy():
    q = parameter(1.0)
    optimizer = gti.optim.Leapfrog([q], 0.01, inv_mass=1.0, maximize=True)
    closure = closure_of(optimizer, lambda: -0.5 * q.square().sum())
    energies = []
    for _ in range(50):
        optimizer.step(closure)
        energies.append(optimizer.energy().item())
    assert q.item() == pytest.approx(math.cos(0.5), abs=1e-4)
    assert energies == pytest.approx([0.5] * 50, abs=1e-4)


# ---- gradients of the closure --------------------------------------------------------------------


@pytest.mark.parametrize(("order", "stages"), [(2, 1), (4, 3)])
def test_the_gradient_of_an_unchanged_closure_is_used_again(order, stages):
    q = parameter(1.0, 2.0)
    optimizer = gti.optim.Leapfrog([q], 0.1, order=order)
    closure = closure_of(optimizer, lambda: q.square().sum())
    for _ in range(5):
        optimizer.step(closure)
    assert closure.calls == 5 * stages + 1


def other_closure(optimizer, q):
    return closure_of(optimizer, lambda: q.square().sum())


def clear_gradients(optimizer, q):
    optimizer.zero_grad()


def clear_gradients_behind_its_back(optimizer, q):
    q.grad = None
    q.square().sum().backward()


def change_parameters(optimizer, q):
    with torch.no_grad():
        q.add_(1.0)


def change_gradients(optimizer, q):
    q.grad.mul_(0.5)


def replace_data(optimizer, q):
    nn.utils.vector_to_parameters(torch.full((2,), 10.0, dtype=F64), [q])


@pytest.mark.parametrize(
    "change",
    [
        other_closure,
        clear_gradients,
        clear_gradients_behind_its_back,
        change_parameters,
        change_gradients,
        replace_data,
    ],
)
def test_whatever_changes_in_between_calls_the_closure_again(change):
    q = parameter(1.0, 2.0)
    optimizer = gti.optim.Leapfrog([q], 0.1)
    closure = closure_of(optimizer, lambda: q.square().sum())
    optimizer.step(closure)
    before = closure.calls
    closure = change(optimizer, q) or closure
    if change is other_closure:
        before = 0
    optimizer.step(closure)
    assert closure.calls == before + 2


@pytest.mark.parametrize("exact", [False, True])
def test_a_parameter_that_is_unfrozen_moves_at_once(exact):
    a, b = parameter(1.0), parameter(1.0)
    b.requires_grad_(False)
    optimizer = gti.optim.Leapfrog([a, b], 0.1, inv_mass=1.0, exact=exact)
    closure = closure_of(optimizer, lambda: a.sin().sum() + b.sin().sum())
    optimizer.step(closure)
    b.requires_grad_(True)
    optimizer.step(closure)
    assert b.item() == pytest.approx(1.0 - 0.005 * math.cos(1.0), rel=1e-9)
    if exact:
        optimizer.reverse(closure)
        b.requires_grad_(False)
        optimizer.reverse(closure)
        assert a.item() == b.item() == 1.0


@pytest.mark.parametrize("exact", [False, True])
def test_masses_are_read_when_the_group_is_added(exact):
    q, w = parameter(1.0, 1.0), torch.ones(2, dtype=F64)
    optimizer = gti.optim.Leapfrog([q], 0.1, inv_mass=[w], momentum=[w], exact=exact)
    closure = closure_of(optimizer, lambda: 0.0 * q.sum())
    for _ in range(2):
        optimizer.step(closure)
        w.mul_(100.0)
    assert q.tolist() == pytest.approx([1.2, 1.2])
    for _ in range(2):
        optimizer.reverse(closure)
    assert q.tolist() == pytest.approx([1.0, 1.0], abs=0.0 if exact else 1e-12)


def test_what_is_returned_is_the_callers():
    q = parameter(3.0)
    optimizer = gti.optim.Leapfrog([q], 0.1, inv_mass=1.0, energy_cap=0.9)
    closure = closure_of(optimizer, lambda: q.square().sum())
    before = optimizer.cap_engagements
    optimizer.step(closure)
    assert optimizer.cap_engagements == before + 1
    loss = optimizer.reverse(closure)
    energy = optimizer.energy()
    loss.zero_()
    assert torch.equal(optimizer.energy(), energy)


def test_a_bound_method_is_another_object_each_time_and_batches_are_not_kept_alive():
    class Task:
        calls = 0

        def closure(self):
            self.calls += 1
            optimizer.zero_grad()
            loss = q.square().sum()
            loss.backward()
            return loss

    q = parameter(1.0, 2.0)
    optimizer = gti.optim.Leapfrog([q], 0.1)
    task = Task()
    for _ in range(3):
        optimizer.step(task.closure)
    assert task.calls == 6
    held = task.closure
    for _ in range(3):
        optimizer.step(held)
    assert task.calls == 6 + 4
    gone = weakref.ref(task)
    del task, held
    assert gone() is None


def test_the_loss_at_the_beginning_is_returned():
    q = parameter(2.0)
    optimizer = gti.optim.Leapfrog([q], 0.1)
    closure = closure_of(optimizer, lambda: q.square().sum())
    assert optimizer.step(closure).item() == 4.0
    here = q.item()
    assert optimizer.step(closure).item() == here**2
    q.grad = torch.ones_like(q)
    assert optimizer.step() is None


# ---- reversal ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_reverse_walks_back_with_a_closure(order, damping):
    q, p, potential = kepler(0.3)
    optimizer = gti.optim.Leapfrog(
        [q], 0.05, inv_mass=1.0, damping=damping, order=order, momentum=[p]
    )
    closure = closure_of(optimizer, potential)
    start = q.detach().clone()
    losses = [optimizer.step(closure).item() for _ in range(20)]
    back = [optimizer.reverse(closure).item() for _ in range(20)]
    assert back == pytest.approx(losses[::-1], rel=1e-11)
    torch.testing.assert_close(q.detach(), start, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(optimizer.phase_spaces[0].momenta[0], p, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_reverse_walks_back_over_batches_without_closure(damping):
    model, _ = cnn(dtype=F64)
    batches = [(torch.randn(8, 1, 8, 8, dtype=F64), torch.randint(10, (8,))) for _ in range(4)]
    optimizer = gti.optim.Leapfrog(model.parameters(), 0.1, damping=damping, momentum="gaussian")
    start = values(model), values(optimizer.phase_spaces[0].momenta)

    def loss_of(batch):
        return lambda: nn.functional.cross_entropy(model(batch[0]), batch[1])

    for batch in batches:
        run(optimizer, loss_of(batch), 1)
    assert not same(values(model), start[0])
    for batch in reversed(batches):
        optimizer.reverse(closure_of(optimizer, loss_of(batch)))
    for x, y in zip([*values(model), *optimizer.phase_spaces[0].momenta], [*start[0], *start[1]]):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_a_reverse_that_was_interrupted_goes_on():
    q, p, potential = kepler(0.3)
    optimizer = gti.optim.Leapfrog([q], 0.05, inv_mass=1.0, damping=0.1, order=4, momentum=[p])
    closure = closure_of(optimizer, potential)

    def failing():
        loss = closure()
        if closure.calls % 4 == 0:
            raise KeyboardInterrupt
        return loss

    start = q.detach().clone()
    optimizer.step(closure)
    with pytest.raises(KeyboardInterrupt):
        while True:
            optimizer.reverse(failing)
    optimizer.reverse(closure)
    torch.testing.assert_close(q.detach(), start, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(optimizer.phase_spaces[0].momenta[0], p, rtol=1e-12, atol=1e-12)


def test_reverse_before_any_step_says_so():
    optimizer = gti.optim.Leapfrog([parameter(1.0)], 0.1)
    with pytest.raises(RuntimeError, match="a step to walk back"):
        optimizer.reverse(lambda: torch.zeros(()))


# ---- exact reversal ------------------------------------------------------------------------------


def grid_state(optimizer):
    """Every bit of q and p, and of the grids they live on."""
    return [
        x
        for space in optimizer.phase_spaces
        for x in (*(q.detach().clone() for q in space.params), *space.momenta)
    ] + [x for space in optimizer.phase_spaces for x in space.state_dict()["P"]]


@pytest.mark.parametrize(
    ("form", "steps"), [("staggered", 1000), ("closure", 40), ("alternating", 40)]
)
def test_exact_walk_of_a_cnn_returns_every_bit(form, steps):
    """Damped, with the cap firing, a schedule of dt, two groups, and another batch each step."""
    model, _ = cnn()
    groups = [
        {"params": qs, "momentum": [0.1 * torch.randn_like(q) for q in qs]}
        for qs in (list(model.features.parameters()), list(model.head.parameters()))
    ]
    optimizer = gti.optim.Leapfrog(groups, 0.2, damping=0.001, energy_cap=1.0, exact=True)
    batches = [(torch.randn(4, 1, 8, 8), torch.randint(10, (4,))) for _ in range(5)]

    def closure_at(t):
        x, y = batches[t % len(batches)]
        model.head.bias.requires_grad_(t % 4 > 1)  # its gradient comes and goes
        return closure_of(optimizer, lambda: nn.functional.cross_entropy(model(x), y))

    start, skipped = grid_state(optimizer), set()
    for t in range(steps):
        optimizer.param_groups[1]["lr"] = 0.2 / (1 + t % 3)
        if form == "closure" or (form == "alternating" and t % 4 < 2):
            optimizer.step(closure_at(t))
        else:
            optimizer.step(loss=closure_at(t)())
        skipped.add(optimizer.phase_spaces[1].skipped)
    assert 0 < int(optimizer.cap_engagements) < steps
    assert len(skipped) == 2
    assert not same(grid_state(optimizer), start)
    for t in reversed(range(steps)):
        optimizer.reverse(closure_at(t))
    assert same(grid_state(optimizer), start)
    with pytest.raises(RuntimeError, match="a step to walk back"):
        optimizer.reverse(closure_at(0))


def test_steps_after_an_exact_way_back_are_the_steps_of_before():
    q, p, potential = kepler(0.3)
    optimizer = gti.optim.Leapfrog([q], 0.1, 1.0, damping=0.2, exact=True, momentum=[p])
    closure, seen = closure_of(optimizer, potential), []

    def forward(t):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + t)
        optimizer.step(closure) if t in (2, 3) else optimizer.step(loss=closure())
        return grid_state(optimizer)

    for t in range(7):
        seen.append(forward(t))
    for back in (2, 4, 7):
        for _ in range(back):
            optimizer.reverse(closure)
        for t in range(7 - back, 7):
            assert same(forward(t), seen[t])


@pytest.mark.parametrize("composition", ["yoshida", "suzuki"])
def test_exact_walk_of_order_four(composition):
    q, p, potential = kepler(0.3)
    optimizer = gti.optim.Leapfrog([q], 0.1, 1.0, 0.2, 4, composition, exact=True, momentum=[p])
    closure = closure_of(optimizer, potential)
    start = grid_state(optimizer)
    for _ in range(200):
        optimizer.step(closure)
    for _ in range(200):
        optimizer.reverse(closure)
    assert same(grid_state(optimizer), start)


def test_exact_walk_is_the_walk_up_to_rounding():
    ends = []
    for exact in (False, True):
        model, potential = cnn(dtype=F64)
        optimizer = gti.optim.Leapfrog(model.parameters(), 0.1, damping=0.3, exact=exact)
        closure = closure_of(optimizer, potential)
        for _ in range(5):
            optimizer.step(closure)
            run(optimizer, potential, 1)
        ends.append((values(model), optimizer.energy()))
    for x, y in zip(ends[0][0], ends[1][0]):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=1e-9, atol=1e-10)


def test_exact_walk_back_past_the_addition_of_a_group():
    a, b = parameter(1.0), parameter(2.0)
    optimizer = gti.optim.Leapfrog([a], 0.1, exact=True, momentum="gaussian")

    def potential():
        return torch.sin(a).sum() + torch.sin(3 * b).sum()

    start = grid_state(optimizer)
    run(optimizer, potential, 3)
    optimizer.add_param_group({"params": [b]})
    added = grid_state(optimizer)
    run(optimizer, potential, 3)
    closure = closure_of(optimizer, potential)
    for _ in range(3):
        optimizer.reverse(closure)
    assert same(grid_state(optimizer), added)
    for _ in range(3):
        optimizer.reverse(closure)
    assert torch.equal(a, start[0]) and b.item() == 2.0
    run(optimizer, potential, 1)


def test_an_exact_step_that_does_not_fit_the_grid_leaves_all_as_it_was():
    q = parameter(1.0, 1.0)
    optimizer = gti.optim.Leapfrog([q], 0.1, energy_cap=0.5, exact=True, momentum="gaussian")
    start = grid_state(optimizer)
    q.grad = torch.full_like(q, 1e30)
    with pytest.raises(OverflowError, match="smaller dt"):
        optimizer.step(loss=0.0)
    assert same(grid_state(optimizer), start)
    q.grad = torch.ones_like(q)
    optimizer.step(loss=0.0)
    assert not same(grid_state(optimizer), start)
    optimizer.reverse(closure_of(optimizer, lambda: q.sum()))
    assert same(grid_state(optimizer), start)


@pytest.mark.parametrize("form", ["closure", "staggered"])
def test_exact_steps_of_any_lr_walk_back(form):
    """A step of the opposite lr is a step of its own, on a batch of its own."""
    q = parameter(0.3, -1.2, 2.0)
    optimizer = gti.optim.Leapfrog([q], 0.1, damping=0.3, exact=True, momentum="gaussian")
    start = grid_state(optimizer)
    lrs = [0.1, -0.1, -0.1, 0.0, 0.0, 0.1, -0.1, 0.2]
    closures = [closure_of(optimizer, lambda i=i: (q * (1 + i // 2)).sin().sum()) for i in range(8)]
    for lr, closure in zip(lrs, closures):
        optimizer.param_groups[0]["lr"] = lr
        if form == "closure":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    assert not same(grid_state(optimizer), start)
    for closure in reversed(closures):
        optimizer.reverse(closure)
    assert same(grid_state(optimizer), start)


def test_a_saved_exact_walk_is_loaded_whole_or_not_at_all():
    def made(*sizes, dtype=torch.float32):
        params = [nn.Parameter(torch.linspace(0.1, 1.0, n).to(dtype)) for n in sizes]
        groups = [{"params": [q]} for q in params]
        return params, gti.optim.Leapfrog(groups, 0.1, exact=True, momentum="gaussian")

    params, optimizer = made(2, 3)
    run(optimizer, lambda: sum(q.sin().sum() for q in params), 2)
    saved = optimizer.state_dict()
    for (others, other), words in (
        (made(2, 4), "expected momenta of shapes"),
        (made(2, 3, dtype=F64), "must have the dtypes they were"),
    ):
        before, versions = grid_state(other), [q._version for q in others]
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(saved)
        assert same(grid_state(other), before)
        assert [q._version for q in others] == versions


def test_steps_that_are_alike_are_kept_once_after_loading_too():
    walked = WalkedSteps()
    for _ in range(3):
        walked.push(((0.1, 1.0),), [[True]])
    walked = WalkedSteps.of(walked.state())
    walked.push(((0.1, 1.0),), [[True]])
    assert len(walked) == 4 and len(walked.kinds) == 1
    assert walked.pop() == (((0.1, 1.0),), [[True]])


def test_exact_walk_back_in_another_process():
    """Out, saved in the middle; back from the file."""

    def begin():
        model, potential = cnn()
        optimizer = gti.optim.Leapfrog(model.parameters(), 0.2, damping=0.1, exact=True)
        return model, potential, optimizer

    _, potential, optimizer = begin()
    start = grid_state(optimizer)
    closure = closure_of(optimizer, potential)
    for _ in range(5):
        optimizer.step(closure)
    run(optimizer, potential, 5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    model2, potential2, optimizer2 = begin()
    with torch.no_grad():
        for q in model2.parameters():
            q.zero_()  # with exact, positions come from the file as well
    optimizer2.load_state_dict(torch.load(file))
    for _ in range(10):
        optimizer2.reverse(closure_of(optimizer2, potential2))
    assert same(grid_state(optimizer2), start)


def test_exact_walk_back_with_another_gradient_is_refused():
    model, potential = cnn()
    optimizer = gti.optim.Leapfrog(model.parameters(), 0.2, exact=True)
    closure = closure_of(optimizer, potential)
    for _ in range(4):
        optimizer.step(closure)
    with pytest.raises(RuntimeError, match="at step 4"):
        optimizer.reverse(closure_of(optimizer, lambda: 1.000001 * potential()))


def test_the_step_is_named_for_order_four_and_a_group_added_later():
    q, later = parameter(0.3, 1.0), parameter(0.5)
    optimizer = gti.optim.Leapfrog([q], 0.1, order=4, exact=True)
    closure = closure_of(optimizer, lambda: closure.size * (q.sin().sum() + later.sin().sum()))
    closure.size = 1.0
    for t in range(5):
        if t == 2:
            optimizer.add_param_group({"params": [later]})
        optimizer.step(closure)
    optimizer.reverse(closure)
    closure.size = 1.01
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="at step 4: "):
        optimizer.reverse(closure)


def test_exact_walk_back_goes_on_after_an_exception():
    model, potential = cnn()
    optimizer = gti.optim.Leapfrog(model.parameters(), 0.2, damping=0.1, exact=True)
    closure, start = closure_of(optimizer, potential), grid_state(optimizer)

    def failing():
        loss = closure()
        if closure.calls % 3 == 0:
            raise KeyboardInterrupt
        return loss

    done = 0
    while done < 12:
        with contextlib.suppress(KeyboardInterrupt):
            optimizer.step(failing) if done % 4 < 2 else optimizer.step(loss=failing())
        done += 1
    steps = len(optimizer._walked)
    assert steps > 4
    while True:
        try:
            optimizer.reverse(failing)
        except KeyboardInterrupt:
            continue
        except RuntimeError as error:
            assert "a step to walk back" in str(error)
            break
    assert same(grid_state(optimizer), start)


# ---- energy cap ----------------------------------------------------------------------------------


def steep(cap, order=2):
    """A particle with K₀ = 2 in a bowl whose bottom lies at 1; its dt is so large that H swings."""
    q = parameter(1.0)
    optimizer = gti.optim.Leapfrog(
        [q],
        {2: 1.9, 4: 1.5}[order],
        inv_mass=1.0,
        order=order,
        energy_cap=cap,
        momentum=[torch.tensor([2.0], dtype=F64)],
    )
    closure = closure_of(optimizer, lambda: 1.0 + 0.5 * q.square().sum())
    return q, optimizer, closure


@pytest.mark.parametrize("order", [2, 4])
def test_cap_scales_the_momenta_once_a_step_as_defined_and_counts(order):
    q, optimizer, closure = steep(1.05, order)
    p = optimizer.phase_spaces[0].momenta[0]
    q2, p2, initial, fired = q.detach().clone(), p.clone(), None, 0
    for _ in range(30):
        loss, kinetic = 1.0 + 0.5 * q2.item() ** 2, 0.5 * p2.item() ** 2
        initial = initial or loss + kinetic
        if loss + kinetic > 1.05 * initial:
            p2 *= math.sqrt(max(1e-12, 1.05 * initial - loss) / max(1e-12, kinetic))
            fired += 1
        gti.leapfrog_(q2, p2, lambda x: x, {2: 1.9, 4: 1.5}[order], order=order)
        optimizer.step(closure)
        assert (q.item(), p.item()) == pytest.approx((q2.item(), p2.item()), rel=1e-9, abs=1e-9)
    assert 0 < fired < 30
    assert optimizer.cap_engagements.dtype == torch.int64
    assert optimizer.cap_engagements.item() == fired


def test_cap_that_is_never_reached_changes_nothing():
    ends = []
    for cap in (None, 100.0):
        q, optimizer, closure = steep(cap)
        for _ in range(30):
            optimizer.step(closure)
        ends.append(q.item())
        assert optimizer.cap_engagements.item() == 0
    assert ends[0] == ends[1]


def test_cap_without_closure_scales_before_the_kick():
    q = parameter(1.0)
    start = [torch.tensor([2.0], dtype=F64)]
    optimizer = gti.optim.Leapfrog([q], 1.9, inv_mass=1.0, energy_cap=1.05, momentum=start)
    q2, p2, initial, fired = 1.0, 2.0, None, 0
    for _ in range(30):
        loss = 1.0 + 0.5 * q2 * q2
        initial = initial or loss + 0.5 * p2 * p2
        if loss + 0.5 * p2 * p2 > 1.05 * initial:
            p2 *= math.sqrt(max(1e-12, 1.05 * initial - loss) / max(1e-12, 0.5 * p2 * p2))
            fired += 1
        before, p2 = 0.5 * p2 * p2, p2 - 1.9 * q2
        q2 += 1.9 * p2
        run(optimizer, lambda: 1.0 + 0.5 * q.square().sum(), 1)
        p = optimizer.phase_spaces[0].momenta[0]
        assert (q.item(), p.item()) == pytest.approx((q2, p2), rel=1e-9, abs=1e-9)
        assert optimizer.energy().item() == pytest.approx(loss + 0.5 * (before + 0.5 * p2 * p2))
    assert 0 < fired == optimizer.cap_engagements.item() < 30


def test_nothing_waits_for_the_device(monkeypatch):
    model, potential = cnn()
    optimizer = gti.optim.Leapfrog(model.parameters(), 0.1, damping=0.1)
    loss = potential()
    loss.backward()
    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a host sync"))
    optimizer.step(loss=loss)
    energy = optimizer.energy()
    monkeypatch.undo()
    assert energy.shape == () and energy.dtype == F64 and energy.item() > 0.0


def test_cap_works_without_closure_and_needs_the_loss():
    q = parameter(3.0)
    optimizer = gti.optim.Leapfrog([q], 1.9, inv_mass=1.0, energy_cap=1.01)
    run(optimizer, lambda: 0.5 * q.square().sum(), 20)
    assert optimizer.cap_engagements.item() > 0
    before, p = q.item(), optimizer.phase_spaces[0].momenta[0].item()
    with pytest.raises(ValueError, match="energy_cap needs the loss"):
        optimizer.step()
    assert (q.item(), optimizer.phase_spaces[0].momenta[0].item()) == (before, p)


# ---- the torch contract --------------------------------------------------------------------------


def test_groups_have_their_own_options():
    a, b = parameter(1.0), parameter(1.0)
    optimizer = gti.optim.Leapfrog(
        [{"params": [a]}, {"params": [b], "lr": 0.5, "inv_mass": 2.0, "damping": 1.0}],
        0.1,
        inv_mass=1.0,
    )
    for _ in range(2):
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        optimizer.step()
    assert a.item() == pytest.approx(1.0 - 0.1 * 0.1 - 0.1 * 0.2)
    first = -0.5
    second = math.exp(-0.5) * first - 0.5
    assert b.item() == pytest.approx(1.0 + 0.5 * 2.0 * (first + second))


def test_add_param_group_in_the_middle():
    a, b = parameter(1.0), parameter(1.0)
    optimizer = gti.optim.Leapfrog([a], 0.1, inv_mass=1.0)
    a.grad = torch.ones_like(a)
    optimizer.step()
    optimizer.add_param_group({"params": [b], "momentum": [torch.tensor([3.0], dtype=F64)]})
    b.grad = torch.ones_like(b)
    optimizer.step()
    assert b.item() == pytest.approx(1.0 + 0.1 * (3.0 - 0.1))
    assert a.item() == pytest.approx(1.0 - 0.01 - 0.02)
    with pytest.raises(ValueError, match='is "lr"'):
        optimizer.add_param_group({"params": [parameter(1.0)], "dt": 0.1})
    with pytest.raises(ValueError, match="inv_mass"):
        optimizer.add_param_group({"params": [parameter(1.0)], "inv_mass": math.nan})
    assert len(optimizer.param_groups) == len(optimizer.phase_spaces) == 2


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("form", ["staggered", "closure"])
def test_lr_may_be_a_tensor(form, on_device, monkeypatch):
    """on_device: dt stays a tensor, as it does on a GPU."""
    ends = []
    for dt in (0.1, torch.tensor(0.1, dtype=F64)):
        q, p, potential = kepler(0.3)
        optimizer = gti.optim.Leapfrog([q], dt, inv_mass=1.0, damping=0.2, momentum=[p])
        if on_device and isinstance(dt, torch.Tensor):
            monkeypatch.setattr(optimizer, "_step_size", lambda group: group["lr"].clone())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        closure = closure_of(optimizer, potential)
        start = q.detach().clone()
        for _ in range(4):
            optimizer.step(closure) if form == "closure" else optimizer.step(loss=closure())
            scheduler.step()
        state = optimizer.state_dict()  # a snapshot
        optimizer.step(closure) if form == "closure" else optimizer.step(loss=closure())
        end = [q.detach().clone(), optimizer.phase_spaces[0].momenta[0].clone()]
        energy = optimizer.energy()
        optimizer.reverse(closure)
        assert (q.detach() - end[0]).abs().max() > 1e-3 < (q.detach() - start).abs().max()
        optimizer.load_state_dict(state)
        optimizer.step(closure) if form == "closure" else optimizer.step(loss=closure())
        torch.testing.assert_close(q.detach(), end[0], rtol=1e-12, atol=1e-13)
        ends.append([*end, energy])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-14 * on_device, atol=1e-15 * on_device)


@pytest.mark.parametrize(
    ("lr", "error", "words"),
    [
        (torch.ones(2), ValueError, "lr must be a float or a 0-d tensor"),
        (torch.tensor(1), TypeError, "lr must be a float or a tensor of float64 or float32"),
        (torch.tensor(0.1, device="meta"), ValueError, "lr must be a float or a tensor on cpu"),
        (torch.tensor(math.nan), ValueError, "lr must be finite"),
    ],
)
def test_tensors_that_are_no_lr(lr, error, words):
    for make in (gti.optim.Leapfrog, gti.optim.BAOAB):
        with pytest.raises(error, match=words):
            make([parameter(1.0)], lr)


@pytest.mark.parametrize("schedule", ["StepLR", "OneCycleLR", "LambdaLR"])
def test_lr_schedulers_set_dt(schedule):
    q = parameter(1.0)
    optimizer = gti.optim.Leapfrog([q], 0.1, inv_mass=1.0)
    scheduler = {
        "StepLR": lambda: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        "OneCycleLR": lambda: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.4, total_steps=5, cycle_momentum=False
        ),
        "LambdaLR": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 / (1 + t)),
    }[schedule]()
    for _ in range(4):
        before, lr = q.item(), optimizer.param_groups[0]["lr"]
        run(optimizer, lambda: q.square().sum(), 1)
        p = optimizer.phase_spaces[0].momenta[0].item()
        assert q.item() == pytest.approx(before + lr * p)
        scheduler.step()


def test_hooks_and_named_parameters():
    model, potential = cnn()
    optimizer = gti.optim.Leapfrog(model.named_parameters(), 0.1)
    assert "head.weight" in optimizer.param_groups[0]["param_names"]
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, s: seen.append(s.pop("extra")))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    run(optimizer, potential, 1)
    optimizer.step(closure_of(optimizer, potential))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", "post", "pre", "post", 1, "loaded"]


def test_gradient_accumulation_is_a_step_on_the_sum():
    (a, _), (b, _) = cnn(dtype=F64), cnn(dtype=F64)
    x, y = torch.randn(16, 1, 8, 8, dtype=F64), torch.randint(10, (16,))
    for model, parts in ((a, 1), (b, 4)):
        optimizer = gti.optim.Leapfrog(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            for xs, ys in zip(x.chunk(parts), y.chunk(parts)):
                (nn.functional.cross_entropy(model(xs), ys) / parts).backward()
            optimizer.step()
    for u, v in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(u, v, rtol=1e-11, atol=1e-13)


def test_grad_scaler_unscales_and_skips():
    q, r = parameter(1.0, dtype=torch.float32), parameter(1.0, dtype=torch.float32)
    optimizer = gti.optim.Leapfrog([q], 0.1)
    plain = gti.optim.Leapfrog([r], 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        loss = q.square().sum()
        scaler.scale(loss * factor).backward()
        before = q.item()
        scaler.step(optimizer, loss=loss)
        scaler.update()
        if factor == math.inf:
            assert q.item() == before
        else:
            run(plain, lambda: r.square().sum(), 1)
    assert torch.equal(q, r)
    torch.testing.assert_close(optimizer.energy(), plain.energy())


def test_a_step_within_torch_compile_is_the_step():
    """Where the compiler breaks its graphs, an exact walk must not lose its way back."""
    ends = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="eager")):
        a, b = parameter(0.3, -1.2), parameter(0.5)
        options = dict(damping=0.1, energy_cap=1.0, exact=True, momentum="gaussian")
        optimizer = gti.optim.Leapfrog([{"params": [a]}, {"params": [b]}], 0.1, **options)
        closure = closure_of(optimizer, lambda a=a, b=b: 4.0 + a.sin().sum() + b.cos().sum())
        step, start = wrap(optimizer.step), grid_state(optimizer)
        for _ in range(3):
            step(loss=closure())
        ends.append(grid_state(optimizer))
        for _ in range(3):
            optimizer.reverse(closure)
        assert same(grid_state(optimizer), start)
    assert same(*ends)


def test_a_plain_way_back_ends_where_a_group_was_added():
    a, b = parameter(1.0), parameter(2.0)
    optimizer = gti.optim.Leapfrog([a], 0.1)
    closure = closure_of(optimizer, lambda: a.sin().sum() + b.sin().sum())
    optimizer.step(closure)
    optimizer.add_param_group({"params": [b]})
    before = values([a, b])
    with pytest.raises(RuntimeError, match="a step to walk back"):
        optimizer.reverse(closure)
    assert same(values([a, b]), before)
    optimizer.step(closure)
    optimizer.reverse(closure)
    torch.testing.assert_close([a.detach(), b.detach()], before, rtol=1e-14, atol=1e-14)


def test_a_module_under_distributed_data_parallel(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        (a, loss_a), (b, _) = cnn(), cnn()
        parallel = nn.parallel.DistributedDataParallel(b)
        torch.manual_seed(0)
        SimpleCNN(1, 10, norm="group", width=4)
        x, y = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))  # the batch of loss_a
        run(gti.optim.Leapfrog(a.parameters(), 0.1), loss_a, 3)
        optimizer = gti.optim.Leapfrog(parallel.parameters(), 0.1)
        run(optimizer, lambda: nn.functional.cross_entropy(parallel(x), y), 3)
        for u, v in zip(a.parameters(), b.parameters()):
            torch.testing.assert_close(u, v)
    finally:
        torch.distributed.destroy_process_group()


SETTINGS = {
    "plain": {},
    "damped": {"damping": 0.3, "momentum": "gaussian"},
    "capped": {"energy_cap": 1.001, "momentum": "gaussian", "inv_mass": 3.0},
    "bf16": {"dtype": torch.bfloat16},
    "fp64": {"dtype": F64},
    "exact": {"exact": True, "damping": 0.1},
}


@pytest.mark.parametrize("form", ["closure", "staggered"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_run_resumed_from_a_file_is_equal_to_the_bit(settings, form):
    options = dict(SETTINGS[settings])
    dtype = options.pop("dtype", torch.float32)

    def begin():
        model, potential = cnn(dtype=dtype)
        groups = [{"params": model.features.parameters()}, {"params": model.head.parameters()}]
        optimizer = gti.optim.Leapfrog(groups, 0.3, seed=3, **options)
        return model, potential, optimizer

    def advance(model, potential, optimizer, steps):
        closure = closure_of(optimizer, potential)
        for _ in range(steps):
            if form == "closure":
                optimizer.step(closure)
            else:
                run(optimizer, potential, 1)
            optimizer.param_groups[0]["lr"] *= 0.9

    model, potential, optimizer = begin()
    advance(model, potential, optimizer, 5)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    energy = optimizer.energy()
    advance(model, potential, optimizer, 5)

    file.seek(0)
    saved = torch.load(file)
    model2, potential2, optimizer2 = begin()
    model2.load_state_dict(saved["model"])
    optimizer2.load_state_dict(saved["optimizer"])
    assert torch.equal(optimizer2.energy(), energy)
    advance(model2, potential2, optimizer2, 5)
    assert same(values(model), values(model2))
    for space, space2 in zip(optimizer.phase_spaces, optimizer2.phase_spaces):
        assert same(space.momenta, space2.momenta)
    assert torch.equal(optimizer.energy(), optimizer2.energy())
    assert torch.equal(optimizer.cap_engagements, optimizer2.cap_engagements)
    assert settings != "capped" or optimizer.cap_engagements.item() > 0


def test_state_dict_is_a_snapshot():
    q = parameter(1.0)
    optimizer = gti.optim.Leapfrog([q], 0.1)
    run(optimizer, lambda: q.square().sum(), 2)
    state, momentum = optimizer.state_dict(), optimizer.phase_spaces[0].momenta[0].clone()
    run(optimizer, lambda: q.square().sum(), 2)
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.phase_spaces[0].momenta[0], momentum)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alike(how):
    q = parameter(1.0, 2.0)
    optimizer = gti.optim.Leapfrog([q], 0.1, damping=0.1, energy_cap=1.5, order=4)
    optimizer.step(closure_of(optimizer, lambda: q.square().sum()))
    other = how(optimizer)
    (q2,) = other.param_groups[0]["params"]
    assert q2 is not q and other.phase_spaces[0].params[0] is q2
    optimizer.step(closure_of(optimizer, lambda: q.square().sum()))
    other.step(closure_of(other, lambda: q2.square().sum()))
    assert torch.equal(q, q2)


def test_a_foreign_state_dict_is_refused_and_nothing_changes():
    q = parameter(1.0)
    optimizer = gti.optim.Leapfrog([q], 0.1, momentum="gaussian")
    p = optimizer.phase_spaces[0].momenta[0].clone()
    for other in (torch.optim.SGD([q], lr=1.0), gti.optim.BAOAB([q], 1.0)):
        with pytest.raises(ValueError, match="expected one of a Leapfrog"):
            optimizer.load_state_dict(other.state_dict())
    two = gti.optim.Leapfrog([{"params": [q]}, {"params": [parameter(2.0)]}], 0.3)
    with pytest.raises(ValueError, match="parameter groups"):
        optimizer.load_state_dict(two.state_dict())
    cut = optimizer.state_dict()
    cut["param_groups"][0]["lr"] = 0.3
    cut["state"]["phase_space"]["plans"].pop()
    with pytest.raises(ValueError, match="shorter"):
        optimizer.load_state_dict(cut)
    assert torch.equal(optimizer.phase_spaces[0].momenta[0], p)
    assert optimizer.param_groups[0]["lr"] == 0.1


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dt": math.nan}, ValueError, "dt must be finite"),
        ({"dt": "0.1"}, None, None),
        ({"dt": None}, TypeError, "dt must be a float"),
        ({"dt": math.inf}, ValueError, "dt must be finite"),
        ({"inv_mass": math.nan}, ValueError, "inv_mass"),
        ({"inv_mass": -1.0}, ValueError, "inv_mass"),
        ({"inv_mass": [1.0]}, ValueError, "inv_mass"),
        ({"inv_mass": "fan_out"}, ValueError, "fan_in"),
        ({"damping": math.inf}, ValueError, "damping must be finite"),
        ({"order": 3}, ValueError, "order must be 2 or 4"),
        ({"composition": "verlet"}, ValueError, "composition"),
        ({"energy_cap": 0.0}, ValueError, "energy_cap"),
        ({"energy_cap": math.nan}, ValueError, "energy_cap"),
        ({"momentum": "ones"}, ValueError, "momentum"),
        ({"momentum": [torch.zeros(2)]}, ValueError, "momentum"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"params": []}, ValueError, "empty"),
        ({"params": [torch.zeros(2, dtype=torch.int64)]}, TypeError, "float"),
        ({"params": torch.zeros(2)}, TypeError, "iterable"),
    ],
)
def test_bad_arguments(options, error, words):
    options = {"params": [parameter(1.0), parameter(2.0)], "dt": 0.1, **options}
    if error is None:  # float() takes it, as in the other functions of the package
        assert gti.optim.Leapfrog(**options).param_groups[0]["lr"] == 0.1
        return
    with pytest.raises(error, match=words):
        gti.optim.Leapfrog(**options)


def test_a_bad_gradient_of_one_group_moves_none():
    for exact in (False, True):
        a, b = parameter(1.0, 2.0), parameter(3.0)
        optimizer = gti.optim.Leapfrog([{"params": [a]}, {"params": [b]}], 0.1, exact=exact)
        a.grad = torch.ones_like(a)
        b.data = b.data.float()
        b.grad = torch.ones_like(b)
        with pytest.raises(RuntimeError, match="plan is stale"):
            optimizer.step()
        assert a.tolist() == [1.0, 2.0] and b.tolist() == [3.0]
        assert not optimizer.phase_spaces[0].momenta[0].any()


def test_groups_must_not_share_memory():
    x = torch.zeros(8)
    optimizer = gti.optim.Leapfrog([nn.Parameter(x[:5])], 0.1)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.add_param_group({"params": [nn.Parameter(x[3:])]})
    assert len(optimizer.param_groups) == len(optimizer.phase_spaces) == 1


def test_bad_steps_touch_nothing():
    a, b = parameter(1.0), parameter(2.0)
    optimizer = gti.optim.Leapfrog([{"params": [a]}, {"params": [b]}], 0.1, momentum="gaussian")
    before = [a.item(), b.item(), *(s.momenta[0].item() for s in optimizer.phase_spaces)]
    a.grad = torch.ones_like(a)
    b.grad = torch.ones_like(b).detach().to_sparse()
    with pytest.raises(TypeError, match="dense"):
        optimizer.step()
    b.grad = torch.ones_like(b)
    optimizer.param_groups[1]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr must be finite"):
        optimizer.step()
    optimizer.param_groups[1]["lr"] = 0.1
    with pytest.raises(TypeError, match="closure"):
        optimizer.step(lambda: None)
    with pytest.raises(TypeError, match="loss"):
        optimizer.step(loss=torch.zeros(2))
    with pytest.raises(ValueError, match="got both"):
        optimizer.step(lambda: a.sum(), loss=a.sum())
    with pytest.raises(RuntimeError, match="loss is not known"):
        optimizer.energy()
    after = [a.item(), b.item(), *(s.momenta[0].item() for s in optimizer.phase_spaces)]
    assert after == before
    with pytest.raises(ValueError, match="pass a closure"):
        gti.optim.Leapfrog([a], 0.1, order=4).step()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("form", ["staggered", "closure"])
def test_parameters_without_gradient_are_left_alone(form, exact):
    """As torch.optim.SGD does; here each has its turn."""
    params = [parameter(1.0, 2.0), parameter(3.0), parameter(-1.0)]
    optimizer = gti.optim.Leapfrog(
        params, 0.1, inv_mass=1.0, damping=0.5, momentum="gaussian", exact=exact
    )
    (space,) = optimizer.phase_spaces
    for t in range(6):
        out = t % 3
        q0, p0 = values(params), values(space.momenta)

        def closure(out=out):
            optimizer.zero_grad()
            for i, q in enumerate(params):
                q.grad = None if i == out else torch.sin(q.detach())
            return torch.tensor(1.0)

        if form == "closure":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step(loss=1.0)
        for i, (q, p) in enumerate(zip(params, space.momenta)):
            assert torch.equal(q, q0[i]) == torch.equal(p, p0[i]) == (i == out)
        kinetic = sum(float(0.5 * p.square().sum()) for p in space.momenta)
        if form == "closure":
            assert float(optimizer.energy()) == pytest.approx(kinetic + 1.0)


def test_steps_of_leapfrog_and_sgd_skip_alike():
    (a, b), (c, d) = ([parameter(1.0), parameter(2.0)] for _ in range(2))
    dt, damping = 0.2, 0.5
    leapfrog = gti.optim.Leapfrog([a, b], dt, inv_mass=1.0, damping=damping)
    sgd = torch.optim.SGD([c, d], lr=dt**2, momentum=math.exp(-damping * dt))
    for t in range(8):
        for (x, y), optimizer in (((a, b), leapfrog), ((c, d), sgd)):
            optimizer.zero_grad()
            loss = torch.sin(x).sum() if t % 3 == 1 else torch.sin(x * y).sum()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close([a, b], [c, d], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", ["staggered", "closure"])
def test_reverse_with_gradients_that_are_none(form):
    params = [parameter(1.0, 2.0), parameter(3.0)]
    optimizer = gti.optim.Leapfrog(
        params, 0.1, inv_mass=1.0, damping=0.3, momentum=[torch.ones(2), torch.ones(1)]
    )
    start = [*values(params), *values(optimizer.phase_spaces[0].momenta)]
    closure = closure_of(optimizer, lambda: torch.sin(params[0]).sum())  # the other is unused
    for _ in range(4):
        optimizer.step(closure) if form == "closure" else optimizer.step(loss=closure())
    assert not same(values(params)[:1], start[:1])
    assert same([params[1], optimizer.phase_spaces[0].momenta[1]], [start[1], start[3]])
    optimizer.zero_grad()  # says nothing about the step
    for _ in range(3):
        optimizer.reverse(closure)
    both = closure_of(optimizer, lambda: sum(torch.sin(q).sum() for q in params))
    with pytest.raises(RuntimeError, match="None are not those of the step walked back"):
        optimizer.reverse(both)
    optimizer.reverse(closure)
    for x, y in zip([*params, *optimizer.phase_spaces[0].momenta], start, strict=True):
        torch.testing.assert_close(x.detach(), y, rtol=1e-12, atol=1e-12)


def test_empty_parameters_are_fine():
    a, b = parameter(), parameter(1.0)
    optimizer = gti.optim.Leapfrog([a, b], 0.1, inv_mass=1.0)
    run(optimizer, lambda: a.sum() + b.sum(), 2)
    assert b.item() == pytest.approx(1.0 - 0.01 - 0.02)
    optimizer = gti.optim.Leapfrog([{"params": []}, {"params": [b]}], 0.1, inv_mass=1.0)
    run(optimizer, lambda: b.sum(), 1)
    assert optimizer.energy().item() == pytest.approx(0.97 + 0.5 * (0.0 + 0.01) / 2)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("order", [2, 4])
def test_after_an_exception_in_the_closure_steps_go_on(order, error):
    """With order 2 the next step makes up exactly what the interrupted one had left."""
    q, p, potential = kepler(0.3)
    optimizer = gti.optim.Leapfrog([q], 0.02, inv_mass=1.0, order=order, momentum=[p])
    closure = closure_of(optimizer, potential)

    def failing():
        loss = closure()
        if closure.calls == fail_at:
            raise error
        return loss

    fail_at = -1
    optimizer.step(failing)
    for fail_at in (closure.calls + 1, closure.calls + 2):
        q2 = q.detach().clone()
        optimizer.zero_grad()
        with pytest.raises(error):
            optimizer.step(failing)
        if fail_at == closure.calls and torch.equal(q, q2):
            continue  # at the beginning nothing had moved
    fail_at = -1
    for _ in range(50):
        optimizer.step(failing)
        assert float(optimizer.energy()) == pytest.approx(-0.5, abs=2e-4)


def test_an_interrupted_step_of_order_two_loses_nothing():
    q, p, potential = kepler(0.3)
    q2, _, potential2 = kepler(0.3)
    a = gti.optim.Leapfrog([q], 0.02, inv_mass=1.0, momentum=[p])
    b = gti.optim.Leapfrog([q2], 0.02, inv_mass=1.0, momentum=[p])
    closure, closure2 = closure_of(a, potential), closure_of(b, potential2)

    def failing():
        loss = closure()
        if closure.calls == 2:
            raise RuntimeError
        return loss

    with pytest.raises(RuntimeError):
        a.step(failing)
    for _ in range(5):
        a.step(failing)
    for _ in range(6):
        b.step(closure2)
    torch.testing.assert_close(q, q2, rtol=1e-13, atol=1e-14)


def test_a_distributed_checkpoint_is_refused_and_nothing_changes():
    """It wants one entry a parameter. An optimizer without any it would step, to get them."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = nn.Linear(3, 2)
    optimizer = gti.optim.Leapfrog(model.parameters(), 0.1, damping=0.5)
    run(optimizer, lambda: model(torch.ones(4, 3)).sum(), 2)
    optimizer.zero_grad()
    before = values(optimizer.phase_spaces[0].momenta), list(optimizer._owed)
    with pytest.raises(KeyError, match="phase_space"):
        get_optimizer_state_dict(model, optimizer)
    assert same(optimizer.phase_spaces[0].momenta, before[0]) and optimizer._owed == before[1]
    loaded = gti.optim.Leapfrog(model.parameters(), 0.1)
    loaded.load_state_dict(optimizer.state_dict())
    assert same(loaded.phase_spaces[0].momenta, before[0])
