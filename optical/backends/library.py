"""Build and load the compiled libraries of ``csrc``: ``_cpu`` and ``_cuda``.

Both have a plain C interface (``csrc/sinkhorn.h``), so one binary serves every version of Python
and PyTorch. An installation with a compiler puts them beside the package. Otherwise the first use
builds the CPU library in the user's cache, and ``optical.backends.nvrtc`` compiles CUDA kernels one
by one. ``optical.backends.structs`` fills the structures they read.

``setup.py`` loads this file by its path, before PyTorch is installed, so its imports at module
level are of the standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ABI_VERSION = 4  # OPTICAL_ABI_VERSION of sinkhorn.h
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
CPU_LIBRARY, CUDA_LIBRARY = f"_cpu{SUFFIX}", "_cuda.so"
COMPILERS = ("c++", "g++", "clang++")

# Without -fno-math-errno and -fno-trapping-math a comparison cannot become a vector select. Unlike
# -ffast-math, neither affects infinities and NaN, which mark padding here. The vector width of each
# variant is explicit, so that the binary does not depend on the machine that built it.
CPU_FLAGS = (
    *("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
)
BASELINE = ("baseline", ("-DOPTICAL_VECTOR_BYTES=16",))
AVX2 = ("avx2", ("-DOPTICAL_VECTOR_BYTES=32", "-mavx2", "-mfma"))
AVX512 = (
    "avx512",
    ("-DOPTICAL_VECTOR_BYTES=64", "-mfma", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"),
)
NVCC_FLAGS = ("-std=c++17", "-O3", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden")
# Compute capabilities that one binary for all supported devices contains.
CUDA_ARCHITECTURES = ("80", "90a", "100f", "120")


_logger = logging.getLogger("optical")


class BuildError(RuntimeError):
    """A library could not be built or loaded; the message gives the reason in one line."""


class Loaded(NamedTuple):
    """A loaded library, or the reason there is none.

    Attributes:
        library: the functions of ``sinkhorn.h``, or None.
        reason: None if there is a library.
    """

    library: Any
    reason: str | None

    def require(self) -> Any:
        """Return the library, or raise RuntimeError with the reason there is none."""
        if self.library is None:
            raise RuntimeError(self.reason)
        return self.library


# ------------------------------------------------------------------------------------ compilers


def source_folder() -> Path | None:
    """Return ``csrc``: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "sinkhorn.h").is_file():
            return folder
    return None


def find_compiler() -> list[str] | None:
    """Return the command of a working C++ compiler: ``$CXX`` if set, else a common name."""
    from_environment = os.environ.get("CXX")
    candidates = [_words(from_environment)] if from_environment else [[c] for c in COMPILERS]
    for command in candidates:
        if command and shutil.which(command[0]) and _compiles(command):
            return command
    return None


def _words(command: str) -> list[str]:
    """Split a command of the shell, or return [] if it has an open quote."""
    try:
        return shlex.split(command)
    except ValueError:
        return []


def _compiles(compiler: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <atomic>\nstd::atomic<int> probe;\n")
        command = [*compiler, "-shared", "-fPIC", str(source), "-o", str(Path(folder) / "probe.so")]
        return subprocess.run(command, capture_output=True).returncode == 0


def find_nvcc() -> list[str] | None:
    """Return the command of nvcc: ``$NVCC`` if set, else from the path or CUDA_HOME."""
    from_environment = os.environ.get("NVCC")
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    candidates = [["nvcc"], [f"{home}/bin/nvcc"]]
    if from_environment is not None:
        candidates = [_words(from_environment)]
    for command in candidates:
        if command and shutil.which(command[0]):
            return command
    return None


def driver_architectures() -> tuple[str, ...]:
    """Ask the CUDA driver for the architectures of its devices; () without a driver.

    PyTorch is not needed. Devices below compute capability 8.0 are left out. "90a" has the
    instructions that only compute capability 9.0 has.
    """
    capability_major, capability_minor = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    capabilities = set()
    for device in range(count.value):
        driver.cuDeviceGetAttribute(ctypes.byref(major), capability_major, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), capability_minor, device)
        capabilities.add((major.value, minor.value))
    return tuple(f"{x}{y}" + "a" * ((x, y) == (9, 0)) for x, y in sorted(capabilities) if x >= 8)


# ---------------------------------------------------------------------------------------- builds


def cpu_variants() -> list[tuple[str, tuple[str, ...]]]:
    """Return the instruction sets the CPU library contains, with their compiler flags."""
    x86 = platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32
    return [BASELINE, *((AVX2, AVX512) if x86 else ())]


def cpu_source_hash(folder: Path) -> str:
    """Hash the flags and sources that the CPU library depends on."""
    sources = (path for path in folder.rglob("*") if path.suffix in (".h", ".cpp"))
    return _source_hash(repr((CPU_FLAGS, cpu_variants())), folder, sources)


