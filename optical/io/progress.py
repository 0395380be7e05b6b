"""Lines of progress in a log, at intervals, for steps that take minutes."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger("optical")

# Seconds between two lines.
INTERVAL = 20.0


class Progress:
    """Log how far a step has come, at most once in an interval.

    Args:
        label: subject of the lines.
        total: amount of work in units; None if it is not known.
        units: name of the units.
        interval: seconds between two lines.
    """

    def __init__(
        self, label: str, total: int | None, units: str, interval: float = INTERVAL
    ) -> None:
        self.label, self.total, self.units, self.interval = label, total, units, interval
        self.done = 0
        self._start = self._last = time.monotonic()

    def add(self, amount: int = 1) -> None:
        """Count finished work, and log a line if the last one is older than the interval."""
        self.done += amount
        now = time.monotonic()
        if now - self._last < self.interval or self.done == self.total:
            return
        self._last = now
        of_total = left = ""
        if self.total is not None:
            seconds = (now - self._start) / max(self.done, 1) * (self.total - self.done)
            of_total, left = f" of {self.total}", f", {seconds:.0f} s left"
        logger.info("%s: %d%s %s%s", self.label, self.done, of_total, self.units, left)
