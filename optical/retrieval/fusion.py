"""Fusion of runs: one ranking from the scores of several searches of the same collection."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from optical.data.trec import Run, ranked


def mean_scores(runs: Sequence[Run], depth: int = 1000) -> Run:
    """Rank documents by the mean of their scores (CombSUM; Fox and Shaw, TREC-2, 1994).

    The scores must have one scale, as MaxSim scores of models in one vector space do. A run that
    was cut at its own depth does not list all documents: a document that a run lacks has the lowest
    score that the run lists for the query. A run without any document of a query is left out.

    Args:
        runs: one or more runs, query id -> document id -> score.
        depth: documents kept per query.

    Examples:
        >>> mean_scores([{"q": {"a": 3.0, "b": 1.0}}, {"q": {"b": 4.0}}])
        {'q': {'a': 3.5, 'b': 2.5}}
    """
    fused: Run = {}
    for query in dict.fromkeys(query for run in runs for query in run):
        lists = [run[query] for run in runs if run.get(query)]
        documents = dict.fromkeys(document for scores in lists for document in scores)
        lowest = [min(scores.values()) for scores in lists]
        means = {
            document: fmean(
                scores.get(document, low) for scores, low in zip(lists, lowest, strict=True)
            )
            for document in documents
        }
        fused[query] = dict(ranked(means)[:depth])
    return fused
