"""What only a GPU can show: parity on its tensors, CUDA graphs, no wait for the device, streams,
the launches of CUDA C++ kernels. `make gpu-check` runs this file."""

from __future__ import annotations

import threading
from ctypes import c_float, c_int

import pytest
import torch
from cuda_sources import AXPY

import gti_kernels as gti
from gti_kernels import testing
from gti_kernels.cuda_kernels import compiler, power_iteration, runtime
from gti_kernels.ops.results import Result
from gti_kernels.rows import BUILT, BY_NAME, ROWS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

BACKENDS = ("cuda", "triton", "reference")
OPS = [
    pytest.param(row.name, backend, id=f"{row.name}-{backend}")
    for row in ROWS
    for backend in BACKENDS
    if (row.stem, backend) in BUILT
]
KERNELS = [p for p in OPS if p.values[1] != "reference"]


def need(backend: str) -> None:
    reason = gti.available()[backend]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def flat(x) -> list[torch.Tensor]:
    """All tensors of a result or of arguments."""
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for y in x for t in flat(y)] if isinstance(x, (list, tuple, Result)) else []


def call(op: str, backend: str, args, kwargs) -> list[torch.Tensor]:
    """Runs an op; its results and what it wrote."""
    result = getattr(gti, op)(*args, **kwargs, backend=backend)
    tensors = [*flat(result), *flat(args[: len(BY_NAME[op].mutates)])]
    assert tensors  # or a comparison would say nothing
    return tensors


def sample(op: str, dtype: str = "float32"):
    return testing.samples(op)[0].make(getattr(torch, dtype), "cuda")


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("op, backend", OPS)
def test_parity_with_the_float64_reference(op, backend, dtype):
    need(backend)
    wrong = [c for c in testing.compare(op, dtype, backend, "cuda") if not c.error <= c.bound]
    assert not wrong


