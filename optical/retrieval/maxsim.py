"""MaxSim in tiles: scores of queries and documents, and the best of each query as they stream by.

Memory is bounded by the size of a tile and by the depth of the ranking, never by the number of
documents.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from optical.data.trec import Run
from optical.models.encoding import TokenVectors

logger = logging.getLogger("optical")

EMPTY_DOCUMENT_SCORE = -1e9
"""Score of a document without tokens, below every real one; as in sentence-transformers."""

# Size of the (query tokens x document tokens) tile. On a CPU the tile should stay near the cache: 8
# MB took half the time of 64 MB. An accelerator wants few large products.
_TILE_ELEMENTS = {"cpu": 2**21}
_TILE_ELEMENTS_ACCELERATOR = 2**27


def rank(
    query_ids: Sequence[str],
    queries: TokenVectors,
    document_ids: Sequence[str],
    batches: Iterator[tuple[list[list[str]], list[list[Tensor]]]],
    *,
    depth: int,
    chunk_elements: int | None,
    device: torch.device,
) -> Run:
    """Score batches of documents against all queries and keep the best of each query.

    Args:
        query_ids, queries: as in :func:`optical.retrieval.exact_search.search_vectors`.
        document_ids: the ids of all documents that will come.
        batches: pairs of lists, for each text the ids that share it and its passages' vectors,
            (tokens, dim), on the device of the queries.
        depth, chunk_elements: as in :func:`optical.retrieval.exact_search.search`.
        device: where the queries are.

    Raises:
        ValueError: a score is not finite.
    """
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
    # Among equal scores the higher id is better, as in optical.data.trec.ranked.
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
