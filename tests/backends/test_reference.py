"""The specification itself: exact solvers, POT, loops over scalars, differences, autograd."""

import math
from dataclasses import replace

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from optical import Status
from optical.backends import reference
from optical.backends.dense import PaddedProblem
from optical.backends.problem import GRADIENTS
from optical.testing.cases import option_problems, plain_problems, problems, random_problem

ALL = {problem.name: problem for problem in problems()}
PLAIN = [problem.name for problem in plain_problems()]
OPTIONS = [problem.name for problem in option_problems()]
D = torch.float64


def run(problem, gradient="envelope", **changes):
    """The outputs by name, of problems padded and with their cost."""
    given = PaddedProblem(replace(problem, **changes).arguments(gradient)).given
    return reference.forward(given)._asdict()


def plan_of(problem, out):
    given = PaddedProblem(problem.arguments()).given
    return reference.plan(given.x, given.log_a, given.log_b, given.epsilon, out["f"], out["g"])


def scalar_sinkhorn(problem, index, max_iter):
    """One problem, one number at a time, straight from the equations of the module."""
    p = problem
    cost, log_a, log_b = p.cost[index].tolist(), p.log_a[index].tolist(), p.log_b[index].tolist()
    epsilon = p.epsilon[index].item()
    rows = [i for i in range(len(log_a)) if log_a[i] > -math.inf]
    columns = [j for j in range(len(log_b)) if log_b[j] > -math.inf]
    f = [0.0] * len(log_a) if p.f0 is None else p.f0[index].tolist()
    g = [0.0] * len(log_b) if p.g0 is None else p.g0[index].tolist()
    f = [x if i in rows and not all(math.isinf(cost[i][j]) for j in columns) else 0.0
         for i, x in enumerate(f)]  # fmt: skip
    g = [x if j in columns and not all(math.isinf(cost[i][j]) for i in rows) else 0.0
         for j, x in enumerate(g)]  # fmt: skip

    def weight(log_mass, potential, i, j, temperature):
        return math.exp(log_mass + (potential - cost[i][j]) / temperature)

    def shrink(rho, temperature):
        return 1.0 if rho == math.inf else rho / (rho + temperature)

    for k in range(max_iter if rows and columns else 0):
        heat = max(epsilon, p.anneal_start * p.anneal_ratio**k) if p.anneal_start else epsilon
        omega = 1.0 if k == 0 or heat != epsilon else p.omega
        for i in rows:
            total = sum(weight(log_b[j], g[j], i, j, heat) for j in columns)
            least = -heat * math.log(total) if total else 0.0
            f[i] = (1 - omega) * f[i] + omega * shrink(p.rho_a, heat) * least
        for j in columns:
            total = sum(weight(log_a[i], f[i], i, j, heat) for i in rows)
            least = -heat * math.log(total) if total else 0.0
            g[j] = (1 - omega) * g[j] + omega * shrink(p.rho_b, heat) * least
    if not rows or not columns:
        return {"value": 0.0, "value_linear": 0.0, "f": f, "g": g, "marginal_error": 0.0}
    plan = {
        (i, j): weight(log_a[i] + log_b[j], f[i] + g[j], i, j, epsilon)
        for i in rows
        for j in columns
    }
    linear = sum(x * cost[i][j] for (i, j), x in plan.items() if x)
    entropy = sum(x * (math.log(x) - log_a[i] - log_b[j]) - x for (i, j), x in plan.items() if x)
    mass = sum(math.exp(log_a[i]) for i in rows) * sum(math.exp(log_b[j]) for j in columns)
    value, error = linear + epsilon * (entropy + mass), 0.0
    for rho, lines, log_mass, potential, sums in (
        (p.rho_a, rows, log_a, f, [sum(plan[i, j] for j in columns) for i in rows]),
        (p.rho_b, columns, log_b, g, [sum(plan[i, j] for i in rows) for j in columns]),
    ):
        for line, total in zip(lines, sums, strict=True):
            wanted = math.exp(log_mass[line])
            if rho != math.inf:
                value += rho * (total * math.log(total / wanted) if total else 0.0)
                value += rho * (wanted - total)
                wanted = wanted * math.exp(-potential[line] / rho) if total else 0.0
            error += abs(total - wanted)
    return {"value": value, "value_linear": linear, "f": f, "g": g, "marginal_error": error}


