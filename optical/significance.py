"""Is one system better than another, or was it luck? Paired tests, intervals, and one table.

The test is the paired randomisation test (Smucker, Allan and Carterette, CIKM 2007): if two systems
do not differ, each query's difference could as well have the other sign. With x_i the differences,

    p = P( |sum_i s_i x_i| >= |sum_i x_i| ),    s_i = +1 or -1 with probability 1/2

All numbers are functions of the values and the seed alone: not of the order of queries, of rows in
a table, of calls, or of which of the two systems comes first. Needs ``pip install
"optical[eval]"``.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from optical.evaluation import Evaluation

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

__all__ = [
    "CORRECTIONS",
    "TESTS",
    "Comparison",
    "Interval",
    "PairedTest",
    "Row",
    "compare",
    "correct",
    "interval",
    "paired_test",
]

TESTS = ("randomization", "t")
CORRECTIONS = ("holm", "bonferroni", "none")

# Up to 2^16 sign patterns are tried one by one: fewer than the usual number of random ones, and
# exact.
_EXACT_QUERIES = 16
# Numbers drawn at a time, 16 MB as float64. It is part of the result (the generator's stream is cut
# here), so it is no argument.
_BLOCK = 2**21
_RESAMPLES = 10_000

Values = Sequence[float] | Mapping[str, float]


class Interval(NamedTuple):
    """A mean and its confidence interval; ``low`` and ``high`` are NaN below two values."""

    mean: float
    low: float
    high: float


class PairedTest(NamedTuple):
    """The result of :func:`paired_test`; ``difference`` is the first mean minus the second."""

    difference: float
    low: float
    high: float
    p: float
    queries: int


@dataclass(frozen=True)
class Row:
    """One system against the baseline by one measure."""

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
    """A table of systems against one baseline; see :func:`compare`.

    Attributes:
        rows: one for each system but the baseline and each measure, in the order they were given.
        baseline: name of the baseline.
        baseline_missing: queries for which the baseline's run had no document.
        test, correction, samples, seed, confidence: how it was made.
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
        """The table, one measure after the other; ``*`` marks corrected p below ``alpha``."""
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
            name += f" ({self.samples} samples, seed {self.seed})"
        note = {
            "holm": f"Holm over {len(self.rows)} comparisons",
            "bonferroni": f"Bonferroni over {len(self.rows)} comparisons",
            "none": "no correction",
        }[self.correction]
        lines += ["", f"Two-sided {name}; {note}; * corrected p < {alpha:g}."]
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dictionaries for JSON; an interval that does not exist is ``None``."""
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
    """Compare systems with a baseline, on the same queries, in one table.

    Args:
        runs: name of a system -> its :class:`optical.evaluation.Evaluation`, two at least.
        baseline: name of the system to compare with; the first one if ``None``.
        measures: which measures, as named in the evaluations; all of the baseline's if ``None``.
        test: ``"randomization"`` or ``"t"``.
        correction: ``"holm"`` (Holm, 1979) over all rows of the table, ``"bonferroni"`` or
            ``"none"``.
        samples, seed, confidence: see :func:`paired_test`.

    Raises:
        ValueError: fewer than two systems, an unknown baseline, measure, test or correction, or
            evaluations that do not cover the same queries.
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs at least two systems, found {len(runs)}")
    _require_one_of("correction", correction, CORRECTIONS)
    baseline = next(iter(runs)) if baseline is None else baseline
    if baseline not in runs:
        raise ValueError(f"unknown baseline {baseline!r}; the systems are {', '.join(runs)}")
    reference = runs[baseline]
    measures = reference.measures if measures is None else tuple(measures)
    if not measures:
        raise ValueError("no measure to compare; evaluate with at least one")
    for system, evaluation in runs.items():
        for measure in measures:
            if measure not in evaluation.per_query:
                raise ValueError(
                    f"system {system!r} was not evaluated by {measure!r}, only by "
                    f"{', '.join(evaluation.measures)}; evaluate all systems by the same measures"
                )
        different = set(evaluation.queries) ^ set(reference.queries)
        if different:
            raise ValueError(
                f"systems {system!r} and {baseline!r} were evaluated on different queries "
                f"({len(different)} are in one of them only, such as {min(different)!r}); "
                "evaluate both with the same judgements"
            )

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


