"""How it is measured: a gate on accuracy, then turns in rounds."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import optical
from benchmarks.operator import jobs
from benchmarks.operator.cases import Case
from benchmarks.operator.jobs import MODES, ROOT, Job, Results, Task
from benchmarks.operator.providers import PROVIDERS, Provider
from benchmarks.operator.rows import Row, row_of
from optical.testing.tolerance import TOLERANCE, assert_close_to_truth

# Ratios are to the first of these that was timed.
OURS = ("cuda", "triton", "cpu", "reference")


# ---------------------------------------------------------------------------------------- gate


@dataclass(frozen=True)
class Truth:
    """What a task is compared with: float64 at the same iterate, and the same in its dtype."""

    exact: Results
    same_dtype: Results
    limit_only: bool


def truth_of(task: Task, first: str | None, dual: bool) -> Truth:
    """The truth for a provider whose iterations update ``first``, with the value it reports."""
    kind, _, case = task
    if first is None or case.tol:
        return _truth(kind, replace(case, max_iter=10_000, tol=1e-9), "f", dual, True)
    return _truth(kind, case, first, dual, False)


@functools.lru_cache(maxsize=6)
def _truth(kind: str, case: Case, first: str, dual: bool, limit_only: bool) -> Truth:
    if limit_only:
        # Plain iterations of the reference would take hours.
        options: dict[str, Any] = {"backend": "auto", "anderson": 5}
        exact = _solved(kind, case, first, dual, torch.float64, options)
        return Truth(exact, exact, True)
    options = {"backend": "reference"}
    exact, rounded = (
        _solved(kind, case, first, dual, dtype, options) for dtype in (torch.float64, case.dtype)
    )
    return Truth(exact, rounded, False)


def _solved(
    kind: str, case: Case, first: str, dual: bool, dtype: torch.dtype, options: dict[str, Any]
) -> Results:
    x, y, log_a, log_b = (z.to(dtype, copy=True) for z in case.inputs[:4])
    if kind == "vectors":
        x.requires_grad_(), y.requires_grad_()
        cost = 1 - normalize(x, dim=2) @ normalize(y, dim=2).mT
    else:
        cost = case.cost().to(dtype)
    options = options | {"epsilon": case.epsilon, "max_iter": case.max_iter, "tol": case.tol}
    given = cost.detach()
    if first == "f":
        result = optical.sinkhorn(given, log_a, log_b, **options)
        f, g, plan = result.f, result.g, result.plan()
    else:
        result = optical.sinkhorn(given.mT.contiguous(), log_b, log_a, **options)
        f, g, plan = result.g, result.f, result.plan().mT
    value, a, b = result.value, log_a.exp(), log_b.exp()
    if dual:
        excess = 1 - plan.sum((1, 2))
        value = (a * f).sum(1) + (b * g).sum(1) + case.epsilon * excess
    gradients = (plan,) if kind == "solve" else torch.autograd.grad(cost, (x, y), plan)
    value, f, g, plan = (z.detach().double().contiguous() for z in (value, f, g, plan))
    return Results(value, f, g, plan, tuple(x.double().contiguous() for x in gradients))


def errors(results: Results, truth: Results, case: Case) -> dict[str, float]:
    """The error columns of a row, which are reported beside every time."""
    log_a, log_b = case.inputs.log_a, case.inputs.log_b
    plan, value = results.plan, truth.value
    rows = (plan.sum(2) - log_a.exp()).abs().sum(1)
    columns = (plan.sum(1) - log_b.exp()).abs().sum(1)
    # A constant may move between the potentials: it is fitted before they are compared.
    df = (results.f - truth.f).masked_fill(log_a == -math.inf, 0)
    dg = (results.g - truth.g).masked_fill(log_b == -math.inf, 0)
    shift = ((df * log_a.exp()).sum(1) - (dg * log_b.exp()).sum(1)) / 2
    df = (df - shift[:, None])[log_a > -math.inf]
    dg = (dg + shift[:, None])[log_b > -math.inf]
    found = {
        "marginal_error": rows + columns,
        "error_value": (results.value - value).abs() / value.abs().max(),
        "error_plan": (plan - truth.plan).abs().sum((1, 2)),
        "error_potentials": torch.cat([df, dg]).abs() / case.epsilon,
    }
    if results.gradients:
        wrong = [(x - y).norm() for x, y in zip(results.gradients, truth.gradients, strict=True)]
        whole = [y.norm() for y in truth.gradients]
        found["error_gradient"] = torch.stack(wrong).norm() / torch.stack(whole).norm()
    return {name: error.max().item() for name, error in found.items()}


def check(name: str, results: Results, truth: Truth, task: Task) -> dict[str, float]:
    """Raise AssertionError unless the results are right on this very task; return the errors.

    Where the iterates are the reference's, by the one rule of ``optical.testing.tolerance``. Otherwise the
    value may be off the limit by what the missed marginals explain, and the gradient must be that
    of the provider's own plan.
    """
    kind, _, case = task
    found = errors(results, truth.exact, case)
    scale = case.cost().abs().max().item()
    dtype = case.dtype

    def follow_the_rule(
        what: str, out: Tensor, expected: Tensor, rounded: Tensor, size: float
    ) -> None:
        label = f"{name} {case.name} {what}"
        assert_close_to_truth(out, expected, rounded, dtype=dtype, scale=size, name=label)

    if not truth.limit_only:
        exact, rounded = truth.exact, truth.same_dtype
        follow_the_rule("value", results.value, exact.value, rounded.value, scale)
        follow_the_rule("plan", results.plan, exact.plan, rounded.plan, 1.0)
        for out, expected, other in zip(
            results.gradients, exact.gradients, rounded.gradients, strict=bool(results.gradients)
        ):
            size = 1.0 if kind == "solve" else expected.abs().max().item()
            follow_the_rule("gradient", out, expected, other, size)
        return found
    # A plan that misses its marginals by e in L1 can miss the value by e times the cost.
    slack = (found["marginal_error"] + TOLERANCE[dtype]) * scale
    wrong = (results.value - truth.exact.value).abs().max().item()
    if not wrong <= slack:
        raise AssertionError(
            f"{name} {case.name} value is off by {wrong:.3g}; expected at most {slack:.3g}"
        )
    if case.tol and not found["marginal_error"] <= 1.05 * case.tol:
        raise AssertionError(
            f"{name} {case.name} misses its marginals by {found['marginal_error']:.3g}; "
            f"expected at most {case.tol:g}"
        )
    if results.gradients:
        own = gradients_of_plan(results.plan, task)
        for out, expected in zip(results.gradients, own, strict=True):
            off = (out - expected).norm().item()
            # Both half-steps carry gradient, each through a plan that misses one marginal; and
            # the terms of a token's gradient nearly cancel, which magnifies what they miss.
            share = 0.01 + 2 * (found["marginal_error"] + TOLERANCE[dtype])
            slack = share * expected.norm().item()
            if not off <= slack:
                raise AssertionError(
                    f"{name} {case.name} gradient is {off:.3g} away from that of its own plan; "
                    f"expected at most {slack:.3g}"
                )
    return found


def gradients_of_plan(plan: Tensor, task: Task) -> tuple[Tensor, ...]:
    """The envelope gradient that belongs to a plan, in float64."""
    if task.kind == "solve":
        return (plan,)
    x, y = (z.clone().requires_grad_() for z in task.case.inputs[:2])
    return torch.autograd.grad(1 - normalize(x, dim=2) @ normalize(y, dim=2).mT, (x, y), plan)


# -------------------------------------------------------------------------------------- timing


def interleave(
    started: Mapping[str, Job], seconds: float, least: int = 5
) -> dict[str, list[float]]:
    """Milliseconds per call of every job, in rounds in which each has one turn.

    Whatever disturbs the machine for a while then disturbs all of them, and ratios hold. Rounds
    go on for ``seconds``, but at least ``least`` are run, after one that does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in started}
    for job in started.values():
        job.turn(0.0)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or time.perf_counter() < end:
        for name, job in started.items():
            # OpenMP's threads spin for a moment after their work, in the next one's time.
            time.sleep(0.002)
            times[name].append(job.turn())
        rounds += 1
    return times


