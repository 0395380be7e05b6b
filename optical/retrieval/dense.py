"""Exact search with models that turn a text into one vector, such as multilingual E5 or BGE-M3."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from optical.data.collection import Collection
from optical.data.trec import Run
from optical.io.environment import require
from optical.models.encoding import TokenVectors, cut_passages
from optical.models.retriever import (
    check_files,
    check_model,
    loading_errors,
    resolve_model,
    use_prompts,
)
from optical.retrieval.maxsim import EncodedText, rank

# Similarities that are a dot product, after scaling vectors to unit length for "cosine".
SIMILARITIES = ("cosine", "dot")


def load_dense(
    name: str | Path, *, query_prompt: str | None = None, document_prompt: str | None = None
) -> Any:
    """Load a ``SentenceTransformer``.

    Args:
        name: Hugging Face name or folder, or `package:NAME/FOLDER`. A plain encoder gets the mean
            of its token vectors.
        query_prompt, document_prompt: text before each query and document, such as "query: "; None
            keeps the model's own.

    Raises:
        ImportError: Sentence Transformers is not installed (extra ``train``).
        ValueError: there is no such model, it cannot be loaded, it returns token vectors, or its
            similarity is neither cosine nor dot product.
    """
    check_model(str(name))
    folder = resolve_model(str(name))
    require("sentence_transformers", "train", "a dense model")
    from sentence_transformers import SentenceTransformer

    check_files(folder)
    modules = Path(folder) / "modules.json"
    # Of other damage, the library's error tells.
    text = modules.read_text(encoding="utf-8", errors="replace") if modules.is_file() else ""
    if "MultiVectorMask" in text:
        raise ValueError(f"model {name}: returns token vectors; use the recipe `multivector`")
    with loading_errors(folder):
        model = SentenceTransformer(folder, trust_remote_code=False)
    similarity = str(model.similarity_fn_name)
    if similarity not in SIMILARITIES:
        raise ValueError(
            f"model {name}: its similarity is {similarity!r}; expected one of "
            f"{', '.join(SIMILARITIES)}"
        )
    use_prompts(model, query=query_prompt, document=document_prompt)
    return model


def search_dense(
    model: Any,
    collection: Collection,
    *,
    depth: int = 1000,
    batch_size: int = 32,
    passage_length: int | None = None,
    passage_stride: int | None = None,
) -> Run:
    """Search a collection exhaustively by the similarity of the model: cosine or dot product.

    Args:
        model: of :func:`load_dense`. Its prompts apply to queries and documents.
        collection: see :func:`optical.data.collection.load_collection`.
        depth: documents returned per query.
        batch_size: texts per forward pass.
        passage_length, passage_stride: cut documents into passages and score them by the best one,
            as in :func:`optical.retrieval.exact_search.search`.

    Returns:
        Query id -> document id -> float32 score, best first.
    """
    scale = str(model.similarity_fn_name) == "cosine"

    def encode(texts: Sequence[str], role: str) -> torch.Tensor:
        vectors = getattr(model, f"encode_{role}")(
            list(texts),
            batch_size=batch_size,
            convert_to_tensor=True,
            show_progress_bar=False,
            normalize_embeddings=scale,
        )
        found: torch.Tensor = vectors.float()
        return found

    def encoded_documents() -> Any:
        # Equal texts are encoded once, as rounding in another batch could give them other scores.
        ids_by_text: dict[str, list[str]] = {}
        for docid, text in collection.documents.items():
            ids_by_text.setdefault(text, []).append(docid)
        waiting = iter(sorted(ids_by_text, key=len, reverse=True))
        while batch := list(itertools.islice(waiting, batch_size)):
            passages = [[text] for text in batch]
            if passage_length is not None:
                stride = passage_stride or max(passage_length // 2, 1)
                prompt = (model.prompts or {}).get("document") or ""
                passages = [
                    cut_passages(text, model.tokenizer, passage_length, stride, prompt)
                    for text in batch
                ]
            vectors = iter(encode([x for text in passages for x in text], "document"))
            yield [
                EncodedText(ids_by_text[text], [next(vectors)[None] for _ in found])
                for text, found in zip(batch, passages, strict=True)
            ]

    queries = encode(list(collection.queries.values()), "query")
    tokens = TokenVectors(queries, torch.ones(len(queries), dtype=torch.int64))
    return rank(
        list(collection.queries), tokens, list(collection.documents), encoded_documents(),
        depth=depth, chunk_elements=None, device=queries.device,
    )  # fmt: skip
