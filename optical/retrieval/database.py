"""An index of token vectors in LanceDB, which implements MaxSim itself.

The database is a folder, an object store, or a server. Its table records the model that made the
vectors, and several processes may add documents to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from optical.data.trec import Run, ranked
from optical.io.environment import require, version
from optical.io.files import folder_lock
from optical.io.progress import Progress
from optical.models.encoding import TokenVectors, check_worker, chunks, encode_rows
from optical.retrieval.origin import Origin

logger = logging.getLogger("optical")

_TABLE, _INDEX = "documents", "vector_idx"
# Keys of the table's metadata: how documents were cut, and the model that encoded them.
_PASSAGES, _ORIGIN = "passages", "origin"
# Column with a digest of the document's text.
_DIGEST = "digest"
_PRIMARY_KEY = {"lance-schema:unenforced-primary-key": "true"}
# Quantisation learns 256 codes from as many rows.
LEAST_ROWS = 256
# An approximate search reads this many lists of the index.
PROBES = 20
# It scores this many times as many rows as it returns by their vectors, and never fewer than a
# thousand: the best ten of a large index are often not among its first hundred candidates.
REFINE, LEAST_CANDIDATES = 10, 1000


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
    worker: int = 0,
    workers: int = 1,
) -> int:
    """Encode texts into a LanceDB database; documents whose ids it already holds are skipped.

    A document has one row, or one for each of its passages. One that had another text when it was
    added is refused. Several processes may write one
    database; a document that two of them encode is added once. With `workers`, they divide the
    documents, and each is encoded once.

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
        worker, workers: index of this process, from 0, and number of processes that write the same
            documents together. Each encodes every ``workers``-th chunk.

    Returns:
        Number of documents added by this process. Documents without tokens cannot be retrieved and
        are left out.

    Raises:
        ImportError: LanceDB is not installed (extra ``index``).
        ValueError: the vectors are not of unit length; their size, the passage settings, the role
            or the content of the model differ from those of the database; a document had another
            text when it was added; or ``worker`` is not below ``workers``.
    """
    check_worker(worker, workers)
    table = _open_or_create(
        location,
        model.get_embedding_dimension(),
        f"{passage_length} {passage_stride}",
        Origin.of_model(model, role),
    )
    known = _digests(table)
    added = 0
    # The division does not depend on known ids, which change while others write.
    own = itertools.islice(chunks(documents, chunk_texts), worker, None, workers)
    pairs = (pair for ids, texts in own for pair in zip(ids, texts, strict=True))
    for ids, texts in chunks(_new_documents(pairs, known, location), chunk_texts):
        row_ids, tokens = encode_rows(
            model, ids, texts, role, batch_size, passage_length, passage_stride
        )
        _require_unit_length(tokens)
        with _writing(location):
            digests = dict(zip(ids, map(_digest, texts), strict=True))
            added += _add_rows(table, row_ids, tokens, digests)
        logger.info("%s: %d documents added", location, added)
    return added


def _new_documents(
    pairs: Iterable[tuple[str, str]], known: Mapping[str, str | None], location: str | Path
) -> Iterator[tuple[str, str]]:
    """Yield the documents that the database lacks; refuse one whose text has changed since."""
    for key, text in pairs:
        if key not in known:
            yield key, text
        elif known[key] not in (None, _digest(text)):
            raise ValueError(
                f"{location}: document {key!r} had another text when it was added; choose another "
                "location, or give the changed document a new id"
            )


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _digests(table: Any) -> dict[str, str | None]:
    """Return the digest of each document's text; None in databases that record none."""
    if _DIGEST not in table.schema.names:
        return dict.fromkeys(_document_ids(table))
    found = table.search().select(["id", _DIGEST]).to_arrow()
    return dict(zip(found.column("id").to_pylist(), found.column(_DIGEST).to_pylist(), strict=True))


