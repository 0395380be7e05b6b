"""Recognise the format of a text file by its name and first line, and header lines by their words.

The names of files often say little: TREC distributes topics as ``topics.301-350.txt``, and pipes
have no suffix. The first line decides where it can only be one format; a file is read once.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from optical.io.compression import COMPRESSED_SUFFIXES
from optical.io.files import read_lines

logger = logging.getLogger("optical")

Lines = Iterator[tuple[int, str]]

_SUFFIXES = {
    **dict.fromkeys((".tsv", ".txt", ".tab"), "tsv"),
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "jsonl"),
    **dict.fromkeys((".trec", ".sgml", ".sgm", ".xml"), "trec"),
}
# The start of an array of JSON objects.
_ARRAY = re.compile(r"\s*\[\s*(\{|$)")
_WHITE = re.compile(r"\s*")
_MARKUP = re.compile(r"\s*<(\?xml|!|[A-Za-z][\w-]*(\s[^>]*)?>)")


def _set(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Words of header lines. A line is a header only if all columns that count are such words.
_IDS = _set(
    "id _id docid doc_id doc-id did docno qid query_id query-id queryid pid passage_id corpus-id "
    "corpus_id number num topic topic_id"
)
_TEXTS = _set(
    "text contents content title query queries question document doc passage body sentence "
    "positive pos answer"
)
_ENGLISH = _set("english source src en eng eng_latn source_text src_text sentence1")
_OTHER = _set(
    "target tgt other foreign non_english translation target_text tgt_text sentence2 swahili "
    "somali tagalog filipino german french finnish hindi marathi spanish italian portuguese dutch "
    "russian chinese japanese korean arabic turkish persian czech polish yoruba hausa igbo amharic "
    "zulu lithuanian bulgarian georgian kazakh pashto sw so tl de fr fi hi mr es it swa swh deu "
    "fra fin hin mar som tgl swh_latn som_latn tgl_latn deu_latn fra_latn fin_latn hin_deva "
    "mar_deva"
)
_GRADES = _set("score grade relevance rel label judgement judgment")


def recognise(path: str | os.PathLike[str]) -> tuple[str, Lines]:
    """Return the format of a file, ``tsv``, ``jsonl`` or ``trec``, and its lines.

    A JSON array is ``jsonl`` too: each of its elements is one line, with the number of the line on
    which it begins.

    Raises:
        FileNotFoundError, ValueError: as :func:`optical.io.files.read_lines`.
    """
    suffixes = [part.lower() for part in Path(path).suffixes]
    named = [part for part in suffixes if part not in COMPRESSED_SUFFIXES]
    kind = _SUFFIXES.get(named[-1] if named else "", "")
    lines = read_lines(Path(path))
    read: list[tuple[int, str]] = []
    for number, line in lines:
        read.append((number, line))
        if line.strip():
            break
    first = read[-1][1] if read else ""
    if kind != "jsonl" and "\t" not in first and _MARKUP.match(first):
        kind = "trec"
    elif kind in ("", "tsv") and _is_object(first):
        kind = "jsonl"
    every: Lines = itertools.chain(read, lines)
    if kind != "trec" and _ARRAY.match(first):
        return "jsonl", _elements(path, every)
    return kind or "tsv", every


def _is_object(line: str) -> bool:
    if not line.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _elements(path: str | os.PathLike[str], lines: Lines) -> Lines:
    """Yield the elements of a JSON array, each as one line, with only one line in memory.

    Raises:
        ValueError: the array is malformed or cut off; the message names file and line.
    """
    decoder = json.JSONDecoder()
    # What was read and not yet yielded is text[place:], which begins on the line `start`.
    text, place, start, number = "", 0, 1, 0
    expected = "["  # marks that may come next; without them, the next element
    for number, line in lines:
        # Line ends are white space in JSON, except inside of a text, where they are not allowed.
        text, place, start = (text[place:] + "\n" + line, 0, start) if text else (line, 0, number)
        while True:
            white = _WHITE.match(text, place)
            assert white is not None
            start += text.count("\n", place, white.end())
            place = white.end()
            if place == len(text):
                text = ""
                break
            mark = text[place]
            if mark in expected:
                place += 1
                expected = {"[": "]", ",": "", "]": "\0"}[mark]
                continue
            try:
                if expected in ("[", ",]", "\0"):
                    raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
                _, end = decoder.raw_decode(text, place)
            except json.JSONDecodeError as error:
                if error.pos >= len(text.rstrip()) and expected in ("", "]"):
                    break  # the element goes on in the next line
                at = start + text.count("\n", place, error.pos)
                raise ValueError(f"{path}:{at}: not a JSON array ({error.msg})") from None
            yield start, text[place:end].replace("\n", " ")
            start += text.count("\n", place, end)
            place, expected = end, ",]"
    if expected != "\0":
        raise ValueError(f"{path}:{number}: the JSON array is not closed; the file may be cut off")


def is_text_header(columns: Sequence[str]) -> bool:
    """Return whether columns are names such as ``query_id`` and ``text``, or ``query``, ``pos``."""
    first, second = _words(columns)
    return (first in _IDS or first in _TEXTS) and second in _TEXTS


def is_bitext_header(columns: Sequence[str]) -> bool:
    """Return whether columns are names such as ``source`` and ``target``, or of two languages."""
    first, second = _words(columns)
    return first in _ENGLISH and second in _OTHER


def is_grade_header(columns: Sequence[str]) -> bool:
    """Return whether the last column of judgements is a name such as ``score``."""
    return bool(columns) and columns[-1].lower() in _GRADES


def _words(columns: Sequence[str]) -> tuple[str, str]:
    words = [column.strip().lower() for column in columns[:2]]
    return (words[0], words[1]) if len(words) == 2 else ("", "")


def skip_header(path: str | os.PathLike[str], number: int, line: str) -> None:
    """Log that a line was taken for a header."""
    shown = " ".join(line.split())[:60]
    logger.warning("%s:%d: skipped a header line (%s)", path, number, shown)
