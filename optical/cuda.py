"""The CUDA C++ Sinkhorn: how its kernels are found or built, and what they are given.

The kernels of ``csrc/cuda`` take the structures of ``csrc/sinkhorn.h``, with pointers of the device
and a stream, so one binary serves every version of Python and PyTorch. Memory comes from PyTorch's
allocator. Nothing waits for the device, so that calls can be captured in CUDA graphs, but for
packed problems of which one could be too large, since all their lines would not fit in one: then
the longest lengths are read, once for each pair of offsets, and under capture they are refused.

``setup.py`` runs this file by its path before PyTorch is there, so the module imports the standard
library only and reaches for torch when it is given tensors.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from optical.arguments import Arguments, Gradients, Outputs

LIBRARY_NAME = "_cuda.so"
# What a binary for every device that the kernels know is built for.
ARCHITECTURES = ("80", "90a", "100f", "120")

FLAGS = ("-std=c++17", "-O3", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden")


class BuildError(RuntimeError):
    """The library could not be built or loaded; the message says why in one line."""


# ------------------------------------------------------------------------------- build recipe


def find_nvcc() -> list[str] | None:
    """The command of nvcc: ``$NVCC`` alone if it is set, else on the path or in CUDA_HOME."""
    chosen = os.environ.get("NVCC")
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    candidates = [shlex.split(chosen)] if chosen is not None else [["nvcc"], [f"{home}/bin/nvcc"]]
    for command in candidates:
        if command and shutil.which(command[0]):
            return command
    return None


def architectures_of_driver() -> tuple[str, ...]:
    """The architectures of the devices that the driver finds, without PyTorch; () without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    capability_major, capability_minor = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    found = set()
    for device in range(count.value):
        driver.cuDeviceGetAttribute(ctypes.byref(major), capability_major, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), capability_minor, device)
        found.add((major.value, minor.value))
    return tuple(f"{x}{y}" for x, y in sorted(found) if x >= 8)


def source_hash(folder: Path) -> str:
    """What a library depends on: every source, every flag."""
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in (folder / "sinkhorn.h", *sorted((folder / "cuda").glob("*.cu*"))):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build_command(folder: Path, nvcc: list[str], architectures: tuple[str, ...]) -> list[str]:
    """All but the output of the call that compiles the kernels for these architectures."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    named = f'-DOPTICAL_SOURCE_HASH="{source_hash(folder)}"'
    source = str(folder / "cuda" / "sinkhorn.cu")
    return [*nvcc, *FLAGS, "--threads=0", "--split-compile=0", *targets, named, "-shared", source]


def build(folder: Path, target: Path, nvcc: list[str], architectures: tuple[str, ...]) -> None:
    """Compile the kernels into the shared library ``target``, which appears when it is complete.

    Raises:
        BuildError: nvcc failed; the message holds its first error.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as work:
        library = Path(work) / target.name
        command = [*build_command(folder, nvcc, architectures), "-o", str(library)]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if result.returncode != 0:
            lines = (result.stderr or result.stdout).strip().splitlines()
            lines = lines or [f"exit status {result.returncode}"]
            error = next((line for line in lines if "error" in line), lines[0])
            raise BuildError(f"{nvcc[0]} failed: {error.strip()}")
        library.chmod(0o755)
        os.replace(library, target)


# ------------------------------------------------------------------------------------- loading


def open_library(path: Path, wanted_hash: str | None) -> ctypes.CDLL:
    """Load a library and refuse one that was built from other sources than those at hand.

    Raises:
        BuildError: it cannot be used; the message says why.
    """
    from optical import native

    try:
        calls = ctypes.CDLL(str(path))
        calls.optical_source_hash.restype = ctypes.c_char_p
        found_abi = calls.optical_abi_version()
        found_hash = calls.optical_source_hash().decode()
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path.name} cannot be loaded ({error})") from error
    if found_abi != native.ABI_VERSION:
        raise BuildError(f"{path.name} has interface {found_abi}, not {native.ABI_VERSION}")
    if wanted_hash is not None and found_hash != wanted_hash:
        raise BuildError(f"{path.name} was built from other sources")
    pointer, problem = ctypes.c_void_p, ctypes.POINTER(native._Problem)
    solution, gradient = (ctypes.POINTER(x) for x in (native._Solution, native._Gradient))
    calls.optical_cuda_reach.argtypes = [problem]
    calls.optical_cuda_forward.argtypes = [problem, solution, pointer]
    calls.optical_cuda_backward.argtypes = [problem, gradient, pointer, pointer]
    return calls


