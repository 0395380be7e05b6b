"""The study's figures, drawn from its summary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from optical.config import StudyConfig
from optical.summary import Summary, measure_name

# Okabe and Ito's palette: told apart by colour-blind readers and in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw_languages(config: StudyConfig, summary: Summary, path: Path) -> None:
    """Bars of the measure per language and arm; one panel per collection."""
    plt = _pyplot()

    count = len(summary.collections)
    figure, axes = plt.subplots(
        count, 1, figsize=(max(6.0, 1.3 * len(summary.languages) + 2), 3.4 * count), squeeze=False
    )
    step = 0.7 / max(len(summary.arms), 1)
    for axis, collection in zip(axes[:, 0], summary.collections, strict=True):
        for index, arm in enumerate(summary.arms):
            keys = [(collection, arm, language) for language in summary.languages]
            means = np.array([summary.means[summary.measure][key] for key in keys])
            bounds = np.array([summary.intervals[key] for key in keys])
            place = np.arange(len(keys)) + (index - (len(summary.arms) - 1) / 2) * step
            axis.bar(
                place,
                means,
                0.9 * step,
                color=COLOURS[index % len(COLOURS)],
                label=arm,
                yerr=np.abs(bounds.T - means),
                error_kw={"elinewidth": 1, "ecolor": "#333333"},
            )
        for c, arm, language in summary.scores:
            if c == collection and arm not in summary.arms:
                level = summary.means[summary.measure][c, arm, language]
                axis.axhline(level, color="#555555", linestyle="--", linewidth=1, label=arm)
        labels = [
            f"{config.names.get(language, language)}\n{config.resource(language)}".strip()
            for language in summary.languages
        ]
        axis.set_xticks(range(len(labels)), labels)
        axis.set_ylabel(measure_name(summary.measure))
        axis.set_title(collection)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    _save(figure, path)


def draw_gaps(summary: Summary, path: Path) -> None:
    """Bars of the high-minus-low gap per arm."""
    plt = _pyplot()

    figure, axis = plt.subplots(figsize=(7.0, 0.8 + 0.45 * len(summary.gaps)))
    labels = [
        f"{gap.collection}: {gap.arm}" if len(summary.collections) > 1 else gap.arm
        for gap in summary.gaps
    ]
    points = np.array([gap.gap[0] for gap in summary.gaps])
    bounds = np.array([gap.gap[1:] for gap in summary.gaps])
    colours = [COLOURS[summary.arms.index(gap.arm) % len(COLOURS)] for gap in summary.gaps]
    axis.barh(labels, points, color=colours, xerr=np.abs(bounds.T - points), ecolor="#333333")
    axis.axvline(0, color="#333333", linewidth=0.8)
    axis.invert_yaxis()
    axis.locator_params(axis="x", nbins=6)
    axis.set_xlabel(f"{measure_name(summary.measure)}, high minus low resource")
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_alignment(row: Mapping[str, Any], path: Path) -> None:
    """Heat map of the transport plan that the alignment cell wrote."""
    plt = _pyplot()

    plan = np.array(row["plan"])
    shares = plan / plan.sum(axis=1, keepdims=True)
    figure, axis = plt.subplots(figsize=(2.0 + 0.45 * plan.shape[1], 1.4 + 0.36 * plan.shape[0]))
    image = axis.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    axis.set_xticks(range(plan.shape[1]), row["english_tokens"], rotation=60, ha="right")
    axis.set_yticks(range(plan.shape[0]), row["other_tokens"])
    figure.colorbar(image, ax=axis, label="share of the row's mass")
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    # Draws into files on machines without a screen.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    plt = _pyplot()

    figure.tight_layout()
    # No time stamp inside: the same numbers give the same file.
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
