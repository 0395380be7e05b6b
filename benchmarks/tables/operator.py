"""Operator tables of docs/benchmarks.md and README, and their figures, from the committed CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.operator import accuracy
from benchmarks.operator.jobs import ROOT
from benchmarks.operator.rows import FAILED, Row, read

RESULTS = Path(__file__).parents[1] / "results" / "cpu.csv"
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarks.md"
FIGURES = ROOT / "docs" / "figures"
# Names of the marked blocks: all rows go into the page, a selection into the README.
BLOCK, SPEED = "operator", "speed"
# Column heading -> the providers that may fill it; at most one of them serves a task.
PEERS = {
    "cost tensor + `sinkhorn`": ("bmm+cpu",),
    "PyTorch log": ("torch",),
    "POT log": ("pot",),
    "OTT-JAX": ("ott",),
    "GeomLoss": ("geomloss", "geomloss_samples"),
    "PyTorch bmm*": ("torch_bmm",),
    "POT kernel*": ("pot_kernel",),
}
TASKS = {
    "solve": "cost given",
    "vectors": "from vectors",
    "residual": "to a residual of 1e-3",
    "large": "one problem, from vectors",
}
MODES = {"forward": "forward", "both": "forward + backward"}
# The README's rows (task, shape, mode) and columns.
SPEED_ROWS = (
    ("solve", "64x128x128x768x50", "forward"),
    ("solve", "64x128x128x768x50", "both"),
    ("residual", "32x128x128x256x5000:mixed", "forward"),
    ("large", "1x4096x4096x64x50:random", "both"),
)
SPEED_PEERS = ("PyTorch log", "POT log", "OTT-JAX", "GeomLoss")


def block(rows: Sequence[Row]) -> str:
    """All timing and accuracy tables, with links to the figures."""
    timed = [row for row in rows if row.benchmark in TASKS]
    errors = [row for row in rows if row.benchmark == "accuracy"]
    parts = []
    if timed:
        parts += [ratio_table(timed), _figure("ratios"), _figure("ceiling")]
    if errors:
        parts.append(accuracy_table(errors))
    return "\n\n".join(parts)


def ratio_table(rows: Sequence[Row]) -> str:
    """Time of each peer divided by ours, at the largest thread count in the rows."""
    threads = max(row.threads for row in rows)
    rows = [row for row in rows if row.threads == threads]
    head = ("task", "problems", "pass", "ours", *PEERS, "of ceiling", "MB, ours / cost tensor")
    lines = [table_row(*head)]
    lines.append(table_row(*["---"] * 3, *["---:"] * (len(PEERS) + 3)))
    groups: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.benchmark, row.case_name, row.mode), {})[row.provider] = row
    for (task, name, mode), group in sorted(groups.items(), key=_order):
        for ours in ("cpu", "cpu_anderson"):
            if ours not in group:
                continue
            label = TASKS[task] + (", Anderson" if ours == "cpu_anderson" else "")
            found = (
                next((group[n] for n in names if n in group), None) for names in PEERS.values()
            )
            cells = [_ratio(row, group[ours]) for row in found]
            ceiling = group.get("sweeps")
            share = f"{float(ceiling.ratio):.0%}" if ceiling and ours == "cpu" else ""
            memory = [str(group[n].peak_mb) for n in (ours, "bmm+cpu") if n in group]
            shown = " / ".join(memory) if len(memory) == 2 and all(memory) else ""
            time = group[ours].ms_p50
            ms = time if time == FAILED else f"{time:g} ms"
            lines.append(table_row(label, f"`{name}`", MODES[mode], ms, *cells, share, shown))
    row = rows[0]
    versions = sorted({r.version for r in rows if r.version} | {f"PyTorch {row.torch}"})
    caption = (
        "*Time of each peer divided by ours, measured in the same rounds on "
        f"{_threads(threads)} of an {row.device} (rows: `benchmarks/results/{RESULTS.name}`; "
        f"{', '.join(versions)}). A problem is batch x n x m x dim x iterations. "
        "Starred solvers keep one kernel matrix and are not safe at small temperatures.*"
    )
    return "\n".join([*lines, "", caption])


def speed_table(rows: Sequence[Row]) -> str:
    """The README's selection of rows, with ratios to the solvers that are safe at any epsilon."""
    threads = max(row.threads for row in rows if row.benchmark in TASKS)
    timed = {
        (row.benchmark, row.case_name, row.mode, row.provider): row
        for row in rows
        if row.benchmark in TASKS and row.threads == threads
    }
    lines = [table_row("task", "problems", "pass", "ours", *SPEED_PEERS)]
    lines.append(table_row("---", "---", "---", *["---:"] * (len(SPEED_PEERS) + 1)))
    for key in SPEED_ROWS:
        ours = timed[(*key, "cpu")]
        peers = (_first_row(timed, key, PEERS[label]) for label in SPEED_PEERS)
        task, name, mode = key
        cells = [TASKS[task], f"`{name}`", MODES[mode], f"{ours.ms_p50:g} ms"]
        lines.append(table_row(*cells, *(_ratio(row, ours) for row in peers)))
    return "\n".join(lines)


def _first_row(
    timed: dict[tuple[str, str, str, str], Row], key: tuple[str, str, str], names: Sequence[str]
) -> Row | None:
    return next((timed[(*key, name)] for name in names if (*key, name) in timed), None)


def _order(item: tuple[tuple[str, str, str], dict[str, Row]]) -> tuple[int, int, int]:
    (task, _, mode), group = item
    return list(TASKS).index(task), min(row.n for row in group.values()), list(MODES).index(mode)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _ratio(row: Row | None, ours: Row) -> str:
    if row is None or ours.ms_p50 == FAILED:
        return ""
    if row.ms_p50 == FAILED:
        return FAILED
    ratio = float(row.ratio) / float(ours.ratio)
    return f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.1f}×"


