"""Statistics of a study: means, bootstrap intervals, paired tests and gaps between languages."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from optical.retrieval.statistics import (
    SEED,
    bootstrap,
    correct,
    estimate,
    paired_test,
    percentiles,
)

# A share of less than this is not told: it divides by what is nearly nothing.
LEAST_WHOLE = 0.02

# Query id -> value of a measure.
Values = dict[str, float]
# A point estimate, followed by its bootstrap draws.
Draws = np.ndarray[Any, np.dtype[np.float64]]
# Point estimate, lower and upper end of its 95 % interval.
Estimate = tuple[float, float, float]
# (collection, arm, language) -> values, averaged over seeds.
Scores = dict[tuple[str, str, str], Values]


@dataclass(frozen=True)
class StudyDescription:
    """The properties of a study that its report needs.

    Attributes:
        title, note: heading and introduction of the report.
        arms: names of the arms; the first is the baseline.
        languages, collections: names in the order of the tables.
        names: language -> its name in tables and figures.
        low, high: the low-resource and the high-resource languages.
        against: arms with which every other arm is compared; if empty, all pairs are compared.
        translation: arm whose relative gain is reported, or "".
        starts: arm -> the arms whose models its training starts from.
        trained_pairs: language -> how many of the aligned sentence pairs a model of the study was
            trained on, and their number; empty if that was not checked.
        curves: name of a curve -> its arms, in increasing number of sentence pairs.
        sizes: collection -> language -> numbers of ``queries`` and ``documents``, and the mean
            number of ``relevant`` documents per query.
        inputs: file or model -> the SHA-256 of its content, or another identity.
        environment: software and machine of the study, as of ``optical.io.environment``.
        role: role of the student, "query" or "document".
        seeds: training seeds.
        config_text: text of the configuration file.
    """

    title: str
    arms: tuple[str, ...]
    languages: tuple[str, ...]
    collections: tuple[str, ...]
    names: Mapping[str, str] = field(default_factory=dict)
    low: tuple[str, ...] = ()
    high: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    translation: str = ""
    starts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    trained_pairs: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    curves: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    role: str = "document"
    seeds: tuple[int, ...] = (0,)
    config_text: str = ""

    def name_of(self, language: str) -> str:
        return self.names.get(language) or ("English" if language == "en" else language)

    def group_of(self, language: str) -> str:
        """Return "low", "high", or "" for a language in neither group."""
        return "low" if language in self.low else "high" if language in self.high else ""


@dataclass
class Comparison:
    """Paired comparison of two arms on one language of one collection."""

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
    """An arm's effectiveness in low- and high-resource languages; estimates are (value, low, high).

    Attributes:
        gap: mean over the high-resource languages minus mean over the low-resource languages.
        narrowed: the baseline's gap minus that of the arm; None for the baseline.
        closed: share of the baseline's gap that the arm closes; None if the baseline's gap is not
            meaningfully above zero (:data:`LEAST_WHOLE`).
        recovered_low, recovered_high: share of the difference between English documents and the
            baseline that the arm gains; None for the baseline, without English documents, or if
            the difference is not meaningfully above zero.
        gain_low, gain_high: relative gain over the translation baseline; None for that baseline,
            without one, or if it is not meaningfully above zero.
    """

    collection: str
    arm: str
    low_mean: float
    high_mean: float
    gap: Estimate
    narrowed: Estimate | None = None
    closed: Estimate | None = None
    recovered_low: Estimate | None = None
    recovered_high: Estimate | None = None
    gain_low: Estimate | None = None
    gain_high: Estimate | None = None


@dataclass
class Pool:
    """How an arm ranks a pool of documents in several languages.

    Attributes:
        estimate: mean of the measure over the queries of the pool, and its interval.
        bias: language -> ``share`` of the first ten documents, ``relevant``, its share of the
            relevant documents, and ``rank``, the rank bias, all averaged over seeds; None if the
            searches returned nothing.
        queries: number of queries.
        gain: the measure minus that of the first arm, paired; None for the first arm.
    """

    collection: str
    arm: str
    estimate: Estimate
    bias: dict[str, dict[str, float | None]]
    queries: int
    gain: Estimate | None

    @property
    def distance(self) -> float | None:
        """Share of the first ten places that would have to change language, from 0 to 1."""
        total = 0.0
        for own in self.bias.values():
            share, wanted = own["share"], own["relevant"]
            if share is None or wanted is None:
                return None
            total += abs(share - wanted)
        return total / 2


@dataclass
class Summary:
    """All statistics of a report."""

    arms: list[str]
    languages: list[str]
    collections: list[str]
    measure: str
    scores: Scores
    draws: dict[tuple[str, str, str], Draws]
    means: dict[str, dict[tuple[str, str, str], float]]
    intervals: dict[tuple[str, str, str], tuple[float, float]]
    comparisons: list[Comparison] = field(default_factory=list)
    # Arms against those that they start from, where `comparisons` lacks the two; a table of its own
    # for the correction.
    start_comparisons: list[Comparison] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    pools: list[Pool] = field(default_factory=list)
    # (arm, language) -> number of sentence pairs that the arm was trained on.
    pairs: dict[tuple[str, str], int] = field(default_factory=dict)
    # (arm, language) -> alignment error rate, averaged over seeds and roles.
    error_rates: dict[tuple[str, str], float] = field(default_factory=dict)
    # Language -> tokenizer -> tokens per word and share of unknown tokens.
    tokens: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    # Language -> share of the running words of its texts that no sentence pair contains.
    unseen: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, study: StudyDescription, results: Sequence[Mapping[str, Any]]) -> Summary:
        """Summarise the result rows that the tasks of a study wrote, or those that exist so far.

        Arms and collections without a result are left out.

        Raises:
            ValueError: there is no result of any arm.
        """
        rows = [row for row in results if "measures" in row]
        evaluated = {row["arm"] for row in rows}
        arms = [arm for arm in study.arms if arm in evaluated]
        if not arms:
            raise ValueError(f"{study.title}: no arm has been evaluated, so there is no report yet")
        searched = {name for row in rows if row["arm"] in arms for name in row["measures"]}
        measures = next(iter(rows[0]["measures"].values())).keys()
        measure = next(iter(measures))
        by_measure = {name: _values_by_seed(rows, name) for name in measures}
        draws = {key: bootstrap(seeds, key) for key, seeds in by_measure[measure].items()}
        summary = cls(
            arms=arms,
            languages=list(study.languages),
            collections=[name for name in study.collections if name in searched],
            measure=measure,
            scores={key: _mean_of_seeds(seeds) for key, seeds in by_measure[measure].items()},
            draws=draws,
            means={
                name: {key: _mean(_mean_of_seeds(seeds)) for key, seeds in table.items()}
                for name, table in by_measure.items()
            },
            intervals={key: percentiles(values[1:]) for key, values in draws.items()},
            pairs={(row["arm"], row["language"]): row["pairs"] for row in rows if row.get("pairs")},
            error_rates=_error_rates(results),
            tokens={row["language"]: row["tokens"] for row in results if "tokens" in row},
            unseen={row["language"]: row["unseen"] for row in results if "unseen" in row},
            pools=_pools(arms, [row for row in results if "pools" in row], measure),
        )
        summary.comparisons = summary._compare(summary._arm_pairs(study.against))
        compared = {frozenset((one.arm, one.against)) for one in summary.comparisons}
        summary.start_comparisons = summary._compare(
            [
                (arm, start)
                for arm in summary.arms
                for start in study.starts.get(arm, ())
                if start in arms and frozenset((arm, start)) not in compared
            ]
        )
        if study.low and study.high:
            summary.gaps = summary._gaps(study)
        return summary

    def languages_of(self, collection: str) -> list[str]:
        """Return the languages in which any arm searched a collection."""
        return self._languages(collection, any, self.arms)

    def common_languages(self, collection: str, *arms: str) -> list[str]:
        """Return the languages in which all of these arms searched a collection."""
        return self._languages(collection, all, arms)

    def _languages(
        self, collection: str, quantifier: Callable[[Iterable[bool]], bool], arms: Sequence[str]
    ) -> list[str]:
        return [
            language
            for language in self.languages
            if quantifier((collection, arm, language) in self.scores for arm in arms)
        ]

    def between(self, collection: str, arm: str, against: str) -> list[tuple[float, float]]:
        """Return the difference and corrected p of two arms in each language of a collection."""
        found = []
        for one in (*self.comparisons, *self.start_comparisons):
            if one.collection == collection and {one.arm, one.against} == {arm, against}:
                sign = 1 if one.arm == arm else -1
                found.append((sign * one.difference, one.p_holm))
        return found

    def _compare(self, pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
        """Compare pairs of arms in every language; the correction covers all of them."""
        comparisons = []
        searched = [(c, x) for c in self.collections for x in self.languages_of(c)]
        for (collection, language), (arm, against) in itertools.product(searched, pairs):
            keys = (collection, arm, language), (collection, against, language)
            if not all(key in self.scores for key in keys):
                continue
            tested = paired_test(*(self.scores[key] for key in keys), seed=SEED)
            # This interval covers queries and seeds; that of the test covers queries only.
            low, high = percentiles((self.draws[keys[0]] - self.draws[keys[1]])[1:])
            comparisons.append(
                Comparison(
                    collection, language, arm, against, tested.difference, low, high,
                    tested.p, tested.queries,
                )
            )  # fmt: skip
        corrected = correct([comparison.p for comparison in comparisons])
        for comparison, p_holm in zip(comparisons, corrected, strict=True):
            comparison.p_holm = p_holm
        return comparisons

    def _arm_pairs(self, against: Sequence[str]) -> list[tuple[str, str]]:
        """Return the pairs (arm, arm it is compared with)."""
        against = [arm for arm in against if arm in self.arms]
        pairs = [(new, old) for old, new in itertools.combinations(self.arms, 2)]
        if not against:
            return pairs
        # Two arms that are both in `against` are compared once, the later with the earlier.
        return [
            (new, old)
            for old in against
            for new in self.arms
            if new != old and (new not in against or (new, old) in pairs)
        ]

    def _gaps(self, study: StudyDescription) -> list[Gap]:
        gaps = []
        for collection in self.collections:
            complete = [
                arm
                for arm in self.arms
                if {*study.low, *study.high} <= {*self.common_languages(collection, arm)}
            ]
            if self.arms[0] not in complete:
                continue
            baseline = self._group_means(study, collection, self.arms[0])
            translated = (
                self._group_means(study, collection, study.translation)
                if study.translation in complete
                else []
            )
            ceiling = [
                values
                for (name, arm, _), values in self.draws.items()
                if name == collection and arm not in self.arms
            ]
            for arm in complete:
                low, high = groups = self._group_means(study, collection, arm)
                gap = Gap(collection, arm, float(low[0]), float(high[0]), estimate(high - low))
                if arm != self.arms[0]:
                    baseline_gap = baseline[1] - baseline[0]
                    gap.narrowed = estimate(baseline_gap - (high - low))
                    gap.closed = _share(baseline_gap - (high - low), baseline_gap)
                    if ceiling:
                        gap.recovered_low, gap.recovered_high = (
                            _share(reached - start, ceiling[0] - start)
                            for reached, start in zip(groups, baseline, strict=True)
                        )
                if translated and arm != study.translation:
                    gap.gain_low, gap.gain_high = (
                        _share(reached - start, start)
                        for reached, start in zip(groups, translated, strict=True)
                    )
                gaps.append(gap)
        return gaps

    def _group_means(self, study: StudyDescription, collection: str, arm: str) -> list[Draws]:
        """Return the draws of the means over the low- and over the high-resource languages."""
        return [
            np.mean([self.draws[collection, arm, language] for language in group], axis=0)
            for group in (study.low, study.high)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the tables as plain data. Repeated runs give equal data."""
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
            "start_comparisons": [vars(comparison) for comparison in self.start_comparisons],
            "gaps": [vars(gap) for gap in self.gaps],
            "alignment_error_rates": [
                {"arm": arm, "language": language, "rate": rate}
                for (arm, language), rate in self.error_rates.items()
            ],
            "tokens": self.tokens,
            "unseen": self.unseen,
            "pools": [vars(pool) | {"distance": pool.distance} for pool in self.pools],
        }


