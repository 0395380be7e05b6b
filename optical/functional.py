"""The two functions of the package, ``sinkhorn`` and ``ot_alignment``: checks, shapes and masks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from optical import backends, ops, reference

Gradient = Literal["envelope", "unroll"]


@dataclass(frozen=True)
class SinkhornResult:
    """What ``sinkhorn`` returns, as tensors on the device of the cost.

    Attributes:
        value: (batch,) <plan, cost> + epsilon * KL(plan || a b), the regularised cost (POT: loss
            with the KL regulariser; OTT: primal_cost + epsilon * KL; GeomLoss: value).
        value_linear: (batch,) <plan, cost>, the transport part.
        f: (batch, n) potential of the rows, 0 where absent.
        g: (batch, m) potential of the columns, 0 where absent.
        marginal_error: (batch,) L1 distance of the plan's two marginals from a and b.
        n_iter: (batch,) int32, iterations each problem ran.

    ``value`` and ``value_linear`` are differentiable; the other fields are too only with
    ``gradient="unroll"``.
    """

    value: Tensor
    value_linear: Tensor
    f: Tensor
    g: Tensor
    marginal_error: Tensor
    n_iter: Tensor
    cost: Tensor = field(repr=False)
    log_a: Tensor = field(repr=False)
    log_b: Tensor = field(repr=False)
    epsilon: Tensor = field(repr=False)

    def plan(self) -> Tensor:
        """Compute the coupling (batch, n, m) from the potentials; it is stored nowhere.

        Rows sum to a and columns to b within ``marginal_error``; absent and forbidden pairs are
        exactly 0.

        Example:
            >>> import torch
            >>> from optical import sinkhorn
            >>> result = sinkhorn(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), epsilon=0.1)
            >>> result.plan().sum(dim=(1, 2)).round(decimals=3)
            tensor([1.])
        """
        return reference.plan(self.cost, self.log_a, self.log_b, self.epsilon, self.f, self.g)


def sinkhorn(
    cost: Tensor,
    log_a: Tensor | None = None,
    log_b: Tensor | None = None,
    *,
    epsilon: float | Tensor,
    max_iter: int = 100,
    tol: float = 0.0,
    gradient: Gradient = "envelope",
    backend: str = "auto",
) -> SinkhornResult:
    """Solve a batch of entropy-regularised optimal transport problems.

    plan = exp((f + g - cost) / epsilon + log a + log b), the entropy being KL(plan || a b). One
    iteration updates f, then g, starting from zero.

    Args:
        cost: (batch, n, m) float64/32/16 or bfloat16. Float16 and bfloat16 are computed in float32.
            +inf forbids a pair. Entries of absent rows and columns are never read as numbers.
        log_a: (batch, n) logarithm of the row masses; -inf means absent (padding). Uniform when
            None.
        log_b: (batch, m) the same for the columns.
        epsilon: temperature, > 0 (POT: reg; OTT: epsilon; GeomLoss: blur ** p). A float, or a
            tensor (batch,) whose values are trusted. It receives no gradient.
        max_iter: iterations to run (POT: numItermax; OTT: max_iterations).
        tol: a problem stops after the first iteration whose row sums are within tol of a in L1
            (POT: stopThr; OTT: threshold). 0 runs exactly max_iter iterations.
        gradient: how ``value`` and ``value_linear`` are differentiated. "envelope" holds the plan
            fixed: the gradient of both with respect to cost is the plan, and with respect to log_a
            it is a * f for ``value`` and zero for ``value_linear``. That is exact for ``value`` at
            convergence. For ``value_linear`` it is not the true gradient and can be most of the way
            off (docs/method.md measures 0 to 82 %); it is the choice of OPTICAL. "unroll"
            differentiates every iteration of the plain PyTorch reference, exactly and slowly.
        backend: "auto", "triton", "cpu" or "reference"; the environment variable OPTICAL_BACKEND
            replaces "auto". ``optical.backends.explain`` says which one serves a problem and why.

    Returns:
        SinkhornResult. A problem with one side entirely absent has value 0 and gradient 0.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
        BackendUnsupported: the backend asked for by name cannot serve the problem.

    Source: Cuturi, "Sinkhorn Distances" (NeurIPS 2013), algorithm 1; log domain and stabilisation:
    Schmitzer (arXiv 1610.06519, 2016).

    Example:
        >>> import torch
        >>> from optical import sinkhorn
        >>> cost = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        >>> result = sinkhorn(cost, epsilon=0.1)
        >>> result.plan().round(decimals=3)
        tensor([[[0.5000, 0.0000],
                 [0.0000, 0.5000]]])
    """
    check_options(epsilon, max_iter, tol, gradient, backend)
    _check_float("cost", cost, "(batch, n, m)", 3)
    cost = cost.to(_compute_dtype(cost.dtype))
    log_a = _log_marginal("log_a", log_a, cost, cost.shape[1])
    log_b = _log_marginal("log_b", log_b, cost, cost.shape[2])
    epsilon = _epsilon(epsilon, cost)
    if gradient == "unroll":
        if backend not in ("auto", "reference"):
            raise backends.BackendUnsupported(
                f"backend {backend!r} cannot serve gradient='unroll': "
                "it differentiates the iterations of the reference"
            )
        outputs = reference.sinkhorn(cost, log_a, log_b, epsilon, max_iter, tol)
        return SinkhornResult(*outputs, cost, log_a, log_b, epsilon)
    outputs = ops.sinkhorn(cost, log_a, log_b, epsilon, max_iter, float(tol), backend)
    return SinkhornResult(*outputs, cost.detach(), log_a.detach(), log_b.detach(), epsilon)


def ot_alignment(
    student: Tensor,
    teacher: Tensor,
    student_mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    *,
    epsilon: float | Tensor = 0.05,
    max_iter: int = 50,
    tol: float = 0.0,
    gradient: Gradient = "envelope",
    backend: str = "auto",
) -> Tensor:
    """Compute the transported cosine distance between each student text and its teacher text.

    <plan, 1 - cosine(student_i, teacher_j)>, where plan is the Sinkhorn coupling of the two clouds
    of tokens, every real token weighing the same. The clouds may differ in length and order.

    Args:
        student: (batch, n, dim) token vectors, float64/32/16 or bfloat16, of any norm. Dot products
            and norms are accumulated in float32 (float64 for float64). A zero vector is at
            distance 1 from everything.
        teacher: (batch, m, dim) token vectors; compute them under ``torch.no_grad`` and no gradient
            reaches the teacher.
        student_mask: (batch, n) bool, True = real token, or a 0/1 attention mask of integers or
            floats. All real when None. Padding may hold anything, NaN included: it changes nothing
            and its gradient is exactly zero.
        teacher_mask: (batch, m) the same for the teacher.
        epsilon, max_iter, tol, gradient, backend: see ``optical.sinkhorn``. With the default
            "envelope" the plan is a fixed target, as in OPTICAL, and the gradient is that of the
            cost alone, which is not the total derivative (see ``optical.sinkhorn``).

    Returns:
        (batch,) float32 (float64 for float64 vectors), 0 where either text has no real token.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
        BackendUnsupported: the backend asked for by name cannot serve the problem.

    Source: Huang, Yu, Allan, "Improving Cross-lingual Information Retrieval on Low-Resource
    Languages via Optimal Transport Distillation" (OPTICAL, WSDM 2023, arXiv 2301.12566).

    Example:
        >>> import torch
        >>> from optical import ot_alignment
        >>> teacher = torch.eye(3)[None]
        >>> ot_alignment(teacher.flip(1), teacher).round(decimals=3)   # word order costs nothing
        tensor([0.])
    """
    check_options(epsilon, max_iter, tol, gradient, backend)
    _check_float("student", student, "(batch, n, dim)", 3)
    _check_float("teacher", teacher, "(batch, m, dim)", 3)
    _check_device("teacher", teacher, "student", student)
    batch, dim = student.shape[0], student.shape[2]
    if teacher.shape[0] != batch or teacher.shape[2] != dim:
        wanted = f"(batch={batch}, m, dim={dim}) as in student"
        raise ValueError(f"teacher has shape {tuple(teacher.shape)}; expected {wanted}")
    student_mask = _mask("student_mask", student_mask, student)
    teacher_mask = _mask("teacher_mask", teacher_mask, teacher)
    dtype = _compute_dtype(torch.promote_types(student.dtype, teacher.dtype))
    # Autocast would round the vectors before the product, which costs far more than it saves.
    with torch.autocast(student.device.type, enabled=False):
        result = sinkhorn(
            _cosine_distance(student, teacher, student_mask, teacher_mask, dtype),
            _uniform(student_mask, dtype),
            _uniform(teacher_mask, dtype),
            epsilon=epsilon,
            max_iter=max_iter,
            tol=tol,
            gradient=gradient,
            backend=backend,
        )
    return result.value_linear


def _cosine_distance(
    student: Tensor, teacher: Tensor, student_mask: Tensor, teacher_mask: Tensor, dtype: torch.dtype
) -> Tensor:
    """1 - cosine, from raw dot products and inverse norms: rounding normalised vectors to half
    precision would cost three decimal digits, and norms applied afterwards cost none."""
    x = torch.where(student_mask[:, :, None], student, 0.0).to(dtype)
    y = torch.where(teacher_mask[:, :, None], teacher, 0.0).to(dtype)
    dots = x @ y.transpose(1, 2)
    return 1 - dots * _inverse_norm(x)[:, :, None] * _inverse_norm(y)[:, None, :]


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / |x|, and 0 for the zero vector, with a gradient of 0 there."""
    square = (x * x).sum(-1)
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).rsqrt(), 0.0)


