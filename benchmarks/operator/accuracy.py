"""float32 against float64, per temperature and kind of data, beside the peers.

Every provider runs each case twice, in float32 and in float64, and its error is the distance
between the two: what its arithmetic loses, whatever its iterates. Where they should be those of the
reference, the float64 run must also be right. Value, plan and potentials are those of the problem
with its cost given; the gradient is that of the value with respect to the token vectors.
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
from benchmarks.operator.jobs import Results, Task
from benchmarks.operator.measure import check, errors, truth_of
from benchmarks.operator.providers import PROVIDERS, Provider
from benchmarks.operator.rows import FAILED, Row, row_of

EPSILONS = (0.5, 0.1, 0.05, 0.01)
SHAPES = tuple(f"8x128x128x128x200:{data}" for data in ("random", "aligned", "clusters"))
PROVIDED = ("cpu", "reference", "torch", "torch_bmm", "pot", "pot_kernel", "geomloss", "ott")
COLUMNS = {
    "error_value": "loss",
    "error_plan": "plan",
    "error_potentials": "potentials",
    "error_gradient": "gradient",
}
PEERS = {"pot": "POT", "geomloss": "GeomLoss", "ott": "OTT-JAX"}
# A number that is stored in float32 has half of this as its own relative rounding.
ROUNDING = torch.finfo(torch.float32).eps


def measure(names: Sequence[str], cases: Sequence[Case]) -> list[Row]:
    """One row per provider, temperature and kind of data; no times."""
    rows = []
    for given, epsilon in itertools.product(cases, EPSILONS):
        case = replace(given, epsilon=epsilon)
        print(f"accuracy {case.name} epsilon {epsilon:g}", flush=True)
        for name in (name for name in names if name in PROVIDED):
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
        found = _rounding(provider, solve)
        found["error_gradient"] = _rounding(provider, vectors)["error_gradient"]
        if not all(math.isfinite(error) for error in found.values()):
            raise AssertionError("results are not finite")
    except (AssertionError, RuntimeError) as failure:
        print(f"  {provider.name} failed: {failure}")
        return replace(row, ms_p50=FAILED, note=str(failure))
    rounded: dict[str, Any] = {name: float(f"{error:.3g}") for name, error in found.items()}
    return replace(row, **rounded)


def _rounding(provider: Provider, task: Task) -> dict[str, float]:
    precise = task._replace(case=replace(task.case, dtype=torch.float64))
    exact = _results(provider, precise)
    if provider.first is not None:
        check(provider.name, exact, truth_of(precise, provider.first, provider.dual), precise)
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
    """Where a peer is more accurate: our row, its row, and the column.

    Errors below one rounding of a result are equal, and so are errors within a tenth.
    """
    found = {(row.provider, row.data, row.epsilon): row for row in rows if not row.note}
    for (name, data, epsilon), row in found.items():
        mine = found.get((ours, data, epsilon))
        if name in PEERS and mine is not None:
            for column in COLUMNS:
                error, other = float(getattr(mine, column)), float(getattr(row, column))
                if error > max(1.1 * other, ROUNDING):
                    yield mine, row, column


def summary(rows: Sequence[Row]) -> str:
    """The rows as aligned text, and where we are not the most accurate."""
    lines = [f"{'data':<10}{'epsilon':>8} {'provider':<12}" + _cells(COLUMNS.values())]
    for row in rows:
        cells = _cells([FAILED] if row.note else [getattr(row, column) for column in COLUMNS])
        lines.append(f"{row.data:<10}{row.epsilon:>8g} {row.provider:<12}{cells}")
    for mine, other, column in worse(rows):
        errors_of = getattr(mine, column), getattr(other, column)
        about = f"{mine.data}, epsilon {mine.epsilon:g}, {COLUMNS[column]}"
        lines.append(
            f"less accurate than {other.provider}: {about}: {errors_of[0]}, {errors_of[1]}"
        )
    return "\n".join(lines)


def _cells(values: Iterable[object]) -> str:
    return "".join(f" {value!s:>11}" for value in values)
