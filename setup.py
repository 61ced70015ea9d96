"""Builds the compiled CPU kernels. Without a C++ compiler the package installs without them."""

import glob
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_py import build_py

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


class WithCudaSources(build_py):
    """The CUDA sources are compiled where they run, so they go into the package as they are. An
    editable install finds them in the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source in glob.glob("csrc/cuda/*.cu*"):
                target = Path(self.build_lib, "gti_kernels", source)
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(source, str(target))


setup(ext_modules=[compiled], cmdclass={"build_py": WithCudaSources})