def _open_or_create(location: str | Path, dimension: int, passages: str, origin: Origin) -> Any:
    """Open the table of documents, or create it, and check how its vectors were made."""
    pyarrow: Any = require("pyarrow", "index", "an index in LanceDB")
    vector = pyarrow.list_(pyarrow.list_(pyarrow.float32(), dimension))
    # Of two commits that insert a key, LanceDB then repeats the later one, which finds it present.
    key = pyarrow.field("id", pyarrow.string(), nullable=False, metadata=_PRIMARY_KEY)
    fields = [key, pyarrow.field("vector", vector), pyarrow.field(_DIGEST, pyarrow.string())]
    metadata = {_PASSAGES: passages, _ORIGIN: origin.to_json()}
    database = _connect(location)
    with _writing(location):
        try:
            table = database.open_table(_TABLE)
        except (ValueError, FileNotFoundError):
            schema = pyarrow.schema(fields, metadata=metadata)
            # Another process may create it meanwhile where there are no locks.
            table = database.create_table(_TABLE, schema=schema, exist_ok=True)
    stored_dimension = _dimension(table)
    if stored_dimension != dimension:
        raise ValueError(
            f"{location}: vectors of size {stored_dimension}, the model makes them of size "
            f"{dimension}"
        )
    stored_passages = _metadata(table, _PASSAGES) or "None None"
    if stored_passages != passages:
        raise ValueError(
            f"{location}: its documents have passage_length and passage_stride {stored_passages}, "
            f"now {passages}; expected the same"
        )
    stored = _origin(table)
    if (stored.model, stored.role) != (origin.model, origin.role):
        raise ValueError(
            f"{location}: its documents were encoded by the model {stored.model or 'unknown'} as "
            f"{stored.role}, now {origin.model} as {origin.role}; vectors of two models cannot be "
            "mixed, so choose another location"
        )
    return table


@contextlib.contextmanager
def _writing(location: str | Path) -> Iterator[None]:
    """Wait until no other process of this machine writes to a local database."""
    if "://" in str(location):
        yield
        return
    Path(location).mkdir(parents=True, exist_ok=True)
    if any((Path(location) / name).exists() for name in ("options.json", "index.json")):
        raise ValueError(f"{location}: holds token vectors in files; choose another folder")
    with folder_lock(location, wait=True):
        yield


def _add_rows(
    table: Any, ids: Sequence[str], tokens: TokenVectors, digests: Mapping[str, str]
) -> int:
    """Add the rows that have tokens in one transaction and return their number of documents.

    Documents that another process has added since are left out.
    """
    import pyarrow

    rows = [
        (key, vectors.cpu().numpy())
        for key, vectors in zip(ids, tokens.split(), strict=True)
        if len(vectors)
    ]
    if not rows:
        return 0
    table.checkout_latest()
    listed = ", ".join(_quoted(key) for key in dict.fromkeys(key for key, _ in rows))
    found = table.search().where(f"id IN ({listed})").select(["id"]).to_arrow()
    present = set(found.column("id").to_pylist())
    columns = {"id": [key for key, _ in rows], "vector": [list(vectors) for _, vectors in rows]}
    if _DIGEST in table.schema.names:
        columns[_DIGEST] = [digests[key] for key, _ in rows]
    # The database compares once more when it commits, which an object store without locks needs.
    result = (
        table.merge_insert("id")
        .when_not_matched_insert_all()
        .execute(pyarrow.table(columns, schema=table.schema))
    )
    return min(len({key for key, _ in rows} - present), int(result.num_inserted_rows))


