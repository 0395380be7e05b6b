"""Token vectors of a collection that outlive the process: in files, or in a vector database.

Both are written in pieces and searched in pieces, so that neither texts nor vectors need to fit in
memory; an interrupted writing goes on where it stopped. Files hold every vector as it is and are
searched exhaustively, as :func:`optical.retrieval.exact_search.search` does. The database is LanceDB, which knows
MaxSim by itself: a folder, or an address of its server or of an object store, by the same code.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optical.data.trec import Run, ranked
from optical.io.files import atomic_file, checksum, read_json, writable_folder, write_json
from optical.models.encoding import TokenVectors, cut_texts, encode
from optical.retrieval.maxsim import rank

logger = logging.getLogger("optical")

TABLE, PASSAGES = "documents", "passages"
PRECISIONS = {"float32": torch.float32, "float16": torch.float16}


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
    """Encode texts and keep their vectors in files, a few thousand texts at a time.

    Each ``00000.safetensors`` has the tensors ``vectors`` (tokens, dim) and ``lengths`` (rows,),
    and in its metadata the ``ids`` of the rows, one a line: a text has one row, or one for each of
    its passages, next to each other. ``index.json`` lists the files with their SHA-256 and is
    written last. Files of an interrupted writing of the same texts are kept.

    Args:
        model: a ``MultiVectorEncoder``.
        documents: (id, text) pairs, read once; ids are unique and have no white space.
        folder: where to write.
        role: "query" or "document", how the model reads the texts.
        precision: "float32", or "float16" for half the size.
        batch_size, shard_texts: texts in one forward pass, and in one file.
        passage_length, passage_stride: cut documents, as in :func:`optical.retrieval.exact_search.search`.

    Raises:
        ValueError: no text; or the folder holds vectors of other texts, role, precision or
            passages.
        OSError: the folder cannot be written.
    """
    from safetensors.torch import save

    if precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r}, expected 'float32' or 'float16'")
    folder = writable_folder(folder)
    made = {"role": role, "precision": precision, "dimension": model.get_embedding_dimension()}
    if passage_length is not None:
        made["passages"] = [passage_length, passage_stride]
    files: dict[str, str] = {}
    total = 0
    for number, (ids, texts) in enumerate(_chunks(documents, shard_texts)):
        path = folder / f"{number:05d}.safetensors"
        key = hashlib.sha256(json.dumps([made, ids, texts]).encode()).hexdigest()
        if path.exists():
            if _metadata(path).get("key") != key:
                raise ValueError(
                    f"{path}: vectors of other texts or options; choose another folder"
                )
        else:
            pieces = cut_texts(texts, model, passage_length, passage_stride)
            owners, found = _encode_rows(model, ids, pieces, role, batch_size)
            tensors = {"vectors": found.vectors.cpu().to(PRECISIONS[precision])}
            tensors["lengths"] = found.lengths
            with atomic_file(path) as file:
                file.write(save(tensors, metadata={"key": key, "ids": "\n".join(owners)}))
        files[path.name] = checksum(path)
        total += len(ids)
        logger.info("%s: %d documents", folder, total)
    if not files:
        raise ValueError("documents: none given; expected at least one")
    index = {**made, "documents": total, "files": files}
    write_json(folder / "index.json", index)
    return folder


class FileIndex:
    """What :func:`write_index` wrote: searched file by file, one in memory at a time.

    Args:
        folder: of the index.
        verify: compare every file with its checksum first, which reads them whole.

    Raises:
        ValueError: the folder holds no finished index, or a file does not fit its checksum.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        try:
            made = read_json(self.folder / "index.json")
            self.files: dict[str, str] = made["files"]
        except (OSError, ValueError, KeyError):
            raise ValueError(
                f"{folder}: no finished index of token vectors; write it first"
            ) from None
        self.dimension: int = made["dimension"]
        for name, digest in self.files.items():
            if verify and checksum(self.folder / name) != digest:
                raise ValueError(
                    f"{self.folder / name}: does not fit its checksum; remove it and write the "
                    "index again"
                )
        # The rows of a document's passages are neighbours.
        names = (self.folder / name for name in self.files)
        self.ids = [key for name in names for key, _ in itertools.groupby(_ids(name))]

    def __len__(self) -> int:
        return len(self.ids)

    def shards(self) -> Iterator[tuple[list[str], TokenVectors]]:
        """The rows of each file, in order: their documents' ids, and vectors."""
        from safetensors.torch import load_file

        for name in self.files:
            tensors = load_file(self.folder / name)
            found = TokenVectors(tensors["vectors"].float(), tensors["lengths"])
            yield _ids(self.folder / name), found

    def search(
        self,
        query_ids: Sequence[str],
        queries: TokenVectors,
        *,
        depth: int = 1000,
        chunk_elements: int | None = None,
    ) -> Run:
        """Search like :func:`optical.retrieval.exact_search.search_vectors`, with a line of progress in the log."""
        target = queries.vectors.device

        def batches() -> Iterator[tuple[list[list[str]], list[list[Tensor]]]]:
            seen = 0
            for ids, found in self.shards():
                rows = itertools.groupby(zip(ids, found.split(), strict=True), lambda row: row[0])
                texts = [(key, [piece for _, piece in text]) for key, text in rows]
                # Neighbours of similar length make tiles with little padding.
                texts.sort(key=lambda text: len(text[1][0]), reverse=True)
                for start in range(0, len(texts), 256):
                    chosen = texts[start : start + 256]
                    pieces = [[piece.to(target) for piece in text] for _, text in chosen]
                    yield [[key] for key, _ in chosen], pieces
                seen += len(texts)
                logger.info("%s: %d of %d documents searched", self.folder, seen, len(self))

        return rank(
            query_ids, queries, self.ids, batches(),
            depth=depth, chunk_elements=chunk_elements, device=target,
        )  # fmt: skip


