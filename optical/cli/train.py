"""The command `train`: options of a recipe and trainer arguments, from flags and from YAML."""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import json
import logging
import os
import sys
import textwrap
from typing import Any

from optical.cli.shared import (
    check_device,
    check_installed,
    quiet_libraries,
    report_output,
    without_progress_bars,
)
from optical.cli.training_checks import check_training, light_parser, truth
from optical.io.settings import nearest, read_yaml
from optical.training.options import (
    TRAINER_DEFAULTS,
    WITHOUT_STEPS,
    AverageOptions,
    CodeswitchOptions,
    DistillOptions,
    EncoderOptions,
    TeacherOptions,
    TransferOptions,
    choices_of,
    default_of,
)

logger = logging.getLogger("optical")

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
# Options of the command itself, which `--config` may hold too.
_OWN = ("device", "json")
# Trainer arguments that `optical train RECIPE --help` shows; --help-all shows all of them. The
# texts are here, so that help needs no import of Transformers.
COMMON_ARGUMENTS = {
    "output_dir": "Folder to write; the trained model is in `final` below it. Required.",
    "max_steps": "Number of training steps (default: -1, which leaves it to num_train_epochs).",
    "num_train_epochs": "Number of passes over the training data (default: 3.0).",
    "learning_rate": "Peak of the learning rate (default: {learning_rate}).",
    "per_device_train_batch_size": "Number of rows per step and device (default: "
    "{per_device_train_batch_size}).",
    "warmup_steps": "Steps in which the learning rate grows; below 1, their share of all steps "
    "(default: {warmup_steps}).",
    "seed": "Seed of weights, order and dropout (default: 42).",
    "bf16": "Train in bfloat16 with float32 weights, on devices that support it (default: false).",
    "fp16": "Train in float16 with float32 weights, on GPUs (default: false).",
    "save_steps": "Steps between checkpoints (default: {save_steps}).",
    "logging_steps": "Steps between logged losses (default: {logging_steps}).",
    "report_to": "Service that receives the losses, such as tensorboard or wandb (default: none).",
    "device": "Device to train on: cpu, cuda or cuda:1 (default: all visible GPUs, else the CPU).",
}


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
    if helping:
        if "--help-all" in argv:
            _parser(recipe)[1].print_help()
        else:
            _print_help(recipe)
        return 0
    config, argv = _read_config(argv)
    argv, as_json, device = _own_arguments(argv)
    check_device(device)
    if device is not None:
        _use_device(device, argv)
    checked = _check_early(recipe, argv, config)
    logger.info("loading the libraries")
    args_class, parser = _parser(recipe)
    values = _parse(parser, argv, config)
    options = options_class(
        **{entry.name: values[entry.name] for entry in dataclasses.fields(options_class)}
    )
    if not checked:
        check_training(recipe, options_class, values)
    final = _train(recipe, options, args_class, values)
    if final:
        report_output(final, {}, as_json)
    _exit_if_distributed()
    return 0


