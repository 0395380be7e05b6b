"""The PTX machine and the two devices that it stands for, as context managers.

    with TritonMachine(folder) as machine:
        optical.sinkhorn(cost, epsilon=0.1, backend="triton")
    assert not machine.messages

Kernels are compiled to PTX for sm_90a, which ``machine.cpp`` carries out on CPU tensors. While a
machine is installed, its backend serves CPU tensors.
"""

import ctypes
import gc
import re
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
SHARED_LIMIT = 227 << 10  # bytes of shared memory of a block
NOISY_UNITS, TRUNCATED_SUMS = 1, 2
SCALARS = {"i1": "<b", "i32": "<i", "i64": "<q", "u64": "<Q", "fp32": "<f", "fp64": "<d"}


class Block(NamedTuple):
    """The blocks of a launch: of a cluster, threads of each, bytes of shared memory of each."""

    per_cluster: int
    threads: int
    shared: int


class PtxMachine:
    """A device that runs PTX on the CPU.

    Args:
        folder: receives the compiled machine and Triton's cache.
        noise: NOISY_UNITS gives approximate units the errors that PTX allows, TRUNCATED_SUMS
            rounds the sums of tensor cores toward zero.
        seed: of the interleaving of warps.
        shared_limit: bytes of shared memory of a block.

    Attributes:
        messages: what was wrong: races, and what the hardware would trap.
        counts: launches and instructions of each kernel.
        rewrite: changes the PTX of a kernel, given its name, before it is loaded.
    """

    def __init__(
        self, folder: Path, *, noise: int = 0, seed: int = 0, shared_limit: int = SHARED_LIMIT
    ) -> None:
        self.folder, self.noise, self.seed, self.shared_limit = folder, noise, seed, shared_limit
        self.messages: list[str] = []
        self.counts: dict[str, Counter[str]] = {}
        self.rewrite: Callable[[str, str], str] = lambda kernel, text: text
        self._stack = ExitStack()
        target = folder / "ptx_machine.so"
        if not target.exists():
            command = library.find_compiler()
            assert command is not None, "the PTX machine needs a C++ compiler"
            subprocess.run([*command, *FLAGS, str(SOURCE), "-o", str(target)], check=True)
        self._library = ctypes.CDLL(str(target))

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Replace an attribute while the machine is installed."""
        self._stack.enter_context(mock.patch.object(owner, name, value))

    def run(
        self,
        name: str,
        assembly: Assembly,
        grid: Sequence[int],
        block: Block,
        values: Sequence[bytes],
        tensors: Sequence[Tensor],
    ) -> None:
        """Run all blocks of a kernel; what goes wrong is added to ``messages``.

        Args:
            name, assembly: the kernel.
            grid: blocks in three dimensions.
            block: the blocks.
            values: the parameters.
            tensors: those that the kernel may touch.

        Raises:
            RuntimeError: the hardware would have trapped.
        """
        parameters = np.zeros(sum(assembly.parameters[-1]), np.uint8)
        for (offset, size), value in zip(assembly.parameters, values, strict=False):
            parameters[offset : offset + size] = np.frombuffer(value[:size], np.uint8)
        storages = [tensor.untyped_storage() for tensor in tensors]
        ranges = sorted({(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in storages})
        tables = assembly.code, assembly.operands, parameters, np.array(ranges, np.uint64)
        code, operands, *rest = ((table.ctypes.data, len(table)) for table in tables)
        sizes = assembly.registers, *grid, *block, assembly.stack, self.seed, self.noise
        launch = np.array([*code, operands[0], *sizes, *rest[0], *rest[1]], np.uint64)
        report = np.zeros(3 + 512, np.uint64)  # as the structures of machine.cpp
        self._library.ptx_run(*(ctypes.c_void_p(x.ctypes.data) for x in (launch, report)))
        self.seed += 1
        _, faults, instructions = report[:3].tolist()
        self.counts.setdefault(name, Counter()).update(launches=1, instructions=instructions)
        if text := report[3:].tobytes().rstrip(b"\0"):
            self.messages.append(f"{name}: {text.decode()}")
        if faults:
            raise RuntimeError(self.messages[-1])


class TritonMachine(PtxMachine):
    """A machine that serves the "triton" backend. ``TRITON_INTERPRET`` must not be set."""

    def __enter__(self) -> "TritonMachine":
        from triton.backends.nvidia.compiler import CUDABackend
        from triton.backends.nvidia.driver import CudaDriver
        from triton.runtime import driver

        _forget_compiled_kernels()
        self._stack.callback(_forget_compiled_kernels)
        # Triton would keep PTX in its cache as if it were machine code, so it gets another one.
        cache = str(self.folder / "triton")
        self._stack.enter_context(mock.patch.dict("os.environ", {"TRITON_CACHE_DIR": cache}))
        # The driver of Triton, without a device.
        device = CudaDriver.__new__(CudaDriver)
        device.utils = self
        device.launcher_cls = lambda source, _: self._launcher(list(source.signature.values()))
        device.get_current_device = lambda: 0
        device.get_current_stream = lambda number: 0
        device.get_device_capability = lambda number: (9, 0)
        self.replace(CUDABackend, "make_cubin", lambda backend, text, *_: text.encode())
        self.replace(driver, "_active", device)
        self.replace(registry, "runs_triton", lambda tensor: True)
        return self

    def get_device_properties(self, number: int) -> dict[str, int]:
        """Answers to what Triton asks of its driver."""
        return {"max_shared_mem": self.shared_limit}

    def load_binary(self, name: str, binary: bytes, shared: int, number: int) -> tuple[Any, ...]:
        """Load what was compiled: a kernel, registers, spills and the largest block."""
        text = self.rewrite(name, binary.decode())
        threads = int(re.search(r"\.reqntid (\d+)", text)[1])
        return None, (name, Assembly(text), Block(1, threads, shared)), 0, 0, 1024

    def _launcher(self, kinds: list[str]) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, kernel: Any, *rest: Any) -> None:
            # Metadata and hooks come before the arguments of the kernel.
            passed = list(zip(kinds, rest[-len(kinds) :], strict=True))
            tensors = [value for kind, value in passed if kind.startswith("*")]
            values = [
                np.uint64(value.data_ptr()).tobytes()
                if kind.startswith("*")
                else np.array([value], SCALARS[kind]).tobytes()
                for kind, value in passed
                if kind != "constexpr"
            ]
            name, assembly, block = kernel
            self.run(name, assembly, (x, y, z), block, values, tensors)

        return launch


def _forget_compiled_kernels() -> None:
    """Drop what Triton keeps per device number, which belongs to another driver."""
    from triton.compiler import compiler
    from triton.runtime.jit import JITFunction

    compiler.max_shared_mem.cache_clear()
    for function in gc.get_objects():
        if type(function) is JITFunction:
            function.device_caches.clear()
