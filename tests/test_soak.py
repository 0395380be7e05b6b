"""The verdict of the soak test; `make soak` runs it for half an hour."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).with_name("soak.py")


@pytest.fixture(scope="module")
def soak():
    return importlib.import_module("soak")


@pytest.mark.parametrize("leak", ["MB", "tensors", "files", "threads"])
def test_a_leak_is_seen_through_noise_and_a_warm_up(soak, leak):
    def at(second, leaks):
        level = {"MB": 500 + min(second, 20) + second % 3, "tensors": 100, "files": 9, "threads": 2}
        if leaks:
            level[leak] += second
        return soak.Sample(second, **level)

    level = soak.growth([at(second, False) for second in range(1, 101)])
    assert all(level[name] <= allowed for name, allowed in soak.ALLOWED.items())
    grown = soak.growth([at(second, True) for second in range(1, 101)])
    assert grown[leak] > soak.ALLOWED[leak]
    with pytest.raises(ValueError, match="too few to tell"):
        soak.growth([at(100, False)])


def test_its_samples_see_tensors_and_files(soak):
    import torch

    before = soak.sample(0.0)
    held = [torch.zeros(1) for _ in range(1000)], open(SOAK)  # noqa: SIM115
    after = soak.sample(0.0)
    assert after.tensors - before.tensors >= 1000 and after.files == before.files + 1
    held[1].close()


@pytest.mark.slow
def test_it_runs():
    done = subprocess.run(
        [sys.executable, str(SOAK), "--minutes", "0.5"], capture_output=True, text=True
    )
    assert "level" in done.stdout and not done.stderr, done.stdout + done.stderr