def cuda_source_hash(folder: Path) -> str:
    """Hash the flags and sources that the CUDA library depends on."""
    sources = (folder / "sinkhorn.h", *(folder / "cuda").glob("*.cu*"))
    return _source_hash(repr(NVCC_FLAGS), folder, sources)


def _source_hash(flags: str, folder: Path, sources: Iterable[Path]) -> str:
    digest = hashlib.sha256(flags.encode())
    for path in sorted(sources):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build_cpu(folder: Path, target: Path, compiler: list[str]) -> None:
    """Compile the sources in ``folder`` into the CPU library ``target``.

    Raises:
        BuildError: the compiler failed; the message contains its first error.
    """
    with _atomic_target(target) as library:
        try:
            compile_cpu(folder, library, compiler, ["-fopenmp"])
        except BuildError:
            # Apple's clang has no OpenMP; the dispatcher then starts its own threads.
            compile_cpu(folder, library, compiler, ["-pthread"])


def compile_cpu(folder: Path, library: Path, compiler: list[str], threading: list[str]) -> None:
    """Compile and link the CPU library with ``threading`` flags, each file in parallel."""
    variants = cpu_variants()
    flags = [*CPU_FLAGS, f'-DOPTICAL_SOURCE_HASH="{cpu_source_hash(folder)}"']
    if len(variants) > 1:
        flags.append("-DOPTICAL_X86")
    operations = str(folder / "cpu" / "operations.cpp")
    units = {
        "dispatch.o": [*threading, str(folder / "cpu" / "dispatch.cpp")],
        **{f"{isa}.o": [*options, f"-DOPTICAL_ISA={isa}", operations] for isa, options in variants},
    }
    objects = [str(library.with_name(name)) for name in units]
    commands = [
        [*compiler, *flags, "-c", *unit, "-o", output]
        for unit, output in zip(units.values(), objects, strict=True)
    ]
    with ThreadPoolExecutor(min(len(commands), os.cpu_count() or 1)) as pool:
        list(pool.map(_run, commands))
    _run([*compiler, "-shared", *threading, *objects, "-o", str(library)])


def nvcc_command(folder: Path, nvcc: list[str], architectures: Iterable[str]) -> list[str]:
    """Return the command that compiles the CUDA kernels, without its output file."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    source_hash = f'-DOPTICAL_SOURCE_HASH="{cuda_source_hash(folder)}"'
    options = ["--threads=0", "--split-compile=0", *targets, source_hash, "-shared"]
    return [*nvcc, *NVCC_FLAGS, *options, str(folder / "cuda" / "sinkhorn.cu")]


def build_cuda(folder: Path, target: Path, nvcc: list[str], architectures: Iterable[str]) -> None:
    """Compile the kernels in ``folder`` into the CUDA library ``target``.

    Raises:
        BuildError: nvcc failed; the message contains its first error.
    """
    with _atomic_target(target) as library:
        _run([*nvcc_command(folder, nvcc, architectures), "-o", str(library)])


@contextlib.contextmanager
def _atomic_target(target: Path) -> Iterator[Path]:
    """Yield a temporary path whose file replaces ``target`` when the block ends.

    Other processes never see a partly written library.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as work:
        library = Path(work) / target.name
        yield library
        library.chmod(0o755)
        os.replace(library, target)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode != 0:
        lines = (result.stderr or result.stdout).strip().splitlines()
        lines = lines or [f"exit status {result.returncode}"]
        error = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"{command[0]} failed: {error.strip()}")


# --------------------------------------------------------------------------------------- loading


@functools.lru_cache(maxsize=1)
def load_cpu() -> Loaded:
    """Load the CPU library; the first call finds it, or builds it in the user's cache."""
    return attempt(_find_or_build_cpu, "the CPU library cannot be built")


def attempt(find: Callable[[], Any], failure: str) -> Loaded:
    """Return the library that ``find`` returns, or the reason it failed."""
    try:
        return Loaded(find(), None)
    except BuildError as error:
        return Loaded(None, str(error))
    except OSError as error:
        return Loaded(None, f"{failure} ({error})")


def _find_or_build_cpu() -> ctypes.CDLL:
    folder = source_folder()
    source_hash = cpu_source_hash(folder) if folder else None
    try:
        return open_installed(CPU_LIBRARY, source_hash, "no compiled library is installed")
    except BuildError as error:
        reason = str(error)
    if folder is None:
        raise BuildError(f"{reason} and its sources are not part of this installation")
    compiler = find_compiler()
    if compiler is None:
        tried = os.environ.get("CXX") or ", ".join(COMPILERS)
        if not _words(tried):
            raise BuildError(
                f"{reason} and CXX is {tried!r}; expected a command without open quotes"
            )
        raise BuildError(f"{reason} and no C++ compiler was found (looked for {tried})")
    return open_cached_cpu(folder, compiler)


def open_installed(file_name: str, source_hash: str | None, missing: str) -> ctypes.CDLL:
    """Open a library that was built when the package was installed.

    Raises:
        BuildError: it cannot be used; the message is ``missing`` if there is none.
    """
    path = Path(__file__).resolve().parents[1] / file_name
    if not path.is_file():
        raise BuildError(missing)
    return open_library(path, source_hash)


def open_library(path: Path, source_hash: str | None) -> ctypes.CDLL:
    """Open a library, and check its interface and, unless None, the hash of its sources.

    Raises:
        BuildError: it cannot be loaded or was built from other sources.
    """
    try:
        library = ctypes.CDLL(str(path))
        library.optical_source_hash.restype = ctypes.c_char_p
        found_abi = library.optical_abi_version()
        found_hash = library.optical_source_hash().decode()
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path.name} cannot be loaded ({error})") from error
    if found_abi != ABI_VERSION:
        raise BuildError(f"{path.name} has interface {found_abi}, not {ABI_VERSION}")
    if source_hash is not None and found_hash != source_hash:
        raise BuildError(f"{path.name} was built from other sources")
    return library


def instruction_set(library: Any) -> str:
    """Return the instruction set the CPU library chose: "avx512", "avx2" or "baseline"."""
    library.optical_cpu_isa.restype = ctypes.c_char_p
    name: bytes = library.optical_cpu_isa()
    return name.decode()


# ----------------------------------------------------------------------------------------- cache


def open_cached_cpu(folder: Path, compiler: list[str]) -> ctypes.CDLL:
    """Open the CPU library of the user's cache, built there at its first use."""
    source_hash = cpu_source_hash(folder)
    version = subprocess.run([*compiler, "--version"], capture_output=True).stdout
    identity = repr((compiler, shutil.which(compiler[0]), version, platform.machine()))
    return _open_cached(
        f"cpu-{_short_hash((source_hash + identity).encode())}",
        lambda target: build_cpu(folder, target, compiler),
        source_hash,
        "its CPU kernels once, about half a minute",
    )


def _open_cached(
    stem: str, build: Callable[[Path], None], source_hash: str, what: str
) -> ctypes.CDLL:
    """Open a library of the cache, or build it if it is missing, damaged or refused.

    ``what`` completes "optical compiles". The file name ends in a hash of its contents, since
    loading a truncated library would crash the process.
    """
    cache = cache_folder()
    with contextlib.ExitStack() as stack:
        with said_if_waiting(cache):
            stack.enter_context(build_lock(cache))
        for path in cache.glob(f"{stem}-*{SUFFIX}"):
            if path.stem.endswith(_short_hash(path.read_bytes())):
                with contextlib.suppress(BuildError):
                    return open_library(path, source_hash)
            path.unlink(missing_ok=True)
        fresh = cache / f"{stem}{SUFFIX}"
        with announced(what, cache):
            build(fresh)
        path = cache / f"{stem}-{_short_hash(fresh.read_bytes())}{SUFFIX}"
        os.replace(fresh, path)
    return open_library(path, source_hash)


@contextlib.contextmanager
def announced(what: str, cache: Path) -> Iterator[None]:
    """Log that optical compiles something, which takes long, and afterwards the time."""
    _logger.warning("optical compiles %s, into %s", what, cache)
    start = time.monotonic()
    yield
    _logger.warning("optical has compiled in %.0f s", time.monotonic() - start)


def said_if_waiting(cache: Path) -> contextlib.AbstractContextManager[None]:
    """Log if the block, which takes a lock of the cache, waits for another process."""
    return _said_if_long(f"optical waits for another process that compiles in {cache}")


@contextlib.contextmanager
def _said_if_long(message: str, seconds: float = 1.0) -> Iterator[None]:
    """Log a message if the block takes longer than some seconds."""
    timer = threading.Timer(seconds, _logger.warning, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _short_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def cache_folder() -> Path:
    """Return a cache folder that only this user can write, because code is loaded from it."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    user = os.getuid() if hasattr(os, "getuid") else 0
    for folder in (Path(home) / "optical", Path(tempfile.gettempdir()) / f"optical-{user}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.stat()
            owned = not hasattr(os, "getuid") or status.st_uid == user
            if owned and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
                return folder
        except OSError:
            continue
    return Path(tempfile.mkdtemp(prefix="optical-"))


def build_lock(cache: Path, name: str = ".lock") -> contextlib.AbstractContextManager[None]:
    """Let one process or thread build what ``name`` stands for in ``cache`` while others wait."""
    # Importing the package imports PyTorch, which setup.py must not.
    from optical.io.files import folder_lock

    return folder_lock(cache, wait=True, name=name)
