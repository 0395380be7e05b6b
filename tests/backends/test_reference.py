"""The reference, compared with exact solvers, POT, scalar loops, differences and autograd."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from optical import Status
from optical.backends import reference
from optical.backends.dense import PaddedProblem
from optical.backends.iterations import plan as padded_plan
from optical.backends.problem import GRADIENTS
from optical.testing.cases import all_cases, option_cases, plain_cases, random_case

ALL = {case.name: case for case in all_cases()}
PLAIN = [case.name for case in plain_cases()]
OPTIONS = [case.name for case in option_cases()]
D = torch.float64


def run(case, gradient="envelope", **changes):
    """Solve a case, padded and with its cost; the outputs by name."""
    padded = PaddedProblem(replace(case, **changes).problem(gradient)).with_cost
    return reference.forward(padded)._asdict()


def plan_of(case, out):
    padded = PaddedProblem(case.problem()).with_cost
    return padded_plan(padded.x, padded.log_a, padded.log_b, padded.epsilon, out["f"], out["g"])


def scalar_sinkhorn(case, index, max_iter):
    """Solve one problem by loops over scalars, from the equations of the module."""
    cost, log_a, log_b = (
        case.cost[index].tolist(),
        case.log_a[index].tolist(),
        case.log_b[index].tolist(),
    )
    epsilon = case.epsilon[index].item()
    rows = [i for i in range(len(log_a)) if log_a[i] > -math.inf]
    columns = [j for j in range(len(log_b)) if log_b[j] > -math.inf]
    f = [0.0] * len(log_a) if case.f0 is None else case.f0[index].tolist()
    g = [0.0] * len(log_b) if case.g0 is None else case.g0[index].tolist()
    f = [x if i in rows and not all(math.isinf(cost[i][j]) for j in columns) else 0.0
         for i, x in enumerate(f)]  # fmt: skip
    g = [x if j in columns and not all(math.isinf(cost[i][j]) for i in rows) else 0.0
         for j, x in enumerate(g)]  # fmt: skip

    def weight(log_mass, potential, i, j, temperature):
        return math.exp(log_mass + (potential - cost[i][j]) / temperature)

    def shrink(rho, temperature):
        return 1.0 if rho == math.inf else rho / (rho + temperature)

    for k in range(max_iter if rows and columns else 0):
        temperature = (
            max(epsilon, case.anneal_start * case.anneal_ratio**k) if case.anneal_start else epsilon
        )
        omega = 1.0 if k == 0 or temperature != epsilon else case.omega
        for i in rows:
            total = sum(weight(log_b[j], g[j], i, j, temperature) for j in columns)
            least = -temperature * math.log(total) if total else 0.0
            f[i] = (1 - omega) * f[i] + omega * shrink(case.rho_a, temperature) * least
        for j in columns:
            total = sum(weight(log_a[i], f[i], i, j, temperature) for i in rows)
            least = -temperature * math.log(total) if total else 0.0
            g[j] = (1 - omega) * g[j] + omega * shrink(case.rho_b, temperature) * least
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
    for rho, indices, log_mass, potential, sums in (
        (case.rho_a, rows, log_a, f, [sum(plan[i, j] for j in columns) for i in rows]),
        (case.rho_b, columns, log_b, g, [sum(plan[i, j] for i in rows) for j in columns]),
    ):
        for index, total in zip(indices, sums, strict=True):
            target = math.exp(log_mass[index])
            if rho != math.inf:
                value += rho * (total * math.log(total / target) if total else 0.0)
                value += rho * (target - total)
                target = target * math.exp(-potential[index] / rho) if total else 0.0
            error += abs(total - target)
    return {"value": value, "value_linear": linear, "f": f, "g": g, "marginal_error": error}


SMALL = [name for name in (*PLAIN, *OPTIONS) if ALL[name].x.numel() <= 1000 and not ALL[name].tol]


@pytest.mark.parametrize("name", SMALL)
def test_agrees_with_loops_over_scalars(name):
    case = ALL[name]
    max_iter = min(case.max_iter, 25)
    out = run(case, max_iter=max_iter)
    for index in range(len(case.epsilon)):
        expected = scalar_sinkhorn(case, index, max_iter)
        for field, truth in expected.items():
            truth = torch.tensor(truth, dtype=D)
            scale = case.scale
            torch.testing.assert_close(out[field][index], truth, rtol=1e-9, atol=1e-11 * scale)


@pytest.mark.parametrize("name", ALL)
def test_every_output_is_finite(name):
    for field, tensor in run(ALL[name], "implicit").items():
        assert tensor.isfinite().all(), field


@pytest.mark.parametrize("epsilon", [0.1, 0.01, 0.002])
def test_approaches_the_optimal_assignment(epsilon):
    case = random_case("assignment", 3, 8, 8, epsilon=epsilon, max_iter=3000)
    out = run(case)
    for cost, value, error in zip(
        case.cost.numpy(), out["value_linear"], out["marginal_error"], strict=True
    ):
        exact = cost[linear_sum_assignment(cost)].sum() / 8
        assert exact - error <= value <= exact + epsilon * math.log(8) + error


def test_approaches_the_optimal_transport_of_general_marginals():
    ot = pytest.importorskip("ot", reason="the package POT is not installed")
    case = ALL["marginals"]
    for epsilon in (0.1, 0.01):
        warm = torch.full((3,), epsilon).double()
        out = run(case, epsilon=warm, max_iter=3000, tol=1e-6)
        for i in range(3):
            a, b = case.log_a[i].exp().numpy(), case.log_b[i].exp().numpy()
            cost = case.cost[i].numpy()
            exact = (ot.emd(a, b, cost) * cost).sum()
            # The entropy of a plan is at most that of either marginal.
            slack = epsilon * -(a * np.log(a)).sum() + out["marginal_error"][i].item()
            assert exact - slack <= out["value_linear"][i] <= exact + slack


@pytest.mark.parametrize("name", ["7x5", "marginals", "equal_costs"])
def test_agrees_with_pot_for_both_definitions_of_the_entropy(name):
    ot = pytest.importorskip("ot", reason="the package POT is not installed")
    case = ALL[name]
    out = run(case, max_iter=2000, tol=1e-12)
    plans = plan_of(case, out)
    for i in range(len(case.cost)):
        a, b = case.log_a[i].exp().numpy(), case.log_b[i].exp().numpy()
        epsilon, cost = case.epsilon[i].item(), case.cost[i].numpy()
        kullback = ot.solve(cost, a, b, reg=epsilon, reg_type="KL", max_iter=10000, tol=1e-13)
        entropy = ot.solve(cost, a, b, reg=epsilon, reg_type="entropy", max_iter=10000, tol=1e-13)
        np.testing.assert_allclose(plans[i].numpy(), kullback.plan, atol=1e-9)
        value = out["value"][i].item()
        assert value == pytest.approx(kullback.value, abs=1e-9)
        # KL(P | ab) = sum P log P + H(a) + H(b); POT's entropy omits H(a) + H(b).
        marginals = -(a * np.log(a)).sum() - (b * np.log(b)).sum()
        assert value == pytest.approx(entropy.value + epsilon * marginals, abs=1e-9)


def test_closed_forms():
    two = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
    half = torch.full((1, 2), math.log(0.5), dtype=torch.float64)
    epsilon = torch.tensor([0.3], dtype=torch.float64)
    _, linear, f, g, *_ = reference.sinkhorn(two, half, half, epsilon, 50)
    odds = math.exp(-1 / 0.3)
    assert linear.item() == pytest.approx(odds / (1 + odds))
    plan = padded_plan(two, half, half, epsilon, f, g)
    assert plan[0, 0, 0].item() == pytest.approx(0.5 / (1 + odds))

    diracs = run(ALL["1x9"])
    torch.testing.assert_close(diracs["value_linear"], ALL["1x9"].cost.mean((1, 2)))
    torch.testing.assert_close(diracs["value"], diracs["value_linear"])
    constant = run(ALL["equal_costs"])
    torch.testing.assert_close(constant["value"], torch.full((3,), 0.5, dtype=torch.float64))


def test_the_value_includes_the_generalised_divergence_before_convergence():
    case = ALL["unequal_mass"]
    out = run(case, max_iter=2)
    plan = plan_of(case, out)
    product = (case.log_a[:, :, None] + case.log_b[:, None, :]).exp()
    divergence = (plan * (plan / product).log() - plan + product).sum((1, 2))
    torch.testing.assert_close(out["value"], out["value_linear"] + case.epsilon * divergence)


def test_tol_stops_after_the_first_iteration_with_close_row_sums():
    case = ALL["epsilon_per_problem"]
    tol = 0.03
    stopped = run(case, tol=tol, max_iter=500)
    assert len(set(stopped["n_iter"].tolist())) == 3
    for index in range(3):
        errors = []
        for k in range(1, stopped["n_iter"][index].item() + 1):
            fixed = run(case, max_iter=k)
            rows = plan_of(case, fixed)[index].sum(1)
            errors.append((rows - case.log_a[index].exp()).abs().sum().item())
        assert errors[-1] <= tol < min(errors[:-1], default=math.inf)
        for field in ("value", "value_linear", "f", "g", "marginal_error"):
            assert torch.equal(stopped[field][index], fixed[field][index])


def test_an_unreachable_tolerance_runs_every_iteration():
    assert run(ALL["7x5"], tol=1e-300, max_iter=7)["n_iter"].tolist() == [7, 7, 7]


def test_empty_problems_have_value_zero_and_do_not_iterate():
    case = ALL["one_fully_masked"]
    for tol in (0.0, 1e-6):
        out = run(case, tol=tol)
        for field, tensor in out.items():
            expected = int(Status.EMPTY) if field == "status" else 0
            assert (tensor[1:] == expected).all(), field
        assert out["n_iter"][0] > 0


def test_rows_and_columns_without_an_allowed_pair_have_potential_zero():
    case = ALL["no_allowed_pair"]
    out = run(case)
    assert out["f"][0, 4] == 0 and out["g"][1, 3] == 0
    assert not plan_of(case, out)[case.cost == math.inf].any()
    assert out["value_linear"][2] == 0
    # Nothing is transported, so the value is the divergence of zero, epsilon * sum a * sum b.
    assert out["value"][2].item() == pytest.approx(case.epsilon[2].item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_have_the_dtype_of_the_inputs(dtype):
    for field, tensor in run(ALL["everything"].to(dtype)).items():
        assert tensor.dtype == (torch.int32 if field in ("n_iter", "status") else dtype)


# ------------------------------------------------------------------------------------- the status


def test_status_of_each_outcome():
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
    # The penalty is on the other side than the row without an allowed pair.
    assert run(base, x=forbidden, rho_b=1.0)["status"].tolist() == [1, Status.INFEASIBLE, 1]


MALFORMED = [
    *(("x", value) for value in (math.nan, -math.inf)),
    *(("log_a", value) for value in (math.nan, math.inf)),
    *(("log_b", value) for value in (math.nan, math.inf)),
    *(("epsilon", value) for value in (math.nan, math.inf, 0.0, -0.1)),
    *((name, value) for name in ("f0", "g0") for value in (math.nan, math.inf)),
]


@pytest.mark.parametrize("options", [{}, {"anderson": 3, "tol": 1e-6}], ids=["plain", "anderson"])
@pytest.mark.parametrize(("field", "value"), MALFORMED)
def test_a_malformed_problem_does_not_affect_the_others(field, value, options):
    base = replace(ALL["ragged"], f0=torch.zeros(4, 12).double(), g0=torch.zeros(4, 17).double())
    malformed = getattr(base, field).clone()
    malformed[2].view(-1)[0] = value
    for max_iter in (0, 6):
        clean = run(base, "implicit", max_iter=max_iter, **options)
        out = run(base, "implicit", max_iter=max_iter, **options, **{field: malformed})
        assert out["status"][2] == Status.INFEASIBLE and out["n_iter"][2] == max_iter
        for name in ("value", "value_linear", "marginal_error"):
            assert out[name][2].isnan()
        assert torch.equal(out["f"][2].isnan(), base.log_a[2] > -math.inf)
        assert torch.equal(out["g"][2].isnan(), base.log_b[2] > -math.inf)
        assert not out["f"][2, 7:].any()
        others = [0, 1, 3]
        for name in clean:
            assert torch.equal(out[name][others], clean[name][others]), name


def test_an_empty_problem_is_never_malformed():
    base = ALL["one_fully_masked"]
    epsilon = base.epsilon.clone()
    epsilon[1:] = math.nan
    out = run(base, epsilon=epsilon)
    assert out["status"].tolist() == [Status.MAX_ITER, Status.EMPTY, Status.EMPTY]
    assert not out["value"][1:].any() and not out["f"][1:].any() and not out["n_iter"][1:].any()


# ------------------------------------------------------------------------------------ the options


@pytest.mark.parametrize("reverse", [False, True])
def test_penalties_agree_with_pot(reverse):
    ot = pytest.importorskip("ot", reason="the package POT is not installed")
    case = ALL["marginals"]
    rho = (0.6, 2.0)[:: -1 if reverse else 1]
    out = run(case, rho_a=rho[0], rho_b=rho[1], max_iter=500)
    plans = plan_of(case, out)
    for i in range(3):
        a, b = case.log_a[i].exp().numpy(), case.log_b[i].exp().numpy()
        cost, epsilon = case.x[i].numpy(), case.epsilon[i].item()
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
def test_the_plan_minimises_the_objective(rho):
    """The value is the primal objective of the plan, and no nearby plan has a smaller one."""
    case = ALL["marginals"]
    out = run(case, rho_a=rho[0], rho_b=rho[1], max_iter=3000, tol=1e-13)
    plan = plan_of(case, out)
    a, b, epsilon = case.log_a.exp(), case.log_b.exp(), case.epsilon

    def objective(plan):
        def kl(p, q):
            return (p * (p / q).log() - p + q).flatten(1).sum(1)

        value = (plan * case.x).sum((1, 2)) + epsilon * kl(plan, a[:, :, None] * b[:, None])
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
    case = ALL["7x5"]
    fixed = run(case, max_iter=300)
    for rho in (1e2, 1e4, 1e6):
        out = run(case, rho_a=rho, rho_b=rho, max_iter=300)
        assert (out["value"] - fixed["value"]).abs().max() < 10 / rho


def test_unbalanced_diracs_have_a_closed_form():
    """With one row and one column, the minimum has a closed form."""
    cost, epsilon = torch.tensor([[[1.3]]], dtype=D), torch.tensor([0.4], dtype=D)
    a, b, rho_a, rho_b = 0.8, 2.5, 0.7, 1.9
    masses = [torch.full((1, 1), math.log(x), dtype=D) for x in (a, b)]
    out = reference.sinkhorn(cost, *masses, epsilon, 500, rho_a=rho_a, rho_b=rho_b)
    weights = (rho_a + 0.4) * math.log(a) + (rho_b + 0.4) * math.log(b) - 1.3
    mass = math.exp(weights / (rho_a + rho_b + 0.4))
    assert out.value_linear.item() == pytest.approx(1.3 * mass)


def test_over_relaxation_reaches_the_same_plan_in_fewer_iterations():
    case = replace(ALL["epsilon_0.01"], tol=1e-9, max_iter=4000)
    plain, relaxed = run(case), run(case, omega=1.6)
    assert (relaxed["n_iter"] < 0.7 * plain["n_iter"]).all()
    torch.testing.assert_close(relaxed["value"], plain["value"], rtol=0, atol=1e-8)


def test_annealing_reaches_a_low_temperature_in_fewer_iterations():
    case = replace(
        ALL["epsilon_0.001"], tol=1e-3, max_iter=2000, epsilon=torch.full((2,), 0.003).double()
    )
    plain, annealed = run(case), run(case, anneal_start=1.0, anneal_ratio=0.8)
    assert annealed["n_iter"].sum() < plain["n_iter"].sum()
    assert (annealed["status"] == Status.CONVERGED).all()


def test_no_problem_stops_before_the_final_temperature():
    case = ALL["equal_costs"]
    for iterations in range(2, 12):
        out = run(case, tol=0.5, max_iter=50, anneal_start=0.1 * 2.0**iterations, anneal_ratio=0.5)
        # Iterations 0 to iterations - 1 are annealed; the error of the next one is the first used.
        assert out["n_iter"].tolist() == [iterations + 1] * 3


def test_a_converged_start_stops_after_one_iteration():
    case = replace(ALL["marginals"], tol=1e-6, max_iter=500)
    actual = run(case, tol=1e-12)
    again = run(case, f0=actual["f"], g0=actual["g"])
    assert again["n_iter"].tolist() == [1, 1, 1] and (actual["n_iter"] > 5).all()
    held = run(case, f0=actual["f"], g0=actual["g"], max_iter=0)
    assert torch.equal(held["f"], actual["f"]) and torch.equal(held["value"], actual["value"])


@pytest.mark.parametrize("options", [{}, {"rho_a": 0.5, "rho_b": 1.0}, {"anneal_start": 1.0}])
def test_anderson_reaches_the_same_plan_in_fewer_iterations(options):
    case = replace(ALL["anderson_5"], tol=1e-8, max_iter=2000, **options)
    plain, fast = run(case, anderson=0), run(case)
    assert (fast["status"] == Status.CONVERGED).all()
    assert (fast["n_iter"] < 0.6 * plain["n_iter"]).all()
    torch.testing.assert_close(fast["value"], plain["value"], rtol=0, atol=1e-7)
    torch.testing.assert_close(plan_of(case, fast), plan_of(case, plain), rtol=0, atol=1e-6)


@pytest.mark.parametrize("memory", [1, 4])
def test_anderson_never_returns_an_extrapolation(memory):
    """g is the column update of f, so that the column sums are exact at every iteration."""
    case = ALL["marginals"]
    for max_iter in range(1, 15):
        out = run(case, anderson=memory, max_iter=max_iter)
        columns = plan_of(case, out).sum(1)
        torch.testing.assert_close(columns, case.log_b.exp(), rtol=1e-9, atol=1e-14)


def test_anderson_agrees_with_a_plain_implementation():
    """Compares the iterates with those of a loop over single problems."""
    case = ALL["anderson_5"]
    for index in range(3):
        single = case.without_padding(index)
        for max_iter in (2, 3, 7, 20):
            out = run(single, max_iter=max_iter, tol=0.0)
            f, g = anderson_by_hand(single, max_iter)
            torch.testing.assert_close(out["f"][0], f, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(out["g"][0], g, rtol=1e-7, atol=1e-9)


def anderson_by_hand(case, max_iter):
    cost, epsilon = case.x[0], case.epsilon[0]
    log_a, log_b = case.log_a[0], case.log_b[0]
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
                memory = [*memory, (g - last[0], change - last[1])][-case.anderson :]
            last, start = (g, change, image, error), image
            if memory:
                moves, changes = (torch.stack(x) for x in zip(*memory, strict=True))
                gram = (changes * log_b.exp()) @ changes.T
                gram += 1e-10 * gram.trace() / len(memory) * torch.eye(len(memory), dtype=D)
                gamma = torch.linalg.solve(gram, (changes * log_b.exp()) @ change)
                taken = gamma @ (moves + changes)
                # Remove the constant, which two fixed marginals leave undetermined.
                start = image - (taken - (log_b.exp() * taken).sum() / log_b.exp().sum())
            g, extrapolated = start, bool(memory)
    return f, image


# ---------------------------------------------------------------------------------- the gradients


def inputs_of(case):
    padded = PaddedProblem(case.problem()).with_cost
    return padded.x, padded.log_a, padded.log_b


def upstream_of(outputs):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=generator, dtype=D) for x in outputs]


def explicit_gradients(case, gradient, upstream):
    padded = PaddedProblem(case.problem(gradient)).with_cost
    out = reference.forward(padded)
    grads = reference.backward(*upstream, padded, out.f, out.g, out.w, out.z, out.n_iter)
    return grads[0], *grads[2:]


def gradients_of(moving, leaves):
    outputs, upstream = zip(*moving, strict=True)
    return torch.autograd.grad(outputs, leaves, upstream)


def unrolled_by_autograd(case, upstream=None, fields=("value", "value_linear", "f", "g")):
    padded = PaddedProblem(case.problem()).with_cost
    leaves = [x.clone().requires_grad_() for x in (padded.x, padded.log_a, padded.log_b)]
    out = reference.forward(padded._replace(x=leaves[0], log_a=leaves[1], log_b=leaves[2]))
    outputs = [getattr(out, field) for field in fields]
    upstream = upstream_of(outputs) if upstream is None else upstream
    # Without iterations, the potentials are constants.
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
def test_unrolled_gradients_agree_with_autograd(name, tol):
    case = replace(ALL[name], tol=tol, max_iter=min(12, ALL[name].max_iter))
    expected, upstream = unrolled_by_autograd(case)
    actual = explicit_gradients(case, "unroll", upstream)
    for grad, truth in zip(actual, expected, strict=True):
        scale = max(1.0, truth.abs().max().item() if truth.numel() else 1.0)
        torch.testing.assert_close(grad, truth, rtol=1e-9, atol=1e-11 * scale)


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
        *((name, {}) for name in ("ragged", "one_fully_masked", "no_allowed_pair")),
        *(("7x5", options) for options in OPTION_SETS),
        ("no_allowed_pair", {"rho_a": 0.4, "omega": 1.3, "anneal_start": 1.0}),
    ],
)
def test_gradcheck_of_every_output_and_input(name, options):
    """Compares autograd, with which all other gradients are compared, with finite differences."""
    case = ALL[name].without_padding(0) if name == "7x5" else ALL[name]
    cost, log_a, log_b = (
        x[:, :4, :3].clone() if x.dim() == 3 else x[:, : 3 + (x is case.log_a)].clone()
        for x in (case.cost, case.log_a, case.log_b)
    )
    allowed = (cost != math.inf) & (log_a > -math.inf)[:, :, None] & (log_b > -math.inf)[:, None, :]
    masses = [log_a > -math.inf, log_b > -math.inf]

    def outputs(free_cost, free_a, free_b, epsilon):
        # Infinities cannot be perturbed; gradcheck moves only the finite entries.
        fixed = torch.where(allowed, free_cost, cost)
        a, b = torch.where(masses[0], free_a, log_a), torch.where(masses[1], free_b, log_b)
        value, linear, f, g, *_ = reference.sinkhorn(fixed, a, b, epsilon, 4, **options)
        return value, linear, f, g, padded_plan(fixed, a, b, epsilon, f, g)

    inputs = [x.nan_to_num(0, 0, 0).requires_grad_() for x in (cost, log_a, log_b)]
    epsilon = torch.full((len(cost),), 0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(outputs, (*inputs, epsilon), fast_mode=True)


@pytest.mark.parametrize(
    "name", ["nan_padding", "no_allowed_pair", "one_fully_masked", "tiny_mass"]
)
@pytest.mark.parametrize("tol", [0.0, 1e-3])
def test_gradients_by_autograd_are_finite_and_zero_for_padding(name, tol):
    case = ALL[name]
    inputs = [x.clone().requires_grad_() for x in (case.cost, case.log_a, case.log_b)]
    value, linear, *_ = reference.sinkhorn(*inputs, case.epsilon, 10, tol)
    (value + linear).sum().backward()
    for tensor in inputs:
        assert tensor.grad.isfinite().all()
        if tensor.dim() == 2:
            assert not tensor.grad[tensor == -math.inf].any()
    padding = (case.log_a == -math.inf)[:, :, None] | (case.log_b == -math.inf)[:, None, :]
    assert not inputs[0].grad[padding | (case.cost == math.inf)].any()


def on_the_simplex(gradient, log_mass):
    """Project a gradient of log-masses onto changes that keep the total mass."""
    mass = log_mass.softmax(1)
    return torch.where(log_mass > -math.inf, gradient - mass * gradient.sum(1, keepdim=True), 0.0)


RHOS = [(math.inf, math.inf), (0.4, math.inf), (math.inf, 0.8), (0.4, 0.8)]


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("name", ["7x5", "ragged", "forbidden_pairs", "marginals"])
def test_implicit_gradients_are_the_total_derivative_at_the_fixed_point(name, rho):
    # No tol: potentials may converge before their derivatives do.
    case = replace(ALL[name], rho_a=rho[0], rho_b=rho[1], max_iter=150)
    case = replace(case, epsilon=case.epsilon.clamp(min=0.2))
    expected, upstream = unrolled_by_autograd(case, fields=("value", "value_linear"))
    actual = explicit_gradients(case, "implicit", (*upstream, None, None))
    balanced = rho == (math.inf, math.inf)
    for position, (grad, truth) in enumerate(zip(actual, expected, strict=True)):
        if position and balanced:
            log_mass = (case.log_a, case.log_b)[position - 1]
            grad, truth = on_the_simplex(grad, log_mass), on_the_simplex(truth, log_mass)
        torch.testing.assert_close(grad, truth, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize(
    "name", ["7x5", "ragged", "no_allowed_pair", "tiny_mass", "one_fully_masked"]
)
def test_w_and_z_solve_their_system_at_any_iterate(name, rho):
    case = replace(ALL[name], rho_a=rho[0], rho_b=rho[1], max_iter=3)
    out = run(case, "implicit")
    plan, epsilon = plan_of(case, out), case.epsilon[:, None]
    moved = plan * torch.where(plan > 0, case.cost, 0.0)
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
def test_envelope_gradients_are_exact_for_the_value_at_convergence(rho):
    """With two fixed marginals, gradients are compared on the simplex."""
    case = replace(ALL["marginals"], rho_a=rho[0], rho_b=rho[1], max_iter=900, tol=1e-13)
    case = replace(case, log_b=case.log_b + (0.3 if min(rho) < math.inf else 0.0))
    expected, upstream = unrolled_by_autograd(case, fields=("value",))
    actual = explicit_gradients(case, "envelope", (*upstream, torch.zeros(3).double(), None, None))
    for position, (grad, truth) in enumerate(zip(actual, expected, strict=True)):
        if position and rho == (math.inf, math.inf):
            log_mass = (case.log_a, case.log_b)[position - 1]
            grad, truth = on_the_simplex(grad, log_mass), on_the_simplex(truth, log_mass)
        torch.testing.assert_close(grad, truth, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", ["nan_padding", "no_allowed_pair", "one_fully_masked", "init"])
def test_explicit_gradients_are_zero_for_padding(name, gradient):
    case = ALL[name]
    padded = PaddedProblem(case.problem(gradient)).with_cost
    grads = explicit_gradients(case, gradient, upstream_of(reference.forward(padded)[:4]))
    for grad, source in zip(grads, (padded.x, padded.log_a, padded.log_b), strict=True):
        assert grad.isfinite().all() and grad.shape == source.shape
    padding = (padded.log_a == -math.inf)[:, :, None] | (padded.log_b == -math.inf)[:, None, :]
    assert not grads[0][padding | (padded.x == math.inf)].any()
    assert not grads[1][padded.log_a == -math.inf].any()
    assert not grads[2][padded.log_b == -math.inf].any()


def test_apply_plan_multiplies_the_plan_with_vectors():
    case = ALL["everything"]
    padded = PaddedProblem(case.problem()).with_cost
    out = reference.forward(padded)
    plan = plan_of(case, out._asdict())
    for transpose, log_mass, matrix in ((False, padded.log_b, plan), (True, padded.log_a, plan.mT)):
        v = torch.randn(*log_mass.shape, 2, dtype=D)
        dirty = torch.where((log_mass == -math.inf)[:, :, None], math.nan, v)
        actual = reference.apply_plan(padded, out.f, out.g, dirty, transpose)
        torch.testing.assert_close(actual, matrix @ v)
