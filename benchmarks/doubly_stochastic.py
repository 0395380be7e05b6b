"""Time of ``doubly_stochastic`` beside the two loops that it replaces in training code.

    python -m benchmarks.doubly_stochastic --threads 1 --output benchmarks/results/matching.csv

The loops run in eager PyTorch: "division" is the softmax of the rows, then alternate divisions by
sums, as in hyper-connections; "logsumexp" stays in the log domain, as in Gumbel-Sinkhorn. A
provider is timed only if its matrices and gradients agree with the float64 loop.
"""

from __future__ import annotations

import argparse
import csv
import datetime
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.csv_files import write_table
from benchmarks.operator import measure, meter
from benchmarks.operator.rows import Row as TimedRow
from benchmarks.operator.rows import current_commit, device_name
from optical.ot.matching import doubly_stochastic

ITERATIONS = 20
# Number of matrices, and their rows.
SHAPES = ((8192, 4), (8192, 8), (8192, 16), (2048, 32), (512, 64))
MODES = ("forward", "both")
LARGEST_ERROR = 1e-4  # of float32 matrices, and of gradients relative to the largest entry


@dataclass(frozen=True)
class Row:
    """One provider on one shape.

    Attributes:
        mode: "forward", or "both" for forward and backward.
        error_plan: largest error of an entry of the matrices.
        error_gradient: largest error of an entry of the gradient, relative to its largest entry.
        ms_p50, ms_p20, ms_p80: quantiles of the milliseconds per call.
        ratio: median over rounds of the time relative to ours.
    """

    provider: str
    mode: str
    batch: int
    n: int
    iterations: int
    dtype: str
    threads: int
    error_plan: float
    error_gradient: float
    ms_p50: float | str = ""
    ms_p20: float | str = ""
    ms_p80: float | str = ""
    ratio: float | str = ""
    device: str = ""
    torch: str = ""
    commit: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """The identity of the measurement; a new row replaces an older one with the same key."""
        shape = (int(self.batch), int(self.n), int(self.iterations))
        return self.provider, self.mode, shape, self.dtype, int(self.threads), self.device


def division_loop(logits: Tensor) -> Tensor:
    """Softmax of the rows, then alternate divisions by column and row sums."""
    p = logits.softmax(-1)
    p = p / p.sum(-2, keepdim=True)
    for _ in range(ITERATIONS - 1):
        p = p / p.sum(-1, keepdim=True)
        p = p / p.sum(-2, keepdim=True)
    return p


def logsumexp_loop(logits: Tensor) -> Tensor:
    """Alternate normalisation of rows and columns in the log domain."""
    for _ in range(ITERATIONS):
        logits = logits - logits.logsumexp(-1, keepdim=True)
        logits = logits - logits.logsumexp(-2, keepdim=True)
    return logits.exp()


def ours(logits: Tensor) -> Tensor:
    """The function under test."""
    return doubly_stochastic(logits, iterations=ITERATIONS)


PROVIDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "optical": ours,
    "division": division_loop,
    "logsumexp": logsumexp_loop,
}


class Job:
    """A provider with its input."""

    def __init__(self, provider: str, mode: str, logits: Tensor, upstream: Tensor) -> None:
        self.function, self.upstream = PROVIDERS[provider], upstream
        self.logits = logits.detach().clone().requires_grad_(mode == "both")

    def run(self) -> None:
        """One call."""
        result = self.function(self.logits)
        if self.logits.requires_grad:
            torch.autograd.grad(result, self.logits, self.upstream)

    def milliseconds_per_call(self, seconds: float = meter.TURN_SECONDS) -> float:
        """Mean milliseconds over one turn."""
        return meter.milliseconds_per_call(self.run, seconds)


def errors(provider: str, logits: Tensor, upstream: Tensor) -> tuple[float, float]:
    """Errors of a provider on a sample of the matrices; AssertionError if one is too large."""
    logits, upstream = logits[:64], upstream[:64]
    results = []
    for function, x in ((PROVIDERS[provider], logits), (logsumexp_loop, logits.double())):
        x = x.detach().clone().requires_grad_()
        plan = function(x)
        (gradient,) = torch.autograd.grad(plan, x, upstream.to(plan))
        results.append((plan.detach().double(), gradient.double()))
    (plan, gradient), (true_plan, true_gradient) = results
    found = (
        (plan - true_plan).abs().max().item(),
        ((gradient - true_gradient).abs().max() / true_gradient.abs().max()).item(),
    )
    if not max(found) <= LARGEST_ERROR:
        raise AssertionError(f"{provider} has errors {found}; expected <= {LARGEST_ERROR}")
    return found


def rows_of(batch: int, n: int, seconds: float) -> list[Row]:
    """Time all providers on one shape, in shared rounds."""
    generator = torch.Generator().manual_seed(0)
    logits, upstream = (torch.randn(batch, n, n, generator=generator) for _ in range(2))
    rows = []
    for mode in MODES:
        jobs = {name: Job(name, mode, logits, upstream) for name in PROVIDERS}
        times = measure.time_in_rounds(jobs, seconds)  # type: ignore[arg-type]
        for name in PROVIDERS:
            row = Row(
                *(name, mode, batch, n, ITERATIONS, "float32", torch.get_num_threads()),
                *(float(f"{error:.3g}") for error in errors(name, logits, upstream)),
                device=device_name("cpu"),
                torch=torch.__version__,
                commit=current_commit(),
                date=datetime.date.today().isoformat(),
            )
            rows.append(_with_times(row, times[name], times["optical"]))
    return rows


def _with_times(row: Row, times: list[float], base: list[float]) -> Row:
    """The row with quantiles and ratio, by the rule of the other benchmarks."""
    empty = TimedRow(*("", "", "", ""), *(0,) * 4, "", *(0,) * 4)
    timed = measure.with_times(empty, times, base)
    quantiles = {"ms_p50": timed.ms_p50, "ms_p20": timed.ms_p20, "ms_p80": timed.ms_p80}
    return replace(row, ratio=timed.ratio, **quantiles)


def write(rows: list[Row], path: Path) -> None:
    """Merge rows into a CSV file, each in place of an older row with the same key."""
    old = []
    if path.is_file():
        with path.open(newline="") as file:
            old = [Row(**record) for record in csv.DictReader(file)]  # type: ignore[arg-type]
    merged = {row.key: row for row in (*old, *rows)}
    write_table(path, [field.name for field in fields(Row)], map(asdict, merged.values()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="cores and threads (default: 1)")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="duration of the rounds, per shape and mode"
    )
    parser.add_argument("--output", type=Path, help="CSV file to merge the rows into")
    args = parser.parse_args()
    meter.keep_freed_memory()
    with meter.limit_cores(args.threads):
        torch.set_num_threads(args.threads)
        for batch, n in SHAPES:
            new_rows = rows_of(batch, n, args.seconds)
            for row in new_rows:
                print(
                    f"{row.batch} x {n} x {n} {row.mode:8s} {row.provider:10s} {row.ms_p50:>8} ms "
                    f"{row.ratio:>6} x"
                )
            if args.output:
                write(new_rows, args.output)


if __name__ == "__main__":
    main()
