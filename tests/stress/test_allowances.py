"""Every allowance lets a result just inside of it pass, and no result just outside.

Each entry of the table has a case: a real call to which the entry applies, a result that only this
entry allows, and a result a little worse that is reported.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from optical.backends.problem import Status
from tests.stress.allowances import (
    ALLOWANCES,
    BY_NAME,
    allowed_errors,
    compared_entries,
    ending_verdict,
    residual_verdict,
    threads_verdict,
    verdict,
)
from tests.stress.calls import Call, largest, outputs
from tests.stress.check import compare
from tests.stress.comparison import Comparison, Ending, Output

NEAR = 0.02  # distance of both results from the limit, as a share of it
INF, NAN = math.inf, math.nan
CASES: dict[str, list[Callable]] = {}


@dataclass
class Case:
    """Two results, as functions from a table of allowances to a verdict."""

    inside: Callable
    outside: Callable


def case_of(name):
    """Register a function that makes a ``Case`` of the allowance of this name."""

    def register(make):
        CASES.setdefault(name, []).append(make)
        return make

    return register


@pytest.mark.parametrize("entry", ALLOWANCES, ids=lambda entry: entry.name.replace(" ", "_"))
def test_just_inside_passes_and_just_outside_is_reported(entry):
    assert entry.name in CASES, f"the allowance {entry.name!r} has no case here"
    without = [other for other in ALLOWANCES if other is not entry]
    for make in CASES[entry.name]:
        case = make()
        assert case.inside(ALLOWANCES) == ""
        assert case.inside(without), f"{make.__name__} passes without the allowance"
        assert case.outside(ALLOWANCES), f"{make.__name__} is allowed too much"


@pytest.mark.parametrize("name", ["grad_cost", "plan"])
def test_entries_of_a_malformed_problem_are_nan(name):
    cost = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    cost[0, 1, 1] = NAN
    call = random_call(cost=cost)
    for problem, value in ((0, 1.0), (0, 0.0), (1, NAN)):
        assert with_entry(call, name, problem, value)(ALLOWANCES)


def test_every_case_belongs_to_an_entry_with_a_reason():
    assert CASES.keys() == BY_NAME.keys() and len(BY_NAME) == len(ALLOWANCES)
    assert all(len(entry.reason) > 20 for entry in ALLOWANCES)


# --------------------------------------------------------------------------------- the calls


def random_call(seed=0, n=5, m=6, dtype=torch.float32, epsilon=0.5, cost=None, **options):
    """A call of ``sinkhorn`` on two random problems, differentiated by the cost."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(2, n, m, generator=generator, dtype=dtype) if cost is None else cost
    upstream = torch.randn(2, len(cost), generator=generator, dtype=torch.float64)
    arguments = {"max_iter": 8, "gradient": "envelope", "backend": "cpu", "precision": "exact"}
    arguments |= {"cost": cost.to(dtype).requires_grad_(), "epsilon": epsilon} | options
    return Call(
        "sinkhorn",
        arguments,
        cotangents={"value": upstream[0], "value_linear": upstream[1]},
        scale=max(epsilon, largest(cost.detach())),
        dtype=dtype,
    )


def call_of_plans(*exponents, cost=0.0, epsilon=1.0, g=0.0, **options):
    """One problem of one pair for each exponent: the plan is its exponential."""
    f = torch.tensor(exponents, dtype=torch.float64)[:, None] * epsilon + cost - g
    start = (f.float(), torch.full_like(f, g).float())
    costs = torch.full((len(exponents), 1, 1), cost)
    call = random_call(cost=costs, epsilon=epsilon, init=start, max_iter=0, **options)
    return replace(call, cotangents=dict.fromkeys(call.cotangents, torch.ones(len(f)).double()))


