"""Types of command-line values, and checks of inputs and outputs that need no model."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from optical.io.files import check_readable, writable_folder

FIGURE_SUFFIXES = (".png", ".pdf", ".svg")
# As `optical.models.encoding.ROLES`, whose module imports PyTorch.
ROLES = ("query", "document")
# Value of --report_to -> packages, one of which it needs.
_REPORTERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",),
    "neptune": ("neptune",),
    "clearml": ("clearml",),
    "trackio": ("trackio",),
    "swanlab": ("swanlab",),
}


def at_least(least: int) -> Callable[[str], int]:
    """Return an argparse type: a whole number that is not below a limit."""

    def whole_number(text: str) -> int:
        value = int(text)
        if not least <= value <= sys.maxsize:
            limit = f"{least} or more" if value < least else f"{sys.maxsize} or less"
            raise argparse.ArgumentTypeError(f"{text}, expected {limit}")
        return value

    whole_number.__name__ = "int"  # argparse names the type: "invalid int value"
    return whole_number


def number(
    low: float, high: float = math.inf, *, include_low: bool = True
) -> Callable[[str], float]:
    """Return an argparse type: a number in a range that includes its finite ends."""

    def in_range(text: str) -> float:
        value = float(text)
        inside = low <= value <= high if include_low else low < value <= high
        if not inside or math.isinf(value):
            start = f"from {low:g}" if include_low else f"above {low:g}"
            end = "" if math.isinf(high) else f" to {high:g}"
            raise argparse.ArgumentTypeError(f"{text}, expected a number {start}{end}")
        return value

    in_range.__name__ = "float"
    return in_range


def check_tag(tag: str | None, model: str) -> str:
    """Return the last column of a run, by default the last telling part of a model's path.

    Raises:
        ValueError: the given tag is not one word.
    """
    if tag is None:
        parts = [part for part in Path(model).parts if part not in ("final", "/", "..", ".")]
        # Columns are separated by white space, which a path may contain.
        return "_".join(parts[-1].split()) or "optical" if parts else "optical"
    if tag.split() != [tag]:
        raise ValueError(
            f"tag: {tag!r}, expected one word, because columns of a run are separated by white "
            "space"
        )
    return tag


def check_passages(passage_length: int | None, passage_stride: int | None) -> None:
    if passage_stride is not None and passage_length is None:
        raise ValueError("passage_stride: given without passage_length, which cuts the passages")


def check_inputs(paths: Iterable[str | None]) -> None:
    """Raise an error for the first file that cannot be read; None stands for no file."""
    for path in paths:
        if path is not None:
            check_readable(path)


def check_not_input(output: str, inputs: Iterable[str | None]) -> None:
    """Raise ValueError if writing a file would destroy an input; pairs of files have a comma."""
    target = Path(output)
    for name in inputs:
        for path in (name, *name.split(",")) if name and target.is_file() else ():
            if Path(path).is_file() and target.samefile(path):
                raise ValueError(f"output: {output} is an input of this command; choose another")


def check_output_folder(path: str) -> None:
    """Raise OSError unless a folder, which need not exist, can be written."""
    folder = Path(path)
    if not path or (folder.exists() and not folder.is_dir()):
        raise OSError(f"output folder {path or repr(path)} is no folder; choose another one")
    writable_folder(folder if folder.is_dir() else folder.parent)


def check_reporters(names: Iterable[str]) -> None:
    """Raise ImportError if the package of a `--report_to` value is missing."""
    for name in names:
        packages = _REPORTERS.get(name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            raise ImportError(
                f"report_to: {name} needs the package {packages[0]}: pip install {packages[0]}"
            )
