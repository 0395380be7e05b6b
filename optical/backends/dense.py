"""Conversion of any problem to padded problems of a given cost, and of their results back.

For backends that support only those. Also defines the costs of vectors x and y:

    cosine         1 - x.y / (|x| |y|), and 1 if a vector is zero
    sqeuclidean    |x - y| ** 2
    dot            -x.y
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optical.backends import reference
from optical.backends.problem import Gradients, Problem, Solution


class PaddedProblem:
    """The padded form of a problem.

    For packed problems, the constructor synchronises with the device to read the longest lengths.

    Attributes:
        original: the problem as given.
        padded: the same, padded to (B, n, ...) and (B, m, ...) if it was packed.
        a, b: conversions between the packed and padded form of rows and columns.
    """

    def __init__(self, problem: Problem) -> None:
        self.original = problem
        self.a = Packing(problem.cu_a)
        self.b = Packing(problem.cu_b)
        self.padded = problem._replace(
            x=self.a.pad(problem.x) if problem.y is not None else problem.x,
            y=None if problem.y is None else self.b.pad(problem.y),
            cu_a=None,
            cu_b=None,
            log_a=self.a.pad(problem.log_a, -math.inf),
            log_b=self.b.pad(problem.log_b, -math.inf),
            f0=None if problem.f0 is None else self.a.pad(problem.f0),
            g0=None if problem.g0 is None else self.b.pad(problem.g0),
        )

    @property
    def with_cost(self) -> Problem:
        """The padded problem of a given cost; that of vectors is computed at each access."""
        padded = self.padded
        if padded.y is None:
            return padded
        cost = cost_matrix(padded.x, padded.y, padded.log_a, padded.log_b, padded.kind)
        return padded._replace(x=cost, y=None, kind="given")

    def forward(self, solve: Callable[[Problem], Solution]) -> Solution:
        """Solve by ``solve``, a function of padded problems of a given cost."""
        solution = solve(self.with_cost)
        solution = solution._replace(f=self.a.pack(solution.f), g=self.b.pack(solution.g))
        if self.original.gradient != "implicit":
            return solution
        return solution._replace(w=self.a.pack(solution.w), z=self.b.pack(solution.z))

    def backward(self, differentiate: Callable[..., Gradients], *arguments: Any) -> Gradients:
        """Compute gradients by ``differentiate``, which is like ``reference.backward``.

        ``arguments`` are those of ``reference.backward`` without the problem.
        """
        grad_value, grad_value_linear, grad_f, grad_g, *rest = arguments
        f, g, w, z, n_iter, need_x, need_y = rest
        padded = self.padded
        implicit = padded.gradient == "implicit"
        grad_cost, _, grad_log_a, grad_log_b = differentiate(
            grad_value,
            grad_value_linear,
            None if grad_f is None else self.a.pad(grad_f),
            None if grad_g is None else self.b.pad(grad_g),
            self.with_cost,
            self.a.pad(f),
            self.b.pad(g),
            self.a.pad(w) if implicit else w,
            self.b.pad(z) if implicit else z,
            n_iter,
            need_x or need_y,
            False,
        )
        grad_x, grad_y = grad_cost, None
        if padded.y is not None and grad_cost is not None:
            masses = padded.log_a, padded.log_b
            grad_x, grad_y = cost_backward(
                grad_cost, padded.x, padded.y, *masses, padded.kind, need_x, need_y
            )
        grad_x = None if grad_x is None else self.a.pack(grad_x)
        grad_y = None if grad_y is None else self.b.pack(grad_y)
        grad_log_a = None if grad_log_a is None else self.a.pack(grad_log_a)
        grad_log_b = None if grad_log_b is None else self.b.pack(grad_log_b)
        return grad_x, grad_y, grad_log_a, grad_log_b

    def apply_plan(
        self, apply: Callable[..., Tensor], f: Tensor, g: Tensor, v: Tensor, transpose: bool
    ) -> Tensor:
        """Multiply the plan with v by ``apply``, which is like ``reference.apply_plan``."""
        source, target = (self.a, self.b) if transpose else (self.b, self.a)
        product = apply(self.with_cost, self.a.pad(f), self.b.pad(g), source.pad(v), transpose)
        return target.pack(product)

    def plan(self, f: Tensor, g: Tensor, log: bool = False) -> Tensor:
        """Compute the plan (B, n, m) by the reference; differentiable by autograd.

        It is 0 for padding; with ``log``, its exponent, -inf for padding. f and g are shaped like
        the log-masses of the original problem.
        """
        return reference.plan(self.with_cost, self.a.pad(f), self.b.pad(g), log)


class Packing:
    """Conversion of one side of a batch between its packed and padded form.

    Without offsets the side is padded already and both conversions return their argument.

    Args:
        offsets: (B + 1,) int64, the first row (or column) of each problem, and their number.
    """

    def __init__(self, offsets: Tensor | None) -> None:
        self.inside = self.index = None
        if offsets is not None:
            lengths = offsets.diff()
            size = int(lengths.max()) if len(lengths) else 0
            position = torch.arange(size, device=offsets.device)
            self.inside = position < lengths[:, None]
            self.index = (offsets[:-1, None] + position) * self.inside

    def pad(self, packed: Tensor, fill: float = 0.0) -> Tensor:
        """Convert (N, ...) to (B, longest, ...), with ``fill`` behind the end of each problem."""
        if self.index is None or self.inside is None:
            return packed
        inside = self.inside.view(*self.inside.shape, *[1] * (packed.dim() - 1))
        return torch.where(inside, packed[self.index], fill)

    def pack(self, padded: Tensor) -> Tensor:
        """Convert (B, longest, ...) to (N, ...)."""
        return padded if self.inside is None else padded[self.inside]


def cost_matrix(x: Tensor, y: Tensor, log_a: Tensor, log_b: Tensor, kind: str) -> Tensor:
    """Compute the costs (B, n, m) of x (B, n, d) and y (B, m, d), in the dtype of the log-masses.

    Costs that are not finite are NaN. Padding is replaced by zero vectors.
    """
    x, y = _without_padding(x, log_a), _without_padding(y, log_b)
    if kind == "cosine":
        cost = 1 - _normalise(x)[0] @ _normalise(y)[0].mT
    elif kind == "sqeuclidean":
        x, y = _centred(x, y, log_a, log_b)
        cost = (x * x).sum(2)[:, :, None] + (y * y).sum(2)[:, None, :] - 2 * (x @ y.mT)
        cost = cost.clamp(min=0)
    else:
        cost = -(x @ y.mT)
    return torch.where(cost.isfinite(), cost, math.nan)


def cost_backward(
    grad_cost: Tensor,
    x: Tensor,
    y: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    kind: str,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of x and y, each in its own dtype; None if it is not needed.

    ``grad_cost`` (B, n, m) is exactly 0 for padding, and so are the gradients; those of a problem
    whose ``grad_cost`` is 0 are 0, whatever its vectors.
    """
    rows, columns = _without_padding(x, log_a), _without_padding(y, log_b)
    if kind == "sqeuclidean":
        rows, columns = _centred(rows, columns, log_a, log_b)
    grad_x = grad_y = None
    # A product of 0 and a vector that is not finite is NaN, also where the problem is not used.
    used = (grad_cost != 0).flatten(1).any(1)[:, None, None]
    if need_x:
        grad_x = _cost_gradient(grad_cost, rows, columns, kind)
        grad_x = torch.where(_valid(log_a) & used, grad_x, 0.0).to(x.dtype)
    if need_y:
        grad_y = _cost_gradient(grad_cost.mT, columns, rows, kind)
        grad_y = torch.where(_valid(log_b) & used, grad_y, 0.0).to(y.dtype)
    return grad_x, grad_y


