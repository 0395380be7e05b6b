"""The study's report: tables, tests and figures, made from the cells' results alone."""

from __future__ import annotations

import base64
import datetime
import html
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from optical.config import StudyConfig
from optical.files import write_text
from optical.significance import correct, interval, paired_test
from optical.training import environment

SEED = 0
RESAMPLES = 10_000
# Okabe and Ito's palette: told apart by colour-blind readers and in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

Values = dict[str, float]
# (collection, arm, language) -> query id -> the measure, averaged over seeds
Scores = dict[tuple[str, str, str], Values]


def write_report(
    config: StudyConfig,
    results: Sequence[Mapping[str, Any]],
    times: Mapping[str, float],
    output: Path,
) -> Path:
    """Write ``report.md``, ``report.html``, ``report.json`` and ``figures/`` into `output`.

    Args:
        config: the study's configuration.
        results: what the evaluation cells and the alignment cell wrote.
        times: seconds per cell, over all runs of the study.
        output: an existing folder that can be written.

    Returns:
        The path of report.md.
    """
    summary = Summary.of(config, results)
    figures = _figures(config, summary, results, output / "figures")
    blocks = [*_answer(config, summary), *figures, *_tables(config, summary)]
    blocks += _provenance(config, times)
    write_text(output / "report.json", json.dumps(summary.to_dict(), indent=1) + "\n")
    write_text(output / "report.html", _html(config.title, blocks, output))
    write_text(output / "report.md", "\n\n".join(_markdown(block) for block in blocks) + "\n")
    return output / "report.md"


# Numbers


@dataclass
class Comparison:
    """Two arms on one language of one collection, query by query."""

    collection: str
    language: str
    arm: str
    against: str
    difference: float
    low: float
    high: float
    p: float
    queries: int
    p_holm: float = 1.0


@dataclass
class Gap:
    """Mean over the high-resource languages minus mean over the low-resource ones."""

    collection: str
    arm: str
    gap: float
    low: float
    high: float
    closed: float | None
    closed_low: float | None
    closed_high: float | None


@dataclass
class Summary:
    """Everything that the report says in numbers."""

    arms: list[str]
    languages: list[str]
    collections: list[str]
    measure: str
    scores: Scores
    means: dict[str, dict[tuple[str, str, str], float]]
    intervals: dict[tuple[str, str, str], tuple[float, float]]
    comparisons: list[Comparison] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)

    @classmethod
    def of(cls, config: StudyConfig, results: Sequence[Mapping[str, Any]]) -> Summary:
        rows = [row for row in results if "measures" in row]
        measure = next(iter(next(iter(rows[0]["measures"].values()))))
        names = next(iter(rows[0]["measures"].values())).keys()
        every = {name: _scores(rows, name) for name in names}
        scores = every[measure]
        summary = cls(
            arms=[arm.name for arm in config.arms],
            languages=list(config.languages),
            collections=list(config.collections),
            measure=measure,
            scores=scores,
            means={
                name: {key: _mean(values) for key, values in table.items()}
                for name, table in every.items()
            },
            intervals={key: interval(values, seed=SEED)[1:] for key, values in scores.items()},
        )
        summary.comparisons = summary._compare()
        if config.low and config.high:
            summary.gaps = summary._gaps(config)
        return summary

    def _compare(self) -> list[Comparison]:
        found = []
        pairs = [(new, old) for old, new in itertools.combinations(self.arms, 2)]
        for collection, language, (arm, against) in itertools.product(
            self.collections, self.languages, pairs
        ):
            new, old = (self.scores[collection, name, language] for name in (arm, against))
            tested = paired_test(new, old, seed=SEED)
            found.append(Comparison(collection, language, arm, against, *tested))
        for comparison, corrected in zip(found, correct([one.p for one in found]), strict=True):
            comparison.p_holm = corrected
        return found

    def _gaps(self, config: StudyConfig) -> list[Gap]:
        found = []
        for collection in self.collections:
            base: np.ndarray | None = None
            for arm in self.arms:
                draws = self._gap_draws(config, collection, arm)
                point = self._gap(config, collection, arm)
                low, high = np.quantile(draws, [0.025, 0.975])
                gap = Gap(collection, arm, point, float(low), float(high), None, None, None)
                if base is None:
                    base, base_point = draws, point
                elif np.quantile(base, 0.025) > 0:
                    # A share of a gap that may be zero says nothing.
                    share = 1 - draws / base
                    gap.closed = 1 - point / base_point
                    gap.closed_low, gap.closed_high = (
                        float(value) for value in np.quantile(share, [0.025, 0.975])
                    )
                found.append(gap)
        return found

    def _gap(self, config: StudyConfig, collection: str, arm: str) -> float:
        means = self.means[self.measure]
        high, low = (
            np.mean([means[collection, arm, language] for language in group])
            for group in (config.high, config.low)
        )
        return float(high - low)

    def _gap_draws(self, config: StudyConfig, collection: str, arm: str) -> np.ndarray:
        """Bootstrap over queries; languages that share their queries share the draws."""
        total = np.zeros(RESAMPLES)
        for group, sign in ((config.high, 1), (config.low, -1)):
            for language in group:
                values = self.scores[collection, arm, language]
                x = np.array(list(values.values()))
                draw = np.random.default_rng([SEED, *",".join(values).encode()])
                chosen = draw.integers(0, len(x), (RESAMPLES, len(x)))
                total += sign / len(group) * x[chosen].mean(axis=1)
        return total

    def to_dict(self) -> dict[str, Any]:
        """Everything in the tables as plain data; the numbers that a repeated run must equal."""
        return {
            "measure": self.measure,
            "means": [
                {"measure": name, "collection": c, "arm": arm, "language": language, "mean": mean}
                for name, table in self.means.items()
                for (c, arm, language), mean in table.items()
            ],
            "intervals": [
                {"collection": c, "arm": arm, "language": language, "low": low, "high": high}
                for (c, arm, language), (low, high) in self.intervals.items()
            ],
            "comparisons": [vars(comparison) for comparison in self.comparisons],
            "gaps": [vars(gap) for gap in self.gaps],
        }


