"""Load a test collection: queries, documents and judgements, checked before anything is computed.

Three sources, one function, :func:`load_collection`: an ``ir_datasets`` id (``wikiclir/sw``), a
folder in the layout of BEIR, or three files. Files may be TSV, JSONL or TREC markup, plain or gzip.

Only ``ir_datasets`` ids need more than the standard library: ``pip install "optical[eval]"``.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optical.runs import Qrels, iter_qrels, read_qrels
from optical.texts import read_texts

__all__ = ["Collection", "load_collection"]

logger = logging.getLogger("optical")

_ACCEPTED = (
    "accepted are an ir_datasets id (wikiclir/sw, or "
    "clirmatrix/<documents>/bi139-base/<queries>/<split>, the language of documents first), "
    "a folder with corpus.jsonl, queries.jsonl and qrels/test.tsv, "
    "or the three files queries=, documents= and qrels="
)


@dataclass(frozen=True)
class Collection:
    """Queries, documents and judgements that fit each other.

    Every query has at least one relevant document. Made by :func:`load_collection`, or directly.

    Attributes:
        name: how reports call it.
        queries: query id -> text.
        documents: document id -> text; a text may be empty.
        qrels: query id -> document id -> grade; 1 and above is relevant.
        queries_without_relevant: ids of queries that were left out because no document is relevant.
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
    """Load a collection and check that its three parts fit.

    Args:
        source: an ``ir_datasets`` id, or a folder in the layout of BEIR (``corpus.jsonl``,
            ``queries.jsonl``, ``qrels/<split>.tsv``; each may end in ``.gz``), or ``None``. A
            folder of that name comes before an id. Texts of an id are its ``default_text()``.
        queries, documents: text files, see :func:`optical.texts.read_texts`. With ``source``
            they replace that part of it: translated queries for a published collection, say.
        qrels: judgements, see :func:`optical.runs.read_qrels`.
        name: name for reports; the id, the name of the folder, or that of the documents' file.
        split: which judgements of a BEIR folder.
        topic_fields: which of ``title``, ``desc``, ``narr`` make a query of a TREC topic.

    Queries without a relevant document are left out, kept in ``queries_without_relevant`` and
    logged: no system can find anything for them. Empty texts are kept and logged. Judgements from a
    file may only name queries and documents of the collection; judgements of an ``ir_datasets`` id
    are kept as published when they name an unknown document (it counts as not found), with a logged
    warning.

    Raises:
        ValueError: an unknown source, a missing part, an id that occurs twice, judgements that name
            an unknown id, a line in the wrong form, an empty file; with file, line and what to do.
        ImportError: ``source`` is an id and ``ir_datasets`` is not installed.
        OSError: a file is missing, or ``ir_datasets`` could not download.

    Examples:
        >>> collection = load_collection("wikiclir/sw")                           # doctest: +SKIP
        >>> collection = load_collection(queries="queries.tsv", documents="docs.jsonl.gz",
        ...                              qrels="qrels.tsv")                       # doctest: +SKIP
    """
    known_queries: dict[str, str] | None = None
    known_documents: dict[str, str] | None = None
    known_qrels: Qrels | None = None
    qrels_path = None if qrels is None else Path(qrels)

    if source is None:
        given = {"queries": queries, "documents": documents, "qrels": qrels}
        missing = [f"{part}=" for part, path in given.items() if path is None]
        if missing:
            raise ValueError(f"no source and no {', '.join(missing)} given; {_ACCEPTED}")
    elif Path(source).is_dir():
        folder = Path(source)
        name = name or folder.resolve().name
        queries = queries or _beir_file(folder, "queries.jsonl")
        documents = documents or _beir_file(folder, "corpus.jsonl")
        qrels_path = qrels_path or _beir_file(folder, f"qrels/{split}.tsv")
    else:
        dataset = _find_dataset(str(source))
        name = name or str(source)
        parts = (("queries", queries), ("docs", documents), ("qrels", qrels))
        for part, path in parts:
            if path is None and not getattr(dataset, f"has_{part}")():
                word = {"docs": "documents"}.get(part, part)
                raise ValueError(
                    f"{str(source)!r} has no {word} in ir_datasets; choose an id that has them, "
                    f"or give a file with {word}="
                )
        with _downloading(str(source)):
            if queries is None:
                known_queries = _unique(
                    ((q.query_id, _default_text(q)) for q in dataset.queries_iter()),
                    f"{source} queries",
                )
            if documents is None:
                known_documents = _unique(
                    ((d.doc_id, _default_text(d)) for d in dataset.docs_iter()),
                    f"{source} documents",
                )
            if qrels_path is None:
                known_qrels = {}
                for judged in dataset.qrels_iter():
                    grades = known_qrels.setdefault(judged.query_id, {})
                    grade = int(judged.relevance)
                    grades[judged.doc_id] = max(grade, grades.get(judged.doc_id, grade))

    if known_queries is None:
        assert queries is not None
        known_queries = read_texts(queries, topic_fields=topic_fields)
    if known_documents is None:
        assert documents is not None
        name = name or Path(Path(documents).name.removesuffix(".gz")).stem
        known_documents = read_texts(documents)
    if qrels_path is not None:
        known_qrels = read_qrels(qrels_path)
        _require_known(known_qrels, known_queries, known_documents, qrels_path)
    assert known_qrels is not None and name is not None
    return _checked(name, known_queries, known_documents, known_qrels)


