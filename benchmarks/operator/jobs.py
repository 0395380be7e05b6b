"""Tasks, and the jobs that run a provider on one, in this process or in that of OTT-JAX.

A *case* is a batch of problems. A *task* is a case with the input (cost or token vectors) and the
mode (forward, or forward and backward). A *provider* is one implementation. A *job* is a provider
that has been started on a task and can be timed and checked.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.operator import meter
from benchmarks.operator.cases import Case

ROOT = Path(__file__).resolve().parents[2]
MODES = ("forward", "both")
# The interpreter that runs OTT-JAX; `--ott-python` replaces it.
ott_python = sys.executable


class Task(NamedTuple):
    """A case with its input and its mode.

    Attributes:
        kind: "solve" (the cost is given) or "vectors" (the cost is built from token vectors, and
            both clouds receive a gradient).
        mode: "forward" (the value) or "both" (the value and its gradient).
    """

    kind: str
    mode: str
    case: Case


class TaskTensors(NamedTuple):
    """The tensors of a task on its device and in its dtype.

    Attributes:
        leaves: the cost, or both clouds of token vectors; they receive the gradient.
        log_a, log_b: log-masses (batch, n) and (batch, m).
        padding: (batch, n, m) bool for peers without masks; None if there is no padding or the
            provider handles it.
    """

    leaves: tuple[Tensor, ...]
    log_a: Tensor
    log_b: Tensor
    padding: Tensor | None

    def unmasked_cost(self, case: Case) -> Tensor:
        """The cost for solvers without masks: built in PyTorch if the task gives vectors."""
        if len(self.leaves) == 1:
            return self.leaves[0]
        x, y = (normalize(z, dim=2) for z in self.leaves)
        cost = 1 - x @ y.mT
        return cost if self.padding is None else cost.masked_fill(self.padding, case.padding_cost)


class ProviderOutput(NamedTuple):
    """The output of a PyTorch provider, in its own dtype.

    Attributes:
        value: (B,) transport cost regularised by KL(plan || a b), differentiable.
        details: -> f (B, n), g (B, m) and the plan, in the convention of
            ``optical.backends.reference``; computed only for the gate.
        offset: -> (B,) constant of the provider's convention, which the gate subtracts from
            ``value``; None if there is none.
    """

    value: Tensor
    details: Callable[[], tuple[Tensor, Tensor, Tensor]]
    offset: Callable[[], Tensor] | None = None


class Results(NamedTuple):
    """All results that the gate compares, in float64 on the CPU and in our convention."""

    value: Tensor
    f: Tensor
    g: Tensor
    plan: Tensor
    gradients: tuple[Tensor, ...]


class Job(Protocol):
    """A provider that has been started on one task."""

    def milliseconds_per_call(self, seconds: float = meter.TURN_SECONDS) -> float:
        """Mean milliseconds per call over one turn: a call, repeated until ``seconds`` have passed.

        On a CUDA device, a turn is one call after the cache has been flushed.
        """

    def results(self) -> Results | None:
        """The results for the gate; None for a job that computes none."""

    def peak_megabytes(self) -> float | str:
        """Peak memory of one call beyond its inputs; requires a fresh process."""

    def close(self) -> None:
        """Release processes and files."""


class TorchJob:
    """A PyTorch solver in this process.

    Args:
        solve: the solver, called with the tensors and the case.
        ours: whether the solver is a backend of ``optical``, which handles padding and can be
            captured in a CUDA graph.
        task: the task.
    """

    def __init__(
        self, solve: Callable[[TaskTensors, Case], ProviderOutput], ours: bool, task: Task
    ) -> None:
        self.task, self.solve = task, solve
        kind, mode, case = task
        inputs = case.inputs

        def placed(x: Tensor) -> Tensor:
            # A copy, so that the shared tensors of the case never require a gradient.
            return x.to(case.device, case.dtype, copy=True)

        padded = bool(inputs.padding.any())
        if kind == "vectors":
            leaves = [inputs.x, inputs.y]
        elif ours or not padded:
            leaves = [case.cost()]
        else:
            leaves = [case.cost().masked_fill(inputs.padding, case.padding_cost)]
        self.tensors = TaskTensors(
            tuple(placed(x).requires_grad_(mode == "both") for x in leaves),
            placed(inputs.log_a),
            placed(inputs.log_b),
            inputs.padding.to(case.device) if padded and not ours else None,
        )
        self.captured = ours and case.device == "cuda"

    def run(self) -> object:
        value = self.solve(self.tensors, self.task.case).value
        if self.task.mode == "both":
            return torch.autograd.grad(value.sum(), self.tensors.leaves)
        return value

    def milliseconds_per_call(self, seconds: float = meter.TURN_SECONDS) -> float:
        if self.task.case.device == "cpu":
            return meter.milliseconds_per_call(self.run, seconds)
        return cuda_milliseconds(self._replay if self.captured else self.run)

    @functools.cached_property
    def _replay(self) -> Callable[[], object]:
        """The call as a CUDA graph, as in a captured training step: no part may synchronise."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.outputs = self.run()
        return graph.replay

    def results(self) -> Results:
        output = self.solve(self.tensors, self.task.case)
        value = output.value.detach().cpu().double()
        if output.offset is not None:
            value = value - output.offset().cpu().double()
        f, g, plan = (x.detach().cpu().double() for x in output.details())
        gradients: tuple[Tensor, ...] = ()
        if self.task.mode == "both":
            gradients = torch.autograd.grad(output.value.sum(), self.tensors.leaves)
        gradients = tuple(x.cpu().double().contiguous() for x in gradients)
        return Results(value, f, g, plan, gradients)

    def peak_megabytes(self) -> float | str:
        if self.task.case.device == "cpu":
            return meter.peak_megabytes(self.run)
        self.run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.run()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)

    def close(self) -> None:
        pass


