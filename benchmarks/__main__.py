"""Command line of the operator benchmarks: ``python -m benchmarks solve --output rows.csv``."""

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

DESCRIPTION = """\
Benchmark the Sinkhorn operator against POT, GeomLoss, OTT-JAX and hand-written PyTorch loops. All
providers of a run alternate in the same rounds, and a provider is timed only if its results pass
the accuracy gate. See benchmarks/README.md."""
EPILOG = "`python -m benchmarks COMMAND --help` lists the options of a command."
COMMANDS = {
    "solve": "time a fixed number of iterations on a given cost",
    "vectors": "time a fixed number of iterations on a cost built from token vectors",
    "residual": "time until the marginal residual is met, by each provider's stopping rule",
    "large": "time one large problem from token vectors",
    "accuracy": "measure float32 errors against float64, without times",
}
TIMED = ("solve", "vectors", "residual", "large")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
RESIDUAL = 1e-3
# Default providers of `large`: the others take too long on one large problem.
LARGE = ("cuda", "triton", "cpu", "bmm+cpu", "torch", "geomloss_samples")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.benchmark == "report":
        operator_tables.main()
        study_tables.main()
        return 0
    jobs.ott_python = args.ott_python or jobs.ott_python
    with contextlib.ExitStack() as limits:
        try:
            names = _provider_names(args)
            benchmark_cases = _cases(args)
            limits.enter_context(meter.limit_cores(args.threads))
        except ValueError as error:
            parser.error(str(error))
        limits.enter_context(_torch_threads(args.threads))
        meter.keep_freed_memory()
        if args.benchmark == "accuracy":
            new_rows = _measure_accuracy(names, benchmark_cases)
        else:
            new_rows = [row for case in benchmark_cases for row in _time(args, names, case)]
    if args.output:
        rows.write(new_rows, args.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        command.add_argument(
            "--only",
            metavar="NAMES",
            help=f"comma-separated providers to run, among {', '.join(PROVIDERS)}",
        )
        command.add_argument(
            "--shapes",
            metavar="SHAPES",
            help="comma-separated cases, each BATCHxNxMxDIMxITERATIONS[:DATA] "
            f"with DATA one of {', '.join(cases.DATA)}",
        )
        command.add_argument(
            "--threads", type=int, help="number of cores and threads for every provider"
        )
        command.add_argument(
            "--ott-python",
            metavar="PYTHON",
            help="interpreter in which ott-jax is installed (default: the current one)",
        )
        command.add_argument(
            "--output",
            type=Path,
            metavar="CSV",
            help="file to merge the rows into; rows of the same measurement are replaced",
        )
        if name in TIMED:
            _add_timing_options(command)
    commands.add_parser(
        "report",
        help="rewrite the tables and figures of the documentation from the committed rows",
        description="Rewrite the tables and figures of the documentation from the committed rows.",
    )
    return parser


def _add_timing_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--modes",
        default=",".join(MODES),
        help="comma-separated: forward, both (forward and backward) (default: %(default)s)",
    )
    command.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="(default: %(default)s)"
    )
    command.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)"
    )
    command.add_argument(
        "--epsilon", type=float, default=0.05, help="temperature (default: %(default)s)"
    )
    command.add_argument(
        "--seconds",
        type=float,
        default=10,
        help="duration of the rounds, per case and mode (default: %(default)s)",
    )
    command.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="least number of rounds, whatever --seconds is (default: %(default)s)",
    )
    command.add_argument("--memory", action="store_true", help="measure peak memory as well")


def _provider_names(args: argparse.Namespace) -> list[str]:
    """The providers to run, in the order of ``PROVIDERS``."""
    if args.only:
        selected: Sequence[str] = args.only.split(",")
    else:
        selected = LARGE if args.benchmark == "large" else tuple(PROVIDERS)
    unknown = [name for name in selected if name not in (*PROVIDERS, *LARGE)]
    if unknown:
        raise ValueError(f"--only: {unknown[0]!r} is not among {','.join(PROVIDERS)}")
    return [name for name in PROVIDERS if name in selected]


def _cases(args: argparse.Namespace) -> list[cases.Case]:
    if args.benchmark == "accuracy":
        shapes = args.shapes.split(",") if args.shapes else accuracy.SHAPES
        return [cases.parse_shape(shape) for shape in shapes]
    if not set(args.modes.split(",")) <= set(MODES):
        raise ValueError(f"--modes is {args.modes!r}; expected some of {','.join(MODES)}")
    defaults = cases.CPU_SHAPES if args.device == "cpu" else cases.GPU_SHAPES
    shapes = defaults.get(args.benchmark, defaults["solve"])
    if args.shapes:
        shapes = args.shapes.split(",")
    options = {"epsilon": args.epsilon, "dtype": DTYPES[args.dtype], "device": args.device}
    if args.benchmark == "residual":
        options["tol"] = RESIDUAL
    return [cases.parse_shape(shape, **options) for shape in shapes]


def _measure_accuracy(
    names: Sequence[str], benchmark_cases: Sequence[cases.Case]
) -> list[rows.Row]:
    new_rows = accuracy.measure(names, benchmark_cases)
    print(accuracy.summary(new_rows))
    return new_rows


def _time(args: argparse.Namespace, names: Sequence[str], case: cases.Case) -> list[rows.Row]:
    print(f"{args.benchmark} {case.name} {args.dtype} on {args.device}", flush=True)
    new_rows = measure.measure(
        args.benchmark,
        "solve" if args.benchmark in ("solve", "residual") else "vectors",
        case,
        names,
        args.seconds,
        modes=("forward",) if args.benchmark == "residual" else args.modes.split(","),
        memory=args.memory,
        min_rounds=args.rounds,
    )
    print(rows.table(new_rows), flush=True)
    return new_rows


@contextlib.contextmanager
def _torch_threads(count: int | None) -> Iterator[None]:
    """Set the number of threads of PyTorch and of our library, and restore it afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    sys.exit(main())
