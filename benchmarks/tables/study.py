"""Result tables of docs/results.md and README, and their figures, from the committed studies."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.operator.jobs import ROOT
from benchmarks.tables import operator as operator_tables
from optical.report.figures import draw_curves, draw_figures
from optical.report.style import COLOURS, panels, save
from optical.report.table import Row, read_rows

STUDIES = ROOT / "examples" / "results"
PAGE = ROOT / "docs" / "results.md"
FIGURES = ROOT / "docs" / "figures"
OVERVIEW = FIGURES / "overview.svg"
README_BLOCK = "answer"
# The development collection, the measure, and the two arms that others are compared with.
COLLECTION, MEASURE, BASELINE, OURS = "first-sentence", "AP", "zeroshot", "ot"
ALPHA = 0.05


class Part(NamedTuple):
    """A part of docs/results.md: a study, and studies with its models.

    Attributes:
        main: folder of the study in `STUDIES`, and of its figures.
        prefix: beginning of the names of the part's marked blocks.
        further: folder of a study with more arms, if there is one.
        held_out: folders of studies of collections that no choice was based on.
        explained: arm whose gain is drawn over properties of the languages.
    """

    main: str
    prefix: str
    further: str = ""
    held_out: tuple[str, ...] = ()
    explained: str = OURS

    def rows(self) -> list[Row]:
        """The results of the study."""
        return read_rows(STUDIES / self.main / "results.csv")

    def blocks(self) -> dict[str, str]:
        """Name of each marked block -> its content."""
        found = {"results": main_block(self)}
        if self.further:
            found["further"] = further(self)
        if self.held_out:
            found["heldout"] = held_out(self)
        return {self.prefix + name: content for name, content in found.items()}


# The students of the first part start from a multilingual model, those of the second from one that
# was pre-trained on English.
MULTILINGUAL = Part(
    "multilingual",
    "",
    "multilingual_further",
    ("multilingual_heldout", "multilingual_queries"),
    explained="words-divergence",
)
ENGLISH = Part("clir_cpu", "english_", "clir_further", ("clir_heldout", "clir_queries"))
PARTS = (MULTILINGUAL, ENGLISH)
# Rows of the README's table: arm -> description.
README_ARMS = {
    "zeroshot": "multilingual model tuned on English, zero-shot",
    "bm25-queries": "BM25, queries translated word by word",
    "codeswitch": "code-switched training",
    "ot": "optimal-transport distillation",
    "words-ot": "the same, with new subwords from sentence pairs",
    "words-divergence": "the same, without entropic bias (Sinkhorn divergence)",
}
OVERVIEW_ARMS = {
    "bm25-queries": "BM25, queries\ntranslated",
    "zeroshot": "zero-shot",
    "codeswitch": "code-switched\ntraining",
    "ot": "optimal\ntransport",
    "words-divergence": "new subwords,\ndivergence",
}


def main_block(part: Part) -> str:
    """The study: measures, differences from optimal transport, and links to the figures."""
    here = _of_collection(part.rows())
    pooled = [pools(here)] if any(row["kind"] == "pool" for row in here) else []
    return "\n\n".join([measures(here), differences(here), *pooled, *_figures(part)])


def further(part: Part) -> str:
    """Arms of the second study that the main table lacks, and curves over sentence pairs."""
    shown = {row["arm"] for row in part.rows()}
    rows = _of_collection(read_rows(STUDIES / part.further / "results.csv"))
    arms = {row["arm"] for row in rows} - shown
    curves = _link("MAP over the number of sentence pairs", _curves(part))
    return "\n\n".join([measures(rows, arms), curves])


def held_out(part: Part) -> str:
    """MAP of every arm on the collections that no choice was based on."""
    paths = [STUDIES / name / "results.csv" for name in part.held_out]
    return held_out_table([row for path in paths for row in read_rows(path)])


def _curves(part: Part) -> Path:
    return FIGURES / part.further / "pairs.png"


def _link(title: str, figure: Path) -> str:
    return f"![{title}]({figure.relative_to(PAGE.parent)})"


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
    """Draw the README's figure: MAP of some arms in low- and high-resource languages."""
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


def held_out_table(rows: Sequence[Row]) -> str:
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


