"""Text files: UTF-8 or a one-line error, gzip read everywhere, writes that never tear."""

from __future__ import annotations

import gzip
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

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


def write_text(path: str | Path, text: str) -> None:
    """Write a text file as a whole: a reader meets the old content or the new, never a part.

    A name that ends in ``.gz`` is compressed (without a time stamp, so equal content gives equal
    bytes). Raises OSError when the folder cannot be written.
    """
    path = Path(path)
    data = text.encode("utf-8")
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes private files; results are meant to be read by others.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