def by_limit(call, name):
    """A case of the error of one output, just below and just above the limit of all allowances."""
    comparison = Comparison(call)
    exact = Output(name, comparison.truth[name].to(call.dtype), comparison)
    *_, limit = allowed_errors(exact)
    assert math.isfinite(limit)

    def judge(error):
        value = exact.value.clone(memory_format=torch.contiguous_format)
        # The smallest entry has the finest rounding.
        compared = compared_entries(exact).reshape(-1)
        entry = torch.where(compared, exact.truth.reshape(-1).abs(), INF).argmin()
        value.view(-1)[entry] = exact.truth.reshape(-1)[entry] + error
        return lambda table: verdict(replace(exact, value=value), table)

    return Case(judge(limit * (1 - NEAR)), judge(limit * (1 + NEAR)))


def with_entry(call, name, problem, number):
    """The verdict on an output that is right but for one number in one problem."""
    comparison = Comparison(call)
    value = comparison.truth[name].to(call.dtype).clone(memory_format=torch.contiguous_format)
    value.view(len(value), -1)[problem, 0] = number
    return lambda table: verdict(Output(name, value, comparison), table)


# ------------------------------------------------------------------ overflow and lost digits


@case_of("overflow of a difference")
def infinite_value():
    call = call_of_plans(800.0, 1.0, cost=-4000.0, epsilon=2.0, g=-1.0)
    assert Comparison(call).truth["value"].isinf().tolist() == [True, False]
    return Case(with_entry(call, "value", 0, NAN), with_entry(call, "value", 1, NAN))


@case_of("overflow of a difference")
def infinite_sum_of_a_kernel():
    call = call_of_plans(800.0, 1.0, cost=-4000.0, epsilon=2.0, g=-1.0, backend="triton")
    inside = with_entry(call, "value_linear", 0, NAN)
    return Case(inside, with_entry(replace(call).but(backend="cpu"), "value_linear", 0, NAN))


@case_of("no digits")
def costs_longer_than_their_digits():
    # The rounding of four units of the largest cost is 1.01 and 0.99 hundredths of epsilon.
    def call(share):
        cost = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0))
        epsilon = 4 * torch.finfo(torch.float32).eps * float(cost.max()) / share
        return random_call(cost=cost, epsilon=epsilon)

    def judge(share):
        comparison = Comparison(call(share))
        # Twice the potentials are wrong by their size.
        value = 2 * comparison.truth["f"].float()
        return lambda table: verdict(Output("f", value, comparison), table)

    return Case(judge(0.0101), judge(0.0099))


@case_of("no digits")
def numbers_without_digits_are_finite():
    call = random_call(epsilon=1e-6)
    return Case(with_entry(call, "f", 0, 0.9), with_entry(call, "f", 0, NAN))


@case_of("overflow of the reference")
def plan_near_the_largest_number():
    call = call_of_plans(80.2, 79.0, cost=0.3, epsilon=1e-5)
    return Case(with_entry(call, "plan", 0, INF), with_entry(call, "plan", 1, INF))


@case_of("overflow of the value")
def potential_of_a_problem_whose_value_overflows():
    call = call_of_plans(83.0, 79.0, cost=0.3, epsilon=1e-5)
    return Case(with_entry(call, "f", 0, INF), with_entry(call, "f", 1, INF))


def around_the_square_root(**options):
    """A case of gradients 5% above and below the largest whose squares count as finite."""
    limit = 1e-3 * math.sqrt(torch.finfo(torch.float32).max)
    options |= {"backend": "cuda", "gradient": "unroll"}
    exponent = 30.0
    for _ in range(4):  # nearly linear in the logarithm of the gradient
        gradient = largest(Comparison(call_of_plans(exponent, **options)).truth["grad_cost"])
        exponent += math.log(limit / gradient)

    def judge(share):
        call = call_of_plans(exponent + math.log(share), **options)
        assert (largest(Comparison(call).truth["grad_cost"]) > limit) == (share > 1)
        return with_entry(call, "grad_cost", 0, INF)

    return Case(judge(1.05), judge(0.95))


@case_of("overflow of a sweep, without digits")
def squares_of_gradients_without_digits():
    return around_the_square_root(cost=0.3, epsilon=1e-5)


