"""The lines of the benchmark for a GPU: op and peers compute the same, here on small tensors."""

from __future__ import annotations

import pytest
import torch

from gti_kernels import bench, cli
from gti_kernels.bench import gpu, power_iteration, two_form
from gti_kernels.bench.case import Case, Work
from gti_kernels.bench.timing import measure
from gti_kernels.probes import tangent_map
from gti_kernels.probes.hamiltonian_system import HamiltonianSystem


def test_the_warm_started_list_and_its_peer_agree():
    work = gpu._warm_list("cpu", ((64, 48), (32, 3, 4, 4), (20, 50)))
    sigma = work.op().sigma[:, 0]
    peer = torch.stack(work.peers["spectral_norm loop"]()).float()
    torch.testing.assert_close(peer, sigma.float(), rtol=0.02, atol=0.0)
    steps = work.op().steps
    assert work.bytes_moved == 2 * int((steps * torch.tensor([3072, 1536, 1000])).sum())


def test_the_steps_of_a_plan_and_their_peers_run():
    shapes = ((64, 48), (48,))
    for work in (gpu._plan("cpu", shapes), gpu._exact_plan("cpu", shapes)):
        before = float(work.op())
        assert float(work.op()) > before > 0  # the gradient is the same, the momenta grow
        for peer in work.peers.values():
            peer()
    assert gpu._plan("cpu", shapes).bytes_moved == 20 * (64 * 48 + 48)


def test_the_fp64_roof_has_as_many_operations():
    work = gpu._roof("cpu", 8, 5000)
    (product,) = (peer().shape for peer in work.peers.values())
    assert 2 * product[0] ** 3 == pytest.approx(2 * 8 * 7 * 5000, rel=0.05)


def test_lists_have_the_sizes_they_claim():
    def numbers(shapes):
        return sum(torch.Size(s).numel() for s in shapes)

    assert len(gpu.VIT_B_WEIGHTS) == 50
    assert len(gpu.DECODER_7B_WEIGHTS) == 226
    assert 86.0e6 < numbers(gpu.VIT_B_WEIGHTS) < 86.6e6
    assert 6.7e9 < numbers(gpu.DECODER_7B_WEIGHTS) < 6.8e9


@pytest.mark.parametrize("name", ["Gaussian", "log-uniform", "arithmetic"])
def test_cold_starts_and_their_peers_agree(name):
    weights = power_iteration.matrices_with(name, 2, 96)
    expected = torch.linalg.svdvals(weights.double())
    sigmas = power_iteration.spectrum(name, 96)
    if sigmas is not None:
        torch.testing.assert_close(expected, sigmas.expand(2, -1), rtol=0, atol=1e-6)
    work = power_iteration._cold(list(weights), 1e-4)  # checks the error of the first
    torch.testing.assert_close(work.op().sigma[:, 0].double(), expected[:, 0], rtol=1e-6, atol=0)
    for peer in work.peers.values():
        torch.testing.assert_close(
            torch.stack(peer()).double(), expected[:, 0], rtol=2e-6, atol=0.0
        )
    assert power_iteration.true_sigma(weights[0]) == pytest.approx(float(expected[0, 0]))


def test_a_residual_too_large_for_the_error_is_refused():
    weights = list(power_iteration.matrices_with("Gaussian", 1, 96))
    with pytest.raises(RuntimeError, match="relative error"):
        power_iteration._cold(weights, 0.3)


def test_suites():
    plain = [(c.op, c.name, c.shape) for c in bench.cases()]
    long = [(c.op, c.name, c.shape) for c in bench.cases("cpu", "full")]
    assert long[: len(plain)] == plain and len(set(long)) == len(long) > len(plain)
    assert [(c.op, c.name, c.shape) for c in bench.cases("cuda")] == plain
    assert not any(c.bars for c in bench.cases("cuda"))
    full = bench.cases("cuda", "full")
    assert [(c.op, c.name, c.shape) for c in full][-len(plain) :] == plain
    assert any(c.bars for c in full) and any(c.least_share for c in full)


def test_a_line_that_fails_is_a_result_and_its_share_is_a_bar():
    def broken(device):
        raise RuntimeError("out of memory")

    case = Case("kick_", "x", "y", "float32", broken)
    result = measure(case, 1, "cpu")
    assert not result.met and "out of memory" in bench.lines(result)[0]

    def slow(device):
        x = torch.zeros(1 << 20)
        return Work(lambda: [x.sum() for _ in range(20)], {}, bytes_moved=4)

    case = Case("kick_", "x", "y", "float32", slow, least_share=0.5)
    assert not measure(case, 2, "cpu").met


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_an_error_with_words(capsys):
    assert cli.main(["bench", "--device", "cuda", "--suite", "full"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(("batches", "passes"), [(1, 3), (4, 4)])
def test_the_peers_of_tangents_evaluate_what_is_needed_and_no_more(monkeypatch, batches, passes):
    """ε_Ω beside as many passes as it makes, tangents beside one gradient for each and step."""
    count = {"force": 0, "gradient": 0}

    def counting(name, function):
        def wrapper(*args):
            count[name] += 1
            return function(*args)

        return wrapper

    counted = counting("force", tangent_map.force)
    monkeypatch.setattr(tangent_map, "force", counted)
    monkeypatch.setattr(two_form, "force", counted)
    monkeypatch.setattr(
        HamiltonianSystem, "gradient", counting("gradient", HamiltonianSystem.gradient)
    )
    needed = {
        "gradients and HVPs": {"force": passes, "gradient": 0},
        "gradient/tangent/step": {"force": 0, "gradient": 2 * 2},
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is so small that more would only wait for each other
    try:
        for work in (two_form._epsilon(1, 2, batches), two_form._push(1, 2, batches)):
            count.update(force=0, gradient=0)
            work.op()
            assert count == {"force": passes, "gradient": 0}
            ((name, peer),) = work.peers.items()
            count.update(force=0)
            peer()
            assert count == needed.pop(name)
    finally:
        torch.set_num_threads(threads)
