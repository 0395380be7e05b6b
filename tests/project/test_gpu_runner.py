"""The command ``python -m benchmarks.gpu``: its steps, its runner, and its rehearsal on a CPU."""

import csv
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import builds, rehearsal
from benchmarks.gpu.measure import __main__ as measure
from benchmarks.gpu.measure import gate, ours, paths, peers, shapes
from benchmarks.gpu.measure.rows import Row, RowFile
from benchmarks.gpu.runner import MISSING, ROOT, SKIPPED, TIMED_OUT, WRONG_ROWS, Step, Window
from optical.backends import library, reference, registry
from optical.backends.dense import PaddedProblem

# Packages that the machine with the GPU may lack, or that take seconds to import.
ABSENT = ("ot", "lancedb", "mkdocs", "sentence_transformers", "sklearn", "transformers", "datasets")


def steps(rehearse=False):
    return gpu.steps(Path("work"), Path("rows.csv"), rehearse)


# ---------------------------------------------------------------------------------- the steps


def test_steps_have_unique_names_and_the_headline_is_the_first_timing():
    names = [step.name for step in steps()]
    assert len(set(names)) == len(names)
    asked = [step.request for step in steps() if step.request is not None]
    assert asked[0] == {"step": "times", "shape": "T3"}
    order = [names.index(name) for name in ("probe", "times-T3", "test-cuda", "peers-T3", "nvrtc")]
    assert order == sorted(order)


def test_every_request_is_known_to_the_measuring_process():
    for step in steps():
        if step.request is not None:
            assert step.request["step"] in measure.STEPS
            assert step.request["shape"] in shapes.SHAPES


def test_the_names_of_the_shapes_are_repeated_correctly():
    assert tuple(shapes.SHAPES) == tuple(shapes.REHEARSED) == builds.SHAPES


def test_at_most_eight_files_are_written():
    files = {step.output for step in steps()} | {"log.txt", "rows.csv", "tuning.csv"}
    assert len(files) <= 8 and all(name in gpu.__doc__ for name in files)


def test_a_rehearsal_has_every_step_but_most_compilations():
    rehearsed = {step.name for step in steps(rehearse=True)}
    missing = {step.name for step in steps()} - rehearsed
    assert missing == {f"warm-{name}" for name in builds.SHAPES if name != "T1"}


def test_every_file_with_tests_for_a_gpu_is_run():
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in path.read_text() and path.name != Path(__file__).name
    }
    assert marked == set(gpu.GPU_TESTS)


def test_every_test_file_of_a_command_exists():
    arguments = {argument for step in steps() for argument in step.command}
    named = [argument for argument in arguments if argument.startswith("tests/")]
    assert named and [name for name in named if not (ROOT / name).exists()] == []


def test_only_the_probe_finds_the_driver_of_a_rehearsal(monkeypatch):
    """A CUDA build of PyTorch would load it, and Triton would crash in it."""
    monkeypatch.setenv("LD_LIBRARY_PATH", "/own")
    work = Path("work")
    assert "LD_LIBRARY_PATH" not in gpu._environment(work, rehearse=True)
    probe, driver = str(builds.probe_binary(work)), f"{builds.stand_ins(work)}:/own"
    for step in steps(rehearse=True):
        expected = driver if probe in step.command else None
        assert step.environment.get("LD_LIBRARY_PATH") == expected, step.name
    assert all("LD_LIBRARY_PATH" not in step.environment for step in steps())


def test_the_tools_of_cuda_are_found_beside_the_path(monkeypatch):
    monkeypatch.setenv("PATH", "/own")
    assert gpu._environment(Path("work"), rehearse=False)["PATH"] == f"/own:{gpu.CUDA_TOOLS}"
    path = gpu._environment(Path("work"), rehearse=True)["PATH"].split(":")
    assert path == [str(builds.stand_ins(Path("work"))), "/own", gpu.CUDA_TOOLS]


