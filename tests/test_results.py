"""Results behave like tuples, and their tensors are made when they are first read."""

import copy
import io

import pytest
import torch

import gti_kernels as gti

torch.manual_seed(0)
WEIGHTS = [torch.randn(5, 3), torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(4, 4).half()]
CALLS = {
    "power_iteration": lambda: gti.power_iteration(WEIGHTS, k=2, tol=1e-6),
    "one weight": lambda: gti.power_iteration(WEIGHTS[0].expand(2, 3, 5, 3).contiguous()),
    "two_form": lambda: gti.two_form(WEIGHTS[0], WEIGHTS[0].flip(0)),
    "with metric": lambda: gti.two_form(WEIGHTS[0], WEIGHTS[0].flip(0), metric=True),
}


def flat(result) -> list[torch.Tensor]:
    out = []
    for x in result:
        out += x if isinstance(x, list) else [x] if x is not None else []
    return out


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_field_read_twice_is_the_same_tensor(call):
    result = call()
    for name in result._fields:
        assert getattr(result, name) is getattr(result, name)
    assert [id(x) for x in flat(result)] == [id(x) for x in flat(tuple(result))]
    assert len(result) == len(tuple(result)) and result[0] is next(iter(result))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_unread_results_outlive_other_calls(call):
    """Each result has memory of its own: a later call does not write into it."""
    first = call()
    expected = [x.clone() for x in flat(call())]
    for _ in range(20):
        gti.power_iteration(torch.randn(6, 6), k=2)
        gti.two_form(torch.randn(5, 3), torch.randn(5, 3), metric=True)
    assert all(torch.equal(a, b) for a, b in zip(flat(first), expected, strict=True))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_copies_and_files(call):
    result = call()
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    for other in (copy.deepcopy(call()), copy.copy(call()), torch.load(file, weights_only=False)):
        assert type(other) is type(result)
        assert all(torch.equal(a, b) for a, b in zip(flat(other), flat(result), strict=True))


def test_replace_and_repr():
    result = gti.power_iteration(WEIGHTS[0])
    changed = result._replace(v=torch.zeros(3, 1))
    assert changed.sigma is result.sigma and not changed.v.any() and result.v.any()
    assert repr(result).startswith("SingularTriples(sigma=tensor(")
    with pytest.raises(AttributeError):
        result.s  # noqa: B018
    with pytest.raises(ValueError):
        gti.TwoForm(1, 2)


def test_shapes_of_unread_fields():
    result = gti.power_iteration(WEIGHTS[0].expand(2, 3, 5, 3).contiguous(), k=2)
    shapes = [tuple(x.shape) for x in result]
    assert shapes == [(2, 3, 2), (2, 3, 5, 2), (2, 3, 3, 2), (2, 3, 2), (2, 3), (2, 3), (2, 3)]
    result = gti.power_iteration(WEIGHTS, k=2)
    assert [tuple(u.shape) for u in result.u] == [(5, 2), (2, 2), (4, 2)]
    assert [v.dtype for v in result.v] == [torch.float32, torch.float64, torch.float32]
    assert result.sigma.dtype == result.upper.dtype == torch.float64
    assert gti.two_form(WEIGHTS[0], WEIGHTS[0]).metric is None


def test_compiled_without_a_break():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def probe(w):
        sigma, *_ = r = gti.power_iteration(w)
        return sigma + r.upper, r

    total, r = probe(WEIGHTS[0])
    expected = gti.power_iteration(WEIGHTS[0])
    assert torch.equal(total, expected.sigma + expected.upper)
    assert torch.equal(r.v, expected.v)
