"""The benchmark harness: its gate, its interleaving, its file; never a time."""

import csv
from dataclasses import fields, replace

import pytest
import torch

from benchmarks import cases, measure, providers
from benchmarks.__main__ import main

CASE = cases.Case(3, 6, 5, 12)


@pytest.fixture(scope="module")
def truth():
    return measure.Truth.of(CASE)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", providers.PROVIDERS)
@pytest.mark.parametrize("mode", measure.MODES)
def test_every_provider_meets_the_gate(name, mode, truth):
    provider = providers.PROVIDERS[name]
    reason = provider.unavailable(CASE)
    if reason is not None:
        pytest.skip(reason=f"{name}: {reason}")
    if (name, mode) == ("geomloss", "both"):
        pytest.skip(reason="geomloss 0.3.1: the gradient of solve_batch is not its plan")
    error = measure.check(provider, mode, CASE, truth)
    assert 0 <= error < (0.1 if provider.same_iterates else 0.5)


def test_the_gate_refuses_a_wrong_value_plan_or_gradient(truth):
    right = providers.PROVIDERS["reference"]

    def wrong(change):
        return replace(right, solve=lambda cost, case: change(right.solve(cost, case), cost))

    shifted = wrong(lambda s, cost: replace(s, value=s.value + 1e-3))
    scaled = wrong(lambda s, cost: replace(s, plan=lambda: s.plan() * 1.01))
    for broken in (shifted, scaled):
        with pytest.raises(AssertionError, match="reference 3x6x5x12"):
            measure.check(broken, "forward", CASE, truth)
    # The value is right, but half of its dependence on the cost is cut.
    cut = wrong(lambda s, cost: replace(s, value=(s.value + s.value.detach()) / 2))
    measure.check(cut, "forward", CASE, truth)
    with pytest.raises(AssertionError, match="reference 3x6x5x12"):
        measure.check(cut, "both", CASE, truth)
    limit = replace(shifted, same_iterates=False)
    with pytest.raises(AssertionError, match="value is off by"):
        measure.check(limit, "forward", replace(CASE, max_iter=300), truth)


def test_a_failed_provider_has_no_time(monkeypatch, tmp_path, capsys):
    right = providers.PROVIDERS["reference"]
    wrong = replace(right, name="wrong", solve=lambda cost, case: right.solve(cost + 0.01, case))
    monkeypatch.setitem(providers.PROVIDERS, "wrong", wrong)
    output = tmp_path / "results" / "cpu.csv"
    arguments = ["sinkhorn", "--only", "wrong,reference", "--shapes", "3x6x5x12"]
    assert main([*arguments, "--seconds", "0", "--output", str(output)]) == 0
    rows = rows_of(output)
    assert list(rows[0]) == [field.name for field in fields(measure.Row)]
    assert [(row["provider"], row["mode"]) for row in rows] == [
        ("reference", "forward"),
        ("wrong", "forward"),
        ("reference", "both"),
        ("wrong", "both"),
    ]
    for row in rows:
        assert (row["batch"], row["n"], row["m"], row["max_iter"]) == ("3", "6", "5", "12")
        if row["provider"] == "wrong":
            assert row["ms_p50"] == "failed"
            assert not any(row[name] for name in ("ms_p20", "ms_p80", "ratio_to_reference"))
        else:
            assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
            assert float(row["ratio_to_reference"]) == 1
    assert "wrong failed (forward)" in capsys.readouterr().out


def test_rounds_alternate():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = measure.interleave(calls, "cpu", seconds=0, least=4)
    assert order == ["a", "b"] * 5  # one round to warm up
    assert [len(x) for x in times.values()] == [4, 4]


def test_the_ratio_pairs_neighbours_in_time():
    row = measure._row("cpu", "forward", CASE)
    # A machine twice as slow from the second round on: the ratio is 3 all the same.
    timed = measure._timed(row, [1.0, 2.0, 2.0], [3.0, 6.0, 6.0])
    assert timed.ratio_to_reference == 3
    assert timed.ms_p50 == 2
    assert measure._timed(row, [1.0], None).ratio_to_reference == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "reference,ghost"], "'ghost' is not among"),
        (["--shapes", "3x4x5"], "expected BATCHxNxMxITERATIONS"),
        (["--shapes", "3x4x0x5"], "expected BATCHxNxMxITERATIONS"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["sinkhorn", *arguments])
    assert message in capsys.readouterr().err


def test_the_same_costs_every_time():
    cost = CASE.cost()
    assert cost.shape == (3, 6, 5)
    assert cost.dtype == torch.float64
    assert torch.equal(cost, CASE.cost())
    assert ((cost >= 0) & (cost <= 2)).all()
