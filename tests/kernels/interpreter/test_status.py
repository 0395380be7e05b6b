"""Status and gradients of the Triton kernels where a run fails or barely succeeds."""

import importlib
import math
from dataclasses import replace

import pytest
import torch

from optical import kernels
from optical.backends.problem import Status
from optical.kernels import tuning
from optical.testing.cases import packed, random_case
from optical.testing.tolerance import solve
from tests.kernels.failing import (
    MALFORMED,
    RELAXED,
    assert_masses_are_optional,
    assert_unused_is_zero,
    errors_of_iterates,
    malformed,
    mixed,
    overflowing,
    own_entries,
)

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
    case = overflowing()
    out = solve("triton", case.to(torch.float32))
    assert out["value"].isfinite().all() and out["marginal_error"].isfinite().all()
    assert not out["f"][1].isfinite().any()
    assert out["status"].tolist() == [Status.MAX_ITER, Status.INFEASIBLE]


GRADIENTS = [
    ("resident", "given", "implicit"),
    ("resident", "given", "unroll"),
    ("resident", "cosine", "envelope"),
    ("resident", "cosine", "unroll"),
    ("resident", "sqeuclidean", "envelope"),
    ("resident", "packed dot", "implicit"),
    ("resident", "packed dot", "unroll"),
    ("loop", "given", "implicit"),
    ("loop", "given", "unroll"),
    ("loop", "cosine", "unroll"),
    ("loop", "packed dot", "envelope"),
]


@pytest.mark.parametrize(("way", "kind", "gradient"), GRADIENTS)
def test_gradients_of_malformed_problems_are_nan(way, kind, gradient, monkeypatch, poisoned_memory):
    take(way, monkeypatch)
    clean = mixed(kind.removeprefix("packed ")).to(torch.float32)
    if kind == "packed dot":
        clean = packed(clean)
    clean = replace(clean, rho_a=0.5, max_iter=2)
    expected = solve("triton", clean, gradient)
    for field, value in MALFORMED:
        out = solve("triton", malformed(clean, field, value), gradient)
        assert out["status"][1] == Status.INFEASIBLE and out["status"][3] == Status.EMPTY
        for name, (own, padding) in own_entries(clean).items():
            grad, other = out[f"grad_{name}"], expected[f"grad_{name}"]
            assert grad[own].isnan().all(), (field, name)
            assert not grad[padding].any(), (field, name)
            assert torch.equal(grad[~own], other[~own]) and grad[~own].isfinite().all()


@pytest.mark.parametrize("gradient", ["envelope", "unroll"])
@pytest.mark.parametrize("way", ["resident", "loop"])
def test_gradients_of_overflowed_problems_are_not_finite(way, gradient, monkeypatch):
    take(way, monkeypatch)
    case = overflowing()
    out = solve("triton", case.to(torch.float32), gradient)
    for name in ("grad_x", "grad_log_a"):
        assert out[name][0].isfinite().all() and not out[name][1].isfinite().any(), name


UNUSED = [("resident", "given", "implicit"), ("resident", "cosine", "envelope")]
UNUSED += [("resident", "packed dot", "unroll"), ("loop", "cosine", "unroll")]


@pytest.mark.parametrize(("way", "kind", "gradient"), UNUSED)
def test_gradients_of_unused_problems_are_zero(way, kind, gradient, monkeypatch, poisoned_memory):
    take(way, monkeypatch)
    assert_unused_is_zero("triton", kind, gradient)


@pytest.mark.parametrize("gradient", ["envelope", "implicit", "unroll"])
def test_gradients_of_masses_are_optional(gradient, poisoned_memory):
    assert_masses_are_optional(kernels, gradient)


@pytest.mark.parametrize("way", ["loop", "steps"])
def test_streamed_runs_have_no_residual_of_gradients(way, monkeypatch, poisoned_memory):
    take(way, monkeypatch)
    assert not solve("triton", mixed("given").to(torch.float32))["residual"].any()
