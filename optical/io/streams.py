"""Write to devices, pipes and the descriptors of this process, which are never replaced."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_DESCRIPTOR = re.compile(
    r"/dev/std(?P<name>in|out|err)|/(dev|proc/self|proc/thread-self)/fd/(?P<number>\d+)"
)


def descriptor(path: str | os.PathLike[str]) -> int | None:
    """Return the number of the descriptor that a path such as ``/dev/stdout`` names, or None."""
    match = _DESCRIPTOR.fullmatch(str(path))
    if match is None:
        return None
    return int(match["number"] or {"in": 0, "out": 1, "err": 2}[match["name"]])


def is_stream(path: Path) -> bool:
    """Return whether a path is a device, a pipe or a descriptor of this process."""
    if descriptor(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextlib.contextmanager
def writing_stream(path: Path) -> Iterator[BinaryIO]:
    """Open a device, a pipe or a descriptor of this process for writing, without replacing it."""
    number = descriptor(path)
    try:
        if number is not None:
            # Opening /dev/stdout anew would truncate a file that it is redirected to.
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            file = os.fdopen(os.dup(number), "wb")
        else:
            file = open(path, "wb")  # noqa: SIM115
        with file:
            yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename not in (None, str(path)):
            raise
        raise OSError(f"{path} cannot be written ({error.strerror or error})") from error