def _values_by_seed(
    rows: Iterable[Mapping[str, Any]], measure: str
) -> dict[tuple[str, str, str], list[Values]]:
    """Return (collection, arm, language) -> the values per query, one entry per seed."""
    grouped: dict[tuple[str, str, str], list[Values]] = {}
    for row in rows:
        for collection, measures in row["measures"].items():
            key = (collection, row["arm"], row["language"])
            grouped.setdefault(key, []).append(measures[measure])
    return grouped


def _mean_of_seeds(seeds: Sequence[Values]) -> Values:
    return {query: float(np.mean([seed[query] for seed in seeds])) for query in seeds[0]}


def _mean(values: Values) -> float:
    return float(np.mean(list(values.values())))


def _error_rates(results: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    rates: dict[tuple[str, str], list[float]] = {}
    for row in results:
        if row.get("aer") is not None:
            rates.setdefault((row["arm"], row["language"]), []).append(row["aer"])
    return {key: float(np.mean(values)) for key, values in rates.items()}


def _pools(arms: Sequence[str], rows: Sequence[Mapping[str, Any]], measure: str) -> list[Pool]:
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        for collection, found in row["pools"].items():
            grouped.setdefault((collection, row["arm"]), []).append(found)
    draws = {
        key: bootstrap([seed["measures"][measure] for seed in seeds], (*key, "pool"))
        for key, seeds in grouped.items()
    }
    pools = []
    for (collection, arm), seeds in grouped.items():
        own, first = draws[collection, arm], draws.get((collection, arms[0]))
        gain = None if arm == arms[0] or first is None else estimate(own - first)
        queries = len(seeds[0]["measures"][measure])
        bias = {
            language: {
                name: _mean_of_known([seed["bias"][language][name] for seed in seeds])
                for name in names
            }
            for language, names in seeds[0]["bias"].items()
        }
        pools.append(Pool(collection, arm, estimate(own), bias, queries, gain))
    return sorted(pools, key=lambda pool: (pool.collection, arms.index(pool.arm)))


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _share(part: Draws, whole: Draws) -> Estimate | None:
    """Return the estimate of part / whole, or None if `whole` is not meaningfully above zero.

    It is if it is at least LEAST_WHOLE and the lower end of its interval a quarter of that.
    """
    if whole[0] < LEAST_WHOLE or np.quantile(whole[1:], 0.025) < LEAST_WHOLE / 4:
        return None
    # The share is undefined in the few draws in which the whole is not positive.
    return estimate(part[whole > 0] / whole[whole > 0])


def measure_name(measure: str) -> str:
    """Return the usual name of a mean over queries: MAP for AP, MRR@10 for RR@10."""
    return {"AP": "MAP", "RR@10": "MRR@10"}.get(measure, measure)
