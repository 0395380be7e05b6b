"""Mixed-language pools: one ranking of the documents of several languages, and its language bias.

The pool of a collection holds the documents of its languages side by side, and every query searches
all of them. The ranking is merged by score from the searches of the single languages. For models
this equals one search of the pool, as a score depends on a query and a document only. Where the
model of the queries differs by language, and for BM25, whose weights are those of each language,
it is what an engine with an index for each language returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optical.data.trec import Qrels, Run, ranked, trec_eval_order

TOP, DEPTH = 10, 1000


def pooled_id(language: str, docid: str) -> str:
    """Return the id of a document in a pool; documents of two languages may share an id."""
    return f"{language}:{docid}"


def merge_runs(runs: Mapping[str, Run]) -> Run:
    """Merge language -> run by score; only queries that all runs have are kept."""
    return {
        query: dict(
            ranked(
                {
                    pooled_id(language, docid): score
                    for language, run in runs.items()
                    for docid, score in run[query].items()
                }
            )[:DEPTH]
        )
        for query in next(iter(runs.values()))
        if all(query in run for run in runs.values())
    }


def merge_qrels(qrels: Mapping[str, Qrels]) -> Qrels:
    """Merge language -> judgements; only queries that all languages have are kept."""
    return {
        query: {
            pooled_id(language, docid): grade
            for language, judged in qrels.items()
            for docid, grade in judged[query].items()
        }
        for query in next(iter(qrels.values()))
        if all(query in judged for judged in qrels.values())
    }


def language_bias(run: Run, qrels: Qrels, languages: tuple[str, ...]) -> dict[str, Any]:
    """Return how a pooled ranking treats each language, as means over the queries.

    Args:
        run, qrels: of :func:`merge_runs` and :func:`merge_qrels`.
        languages: languages of the pool.

    Returns:
        Language -> ``share`` of the first ten documents that are in the language; ``relevant``, its
        share of the relevant documents; and ``rank``, the rank bias: where its relevant documents
        stand among all relevant ones of the query, from +.5 (before all others) to -.5, with 0 for
        a ranking that does not see the language. Documents that are not retrieved share the last
        places. Queries without a single result tell nothing of ``share`` and ``rank``, which are
        None if no query is left.
    """
    shares: dict[str, list[float]] = {x: [] for x in languages}
    relevances: dict[str, list[float]] = {x: [] for x in languages}
    ranks: dict[str, list[float]] = {x: [] for x in languages}
    for query, judged in qrels.items():
        order = [docid for docid, _ in trec_eval_order(run.get(query, {}))]
        top = order[:TOP]
        relevant = [docid for docid, grade in judged.items() if grade > 0]
        places = _places(order, relevant)
        for language in languages:
            prefix = pooled_id(language, "")
            own = [docid for docid in relevant if docid.startswith(prefix)]
            relevances[language].append(len(own) / len(relevant))
            if top:
                shares[language].append(sum(docid.startswith(prefix) for docid in top) / len(top))
            if top and own:
                ranks[language].append(0.5 - sum(places[docid] for docid in own) / len(own))
    return {
        language: {
            "share": _mean(shares[language]),
            "relevant": _mean(relevances[language]),
            "rank": _mean(ranks[language]),
        }
        for language in languages
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _places(order: list[str], relevant: list[str]) -> dict[str, float]:
    """Return the place of each relevant document among them, from 0 (first) to 1 (last)."""
    wanted = set(relevant)
    found = [docid for docid in order if docid in wanted]
    places = {docid: (place + 0.5) / len(relevant) for place, docid in enumerate(found)}
    missing = (len(found) + len(relevant)) / 2 / len(relevant)
    return {docid: places.get(docid, missing) for docid in relevant}
