"""Ways into the kernels that timings do not take: NVRTC, first uses, threads, and small calls."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.measure.clock import call_times, captured, device_times
from benchmarks.gpu.measure.ours import GPU_BACKENDS
from benchmarks.gpu.measure.rows import Row, RowFile, new_row
from benchmarks.gpu.measure.shapes import MACHINE, Shape, draw
from optical import OTAlignmentLoss, sinkhorn_vectors

SETTINGS: dict[str, Any] = {"epsilon": 0.1, "max_iter": 20}
# A batch so small that the device waits for Python.
SMALL = Shape("small", 4, 20, 25, 64, 50)


def first_use(shape: Shape, rows: RowFile, end: float, folder: Path) -> None:
    """Use the CUDA kernels for the first time: in a capture, in a thread, in autograd's thread."""
    _run_checks("first-use", rows)


def nvrtc(shape: Shape, rows: RowFile, end: float, folder: Path) -> None:
    """The same with kernels that NVRTC compiles: no nvcc, and no library beside the package."""
    from optical.backends import library

    os.environ["NVCC"] = ""
    library.CUDA_LIBRARY = "absent.so"
    _run_checks("nvrtc", rows)


def _run_checks(step: str, rows: RowFile) -> None:
    """Run the checks. Each uses a kernel that no other one has loaded before."""
    checks: dict[str, tuple[Shape, Callable[[Shape], str]]] = {
        "library": (SMALL, lambda shape: _library()),
        "capture": (Shape("pair", 3, 20, 30, 64, 20), _first_use_in_a_capture),
        "thread": (Shape("warp", 3, 60, 50, 64, 20), _in_a_thread),
        "gradient": (Shape("square", 3, 100, 120, 64, 20), _gradient),
        "four": (Shape("four", 3, 9, 12, 64, 20), _forward),
        "cluster": (Shape("cluster", 2, 300, 140, 64, 20), _forward),
    }
    for name, (shape, check) in checks.items():
        start = time.monotonic()
        try:
            found = check(shape)
        except Exception as error:  # a failure must not cost the other checks
            found = f"failed: {type(error).__name__}: {error}"[:400]
        note = f"{found} ({time.monotonic() - start:.1f} s)"
        rows.add(new_row(step, shape, "cuda", name, dtype="bfloat16", note=note))


def _library() -> str:
    from optical.backends import cuda

    loaded = cuda.load()
    return f"{type(loaded.library).__name__}, {loaded.reason or 'no obstacle'}"


def _vectors(shape: Shape) -> tuple[Tensor, Tensor]:
    case = draw(shape, torch.bfloat16)
    assert case.y is not None
    return case.x, case.y


def _deviation(value: Tensor, x: Tensor, y: Tensor) -> str:
    exact = sinkhorn_vectors(x.double(), y.double(), backend="reference", **SETTINGS).value
    error = (value.double() - exact).abs().max().item()
    # The tolerance of float32 at a cost of at most 2.
    return f"{'ok' if error <= 2e-5 else 'failed'}: value off by {error:.2g}"


def _forward(shape: Shape) -> str:
    x, y = _vectors(shape)
    return _deviation(sinkhorn_vectors(x, y, backend="cuda", **SETTINGS).value, x, y)


def _first_use_in_a_capture(shape: Shape) -> str:
    x, y = _vectors(shape)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = sinkhorn_vectors(x, y, backend="cuda", **SETTINGS)
    graph.replay()
    torch.cuda.synchronize()
    return _deviation(result.value, x, y)


def _in_a_thread(shape: Shape) -> str:
    found: list[str] = []

    def work() -> None:
        try:
            found.append(_forward(shape))
        except Exception as error:
            found.append(f"failed: {type(error).__name__}: {error}")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def _gradient(shape: Shape) -> str:
    """The backward pass, which autograd runs in a thread of the device."""
    leaves = [z.requires_grad_() for z in _vectors(shape)]
    exact = [z.detach().double().requires_grad_() for z in leaves]
    found, expected = (
        torch.autograd.grad(
            sinkhorn_vectors(*vectors, backend=backend, **SETTINGS).value.sum(), vectors
        )
        for vectors, backend in ((leaves, "cuda"), (exact, "reference"))
    )
    pairs = zip(found, expected, strict=True)
    error = max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    # Gradients have the dtype of the vectors.
    return (
        f"{'ok' if error <= 1e-2 else 'failed'}: gradient off by {error:.2g} of its largest entry"
    )


# ---------------------------------------------------------------------------------- small calls


def host(shape: Shape, rows: RowFile, end: float, folder: Path) -> None:
    """Time what Python takes around small calls, and around the loss on a timed shape."""
    for batch in (SMALL, shape):
        x, y = _vectors(batch)
        masks = [torch.ones(z.shape[:2], dtype=torch.bool, device=MACHINE.device) for z in (x, y)]
        student = x.detach().clone().requires_grad_()
        for backend in GPU_BACKENDS:
            if time.monotonic() > end:
                print(f"out of time before {batch.name} {backend}", flush=True)
                return
            for mode, call in _small_calls(backend, x, y, student, masks).items():
                rows.add(_host_row(batch, backend, mode, call))


def _small_calls(
    backend: str, x: Tensor, y: Tensor, student: Tensor, masks: list[Tensor]
) -> dict[str, Callable[[], Any]]:
    loss = OTAlignmentLoss(backend=backend)
    one = torch.ones((), device=MACHINE.device)
    options: dict[str, Any] = {"epsilon": 0.05, "max_iter": 50, "backend": backend}
    return {
        "sinkhorn_vectors": lambda: sinkhorn_vectors(x, y, **options).value,
        "loss forward": lambda: loss(x, y, *masks),
        "loss both": lambda: torch.autograd.grad(loss(student, y, *masks), student, one),
    }


def _host_row(shape: Shape, backend: str, mode: str, call: Callable[[], Any]) -> Row:
    columns: dict[str, Any] = {"dtype": "bfloat16"}
    try:
        call()
        times = call_times(call)
        columns |= {"host_us": times.host, "call_us": times.call}
        graph = captured(call)
        columns["graph_us"] = device_times(graph.replay).p50
    except Exception as error:  # a failure must not cost the other calls
        columns["note"] = f"failed: {type(error).__name__}: {error}"[:400]
    return new_row("host", shape, backend, mode, **columns)
