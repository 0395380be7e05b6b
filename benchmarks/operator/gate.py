"""The accuracy gate: a provider is timed only if its results match the float64 reference."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import optical
from benchmarks.operator.cases import Case
from benchmarks.operator.jobs import Results, Task
from optical.testing.tolerance import TOLERANCE, assert_close_to_truth


@dataclass(frozen=True)
class Truth:
    """The results that a provider is compared with.

    Attributes:
        exact: the reference in float64, at the same iterate or at the limit.
        same_dtype: the reference in the dtype of the task, which sets the tolerated rounding.
        limit_only: whether ``exact`` is the limit, because the iterates are not comparable.
    """

    exact: Results
    same_dtype: Results
    limit_only: bool


def truth_of(task: Task, first_update: str | None, reports_dual: bool) -> Truth:
    """The truth for a provider with these conventions; see ``providers.Provider``."""
    kind, _, case = task
    if first_update is None or case.tol:
        return _truth(kind, replace(case, max_iter=10_000, tol=1e-9), "f", reports_dual, True)
    return _truth(kind, case, first_update, reports_dual, False)


@functools.lru_cache(maxsize=6)
def _truth(kind: str, case: Case, first_update: str, dual: bool, limit_only: bool) -> Truth:
    if limit_only:
        # Plain iterations of the reference would take hours.
        options: dict[str, Any] = {"backend": "auto", "anderson": 5}
        exact = _solve(kind, case, first_update, dual, torch.float64, options)
        return Truth(exact, exact, True)
    options = {"backend": "reference"}
    exact, same_dtype = (
        _solve(kind, case, first_update, dual, dtype, options)
        for dtype in (torch.float64, case.dtype)
    )
    return Truth(exact, same_dtype, False)


def _solve(
    kind: str,
    case: Case,
    first_update: str,
    dual: bool,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> Results:
    """Solve a case with our operator; "g" first is the transposed problem."""
    x, y, log_a, log_b = (z.to(dtype, copy=True) for z in case.inputs[:4])
    if kind == "vectors":
        x.requires_grad_(), y.requires_grad_()
        cost = 1 - normalize(x, dim=2) @ normalize(y, dim=2).mT
    else:
        cost = case.cost().to(dtype)
    options = options | {"epsilon": case.epsilon, "max_iter": case.max_iter, "tol": case.tol}
    constant_cost = cost.detach()
    if first_update == "f":
        result = optical.sinkhorn(constant_cost, log_a, log_b, **options)
        f, g, plan = result.f, result.g, result.plan()
    else:
        result = optical.sinkhorn(constant_cost.mT.contiguous(), log_b, log_a, **options)
        f, g, plan = result.g, result.f, result.plan().mT
    value, a, b = result.value, log_a.exp(), log_b.exp()
    if dual:
        missing_mass = 1 - plan.sum((1, 2))
        value = (a * f).sum(1) + (b * g).sum(1) + case.epsilon * missing_mass
    gradients = (plan,) if kind == "solve" else torch.autograd.grad(cost, (x, y), plan)
    value, f, g, plan = (z.detach().double().contiguous() for z in (value, f, g, plan))
    return Results(value, f, g, plan, tuple(x.double().contiguous() for x in gradients))


def errors(results: Results, truth: Results, case: Case) -> dict[str, float]:
    """The errors of a batch, by the names of the error columns of ``rows.Row``."""
    log_a, log_b = case.inputs.log_a, case.inputs.log_b
    plan, value = results.plan, truth.value
    row_error = (plan.sum(2) - log_a.exp()).abs().sum(1)
    column_error = (plan.sum(1) - log_b.exp()).abs().sum(1)
    # The potentials are unique up to a constant, which is fitted before they are compared.
    df = (results.f - truth.f).masked_fill(log_a == -math.inf, 0)
    dg = (results.g - truth.g).masked_fill(log_b == -math.inf, 0)
    shift = ((df * log_a.exp()).sum(1) - (dg * log_b.exp()).sum(1)) / 2
    df = (df - shift[:, None])[log_a > -math.inf]
    dg = (dg + shift[:, None])[log_b > -math.inf]
    worst = {
        "marginal_error": row_error + column_error,
        "error_value": (results.value - value).abs() / value.abs().max(),
        "error_plan": (plan - truth.plan).abs().sum((1, 2)),
        "error_potentials": torch.cat([df, dg]).abs() / case.epsilon,
    }
    if results.gradients:
        pairs = zip(results.gradients, truth.gradients, strict=True)
        differences = torch.stack([(x - y).norm() for x, y in pairs])
        norms = torch.stack([y.norm() for y in truth.gradients])
        worst["error_gradient"] = differences.norm() / norms.norm()
    return {name: error.max().item() for name, error in worst.items()}


def check(name: str, results: Results, truth: Truth, task: Task) -> dict[str, float]:
    """Hold the results of the provider ``name`` to the gate and return their errors.

    Iterates of the reference must meet the tolerance rule of ``optical.testing.tolerance``. At the
    limit, the value may deviate by the amount that the marginal error explains, and the gradient
    must be that of the provider's plan.

    Raises:
        AssertionError: the results are wrong.
    """
    result_errors = errors(results, truth.exact, task.case)
    if truth.limit_only:
        _check_limit(name, results, truth.exact, task, result_errors["marginal_error"])
    else:
        _check_iterate(name, results, truth, task)
    return result_errors


def _check_iterate(name: str, results: Results, truth: Truth, task: Task) -> None:
    """Apply the tolerance rule to value, plan and gradients."""
    exact, rounded = truth.exact, truth.same_dtype
    cost_scale = task.case.cost().abs().max().item()

    def compare(
        quantity: str, out: Tensor, expected: Tensor, same_dtype: Tensor, scale: float
    ) -> None:
        label = f"{name} {task.case.name} {quantity}"
        rule: dict[str, Any] = {"dtype": task.case.dtype, "scale": scale, "name": label}
        assert_close_to_truth(out, expected, same_dtype, **rule)

    compare("value", results.value, exact.value, rounded.value, cost_scale)
    compare("plan", results.plan, exact.plan, rounded.plan, 1.0)
    for out, expected, same_dtype in zip(
        results.gradients, exact.gradients, rounded.gradients, strict=bool(results.gradients)
    ):
        scale = 1.0 if task.kind == "solve" else expected.abs().max().item()
        compare("gradient", out, expected, same_dtype, scale)


def _check_limit(
    name: str, results: Results, exact: Results, task: Task, marginal_error: float
) -> None:
    """Bound the errors of value, marginals and gradients by the marginal error of the plan."""
    case = task.case
    rounding = TOLERANCE[case.dtype]
    # A plan with an L1 marginal error e can miss the value by e times the cost.
    tolerance = (marginal_error + rounding) * case.cost().abs().max().item()
    value_error = (results.value - exact.value).abs().max().item()
    if not value_error <= tolerance:
        raise AssertionError(
            f"{name} {case.name} value is off by {value_error:.3g}; "
            f"expected at most {tolerance:.3g}"
        )
    if case.tol and not marginal_error <= 1.05 * case.tol:
        raise AssertionError(
            f"{name} {case.name} misses its marginals by {marginal_error:.3g}; "
            f"expected at most {case.tol:g}"
        )
    if not results.gradients:
        return
    expected_gradients = gradients_of_plan(results.plan, task)
    for out, expected in zip(results.gradients, expected_gradients, strict=True):
        difference = (out - expected).norm().item()
        # Both half-steps carry gradient, each through a plan that misses one marginal. The terms
        # of a token's gradient nearly cancel, which magnifies the error.
        share = 0.01 + 2 * (marginal_error + rounding)
        tolerance = share * expected.norm().item()
        if not difference <= tolerance:
            raise AssertionError(
                f"{name} {case.name} gradient is {difference:.3g} away from that of its plan; "
                f"expected at most {tolerance:.3g}"
            )


def gradients_of_plan(plan: Tensor, task: Task) -> tuple[Tensor, ...]:
    """The envelope gradient of a plan with respect to the leaves of the task, in float64."""
    if task.kind == "solve":
        return (plan,)
    x, y = (z.clone().requires_grad_() for z in task.case.inputs[:2])
    return torch.autograd.grad(1 - normalize(x, dim=2) @ normalize(y, dim=2).mT, (x, y), plan)
