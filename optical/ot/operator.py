"""The operator without autograd, and its registration with PyTorch for compiled graphs.

The backend's name is an argument of the ops, so a compiled graph keeps the choice, and all backends
share the same shape rules and derivatives.
``optical.ot.autograd`` decides which calls go through the registered ops.
"""

from __future__ import annotations

import contextlib
from typing import Any, get_type_hints

import torch
from torch import Tensor

from optical.backends import reference, registry
from optical.backends.dense import PaddedProblem, cost_backward
from optical.backends.problem import FIRST_OPTION, Gradients, Problem, Solution

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
    f"plan({_PROBLEM}, Tensor f, Tensor g, bool log) -> Tensor",
    f"plan_backward(Tensor grad, {_PROBLEM}, Tensor f, Tensor g, bool log, bool need_x,"
    " bool need_y) -> (Tensor grad_x, Tensor grad_y, Tensor grad_log_a, Tensor grad_log_b,"
    " Tensor grad_f, Tensor grad_g)",
):
    _library.define(_definition, tags=(torch.Tag.pt2_compliant_tag,))


def _split(arguments: tuple[Any, ...]) -> tuple[Problem, tuple[Any, ...]]:
    """Split arguments that begin with the fields of a Problem from those that follow."""
    return Problem(*arguments[:_PROBLEM_COUNT]), arguments[_PROBLEM_COUNT:]


# -------------------------------------------------------------------------------- implementations


def _choose(problem: Problem, gradient: bool = False) -> tuple[registry.Backend, Problem]:
    """Choose a backend, and make the problem contiguous for one that needs it.

    The strides of a given cost are left to the backend: a cost that is shared by the batch is not
    copied.
    """
    backend = registry.choose(problem.backend, problem, gradient)
    if not (problem.x.numel() and problem.log_a.numel() and problem.log_b.numel()):
        # Kernels need not handle launches without entries.
        backend = registry.BACKENDS["reference"]
    return backend, problem if backend.native else _contiguous_fields(problem)


def _contiguous_fields(problem: Problem) -> Problem:
    """Return the problem with contiguous tensors, except for a given cost."""
    fields: tuple[Any, ...] = problem[:FIRST_OPTION]
    x, y, _, *others = fields
    for tensor in (None if y is None else x, y, *others):
        if tensor is not None and not tensor.is_contiguous():
            break
    else:
        return problem
    x = x if y is None else x.contiguous()
    y, *others = map(_contiguous, (y, *others))
    return Problem(x, y, problem.kind, *others, *problem[FIRST_OPTION:])


def _contiguous(value: Tensor | None) -> Any:
    return None if value is None else value.contiguous()