def _uniform(mask: Tensor, dtype: torch.dtype) -> Tensor:
    count = mask.sum(1, keepdim=True).clamp(min=1).to(dtype)
    return torch.where(mask, -count.log(), -math.inf)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_options(
    epsilon: float | Tensor, max_iter: int, tol: float, gradient: str, backend: str
) -> None:
    """Raise TypeError or ValueError for an option that no tensor is needed to judge."""
    if not isinstance(epsilon, Tensor):
        if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)):
            found = type(epsilon).__name__
            raise TypeError(f"epsilon is a {found}; expected a float or a tensor (batch,)")
        if not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon is {epsilon}; expected a finite number > 0")
    if isinstance(max_iter, bool) or not isinstance(max_iter, int):
        raise TypeError(f"max_iter is a {type(max_iter).__name__}; expected an int >= 0")
    if max_iter < 0:
        raise ValueError(f"max_iter is {max_iter}; expected an int >= 0")
    if isinstance(tol, bool) or not isinstance(tol, (int, float)):
        raise TypeError(f"tol is a {type(tol).__name__}; expected a float >= 0")
    if not 0 <= tol < math.inf:
        raise ValueError(f"tol is {tol}; expected a finite number >= 0")
    if gradient not in get_args(Gradient):
        wanted = " or ".join(repr(name) for name in get_args(Gradient))
        raise ValueError(f"gradient is {gradient!r}; expected {wanted}")
    backends.check_name(backend)


