"""Mixed-language pools: merged rankings and the bias of a ranking between languages."""

import random

import pytest

from optical.study.pools import language_bias, merge_qrels, merge_runs

LANGUAGES = ("sw", "de")


def test_a_pool_is_one_ranking_by_score_of_common_queries():
    runs = {
        "sw": {"q": {"d1": 0.9, "d2": 0.1}, "only": {"d1": 1.0}},
        "de": {"q": {"d1": 0.5, "d3": 0.95}},
    }
    pooled = merge_runs(runs)
    assert list(pooled) == ["q"]
    assert list(pooled["q"].items()) == [
        ("de:d3", 0.95), ("sw:d1", 0.9), ("de:d1", 0.5), ("sw:d2", 0.1)
    ]  # fmt: skip
    judged = merge_qrels(
        {"sw": {"q": {"d1": 2, "d2": 0}, "only": {"d1": 1}}, "de": {"q": {"d1": 1}}}
    )
    assert judged == {"q": {"sw:d1": 2, "sw:d2": 0, "de:d1": 1}}


def test_bias_of_a_ranking_by_hand():
    # Two relevant documents in Swahili, one in German; the German one is first, one is missing.
    run = {"q": {"de:a": 4.0, "sw:x": 3.0, "sw:a": 2.0, "de:x": 1.0}}
    qrels = {"q": {"sw:a": 1, "sw:b": 1, "de:a": 3, "de:x": 0}}
    found = language_bias(run, qrels, LANGUAGES)
    assert found["sw"]["share"] == found["de"]["share"] == 0.5
    assert found["sw"]["relevant"] == pytest.approx(2 / 3)
    # Places of the three: German 1/6; Swahili 3/6 and, not retrieved, 5/6.
    assert found["de"]["rank"] == pytest.approx(0.5 - 1 / 6)
    assert found["sw"]["rank"] == pytest.approx(0.5 - 4 / 6)


def test_extremes_and_balance():
    def bias(order):
        run = {"q": {docid: float(len(order) - i) for i, docid in enumerate(order)}}
        qrels = {"q": dict.fromkeys(order, 1)}
        return language_bias(run, qrels, LANGUAGES)

    swahili, german = ([f"{x}:{i}" for i in range(20)] for x in LANGUAGES)
    found = bias([*swahili, *german])
    assert (found["sw"]["share"], found["de"]["share"]) == (1.0, 0.0)
    assert (found["sw"]["rank"], found["de"]["rank"]) == pytest.approx((0.25, -0.25))
    balanced = bias([one for pair in zip(swahili, german, strict=True) for one in pair])
    assert balanced["sw"]["share"] == 0.5
    assert abs(balanced["sw"]["rank"]) == pytest.approx(0.0125)


def test_queries_without_a_result_have_no_bias():
    qrels = {query: {"sw:a": 1, "de:a": 1} for query in ("answered", "not")}
    nothing = language_bias({}, qrels, LANGUAGES)
    assert nothing["sw"] == {"share": None, "relevant": 0.5, "rank": None}
    found = language_bias({"answered": {"sw:a": 1.0}, "not": {}}, qrels, LANGUAGES)
    assert (found["sw"]["share"], found["de"]["share"]) == (1.0, 0.0)
    assert (found["sw"]["rank"], found["de"]["rank"]) == pytest.approx((0.25, -0.25))
    # A language without relevant documents has no places.
    only = language_bias({"q": {"sw:a": 1.0}}, {"q": {"sw:a": 1}}, LANGUAGES)
    assert only["de"] == {"share": 0.0, "relevant": 0.0, "rank": None}


def test_a_ranking_that_does_not_see_the_language_has_no_bias():
    draw = random.Random(0)
    documents = [f"{x}:{i}" for x in LANGUAGES for i in range(30)]
    run, qrels = {}, {}
    for query in range(400):
        draw.shuffle(documents)
        run[f"q{query}"] = {docid: 60.0 - i for i, docid in enumerate(documents)}
        qrels[f"q{query}"] = {f"{x}:{i}": 1 for x in LANGUAGES for i in range(3)}
    for own in language_bias(run, qrels, LANGUAGES).values():
        assert own["share"] == pytest.approx(0.5, abs=0.02)
        assert own["rank"] == pytest.approx(0.0, abs=0.03)
