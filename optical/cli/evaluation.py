"""The commands `evaluate` and `compare`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from optical.cli.arguments import at_least, check_inputs
from optical.cli.shared import (
    add_command,
    add_identical_argument,
    add_json_argument,
    add_split_argument,
    check_installed,
)
from optical.retrieval.evaluation import DEFAULT_MEASURES
from optical.retrieval.statistics import CORRECTIONS, TESTS


def register(subparsers: Any) -> None:
    command = add_command(
        subparsers,
        "evaluate",
        evaluate,
        "Compute effectiveness measures of a run.",
        'optical evaluate sw.run --qrels wikiclir/sw --measures "AP nDCG@10" --json',
    )
    command.add_argument("run_file", metavar="run", help="TREC run, plain or gzip.")
    _add_judgement_arguments(command)
    command.add_argument(
        "--per-query", action="store_true", help="Print the values of each query too."
    )
    _register_compare(subparsers)


def _register_compare(subparsers: Any) -> None:
    command = add_command(
        subparsers,
        "compare",
        compare,
        "Test the differences between runs by paired tests over queries.",
        "optical compare zeroshot.run sw.run --qrels wikiclir/sw",
    )
    command.add_argument("runs", nargs="+", help="TREC runs; the first is the baseline.")
    _add_judgement_arguments(command)
    command.add_argument("--baseline", help="Another baseline, one of the runs.")
    command.add_argument(
        "--test",
        choices=TESTS,
        default="randomization",
        help="Paired test (default: randomization).",
    )
    command.add_argument(
        "--correction",
        choices=CORRECTIONS,
        default="holm",
        help="Correction for multiple comparisons (default: holm).",
    )
    command.add_argument(
        "--samples",
        type=at_least(1),
        default=100_000,
        help="Number of random sign patterns of the randomization test (default: 100000).",
    )
    command.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        help="Seed of the sign patterns and intervals (default: 0).",
    )


def _add_judgement_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--qrels",
        required=True,
        help="Relevance judgements: a TREC file, an ir_datasets id or a BEIR folder.",
    )
    add_split_argument(command)
    add_identical_argument(command)
    command.add_argument(
        "--measures",
        default=" ".join(DEFAULT_MEASURES),
        help="Names of measures as in ir_measures (nDCG@10) or trec_eval (ndcg_cut_10), separated "
        f"by spaces (default: {' '.join(DEFAULT_MEASURES)}).",
    )
    add_json_argument(command)


def evaluate(
    run_file: str,
    qrels: str,
    split: str,
    ignore_identical_ids: bool,
    measures: str,
    as_json: bool,
    per_query: bool,
) -> int:
    """Print the measures of a run."""
    check_installed("ir_measures", "eval", "evaluation")
    from optical.data.collection import load_judgements
    from optical.data.measures import check_measures
    from optical.retrieval.evaluation import evaluate as evaluate_run

    check_measures(measures)
    check_inputs([run_file])
    judgements = load_judgements(qrels, split=split)
    evaluation = evaluate_run(_read_run(run_file, ignore_identical_ids), judgements, measures)
    if as_json:
        print(json.dumps(evaluation.to_dict(per_query=per_query), indent=1))
        return 0
    print(evaluation.to_table())
    if per_query:
        print("\t".join(["query", *evaluation.measures]))
        for query in evaluation.queries:
            values = [f"{evaluation.per_query[name][query]:.4f}" for name in evaluation.measures]
            print("\t".join([query, *values]))
    return 0


def _read_run(path: str, ignore_identical_ids: bool) -> Any:
    from optical.data.trec import read_run, without_identical_ids

    run = read_run(path)
    return without_identical_ids(run) if ignore_identical_ids else run


def compare(
    runs: list[str],
    qrels: str,
    split: str,
    ignore_identical_ids: bool,
    measures: str,
    as_json: bool,
    baseline: str | None,
    test: str,
    correction: str,
    samples: int,
    seed: int,
) -> int:
    """Print a comparison of runs with a baseline."""
    if len(set(runs)) < 2:
        raise ValueError("runs: one given, expected at least two different ones")
    if baseline is not None and baseline not in runs:
        raise ValueError(f"baseline: {baseline!r}, expected one of the runs: {', '.join(runs)}")
    check_installed("ir_measures", "eval", "evaluation")
    check_installed("numpy", "eval", "a comparison of runs")
    if test == "t":
        check_installed("scipy", "eval", "the t-test")
    from optical.data.collection import load_judgements
    from optical.data.measures import check_measures
    from optical.retrieval import evaluation

    check_measures(measures)
    check_inputs(runs)
    judgements = load_judgements(qrels, split=split)
    comparison = evaluation.compare(
        {
            path: evaluation.evaluate(_read_run(path, ignore_identical_ids), judgements, measures)
            for path in runs
        },
        baseline=baseline,
        test=test,
        correction=correction,
        samples=samples,
        seed=seed,
    )
    print(json.dumps(comparison.to_dict(), indent=1) if as_json else comparison.to_markdown())
    return 0
