"""From `csrc/cuda/<stem>.cu` to a cubin: NVRTC, with a cache on disk. No GPU is needed.

A source includes nothing but headers beside it, is specialised by macros and handed to the compiler
as one text. One compilation makes
one kernel: ptxas is told the entry, the others of the source cost it nothing. A cubin is a function
of the source text, the options, the entry, the architecture and the version of NVRTC; it is kept
under the hash of all of these, so no entry of the cache is ever out of date.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import json
import os
import re
import tempfile
import threading
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from ..extras import require

Defines = tuple[tuple[str, str | int], ...]  #: names and values of macros

#: Where sources are: in an installed package, in a checkout.
FOLDERS = (
    Path(__file__).parents[1] / "csrc" / "cuda",
    Path(__file__).parents[2] / "csrc" / "cuda",
)
PURPOSE = "compiling and running CUDA C++ kernels"
STANDARD = "c++20"


@dataclass(frozen=True)
class Specialisation:
    """A kernel with its macros, as a launcher asks for it at run time. Each launcher lists its own
    in `SPECIALISATIONS: tuple[Specialisation, ...]`, to be compiled ahead of time."""

    entry: str  #: extern "C" name
    defines: Defines = ()
    minimum: int = 80  #: least architecture: 80, 90 (clusters), 100

    def __str__(self) -> str:
        return self.entry + "".join(f" {name}={value}" for name, value in self.defines)


@dataclass(frozen=True)
class Resources:
    """What ptxas gave a kernel. Spills and a stack frame are traffic to device memory."""

    registers: int  #: a thread
    shared: int  #: bytes a block, without the dynamic part
    spills: int  #: bytes a thread stores and loads because registers ran out
    stack: int  #: bytes a thread

    def __str__(self) -> str:
        return (
            f"{self.registers} registers, {self.shared} B shared memory, {self.spills} B spills, "
            f"{self.stack} B stack"
        )


@dataclass(frozen=True)
class Cubin:
    """Machine code of one kernel."""

    code: bytes
    resources: Resources


def source(stem: str) -> str:
    """The text of `csrc/cuda/<stem>.cu` with the headers it includes in their places."""
    return _with_headers(f"{stem}.cu", set())


def _with_headers(name: str, included: set[str]) -> str:
    """A file of `csrc/cuda` in which each `#include "x.cuh"` has become x.cuh, the first time."""
    for folder in FOLDERS:
        path = folder / name
        if path.is_file():
            break
    else:
        raise FileNotFoundError(
            f"no CUDA source {name} in {' or '.join(map(str, FOLDERS))}: reinstall gti_kernels"
        )

    def replace(match: re.Match[str]) -> str:
        header = match[1]
        if header in included:
            return ""
        included.add(header)
        return _with_headers(header, included)

    text = path.read_text(encoding="utf-8").replace("#pragma once\n", "")
    return re.sub(r'^#include "(\w+\.cuh)"$', replace, text, flags=re.MULTILINE)


def sources() -> dict[str, tuple[Specialisation, ...]]:
    """Stem of each source → what its launcher compiles; nothing where it has no launcher yet."""
    stems = {path.stem for folder in FOLDERS for path in folder.glob("*.cu")}
    return {stem: _specialisations(stem) for stem in sorted(stems)}


def _specialisations(stem: str) -> tuple[Specialisation, ...]:
    name = f"{__package__}.{stem}"
    try:
        launcher = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return ()
    return tuple(launcher.SPECIALISATIONS)


def architecture(capability: tuple[int, int]) -> str:
    """The target of a device: 8.0 → "80", 9.0 → "90a" (with all of Hopper's instructions)."""
    major, minor = capability
    return f"{major}{minor}" + "a" * (capability == (9, 0))


_importing = threading.Lock()


@functools.cache
def cuda_core() -> ModuleType:
    """cuda.core. While it is imported it puts another module in its place, so one thread at a
    time. ImportError where it is missing or, before 0.5, keeps all in cuda.core.experimental."""
    with _importing:
        core = require("cuda.core", PURPOSE, "cuda")
    if not hasattr(core, "Program"):
        raise ImportError(
            f'{PURPOSE} needs cuda-core >= 0.5.1, got an older one; pip install "gti_kernels[cuda]"'
        )
    return core


@functools.cache
def compiler_version() -> str:
    """Version of the NVRTC that cuda.bindings loads. ImportError where it is missing."""
    nvrtc = require("cuda.bindings.nvrtc", PURPOSE, "cuda")
    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:  # the library itself is not there
        raise ImportError(
            f'{PURPOSE} needs the library NVRTC: pip install "gti_kernels[cuda]" ({error})'
        ) from error
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise ImportError(f"{PURPOSE}: NVRTC answers {status}")
    return f"{major}.{minor}"


def build(text: str, stem: str, entry: str, defines: Defines, arch: str) -> Cubin:
    """Compiles a source text for one entry and architecture, without a look at the cache."""
    core = cuda_core()
    compiler_version()
    options = core.ProgramOptions(
        name=f"{stem}.cu",
        arch=f"sm_{arch}",
        std=STANDARD,
        define_macro=[(name, str(value)) for name, value in defines] or None,
        ptxas_options=["-v", f"--entry={entry}"],
    )
    log = io.StringIO()
    try:
        code = core.Program(text, "c++", options).compile("cubin", logs=log).code
    except Exception as error:
        what, why = Specialisation(entry, defines), str(error).rstrip("\0\n ")
        raise RuntimeError(f"{stem}.cu does not compile: {what} for sm_{arch}: {why}") from error
    return Cubin(bytes(code), resources(log.getvalue()))


def resources(log: str) -> Resources:
    """Reads the report of `ptxas -v` on one entry (and the functions it calls)."""

    def numbers(pattern: str) -> list[int]:
        return [int(x) for x in re.findall(pattern, log)]

    registers = numbers(r"Used (\d+) registers")
    if not registers:
        raise RuntimeError(f"ptxas gives no report of resources:\n{log}")
    return Resources(
        max(registers),
        max(numbers(r"(\d+) bytes smem"), default=0),
        sum(numbers(r"(\d+) bytes spill (?:stores|loads)")),
        max(numbers(r"(\d+) bytes (?:stack frame|cumulative stack size)"), default=0),
    )


# ---- the cache ----------------------------------------------------------------------------------


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/gti_kernels/cuda, or the same under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "gti_kernels" / "cuda"


def key(text: str, entry: str, defines: Defines, arch: str) -> str:
    """The name of a cubin: the hash of everything it depends on."""
    macros = [(name, str(value)) for name, value in defines]
    parts = [text, STANDARD, macros, entry, arch, compiler_version()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def cubin(stem: str, entry: str, defines: Defines, arch: str, folder: Path | None = None) -> Cubin:
    """The kernel `entry` of `csrc/cuda/<stem>.cu`, from the cache or compiled and put there.

    folder: of the cache, by default `cache_folder()`. Where it cannot be written, the cubin is
    compiled in each process anew, with one warning.
    """
    text = source(stem)
    name = f"{stem}-{entry}-sm_{arch}-{key(text, entry, defines, arch)}.cubin"
    path, found = None, None
    try:
        path = (folder or cache_folder()) / name
        found = _read(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        _warn_once(str(error))
        path = None
    if found is not None:
        return found
    made = build(text, stem, entry, defines, arch)
    if path is not None:
        try:
            _write(path, made)
        except OSError as error:
            _warn_once(str(error))
    return made


def _read(path: Path) -> Cubin | None:
    """A kept cubin, or None where there is none or its checksum does not fit."""
    try:
        checksum, _, body = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        return None
    report, _, code = body.partition(b"\n")
    return Cubin(code, Resources(**json.loads(report)))


def _write(path: Path, made: Cubin) -> None:
    """Writes checksum, resources and code under another name and renames: a reader sees all or
    nothing, and of processes that race the last wins with the same bytes."""
    body = json.dumps(asdict(made.resources)).encode() + b"\n" + made.code
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o644)  # a folder may serve several users
            file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


_warned: list[str] = []


def _warn_once(reason: str) -> None:
    if _warned:
        return
    _warned.append(reason)
    warnings.warn(
        f"CUDA kernels are compiled anew in each process, because their cache cannot be used "
        f"({reason}). Set XDG_CACHE_HOME to a folder that can be written.",
        RuntimeWarning,
        stacklevel=4,
    )
