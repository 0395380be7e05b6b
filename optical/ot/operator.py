"""Registration of the operator with PyTorch: schemas, shapes, derivatives and batching.

The only file that uses ``torch.library``. The backend's name is an argument of the ops, so a
compiled graph keeps the choice, and all backends share the same shape rules and derivatives.
"""

from __future__ import annotations

from typing import Any, get_type_hints

import torch
from torch import Tensor

from optical.backends import registry
from optical.backends.dense import PaddedProblem
from optical.backends.problem import Problem, Solution

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    int: "int",
    float: "float",
    bool: "bool",
}


def _schema(fields: type[Problem] | type[Solution]) -> str:
    """Write the fields of a named tuple as arguments, or results, of an op."""
    hints = get_type_hints(fields)
    return ", ".join(f"{_SCHEMA_TYPES[hints[name]]} {name}" for name in fields._fields)


# The fields of a Problem are consecutive arguments of each op; in sinkhorn_backward, upstream
# gradients precede them.
_UPSTREAM = "Tensor grad_value, Tensor grad_value_linear, Tensor? grad_f, Tensor? grad_g"
_UPSTREAM_COUNT = 4
_PROBLEM, _PROBLEM_COUNT = _schema(Problem), len(Problem._fields)
_SAVED = "Tensor f, Tensor g, Tensor w, Tensor z, Tensor n_iter"
_library: Any = torch.library.Library("optical", "DEF")  # type: ignore[no-untyped-call]
for _definition in (
    f"sinkhorn({_PROBLEM}) -> ({_schema(Solution)})",
    f"sinkhorn_backward({_UPSTREAM}, {_PROBLEM}, {_SAVED}, bool need_x, bool need_y)"
    " -> (Tensor grad_x, Tensor grad_y, Tensor grad_log_a, Tensor grad_log_b)",
    f"apply_plan({_PROBLEM}, Tensor f, Tensor g, Tensor v, bool transpose) -> Tensor",
):
    _library.define(_definition, tags=(torch.Tag.pt2_compliant_tag,))


def sinkhorn(problem: Problem) -> Solution:
    """Solve a batch through the registered op; supports autograd as set by ``problem.gradient``."""
    return Solution(*torch.ops.optical.sinkhorn.default(*problem))


def apply_plan(problem: Problem, f: Tensor, g: Tensor, v: Tensor, transpose: bool) -> Tensor:
    """Multiply the plan with v through the registered op; only v receives a gradient.

    v is (B, m, k) and the result (B, n, k), or packed (M, k) and (N, k); with ``transpose``, v has
    rows and the result columns. v has the computing dtype.
    """
    product: Tensor = torch.ops.optical.apply_plan.default(*problem, f, g, v, transpose)
    return product


def _split(arguments: tuple[Any, ...]) -> tuple[Problem, tuple[Any, ...]]:
    """Split arguments that begin with the fields of a Problem from those that follow."""
    return Problem(*arguments[:_PROBLEM_COUNT]), arguments[_PROBLEM_COUNT:]


# -------------------------------------------------------------------------------- implementations


def _choose(problem: Problem, gradient: bool = False) -> tuple[registry.Backend, Problem]:
    """Choose a backend, and make the problem contiguous, except for the strides of a given cost."""
    backend = registry.choose(problem.backend, problem, gradient)
    if not (problem.x.numel() and problem.log_a.numel() and problem.log_b.numel()):
        # Kernels need not handle launches without entries.
        backend = registry.BACKENDS["reference"]
    contiguous: list[Any] = [x.contiguous() if isinstance(x, Tensor) else x for x in problem]
    if problem.y is None:
        contiguous[0] = problem.x
    return backend, Problem(*contiguous)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    backend, problem = _choose(Problem(*arguments))
    solve = backend.load().forward
    with torch.autocast(problem.x.device.type, enabled=False):
        solution = PaddedProblem(problem).forward(solve) if backend.dense else solve(problem)
    # The fake below promises contiguous outputs, whatever the strides of the inputs.
    return tuple(x.contiguous() for x in solution)


