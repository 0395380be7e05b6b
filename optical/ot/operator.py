"""The operator as PyTorch sees it: three schemas, their shapes, their derivatives, their batching.

This is the only file that talks to ``torch.library``. The backend's name is part of the schemas, so
a compiled graph keeps the choice, and every backend shares the same shape rules and derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optical.backends import registry
from optical.backends.dense import PaddedProblem
from optical.backends.problem import Problem, Solution

# The fields of Problem, in their order.
_ARGUMENTS = (
    "Tensor x, Tensor? y, str kind, Tensor? cu_a, Tensor? cu_b, Tensor log_a, Tensor log_b,"
    " Tensor epsilon, Tensor? f0, Tensor? g0, int max_iter, float tol, float rho_a, float rho_b,"
    " float omega, int anderson, float anneal_start, float anneal_ratio, str gradient,"
    " bool low_memory, str precision, str backend"
)
_COUNT = len(Problem._fields)
_library: Any = torch.library.Library("optical", "DEF")  # type: ignore[no-untyped-call]
for _schema in (
    f"sinkhorn({_ARGUMENTS}) -> (Tensor value, Tensor value_linear, Tensor f, Tensor g,"
    " Tensor marginal_error, Tensor n_iter, Tensor status, Tensor w, Tensor z, Tensor residual)",
    "sinkhorn_backward(Tensor grad_value, Tensor grad_value_linear, Tensor? grad_f, Tensor? grad_g,"
    f" {_ARGUMENTS}, Tensor f, Tensor g, Tensor w, Tensor z, Tensor n_iter, bool need_x,"
    " bool need_y) -> (Tensor grad_x, Tensor grad_y, Tensor grad_log_a, Tensor grad_log_b)",
    f"apply_plan({_ARGUMENTS}, Tensor f, Tensor g, Tensor v, bool transpose) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def sinkhorn(arguments: Problem) -> Solution:
    """Solve a batch of problems by the registered operator; differentiable as it asks."""
    return Solution(*torch.ops.optical.sinkhorn.default(*arguments))


def apply_plan(arguments: Problem, f: Tensor, g: Tensor, v: Tensor, transpose: bool) -> Tensor:
    """The plan times v by the registered operator; only v receives a gradient.

    v is (B, m, k) and the result (B, n, k), packed (M, k) and (N, k); with ``transpose`` the other
    way round. v has the computing dtype.
    """
    product: Tensor = torch.ops.optical.apply_plan.default(*arguments, f, g, v, transpose)
    return product


# ------------------------------------------------------------------------------- implementations


def _prepared(values: tuple[Any, ...], gradient: bool = False) -> tuple[registry.Backend, Problem]:
    arguments = Problem(*values)
    backend = registry.choose(arguments.backend, arguments, gradient)
    if not (arguments.x.numel() and arguments.log_a.numel() and arguments.log_b.numel()):
        # With no entry there is nothing to launch, and no kernel needs to think about it.
        backend = registry.BACKENDS["reference"]
    # Backends may rely on dense tensors; only a given cost keeps the strides of its caller.
    dense: list[Any] = [x.contiguous() if isinstance(x, Tensor) else x for x in arguments]
    if arguments.y is None:
        dense[0] = arguments.x
    return backend, Problem(*dense)


def _forward(*values: Any) -> tuple[Tensor, ...]:
    backend, arguments = _prepared(values)
    with torch.autocast(arguments.x.device.type, enabled=False):
        if backend.dense:
            outputs = PaddedProblem(arguments).forward(backend.forward)
        else:
            outputs = backend.forward(arguments)
    # The fake below promises dense outputs, whatever the strides of the inputs.
    return tuple(x.contiguous() for x in outputs)


def _backward(
    grad_value: Tensor,
    grad_value_linear: Tensor,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    *values: Any,
) -> tuple[Tensor, ...]:
    backend, arguments = _prepared(values[:_COUNT], gradient=True)
    f, g, w, z, n_iter, need_x, need_y = values[_COUNT:]
    upstream, saved = (
        tuple(x if x is None else x.contiguous() for x in tensors)
        for tensors in ((grad_value, grad_value_linear, grad_f, grad_g), (f, g, w, z, n_iter))
    )
    with torch.autocast(arguments.x.device.type, enabled=False):
        if backend.dense:
            gradients = PaddedProblem(arguments).backward(
                backend.backward, *upstream, *saved, need_x, need_y
            )
        else:
            gradients = backend.backward(*upstream, arguments, *saved, need_x, need_y)
    like = arguments.x, arguments.y if arguments.y is not None else arguments.x
    grads = [
        grad if grad is not None else source.new_zeros(0)
        for grad, source in zip(gradients[:2], like, strict=True)
    ]
    return tuple(x.contiguous() for x in (*grads, *gradients[2:]))


def _apply_plan(*values: Any) -> Tensor:
    backend, arguments = _prepared(values[:_COUNT])
    f, g, v, transpose = values[_COUNT:]
    f, g, v = f.contiguous(), g.contiguous(), v.contiguous()
    with torch.autocast(arguments.x.device.type, enabled=False):
        if backend.dense:
            product = PaddedProblem(arguments).apply_plan(backend.apply_plan, f, g, v, transpose)
        else:
            product = backend.apply_plan(arguments, f, g, v, transpose)
    return product.contiguous()


# ----------------------------------------------------------------------------------------- shapes


def _forward_fake(*values: Any) -> tuple[Tensor, ...]:
    p = Problem(*values)
    return tuple(Solution.empty(p.log_a, p.log_b, p.epsilon, p.gradient))


def _backward_fake(*values: Any) -> tuple[Tensor, ...]:
    p = Problem(*values[4 : 4 + _COUNT])
    need_x, need_y = values[-2:]
    y = p.x if p.y is None else p.y
    grad_x = p.x.new_empty(p.x.shape if need_x else 0)
    grad_y = y.new_empty(y.shape if need_y else 0)
    return grad_x, grad_y, p.log_a.new_empty(p.log_a.shape), p.log_b.new_empty(p.log_b.shape)


def _apply_plan_fake(*values: Any) -> Tensor:
    p, (_f, _g, v, transpose) = Problem(*values[:_COUNT]), values[_COUNT:]
    lines = p.log_b if transpose else p.log_a
    product: Tensor = v.new_empty(*lines.shape, v.shape[-1])
    return product


# ------------------------------------------------------------------------------------- derivatives


def _keep(ctx: Any, values: tuple[Any, ...], *outputs: Tensor) -> None:
    """Save the fields of Problem, of which only tensors may be saved as such, and outputs."""
    ctx.places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    ctx.others = [None if isinstance(value, Tensor) else value for value in values]
    ctx.save_for_backward(*(values[i] for i in ctx.places), *outputs)


def _kept(ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
    values, count = list(ctx.others), len(ctx.places)
    for place, tensor in zip(ctx.places, ctx.saved_tensors[:count], strict=True):
        values[place] = tensor
    return values, ctx.saved_tensors[count:]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    outputs = Solution(*output)
    _keep(ctx, inputs, outputs.f, outputs.g, outputs.w, outputs.z, outputs.n_iter)
    ctx.unrolled = Problem(*inputs).gradient == "unroll"
    ctx.mark_non_differentiable(*(outputs[4:] if ctx.unrolled else outputs[2:]))


def _derivative(
    ctx: Any,
    grad_value: Tensor,
    grad_value_linear: Tensor,
    grad_f: Tensor,
    grad_g: Tensor,
    *_unused: Tensor | None,
) -> tuple[Tensor | None, ...]:
    values, outputs = _kept(ctx)
    need_x, need_y = ctx.needs_input_grad[:2]
    potentials = (grad_f, grad_g) if ctx.unrolled else (None, None)
    grad_x, grad_y, grad_log_a, grad_log_b = torch.ops.optical.sinkhorn_backward.default(
        grad_value, grad_value_linear, *potentials, *values, *outputs, need_x, need_y
    )
    gradients: dict[str, Tensor | None] = {"log_a": grad_log_a, "log_b": grad_log_b}
    gradients["x"], gradients["y"] = grad_x if need_x else None, grad_y if need_y else None
    return tuple(gradients.get(name) for name in Problem._fields)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    return None


def _no_second_derivative(ctx: Any, *_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError(
        "optical.sinkhorn has no second derivative; differentiate optical.backends.reference.sinkhorn, "
        "which is plain PyTorch, with autograd instead"
    )


def _save_for_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    f, g, _v, ctx.transpose = inputs[_COUNT:]
    _keep(ctx, inputs[:_COUNT], f, g)


def _derivative_of_product(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, (f, g) = _kept(ctx)
    grad_v = apply_plan(Problem(*values), f, g, grad, not ctx.transpose)
    return *[None] * (_COUNT + 2), grad_v, None


# ----------------------------------------------------------------------------------------- batching


def _flattened(size: int, values: tuple[Any, ...], dims: tuple[Any, ...]) -> list[Any]:
    """Every tensor with the mapped dimension put into its first one, the problems."""
    flat = []
    for value, dim in zip(values, dims, strict=True):
        if isinstance(value, Tensor):
            value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
            value = value.flatten(0, 1)
        flat.append(value)
    return flat


def _batched(op: Any, first: int) -> Any:
    """The vmap rule of an operator whose Problem begin at position ``first``."""

    def rule(info: Any, in_dims: tuple[Any, ...], *values: Any) -> tuple[Any, Any]:
        if Problem(*values[first : first + _COUNT]).packed:
            raise ValueError(
                "vmap over packed problems is not possible: give cu_seqlens of all of them instead"
            )
        size = info.batch_size
        results = op(*_flattened(size, values, in_dims))
        single = isinstance(results, Tensor)
        # What was not asked for has shape (0,) and no problems to separate.
        separate = [
            (x, None) if x.dim() == 1 and not len(x) else (x.unflatten(0, (size, -1)), 0)
            for x in ([results] if single else results)
        ]
        outputs, dims = zip(*separate, strict=True)
        return (outputs[0], dims[0]) if single else (outputs, dims)

    return rule


_library.impl("sinkhorn", _forward, "CompositeExplicitAutograd")
_library.impl("sinkhorn_backward", _backward, "CompositeExplicitAutograd")
_library.impl("apply_plan", _apply_plan, "CompositeExplicitAutograd")
for _name, _fake, _setup, _formula, _first in (
    ("sinkhorn", _forward_fake, _save, _derivative, 0),
    ("sinkhorn_backward", _backward_fake, _save_nothing, _no_second_derivative, 4),
    ("apply_plan", _apply_plan_fake, _save_for_product, _derivative_of_product, 0),
):
    torch.library.register_fake(f"optical::{_name}", _fake, lib=_library)
    torch.library.register_autograd(
        f"optical::{_name}", _formula, setup_context=_setup, lib=_library
    )
    torch.library.register_vmap(
        f"optical::{_name}",
        _batched(getattr(torch.ops.optical, _name).default, _first),
        lib=_library,
    )
