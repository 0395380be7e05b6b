"""Files: text is UTF-8 or a one-line error, gzip is read everywhere, and writes never tear."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import socket
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

GZIP_MAGIC = b"\x1f\x8b"


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) of a UTF-8 text file, plain or gzip.

    The compression is recognised by the file's first bytes, not by its name. A byte-order mark is
    dropped.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not UTF-8, or its gzip data is damaged; the message names file and
            line.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "words.txt"
        >>> _ = path.write_text("habari\\nmaji\\n", encoding="utf-8")
        >>> list(read_lines(path))
        [(1, 'habari'), (2, 'maji')]
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a text file")
    number = 0
    with open(path, "rb") as raw:
        zipped = raw.peek(2)[:2] == GZIP_MAGIC
        stream = gzip.GzipFile(fileobj=raw) if zipped else raw
        try:
            for number, line in enumerate(stream, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}:{number}: not UTF-8 (byte {error.start} of the line); convert it with "
                f"`iconv -f LATIN1 -t UTF-8` or name the right file"
            ) from None
        except (EOFError, OSError, zlib.error) as error:
            if not zipped:
                raise
            raise ValueError(
                f"{path}:{number + 1}: damaged gzip data ({error}); fetch or write the file again"
            ) from None


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open ``path`` for writing bytes so that it appears whole or not at all.

    What is written goes into a file beside ``path``, which takes its name only when the block ends
    without an error: an interrupted program leaves an older file as it was, and never half a new
    one. Missing folders are made.

    Raises:
        OSError: the file cannot be written, on a full disk say; one line names it and says why.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as raw:
            yield raw
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        # Not even this may hide the error: under a file that stands for a folder it fails too.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and _concerns(error, path, temporary):
            why = error.strerror or str(error)
            raise OSError(f"{path} cannot be written ({why}); nothing there has changed") from error
        raise


def _concerns(error: OSError, path: Path, temporary: Path) -> bool:
    """Whether an error is about writing ``path``, not about a file that the block reads."""
    if error.filename is None or error.filename == str(temporary):
        return True
    return Path(error.filename) in path.parents


@contextlib.contextmanager
def atomic_text(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """Open ``path`` for writing text as :func:`atomic_file` does; ``.gz`` is compressed."""
    with atomic_file(path) as raw, contextlib.ExitStack() as stack:
        binary: Any = raw
        if Path(path).suffix == ".gz":
            # No name and no time inside, so that equal content gives equal bytes.
            packed = gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0)
            binary = stack.enter_context(packed)
        text = io.TextIOWrapper(binary, encoding="utf-8", newline="\n")
        yield text
        text.flush()
        text.detach()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file as a whole, as :func:`atomic_text` does."""
    with atomic_text(path) as file:
        file.write(text)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write plain data as JSON, as :func:`atomic_text` does."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file that this package wrote.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is damaged; the message names it and says what to do.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove it, and the same command makes it anew"
        ) from None


def writable_folder(path: str | Path) -> Path:
    """Return `path` as a folder that exists and can be written, made if it is not there.

    Raises:
        OSError: with one line that names the folder and what is in the way.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(
            f"output folder {path} cannot be written ({error.strerror}); choose another one"
        ) from None
    return path


# Holds the SHA-256 of the files beside it, and is written after them.
CHECKSUMS = "checksums.json"
# What libraries make of a full disk or quota: safetensors, numpy, and two of PyTorch's.
FULL = (
    *("No space left on device", "Disk quota exceeded", "File too large"),
    *(r"\d+ requested and \d+ written", r"unexpected pos \d+", "PytorchStreamWriter failed"),
)


@contextlib.contextmanager
def locked(folder: str | Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of an existing folder while the block runs.

    The lock ends with the process. On file systems without locks, there is none.

    Args:
        folder: the folder; the lock file inside it is removed at the end.
        wait: wait for another holder instead of raising, and exclude other threads of this process
            too.

    Raises:
        ValueError: another process holds the lock, and ``wait`` is False; the message names it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    # A child that outlives its killed parent would keep a flock, and lockf excludes no threads.
    lock, mode = (fcntl.flock, 0) if wait else (fcntl.lockf, fcntl.LOCK_NB)
    path = Path(folder) / ".lock"
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            lock(file, fcntl.LOCK_EX | mode)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(
                f"{folder}: {holder} is working in this folder; wait for it, or choose another one"
            ) from None
        except OSError:
            break
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        # The previous holder removed the file after it was opened here and before it was locked.
        file.close()
    try:
        # The name of the holder is best effort: on a full disk the lock still holds.
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
