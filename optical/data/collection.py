"""Load and validate test collections: queries, documents and relevance judgements.

:func:`load_collection` accepts an ``ir_datasets`` id (``wikiclir/sw``), a folder in BEIR layout, or
three files in TSV, JSON lines or TREC markup, plain or gzip. Only ``ir_datasets`` ids need more
than the standard library: ``pip install "optical-ot[eval]"``.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optical.data.texts import read_texts
from optical.data.trec import Qrels, iter_qrels, read_qrels
from optical.io.environment import require

logger = logging.getLogger("optical")

_ACCEPTED = (
    "accepted are an ir_datasets id (wikiclir/sw, or "
    "clirmatrix/<documents>/bi139-base/<queries>/<split>, the document language first), "
    "a folder with corpus.jsonl, queries.jsonl and qrels/test.tsv, "
    "or the three files queries=, documents= and qrels="
)


@dataclass(frozen=True)
class Collection:
    """Queries, documents and judgements of a test collection.

    Every query has at least one relevant document. Instances come from :func:`load_collection` or
    are built directly.

    Attributes:
        name: name in reports.
        queries: query id -> text.
        documents: document id -> text; a text may be empty.
        qrels: query id -> document id -> grade; 1 and above is relevant.
        queries_without_relevant: ids of queries dropped because no document is relevant to them.
    """

    name: str
    queries: dict[str, str]
    documents: dict[str, str]
    qrels: Qrels
    queries_without_relevant: tuple[str, ...] = ()


def load_collection(
    source: str | os.PathLike[str] | None = None,
    *,
    queries: str | os.PathLike[str] | None = None,
    documents: str | os.PathLike[str] | None = None,
    qrels: str | os.PathLike[str] | None = None,
    name: str | None = None,
    split: str = "test",
    topic_fields: Sequence[str] = ("title",),
) -> Collection:
    """Load a collection and check that its queries, documents and judgements are consistent.

    Queries without a relevant document are dropped, listed in ``queries_without_relevant`` and
    logged, because every system scores 0 on them. Empty texts are kept and logged. Judgements from
    a file may name only queries and documents of the collection. Judgements of an ``ir_datasets``
    id are kept as published; documents they name that do not exist are logged as a warning and
    count as not retrieved.

    Args:
        source: an ``ir_datasets`` id, or a folder in BEIR layout (``corpus.jsonl``,
            ``queries.jsonl``, ``qrels/<split>.tsv``, each optionally with ``.gz``), or ``None``. A
            folder takes precedence over an id of the same name. Texts of an id are its
            ``default_text()``.
        queries, documents: text files, see :func:`optical.data.texts.read_texts`. With ``source``
            they replace that part of it, for example with translated queries.
        qrels: judgements, see :func:`optical.data.trec.read_qrels`.
        name: name in reports; the default is the id, the name of the folder or that of the
            documents' file.
        split: judgements of a BEIR folder to read.
        topic_fields: fields of a TREC topic (``title``, ``desc``, ``narr``) that form the query.

    Raises:
        ValueError: an unknown source, a missing part, a duplicate id, judgements that name an
            unknown id, a malformed line or an empty file; the message names file, line and remedy.
        ImportError: ``source`` is an id and ``ir_datasets`` is not installed (extra ``eval``).
        OSError: a file is missing, or ``ir_datasets`` could not download.

    Examples:
        >>> collection = load_collection("wikiclir/sw")                           # doctest: +SKIP
        >>> collection = load_collection(queries="queries.tsv", documents="docs.jsonl.gz",
        ...                              qrels="qrels.tsv")                       # doctest: +SKIP
    """
    parts = _Parts()
    if source is None:
        paths = {"queries": queries, "documents": documents, "qrels": qrels}
        missing = [f"{part}=" for part, path in paths.items() if path is None]
        if missing:
            raise ValueError(f"no source and no {', '.join(missing)} given; {_ACCEPTED}")
    elif Path(source).is_dir():
        folder = Path(source)
        name = name or folder.resolve().name
        queries = queries or _beir_file(folder, "queries.jsonl")
        documents = documents or _beir_file(folder, "corpus.jsonl")
        qrels = qrels or _beir_file(folder, f"qrels/{split}.tsv")
    else:
        name = name or str(source)
        parts = _load_dataset(
            str(source), queries=queries is None, documents=documents is None, qrels=qrels is None
        )

    if queries is not None:
        parts.queries = read_texts(queries, topic_fields=topic_fields)
    if documents is not None:
        name = name or Path(Path(documents).name.removesuffix(".gz")).stem
        parts.documents = read_texts(documents)
    if qrels is not None:
        parts.qrels = read_qrels(qrels)
        _require_known(parts.qrels, parts.queries, parts.documents, Path(qrels))
    assert name is not None
    return _checked(name, parts.queries, parts.documents, parts.qrels)


@dataclass
class _Parts:
    """Parts of a collection, before they are checked against one another."""

    queries: dict[str, str] = field(default_factory=dict)
    documents: dict[str, str] = field(default_factory=dict)
    qrels: Qrels = field(default_factory=dict)


def _checked(
    name: str, queries: dict[str, str], documents: dict[str, str], qrels: Qrels
) -> Collection:
    """Build the collection without queries that cannot be evaluated, and log every defect."""
    unknown = {docid for grades in qrels.values() for docid in grades if docid not in documents}
    if unknown:
        logger.warning(
            "%s: judgements name %d unknown documents (%s), which count as not retrieved",
            name, len(unknown), _few(sorted(unknown)),
        )  # fmt: skip
    unknown_queries = [qid for qid in qrels if qid not in queries]
    if unknown_queries:
        logger.warning(
            "%s: judgements name %d unknown queries (%s), which are ignored",
            name, len(unknown_queries), _few(unknown_queries),
        )  # fmt: skip
    answerable = {
        qid: text for qid, text in queries.items() if max(qrels.get(qid, {"": 0}).values()) > 0
    }
    dropped = tuple(qid for qid in queries if qid not in answerable)
    if not answerable:
        raise ValueError(
            f"{name}: none of the {len(queries)} queries has a relevant document (grade 1 or more) "
            "in the judgements; check that queries and judgements belong together"
        )
    if dropped:
        logger.warning(
            "%s: dropped %d of %d queries without a relevant document (%s)",
            name, len(dropped), len(queries), _few(dropped),
        )  # fmt: skip
    for part, texts in (("documents", documents), ("queries", answerable)):
        empty = [key for key, text in texts.items() if not text.strip()]
        if empty:
            logger.warning(
                "%s: %d of %d %s have no text (%s)", name, len(empty), len(texts), part, _few(empty)
            )
    return Collection(
        name=name,
        queries=answerable,
        documents=documents,
        qrels={qid: qrels[qid] for qid in answerable},
        queries_without_relevant=dropped,
    )


def _require_known(
    qrels: Qrels, queries: dict[str, str], documents: dict[str, str], path: Path
) -> None:
    """Raise ValueError if judgements of a user's file name unknown queries or documents."""
    if all(qid in queries and all(doc in documents for doc in qrels[qid]) for qid in qrels):
        return
    unknown: dict[str, dict[str, int]] = {"queries": {}, "documents": {}}  # id -> first line
    for number, qid, docid, _ in iter_qrels(path):
        for part, key, texts in (("queries", qid, queries), ("documents", docid, documents)):
            if key not in texts:
                unknown[part].setdefault(key, number)
    for part, lines in unknown.items():
        if lines:
            raise ValueError(
                f"{path}:{min(lines.values())}: judgements name {len(lines)} unknown {part} "
                f"({_few(list(lines))}); add them to the {part}, or remove these lines from the "
                "judgements"
            )


