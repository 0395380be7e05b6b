"""Run a configured trainer: checkpoints, resuming, the saved model and the record of the run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from optical.io.environment import environment
from optical.io.files import (
    disk_full_errors,
    find_damaged,
    folder_lock,
    read_json,
    writable_folder,
    write_checksums,
    write_text,
)
from optical.io.fingerprints import with_digests
from optical.models.fingerprint import fingerprints, save_partners, tokenizer_fingerprint
from optical.training.embedding_rows import trained_rows
from optical.training.model_card import model_card
from optical.training.options import default_of

logger = logging.getLogger("optical")

# Files of a checkpoint that get checksums. The random states are left out: every process writes its
# own, possibly after the callback has run.
SEALED_FILES = ("*.safetensors", "optimizer.pt", "scheduler.pt")
# Options that a resumed training does not compare: they change nothing, or name models, which are
# compared by content.
_NOT_COMPARED = ("resume", "teacher_vectors", "model", "teacher", "student", "embeddings")
# Inputs that make a training another one. Changes of other options are logged.
_DEFINING = (
    *("recipe", "starting_model", "vocabulary", "teacher", "role", "objective", "reads", "mass"),
    *("text", "bitext", "pairs", "queries", "passages", "lexicon", "max_pairs"),
    "trained_input_vectors",
)
# Trainer arguments whose change is logged when a training is resumed.
_LOGGED_ARGUMENTS = (
    *("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"),
    *("num_train_epochs", "warmup_steps", "lr_scheduler_type", "weight_decay", "seed"),
    *("max_length", "bf16", "fp16"),
)


def run(trainer: Any, options: Any, *, resume: bool) -> Path:
    """Train, then save the model to ``output_dir/final``; the record of the run is ``run.json``.

    Args:
        trainer: trainer returned by a recipe.
        options: options of the recipe, for the record.
        resume: continue from the newest intact checkpoint, if there is one. If False, an output
            folder with checkpoints is refused, so that none is overwritten by accident. A
            checkpoint of another role, objective, data or models is refused; other changes of
            options and trainer arguments are logged.

    Returns:
        The folder of the trained model.

    Raises:
        ValueError: another process trains into the folder; it holds checkpoints and ``resume`` is
            False; they are those of another training; or the training diverged.
        OSError: the folder cannot be written, or the disk is full.
    """
    trainer_args = trainer.args
    with _output_folder(trainer_args) as output:
        # Progress bars, or the lines of progress_lines(), already show the losses.
        trainer.remove_callback(PrinterCallback)
        # The card of the trainer would quote training sentences; model_card() writes another.
        for callback in [*trainer.callback_handler.callbacks]:
            if type(callback).__name__.endswith("ModelCardCallback"):
                trainer.remove_callback(callback)
        trainer.add_callback(SealCheckpoints())
        trainer.add_callback(StopDiverged())
        checkpoint = _checkpoint_to_resume(output, resume)
        inputs = _inputs(trainer, options)
        if checkpoint:
            _check_resumed(output, inputs, trainer_args)
        _write_record(output, options, trainer_args, inputs)
        trainer.train(resume_from_checkpoint=checkpoint)
        model = trainer.model
        _check_finite(model, trainer.state.global_step)
        card = model_card(options, model, getattr(getattr(trainer, "loss", None), "citation", ""))
        return _save_final(output, trainer.save_model, model, card, trainer_args.should_save)


def save(model: Any, options: Any, trainer_args: Any) -> Path:
    """Save a model that needs no training steps, in the same layout as :func:`run`.

    Args:
        model: model returned by a recipe without steps, such as ``transfer`` or ``average``.
        options: options of the recipe, for the record.
        trainer_args: trainer arguments, of which only the output folder is used.

    Returns:
        The folder of the model.

    Raises:
        ValueError: another process writes into the folder, or it holds checkpoints of a training.
        OSError: the folder cannot be written, or the disk is full.
    """
    with _output_folder(trainer_args) as output:
        _checkpoint_to_resume(output, resume=False)
        _write_record(output, options, trainer_args)
        card = model_card(options, model)
        return _save_final(output, model.save_pretrained, model, card, trainer_args.should_save)


@contextlib.contextmanager
def _output_folder(trainer_args: Any) -> Iterator[Path]:
    """Lock the output folder; report a full disk in one line."""
    output = writable_folder(trainer_args.output_dir)
    # In distributed training one process holds the lock for all of them.
    lock = folder_lock(output) if trainer_args.should_save else contextlib.nullcontext()
    with lock, disk_full_errors(output):
        yield output


def _checkpoint_to_resume(output: Path, resume: bool) -> str | None:
    checkpoint = last_checkpoint(output)
    if checkpoint and not resume:
        raise ValueError(
            f"output_dir: {output} holds checkpoints; add --resume to continue, or choose another"
        )
    return checkpoint


def _save_final(
    output: Path, save_model: Callable[[str], Any], model: Any, card: str, should_save: bool
) -> Path:
    final = output / "final"
    if should_save:
        # The rename is atomic: other programs take the existence of the folder as "trained".
        for stale in output.glob(".final.*"):
            shutil.rmtree(stale)
        partial = output / f".final.{os.getpid()}"
        save_model(str(partial))
        # A pickle of the trainer's arguments with the paths of this machine; run.json has them.
        (partial / "training_args.bin").unlink(missing_ok=True)
        save_partners(model, partial)
        write_text(partial / "README.md", card)
        write_checksums(partial, SEALED_FILES)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    return final


def _inputs(trainer: Any, options: Any) -> dict[str, Any]:
    """Return what a training depends on: its options, data and models, the latter by content."""
    inputs: dict[str, Any] = {"recipe": type(options).__name__}
    for entry in dataclasses.fields(options):
        value = getattr(options, entry.name)
        # Options added by a later version leave the checkpoints of earlier ones valid.
        if entry.name not in _NOT_COMPARED and value != default_of(entry):
            inputs[entry.name] = with_digests(value)
    inputs["starting_model"] = fingerprints(trainer.model)
    if hasattr(trainer.processing_class, "get_vocab"):
        inputs["vocabulary"] = tokenizer_fingerprint(trainer.processing_class)
    teacher = getattr(getattr(trainer, "loss", None), "teacher", None)
    if teacher is not None:
        inputs["teacher"] = fingerprints(teacher)
    rows = trained_rows(trainer.model)
    if rows is not None:
        inputs["trained_input_vectors"] = rows
    return inputs


def _check_resumed(output: Path, inputs: dict[str, Any], trainer_args: Any) -> None:
    """Compare a training with the record of the one whose checkpoint it continues."""
    try:
        earlier = read_json(output / "run.json")
    except (FileNotFoundError, ValueError):
        earlier = {}
    if "inputs" not in earlier:
        logger.warning("%s: nothing records the data of its checkpoints; not checked", output)
        return
    stored = earlier["inputs"]
    differing = [
        name
        for name in sorted(stored.keys() | inputs.keys())
        if stored.get(name) != inputs.get(name)
    ]
    for name in differing:
        if name in _DEFINING:
            raise ValueError(
                f"output_dir: {output} holds checkpoints of another training: {name} was "
                f"{_short(stored.get(name))}, now {_short(inputs.get(name))}; choose another "
                "folder, or remove this one"
            )
    changed = [
        f"{name} {_short(inputs.get(name))} (was {_short(stored.get(name))})" for name in differing
    ]
    arguments = json.loads(trainer_args.to_json_string())
    before = earlier.get("arguments", {})
    changed += [
        f"{name} {arguments[name]} (was {before[name]})"
        for name in _LOGGED_ARGUMENTS
        if name in before and name in arguments and before[name] != arguments[name]
    ]
    if changed:
        logger.warning("%s: continues with %s", output, ", ".join(changed))


def _short(value: Any) -> str:
    """Return a value for a message; digests are abbreviated."""
    return re.sub(
        r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1", "the default" if value is None else str(value)
    )


def _write_record(
    output: Path, options: Any, trainer_args: Any, inputs: dict[str, Any] | None = None
) -> None:
    content = record(options, trainer_args)
    if inputs is not None:
        content["inputs"] = inputs
    write_text(output / "run.json", json.dumps(content, indent=2) + "\n")


def record(options: Any, trainer_args: Any) -> dict[str, Any]:
    """Return the data needed to repeat a run: options, trainer arguments, versions and commit."""
    return {
        "recipe": type(options).__name__.removesuffix("Options").lower(),
        "options": dataclasses.asdict(options),
        "arguments": json.loads(trainer_args.to_json_string()),
        **environment(),
    }


class SealCheckpoints(TrainerCallback):
    """Trainer callback that adds checksums to each checkpoint."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            save_partners(kwargs.get("model"), folder)
            write_checksums(folder, SEALED_FILES)