@pytest.mark.parametrize("op, backend", KERNELS)
def test_same_inputs_same_bits(op, backend):
    need(backend)
    first, second = (call(op, backend, *sample(op)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("op, backend", KERNELS)
def test_no_call_waits_for_the_device(op, backend):
    need(backend)
    args, kwargs = sample(op)
    call(op, backend, args, kwargs)  # compiles, uploads its tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(op, backend, args, kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op, backend", KERNELS)
def test_runs_on_the_current_stream(op, backend):
    need(backend)
    expected = call(op, backend, *sample(op))
    args, kwargs = sample(op)
    wanted = [t.clone() for t in flat(args)]
    for t in flat(args):
        t.zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # another stream would see the zeros
        for t, value in zip(flat(args), wanted, strict=True):
            t.copy_(value)
        got = call(op, backend, args, kwargs)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def capture(function):
    """function in a CUDA graph, after one call outside; the graph and its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["cg", "power"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_power_iteration_in_a_cuda_graph(backend, k, method, dtype):
    if ("power_iteration", backend) not in BUILT:
        pytest.skip(f"power_iteration has no {backend} kernel yet")
    need(backend)
    # With the last one a launch is cooperative: its counters must be zero at each replay.
    shapes = ((64, 64), (300, 700), (1000, 33), (7, 5), (2000, 1000))
    weights = [torch.randn(s, device="cuda", dtype=dtype) for s in shapes]
    options = {"k": k, "method": method, "max_steps": 12, "tol": 0.0, "backend": backend}
    graph, captured = capture(lambda: gti.power_iteration(weights, **options))
    for _ in range(2):  # other values at the same addresses
        for w in weights:
            w.normal_()
        graph.replay()
        expected = flat(gti.power_iteration(weights, **options))
        assert len(expected) == 5 + 2 * len(shapes)  # u and v are lists
        for a, b in zip(flat(captured), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_power_iteration_of_a_list_of_all_classes_is_one_launch(monkeypatch, dtype):
    """A block, a cluster, a quarter of the device and all of it, on chip and streaming."""
    need("cuda")
    shapes = ((64, 576), (768, 768), (300, 7), (3072, 768), (4096, 4096), (16, 100_000), (512, 512))
    weights = [torch.randn(s, device="cuda").to(dtype) for s in shapes]
    launches, launch = [], power_iteration.launch

    def counted(*args, **options):
        launches.append(options)
        launch(*args, **options)

    monkeypatch.setattr(power_iteration, "launch", counted)
    options = {"max_steps": 30, "tol": 0.0}
    found = gti.power_iteration(weights, **options, backend="cuda")
    assert [one["cooperative"] for one in launches] == [True]
    exact = gti.power_iteration([w.double() for w in weights], **options, backend="reference")
    torch.testing.assert_close(found.sigma.double(), exact.sigma, rtol=1e-3, atol=0)
    again = gti.power_iteration(weights, **options, backend="cuda")
    assert all(torch.equal(a, b) for a, b in zip(flat(found), flat(again), strict=True))


def test_power_iteration_on_two_streams_at_once():
    """Blocks of two cooperative launches must not wait for room that the other launch holds."""
    need("cuda")
    shapes = ((64, 64), (300, 700), (2000, 1000))
    weights = [torch.randn(s, device="cuda") for s in shapes]
    options = {"max_steps": 12, "tol": 0.0, "backend": "cuda"}
    expected = flat(gti.power_iteration(weights, **options))
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for stream in streams * 20:
        with torch.cuda.stream(stream):
            found.append(flat(gti.power_iteration(weights, **options)))
    torch.cuda.synchronize()
    for one in found:
        assert all(torch.equal(a, b) for a, b in zip(one, expected, strict=True))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_kick_drift_in_a_cuda_graph(backend):
    if ("leapfrog", backend) not in BUILT:
        pytest.skip(f"kick_drift_ has no {backend} kernel yet")
    need(backend)
    q, p, grad = ([torch.randn(n, device="cuda") for n in (1, 7, 4096, 100_001)] for _ in range(3))
    mirror = [[t.clone() for t in tensors] for tensors in (q, p)]
    graph, energy = capture(lambda: gti.kick_drift_(q, p, grad, 0.1, 0.2, backend=backend))
    gti.kick_drift_(*mirror, grad, 0.1, 0.2, backend=backend)  # the call before the capture
    for _ in range(3):
        for g in grad:
            g.normal_()
        graph.replay()
        expected = gti.kick_drift_(*mirror, grad, 0.1, 0.2, backend=backend)
        assert torch.equal(energy, expected)
        assert all(torch.equal(a, b) for a, b in zip(flat([q, p]), flat(mirror), strict=True))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_factors_of_a_step_in_a_cuda_graph(backend):
    if ("leapfrog", backend) not in BUILT:
        pytest.skip(f"kick_drift_ has no {backend} kernel yet")
    need(backend)
    q, p, grad = ([torch.randn(n, device="cuda") for n in (7, 100_001)] for _ in range(3))
    mirror = [[t.clone() for t in tensors] for tensors in (q, p)]
    h, damp = (torch.full((), x, device="cuda", dtype=torch.float64) for x in (0.1, 0.9))
    graph, _ = capture(lambda: gti.kick_drift_(q, p, grad, h, 0.2, damp=damp, backend=backend))
    gti.kick_drift_(*mirror, grad, 0.1, 0.2, damp=0.9, backend=backend)
    for x in (0.3, -0.1):
        h.fill_(x)
        graph.replay()
        gti.kick_drift_(*mirror, grad, x, 0.2, damp=0.9, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(flat([q, p]), flat(mirror), strict=True))


def test_a_capped_step_of_leapfrog_in_a_cuda_graph():
    need("triton")
    runs = []
    for captured in (False, True):
        torch.manual_seed(0)
        q = [torch.nn.Parameter(torch.randn(n, device="cuda")) for n in (7, 100_001)]
        dt = torch.full((), 0.1, device="cuda", dtype=torch.float64)
        optimizer = gti.optim.Leapfrog(
            q, dt, inv_mass=1.0, damping=0.1, energy_cap=1.0, momentum="gaussian"
        )
        for x in q:
            x.grad = torch.zeros_like(x)

        def gradient(q=q):
            for x in q:
                x.grad.copy_(torch.sin(x.detach()))
            return sum((1.0 - torch.cos(x.detach())).sum() for x in q).double()

        loss = gradient().clone()
        optimizer.step(loss=loss)  # the one before the capture, which only records
        graph = None
        for t in range(6):
            dt.fill_(0.1 + 0.02 * t)
            loss.copy_(gradient())
            if not captured:
                optimizer.step(loss=loss)
                continue
            if graph is None:
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    optimizer.step(loss=loss)
            graph.replay()
        results = [*(x.detach() for x in q), *optimizer.phase_spaces[0].momenta]
        runs.append([*results, optimizer.cap_engagements, optimizer.energy()])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert int(runs[0][-2]) > 0


# ---- the plan -----------------------------------------------------------------------------------

PLANS = pytest.mark.parametrize("backend", ["cuda", "triton"])
SIZES = (1, 0, 7, 4097, 100_001)


def lists(count: int, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """On the CPU: numbers of very different sizes."""
    out = [
        [testing.numbers(n, dtype=dtype, device="cpu", seed=31 * a + n) for n in SIZES]
        for a in range(count)
    ]
    for x in flat(out):
        x[3::4] *= 2.0**-20
    return out


def plans(backend: str, dtype: torch.dtype, **options):
    """The same plan on the CPU and on the GPU, each with its gradients."""
    both = []
    for name, device in (("cpu", "cpu"), (backend, "cuda")):
        q, grads, mass = ([x.to(device) for x in xs] for xs in lists(3, dtype))
        mass = [w.float().abs() + 0.1 for w in mass]
        space = gti.PhaseSpace(q, inv_mass=mass, seed=3, backend=name, **options)
        both.append((space, grads))
    return both


def check_same_bits(a, b) -> None:
    for xs, ys in ((a.params, b.params), (a.momenta, b.momenta)):
        assert all(torch.equal(x, y.to(x.device)) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@PLANS
def test_steps_of_a_plan_have_the_bits_of_the_cpu(backend, dtype, wide):
    need(backend)
    energies = []
    both = plans(backend, dtype, momentum_dtype=wide)
    for space, grads in both:
        energies.append([float(space.kick_drift_(0.1, 0.2, damp=0.9, grads=grads))])
        space.kick_(0.3, grads=[*grads[:3], None, grads[4]])
        space.drift_(-0.1)
        energies[-1].append(float(space.kick_drift_(0.3, 0.1, grads=grads)))
    check_same_bits(both[0][0], both[1][0])
    assert energies[1] == pytest.approx(energies[0], rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@PLANS
def test_exact_steps_have_the_bits_of_the_cpu_and_return(backend, dtype):
    need(backend)
    both = plans(backend, dtype, exact=True, momentum="gaussian")
    start = [x.clone() for x in flat([both[1][0].params, both[1][0].momenta])]
    for space, grads in both:
        for _ in range(3):
            space.kick_drift_(0.1, 0.2, damp=0.9, grads=grads)
        space.scale_momenta_(0.7)
        space.kick_(0.1, grads=grads)
    check_same_bits(both[0][0], both[1][0])
    checksums = [list(space._engine.moves.checksums) for space, _ in both]
    assert checksums[0] == checksums[1]
    space, grads = both[1]
    space.kick_(-0.1, grads=grads)
    space.scale_momenta_(1 / 0.7)
    for _ in range(3):
        space.drift_(-0.2)
        space.kick_(-0.1 / 0.9, damp=1 / 0.9, grads=grads)
    end = flat([space.params, space.momenta])
    assert all(torch.equal(a, b) for a, b in zip(start, end, strict=True))


@PLANS
def test_a_step_of_a_plan_does_not_wait_for_the_device(backend):
    need(backend)
    ((_, _), (space, grads)), factor = plans(backend, torch.bfloat16), torch.tensor(0.1).cuda()
    space.kick_drift_(factor, 0.1, grads=grads)
    others = [g.clone() for g in grads]  # other addresses: a row is uploaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        space.kick_drift_(factor, factor, damp=factor, grads=others)
        space.kick_(0.1, grads=grads)
        space.drift_(factor)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_pass_over_the_grid_does_not_wait_for_the_device():
    need("cuda")
    (_, (space, grads)) = plans("cuda", torch.float32, exact=True)
    space.kick_drift_(0.1, 0.1, grads=grads)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = space._engine.plan.enqueue(grads, (), True, True, False, 0.1, 0.1, 1.0, {2: 0.5})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.device.type == "cuda" for x in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@PLANS
def test_a_step_of_a_plan_in_a_cuda_graph(backend, dtype):
    """Replays are steps one after the other: 16-bit parameters are rounded with other random bits
    each time."""
    need(backend)
    spaces = [plans(backend, dtype)[1] for _ in range(2)]
    (space, grads), (mirror, others) = spaces
    graph, energy = capture(lambda: space.kick_drift_(0.1, 0.2, damp=0.9, grads=grads))
    mirror.kick_drift_(0.1, 0.2, damp=0.9, grads=others)  # the call before the capture
    for _ in range(3):
        for a, b in zip(grads, others, strict=True):
            b.copy_(a.normal_())
        graph.replay()
        expected = mirror.kick_drift_(0.1, 0.2, damp=0.9, grads=others)
        assert torch.equal(energy, expected)
        check_same_bits(space, mirror)


# ---- launches of CUDA C++ -----------------------------------------------------------------------

FLOAT = (("REAL", "float"),)


@pytest.fixture
def axpy(tmp_path, monkeypatch):
    """A source axpy.cu and an empty cache; returns the function that loads one of its kernels."""
    try:
        compiler.cuda_core()
        compiler.compiler_version()
    except ImportError as error:
        pytest.skip(str(error))
    (tmp_path / "axpy.cu").write_text(AXPY)
    monkeypatch.setattr(compiler, "FOLDERS", (tmp_path,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    runtime.kernel.cache_clear()
    device = torch.device("cuda", torch.cuda.current_device())
    yield lambda entry: runtime.kernel("axpy", entry, FLOAT, device)
    runtime.kernel.cache_clear()


def run_axpy(kernel, a, x, y):
    runtime.launch(kernel, -(-x.numel() // 256), 256, [c_float(a), x, y, x.numel()])


def test_a_launch_computes(axpy):
    x, y = torch.randn(2, 100_001, device="cuda")
    expected = y + 0.5 * x
    kernel = axpy("axpy")
    run_axpy(kernel, 0.5, x, y)
    assert torch.equal(y, expected)
    assert axpy("axpy") is kernel


def test_launches_follow_the_current_stream_and_do_not_wait(axpy):
    kernel = axpy("axpy")
    x, y = torch.zeros(2, 1000, device="cuda")
    run_axpy(kernel, 1.0, x.fill_(0.0), y)  # all that is launched below is loaded now
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            x.fill_(3.0)
            run_axpy(kernel, 2.0, x, y)
        assert not stream.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert y.eq(6.0).all()


def test_a_launch_in_a_cuda_graph(axpy):
    x, y = torch.ones(1000, device="cuda"), torch.zeros(1000, device="cuda")
    kernel = axpy("axpy")
    graph, _ = capture(lambda: run_axpy(kernel, 1.0, x, y))
    graph.replay()
    graph.replay()
    assert y.eq(3.0).all()


def test_a_kernel_is_not_loaded_inside_a_capture(axpy):
    graph = torch.cuda.CUDAGraph()
    x = torch.zeros(8, device="cuda")
    with torch.cuda.graph(graph):
        x.add_(1.0)
        with pytest.raises(RuntimeError, match="make the same call once before it"):
            axpy("axpy")
    graph.replay()
    assert x.eq(1.0).all()


def test_a_launch_from_a_new_thread(axpy):
    kernel = axpy("axpy")
    x, y = torch.ones(1000, device="cuda"), torch.zeros(1000, device="cuda")
    thread = threading.Thread(target=run_axpy, args=(kernel, 4.0, x, y))
    thread.start()
    thread.join()
    assert y.eq(4.0).all()


def test_more_than_48_kib_of_dynamic_shared_memory(axpy):
    kernel = axpy("reverse")
    most = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    for size in (1000, most // 4, 2000):
        x = torch.randn(size, device="cuda")
        expected = x.flip(0)
        runtime.launch(kernel, 1, 256, [x, c_int(size)], shared_bytes=4 * size)
        assert torch.equal(x, expected)
    with pytest.raises(ValueError, match=f"shared_bytes must be at most {most}"):
        runtime.launch(kernel, 1, 256, [x, c_int(1)], shared_bytes=most + 1)


def test_a_cooperative_launch_runs_all_blocks_at_once(axpy):
    kernel = axpy("everyone")
    count = torch.cuda.get_device_properties(0).multi_processor_count
    blocks = count * kernel.blocks_per_multiprocessor(128)
    assert blocks >= count
    seen = torch.zeros(blocks, dtype=torch.int32, device="cuda")
    counter = torch.zeros(1, dtype=torch.int32, device="cuda")
    runtime.launch(kernel, blocks, 128, [counter, seen], cooperative=True)
    assert seen.eq(blocks).all()
    with pytest.raises(Exception, match=r"exceeds|LARGE|large"):
        runtime.launch(kernel, blocks + 1, 128, [counter, seen], cooperative=True)


def test_clusters_of_8_and_of_as_many_as_the_device_allows(axpy):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters need compute capability 9.0")
    kernel = axpy("cluster")
    most = kernel.largest_cluster(128)
    assert most >= 8
    for size in (1, 2, 8, most):
        got = torch.zeros(4 * size, dtype=torch.int32, device="cuda")
        runtime.launch(kernel, 4 * size, 128, [got], cluster=size)
        assert got.eq(size).all()


def test_a_cooperative_launch_with_clusters_runs_all_blocks_at_once(axpy):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters need compute capability 9.0")
    kernel = axpy("everyone")
    shared = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    for size in {8, kernel.largest_cluster(128, shared)}:
        blocks = size * kernel.clusters_at_once(size, 128, shared)
        assert blocks >= size
        seen = torch.zeros(blocks, dtype=torch.int32, device="cuda")
        counter = torch.zeros(1, dtype=torch.int32, device="cuda")
        options = {"shared_bytes": shared, "cluster": size, "cooperative": True}
        runtime.launch(kernel, blocks, 128, [counter, seen], **options)
        assert seen.eq(blocks).all()


def test_tensors_of_another_device_are_refused(axpy):
    with pytest.raises(ValueError, match="argument 0 must be on cuda:0, got a tensor on cpu"):
        runtime.launch(axpy("reverse"), 1, 32, [torch.ones(3), c_int(3)])
