"""Read and write the two files that retrieval experiments exchange: runs and judgements.

A run (what a system retrieved) has six columns, ``qid Q0 docid rank score tag``; judgements
("qrels", what is relevant) have four, ``qid 0 docid grade``. Both are the formats of TREC.
Everything here needs the standard library only.

The order of a run is defined once, by :func:`ranked`, and is the one that ``trec_eval`` uses: score
from high to low, equal scores by document id from high to low. So a run evaluates the same in
memory, after it was written and read again, and in ``trec_eval`` itself.
"""

from __future__ import annotations

import logging
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from optical.files import atomic_text, read_lines

__all__ = [
    "Qrels",
    "Run",
    "iter_qrels",
    "ranked",
    "read_qrels",
    "read_run",
    "write_qrels",
    "write_run",
]

logger = logging.getLogger("optical")

Run = dict[str, dict[str, float]]
"""Query id -> document id -> score; a higher score is better."""

Qrels = dict[str, dict[str, int]]
"""Query id -> document id -> grade; 1 and above is relevant, 0 and below is judged not relevant."""

_LARGEST_FLOAT32 = 3.4028234663852886e38


def ranked(scores: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return ``(docid, score)`` pairs, best first: the one order that this package uses.

    Score from high to low; equal scores by document id from high to low, as ``trec_eval`` does.

    Examples:
        >>> ranked({"a": 1.0, "b": 2.0, "c": 1.0})
        [('b', 2.0), ('c', 1.0), ('a', 1.0)]
    """
    return sorted(scores.items(), key=lambda item: (item[1], item[0]), reverse=True)


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a run in the six columns of TREC, plain or gzip. Source: the format of ``trec_eval``.

    Columns are separated by any white space. The rank column is not used, as in ``trec_eval``: the
    score decides. Documents of a query come back best first.

    Raises:
        ValueError: wrong number of columns, a score that is no finite number, a document that
            appears twice for one query, or an empty file; with file and line.
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
        qid, _, docid, _, written, _ = columns
        try:
            score = float(written)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise ValueError(
                f"{path}:{number}: score {written!r} is not a finite number; "
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
    return {qid: dict(ranked(scores)) for qid, scores in run.items()}


def write_run(
    run: Mapping[str, Mapping[str, float]], path: str | os.PathLike[str], *, tag: str
) -> None:
    """Write a run in the six columns of TREC; ``.gz`` is compressed. Never half a file.

    Scores are written with all their digits, so that reading gives the same run. One exception:
    ``trec_eval`` keeps scores in float32, where two different scores may become equal and change
    places. Such a score is lowered to the next float32 below its predecessor, which keeps the
    order.

    Args:
        run: query id -> document id -> score. A query without documents has no line.
        path: the file to write; missing folders are made.
        tag: the last column, the name of the system; no white space.

    Raises:
        ValueError: an id or the tag is empty or has white space in it, or a score is not finite.
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
            written = _separate([float(score) for _, score in ranking])
            for rank, ((docid, score), value) in enumerate(
                zip(ranking, written, strict=True), start=1
            ):
                lowered += value != score
                file.write(f"{qid} Q0 {docid} {rank} {value!r} {tag}\n")
    if lowered:
        logger.info("%s: lowered %d scores that differ in less than float32 holds", path, lowered)


def read_qrels(path: str | os.PathLike[str]) -> Qrels:
    """Read judgements, plain or gzip, in one of three forms told apart by the first line.

    TREC ``qid 0 docid grade``, WikiCLIR ``qid docid grade`` (Sasaki et al., 2018) and BEIR, which
    has the header ``query-id corpus-id score`` before three columns. Columns are separated by any
    white space.

    Raises:
        ValueError: wrong number of columns, a grade that is no whole number, a document judged
            twice for one query, or an empty file; with file and line.
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
            header = [column.lower() for column in columns] == ["query-id", "corpus-id", "score"]
            width = len(columns)
            if header:
                continue
        if len(columns) not in (3, 4) or len(columns) != width:
            wanted = f"{width} as on the first line" if width in (3, 4) else "4 or 3"
            raise ValueError(
                f"{path}:{number}: {len(columns)} columns, judgements need {wanted}: "
                "`qid 0 docid grade` or `qid docid grade` (ids without spaces)"
            )
        try:
            grade = int(columns[-1])
        except ValueError:
            raise ValueError(
                f"{path}:{number}: grade {columns[-1]!r} is not a whole number; "
                "the grade is the last column, 0 means not relevant"
            ) from None
        empty = False
        yield number, columns[0], columns[-2], grade
    if empty:
        raise ValueError(f"{path}:1: the file has no judgements; it needs at least one line")


def write_qrels(qrels: Mapping[str, Mapping[str, int]], path: str | os.PathLike[str]) -> None:
    """Write judgements in the four columns of TREC; ``.gz`` is compressed.

    Raises:
        ValueError: an id is empty or has white space in it.
    """
    with atomic_text(path) as file:
        for qid, grades in qrels.items():
            _require_word(qid, "query id")
            for docid, grade in grades.items():
                _require_word(docid, "document id")
                file.write(f"{qid} 0 {docid} {int(grade)}\n")


def _require_word(value: str, what: str) -> None:
    if value.split() != [value]:
        raise ValueError(
            f"{what} {value!r} must be one word: columns are separated by white space; rename it"
        )


def _separate(scores: list[float]) -> list[float]:
    """Keep different scores different in float32; ``scores`` go from high to low."""
    written: list[float] = []
    for index, score in enumerate(scores):
        if index and score == scores[index - 1]:
            written.append(written[-1])
        elif index and _float32(score) >= _float32(written[-1]):
            written.append(_float32_below(written[-1]))
        else:
            written.append(score)
    return written


def _float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _float32_below(value: float) -> float:
    """The largest float32 below ``value``: its bit pattern is the neighbouring whole number."""
    bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    if _float32(value) == 0.0:
        bits = 0x80000001
    else:
        bits += -1 if value > 0.0 else 1
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])
