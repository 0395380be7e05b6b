"""The benchmark harness: inputs, accuracy gate, rounds, CSV files and tables; no timings."""

import contextlib
import csv
import json
import math
import os
import re
import subprocess
import sys
import xml.dom.minidom
from dataclasses import fields, replace

import pytest
import torch

from benchmarks import overhead
from benchmarks.__main__ import main
from benchmarks.launches import rows as launches
from benchmarks.operator import (
    accuracy,
    cases,
    ceiling,
    gate,
    jobs,
    measure,
    meter,
    peak,
    providers,
    rows,
)
from benchmarks.operator.jobs import MODES, ROOT, Results, Task
from benchmarks.tables import operator as operator_tables
from benchmarks.tables import study as study_tables

CASE = cases.parse_shape("3x6x5x4x12")
RAGGED = cases.parse_shape("3x20x24x4x12:ragged")
# OTT-JAX runs in a worker process and has a separate test.
IN_PROCESS = [name for name in providers.PROVIDERS if name != "ott"]


def start_job(name, task):
    reason = providers.PROVIDERS[name].unavailable(task)
    if reason is not None:
        pytest.skip(reason=f"{name}: {reason}")
    return providers.PROVIDERS[name].start(task)


# ---------------------------------------------------------------------------------------- cases


@pytest.mark.parametrize("data", cases.DATA)
def test_cases_are_reproducible_and_exact_in_float32(data):
    case = replace(RAGGED, data=data)
    x, y, log_a, log_b, lengths_a, lengths_b = case.inputs
    assert torch.equal(x.float().double(), x)
    assert torch.equal(y.float().double(), y)
    assert torch.equal(case.cost(), case.cost().float().double())
    assert ((case.cost() >= -1e-6) & (case.cost() <= 2 + 1e-6)).all()
    assert torch.allclose(log_a.exp().sum(1), torch.ones(3).double())
    assert torch.equal((log_a > -math.inf).sum(1), lengths_a)
    assert torch.equal((log_b > -math.inf).sum(1), lengths_b)
    assert case.inputs.padding.any() == (data == "ragged")
    assert case.visits() == 2 * 12 * int((lengths_a * lengths_b).sum())
    cases._draw_inputs.cache_clear()
    assert torch.equal(case.inputs.x, x)
    assert cases.Case.from_dict(json.loads(json.dumps(case.to_dict()))) == case


def test_costs_have_the_structure_of_their_kind_of_data():
    shape = "4x16x16x64x1"
    random, aligned, clusters, mixed = (
        cases.parse_shape(f"{shape}:{data}").cost() for data in cases.DATA[:4]
    )
    for independent, partners in ((random, aligned), (mixed[::2], mixed[1::2])):
        assert independent.amin(2).mean() > 0.7
        assert partners.amin(2).mean() < 0.5
    # 13 and 5 of 16 tokens are in the first group.
    assert (clusters[:, :13, :5] < 0.5).all()
    assert (clusters[:, :13, 5:] > 1.5).all()


def test_lengths_are_within_bounds():
    lengths = cases.parse_shape("200x64x32x2x1:ragged").inputs.lengths_a
    assert lengths.min() >= 8
    assert lengths.max() == 64
    assert len(lengths.unique()) > 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3x4x5x6", "expected BATCHxNxMxDIMxITERATIONS"),
        ("3x4x0x5x6", "expected BATCHxNxMxDIMxITERATIONS"),
        ("3x4x5x6x7:words", "'words'; expected one of random"),
    ],
)
def test_invalid_shapes_are_rejected(text, message):
    with pytest.raises(ValueError, match=message):
        cases.parse_shape(text)


# ----------------------------------------------------------------------------------------- gate


@pytest.mark.parametrize("case", [CASE, RAGGED], ids=lambda case: case.data)
@pytest.mark.parametrize("kind", ["solve", "vectors"])
@pytest.mark.parametrize("name", IN_PROCESS)
def test_every_provider_passes_the_gate(name, kind, case):
    for mode in MODES:
        task = Task(kind, mode, case)
        results = start_job(name, task).results()
        if results is None:
            continue
        assert len(results.gradients) == (0 if mode == "forward" else 1 + (kind == "vectors"))
        provider = providers.PROVIDERS[name]
        truth = gate.truth_of(task, provider.first_update, provider.reports_dual)
        errors = gate.check(name, results, truth, task)
        if provider.first_update is not None:
            assert max(value for key, value in errors.items() if key != "marginal_error") < 1e-5


