"""Tiled MaxSim scoring with a running top-k per query.

Memory is bounded by the tile size and the ranking depth, not by the number of documents.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optical.data.trec import Run
from optical.models.encoding import TokenVectors

logger = logging.getLogger("optical")

EMPTY_DOCUMENT_SCORE = -1e9
"""Score of a document without tokens, below every other score; as in sentence-transformers."""

# Elements of a (query tokens x document tokens) tile. On a CPU the tile should fit the cache: 8 MB
# took half the time of 64 MB. On an accelerator, few large products are faster.
_TILE_ELEMENTS = {"cpu": 2**21}
_TILE_ELEMENTS_ACCELERATOR = 2**27


@dataclass(frozen=True)
class EncodedText:
    """Token vectors of one text of the collection.

    Attributes:
        ids: ids of the documents that share this text.
        passages: vectors of its passages, (tokens, dim) each; a text that is not cut has one.
    """

    ids: Sequence[str]
    passages: Sequence[Tensor]


def rank(
    query_ids: Sequence[str],
    queries: TokenVectors,
    document_ids: Sequence[str],
    batches: Iterator[list[EncodedText]],
    *,
    depth: int,
    chunk_elements: int | None,
    device: torch.device,
) -> Run:
    """Score batches of documents against all queries and keep the best of each query.

    Args:
        query_ids, queries: as in :func:`optical.retrieval.exact_search.search_vectors`.
        document_ids: ids of all documents in ``batches``.
        batches: encoded texts, on the device of the queries.
        depth, chunk_elements: as in :func:`optical.retrieval.exact_search.search`.
        device: device of the queries.

    Raises:
        ValueError: a score is not finite.
    """
    pieces = queries.split()
    # Queries of similar length share a block, which keeps padding low.
    order = sorted((i for i in range(len(pieces)) if len(pieces[i])), key=lambda i: len(pieces[i]))
    empty = len(pieces) - len(order)
    if empty:
        logger.warning("%d of %d queries have no tokens; they retrieve nothing", empty, len(pieces))
    run: Run = {qid: {} for qid in query_ids}
    if not order:
        return run

    if chunk_elements is None:
        chunk_elements = _TILE_ELEMENTS.get(device.type, _TILE_ELEMENTS_ACCELERATOR)
    blocks = _query_blocks([pieces[i] for i in order], chunk_elements)
    # Among equal scores the higher id is better, as in optical.data.trec.ranked.
    sorted_ids = sorted(document_ids)
    document_rank = {docid: position for position, docid in enumerate(sorted_ids)}
    best = _TopDocuments(len(order), depth, device)
    for texts in batches:
        with torch.no_grad():
            passages = [vectors for text in texts for vectors in text.passages]
            scores = _maxsim(blocks, passages, chunk_elements)
            scores = _best_passage(scores, [len(text.passages) for text in texts])
        columns = [column for column, text in enumerate(texts) for _ in text.ids]
        ranks = [document_rank[docid] for text in texts for docid in text.ids]
        best.add(
            scores[:, torch.tensor(columns, device=device)], torch.tensor(ranks, device=device)
        )
    for query, (ranks, values) in zip(order, best.result(), strict=True):
        run[query_ids[query]] = {
            sorted_ids[position]: score for position, score in zip(ranks, values, strict=True)
        }
    return run


def _query_blocks(pieces: list[Tensor], chunk_elements: int) -> list[Tensor]:
    """Pad queries to (block, tokens, dim) with zeros: a zero vector adds exactly 0 to a score."""
    rows = max(1, math.isqrt(chunk_elements) // 2)
    blocks: list[Tensor] = []
    start = 0
    while start < len(pieces):
        # Lengths ascend, so the last query of a block is the longest.
        end = start + 1
        while end < len(pieces) and (end + 1 - start) * len(pieces[end]) <= rows:
            end += 1
        blocks.append(torch.nn.utils.rnn.pad_sequence(pieces[start:end], batch_first=True))
        start = end
    return blocks


def _maxsim(blocks: list[Tensor], documents: list[Tensor], chunk_elements: int) -> Tensor:
    """Return MaxSim scores, (queries, documents), float32.

    Each tile is one plain matrix product. sentence_transformers.util.maxsim gives the same numbers
    (a test compares them) by masking a four-dimensional tensor: for 281 queries by 281 documents of
    dimension 128 it took 2.1 s of one CPU core in its best setting and 5.4 s by default. This
    function took 1.0 s, of which 0.9 s are matrix products.
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
        # Lengths descend, so the first document of a tile is the longest.
        width = len(documents[order[start]])
        members = order[start : start + max(1, chunk_elements // (rows * width))]
        start += len(members)
        # Padding repeats the document's own first vector, which cannot change a maximum.
        padded = [
            torch.cat([vectors, vectors[:1].expand(width - len(vectors), -1)])
            for vectors in (documents[index] for index in members)
        ]
        tile = torch.cat(padded).T
        columns = torch.tensor(members, device=scores.device)
        top = 0
        for block in blocks:
            size, tokens, dim = block.shape
            similarities = block.reshape(size * tokens, dim) @ tile
            best = similarities.view(size, tokens, len(members), width).amax(dim=-1)
            scores[top : top + size, columns] = best.sum(dim=1)
            top += size
    return scores


def _best_passage(scores: Tensor, counts: list[int]) -> Tensor:
    """Reduce (queries, passages) to (queries, texts) by the maximum of each text's passages."""
    if all(count == 1 for count in counts):
        return scores
    text = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    best = scores.new_full((len(scores), len(counts)), float("-inf"))
    index = text.to(scores.device).expand_as(scores)
    return best.scatter_reduce(1, index, scores, "amax", include_self=True)


class _TopDocuments:
    """The best ``depth`` documents of each query, updated batch by batch.

    A score and its document's rank among the sorted ids are packed into one int64 that orders like
    (score, rank): the bits of the float32 score, made monotone, above those of the rank. All packed
    scores of a query differ, so the selection does not depend on batches or device, even for ties.
    """

    def __init__(self, queries: int, depth: int, device: torch.device) -> None:
        self.depth = depth
        self.packed_scores = torch.zeros(queries, 0, dtype=torch.int64, device=device)
        self.pending: list[Tensor] = []

    def add(self, scores: Tensor, document_ranks: Tensor) -> None:
        """Add the scores, (queries, documents), of documents with these ranks."""
        if not bool(torch.isfinite(scores).all()):
            raise ValueError(
                "the scores are not finite: a model returned NaN or infinite vectors; check that "
                "training did not diverge, and the precision of the model"
            )
        bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 turns -0.0 into 0.0
        # The bits of negative floats descend, so all but the sign are inverted.
        ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
        self.pending.append((ordered << 32) | document_ranks)
        if sum(packed.shape[1] for packed in self.pending) >= max(self.depth, 1024):
            self._merge()

    def _merge(self) -> None:
        packed = torch.cat([self.packed_scores, *self.pending], dim=1)
        self.packed_scores = packed.topk(min(self.depth, packed.shape[1]), dim=1).values
        self.pending = []

    def result(self) -> Iterator[tuple[list[int], list[float]]]:
        """Yield document ranks and scores of each query, best first."""
        self._merge()
        packed = self.packed_scores.cpu()
        ordered = packed >> 32
        bits = torch.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF).to(torch.int32)
        scores = bits.view(torch.float32)
        yield from zip((packed & 0xFFFFFFFF).tolist(), scores.tolist(), strict=True)
