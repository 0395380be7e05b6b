"""Word tables: read from a file or learnt from parallel sentences, to translate word by word.

A table is ``English TAB foreign [TAB probability]`` a line. It translates texts for a lexical
search and replaces words in code switching. Where no dictionary exists, parallel sentences give
one: :func:`induce` by IBM model 1, :func:`from_links` by counting the links of any word alignment,
of transport plans for one.
"""

from __future__ import annotations

import collections
import unicodedata
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from optical.files import read_lines, write_text

Lexicon = Mapping[str, Sequence[str]]
Unit = TypeVar("Unit", bound=Hashable)
# English word, foreign word, probability of the foreign word given the English one.
Entry = tuple[str, str, float]
# Words of a sentence that IBM model 1 looks at: longer ones cost their square and teach little.
LONGEST = 60


def words(text: str) -> list[str]:
    """Cut a text into lower-case words: runs of letters, marks and digits.

    Combining marks are part of words, which regular expressions' ``\\w`` forgets: vowel signs in
    the middle of a Hindi or Marathi word are such marks.

    Examples:
        >>> words("Don't panic: 42 किताबें!")
        ['don', 't', 'panic', '42', 'किताबें']
    """
    return "".join(map(_letter, text.lower())).split()


@cache
def _letter(character: str) -> str:
    return character if unicodedata.category(character)[0] in "LMN" else " "


def read_lexicon(path: str | Path) -> dict[str, list[str]]:
    """Read a bilingual lexicon, ``English TAB foreign [TAB anything]`` a line, plain or gzip.

    English is lower-cased; an entry with several translations stands in several lines; repetitions
    are kept once. Entries of several English words are kept but match single words only where they
    have no space.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: wrong column count, not UTF-8 or no entry; the message names file and line.
    """
    entries: dict[str, list[str]] = {}
    for number, line in read_lines(path):
        if not line.strip():
            continue
        columns = [column.strip() for column in line.split("\t")]
        if len(columns) < 2 or not columns[0] or not columns[1]:
            raise ValueError(
                f"{path}:{number}: expected `English TAB foreign`, found {line[:60]!r}"
            )
        translations = entries.setdefault(columns[0].lower(), [])
        if columns[1] not in translations:
            translations.append(columns[1])
    if not entries:
        raise ValueError(f"{path}: an empty lexicon; expected lines `English TAB foreign`")
    return entries


def write_lexicon(entries: Iterable[Entry], path: str | Path) -> None:
    """Write a table that :func:`read_lexicon` reads; the likeliest translation of a word first.

    Raises:
        ValueError: there is no entry.
    """
    ordered = sorted(entries, key=lambda entry: (entry[0], -entry[2], entry[1]))
    if not ordered:
        raise ValueError(
            f"{path}: no pair of words is probable enough for a table; lower least_probability or "
            "least_count, or give more sentence pairs"
        )
    write_text(path, "".join(f"{e}\t{f}\t{p:.3f}\n" for e, f, p in ordered))


def inverted(lexicon: Lexicon) -> dict[str, list[str]]:
    """The table of the other direction: foreign words to English ones, in the table's order."""
    turned: dict[str, list[str]] = {}
    for english, translations in lexicon.items():
        for foreign in translations:
            turned.setdefault(foreign.lower(), []).append(english)
    return turned


def translate(text: str, lexicon: Lexicon, *, senses: int = 1) -> str:
    """Translate word by word: each known word becomes its first `senses` translations.

    Unknown words stay: most are names, which a lexical search finds as they are.

    Examples:
        >>> translate("Cold water, Nairobi", {"cold": ["baridi"], "water": ["maji", "mvua"]})
        'baridi maji nairobi'
    """
    return " ".join(
        translation
        for word in words(text)
        for translation in list(lexicon.get(word, ()))[:senses] or [word]
    )


def induce(
    pairs: Iterable[tuple[str, str]],
    *,
    iterations: int = 6,
    least_probability: float = 0.3,
    least_count: int = 3,
) -> list[Entry]:
    """Learn a word table from (English, foreign) sentence pairs by IBM model 1.

    Expectation maximisation of p(foreign word | English word) under alignments that ignore order,
    with an empty English word for what has no counterpart.

    Args:
        pairs: parallel sentences.
        iterations: rounds of expectation and maximisation.
        least_probability: entries below are left out.
        least_count: English words that occur in fewer sentence pairs are left out.

    Raises:
        ValueError: no pair with words on both sides.

    Source: Brown et al., "The Mathematics of Statistical Machine Translation" (1993), section 4.2.

    Examples:
        >>> pairs = [("red book", "kitabu nyekundu"), ("red", "nyekundu"), ("book", "kitabu")] * 3
        >>> [(e, f) for e, f, _ in induce(pairs)]
        [('book', 'kitabu'), ('red', 'nyekundu')]
    """
    found = model_1(
        ((words(one), words(other)) for one, other in pairs),
        iterations=iterations,
        least_probability=least_probability,
        least_count=least_count,
    )
    return sorted(found)


