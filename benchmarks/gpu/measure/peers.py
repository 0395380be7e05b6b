"""Times of hand-written PyTorch loops and OTT-JAX on the batches on which our backends are timed.

The loops get what ours get: CUDA graphs and, as a further provider, ``torch.compile``.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.gpu.measure import gate
from benchmarks.gpu.measure.clock import call_times, captured, device_times
from benchmarks.gpu.measure.rows import RowFile, new_row
from benchmarks.gpu.measure.shapes import MACHINE, Shape, draw_sets
from optical import sinkhorn_vectors
from optical.backends.problem import dtype_name
from optical.testing.cases import Case
from optical.testing.tolerance import TOLERANCE

# Larger plans take the loops seconds a call.
MOST_ENTRIES = 3e7
Step = Callable[..., Tensor]


def cost_of(x: Tensor, y: Tensor) -> Tensor:
    """Cosine costs by one batched product in the dtype of the vectors, in float32."""
    return 1 - (normalize(x, dim=2) @ normalize(y, dim=2).mT).float()


def bmm_step(kernel: Tensor, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """One iteration on scalings; the kernel underflows at small epsilon."""
    u = 1 / torch.bmm(kernel, b * v)
    return 1 / torch.bmm(kernel.mT, a * u)


def log_step(score: Tensor, log_a: Tensor, log_b: Tensor, g: Tensor) -> Tensor:
    """One iteration in the log domain; ``g`` is in units of epsilon."""
    f = -torch.logsumexp(score + (g + log_b)[:, None, :], 2)
    return -torch.logsumexp(score + (f + log_a)[:, :, None], 1)


def bmm_loop(case: Case, step: Step = bmm_step) -> Tensor:
    """The potentials g, from scalings."""
    kernel = (cost_of(case.x, _columns(case)) / -_epsilon(case)).exp()
    a, b = case.log_a.exp()[:, :, None], case.log_b.exp()[:, :, None]
    v = torch.ones_like(b)
    for _ in range(case.max_iter):
        v = step(kernel, a, b, v)
    return case.epsilon[:, None] * v[:, :, 0].log()


def log_loop(case: Case, step: Step = log_step) -> Tensor:
    """The potentials g, in the log domain."""
    score = cost_of(case.x, _columns(case)) / -_epsilon(case)
    g = torch.zeros_like(case.log_b)
    for _ in range(case.max_iter):
        g = step(score, case.log_a, case.log_b, g)
    return case.epsilon[:, None] * g


def _columns(case: Case) -> Tensor:
    assert case.y is not None
    return case.y


def _epsilon(case: Case) -> Tensor:
    return case.epsilon[:, None, None]


def providers(shape: Shape) -> dict[str, Callable[[Case], Tensor]]:
    """The loops, and the same with a compiled iteration where that takes seconds."""
    found: dict[str, Callable[[Case], Tensor]] = {"torch_bmm": bmm_loop, "torch_log": log_loop}
    if shape.batch * shape.n * shape.m < MOST_ENTRIES:
        options: dict[str, Any] = {"dynamic": False, "backend": MACHINE.compiler}
        compiled_bmm, compiled_log = (
            torch.compile(step, **options) for step in (bmm_step, log_step)
        )
        found["torch_bmm_compiled"] = lambda case: bmm_loop(case, compiled_bmm)
        found["torch_log_compiled"] = lambda case: log_loop(case, compiled_log)
    return found


def times(shape: Shape, rows: RowFile, end: float, folder: Path) -> None:
    """Time the peers on a shape, in both dtypes."""
    for dtype in (torch.bfloat16, torch.float32):
        sets = draw_sets(shape, dtype)[:4]
        for name, solve in providers(shape).items():
            row: dict[str, Any] = {"step": "peers", "shape": shape, "provider": name}
            row |= {"mode": "forward", "dtype": dtype_name(dtype)}
            if time.monotonic() > end:
                rows.add(new_row(**row, note="not measured: out of time"))
                continue
            try:
                rows.add(new_row(**row, **_measure(sets, solve)))
            except Exception as error:  # a failure must not cost the other peers
                rows.add(new_row(**row, note=f"failed: {type(error).__name__}: {error}"[:400]))
                if "CUDA error" in str(error):
                    raise
            torch.cuda.empty_cache()
    _ott(shape, rows)


def _measure(sets: list[Case], solve: Callable[[Case], Tensor]) -> dict[str, Any]:
    columns: dict[str, Any] = {"error_potentials": _check(sets[0], solve)}
    graph = captured(lambda: [solve(case) for case in sets])
    quantiles = device_times(graph.replay, len(sets))
    columns |= dict(zip(("graph_us", "graph_p20", "graph_p80"), quantiles, strict=True))
    del graph
    host = call_times(lambda: solve(sets[0]))
    return columns | {"host_us": host.host, "call_us": host.call}


def _check(case: Case, solve: Callable[[Case], Tensor]) -> float:
    """The error of g in units of epsilon on the first problems, up to its free constant."""
    few = gate.part(case, slice(gate.CHECKED))
    truth = sinkhorn_vectors(
        few.x.double(),
        _columns(few).double(),
        few.log_a.double(),
        few.log_b.double(),
        epsilon=few.epsilon.double(),
        max_iter=few.max_iter,
        backend="reference",
    )
    difference = solve(few).double() - truth.g
    error = (difference - difference.mean(1, keepdim=True)).abs().max().item()
    # Costs are at most 2, and their errors become errors of the potentials.
    allowed = 2 * TOLERANCE[case.x.dtype]
    if not error <= allowed:
        raise AssertionError(f"g is off by {error:.3g}; expected at most {allowed:.3g}")
    return error / few.epsilon[0].item()


def _ott(shape: Shape, rows: RowFile) -> None:
    row: dict[str, Any] = {"step": "peers", "shape": shape, "provider": "ott", "mode": "forward"}
    if importlib.util.find_spec("ott") is None:
        rows.add(new_row(**row, note="not measured: ott-jax is not installed"))
        return
    from benchmarks.operator.cases import Case as BenchmarkCase
    from benchmarks.operator.jobs import OttJob, Task

    case = BenchmarkCase(*shape[1:6], epsilon=shape.epsilon)
    job = OttJob(Task("vectors", "forward", case))
    try:
        times = sorted(1e3 * job.milliseconds_per_call(0.2) for _ in range(5))
    finally:
        job.close()
    columns: dict[str, Any] = {
        "dtype": "float32",
        "call_us": times[2],
        "note": "on the default device of JAX",
    }
    rows.add(new_row(**row, **columns))
