"""BM25: scores match the formula, and runs are in the usual order."""

import math

import pytest

pytest.importorskip("bm25s", reason="needs the extra `eval`")

from optical.data.collection import Collection
from optical.data.lexicon import tokenize_words
from optical.retrieval.bm25 import search_bm25

DOCUMENTS = {
    "d1": "the red book and the blue book",
    "d2": "a red cup",
    "d3": "",
    "d4": "किताब लाल",
    "d5": "a red cup",
}
QUERIES = {"q1": "red book", "q2": "nothing here", "q3": "", "q4": "लाल"}


def collection():
    return Collection("tiny", QUERIES, DOCUMENTS, {"q1": {"d1": 1}})


@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (2.0, 0.0)])
def test_scores_match_the_formula(k1, b):
    texts = {docid: tokenize_words(text) for docid, text in DOCUMENTS.items()}
    mean = sum(map(len, texts.values())) / len(texts)

    def score(query, text):
        total = 0.0
        for word in tokenize_words(query):
            holds = sum(word in other for other in texts.values())
            if not holds:
                continue
            idf = math.log(1 + (len(texts) - holds + 0.5) / (holds + 0.5))
            count = text.count(word)
            total += idf * count / (count + k1 * (1 - b + b * len(text) / mean))
        return total

    run = search_bm25(collection(), k1=k1, b=b)
    for query, found in run.items():
        expected = {d: score(QUERIES[query], text) for d, text in texts.items()}
        assert found == {d: pytest.approx(s, rel=1e-5) for d, s in expected.items() if s}


def test_order_depth_and_queries_without_matching_words():
    run = search_bm25(collection())
    # Documents with equal scores are in descending order of their ids.
    assert list(run["q1"]) == ["d1", "d5", "d2"]
    assert run["q2"] == run["q3"] == {} and list(run["q4"]) == ["d4"]
    assert list(search_bm25(collection(), depth=2)["q1"]) == ["d1", "d5"]
    nothing = Collection("none", {"q": "a"}, {"d": "..."}, {"q": {"d": 1}})
    assert search_bm25(nothing) == {"q": {}}
    with pytest.raises(ValueError, match="depth must be at least 1, found 0"):
        search_bm25(collection(), depth=0)
