"""What any optimal transport must satisfy, on drawn problems."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from optical import sinkhorn

SETTINGS = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@st.composite
def drawn(draw):
    """cost, log_a, log_b, epsilon in float64, sides of 1 to 9, unequal masses."""
    n, m, seed = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(2, n, m, generator=generator).double()
    log_a = torch.randn(2, n, generator=generator).double().log_softmax(1)
    log_b = torch.randn(2, m, generator=generator).double().log_softmax(1)
    return cost, log_a, log_b, draw(st.sampled_from([0.05, 0.2, 1.0]))


def solve(cost, log_a, log_b, epsilon, **options):
    return sinkhorn(cost, log_a, log_b, epsilon=epsilon, **({"max_iter": 400} | options))


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@SETTINGS
@given(drawn())
def test_transposing_the_problem_transposes_the_plan(problem):
    cost, log_a, log_b, epsilon = problem
    straight, turned = solve(*problem), solve(cost.mT, log_b, log_a, epsilon)
    error = (straight.marginal_error + turned.marginal_error).max().item()
    close(turned.plan().mT, straight.plan(), 1e-6 + 10 * error)
    close(turned.value, straight.value, 1e-6 + 10 * error)


@SETTINGS
@given(drawn(), st.randoms(use_true_random=False))
def test_permuting_tokens_permutes_the_plan(problem, random):
    cost, log_a, log_b, epsilon = problem
    rows = random.sample(range(cost.shape[1]), cost.shape[1])
    columns = random.sample(range(cost.shape[2]), cost.shape[2])
    straight = solve(*problem, max_iter=7)
    moved = solve(
        cost[:, rows][:, :, columns], log_a[:, rows], log_b[:, columns], epsilon, max_iter=7
    )
    close(moved.plan(), straight.plan()[:, rows][:, :, columns], 1e-10)
    close(moved.value, straight.value, 1e-10)


@SETTINGS
@given(drawn(), st.floats(-5, 5))
def test_a_constant_added_to_the_cost_is_added_to_the_value(problem, constant):
    cost, *rest = problem
    straight, shifted = solve(*problem, max_iter=9), solve(cost + constant, *rest, max_iter=9)
    close(shifted.value, straight.value + constant, 1e-10)
    close(shifted.value_linear, straight.value_linear + constant, 1e-10)
    close(shifted.plan(), straight.plan(), 1e-10)


@SETTINGS
@given(drawn(), st.floats(0.1, 1000))
def test_scaling_cost_and_epsilon_scales_the_value(problem, factor):
    cost, log_a, log_b, epsilon = problem
    straight = solve(*problem, max_iter=9)
    scaled = solve(factor * cost, log_a, log_b, factor * epsilon, max_iter=9)
    torch.testing.assert_close(scaled.value, factor * straight.value, rtol=1e-9, atol=1e-9)
    close(scaled.plan(), straight.plan(), 1e-9)


@SETTINGS
@given(drawn(), st.integers(0, 3), st.integers(0, 3))
def test_padding_does_not_matter(problem, more_rows, more_columns):
    cost, log_a, log_b, epsilon = problem
    size = (0, more_columns, 0, more_rows)
    padded = solve(
        torch.nn.functional.pad(cost, size, value=math.nan),
        torch.nn.functional.pad(log_a, (0, more_rows), value=-math.inf),
        torch.nn.functional.pad(log_b, (0, more_columns), value=-math.inf),
        epsilon,
        max_iter=9,
    )
    straight = solve(*problem, max_iter=9)
    close(padded.value, straight.value, 1e-10)
    n, m = cost.shape[1:]
    close(padded.plan()[:, :n, :m], straight.plan(), 1e-10)
    assert not padded.plan()[:, n:].any() and not padded.plan()[:, :, m:].any()


@SETTINGS
@given(drawn())
def test_the_plan_has_the_reported_marginals(problem):
    _cost, log_a, log_b, _epsilon = problem
    for max_iter in (1, 3, 100):
        result = solve(*problem, max_iter=max_iter)
        rows, columns = result.plan().sum(2), result.plan().sum(1)
        error = (rows - log_a.exp()).abs().sum(1) + (columns - log_b.exp()).abs().sum(1)
        close(error, result.marginal_error, 1e-12)
        close(columns, log_b.exp(), 1e-12)


@SETTINGS
@given(drawn())
def test_the_value_lies_between_the_exact_optimum_and_the_independent_coupling(problem):
    cost, log_a, log_b, _epsilon = problem
    result = solve(*problem, max_iter=1000)
    product = (log_a[:, :, None] + log_b[:, None, :]).exp()
    for i in range(2):
        exact = exact_transport(cost[i], log_a[i].exp(), log_b[i].exp())
        slack = 1e-8 + 2 * result.marginal_error[i].item()
        independent = (product[i] * cost[i]).sum().item()
        assert exact - slack <= result.value_linear[i] <= result.value[i] + slack
        assert result.value[i] <= independent + slack


def exact_transport(cost, a, b):
    n, m = cost.shape
    rows = torch.kron(torch.eye(n), torch.ones(1, m))
    columns = torch.kron(torch.ones(1, n), torch.eye(m))
    constraints, masses = torch.cat([rows, columns]).double(), torch.cat([a, b])
    # Both sides sum to one only up to rounding; a redundant row would make that infeasible.
    found = linprog(cost.flatten().numpy(), A_eq=constraints[:-1].numpy(), b_eq=masses[:-1].numpy())
    assert found.success
    return found.fun


@SETTINGS
@given(drawn())
def test_the_gradient_of_the_value_has_the_marginals_of_the_plan(problem):
    cost, log_a, log_b, epsilon = problem
    cost = cost.requires_grad_()
    result = solve(cost, log_a, log_b, epsilon, max_iter=1000)
    (gradient,) = torch.autograd.grad(result.value.sum(), cost)
    slack = 1e-8 + result.marginal_error.max().item()
    close(gradient.sum(2), log_a.exp(), slack)
    close(gradient.sum(1), log_b.exp(), slack)


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.01])
def test_the_value_falls_with_epsilon_towards_the_transport(epsilon):
    cost = torch.rand(2, 6, 6, dtype=torch.float64)
    warm = sinkhorn(cost, epsilon=epsilon, max_iter=2000)
    cool = sinkhorn(cost, epsilon=epsilon / 2, max_iter=4000)
    assert (cool.value <= warm.value + 1e-6).all()
    assert (cool.value_linear <= warm.value_linear + 1e-6).all()
