"""Losses as modules: for any PyTorch loop, and in the Sentence Transformers contract."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from optical.checks import check_options
from optical.functional import AlignmentOptions, Cost, ot_alignment

if TYPE_CHECKING:
    from typing_extensions import Unpack

Reduction = Literal["mean", "sum", "none"]


class DistillationOptions(AlignmentOptions, total=False):
    """The options of ``OTDistillationLoss``."""

    cost: Cost
    epsilon: float
    max_iter: int
    tol: float


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


class OTDistillationLoss(nn.Module):
    """Distil a frozen teacher into a student through aligned tokens of parallel sentences.

    Follows the Sentence Transformers 6 loss contract, so it runs in the unmodified
    ``MultiVectorEncoderTrainer``: the first column of a batch holds the sentences that the teacher
    reads (English), every further column translations that the student reads, each tokenised with
    its own model's tokenizer (``optical.training.BitextCollator`` does that). The tokens compared
    are those of the models' own scoring masks. The loss has no term across samples, so gradient
    accumulation and data-parallel training are exact.

    Args:
        model: the student, a ``MultiVectorEncoder``; the only part that is trained.
        teacher: a ``MultiVectorEncoder`` with vectors of the same size. It is frozen here and stays
            in evaluation mode.
        **options: those of ``optical.ot_alignment``: cost, epsilon, max_iter, tol, gradient, ...

    Raises:
        ValueError: teacher and student vectors differ in size.

    Source: OPTICAL (WSDM 2023, arXiv 2301.12566), section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        **options: Unpack[DistillationOptions],
    ) -> None:
        super().__init__()
        sizes = [_vector_size(module) for module in (model, teacher)]
        if None not in sizes and sizes[0] != sizes[1]:
            raise ValueError(
                f"teacher has token vectors of size {sizes[1]}, the student of size {sizes[0]}; "
                "give the student a Dense module with the teacher's size (option `dimension`)"
            )
        self.model = model
        self.teacher = teacher.requires_grad_(False).eval()
        self.alignment = OTAlignmentLoss(**options)

    def forward(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return ``{"ot_cost": scalar}``, the mean transported cosine distance of the batch."""
        source, *targets = [dict(features) for features in sentence_features]
        if not targets:
            raise ValueError("the batch has one column; expected a source and at least one target")
        with torch.no_grad():
            taught = self.teacher(source, task=source.get("task", "document"))
        cost = torch.stack(
            [
                self.alignment(
                    student["token_embeddings"],
                    taught["token_embeddings"],
                    student["attention_mask"],
                    taught["attention_mask"],
                )
                for student in (
                    self.model(target, task=target.get("task", "document")) for target in targets
                )
            ]
        )
        return {"ot_cost": cost.mean()}

    def train(self, mode: bool = True) -> OTDistillationLoss:
        """Switch the student's mode; the teacher never wakes its dropout."""
        super().train(mode)
        self.teacher.eval()
        return self

    def get_config_dict(self) -> dict[str, Any]:
        """Return the options, as shown in the model card."""
        return dict(self.alignment.options)

    @property
    def citation(self) -> str:
        """BibTeX of the method, as shown in the model card."""
        return """
@inproceedings{huang2023optical,
    title={Improving Cross-lingual Information Retrieval on Low-Resource Languages via Optimal Transport Distillation},
    author={Zhiqi Huang and Puxuan Yu and James Allan},
    booktitle={Proceedings of the Sixteenth ACM International Conference on Web Search and Data Mining},
    pages={1048--1056},
    year={2023},
    eprint={2301.12566},
    archivePrefix={arXiv},
}
"""  # noqa: E501


def _vector_size(model: nn.Module) -> int | None:
    """Size of a model's token vectors, or None where the model cannot tell."""
    tell = getattr(model, "get_embedding_dimension", None)
    return tell() if callable(tell) else None
