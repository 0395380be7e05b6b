"""Float32 rounding errors of every provider, by temperature and kind of data.

Every provider solves each case in float32 and in float64. Its error is the difference between the
two runs, that is, the rounding of its arithmetic, whichever iterates it computes. A provider with
the iterates of the reference must also pass the gate in float64. Value, plan and potentials are
those of the problem with a given cost; the gradient is that of the value with respect to the token
vectors.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.operator.cases import Case
from benchmarks.operator.gate import check, errors, truth_of
from benchmarks.operator.jobs import Results, Task
from benchmarks.operator.providers import PROVIDERS, Provider
from benchmarks.operator.rows import FAILED, Row, row_of

EPSILONS = (0.5, 0.1, 0.05, 0.01)
SHAPES = tuple(f"8x128x128x128x200:{data}" for data in ("random", "aligned", "clusters"))
PROVIDER_NAMES = ("cpu", "reference", "torch", "torch_bmm", "pot", "pot_kernel", "geomloss", "ott")
COLUMNS = {
    "error_value": "loss",
    "error_plan": "plan",
    "error_potentials": "potentials",
    "error_gradient": "gradient",
}
PEERS = {"pot": "POT", "geomloss": "GeomLoss", "ott": "OTT-JAX"}
# Twice the relative rounding of a number stored in float32.
ROUNDING = torch.finfo(torch.float32).eps


def measure(names: Sequence[str], cases: Sequence[Case]) -> list[Row]:
    """Measure the errors: one row, without times, per provider, temperature and case."""
    rows = []
    for case, epsilon in itertools.product(cases, EPSILONS):
        case = replace(case, epsilon=epsilon)
        print(f"accuracy {case.name} epsilon {epsilon:g}", flush=True)
        for name in (name for name in names if name in PROVIDER_NAMES):
            reason = PROVIDERS[name].unavailable(Task("solve", "forward", case))
            if reason is None:
                rows.append(_row(PROVIDERS[name], case))
            else:
                print(f"  {name} left out: {reason}")
    return rows


def _row(provider: Provider, case: Case) -> Row:
    solve, vectors = Task("solve", "forward", case), Task("vectors", "both", case)
    row = replace(row_of("accuracy", provider.name, vectors), ms_p50="")
    try:
        rounding = _rounding_errors(provider, solve)
        rounding["error_gradient"] = _rounding_errors(provider, vectors)["error_gradient"]
        if not all(math.isfinite(error) for error in rounding.values()):
            raise AssertionError("results are not finite")
    except (AssertionError, RuntimeError) as failure:
        print(f"  {provider.name} failed: {failure}")
        return replace(row, ms_p50=FAILED, note=str(failure))
    rounded: dict[str, Any] = {name: float(f"{error:.3g}") for name, error in rounding.items()}
    return replace(row, **rounded)


def _rounding_errors(provider: Provider, task: Task) -> dict[str, float]:
    precise = task._replace(case=replace(task.case, dtype=torch.float64))
    exact = _results(provider, precise)
    if provider.first_update is not None:
        truth = truth_of(precise, provider.first_update, provider.reports_dual)
        check(provider.name, exact, truth, precise)
    return errors(_results(provider, task), exact, task.case)


def _results(provider: Provider, task: Task) -> Results:
    job = provider.start(task)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = job.results()
    finally:
        job.close()
    assert results is not None
    return results


def worse(rows: Sequence[Row], ours: str = "cpu") -> Iterator[tuple[Row, Row, str]]:
    """Find the errors in which a peer is more accurate: our row, the peer's row, and the column.

    Errors within a tenth of each other count as equal, as do errors below ``ROUNDING``.
    """
    by_case = {(row.provider, row.data, row.epsilon): row for row in rows if not row.note}
    for (name, data, epsilon), row in by_case.items():
        our_row = by_case.get((ours, data, epsilon))
        if name in PEERS and our_row is not None:
            for column in COLUMNS:
                our_error, peer_error = float(getattr(our_row, column)), float(getattr(row, column))
                if our_error > max(1.1 * peer_error, ROUNDING):
                    yield our_row, row, column


def summary(rows: Sequence[Row]) -> str:
    """The rows as aligned text, followed by the errors in which a peer is more accurate."""
    lines = [f"{'data':<10}{'epsilon':>8} {'provider':<12}" + _cells(COLUMNS.values())]
    for row in rows:
        cells = _cells([FAILED] if row.note else [getattr(row, column) for column in COLUMNS])
        lines.append(f"{row.data:<10}{row.epsilon:>8g} {row.provider:<12}{cells}")
    for our_row, peer_row, column in worse(rows):
        case = f"{our_row.data}, epsilon {our_row.epsilon:g}, {COLUMNS[column]}"
        pair = f"{getattr(our_row, column)}, {getattr(peer_row, column)}"
        lines.append(f"less accurate than {peer_row.provider}: {case}: {pair}")
    return "\n".join(lines)


def _cells(values: Iterable[object]) -> str:
    return "".join(f" {value!s:>11}" for value in values)
