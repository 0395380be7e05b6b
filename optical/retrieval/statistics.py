"""Paired significance tests, bootstrap intervals and corrections for multiple comparisons.

The test is the paired randomisation test (Smucker, Allan and Carterette, CIKM 2007). Under the null
hypothesis that two systems do not differ, each difference x_i between their values for a query has
either sign with equal probability:

    p = P( |sum_i s_i x_i| >= |sum_i x_i| ),    s_i = +1 or -1 with probability 1/2

``scipy.stats.permutation_test`` gives the same p-values, about forty times slower. All results
depend on the values and the seed only. They do not depend on the order of queries, on other rows of
a table, on earlier calls, or on which system comes first. Needs ``pip install "optical-ot[eval]"``.
"""

from __future__ import annotations

import functools
import hashlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from optical.io.environment import require

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Floats = NDArray[numpy.float64]


TESTS = ("randomization", "t")
CORRECTIONS = ("holm", "bonferroni", "none")
RESAMPLES = 10_000
# Seed of the draws of `bootstrap`.
SEED = 0
# Quantiles of a 95 % interval.
TAILS = (0.025, 0.975)

# Up to 2^16 sign patterns are enumerated: exact, and fewer than the default number of samples.
EXACT_QUERIES = 16
# Random numbers drawn at a time, 16 MB as float64. Blocks of signs start a new draw, so the block
# size affects p-values and must not change.
_BLOCK = 2**21

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


