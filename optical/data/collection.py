"""Load and validate test collections: queries, documents and relevance judgements.

:func:`load_collection` accepts an ``ir_datasets`` id (``wikiclir/sw``), a folder in BEIR layout, or
three files in TSV, JSON lines or TREC markup, plain or compressed. Only ``ir_datasets`` ids need
more than the standard library: ``pip install "optical-ot[eval]"``.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optical.data.texts import iter_texts, read_texts
from optical.data.trec import Qrels, read_qrels
from optical.io.compression import COMPRESSED_SUFFIXES
from optical.io.environment import require

logger = logging.getLogger("optical")

_ACCEPTED = (
    "accepted are an ir_datasets id (wikiclir/sw, or "
    "clirmatrix/<documents>/bi139-base/<queries>/<split>, the document language first), "
    "a folder with corpus.jsonl, queries.jsonl and qrels/test.tsv, "
    "or the three files queries=, documents= and qrels="
)

# Suffixes of the files of a collection.
_SUFFIXES = ("", *COMPRESSED_SUFFIXES)
# Suffixes of files, which no id of ir_datasets has.
_FILE_SUFFIXES = (
    *COMPRESSED_SUFFIXES,
    *(".tsv", ".txt", ".jsonl", ".json", ".trec", ".qrels", ".qrel", ".rel", ".run", ".xml"),
)


@dataclass(frozen=True)
class Collection:
    """Queries, documents and judgements of a test collection.

    Every query has at least one relevant document, unless the collection was loaded for a search
    alone. Instances come from :func:`load_collection` or are built directly.

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
    topic_fields: Sequence[str] = (),
    judged: bool = True,
) -> Collection:
    """Load a collection and check that its queries, documents and judgements are consistent.

    Queries without a relevant document are dropped, listed in ``queries_without_relevant`` and
    logged, because every system scores 0 on them. Empty texts are kept and logged. Judgements are
    kept as published: documents they name that do not exist, as in ArguAna, are logged as a warning
    and count as not retrieved; unknown queries, as in NFCorpus, are logged and ignored. Judgements
    that name no document of the collection are refused.

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
        topic_fields: fields that form a query: ``title``, ``desc`` and ``narr`` of TREC topics, or
            any of JSON lines and of the queries of an id. The default is the title of topics and
            the text of others.
        judged: judgements are needed. If False, they only select the queries to keep, and all are
            kept where there are no judgements or none for these queries, as for a search.

    Raises:
        ValueError: an unknown source, a missing part, a duplicate id, judgements that name no
            document of the collection, a malformed line or an empty file; the message names file,
            line and remedy.
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
        if qrels is None and (judged or _splits(folder)):
            qrels = _beir_file(folder, f"qrels/{split}.tsv")
    else:
        name = name or str(source)
        given = {"queries": queries, "documents": documents, "qrels": qrels}
        needed = {part for part, path in given.items() if path is None}
        parts = _load_dataset(str(source), needed, topic_fields, judged)

    if queries is not None:
        parts.queries = read_texts(queries, topic_fields=topic_fields)
    if documents is not None:
        name = name or _stem(documents)
        parts.documents = read_texts(documents)
    if qrels is not None:
        parts.qrels = read_qrels(qrels)
    assert name is not None
    if not judged and not parts.qrels.keys() & parts.queries.keys():
        return Collection(name, parts.queries, parts.documents, {})
    return _checked(name, parts.queries, parts.documents, parts.qrels, judged)


def load_documents(source: str | os.PathLike[str]) -> Iterable[tuple[str, str]]:
    """Return the (id, text) pairs of the documents of a collection, without its other parts.

    Args:
        source: as in :func:`load_collection`.
    """
    if Path(source).is_dir():
        return iter_texts(_beir_file(Path(source), "corpus.jsonl"))
    return _load_dataset(str(source), {"documents"}).documents.items()


def load_judgements(source: str | os.PathLike[str], *, split: str = "test") -> Qrels:
    """Return the judgements of a file or of a collection, whose documents are not read.

    Judgements of queries that the collection does not have are left out.

    Args:
        source: a file as in :func:`optical.data.trec.read_qrels`, or a collection as in
            :func:`load_collection`.
        split: judgements of a BEIR folder to read.
    """
    path = Path(source)
    if path.is_dir():
        qrels = read_qrels(_beir_file(path, f"qrels/{split}.tsv"))
        if not any((path / f"queries.jsonl{suffix}").is_file() for suffix in _SUFFIXES):
            return qrels
        queries = read_texts(_beir_file(path, "queries.jsonl"))
    elif path.exists() or looks_like_file(source):
        return read_qrels(path)
    else:
        parts = _load_dataset(str(source), {"queries", "qrels"})
        queries, qrels = parts.queries, parts.qrels
    unknown = [qid for qid in qrels if qid not in queries]
    if unknown:
        logger.warning(
            "%s: judgements name %d unknown queries (%s), which are ignored",
            source, len(unknown), _few(unknown),
        )  # fmt: skip
    return {qid: grades for qid, grades in qrels.items() if qid in queries}


def looks_like_file(source: str | os.PathLike[str]) -> bool:
    """Return whether a name that does not exist is meant as a file, not as an id."""
    text = str(source)
    return text.startswith((".", "/", "~")) or Path(text).suffix.lower() in _FILE_SUFFIXES


def _stem(path: str | os.PathLike[str]) -> str:
    """Return the name of a file without its suffix, and without that of a compression."""
    name = Path(path).name
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return Path(name).stem


@dataclass
class _Parts:
    """Parts of a collection, before they are checked against one another."""

    queries: dict[str, str] = field(default_factory=dict)
    documents: dict[str, str] = field(default_factory=dict)
    qrels: Qrels = field(default_factory=dict)


def _checked(
    name: str, queries: dict[str, str], documents: dict[str, str], qrels: Qrels, judged: bool
) -> Collection:
    """Build the collection without queries that cannot be evaluated, and log every defect."""
    unknown = {docid for grades in qrels.values() for docid in grades if docid not in documents}
    known = any(docid in documents for grades in qrels.values() for docid in grades)
    if unknown and not known and judged:
        raise ValueError(
            f"{name}: none of the {len(unknown)} judged documents ({_few(sorted(unknown))}) is in "
            "the collection; check that documents and judgements belong together"
        )
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
    if not judged:
        kept = {qid: text for qid, text in queries.items() if qid in qrels}
        return Collection(name, kept, documents, {qid: qrels[qid] for qid in kept})
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
    for suffix in _SUFFIXES:
        candidate = folder / f"{relative}{suffix}"
        if candidate.is_file():
            return candidate
    splits = ""
    if relative.startswith("qrels/") and _splits(folder):
        splits = f" (available splits: {', '.join(_splits(folder))}; select one with --split)"
    raise ValueError(
        f"{folder}: no {relative} or {relative}.gz{splits}; a folder in BEIR layout has "
        "corpus.jsonl, queries.jsonl and qrels/test.tsv"
    )


def _splits(folder: Path) -> list[str]:
    return sorted({path.name.split(".")[0] for path in (folder / "qrels").glob("*.tsv*")})


def _load_dataset(
    source: str, needed: Set[str], query_fields: Sequence[str] = (), judged: bool = True
) -> _Parts:
    """Load the needed parts of a collection of ``ir_datasets``."""
    dataset = _find_dataset(source)
    names = {"queries": "queries", "documents": "docs", "qrels": "qrels"}
    present = {part for part, name in names.items() if getattr(dataset, f"has_{name}")()}
    for part in names:
        if part in needed - present and (judged or part != "qrels"):
            raise ValueError(
                f"{source!r} has no {part} in ir_datasets; choose an id that has them, "
                f"or provide a file with {part}="
            )
    needed = needed & present
    parts = _Parts()
    with _downloading(source):
        if "queries" in needed:
            texts = (
                (query.query_id, _query_text(query, query_fields, source))
                for query in dataset.queries_iter()
            )
            parts.queries = _unique(texts, f"{source} queries")
        if "documents" in needed:
            texts = ((document.doc_id, _default_text(document)) for document in dataset.docs_iter())
            parts.documents = _unique(texts, f"{source} documents")
        if "qrels" in needed:
            for judgement in dataset.qrels_iter():
                grades = parts.qrels.setdefault(judgement.query_id, {})
                grade = int(judgement.relevance)
                grades[judgement.doc_id] = max(grade, grades.get(judgement.doc_id, grade))
    return parts


def _query_text(query: Any, fields: Sequence[str], source: str) -> str:
    """Return the chosen fields of a query of ``ir_datasets``, or its default text."""
    if not fields:
        return _default_text(query)
    present = [name for name in query._fields if isinstance(getattr(query, name), str)]
    for name in fields:
        if name not in present:
            listed = ", ".join(name for name in present if name != "query_id") or "none"
            raise ValueError(f"{source}: its queries have no field {name!r} (they have: {listed})")
    return " ".join(getattr(query, name) for name in fields).strip()


def _find_dataset(source: str) -> Any:
    if Path(source).exists():
        raise ValueError(
            f"source {source!r} is a file; pass it as queries=, documents= or qrels= instead"
        )
    if looks_like_file(source):
        raise FileNotFoundError(f"{source}: no such file or folder")
    ir_datasets = require("ir_datasets", "eval", f"{source!r}, which is no file or folder,")
    try:
        with _downloading(source):  # ir_datasets may have to download its list of CLIRMatrix files
            return ir_datasets.load(source)
    except KeyError:
        near = difflib.get_close_matches(source, list(ir_datasets.registry), n=3, cutoff=0.6)
        hint = f"; nearest ids: {', '.join(near)}" if near else ""
        raise ValueError(
            f"unknown source {source!r}: no such file or folder, and no ir_datasets id{hint}; "
            f"{_ACCEPTED}"
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
