"""The study's numbers: means, intervals, tests and gaps, from the cells' results alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from optical.config import StudyConfig
from optical.significance import correct, interval, paired_test

SEED = 0
RESAMPLES = 10_000

Values = dict[str, float]
# (collection, arm, language) -> query id -> the measure, averaged over seeds
Scores = dict[tuple[str, str, str], Values]
# a point estimate, then its bootstrap resamples
Draws = np.ndarray[Any, np.dtype[np.float64]]
# (point estimate, lower and upper end of its 95 % interval)
Estimate = tuple[float, float, float]


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
    """How an arm serves low- and high-resource languages; every estimate is (value, low, high).

    Attributes:
        gap: mean over the high-resource languages minus mean over the low-resource ones.
        closed: share of the baseline's gap that the arm closes; None where the baseline's gap may
            be zero, because a share of nothing says nothing.
        recovered: for low- and high-resource languages, the share of the way from the baseline to
            English documents; None for the baseline itself, without English documents, or where
            these may be no better than the baseline.
    """

    collection: str
    arm: str
    low_mean: float
    high_mean: float
    gap: Estimate
    closed: Estimate | None = None
    recovered_low: Estimate | None = None
    recovered_high: Estimate | None = None


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
            baseline = self._groups(config, collection, self.arms[0])
            ceiling = [
                _draws(values)
                for (name, arm, _), values in self.scores.items()
                if name == collection and arm not in self.arms
            ]
            for arm in self.arms:
                low, high = groups = self._groups(config, collection, arm)
                gap = Gap(collection, arm, float(low[0]), float(high[0]), _estimate(high - low))
                if arm != self.arms[0]:
                    left = baseline[1] - baseline[0]
                    gap.closed = _share(left - (high - low), left)
                    if ceiling:
                        gap.recovered_low, gap.recovered_high = (
                            _share(reached - start, ceiling[0] - start)
                            for reached, start in zip(groups, baseline, strict=True)
                        )
                found.append(gap)
        return found

    def _groups(self, config: StudyConfig, collection: str, arm: str) -> list[Draws]:
        """Means over the low- and over the high-resource languages, with their resamples."""
        return [
            np.mean([_draws(self.scores[collection, arm, language]) for language in group], axis=0)
            for group in (config.low, config.high)
        ]

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


def _draws(values: Values) -> Draws:
    """The mean over queries, then its bootstrap resamples.

    The draws depend on the query ids alone, so languages and arms that share their queries are
    resampled together and differences between them keep their pairing.
    """
    x = np.array(list(values.values()))
    chosen = np.random.default_rng([SEED, *",".join(values).encode()]).integers(
        0, len(x), (RESAMPLES, len(x))
    )
    return np.concatenate([[x.mean()], x[chosen].mean(axis=1)])


def _estimate(draws: Draws) -> Estimate:
    low, high = np.quantile(draws[1:], [0.025, 0.975])
    return float(draws[0]), float(low), float(high)


def _share(part: Draws, whole: Draws) -> Estimate | None:
    """`part` of `whole`, or None where the whole may be zero: a share of nothing says nothing."""
    if whole[0] <= 0 or np.quantile(whole[1:], 0.025) <= 0:
        return None
    # The few resamples in which the whole is zero have no share.
    return _estimate(part[whole > 0] / whole[whole > 0])


def measure_name(measure: str) -> str:
    """The name that a reader knows: MAP for AP over queries."""
    return {"AP": "MAP", "RR@10": "MRR@10"}.get(measure, measure)


def _mean(values: Values) -> float:
    return float(np.mean(list(values.values())))