SMALL = [name for name in (*PLAIN, *OPTIONS) if ALL[name].x.numel() <= 1000 and not ALL[name].tol]


@pytest.mark.parametrize("name", SMALL)
def test_matches_the_equations_written_out_for_scalars(name):
    problem = ALL[name]
    max_iter = min(problem.max_iter, 25)
    out = run(problem, max_iter=max_iter)
    for index in range(len(problem.epsilon)):
        expected = scalar_sinkhorn(problem, index, max_iter)
        for field, wanted in expected.items():
            wanted = torch.tensor(wanted, dtype=D)
            scale = problem.scale
            torch.testing.assert_close(out[field][index], wanted, rtol=1e-9, atol=1e-11 * scale)


@pytest.mark.parametrize("name", ALL)
def test_every_output_is_finite(name):
    for field, tensor in run(ALL[name], "implicit").items():
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
        warm = torch.full((3,), epsilon).double()
        out = run(problem, epsilon=warm, max_iter=3000, tol=1e-6)
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
    out = run(problem, max_iter=2000, tol=1e-12)
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
        for field, tensor in out.items():
            expected = int(Status.EMPTY) if field == "status" else 0
            assert (tensor[1:] == expected).all(), field
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
    for field, tensor in run(ALL["everything"].to(dtype)).items():
        assert tensor.dtype == (torch.int32 if field in ("n_iter", "status") else dtype)


# ------------------------------------------------------------------------------------- the status


def test_status_of_each_way_to_end():
    base = ALL["7x5"]
    assert run(base)["status"].tolist() == [Status.MAX_ITER] * 3
    assert run(base, tol=1e-3, max_iter=200)["status"].tolist() == [Status.CONVERGED] * 3
    assert run(ALL["one_fully_masked"])["status"].tolist() == [1, Status.EMPTY, Status.EMPTY]
    unequal = base.log_a + torch.tensor([[0.0], [0.0009], [0.0011]])
    assert run(base, log_a=unequal)["status"].tolist() == [1, 1, Status.INFEASIBLE]
    for relaxed in ({"rho_a": 1.0}, {"rho_b": 1.0}):
        assert run(base, log_a=unequal, **relaxed)["status"].tolist() == [1, 1, 1]
    forbidden = base.x.clone()
    forbidden[1, 2] = math.inf
    for rho_a, status in ((math.inf, Status.INFEASIBLE), (1.0, Status.MAX_ITER)):
        assert run(base, x=forbidden, rho_a=rho_a)["status"].tolist() == [1, status, 1]
    # The side that is relaxed is not the one with the line that cannot carry its mass.
    assert run(base, x=forbidden, rho_b=1.0)["status"].tolist() == [1, Status.INFEASIBLE, 1]


NOT_NUMBERS = [
    *(("x", value) for value in (math.nan, -math.inf)),
    *(("log_a", value) for value in (math.nan, math.inf)),
    *(("log_b", value) for value in (math.nan, math.inf)),
    *(("epsilon", value) for value in (math.nan, math.inf, 0.0, -0.1)),
    *((name, value) for name in ("f0", "g0") for value in (math.nan, math.inf)),
]


@pytest.mark.parametrize("options", [{}, {"anderson": 3, "tol": 1e-6}], ids=["plain", "anderson"])
@pytest.mark.parametrize(("field", "value"), NOT_NUMBERS)
def test_what_is_not_a_number_spoils_its_own_problem_alone(field, value, options):
    base = replace(ALL["ragged"], f0=torch.zeros(4, 12).double(), g0=torch.zeros(4, 17).double())
    broken = getattr(base, field).clone()
    broken[2].view(-1)[0] = value
    for max_iter in (0, 6):
        clean = run(base, "implicit", max_iter=max_iter, **options)
        out = run(base, "implicit", max_iter=max_iter, **options, **{field: broken})
        assert out["status"][2] == Status.INFEASIBLE and out["n_iter"][2] == max_iter
        for name in ("value", "value_linear", "marginal_error"):
            assert out[name][2].isnan()
        assert torch.equal(out["f"][2].isnan(), base.log_a[2] > -math.inf)
        assert torch.equal(out["g"][2].isnan(), base.log_b[2] > -math.inf)
        assert not out["f"][2, 7:].any()
        others = [0, 1, 3]
        for name in clean:
            assert torch.equal(out[name][others], clean[name][others]), name


def test_an_empty_problem_may_hold_anything():
    base = ALL["one_fully_masked"]
    epsilon = base.epsilon.clone()
    epsilon[1:] = math.nan
    out = run(base, epsilon=epsilon)
    assert out["status"].tolist() == [Status.MAX_ITER, Status.EMPTY, Status.EMPTY]
    assert not out["value"][1:].any() and not out["f"][1:].any() and not out["n_iter"][1:].any()


# ------------------------------------------------------------------------------------ the options


@pytest.mark.parametrize("reverse", [False, True])
def test_penalties_agree_with_pot(reverse):
    problem = ALL["marginals"]
    rho = (0.6, 2.0)[:: -1 if reverse else 1]
    out = run(problem, rho_a=rho[0], rho_b=rho[1], max_iter=500)
    plans = plan_of(problem, out)
    for i in range(3):
        a, b = problem.log_a[i].exp().numpy(), problem.log_b[i].exp().numpy()
        cost, epsilon = problem.x[i].numpy(), problem.epsilon[i].item()
        plan, _ = ot.unbalanced.sinkhorn_unbalanced(
            a, b, cost, epsilon, rho, reg_type="kl", numItermax=20000, stopThr=1e-14, log=True
        )
        np.testing.assert_allclose(plans[i].numpy(), plan, atol=1e-9)
        objective = (plan * cost).sum() + epsilon * kullback(plan, np.outer(a, b))
        objective += rho[0] * kullback(plan.sum(1), a) + rho[1] * kullback(plan.sum(0), b)
        assert out["value"][i].item() == pytest.approx(objective, abs=1e-8)


def kullback(p, q):
    return (np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / q), 0) - p + q).sum()


@pytest.mark.parametrize("rho", [(0.3, 2.0), (0.3, math.inf), (math.inf, 1.0)])
def test_no_plan_nearby_has_a_smaller_objective(rho):
    """The value is the primal objective, and the plan returned is its minimum."""
    problem = ALL["marginals"]
    out = run(problem, rho_a=rho[0], rho_b=rho[1], max_iter=3000, tol=1e-13)
    plan = plan_of(problem, out)
    a, b, epsilon = problem.log_a.exp(), problem.log_b.exp(), problem.epsilon

    def objective(plan):
        def kl(p, q):
            return (p * (p / q).log() - p + q).flatten(1).sum(1)

        value = (plan * problem.x).sum((1, 2)) + epsilon * kl(plan, a[:, :, None] * b[:, None])
        value = value + (rho[0] * kl(plan.sum(2), a) if rho[0] < math.inf else 0)
        return value + (rho[1] * kl(plan.sum(1), b) if rho[1] < math.inf else 0)

    torch.testing.assert_close(out["value"], objective(plan))
    for _ in range(20):
        move = 0.05 * torch.randn(plan.shape, dtype=D) * plan
        if rho[0] == math.inf:
            move -= plan / plan.sum(2, keepdim=True) * move.sum(2, keepdim=True)
        if rho[1] == math.inf:
            move -= plan / plan.sum(1, keepdim=True) * move.sum(1, keepdim=True)
        assert (objective(plan + move) > out["value"]).all()


def test_a_strong_penalty_approaches_the_fixed_marginal():
    problem = ALL["7x5"]
    fixed = run(problem, max_iter=300)
    for rho in (1e2, 1e4, 1e6):
        out = run(problem, rho_a=rho, rho_b=rho, max_iter=300)
        assert (out["value"] - fixed["value"]).abs().max() < 10 / rho


def test_unbalanced_diracs_have_a_closed_form():
    """One row, one column: the objective is minimised by hand."""
    cost, epsilon = torch.tensor([[[1.3]]], dtype=D), torch.tensor([0.4], dtype=D)
    a, b, rho_a, rho_b = 0.8, 2.5, 0.7, 1.9
    masses = [torch.full((1, 1), math.log(x), dtype=D) for x in (a, b)]
    out = reference.sinkhorn(cost, *masses, epsilon, 500, rho_a=rho_a, rho_b=rho_b)
    weights = (rho_a + 0.4) * math.log(a) + (rho_b + 0.4) * math.log(b) - 1.3
    mass = math.exp(weights / (rho_a + rho_b + 0.4))
    assert out.value_linear.item() == pytest.approx(1.3 * mass)


