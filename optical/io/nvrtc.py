"""NVRTC, NVIDIA's compiler as a library: finding it, compiling, and a cache of its results."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
import hashlib
import importlib.util
import os
import site
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

STDINT = """
typedef signed char int8_t; typedef unsigned char uint8_t;
typedef short int16_t; typedef unsigned short uint16_t;
typedef int int32_t; typedef unsigned int uint32_t;
typedef long long int64_t; typedef unsigned long long uint64_t;
typedef unsigned long long uintptr_t;
"""


COMPILATION_ERROR = 6  # NVRTC_ERROR_COMPILATION


class CompileError(RuntimeError):
    """NVRTC failed; the message is its first error, in one line."""


class CompilerFault(CompileError):
    """NVRTC failed for another reason than the program, such as a lack of memory."""


# --------------------------------------------------------------------------------------- finding


@functools.cache
def find() -> Any:
    """Load NVRTC from the packages installed with PyTorch, else from the system; None if absent.

    Of several versions, that of PyTorch's own CUDA comes first: the driver may be too old for
    the code of a newer one.
    """
    for path in _candidates():
        # Some wheels of NVRTC do not find their second library, whose name in memory suffices.
        for builtins in sorted(path.parent.glob("libnvrtc-builtins[-.]*so*")):
            if ".alt." not in builtins.name:
                with contextlib.suppress(OSError):
                    ctypes.CDLL(str(builtins))
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(path))
    name = ctypes.util.find_library("nvrtc")
    with contextlib.suppress(OSError):
        return ctypes.CDLL(name) if name else None
    return None


def _candidates() -> list[Path]:
    """List the files of NVRTC, the most suitable one first."""
    found: list[Path] = []
    for folder in _package_folders():
        found += sorted(folder.glob("nvidia/*/lib/libnvrtc.so.*"), reverse=True)
        found += sorted(folder.glob("torch/lib/libnvrtc[-.]*so*"), reverse=True)
    homes = [os.environ.get("CONDA_PREFIX"), sys.prefix, os.environ.get("CUDA_HOME")]
    for home in (*homes, os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            for library in ("lib", "lib64", "targets/x86_64-linux/lib"):
                found += sorted(Path(home, library).glob("libnvrtc.so.*"), reverse=True)
    found = [path for path in dict.fromkeys(found) if "builtins" not in path.name]
    major = (torch.version.cuda or "").split(".")[0]
    # Sorting is stable: the order of the folders holds among equals.
    return sorted(found, key=lambda path: f".so.{major}" not in path.name)


def _package_folders() -> list[Path]:
    """List the folders that may hold the packages of PyTorch's CUDA, PyTorch's own first."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parents[1]] if spec is not None and spec.origin else []
    folders += map(Path, site.getsitepackages())
    if site.ENABLE_USER_SITE:
        folders.append(Path(site.getusersitepackages()))
    folders += [Path(entry) for entry in sys.path if entry]  # such as that of `pip --target`
    return list(dict.fromkeys(folders))


# ------------------------------------------------------------------------------------- compiling


def version(library: Any) -> str:
    """Return the version of NVRTC, such as "13.0"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def architecture(library: Any, capability: tuple[int, int]) -> str:
    """Return the architecture to compile for, such as "90a", for a device of a capability.

    A device also runs code for the first architecture of its generation, which an older NVRTC may
    know.

    Raises:
        CompileError: NVRTC knows neither.
    """
    count = ctypes.c_int()
    library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    library.nvrtcGetSupportedArchs(known)
    major, minor = capability
    for candidate in (10 * major + minor, 10 * major):
        if candidate in known:
            # The instructions that only compute capability 9.0 has need a name with an "a".
            return f"{candidate}a" if candidate == 90 else str(candidate)
    newest = max(known, default=0)
    raise CompileError(
        f"NVRTC {version(library)} knows no GPU of compute capability {major}.{minor} (its newest "
        f"is {newest // 10}.{newest % 10}); install a PyTorch for a newer CUDA"
    )


def compile_source(
    library: Any, source: str, headers: Mapping[str, bytes], options: Sequence[str]
) -> bytes:
    """Compile a program to a cubin.

    Args:
        library: NVRTC.
        source: the program.
        headers: the files that it includes, by the name it includes them by.
        options: options of NVRTC.

    Raises:
        CompileError: NVRTC reported an error; the message contains the first one.
    """
    headers = {"stdint.h": STDINT.encode(), **headers}
    count = len(headers)
    texts = (ctypes.c_char_p * count)(*headers.values())
    names = (ctypes.c_char_p * count)(*(name.encode() for name in headers))
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"optical.cu", count, texts, names
    )
    option_array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    size = ctypes.c_size_t()
    try:
        status = library.nvrtcCompileProgram(program, len(options), option_array)
        if status != 0:
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            lines = log.value.decode(errors="replace").strip().splitlines()
            error = next((line for line in lines if "error" in line), "".join(lines[:1]))
            kind = CompileError if status == COMPILATION_ERROR else CompilerFault
            raise kind(f"NVRTC {version(library)} failed: {error.strip() or f'error {status}'}")
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        library.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def compile_all(
    compile_one: Callable[[str], bytes], names: Sequence[str], threads: int | None = None
) -> list[bytes]:
    """Compile several kernels in parallel; NVRTC does not hold Python's lock.

    Raises:
        CompileError: one of them failed.
    """
    if len(names) < 2:
        return [compile_one(name) for name in names]
    with ThreadPoolExecutor(threads or min(len(names), os.cpu_count() or 1)) as pool:
        return list(pool.map(compile_one, names))


# ----------------------------------------------------------------------------------------- cache


def cache_file(key: str, folder: Path) -> Path:
    """Return the file of the cache that holds what was compiled for ``key``."""
    return folder / f"cuda-{hashlib.sha256(key.encode()).hexdigest()[:16]}.cubin"


def cached(make: Callable[[], bytes], key: str, folder: Path) -> bytes:
    """Return the cached result of ``make`` for ``key``, or call ``make`` and store its result.

    The file begins with a digest of the rest; a damaged file is replaced. An error of the compiler
    is stored too, since compiling again would take as long and fail again.

    Raises:
        CompileError: ``make`` raised it, now or before.
    """
    path = cache_file(key, folder)
    if path.is_file():
        digest, cubin = path.read_bytes()[:32], path.read_bytes()[32:]
        if digest == hashlib.sha256(cubin).digest():
            return cubin
    failure = known_failure(key, folder)
    if failure is not None:
        raise CompileError(failure)
    try:
        cubin = make()
    except CompilerFault:
        raise
    except CompileError as error:
        _store(path.with_suffix(".failed"), str(error).encode())
        raise
    _store(path, hashlib.sha256(cubin).digest() + cubin)
    return cubin


def known_failure(key: str, folder: Path) -> str | None:
    """Return the error with which compiling for ``key`` has failed before, or None."""
    path = cache_file(key, folder).with_suffix(".failed")
    with contextlib.suppress(OSError):
        return f"{path.read_text(errors='replace')} (remembered in {path})"
    return None


def _store(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError:
        # On a full disk, the next process compiles the kernel again.
        partial.unlink(missing_ok=True)
