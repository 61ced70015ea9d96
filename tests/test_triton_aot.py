"""The Triton kernels, compiled ahead of time without a GPU: they fit, and they say what was meant.

Each op's `samples()` lists its kernels with typical constants. The interpreter cannot see what is
checked here: registers, contraction to fma, the width of loads, the precision of arguments.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest

triton = pytest.importorskip("triton")

OPS = ["ragged", "leapfrog", "phase_space", "kinetic_energy", "power_iteration_pass"]
OPS += ["power_iteration_step", "inner_products", "two_form", "gram"]
ARCHITECTURES = [80, 90, 100]


class Compiled(NamedTuple):
    kernel: str
    constants: dict[str, str]
    warps: int
    architecture: int
    ptx: str
    cubin_bytes: int
    resources: str  # of cuobjdump: REG:… STACK:… SHARED:… LOCAL:…

    def __str__(self) -> str:
        return f"{self.kernel} {self.constants} for sm_{self.architecture}: {self.resources}"


def compile_sample(op: str, index: int, architecture: int) -> Compiled:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    samples = importlib.import_module(f"gti_kernels.triton_kernels.{op}").samples()
    kernel, signature, constants, options = samples[index]
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    binary = triton.compile(
        ASTSource(kernel, types, constants), GPUTarget("cuda", architecture, 32), dict(options)
    )
    cubin = binary.asm["cubin"]
    constants = {name: str(value) for name, value in constants.items()}
    return Compiled(
        kernel.__name__,
        constants,
        options["num_warps"],
        architecture,
        binary.asm["ptx"],
        len(cubin),
        resources(cubin),
    )


def resources(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True
        )
    found = re.search(r"REG:\d+ STACK:\d+ SHARED:\d+ LOCAL:\d+", done.stdout)
    return found.group() if found else ""


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    """Every sample for every architecture; bf16, which is fp32 but for its loads, for one."""
    tasks: list[tuple[Any, ...]] = []
    for op in OPS:
        samples = importlib.import_module(f"gti_kernels.triton_kernels.{op}").samples()
        for i, (_, _, constants, _) in enumerate(samples):
            once = "bf16" in map(str, constants.values())
            tasks += [(op, i, a) for a in ([90] if once else ARCHITECTURES)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_sample, *zip(*tasks, strict=True), chunksize=3))


def test_every_kernel_has_a_sample() -> None:
    for op in OPS:
        module = importlib.import_module(f"gti_kernels.triton_kernels.{op}")
        defined = {
            name
            for name, value in vars(module).items()
            if name.endswith("_kernel") and value.fn.__module__ == module.__name__
        }
        assert defined == {kernel.__name__ for kernel, *_ in module.samples()}


def test_compiles_without_spills(compiled: list[Compiled]) -> None:
    """STACK counts spilled registers. Before 3.9, Triton has no fp64 tl.dot proper for sm_100."""
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
    for c in compiled:
        assert c.cubin_bytes > 0, str(c)
        if c.resources and not (old and c.constants.get("DOT") == "True" and c.architecture == 100):
            assert " STACK:0 " in c.resources and c.resources.endswith("LOCAL:0"), str(c)


def test_inner_products_keep_their_precision(compiled: list[Compiled]) -> None:
    for c in compiled:
        if c.kernel not in ("tile_kernel", "reduce_kernel", "finish_kernel", "gram_kernel"):
            continue
        if "LIMIT" in c.constants or "EPS" in c.constants:
            continue  # another op's kernel of that name
        assert "tf32" not in c.ptx and "f32.f32.f32" not in c.ptx, str(c)
        if c.constants["EXACT"] == "True":
            # One fma per product, for its error; a contracted sum would add to them.
            products = 0
            if c.kernel == "tile_kernel":
                rows, lanes = int(c.constants["T"]), int(c.constants["BLOCK"])
                forms = 3 if c.constants["METRIC"] == "True" else 1
                entries = rows**2 * forms
                if c.constants["WEIGHT"] != "None":  # one more, and one for w times each row
                    entries = 2 * entries + rows
                elif c.constants["SYMMETRIC"] == c.constants["ONE_TILE"] == "True":
                    entries = rows * (rows + 1) // 2  # the compiler sees a_i a_j twice
                products = entries * lanes // (32 * c.warps)
            assert len(re.findall(r"fma\.rn\.f64", c.ptx)) == products, str(c)


def test_scalars_arrive_in_fp64(compiled: list[Compiled]) -> None:
    for c in compiled:
        if c.kernel == "leapfrog_kernel":
            parameters = c.ptx[: c.ptx.index("{")]
            assert len(re.findall(r"\.param \.f64", parameters)) == 3, str(c)


def test_the_grid_is_not_contracted(compiled: list[Compiled]) -> None:
    """A product that the next sum swallows would differ from the other backends in its last bit."""
    seen = {c.kernel for c in compiled if c.kernel in ("grid_kernel", "phase_kernel")}
    assert seen == {"grid_kernel", "phase_kernel"}
    for c in compiled:
        if c.kernel in seen:
            assert not re.search(r"\bfma\.", c.ptx), str(c)
            # ptxas contracts what is not marked as rounded.
            assert not re.search(r"\b(mul|add|sub)\.f(32|64)\b", c.ptx), str(c)


def test_aligned_blocks_are_read_in_16_byte_pieces(compiled: list[Compiled]) -> None:
    wide = r"(ld|st)\.global\S*(\.v4\.b32|\.v2\.b64)"
    for c in compiled:
        if "ALIGNED" in c.constants:
            assert bool(re.search(wide, c.ptx)) == (c.constants["ALIGNED"] == "True"), str(c)
        if c.kernel == "pass_kernel" and (
            c.constants["K"] == "1" or c.constants["FIRST"] == "False"
        ):
            assert re.search(wide, c.ptx), str(c)
