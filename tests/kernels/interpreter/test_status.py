"""Status and gradients of the Triton kernels where a run fails or barely succeeds."""

import importlib
import math
from dataclasses import replace

import pytest
import torch

from optical.backends.problem import Status
from optical.kernels import tuning
from optical.testing.cases import random_case
from optical.testing.tolerance import solve

# import_module, because the package re-exports functions of the same names.
FORWARD = importlib.import_module("optical.kernels.forward")
BACKWARD_UNROLLED = importlib.import_module("optical.kernels.backward_unrolled")

# The interpreter warns of divisions by zero in discarded branches of tl.where.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
WAYS = ["resident", "loop", "steps"]


def take(way, monkeypatch):
    """Solve problems on chip, or stream them in one launch ("loop") or stepwise ("steps")."""
    if way != "resident":
        monkeypatch.setattr(tuning, "RESIDENT", 0)
        for module in (FORWARD, BACKWARD_UNROLLED):
            monkeypatch.setattr(module, "choose_tiles", lambda launch, table: [])
        monkeypatch.setattr(tuning, "PROGRAMS", {"loop": 0, "steps": 10**6}[way])


def errors_of_iterates(case, count):
    """(count, batch) L1 errors of both marginals of the iterates 1 to ``count``, in float64."""
    cost, epsilon = case.x, case.epsilon[:, None]
    f, g = torch.zeros_like(case.log_a), torch.zeros_like(case.log_b)
    a, b, errors = case.log_a.exp(), case.log_b.exp(), []
    for k in range(count):
        omega = case.omega if k else 1.0
        scores = case.log_b[:, None] + (g[:, None] - cost) / epsilon[:, :, None]
        step = 1 / (1 + epsilon / case.rho_a)
        f = (1 - omega) * f - omega * step * epsilon * scores.logsumexp(2)
        scores = case.log_a[:, :, None] + (f[:, :, None] - cost) / epsilon[:, :, None]
        step = 1 / (1 + epsilon / case.rho_b)
        g = (1 - omega) * g - omega * step * epsilon * scores.logsumexp(1)
        plan = (scores + case.log_b[:, None] + g[:, None] / epsilon[:, :, None]).exp()
        rows = (plan.sum(2) - a * (-f / case.rho_a).exp()).abs().sum(1)
        errors.append(rows + (plan.sum(1) - b * (-g / case.rho_b).exp()).abs().sum(1))
    return torch.stack(errors)


RELAXED = replace(random_case("relaxed", 3, 9, 7, epsilon=0.2, max_iter=60), omega=1.6, tol=1e-3)
RELAXED = replace(RELAXED, epsilon=torch.tensor([0.05, 0.2, 1.0]).double())


@pytest.mark.parametrize("rho", [math.inf, 0.7])
@pytest.mark.parametrize("way", WAYS)
def test_relaxed_runs_stop_by_both_marginals(way, rho, monkeypatch):
    take(way, monkeypatch)
    case = replace(RELAXED, rho_b=rho)
    out, errors = solve("triton", case.to(torch.float32)), errors_of_iterates(case, 60)
    reached = errors <= case.tol
    expected = torch.where(reached.any(0), reached.int().argmax(0) + 1, 60)
    assert (out["n_iter"] - expected).abs().max() <= 1, (out["n_iter"], expected)
    assert expected.min() < 60
    for i, k in enumerate(out["n_iter"].tolist()):
        assert math.isclose(out["marginal_error"][i], errors[k - 1, i], rel_tol=1e-2, abs_tol=1e-6)
    converged = out["marginal_error"] <= case.tol
    assert torch.equal(out["status"] == Status.CONVERGED, converged)


@pytest.mark.parametrize("omega", [1.0, 1.6])
@pytest.mark.parametrize("way", WAYS)
def test_the_last_iterate_is_tested(way, omega, monkeypatch):
    """A run that meets ``tol`` with its last iteration has converged, however it ended."""
    take(way, monkeypatch)
    case = replace(RELAXED, omega=omega).select(1)
    first = int(solve("triton", case.to(torch.float32))["n_iter"])
    for count, status in ((first - 1, Status.MAX_ITER), (first, Status.CONVERGED)):
        out = solve("triton", replace(case, max_iter=count).to(torch.float32))
        assert out["n_iter"].tolist() == [count] and out["status"].tolist() == [status]
    unlimited = solve("triton", replace(case, max_iter=first, tol=0.0).to(torch.float32))
    assert unlimited["status"].tolist() == [Status.MAX_ITER]


@pytest.mark.parametrize("tol", [0.0, 1e-3])
@pytest.mark.parametrize("way", WAYS)
def test_outputs_that_overflow_are_infeasible(way, tol, monkeypatch):
    take(way, monkeypatch)
    case = random_case("overflow", 2, 5, 4, max_iter=0)
    cost = case.x.clone()
    cost[1] -= 1e4
    out = solve("triton", replace(case, x=cost, tol=tol).to(torch.float32))
    assert out["status"].tolist() == [Status.MAX_ITER, Status.INFEASIBLE]
    assert out["marginal_error"].isfinite().tolist() == [True, False]


@pytest.mark.parametrize("way", WAYS)
def test_potentials_that_overflow_are_infeasible(way, monkeypatch):
    """Their marginals, and with them all other outputs, are small and finite."""
    take(way, monkeypatch)
    case = random_case("large", 2, 5, 4, max_iter=1)
    scale = torch.tensor([1.0, 1e37]).double()
    masses = {"log_a": case.log_a - 50, "log_b": case.log_b - 50}
    case = replace(case, x=case.x * scale[:, None, None], epsilon=scale, **masses)
    out = solve("triton", case.to(torch.float32))
    assert out["value"].isfinite().all() and out["marginal_error"].isfinite().all()
    assert not out["f"][1].isfinite().any()
    assert out["status"].tolist() == [Status.MAX_ITER, Status.INFEASIBLE]
