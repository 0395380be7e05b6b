"""Times of CUDA graphs, and of calls from Python."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.measure.shapes import MACHINE

# Clock cycles, about a millisecond, for which the device waits before a timed run. In this time
# Python issues the run, so that the events around it measure the device alone.
HEAD_START = 2_000_000


class Quantiles(NamedTuple):
    """Microseconds of one call."""

    p50: float
    p20: float
    p80: float


class Captured(NamedTuple):
    """A CUDA graph and the outputs that its replays overwrite."""

    replay: Callable[[], None]
    outputs: Any


def captured(run: Callable[[], Any]) -> Captured:
    """Capture a call in a CUDA graph, after one call that compiles and allocates."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return Captured(graph.replay, outputs)


def device_times(run: Callable[[], Any], per_run: int = 1) -> Quantiles:
    """Microseconds on the device of each of the ``per_run`` equal parts of a call."""
    run()
    torch.cuda.synchronize()
    times = []
    for _ in range(MACHINE.rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / per_run)
    times.sort()
    return Quantiles(*(times[len(times) * tenths // 10] for tenths in (5, 2, 8)))


class CallTimes(NamedTuple):
    """Microseconds until a call returns, and until its results are there; medians."""

    host: float
    call: float


def call_times(run: Callable[[], Any]) -> CallTimes:
    """Time calls from Python, each issued to an idle device."""
    run()
    times = []
    for _ in range(MACHINE.calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        issued = time.perf_counter()
        torch.cuda.synchronize()
        times.append((1e6 * (issued - start), 1e6 * (time.perf_counter() - start)))
    hosts, calls = zip(*times, strict=True)
    return CallTimes(statistics.median(hosts), statistics.median(calls))
