"""Readers of bitext (parallel sentences) and of training pairs (query, passage)."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from optical.data.formats import (
    Lines,
    is_bitext_header,
    is_text_header,
    recognise,
    skip_header,
)
from optical.data.texts import read_texts
from optical.io.environment import require
from optical.io.files import check_readable, parse_json_line, read_lines

logger = logging.getLogger("optical")

# English sentence, sentence of the other language.
SentencePair = tuple[str, str]

# Names of the two columns in common file formats, as (English, other language).
COLUMN_NAMES = (("source", "target"), ("english", "non_english"), ("en", "other"))


def read_bitext(path: str | Path, *, max_pairs: int | None = None) -> Any:
    """Read bitext as a Hugging Face dataset for the trainer.

    Args:
        path: as in :func:`read_bitext_pairs`.
        max_pairs: number of pairs to keep, from the start (None: all).

    Returns:
        A ``datasets.Dataset`` with the columns ``source`` (English) and ``target``.
    """
    return bitext_dataset(read_bitext_pairs(path)[:max_pairs])


def read_bitext_pairs(path: str | Path) -> list[SentencePair]:
    """Read bitext as a list of sentence pairs (English, other language).

    Accepted formats, plain or compressed: lines ``English TAB other [TAB anything]``; JSON lines or
    a JSON array with the keys ``source``/``target``, ``english``/``non_english`` (Sentence
    Transformers) or ``translation`` (OPUS on the Hugging Face hub); two aligned files with one
    sentence per line (Moses), given as ``corpus.en,corpus.sw``. Pairs with an empty side are
    dropped and counted in the log; exact duplicates are removed.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: wrong column count, invalid UTF-8, Moses files of unequal length, or no pair;
            the message names file, line and remedy.
    """
    return list(iter_distinct_pairs(path))


def iter_distinct_pairs(
    path: str | Path, *, max_pairs: int | None = None
) -> Iterator[SentencePair]:
    """Yield the pairs of :func:`read_bitext_pairs`, with 8 bytes of each in a set, not its text.

    Args:
        path: as in :func:`read_bitext_pairs`.
        max_pairs: number of pairs to yield, from the start (None: all).

    Raises:
        FileNotFoundError, ValueError: see :func:`read_bitext_pairs`.
    """
    seen: set[int] = set()
    empty = total = 0
    for pair in iter_bitext_pairs(path):
        total += 1
        if not all(pair):
            empty += 1
            continue
        digest = hashlib.blake2b("\0".join(pair).encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little")
        if key not in seen:
            seen.add(key)
            yield pair
            if len(seen) == max_pairs:
                return
    if not seen:
        raise ValueError(
            f"{path}: no sentence pair in {total} lines; expected lines `English TAB other`"
        )
    if len(seen) < total:
        logger.info(
            "%s: %d pairs (dropped %d with an empty side and %d duplicates)",
            path,
            len(seen),
            empty,
            total - empty - len(seen),
        )


def iter_bitext_pairs(path: str | Path) -> Iterator[SentencePair]:
    """Yield every pair of a file that :func:`read_bitext_pairs` accepts, one in memory at a time.

    Pairs with an empty side and duplicates are included.
    """
    path = str(path)
    if "," in path and not Path(path).exists():
        pairs = _read_moses(path)
    else:
        kind, lines = recognise(path)
        read = _read_json_lines if kind == "jsonl" else _read_tab_separated
        pairs = read(path, lines)
    return ((english.strip(), other.strip()) for english, other in pairs)


def check_bitext(path: str | Path, max_pairs: int | None = None) -> None:
    """Read bitext once and raise the errors of :func:`read_bitext_pairs`; nothing is kept.

    Pipes, which can be read only once, are left alone.
    """
    files = [path] if Path(path).exists() else str(path).split(",")
    for file in map(check_readable, files):
        if not file.is_file():
            return
    total = full = 0
    for pair in itertools.islice(iter_bitext_pairs(path), max_pairs):
        total += 1
        full += all(pair)
    if not full:
        raise ValueError(
            f"{path}: no sentence pair in {total} lines; expected lines `English TAB other`"
        )


def _read_tab_separated(path: str, lines: Lines) -> Iterator[tuple[str, str]]:
    first = True
    for number, line in lines:
        if not line.strip():
            continue
        columns = line.split("\t")
        if len(columns) < 2:
            raise ValueError(
                f"{path}:{number}: 1 column, expected 2 or more, `English TAB other language`"
            )
        if first and is_bitext_header(columns):
            skip_header(path, number, line)
        else:
            yield columns[0], columns[1]
        first = False


def _read_json_lines(path: str, lines: Lines) -> Iterator[tuple[str, str]]:
    for number, line in lines:
        if line.strip():
            location = f"{path}:{number}"
            yield _pair_of_row(parse_json_line(line, location), location)


def _pair_of_row(row: Any, location: str) -> tuple[str, str]:
    """Return both texts of a row; a text that is null is empty."""
    inner = row.get("translation", row) if isinstance(row, dict) else None
    if isinstance(inner, dict):
        texts = {key: value or "" for key, value in inner.items() if _is_text(value)}
        for english, other in COLUMN_NAMES:
            if english in texts and other in texts:
                return texts[english], texts[other]
        if "en" in texts and len(texts) == len(inner) == 2:
            (other,) = texts.keys() - {"en"}
            return texts["en"], texts[other]
    keys = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise ValueError(
        f"{location}: keys {keys}, expected source/target, english/non_english or translation, "
        "with texts as values"
    )


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _read_moses(path: str) -> Iterator[tuple[str, str]]:
    files = path.split(",")
    if len(files) != 2:
        raise ValueError(f"{path}: {len(files)} files, expected two, `corpus.en,corpus.sw`")
    english, other = (read_lines(file) for file in files)
    counts = [0, 0]
    for pair in itertools.zip_longest(english, other):
        for file, line in enumerate(pair):
            counts[file] += line is not None
        if counts[0] == counts[1]:
            yield pair[0][1], pair[1][1]
    if counts[0] != counts[1]:
        raise ValueError(
            f"{files[1]}: {counts[1]} lines, but {files[0]} has {counts[0]}; "
            "aligned files have one sentence per line and the same number of lines"
        )


def join_pairs(pairs: Iterable[SentencePair], characters: int) -> list[SentencePair]:
    """Join neighbouring sentence pairs into passages of up to `characters` on either side.

    A pair that is longer stays alone. With 0 nothing is joined.
    """
    joined: list[SentencePair] = []
    for pair in pairs:
        longer = [" ".join(sides) for sides in zip(joined[-1], pair, strict=True)] if joined else []
        if longer and max(map(len, longer)) <= characters:
            joined[-1] = longer[0], longer[1]
        else:
            joined.append(pair)
    return joined


def balance_bitexts(bitexts: Sequence[Sequence[SentencePair]]) -> list[list[SentencePair]]:
    """Repeat the pairs of smaller bitexts until each has as many as the largest."""
    largest = max(map(len, bitexts), default=0)
    return [list(itertools.islice(itertools.cycle(pairs), largest)) for pairs in bitexts]


def bitext_dataset(pairs: Iterable[SentencePair]) -> Any:
    """Convert sentence pairs to a ``datasets.Dataset`` with the columns source and target."""
    datasets = require("datasets", "train", "a dataset of bitext")
    source, target = zip(*pairs, strict=True)
    return datasets.Dataset.from_dict({"source": list(source), "target": list(target)})


def stream_bitext(paths: Sequence[str | Path], *, seed: int = 0, buffer: int = 100_000) -> Any:
    """Stream bitext of any size from disk during training.

    Args:
        paths: files as in :func:`read_bitext_pairs`. Their pairs alternate, so that no file is
            learnt before the others.
        seed: seed of the shuffling, which draws from a window of the next `buffer` pairs.
        buffer: pairs in memory.

    Returns:
        A ``datasets.IterableDataset`` with the columns ``source`` and ``target``. It has no length,
        so the trainer needs ``max_steps``. Pairs with an empty side are dropped; duplicates are
        kept.
    """
    datasets = require("datasets", "train", "a dataset of bitext")
    text = datasets.Value("string")
    return datasets.IterableDataset.from_generator(
        _alternate,
        features=datasets.Features({"source": text, "target": text}),
        gen_kwargs={"paths": tuple(map(str, paths))},
    ).shuffle(seed=seed, buffer_size=buffer)


def _alternate(paths: Sequence[str]) -> Iterator[dict[str, str]]:
    unfinished = [iter_bitext_pairs(path) for path in paths]
    while unfinished:
        for pairs in list(unfinished):
            pair = next(pairs, None)
            if pair is None:
                unfinished.remove(pairs)
            elif all(pair):
                yield {"source": pair[0], "target": pair[1]}


def read_training_pairs(
    pairs: Sequence[str] = (), queries: str = "", passages: str = ""
) -> list[tuple[str, ...]]:
    """Read (query, passage[, negative ...]) rows, cut to the smallest number of negatives.

    Negatives that are cut and lines without a passage are counted in the log.

    Args:
        pairs: files with TAB-separated lines ``query TAB passage [TAB negative ...]``, or with JSON
            (lines or an array) that has the keys ``query``, ``pos`` (a list) and optionally ``neg``
            (FlagEmbedding).
        queries: alternative or additional file with lines ``query id TAB passage id TAB query``.
        passages: texts of the passage ids in `queries`, as in
            :func:`optical.data.texts.read_texts`.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: wrong format; the message names file, line and remedy.
    """
    rows: list[tuple[str, ...]] = []
    for path in pairs:
        kind, lines = recognise(path)
        read = _read_training_json if kind == "jsonl" else _read_training_tsv
        rows += read(path, lines)
    if queries:
        rows += _join(queries, passages)
    if not rows:
        raise ValueError(f"{list(pairs) or queries}: no training pair in it")
    width = min(len(row) for row in rows)
    cut = sum(len(row) - width for row in rows)
    if cut:
        shortest = sum(len(row) == width for row in rows)
        logger.warning(
            "training pairs: %d of %d rows have only %d negatives, so %d negatives of the other "
            "rows are left out; give each row as many, or remove the short rows",
            shortest,
            len(rows),
            width - 2,
            cut,
        )
    return [row[:width] for row in rows]


def _read_training_tsv(path: str, lines: Lines) -> Iterable[tuple[str, ...]]:
    first = True
    for number, line in lines:
        if not line.strip():
            continue
        columns = tuple(column.strip() for column in line.split("\t"))
        if len(columns) < 2 or not all(columns):
            raise ValueError(f"{path}:{number}: expected `query TAB passage [TAB negative ...]`")
        if first and is_text_header(columns):
            skip_header(path, number, line)
        else:
            yield columns
        first = False


def _read_training_json(path: str, lines: Lines) -> Iterable[tuple[str, ...]]:
    without_passage = 0
    for number, line in lines:
        if not line.strip():
            continue
        row = parse_json_line(line, f"{path}:{number}")
        try:
            query, positives, negatives = row["query"], row["pos"], row.get("neg") or []
            if not (isinstance(positives, list) and isinstance(negatives, list)):
                raise TypeError
            if not all(isinstance(text, str) for text in (query, *positives, *negatives)):
                raise TypeError
            if not all(text.strip() for text in (query, *positives, *negatives)):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}:{number}: expected JSON with `query`, `pos` (list) and optional `neg`, "
                "and no empty text"
            ) from None
        without_passage += not positives
        yield from ((query, text, *negatives) for text in positives)
    if without_passage:
        logger.warning("%s: left out %d lines with an empty `pos`", path, without_passage)


def _join(queries: str, passages: str) -> Iterable[tuple[str, ...]]:
    """Yield (query, passage) with the texts of the passage ids."""
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
