"""Rows of the measurements, each written and flushed as soon as it is measured."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.csv_files import append_row
from benchmarks.gpu.measure.shapes import MACHINE, Shape
from benchmarks.operator.rows import current_commit


@dataclass(frozen=True)
class Row:
    """One measurement; without a time, ``note`` has the reason.

    Attributes:
        mode: "forward", "both" (forward and backward), or the name of a check.
        kernel_us, kernel_p20, kernel_p80: one solve without the operator around it: a CUDA graph of
            many solves with rotating inputs, divided by their number.
        graph_us, graph_p20, graph_p80: the same for the public call, all of its kernels included.
        host_us: time in which Python issues one public call to an idle device.
        call_us: time until the results of that call are there.
        error_value: largest error of the value relative to the largest value, against float64.
        error_potentials: largest error of f and g, in units of epsilon.
        error_gradient: largest error of the gradients relative to their largest entry.
        same_bits: whether the last problems have the bits of a batch of their own.
    """

    step: str
    shape: str
    problem: str
    provider: str
    mode: str
    dtype: str = ""
    precision: str = ""
    gradient: str = ""
    kernel_us: float | str = ""
    kernel_p20: float | str = ""
    kernel_p80: float | str = ""
    graph_us: float | str = ""
    graph_p20: float | str = ""
    graph_p80: float | str = ""
    host_us: float | str = ""
    call_us: float | str = ""
    floor_us: float | str = ""
    error_value: float | str = ""
    error_potentials: float | str = ""
    error_gradient: float | str = ""
    same_bits: bool | str = ""
    note: str = ""
    device: str = ""
    torch: str = ""
    triton: str = ""
    cuda: str = ""
    commit: str = ""
    date: str = ""


def new_row(step: str, shape: Shape, provider: str, mode: str, **values: object) -> Row:
    """A row with the shape and the machine filled in."""
    floor = shape.floor_us if mode == "forward" and values.get("dtype") == "bfloat16" else 0
    return Row(
        step=step,
        shape=shape.name,
        problem=shape.problem,
        provider=provider,
        mode=mode,
        floor_us=floor or "",
        **stamp(),
        **values,  # type: ignore[arg-type]
    )


@functools.cache
def stamp() -> dict[str, str]:
    """The machine and the versions, the same for every row."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {
        "device": MACHINE.name or torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda or "",
        "commit": current_commit(),
        "date": datetime.date.today().isoformat(),
    }


class RowFile:
    """A CSV file that grows by one flushed line per row; each row is printed as well.

    Attributes:
        failures: number of rows added whose note begins with "failed".
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failures = 0

    def add(self, row: Row) -> None:
        self.failures += row.note.startswith("failed")
        append_row(self.path, asdict(_rounded(row)))
        shown = {k: v for k, v in asdict(_rounded(row)).items() if v != "" and k not in stamp()}
        print("row", " ".join(f"{name}={value}" for name, value in shown.items()), flush=True)


def _rounded(row: Row) -> Row:
    numbers = {k: float(f"{v:.4g}") for k, v in asdict(row).items() if isinstance(v, float)}
    return replace(row, **numbers)  # type: ignore[arg-type]
