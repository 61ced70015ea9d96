"""One frozen row per registered op: data only. Tests, benchmarks and the README table read it."""

from __future__ import annotations

from dataclasses import dataclass

DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Row:
    """An op and where it runs."""

    name: (
        str  #: public function, gti_kernels.<name>, and registered op, torch.ops.gti_kernels.<name>
    )
    stem: str  #: file name of the op in every folder
    backends: tuple[str, ...]  #: in the order of preference of backend="auto"
    dtypes: tuple[str, ...]  #: of its inputs
    mutates: tuple[str, ...]  #: arguments written in place
    differentiable: str  #: "no" (refuses inputs that require grad) or how
    bytes_moved: str  #: the least traffic of one call, for the benchmark's floor


ROWS = (
    Row(
        name="power_iteration",
        stem="power_iteration",
        backends=("cuda", "triton", "cpu", "reference"),
        dtypes=DTYPES,
        mutates=(),
        differentiable="through top_singular_values, of any order",
        bytes_moved="steps · Σ m·n·itemsize",
    ),
    Row(
        name="kick_",
        stem="leapfrog",
        backends=("cuda", "triton", "cpu", "reference"),
        dtypes=DTYPES,
        mutates=("p",),
        differentiable="no",
        bytes_moved="3 · N · itemsize",
    ),
    Row(
        name="drift_",
        stem="leapfrog",
        backends=("cuda", "triton", "cpu", "reference"),
        dtypes=DTYPES,
        mutates=("q",),
        differentiable="no",
        bytes_moved="3 · N · itemsize",
    ),
    Row(
        name="kick_drift_",
        stem="leapfrog",
        backends=("cuda", "triton", "cpu", "reference"),
        dtypes=DTYPES,
        mutates=("q", "p"),
        differentiable="no",
        bytes_moved="5 · N · itemsize",
    ),
    Row(
        name="kinetic_energy",
        stem="kinetic_energy",
        backends=("cuda", "triton", "cpu", "reference"),
        dtypes=DTYPES,
        mutates=(),
        differentiable="no",
        bytes_moved="N · itemsize",
    ),
    Row(
        name="two_form",
        stem="two_form",
        backends=("cuda", "triton", "cpu", "reference"),
        dtypes=DTYPES,
        mutates=(),
        differentiable="no",
        bytes_moved="2 · m · N · itemsize",
    ),
    Row(
        name="gram",
        stem="gram",
        backends=("cuda", "triton", "cpu", "reference"),
        dtypes=DTYPES,
        mutates=(),
        differentiable="no",
        bytes_moved="(m + l) · N · itemsize",
    ),
)

BY_NAME = {row.name: row for row in ROWS}

#: (stem, backend) pairs that exist. Where a backend is missing here, its folder has no file of the
#: stem yet and `explain` says so; a test holds this table against the folders.
BUILT = frozenset(
    (stem, backend)
    for stem in ("power_iteration", "leapfrog", "kinetic_energy", "two_form", "gram")
    for backend in ("cuda", "triton", "cpu", "reference")
)


def table() -> str:
    """The README's table op × backend × dtype, in Markdown."""
    backends = ("reference", "cpu", "triton", "cuda")
    short = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    lines = [
        "| op | " + " | ".join(backends) + " | derivative |",
        "|---|" + "---|" * (len(backends) + 1),
    ]
    for row in ROWS:
        dtypes = " ".join(short[d] for d in row.dtypes)
        cells = [dtypes if (row.stem, b) in BUILT else "—" for b in backends]
        lines.append(f"| `{row.name}` | " + " | ".join(cells) + f" | {row.differentiable} |")
    return "\n".join(lines)
