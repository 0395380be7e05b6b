"""Times of our GPU backends: solves alone, CUDA graphs of the public call, calls from Python."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.csv_files import append_row
from benchmarks.gpu.measure import gate
from benchmarks.gpu.measure.clock import Quantiles, call_times, captured, device_times
from benchmarks.gpu.measure.rows import RowFile, new_row, stamp
from benchmarks.gpu.measure.shapes import Shape, draw, draw_sets
from optical import sinkhorn_vectors
from optical.backends.problem import dtype_name
from optical.backends.registry import BACKENDS
from optical.testing.cases import Case
from optical.testing.tolerance import solve

GPU_BACKENDS = ("cuda", "triton")
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


class Variant(NamedTuple):
    """A backend, its options, and what is timed: "forward", or "both" with the backward pass."""

    backend: str
    dtype: torch.dtype
    mode: str
    precision: str = "exact"
    gradient: str = "envelope"

    def describe(self) -> dict[str, Any]:
        return {
            "dtype": dtype_name(self.dtype),
            "precision": self.precision,
            "gradient": self.gradient if self.mode == "both" else "",
        }


def variants(shape: Shape) -> list[Variant]:
    """All variants of a shape, the most valuable first."""
    first = [Variant(backend, BFLOAT16, "forward") for backend in GPU_BACKENDS]
    first += [Variant(backend, BFLOAT16, "both") for backend in GPU_BACKENDS]
    first += [Variant(backend, FLOAT32, "forward") for backend in GPU_BACKENDS]
    # Problems of at most 32 rows and columns never store a plan in half precision.
    if max(shape.n, shape.m) > 32:
        first += [Variant(backend, BFLOAT16, "forward", "fast") for backend in GPU_BACKENDS]
    return first + [Variant(backend, FLOAT32, "both") for backend in GPU_BACKENDS]


def times(shape: Shape, rows: RowFile, end: float, folder: Path) -> None:
    """Time every variant of a shape."""
    _measure_all("times", shape, variants(shape), rows, end)


def gradients(shape: Shape, rows: RowFile, end: float, folder: Path) -> None:
    """Time forward and backward with implicit and unrolled gradients."""
    chosen = [
        Variant(backend, BFLOAT16, "both", gradient=gradient)
        for gradient in ("implicit", "unroll")
        for backend in GPU_BACKENDS
    ]
    _measure_all("gradients", shape, chosen, rows, end)


def _measure_all(
    step: str, shape: Shape, chosen: Sequence[Variant], rows: RowFile, end: float
) -> None:
    sets: list[Case] = []
    truths: dict[str, gate.Truth] = {}
    for variant in chosen:
        row: dict[str, Any] = {
            "step": step,
            "shape": shape,
            "provider": variant.backend,
            "mode": variant.mode,
        }
        row |= variant.describe()
        if time.monotonic() > end:
            rows.add(new_row(**row, note="not measured: out of time"))
            continue
        try:
            if not sets or sets[0].x.dtype != variant.dtype:
                sets, truths = [], {}  # frees the memory of the other dtype first
                sets = draw_sets(shape, variant.dtype)
            if variant.gradient not in truths:
                truths[variant.gradient] = gate.truth_of(sets[0], variant.gradient)
            rows.add(new_row(**row, **measure(sets, variant, truths[variant.gradient])))
        except Exception as error:  # a failure must not cost the other variants
            rows.add(new_row(**row, note=f"failed: {type(error).__name__}: {error}"[:400]))
            if "CUDA error" in str(error):
                raise  # the device context is lost: this process cannot go on
        torch.cuda.empty_cache()


def measure(sets: Sequence[Case], variant: Variant, truth: gate.Truth) -> dict[str, Any]:
    """Check and time a variant on rotating inputs; the columns of its row."""
    cases = [replace(case, precision=variant.precision) for case in sets]
    problem = cases[0].problem(variant.gradient, variant.backend)
    module = BACKENDS[variant.backend].load()
    reason = BACKENDS[variant.backend].supports(problem)
    if reason is not None:
        return {"note": f"refused: {reason}"}
    columns = gate.check(truth, variant.backend, variant.gradient, variant.precision)
    whole, alone = cases[0], gate.part(cases[0], slice(-gate.CHECKED, None))
    columns["same_bits"] = gate.same_bits(*(_outputs(case, variant) for case in (whole, alone)))

    calls = [public_call(case, variant) for case in cases]
    host = call_times(calls[0])
    columns |= {"host_us": host.host, "call_us": host.call}
    if variant.mode == "forward":
        problems = [case.problem(variant.gradient, variant.backend) for case in cases]
        solves = [functools.partial(module.forward, problem) for problem in problems]
        columns |= _graph_columns("kernel", solves)
    # Last, since a refused capture may leave the device in error.
    return columns | _graph_columns("graph", calls)


def _graph_columns(name: str, calls: Sequence[Callable[[], Any]]) -> dict[str, Any]:
    """Time calls as one CUDA graph; if it cannot be captured, the note has the reason."""
    try:
        graph = captured(lambda: [call() for call in calls])
    except Exception as error:
        return {"note": f"failed: {name} not captured: {type(error).__name__}: {error}"[:400]}
    return _columns(name, device_times(graph.replay, len(calls)))


def _columns(name: str, quantiles: Quantiles) -> dict[str, float]:
    columns = (f"{name}_us", f"{name}_p20", f"{name}_p80")
    return dict(zip(columns, quantiles, strict=True))


def public_call(case: Case, variant: Variant) -> Callable[[], tuple[Tensor, ...]]:
    """The call that a user writes; in mode "both" it returns the gradients of the vectors."""
    x, y = case.x, case.y
    assert y is not None
    options: dict[str, Any] = {
        "epsilon": case.epsilon[0].item(),
        "max_iter": case.max_iter,
        "precision": case.precision,
        "gradient": variant.gradient,
        "backend": variant.backend,
    }
    if bool((case.log_a == -torch.inf).any()):
        options |= {"log_a": case.log_a, "log_b": case.log_b}

    def forward() -> tuple[Tensor, ...]:
        result = sinkhorn_vectors(x, y, **options)
        return result.value, result.f, result.g

    if variant.mode == "forward":
        return forward
    leaves = x.detach().requires_grad_(), y.detach().requires_grad_()
    ones = torch.ones_like(case.epsilon)

    def both() -> tuple[Tensor, ...]:
        result = sinkhorn_vectors(*leaves, **options)
        # The implicit gradient is made for the transport cost alone.
        value = result.value_linear if variant.gradient == "implicit" else result.value
        return torch.autograd.grad(value, leaves, ones)

    return both


def _outputs(case: Case, variant: Variant) -> tuple[Tensor, ...]:
    return public_call(case, variant)()


# ------------------------------------------------------------------------------- single calls


def once(shape: Shape, rows: RowFile, end: float, folder: Path) -> None:
    """Solve one batch with the CUDA kernels, for a profiler around this process."""
    case = draw(shape, BFLOAT16)
    public_call(case, Variant("cuda", BFLOAT16, "forward"))()
    torch.cuda.synchronize()


def warm(shape: Shape, rows: RowFile, end: float, folder: Path) -> None:
    """Compile the Triton kernels that the timings of a shape use, into Triton's cache."""
    failures = 0
    for dtype, group in itertools.groupby(variants(shape), lambda variant: variant.dtype):
        case = draw(shape, dtype)
        for variant in group:
            if variant.backend != "triton":
                continue
            try:
                chosen = replace(case, precision=variant.precision)
                # The gate solves fewer problems, which may take other kernels.
                few = gate.part(chosen, slice(gate.CHECKED))
                for batch in (chosen, few):
                    _outputs(batch, variant)
                solve(variant.backend, few, variant.gradient)
                torch.cuda.synchronize()
                print(f"compiled {shape.name} {variant}", flush=True)
            except Exception as error:  # a failure must not cost the other kernels
                failures += 1
                print(f"{shape.name} {variant}: {type(error).__name__}: {error}", flush=True)
    if failures:
        raise RuntimeError(f"{failures} variants of {shape.name} cannot be compiled")


