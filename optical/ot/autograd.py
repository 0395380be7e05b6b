"""Differentiable calls of the operator, by the route that the situation needs.

Three routes compute the same numbers with the same backends:

- plain: an ``autograd.Function`` that calls the backend, for ordinary tensors. PyTorch's share of
  a call is smallest this way.
- transformed: an ``autograd.Function`` of the registered ops with a rule for every transform of
  ``torch.func`` and for forward-mode derivatives.
- registered: the ops themselves, which graphs of ``torch.compile`` and ``torch.export``, traces,
  dispatch modes (fake tensors, selective checkpointing) and tensor subclasses see.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from optical.backends import reference
from optical.backends.problem import FIRST_OPTION, Problem, Solution
from optical.ot import operator, transforms
from optical.ot.checks import CONCRETE, tracing

_OPS: Any = torch.ops.optical


def solve(problem: Problem) -> Solution:
    """Solve a batch; x, y, log_a and log_b receive the gradient that ``problem.gradient`` names."""
    if _plain(problem):
        if not needs_gradient(problem):
            return operator.forward(problem)
        outputs: list[Solution] = []
        x, y, log_a, log_b = problem.x, problem.y, problem.log_a, problem.log_b
        # PyTorch records the graph on the tensors that the function returns, which are the
        # solution's own.
        _apply_plain(_Solve, x, y, log_a, log_b, problem, outputs)
        return outputs[0]
    if _transformed():
        return Solution(*transforms.apply(transforms.Solve, *problem))
    return Solution(*_OPS.sinkhorn.default(*problem))


def transport_cost(problem: Problem, mean: bool = False) -> Tensor:
    """Solve a batch for ``value_linear`` alone, (B,), or for its mean over the batch.

    It is differentiable as in ``solve``. One node of the graph takes less time than those of a
    whole solution and of a mean.
    """
    if not _plain(problem):
        cost = solve(problem).value_linear
    elif needs_gradient(problem):
        x, y, log_a, log_b = problem.x, problem.y, problem.log_a, problem.log_b
        reduced: Tensor = _apply_plain(_TransportCost, x, y, log_a, log_b, problem, mean)
        return reduced
    else:
        cost = operator.forward(problem, values_only=True).value_linear
    return cost.mean() if mean else cost


def apply_plan(problem: Problem, f: Tensor, g: Tensor, v: Tensor, transpose: bool) -> Tensor:
    """Multiply the plan with v; only v receives a gradient. See ``operator.apply_plan``."""
    if _plain(problem, f, g, v):
        if v.requires_grad and torch.is_grad_enabled():
            product: Tensor = transforms.apply(_Product, v, problem, f, g, transpose)
            return product
        return operator.apply_plan(problem, f, g, v, transpose)
    if _transformed():
        product = transforms.apply(transforms.Product, *problem, f, g, v, transpose)
        return product
    product = _OPS.apply_plan.default(*problem, f, g, v, transpose)
    return product


def plan(problem: Problem, f: Tensor, g: Tensor, log: bool) -> Tensor:
    """Compute the plan of padded problems, or its logarithm.

    x, y, log_a, log_b, f and g receive the gradient: with ``gradient="implicit"`` the first four
    that at the fixed point, otherwise each the partial derivative.
    """
    if _plain(problem, f, g):
        leaves = problem.x, problem.y, problem.log_a, problem.log_b, f, g
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves):
            coupling: Tensor = transforms.apply(_Plan, *leaves, problem, log)
            return coupling
        return operator.plan(problem, f, g, log)
    if _transformed():
        coupling = transforms.apply(transforms.Plan, *problem, f, g, log)
        return coupling
    coupling = _OPS.plan.default(*problem, f, g, log)
    return coupling


def _apply_plain(function: Any, *arguments: Any) -> Any:
    """Call ``apply`` without its support of transforms, which takes microseconds."""
    return super(torch.autograd.Function, function).apply(*arguments)


def needs_gradient(problem: Problem) -> bool:
    """Whether a derivative by the problem's tensors is being recorded."""
    return torch.is_grad_enabled() and (
        problem.x.requires_grad
        or problem.log_a.requires_grad
        or problem.log_b.requires_grad
        or (problem.y is not None and problem.y.requires_grad)
    )


def _plain(problem: Problem, *others: Tensor) -> bool:
    return (
        not tracing()
        and forward_ad._current_level < 0
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and type(problem.x) in CONCRETE
        and (problem.y is None or type(problem.y) in CONCRETE)
        and type(problem.log_a) in CONCRETE
        and type(problem.log_b) in CONCRETE
        and (not others or all(type(x) in CONCRETE for x in others))
    )


def _transformed() -> bool:
    if tracing():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# ------------------------------------------------------------------------------------------- plain


def _keep(
    ctx: Any,
    problem: Problem,
    kept: tuple[Tensor | None, ...] = (),
    saved: tuple[Tensor | None, ...] = (),
) -> None:
    """Keep a problem for backward, with tensors that are (``saved``) or are not in the graph.

    Saving and unpacking a tensor costs microseconds. What cannot require a gradient is therefore
    kept with its version counters, which are compared as autograd would do.
    """
    x, y, kind, cu_a, cu_b, log_a, log_b, epsilon, f0, g0 = problem[:FIRST_OPTION]
    ctx.kind, ctx.options = kind, problem[FIRST_OPTION:]
    ctx.kept = (cu_a, cu_b, epsilon, f0, g0, *kept)
    ctx.versions = versions(ctx.kept)
    ctx.save_for_backward(x, y, log_a, log_b, *saved)


