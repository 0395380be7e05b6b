"""Compiling ahead: what is refused, and that a training then compiles nothing more."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import optical
from optical.backends.problem import GRADIENTS
from optical.cli.main import main
from optical.io import nvidia

ROOT = Path(__file__).resolve().parents[2]


def test_groups_are_reported_one_line_each():
    lines = []
    groups = optical.warmup(20, 33, dim=8, device="cpu", threads=2, progress=lines.append)
    assert {group.problems for group in groups} == {
        "up to 16 x 16, float32, cosine",
        "up to 20 x 32, float32, cosine",
        "up to 20 x 33, float32, cosine",
    }
    assert [line.split(": ")[0] for line in lines[:-1]] == [group.problems for group in groups]
    assert lines[-1].startswith("optical is warm after ")


def test_packed_problems_and_two_dtypes():
    dtypes = [torch.bfloat16, torch.float32]
    groups = optical.warmup(
        5, dim=8, dtype=dtypes, packed=True, cost="dot", gradient="implicit", device="cpu",
        progress=None,
    )  # fmt: skip
    assert [group.problems for group in groups] == ["packed, bfloat16/float32, dot"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n is 0; expected at least 1"),
        ({"n": 4, "dim": -1}, "dim is -1; expected at least 1"),
        ({"n": 4, "dtype": torch.float64}, "expected one or two of float32, float16, bfloat16"),
        ({"n": 4, "dtype": [torch.float32] * 3}, "expected one or two of"),
        ({"n": 4, "cost": "manhattan"}, "manhattan"),
        ({"n": 4, "device": "cuda:99"}, "device is 'cuda:99'"),
        ({"n": 4, "device": "graphics"}, "device is 'graphics'; expected a device"),
        ({"n": 4, "device": "meta"}, "expected a CUDA device or 'cpu'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        optical.warmup(**{"device": "cpu", "progress": None} | arguments)


def test_a_machine_without_a_device_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(nvidia, "missing_device", lambda: "no NVIDIA driver is installed")
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(ValueError, match="device is 'cuda', but no NVIDIA driver is installed"):
        optical.warmup(16)
    assert main(["warmup"]) == 2
    captured = capsys.readouterr()
    assert captured.err == ("optical: error: device is 'cuda', but no NVIDIA driver is installed\n")
    assert not captured.out


def test_the_command_compiles_for_a_device(capsys):
    command = ["warmup", "--length", "16", "--dim", "8", "--device", "cpu", "--dtype", "bfloat16"]
    assert main([*command, "--teacher-dtype", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("up to 16 x 16, bfloat16/float32, cosine: ") and len(lines) == 2


def test_an_error_of_a_compiler_is_one_line(monkeypatch, capsys):
    def fail(*ignored, **options):
        raise RuntimeError("NVRTC 12.8 failed: an error\nand its context")

    monkeypatch.setattr("optical.losses.warmup", fail)
    assert main(["warmup", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "optical: error: NVRTC 12.8 failed: an error\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_a_missing_device_is_found_before_anything_heavy_is_imported():
    code = (
        "import sys; from optical.cli.main import main; print(main(['warmup']),"
        "{'triton', 'transformers', 'datasets', 'sentence_transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "2 set()\n"
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("optical: error: device is 'cuda', but ")


# Counts variants of kernels without compiling them.
COUNT = """
import random, sys
from benchmarks.launches import idle_driver

idle_driver.install()
import torch
from triton.runtime.jit import JITFunction

class Kernel:
    function = packed_metadata = None
    def launch_metadata(self, *ignored): pass
    def run(self, *ignored): pass

variants = set()

def compile_nothing(self, key, signature, device, constexprs, options, attrs, warmup):
    variants.add((self.fn.__name__, str(key)))
    return self.device_caches[device][0].setdefault(key, Kernel())

JITFunction._do_compile = compile_nothing
import optical

def train(loss, limit, steps, dtype):
    drawn = random.Random(0)
    for _ in range(steps):
        batch = drawn.choice([32, 32, 32, 7])
        n, m = (max(drawn.randint(1, limit) for _ in range(drawn.choice([1, 32]))) for _ in "nm")
        student = torch.zeros(batch, n, 64, dtype=dtype, requires_grad=True)
        teacher = torch.zeros(batch, m, 64, dtype=dtype)
        masks = (torch.ones(batch, size, dtype=torch.bool) for size in (n, m))
        loss(student, teacher, *masks).backward()

limit, warm, options = int(sys.argv[1]), int(sys.argv[2]), eval(sys.argv[3])
dtype, compiled = options.pop("dtype", torch.bfloat16), set()
if warm:
    made = optical.warmup(limit, dim=64, dtype=dtype, device="cpu", backend="triton", **options)
    compiled = set(variants)
train(optical.OTAlignmentLoss(backend="triton", **options), limit, 120, dtype)
print(len(compiled), len(variants - compiled), sorted(variants - compiled))
"""

MISSING = sys.platform != "linux" or shutil.which(os.environ.get("CC", "cc")) is None
idle = pytest.mark.skipif(MISSING, reason="the idle driver needs Linux and a C compiler")


def count(limit, warm, options):
    """The variants that warmup compiles, and how many more a ragged training then needs."""
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-c", COUNT, str(limit), str(int(warm)), options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    compiled, more, names = done.stdout.splitlines()[-1].split(" ", 2)
    return int(compiled), int(more), names


@idle
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_ragged_training_compiles_at_most_ten_variants(gradient):
    _, variants, names = count(128, False, f"dict(gradient={gradient!r})")
    assert 5 <= variants <= 10, names


@idle
@pytest.mark.parametrize(
    ("limit", "options"),
    [
        (128, "{}"),
        pytest.param(128, "dict(gradient='unroll')", marks=pytest.mark.slow),
        pytest.param(128, "dict(gradient='implicit', cost='dot')", marks=pytest.mark.slow),
        pytest.param(128, "dict(dtype=torch.float32, rho=1.0)", marks=pytest.mark.slow),
        pytest.param(300, "{}", marks=pytest.mark.slow),
        pytest.param(300, "dict(cost='sqeuclidean', tol=1e-3)", marks=pytest.mark.slow),
    ],
)
def test_after_a_warmup_a_ragged_training_compiles_nothing(limit, options):
    compiled, more, names = count(limit, True, options)
    assert compiled >= 5 and more == 0, names
