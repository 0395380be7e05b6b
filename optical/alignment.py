"""Word alignments out of a pair of models: the transport plan of one sentence pair, with tokens."""

from __future__ import annotations

from typing import Any

import torch

from optical.functional import sinkhorn


def align(
    student: Any,
    teacher: Any,
    other: str,
    english: str,
    *,
    role: str = "document",
    epsilon: float = 0.05,
    max_iter: int = 200,
) -> dict[str, Any]:
    """Align a sentence with its English translation by optimal transport.

    Args:
        student, teacher: ``MultiVectorEncoder`` models with vectors of one size.
        other: the sentence that the student reads.
        english: its translation, which the teacher reads.
        role: "query" or "document", how both models read.
        epsilon, max_iter: see ``optical.sinkhorn``.

    Returns:
        ``other_tokens`` (n strings), ``english_tokens`` (m strings), ``plan`` (n rows of m masses,
        which sum to 1) and ``value_linear`` (the mean transported cosine distance).
    """
    other_tokens, x = _read(student, other, role)
    english_tokens, y = _read(teacher, english, role)
    result = sinkhorn((1 - x @ y.T)[None], epsilon=epsilon, max_iter=max_iter)
    return {
        "other_tokens": other_tokens,
        "english_tokens": english_tokens,
        "plan": result.plan()[0].tolist(),
        "value_linear": result.value_linear.item(),
    }


def _read(model: Any, text: str, role: str) -> tuple[list[str], torch.Tensor]:
    """Tokens that a model scores, and their unit vectors."""
    encode = model.encode_query if role == "query" else model.encode_document
    output = encode([text], output_value=None, show_progress_bar=False)[0]
    mask = output["attention_mask"].bool()
    tokens = model.tokenizer.convert_ids_to_tokens(output["input_ids"][mask].tolist())
    vectors = output["token_embeddings"][mask].float()
    return tokens, torch.nn.functional.normalize(vectors, dim=-1)
