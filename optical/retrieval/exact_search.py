"""Exact late-interaction search: MaxSim of every query with every document, in bounded memory.

The score is MaxSim (Khattab and Zaharia, SIGIR 2020, ColBERT): for token vectors q_i of the query
and d_j of the document,

    score = sum_i max_j q_i . d_j

Vectors come from a :class:`sentence_transformers.MultiVectorEncoder`, which decides which tokens
are scored (prompts, [MASK] expansion, skip lists) and whether vectors have unit length. Exhaustive
search suits collections of about 10^5 to 10^6 documents. :mod:`optical.retrieval.index` keeps their
vectors in files or in a database.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optical.data.collection import Collection
from optical.data.trec import Run
from optical.models.encoding import TokenVectors, encode, encode_passages
from optical.retrieval.maxsim import EncodedText, rank

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

    Documents are encoded and scored in batches whose vectors are then discarded, so only the texts
    of a collection must fit in memory. Documents with the same text are encoded once.

    Args:
        model: a ``MultiVectorEncoder``; encodes queries, and documents without ``document_model``.
        collection: see :func:`optical.data.collection.load_collection`.
        depth: documents returned per query.
        batch_size: texts per forward pass.
        chunk_elements: maximum number of (query token, document token) similarities in memory;
            ``None`` is 2 million on a CPU and 134 million elsewhere. A document is never divided.
        document_model: a second ``MultiVectorEncoder`` for the documents, so that a student's
            queries can search its teacher's index. Both need vectors of the same dimension.
        query_vectors: the encoded queries, in the collection's order; None encodes them.
        passage_length: cut documents into passages of this many tokens; the score of a document is
            that of its best passage (MaxP). None truncates documents at the model's limit.
        passage_stride: tokens between the starts of neighbouring passages; the default is half of
            ``passage_length``.
        device: device to encode and score on; ``None`` leaves the models where they are.
        progress: show a progress bar over documents, or log progress if there is no terminal.

    Returns:
        Query id -> document id -> float32 score, best first, in the order of
        :func:`optical.data.trec.ranked`. A document without tokens scores
        :data:`optical.retrieval.maxsim.EMPTY_DOCUMENT_SCORE`. A query without tokens retrieves no
        document, and a warning is logged.

    Raises:
        ValueError: dimensions of queries and documents differ, ``depth``, ``batch_size`` or
            ``chunk_elements`` is not positive, or the model returns values that are not finite.
        TypeError: a model does not return token vectors.

    Examples:
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
    # Duplicates are encoded once: rounding in different batches could give them unequal scores.
    ids_by_text: dict[str, list[str]] = {}
    for docid, text in collection.documents.items():
        ids_by_text.setdefault(text, []).append(docid)
    texts = sorted(ids_by_text, key=len, reverse=True)

    def batches() -> Iterator[list[EncodedText]]:
        for start in _batch_starts(len(texts), batch_size, progress):
            batch = texts[start : start + batch_size]
            tokens, counts = encode_passages(
                document_model,
                batch,
                passage_length=passage_length,
                passage_stride=passage_stride,
                batch_size=batch_size,
                device=device,
            )
            _require_same_dimension(queries.dim, tokens.dim)
            vectors = iter(tokens.split())
            yield [
                EncodedText(ids_by_text[text], [next(vectors) for _ in range(count)])
                for text, count in zip(batch, counts, strict=True)
            ]

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
    """Search like :func:`search`, over vectors that are already encoded.

    Args:
        queries: query id -> (tokens, dim), or the pair of ids and the result of
            :func:`optical.models.encoding.encode`.
        documents: the same for documents.
        depth, chunk_elements: as in :func:`search`.
        device: device to score on; ``None`` is that of the queries. Documents are moved in tiles.

    Raises:
        ValueError: as in :func:`search`, or ids and vectors differ in number.

    Examples:
        >>> import torch
        >>> run = search_vectors({"q": torch.eye(2)}, {"a": torch.eye(2), "b": torch.eye(2)[:1]})
        >>> run["q"]
        {'a': 2.0, 'b': 1.0}
    """
    _require_positive(depth=depth, chunk_elements=chunk_elements)
    query_ids, query_vectors = _ids_and_vectors(queries, "queries")
    document_ids, document_vectors = _ids_and_vectors(documents, "documents")
    if len(query_vectors) and len(document_vectors):
        _require_same_dimension(query_vectors.dim, document_vectors.dim)
    target = query_vectors.vectors.device if device is None else torch.device(device)
    pieces = document_vectors.split()
    # Neighbours of similar length keep the padding of a tile low.
    order = sorted(range(len(pieces)), key=lambda index: len(pieces[index]), reverse=True)

    def batches() -> Iterator[list[EncodedText]]:
        for start in range(0, len(order), 256):
            batch = order[start : start + 256]
            yield [EncodedText([document_ids[i]], [pieces[i].to(target)]) for i in batch]

    moved = TokenVectors(query_vectors.vectors.to(target), query_vectors.lengths)
    return rank(
        query_ids, moved, document_ids, batches(),
        depth=depth, chunk_elements=chunk_elements, device=target,
    )  # fmt: skip


def _ids_and_vectors(
    texts: Mapping[str, Tensor] | tuple[Sequence[str], TokenVectors], name: str
) -> tuple[list[str], TokenVectors]:
    if isinstance(texts, Mapping):
        pieces = list(texts.values())
        lengths = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
        vectors = torch.cat(pieces).float() if pieces else torch.zeros(0, 0)
        return list(texts), TokenVectors(vectors, lengths)
    ids, tokens = texts
    if len(ids) != len(tokens):
        raise ValueError(f"{name}: {len(ids)} ids but vectors of {len(tokens)} texts")
    if len(set(ids)) != len(ids):
        raise ValueError(f"{name}: an id appears a second time; ids must be unique")
    return list(ids), tokens


def _batch_starts(total: int, size: int, progress: bool) -> Iterator[int]:
    """Yield the start of each batch, with a progress bar or a log record every 20 seconds."""
    starts = range(0, total, size)
    if not progress:
        yield from starts
    elif sys.stderr.isatty():
        from tqdm.auto import tqdm  # installed with sentence-transformers

        yield from tqdm(starts, desc="Searching", unit="batch")
    else:
        logged = time.monotonic()
        for start in starts:
            yield start
            if time.monotonic() - logged > 20:
                logged = time.monotonic()
                logger.info("searched %d of %d texts", min(start + size, total), total)


def _require_positive(**arguments: int | None) -> None:
    for name, value in arguments.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}")


def _require_same_dimension(queries: int, documents: int) -> None:
    if queries != documents:
        raise ValueError(
            f"query vectors have {queries} dimensions and document vectors {documents}; both "
            "models must end in the same dimension (add a Dense module to one of them)"
        )
