"""The benchmarked implementations: our backends, POT, GeomLoss, OTT-JAX and hand-written loops."""

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
    Job,
    OttJob,
    ProviderOutput,
    Task,
    TaskTensors,
    TorchJob,
)
from optical.backends import registry


@dataclass(frozen=True)
class Provider:
    """One implementation and its conventions.

    Attributes:
        name: the name in the CSV, which ``--only`` accepts.
        unavailable: task -> None, or the reason why this provider cannot run the task.
        start: task -> its job.
        first_update: the potential that an iteration updates first, "f" or "g"; None if its
            iterates are not Sinkhorn iterates of ours, so that only the limit is comparable.
        reports_dual: whether its value is that of the dual problem, which differs from that of the
            plan after finitely many iterations.
        stopping_rules: case with ``tol`` -> the same case with increasingly strict stopping rules.
    """

    name: str
    unavailable: Callable[[Task], str | None]
    start: Callable[[Task], Job]
    first_update: Literal["f", "g"] | None = "f"
    reports_dual: bool = False
    stopping_rules: Callable[[Case], Iterator[Case]] = lambda case: (
        replace(case, tol=case.tol / 2**k) for k in range(12)
    )


# ------------------------------------------------------------------------------------- solvers


def _optical(tensors: TaskTensors, case: Case, backend: str, **options: Any) -> ProviderOutput:
    options = {
        "epsilon": case.epsilon,
        "max_iter": case.max_iter,
        "tol": case.tol,
        "backend": backend,
        **options,
    }
    options |= {"log_a": tensors.log_a, "log_b": tensors.log_b}
    solve: Any = optical.sinkhorn if len(tensors.leaves) == 1 else optical.sinkhorn_vectors
    result = solve(*tensors.leaves, **options)
    return ProviderOutput(result.value, lambda: (result.f, result.g, result.plan()))


def _optical_after_bmm(tensors: TaskTensors, case: Case) -> ProviderOutput:
    """Our solver on a cost built by PyTorch: the baseline for the fused path from vectors."""
    x, y = (normalize(z, dim=2) for z in tensors.leaves)
    return _optical(tensors._replace(leaves=(1 - x @ y.mT,)), case, "cpu")


def _torch_log(tensors: TaskTensors, case: Case) -> ProviderOutput:
    """A hand-written log-domain loop without masks; it tests the residual every ten iterations."""
    cost = tensors.unmasked_cost(case)
    eps, log_a, log_b = case.epsilon, tensors.log_a, tensors.log_b
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
        dual = _masked_dot(plan.sum(2), f) + _masked_dot(plan.sum(1), g)
    return ProviderOutput(
        _with_plan_gradient(eps * dual, plan, cost), lambda: (eps * f, eps * g, plan)
    )


def _torch_bmm(tensors: TaskTensors, case: Case) -> ProviderOutput:
    """The fastest hand-written loop: scalings of a kernel that underflows at small epsilon."""
    cost = tensors.unmasked_cost(case)
    a, b, eps = tensors.log_a.exp()[:, :, None], tensors.log_b.exp()[:, :, None], case.epsilon
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
        dual = _masked_dot(rows, f) + _masked_dot(b[:, :, 0], g)

    def plan() -> Tensor:
        return au * kernel * bv.mT

    value = _with_plan_gradient(dual, plan(), cost) if cost.requires_grad else dual
    return ProviderOutput(value, lambda: (f, g, plan()))


def _with_plan_gradient(value: Tensor, plan: Tensor, cost: Tensor) -> Tensor:
    """``value`` with its envelope gradient: the plan, as derivative with respect to the cost."""
    if not cost.requires_grad:
        return value
    linear = (plan * cost).sum((1, 2))
    return linear + (value - linear.detach())


def _pot(tensors: TaskTensors, case: Case, method: str) -> ProviderOutput:
    import ot

    cost, a, b = tensors.unmasked_cost(case), tensors.log_a.exp(), tensors.log_b.exp()
    options = {"max_iter": case.max_iter, "tol": case.tol, "method": method}
    # POT's KL regulariser is NaN at zero masses; its entropy is not.
    result = ot.batch.solve_batch(cost, case.epsilon, a, b, reg_type="entropy", **options)

    def details() -> tuple[Tensor, Tensor, Tensor]:
        log_u, log_v = result.potentials
        if method == "sinkhorn":
            log_u, log_v = log_u.log(), log_v.log()
        f, g = log_u - tensors.log_a, log_v - tensors.log_b
        f, g = (case.epsilon * x.nan_to_num(nan=0.0, neginf=0.0) for x in (f, g))
        return f, g, result.plan

    def offset() -> Tensor:
        """POT's regulariser, sum P log P, exceeds KL(P || a b) by sum P log(a b)."""
        plan = result.plan.detach()
        masses = _masked_dot(plan.sum(2), tensors.log_a) + _masked_dot(plan.sum(1), tensors.log_b)
        return case.epsilon * masses

    return ProviderOutput(result.value, details, offset)


def _geomloss(tensors: TaskTensors, case: Case) -> ProviderOutput:
    from geomloss import ot

    cost = tensors.unmasked_cost(case)
    masses = {"a": tensors.log_a.exp(), "b": tensors.log_b.exp()}
    result = ot.solve_batch(cost, reg=case.epsilon, max_iter=case.max_iter, **masses)
    value = result.value
    if cost.requires_grad:
        # In GeomLoss 0.3.1, each half-step carries the full gradient, so their sum is halved.
        value = (value + value.detach()) / 2
    return ProviderOutput(value, lambda: (result.potential_a, result.potential_b, result.plan))


