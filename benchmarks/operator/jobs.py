"""Providers at work: a task, and what takes turns on it, here or in a process of its own."""

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
# The interpreter of OTT-JAX; `--ott-python` replaces it.
ott_python = sys.executable


class Task(NamedTuple):
    """One thing to do: with the cost given, or from token vectors; the value, or its gradient too.

    ``kind`` is "solve" (the cost is given) or "vectors" (it is built from token vectors, and the
    gradient goes to both clouds).
    """

    kind: str
    mode: str
    case: Case


class Given(NamedTuple):
    """The tensors of a task, on its device and in its dtype; leaves[i] receive the gradient."""

    leaves: tuple[Tensor, ...]
    log_a: Tensor
    log_b: Tensor
    absent: Tensor | None

    def peers_cost(self, case: Case) -> Tensor:
        """The cost for solvers without masks: built by PyTorch if vectors are given."""
        if len(self.leaves) == 1:
            return self.leaves[0]
        x, y = (normalize(z, dim=2) for z in self.leaves)
        cost = 1 - x @ y.mT
        return cost if self.absent is None else cost.masked_fill(self.absent, case.padding_cost)


class Solution(NamedTuple):
    """What a provider returns.

    Attributes:
        value: (B,) regularised by KL(plan || a b), differentiable.
        details: -> f (B, n), g (B, m) and the plan, in the convention of optical.backends.reference.
        offset: what the provider's convention adds to ``value``; subtracted where it is compared.
    """

    value: Tensor
    details: Callable[[], tuple[Tensor, Tensor, Tensor]]
    offset: Callable[[], Tensor] | None = None


class Results(NamedTuple):
    """All that the gate looks at, in float64 on the CPU."""

    value: Tensor
    f: Tensor
    g: Tensor
    plan: Tensor
    gradients: tuple[Tensor, ...]


class Job(Protocol):
    """A provider at work on one task."""

    def turn(self, seconds: float = meter.TURN_SECONDS) -> float:
        """Milliseconds per call, of as many calls as fit into ``seconds`` and at least one."""

    def results(self) -> Results | None:
        """Everything that can be compared with the truth; None where there is no result."""

    def peak_megabytes(self) -> float | str:
        """Memory of one call beyond its inputs; for a process of its own."""

    def close(self) -> None: ...


class TorchJob:
    """A job of PyTorch tensors in this process."""

    def __init__(self, solve: Callable[[Given, Case], Solution], ours: bool, task: Task) -> None:
        self.task, self.solve = task, solve
        kind, mode, case = task
        inputs = case.inputs

        def placed(x: Tensor) -> Tensor:
            # A copy, so that no gradient is asked of the case's own tensors.
            return x.to(case.device, case.dtype, copy=True)

        padded = bool(inputs.absent.any())
        if kind == "vectors":
            leaves = [inputs.x, inputs.y]
        elif ours or not padded:
            leaves = [case.cost()]
        else:
            leaves = [case.cost().masked_fill(inputs.absent, case.padding_cost)]
        self.given = Given(
            tuple(placed(x).requires_grad_(mode == "both") for x in leaves),
            placed(inputs.log_a),
            placed(inputs.log_b),
            inputs.absent.to(case.device) if padded and not ours else None,
        )
        self.graphed = ours and case.device == "cuda"

    def run(self) -> object:
        value = self.solve(self.given, self.task.case).value
        if self.task.mode == "both":
            return torch.autograd.grad(value.sum(), self.given.leaves)
        return value

    def turn(self, seconds: float = meter.TURN_SECONDS) -> float:
        if self.task.case.device == "cpu":
            return meter.turn(self.run, seconds)
        return _device_turn(self._replay if self.graphed else self.run)

    @functools.cached_property
    def _replay(self) -> Callable[[], object]:
        """Ours as a CUDA graph, as a training step would hold it: nothing of it may synchronise."""
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
        solution = self.solve(self.given, self.task.case)
        value = solution.value.detach().cpu().double()
        if solution.offset is not None:
            value = value - solution.offset().cpu().double()
        f, g, plan = (x.detach().cpu().double() for x in solution.details())
        gradients: tuple[Tensor, ...] = ()
        if self.task.mode == "both":
            gradients = torch.autograd.grad(solution.value.sum(), self.given.leaves)
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


def _device_turn(run: Callable[[], object]) -> float:
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    # More than the second cache level holds: no run starts with the inputs of the last one in it.
    torch.empty(256 * 2**20, dtype=torch.int8, device="cuda").zero_()
    started.record()
    run()
    ended.record()
    torch.cuda.synchronize()
    return float(started.elapsed_time(ended))


class CeilingJob:
    """The loops of ``benchmarks/operator/ceiling.cpp``, which compute nothing."""

    def __init__(self, loops: Callable[[Case], Callable[[], object]], task: Task) -> None:
        self.run = loops(task.case)

    def turn(self, seconds: float = meter.TURN_SECONDS) -> float:
        return meter.turn(self.run, seconds)

    def results(self) -> None:
        return None

    def peak_megabytes(self) -> str:
        return ""

    def close(self) -> None:
        pass


class WorkerJob:
    """OTT-JAX in a process of its own, which takes turns with the jobs of this one."""

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
        absent = inputs.absent
        arrays = {"a": inputs.log_a.exp(), "b": inputs.log_b.exp()}
        if kind == "vectors":
            arrays |= {"x": inputs.x, "y": inputs.y}
        else:
            arrays["cost"] = case.cost().masked_fill(absent, case.padding_cost)
        path = Path(self.folder.name) / "inputs.npz"
        arrays = {name: array.to(case.dtype) for name, array in arrays.items()} | {"absent": absent}
        np.savez(path, **{name: array.numpy() for name, array in arrays.items()})  # type: ignore[arg-type]
        self._ask(
            do="start",
            inputs=str(path),
            arguments=["x", "y"] if kind == "vectors" else ["cost"],
            padded=bool(absent.any()),
            padding_cost=case.padding_cost,
            mode=mode,
            dtype=dtype,
            epsilon=case.epsilon,
            max_iter=case.max_iter,
            tol=case.tol,
        )

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of OTT-JAX ended while asked to {request['do']}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def turn(self, seconds: float = meter.TURN_SECONDS) -> float:
        return float(self._ask(do="turn", seconds=seconds)["ms"])

    def results(self) -> Results:
        path = Path(self.folder.name) / "solution.npz"
        self._ask(do="solution", output=str(path))
        with np.load(path) as file:
            found = {name: torch.from_numpy(file[name]).double() for name in file.files}
        inputs, epsilon = self.task.case.inputs, self.task.case.epsilon
        # OTT's potentials hold the masses: f + epsilon log a of ours.
        f, g = found["f"] - epsilon * inputs.log_a, found["g"] - epsilon * inputs.log_b
        f, g = (x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for x in (f, g))
        names = sorted(name for name in found if name.startswith("gradient"))
        gradients = tuple(found[name] for name in names)
        return Results(found["value"], f, g, found["plan"], gradients)

    def peak_megabytes(self) -> float | str:
        found: float | str = self._ask(do="peak")["peak_mb"]
        return found

    def close(self) -> None:
        with self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()
        self.folder.cleanup()


def dot(mass: Tensor, potential: Tensor) -> Tensor:
    """Sum of products per problem, where a mass of 0 makes 0 of anything."""
    return torch.where(mass > 0, mass * potential, 0.0).sum(1)
