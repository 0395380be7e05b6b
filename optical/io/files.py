"""Text and JSON I/O: strict UTF-8, transparent gzip, atomic writes, locks and checksums."""

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
# Name of the file with the SHA-256 of the files beside it, written after them.
CHECKSUMS = "checksums.json"
# Messages of a full disk or quota: of the system, safetensors, numpy and PyTorch.
DISK_FULL_PATTERNS = (
    *("No space left on device", "Disk quota exceeded", "File too large"),
    *(r"\d+ requested and \d+ written", r"unexpected pos \d+", "PytorchStreamWriter failed"),
)


# --- reading -------------------------------------------------------------------------------------


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) of a UTF-8 text file, plain or gzip.

    Compression is detected from the first bytes, not from the name. A byte-order mark is dropped.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not UTF-8, or its gzip data is damaged; the message names file and
            line.

    Examples:
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
        compressed = raw.peek(2)[:2] == GZIP_MAGIC
        stream = gzip.GzipFile(fileobj=raw) if compressed else raw
        try:
            for number, line in enumerate(stream, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}:{number}: not UTF-8 (byte {error.start} of the line); convert it with "
                f"`iconv -f LATIN1 -t UTF-8` or choose another file"
            ) from None
        except (EOFError, OSError, zlib.error) as error:
            if not compressed:
                raise
            raise ValueError(
                f"{path}:{number + 1}: damaged gzip data ({error}); download or write the file "
                "again"
            ) from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file that this package wrote.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged; the message names it and the remedy.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove it, and the same command creates it again"
        ) from None


# --- atomic writing ------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open ``path`` for writing bytes that appear at once when the block ends, or not at all.

    The block writes a temporary file in the same folder, which is renamed to ``path`` if the block
    ends without an error. An interrupted program therefore leaves an older file unchanged and never
    a partial one. Missing folders are created.

    Raises:
        OSError: the file cannot be written, for example on a full disk; one line names file and
            cause.
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
        # Cleaning up must not hide the error; it fails too if a parent of the path is a file.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and _is_write_error(error, path, temporary):
            cause = error.strerror or str(error)
            raise OSError(
                f"{path} cannot be written ({cause}); nothing there has changed"
            ) from error
        raise


def _is_write_error(error: OSError, path: Path, temporary: Path) -> bool:
    """Return whether an error concerns writing ``path``, not a file that the block reads."""
    if error.filename is None or error.filename == str(temporary):
        return True
    return Path(error.filename) in path.parents


@contextlib.contextmanager
def atomic_text(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """Open ``path`` for writing text as :func:`atomic_file` does; names in ``.gz`` are compressed.

    Equal text gives equal compressed bytes.
    """
    with atomic_file(path) as raw, contextlib.ExitStack() as stack:
        binary: Any = raw
        if Path(path).suffix == ".gz":
            # The gzip header would otherwise hold the name of the file and the time.
            packed = gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0)
            binary = stack.enter_context(packed)
        text = io.TextIOWrapper(binary, encoding="utf-8", newline="\n")
        yield text
        text.flush()
        text.detach()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically, as :func:`atomic_text` does."""
    with atomic_text(path) as file:
        file.write(text)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write plain data as JSON, as :func:`atomic_text` does."""
    write_text(path, json.dumps(value, indent=1) + "\n")


# --- output folders ------------------------------------------------------------------------------


def writable_folder(path: str | Path) -> Path:
    """Return `path` as a writable folder, creating it if necessary.

    Raises:
        OSError: the folder cannot be created or written; one line names it and the cause.
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


@contextlib.contextmanager
def folder_lock(folder: str | Path, *, wait: bool = False, name: str = ".lock") -> Iterator[None]:
    """Hold the lock of an existing folder while the block runs.

    The lock ends with the process. On file systems without locks, there is none.

    Args:
        folder: the folder; the lock file inside it is removed at the end.
        wait: wait for another holder instead of raising, and exclude other threads of this process
            too.
        name: name of the lock file, for locks of parts of the folder.

    Raises:
        ValueError: another process holds the lock, and ``wait`` is False; the message names it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    # A child that outlives its killed parent would keep a flock; lockf does not exclude threads.
    lock, mode = (fcntl.flock, 0) if wait else (fcntl.lockf, fcntl.LOCK_NB)
    path = Path(folder) / name
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
def disk_full_errors(folder: str | Path) -> Iterator[None]:
    """Convert the errors that libraries raise on a full disk into a one-line OSError.

    Raises:
        OSError: the disk was full; the message names the folder and the remedy.
    """
    try:
        yield
    except Exception as error:
        if not any(re.search(pattern, str(error)) for pattern in DISK_FULL_PATTERNS):
            raise
        cause = str(error).splitlines()[0]
        raise OSError(
            f"{folder}: no room to write ({cause}); free some space and continue: finished work "
            "is kept"
        ) from error


# --- checksums -----------------------------------------------------------------------------------


def checksum(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_checksums(folder: str | Path, patterns: tuple[str, ...]) -> None:
    """Write ``checksums.json`` for the files below a folder that match one of the patterns."""
    folder = Path(folder)
    paths = sorted({path for pattern in patterns for path in folder.rglob(pattern)})
    sums = {path.relative_to(folder).as_posix(): checksum(path) for path in paths}
    write_json(folder / CHECKSUMS, sums)


def find_damaged(folder: str | Path) -> str | None:
    """Return the name of a file that does not match the folder's checksums, or None.

    A folder without checksums counts as undamaged.
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
