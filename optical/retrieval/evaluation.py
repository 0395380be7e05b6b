"""Evaluate and compare runs: effectiveness measures per query, their means, and paired tests.

The measures are those of ``ir_measures``, most of which call ``trec_eval``. This module defines
which queries count and how ties are broken. Needs ``pip install "optical-ot[eval]"``.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from subprocess import SubprocessError
from typing import Any

from optical.data.measures import check_measures
from optical.data.trec import LARGEST_GRADE, trec_eval_order
from optical.io.environment import require
from optical.retrieval.statistics import (
    CORRECTIONS,
    EXACT_QUERIES,
    TESTS,
    check_choice,
    correct,
    paired_test,
)

logger = logging.getLogger("optical")

DEFAULT_MEASURES = ("AP", "nDCG@10", "R@10", "R@100", "RR@10")


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`evaluate`.

    Attributes:
        per_query: measure -> query id -> value, for every evaluated query in the order of the
            judgements.
        mean: measure -> mean over the evaluated queries.
        missing: evaluated queries without documents in the run; their values are 0.
        ignored: number of queries in the run without judgements; they are not evaluated.
        without_relevant: judged queries without a relevant document; they are not evaluated.
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
        """Return a Markdown table of the means with the number of queries below it."""
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
        """Return plain lists and dictionaries for JSON, with or without the values per query."""
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
        """Restore an evaluation from :meth:`to_dict` with ``per_query=True``."""
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

    Every judged query with at least one relevant document (grade 1 or more) is evaluated. A query
    without documents in the run counts 0 and is listed. Queries without a relevant document are
    left out, as in :func:`optical.data.collection.load_collection`: every system scores 0 there.
    All measures use the order of ``trec_eval``, :func:`optical.data.trec.trec_eval_order`: scores
    that are equal in float32 are ties. ``ir_measures`` alone breaks ties differently for AP and
    RR@10.

    Args:
        run: query id -> document id -> score.
        qrels: query id -> document id -> grade.
        measures: names as in ``ir_measures``, or one string of names separated by spaces or commas:
            ``AP``, ``nDCG@10``, ``R@100``, ``RR@10``, ``P@5``, ``AP(rel=2)``. ``MAP``, ``MRR@10``,
            ``NDCG@10`` and ``Recall@10`` are synonyms, and so are the names of ``trec_eval``
            (``map``, ``ndcg_cut_10``, ``recip_rank``); results use the names listed first.

    Raises:
        ValueError: a measure is unknown or lacks its cutoff; a score is NaN; a grade is no whole
            number up to a million; no query can be evaluated; or the run and the judgements have no
            query in common.
        ImportError: ``ir_measures`` is not installed.

    Examples:
        >>> result = evaluate({"q": {"d1": 0.5, "d2": 0.9}}, {"q": {"d1": 1}}, "AP RR@10")
        >>> result.mean
        {'AP': 0.5, 'RR@10': 0.5}
    """
    ir_measures = require("ir_measures", "eval", "evaluation")
    parsed = check_measures(measures)
    _check_values(run, qrels)
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
    if run and ignored == len(run):
        raise ValueError(
            f"none of the {ignored} queries of the run ({next(iter(run))!r}, …) is judged "
            f"({next(iter(judged))!r}, …); check that run and judgements belong together"
        )
    if ignored:
        logger.warning("ignored %d queries of the run that have no judgements", ignored)
    missing = tuple(qid for qid in judged if not run.get(qid))
    if missing:
        logger.warning(
            "the run has no documents for %d of %d queries; they count 0", len(missing), len(judged)
        )
    if not any(docid in qrels[qid] for qid in judged for docid in run.get(qid, ())):
        logger.warning("none of the documents of the run is judged; check that the ids match")
    per_query = _values_per_query(ir_measures, parsed, run, judged)
    mean = {name: statistics.fmean(values.values()) for name, values in per_query.items()}
    return Evaluation(per_query, mean, missing, ignored, without_relevant)


