"""CUDA backend: passes tensors to the kernels of ``csrc/cuda``, built by nvcc or NVRTC.

The kernels take the structures of ``csrc/sinkhorn.h`` with device pointers, and a stream. PyTorch's
allocator provides their memory. Calls do not synchronise with the device and can be captured in
CUDA graphs, with one exception: packed problems whose total length exceeds the largest supported
problem. Their longest lengths are read once per pair of offsets, and refused during capture.

Whether a device runs the kernels is asked once per device, by loading one. The reason it does not
is that of ``supports``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from optical.backends import library, nvrtc, structs
from optical.backends.library import BuildError, Loaded
from optical.backends.problem import Problem, Solution, dtype_name
from optical.io import nvidia
from optical.io import nvrtc as compiler

# Device type the kernels accept; tests set it to "cpu" to run the emulated build.
DEVICE = "cuda"
ERRORS = {
    1: "invalid arguments",
    3: "a size out of reach",
    4: "a launch that the device refused",
    5: "a deadlock",
    6: "a write past the end of shared memory",
}


# --------------------------------------------------------------------------------------- loading


@functools.lru_cache(maxsize=64)
def load(device: int | None = None) -> Loaded:
    """Load kernels that a device runs: those of the installation, else those that NVRTC compiles.

    The answer, also a failure, holds for the process.
    """
    return library.attempt(
        functools.partial(_find, device or 0), "the CUDA kernels cannot be loaded"
    )


def _find(device: int) -> Any:
    """Return the functions of ``csrc/cuda/sinkhorn.cu`` for a device.

    Raises:
        BuildError: none run on the device; the message gives the reasons.
    """
    missing = nvidia.missing_device()
    if missing is not None:
        raise BuildError(f"{missing}; the CUDA kernels need an NVIDIA device")
    obstacle = _failures.get(device) or nvidia.capability_obstacle(device)
    if obstacle is not None:
        raise BuildError(obstacle)
    reasons = []
    for find in (_installed, _compiled):
        try:
            kernels = find()
            probe(kernels, device)
            return kernels
        except (BuildError, nvidia.DriverError, compiler.CompileError) as error:
            reasons.append(str(error))
    raise BuildError(", and ".join(reasons))


# Devices for which a kernel could not be compiled although the probe could, and the errors.
_failures: dict[int, str] = {}


@functools.cache
def _installed() -> Any:
    """Open the library that nvcc built when the package was installed."""
    folder = library.source_folder()
    source_hash = library.cuda_source_hash(folder) if folder else None
    missing = "no compiled CUDA kernels are installed"
    opened = library.open_installed(library.CUDA_LIBRARY, source_hash, missing)
    if not hasattr(opened, "optical_cuda_probe"):
        raise BuildError(f"{library.CUDA_LIBRARY} was built from other sources")
    return structs.with_argument_types(opened)


@functools.cache
def _compiled() -> nvrtc.Kernels:
    """Return the kernels that NVRTC compiles and the driver launches."""
    folder, found = library.source_folder(), compiler.find()
    if folder is None:
        raise BuildError("the sources of the kernels are not part of this installation")
    if found is None:
        raise BuildError("NVRTC, the compiler of the CUDA builds of PyTorch, was not found")
    driver = nvidia.Driver(ctypes.CDLL(nvidia.DRIVER))
    return nvrtc.Kernels(driver, Cubins(found).compile)


class Cubins:
    """Binaries of the kernels, which NVRTC compiles and the user's cache keeps.

    Args:
        found: NVRTC.
    """

    def __init__(self, found: Any) -> None:
        folder = library.source_folder()
        assert folder is not None
        self.found, self.folder = found, folder
        self.cache = library.cache_folder()
        self.identity = library.cuda_source_hash(folder), compiler.version(found)

    def key(self, kernel: str, architecture: str) -> str:
        """Return what identifies a binary in the cache."""
        return repr((*self.identity, kernel, architecture))

    def compile(self, kernels: Sequence[str], capability: tuple[int, int]) -> list[bytes]:
        """Return the binaries of kernels; those that the cache lacks are compiled in parallel.

        Raises:
            CompileError: NVRTC failed, now or when it compiled the same kernel before.
        """
        architecture = compiler.architecture(self.found, capability)
        if list(kernels) == [nvrtc.PROBE]:
            self._recall_failures(architecture)
        files = [
            compiler.cache_file(self.key(kernel, architecture), self.cache) for kernel in kernels
        ]
        fresh = sum(not file.is_file() for file in files)
        announced: Any = contextlib.nullcontext()
        if fresh and list(kernels) != [nvrtc.PROBE]:
            seconds = "5 to 30 seconds of a core each"
            what = f"{fresh} of its CUDA kernels for sm_{architecture} once, {seconds}"
            announced = library.announced(what, self.cache)
        with announced:
            return compiler.compile_all(
                functools.partial(self._compile_one, architecture=architecture), kernels
            )

    def _compile_one(self, kernel: str, architecture: str) -> bytes:
        key = self.key(kernel, architecture)
        lock = f".{compiler.cache_file(key, self.cache).stem}.lock"
        with contextlib.ExitStack() as stack:
            with library.said_if_waiting(self.cache):
                stack.enter_context(library.build_lock(self.cache, lock))
            return compiler.cached(
                lambda: nvrtc.compile_kernel(self.found, self.folder, kernel, architecture),
                key,
                self.cache,
            )

    def _recall_failures(self, architecture: str) -> None:
        """Raise the error of a kernel that could not be compiled before."""
        for kernel in nvrtc.kernel_definitions(self.folder):
            known = compiler.known_failure(self.key(kernel, architecture), self.cache)
            if known is not None:
                raise compiler.CompileError(known)


class Answer(NamedTuple):
    """Limits of a device, and its compute capability, such as 90."""

    limits: nvrtc.Device
    capability: int


def probe(kernels: Any, device: int) -> Answer:
    """Load a kernel on a device and ask for its limits.

    Raises:
        BuildError: the device does not run the kernels; the message contains CUDA's own.
        CompileError, DriverError: the same, from NVRTC and the driver.
    """
    answers = (ctypes.c_int * 5)()
    with _on(device):
        status = kernels.optical_cuda_probe(answers)
    shared, clusters, driver, runtime, capability = answers
    if status == 0:
        return Answer(nvrtc.Device(shared, clusters), capability)
    text = error_text(kernels)
    if driver < runtime:
        supported, needed = nvidia.version_text(driver), nvidia.version_text(runtime)
        text = (
            f"the NVIDIA driver supports CUDA {supported}, and {library.CUDA_LIBRARY} was built "
            f"with {needed} ({text})"
        )
        raise BuildError(text)
    raise BuildError(f"{library.CUDA_LIBRARY} does not run on this device ({text})")


def error_text(kernels: Any) -> str:
    """Return CUDA's text of the error that the last call met, or ""."""
    text: bytes = kernels.optical_cuda_error()
    return text.decode(errors="replace")