class StopDiverged(TrainerCallback):
    """Trainer callback that ends a training before it logs or saves weights that are no numbers."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_log or control.should_save:
            _check_finite(kwargs["model"], state.global_step)

    on_epoch_end = on_step_end


def _check_finite(model: Any, step: int) -> None:
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(
                f"the training diverged: {name} is NaN or infinite after step {step}; use a "
                "smaller learning_rate or more warmup_steps; earlier checkpoints are kept"
            )


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Return the folder of the newest intact checkpoint, or None.

    A checkpoint with a missing or truncated state file was interrupted while it was written. One
    that does not match its checksums was damaged later. Both kinds are deleted, so that training
    resumes from the checkpoint before.
    """
    checkpoints = [
        (int(folder.name.rsplit("-", 1)[1]), folder)
        for folder in Path(output_dir).glob("checkpoint-*")
        if folder.name.rsplit("-", 1)[1].isdigit()
    ]
    for _, folder in sorted(checkpoints, reverse=True):
        try:
            # The trainer writes this file last.
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            damaged_file = find_damaged(folder)
        except (FileNotFoundError, ValueError):
            logger.warning("%s is incomplete and is removed", folder)
        else:
            if damaged_file is None:
                return str(folder)
            logger.warning("%s: %s is damaged; the checkpoint is removed", folder, damaged_file)
        shutil.rmtree(folder, ignore_errors=True)
    return None


