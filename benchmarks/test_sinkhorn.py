"""The same cases and providers as a pytest-benchmark suite: ``pytest benchmarks``."""

import functools

import pytest
import torch

from benchmarks.cases import CPU_SHAPES, GPU_SHAPES, Case, parse_shape
from benchmarks.measure import MODES, Truth, call, check
from benchmarks.providers import PROVIDERS

CASES = [Case(*parse_shape(text)) for text in CPU_SHAPES]
if torch.cuda.is_available():
    CASES += [Case(*parse_shape(text), device="cuda") for text in GPU_SHAPES]

truth_of = functools.lru_cache(maxsize=1)(Truth.of)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.device}")
def test_sinkhorn(case, name, mode, benchmark):
    provider = PROVIDERS[name]
    reason = provider.unavailable(case)
    if reason is not None:
        pytest.skip(reason=reason)
    check(provider, mode, case, truth_of(case))
    benchmark.group = f"{case.name} {case.device} {mode}"
    run = call(provider, mode, case)

    def finished():
        run()
        if case.device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(finished, rounds=10, warmup_rounds=1)
