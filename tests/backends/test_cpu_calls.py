"""Calls of the CPU library: invalid offsets, interruption, and memory."""

import subprocess
import sys

import pytest
import torch

import optical
from optical.backends import cpu, library
from optical.backends.problem import GRADIENTS, Problem
from optical.testing.cases import random_case

MISSING = library.load_cpu().reason
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"CPU library: {MISSING}")


def run_script(script, timeout=120):
    """Run a script in a process of its own, since a fault would end this one."""
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


# ------------------------------------------------------------------------------------ offsets

# Nine rows and seven columns in two problems; (argument, its wrong value, the message).
WRONG_OFFSETS = [
    ("cu_a", [0, 4, 2_000_000], "cu_seqlens_a[2] is 2000000; expected 9, the number of vectors"),
    ("cu_a", [0, 4, 12], "cu_seqlens_a[2] is 12; expected 9, the number of vectors"),
    ("cu_a", [0, 4, 8], "cu_seqlens_a[2] is 8; expected 9, the number of vectors"),
    ("cu_a", [1, 4, 9], "cu_seqlens_a[0] is 1; expected 0"),
    ("cu_a", [-100_000, 4, 9], "cu_seqlens_a[0] is -100000; expected 0"),
    ("cu_b", [0, -3, 7], "cu_seqlens_b[1] is -3; expected 0 or more, its predecessor"),
    ("cu_b", [0, 8, 7], "cu_seqlens_b[1] is 8; expected <= 7"),
    ("cu_b", [0, 2**63 - 1, 7], f"cu_seqlens_b[1] is {2**63 - 1}; expected <= 7"),
    ("cu_b", [0, -(2**63), 7], f"cu_seqlens_b[1] is {-(2**63)}; expected 0 or more, its"),
    ("cu_b", [-(2**63), 2**63 - 1, 7], f"cu_seqlens_b[0] is {-(2**63)}; expected 0"),
]


@pytest.mark.parametrize("call", ["forward", "backward", "apply_plan"])
def test_wrong_offsets_are_errors_and_no_fault(call):
    """The library follows no offset that it has not checked, whoever calls it."""
    script = f"""
import torch
from optical.backends import cpu
from optical.backends.problem import GRADIENTS, Problem
from optical.testing.cases import random_case

x, y, log_a, log_b = torch.randn(9, 8), torch.randn(7, 8), torch.zeros(9), torch.zeros(7)
good = {{"cu_a": torch.tensor([0, 4, 9]), "cu_b": torch.tensor([0, 3, 7])}}
def problem(**changes):
    offsets = good | changes
    return Problem(x, y, "cosine", offsets["cu_a"], offsets["cu_b"], log_a, log_b, torch.ones(2))
def call(p, s):
    if {call!r} == "forward":
        return cpu.forward(p)
    if {call!r} == "apply_plan":
        return cpu.apply_plan(p, s.f, s.g, torch.rand(7, 3), False)
    one = torch.ones(2)
    return cpu.backward(one, one, None, None, p, s.f, s.g, s.w, s.z, s.n_iter, True, True)
solution = cpu.forward(problem())
call(problem(), solution)
for name, values, message in {WRONG_OFFSETS!r}:
    try:
        call(problem(**{{name: torch.tensor(values)}}), solution)
    except ValueError as error:
        assert message in str(error), (str(error), message)
    else:
        raise AssertionError((name, values))
print("done")
"""
    result = run_script(script)
    assert result.stdout == "done\n", (result.returncode, result.stderr)


def test_sizes_of_packed_problems_are_found_by_the_library():
    generator = torch.Generator().manual_seed(0)
    lengths = [(5, 3), (1, 17), (0, 4), (30, 1)]
    x, y = (torch.randn(sum(k[i] for k in lengths), 6, generator=generator) for i in (0, 1))
    offsets = [torch.tensor([0, *(k[i] for k in lengths)]).cumsum(0) for i in (0, 1)]
    masses = [torch.zeros(len(x)), torch.zeros(len(y))]
    packed = Problem(x, y, "cosine", *offsets, *masses, torch.full((4,), 0.5), max_iter=5)
    found = cpu.forward(packed)
    for b in range(4):
        rows, columns = (slice(*cu[b : b + 2].tolist()) for cu in offsets)
        parts = x[None, rows], y[None, columns], "cosine", None, None
        alone = Problem(
            *parts, masses[0][None, rows], masses[1][None, columns], torch.full((1,), 0.5)
        )
        expected = cpu.forward(alone._replace(max_iter=5))
        assert torch.equal(found.f[rows], expected.f[0])
        assert torch.equal(found.value[b], expected.value[0])


def test_a_packed_batch_of_no_problems():
    none = torch.zeros(1, dtype=torch.int64)
    vectors, masses = torch.zeros(0, 3), torch.zeros(0)
    empty = Problem(vectors, vectors, "dot", none, none, masses, masses, torch.zeros(0))
    assert cpu.forward(empty).value.shape == (0,)
    with pytest.raises(ValueError, match=r"cu_seqlens_a\[0\] is 3; expected 0"):
        cpu.forward(empty._replace(cu_a=none + 3))


