"""Persistent indexes of token vectors: sharded files or LanceDB.

Both are written and searched in parts, so neither texts nor vectors need to fit in memory, and an
interrupted write resumes. A file index is a token store (:mod:`optical.models.token_store`) and is
searched exhaustively, as by :func:`optical.retrieval.exact_search.search`. LanceDB implements
MaxSim itself and accepts a folder, the address of its server, or an object store.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from optical.data.trec import Run, ranked
from optical.io.environment import require
from optical.models.encoding import TokenVectors, encode_passages
from optical.models.token_store import StoreWriter, read_ids, read_shard, read_store
from optical.retrieval.maxsim import EncodedText, rank

logger = logging.getLogger("optical")

_TABLE = "documents"
# Key of the table's metadata that records how documents were cut.
_PASSAGES = "passages"


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

    Returns:
        The folder.

    Raises:
        ValueError: no text; or the folder holds vectors of other texts, role, precision or
            passages.
        OSError: the folder cannot be written.
    """
    options = {"role": role, "precision": precision, "dimension": model.get_embedding_dimension()}
    if passage_length is not None:
        options["passages"] = [passage_length, passage_stride]
    store = StoreWriter(folder, options)
    total = 0
    for number, (ids, texts) in enumerate(_chunks(documents, shard_texts)):
        if not store.is_written(number, [ids, texts]):
            row_ids, tokens = _encode_rows(
                model, ids, texts, role, batch_size, passage_length, passage_stride
            )
            store.write(number, [ids, texts], row_ids, tokens)
        total += len(ids)
        logger.info("%s: %d documents", store.folder, total)
    if not total:
        raise ValueError("documents: none given; expected at least one")
    return store.finish(total)


class FileIndex:
    """Exhaustive search in the files of :func:`write_index`, with one shard in memory at a time.

    Args:
        folder: folder of the index.
        verify: compare every file with its checksum first, which reads all of them.

    Raises:
        ValueError: the folder holds no finished index, or a file does not match its checksum.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        index = read_store(self.folder, verify=verify)
        self.files: dict[str, str] = index["files"]
        self.dimension: int = index["dimension"]
        # The passages of a document are neighbouring rows.
        paths = (self.folder / name for name in self.files)
        self.ids = [key for path in paths for key, _ in itertools.groupby(read_ids(path))]

    def __len__(self) -> int:
        return len(self.ids)

    def shards(self) -> Iterator[tuple[list[str], TokenVectors]]:
        """Yield the document ids and float32 vectors of each file's rows, in order."""
        for name in self.files:
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


def write_database(
    model: Any,
    documents: Iterable[tuple[str, str]],
    location: str | Path,
    *,
    role: str = "document",
    batch_size: int = 32,
    chunk_texts: int = 1024,
    passage_length: int | None = None,
    passage_stride: int | None = None,
) -> int:
    """Encode texts into a LanceDB database; documents whose ids it already holds are skipped.

    A document has one row, or one for each of its passages.

    Args:
        model: a ``MultiVectorEncoder`` whose vectors have unit length.
        documents: (id, text) pairs, read once.
        location: a folder, or an address that ``lancedb.connect`` understands:
            ``s3://bucket/name`` or ``db://name``.
        role: "query" or "document", how the model reads the texts.
        batch_size: texts per forward pass.
        chunk_texts: texts per transaction.
        passage_length, passage_stride: cut documents into passages, see
            :func:`optical.retrieval.exact_search.search`.

    Returns:
        Number of documents added. Documents without tokens cannot be retrieved and are left out.

    Raises:
        ImportError: LanceDB is not installed (extra ``index``).
        ValueError: the vectors are not of unit length, or their size or the passage settings differ
            from those of the database.
    """
    table = _open_or_create(
        location, model.get_embedding_dimension(), f"{passage_length} {passage_stride}"
    )
    known_ids = _document_ids(table)
    added = 0
    new = ((key, text) for key, text in documents if key not in known_ids)
    for ids, texts in _chunks(new, chunk_texts):
        row_ids, tokens = _encode_rows(
            model, ids, texts, role, batch_size, passage_length, passage_stride
        )
        _require_unit_length(tokens)
        added += _add_rows(table, row_ids, tokens)
        logger.info("%s: %d documents added", location, added)
    return added


def _open_or_create(location: str | Path, dimension: int, passages: str) -> Any:
    """Open the table of documents, or create it, and check its dimension and passage settings."""
    pyarrow: Any = require("pyarrow", "index", "an index in LanceDB")
    vector = pyarrow.list_(pyarrow.list_(pyarrow.float32(), dimension))
    fields = [("id", pyarrow.string()), ("vector", vector)]
    schema = pyarrow.schema(fields, metadata={_PASSAGES: passages})
    database = _connect(location)
    try:
        table = database.open_table(_TABLE)
    except (ValueError, FileNotFoundError):
        table = database.create_table(_TABLE, schema=schema)
    stored_dimension = _dimension(table)
    if stored_dimension != dimension:
        raise ValueError(
            f"{location}: vectors of size {stored_dimension}, the model makes them of size "
            f"{dimension}"
        )
    stored_passages = (table.schema.metadata or {}).get(_PASSAGES.encode(), b"None None").decode()
    if stored_passages != passages:
        raise ValueError(
            f"{location}: its documents have passage_length and passage_stride {stored_passages}, "
            f"now {passages}; expected the same"
        )
    return table


