"""Defaults and help texts of the trainer arguments that `optical train RECIPE --help` shows.

They are here, and not read from Transformers, so that help and checks need no import of it.
"""

from __future__ import annotations

from typing import Any

# Changes to the trainer's default arguments, shared by the command line and studies.
TRAINER_DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    "learning_rate": 2e-5,
    "per_device_train_batch_size": 64,
    "warmup_steps": 0.05,
    "logging_steps": 50,
    "save_steps": 500,
    "save_total_limit": 1,
}

# Argument -> help text; defaults are those above, or are named in the text.
TRAINER_HELP: dict[str, str] = {
    "output_dir": "Folder of checkpoints and of the trained model, `final`. Required.",
    "max_steps": "Number of training steps; replaces num_train_epochs (default: -1, not given).",
    "num_train_epochs": "Number of passes over the training data (default: 3.0).",
    "learning_rate": "Peak learning rate of AdamW.",
    "per_device_train_batch_size": "Number of rows in a batch of each process.",
    "warmup_steps": "Steps of linear warm-up, or below 1 their share of all steps.",
    "max_length": "Maximum length of a training text in tokens: 32, or "
    '\'{"query": 32, "document": 64}\' (default: the lengths of the model).',
    "seed": "Seed of the order of rows, of new weights and of dropout (default: 42).",
    "bf16": "Train in bfloat16 mixed precision (default: False).",
    "fp16": "Train in float16 mixed precision (default: False).",
    "save_steps": "Steps between two checkpoints, and two evaluations of the validation data.",
    "logging_steps": "Steps between two records of the loss.",
    "report_to": "Service that receives the losses, such as tensorboard or wandb.",
    "device": "Device to train on: cpu, cuda or cuda:1 (default: every GPU that is visible, else "
    "the CPU).",
}
# Trainer arguments of recipes that take no training steps.
WITHOUT_STEPS_HELP = ("output_dir",)


def help_of(name: str) -> str:
    """Return the help text of a trainer argument with its default."""
    return with_default(TRAINER_HELP[name], TRAINER_DEFAULTS.get(name))


def with_default(text: str, default: Any) -> str:
    """Return a help text that states the default; texts that state one are returned unchanged."""
    if "default:" in text or "Required." in text:
        return text
    shown = "none" if default is None or default in ("", []) else default
    return f"{text.removesuffix('.')} (default: {shown})."
