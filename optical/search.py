"""Exact late-interaction search: every document is scored for every query, in bounded memory.

The score is MaxSim (Khattab and Zaharia, SIGIR 2020, ColBERT): for token vectors q_i of the query
and d_j of the document,

    score = sum_i max_j q_i . d_j

Vectors come from a :class:`sentence_transformers.MultiVectorEncoder`, which decides what counts as
a token (prompts, [MASK] expansion, skip lists) and whether vectors have unit length. This is for
collections that fit an exhaustive search, about 10^5 to 10^6 documents; beyond that, export the
model and use an index.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optical.collections import Collection
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

EMPTY_DOCUMENT_SCORE = -1e9
"""Score of a document without tokens, below every real one; as in sentence-transformers."""

# Size of the (query tokens x document tokens) tile. On a CPU the tile should stay near the cache: 8
# MB took half the time of 64 MB. An accelerator wants few large products.
_TILE_ELEMENTS = {"cpu": 2**21}
_TILE_ELEMENTS_ACCELERATOR = 2**27


@dataclass(frozen=True)
class TokenVectors:
    """Token vectors of several texts, one after the other.

    Attributes:
        vectors: (total tokens, dim), float32.
        lengths: (texts,), int64 on the CPU: how many rows belong to each text; may be 0.
    """

    vectors: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def dim(self) -> int:
        return self.vectors.shape[-1]

    def split(self) -> list[Tensor]:
        """The vectors of each text, (tokens, dim); views, nothing is copied."""
        return list(torch.split(self.vectors, self.lengths.tolist()))


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
        progress: show a progress bar over documents.

    Returns:
        Query id -> document id -> float32 score, best first, in the order of
        :func:`optical.runs.ranked`. A document without tokens has
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
            cut = [[text] for text in batch]
            if passage_length is not None:
                stride = passage_stride or max(passage_length // 2, 1)
                tokenizer = document_model.tokenizer
                cut = [passages(text, tokenizer, passage_length, stride) for text in batch]
            pieces = [piece for text in cut for piece in text]
            vectors = encode(
                document_model, pieces, "document", batch_size=batch_size, device=device
            )
            _require_same_dimension(queries.dim, vectors.dim)
            split = iter(vectors.split())
            yield [owners[text] for text in batch], [[next(split) for _ in text] for text in cut]

    return _search(
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
    return _search(
        query_ids, moved, document_ids, batches(),
        depth=depth, chunk_elements=chunk_elements, device=target,
    )  # fmt: skip


def _search(
    query_ids: Sequence[str],
    queries: TokenVectors,
    document_ids: Sequence[str],
    batches: Iterator[tuple[list[list[str]], list[list[Tensor]]]],
    *,
    depth: int,
    chunk_elements: int | None,
    device: torch.device,
) -> Run:
    """Score batches of ``(ids that share a text, its passages)``; keep the best of each query."""
    pieces = queries.split()
    # Queries of similar length share a block, so that little of it is padding.
    order = sorted((i for i in range(len(pieces)) if len(pieces[i])), key=lambda i: len(pieces[i]))
    silent = len(pieces) - len(order)
    if silent:
        logger.warning(
            "%d of %d queries have no tokens; they retrieve nothing", silent, len(pieces)
        )
    run: Run = {qid: {} for qid in query_ids}
    if not order:
        return run

    if chunk_elements is None:
        chunk_elements = _TILE_ELEMENTS.get(device.type, _TILE_ELEMENTS_ACCELERATOR)
    blocks = _query_blocks([pieces[i] for i in order], chunk_elements)
    # Among equal scores the higher id is better, as in optical.runs.ranked.
    names = sorted(document_ids)
    number = {docid: index for index, docid in enumerate(names)}
    best = _Best(len(order), depth, device)
    for ids, texts in batches:
        with torch.no_grad():
            scores = _maxsim(blocks, [one for text in texts for one in text], chunk_elements)
            scores = _best_passage(scores, [len(text) for text in texts])
        owners = [column for column, shared in enumerate(ids) for _ in shared]
        numbers = [number[docid] for shared in ids for docid in shared]
        best.add(
            scores[:, torch.tensor(owners, device=device)], torch.tensor(numbers, device=device)
        )
    for row, (found, values) in zip(order, best.result(), strict=True):
        run[query_ids[row]] = {
            names[index]: score for index, score in zip(found, values, strict=True)
        }
    return run


def _query_blocks(pieces: list[Tensor], chunk_elements: int) -> list[Tensor]:
    """Pad queries to (block, tokens, dim) with zeros: a zero vector adds exactly 0 to a score."""
    rows = max(1, math.isqrt(chunk_elements) // 2)
    blocks: list[Tensor] = []
    start = 0
    while start < len(pieces):
        # Ascending length: the last of a block is the longest.
        end = start + 1
        while end < len(pieces) and (end + 1 - start) * len(pieces[end]) <= rows:
            end += 1
        blocks.append(torch.nn.utils.rnn.pad_sequence(pieces[start:end], batch_first=True))
        start = end
    return blocks


def _maxsim(blocks: list[Tensor], documents: list[Tensor], chunk_elements: int) -> Tensor:
    """Scores, (queries, documents), float32.

    One plain matrix product per tile. sentence_transformers.util.maxsim gives the same numbers (a
    test compares them) through masks over a four-dimensional tensor: for 281 queries by 281
    documents of dimension 128 it took 2.1 s of one CPU core in its best setting and 5.4 s by
    default, this function 1.0 s, of which 0.9 s are the products.
    """
    queries = sum(len(block) for block in blocks)
    rows = max(block.shape[0] * block.shape[1] for block in blocks)
    scores = torch.full((queries, len(documents)), EMPTY_DOCUMENT_SCORE, device=blocks[0].device)
    order = sorted(
        (i for i in range(len(documents)) if len(documents[i])),
        key=lambda i: len(documents[i]),
        reverse=True,
    )
    start = 0
    while start < len(order):
        width = len(
            documents[order[start]]
        )  # descending length: the first of a tile is the longest
        chosen = order[start : start + max(1, chunk_elements // (rows * width))]
        start += len(chosen)
        # Padding repeats the document's own first vector, which cannot change a maximum.
        padded = [
            torch.cat([vectors, vectors[:1].expand(width - len(vectors), -1)])
            for vectors in (documents[index] for index in chosen)
        ]
        tile = torch.cat(padded).T
        columns = torch.tensor(chosen, device=scores.device)
        top = 0
        for block in blocks:
            size, tokens, dim = block.shape
            similarities = block.reshape(size * tokens, dim) @ tile
            best = similarities.view(size, tokens, len(chosen), width).amax(dim=-1)
            scores[top : top + size, columns] = best.sum(dim=1)
            top += size
    return scores


def _best_passage(scores: Tensor, counts: list[int]) -> Tensor:
    """(queries, passages) -> (queries, texts): the best of each text's neighbouring passages."""
    if all(count == 1 for count in counts):
        return scores
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    best = scores.new_full((len(scores), len(counts)), float("-inf"))
    index = owner.to(scores.device).expand_as(scores)
    return best.scatter_reduce(1, index, scores, "amax", include_self=True)


