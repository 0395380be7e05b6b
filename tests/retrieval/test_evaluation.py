"""Evaluation agrees with trec_eval, counts all judged queries and breaks ties consistently."""

import json
import logging
import random
import shutil
import sys

import pytest

from optical.data.trec import read_run
from optical.retrieval.evaluation import DEFAULT_MEASURES, Evaluation, evaluate

pytest.importorskip("ir_measures", reason='needs pip install "optical-ot[eval]"')

QRELS = {"q1": {"a": 1, "b": 2, "c": 0}, "q2": {"a": 1}, "q3": {"a": 0}}
RUN = {"q1": {"c": 3.0, "b": 2.0, "x": 1.0, "a": 0.5}, "other": {"a": 1.0}}


def test_values_computed_by_hand():
    result = evaluate(RUN, QRELS, ["AP", "RR@10", "R@3", "P@1", "AP(rel=2)"])
    assert result.per_query == {
        "AP": {"q1": (1 / 2 + 2 / 4) / 2, "q2": 0.0},
        "RR@10": {"q1": 0.5, "q2": 0.0},
        "R@3": {"q1": 0.5, "q2": 0.0},
        "P@1": {"q1": 0.0, "q2": 0.0},
        "AP(rel=2)": {"q1": 0.5, "q2": 0.0},
    }
    assert result.mean == {"AP": 0.25, "RR@10": 0.25, "R@3": 0.25, "P@1": 0.0, "AP(rel=2)": 0.25}


def test_default_measures_and_synonyms():
    assert evaluate(RUN, QRELS).measures == DEFAULT_MEASURES
    other = evaluate(RUN, QRELS, "MAP NDCG@10, Recall@10,Recall@100 MRR@10")
    assert other == evaluate(RUN, QRELS)
    assert evaluate(RUN, QRELS, "MAP AP").measures == ("AP",)
    assert evaluate(RUN, QRELS, "P(rel=2, cutoff=5) AP").measures == ("P(rel=2)@5", "AP")


def test_missing_ignored_and_irrelevant_queries_are_reported(caplog):
    with caplog.at_level(logging.WARNING, "optical"):
        result = evaluate(RUN | {"q2": {}}, QRELS)
    assert result.queries == ("q1", "q2")
    assert (result.missing, result.ignored, result.without_relevant) == (("q2",), 1, ("q3",))
    for message in (
        "left out 1 queries without a relevant document",
        "ignored 1 queries of the run that have no judgements",
        "the run has no documents for 1 of 2 queries; they count 0",
    ):
        assert message in caplog.text


def test_empty_run_scores_zero():
    result = evaluate({}, QRELS)
    assert set(result.mean.values()) == {0.0}
    assert result.missing == ("q1", "q2")


def test_ties_are_broken_by_id_for_every_measure():
    """ir_measures alone gives AP 0.5 and RR@10 1.0 for this run."""
    tied = {"q1": {"a": 1.0, "z": 1.0}}
    assert set(evaluate(tied, {"q1": {"a": 1}}, "AP RR@10 P@1 R@1").mean.values()) == {0.5, 0.0}
    assert evaluate(tied, {"q1": {"z": 1}}, "AP RR@10 P@1 R@1").mean == {
        "AP": 1.0,
        "RR@10": 1.0,
        "P@1": 1.0,
        "R@1": 1.0,
    }
    # trec_eval uses float32 scores, in which these two are equal.
    close = {"q1": {"a": 1.0, "z": 1.0 - 1e-12}}
    assert evaluate(close, {"q1": {"a": 1}}, "AP").mean == {"AP": 0.5}


def test_scores_that_are_equal_in_float32_are_ties_as_in_trec_eval(tmp_path):
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="pytrec_eval is not installed")
    generator = random.Random(0)
    names = {"AP": "map", "nDCG@10": "ndcg_cut_10", "R@10": "recall_10"}
    for _ in range(25):
        scores = [
            generator.choice([0.97, 1e-30, -3.5]) + generator.random() * 1e-8 for _ in "x" * 30
        ]
        run = {f"q{i}": {f"d{j}": score for j, score in enumerate(scores)} for i in range(3)}
        for scores_of_query in run.values():
            shuffled = list(scores_of_query.values())
            generator.shuffle(shuffled)
            scores_of_query.update(zip(scores_of_query, shuffled, strict=True))
        qrels = {
            q: {f"d{j}": int(generator.random() < 0.2) for j in range(30)} | {"d0": 1} for q in run
        }
        evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"map", "ndcg_cut.10", "recall.10"})
        truth = evaluator.evaluate(run)
        lines = [f"{q} Q0 {d} 1 {s!r} t" for q, scores in run.items() for d, s in scores.items()]
        (tmp_path / "a.run").write_text("\n".join(lines))
        for tried in (run, read_run(tmp_path / "a.run")):
            found = evaluate(tried, qrels, list(names)).per_query
            for name, theirs in names.items():
                assert found[name] == {q: pytest.approx(truth[q][theirs], abs=1e-12) for q in run}


