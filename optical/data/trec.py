"""Readers and writers of TREC runs and relevance judgements (qrels).

A run lists retrieved documents in six columns, ``qid Q0 docid rank score tag``. Judgements have
four columns, ``qid 0 docid grade``. This module needs the standard library only.

:func:`trec_eval_order` is the order in which runs are read and evaluated. It compares scores in
float32, as ``trec_eval`` does, so that both give equal measures for any run. :func:`ranked`
compares all digits; it is the order of the runs that this package makes. :func:`write_run` writes
scores that have this order in float32 too.
"""

from __future__ import annotations

import logging
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from optical.data.formats import is_grade_header, skip_header
from optical.io.files import atomic_text, read_lines

logger = logging.getLogger("optical")

Run = dict[str, dict[str, float]]
"""Query id -> document id -> score; higher is better."""

Qrels = dict[str, dict[str, int]]
"""Query id -> document id -> grade; 1 and above is relevant, 0 and below judged not relevant."""

_Number = TypeVar("_Number", int, float)
_LARGEST_FLOAT32 = 3.4028234663852886e38
# trec_eval counts the documents of every grade up to the highest one.
LARGEST_GRADE = 1_000_000


def ranked(scores: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return ``(docid, score)`` pairs, best first, by all digits of the scores.

    Scores descend; documents with equal scores are in descending order of their ids.

    Examples:
        >>> ranked({"a": 1.0, "b": 2.0, "c": 1.0})
        [('b', 2.0), ('c', 1.0), ('a', 1.0)]
    """
    return sorted(scores.items(), key=lambda item: (item[1], item[0]), reverse=True)


def trec_eval_order(scores: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return ``(docid, score)`` pairs, best first, in the order that ``trec_eval`` uses.

    Scores descend after rounding to float32; documents whose scores are then equal are in
    descending order of their ids.

    Examples:
        >>> trec_eval_order({"a": 0.970000002, "b": 0.970000001})
        [('b', 0.970000001), ('a', 0.970000002)]
    """
    return sorted(scores.items(), key=lambda item: (_float32(item[1]), item[0]), reverse=True)


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a TREC run, plain or compressed, in the format of ``trec_eval``.

    Columns are separated by any white space. As in ``trec_eval``, the score determines the order
    and the rank column is ignored. Documents of a query are returned best first, in the order of
    :func:`trec_eval_order`.

    Raises:
        ValueError: wrong number of columns, a score that is not a finite number, a document listed
            twice for one query, or an empty file; the message names file and line.
    """
    path = Path(path)
    run: Run = {}
    for number, line in read_lines(path):
        columns = line.split()
        if not columns:
            continue
        if len(columns) != 6:
            raise ValueError(
                f"{path}:{number}: {len(columns)} columns, a run needs 6: "
                "qid Q0 docid rank score tag (ids without spaces)"
            )
        qid, _, docid, _, score_text, _ = columns
        if not run and is_grade_header(columns[:5]):
            skip_header(path, number, line)
            continue
        score = _parse(float, score_text)
        if score is None or not math.isfinite(score):
            raise ValueError(
                f"{path}:{number}: score {score_text!r} is not a finite number; "
                "the score is the fifth column"
            )
        scores = run.setdefault(qid, {})
        if docid in scores:
            raise ValueError(
                f"{path}:{number}: document {docid!r} appears a second time for query {qid!r}; "
                "keep one line per query and document"
            )
        scores[docid] = score
    if not run:
        raise ValueError(f"{path}:1: the file has no lines; a run needs at least one")
    return {qid: dict(trec_eval_order(scores)) for qid, scores in run.items()}


def write_run(
    run: Mapping[str, Mapping[str, float]], path: str | os.PathLike[str], *, tag: str
) -> None:
    """Write a TREC run atomically; a name in ``.gz`` is compressed.

    Scores are written with all digits, so that reading returns the same run, with one exception:
    ``trec_eval`` stores scores in float32, in which two different scores may become equal and
    change their order. Such a score is lowered to the next float32 below its predecessor.

    Args:
        run: query id -> document id -> score. A query without documents has no line.
        path: the file to write; missing folders are created.
        tag: last column, the name of the system, without white space.

    Raises:
        ValueError: an id or the tag is empty or contains white space, or a score is not finite.
    """
    _require_word(tag, "tag")
    lowered = 0
    with atomic_text(path) as file:
        for qid, scores in run.items():
            _require_word(qid, "query id")
            for docid, score in scores.items():
                _require_word(docid, "document id")
                if not abs(score) <= _LARGEST_FLOAT32:
                    raise ValueError(
                        f"score {score!r} of document {docid!r} for query {qid!r} is not a finite "
                        "float32 number; a run cannot hold it"
                    )
            ranking = ranked(scores)
            values = _separate([float(score) for _, score in ranking])
            for rank, ((docid, score), value) in enumerate(
                zip(ranking, values, strict=True), start=1
            ):
                lowered += value != score
                file.write(f"{qid} Q0 {docid} {rank} {value!r} {tag}\n")
    if lowered:
        logger.info("%s: lowered %d scores that are equal in float32", path, lowered)


def without_identical_ids(run: Mapping[str, Mapping[str, float]], depth: int | None = None) -> Run:
    """Return the best ``depth`` documents per query without the one that has the query's id.

    Without a depth, all others are returned.

    In ArguAna and Quora, the queries are documents of the collection.
    """
    return {
        qid: dict([hit for hit in ranked(scores) if hit[0] != qid][:depth])
        for qid, scores in run.items()
    }


def read_qrels(path: str | os.PathLike[str]) -> Qrels:
    """Read relevance judgements, plain or compressed, in one of three formats.

    The first line distinguishes TREC (``qid 0 docid grade``), WikiCLIR (``qid docid grade``, Sasaki
    et al., 2018) and BEIR (three columns after the header ``query-id corpus-id score``). Other
    header lines are skipped. Columns are separated by any white space.

    Raises:
        ValueError: wrong number of columns, a grade that is not an integer, a document judged twice
            for one query, or an empty file; the message names file and line.
    """
    qrels: Qrels = {}
    for number, qid, docid, grade in iter_qrels(path):
        grades = qrels.setdefault(qid, {})
        if docid in grades:
            raise ValueError(
                f"{path}:{number}: document {docid!r} is judged a second time for query {qid!r}; "
                "keep one line per query and document"
            )
        grades[docid] = grade
    return qrels


def iter_qrels(path: str | os.PathLike[str]) -> Iterator[tuple[int, str, str, int]]:
    """Yield ``(line number, qid, docid, grade)`` of a file that :func:`read_qrels` accepts."""
    path = Path(path)
    width = 0
    empty = True
    for number, line in read_lines(path):
        columns = line.split()
        if not columns:
            continue
        if not width:
            width = len(columns)
            if is_grade_header(columns):
                if columns[0].lower() != "query-id":  # that of BEIR is part of the format
                    skip_header(path, number, line)
                continue
        if len(columns) not in (3, 4) or len(columns) != width:
            expected = f"{width} as on the first line" if width in (3, 4) else "4 or 3"
            raise ValueError(
                f"{path}:{number}: {len(columns)} columns, judgements need {expected}: "
                "`qid 0 docid grade` or `qid docid grade` (ids without spaces)"
            )
        grade = _parse(int, columns[-1])
        if grade is None or abs(grade) > LARGEST_GRADE:
            cause = "is not a whole number" if grade is None else f"is beyond {LARGEST_GRADE}"
            raise ValueError(
                f"{path}:{number}: grade {columns[-1]!r} {cause}; "
                "the grade is the last column, 0 means not relevant"
            )
        empty = False
        yield number, columns[0], columns[-2], grade
    if empty:
        raise ValueError(f"{path}:1: the file has no judgements; it needs at least one line")


def write_qrels(qrels: Mapping[str, Mapping[str, int]], path: str | os.PathLike[str]) -> None:
    """Write TREC judgements atomically; a name in ``.gz`` is compressed.

    Raises:
        ValueError: an id is empty or contains white space.
    """
    with atomic_text(path) as file:
        for qid, grades in qrels.items():
            _require_word(qid, "query id")
            for docid, grade in grades.items():
                _require_word(docid, "document id")
                file.write(f"{qid} 0 {docid} {int(grade)}\n")


def _parse(kind: type[_Number], text: str) -> _Number | None:
    """Return a number of ASCII digits, or None; Python reads ``1_0`` and digits of any script."""
    if not text.isascii() or "_" in text:
        return None
    try:
        return kind(text)
    except ValueError:
        return None


def _require_word(value: str, name: str) -> None:
    if value.split() != [value]:
        raise ValueError(
            f"{name} {value!r} must be one word, because columns are separated by white space; "
            "rename it"
        )


def _separate(scores: list[float]) -> list[float]:
    """Return descending scores whose distinct values remain distinct in float32."""
    separated: list[float] = []
    for index, score in enumerate(scores):
        if index and score == scores[index - 1]:
            separated.append(separated[-1])
        elif index and _float32(score) >= _float32(separated[-1]):
            separated.append(_float32_below(separated[-1]))
        else:
            separated.append(score)
    return separated


def _float32(value: float) -> float:
    """Round to float32, to an infinity beyond its range."""
    if abs(value) > _LARGEST_FLOAT32:
        return math.copysign(math.inf, value)
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _float32_below(value: float) -> float:
    """Return the largest float32 below ``value``, whose bit pattern is the adjacent integer."""
    bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    if _float32(value) == 0.0:
        bits = 0x80000001
    else:
        bits += -1 if value > 0.0 else 1
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])
