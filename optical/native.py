"""The compiled CPU Sinkhorn: built from ``csrc/`` by one recipe, and loaded by ctypes.

The library has a plain C interface (``csrc/sinkhorn.h``), so one binary serves every version of
Python and PyTorch. Installing the package builds it beside this module when a C++ compiler is at
hand; otherwise the first use builds it into a cache of the user's; without a compiler ``load``
returns None and the caller computes with PyTorch operations.

``setup.py`` runs this file by its path to build the library before PyTorch is there, so the module
imports the standard library only; ``optical.cpu`` gives the library tensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ABI_VERSION = 3
LIBRARY_NAME = "_cpu" + (".dylib" if sys.platform == "darwin" else ".so")
COMPILERS = ("c++", "g++", "clang++")

# Without -fno-math-errno and -fno-trapping-math a comparison cannot become a vector select. Neither
# touches infinities and NaN, which mask entries here, as -ffast-math would. The vector width of
# each variant is written out, so that no binary depends on the machine that built it.
FLAGS = (
    *("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
)
BASELINE = ("baseline", ("-DOPTICAL_VECTOR_BYTES=16",))
AVX2 = ("avx2", ("-DOPTICAL_VECTOR_BYTES=32", "-mavx2", "-mfma"))
AVX512 = (
    "avx512",
    ("-DOPTICAL_VECTOR_BYTES=64", "-mfma", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"),
)


class BuildError(RuntimeError):
    """The library could not be built or loaded; the message says why in one line."""


# ------------------------------------------------------------------------------- build recipe


def source_folder() -> Path | None:
    """The C++ sources: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "sinkhorn.h").is_file():
            return folder
    return None


def find_compiler() -> list[str] | None:
    """The command of a C++ compiler that works: ``$CXX`` alone if it is set, or a common name."""
    chosen = os.environ.get("CXX")
    for command in [shlex.split(chosen)] if chosen else [[name] for name in COMPILERS]:
        if command and shutil.which(command[0]) and _compiles(command):
            return command
    return None


