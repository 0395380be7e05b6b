"""The specification itself, against exact solvers, POT, a loop over scalars, and gradcheck."""

import math

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from optical import reference
from optical.testing import problems, random_problem

ALL = {problem.name: problem for problem in problems()}


def run(problem, **changes):
    arguments = dict(vars(problem), **changes)
    arguments.pop("name")
    outputs = reference.sinkhorn(**arguments)
    names = ("value", "value_linear", "f", "g", "marginal_error", "n_iter")
    return dict(zip(names, outputs, strict=True))


def plan_of(problem, out):
    return reference.plan(
        problem.cost, problem.log_a, problem.log_b, problem.epsilon, out["f"], out["g"]
    )


def scalar_sinkhorn(cost, log_a, log_b, epsilon, max_iter):
    """One problem, one number at a time, straight from the equations."""
    rows = [i for i in range(len(log_a)) if log_a[i] > -math.inf]
    columns = [j for j in range(len(log_b)) if log_b[j] > -math.inf]
    f, g = [0.0] * len(log_a), [0.0] * len(log_b)

    def weight(log_mass, potential, i, j):
        return math.exp(log_mass + (potential - cost[i][j]) / epsilon)

    for _ in range(max_iter):
        for i in rows:
            total = sum(weight(log_b[j], g[j], i, j) for j in columns)
            f[i] = -epsilon * math.log(total) if total else 0.0
        for j in columns:
            total = sum(weight(log_a[i], f[i], i, j) for i in rows)
            g[j] = -epsilon * math.log(total) if total else 0.0
    plan = {(i, j): weight(log_a[i] + log_b[j], f[i] + g[j], i, j) for i in rows for j in columns}
    linear = sum(p * cost[i][j] for (i, j), p in plan.items() if p)
    entropy = sum(p * (math.log(p) - log_a[i] - log_b[j]) - p for (i, j), p in plan.items() if p)
    mass = sum(math.exp(log_a[i]) for i in rows) * sum(math.exp(log_b[j]) for j in columns)
    error = sum(abs(sum(plan[i, j] for j in columns) - math.exp(log_a[i])) for i in rows)
    error += sum(abs(sum(plan[i, j] for i in rows) - math.exp(log_b[j])) for j in columns)
    empty = not rows or not columns
    return linear + epsilon * (entropy + mass), linear, f, g, 0.0 if empty else error


SMALL = [name for name, problem in ALL.items() if problem.cost.numel() <= 1000]


@pytest.mark.parametrize("name", SMALL)
def test_matches_the_equations_written_out_for_scalars(name):
    problem = ALL[name]
    out = run(problem)
    for index in range(len(problem.cost)):
        expected = scalar_sinkhorn(
            problem.cost[index].tolist(),
            problem.log_a[index].tolist(),
            problem.log_b[index].tolist(),
            problem.epsilon[index].item(),
            problem.max_iter,
        )
        for field, wanted in zip(out, expected, strict=False):
            wanted = torch.tensor(wanted, dtype=torch.float64)
            torch.testing.assert_close(out[field][index], wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ALL)
def test_every_output_is_finite(name):
    for field, tensor in run(ALL[name]).items():
        assert tensor.isfinite().all(), field


@pytest.mark.parametrize("epsilon", [0.1, 0.01, 0.002])
def test_approaches_the_exact_assignment(epsilon):
    problem = random_problem("assignment", 3, 8, 8, epsilon=epsilon, max_iter=3000)
    out = run(problem)
    for cost, value, error in zip(
        problem.cost.numpy(), out["value_linear"], out["marginal_error"], strict=True
    ):
        exact = cost[linear_sum_assignment(cost)].sum() / 8
        assert exact - error <= value <= exact + epsilon * math.log(8) + error


def test_approaches_the_exact_transport_of_general_marginals():
    problem = ALL["marginals"]
    for epsilon in (0.1, 0.01):
        out = run(problem, epsilon=torch.full((3,), epsilon).double(), max_iter=3000)
        for i in range(3):
            a, b = problem.log_a[i].exp().numpy(), problem.log_b[i].exp().numpy()
            cost = problem.cost[i].numpy()
            exact = (ot.emd(a, b, cost) * cost).sum()
            # The entropy of a plan is at most that of either marginal.
            slack = epsilon * -(a * np.log(a)).sum() + out["marginal_error"][i].item()
            assert exact - slack <= out["value_linear"][i] <= exact + slack


@pytest.mark.parametrize("name", ["7x5", "marginals", "equal_costs"])
def test_agrees_with_pot_in_both_conventions_of_the_entropy(name):
    problem = ALL[name]
    out = run(problem, max_iter=2000)
    plans = plan_of(problem, out)
    for i in range(len(problem.cost)):
        a, b = problem.log_a[i].exp().numpy(), problem.log_b[i].exp().numpy()
        epsilon, cost = problem.epsilon[i].item(), problem.cost[i].numpy()
        kullback = ot.solve(cost, a, b, reg=epsilon, reg_type="KL", max_iter=10000, tol=1e-13)
        entropy = ot.solve(cost, a, b, reg=epsilon, reg_type="entropy", max_iter=10000, tol=1e-13)
        np.testing.assert_allclose(plans[i].numpy(), kullback.plan, atol=1e-9)
        value = out["value"][i].item()
        assert value == pytest.approx(kullback.value, abs=1e-9)
        # KL(P | ab) = sum P log P + H(a) + H(b): POT's entropy omits the marginals.
        marginals = -(a * np.log(a)).sum() - (b * np.log(b)).sum()
        assert value == pytest.approx(entropy.value + epsilon * marginals, abs=1e-9)