def build_approximate(location: str | Path) -> None:
    """Build LanceDB's approximate index of a database's token vectors, or bring it up to date.

    Product quantisation with inverted lists (IVF-PQ) keeps one byte for four components beside
    the vectors, with which the best documents are scored again. Documents that are added later are
    searched exactly until the index is built again.

    Raises:
        ImportError: LanceDB is not installed (extra ``index``).
        ValueError: there is no such database, or it has fewer than 256 rows.
    """
    require("lancedb", "index", "an index in LanceDB")
    from lancedb.index import IvfPq

    table = LanceIndex(location).table
    if table.count_rows() < LEAST_ROWS:
        raise ValueError(
            f"{location}: {table.count_rows()} rows, but an approximate index needs {LEAST_ROWS}; "
            "exact search of so few is fast"
        )
    built = _approximate_index(table)
    if built is not None and not built.num_unindexed_rows:
        return
    dimension = _dimension(table)
    sub_vectors = dimension // 4 if dimension % 4 == 0 else None
    logger.info("%s: building the approximate index of %d rows", location, table.count_rows())
    with _writing(location):
        table.create_index(
            "vector",
            config=IvfPq(distance_type="cosine", num_sub_vectors=sub_vectors),
            name=_INDEX,
        )


def _approximate_index(table: Any) -> Any:
    """Return the statistics of the table's approximate index, or None if it has none."""
    return table.index_stats(_INDEX)