def _cost_gradient(grad_cost: Tensor, x: Tensor, y: Tensor, kind: str) -> Tensor:
    if kind == "dot":
        return -(grad_cost @ y)
    if kind == "sqeuclidean":
        return 2 * (x * grad_cost.sum(2, keepdim=True) - grad_cost @ y)
    (x, length, peak), y = _normalise(x), _normalise(y)[0]
    weighted = grad_cost @ y
    # The component along x does not change the cosine. |x| is length * peak, which may underflow.
    return ((weighted * x).sum(2, keepdim=True) * x - weighted) / length / peak


def _valid(log_mass: Tensor) -> Tensor:
    return (log_mass != -math.inf)[:, :, None]


def _without_padding(vectors: Tensor, log_mass: Tensor) -> Tensor:
    return torch.where(_valid(log_mass), vectors, 0.0).to(log_mass.dtype)


def _normalise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x / |x| (0 for the zero vector), and two factors of |x| whose squares are finite."""
    peak = x.abs().amax(2, keepdim=True)
    peak = torch.where(peak > 0, peak, 1.0)
    x = x / peak
    square = (x * x).sum(2, keepdim=True)
    # Division by infinity keeps the zero vector and its gradient at zero.
    length = torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), math.inf)
    return x / length, length, peak


def _centred(x: Tensor, y: Tensor, log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the common mean of both sides: far from the origin, squared distances cancel."""
    count = (log_a != -math.inf).sum(1) + (log_b != -math.inf).sum(1)
    centre = (x.sum(1) + y.sum(1)) / count.clamp(min=1)[:, None]
    return x - centre[:, None], y - centre[:, None]
