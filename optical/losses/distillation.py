"""Distillation losses in the Sentence Transformers contract: the base class and the OT loss.

To add an objective, subclass ``DistillationLoss``, set ``name``, and implement ``compare``, as
``optical.losses.objectives`` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from optical.losses.alignment import OTAlignmentLoss
from optical.losses.divergence import (
    DivergenceOptions,
    check_divergence_options,
    sinkhorn_divergence,
)
from optical.ot.functional import AlignmentOptions, Cost, sinkhorn_vectors

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class DistillationOptions(AlignmentOptions, total=False):
    """Options of ``OTDistillationLoss``."""

    cost: Cost
    epsilon: float
    max_iter: int
    tol: float


class Tokens(NamedTuple):
    """Token vectors of the student or the teacher for one batch of texts.

    Attributes:
        vectors: (batch, n, dim).
        mask: (batch, n) bool, False for padding and tokens that are left out.
        mass: (batch, n) non-negative token weights, 0 where the mask is False; None for equal
            weights.
    """

    vectors: Tensor
    mask: Tensor
    mass: Tensor | None = None


class DistillationLoss(nn.Module):
    """Base class of losses that distil a frozen teacher into a student on parallel sentences.

    Subclasses define ``name``, the key of the loss in logs, and ``compare``, the objective.

    Follows the loss contract of Sentence Transformers 6, so it runs in the unmodified
    ``MultiVectorEncoderTrainer`` and ``SentenceTransformerTrainer``. The first column of a batch is
    read by the teacher (English); the student reads all other columns. Each column is tokenised by
    its own model, as ``optical.training.BitextCollator`` does. The tokens compared are those of the
    models' scoring masks; dense models are compared by their token vectors before pooling.

    Args:
        model: the student, a ``MultiVectorEncoder`` or a dense ``SentenceTransformer``. Only its
            parameters are trained.
        teacher: a model of either kind, with token vectors of the same size. It is frozen and stays
            in evaluation mode. It is not run on a column that already has token vectors.
        student_mass, teacher_mass: (vocabulary size,) weight of each token of the two tokenizers,
            finite and not negative; tokens of weight 0 are left out. None: equal weights.

    ``state_dict()`` holds both models; checkpoints of the trainers hold the student alone.

    Raises:
        TypeError, ValueError: the weights are no such table.
        ValueError: the token vectors of teacher and student differ in size, or the teacher is the
            student, which freezing it would keep from training.
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
        frozen = {id(parameter) for parameter in teacher.parameters()}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if trained and all(id(parameter) in frozen for parameter in trained):
            raise ValueError(
                "teacher has all parameters of model, and is frozen; expected another model, or "
                "copy.deepcopy(model)"
            )
        _check_mass("student_mass", student_mass, model)
        _check_mass("teacher_mass", teacher_mass, teacher)
        self._same_vocabulary = _same_vocabulary(model, teacher)
        self.model = model
        self.teacher = teacher.requires_grad_(False).eval()
        # Buffers follow the loss to its device, but are not part of checkpoints.
        self.student_mass: Tensor | None
        self.teacher_mass: Tensor | None
        self.register_buffer("student_mass", student_mass, persistent=False)
        self.register_buffer("teacher_mass", teacher_mass, persistent=False)

    def compare(self, student: Tokens, teacher: Tokens, role: str) -> Tensor:
        """Compute the scalar loss of a batch, to be implemented by subclasses.

        Args:
            student, teacher: tokens of a batch, where text i of one translates text i of the other.
            role: "query" or "document".
        """
        raise TypeError(f"{type(self).__name__} has no objective; use one of its subclasses")

    def forward(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute the mean loss over the columns that the student reads.

        Args:
            sentence_features: one dictionary of model inputs per column, or with
                "token_embeddings" and "attention_mask" in the teacher's. "task" of the first column
                is the role, "document" if absent.
            labels: unused.

        Returns:
            ``{name: scalar}``.

        Raises:
            ValueError: the batch has only one column; or its columns were tokenised in different
                roles or by one of the models only, as the trainer does without ``BitextCollator``.
        """
        source, *targets = [dict(features) for features in sentence_features]
        if not targets:
            raise ValueError("the batch has one column; expected a source and at least one target")
        self._check_collator(source, targets)
        role = source.get("task", "document")
        if "token_embeddings" not in source:
            with torch.no_grad():
                source = self.teacher(source, task=role)
        teacher_tokens = _tokens(source, self.teacher_mass)
        losses = []
        for target in targets:
            student_tokens = _tokens(self.model(target, task=role), self.student_mass)
            # Stored vectors are float32; those of a student under autocast may be half precision.
            vectors = teacher_tokens.vectors.to(student_tokens.vectors.dtype)
            converted = teacher_tokens._replace(vectors=vectors)
            losses.append(self.compare(student_tokens, converted, role))
        return {self.name: torch.stack(losses).mean()}

    def _check_collator(self, source: dict[str, Any], targets: Sequence[dict[str, Any]]) -> None:
        """Refuse columns that the trainer's own collator has tokenised."""
        tasks = {column["task"] for column in (source, *targets) if column.get("task")}
        one_tokenizer = not tasks and "token_embeddings" not in source
        if len(tasks) > 1 or (one_tokenizer and not self._same_vocabulary):
            cause = (
                f"the columns were read in the roles {', '.join(sorted(tasks))}"
                if tasks
                else "the columns name no role, and the tokenizers of student and teacher differ"
            )
            raise ValueError(
                f"{cause}; expected each column from its own model's tokenizer, in one role: give "
                "the trainer data_collator=optical.training.BitextCollator(student, teacher, "
                "role=...)"
            )

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the student; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def get_config_dict(self) -> dict[str, Any]:
        """Return the options for the model card."""
        return {}


class OTDistillationLoss(DistillationLoss):
    """Distillation by the optimal transport cost between the tokens of parallel sentences.

    The loss has no terms across sentence pairs, so gradient accumulation and data-parallel training
    give the gradient of the whole batch.

    Args:
        model, teacher, student_mass, teacher_mass: see ``DistillationLoss``. The token weights of a
            sentence, normalised to sum to 1, are the masses of the transport problem.
        **options: cost, epsilon, max_iter, tol, gradient and the other options of
            ``optical.ot_alignment``.

    Raises:
        TypeError, ValueError: an option is unknown, or has a wrong type or value.
        ValueError: the token vectors of teacher and student differ in size.

    Source: Huang, Yu, Allan, OPTICAL (WSDM 2023, arXiv 2301.12566), section 3.
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
        """Compute the transport cost, averaged over the batch."""
        if student.mass is None and teacher.mass is None:
            return self.alignment.forward(
                student.vectors, teacher.vectors, student.mask, teacher.mask
            )
        result = sinkhorn_vectors(
            student.vectors,
            teacher.vectors,
            _log_masses(student),
            _log_masses(teacher),
            **self.alignment.options,
        )
        return result.value_linear.mean()

    def get_config_dict(self) -> dict[str, Any]:
        """Return the options for the model card."""
        return dict(self.alignment.options)

    @property
    def citation(self) -> str:
        """BibTeX entry of the method for the model card."""
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


class DivergenceDistillationLoss(DistillationLoss):
    """Distillation by the Sinkhorn divergence between the tokens of parallel sentences.

    The transport cost at ``epsilon`` is least where each student token is a mean of teacher tokens,
    so it draws the tokens of a sentence together. The divergence subtracts half of the cost of each
    side to itself, and is least where both sides are equal. It tends to the transport cost as
    ``epsilon`` falls, and to the objective of ``PooledDistillationLoss``, halved, as it grows.

    The loss has no terms across sentence pairs, as that of ``OTDistillationLoss``. The cost of the
    teacher to itself is constant in training; it makes 0 the loss of equal sides.

    Args:
        model, teacher, student_mass, teacher_mass: see ``OTDistillationLoss``.
        epsilon, **options: see ``optical.sinkhorn_divergence``. The three solves run 50 plain
            iterations unless ``max_iter`` or ``tol`` are given.

    Raises:
        TypeError, ValueError: an option is unknown, or has a wrong type or value.
        ValueError: the token vectors of teacher and student differ in size.

    Source: Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn
    Divergences" (arXiv 1810.08278), equation 3.
    """

    name = "sinkhorn_divergence"

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        *,
        student_mass: Tensor | None = None,
        teacher_mass: Tensor | None = None,
        epsilon: float = 0.05,
        **options: Unpack[DivergenceOptions],
    ) -> None:
        super().__init__(model, teacher, student_mass=student_mass, teacher_mass=teacher_mass)
        short: dict[str, Any] = {"max_iter": 50, "tol": 0.0, **options}
        check_divergence_options("DivergenceDistillationLoss", epsilon, short)
        self.options: dict[str, Any] = {"epsilon": epsilon, **short}

    def compare(self, student: Tokens, teacher: Tokens, role: str) -> Tensor:
        """Compute the divergence, averaged over the batch."""
        value: Tensor = sinkhorn_divergence(
            student.vectors,
            teacher.vectors,
            _log_masses(student),
            _log_masses(teacher),
            **self.options,
        )
        return value.mean()

    def get_config_dict(self) -> dict[str, Any]:
        """Return the options for the model card."""
        return dict(self.options)

    @property
    def citation(self) -> str:
        """BibTeX entry of the method for the model card."""
        return """
@inproceedings{feydy2019interpolating,
    title={Interpolating between Optimal Transport and MMD using Sinkhorn Divergences},
    author={Jean Feydy and Thibault S{\\'e}journ{\\'e} and Fran{\\c{c}}ois-Xavier Vialard and Shun-ichi Amari and Alain Trouv{\\'e} and Gabriel Peyr{\\'e}},
    booktitle={Proceedings of the Twenty-Second International Conference on Artificial Intelligence and Statistics},
    pages={2681--2690},
    year={2019},
    eprint={1810.08278},
    archivePrefix={arXiv},
}
"""  # noqa: E501


def _same_vocabulary(student: nn.Module, teacher: nn.Module) -> bool:
    """Return whether one tokenizer serves both models; unknown tokenizers count as equal."""
    tokenizers = [getattr(model, "tokenizer", None) for model in (student, teacher)]
    if not all(hasattr(tokenizer, "get_vocab") for tokenizer in tokenizers):
        return True
    first, second = (tokenizer.get_vocab() for tokenizer in tokenizers)  # type: ignore[union-attr]
    return bool(first == second)


def _check_mass(name: str, mass: Any, model: nn.Module) -> None:
    """Raise unless ``mass`` is None or a table with a weight for each token of the model."""
    if mass is None:
        return
    if not isinstance(mass, Tensor) or not mass.is_floating_point():
        found = f"dtype {mass.dtype}" if isinstance(mass, Tensor) else type(mass).__name__
        raise TypeError(f"{name} has {found}; expected a floating-point tensor (vocabulary size,)")
    if mass.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(mass.shape)}; expected (vocabulary size,)")
    wrong = ~(mass >= 0) | ~mass.isfinite()
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        raise ValueError(f"{name} is {mass[index].item()} at {index}; expected finite weights >= 0")
    tokenizer: Any = getattr(model, "tokenizer", None)
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    if size is not None and len(mass) < size:
        raise ValueError(f"{name} has {len(mass)} entries; expected {size}, one per token")


def _tokens(output: dict[str, Any], token_mass: Tensor | None) -> Tokens:
    """Return the scored tokens of a model's output, with weights from (vocabulary size,) masses."""
    mask = output["attention_mask"].bool()
    if token_mass is None:
        return Tokens(output["token_embeddings"], mask)
    mass = token_mass[output["input_ids"]].where(mask, 0.0)
    return Tokens(output["token_embeddings"], mass > 0, mass)


def _log_masses(tokens: Tokens) -> Tensor:
    """(batch, n) log-masses that sum to 1 per text; -inf for tokens that are left out."""
    mass = tokens.mask.float() if tokens.mass is None else tokens.mass
    # Weights of any finite size: the largest becomes 1 before they are summed.
    largest = mass.amax(1, keepdim=True)
    mass = mass / largest.where(largest > 0, 1.0)
    total = mass.sum(1, keepdim=True)
    # The masses of a text without tokens stay 0, which makes an empty problem.
    return (mass / total.where(total > 0, 1.0)).log()


def _vector_size(model: nn.Module) -> int | None:
    """Return the size of a model's token vectors, or None if it is unknown."""
    # A dense model reports the size of its sentence vectors, which later modules determine.
    if any(type(part).__name__ == "Pooling" for part in model.children()):
        return None
    get_dimension = getattr(model, "get_embedding_dimension", None)
    return get_dimension() if callable(get_dimension) else None
