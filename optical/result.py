"""What the functions return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optical import checks, ops
from optical.arguments import Arguments
from optical.dense import Dense


@dataclass(frozen=True)
class SinkhornResult:
    """What ``sinkhorn`` and ``sinkhorn_vectors`` return, as tensors on the device of the cost.

    For packed problems, (batch, n) reads (N,) and (batch, m) reads (M,).

    Attributes:
        value: (batch,) ``<plan, cost> + epsilon * KL(plan || a b)``, plus, for each side that rho
            relaxes, ``rho * KL(its sums || its masses)``: the objective of the plan returned.
        value_linear: (batch,) ``<plan, cost>``, the transport part.
        f: (batch, n) potential of the rows, 0 where absent.
        g: (batch, m) potential of the columns, 0 where absent.
        marginal_error: (batch,) L1 distance of the plan's sums from those of the optimal plan: from
            a and b, or from ``a exp(-f / rho_a)`` and ``b exp(-g / rho_b)`` on a relaxed side.
        n_iter: (batch,) int32, iterations each problem ran.
        status: (batch,) int32, an ``optical.Status``: CONVERGED (within tol), MAX_ITER, EMPTY (a
            side without a present line; everything is 0), or INFEASIBLE (an input that was not a
            number, which makes the outputs of that problem NaN; or, with fixed marginals, masses
            that differ by more than a thousandth or a line whose every pair is forbidden, and then
            the numbers are those of the iterations).
        gradient_residual: (batch,) with ``gradient="implicit"``, how far the linear system behind
            the gradient of ``value_linear`` was left unsolved, relatively; otherwise 0.

    ``value`` and ``value_linear`` are differentiable; f, g and the plan are too only with
    ``gradient="unroll"``.
    """

    value: Tensor
    value_linear: Tensor
    f: Tensor
    g: Tensor
    marginal_error: Tensor
    n_iter: Tensor
    status: Tensor
    gradient_residual: Tensor
    arguments: Arguments = field(repr=False)

    def plan(self) -> Tensor:
        """Compute the coupling (batch, n, m) from the potentials; it is stored nowhere.

        Absent and forbidden pairs are exactly 0. Packed problems are padded to the longest ones,
        whose length is read from the device.

        Examples:
            >>> import torch
            >>> from optical import sinkhorn
            >>> result = sinkhorn(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), epsilon=0.1)
            >>> result.plan().sum(dim=(1, 2)).round(decimals=3)
            tensor([1.])
        """
        with torch.autocast(self.f.device.type, enabled=False):
            return Dense(self.arguments).plan(self.f, self.g)

    def apply_plan(self, v: Tensor, transpose: bool = False) -> Tensor:
        """Multiply the coupling with vectors; differentiable in v, and only in v.

        Args:
            v: (batch, m, k), one vector per column (packed: (M, k)); with ``transpose`` (batch, n,
                k), one per row. Vectors of absent columns are never read as numbers.
            transpose: multiply the transposed coupling.

        Returns:
            (batch, n, k) in the dtype of f, or with ``transpose`` (batch, m, k). The rows of
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
        lines = self.f if transpose else self.g
        layout = "one vector per row" if transpose else "one vector per column"
        checks.check_floating("v", v, f"{lines.dim() + 1} dimensions, {layout}", lines.dim() + 1)
        checks.check_shape("v", v, (*lines.shape, v.shape[-1]), layout)
        checks.check_device("v", v, "the result", lines)
        fixed, f, g = detached(self.arguments), self.f.detach(), self.g.detach()
        return ops.apply_plan(fixed, f, g, v.to(f.dtype), transpose)


def detached(arguments: Arguments) -> Arguments:
    """The same arguments, cut off from what they were computed from."""
    fields: list[Any] = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    return Arguments(*fields)
