"""The plan that one Triton kernel writes, against the float64 reference."""

import math
from dataclasses import replace

import pytest
import torch

from optical import kernels
from optical.backends import reference
from optical.backends.dense import PaddedProblem
from optical.testing.cases import random_case, random_vector_case
from tests.kernels.failing import MALFORMED, malformed, mixed

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def assert_plan(problem, f, g, cost=None):
    """Compare the plan and its logarithm with the reference in float64, rounded once."""
    given = PaddedProblem(problem).with_cost if cost is None else cost
    for log in (False, True):
        ours = kernels.plan(problem, f, g, log)
        assert ours.is_contiguous() and ours.dtype == f.dtype
        truth = reference.plan(given, f, g, log)
        torch.testing.assert_close(ours, truth, rtol=5e-7, atol=1e-38, equal_nan=True)
        assert torch.equal(ours == (-math.inf if log else 0), truth == (-math.inf if log else 0))


def solved(case):
    problem = case.to(torch.float32).problem()
    solution = reference.forward(PaddedProblem(problem).with_cost)
    return problem, solution.f, solution.g


def test_padding_and_forbidden_pairs_are_exact(poisoned_memory):
    problem, f, g = solved(mixed("given"))
    assert_plan(problem, f, g)
    plan = kernels.plan(problem, f, g, False)
    assert plan[0, 2, 1] == 0 and not plan[3].any() and not plan[0, :, 2:].any()
    padding = problem.log_a == -math.inf
    dirty = problem.x.masked_fill(padding[:, :, None], math.nan)
    assert torch.equal(kernels.plan(problem._replace(x=dirty), f, g, False), plan)


def test_costs_of_any_strides(poisoned_memory):
    problem, f, g = solved(random_case("strided", 3, 70, 41, max_iter=3))
    x = problem.x
    wide = torch.empty(41, 3, 140)
    wide[:, :, ::2] = x.permute(2, 0, 1)
    expected = kernels.plan(problem, f, g, False)
    assert_plan(problem, f, g)
    for view in (x.mT.contiguous().mT, wide[:, :, ::2].permute(1, 2, 0)):
        assert torch.equal(kernels.plan(problem._replace(x=view), f, g, False), expected)
    assert_plan(problem._replace(x=x[:1].expand(3, 70, 41)), f, g)


@pytest.mark.parametrize("kind", ["cosine", "sqeuclidean", "dot"])
@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_costs_of_vectors(kind, half, poisoned_memory):
    lengths = {"rows": [40, 3, 0], "columns": [70, 9, 4]}
    case = random_vector_case(kind, kind, batch=3, n=40, m=70, dim=20, epsilon=4.0, **lengths)
    problem = replace(case, max_iter=3).to(torch.float32, vectors=half).problem()
    problem = problem._replace(x=problem.x.nan_to_num(1.0), y=problem.y.nan_to_num(1.0))
    exact = PaddedProblem(problem._replace(x=problem.x.double(), y=problem.y.double())).with_cost
    solution = reference.forward(exact._replace(x=exact.x.float()))
    plan = kernels.plan(problem, solution.f, solution.g, False)
    truth = reference.plan(exact._replace(x=exact.x.float()), solution.f, solution.g, False)
    # The costs themselves are computed in float32.
    torch.testing.assert_close(plan, truth, rtol=1e-5, atol=0)
    assert not plan[1, 3:].any() and not plan[2].any()


def test_terms_that_cancel_lose_no_digits():
    """Costs are 10^5 times larger than epsilon; in float32 no digit would be left."""
    generator = torch.Generator().manual_seed(0)
    f, g = (100 * torch.rand(2, k, generator=generator) for k in (33, 66))
    noise = 1e-3 * torch.rand(2, 33, 66, generator=generator)
    case = random_case("cancel", 2, 33, 66, epsilon=1e-3).to(torch.float32)
    problem = replace(case, x=f[:, :, None] + g[:, None, :] + noise).problem()
    assert_plan(problem, f, g)


@pytest.mark.parametrize(("field", "value"), MALFORMED)
@pytest.mark.parametrize("kind", ["given", "cosine"])
def test_malformed_problems_are_nan(kind, field, value):
    problem, f, g = solved(malformed(mixed(kind), field, value))
    for log in (False, True):
        plan = kernels.plan(problem, f, g, log)
        valid = (problem.log_a[1] != -math.inf)[:, None] & (problem.log_b[1] != -math.inf)
        assert plan[1][valid].isnan().all()
        assert (plan[1][~valid] == (-math.inf if log else 0)).all() and not plan[0].isnan().any()


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 3), (2, 3, 0)])
def test_empty_batches_and_sides(sizes):
    batch, n, m = sizes
    problem = random_case("empty", 2, 3, 4).to(torch.float32).problem()
    problem = problem._replace(
        x=problem.x[:batch, :n, :m],
        log_a=problem.log_a[:batch, :n],
        log_b=problem.log_b[:batch, :m],
        epsilon=problem.epsilon[:batch],
    )
    assert kernels.plan(problem, problem.log_a, problem.log_b, False).shape == sizes
