"""The CUDA kernels as NVRTC compiles them to PTX for sm_90a, carried out by the PTX machine.

Problems of every regime and gradient, by the project's tolerance rule, with the errors of
approximate units and tensor cores. Races and accesses outside of tensors fail.
"""

import re
from dataclasses import replace

import pytest
import torch

from optical.io import nvrtc

if nvrtc.find() is None:
    pytest.skip(reason="NVRTC was not found", allow_module_level=True)

from optical.backends.problem import GRADIENTS
from optical.testing.cases import all_cases, packed, random_case, random_vector_case
from optical.testing.tolerance import FIELDS, assert_backend_correct, solve
from tests.backends.test_cuda_emulated import (
    FAST,
    HALVES,
    assert_within_tolerance,
    skip_unless_supported,
)
from tests.kernels.ptx.cuda_device import CudaMachine
from tests.kernels.ptx.driver import NOISY_UNITS, TRUNCATED_SUMS

CASES = {case.name: case for case in all_cases() if not case.anderson}
# A size for each regime: two, four, two and eight warps; clusters of two and four blocks.
SHAPES = [(5, 33), (65, 7), (128, 100), (3, 129), (70, 250), (130, 200), (513, 5), (140, 400)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ptx")


@pytest.fixture
def machine(folder):
    with CudaMachine(folder, noise=NOISY_UNITS | TRUNCATED_SUMS) as machine:
        yield machine
    assert not machine.messages


def assert_used(machine, *names):
    assert {f"optical_{name}" for name in names} <= set(machine.counts)


def half_vectors(half, n, m, dim=24, **options):
    clouds = random_vector_case(
        "", "cosine", batch=2, n=n, m=m, dim=dim, epsilon=1.0, max_iter=5, **options
    )
    return clouds.to(torch.float32, "cpu", half)


@pytest.mark.parametrize(("name", "kernel"), [("7x5", "four"), ("ragged", "pair")])
def test_small_problems(name, kernel, machine, poisoned_memory):
    gradients = ("implicit", "unroll")
    assert_backend_correct("cuda", CASES[name], torch.float32, gradients=gradients)
    assert_used(machine, f"forward_{kernel}", "backward_small", "unroll_small")


def test_packed_problems(machine, poisoned_memory):
    case = CASES["sqeuclidean_packed_rho"]
    assert_backend_correct("cuda", case, torch.float32, gradients=("implicit",))
    assert_used(machine, "forward_four", "forward_pair", "backward_small")


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_half_vectors(half, machine, poisoned_memory):
    for problem in (half_vectors(half, 7, 6), packed(half_vectors(half, 7, 6))):
        assert_within_tolerance("half", problem, "implicit")


def test_one_warp(machine, poisoned_memory):
    case = random_case("", 1, 5, 33, max_iter=9, rows=[4], columns=[30])
    out, truth = solve("cuda", case.to(torch.float32)), solve("reference", case)
    for field in FIELDS:
        expected = truth[field].to(out[field].dtype)
        torch.testing.assert_close(out[field], expected, rtol=2e-6, atol=2e-6)
    assert_used(machine, "forward_warp")


def test_blocks(machine, poisoned_memory):
    options = {"rows": [60], "columns": [7], "max_iter": 3}
    case = random_case("", 1, 65, 7, **options)
    assert_backend_correct("cuda", case, torch.float32, gradients=("implicit",))
    assert_within_tolerance("half", half_vectors(torch.bfloat16, 66, 9), "envelope")
    assert_used(machine, "forward_block", "backward_block")


def without(barrier, name):
    """Remove the barriers that match from the PTX of one kernel."""

    def rewrite(kernel, text):
        changed, count = re.subn(barrier, "", text)
        assert count or kernel != name
        return changed if kernel == name else text

    return rewrite


def reports_without(barrier, name, case, folder):
    """Whether the machine reports a kernel without the barriers that match, and only then."""
    with CudaMachine(folder) as machine:
        solve("cuda", case)
        assert not machine.messages
        assert_used(machine, name.removeprefix("optical_"))
    with CudaMachine(folder) as machine:
        machine.rewrite = without(barrier, name)
        solve("cuda", case)
    return any(name in text and "race in shared memory" in text for text in machine.messages)


def test_a_warp_without_its_barriers_is_reported(folder):
    """The control: without it, silence about the kernels would mean nothing."""
    case = half_vectors(torch.float16, 7, 6)
    assert reports_without(r"bar\.warp\.sync[^;]*;", "optical_forward_four", case, folder)


def test_a_block_without_its_barriers_is_reported(folder):
    case = random_case("", 1, 65, 7, max_iter=2).to(torch.float32)
    assert reports_without(r"bar\.sync[^;]*;", "optical_forward_block", case, folder)


# --- everything broader --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cluster_without_its_barriers_is_reported(folder):
    case = random_case("", 1, 513, 5, max_iter=2).to(torch.float32)
    barrier = r"barrier\.cluster\.\w+\.\w+[^;]*;"
    assert reports_without(barrier, "optical_forward_cluster", case, folder)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", CASES)
def test_every_problem(name, gradient, machine, poisoned_memory):
    case = CASES[name]
    if case.x.shape[0] > 100:
        pytest.skip(reason="the same problem 4099 times takes minutes on the machine")
    skip_unless_supported(case, gradient)
    assert_backend_correct("cuda", case, torch.float32, gradients=(gradient,))


@pytest.mark.slow
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", ["given", "cosine", "sqeuclidean"])
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_every_regime(n, m, kind, gradient, machine, poisoned_memory):
    options = {"rows": [n - n // 5], "columns": [m - m // 4], "max_iter": 3}
    case = random_case("", 1, n, m, **options)
    if kind != "given":
        case = random_vector_case("", kind, batch=1, n=n, m=m, dim=19, epsilon=1.0, **options)
    skip_unless_supported(case, gradient)
    assert_backend_correct("cuda", case, torch.float32, gradients=(gradient,))


@pytest.mark.slow
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize(("n", "m"), [(12, 30), (40, 50), (66, 40), (100, 128), (140, 400)])
def test_every_regime_of_half_vectors(n, m, half, gradient, machine, poisoned_memory):
    problem = half_vectors(half, n, m, dim=40)
    skip_unless_supported(problem, gradient)
    for each in (problem, packed(problem)) if m < 400 else (problem,):
        assert_within_tolerance("half", each, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_half_precision(name, machine, poisoned_memory):
    case = replace(FAST[name], precision="fast")
    assert_backend_correct("cuda", case, torch.float32, gradients=("envelope",))
