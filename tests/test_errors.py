"""Bad arguments: an error that names op and argument, the same everywhere, nothing touched."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import gti_kernels as gti
from gti_kernels import testing
from gti_kernels.rows import ROWS

BACKENDS = ("auto", "reference", "cpu")


def tensors() -> SimpleNamespace:
    """Good and bad arguments of every kind; a is where a good call would write."""
    memory = torch.arange(8.0)
    square = torch.arange(12.0).reshape(3, 4)
    return SimpleNamespace(
        a=torch.tensor([1.0, 2.0, 3.0]),
        b=torch.tensor([4.0, 5.0, 6.0]),
        c=torch.tensor([7.0, 8.0, 9.0]),
        two=torch.tensor([1.0, 2.0]),
        double=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        integer=torch.tensor([1, 2, 3]),
        boolean=torch.tensor([True, False, True]),
        complex=torch.tensor([1.0j, 2.0, 3.0]),
        sparse=torch.tensor([1.0, 0.0, 3.0]).to_sparse(),
        meta=torch.empty(3, device="meta"),
        left=memory[:3],
        right=memory[2:5],
        expanded=torch.zeros(1).expand(3),
        windows=torch.arange(4.0).unfold(0, 3, 1)[:, :3],
        square=square,
        other=square.flip(0),
        integers=torch.ones(3, 4, dtype=torch.int32),
        flat=torch.ones(3, 0),
        no_rows=torch.ones(0, 4),
        scalar=torch.tensor(0.5),
    )


NAN, INF = math.nan, math.inf

# op, error, words of the message, call
CASES = [
    # What is no tensor, or not one of floats
    ("kick_", TypeError, "p", lambda t, **b: gti.kick_(None, t.b, 0.1, **b)),
    ("kick_", TypeError, "p", lambda t, **b: gti.kick_(3.0, t.b, 0.1, **b)),
    ("kick_", TypeError, "p", lambda t, **b: gti.kick_(["a"], [t.b], 0.1, **b)),
    ("kick_", TypeError, "grad", lambda t, **b: gti.kick_(t.a, None, 0.1, **b)),
    ("kick_", TypeError, r"grad\[0\]", lambda t, **b: gti.kick_([t.a], [1.0], 0.1, **b)),
    ("drift_", TypeError, "p", lambda t, **b: gti.drift_(t.a, None, 0.1, **b)),
    ("kick_drift_", TypeError, "q", lambda t, **b: gti.kick_drift_(None, t.b, t.c, 1.0, 1.0, **b)),
    ("kinetic_energy", TypeError, "p", lambda t, **b: gti.kinetic_energy(None, **b)),
    ("kinetic_energy", TypeError, r"p\[1\]", lambda t, **b: gti.kinetic_energy([t.a, 2.0], **b)),
    ("two_form", TypeError, "dq", lambda t, **b: gti.two_form(None, None, **b)),
    ("two_form", TypeError, r"dp\[0\]", lambda t, **b: gti.two_form([t.square], [1.0], **b)),
    ("power_iteration", TypeError, "weights", lambda t, **b: gti.power_iteration(None, **b)),
    ("power_iteration", TypeError, "weights", lambda t, **b: gti.power_iteration([3.0], **b)),
    (
        "kick_",
        TypeError,
        r"p\[0\].*int64",
        lambda t, **b: gti.kick_(t.integer, t.integer, 0.1, **b),
    ),
    ("kick_", TypeError, r"p\[0\].*bool", lambda t, **b: gti.kick_(t.boolean, t.boolean, 0.1, **b)),
    ("kick_", TypeError, r"grad\[0\]", lambda t, **b: gti.kick_(t.a, t.complex, 0.1, **b)),
    ("drift_", TypeError, r"q\[0\]", lambda t, **b: gti.drift_(t.integer, t.b, 0.1, **b)),
    (
        "kick_drift_",
        TypeError,
        r"grad\[0\]",
        lambda t, **b: gti.kick_drift_(t.a, t.b, t.integer, 0.1, 0.1, **b),
    ),
    ("kinetic_energy", TypeError, r"p\[0\]", lambda t, **b: gti.kinetic_energy(t.complex, **b)),
    ("two_form", TypeError, r"dq\[0\]", lambda t, **b: gti.two_form(t.integers, t.integers, **b)),
    (
        "power_iteration",
        TypeError,
        r"weights\[0\]",
        lambda t, **b: gti.power_iteration(t.integers, **b),
    ),
    ("kick_", TypeError, r"p\[0\].*dense", lambda t, **b: gti.kick_(t.sparse, t.b, 0.1, **b)),
    ("kinetic_energy", TypeError, r"p\[0\].*to_dense", lambda t, **b: gti.kinetic_energy(t.sparse)),
    (
        "power_iteration",
        TypeError,
        r"weights\[0\].*dense",
        lambda t, **b: gti.power_iteration(t.square.to_sparse(), **b),
    ),
    # What does not fit together
    ("kick_", ValueError, r"grad\[0\].*\(3,\).*\(2,\)", lambda t, **b: gti.kick_(t.a, t.two, 1.0)),
    ("kick_", TypeError, r"grad\[0\].*float64", lambda t, **b: gti.kick_(t.a, t.double, 0.1, **b)),
    ("kick_", ValueError, "p and grad.*length", lambda t, **b: gti.kick_([t.a], [], 0.1, **b)),
    ("kick_", ValueError, r"grad\[0\].*meta", lambda t, **b: gti.kick_(t.a, t.meta, 0.1, **b)),
    ("drift_", ValueError, r"p\[0\]", lambda t, **b: gti.drift_(t.a, t.two, 0.1, **b)),
    ("drift_", TypeError, r"p\[0\]", lambda t, **b: gti.drift_(t.a, t.double, 0.1, **b)),
    ("drift_", ValueError, "length", lambda t, **b: gti.drift_([t.a], [t.b, t.c], 0.1, **b)),
    ("drift_", ValueError, r"p\[0\].*meta", lambda t, **b: gti.drift_(t.a, t.meta, 0.1, **b)),
    (
        "kick_drift_",
        ValueError,
        r"grad\[1\]",
        lambda t, **b: gti.kick_drift_([t.a, t.b], [t.c, t.b + 1], [t.b * 2, t.two], 1.0, 1.0, **b),
    ),
    (
        "kick_drift_",
        TypeError,
        r"p\[0\]",
        lambda t, **b: gti.kick_drift_(t.a, t.double, t.c, 1.0, 1.0, **b),
    ),
    ("two_form", ValueError, r"dp\[0\]", lambda t, **b: gti.two_form(t.square, t.square[:2], **b)),
    ("two_form", TypeError, r"dp\[0\]", lambda t, **b: gti.two_form(t.square, t.square.double())),
    ("two_form", ValueError, "length", lambda t, **b: gti.two_form([t.square], [], **b)),
    (
        "two_form",
        ValueError,
        r"dq\[1\].*same m",
        lambda t, **b: gti.two_form([t.square, t.square[:2]], [t.other, t.other[:2]], **b),
    ),
    # What shares memory with a tensor that is written
    (
        "kick_",
        ValueError,
        "share memory",
        lambda t, **b: gti.kick_(t.left, t.right, 1.0),
    ),
    ("kick_", ValueError, "share memory", lambda t, **b: gti.kick_(t.a, t.a, 0.1, **b)),
    (
        "kick_",
        ValueError,
        "share memory",
        lambda t, **b: gti.kick_([t.a, t.a], [t.b, t.c], 0.1, **b),
    ),
    ("drift_", ValueError, "share memory", lambda t, **b: gti.drift_(t.left, t.right, 0.1, **b)),
    ("drift_", ValueError, "share", lambda t, **b: gti.drift_(t.a, t.b, 0.1, inv_mass=[t.a], **b)),
    (
        "kick_drift_",
        ValueError,
        "share memory",
        lambda t, **b: gti.kick_drift_(t.a, t.a, t.b, 0.1, 0.1, **b),
    ),
    (
        "kick_drift_",
        ValueError,
        "share memory",
        lambda t, **b: gti.kick_drift_(t.left, t.right, t.b, 0.1, 0.1, **b),
    ),
    (
        "kick_drift_",
        ValueError,
        "share memory",
        lambda t, **b: gti.kick_drift_([t.a, t.left], [t.b, t.right], [t.c, t.c], 0.1, 0.1, **b),
    ),
    ("kick_", ValueError, r"p\[0\].*overlap", lambda t, **b: gti.kick_(t.expanded, t.b, 0.1, **b)),
    (
        "kick_",
        ValueError,
        r"p\[0\].*overlap",
        lambda t, **b: gti.kick_(t.windows, torch.ones(2, 3), 0.1, **b),
    ),
    (
        "drift_",
        ValueError,
        r"q\[0\].*overlap",
        lambda t, **b: gti.drift_(t.expanded, t.b, 1.0, **b),
    ),
    (
        "kick_drift_",
        ValueError,
        r"p\[0\].*overlap",
        lambda t, **b: gti.kick_drift_(t.a, t.expanded, t.b, 0.1, 0.1, **b),
    ),
    # Factors
    ("kick_", ValueError, "step.*nan", lambda t, **b: gti.kick_(t.a, t.b, NAN, **b)),
    ("kick_", ValueError, "step.*inf", lambda t, **b: gti.kick_(t.a, t.b, -INF, **b)),
    ("kick_", ValueError, "damp", lambda t, **b: gti.kick_(t.a, t.b, 0.1, damp=NAN, **b)),
    # Factors as tensors
    (
        "kick_",
        ValueError,
        r"step .*\(1,\)",
        lambda t, **b: gti.kick_(t.a, t.b, t.scalar[None], **b),
    ),
    (
        "kick_",
        TypeError,
        "step .*bfl",
        lambda t, **b: gti.kick_(t.a, t.b, t.scalar.bfloat16(), **b),
    ),
    (
        "kick_",
        ValueError,
        "damp .*on cpu.*on meta.*to.'cpu'",
        lambda t, **b: gti.kick_(t.a, t.b, 0.1, damp=t.scalar.to("meta"), **b),
    ),
    ("kick_", ValueError, "step .*finite", lambda t, **b: gti.kick_(t.a, t.b, t.scalar * INF, **b)),
    ("kick_", TypeError, "step.*str", lambda t, **b: gti.kick_(t.a, t.b, "fast", **b)),
    ("kick_", TypeError, "step.*None", lambda t, **b: gti.kick_(t.a, t.b, None, **b)),
    ("drift_", ValueError, "step", lambda t, **b: gti.drift_(t.a, t.b, INF, **b)),
    ("drift_", TypeError, "step .*int", lambda t, **b: gti.drift_(t.a, t.b, t.scalar.int(), **b)),
    (
        "kick_drift_",
        ValueError,
        "kick",
        lambda t, **b: gti.kick_drift_(t.a, t.b, t.c, NAN, 1.0, **b),
    ),
    ("kick_drift_", ValueError, "drift ", lambda t, **b: gti.kick_drift_(t.a, t.b, t.c, 1.0, INF)),
    (
        "kick_drift_",
        ValueError,
        r"drift .*\(2,\)",
        lambda t, **b: gti.kick_drift_(t.a, t.b, t.c, 1.0, torch.ones(2), **b),
    ),
    (
        "kick_drift_",
        ValueError,
        "damp",
        lambda t, **b: gti.kick_drift_(t.a, t.b, t.c, 1.0, 1.0, damp=INF, **b),
    ),
    # Masses
    (
        "drift_",
        ValueError,
        "inv_mass",
        lambda t, **b: gti.drift_(t.a, t.b, 1.0, inv_mass=-1.0, **b),
    ),
    ("drift_", ValueError, "inv_mass", lambda t, **b: gti.drift_(t.a, t.b, 1.0, inv_mass=NAN, **b)),
    (
        "drift_",
        ValueError,
        "inv_mass",
        lambda t, **b: gti.drift_([t.a], [t.b], 1.0, inv_mass=[-1.0]),
    ),
    (
        "drift_",
        ValueError,
        "inv_mass.*one entry",
        lambda t, **b: gti.drift_(t.a, t.b, 1.0, inv_mass=[]),
    ),
    ("drift_", TypeError, "inv_mass", lambda t, **b: gti.drift_(t.a, t.b, 1.0, inv_mass=None, **b)),
    (
        "kick_drift_",
        TypeError,
        "inv_mass.*both",
        lambda t, **b: gti.kick_drift_(
            [t.a, t.b], [t.c, t.c + 1], [t.c * 2, t.c * 3], 1.0, 1.0, inv_mass=[1.0, t.b + 1], **b
        ),
    ),
    (
        "kinetic_energy",
        ValueError,
        r"inv_mass\[0\].*shape",
        lambda t, **b: gti.kinetic_energy(t.a, inv_mass=t.two, **b),
    ),
    (
        "kinetic_energy",
        TypeError,
        r"inv_mass\[0\].*dtype",
        lambda t, **b: gti.kinetic_energy(t.a, inv_mass=t.double, **b),
    ),
    (
        "kinetic_energy",
        ValueError,
        "inv_mass",
        lambda t, **b: gti.kinetic_energy(t.a, inv_mass=[1.0] * 2),
    ),
    (
        "kinetic_energy",
        ValueError,
        "inv_mass",
        lambda t, **b: gti.kinetic_energy(t.a, inv_mass=INF, **b),
    ),
    # The integrator
    (
        "leapfrog_",
        ValueError,
        "order.*3",
        lambda t, **b: gti.leapfrog_(t.a, t.b, abs, 0.1, order=3),
    ),
    (
        "leapfrog_",
        ValueError,
        "steps.*-1",
        lambda t, **b: gti.leapfrog_(t.a, t.b, abs, 0.1, steps=-1),
    ),
    ("leapfrog_", ValueError, "steps", lambda t, **b: gti.leapfrog_(t.a, t.b, abs, 0.1, steps=1.5)),
    ("leapfrog_", ValueError, "dt", lambda t, **b: gti.leapfrog_(t.a, t.b, abs, NAN, **b)),
    ("leapfrog_", ValueError, "dt", lambda t, **b: gti.leapfrog_(t.a, t.b, abs, t.a, **b)),
    ("leapfrog_", ValueError, "dt", lambda t, **b: gti.leapfrog_(t.a, t.b, abs, t.scalar * NAN)),
    (
        "leapfrog_",
        RuntimeError,
        "dt.detach",
        lambda t, **b: gti.leapfrog_(t.a, t.b, abs, t.scalar.clone().requires_grad_(), **b),
    ),
    (
        "leapfrog_",
        ValueError,
        "damping",
        lambda t, **b: gti.leapfrog_(t.a, t.b, abs, 1.0, damping=INF),
    ),
    ("leapfrog_", TypeError, "grad_fn", lambda t, **b: gti.leapfrog_(t.a, t.b, list, 0.1, **b)),
    ("leapfrog_", TypeError, "grad_fn", lambda t, **b: gti.leapfrog_([t.a], [t.b], sum, 0.1, **b)),
    (
        "leapfrog_",
        TypeError,
        "grad_fn",
        lambda t, **b: gti.leapfrog_(t.a, t.b, lambda q: None, 0.1),
    ),
    (
        "leapfrog_",
        ValueError,
        "grad_fn",
        lambda t, **b: gti.leapfrog_([t.a], [t.b], lambda q: [t.c, t.c], 0.1, **b),
    ),
    ("", ValueError, r"p\[0\]", lambda t, **b: gti.leapfrog_(t.a, t.two, torch.neg, 0.1, **b)),
    ("", ValueError, "share memory", lambda t, **b: gti.leapfrog_(t.a, t.a, torch.neg, 0.1, **b)),
    # The 2-form
    ("two_form", ValueError, "dq.*empty list", lambda t, **b: gti.two_form([], [], **b)),
    ("two_form", ValueError, r"dq\[0\]", lambda t, **b: gti.two_form(t.a, t.b, **b)),
    ("two_form", ValueError, r"dq\[0\]", lambda t, **b: gti.two_form(t.scalar, t.scalar, **b)),
    ("two_form", ValueError, "m >= 1", lambda t, **b: gti.two_form(t.no_rows, t.no_rows, **b)),
    ("two_form", ValueError, "coordinate", lambda t, **b: gti.two_form(t.flat, t.flat, **b)),
    # Singular values
    ("power_iteration", ValueError, "empty list", lambda t, **b: gti.power_iteration([], **b)),
    (
        "power_iteration",
        ValueError,
        r"weights\[0\].*2 dims",
        lambda t, **b: gti.power_iteration(t.a, **b),
    ),
    (
        "power_iteration",
        ValueError,
        r"weights\[1\]",
        lambda t, **b: gti.power_iteration([t.square, t.a]),
    ),
    (
        "power_iteration",
        ValueError,
        "k must",
        lambda t, **b: gti.power_iteration(t.square, k=0, **b),
    ),
    (
        "power_iteration",
        ValueError,
        "k must.*3",
        lambda t, **b: gti.power_iteration(t.square, k=4, **b),
    ),
    (
        "power_iteration",
        ValueError,
        "k must",
        lambda t, **b: gti.power_iteration(t.square, k=1.0, **b),
    ),
    ("power_iteration", ValueError, "k must", lambda t, **b: gti.power_iteration(t.no_rows, **b)),
    ("power_iteration", ValueError, "k must", lambda t, **b: gti.power_iteration(t.flat, **b)),
    (
        "power_iteration",
        ValueError,
        "tol",
        lambda t, **b: gti.power_iteration(t.square, tol=NAN, **b),
    ),
    (
        "power_iteration",
        ValueError,
        "tol",
        lambda t, **b: gti.power_iteration(t.square, tol=-1.0, **b),
    ),
    (
        "power_iteration",
        ValueError,
        "tol",
        lambda t, **b: gti.power_iteration(t.square, tol="x", **b),
    ),
    (
        "power_iteration",
        ValueError,
        "max_steps",
        lambda t, **b: gti.power_iteration(t.square, max_steps=0),
    ),
    (
        "power_iteration",
        ValueError,
        "method",
        lambda t, **b: gti.power_iteration(t.square, method="qr"),
    ),
    (
        "power_iteration",
        TypeError,
        "start",
        lambda t, **b: gti.power_iteration(t.square, start="x", **b),
    ),
    (
        "power_iteration",
        TypeError,
        "seed",
        lambda t, **b: gti.power_iteration(t.square, seed=0.5, **b),
    ),
    (
        "power_iteration",
        ValueError,
        "start",
        lambda t, **b: gti.power_iteration(t.square, start=gti.power_iteration(t.square.T), **b),
    ),
    (
        "power_iteration",
        ValueError,
        "start",
        lambda t, **b: gti.power_iteration(
            [t.square] * 2, start=gti.power_iteration([t.square]), **b
        ),
    ),
    ("power_iteration", ValueError, "empty list", lambda t, **b: gti.top_singular_values([], **b)),
    (
        "power_iteration",
        ValueError,
        "k must",
        lambda t, **b: gti.top_singular_values(t.square, k=9, **b),
    ),
    ("explain", ValueError, "op must.*kick", lambda t, **b: gti.explain("kick", t.a)),
    (
        "power_iteration",
        ValueError,
        "tol must",
        lambda t, **b: gti.explain("power_iteration", t.square, tol="x"),
    ),
    (
        "power_iteration",
        TypeError,
        "nested tensor",
        lambda t, **b: gti.power_iteration(torch.nested.nested_tensor([t.square]), **b),
    ),
    (
        "power_iteration",
        ValueError,
        "start.*length 4",  # as many numbers, but other vectors
        lambda t, **b: gti.power_iteration(
            t.square, start=gti.power_iteration(torch.ones(2, 2), k=2), **b
        ),
    ),
]


def of_both(setting: dict):
    """The calls with a setting that differs, of power_iteration and of top_singular_values."""
    return [
        lambda t, **b: gti.power_iteration(t.square, **{**b, **setting}),
        lambda t, **b: gti.top_singular_values(t.square, **{**b, **setting}),
    ]


CASES += [
    ("power_iteration", error, words, call)
    for setting, error, words in [
        ({"k": True}, ValueError, "k must be an integer >= 1, got True"),
        ({"k": "2"}, ValueError, "k must be an integer >= 1, got '2'"),
        ({"k": np.int64(2)}, ValueError, "k must be an integer"),
        ({"max_steps": 2**63}, ValueError, "max_steps must be an integer"),
        ({"max_steps": np.int64(5)}, ValueError, "max_steps must be an integer"),
        ({"tol": torch.tensor(1e-4)}, ValueError, "tol must be finite"),
        ({"tol": np.float32(1e-4)}, ValueError, "tol must be finite"),
        ({"seed": np.int64(3)}, TypeError, "seed must be an integer"),
        ({"backend": 3}, ValueError, "backend must be one of"),
    ]
    for call in of_both(setting)
]


def state(t: SimpleNamespace) -> list:
    out: list = []
    for name, x in vars(t).items():
        dense = x.to_dense() if x.layout != torch.strided else x
        values = [] if x.is_meta else dense.reshape(-1).tolist()
        out.append((name, x.shape, values, x._version))
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", range(len(CASES)))
def test_message_names_op_and_argument_and_nothing_is_touched(number, backend):
    op, error, words, call = CASES[number]
    t = tensors()
    before = state(t)
    with pytest.raises(error, match=f"(?s)^{op}.*{words}") as raised:
        call(t, backend=backend)
    assert type(raised.value) is error
    assert state(t) == before


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_named_backend_that_cannot_run_says_why(row):
    args, kwargs = testing.samples(row.name)[0].make(torch.float32, "cpu")
    with pytest.raises(ValueError, match=f"{row.name}: backend must be one of auto.*'fast'"):
        getattr(gti, row.name)(*args, **kwargs, backend="fast")
    for backend in ("triton", "cuda"):
        with pytest.raises(RuntimeError, match=f"{row.name}: backend='{backend}'.*: .*'cpu' here"):
            getattr(gti, row.name)(*args, **kwargs, backend=backend)
    fresh, _ = testing.samples(row.name)[0].make(torch.float32, "cpu")
    for before, after in zip(fresh, args):
        if isinstance(before, list):
            assert all(map(torch.equal, before, after))


def test_the_cpu_kernel_finds_no_more_than_16_triples():
    with pytest.raises(RuntimeError, match="power_iteration: backend='cpu'.*16 triples"):
        gti.power_iteration(torch.ones(20, 20), k=17, backend="cpu")
    assert gti.explain("power_iteration", torch.ones(20, 20), k=17).backend == "reference"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_cpu_kernel_refuses_what_lies_differently_in_memory(backend):
    q, p = torch.ones(3, 4), torch.ones(4, 3).T
    if backend == "cpu":
        with pytest.raises(RuntimeError, match=r"drift_: backend='cpu'.*q\[0\] and p\[0\] lie"):
            gti.drift_(q, p, 0.5, backend=backend)
        assert torch.equal(q, torch.ones(3, 4)) and q._version == 0
    else:
        gti.drift_(q, p, 0.5, backend=backend)
        assert torch.equal(q, torch.full((3, 4), 1.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_beside_a_list_of_one_is_taken(backend):
    q, p, g = torch.ones(3), torch.ones(3), torch.ones(3)
    gti.kick_drift_([q], p, g, 0.5, 1.0, backend=backend)
    gti.kick_drift_(q, [p], [g], 0.5, 1.0, backend=backend)
    gti.kick_([p], g, 1.0, backend=backend)
    gti.drift_(q, [p], 1.0, backend=backend)
    assert torch.equal(p, torch.full((3,), -1.0)) and torch.equal(q, torch.full((3,), 0.5))
    assert q._version >= 3 and p._version >= 3
