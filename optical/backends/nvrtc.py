"""The CUDA kernels where there is no nvcc: compiled by NVRTC, launched through the driver.

NVRTC comes with the CUDA builds of PyTorch. It compiles a kernel when it is first used, in a few
seconds, and the result is kept in the cache of the user. ``Kernels`` offers the calls of the
library that nvcc builds, so ``optical.backends.cuda`` does not notice which of them it has. Both are reached
by ctypes: the packages that wrap them would be a dependency more for a dozen calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
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
OUT_OF_REACH, LAUNCH_FAILED = 3, 4  # as in csrc/cuda/sinkhorn.cu


class CompileError(RuntimeError):
    """NVRTC is missing or failed, or the driver refused a kernel; the message says why."""


# ------------------------------------------------------------------------------------- compiling


def find() -> ctypes.CDLL | None:
    """NVRTC: the one that came with PyTorch, or one of the system."""
    for place in map(Path, site.getsitepackages()):
        for path in sorted(place.glob("nvidia/*/lib/libnvrtc.so.*"), reverse=True):
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(path))
    name = ctypes.util.find_library("nvrtc")
    with contextlib.suppress(OSError):
        return ctypes.CDLL(name) if name else None
    return None


def kernels(folder: Path) -> dict[str, str]:
    """Every kernel, and the line of kernels.cuh that defines it."""
    text = (folder / "cuda" / "kernels.cuh").read_text(encoding="utf-8")
    lines = re.findall(r"^(OPTICAL_(FORWARD|BACKWARD)\((\w+), .*\))$", text, re.MULTILINE)
    prefix = {"FORWARD": "optical_forward_", "BACKWARD": "optical_"}
    return {prefix[kind] + name: line for line, kind, name in lines}


def compile_kernel(library: Any, folder: Path, kernel: str, architecture: str) -> bytes:
    """The cubin of one kernel for an architecture such as "90".

    Raises:
        CompileError: NVRTC found an error, which the message holds.
    """
    names = {"../sinkhorn.h": folder / "sinkhorn.h"}
    names |= {path.name: path for path in (folder / "cuda").glob("*.cuh")}
    headers = {name: path.read_bytes() for name, path in names.items()} | {
        "stdint.h": STDINT.encode()
    }
    count = len(headers)
    texts = (ctypes.c_char_p * count)(*headers.values())
    titles = (ctypes.c_char_p * count)(*(name.encode() for name in headers))
    program = ctypes.c_void_p()
    source = b'#include "kernels.cuh"\n'
    library.nvrtcCreateProgram(ctypes.byref(program), source, b"optical.cu", count, texts, titles)
    # The C functions that sinkhorn.h declares are nobody's here.
    options = ["-std=c++17", "-default-device", f"--gpu-architecture=sm_{architecture}"]
    options.append(f"-DOPTICAL_ONLY={kernels(folder)[kernel]}")
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    size = ctypes.c_size_t()
    try:
        if library.nvrtcCompileProgram(program, len(options), given) != 0:
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
    """What ``make`` returns, from the file of that key if it was made before.

    The file begins with a digest of the rest, so that a damaged one is made anew.
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
            # A full disk costs the next process some seconds, and this one nothing.
            partial.unlink(missing_ok=True)
        return cubin


# -------------------------------------------------------------------------------------- launching


# As in kernels.cuh: several problems in a warp, which has one of them in a backward pass.
FOUR, PAIR, WARP, SQUARE, BLOCK, CLUSTER = range(6)
NAMES = {
    "forward": ("four", "pair", "warp", "square", "block", "cluster"),
    "backward": ("", "small", "warp", "block", "block", "cluster"),
}


class Plan(NamedTuple):
    """What is launched: the regime, its grid of warps, blocks to a cluster, shared memory, and
    problems in a warp."""

    number: int
    down: int
    across: int
    blocks: int
    bytes: int
    problems: int

    def kernel(self, what: str) -> str:
        """Its name for "forward", "backward" or "unroll"."""
        names = NAMES["forward" if what == "forward" else "backward"]
        return f"optical_{what}_{names[self.number]}"


class Device(NamedTuple):
    """Bytes of shared memory that a block may have, and blocks that a cluster may have."""

    shared: int
    clusters: int


