"""Which backend runs a call, and why: `available`, `choose`, `explain`, `build_info`.

Nothing here depends on an environment variable, and nothing is replaced after import.
TRITON_INTERPRET is Triton's own: with it, Triton kernels run on CPU tensors too, when they are
asked for by name.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import platform
import sys
import warnings
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from .rows import BUILT, BY_NAME

NAMES = ("auto", "reference", "cpu", "triton", "cuda")


def _load_compiled() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and the reason. torch is imported first: its OpenMP serves
    both."""
    try:
        module = importlib.import_module("gti_kernels._compiled")
    except ImportError as error:
        if importlib.util.find_spec("gti_kernels._compiled") is None:
            reason = "the compiled part was not built: install a C++20 compiler and reinstall"
        else:
            reason = f"the compiled part does not load: {error}"
        warnings.warn(
            f"gti_kernels runs without its CPU kernels ({reason}); `gti doctor` tells more.",
            stacklevel=2,
        )
        return None, reason
    module.set_tensor_types((torch.Tensor, torch.nn.Parameter))
    return module, ""


compiled, _compiled_missing = _load_compiled()


@functools.cache
def available() -> dict[str, str | None]:
    """Backend name → None where it can run on this machine, else the reason why not."""
    return {
        "reference": None,
        "cpu": None if compiled is not None else _compiled_missing,
        "triton": _why_no_triton(),
        "cuda": _why_no_cuda(),
    }


def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if _interpreting() or torch.cuda.is_available():
        return None
    return "torch sees no CUDA device"


def _why_no_cuda() -> str | None:
    if not any(backend == "cuda" for _, backend in BUILT):
        return "no CUDA C++ kernel has been written yet"
    from .cuda_kernels import runtime

    return runtime.why_not()


def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Explanation:
    """What backend="auto" would choose for a call, and why each other was passed over."""

    op: str
    backend: str
    passed_over: dict[str, str]
    note: str = ""  #: what the backend itself chooses for this call

    def __str__(self) -> str:
        lines = [f"{self.op}: backend='auto' runs {self.backend!r}"]
        lines += [f"  {self.note}"] if self.note else []
        lines += [f"  not {name!r}: {reason}" for name, reason in self.passed_over.items()]
        return "\n".join(lines)


def obstacle(op: str, backend: str, device: torch.device, limits: dict[str, str]) -> str | None:
    """Why `backend` cannot run `op` on tensors of `device`, or None. limits: backend → reason."""
    if (BY_NAME[op].stem, backend) not in BUILT:
        return f"this op has no {backend} kernel yet"
    missing = available()[backend]
    if missing is not None:
        return missing
    if backend == "cpu" and device.type != "cpu":
        return f"the tensors are on {device}"
    if backend == "cuda" and device.type != "cuda":
        return f"the tensors are on {device}"
    if backend == "triton" and device.type != "cuda" and not _interpreting():
        return f"the tensors are on {device}"
    return limits.get(backend)


def check_name(op: str, backend: str) -> None:
    if backend not in NAMES:
        raise ValueError(f"{op}: backend must be one of {', '.join(NAMES)}; got {backend!r}")


def choose(op: str, device: torch.device, backend: str, limits: dict[str, str]) -> str:
    """The backend that runs this call. Raises where a named one cannot, and says why."""
    if backend == "auto":
        return preference(op, device, limits).backend
    check_name(op, backend)
    reason = obstacle(op, backend, device, limits)
    if reason is not None:
        raise RuntimeError(
            f"{op}: backend={backend!r} cannot run this call: {reason}. backend='auto' runs "
            f"{preference(op, device, limits).backend!r} here"
        )
    return backend


def preference(op: str, device: torch.device, limits: dict[str, str]) -> Explanation:
    """The first backend of the op's row that can run the call, and the reasons of those before
    it."""
    passed_over: dict[str, str] = {}
    chosen = ""
    for name in BY_NAME[op].backends:
        reason = obstacle(op, name, device, limits)
        if reason is None and name == "triton" and device.type == "cpu":
            reason = "its interpreter is slow: only when asked for by name"
        if reason is None and not chosen:
            chosen = name
        else:
            passed_over[name] = reason or f"{chosen!r} comes first"
    return Explanation(op, chosen, passed_over)


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """What backend="auto" would run for `op(*args, **kwargs)`, and why each other was passed over.

    >>> import torch, gti_kernels as gti
    >>> print(gti.explain("two_form", torch.ones(2, 8), torch.ones(2, 8)).backend)
    cpu
    """
    if op not in BY_NAME:
        raise ValueError(f"explain: op must be one of {', '.join(BY_NAME)}; got {op!r}")
    ops = importlib.import_module(f"gti_kernels.ops.{BY_NAME[op].stem}")
    device, limits = getattr(ops, f"limits_of_{op.rstrip('_')}")(*args, **kwargs)
    explanation = preference(op, device, limits)
    note = getattr(ops, "note", None)
    if note is None:
        return explanation
    return replace(explanation, note=note(explanation.backend, *args, **kwargs))


def build_info() -> dict[str, str]:
    """Versions and how the compiled part was built, for reports."""
    from . import __version__

    info = {
        "gti_kernels": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "compiled": "missing" if compiled is None else str(compiled.compiler),
        "openmp": "no" if compiled is None or not compiled.openmp else "yes",
    }
    for name in ("numpy", "scipy", "triton"):
        try:
            info[name] = importlib.import_module(name).__version__
        except ImportError:
            info[name] = "missing"
    from .cuda_kernels import compiler

    try:
        info["nvrtc"] = compiler.compiler_version()
    except ImportError:
        info["nvrtc"] = "missing"
    if torch.cuda.is_available():
        info["cuda device"] = torch.cuda.get_device_name()
    return info
