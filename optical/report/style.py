"""The look of figures: colours and markers that mean an arm, grids of panels, and files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from optical.io.environment import require
from optical.io.files import atomic_file

# The palette of Okabe and Ito, which colour-blind readers can distinguish and which prints in grey.
# Black is left out because it would hide the intervals.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
LINES = ("-", "--", ":", "-.")
INK = "#333333"
# All formats of a figure, for the screen, the web and LaTeX. A report draws and embeds the first;
# the others take half of the time of a report.
FORMATS = ("png", "svg", "pdf")


class Styles:
    """A style for each name. The same list of names gives the same styles in every figure."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(dict.fromkeys(names))

    def _place(self, name: str) -> tuple[int, int]:
        """Return the position in the palette, and the round through it."""
        index = self.names.index(name)
        return index % len(COLOURS), index // len(COLOURS)

    def colour(self, name: str) -> str:
        return COLOURS[self._place(name)[0]]

    def marker(self, name: str) -> dict[str, Any]:
        """Return the arguments of a point. The second round through the palette is hollow."""
        place, turn = self._place(name)
        # Another round also shifts the marker, so that no two arms look alike in grey.
        return {
            "marker": MARKERS[(place + 3 * turn) % len(MARKERS)],
            "color": COLOURS[place],
            "markerfacecolor": "white" if turn % 2 else COLOURS[place],
            "markeredgecolor": COLOURS[place],
        }

    def line(self, name: str) -> dict[str, Any]:
        place, turn = self._place(name)
        return {"color": COLOURS[place], "linestyle": LINES[turn % len(LINES)]}


def pyplot() -> Any:
    """Import pyplot with a backend that needs no display and settings that repeat exactly."""
    matplotlib = require("matplotlib", "study", "drawing figures")
    matplotlib.use("Agg")
    # Identifiers in SVG files are random otherwise. Fonts of type 42 keep the text of a PDF text.
    matplotlib.rcParams.update({"svg.hashsalt": "optical", "pdf.fonttype": 42})
    # Names of arms and tokens may hold dollar signs.
    matplotlib.rcParams["text.parse_math"] = False
    from matplotlib import pyplot as plt

    return plt


def panels(count: int, columns: int, width: float, height: float, **more: Any) -> tuple[Any, Any]:
    """Return a figure with `count` panels in rows of at most `columns`, and the panels."""
    columns = min(columns, count) if count != columns + 1 else -(-count // 2)
    rows = -(-count // columns)
    figure, axes = pyplot().subplots(
        rows, columns, figsize=(width * columns + 1.6, height * rows + 0.4), squeeze=False, **more
    )
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.set_visible(False)
    for axis in flat[:count]:
        axis.spines[["top", "right"]].set_visible(False)
        # Shared axes have labels in the last row only, whose panels may be unused.
        axis.tick_params(labelbottom=True)
    return figure, flat[:count]


def save(figure: Any, path: Path, formats: Sequence[str]) -> None:
    """Write a figure as `path` with each suffix; equal figures give equal files."""
    plt = pyplot()
    figure.tight_layout()
    metadata: dict[str, dict[str, None]] = {
        "png": {"Software": None},
        "svg": {"Date": None},
        "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    }
    for suffix in formats:
        with atomic_file(path.with_suffix(f".{suffix}")) as file:
            figure.savefig(file, dpi=150, metadata=metadata[suffix], format=suffix)
    plt.close(figure)
