"""`optical train`: options of a recipe and of the trainer, from the command line and from YAML."""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import json
import os
import sys
from typing import Any

from optical.cli.models import quiet_libraries
from optical.io.settings import nearest, read_yaml
from optical.training.options import AT_ONCE

# What `optical train RECIPE --help` shows of the trainer's hundred arguments.
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
RECIPES = {
    "teacher": "train an English late-interaction retriever from (query, passage) pairs",
    "distill": "pull a student onto a frozen teacher through parallel sentences",
    "codeswitch": "train a retriever on text with words replaced through lexicons",
    "transfer": "give a retriever a vocabulary of other languages, by spelling and bitext",
    "average": "make one student of several by the mean of their weights",
    "encoder": "train a tokenizer and a small multilingual encoder from plain text",
}


def train(argv: list[str]) -> int:
    """Run `optical train`; returns the exit code."""
    if not argv or argv[0] not in RECIPES:
        lines = [f"  {name:11} {text}" for name, text in RECIPES.items()]
        print("usage: optical train RECIPE [options]\n\n" + "\n".join(lines))
        if argv and argv[0] not in ("-h", "--help"):
            raise ValueError(f"recipe {argv[0]!r} is unknown{nearest(argv[0], RECIPES)}")
        return 0 if argv else 2
    from torch import distributed
    from transformers import HfArgumentParser, TrainingArguments

    from optical.io.files import writable_folder
    from optical.training import pretraining, recipes, runner

    recipe, argv = argv[0], argv[1:]
    kinds: dict[str, tuple[Any, Any]] = {
        "teacher": (recipes.TeacherOptions, recipes.teacher),
        "distill": (recipes.DistillOptions, recipes.distill),
        "codeswitch": (recipes.CodeswitchOptions, recipes.codeswitch),
        "transfer": (recipes.TransferOptions, recipes.transfer),
        "average": (recipes.AverageOptions, recipes.average),
        "encoder": (pretraining.EncoderOptions, pretraining.encoder_trainer),
    }
    options_kind, make_trainer = kinds[recipe]
    arguments_kind: Any = TrainingArguments if recipe == "encoder" else recipes.CommandLineArguments
    make_parser: Any = HfArgumentParser
    parser = make_parser(
        (options_kind, arguments_kind),
        prog=f"optical train {recipe}",
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,  # which would print the usage of a hundred options first
    )
    parser.set_defaults(**recipes.ARGUMENT_DEFAULTS)
    if "--help-all" in argv:
        parser.print_help()
        return 0
    if "-h" in argv or "--help" in argv:
        _train_help(recipe, options_kind, arguments_kind)
        return 0
    argv = _with_config(argv, parser)
    parser.set_defaults(output_dir=None)
    namespace, unknown = _parsed(parser, argv)
    if unknown:
        known = [f"--{action.dest}" for action in parser._actions]
        raise ValueError(f"unknown option {unknown[0]}{nearest(unknown[0].split('=')[0], known)}")
    if not namespace.output_dir:
        raise ValueError("output_dir: none given; expected a folder to write to")
    values = vars(namespace)
    names = {entry.name for entry in dataclasses.fields(options_kind)}
    options = options_kind(**{name: values[name] for name in names})
    options.validate()
    # Before anything is read: the trainer would say it late and in its own words.
    writable_folder(namespace.output_dir)
    quiet_libraries()
    init = {entry.name for entry in dataclasses.fields(arguments_kind) if entry.init}
    if not sys.stderr.isatty():
        # A bar draws over itself, and a log keeps every stroke.
        values["disable_tqdm"] = True
    args = arguments_kind(**{name: values[name] for name in init & set(values)})
    trainer = make_trainer(options, args)
    if args.disable_tqdm:
        trainer.add_callback(runner.progress_lines(recipe))
    final = runner.run(trainer, options, resume=getattr(options, "resume", False))
    if args.process_index == 0:
        print(final)
    if distributed.is_available() and distributed.is_initialized():
        _leave()
    return 0


def _leave() -> None:
    """End this process of several as the interpreter does, but for taking itself apart.

    A thread of gloo may have a tensor left to let go of, and needs the interpreter's lock for it:
    while that shuts down, or destroys the process group, the process aborts or hangs now and then,
    and torchrun calls a training failed whose model is whole.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _parsed(
    parser: argparse.ArgumentParser, words: list[str], place: str = ""
) -> tuple[argparse.Namespace, list[str]]:
    """Parse known options; a wrong value is an error of one line, behind the words' `place`."""
    try:
        return parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        name = str(error.argument_name).split("/")[0]
        raise ValueError(f"{place}{name}: {error.message}") from None


def _with_config(argv: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Take `--config FILE` out of the arguments and make its keys the parser's defaults."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--config")
    given, rest = reader.parse_known_args(argv)
    if given.config is None:
        return rest
    settings, _ = read_yaml(given.config)
    known = {action.dest for action in parser._actions}
    for key in settings:
        if key not in known:
            raise ValueError(f"{given.config}: unknown key `{key}`{nearest(key, known)}")
    # As arguments in front, so that the parser converts them and the command line wins.
    words: list[str] = []
    for key, value in settings.items():
        values = value if isinstance(value, list) else [value]
        text = [json.dumps(one) if isinstance(one, dict) else str(one) for one in values]
        words += [f"--{key}", *text]
    _parsed(parser, words, f"{given.config}: ")
    return [*words, *rest]


def _train_help(recipe: str, options_kind: Any, arguments_kind: Any) -> None:
    print(f"usage: optical train {recipe} [--config FILE.yaml] [options]\n\n{RECIPES[recipe]}\n")
    shown = [*dataclasses.fields(options_kind)]
    by_name = {entry.name: entry for entry in dataclasses.fields(arguments_kind)}
    names = COMMON_ARGUMENTS[:1] if recipe in AT_ONCE else COMMON_ARGUMENTS
    shown += [by_name[name] for name in names]
    for entry in shown:
        text = " ".join(str(entry.metadata.get("help", "")).split())
        print(f"  --{entry.name:28} {text[:110]}")
    print("\n--config holds the same names in YAML; --help-all lists every option of the trainer")