def paired_test(
    first: Values,
    second: Values,
    *,
    test: str = "randomization",
    samples: int = 100_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairedTest:
    """Test (two-sided) whether the means of two systems over the same queries differ.

    Args:
        first, second: values per query, either mappings with the same queries or sequences in the
            same order.
        test: ``"randomization"``: all sign patterns if at most 16 differences are nonzero, else
            ``samples`` random patterns with p = (k + 1) / (samples + 1), which is never 0 and is
            not biased towards small values (Phipson and Smyth, 2010). ``"t"``: Student's paired
            test, as in ``scipy.stats.ttest_rel``.
        samples: number of random sign patterns.
        seed: seed of sign patterns and resamples.
        confidence: level of the interval of the mean difference, see :func:`interval`.

    Raises:
        ValueError: different queries or lengths, no values, values that are not finite, or an
            argument out of range.
        ImportError: numpy, or scipy for ``"t"``, is not installed.

    Examples:
        >>> paired_test({"q1": 0.5, "q2": 0.9, "q3": 0.7}, {"q1": 0.1, "q2": 0.3, "q3": 0.2}).p
        0.25
    """
    check_choice("test", test, TESTS)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, found {samples}")
    differences = _differences(first, second)
    # The interval is computed for the better system, so that swapping the systems only flips signs.
    sign = 1.0 if math.fsum(differences) >= 0.0 else -1.0
    mean, *ends = interval((sign * differences).tolist(), seed=seed, confidence=confidence)
    low, high = sorted(sign * end for end in ends)
    p = _t_test(differences) if test == "t" else _randomization_test(differences, samples, seed)
    return PairedTest(sign * mean, low, high, p, len(differences))


def interval(
    values: Values,
    *,
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """Return the mean of ``values`` and its bootstrap confidence interval.

    The percentile interval (Efron, 1979) consists of quantiles of the means of samples drawn with
    replacement. It stays within the range of the values, follows their skew, and is defined where
    BCa is not (all values but one equal). Like BCa it is slightly too narrow below about 20 values.

    Args:
        values: one value per query, in any order; for two systems, their differences.
        seed: seed of the resamples.
        confidence: between 0 and 1.
        resamples: number of samples drawn with replacement.

    Raises:
        ValueError: no values, values that are not finite, or an argument out of range.
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
    # Sorted, so that the order of queries cannot change a digit.
    x = np.sort(_array(values, "values"))
    mean = math.fsum(x) / len(x)
    if len(x) < 2:
        return Interval(mean, math.nan, math.nan)
    generator = _generator(seed, "interval", x)
    blocks = resampled_indices(generator, len(x), resamples)
    means = np.concatenate([x[indices].mean(axis=1) for indices in blocks])
    return Interval(mean, *percentiles(means, ((1 - confidence) / 2, (1 + confidence) / 2)))


def resampled_indices(
    generator: numpy.random.Generator, size: int, resamples: int = RESAMPLES
) -> Iterator[NDArray[numpy.int64]]:
    """Draw bootstrap samples of ``size`` values with replacement.

    Yields:
        Blocks of indices of shape (samples, size), ``resamples`` rows in all. The block size limits
        the memory and has no influence on the indices.
    """
    rows = max(1, _BLOCK // size)
    for start in range(0, resamples, rows):
        yield generator.integers(size, size=(min(rows, resamples - start), size))


def percentiles(draws: Floats, tails: tuple[float, float] = TAILS) -> tuple[float, float]:
    """Return the percentile interval of bootstrap draws."""
    low, high = _numpy().quantile(draws, tails)
    return float(low), float(high)


def correct(p: Sequence[float], correction: str = "holm") -> list[float]:
    """Correct p-values for multiple comparisons, in the order given.

    ``"holm"`` is the step-down method of Holm (Scandinavian Journal of Statistics, 1979): with
    p_(1) <= … <= p_(m), the corrected value of rank k is max over j <= k of min(1, (m - j + 1)
    p_(j)).

    Raises:
        ValueError: the correction is unknown, or a value is not between 0 and 1.

    Examples:
        >>> correct([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    check_choice("correction", correction, CORRECTIONS)
    for value in p:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"a p-value must lie between 0 and 1, found {value}")
    if correction == "none":
        return list(p)
    if correction == "bonferroni":
        return [min(1.0, len(p) * value) for value in p]
    corrected = [0.0] * len(p)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = largest
    return corrected


def bootstrap(seeds: Sequence[Mapping[str, float]], key: tuple[str, str, str]) -> Floats:
    """Return the mean over queries and seeds, followed by its bootstrap draws over both.

    The sampled queries depend on the query ids only. Languages and arms with the same queries are
    therefore resampled together, and differences between them stay paired. Seeds are sampled
    independently for each arm and language, because their trainings are independent.
    """
    np = _numpy()
    x = np.array([list(values.values()) for values in seeds])
    means: Floats = x @ _query_counts(tuple(seeds[0])).T / x.shape[1]
    if len(x) == 1:
        draws = means[0]
    else:
        generator = np.random.default_rng([SEED, *"/".join(key).encode()])
        sampled_seeds = generator.integers(0, len(x), (RESAMPLES, len(x)))
        draws = means[sampled_seeds, np.arange(RESAMPLES)[:, None]].mean(axis=1)
    found: Floats = np.concatenate([[x.mean()], draws])
    return found


@functools.lru_cache(maxsize=8)
def _query_counts(queries: tuple[str, ...]) -> Floats:
    """Return how often each query occurs in each resample, of shape (RESAMPLES, queries)."""
    np = _numpy()
    size = len(queries)
    generator = np.random.default_rng([SEED, *",".join(queries).encode()])
    counts = []
    for indices in resampled_indices(generator, size):
        rows = len(indices)
        flat = (indices + size * np.arange(rows)[:, None]).ravel()
        counts.append(np.bincount(flat, minlength=rows * size).reshape(rows, size))
    found: Floats = np.concatenate(counts).astype(np.float64)
    return found


def estimate(draws: Floats) -> tuple[float, float, float]:
    """Return the point estimate of draws and its 95 % interval."""
    return (float(draws[0]), *percentiles(draws[1:]))


def check_choice(name: str, value: str, accepted: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``accepted``."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}; found {value!r}")


def _randomization_test(differences: Floats, samples: int, seed: int) -> float:
    np = _numpy()
    # The sign of a zero difference is irrelevant, and other signs only affect the sum. Sorted
    # magnitudes give the same p for any order of queries and systems.
    x = np.sort(np.abs(differences[differences != 0.0]))
    n = len(x)
    if n == 0:
        return 1.0
    observed = abs(math.fsum(differences))
    # Sums of the same numbers in another order differ by rounding and must count as equal.
    threshold = observed - 1e-12 * float(x.sum())

    # The signed sums of eight queries are a table of 256 values, so a random pattern costs one
    # look-up per eight queries instead of eight products.
    groups = np.zeros((-(-n // 8), 8))
    groups.flat[:n] = x
    signs = 1.0 - 2.0 * ((np.arange(256)[:, None] >> np.arange(8)) & 1)
    tables = groups @ signs.T
    if n <= EXACT_QUERIES:
        sums = tables[0] if len(tables) == 1 else np.add.outer(tables[0], tables[1])
        return int(np.count_nonzero(np.abs(sums) >= threshold)) / int(sums.size)
    generator = _generator(seed, "randomization", x)
    extreme = 0
    for start in range(0, samples, _BLOCK):
        sums = np.zeros(min(_BLOCK, samples - start))
        for table in tables:
            sums += table[generator.integers(256, size=len(sums), dtype=np.uint8)]
        extreme += int(np.count_nonzero(np.abs(sums) >= threshold))
    return (extreme + 1) / (samples + 1)


def _t_test(differences: Floats) -> float:
    require("scipy", "eval", "the t-test")
    from scipy import stats

    if len(differences) < 2:
        raise ValueError(
            "a t-test needs at least two queries, found 1; use test='randomization' or more queries"
        )
    if not differences.any():
        return 1.0
    if (differences == differences[0]).all():
        # The variance is zero and t infinite. Data cannot show a probability of exactly zero.
        return sys.float_info.min
    return max(float(stats.ttest_1samp(differences, 0.0).pvalue), sys.float_info.min)


def _differences(first: Values, second: Values) -> Floats:
    if isinstance(first, Mapping) != isinstance(second, Mapping):
        raise ValueError("both systems must be mappings from queries, or both must be sequences")
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        different = set(first) ^ set(second)
        if different:
            raise ValueError(
                f"the systems have different queries: {len(different)} are in only one of them, "
                f"such as {min(different)!r}"
            )
        queries = sorted(first)
        first, second = [first[q] for q in queries], [second[q] for q in queries]
    a, b = _array(first, "first"), _array(second, "second")
    if len(a) != len(b):
        raise ValueError(f"the systems have different numbers of queries: {len(a)} and {len(b)}")
    difference: Floats = a - b
    return difference


def _array(values: Values, name: str) -> Floats:
    np = _numpy()
    listed = list(values.values()) if isinstance(values, Mapping) else values
    array: Floats = np.asarray(listed, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} must be a list of at least one value, found shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite numbers")
    return array


def _generator(seed: int, purpose: str, x: Floats) -> numpy.random.Generator:
    """Return a generator seeded by the seed and the values, independent of earlier calls."""
    digest = hashlib.sha256(purpose.encode() + x.astype("<f8").tobytes()).digest()
    words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 32, 4)]
    np = _numpy()
    sequence = np.random.SeedSequence([seed, *words])
    generator: numpy.random.Generator = np.random.Generator(np.random.PCG64(sequence))
    return generator


def _numpy() -> Any:
    return require("numpy", "eval", "the computation of tests and intervals")
