"""The ceiling of the CPU iteration: small C++ loops, compiled like the package, timed beside it."""

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
    """The compiled loops, or why there are none, in words."""
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
    loaded.optical_ceiling_room.argtypes = [size, size]
    loaded.optical_ceiling_room.restype = size
    loaded.optical_ceiling_sweep.argtypes = [pointer, pointer, size, size]
    loaded.optical_ceiling_fma.argtypes = [size]
    loaded.optical_ceiling_fma.restype = ctypes.c_float
    return loaded


def sweeps(case: Case) -> Callable[[], object]:
    """A call that makes the memory traffic and multiply-adds of ``case``, on PyTorch's threads."""
    loops = _loaded()
    sizes = torch.stack([case.inputs.lengths_a, case.inputs.lengths_b], 1).contiguous()
    room = max(loops.optical_ceiling_room(*pair) for pair in sizes.tolist())
    shares = [share.contiguous() for share in sizes.tensor_split(torch.get_num_threads())]
    works = [torch.empty(room + 16) for _ in shares]

    def run(thread: int) -> None:
        share, address = shares[thread], -(-works[thread].data_ptr() // 64) * 64
        loops.optical_ceiling_sweep(address, share.data_ptr(), len(share), case.max_iter)

    return _together(run, len(shares))


def multiply_adds(case: Case) -> Callable[[], object]:
    """A call that makes as many multiply-adds as ``case`` has, from registers."""
    loops, threads = _loaded(), torch.get_num_threads()
    return _together(lambda _: loops.optical_ceiling_fma(case.visits() // threads), threads)


def _together(run: Callable[[int], object], threads: int) -> Callable[[], object]:
    if threads == 1:
        return lambda: run(0)
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(run, range(threads)))


def _loaded() -> ctypes.CDLL:
    found = library()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found
