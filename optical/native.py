"""The compiled CPU Sinkhorn: built from ``csrc/`` by one recipe, loaded by ctypes, given tensors.

The library has a plain C interface (``csrc/sinkhorn.h``), so one binary serves every version of
Python and PyTorch. Installing the package builds it beside this module when a C++ compiler is at
hand; otherwise the first use builds it into a cache of the user's; without a compiler ``load``
returns None and the caller computes with PyTorch operations.

``setup.py`` runs this file by its path to build the library before PyTorch is there, so the module
imports the standard library only and reaches for torch when it is given tensors.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ABI_VERSION = 1
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
    kernel = str(folder / "cpu" / "kernel.cpp")
    units = {
        "dispatch.o": [*threading, str(folder / "cpu" / "dispatch.cpp")],
        **{f"{isa}.o": [*own, f"-DOPTICAL_ISA={isa}", kernel] for isa, own in variants},
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
    key = hashlib.sha256((wanted + identity).encode()).hexdigest()[:16]
    cache = _cache_folder()
    path = cache / f"cpu-{key}{Path(LIBRARY_NAME).suffix}"
    with _locked(cache / "lock"):
        if path.is_file():
            # A damaged file is built anew.
            with contextlib.suppress(BuildError):
                return _open(path, wanted)
        build(folder, path, compiler)
    return _open(path, wanted)


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


def _declare(library: ctypes.CDLL) -> None:
    pointer, size, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    problem = [size, size, size, pointer, size, size, pointer, pointer, pointer]
    for suffix in ("f32", "f64"):
        forward = getattr(library, f"optical_sinkhorn_forward_{suffix}")
        forward.argtypes = [*problem, int32, ctypes.c_double, *[pointer] * 6, int32]
        backward = getattr(library, f"optical_sinkhorn_backward_{suffix}")
        backward.argtypes = [*problem, *[pointer] * 5, int32]
    library.optical_cpu_isa.restype = ctypes.c_char_p


# --------------------------------------------------------------------------------------- calls


def forward(
    cost: Tensor, log_a: Tensor, log_b: Tensor, epsilon: Tensor, max_iter: int, tol: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Solve a batch of problems: cost (B, n, m), log_a (B, n), log_b (B, m), epsilon (B,).

    All are CPU tensors of one dtype, float32 or float64; the last dimension of ``cost`` is
    adjacent, its rows and problems may lie apart. Returns value, value_linear (B,), f (B, n),
    g (B, m), marginal_error (B,) and n_iter (B,) int32.
    """
    import torch

    suffix = _check(cost, log_a, log_b, epsilon)
    batch, n, m = cost.shape
    log_a, log_b, epsilon = log_a.contiguous(), log_b.contiguous(), epsilon.contiguous()
    value, value_linear = torch.empty_like(epsilon), torch.empty_like(epsilon)
    marginal_error = torch.empty_like(epsilon)
    f, g = torch.empty_like(log_a), torch.empty_like(log_b)
    n_iter = torch.empty(batch, dtype=torch.int32)
    status = getattr(_library(), f"optical_sinkhorn_forward_{suffix}")(
        *(batch, n, m, cost.data_ptr(), cost.stride(0), cost.stride(1)),
        *(log_a.data_ptr(), log_b.data_ptr(), epsilon.data_ptr(), max_iter, tol),
        *(value.data_ptr(), value_linear.data_ptr(), f.data_ptr(), g.data_ptr()),
        *(marginal_error.data_ptr(), n_iter.data_ptr(), torch.get_num_threads()),
    )
    _raise_for(status, f"max_iter={max_iter}, cost {tuple(cost.shape)}")
    return value, value_linear, f, g, marginal_error, n_iter


def backward(
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    epsilon: Tensor,
    f: Tensor,
    g: Tensor,
    grad_value: Tensor,
    grad_value_linear: Tensor,
) -> Tensor:
    """Gradient (B, n, m) of both values with respect to the cost, with the plan held fixed."""
    import torch

    upstream = (grad_value, grad_value_linear)
    suffix = _check(cost, log_a, log_b, epsilon, f, g, *upstream)
    batch, n, m = cost.shape
    grad_cost = torch.empty(cost.shape, dtype=cost.dtype)
    vectors = [x.contiguous() for x in (log_a, log_b, epsilon, f, g, *upstream)]
    status = getattr(_library(), f"optical_sinkhorn_backward_{suffix}")(
        *(batch, n, m, cost.data_ptr(), cost.stride(0), cost.stride(1)),
        *(vector.data_ptr() for vector in vectors),
        *(grad_cost.data_ptr(), torch.get_num_threads()),
    )
    _raise_for(status, f"cost {tuple(cost.shape)}")
    return grad_cost


def _library() -> ctypes.CDLL:
    library, reason = _state()
    if library is None:
        raise RuntimeError(reason)
    return library


def _check(cost: Tensor, *others: Tensor) -> str:
    """The suffix of the functions for these tensors, which share a dtype."""
    import torch

    suffixes: dict[torch.dtype, str] = {torch.float32: "f32", torch.float64: "f64"}
    if cost.dtype not in suffixes:
        raise TypeError(f"cost is {cost.dtype}; expected torch.float32 or torch.float64")
    for tensor in (cost, *others):
        if tensor.device.type != "cpu" or tensor.dtype != cost.dtype:
            found = f"{tensor.dtype} on {tensor.device}"
            raise TypeError(f"a tensor is {found}; expected {cost.dtype} on cpu, like cost")
    if cost.dim() != 3 or (cost.shape[2] > 1 and cost.stride(2) != 1):
        found = f"shape {tuple(cost.shape)}, strides {cost.stride()}"
        raise ValueError(f"cost has {found}; expected (batch, n, m) with adjacent columns")
    return suffixes[cost.dtype]


def _raise_for(status: int, arguments: str) -> None:
    if status == 2:
        raise MemoryError(f"no memory for the workspace of the CPU Sinkhorn ({arguments})")
    if status != 0:
        raise ValueError(f"the CPU Sinkhorn refused its arguments ({arguments})")