def _on(device: int | None) -> contextlib.AbstractContextManager[Any]:
    """Make a device the current one."""
    if DEVICE == "cpu":
        return contextlib.nullcontext()
    return torch.cuda.device(-1 if device is None else device)


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
    loaded = load(device.index)
    if loaded.library is None:
        return loaded.reason
    try:
        return _size_obstacle(problem, loaded.library)
    except (DeviceError, nvidia.DriverError) as error:
        return f"the CUDA device does not answer ({error})"


class DeviceError(RuntimeError):
    """The CUDA runtime refused a call; the message is its own text."""


def _size_obstacle(problem: Problem, kernels: Any) -> str | None:
    """Return why the sizes of the problems are not supported, or None."""
    if _needs_lengths(problem) and _capturing():
        return (
            "the lengths of the packed problems must be read, since their total exceeds the "
            "largest problem that fits, and a CUDA graph is being captured"
        )
    n, m = _size_bounds(problem)
    if _fits(n, m, problem.kind, problem.gradient, problem.x.device.index):
        return None
    return _misfit(n, m, problem, kernels)


@functools.lru_cache(maxsize=4096)
def _fits(n: int, m: int, kind: str, gradient: str, device: int | None) -> bool:
    """Whether a problem of n x m fits on the multiprocessors that can share one.

    Raises:
        DeviceError, DriverError: the device does not answer.
    """
    kernels = load(device).require()
    problem = structs.ProblemStruct(n=n, m=m)
    problem.kind, problem.gradient = structs.KIND_CODES[kind], structs.GRADIENT_CODES[gradient]
    with _on(device):
        reached = kernels.optical_cuda_reach(ctypes.byref(problem))
    if reached < 0:
        raise DeviceError(error_text(kernels))
    return bool(reached)


def _misfit(n: int, m: int, problem: Problem, kernels: Any) -> str:
    """Explain why a problem of n x m does not fit."""
    limits, capability = probe(kernels, problem.x.device.index or 0)
    kind = structs.KIND_CODES[problem.kind]
    gradients = None, structs.GRADIENT_CODES[problem.gradient]
    whole = limits._replace(clusters=8)
    subject = f"a problem of {n} x {m} does not fit on"
    if any(nvrtc.choose_launch(n, m, kind, gradient, whole) is None for gradient in gradients):
        return f"{subject} the multiprocessors that may share one"
    if 0 < capability < 90:
        return f"{subject} one multiprocessor; from compute capability 9.0 on, several share one"
    return (
        f"{subject} the {limits.clusters} multiprocessors that may share one on this device, which "
        "is small or a slice (MIG); whole devices share 8"
    )


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
    device = problem.x.device
    kernels = load(device.index).require()
    function = getattr(kernels, name)
    with _on(device.index):
        stream = None if DEVICE == "cpu" else torch.cuda.current_stream(device).cuda_stream
        try:
            status = function(ctypes.byref(struct), *arguments, stream)
        except compiler.CompileError as error:
            # The next call asks again whether the device is supported, and gets this reason.
            _failures[device.index or 0] = str(error)
            load.cache_clear()
            raise
    if status != 0:
        sizes = f"batch={struct.batch}, n={n}, m={m}"
        text = error_text(kernels)
        reason = f"{ERRORS.get(status, status)}, {text}" if text else ERRORS.get(status, status)
        raise RuntimeError(f"{name} failed with {reason} ({sizes})")
