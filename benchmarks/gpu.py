"""Everything that needs a CUDA machine, step by step: tests, timings, sweeps of the tuned tables.

    python -m benchmarks.gpu --output results/h200 --seconds 520

A call works for at most ``--seconds`` and may be repeated until it says that nothing is left: a
finished step leaves a mark in the folder and is not run again, a failed or interrupted one is. In
the folder are ``rows.csv`` (timings beside the peers that are installed), ``tuning.csv`` (the time
of each tile that was tried), ``log.txt`` and the marks.
"""

from __future__ import annotations

import argparse
import csv
import functools
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
from benchmarks import cases, rows
from benchmarks.jobs import ROOT, Task, _device_turn
from optical.arguments import GRADIENTS, PRECISIONS, example
from optical.backends import BACKENDS
from optical.testing import FAST, assert_close_to_truth, random_clouds, solve

# Batch x n x m x dim x iterations, with the temperature where it is not that of the others.
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
# Those whose implicit system is solved on chip.
IMPLICIT = ("L1", "L2", "T1", "T2", "T3")
SWEPT = ("T1", "T2", "T3")
# Those of which half precision may keep the plan.
KEPT = ("T2", "T3", "T4", "T5", "T6", "T7", "T8", "T9")
COMPARED = ("cuda", "triton")
SANITIZER = "compute-sanitizer"
# With less than this left, no further step is begun.
LEAST_SECONDS = 20.0


@dataclass(frozen=True)
class Step:
    """Something to run once: a command, and what its mark in the folder is called."""

    name: str
    command: tuple[str, ...]


def steps(output: Path) -> list[Step]:
    """All steps in their order: what must hold before a time counts comes first."""
    python, table = sys.executable, str(output / "rows.csv")
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    own = (python, "-m", "benchmarks.gpu", "--output", str(output), "--one")
    made = [
        Step("build", (*own, "build")),
        Step("test-gpu", (*pytest, "-m", "gpu", "tests")),
        Step("test-backends", (*pytest, "tests/test_backends.py", "-k", "cuda")),
    ]
    for kernels in ("cuda", "triton", "streamed"):
        command = (python, "-m", "tests.stress.kernels", kernels, "--seconds", "20")
        made.append(Step(f"fuzz-{kernels}", command))
    if shutil.which(SANITIZER):
        for tool in ("memcheck", "racecheck", "synccheck"):
            watched = (SANITIZER, "--tool", tool, "--error-exitcode", "1", *own, "build")
            made.append(Step(f"sanitize-{tool}", watched))
    measure = (python, "-m", "benchmarks")
    for name, (shape, epsilon) in SHAPES.items():
        options = ("--device", "cuda", "--shapes", shape, "--epsilon", str(epsilon))
        options += ("--seconds", "10", "--output", table)
        for mode in ("forward", "both"):
            command = (*measure, "vectors", *options, "--modes", mode)
            made.append(Step(f"time-{name}-{mode}", command))
    made += [Step(f"implicit-{name}", (*own, f"implicit-{name}")) for name in IMPLICIT]
    made += [Step(f"fast-{name}", (*own, f"fast-{name}")) for name in KEPT]
    made += [Step(f"tune-{name}", (*own, f"tune-{name}")) for name in SWEPT]
    return made


def pending(output: Path, chosen: Sequence[str] = ()) -> list[Step]:
    """The steps that have no mark yet, of those whose name begins as one of ``chosen``."""
    asked = [step for step in steps(output) if not chosen or step.name.startswith(tuple(chosen))]
    return [step for step in asked if not _mark(output, step).exists()]


def work(
    output: Path,
    todo: Sequence[Step],
    seconds: float,
    run: Callable[[Step, float, Path], int],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, int]:
    """Run steps until the time is used up, and mark those that succeed; their exit codes."""
    end = clock() + seconds
    codes: dict[str, int] = {}
    (output / "done").mkdir(parents=True, exist_ok=True)
    for step in todo:
        left = end - clock()
        if left < LEAST_SECONDS:
            break
        codes[step.name] = run(step, left, output / "log.txt")
        if codes[step.name] == 0:
            _mark(output, step).touch()
    return codes


