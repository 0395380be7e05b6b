"""Checkpoints of a training: sealed when they are written, checked before one is continued from."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from optical.io.environment import environment
from optical.io.files import (
    disk_full_errors,
    find_damaged,
    folder_lock,
    writable_folder,
    write_checksums,
    write_text,
)

logger = logging.getLogger("optical")


def run(trainer: Any, options: Any, *, resume: bool) -> Path:
    """Train, save the model to ``output_dir/final`` and the resolved run to ``run.json``.

    Args:
        trainer: what a recipe returned.
        options: the recipe's options, for the record.
        resume: continue from the newest whole checkpoint where there is one; False refuses a
            folder that holds checkpoints, so that nothing is overwritten by accident.

    Returns:
        The folder of the trained model.

    Raises:
        ValueError: another process trains into the folder, or it holds checkpoints and ``resume``
            is False.
        OSError: the folder cannot be written, or the disk is full.
    """
    output = writable_folder(trainer.args.output_dir)
    # One process of a training locks for all of them.
    alone = folder_lock(output) if trainer.args.should_save else contextlib.nullcontext()
    with alone, disk_full_errors(output):
        return _run(trainer, options, output, resume)


def _run(trainer: Any, options: Any, output: Path, resume: bool) -> Path:
    # The bar tells the same; without a bar the callers log lines of their own.
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(SealCheckpoints())
    checkpoint = last_checkpoint(output)
    if checkpoint and not resume:
        raise ValueError(
            f"output_dir: {output} holds checkpoints; add --resume to continue, or choose another"
        )
    write_text(output / "run.json", json.dumps(record(options, trainer.args), indent=2) + "\n")
    trainer.train(resume_from_checkpoint=checkpoint)
    final = output / "final"
    if trainer.args.should_save:
        # Complete or not there at all: others take the folder's existence as "trained".
        for stale in output.glob(".final.*"):
            shutil.rmtree(stale)
        partial = output / f".final.{os.getpid()}"
        trainer.save_model(str(partial))
        write_checksums(partial, WEIGHTS)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    return final


def record(options: Any, args: Any) -> dict[str, Any]:
    """What someone needs to repeat a run: options, arguments, versions, commit."""
    return {
        "recipe": type(options).__name__.removesuffix("Options").lower(),
        "options": dataclasses.asdict(options),
        "arguments": json.loads(args.to_json_string()),
        **environment(),
    }


def progress_lines(label: str, every: float = 20.0) -> Any:
    """Build a trainer callback that logs a line with step, loss and time left, for logs and CI."""
    from transformers import TrainerCallback

    class ProgressLines(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.begun = self.told = time.monotonic()
            self.first = state.global_step

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = time.monotonic()
            if now - self.told < every or state.global_step >= state.max_steps:
                return
            self.told = now
            rate = (now - self.begun) / (state.global_step - self.first)
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            logger.info(
                "    %s: step %d of %d%s, %.0f s left",
                label,
                state.global_step,
                state.max_steps,
                f", loss {losses[-1]:.3f}" if losses else "",
                rate * (state.max_steps - state.global_step),
            )

    return ProgressLines()


class Finished:
    """A model that needs no steps, where one is expected that trains."""

    def __init__(self, model: Any, args: Any) -> None:
        self.model = model
        self.args = args

    def train(self, resume_from_checkpoint: Any = None) -> None:
        """Nothing is left to train."""

    def save_model(self, folder: str) -> None:
        self.model.save_pretrained(folder)

    def add_callback(self, callback: Any) -> None:
        """No step will call it."""

    remove_callback = add_callback


# What a training reads again and nobody edits by hand. Every process of a training writes a random
# state of its own, perhaps after these.
WEIGHTS = ("*.safetensors", "optimizer.pt", "scheduler.pt")


class SealCheckpoints(TrainerCallback):
    """Adds checksums to each checkpoint that the trainer has written."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            write_checksums(folder, WEIGHTS)


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Folder of the newest whole checkpoint, or None.

    A checkpoint whose state file is missing or torn was being written when its process died, and
    one that does not fit its checksums was damaged later. Either is removed, so that training goes
    on from the one before.
    """
    found = [
        (int(folder.name.rsplit("-", 1)[1]), folder)
        for folder in Path(output_dir).glob("checkpoint-*")
        if folder.name.rsplit("-", 1)[1].isdigit()
    ]
    for _, folder in sorted(found, reverse=True):
        try:
            # The trainer writes this file last.
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            name = find_damaged(folder)
        except (FileNotFoundError, ValueError):
            logger.warning("%s is incomplete and is removed", folder)
        else:
            if name is None:
                return str(folder)
            logger.warning("%s: %s is damaged; the checkpoint is removed", folder, name)
        shutil.rmtree(folder, ignore_errors=True)
    return None
