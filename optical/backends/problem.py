"""What the operator is given and what it returns: one bundle each, in the order of its schema.

Every implementation takes ``Problem`` and returns ``Solution``, so a new option is a field here
and nowhere a longer list of parameters.
"""

from __future__ import annotations

import enum
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

KINDS = ("given", "cosine", "sqeuclidean", "dot")
GRADIENTS = ("envelope", "implicit", "unroll")
PRECISIONS = ("exact", "fast")


class Status(enum.IntEnum):
    """How the run of one problem ended, as in ``SinkhornResult.status``."""

    CONVERGED = 0
    """It met ``tol``."""
    MAX_ITER = 1
    """It ran ``max_iter`` iterations."""
    EMPTY = 2
    """One side has no present line: there is nothing to transport, and every output is 0."""
    INFEASIBLE = 3
    """No plan can have the marginals asked for, or an input is not a number (outputs NaN)."""


class Problem(NamedTuple):
    """A batch of B problems and how to solve it.

    Floating tensors but ``x`` and ``y`` share one dtype, float32 or float64, in which the operator
    computes. A line (row or column) of log-mass -inf is absent: nothing about it is read as a
    number. Packed problems stand behind one another in one dimension, with no padding.

    Attributes:
        x: for ``kind="given"`` the cost (B, n, m), where +inf forbids a pair; otherwise the vectors
            of the rows, (B, n, d) or packed (N, d), in the computing dtype or, where that is
            float32, in float16 or bfloat16.
        y: the vectors of the columns, (B, m, d) or packed (M, d), or None for a given cost.
        kind: "given", "cosine", "sqeuclidean" or "dot"; see ``optical.backends.dense``.
        cu_a, cu_b: packed problems only: (B + 1,) int64, where each problem's rows and columns
            begin, and at last N and M.
        log_a, log_b: log-masses (B, n) and (B, m), or packed (N,) and (M,).
        epsilon: (B,) temperatures.
        f0, g0: where to start, shaped like ``log_a`` and ``log_b``, or None for zeros.
        max_iter, tol: how many iterations, and at which L1 error of a marginal to stop (0: never).
        rho_a, rho_b: strengths of the marginal penalties; inf fixes that side's marginal.
        omega: over-relaxation, 1 for none.
        anderson: how many differences the acceleration remembers, 0 for none.
        anneal_start, anneal_ratio: iteration k runs at ``max(epsilon, start * ratio ** k)``; start
            0 means no annealing.
        gradient: "envelope", "implicit" or "unroll".
        low_memory: trade time for never holding an n x m matrix.
        precision: "exact", or "fast", which lets a backend keep the plan in half precision.
        backend: a name of ``optical.backends.registry.BACKENDS``, or "auto".
    """

    x: Tensor
    y: Tensor | None
    kind: str
    cu_a: Tensor | None
    cu_b: Tensor | None
    log_a: Tensor
    log_b: Tensor
    epsilon: Tensor
    f0: Tensor | None = None
    g0: Tensor | None = None
    max_iter: int = 100
    tol: float = 0.0
    rho_a: float = math.inf
    rho_b: float = math.inf
    omega: float = 1.0
    anderson: int = 0
    anneal_start: float = 0.0
    anneal_ratio: float = 0.5
    gradient: str = "envelope"
    low_memory: bool = False
    precision: str = "exact"
    backend: str = "auto"

    @property
    def packed(self) -> bool:
        return self.cu_a is not None


class Solution(NamedTuple):
    """What the operator returns; see ``optical.SinkhornResult`` for the first seven.

    Attributes:
        value, value_linear, marginal_error: (B,).
        f, g: shaped like ``log_a`` and ``log_b``.
        n_iter, status: (B,) int32.
        w, z: with ``gradient="implicit"`` the solution of the linear system behind the gradient of
            ``value_linear``, shaped like f and g; otherwise of shape (0,).
        residual: (B,) how far w and z miss that system, relatively; 0 for other gradients.
    """

    value: Tensor
    value_linear: Tensor
    f: Tensor
    g: Tensor
    marginal_error: Tensor
    n_iter: Tensor
    status: Tensor
    w: Tensor
    z: Tensor
    residual: Tensor

    @classmethod
    def empty(cls, log_a: Tensor, log_b: Tensor, epsilon: Tensor, gradient: str) -> Solution:
        """Outputs to be written, contiguous, for masses and temperatures of these shapes."""
        floats = [epsilon.new_empty(epsilon.shape) for _ in range(4)]
        n_iter, status = (epsilon.new_empty(epsilon.shape, dtype=torch.int32) for _ in range(2))
        f, g = log_a.new_empty(log_a.shape), log_b.new_empty(log_b.shape)
        solved = gradient == "implicit"
        w = log_a.new_empty(log_a.shape if solved else 0)
        z = log_b.new_empty(log_b.shape if solved else 0)
        value, value_linear, marginal_error, residual = floats
        return cls(value, value_linear, f, g, marginal_error, n_iter, status, w, z, residual)


# Gradients with respect to x, y, log_a and log_b; None where nobody asked.
Gradients = tuple[Tensor | None, Tensor | None, Tensor, Tensor]


def given(
    cost: Tensor, log_a: Tensor, log_b: Tensor, epsilon: Tensor, max_iter: int, **options: Any
) -> Problem:
    """The arguments of problems with a given cost (B, n, m); options are fields by name."""
    return Problem(
        cost, None, "given", None, None, log_a, log_b, epsilon, max_iter=max_iter, **options
    )


def example(x: Tensor, y: Tensor | None = None, kind: str = "given", **options: Any) -> Problem:
    """Padded problems of uniform masses around ``x`` and ``y``: enough to ask who serves them."""
    half = x.dtype in (torch.float16, torch.bfloat16) and kind != "given"
    dtype = torch.float32 if half else x.dtype
    batch, n, m = x.shape[0], x.shape[1], (x.shape[2] if y is None else y.shape[1])
    log_a, log_b = x.new_zeros(batch, n, dtype=dtype), x.new_zeros(batch, m, dtype=dtype)
    epsilon = x.new_ones(batch, dtype=dtype)
    return Problem(x, y, kind, None, None, log_a, log_b, epsilon, **options)