def _scores(rows: Iterable[Mapping[str, Any]], measure: str) -> Scores:
    grouped: dict[tuple[str, str, str], list[Values]] = {}
    for row in rows:
        for collection, measures in row["measures"].items():
            key = (collection, row["arm"], row["language"])
            grouped.setdefault(key, []).append(measures[measure])
    return {
        key: {query: float(np.mean([seed[query] for seed in seeds])) for query in seeds[0]}
        for key, seeds in grouped.items()
    }


def _mean(values: Values) -> float:
    return float(np.mean(list(values.values())))


# The report as blocks, which are written once as Markdown and once as HTML


@dataclass
class Heading:
    text: str
    level: int = 2


@dataclass
class Text:
    text: str


@dataclass
class Table:
    head: list[str]
    rows: list[list[str]]
    caption: str


@dataclass
class Figure:
    path: Path
    caption: str


@dataclass
class Code:
    text: str


Block = Heading | Text | Table | Figure | Code


def _answer(config: StudyConfig, summary: Summary) -> list[Block]:
    blocks: list[Block] = [Heading(config.title, 1)]
    if config.note:
        blocks.append(Text(config.note))
    sentences = []
    name = _measure_name(summary.measure)
    baseline = summary.arms[0]
    for collection in summary.collections:
        for arm in summary.arms[1:]:
            won = [
                one
                for one in summary.comparisons
                if (one.collection, one.arm, one.against) == (collection, arm, baseline)
            ]
            means = [
                np.mean(
                    [summary.means[summary.measure][collection, a, x] for x in summary.languages]
                )
                for a in (arm, baseline)
            ]
            sure = sum(one.p_holm < 0.05 and one.difference > 0 for one in won)
            sentences.append(
                f"On {collection}, **{arm}** reaches a mean {name} of {means[0]:.3f} over the "
                f"languages ({baseline}: {means[1]:.3f}) and is above {baseline} in {sure} of "
                f"{len(won)} languages (Holm-corrected p < 0.05)."
            )
    for gap in summary.gaps:
        if gap.closed is not None:
            sentences.append(
                f"On {gap.collection}, {gap.arm} closes {gap.closed:.0%} "
                f"[{gap.closed_low:.0%}, {gap.closed_high:.0%}] of the gap between high- and "
                f"low-resource languages that {baseline} leaves."
            )
    return [*blocks, Heading("Result"), Text("\n".join(f"- {line}" for line in sentences))]


