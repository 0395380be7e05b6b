"""Upper bounds on the speed of the CPU iteration: C++ loops compiled with the package's flags."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.operator.cases import Case
from optical.backends import library as native

SOURCE = Path(__file__).with_name("ceiling.cpp")


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | str:
    """The compiled loops of ``ceiling.cpp``, or the reason why they are not available."""
    compiler = native.find_compiler()
    if compiler is None:
        return "no C++ compiler was found"
    capability = torch.backends.cpu.get_cpu_capability()
    width = {"AVX2": 32, "AVX512": 64}.get(capability, 16)
    flags = [*native.CPU_FLAGS, "-march=native", f"-DOPTICAL_VECTOR_BYTES={width}", "-shared"]
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder) / "ceiling.so")
        command = [*compiler, *flags, str(SOURCE), "-o", target]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if result.returncode:
            return f"{compiler[0]} failed: {result.stderr.strip().splitlines()[0]}"
        loaded = ctypes.CDLL(target)
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    loaded.optical_ceiling_workspace.argtypes = [size, size]
    loaded.optical_ceiling_workspace.restype = size
    loaded.optical_ceiling_sweep.argtypes = [pointer, pointer, size, size]
    loaded.optical_ceiling_fma.argtypes = [size]
    loaded.optical_ceiling_fma.restype = ctypes.c_float
    return loaded


def sweeps(case: Case) -> Callable[[], object]:
    """A call with the memory traffic and multiply-adds of ``case``, on PyTorch's thread count."""
    loops = _require_library()
    sizes = torch.stack([case.inputs.lengths_a, case.inputs.lengths_b], 1).contiguous()
    floats = max(loops.optical_ceiling_workspace(*pair) for pair in sizes.tolist())
    shares = [share.contiguous() for share in sizes.tensor_split(torch.get_num_threads())]
    workspaces = [torch.empty(floats + 16) for _ in shares]

    def run(thread: int) -> None:
        share, address = shares[thread], -(-workspaces[thread].data_ptr() // 64) * 64
        loops.optical_ceiling_sweep(address, share.data_ptr(), len(share), case.max_iter)

    return _on_threads(run, len(shares))


def multiply_adds(case: Case) -> Callable[[], object]:
    """A call with the multiply-adds of ``case`` on registers alone."""
    loops, threads = _require_library(), torch.get_num_threads()
    return _on_threads(lambda _: loops.optical_ceiling_fma(case.visits() // threads), threads)


def _on_threads(run: Callable[[int], object], threads: int) -> Callable[[], object]:
    """A call that runs ``run(thread)`` on every thread and waits for all of them."""
    if threads == 1:
        return lambda: run(0)
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(run, range(threads)))


def _require_library() -> ctypes.CDLL:
    loaded = library()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded
