"""A plugin of pytest that prints every failure at once, since its time limit may end a run."""

from __future__ import annotations

from typing import Any

# Of a traceback; its end says what is wrong.
KEPT_CHARACTERS = 3000


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        text = report.longreprtext[-KEPT_CHARACTERS:]
        print(f"\n-- {report.nodeid} failed in {report.when}:\n{text}", flush=True)
