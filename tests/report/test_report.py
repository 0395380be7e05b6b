"""The report of synthetic results: statistics, tables, rendering, and its imports."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs the extra `study`")
pytest.importorskip("scipy", reason="needs the extra `eval`")

from optical.report import StudyDescription, write_report
from optical.report.conclusion import conclusion
from optical.report.figures import draw_gaps, draw_languages
from optical.report.sentences import result_sentences
from optical.report.style import Styles
from optical.report.summary import Summary
from optical.report.table import read_rows

CEILING = "English documents"
COST_KINDS = ("seconds", "peak_mb")
FIGURES = ("measure_per_language", "gap_per_arm", "queries")
QUERIES = [f"q{i}" for i in range(40)]


COSTS = {
    "train ot sw seed 0": {"seconds": 60.0, "peak_mb": 10.0},
    "evaluate ot sw seed 0": {"seconds": 30.0, "peak_mb": 20.0},
}


def describe(arms=("zeroshot", "ot"), collections=("news",), **changes):
    defaults = {
        "title": "A & <B>",
        "arms": arms,
        "languages": ("sw", "de"),
        "collections": collections,
        "low": ("sw",),
        "high": ("de",),
        "names": {"sw": "Swahili", "de": "Deutsch <1>"},
        "config_text": "title: A & <B>\n",
    }
    return StudyDescription(**defaults | changes)


def values(mean, spread=0.2):
    """Return one value per query around a mean."""
    return {q: mean + spread * ((i * 7) % 10 / 9 - 0.5) for i, q in enumerate(QUERIES)}


def row(arm, language, mean, seed=0, collections=("news",), **more):
    measures = {"AP": values(mean), "RR@10": values(mean / 2)}
    return {
        "arm": arm,
        "language": language,
        "seed": seed,
        "measures": dict.fromkeys(collections, measures),
        **more,
    }


RESULTS = [
    row(CEILING, "en", 0.8),
    row("zeroshot", "sw", 0.2),
    row("zeroshot", "de", 0.4),
    row("ot", "sw", 0.5),
    row("ot", "de", 0.6),
]


def strict(text):
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def write(tmp_path, study, results, costs=None, formats=()):
    """Write a report; return its text and its data."""
    (tmp_path / "figures").mkdir(exist_ok=True)
    path = write_report(study, results, costs or {}, tmp_path, formats=formats)
    return path.read_text(encoding="utf-8"), strict((tmp_path / "report.json").read_text())


def test_means_and_differences(tmp_path):
    text, found = write(tmp_path, describe(), RESULTS, costs=COSTS)
    assert found["measure"] == "AP"
    means = {
        (r["measure"], r["arm"], r["language"]): pytest.approx(r["mean"]) for r in found["means"]
    }
    for result in RESULTS:
        for measure, expected in result["measures"]["news"].items():
            key = measure, result["arm"], result["language"]
            assert means[key] == statistics.fmean(expected.values())
    comparisons = {
        (one["language"], one["arm"], one["against"]): one for one in found["comparisons"]
    }
    assert comparisons.keys() == {("sw", "ot", "zeroshot"), ("de", "ot", "zeroshot")}
    for language, difference in (("sw", 0.3), ("de", 0.2)):
        one = comparisons[language, "ot", "zeroshot"]
        assert one["difference"] == pytest.approx(difference) and one["queries"] == 40
        # The difference is equal for all queries, so its interval is a point.
        assert one["low"] == pytest.approx(difference) == one["high"]
        assert 0 < one["p"] < one["p_holm"] < 0.001
    assert "1.5 minutes" in text
    assert "significantly better than zeroshot in 2 of 2 languages" in text
    assert re.search(r"\| Swahili \| low \| 0\.200 .*\| 0\.500 ", text)
    assert re.search(r"English documents: 0\.800", text)


def test_gaps(tmp_path):
    _, found = write(tmp_path, describe(), RESULTS)
    zeroshot, ot = found["gaps"]
    assert (zeroshot["low_mean"], zeroshot["high_mean"]) == pytest.approx((0.2, 0.4))
    assert zeroshot["gap"] == pytest.approx([0.2, 0.2, 0.2])
    assert zeroshot["closed"] is None and zeroshot["recovered_low"] is None
    assert ot["gap"] == pytest.approx([0.1, 0.1, 0.1])
    assert ot["closed"] == pytest.approx([0.5, 0.5, 0.5])
    assert ot["recovered_low"] == pytest.approx([0.5, 0.5, 0.5])
    assert ot["recovered_high"] == pytest.approx([0.5, 0.5, 0.5])


def test_shares_of_a_gap_whose_interval_includes_zero_are_undefined(tmp_path):
    unsure = [*RESULTS[:2], row("zeroshot", "de", 0.2), *RESULTS[3:]]
    text, found = write(tmp_path, describe(), unsure)
    assert all(gap["closed"] is None for gap in found["gaps"])
    assert " nan" not in text.lower() and " inf" not in text.lower()
    # The baseline is as good as English documents.
    reached = [row(CEILING, "en", 0.2), *RESULTS[1:]]
    text, found = write(tmp_path, describe(), reached)
    assert found["gaps"][1]["recovered_low"] is None
    assert " nan" not in text and " inf" not in text


def test_resamples_without_a_gap_are_excluded_from_shares():
    # The gap comes from 4 of 40 queries, so about one resample in a hundred has no gap.
    def rows(arm, sw, de):
        found = [row(arm, "sw", 0.0), row(arm, "de", 0.0)]
        for each, level in zip(found, (sw, de), strict=True):
            each["measures"]["news"]["AP"] = {q: level * (i < 4) for i, q in enumerate(QUERIES)}
        return found

    results = [*rows("zeroshot", 0.0, 1.0), *rows("ot", 0.5, 1.0)]
    summary = Summary.of(describe(), results)
    assert summary.gaps[1].closed == pytest.approx((0.5, 0.5, 0.5))


def test_scores_are_averaged_over_seeds(tmp_path):
    seeds = [row("ot", x, mean, seed=1) for x, mean in (("sw", 0.7), ("de", 0.6))]
    _, found = write(tmp_path, describe(seeds=(0, 1)), [*RESULTS, *seeds])
    means = {(r["arm"], r["language"]): r["mean"] for r in found["means"] if r["measure"] == "AP"}
    assert means["ot", "sw"] == pytest.approx(0.6) and means["ot", "de"] == pytest.approx(0.6)
    assert found["comparisons"][0]["queries"] == 40


def test_intervals_cover_queries_and_seeds():
    """Different seeds widen the interval; equal seeds leave it at that of the queries."""
    found = {}
    for name, means in (("one", [0.5]), ("agree", [0.5, 0.5, 0.5]), ("differ", [0.3, 0.5, 0.7])):
        results = [one for one in RESULTS if one["arm"] != "ot"] + [
            row("ot", x, mean, seed=seed) for seed, mean in enumerate(means) for x in ("sw", "de")
        ]
        summary = Summary.of(describe(seeds=(0, 1, 2)), results)
        low, high = summary.intervals["news", "ot", "sw"]
        one = next(c for c in summary.comparisons if c.language == "sw")
        found[name] = (high - low, one.high - one.low)
        assert summary.means["AP"]["news", "ot", "sw"] == pytest.approx(0.5)
    assert found["agree"] == pytest.approx(found["one"])
    assert found["differ"][0] > 3 * found["one"][0] and found["differ"][1] > 0.1


def test_bootstrap_spread_is_the_standard_error():
    """The spread of the draws is the standard error of the mean over queries and seeds."""
    drawn = Summary.of(describe(), RESULTS).draws["news", "ot", "sw"][1:]
    x = np.array(list(values(0.5).values()))
    assert drawn.std() == pytest.approx(x.std() / len(x) ** 0.5, rel=0.05)
    means = [0.2, 0.5, 0.8]
    seeds = [row("ot", "sw", mean, seed=s) for s, mean in enumerate(means)]
    other = [one for one in RESULTS if (one["arm"], one["language"]) != ("ot", "sw")]
    drawn = Summary.of(describe(), [*other, *seeds]).draws["news", "ot", "sw"][1:]
    expected = (x.var() / len(x) + np.var(means) / 3) ** 0.5
    assert drawn.std() == pytest.approx(expected, rel=0.05)


def test_gains_over_the_translation_baseline(tmp_path):
    chosen = describe(translation="zeroshot")
    text, found = write(tmp_path, chosen, RESULTS)
    zeroshot, ot = found["gaps"]
    assert zeroshot["gain_low"] is None
    # Low: from 0.2 to 0.5. High: from 0.4 to 0.6.
    assert ot["gain_low"][0] == pytest.approx(1.5) and ot["gain_high"][0] == pytest.approx(0.5)
    assert "| news | ot | 150%" in text


def test_arms_are_compared_with_the_arms_of_against(tmp_path):
    arms = ("zeroshot", "ot", "more", "last")
    results = [
        row(arm, language, 0.2 + 0.1 * i) for i, arm in enumerate(arms) for language in ("sw", "de")
    ]
    _, found = write(tmp_path, describe(arms, against=("ot", "last")), results)
    tested = [(one["arm"], one["against"]) for one in found["comparisons"][:5]]
    assert tested == [
        ("zeroshot", "ot"), ("more", "ot"), ("last", "ot"), ("zeroshot", "last"), ("more", "last")
    ]  # fmt: skip


def test_curves_and_costs_are_rows_of_the_table(tmp_path):
    arms = ("zeroshot", "ot-10", "ot")
    results = [row(CEILING, "en", 0.8)] + [
        row(arm, language, mean, pairs=pairs)
        for arm, mean, pairs in (("zeroshot", 0.2, None), ("ot-10", 0.3, 10), ("ot", 0.5, 100))
        for language in ("sw", "de")
    ]
    text, _ = write(tmp_path, describe(arms, curves={"OT": ("ot-10", "ot")}), results, costs=COSTS)
    rows = read_rows(tmp_path / "results.csv")
    points = [(r["language"], r["pairs"], r["value"]) for r in rows if r["kind"] == "curve"]
    assert points == [
        ("sw", 10, pytest.approx(0.3)), ("de", 10, pytest.approx(0.3)),
        ("sw", 100, pytest.approx(0.5)), ("de", 100, pytest.approx(0.5)),
    ]  # fmt: skip
    cost = {r["kind"]: r["value"] for r in rows if r["arm"] == "ot" and r["kind"] in COST_KINDS}
    assert cost == {"seconds": 90, "peak_mb": 20}
    assert "| ot | 1.5 | 20 |" in text and "](figures/pairs.png)" in text
    assert {r["kind"] for r in rows} >= {"measure", "ceiling", "gap", "difference"}


def test_holm_correction_covers_the_whole_table(tmp_path):
    arms, collections = ("zeroshot", "ot", "more"), ("news", "talks")
    results = [row(CEILING, "en", 0.8, collections=collections)] + [
        row(arm, language, mean + extra, collections=collections)
        for arm, mean in (("zeroshot", 0.2), ("ot", 0.5), ("more", 0.5))
        for language, extra in (("sw", 0.0), ("de", 0.1))
    ]
    _, found = write(tmp_path, describe(arms, collections), results)
    one = found["comparisons"]
    assert len(one) == 2 * 2 * 3
    tested = sorted(one, key=lambda each: each["p"])
    expected, worst = [], 0.0
    for rank, each in enumerate(tested):
        worst = max(worst, min(1.0, each["p"] * (len(tested) - rank)))
        expected.append(worst)
    assert [each["p_holm"] for each in tested] == pytest.approx(expected)
    assert [
        each["p_holm"] for each in one if each["arm"] == "more" and each["against"] == "ot"
    ] == ([1.0] * 4)
    assert {each["collection"] for each in found["gaps"]} == set(collections)


@pytest.mark.parametrize("groups", ["none", "one arm", "no ceiling"])
def test_reports_of_studies_without_groups_comparisons_or_ceiling(tmp_path, groups):
    chosen, results = describe(), RESULTS
    if groups == "none":
        chosen = describe(low=(), high=())
    elif groups == "one arm":
        chosen, results = describe(arms=("zeroshot",)), RESULTS[:3]
    else:
        results = RESULTS[1:]
    text, found = write(tmp_path, chosen, results)
    assert "0.200" in text
    assert bool(found["gaps"]) == (groups != "none")
    assert bool(found["comparisons"]) == (groups != "one arm")
    assert (f"{CEILING}: 0.800" in text) == (groups != "no ceiling")
    assert (tmp_path / "figures/gap_per_arm.png").exists() == (groups != "none")


def test_a_pool_without_results_has_no_bias(tmp_path):
    measures = {"AP": values(0.0, 0.0), "RR@10": values(0.0, 0.0)}
    bias = {x: {"share": None, "relevant": 0.5, "rank": None} for x in ("sw", "de")}
    full = {x: {"share": 0.5, "relevant": 0.5, "rank": 0.0} for x in ("sw", "de")}
    pools = [
        {"arm": arm, "seed": 0, "pools": {"news": {"measures": measures, "bias": own}}}
        for arm, own in (("zeroshot", full), ("ot", bias))
    ]
    text, found = write(tmp_path, describe(), [*RESULTS, *pools])
    assert "| ot | 0.000 [0.000, 0.000] | +0.000 [+0.000, +0.000] | – | – (–) | – (–) |" in text
    assert "| zeroshot | 0.000 [0.000, 0.000] |  | 0% | 50% (+0.00) | 50% (+0.00) |" in text
    assert "of a search that returned no document is not defined (–)." in text
    assert [pool["distance"] for pool in found["pools"]] == [0.0, None]
    rows = read_rows(tmp_path / "results.csv")
    shares = [row["value"] for row in rows if row["kind"] == "pool_share"]
    assert shares == [0.5, 0.5, None, None]


def test_the_gain_on_a_pool_is_paired(tmp_path):
    bias = {x: {"share": 0.5, "relevant": 0.5, "rank": 0.0} for x in ("sw", "de")}
    pools = []
    for arm, mean in (("zeroshot", 0.4), ("ot", 0.5)):
        measures = {"AP": values(mean, 0.8), "RR@10": values(mean)}
        pool = {"news": {"measures": measures, "bias": bias}}
        pools.append({"arm": arm, "seed": 0, "pools": pool})
    write(tmp_path, describe(), [*RESULTS, *pools])
    rows = {(r["kind"], r["arm"]): r for r in read_rows(tmp_path / "results.csv")}
    assert ("pool_gain", "zeroshot") not in rows
    gain = rows["pool_gain", "ot"]
    # Each query gains as much, so the interval has no width, whereas the measures differ widely.
    assert gain["against"] == "zeroshot"
    assert [gain[x] for x in ("value", "low", "high")] == pytest.approx([0.1] * 3)
    assert rows["pool", "ot"]["high"] - rows["pool", "ot"]["low"] > 0.1


def test_alignment_is_drawn(tmp_path):
    alignment = {
        "language": "sw",
        "other_tokens": ["[CLS]", "maji", "[SEP]"],
        "english_tokens": ["water", "$x_1"],
        "plan": [[0.2, 0.1], [0.3, 0.1], [0.0, 0.3]],
        "value_linear": 0.25,
    }
    text, _ = write(tmp_path, describe(), [*RESULTS, alignment])
    assert "](figures/alignment.png)" in text and "0.250" in text
    assert (tmp_path / "figures/alignment.png").stat().st_size > 3000


def test_html_escapes_titles_names_and_notes(tmp_path):
    write(tmp_path, describe(note="a **bold** <i>claim</i>"), RESULTS)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>A &amp; &lt;B&gt;</title>" in page and "Deutsch &lt;1&gt;" in page
    assert "<strong>bold</strong> &lt;i&gt;claim&lt;/i&gt;" in page
    assert "<B>" not in page and "<i>" not in page


def test_equal_results_give_identical_files(tmp_path):
    found = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        write(folder, describe(), RESULTS, formats=("pdf", "svg"))
        found.append({path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    figures = {f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "svg", "pdf")}
    texts = {"report.md", "report.html", "report.json", "tables.tex", "results.csv", "queries.csv"}
    assert found[0].keys() == found[1].keys() == figures | texts
    assert found[0] == found[1]


def test_formats_are_drawn_on_demand_and_never_left_behind(tmp_path):
    text, _ = write(tmp_path, describe(), RESULTS)
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".png"}
    assert "holds every figure as PNG, `tables.tex`" in text
    write(tmp_path, describe(), RESULTS, formats=("pdf",))
    other = tmp_path / "figures" / "mine.svg"
    other.write_text("drawn by hand")
    old = (tmp_path / "figures" / "queries.pdf").read_bytes()
    text, _ = write(
        tmp_path, describe(), [*RESULTS[:3], row("ot", "sw", 0.3), row("ot", "de", 0.5)]
    )
    # The report asked for no PDF, but the folder had one.
    assert (tmp_path / "figures" / "queries.pdf").read_bytes() != old
    assert "as PNG and PDF," in text
    assert not (tmp_path / "figures" / "queries.svg").exists()
    assert other.read_text() == "drawn by hand"


def test_order_of_results_has_no_influence():
    forward, backward = (
        Summary.of(describe(), rows).to_dict() for rows in (RESULTS, RESULTS[::-1])
    )
    assert forward["comparisons"] == backward["comparisons"]
    assert forward["gaps"] == backward["gaps"]


# --- sentences -----------------------------------------------------------------------------------


def sentences(study, results):
    return " ".join(result_sentences(study, Summary.of(study, results)))


def test_losses_are_told_as_losses():
    worse = [*RESULTS[:3], row("ot", "sw", 0.1), row("ot", "de", 0.3)]
    found = sentences(describe(), worse)
    assert "It is significantly worse than zeroshot in 2 of 2 languages" in found
    assert "better" not in found
    # From .2 to .1 of the way to .8, and from .4 to .3.
    assert (
        "loses a further 17% [17%, 17%] of the difference between zeroshot and English documents "
        "in the low-resource languages and loses a further 25% [25%, 25%] in the high-" in found
    )
    mixed = [*RESULTS[:3], row("ot", "sw", 0.1), row("ot", "de", 0.6)]
    assert (
        "significantly better than zeroshot in 1, and significantly worse in 1, of 2 languages"
        in sentences(describe(), mixed)
    )


@pytest.mark.parametrize("against", [(), ("zeroshot",), ("last",)])
def test_arms_are_set_against_what_they_start_from(tmp_path, against):
    arms = ("zeroshot", "transfer", "ot", "last")
    means = {"zeroshot": 0.2, "transfer": 0.6, "ot": 0.5, "last": 0.7}
    results = [row(arm, x, means[arm]) for arm in arms for x in ("sw", "de")]
    starts = {"transfer": ("zeroshot",), "ot": ("transfer",), "last": ("transfer",)}
    study = describe(arms, against=against, starts=starts)
    found = sentences(study, results)
    assert "**transfer** has a mean MAP of 0.600 over the languages (zeroshot, from which" in found
    assert "**ot** loses 0.100 mean MAP over transfer, from which it starts. It is" in found
    assert "significantly worse than transfer in 2 of 2 languages" in found
    assert "**last** gains 0.100 mean MAP over transfer, from which it starts. It is" in found
    assert "significantly better than transfer in 2 of 2 languages" in found
    text, numbers = write(tmp_path, study, results)
    own = {(one["arm"], one["against"]) for one in numbers["start_comparisons"]}
    tested = {frozenset((one["arm"], one["against"])) for one in numbers["comparisons"]}
    assert own == {(a, s) for a, (s,) in starts.items() if frozenset((a, s)) not in tested}
    assert ("Arms against those that they start from." in text) == bool(own)


def test_an_arm_that_was_not_tested_is_not_told_as_no_better():
    arms = ("zeroshot", "ot", "more")
    results = [row(arm, x, 0.2 + 0.1 * i) for i, arm in enumerate(arms) for x in ("sw", "de")]
    found = sentences(describe(arms, against=("ot",)), results)
    assert "in 0 of 0" not in found
    assert "**more** has a mean MAP of 0.400 over the languages (zeroshot: 0.200). The two" in found
    assert "significantly better than zeroshot in 2 of 2 languages" in found


def test_no_share_of_a_difference_that_is_nearly_nothing(tmp_path):
    # The gap is .009, and certain: without a limit, the arm would close -912 % of it.
    tiny = [row("zeroshot", "sw", 0.030), row("zeroshot", "de", 0.039)]
    tiny += [row(CEILING, "en", 0.045), row("ot", "sw", 0.8), row("ot", "de", 0.9)]
    text, found = write(tmp_path, describe(), tiny)
    ot = found["gaps"][1]
    assert ot["closed"] is None and ot["recovered_low"] is None and ot["recovered_high"] is None
    result = text.split("## Figures")[0]
    assert "%" not in result and "recovers" not in result


def test_the_caption_of_error_rates_tells_what_was_checked(tmp_path):
    aligned = [{"arm": "ot", "language": x, "aer": 0.2} for x in ("sw", "de")]
    for pairs, told in (
        ({}, "Whether an arm was trained on the sentence pairs was not checked."),
        ({"sw": (0, 90), "de": (0, 80)}, "trained on any of the 170 sentence pairs."),
        ({"sw": (3, 90), "de": (0, 80)}, "on some of the sentence pairs (3 of 90 in Swahili)"),
    ):
        text, _ = write(tmp_path, describe(trained_pairs=pairs), [*RESULTS, *aligned])
        assert told in text and "no arm was trained on" not in text


# --- the conclusion ------------------------------------------------------------------------------


def concluded(study, results):
    return conclusion(study, Summary.of(study, results))


def test_the_conclusion_names_the_best_arm_what_training_adds_and_the_gap():
    arms = ("zeroshot", "transfer", "ot")
    means = {"zeroshot": (0.2, 0.4), "transfer": (0.7, 0.75), "ot": (0.5, 0.6)}
    results = [
        row(arm, language, mean)
        for arm in arms
        for language, mean in zip(("sw", "de"), means[arm], strict=True)
    ]
    study = describe(arms, starts={"transfer": ("zeroshot",), "ot": ("transfer",)})
    best, trained, gap = concluded(study, results)
    assert best == (
        "**transfer** is best on news with a mean MAP of 0.725 (zeroshot: 0.300), and ot is next "
        "with 0.550, significantly below in 2 of 2 languages."
    )
    assert trained.endswith(
        "the trained arms are significantly better: transfer (zeroshot, 2 of 2); significantly "
        "worse: ot (transfer, 2 of 2)."
    )
    assert gap == (
        "The gap between high- and low-resource languages on news is +0.050 [+0.050, +0.050] with "
        "transfer, narrower by 0.150 than with zeroshot (+0.200 [+0.200, +0.200])."
    )


def test_the_conclusion_without_starts_groups_or_tests():
    study = describe(low=(), high=(), against=("ot",))
    best, trained, gap = concluded(study, RESULTS)
    assert best.startswith("**ot** is best on news with a mean MAP of 0.550 (zeroshot: 0.300)")
    assert trained == "No trained arm can be set against an arm that it starts from."
    assert gap == "With ot, MAP on news is 0.500 in Swahili to 0.600 in Deutsch <1>."
    equal = [row(arm, x, 0.3) for arm in ("zeroshot", "ot") for x in ("sw", "de")]
    study = describe(starts={"ot": ("zeroshot",)})
    best, trained, gap = concluded(study, equal)
    assert "significantly below in none of 2 languages" in best
    assert "without a significant difference: ot (zeroshot)" in trained
    assert gap.startswith("With zeroshot the high-resource languages of news are +0.000")
    shifted = [*RESULTS[:3], row("ot", "sw", 0.3), row("ot", "de", 0.5)]
    *_, gap = concluded(study, shifted)
    assert "with ot, not significantly different from that with zeroshot" in gap


@pytest.mark.parametrize(
    ("mean", "next_one", "verdict", "group"),
    [
        (0.5, "zeroshot is next with 0.200, significantly below", "significantly better than", "b"),
        (0.1, "ot is next with 0.100, significantly below", "significantly worse than", "w"),
        (0.2, "ot is next with 0.200, not significantly below", "not significantly different", ""),
    ],
)
def test_one_language_is_not_counted(mean, next_one, verdict, group):
    results = [row("zeroshot", "sw", 0.2), row("ot", "sw", mean)]
    study = describe(low=(), high=(), starts={"ot": ("zeroshot",)})
    best, trained, gap = concluded(study, results)
    assert best.endswith(f"{next_one}.")
    expected = {"b": "significantly better", "w": "significantly worse"}
    told = expected.get(group, "without a significant difference")
    assert trained.endswith(f"the trained arms are {told}: ot (zeroshot).")
    assert "number of" not in trained
    assert gap.endswith(" in Swahili.") and " to " not in gap
    found = sentences(study, results)
    assert f"It is {verdict}" in found and " of 1 " not in found


def test_an_arm_that_differs_nowhere_is_not_told_as_no_better():
    results = [*RESULTS[:3], row("ot", "sw", 0.2), row("ot", "de", 0.4)]
    found = sentences(describe(), results)
    assert "It is not significantly different from zeroshot in any of 2 languages" in found
    assert "better" not in found


# --- unfinished studies --------------------------------------------------------------------------


def test_arms_and_languages_without_results_are_left_out(tmp_path):
    arms = ("zeroshot", "ot", "more", "last")
    results = [*RESULTS, row("more", "sw", 0.6)]
    study = describe(arms, starts={"more": ("ot",), "last": ("more",)}, translation="last")
    (tmp_path / "figures").mkdir()
    left = ["train more de seed 0", "evaluate more de seed 0", "evaluate last sw seed 0"]
    path = write_report(study, results, {}, tmp_path, unfinished=left)
    text = path.read_text(encoding="utf-8")
    assert "**This study is not finished:** 3 tasks are left." in text
    assert "lacks 2 evaluations (more 1, last 1)" in text
    found = strict((tmp_path / "report.json").read_text())
    assert {(one["arm"], one["language"]) for one in found["comparisons"]} == {
        ("ot", "sw"), ("ot", "de"), ("more", "sw")
    }  # fmt: skip
    assert [gap["arm"] for gap in found["gaps"]] == ["zeroshot", "ot"]
    assert "**more** has a mean MAP of 0.600 over 1 of 2 languages (zeroshot: 0.200)" in text
    # `more` is best in the only language it has, but is not compared over all.
    assert "**ot** is best on news" in text
    line = next(line for line in text.splitlines() if line.startswith("| more | 0.600"))
    assert line.endswith("| – |")
    with pytest.raises(ValueError, match="no arm has been evaluated"):
        write_report(study, RESULTS[:1], {}, tmp_path)


# --- files for papers ----------------------------------------------------------------------------


def test_tables_are_written_as_latex(tmp_path):
    write(tmp_path, describe(("zeroshot", "ot"), collections=("news",)), RESULTS)
    tex = (tmp_path / "tables.tex").read_text(encoding="utf-8")
    for name in ("table", "tabular"):
        assert tex.count(f"\\begin{{{name}}}") == tex.count(f"\\end{{{name}}}") >= 5
    assert tex.count(r"\toprule") == tex.count(r"\bottomrule") == tex.count(r"\caption{")
    assert r"Swahili & low & 0.200 {[}" in tex
    assert r"Deutsch $<$1$>$" in tex and r"\textbf{" in tex and r"95 \% intervals" in tex
    labels = re.findall(r"\\label\{(.*?)\}", tex)
    assert len(labels) == len(set(labels)) and "tab:comparisons" in labels
    # Nothing is left that LaTeX would take for a command, comment or alignment.
    for line in tex.splitlines():
        assert not re.search(r"(?<!\\)[%#_]", line) or line.startswith("%")


def test_forty_arms_look_different_and_keep_their_look():
    styles = Styles(f"arm{i}" for i in range(40))
    looks = {tuple(sorted(styles.marker(name).items())) for name in styles.names}
    assert len(looks) >= 28
    first = [tuple(sorted(styles.marker(name).items())) for name in styles.names[:14]]
    assert len(set(first)) == 14
    # In grey, neighbours still differ by marker or filling.
    grey = {(look["marker"], look["markerfacecolor"] == "white") for look in map(
        styles.marker, styles.names[:14]
    )}  # fmt: skip
    assert len(grey) == 14
    assert Styles(["arm0", "arm1"]).marker("arm1") == styles.marker("arm1")


@pytest.mark.parametrize("count", [1, 12])
def test_figures_of_many_arms_and_collections(tmp_path, count):
    arms = tuple(f"arm_{i}" for i in range(count))
    collections = ("news", "talks", "wiki", "web")
    results = [
        row(arm, x, 0.2 + 0.05 * i, collections=collections)
        for i, arm in enumerate(arms)
        for x in ("sw", "de")
    ]
    write(tmp_path, describe(arms, collections), results)
    rows = read_rows(tmp_path / "results.csv")
    styles = Styles(arms)
    for draw in (draw_languages, draw_gaps):
        figure = draw(rows, styles)
        shown = [axis for axis in figure.axes if axis.get_visible()]
        assert [axis.get_title() for axis in shown] == list(collections)
        for axis in shown:
            colours = {line.get_color() for line in axis.lines}
            assert {styles.colour(arm) for arm in arms} <= colours


def test_sections_are_linked_and_code_is_marked(tmp_path):
    write(tmp_path, describe(note="see `tables.tex`"), RESULTS)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    links = re.findall(r'href="#(.*?)"', page)
    assert len(links) > 5 and all(f'id="{link}"' in page for link in links)
    assert "<code>tables.tex</code>" in page


# --- imports -------------------------------------------------------------------------------------

HEAVY = ("transformers", "sentence_transformers", "datasets", "tokenizers")


def loaded_by(code):
    """Return the top-level modules that are loaded after running code in a new process."""
    code += "; import sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_report_imports_no_training_library():
    loaded = loaded_by("import optical.report")
    assert not loaded & {*HEAVY, "torch", "matplotlib", "scipy", "yaml"}


def test_report_imports_no_study():
    code = "import sys, optical.report; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    wings = {name.split(".")[1] for name in done.stdout.split() if name.startswith("optical.")}
    assert not wings & {"study", "training", "cli"}


def test_figures_command_is_light(tmp_path):
    """Drawing figures and writing reports loads neither PyTorch nor a library of training."""
    write(tmp_path, describe(), RESULTS)
    argv = ["figures", str(tmp_path / "results.csv"), "--output", str(tmp_path / "drawn")]
    argv += ["--format", "svg", "pdf", "--format", "svg"]
    code = f"from optical.cli.main import main; assert main({argv!r}) == 0"
    code += "; import optical.retrieval; optical.retrieval.evaluate"
    code += "; import sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *drawn, loaded = done.stdout.splitlines()
    names = [Path(line).name for line in drawn]
    assert names == [f"{name}.{suffix}" for name in FIGURES for suffix in ("svg", "pdf")]
    assert not set(loaded.split()) & {*HEAVY, "torch", "scipy"}
