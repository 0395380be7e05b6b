"""losses.alignment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor, nn

from optical.ot.functional import AlignmentOptions, Cost, ot_alignment
from optical.ot.validation import check_options

if TYPE_CHECKING:
    from typing_extensions import Unpack


Reduction = Literal["mean", "sum", "none"]


class OTAlignmentLoss(nn.Module):
    """Pull a student's token vectors onto a teacher's by optimal transport. No parameters.

    A module around ``optical.ot_alignment``, which documents the tensors and the options.

    Args:
        cost, epsilon, max_iter, tol, **options: see ``optical.ot_alignment``.
        reduction: "mean" over the pairs of the batch (a pair without tokens counts as 0), "sum",
            or "none" for one value per pair.

    Raises:
        TypeError, ValueError: an option is unknown or out of range.

    Source: OPTICAL (WSDM 2023, arXiv 2301.12566).

    Example:
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
        check_options(epsilon=epsilon, max_iter=max_iter, tol=tol, cost=cost, **options)
        if reduction not in get_args(Reduction):
            wanted = ", ".join(repr(name) for name in get_args(Reduction))
            raise ValueError(f"reduction is {reduction!r}; expected one of {wanted}")
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
        """Return the loss: a scalar, or (batch,) with ``reduction="none"``."""
        distance = ot_alignment(student, teacher, student_mask, teacher_mask, **self.options)
        if self.reduction == "mean":
            return distance.mean()
        if self.reduction == "sum":
            return distance.sum()
        return distance

    def extra_repr(self) -> str:
        shown = self.options | {"reduction": self.reduction}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
