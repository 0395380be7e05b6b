"""The table of faults applies to the sources at hand; `make mutants` plants them one at a time."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.stress import mutants
from tests.stress.faults import FAULTS, LANGUAGES
from tests.stress.mutants import Effort, Sighting, sighting, steps

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_applies_to_exactly_one_place(fault, tmp_path):
    copy = tmp_path / fault.path
    copy.parent.mkdir(parents=True)
    shutil.copy(ROOT / fault.path, copy)
    fault.apply(tmp_path)
    assert copy.read_text() != (ROOT / fault.path).read_text()
    assert all((ROOT / test).is_file() for test in fault.tests)


def test_faults_are_many_and_of_every_language():
    languages = Counter(fault.language for fault in FAULTS)
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 25
    assert languages.keys() == set(LANGUAGES) and min(languages.values()) >= 5


def test_a_fault_that_no_longer_applies_fails_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mutants, "RESULTS", tmp_path / "mutants.jsonl")
    moved = replace(FAULTS[0], before="a snippet that is nowhere")
    assert mutants.main([], [moved]) == 1
    assert (
        "DOES NOT APPLY: envelope-gradient: the snippet occurs 0 times" in capsys.readouterr().out
    )


@pytest.mark.parametrize(("noticed", "status"), [("call --seed 3", 0), ("", 1)])
def test_results_are_kept_and_resumed(noticed, status, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mutants, "RESULTS", tmp_path / "build" / "mutants.jsonl")
    tried = []

    def try_fault(checkout, fault, effort):
        tried.append(fault.name)
        return noticed

    monkeypatch.setattr(mutants, "try_fault", try_fault)
    chosen = ["--only", "cpu-gradient", "cpu-stop", "--language", "cpu"]
    assert mutants.main(chosen) == status and tried == ["cpu-gradient", "cpu-stop"]
    printed = capsys.readouterr().out
    assert ("seen by call --seed 3" if noticed else "NOT SEEN") in printed
    tried.clear()
    assert mutants.main([*chosen, "--resume"]) == status
    assert tried == ([] if noticed else ["cpu-gradient", "cpu-stop"])


def test_failures_are_read_from_the_output_of_tests_and_of_calls():
    faults = {fault.name: fault for fault in FAULTS}
    suite, *_, calls = steps(faults["streamed-relaxation"], Effort())
    output = "....F\nFAILED tests/a.py::test[x y] - AssertionError: b\n1 failed"
    assert sighting(suite, output) == Sighting(
        "tests/a.py::test[x y]", (*suite[:-1], "tests/a.py::test[x y]")
    )
    command = "-m tests.stress.kernels streamed"
    output = f"\nFAILED: python {command} --seed 12 --calls 1\noptical.sinkhorn()"
    again = (*command.split(), "--seed", "12", "--calls", "1")
    assert sighting(calls, output) == Sighting("call --seed 12", again)
    assert calls[:3] == tuple(command.split())
    with pytest.raises(ValueError, match="failed without a test"):
        sighting(suite, "Segmentation fault")
