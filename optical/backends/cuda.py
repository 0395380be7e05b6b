"""CUDA backend: passes tensors to the kernels of ``csrc/cuda``, built by nvcc or NVRTC.

The kernels take the structures of ``csrc/sinkhorn.h`` with device pointers, and a stream. PyTorch's
allocator provides their memory. Calls do not synchronise with the device and can be captured in
CUDA graphs, with one exception: packed problems whose total length exceeds the largest supported
problem. Their longest lengths are read once per pair of offsets, and refused during capture.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from optical.backends import library, nvrtc, structs
from optical.backends.library import BuildError, Loaded
from optical.backends.problem import Problem, Solution, dtype_name

# Device type the kernels accept; tests set it to "cpu" to run the emulated build.
DEVICE = "cuda"
ERRORS = {
    1: "invalid arguments",
    3: "a size out of reach",
    4: "a launch that the device refused",
    5: "a deadlock",
}


# --------------------------------------------------------------------------------------- loading


@functools.lru_cache(maxsize=1)
def load() -> Loaded:
    """Load the CUDA kernels; the first call finds them, or builds them in the user's cache."""
    return library.attempt(_find_or_build, "the CUDA kernels cannot be built")


def _find_or_build() -> Any:
    if not torch.cuda.is_available():
        raise BuildError("PyTorch finds no CUDA device")
    folder = library.source_folder()
    source_hash = library.cuda_source_hash(folder) if folder else None
    missing = "no compiled CUDA kernels are installed"
    try:
        return library.open_installed(library.CUDA_LIBRARY, source_hash, missing)
    except BuildError as error:
        reason = str(error)
    if folder is None:
        raise BuildError(f"{reason} and their sources are not part of this installation")
    nvcc = library.find_nvcc()
    if nvcc is not None:
        try:
            return library.open_cached_cuda(folder, nvcc, _architectures())
        except BuildError as error:
            reason = str(error)
    compiler = nvrtc.find()
    if compiler is None:
        missing = "NVRTC was not" if nvcc else "neither nvcc nor NVRTC was"
        raise BuildError(f"{reason}, and {missing} found")
    cache = library.cache_folder()

    def cubin(kernel: str, architecture: str) -> bytes:
        return nvrtc.cached(
            lambda: nvrtc.compile_kernel(compiler, folder, kernel, architecture),
            repr((source_hash, kernel, architecture)),
            cache,
            library.build_lock(cache),
        )

    try:
        return nvrtc.Kernels(ctypes.CDLL("libcuda.so.1"), cubin)
    except OSError as error:
        raise BuildError(f"the CUDA driver cannot be loaded ({error})") from error


def _architectures() -> tuple[str, ...]:
    """Architectures of the devices PyTorch finds, such as "90"."""
    count = torch.cuda.device_count()
    capabilities = {torch.cuda.get_device_capability(index) for index in range(count)}
    return tuple(sorted(f"{major}{minor}" for major, minor in capabilities if major >= 8))


# --------------------------------------------------------------------------------------- support


def supports(problem: Problem) -> str | None:
    """Return None if the kernels can solve the problems, otherwise the reason they cannot."""
    device, dtype = problem.x.device, problem.log_a.dtype
    if device.type != DEVICE:
        return f"the tensors are on {device.type}; the CUDA kernels need a CUDA device"
    if dtype != torch.float32:
        return f"the problem is {dtype_name(dtype)}; the CUDA kernels compute in float32"
    if problem.anderson > 0:
        return "the CUDA kernels do not support anderson"
    if problem.gradient == "unroll" and problem.anneal_start > 0:
        return "gradient='unroll' does not undo annealing in the CUDA kernels"
    loaded = load()
    if loaded.library is None:
        return loaded.reason
    if _needs_lengths(problem) and _capturing():
        return (
            "the lengths of the packed problems must be read, since their total exceeds the "
            "largest problem that fits, and a CUDA graph is being captured"
        )
    n, m = _size_bounds(problem)
    if not _fits(n, m, problem.kind, problem.gradient, device.index):
        return f"a problem of {n} x {m} does not fit on the multiprocessors that may share one"
    return None


@functools.lru_cache(maxsize=4096)
def _fits(n: int, m: int, kind: str, gradient: str, device: int | None) -> bool:
    """Whether a problem of n x m fits on the multiprocessors that can share one."""
    kernels = load().library
    problem = structs.ProblemStruct(n=n, m=m)
    problem.kind, problem.gradient = structs.KIND_CODES[kind], structs.GRADIENT_CODES[gradient]
    with torch.cuda.device(-1 if device is None else device):
        return kernels is not None and bool(kernels.optical_cuda_reach(ctypes.byref(problem)))