# Of a warp, for iterations in half precision.
HALF_BYTES = 4 * (16 * 36 + 2 * 64)


def shared_bytes(number: int, down: int, across: int, kind: int, backward: int | None) -> int:
    """As in csrc/cuda, of which a test sees that the two agree; ``backward``: its gradient."""
    # Of a warp: the grid of the lanes that have a problem, and the entries of each.
    tall, wide, rows, columns = 4, 8, 16, 8
    if number <= PAIR:
        tall, wide, rows, columns = 4, 8, 8, 4
        if backward is None:
            tall, wide, rows, columns = (2, 4, 8, 4) if number == FOUR else (4, 4, 8, 8)
    owned = rows // wide + columns // tall
    threads = tall * wide * down * across
    lines = down * tall * rows + across * wide * columns
    exchanged = 0 if number <= WARP else 2 * down * across * (32 * owned * 4 + 8 + 6 * 8)
    measured = 8 * lines if kind else 0
    entries, kept = rows * columns * threads, (rows * columns + owned * 14) * threads
    if backward is None:
        # float32 vectors a chunk at a time, half ones two chunks.
        half_chunk = 32 if tall * rows > 32 else 16
        work = max(4 * kept, 64 * (lines + 4) if kind else 0, 4 * half_chunk * lines if kind else 0)
    else:
        work = 4 * (kept + (entries if backward == 2 else 0))
        # What lines have along themselves, the gradient of the cost in halves, chunks of vectors.
        rows, columns = down * tall * rows, across * wide * columns
        products = 4 * lines + 4 * rows * (columns + 8) + 64 * lines
        products += 64 * columns if number == CLUSTER else 0
        work = max(work, products if kind else 0)
    size = exchanged + measured + work
    teams = 32 // (tall * wide)
    return size if teams == 1 else teams * (-(-size // 128) * 128 + 128 // teams)


def most_warps(kind: int, backward: int | None, device: Device) -> int:
    """Of 64 x 64 tiles, in one block."""
    fitting = (
        w for w in range(8, 0, -1) if shared_bytes(CLUSTER, 1, w, kind, backward) <= device.shared
    )
    return next(fitting, 0)


def tiles(lines: int) -> int:
    """Of 64 lines, along a side; a side without lines has one that is empty."""
    return max(1, -(-lines // 64))


def plan(n: int, m: int, kind: int, backward: int | None, device: Device) -> Plan | None:
    """For problems padded to n x m; None where they do not fit."""
    most, several = most_warps(kind, backward, device), backward is None
    down, across = tiles(n), tiles(m)
    found = None
    if most and max(n, m) <= 16 and several:
        found = (FOUR, 1, 1, 1)
    elif most and max(n, m) <= 32:
        found = (PAIR, 1, 1, 1)
    elif most and down * across == 1:
        found = (WARP, 1, 1, 1)
    elif (down, across) == (2, 2) and most >= 4:
        found = (SQUARE, 2, 2, 1)
    elif down * across <= most:
        found = (BLOCK, down, across, 1)
    else:
        for blocks in (2, 4, 8):
            part = -(-down // blocks)
            if blocks <= device.clusters and part * across <= most and found is None:
                found = (CLUSTER, part, across, blocks)
    return None if found is None else _sized(*found, kind, backward)


def _sized(
    number: int, down: int, across: int, blocks: int, kind: int, backward: int | None
) -> Plan:
    size = shared_bytes(number, down, across, kind, backward)
    problems = {FOUR: 4, PAIR: 2}.get(number, 1) if backward is None else 1
    return Plan(number, down, across, blocks, size, problems)


def plans(problem: Any, backward: int | None, device: Device) -> Iterator[Plan]:
    """One for padded problems; for packed ones, one for each regime that n and m leave open."""
    largest = plan(problem.n, problem.m, problem.kind, backward, device)
    if largest is None or not problem.offset_a:
        if largest is not None:
            yield largest
        return
    most, several = most_warps(problem.kind, backward, device), backward is None
    longest = max(problem.n, problem.m)
    open_ = [(FOUR, 1, 1, 1)] if several else []
    open_ += [(PAIR, 1, 1, 1)] if longest > 16 or not several else []
    open_ += [(WARP, 1, 1, 1)] if longest > 32 else []
    open_ += [(SQUARE, 2, 2, 1)] if longest > 64 and most >= 4 else []
    # Any grid of so many warps may turn up; in one row it needs the most.
    open_ += [(BLOCK, 1, most, 1)] if longest > 64 else []
    open_ += [(CLUSTER, 1, most, blocks) for blocks in (2, 4, 8) if blocks <= largest.blocks]
    for found in open_:
        yield _sized(*found, problem.kind, backward)


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


class _Limits(ctypes.Structure):
    _fields_ = [("warps", ctypes.c_int), ("blocks", ctypes.c_int), ("several", ctypes.c_int)]


class Kernels:
    """The calls of csrc/cuda/sinkhorn.cu, by the driver.

    driver: libcuda, or what stands in for it. cubin: kernel, architecture -> its binary.
    """

    def __init__(self, driver: Any, cubin: Callable[[str, str], bytes]) -> None:
        self.driver, self.cubin = driver, cubin
        self.function = functools.lru_cache(maxsize=None)(self._function)
        self.device = functools.lru_cache(maxsize=None)(self._device)

    def _attribute(self, name: int, device: int) -> int:
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
        # Shared memory per block on request, and the major compute capability.
        return Device(self._attribute(97, device), 8 if self._attribute(75, device) >= 9 else 1)

    def _function(self, name: str, device: int) -> Any:
        architecture = f"{self._attribute(75, device)}{self._attribute(76, device)}"
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        binary = self.cubin(name, architecture)
        self._check(self.driver.cuModuleLoadData(ctypes.byref(module), binary))
        self._check(self.driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
        self._check(self.driver.cuFuncSetAttribute(function, 8, self.device(device).shared))
        return function

    def optical_cuda_reach(self, problem: Any) -> bool:
        p, device = problem._obj, self.device(self._current())
        return all(plan(p.n, p.m, p.kind, way, device) for way in (None, p.gradient))

    def optical_cuda_forward(self, problem: Any, solution: Any, stream: int | None) -> int:
        return self._launch("forward", None, problem._obj, [solution._obj], stream)

    def optical_cuda_backward(
        self, problem: Any, gradient: Any, history: int | None, stream: int | None
    ) -> int:
        p = problem._obj
        others = [gradient._obj, ctypes.c_void_p(history)]
        return self._launch(
            "unroll" if p.gradient == 2 else "backward", p.gradient, p, others, stream
        )

    @staticmethod
    def _in_halves(p: Any) -> bool:
        """As in csrc/cuda/sinkhorn.cu."""
        penalty = math.isfinite(p.rho_a) or math.isfinite(p.rho_b)
        plain = not penalty and p.omega == 1 and not p.anneal_start > 0
        return bool(p.fast) and p.max_iter >= 16 and plain

    def _launch(
        self, what: str, backward: int | None, p: Any, others: list[Any], stream: int | None
    ) -> int:
        if p.batch == 0:
            return 0
        current = self._current()
        device = self.device(current)
        most = most_warps(p.kind, backward, device)
        launched = False
        for launch in plans(p, backward, device):
            launched = True
            kernel, size = launch.kernel(what), launch.bytes
            if what == "forward" and launch.number >= WARP and self._in_halves(p):
                more = size + HALF_BYTES * launch.down * launch.across
                if more <= device.shared:
                    kernel, size = kernel.replace("forward", "forward_fast"), more
            function = self.function(kernel, current)
            limits = _Limits(most, device.clusters, what == "forward")
            values = [p, *others, limits, ctypes.c_int(launch.number)]
            addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(x) for x in values))
            cluster = _Attribute(id=4)  # the dimensions of a cluster
            cluster.value[0], cluster.value[1], cluster.value[2] = launch.blocks, 1, 1
            config = _Config(
                *(-(-p.batch // launch.problems) * launch.blocks, 1, 1),
                *(32 * launch.down * launch.across, 1, 1),
                *(size, stream, ctypes.pointer(cluster), int(launch.blocks > 1)),
            )
            if self.driver.cuLaunchKernelEx(ctypes.byref(config), function, addresses, None) != 0:
                return LAUNCH_FAILED
        return 0 if launched else OUT_OF_REACH
