"""Build the CUDA kernels for the CPU and route ``optical.backends.cuda`` to that library."""

import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optical.backends import cuda, library, structs

EMULATOR = Path(__file__).resolve().parent
SOURCES = EMULATOR.parent.parent / "csrc" / "cuda"
FLAGS = ["-x", "c++", "-std=c++17", "-Wall", "-Wextra"]
FLAGS += ["-DOPTICAL_EMULATED", f"-I{EMULATOR}", f"-I{SOURCES}"]
SHARED_FLAGS = ["-fPIC", "-shared", "-fvisibility=hidden"]
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-mfma")


def build(folder: Path, *flags: str, source: Path = SOURCES / "sinkhorn.cu") -> Path:
    """Compile ``source`` against the emulator into a shared library in ``folder``.

    Skips the calling test where there is no C++ compiler.
    """
    return _compile(folder / "emulated.so", source, *SHARED_FLAGS, *flags)


def build_program(folder: Path, *flags: str) -> Path:
    """Compile ``exercise.cpp`` and the kernels into a program in ``folder``.

    Skips the calling test where there is no C++ compiler.
    """
    return _compile(folder / "exercise", EMULATOR / "exercise.cpp", *flags)


def _compile(target: Path, source: Path, *flags: str) -> Path:
    compiler = library.find_compiler()
    if compiler is None:
        pytest.skip(reason="no C++ compiler")
    subprocess.run([*compiler, *FLAGS, *flags, str(source), "-o", str(target)], check=True)
    return target


def use(emulated: Any, replace_attribute: Callable[[Any, str, Any], None]) -> None:
    """Make ``optical.backends.cuda`` call an ``emulated`` library with CPU tensors.

    Args:
        emulated: the result of ``library.open_library``.
        replace_attribute: ``monkeypatch.setattr`` or ``setattr``.
    """
    emulated = structs.with_argument_types(emulated)
    replace_attribute(cuda, "load", lambda device=None: library.Loaded(emulated, None))
    replace_attribute(cuda, "DEVICE", "cpu")
    cuda._fits.cache_clear()
