"""The units of work of a study: what is finished, what it took, and how long the rest will take."""

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


@dataclass
class Cell:
    """One unit of work that is either finished, with its file in place, or not."""

    label: str
    kind: str
    mark: Path
    work: float
    run: Callable[[], None]

    @property
    def done(self) -> bool:
        """Whether the mark is there, and whole where it is a file of the study's own."""
        if not self.mark.exists() or self.mark.name == "config.json":
            return self.mark.exists()
        return self.mark.suffix != ".json" or _readable(self.mark)


def _readable(path: Path) -> bool:
    try:
        read_json(path)
    except ValueError as error:
        logger.warning("%s", error)
        return False
    return True


@dataclass
class Progress:
    """Tells after each cell how long the rest will take, from what finished cells took."""

    seconds: dict[str, float] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)

    def add(self, cell: Cell, seconds: float) -> None:
        self.seconds[cell.kind] = self.seconds.get(cell.kind, 0.0) + seconds
        self.work[cell.kind] = self.work.get(cell.kind, 0.0) + cell.work

    def left(self, cells: list[Cell]) -> float | None:
        """Seconds for `cells`, or None while nothing is known."""
        known = sum(self.seconds.values()), sum(self.work.values())
        if not known[1]:
            return None
        total = 0.0
        for cell in cells:
            seconds, work = self.seconds.get(cell.kind, 0.0), self.work.get(cell.kind, 0.0)
            rate = seconds / work if work else known[0] / known[1]
            total += rate * cell.work
        return total


class Costs:
    """Seconds and peak memory of every cell, in a file beside what the studies there have finished.

    The key is the file that marks the cell as finished: studies that share a folder have cells of
    the same label that make different things.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output / "costs.json"

    def read(self, cells: Iterable[Cell]) -> dict[str, dict[str, float]]:
        """Label of a cell -> ``seconds`` and ``peak_mb`` of the run that finished it."""
        found = self._read()
        return {cell.label: found[key] for cell in cells if (key := self._key(cell)) in found}

    def add(self, cell: Cell, seconds: float, peak_mb: float) -> None:
        costs = self._read()
        costs[self._key(cell)] = {"seconds": round(seconds, 1), "peak_mb": round(peak_mb, 1)}
        write_json(self.path, costs)

    def _key(self, cell: Cell) -> str:
        return cell.mark.relative_to(self.output).as_posix()

    def _read(self) -> dict[str, dict[str, float]]:
        if not self.path.exists() or not _readable(self.path):
            return {}
        found: dict[str, dict[str, float]] = read_json(self.path)
        return found


def run_cells(title: str, cells: Sequence[Cell], output: Path) -> None:
    """Run the cells that are not finished, in order, with a line for each."""
    costs = Costs(output)
    progress = Progress()
    todo = [cell for cell in cells if not cell.done]
    logger.info(
        "%s: %d cells, %d finished before; output in %s",
        title,
        len(cells),
        len(cells) - len(todo),
        output,
    )
    # What finished cells took, in earlier runs too, tells what the others will take.
    known = costs.read(cells)
    waiting = {cell.mark for cell in todo}
    for cell in cells:
        if cell.mark not in waiting and cell.label in known:
            progress.add(cell, known[cell.label]["seconds"])
    for position, cell in enumerate(todo):
        begun = time.monotonic()
        with peak_memory() as peak:
            cell.run()
        seconds = time.monotonic() - begun
        progress.add(cell, seconds)
        costs.add(cell, seconds, peak[0])
        # Trained and searched models hold themselves in cycles, which would wait for gigabytes.
        gc.collect()
        left = progress.left(todo[position + 1 :])
        logger.info(
            "[%*d/%d] %-32s %7s, about %s left",
            len(str(len(cells))),
            len(cells) - len(todo) + position + 1,
            len(cells),
            cell.label,
            duration(seconds),
            duration(left or 0.0),
        )


@contextlib.contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Measure the largest memory in MB during a block, the GPU's where there is one.

    On a CPU it is the resident memory of the process. Where the system cannot begin the count anew
    (all but Linux), it is the largest since the process began.
    """
    import torch

    peak = [0.0]
    device = torch.cuda.is_available()
    if device:
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    try:
        yield peak
    finally:
        peak[0] = torch.cuda.max_memory_allocated() / 2**20 if device else _resident_peak()


def _resident_peak() -> float:
    with contextlib.suppress(OSError, IndexError, ValueError):
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / (2**20 if sys.platform == "darwin" else 1024)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


CEILING = "English documents"