def test_over_relaxation_reaches_the_same_plan_in_fewer_iterations():
    problem = replace(ALL["epsilon_0.01"], tol=1e-9, max_iter=4000)
    plain, relaxed = run(problem), run(problem, omega=1.6)
    assert (relaxed["n_iter"] < 0.7 * plain["n_iter"]).all()
    torch.testing.assert_close(relaxed["value"], plain["value"], rtol=0, atol=1e-8)


def test_annealing_reaches_a_cold_plan_in_fewer_iterations():
    problem = replace(
        ALL["epsilon_0.001"], tol=1e-3, max_iter=2000, epsilon=torch.full((2,), 0.003).double()
    )
    plain, annealed = run(problem), run(problem, anneal_start=1.0, anneal_ratio=0.8)
    assert annealed["n_iter"].sum() < plain["n_iter"].sum()
    assert (annealed["status"] == Status.CONVERGED).all()


def test_no_stop_before_the_final_temperature_was_used():
    problem = ALL["equal_costs"]
    for iterations in range(2, 12):
        out = run(
            problem, tol=0.5, max_iter=50, anneal_start=0.1 * 2.0**iterations, anneal_ratio=0.5
        )
        # Iterations 0 to iterations - 1 are warmer, one more is the first that is measured.
        assert out["n_iter"].tolist() == [iterations + 1] * 3


def test_an_initial_solution_stops_at_once():
    problem = replace(ALL["marginals"], tol=1e-6, max_iter=500)
    found = run(problem, tol=1e-12)
    again = run(problem, f0=found["f"], g0=found["g"])
    assert again["n_iter"].tolist() == [1, 1, 1] and (found["n_iter"] > 5).all()
    held = run(problem, f0=found["f"], g0=found["g"], max_iter=0)
    assert torch.equal(held["f"], found["f"]) and torch.equal(held["value"], found["value"])


@pytest.mark.parametrize("options", [{}, {"rho_a": 0.5, "rho_b": 1.0}, {"anneal_start": 1.0}])
def test_anderson_reaches_the_same_plan_in_fewer_iterations(options):
    problem = replace(ALL["anderson_5"], tol=1e-8, max_iter=2000, **options)
    plain, fast = run(problem, anderson=0), run(problem)
    assert (fast["status"] == Status.CONVERGED).all()
    assert (fast["n_iter"] < 0.6 * plain["n_iter"]).all()
    torch.testing.assert_close(fast["value"], plain["value"], rtol=0, atol=1e-7)
    torch.testing.assert_close(plan_of(problem, fast), plan_of(problem, plain), rtol=0, atol=1e-6)


@pytest.mark.parametrize("memory", [1, 4])
def test_anderson_returns_an_image_and_never_an_extrapolation(memory):
    """g is the column update of f, so that the plan has the columns exactly, whenever it stops."""
    problem = ALL["marginals"]
    for max_iter in range(1, 15):
        out = run(problem, anderson=memory, max_iter=max_iter)
        columns = plan_of(problem, out).sum(1)
        torch.testing.assert_close(columns, problem.log_b.exp(), rtol=1e-9, atol=1e-14)


def test_anderson_written_out_for_one_problem():
    """The same iterates from a loop over one problem with lists and a plain solver."""
    problem = ALL["anderson_5"]
    for index in range(3):
        one = problem.without_padding(index)
        for max_iter in (2, 3, 7, 20):
            out = run(one, max_iter=max_iter, tol=0.0)
            f, g = anderson_by_hand(one, max_iter)
            torch.testing.assert_close(out["f"][0], f, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(out["g"][0], g, rtol=1e-7, atol=1e-9)


def anderson_by_hand(problem, max_iter):
    cost, epsilon = problem.x[0], problem.epsilon[0]
    log_a, log_b = problem.log_a[0], problem.log_b[0]
    g, memory, last, extrapolated = torch.zeros_like(log_b), [], None, False
    for k in range(max_iter):
        f = -epsilon * (log_b + (g - cost) / epsilon).logsumexp(1)
        image = -epsilon * (log_a[:, None] + (f[:, None] - cost) / epsilon).logsumexp(0)
        change = image - g
        error = (log_b.exp() * ((g - image) / epsilon).exp() - log_b.exp()).abs().sum()
        if k == 0:
            g = image
        elif extrapolated and error > last[3]:
            g, memory, last, extrapolated = last[2], [], None, False
        else:
            if last is not None:
                memory = [*memory, (g - last[0], change - last[1])][-problem.anderson :]
            last, start = (g, change, image, error), image
            if memory:
                moves, changes = (torch.stack(x) for x in zip(*memory, strict=True))
                gram = (changes * log_b.exp()) @ changes.T
                gram += 1e-10 * gram.trace() / len(memory) * torch.eye(len(memory), dtype=D)
                gamma = torch.linalg.solve(gram, (changes * log_b.exp()) @ change)
                taken = gamma @ (moves + changes)
                # No drift along the constants, which both marginals leave free.
                start = image - (taken - (log_b.exp() * taken).sum() / log_b.exp().sum())
            g, extrapolated = start, bool(memory)
    return f, image


# ---------------------------------------------------------------------------------- the gradients


def inputs_of(problem):
    given = PaddedProblem(problem.arguments()).given
    return given.x, given.log_a, given.log_b


def upstream_of(outputs):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=generator, dtype=D) for x in outputs]


