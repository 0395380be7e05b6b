"""``python -m benchmarks sinkhorn``: measure the operator against its peers, in one run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import cases, measure
from benchmarks.providers import PROVIDERS

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    sinkhorn = commands.add_parser("sinkhorn", help="the operator, given the cost")
    names = ",".join(PROVIDERS)
    sinkhorn.add_argument("--only", default=names, help=f"providers among {names}")
    sinkhorn.add_argument("--dtype", choices=DTYPES, default="float32")
    sinkhorn.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    sinkhorn.add_argument("--shapes", help="BATCHxNxMxITERATIONS, separated by commas")
    sinkhorn.add_argument("--epsilon", type=float, default=0.05)
    sinkhorn.add_argument("--threads", type=int, help="threads of PyTorch and of our library")
    sinkhorn.add_argument("--seconds", type=float, default=10, help="per shape and mode")
    sinkhorn.add_argument("--output", type=Path, help="a CSV file, replaced")
    given = parser.parse_args(arguments)

    only = given.only.split(",")
    unknown = [name for name in only if name not in PROVIDERS]
    if unknown:
        parser.error(f"--only: {unknown[0]!r} is not among {names}")
    # In the order of the table, so that the reference is measured first.
    only = [name for name in PROVIDERS if name in only]
    default = cases.CPU_SHAPES if given.device == "cpu" else cases.GPU_SHAPES
    try:
        texts = given.shapes.split(",") if given.shapes else default
        shapes = [cases.parse_shape(text) for text in texts]
    except ValueError as error:
        parser.error(f"--shapes: {error}")
    if given.threads:
        torch.set_num_threads(given.threads)

    rows: list[measure.Row] = []
    for shape in shapes:
        options = {"epsilon": given.epsilon, "dtype": DTYPES[given.dtype], "device": given.device}
        case = cases.Case(*shape, **options)
        print(f"{case.name} {given.dtype} on {given.device}")
        rows += measure.measure(case, only, given.seconds)
    print(measure.table(rows))
    if given.output:
        measure.write(rows, given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
