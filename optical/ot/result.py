"""``SinkhornResult``, the return type of the public functions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optical.backends.dense import PaddedProblem
from optical.backends.problem import Problem
from optical.ot import operator, validation


@dataclass(frozen=True)
class SinkhornResult:
    """Solution of a batch of problems, as tensors on the device of the cost.

    ``value`` and ``value_linear`` are differentiable; f, g and the plan are only with
    ``gradient="unroll"``. For packed problems, the shapes (batch, n) and (batch, m) below are (N,)
    and (M,).

    Attributes:
        value: (batch,) objective of the returned plan,
            ``<plan, cost> + epsilon * KL(plan || a b)``, plus ``rho * KL(sums || masses)`` for each
            side that ``rho`` relaxes.
        value_linear: (batch,) transport cost ``<plan, cost>``.
        f: (batch, n) potential of the rows, 0 for padding.
        g: (batch, m) potential of the columns, 0 for padding.
        marginal_error: (batch,) L1 distance of the plan's sums from those of the optimal plan: a
            and b, or ``a * exp(-f / rho_a)`` and ``b * exp(-g / rho_b)`` on a relaxed side.
        n_iter: (batch,) int32, number of iterations run.
        status: (batch,) int32, an ``optical.Status``. CONVERGED: within ``tol``. MAX_ITER: all
            iterations ran. EMPTY: all rows or all columns are padding; every output is 0.
            INFEASIBLE: an input is NaN or out of range, and the outputs of the problem are NaN; or
            marginals are fixed and their total masses differ by more than 0.1 %, or a valid row or
            column has no allowed pair, and the outputs are those of the iterations.
        gradient_residual: (batch,) with ``gradient="implicit"``, the relative residual of the
            linear system behind the gradient of ``value_linear``; otherwise 0.
    """

    value: Tensor
    value_linear: Tensor
    f: Tensor
    g: Tensor
    marginal_error: Tensor
    n_iter: Tensor
    status: Tensor
    gradient_residual: Tensor
    problem: Problem = field(repr=False)

    def plan(self) -> Tensor:
        """Compute the plan (batch, n, m) from the potentials; it is not stored.

        Padding and forbidden pairs are exactly 0. Packed problems are padded to the longest one,
        whose length is read from the device.

        Examples:
            >>> import torch
            >>> from optical import sinkhorn
            >>> result = sinkhorn(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), epsilon=0.1)
            >>> result.plan().sum(dim=(1, 2)).round(decimals=3)
            tensor([1.])
        """
        with torch.autocast(self.f.device.type, enabled=False):
            return PaddedProblem(self.problem).plan(self.f, self.g)

    def apply_plan(self, v: Tensor, transpose: bool = False) -> Tensor:
        """Multiply the plan with vectors; differentiable with respect to v only.

        Args:
            v: (batch, m, k), one vector per column (packed: (M, k)); with ``transpose``,
                (batch, n, k), one per row. Vectors of padding are never used.
            transpose: multiply the transposed plan.

        Returns:
            (batch, n, k) in the dtype of f, or (batch, m, k) with ``transpose``. The rows of
            ``apply_plan(y) / apply_plan(ones)`` are the barycentric images of the rows' tokens.

        Raises:
            TypeError, ValueError: v has a wrong type, dtype, shape or device.

        Examples:
            >>> import torch
            >>> from optical import sinkhorn
            >>> result = sinkhorn(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), epsilon=0.05)
            >>> result.apply_plan(torch.tensor([[[3.0], [5.0]]])).round(decimals=3)
            tensor([[[1.5000],
                     [2.5000]]])
        """
        potential = self.f if transpose else self.g
        layout = "one vector per row" if transpose else "one vector per column"
        dim = potential.dim() + 1
        validation.check_floating("v", v, f"{dim} dimensions, {layout}", dim)
        validation.check_shape("v", v, (*potential.shape, v.shape[-1]), layout)
        validation.check_device("v", v, "the result", potential)
        problem, f, g = detached(self.problem), self.f.detach(), self.g.detach()
        return operator.apply_plan(problem, f, g, v.to(f.dtype), transpose)


def detached(problem: Problem) -> Problem:
    """Return the problem with its tensors detached from the autograd graph."""
    fields: list[Any] = [x.detach() if isinstance(x, Tensor) else x for x in problem]
    return Problem(*fields)
