"""Figures of a study, drawn from its tables only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optical.report.style import FORMATS, INK, Styles, panels, pyplot, save
from optical.report.summary import measure_name
from optical.report.table import LOSS_COLUMNS, PLAN_COLUMNS, QUERY_COLUMNS, Row, read_rows

# The marks of a dot plot, in points, and their vertical distance in inches.
DOT, SPACING = 5.0, 0.13


def draw_figures(
    table: Path, folder: Path, formats: Sequence[str] = FORMATS[:1]
) -> dict[str, Path]:
    """Draw all figures for which a study's tables have rows; return their names and first files.

    Args:
        table: ``results.csv`` of a study. ``alignment.csv``, ``losses.csv`` and ``queries.csv`` in
            the same folder are drawn too.
        folder: folder for the figures; it is created if needed.
        formats: suffixes of the files, of "png", "svg" and "pdf".
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_rows(table)
    arms = Styles(_distinct([row for row in rows if row["kind"] == "measure"], "arm"))
    figures = {
        "measure_per_language": draw_languages(rows, arms),
        "gap_per_arm": draw_gaps(rows, arms),
        "pairs": draw_curves(rows),
    }
    for name, columns, draw in (
        ("queries", QUERY_COLUMNS, lambda found: draw_queries(found, rows, arms)),
        ("losses", LOSS_COLUMNS, draw_losses),
        ("alignment", PLAN_COLUMNS, draw_alignment),
    ):
        path = table.with_name(f"{name}.csv")
        if path.exists():
            figures[name] = draw(read_rows(path, columns))
    files = {}
    for name, figure in figures.items():
        if figure is not None:
            save(figure, folder / name, formats)
            files[name] = folder / f"{name}.{formats[0]}"
    return files


def draw_languages(rows: Sequence[Row], styles: Styles) -> Any:
    """Draw the measure as dots with intervals, grouped by language, one panel per collection.

    Returns:
        The figure, or None if there is nothing to draw.
    """
    with_interval = [row for row in rows if row["low"] is not None]
    measures = [row for row in with_interval if row["kind"] == "measure"]
    ceilings = [row for row in with_interval if row["kind"] == "ceiling"]
    if not measures:
        return None
    collections = _distinct(measures, "collection")
    most = len(_distinct(measures, "language"))
    height = most * (len(styles.names) * SPACING + 0.25) + 0.9
    figure, axes = panels(len(collections), 3, 4.2, height, sharex=False)
    step = 0.8 / max(len(styles.names), 1)
    for axis, collection in zip(axes, collections, strict=True):
        here = [row for row in measures if row["collection"] == collection]
        languages = _distinct(here, "language")
        for index, arm in enumerate(styles.names):
            found = [row for row in here if row["arm"] == arm]
            shift = (index - (len(styles.names) - 1) / 2) * step
            positions = [languages.index(row["language"]) + shift for row in found]
            _dots(axis, found, positions, styles, arm)
        for row in ceilings:
            if row["collection"] == collection:
                axis.axvline(row["value"], color=INK, linestyle="--", linewidth=1, label=row["arm"])
        for border in range(1, len(languages)):
            axis.axhline(border - 0.5, color="#dddddd", linewidth=0.8, zorder=0)
        named = {row["language"]: f"{row['name']}\n{row['group']}".strip() for row in here}
        axis.set_yticks(range(len(languages)), [named[language] for language in languages])
        axis.tick_params(axis="y", length=0)
        axis.set_ylim(len(languages) - 0.5, -0.5)
        axis.grid(axis="x", color="#eeeeee")
        axis.set_axisbelow(True)
        axis.set_xlabel(measure_name(here[0]["measure"]))
        axis.set_title(collection)
    _legend(axes)
    return figure


def draw_gaps(rows: Sequence[Row], styles: Styles) -> Any:
    """Draw the gap, high minus low resource, as a dot per arm, one panel per collection."""
    gaps = [row for row in rows if row["kind"] == "gap"]
    if not gaps:
        return None
    collections = _distinct(gaps, "collection")
    arms = [arm for arm in styles.names if any(row["arm"] == arm for row in gaps)]
    height = 0.28 * len(arms) + 1.0
    figure, axes = panels(len(collections), 3, 3.6, height, sharey=True, sharex=True)
    for axis, collection in zip(axes, collections, strict=True):
        for arm in arms:
            found = [r for r in gaps if r["arm"] == arm and r["collection"] == collection]
            _dots(axis, found, [arms.index(arm)] * len(found), styles, arm)
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.set_yticks(range(len(arms)), arms)
        axis.set_ylim(len(arms) - 0.5, -0.5)
        axis.grid(color="#eeeeee")
        axis.set_axisbelow(True)
        axis.locator_params(axis="x", nbins=6)
        axis.set_xlabel(f"{measure_name(gaps[0]['measure'])}, high minus low")
        axis.set_title(collection)
    return figure


def draw_curves(rows: Sequence[Row]) -> Any:
    """Draw the measure over the number of sentence pairs, one panel per collection and curve."""
    points = [row for row in rows if row["kind"] == "curve" and row["pairs"]]
    if not points:
        return None
    found = list(dict.fromkeys((row["collection"], row["arm"]) for row in points))
    languages = _distinct(points, "language")
    figure, axes = panels(len(found), 3, 3.6, 3.4, sharex=True, sharey=True)
    for axis, panel in zip(axes, found, strict=True):
        here = [row for row in points if (row["collection"], row["arm"]) == panel]
        for language in _distinct(here, "language"):
            line = sorted(
                (row for row in here if row["language"] == language), key=lambda row: row["pairs"]
            )
            axis.errorbar(
                [row["pairs"] for row in line],
                [row["value"] for row in line],
                yerr=_errors(line),
                linestyle="--" if line[0]["group"] == "high" else "-",
                markersize=4,
                elinewidth=0.8,
                label=line[0]["name"],
                **_language_style(languages, language),
            )
        axis.set_xscale("log")
        # The default writes powers as formulas, which `style.pyplot` turns off.
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_minor_formatter("")
        axis.set_title(f"{panel[1]}, {panel[0]}", fontsize=9)
    _label_edges(axes, "sentence pairs", measure_name(points[0]["measure"]))
    _legend(axes)
    return figure


