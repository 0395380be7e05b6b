"""Tests, intervals and corrections agree with enumeration, scipy and values computed by hand."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from optical.retrieval.evaluation import Evaluation, compare
from optical.retrieval.statistics import correct, interval, paired_test, resampled_indices

np = pytest.importorskip("numpy")


def pair(n, shift=0.0, seed=0):
    generator = np.random.default_rng(seed)
    second = generator.random(n)
    return second + generator.normal(shift, 0.1, n), second


def by_query(values):
    return {f"q{i}": float(value) for i, value in enumerate(values)}


# --- the randomisation test ----------------------------------------------------------------------


def test_p_values_computed_by_hand():
    """For (0.4, 0.6, 0.5), only 2 of 8 sign patterns reach 1.5: all plus and all minus."""
    assert paired_test([0.5, 0.9, 0.7], [0.1, 0.3, 0.2]).p == 2 / 8
    # (0.1, 0.2, -0.3) sums to 0, which every pattern reaches.
    assert paired_test([0.1, 0.2, 0.0], [0.0, 0.0, 0.3]).p == 1.0
    # All four patterns of (3, -1) reach 2; two of eight patterns of (3, 1, 1) reach 5.
    assert paired_test([3, 0], [0, 1]).p == 1.0
    assert paired_test([3, 1, 1], [0, 0, 0]).p == 0.25


@pytest.mark.parametrize("n", [1, 5, 8, 9, 16])
def test_enumeration_is_exact(n):
    first, second = pair(n, 0.03)
    x = first - second
    patterns = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    sums = np.abs(patterns @ x)
    assert paired_test(first, second).p == (sums >= abs(x.sum()) - 1e-12).mean()


@pytest.mark.parametrize("n", [12, 40, 281])
def test_randomization_test_agrees_with_scipy(n):
    stats = pytest.importorskip("scipy.stats")
    first, second = pair(n, 0.002, seed=3)
    theirs = stats.permutation_test(
        (first - second,),
        lambda x, axis: x.mean(axis=axis),
        vectorized=True,
        permutation_type="samples",
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    ).pvalue
    ours = paired_test(first, second).p
    assert 0.01 < ours < 0.99
    assert ours == pytest.approx(theirs, abs=1e-12 if n == 12 else 0.015)


def test_samples_agree_with_enumeration(monkeypatch):
    first, second = pair(15, 0.03, seed=5)
    exact = paired_test(first, second).p
    monkeypatch.setattr("optical.retrieval.statistics.EXACT_QUERIES", 0)
    sampled = paired_test(first, second)
    assert sampled.p != exact
    assert sampled.p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 100_000))


def test_p_is_never_zero():
    first, second = pair(200, shift=5.0)
    assert paired_test(first, second, samples=999).p == 1 / 1000
    assert paired_test([1.0] * 16, [0.0] * 16).p == 2 / 2**16
    assert paired_test(first, second, test="t").p > 0
    assert paired_test([1.0] * 5, [0.0] * 5, test="t").p > 0
    for test in ("randomization", "t"):
        assert paired_test(first, first, test=test).p == 1.0


@pytest.mark.parametrize("test", ["randomization", "t"])
def test_under_the_null_five_percent_are_below_five_percent(test):
    generator = np.random.default_rng(7)
    below = sum(
        paired_test(*generator.random((2, 30)), test=test, samples=999).p <= 0.05
        for _ in range(400)
    )
    # Binomial(400, 0.05): mean 20, standard deviation 4.4.
    assert 8 <= below <= 33


def test_p_depends_only_on_values_and_seed():
    first, second = pair(60, 0.02)
    usual = paired_test(first, second)
    assert paired_test(first, second) == usual
    order = np.random.default_rng(1).permutation(60)
    shuffled = paired_test(first[order], second[order])
    assert (shuffled.p, shuffled.low, shuffled.high) == (usual.p, usual.low, usual.high)
    reverse = paired_test(second, first)
    assert reverse.p == usual.p
    assert (reverse.difference, reverse.low, reverse.high) == (
        -usual.difference,
        -usual.high,
        -usual.low,
    )
    named = paired_test(by_query(first), dict(reversed(by_query(second).items())))
    assert (named.p, named.low) == (usual.p, usual.low)
    other = paired_test(first, second, seed=1)
    assert other.p != usual.p
    assert other.p == pytest.approx(usual.p, abs=0.01)


def test_p_is_equal_across_processes():
    first, second = pair(60, 0.02)
    code = (
        "import json, sys; from optical.retrieval.statistics import paired_test; "
        "print(repr(tuple(paired_test(*json.load(sys.stdin)))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([list(first), list(second)]),
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": "5"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stdout.strip() == repr(tuple(paired_test(first, second)))


def test_t_test_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    first, second = pair(40, 0.02)
    ours = paired_test(first, second, test="t").p
    assert ours == pytest.approx(stats.ttest_rel(first, second).pvalue, rel=1e-9)


# --- intervals -----------------------------------------------------------------------------------


def test_interval_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(2).beta(0.5, 1.0, 120)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    mean, low, high = interval(values)
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(theirs.low, abs=0.005)
    assert high == pytest.approx(theirs.high, abs=0.005)
    wide = interval(values, confidence=0.99)
    assert wide.low < low < mean < high < wide.high


def test_interval_has_the_nominal_coverage():
    generator = np.random.default_rng(4)
    covered = 0
    for _ in range(200):
        _, low, high = interval(generator.exponential(1.0, 60), resamples=500)
        covered += low <= 1.0 <= high
    assert 176 <= covered <= 198


def test_interval_of_few_or_equal_values():
    assert interval([0.25, 0.25, 0.25]) == (0.25, 0.25, 0.25)
    mean, low, high = interval({"q": 0.5})
    assert mean == 0.5
    assert math.isnan(low)
    assert math.isnan(high)
    assert interval([0.1, 0.9, 0.4]) == interval([0.9, 0.4, 0.1])


def test_block_size_does_not_affect_the_resampled_indices(monkeypatch):
    whole = np.concatenate(list(resampled_indices(np.random.default_rng(3), 7, 100)))
    monkeypatch.setattr("optical.retrieval.statistics._BLOCK", 50)
    blocks = list(resampled_indices(np.random.default_rng(3), 7, 100))
    assert len(blocks) == 15 and (np.concatenate(blocks) == whole).all()
    assert (np.random.default_rng(3).integers(7, size=(100, 7)) == whole).all()


# --- Holm and the table --------------------------------------------------------------------------


def test_corrections_computed_by_hand():
    """Holm: sorted p-values times 5, 4, 3, 2, 1, then the running maximum."""
    assert correct([0.03, 0.5, 0.01, 0.04, 0.02]) == pytest.approx([0.09, 0.5, 0.05, 0.09, 0.08])
    assert correct([0.4, 0.6, 0.5]) == pytest.approx([1.0, 1.0, 1.0])
    assert correct([0.01, 0.04], "bonferroni") == pytest.approx([0.02, 0.08])
    assert correct([0.01, 0.04], "none") == [0.01, 0.04]
    assert correct([]) == []


def evaluation(ap, rr, missing=()):
    per_query = {"AP": by_query(ap), "RR@10": by_query(rr)}
    mean = {name: float(np.mean(list(each.values()))) for name, each in per_query.items()}
    return Evaluation(per_query, mean, missing=missing)


@pytest.fixture
def systems():
    base, _ = pair(50, seed=1)
    better, luck = base + 0.1, base + np.random.default_rng(2).normal(0, 0.1, 50)
    return {
        "bm25": evaluation(base, base),
        "ot": evaluation(better, luck, missing=("q3",)),
        "mse|x": evaluation(luck, base),
    }


def test_table_of_comparisons(systems):
    table = compare(systems)
    assert (table.baseline, table.correction, len(table.rows)) == ("bm25", "holm", 4)
    assert [(row.system, row.measure) for row in table.rows] == [
        ("ot", "AP"),
        ("ot", "RR@10"),
        ("mse|x", "AP"),
        ("mse|x", "RR@10"),
    ]
    first = table.rows[0]
    single = paired_test(systems["ot"].per_query["AP"], systems["bm25"].per_query["AP"])
    assert (first.p, first.difference, first.low) == (single.p, single.difference, single.low)
    assert first.difference == pytest.approx(0.1)
    assert first.mean == pytest.approx(first.baseline_mean + 0.1)
    assert (first.queries, first.missing) == (50, 1)
    assert [row.p_corrected for row in table.rows] == correct([row.p for row in table.rows])
    assert table.rows[3].p == 1.0
    markdown = table.to_markdown()
    assert "| AP | ot |" in markdown
    assert "| AP | mse\\|x |" in markdown
    assert "+0.1000 *" in markdown
    assert "| AP | bm25 (baseline) |" in markdown
    assert "Holm over 4 comparisons" in markdown
    assert "100000 samples, seed 0" in markdown
    assert json.loads(json.dumps(table.to_dict()))["rows"][0]["system"] == "ot"


def test_p_is_independent_of_other_rows(systems):
    backwards = dict(reversed(systems.items()))
    one = {(r.system, r.measure): r for r in compare(systems).rows}
    two = {(r.system, r.measure): r for r in compare(backwards, baseline="bm25").rows}
    assert one == two
    alone = compare({name: systems[name] for name in ("bm25", "ot")}, measures=["RR@10"])
    assert alone.rows[0].p == one["ot", "RR@10"].p


def test_one_query_has_no_interval():
    table = compare({"a": evaluation([0.5], [1.0]), "b": evaluation([0.7], [1.0])})
    assert "| – | 1.0000 |" in table.to_markdown()
    assert json.loads(json.dumps(table.to_dict(), allow_nan=False))["rows"][0]["low"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"baseline": "rm3"}, "unknown baseline 'rm3'; the systems are bm25, ot, mse"),
        ({"measures": ["MAP"]}, "system 'bm25' was not evaluated by 'MAP', only by AP, RR@10"),
        ({"measures": []}, "no measure to compare"),
        ({"test": "wilcoxon"}, "test must be one of randomization, t; found 'wilcoxon'"),
        ({"correction": "bh"}, "correction must be one of holm, bonferroni, none; found 'bh'"),
        ({"samples": 0}, "samples must be at least 1, found 0"),
        ({"confidence": 95}, "confidence must lie between 0 and 1, found 95"),
    ],
)
def test_invalid_comparisons_are_refused(systems, arguments, message):
    with pytest.raises(ValueError, match=message):
        compare(systems, **arguments)


def test_systems_with_different_queries_are_refused(systems):
    with pytest.raises(ValueError, match="at least two systems, found 1"):
        compare({"bm25": systems["bm25"]})
    fewer = evaluation([0.1] * 49, [0.1] * 49)
    with pytest.raises(
        ValueError, match=r"different queries \(1 are in only one of them.* 'q49'\)"
    ):
        compare({"bm25": systems["bm25"], "fewer": fewer})


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([0.1, 0.2], [0.1], "different numbers of queries: 2 and 1"),
        ({"q": 0.1}, {"r": 0.1}, "different queries: 2 are in only one of them, such as 'q'"),
        ({"q": 0.1}, [0.1], "both systems must be mappings"),
        ([], [], "first must be a list of at least one value"),
        ([0.1, float("nan")], [0.1, 0.2], "first must be finite numbers"),
    ],
)
def test_unpaired_values_are_refused(first, second, message):
    with pytest.raises(ValueError, match=message):
        paired_test(first, second)


def test_invalid_arguments_are_refused():
    with pytest.raises(ValueError, match="a p-value must lie between 0 and 1"):
        correct([1.5])
    with pytest.raises(ValueError, match="resamples must be at least 1"):
        interval([0.1, 0.2], resamples=0)
    with pytest.raises(ValueError, match="a t-test needs at least two queries"):
        paired_test([0.1], [0.2], test="t")


@pytest.mark.parametrize(("package", "test"), [("numpy", "randomization"), ("scipy", "t")])
def test_missing_package_names_the_extra(monkeypatch, package, test):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "optical-ot\[eval\]"'):
        paired_test([0.1, 0.3], [0.2, 0.2], test=test)
