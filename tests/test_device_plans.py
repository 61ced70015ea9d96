"""What the host does for a plan of a GPU, without one: which addresses a step runs on, and which it
refuses. Kernels are replaced by a list of what they were asked for."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

import gti_kernels as gti
from gti_kernels import backends, device_plans, testing
from gti_kernels.ops.arguments import check_alike, check_disjoint, unlike_layouts

pytestmark = pytest.mark.skipif(backends.compiled is None, reason="the compiled part is not built")

CPU, HIP, MAIA = 1, 10, 17  # devices of DLPack; a tensor of the last two can be made on any machine


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 4),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


_kept: list[object] = []  # what tensors of other devices point to


def on(device, x):
    """The memory of x, fp32, as a tensor that says it is on another device."""
    if device == CPU:
        return x
    shape, strides = ((ctypes.c_int64 * x.ndim)(*n) for n in (x.shape, x.stride()))
    managed = _DLTensor(x.data_ptr(), (device, 0), x.ndim, (2, 32, 1, 0), shape, strides)
    _kept.extend((x, shape, strides, managed))
    new, name = ctypes.pythonapi.PyCapsule_New, ctypes.c_char_p
    new.restype, new.argtypes = (
        ctypes.py_object,
        [ctypes.c_void_p, name, ctypes.c_void_p],
    )
    return torch.from_dlpack(new(ctypes.addressof(managed), b"dltensor", None))


def numbers(*shape, seed=0):
    return testing.numbers(*shape, dtype=torch.float32, device="cpu", seed=seed)


def places(*lists):
    return [[0 if x is None else x.data_ptr() for x in xs] for xs in lists]


@pytest.mark.parametrize("device", [CPU, HIP, MAIA])
def test_addresses_of_a_device(device):
    q, owned = [on(device, numbers(*s)) for s in ((6,), (2, 3))], [on(device, numbers(12))]
    grads = [on(device, numbers(*x.shape, seed=1)) for x in q]
    known = backends.compiled.Addresses(q, owned)
    assert known.refresh(grads, (), True, True)
    assert known.rows().tolist() == places(q, grads)
    version = known.version()
    assert known.refresh(grads, (), True, True) and known.version() == version
    for other in {CPU, HIP, MAIA} - {device}:
        moved = on(other, numbers(6, seed=2))
        assert not known.refresh([moved, grads[1]], (), True, True)
        with pytest.raises(ValueError, match="of the device"):
            backends.compiled.Addresses([q[0], moved], [])
        with pytest.raises(ValueError, match="of the device"):
            backends.compiled.Addresses(q, [moved])
    assert not known.refresh([torch.empty(6, device="meta"), grads[1]], (), True, True)
    assert known.version() == version and known.rows().tolist() == places(q, grads)


@pytest.mark.parametrize("module", [backends.compiled, device_plans])
def test_rows_follow_what_moves(module):
    q, owned = [numbers(6), numbers(2, 3)], [numbers(12)]
    first, grads = ([numbers(*x.shape, seed=s) for x in q] for s in (1, 2))
    known = module.Addresses(q, owned)
    assert known.refresh(first, (), True, False)
    assert known.rows()[1].tolist() == places(first)[0]
    versions = [known.version()]

    def changes(*step):
        assert known.refresh(*step)
        versions.append(known.version())
        return versions[-1] != versions[-2]

    assert changes([None, None], (), False, True)  # the row of the positions
    assert known.rows().tolist() == places(q, first)
    assert not changes(first, (), True, True)
    assert changes([grads[0], first[1]], (), True, True)
    assert known.rows().tolist() == places(q, [grads[0], first[1]])
    q[1].data = numbers(2, 3)
    assert changes([grads[0], first[1]], (), True, True)
    assert known.rows().tolist() == places(q, [grads[0], first[1]])
    assert changes([None, first[1]], (), True, True) and tuple(known.skipped()) == (0,)
    assert known.rows().tolist() == places([None, q[1]], [None, first[1]])
    assert changes([None, None], (1,), False, True) and tuple(known.skipped()) == (1,)
    assert known.rows().tolist() == places([q[0], None], [None, first[1]])
    owned[0].data = numbers(12)
    assert not known.refresh(first, (), True, True)


def test_lists_that_a_kernel_can_walk_through_together():
    """The compiled answer is yes, or the checks in Python have an objection, and the other way."""
    memory = numbers(40)
    a, b, c = ([memory[i : i + 6], numbers(2, 3, seed=i)] for i in (0, 10, 20))
    turned = numbers(3, 2).t()
    lazy = torch.complex(c[0], c[0]).conj().imag
    cases = [
        ([a, b], [c], True),
        ([a, [b[0], b[1].clone()]], [], True),
        ([[x[:0] for x in a]], [[x[:0] for x in a]], True),
        ([a, b], [a], False),
        ([a, [a[0], b[1]]], [], False),
        ([[memory[:6], memory[5:7]]], [], False),
        ([a], [c[:1]], False),
        ([a], [[c[0], numbers(3, 2)]], False),
        ([a], [[c[0], turned]], False),
        ([[a[0], turned]], [[c[0], numbers(3, 2, seed=9).t()]], True),
        ([[memory[::2]]], [], False),
        ([[memory[:1].expand(4)]], [], False),
        ([a], [[lazy, c[1]]], False),
        ([[x.double() for x in a]], [c], False),
        ([[x.int() for x in a]], [], False),
        ([[on(MAIA, x) for x in a]], [[on(MAIA, x) for x in c]], True),
        ([[on(MAIA, x) for x in a]], [c], False),
        ([a], [[c[0], on(HIP, c[1])]], False),
        ([[a[0], 3.0]], [], False),
        ([[]], [], False),
    ]
    for i, (written, read, right) in enumerate(cases):
        assert backends.compiled.alike(written, read) == right, i
        w, r = (
            {f"{kind}{j}": x for j, x in enumerate(xs)} for kind, xs in zip("wr", (written, read))
        )
        try:
            check_alike("op", **w, **r)
            check_disjoint("op", w, r)
            told = unlike_layouts(**w, **r) is None and written != [[]]
        except (TypeError, ValueError):
            told = False
        assert told == right, i


# ---- plans --------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """Launches of the backend "cuda", which compute nothing: addresses that each of them was given,
    of parameters and gradients."""

    class Launches(list):
        aligned: bool

    found = Launches()

    def launched(launch, *args):
        found.append([None if x is None else x.tolist() for x in (launch.qs, launch.gs)])
        found.aligned = launch.aligned

    kernels = SimpleNamespace(
        chunk=lambda: 2048,
        phase_kind=lambda q, p, mass: (q, p),
        grid_kind=lambda q, mass: q,
        factors=lambda numbers, device: numbers,
        phase_step=launched,
        grid_step=launched,
        fixed_sum=torch.sum,
    )
    monkeypatch.setattr(backends, "choose", lambda op, device, backend, limits: "cuda")
    monkeypatch.setattr(device_plans._Plan, "_new", lambda self, d: torch.zeros(1, dtype=d))
    monkeypatch.setattr("gti_kernels.phase_space.importlib.import_module", lambda *a: kernels)
    return found


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_plan_launches_on_the_addresses_of_the_step(asked, monkeypatch, compiled, exact):
    """With the checks of the compiled part and, where it is missing, of Python."""
    if not compiled:
        monkeypatch.setattr(backends, "compiled", None)
    params = [torch.nn.Parameter(numbers(*s)) for s in ((6,), (2, 3), (4,))]
    for x in params:
        x.grad = torch.ones_like(x)
    space = gti.PhaseSpace(params, exact=exact)
    grads = [x.grad for x in params]
    space.kick_drift_(0.1, 0.1)
    assert asked == [places(params, grads)]
    params[1].data, grads[2] = torch.zeros(2, 3), numbers(4, seed=4)
    if exact:  # which holds the positions
        space = gti.PhaseSpace(params, exact=True)
    params[2].grad, params[0].grad = grads[2], None
    space.kick_drift_(0.1, 0.1)
    assert asked[1:] == [places([None, *params[1:]], [None, *grads[1:]])]
    assert space.skipped == (0,)
    space.kick_(0.3)
    space.drift_(0.1)
    assert asked[2:] == [[None, *places([None, *grads[1:]])], [*places(params), None]]
    assert asked.aligned
    params[1].grad = numbers(7)[1:].view(2, 3)
    space.kick_(0.5)
    assert not asked.aligned and asked.pop()[1][1] == params[1].grad.data_ptr()
    # Laid out otherwise: a copy, which nobody else has.
    params[1].grad = grads[1].t().contiguous().t()
    space.kick_(0.7)
    assert asked[4][1][1] not in (0, grads[1].data_ptr(), params[1].grad.data_ptr())


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_plan_refuses_before_it_launches(asked, monkeypatch, compiled, exact):
    if not compiled:
        monkeypatch.setattr(backends, "compiled", None)
    q = [numbers(6), numbers(2, 3)]
    space = gti.PhaseSpace(q, exact=exact)
    good = [numbers(6), numbers(2, 3)]
    cases = [
        (good[:1], ValueError, "one entry for each of the 2"),
        ([good[0].double(), None], ValueError, "float64"),
        ([numbers(5), None], ValueError, "shape, dtype and device"),
        ([on(MAIA, good[0]), None], ValueError, "shape, dtype and device.* on maia:0"),
        ([torch.empty(6, device="meta"), None], ValueError, "shape, dtype and device.* on meta"),
        ([good[0].to_sparse(), None], TypeError, "sparse=False"),
        ([q[0].detach(), None], ValueError, "share memory"),
        ([good[0], 3.0], TypeError, "must be a tensor, got float"),
    ]
    for grads, error, words in cases:
        with pytest.raises(error, match=words):
            space.kick_drift_(0.1, 0.1, grads=grads)
    q[1].data = numbers(3, 2)
    for step in (lambda: space.drift_(0.1), lambda: space.kick_(0.1, grads=good)):
        with pytest.raises(RuntimeError, match="plan is stale: params\\[1\\]"):
            step()
    assert not asked and space.step_count == 0