def _compiles(compiler: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <atomic>\nstd::atomic<int> probe;\n")
        command = [*compiler, "-shared", "-fPIC", str(source), "-o", str(Path(folder) / "probe.so")]
        return subprocess.run(command, capture_output=True).returncode == 0


def _variants() -> list[tuple[str, tuple[str, ...]]]:
    x86 = platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32
    return [BASELINE, *((AVX2, AVX512) if x86 else ())]


def source_hash(folder: Path) -> str:
    """What a library depends on: every source, every flag."""
    digest = hashlib.sha256(repr((FLAGS, _variants())).encode())
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build(folder: Path, target: Path, compiler: list[str]) -> None:
    """Compile the sources in ``folder`` into the shared library ``target``.

    The library appears under its name only when it is complete, so processes that build it at the
    same time do not disturb one another.

    Raises:
        BuildError: the compiler failed; the message holds its first error.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as work:
        library = Path(work) / target.name
        try:
            _compile(folder, library, compiler, ["-fopenmp"])
        except BuildError:
            # Apple's clang has no OpenMP: the dispatcher then starts threads of its own.
            _compile(folder, library, compiler, ["-pthread"])
        library.chmod(0o755)
        os.replace(library, target)


def _compile(folder: Path, library: Path, compiler: list[str], threading: list[str]) -> None:
    variants = _variants()
    flags = [*FLAGS, f'-DOPTICAL_SOURCE_HASH="{source_hash(folder)}"']
    if len(variants) > 1:
        flags.append("-DOPTICAL_X86")
    operations = str(folder / "cpu" / "operations.cpp")
    units = {
        "dispatch.o": [*threading, str(folder / "cpu" / "dispatch.cpp")],
        **{f"{isa}.o": [*own, f"-DOPTICAL_ISA={isa}", operations] for isa, own in variants},
    }
    objects = [str(library.with_name(name)) for name in units]
    commands = [
        [*compiler, *flags, "-c", *own, "-o", output]
        for own, output in zip(units.values(), objects, strict=True)
    ]
    with ThreadPoolExecutor(min(len(commands), os.cpu_count() or 1)) as pool:
        list(pool.map(_run, commands))
    _run([*compiler, "-shared", *threading, *objects, "-o", str(library)])


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        error = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"{command[0]} failed: {error.strip()}")


# ------------------------------------------------------------------------------------- loading


class _State(NamedTuple):
    library: ctypes.CDLL | None
    reason: str | None


def load() -> ctypes.CDLL | None:
    """The library, found or built at the first call; None, with one warning, when neither works."""
    state = _state()
    if state.library is None:
        _warn_once(state.reason or "")
    return state.library


def opened() -> ctypes.CDLL:
    """The library; without one, a RuntimeError that says why."""
    library, reason = _state()
    if library is None:
        raise RuntimeError(reason)
    return library


def unavailable_reason() -> str | None:
    """None when the library can be used, otherwise why not, in words."""
    return _state().reason


@functools.lru_cache(maxsize=1)
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"{reason}; the CPU Sinkhorn falls back to PyTorch operations, about 100 times slower",
        RuntimeWarning,
        stacklevel=3,
    )


@functools.lru_cache(maxsize=1)
def _state() -> _State:
    try:
        return _State(_find_or_build(), None)
    except BuildError as error:
        return _State(None, str(error))
    except OSError as error:
        return _State(None, f"the CPU library cannot be built ({error})")


def _find_or_build() -> ctypes.CDLL:
    folder = source_folder()
    wanted = source_hash(folder) if folder else None
    prebuilt = Path(__file__).resolve().parent / LIBRARY_NAME
    why = "no compiled library is installed"
    if prebuilt.is_file():
        try:
            return _open(prebuilt, wanted)
        except BuildError as error:
            why = str(error)
    if folder is None:
        raise BuildError(f"{why} and its sources are not part of this installation")
    compiler = find_compiler()
    if compiler is None:
        looked = os.environ.get("CXX") or ", ".join(COMPILERS)
        raise BuildError(f"{why} and no C++ compiler was found (looked for {looked})")
    return _open_cached(folder, compiler)


def _open(path: Path, wanted_hash: str | None) -> ctypes.CDLL:
    """Load a library and refuse one that was built from other sources than those at hand."""
    try:
        library = ctypes.CDLL(str(path))
        library.optical_source_hash.restype = ctypes.c_char_p
        found_abi = library.optical_abi_version()
        found_hash = library.optical_source_hash().decode()
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path.name} cannot be loaded ({error})") from error
    if found_abi != ABI_VERSION:
        raise BuildError(f"{path.name} has interface {found_abi}, not {ABI_VERSION}")
    if wanted_hash is not None and found_hash != wanted_hash:
        raise BuildError(f"{path.name} was built from other sources")
    _declare(library)
    return library


def _open_cached(folder: Path, compiler: list[str]) -> ctypes.CDLL:
    version = subprocess.run([*compiler, "--version"], capture_output=True).stdout
    identity = repr((compiler, shutil.which(compiler[0]), version, platform.machine()))
    wanted = source_hash(folder)
    return cached_library(
        f"cpu-{hashlib.sha256((wanted + identity).encode()).hexdigest()[:16]}",
        lambda target: build(folder, target, compiler),
        lambda path: _open(path, wanted),
    )


def cached_library(
    stem: str, make: Callable[[Path], None], load: Callable[[Path], ctypes.CDLL]
) -> ctypes.CDLL:
    """Open a library of the user's cache, made first where it is missing, damaged or refused.

    The name of its file ends in a digest of the contents: to map a library that a full disk cut
    short would end the process.
    """
    cache, ending = _cache_folder(), Path(LIBRARY_NAME).suffix
    with _locked(cache / "lock"):
        for path in cache.glob(f"{stem}-*{ending}"):
            if path.stem.endswith(_digest(path)):
                with contextlib.suppress(BuildError):
                    return load(path)
            path.unlink(missing_ok=True)
        fresh = cache / f"{stem}{ending}"
        make(fresh)
        path = cache / f"{stem}-{_digest(fresh)}{ending}"
        os.replace(fresh, path)
    return load(path)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _cache_folder() -> Path:
    """A folder that only this user can write, since code is loaded from it."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    user = os.getuid() if hasattr(os, "getuid") else 0
    for folder in (Path(home) / "optical", Path(tempfile.gettempdir()) / f"optical-{user}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.stat()
            own = not hasattr(os, "getuid") or status.st_uid == user
            if own and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
                return folder
        except OSError:
            continue
    return Path(tempfile.mkdtemp(prefix="optical-"))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process build while others wait; where locks do not work, each builds its own."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --------------------------------------------------------------------------------- the interface

KINDS = {"given": 0, "cosine": 1, "sqeuclidean": 2, "dot": 3}
GRADIENTS = {"envelope": 0, "implicit": 1, "unroll": 2}
TYPES = {"torch.float32": 0, "torch.float64": 1, "torch.float16": 2, "torch.bfloat16": 3}


class _Problem(ctypes.Structure):
    """``optical_problem`` of csrc/sinkhorn.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "n", "m", "dim")),
        *((name, ctypes.c_int32) for name in ("kind", "precision")),
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        *((name, ctypes.c_int32) for name in ("x_type", "y_type")),
        *((name, ctypes.c_int64) for name in ("x_stride_batch", "x_stride_row", "x_stride_entry")),
        *((name, ctypes.c_int64) for name in ("y_stride_batch", "y_stride_column")),
        *(
            (name, ctypes.c_void_p)
            for name in ("offset_a", "offset_b", "log_a", "log_b", "epsilon", "init_f", "init_g")
        ),
        ("max_iter", ctypes.c_int32),
        *((name, ctypes.c_double) for name in ("tol", "rho_a", "rho_b", "omega")),
        ("anderson", ctypes.c_int32),
        *((name, ctypes.c_double) for name in ("anneal_start", "anneal_ratio")),
        *((name, ctypes.c_int32) for name in ("gradient", "low_memory", "num_threads", "fast")),
    ]


class _Solution(ctypes.Structure):
    """``optical_solution``."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("value", "value_linear", "marginal_error", "f", "g"),
            *("n_iter", "status", "w", "z", "residual"),
        )
    ]


class _Gradient(ctypes.Structure):
    """``optical_gradient``."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("grad_value", "grad_value_linear", "grad_f", "grad_g", "f", "g", "w", "z"),
            *("n_iter", "grad_x", "grad_y", "grad_log_a", "grad_log_b"),
        )
    ]


def _declare(library: ctypes.CDLL) -> None:
    pointer = ctypes.c_void_p
    problem = ctypes.POINTER(_Problem)
    library.optical_sinkhorn_forward.argtypes = [problem, ctypes.POINTER(_Solution)]
    library.optical_sinkhorn_backward.argtypes = [problem, ctypes.POINTER(_Gradient)]
    library.optical_apply_plan.argtypes = [
        *(problem, pointer, pointer, pointer, ctypes.c_int64, ctypes.c_int32, pointer)
    ]
    library.optical_cpu_isa.restype = ctypes.c_char_p
