"""Result tables of docs/results.md and README, and their figures, from the committed studies."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.operator.jobs import ROOT
from benchmarks.tables import operator as operator_tables
from optical.report.figures import draw_curves, draw_figures
from optical.report.style import COLOURS, save
from optical.report.table import Row, read_rows

STUDIES = ROOT / "examples" / "results"
RESULTS = STUDIES / "clir_cpu" / "results.csv"
FURTHER = STUDIES / "clir_further" / "results.csv"
PAGE = ROOT / "docs" / "results.md"
FIGURES = ROOT / "docs" / "figures" / "clir_cpu"
CURVES = ROOT / "docs" / "figures" / "clir_further" / "pairs.png"
OVERVIEW = ROOT / "docs" / "figures" / "overview.svg"
# Names of the marked blocks: three of docs/results.md, then the README's.
BLOCK, FURTHER_BLOCK, HELD_OUT_BLOCK, README_BLOCK = "results", "further", "heldout", "answer"
# The development collection, the measure, and the two arms that others are compared with.
COLLECTION, MEASURE, BASELINE, OURS = "first-sentence", "AP", "zeroshot", "ot"
ALPHA = 0.05
# Rows of the README's table: arm -> description.
README_ARMS = {
    "zeroshot": "zero-shot student",
    "bm25-queries": "BM25, queries translated word by word",
    "transfer": "vocabulary transfer, no training step",
    "codeswitch": "code-switched training",
    "ot": "optimal-transport distillation",
    "ot-and-codeswitch": "mean of the weights of `ot-long` and `codeswitch`",
}
OVERVIEW_ARMS = {
    "zeroshot": "zero-shot\nstudent",
    "bm25-queries": "BM25, translated\nqueries",
    "transfer": "vocabulary\ntransfer",
    "ot": "optimal-transport\ndistillation",
}


def block(rows: Sequence[Row]) -> str:
    """The main study: measures, differences from optimal transport, and links to the figures."""
    here = _of_collection(rows)
    return "\n\n".join([measures(here), differences(here), *_figures()])


def further() -> str:
    """Arms of the second study that the main table lacks, and curves over sentence pairs."""
    shown = {row["arm"] for row in read_rows(RESULTS)}
    rows = _of_collection(read_rows(FURTHER))
    arms = {row["arm"] for row in rows} - shown
    curves = f"![MAP over the number of sentence pairs]({CURVES.relative_to(PAGE.parent)})"
    return "\n\n".join([measures(rows, arms), curves])


def held_out_studies() -> str:
    """The collections that no choice was based on."""
    studies = ("clir_heldout", "clir_queries")
    return held_out([row for name in studies for row in read_rows(STUDIES / name / "results.csv")])


def answer(rows: Sequence[Row]) -> str:
    """The README's selection of arms: group means, and the gap between the groups."""
    here = _of_collection(rows)
    gaps, closed = _by_arm(here, "gap"), _by_arm(here, "closed")
    lines = [
        operator_tables.table_row("", "arm", "low", "high", "high - low", "gap closed"),
        operator_tables.table_row("---", "---", *["---:"] * 4),
    ]
    for arm, description in README_ARMS.items():
        means = [_number(group_mean(here, arm, group)) for group in ("low", "high")]
        share = _percent(closed[arm]) if arm in closed else ""
        cells = (description, f"`{arm}`", *means, _interval(gaps[arm]), share)
        lines.append(operator_tables.table_row(*cells))
    return "\n".join(lines)


def draw_overview(rows: Sequence[Row], path: Path) -> None:
    """Draw the README's figure: MAP of four arms in low- and high-resource languages."""
    here = _of_collection(rows)
    ceiling = _ceiling(here)

    def paint(axis: Any) -> None:
        for offset, group, colour in ((-0.2, "low", COLOURS[1]), (0.2, "high", COLOURS[0])):
            heights = [group_mean(here, arm, group) for arm in OVERVIEW_ARMS]
            places = [index + offset for index in range(len(heights))]
            bars = axis.bar(places, heights, 0.38, color=colour, label=f"{group}-resource")
            axis.bar_label(bars, [_number(height) for height in heights], padding=2, fontsize=9)
        if ceiling:
            label = f"{ceiling['arm']}: {_number(ceiling['value'])}"
            axis.axhline(ceiling["value"], color="#555555", ls="--", linewidth=1, label=label)
        axis.set_xticks(range(len(OVERVIEW_ARMS)), OVERVIEW_ARMS.values(), fontsize=9)
        axis.set_ylim(0, 1)
        axis.set_ylabel("MAP")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, bbox_to_anchor=(1.0, 1.0), loc="upper left", fontsize=8)

    operator_tables.save_figure(paint, path)


def _of_collection(rows: Sequence[Row]) -> list[Row]:
    here = [row for row in rows if row["collection"] in ("", COLLECTION)]
    return [row for row in here if row["measure"] in ("", MEASURE)]


def _by_arm(rows: Sequence[Row], kind: str) -> dict[Any, Row]:
    return {row["arm"]: row for row in rows if row["kind"] == kind}


def _ceiling(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row["kind"] == "ceiling"), None)


def group_mean(rows: Sequence[Row], arm: str, group: str) -> float:
    """Mean of the measure of an arm over the low- or the high-resource languages."""
    of_arm = [row for row in rows if row["kind"] == "measure" and row["arm"] == arm]
    values = [row["value"] for row in of_arm if row["group"] == group]
    return sum(values) / len(values)


