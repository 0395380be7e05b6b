"""The results of a study as one flat table, ``results.csv``, from which figures are drawn.

The column ``kind`` gives the meaning of a row:

    measure     a measure of an arm on a language of a collection, with its interval
    ceiling     the same for English documents, which are not an arm
    gap         high minus low resource; `closed`, `recovered_low`, `recovered_high`, `gain_low` and
                `gain_high` are the shares of ``optical.report.summary.Gap``
    difference  an arm minus the arm in `against`; `p` and `p_holm` are the paired tests
    pool        a measure of an arm on the mixed-language pool of a collection
    pool_gain   the same minus the first arm, which is in `against`; the interval is paired
    pool_share, pool_relevant, pool_rank   share of a language in the first ten documents and among
                the relevant ones of a pool, and its rank bias
    curve       a point of a curve: the arm in `against` is trained on `pairs` sentence pairs
    aer         alignment error rate of an arm's transport plans
    fertility, unknown    tokens per word, and share of unknown tokens, of the tokenizer in `arm`
    unseen      share of the running words of a language's texts that no sentence pair contains
    seconds, peak_mb      cost of an arm, over all its languages and seeds
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optical.io.files import read_lines, write_text
from optical.report.summary import Estimate, StudyDescription, Summary

COLUMNS = (
    "kind", "collection", "measure", "arm", "against", "language", "name", "group", "pairs",
    "value", "low", "high", "p", "p_holm",
)  # fmt: skip
PLAN_COLUMNS = ("language", "other", "english", "row", "column", "mass", "value_linear")
# Differences of an arm to the arm in `against` (empty: values of an arm that has none) per query.
QUERY_COLUMNS = ("collection", "language", "query", "arm", "against", "value", "difference")
# Losses as trainers log them; `part` is "train" or "validation".
LOSS_COLUMNS = ("arm", "language", "name", "seed", "part", "step", "loss")
# Columns of any table that hold numbers.
NUMBERS = {
    *("pairs", "value", "low", "high", "p", "p_holm", "row", "column", "mass", "value_linear"),
    *("difference", "step", "loss"),
}

Row = dict[str, Any]


def result_rows(
    study: StudyDescription, summary: Summary, costs: Mapping[str, Mapping[str, float]]
) -> list[Row]:
    """Return all numbers of the report as table rows."""
    rows = list(_measure_rows(study, summary))
    rows += _gap_rows(summary)
    for comparison in summary.comparisons:
        rows.append(
            {
                "kind": "difference",
                "collection": comparison.collection,
                "measure": summary.measure,
                "arm": comparison.arm,
                "against": comparison.against,
                **_language_columns(study, comparison.language),
                "value": comparison.difference,
                "low": comparison.low,
                "high": comparison.high,
                "p": comparison.p,
                "p_holm": comparison.p_holm,
            }
        )
    rows += _pool_rows(study, summary)
    for (arm, language), rate in summary.error_rates.items():
        language_columns = _language_columns(study, language)
        rows.append({"kind": "aer", "arm": arm, **language_columns, "value": rate})
    for language, tokenizers in summary.tokens.items():
        for tokenizer, statistics in tokenizers.items():
            shared = {"arm": tokenizer, **_language_columns(study, language)}
            rows.append({"kind": "fertility", **shared, "value": statistics["tokens"]})
            rows.append({"kind": "unknown", **shared, "value": statistics["unknown"]})
    for language, share in summary.unseen.items():
        rows.append({"kind": "unseen", **_language_columns(study, language), "value": share})
    for arm in summary.arms:
        seconds, peak_mb = arm_cost(arm, costs)
        rows.append({"kind": "seconds", "arm": arm, "value": seconds})
        rows.append({"kind": "peak_mb", "arm": arm, "value": peak_mb})
    return rows


def _measure_rows(study: StudyDescription, summary: Summary) -> Iterable[Row]:
    for measure, table in summary.means.items():
        for (collection, arm, language), mean in table.items():
            row = {
                "kind": "measure" if arm in summary.arms else "ceiling",
                "collection": collection,
                "measure": measure,
                "arm": arm,
                **_language_columns(study, language),
                "pairs": summary.pairs.get((arm, language)),
                "value": mean,
            }
            if measure == summary.measure:
                low, high = summary.intervals[collection, arm, language]
                row |= {"low": low, "high": high}
                for curve, members in study.curves.items():
                    if arm in members:
                        yield {**row, "kind": "curve", "arm": curve, "against": arm}
            yield row


def _gap_rows(summary: Summary) -> Iterable[Row]:
    kinds = ("gap", "closed", "recovered_low", "recovered_high", "gain_low", "gain_high")
    for gap in summary.gaps:
        for kind in kinds:
            estimate: Estimate | None = getattr(gap, kind)
            if estimate is not None:
                value, low, high = estimate
                yield {
                    "kind": kind,
                    "collection": gap.collection,
                    "measure": summary.measure,
                    "arm": gap.arm,
                    "value": value,
                    "low": low,
                    "high": high,
                }


def _pool_rows(study: StudyDescription, summary: Summary) -> Iterable[Row]:
    for pool in summary.pools:
        shared = {"collection": pool.collection, "arm": pool.arm}
        value, low, high = pool.estimate
        measured = {"measure": summary.measure, "value": value, "low": low, "high": high}
        yield {"kind": "pool", **shared, **measured}
        if pool.gain:
            value, low, high = pool.gain
            gained = {"against": summary.arms[0], "value": value, "low": low, "high": high}
            yield {"kind": "pool_gain", **shared, **measured, **gained}
        for language, own in pool.bias.items():
            for name, number in own.items():
                columns = _language_columns(study, language)
                yield {"kind": f"pool_{name}", **shared, **columns, "value": number}


def arm_cost(arm: str, costs: Mapping[str, Mapping[str, float]]) -> tuple[float, float]:
    """Return the total seconds and the peak memory in MB of an arm's trainings and searches."""
    arm_costs = [
        cost
        for label, cost in costs.items()
        if label.startswith((f"train {arm} ", f"evaluate {arm} "))
    ]
    return (
        sum(cost["seconds"] for cost in arm_costs),
        max((cost["peak_mb"] for cost in arm_costs), default=0.0),
    )


