"""Losses as modules: for any PyTorch loop, and in the Sentence Transformers contract."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from optical.checks import check_options
from optical.functional import AlignmentOptions, Cost, ot_alignment, sinkhorn_vectors

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

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


class Tokens(NamedTuple):
    """What a loss compares: the token vectors of one side of a batch.

    Attributes:
        vectors: (batch, n, dim).
        mask: (batch, n) bool, True for the tokens that count.
        mass: (batch, n) non-negative weights of the tokens, 0 where the mask is False; None where
            all real tokens weigh the same.
    """

    vectors: Tensor
    mask: Tensor
    mass: Tensor | None = None


class DistillationLoss(nn.Module):
    """Distil a frozen teacher into a student through parallel sentences; `compare` says how.

    Follows the Sentence Transformers 6 loss contract, so it runs in the unmodified
    ``MultiVectorEncoderTrainer`` and ``SentenceTransformerTrainer``: the first column of a batch
    holds the sentences that the teacher reads (English), every further column those that the
    student reads, each tokenised by its own model (``optical.training.BitextCollator``
    does that). The tokens compared are those of the models' own scoring masks; those of dense
    models are their token vectors before pooling.

    Args:
        model: the student, a ``MultiVectorEncoder`` or a dense ``SentenceTransformer``; the only
            part that is trained.
        teacher: one of the two kinds, with token vectors of the same size. It is frozen here and
            stays in evaluation mode. It does not run on columns that hold its vectors already.
        student_mass, teacher_mass: (vocabulary,) weight of each token of the two tokenizers; tokens
            of weight 0 are left out. None: every token weighs the same.

    Raises:
        ValueError: teacher and student vectors differ in size.
    """

    name = ""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        *,
        student_mass: Tensor | None = None,
        teacher_mass: Tensor | None = None,
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
        # Buffers move to the device with the loss; checkpoints hold the student alone.
        self.student_mass: Tensor | None
        self.teacher_mass: Tensor | None
        self.register_buffer("student_mass", student_mass, persistent=False)
        self.register_buffer("teacher_mass", teacher_mass, persistent=False)

    def compare(self, student: Tokens, teacher: Tokens, role: str) -> Tensor:
        """Return the scalar loss of a batch; row i of both sides says the same."""
        raise TypeError(f"{type(self).__name__} compares nothing; use one of its subclasses")

    def forward(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return ``{name: scalar}``, the mean over the columns that the student reads."""
        source, *targets = [dict(features) for features in sentence_features]
        if not targets:
            raise ValueError("the batch has one column; expected a source and at least one target")
        role = source.get("task", "document")
        if "token_embeddings" not in source:
            with torch.no_grad():
                source = self.teacher(source, task=role)
        taught = _tokens(source, self.teacher_mass)
        found = []
        for target in targets:
            read = _tokens(self.model(target, task=role), self.student_mass)
            # Stored vectors are float32, a student under autocast may be in half precision.
            same = taught._replace(vectors=taught.vectors.to(read.vectors.dtype))
            found.append(self.compare(read, same, role))
        return {self.name: torch.stack(found).mean()}

    def train(self, mode: bool = True) -> Self:
        """Switch the student's mode; the teacher never wakes its dropout."""
        super().train(mode)
        self.teacher.eval()
        return self

    def get_config_dict(self) -> dict[str, Any]:
        """Return the options, as shown in the model card."""
        return {}


class OTDistillationLoss(DistillationLoss):
    """Distil a frozen teacher into a student through optimally aligned tokens.

    The loss has no term across samples, so gradient accumulation and data-parallel training are
    exact.

    Args:
        model, teacher, student_mass, teacher_mass: see ``DistillationLoss``. The weights of a
            sentence's tokens, made to sum to 1, are the masses that are transported.
        **options: those of ``optical.ot_alignment``: cost, epsilon, max_iter, tol, gradient, ...

    Raises:
        ValueError: teacher and student vectors differ in size.

    Source: OPTICAL (WSDM 2023, arXiv 2301.12566), section 3.
    """

    name = "ot_cost"

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        *,
        student_mass: Tensor | None = None,
        teacher_mass: Tensor | None = None,
        **options: Unpack[DistillationOptions],
    ) -> None:
        super().__init__(model, teacher, student_mass=student_mass, teacher_mass=teacher_mass)
        self.alignment = OTAlignmentLoss(**options)

    def compare(self, student: Tokens, teacher: Tokens, role: str) -> Tensor:
        """Return the mean transported cosine distance of the batch."""
        if student.mass is None and teacher.mass is None:
            plain = student.vectors, teacher.vectors, student.mask, teacher.mask
            return self.alignment.forward(*plain)
        result = sinkhorn_vectors(
            student.vectors,
            teacher.vectors,
            _log_shares(student),
            _log_shares(teacher),
            **self.alignment.options,
        )
        return result.value_linear.mean()

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


def _tokens(output: dict[str, Any], table: Tensor | None) -> Tokens:
    """The tokens of a model's output that count, with the weights that a table gives them."""
    mask = output["attention_mask"].bool()
    if table is None:
        return Tokens(output["token_embeddings"], mask)
    mass = table[output["input_ids"]].where(mask, 0.0)
    return Tokens(output["token_embeddings"], mass > 0, mass)


def _log_shares(tokens: Tokens) -> Tensor:
    """(batch, n) logarithm of each token's share of its text; -inf for what does not count."""
    mass = tokens.mask.float() if tokens.mass is None else tokens.mass
    total = mass.sum(1, keepdim=True)
    # A text without tokens has no shares; its problem is empty.
    return (mass / total.where(total > 0, 1.0)).log()


def _vector_size(model: nn.Module) -> int | None:
    """Size of a model's token vectors, or None where the model cannot tell."""
    # A dense model tells the size of its sentence vectors, which modules after its tokens decide.
    if any(type(part).__name__ == "Pooling" for part in model.children()):
        return None
    tell = getattr(model, "get_embedding_dimension", None)
    return tell() if callable(tell) else None
