"""Doubly stochastic matrices, matching with dustbins, and partial transport."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from optical.backends import library, registry, structs
from optical.backends.problem import BACKEND_NAMES, Status
from optical.ot.checks import CONCRETE, check_floating, check_shape, tracing, values_available
from optical.ot.functional import Gradient, sinkhorn
from optical.ot.masses import COST_COLUMNS, COST_ROWS, Masses
from optical.ot.options import MAX_ITERATIONS, check_options, check_pair
from optical.ot.validation import fold, unfold

NATIVE_SIZE = 64  # largest matrices of the native kernel, which keeps several of them in cache


def doubly_stochastic(
    logits: Tensor, *, iterations: int = 20, temperature: float = 1.0, backend: str = "auto"
) -> Tensor:
    """Scale ``exp(logits / temperature)`` until rows and columns sum to 1.

    One iteration divides by the row sums, then by the column sums: the columns of the result sum
    to 1, its rows up to convergence. The first half iteration is the softmax of the rows. This is
    the layer of Gumbel-Sinkhorn (add the noise to the logits), soft permutations and
    manifold-constrained hyper-connections (mHC; without the constant that some implementations add
    to denominators). Batches of matrices up to 64 x 64 on a CPU are scaled by a native kernel.

    Args:
        logits: (..., n, n), float64, float32, float16 or bfloat16; half precision is computed in
            float32. -inf forbids an entry; rows and columns without an allowed entry stay 0, so
            they serve as padding.
        iterations: number of iterations, at least 1.
        temperature: number > 0 that divides the logits. For a learnable one, divide them before.
        backend: "auto", "cuda", "triton", "cpu", or "reference" for a loop in plain PyTorch, which
            has second and forward-mode derivatives.

    Returns:
        (..., n, n) in the dtype of the logits, with the exact derivative of the iterations run.
        A matrix with NaN or +inf becomes NaN, as does its gradient; the others are unaffected.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value.
        BackendUnsupported: the backend requested by name cannot scale the matrices.
        RuntimeError: a second or a forward-mode derivative is requested.

    Source: Mena et al., "Learning Latent Permutations with Gumbel-Sinkhorn Networks" (arXiv
    1802.08665); Xie et al., "mHC: Manifold-Constrained Hyper-Connections" (arXiv 2512.24880).

    Examples:
        >>> import torch
        >>> from optical.ot.matching import doubly_stochastic
        >>> doubly_stochastic(torch.tensor([[2.0, 0.0], [0.0, 0.0]])).round(decimals=3)
        tensor([[0.7310, 0.2690],
                [0.2690, 0.7310]])
    """
    check_floating("logits", logits, "(..., n, n)", 2, least=True)
    if logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected (..., n, n)")
    _check_iterations(iterations)
    _check_positive("temperature", temperature)
    if backend not in BACKEND_NAMES:
        expected = ", ".join(repr(name) for name in BACKEND_NAMES)
        raise ValueError(f"backend is {backend!r}; expected one of {expected}")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    x = logits if logits.dtype == dtype else logits.to(dtype)
    name = registry.requested(backend)
    native = x.device.type == "cpu" and 0 < x.shape[-1] <= NATIVE_SIZE
    if native and name in ("auto", "cpu") and library.load_cpu().library is not None:
        result = _scale(x, int(iterations), float(temperature))
    elif name == "reference" or (name == "auto" and native) or not x.numel():
        result = _scaled_by_loop(x / temperature, iterations)
    else:
        masses = x.new_zeros(x.shape[:-1])
        result = sinkhorn(
            *(-x, masses, masses),
            epsilon=float(temperature),
            max_iter=iterations,
            gradient="unroll",
            backend=backend,
        ).plan()
    return result if result.dtype == logits.dtype else result.to(logits.dtype)


def _check_iterations(iterations: Any) -> None:
    if isinstance(iterations, bool) or not isinstance(iterations, (int, numbers.Integral)):
        raise TypeError(f"iterations is a {type(iterations).__name__}; expected an int >= 1")
    if not 1 <= iterations <= MAX_ITERATIONS:
        raise ValueError(f"iterations is {iterations}; expected an int >= 1 and < 2**31")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (float, numbers.Real)):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a float > 0")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; expected a finite number > 0")


def _logsumexp(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """``logsumexp`` that keeps the dimensions, and whose gradient is 0, not NaN, where it is -inf.

    The two terms of ``where`` are separate, since the gradient of a skipped one must be finite.
    """
    none = (x == -math.inf).all(dim, keepdim=True) if isinstance(dim, int) else x.amax(dim, True)
    none = none if none.dtype == torch.bool else none == -math.inf
    return torch.where(none, 0.0, x).logsumexp(dim, keepdim=True).masked_fill(none, -math.inf)


def _scaled_by_loop(x: Tensor, iterations: int) -> Tensor:
    """``doubly_stochastic`` in plain PyTorch, in the log domain."""
    with torch.autocast(x.device.type, enabled=False):
        for _ in range(iterations):
            for dim in (-1, -2):
                total = _logsumexp(x, dim)
                x = x - torch.where(total == -math.inf, 0.0, total)
        return x.exp()


# ---------------------------------------------------------------------------- the native kernel

_library: Any = torch.library.Library("optical", "FRAGMENT")  # type: ignore[no-untyped-call]
_OPTIONS = "int iterations, float temperature"
for _definition in (
    f"doubly_stochastic(Tensor logits, {_OPTIONS}) -> Tensor",
    f"doubly_stochastic_backward(Tensor logits, Tensor grad, {_OPTIONS}) -> Tensor",
):
    _library.define(_definition, tags=(torch.Tag.pt2_compliant_tag,))
_OPS: Any = torch.ops.optical


def _scale(x: Tensor, iterations: int, temperature: float) -> Tensor:
    """Scale matrices by the route that the situation needs; see ``optical.ot.autograd``."""
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
    functions = structs.with_argument_types(library.load_cpu().require())
    n = shape[-1]
    status = functions.optical_doubly_stochastic(
        *(logits.numel() // (n * n), n, structs.DTYPE_CODES[dtype], iterations, temperature),
        *(torch.get_num_threads(), logits.data_ptr(), structs.address(grad), out.data_ptr()),
    )
    if status:
        error = MemoryError if status == 2 else ValueError
        raise error(f"the CPU library refused matrices of shape {tuple(shape)} (status {status})")
    return out


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

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *ctx.options = inputs
        ctx.save_for_backward(x)

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

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        return None

    backward = jvp = staticmethod(_no_second_derivative)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.options = inputs
    ctx.save_for_backward(x)


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
    "doubly_stochastic_backward": (_call, lambda *_: None, _no_second_derivative),
}
for _name, (_implementation, _setup_context, _derivative) in _rules.items():
    _op = f"optical::{_name}"
    _library.impl(_name, _implementation, "CPU")
    torch.library.register_fake(_op, lambda x, *_: x.new_empty(x.shape), lib=_library)
    torch.library.register_autograd(_op, _derivative, setup_context=_setup_context, lib=_library)
    torch.library.register_vmap(_op, _vmap_rule(getattr(_OPS, _name).default), lib=_library)


# -------------------------------------------------------------------------------------- dustbins


def dustbin_matching(
    scores: Tensor,
    dustbin: float | Tensor | tuple[float | Tensor, float | Tensor],
    *,
    iterations: int = 100,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    gradient: Gradient = "unroll",
    backend: str = "auto",
) -> Tensor:
    """Match rows to columns, or to a dustbin on either side: the optimal matching of SuperGlue.

    The scores get one more row and column, filled with the score of the dustbin. A row or column
    has mass 1; each dustbin can take all of the other side. One iteration updates the rows, then
    the columns.

    Args:
        scores: (..., n, m), float64, float32, float16 or bfloat16 (half precision is computed in
            float32); higher is better. -inf forbids a pair.
        dustbin: score of leaving a row or a column unmatched: a number, or a tensor of shape () or
            (...), which may require a gradient. A pair has the score of unmatched rows (last
            column) and of unmatched columns (last row); their corner has the mean.
        iterations: number of iterations, at least 1.
        mask_a, mask_b: (..., n) and (..., m), bool or 0/1 numbers; 0 marks padding.
        gradient: "unroll" differentiates the iterations run; "implicit" the fixed point.
        backend: see ``optical.sinkhorn``.

    Returns:
        (..., n + 1, m + 1) logarithm of the plan, in float32 (float64 for float64 scores).
        Except for the dustbins, rows sum to 1 in the limit and columns exactly; padding is -inf.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value.
        BackendUnsupported: the backend requested by name cannot solve the problem.

    Source: Sarlin et al., "SuperGlue: Learning Feature Matching with Graph Neural Networks" (arXiv
    1911.11763), section 3.2; masks as in Qin et al., "Geometric Transformer for Fast and Robust
    Point Cloud Registration" (arXiv 2202.06688), whose padding has scores near -1e12.

    Examples:
        >>> import torch
        >>> from optical.ot.matching import dustbin_matching
        >>> scores = torch.tensor([[9.0, 0.0], [0.0, -9.0], [0.0, 0.0]])
        >>> dustbin_matching(scores, dustbin=3.0).exp().round(decimals=1)
        tensor([[1.0000, 0.0000, 0.0000],
                [0.0000, 0.0000, 1.0000],
                [0.0000, 0.0000, 0.9000],
                [0.0000, 0.9000, 1.1000]])
    """
    check_floating("scores", scores, "(..., n, m)", 2, least=True)
    _check_iterations(iterations)
    lead, (n, m) = tuple(scores.shape[:-2]), scores.shape[-2:]
    scores = fold(scores if scores.dtype == torch.float64 else scores.float(), lead)
    last_column, last_row = (
        _dustbin(score, scores, lead)
        for score in (dustbin if isinstance(dustbin, (tuple, list)) else (dustbin, dustbin))
    )
    batch, dtype = scores.shape[0], scores.dtype
    corner = (last_column + last_row) / 2
    above = torch.cat([scores, last_column.expand(batch, n, 1)], 2)
    couplings = torch.cat([above, torch.cat([last_row.expand(batch, 1, m), corner], 2)], 1)
    uniform_a, uniform_b = (
        Masses(names._replace(source="scores"), mask=mask)
        .fold(lead, lead, size)
        .log_masses(scores, (batch, size), dtype, True)
        for names, mask, size in ((COST_ROWS, mask_a, n), (COST_COLUMNS, mask_b, m))
    )
    count_a, count_b = ((x != -math.inf).sum(1, keepdim=True).to(dtype) for x in (uniform_a, uniform_b))
    norm = -(count_a + count_b).clamp(min=1).log()
    log_a, log_b = (
        # A uniform mass is NaN if the mask is neither 0 nor 1.
        torch.cat([torch.where(x == -math.inf, x, norm + x * 0), count.log() + norm], 1)
        for x, count in ((uniform_a, count_b), (uniform_b, count_a))
    )
    # SuperGlue starts from v = g + log b = 0.
    start = torch.where(log_b == -math.inf, 0.0, -log_b)
    result = sinkhorn(
        *(-couplings, log_a, log_b),
        epsilon=1.0,
        max_iter=iterations,
        init=(torch.zeros_like(log_a), start),
        gradient=gradient,
        backend=backend,
    )
    return unfold(result.log_plan() - norm[:, :, None], lead)


def _dustbin(score: Any, scores: Tensor, lead: tuple[int, ...]) -> Tensor:
    """Return the score of a dustbin as (batch, 1, 1)."""
    if not isinstance(score, Tensor):
        if isinstance(score, bool) or not isinstance(score, (float, numbers.Real)):
            expected = "a number, a tensor () or (...), or a pair of these"
            raise TypeError(f"dustbin holds a {type(score).__name__}; expected {expected}")
        return scores.new_full((scores.shape[0], 1, 1), float(score))
    if score.numel() != 1:
        check_shape("dustbin", score, lead, "the leading dimensions of scores, or ()")
    flat = score.to(scores).reshape(-1, 1, 1)
    return flat.expand(scores.shape[0], 1, 1)
