"""The README's answer to the research question: tables and figures, made of a study's table."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

from benchmarks.operator.jobs import ROOT
from benchmarks.tables import operator as operator_tables
from optical.report.figures import draw_curves, draw_figures
from optical.report.table import Row, read_rows

STUDIES = ROOT / "examples" / "results"
RESULTS = STUDIES / "clir_cpu" / "results.csv"
FURTHER = STUDIES / "clir_further" / "results.csv"
FIGURES = ROOT / "docs" / "figures" / "clir_cpu"
CURVES = ROOT / "docs" / "figures" / "clir_further" / "pairs.png"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
MORE_BEGIN, MORE_END = "<!-- further:begin -->", "<!-- further:end -->"
# The collection that things were chosen on, the measure, and the arms that all are held against.
COLLECTION, MEASURE, BASELINE, OURS = "first-sentence", "AP", "zeroshot", "ot"
SURE = 0.05


def block(rows: Sequence[Row]) -> str:
    """What stands in the README between the markers."""
    here = _of_collection(rows)
    return "\n\n".join([measures(here), differences(here), *_figures()])


def further() -> str:
    """Arms that stand in no row of the first table, and collections that nothing was chosen on."""
    shown = {row["arm"] for row in read_rows(RESULTS)}
    rows = _of_collection(read_rows(FURTHER))
    arms = {row["arm"] for row in rows} - shown
    apart = [read_rows(STUDIES / name / "results.csv") for name in ("clir_heldout", "clir_queries")]
    curves = f"![MAP over the number of sentence pairs]({CURVES.relative_to(ROOT)})"
    answers = held_out([row for one in apart for row in one])
    return "\n\n".join([measures(rows, arms), curves, answers])


def _of_collection(rows: Sequence[Row]) -> list[Row]:
    here = [row for row in rows if row["collection"] in ("", COLLECTION)]
    return [row for row in here if row["measure"] in ("", MEASURE)]


def held_out(rows: Sequence[Row]) -> str:
    """The measure of every arm on each collection and language of several studies."""
    rows = [row for row in rows if row["measure"] == MEASURE]
    values = {(r["arm"], r["collection"]): r for r in rows if r["kind"] == "measure"}
    better = _better(rows, "collection")
    columns = _distinct((r["collection"], r["name"]) for r in values.values())
    english = {r["collection"]: r["value"] for r in rows if r["kind"] == "ceiling"}
    lines = [
        operator_tables.table_row(
            "arm", *(f"{collection}, {name}" for collection, name in columns)
        ),
        operator_tables.table_row("---", *["---:"] * len(columns)),
    ]
    for arm in _distinct(arm for arm, _ in values):
        cells = [
            f"{_interval(values[arm, one])}{better.get((arm, one), '')}"
            if (arm, one) in values
            else ""
            for one, _ in columns
        ]
        lines.append(operator_tables.table_row(f"`{arm}`", *cells))
    known = (f"{one} {_number(value)}" for one, value in english.items())
    caption = (
        f"*MAP with 95 % intervals over queries; marks as above. English documents: "
        f"{', '.join(known)}.*"
    )
    return "\n".join([*lines, "", caption])


def _better(rows: Sequence[Row], place: str) -> dict[tuple[Any, Any], str]:
    """(arm, language or collection) -> the mark of a sure difference from the baseline."""
    return {
        (r["arm"], r[place]): "\\*" if r["value"] > 0 else "\\-"
        for r in rows
        if r["kind"] == "difference" and r["against"] == BASELINE and r["p_holm"] < SURE
    }


def measures(rows: Sequence[Row], arms: Container[str] | None = None) -> str:
    """The measure of every arm (or of some) and language, and the gap between their two groups."""
    values = {(r["arm"], r["language"]): r for r in rows if r["kind"] == "measure"}
    gaps = {r["arm"]: r for r in rows if r["kind"] == "gap"}
    closed = {r["arm"]: r for r in rows if r["kind"] == "closed"}
    better = _better(rows, "language")
    named = {r["language"]: (r["name"], r["group"]) for r in values.values()}
    groups = ("low", "high")
    lines = [
        operator_tables.table_row(
            "arm", *(name for name, _ in named.values()), "low", "high", "high - low", "closed"
        ),
        operator_tables.table_row("---", *["---:"] * (len(named) + 4)),
    ]
    for arm in _distinct(row["arm"] for row in values.values()):
        if arms is not None and arm not in arms:
            continue
        if any((arm, language) not in values for language in named):
            continue
        cells = []
        for language in named:
            mark = better.get((arm, language), "")
            cells.append(f"{_number(values[arm, language]['value'])}{mark}")
        for group in groups:
            members = [language for language in named if named[language][1] == group]
            mean = sum(values[arm, language]["value"] for language in members) / len(members)
            cells.append(_number(mean))
        cells.append(_interval(gaps[arm]))
        share = closed.get(arm)
        cells.append(_percent(share) if share else "")
        lines.append(operator_tables.table_row(f"`{arm}`", *cells))
    ceiling = next((row for row in rows if row["kind"] == "ceiling"), None)
    english = f" {ceiling['arm']}: {_number(ceiling['value'])}." if ceiling else ""
    caption = (
        f"*MAP on {COLLECTION}.{english} \\* above and - below `{BASELINE}` (paired randomisation, "
        f"p < {SURE:g} after Holm over all comparisons of the study). High - low: with its 95 % "
        f"interval over queries and seeds; closed: the share of `{BASELINE}`'s gap.*"
    )
    return "\n".join([*lines, "", caption])


def differences(rows: Sequence[Row]) -> str:
    """How much every other arm differs from ours, language by language."""
    found = [r for r in rows if r["kind"] == "difference" and r["against"] == OURS]
    cells = {(r["arm"], r["language"]): r for r in found}
    languages = _distinct((r["language"], r["name"]) for r in found)
    lines = [
        operator_tables.table_row(f"minus `{OURS}`", *(name for _, name in languages)),
        operator_tables.table_row("---", *["---:"] * len(languages)),
    ]
    for arm in _distinct(r["arm"] for r in found):
        shown = []
        for language, _ in languages:
            row = cells.get((arm, language))
            if row is None:
                shown.append("")
                continue
            value = f"{row['value']:+.3f}".replace("0.", ".", 1)
            shown.append(f"**{value}**" if row["p_holm"] < SURE else value)
        lines.append(operator_tables.table_row(f"`{arm}`", *shown))
    caption = f"*Differences of MAP on {COLLECTION}; bold: p < {SURE:g} after Holm.*"
    return "\n".join([*lines, "", caption])


def _figures() -> Iterable[str]:
    titles = {
        "gap_per_arm": "High minus low resource, per arm",
        "alignment": "A transport plan of the trained student",
    }
    for name, title in titles.items():
        if (FIGURES / f"{name}.png").exists():
            yield f"![{title}]({(FIGURES / name).relative_to(ROOT)}.png)"


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _number(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1)


def _interval(row: Row) -> str:
    return f"{_number(row['value'])} [{_number(row['low'])}, {_number(row['high'])}]"


def _percent(row: Row) -> str:
    return f"{row['value']:.0%} [{row['low']:.0%}, {row['high']:.0%}]".replace("%", " %")


def main() -> None:
    """Rewrite the block of the README, and the figures."""
    draw_figures(RESULTS, FIGURES)
    CURVES.parent.mkdir(exist_ok=True)
    draw_curves(_of_collection(read_rows(FURTHER)), CURVES)
    operator_tables.rewrite(BEGIN, END, block(read_rows(RESULTS)))
    operator_tables.rewrite(MORE_BEGIN, MORE_END, further())