# Whose memory the kernels read. Tests, which build them for the CPU, put "cpu" here.
DEVICE = "cuda"


class _State(NamedTuple):
    library: Any
    reason: str | None


@functools.lru_cache(maxsize=1)
def _state() -> _State:
    try:
        return _State(_find_or_build(), None)
    except BuildError as error:
        return _State(None, str(error))
    except OSError as error:
        return _State(None, f"the CUDA kernels cannot be built ({error})")


def unavailable_reason() -> str | None:
    """None when the kernels can be used, otherwise why not, in words."""
    return _state().reason


def _find_or_build() -> Any:
    import torch

    from optical import native, nvrtc

    if not torch.cuda.is_available():
        raise BuildError("PyTorch finds no CUDA device")
    folder = native.source_folder()
    wanted = source_hash(folder) if folder else None
    prebuilt = Path(__file__).resolve().parent / LIBRARY_NAME
    why = "no compiled CUDA kernels are installed"
    if prebuilt.is_file():
        try:
            return open_library(prebuilt, wanted)
        except BuildError as error:
            why = str(error)
    if folder is None:
        raise BuildError(f"{why} and their sources are not part of this installation")
    nvcc = find_nvcc()
    if nvcc is not None:
        try:
            return _open_cached(folder, nvcc, _present_architectures())
        except BuildError as error:
            why = str(error)
    compiler = nvrtc.find()
    if compiler is None:
        missing = "NVRTC was not" if nvcc else "neither nvcc nor NVRTC was"
        raise BuildError(f"{why}, and {missing} found")
    cache = native._cache_folder()

    def cubin(kernel: str, architecture: str) -> bytes:
        return nvrtc.cached(
            lambda: nvrtc.compile_kernel(compiler, folder, kernel, architecture),
            repr((wanted, kernel, architecture)),
            cache,
            native._locked(cache / "lock"),
        )

    try:
        return nvrtc.Kernels(ctypes.CDLL("libcuda.so.1"), cubin)
    except OSError as error:
        raise BuildError(f"the CUDA driver cannot be loaded ({error})") from error


def _open_cached(folder: Path, nvcc: list[str], architectures: tuple[str, ...]) -> ctypes.CDLL:
    from optical import native

    version = subprocess.run([*nvcc, "--version"], capture_output=True).stdout
    wanted = source_hash(folder)
    identity = repr((wanted, nvcc, version, architectures))
    try:
        return native.cached_library(
            f"cuda-{hashlib.sha256(identity.encode()).hexdigest()[:16]}",
            lambda target: build(folder, target, nvcc, architectures),
            lambda path: open_library(path, wanted),
        )
    except native.BuildError as error:
        raise BuildError(str(error)) from error


def _present_architectures() -> tuple[str, ...]:
    import torch

    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return tuple(sorted(f"{major}{minor}" for major, minor in found if major >= 8))


def supports(arguments: Arguments) -> str | None:
    """None when the kernels serve the problems, otherwise why not, in words."""
    p = arguments
    if p.x.device.type != DEVICE:
        return f"the tensors are on {p.x.device.type}; the CUDA kernels need a CUDA device"
    dtype = str(p.log_a.dtype).removeprefix("torch.")
    if dtype != "float32":
        return f"the problem is {dtype}; the CUDA kernels compute in float32"
    if p.anderson > 0:
        return "the CUDA kernels do not know anderson"
    if p.gradient == "unroll" and p.anneal_start > 0:
        return "gradient='unroll' does not undo annealing in the CUDA kernels"
    library, reason = _state()
    if library is None:
        return reason
    if _may_wait(p) and _capturing():
        return (
            "the longest of packed problems must be read, since one problem of all their lines "
            "would not fit, and a CUDA graph is being captured"
        )
    n, m = _largest(p)
    if not _within_reach(n, m, p.kind, p.gradient, p.x.device.index):
        return f"a problem of {n} x {m} does not fit on the multiprocessors that may share one"
    return None


