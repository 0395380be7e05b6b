"""Compile the CUDA kernels with NVRTC and launch them through the CUDA driver, without nvcc.

NVRTC ships with the CUDA builds of PyTorch. Each kernel is compiled at its first use, in a few
seconds, and stored in the user's cache; the kernels of one call are compiled in parallel.
``Kernels`` has the interface of the library that nvcc builds, so ``optical.backends.cuda`` uses
either. ctypes calls NVRTC and the driver directly: a dozen calls do not justify a dependency on
cuda-python.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from optical.io.nvidia import DeviceAttribute, Driver, DriverError
from optical.io.nvrtc import compile_source

OUT_OF_REACH, LAUNCH_FAILED = 3, 4  # error codes of csrc/cuda/sinkhorn.cu
# A kernel without work, which shows whether a device runs what NVRTC compiles from these sources.
PROBE = "optical_probe"
PROBE_DEFINITION = f"OPTICAL_KERNEL({PROBE},256)(){{}}"


# ------------------------------------------------------------------------------------- compiling


def kernel_definitions(folder: Path) -> dict[str, str]:
    """Map the name of every kernel to the macro call in kernels.cuh that defines it."""
    text = (folder / "cuda" / "kernels.cuh").read_text(encoding="utf-8")
    definitions = re.findall(r"^(OPTICAL_(FORWARD|BACKWARD)\((\w+), .*\))$", text, re.MULTILINE)
    prefix = {"FORWARD": "optical_forward_", "BACKWARD": "optical_"}
    return {prefix[direction] + name: call for call, direction, name in definitions}


def compile_kernel(library: Any, folder: Path, kernel: str, architecture: str) -> bytes:
    """Compile one kernel, or ``PROBE``, to a cubin for an architecture such as "90a".

    Raises:
        CompileError: NVRTC reported an error; the message contains the first one.
    """
    paths = {"../sinkhorn.h": folder / "sinkhorn.h"}
    paths |= {path.name: path for path in (folder / "cuda").glob("*.cuh")}
    headers = {name: path.read_bytes() for name, path in paths.items()}
    definition = (kernel_definitions(folder) | {PROBE: PROBE_DEFINITION})[kernel]
    # Without -default-device, NVRTC rejects the host functions that sinkhorn.h declares.
    options = ["-std=c++17", "-default-device", f"--gpu-architecture=sm_{architecture}"]
    options.append(f"-DOPTICAL_ONLY={definition}")
    return compile_source(library, '#include "kernels.cuh"\n', headers, options)


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


class Launch(NamedTuple):
    """The arguments of a launch that do not depend on the batch."""

    kernel: str
    number: int
    threads: int
    blocks: int
    bytes: int
    problems: int


class Sizes(NamedTuple):
    """Sizes that decide the launches of a problem; n and m are upper bounds if it is packed."""

    n: int
    m: int
    kind: int
    offset_a: bool


@functools.lru_cache(maxsize=4096)
def plan_launches(
    sizes: Sizes, operation: str, backward: int | None, fast: bool, device: Device
) -> tuple[Launch, ...]:
    """List the launches of a batch; none if its problems may be too large.

    Args:
        sizes: of the problems.
        operation: "forward", "backward" or "unroll".
        backward: the gradient mode of a backward pass, None for a forward pass.
        fast: iterations in half precision are allowed.
        device: the limits of the device.
    """
    launches = []
    for launch in choose_launches(sizes, backward, device):
        kernel, size = launch.kernel(operation), launch.bytes
        if fast and operation == "forward" and launch.number >= WARP:
            fast_size = size + HALF_BYTES * launch.down * launch.across
            if fast_size <= device.shared:
                kernel, size = kernel.replace("forward", "forward_fast"), fast_size
        threads = 32 * launch.down * launch.across
        blocks, problems = launch.blocks, launch.problems
        launches.append(Launch(kernel, launch.number, threads, blocks, size, problems))
    return tuple(launches)


class Kernels:
    """The functions of csrc/cuda/sinkhorn.cu, implemented with driver calls.

    Args:
        driver: the CUDA driver.
        cubins: maps the names of kernels and the capability of a device to their binaries. Called
            once for all kernels that a call needs and that are not loaded yet.
    """

    def __init__(
        self, driver: Driver, cubins: Callable[[Sequence[str], tuple[int, int]], list[bytes]]
    ) -> None:
        self.driver, self.cubins = driver, cubins
        self.loaded: dict[tuple[str, int], Any] = {}
        self.limits: dict[int, Device] = {}
        self.error = b""

    def device(self, index: int) -> Device:
        """Return the limits of a device, after loading a kernel without work.

        Raises:
            CompileError: NVRTC cannot compile for the device.
            DriverError: the driver does not load what NVRTC compiles.
        """
        if index not in self.limits:
            shared = self.driver.attribute(DeviceAttribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, index)
            (probe,) = self._functions([PROBE], index, shared)
            self.limits[index] = Device(shared, self._largest_cluster(probe, index, shared))
        return self.limits[index]

    def _largest_cluster(self, probe: Any, index: int, shared: int) -> int:
        """As ``largest_cluster`` of csrc/cuda/sinkhorn.cu."""
        if self.driver.capability(index) < (9, 0):
            return 1
        for blocks in (8, 4, 2):
            config, count = _config(blocks, 256, shared, None, blocks), ctypes.c_int()
            with contextlib.suppress(DriverError):
                self.driver.call(
                    *("cuOccupancyMaxActiveClusters", ctypes.byref(count), probe),
                    ctypes.byref(config),
                )
            if count.value > 0:
                return blocks
        return 1

    def functions(self, names: Sequence[str], index: int) -> list[Any]:
        """Return kernels on a device, which are compiled and loaded at their first use."""
        if all((name, index) in self.loaded for name in names):
            return [self.loaded[name, index] for name in names]
        return self._functions(names, index, self.device(index).shared)

    def _functions(self, names: Sequence[str], index: int, shared: int) -> list[Any]:
        missing = [name for name in dict.fromkeys(names) if (name, index) not in self.loaded]
        binaries = self.cubins(missing, self.driver.capability(index))
        with self.driver.relaxed_capture():
            for name, binary in zip(missing, binaries, strict=True):
                module, function = ctypes.c_void_p(), ctypes.c_void_p()
                self.driver.call("cuModuleLoadData", ctypes.byref(module), binary)
                self.driver.call(
                    "cuModuleGetFunction", ctypes.byref(function), module, name.encode()
                )
                attribute = FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self.driver.call("cuFuncSetAttribute", function, attribute, shared)
                self.loaded[name, index] = function
        return [self.loaded[name, index] for name in names]

    def optical_cuda_error(self) -> bytes:
        return self.error

    def optical_cuda_probe(self, answers: Any) -> int:
        current = self.driver.current()
        answers[0], answers[1] = self.device(current)
        major, minor = self.driver.capability(current)
        answers[4] = 10 * major + minor
        return 0

    def optical_cuda_reach(self, problem: Any) -> bool:
        problem, device = problem._obj, self.device(self.driver.current())
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
        current = self.driver.current()
        device = self.device(current)
        sizes = Sizes(problem.n, problem.m, problem.kind, bool(problem.offset_a))
        fast = self._use_half_precision(problem)
        launches = plan_launches(sizes, operation, backward, fast, device)
        functions = self.functions([launch.kernel for launch in launches], current)
        warps = max_warps(problem.kind, backward, device)
        limits = _Limits(warps, device.clusters, operation == "forward")
        for launch, function in zip(launches, functions, strict=True):
            values = [problem, *others, limits, ctypes.c_int(launch.number)]
            addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(x) for x in values))
            grid = -(-problem.batch // launch.problems) * launch.blocks
            config = _config(grid, launch.threads, launch.bytes, stream, launch.blocks)
            try:
                self.driver.call(
                    "cuLaunchKernelEx", ctypes.byref(config), function, addresses, None
                )
            except DriverError as error:
                self.error = str(error).encode()
                return LAUNCH_FAILED
        return 0 if launches else OUT_OF_REACH


def _config(grid: int, threads: int, size: int, stream: Any, blocks: int) -> _DriverConfig:
    """Describe a launch of ``grid`` blocks, in clusters of ``blocks``."""
    cluster = _LaunchAttribute(id=LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
    cluster.value[0], cluster.value[1], cluster.value[2] = blocks, 1, 1
    return _DriverConfig(
        *(grid, 1, 1, threads, 1, 1),
        *(size, stream, ctypes.pointer(cluster), int(blocks > 1)),
    )
