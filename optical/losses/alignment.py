"""``OTAlignmentLoss``: optimal-transport alignment of token vectors, for any training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor, nn

from optical.ot.autograd import transport_cost
from optical.ot.checks import check_options, unfold
from optical.ot.functional import AlignmentOptions, Cost, alignment_problem

if TYPE_CHECKING:
    from typing_extensions import Unpack

Reduction = Literal["mean", "sum", "none"]


class OTAlignmentLoss(nn.Module):
    """Transport cost between the token vectors of student and teacher; has no parameters.

    A module around ``optical.ot_alignment``, which documents the tensors and the options.

    Args:
        cost, epsilon, max_iter, tol, **options: see ``optical.ot_alignment``.
        reduction: "mean" over the pairs of the batch, where a pair without tokens counts as 0;
            "sum"; or "none" for one value per pair.

    Raises:
        TypeError, ValueError: an option is unknown, or has a wrong type or value.

    Source: Huang, Yu, Allan, OPTICAL (WSDM 2023, arXiv 2301.12566).

    Examples:
        >>> import torch
        >>> from optical import OTAlignmentLoss
        >>> loss = OTAlignmentLoss(epsilon=0.05)
        >>> student = torch.randn(2, 5, 8, requires_grad=True)
        >>> teacher = torch.randn(2, 7, 8)
        >>> loss(student, teacher, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])).backward()
        >>> student.grad[1, 2:].abs().max()
        tensor(0.)
    """

    def __init__(
        self,
        *,
        cost: Cost = "cosine",
        epsilon: float = 0.05,
        max_iter: int = 50,
        tol: float = 0.0,
        reduction: Reduction = "mean",
        **options: Unpack[AlignmentOptions],
    ) -> None:
        super().__init__()
        check_options(
            "OTAlignmentLoss", epsilon=epsilon, max_iter=max_iter, tol=tol, cost=cost, **options
        )
        if reduction not in get_args(Reduction):
            expected = ", ".join(repr(name) for name in get_args(Reduction))
            raise ValueError(f"reduction is {reduction!r}; expected one of {expected}")
        self.options: dict[str, Any] = {
            "cost": cost,
            "epsilon": epsilon,
            "max_iter": max_iter,
            "tol": tol,
            "gradient": "envelope",
            "backend": "auto",
            **options,
        }
        self.reduction: Reduction = reduction

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        student_mask: Tensor | None = None,
        teacher_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss; see ``optical.ot_alignment`` for the arguments.

        Returns:
            A scalar, or (batch,) with ``reduction="none"``.
        """
        problem, lead = alignment_problem(
            student, teacher, student_mask, teacher_mask, **self.options
        )
        if self.reduction == "mean":
            return transport_cost(problem, mean=True)
        costs = transport_cost(problem)
        return costs.sum() if self.reduction == "sum" else unfold(costs, lead)

    def extra_repr(self) -> str:
        """Return the options, as shown by ``repr``."""
        shown = self.options | {"reduction": self.reduction}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
