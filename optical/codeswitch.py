"""Artificial code switching: English words replaced by translations from a lexicon.

The recipe of Litschko, Artemova and Plank (Findings of ACL 2023, arXiv 2305.05295): each word that
the lexicon knows is replaced with probability p; with several languages (their ML-CS) the language
is drawn anew for each word. Words that the lexicon does not know stay English, so the real rate of
replacement is below p.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from optical.files import read_lines

Lexicon = Mapping[str, Sequence[str]]
# English words with inner apostrophes and hyphens; everything between them is kept as it stands.
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


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


class CodeSwitcher:
    """Replace English words by lexicon translations, reproducibly.

    Args:
        lexicons: language code to lexicon (lower-case English word to its translations).
        probability: chance that a word with a translation is replaced, in [0, 1].
        seed: with the text's key, fixes every draw; equal on every machine and Python version.

    Example:
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
        """Return `text` with words replaced; `key` names the text, so its draws are its own."""
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
        """Share of running words in `texts` that at least one of the lexicons can translate."""
        words = [word.lower() for text in texts for word in WORD.findall(text)]
        known = sum(any(word in lexicon for lexicon in self.lexicons.values()) for word in words)
        return known / max(len(words), 1)
