"""The lines of `gti bench --device cuda --suite full`: what the project holds itself to on a GPU of
the class of an H200. The bars are ratios of times of one run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

import gti_kernels as gti

from ..cuda_kernels import power_iteration as cuda
from .case import RESNET18_PARAMETERS, Call, Case, Work
from .leapfrog import kick_drift
from .two_form import two_form

#: ViT-B/16 (86 M parameters, 50 matrices): patches, then query-key-value, projection and the two
#: layers of the perceptron of each block, then the classes.
VIT_B_WEIGHTS = (
    (768, 3, 16, 16),
    *[(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12,
    (1000, 768),
)
DECODER_LAYER = (*[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008))
#: A decoder of 6.7 billion parameters, 226 matrices: 13.5 GB in bf16.
DECODER_7B_WEIGHTS = ((32000, 4096), *DECODER_LAYER * 32, (32000, 4096))


def _spectral_norm(matrices: list[Tensor], starts: list[Tensor], steps: list[int]) -> list[Tensor]:
    """The loop of torch.nn.utils.parametrizations.spectral_norm, over all layers."""
    sigmas = []
    for w, v, count in zip(matrices, starts, steps):
        for _ in range(count):
            u = normalize(torch.mv(w, v), dim=0)
            v = normalize(torch.mv(w.t(), u), dim=0)
        sigmas.append(torch.vdot(u, torch.mv(w, v)))
    return sigmas


def _warm_list(device: str, shapes: tuple[tuple[int, ...], ...]) -> Work:
    """σ₁ to residual 1e-3 from the result before the weights moved by 1 %. The peer starts from the
    same vectors and makes the steps its method needs for that residual, at most 300; it is not
    asked to notice."""
    generator = torch.Generator(device).manual_seed(0)
    kwargs = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    weights = [torch.randn(s, **kwargs) for s in shapes]  # type: ignore[call-overload]
    start = gti.power_iteration(weights, tol=1e-3)
    for w in weights:
        w.add_(torch.randn(w.shape, **kwargs), alpha=0.01)  # type: ignore[call-overload]
    moved = gti.power_iteration(weights, start=start, tol=1e-3)
    if not bool(moved.converged.all()):
        raise RuntimeError(f"not converged: residual {float(moved.residual.max()):.1e}")
    options = {"start": start, "method": "power", "max_steps": 300}
    steps = gti.power_iteration(weights, tol=1e-3, **options).steps.tolist()  # type: ignore[arg-type]
    matrices = [w.flatten(1) for w in weights]
    starts = [v.flatten().to(torch.bfloat16) for v in start.v]
    bytes_read = [w.numel() * w.element_size() for w in weights]
    return Work(
        op=lambda: gti.power_iteration(weights, start=start, tol=1e-3),
        peers={"spectral_norm loop": lambda: _spectral_norm(matrices, starts, steps)},
        bytes_moved=sum(b * n for b, n in zip(bytes_read, moved.steps.tolist())),
        few=("spectral_norm loop",),
    )


def _passes(device: str, batch: int, m: int, n: int, steps: int, streaming: bool) -> Work:
    """A fixed number of passes over matrices of one shape."""
    generator = torch.Generator(device).manual_seed(0)
    w = torch.randn(batch, m, n, generator=generator, device=device, dtype=torch.bfloat16)

    def op(backend: str) -> gti.SingularTriples:
        return gti.power_iteration(w, max_steps=steps, tol=0, backend=backend)

    once = w.numel() * w.element_size()
    return Work(
        op=lambda: op("auto"),
        peers={} if streaming else {"streaming (triton)": lambda: op("triton")},
        bytes_moved=steps * once if streaming else 0,
    )


def _classes(device: str, batch: int, m: int, n: int, steps: int) -> Work:
    """The CUDA C++ kernel with W on chip beside the same kernel with W read anew in each pass."""
    generator = torch.Generator(device).manual_seed(0)
    w = torch.randn(batch, m, n, generator=generator, device=device, dtype=torch.bfloat16)

    def op(mode: int) -> object:
        return cuda.power_iteration([w], 1, "cg", steps, 0.0, None, 0, mode)

    return Work(lambda: op(cuda.ON_CHIP), {"streaming (cuda)": lambda: op(cuda.STAGED)}, 0)


def _graph(call: Call) -> Call:
    """The replay of a call from a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _captured(device: str) -> Work:
    """kick_drift_ replayed from a CUDA graph."""
    work = kick_drift(device, RESNET18_PARAMETERS)
    peers = {"_foreach": work.peers["_foreach"]}
    return Work(_graph(work.op), peers, work.bytes_moved, work.floor)


