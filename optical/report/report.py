"""The study's report: tables, tests and figures, made from the cells' results alone."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optical.io.environment import environment
from optical.io.files import write_text
from optical.report.figures import draw_figures
from optical.report.render import Block, Code, Figure, Heading, Table, Text, _html, _markdown
from optical.report.summary import SEED, Estimate, Summary, measure_name
from optical.report.table import PLAN_COLUMNS, arm_cost, plan_rows, result_rows, write_rows
from optical.study.config import StudyConfig


def write_report(
    config: StudyConfig,
    results: Sequence[Mapping[str, Any]],
    costs: Mapping[str, Mapping[str, float]],
    output: Path,
) -> Path:
    """Write the report into `output`: Markdown, HTML, JSON, ``results.csv`` and ``figures/``.

    Args:
        config: the study's configuration.
        results: what the evaluation cells and the alignment cell wrote.
        costs: label of a cell -> its ``seconds`` and ``peak_mb``.
        output: an existing folder that can be written.

    Returns:
        The path of report.md.
    """
    summary = Summary.of(config, results)
    write_rows(result_rows(config, summary, costs), output / "results.csv")
    (output / "alignment.csv").unlink(missing_ok=True)
    for row in results:
        if "plan" in row:
            write_rows(plan_rows(row), output / "alignment.csv", PLAN_COLUMNS)
    blocks = [*_answer(config, summary), *_figures(config, summary, results, output)]
    blocks += [*_tables(config, summary), *_costs(summary, costs)]
    blocks += _provenance(config, costs)
    write_text(output / "report.json", json.dumps(summary.to_dict(), indent=1) + "\n")
    write_text(output / "report.html", _html(config.title, blocks, output))
    write_text(output / "report.md", "\n\n".join(_markdown(block) for block in blocks) + "\n")
    return output / "report.md"


def _answer(config: StudyConfig, summary: Summary) -> list[Block]:
    blocks: list[Block] = [Heading(config.title, 1)]
    if config.note:
        blocks.append(Text(config.note))
    sentences = []
    name = measure_name(summary.measure)
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
                    [
                        summary.means[summary.measure][collection, a, x]
                        for x in summary.languages_of(collection)
                    ]
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
        if gap.recovered_low and gap.recovered_high:
            sentences.append(
                f"On {gap.collection}, **{gap.arm}** goes {_share(gap.recovered_low)} of the way "
                f"from {baseline} to English documents in the low-resource languages and "
                f"{_share(gap.recovered_high)} in the high-resource ones; high minus low is "
                f"{_signed(gap.gap)}."
            )
    return [*blocks, Heading("Result"), Text("\n".join(f"- {line}" for line in sentences))]


def _tables(config: StudyConfig, summary: Summary) -> list[Block]:
    name = measure_name(summary.measure)
    blocks: list[Block] = [Heading(f"{name} per language and arm")]
    ceilings = [key for key in summary.scores if key[1] not in summary.arms]
    for collection in summary.collections:
        ceiling = [f"{key[1]}: {_cell(summary, key)}." for key in ceilings if key[0] == collection]
        rows = [
            [
                config.names.get(language, language),
                config.resource(language),
                *(_cell(summary, (collection, arm, language)) for arm in summary.arms),
            ]
            for language in summary.languages_of(collection)
        ]
        first = summary.languages_of(collection)[0]
        queries = len(summary.scores[collection, summary.arms[0], first])
        caption = f"{collection}: {name} with 95 % intervals, {queries} queries."
        blocks.append(
            Table(["language", "resource", *summary.arms], rows, " ".join([caption, *ceiling]))
        )
    if summary.gaps:
        blocks.append(Heading("The gap between high- and low-resource languages"))
        blocks.append(
            Table(
                [
                    "collection",
                    "arm",
                    "low",
                    "high",
                    "high minus low",
                    f"of the {summary.arms[0]} gap closed",
                    "low: way to English",
                    "high: way to English",
                ],
                [
                    [
                        gap.collection,
                        gap.arm,
                        f"{gap.low_mean:.3f}",
                        f"{gap.high_mean:.3f}",
                        _signed(gap.gap),
                        *(
                            _share(share) if share else "–"
                            for share in (gap.closed, gap.recovered_low, gap.recovered_high)
                        ),
                    ]
                    for gap in summary.gaps
                ],
                f"{name}; low: mean of {', '.join(config.low)}, high: mean of "
                f"{', '.join(config.high)}. Way to English: how far the arm goes from "
                f"{summary.arms[0]} to English documents. A share of a gap is given where the gap "
                "is above zero. 95 % bootstrap intervals over queries.",
            )
        )
    if config.translation and summary.gaps:
        blocks += _gains(config, summary)
    blocks.append(Heading("Comparisons"))
    blocks.append(
        Table(
            ["collection", "language", "arms", "difference", "p", "p (Holm)", "queries"],
            [
                [
                    one.collection,
                    one.language,
                    f"{one.arm} – {one.against}",
                    _signed((one.difference, one.low, one.high)),
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
    if summary.tokens:
        blocks += _tokens(config, summary)
    if summary.error_rates:
        blocks += _error_rates(config, summary)
    return blocks


def _gains(config: StudyConfig, summary: Summary) -> list[Block]:
    rows = [
        [gap.collection, gap.arm, *(_share(x) if x else "–" for x in (gap.gain_low, gap.gain_high))]
        for gap in summary.gaps
        if gap.arm != config.translation
    ]
    return [
        Heading("Gain over the translation baseline"),
        Table(
            ["collection", "arm", "low", "high"],
            rows,
            f"Relative gain in {measure_name(summary.measure)} over {config.translation}, with 95 "
            "% bootstrap intervals.",
        ),
    ]


def _tokens(config: StudyConfig, summary: Summary) -> list[Block]:
    rows = [
        [
            config.names.get(language, language),
            tokenizer,
            f"{found['tokens']:.2f}",
            f"{found['unknown']:.2%}",
        ]
        for language, tokenizers in summary.tokens.items()
        for tokenizer, found in tokenizers.items()
    ]
    caption = "How the tokenizers cut the texts of the collections."
    head = ["language", "tokenizer of the", "tokens per word", "unknown tokens"]
    return [Heading("Tokenizers"), Table(head, rows, caption)]


def _error_rates(config: StudyConfig, summary: Summary) -> list[Block]:
    arms = list(dict.fromkeys(arm for arm, _ in summary.error_rates))
    rows = [
        [
            config.names.get(language, language),
            *(f"{summary.error_rates.get((arm, language), float('nan')):.3f}" for arm in arms),
        ]
        for language in summary.languages
        if any((arm, language) in summary.error_rates for arm in arms)
    ]
    return [
        Heading("Word alignment"),
        Table(
            ["language", *arms],
            rows,
            "Alignment error rate of the plans between an arm's model and the teacher, against the "
            "word table on sentence pairs that no arm learnt from; the mean over seeds.",
        ),
    ]


def _costs(summary: Summary, costs: Mapping[str, Mapping[str, float]]) -> list[Block]:
    rows = []
    for arm in summary.arms:
        seconds, peak = arm_cost(arm, costs)
        rows.append([arm, f"{seconds / 60:.1f}", f"{peak:.0f}"])
    if not costs:
        return []
    return [
        Heading("Cost"),
        Table(
            ["arm", "minutes", "peak memory in MB"],
            rows,
            "Training and search of all languages and seeds of an arm, and the largest memory in "
            "any of them: the GPU's where there is one, else of the whole process.",
        ),
    ]


def _provenance(config: StudyConfig, costs: Mapping[str, Mapping[str, float]]) -> list[Block]:
    known = environment()
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    facts = [
        f"Written {datetime.date.today().isoformat()} by optical, commit {known['commit']}.",
        f"Python {known['python']}; {versions}.",
        f"Seeds: {', '.join(map(str, config.seeds))}; scores are averaged over them. "
        f"Role of the student: {config.role}.",
        "Computing time of the cells: "
        f"{sum(cost['seconds'] for cost in costs.values()) / 60:.1f} minutes.",
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


def _signed(estimate: Estimate) -> str:
    point, low, high = estimate
    return f"{point:+.3f} [{low:+.3f}, {high:+.3f}]"


def _share(estimate: Estimate) -> str:
    point, low, high = estimate
    return f"{point:.0%} [{low:.0%}, {high:.0%}]"


def _p(p: float) -> str:
    return f"{p:.1e}" if p < 0.001 else f"{p:.3f}"


def _figures(
    config: StudyConfig, summary: Summary, results: Sequence[Mapping[str, Any]], output: Path
) -> list[Block]:
    name = measure_name(summary.measure)
    captions = {
        "measure_per_language": f"{name} per language and arm with 95 % intervals; dashed: English "
        "documents.",
        "gap_per_arm": f"High- minus low-resource {name} per arm with 95 % intervals; less is "
        "fairer.",
        "pairs": f"{name} over the number of sentence pairs, with 95 % intervals; dashed: "
        "high-resource languages.",
    }
    for row in results:
        if "plan" in row:
            language = config.names.get(row["language"], row["language"])
            captions["alignment"] = (
                f"Transport plan of one {language} sentence (rows) and its English translation "
                f"(columns), each row as shares of its mass; mean transported cosine distance "
                f"{row['value_linear']:.3f}."
            )
    drawn = draw_figures(output / "results.csv", output / "figures")
    return [
        Heading("Figures"),
        *(Figure(path, captions[key]) for key, path in drawn.items() if key in captions),
    ]