def _capturing() -> bool:
    return DEVICE == "cuda" and torch.cuda.is_current_stream_capturing()


def _needs_lengths(problem: Problem) -> bool:
    """Whether the lengths of packed problems, known to the device only, decide if they fit."""
    if not problem.packed or not len(problem.epsilon):
        return False
    total = problem.log_a.shape[0], problem.log_b.shape[0]
    return not _fits(*total, problem.kind, problem.gradient, problem.x.device.index)


def _size_bounds(problem: Problem) -> tuple[int, int]:
    """Return upper bounds of n and m over the batch.

    The lengths of packed problems are on the device. They are read only if a problem could be too
    large, once per pair of offsets.
    """
    cu_a, cu_b = problem.cu_a, problem.cu_b
    if cu_a is None or cu_b is None:
        return problem.log_a.shape[1], problem.log_b.shape[1]
    if not _needs_lengths(problem):
        return problem.log_a.shape[0], problem.log_b.shape[0]
    if cu_a.is_inference() or cu_b.is_inference():
        # Inference tensors have no version counter, so a cached length could be stale.
        return _longest(cu_a, cu_b)
    versions = cu_a._version, cu_b._version
    cached = _longest_lengths.get(cu_a)
    if cached is None or cached[0]() is not cu_b or cached[1] != versions:
        cached = weakref.ref(cu_b), versions, _longest(cu_a, cu_b)
        _longest_lengths[cu_a] = cached
    longest: tuple[int, int] = cached[2]
    return longest


# Offsets cu_a -> (reference to cu_b, version counters of both, longest lengths).
_longest_lengths: Any = WeakTensorKeyDictionary()


def _longest(cu_a: Tensor, cu_b: Tensor) -> tuple[int, int]:
    """Read the longest lengths of both sides, which synchronises with the device."""
    n, m = torch.stack([cu_a.diff().max(), cu_b.diff().max()]).tolist()
    return n, m


# ----------------------------------------------------------------------------------------- calls


def forward(problem: Problem) -> Solution:
    """Solve a batch of problems whose tensors are on a CUDA device."""
    problem = _contiguous(problem)
    solution = Solution.allocate(problem)
    pointers = structs.address_struct(structs.SolutionStruct, solution._asdict())
    _call("optical_cuda_forward", problem, ctypes.byref(pointers))
    return solution


def backward(
    grad_value: Tensor,
    grad_value_linear: Tensor,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    problem: Problem,
    f: Tensor,
    g: Tensor,
    w: Tensor,
    z: Tensor,
    n_iter: Tensor,
    need_x: bool,
    need_y: bool,
    need_masses: bool = True,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients that ``problem.gradient`` names; f to n_iter are of its solution.

    Gradients that are not needed are None.
    """
    problem = _contiguous(problem)
    x, y, log_a, log_b = problem.x, problem.y, problem.log_a, problem.log_b
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
    grad_y = torch.empty_like(y) if need_y and y is not None else None
    grad_log_a = torch.empty_like(log_a) if need_masses else None
    grad_log_b = torch.empty_like(log_b) if need_masses else None
    history = None
    if problem.gradient == "unroll":
        history = log_a.new_empty((problem.max_iter + 1) * (log_a.numel() + log_b.numel()))
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
    pointers = structs.address_struct(structs.GradientStruct, tensors)
    _call("optical_cuda_backward", problem, ctypes.byref(pointers), structs.address(history))
    return grad_x, grad_y, grad_log_a, grad_log_b


def _contiguous(problem: Problem) -> Problem:
    """Make every tensor contiguous but a given cost, which may have any strides."""
    tensors: dict[str, Any] = {
        name: value.contiguous()
        for name, value in zip(Problem._fields, problem, strict=True)
        if isinstance(value, Tensor)
        and not value.is_contiguous()
        and (name != "x" or problem.kind != "given")
    }
    return problem._replace(**tensors) if tensors else problem


def _call(name: str, problem: Problem, *arguments: object) -> None:
    """Call a function of the library, between the problem and the current stream."""
    n, m = _size_bounds(problem)
    struct = structs.problem_struct(problem, n, m)
    function = getattr(structs.with_argument_types(load().require()), name)
    if DEVICE == "cpu":
        status = function(ctypes.byref(struct), *arguments, None)
    else:
        device = problem.x.device
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            status = function(ctypes.byref(struct), *arguments, stream)
    if status != 0:
        sizes = f"batch={struct.batch}, n={n}, m={m}"
        raise RuntimeError(f"{name} failed with {ERRORS.get(status, status)} ({sizes})")
