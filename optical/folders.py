"""Folders that a long run writes and another one reads: locked, checked, and honest about space."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from optical.files import read_json, write_json

# Holds the SHA-256 of the files beside it, and is written after them.
CHECKSUMS = "checksums.json"
# What libraries make of a full disk or quota: safetensors, numpy, and two of PyTorch's.
FULL = (
    *("No space left on device", "Disk quota exceeded", "File too large"),
    *(r"\d+ requested and \d+ written", r"unexpected pos \d+", "PytorchStreamWriter failed"),
)


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep other processes from working in a folder that exists, as long as the block runs.

    The lock ends with the process, however it ends. Where the file system has no locks, there is
    none.

    Raises:
        ValueError: another process works there; the message says which.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = Path(folder) / ".lock"
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            # Not flock: a child that outlives a killed process would keep that lock.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            other = file.read().strip() or "another process"
            file.close()
            raise ValueError(
                f"{folder}: {other} is working in this folder; wait for it, or choose another one"
            ) from None
        except OSError:
            break
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        # The one before removed the file between our opening and our locking it.
        file.close()
    try:
        # Best effort: on a full disk the lock holds all the same.
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            file.close()


@contextlib.contextmanager
def enough_space(folder: str | Path) -> Iterator[None]:
    """Turn what libraries make of a full disk into one line.

    Raises:
        OSError: the disk was full; the message names the folder and says what to do.
    """
    try:
        yield
    except Exception as error:
        if not any(re.search(sign, str(error)) for sign in FULL):
            raise
        what = str(error).splitlines()[0]
        raise OSError(
            f"{folder}: no room to write ({what}); free some space and continue: what was "
            "finished is kept"
        ) from error


def checksum(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def seal(folder: str | Path, patterns: tuple[str, ...]) -> None:
    """Write the checksums of the files in a folder that fit one of the patterns."""
    folder = Path(folder)
    found = sorted({path for pattern in patterns for path in folder.rglob(pattern)})
    sums = {path.relative_to(folder).as_posix(): checksum(path) for path in found}
    write_json(folder / CHECKSUMS, sums)


def damaged(folder: str | Path) -> str | None:
    """Name of a file that is not what it was when the folder was sealed, or None.

    A folder without checksums has none to differ from.
    """
    folder = Path(folder)
    try:
        for name, digest in read_json(folder / CHECKSUMS).items():
            if not (folder / name).is_file() or checksum(folder / name) != digest:
                return str(name)
    except FileNotFoundError:
        pass
    except ValueError:
        return CHECKSUMS
    return None
