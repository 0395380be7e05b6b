"""Time and peak memory of one call, for every process of the harness; imports no framework."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator

# Duration of a turn, in which fast calls repeat: one call of a millisecond is mostly noise.
TURN_SECONDS = 0.02


def keep_freed_memory() -> None:
    """Keep freed memory in this process instead of returning it to the system (glibc only).

    Otherwise every call would pay for page faults on memory that the large arrays of another
    provider made the allocator return; on some machines they dominate a short call.
    """
    trim_threshold, mmap_max = -1, -4
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(trim_threshold, 2**31 - 1)
        library.mallopt(mmap_max, 0)


def milliseconds_per_call(run: Callable[[], object], seconds: float = TURN_SECONDS) -> float:
    """Mean milliseconds per call over one turn: a call, repeated until ``seconds`` have passed."""
    start, calls = time.perf_counter(), 0
    while True:
        run()
        calls += 1
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return elapsed / calls * 1e3


def peak_megabytes(run: Callable[[], object]) -> float | str:
    """Peak resident memory of this process during one call, minus the memory resident before it.

    Linux only; an empty string elsewhere. Call this in a fresh process that has run a tiny call
    first: the libraries are then loaded, and no earlier call has left memory for reuse.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the peak to the current resident size
        before = _status_kilobytes("VmRSS")
    except OSError:
        return ""
    run()
    return round((_status_kilobytes("VmHWM") - before) / 1024, 2)


def _status_kilobytes(name: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(f"{name}:"))
    return int(line.split()[1])


@contextlib.contextmanager
def limit_cores(count: int | None) -> Iterator[None]:
    """Restrict this process and its children to ``count`` cores; None keeps all of them.

    The affinity mask is the only way to limit the number of threads that JAX starts, so it applies
    to every provider.

    Raises:
        ValueError: ``count`` is larger than the number of available cores.
    """
    if count is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    available = os.sched_getaffinity(0)
    if count > len(available):
        raise ValueError(f"threads is {count}; expected at most {len(available)}, the core count")
    # The last cores: the first core of a machine serves its interrupts.
    os.sched_setaffinity(0, sorted(available)[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, available)
