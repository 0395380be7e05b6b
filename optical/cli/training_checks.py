"""Checks of a training's options, inputs and output before Transformers and models are loaded."""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from optical.cli.arguments import check_reporters
from optical.io.files import check_readable, writable_folder
from optical.training.options import WITHOUT_STEPS

# The trainer arguments in daily use, with the types that Transformers gives them. A command with
# any other argument is checked after Transformers has parsed it.
_TRAINER_ARGUMENTS: dict[str, Any] = {
    "output_dir": str,
    "max_steps": int,
    "num_train_epochs": float,
    "learning_rate": float,
    "per_device_train_batch_size": int,
    "gradient_accumulation_steps": int,
    "warmup_steps": float,
    "weight_decay": float,
    "seed": int,
    "save_steps": float,
    "logging_steps": float,
    "max_length": str,
    "report_to": str,
    "bf16": bool,
    "fp16": bool,
    "use_cpu": bool,
    "disable_tqdm": bool,
    "dataloader_num_workers": int,
}
_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
# Options that name models, and those that name files, by the reader that checks them.
_MODELS = ("model", "teacher", "student", "models")


def light_parser(options_class: type[Any]) -> argparse.ArgumentParser:
    """Return a parser of the options of a recipe and of the usual trainer arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, hint in get_type_hints(options_class).items():
        _add_option(parser, name, hint)
    for name, kind in _TRAINER_ARGUMENTS.items():
        _add_option(parser, name, kind)
    return parser


def _add_option(parser: argparse.ArgumentParser, name: str, hint: Any) -> None:
    names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not types.NoneType)
    settings: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
    if get_origin(hint) is Literal:
        settings["choices"] = get_args(hint)
    elif get_origin(hint) is list:
        settings |= {"nargs": "+", "type": get_args(hint)[0]}
    elif hint is bool:
        settings |= {"nargs": "?", "const": True, "type": truth}
    else:
        settings["type"] = hint
    parser.add_argument(*names, **settings)


def truth(text: str) -> bool:
    """Return the value of a yes-or-no option, as Transformers reads it."""
    if text.lower() not in (*_TRUE, *_FALSE):
        raise argparse.ArgumentTypeError(
            f"Truthy value expected: got {text} but expected one of "
            "yes/no, true/false, t/f, y/n, 1/0 (case insensitive)."
        )
    return text.lower() in _TRUE


def check_training(recipe: str, options_class: type[Any], values: dict[str, Any]) -> None:
    """Raise the errors of a training that need no model.

    Args:
        recipe: name of the recipe.
        options_class: class of its options.
        values: the given options and trainer arguments, by name.

    Raises:
        ValueError, OSError, ImportError: an option is invalid; a model or file is missing or
            malformed; or the output folder cannot be written or holds another training.
    """
    if not values.get("output_dir"):
        raise ValueError("output_dir: none given; expected a folder to write to")
    names = [entry.name for entry in dataclasses.fields(options_class)]
    options = options_class(**{name: values[name] for name in names if name in values})
    options.validate()
    _check_trainer_arguments(values)
    _check_output(Path(values["output_dir"]), recipe, bool(getattr(options, "resume", False)))
    _check_models(options)
    _check_files(options)


def _check_trainer_arguments(values: dict[str, Any]) -> None:
    steps = values.get("max_steps")
    if steps is not None and steps < 1 and steps != -1:
        raise ValueError(
            f"max_steps: {steps}, expected 1 or more, or -1 to train for num_train_epochs"
        )
    for name in ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"):
        if values.get(name) is not None and not values[name] > 0:
            raise ValueError(f"{name}: {values[name]}, expected a number above 0")
    rate = values.get("learning_rate")
    if rate is not None and not 0 <= rate < float("inf"):
        raise ValueError(f"learning_rate: {rate}, expected a number of 0 or more")
    seed = values.get("seed")
    if seed is not None and not 0 <= seed < 2**32:
        raise ValueError(f"seed: {seed}, expected a number from 0 to {2**32 - 1}")
    _check_max_length(values.get("max_length"))
    reporters = values.get("report_to") or ()
    check_reporters([reporters] if isinstance(reporters, str) else reporters)


def _check_max_length(text: Any) -> None:
    """Check a limit, or JSON with the limits of both roles."""
    if text is None:
        return
    try:
        limits = text if isinstance(text, dict) else json.loads(str(text))
    except ValueError:
        limits = None
    numbers = list(limits.values()) if isinstance(limits, dict) else [limits]
    roles = set(limits) if isinstance(limits, dict) else set()
    if not roles <= {"query", "document"} or not all(
        isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in numbers
    ):
        raise ValueError(
            f"max_length: {text}, expected a number of tokens, or JSON such as "
            '{"query": 32, "document": 64}'
        )


def _check_output(output: Path, recipe: str, resume: bool) -> None:
    writable_folder(output)
    if recipe in WITHOUT_STEPS:
        if (output / "final").exists():
            raise ValueError(
                f"output_dir: {output} holds a model (final); choose another folder, or remove it"
            )
        return
    checkpoints = any(path.name[11:].isdigit() for path in output.glob("checkpoint-*"))
    if checkpoints and not resume:
        raise ValueError(
            f"output_dir: {output} holds checkpoints; add --resume to continue, or choose another"
        )


def _check_models(options: Any) -> None:
    from optical.models.retriever import check_model

    for name in _MODELS:
        value = getattr(options, name, None)
        for model in [value] if isinstance(value, str) else value or ():
            if model:
                check_model(model)


def _check_files(options: Any) -> None:
    """Read every input once; pipes, which can be read only once, are left alone."""
    from optical.data.lexicon import read_lexicon
    from optical.data.pairs import check_bitext, read_training_pairs
    from optical.data.texts import read_sentences

    validation = getattr(options, "validation", ())
    of_pairs = hasattr(options, "pairs")
    for path in getattr(options, "bitext", ()):
        check_bitext(path, getattr(options, "max_pairs", None))
    for path in () if of_pairs else validation:
        check_bitext(path)
    for path in _regular(getattr(options, "text", ())):
        read_sentences(path)
    for entry in getattr(options, "lexicon", ()):
        for path in _regular([entry.split("=", 1)[1]]):
            read_lexicon(path)
    for path in _regular([*options.pairs, *validation] if of_pairs else ()):
        read_training_pairs([path])
    queries = getattr(options, "queries", "")
    if queries and len(list(_regular([queries, options.passages]))) == 2:
        read_training_pairs(queries=queries, passages=options.passages)
    for folder in getattr(options, "teacher_vectors", ()):
        if not (Path(folder) / "index.json").is_file():
            raise ValueError(
                f"teacher_vectors: {folder} holds no token store; `optical vectors` writes one"
            )


def _regular(paths: Iterable[str]) -> Iterable[str]:
    """Yield the paths of regular files; raise an error for those that cannot be read."""
    for path in paths:
        if check_readable(path).is_file():
            yield path
