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

from optical.backends.problem import Problem, Solution
from optical.ot import operator
from optical.ot.checks import CONCRETE, tracing

_OPS: Any = torch.ops.optical
_FIRST_OPTION = Problem._fields.index("g0") + 1


def solve(problem: Problem) -> Solution:
    """Solve a batch; x, y, log_a and log_b receive the gradient that ``problem.gradient`` names."""
    if _plain(problem):
        if not needs_gradient(problem):
            return operator.forward(problem)
        outputs: list[Solution] = []
        x, y, log_a, log_b = problem.x, problem.y, problem.log_a, problem.log_b
        differentiable = _apply_plain(_Solve, x, y, log_a, log_b, problem, outputs)
        value, value_linear, *potentials = differentiable
        solution = outputs[0]._replace(value=value, value_linear=value_linear)
        if potentials:
            solution = solution._replace(f=potentials[0], g=potentials[1])
        return solution
    if _transformed():
        return Solution(*_apply(_TransformedSolve, *problem))
    return Solution(*_OPS.sinkhorn.default(*problem))


def apply_plan(problem: Problem, f: Tensor, g: Tensor, v: Tensor, transpose: bool) -> Tensor:
    """Multiply the plan with v; only v receives a gradient. See ``operator.apply_plan``."""
    if _plain(problem, f, g, v):
        if v.requires_grad and torch.is_grad_enabled():
            product: Tensor = _apply(_Product, v, problem, f, g, transpose)
            return product
        return operator.apply_plan(problem, f, g, v, transpose)
    if _transformed():
        product = _apply(_TransformedProduct, *problem, f, g, v, transpose)
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
            coupling: Tensor = _apply(_Plan, *leaves, problem, log)
            return coupling
        return operator.plan(problem, f, g, log)
    if _transformed():
        coupling = _apply(_TransformedPlan, *problem, f, g, log)
        return coupling
    coupling = _OPS.plan.default(*problem, f, g, log)
    return coupling


def _apply(function: Any, *arguments: Any) -> Any:
    """Call ``function.apply``, which PyTorch does not annotate."""
    return function.apply(*arguments)


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
        and all(type(x) in CONCRETE for x in (problem.x, problem.log_a, problem.log_b, *others))
        and (problem.y is None or type(problem.y) in CONCRETE)
    )


def _transformed() -> bool:
    if tracing():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# ------------------------------------------------------------------------------------------- plain


def _keep(
    ctx: Any,
    problem: Problem,
    kept: tuple[Tensor | None, ...],
    saved: tuple[Tensor | None, ...] = (),
) -> None:
    """Keep a problem for backward, with tensors that are (``saved``) or are not in the graph.

    Saving and unpacking a tensor costs microseconds. What cannot require a gradient is therefore
    kept with its version counters, which are compared as autograd would do.
    """
    x, y, kind, cu_a, cu_b, log_a, log_b, epsilon, f0, g0 = problem[:_FIRST_OPTION]
    ctx.kind, ctx.options = kind, problem[_FIRST_OPTION:]
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
        solution = operator.forward(problem)
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
        problem, f, g, w, z, n_iter = _restore(ctx)
        values = _filled(upstream[:2], problem.epsilon, always=True)
        potentials = _filled(upstream[2:], f, g, always=False)
        need_x, need_y, need_a, need_b = ctx.needs_input_grad[:4]
        arguments: tuple[Any, ...] = (*values, *potentials)
        saved = (f, g, w, z, n_iter, need_x, need_y)
        if torch.is_grad_enabled():
            leaves = (*arguments, problem.x, problem.y, problem.log_a, problem.log_b)
            gradients = _apply(_SolveGradient, *leaves, problem, saved)
        else:
            gradients = operator.backward(*arguments, problem, *saved)
        grad_x, grad_y, grad_log_a, grad_log_b = gradients
        return (
            *(grad_x if need_x else None, grad_y if need_y else None),
            *(grad_log_a if need_a else None, grad_log_b if need_b else None),
            *(None, None),
        )


def _filled(grads: Any, *like: Tensor, always: bool) -> tuple[Tensor | None, Tensor | None]:
    """Replace None in a pair of upstream gradients by zeros; (None, None) only ``always``."""
    if not grads or (grads[0] is None and grads[1] is None and not always):
        return None, None
    first, second = grads
    return (
        torch.zeros_like(like[0]) if first is None else first,
        torch.zeros_like(like[-1]) if second is None else second,
    )


class _SolveGradient(torch.autograd.Function):
    """The gradients of ``_Solve`` inside of a graph; they have no derivative."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        leaves: tuple[Any, ...] = arguments[:4]
        problem, saved = arguments[-2:]
        gradients: tuple[Tensor | None, ...] = operator.backward(*leaves, problem, *saved)
        return gradients

    backward = staticmethod(operator.no_second_derivative)


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
            gradients = _apply(_PlanGradient, *leaves, problem, ctx.log, *needs)
        else:
            gradients = operator.plan_backward(grad, problem, f, g, ctx.log, *needs)
        return *gradients, None, None


class _PlanGradient(torch.autograd.Function):
    """The gradients of ``_Plan`` inside of a graph; they have no derivative."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        grad, _x, _y, _log_a, _log_b, f, g, problem, log, need_x, need_y = arguments
        return operator.plan_backward(grad, problem, f, g, log, need_x, need_y)

    backward = staticmethod(operator.no_second_derivative)


# ------------------------------------------------------------------------------------- transformed