def _tables(config: StudyConfig, summary: Summary) -> list[Block]:
    name = _measure_name(summary.measure)
    blocks: list[Block] = [Heading(f"{name} per language and arm")]
    ceilings = [key for key in summary.scores if key[1] not in summary.arms]
    for collection in summary.collections:
        ceiling = [f"{key[1]}: {_cell(summary, key)}." for key in ceilings if key[0] == collection]
        rows = [
            [
                config.names.get(language, language),
                _resource(config, language),
                *(_cell(summary, (collection, arm, language)) for arm in summary.arms),
            ]
            for language in summary.languages
        ]
        queries = len(summary.scores[collection, summary.arms[0], summary.languages[0]])
        caption = f"{collection}: {name} with 95 % intervals, {queries} queries."
        blocks.append(
            Table(["language", "resource", *summary.arms], rows, " ".join([caption, *ceiling]))
        )
    if summary.gaps:
        blocks.append(Heading("The gap between high- and low-resource languages"))
        blocks.append(
            Table(
                ["collection", "arm", "high minus low", f"of the {summary.arms[0]} gap closed"],
                [
                    [
                        gap.collection,
                        gap.arm,
                        f"{gap.gap:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]",
                        "–"
                        if gap.closed is None
                        else f"{gap.closed:.0%} [{gap.closed_low:.0%}, {gap.closed_high:.0%}]",
                    ]
                    for gap in summary.gaps
                ],
                f"{name}, mean of {', '.join(config.high)} minus mean of {', '.join(config.low)}; "
                f"95 % bootstrap intervals over queries.",
            )
        )
    blocks.append(Heading("Comparisons"))
    blocks.append(
        Table(
            ["collection", "language", "arms", "difference", "p", "p (Holm)", "queries"],
            [
                [
                    one.collection,
                    one.language,
                    f"{one.arm} – {one.against}",
                    f"{one.difference:+.3f} [{one.low:+.3f}, {one.high:+.3f}]",
                    _p(one.p),
                    f"**{_p(one.p_holm)}**" if one.p_holm < 0.05 else _p(one.p_holm),
                    str(one.queries),
                ]
                for one in summary.comparisons
            ],
            f"{name}: paired randomisation tests over queries, two-sided, seed {SEED}; "
            f"Holm over the whole table; bold: p < 0.05.",
        )
    )
    blocks.append(Heading("All measures"))
    blocks.append(
        Table(
            ["collection", "language", "arm", *summary.means],
            [
                [
                    collection,
                    language,
                    arm,
                    *(f"{t[collection, arm, language]:.3f}" for t in summary.means.values()),
                ]
                for collection, arm, language in summary.scores
            ],
            "Means over queries and seeds.",
        )
    )
    return blocks


def _provenance(config: StudyConfig, times: Mapping[str, float]) -> list[Block]:
    known = environment()
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    facts = [
        f"Written {datetime.date.today().isoformat()} by optical, commit {known['commit']}.",
        f"Python {known['python']}; {versions}.",
        f"Seeds: {', '.join(map(str, config.seeds))}; scores are averaged over them. "
        f"Role of the student: {config.role}.",
        f"Computing time of all cells, interrupted runs included: {sum(times.values()) / 60:.1f} "
        "minutes.",
    ]
    return [
        Heading("How it was made"),
        Text("\n".join(f"- {fact}" for fact in facts)),
        Text("The configuration:"),
        Code(config.text.strip()),
    ]


def _cell(summary: Summary, key: tuple[str, str, str]) -> str:
    low, high = summary.intervals[key]
    return f"{summary.means[summary.measure][key]:.3f} [{low:.3f}, {high:.3f}]"


def _resource(config: StudyConfig, language: str) -> str:
    return "low" if language in config.low else "high" if language in config.high else ""


def _measure_name(measure: str) -> str:
    return {"AP": "MAP", "RR@10": "MRR@10"}.get(measure, measure)


def _p(p: float) -> str:
    return f"{p:.1e}" if p < 0.001 else f"{p:.3f}"


