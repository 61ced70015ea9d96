"""The lines of the benchmark for a GPU: op and peers compute the same, here on small tensors."""

from __future__ import annotations

import pytest
import torch

from gti_kernels import bench, bench_gpu, cli


def test_the_warm_started_list_and_its_peer_agree():
    work = bench_gpu._warm_list("cpu", ((64, 48), (32, 3, 4, 4), (20, 50)))
    sigma = work.op().sigma[:, 0]
    peer = torch.stack(work.peers["spectral_norm loop"]()).float()
    torch.testing.assert_close(peer, sigma.float(), rtol=0.02, atol=0.0)
    steps = work.op().steps
    assert work.bytes_moved == 2 * int((steps * torch.tensor([3072, 1536, 1000])).sum())


def test_the_fp64_roof_has_as_many_operations():
    work = bench_gpu._roof("cpu", 8, 5000)
    (product,) = (peer().shape for peer in work.peers.values())
    assert 2 * product[0] ** 3 == pytest.approx(2 * 8 * 7 * 5000, rel=0.05)


def test_lists_have_the_sizes_they_claim():
    def numbers(shapes):
        return sum(torch.Size(s).numel() for s in shapes)

    assert len(bench_gpu.VIT_B_WEIGHTS) == 50
    assert len(bench_gpu.DECODER_7B_WEIGHTS) == 226
    assert 86.0e6 < numbers(bench_gpu.VIT_B_WEIGHTS) < 86.6e6
    assert 6.7e9 < numbers(bench_gpu.DECODER_7B_WEIGHTS) < 6.8e9


def test_suites():
    plain = [(c.op, c.name, c.shape) for c in bench.cases()]
    assert [(c.op, c.name, c.shape) for c in bench.cases("cpu", "full")][: len(plain)] == plain
    assert [(c.op, c.name, c.shape) for c in bench.cases("cuda")] == plain
    assert not any(c.bars for c in bench.cases("cuda"))
    full = bench.cases("cuda", "full")
    assert [(c.op, c.name, c.shape) for c in full][-len(plain) :] == plain
    assert any(c.bars for c in full) and any(c.least_share for c in full)


def test_a_line_that_fails_is_a_result_and_its_share_is_a_bar():
    def broken(device):
        raise RuntimeError("out of memory")

    case = bench.Case("kick_", "x", "y", "float32", broken)
    result = bench.measure(case, 1, "cpu")
    assert not result.met and "out of memory" in bench.lines(result)[0]

    def slow(device):
        x = torch.zeros(1 << 20)
        return bench.Work(lambda: [x.sum() for _ in range(20)], {}, bytes_moved=4)

    case = bench.Case("kick_", "x", "y", "float32", slow, least_share=0.5)
    assert not bench.measure(case, 2, "cpu").met


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_an_error_with_words(capsys):
    assert cli.main(["bench", "--device", "cuda", "--suite", "full"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
