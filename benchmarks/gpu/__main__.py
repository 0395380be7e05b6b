"""Everything that needs a CUDA device, in one command of at most nine minutes.

    python -m benchmarks.gpu --output results/h200

It needs a checkout, PyTorch and Triton, and for the tests pytest with pytest-xdist; nothing has to
be installed. The most valuable evidence comes first, every step has a time limit of its own, and
every row is flushed when it is measured. ``--list`` prints the steps in their order. The output
folder receives at most eight files: ``log.txt``, ``rows.csv``, ``probe.txt``, ``tests.txt``,
``sanitizers.txt``, ``profile.txt``, ``tuning.csv`` and ``versions.txt``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu import builds
from benchmarks.gpu.runner import ROOT, TIMED_OUT, Step, Window

SECONDS = 535.0
PREFIX_OF_REHEARSAL = "rehearsal-"
# Emulated kernels are slow: a rehearsal has this multiple of all time limits.
PATIENCE = 6
PEER_SHAPES = ("T3", "T1", "T2", "T5", "T6")
PROFILED_SHAPES = ("T3", "T1", "T6")
GRADIENT_SHAPES = ("T3", "T1", "T2", "L2")
TUNED_SHAPES = ("T3", "T5", "T2", "T1")
# Where nvcc, ncu and compute-sanitizer are if they are not on the path.
CUDA_TOOLS = "/usr/local/cuda/bin"
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
METRICS = (
    "gpu__time_duration.sum",
    "smsp__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "dram__bytes_read.sum",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "smsp__average_warps_issue_stalled_no_instruction_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)
PYTEST_OPTIONS = (
    *("-v", "-rf", "--tb=short", "--dist", "worksteal"),
    *("-p", "no:cacheprovider", "-p", "benchmarks.gpu.failures"),
)
REGISTRY_TESTS = "tests/backends/test_registry.py"
# Files with tests marked "gpu".
GPU_TESTS = ("tests/backends/test_cuda_gpu.py", "tests/retrieval/test_exact_search.py")


def steps(work: Path, rows: Path, rehearse: bool) -> list[Step]:
    """All steps in order."""
    result = [
        *_first_steps(work, rows, rehearse),
        *_timings(),
        *_tests(work, rehearse),
        *_comparisons(work, rows, rehearse),
    ]
    if rehearse:
        return [replace(step, seconds=PATIENCE * step.seconds) for step in result]
    return result


def _only(rehearse: bool) -> str:
    """The cases of the probe; a rehearsal runs those of one dtype on one multiprocessor."""
    return "cosine-f16" if rehearse else ""


def _measure(work: Path, rows: Path, rehearse: bool) -> tuple[str, ...]:
    command = (sys.executable, "-m", "benchmarks.gpu.measure", "--rows", str(rows))
    return (*command, "--work", str(work), *(("--rehearse",) if rehearse else ()))


def _probe(work: Path, rehearse: bool, only: str, runs: int) -> tuple[str, ...]:
    library = builds.emulated_library(work) if rehearse else ROOT / "optical" / "_cuda.so"
    expected = builds.expected_outputs(work, _only(rehearse))
    command = (str(builds.probe_binary(work)), str(library), "cuda", "check", str(expected))
    return (*command, "--runs", str(runs), "--only", only)


def _driver(work: Path, rehearse: bool) -> dict[str, str]:
    """Where the probe finds the CUDA driver.

    No other step may find the stand-in of a rehearsal: a CUDA build of PyTorch would load it, and
    Triton would launch through it instead of the driver that does nothing.
    """
    if not rehearse:
        return {}
    return {"LD_LIBRARY_PATH": _path_with(builds.stand_ins(work), "LD_LIBRARY_PATH")}


def _first_steps(work: Path, rows: Path, rehearse: bool) -> list[Step]:
    python = (sys.executable, "-m", "benchmarks.gpu.builds", "--work", str(work))
    build = (*python, "--only", _only(rehearse), *(("--rehearse",) if rehearse else ()))
    result = [
        Step("versions", 20, (*python, "--describe"), output="versions.txt"),
        Step("build", 150, build, output="versions.txt"),
    ]
    # Beside the build: the kernels that Triton compiles for the timings, into its cache. A
    # rehearsal compiles those of the smallest shape, for a driver that does nothing.
    variables = {"TRITON_INTERPRET": "0"} if rehearse else {}
    options: dict[str, Any] = {"output": "versions.txt", "background": True}
    for name in builds.SHAPES if not rehearse else ("T1",):
        request = json.dumps({"step": "warm", "shape": name, "seconds": 90})
        command = (*_measure(work, rows, rehearse), "--once", request)
        command += ("--idle-driver",) if rehearse else ()
        step = Step(f"warm-{name}", 75, command, environment=variables, **options)
        result.insert(len(result) - 1, step)
    probe = _probe(work, rehearse, _only(rehearse), runs=3)
    driver = _driver(work, rehearse)
    return [*result, Step("probe", 45, probe, output="probe.txt", environment=driver)]


def _timings() -> list[Step]:
    return [
        Step(
            f"times-{name}",
            60 if name == "T3" else 30,
            request=_request("times", name),
            alone=True,
        )
        for name in builds.SHAPES
    ]


def _tests(work: Path, rehearse: bool) -> list[Step]:
    """The tests, and beside them the probe under the sanitizers."""
    result = []
    for tool in SANITIZERS:
        # The race checker is the slowest, and the costs of one kind reach every kernel.
        only = _only(rehearse) or ("cosine" if tool == "racecheck" else "")
        options = ("--tool", tool, "--error-exitcode", "9", "--print-limit", "30")
        command = ("compute-sanitizer", *options, *_probe(work, rehearse, only, runs=1))
        step = Step(tool, 170, command, output="sanitizers.txt", background=True)
        result.append(replace(step, environment=_driver(work, rehearse)))
    pytest: tuple[str, ...] = (
        sys.executable,
        "-m",
        "pytest",
        *PYTEST_OPTIONS,
        "-n",
        "2" if rehearse else "8",
    )
    cuda, triton = "cuda-cuda", "triton-cuda and not float64 and not unroll"
    rest = "triton-cuda and not float64 and unroll"
    if rehearse:
        pytest += ("-p", "benchmarks.gpu.rehearsal")
        cuda, triton = "cuda-cpu and 7x5", "triton-cpu and 7x5 and float32 and envelope"
        rest = "triton-cpu and 7x5 and float32 and unroll"
    variables = {"OMP_NUM_THREADS": "1"}
    settings: dict[str, Any] = {"output": "tests.txt", "environment": variables}
    on_device = (*pytest, "--continue-on-collection-errors", "-m", "gpu", *GPU_TESTS)
    return [
        *result,
        Step("test-cuda", 100, (*pytest, REGISTRY_TESTS, "-k", cuda), **settings),
        Step("test-gpu", 50, on_device, **settings),
        Step("test-triton", 70, (*pytest, REGISTRY_TESTS, "-k", triton), **settings),
        Step("test-triton-unroll", 35, (*pytest, REGISTRY_TESTS, "-k", rest), **settings),
    ]


def _comparisons(work: Path, rows: Path, rehearse: bool) -> list[Step]:
    """Peers, other ways into the kernels, a profile, further gradients, and tuning."""
    measure = _measure(work, rows, rehearse)
    result = [
        Step(f"peers-{name}", 25, request=_request("peers", name), alone=True)
        for name in PEER_SHAPES
    ]
    for name in ("nvrtc", "first-use"):
        request = json.dumps({**_request(name, "T3"), "seconds": 75})
        # An empty cache, or kernels of an earlier run would be found.
        variables = {"XDG_CACHE_HOME": str(work / f"cache-{name}")}
        command = (*measure, "--once", request)
        result.append(Step(name, 75, command, environment=variables, alone=True))
    result.append(Step("host", 40, request=_request("host", "T3"), alone=True))
    for name in PROFILED_SHAPES:
        request = json.dumps({**_request("once", name), "seconds": 35})
        options = ("--csv", "--clock-control", "none", "-k", "regex:optical_forward", "-c", "1")
        command = ("ncu", *options, "--metrics", ",".join(METRICS), *measure, "--once", request)
        result.append(Step(f"profile-{name}", 35, command, output="profile.txt", alone=True))
    for step, names in (("gradients", GRADIENT_SHAPES), ("tune", TUNED_SHAPES)):
        result += [
            Step(f"{step}-{name}", 30, request=_request(step, name), alone=True) for name in names
        ]
    return result


def _request(step: str, shape: str) -> dict[str, Any]:
    return {"step": step, "shape": shape}


def _has_device() -> bool:
    """Whether the CUDA driver finds a device; PyTorch would take seconds to ask."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    answers = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return answers and count.value > 0