def _restore(ctx: Any) -> tuple[Any, ...]:
    """Return the problem, and the ``saved`` and the ``kept`` tensors of ``_keep``."""
    # Read once: checkpointing unpacks a saved tensor only once.
    x, y, log_a, log_b, *saved = ctx.saved_tensors
    if versions(ctx.kept) != ctx.versions:
        raise RuntimeError(
            "a tensor needed for the gradient of optical.sinkhorn (offsets, epsilon, init, or f or "
            "g of its result) has been modified by an inplace operation"
        )
    cu_a, cu_b, epsilon, f0, g0, *kept = ctx.kept
    fields = (x, y, ctx.kind, cu_a, cu_b, log_a, log_b, epsilon, f0, g0)
    return Problem(*fields, *ctx.options), *saved, *kept


def versions(tensors: Iterable[Tensor | None]) -> list[int] | None:
    """Return the version counters of tensors, which count in-place changes.

    None if a tensor has none (inference mode).
    """
    try:
        return [-1 if tensor is None else tensor._version for tensor in tensors]
    except RuntimeError:
        return None


class _Solve(torch.autograd.Function):
    """Plain route of ``solve``; ``outputs`` receives the whole solution."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        log_a: Tensor,
        log_b: Tensor,
        problem: Problem,
        outputs: list[Solution],
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.kept_by_backend = []
        solution = operator.forward(problem, False, ctx.kept_by_backend)
        outputs.append(solution)
        f, g = solution.f, solution.g
        potentials, others = (f, g), (solution.w, solution.z, solution.n_iter)
        if problem.gradient == "unroll":
            _keep(ctx, problem, others, potentials)
            return solution.value, solution.value_linear, f, g
        # f and g are no outputs of the graph, so keeping them makes no cycle.
        _keep(ctx, problem, (*potentials, *others))
        return solution.value, solution.value_linear

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in upstream):
            return (None,) * 6
        problem, *saved = _restore(ctx)
        grad_value, grad_value_linear, *rest = upstream
        potentials = transforms.filled(rest, *saved[:2]) if rest else (None, None)
        return _gradients(ctx, (grad_value, grad_value_linear, *potentials), problem, saved)


class _TransportCost(torch.autograd.Function):
    """Plain route of ``transport_cost``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        log_a: Tensor,
        log_b: Tensor,
        problem: Problem,
        mean: bool,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.kept_by_backend = []
        solution = operator.forward(problem, True, ctx.kept_by_backend)
        _keep(ctx, problem)
        # Nobody else has these tensors, so their versions cannot change.
        ctx.solved = solution.f, solution.g, solution.w, solution.z, solution.n_iter
        cost, ctx.mean = solution.value_linear, mean
        return cost.mean() if mean else cost

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        (problem,) = _restore(ctx)
        if ctx.mean:
            size = problem.epsilon.shape[0]
            grad = grad.expand(size) / size
        return _gradients(ctx, (None, grad, None, None), problem, ctx.solved)


def _gradients(
    ctx: Any, upstream: tuple[Any, ...], problem: Problem, saved: Iterable[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, y, log_a and log_b as needed, and None for two more arguments.

    ``saved`` are f, g, w, z and n_iter of the solution.
    """
    need_x, need_y, need_a, need_b = ctx.needs_input_grad[:4]
    arguments: tuple[Any, ...] = (*saved, need_x, need_y, need_a or need_b, ctx.kept_by_backend)
    if torch.is_grad_enabled():
        leaves = (*upstream, problem.x, problem.y, problem.log_a, problem.log_b)
        gradients = transforms.apply(_SolveGradient, *leaves, problem, arguments)
    else:
        gradients = operator.backward(*upstream, problem, *arguments)  # type: ignore[call-arg]
    grad_x, grad_y, grad_log_a, grad_log_b = gradients
    return (
        *(grad_x if need_x else None, grad_y if need_y else None),
        *(grad_log_a if need_a else None, grad_log_b if need_b else None),
        *(None, None),
    )


class _SolveGradient(torch.autograd.Function):
    """The gradients of ``_Solve`` inside of a graph; they have no derivative."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        leaves: tuple[Any, ...] = arguments[:4]
        problem, saved = arguments[-2:]
        return operator.backward(*leaves, problem, *saved)  # type: ignore[call-arg]

    backward = staticmethod(reference.no_second_derivative)


class _Product(torch.autograd.Function):
    """Plain route of ``apply_plan``."""

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, problem: Problem, f: Tensor, g: Tensor, transpose: bool
    ) -> Tensor:
        ctx.transpose = transpose
        _keep(ctx, problem, (f, g))
        return operator.apply_plan(problem, f, g, v, transpose)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        problem, f, g = _restore(ctx)
        return apply_plan(problem, f, g, grad, not ctx.transpose), None, None, None, None


class _Plan(torch.autograd.Function):
    """Plain route of ``plan``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        log_a: Tensor,
        log_b: Tensor,
        f: Tensor,
        g: Tensor,
        problem: Problem,
        log: bool,
    ) -> Tensor:
        ctx.log = log
        _keep(ctx, problem, (), (f, g))
        return operator.plan(problem, f, g, log)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        problem, f, g = _restore(ctx)
        needs = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            masses = problem.log_a, problem.log_b
            leaves = (grad, problem.x, problem.y, *masses, f, g)
            gradients = transforms.apply(_PlanGradient, *leaves, problem, ctx.log, *needs)
        else:
            gradients = operator.plan_backward(grad, problem, f, g, ctx.log, *needs)
        return *gradients, None, None


class _PlanGradient(torch.autograd.Function):
    """The gradients of ``_Plan`` inside of a graph; they have no derivative."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        grad, _x, _y, _log_a, _log_b, f, g, problem, log, need_x, need_y = arguments
        return operator.plan_backward(grad, problem, f, g, log, need_x, need_y)

    backward = staticmethod(reference.no_second_derivative)
