"""Fusion of runs."""

from optical.retrieval.fusion import mean_scores


def test_documents_that_a_run_lacks_have_its_lowest_score():
    one = {"q": {"a": 3.0, "b": 1.0}}
    other = {"q": {"c": 2.0, "a": 1.0, "b": -4.0}}
    fused = mean_scores([one, other])["q"]
    assert list(fused.items()) == [("a", 2.0), ("c", 1.5), ("b", -1.5)]


def test_the_depth_counts_after_fusion():
    runs = [{"q": {"a": 3.0, "b": 2.0}}, {"q": {"b": 3.0, "a": 0.0}}]
    assert mean_scores(runs, depth=1) == {"q": {"b": 2.5}}


def test_runs_without_documents_of_a_query_do_not_lower_it():
    runs = [{"q": {"a": 2.0}, "p": {}}, {"p": {}}]
    assert mean_scores(runs) == {"q": {"a": 2.0}, "p": {}}


def test_equal_means_are_in_descending_order_of_ids():
    assert list(mean_scores([{"q": {"a": 1.0, "b": 1.0}}])["q"]) == ["b", "a"]
