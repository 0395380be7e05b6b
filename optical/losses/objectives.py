"""The objectives that OT distillation is compared with, in the same contract.

position      token k of the student is pulled onto token k of the teacher, with no alignment
pooled        the mean of the tokens is pulled onto the teacher's mean (Reimers and Gurevych 2020)
greedy        the nearest tokens are matched one to one, the nearest pair first (Dr.DECR, 2022)
contrastive   a sentence must score its own translation above the others of the batch (LaBSE, 2022)

:class:`optical.losses.distillation.DistillationLoss` documents what they share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from optical.losses.distillation import DistillationLoss, Tokens


class PositionDistillationLoss(DistillationLoss):
    """Mean squared distance of the tokens in the same position; the longer text's rest is free."""

    name = "position_mse"

    def compare(self, student: Tokens, teacher: Tokens, role: str) -> Tensor:
        """Return the squared distance, averaged over the positions that both texts have."""
        count = min(student.vectors.shape[1], teacher.vectors.shape[1])
        (x, x_mask), (y, y_mask) = (_packed(tokens, count) for tokens in (student, teacher))
        return _mean((x - y).square().sum(-1), x_mask & y_mask)


class PooledDistillationLoss(DistillationLoss):
    """Squared distance of the mean token vectors.

    Source: Reimers and Gurevych, "Making Monolingual Sentence Embeddings Multilingual using
    Knowledge Distillation" (EMNLP 2020, arXiv 2004.09813); their student reads both languages,
    which a column of English for the student gives.
    """

    name = "pooled_mse"

    def compare(self, student: Tokens, teacher: Tokens, role: str) -> Tensor:
        """Return the squared distance of the means, averaged over the pairs with tokens."""
        x, y = _pooled(student), _pooled(teacher)
        return _mean((x - y).square().sum(-1), student.mask.any(1) & teacher.mask.any(1))


class GreedyDistillationLoss(DistillationLoss):
    """Mean squared distance of tokens that were matched greedily, one to one.

    Source: Li et al., "Learning Cross-Lingual IR from an English Retriever" (NAACL 2022,
    arXiv 2112.08185), section 3.2.
    """

    name = "greedy_mse"

    def compare(self, student: Tokens, teacher: Tokens, role: str) -> Tensor:
        """Return the squared distance, averaged over the matched tokens."""
        x, y = student.vectors, teacher.vectors
        with torch.no_grad():
            rows, columns, matched = match_greedily(x, y, student.mask, teacher.mask)
        picked = torch.arange(len(x), device=x.device)[:, None]
        return _mean((x[picked, rows] - y[picked, columns]).square().sum(-1), matched)


class ContrastiveBitextLoss(DistillationLoss):
    """Softmax over the translations of a batch, scored as retrieval scores them (MaxSim).

    Both directions are averaged. Translations of other sentences are the negatives, so batches
    count here: accumulating two halves is not the same as a whole.

    Args:
        temperature: divisor of the mean similarity of a query's tokens.

    Source: the objective of Feng et al., "Language-agnostic BERT Sentence Embedding" (ACL 2022,
    arXiv 2007.01852), without its margin, on the scores of ColBERT.
    """

    name = "contrastive"

    def __init__(
        self, model: nn.Module, teacher: nn.Module, *, temperature: float = 0.05, **masses: Any
    ) -> None:
        super().__init__(model, teacher, **masses)
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; expected a number > 0")
        self.temperature = temperature

    def compare(self, student: Tokens, teacher: Tokens, role: str) -> Tensor:
        """Return the cross-entropy of finding each sentence's translation in the batch."""
        queries, documents = (student, teacher) if role == "query" else (teacher, student)
        both = student.mask.any(1) & teacher.mask.any(1)
        scores = _similarities(queries, documents) / self.temperature
        # A pair without tokens on a side is neither a question nor an answer.
        scores = scores.masked_fill(~both, torch.finfo(scores.dtype).min)
        own = torch.arange(len(scores), device=scores.device)
        losses = [functional.cross_entropy(x, own, reduction="none") for x in (scores, scores.T)]
        return _mean((losses[0] + losses[1]) / 2, both)

    def get_config_dict(self) -> dict[str, Any]:
        """Return the options, as shown in the model card."""
        return {"temperature": self.temperature}


def match_greedily(
    x: Tensor, y: Tensor, x_mask: Tensor, y_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Match tokens one to one: the most similar pair first, then the most similar of the rest.

    Args:
        x: (batch, n, dim) and y: (batch, m, dim), unit vectors.
        x_mask, y_mask: (batch, n) and (batch, m) bool, True for the tokens that count.

    Returns:
        Rows and columns of the matches, (batch, min(n, m)) each, and which of them are matches of
        real tokens; the others are arbitrary.
    """
    allowed = x_mask[:, :, None] & y_mask[:, None, :]
    likeness = torch.where(allowed, x @ y.mT, float("-inf"))
    count, m = min(likeness.shape[1:]), likeness.shape[2]
    found = []
    for _ in range(count):
        best, place = likeness.flatten(1).max(1)
        row, column = place // m, place % m
        found.append((row, column, best > float("-inf")))
        likeness = likeness.scatter(1, row[:, None, None].expand(-1, 1, m), float("-inf"))
        taken = column[:, None, None].expand(-1, likeness.shape[1], 1)
        likeness = likeness.scatter(2, taken, float("-inf"))
    rows, columns, matched = (torch.stack(part, 1) for part in zip(*found, strict=True))
    return rows, columns, matched


def _similarities(queries: Tokens, documents: Tokens) -> Tensor:
    """(queries, documents): mean over a query's tokens of the best similarity in a document."""
    products = torch.einsum("aid,bjd->abij", queries.vectors, documents.vectors)
    lowest = torch.finfo(products.dtype).min
    best = products.where(documents.mask[None, :, None, :], lowest).amax(-1)
    return _mean(best, queries.mask[:, None].expand_as(best), dim=-1)


def _packed(tokens: Tokens, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` tokens that count, moved to the front, and which of them exist."""
    order = (~tokens.mask).int().argsort(dim=1, stable=True)[:, :count]
    picked = torch.arange(len(order), device=order.device)[:, None]
    return tokens.vectors[picked, order], tokens.mask[picked, order]


def _pooled(tokens: Tokens) -> Tensor:
    mass = tokens.mask.to(tokens.vectors.dtype) if tokens.mass is None else tokens.mass
    # A select, because padding may hold anything.
    kept = tokens.vectors.where(tokens.mask[..., None], 0.0) * mass[..., None]
    total = mass.sum(1, keepdim=True)
    return kept.sum(1) / total.where(total > 0, 1.0)


def _mean(values: Tensor, counted: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the values that count; 0 where none does."""
    kept = values.where(counted, 0.0)
    if dim is None:
        return kept.sum() / counted.sum().clamp(min=1)
    return kept.sum(dim) / counted.sum(dim).clamp(min=1)
