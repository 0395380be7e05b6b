"""A short run of the random calls of fuzz.py and fuzz_kernels.py; `make fuzz` runs a long one."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from optical.backends import library

FUZZ = Path(__file__).with_name("fuzz.py")


def test_random_calls_agree_with_the_reference_or_are_refused():
    command = [sys.executable, str(FUZZ), "--calls", "150", "--seconds", "30", "--seed", "5109"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout[-4000:]


@pytest.mark.parametrize("kernels", ["cuda", "triton", "streamed"])
def test_random_calls_of_the_kernels_agree_with_the_reference(kernels):
    if kernels == "cuda" and library.find_compiler() is None:
        pytest.skip(reason="no C++ compiler")
    if kernels != "cuda" and importlib.util.find_spec("triton") is None:
        pytest.skip(reason="triton is not installed")
    program = FUZZ.with_name("fuzz_kernels.py")
    command = [sys.executable, str(program), kernels, "--calls", "30", "--seconds", "15"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-4000:]


def test_calls_that_once_failed_pass():
    """An Anderson mixture that ran away, digits of unrolled gradients, a mass of 0 in float32, a
    truth that is rounded itself, a product beyond float32.
    """
    # These numbers mean the calls that failed only as long as `draw` draws as it does.
    failed = (979571, 403025, 421773, 602993, 951183, 1220403, 1222439)
    words = f"import fuzz; [fuzz.check(fuzz.draw(n)) for n in {failed}]"
    result = subprocess.run(
        [sys.executable, "-c", words], cwd=FUZZ.parent, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-4000:]
