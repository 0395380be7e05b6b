"""Runs the Triton kernels on CPU tensors: compiled to PTX, which ``machine.cpp`` carries out.

    with PtxMachine(folder) as machine:
        optical.sinkhorn(cost, epsilon=0.1, backend="triton")
    assert not machine.messages

While the machine is installed, Triton compiles for its device instead of a GPU, and the "triton"
backend serves CPU tensors. ``TRITON_INTERPRET`` must not be set.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from triton.backends.nvidia.compiler import CUDABackend
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler import compiler
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from optical.backends import library, registry
from tests.kernels.ptx.assembly import Assembly

SOURCE = Path(__file__).with_name("machine.cpp")
FLAGS = ("-O2", "-std=c++20", "-shared", "-fPIC", "-Wall", "-Wextra")
# Shared memory of a block by compute capability, as the CUDA driver reports it.
SHARED_LIMITS = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}
SHARED_LIMITS |= {120: 101376}
NOISY_UNITS, TRUNCATED_SUMS = 1, 2
SCALARS = {"i1": "<b", "i32": "<i", "i64": "<q", "u64": "<Q", "fp32": "<f", "fp64": "<d"}


class Launch(ctypes.Structure):
    """The structure of this name in ``machine.cpp``."""

    _fields_ = [
        ("grid", ctypes.c_int32 * 3),
        *((name, ctypes.c_int32) for name in ("threads", "shared", "seed", "watch", "noise")),
        ("parameters", ctypes.c_char_p),
        ("tensors", ctypes.c_void_p),
        ("tensor_count", ctypes.c_int64),
    ]


class Report(ctypes.Structure):
    """The structure of this name in ``machine.cpp``."""

    _fields_ = [
        ("text", ctypes.c_char * 4096),
        *((name, ctypes.c_int64) for name in ("races", "faults", "instructions")),
    ]


def build(folder: Path) -> Any:
    """Compile the machine into ``folder``, unless it is there, and load it."""
    target = folder / "ptx_machine.so"
    if not target.exists():
        command = library.find_compiler()
        assert command is not None, "the PTX machine needs a C++ compiler"
        subprocess.run([*command, *FLAGS, str(SOURCE), "-o", str(target)], check=True)
    loaded = ctypes.CDLL(str(target))
    loaded.ptx_program.restype = ctypes.c_void_p
    loaded.ptx_program.argtypes = [ctypes.c_void_p, ctypes.c_int64] * 2 + [ctypes.c_int]
    loaded.ptx_run.argtypes = [ctypes.c_void_p, ctypes.POINTER(Launch), ctypes.POINTER(Report)]
    loaded.ptx_run.restype = None
    return loaded


class PtxMachine:
    """A device that runs PTX on the CPU, as a context manager.

    Args:
        folder: receives the compiled machine and Triton's cache.
        capability: compute capability for which Triton compiles.
        shared_limit: bytes of shared memory of a block (default: those of the capability).
        watch: report races. Without it the machine is about three times as fast.
        noise: NOISY_UNITS gives approximate units the errors that PTX allows, TRUNCATED_SUMS
            rounds the sums of tensor cores toward zero.
        seed: of the interleaving of warps.

    Attributes:
        messages: what was wrong: races, and what the hardware would trap.
        counts: launches and instructions of each kernel.
        rewrite: changes the PTX of a kernel, given its name, before it is loaded.
    """

    def __init__(
        self,
        folder: Path,
        *,
        capability: int = 90,
        shared_limit: int | None = None,
        watch: bool = True,
        noise: int = 0,
        seed: int = 0,
    ) -> None:
        self.folder, self.capability = folder, capability
        self.shared_limit = shared_limit or SHARED_LIMITS[capability]
        self.watch, self.noise, self.seed = watch, noise, seed
        self.messages: list[str] = []
        self.counts: dict[str, Counter[str]] = {}
        self.rewrite: Callable[[str, str], str] = lambda kernel, text: text
        self._library = build(folder)
        self._stack = ExitStack()

    def __enter__(self) -> PtxMachine:
        def replace(owner: Any, name: str, value: Any) -> None:
            self._stack.enter_context(mock.patch.object(owner, name, value))

        _forget_compiled_kernels()
        self._stack.callback(_forget_compiled_kernels)
        # Triton would keep PTX in its cache as if it were machine code, so it gets another one.
        cache = str(self.folder / "triton")
        self._stack.enter_context(mock.patch.dict("os.environ", {"TRITON_CACHE_DIR": cache}))
        replace(CUDABackend, "make_cubin", lambda backend, text, *_: text.encode())
        replace(driver, "_active", _Driver(self))
        replace(registry, "runs_triton", lambda tensor: True)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def load(self, name: str, text: str, shared: int) -> _Kernel:
        """Parse the PTX of a kernel."""
        return _Kernel(name, Assembly(self.rewrite(name, text)), shared, self._library)

    def run(self, kernel: _Kernel, grid: tuple[int, int, int], types: Any, values: Any) -> None:
        """Run all blocks of a launch; what goes wrong is added to ``messages``.

        Raises:
            RuntimeError: the hardware would have trapped.
        """
        parameters = bytearray(kernel.assembly.parameter_bytes)
        tensors = []
        passed = [pair for pair in zip(types, values, strict=True) if pair[0] != "constexpr"]
        for (offset, size), (kind, value) in zip(kernel.assembly.parameters, passed, strict=False):
            if kind.startswith("*"):
                storage = value.untyped_storage()
                tensors.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
                bits: Any = np.uint64(value.data_ptr()).tobytes()
            else:
                bits = np.array([value], SCALARS[kind]).tobytes()
            parameters[offset : offset + size] = bits[:size]
        ranges = _merged(tensors)
        launch = Launch(threads=kernel.assembly.threads, shared=kernel.shared, seed=self.seed)
        launch.grid[:] = grid
        launch.watch, launch.noise = self.watch, self.noise
        launch.parameters, launch.tensor_count = bytes(parameters), len(ranges)
        launch.tensors = ranges.ctypes.data
        report = Report()
        self._library.ptx_run(kernel.handle, launch, report)
        self.seed += 1
        counts = self.counts.setdefault(kernel.name, Counter())
        counts.update(launches=1, instructions=report.instructions)
        if report.text:
            self.messages.append(f"{kernel.name}: {report.text.decode()}")
        if report.faults:
            raise RuntimeError(self.messages[-1])


def _merged(ranges: list[tuple[int, int]]) -> Any:
    """Sorted ranges, with those that overlap joined, as an array of pairs."""
    merged: list[list[int]] = []
    for start, stop in sorted(ranges):
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(stop, merged[-1][1])
        else:
            merged.append([start, stop])
    return np.array(merged, np.uint64).reshape(-1, 2)


class _Kernel:
    def __init__(self, name: str, assembly: Assembly, shared: int, machine: Any) -> None:
        self.name, self.assembly, self.shared = name, assembly, shared
        tables = assembly.code, assembly.operands
        sizes = [x for table in tables for x in (table.ctypes.data, len(table))]
        self.handle = machine.ptx_program(*sizes, assembly.registers)


class _Driver(CudaDriver):  # type: ignore[misc]
    """Triton's driver for the device of a machine; the compiler asks it for its properties."""

    def __init__(self, machine: PtxMachine) -> None:
        self.machine, self.utils = machine, self
        self.launcher_cls = lambda source, _: _Launcher(machine, source)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device: divmod(machine.capability, 10)

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return None, self.machine.load(name, binary.decode(), shared), 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.machine.shared_limit}


class _Launcher:
    def __init__(self, machine: PtxMachine, source: Any) -> None:
        self.machine, self.types = machine, list(source.signature.values())

    def __call__(self, x: int, y: int, z: int, stream: int, kernel: _Kernel, *rest: Any) -> None:
        # Metadata and hooks come before the arguments of the kernel.
        self.machine.run(kernel, (x, y, z), self.types, rest[-len(self.types) :])


def _forget_compiled_kernels() -> None:
    """Drop what Triton keeps per device number, which belongs to another driver."""
    compiler.max_shared_mem.cache_clear()
    for function in gc.get_objects():
        if type(function) is JITFunction:
            function.device_caches.clear()