def written_out(problem, gradient, upstream):
    given = PaddedProblem(problem.arguments(gradient)).given
    out = reference.forward(given)
    grads = reference.backward(*upstream, given, out.f, out.g, out.w, out.z, out.n_iter)
    return grads[0], *grads[2:]


def gradients_of(moving, leaves):
    outputs, upstream = zip(*moving, strict=True)
    return torch.autograd.grad(outputs, leaves, upstream)


def unrolled_by_autograd(problem, upstream=None, fields=("value", "value_linear", "f", "g")):
    given = PaddedProblem(problem.arguments()).given
    leaves = [x.clone().requires_grad_() for x in (given.x, given.log_a, given.log_b)]
    out = reference.forward(given._replace(x=leaves[0], log_a=leaves[1], log_b=leaves[2]))
    outputs = [getattr(out, field) for field in fields]
    upstream = upstream_of(outputs) if upstream is None else upstream
    # Without an iteration the potentials are constants.
    moving = [(x, up) for x, up in zip(outputs, upstream, strict=True) if x.requires_grad]
    return gradients_of(moving, leaves), upstream


@pytest.mark.parametrize("tol", [0.0, 1e-2])
@pytest.mark.parametrize(
    "name",
    [
        n
        for n in (*SMALL, "everything", "cosine_all", "cosine_packed_rho", "clusters")
        if n != "4099_problems"
    ],
)
def test_the_reverse_sweep_equals_autograd(name, tol):
    problem = replace(ALL[name], tol=tol, max_iter=min(12, ALL[name].max_iter))
    expected, upstream = unrolled_by_autograd(problem)
    found = written_out(problem, "unroll", upstream)
    for grad, wanted in zip(found, expected, strict=True):
        scale = max(1.0, wanted.abs().max().item() if wanted.numel() else 1.0)
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-11 * scale)


