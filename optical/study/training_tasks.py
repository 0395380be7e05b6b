"""study.training_tasks."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from optical.study.tasks import Cell
from optical.training.options import AT_ONCE

logger = logging.getLogger("optical")

# Relative cost of a training token, by recipe, until a finished cell of the kind tells better.
COST = {"encoder": 4.0, "teacher": 2.0, "codeswitch": 2.0, "distill": 1.0}
COST |= dict.fromkeys(AT_ONCE, 0.1)


def training_cell(
    label: str,
    kind: str,
    folder: Path,
    make_trainer: Callable[[], Any],
    options: Any,
    arguments: Mapping[str, Any],
) -> Cell:
    """The cell that trains a model into `folder`, from its last checkpoint where it has one."""

    def run() -> None:
        from optical.training import runner

        trainer = make_trainer()
        trainer.add_callback(runner.progress_lines(label))
        runner.run(trainer, options, resume=True)
        # The cell is finished, and a hundred of them would fill a disk with optimizer states.
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    steps = arguments.get("max_steps", 1000)
    rows = arguments.get("per_device_train_batch_size", 64)
    work = COST[kind] * steps * rows / 1000
    return Cell(f"train {label}", kind, folder / "final" / "config.json", work, run)
