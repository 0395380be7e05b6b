"""Tasks of a study: what is finished, what each task costs, and the estimated remaining time."""

from __future__ import annotations

import contextlib
import gc
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from optical.io.files import read_json, write_json

logger = logging.getLogger("optical")


# Name of the monolingual ceiling in tables.
CEILING = "English documents"


@dataclass
class Task:
    """A unit of work that is finished if and only if its output file exists.

    Attributes:
        label: name in logs and in the report of costs.
        kind: tasks of one kind have comparable cost per unit of work.
        output: file whose existence marks the task as finished.
        work: expected amount of work relative to other tasks of the kind.
        run: performs the task.
    """

    label: str
    kind: str
    output: Path
    work: float
    run: Callable[[], None]

    @property
    def done(self) -> bool:
        """Whether the output exists and, if it is a JSON file of the study, can be read."""
        if not self.output.exists() or self.output.name == "config.json":
            return self.output.exists()
        return self.output.suffix != ".json" or _readable(self.output)


def _readable(path: Path) -> bool:
    try:
        read_json(path)
    except ValueError as error:
        logger.warning("%s", error)
        return False
    return True


@dataclass
class Progress:
    """Estimates the remaining time from the measured times of finished tasks."""

    seconds: dict[str, float] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)

    def add(self, task: Task, seconds: float) -> None:
        self.seconds[task.kind] = self.seconds.get(task.kind, 0.0) + seconds
        self.work[task.kind] = self.work.get(task.kind, 0.0) + task.work

    def remaining(self, tasks: Sequence[Task]) -> float | None:
        """Return the estimated seconds for `tasks`, or None before any task has finished.

        A kind without measurements is assumed to be as fast as the average of all kinds.
        """
        all_seconds, all_work = sum(self.seconds.values()), sum(self.work.values())
        if not all_work:
            return None
        total = 0.0
        for task in tasks:
            seconds, work = self.seconds.get(task.kind, 0.0), self.work.get(task.kind, 0.0)
            rate = seconds / work if work else all_seconds / all_work
            total += rate * task.work
        return total


class Costs:
    """Seconds and peak memory of every finished task, stored in ``costs.json``.

    Entries are keyed by output file, because studies that share a folder may have tasks with equal
    labels and different outputs.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output / "costs.json"

    def read(self, tasks: Iterable[Task]) -> dict[str, dict[str, float]]:
        """Return label -> ``seconds`` and ``peak_mb`` of the run that finished the task."""
        costs = self._read()
        return {task.label: costs[key] for task in tasks if (key := self._key(task)) in costs}

    def add(self, task: Task, seconds: float, peak_mb: float) -> None:
        costs = self._read()
        costs[self._key(task)] = {"seconds": round(seconds, 1), "peak_mb": round(peak_mb, 1)}
        write_json(self.path, costs)

    def _key(self, task: Task) -> str:
        return task.output.relative_to(self.output).as_posix()

    def _read(self) -> dict[str, dict[str, float]]:
        if not self.path.exists() or not _readable(self.path):
            return {}
        costs: dict[str, dict[str, float]] = read_json(self.path)
        return costs


def run_tasks(title: str, tasks: Sequence[Task], output: Path) -> None:
    """Run the unfinished tasks in order, and log one line per task."""
    costs = Costs(output)
    progress = Progress()
    todo = [task for task in tasks if not task.done]
    logger.info(
        "%s: %d tasks, %d finished before; output in %s",
        title,
        len(tasks),
        len(tasks) - len(todo),
        output,
    )
    # Times of earlier runs improve the estimate of the remaining time.
    earlier_costs = costs.read(tasks)
    unfinished = {task.output for task in todo}
    for task in tasks:
        if task.output not in unfinished and task.label in earlier_costs:
            progress.add(task, earlier_costs[task.label]["seconds"])
    for position, task in enumerate(todo):
        start = time.monotonic()
        with peak_memory() as peak:
            task.run()
        seconds = time.monotonic() - start
        progress.add(task, seconds)
        costs.add(task, seconds, peak[0])
        # Models form reference cycles; collect now, or gigabytes stay allocated until the next GC.
        gc.collect()
        remaining = progress.remaining(todo[position + 1 :])
        logger.info(
            "[%*d/%d] %-32s %7s, about %s left",
            len(str(len(tasks))),
            len(tasks) - len(todo) + position + 1,
            len(tasks),
            task.label,
            duration(seconds),
            duration(remaining or 0.0),
        )


@contextlib.contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Measure the peak memory of a block in MB: GPU memory if there is a GPU, else resident memory.

    Only Linux can reset the peak of the resident memory. Elsewhere the result is the peak since the
    start of the process.

    Yields:
        A list whose only entry is the peak after the block.
    """
    import torch

    peak = [0.0]
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    try:
        yield peak
    finally:
        peak[0] = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else _resident_peak()


def _resident_peak() -> float:
    with contextlib.suppress(OSError, IndexError, ValueError):
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In bytes on macOS, in KB elsewhere.
    return largest / (2**20 if sys.platform == "darwin" else 1024)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