def held_out(rows: Sequence[Row]) -> str:
    """MAP of every arm on each collection and language of several studies."""
    rows = [row for row in rows if row["measure"] == MEASURE]
    values = {(r["arm"], r["collection"]): r for r in rows if r["kind"] == "measure"}
    marks = _marks(rows, "collection")
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
            f"{_interval(values[arm, collection])}{marks.get((arm, collection), '')}"
            if (arm, collection) in values
            else ""
            for collection, _ in columns
        ]
        lines.append(operator_tables.table_row(f"`{arm}`", *cells))
    ceilings = (f"{collection} {_number(value)}" for collection, value in english.items())
    caption = (
        "*MAP with 95 % intervals over queries; marks as in the first table. English documents: "
        f"{', '.join(ceilings)}.*"
    )
    return "\n".join([*lines, "", caption])


def _marks(rows: Sequence[Row], key: str) -> dict[tuple[Any, Any], str]:
    """(arm, language or collection) -> mark of a significant difference from the baseline."""
    return {
        (r["arm"], r[key]): "\\*" if r["value"] > 0 else "\\-"
        for r in rows
        if r["kind"] == "difference" and r["against"] == BASELINE and r["p_holm"] < ALPHA
    }


def measures(rows: Sequence[Row], arms: Container[str] | None = None) -> str:
    """MAP per arm and language, the means of the two groups, and the gap between them."""
    values = {(r["arm"], r["language"]): r for r in rows if r["kind"] == "measure"}
    gaps, closed = _by_arm(rows, "gap"), _by_arm(rows, "closed")
    marks = _marks(rows, "language")
    names = {r["language"]: r["name"] for r in values.values()}
    lines = [
        operator_tables.table_row("arm", *names.values(), "low", "high", "high - low", "closed"),
        operator_tables.table_row("---", *["---:"] * (len(names) + 4)),
    ]
    for arm in _distinct(row["arm"] for row in values.values()):
        if arms is not None and arm not in arms:
            continue
        if any((arm, language) not in values for language in names):
            continue
        cells = [
            f"{_number(values[arm, language]['value'])}{marks.get((arm, language), '')}"
            for language in names
        ]
        cells += [_number(group_mean(rows, arm, group)) for group in ("low", "high")]
        cells.append(_interval(gaps[arm]))
        cells.append(_percent(closed[arm]) if arm in closed else "")
        lines.append(operator_tables.table_row(f"`{arm}`", *cells))
    ceiling = _ceiling(rows)
    english = f" {ceiling['arm']}: {_number(ceiling['value'])}." if ceiling else ""
    caption = (
        f"*MAP on {COLLECTION}.{english} \\* significantly above and - significantly below "
        f"`{BASELINE}` (paired randomisation, p < {ALPHA:g} after Holm over all comparisons of the "
        "study). High - low: difference of the group means, with its 95 % interval over queries "
        f"and seeds. Closed: share of the gap of `{BASELINE}` that is closed.*"
    )
    return "\n".join([*lines, "", caption])


def differences(rows: Sequence[Row]) -> str:
    """Difference of every other arm from optimal transport, per language."""
    compared = [r for r in rows if r["kind"] == "difference" and r["against"] == OURS]
    values = {(r["arm"], r["language"]): r for r in compared}
    languages = _distinct((r["language"], r["name"]) for r in compared)
    lines = [
        operator_tables.table_row(f"minus `{OURS}`", *(name for _, name in languages)),
        operator_tables.table_row("---", *["---:"] * len(languages)),
    ]
    for arm in _distinct(r["arm"] for r in compared):
        cells = []
        for language, _ in languages:
            row = values.get((arm, language))
            if row is None:
                cells.append("")
                continue
            value = f"{row['value']:+.3f}".replace("0.", ".", 1)
            cells.append(f"**{value}**" if row["p_holm"] < ALPHA else value)
        lines.append(operator_tables.table_row(f"`{arm}`", *cells))
    caption = f"*Differences of MAP on {COLLECTION}; bold: p < {ALPHA:g} after Holm.*"
    return "\n".join([*lines, "", caption])


def _figures() -> Iterable[str]:
    titles = {
        "gap_per_arm": "MAP, high- minus low-resource mean, per arm",
        "alignment": "A transport plan of the trained student",
    }
    for name, title in titles.items():
        if (FIGURES / f"{name}.png").exists():
            yield f"![{title}]({(FIGURES / name).relative_to(PAGE.parent)}.png)"


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _number(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1)


def _interval(row: Row) -> str:
    return f"{_number(row['value'])} [{_number(row['low'])}, {_number(row['high'])}]"


def _percent(row: Row) -> str:
    return f"{row['value']:.0%} [{row['low']:.0%}, {row['high']:.0%}]".replace("%", " %")


def main() -> None:
    """Rewrite all tables and figures of the studies."""
    draw_figures(RESULTS, FIGURES, ("png",))
    CURVES.parent.mkdir(exist_ok=True)
    save(draw_curves(_of_collection(read_rows(FURTHER))), CURVES, ("png",))
    rows = read_rows(RESULTS)
    draw_overview(rows, OVERVIEW)
    operator_tables.write_block(PAGE, BLOCK, block(rows))
    operator_tables.write_block(PAGE, FURTHER_BLOCK, further())
    operator_tables.write_block(PAGE, HELD_OUT_BLOCK, held_out_studies())
    operator_tables.write_block(operator_tables.README, README_BLOCK, answer(rows))
