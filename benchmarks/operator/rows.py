"""The rows of the CSV: one format for every benchmark, written, read, and shown as text."""

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

from benchmarks.operator import jobs
from benchmarks.operator.jobs import ROOT, Task

FAILED = "failed"
PACKAGES = {"pot": "POT", "geomloss": "geomloss"}


@dataclass(frozen=True)
class Row:
    """One line of the CSV.

    A provider that fails the gate has "failed" where the time belongs, and the reason in ``note``.
    Errors are those of the whole batch: ``error_value`` relative, ``error_plan`` the worst L1
    distance, ``error_potentials`` the largest difference over epsilon, ``error_gradient`` the
    relative Frobenius norm. ``ratio`` is how many times longer than our fastest backend it takes.
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
        shape = "x".join(map(str, (self.batch, self.n, self.m, self.dim, self.max_iter)))
        return shape if self.data == "aligned" else f"{shape}:{self.data}"

    @property
    def key(self) -> tuple[object, ...]:
        """What one row is about: a new measurement of the same replaces the old one."""
        about = (self.benchmark, self.provider, self.mode, self.case_name, self.dtype)
        return *about, float(self.epsilon), self.device, int(self.threads)


def row_of(benchmark: str, name: str, task: Task) -> Row:
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
        device=_device_name(case.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        version=_version(name),
        triton=_installed("triton") if name == "triton" else "",
        cuda=(torch.version.cuda or "") if case.device == "cuda" else "",
        commit=_commit(),
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
    found = subprocess.run([jobs.ott_python, "-c", code], capture_output=True, text=True)
    return f"ott-jax {found.stdout.strip()}"


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "cpu")


@functools.lru_cache
def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout.strip()


def read(path: Path) -> list[Row]:
    """The rows of a CSV file, numbers as numbers; none if there is no such file."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return [Row(**{k: _number(k, v) for k, v in line.items()}) for line in csv.DictReader(file)]


TEXTS = {"benchmark", "provider", "mode", "data", "dtype", "device", "torch", "version", "triton",
         "cuda", "commit", "date", "note"}  # fmt: skip
COUNTS = {"batch", "n", "m", "dim", "max_iter", "visits", "threads"}


def _number(name: str, text: str) -> Any:
    if name in TEXTS or text in ("", FAILED):
        return text
    return int(text) if name in COUNTS else float(text)


def write(rows: Sequence[Row], path: Path) -> None:
    """Put the rows into a CSV file, each in place of an older one about the same thing."""
    merged = {row.key: row for row in read(path)}
    merged.update({row.key: row for row in rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in merged.values())


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, for the terminal."""
    heads = ("problem", "mode", "provider", "ms", "p20", "p80", "x ours", "error", "G/s", "MB")
    lines = [_line(*heads)]
    for row in rows:
        speed = ""
        if isinstance(row.ms_p50, float) and not row.tol:
            speed = f"{row.visits / row.ms_p50 / 1e6:.2f}"
        times = (row.ms_p50, row.ms_p20, row.ms_p80, row.ratio, row.error_plan, speed, row.peak_mb)
        lines.append(_line(row.case_name, row.mode, row.provider, *times))
    return "\n".join(lines)


def _line(problem: str, mode: str, provider: str, *others: object) -> str:
    numbers = "".join(f" {other!s:>9}" for other in others)
    return f"{problem:<28} {mode:<8} {provider:<16}{numbers}"
