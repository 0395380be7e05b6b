"""Exact late-interaction search: every document is scored for every query, in bounded memory.

The score is MaxSim (Khattab and Zaharia, SIGIR 2020, ColBERT): for token vectors q_i of the query
and d_j of the document,

    score = sum_i max_j q_i . d_j

Vectors come from a :class:`sentence_transformers.MultiVectorEncoder`, which decides what counts as
a token (prompts, [MASK] expansion, skip lists) and whether vectors have unit length. This is for
collections that fit an exhaustive search, about 10^5 to 10^6 documents; their vectors may be kept
in files or in a database, see :mod:`optical.retrieval.index`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optical.data.collection import Collection
from optical.data.trec import Run
from optical.models.encoding import (
    TokenVectors,
    _require_positive,
    _steps,
    _unpack,
    cut_texts,
    encode,
)
from optical.retrieval.maxsim import rank

logger = logging.getLogger("optical")


def search(
    model: Any,
    collection: Collection,
    *,
    depth: int = 1000,
    batch_size: int = 32,
    chunk_elements: int | None = None,
    document_model: Any | None = None,
    query_vectors: TokenVectors | None = None,
    passage_length: int | None = None,
    passage_stride: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Run:
    """Search a collection exhaustively by MaxSim and return the best ``depth`` documents per query.

    Documents are encoded in batches, scored, and forgotten, so a collection is limited by the text
    that fits in memory, not by its vectors. Documents with the same text are encoded once.

    Args:
        model: a ``MultiVectorEncoder``; encodes queries, and documents without ``document_model``.
        collection: what to search, see :func:`optical.data.collection.load_collection`.
        depth: documents kept per query.
        batch_size: texts in one forward pass.
        chunk_elements: largest number of (query token, document token) similarities held at once;
            ``None`` is 2 million on a CPU, 134 million elsewhere. One document is never divided.
        document_model: a second ``MultiVectorEncoder`` for the documents: a student's queries can
            search the index of its teacher. Both must give vectors of the same dimension.
        query_vectors: the queries as :func:`encode` gave them before, in the collection's order,
            which spares encoding them; None encodes them.
        passage_length: cut documents into passages of so many tokens (None: documents are read to
            the model's limit); a document scores as its best passage does (MaxP).
        passage_stride: tokens from the begin of one passage to the next; half the length by
            default.
        device: where to encode and score; ``None`` leaves the models where they are.
        progress: show a bar over documents, or where no terminal is, a line now and then.

    Returns:
        Query id -> document id -> float32 score, best first, in the order of
        :func:`optical.data.trec.ranked`. A document without tokens has
        :data:`EMPTY_DOCUMENT_SCORE`; a query without tokens has no documents (logged).

    Raises:
        ValueError: dimensions of queries and documents differ, ``depth``, ``batch_size`` or
            ``chunk_elements`` is not positive, or the model returns values that are not finite.
        TypeError: a model does not return token vectors.

    Example:
        >>> from sentence_transformers import MultiVectorEncoder                  # doctest: +SKIP
        >>> model = MultiVectorEncoder("runs/sw/final")                           # doctest: +SKIP
        >>> run = search(model, load_collection("wikiclir/sw"), depth=100)        # doctest: +SKIP
    """
    _require_positive(
        depth=depth,
        batch_size=batch_size,
        chunk_elements=chunk_elements,
        passage_length=passage_length,
        passage_stride=passage_stride,
    )
    document_model = model if document_model is None else document_model
    if query_vectors is None:
        texts = list(collection.queries.values())
        query_vectors = encode(model, texts, "query", batch_size=batch_size, device=device)
    queries = query_vectors
    if len(queries) != len(collection.queries):
        raise ValueError(
            f"query_vectors: of {len(queries)} texts, but the collection has "
            f"{len(collection.queries)} queries"
        )

    # Equal texts must have equal scores, which rounding in two batches would prevent.
    owners: dict[str, list[str]] = {}
    for docid, text in collection.documents.items():
        owners.setdefault(text, []).append(docid)
    texts = sorted(owners, key=len, reverse=True)

    def batches() -> Iterator[tuple[list[list[str]], list[list[Tensor]]]]:
        for start in _steps(len(texts), batch_size, progress):
            batch = texts[start : start + batch_size]
            cut = cut_texts(batch, document_model, passage_length, passage_stride)
            pieces = [piece for text in cut for piece in text]
            vectors = encode(
                document_model, pieces, "document", batch_size=batch_size, device=device
            )
            _require_same_dimension(queries.dim, vectors.dim)
            split = iter(vectors.split())
            yield [owners[text] for text in batch], [[next(split) for _ in text] for text in cut]

    return rank(
        list(collection.queries), queries, list(collection.documents), batches(),
        depth=depth, chunk_elements=chunk_elements, device=queries.vectors.device,
    )  # fmt: skip


def search_vectors(
    queries: Mapping[str, Tensor] | tuple[Sequence[str], TokenVectors],
    documents: Mapping[str, Tensor] | tuple[Sequence[str], TokenVectors],
    *,
    depth: int = 1000,
    chunk_elements: int | None = None,
    device: str | torch.device | None = None,
) -> Run:
    """Search like :func:`search`, over vectors that exist: an index that many models share.

    Args:
        queries: query id -> (tokens, dim), or the pair of ids and :func:`encode`'s result.
        documents: the same for documents.
        depth, chunk_elements: as in :func:`search`.
        device: where to score; ``None`` is where the queries are. Documents are moved in tiles.

    Raises:
        ValueError: as in :func:`search`, or ids and vectors differ in number.

    Example:
        >>> import torch
        >>> run = search_vectors({"q": torch.eye(2)}, {"a": torch.eye(2), "b": torch.eye(2)[:1]})
        >>> run["q"]
        {'a': 2.0, 'b': 1.0}
    """
    _require_positive(depth=depth, chunk_elements=chunk_elements)
    query_ids, query_vectors = _unpack(queries, "queries")
    document_ids, document_vectors = _unpack(documents, "documents")
    if len(query_vectors) and len(document_vectors):
        _require_same_dimension(query_vectors.dim, document_vectors.dim)
    target = query_vectors.vectors.device if device is None else torch.device(device)
    pieces = document_vectors.split()
    # Neighbours of similar length make tiles with little padding.
    order = sorted(range(len(pieces)), key=lambda index: len(pieces[index]), reverse=True)

    def batches() -> Iterator[tuple[list[list[str]], list[list[Tensor]]]]:
        for start in range(0, len(order), 256):
            chosen = order[start : start + 256]
            yield [[document_ids[i]] for i in chosen], [[pieces[i].to(target)] for i in chosen]

    moved = TokenVectors(query_vectors.vectors.to(target), query_vectors.lengths)
    return rank(
        query_ids, moved, document_ids, batches(),
        depth=depth, chunk_elements=chunk_elements, device=target,
    )  # fmt: skip


def _require_same_dimension(queries: int, documents: int) -> None:
    if queries != documents:
        raise ValueError(
            f"query vectors have {queries} dimensions and document vectors {documents}; both "
            "models must end in the same dimension (add a Dense module to one of them)"
        )
