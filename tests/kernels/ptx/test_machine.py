"""The PTX machine itself: what it reports, what it computes, and that it leaves nothing behind."""

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip(reason="kernels are interpreted here, not compiled", allow_module_level=True)

import triton
import triton.language as tl

from optical.backends import registry
from optical.kernels import tuning
from optical.testing.cases import random_case
from optical.testing.tolerance import solve
from tests.kernels.ptx.driver import NOISY_UNITS, TritonMachine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ptx")


@triton.jit
def exp2_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + index, tl.exp2(tl.load(x_ptr + index, mask=index < n)), mask=index < n)


@triton.jit
def rotate_kernel(x_ptr, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + (index + 1) % BLOCK)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + index, x)


@triton.jit
def collide_kernel(x_ptr):
    tl.store(x_ptr, tl.program_id(0) + 1.0)


@triton.jit
def sum_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), 0))


def test_it_computes_and_leaves_nothing_behind(folder):
    x = torch.linspace(-3, 3, 100)
    before = triton.runtime.driver._active
    refused = registry.BACKENDS["triton"].supports(random_case("", 1, 3, 4).problem())
    with TritonMachine(folder) as machine:
        y = torch.empty_like(x)
        exp2_kernel[(2,)](x, y, 100, BLOCK=64)
        torch.testing.assert_close(y, x.exp2(), rtol=2e-7, atol=0)
        assert machine.counts["exp2_kernel"]["launches"] == 1 and not machine.messages
    assert triton.runtime.driver._active is before and not exp2_kernel.device_caches
    assert "need a CUDA device" in refused
    case = random_case("", 1, 3, 4).to(torch.float32)
    assert registry.BACKENDS["triton"].supports(case.problem()) == refused.replace("64", "32")


def test_approximate_units_err_by_at_most_two_units(folder):
    x, exact = torch.linspace(-3, 3, 1024), torch.empty(1024)
    noisy, again = torch.empty(1024), torch.empty(1024)
    with TritonMachine(folder) as machine:
        exp2_kernel[(1,)](x, exact, 1024, BLOCK=1024)
        machine.noise = NOISY_UNITS
        exp2_kernel[(1,)](x, noisy, 1024, BLOCK=1024)
        exp2_kernel[(1,)](x, again, 1024, BLOCK=1024)
    assert torch.equal(noisy, again)
    units = (noisy - exact).abs() / (torch.nextafter(exact, exact + 1) - exact)
    assert 1 <= units.max() <= 2 and (units > 0).float().mean() > 0.5


def test_threads_that_exchange_without_a_barrier_are_reported(folder):
    for barrier in (True, False):
        x = torch.arange(256.0)
        with TritonMachine(folder) as machine:
            rotate_kernel[(1,)](x, BLOCK=256, BARRIER=barrier)
        assert bool(machine.messages) != barrier
    assert "race in global memory" in machine.messages[0]


def test_blocks_that_exchange_are_reported(folder):
    with TritonMachine(folder) as machine:
        collide_kernel[(2,)](torch.zeros(1))
    assert "of blocks 0 and 1 race" in machine.messages[0]


def test_an_access_outside_of_every_tensor_stops_the_machine(folder):
    x, y = torch.zeros(64), torch.zeros(63)
    with TritonMachine(folder), pytest.raises(RuntimeError, match="outside every tensor"):
        exp2_kernel[(1,)](x, y, 64, BLOCK=64)


def test_a_kernel_that_needs_too_much_shared_memory_is_refused(folder):
    with (
        TritonMachine(folder, shared_limit=8),
        pytest.raises(triton.runtime.errors.OutOfResources, match="shared memory"),
    ):
        sum_kernel[(1,)](torch.zeros(256), BLOCK=256)


def without_barriers(name):
    """Remove the barriers of the block from the PTX of one kernel."""

    def rewrite(kernel, text):
        lines = text.splitlines()
        kept = [line for line in lines if kernel != name or "bar.sync" not in line]
        assert kernel != name or len(kept) < len(lines)
        return "\n".join(kept)

    return rewrite


@pytest.mark.parametrize("kernel", ["resident_kernel", "loop_kernel"])
def test_kernels_without_their_barriers_are_reported(kernel, folder, monkeypatch):
    """The control: without it, silence about the kernels would mean nothing."""
    if kernel == "loop_kernel":
        monkeypatch.setattr(tuning, "RESIDENT", 0)
        monkeypatch.setattr(tuning, "PROGRAMS", 0)
        monkeypatch.setattr(tuning, "TILES", {})
    monkeypatch.setattr(tuning, "OBLONG", ())
    size = 40 if kernel == "resident_kernel" else 70
    case = replace(random_case("", 1, size, size, max_iter=2), rho_a=1.0)
    if kernel == "loop_kernel":
        case = replace(case, rho_a=float("inf"))
    with TritonMachine(folder) as machine:
        solve("triton", case.to(torch.float32))
        assert not machine.messages
    with TritonMachine(folder) as machine:
        machine.rewrite = without_barriers(kernel)
        solve("triton", case.to(torch.float32))
    assert any(kernel in text and "race" in text for text in machine.messages)