def _parameters(device: str, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Parameters with their gradients."""
    parameters = [torch.zeros(s, device=device, requires_grad=True) for s in shapes]
    for t in parameters:
        t.grad = torch.zeros_like(t).normal_()
    return parameters


def _fused_sgd(device: str, shapes: Sequence[tuple[int, ...]]) -> Call:
    """A step of torch's fused SGD with momentum: it too reads three and writes two numbers a
    parameter."""
    return torch.optim.SGD(_parameters(device, shapes), lr=1e-3, momentum=0.9, fused=True).step


def _large_step(device: str) -> Work:
    """kick_drift_ over four layers of the decoder, beside torch's fused SGD."""
    shapes = DECODER_LAYER * 4
    work = kick_drift(device, shapes)
    peers = {"_foreach": work.peers["_foreach"], "SGD(fused=True)": _fused_sgd(device, shapes)}
    return Work(work.op, peers, work.bytes_moved, work.floor, few=("_foreach",))


def _plan(device: str, shapes: Sequence[tuple[int, ...]], captured: bool = False) -> Work:
    """PhaseSpace.kick_drift_, which moves the bytes of kick_drift_, beside torch's fused SGD; from
    a CUDA graph, as `_foreach` then is, beside a copy of these bytes."""
    work = kick_drift(device, shapes)
    space = gti.PhaseSpace(_parameters(device, shapes))

    def op() -> Tensor:
        return space.kick_drift_(1e-3, 1e-3, damp=0.999)

    foreach, copy = work.peers["_foreach"], work.peers["copy of the same bytes"]
    if captured:
        peers = {"_foreach": _graph(foreach), "copy of the same bytes": copy}
        return Work(_graph(op), peers, work.bytes_moved, work.floor)
    peers = {"_foreach": foreach, "SGD(fused=True)": _fused_sgd(device, shapes)}
    return Work(op, peers, work.bytes_moved, work.floor)


def _exact_plan(device: str, shapes: Sequence[tuple[int, ...]]) -> Work:
    """PhaseSpace.kick_drift_ with exact=True, beside the plain step. It reads and writes q or its
    gradient in 4 bytes, and either of two integers in 8."""

    def step(exact: bool) -> Call:
        space = gti.PhaseSpace(_parameters(device, shapes), exact=exact)
        return lambda: space.kick_drift_(1e-9, 1e-9)

    elements = sum(torch.Size(s).numel() for s in shapes)
    return Work(step(True), {"plain step": step(False)}, 40 * elements, "copy")


def _roof(device: str, m: int, n: int) -> Work:
    """two_form beside an fp64 matrix product of as many operations: 2 products for each of
    m(m − 1)/2 entries, [r, r]·[r, r] with r³ = m(m − 1)·n."""
    work = two_form(device, m, n)
    r = round((m * (m - 1) * n) ** (1 / 3))
    a = torch.randn(r, r, device=device, dtype=torch.float64)
    return Work(work.op, {"fp64 matmul, same operations": lambda: a @ a}, work.bytes_moved)


def _gram(device: str, m: int, n: int) -> Work:
    """gram with weights beside the product in fp32."""
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(m, n, generator=generator, device=device)
    w = torch.rand(n, generator=generator, device=device)
    return Work(
        op=lambda: gti.gram(a, weight=w),
        peers={"naive fp32": lambda: (a * w) @ a.T},
        bytes_moved=(a.numel() + n) * 4,
    )


def full_cases() -> list[Case]:
    """The lines, in order."""
    out = []
    for shapes, name in (
        (VIT_B_WEIGHTS, "50 matrices of ViT-B"),
        (DECODER_7B_WEIGHTS, "226 matrices, 7B decoder"),
    ):
        out.append(
            Case(
                "power_iteration",
                "warm start, residual 1e-3",
                name,
                "bfloat16",
                lambda device, shapes=shapes: _warm_list(device, shapes),  # type: ignore[misc]
                {"spectral_norm loop": 10.0},
            )
        )
    for batch, m, n in ((1024, 128, 128), (64, 768, 768)):  # of a block, of a cluster
        out.append(
            Case(
                "power_iteration",
                "20 passes on chip",
                f"[{batch}, {m}, {n}]",
                "bfloat16",
                lambda device, b=batch, m=m, n=n: _passes(device, b, m, n, 20, False),  # type: ignore[misc]
                {"streaming (triton)": 3.0},
            )
        )
    for batch, m, n in ((64, 128, 128), (8, 768, 768), (1, 3072, 768)):  # block, cluster, grid
        out.append(
            Case(
                "power_iteration",
                "20 passes, on chip beside streaming",
                f"[{batch}, {m}, {n}]",
                "bfloat16",
                lambda device, b=batch, m=m, n=n: _classes(device, b, m, n, 20),  # type: ignore[misc]
                {"streaming (cuda)": 3.0},
            )
        )
    out.append(
        Case(
            "power_iteration",
            "10 passes, streaming",
            "[32768, 32768]",
            "bfloat16",
            lambda device: _passes(device, 1, 32768, 32768, 10, True),
            least_share=0.85,
        )
    )
    out.append(
        Case(
            "kick_drift_",
            "with kinetic energy",
            "4 layers of a decoder, 0.8 G",
            "float32",
            _large_step,
            {"_foreach": 1.5, "SGD(fused=True)": 1.0},
            least_share=0.88,
        )
    )
    out.append(
        Case(
            "kick_drift_",
            "PhaseSpace.kick_drift_",
            "4 layers of a decoder, 0.8 G",
            "float32",
            lambda device: _plan(device, DECODER_LAYER * 4),
            {"_foreach": 1.5, "SGD(fused=True)": 1.0},
            least_share=0.88,
        )
    )
    out.append(
        Case(
            "kick_drift_",
            "PhaseSpace.kick_drift_",
            "62 tensors of ResNet-18",
            "float32",
            lambda device: _plan(device, RESNET18_PARAMETERS),
            {"_foreach": 1.5, "SGD(fused=True)": 1.0},
        )
    )
    out.append(
        Case(
            "kick_drift_",
            "PhaseSpace, captured in a CUDA graph",
            "62 tensors of ResNet-18",
            "float32",
            lambda device: _plan(device, RESNET18_PARAMETERS, captured=True),
            {"_foreach": 1.5, "copy of the same bytes": 0.88},
        )
    )
    out.append(
        Case(
            "kick_drift_",
            "PhaseSpace, exact=True",
            "4 layers of a decoder, 0.8 G",
            "float32",
            lambda device: _exact_plan(device, DECODER_LAYER * 4),
            {"plain step": 1 / 2.5},
        )
    )
    out.append(
        Case(
            "kick_drift_",
            "captured in a CUDA graph",
            "62 tensors of ResNet-18",
            "float32",
            _captured,
            {"_foreach": 1.5},
        )
    )
    for m, n in ((4, 10**8), (8, 10**8), (16, 4 * 10**7)):
        out.append(
            Case(
                "two_form",
                "fp64 accumulation",
                f"m = {m}, N = {n // 10**6} M",
                "float32",
                lambda device, m=m, n=n: two_form(device, m, n),  # type: ignore[misc]
                {"naive fp32": 3.0} if m == 8 else {},
                least_share=0.85,
            )
        )
    out.append(
        Case(
            "two_form",
            "fp64 accumulation",
            "m = 64, N = 10 M",
            "float32",
            lambda device: _roof(device, 64, 10**7),
            {"fp64 matmul, same operations": 2 / 3},
        )
    )
    out.append(
        Case(
            "gram",
            "weighted, fp64 accumulation",
            "m = 8, N = 100 M",
            "float32",
            lambda device: _gram(device, 8, 10**8),
            least_share=0.85,
        )
    )
    return out
