"""Bilingual lexicons: read, write, induce from bitext, translate and code-switch with them.

A lexicon file has lines ``English TAB foreign [TAB probability]``. A lexicon translates texts word
by word for lexical search, and replaces words in code switching. Where no dictionary exists, bitext
provides one: :func:`induce_lexicon` by IBM model 1, :func:`lexicon_from_links` by counting the
links of any word alignment, for example of transport plans.
"""

from __future__ import annotations

import collections
import random
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

from optical.data.formats import is_bitext_header, skip_header
from optical.io.files import read_lines, write_text

# Lower-case English word to its translations, the most probable first.
Lexicon = Mapping[str, Sequence[str]]
# English word, foreign word, probability of the foreign word given the English one.
Entry = tuple[str, str, float]


def tokenize_words(text: str) -> list[str]:
    """Split a text into lower-case words: runs of letters, combining marks and digits.

    Combining marks belong to words, unlike in regular expressions' ``\\w``: vowel signs in the
    middle of a Hindi or Marathi word are combining marks.

    Examples:
        >>> tokenize_words("Don't panic: 42 किताबें!")
        ['don', 't', 'panic', '42', 'किताबें']
    """
    return "".join(map(_word_character, text.lower())).split()


def share_unseen(texts: Iterable[str], known: Iterable[str]) -> float:
    """Return the share of the running words of texts that no known text contains, from 0 to 1."""
    vocabulary = {word for text in known for word in tokenize_words(text)}
    words = [word for text in texts for word in tokenize_words(text)]
    return sum(word not in vocabulary for word in words) / max(len(words), 1)


@cache
def _word_character(character: str) -> str:
    """Return the character if it belongs to words, else a space."""
    return character if unicodedata.category(character)[0] in "LMN" else " "


def read_lexicon(path: str | Path) -> dict[str, list[str]]:
    """Read a bilingual lexicon with lines ``English TAB foreign [TAB anything]``.

    The file may be compressed. If its first line has no TAB but two words, as in the dictionaries
    of MUSE, every line has two words separated by spaces. A header line is skipped. English is
    lower-cased. An English word with several translations has several lines; duplicates are
    removed. English phrases are kept, but functions that look up single words never match them.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: wrong column count, invalid UTF-8 or no entry; the message names file and line.
    """
    lexicon: dict[str, list[str]] = {}
    separator: str | None = ""
    for number, line in read_lines(path):
        if not line.strip():
            continue
        first = separator == ""
        if first:
            separator = None if "\t" not in line and len(line.split()) == 2 else "\t"
        columns = [column.strip() for column in line.split(separator)]
        if first and is_bitext_header(columns):
            skip_header(path, number, line)
            continue
        wrong = len(columns) < 2 or (separator is None and len(columns) > 2)
        if wrong or not columns[0] or not columns[1]:
            raise ValueError(
                f"{path}:{number}: expected `English TAB foreign`, found {line[:60]!r}"
            )
        translations = lexicon.setdefault(columns[0].lower(), [])
        if columns[1] not in translations:
            translations.append(columns[1])
    if not lexicon:
        raise ValueError(f"{path}: an empty lexicon; expected lines `English TAB foreign`")
    return lexicon


def write_lexicon(entries: Iterable[Entry], path: str | Path) -> None:
    """Write a lexicon that :func:`read_lexicon` reads, most probable translations first.

    Raises:
        ValueError: there is no entry.
    """
    ordered = sorted(entries, key=lambda entry: (entry[0], -entry[2], entry[1]))
    if not ordered:
        raise ValueError(
            f"{path}: no pair of words is probable enough for a lexicon; lower least_probability "
            "or least_count, or provide more sentence pairs"
        )
    write_text(path, "".join(f"{e}\t{f}\t{p:.3f}\n" for e, f, p in ordered))


def invert_lexicon(lexicon: Lexicon) -> dict[str, list[str]]:
    """Return the lexicon of the opposite direction, from lower-case foreign words to English.

    Translations keep the order in which the lexicon lists them.
    """
    inverse: dict[str, list[str]] = {}
    for english, translations in lexicon.items():
        for foreign in translations:
            inverse.setdefault(foreign.lower(), []).append(english)
    return inverse