def with_times(row: Row, times: Sequence[float], ours: Sequence[float] | None) -> Row:
    """The row with quantiles, and with its ratio to our times in the same rounds."""
    wanted = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    quantiles = torch.tensor(times, dtype=torch.float64).quantile(wanted).tolist()
    p50, p20, p80 = (float(f"{x:.4g}") for x in quantiles)
    ratio: float | str = ""
    if ours is not None:
        # Of neighbours in time, so that a slow spell enters both sides.
        pairs = [math.log(t / o) for t, o in zip(times, ours, strict=True)]
        ratio = float(f"{math.exp(torch.tensor(pairs).median().item()):.4g}")
    return replace(row, ms_p50=p50, ms_p20=p20, ms_p80=p80, ratio=ratio)


def peak_megabytes(name: str, task: Task) -> float | str:
    """Memory of one call beyond its inputs, measured in a process that does nothing else."""
    about = {"provider": name, "kind": task.kind, "mode": task.mode}
    request = {**about, "ott_python": jobs.ott_python, **task.case.to_dict()}
    command = [sys.executable, "-m", "benchmarks.operator.peak", json.dumps(request)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = result.stdout.split()
    return float(lines[-1]) if result.returncode == 0 and lines else ""


def measure(
    benchmark: str,
    kind: str,
    case: Case,
    names: Sequence[str],
    seconds: float,
    *,
    modes: Sequence[str] = MODES,
    memory: bool = False,
    least: int = 5,
) -> list[Row]:
    """The rows of one case: every named provider that can run it, in every mode."""
    rows, told = [], set()
    for mode in modes:
        task = Task(kind, mode, case)
        started: dict[str, Job] = {}
        measured: dict[str, tuple[Row, Task]] = {}
        for name in names:
            provider = PROVIDERS[name]
            reason = provider.unavailable(task)
            if reason is not None:
                if (name, reason) not in told:
                    print(f"  {name} left out: {reason}")
                told.add((name, reason))
                continue
            row, ran, job = gated(benchmark, provider, task)
            measured[name] = row, ran
            if job is not None:
                started[name] = job
        times = interleave(started, seconds, least) if started else {}
        for job in started.values():
            job.close()
        base = next((times[name] for name in OURS if name in times), None)
        for name, (row, ran) in measured.items():
            if name in times:
                row = with_times(row, times[name], base)
                row = replace(row, peak_mb=peak_megabytes(name, ran) if memory else "")
            rows.append(row)
    return rows


def gated(benchmark: str, provider: Provider, task: Task) -> tuple[Row, Task, Job | None]:
    """Start a provider and hold it to the gate: its row, the task it was given, and its job.

    With a tolerance, a provider gets the loosest of its own stopping rules whose result has the
    residual that is asked of everyone.
    """
    row = row_of(benchmark, provider.name, task)
    attempts = provider.rules(task.case) if task.case.tol else iter([task.case])
    failure = ""
    for attempt in attempts:
        tried = task._replace(case=attempt)
        job = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                job = provider.start(tried)
                results = job.results()
            if results is None:
                return row, tried, job
            truth = truth_of(task, provider.first, provider.dual)
            found = check(provider.name, results, truth, task)
        except (AssertionError, RuntimeError) as error:
            if job is not None:
                job.close()
            failure = f"{error}".splitlines()[0]
            continue
        rounded: dict[str, Any] = {name: float(f"{x:.3g}") for name, x in found.items()}
        if task.case.tol:
            rounded = {"marginal_error": rounded["marginal_error"]}
        return replace(row, **rounded), tried, job
    print(f"  {provider.name} failed ({task.mode}): {failure}")
    return replace(row, note=failure), task, None
