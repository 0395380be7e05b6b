"""Bootstrap draws of means over queries and seeds that stay paired between systems."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from optical.retrieval.statistics import RESAMPLES, percentiles, resampled_indices

SEED = 0

# Query id -> value of a measure.
Values = dict[str, float]
# A point estimate, followed by its bootstrap draws.
Draws = np.ndarray[Any, np.dtype[np.float64]]
# Point estimate, lower and upper end of its 95 % interval.
Estimate = tuple[float, float, float]


def bootstrap(seeds: Sequence[Values], key: tuple[str, str, str]) -> Draws:
    """Return the mean over queries and seeds, followed by its bootstrap draws over both.

    The sampled queries depend on the query ids only. Languages and arms with the same queries are
    therefore resampled together, and differences between them stay paired. Seeds are sampled
    independently for each arm and language, because their trainings are independent.
    """
    x = np.array([list(values.values()) for values in seeds])
    means: Draws = x @ _query_counts(tuple(seeds[0])).T / x.shape[1]
    if len(x) == 1:
        draws = means[0]
    else:
        generator = np.random.default_rng([SEED, *"/".join(key).encode()])
        sampled_seeds = generator.integers(0, len(x), (RESAMPLES, len(x)))
        draws = means[sampled_seeds, np.arange(RESAMPLES)[:, None]].mean(axis=1)
    return np.concatenate([[x.mean()], draws])


@functools.lru_cache(maxsize=8)
def _query_counts(queries: tuple[str, ...]) -> Draws:
    """Return how often each query occurs in each resample, of shape (RESAMPLES, queries)."""
    size = len(queries)
    generator = np.random.default_rng([SEED, *",".join(queries).encode()])
    counts = []
    for indices in resampled_indices(generator, size):
        rows = len(indices)
        flat = (indices + size * np.arange(rows)[:, None]).ravel()
        counts.append(np.bincount(flat, minlength=rows * size).reshape(rows, size))
    return np.concatenate(counts).astype(np.float64)


def estimate(draws: Draws) -> Estimate:
    """Return the point estimate of draws and its 95 % interval."""
    return (float(draws[0]), *percentiles(draws[1:]))