def _add_rows(table: Any, ids: Sequence[str], tokens: TokenVectors) -> int:
    """Add the rows that have tokens in one transaction and return their number of documents."""
    import pyarrow

    rows = [
        (key, vectors.cpu().numpy())
        for key, vectors in zip(ids, tokens.split(), strict=True)
        if len(vectors)
    ]
    columns = {"id": [key for key, _ in rows], "vector": [list(vectors) for _, vectors in rows]}
    table.add(pyarrow.table(columns, schema=table.schema))
    return len({key for key, _ in rows})


class LanceIndex:
    """Search in a database of :func:`write_database` by LanceDB's own MaxSim.

    Raises:
        ImportError: LanceDB is not installed (extra ``index``).
        ValueError: there is no such database.
    """

    def __init__(self, location: str | Path) -> None:
        self.location = str(location)
        database = _connect(location)
        try:
            self.table = database.open_table(_TABLE)
        except (ValueError, FileNotFoundError):
            raise ValueError(f"{location}: no index of token vectors; write it first") from None
        self.dimension: int = _dimension(self.table)

    def __len__(self) -> int:
        return len(_document_ids(self.table))

    def search(self, query_ids: Sequence[str], queries: TokenVectors, *, depth: int = 1000) -> Run:
        """Return the best ``depth`` documents of each query, like ``search_vectors``.

        The score of a document is that of its best passage.

        The search is exhaustive, and so exact up to rounding, unless the table has an approximate
        index (``LanceIndex(location).table.create_index(metric="cosine",
        vector_column_name="vector")``).
        """
        _require_unit_length(queries)
        run: Run = {}
        for key, vectors in zip(query_ids, queries.split(), strict=True):
            # LanceDB's distance is the sum over query tokens of 1 - the best cosine.
            nearest = self._nearest(vectors.cpu().numpy(), depth) if len(vectors) else {}
            run[key] = dict(
                ranked({docid: len(vectors) - distance for docid, distance in nearest.items()})
            )
        return run

    def _nearest(self, query: Any, depth: int) -> dict[str, float]:
        """Return `depth` documents and their distances, asking for more rows until there are."""
        limit, total = depth, self.table.count_rows()
        while True:
            request = self.table.search(query, vector_column_name="vector").distance_type("cosine")
            distances: dict[str, float] = {}
            # Rows are ordered by distance, so a document's first row is its best passage.
            for row in request.limit(limit).select(["id", "_distance"]).to_list():
                distances.setdefault(row["id"], row["_distance"])
            if len(distances) >= depth or limit >= total:
                return dict(itertools.islice(distances.items(), depth))
            limit *= 4


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


def _connect(location: str | Path) -> Any:
    return require("lancedb", "index", "an index in LanceDB").connect(str(location))


def _dimension(table: Any) -> int:
    return int(table.schema.field("vector").type.value_type.list_size)


def _document_ids(table: Any) -> set[str]:
    return set(table.search().select(["id"]).to_arrow().column("id").to_pylist())


def _chunks(
    documents: Iterable[tuple[str, str]], size: int
) -> Iterator[tuple[list[str], list[str]]]:
    """Yield ids and texts of the next `size` documents at a time."""
    source = iter(documents)
    while chunk := list(itertools.islice(source, size)):
        yield [key for key, _ in chunk], [text for _, text in chunk]


def _encode_rows(
    model: Any,
    ids: Sequence[str],
    texts: Sequence[str],
    role: str,
    batch_size: int,
    passage_length: int | None,
    passage_stride: int | None,
) -> tuple[list[str], TokenVectors]:
    """Encode the passages of some documents: the document id and the vectors of each."""
    tokens, counts = encode_passages(
        model,
        texts,
        role,
        passage_length=passage_length,
        passage_stride=passage_stride,
        batch_size=batch_size,
    )
    row_ids = [key for key, count in zip(ids, counts, strict=True) for _ in range(count)]
    return row_ids, tokens


def _require_unit_length(tokens: TokenVectors) -> None:
    norms = torch.linalg.vector_norm(tokens.vectors, dim=-1)
    if len(norms) and (norms - 1).abs().max() > 1e-3:
        raise ValueError(
            "the vectors are not of unit length, and the database compares by cosine; end the "
            "model in a Normalize module, or use a file index"
        )
