"""Phrasebook: a small synthetic parallel corpus with exactly known relevance."""

from optical.phrasebook.corpus import (
    bitext,
    collection,
    lexicon,
    sentences,
    training_pairs,
    validation_bitext,
    write,
)

__all__ = [
    "bitext",
    "collection",
    "lexicon",
    "sentences",
    "training_pairs",
    "validation_bitext",
    "write",
]
