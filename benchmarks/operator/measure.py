"""Times, ratios and peak memory of the providers that pass the gate, measured in shared rounds."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.operator import gate, jobs
from benchmarks.operator.cases import Case
from benchmarks.operator.jobs import MODES, ROOT, Job, Task
from benchmarks.operator.providers import PROVIDERS, Provider
from benchmarks.operator.rows import Row, row_of

# Ratios are relative to the first of these that was timed.
RATIO_BASES = ("cuda", "triton", "cpu", "reference")


def time_in_rounds(
    jobs_by_name: Mapping[str, Job], seconds: float, min_rounds: int = 5
) -> dict[str, list[float]]:
    """Milliseconds per call of every job, in rounds in which each job takes one turn.

    A disturbance of the machine then affects all jobs alike, and ratios stay valid. Rounds continue
    for ``seconds``, with at least ``min_rounds``, after one warm-up round.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs_by_name}
    for job in jobs_by_name.values():
        job.milliseconds_per_call(0.0)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or time.perf_counter() < end:
        for name, job in jobs_by_name.items():
            # OpenMP threads spin for a moment after their work, which would slow the next job.
            time.sleep(0.002)
            times[name].append(job.milliseconds_per_call())
        rounds += 1
    return times


def with_times(row: Row, times: Sequence[float], base: Sequence[float] | None) -> Row:
    """The row with its quantiles, and its ratio to the base's times in the same rounds."""
    levels = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    quantiles = torch.tensor(times, dtype=torch.float64).quantile(levels).tolist()
    p50, p20, p80 = (float(f"{x:.4g}") for x in quantiles)
    ratio: float | str = ""
    if base is not None:
        # Ratios within a round, so that a slow period affects both times.
        log_ratios = [math.log(t / o) for t, o in zip(times, base, strict=True)]
        ratio = float(f"{math.exp(torch.tensor(log_ratios).median().item()):.4g}")
    return replace(row, ms_p50=p50, ms_p20=p20, ms_p80=p80, ratio=ratio)


def peak_megabytes(name: str, task: Task) -> float | str:
    """Peak memory of one call beyond its inputs, measured in a separate process."""
    request = {"provider": name, "kind": task.kind, "mode": task.mode}
    request |= {"ott_python": jobs.ott_python, **task.case.to_dict()}
    command = [sys.executable, "-m", "benchmarks.operator.peak", json.dumps(request)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    words = result.stdout.split()
    return float(words[-1]) if result.returncode == 0 and words else ""


def measure(
    benchmark: str,
    kind: str,
    case: Case,
    names: Sequence[str],
    seconds: float,
    *,
    modes: Sequence[str] = MODES,
    memory: bool = False,
    min_rounds: int = 5,
) -> list[Row]:
    """Measure one case: a row for every named provider that can run it, in every mode.

    Args:
        benchmark: the value of that column of the CSV.
        kind: "solve" or "vectors"; see ``jobs.Task``.
        case: the batch of problems.
        names: the providers.
        seconds: duration of the rounds, per mode.
        modes: some of ``jobs.MODES``.
        memory: whether to measure peak memory as well.
        min_rounds: least number of rounds.
    """
    rows: list[Row] = []
    printed: set[tuple[str, str]] = set()
    for mode in modes:
        task = Task(kind, mode, case)
        started: dict[str, Job] = {}
        gated: dict[str, tuple[Row, Task]] = {}
        for name in names:
            provider = PROVIDERS[name]
            reason = provider.unavailable(task)
            if reason is not None:
                if (name, reason) not in printed:
                    print(f"  {name} left out: {reason}")
                printed.add((name, reason))
                continue
            row, gated_task, job = start_gated(benchmark, provider, task)
            gated[name] = row, gated_task
            if job is not None:
                started[name] = job
        times = time_in_rounds(started, seconds, min_rounds) if started else {}
        for job in started.values():
            job.close()
        base = next((times[name] for name in RATIO_BASES if name in times), None)
        for name, (row, gated_task) in gated.items():
            if name in times:
                row = with_times(row, times[name], base)
                row = replace(row, peak_mb=peak_megabytes(name, gated_task) if memory else "")
            rows.append(row)
    return rows


def start_gated(benchmark: str, provider: Provider, task: Task) -> tuple[Row, Task, Job | None]:
    """Start a provider and hold it to the gate.

    With a tolerance, the provider gets the loosest of its stopping rules whose result meets the
    residual required of all providers.

    Returns:
        The row without times, the task with the stopping rule that passed, and the job; if no
        attempt passed, the row names the failure, and the job is None.
    """
    row = row_of(benchmark, provider.name, task)
    attempts = provider.stopping_rules(task.case) if task.case.tol else iter([task.case])
    failure = ""
    for case in attempts:
        attempt = task._replace(case=case)
        job = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                job = provider.start(attempt)
                results = job.results()
            if results is None:
                return row, attempt, job
            truth = gate.truth_of(task, provider.first_update, provider.reports_dual)
            errors = gate.check(provider.name, results, truth, task)
        except (AssertionError, RuntimeError) as error:
            if job is not None:
                job.close()
            failure = f"{error}".splitlines()[0]
            continue
        rounded: dict[str, Any] = {name: float(f"{x:.3g}") for name, x in errors.items()}
        if task.case.tol:
            rounded = {"marginal_error": rounded["marginal_error"]}
        return replace(row, **rounded), attempt, job
    print(f"  {provider.name} failed ({task.mode}): {failure}")
    return replace(row, note=failure), task, None