def _few(keys: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(repr(key) for key in keys[:limit])
    return shown + (", …" if len(keys) > limit else "")


def _unique(pairs: Iterable[tuple[str, str]], name: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    for key, text in pairs:
        if key in texts:
            raise ValueError(f"{name}: id {key!r} appears a second time; ids must be unique")
        texts[key] = text
    if not texts:
        raise ValueError(f"{name}: none found; remove the downloaded copy and load it again")
    return texts


# --- BEIR folders and ir_datasets ----------------------------------------------------------------


def _beir_file(folder: Path, relative: str) -> Path:
    for candidate in (folder / relative, folder / f"{relative}.gz"):
        if candidate.is_file():
            return candidate
    splits = ""
    if relative.startswith("qrels/"):
        names = sorted({path.name.split(".")[0] for path in (folder / "qrels").glob("*.tsv*")})
        splits = f" (available splits: {', '.join(names)}; select one with split=)" if names else ""
    raise ValueError(
        f"{folder}: no {relative} or {relative}.gz{splits}; a folder in BEIR layout has "
        "corpus.jsonl, queries.jsonl and qrels/test.tsv"
    )


def _load_dataset(source: str, *, queries: bool, documents: bool, qrels: bool) -> _Parts:
    """Load the requested parts of a collection of ``ir_datasets``."""
    dataset = _find_dataset(source)
    requested = (("queries", "queries", queries), ("docs", "documents", documents),
                 ("qrels", "qrels", qrels))  # fmt: skip
    for ir_datasets_name, part, needed in requested:
        if needed and not getattr(dataset, f"has_{ir_datasets_name}")():
            raise ValueError(
                f"{source!r} has no {part} in ir_datasets; choose an id that has them, "
                f"or provide a file with {part}="
            )
    parts = _Parts()
    with _downloading(source):
        if queries:
            texts = ((query.query_id, _default_text(query)) for query in dataset.queries_iter())
            parts.queries = _unique(texts, f"{source} queries")
        if documents:
            texts = ((document.doc_id, _default_text(document)) for document in dataset.docs_iter())
            parts.documents = _unique(texts, f"{source} documents")
        if qrels:
            for judgement in dataset.qrels_iter():
                grades = parts.qrels.setdefault(judgement.query_id, {})
                grade = int(judgement.relevance)
                grades[judgement.doc_id] = max(grade, grades.get(judgement.doc_id, grade))
    return parts


def _find_dataset(source: str) -> Any:
    if Path(source).is_file():
        raise ValueError(
            f"source {source!r} is a file; pass it as queries=, documents= or qrels= instead"
        )
    ir_datasets = require("ir_datasets", "eval", f"{source!r}, which is no folder,")
    try:
        with _downloading(source):  # ir_datasets may have to download its list of CLIRMatrix files
            return ir_datasets.load(source)
    except KeyError:
        near = difflib.get_close_matches(source, list(ir_datasets.registry), n=3, cutoff=0.6)
        hint = f"; nearest ids: {', '.join(near)}" if near else ""
        raise ValueError(
            f"unknown source {source!r}: neither a folder nor an ir_datasets id{hint}; {_ACCEPTED}"
        ) from None


@contextlib.contextmanager
def _downloading(source: str) -> Iterator[None]:
    """Name the collection in errors of ``ir_datasets`` about downloads and damaged files."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # Download errors of ir_datasets derive from OSError, format errors are RuntimeErrors.
        raise OSError(
            f"ir_datasets could not provide {source!r}: {error}; check the network, "
            "or put the files where its documentation says"
        ) from error


def _default_text(record: Any) -> str:
    if hasattr(record, "default_text"):
        return str(record.default_text()).strip()
    # Some record types have no default text; their text is all fields but the id.
    return " ".join(str(value) for value in record[1:] if isinstance(value, str)).strip()