@functools.lru_cache(maxsize=4096)
def _within_reach(n: int, m: int, kind: str, gradient: str, device: int | None) -> bool:
    import torch

    from optical import native

    library, _ = _state()
    problem = native._Problem(n=n, m=m)
    problem.kind, problem.gradient = native.KINDS[kind], native.GRADIENTS[gradient]
    with torch.cuda.device(-1 if device is None else device):
        return library is not None and bool(library.optical_cuda_reach(ctypes.byref(problem)))


# --------------------------------------------------------------------------------------- calls


def forward(arguments: Arguments) -> Outputs:
    """Solve a batch of problems; see ``optical.arguments`` for what goes in and comes out."""
    from optical import native
    from optical.arguments import Outputs

    call = _Call(arguments)
    p = call.arguments
    outputs = Outputs.empty(p.log_a, p.log_b, p.epsilon, p.gradient)
    solution = native._Solution(**{name: _address(x) for name, x in outputs._asdict().items()})
    call.run("optical_cuda_forward", solution)
    return outputs


def backward(
    grad_value: Tensor,
    grad_value_linear: Tensor,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    arguments: Arguments,
    f: Tensor,
    g: Tensor,
    w: Tensor,
    z: Tensor,
    n_iter: Tensor,
    need_x: bool,
    need_y: bool,
) -> Gradients:
    """Gradients with respect to x, y (None where not needed), log_a and log_b, by the mode of
    ``arguments.gradient``; the other tensors are outputs of ``forward``."""
    import torch

    from optical import native

    call = _Call(arguments)
    p = call.arguments
    grad_x = torch.empty(p.x.shape, dtype=p.x.dtype, device=p.x.device) if need_x else None
    grad_y = torch.empty_like(p.y) if need_y and p.y is not None else None
    grad_log_a, grad_log_b = torch.empty_like(p.log_a), torch.empty_like(p.log_b)
    kept = (p.max_iter + 1) * (p.log_a.numel() + p.log_b.numel())
    history = p.log_a.new_empty(kept if p.gradient == "unroll" else 0)
    tensors = {
        "grad_value": grad_value,
        "grad_value_linear": grad_value_linear,
        "grad_f": grad_f,
        "grad_g": grad_g,
        "f": f,
        "g": g,
        "w": w,
        "z": z,
        "n_iter": n_iter,
        "grad_x": grad_x,
        "grad_y": grad_y,
        "grad_log_a": grad_log_a,
        "grad_log_b": grad_log_b,
    }
    gradient = native._Gradient(**{name: _address(t) for name, t in tensors.items()})
    call.run("optical_cuda_backward", gradient, _address(history))
    return grad_x, grad_y, grad_log_a, grad_log_b


def apply_plan(arguments: Arguments, f: Tensor, g: Tensor, v: Tensor, transpose: bool) -> Tensor:
    """P v, or transposed P' v: by the operations of PyTorch, from a plan in device memory."""
    from optical import reference
    from optical.dense import Dense

    return Dense(arguments).apply_plan(reference.apply_plan, f, g, v, transpose)


