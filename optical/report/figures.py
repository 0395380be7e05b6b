"""Figures of a study, drawn from its results table only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optical.io.environment import require
from optical.io.files import atomic_file
from optical.report.summary import measure_name
from optical.report.table import PLAN_COLUMNS, Row, read_rows

# The palette of Okabe and Ito, which colour-blind readers can distinguish and which prints in grey.
# Black is left out because it would hide the error bars.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
# Further rounds of the palette are hatched.
HATCHES = ("", "///", "...", "xxx")


def draw_figures(table: Path, folder: Path) -> dict[str, Path]:
    """Draw all figures for which a results table has rows; return their names and files.

    Args:
        table: ``results.csv`` of a study. An ``alignment.csv`` in the same folder is drawn too.
        folder: folder for the figures; it is created if needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_rows(table)
    drawings = {
        "measure_per_language": draw_languages,
        "gap_per_arm": draw_gaps,
        "pairs": draw_curves,
    }
    files = {}
    for name, draw in drawings.items():
        if draw(rows, folder / f"{name}.png"):
            files[name] = folder / f"{name}.png"
    plan = table.with_name("alignment.csv")
    if plan.exists():
        draw_alignment(read_rows(plan, PLAN_COLUMNS), folder / "alignment.png")
        files["alignment"] = folder / "alignment.png"
    return files


def draw_languages(rows: Sequence[Row], path: Path) -> bool:
    """Draw bars of the measure per language and arm, one panel per collection.

    Returns:
        Whether there was anything to draw.
    """
    with_interval = [row for row in rows if row["low"] is not None]
    measures = [row for row in with_interval if row["kind"] == "measure"]
    ceilings = [row for row in with_interval if row["kind"] == "ceiling"]
    if not measures:
        return False
    plt = _pyplot()
    collections, arms = _distinct(measures, "collection"), _distinct(measures, "arm")
    most = len(_distinct(measures, "language"))
    width = max(6.0, 0.16 * len(arms) * most + 3, 1.3 * most + 2)
    # High enough for the legend, which is shared by all panels.
    height = max(3.4 * len(collections), 0.22 * len(arms) + 1.5)
    figure, axes = plt.subplots(len(collections), 1, figsize=(width, height), squeeze=False)
    step = 0.8 / max(len(arms), 1)
    for axis, collection in zip(axes[:, 0], collections, strict=True):
        here = [row for row in measures if row["collection"] == collection]
        by_arm = {(row["arm"], row["language"]): row for row in here}
        languages = _distinct(here, "language")
        for index, arm in enumerate(arms):
            bars = [by_arm[arm, language] for language in languages]
            positions = np.arange(len(bars)) + (index - (len(arms) - 1) / 2) * step
            axis.bar(
                positions,
                [bar["value"] for bar in bars],
                0.9 * step,
                color=COLOURS[index % len(COLOURS)],
                hatch=HATCHES[index // len(COLOURS) % len(HATCHES)],
                label=arm,
                yerr=_errors(bars),
                error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
            )
        for row in ceilings:
            if row["collection"] == collection:
                axis.axhline(
                    row["value"], color="#555555", linestyle="--", linewidth=1, label=row["arm"]
                )
        named = {row["language"]: f"{row['name']}\n{row['group']}".strip() for row in here}
        axis.set_xticks(range(len(languages)), [named[language] for language in languages])
        axis.set_ylabel(measure_name(here[0]["measure"]))
        axis.set_title(collection)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, bbox_to_anchor=(1.0, 1.0), loc="upper left", fontsize=8)
    _save(figure, path)
    return True


def draw_gaps(rows: Sequence[Row], path: Path) -> bool:
    """Draw bars of the gap, high minus low resource, per arm; return whether there were any."""
    gaps = [row for row in rows if row["kind"] == "gap"]
    if not gaps:
        return False
    plt = _pyplot()
    arms = _distinct(gaps, "arm")
    several = len(_distinct(gaps, "collection")) > 1
    figure, axis = plt.subplots(figsize=(7.0, 0.8 + 0.35 * len(gaps)))
    axis.barh(
        [f"{row['collection']}: {row['arm']}" if several else row["arm"] for row in gaps],
        [row["value"] for row in gaps],
        color=[COLOURS[arms.index(row["arm"]) % len(COLOURS)] for row in gaps],
        xerr=_errors(gaps),
        ecolor="#333333",
    )
    axis.axvline(0, color="#333333", linewidth=0.8)
    axis.invert_yaxis()
    axis.locator_params(axis="x", nbins=6)
    axis.set_xlabel(f"{measure_name(gaps[0]['measure'])}, high minus low resource")
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
    return True


def draw_curves(rows: Sequence[Row], path: Path) -> bool:
    """Draw the measure over the number of sentence pairs, one panel per collection and curve.

    Returns:
        Whether there was anything to draw.
    """
    points = [row for row in rows if row["kind"] == "curve" and row["pairs"]]
    if not points:
        return False
    plt = _pyplot()
    panels = list(dict.fromkeys((row["collection"], row["arm"]) for row in points))
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(1.5 + 3.6 * len(panels), 3.6),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        here = [row for row in points if (row["collection"], row["arm"]) == panel]
        for index, language in enumerate(_distinct(here, "language")):
            line = sorted(
                (row for row in here if row["language"] == language), key=lambda row: row["pairs"]
            )
            axis.errorbar(
                [row["pairs"] for row in line],
                [row["value"] for row in line],
                yerr=_errors(line),
                color=COLOURS[index % len(COLOURS)],
                linestyle="-" if line[0]["group"] != "high" else "--",
                marker="o",
                markersize=3,
                elinewidth=0.8,
                label=line[0]["name"],
            )
        axis.set_xscale("log")
        axis.set_xlabel("sentence pairs")
        axis.set_title(f"{panel[1]}, {panel[0]}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel(measure_name(points[0]["measure"]))
    axes[0, -1].legend(frameon=False, bbox_to_anchor=(1.0, 1.0), loc="upper left", fontsize=8)
    _save(figure, path)
    return True


def draw_alignment(rows: Sequence[Row], path: Path) -> None:
    """Draw a heat map of a transport plan; each row shows shares of its mass."""
    plt = _pyplot()
    others = [row["other"] for row in rows if row["column"] == 0]
    englishes = [row["english"] for row in rows if row["row"] == 0]
    plan = np.array([row["mass"] for row in rows]).reshape(len(others), len(englishes))
    shares = plan / plan.sum(axis=1, keepdims=True)
    figure, axis = plt.subplots(figsize=(2.0 + 0.45 * plan.shape[1], 1.4 + 0.36 * plan.shape[0]))
    image = axis.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    axis.set_xticks(range(plan.shape[1]), englishes, rotation=60, ha="right")
    axis.set_yticks(range(plan.shape[0]), others)
    figure.colorbar(image, ax=axis, label="share of the row's mass")
    _save(figure, path)


def _distinct(rows: Sequence[Row], column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))


def _errors(rows: Sequence[Row]) -> Any:
    values = np.array([row["value"] for row in rows])
    return np.abs(np.array([[row["low"], row["high"]] for row in rows]).T - values)


def _pyplot() -> Any:
    matplotlib = require("matplotlib", "study", "drawing figures")
    # The backend that needs no display.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    plt = _pyplot()
    figure.tight_layout()
    # Without a time stamp, so that equal numbers give equal files.
    with atomic_file(path) as file:
        figure.savefig(file, dpi=150, metadata={"Software": None}, format=path.suffix[1:])
    plt.close(figure)