def _geomloss_samples(tensors: TaskTensors, case: Case) -> ProviderOutput:
    """SamplesLoss without debiasing, annealed over ``max_iter`` steps."""
    from geomloss import SamplesLoss

    x, y = (normalize(z, dim=2) for z in tensors.leaves)
    blur, diameter = math.sqrt(case.epsilon), 2.0
    scaling = (blur / diameter) ** (1 / max(case.max_iter - 2, 1))
    options = {"p": 2, "blur": blur, "diameter": diameter, "scaling": scaling, "debias": False}
    masses = tensors.log_a.exp(), tensors.log_b.exp()

    def loss(**extra: Any) -> Any:
        criterion = SamplesLoss("sinkhorn", backend="tensorized", **options, **extra)
        return criterion(masses[0], x, masses[1], y)

    def details() -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            f, g = loss(potentials=True)
            score = (f[:, :, None] + g[:, None, :] - (1 - x @ y.mT)) / case.epsilon
            plan = (score + tensors.log_a[:, :, None] + tensors.log_b[:, None, :]).exp()
        return f, g, plan

    return ProviderOutput(loss(), details)


def _masked_dot(mass: Tensor, potential: Tensor) -> Tensor:
    """Sum of products per problem, with 0 wherever the mass is 0, even at infinite potentials."""
    return torch.where(mass > 0, mass * potential, 0.0).sum(1)


# --------------------------------------------------------------------------------------- table


def _backend(name: str, label: str = "", **options: Any) -> Provider:
    """A backend of ``optical``; with ``options`` its iterates differ from the reference's."""

    def unavailable(task: Task) -> str | None:
        case = task.case
        if options and case.tol == 0:
            return "accelerated iterates can be compared only in runs to a residual"
        probe = torch.zeros(1, case.n, case.m, dtype=case.dtype, device=case.device)
        try:
            optical.sinkhorn(probe, epsilon=1.0, max_iter=1, backend=name)
        except registry.BackendUnsupported as error:
            return str(error)
        return None

    solve = functools.partial(_optical, backend=name, **options)
    first_update: Literal["f"] | None = None if options else "f"
    start = functools.partial(TorchJob, solve, True)
    return Provider(label or name, unavailable, start, first_update)


def _peer(
    name: str,
    solve: Callable[[TaskTensors, Case], ProviderOutput],
    unavailable: Callable[[Task], str | None] = lambda task: None,
    **options: Any,
) -> Provider:
    """A peer written in PyTorch, run in this process."""
    start = functools.partial(TorchJob, solve, False)
    return Provider(name, unavailable, start, **options)


def _requires(package: str) -> Callable[[Task], str | None]:
    def unavailable(task: Task) -> str | None:
        return None if importlib.util.find_spec(package) else f"{package} is not installed"

    return unavailable


@functools.lru_cache
def _ott_unavailable(python: str) -> str | None:
    process = subprocess.run([python, "-c", "import ott"], capture_output=True)
    return None if process.returncode == 0 else f"ott-jax is not installed for {python}"


def _cpu_vectors_only(task: Task) -> str | None:
    if task.kind != "vectors":
        return "supports only tasks from token vectors"
    return "runs only on a CPU" if task.case.device != "cpu" else None


def _one_problem_only(task: Task) -> str | None:
    reason = _requires("geomloss")(task)
    if reason is None and (task.kind != "vectors" or task.case.batch > 1 or task.case.tol):
        return "supports only one problem from token vectors with a fixed number of steps"
    return reason


def _ceiling_unavailable(task: Task) -> str | None:
    if task.kind != "solve" or task.case.device != "cpu" or task.case.tol:
        return "supports only a given cost and a fixed number of iterations, on a CPU"
    if task.case.dtype != torch.float32 or task.mode != "forward":
        return "supports only the forward pass in float32"
    library = ceiling.library()
    return library if isinstance(library, str) else None


def _doubled_steps(case: Case) -> Iterator[Case]:
    """Stopping rules for a solver without one: 10, 20, 40, ... steps, at most ``max_iter``."""
    counts = itertools.takewhile(lambda k: k < case.max_iter, (10 * 2**i for i in range(32)))
    return (replace(case, max_iter=count) for count in [*counts, case.max_iter])


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        *(_backend(name) for name in registry.BACKENDS),
        _backend("cpu", "cpu_anderson", anderson=5),
        _peer("bmm+cpu", _optical_after_bmm, _cpu_vectors_only),
        _peer("torch", _torch_log),
        # The two with a fixed kernel underflow at small epsilon and serve as a speed baseline.
        _peer("torch_bmm", _torch_bmm),
        _peer("pot", functools.partial(_pot, method="log_sinkhorn"), _requires("ot")),
        _peer("pot_kernel", functools.partial(_pot, method="sinkhorn"), _requires("ot")),
        _peer(
            "geomloss",
            _geomloss,
            _requires("geomloss"),
            first_update=None,
            stopping_rules=_doubled_steps,
        ),
        _peer("geomloss_samples", _geomloss_samples, _one_problem_only, first_update=None),
        Provider(
            "ott",
            lambda task: _ott_unavailable(jobs.ott_python),
            OttJob,
            first_update="g",
            reports_dual=True,
        ),
        Provider("sweeps", _ceiling_unavailable, functools.partial(CeilingJob, ceiling.sweeps)),
        Provider(
            "multiply_adds",
            _ceiling_unavailable,
            functools.partial(CeilingJob, ceiling.multiply_adds),
        ),
    )
}
