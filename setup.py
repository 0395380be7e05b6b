"""Build the compiled libraries where a compiler is available, and map folders to packages.

The CPU library is built if there is a C++ compiler; the CUDA library if nvcc and a CUDA device are
found, for the architectures of the devices. Neither needs PyTorch, and a wheel that contains them
serves every Python 3. Without a compiler the wheel is pure Python and contains the sources, which
the first use builds if it finds a compiler.
"""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def load_library_module() -> ModuleType:
    """Load ``optical/backends/library.py`` by its path: importing the package needs PyTorch."""
    path = ROOT / "optical" / "backends" / "library.py"
    spec = importlib.util.spec_from_file_location("_library", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


library = load_library_module()
WINGS = sorted(
    path.parent.name
    for path in (ROOT / "optical").glob("*/__init__.py")
    if path.parent.name != "kernels"  # a link; package_dir maps its package below
)
compiler = library.find_compiler()
nvcc = library.find_nvcc() if compiler else None
architectures = library.driver_architectures() if nvcc else ()
extensions = [Extension("optical._cpu", sources=[], optional=True)] if compiler else []
if architectures:
    extensions.append(Extension("optical._cuda", sources=[], optional=True))


class BuildLibrary(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            if ext.name == "optical._cuda":
                library.build_cuda(ROOT / "csrc", target, nvcc, architectures)
            else:
                library.build_cpu(ROOT / "csrc", target, compiler)
        except library.BuildError as error:
            # The extension is optional; setuptools reports the error and continues.
            raise CompileError(str(error)) from error

    def get_ext_filename(self, fullname: str) -> str:
        *folders, name = fullname.split(".")
        filename = library.CUDA_LIBRARY if name == "_cuda" else library.CPU_LIBRARY
        return os.path.join(*folders, filename)


class LibraryWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        platform_tag = super().get_tag()[2]
        return "py3", "none", platform_tag


class LibraryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return compiler is not None


if compiler is None:
    print("optical: no C++ compiler found; the CPU library will be built at its first use")

setup(
    packages=[
        "optical",
        *(f"optical.{wing}" for wing in WINGS),
        "optical.kernels",
        "optical.kernels.onchip",
        "optical.kernels.streamed",
        "optical.kernels.tokens",
        "optical.csrc",
    ],
    package_dir={
        "optical": "optical",
        # A top-level package `kernels` would hide the one of Hugging Face; see kernels/README.md.
        "optical.kernels": "kernels/triton",
        "optical.kernels.onchip": "kernels/triton/onchip",
        "optical.kernels.streamed": "kernels/triton/streamed",
        "optical.kernels.tokens": "kernels/triton/tokens",
        "optical.csrc": "csrc",
    },
    include_package_data=False,  # the lists below are complete
    package_data={
        "optical": ["py.typed", "phrasebook/tables/*.tsv", "phrasebook/study.yaml"],
        "optical.csrc": ["*.h", "cpu/*.h", "cpu/*.cpp", "cuda/*.cuh", "cuda/*.cu"],
    },
    # A plain path entry instead of an import hook, so that an editable install also works in the
    # parent folder of a clone named `optical`. The link `optical/kernels` stands for the mapping.
    options={"editable_wheel": {"mode": "compat"}},
    ext_modules=extensions,
    distclass=LibraryDistribution,
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": LibraryWheel},
)