class ProgressLines(TrainerCallback):
    """Trainer callback that logs the step, the loss and the remaining time at intervals.

    It replaces a progress bar in log files and CI output. The loss of a line is the mean since the
    last record of the trainer, which is made to record one for each line.
    """

    def __init__(self, label: str, interval_seconds: float = 20.0) -> None:
        self.label = label
        self.interval_seconds = interval_seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start_time = self.last_log_time = time.monotonic()
        self.start_step = state.global_step
        self.due = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        waiting = time.monotonic() - self.last_log_time < self.interval_seconds
        if not waiting and state.global_step < state.max_steps:
            self.due = control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            step, loss = state.global_step, logs["eval_loss"]
            logger.info("    %s: step %d, validation loss %.4f", self.label, step, loss)
        if not self.due or "loss" not in logs:
            return
        self.due = False
        now = self.last_log_time = time.monotonic()
        seconds_per_step = (now - self.start_time) / (state.global_step - self.start_step)
        logger.info(
            "    %s: step %d of %d, loss %.4g, %.0f s left",
            self.label,
            state.global_step,
            state.max_steps,
            float(logs["loss"]),
            seconds_per_step * (state.max_steps - state.global_step),
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.best_model_checkpoint and state.is_world_process_zero:
            logger.info(
                "    %s: stopped at step %d; the best model is that of %s, validation loss %.4f",
                self.label,
                state.global_step,
                Path(state.best_model_checkpoint).name,
                state.best_metric,
            )
