"""Files of settings: YAML, one on top of another, types, and the nearest name of a mistyped key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from optical.io.files import read_lines

# YAML 1.2's form of a number with an exponent: 1e-4 is one, which YAML 1.1 reads as text.
EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+\Z")


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

    # A class of its own: what resolves a form of text belongs to a class and its heirs.
    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
    try:
        raw = yaml.load(text, loader)
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


def typed(value: Any, hint: Any, place: str) -> Any:
    """Return a value that fits a type hint; `place` names it in the error.

    A whole number is a float too, but True is no number. An enumeration is met by its values alone,
    also where the hint lets any text stand in for them.

    Raises:
        ValueError: the value does not fit.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if any(_is_enum(kind) for kind in kinds):
        kinds = tuple(kind for kind in kinds if kind is not str)
    if not any(_fits(value, kind) for kind in kinds):
        wanted = " or ".join(_described(kind) for kind in kinds if kind is not NoneType)
        raise ValueError(f"{place}: {value!r}, expected {wanted}")
    return value


def _fits(value: Any, kind: Any) -> bool:
    if _is_enum(kind):
        return value in [one.value for one in kind]
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in parts
    if origin in (list, dict):
        inside = value.values() if isinstance(value, dict) else value
        return isinstance(value, origin) and all(_fits(one, parts[-1]) for one in inside)
    if kind in (int, float):
        numbers = int if kind is int else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool)
    # What no file can hold, a function say, passes.
    return kind is Any or not isinstance(kind, type) or bool(parts) or isinstance(value, kind)


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _described(kind: Any) -> str:
    if _is_enum(kind):
        return " or ".join(repr(one.value) for one in kind)
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
