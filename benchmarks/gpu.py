"""Resumable runner of all work that needs a CUDA device: tests, sanitizers, timings and tuning.

    python -m benchmarks.gpu --output results/h200 --seconds 520

A call runs for at most ``--seconds``. Repeat it until it prints "nothing left": finished steps are
recorded in the output folder and skipped, failed and interrupted steps run again. The folder
receives ``rows.csv`` (timings of our backends and the installed peers), ``tuning.csv`` (the time of
every tile tried), ``log.txt`` and ``done/`` (one empty file per finished step).
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import optical
from benchmarks.operator import cases, rows
from benchmarks.operator.jobs import ROOT, Task, cuda_milliseconds
from optical.backends.problem import GRADIENTS, PRECISIONS, example_problem
from optical.backends.registry import BACKENDS
from optical.testing.cases import random_vector_case
from optical.testing.tolerance import FAST, assert_close_to_truth, solve

# Name -> (batch x n x m x dim x iterations, temperature).
SHAPES = {
    "L1": ("32x64x64x256x50", 0.05),
    "L2": ("1x128x128x768x50", 0.05),
    "T1": ("4096x32x32x128x20", 0.05),
    "T2": ("1024x64x64x256x50", 0.05),
    "T3": ("512x128x128x768x50", 0.05),
    "T4": ("512x96x160x768x50:ragged", 0.05),
    "T5": ("256x256x256x1024x100", 0.05),
    "T6": ("64x512x512x768x100", 0.05),
    "T7": ("32x512x512x1024x200", 0.01),
    "T8": ("8x2048x2048x128x100", 0.05),
    "T9": ("1x16384x16384x64x10", 0.05),
}
# Shapes whose implicit system is solved on chip.
IMPLICIT_SHAPES = ("L1", "L2", "T1", "T2", "T3")
TUNED_SHAPES = ("T1", "T2", "T3")
# Shapes for which precision="fast" may store the plan in half precision.
FAST_SHAPES = ("T2", "T3", "T4", "T5", "T6", "T7", "T8", "T9")
GPU_BACKENDS = ("cuda", "triton")
FUZZER = "tests.stress.kernels"
SANITIZER = "compute-sanitizer"
# No step starts with less than this left.
MIN_SECONDS = 20.0


@dataclass(frozen=True)
class Step:
    """A command that has to succeed once, and the name under which this is recorded."""

    name: str
    command: tuple[str, ...]


def steps(output: Path) -> list[Step]:
    """All steps in order: the tests come first, because times count only if they pass."""
    python, table = sys.executable, str(output / "rows.csv")
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    this_module = (python, "-m", "benchmarks.gpu", "--output", str(output), "--one")
    result = [
        Step("build", (*this_module, "build")),
        Step("test-gpu", (*pytest, "-m", "gpu", "tests")),
        Step("test-backends", (*pytest, "tests/backends/test_registry.py", "-k", "cuda")),
    ]
    for kernels in ("cuda", "triton", "streamed"):
        command = (python, "-m", FUZZER, kernels, "--seconds", "20")
        result.append(Step(f"fuzz-{kernels}", command))
    if shutil.which(SANITIZER):
        for tool in ("memcheck", "racecheck", "synccheck"):
            command = (SANITIZER, "--tool", tool, "--error-exitcode", "1", *this_module, "build")
            result.append(Step(f"sanitize-{tool}", command))
    measure = (python, "-m", "benchmarks")
    for name, (shape, epsilon) in SHAPES.items():
        options = ("--device", "cuda", "--shapes", shape, "--epsilon", str(epsilon))
        options += ("--seconds", "10", "--output", table)
        for mode in ("forward", "both"):
            command = (*measure, "vectors", *options, "--modes", mode)
            result.append(Step(f"time-{name}-{mode}", command))
    own_steps = [f"implicit-{name}" for name in IMPLICIT_SHAPES]
    own_steps += [f"fast-{name}" for name in FAST_SHAPES]
    own_steps += [f"tune-{name}" for name in TUNED_SHAPES]
    return result + [Step(name, (*this_module, name)) for name in own_steps]


def pending(output: Path, prefixes: Sequence[str] = ()) -> list[Step]:
    """The unfinished steps; with ``prefixes``, only those whose name starts with one of them."""
    return [
        step
        for step in steps(output)
        if not _done_file(output, step).exists()
        and (not prefixes or step.name.startswith(tuple(prefixes)))
    ]


def run_steps(
    output: Path,
    todo: Sequence[Step],
    seconds: float,
    run: Callable[[Step, float, Path], int],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, int]:
    """Run steps until the time is used up, record the successful ones, and return exit codes."""
    end = clock() + seconds
    codes: dict[str, int] = {}
    (output / "done").mkdir(parents=True, exist_ok=True)
    for step in todo:
        remaining = end - clock()
        if remaining < MIN_SECONDS:
            break
        codes[step.name] = run(step, remaining, output / "log.txt")
        if codes[step.name] == 0:
            _done_file(output, step).touch()
    return codes


def _done_file(output: Path, step: Step) -> Path:
    return output / "done" / step.name


def _run_command(step: Step, seconds: float, log: Path) -> int:
    """Run a step with its output appended to the log; its exit code, or 124 after a timeout."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n== {step.name}: {' '.join(step.command)}\n")
        file.flush()
        try:
            process = subprocess.run(
                step.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            file.write(f"== {step.name}: interrupted after {seconds:.0f} s\n")
            return 124
    # Pytest exits with 5 if it selects no test, so nothing has failed.
    no_tests = process.returncode == 5 and "pytest" in step.command
    return 0 if no_tests else process.returncode


# ------------------------------------------------------------------- steps run by this module


def _solve(case: cases.Case, x: Any, y: Any, **options: Any) -> Any:
    return optical.sinkhorn_vectors(
        x, y, epsilon=case.epsilon, max_iter=case.max_iter, cost="cosine", **options
    )


def _device_case(name: str) -> cases.Case:
    shape, epsilon = SHAPES[name]
    return replace(cases.parse_shape(shape), epsilon=epsilon, device="cuda")


def _sorted_milliseconds(run: Callable[[], object], rounds: int = 30) -> list[float]:
    """Times of ``rounds`` calls in ascending order, after three warm-up calls."""
    for _ in range(3):
        run()
    return sorted(cuda_milliseconds(run) for _ in range(rounds))


def _timed_row(backend: str, mode: str, case: cases.Case, times: list[float]) -> rows.Row:
    p50, p20, p80 = (float(f"{times[len(times) * tenths // 10]:.4g}") for tenths in (5, 2, 8))
    row = rows.row_of("vectors", backend, Task("vectors", mode, case))
    return replace(row, ms_p50=p50, ms_p20=p20, ms_p80=p80)


def implicit(name: str, output: Path) -> None:
    """Time the transport cost with its implicit gradient, after checking two of the problems."""
    case = _device_case(name)
    x, y = (z.float().cuda().requires_grad_() for z in case.inputs[:2])

    def both(x: Any, y: Any, backend: str) -> tuple[torch.Tensor, ...]:
        result = _solve(case, x, y, gradient="implicit", backend=backend)
        return torch.autograd.grad(result.value_linear.sum(), (x, y))

    first_two = [z[:2].detach() for z in (x, y)]
    exact, same_dtype = (
        both(*(z.to("cpu", dtype).requires_grad_() for z in first_two), "reference")
        for dtype in (torch.float64, torch.float32)
    )
    new_rows = []
    for backend in GPU_BACKENDS:
        gradients = both(*(z.clone().requires_grad_() for z in first_two), backend)
        for out, expected, rounded in zip(gradients, exact, same_dtype, strict=True):
            scale = expected.abs().max().item()
            rule = {"dtype": torch.float32, "scale": scale, "name": f"implicit {backend} {name}"}
            assert_close_to_truth(out.cpu(), expected, rounded, **rule)
        times = _sorted_milliseconds(functools.partial(both, x, y, backend))
        new_rows.append(_timed_row(backend, "implicit", case, times))
    print(rows.table(new_rows))
    rows.write(new_rows, output / "rows.csv")


def fast(name: str, output: Path) -> None:
    """Time the forward pass in both precisions, after comparing their values and potentials."""
    case = _device_case(name)
    x, y = (z.bfloat16().cuda() for z in case.inputs[:2])
    new_rows = []
    for backend in GPU_BACKENDS:
        if (
            BACKENDS[backend].supports(example_problem(x, y, "cosine", precision="fast"))
            is not None
        ):
            continue
        runs = {
            precision: functools.partial(_solve, case, x, y, backend=backend, precision=precision)
            for precision in PRECISIONS
        }
        exact_result, fast_result = runs["exact"](), runs["fast"]()
        for field in ("value", "f", "g"):
            # In units of epsilon; 1e-3 is far above the float32 rounding of both results.
            limit = (FAST[field] + 1e-3) * case.epsilon
            error = (getattr(fast_result, field) - getattr(exact_result, field)).abs().max().item()
            assert error <= limit, (
                f"fast {backend} {name}: {field} is off by {error}; expected at most {limit}"
            )
        for precision, run in runs.items():
            times = _sorted_milliseconds(run, rounds=10)
            new_rows.append(_timed_row(backend, f"forward-{precision}", case, times))
    print(rows.table(new_rows))
    rows.write(new_rows, output / "rows.csv")


def build(_name: str, _output: Path) -> None:
    """Compile both backends and run a small problem of every size class with every gradient."""
    for backend in GPU_BACKENDS:
        for n, m in ((5, 7), (32, 32), (60, 64), (100, 128), (200, 90), (400, 300)):
            for gradient in GRADIENTS:
                case = random_vector_case(
                    f"{n}x{m}", "cosine", batch=2, n=n, m=m, dim=40, max_iter=3
                )
                case = case.to(torch.float32, "cuda")
                reason = BACKENDS[backend].supports(case.problem(gradient))
                if reason is None:
                    solve(backend, case, gradient)
                print(f"{backend} {n} x {m} {gradient}: {reason or 'done'}", flush=True)
    torch.cuda.synchronize()


def tune(name: str, output: Path) -> None:
    """Time the on-chip forward pass with alternatives to the tuned warps, depth and stages."""
    from optical.kernels import tuning

    case = _device_case(name)
    size = next(size for size in tuning.TILES if size >= max(case.n, case.m))
    x, y = (z.bfloat16().cuda() for z in case.inputs[:2])
    tuned = tuning.TILES[size]
    path = output / "tuning.csv"
    new_file = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new_file:
            writer.writerow(["device", "shape", *tuned._fields, "tuned", "ms_p50"])
        warp_grids = ((1, 1), (2, 1), (2, 2), (4, 2))
        for (warps_n, warps_m), depth, stages in itertools.product(warp_grids, (32, 64), (2, 3)):
            tile = tuned._replace(warps_n=warps_n, warps_m=warps_m, depth=depth, stages=stages)
            tuning.TILES[size] = tile
            times = _sorted_milliseconds(lambda: _solve(case, x, y, backend="triton"))
            row = [torch.cuda.get_device_name(), SHAPES[name][0], *tile, tile == tuned]
            writer.writerow([*row, f"{times[len(times) // 2]:.4g}"])
            file.flush()


OWN_STEPS = {"build": build, "fast": fast, "implicit": implicit, "tune": tune}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder of the rows, the log and the finished steps",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=520.0,
        help="time limit of this call (default: %(default)g)",
    )
    parser.add_argument(
        "--steps", default="", help="comma-separated prefixes of step names; only these steps run"
    )
    parser.add_argument("--list", action="store_true", help="print the steps left and run nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    output = args.output.resolve()
    prefixes = [prefix for prefix in args.steps.split(",") if prefix]
    if args.list:
        print("\n".join(step.name for step in pending(output, prefixes)))
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device: benchmarks.gpu requires one")
        return 2
    if args.one:
        kind, _, shape_name = args.one.partition("-")
        OWN_STEPS[kind](shape_name, output)
        return 0
    output.mkdir(parents=True, exist_ok=True)
    with (output / "log.txt").open("a", encoding="utf-8") as log:
        versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
        log.write(f"\n{torch.cuda.get_device_name()}, {versions}, CUDA {torch.version.cuda}\n")
    codes = run_steps(output, pending(output, prefixes), args.seconds, _run_command)
    for name, code in codes.items():
        print(f"{name:<24} {'done' if code == 0 else f'failed with {code}, see log.txt'}")
    remaining = pending(output, prefixes)
    print(f"{len(remaining)} steps left" if remaining else "nothing left")
    return 1 if any(codes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