# ------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("call", ["forward", "team", "implicit", "unroll"])
def test_an_interrupt_ends_a_long_call(call, threads):
    script = f"""
import os, signal, threading, time, torch
from optical import sinkhorn

torch.set_num_threads({threads})
shape = dict(team=(1, 1100, 1100), unroll=(4, 400, 400)).get({call!r}, (4, 200, 200))
cost, options = torch.rand(*shape), dict(epsilon=0.01, tol=1e-12, max_iter=10**6)
if {call!r} == "implicit":
    options["gradient"] = "implicit"
if {call!r} == "unroll":
    options = dict(epsilon=0.01, max_iter=20_000, gradient="unroll")
    result = sinkhorn(cost.requires_grad_(), **options)
    start = result.value.sum().backward
else:
    sinkhorn(cost, epsilon=0.01, max_iter=1)
    start = lambda: sinkhorn(cost, **options)

def interrupt():
    global sent
    sent = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)

timer = threading.Timer(0.2, interrupt)
timer.start()
try:
    start()
except KeyboardInterrupt:
    assert time.monotonic() - sent < 1
    assert sinkhorn(cost.detach(), epsilon=0.01, max_iter=2).value.isfinite().all()
    print("interrupted")
"""
    result = run_script(script)
    assert result.stdout == "interrupted\n", (result.returncode, result.stderr)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_long_calls_in_another_thread_give_the_same_bits(gradient, monkeypatch):
    problem = random_case("long", 3, 20, 30).to(torch.float32).problem(gradient)
    one = torch.ones(3)

    def both():
        s = cpu.forward(problem)
        saved = (s.f, s.g, s.w, s.z, s.n_iter)
        return *s, *cpu.backward(one, one, None, None, problem, *saved, True, False)[::2]

    expected = both()
    monkeypatch.setattr(cpu, "LONG", 0.0)
    for x, y in zip(both(), expected, strict=True):
        assert torch.equal(x, y)
    with pytest.raises(ValueError, match="refused"):
        cpu.forward(problem._replace(omega=3.0))


# ------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("malformed", [False, True])
def test_unrolled_gradients_need_memory_for_the_iterations_that_ran(backend, malformed):
    """Not for max_iter: a malformed problem, which reports max_iter, needs none either."""
    cost = torch.rand(3, 30, 20, generator=torch.Generator().manual_seed(0))
    if malformed:
        cost[1, 2, 3] = torch.nan
    gradients = []
    for max_iter in (1000, 10**9):
        leaf = cost.clone().requires_grad_()
        result = optical.sinkhorn(
            leaf, epsilon=0.1, tol=1e-3, max_iter=max_iter, gradient="unroll", backend=backend
        )
        assert (result.n_iter[::2] < 1000).all()
        gradients += torch.autograd.grad(result.value.sum() + result.f[:, 1].sum(), leaf)
    assert torch.equal(gradients[0].nan_to_num(), gradients[1].nan_to_num())
    assert gradients[1][::2].isfinite().all() and gradients[1][::2].any()
    assert gradients[1][1].isnan().all() == malformed


@pytest.mark.parametrize("layout", ["batch", "rows", "transposed", "vectors"])
@pytest.mark.parametrize("call", ["forward", "backward", "apply_plan", "plan"])
def test_strided_inputs_are_not_copied(call, layout):
    """16 kB of costs or vectors, seen 20,000 times; a copy would take 328 MB or 164 MB."""
    script = f"""
import resource, sys, torch
from optical.backends import cpu
from optical.backends.problem import Problem, cost_problem

torch.set_num_threads(1)
B, n, layout, call = 20_000, 64, {layout!r}, {call!r}
log_a = torch.zeros(B, n)
y = None
if layout == "vectors":
    x = y = torch.rand(1, n, 32).expand(B, n, 32)
elif layout == "batch":
    x = torch.rand(1, n, n).expand(B, n, n)
elif layout == "rows":
    x = torch.rand(B, 1, n).expand(B, n, n)
else:
    x = torch.rand(1, n, n).mT.expand(B, n, n)
kind = "given" if y is None else "dot"
problem = Problem(x, y, kind, None, None, log_a, log_a, torch.ones(B), max_iter=2)
small = Problem(x[:8], y if y is None else y[:8], kind, None, None, log_a[:8], log_a[:8],
                torch.ones(8), max_iter=2)

def run(p, s):
    if call == "forward":
        return cpu.forward(p)
    if call == "apply_plan":
        return cpu.apply_plan(p, s.f, s.g, torch.ones(len(p.epsilon), n, 1), False)
    if call == "plan":
        return cpu.plan(p, s.f, s.g, False)
    one = torch.ones(len(p.epsilon))
    return cpu.backward(one, one, None, None, p, s.f, s.g, s.w, s.z, s.n_iter, True, False)

run(small, cpu.forward(small))
solution = cpu.forward(problem) if call != "forward" else None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = run(problem, solution)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = run_script(script)
    grown = int(result.stdout) * (1 if sys.platform == "darwin" else 1024)
    if call == "plan" or (call == "backward" and layout != "vectors"):
        grown -= 20_000 * 64 * 64 * 4  # the result
    elif call == "backward":
        grown -= 20_000 * 64 * 32 * 4
    assert grown < 60e6, result.stderr