def _check_float(name: str, value: Tensor, layout: str, dim: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor {layout}")
    if value.dim() != dim:
        hint = "; add the batch dimension with unsqueeze(0)" if value.dim() == dim - 1 else ""
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {layout}{hint}")
    _check_dtype(name, value)


def _check_dtype(name: str, value: Tensor) -> None:
    if value.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"{name} has dtype {value.dtype}; expected float64, float32, float16 or bfloat16"
        )


def _check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name} is on {value.device}; expected {other.device}, where {other_name} is"
        )


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...], layout: str) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {shape}, {layout}")


def _log_marginal(name: str, value: Tensor | None, cost: Tensor, size: int) -> Tensor:
    batch = cost.shape[0]
    if value is None:
        return cost.new_full((batch, size), -math.log(max(size, 1)))
    layout = "(batch, n)" if name == "log_a" else "(batch, m)"
    _check_float(name, value, layout, 2)
    _check_shape(name, value, (batch, size), f"{layout} of cost")
    _check_device(name, value, "cost", cost)
    return value.to(cost.dtype)


def _epsilon(value: float | Tensor, cost: Tensor) -> Tensor:
    batch = cost.shape[0]
    if not isinstance(value, Tensor):
        return cost.new_full((batch,), float(value))
    _check_dtype("epsilon", value)
    if tuple(value.shape) != (batch,):
        found = tuple(value.shape)
        raise ValueError(f"epsilon has shape {found}; expected a float or shape ({batch},)")
    _check_device("epsilon", value, "cost", cost)
    if value.requires_grad:
        raise ValueError("epsilon requires grad; it receives none, so pass epsilon.detach()")
    return value.to(cost.dtype)


def _mask(name: str, value: Tensor | None, tokens: Tensor) -> Tensor:
    shape = tuple(tokens.shape[:2])
    if value is None:
        return torch.ones(shape, dtype=torch.bool, device=tokens.device)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a bool tensor {shape}")
    side = name.removesuffix("_mask")
    _check_shape(name, value, shape, f"the first two dimensions of {side}")
    _check_device(name, value, side, tokens)
    if value.is_complex():
        raise TypeError(f"{name} has dtype {value.dtype}; expected bool, or 0/1 integers or floats")
    return value if value.dtype == torch.bool else value != 0
