"""How it is measured: a gate on accuracy, then interleaved timing, then rows of one CSV format."""

from __future__ import annotations

import csv
import datetime
import math
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

import optical
from benchmarks.cases import Case
from benchmarks.providers import PROVIDERS, Provider
from optical import reference
from optical.testing import TOLERANCE, assert_close_to_truth, uniform

MODES = ("forward", "both")


@dataclass(frozen=True)
class Row:
    """One line of the CSV. A provider that fails the gate has ``failed`` where the time belongs."""

    benchmark: str
    provider: str
    mode: str
    batch: int
    n: int
    m: int
    dim: int
    dtype: str
    epsilon: float
    max_iter: int
    marginal_error: float | str
    ms_p50: float | str
    ms_p20: float | str
    ms_p80: float | str
    peak_mb: float | str
    device: str
    threads: int
    torch: str
    commit: str
    date: str
    ratio_to_reference: float | str


@dataclass(frozen=True)
class Truth:
    """What a case is compared with: float64 at the same iterate, the same in the case's dtype."""

    value: Tensor
    plan: Tensor
    same_dtype_value: Tensor
    same_dtype_plan: Tensor
    limit: Tensor

    @classmethod
    def of(cls, case: Case) -> Truth:
        exact, rounded = (_reference(case, dtype) for dtype in (torch.float64, case.dtype))
        limit = optical.sinkhorn(case.cost(), epsilon=case.epsilon, max_iter=100_000, tol=1e-9)
        return cls(*exact, *rounded, limit.value)