OPTION_SETS = [
    {},
    {"rho_a": 0.4},
    {"rho_a": 0.4, "rho_b": 1.5},
    {"omega": 1.5},
    {"anneal_start": 2.0, "anneal_ratio": 0.4},
    {"anderson": 2},
]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("ragged", "one_fully_masked", "forbidden_lines")),
        *(("7x5", options) for options in OPTION_SETS),
        ("forbidden_lines", {"rho_a": 0.4, "omega": 1.3, "anneal_start": 1.0}),
    ],
)
def test_gradcheck_of_every_output_and_input(name, options):
    """Finite differences of the reference, whose autograd every other derivative is held to."""
    problem = ALL[name].without_padding(0) if name == "7x5" else ALL[name]
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
        value, linear, f, g, *_ = reference.sinkhorn(fixed, a, b, epsilon, 4, **options)
        return value, linear, f, g, reference.plan(fixed, a, b, epsilon, f, g)

    inputs = [x.nan_to_num(0, 0, 0).requires_grad_() for x in (cost, log_a, log_b)]
    epsilon = torch.full((len(cost),), 0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(outputs, (*inputs, epsilon), fast_mode=True)


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


def on_the_simplex(gradient, log_mass):
    """A gradient of log-masses as felt by changes that keep their sum."""
    mass = log_mass.softmax(1)
    return torch.where(log_mass > -math.inf, gradient - mass * gradient.sum(1, keepdim=True), 0.0)


RHOS = [(math.inf, math.inf), (0.4, math.inf), (math.inf, 0.8), (0.4, 0.8)]


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("name", ["7x5", "ragged", "forbidden_pairs", "marginals"])
def test_implicit_gradients_are_the_total_derivative_at_the_fixed_point(name, rho):
    # No tol: potentials may settle at once where their derivatives do not.
    problem = replace(ALL[name], rho_a=rho[0], rho_b=rho[1], max_iter=150)
    problem = replace(problem, epsilon=problem.epsilon.clamp(min=0.2))
    expected, upstream = unrolled_by_autograd(problem, fields=("value", "value_linear"))
    found = written_out(problem, "implicit", (*upstream, None, None))
    balanced = rho == (math.inf, math.inf)
    for place, (grad, wanted) in enumerate(zip(found, expected, strict=True)):
        if place and balanced:
            log_mass = (problem.log_a, problem.log_b)[place - 1]
            grad, wanted = on_the_simplex(grad, log_mass), on_the_simplex(wanted, log_mass)
        torch.testing.assert_close(grad, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize(
    "name", ["7x5", "ragged", "forbidden_lines", "tiny_mass", "one_fully_masked"]
)
def test_w_and_z_solve_their_system_at_any_iterate(name, rho):
    problem = replace(ALL[name], rho_a=rho[0], rho_b=rho[1], max_iter=3)
    out = run(problem, "implicit")
    plan, epsilon = plan_of(problem, out), problem.epsilon[:, None]
    moved = plan * torch.where(plan > 0, problem.cost, 0.0)
    rows, columns, w, z = plan.sum(2), plan.sum(1), out["w"], out["z"]
    left = rows * (1 + epsilon / rho[0]) * w + (plan @ z[:, :, None])[:, :, 0]
    right = columns * (1 + epsilon / rho[1]) * z + (plan.mT @ w[:, :, None])[:, :, 0]
    torch.testing.assert_close(left, moved.sum(2), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(right, moved.sum(1), rtol=1e-8, atol=1e-10)
    assert not w[rows == 0].any() and not z[columns == 0].any()
    assert (out["residual"] < 1e-8).all()
    if rho == (math.inf, math.inf):
        assert (rows * w).sum(1).abs().max() < 1e-10


@pytest.mark.parametrize("rho", RHOS)
def test_the_envelope_is_the_derivative_of_the_value_at_convergence(rho):
    """Masses of two fixed marginals move on the simplex; otherwise each on its own."""
    problem = replace(ALL["marginals"], rho_a=rho[0], rho_b=rho[1], max_iter=900, tol=1e-13)
    problem = replace(problem, log_b=problem.log_b + (0.3 if min(rho) < math.inf else 0.0))
    expected, upstream = unrolled_by_autograd(problem, fields=("value",))
    found = written_out(problem, "envelope", (*upstream, torch.zeros(3).double(), None, None))
    for place, (grad, wanted) in enumerate(zip(found, expected, strict=True)):
        if place and rho == (math.inf, math.inf):
            log_mass = (problem.log_a, problem.log_b)[place - 1]
            grad, wanted = on_the_simplex(grad, log_mass), on_the_simplex(wanted, log_mass)
        torch.testing.assert_close(grad, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", ["nan_padding", "forbidden_lines", "one_fully_masked", "init"])
def test_written_out_gradients_are_zero_where_nothing_is_read(name, gradient):
    problem = ALL[name]
    given = PaddedProblem(problem.arguments(gradient)).given
    grads = written_out(problem, gradient, upstream_of(reference.forward(given)[:4]))
    for grad, source in zip(grads, (given.x, given.log_a, given.log_b), strict=True):
        assert grad.isfinite().all() and grad.shape == source.shape
    absent = (given.log_a == -math.inf)[:, :, None] | (given.log_b == -math.inf)[:, None, :]
    assert not grads[0][absent | (given.x == math.inf)].any()
    assert not grads[1][given.log_a == -math.inf].any()
    assert not grads[2][given.log_b == -math.inf].any()


def test_the_plan_applied_is_the_plan_times_vectors():
    problem = ALL["everything"]
    given = PaddedProblem(problem.arguments()).given
    out = reference.forward(given)
    plan = plan_of(problem, out._asdict())
    for transpose, log_mass, matrix in ((False, given.log_b, plan), (True, given.log_a, plan.mT)):
        v = torch.randn(*log_mass.shape, 2, dtype=D)
        dirty = torch.where((log_mass == -math.inf)[:, :, None], math.nan, v)
        found = reference.apply_plan(given, out.f, out.g, dirty, transpose)
        torch.testing.assert_close(found, matrix @ v)
