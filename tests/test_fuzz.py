"""A short run of the random calls of fuzz.py; `make fuzz` runs a long one."""

import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).with_name("fuzz.py")


def test_random_calls_agree_with_the_reference_or_are_refused():
    command = [sys.executable, str(FUZZ), "--calls", "150", "--seconds", "30", "--seed", "5109"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout[-4000:]
