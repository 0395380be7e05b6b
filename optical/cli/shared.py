"""Helpers shared by the commands: argument groups, output, missing packages and quiet libraries."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from optical.cli.arguments import at_least
from optical.io.environment import require
from optical.io.streams import descriptor

logger = logging.getLogger("optical")


def add_command(
    subparsers: Any, name: str, run: Callable[..., int], help_text: str, example: str
) -> argparse.ArgumentParser:
    """Add a command; `run` is called with its arguments by name and returns the exit code."""
    command: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=help_text,
        description=help_text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run, parser=command)
    return command


def add_json_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", dest="as_json", help="Print JSON.")


def add_split_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--split", default="test", help="Judgements of a BEIR folder to use (default: test)."
    )


def add_identical_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--ignore-identical-ids",
        action="store_true",
        help="Leave out of each ranking the document with the id of the query, as for ArguAna and "
        "Quora in BEIR.",
    )


def add_encoding_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--batch-size",
        type=at_least(1),
        default=32,
        help="Number of texts per forward pass (default: 32).",
    )
    command.add_argument(
        "--passage-length",
        type=at_least(1),
        help="Split documents into passages of this many tokens and score them by their best "
        "passage, MaxP (default: whole documents, cut at the model's length).",
    )
    command.add_argument(
        "--passage-stride",
        type=at_least(1),
        help="Distance between the starts of passages in tokens (default: half of "
        "--passage-length, without which it is refused).",
    )


def add_worker_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--worker",
        type=at_least(0),
        help="Number of this process, from 0, of several that write one output together (default: "
        "$RANK, which torchrun and accelerate set, or 0).",
    )
    command.add_argument(
        "--workers", type=at_least(1), help="Number of processes (default: $WORLD_SIZE, or 1)."
    )


def workers_of(worker: int | None, workers: int | None) -> tuple[int, int]:
    """Return the number of this process and of all, from options or the environment.

    Raises:
        ValueError: the numbers do not fit.
    """
    if workers is None:
        workers = _from_environment("WORLD_SIZE", 1)
    if worker is None:
        worker = _from_environment("RANK", 0) if workers > 1 else 0
    if worker >= workers:
        raise ValueError(f"worker: {worker}, expected a number from 0 to {workers - 1}")
    return worker, workers


def _from_environment(name: str, least: int) -> int:
    """Return the number in a variable of the environment, by default the least one."""
    text = os.environ.get(name) or str(least)
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name}: {text!r} in the environment, expected a number from {least}")
    return int(text)


def add_device_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device",
        help="Device of the model, such as cpu or cuda:1 (default: a GPU if there is one; under "
        "torchrun, that of $LOCAL_RANK).",
    )


def check_device(device: str | None) -> None:
    """Raise ValueError for a name that is no device, or for a device that is not here."""
    if device is None:
        return
    import torch

    try:
        kind = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: {device!r}, expected a name such as cpu, cuda or cuda:1") from (
            None
        )
    count = torch.cuda.device_count()
    if kind.type == "cuda" and (kind.index or 0) >= count:
        raise ValueError(f"device: {device}, but PyTorch finds {count} CUDA devices here")


def load_model(name: str, device: str | None = None) -> Any:
    """Load a retriever onto a device; by default that of this process under torchrun."""
    import torch

    logger.info("loading the libraries and the model %s", name)
    from optical.models.retriever import load_retriever

    quiet_libraries()
    model = load_retriever(name)
    if device is None and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        device = f"cuda:{_from_environment('LOCAL_RANK', 0) % torch.cuda.device_count()}"
    return model if device is None else model.to(device)


def report_output(output: str, counts: Mapping[str, Any], as_json: bool) -> int:
    """Print the written file and counts of its content; return the exit code 0."""
    stream = result_stream(output)
    if as_json:
        print(json.dumps({"output": output, **counts}), file=stream)
    else:
        listed = ", ".join(f"{value} {name}" for name, value in counts.items())
        print(f"{output}: {listed}" if listed else output, file=stream)
    return 0


def result_stream(output: str) -> TextIO:
    """Return standard output, or standard error if the output itself went to standard output."""
    return sys.stderr if descriptor(output) == 1 else sys.stdout


def check_installed(module: str, extra: str, purpose: str) -> None:
    """Raise ImportError with the name of the extra if a package is missing.

    The package is not imported, so the check takes no time before other errors are found.
    """
    try:
        missing = importlib.util.find_spec(module) is None
    except (ImportError, ValueError):
        missing = True
    if missing:
        require(module, extra, purpose)


def quiet_libraries() -> None:
    """Silence progress bars and loading reports of the libraries."""
    import warnings

    import datasets
    import huggingface_hub
    from transformers.utils import logging as transformers_logging

    silence: Any = transformers_logging
    silence.set_verbosity_error()
    silence.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    # Without a network it would report each of its attempts.
    hub_logging: Any = huggingface_hub.logging
    hub_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Disable all tqdm progress bars, which would break the lines of a log.

    tqdm reads its environment variable on import, and torch has imported it already.
    """
    from tqdm.std import tqdm

    original = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(original, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = original