def _backward(
    grad_value: Tensor,
    grad_value_linear: Tensor,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    problem, (f, g, w, z, n_iter, need_x, need_y) = _split(arguments)
    backend, problem = _choose(problem, gradient=True)
    upstream, saved = (
        tuple(x if x is None else x.contiguous() for x in tensors)
        for tensors in ((grad_value, grad_value_linear, grad_f, grad_g), (f, g, w, z, n_iter))
    )
    differentiate = backend.load().backward
    with torch.autocast(problem.x.device.type, enabled=False):
        if backend.dense:
            gradients = PaddedProblem(problem).backward(
                differentiate, *upstream, *saved, need_x, need_y
            )
        else:
            gradients = differentiate(*upstream, problem, *saved, need_x, need_y)
    grad_x, grad_y, grad_log_a, grad_log_b = gradients
    if grad_x is None:
        grad_x = problem.x.new_zeros(0)
    if grad_y is None:
        grad_y = (problem.x if problem.y is None else problem.y).new_zeros(0)
    return tuple(x.contiguous() for x in (grad_x, grad_y, grad_log_a, grad_log_b))


def _apply_plan(*arguments: Any) -> Tensor:
    problem, (f, g, v, transpose) = _split(arguments)
    backend, problem = _choose(problem)
    if not backend.applies_plan:
        backend = registry.BACKENDS["reference"]
    f, g, v = f.contiguous(), g.contiguous(), v.contiguous()
    multiply = backend.load().apply_plan
    with torch.autocast(problem.x.device.type, enabled=False):
        if backend.dense:
            product = PaddedProblem(problem).apply_plan(multiply, f, g, v, transpose)
        else:
            product = multiply(problem, f, g, v, transpose)
    contiguous: Tensor = product.contiguous()
    return contiguous


# ----------------------------------------------------------------------------------------- shapes


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(Solution.allocate(Problem(*arguments)))


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (*_saved, need_x, need_y) = _split(arguments[_UPSTREAM_COUNT:])
    x, log_a, log_b = problem.x, problem.log_a, problem.log_b
    y = x if problem.y is None else problem.y
    grad_x = x.new_empty(x.shape if need_x else 0)
    grad_y = y.new_empty(y.shape if need_y else 0)
    return grad_x, grad_y, log_a.new_empty(log_a.shape), log_b.new_empty(log_b.shape)


def _apply_plan_fake(*arguments: Any) -> Tensor:
    problem, (_f, _g, v, transpose) = _split(arguments)
    log_mass = problem.log_b if transpose else problem.log_a
    product: Tensor = v.new_empty(*log_mass.shape, v.shape[-1])
    return product


# ------------------------------------------------------------------------------------- derivatives


def _save_problem(ctx: Any, fields: tuple[Any, ...], *tensors: Tensor) -> None:
    """Save the fields of a Problem, and tensors; autograd saves tensors apart from other values."""
    ctx.positions = [i for i, value in enumerate(fields) if isinstance(value, Tensor)]
    ctx.other_fields = [None if isinstance(value, Tensor) else value for value in fields]
    ctx.save_for_backward(*(fields[i] for i in ctx.positions), *tensors)


def _saved_problem(ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
    """Return the fields and tensors of ``_save_problem``."""
    fields, count = list(ctx.other_fields), len(ctx.positions)
    for position, tensor in zip(ctx.positions, ctx.saved_tensors[:count], strict=True):
        fields[position] = tensor
    return fields, ctx.saved_tensors[count:]


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    solution = Solution(*output)
    _save_problem(ctx, inputs, solution.f, solution.g, solution.w, solution.z, solution.n_iter)
    ctx.unrolled = Problem(*inputs).gradient == "unroll"
    differentiable = 4 if ctx.unrolled else 2  # value, value_linear, f and g
    ctx.mark_non_differentiable(*solution[differentiable:])


def _differentiate_forward(
    ctx: Any,
    grad_value: Tensor,
    grad_value_linear: Tensor,
    grad_f: Tensor,
    grad_g: Tensor,
    *_unused: Tensor | None,
) -> tuple[Tensor | None, ...]:
    fields, saved = _saved_problem(ctx)
    need_x, need_y = ctx.needs_input_grad[:2]
    potentials = (grad_f, grad_g) if ctx.unrolled else (None, None)
    grad_x, grad_y, grad_log_a, grad_log_b = torch.ops.optical.sinkhorn_backward.default(
        grad_value, grad_value_linear, *potentials, *fields, *saved, need_x, need_y
    )
    gradients: dict[str, Tensor | None] = {"log_a": grad_log_a, "log_b": grad_log_b}
    gradients["x"], gradients["y"] = grad_x if need_x else None, grad_y if need_y else None
    return tuple(gradients.get(name) for name in Problem._fields)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    return None


def _differentiate_backward(ctx: Any, *_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError(
        "optical.sinkhorn has no second derivative; differentiate "
        "optical.backends.reference.sinkhorn, which is plain PyTorch, with autograd instead"
    )


def _setup_apply_plan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    problem, (f, g, _v, ctx.transpose) = _split(inputs)
    _save_problem(ctx, problem, f, g)


def _differentiate_apply_plan(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    fields, (f, g) = _saved_problem(ctx)
    grad_v = apply_plan(Problem(*fields), f, g, grad, not ctx.transpose)
    return *[None] * (_PROBLEM_COUNT + 2), grad_v, None


# ---------------------------------------------------------------------------------------- batching


def _flatten_batch(size: int, values: tuple[Any, ...], dims: tuple[Any, ...]) -> list[Any]:
    """Merge the mapped dimension of every tensor with its first one, the problems."""
    flat = []
    for value, dim in zip(values, dims, strict=True):
        if isinstance(value, Tensor):
            value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
            value = value.flatten(0, 1)
        flat.append(value)
    return flat


def _vmap_rule(op: Any, before: int) -> Any:
    """Return the vmap rule of an op with ``before`` arguments before the fields of its Problem."""

    def rule(info: Any, in_dims: tuple[Any, ...], *values: Any) -> tuple[Any, Any]:
        problem, _ = _split(values[before:])
        if problem.packed:
            raise ValueError(
                "vmap over packed problems is not possible: give cu_seqlens of all of them instead"
            )
        size = info.batch_size
        results = op(*_flatten_batch(size, values, in_dims))
        single = isinstance(results, Tensor)
        # An output that was not requested has shape (0,) and no problems to separate.
        separate = [
            (x, None) if x.dim() == 1 and not len(x) else (x.unflatten(0, (size, -1)), 0)
            for x in ([results] if single else results)
        ]
        outputs, dims = zip(*separate, strict=True)
        return (outputs[0], dims[0]) if single else (outputs, dims)

    return rule


for _name, _implementation, _fake, _setup, _differentiate, _before in (
    ("sinkhorn", _forward, _forward_fake, _setup_forward, _differentiate_forward, 0),
    (
        *("sinkhorn_backward", _backward, _backward_fake, _setup_backward),
        *(_differentiate_backward, _UPSTREAM_COUNT),
    ),
    ("apply_plan", _apply_plan, _apply_plan_fake, _setup_apply_plan, _differentiate_apply_plan, 0),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"optical::{_name}", _fake, lib=_library)
    torch.library.register_autograd(
        f"optical::{_name}", _differentiate, setup_context=_setup, lib=_library
    )
    torch.library.register_vmap(
        f"optical::{_name}",
        _vmap_rule(getattr(torch.ops.optical, _name).default, _before),
        lib=_library,
    )
