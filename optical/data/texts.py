"""Readers of queries, documents and sentences in TSV, JSON lines and TREC markup."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from optical.data.formats import Lines, is_text_header, recognise, skip_header
from optical.io.files import parse_json_line

_ID_KEYS = ("id", "_id", "docid", "doc_id", "qid", "query_id", "topic_id")
_TEXT_KEYS = ("text", "contents")
# Other names of the fields of topics -> those in TREC markup.
_FIELDS = {
    "description": "desc",
    "narrative": "narr",
    "query": "title",
    "number": "num",
    "identifier": "num",
}

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
_TOPIC_FIELDS = "num|title|desc|narr|question|" + "|".join(_FIELDS)
_TOPIC_FIELD = re.compile(rf"<(?:[A-Za-z]{{2}}-)?({_TOPIC_FIELDS})\b[^>]*>", re.IGNORECASE)
# Topics in XML, as in <topic number="1">, may have their number here.
_TOPIC_NUMBER = re.compile(r"""\b(?:number|id)\s*=\s*["']([^"']*)["']""", re.IGNORECASE)
_TOPIC_LABEL = re.compile(r"^\s*(number|topic|description|narrative)\s*:", re.IGNORECASE)


def read_texts(path: str | os.PathLike[str], *, topic_fields: Sequence[str] = ()) -> dict[str, str]:
    """Read queries or documents, plain or compressed, as id -> text.

    The suffix and the first line determine the format, see :func:`optical.data.formats.recognise`.

    - ``.tsv``, ``.txt``: ``id TAB text``. A header line such as ``id TAB text`` is skipped.
    - ``.jsonl``, ``.json``: one object per line, or an array of objects, ``{"id": …, "text": …}``;
      ``_id``, ``docid``, ``doc_id``, ``qid``, ``query_id``, ``topic_id`` and ``contents`` are
      accepted too, and a ``title`` is prepended to the text. A text that is null is empty. Topics
      of HC4 and NeuCLIR are read in English.
    - ``.trec``, ``.sgml``, ``.sgm``, ``.xml``: ``<DOC>`` elements with a ``<DOCNO>``, or ``<top>``
      elements with a ``<num>``, or ``<topic number="…">``. The text of a document is its titles,
      headlines and body.

    Args:
        path: the file, which may be a pipe.
        topic_fields: fields that form the text: of TREC topics ``title``, ``desc`` and ``narr``
            (default: ``title``), of JSON lines any (default: title and text).

    Raises:
        ValueError: a malformed line, a duplicate id or an empty file; the message names file, line
            and remedy.
    """
    return dict(iter_texts(path, topic_fields=topic_fields))


def iter_texts(
    path: str | os.PathLike[str], *, topic_fields: Sequence[str] = ()
) -> Iterator[tuple[str, str]]:
    """Yield the (id, text) pairs of :func:`read_texts`, with only the ids in memory."""
    path = Path(path)
    kind, lines = recognise(path)
    if kind == "trec":
        rows = _read_trec(path, lines, [_FIELDS.get(name, name) for name in topic_fields])
    elif kind == "jsonl":
        rows = _read_jsonl(path, lines, topic_fields)
    elif topic_fields:
        raise ValueError(
            f"{path}: has the columns id and text, and no field {topic_fields[0]!r} to select"
        )
    else:
        rows = _read_tsv(path, lines)
    seen: set[str] = set()
    for number, key, text in rows:
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


def _read_tsv(path: Path, lines: Lines) -> Iterator[tuple[int, str, str]]:
    first = True
    for number, line in lines:
        if not line.strip():
            continue
        columns = line.split("\t")
        if first and is_text_header(columns):
            skip_header(path, number, line)
            first = False
            continue
        first = False
        if len(columns) != 2:
            raise ValueError(
                f"{path}:{number}: {len(columns)} columns, a text file needs 2: `id TAB text`; "
                "replace tabs inside a text with spaces"
            )
        yield number, columns[0].strip(), columns[1].strip()


def _read_jsonl(path: Path, lines: Lines, fields: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    for number, line in lines:
        if not line.strip():
            continue
        location = f"{path}:{number}"
        record = parse_json_line(line, location)
        key = _field(record, _ID_KEYS, (str, int), location).strip()
        names = fields
        if isinstance(topics := record.get("topics"), list):
            record, names = _english_topic(topics, location), fields or ("title",)
        if names:
            texts = [_field(record, (name,), (str,), location) for name in names]
        else:
            text = _field(record, _TEXT_KEYS, (str,), location)
            title = _field(record, ("title",), (str,), location) if record.get("title") else ""
            texts = [title, text]
        yield number, key, " ".join(texts).strip()


def _english_topic(topics: list[Any], location: str) -> dict[str, Any]:
    """Return the fields of the English version of a topic of HC4 or NeuCLIR."""
    for version in topics:
        if isinstance(version, dict) and version.get("lang") in ("eng", "en"):
            return {str(name).removeprefix("topic_"): text for name, text in version.items()}
    raise ValueError(
        f"{location}: no topic in English (`lang` eng) among its {len(topics)} versions"
    )


def _field(record: Any, names: Sequence[str], types: tuple[type, ...], location: str) -> str:
    """Return the first of several fields as text; a text that is null is empty."""
    fields: dict[str, Any] = record if isinstance(record, dict) else {}
    for name in names:
        value = fields.get(name)
        if isinstance(value, types) and not isinstance(value, bool):
            return str(value)
        if value is not None or (name in fields and types != (str,)):
            raise ValueError(
                f"{location}: field {name!r} is {json.dumps(value)[:40]}, expected "
                f"{'a string' if types == (str,) else 'a string or a whole number'}"
            )
    if any(name in fields for name in names):
        return ""
    present = ", ".join(map(repr, fields)) or "none"
    raise ValueError(
        f"{location}: no field {names[0]!r} (fields found: {present}); each line must be like "
        '{"id": "d1", "text": "…"}'
    )


def _read_trec(
    path: Path, lines: Lines, topic_fields: Sequence[str]
) -> Iterator[tuple[int, str, str]]:
    for number, (kind, attributes), block in _trec_blocks(path, lines):
        if kind == "DOC":
            yield number, *_trec_document(block, path, number)
        else:
            fields = topic_fields or ("title",)
            yield number, *_trec_topic(block, attributes, fields, path, number)


def _trec_blocks(path: Path, lines: Lines) -> Iterator[tuple[int, tuple[str, str], str]]:
    """Yield line number, name with attributes, and content of each element, one at a time.

    Names are ``DOC``, ``TOP`` and ``TOPIC``.
    """
    opening = re.compile(r"<(DOC|TOPIC|TOP)(\s[^>]*)?>", re.IGNORECASE)
    kind = attributes = ""
    start = 0
    block: list[str] = []
    for number, line in lines:
        while True:
            if not kind:
                match = opening.search(line)
                if match is None:
                    break
                kind, attributes, start, block = match[1].upper(), match[2] or "", number, []
                line = line[match.end() :]
            closing = re.search(rf"</{kind}\s*>", line, re.IGNORECASE)
            reopening = re.search(rf"<{kind}(\s[^>]*)?>", line, re.IGNORECASE)
            if reopening is not None and (closing is None or reopening.start() < closing.start()):
                raise ValueError(
                    f"{path}:{start}: <{kind}> is not closed before the next element starts on "
                    f"line {number}; add </{kind}>"
                )
            if closing is None:
                block.append(line)
                break
            block.append(line[: closing.start()])
            yield start, (kind, attributes), "\n".join(block)
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
    block: str, attributes: str, topic_fields: Sequence[str], path: Path, number: int
) -> tuple[str, str]:
    tags = list(_TOPIC_FIELD.finditer(block))
    ends = [*(tag.start() for tag in tags), len(block)][1:]
    fields: dict[str, str] = {} if tags else {"title": _strip_markup(block)}
    if (given := _TOPIC_NUMBER.search(attributes)) is not None:
        fields["num"] = html.unescape(given[1]).strip()
    for tag, end in zip(tags, ends, strict=True):
        name = tag[1].lower()
        closing = re.compile(rf"</[^>]*{name}\s*>", re.IGNORECASE)
        text = _strip_markup(closing.split(block[tag.end() : end])[0])
        fields.setdefault(_FIELDS.get(name, name), _TOPIC_LABEL.sub("", text).strip())
    if not fields.get("num"):
        raise ValueError(f"{path}:{number}: <top> without <num>; every topic needs a number")
    missing = [field for field in topic_fields if field not in fields]
    if missing:
        present = ", ".join(field for field in fields if field != "num") or "none"
        raise ValueError(
            f"{path}:{number}: topic {fields['num']!r} has no <{missing[0]}> (it has: {present}); "
            "select other fields with --query-field (topic_fields=)"
        )
    return fields["num"], " ".join(fields[field] for field in topic_fields).strip()


def _strip_markup(markup: str) -> str:
    return " ".join(html.unescape(_TAG.sub(" ", markup)).split())


def read_sentences(path: str | Path) -> list[str]:
    """Read the non-empty lines of a text file, or the key `text` of JSON lines or a JSON array.

    Raises:
        ValueError: a malformed line or an empty file; the message names file and line.
    """
    texts = []
    kind, lines = recognise(path)
    for number, line in lines:
        if kind == "jsonl" and line.strip():
            row = parse_json_line(line, f"{path}:{number}")
            text = row.get("text", 0) if isinstance(row, dict) else 0
            if not isinstance(text, (str, NoneType)):
                raise ValueError(f"{path}:{number}: no key `text` with a string")
            line = text or ""
        if line.strip():
            texts.append(line.strip())
    if not texts:
        raise ValueError(f"{path}: no text in it; expected one sentence per line")
    return texts
