"""Measure the operator against its peers, every provider in the same rounds of one run.

solve: the cost is given. vectors: it is built from token vectors. residual: until the marginals
are met, each provider by its own stopping rule. large: one large problem from token vectors.
accuracy: float32 against float64. report: tables and figures of README
and docs, from the committed CSV files.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.operator import accuracy, cases, jobs, measure, meter, rows
from benchmarks.operator.jobs import MODES
from benchmarks.operator.providers import PROVIDERS
from benchmarks.tables import operator as operator_tables
from benchmarks.tables import study as study_tables

DTYPES = {"float32": torch.float32, "float64": torch.float64}
TIMED = ("solve", "vectors", "residual", "large")
RESIDUAL = 1e-3
# The reference of float64 on one large problem, and loops over it, are not for everyone's patience.
LARGE = ("cuda", "triton", "cpu", "bmm+cpu", "torch", "geomloss_samples")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name in (*TIMED, "accuracy"):
        command = commands.add_parser(name)
        command.add_argument("--only", help=f"providers among {','.join(PROVIDERS)}")
        command.add_argument("--shapes", help="BATCHxNxMxDIMxITERATIONS[:DATA], comma-separated")
        command.add_argument("--threads", type=int, help="cores for everyone, and threads on them")
        command.add_argument("--ott-python", help="interpreter that has ott-jax", metavar="PYTHON")
        command.add_argument("--output", type=Path, help="a CSV file; replaces rows of the same")
        if name == "accuracy":
            continue
        command.add_argument("--modes", default=",".join(MODES), help="forward,both or one of them")
        command.add_argument("--dtype", choices=DTYPES, default="float32")
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument("--epsilon", type=float, default=0.05)
        command.add_argument("--seconds", type=float, default=10, help="per shape and mode")
        command.add_argument("--rounds", type=int, default=5, help="at least, whatever --seconds")
        command.add_argument("--memory", action="store_true", help="measure peak memory as well")
    commands.add_parser("report", help=operator_tables.__doc__)
    given = parser.parse_args(arguments)
    if given.benchmark == "report":
        operator_tables.main()
        study_tables.main()
        return 0

    names = list(PROVIDERS)
    if given.only or given.benchmark == "large":
        wanted = given.only.split(",") if given.only else LARGE
        unknown = [name for name in wanted if name not in (*PROVIDERS, *LARGE)]
        if unknown:
            parser.error(f"--only: {unknown[0]!r} is not among {','.join(PROVIDERS)}")
        names = [name for name in PROVIDERS if name in wanted]
    jobs.ott_python = given.ott_python or jobs.ott_python
    with contextlib.ExitStack() as limits:
        try:
            asked = _cases(given)
            limits.enter_context(meter.cores(given.threads))
        except ValueError as error:
            parser.error(str(error))
        limits.enter_context(_threads(given.threads))
        meter.keep_memory()
        made = _accuracy(names, asked) if given.benchmark == "accuracy" else []
        for case in asked if given.benchmark in TIMED else ():
            made += _measured(given, names, case)
    if given.output:
        rows.write(made, given.output)
    return 0


def _cases(given: argparse.Namespace) -> list[cases.Case]:
    if given.benchmark == "accuracy":
        texts = given.shapes.split(",") if given.shapes else accuracy.SHAPES
        return [cases.parse_shape(text) for text in texts]
    if not set(given.modes.split(",")) <= set(MODES):
        raise ValueError(f"--modes is {given.modes!r}; expected some of {','.join(MODES)}")
    shapes = cases.CPU_SHAPES if given.device == "cpu" else cases.GPU_SHAPES
    default = shapes.get(given.benchmark, shapes["solve"])
    options = {"epsilon": given.epsilon, "dtype": DTYPES[given.dtype], "device": given.device}
    if given.benchmark == "residual":
        options["tol"] = RESIDUAL
    texts = given.shapes.split(",") if given.shapes else default
    return [cases.parse_shape(text, **options) for text in texts]


def _accuracy(names: Sequence[str], asked: Sequence[cases.Case]) -> list[rows.Row]:
    made = accuracy.measure(names, asked)
    print(accuracy.summary(made))
    return made


def _measured(given: argparse.Namespace, names: Sequence[str], case: cases.Case) -> list[rows.Row]:
    print(f"{given.benchmark} {case.name} {given.dtype} on {given.device}", flush=True)
    made = measure.measure(
        given.benchmark,
        "solve" if given.benchmark in ("solve", "residual") else "vectors",
        case,
        names,
        given.seconds,
        modes=("forward",) if given.benchmark == "residual" else given.modes.split(","),
        memory=given.memory,
        least=given.rounds,
    )
    print(rows.table(made), flush=True)
    return made


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """PyTorch's threads, and those of our library with them, set back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    sys.exit(main())
