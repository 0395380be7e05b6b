"""Rows of ``benchmarks/results/launches.csv``, and the table of the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

KEPT, TRITON = "kept handles", "triton"


@dataclass(frozen=True)
class Row:
    """One call with one way to launch.

    Attributes:
        us_p20, us_p50: quantiles over rounds of the time of a call.
        bar_us: the time to reach; empty if there is none.
        launches: kernels that a call launches.
    """

    call: str
    mode: str
    launcher: str
    us_p20: float
    us_p50: float
    bar_us: float | str
    launches: int
    device: str
    torch: str
    triton: str
    commit: str
    date: str


def table(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The rows of a CSV file as the lines of a Markdown table, one per call."""
    times = {(row["call"], row["mode"], row["launcher"]): row for row in rows}
    passes = {"forward": "forward", "both": "forward + backward"}
    lines = []
    for (call, mode, launcher), row in times.items():
        if launcher == KEPT:
            own = times[call, mode, TRITON]
            cells = [call, passes[mode], str(row["launches"])]
            cells += [_three_digits(float(each["us_p50"])) for each in (row, own)]
            bar = f"{float(row['bar_us']):g}" if row["bar_us"] else ""
            lines.append(f"| {' | '.join(cells)} | {bar} |")
    return lines


def _three_digits(value: float) -> str:
    return f"{float(f'{value:.3g}'):g}"
