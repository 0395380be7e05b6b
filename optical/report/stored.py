"""A study on disk, and its report at any time: ``study.json`` lists the tasks and their outputs.

A study writes the file before its first task. The report is computed from it and from the outputs
that exist, without the configuration, the models or the data.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optical.io.files import read_json, write_text
from optical.report.report import write_report
from optical.report.summary import StudyDescription

FILE, COSTS, LOSSES = "study.json", "costs.json", "losses.json"
EVALUATIONS = "results"


def write_study(
    study: StudyDescription, tasks: Sequence[tuple[str, Path]], folder: Path, output: Path
) -> None:
    """Write ``study.json``.

    Args:
        study: what the report needs to know.
        tasks: label and output of every task.
        folder: folder of the report, which is `output` or a folder in it.
        output: output folder of the study.
    """
    content = {
        "study": dataclasses.asdict(study),
        # Relative, so that the folder can be moved.
        "root": Path(os.path.relpath(output, folder)).as_posix(),
        "tasks": {path.relative_to(output).as_posix(): label for label, path in tasks},
    }
    write_text(folder / FILE, json.dumps(content, indent=1) + "\n")


def report_folder(folder: str | Path, formats: Sequence[str] = ()) -> Path:
    """Write the report of a study, finished or not, into its folder; return report.md's path.

    Args:
        folder: the folder with ``study.json``: the output folder of a study, or the folder of its
            report in there.
        formats: formats of the figures beside PNG, as of ``write_report``.

    Raises:
        ValueError: the folder holds no study, or no arm has been evaluated yet.
    """
    folder = Path(folder)
    path = folder / FILE
    if not path.is_file():
        inside = sorted(str(found.parent) for found in folder.glob(f"*/{FILE}"))
        hint = f"; there is one in {', '.join(inside)}" if inside else ""
        raise ValueError(
            f"{folder}: no {FILE} in this folder, so it holds no study{hint}; `optical study` "
            "writes it when it starts"
        )
    content = read_json(path)
    try:
        described = dict(content["study"])
        for entry in dataclasses.fields(StudyDescription):
            if isinstance(described.get(entry.name), list):
                described[entry.name] = tuple(described[entry.name])
        study = StudyDescription(**described)
        root, tasks = folder / content["root"], dict(content["tasks"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: written by another version; run the study again") from None
    done = {name: label for name, label in tasks.items() if (root / name).exists()}
    results = [
        found
        for name in done
        if Path(name).parent.name == EVALUATIONS and (found := _read(root / name)) is not None
    ]
    all_costs = _read(root / COSTS) or {}
    return write_report(
        study,
        results,
        {label: all_costs[name] for name, label in done.items() if name in all_costs},
        folder,
        losses=_losses(root, done),
        unfinished=[label for name, label in tasks.items() if name not in done],
        formats=formats,
    )


def _losses(root: Path, tasks: Mapping[str, str]) -> dict[str, list[Mapping[str, Any]]]:
    """Return label -> logged losses of the finished trainings that recorded them."""
    logs = {}
    for name, label in tasks.items():
        if label.startswith("train "):
            found = _read((root / name).parent.parent / LOSSES)
            if found:
                logs[label] = found
    return logs


def _read(path: Path) -> Any:
    """Return the content of a JSON file, or None if it is missing or damaged."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None