def test_closed_forms():
    two = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
    half = torch.full((1, 2), math.log(0.5), dtype=torch.float64)
    epsilon = torch.tensor([0.3], dtype=torch.float64)
    _, linear, f, g, *_ = reference.sinkhorn(two, half, half, epsilon, 50)
    odds = math.exp(-1 / 0.3)
    assert linear.item() == pytest.approx(odds / (1 + odds))
    plan = reference.plan(two, half, half, epsilon, f, g)
    assert plan[0, 0, 0].item() == pytest.approx(0.5 / (1 + odds))

    diracs = run(ALL["1x9"])
    torch.testing.assert_close(diracs["value_linear"], ALL["1x9"].cost.mean((1, 2)))
    torch.testing.assert_close(diracs["value"], diracs["value_linear"])
    constant = run(ALL["equal_costs"])
    torch.testing.assert_close(constant["value"], torch.full((3,), 0.5, dtype=torch.float64))


def test_value_is_transport_plus_generalised_divergence_before_convergence():
    problem = ALL["unequal_mass"]
    out = run(problem, max_iter=2)
    plan = plan_of(problem, out)
    product = (problem.log_a[:, :, None] + problem.log_b[:, None, :]).exp()
    divergence = (plan * (plan / product).log() - plan + product).sum((1, 2))
    torch.testing.assert_close(out["value"], out["value_linear"] + problem.epsilon * divergence)


def test_stops_after_the_first_iteration_whose_rows_are_close():
    problem = ALL["epsilon_per_problem"]
    tol = 0.03
    stopped = run(problem, tol=tol, max_iter=500)
    assert len(set(stopped["n_iter"].tolist())) == 3
    for index in range(3):
        errors = []
        for k in range(1, stopped["n_iter"][index].item() + 1):
            fixed = run(problem, max_iter=k)
            rows = plan_of(problem, fixed)[index].sum(1)
            errors.append((rows - problem.log_a[index].exp()).abs().sum().item())
        assert errors[-1] <= tol < min(errors[:-1], default=math.inf)
        for field in ("value", "value_linear", "f", "g", "marginal_error"):
            assert torch.equal(stopped[field][index], fixed[field][index])


def test_an_unreachable_tolerance_runs_every_iteration():
    assert run(ALL["7x5"], tol=1e-300, max_iter=7)["n_iter"].tolist() == [7, 7, 7]


def test_empty_sides_cost_nothing_and_do_not_iterate():
    problem = ALL["one_fully_masked"]
    for tol in (0.0, 1e-6):
        out = run(problem, tol=tol)
        for tensor in out.values():
            assert not tensor[1:].any()
        assert out["n_iter"][0] > 0


def test_a_row_without_an_allowed_pair_keeps_a_zero_potential():
    problem = ALL["forbidden_lines"]
    out = run(problem)
    assert out["f"][0, 4] == 0 and out["g"][1, 3] == 0
    assert not plan_of(problem, out)[problem.cost == math.inf].any()
    assert out["value_linear"][2] == 0
    # Nothing can move, so the whole divergence remains: epsilon * sum a * sum b.
    assert out["value"][2].item() == pytest.approx(problem.epsilon[2].item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keeps_the_dtype_it_is_given(dtype):
    problem = ALL["7x5"].to(dtype)
    out = run(problem)
    for field, tensor in out.items():
        assert tensor.dtype == (torch.int32 if field == "n_iter" else dtype)


@pytest.mark.parametrize("name", ["7x5", "ragged", "one_fully_masked", "forbidden_lines"])
def test_gradcheck_of_every_output_and_input(name):
    problem = ALL[name]
    cost, log_a, log_b = (
        x[:, :4, :3].clone() if x.dim() == 3 else x[:, : 3 + (x is problem.log_a)].clone()
        for x in (problem.cost, problem.log_a, problem.log_b)
    )
    allowed = (cost != math.inf) & (log_a > -math.inf)[:, :, None] & (log_b > -math.inf)[:, None, :]
    masses = [log_a > -math.inf, log_b > -math.inf]

    def outputs(free_cost, free_a, free_b, epsilon):
        # Infinities cannot be perturbed, so gradcheck moves the finite entries alone.
        fixed = torch.where(allowed, free_cost, cost)
        a, b = torch.where(masses[0], free_a, log_a), torch.where(masses[1], free_b, log_b)
        value, linear, f, g, *_ = reference.sinkhorn(fixed, a, b, epsilon, 4)
        return value, linear, f, g, reference.plan(fixed, a, b, epsilon, f, g)

    inputs = [x.nan_to_num(0, 0, 0).requires_grad_() for x in (cost, log_a, log_b)]
    epsilon = torch.full((len(cost),), 0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(outputs, (*inputs, epsilon))


@pytest.mark.parametrize(
    "name", ["nan_padding", "forbidden_lines", "one_fully_masked", "tiny_mass"]
)
@pytest.mark.parametrize("tol", [0.0, 1e-3])
def test_unrolled_gradients_are_finite_and_exactly_zero_where_nothing_is_read(name, tol):
    problem = ALL[name]
    inputs = [x.clone().requires_grad_() for x in (problem.cost, problem.log_a, problem.log_b)]
    value, linear, *_ = reference.sinkhorn(*inputs, problem.epsilon, 10, tol)
    (value + linear).sum().backward()
    for tensor in inputs:
        assert tensor.grad.isfinite().all()
        if tensor.dim() == 2:
            assert not tensor.grad[tensor == -math.inf].any()
    absent = (problem.log_a == -math.inf)[:, :, None] | (problem.log_b == -math.inf)[:, None, :]
    assert not inputs[0].grad[absent | (problem.cost == math.inf)].any()
