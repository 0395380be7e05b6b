"""English training pairs, a query and a passage that answers it, from the forms the field has."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from optical.files import read_lines
from optical.texts import read_texts


def read_training_pairs(
    pairs: Sequence[str] = (), queries: str = "", passages: str = ""
) -> list[tuple[str, ...]]:
    """Read (query, passage[, negative ...]) rows; all have as many negatives as the shortest has.

    Args:
        pairs: files of TAB-separated lines ``query TAB passage [TAB negative ...]``, or of JSON
            lines with ``query``, ``pos`` (a list) and optionally ``neg`` (FlagEmbedding).
        queries, passages: instead or besides, ``query id TAB passage id TAB query`` and the texts
            of the passage ids (:func:`optical.texts.read_texts`).

    Raises:
        FileNotFoundError, ValueError: with file, line and remedy.
    """
    rows: list[tuple[str, ...]] = []
    for path in pairs:
        json_lines = path.removesuffix(".gz").endswith((".jsonl", ".json"))
        rows += _query_json(path) if json_lines else _query_tsv(path)
    if queries:
        rows += _joined(queries, passages)
    if not rows:
        raise ValueError(f"{list(pairs) or queries}: no training pair in it")
    width = min(len(row) for row in rows)
    return [row[:width] for row in rows]


def _query_tsv(path: str) -> Iterable[tuple[str, ...]]:
    for number, line in read_lines(path):
        columns = tuple(column.strip() for column in line.split("\t"))
        if line.strip() and (len(columns) < 2 or not all(columns)):
            raise ValueError(f"{path}:{number}: expected `query TAB passage [TAB negative ...]`")
        if line.strip():
            yield columns


def _query_json(path: str) -> Iterable[tuple[str, ...]]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            query, positives, negatives = row["query"], row["pos"], row.get("neg") or []
            if not (isinstance(positives, list) and isinstance(negatives, list)):
                raise TypeError
            if not all(isinstance(text, str) for text in (query, *positives, *negatives)):
                raise TypeError
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(
                f"{path}:{number}: expected JSON with `query`, `pos` (list) and optional `neg`"
            ) from None
        yield from ((query, text, *negatives) for text in positives)


def _joined(queries: str, passages: str) -> Iterable[tuple[str, ...]]:
    texts = read_texts(passages)
    for number, line in read_lines(queries):
        if not line.strip():
            continue
        columns = line.split("\t")
        if len(columns) != 3:
            raise ValueError(
                f"{queries}:{number}: {len(columns)} columns, "
                "expected `query id TAB passage id TAB query`"
            )
        if columns[1] not in texts:
            raise ValueError(f"{queries}:{number}: passage {columns[1]!r} is not in {passages}")
        yield columns[2], texts[columns[1]]