def cuda_milliseconds(run: Callable[[], object]) -> float:
    """Time of one call on the CUDA device by events, with its inputs flushed from the L2 cache."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    # Larger than the L2 cache, so that no call finds the inputs of the previous one there.
    torch.empty(256 * 2**20, dtype=torch.int8, device="cuda").zero_()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


class CeilingJob:
    """The loops of ``benchmarks/operator/ceiling.cpp``: timed, but without results to check."""

    def __init__(self, loops: Callable[[Case], Callable[[], object]], task: Task) -> None:
        self.run = loops(task.case)

    def milliseconds_per_call(self, seconds: float = meter.TURN_SECONDS) -> float:
        return meter.milliseconds_per_call(self.run, seconds)

    def results(self) -> None:
        return None

    def peak_megabytes(self) -> str:
        return ""

    def close(self) -> None:
        pass


class OttJob:
    """OTT-JAX in a worker process, which alternates with the jobs of this process."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.folder = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(
            [ott_python, "-m", "benchmarks.operator.ott_worker"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        kind, mode, case = task
        inputs, dtype = case.inputs, str(case.dtype).removeprefix("torch.")
        padding = inputs.padding
        arrays = {"a": inputs.log_a.exp(), "b": inputs.log_b.exp()}
        if kind == "vectors":
            arrays |= {"x": inputs.x, "y": inputs.y}
        else:
            arrays["cost"] = case.cost().masked_fill(padding, case.padding_cost)
        arrays = {name: array.to(case.dtype) for name, array in arrays.items()}
        arrays["padding"] = padding
        path = Path(self.folder.name) / "inputs.npz"
        np.savez(path, **{name: array.numpy() for name, array in arrays.items()})  # type: ignore[arg-type]
        self._request(
            do="start",
            inputs=str(path),
            leaves=["x", "y"] if kind == "vectors" else ["cost"],
            padded=bool(padding.any()),
            padding_cost=case.padding_cost,
            mode=mode,
            dtype=dtype,
            epsilon=case.epsilon,
            max_iter=case.max_iter,
            tol=case.tol,
        )

    def _request(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the OTT-JAX process ended during the request {request['do']!r}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def milliseconds_per_call(self, seconds: float = meter.TURN_SECONDS) -> float:
        return float(self._request(do="time", seconds=seconds)["ms"])

    def results(self) -> Results:
        path = Path(self.folder.name) / "results.npz"
        self._request(do="results", output=str(path))
        with np.load(path) as file:
            arrays = {name: torch.from_numpy(file[name]).double() for name in file.files}
        inputs, epsilon = self.task.case.inputs, self.task.case.epsilon
        # OTT's potentials include the masses: its f is our f + epsilon log a.
        f, g = arrays["f"] - epsilon * inputs.log_a, arrays["g"] - epsilon * inputs.log_b
        f, g = (x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for x in (f, g))
        names = sorted(name for name in arrays if name.startswith("gradient"))
        gradients = tuple(arrays[name] for name in names)
        return Results(arrays["value"], f, g, arrays["plan"], gradients)

    def peak_megabytes(self) -> float | str:
        peak_mb: float | str = self._request(do="peak")["peak_mb"]
        return peak_mb

    def close(self) -> None:
        with self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()
        self.folder.cleanup()