def accuracy_table(rows: Sequence[Row]) -> str:
    """Errors of the CPU backend, each with that of the most accurate peer."""
    found = {(row.provider, row.data, row.epsilon): row for row in rows}
    lines = [table_row("data", "ε", *accuracy.COLUMNS.values())]
    lines.append(table_row(*["---"] * (len(accuracy.COLUMNS) + 2)))
    for (name, data, epsilon), row in found.items():
        if name != "cpu" or row.note:
            continue
        cells = []
        for column in accuracy.COLUMNS:
            others = [
                (float(getattr(found[peer, data, epsilon], column)), label)
                for peer, label in accuracy.PEERS.items()
                if (peer, data, epsilon) in found and not found[peer, data, epsilon].note
            ]
            best = "; {:.1e} {}".format(*min(others)) if others else ""
            cells.append(f"{float(getattr(row, column)):.1e}{best}")
        lines.append(table_row(data, f"{epsilon:g}", *cells))
    row = rows[0]
    exceptions = len(list(accuracy.worse(rows)))
    compared = sum(r.provider in accuracy.PEERS and not r.note for r in rows)
    caption = (
        "*Errors of float32 results against float64: ours, then those of the most accurate of "
        f"{', '.join(accuracy.PEERS.values())}. {row.batch} problems of {row.n} x {row.m}, "
        f"{row.max_iter} iterations. Loss: relative. Plan: L1 (its mass is 1). Potentials: divided "
        "by ε. Gradient with respect to the token vectors: relative, Frobenius norm. Ours is at "
        "least as accurate, within a tenth or one rounding, in "
        f"{compared * len(accuracy.COLUMNS) - exceptions} of "
        f"{compared * len(accuracy.COLUMNS)} comparisons.*"
    )
    return "\n".join([*lines, "", caption])


def table_row(*cells: object) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def _figure(name: str) -> str:
    alternatives = {
        "ratios": "Time of each peer divided by ours, per problem",
        "ceiling": "Share of the measured throughput ceiling of the iteration, per problem",
    }
    return f"![{alternatives[name]}](figures/operator_{name}.svg)"


# ------------------------------------------------------------------------------------- figures


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Draw both figures: time ratios, and the share of the throughput ceiling."""
    forward = [row for row in rows if row.benchmark == "solve" and row.mode == "forward"]
    if not forward:
        return
    forward.sort(key=lambda row: (row.data, row.n))
    folder.mkdir(parents=True, exist_ok=True)
    cases = list(dict.fromkeys(row.case_name for row in forward))
    threads = sorted({row.threads for row in forward})
    values = {
        (r.case_name, r.provider, r.threads): float(r.ratio) for r in forward if r.ratio != ""
    }
    most = threads[-1]

    def ratios(axis: Any) -> None:
        series = {}
        for label, names in PEERS.items():
            heights = [next((values[c, n, most] for n in names if (c, n, most) in values), None)
                       for c in cases]  # fmt: skip
            if any(heights):
                series[label] = [h or float("nan") for h in heights]
        _bars(axis, cases, series)
        axis.set_yscale("log")
        axis.axhline(1, color="#333333", linewidth=1)
        axis.set_ylabel(f"time of peer / ours, cost given, {_threads(most)}")

    def ceiling(axis: Any) -> None:
        series = {
            _threads(count): [100 * values.get((c, "sweeps", count), float("nan")) for c in cases]
            for count in threads
        }
        _bars(axis, cases, series)
        axis.set_ylim(0, 100)
        axis.set_ylabel("% of the load and multiply-add ceiling")

    save_figure(ratios, folder / "operator_ratios.svg")
    save_figure(ceiling, folder / "operator_ceiling.svg")


def _bars(axis: Any, cases: Sequence[str], series: dict[str, list[float]]) -> None:
    step = 0.8 / max(len(series), 1)
    for index, (label, heights) in enumerate(series.items()):
        places = [i + (index - (len(series) - 1) / 2) * step for i in range(len(cases))]
        axis.bar(places, heights, 0.9 * step, label=label)
    axis.set_xticks(range(len(cases)), [case.replace(":", "\n") for case in cases], fontsize=6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, bbox_to_anchor=(1.0, 1.0), loc="upper left", fontsize=8)


def save_figure(paint: Callable[[Any], None], path: Path) -> None:
    """Draw one axis into a reproducible SVG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # No time stamp and no random ids: equal rows give equal bytes.
    same: Any = {"svg.hashsalt": path.name, "svg.fonttype": "none"}
    with pyplot.style.context("tableau-colorblind10"), matplotlib.rc_context(same):
        figure, axis = pyplot.subplots(figsize=(8.4, 3.4))
        paint(axis)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def read_block(page: Path, name: str) -> str:
    """Return the text between the markers of a block."""
    begin, end = _markers(name)
    return page.read_text(encoding="utf-8").split(begin)[1].split(end)[0].strip()


def write_block(page: Path, name: str, block: str) -> None:
    """Replace the text between the markers of a block."""
    begin, end = _markers(name)
    before, rest = page.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    page.write_text(f"{before}{begin}\n{block}\n{end}{after}", encoding="utf-8")


def main() -> None:
    """Rewrite both tables and both figures."""
    rows = read(RESULTS)
    write_block(PAGE, BLOCK, block(rows))
    write_block(README, SPEED, speed_table(rows))
    draw(rows, FIGURES)
