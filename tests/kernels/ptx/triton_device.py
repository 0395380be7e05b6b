"""Triton on the PTX machine."""
from __future__ import annotations
import gc
from pathlib import Path
from typing import Any
from unittest import mock
import numpy as np
import re
from triton.backends.nvidia.compiler import CUDABackend
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler import compiler
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from optical.backends import registry
from tests.kernels.ptx.driver import PtxMachine

SCALARS = {"i1": "<b", "i32": "<i", "i64": "<q", "u64": "<Q", "fp32": "<f", "fp64": "<d"}
SHARED_LIMIT = 232448  # bytes of a block, of an H200


class TritonMachine(PtxMachine):
    """The machine as Triton's device."""

    def __init__(self, folder: Path, *, shared_limit: int = SHARED_LIMIT, **options: Any) -> None:
        super().__init__(folder, **options)
        self.shared_limit = shared_limit

    def __enter__(self):
        _forget_compiled_kernels()
        self._stack.callback(_forget_compiled_kernels)
        # Triton would keep PTX in its cache as if it were machine code, so it gets another one.
        cache = str(self.folder / "triton")
        self._stack.enter_context(mock.patch.dict("os.environ", {"TRITON_CACHE_DIR": cache}))
        self._replace(CUDABackend, "make_cubin", lambda backend, text, *_: text.encode())
        self._replace(driver, "_active", _Driver(self))
        self._replace(registry, "runs_triton", lambda tensor: True)
        return self


class _Driver(CudaDriver):  # type: ignore[misc]
    """Triton's driver for the device of a machine; the compiler asks it for its properties."""

    def __init__(self, machine) -> None:
        self.machine, self.utils = machine, self
        self.launcher_cls = lambda source, _: _Launcher(machine, source)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device: (9, 0)

    def load_binary(self, name: str, binary: bytes, shared: int, device: int):
        text = binary.decode()
        kernel = self.machine.load(name, text)
        kernel.options = {"blocks": 1, "shared": shared, "threads": int(re.search(r"\.reqntid (\d+)", text)[1])}
        return None, kernel, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.machine.shared_limit}


class _Launcher:
    def __init__(self, machine, source: Any) -> None:
        self.machine, self.types = machine, list(source.signature.values())

    def __call__(self, x: int, y: int, z: int, stream: int, kernel, *rest: Any) -> None:
        # Metadata and hooks come before the arguments of the kernel.
        values, tensors = [], []
        for kind, value in zip(self.types, rest[-len(self.types):], strict=True):
            if kind.startswith("*"):
                tensors.append(value)
                values.append(np.uint64(value.data_ptr()).tobytes())
            elif kind != "constexpr":
                values.append(np.array([value], SCALARS[kind]).tobytes())
        self.machine.run(kernel, (x, y, z), values, tensors, **kernel.options)


def _forget_compiled_kernels() -> None:
    """Drop what Triton keeps per device number, which belongs to another driver."""
    compiler.max_shared_mem.cache_clear()
    for function in gc.get_objects():
        if type(function) is JITFunction:
            function.device_caches.clear()
