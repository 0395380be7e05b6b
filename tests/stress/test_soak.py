"""The verdict of the soak test; `make soak` runs it for half an hour."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.stress import soak

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("leak", ["MB", "tensors", "files", "threads"])
def test_a_leak_is_seen_through_noise_and_a_warm_up(leak):
    def at(second, leaks):
        level = {"MB": 500 + min(second, 20) + second % 3, "tensors": 100, "files": 9, "threads": 2}
        if leaks:
            level[leak] += second
        return soak.Sample(second, **level)

    level = soak.growth([at(second, False) for second in range(1, 101)])
    assert all(level[name] <= allowed for name, allowed in soak.ALLOWED.items())
    grown = soak.growth([at(second, True) for second in range(1, 101)])
    assert grown[leak] > soak.ALLOWED[leak]
    with pytest.raises(ValueError, match="too few to compare"):
        soak.growth([at(100, False)])


def test_samples_count_tensors_and_files():
    before = soak.sample(0.0)
    tensors, file = [torch.zeros(1) for _ in range(1000)], open(__file__)  # noqa: SIM115
    after = soak.sample(0.0)
    file.close()
    assert after.tensors - before.tensors >= len(tensors)
    assert after.files == before.files + 1


@pytest.mark.slow
def test_half_a_minute_reports_every_quantity():
    command = [sys.executable, "-m", "tests.stress.soak", "--minutes", "0.5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "level" in done.stdout and not done.stderr, done.stdout + done.stderr
