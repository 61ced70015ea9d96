"""`python -m gti_kernels.cuda_kernels precompile | check`: all kernels, ahead of time, no GPU."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from . import compiler
from .compiler import Resources, Specialisation

Job = tuple[str, Specialisation, str]  #: stem, kernel, architecture
Compile = Callable[[str, Specialisation, str], Resources]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 where a kernel does not compile or, under check, spills or has a stack
    frame; 2 where nothing can be compiled."""
    parser = argparse.ArgumentParser(prog="python -m gti_kernels.cuda_kernels")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in (
        ("precompile", "compile every kernel with NVRTC into the cache"),
        ("check", "compile every kernel with NVRTC and nvcc; fail on spills or a stack frame"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument(
            "--arch", type=architectures, default="80,90a,100", help="default: 80,90a,100"
        )
        if name == "precompile":
            command.add_argument("--out", type=Path, help="a folder instead of the user's cache")
    args = parser.parse_args(argv)
    folder = None
    try:
        version = compiler.compiler_version()
        if args.command == "precompile":
            folder = args.out or compiler.cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # it can be written
            print(f"into {folder}")
    except (ImportError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    compilers: dict[str, Compile] = {f"NVRTC {version}": partial(_nvrtc, folder)}
    if args.command == "check" and shutil.which("nvcc"):
        compilers["nvcc"] = _nvcc
    elif args.command == "check":
        print("nvcc is not on the PATH: NVRTC only")
    failed = 0
    for stem, kernels in compiler.sources().items():
        if not kernels:
            print(f"{stem}.cu: no launcher yet, nothing to compile")
        jobs = [(stem, k, a) for a in args.arch for k in kernels if _number(a) >= k.minimum]
        for name, compile_one in compilers.items():
            for line, good in _lines(name, compile_one, jobs, args.command == "check"):
                print(line, flush=True)
                failed += not good
    print(f"{failed} failed" if failed else "all good")
    return 1 if failed else 0


def architectures(text: str) -> list[str]:
    """ "80,90a" as a list. Only what a device looks up at run time."""
    found = text.split(",")
    for arch in found:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise argparse.ArgumentTypeError(f"expected numbers such as 80,90a,100, got {text!r}")
        wanted = compiler.architecture(divmod(_number(arch), 10))
        if arch != wanted:
            raise argparse.ArgumentTypeError(f"expected {wanted} instead of {arch}")
    return found


def _number(arch: str) -> int:
    return int(arch.rstrip("af"))


def _lines(name: str, compile_one: Compile, jobs: list[Job], strict: bool) -> Iterator[tuple]:
    """A line for each job, in order, and whether it is good."""

    def one(job: Job) -> tuple[str, bool]:
        stem, kernel, arch = job
        head = f"{stem}.cu  {kernel}  sm_{arch}  {name}: "
        try:
            used = compile_one(*job)
        except RuntimeError as error:
            return f"{head}FAILED\n{error}", False
        good = not strict or used.spills == used.stack == 0
        return f"{head}{used}{'' if good else '  FAILED'}", good

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(one, jobs)


def _nvrtc(folder: Path | None, stem: str, kernel: Specialisation, arch: str) -> Resources:
    """Into a folder of the cache, or compiled anew and not kept."""
    job = (stem, kernel.entry, kernel.defines, arch)
    if folder is not None:
        return compiler.cubin(*job, folder=folder).resources
    return compiler.build(compiler.source(stem), *job).resources


def _nvcc(stem: str, kernel: Specialisation, arch: str) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{stem}.cu"
        path.write_text(compiler.source(stem), encoding="utf-8")
        command = ["nvcc", "-cubin", f"-std={compiler.STANDARD}"]
        # -arch=sm_90a would compile for plain sm_90 too.
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        command += [f"-Xptxas=-v,--entry={kernel.entry}"]
        command += [f"-D{name}={value}" for name, value in kernel.defines]
        command += ["-o", str(path.with_suffix(".cubin")), str(path)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stdout + run.stderr)
    return compiler.resources(run.stdout + run.stderr)


if __name__ == "__main__":
    sys.exit(main())
