"""The lexical baseline: BM25 over words, with the texts as they are or translated word by word.

Scores are those of the package ``bm25s`` (Lucene's variant of Robertson et al., TREC-3, 1994).
Words are cut by :func:`optical.data.lexicon.words`, with no stop words and no stemmer: seven languages
have neither in one quality.
"""

from __future__ import annotations

import logging

from optical.data.collection import Collection
from optical.data.lexicon import words
from optical.data.trec import Run, ranked


def search_bm25(
    collection: Collection, *, k1: float = 1.2, b: float = 0.75, depth: int = 1000
) -> Run:
    """Search a collection by BM25 and return the best ``depth`` documents per query.

    Args:
        collection: what to search; its texts may have been translated before.
        k1: saturation of a word's frequency.
        b: how much a document's length counts, from 0 to 1.
        depth: documents kept per query; those without a common word are never kept.

    Raises:
        ImportError: bm25s is not installed.
        ValueError: ``depth`` is not positive.
    """
    try:
        import bm25s
    except ImportError as error:
        raise ImportError(
            'BM25 needs bm25s; install it with `pip install "optical[eval]"`'
        ) from error
    if depth < 1:
        raise ValueError(f"depth must be at least 1, found {depth}")
    ids = list(collection.documents)
    texts = [words(text) for text in collection.documents.values()]
    run: Run = {query: {} for query in collection.queries}
    if not any(texts):
        return run
    # It logs every step, and sets its own level when it is imported.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    index = bm25s.BM25(k1=k1, b=b, method="lucene")
    index.index(texts, show_progress=False)
    for query, text in collection.queries.items():
        # A word that no document has is no error, but bm25s knows only its own vocabulary.
        known = [word for word in words(text) if word in index.vocab_dict]
        if not known:
            continue
        scores = index.get_scores(known)
        found = {ids[i]: float(scores[i]) for i in scores.nonzero()[0].tolist()}
        run[query] = dict(ranked(found)[:depth])
    return run
