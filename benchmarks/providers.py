"""Who is measured: our backends and the peers, behind one call."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import optical
from benchmarks.cases import Case
from optical import backends


@dataclass(frozen=True)
class Solution:
    """What a provider returns: the value regularised by KL, and the plan when asked for."""

    value: Tensor
    plan: Callable[[], Tensor]


@dataclass(frozen=True)
class Provider:
    """One implementation.

    Attributes:
        name: what ``--only`` takes.
        unavailable: case -> None, or why it cannot run, in words.
        solve: (cost, case) -> its solution, differentiable in cost through ``value``.
        same_iterates: whether it updates f, then g, from zero, so that its result after a given
            number of iterations has one right answer. Otherwise only the limit can be compared.
    """

    name: str
    unavailable: Callable[[Case], str | None]
    solve: Callable[[Tensor, Case], Solution]
    same_iterates: bool = True


def _ours(backend: str) -> Provider:
    def unavailable(case: Case) -> str | None:
        cost = torch.empty(case.batch, case.n, case.m, dtype=case.dtype, device=case.device)
        return backends.BACKENDS[backend].supports(cost)

    def solve(cost: Tensor, case: Case) -> Solution:
        options = {"epsilon": case.epsilon, "max_iter": case.max_iter, "backend": backend}
        result = optical.sinkhorn(cost, **options)
        return Solution(result.value, result.plan)

    return Provider(backend, unavailable, solve)


def _torch_loop(cost: Tensor, case: Case) -> Solution:
    """The loop one would write by hand for dense problems: no masks, no checks, no stopping."""
    log_a, log_b, eps = -math.log(case.n), -math.log(case.m), case.epsilon
    with torch.no_grad():
        score = cost.detach() / -eps
        f, g = score.new_zeros(case.batch, case.n), score.new_zeros(case.batch, case.m)
        for _ in range(case.max_iter):
            f = -(torch.logsumexp(score + g[:, None, :], 2) + log_b)
            g = -(torch.logsumexp(score + f[:, :, None], 1) + log_a)
        plan = (score + f[:, :, None] + g[:, None, :] + (log_a + log_b)).exp()
        rows, columns = plan.sum(2), plan.sum(1)
        kl = (plan * score).sum((1, 2)) + (rows * f).sum(1) + (columns * g).sum(1)
        kl = kl + 1 - rows.sum(1)
    return Solution((plan * cost).sum((1, 2)) + eps * kl, lambda: plan)


def _pot(method: str) -> Callable[[Tensor, Case], Solution]:
    def solve(cost: Tensor, case: Case) -> Solution:
        import ot

        result = ot.batch.solve_batch(
            cost, case.epsilon, max_iter=case.max_iter, tol=0.0, method=method, reg_type="kl"
        )
        return Solution(result.value, lambda: result.plan)

    return solve


def _geomloss(cost: Tensor, case: Case) -> Solution:
    from geomloss import ot

    result = ot.solve_batch(cost, reg=case.epsilon, max_iter=case.max_iter)
    return Solution(result.value, lambda: result.plan)


def _needs(package: str) -> Callable[[Case], str | None]:
    def unavailable(case: Case) -> str | None:
        return None if importlib.util.find_spec(package) else f"{package} is not installed"

    return unavailable


# The reference comes first: every ratio is to it.
PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        _ours("reference"),
        *(_ours(name) for name in backends.BACKENDS if name != "reference"),
        Provider("torch", lambda case: None, _torch_loop),
        Provider("pot", _needs("ot"), _pot("log_sinkhorn")),
        # Not safe at small epsilon, and a bar for speed all the same.
        Provider("pot_kernel", _needs("ot"), _pot("sinkhorn")),
        Provider("geomloss", _needs("geomloss"), _geomloss, same_iterates=False),
    )
}