def test_one_large_problem_passes_the_gate():
    task = Task("vectors", "both", cases.parse_shape("1x24x24x16x60:random"))
    results = start_job("geomloss_samples", task).results()
    errors = gate.check("", results, gate.truth_of(task, None, False), task)
    assert errors["error_value"] < 1e-3


def test_ott_passes_the_gate():
    for kind, case in (("solve", CASE), ("vectors", RAGGED)):
        task = Task(kind, "both", case)
        with contextlib.closing(start_job("ott", task)) as job:
            errors = gate.check("ott", job.results(), gate.truth_of(task, "g", True), task)
            assert job.milliseconds_per_call(0.0) > 0
        assert job.process.returncode == 0
        assert errors["error_gradient"] < 1e-5


@pytest.fixture(scope="module")
def reference_results():
    """A task and the correct results of the reference backend."""
    task = Task("solve", "both", CASE)
    return task, providers.PROVIDERS["reference"].start(task).results()


# Ways to corrupt correct results; the first word is the quantity that the gate has to name.
CORRUPTIONS = {
    "value": lambda r: r._replace(value=r.value + 1e-3),
    "plan": lambda r: r._replace(plan=r.plan * 1.01),
    "gradient": lambda r: r._replace(gradients=(r.gradients[0] / 2,)),
    "value not finite": lambda r: r._replace(value=r.value * math.nan),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_the_gate_rejects_wrong_iterates(corruption, reference_results):
    task, results = reference_results
    truth = gate.truth_of(task, "f", False)
    gate.check("right", results, truth, task)
    with pytest.raises(AssertionError, match=f"wrong {CASE.name} {corruption.split()[0]}"):
        gate.check("wrong", CORRUPTIONS[corruption](results), truth, task)


@pytest.mark.parametrize("corruption", ["value", "gradient"])
def test_the_gate_rejects_wrong_limits(corruption):
    task = Task("solve", "both", replace(CASE, max_iter=2000))
    results = providers.PROVIDERS["reference"].start(task).results()
    truth = gate.truth_of(task, None, False)
    gate.check("right", results, truth, task)
    with pytest.raises(AssertionError, match=f"wrong .* {corruption} is"):
        gate.check("wrong", CORRUPTIONS[corruption](results), truth, task)


def test_errors_ignore_a_constant_between_the_potentials(reference_results):
    _, results = reference_results
    shifted = results._replace(f=results.f + 3, g=results.g - 3)
    assert gate.errors(shifted, results, CASE)["error_potentials"] < 1e-12
    other = results._replace(f=results.f + 0.01 * torch.arange(6))
    assert gate.errors(other, results, CASE)["error_potentials"] > 0.2


def test_stopping_rules_are_tightened_until_the_residual_is_met():
    task = Task("solve", "forward", replace(CASE, max_iter=3000, tol=1e-2))
    for name in ("cpu", "torch", "torch_bmm", "pot", "geomloss"):
        start_job(name, task).close()
        row, attempt, job = measure.start_gated("residual", providers.PROVIDERS[name], task)
        assert job is not None, row.note
        assert 0 < row.marginal_error <= 1.05e-2
        assert row.max_iter == 3000
        assert attempt.case.tol <= 1e-2
    # GeomLoss has no stopping rule; its number of steps is doubled instead.
    assert attempt.case.max_iter < 3000


# -------------------------------------------------------------------------------- rounds, memory


def test_jobs_alternate_in_rounds():
    order = []

    class RecordingJob:
        def __init__(self, name):
            self.name = name

        def milliseconds_per_call(self, seconds=1.0):
            order.append(self.name)
            return float(len(order))

    recording = {name: RecordingJob(name) for name in ("a", "b")}
    times = measure.time_in_rounds(recording, seconds=0, min_rounds=4)
    assert order == ["a", "b"] * 5  # including the warm-up round
    assert [len(x) for x in times.values()] == [4, 4]


def test_a_turn_repeats_a_fast_call():
    calls = []
    assert 0 < meter.milliseconds_per_call(lambda: calls.append(1), seconds=0.01) < 10
    assert len(calls) > 10
    del calls[:]
    meter.milliseconds_per_call(lambda: calls.append(1), seconds=0.0)
    assert len(calls) == 1


def test_ratios_pair_times_of_the_same_round():
    row = rows.row_of("solve", "torch", Task("solve", "forward", CASE))
    # The machine halves its speed after the first round; the ratio stays 3.
    timed = measure.with_times(row, [3.0, 6.0, 6.0], [1.0, 2.0, 2.0])
    assert timed.ratio == 3
    assert timed.ms_p50 == 6
    assert measure.with_times(row, [1.0], None).ratio == ""


LINUX = os.path.exists("/proc/self/clear_refs")


@pytest.mark.skipif(not LINUX, reason="peak memory is available on Linux only")
def test_peak_memory_is_that_of_the_call():
    peak_mb = meter.peak_megabytes(lambda: torch.ones(20 * 2**18))
    assert peak_mb == pytest.approx(20, abs=3)
    assert meter.peak_megabytes(lambda: None) == pytest.approx(0, abs=1)


def test_the_peak_process_prints_a_number(capsys):
    request = {"provider": "torch", "kind": "vectors", "mode": "both", "ott_python": "python"}
    before = jobs.ott_python
    peak.main(json.dumps({**request, **CASE.to_dict()}))
    jobs.ott_python = before
    printed = capsys.readouterr().out.strip()
    assert not printed or float(printed) < 50


def test_cores_are_limited_and_restored():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip(reason="this system has no CPU affinity")
    before = os.sched_getaffinity(0)
    with meter.limit_cores(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before
    with (
        pytest.raises(ValueError, match="threads is 4096; expected at most"),
        meter.limit_cores(4096),
    ):
        pass


def test_ceiling_loops_do_the_work_of_the_case():
    if isinstance(ceiling.library(), str):
        pytest.skip(reason=ceiling.library())
    case = cases.parse_shape("8x33x17x2x40:ragged")
    sweeps, adds = ceiling.sweeps(case), ceiling.multiply_adds(case)
    sweeps(), adds()
    # Only an order of magnitude: no processor performs 1e12 multiply-adds per second.
    for run in (sweeps, adds):
        assert case.visits() / meter.milliseconds_per_call(run) * 1e3 < 1e12


# ----------------------------------------------------------------------------------- rows, files


def test_a_provider_that_fails_the_gate_has_no_time(monkeypatch, tmp_path, capsys):
    reference = providers.PROVIDERS["reference"]

    class Shifted(jobs.TorchJob):
        def results(self):
            results = super().results()
            return results._replace(value=results.value + 0.01)

    class Broken(jobs.TorchJob):
        def results(self):
            raise RuntimeError("no memory\nand more")

    for name, job_class in (("wrong", Shifted), ("broken", Broken)):
        start = lambda task, job_class=job_class: job_class(reference.start.args[0], True, task)  # noqa: E731
        monkeypatch.setitem(providers.PROVIDERS, name, replace(reference, name=name, start=start))
    output = tmp_path / "results" / "cpu.csv"
    arguments = ["solve", "--only", "wrong,reference,broken", "--shapes", CASE.name]
    limits = ["--seconds", "0", "--rounds", "1", "--modes", "forward"]
    assert main([*arguments, *limits, "--output", str(output)]) == 0
    assert "wrong failed (forward)" in capsys.readouterr().out
    by_provider = {row.provider: row for row in rows.read(output)}
    assert list(by_provider) == ["reference", "wrong", "broken"]
    assert by_provider["reference"].ratio == 1
    assert by_provider["reference"].error_plan < 1e-6
    assert by_provider["broken"].note == "no memory"
    for name in ("wrong", "broken"):
        assert by_provider[name].ms_p50 == rows.FAILED
        assert by_provider[name].ratio == by_provider[name].error_plan == ""


def test_rows_round_trip_through_csv_and_replace_older_rows(tmp_path):
    path = tmp_path / "rows.csv"
    row = rows.row_of("solve", "torch", Task("solve", "forward", CASE))
    timed = replace(row, ms_p50=2.5, ms_p20=2.0, ms_p80=3.0, ratio=4.0, error_plan=1e-7)
    failed = replace(row, mode="both", note="value, off by 1")
    rows.write([timed, failed], path)
    assert rows.read(path) == [timed, failed]
    assert path.read_text().splitlines()[0] == ",".join(f.name for f in fields(rows.Row))
    newer = replace(timed, ms_p50=1.0, date="2000-01-01")
    other = replace(timed, threads=timed.threads + 1)
    rows.write([newer, other], path)
    assert rows.read(path) == [newer, failed, other]
    assert "3x6x5x4x12" in rows.table([newer, failed])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["solve", "--only", "reference,ghost"], "'ghost' is not among"),
        (["solve", "--shapes", "3x4x5"], "expected BATCHxNxMxDIMxITERATIONS"),
        (["solve", "--modes", "backward"], "expected some of forward,both"),
        (["solve", "--threads", "4096"], "threads is 4096"),
    ],
)
def test_invalid_arguments_are_rejected(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------ accuracy, tables


def test_accuracy_compares_float32_with_float64(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(accuracy, "EPSILONS", (0.1,))
    output = tmp_path / "rows.csv"
    only = "cpu,reference,torch,pot,geomloss"
    shape = "2x8x9x4x20:clusters"
    assert main(["accuracy", "--only", only, "--shapes", shape, "--output", str(output)]) == 0
    accuracies = rows.read(output)
    assert {row.provider for row in accuracies} >= {"cpu", "reference", "torch"}
    for row in accuracies:
        assert not row.note
        assert 0 < row.error_plan < 1e-5
        assert 0 < row.error_gradient < 1e-5
        assert row.ms_p50 == ""
    assert "clusters" in capsys.readouterr().out


def accuracy_rows():
    base = rows.row_of("accuracy", "cpu", Task("vectors", "both", CASE))
    errors = dict.fromkeys(accuracy.COLUMNS, 1e-6)
    ours = replace(base, ms_p50="", **errors)
    pot = replace(ours, provider="pot", error_plan=2e-7, error_value=1.08e-6)
    return [ours, pot, replace(ours, provider="ott", ms_p50=rows.FAILED, note="off")]


def test_accuracy_lists_the_errors_in_which_a_peer_is_better():
    accuracies = accuracy_rows()
    ((_, peer_row, column),) = accuracy.worse(accuracies)
    assert (peer_row.provider, column) == ("pot", "error_plan")
    assert "less accurate than pot: aligned, epsilon 0.05, plan" in accuracy.summary(accuracies)


def timed_rows():
    for kind, mode in (("solve", "forward"), ("vectors", "both")):
        row = rows.row_of(kind, "cpu", Task(kind, mode, CASE))
        row = replace(row, threads=2, device="Abacus")
        yield replace(row, ms_p50=2.0, ratio=1.0, peak_mb=0.5)
        yield replace(row, provider="torch", ms_p50=82.0, ratio=41.0)
        yield replace(row, provider="pot", note="off", version="POT 0.9")
        if kind == "solve":
            yield replace(row, provider="sweeps", ms_p50=1.0, ratio=0.52)
            yield replace(row, provider="sweeps", ms_p50=1.0, ratio=0.6, threads=1)
        else:
            yield replace(row, provider="bmm+cpu", ms_p50=9.0, ratio=4.5, peak_mb=7.25)


def test_operator_block_shows_ratios_failures_and_the_ceiling(tmp_path):
    all_rows = [*timed_rows(), *accuracy_rows()]
    text = operator_tables.block(all_rows)
    (forward,) = [line for line in text.splitlines() if "| cost given |" in line]
    assert "| forward | 2 ms |" in forward
    assert "| 41× | failed |" in forward
    assert "| 52% |" in forward
    (both,) = [line for line in text.splitlines() if "| from vectors |" in line]
    assert "| 4.5× | 41× | failed |" in both
    assert "0.5 / 7.25" in both
    assert "2 threads of an Abacus (rows: `benchmarks/results/cpu.csv`; POT 0.9, PyTorch" in text
    assert "| aligned | 0.05 | 1.0e-06; 1.1e-06 POT | 1.0e-06; 2.0e-07 POT |" in text
    assert "in 3 of 4 comparisons" in text
    operator_tables.draw(all_rows, tmp_path)
    for name in ("ratios", "ceiling"):
        path = tmp_path / f"operator_{name}.svg"
        xml.dom.minidom.parse(str(path))
        first = path.read_bytes()
        operator_tables.draw(all_rows, tmp_path)
        assert path.read_bytes() == first
    assert operator_tables.block([]) == ""


def test_operator_tables_match_the_committed_rows():
    committed = rows.read(operator_tables.RESULTS)
    shown = operator_tables.read_block(operator_tables.PAGE, operator_tables.BLOCK)
    assert shown == operator_tables.block(committed)
    assert operator_tables.read_block(
        operator_tables.README, operator_tables.SPEED
    ) == operator_tables.speed_table(committed)
    figures = {path.name for path in operator_tables.FIGURES.glob("operator_*.svg")}
    assert figures == {f"operator_{name}.svg" for name in ("ratios", "ceiling") if name in shown}


def test_study_tables_match_the_committed_results():
    for part in study_tables.PARTS:
        for name, content in part.blocks().items():
            assert operator_tables.read_block(study_tables.PAGE, name) == content, name
        figures = {path.stem for path in (study_tables.FIGURES / part.main).glob("*.png")}
        assert {"measure_per_language", "gap_per_arm", "alignment"} <= figures
    assert operator_tables.read_block(
        operator_tables.README, study_tables.README_BLOCK
    ) == study_tables.answer(study_tables.MULTILINGUAL.rows())


def test_make_plots_regenerates_every_page_byte_for_byte(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra `study`")
    figures = tmp_path / "docs" / "figures"
    figures.mkdir(parents=True)
    copies = {}
    for module, name in (
        (operator_tables, "README"),
        (operator_tables, "PAGE"),
        (study_tables, "PAGE"),
    ):
        page = getattr(module, name)
        copies[page] = tmp_path / page.relative_to(jobs.ROOT)
        empty = re.sub(
            r"(:begin -->\n).*?(<!-- \w+:end)", r"\1\2", page.read_text(), flags=re.DOTALL
        )
        copies[page].write_text(empty)
        monkeypatch.setattr(module, name, copies[page])
    figure_folders = [(study_tables, name) for name in ("FIGURES", "OVERVIEW")]
    for module, name in [(operator_tables, "FIGURES"), *figure_folders]:
        path = getattr(module, name)
        monkeypatch.setattr(module, name, tmp_path / path.relative_to(jobs.ROOT))
    assert main(["report"]) == 0
    for page, copy in copies.items():
        assert copy.read_bytes() == page.read_bytes(), page.name
    drawn = {path.relative_to(figures) for path in figures.rglob("*.*")}
    committed = jobs.ROOT / "docs" / "figures"
    assert drawn == {path.relative_to(committed) for path in committed.rglob("*.*")}
    first = study_tables.OVERVIEW.read_bytes()
    study_tables.draw_overview(study_tables.MULTILINGUAL.rows(), study_tables.OVERVIEW)
    assert study_tables.OVERVIEW.read_bytes() == first


def test_the_pool_table_sums_over_languages():
    def rows(kind, values, arm="ot"):
        groups = {"sw": "low", "so": "low", "de": "high"}
        return [
            {"kind": kind, "arm": arm, "language": x, "group": groups[x], "value": value}
            for x, value in values.items()
        ]

    pool = {"kind": "pool", "arm": "ot", "language": "", "value": 0.5, "low": 0.4, "high": 0.6}
    wanted = rows("pool_relevant", {"sw": 1 / 3, "so": 1 / 3, "de": 1 / 3})
    shares = rows("pool_share", {"sw": 0.3, "so": 0.1, "de": 0.6})
    gain = pool | {"kind": "pool_gain", "value": 0.1, "low": -0.1, "high": 0.2}
    table = study_tables.pools([pool, gain, *shares, *wanted])
    # The differences .033, .233 and .267, halved.
    assert "| `ot` | .500 [.400, .600] | +.100 [-.100, +.200] | 40 % | 27 % |" in table
    assert "67 % without bias" in table


def test_gains_are_drawn_over_three_properties_of_the_languages():
    pytest.importorskip("matplotlib", reason="needs the extra `study`")

    def row(kind, arm, language, value, **more):
        shared = {"collection": "", "measure": "", "name": language, "group": "low"}
        return {"kind": kind, "arm": arm, "language": language, "value": value} | shared | more

    rows = [
        r
        for language, value in (("sw", 0.1), ("so", 0.2))
        for r in (
            row("difference", "ot", language, value, against="zeroshot", low=0.0, high=0.3),
            row("measure", "zeroshot", language, 0.5),
            row("fertility", "teacher", language, 1.5),
            row("unseen", "", language, 0.1),
        )
    ]
    figure = study_tables.draw_gains(rows)
    labels = ["MAP of the zero-shot model", "tokens per word", "share of words in no sentence pair"]
    assert [axis.get_xlabel() for axis in figure.axes] == labels
    assert [text.get_text() for text in figure.axes[2].texts] == ["sw", "so"]
    # Without one of the properties there is no figure.
    assert study_tables.draw_gains([r for r in rows if r["kind"] != "unseen"]) is None


def test_the_held_out_table_lists_every_collection():
    def row(kind, arm, value, collection, **more):
        shared = {"measure": "AP", "low": 0.0, "high": 0.5, "language": "de", "name": "German"}
        return {"kind": kind, "arm": arm, "value": value, "collection": collection} | shared | more

    table = study_tables.held_out_table([
        row("ceiling", "English", 0.9, "news"),
        *(row("measure", arm, 0.2, "news") for arm in ("zeroshot", "ot")),
        row("measure", "ot", 0.3, "law"),
        row("difference", "ot", 0.1, "news", against="zeroshot", p_holm=0.01),
        row("difference", "ot", 0.1, "law", against="zeroshot", p_holm=0.5),
    ])  # fmt: skip
    assert "| arm | news, German | law, German |" in table
    assert "| `zeroshot` | .200 [.000, .500] |  |" in table
    assert "| `ot` | .200 [.000, .500]\\* | .300 [.000, .500] |" in table
    assert "English documents: news .900." in table


def test_study_tables_mark_significant_differences():
    def row(kind, arm, value, language="", **more):
        group = {"sw": "low", "de": "high"}.get(language, "")
        shared = {"collection": "first-sentence", "measure": "AP", "low": 0.0, "high": 0.5}
        return {"kind": kind, "arm": arm, "value": value, "language": language,
                "name": language.upper(), "group": group, **shared, **more}  # fmt: skip

    table_rows = [
        row("ceiling", "English", 0.86, "en"),
        *(row("measure", arm, 0.2, "sw") for arm in ("zeroshot", "ot", "pooled")),
        *(row("measure", arm, 0.3, "de") for arm in ("zeroshot", "ot", "pooled")),
        *(row("gap", arm, 0.1) for arm in ("zeroshot", "ot", "pooled")),
        row("closed", "ot", -0.25, low=-0.5),
        row("difference", "ot", 0.3, "sw", against="zeroshot", p_holm=0.001),
        row("difference", "ot", 0.3, "de", against="zeroshot", p_holm=0.2),
        row("difference", "pooled", -0.1, "de", against="zeroshot", p_holm=0.01),
        row("difference", "pooled", -0.2, "sw", against="ot", p_holm=0.06),
        row("difference", "pooled", 0.4, "de", against="ot", p_holm=0.04),
    ]
    table = study_tables.measures(table_rows)
    assert "| arm | SW | DE | low | high | high - low | closed |" in table
    assert "| `zeroshot` | .200 | .300 | .200 | .300 | .100 [.000, .500] |  |" in table
    assert (
        "| `ot` | .200\\* | .300 | .200 | .300 | .100 [.000, .500] | -25 % [-50 %, 50 %] |" in table
    )
    assert "| `pooled` | .200 | .300\\- |" in table
    assert "English: .860." in table
    assert "| `pooled` | -.200 | **+.400** |" in study_tables.differences(table_rows)


def test_results_have_the_fields_that_the_gate_compares():
    assert set(Results._fields) == {"value", "f", "g", "plan", "gradients"}


def test_overhead_rows_pass_the_gate_and_count_kernels():
    """No bar is tested: times are noisy. The count of PyTorch's kernels is exact."""
    rows = {(row.call, row.mode): row for row in overhead.measure(0.0, per_turn=1)}
    assert rows.keys() == overhead.calls().keys()
    assert rows["bare function", "both"].ratio == 1
    assert rows["ot_alignment", "forward"].kernels == 0
    assert rows["ot_alignment", "both"].kernels <= 3
    assert rows["bare function", "both"].kernels >= 2


@pytest.mark.slow
def test_launch_rows_compare_both_launchers(tmp_path):
    output = tmp_path / "launches.csv"
    command = [sys.executable, "-m", "benchmarks.launches", "--seconds", "0", "--output", output]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    with output.open(encoding="utf-8") as file:
        measured = list(csv.DictReader(file))
    assert [row["launcher"] for row in measured] == ["kept handles", "triton"] * 5
    loss = {row["mode"]: row for row in measured if row["call"] == "OTAlignmentLoss"}
    assert (loss["forward"]["launches"], loss["both"]["launches"]) == ("3", "4")


def test_the_page_states_the_committed_launches():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    path = ROOT / "benchmarks" / "results" / "launches.csv"
    with path.open(encoding="utf-8") as file:
        for line in launches.table(csv.DictReader(file)):
            assert line in page


def test_the_page_states_the_committed_overhead_and_scaling():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    names = {"sinkhorn": "`sinkhorn`, cost given", "ot_alignment": "`ot_alignment`, two masks"}
    modes = {"forward": "forward", "both": "forward + backward"}
    for row in csv.DictReader(
        (ROOT / "benchmarks" / "results" / "overhead.csv").open(encoding="utf-8")
    ):
        if row["call"] in names:
            time, ratio = float(row["us_p50"]), float(row["ratio"])
            cells = (names[row["call"]], modes[row["mode"]], f"{time:.3g}", f"{ratio:.2f}")
            assert f"| {' | '.join((*cells, row['kernels']))} |" in page
    rows = csv.DictReader((ROOT / "benchmarks" / "results" / "matching.csv").open(encoding="utf-8"))
    both = {(int(r["n"]), r["provider"]): r for r in rows if r["mode"] == "both"}
    for n in (4, 8, 16):
        ours = float(both[n, "optical"]["ms_p50"])
        ratios = [float(both[n, name]["ratio"]) for name in ("division", "logsumexp")]
        cells = f"{ours:.3g} ms | {ratios[0]:.0f}× | {ratios[1]:.0f}×"
        assert f"| 8192 × {n} × {n} | {cells} |" in page


def test_the_page_states_the_committed_index_of_passages():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    path = ROOT / "benchmarks" / "results" / "passages.csv"
    (row,) = csv.DictReader(path.open(encoding="utf-8"))
    value = {name: float(text) for name, text in row.items() if text[:1].isdigit() and "_" in name}
    for step, name in (("`optical index`", "write"), ("`--approximate`", "build")):
        cells = f"{value[f'{name}_cpu_s']:.1f} s | {value[f'{name}_mb']:.0f} MB"
        assert f"| {step} | {cells} | {value[f'{name}_gb']:.3f} GB |" in page
    exact = value["exact_cpu_s"] / 50
    assert f"per query | {exact:.3f} s | {value['exact_mb']:.0f} MB | |" in page
    for refine in (10, 50, 200):
        seconds, recall = value[f"refine_{refine}_cpu_s"] / 50, value[f"recall_{refine}"]
        assert f"| {refine} | {seconds:.3f} s | {recall:.3f} |" in page


def test_the_page_states_the_committed_recall():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    path = ROOT / "benchmarks" / "results" / "recall.csv"
    for row in csv.DictReader(path.open(encoding="utf-8")):
        recall, seconds = float(row["recall"]), float(row["cpu_s"])
        cells = f"{row['depth']} | {row['refine']} | {seconds:.2f} s | {recall:.3f}"
        assert f"| {cells} |" in page
        assert f"Exact search took {float(row['exact_cpu_s']):.2f} s of" in page
