"""Entry point of the command line: dispatch, error messages and exit codes of `optical`."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from optical import __version__
from optical.cli import evaluation, indexing, models, retrieval
from optical.cli.arguments import at_least, check_inputs, number
from optical.cli.errors import explain, was_interrupted
from optical.cli.shared import (
    add_command,
    add_json_argument,
    check_installed,
    quiet_libraries,
    without_progress_bars,
)
from optical.cli.train import RECIPES, train
from optical.io.settings import nearest

EXAMPLES = """examples:
  optical study                                   the embedded demonstration, a few minutes
  optical study examples/clir_pack.yaml
  optical train distill --teacher runs/teacher/final --bitext en-sw.tsv --role document \\
                        --output_dir runs/sw
  optical search runs/sw/final --collection wikiclir/sw --output sw.run
  optical evaluate sw.run --qrels wikiclir/sw
  optical compare zeroshot.run sw.run --qrels wikiclir/sw
"""


logger = logging.getLogger("optical")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage of all options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Returns:
        0 for success, 1 for a failed self-test, 2 for a user error, 130 for an interruption.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("optical").setLevel(logging.INFO)
    try:
        if arguments[:1] == ["train"]:
            return train(arguments[1:])
        return _run_command(arguments)
    except KeyboardInterrupt:
        return _interrupted(arguments)
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has closed it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if was_interrupted(error):
            return _interrupted(arguments)
        message = explain(error)
        if message is None or sys.flags.dev_mode:  # python -X dev -m optical.cli ...
            raise
        print(f"optical: error: {message}", file=sys.stderr)
        return 2


def _run_command(arguments: list[str]) -> int:
    parser, commands = build_parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    # argparse would list all commands without naming the nearest one.
    if arguments[0] not in commands and not arguments[0].startswith("-"):
        hint = nearest(arguments[0], commands)
        raise ValueError(f"command {arguments[0]!r} is unknown{hint}")
    args, unknown = parser.parse_known_args(arguments)
    values = vars(args)
    command: argparse.ArgumentParser = values.pop("parser", parser)
    if unknown and "measures" in values and all(map(_is_measure, unknown)):
        # `--measures AP nDCG@10` without quotes.
        values["measures"] = " ".join([values["measures"], *unknown])
        unknown = []
    if unknown:
        options = [name for action in command._actions for name in action.option_strings]
        option = unknown[0].split("=")[0]
        hint = nearest(option, options) if option.startswith("--") else ""
        command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    run = values.pop("run")
    exit_code: int = run(**values)
    return exit_code


def _is_measure(word: str) -> bool:
    return not word.startswith("-") and not os.path.exists(word) and "/" not in word


def _interrupted(arguments: list[str]) -> int:
    """Say what an interruption leaves behind; return the exit code."""
    print(f"interrupted; {_after_interrupt(arguments)}", file=sys.stderr)
    return 130


def _after_interrupt(arguments: list[str]) -> str:
    if arguments[:1] == ["train"]:
        return "with --resume the same command continues from its last checkpoint"
    stored = arguments[:1] == ["export"] and not any("pylate" in word for word in arguments)
    if stored or arguments[:1] in (["study"], ["vectors"], ["index"]):
        return "finished parts are kept; the same command continues where it stopped"
    return "nothing was written"


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of the command line, and the parser of each command."""
    parser = _Parser(
        prog="optical",
        description="Cross-lingual retrieval by optimal-transport distillation.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"optical {__version__}",
        help="Print the version and exit.",
    )
    parser_class: Any = functools.partial(_Parser, allow_abbrev=False)
    subparsers = parser.add_subparsers(metavar="command", parser_class=parser_class)
    recipes = ", ".join(RECIPES)
    subparsers.add_parser("train", help=f"Train a model: {recipes}.", add_help=False)
    _register_study(subparsers)
    retrieval.register(subparsers)
    evaluation.register(subparsers)
    indexing.register(subparsers)
    models.register(subparsers)
    _register_report(subparsers)
    _register_figures(subparsers)
    _register_warmup(subparsers)
    _register_info(subparsers)
    return parser, subparsers.choices


def _register_study(subparsers: Any) -> None:
    command = add_command(
        subparsers,
        "study",
        study,
        "Train, search, evaluate, compare and report from one configuration file.",
        "optical study examples/clir_pack.yaml --output runs/pack",
    )
    command.add_argument("config", nargs="?", help="YAML file (default: the demonstration).")
    command.add_argument("--output", help="Output folder, instead of that of the configuration.")


def study(config: str | None, output: str | None) -> int:
    """Run a study and print the path of its report."""
    for module in ("yaml", "ir_measures", "matplotlib", "sentence_transformers"):
        check_installed(module, "study", "a study")
    from optical.study import run_study
    from optical.study.config import read_config

    if config is not None:
        logger.info("reading %s", config)
        # Errors of the file are found before the libraries are loaded.
        read_config(config, output)
    logger.info("loading the libraries")
    quiet_libraries()

    with without_progress_bars():
        print(run_study(config, output))
    return 0


