"""Parallel sentences in plain files: read, checked, and counted before anything is trained."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from optical.data.texts import read_texts
from optical.io.files import read_lines

logger = logging.getLogger("optical")

Pair = tuple[str, str]

# The forms that the field's files have, as (English side, other side).
COLUMN_NAMES = (("source", "target"), ("english", "non_english"), ("en", "other"))


def read_pairs(path: str | Path) -> list[Pair]:
    """Read sentence pairs (English, other language) from a file of parallel sentences.

    Accepted, each plain or gzip: TAB-separated lines ``English TAB other [TAB anything]``; JSON
    lines with the keys ``source``/``target``, ``english``/``non_english`` (Sentence Transformers)
    or ``translation`` (OPUS on the Hugging Face hub); two aligned files of one sentence a line
    (Moses), given as ``corpus.en,corpus.sw``. Pairs with an empty side are left out and counted in
    the log; exact repetitions are kept once.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: wrong column count, not UTF-8, unequal Moses files, or no pair at all; the
            message names file, line and remedy.
    """
    kept: dict[Pair, None] = {}
    empty = total = 0
    for pair in iter_pairs(path):
        total += 1
        if all(pair):
            kept[pair] = None
        else:
            empty += 1
    if not kept:
        raise ValueError(
            f"{path}: no sentence pair in {total} lines; expected lines `English TAB other`"
        )
    if len(kept) < total:
        logger.info(
            "%s: %d pairs (%d with an empty side and %d repetitions left out)",
            path,
            len(kept),
            empty,
            total - empty - len(kept),
        )
    return list(kept)


def iter_pairs(path: str | Path) -> Iterator[Pair]:
    """Yield the pairs of a file of :func:`read_pairs`, every one, with one of them in memory."""
    path = str(path)
    if "," in path and not Path(path).exists():
        pairs = _moses(path)
    elif path.removesuffix(".gz").endswith((".jsonl", ".json")):
        pairs = _json_lines(path)
    else:
        pairs = _tab_separated(path)
    return ((english.strip(), other.strip()) for english, other in pairs)


def _tab_separated(path: str) -> Iterator[tuple[str, str]]:
    for number, line in read_lines(path):
        columns = line.split("\t")
        if line.strip() and len(columns) < 2:
            raise ValueError(
                f"{path}:{number}: 1 column, expected 2 or more, `English TAB other language`"
            )
        if line.strip():
            yield columns[0], columns[1]


def _json_lines(path: str) -> Iterator[tuple[str, str]]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error.msg})") from None
        yield _pair_of_row(row, f"{path}:{number}")


def _pair_of_row(row: Any, place: str) -> tuple[str, str]:
    if isinstance(row, dict):
        inner = row.get("translation", row)
        texts = (
            {key: value for key, value in inner.items() if isinstance(value, str)}
            if isinstance(inner, dict)
            else {}
        )
        for english, other in COLUMN_NAMES:
            if english in texts and other in texts:
                return texts[english], texts[other]
        if "en" in texts and len(texts) == len(inner) == 2:
            (other,) = texts.keys() - {"en"}
            return texts["en"], texts[other]
    found = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise ValueError(
        f"{place}: keys {found}, expected source/target, english/non_english or translation"
    )


def _moses(path: str) -> Iterator[tuple[str, str]]:
    sides = path.split(",")
    if len(sides) != 2:
        raise ValueError(f"{path}: {len(sides)} files, expected two, `corpus.en,corpus.sw`")
    english, other = (read_lines(side) for side in sides)
    lines = [0, 0]
    for pair in itertools.zip_longest(english, other):
        for side, line in enumerate(pair):
            lines[side] += line is not None
        if lines[0] == lines[1]:
            yield pair[0][1], pair[1][1]
    if lines[0] != lines[1]:
        raise ValueError(
            f"{sides[1]}: {lines[1]} lines, but {sides[0]} has {lines[0]}; "
            "aligned files have one sentence a line, the same number in both"
        )


def balanced(files: Sequence[Sequence[Pair]]) -> list[list[Pair]]:
    """Repeat the pairs of smaller files until every file has as many as the largest one."""
    largest = max(map(len, files), default=0)
    return [list(itertools.islice(itertools.cycle(pairs), largest)) for pairs in files]


def read_bitext(path: str | Path, *, max_pairs: int | None = None) -> Any:
    """Read a file of parallel sentences as a Hugging Face dataset for the trainer.

    Args:
        path: as in :func:`read_pairs`.
        max_pairs: keep the first so many pairs (None: all).

    Returns:
        A ``datasets.Dataset`` with the columns ``source`` (English) and ``target``.
    """
    return pairs_dataset(read_pairs(path)[:max_pairs])


def pairs_dataset(pairs: Iterable[Pair]) -> Any:
    """Turn (English, other) pairs into a ``datasets.Dataset`` with columns source and target."""
    from datasets import Dataset

    source, target = zip(*pairs, strict=True)
    return Dataset.from_dict({"source": list(source), "target": list(target)})


def stream_bitext(paths: Sequence[str | Path], *, seed: int = 0, buffer: int = 100_000) -> Any:
    """Bitext of any size for the trainer: read from disk while it trains, never held as a whole.

    Args:
        paths: files, each as in :func:`read_pairs`; they take turns pair by pair, so that none is
            learnt before the others.
        seed: of the order, which is drawn from a window of the next `buffer` pairs.
        buffer: pairs in memory.

    Returns:
        A ``datasets.IterableDataset`` with the columns ``source`` and ``target``. It has no length:
        the trainer needs ``max_steps``. Pairs with an empty side are left out; repetitions stay.
    """
    from datasets import Features, IterableDataset, Value

    return IterableDataset.from_generator(
        _in_turn,
        features=Features({"source": Value("string"), "target": Value("string")}),
        gen_kwargs={"paths": tuple(map(str, paths))},
    ).shuffle(seed=seed, buffer_size=buffer)


def _in_turn(paths: Sequence[str]) -> Iterator[dict[str, str]]:
    rest = [iter_pairs(path) for path in paths]
    while rest:
        for pairs in list(rest):
            pair = next(pairs, None)
            if pair is None:
                rest.remove(pairs)
            elif all(pair):
                yield {"source": pair[0], "target": pair[1]}


def read_training_pairs(
    pairs: Sequence[str] = (), queries: str = "", passages: str = ""
) -> list[tuple[str, ...]]:
    """Read (query, passage[, negative ...]) rows; all have as many negatives as the shortest has.

    Args:
        pairs: files of TAB-separated lines ``query TAB passage [TAB negative ...]``, or of JSON
            lines with ``query``, ``pos`` (a list) and optionally ``neg`` (FlagEmbedding).
        queries, passages: instead or besides, ``query id TAB passage id TAB query`` and the texts
            of the passage ids (:func:`optical.data.texts.read_texts`).

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
