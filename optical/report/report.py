"""The report of a study: sentences, tables and figures, rendered as Markdown, HTML and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optical.io.files import write_text
from optical.report import sections
from optical.report.conclusion import conclusion
from optical.report.figures import draw_figures
from optical.report.render import (
    Block,
    Figure,
    Heading,
    Table,
    Text,
    to_html,
    to_latex,
    to_markdown,
)
from optical.report.sentences import (
    ALPHA,
    error_rate_caption,
    result_sentences,
    share,
    signed,
)
from optical.report.style import FORMATS
from optical.report.summary import (
    LEAST_WHOLE,
    Comparison,
    StudyDescription,
    Summary,
    measure_name,
)
from optical.report.table import (
    LOSS_COLUMNS,
    PLAN_COLUMNS,
    QUERY_COLUMNS,
    arm_cost,
    loss_rows,
    plan_rows,
    query_rows,
    result_rows,
    write_rows,
)
from optical.retrieval.statistics import SEED


def write_report(
    study: StudyDescription,
    results: Sequence[Mapping[str, Any]],
    costs: Mapping[str, Mapping[str, float]],
    output: Path,
    *,
    losses: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    unfinished: Sequence[str] = (),
    formats: Sequence[str] = (),
) -> Path:
    """Write the report into `output`: Markdown, HTML, LaTeX, JSON, tables and ``figures/``.

    Args:
        study: title, arms, languages and other properties of the study.
        results: rows written by the evaluation and alignment tasks.
        costs: label of a task -> its ``seconds`` and ``peak_mb``.
        output: an existing writable folder.
        losses: label of a training -> the entries that its trainer logged.
        unfinished: labels of the tasks without an output.
        formats: formats of the figures beside PNG, of "svg" and "pdf". Those that the folder holds
            already are drawn again too, so that no figure is older than the report.

    Returns:
        The path of report.md.

    Raises:
        ValueError: there is no result of any arm.
    """
    summary = Summary.of(study, results)
    by_query = query_rows(summary, study.starts)
    write_rows(result_rows(study, summary, costs), output / "results.csv")
    plans = [line for row in results if "plan" in row for line in plan_rows(row)]
    for name, rows, columns in (
        ("queries", by_query, QUERY_COLUMNS),
        ("losses", loss_rows(study, losses or {}), LOSS_COLUMNS),
        ("alignment", plans, PLAN_COLUMNS),
    ):
        (output / f"{name}.csv").unlink(missing_ok=True)
        if rows:
            write_rows(rows, output / f"{name}.csv", columns)
    blocks = [
        *_main_results(study, summary, unfinished),
        *_figures(study, summary, results, output, formats),
        *sections.collections(study, summary),
        *_measures_by_language(study, summary),
        *_gaps(study, summary),
        *_gains(study, summary),
        *sections.pools(study, summary),
        *_comparisons(study, summary),
        *sections.queries(study, summary, by_query),
        *_all_measures(study, summary),
        *_tokenizers(study, summary),
        *_error_rates(study, summary),
        *_costs(summary, costs),
        *sections.provenance(study, costs),
    ]
    write_text(output / "report.json", json.dumps(summary.to_dict(), indent=1) + "\n")
    write_text(output / "report.html", to_html(study.title, blocks))
    write_text(output / "tables.tex", to_latex(blocks))
    write_text(output / "report.md", to_markdown(blocks))
    return output / "report.md"


def _main_results(
    study: StudyDescription, summary: Summary, unfinished: Sequence[str]
) -> list[Block]:
    blocks: list[Block] = [Heading(study.title, 1)]
    if study.note:
        blocks.append(Text(study.note))
    if unfinished:
        blocks.append(Text(_missing(unfinished)))
    return [
        *blocks,
        Heading("Conclusion"),
        _bullets(conclusion(study, summary)),
        Heading("Result"),
        _bullets(result_sentences(study, summary)),
    ]


def _missing(unfinished: Sequence[str]) -> str:
    """Return how far the study is, with the evaluations that the report lacks."""
    lacking = [label for label in unfinished if label.startswith("evaluate ")]
    counts: dict[str, int] = {}
    for label in lacking:
        arm, _, _ = label.removeprefix("evaluate ").partition(" seed ")
        arm = arm.rsplit(" ", 1)[0]
        counts[arm] = counts.get(arm, 0) + 1
    text = f"**This study is not finished:** {len(unfinished)} tasks are left. "
    if not counts:
        return text + "All searches are evaluated."
    listed = ", ".join(f"{arm} {count}" for arm, count in counts.items())
    return text + (
        f"The report lacks {len(lacking)} evaluations ({listed}); a dash stands for a language "
        "without one, and means are over the seeds that exist. Every number may still change."
    )


def _figures(
    study: StudyDescription,
    summary: Summary,
    results: Sequence[Mapping[str, Any]],
    output: Path,
    formats: Sequence[str],
) -> list[Block]:
    name = measure_name(summary.measure)
    captions = {
        "measure_per_language": f"{name} per language and arm with 95 % intervals. An arm has the "
        "same colour and marker in every figure. Dashed line: English documents.",
        "gap_per_arm": f"{name} of high-resource minus low-resource languages per arm, with 95 % "
        "intervals. A smaller gap is fairer.",
        "pairs": f"{name} over the number of sentence pairs, with 95 % intervals. Dashed lines: "
        "high-resource languages.",
        "queries": f"Difference in {summary.measure} between an arm and the one that it starts "
        "from, or the first one, for each query, sorted. Above 0: queries that gain.",
        "losses": "Loss of every training as its trainer logged it. Losses of different recipes "
        "cannot be compared. Dotted lines: validation.",
    }
    for row in results:
        if "plan" in row:
            captions["alignment"] = (
                f"Transport plan of one {study.name_of(row['language'])} sentence (rows) and its "
                "English translation (columns). Each row shows shares of its mass. The mean "
                f"transported cosine distance is {row['value_linear']:.3f}."
            )
    folder = output / "figures"
    present = {path.suffix[1:] for path in folder.glob("*.*") if path.stem in captions}
    wanted = [kind for kind in FORMATS if kind == FORMATS[0] or kind in {*formats, *present}]
    drawn = draw_figures(output / "results.csv", folder, wanted)
    *others, last = (kind.upper() for kind in wanted)
    listed = f"{', '.join(others)} and {last}" if others else last
    return [
        Heading("Figures"),
        Text(
            f"`figures/` holds every figure as {listed}, `tables.tex` every table. `optical report "
            "--format svg pdf` adds vector graphics."
        ),
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
        head = ["language", "resource", *summary.arms]
        if len(summary.arms) > len(languages):
            # A row for each arm is the narrower table.
            head, *rows = (list(column) for column in zip(head, *rows, strict=True))
            head[0], rows[0][0] = "arm", "(resource)"
        queries = [len(values) for key, values in summary.scores.items() if key[0] == collection]
        counted = " to ".join(map(str, sorted({min(queries), max(queries)})))
        caption = f"{collection}: {name} with 95 % intervals, {counted} queries."
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
    low, high = (", ".join(map(study.name_of, group)) for group in (study.low, study.high))
    caption = (
        f"{measure_name(summary.measure)}. Low: mean of {low}. High: mean of {high}. Recovered: "
        f"share of the difference between {baseline} and English documents. A share is undefined "
        f"(–) if its denominator is below {LEAST_WHOLE} or hardly above zero. 95 % bootstrap "
        "intervals over queries and seeds."
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


def _comparisons(study: StudyDescription, summary: Summary) -> list[Block]:
    caption = (
        f"{measure_name(summary.measure)}: two-sided paired randomisation tests over queries, seed "
        f"{SEED}. The Holm correction covers the whole table. Bold: p < {ALPHA}."
    )
    blocks: list[Block] = [
        Heading("Comparisons"),
        _comparison_table(study, summary.comparisons, caption),
    ]
    if summary.start_comparisons:
        blocks.append(
            _comparison_table(
                study,
                summary.start_comparisons,
                f"Arms against those that they start from. {caption}",
            )
        )
    return blocks


def _comparison_table(
    study: StudyDescription, comparisons: Sequence[Comparison], caption: str
) -> Table:
    head = ["collection", "language", "arms", "difference", "p", "p (Holm)", "queries"]
    rows = []
    for comparison in comparisons:
        p_holm = _p(comparison.p_holm)
        rows.append(
            [
                comparison.collection,
                study.name_of(comparison.language),
                f"{comparison.arm} – {comparison.against}",
                signed((comparison.difference, comparison.low, comparison.high)),
                _p(comparison.p),
                f"**{p_holm}**" if comparison.p_holm < ALPHA else p_holm,
                str(comparison.queries),
            ]
        )
    return Table(head, rows, caption)


def _all_measures(study: StudyDescription, summary: Summary) -> list[Block]:
    rows = [
        [
            collection,
            study.name_of(language),
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
    blocks: list[Block] = [
        Heading("Tokenizers"),
        Table(head, rows, "Tokenisation of the collections' texts."),
    ]
    if summary.unseen:
        rows = [[study.name_of(x), f"{share:.1%}"] for x, share in summary.unseen.items()]
        caption = "Running words of the collections' texts that no sentence pair contains."
        blocks.append(Table(["language", "unseen words"], rows, caption))
    return blocks


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


def _bullets(sentences: Sequence[str]) -> Text:
    return Text("\n".join(f"- {sentence}" for sentence in sentences))


def _with_interval(summary: Summary, key: tuple[str, str, str]) -> str:
    if key not in summary.intervals:
        return "–"
    low, high = summary.intervals[key]
    return f"{summary.means[summary.measure][key]:.3f} [{low:.3f}, {high:.3f}]"


def _p(p: float) -> str:
    return f"{p:.1e}" if p < 0.001 else f"{p:.3f}"