def _check_values(
    run: Mapping[str, Mapping[str, float]], qrels: Mapping[str, Mapping[str, int]]
) -> None:
    """Raise ValueError for scores without an order, and for grades that no measure can count."""
    for qid, scores in run.items():
        for docid, score in scores.items():
            if score != score:
                raise ValueError(
                    f"run: the score of document {docid!r} for query {qid!r} is NaN, expected a "
                    "number"
                )
    for qid, grades in qrels.items():
        for docid, grade in grades.items():
            if not isinstance(grade, Integral) or abs(grade) > LARGEST_GRADE:
                raise ValueError(
                    f"qrels: the grade of document {docid!r} for query {qid!r} is {grade!r}, "
                    f"expected a whole number up to {LARGEST_GRADE}"
                )


def _values_per_query(
    ir_measures: Any,
    measures: Sequence[Any],
    run: Mapping[str, Mapping[str, float]],
    judged: Mapping[str, Mapping[str, int]],
) -> dict[str, dict[str, float]]:
    """Return measure -> query id -> value; queries without documents have the value 0."""
    # Numbers replace query ids: gdeval.pl, which computes ERR, takes `sw-1` and `fi-1` for one.
    ids = {str(number): qid for number, qid in enumerate(judged, start=1)}
    grades = {number: {d: int(g) for d, g in judged[qid].items()} for number, qid in ids.items()}
    # Ranks replace scores, so that there are no ties and all measures see one order.
    ranks = {
        number: {docid: -float(rank) for rank, (docid, _) in enumerate(trec_eval_order(run[qid]))}
        for number, qid in ids.items()
        if run.get(qid)
    }
    names = list(dict.fromkeys(str(measure) for measure in measures))
    per_query = {name: dict.fromkeys(judged, 0.0) for name in names}
    try:
        # Some providers reject an empty run; its values are the zeros above.
        for metric in ir_measures.iter_calc(set(measures), grades, ranks) if ranks else ():
            per_query[str(metric.measure)][ids[metric.query_id]] = float(metric.value)
    except (RuntimeError, SubprocessError, ValueError) as error:
        # Some measures are computed by external programs, which may be absent or fail.
        reason = " ".join(str(error).split())
        raise ValueError(
            f"ir_measures cannot calculate one of {', '.join(names)}: {reason}"
        ) from error
    return per_query