def write_database(
    model: Any,
    documents: Iterable[tuple[str, str]],
    place: str | Path,
    *,
    role: str = "document",
    batch_size: int = 32,
    chunk_texts: int = 1024,
    passage_length: int | None = None,
    passage_stride: int | None = None,
) -> int:
    """Encode texts into a database of LanceDB; documents whose ids it has already stay as they are.

    A document has one row, or one for each of its passages.

    Args:
        model: a ``MultiVectorEncoder`` whose vectors have unit length.
        documents: (id, text) pairs, read once.
        place: a folder, or an address that ``lancedb.connect`` understands: ``s3://bucket/name`` or
            ``db://name``.
        role: "query" or "document", how the model reads the texts.
        batch_size, chunk_texts: texts in one forward pass, and in one transaction.
        passage_length, passage_stride: cut documents, as in :func:`optical.retrieval.exact_search.search`.

    Returns:
        How many documents were added. Documents without tokens cannot be found and are left out.

    Raises:
        ImportError: LanceDB is missing: ``pip install "optical[index]"``.
        ValueError: vectors are not of unit length, or of another size than those in the database,
            or its documents are cut in another way.
    """
    import pyarrow

    size = model.get_embedding_dimension()
    vector = pyarrow.list_(pyarrow.list_(pyarrow.float32(), size))
    cut = f"{passage_length} {passage_stride}"
    fields = [("id", pyarrow.string()), ("vector", vector)]
    schema = pyarrow.schema(fields, metadata={PASSAGES: cut})
    database = _connect(place)
    try:
        table = database.open_table(TABLE)
    except (ValueError, FileNotFoundError):
        table = database.create_table(TABLE, schema=schema)
    held = table.schema.field("vector").type.value_type.list_size
    if held != size:
        raise ValueError(f"{place}: vectors of size {held}, the model makes them of size {size}")
    before = (table.schema.metadata or {}).get(PASSAGES.encode(), b"None None").decode()
    if before != cut:
        raise ValueError(
            f"{place}: its documents have passage_length and passage_stride {before}, now {cut}; "
            "expected the same"
        )
    known = _documents(table)
    added = 0
    new = ((key, text) for key, text in documents if key not in known)
    for ids, texts in _chunks(new, chunk_texts):
        pieces = cut_texts(texts, model, passage_length, passage_stride)
        owners, found = _encode_rows(model, ids, pieces, role, batch_size)
        _require_unit(found)
        kept = [
            (key, piece.cpu().numpy())
            for key, piece in zip(owners, found.split(), strict=True)
            if len(piece)
        ]
        rows = {"id": [key for key, _ in kept], "vector": [list(piece) for _, piece in kept]}
        table.add(pyarrow.table(rows, schema=table.schema))
        added += len({key for key, _ in kept})
        logger.info("%s: %d documents added", place, added)
    return added


