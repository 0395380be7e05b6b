"""Content hashes of plain data, files and folders, by which stored results know their inputs."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from optical.io.files import checksum
from optical.io.streams import is_stream


def fingerprint(inputs: Any) -> str:
    """Return the fingerprint of plain data, ten hexadecimal digits.

    Examples:
        >>> fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:10]


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file; a file that has not changed is read once.

    Raises:
        OSError: the file cannot be read.
    """
    stat = os.stat(path)
    return _digest(str(path), stat.st_size, stat.st_mtime_ns)


def with_digests(value: Any, digest: Callable[[str], str] | None = None) -> Any:
    """Return `value` with every file name in it replaced by the hash of the file's content.

    Args:
        value: plain data. A string may be `file`, `language=file`, or two aligned files
            `corpus.en,corpus.sw`; other strings are unchanged.
        digest: replaces one file name; returns other strings unchanged. The default is
            :func:`digest_or_name`.
    """
    digest = digest or digest_or_name
    if isinstance(value, Mapping):
        return {key: with_digests(entry, digest) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_digests(entry, digest) for entry in value]
    if not isinstance(value, str):
        return value
    whole = _named_file(value, digest)
    if whole != value:
        return whole
    return ",".join(_named_file(part, digest) for part in value.split(","))


def digest_or_name(value: str) -> str:
    """Return the SHA-256 of the file `value`, or `value` if it is no file or a pipe."""
    if is_stream(Path(value)):  # its content can be read once only
        return value
    try:
        return file_digest(value)
    except OSError:
        return value


def _named_file(value: str, digest: Callable[[str], str]) -> str:
    whole = digest(value)
    name, equals, path = value.partition("=")
    return whole if whole != value or not equals else f"{name}={digest(path)}"


@functools.lru_cache(maxsize=1000)
def _digest(path: str, size: int, time_ns: int) -> str:
    # Size and time are part of the cache key only: a changed file is read again.
    return checksum(path)
