"""Runs kernels on CPU tensors: compiled to PTX, which ``machine.cpp`` carries out.

    with TritonMachine(folder) as machine:
        optical.sinkhorn(cost, epsilon=0.1, backend="triton")
    assert not machine.messages

While it is installed, Triton compiles for its device instead of a GPU, and the "triton" backend
serves CPU tensors (``TRITON_INTERPRET`` must not be set). ``CudaMachine`` does the same for the
"cuda" backend, whose kernels NVRTC compiles.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from torch import Tensor

from optical.backends import library, registry
from tests.kernels.ptx.assembly import Assembly

SOURCE = Path(__file__).with_name("machine.cpp")
FLAGS = ("-O2", "-march=native", "-std=c++20", "-shared", "-fPIC", "-Wall", "-Wextra")
NOISY_UNITS, TRUNCATED_SUMS = 1, 2


class Launch(ctypes.Structure):
    """The structure of this name in ``machine.cpp``."""

    _fields_ = [
        ("grid", ctypes.c_int32 * 3),
        *((name, ctypes.c_int32) for name in ("blocks", "threads", "shared", "stack", "seed")),
        ("noise", ctypes.c_int32),
        ("parameter_bytes", ctypes.c_int64),
        ("tensor_count", ctypes.c_int64),
        ("parameters", ctypes.c_char_p),
        ("tensors", ctypes.c_void_p),
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


class Kernel:
    """A kernel of a machine."""

    def __init__(self, name: str, text: str, machine: Any) -> None:
        self.name, self.assembly = name, Assembly(text)
        tables = self.assembly.code, self.assembly.operands
        sizes = [x for table in tables for x in (table.ctypes.data, len(table))]
        self.handle = machine.ptx_program(*sizes, self.assembly.registers)


class PtxMachine:
    """A device that runs PTX on the CPU, as a context manager.

    Args:
        folder: receives the compiled machine and Triton's cache.
        noise: NOISY_UNITS gives approximate units the errors that PTX allows, TRUNCATED_SUMS
            rounds the sums of tensor cores toward zero.
        seed: of the interleaving of warps.

    Attributes:
        messages: what was wrong: races, and what the hardware would trap.
        counts: launches and instructions of each kernel.
        rewrite: changes the PTX of a kernel, given its name, before it is loaded.
    """

    def __init__(self, folder: Path, *, noise: int = 0, seed: int = 0) -> None:
        self.folder, self.noise, self.seed = folder, noise, seed
        self.messages: list[str] = []
        self.counts: dict[str, Counter[str]] = {}
        self.rewrite: Callable[[str, str], str] = lambda kernel, text: text
        self._library = build(folder)
        self._stack = ExitStack()

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._stack.enter_context(mock.patch.object(owner, name, value))

    def load(self, name: str, text: str) -> Kernel:
        """Parse the PTX of a kernel."""
        return Kernel(name, self.rewrite(name, text), self._library)

    def run(
        self,
        kernel: Kernel,
        grid: Sequence[int],
        values: Sequence[bytes],
        tensors: Sequence[Tensor],
        **options: int,
    ) -> None:
        """Run all blocks of a launch; what goes wrong is added to ``messages``.

        Args:
            kernel: of ``load``.
            grid: blocks in three dimensions.
            values: the parameters.
            tensors: those that the kernel may touch.
            options: ``threads`` and bytes of ``shared`` memory per block, ``blocks`` per cluster.

        Raises:
            RuntimeError: the hardware would have trapped.
        """
        parameters = bytearray(sum(kernel.assembly.parameters[-1]))
        for (offset, size), value in zip(kernel.assembly.parameters, values, strict=False):
            parameters[offset : offset + size] = value[:size]
        storages = {tensor.untyped_storage() for tensor in tensors}
        ranges = sorted((x.data_ptr(), x.data_ptr() + x.nbytes()) for x in storages)
        table = np.array(merged(ranges), np.uint64).reshape(-1, 2)
        launch = Launch(seed=self.seed, noise=self.noise, stack=kernel.assembly.stack, **options)
        launch.grid[:] = grid
        launch.parameters, launch.parameter_bytes = bytes(parameters), len(parameters)
        launch.tensors, launch.tensor_count = table.ctypes.data, len(table)
        report = Report()
        self._library.ptx_run(kernel.handle, launch, report)
        self.seed += 1
        counts = self.counts.setdefault(kernel.name, Counter())
        counts.update(launches=1, instructions=report.instructions)
        if report.text:
            self.messages.append(f"{kernel.name}: {report.text.decode()}")
        if report.faults:
            raise RuntimeError(self.messages[-1])


def merged(ranges: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Join the sorted ranges that overlap."""
    result: list[list[int]] = []
    for start, stop in ranges:
        if result and start < result[-1][1]:
            result[-1][1] = max(stop, result[-1][1])
        else:
            result.append([start, stop])
    return result
