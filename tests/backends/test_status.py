"""The status, and the marginal error on which it depends."""

import math

import pytest
import torch

import optical
from optical import Status
from optical.backends import library

BACKENDS = ["reference", "cpu"] if library.load_cpu().reason is None else ["reference"]
OPTIONS = [{}, {"omega": 1.7}, {"omega": 1.4, "rho": 0.5}, {"anderson": 4}, {"rho": (None, 2.0)}]


def random_costs(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_converged_means_that_both_marginals_meet_the_tolerance(backend, options, dtype):
    cost = random_costs(300, 9, 7, dtype=dtype)
    for max_iter in (0, 1, 5, 20, 3000):
        result = optical.sinkhorn(
            cost, epsilon=0.03, max_iter=max_iter, tol=1e-3, backend=backend, **options
        )
        meets = result.marginal_error <= 1e-3
        assert torch.equal(result.status == Status.CONVERGED, meets)
        assert (result.status[~meets] == Status.MAX_ITER).all()
        stopped = result.n_iter < max_iter
        # The rule inside the run and the marginal error at its end differ by rounding.
        assert (result.marginal_error[stopped] <= 1e-3 + 1e-6).all()
    assert stopped.all() and meets.float().mean() > 0.95


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_iterate_is_tested(backend):
    cost = random_costs(1, 20, 20, dtype=torch.float64)
    options = {"epsilon": 0.1, "tol": 1e-3, "backend": backend}
    needed = optical.sinkhorn(cost, max_iter=100, **options).n_iter.item()
    for max_iter in (needed - 1, needed, needed + 1):
        result = optical.sinkhorn(cost, max_iter=max_iter, **options)
        assert result.n_iter == min(max_iter, needed)
        expected = Status.MAX_ITER if max_iter < needed else Status.CONVERGED
        assert result.status == expected
    one = optical.sinkhorn(torch.rand(1, 1, 1), epsilon=0.1, max_iter=1, tol=1e-6, backend=backend)
    assert one.status == Status.CONVERGED


@pytest.mark.parametrize("backend", BACKENDS)
def test_over_relaxed_runs_take_the_iterations_of_the_reference(backend):
    """The column error of an over-relaxed iterate counts; without it, some stop too early."""
    cost = random_costs(60, 12, 10, dtype=torch.float64)
    options = {"epsilon": 0.05, "omega": 1.8, "tol": 1e-4, "max_iter": 2000}
    result = optical.sinkhorn(cost, backend=backend, **options)
    truth = optical.sinkhorn(cost, backend="reference", **options)
    assert torch.equal(result.n_iter, truth.n_iter)
    assert (result.marginal_error <= 1e-4 * (1 + 1e-9)).all()
    before = optical.sinkhorn(
        cost[:1], backend=backend, **options | {"max_iter": int(truth.n_iter[0]) - 1}
    )
    assert before.marginal_error > 1e-4


@pytest.mark.parametrize("tol", [0.0, 1e-3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_that_are_not_finite_are_infeasible(backend, tol):
    """Costs are finite, but the potentials and values of float32 are not."""
    cost = torch.full((2, 3, 4), 0.5)
    cost[1] = 3e38
    log_a = torch.tensor([0.2, 0.3, 0.5]).log().expand(2, 3)
    options = {"epsilon": 0.1, "tol": tol, "max_iter": 5, "backend": backend, "rho": 1.0}
    result = optical.sinkhorn(cost, log_a, init=(torch.zeros(2, 3), -cost[:, 0]), **options)
    finite = torch.stack([result.value, result.value_linear, result.marginal_error]).isfinite()
    finite = finite.all(0) & result.f.isfinite().all(1) & result.g.isfinite().all(1)
    assert finite[0] and result.status[0] != Status.INFEASIBLE
    assert not finite[1] and result.status[1] == Status.INFEASIBLE


@pytest.mark.parametrize("iterations", [30, 1000])
@pytest.mark.parametrize("epsilon", [0.01, 0.05])
@pytest.mark.parametrize("offset", [0.0, 1.0, 20.0, 200.0, 1e4])
@pytest.mark.skipif("cpu" not in BACKENDS, reason="no CPU library")
def test_the_marginal_error_is_that_of_the_plan(offset, epsilon, iterations):
    """The float32 potentials of large costs have lost digits, of which the plan suffers."""
    cost = random_costs(3, 40, 50) + offset
    result = optical.sinkhorn(cost, epsilon=epsilon, max_iter=iterations, backend="cpu")
    plan = result.plan().double()
    error = (plan.sum(2) - 1 / 40).abs().sum(1) + (plan.sum(1) - 1 / 50).abs().sum(1)
    assert ((result.marginal_error - error).abs() <= 0.2 * error + 1e-6).all()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no CPU library")
def test_the_marginal_error_of_a_team_of_threads_is_that_of_one():
    before = torch.get_num_threads()
    cost, results = random_costs(1, 1100, 1030) + 200, []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(optical.sinkhorn(cost, epsilon=0.05, max_iter=5, omega=1.2, tol=1e-9))
            results.append(optical.sinkhorn(cost, epsilon=0.05, max_iter=5))
    finally:
        torch.set_num_threads(before)
    for result, expected in zip(results[2:], results[:2] * 2, strict=True):
        for name in ("value", "f", "g", "marginal_error"):
            assert torch.equal(getattr(result, name), getattr(expected, name))
    assert math.isfinite(results[0].value.item())
