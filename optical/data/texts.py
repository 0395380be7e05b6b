"""Readers of queries, documents and sentences in TSV, JSON lines and TREC markup."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from optical.io.files import read_lines

_ID_KEYS = ("id", "_id", "docid", "doc_id", "qid", "query_id")
_TEXT_KEYS = ("text", "contents")

# Elements with the text of an article in the newswire collections of TREC and CLEF. All others
# (dates, sections, by-lines, lengths) are metadata.
_TREC_TEXT = ("TITLE", "HEADLINE", "HEAD", "HL", "TTL", "LEADPARA", "LP", "TEXT")
_TREC_TEXT_ELEMENT = re.compile(
    rf"<({'|'.join(_TREC_TEXT)})\b[^>]*>(.*?)</\1\s*>", re.IGNORECASE | re.DOTALL
)
_TREC_IDS = re.compile(r"<(DOCNO|DOCID)\b[^>]*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_DOCNO = re.compile(r"<DOCNO\b[^>]*>(.*?)</DOCNO\s*>", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"</?[A-Za-z!][^>]*>")
# Fields of a topic may lack closing tags (TREC) or have them (CLEF), and CLEF prefixes names with a
# language, as in <EN-title>. A field ends at the start of the next field or the end of the topic.
_TOPIC_FIELD = re.compile(r"<(?:[A-Za-z]{2}-)?(num|title|desc|narr)\b[^>]*>", re.IGNORECASE)
_TOPIC_LABEL = re.compile(r"^\s*(number|topic|description|narrative)\s*:", re.IGNORECASE)


def read_texts(
    path: str | os.PathLike[str], *, topic_fields: Sequence[str] = ("title",)
) -> dict[str, str]:
    """Read queries or documents, plain or gzip, as id -> text.

    The suffix determines the format; for other suffixes, the first non-space character does.

    - ``.tsv``, ``.txt``: ``id TAB text``.
    - ``.jsonl``, ``.json``: one object per line, ``{"id": …, "text": …}``; ``_id``, ``docid``,
      ``doc_id``, ``qid``, ``query_id`` and ``contents`` are accepted too, and a ``title`` is
      prepended to the text.
    - ``.trec``, ``.sgml``, ``.sgm``, ``.xml``: ``<DOC>`` elements with a ``<DOCNO>``, or ``<top>``
      elements with a ``<num>``. The text of a document is its titles, headlines and body.

    Args:
        path: the file.
        topic_fields: fields of a TREC topic (``title``, ``desc``, ``narr``) that form the query.

    Raises:
        ValueError: a malformed line, a duplicate id or an empty file; the message names file, line
            and remedy.
    """
    return dict(iter_texts(path, topic_fields=topic_fields))


def iter_texts(
    path: str | os.PathLike[str], *, topic_fields: Sequence[str] = ("title",)
) -> Iterator[tuple[str, str]]:
    """Yield the (id, text) pairs of :func:`read_texts`, with only the ids in memory."""
    path = Path(path)
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    suffix = suffixes[-1].lower() if suffixes else ""
    readers: dict[str, Callable[[Path], Iterator[tuple[int, str, str]]]] = {
        ".tsv": _read_tsv,
        ".txt": _read_tsv,
        ".jsonl": _read_jsonl,
        ".json": _read_jsonl,
        ".trec": lambda path: _read_trec(path, topic_fields),
        ".sgml": lambda path: _read_trec(path, topic_fields),
        ".sgm": lambda path: _read_trec(path, topic_fields),
        ".xml": lambda path: _read_trec(path, topic_fields),
    }
    if suffix not in readers:
        first = next((line.lstrip()[0] for _, line in read_lines(path) if line.strip()), "")
        suffix = {"{": ".jsonl", "<": ".trec"}.get(first, ".tsv")
    seen: set[str] = set()
    for number, key, text in readers[suffix](path):
        if key.split() != [key]:
            raise ValueError(
                f"{path}:{number}: id {key!r} must be one word, because columns of runs are "
                "separated by white space; rename it"
            )
        if key in seen:
            raise ValueError(
                f"{path}:{number}: id {key!r} appears a second time; ids must be unique"
            )
        seen.add(key)
        yield key, text
    if not seen:
        raise ValueError(f"{path}:1: the file has no texts; it needs at least one")


def _read_tsv(path: Path) -> Iterator[tuple[int, str, str]]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        columns = line.split("\t")
        if len(columns) != 2:
            raise ValueError(
                f"{path}:{number}: {len(columns)} columns, a text file needs 2: `id TAB text`; "
                "replace tabs inside a text with spaces"
            )
        yield number, columns[0].strip(), columns[1].strip()


def _read_jsonl(path: Path) -> Iterator[tuple[int, str, str]]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{number}: not JSON ({error.msg} at column {error.colno}); "
                "each line must hold one complete object"
            ) from None
        key = _field(record, _ID_KEYS, (str, int), path, number)
        text = _field(record, _TEXT_KEYS, (str,), path, number)
        title = record.get("title") or ""
        yield number, key.strip(), f"{title} {text}".strip()


def _field(
    record: Any, names: Sequence[str], types: tuple[type, ...], path: Path, number: int
) -> str:
    fields: dict[str, Any] = record if isinstance(record, dict) else {}
    for name in names:
        value = fields.get(name)
        if isinstance(value, types):
            return str(value)
        if value is not None:
            raise ValueError(
                f"{path}:{number}: field {name!r} is {json.dumps(value)[:40]}, expected "
                f"{'a string' if types == (str,) else 'a string or a whole number'}"
            )
    present = ", ".join(map(repr, fields)) or "none"
    raise ValueError(
        f"{path}:{number}: no field {names[0]!r} (fields found: {present}); each line must be like "
        '{"id": "d1", "text": "…"}'
    )


def _read_trec(path: Path, topic_fields: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    for number, kind, block in _trec_blocks(path):
        if kind == "DOC":
            yield number, *_trec_document(block, path, number)
        else:
            yield number, *_trec_topic(block, topic_fields, path, number)


def _trec_blocks(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line number, ``DOC`` or ``TOP``, and content of each element, one at a time."""
    opening = re.compile(r"<(DOC|TOP)(?:\s[^>]*)?>", re.IGNORECASE)
    kind = ""
    start = 0
    block: list[str] = []
    for number, line in read_lines(path):
        while True:
            if not kind:
                match = opening.search(line)
                if match is None:
                    break
                kind, start, block = match[1].upper(), number, []
                line = line[match.end() :]
            closing = re.search(rf"</{kind}\s*>", line, re.IGNORECASE)
            reopening = opening.search(line)
            if reopening is not None and (closing is None or reopening.start() < closing.start()):
                raise ValueError(
                    f"{path}:{start}: <{kind}> is not closed before the next element starts on "
                    f"line {number}; add </{kind}>"
                )
            if closing is None:
                block.append(line)
                break
            block.append(line[: closing.start()])
            yield start, kind, "\n".join(block)
            kind, line = "", line[closing.end() :]
    if kind:
        raise ValueError(
            f"{path}:{start}: <{kind}> is not closed at the end of the file; add </{kind}>"
        )