@case_of("range of exponents")
def rounding_as_long_as_the_range():
    def judge(epsilon):
        return with_entry(call_of_plans(-0.5, cost=0.3, epsilon=epsilon), "plan", 0, INF)

    return Case(judge(1.6e-9), judge(1.65e-9))


@case_of("range of exponents")
def potentials_keep_their_order_of_magnitude():
    call = call_of_plans(-0.5, cost=0.3, epsilon=1e-9)
    return Case(with_entry(call, "plan", 0, INF), with_entry(call, "f", 0, INF))


@case_of("overflow of the truth")
def plan_beyond_float64():
    call = call_of_plans(800.0, 1.0, cost=-4000.0, epsilon=2.0, g=-1.0)
    return Case(with_entry(call, "plan", 0, 1e38), with_entry(call, "plan", 1, 1e38))


@case_of("overflow on the way")
def plan_of_1e34():
    call = call_of_plans(79.6, 79.4)
    return Case(with_entry(call, "plan", 0, INF), with_entry(call, "plan", 1, INF))


@case_of("overflow on the way")
def cold_value():
    # Temperature times mass: the mass is 2e36 at epsilon 0.01.
    call = call_of_plans(79.6, 70.0, epsilon=0.01)
    return Case(with_entry(call, "value", 0, INF), with_entry(call, "value", 1, INF))


@case_of("overflow of a sweep")
def squares_of_gradients():
    return around_the_square_root()


# ------------------------------------------------------------------------- limits of errors


@case_of("rounding of the dtype")
def warm_potentials():
    return by_limit(random_call(epsilon=10.0), "f")


@case_of("rounding of the dtype")
def warm_gradient_in_float64():
    return by_limit(random_call(epsilon=10.0, dtype=torch.float64), "grad_cost")


@case_of("rounding of the costs")
def cold_plan():
    return by_limit(random_call(epsilon=0.002), "plan")


@case_of("penalty of rounded costs")
def steep_penalty_of_a_kernel():
    return by_limit(random_call(epsilon=0.05, max_iter=1, rho=100.0, backend="cuda"), "value")


@case_of("half precision")
def potentials_of_a_fast_kernel():
    return by_limit(random_call(precision="fast", backend="triton"), "f")


@case_of("half precision")
def gradient_of_a_fast_kernel():
    return by_limit(random_call(precision="fast", backend="cuda"), "grad_cost")


@case_of("half precision before convergence")
def value_at_an_early_stop():
    options = {"precision": "fast", "backend": "triton", "epsilon": 0.05, "tol": 1e-2}
    return by_limit(random_call(**options), "value")


@case_of("hot potentials")
def potentials_of_a_hot_start():
    return by_limit(random_call(anneal=(100.0, 0.5), max_iter=20), "f")


@case_of("hot potentials")
def gradient_of_log_masses_of_a_hot_start():
    log_a = torch.full((2, 5), -math.log(5)).requires_grad_()
    return by_limit(random_call(anneal=(300.0, 0.5), max_iter=20, log_a=log_a), "grad_log_a")


@case_of("log-masses in scores")
def potentials_next_to_a_tiny_mass():
    log_a = torch.full((2, 5), -math.log(4))
    log_a[:, 0] = -1e4
    return by_limit(random_call(log_a=log_a, backend="triton"), "f")


@case_of("rounding of the reference")
def value_of_a_strong_penalty():
    # The penalty multiplies a difference that float32 rounds.
    return by_limit(random_call(rho=1e5), "value")


@case_of("plan larger than the masses")
def linear_value_of_a_large_plan():
    cost = -3 + torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0))
    return by_limit(random_call(cost=cost, epsilon=0.5, max_iter=0), "value_linear")


@case_of("singular linear system")
def clusters_that_exchange_little():
    far = torch.eye(2).repeat_interleave(3, 0).repeat_interleave(3, 1)
    near = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0))
    options = {"cost": 0.1 * near + 0.5 * (1 - far), "epsilon": 0.1, "gradient": "implicit"}
    return by_limit(random_call(**options, max_iter=40), "grad_cost")


