"""Compile the CUDA kernels with NVRTC and launch them through the CUDA driver, without nvcc.

NVRTC ships with the CUDA builds of PyTorch. Each kernel is compiled at its first use, in a few
seconds, and stored in the user's cache. ``Kernels`` has the interface of the library that nvcc
builds, so ``optical.backends.cuda`` uses either. ctypes calls NVRTC and the driver directly: a
dozen calls do not justify a dependency on cuda-python.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import enum
import functools
import hashlib
import math
import os
import re
import site
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

STDINT = """
typedef signed char int8_t; typedef unsigned char uint8_t;
typedef short int16_t; typedef unsigned short uint16_t;
typedef int int32_t; typedef unsigned int uint32_t;
typedef long long int64_t; typedef unsigned long long uint64_t;
typedef unsigned long long uintptr_t;
"""
OUT_OF_REACH, LAUNCH_FAILED = 3, 4  # error codes of csrc/cuda/sinkhorn.cu


class CompileError(RuntimeError):
    """NVRTC is missing or failed, or the driver refused a kernel."""


# ------------------------------------------------------------------------------------- compiling


def find() -> ctypes.CDLL | None:
    """Load NVRTC from the packages installed with PyTorch, else from the system."""
    for folder in map(Path, site.getsitepackages()):
        for path in sorted(folder.glob("nvidia/*/lib/libnvrtc.so.*"), reverse=True):
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(path))
    name = ctypes.util.find_library("nvrtc")
    with contextlib.suppress(OSError):
        return ctypes.CDLL(name) if name else None
    return None


def kernel_definitions(folder: Path) -> dict[str, str]:
    """Map the name of every kernel to the macro call in kernels.cuh that defines it."""
    text = (folder / "cuda" / "kernels.cuh").read_text(encoding="utf-8")
    definitions = re.findall(r"^(OPTICAL_(FORWARD|BACKWARD)\((\w+), .*\))$", text, re.MULTILINE)
    prefix = {"FORWARD": "optical_forward_", "BACKWARD": "optical_"}
    return {prefix[direction] + name: call for call, direction, name in definitions}


def compile_kernel(library: Any, folder: Path, kernel: str, architecture: str) -> bytes:
    """Compile one kernel to a cubin for an architecture such as "90".

    Raises:
        CompileError: NVRTC reported an error; the message contains the first one.
    """
    paths = {"../sinkhorn.h": folder / "sinkhorn.h"}
    paths |= {path.name: path for path in (folder / "cuda").glob("*.cuh")}
    headers = {name: path.read_bytes() for name, path in paths.items()} | {
        "stdint.h": STDINT.encode()
    }
    count = len(headers)
    texts = (ctypes.c_char_p * count)(*headers.values())
    names = (ctypes.c_char_p * count)(*(name.encode() for name in headers))
    program = ctypes.c_void_p()
    source = b'#include "kernels.cuh"\n'
    library.nvrtcCreateProgram(ctypes.byref(program), source, b"optical.cu", count, texts, names)
    # Without -default-device, NVRTC rejects the host functions that sinkhorn.h declares.
    options = ["-std=c++17", "-default-device", f"--gpu-architecture=sm_{architecture}"]
    options.append(f"-DOPTICAL_ONLY={kernel_definitions(folder)[kernel]}")
    option_array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    size = ctypes.c_size_t()
    try:
        if library.nvrtcCompileProgram(program, len(options), option_array) != 0:
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            lines = log.value.decode(errors="replace").strip().splitlines()
            error = next((line for line in lines if "error" in line), "".join(lines[:1]))
            raise CompileError(f"NVRTC failed: {error.strip()}")
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        library.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def cached(
    make: Callable[[], bytes],
    key: str,
    folder: Path,
    locked: contextlib.AbstractContextManager[Any],
) -> bytes:
    """Return the cached result of ``make`` for ``key``, or call ``make`` and store its result.

    The file begins with a digest of the rest; a damaged file is replaced.
    """
    path = folder / f"cuda-{hashlib.sha256(key.encode()).hexdigest()[:16]}.cubin"
    with locked:
        if path.is_file():
            digest, cubin = path.read_bytes()[:32], path.read_bytes()[32:]
            if digest == hashlib.sha256(cubin).digest():
                return cubin
        cubin = make()
        partial = folder / f".{path.name}.{os.getpid()}.tmp"
        try:
            partial.write_bytes(hashlib.sha256(cubin).digest() + cubin)
            os.replace(partial, path)
        except OSError:
            # On a full disk, the next process compiles the kernel again.
            partial.unlink(missing_ok=True)
        return cubin


# -------------------------------------------------------------------------------------- launching


# The regimes of kernels.cuh. Forward, a warp solves four or two small problems; backward, one.
FOUR, PAIR, WARP, SQUARE, BLOCK, CLUSTER = range(6)
NAMES = {
    "forward": ("four", "pair", "warp", "square", "block", "cluster"),
    "backward": ("", "small", "warp", "block", "block", "cluster"),
}
UNROLL = 2  # OPTICAL_UNROLL of csrc/sinkhorn.h


class LaunchConfig(NamedTuple):
    """The launch configuration of a regime.

    Attributes:
        number: the regime.
        down, across: the grid of warps in a block.
        blocks: blocks per cluster.
        bytes: shared memory per block.
        problems: problems per warp.
    """

    number: int
    down: int
    across: int
    blocks: int
    bytes: int
    problems: int

    def kernel(self, operation: str) -> str:
        """Name the kernel for ``operation``: "forward", "backward" or "unroll"."""
        names = NAMES["forward" if operation == "forward" else "backward"]
        return f"optical_{operation}_{names[self.number]}"


class Device(NamedTuple):
    """Launch limits of a device: bytes of shared memory per block, blocks per cluster."""

    shared: int
    clusters: int


# Additional shared memory per warp for iterations in half precision.
HALF_BYTES = 4 * (16 * 36 + 2 * 64)


def shared_bytes(number: int, down: int, across: int, kind: int, backward: int | None) -> int:
    """Compute the shared memory per block, as csrc/cuda does; a test compares the two.

    Args:
        number, down, across: the regime and its grid of warps.
        kind: the cost, 0 if given.
        backward: the gradient mode of a backward pass, None for a forward pass.
    """
    # The grid of lanes that share a problem within a warp, and the rows and columns of each lane.
    tall, wide, rows, columns = 4, 8, 16, 8
    if number <= PAIR:
        tall, wide, rows, columns = 4, 8, 8, 4
        if backward is None:
            tall, wide, rows, columns = (2, 4, 8, 4) if number == FOUR else (4, 4, 8, 8)
    owned = rows // wide + columns // tall
    threads = tall * wide * down * across
    block_entries = down * tall * rows + across * wide * columns
    exchange = 0 if number <= WARP else 2 * down * across * (32 * owned * 4 + 8 + 6 * 8)
    norms = 8 * block_entries if kind else 0
    costs, private = rows * columns * threads, (rows * columns + owned * 14) * threads
    if backward is None:
        # One chunk of float32 vectors, or two chunks of half vectors.
        half_chunk = 32 if tall * rows > 32 else 16
        float_bytes = 64 * (block_entries + 4) if kind else 0
        half_bytes = 4 * half_chunk * block_entries if kind else 0
        work = max(4 * private, float_bytes, half_bytes)
    else:
        work = 4 * (private + (costs if backward == UNROLL else 0))
        # Self terms, the gradient of the cost as pairs of halves, and chunks of vectors.
        rows, columns = down * tall * rows, across * wide * columns
        products = 4 * block_entries + 4 * rows * (columns + 8) + 64 * block_entries
        products += 64 * columns if number == CLUSTER else 0
        work = max(work, products if kind else 0)
    size = exchange + norms + work
    teams = 32 // (tall * wide)
    return size if teams == 1 else teams * (-(-size // 128) * 128 + 128 // teams)


@functools.cache
def largest_shared_bytes(number: int, warps: int, kind: int, backward: int | None) -> int:
    """Return the most shared memory that any grid of at most ``warps`` warps needs.

    One row of warps has the most columns to exchange, one column of warps the largest products of
    vectors.
    """
    grids = ((d, a) for d in range(1, warps + 1) for a in range(1, warps // d + 1))
    return max(shared_bytes(number, down, across, kind, backward) for down, across in grids)


@functools.cache
def max_warps(kind: int, backward: int | None, device: Device) -> int:
    """Return the largest number of 64 x 64 warp tiles that fit in one block."""
    fitting = (
        w
        for w in range(8, 0, -1)
        if largest_shared_bytes(CLUSTER, w, kind, backward) <= device.shared
    )
    return next(fitting, 0)


def tile_count(size: int) -> int:
    """Count the tiles of 64 rows or columns; an empty side has one empty tile."""
    return max(1, -(-size // 64))


def choose_launch(
    n: int, m: int, kind: int, backward: int | None, device: Device
) -> LaunchConfig | None:
    """Choose the launch of problems padded to n x m, or None where they do not fit."""
    warps, teams = max_warps(kind, backward, device), backward is None
    down, across = tile_count(n), tile_count(m)
    regime = None
    if warps and max(n, m) <= 16 and teams:
        regime = (FOUR, 1, 1, 1)
    elif warps and max(n, m) <= 32:
        regime = (PAIR, 1, 1, 1)
    elif warps and down * across == 1:
        regime = (WARP, 1, 1, 1)
    elif (down, across) == (2, 2) and warps >= 4:
        regime = (SQUARE, 2, 2, 1)
    elif down * across <= warps:
        regime = (BLOCK, down, across, 1)
    else:
        for blocks in (2, 4, 8):
            part = -(-down // blocks)
            if blocks <= device.clusters and part * across <= warps and regime is None:
                regime = (CLUSTER, part, across, blocks)
    return None if regime is None else _launch_config(*regime, kind, backward)


def _launch_config(
    number: int, down: int, across: int, blocks: int, kind: int, backward: int | None
) -> LaunchConfig:
    size = shared_bytes(number, down, across, kind, backward)
    problems = {FOUR: 4, PAIR: 2}.get(number, 1) if backward is None else 1
    return LaunchConfig(number, down, across, blocks, size, problems)


def choose_launches(problem: Any, backward: int | None, device: Device) -> Iterator[LaunchConfig]:
    """Yield one launch for padded problems, and one per possible regime for packed problems.

    The sizes of packed problems are on the device; n and m are upper bounds.
    """
    largest = choose_launch(problem.n, problem.m, problem.kind, backward, device)
    if largest is None or not problem.offset_a:
        if largest is not None:
            yield largest
        return
    warps, teams = max_warps(problem.kind, backward, device), backward is None
    longest = max(problem.n, problem.m)
    regimes = [(FOUR, 1, 1, 1)] if teams else []
    regimes += [(PAIR, 1, 1, 1)] if longest > 16 or not teams else []
    regimes += [(WARP, 1, 1, 1)] if longest > 32 else []
    regimes += [(SQUARE, 2, 2, 1)] if longest > 64 and warps >= 4 else []
    regimes += [(BLOCK, 1, warps, 1)] if longest > 64 else []
    regimes += [(CLUSTER, 1, warps, blocks) for blocks in (2, 4, 8) if blocks <= largest.blocks]
    for regime in regimes:
        launch = _launch_config(*regime, problem.kind, backward)
        if launch.number >= BLOCK:
            # A problem may use any grid with this number of warps.
            most = largest_shared_bytes(launch.number, warps, problem.kind, backward)
            launch = launch._replace(bytes=most)
        yield launch


class DeviceAttribute(enum.IntEnum):
    """The values of CUdevice_attribute used here."""

    COMPUTE_CAPABILITY_MAJOR = 75
    COMPUTE_CAPABILITY_MINOR = 76
    MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97


FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # of CUfunction_attribute
LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION = 4  # of CUlaunchAttributeID


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _DriverConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("count", ctypes.c_uint),
    ]


class _Limits(ctypes.Structure):
    """Limits of csrc/cuda/kernels.cuh."""

    _fields_ = [("warps", ctypes.c_int), ("blocks", ctypes.c_int), ("warp_teams", ctypes.c_int)]


class Kernels:
    """The functions of csrc/cuda/sinkhorn.cu, implemented with driver calls.

    Args:
        driver: libcuda, or a test double.
        cubin: maps the name of a kernel and an architecture to its binary.
    """

    def __init__(self, driver: Any, cubin: Callable[[str, str], bytes]) -> None:
        self.driver, self.cubin = driver, cubin
        self.function = functools.lru_cache(maxsize=None)(self._function)
        self.device = functools.lru_cache(maxsize=None)(self._device)

    def _attribute(self, name: DeviceAttribute, device: int) -> int:
        value = ctypes.c_int()
        self._check(self.driver.cuDeviceGetAttribute(ctypes.byref(value), name, device))
        return value.value

    def _check(self, status: int) -> None:
        if status != 0:
            raise CompileError(f"the CUDA driver answered with error {status}")

    def _current(self) -> int:
        device = ctypes.c_int()
        self._check(self.driver.cuCtxGetDevice(ctypes.byref(device)))
        return device.value

    def _device(self, device: int) -> Device:
        shared = self._attribute(DeviceAttribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device)
        major = self._attribute(DeviceAttribute.COMPUTE_CAPABILITY_MAJOR, device)
        return Device(shared, 8 if major >= 9 else 1)

    def _function(self, name: str, device: int) -> Any:
        major = self._attribute(DeviceAttribute.COMPUTE_CAPABILITY_MAJOR, device)
        minor = self._attribute(DeviceAttribute.COMPUTE_CAPABILITY_MINOR, device)
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        binary = self.cubin(name, f"{major}{minor}")
        self._check(self.driver.cuModuleLoadData(ctypes.byref(module), binary))
        self._check(self.driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
        attribute = FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        shared = self.device(device).shared
        self._check(self.driver.cuFuncSetAttribute(function, attribute, shared))
        return function

    def optical_cuda_reach(self, problem: Any) -> bool:
        problem, device = problem._obj, self.device(self._current())
        return all(
            choose_launch(problem.n, problem.m, problem.kind, backward, device)
            for backward in (None, problem.gradient)
        )

    def optical_cuda_forward(self, problem: Any, solution: Any, stream: int | None) -> int:
        return self._launch("forward", None, problem._obj, [solution._obj], stream)

    def optical_cuda_backward(
        self, problem: Any, gradient: Any, history: int | None, stream: int | None
    ) -> int:
        problem = problem._obj
        operation = "unroll" if problem.gradient == UNROLL else "backward"
        others = [gradient._obj, ctypes.c_void_p(history)]
        return self._launch(operation, problem.gradient, problem, others, stream)

    @staticmethod
    def _use_half_precision(problem: Any) -> bool:
        """The rule of csrc/cuda/sinkhorn.cu."""
        penalty = math.isfinite(problem.rho_a) or math.isfinite(problem.rho_b)
        plain = not penalty and problem.omega == 1 and not problem.anneal_start > 0
        return bool(problem.fast) and problem.max_iter >= 16 and plain

    def _launch(
        self, operation: str, backward: int | None, problem: Any, others: list[Any], stream: Any
    ) -> int:
        if problem.batch == 0:
            return 0
        current = self._current()
        device = self.device(current)
        warps = max_warps(problem.kind, backward, device)
        launched = False
        for launch in choose_launches(problem, backward, device):
            launched = True
            kernel, size = launch.kernel(operation), launch.bytes
            may_be_fast = operation == "forward" and launch.number >= WARP
            if may_be_fast and self._use_half_precision(problem):
                fast_size = size + HALF_BYTES * launch.down * launch.across
                if fast_size <= device.shared:
                    kernel, size = kernel.replace("forward", "forward_fast"), fast_size
            function = self.function(kernel, current)
            limits = _Limits(warps, device.clusters, operation == "forward")
            values = [problem, *others, limits, ctypes.c_int(launch.number)]
            addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(x) for x in values))
            cluster = _LaunchAttribute(id=LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
            cluster.value[0], cluster.value[1], cluster.value[2] = launch.blocks, 1, 1
            config = _DriverConfig(
                *(-(-problem.batch // launch.problems) * launch.blocks, 1, 1),
                *(32 * launch.down * launch.across, 1, 1),
                *(size, stream, ctypes.pointer(cluster), int(launch.blocks > 1)),
            )
            if self.driver.cuLaunchKernelEx(ctypes.byref(config), function, addresses, None) != 0:
                return LAUNCH_FAILED
        return 0 if launched else OUT_OF_REACH
