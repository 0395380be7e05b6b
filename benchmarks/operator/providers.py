"""Who is measured: our backends and the peers, behind one call."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

import optical
from benchmarks.operator import ceiling, jobs
from benchmarks.operator.cases import Case
from benchmarks.operator.jobs import (
    CeilingJob,
    Given,
    Job,
    Solution,
    Task,
    TorchJob,
    WorkerJob,
    dot,
)
from optical.backends import registry


@dataclass(frozen=True)
class Provider:
    """One implementation.

    Attributes:
        name: what ``--only`` takes.
        unavailable: task -> None, or why it cannot run, in words.
        start: task -> its job.
        first: which potential an iteration updates first, "f" or "g"; None if its iterates are
            others altogether, so that only the limit can be compared.
        dual: whether its value is that of the dual problem, which at a finite iteration is another
            number than the plan's.
        rules: case with ``tol`` -> the same case with ever stricter stopping rules of its own.
    """

    name: str
    unavailable: Callable[[Task], str | None]
    start: Callable[[Task], Job]
    first: Literal["f", "g"] | None = "f"
    dual: bool = False
    rules: Callable[[Case], Iterator[Case]] = lambda case: (
        replace(case, tol=case.tol / 2**k) for k in range(12)
    )


# ------------------------------------------------------------------------------------- solvers


def _ours(given: Given, case: Case, backend: str, **options: Any) -> Solution:
    options = {
        "epsilon": case.epsilon,
        "max_iter": case.max_iter,
        "tol": case.tol,
        "backend": backend,
        **options,
    }
    options |= {"log_a": given.log_a, "log_b": given.log_b}
    solve: Any = optical.sinkhorn if len(given.leaves) == 1 else optical.sinkhorn_vectors
    result = solve(*given.leaves, **options)
    return Solution(result.value, lambda: (result.f, result.g, result.plan()))


def _ours_after_bmm(given: Given, case: Case) -> Solution:
    """Our solver on a cost that PyTorch builds: what the fused path from vectors must beat."""
    x, y = (normalize(z, dim=2) for z in given.leaves)
    return _ours(given._replace(leaves=(1 - x @ y.mT,)), case, "cpu")


def _torch_log(given: Given, case: Case) -> Solution:
    """The log-domain loop one would write by hand: no masks, one test of the residual in ten."""
    cost = given.peers_cost(case)
    eps, log_a, log_b = case.epsilon, given.log_a, given.log_b
    with torch.no_grad():
        score = cost.detach() / -eps
        f, g = torch.zeros_like(log_a), torch.zeros_like(log_b)
        for k in range(case.max_iter):
            next_f = -torch.logsumexp(score + (g + log_b)[:, None, :], 2)
            if case.tol and k and k % 10 == 0:
                rows = (log_a + f - next_f).exp()
                if (rows - log_a.exp()).abs().sum(1).max() <= case.tol:
                    break
            f = next_f
            g = -torch.logsumexp(score + (f + log_a)[:, :, None], 1)
        plan = (score + (f + log_a)[:, :, None] + (g + log_b)[:, None, :]).exp()
        dual = dot(plan.sum(2), f) + dot(plan.sum(1), g)
    return Solution(_attached(eps * dual, plan, cost), lambda: (eps * f, eps * g, plan))


def _torch_bmm(given: Given, case: Case) -> Solution:
    """The fastest loop by hand: scalings of a fixed kernel, which underflows at small epsilon."""
    cost = given.peers_cost(case)
    a, b, eps = given.log_a.exp()[:, :, None], given.log_b.exp()[:, :, None], case.epsilon
    with torch.no_grad():
        kernel = (cost.detach() / -eps).exp()
        u, v, bv = torch.ones_like(a), torch.ones_like(b), b
        for k in range(case.max_iter):
            next_u = 1 / torch.bmm(kernel, bv)
            rows = a * u / next_u
            if case.tol and k and k % 10 == 0 and (rows - a).abs().sum(1).max() <= case.tol:
                break
            u = next_u
            v = 1 / torch.bmm(kernel.mT, a * u)
            bv = b * v
        au, bv = a * u, b * v
        f, g = eps * u[:, :, 0].log(), eps * v[:, :, 0].log()
        rows = (au * torch.bmm(kernel, bv))[:, :, 0]
        dual = dot(rows, f) + dot(b[:, :, 0], g)

    def plan() -> Tensor:
        return au * kernel * bv.mT

    value = _attached(dual, plan(), cost) if cost.requires_grad else dual
    return Solution(value, lambda: (f, g, plan()))


def _attached(value: Tensor, plan: Tensor, cost: Tensor) -> Tensor:
    """``value`` with the plan as its derivative with respect to the cost."""
    if not cost.requires_grad:
        return value
    linear = (plan * cost).sum((1, 2))
    return linear + (value - linear.detach())


def _pot(given: Given, case: Case, method: str) -> Solution:
    import ot

    cost, a, b = given.peers_cost(case), given.log_a.exp(), given.log_b.exp()
    options = {"max_iter": case.max_iter, "tol": case.tol, "method": method}
    # Its KL has NaN at zero masses, its entropy has not.
    result = ot.batch.solve_batch(cost, case.epsilon, a, b, reg_type="entropy", **options)

    def details() -> tuple[Tensor, Tensor, Tensor]:
        log_u, log_v = result.potentials
        if method == "sinkhorn":
            log_u, log_v = log_u.log(), log_v.log()
        f, g = log_u - given.log_a, log_v - given.log_b
        f, g = (case.epsilon * x.nan_to_num(nan=0.0, neginf=0.0) for x in (f, g))
        return f, g, result.plan

    def offset() -> Tensor:
        """Its regulariser is sum P log P, which is sum P log(a b) more than KL(P || a b)."""
        plan = result.plan.detach()
        masses = dot(plan.sum(2), given.log_a) + dot(plan.sum(1), given.log_b)
        return case.epsilon * masses

    return Solution(result.value, details, offset)


def _geomloss(given: Given, case: Case) -> Solution:
    from geomloss import ot

    cost = given.peers_cost(case)
    masses = {"a": given.log_a.exp(), "b": given.log_b.exp()}
    result = ot.solve_batch(cost, reg=case.epsilon, max_iter=case.max_iter, **masses)
    value = result.value
    if cost.requires_grad:
        # In 0.3.1 each of both half-steps carries the whole gradient: their sum is halved.
        value = (value + value.detach()) / 2
    return Solution(value, lambda: (result.potential_a, result.potential_b, result.plan))


def _geomloss_samples(given: Given, case: Case) -> Solution:
    """SamplesLoss annealed over as many steps as the others run iterations, without debiasing."""
    from geomloss import SamplesLoss

    x, y = (normalize(z, dim=2) for z in given.leaves)
    blur, diameter = math.sqrt(case.epsilon), 2.0
    scaling = (blur / diameter) ** (1 / max(case.max_iter - 2, 1))
    options = {"p": 2, "blur": blur, "diameter": diameter, "scaling": scaling, "debias": False}
    masses = given.log_a.exp(), given.log_b.exp()

    def loss(**more: Any) -> Any:
        made = SamplesLoss("sinkhorn", backend="tensorized", **options, **more)
        return made(masses[0], x, masses[1], y)

    def details() -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            f, g = loss(potentials=True)
            score = (f[:, :, None] + g[:, None, :] - (1 - x @ y.mT)) / case.epsilon
            plan = (score + given.log_a[:, :, None] + given.log_b[:, None, :]).exp()
        return f, g, plan

    return Solution(loss(), details)


# --------------------------------------------------------------------------------------- table


def _backend(name: str, label: str = "", **options: Any) -> Provider:
    def unavailable(task: Task) -> str | None:
        case = task.case
        if options and case.tol == 0:
            return "its iterates are others: for runs to a residual only"
        probe = torch.zeros(1, case.n, case.m, dtype=case.dtype, device=case.device)
        try:
            optical.sinkhorn(probe, epsilon=1.0, max_iter=1, backend=name)
        except registry.BackendUnsupported as error:
            return str(error)
        return None

    solve = functools.partial(_ours, backend=name, **options)
    first: Literal["f"] | None = None if options else "f"
    start = functools.partial(TorchJob, solve, True)
    return Provider(label or name, unavailable, start, first)


def _peer(
    name: str,
    solve: Callable[[Given, Case], Solution],
    unavailable: Callable[[Task], str | None] = lambda task: None,
    **options: Any,
) -> Provider:
    start = functools.partial(TorchJob, solve, False)
    return Provider(name, unavailable, start, **options)


def _needs(package: str) -> Callable[[Task], str | None]:
    def unavailable(task: Task) -> str | None:
        return None if importlib.util.find_spec(package) else f"{package} is not installed"

    return unavailable


@functools.lru_cache
def _ott_reason(python: str) -> str | None:
    found = subprocess.run([python, "-c", "import ott"], capture_output=True)
    return None if found.returncode == 0 else f"ott-jax is not installed for {python}"


def _vectors_only(task: Task) -> str | None:
    if task.kind != "vectors":
        return "it starts from token vectors"
    return "it runs on a CPU" if task.case.device != "cpu" else None


def _one_cloud_pair(task: Task) -> str | None:
    reason = _needs("geomloss")(task)
    if reason is None and (task.kind != "vectors" or task.case.batch > 1 or task.case.tol):
        return "for one large problem from token vectors, with a fixed number of steps"
    return reason


def _loops(task: Task) -> str | None:
    if task.kind != "solve" or task.case.device != "cpu" or task.case.tol:
        return "for a CPU with the cost given and a fixed number of iterations"
    if task.case.dtype != torch.float32 or task.mode != "forward":
        return "for the forward pass in float32"
    found = ceiling.library()
    return found if isinstance(found, str) else None


def _more_steps(case: Case) -> Iterator[Case]:
    """For a solver without a stopping rule: the least number of steps that is enough."""
    counts = itertools.takewhile(lambda k: k < case.max_iter, (10 * 2**i for i in range(32)))
    return (replace(case, max_iter=count) for count in [*counts, case.max_iter])


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        *(_backend(name) for name in registry.BACKENDS),
        _backend("cpu", "cpu_anderson", anderson=5),
        _peer("bmm+cpu", _ours_after_bmm, _vectors_only),
        _peer("torch", _torch_log),
        # The two that keep one kernel are not safe at small epsilon, and a bar for speed.
        _peer("torch_bmm", _torch_bmm),
        _peer("pot", functools.partial(_pot, method="log_sinkhorn"), _needs("ot")),
        _peer("pot_kernel", functools.partial(_pot, method="sinkhorn"), _needs("ot")),
        _peer("geomloss", _geomloss, _needs("geomloss"), first=None, rules=_more_steps),
        _peer("geomloss_samples", _geomloss_samples, _one_cloud_pair, first=None),
        Provider("ott", lambda task: _ott_reason(jobs.ott_python), WorkerJob, first="g", dual=True),
        Provider("sweeps", _loops, functools.partial(CeilingJob, ceiling.sweeps)),
        Provider("multiply_adds", _loops, functools.partial(CeilingJob, ceiling.multiply_adds)),
    )
}
