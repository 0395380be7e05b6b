"""Time and memory of one call, for every process of the harness: no framework is imported here."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator

# A turn of a fast call repeats it for this long: one call of a millisecond is mostly noise.
TURN_SECONDS = 0.02


def keep_memory() -> None:
    """Let this process keep the memory that it frees, where its C library can be told so (glibc).

    Otherwise a provider pays, call by call, for pages that another one's large arrays made the
    library hand back to the system: on some machines that is most of a short call.
    """
    trim_threshold, mmap_max = -1, -4
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(trim_threshold, 2**31 - 1)
        library.mallopt(mmap_max, 0)


def turn(run: Callable[[], object], seconds: float = TURN_SECONDS) -> float:
    """Milliseconds per call, of as many calls as fit into a turn and at least one."""
    start, calls = time.perf_counter(), 0
    while True:
        run()
        calls += 1
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return elapsed / calls * 1e3


def peak_megabytes(run: Callable[[], object]) -> float | str:
    """Most resident memory of this process during one call, beyond what it held before.

    Linux only, and empty elsewhere. For a fresh process that has called ``run`` on something tiny:
    libraries are then loaded, and no memory of earlier calls waits to be used again.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak is reset to what is resident now
        before = _status("VmRSS")
    except OSError:
        return ""
    run()
    return round((_status("VmHWM") - before) / 1024, 2)


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(f"{name}:"))
    return int(line.split()[1])


@contextlib.contextmanager
def cores(count: int | None) -> Iterator[None]:
    """Keep this process and those it starts to ``count`` cores: the same number for everyone.

    JAX has no other way to be told how many threads to start.
    """
    if count is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    if count > len(allowed):
        raise ValueError(f"threads is {count}; expected at most the {len(allowed)} cores there are")
    # The last ones: the first core of a machine serves its interrupts.
    os.sched_setaffinity(0, sorted(allowed)[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