class LanceIndex:
    """Search in a database of :func:`write_database` by LanceDB's own MaxSim.

    The score of one document is compared with its known value when the database is opened.

    Raises:
        ImportError: LanceDB is not installed (extra ``index``).
        ValueError: there is no such database, or the installed LanceDB computes another score.
    """

    def __init__(self, location: str | Path) -> None:
        self.location = str(location)
        database = _connect(location)
        try:
            self.table = database.open_table(_TABLE)
        except (ValueError, FileNotFoundError):
            raise ValueError(f"{location}: no index of token vectors; write it first") from None
        self.dimension: int = _dimension(self.table)
        self.origin = _origin(self.table)
        self._check_known_score()

    def _check_known_score(self) -> None:
        """Compare LanceDB's score of the first document with that of PyTorch."""
        first = self.table.head(1)
        if not first.num_rows:
            return
        key = first.column("id")[0].as_py()
        row = self.table.search().where(f"id = {_quoted(key)}").select(["vector"]).to_arrow()
        passages = [torch.tensor(vectors) for vectors in row.column("vector").to_pylist()]
        # Mixed components make a query that no token equals, so that no score is trivial.
        query = torch.nn.functional.normalize(passages[0][:8] + passages[0][:8].roll(1, -1), dim=-1)
        expected = max(float((query @ x.T).amax(1).sum()) for x in passages)
        request = self.table.search(query.numpy(), vector_column_name="vector")
        request = request.distance_type("cosine").bypass_vector_index()
        request = request.where(f"id = {_quoted(key)}", prefilter=True).limit(len(passages))
        distances = [found["_distance"] for found in request.select(["_distance"]).to_list()]
        score = len(query) - min(distances, default=float("inf"))
        # Scores differ by rounding only.
        if not abs(score - expected) <= 1e-3 * len(query):
            raise ValueError(
                f"{self.location}: LanceDB {version('lancedb')} gives document {key!r} the score "
                f"{score:.4f}, expected {expected:.4f}; install a newer LanceDB, or write the "
                "index again if its files are damaged"
            )

    def __len__(self) -> int:
        return len(_document_ids(self.table))

    def search(
        self,
        query_ids: Sequence[str],
        queries: TokenVectors,
        *,
        depth: int = 1000,
        approximate: bool = False,
        probes: int = PROBES,
        refine: int | None = None,
    ) -> Run:
        """Return the best ``depth`` documents of each query, like ``search_vectors``.

        The score of a document is that of its best passage. Scores are exact up to rounding.

        Args:
            query_ids, queries: the queries and their token vectors.
            depth: documents per query.
            approximate: search with the index of :func:`build_approximate`, which may miss
                documents, instead of comparing every document.
            probes: lists of the index that are read for each query token.
            refine: candidates scored by their vectors, as a multiple of `depth` (None: 10, or as
                many as make 1000 candidates).

        Raises:
            ValueError: ``approximate`` without such an index.
        """
        _require_unit_length(queries)
        if approximate:
            self.check_approximate()
        if refine is None:
            refine = max(REFINE, -(-LEAST_CANDIDATES // depth))
        settings = (probes, refine) if approximate else None
        run: Run = {}
        progress = Progress(self.location, len(query_ids), "queries searched")
        for key, vectors in zip(query_ids, queries.split(), strict=True):
            # LanceDB's distance is the sum over query tokens of 1 - the best cosine.
            found = self._nearest(vectors.cpu().numpy(), depth, settings) if len(vectors) else {}
            run[key] = dict(
                ranked({docid: len(vectors) - distance for docid, distance in found.items()})
            )
            progress.add()
        return run

    def check_approximate(self) -> None:
        """Raise ValueError unless the database has an approximate index."""
        if _approximate_index(self.table) is None:
            raise ValueError(
                f"{self.location}: has no approximate index; build it with `optical index` and "
                "--approximate"
            )

    def recall(
        self,
        query_ids: Sequence[str],
        queries: TokenVectors,
        run: Run,
        *,
        depth: int = 100,
        sample: int = 20,
    ) -> float:
        """Return the share of the exact search's best documents that a run holds.

        Args:
            query_ids, queries: the queries of the run and their token vectors.
            run: result of an approximate search.
            depth: number of best documents of each query.
            sample: number of queries, evenly spaced, that are searched exactly.
        """
        chosen = range(0, len(query_ids), -(-len(query_ids) // sample))
        pieces = [queries.split()[i] for i in chosen]
        lengths = torch.tensor([len(piece) for piece in pieces])
        keys = [query_ids[i] for i in chosen]
        exact = self.search(keys, TokenVectors(torch.cat(pieces), lengths), depth=depth)
        found = sum(key in run[query] for query in keys for key in exact[query])
        return found / max(sum(map(len, exact.values())), 1)

    def _nearest(
        self, query: Any, depth: int, approximate: tuple[int, int] | None
    ) -> dict[str, float]:
        """Return `depth` documents and their distances, asking for more rows until there are."""
        limit, total = depth, self.table.count_rows()
        while True:
            request = self.table.search(query, vector_column_name="vector").distance_type("cosine")
            if approximate:
                request = request.nprobes(approximate[0]).refine_factor(approximate[1])
            else:
                request = request.bypass_vector_index()
            distances: dict[str, float] = {}
            # Rows are ordered by distance, so a document's first row is its best passage.
            rows = request.limit(limit).select(["id", "_distance"]).to_list()
            for row in rows:
                distances.setdefault(row["id"], row["_distance"])
            # An approximate search may not find as many rows as it is asked for.
            if len(distances) >= depth or limit >= total or len(rows) < limit:
                return dict(itertools.islice(distances.items(), depth))
            limit *= 4


def _connect(location: str | Path) -> Any:
    if str(location).startswith("memory:"):
        raise ValueError(
            f"{location}: a database in memory ends with its connection; expected a folder, or an "
            "address such as s3://bucket/name"
        )
    return require("lancedb", "index", "an index in LanceDB").connect(str(location))


def _dimension(table: Any) -> int:
    return int(table.schema.field("vector").type.value_type.list_size)


def _metadata(table: Any, key: str) -> str:
    value: bytes = (table.schema.metadata or {}).get(key.encode(), b"")
    return value.decode()


def _origin(table: Any) -> Origin:
    return Origin.of(json.loads(_metadata(table, _ORIGIN) or "{}"))


def _quoted(text: str) -> str:
    """Return a string literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def _document_ids(table: Any) -> set[str]:
    return set(table.search().select(["id"]).to_arrow().column("id").to_pylist())


def _require_unit_length(tokens: TokenVectors) -> None:
    norms = torch.linalg.vector_norm(tokens.vectors, dim=-1)
    if len(norms) and (norms - 1).abs().max() > 1e-3:
        raise ValueError(
            "the vectors are not of unit length, and the database compares by cosine; end the "
            "model in a Normalize module, or use a file index"
        )
