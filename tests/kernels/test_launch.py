"""Kept launch handles, over a driver that does nothing: the variants are those Triton chooses."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MISSING = sys.platform != "linux" or shutil.which(os.environ.get("CC", "cc")) is None
pytestmark = pytest.mark.skipif(MISSING, reason="the idle driver needs Linux and a C compiler")

SETUP = """
import ctypes
from benchmarks.launches import idle_driver

library = idle_driver.install()
import torch, triton
import triton.language as tl
from triton import knobs
from optical.kernels import launch

def latest():
    return ctypes.c_void_p.in_dll(library, "idle_function").value

@triton.jit(do_not_specialize=["n"])
def add_kernel(a_ptr, b_ptr, n, stride, factor, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + index * stride, mask=index < n)
    tl.store(b_ptr + index, a * factor, mask=index < n)
"""


def run(tmp_path, script):
    """Run a script after ``SETUP``; Triton reads kernels from files."""
    path = tmp_path / "script.py"
    path.write_text(SETUP + script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


VARIANTS = """
base = torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16)
default = dict(a=base[0], n=7, stride=3, factor=2.0, block=16, warps=4)
changes = [
    {}, {"a": base[1]}, {"a": base[0][1:]}, {"a": base[0][4:]}, {"n": 1}, {"n": 16},
    {"n": 2**31}, {"stride": 1}, {"stride": 32}, {"stride": 2**31}, {"stride": 0},
    {"factor": 2}, {"factor": 1}, {"factor": 1.0}, {"block": 32}, {"warps": 1},
]
functions = []
for change in changes:
    case = default | change
    arguments = case["a"], torch.zeros(64), case["n"], case["stride"], case["factor"]
    options = dict(BLOCK=case["block"], num_warps=case["warps"])
    before = idle_driver.launches(library)
    for _ in range(2):
        launch.launch_kernel(add_kernel, (4, 2), *arguments, **options)
        functions.append(latest())
    assert idle_driver.launches(library) == before + 2
    repeated = launch.RepeatedLaunch(add_kernel, (4, 2), arguments[:2], **options)
    repeated(*arguments[2:])
    functions.append(latest())
    kept = launch.KeptLaunch(add_kernel, (4, 2), *arguments[2:], **options)
    for _ in range(2):
        kept(*arguments[:2])
        functions.append(latest())
    add_kernel[(4, 2)](*arguments, **options)
    assert functions[-5:] == [latest()] * 5, change
variants = len(add_kernel.device_caches[0][0])
print(len(launch._handles), len(set(functions)), variants)
"""


def test_the_variants_are_those_of_triton(tmp_path):
    handles, functions, variants = map(int, run(tmp_path, VARIANTS))
    # No case is launched with the kernel of another, and no kernel is kept for a case alone.
    assert handles == functions == variants == 11


ALIGNMENT = """
kept = launch.KeptLaunch(add_kernel, (1,), 7, 3, 2.0, BLOCK=16)
a, b = torch.zeros(64), torch.zeros(64)
for tensors in ((a, b), (a[1:], b), (a, b[1:]), (a[1:], b[1:]), (a, b)):
    kept(*tensors)
    function = latest()
    add_kernel[(1,)](*tensors, 7, 3, 2.0, BLOCK=16)
    assert function == latest(), tensors
print(len(kept.handles))
"""


def test_a_kept_launch_takes_tensors_of_any_alignment(tmp_path):
    assert run(tmp_path, ALIGNMENT) == ["4"]


HOOKS = """
seen = []
arguments = torch.zeros(64), torch.zeros(64), 7, 3, 2.0
for _ in range(2):
    launch.launch_kernel(add_kernel, (1,), *arguments, BLOCK=16)
kept = launch.KeptLaunch(add_kernel, (1,), *arguments[2:], BLOCK=16)
kept(*arguments[:2])
knobs.runtime.launch_enter_hook.add(lambda metadata: seen.append(metadata.get()["name"]))
launch.launch_kernel(add_kernel, (1,), *arguments, BLOCK=16)
kept(*arguments[:2])
print(*seen)
"""


def test_a_profiler_sees_every_launch(tmp_path):
    assert run(tmp_path, HOOKS) == ["add_kernel"] * 2


COUNTS = """
from optical import OTAlignmentLoss, sinkhorn

x, y = torch.randn(2, 5, 16).bfloat16().requires_grad_(), torch.randn(2, 6, 16).bfloat16()
mask = torch.ones(2, 5, dtype=torch.bool)
loss = OTAlignmentLoss(backend="triton", max_iter=3)

def count(call):
    before = idle_driver.launches(library)
    call()
    return idle_driver.launches(library) - before

value = None
def forward():
    global value
    value = loss(x, y, mask)
print(count(forward), count(lambda: value.backward()))
cost = torch.rand(1, 200, 250)
print(count(lambda: sinkhorn(cost, epsilon=0.1, max_iter=10, backend="triton")))
"""


def test_calls_launch_no_more_kernels_than_they_need(tmp_path):
    forward, backward, streamed = map(int, run(tmp_path, COUNTS))
    # Masses and temperatures, norms, the run; then the gradient of x alone, with the same norms.
    assert (forward, backward) == (3, 1)
    # Masses, the start of both sides, sums of both sides and the outputs; two launches per
    # half-step.
    assert streamed == 1 + 2 + 2 + 1 + 10 * 4
