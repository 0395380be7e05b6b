"""The GPU backends on a device: graph capture, half precision, streams and synchronisation.

``test_registry.py`` compares their results.
"""

from dataclasses import replace

import pytest
import torch

from optical.backends import registry
from optical.backends.problem import GRADIENTS
from optical.ot import autograd
from optical.testing.cases import packed, random_case, random_vector_case
from optical.testing.tolerance import assert_backend_correct, solve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SIZES = [(20, 30), (64, 50), (128, 100), (100, 300), (300, 400)]


BACKENDS = ["cuda", "triton"]


def on_device(problem, gradient="envelope", backend="cuda"):
    problem = problem.to(torch.float32, "cuda")
    reason = registry.BACKENDS[backend].supports(problem.problem(gradient))
    if reason is not None:
        pytest.skip(reason=reason)
    return problem


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_graph_capture_and_replay_give_the_same_bits(n, m, gradient, backend):
    clouds = random_vector_case("graph", "cosine", batch=4, n=n, m=m, dim=40)
    problem = on_device(clouds, gradient, backend)
    expected = solve(backend, problem, gradient)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = solve(backend, problem, gradient)
    for _ in range(2):
        for tensor in captured.values():
            tensor.zero_()
        graph.replay()
        torch.cuda.synchronize()
        for field, value in expected.items():
            assert torch.equal(captured[field], value), field


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_half_precision_within_its_tolerance(n, m):
    problem = random_case("half", 3, n, m, epsilon=0.05, max_iter=32)
    fast = on_device(replace(problem, precision="fast"))
    assert_backend_correct("cuda", fast, torch.float32, "cuda", gradients=("envelope",))
    out, exact = solve("cuda", fast), solve("cuda", replace(fast, precision="exact"))
    assert torch.equal(out["f"], exact["f"]) == (max(n, m) <= 32)
    assert torch.equal(out["f"], solve("cuda", fast)["f"])


@pytest.mark.parametrize("options", [{}, {"anneal_start": 1.0, "anneal_ratio": 0.8, "tol": 1e-3}])
@pytest.mark.parametrize("m", [150, 1100])
def test_streamed_problems_have_the_same_bits_in_any_batch(m, options):
    """In one launch, half-step by half-step, and with columns shared out among programs.

    The assembler may contract products and sums, and the kernels must come out alike.
    """
    case = random_case("streamed", 129, 140, m, max_iter=12)
    batch = on_device(replace(case, **options), backend="triton")
    together = solve("triton", batch)
    alone = solve("triton", batch.select(128))
    for field in ("f", "g", "value", "value_linear", "marginal_error", "n_iter", "status"):
        assert torch.equal(together[field][128:], alone[field]), field


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_run_on_the_current_stream(backend):
    problem = on_device(random_case("stream", 64, 100, 100, max_iter=2000), backend=backend)
    arguments = problem.problem(backend=backend)
    autograd.solve(arguments)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        autograd.solve(arguments)
        done = side.record_event()
    assert not done.query(), "the work was not queued on this stream"
    done.synchronize()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_no_call_synchronises_with_the_device(gradient, backend):
    clouds = random_vector_case("sync", "cosine", batch=3, n=100, m=90, dim=32)
    for problem in (clouds, packed(clouds)):
        problem = on_device(problem, gradient, backend)
        solve(backend, problem, gradient)
        torch.cuda.set_sync_debug_mode("error")
        try:
            arguments = problem.problem(gradient, backend)
            autograd.solve(arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