def _without_autocast(device: str) -> Any:
    """Disable autocast where it is enabled; entering a context costs as much as a small solve."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _UNCHANGED


_UNCHANGED = contextlib.nullcontext()


def forward(problem: Problem, values_only: bool = False, kept: list[Any] | None = None) -> Solution:
    """Solve a batch by the backend it asks for, outside of autograd.

    With ``values_only``, what only describes the run may be left out; see ``Solution.allocate``.
    ``kept`` receives what a backend would otherwise compute again in ``backward``.
    """
    backend, problem = _choose(problem)
    solve = backend.load().forward
    if backend.native:
        native: Solution = solve(problem, values_only)
        return native
    with _without_autocast(problem.x.device.type):
        if backend.dense:
            return PaddedProblem(problem).forward(solve)
        solution: Solution = solve(problem, *((values_only, kept) if backend.keeps else ()))
    return solution


def backward(
    grad_value: Tensor | None,
    grad_value_linear: Tensor | None,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    problem: Problem,
    f: Tensor,
    g: Tensor,
    w: Tensor,
    z: Tensor,
    n_iter: Tensor,
    need_x: bool,
    need_y: bool,
    need_masses: bool = True,
    kept: list[Any] | None = None,
) -> Gradients:
    """Compute the gradients that ``problem.gradient`` names, outside of autograd.

    An upstream gradient of None is 0. Without ``need_masses``, those of the log-masses may be None.
    ``kept`` is what ``forward`` kept, if it was asked to.
    """
    backend, problem = _choose(problem, gradient=True)
    differentiate = backend.load().backward
    upstream: tuple[Tensor | None, ...] = (grad_value, grad_value_linear, grad_f, grad_g)
    saved: tuple[Any, ...] = (f, g, w, z, n_iter)
    if backend.native:
        gradients: Gradients = differentiate(
            *upstream, problem, *saved, need_x, need_y, need_masses
        )
        return gradients
    if grad_value is None or grad_value_linear is None:
        zeros = torch.zeros_like(problem.epsilon)
        grad_value = zeros if grad_value is None else grad_value
        grad_value_linear = zeros if grad_value_linear is None else grad_value_linear
        upstream = (grad_value, grad_value_linear, grad_f, grad_g)
    upstream, saved = tuple(map(_contiguous, upstream)), tuple(map(_contiguous, saved))
    with _without_autocast(problem.x.device.type):
        if backend.dense:
            gradients = PaddedProblem(problem).backward(
                differentiate, *upstream, *saved, need_x, need_y
            )
        else:
            more = (kept,) if backend.keeps else ()
            gradients = differentiate(
                *upstream, problem, *saved, need_x, need_y, need_masses, *more
            )
    return gradients


def apply_plan(problem: Problem, f: Tensor, g: Tensor, v: Tensor, transpose: bool) -> Tensor:
    """Multiply the plan with v, outside of autograd.

    v is (B, m, k) and the result (B, n, k), or packed (M, k) and (N, k); with ``transpose``, v has
    rows and the result columns. v has the computing dtype.
    """
    backend, problem = _choose(problem)
    if not backend.applies_plan:
        backend = registry.BACKENDS["reference"]
    f, g, v = f.contiguous(), g.contiguous(), v.contiguous()
    multiply = backend.load().apply_plan
    with _without_autocast(problem.x.device.type):
        if backend.dense:
            product = PaddedProblem(problem).apply_plan(multiply, f, g, v, transpose)
        else:
            product = multiply(problem, f, g, v, transpose)
    return product


def plan(problem: Problem, f: Tensor, g: Tensor, log: bool) -> Tensor:
    """Compute the plan (B, n, m) of padded problems, or its logarithm, outside of autograd."""
    backend, problem = _choose(problem)
    with _without_autocast(problem.x.device.type):
        if not hasattr(backend.load(), "plan"):
            triton = registry.BACKENDS["triton"]
            backend = triton if triton.supports(problem) is None else registry.BACKENDS["reference"]
        if backend.dense:
            problem = PaddedProblem(problem).with_cost
        coupling: Tensor = backend.load().plan(problem, f.contiguous(), g.contiguous(), log)
    return coupling


def plan_backward(
    grad: Tensor, problem: Problem, f: Tensor, g: Tensor, log: bool, need_x: bool, need_y: bool
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of x, y, the log-masses, f and g from that of the plan (B, n, m).

    With ``gradient="implicit"`` the first four are total derivatives, and those of f and g are 0.
    """
    with _without_autocast(problem.x.device.type):
        if problem.gradient == "implicit":
            dense = PaddedProblem(problem).with_cost
            gradients = reference.implicit_plan_gradients(dense, f, g, grad, log)
        else:
            entries = plan(problem, f, g, log)
            gradients = reference.partial_plan_gradients(entries, problem.epsilon, grad, log)
        grad_cost, *others = gradients
        grad_x: Tensor | None = grad_cost if need_x else None
        grad_y: Tensor | None = None
        if problem.y is not None:
            masses = problem.log_a, problem.log_b
            grad_x, grad_y = cost_backward(
                grad_cost, problem.x, problem.y, *masses, problem.kind, need_x, need_y
            )
    grad_log_a, grad_log_b, grad_f, grad_g = others
    return grad_x, grad_y, grad_log_a, grad_log_b, grad_f, grad_g


def _forward_op(*arguments: Any) -> tuple[Tensor, ...]:
    solution = forward(Problem(*arguments))
    if Problem(*arguments).gradient != "implicit":
        # Outputs of an op share nothing, not even what is empty.
        solution = solution._replace(w=solution.f.new_empty(0), z=solution.g.new_empty(0))
    # The fake below promises contiguous outputs, whatever the strides of the inputs.
    return tuple(x.contiguous() for x in solution)


def _backward_op(*arguments: Any) -> tuple[Tensor, ...]:
    problem, rest = _split(arguments[_UPSTREAM_COUNT:])
    upstream: tuple[Any, ...] = arguments[:_UPSTREAM_COUNT]
    gradients = backward(*upstream, problem, *rest)  # type: ignore[call-arg]
    return _tensors(problem, gradients)


def _apply_plan_op(*arguments: Any) -> Tensor:
    problem, rest = _split(arguments)
    return apply_plan(problem, *rest).contiguous()


def _plan_op(*arguments: Any) -> Tensor:
    problem, rest = _split(arguments)
    return plan(problem, *rest).contiguous()