def _own_arguments(argv: list[str], prefix: str = "") -> tuple[list[str], bool, str | None]:
    """Return the other arguments, whether to print JSON, and the device."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--json", nargs="?", const=True, default=False, type=truth)
    parser.add_argument("--device")
    known, rest = _parse_known(parser, argv, prefix)
    return rest, known.json, known.device


def _use_device(device: str, argv: list[str]) -> None:
    """Make one device the only one that the trainer sees; it has no argument for that."""
    import torch

    kind = torch.device(device)
    if kind.type == "cpu":
        argv.append("--use_cpu")
    elif kind.type == "cuda":
        # No CUDA context exists yet: counting devices does not create one.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        index = kind.index or 0
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[index] if visible[0] else str(index)
    else:
        raise ValueError(f"device: {device}, expected cpu, cuda or cuda:1")


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
    parser.set_defaults(**TRAINER_DEFAULTS)
    return args_class, parser


def _parse(parser: argparse.ArgumentParser, argv: list[str], config: _Config) -> dict[str, Any]:
    """Return the values of all options, including those of `--config`."""
    accepted = {action.dest for action in parser._actions}
    for key in config.settings:
        if key not in accepted:
            raise ValueError(f"{config.path}: unknown key `{key}`{nearest(key, accepted)}")
    _check_words(parser, config)
    # The parser converts the values of the file, and the command line overrides them.
    argv = [*config.words, *argv]
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
    from optical.io.files import writable_folder

    # The trainer would find an unwritable folder only after the data is read.
    writable_folder(values["output_dir"])
    quiet_libraries()
    if not sys.stderr.isatty():
        # A progress bar redraws itself, and every state would stay in a log.
        values["disable_tqdm"] = True
        with without_progress_bars():
            return _run_recipe(recipe, options, args_class, values)
    return _run_recipe(recipe, options, args_class, values)


def _run_recipe(recipe: str, options: Any, args_class: type[Any], values: dict[str, Any]) -> str:
    from optical import training
    from optical.training import recipes, runner

    values |= recipes.device_arguments()
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


def _check_early(recipe: str, argv: list[str], config: _Config) -> bool:
    """Check a training without Transformers; return False if only Transformers knows an option."""
    options_class, _ = RECIPES[recipe]
    parser = light_parser(options_class)
    names = {action.dest for action in parser._actions}
    _, unknown = _parse_known(parser, argv)
    if unknown or not config.settings.keys() <= names:
        return False
    _check_words(parser, config)
    values, _ = _parse_known(parser, [*config.words, *argv])
    check_training(recipe, options_class, vars(values))
    return True


def _check_words(parser: argparse.ArgumentParser, config: _Config) -> None:
    """Raise ValueError for a value in the file that its option does not take."""
    _, unknown = _parse_known(parser, config.words, f"{config.path}: ")
    for key, value in config.settings.items():
        if unknown and isinstance(value, list) and unknown[0] in map(str, value):
            raise ValueError(f"{config.path}: {key}: {value!r}, expected one value")


def _parse_known(
    parser: argparse.ArgumentParser, argv: list[str], prefix: str = ""
) -> tuple[argparse.Namespace, list[str]]:
    """Parse known options; raise ValueError in one line, which starts with `prefix`."""
    try:
        return parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        name = str(error.argument_name).split("/")[0]
        raise ValueError(f"{prefix}{name}: {error.message}") from None


@dataclasses.dataclass(frozen=True)
class _Config:
    """The file of `--config`: its settings, and the same as words of a command line."""

    path: str | None
    settings: dict[str, Any]
    words: list[str]


def _read_config(argv: list[str]) -> tuple[_Config, list[str]]:
    """Read the file of `--config`, once, and return it with the other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    known, rest = _parse_known(parser, argv)
    if known.config is None:
        return _Config(None, {}, []), rest
    settings, _ = read_yaml(known.config)
    found = {name: settings.pop(name) for name in _OWN if name in settings}
    own = [f"--{name}={value}" for name, value in found.items() if value is not None]
    _own_arguments(own, f"{known.config}: ")
    words: list[str] = []
    for key, value in settings.items():
        if value is None:  # the default
            continue
        values = value if isinstance(value, list) else [value]
        words.append(f"--{key}")
        words += [json.dumps(entry) if isinstance(entry, dict) else str(entry) for entry in values]
    # The command line comes last, because it overrides the file.
    return _Config(known.config, settings, words), own + rest


def _print_help(recipe: str) -> None:
    options_class, description = RECIPES[recipe]
    print(f"usage: optical train {recipe} [--config FILE.yaml] [options]\n\n{description}\n")
    choices = choices_of(options_class)
    names = ["output_dir"] if recipe in WITHOUT_STEPS else list(COMMON_ARGUMENTS)
    shown = [(name, COMMON_ARGUMENTS[name].format(**TRAINER_DEFAULTS)) for name in names]
    for entry in reversed(dataclasses.fields(options_class)):
        text = str(entry.metadata["help"])
        missing = [choice for choice in choices.get(entry.name, ()) if choice not in text]
        if missing:
            text += f" One of {', '.join(choices[entry.name])}."
        if "default:" not in text and "equired." not in text:
            text = f"{text.removesuffix('.')} (default: {_default(default_of(entry))})."
        shown.insert(0, (entry.name, text))
    shown.append(("json", "Print the folder of the model as JSON (default: false)."))
    for name, text in shown:
        print(f"  --{name:28} " + ("\n" + " " * 33).join(textwrap.wrap(text, 66)))
    print("\n--config takes the same names from YAML; --help-all lists every trainer argument.")


def _default(value: Any) -> str:
    if value in (None, "") or value == []:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