def _reference(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cost = case.cost().to(dtype)
    log_a, log_b = (uniform(case.batch, size).to(dtype) for size in (case.n, case.m))
    epsilon = torch.full((case.batch,), case.epsilon, dtype=dtype)
    value, _, f, g, *_ = reference.sinkhorn(cost, log_a, log_b, epsilon, case.max_iter)
    return value, reference.plan(cost, log_a, log_b, epsilon, f, g)


def check(provider: Provider, mode: str, case: Case, truth: Truth) -> float:
    """Raise AssertionError unless the provider is right on this very case.

    Returns its marginal error, the worst of the batch. In mode "both" the gradient of the value
    must be the plan.
    """
    cost = case.cost().to(case.device, case.dtype).requires_grad_(mode == "both")
    solution = provider.solve(cost, case)
    plan = solution.plan().detach().cpu().double()
    error = (plan.sum(2) - 1 / case.n).abs().sum(1) + (plan.sum(1) - 1 / case.m).abs().sum(1)
    value, scale = solution.value.detach().cpu(), case.cost().abs().max().item()
    same = {"dtype": case.dtype, "name": f"{provider.name} {case.name}"}
    if provider.same_iterates:
        assert_close_to_truth(value, truth.value, truth.same_dtype_value, scale=scale, **same)
        expected, in_dtype = truth.plan, truth.same_dtype_plan
        assert_close_to_truth(plan, expected, in_dtype, scale=1.0, **same)
    else:
        # A plan that misses its marginals by e in L1 can miss the value by e times the cost.
        slack = error.max().item() * scale + TOLERANCE[case.dtype] * scale
        wrong = (value - truth.limit).abs().max().item()
        if not wrong <= slack:
            raise AssertionError(f"{same['name']}: value is off by {wrong:.3g}, more than {slack}")
    if mode == "both":
        (gradient,) = torch.autograd.grad(solution.value.sum(), cost)
        assert_close_to_truth(gradient.cpu(), plan, plan, scale=1.0, **same)
    return error.max().item()


def call(provider: Provider, mode: str, case: Case) -> Callable[[], None]:
    """What is timed: the solution's value, or the value and its gradient."""
    cost = case.cost().to(case.device, case.dtype).requires_grad_(mode == "both")

    def forward() -> None:
        _ = provider.solve(cost, case).value

    def both() -> None:
        torch.autograd.grad(provider.solve(cost, case).value.sum(), cost)

    return both if mode == "both" else forward


def interleave(
    calls: dict[str, Callable[[], None]], device: str, seconds: float, least: int = 5
) -> dict[str, list[float]]:
    """Milliseconds of every call, in rounds in which each runs once.

    Whatever disturbs the machine for a while then disturbs all of them, and ratios hold. Rounds
    go on for ``seconds``, but at least ``least`` are run.
    """
    for run in calls.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < least:
        for name, run in calls.items():
            times[name].append(_milliseconds(run, device))
    return times


def _milliseconds(run: Callable[[], None], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # More than the second cache level holds: no run starts with the inputs of the last one in it.
    torch.empty(256 * 2**20, dtype=torch.int8, device=device).zero_()
    started.record()
    run()
    ended.record()
    torch.cuda.synchronize()
    return started.elapsed_time(ended)


def peak_megabytes(run: Callable[[], None], device: str) -> float | str:
    """Device memory of one call beyond what was there; empty on the CPU, which counts none."""
    if device == "cpu":
        return ""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 3)


def measure(case: Case, names: Sequence[str], seconds: float) -> list[Row]:
    """The rows of one case: every named provider that can run it, forward and with gradient."""
    truth = Truth.of(case)
    reasons = {name: PROVIDERS[name].unavailable(case) for name in names}
    for name, reason in reasons.items():
        if reason is not None:
            print(f"  {name} left out: {reason}")
    rows = []
    for mode in MODES:
        calls, gated = {}, {}
        for name in (name for name, reason in reasons.items() if reason is None):
            gated[name] = _row(name, mode, case)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    error = check(PROVIDERS[name], mode, case, truth)
            except AssertionError as failure:
                print(f"  {name} failed ({mode}): {failure}")
                continue
            gated[name] = replace(gated[name], marginal_error=float(f"{error:.3g}"))
            calls[name] = call(PROVIDERS[name], mode, case)
        times = interleave(calls, case.device, seconds) if calls else {}
        for name, row in gated.items():
            if name in times:
                row = _timed(row, times[name], times.get("reference"))
                row = replace(row, peak_mb=peak_megabytes(calls[name], case.device))
            rows.append(row)
    return rows


def _row(name: str, mode: str, case: Case) -> Row:
    return Row(
        benchmark="sinkhorn",
        provider=name,
        mode=mode,
        batch=case.batch,
        n=case.n,
        m=case.m,
        dim=case.dim,
        dtype=str(case.dtype).removeprefix("torch."),
        epsilon=case.epsilon,
        max_iter=case.max_iter,
        marginal_error="",
        ms_p50="failed",
        ms_p20="",
        ms_p80="",
        peak_mb="",
        device=_device_name(case.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        commit=_commit(),
        date=datetime.date.today().isoformat(),
        ratio_to_reference="",
    )


def _timed(row: Row, times: list[float], base: list[float] | None) -> Row:
    wanted = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    quantiles = torch.tensor(times, dtype=torch.float64).quantile(wanted).tolist()
    p50, p20, p80 = (float(f"{x:.4g}") for x in quantiles)
    ratio: float | str = ""
    if base is not None:
        # Of neighbours in time, so that a slow spell enters both sides.
        pairs = [math.log(b / t) for b, t in zip(base, times, strict=True)]
        ratio = float(f"{math.exp(torch.tensor(pairs).median().item()):.4g}")
    return replace(row, ms_p50=p50, ms_p20=p20, ms_p80=p80, ratio_to_reference=ratio)


def _device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "cpu")


def _commit() -> str:
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout.strip()


def write(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, for the terminal."""
    head = f"{'problem':<18} {'mode':<8} {'provider':<12} {'ms':>9} {'p20':>9} {'p80':>9} {'x':>7}"
    lines = [head]
    for row in rows:
        problem = f"{row.batch}x{row.n}x{row.m}x{row.max_iter}"
        times = f"{row.ms_p50!s:>9} {row.ms_p20!s:>9} {row.ms_p80!s:>9}"
        ratio = f"{row.ratio_to_reference!s:>7}"
        lines.append(f"{problem:<18} {row.mode:<8} {row.provider:<12} {times} {ratio}")
    return "\n".join(lines)
