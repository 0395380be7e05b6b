"""Measure how good a run is: one value per query and measure, and their means.

The measures are those of ``ir_measures``, which calls ``trec_eval`` for most; this module decides
what happens around them. Needs ``pip install "optical[eval]"``.
"""

from __future__ import annotations

import logging
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from subprocess import SubprocessError
from typing import Any

from optical.runs import ranked

__all__ = ["DEFAULT_MEASURES", "Evaluation", "evaluate"]

logger = logging.getLogger("optical")

DEFAULT_MEASURES = ("AP", "nDCG@10", "R@10", "R@100", "RR@10")

_SIMPLE = re.compile(r"(\w+)(?:@([1-9]\d*))?$")


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found.

    Attributes:
        per_query: measure -> query id -> value; every evaluated query, in the judgements' order.
        mean: measure -> mean over the evaluated queries.
        missing: evaluated queries for which the run has no document; they count 0.
        ignored: number of queries in the run that have no judgements; they count nothing.
        without_relevant: queries in the judgements for which nothing is relevant; not evaluated.
    """

    per_query: dict[str, dict[str, float]]
    mean: dict[str, float]
    missing: tuple[str, ...] = ()
    ignored: int = 0
    without_relevant: tuple[str, ...] = ()

    @property
    def measures(self) -> tuple[str, ...]:
        return tuple(self.per_query)

    @property
    def queries(self) -> tuple[str, ...]:
        return tuple(next(iter(self.per_query.values())))

    def to_table(self) -> str:
        """A Markdown table of the means, with the number of queries below it."""
        lines = ["| measure | mean |", "|---|---:|"]
        lines += [f"| {measure} | {value:.4f} |" for measure, value in self.mean.items()]
        notes = [f"{len(self.queries)} queries"]
        if self.missing:
            notes.append(f"{len(self.missing)} missing in the run count 0")
        if self.ignored:
            notes.append(f"{self.ignored} in the run without judgements ignored")
        if self.without_relevant:
            notes.append(f"{len(self.without_relevant)} without a relevant document left out")
        return "\n".join(lines) + "\n\n" + "; ".join(notes) + "\n"

    def to_dict(self, *, per_query: bool = True) -> dict[str, Any]:
        """Plain lists and dictionaries for JSON; without the values of each query if so wished."""
        values: dict[str, Any] = {
            "queries": len(self.queries),
            "mean": dict(self.mean),
            "missing": list(self.missing),
            "ignored": self.ignored,
            "without_relevant": list(self.without_relevant),
        }
        if per_query:
            values["per_query"] = {measure: dict(each) for measure, each in self.per_query.items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """Undo :meth:`to_dict`, which must have kept the values of each query."""
        return cls(
            per_query={measure: dict(each) for measure, each in values["per_query"].items()},
            mean=dict(values["mean"]),
            missing=tuple(values["missing"]),
            ignored=int(values["ignored"]),
            without_relevant=tuple(values["without_relevant"]),
        )


def evaluate(
    run: Mapping[str, Mapping[str, float]],
    qrels: Mapping[str, Mapping[str, int]],
    measures: Sequence[str] | str = DEFAULT_MEASURES,
) -> Evaluation:
    """Evaluate a run against judgements.

    All judged queries with at least one relevant document (grade 1 or more) are evaluated: a
    query missing in the run counts 0 and is listed. Queries without a relevant document are left
    out, as :func:`optical.collections.load_collection` does: every system scores 0 there. The
    order of documents is that of :func:`optical.runs.ranked`, for every measure; ``ir_measures`` by
    itself breaks ties one way for AP and another way for RR@10.

    Args:
        run: query id -> document id -> score.
        qrels: query id -> document id -> grade.
        measures: names as in ``ir_measures``, or one string with spaces or commas between them:
            ``AP``, ``nDCG@10``, ``R@100``, ``RR@10``, ``P@5``, ``AP(rel=2)``. ``MAP``, ``MRR@10``,
            ``NDCG@10`` and ``Recall@10`` are other names of the same; results use the first ones.

    Raises:
        ValueError: a measure is unknown or lacks its cutoff, or no query can be evaluated.
        ImportError: ``ir_measures`` is not installed.

    Examples:
        >>> result = evaluate({"q": {"d1": 0.5, "d2": 0.9}}, {"q": {"d1": 1}}, "AP RR@10")
        >>> result.mean
        {'AP': 0.5, 'RR@10': 0.5}
    """
    try:
        import ir_measures
    except ImportError as error:
        raise ImportError(
            'measures need ir_measures; install it with `pip install "optical[eval]"`'
        ) from error

    if isinstance(measures, str):
        measures = re.split(r"[,\s]+(?![^(]*\))", measures.strip())
    if not measures or not all(measures):
        raise ValueError("no measure given; for example AP, nDCG@10 or R@100")
    parsed = [_parse(ir_measures, measure) for measure in measures]
    names = list(dict.fromkeys(str(measure) for measure in parsed))

    judged = {
        qid: dict(grades) for qid, grades in qrels.items() if max(grades.values(), default=0) > 0
    }
    without_relevant = tuple(qid for qid in qrels if qid not in judged)
    if not judged:
        raise ValueError(
            f"none of the {len(qrels)} judged queries has a relevant document (grade 1 or more); "
            "there is nothing to evaluate"
        )
    if without_relevant:
        logger.warning("left out %d queries without a relevant document", len(without_relevant))
    ignored = sum(1 for qid in run if qid not in qrels)
    if ignored:
        logger.warning("ignored %d queries of the run that have no judgements", ignored)
    missing = tuple(qid for qid in judged if not run.get(qid))
    if missing:
        logger.warning(
            "the run has no documents for %d of %d queries; they count 0", len(missing), len(judged)
        )

    # Ranks in place of scores leave no ties, so that all measures see one order.
    ordered = {
        qid: {docid: -float(rank) for rank, (docid, _) in enumerate(ranked(run[qid]))}
        for qid in judged
        if run.get(qid)
    }
    per_query = {name: dict.fromkeys(judged, 0.0) for name in names}
    try:
        # An empty run is no input that all of its providers take; the zeros stand for it.
        for metric in ir_measures.iter_calc(set(parsed), judged, ordered) if ordered else ():
            per_query[str(metric.measure)][metric.query_id] = float(metric.value)
    except (RuntimeError, SubprocessError, ValueError) as error:
        # Some measures are computed by programs of their own, which may be absent or fail.
        reason = " ".join(str(error).split())
        raise ValueError(
            f"ir_measures cannot calculate one of {', '.join(names)}: {reason}"
        ) from error
    mean = {name: statistics.fmean(values.values()) for name, values in per_query.items()}
    return Evaluation(per_query, mean, missing, ignored, without_relevant)


def _parse(ir_measures: Any, name: str) -> Any:
    simple = _SIMPLE.match(name)
    try:
        if simple is None:
            measure = ir_measures.parse_measure(name)
        else:
            # Not parse_measure: it relies on parts of `ast` that Python 3.14 no longer has.
            measure = ir_measures.measures.registry[simple[1]]
            measure = measure if simple[2] is None else measure @ int(simple[2])
        if not set(measure.params) <= set(measure.SUPPORTED_PARAMS) or name.endswith("@0"):
            raise ValueError(f"parameters {measure.params}")
    except (AttributeError, AssertionError, LookupError, NameError, TypeError, ValueError) as error:
        raise ValueError(
            f"unknown measure {name!r}; for example AP, nDCG@10, R@100, RR@10 or P@5 "
            "(the names of ir_measures)"
        ) from error
    try:
        measure.validate_params()
    except AssertionError as error:
        raise ValueError(
            f"measure {name!r} is not complete; measures such as R, P and Success need a cutoff, "
            "as in R@100, and others take none"
        ) from error
    return measure