def write_rows(rows: Sequence[Row], path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """Write rows as CSV with six significant digits; missing values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _formatted(row.get(name)) for name in columns})
    write_text(path, text.getvalue())


def read_rows(path: str | Path, columns: Sequence[str] = COLUMNS) -> list[Row]:
    """Read rows written by :func:`write_rows`; empty numbers become None.

    Raises:
        FileNotFoundError: no such file.
        ValueError: other columns, or an invalid number; the message names the file and the line.
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
                    name: (float(value) if value else None) if name in NUMBERS else value
                    for name, value in row.items()
                }
            )
        except (TypeError, ValueError):
            raise ValueError(f"{path}:{number}: a value that is no number") from None
    return rows


def plan_rows(aligned: Mapping[str, Any]) -> list[Row]:
    """Return the transport plan of one sentence pair, one row per entry."""
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


def query_rows(summary: Summary, starts: Mapping[str, Sequence[str]]) -> list[Row]:
    """Return the value of every query, and its difference to the arm that an arm starts from.

    Arms that start from no arm are set against the first arm of the study.
    """
    rows = []
    for (collection, arm, language), values in summary.scores.items():
        against = next((x for x in starts.get(arm, ()) if x in summary.arms), summary.arms[0])
        others = summary.scores.get((collection, against, language))
        if arm not in summary.arms or arm == against or others is None:
            continue
        for query, value in values.items():
            if query in others:
                rows.append(
                    {
                        "collection": collection,
                        "language": language,
                        "query": query,
                        "arm": arm,
                        "against": against,
                        "value": value,
                        "difference": value - others[query],
                    }
                )
    return rows


def loss_rows(
    study: StudyDescription, logs: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[Row]:
    """Return the losses of trainings as table rows.

    Args:
        study: names of the languages.
        logs: label of a training task, `train ARM LANGUAGE seed SEED`, -> the entries that the
            trainer logged.
    """
    rows = []
    for label, entries in logs.items():
        _, arm, language, _, seed, *role = [*label.split(), "", "", ""][:6]
        shared = {
            "arm": " ".join([arm, *role]).strip(),
            "language": language,
            "name": study.name_of(language),
            "seed": seed,
        }
        for entry in entries:
            for key, part in (("loss", "train"), ("eval_loss", "validation")):
                if key in entry:
                    rows.append({**shared, "part": part, "step": entry["step"], "loss": entry[key]})
    return rows


def _language_columns(study: StudyDescription, language: str) -> Row:
    return {
        "language": language,
        "name": study.name_of(language),
        "group": study.group_of(language),
    }


def _formatted(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
