"""The solve and vectors benchmarks as a pytest-benchmark suite: ``pytest benchmarks``."""

import itertools
from typing import Any

import pytest
import torch

from benchmarks.operator.cases import CPU_SHAPES, GPU_SHAPES, parse_shape
from benchmarks.operator.jobs import MODES, Task
from benchmarks.operator.measure import start_gated
from benchmarks.operator.providers import PROVIDERS

DEVICES = {"cpu": CPU_SHAPES, **({"cuda": GPU_SHAPES} if torch.cuda.is_available() else {})}
TASKS = [
    Task(kind, mode, parse_shape(shape, device=device))
    for device, shapes in DEVICES.items()
    for kind, shape, mode in itertools.product(("solve", "vectors"), shapes["solve"], MODES)
]


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize(
    "task", TASKS, ids=lambda task: f"{task.kind}-{task.mode}-{task.case.name}-{task.case.device}"
)
def test_sinkhorn(task: Task, name: str, benchmark: Any) -> None:
    reason = PROVIDERS[name].unavailable(task)
    if reason is not None:
        pytest.skip(reason=reason)
    row, _, job = start_gated(task.kind, PROVIDERS[name], task)
    assert job is not None, row.note
    benchmark.group = f"{task.kind} {task.mode} {task.case.name} {task.case.device}"
    try:
        # A turn of one call, because the plugin repeats it.
        turn = {"seconds": 0.0}
        benchmark.pedantic(job.milliseconds_per_call, kwargs=turn, rounds=10, warmup_rounds=1)
    finally:
        job.close()
