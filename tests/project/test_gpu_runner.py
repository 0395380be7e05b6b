"""How ``benchmarks.gpu`` plans and resumes; what it measures needs a GPU."""

import sys

import pytest
import torch

from benchmarks import gpu


def test_tests_come_before_times_and_names_are_unique(tmp_path):
    names = [step.name for step in gpu.steps(tmp_path)]
    assert len(set(names)) == len(names)
    assert names[:3] == ["build", "test-gpu", "test-backends"]
    assert {f"time-{shape}-both" for shape in gpu.SHAPES} < set(names)


def test_a_finished_step_is_not_run_again_and_a_failed_one_is(tmp_path):
    todo = gpu.pending(tmp_path, ["time-L1", "time-L2"])
    ran = []

    def run(step, seconds, log):
        ran.append(step.name)
        return int(step.name == "time-L1-both")

    codes = gpu.work(tmp_path, todo, 100.0, run)
    assert list(codes) == ran and codes["time-L1-both"] == 1
    assert [step.name for step in gpu.pending(tmp_path, ["time-L"])] == ["time-L1-both"]
    gpu.work(tmp_path, gpu.pending(tmp_path, ["time-L"]), 100.0, lambda *_: 0)
    assert gpu.pending(tmp_path, ["time-L"]) == []
    assert "test-gpu" in [step.name for step in gpu.pending(tmp_path)]


def test_no_step_begins_when_the_time_is_nearly_used_up(tmp_path):
    now = [0.0]
    given = []

    def run(step, seconds, log):
        given.append(seconds)
        now[0] += 50.0
        return 0

    codes = gpu.work(tmp_path, gpu.steps(tmp_path), 110.0, run, clock=lambda: now[0])
    assert given == [110.0, 60.0] and len(codes) == 2


@pytest.mark.parametrize(
    ("code", "seconds", "expected"),
    [("print('hello')", 60, 0), ("raise SystemExit(3)", 60, 3), ("while True: pass", 1, 124)],
)
def test_a_step_is_logged_and_interrupted_when_its_time_is_over(tmp_path, code, seconds, expected):
    log = tmp_path / "log.txt"
    step = gpu.Step("some", (sys.executable, "-c", code))
    assert gpu._run(step, seconds, log) == expected
    text = log.read_text()
    assert "== some:" in text and ("\nhello\n" in text) == (code == "print('hello')")


def test_without_a_gpu_it_says_so_and_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--output", str(tmp_path / "results")]) != 0
    assert "no CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_what_is_left_is_listed_without_a_gpu(tmp_path, capsys):
    assert gpu.main(["--output", str(tmp_path), "--list", "--steps", "tune"]) == 0
    assert capsys.readouterr().out.split() == ["tune-T1", "tune-T2", "tune-T3"]