class _Best:
    """The best ``depth`` documents of each query, kept while scores stream by.

    A score and its document's number are packed in one 64-bit integer whose order is "better": the
    float32 bits, made monotone, above the number. All keys of a query differ, so the selection is
    the same whatever the batches were, on every device, ties included.
    """

    def __init__(self, queries: int, depth: int, device: torch.device) -> None:
        self.depth = depth
        self.keys = torch.zeros(queries, 0, dtype=torch.int64, device=device)
        self.waiting: list[Tensor] = []

    def add(self, scores: Tensor, numbers: Tensor) -> None:
        if not bool(torch.isfinite(scores).all()):
            raise ValueError(
                "the scores are not finite: a model returned NaN or infinite vectors; check that "
                "training did not diverge, and the precision of the model"
            )
        bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 turns -0.0 into 0.0
        # Negative floats count downwards in their bits: flip all but the sign.
        ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
        self.waiting.append((ordered << 32) | numbers)
        if sum(keys.shape[1] for keys in self.waiting) >= max(self.depth, 1024):
            self._merge()

    def _merge(self) -> None:
        keys = torch.cat([self.keys, *self.waiting], dim=1)
        self.keys = keys.topk(min(self.depth, keys.shape[1]), dim=1).values
        self.waiting = []

    def result(self) -> Iterator[tuple[list[int], list[float]]]:
        """Document numbers and scores of each query, best first."""
        self._merge()
        keys = self.keys.cpu()
        ordered = keys >> 32
        bits = torch.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF).to(torch.int32)
        yield from zip((keys & 0xFFFFFFFF).tolist(), bits.view(torch.float32).tolist(), strict=True)


def _steps(total: int, size: int, progress: bool) -> Iterator[int]:
    if not progress:
        return iter(range(0, total, size))
    from tqdm.auto import tqdm  # comes with sentence-transformers

    return iter(tqdm(range(0, total, size), desc="Searching", unit="batch"))


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
