"""Time of a call beside the solve, and PyTorch kernels of a call.

The unit is a bare ``torch.autograd.Function`` (sum of the cost out, ones back) in the same rounds,
forward and backward, on one thread. Every call passes the accuracy gate first: its value must
agree with the float64 reference.

    python -m benchmarks.overhead --output benchmarks/results/overhead.csv
"""

from __future__ import annotations

import argparse
import datetime
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.csv_files import write_table
from benchmarks.operator.rows import current_commit, device_name
from optical import OTAlignmentLoss, ot_alignment, sinkhorn

SHAPE = (1, 4, 4)
ONE = torch.ones(1)
# Operations that launch no kernel on a device: allocations and views.
NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "detach",
    "view",
    "reshape",
    "alias",
    "as_strided",
    "expand",
    "unsqueeze",
    "squeeze",
    "select",
    "slice",
    "t",
    "transpose",
    "permute",
    "flatten",
    "unflatten",
    "resolve_conj",
    "resolve_neg",
    "narrow",
    "_reshape_alias",
    "to",
    "_unsafe_view",
    "split",
    "unbind",
    "lift_fresh",
    "result_type",
    "promote_types",
    "contiguous",
}
# Operations that call others, which are counted.
NO_KERNEL |= {
    "zeros",
    "ones",
    "full",
    "new_full",
    "new_zeros",
    "new_ones",
    "zeros_like",
    "ones_like",
    "full_like",
    "clone",
    "_to_copy",
}


@dataclass(frozen=True)
class Row:
    """One call.

    Attributes:
        ratio: median over rounds of the time relative to the bare function, forward and backward.
        bar: the ratio to reach; empty for the unit itself.
        kernels: operations of PyTorch that would launch a kernel on a device, in one call.
    """

    call: str
    mode: str
    us_p50: float
    ratio: float
    bar: float | str
    kernels: int
    device: str
    torch: str
    commit: str
    date: str


class Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cost: Tensor) -> Tensor:
        ctx.save_for_backward(cost)
        return cost.sum((1, 2))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (cost,) = ctx.saved_tensors
        return torch.ones_like(cost)


def calls() -> dict[tuple[str, str], tuple[Callable[[], Any], float | str]]:
    """(call, mode) -> the call, and its bar."""
    generator = torch.Generator().manual_seed(0)
    cost, x, y = (torch.rand(SHAPE, generator=generator) for _ in range(3))
    leaf, student = cost.clone().requires_grad_(), x.clone().requires_grad_()
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss = OTAlignmentLoss()

    def both(function: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: torch.autograd.backward(function(), ONE)

    return {
        ("bare function", "both"): (both(lambda: Bare.apply(leaf)), ""),
        ("sinkhorn", "forward"): (lambda: sinkhorn(cost, epsilon=0.1), 1.5),
        ("sinkhorn", "both"): (both(lambda: sinkhorn(leaf, epsilon=0.1).value), 3.0),
        ("ot_alignment", "forward"): (lambda: ot_alignment(x, y, mask, mask), ""),
        ("ot_alignment", "both"): (both(lambda: ot_alignment(student, y, mask, mask)), 4.0),
        ("OTAlignmentLoss", "both"): (lambda: loss(student, y, mask, mask).backward(), ""),
    }


def check() -> None:
    """Hold the calls to the float64 reference."""
    generator = torch.Generator().manual_seed(0)
    cost, x, y = (torch.rand(SHAPE, generator=generator) for _ in range(3))
    mask = torch.ones(1, 4, dtype=torch.bool)
    truth = sinkhorn(cost.double(), epsilon=0.1, backend="reference").value
    torch.testing.assert_close(sinkhorn(cost, epsilon=0.1).value.double(), truth, rtol=1e-5, atol=0)
    truth = ot_alignment(x.double(), y.double(), mask, mask, backend="reference")
    actual = ot_alignment(x, y, mask, mask).double()
    torch.testing.assert_close(actual, truth, rtol=1e-5, atol=1e-6)


def count_kernels(call: Callable[[], Any]) -> int:
    """Number of PyTorch operations of a call that would launch a kernel on a device."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = [event.name for event in profile.events() if event.name.startswith("aten::")]
    return sum(name.removeprefix("aten::") not in NO_KERNEL for name in names)


def measure(seconds: float, per_turn: int = 20) -> list[Row]:
    """Time all calls in shared rounds for ``seconds``."""
    check()
    chosen = calls()
    for call, _ in chosen.values():
        for _ in range(20):
            call()
    times: dict[tuple[str, str], list[float]] = {name: [] for name in chosen}
    end = time.perf_counter() + seconds
    gc.disable()
    while time.perf_counter() < end or len(times["bare function", "both"]) < 5:
        for name, (call, _) in chosen.items():
            start = time.process_time()
            for _ in range(per_turn):
                call()
            times[name].append((time.process_time() - start) / per_turn * 1e6)
        gc.collect()
    gc.enable()
    unit = times["bare function", "both"]
    stamp = (
        device_name("cpu"),
        torch.__version__,
        current_commit(),
        datetime.date.today().isoformat(),
    )
    return [
        Row(
            *name,
            float(f"{statistics.median(times[name]):.4g}"),
            float(
                f"{statistics.median(t / u for t, u in zip(times[name], unit, strict=True)):.3g}"
            ),
            bar,
            count_kernels(call),
            *stamp,
        )
        for name, (call, bar) in chosen.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of the rounds")
    parser.add_argument("--output", type=Path, help="CSV file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(args.seconds)
    for row in rows:
        bar = f"(bar {row.bar})" if row.bar else ""
        print(
            f"{row.call:16s} {row.mode:8s} {row.us_p50:8.1f} us {row.ratio:6.2f} x {bar:10s} "
            f"{row.kernels} kernels"
        )
    if args.output:
        write_table(args.output, [field.name for field in fields(Row)], map(asdict, rows))


if __name__ == "__main__":
    main()
