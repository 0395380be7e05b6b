"""Blocks of a report, rendered as Markdown, one self-contained HTML page, or LaTeX tables."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Heading:
    text: str
    level: int = 2


@dataclass
class Text:
    text: str


@dataclass
class Table:
    head: list[str]
    rows: list[list[str]]
    caption: str


@dataclass
class Figure:
    path: Path
    caption: str


@dataclass
class Code:
    text: str


Block = Heading | Text | Table | Figure | Code


def to_markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(_markdown_block(block) for block in blocks) + "\n"


def _markdown_block(block: Block) -> str:
    if isinstance(block, Heading):
        return "#" * block.level + " " + block.text
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Code):
        return f"```yaml\n{block.text}\n```"
    if isinstance(block, Figure):
        return (
            f"![{block.caption}]({block.path.parent.name}/{block.path.name})\n\n*{block.caption}*"
        )
    lines = [block.head, ["---"] * len(block.head), *block.rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n*{block.caption}*"


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1b1b; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0 0.3rem; font-size: 0.9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #ddd; text-align: left;
  white-space: nowrap; }
nav { columns: 16rem; font-size: 0.9rem; } nav a { display: block; color: #0072b2; }
th { border-bottom: 2px solid #444; } figure { margin: 1.5rem 0; } img { max-width: 100%; }
.caption, figcaption { color: #555; font-size: 0.9rem; }
pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto; font-size: 0.85rem; }
/* A shadow at an edge says that more of a table is there; white covers it at the end. */
.wide, figure { overflow-x: auto; background:
  linear-gradient(to right, #fff 30%, #fff0) 0 / 3rem 100% no-repeat local,
  linear-gradient(to left, #fff 30%, #fff0) 100% / 3rem 100% no-repeat local,
  linear-gradient(to right, #0003, #0000) 0 / 0.7rem 100% no-repeat scroll,
  linear-gradient(to left, #0003, #0000) 100% / 0.7rem 100% no-repeat scroll; }
/* Labels of a figure cannot be read when it is shrunk to the width of a telephone. */
@media (max-width: 40rem) { figure img { max-width: none; width: 40rem; mix-blend-mode: multiply; }
  figcaption { position: sticky; left: 0; width: calc(100vw - 2rem); } }
"""


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """Render an HTML page without external files."""
    body = "\n".join(_html_block(block) for block in blocks)
    sections = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<a href="#{_anchor(text)}">{html.escape(text)}</a>' for text in sections)
    # After the title, where the sections begin.
    body = body.replace("<h2", f"<nav>{links}</nav>\n<h2", 1)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _html_block(block: Block) -> str:
    if isinstance(block, Heading):
        anchor = f' id="{_anchor(block.text)}"' if block.level == 2 else ""
        return f"<h{block.level}{anchor}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        lines = block.text.split("\n")
        if all(line.startswith("- ") for line in lines):
            return "<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in lines) + "</ul>"
        return f"<p>{_inline(block.text)}</p>"
    if isinstance(block, Code):
        return f"<pre>{html.escape(block.text)}</pre>"
    if isinstance(block, Figure):
        # Embedded, so that the page is a single file.
        data = base64.b64encode(block.path.read_bytes()).decode()
        caption = html.escape(block.caption)
        return (
            f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.head)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>"
        for row in block.rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>'
        f'</div><p class="caption">{html.escape(block.caption)}</p>'
    )


def _anchor(heading: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in heading.lower()).split())


def _inline(text: str) -> str:
    """Escape a line and render ``**bold**`` and code, the only markup in a report's sentences."""
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    parts = escaped.split("**")
    return "".join(f"<strong>{part}</strong>" if i % 2 else part for i, part in enumerate(parts))


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "–": "--", "−": "$-$", "<": "$<$", ">": "$>$", "[": "{[}", "]": "{]}",
}  # fmt: skip


def to_latex(blocks: Sequence[Block]) -> str:
    """Render the tables as LaTeX floats with the rules of ``booktabs``, in the order of the report.

    The label of a table is the heading above it and, if there are several, a number.
    """
    lines = [r"% \usepackage{booktabs}; wide tables: \usepackage{graphicx} and \resizebox"]
    heading, count = "", 0
    for block in blocks:
        if isinstance(block, Heading):
            heading, count = block.text, 0
        elif isinstance(block, Table):
            count += 1
            label = _anchor(heading)
            lines.append(_latex_table(block, label if count == 1 else f"{label}-{count}"))
    return "\n\n".join(lines) + "\n"


def _latex_table(table: Table, label: str) -> str:
    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(_latex_text, cells)) + r" \\"

    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex_text(table.caption)}}}",
            rf"\label{{tab:{label}}}",
            rf"\begin{{tabular}}{{{'l' * len(table.head)}}}",
            r"\toprule",
            line(table.head),
            r"\midrule",
            *map(line, table.rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _latex_text(text: str) -> str:
    """Escape a cell and render ``**bold**``."""
    parts = ["".join(_LATEX.get(c, c) for c in part) for part in text.split("**")]
    return "".join(rf"\textbf{{{part}}}" if i % 2 else part for i, part in enumerate(parts))
