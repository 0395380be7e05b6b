"""The report of a study: sentences, tables and figures, rendered as Markdown, HTML and JSON."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optical.io.environment import environment
from optical.io.files import write_text
from optical.report.figures import draw_figures
from optical.report.render import (
    Block,
    Code,
    Figure,
    Heading,
    Table,
    Text,
    to_html,
    to_markdown,
)
from optical.report.sentences import (
    ALPHA,
    error_rate_caption,
    result_sentences,
    share,
    signed,
)
from optical.report.summary import (
    LEAST_WHOLE,
    SEED,
    Comparison,
    StudyDescription,
    Summary,
    measure_name,
)
from optical.report.table import PLAN_COLUMNS, arm_cost, plan_rows, result_rows, write_rows


def write_report(
    study: StudyDescription,
    results: Sequence[Mapping[str, Any]],
    costs: Mapping[str, Mapping[str, float]],
    output: Path,
) -> Path:
    """Write the report into `output`: Markdown, HTML, JSON, ``results.csv`` and ``figures/``.

    Args:
        study: title, arms, languages and other properties of the study.
        results: rows written by the evaluation and alignment tasks.
        costs: label of a task -> its ``seconds`` and ``peak_mb``.
        output: an existing writable folder.

    Returns:
        The path of report.md.
    """
    summary = Summary.of(study, results)
    write_rows(result_rows(study, summary, costs), output / "results.csv")
    (output / "alignment.csv").unlink(missing_ok=True)
    for row in results:
        if "plan" in row:
            write_rows(plan_rows(row), output / "alignment.csv", PLAN_COLUMNS)
    blocks = [
        *_main_results(study, summary),
        *_figures(study, summary, results, output),
        *_measures_by_language(study, summary),
        *_gaps(study, summary),
        *_gains(study, summary),
        *_comparisons(summary),
        *_all_measures(summary),
        *_tokenizers(study, summary),
        *_error_rates(study, summary),
        *_costs(summary, costs),
        *_provenance(study, costs),
    ]
    write_text(output / "report.json", json.dumps(summary.to_dict(), indent=1) + "\n")
    write_text(output / "report.html", to_html(study.title, blocks))
    write_text(output / "report.md", to_markdown(blocks))
    return output / "report.md"


def _main_results(study: StudyDescription, summary: Summary) -> list[Block]:
    blocks: list[Block] = [Heading(study.title, 1)]
    if study.note:
        blocks.append(Text(study.note))
    return [*blocks, Heading("Result"), _bullets(result_sentences(study, summary))]


def _figures(
    study: StudyDescription,
    summary: Summary,
    results: Sequence[Mapping[str, Any]],
    output: Path,
) -> list[Block]:
    name = measure_name(summary.measure)
    captions = {
        "measure_per_language": f"{name} per language and arm with 95 % intervals. Dashed line: "
        "English documents.",
        "gap_per_arm": f"{name} of high-resource minus low-resource languages per arm, with 95 % "
        "intervals. A smaller gap is fairer.",
        "pairs": f"{name} over the number of sentence pairs, with 95 % intervals. Dashed lines: "
        "high-resource languages.",
    }
    for row in results:
        if "plan" in row:
            captions["alignment"] = (
                f"Transport plan of one {study.name_of(row['language'])} sentence (rows) and its "
                "English translation (columns). Each row shows shares of its mass. The mean "
                f"transported cosine distance is {row['value_linear']:.3f}."
            )
    drawn = draw_figures(output / "results.csv", output / "figures")
    return [
        Heading("Figures"),
        *(Figure(path, captions[key]) for key, path in drawn.items() if key in captions),
    ]


def _measures_by_language(study: StudyDescription, summary: Summary) -> list[Block]:
    name = measure_name(summary.measure)
    blocks: list[Block] = [Heading(f"{name} per language and arm")]
    ceilings = [key for key in summary.scores if key[1] not in summary.arms]
    for collection in summary.collections:
        ceiling = [
            f"{key[1]}: {_with_interval(summary, key)}." for key in ceilings if key[0] == collection
        ]
        languages = summary.languages_of(collection)
        rows = [
            [
                study.name_of(language),
                study.group_of(language),
                *(_with_interval(summary, (collection, arm, language)) for arm in summary.arms),
            ]
            for language in languages
        ]
        queries = len(summary.scores[collection, summary.arms[0], languages[0]])
        caption = f"{collection}: {name} with 95 % intervals, {queries} queries."
        head = ["language", "resource", *summary.arms]
        blocks.append(Table(head, rows, " ".join([caption, *ceiling])))
    return blocks


def _gaps(study: StudyDescription, summary: Summary) -> list[Block]:
    if not summary.gaps:
        return []
    baseline = summary.arms[0]
    head = ["collection", "arm", "low", "high", "high minus low", f"{baseline} gap closed"]
    head += ["low: recovered", "high: recovered"]
    rows = []
    for gap in summary.gaps:
        shares = (gap.closed, gap.recovered_low, gap.recovered_high)
        rows.append(
            [
                gap.collection,
                gap.arm,
                f"{gap.low_mean:.3f}",
                f"{gap.high_mean:.3f}",
                signed(gap.gap),
                *(share(each) if each else "–" for each in shares),
            ]
        )
    caption = (
        f"{measure_name(summary.measure)}. Low: mean of {', '.join(study.low)}. High: mean of "
        f"{', '.join(study.high)}. Recovered: share of the difference between {baseline} and "
        f"English documents. A share is undefined (–) if its denominator is below {LEAST_WHOLE} or "
        "hardly above zero. 95 % bootstrap intervals over queries and seeds."
    )
    heading = Heading("The gap between high- and low-resource languages")
    return [heading, Table(head, rows, caption)]


def _gains(study: StudyDescription, summary: Summary) -> list[Block]:
    if not study.translation or not summary.gaps:
        return []
    rows = [
        [gap.collection, gap.arm, *(share(x) if x else "–" for x in (gap.gain_low, gap.gain_high))]
        for gap in summary.gaps
        if gap.arm != study.translation
    ]
    caption = (
        f"Relative gain in {measure_name(summary.measure)} over {study.translation}, with 95 % "
        "bootstrap intervals."
    )
    head = ["collection", "arm", "low", "high"]
    return [Heading("Gain over the translation baseline"), Table(head, rows, caption)]


def _comparisons(summary: Summary) -> list[Block]:
    caption = (
        f"{measure_name(summary.measure)}: two-sided paired randomisation tests over queries, seed "
        f"{SEED}. The Holm correction covers the whole table. Bold: p < {ALPHA}."
    )
    blocks: list[Block] = [Heading("Comparisons"), _comparison_table(summary.comparisons, caption)]
    if summary.start_comparisons:
        blocks.append(
            _comparison_table(
                summary.start_comparisons, f"Arms against those that they start from. {caption}"
            )
        )
    return blocks


def _comparison_table(comparisons: Sequence[Comparison], caption: str) -> Table:
    head = ["collection", "language", "arms", "difference", "p", "p (Holm)", "queries"]
    rows = []
    for comparison in comparisons:
        p_holm = _p(comparison.p_holm)
        rows.append(
            [
                comparison.collection,
                comparison.language,
                f"{comparison.arm} – {comparison.against}",
                signed((comparison.difference, comparison.low, comparison.high)),
                _p(comparison.p),
                f"**{p_holm}**" if comparison.p_holm < ALPHA else p_holm,
                str(comparison.queries),
            ]
        )
    return Table(head, rows, caption)


def _all_measures(summary: Summary) -> list[Block]:
    rows = [
        [
            collection,
            language,
            arm,
            *(f"{means[collection, arm, language]:.3f}" for means in summary.means.values()),
        ]
        for collection, arm, language in summary.scores
    ]
    head = ["collection", "language", "arm", *summary.means]
    return [Heading("All measures"), Table(head, rows, "Means over queries and seeds.")]


def _tokenizers(study: StudyDescription, summary: Summary) -> list[Block]:
    if not summary.tokens:
        return []
    rows = [
        [
            study.name_of(language),
            tokenizer,
            f"{statistics['tokens']:.2f}",
            f"{statistics['unknown']:.2%}",
        ]
        for language, tokenizers in summary.tokens.items()
        for tokenizer, statistics in tokenizers.items()
    ]
    head = ["language", "tokenizer of", "tokens per word", "unknown tokens"]
    return [Heading("Tokenizers"), Table(head, rows, "Tokenisation of the collections' texts.")]


def _error_rates(study: StudyDescription, summary: Summary) -> list[Block]:
    if not summary.error_rates:
        return []
    arms = list(dict.fromkeys(arm for arm, _ in summary.error_rates))
    rows = [
        [
            study.name_of(language),
            *(f"{summary.error_rates.get((arm, language), float('nan')):.3f}" for arm in arms),
        ]
        for language in summary.languages
        if any((arm, language) in summary.error_rates for arm in arms)
    ]
    return [Heading("Word alignment"), Table(["language", *arms], rows, error_rate_caption(study))]


def _costs(summary: Summary, costs: Mapping[str, Mapping[str, float]]) -> list[Block]:
    if not costs:
        return []
    rows = []
    for arm in summary.arms:
        seconds, peak_mb = arm_cost(arm, costs)
        rows.append([arm, f"{seconds / 60:.1f}", f"{peak_mb:.0f}"])
    caption = (
        "Time of all trainings and searches of an arm, and their peak memory: GPU memory if a GPU "
        "was used, otherwise the memory of the process."
    )
    return [Heading("Cost"), Table(["arm", "minutes", "peak memory in MB"], rows, caption)]


def _provenance(study: StudyDescription, costs: Mapping[str, Mapping[str, float]]) -> list[Block]:
    software = environment()
    versions = ", ".join(f"{name} {version}" for name, version in software["versions"].items())
    minutes = sum(cost["seconds"] for cost in costs.values()) / 60
    facts = [
        f"Written on {datetime.date.today().isoformat()} by optical, commit {software['commit']}.",
        f"Python {software['python']}; {versions}.",
        f"Seeds: {', '.join(map(str, study.seeds))}; scores are averaged over them. "
        f"Role of the student: {study.role}.",
        f"Computing time of all tasks: {minutes:.1f} minutes.",
    ]
    return [
        Heading("Provenance"),
        _bullets(facts),
        Text("Configuration:"),
        Code(study.config_text.strip()),
    ]


def _bullets(sentences: Sequence[str]) -> Text:
    return Text("\n".join(f"- {sentence}" for sentence in sentences))


def _with_interval(summary: Summary, key: tuple[str, str, str]) -> str:
    low, high = summary.intervals[key]
    return f"{summary.means[summary.measure][key]:.3f} [{low:.3f}, {high:.3f}]"


def _p(p: float) -> str:
    return f"{p:.1e}" if p < 0.001 else f"{p:.3f}"
