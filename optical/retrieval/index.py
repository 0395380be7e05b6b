"""Persistent indexes of token vectors in sharded files, and opening an index of either kind.

File indexes and databases (:mod:`optical.retrieval.database`) are written and searched in parts, so
neither texts nor vectors need to fit in memory, and an interrupted write resumes. A file index is a
token store (:mod:`optical.models.token_store`) and is searched exhaustively, as by
:func:`optical.retrieval.exact_search.search`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from optical.data.trec import Run
from optical.models.encoding import TokenVectors, check_worker, chunks, encode_rows
from optical.models.fingerprint import fingerprints, partners
from optical.models.token_store import StoreWriter, check_shard, read_ids, read_shard, read_store
from optical.retrieval.database import LanceIndex, build_approximate, write_database
from optical.retrieval.maxsim import EncodedText, rank
from optical.retrieval.origin import Origin

logger = logging.getLogger("optical")

__all__ = [
    "FileIndex",
    "LanceIndex",
    "build_approximate",
    "open_index",
    "write_database",
    "write_index",
]


def write_index(
    model: Any,
    documents: Iterable[tuple[str, str]],
    folder: str | Path,
    *,
    role: str = "document",
    precision: str = "float32",
    batch_size: int = 32,
    shard_texts: int = 4096,
    passage_length: int | None = None,
    passage_stride: int | None = None,
    worker: int = 0,
    workers: int = 1,
) -> Path:
    """Encode texts and write their vectors as a token store.

    Whole shards of an interrupted write of the same texts are kept.

    Args:
        model: a ``MultiVectorEncoder``.
        documents: (id, text) pairs, read once; ids are unique and contain no white space.
        folder: folder of the index.
        role: "query" or "document", how the model reads the texts.
        precision: "float32", or "float16" for half the size.
        batch_size: texts per forward pass.
        shard_texts: texts per file.
        passage_length, passage_stride: cut documents into passages, see
            :func:`optical.retrieval.exact_search.search`.
        worker, workers: index of this process, from 0, and number of processes that write the
            index together, on one machine or on several with a shared folder. Each writes every
            ``workers``-th shard; the last one to finish writes ``index.json``.

    Returns:
        The folder.

    Raises:
        ValueError: no text; or the folder holds vectors of other texts, role, precision or
            passages, or of another model, by its content; or ``worker`` is not below ``workers``.
        OSError: the folder cannot be written.
    """
    check_worker(worker, workers)
    options = {
        "role": role,
        "precision": precision,
        "dimension": model.get_embedding_dimension(),
        "model": fingerprints(model)[role],
    }
    if passage_length is not None:
        options["passages"] = [passage_length, passage_stride]
    store = StoreWriter(folder, options, partners(model))
    total = 0
    keys = []
    for number, (ids, texts) in enumerate(chunks(documents, shard_texts)):
        total += len(ids)
        keys.append(store.key([ids, texts]))
        if number % workers != worker:
            continue
        if not store.has_shard(number, keys[-1]):
            row_ids, tokens = encode_rows(
                model, ids, texts, role, batch_size, passage_length, passage_stride
            )
            store.write(number, [ids, texts], row_ids, tokens)
        logger.info("%s: %d documents", store.folder, total)
    if not total:
        raise ValueError("documents: none given; expected at least one")
    # Two workers that finish together write the same index.
    if workers == 1 or all(itertools.starmap(store.has_shard, enumerate(keys))):
        store.finish(total)
    return store.folder


class FileIndex:
    """Exhaustive search in the files of :func:`write_index`, with one shard in memory at a time.

    A file is compared with its checksum before its vectors are read for the first time.

    Args:
        folder: folder of the index.
        verify: compare every file with its checksum now.

    Raises:
        ValueError: the folder holds no finished index of documents, or a file does not match its
            checksum.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        index = read_store(self.folder, verify=verify)
        if "texts" in index:
            raise ValueError(
                f"{self.folder}: holds a teacher's vectors for training (`optical vectors`), no "
                "documents; write an index with `optical index` or `optical export`"
            )
        self.files: dict[str, str] = index["files"]
        self.dimension: int = index["dimension"]
        self.origin = Origin.of(index)
        self._verified: set[str] = set(self.files) if verify else set()
        # The passages of a document are neighbouring rows.
        paths = (self.folder / name for name in self.files)
        self.ids = [key for path in paths for key, _ in itertools.groupby(read_ids(path))]

    def __len__(self) -> int:
        return len(self.ids)

    def shards(self) -> Iterator[tuple[list[str], TokenVectors]]:
        """Yield the document ids and float32 vectors of each file's rows, in order.

        Raises:
            ValueError: a file does not match its checksum.
        """
        for name, digest in self.files.items():
            if name not in self._verified:
                check_shard(self.folder, name, digest)
                self._verified.add(name)
            ids, tokens = read_shard(self.folder / name)
            yield ids, TokenVectors(tokens.vectors.float(), tokens.lengths)

    def search(
        self,
        query_ids: Sequence[str],
        queries: TokenVectors,
        *,
        depth: int = 1000,
        chunk_elements: int | None = None,
    ) -> Run:
        """Search like :func:`optical.retrieval.exact_search.search_vectors`; progress is logged."""
        target = queries.vectors.device
        return rank(
            query_ids, queries, self.ids, self._batches(target),
            depth=depth, chunk_elements=chunk_elements, device=target,
        )  # fmt: skip

    def _batches(self, target: torch.device) -> Iterator[list[EncodedText]]:
        searched = 0
        for ids, tokens in self.shards():
            rows = itertools.groupby(zip(ids, tokens.split(), strict=True), lambda row: row[0])
            texts = [(key, [vectors for _, vectors in text]) for key, text in rows]
            # Neighbours of similar length keep the padding of a tile low.
            texts.sort(key=lambda text: len(text[1][0]), reverse=True)
            for start in range(0, len(texts), 256):
                yield [
                    EncodedText([key], [vectors.to(target) for vectors in passages])
                    for key, passages in texts[start : start + 256]
                ]
            searched += len(texts)
            logger.info("%s: %d of %d documents searched", self.folder, searched, len(self))


def open_index(location: str | Path) -> FileIndex | LanceIndex:
    """Open a file index or a database.

    Raises:
        ImportError: ``location`` is no file index, and LanceDB is not installed (extra ``index``).
        ValueError: there is no index.
    """
    if (Path(location) / "index.json").is_file():
        return FileIndex(location)
    if "://" not in str(location) and not Path(location).is_dir():
        raise ValueError(f"{location}: no such folder; write the index first")
    return LanceIndex(location)
