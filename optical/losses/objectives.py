"""Objectives that OT distillation is compared with, as ``DistillationLoss`` subclasses.

position      matches token k of the student with token k of the teacher, without alignment
pooled        matches the mean token vectors (Reimers and Gurevych, 2020)
greedy        matches the nearest tokens one to one, nearest pair first (Dr.DECR, 2022)
contrastive   ranks the translation of a sentence above the others of the batch (LaBSE, 2022)

A new objective is a class below with ``name`` and ``compare``, its name in ``optical.losses``, and
an entry in the table of ``optical.training.recipes`` that maps option values to classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from optical.losses.distillation import DistillationLoss, Tokens


class PositionDistillationLoss(DistillationLoss):
    """Mean squared distance of tokens in the same position; surplus tokens are ignored."""

    name = "position_mse"

    def compare(self, student: Tokens, teacher: Tokens, role: str) -> Tensor:
        """Compute the squared distance, averaged over the positions of both texts."""
        count = min(student.vectors.shape[1], teacher.vectors.shape[1])
        (x, x_mask), (y, y_mask) = (_first_tokens(tokens, count) for tokens in (student, teacher))
        return _mean((x - y).square().sum(-1), x_mask & y_mask)


class PooledDistillationLoss(DistillationLoss):
    """Squared distance of the mean token vectors.

    Source: Reimers and Gurevych, "Making Monolingual Sentence Embeddings Multilingual using
    Knowledge Distillation" (EMNLP 2020, arXiv 2004.09813). Their student reads both languages; for
    the same objective, add a column of English for the student.
    """

    name = "pooled_mse"

    def compare(self, student: Tokens, teacher: Tokens, role: str) -> Tensor:
        """Compute the squared distance of the means, averaged over the pairs with tokens."""
        x, y = _mean_vectors(student), _mean_vectors(teacher)
        return _mean((x - y).square().sum(-1), student.mask.any(1) & teacher.mask.any(1))


class GreedyDistillationLoss(DistillationLoss):
    """Mean squared distance of tokens matched greedily, one to one.

    Source: Li et al., "Learning Cross-Lingual IR from an English Retriever" (NAACL 2022,
    arXiv 2112.08185), section 3.2.
    """

    name = "greedy_mse"

    def compare(self, student: Tokens, teacher: Tokens, role: str) -> Tensor:
        """Compute the squared distance, averaged over the matched tokens."""
        x, y = student.vectors, teacher.vectors
        with torch.no_grad():
            rows, columns, matched = match_greedily(x, y, student.mask, teacher.mask)
        batch = torch.arange(len(x), device=x.device)[:, None]
        return _mean((x[batch, rows] - y[batch, columns]).square().sum(-1), matched)


class ContrastiveBitextLoss(DistillationLoss):
    """Cross-entropy of retrieving the translation of a sentence within its batch, by MaxSim.

    Both directions are averaged. Other sentences of the batch are negatives, so the loss depends on
    the batch size; gradient accumulation does not reproduce a larger batch.

    Args:
        model, teacher, **masses: see ``DistillationLoss``.
        temperature: divisor of the mean similarity of a query's tokens.

    Raises:
        ValueError: temperature is not positive, or the token vectors differ in size.

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
        """Compute the cross-entropy, averaged over the pairs with tokens on both sides."""
        queries, documents = (student, teacher) if role == "query" else (teacher, student)
        both = student.mask.any(1) & teacher.mask.any(1)
        scores = _similarities(queries, documents) / self.temperature
        # Mask pairs with an empty side.
        scores = scores.masked_fill(~both, torch.finfo(scores.dtype).min)
        target = torch.arange(len(scores), device=scores.device)
        forth, back = (
            functional.cross_entropy(logits, target, reduction="none")
            for logits in (scores, scores.T)
        )
        return _mean((forth + back) / 2, both)

    def get_config_dict(self) -> dict[str, Any]:
        """Return the options for the model card."""
        return {"temperature": self.temperature}


def match_greedily(
    x: Tensor, y: Tensor, x_mask: Tensor, y_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Match tokens one to one, repeatedly taking the most similar pair of unmatched tokens.

    Args:
        x: (batch, n, dim) unit vectors.
        y: (batch, m, dim) unit vectors.
        x_mask, y_mask: (batch, n) and (batch, m) bool, False for tokens that are left out.

    Returns:
        rows, columns and valid, (batch, min(n, m)) each: the indices of the matches, and whether
        both tokens exist; the indices of other matches are arbitrary.
    """
    allowed = x_mask[:, :, None] & y_mask[:, None, :]
    similarity = torch.where(allowed, x @ y.mT, float("-inf"))
    count, m = min(similarity.shape[1:]), similarity.shape[2]
    matches = []
    for _ in range(count):
        best, index = similarity.flatten(1).max(1)
        row, column = index // m, index % m
        matches.append((row, column, best > float("-inf")))
        row_index = row[:, None, None].expand(-1, 1, m)
        similarity = similarity.scatter(1, row_index, float("-inf"))
        column_index = column[:, None, None].expand(-1, similarity.shape[1], 1)
        similarity = similarity.scatter(2, column_index, float("-inf"))
    rows, columns, valid = (torch.stack(part, 1) for part in zip(*matches, strict=True))
    return rows, columns, valid


def _similarities(queries: Tokens, documents: Tokens) -> Tensor:
    """(queries, documents) mean over the query tokens of the best similarity in the document."""
    products = torch.einsum("aid,bjd->abij", queries.vectors, documents.vectors)
    lowest = torch.finfo(products.dtype).min
    best = products.where(documents.mask[None, :, None, :], lowest).amax(-1)
    return _mean(best, queries.mask[:, None].expand_as(best), dim=-1)


def _first_tokens(tokens: Tokens, count: int) -> tuple[Tensor, Tensor]:
    """Return the first ``count`` tokens that are not masked, and which of them exist."""
    order = (~tokens.mask).int().argsort(dim=1, stable=True)[:, :count]
    batch = torch.arange(len(order), device=order.device)[:, None]
    return tokens.vectors[batch, order], tokens.mask[batch, order]


def _mean_vectors(tokens: Tokens) -> Tensor:
    """(batch, dim) weighted mean of the token vectors; 0 for texts without tokens."""
    mass = tokens.mask.to(tokens.vectors.dtype) if tokens.mass is None else tokens.mass
    # Selected, not multiplied: vectors of padding may be NaN.
    vectors = tokens.vectors.where(tokens.mask[..., None], 0.0) * mass[..., None]
    total = mass.sum(1, keepdim=True)
    return vectors.sum(1) / total.where(total > 0, 1.0)


def _mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the values where the mask is True; 0 if it is False everywhere."""
    selected = values.where(mask, 0.0)
    if dim is None:
        return selected.sum() / mask.sum().clamp(min=1)
    return selected.sum(dim) / mask.sum(dim).clamp(min=1)