def test_values_equal_those_of_trec_eval():
    pytrec_eval = pytest.importorskip("pytrec_eval")
    qrels = {f"q{i}": {f"d{j}": (i * j) % 3 for j in range(1, 20)} for i in range(1, 8)}
    run = {q: {f"d{j}": float((7 * j) % 11) for j in range(1, 30)} for q in qrels}
    judged = {q: grades for q, grades in qrels.items() if max(grades.values())}
    truth = pytrec_eval.RelevanceEvaluator(judged, {"map", "ndcg_cut.10", "recall.10"})
    truth = truth.evaluate(run)
    found = evaluate(run, qrels).per_query
    for name, theirs in (("AP", "map"), ("nDCG@10", "ndcg_cut_10"), ("R@10", "recall_10")):
        assert found[name] == {q: pytest.approx(truth[q][theirs], abs=1e-12) for q in judged}


def test_table_and_json():
    result = evaluate(RUN, QRELS)
    table = result.to_table()
    assert "| AP | 0.2500 |" in table
    assert table.endswith(
        "2 queries; 1 missing in the run count 0; 1 in the run without judgements ignored; "
        "1 without a relevant document left out\n"
    )
    assert Evaluation.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    assert "per_query" not in result.to_dict(per_query=False)


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        ("AP Foo", r"unknown measure 'Foo'; for example AP, nDCG@10, R@100, RR@10 or P@5"),
        ("nDCG@ten", r"unknown measure 'nDCG@ten'"),
        ("RR@0", r"unknown measure 'RR@0'"),
        ("AP(rel=", r"unknown measure 'AP\(rel='"),
        ("P(nonsense=1)@5", r"unknown measure 'P\(nonsense=1\)@5'"),
        ("BPM", r"measure 'BPM' is incomplete"),
        ("R", r"measure 'R' is incomplete; measures such as R, P and Success need a cutoff"),
        ("", r"no measure given; for example AP"),
        ([], r"no measure given"),
        ("alpha_nDCG@10", r"ir_measures cannot calculate one of alpha_nDCG@10: Unsupported"),
    ],
)
def test_invalid_measures_are_named_in_the_error(measures, message):
    with pytest.raises(ValueError, match=message) as caught:
        evaluate(RUN, QRELS, measures)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("qrels", [{}, {"q": {"a": 0}}, {"q": {}}])
def test_judgements_without_relevant_documents_are_refused(qrels):
    with pytest.raises(ValueError, match="judged queries has a relevant document"):
        evaluate(RUN, qrels)


def test_missing_ir_measures_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    with pytest.raises(ImportError, match=r'pip install "optical-ot\[eval\]"'):
        evaluate(RUN, QRELS)


@pytest.mark.parametrize(
    ("run", "qrels", "message"),
    [
        ({"q": {"a": float("nan")}}, {"q": {"a": 1}}, "run: the score of document 'a' .* is NaN"),
        (
            {"q": {"a": 1.0}},
            {"q": {"a": 0.5}},
            "qrels: the grade of document 'a' .* is 0.5",
        ),
        ({"q": {"a": 1.0}}, {"q": {"a": "1"}}, "qrels: the grade of document 'a' .* is '1'"),
        # trec_eval would count a thousand million grades.
        ({"q": {"a": 1.0}}, {"q": {"a": 10**9}}, "is 1000000000, expected a whole number up to"),
    ],
)
def test_values_that_no_measure_can_use_are_refused(run, qrels, message):
    with pytest.raises(ValueError, match=message):
        evaluate(run, qrels, "AP")


@pytest.mark.skipif(shutil.which("perl") is None, reason="ERR is computed by a Perl script")
def test_query_ids_of_any_form_are_kept_apart():
    """gdeval.pl refuses ids without a number, and reads `sw-1` and `fi-1` as one query."""
    qrels = {"sw-1": {"a": 2, "b": 1}, "fi-1": {"a": 1}, "q\u00e4": {"a": 1}}
    run = {"sw-1": {"a": 2.0, "b": 1.0}, "fi-1": {"x": 2.0, "a": 1.0}, "q\u00e4": {"a": 1.0}}
    found = evaluate(run, qrels, "ERR@20").per_query["ERR@20"]
    alone = {
        key: evaluate({"1": run[key]}, {"1": qrels[key]}, "ERR@20").mean["ERR@20"] for key in run
    }
    assert found == alone and found["sw-1"] > found["q\u00e4"] > found["fi-1"]