class LanceIndex:
    """A database that :func:`write_database` wrote; it searches by itself.

    Raises:
        ImportError: LanceDB is missing.
        ValueError: there is no such database.
    """

    def __init__(self, place: str | Path) -> None:
        self.place = str(place)
        database = _connect(place)
        try:
            self.table = database.open_table(TABLE)
        except (ValueError, FileNotFoundError):
            raise ValueError(f"{place}: no index of token vectors; write it first") from None
        self.dimension: int = self.table.schema.field("vector").type.value_type.list_size

    def __len__(self) -> int:
        return len(_documents(self.table))

    def search(self, query_ids: Sequence[str], queries: TokenVectors, *, depth: int = 1000) -> Run:
        """Return the best ``depth`` documents of each query, like ``search_vectors``.

        A document scores as its best passage does.

        Exhaustive, and so exact up to rounding, unless an approximate index was made on the table
        (``LanceIndex(place).table.create_index(metric="cosine", vector_column_name="vector")``).
        """
        _require_unit(queries)
        run: Run = {}
        for key, piece in zip(query_ids, queries.split(), strict=True):
            # The distance of a query is the sum over its tokens of 1 - the best cosine.
            nearest = self._nearest(piece.cpu().numpy(), depth) if len(piece) else {}
            run[key] = dict(ranked({name: len(piece) - far for name, far in nearest.items()}))
        return run

    def _nearest(self, query: Any, depth: int) -> dict[str, float]:
        """The nearest documents and their distances: the nearest rows until there are enough."""
        limit, total = depth, self.table.count_rows()
        while True:
            asked = self.table.search(query, vector_column_name="vector").distance_type("cosine")
            found: dict[str, float] = {}
            # Rows come by their distance: the first of a document is its best passage.
            for row in asked.limit(limit).select(["id", "_distance"]).to_list():
                found.setdefault(row["id"], row["_distance"])
            if len(found) >= depth or limit >= total:
                return dict(itertools.islice(found.items(), depth))
            limit *= 4


def open_index(place: str | Path) -> FileIndex | LanceIndex:
    """Open the files or the database at a place."""
    if (Path(place) / "index.json").is_file():
        return FileIndex(place)
    if "://" not in str(place) and not Path(place).is_dir():
        raise ValueError(f"{place}: no such folder; write the index first")
    return LanceIndex(place)


def _documents(table: Any) -> set[str]:
    return set(table.search().select(["id"]).to_arrow().column("id").to_pylist())


def _connect(place: str | Path) -> Any:
    try:
        import lancedb
    except ImportError:
        raise ImportError(
            'an index in a database needs LanceDB: pip install "optical[index]"'
        ) from None
    return lancedb.connect(str(place))


def _chunks(
    documents: Iterable[tuple[str, str]], size: int
) -> Iterator[tuple[list[str], list[str]]]:
    source = iter(documents)
    while part := list(itertools.islice(source, size)):
        yield [key for key, _ in part], [text for _, text in part]


def _encode_rows(
    model: Any, ids: Sequence[str], pieces: Sequence[Sequence[str]], role: str, batch_size: int
) -> tuple[list[str], TokenVectors]:
    """The rows of some documents, one for each piece of their texts: whose it is, and vectors."""
    owners = [key for key, text in zip(ids, pieces, strict=True) for _ in text]
    flat = [one for text in pieces for one in text]
    return owners, encode(model, flat, role, batch_size=batch_size)


def _require_unit(found: TokenVectors) -> None:
    length = torch.linalg.vector_norm(found.vectors, dim=-1)
    if len(length) and (length - 1).abs().max() > 1e-3:
        raise ValueError(
            "the vectors are not of unit length, and the database compares by cosine; end the "
            "model in a Normalize module, or keep the index in files"
        )


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    reader: Any = safe_open
    try:
        with reader(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}); remove it and write it again"
        ) from None


def _ids(path: Path) -> list[str]:
    return _metadata(path)["ids"].split("\n")
