"""Sections of a report on its data: collections, training pairs, single queries, provenance."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from optical.io.environment import environment
from optical.report.render import Block, Code, Heading, Table, Text
from optical.report.summary import StudyDescription, Summary, measure_name
from optical.report.table import Row

# Queries with the largest gains and losses that are listed for each arm.
EXTREMES = 3


def collections(study: StudyDescription, summary: Summary) -> list[Block]:
    """Return the numbers of queries, documents and judgements, and of training pairs."""
    rows = [
        [
            collection,
            study.name_of(language),
            f"{sizes['queries']:,.0f}",
            f"{sizes['documents']:,.0f}",
            f"{sizes['relevant']:.1f}",
        ]
        for collection, languages in study.sizes.items()
        for language, sizes in languages.items()
    ]
    blocks: list[Block] = []
    if rows:
        head = ["collection", "language", "queries", "documents", "relevant per query"]
        caption = "Queries without a relevant document are left out."
        blocks += [Heading("Collections"), Table(head, rows, caption)]
    if summary.pairs:
        arms = [arm for arm in summary.arms if any(key[0] == arm for key in summary.pairs)]
        rows = [
            [
                study.name_of(language),
                *(_count(summary.pairs.get((arm, language))) for arm in arms),
            ]
            for language in summary.languages
        ]
        caption = "Sentence pairs that each arm is trained on."
        blocks += [Heading("Training pairs"), Table(["language", *arms], rows, caption)]
    return blocks


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def queries(study: StudyDescription, summary: Summary, rows: Sequence[Row]) -> list[Block]:
    """Return for each arm how many queries gain and lose, and those that change most."""
    cells: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        key = (row["collection"], row["language"], row["arm"], row["against"])
        cells.setdefault(key, []).append(row)
    if not cells:
        return []
    table = []
    for (collection, language, arm, against), found in cells.items():
        ordered = sorted(found, key=lambda row: (-row["difference"], row["query"]))
        gains = [row for row in ordered if row["difference"] > 0]
        losses = [row for row in reversed(ordered) if row["difference"] < 0]
        table.append(
            [
                collection,
                study.name_of(language),
                f"{arm} – {against}",
                str(len(gains)),
                str(len(found) - len(gains) - len(losses)),
                str(len(losses)),
                *(
                    ", ".join(f"{r['query']} {r['difference']:+.2f}" for r in side[:EXTREMES])
                    for side in (gains, losses)
                ),
            ]
        )
    head = ["collection", "language", "arms", "gain", "equal", "lose"]
    head += ["largest gains", "largest losses"]
    caption = (
        f"Queries by the difference in {summary.measure} between an arm and the one that it "
        "starts from, or the first one. queries.csv has all of them."
    )
    return [Heading(f"Queries: {measure_name(summary.measure)}"), Table(head, table, caption)]


def _told(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def pools(study: StudyDescription, summary: Summary) -> list[Block]:
    """Return the effectiveness and the language bias of each arm on mixed-language pools."""
    blocks: list[Block] = []
    for collection in dict.fromkeys(pool.collection for pool in summary.pools):
        here = [pool for pool in summary.pools if pool.collection == collection]
        languages = list(here[0].bias)
        rows = []
        for pool in here:
            value, low, high = pool.estimate
            shares = [
                f"{_told(own['share'], '.0%')} ({_told(own['rank'], '+.2f')})"
                for own in (pool.bias[language] for language in languages)
            ]
            row = [pool.arm, f"{value:.3f} [{low:.3f}, {high:.3f}]"]
            row.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(*pool.gain) if pool.gain else "")
            rows.append([*row, _told(pool.distance, ".0%"), *shares])
        relevant = ", ".join(
            f"{_told(own['relevant'], '.0%')} {study.name_of(language)}"
            for language, own in here[0].bias.items()
        )
        name = measure_name(summary.measure)
        caption = (
            f"{collection}: every query searches the documents of all {len(languages)} languages "
            f"at once ({here[0].queries} queries). Share of each language in the first ten "
            "documents and, in parentheses, rank bias: +.50 if its relevant documents stand before "
            "those of all other languages, -.50 if after them, 0 if the language has no influence. "
            "Bias: share of the first ten places that would have to change language to match the "
            f"relevant documents ({relevant})."
        )
        if any(pool.distance is None for pool in here):
            caption += " The bias of a search that returned no document is not defined (–)."
        head = ["arm", name, f"minus {summary.arms[0]}", "bias", *map(study.name_of, languages)]
        blocks.append(Table(head, rows, caption))
    return [Heading("Mixed-language pools"), *blocks] if blocks else []


def provenance(study: StudyDescription, costs: Mapping[str, Mapping[str, float]]) -> list[Block]:
    """Return software, machine, inputs by content, and configuration of the study."""
    used: Mapping[str, Any] = study.environment or environment()
    versions = ", ".join(f"{name} {version}" for name, version in used["versions"].items())
    minutes = sum(cost["seconds"] for cost in costs.values()) / 60
    facts = [
        f"Written on {datetime.date.today().isoformat()} by optical, commit {used['commit']}.",
        f"Python {used['python']}; {versions}.",
        f"Seeds: {', '.join(map(str, study.seeds))}; scores are averaged over them. "
        f"Role of the student: {study.role}.",
        f"Computing time of all tasks: {minutes:.1f} minutes.",
    ]
    if "processor" in used:
        gpu = f" GPU: {used['gpu']}." if used.get("gpu") else " No GPU."
        facts.insert(
            2, f"Processor: {used['processor']}, {used['threads']} threads of PyTorch.{gpu}"
        )
    blocks: list[Block] = [
        Heading("Provenance"),
        Text("\n".join(f"- {fact}" for fact in facts)),
    ]
    if study.inputs:
        rows = [[name, identity] for name, identity in study.inputs.items()]
        caption = (
            "Data and models that are no output of the study: the first digits of their SHA-256, "
            "of a folder over all its files, or the commit of a downloaded model."
        )
        blocks.append(Table(["input", "identity"], rows, caption))
    return [*blocks, Text("Configuration:"), Code(study.config_text.strip())]
