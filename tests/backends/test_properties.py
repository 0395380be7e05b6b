"""Properties of optimal transport, tested on random problems, and closed forms."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from optical import Status, sinkhorn, sinkhorn_divergence, sinkhorn_vectors

SETTINGS = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@st.composite
def problems(draw):
    """Draw cost, log_a, log_b, epsilon in float64 with 1 to 9 rows and columns."""
    n, m, seed = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(2, n, m, generator=generator).double()
    log_a = torch.randn(2, n, generator=generator).double().log_softmax(1)
    log_b = torch.randn(2, m, generator=generator).double().log_softmax(1)
    return cost, log_a, log_b, draw(st.sampled_from([0.05, 0.2, 1.0]))


def solve(cost, log_a, log_b, epsilon, **options):
    return sinkhorn(cost, log_a, log_b, epsilon=epsilon, **({"max_iter": 400} | options))


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@SETTINGS
@given(problems())
def test_transposing_the_problem_transposes_the_plan(problem):
    cost, log_a, log_b, epsilon = problem
    straight, turned = solve(*problem), solve(cost.mT, log_b, log_a, epsilon)
    error = (straight.marginal_error + turned.marginal_error).max().item()
    close(turned.plan().mT, straight.plan(), 1e-6 + 10 * error)
    close(turned.value, straight.value, 1e-6 + 10 * error)


@SETTINGS
@given(problems(), st.randoms(use_true_random=False))
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
@given(problems(), st.floats(-5, 5))
def test_a_constant_added_to_the_cost_is_added_to_the_value(problem, constant):
    cost, *rest = problem
    straight, shifted = solve(*problem, max_iter=9), solve(cost + constant, *rest, max_iter=9)
    close(shifted.value, straight.value + constant, 1e-10)
    close(shifted.value_linear, straight.value_linear + constant, 1e-10)
    close(shifted.plan(), straight.plan(), 1e-10)


@SETTINGS
@given(problems(), st.floats(0.1, 1000))
def test_scaling_cost_and_epsilon_scales_the_value(problem, factor):
    cost, log_a, log_b, epsilon = problem
    straight = solve(*problem, max_iter=9)
    scaled = solve(factor * cost, log_a, log_b, factor * epsilon, max_iter=9)
    torch.testing.assert_close(scaled.value, factor * straight.value, rtol=1e-9, atol=1e-9)
    close(scaled.plan(), straight.plan(), 1e-9)


@SETTINGS
@given(problems(), st.integers(0, 3), st.integers(0, 3))
def test_padding_does_not_change_the_solution(problem, more_rows, more_columns):
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
@given(problems())
def test_marginal_error_is_that_of_the_plan(problem):
    _cost, log_a, log_b, _epsilon = problem
    for max_iter in (1, 3, 100):
        result = solve(*problem, max_iter=max_iter)
        rows, columns = result.plan().sum(2), result.plan().sum(1)
        error = (rows - log_a.exp()).abs().sum(1) + (columns - log_b.exp()).abs().sum(1)
        close(error, result.marginal_error, 1e-12)
        close(columns, log_b.exp(), 1e-12)


@SETTINGS
@given(problems())
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
    # The last constraint is redundant, and infeasible if the masses sum to 1 only up to rounding.
    actual = linprog(
        cost.flatten().numpy(), A_eq=constraints[:-1].numpy(), b_eq=masses[:-1].numpy()
    )
    assert actual.success
    return actual.fun


@SETTINGS
@given(problems())
def test_the_gradient_of_the_value_has_the_marginals_of_a_plan(problem):
    cost, log_a, log_b, epsilon = problem
    cost = cost.requires_grad_()
    result = solve(cost, log_a, log_b, epsilon, max_iter=1000)
    (gradient,) = torch.autograd.grad(result.value.sum(), cost)
    slack = 1e-8 + result.marginal_error.max().item()
    close(gradient.sum(2), log_a.exp(), slack)
    close(gradient.sum(1), log_b.exp(), slack)


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.01])
def test_the_value_decreases_with_epsilon(epsilon):
    cost = torch.rand(2, 6, 6, dtype=torch.float64)
    warm = sinkhorn(cost, epsilon=epsilon, max_iter=2000)
    cool = sinkhorn(cost, epsilon=epsilon / 2, max_iter=4000)
    assert (cool.value <= warm.value + 1e-6).all()
    assert (cool.value_linear <= warm.value_linear + 1e-6).all()


PENALTIES = st.sampled_from([1.0, (0.3, None), (None, 2.0), (0.2, 5.0)])


def swapped(rho):
    return rho[::-1] if isinstance(rho, tuple) else rho


@SETTINGS
@given(problems(), PENALTIES, st.floats(-1, 1))
def test_penalised_problems_transpose_permute_and_scale(problem, rho, more):
    cost, log_a, log_b, epsilon = problem
    log_a = log_a + more
    straight = solve(cost, log_a, log_b, epsilon, rho=rho, max_iter=2000)
    other = solve(cost.mT, log_b, log_a, epsilon, rho=swapped(rho), max_iter=2000)
    close(other.plan().mT, straight.plan(), 1e-6)
    close(other.value, straight.value, 1e-6)
    flipped = solve(cost.flip(1), log_a.flip(1), log_b, epsilon, rho=rho, max_iter=2000)
    close(flipped.plan().flip(1), straight.plan(), 1e-9)
    larger = rho * 3 if isinstance(rho, float) else tuple(x and 3 * x for x in rho)
    scaled = solve(3 * cost, log_a, log_b, 3 * epsilon, rho=larger, max_iter=2000)
    close(scaled.value, 3 * straight.value, 1e-8)


@SETTINGS
@given(problems(), PENALTIES)
def test_weaker_penalties_have_smaller_values(problem, rho):
    fixed = solve(*problem, max_iter=2000)
    slack = 1e-6 + 10 * fixed.marginal_error.max().item()
    strong, weak = (
        solve(
            *problem,
            rho=tuple(x and factor * x for x in (rho if isinstance(rho, tuple) else (rho, rho))),
            max_iter=2000,
        )
        for factor in (4.0, 1.0)
    )
    assert (weak.value <= strong.value + 1e-8).all()
    assert (strong.value <= fixed.value + slack).all()


@SETTINGS
@given(problems(), st.sampled_from([{"omega": 1.5}, {"anderson": 4}, {"anneal": (2.0, 0.5)}]))
def test_accelerated_iterations_converge_to_the_same_plan(problem, options):
    plain = solve(*problem, max_iter=3000, tol=1e-10)
    fast = solve(*problem, max_iter=3000, tol=1e-10, **options)
    assert (fast.status == Status.CONVERGED).all()
    close(fast.plan(), plain.plan(), 1e-7)


@SETTINGS
@given(problems())
def test_the_divergence_is_symmetric_and_not_negative(problem):
    _cost, log_a, log_b, _epsilon = problem
    x, y = torch.randn(2, log_a.shape[1], 3).double(), torch.randn(2, log_b.shape[1], 3).double()
    options = {"epsilon": 0.7, "cost": "sqeuclidean", "max_iter": 1000, "tol": 1e-11}
    there = sinkhorn_divergence(x, y, log_a, log_b, **options)
    back = sinkhorn_divergence(y, x, log_b, log_a, **options)
    close(there, back, 1e-7)
    assert (there > -1e-7).all()


def test_a_batch_of_100000_problems():
    cost = torch.rand(100_000, 3, 2)
    result = sinkhorn(cost, epsilon=0.2, max_iter=5)
    assert result.value.isfinite().all() and result.n_iter.eq(5).all()
    for i in (0, 54_321, 99_999):
        alone = sinkhorn(cost[i : i + 1], epsilon=0.2, max_iter=5)
        close(result.value[i : i + 1], alone.value)


# ------------------------------------------------------------------- closed forms on the real line


def gaussian(mean, variance, mass=1.0):
    """Return a grid of points (1, n, 1) with the log-masses of a Gaussian."""
    points = torch.linspace(-9, 9, 400, dtype=torch.float64)
    log_mass = (-((points - mean) ** 2) / (2 * variance)).log_softmax(0) + math.log(mass)
    return points[None, :, None], log_mass[None]


def test_the_value_between_gaussians_has_a_closed_form():
    """Janati, Muzellec, Peyré, Cuturi (arXiv 2006.02572), theorem 1; epsilon is 2 sigma ** 2."""
    for mean, a, b, epsilon in ((1.0, 0.5, 1.5, 1.0), (-2.0, 1.0, 0.3, 0.4)):
        (x, log_a), (y, log_b) = gaussian(0.0, a), gaussian(mean, b)
        options = {"epsilon": epsilon, "cost": "sqeuclidean", "max_iter": 300, "tol": 1e-10}
        actual = sinkhorn_vectors(x, y, log_a, log_b, **options).value.item()
        s = epsilon / 2
        root = math.sqrt(4 * a * b + s**2)
        expected = mean**2 + a + b - root + s * (1 - math.log(2 * s)) + s * math.log(root + s)
        assert actual == pytest.approx(expected, abs=1e-6)


def test_the_value_between_unbalanced_gaussians_has_quadratic_potentials():
    """The potentials are quadratic, so the fixed point has three coefficients per side."""
    (mean_a, var_a, mass_a), (mean_b, var_b, mass_b) = (0.3, 0.5, 0.8), (-1.0, 1.2, 1.7)
    epsilon, rho = 0.6, 2.5

    def update(quadratic, mean, variance, mass):
        """-rho / (rho + epsilon) * epsilon * log integral exp((g(y) - (x - y)^2) / epsilon)."""
        g2, g1, g0 = quadratic
        # The integrand is exp(-p y^2 / 2 + q y + r), where q is linear in x.
        p = 1 / variance - 2 * (g2 - 1) / epsilon
        q0, q1 = mean / variance + g1 / epsilon, 2 / epsilon
        r = g0 / epsilon - mean**2 / (2 * variance) + math.log(mass / math.sqrt(variance * p))
        log_integral = (q1**2 / (2 * p) - 1 / epsilon, q0 * q1 / p, q0**2 / (2 * p) + r)
        return tuple(-rho / (rho + epsilon) * epsilon * c for c in log_integral)

    f = g = (0.0, 0.0, 0.0)
    for _ in range(500):
        f = update(g, mean_b, var_b, mass_b)
        g = update(f, mean_a, var_a, mass_a)

    def transported(quadratic, mean, variance, mass):
        """Mass of the plan: the integral of exp(-f / rho) with respect to the measure."""
        f2, f1, f0 = (-c / rho for c in quadratic)
        p, q = 1 / variance - 2 * f2, mean / variance + f1
        exponent = q**2 / (2 * p) + f0 - mean**2 / (2 * variance)
        return mass / math.sqrt(variance * p) * math.exp(exponent)

    mass = transported(f, mean_a, var_a, mass_a)
    assert mass == pytest.approx(transported(g, mean_b, var_b, mass_b))
    expected = rho * (mass_a + mass_b) + epsilon * mass_a * mass_b - (2 * rho + epsilon) * mass
    (x, log_a), (y, log_b) = gaussian(mean_a, var_a, mass_a), gaussian(mean_b, var_b, mass_b)
    actual = sinkhorn_vectors(
        x, y, log_a, log_b, epsilon=epsilon, rho=rho, cost="sqeuclidean", max_iter=500
    )
    assert actual.value.item() == pytest.approx(expected, abs=1e-6)
    assert actual.plan().sum().item() == pytest.approx(mass, abs=1e-6)
