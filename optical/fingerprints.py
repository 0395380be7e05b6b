"""Fingerprints of what a study's cells depend on, so that what changed is never taken for done."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Arguments of the trainer that change what is kept and said, never what is learnt.
WITHOUT_EFFECT = ("save_steps", "save_strategy", "save_total_limit", "logging_steps", "report_to")
# Folders of a study in which names carry the fingerprint of what they hold.
MADE = ("models", "lexicons", "vectors")
MODELS = ("model", "teacher", "student")


class Fingerprints:
    """Fingerprints for a study with its output in one folder, which may be moved."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def of(self, parts: Any) -> str:
        """Ten digits that stand for plain data."""
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]

    def options(self, options: Any, without: str = "") -> Any:
        """Options as plain data, every file and model replaced by what is in it."""
        if options is None:
            return None
        # How a training is fed and whether it is resumed changes nothing of what it learns.
        left_out = ("resume", "teacher_vectors", without)
        return {
            field.name: (self.model if field.name in MODELS else self.files)(value)
            for field in dataclasses.fields(options)
            # Without defaults, an option that a later version adds leaves alone what is finished.
            if (value := getattr(options, field.name)) != _default(field)
            and field.name not in left_out
        }

    def files(self, value: Any) -> Any:
        """`value` with every file in it replaced by a digest of its contents."""
        if isinstance(value, Mapping):
            return {key: self.files(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.files(entry) for entry in value]
        if not isinstance(value, str):
            return value
        # `file`, `language=file`, or two aligned files `corpus.en,corpus.sw`.
        whole = self._named(value)
        return whole if whole != value else ",".join(map(self._named, value.split(",")))

    def model(self, name: str) -> str:
        """A model of the study by its fingerprinted name, so that the output folder can be moved;
        a model from elsewhere by what is in its folder."""
        made = self._made(name)
        if made:
            return made
        path = Path(name)
        return self._folder(path) if name and path.is_dir() else name

    def _named(self, value: str) -> str:
        whole = self._file(value)
        name, equals, path = value.partition("=")
        return whole if whole != value or not equals else f"{name}={self._file(path)}"

    def _file(self, value: str) -> str:
        """SHA-256 of the file that `value` names, or `value` itself where it names none."""
        made = self._made(value)
        if made:
            # What the study makes itself may not be there yet; its name says what it will be.
            return made
        try:
            stat = os.stat(value)
            return _digest(value, stat.st_size, stat.st_mtime_ns)
        except OSError:
            return value

    def _made(self, value: str) -> str:
        """Name of what the study made, or "" for what comes from elsewhere."""
        try:
            kind, name, *_ = Path(value).relative_to(self.output).parts
        except ValueError:
            return ""
        return name if kind in MADE else ""

    def _folder(self, folder: Path) -> str:
        """Names, sizes and times of a model or collection from elsewhere; weights are too large."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        found = [(path.relative_to(folder).as_posix(), path.stat()) for path in files]
        return self.of([(name, stat.st_size, stat.st_mtime_ns) for name, stat in found])


def effective(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's arguments that change what is learnt."""
    return {name: value for name, value in arguments.items() if name not in WITHOUT_EFFECT}


@functools.lru_cache(maxsize=1000)
def _digest(path: str, size: int, time_ns: int) -> str:
    # Size and time are in the key alone: a changed file is read again.
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()
