"""Exact late-interaction search: every document is scored for every query, in bounded memory.

The score is MaxSim (Khattab and Zaharia, SIGIR 2020, ColBERT): for token vectors q_i of the query
and d_j of the document,

    score = sum_i max_j q_i . d_j

Vectors come from a :class:`sentence_transformers.MultiVectorEncoder`, which decides what counts as
a token (prompts, [MASK] expansion, skip lists) and whether vectors have unit length. This is for
collections that fit an exhaustive search, about 10^5 to 10^6 documents; their vectors may be kept
in files or in a database, see :mod:`optical.index`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optical.collections import Collection
from optical.maxsim import EMPTY_DOCUMENT_SCORE, TokenVectors, rank
from optical.runs import Run

__all__ = [
    "EMPTY_DOCUMENT_SCORE",
    "TokenVectors",
    "encode",
    "passages",
    "search",
    "search_vectors",
]


logger = logging.getLogger("optical")


def encode(
    model: Any,
    texts: Sequence[str],
    role: str,
    *,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> TokenVectors:
    """Encode texts into token vectors with a ``MultiVectorEncoder``.

    Args:
        model: a ``sentence_transformers.MultiVectorEncoder``. Only its ``encode_query`` and
            ``encode_document`` are used. It is left in ``eval`` mode.
        texts: any number of texts; a text may be empty.
        role: ``"query"`` or ``"document"``; decides prompt, length, expansion and skip list.
        batch_size: texts in one forward pass.
        device: where to encode; ``None`` leaves the model where it is.
        progress: show a progress bar.

    Returns:
        Vectors in the order of ``texts``, float32 whatever the model's precision, on the device
        that encoded them, without gradients.

    Raises:
        ValueError: ``role`` is neither of the two.
        TypeError: the model does not return token vectors.
    """
    if role not in ("query", "document"):
        raise ValueError(f"role must be 'query' or 'document', found {role!r}")
    method = getattr(model, f"encode_{role}", None)
    if method is None:
        raise TypeError(
            "model must be a sentence_transformers.MultiVectorEncoder, "
            f"found {type(model).__name__}"
        )
    # `show_progress_bar=None` would show a bar whenever the application logs at INFO.
    encoded = method(list(texts), batch_size=batch_size, device=device, show_progress_bar=progress)
    pieces = [torch.as_tensor(piece) for piece in encoded]
    if any(piece.ndim != 2 for piece in pieces):
        raise TypeError(
            "model returns one vector for each text, but token vectors are needed; load it with "
            "sentence_transformers.MultiVectorEncoder"
        )
    if not pieces:
        return TokenVectors(torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64))
    lengths = torch.tensor([len(piece) for piece in pieces])
    return TokenVectors(torch.cat(pieces).float(), lengths)


def passages(text: str, tokenizer: Any, length: int, stride: int) -> list[str]:
    """Cut a text into overlapping passages of `length` tokens that begin every `stride` tokens.

    The special tokens that the tokenizer adds count, as they do in a model's limits. The last
    passage ends with the text. A text that fits is its own only passage.

    Raises:
        ValueError: the passages would leave gaps, or hold no token.
    """
    room = length - tokenizer.num_special_tokens_to_add()
    if room < 1 or not 1 <= stride <= room:
        raise ValueError(
            f"passage_length is {length} and passage_stride {stride}; expected a length above the "
            f"{length - room} special tokens, and a stride from 1 to the length without them"
        )
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
        "offset_mapping"
    ]
    if len(spans) <= room:
        return [text]
    starts = range(0, len(spans) - room + stride, stride)
    return [text[spans[start][0] : spans[min(start + room, len(spans)) - 1][1]] for start in starts]


def cut_texts(
    texts: Sequence[str], model: Any, length: int | None, stride: int | None = None
) -> list[list[str]]:
    """The passages of each text, or the text itself; the usual stride is half the length."""
    if length is None:
        return [[text] for text in texts]
    stride = stride or max(length // 2, 1)
    return [passages(text, model.tokenizer, length, stride) for text in texts]


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
        collection: what to search, see :func:`optical.collections.load_collection`.
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
        :func:`optical.runs.ranked`. A document without tokens has
        :data:`EMPTY_DOCUMENT_SCORE`; a query without tokens has no documents (logged).

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

    Examples:
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


def _steps(total: int, size: int, progress: bool) -> Iterator[int]:
    steps = range(0, total, size)
    if not progress:
        yield from steps
    elif sys.stderr.isatty():
        from tqdm.auto import tqdm  # comes with sentence-transformers

        yield from tqdm(steps, desc="Searching", unit="batch")
    else:
        told = time.monotonic()
        for start in steps:
            yield start
            if time.monotonic() - told > 20:
                told = time.monotonic()
                logger.info("searched %d of %d texts", min(start + size, total), total)


def _unpack(
    texts: Mapping[str, Tensor] | tuple[Sequence[str], TokenVectors], what: str
) -> tuple[list[str], TokenVectors]:
    if isinstance(texts, Mapping):
        pieces = list(texts.values())
        lengths = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
        vectors = torch.cat(pieces).float() if pieces else torch.zeros(0, 0)
        return list(texts), TokenVectors(vectors, lengths)
    ids, packed = texts
    if len(ids) != len(packed):
        raise ValueError(f"{what}: {len(ids)} ids but vectors of {len(packed)} texts")
    if len(set(ids)) != len(ids):
        raise ValueError(f"{what}: an id appears a second time; ids must be unique")
    return list(ids), packed


def _require_same_dimension(queries: int, documents: int) -> None:
    if queries != documents:
        raise ValueError(
            f"query vectors have {queries} dimensions and document vectors {documents}; both "
            "models must end in the same dimension (add a Dense module to one of them)"
        )


def _require_positive(**arguments: int | None) -> None:
    for name, value in arguments.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}")