def _register_report(subparsers: Any) -> None:
    command = add_command(
        subparsers,
        "report",
        report,
        "Write the report of a study, from the tasks that are finished.",
        "optical report runs/pack --format pdf",
    )
    command.add_argument("folder", help="Output folder of a study that has started.")
    _add_format_argument(
        command,
        "Formats of the figures beside PNG; those that exist are drawn again (default: none).",
    )


def report(folder: str, format: list[str] | None) -> int:
    """Write the report of a study and print its path."""
    check_installed("matplotlib", "study", "a report with figures")
    from optical.report import report_folder

    print(report_folder(folder, format or ()))
    return 0


def _register_figures(subparsers: Any) -> None:
    command = add_command(
        subparsers,
        "figures",
        figures,
        "Draw the figures of a study from its results.csv and the tables beside it.",
        "optical figures runs/pack/results.csv --output figures --format pdf",
    )
    command.add_argument("results", help="File results.csv of a study.")
    command.add_argument("--output", required=True, help="Folder for the figures.")
    _add_format_argument(command, "Formats of the files (default: png).")


def _add_format_argument(command: argparse.ArgumentParser, help_text: str) -> None:
    command.add_argument(
        "--format",
        nargs="+",
        action="extend",
        choices=("png", "svg", "pdf"),
        help=help_text,
    )


def figures(results: str, output: str, format: list[str] | None) -> int:
    """Draw the figures of a results table and print their paths."""
    check_installed("matplotlib", "study", "drawing figures")
    from optical.io.files import writable_folder
    from optical.report import draw_figures

    check_inputs([results])
    formats = list(dict.fromkeys(format or ["png"]))
    for path in draw_figures(Path(results), writable_folder(output), formats).values():
        for suffix in formats:
            print(path.with_suffix(f".{suffix}"))
    return 0


def _register_warmup(subparsers: Any) -> None:
    command = add_command(
        subparsers,
        "warmup",
        warmup,
        "Compile the GPU kernels of a training before it starts, in parallel.",
        "optical warmup --length 128 --dim 768 --dtype bfloat16",
    )
    lengths = {"--length": "student", "--teacher-length": "teacher"}
    for option, side in lengths.items():
        default = 128 if side == "student" else None
        shown = "128" if side == "student" else "--length"
        help_text = f"Longest text of the {side} in tokens (default: {shown})."
        command.add_argument(option, type=at_least(1), default=default, help=help_text)
    command.add_argument(
        "--dim", type=at_least(1), default=768, help="Length of a token vector (default: 768)."
    )
    for option, side in {"--dtype": "student", "--teacher-dtype": "teacher"}.items():
        command.add_argument(
            option,
            choices=("float32", "float16", "bfloat16"),
            default="float32" if side == "student" else None,
            help=f"Type of the vectors of the {side} under autocast "
            f"(default: {'float32' if side == 'student' else '--dtype'}).",
        )
    command.add_argument(
        "--cost",
        choices=("cosine", "sqeuclidean", "dot"),
        default="cosine",
        help="Cost of a pair of tokens (default: cosine).",
    )
    command.add_argument(
        "--gradient",
        choices=("envelope", "implicit", "unroll"),
        default="envelope",
        help="Gradient of the loss (default: envelope).",
    )
    command.add_argument(
        "--packed", action="store_true", help="Compile for packed texts (cu_seqlens) instead."
    )
    command.add_argument("--device", default="cuda", help="Device to compile for (default: cuda).")
    command.add_argument("--backend", default="auto", help="Backend to compile (default: auto).")
    command.add_argument(
        "--threads", type=at_least(1), help="Threads that compile (default: one a core)."
    )


def warmup(
    length: int,
    teacher_length: int | None,
    dim: int,
    dtype: str,
    teacher_dtype: str | None,
    cost: Any,
    gradient: Any,
    packed: bool,
    device: str,
    backend: str,
    threads: int | None,
) -> int:
    """Compile kernels and print a line for each group of them."""
    import torch

    from optical.losses import warmup as compile_kernels

    dtypes = [getattr(torch, name) for name in (dtype, teacher_dtype or dtype)]
    try:
        compile_kernels(
            length,
            teacher_length,
            dim,
            dtype=dtypes,
            cost=cost,
            gradient=gradient,
            packed=packed,
            device=device,
            backend=backend,
            threads=threads,
        )
    except RuntimeError as error:  # of a compiler, or of the device
        raise ValueError(str(error).strip().split("\n")[0]) from error
    return 0


def _register_info(subparsers: Any) -> None:
    command = add_command(
        subparsers,
        "info",
        info,
        "Show versions and available backends, and run a short self-test.",
        "optical info",
    )
    command.add_argument(
        "--seconds",
        type=number(0),
        default=10.0,
        help="Duration of the self-test in seconds; 0 skips it (default: 10).",
    )
    add_json_argument(command)


def info(seconds: float, as_json: bool) -> int:
    """Print the environment; return 1 if the self-test fails."""
    from optical.testing import selftest

    report = selftest.inspect(seconds)
    print(json.dumps(report, indent=1) if as_json else selftest.to_text(report))
    return 1 if report["passed"] is False else 0