def test_a_copy_without_history_is_described(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(builds, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    builds.describe()
    assert capsys.readouterr().out.endswith("the commit is unknown: this is no clone\n")


def test_a_machine_without_a_gpu_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "_has_device", lambda: False)
    assert gpu.main(["--output", str(tmp_path / "results"), "--work", str(tmp_path / "w")]) == 2
    assert "no CUDA device" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_steps_are_listed_without_a_gpu(capsys):
    assert gpu.main(["--list", "--steps", "tune"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "tune-T3",
        "tune-T5",
        "tune-T2",
        "tune-T1",
    ]


def imported_by(statement):
    code = f"import sys; {statement}; print(*sorted(sys.modules))"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(process.stdout.split())


def test_the_command_starts_without_pytorch():
    assert "torch" not in imported_by("import benchmarks.gpu.__main__")


def test_the_measuring_process_loads_no_heavy_package():
    modules = imported_by("import benchmarks.gpu.measure.__main__")
    assert "torch" in modules and modules.isdisjoint(ABSENT)


# --------------------------------------------------------------------------------- the runner

# Answers requests like the measuring process: it ends, hangs or returns a code when asked to.
WORKER = """
import json, os, sys, time
for line in sys.stdin:
    request = json.loads(line)
    print("asked", request["do"], file=sys.stderr, flush=True)
    if request["do"] == "end": os._exit(7)
    if request["do"] == "hang": time.sleep(60)
    print(request["do"], flush=True)
"""


@pytest.fixture
def window(tmp_path):
    def make(seconds=60.0):
        return Window(tmp_path, tmp_path, seconds, [sys.executable, "-c", WORKER], {})

    return make


def python(name, code, seconds=30.0, **options):
    return Step(name, seconds, (sys.executable, "-c", code), **options)


def test_a_step_that_fails_or_hangs_costs_only_itself(window, tmp_path):
    sleeper = "import subprocess; print('child', flush=True); subprocess.run(['sleep', '987'])"
    results = window().run(
        [
            Step("missing", 9.0, ("no-such-tool", "--version")),
            Step("missing-too", 9.0, ("no-such-tool",), background=True),
            python("fails", "print('so'); raise SystemExit(5)"),
            python("hangs", sleeper, seconds=1.0),
            python("works", "print('hello')"),
        ]
    )
    expected = {"missing": MISSING, "missing-too": MISSING}
    assert results == expected | {"fails": 5, "hangs": TIMED_OUT, "works": 0}
    log = (tmp_path / "log.txt").read_text()
    assert "fails: failed with 5" in log and "hangs: stopped at its limit" in log
    assert "\nhello\n" in log and "\nchild\n" in log
    assert "sleep 987" not in subprocess.run(["ps", "ax"], capture_output=True, text=True).stdout


@pytest.mark.slow
def test_failures_of_an_interrupted_test_run_are_in_the_log(window, tmp_path):
    tests = tmp_path / "test_example.py"
    tests.write_text(
        "import time\ndef test_fails():\n    assert 1 == 2, 'the reason'\n"
        "def test_hangs():\n    time.sleep(60)\n"
    )
    command = (sys.executable, "-m", "pytest", *gpu.PYTEST_OPTIONS, "-n", "2", str(tests))
    results = window().run([Step("tests", 20.0, command, output="tests.txt")])
    assert results == {"tests": TIMED_OUT}
    assert "the reason" in (tmp_path / "tests.txt").read_text()


def test_no_test_selected_is_no_failure(window):
    command = (sys.executable, "-c", "raise SystemExit(5)", "pytest")
    assert window().run([Step("tests", 30.0, command)]) == {"tests": 0}


def test_a_step_in_the_background_ends_before_a_step_that_runs_alone(window, tmp_path):
    mark = tmp_path / "mark"
    slow = f"import time, pathlib; time.sleep(1); pathlib.Path({str(mark)!r}).touch(); print('ok')"
    seen = f"import os; raise SystemExit(os.path.exists({str(mark)!r}) + 10)"
    steps = [
        python("slow", slow, background=True, output="slow.txt"),
        python("beside", seen),
        python("alone", seen, alone=True),
    ]
    assert window().run(steps) == {"beside": 10, "slow": 0, "alone": 11}
    assert "ok" in (tmp_path / "slow.txt").read_text()


def test_a_step_in_the_background_has_a_limit(window):
    steps = [python("hangs", "import time; time.sleep(60)", 0.5, background=True)]
    assert window().run([*steps, python("next", "")]) == {"next": 0, "hangs": TIMED_OUT}


def test_no_step_starts_with_little_time_left(window, tmp_path):
    begin = time.monotonic()
    results = window(8.0).run([python("long", "import time; time.sleep(60)"), python("next", "")])
    assert results == {"long": SKIPPED, "next": SKIPPED}
    results = window(7.0).run([python("long", "import time; time.sleep(60)", least=1.0)])
    assert results == {"long": TIMED_OUT} and time.monotonic() - begin < 7.0


def test_the_measuring_process_is_replaced_after_a_crash_and_a_hang(window, tmp_path):
    asked = ("0", "end", "0", "hang", "3", "1", "0")
    steps = [
        Step(f"{number}-{do}", 1.5 if do == "hang" else 20.0, request={"do": do})
        for number, do in enumerate(asked)
    ]
    results = window().run(steps)
    assert list(results.values()) == [0, 1, 0, TIMED_OUT, WRONG_ROWS, 1, 0]
    assert (tmp_path / "log.txt").read_text().count("asked") == len(asked)


# --------------------------------------------------------------------------- the measurements


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """The device replaced, and the reference in place of both backends; the file of the rows."""
    rehearsal.replace_device(monkeypatch.setattr)
    # A module that takes vectors itself, like those of the GPU backends.
    solver = SimpleNamespace(
        **vars(reference)
        | {"forward": lambda problem: reference.forward(PaddedProblem(problem).with_cost)}
    )
    backend = replace(registry.BACKENDS["reference"], load=lambda: solver)
    monkeypatch.setitem(registry.BACKENDS, "reference", backend)
    for module in (ours, paths):
        monkeypatch.setattr(module, "GPU_BACKENDS", ("reference",))
    return RowFile(tmp_path / "rehearsal-rows.csv")


def read(rows):
    with rows.path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["T1", "T4"])
def test_rows_have_all_times_and_errors_and_the_device(name, stand_in, tmp_path):
    request = {"step": "times", "shape": name, "seconds": 60}
    assert measure.run(request, stand_in, tmp_path) == 0
    rows = read(stand_in)
    assert {(row["dtype"], row["mode"]) for row in rows} == {
        (dtype, mode) for dtype in ("bfloat16", "float32") for mode in ("forward", "both")
    }
    for row in rows:
        assert "rehearsal" in row["device"] and row["note"] == "" and row["same_bits"] == "True"
        assert float(row["graph_us"]) >= 0 and float(row["host_us"]) > 0
        assert (row["kernel_us"] != "") == (row["mode"] == "forward")
        assert float(row["error_value"]) < 1e-5


@pytest.mark.parametrize(
    "step", ["gradients", "host", pytest.param("peers", marks=pytest.mark.slow)]
)
def test_the_other_measurements_write_rows_without_failures(step, stand_in, tmp_path):
    assert measure.run({"step": step, "shape": "T1", "seconds": 60}, stand_in, tmp_path) == 0
    rows = read(stand_in)
    assert rows and all("rehearsal" in row["device"] for row in rows)
    timed = [row for row in rows if row["note"] == ""]
    assert all(row["graph_us"] and row["call_us"] for row in timed)
    assert [row["provider"] for row in rows if row["note"]] in ([], ["ott"])


@pytest.mark.parametrize("name", ["T5", "T6", "T2"])
def test_tuning_changes_tiles_or_the_way_to_stream(name):
    pytest.importorskip("triton", reason="triton is not installed")
    from optical.kernels import tuning

    shape, seen = shapes.SHAPES[name], []
    before = dict(tuning.TILES), tuning.PROGRAMS
    for tile, tuned, way, changed in ours._candidates(shape):
        with changed:
            together = shape.batch > tuning.PROGRAMS
            seen.append((tile, way, together, tuned))
            assert name != "T2" or tuning.TILES[64] == tile
        assert before == (tuning.TILES, tuning.PROGRAMS)
    if name == "T2":
        assert len({tile for tile, *_ in seen}) == len(seen) > 10
        assert [tuned for *_, tuned in seen] == [True] + [False] * (len(seen) - 1)
    else:
        tuned = name == "T5"  # streamed in one launch today
        stream = tuning.STREAM
        assert seen == [
            (stream, "one launch", True, tuned),
            (stream, "stepwise", False, not tuned),
        ]


def test_a_wrong_result_has_the_error_and_no_time(stand_in, tmp_path, monkeypatch):
    solve = gate.tolerance.solve

    def wrong(backend, case, gradient):
        out = solve(backend, case, gradient)
        is_ours = case.x.dtype == torch.bfloat16
        return out | {"value": out["value"] * 1.001} if is_ours else out

    monkeypatch.setattr(gate.tolerance, "solve", wrong)
    request = {"step": "times", "shape": "T1", "seconds": 60}
    assert measure.run(request, stand_in, tmp_path) == WRONG_ROWS
    rows = [row for row in read(stand_in) if row["dtype"] == "bfloat16"]
    assert rows and all("failed: AssertionError: reference T1" in row["note"] for row in rows)
    assert not any(row["graph_us"] or row["kernel_us"] or row["host_us"] for row in rows)


def test_a_call_that_a_graph_refuses_has_no_time_as_a_graph(stand_in, tmp_path, monkeypatch):
    def call(case, variant):
        return lambda: (torch.linspace(0, 1, 3).to(case.x),)

    monkeypatch.setattr(ours, "public_call", call)
    request = {"step": "times", "shape": "T1", "seconds": 60}
    assert measure.run(request, stand_in, tmp_path) == WRONG_ROWS
    rows = read(stand_in)
    reason = "RuntimeError: a capture refuses torch.linspace on the host"
    assert {row["note"] for row in rows} == {f"failed: graph not captured: {reason}"}
    assert not any(row["graph_us"] for row in rows) and all(row["host_us"] for row in rows)


def test_variants_are_left_out_when_the_time_is_over(stand_in, tmp_path):
    assert measure.run({"step": "times", "shape": "T1", "seconds": 0}, stand_in, tmp_path) == 0
    assert {row["note"] for row in read(stand_in)} == {"not measured: out of time"}


def test_bits_may_differ_by_rounding_only():
    whole = torch.linspace(0, 1, 8)
    assert gate.same_bits((whole,), (whole[-3:],))
    assert not gate.same_bits((whole,), (whole[-3:] * (1 + 1e-7),))
    with pytest.raises(AssertionError, match="larger batch"):
        gate.same_bits((whole,), (whole[-3:] + 1e-3,))


def test_peers_are_compared_with_the_reference(stand_in):
    case = shapes.draw(shapes.REHEARSED["T1"], torch.float32)
    assert peers._check(case, peers.bmm_loop) < 1e-4
    with pytest.raises(AssertionError, match="g is off"):
        peers._check(case, lambda case: peers.log_loop(replace(case, max_iter=1)))


def test_inputs_rotate_beyond_the_cache_of_the_device():
    for shape in shapes.SHAPES.values():
        size = shape.batch * (shape.n + shape.m) * shape.dim * 2
        sets = shape.sets(torch.bfloat16)
        long = 2 * shape.batch * shape.n * shape.m * shape.max_iter > shapes.MOST_VISITS
        assert sets >= 2 and (sets * size > 1e8 or long), shape


def test_an_architecture_gets_its_suffix():
    assert [
        builds._specific(name, ("80", "90a", "100f")) for name in ("80", "90", "100", "86")
    ] == [
        "80",
        "90a",
        "100f",
        "86",
    ]


def test_the_library_is_built_for_the_device_unless_it_is_there(monkeypatch, tmp_path):
    built = []

    def missing(*arguments):
        raise library.BuildError("missing")

    monkeypatch.setattr(library, "open_installed", missing)
    monkeypatch.setattr(library, "find_nvcc", lambda: ["nvcc"])
    monkeypatch.setattr(library, "driver_architectures", lambda: ("90", "100"))
    monkeypatch.setattr(library, "build_cuda", lambda *arguments: built.append(arguments))
    builds.build_library(tmp_path)
    assert built == [
        (library.source_folder(), ROOT / "optical" / "_cuda.so", ["nvcc"], ["90a", "100f"])
    ]
    monkeypatch.setattr(library, "open_installed", lambda *arguments: None)
    builds.build_library(tmp_path)
    assert len(built) == 1
    monkeypatch.setattr(library, "open_installed", missing)
    monkeypatch.setattr(library, "find_nvcc", lambda: None)
    with pytest.raises(RuntimeError, match="nvcc was not found"):
        builds.build_library(tmp_path)


# ------------------------------------------------------------------------------ the rehearsal


@pytest.mark.slow
def test_the_rehearsal_runs_every_kind_of_step(tmp_path):
    """In small: one shape of each kind. The probe must notice a number that is wrong."""
    output, work = tmp_path / "out", tmp_path / "work"
    kinds = "versions,warm,build,probe,times-T1,memcheck,test-cuda,peers-T1,nvrtc,host,profile-T1"
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--output", str(output)]
    command += ["--work", str(work), "--seconds", "600", "--steps", f"{kinds},gradients-T1,tune-T1"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "all steps done" in process.stdout
    names = {path.name for path in output.iterdir()}
    assert len(names) <= 8 and all(name.startswith("rehearsal-") for name in names)
    with (output / "rehearsal-rows.csv").open(newline="") as file:
        rows = [Row(**row) for row in csv.DictReader(file)]
    assert {row.step for row in rows} == {"times", "peers", "nvrtc", "host", "gradients"}
    assert {row.provider for row in rows if row.step == "times"} == {"cuda", "triton"}
    assert all("rehearsal" in row.device and "failed" not in row.note for row in rows)

    expected = builds.expected_outputs(work, "cosine-f16")
    numbers = bytearray(expected.read_bytes())
    # The first value of the first case, behind the case's number and the length of its output.
    value = struct.unpack_from("f", numbers, 12)[0]
    struct.pack_into("f", numbers, 12, 2 * value)
    spoilt = tmp_path / "spoilt.bin"
    spoilt.write_bytes(numbers)
    probe = [builds.probe_binary(work), builds.emulated_library(work), "cpu", "check", spoilt]
    process = subprocess.run([*probe, "--only", "four cosine-f16"], capture_output=True, text=True)
    assert process.returncode == 1
    assert ": value is off by" in process.stdout and "1 failed" in process.stdout
