"""BM25, the lexical baseline, over original or word-by-word translated texts.

Scores are those of the package ``bm25s`` (Lucene's variant of Robertson et al., TREC-3, 1994).
Words come from :func:`optical.data.lexicon.tokenize_words`, without stop words or stemming, because
no stop list and no stemmer of uniform quality covers all seven languages.
"""

from __future__ import annotations

import logging

from optical.data.collection import Collection
from optical.data.lexicon import tokenize_words
from optical.data.trec import Run, ranked
from optical.io.environment import require


def search_bm25(
    collection: Collection, *, k1: float = 1.2, b: float = 0.75, depth: int = 1000
) -> Run:
    """Search a collection by BM25 and return the best ``depth`` documents per query.

    Args:
        collection: queries and documents, which may have been translated before.
        k1: saturation of term frequency.
        b: strength of length normalisation, from 0 to 1.
        depth: documents returned per query; documents that share no word with it are left out.

    Raises:
        ImportError: bm25s is not installed (extra ``eval``).
        ValueError: ``depth`` is not positive.
    """
    bm25s = require("bm25s", "eval", "BM25")
    if depth < 1:
        raise ValueError(f"depth must be at least 1, found {depth}")
    ids = list(collection.documents)
    texts = [tokenize_words(text) for text in collection.documents.values()]
    run: Run = {qid: {} for qid in collection.queries}
    if not any(texts):
        return run
    # bm25s logs every step and sets its own log level on import.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    index = bm25s.BM25(k1=k1, b=b, method="lucene")
    index.index(texts, show_progress=False)
    for qid, text in collection.queries.items():
        # bm25s raises an error for words outside its vocabulary.
        words = [word for word in tokenize_words(text) if word in index.vocab_dict]
        if not words:
            continue
        scores = index.get_scores(words)
        document_scores = {ids[i]: float(scores[i]) for i in scores.nonzero()[0].tolist()}
        run[qid] = dict(ranked(document_scores)[:depth])
    return run