@case_of("slopes of the penalty")
def steep_penalty_in_float64():
    options = {"epsilon": 0.01, "rho": 1e3, "gradient": "unroll", "dtype": torch.float64}
    return by_limit(random_call(**options), "grad_cost")


@case_of("slopes of the penalty")
def steep_penalty_of_a_sweep_in_float32():
    options = {"epsilon": 0.2, "rho": 1e2, "gradient": "unroll", "backend": "cuda"}
    return by_limit(random_call(**options, max_iter=2), "grad_cost")


# --------------------------------------------------------------- iterations, threads, results


@case_of("half-precision stopping")
def one_iteration_more_in_half_precision():
    def judge(precision):
        call = random_call(tol=1e-3, precision=precision, backend="triton")
        ending = Ending(call, 0, (4, 3), (Status.CONVERGED, Status.CONVERGED))
        return lambda table: ending_verdict(ending, table)

    return Case(judge("fast"), judge("exact"))


@case_of("stopping at the tolerance")
def residual_next_to_tol():
    call = random_call(epsilon=0.05, tol=1.0, dtype=torch.float64)
    ends = (0, (4, 3), (Status.CONVERGED, Status.CONVERGED))
    shorter = Ending(call, *ends)
    residual, rounding = shorter.residual(), shorter.rounding

    def judge(share):  # tol - residual is this share of the allowance
        tol = (residual + share * rounding) / (1 - 1e-2 * share)
        return lambda table: ending_verdict(Ending(call.but(tol=tol), *ends), table)

    return Case(judge(1 - NEAR), judge(1 + NEAR))


@case_of("stopping at the tolerance")
def without_tol_nothing_stops():
    ends = (0, (4, 3), (Status.CONVERGED, Status.CONVERGED))

    def judge(tol):
        call = random_call(epsilon=0.05, tol=tol, dtype=torch.float64)
        return lambda table: ending_verdict(Ending(call, *ends), table)

    call = random_call(epsilon=0.05, dtype=torch.float64)
    return Case(judge(Ending(call, *ends).residual()), judge(0.0))


@case_of("accelerated residual")
def accelerated_run_that_is_not_converged():
    call = random_call(tol=1e-3, anderson=3, max_iter=40)
    ending = Ending(call, 0, [5], [Status.CONVERGED])
    limit = BY_NAME["accelerated residual"].size(ending)

    def judge(error):
        return lambda table: residual_verdict(ending, error, table)

    return Case(judge(limit * (1 - NEAR)), judge(limit * (1 + NEAR)))


@case_of("plan by PyTorch")
def last_bit_of_the_plan():
    value = outputs(random_call())["plan"]
    other = torch.nextafter(value, value + 1)

    def judge(name):
        return lambda table: threads_verdict(name, value, other, table)

    return Case(judge("plan"), judge("f"))


def test_results_of_the_library_pass_and_the_same_with_one_wrong_entry_do_not():
    call = random_call(tol=1e-3, max_iter=20)
    results = outputs(call)
    compare(call, results)
    for name, value in results.items():
        if name == "gradient_residual":
            continue
        wrong = value.clone(memory_format=torch.contiguous_format)
        wrong.view(-1)[-1] += 1 if name in ("n_iter", "status") else 1e-3 * max(1, largest(value))
        with pytest.raises(AssertionError):
            compare(call, results | {name: wrong})
        if name not in ("n_iter", "status"):
            with pytest.raises(AssertionError, match=f"{name}: shape"):
                compare(call, results | {name: value[:-1]})


def test_results_of_an_accelerated_run_follow_from_its_potentials():
    call = random_call(anderson=3, max_iter=6, tol=1e-6)
    results = outputs(call.but(max_iter=5))
    compare(call, results)  # another iterate, consistent with itself
    other = outputs(call.but(max_iter=3))
    for name in ("value", "value_linear", "g", "marginal_error", "grad_cost"):
        with pytest.raises(AssertionError):
            compare(call, results | {name: other[name]})