def translate(text: str, lexicon: Lexicon, *, senses: int = 1) -> str:
    """Translate word by word: each word becomes its first `senses` translations.

    Words outside the lexicon are kept, since most of them are names, which lexical search matches
    across languages.

    Examples:
        >>> translate("Cold water, Nairobi", {"cold": ["baridi"], "water": ["maji", "mvua"]})
        'baridi maji nairobi'
    """
    return " ".join(
        translation
        for word in tokenize_words(text)
        for translation in list(lexicon.get(word, ()))[:senses] or [word]
    )


def induce_lexicon(
    bitext: Iterable[tuple[str, str]],
    *,
    iterations: int = 6,
    least_probability: float = 0.3,
    least_count: int = 3,
) -> list[Entry]:
    """Induce a lexicon from (English, foreign) sentence pairs by IBM model 1.

    Args:
        bitext: sentence pairs.
        iterations: rounds of expectation and maximisation.
        least_probability: minimum probability of an entry.
        least_count: minimum number of sentence pairs that contain an entry's English word.

    Raises:
        ValueError: no pair has words on both sides.

    Source: Brown et al., "The Mathematics of Statistical Machine Translation" (1993), section 4.2.

    Examples:
        >>> bitext = [("red book", "kitabu nyekundu"), ("red", "nyekundu"), ("book", "kitabu")] * 3
        >>> [(e, f) for e, f, _ in induce_lexicon(bitext)]
        [('book', 'kitabu'), ('red', 'nyekundu')]
    """
    from optical.data.ibm_model_1 import ibm_model_1

    entries = ibm_model_1(
        ((tokenize_words(english), tokenize_words(foreign)) for english, foreign in bitext),
        iterations=iterations,
        least_probability=least_probability,
        least_count=least_count,
    )
    return sorted(entries)


def lexicon_from_links(
    links: Iterable[tuple[str, str, float]],
    *,
    least_probability: float = 0.3,
    least_count: float = 3.0,
) -> list[Entry]:
    """Build a lexicon from weighted links (English word, foreign word, weight).

    The probability of a foreign word is its share of the weight of the English word's links.
    English words whose links weigh less than `least_count` in total are left out.

    Examples:
        >>> lexicon_from_links([("book", "kitabu", 3.0), ("book", "cha", 1.0)])
        [('book', 'kitabu', 0.75)]
    """
    weights: dict[str, collections.Counter[str]] = {}
    for english, foreign, weight in links:
        of_word: collections.Counter[str] = weights.setdefault(english, collections.Counter())
        of_word[foreign] += weight  # type: ignore[assignment]
    return sorted(
        (english, foreign, weight / total)
        for english, of_word in weights.items()
        if (total := sum(of_word.values())) >= least_count
        for foreign, weight in of_word.items()
        if weight >= least_probability * total
    )


# English words with inner apostrophes and hyphens; text between words is left unchanged.
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


class CodeSwitcher:
    """Replace English words by lexicon translations, reproducibly.

    Args:
        lexicons: language code to lexicon.
        probability: probability of replacing a word that has a translation, in [0, 1].
        seed: together with the key of a text, determines every draw, on any machine and Python
            version.

    Examples:
        >>> switch = CodeSwitcher({"sw": {"water": ["maji"]}}, probability=1.0, seed=0)
        >>> switch("Cold Water, please", key=7)
        'Cold maji, please'
    """

    def __init__(
        self, lexicons: Mapping[str, Lexicon], *, probability: float = 0.5, seed: int = 0
    ) -> None:
        if not lexicons:
            raise ValueError("lexicons: none given, expected at least one language")
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"probability: {probability}, expected a number from 0 to 1")
        self.lexicons = dict(lexicons)
        self.languages = sorted(self.lexicons)
        self.probability = probability
        self.seed = seed

    def __call__(self, text: str, key: int | str) -> str:
        """Return `text` with words replaced; `key` identifies the text and seeds its draws."""
        draw = random.Random(f"{self.seed}:{key}")

        def replace(match: re.Match[str]) -> str:
            word = match.group()
            if draw.random() >= self.probability:
                return word
            language = self.languages[draw.randrange(len(self.languages))]
            translations = self.lexicons[language].get(word.lower())
            return translations[draw.randrange(len(translations))] if translations else word

        return WORD.sub(replace, text)

    def coverage(self, texts: Sequence[str]) -> float:
        """Return the fraction of words in `texts` that at least one lexicon can translate."""
        words = [word.lower() for text in texts for word in WORD.findall(text)]
        covered = sum(any(word in lexicon for lexicon in self.lexicons.values()) for word in words)
        return covered / max(len(words), 1)
