"""The study's numbers: means, intervals, tests and gaps, from the cells' results alone."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from optical.retrieval.statistics import correct, paired_test
from optical.study.config import StudyConfig

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
        gain: for low- and high-resource languages, the relative gain over the translation baseline;
            None for itself, without one, or where it may be zero.
    """

    collection: str
    arm: str
    low_mean: float
    high_mean: float
    gap: Estimate
    closed: Estimate | None = None
    recovered_low: Estimate | None = None
    recovered_high: Estimate | None = None
    gain_low: Estimate | None = None
    gain_high: Estimate | None = None


@dataclass
class Summary:
    """Everything that the report says in numbers."""

    arms: list[str]
    languages: list[str]
    collections: list[str]
    measure: str
    scores: Scores
    draws: dict[tuple[str, str, str], Draws]
    means: dict[str, dict[tuple[str, str, str], float]]
    intervals: dict[tuple[str, str, str], tuple[float, float]]
    comparisons: list[Comparison] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    # (arm, language) -> sentence pairs that the arm learnt from.
    pairs: dict[tuple[str, str], int] = field(default_factory=dict)
    # (arm, language) -> alignment error rates, averaged over seeds and roles
    error_rates: dict[tuple[str, str], float] = field(default_factory=dict)
    # language -> whose tokenizer -> tokens per word and share of unknown tokens
    tokens: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: StudyConfig, results: Sequence[Mapping[str, Any]]) -> Summary:
        rows = [row for row in results if "measures" in row]
        measure = next(iter(next(iter(rows[0]["measures"].values()))))
        names = next(iter(rows[0]["measures"].values())).keys()
        every = {name: _scores(rows, name) for name in names}
        scores = {key: _averaged(seeds) for key, seeds in every[measure].items()}
        draws = {key: _draws(seeds, key) for key, seeds in every[measure].items()}
        summary = cls(
            arms=[arm.name for arm in config.arms],
            languages=list(config.languages),
            collections=list(config.collections),
            measure=measure,
            scores=scores,
            draws=draws,
            means={
                name: {key: _mean(_averaged(seeds)) for key, seeds in table.items()}
                for name, table in every.items()
            },
            intervals={key: _estimate(drawn)[1:] for key, drawn in draws.items()},
            pairs={(row["arm"], row["language"]): row["pairs"] for row in rows if row.get("pairs")},
            error_rates=_error_rates(results),
            tokens={row["language"]: row["tokens"] for row in results if "tokens" in row},
        )
        summary.comparisons = summary._compare(config)
        if config.low and config.high:
            summary.gaps = summary._gaps(config)
        return summary

    def languages_of(self, collection: str) -> list[str]:
        """The languages in which the arms searched a collection."""
        arm = self.arms[0]
        return [x for x in self.languages if (collection, arm, x) in self.scores]

    def _compare(self, config: StudyConfig) -> list[Comparison]:
        found = []
        pairs = [(new, old) for old, new in itertools.combinations(self.arms, 2)]
        if config.against:
            # Each pair once: between two of those tested against, the later one is the newer.
            pairs = [
                (new, old)
                for old in config.against
                for new in self.arms
                if new != old and (new not in config.against or (new, old) in pairs)
            ]
        places = [(c, x) for c in self.collections for x in self.languages_of(c)]
        for (collection, language), (arm, against) in itertools.product(places, pairs):
            keys = (collection, arm, language), (collection, against, language)
            tested = paired_test(*(self.scores[key] for key in keys), seed=SEED)
            # Over queries and seeds; the test's own interval knows queries alone.
            _, low, high = _estimate(self.draws[keys[0]] - self.draws[keys[1]])
            found.append(
                Comparison(
                    collection, language, arm, against, tested.difference, low, high,
                    tested.p, tested.queries,
                )
            )  # fmt: skip
        for comparison, corrected in zip(found, correct([one.p for one in found]), strict=True):
            comparison.p_holm = corrected
        return found

    def _gaps(self, config: StudyConfig) -> list[Gap]:
        found = []
        for collection in self.collections:
            if not {*config.low, *config.high} <= {*self.languages_of(collection)}:
                continue
            baseline = self._groups(config, collection, self.arms[0])
            translated = (
                self._groups(config, collection, config.translation) if config.translation else []
            )
            ceiling = [
                drawn
                for (name, arm, _), drawn in self.draws.items()
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
                if translated and arm != config.translation:
                    gap.gain_low, gap.gain_high = (
                        _share(reached - start, start)
                        for reached, start in zip(groups, translated, strict=True)
                    )
                found.append(gap)
        return found

    def _groups(self, config: StudyConfig, collection: str, arm: str) -> list[Draws]:
        """Means over the low- and over the high-resource languages, with their resamples."""
        return [
            np.mean([self.draws[collection, arm, language] for language in group], axis=0)
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
            "alignment_error_rates": [
                {"arm": arm, "language": language, "rate": rate}
                for (arm, language), rate in self.error_rates.items()
            ],
            "tokens": self.tokens,
        }


def _scores(
    rows: Iterable[Mapping[str, Any]], measure: str
) -> dict[tuple[str, str, str], list[Values]]:
    """(collection, arm, language) -> the values of each seed, query by query."""
    grouped: dict[tuple[str, str, str], list[Values]] = {}
    for row in rows:
        for collection, measures in row["measures"].items():
            key = (collection, row["arm"], row["language"])
            grouped.setdefault(key, []).append(measures[measure])
    return grouped


def _averaged(seeds: Sequence[Values]) -> Values:
    return {query: float(np.mean([seed[query] for seed in seeds])) for query in seeds[0]}


def _error_rates(results: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], list[float]] = {}
    for row in results:
        if row.get("aer") is not None:
            found.setdefault((row["arm"], row["language"]), []).append(row["aer"])
    return {key: float(np.mean(rates)) for key, rates in found.items()}


def _draws(seeds: Sequence[Values], key: tuple[str, str, str]) -> Draws:
    """The mean over queries and seeds, then its bootstrap resamples over both.

    The queries drawn depend on their ids alone, so languages and arms that share their queries are
    resampled together and differences between them keep their pairing. Seeds are drawn for each
    arm and language apart, as trainings are made.
    """
    x = np.array([list(values.values()) for values in seeds])
    means: Draws = x @ _resampled(tuple(seeds[0])).T / x.shape[1]
    if len(x) == 1:
        drawn = means[0]
    else:
        generator = np.random.default_rng([SEED, *"/".join(key).encode()])
        chosen = generator.integers(0, len(x), (RESAMPLES, len(x)))
        drawn = means[chosen, np.arange(RESAMPLES)[:, None]].mean(axis=1)
    return np.concatenate([[x.mean()], drawn])


@functools.lru_cache(maxsize=8)
def _resampled(queries: tuple[str, ...]) -> Draws:
    """(RESAMPLES, queries): how often each query is in each resample."""
    size = len(queries)
    generator = np.random.default_rng([SEED, *",".join(queries).encode()])
    chosen = generator.integers(0, size, (RESAMPLES, size))
    flat = (chosen + size * np.arange(RESAMPLES)[:, None]).ravel()
    counts = np.bincount(flat, minlength=RESAMPLES * size).astype(np.float64)
    return counts.reshape(RESAMPLES, size)


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
