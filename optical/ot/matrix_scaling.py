"""Scaling of small matrices to doubly stochastic ones: the native kernel, and plain PyTorch.

The routes to the kernel are those of ``optical.ot.autograd``. ``optical.ot.matching`` has the
public function.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from optical.backends import library, structs
from optical.ot.checks import CONCRETE, tracing

LARGEST = 64  # rows of the matrices for which the kernel is meant: several of them stay in cache
# Entries times iterations of one call of the library, a fraction of a second: Ctrl-C takes effect
# between two calls.
WORK_PER_CALL = 2**27


def supports(x: Tensor) -> bool:
    """Whether the native kernel scales matrices of this shape on this device."""
    # A traced call may find the library missing when it runs; loading it cannot be traced.
    return (
        x.is_cpu
        and 0 < x.shape[-1] <= LARGEST
        and (tracing() or library.load_cpu().library is not None)
    )


_library: Any = torch.library.Library("optical", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPTIONS = "int iterations, float temperature"
for _definition in (
    f"doubly_stochastic(Tensor logits, {_OPTIONS}) -> Tensor",
    f"doubly_stochastic_backward(Tensor logits, Tensor grad, {_OPTIONS}) -> Tensor",
):
    _library.define(_definition, tags=(torch.Tag.pt2_compliant_tag,))
_OPS: Any = torch.ops.optical


def scale(x: Tensor, iterations: int, temperature: float) -> Tensor:
    """Scale float32 or float64 matrices (..., n, n) by the native kernel."""
    options = iterations, temperature
    if not tracing():
        transformed = torch._C._are_functorch_transforms_active()
        if transformed or forward_ad._current_level >= 0:
            return _apply(_TransformedScale, x, *options)
        if type(x) in CONCRETE and not torch._C._len_torch_dispatch_stack():
            if x.requires_grad and torch.is_grad_enabled():
                return _apply(_Scale, x, *options)
            return _call(x, None, *options)
    result: Tensor = _OPS.doubly_stochastic.default(x, *options)
    return result


def _apply(function: Any, *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)
    return result


def _call(logits: Tensor, grad: Tensor | None, iterations: int, temperature: float) -> Tensor:
    """Call the library: the matrices, or the gradient of their logits given that of the matrices.

    Raises:
        TypeError, ValueError, MemoryError: the library cannot read the arguments, or refuses them.
    """
    dtype, shape = logits.dtype, logits.shape
    for x in (logits, logits if grad is None else grad):
        if x.dtype not in (torch.float32, torch.float64) or x.dtype != dtype or not x.is_cpu:
            raise TypeError(f"a tensor is {x.dtype} on {x.device}; expected float32 or float64")
        if x.dim() < 2 or x.shape != shape or shape[-1] != shape[-2] or not 0 < shape[-1] <= 1024:
            raise ValueError(f"a tensor has shape {tuple(x.shape)}; expected (..., n, n)")
    logits = logits.contiguous()
    grad = None if grad is None else grad.contiguous()
    out = torch.empty(shape, dtype=dtype)
    scale_matrices = structs.with_argument_types(
        library.load_cpu().require()
    ).optical_doubly_stochastic
    n = shape[-1]
    batch, bytes_each = logits.numel() // (n * n), n * n * logits.element_size()
    pointers = logits.data_ptr(), structs.address(grad), out.data_ptr()
    count = max(1, WORK_PER_CALL // (n * n * max(iterations, 1)))
    for start in range(0, batch, count):
        status = scale_matrices(
            *(min(count, batch - start), n, structs.DTYPE_CODES[dtype], iterations, temperature),
            torch.get_num_threads(),
            *(pointer and pointer + start * bytes_each for pointer in pointers),
        )
        if status:
            error = MemoryError if status == 2 else ValueError
            raise error(f"the CPU library refused matrices of shape {tuple(shape)}")
    return out


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.options = inputs
    ctx.save_for_backward(x)


def _setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    return None


def _no_second_derivative(ctx: Any, *_grads: Any) -> Any:
    raise RuntimeError(
        "optical.ot.matching.doubly_stochastic has no second and no forward-mode derivative; "
        "with backend='reference' it is plain PyTorch, which has both"
    )


class _Scale(torch.autograd.Function):
    """The plain route."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *options: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.save_for_backward(x)
        return _call(x, None, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _apply(_ScaleGradient, x, grad, *ctx.options), None, None
        return _call(x, grad, *ctx.options), None, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor, *options: Any) -> Tensor:
        return _call(x, grad, *options)

    backward = staticmethod(_no_second_derivative)


class _TransformedScale(torch.autograd.Function):
    """The route of ``torch.func`` and forward-mode derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, iterations: int, temperature: float) -> Tensor:
        result: Tensor = _OPS.doubly_stochastic.default(x, iterations, temperature)
        return result

    setup_context = staticmethod(_setup)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return _apply(_TransformedScaleGradient, x, grad, *ctx.options), None, None

    jvp = staticmethod(_no_second_derivative)


class _TransformedScaleGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, grad: Tensor, iterations: int, temperature: float) -> Tensor:
        result: Tensor = _OPS.doubly_stochastic_backward.default(x, grad, iterations, temperature)
        return result

    setup_context = staticmethod(_setup_nothing)

    backward = jvp = staticmethod(_no_second_derivative)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return _OPS.doubly_stochastic_backward.default(x, grad, *ctx.options), None, None


def _vmap_rule(op: Any) -> Any:
    """The ops accept any leading dimensions, so a mapped one becomes the first."""

    def rule(info: Any, in_dims: tuple[Any, ...], *values: Any) -> tuple[Tensor, int]:
        *tensors, iterations, temperature = values
        moved = [
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(tensors, in_dims, strict=False)
        ]
        return op(*moved, iterations, temperature), 0

    return rule


_rules: dict[str, tuple[Any, ...]] = {
    "doubly_stochastic": (lambda x, *options: _call(x, None, *options), _setup, _differentiate),
    "doubly_stochastic_backward": (_call, _setup_nothing, _no_second_derivative),
}
for _name, (_implementation, _setup_context, _derivative) in _rules.items():
    _op = f"optical::{_name}"
    _library.impl(_name, _implementation, "CPU")
    torch.library.register_fake(_op, lambda x, *_: x.new_empty(x.shape), lib=_library)
    torch.library.register_autograd(_op, _derivative, setup_context=_setup_context, lib=_library)
    torch.library.register_vmap(_op, _vmap_rule(getattr(_OPS, _name).default), lib=_library)


# ------------------------------------------------------------------------------- plain PyTorch


def logsumexp(x: Tensor, dim: int) -> Tensor:
    """Compute ``logsumexp`` with its dimension kept, and gradient 0, not NaN, where it is -inf."""
    none = (x == -math.inf).all(dim, keepdim=True)
    # The gradient of the branch that a select discards must be finite.
    return torch.where(none, 0.0, x).logsumexp(dim, keepdim=True).masked_fill(none, -math.inf)


def scale_by_loop(x: Tensor, iterations: int) -> Tensor:
    """Scale matrices in the log domain: the specification of the kernel."""
    with torch.autocast(x.device.type, enabled=False):
        for _ in range(iterations):
            for dim in (-1, -2):
                total = logsumexp(x, dim)
                x = x - torch.where(total == -math.inf, 0.0, total)
        return x.exp()
