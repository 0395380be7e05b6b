"""Files of settings: YAML, one file on top of another, and the nearest name of a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optical.files import read_lines

__all__ = ["nearest", "parse_yaml", "read_layered", "read_yaml"]


def read_layered(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], str]:
    """A configuration file on top of the one that its key `base` names, and the text of both."""
    raw, text = read_yaml(path)
    name = raw.pop("base", None)
    if name is None:
        return raw, text
    base = path.parent / str(name)
    if base in (*seen, path):
        raise ValueError(f"{path}: base: {name} is based on this file itself")
    below, text_below = read_layered(base, (*seen, path))
    return _merged(below, raw), f"{text}\n# base: {name}\n{text_below}"


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Keys and values of both; where both have one, that of `above`; null takes a key away."""
    found = {**below}
    for key, value in above.items():
        if value is None:
            found.pop(key, None)
        elif isinstance(value, dict) and isinstance(found.get(key), dict):
            found[key] = _merged(found[key], value)
        else:
            found[key] = value
    return found


def read_yaml(path: str | Path) -> tuple[dict[str, Any], str]:
    """Read a YAML file of keys and values; returns them and the file's text."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    text = "".join(f"{line}\n" for _, line in read_lines(path))
    return parse_yaml(text, str(path)), text


def parse_yaml(text: str, place: str) -> dict[str, Any]:
    """Keys and values of YAML text; `place` names it in errors, which have one line."""
    import yaml

    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = f":{line + 1}" if line is not None else ""
        raise ValueError(f"{place}{where}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{place}: expected keys and values, found {type(raw).__name__}")
    return raw


def nearest(key: str, keys: Iterable[str]) -> str:
    """'; did you mean `x`?' for the known key nearest to a mistyped one, or the list of keys."""
    close = difflib.get_close_matches(str(key), list(keys), n=1, cutoff=0.5)
    if close:
        return f"; did you mean `{close[0]}`?"
    listed = sorted(keys)
    return f"; known: {', '.join(listed)}" if 0 < len(listed) < 30 else ""