def pools(rows: Sequence[Row]) -> str:
    """MAP and language bias of every arm on the pool of all languages."""
    cells = {(r["kind"], r["arm"], r["language"]): r["value"] for r in rows}
    groups = {r["language"]: r["group"] for r in rows if r["kind"] == "pool_share"}
    lines = [
        operator_tables.table_row(
            "arm", "MAP", f"minus `{BASELINE}`", "low-resource share", "displaced"
        ),
        operator_tables.table_row("---", *["---:"] * 4),
    ]
    gains = {row["arm"]: row for row in rows if row["kind"] == "pool_gain"}
    for arm, pool in _by_arm(rows, "pool").items():
        shares = {x: cells["pool_share", arm, x] for x in groups}
        wanted = {x: cells["pool_relevant", arm, x] for x in groups}
        if None in (*shares.values(), *wanted.values()):
            continue
        low = sum(share for x, share in shares.items() if groups[x] == "low")
        displaced = sum(abs(shares[x] - wanted[x]) for x in groups) / 2
        gain = _signed(gains[arm]) if arm in gains else ""
        told = (_interval(pool), gain, f"{low:.0%}", f"{displaced:.0%}")
        lines.append(operator_tables.table_row(f"`{arm}`", *told))
    fair = sum(group == "low" for group in groups.values()) / max(len(groups), 1)
    caption = (
        "*All languages in one list; differences with paired 95% intervals. Low-resource share: "
        f"of the first ten documents, {fair:.0%} without bias. Displaced: share of the first ten "
        "places that would have to change language to equal the relevant documents.*"
    )
    return "\n".join([*lines, "", caption]).replace("%", " %")


def _figures(part: Part) -> Iterable[str]:
    titles = {
        "gap_per_arm": "MAP, high- minus low-resource mean, per arm",
        "gains": "Gain in MAP over properties of the languages",
        "alignment": "A transport plan of the trained student",
    }
    for name, title in titles.items():
        figure = FIGURES / part.main / f"{name}.png"
        if figure.exists():
            yield _link(title, figure)


def draw_gains(rows: Sequence[Row], arm: str = OURS) -> Any:
    """Draw the gain of an arm over properties of the languages, or return None.

    The properties are the measure of the zero-shot model, the tokens per word of its tokenizer, and
    the share of words that no sentence pair contains.
    """
    here = _of_collection(rows)
    gains = {
        row["language"]: row
        for row in here
        if row["kind"] == "difference" and (row["arm"], row["against"]) == (arm, BASELINE)
    }
    properties = {
        "MAP of the zero-shot model": ("measure", BASELINE),
        "tokens per word": ("fertility", "teacher"),
        "share of words in no sentence pair": ("unseen", ""),
    }
    values = {
        title: {
            row["language"]: row["value"]
            for row in here
            if row["kind"] == kind and row["arm"] == owner and row["language"] in gains
        }
        for title, (kind, owner) in properties.items()
    }
    if not all(values.values()):
        return None
    figure, axes = panels(len(values), len(values), 3.2, 3.0, sharey=True)
    for axis, (title, places) in zip(axes, values.items(), strict=True):
        spread = max(places.values()) - min(places.values())
        for language, gain in gains.items():
            group = next(r["group"] for r in here if r["language"] == language and r["group"])
            colour = COLOURS[1] if group == "low" else COLOURS[0]
            error = [[gain["value"] - gain["low"]], [gain["high"] - gain["value"]]]
            style = {"fmt": "o", "color": colour, "markersize": 4, "elinewidth": 0.8}
            axis.errorbar(places[language], gain["value"], yerr=error, **style)
            # The name stands below the point if the name of a near point stands above.
            near = any(
                0 <= x - places[language] < 0.15 * spread and abs(y["value"] - gain["value"]) < 0.01
                for x, y in ((places[other], gains[other]) for other in gains if other != language)
            )
            shift = {"xytext": (5, -11 if near else 4), "textcoords": "offset points"}
            axis.annotate(gain["name"], (places[language], gain["value"]), fontsize=8, **shift)
        axis.axhline(0, color="#555555", linewidth=0.8)
        axis.margins(x=0.2)
        axis.set_xlabel(title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"gain in MAP of {arm}")
    return figure


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _number(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1)


def _interval(row: Row) -> str:
    return f"{_number(row['value'])} [{_number(row['low'])}, {_number(row['high'])}]"


def _signed(row: Row) -> str:
    value, low, high = (f"{row[x]:+.3f}".replace("0.", ".", 1) for x in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _percent(row: Row) -> str:
    return f"{row['value']:.0%} [{row['low']:.0%}, {row['high']:.0%}]".replace("%", " %")


def main() -> None:
    """Rewrite all tables and figures of the studies."""
    for part in PARTS:
        rows = part.rows()
        draw_figures(STUDIES / part.main / "results.csv", FIGURES / part.main, ("png",))
        gains = draw_gains(rows, part.explained)
        if gains:
            save(gains, FIGURES / part.main / "gains", ("png",))
        if part.further:
            curves = _curves(part)
            curves.parent.mkdir(exist_ok=True)
            further_rows = read_rows(STUDIES / part.further / "results.csv")
            save(draw_curves(_of_collection(further_rows)), curves, ("png",))
        for name, content in part.blocks().items():
            operator_tables.write_block(PAGE, name, content)
    rows = MULTILINGUAL.rows()
    draw_overview(rows, OVERVIEW)
    operator_tables.write_block(operator_tables.README, README_BLOCK, answer(rows))
