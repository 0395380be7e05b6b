"""`optical info`: what it says of each backend, and that it notices one that computes wrongly."""

import dataclasses
import json

import pytest
import torch

from optical.backends import library, registry
from optical.cli import main as cli
from optical.testing import selftest
from optical.testing.cases import problems


def entries(found):
    return {entry["name"]: entry for entry in found["backends"] if entry["device"] == "cpu"}


def test_every_available_backend_agrees_with_float64(capsys):
    assert cli.main(["info", "--json", "--seconds", "30"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    assert found["versions"]["torch"] == torch.__version__
    tested = entries(found)
    assert set(tested) == set(registry.BACKENDS)
    for name, entry in tested.items():
        available = entry["reason"] is None
        assert available == bool(entry["tested"]) and not entry["failures"]
        if name == "reference":
            assert available and set(entry["tested"]) == set(selftest.PROBLEMS)
    assert (tested["cpu"]["reason"] is None) == (library.load() is not None)


def test_its_problems_are_those_of_the_tests():
    assert set(selftest.PROBLEMS) <= {problem.name for problem in problems()}


@pytest.mark.parametrize("what", ["wrong", "raises"])
def test_a_broken_backend_fails_the_command(capsys, monkeypatch, what):
    right = registry.BACKENDS["reference"]

    def broken(arguments):
        if what == "raises":
            raise OSError("libsinkhorn.so: cannot be loaded\nand more")
        outputs = right.forward(arguments)
        return outputs._replace(value=outputs.value + 1e-3)

    # The library's place, so that the truth stays what it is.
    spoiled = dataclasses.replace(
        right, name="cpu", dense=True, supports=lambda arguments: None, forward=broken
    )
    monkeypatch.setitem(registry.BACKENDS, "cpu", spoiled)
    monkeypatch.setattr(library, "load", lambda: type("L", (), ABOUT)())
    assert cli.main(["info", "--seconds", "30"]) == 1
    out = capsys.readouterr().out
    assert "self-test FAILED" in out
    lines = [line for line in out.splitlines() if "FAILED 32x32" in line]
    assert len(lines) == 1
    assert ("worst at" if what == "wrong" else "OSError: libsinkhorn.so") in lines[0]
    assert "and more" not in out


ABOUT = {"optical_cpu_isa": lambda self: b"none", "_name": "spoiled.so"}


def test_a_short_time_still_tests_each_backend_once():
    found = selftest.inspect(1e-9)
    assert found["passed"] is True
    for entry in found["backends"]:
        assert len(entry["tested"]) == (entry["reason"] is None)
