"""Builds the compiled CPU kernels. Without a C++ compiler the package installs without them."""

import glob
import sys

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

ParallelCompile(default=0).install()

linux = sys.platform.startswith("linux")
compiled = Pybind11Extension(
    "gti_kernels._compiled",
    sorted(glob.glob("csrc/cpu/*.cpp") + glob.glob("python/*.cpp")),
    include_dirs=["csrc/include", "csrc/cpu", "python"],
    cxx_std=20,
    # The hot loops count on fused products; where exactness forbids them the source says so.
    # OpenMP is the runtime torch brings: it has the same name and is loaded first.
    extra_compile_args=["-O3", "-ffp-contract=fast", "-Wno-psabi"] + ["-fopenmp"] * linux,
    extra_link_args=["-fopenmp"] * linux,
    depends=glob.glob("csrc/**/*.h", recursive=True) + glob.glob("python/*.h"),
    optional=True,  # a failed build is a warning, `gti doctor` says what is missing
)

setup(ext_modules=[compiled])
