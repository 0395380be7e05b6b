"""The CSV format of all operator benchmarks: its rows, reading, merging, and a text table."""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.metadata
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.csv_files import write_table
from benchmarks.operator import jobs
from benchmarks.operator.jobs import ROOT, Task

FAILED = "failed"
# Prefix of a provider's name -> its distribution, whose version is recorded.
PACKAGES = {"pot": "POT", "geomloss": "geomloss"}


@dataclass(frozen=True)
class Row:
    """One row of the CSV: a provider on a task, with its errors, its times and the machine.

    A provider that fails the gate has ``FAILED`` in ``ms_p50`` and the reason in ``note``.

    Attributes:
        visits: multiply-adds of all iterations; see ``Case.visits``.
        marginal_error: L1 errors of both marginals, summed; the largest sum of the batch.
        error_value: largest error of the value, relative to the largest value of the batch.
        error_plan: largest L1 distance between plans.
        error_potentials: largest difference of the potentials, in units of epsilon.
        error_gradient: Frobenius norm of the gradient's error, relative to the gradient's.
        ms_p50, ms_p20, ms_p80: quantiles of the milliseconds per call.
        ratio: median ratio to the time of our backend (the first of ``measure.RATIO_BASES`` that
            was timed) in the same round.
        peak_mb: peak memory of one call beyond its inputs, in MB.
        threads: number of PyTorch's threads.
        version: version of the provider's package.
    """

    benchmark: str
    provider: str
    mode: str
    data: str
    batch: int
    n: int
    m: int
    dim: int
    dtype: str
    epsilon: float
    max_iter: int
    tol: float
    visits: int
    marginal_error: float | str = ""
    error_value: float | str = ""
    error_plan: float | str = ""
    error_potentials: float | str = ""
    error_gradient: float | str = ""
    ms_p50: float | str = FAILED
    ms_p20: float | str = ""
    ms_p80: float | str = ""
    ratio: float | str = ""
    peak_mb: float | str = ""
    device: str = ""
    threads: int = 0
    torch: str = ""
    version: str = ""
    triton: str = ""
    cuda: str = ""
    commit: str = ""
    date: str = ""
    note: str = ""

    @property
    def case_name(self) -> str:
        """The name of the case, as in ``Case.name``."""
        shape = "x".join(map(str, (self.batch, self.n, self.m, self.dim, self.max_iter)))
        return shape if self.data == "aligned" else f"{shape}:{self.data}"

    @property
    def key(self) -> tuple[object, ...]:
        """The identity of the measurement; a new row replaces an older one with the same key."""
        task = (self.benchmark, self.provider, self.mode, self.case_name, self.dtype)
        return *task, float(self.epsilon), self.device, int(self.threads)


def row_of(benchmark: str, name: str, task: Task) -> Row:
    """A row without measurements: the task, the machine, the versions and the commit."""
    case = task.case
    return Row(
        benchmark=benchmark,
        provider=name,
        mode=task.mode,
        data=case.data,
        batch=case.batch,
        n=case.n,
        m=case.m,
        dim=case.dim,
        dtype=str(case.dtype).removeprefix("torch."),
        epsilon=case.epsilon,
        max_iter=case.max_iter,
        tol=case.tol,
        visits=case.visits(),
        device=device_name(case.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        version=_version(name),
        triton=_installed("triton") if name == "triton" else "",
        cuda=(torch.version.cuda or "") if case.device == "cuda" else "",
        commit=current_commit(),
        date=datetime.date.today().isoformat(),
    )


def _version(name: str) -> str:
    if name == "ott":
        return _ott_version()
    package = PACKAGES.get(name.split("_")[0], "")
    return f"{package} {_installed(package)}" if package else ""


@functools.lru_cache
def _ott_version() -> str:
    code = "import importlib.metadata as m; print(m.version('ott-jax'), 'jax', m.version('jax'))"
    process = subprocess.run([jobs.ott_python, "-c", code], capture_output=True, text=True)
    return f"ott-jax {process.stdout.strip()}"


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "cpu")


@functools.lru_cache
def current_commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout.strip()


def read(path: Path) -> list[Row]:
    """Read the rows of a CSV file with numbers converted; an empty list if the file is missing."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return [
            Row(**{name: _parse(name, text) for name, text in record.items()})
            for record in csv.DictReader(file)
        ]


TEXT_COLUMNS = {
    *("benchmark", "provider", "mode", "data", "dtype", "device"),
    *("torch", "version", "triton", "cuda", "commit", "date", "note"),
}
INTEGER_COLUMNS = {"batch", "n", "m", "dim", "max_iter", "visits", "threads"}


def _parse(name: str, text: str) -> Any:
    if name in TEXT_COLUMNS or text in ("", FAILED):
        return text
    return int(text) if name in INTEGER_COLUMNS else float(text)


def write(rows: Sequence[Row], path: Path) -> None:
    """Write the rows into a CSV file, each in place of an older row with the same key."""
    merged = {row.key: row for row in read(path)}
    merged.update({row.key: row for row in rows})
    write_table(path, [field.name for field in fields(Row)], map(asdict, merged.values()))


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, for the terminal."""
    header = ("problem", "mode", "provider", "ms", "p20", "p80", "x ours", "error", "G/s", "MB")
    lines = [_text_row(*header)]
    for row in rows:
        giga_visits = ""
        if isinstance(row.ms_p50, float) and not row.tol:
            giga_visits = f"{row.visits / row.ms_p50 / 1e6:.2f}"
        cells = [row.case_name, row.mode, row.provider, row.ms_p50, row.ms_p20, row.ms_p80]
        lines.append(_text_row(*cells, row.ratio, row.error_plan, giga_visits, row.peak_mb))
    return "\n".join(lines)


def _text_row(problem: object, mode: object, provider: object, *numbers: object) -> str:
    columns = "".join(f" {number!s:>9}" for number in numbers)
    return f"{problem:<28} {mode:<8} {provider:<16}{columns}"
