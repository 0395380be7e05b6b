"""Readers and writers of texts, bitext, lexicons, collections and TREC files."""

from optical.data.collection import Collection, load_collection
from optical.data.lexicon import (
    CodeSwitcher,
    induce_lexicon,
    read_lexicon,
    translate,
    write_lexicon,
)
from optical.data.pairs import read_bitext, read_bitext_pairs, read_training_pairs
from optical.data.texts import iter_texts, read_texts
from optical.data.trec import read_qrels, read_run, write_run

__all__ = [
    "CodeSwitcher",
    "Collection",
    "induce_lexicon",
    "iter_texts",
    "load_collection",
    "read_bitext",
    "read_bitext_pairs",
    "read_lexicon",
    "read_qrels",
    "read_run",
    "read_texts",
    "read_training_pairs",
    "translate",
    "write_lexicon",
    "write_run",
]