def _mark(output: Path, step: Step) -> Path:
    return output / "done" / step.name


def _run(step: Step, seconds: float, log: Path) -> int:
    """The exit code of a step, whose output goes to the log; 124 where the time was not enough."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n== {step.name}: {' '.join(step.command)}\n")
        file.flush()
        try:
            found = subprocess.run(
                step.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            file.write(f"== {step.name}: interrupted after {seconds:.0f} s\n")
            return 124
    # Pytest's 5: no test is marked for this device, so none can fail.
    return 0 if found.returncode == 5 and "pytest" in step.command else found.returncode


# ------------------------------------------------------------- steps that this module runs itself


def _solved(case: cases.Case, x: Any, y: Any, **options: Any) -> Any:
    return optical.sinkhorn_vectors(
        x, y, epsilon=case.epsilon, max_iter=case.max_iter, cost="cosine", **options
    )


def _milliseconds(run: Callable[[], object], rounds: int = 30) -> list[float]:
    for _ in range(3):
        run()
    return sorted(_device_turn(run) for _ in range(rounds))


def implicit(name: str, output: Path) -> None:
    """Time the transport cost with its implicit gradient, after comparing two of its problems."""
    shape, epsilon = SHAPES[name]
    case = replace(cases.parse_shape(shape), epsilon=epsilon, device="cuda")
    x, y = (z.float().cuda().requires_grad_() for z in case.inputs[:2])

    def both(x: Any, y: Any, backend: str) -> tuple[torch.Tensor, ...]:
        result = _solved(case, x, y, gradient="implicit", backend=backend)
        return torch.autograd.grad(result.value_linear.sum(), (x, y))

    first = [z[:2].detach() for z in (x, y)]
    exact, same = (
        both(*(z.to("cpu", dtype).requires_grad_() for z in first), "reference")
        for dtype in (torch.float64, torch.float32)
    )
    made = []
    for backend in COMPARED:
        found = both(*(z.clone().requires_grad_() for z in first), backend)
        for out, expected, rounded in zip(found, exact, same, strict=True):
            scale = expected.abs().max().item()
            rule = {"dtype": torch.float32, "scale": scale, "name": f"implicit {backend} {name}"}
            assert_close_to_truth(out.cpu(), expected, rounded, **rule)
        times = _milliseconds(functools.partial(both, x, y, backend))
        row = rows.row_of("vectors", backend, Task("vectors", "implicit", case))
        quantiles = (times[len(times) * share // 10] for share in (5, 2, 8))
        p50, p20, p80 = (float(f"{t:.4g}") for t in quantiles)
        made.append(replace(row, ms_p50=p50, ms_p20=p20, ms_p80=p80))
    print(rows.table(made))
    rows.write(made, output / "rows.csv")


def fast(name: str, output: Path) -> None:
    """Time the forward pass of both precisions, after comparing their potentials and values."""
    shape, epsilon = SHAPES[name]
    case = replace(cases.parse_shape(shape), epsilon=epsilon, device="cuda")
    x, y = (z.bfloat16().cuda() for z in case.inputs[:2])
    made = []
    for backend in COMPARED:
        if BACKENDS[backend].supports(example(x, y, "cosine", precision="fast")) is not None:
            continue
        runs = {
            precision: functools.partial(_solved, case, x, y, backend=backend, precision=precision)
            for precision in PRECISIONS
        }
        exact, found = runs["exact"](), runs["fast"]()
        for field, unit in (("value", epsilon), ("f", epsilon), ("g", epsilon)):
            # Both are float32; a thousandth of a unit is far more than that rounds.
            more = (FAST[field] + 1e-3) * unit
            worst = (getattr(found, field) - getattr(exact, field)).abs().max().item()
            assert worst <= more, f"fast {backend} {name}: {field} is off by {worst}, over {more}"
        for precision, run in runs.items():
            times = _milliseconds(run, rounds=10)
            p50, p20, p80 = (float(f"{times[len(times) * s // 10]:.4g}") for s in (5, 2, 8))
            row = rows.row_of("vectors", backend, Task("vectors", f"forward-{precision}", case))
            made.append(replace(row, ms_p50=p50, ms_p20=p20, ms_p80=p80))
    print(rows.table(made))
    rows.write(made, output / "rows.csv")


def build(_name: str, _output: Path) -> None:
    """Compile both backends, and run a small problem of every size class in every mode."""
    for backend in COMPARED:
        for n, m in ((5, 7), (32, 32), (60, 64), (100, 128), (200, 90), (400, 300)):
            for gradient in GRADIENTS:
                problem = random_clouds(f"{n}x{m}", "cosine", batch=2, n=n, m=m, dim=40, max_iter=3)
                problem = problem.to(torch.float32, "cuda")
                reason = BACKENDS[backend].supports(problem.arguments(gradient))
                if reason is None:
                    solve(backend, problem, gradient)
                print(f"{backend} {n} x {m} {gradient}: {reason or 'done'}", flush=True)
    torch.cuda.synchronize()


def tune(name: str, output: Path) -> None:
    """Time the forward pass on chip with other warps, depths and stages than the tuned ones."""
    from optical.kernels import tuning

    shape, epsilon = SHAPES[name]
    case = replace(cases.parse_shape(shape), epsilon=epsilon, device="cuda")
    side = next(most for most in tuning.TILES if most >= max(case.n, case.m))
    x, y = (z.bfloat16().cuda() for z in case.inputs[:2])
    tuned = tuning.TILES[side]
    path = output / "tuning.csv"
    fresh = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(["device", "shape", *tuned._fields, "tuned", "ms_p50"])
        for grid in ((1, 1), (2, 1), (2, 2), (4, 2)):
            for depth in (32, 64):
                for stages in (2, 3):
                    tile = tuned._replace(
                        warps_n=grid[0], warps_m=grid[1], depth=depth, stages=stages
                    )
                    tuning.TILES[side] = tile
                    times = _milliseconds(lambda: _solved(case, x, y, backend="triton"))
                    line = [torch.cuda.get_device_name(), shape, *tile, tile == tuned]
                    writer.writerow([*line, f"{times[len(times) // 2]:.4g}"])
                    file.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder of rows and log")
    parser.add_argument("--seconds", type=float, default=520.0, help="for this call, at most")
    parser.add_argument("--steps", default="", help="only those that begin so, comma-separated")
    parser.add_argument("--list", action="store_true", help="say what is left, and run nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    output = given.output.resolve()
    chosen = [name for name in given.steps.split(",") if name]
    if given.list:
        print("\n".join(step.name for step in pending(output, chosen)))
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device: benchmarks.gpu has nothing to measure on this machine")
        return 2
    if given.one:
        what, _, name = given.one.partition("-")
        {"build": build, "fast": fast, "implicit": implicit, "tune": tune}[what](name, output)
        return 0
    output.mkdir(parents=True, exist_ok=True)
    with (output / "log.txt").open("a", encoding="utf-8") as log:
        versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
        log.write(f"\n{torch.cuda.get_device_name()}, {versions}, CUDA {torch.version.cuda}\n")
    codes = work(output, pending(output, chosen), given.seconds, _run)
    for name, code in codes.items():
        print(f"{name:<24} {'done' if code == 0 else f'failed with {code}, see log.txt'}")
    left = pending(output, chosen)
    print(f"{len(left)} steps left" if left else "nothing left")
    return 1 if any(codes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