def _path_with(folder: Path, variable: str) -> str:
    return os.pathsep.join(filter(None, (str(folder), os.environ.get(variable))))


def _environment(work: Path, rehearse: bool) -> dict[str, str]:
    variables = {
        # Last, since an environment may have tools of its own.
        "PATH": os.pathsep.join(filter(None, (os.environ.get("PATH"), CUDA_TOOLS))),
        "PYTHONPATH": _path_with(ROOT, "PYTHONPATH"),
        "PYTHONUNBUFFERED": "1",
        "XDG_CACHE_HOME": str(work / "cache"),
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR") or str(work / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
    }
    if rehearse:
        from benchmarks.gpu import rehearsal

        variables |= rehearsal.environment(work, variables["PATH"])
    return variables


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = ROOT / "benchmarks" / "results" / "gpu"
    parser.add_argument("--output", type=Path, default=default, help="folder of the results")
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build" / "gpu",
        help="folder of builds and caches; it may be made elsewhere and carried along",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"time limit (default: {SECONDS:g}, in a rehearsal {PATIENCE * SECONDS:g})",
    )
    parser.add_argument("--steps", default="", help="comma-separated prefixes; only these run")
    parser.add_argument("--list", action="store_true", help="print the steps and run nothing")
    parser.add_argument(
        "--rehearse", action="store_true", help="run everything on a CPU with stand-ins"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    output, work = args.output.resolve(), args.work.resolve()
    prefix = PREFIX_OF_REHEARSAL if args.rehearse else ""
    prefixes = tuple(name for name in args.steps.split(",") if name)
    chosen = [
        step
        for step in steps(work, output / f"{prefix}rows.csv", args.rehearse)
        if not prefixes or step.name.startswith(prefixes)
    ]
    if args.list:
        for step in chosen:
            beside = ", beside the next steps" if step.background else ""
            print(f"{step.name:<20} at most {step.seconds:3.0f} s{beside}")
        return 0
    if not args.rehearse and not _has_device():
        print("no CUDA device: python -m benchmarks.gpu needs one; --rehearse does without")
        return 2
    for folder in (output, work):
        folder.mkdir(parents=True, exist_ok=True)
    # A killed window must not leave its processes behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TIMED_OUT))
    measure = _measure(work, output / f"{prefix}rows.csv", args.rehearse)
    variables = _environment(work, args.rehearse)
    seconds = args.seconds or SECONDS * (PATIENCE if args.rehearse else 1)
    window = Window(output, work, seconds, measure, variables, prefix)
    results = window.run(chosen)
    bad = [name for name, code in results.items() if code]
    print(f"{len(results) - len(bad)} of {len(results)} steps done; see {output}")
    print("not done: " + ", ".join(bad) if bad else "all steps done")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