def _plan_backward_op(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    problem, rest = _split(arguments)
    return _tensors(problem, plan_backward(grad, problem, *rest))


def _tensors(problem: Problem, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """Replace gradients of x and y that were not requested by empty tensors."""
    grad_x, grad_y, *others = gradients
    if grad_x is None:
        grad_x = problem.x.new_zeros(0)
    if grad_y is None:
        grad_y = (problem.x if problem.y is None else problem.y).new_zeros(0)
    return tuple(x.contiguous() for x in (grad_x, grad_y, *others) if x is not None)


# ----------------------------------------------------------------------------------------- shapes


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem = Problem(*arguments)
    log_a, log_b, epsilon = problem.log_a, problem.log_b, problem.epsilon
    implicit = problem.gradient == "implicit"
    shapes = epsilon.shape, epsilon.shape, log_a.shape, log_b.shape, epsilon.shape
    more = (log_a.shape if implicit else 0, log_b.shape if implicit else 0, epsilon.shape)
    n_iter, status = (epsilon.new_empty(epsilon.shape, dtype=torch.int32) for _ in range(2))
    first, last = ([epsilon.new_empty(shape) for shape in group] for group in (shapes, more))
    return *first, n_iter, status, *last


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (*_saved, need_x, need_y) = _split(arguments[_UPSTREAM_COUNT:])
    x, log_a, log_b = problem.x, problem.log_a, problem.log_b
    y = x if problem.y is None else problem.y
    grad_x = x.new_empty(x.shape if need_x else 0)
    grad_y = y.new_empty(y.shape if need_y else 0)
    return grad_x, grad_y, log_a.new_empty(log_a.shape), log_b.new_empty(log_b.shape)


def _plan_fake(*arguments: Any) -> Tensor:
    _problem, (f, g, _log) = _split(arguments)
    coupling: Tensor = f.new_empty(*f.shape, g.shape[-1])
    return coupling


def _plan_backward_fake(_grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    problem, (f, g, _log, need_x, need_y) = _split(arguments)
    x, y = problem.x, problem.x if problem.y is None else problem.y
    grad_x = x.new_empty(x.shape if need_x else 0)
    grad_y = y.new_empty(y.shape if need_y else 0)
    return grad_x, grad_y, *(x.new_empty(x.shape) for x in (problem.log_a, problem.log_b, f, g))


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
    # Read once: checkpointing unpacks a saved tensor only once.
    saved, count = ctx.saved_tensors, len(ctx.positions)
    fields = list(ctx.other_fields)
    for position, tensor in zip(ctx.positions, saved[:count], strict=True):
        fields[position] = tensor
    return fields, saved[count:]


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


def _setup_apply_plan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    problem, (f, g, _v, ctx.transpose) = _split(inputs)
    _save_problem(ctx, problem, f, g)


def _differentiate_apply_plan(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    fields, (f, g) = _saved_problem(ctx)
    grad_v = torch.ops.optical.apply_plan.default(*fields, f, g, grad, not ctx.transpose)
    return *[None] * (_PROBLEM_COUNT + 2), grad_v, None


def _setup_plan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    problem, (f, g, ctx.log) = _split(inputs)
    _save_problem(ctx, problem, f, g)


def _differentiate_plan(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    fields, (f, g) = _saved_problem(ctx)
    needs = ctx.needs_input_grad[:2]
    grad_x, grad_y, grad_log_a, grad_log_b, *potentials = torch.ops.optical.plan_backward.default(
        grad, *fields, f, g, ctx.log, *needs
    )
    gradients: dict[str, Tensor | None] = {"log_a": grad_log_a, "log_b": grad_log_b}
    gradients["x"], gradients["y"] = grad_x if needs[0] else None, grad_y if needs[1] else None
    return *(gradients.get(name) for name in Problem._fields), *potentials, None


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


# Implementation, shapes, setup and derivative of each op, and its arguments before the problem.
_no_second = reference.no_second_derivative
_rules: dict[str, tuple[Any, ...]] = {}
_rules["sinkhorn"] = _forward_op, _forward_fake, _setup_forward, _differentiate_forward, 0
_backward_rules = _backward_op, _backward_fake, _setup_backward, _no_second
_rules["sinkhorn_backward"] = *_backward_rules, _UPSTREAM_COUNT
_apply_rules = _apply_plan_op, _apply_plan_fake, _setup_apply_plan, _differentiate_apply_plan
_rules["apply_plan"] = *_apply_rules, 0
_rules["plan"] = _plan_op, _plan_fake, _setup_plan, _differentiate_plan, 0
_rules["plan_backward"] = _plan_backward_op, _plan_backward_fake, _setup_backward, _no_second, 1
for _name, (_implementation, _fake, _setup, _differentiate, _before) in _rules.items():
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
