"""Builds the CPU library when a compiler is at hand, and maps folders to packages.

With nvcc and a CUDA device at hand, the CUDA kernels are built too, for that device.

The library has a plain C interface, so nothing here needs PyTorch and a wheel that holds it serves
every Python 3. Without a compiler the same command gives a pure-Python wheel, which carries the
sources and builds them at first use where a compiler is found.
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


def recipe(name: str) -> ModuleType:
    """A module of the package by its path: importing the package would need PyTorch."""
    spec = importlib.util.spec_from_file_location(
        f"_{name}", ROOT / "optical" / "backends" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


library, cuda = recipe("library"), recipe("cuda")
WINGS = sorted(
    path.parent.name
    for path in (ROOT / "optical").glob("*/__init__.py")
    if path.parent.name != "kernels"  # a link; its package is mapped below
)
compiler = library.find_compiler()
nvcc = cuda.find_nvcc() if compiler else None
architectures = cuda.architectures_of_driver() if nvcc else ()
extensions = [Extension("optical._cpu", sources=[], optional=True)] if compiler else []
if architectures:
    extensions.append(Extension("optical._cuda", sources=[], optional=True))


class BuildLibrary(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            if ext.name == "optical._cuda":
                cuda.build(ROOT / "csrc", target, nvcc, architectures)
            else:
                library.build(ROOT / "csrc", target, compiler)
        except (library.BuildError, cuda.BuildError) as error:
            # The extension is optional: setuptools reports this and goes on without it.
            raise CompileError(str(error)) from error

    def get_ext_filename(self, fullname: str) -> str:
        *folders, name = fullname.split(".")
        filename = cuda.LIBRARY_NAME if name == "_cuda" else library.LIBRARY_NAME
        return os.path.join(*folders, filename)


class LibraryWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        platform_tag = super().get_tag()[2]
        return "py3", "none", platform_tag


class LibraryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return compiler is not None


if compiler is None:
    print("optical: no C++ compiler found; the CPU library is left to be built at first use")

setup(
    packages=[
        "optical",
        *(f"optical.{wing}" for wing in WINGS),
        "optical.kernels",
        "optical.kernels.onchip",
        "optical.kernels.streamed",
        "optical.csrc",
    ],
    package_dir={
        "optical": "optical",
        # A package named `kernels` at the top would hide Hugging Face's: see kernels/README.md.
        "optical.kernels": "kernels/triton",
        "optical.kernels.onchip": "kernels/triton/onchip",
        "optical.kernels.streamed": "kernels/triton/streamed",
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