def _checked(
    name: str, queries: dict[str, str], documents: dict[str, str], qrels: Qrels
) -> Collection:
    """Leave out what cannot be evaluated, and say so."""
    unknown = {docid for grades in qrels.values() for docid in grades if docid not in documents}
    if unknown:
        logger.warning(
            "%s: judgements name %d documents that the collection lacks (%s); they are not found",
            name, len(unknown), _few(sorted(unknown)),
        )  # fmt: skip
    homeless = [qid for qid in qrels if qid not in queries]
    if homeless:
        logger.warning(
            "%s: judgements name %d queries that the collection lacks (%s); they are not used",
            name, len(homeless), _few(homeless),
        )  # fmt: skip
    kept = {qid: text for qid, text in queries.items() if max(qrels.get(qid, {"": 0}).values()) > 0}
    dropped = tuple(qid for qid in queries if qid not in kept)
    if not kept:
        raise ValueError(
            f"{name}: none of the {len(queries)} queries has a relevant document (grade 1 or more) "
            "in the judgements; check that queries and judgements belong together"
        )
    if dropped:
        logger.warning(
            "%s: left out %d of %d queries, no document is relevant to them (%s)",
            name, len(dropped), len(queries), _few(dropped),
        )  # fmt: skip
    for what, texts in (("documents", documents), ("queries", kept)):
        empty = [key for key, text in texts.items() if not text.strip()]
        if empty:
            logger.warning(
                "%s: %d of %d %s have no text (%s)", name, len(empty), len(texts), what, _few(empty)
            )
    return Collection(
        name=name,
        queries=kept,
        documents=documents,
        qrels={qid: qrels[qid] for qid in kept},
        queries_without_relevant=dropped,
    )


def _require_known(
    qrels: Qrels, queries: dict[str, str], documents: dict[str, str], path: Path
) -> None:
    """Judgements in a file belong to the user, who can correct them: refuse what does not fit."""
    lines: dict[str, list[tuple[int, str]]] = {"query": [], "document": []}
    seen: set[tuple[str, str]] = set()
    if all(qid in queries and all(doc in documents for doc in qrels[qid]) for qid in qrels):
        return
    for number, qid, docid, _ in iter_qrels(path):
        for what, key, known in (("query", qid, queries), ("document", docid, documents)):
            if key not in known and (what, key) not in seen:
                seen.add((what, key))
                lines[what].append((number, key))
    for what, found in lines.items():
        if found:
            plural = {"query": "queries", "document": "documents"}[what]
            raise ValueError(
                f"{path}:{found[0][0]}: judgements name {len(found)} unknown {plural} "
                f"({_few([key for _, key in found])}); add them to the {plural}, or remove these "
                "lines from the judgements"
            )


def _few(keys: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(repr(key) for key in keys[:limit])
    return shown + (", …" if len(keys) > limit else "")


def _unique(pairs: Iterable[tuple[str, str]], what: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    for key, text in pairs:
        if key in texts:
            raise ValueError(f"{what}: id {key!r} appears a second time; ids must be unique")
        texts[key] = text
    if not texts:
        raise ValueError(f"{what}: there are none; remove the downloaded copy and load it again")
    return texts


# --- files ---------------------------------------------------------------------------------------


def _beir_file(folder: Path, relative: str) -> Path:
    for candidate in (folder / relative, folder / f"{relative}.gz"):
        if candidate.is_file():
            return candidate
    splits = ""
    if relative.startswith("qrels/"):
        there = sorted({path.name.split(".")[0] for path in (folder / "qrels").glob("*.tsv*")})
        splits = f" (splits there: {', '.join(there)}; choose with split=)" if there else ""
    raise ValueError(
        f"{folder}: no {relative} or {relative}.gz{splits}; a folder in the layout of BEIR has "
        "corpus.jsonl, queries.jsonl and qrels/test.tsv"
    )


def _find_dataset(source: str) -> Any:
    if Path(source).is_file():
        raise ValueError(
            f"source {source!r} is a file; give it as queries=, documents= or qrels= instead"
        )
    try:
        import ir_datasets
    except ImportError as error:
        raise ImportError(
            f"{source!r} is no folder, and to look it up as an ir_datasets id that package is "
            'needed; install it with `pip install "optical[eval]"`'
        ) from error
    try:
        with _downloading(source):  # the list of CLIRMatrix files is itself a download
            return ir_datasets.load(source)
    except KeyError:
        near = difflib.get_close_matches(source, list(ir_datasets.registry), n=3, cutoff=0.6)
        hint = f"; nearest ids: {', '.join(near)}" if near else ""
        raise ValueError(
            f"unknown source {source!r}: no folder and no ir_datasets id{hint}; {_ACCEPTED}"
        ) from None


class _downloading:
    """Say which collection was being fetched when ``ir_datasets`` could not fetch it."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Its download errors derive from OSError, its format errors are RuntimeErrors.
        if isinstance(error, (OSError, RuntimeError)):
            raise OSError(
                f"ir_datasets could not provide {self.source!r}: {error}; check the network, "
                "or put the files where its documentation says"
            ) from error


def _default_text(record: Any) -> str:
    if hasattr(record, "default_text"):
        return str(record.default_text()).strip()
    # A few record types have no default text; all fields but the id are then the text.
    return " ".join(str(value) for value in record[1:] if isinstance(value, str)).strip()