def model_1(
    pairs: Iterable[tuple[Sequence[Unit], Sequence[Unit]]],
    *,
    iterations: int,
    least_probability: float,
    least_count: int = 1,
) -> list[tuple[Unit, Unit, float]]:
    """IBM model 1 over pairs of sequences of anything: (one, other, p(other | one)), unsorted.

    Raises:
        ValueError: no pair with something on both sides.
    """
    # Nothing equals this object, so no unit is taken for what has no counterpart.
    nothing: Any = object()
    left, right = _Vocabulary[Unit](), _Vocabulary[Unit]()
    empty = left.number(nothing)
    # One slot for every right unit of the pairs, with a candidate for each unit that may have made
    # it: the slot's candidates share a probability of one.
    sources: list[int] = []
    targets: list[int] = []
    widths: list[int] = []
    occurrences: collections.Counter[int] = collections.Counter()
    for one, other in pairs:
        e = [empty, *map(left.number, one[:LONGEST])]
        occurrences.update(set(e))
        for f in map(right.number, other[:LONGEST]):
            sources += e
            targets.append(f)
            widths.append(len(e))
    if len(left) < 2 or not len(right):
        raise ValueError("no sentence pair with words on both sides; expected at least one")

    width = torch.tensor(widths, dtype=torch.int32)
    slot = torch.repeat_interleave(torch.arange(len(widths), dtype=torch.int32), width)
    source = torch.tensor(sources, dtype=torch.int32)
    target = torch.repeat_interleave(torch.tensor(targets, dtype=torch.int32), width)
    keys, candidate = torch.unique(source.long() * len(right) + target.long(), return_inverse=True)
    source, target = keys // len(right), keys % len(right)
    probability = torch.ones(len(keys))
    for _ in range(iterations):
        likely = probability[candidate]
        share = likely / _sums(likely, slot, len(widths))[slot.long()]
        expected = _sums(share, candidate, len(keys))
        probability = expected / _sums(expected, source, len(left))[source]

    kept = (probability >= least_probability) & (source != empty)
    found = zip(*(x[kept].tolist() for x in (source, target, probability)), strict=True)
    return [
        (left.units[e], right.units[f], p) for e, f, p in found if occurrences[e] >= least_count
    ]


def from_links(
    links: Iterable[tuple[str, str, float]],
    *,
    least_probability: float = 0.3,
    least_count: float = 3.0,
) -> list[Entry]:
    """Make a word table of weighted links (English word, foreign word, weight).

    The probability of a foreign word is its share in the weight of the English word's links;
    English words whose links weigh less than `least_count` are left out.

    Examples:
        >>> from_links([("book", "kitabu", 3.0), ("book", "cha", 1.0)])
        [('book', 'kitabu', 0.75)]
    """
    weight: dict[str, collections.Counter[str]] = {}
    for english, foreign, mass in links:
        counted: collections.Counter[str] = weight.setdefault(english, collections.Counter())
        counted[foreign] += mass  # type: ignore[assignment]
    return sorted(
        (english, foreign, mass / total)
        for english, counted in weight.items()
        if (total := sum(counted.values())) >= least_count
        for foreign, mass in counted.items()
        if mass >= least_probability * total
    )


class _Vocabulary(Generic[Unit]):
    """Units and their numbers, in the order in which they were met."""

    def __init__(self) -> None:
        self.units: list[Unit] = []
        self._number: dict[Unit, int] = {}

    def __len__(self) -> int:
        return len(self.units)

    def number(self, unit: Unit) -> int:
        found = self._number.setdefault(unit, len(self.units))
        if found == len(self.units):
            self.units.append(unit)
        return found


def _sums(values: Tensor, index: Tensor, size: int) -> Tensor:
    # bincount adds in order on a CPU, so equal input gives equal bits.
    return torch.bincount(index, weights=values, minlength=size)
