"""The CUDA kernels on the PTX machine: compiled by NVRTC, launched through a driver's double."""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from optical.backends import cuda, library, nvrtc, structs
from optical.io import nvidia
from optical.io import nvrtc as compiler
from tests.backends import doubles
from tests.kernels.ptx.assembly import Assembly
from tests.kernels.ptx.driver import Block, PtxMachine


class PtxCompiler:
    """NVRTC that stops at PTX where it is asked for machine code."""

    def __getattr__(self, name: str) -> Any:
        return getattr(compiler.find(), name.replace("CUBIN", "PTX"))

    def nvrtcCompileProgram(self, program: Any, count: int, options: Any) -> int:
        virtual = (option.replace(b"=sm_", b"=compute_") for option in options)
        array = (ctypes.c_char_p * count)(*virtual)
        status: int = compiler.find().nvrtcCompileProgram(program, count, array)
        return status


@functools.cache
def compile_ptx(kernel: str) -> bytes:
    """Compile a CUDA kernel for compute capability 9.0."""
    folder = library.source_folder()
    assert folder is not None
    return nvrtc.compile_kernel(PtxCompiler(), folder, kernel, "90a").rstrip(b"\0")


class CudaMachine(PtxMachine):
    """A machine that serves the "cuda" backend; see ``PtxMachine``."""

    def __enter__(self) -> "CudaMachine":
        self._tensors: list[Tensor] = []
        call, address = cuda._call, structs.address

        def record_call(name: str, problem: Any, *arguments: Any) -> None:
            self._tensors += [x for x in problem if isinstance(x, Tensor)]
            try:
                call(name, problem, *arguments)
            finally:
                self._tensors.clear()

        def record_address(tensor: Tensor | None) -> int | None:
            self._tensors += [] if tensor is None else [tensor]
            return address(tensor)

        kernels = nvrtc.Kernels(nvidia.Driver(_Driver(self)), self._compile)
        self.replace(cuda, "load", lambda device=None: library.Loaded(kernels, None))
        self.replace(cuda, "DEVICE", "cpu")
        self.replace(cuda, "_call", record_call)
        self.replace(structs, "address", record_address)
        cuda._fits.cache_clear()
        self._stack.callback(cuda._fits.cache_clear)
        return self

    @staticmethod
    def _compile(names: Sequence[str], capability: tuple[int, int]) -> list[bytes]:
        return [compile_ptx(name) for name in names]


class _Driver(doubles.Driver):  # type: ignore[misc]
    """A driver whose launches run on the machine."""

    def __init__(self, machine: "CudaMachine") -> None:
        super().__init__()
        self.machine, self.kernels = machine, []

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:
        text = self.machine.rewrite(name.decode(), self.loaded[-1].decode())
        self.kernels.append((name.decode(), Assembly(text)))
        function._obj.value = len(self.kernels)
        return 0

    def cuLaunchKernelEx(self, config: Any, function: Any, addresses: Any, extra: Any) -> int:
        c, (name, assembly) = config._obj, self.kernels[function.value - 1]
        sizes = (size for _, size in assembly.parameters)
        values = [ctypes.string_at(*pair) for pair in zip(addresses, sizes, strict=True)]
        block = Block(c.attributes[0].value[0] if c.count else 1, c.bx, c.shared)
        tensors = self.machine._tensors
        self.machine.run(name, assembly, (c.gx, c.gy, c.gz), block, values, tensors)
        return 0
