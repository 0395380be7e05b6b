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

from optical.lexicon import Lexicon

# English words with inner apostrophes and hyphens; everything between them is kept as it stands.
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


class CodeSwitcher:
    """Replace English words by lexicon translations, reproducibly.

    Args:
        lexicons: language code to lexicon (lower-case English word to its translations).
        probability: chance that a word with a translation is replaced, in [0, 1].
        seed: with the text's key, fixes every draw; equal on every machine and Python version.

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
