"""``optical info``: its report on each backend, and the detection of a wrong result."""

import json
from types import SimpleNamespace

import pytest
import torch

from optical.backends import library, reference, registry
from optical.cli import main as cli
from optical.testing import selftest
from optical.testing.cases import all_cases


def entries(report):
    return {entry["name"]: entry for entry in report["backends"] if entry["device"] == "cpu"}


def test_every_available_backend_agrees_with_float64(capsys):
    assert cli.main(["info", "--json", "--seconds", "30"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert report["versions"]["torch"] == torch.__version__
    tested = entries(report)
    assert set(tested) == set(registry.BACKENDS)
    for name, entry in tested.items():
        available = entry["reason"] is None
        assert available == bool(entry["tested"]) and not entry["failures"]
        if name == "reference":
            assert available and set(entry["tested"]) == set(selftest.CASES)
    assert (tested["cpu"]["reason"] is None) == (library.load_cpu().library is not None)


def test_its_cases_exist():
    assert set(selftest.CASES) <= {case.name for case in all_cases()}


@pytest.mark.parametrize("fault", ["wrong value", "exception"])
def test_a_broken_backend_fails_the_command(capsys, monkeypatch, fault):
    def forward(problem):
        if fault == "exception":
            raise OSError("libsinkhorn.so: cannot be loaded\nand more")
        solution = reference.forward(problem)
        return solution._replace(value=solution.value + 1e-3)

    # In place of the CPU library, since the reference is the truth.
    module = SimpleNamespace(**vars(reference) | {"forward": forward})
    broken = registry.Backend("cpu", lambda: module, ("cpu",), dense=True)
    monkeypatch.setitem(registry.BACKENDS, "cpu", broken)
    loaded = library.Loaded(SimpleNamespace(_name="broken.so"), None)
    monkeypatch.setattr(library, "load_cpu", lambda: loaded)
    monkeypatch.setattr(library, "instruction_set", lambda native: "none")
    assert cli.main(["info", "--seconds", "30"]) == 1
    out = capsys.readouterr().out
    assert "self-test FAILED" in out
    lines = [line for line in out.splitlines() if "FAILED 32x32" in line]
    assert len(lines) == 1
    assert ("worst at" if fault == "wrong value" else "OSError: libsinkhorn.so") in lines[0]
    assert "and more" not in out


def test_a_short_time_limit_still_tests_each_backend_once():
    report = selftest.inspect(1e-9)
    assert report["passed"] is True
    for entry in report["backends"]:
        assert len(entry["tested"]) == (entry["reason"] is None)