# ------------------------------------------------------------------------------------- tuning


def _tiles(tuned: Any) -> Iterator[Any]:
    """The tuned tile, then alternatives to its warps, depth and stages."""
    yield tuned
    for (warps_n, warps_m), depth, stages in itertools.product(
        ((1, 1), (2, 1), (2, 2), (4, 2)), (32, 64), (2, 3)
    ):
        # 512 registers a thread: minutes of compilation, and all of them spill.
        if tuned.rows * tuned.columns > 8192 and warps_n * warps_m == 1:
            continue
        tile = tuned._replace(warps_n=warps_n, warps_m=warps_m, depth=depth, stages=stages)
        if tile != tuned:
            yield tile


def _candidates(shape: Shape) -> Iterator[tuple[Any, bool, str, Any]]:
    """Tiles for a shape, or the ways to stream it.

    Yields:
        The tile, whether it is used today, the way, and a context in which the kernels use it.
    """
    from optical.kernels import tuning

    size = min((s for s in tuning.TILES if s >= max(shape.n, shape.m)), default=None)
    if size is not None:
        tuned = tuning.TILES[size]
        for tile in _tiles(tuned):
            yield tile, tile == tuned, "", mock.patch.dict(tuning.TILES, {size: tile})
        return
    together = shape.batch > tuning.PROGRAMS
    for way, limit in (("one launch", 0), ("stepwise", shape.batch)):
        changed = mock.patch.object(tuning, "PROGRAMS", limit)
        yield tuning.STREAM, together == (limit == 0), way, changed


def tune(shape: Shape, rows: RowFile, end: float, folder: Path) -> None:
    """Time the forward pass of Triton with other tiles, or streamed both ways, as CUDA graphs."""

    cases = draw_sets(shape, BFLOAT16)
    problems = [case.problem(backend="triton") for case in cases]
    forward = BACKENDS["triton"].load().forward
    path = folder / f"{rows.path.stem.removesuffix('rows')}tuning.csv"
    for tile, tuned, way, changed in _candidates(shape):
        if time.monotonic() > end:
            break
        try:
            with changed:
                graph = captured(lambda: [forward(problem) for problem in problems])
                result = (f"{device_times(graph.replay, len(problems)).p50:.4g}", "")
            del graph
        except Exception as error:
            result = ("", f"{type(error).__name__}: {error}"[:200])
        row = {"device": stamp()["device"], "shape": shape.problem, **tile._asdict(), "way": way}
        row |= {"tuned": tuned, "us_p50": result[0], "note": result[1]}
        append_row(path, row)
        print("tile", *row.values(), flush=True)