# Writers


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return "#" * block.level + " " + block.text
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Code):
        return f"```yaml\n{block.text}\n```"
    if isinstance(block, Figure):
        return (
            f"![{block.caption}]({block.path.parent.name}/{block.path.name})\n\n*{block.caption}*"
        )
    lines = [block.head, ["---"] * len(block.head), *block.rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n*{block.caption}*"


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1b1b; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0 0.3rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: left; }
th { border-bottom: 2px solid #444; } figure { margin: 1.5rem 0; } img { max-width: 100%; }
.caption, figcaption { color: #555; font-size: 0.9rem; }
pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto; font-size: 0.85rem; }
.wide { overflow-x: auto; }
"""


def _html(title: str, blocks: Sequence[Block], output: Path) -> str:
    body = "\n".join(_html_block(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _html_block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        lines = block.text.split("\n")
        if all(line.startswith("- ") for line in lines):
            return "<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in lines) + "</ul>"
        return f"<p>{_inline(block.text)}</p>"
    if isinstance(block, Code):
        return f"<pre>{html.escape(block.text)}</pre>"
    if isinstance(block, Figure):
        # Inside the page, so that the one file can be sent to somebody.
        data = base64.b64encode(block.path.read_bytes()).decode()
        caption = html.escape(block.caption)
        return (
            f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.head)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>"
        for row in block.rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>'
        f'</div><p class="caption">{html.escape(block.caption)}</p>'
    )


def _inline(text: str) -> str:
    """Escape a line; ``**bold**`` is the only markup that the report's own sentences use."""
    parts = html.escape(text).split("**")
    return "".join(f"<strong>{part}</strong>" if i % 2 else part for i, part in enumerate(parts))


# Figures


def _figures(
    config: StudyConfig,
    summary: Summary,
    results: Sequence[Mapping[str, Any]],
    folder: Path,
) -> list[Block]:
    import matplotlib

    matplotlib.use("Agg")
    blocks: list[Block] = [Heading("Figures")]
    name = _measure_name(summary.measure)
    path = folder / "measure_per_language.png"
    _draw_languages(config, summary, path)
    blocks.append(
        Figure(path, f"{name} per language and arm with 95 % intervals; dashed: English documents.")
    )
    if summary.gaps:
        path = folder / "gap_per_arm.png"
        _draw_gaps(summary, path)
        blocks.append(
            Figure(
                path,
                f"High- minus low-resource {name} per arm with 95 % intervals; less is fairer.",
            )
        )
    for row in results:
        if "plan" in row:
            path = folder / "alignment.png"
            _draw_alignment(row, path)
            language = config.names.get(row["language"], row["language"])
            blocks.append(
                Figure(
                    path,
                    f"Transport plan of one {language} sentence (rows) and its English translation "
                    f"(columns), each row as shares of its mass; mean transported cosine distance "
                    f"{row['value_linear']:.3f}.",
                )
            )
    return blocks


def _draw_languages(config: StudyConfig, summary: Summary, path: Path) -> None:
    from matplotlib import pyplot as plt

    count = len(summary.collections)
    figure, axes = plt.subplots(
        count, 1, figsize=(max(6.0, 1.3 * len(summary.languages) + 2), 3.4 * count), squeeze=False
    )
    step = 0.7 / max(len(summary.arms), 1)
    for axis, collection in zip(axes[:, 0], summary.collections, strict=True):
        for index, arm in enumerate(summary.arms):
            keys = [(collection, arm, language) for language in summary.languages]
            means = np.array([summary.means[summary.measure][key] for key in keys])
            bounds = np.array([summary.intervals[key] for key in keys])
            place = np.arange(len(keys)) + (index - (len(summary.arms) - 1) / 2) * step
            axis.bar(
                place,
                means,
                0.9 * step,
                color=COLOURS[index % len(COLOURS)],
                label=arm,
                yerr=np.abs(bounds.T - means),
                error_kw={"elinewidth": 1, "ecolor": "#333333"},
            )
        for c, arm, language in summary.scores:
            if c == collection and arm not in summary.arms:
                level = summary.means[summary.measure][c, arm, language]
                axis.axhline(level, color="#555555", linestyle="--", linewidth=1, label=arm)
        labels = [
            f"{config.names.get(language, language)}\n{_resource(config, language)}".strip()
            for language in summary.languages
        ]
        axis.set_xticks(range(len(labels)), labels)
        axis.set_ylabel(_measure_name(summary.measure))
        axis.set_title(collection)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    _save(figure, path)


def _draw_gaps(summary: Summary, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7.0, 0.8 + 0.45 * len(summary.gaps)))
    labels = [
        f"{gap.collection}: {gap.arm}" if len(summary.collections) > 1 else gap.arm
        for gap in summary.gaps
    ]
    points = np.array([gap.gap for gap in summary.gaps])
    bounds = np.array([(gap.low, gap.high) for gap in summary.gaps])
    colours = [COLOURS[summary.arms.index(gap.arm) % len(COLOURS)] for gap in summary.gaps]
    axis.barh(labels, points, color=colours, xerr=np.abs(bounds.T - points), ecolor="#333333")
    axis.axvline(0, color="#333333", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_xlabel(f"{_measure_name(summary.measure)}, high minus low resource")
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _draw_alignment(row: Mapping[str, Any], path: Path) -> None:
    from matplotlib import pyplot as plt

    plan = np.array(row["plan"])
    shares = plan / plan.sum(axis=1, keepdims=True)
    figure, axis = plt.subplots(figsize=(2.0 + 0.45 * plan.shape[1], 1.4 + 0.36 * plan.shape[0]))
    image = axis.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    axis.set_xticks(range(plan.shape[1]), row["english_tokens"], rotation=60, ha="right")
    axis.set_yticks(range(plan.shape[0]), row["other_tokens"])
    figure.colorbar(image, ax=axis, label="share of the row's mass")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.tight_layout()
    # No time stamp inside: the same numbers give the same file.
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
