"""The operator as PyTorch sees it: two schemas, their shapes, and one derivative formula.

This is the only file that talks to ``torch.library``. The backend's name is part of the schema, so
a compiled graph keeps the choice, and every backend shares the same shape rule and derivative.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from optical import backends
from optical.reference import Outputs

_library: Any = torch.library.Library("optical", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "sinkhorn(Tensor cost, Tensor log_a, Tensor log_b, Tensor epsilon, int max_iter, float tol,"
    " str backend) -> (Tensor value, Tensor value_linear, Tensor f, Tensor g,"
    " Tensor marginal_error, Tensor n_iter)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "sinkhorn_backward(Tensor grad_value, Tensor grad_value_linear, Tensor cost, Tensor log_a,"
    " Tensor log_b, Tensor epsilon, Tensor f, Tensor g, str backend)"
    " -> (Tensor grad_cost, Tensor grad_log_a, Tensor grad_log_b)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def sinkhorn(
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    epsilon: Tensor,
    max_iter: int,
    tol: float,
    backend: str,
) -> Outputs:
    """Call the registered operator; the arguments are those of ``optical.reference.sinkhorn``."""
    outputs: Outputs = torch.ops.optical.sinkhorn.default(
        cost, log_a, log_b, epsilon, max_iter, tol, backend
    )
    return outputs


def _implementation(name: str, cost: Tensor) -> backends.Backend:
    chosen = backends.choose(name, cost)
    # With no entry there is nothing to launch, and no kernel needs to think about it.
    return chosen if cost.numel() else backends.BACKENDS["reference"]


def _forward(
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    epsilon: Tensor,
    max_iter: int,
    tol: float,
    backend: str,
) -> Outputs:
    run = _implementation(backend, cost).forward
    # Backends may rely on dense vectors; only the cost keeps the strides of its caller.
    value, value_linear, f, g, marginal_error, n_iter = run(
        cost, log_a.contiguous(), log_b.contiguous(), epsilon.contiguous(), max_iter, tol
    )
    # The fake below promises dense outputs, whatever the strides of the inputs.
    return (
        value.contiguous(),
        value_linear.contiguous(),
        f.contiguous(),
        g.contiguous(),
        marginal_error.contiguous(),
        n_iter.contiguous(),
    )


def _forward_fake(
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    epsilon: Tensor,
    max_iter: int,
    tol: float,
    backend: str,
) -> Outputs:
    batch, n, m = cost.shape
    return (
        cost.new_empty(batch),
        cost.new_empty(batch),
        cost.new_empty(batch, n),
        cost.new_empty(batch, m),
        cost.new_empty(batch),
        cost.new_empty(batch, dtype=torch.int32),
    )


def _backward(
    grad_value: Tensor,
    grad_value_linear: Tensor,
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    epsilon: Tensor,
    f: Tensor,
    g: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = _implementation(backend, cost).backward
    grad_cost = run(
        cost,
        log_a.contiguous(),
        log_b.contiguous(),
        epsilon.contiguous(),
        f.contiguous(),
        g.contiguous(),
        grad_value.contiguous(),
        grad_value_linear.contiguous(),
    )
    return (
        grad_cost.contiguous(),
        _marginal_gradient(grad_value, log_a, f),
        _marginal_gradient(grad_value, log_b, g),
    )


def _marginal_gradient(grad_value: Tensor, log_mass: Tensor, potential: Tensor) -> Tensor:
    """The potential is the derivative of the value with respect to the mass, so mass * potential
    is the one with respect to its logarithm; nothing flows to an absent entry."""
    gradient = grad_value[:, None] * log_mass.exp() * potential
    return torch.where(log_mass > -math.inf, gradient, 0.0).contiguous()


def _backward_fake(
    grad_value: Tensor,
    grad_value_linear: Tensor,
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    epsilon: Tensor,
    f: Tensor,
    g: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return cost.new_empty(cost.shape), f.new_empty(f.shape), g.new_empty(g.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    cost, log_a, log_b, epsilon, _max_iter, _tol, backend = inputs
    _value, _value_linear, f, g, marginal_error, n_iter = output
    ctx.save_for_backward(cost, log_a, log_b, epsilon, f, g)
    ctx.mark_non_differentiable(f, g, marginal_error, n_iter)
    ctx.backend = backend


def _derivative(
    ctx: Any, grad_value: Tensor, grad_value_linear: Tensor, *_unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    grad_cost, grad_log_a, grad_log_b = torch.ops.optical.sinkhorn_backward.default(
        grad_value, grad_value_linear, *ctx.saved_tensors, ctx.backend
    )
    return grad_cost, grad_log_a, grad_log_b, None, None, None, None


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    return None


def _no_second_derivative(ctx: Any, *_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError(
        "optical.sinkhorn has no second derivative with gradient='envelope'; "
        "use gradient='unroll', which differentiates the plain PyTorch iterations"
    )


_library.impl("sinkhorn", _forward, "CompositeExplicitAutograd")
_library.impl("sinkhorn_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("optical::sinkhorn", _forward_fake, lib=_library)
torch.library.register_fake("optical::sinkhorn_backward", _backward_fake, lib=_library)
torch.library.register_autograd("optical::sinkhorn", _derivative, setup_context=_save, lib=_library)
torch.library.register_autograd(
    "optical::sinkhorn_backward", _no_second_derivative, setup_context=_save_nothing, lib=_library
)