def _trec_document(block: str, path: Path, number: int) -> tuple[str, str]:
    docno = _DOCNO.search(block)
    if docno is None:
        raise ValueError(f"{path}:{number}: <DOC> without <DOCNO>; every document needs a number")
    parts = [match[2] for match in _TREC_TEXT_ELEMENT.finditer(block)]
    return docno[1].strip(), _strip_markup(" ".join(parts) if parts else _TREC_IDS.sub(" ", block))


def _trec_topic(
    block: str, topic_fields: Sequence[str], path: Path, number: int
) -> tuple[str, str]:
    tags = list(_TOPIC_FIELD.finditer(block))
    ends = [tag.start() for tag in tags[1:]] + [len(block)]
    fields: dict[str, str] = {}
    for tag, end in zip(tags, ends, strict=True):
        text = _strip_markup(block[tag.end() : end])
        fields[tag[1].lower()] = _TOPIC_LABEL.sub("", text).strip()
    if not fields.get("num"):
        raise ValueError(f"{path}:{number}: <top> without <num>; every topic needs a number")
    missing = [field for field in topic_fields if field not in fields]
    if missing:
        present = ", ".join(field for field in fields if field != "num") or "none"
        raise ValueError(
            f"{path}:{number}: topic {fields['num']!r} has no <{missing[0]}> (it has: {present}); "
            "select other fields with topic_fields="
        )
    return fields["num"], " ".join(fields[field] for field in topic_fields).strip()


def _strip_markup(markup: str) -> str:
    return " ".join(html.unescape(_TAG.sub(" ", markup)).split())


def read_sentences(path: str | Path) -> list[str]:
    """Read the non-empty lines of a text file, or the key `text` of a JSON lines file.

    Raises:
        ValueError: a malformed line or an empty file; the message names file and line.
    """
    texts = []
    json_lines = str(path).removesuffix(".gz").endswith((".jsonl", ".json"))
    for number, line in read_lines(path):
        if json_lines and line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error.msg})") from None
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f"{path}:{number}: no key `text` with a string")
            line = row["text"]
        if line.strip():
            texts.append(line.strip())
    if not texts:
        raise ValueError(f"{path}: no text in it; expected one sentence per line")
    return texts
