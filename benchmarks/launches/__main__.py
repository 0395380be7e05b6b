"""Host time of public calls whose Triton kernels are launched on a driver that does nothing.

Each call is timed with the launches of ``optical.kernels.launch`` and with Triton's own, in the
same rounds, on one thread. Nothing is computed, so there are no values to compare: the gate is that
both ways launch as many kernels.
``tests/kernels/test_launch.py`` shows that they are the same.

    python -m benchmarks.launches --output benchmarks/results/launches.csv
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.csv_files import write_table
from benchmarks.launches import idle_driver

LIBRARY = idle_driver.install()

import torch  # noqa: E402 - Triton has to meet the idle driver first
import triton  # noqa: E402

from benchmarks.launches.rows import KEPT, TRITON, Row  # noqa: E402
from benchmarks.operator.rows import current_commit, device_name  # noqa: E402
from optical import OTAlignmentLoss, sinkhorn  # noqa: E402

launch = importlib.import_module("optical.kernels.launch")


def calls() -> dict[tuple[str, str], tuple[Callable[[], Any], float | str]]:
    """(call, mode) -> the call, and its bar in microseconds."""
    x, y = torch.randn(4, 20, 64).bfloat16(), torch.randn(4, 25, 64).bfloat16()
    masks = torch.ones(4, 20, dtype=torch.bool), torch.ones(4, 25, dtype=torch.bool)
    student, cost = x.clone().requires_grad_(), torch.rand(4, 20, 25)
    leaf, large = cost.clone().requires_grad_(), torch.rand(4, 200, 250)
    loss = OTAlignmentLoss(backend="triton")

    def solve(cost: torch.Tensor) -> torch.Tensor:
        return sinkhorn(cost, epsilon=0.05, max_iter=100, backend="triton").value

    def both(function: Callable[[], torch.Tensor], x: torch.Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function().sum(), x)

    return {
        ("OTAlignmentLoss", "forward"): (lambda: loss(x, y, *masks), 100.0),
        ("OTAlignmentLoss", "both"): (
            lambda: torch.autograd.grad(loss(student, y, *masks), student),
            250.0,
        ),
        ("sinkhorn", "forward"): (lambda: solve(cost), ""),
        ("sinkhorn", "both"): (both(lambda: solve(leaf), leaf), ""),
        ("sinkhorn 4x200x250, 100 iterations", "forward"): (lambda: solve(large), ""),
    }


@contextmanager
def tritons_own_launches() -> Iterator[None]:
    """Launch through ``JITFunction.run``."""
    observed = launch._observed
    launch._observed = lambda kernel: True
    try:
        yield
    finally:
        launch._observed = observed


def count(call: Callable[[], Any]) -> int:
    """The number of launches that the driver sees in one call."""
    before = idle_driver.launches(LIBRARY)
    call()
    return idle_driver.launches(LIBRARY) - before


def check(call: Callable[[], Any]) -> int:
    """Compile the kernels of a call; return the number of launches, which has to be the same."""
    call()
    kept = count(call)
    with tritons_own_launches():
        own = count(call)
    if kept != own or not kept:
        raise AssertionError(f"{kept} launches by kept handles, {own} by Triton")
    return kept


def measure(seconds: float, per_turn: int = 100) -> list[Row]:
    """Time all calls both ways in shared rounds for ``seconds``."""
    chosen = calls()
    counts = {name: check(call) for name, (call, _) in chosen.items()}
    times: dict[tuple[str, str, str], list[float]] = {
        (*name, launcher): [] for name in chosen for launcher in (KEPT, TRITON)
    }
    end = time.perf_counter() + seconds
    gc.disable()
    while time.perf_counter() < end or len(times[(*next(iter(chosen)), TRITON)]) < 5:
        for name, (call, _) in chosen.items():
            turns = per_turn if counts[name] < 20 else 3
            times[(*name, KEPT)].append(_microseconds(call, turns))
            with tritons_own_launches():
                times[(*name, TRITON)].append(_microseconds(call, turns))
        gc.collect()
    gc.enable()
    stamp = (
        *(device_name("cpu"), torch.__version__, triton.__version__, current_commit()),
        datetime.date.today().isoformat(),
    )
    return [
        Row(
            *name,
            _rounded(statistics.quantiles(found, n=5)[0]),
            _rounded(statistics.median(found)),
            chosen[name[:2]][1] if name[2] == KEPT else "",
            counts[name[:2]],
            *stamp,
        )
        for name, found in times.items()
    ]


def _microseconds(call: Callable[[], Any], turns: int) -> float:
    call()
    start = time.process_time()
    for _ in range(turns):
        call()
    return (time.process_time() - start) / turns * 1e6


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of the rounds")
    parser.add_argument("--output", type=Path, help="CSV file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(args.seconds)
    for row in rows:
        bar = f"(bar {row.bar_us:g})" if row.bar_us else ""
        print(
            f"{row.call:36s} {row.mode:8s} {row.launcher:13s} {row.us_p50:9.1f} us "
            f"{row.launches:4d} launches {bar}"
        )
    if args.output:
        write_table(args.output, [field.name for field in fields(Row)], map(asdict, rows))


if __name__ == "__main__":
    main()
