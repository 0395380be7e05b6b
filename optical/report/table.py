"""A study's results as one flat table of numbers, which a CSV file holds and figures are drawn of.

A row says one thing:

    measure     a measure of an arm on a language of a collection, with its interval
    ceiling     the same of English documents, which are no arm
    gap         high minus low resource; `closed`, `recovered_low`, `recovered_high`, `gain_low` and
                `gain_high` are the shares of ``optical.report.summary.Gap``
    difference  an arm minus the one in `against`; `p` and `p_holm` are the tests
    curve       a point of a curve: the arm named in `against` learns from `pairs` sentence pairs
    aer         alignment error rate of an arm's plans
    fertility, unknown    how the tokenizer in `arm` cuts a language
    seconds, peak_mb      what an arm cost, over all its languages and seeds
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optical.io.files import read_lines, write_text
from optical.report.summary import Estimate, Summary
from optical.study.config import StudyConfig

COLUMNS = (
    "kind", "collection", "measure", "arm", "against", "language", "name", "group", "pairs",
    "value", "low", "high", "p", "p_holm",
)  # fmt: skip
NUMBERS = ("pairs", "value", "low", "high", "p", "p_holm")
PLAN_COLUMNS = ("language", "other", "english", "row", "column", "mass", "value_linear")

Row = dict[str, Any]


def result_rows(
    config: StudyConfig, summary: Summary, costs: Mapping[str, Mapping[str, float]]
) -> list[Row]:
    """Everything that the report says in numbers, a row each."""
    rows = list(_measures(config, summary))
    for gap in summary.gaps:
        shared = {"collection": gap.collection, "measure": summary.measure, "arm": gap.arm}
        parts = ("gap", "closed", "recovered_low", "recovered_high", "gain_low", "gain_high")
        for kind in parts:
            estimate = getattr(gap, kind)
            if estimate is not None:
                rows.append({"kind": kind, **shared, **_estimated(estimate)})
    for one in summary.comparisons:
        rows.append(
            {
                "kind": "difference",
                "collection": one.collection,
                "measure": summary.measure,
                "arm": one.arm,
                "against": one.against,
                **_language(config, one.language),
                **_estimated((one.difference, one.low, one.high)),
                "p": one.p,
                "p_holm": one.p_holm,
            }
        )
    for (arm, language), rate in summary.error_rates.items():
        rows.append({"kind": "aer", "arm": arm, **_language(config, language), "value": rate})
    for language, tokenizers in summary.tokens.items():
        for tokenizer, found in tokenizers.items():
            shared = {"arm": tokenizer, **_language(config, language)}
            rows.append({"kind": "fertility", **shared, "value": found["tokens"]})
            rows.append({"kind": "unknown", **shared, "value": found["unknown"]})
    for arm in summary.arms:
        seconds, peak = arm_cost(arm, costs)
        rows.append({"kind": "seconds", "arm": arm, "value": seconds})
        rows.append({"kind": "peak_mb", "arm": arm, "value": peak})
    return rows


def _measures(config: StudyConfig, summary: Summary) -> Iterable[Row]:
    for measure, table in summary.means.items():
        for (collection, arm, language), mean in table.items():
            row = {
                "kind": "measure" if arm in summary.arms else "ceiling",
                "collection": collection,
                "measure": measure,
                "arm": arm,
                **_language(config, language),
                "pairs": summary.pairs.get((arm, language)),
                "value": mean,
            }
            if measure == summary.measure:
                low, high = summary.intervals[collection, arm, language]
                row |= {"low": low, "high": high}
                for curve, members in config.curves.items():
                    if arm in members:
                        yield {**row, "kind": "curve", "arm": curve, "against": arm}
            yield row


def arm_cost(arm: str, costs: Mapping[str, Mapping[str, float]]) -> tuple[float, float]:
    """Seconds of an arm's trainings and searches together, and the largest memory in MB."""
    own = [
        cost
        for label, cost in costs.items()
        if label.startswith((f"train {arm} ", f"evaluate {arm} "))
    ]
    return (
        sum(cost["seconds"] for cost in own),
        max((cost["peak_mb"] for cost in own), default=0.0),
    )


def write_rows(rows: Sequence[Row], path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """Write rows as CSV: numbers with six digits, what a row does not have left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _written(row.get(name)) for name in columns})
    write_text(path, text.getvalue())


def read_rows(path: str | Path, columns: Sequence[str] = COLUMNS) -> list[Row]:
    """Read what :func:`write_rows` wrote; numbers come back as numbers, what is empty as None.

    Raises:
        FileNotFoundError: no such file.
        ValueError: other columns, or a number that is none; the message names file and line.
    """
    lines = [line for _, line in read_lines(path)]
    reader = csv.DictReader(lines)
    if tuple(reader.fieldnames or ()) != tuple(columns):
        raise ValueError(f"{path}:1: columns {reader.fieldnames}, expected {', '.join(columns)}")
    rows = []
    for number, row in enumerate(reader, start=2):
        try:
            rows.append(
                {
                    name: (float(value) if value else None)
                    if name in (*NUMBERS, "row", "column", "mass", "value_linear")
                    else value
                    for name, value in row.items()
                }
            )
        except (TypeError, ValueError):
            raise ValueError(f"{path}:{number}: a value that is no number") from None
    return rows


def plan_rows(aligned: Mapping[str, Any]) -> list[Row]:
    """The plan of one sentence pair, an entry a row."""
    return [
        {
            "language": aligned["language"],
            "other": other,
            "english": english,
            "row": i,
            "column": j,
            "mass": aligned["plan"][i][j],
            "value_linear": aligned["value_linear"],
        }
        for i, other in enumerate(aligned["other_tokens"])
        for j, english in enumerate(aligned["english_tokens"])
    ]


def _language(config: StudyConfig, language: str) -> Row:
    return {
        "language": language,
        "name": config.names.get(language, language),
        "group": config.resource(language),
    }


def _estimated(estimate: Estimate) -> Row:
    value, low, high = estimate
    return {"value": value, "low": low, "high": high}


def _written(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
