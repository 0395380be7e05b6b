"""The emulated CUDA kernels under the sanitizers of the compiler.

Each test runs ``tests/cuda_emulator/exercise.cpp``: every regime, cost and gradient at small sizes.
"""

import os
import shutil
import subprocess

import pytest

from tests.cuda_emulator.build import build_program

pytestmark = pytest.mark.slow


def run(program, *arguments, **options):
    """Run without address randomisation, which older thread sanitizers do not support."""
    tool = shutil.which("setarch")
    command = [*([tool, "-R"] if tool else []), program, *map(str, arguments)]
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | options, timeout=3600
    )
    return result.returncode, result.stdout + result.stderr


THREAD = {"TSAN_OPTIONS": "suppress_equal_addresses=0 exitcode=0"}
RACE = "WARNING: ThreadSanitizer: data race"


def test_a_barrier_orders_every_access(tmp_path):
    """Only barriers order memory: shuffles, votes and fragment products do not."""
    status, output = run(build_program(tmp_path, "-O1", "-g", "-fsanitize=thread"), **THREAD)
    assert "tall dot-bf16 fast: forward 0" in output and status == 0
    at = output.find(RACE)
    assert at < 0, output[at : at + 8000]


def test_a_missing_barrier_is_a_race(tmp_path):
    flags = ("-O1", "-g", "-fsanitize=thread", "-DOPTICAL_WITHOUT_BARRIER")
    _, output = run(build_program(tmp_path, *flags), "square given envelope", **THREAD)
    assert RACE in output and "add_columns" in output


ADDRESS = {"ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    return build_program(tmp_path_factory.mktemp("exact"), "-O1", "-g", "-fsanitize=address")


# An H100, an A100, and the devices of compute capability 8.6, 8.9 and 12.0.
@pytest.mark.parametrize(("kilobytes", "clusters"), [(227, 8), (163, 1), (99, 1)])
def test_no_access_outside_of_exact_memory(kilobytes, clusters, exact):
    status, output = run(exact, "", 1, kilobytes, clusters, **ADDRESS)
    assert status == 0 and "AddressSanitizer" not in output, output[-8000:]
    assert "tall cosine-f32 packed: forward 0 backward 0" in output


@pytest.mark.parametrize("size", ["four", "pair", "warp", "square", "block", "cluster"])
def test_a_shortage_of_shared_memory_is_detected(size, exact):
    status, output = run(exact, f"{size} cosine-bf16 unroll", 1, 227, 8, 64, **ADDRESS)
    assert status != 0 and "heap-buffer-overflow" in output
