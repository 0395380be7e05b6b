"""Planning and resuming of ``benchmarks.gpu``; its measurements need a GPU."""

import sys

import pytest
import torch

from benchmarks import gpu


def test_tests_come_before_times_and_names_are_unique(tmp_path):
    names = [step.name for step in gpu.steps(tmp_path)]
    assert len(set(names)) == len(names)
    assert names[:3] == ["build", "test-gpu", "test-backends"]
    assert {f"time-{shape}-both" for shape in gpu.SHAPES} < set(names)


def test_every_file_of_a_command_exists(tmp_path):
    commands = [step.command for step in gpu.steps(tmp_path)]
    files = {argument for command in commands for argument in command if argument.endswith(".py")}
    assert any(gpu.FUZZER in command for command in commands)
    assert [name for name in files if not (gpu.ROOT / name).is_file()] == []


def test_finished_steps_are_skipped_and_failed_steps_run_again(tmp_path):
    todo = gpu.pending(tmp_path, ["time-L1", "time-L2"])
    started = []

    def run(step, seconds, log):
        started.append(step.name)
        return int(step.name == "time-L1-both")

    codes = gpu.run_steps(tmp_path, todo, 100.0, run)
    assert list(codes) == started and codes["time-L1-both"] == 1
    assert [step.name for step in gpu.pending(tmp_path, ["time-L"])] == ["time-L1-both"]
    gpu.run_steps(tmp_path, gpu.pending(tmp_path, ["time-L"]), 100.0, lambda *_: 0)
    assert gpu.pending(tmp_path, ["time-L"]) == []
    assert "test-gpu" in [step.name for step in gpu.pending(tmp_path)]


def test_no_step_starts_with_little_time_left(tmp_path):
    now = [0.0]
    limits = []

    def run(step, seconds, log):
        limits.append(seconds)
        now[0] += 50.0
        return 0

    codes = gpu.run_steps(tmp_path, gpu.steps(tmp_path), 110.0, run, clock=lambda: now[0])
    assert limits == [110.0, 60.0] and len(codes) == 2


@pytest.mark.parametrize(
    ("code", "seconds", "expected"),
    [("print('hello')", 60, 0), ("raise SystemExit(3)", 60, 3), ("while True: pass", 1, 124)],
)
def test_a_step_is_logged_and_interrupted_after_its_time_limit(tmp_path, code, seconds, expected):
    log = tmp_path / "log.txt"
    step = gpu.Step("example", (sys.executable, "-c", code))
    assert gpu._run_command(step, seconds, log) == expected
    text = log.read_text()
    assert "== example:" in text and ("\nhello\n" in text) == (code == "print('hello')")


def test_a_machine_without_a_gpu_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--output", str(tmp_path / "results")]) != 0
    assert "no CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_pending_steps_are_listed_without_a_gpu(tmp_path, capsys):
    assert gpu.main(["--output", str(tmp_path), "--list", "--steps", "tune"]) == 0
    assert capsys.readouterr().out.split() == ["tune-T1", "tune-T2", "tune-T3"]
