"""The command `train`: options of a recipe and trainer arguments, from flags and from YAML."""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import json
import os
import sys
import textwrap
from typing import Any

from optical.cli.shared import check_installed, quiet_libraries
from optical.cli.training_checks import check_training, light_parser
from optical.io.settings import nearest, read_yaml
from optical.training.options import (
    WITHOUT_STEPS,
    AverageOptions,
    CodeswitchOptions,
    DistillOptions,
    EncoderOptions,
    TeacherOptions,
    TransferOptions,
)

# Recipe -> its options class and its description.
RECIPES: dict[str, tuple[type[Any], str]] = {
    "teacher": (
        TeacherOptions,
        "Train an English late-interaction retriever from (query, passage) pairs.",
    ),
    "distill": (DistillOptions, "Distil a student from a frozen teacher on parallel sentences."),
    "codeswitch": (CodeswitchOptions, "Train a retriever on text code-switched through lexicons."),
    "transfer": (
        TransferOptions,
        "Give a retriever a vocabulary of other languages, from spelling and bitext.",
    ),
    "average": (AverageOptions, "Average the weights of several students of one model."),
    "encoder": (
        EncoderOptions,
        "Train a tokenizer and a small multilingual encoder from plain text.",
    ),
}
# Trainer arguments that `optical train RECIPE --help` shows; --help-all shows all of them.
COMMON_ARGUMENTS = (
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "warmup_steps",
    "seed",
    "bf16",
    "fp16",
    "save_steps",
    "logging_steps",
)


def train(argv: list[str]) -> int:
    """Run `optical train`; return the exit code."""
    if not argv or argv[0] not in RECIPES:
        lines = [f"  {name:11} {text}" for name, (_, text) in RECIPES.items()]
        print("usage: optical train RECIPE [options]\n\n" + "\n".join(lines))
        if argv and argv[0] not in ("-h", "--help"):
            raise ValueError(f"recipe {argv[0]!r} is unknown{nearest(argv[0], RECIPES)}")
        return 0 if argv else 2
    recipe, argv = argv[0], argv[1:]
    options_class, _ = RECIPES[recipe]
    # Errors that need no import of Sentence Transformers, which takes seconds.
    helping = {"-h", "--help", "--help-all"} & set(argv)
    check_installed("sentence_transformers", "train", "training")
    checked = not helping and _check_early(recipe, argv)
    args_class, parser = _parser(recipe)
    if "--help-all" in argv:
        parser.print_help()
        return 0
    if "-h" in argv or "--help" in argv:
        _print_help(recipe, args_class)
        return 0
    values = _parse(parser, argv)
    options = options_class(
        **{entry.name: values[entry.name] for entry in dataclasses.fields(options_class)}
    )
    if not checked:
        check_training(recipe, options_class, values)
    final = _train(recipe, options, args_class, values)
    if final:
        print(final)
    _exit_if_distributed()
    return 0


def _parser(recipe: str) -> tuple[type[Any], argparse.ArgumentParser]:
    """Return the class of trainer arguments of a recipe, and the parser of its command line."""
    from transformers import HfArgumentParser, TrainingArguments

    from optical.training import recipes

    options_class, _ = RECIPES[recipe]
    args_class: Any = recipes.CommandLineTrainerArguments
    if recipe == "encoder":
        args_class = TrainingArguments
    make_parser: Any = HfArgumentParser
    parser: argparse.ArgumentParser = make_parser(
        (options_class, args_class),
        prog=f"optical train {recipe}",
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,  # argparse would print the usage of a hundred options
    )
    parser.set_defaults(**recipes.TRAINER_DEFAULTS)
    return args_class, parser


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> dict[str, Any]:
    """Return the values of all options, including those of `--config`."""
    argv = _with_config(argv, parser)
    parser.set_defaults(output_dir=None)
    namespace, unknown = _parse_known(parser, argv)
    if unknown:
        options = [f"--{action.dest}" for action in parser._actions]
        hint = nearest(unknown[0].split("=")[0], options)
        raise ValueError(f"unknown option {unknown[0]}{hint}")
    if not namespace.output_dir:
        raise ValueError("output_dir: none given; expected a folder to write to")
    return vars(namespace)