def paired_test(
    first: Values,
    second: Values,
    *,
    test: str = "randomization",
    samples: int = 100_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairedTest:
    """Test two-sided whether two systems differ in the mean over the same queries.

    Args:
        first, second: values per query, both as mappings with the same queries, or both as
            sequences in the same order.
        test: ``"randomization"``: all sign patterns when at most 16 differences are not zero, else
            ``samples`` random ones and p = (k + 1) / (samples + 1), which is never 0 and never too
            small on average (Phipson and Smyth, 2010). ``"t"``: Student's paired test, for which
            ``scipy.stats.ttest_rel`` is called.
        samples: random sign patterns.
        seed: seed of patterns and resamples.
        confidence: level of the interval of the mean difference, see :func:`interval`.

    Raises:
        ValueError: different queries, lengths, no values, values that are not finite, or an
            argument out of its range.
        ImportError: numpy, or scipy for ``"t"``, is not installed.

    Examples:
        >>> paired_test({"q1": 0.5, "q2": 0.9, "q3": 0.7}, {"q1": 0.1, "q2": 0.3, "q3": 0.2}).p
        0.25
    """
    _require_one_of("test", test, TESTS)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, found {samples}")
    differences = _differences(first, second)
    # The interval of the better system's lead, so that changing places changes the signs only.
    lead = 1.0 if math.fsum(differences) >= 0.0 else -1.0
    mean, *ends = interval((lead * differences).tolist(), seed=seed, confidence=confidence)
    low, high = sorted(lead * end for end in ends)
    p = _t_test(differences) if test == "t" else _randomization(differences, samples, seed)
    return PairedTest(lead * mean, low, high, p, len(differences))


def interval(
    values: Values,
    *,
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = _RESAMPLES,
) -> Interval:
    """Return the mean of ``values`` and its bootstrap confidence interval.

    The percentile interval (Efron, 1979): the quantiles of the means of ``resamples`` samples drawn
    with replacement. It stays inside the range of the values, follows their skew, and exists where
    BCa does not (all values but one equal); like BCa it is somewhat too narrow below about 20
    values.

    Args:
        values: one value per query, in any order. For a difference of two systems give the
            differences.
        seed: seed of the resamples.
        confidence: between 0 and 1.
        resamples: number of resamples.

    Raises:
        ValueError: no values, values that are not finite, or an argument out of its range.
        ImportError: numpy is not installed.

    Examples:
        >>> interval([0.0, 0.5, 1.0, 0.5]).mean
        0.5
    """
    np = _numpy()
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, found {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, found {resamples}")
    # Sorted: the order of queries carries nothing, and so cannot change a digit.
    x = np.sort(_array(values, "values"))
    mean = math.fsum(x) / len(x)
    if len(x) < 2:
        return Interval(mean, math.nan, math.nan)
    generator = _generator(seed, "interval", x)
    means = np.empty(resamples)
    rows = max(1, _BLOCK // len(x))
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        means[start:stop] = x[generator.integers(len(x), size=(stop - start, len(x)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean, float(low), float(high))


def correct(p: Sequence[float], correction: str = "holm") -> list[float]:
    """Correct p-values for their number, in the order given.

    ``"holm"`` is the step-down method of Holm (Scandinavian Journal of Statistics, 1979): with
    p_(1) <= … <= p_(m), the corrected value of rank k is max over j <= k of min(1, (m - j + 1)
    p_(j)).

    Raises:
        ValueError: the correction is unknown, or a value is not between 0 and 1.

    Examples:
        >>> correct([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    _require_one_of("correction", correction, CORRECTIONS)
    for value in p:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"a p-value must lie between 0 and 1, found {value}")
    if correction == "none":
        return list(p)
    if correction == "bonferroni":
        return [min(1.0, len(p) * value) for value in p]
    corrected = [0.0] * len(p)
    largest = 0.0
    for done, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - done) * p[index]))
        corrected[index] = largest
    return corrected


def _randomization(differences: NDArray[numpy.float64], samples: int, seed: int) -> float:
    np = _numpy()
    # A difference of 0 has no sign, and a sign flips nothing but the sum: magnitudes are enough,
    # and sorted they make p the same whichever system or query comes first.
    x = np.sort(np.abs(differences[differences != 0.0]))
    n = len(x)
    if n == 0:
        return 1.0
    observed = abs(math.fsum(differences))
    # Sums of the same numbers in another order differ by rounding and must count as equal.
    least = observed - 1e-12 * float(x.sum())

    # Signs by the byte: the signed sums of eight queries are a table of 256, so a random pattern
    # costs one look-up per eight queries instead of eight products.
    groups = np.zeros((-(-n // 8), 8))
    groups.flat[:n] = x
    signs = 1.0 - 2.0 * ((np.arange(256)[:, None] >> np.arange(8)) & 1)
    tables = groups @ signs.T
    if n <= _EXACT_QUERIES:
        sums = tables[0] if len(tables) == 1 else np.add.outer(tables[0], tables[1])
        return int(np.count_nonzero(np.abs(sums) >= least)) / int(sums.size)
    generator = _generator(seed, "randomization", x)
    found = 0
    for start in range(0, samples, _BLOCK):
        sums = np.zeros(min(_BLOCK, samples - start))
        for table in tables:
            sums += table[generator.integers(256, size=len(sums), dtype=np.uint8)]
        found += int(np.count_nonzero(np.abs(sums) >= least))
    return (found + 1) / (samples + 1)


def _t_test(differences: NDArray[numpy.float64]) -> float:
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError(
            'the t-test needs scipy; install it with `pip install "optical[eval]"`'
        ) from error
    if len(differences) < 2:
        raise ValueError(
            "a t-test needs at least two queries, found 1; use test='randomization' or more queries"
        )
    if not differences.any():
        return 1.0
    if (differences == differences[0]).all():
        # No variance at all: t is infinite. Zero is no probability that data can show.
        return sys.float_info.min
    return max(float(stats.ttest_1samp(differences, 0.0).pvalue), sys.float_info.min)


def _differences(first: Values, second: Values) -> NDArray[numpy.float64]:
    if isinstance(first, Mapping) != isinstance(second, Mapping):
        raise ValueError("both systems must be mappings from queries, or both must be sequences")
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        different = set(first) ^ set(second)
        if different:
            raise ValueError(
                f"the systems have different queries: {len(different)} are in one of them only, "
                f"such as {min(different)!r}"
            )
        queries = sorted(first)
        first, second = [first[q] for q in queries], [second[q] for q in queries]
    a, b = _array(first, "first"), _array(second, "second")
    if len(a) != len(b):
        raise ValueError(f"the systems have different numbers of queries: {len(a)} and {len(b)}")
    difference: NDArray[numpy.float64] = a - b
    return difference


def _array(values: Values, name: str) -> NDArray[numpy.float64]:
    np = _numpy()
    listed = list(values.values()) if isinstance(values, Mapping) else values
    array: NDArray[numpy.float64] = np.asarray(listed, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} must be a list of at least one value, found shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite numbers")
    return array


def _generator(seed: int, purpose: str, x: NDArray[numpy.float64]) -> numpy.random.Generator:
    """A generator that depends on the seed and the numbers, so on no order of calls."""
    digest = hashlib.sha256(purpose.encode() + x.astype("<f8").tobytes()).digest()
    words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 32, 4)]
    np = _numpy()
    sequence = np.random.SeedSequence([seed, *words])
    generator: numpy.random.Generator = np.random.Generator(np.random.PCG64(sequence))
    return generator


def _numpy() -> Any:
    try:
        import numpy
    except ImportError as error:
        raise ImportError(
            'tests and intervals need numpy; install it with `pip install "optical[eval]"`'
        ) from error
    return numpy


def _require_one_of(name: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}; found {value!r}")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _range(low: float, high: float) -> str:
    return "–" if math.isnan(low) else f"{low:+.4f} … {high:+.4f}"


def _p(p: float) -> str:
    return f"{p:.4f}" if p >= 1e-4 else f"{p:.1e}"
