"""Input and output of the operator: ``Problem``, ``Solution``, ``Status``, and the option names.

Every backend takes a ``Problem`` and returns a ``Solution``, so a new option is one new field.
"""

from __future__ import annotations

import enum
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

KINDS = ("given", "cosine", "sqeuclidean", "dot")
GRADIENTS = ("envelope", "implicit", "unroll")
PRECISIONS = ("exact", "fast")
BACKEND_NAMES = ("auto", "cuda", "triton", "cpu", "reference")


class Status(enum.IntEnum):
    """How the solve of one problem ended; the values of ``SinkhornResult.status``."""

    CONVERGED = 0
    """The marginal error reached ``tol``."""
    MAX_ITER = 1
    """``max_iter`` iterations ran."""
    EMPTY = 2
    """All rows or all columns are padding; every output is 0."""
    INFEASIBLE = 3
    """No plan has the fixed marginals, or an input is NaN or out of range (outputs are NaN)."""


class Problem(NamedTuple):
    """A batch of B transport problems and the options of their solution.

    Floating-point tensors except ``x`` and ``y`` share one dtype, float32 or float64, in which the
    operator computes. Rows and columns with log-mass -inf are padding; their values are never used.
    Packed problems are concatenated along one dimension, without padding.

    Attributes:
        x: for ``kind="given"``, the cost (B, n, m), where +inf forbids a pair. Otherwise the
            vectors of the rows, (B, n, d) or packed (N, d), in the computing dtype, or in float16
            or bfloat16 if the computing dtype is float32.
        y: vectors of the columns, (B, m, d) or packed (M, d); None for a given cost.
        kind: "given", "cosine", "sqeuclidean" or "dot"; see ``optical.backends.dense``.
        cu_a, cu_b: for packed problems, (B + 1,) int64 offsets of each problem's first row and
            column, followed by N and M. None for padded problems.
        log_a, log_b: log-masses (B, n) and (B, m), or packed (N,) and (M,).
        epsilon: (B,) temperatures.
        f0, g0: initial potentials, shaped like ``log_a`` and ``log_b``; zeros if None.
        max_iter, tol: number of iterations, and the L1 marginal error at which a problem stops
            earlier (0: never).
        rho_a, rho_b: strengths of the marginal penalties; inf fixes the marginal of that side.
        omega: over-relaxation; 1 is none.
        anderson: number of differences in the memory of Anderson acceleration; 0 is none.
        anneal_start, anneal_ratio: iteration k runs at temperature
            ``max(epsilon, anneal_start * anneal_ratio ** k)``; a start of 0 disables annealing.
        gradient: "envelope", "implicit" or "unroll".
        low_memory: never store an n x m matrix, at the price of a longer run time.
        precision: "exact", or "fast" to allow a plan in half precision during the iterations.
        backend: one of ``BACKEND_NAMES``.
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
        """Whether the problems are concatenated instead of padded."""
        return self.cu_a is not None


# Fields before this one are what is to be solved, the others how.
FIRST_OPTION = Problem._fields.index("max_iter")


class Solution(NamedTuple):
    """Output of the operator; ``optical.SinkhornResult`` documents the first seven fields.

    Attributes:
        value, value_linear, marginal_error: (B,).
        f, g: potentials, shaped like ``log_a`` and ``log_b``.
        n_iter, status: (B,) int32.
        w, z: with ``gradient="implicit"``, the solution of the adjoint system of ``value_linear``,
            shaped like f and g. Otherwise of shape (0,).
        residual: (B,) relative residual of that system; 0 for other gradients.
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
    def allocate(cls, problem: Problem, values_only: bool = False) -> Solution:
        """Allocate uninitialised outputs for ``problem``, whose masses are contiguous.

        Outputs that were not asked for are one shared empty tensor: w and z unless the gradient is
        implicit, and with ``values_only`` those that only describe the run.
        """
        log_a, log_b, epsilon = problem.log_a, problem.log_b, problem.epsilon
        like = torch.empty_like
        value, value_linear, f, g = like(epsilon), like(epsilon), like(log_a), like(log_b)
        w = z = error = n_iter = status = residual = _nothing(epsilon.dtype, epsilon.device)
        if problem.gradient == "implicit":
            w, z = like(log_a), like(log_b)
        if problem.gradient == "unroll" or not values_only:
            n_iter = like(epsilon, dtype=torch.int32)
        if not values_only:
            error, status, residual = like(epsilon), like(n_iter), like(epsilon)
        return cls(value, value_linear, f, g, error, n_iter, status, w, z, residual)


@functools.lru_cache(maxsize=16)
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)


# Gradients with respect to x, y, log_a and log_b; None if they were not requested.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def cost_problem(
    cost: Tensor, log_a: Tensor, log_b: Tensor, epsilon: Tensor, max_iter: int, **options: Any
) -> Problem:
    """Make padded problems of a given cost (B, n, m); ``options`` are fields of ``Problem``."""
    return Problem(
        cost, None, "given", None, None, log_a, log_b, epsilon, max_iter=max_iter, **options
    )


def example_problem(
    x: Tensor, y: Tensor | None = None, kind: str = "given", **options: Any
) -> Problem:
    """Make padded problems with uniform masses, to ask backends which problems they support.

    ``x`` is a cost (B, n, m); with ``y`` (B, m, d), the vectors of the rows (B, n, d).
    """
    half = x.dtype in (torch.float16, torch.bfloat16) and kind != "given"
    dtype = torch.float32 if half else x.dtype
    batch, n, m = x.shape[0], x.shape[1], (x.shape[2] if y is None else y.shape[1])
    log_a, log_b = x.new_zeros(batch, n, dtype=dtype), x.new_zeros(batch, m, dtype=dtype)
    epsilon = x.new_ones(batch, dtype=dtype)
    return Problem(x, y, kind, None, None, log_a, log_b, epsilon, **options)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as messages print it, such as "float32"."""
    return str(dtype).removeprefix("torch.")
