"""Short runs of the random calls; `make fuzz` and `make fuzz-kernels` run long ones."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optical.backends import library
from tests.stress.check import check
from tests.stress.draw import draw

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(*arguments, timeout):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def test_random_calls_agree_with_the_reference_or_are_refused():
    options = ("--calls", "150", "--seconds", "30", "--seed", "5109")
    result = run("-m", "tests.stress", *options, timeout=120)
    assert result.returncode == 0, result.stdout[-4000:]


@pytest.mark.parametrize("kernels", ["cuda", "triton", "streamed"])
def test_random_calls_of_the_kernels_agree_with_the_reference(kernels):
    if kernels == "cuda" and library.find_compiler() is None:
        pytest.skip(reason="no C++ compiler")
    if kernels != "cuda" and importlib.util.find_spec("triton") is None:
        pytest.skip(reason="triton is not installed")
    options = ("--calls", "30", "--seconds", "15")
    result = run("-m", "tests.stress.kernels", kernels, *options, timeout=300)
    assert result.returncode == 0, result.stdout[-4000:]


# A seed stands for the call that failed only as long as `draw` draws the same.
@pytest.mark.parametrize("seed", [979571, 403025, 421773, 602993, 951183, 1220403, 1222439])
@pytest.mark.filterwarnings("ignore")
def test_calls_that_failed_before_pass(seed, restored_threads):
    """A diverging Anderson mixture, digits of unrolled gradients, a mass of 0 in float32, rounding
    of the truth itself, a product beyond float32.
    """
    check(draw(seed))


def test_a_failure_is_printed_with_the_command_that_repeats_it():
    program = """
from tests.stress.run import main

def fail(call):
    raise AssertionError("planted")

raise SystemExit(main(["--calls", "3", "--seed", "7", "--failures", "1"], check=fail))
"""
    result = run("-c", program, timeout=120)
    assert result.returncode == 1 and "planted" in result.stdout
    assert "FAILED: python -m tests.stress --seed 7 --calls 1\noptical." in result.stdout
    assert "\n1 calls, 1 failed" in result.stdout