class _Call:
    """Arguments as the kernels read them, with the tensors they point into kept alive."""

    def __init__(self, arguments: Arguments) -> None:
        from optical import native

        dense = {
            name: value.contiguous()
            for name, value in arguments._asdict().items()
            if hasattr(value, "contiguous") and (name != "x" or arguments.kind != "given")
        }
        p = self.arguments = arguments._replace(**dense)
        x, y = p.x, p.y
        n, m = _largest(p)
        self.problem = native._Problem(
            batch=len(p.epsilon),
            n=n,
            m=m,
            dim=0 if y is None else x.shape[-1],
            kind=native.KINDS[p.kind],
            precision=native.TYPES["torch.float32"],
            x=_address(x),
            y=_address(y),
            x_type=native.TYPES[str(x.dtype)],
            y_type=native.TYPES[str((x if y is None else y).dtype)],
            x_stride_batch=0 if p.packed else x.stride(0),
            x_stride_line=x.stride(-2),
            x_stride_entry=x.stride(-1),
            y_stride_batch=0 if p.packed or y is None else y.stride(0),
            y_stride_line=0 if y is None else y.stride(-2),
            offset_a=_address(p.cu_a),
            offset_b=_address(p.cu_b),
            log_a=_address(p.log_a),
            log_b=_address(p.log_b),
            epsilon=_address(p.epsilon),
            init_f=_address(p.f0),
            init_g=_address(p.g0),
            max_iter=p.max_iter,
            tol=p.tol,
            rho_a=p.rho_a,
            rho_b=p.rho_b,
            omega=p.omega,
            anderson=p.anderson,
            anneal_start=p.anneal_start,
            anneal_ratio=p.anneal_ratio,
            gradient=native.GRADIENTS[p.gradient],
            low_memory=p.low_memory,
            num_threads=1,
            fast=p.precision == "fast",
        )

    def run(self, name: str, *others: ctypes.Structure | int | None) -> None:
        import torch

        library, reason = _state()
        if library is None:
            raise RuntimeError(reason)
        device = self.arguments.x.device
        given = [
            ctypes.byref(x) if isinstance(x, ctypes.Structure) else x
            for x in (self.problem, *others)
        ]
        if DEVICE == "cpu":
            status = getattr(library, name)(*given, None)
        else:
            with torch.cuda.device(device):
                stream = torch.cuda.current_stream(device).cuda_stream
                status = getattr(library, name)(*given, stream)
        if status != 0:
            sizes = f"batch={self.problem.batch}, n={self.problem.n}, m={self.problem.m}"
            raise RuntimeError(f"{name} failed with {ERRORS.get(status, status)} ({sizes})")


ERRORS = {
    1: "invalid arguments",
    3: "a size out of reach",
    4: "a launch that the device refused",
    5: "threads that wait for ever",
}


def _capturing() -> bool:
    import torch

    return DEVICE == "cuda" and torch.cuda.is_current_stream_capturing()


def _may_wait(arguments: Arguments) -> bool:
    """Whether only the device knows if every problem is small enough."""
    p = arguments
    if not p.packed or not len(p.epsilon):
        return False
    lines = p.log_a.shape[0], p.log_b.shape[0]
    return not _within_reach(*lines, p.kind, p.gradient, p.x.device.index)


def _largest(arguments: Arguments) -> tuple[int, int]:
    """Bounds of n and m over the batch.

    The lengths of packed problems are on the device. They are waited for only where a problem
    could be too large, once for each pair of offsets.
    """
    p = arguments
    if p.cu_a is None or p.cu_b is None:
        return p.log_a.shape[1], p.log_b.shape[1]
    if not _may_wait(p):
        return p.log_a.shape[0], p.log_b.shape[0]
    if p.cu_a.is_inference() or p.cu_b.is_inference():
        # These tell nobody when they are changed.
        return _longest(p.cu_a, p.cu_b)
    versions = p.cu_a._version, p.cu_b._version
    known = _lengths().get(p.cu_a)
    if known is None or known[0]() is not p.cu_b or known[1] != versions:
        known = weakref.ref(p.cu_b), versions, _longest(p.cu_a, p.cu_b)
        _lengths()[p.cu_a] = known
    longest: tuple[int, int] = known[2]
    return longest


def _longest(cu_a: Tensor, cu_b: Tensor) -> tuple[int, int]:
    """Waits for the device."""
    import torch

    n, m = torch.stack([cu_a.diff().max(), cu_b.diff().max()]).tolist()
    return n, m


@functools.lru_cache(maxsize=1)
def _lengths() -> Any:
    """Offsets of side a, as long as somebody holds them -> those of side b, and what was read."""
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