@dataclass(frozen=True)
class Row:
    """The comparison of one system with the baseline by one measure."""

    system: str
    measure: str
    mean: float
    baseline_mean: float
    difference: float
    low: float
    high: float
    p: float
    p_corrected: float
    queries: int
    missing: int


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`: systems compared with one baseline.

    Attributes:
        rows: one row per measure and system other than the baseline, in the order given.
        baseline: name of the baseline.
        baseline_missing: number of queries without documents in the run of the baseline.
        test, correction, samples, seed, confidence: arguments of the comparison.
    """

    rows: tuple[Row, ...]
    baseline: str
    baseline_missing: int
    test: str
    correction: str
    samples: int
    seed: int
    confidence: float

    def to_markdown(self, *, alpha: float = 0.05) -> str:
        """Return a Markdown table by measure; ``*`` marks corrected p below ``alpha``."""
        percent = f"{100 * self.confidence:g} %"
        lines = [
            f"| measure | system | mean | difference | {percent} interval | p "
            + "| p corrected | queries | missing |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for measure in dict.fromkeys(row.measure for row in self.rows):
            rows = [row for row in self.rows if row.measure == measure]
            lines.append(
                f"| {measure} | {_cell(self.baseline)} (baseline) | {rows[0].baseline_mean:.4f} "
                f"| – | – | – | – | {rows[0].queries} | {self.baseline_missing} |"
            )
            for row in rows:
                star = " *" if row.p_corrected < alpha else ""
                lines.append(
                    f"| {measure} | {_cell(row.system)} | {row.mean:.4f} "
                    f"| {row.difference:+.4f}{star} | {_range(row.low, row.high)} "
                    f"| {_p(row.p)} | {_p(row.p_corrected)} | {row.queries} | {row.missing} |"
                )
        name = {"randomization": "paired randomisation test", "t": "paired t-test"}[self.test]
        if self.test == "randomization":
            name += (
                f" (exact where at most {EXACT_QUERIES} queries differ, else {self.samples} "
                f"samples, seed {self.seed})"
            )
        note = {
            "holm": f"Holm over {len(self.rows)} comparisons",
            "bonferroni": f"Bonferroni over {len(self.rows)} comparisons",
            "none": "no correction",
        }[self.correction]
        lines += ["", f"Two-sided {name}; {note}; * corrected p < {alpha:g}."]
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and dictionaries for JSON; undefined intervals are ``None``."""
        values = asdict(self)
        values["rows"] = [
            {
                key: None if isinstance(value, float) and math.isnan(value) else value
                for key, value in row.items()
            }
            for row in values["rows"]
        ]
        return values


def compare(
    runs: Mapping[str, Evaluation],
    *,
    baseline: str | None = None,
    measures: Sequence[str] | None = None,
    test: str = "randomization",
    correction: str = "holm",
    samples: int = 100_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Comparison:
    """Compare systems with a baseline on the same queries.

    Args:
        runs: name of a system -> its :class:`Evaluation`, at least two systems.
        baseline: name of the baseline (None: the first system).
        measures: measures as named in the evaluations (None: all measures of the baseline).
        test: ``"randomization"`` or ``"t"``.
        correction: ``"holm"`` (Holm, 1979) over all rows of the table, ``"bonferroni"`` or
            ``"none"``.
        samples, seed, confidence: see :func:`optical.retrieval.statistics.paired_test`.

    Raises:
        ValueError: fewer than two systems, an unknown baseline, measure, test or correction, or
            evaluations of different queries.
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs at least two systems, found {len(runs)}")
    check_choice("test", test, TESTS)
    check_choice("correction", correction, CORRECTIONS)
    baseline = next(iter(runs)) if baseline is None else baseline
    if baseline not in runs:
        raise ValueError(f"unknown baseline {baseline!r}; the systems are {', '.join(runs)}")
    reference = runs[baseline]
    measures = reference.measures if measures is None else tuple(measures)
    _check_comparable(runs, baseline, measures)
    tested = [
        (system, measure, paired_test(
            evaluation.per_query[measure], reference.per_query[measure],
            test=test, samples=samples, seed=seed, confidence=confidence,
        ))
        for system, evaluation in runs.items() if system != baseline
        for measure in measures
    ]  # fmt: skip
    corrected = correct([result.p for _, _, result in tested], correction)
    rows = tuple(
        Row(
            system=system,
            measure=measure,
            mean=runs[system].mean[measure],
            baseline_mean=reference.mean[measure],
            difference=result.difference,
            low=result.low,
            high=result.high,
            p=result.p,
            p_corrected=p_corrected,
            queries=result.queries,
            missing=len(runs[system].missing),
        )
        for (system, measure, result), p_corrected in zip(tested, corrected, strict=True)
    )
    return Comparison(
        rows=rows,
        baseline=baseline,
        baseline_missing=len(reference.missing),
        test=test,
        correction=correction,
        samples=samples,
        seed=seed,
        confidence=confidence,
    )


def _check_comparable(
    runs: Mapping[str, Evaluation], baseline: str, measures: Sequence[str]
) -> None:
    """Raise ValueError unless all systems have the measures and the queries of the baseline."""
    if not measures:
        raise ValueError("no measure to compare; evaluate with at least one")
    for system, evaluation in runs.items():
        for measure in measures:
            if measure not in evaluation.per_query:
                raise ValueError(
                    f"system {system!r} was not evaluated by {measure!r}, only by "
                    f"{', '.join(evaluation.measures)}; evaluate all systems by the same measures"
                )
        different = set(evaluation.queries) ^ set(runs[baseline].queries)
        if different:
            raise ValueError(
                f"systems {system!r} and {baseline!r} were evaluated on different queries "
                f"({len(different)} are in only one of them, such as {min(different)!r}); "
                "evaluate both with the same judgements"
            )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _range(low: float, high: float) -> str:
    return "–" if math.isnan(low) else f"{low:+.4f} … {high:+.4f}"


def _p(p: float) -> str:
    return f"{p:.4f}" if p >= 1e-4 else f"{p:.1e}"