def draw_queries(values: Sequence[Row], rows: Sequence[Row], styles: Styles) -> Any:
    """Draw the sorted differences of each arm to another one over queries, a panel per language."""
    if not values:
        return None
    cells = list(dict.fromkeys((row["collection"], row["language"]) for row in values))
    names = {row["language"]: row["name"] for row in rows if row["name"]}
    figure, axes = panels(len(cells), 4, 2.9, 2.5, sharey=True)
    several = len(_distinct(values, "collection")) > 1
    for axis, cell in zip(axes, cells, strict=True):
        here = [row for row in values if (row["collection"], row["language"]) == cell]
        for arm in styles.names:
            found = sorted((row["difference"] for row in here if row["arm"] == arm), reverse=True)
            if found:
                against = next(row["against"] for row in here if row["arm"] == arm)
                share = (np.arange(len(found)) + 0.5) / len(found)
                label = f"{arm} – {against}"
                axis.plot(100 * share, found, label=label, linewidth=1.3, **styles.line(arm))
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.set_xlim(0, 100)
        language = names.get(cell[1], cell[1])
        axis.set_title(f"{language}, {cell[0]}" if several else language, fontsize=9)
    _label_edges(axes, "% of the queries", "difference")
    _legend(axes)
    return figure


def draw_losses(losses: Sequence[Row]) -> Any:
    """Draw the training loss over steps, one panel per trained arm, one line per training."""
    if not losses:
        return None
    arms = _distinct(losses, "arm")
    languages = [x for x in _distinct(losses, "language") if x]
    figure, axes = panels(len(arms), 4, 2.9, 2.3)
    for axis, arm in zip(axes, arms, strict=True):
        here = [row for row in losses if row["arm"] == arm]
        keys = dict.fromkeys((row["language"], row["seed"], row["part"]) for row in here)
        for language, seed, part in keys:
            line = [
                r for r in here if (r["language"], r["seed"], r["part"]) == (language, seed, part)
            ]
            colour = _language_style(languages, language)["color"] if language else INK
            axis.plot(
                [row["step"] for row in line],
                [row["loss"] for row in line],
                color=colour,
                linestyle="-" if part == "train" else ":",
                marker="." if len(line) == 1 else "",
                linewidth=1.1,
                label=line[0]["name"] or None,
            )
        axis.set_title(arm, fontsize=9)
        axis.locator_params(axis="x", nbins=4)
        axis.set_ylim(bottom=min(0.0, *(row["loss"] for row in here)))
    _label_edges(axes, "step", "loss")
    _legend(axes)
    return figure


def draw_alignment(rows: Sequence[Row]) -> Any:
    """Draw a heat map of a transport plan; each row shows shares of its mass."""
    plt = pyplot()
    others = [row["other"] for row in rows if row["column"] == 0]
    englishes = [row["english"] for row in rows if row["row"] == 0]
    plan = np.array([row["mass"] for row in rows]).reshape(len(others), len(englishes))
    shares = plan / plan.sum(axis=1, keepdims=True)
    figure, axis = plt.subplots(figsize=(2.0 + 0.45 * plan.shape[1], 1.4 + 0.36 * plan.shape[0]))
    image = axis.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    axis.set_xticks(range(plan.shape[1]), englishes, rotation=60, ha="right")
    axis.set_yticks(range(plan.shape[0]), others)
    figure.colorbar(image, ax=axis, label="share of the row's mass")
    return figure


def _dots(
    axis: Any, rows: Sequence[Row], positions: Sequence[float], styles: Styles, arm: str
) -> None:
    """Draw values as points with horizontal intervals."""
    if rows:
        axis.errorbar(
            [row["value"] for row in rows],
            positions,
            xerr=_errors(rows),
            linestyle="",
            markersize=DOT,
            elinewidth=0.9,
            label=arm,
            **styles.marker(arm),
        )


def _language_style(languages: Sequence[str], language: str) -> dict[str, Any]:
    """Return a colour of a scale that no arm has, and a marker."""
    plt = pyplot()
    place = languages.index(language)
    colour = plt.get_cmap("viridis")(0.85 * place / max(len(languages) - 1, 1))
    return {"color": colour, "marker": "osD^vPX*<>"[place % 10]}


def _label_edges(axes: Sequence[Any], x: str, y: str) -> None:
    """Label the lower axis of each column of panels and the left axis of each row."""
    columns = axes[0].get_subplotspec().get_gridspec().ncols
    for axis in axes[-columns:]:
        axis.set_xlabel(x)
    for axis in axes[::columns]:
        axis.set_ylabel(y)


def _legend(axes: Sequence[Any]) -> None:
    """Draw one legend for all panels, to the right of the last panel of the first row."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    first_row = axes[0].get_subplotspec().get_gridspec().ncols
    if entries:
        axes[min(first_row, len(axes)) - 1].legend(
            list(entries.values()), list(entries), frameon=False, fontsize=8,
            bbox_to_anchor=(1.02, 1.0), loc="upper left",
        )  # fmt: skip


def _distinct(rows: Sequence[Row], column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))


def _errors(rows: Sequence[Row]) -> Any:
    values = np.array([row["value"] for row in rows])
    return np.abs(np.array([[row["low"], row["high"]] for row in rows]).T - values)
