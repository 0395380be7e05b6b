"""Text and JSON I/O: strict UTF-8, transparent compression, atomic writes, locks and checksums."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import socket
import stat
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from optical.io.compression import DAMAGED, check_suffix, check_text, compressing, open_binary
from optical.io.streams import descriptor, is_stream, writing_stream

# Name of the file with the SHA-256 of the files beside it, written after them.
CHECKSUMS = "checksums.json"
_SURROGATE = re.compile("[\ud800-\udfff]")
# Messages of a full disk or quota: of the system, safetensors, numpy and PyTorch.
DISK_FULL_PATTERNS = (
    *("No space left on device", "Disk quota exceeded", "File too large"),
    *(r"\d+ requested and \d+ written", r"unexpected pos \d+", "PytorchStreamWriter failed"),
)


# --- reading -------------------------------------------------------------------------------------


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) of a UTF-8 text file, plain or compressed.

    The file is read once from start to end, so it may be a pipe. Compression (gzip, bzip2, xz,
    Zstandard) is detected from the first bytes, not from the name. A byte-order mark at the start
    of any line, as from concatenated files, is dropped.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not UTF-8 text, is in another known format, or its compressed data
            is damaged; the message names file and line.

    Examples:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "words.txt"
        >>> _ = path.write_text("habari\\nmaji\\n", encoding="utf-8")
        >>> list(read_lines(path))
        [(1, 'habari'), (2, 'maji')]
    """
    path = check_readable(path)
    number = 0
    with open(path, "rb") as raw:
        stream, compression = open_binary(raw, path)
        try:
            for number, line in enumerate(stream, start=1):
                if number == 1 and compression:
                    check_text(line, path)
                text = line.decode("utf-8-sig")
                if "\0" in text:
                    raise ValueError(
                        f"{path}:{number}: holds NUL characters, so it is not UTF-8 text; convert "
                        "UTF-16 with `iconv -f UTF-16LE -t UTF-8`, or choose another file"
                    )
                yield number, text.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}:{number}: not UTF-8 (byte {error.start} of the line); convert it with "
                f"`iconv -f LATIN1 -t UTF-8` or choose another file"
            ) from None
        except tuple(DAMAGED) as error:
            if not compression:
                raise
            name = {"gz": "gzip"}.get(compression, compression)
            raise ValueError(
                f"{path}:{number + 1}: damaged {name} data ({error}); download or write the file "
                "again"
            ) from None


def check_readable(path: str | os.PathLike[str]) -> Path:
    """Return the path of an existing file, device or pipe that may be read.

    Raises:
        FileNotFoundError, PermissionError, ValueError: there is none; one line names the path.
    """
    path = Path(path)
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r}: a NUL character in the name of a file")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file{_link_target(path)}") from None
    except OSError as error:
        raise type(error)(f"{path}: cannot be read ({error.strerror})") from None
    if stat.S_ISDIR(mode):
        raise ValueError(f"{path}: is a folder, expected a text file")
    if stat.S_ISSOCK(mode):
        raise ValueError(f"{path}: is a socket, expected a text file")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{path}: no permission to read it")
    return path


def _link_target(path: Path) -> str:
    return f" (a link to {os.readlink(path)})" if path.is_symlink() else ""


def read_json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of the lines of a file that are not blank.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is not JSON, or holds half of a character; the message names file and
            line.
    """
    for number, line in read_lines(path):
        if line.strip():
            yield number, parse_json_line(line, f"{path}:{number}")


def parse_json_line(line: str, location: str) -> Any:
    """Return the value of a line; `location` names it in errors."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{location}: not JSON ({error.msg} at column {error.colno}); "
            "each line must hold one complete object"
        ) from None
    except (RecursionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{location}: not JSON that can be read ({reason})") from None
    # An escaped surrogate without its partner is legal JSON, but no text that can be written.
    if "\\u" in line and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError(
            f"{location}: half of a character (an escaped surrogate without its partner); cut "
            "texts between characters, or replace it"
        )
    return value


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
    a partial one. Missing folders are created. An older file keeps its permissions.

    A link is followed: the file it points to is replaced. Devices, pipes and the descriptors of
    this process, such as ``/dev/stdout``, are written to directly.

    Raises:
        OSError: the file cannot be written, for example on a full disk; one line names file and
            cause.
    """
    path = Path(path)
    if is_stream(path):
        with writing_stream(path) as raw:
            yield raw
        return
    target = _target(path)
    temporary = _temporary(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as raw:
            if target.exists():
                os.fchmod(raw.fileno(), stat.S_IMODE(target.stat().st_mode))
            yield raw
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        # Cleaning up must not hide the error; it fails too if a parent of the path is a file.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and _is_write_error(error, target, temporary):
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


def _temporary(path: Path) -> Path:
    # A long name leaves no room for more characters; file systems allow 255 bytes.
    name = path.name if len(os.fsencode(path.name)) < 220 else str(zlib.crc32(path.name.encode()))
    return path.with_name(f".{name}.{os.getpid()}.tmp")


def _target(path: Path) -> Path:
    """Return the file that a link points to, or the path itself.

    Raises:
        OSError: the path is empty, a folder or a circle of links.
    """
    try:
        folder = not path.name or path.is_dir()
    except OSError as error:  # such as a name that is too long
        raise OSError(f"{path} cannot be written ({error.strerror})") from None
    if folder:
        raise OSError(f"{path} cannot be written (Is a directory); expected the name of a file")
    if not path.is_symlink():
        return path
    try:
        return path.resolve(strict=path.exists())
    except (OSError, RuntimeError):
        raise OSError(f"{path} cannot be written (a circle of links)") from None


def writable_file(path: str | os.PathLike[str]) -> Path:
    """Return a path that :func:`atomic_file` can write; its missing folders are created.

    Raises:
        OSError: it cannot be written; one line names it and the cause.
    """
    path = Path(path)
    check_suffix(path)
    if "\0" in str(path):
        raise OSError(f"{str(path)!r} cannot be written (a NUL character in the name)")
    if not is_stream(path):
        target = _target(path)
        writable_folder(target.parent)
        path_to_check = target if target.exists() else target.parent
    elif descriptor(path) is not None:
        return path
    else:
        path_to_check = path
    if not os.access(path_to_check, os.W_OK):
        raise OSError(f"{path} cannot be written (Permission denied); choose another file")
    return path


@contextlib.contextmanager
def atomic_text(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """Open ``path`` for writing text as :func:`atomic_file` does.

    Names in ``.gz``, ``.bz2`` and ``.xz`` are compressed. Equal text gives equal compressed bytes.
    """
    with atomic_file(path) as raw, compressing(raw, Path(path)) as binary:
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
    # Safetensors writes files that other users cannot read, whatever the umask.
    mode = stat.S_IMODE((folder / CHECKSUMS).stat().st_mode)
    for path in paths:
        path.chmod(mode)


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
