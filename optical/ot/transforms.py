"""The operator under the transforms of ``torch.func`` and forward-mode derivatives.

Each class wraps a registered op, whose rule for ``vmap`` it uses. Forward mode is the transpose of
reverse mode: the value of a problem changes by its gradient times the change of its inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optical.backends import reference
from optical.backends.problem import Problem, Solution

_OPS: Any = torch.ops.optical


def apply(function: Any, *arguments: Any) -> Any:
    """Call ``function.apply``, which PyTorch does not annotate."""
    return function.apply(*arguments)


def filled(grads: Any, *like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Replace None in a pair of upstream gradients by zeros, unless both are None."""
    first, second = grads
    if first is None and second is None:
        return None, None
    return (
        torch.zeros_like(like[0]) if first is None else first,
        torch.zeros_like(like[1]) if second is None else second,
    )


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


class Solve(torch.autograd.Function):
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
        values = [torch.zeros_like(fields[_EPSILON]) if x is None else x for x in upstream[:2]]
        potentials = filled(upstream[2:4], *fields[_COUNT : _COUNT + 2])
        grad_x, grad_y, grad_log_a, grad_log_b = apply(
            SolveGradient, *values, *potentials, *fields, *needs
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
            gradients = apply(SolveGradient, *upstream, None, None, *fields, *needs)
            total = zeros
            for grad, tangent in zip(gradients, moved, strict=True):
                if tangent is not None:
                    total = total + (grad.to(zeros) * tangent.to(zeros)).flatten(1).sum(1)
            results.append(total)
        return *results, *[None] * (len(Solution._fields) - 2)


class SolveGradient(torch.autograd.Function):
    """The gradients of ``Solve``; they have no derivative of either mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = _OPS.sinkhorn_backward.default(*arguments)
        return gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        return None

    backward = staticmethod(reference.no_second_derivative)
    jvp = staticmethod(reference.no_second_derivative)


class Product(torch.autograd.Function):
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
        grad_v = apply(Product, *fields, f, g, grad, not ctx.transpose)
        return *[None] * (_COUNT + 2), grad_v, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        *fields, f, g = _saved(ctx)
        *others, tangent, _ = tangents
        _refuse_tangents(dict(zip((*Problem._fields, "f", "g"), others, strict=True)), ())
        if tangent is None:
            return None
        product: Tensor = apply(Product, *fields, f, g, tangent, ctx.transpose)
        return product


class Plan(torch.autograd.Function):
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
        grad_x, grad_y, grad_log_a, grad_log_b, *potentials = apply(
            PlanGradient, grad, *fields, f, g, log, *needs
        )
        gradients: dict[str, Tensor | None] = {"log_a": grad_log_a, "log_b": grad_log_b}
        gradients["x"], gradients["y"] = grad_x if needs[0] else None, grad_y if needs[1] else None
        return *(gradients.get(name) for name in Problem._fields), *potentials, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        raise RuntimeError("a plan has no forward-mode derivative; use a reverse-mode one")


class PlanGradient(torch.autograd.Function):
    """The gradients of ``Plan``; they have no derivative of either mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = _OPS.plan_backward.default(*arguments)
        return gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        return None

    backward = staticmethod(reference.no_second_derivative)
    jvp = staticmethod(reference.no_second_derivative)


def _refuse_tangents(tangents: dict[str, Tensor | None], allowed: tuple[str, ...]) -> None:
    for name, tangent in tangents.items():
        if tangent is not None and name not in allowed:
            raise RuntimeError(f"there is no forward-mode derivative with respect to {name}")
