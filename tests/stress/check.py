"""Checks of one call: against the reference, against another thread count, or for a refusal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optical.backends.problem import Status
from optical.backends.registry import BackendUnsupported
from tests.stress.allowances import (
    ALLOWANCES,
    Allowance,
    ending_verdict,
    residual_verdict,
    threads_verdict,
    verdict,
)
from tests.stress.calls import Call, outputs
from tests.stress.comparison import Comparison, Ending, Output

REFUSALS = (TypeError, ValueError, BackendUnsupported)
NOT_COMPARED = {"n_iter", "status", "gradient_residual"}


def check(call: Call) -> None:
    """Raise AssertionError unless the call behaves as the package documents."""
    torch.set_num_threads(call.threads)
    (check_invalid if call.wrong else check_valid)(call)


def check_valid(call: Call) -> None:
    """Raise AssertionError unless the outputs are those of the reference in float64."""
    results = outputs(call)
    by_library = call.option("gradient") != "unroll" or call.option("anneal") is None
    if call.threads > 1 and by_library:
        check_threads(call, results)
    compare(call, results)


def compare(
    call: Call, results: dict[str, Tensor], table: Sequence[Allowance] = ALLOWANCES
) -> None:
    """Raise AssertionError unless ``results`` are outputs of the call, by a table of allowances."""
    accelerated = bool(call.option("anderson"))
    if accelerated:
        _check_residuals(call, results, table)
        call = _from_the_potentials(call, results)
    comparison = Comparison(call)
    if not accelerated and not _ends_alike(comparison, results, table):
        return
    for name, value in results.items():
        if name not in NOT_COMPARED:
            error = verdict(Output(name, value, comparison), table)
            assert not error, f"{name}: {error}"


def _from_the_potentials(call: Call, results: dict[str, Tensor]) -> Call:
    """The call without an iteration, started from the potentials of an accelerated run."""
    options: dict[str, Any] = {"max_iter": 0, "anderson": 0, "tol": 0.0, "anneal": None}
    return call.but(init=(results["f"], results["g"]), **options)


def _ends_alike(
    comparison: Comparison, results: dict[str, Tensor], table: Sequence[Allowance]
) -> bool:
    """Whether all problems end at the same iteration as the truth.

    Raises AssertionError where no allowance explains a difference.
    """
    if "n_iter" not in results:
        return True
    truth = comparison.truth
    # A result that overflows in its dtype is INFEASIBLE; whether it may overflow is judged later.
    overflowed = (
        sum(~results[x].isfinite() for x in ("value", "value_linear", "marginal_error")) > 0
    )
    expected = truth["status"].masked_fill(overflowed, int(Status.INFEASIBLE))
    agreed = (results["n_iter"] == truth["n_iter"]) & (results["status"] == expected)
    # Such a problem never meets its tolerance, so that it runs to the end.
    agreed |= overflowed & (results["status"] == int(Status.INFEASIBLE))
    for i in (~agreed).nonzero()[:, 0].tolist():
        counts = [int(x["n_iter"][i]) for x in (results, truth)]
        statuses = [Status(int(x[i])) for x in (results["status"], expected)]
        error = ending_verdict(Ending(comparison.call, i, counts, statuses), table)
        assert not error, error
    return bool((agreed & (results["n_iter"] == truth["n_iter"])).all())


def _check_residuals(call: Call, results: dict[str, Tensor], table: Sequence[Allowance]) -> None:
    """Check that problems that Anderson acceleration reports as converged are."""
    converged = results["status"] == int(Status.CONVERGED)
    for i in converged.nonzero()[:, 0].tolist():
        ending = Ending(call, i, [int(results["n_iter"][i])], [Status.CONVERGED])
        error = residual_verdict(ending, results["marginal_error"][i].item(), table)
        assert not error, error


def check_threads(call: Call, results: dict[str, Tensor]) -> None:
    """Raise AssertionError unless a run with one thread returns the same bits."""
    torch.set_num_threads(1)
    for name, value in outputs(call).items():
        error = threads_verdict(name, value, results[name])
        assert not error, error
    torch.set_num_threads(call.threads)


def check_invalid(call: Call) -> None:
    """Raise AssertionError unless the call is refused with the wrong argument's name."""
    try:
        call.run()
    except REFUSALS as error:
        assert call.wrong in str(error), f"does not name {call.wrong}: {error!r}"
    else:
        raise AssertionError(f"{call.wrong} was accepted")
