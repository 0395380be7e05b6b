"""YAML configuration files: inheritance, type checks and suggestions for mistyped keys."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from optical.io.environment import require
from optical.io.files import read_lines

# Numbers with an exponent as in YAML 1.2. PyYAML follows YAML 1.1, which reads 1e-4 as text.
EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+\Z")


def read_layered(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], str]:
    """Read a YAML file merged over the file that its key `base` names, and the text of both.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is not valid YAML, or is its own base.
    """
    raw, text = read_yaml(path)
    name = raw.pop("base", None)
    if name is None:
        return raw, text
    base = path.parent / str(name)
    if base in (*seen, path):
        raise ValueError(f"{path}: base: {name} is based on this file itself")
    base_raw, base_text = read_layered(base, (*seen, path))
    return _merge(base_raw, raw), f"{text}\n# base: {name}\n{base_text}"


def _merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Merge mappings recursively; values of `override` win, and null removes a key."""
    merged = {**base}
    for key, value in override.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def read_yaml(path: str | Path) -> tuple[dict[str, Any], str]:
    """Read a YAML mapping; returns it and the text of the file."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such configuration file")
    text = "".join(f"{line}\n" for _, line in read_lines(path))
    return parse_yaml(text, str(path)), text


def parse_yaml(text: str, location: str) -> dict[str, Any]:
    """Parse a YAML mapping; `location` names it in errors.

    Raises:
        ImportError: PyYAML is not installed (extra ``study``).
        ValueError: the text is not a YAML mapping; the message has one line.
    """
    yaml = require("yaml", "study", "a YAML file")
    # Resolvers are attributes of the class, so a subclass keeps SafeLoader itself unchanged.
    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
    try:
        reader = loader(text)
        node = reader.get_single_node()
        raw = None
        if node is not None:
            _check_keys(node, location, set())
            raw = reader.construct_document(node)
    except RecursionError:
        raise ValueError(f"{location}: not YAML that can be read (nested too deeply)") from None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        suffix = f":{line + 1}" if line is not None else ""
        raise ValueError(f"{location}{suffix}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else type(raw).__name__
        raise ValueError(f"{location}: expected keys and values, found {found}")
    return raw


def _check_keys(node: Any, location: str, seen: set[int]) -> None:
    """Raise ValueError for a key that stands twice; PyYAML would keep the last one in silence."""
    if id(node) in seen or not isinstance(node.value, list):
        return
    seen.add(id(node))
    keys: set[str] = set()
    for entry in node.value:
        key, value = entry if isinstance(entry, tuple) else (None, entry)
        if isinstance(getattr(key, "value", None), str):
            if key.value in keys:
                line = key.start_mark.line + 1
                raise ValueError(f"{location}:{line}: key `{key.value}` appears a second time")
            keys.add(key.value)
        _check_keys(value, location, seen)


def nearest(key: str, keys: Iterable[str]) -> str:
    """Return "; did you mean `x`?" for a mistyped key, or the list of known keys."""
    close = difflib.get_close_matches(str(key), list(keys), n=1, cutoff=0.5)
    if close:
        return f"; did you mean `{close[0]}`?"
    listed = sorted(keys)
    return f"; known: {', '.join(listed)}" if 0 < len(listed) < 30 else ""


def typed(value: Any, hint: Any, location: str) -> Any:
    """Return a value if it matches a type hint; `location` names it in errors.

    Integers match float, booleans match no number. If the hint names an enumeration, only its
    values match, even if the hint also allows str.

    Raises:
        ValueError: the value does not match.
    """
    alternatives = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if any(_is_enum(alternative) for alternative in alternatives):
        alternatives = tuple(alternative for alternative in alternatives if alternative is not str)
    if not any(_matches(value, alternative) for alternative in alternatives):
        expected = " or ".join(_describe(kind) for kind in alternatives if kind is not NoneType)
        raise ValueError(f"{location}: {value!r}, expected {expected}")
    return value


def _matches(value: Any, hint: Any) -> bool:
    if _is_enum(hint):
        return value in [member.value for member in hint]
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in parts
    if origin in (list, dict):
        entries = value.values() if isinstance(value, dict) else value
        return isinstance(value, origin) and all(_matches(entry, parts[-1]) for entry in entries)
    if hint in (int, float):
        numbers = int if hint is int else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool)
    # Hints that no file can express, such as functions, match anything.
    return hint is Any or not isinstance(hint, type) or bool(parts) or isinstance(value, hint)


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _describe(hint: Any) -> str:
    if _is_enum(hint):
        return " or ".join(repr(member.value) for member in hint)
    if get_origin(hint) is Literal:
        return " or ".join(get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
