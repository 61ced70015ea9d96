"""Loading a kernel onto a device and launching it on torch's current stream, through cuda.core.

A launch neither allocates nor waits. After one call with the same kernels, calls can be captured in
a CUDA graph: then nothing is compiled or loaded either.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..extras import require
from . import compiler
from .compiler import Defines, Resources, cuda_core

Dimensions = int | tuple[int, ...]

PORTABLE_CLUSTER = 8  # blocks of a cluster that every device with clusters can run

_thread = threading.local()


class Kernel:
    """A kernel on a device; made by `kernel`, run by `launch`."""

    def __init__(self, handle: Any, name: str, device: torch.device, resources: Resources) -> None:
        self.handle, self.name, self.device, self.resources = handle, name, device, resources
        self._shared_bytes = 0  # dynamic shared memory the driver was asked to allow
        self._wide_cluster = False

    def allow(self, shared_bytes: int, cluster: Dimensions | None = None) -> None:
        """Opts in to dynamic shared memory (over 48 KiB) and to clusters of more than 8 blocks."""
        attributes = _driver().CUfunction_attribute
        if shared_bytes > self._shared_bytes:
            properties = torch.cuda.get_device_properties(self.device)
            allowed: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
            most = allowed - self.resources.shared
            if shared_bytes > most:
                raise ValueError(
                    f"{self.name}: shared_bytes must be at most {most} on {properties.name}, got "
                    f"{shared_bytes}"
                )
            self._set(attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
            self._shared_bytes = shared_bytes
        wide = cluster is not None and math.prod(three(cluster)) > PORTABLE_CLUSTER
        if wide and not self._wide_cluster:
            self._set(attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
            self._wide_cluster = True

    def blocks_per_multiprocessor(self, block: Dimensions, shared_bytes: int = 0) -> int:
        """How many blocks a multiprocessor holds at once: times the number of multiprocessors, the
        largest grid of a cooperative launch."""
        with _current(self.device.index):
            self.allow(shared_bytes)
            return int(
                self.handle.occupancy.max_active_blocks_per_multiprocessor(
                    math.prod(three(block)), shared_bytes
                )
            )

    def largest_cluster(self, block: Dimensions, shared_bytes: int = 0) -> int:
        """How many blocks a cluster may have on this device: 16 where it allows more than 8."""
        most = 2 * PORTABLE_CLUSTER
        with _current(self.device.index):
            self.allow(shared_bytes, most)
            config = cuda_core().LaunchConfig(**options(most, block, shared_bytes))
            stream = _stream(self.device.index, 0)
            return int(self.handle.occupancy.max_potential_cluster_size(config, stream=stream))

    def clusters_at_once(self, size: int, block: Dimensions, shared_bytes: int = 0) -> int:
        """How many clusters of so many blocks the device holds at once: times their size, the
        largest grid of a cooperative launch with clusters."""
        with _current(self.device.index):
            self.allow(shared_bytes, size)
            config = cuda_core().LaunchConfig(**options(size, block, shared_bytes, size))
            stream = _stream(self.device.index, 0)
            return int(self.handle.occupancy.max_active_clusters(config, stream=stream))

    def _set(self, attribute: Any, value: int) -> None:
        driver = _driver()
        handle = getattr(self.handle, "handle", None) or self.handle._handle
        device = driver.CUdevice(self.device.index)
        (status,) = driver.cuKernelSetAttribute(attribute, value, handle, device)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{self.name}: {attribute.name} = {value}: {status.name}")


@functools.cache
def kernel(stem: str, entry: str, defines: Defines, device: torch.device) -> Kernel:
    """The kernel `entry` of `csrc/cuda/<stem>.cu` on a device, compiled at its first use there.

    entry: its extern "C" name. defines: names and values of macros (dtype, tile), a tuple of pairs.
    device: with an index, as the device of a tensor has. A later call is a dict lookup.
    """
    core = cuda_core()
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{stem}: the kernel {entry} is not loaded yet, and nothing can be loaded inside a "
            "CUDA graph capture: make the same call once before it"
        )
    arch = compiler.architecture(torch.cuda.get_device_capability(device))
    cubin = compiler.cubin(stem, entry, defines, arch)
    with _current(device.index):
        handle = core.ObjectCode.from_cubin(cubin.code, name=stem).get_kernel(entry)
    return Kernel(handle, entry, device, cubin.resources)


def launch(
    kernel: Kernel,
    grid: Dimensions,
    block: Dimensions,
    args: Sequence[Any],
    *,
    shared_bytes: int = 0,
    cluster: Dimensions | None = None,
    cooperative: bool = False,
) -> None:
    """Launches on torch's current stream of the kernel's device.

    grid: blocks; block: threads; cluster: blocks of a cluster, which divide the grid.
    args: one for each parameter: a tensor for a pointer (None for a null pointer), an int for a
    64-bit integer, a float for a double, a bool; a ctypes or numpy scalar for every other type.
    shared_bytes: dynamic shared memory of a block. cooperative: all blocks run at once, and the
    kernel may wait for all of them; see `Kernel.blocks_per_multiprocessor`.
    """
    values = arguments(kernel, args)
    index = kernel.device.index
    with _current(index):
        kernel.allow(shared_bytes, cluster)
        config = cuda_core().LaunchConfig(
            **options(grid, block, shared_bytes, cluster, cooperative)
        )
        stream = _stream(index, torch.cuda.current_stream(index).cuda_stream)
        cuda_core().launch(stream, config, kernel.handle, *values)


def three(x: Dimensions) -> tuple[int, int, int]:
    """x, y, z of a grid, a block or a cluster."""
    given = (x,) if isinstance(x, int) else tuple(x)
    if not 1 <= len(given) <= 3 or min(given) < 1:
        raise ValueError(f"expected one to three positive integers, got {x!r}")
    a, b, c = (*given, 1, 1)[:3]
    return a, b, c


def arguments(kernel: Kernel, args: Sequence[Any]) -> list[Any]:
    """Tensors and None as addresses; the rest as it is."""
    values = []
    for i, x in enumerate(args):
        if isinstance(x, Tensor):
            if x.device != kernel.device:
                raise ValueError(
                    f"{kernel.name}: argument {i} must be on {kernel.device}, got a tensor on "
                    f"{x.device}"
                )
            x = x.data_ptr()
        values.append(0 if x is None else x)
    return values


def options(
    grid: Dimensions,
    block: Dimensions,
    shared_bytes: int = 0,
    cluster: Dimensions | None = None,
    cooperative: bool = False,
) -> dict[str, Any]:
    """Arguments of cuda.core's LaunchConfig, which counts a grid with clusters in clusters."""
    found: dict[str, Any] = {"grid": three(grid), "block": three(block)}
    found["shmem_size"] = shared_bytes
    if cluster is not None:
        blocks, size = three(grid), three(cluster)
        if any(b % s for b, s in zip(blocks, size)):
            raise ValueError(f"a grid of {blocks} blocks is not made of clusters of {size}")
        found["grid"] = tuple(b // s for b, s in zip(blocks, size))
        found["cluster"] = size
    if cooperative:
        # cuda.core 1.0 renamed it.
        renamed = hasattr(cuda_core().LaunchConfig, "is_cooperative")
        found["is_cooperative" if renamed else "cooperative_launch"] = True
    return found


@functools.cache
def _stream(index: int, handle: int) -> Any:
    """cuda.core's view of a stream of torch; torch keeps its streams for good."""
    return cuda_core().Stream.from_handle(handle)


class _current:
    """`with _current(index)`: the device is current, for torch and for the driver.

    The driver takes the context of the thread; torch sets one only when it first needs it, which in
    a new thread may be later than here.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.guard = torch.cuda.device(index)

    def __enter__(self) -> None:
        self.guard.__enter__()
        ready = _thread.__dict__.setdefault("ready", set())
        if self.index not in ready:
            cuda_core().Device(self.index).set_current()
            ready.add(self.index)

    def __exit__(self, *error: Any) -> None:
        self.guard.__exit__(*error)


@functools.cache
def _driver() -> ModuleType:
    return require("cuda.bindings.driver", compiler.PURPOSE, "cuda")


def why_not() -> str | None:
    """Why CUDA C++ kernels cannot run on this machine, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        cuda_core()
        compiler.compiler_version()
    except ImportError as error:
        return str(error)
    return None
