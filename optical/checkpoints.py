"""Checkpoints of a training: sealed when they are written, checked before one is continued from."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from optical.folders import damaged, seal

logger = logging.getLogger("optical")

# What a training reads again and nobody edits by hand. Every process of a training writes a random
# state of its own, perhaps after these.
WEIGHTS = ("*.safetensors", "optimizer.pt", "scheduler.pt")


class SealCheckpoints(TrainerCallback):
    """Adds checksums to each checkpoint that the trainer has written."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            seal(folder, WEIGHTS)


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
            name = damaged(folder)
        except (FileNotFoundError, ValueError):
            logger.warning("%s is incomplete and is removed", folder)
        else:
            if name is None:
                return str(folder)
            logger.warning("%s: %s is damaged; the checkpoint is removed", folder, name)
        shutil.rmtree(folder, ignore_errors=True)
    return None