def _train(recipe: str, options: Any, args_class: type[Any], values: dict[str, Any]) -> str:
    """Train and save the model; return its folder in the main process, else ""."""
    from optical import training
    from optical.io.files import writable_folder
    from optical.training import runner

    # The trainer would find an unwritable folder only after the data is read.
    writable_folder(values["output_dir"])
    quiet_libraries()
    if not sys.stderr.isatty():
        # A progress bar redraws itself, and every state would stay in a log.
        values["disable_tqdm"] = True
    names = {entry.name for entry in dataclasses.fields(args_class) if entry.init}
    trainer_args = args_class(**{name: values[name] for name in names & set(values)})
    if recipe in WITHOUT_STEPS:
        final = runner.save(getattr(training, recipe)(options), options, trainer_args)
    else:
        function = "encoder_trainer" if recipe == "encoder" else recipe
        trainer = getattr(training, function)(options, trainer_args)
        if trainer_args.disable_tqdm:
            trainer.add_callback(runner.ProgressLines(recipe))
        final = runner.run(trainer, options, resume=options.resume)
    return str(final) if trainer_args.process_index == 0 else ""


def _exit_if_distributed() -> None:
    """End one of several processes without tearing the interpreter down.

    A thread of gloo may still have to free a tensor, for which it needs the interpreter's lock.
    While the interpreter shuts down or destroys the process group, the process then aborts or hangs
    occasionally, and torchrun reports a failure although the model is complete.
    """
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _check_early(recipe: str, argv: list[str]) -> bool:
    """Check a training without Transformers; return False if only Transformers knows an option."""
    options_class, _ = RECIPES[recipe]
    parser = light_parser(options_class)
    names = {action.dest for action in parser._actions}
    _, unknown = _parse_known(parser, _without_config(argv))
    words, settings = _config_words(argv)
    if unknown or not settings.keys() <= names:
        return False
    _parse_known(parser, words, f"{_config_path(argv)}: ")
    values, _ = _parse_known(parser, [*words, *_without_config(argv)])
    check_training(recipe, options_class, vars(values))
    return True


def _parse_known(
    parser: argparse.ArgumentParser, argv: list[str], prefix: str = ""
) -> tuple[argparse.Namespace, list[str]]:
    """Parse known options; raise ValueError in one line, which starts with `prefix`."""
    try:
        return parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        name = str(error.argument_name).split("/")[0]
        raise ValueError(f"{prefix}{name}: {error.message}") from None


def _with_config(argv: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Replace `--config FILE` by the options in the file, before those of the command line.

    The parser then converts the values of the file, and the command line overrides them.
    """
    words, settings = _config_words(argv)
    accepted = {action.dest for action in parser._actions}
    for key in settings:
        if key not in accepted:
            path = _config_path(argv)
            raise ValueError(f"{path}: unknown key `{key}`{nearest(key, accepted)}")
    if words:
        _parse_known(parser, words, f"{_config_path(argv)}: ")
    return [*words, *_without_config(argv)]


def _config_words(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the options of `--config FILE` as words of a command line, and as settings."""
    path = _config_path(argv)
    if path is None:
        return [], {}
    settings, _ = read_yaml(path)
    words: list[str] = []
    for key, value in settings.items():
        values = value if isinstance(value, list) else [value]
        words.append(f"--{key}")
        words += [json.dumps(entry) if isinstance(entry, dict) else str(entry) for entry in values]
    return words, settings


def _config_path(argv: list[str]) -> str | None:
    path: str | None = _config_parser().parse_known_args(argv)[0].config
    return path


def _without_config(argv: list[str]) -> list[str]:
    return _config_parser().parse_known_args(argv)[1]


def _config_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    return parser


def _print_help(recipe: str, args_class: type[Any]) -> None:
    options_class, description = RECIPES[recipe]
    print(f"usage: optical train {recipe} [--config FILE.yaml] [options]\n\n{description}\n")
    trainer_entries = {entry.name: entry for entry in dataclasses.fields(args_class)}
    names = COMMON_ARGUMENTS[:1] if recipe in WITHOUT_STEPS else COMMON_ARGUMENTS
    shown = [*dataclasses.fields(options_class), *(trainer_entries[name] for name in names)]
    for entry in shown:
        text = " ".join(str(entry.metadata.get("help", "")).split())
        if entry.name not in trainer_entries and isinstance(entry.default, (str, int, float)):
            text += f" (default: {entry.default})" if entry.default else ""
        # The help of some trainer arguments has several paragraphs.
        lines = textwrap.wrap(text, 66)[:3]
        print(f"  --{entry.name:28} " + ("\n" + " " * 33).join(lines))
    print("\n--config takes the same names from YAML; --help-all lists every trainer argument.")