def _save(ctx: Any, values: tuple[Any, ...]) -> None:
    """Save values for backward and forward mode, tensors apart from the others."""
    ctx.tensors = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    ctx.values = [None if isinstance(value, Tensor) else value for value in values]
    tensors = [values[i] for i in ctx.tensors]
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _saved(ctx: Any) -> list[Any]:
    values = list(ctx.values)
    for position, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
        values[position] = tensor
    return values


_COUNT, _EPSILON = len(Problem._fields), Problem._fields.index("epsilon")


class _TransformedSolve(torch.autograd.Function):
    """``solve`` under the transforms of ``torch.func`` and forward-mode derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*fields: Any) -> tuple[Tensor, ...]:
        solution: tuple[Tensor, ...] = _OPS.sinkhorn.default(*fields)
        return solution

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)  # of tangents as well: None is not a change of 0
        solution = Solution(*output)
        saved = (solution.f, solution.g, solution.w, solution.z, solution.n_iter)
        _save(ctx, (*inputs, *saved))
        ctx.unrolled = Problem(*inputs).gradient == "unroll"
        ctx.mark_non_differentiable(*solution[4 if ctx.unrolled else 2 :])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        fields = _saved(ctx)
        needs = ctx.needs_input_grad[:2]
        values = _filled(upstream[:2], fields[_EPSILON], always=True)
        potentials = _filled(upstream[2:4], *fields[_COUNT : _COUNT + 2], always=False)
        grad_x, grad_y, grad_log_a, grad_log_b = _apply(
            _TransformedGradient, *values, *potentials, *fields, *needs
        )
        gradients: dict[str, Tensor | None] = {"log_a": grad_log_a, "log_b": grad_log_b}
        gradients["x"], gradients["y"] = grad_x if needs[0] else None, grad_y if needs[1] else None
        return tuple(gradients.get(name) for name in Problem._fields)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Contract the gradient of each problem's values with the tangents of its inputs."""
        fields = _saved(ctx)
        problem = Problem(*fields[:_COUNT])
        if ctx.unrolled:
            raise RuntimeError(
                "gradient='unroll' has no forward-mode derivative; use 'implicit' or 'envelope'"
            )
        if problem.packed:
            raise RuntimeError("packed problems have no forward-mode derivative; pad them instead")
        by_name = dict(zip(Problem._fields, tangents, strict=True))
        _refuse_tangents(by_name, ("x", "y", "log_a", "log_b"))
        moved = [by_name[name] for name in ("x", "y", "log_a", "log_b")]
        results: list[Tensor | None] = []
        ones, zeros = torch.ones_like(problem.epsilon), torch.zeros_like(problem.epsilon)
        needs = moved[0] is not None, moved[1] is not None
        for upstream in ((ones, zeros), (zeros, ones)):
            gradients = _apply(_TransformedGradient, *upstream, None, None, *fields, *needs)
            total = zeros
            for grad, tangent in zip(gradients, moved, strict=True):
                if tangent is not None:
                    total = total + (grad.to(zeros) * tangent.to(zeros)).flatten(1).sum(1)
            results.append(total)
        return *results, *[None] * (len(Solution._fields) - 2)


class _TransformedGradient(torch.autograd.Function):
    """The gradients of ``_TransformedSolve``; they have no derivative of either mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = _OPS.sinkhorn_backward.default(*arguments)
        return gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        return None

    backward = staticmethod(operator.no_second_derivative)
    jvp = staticmethod(operator.no_second_derivative)


class _TransformedProduct(torch.autograd.Function):
    """``apply_plan`` under transforms; linear in v, and constant in everything else."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        product: Tensor = _OPS.apply_plan.default(*arguments)
        return product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        *kept, _v, ctx.transpose = inputs
        _save(ctx, tuple(kept))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (_COUNT + 4)
        *fields, f, g = _saved(ctx)
        # Not by the plain route: what was saved may be the wrapper of a transform that has ended.
        grad_v = _apply(_TransformedProduct, *fields, f, g, grad, not ctx.transpose)
        return *[None] * (_COUNT + 2), grad_v, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        *fields, f, g = _saved(ctx)
        *others, tangent, _ = tangents
        _refuse_tangents(dict(zip((*Problem._fields, "f", "g"), others, strict=True)), ())
        if tangent is None:
            return None
        product: Tensor = _apply(_TransformedProduct, *fields, f, g, tangent, ctx.transpose)
        return product


class _TransformedPlan(torch.autograd.Function):
    """``plan`` under transforms."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        coupling: Tensor = _OPS.plan.default(*arguments)
        return coupling

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *fields, f, g, log = _saved(ctx)
        needs = ctx.needs_input_grad[:2]
        grad_x, grad_y, grad_log_a, grad_log_b, *potentials = _apply(
            _TransformedPlanGradient, grad, *fields, f, g, log, *needs
        )
        gradients: dict[str, Tensor | None] = {"log_a": grad_log_a, "log_b": grad_log_b}
        gradients["x"], gradients["y"] = grad_x if needs[0] else None, grad_y if needs[1] else None
        return *(gradients.get(name) for name in Problem._fields), *potentials, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        raise RuntimeError("a plan has no forward-mode derivative; use a reverse-mode one")


class _TransformedPlanGradient(torch.autograd.Function):
    """The gradients of ``_TransformedPlan``; they have no derivative of either mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = _OPS.plan_backward.default(*arguments)
        return gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        return None

    backward = staticmethod(operator.no_second_derivative)
    jvp = staticmethod(operator.no_second_derivative)


def _refuse_tangents(tangents: dict[str, Tensor | None], allowed: tuple[str, ...]) -> None:
    for name, tangent in tangents.items():
        if tangent is not None and name not in allowed:
            raise RuntimeError(f"there is no forward-mode derivative with respect to {name}")
