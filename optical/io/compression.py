"""Open plain and compressed files; the first bytes decide, not the name."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import importlib
import io
import lzma
import zlib
from pathlib import Path
from typing import Any, BinaryIO

# First bytes -> suffix of the formats that are read.
_READ = {
    b"\x1f\x8b": "gz",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zst",
}
# First bytes -> name and remedy of the formats that are not.
_REFUSED = {
    b"PK\x03\x04": ("is a ZIP archive", "unpack it with `unzip`"),
    b"\x1f\x9d": ("is compressed by `compress`", "unpack it with `gzip -d`"),
    b"7z\xbc\xaf\x27\x1c": ("is a 7z archive", "unpack it with `7z x`"),
    b"\x04\x22\x4d\x18": ("is compressed by LZ4", "unpack it with `lz4 -d`"),
    b"Rar!\x1a\x07": ("is a RAR archive", "unpack it with `unrar x`"),
    b"PAR1": ("is a Parquet file", "convert it to JSON lines"),
    b"ARROW1": ("is an Arrow file", "convert it to JSON lines"),
    b"%PDF": ("is a PDF", "extract its text"),
    b"SQLite format 3": ("is a database", "export its rows as TAB-separated lines"),
    b"\xff\xfe\x00\x00": ("not UTF-8 but UTF-32", "convert it with `iconv -f UTF-32 -t UTF-8`"),
    b"\xff\xfe": ("not UTF-8 but UTF-16", "convert it with `iconv -f UTF-16 -t UTF-8`"),
    b"\xfe\xff": ("not UTF-8 but UTF-16", "convert it with `iconv -f UTF-16 -t UTF-8`"),
}
_LONGEST_MAGIC = max(map(len, (*_READ, *_REFUSED)))

# Suffixes of compressed files, which say nothing about the content.
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
# Errors of damaged data; ZstdError is added when that format is opened.
DAMAGED: list[type[Exception]] = [EOFError, OSError, zlib.error, lzma.LZMAError]


def open_binary(raw: Any, path: Path) -> tuple[Any, str]:
    """Return a stream of the uncompressed bytes of an open file, and its format.

    Args:
        raw: a buffered file at its start, which need not be seekable.
        path: its name for messages.

    Returns:
        The stream, and "gz", "bz2", "xz", "zst" or "" for a plain file.

    Raises:
        ValueError: the file is in another known format; the message names it and the remedy.
        ImportError: the file is in Zstandard, and no reader of it is installed.
    """
    start = raw.peek(_LONGEST_MAGIC)[:_LONGEST_MAGIC]
    _refuse_other_formats(start, path)
    kind = _kind(start)
    if not kind:
        return raw, ""
    opened: Any = {"gz": _open_gzip, "bz2": bz2.BZ2File, "xz": lzma.LZMAFile}.get(kind, _open_zstd)
    return opened(raw), kind


def check_text(start: bytes, path: Path) -> None:
    """Raise ValueError if the first line of a file, uncompressed, is not text."""
    _refuse_other_formats(start, path)


def compressing(raw: BinaryIO, path: Path) -> contextlib.AbstractContextManager[Any]:
    """Return a stream that compresses as the suffix of a name says, and writes to an open file."""
    suffix = path.suffix
    if suffix == ".gz":
        # The gzip header would otherwise hold the name of the file and the time.
        return gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0)
    if suffix == ".bz2":
        return bz2.BZ2File(raw, "wb")
    return lzma.LZMAFile(raw, "wb") if suffix == ".xz" else contextlib.nullcontext(raw)


def check_suffix(path: Path) -> None:
    """Raise ValueError if a name to write ends in a compression that is only read."""
    if path.suffix == ".zst":
        raise ValueError(f"{path}: .zst is not written; expected a name in .gz, .bz2 or .xz")


def _kind(start: bytes) -> str:
    return next((kind for magic, kind in _READ.items() if start.startswith(magic)), "")


def _refuse_other_formats(start: bytes, path: Path) -> None:
    for magic, (name, remedy) in _REFUSED.items():
        if start.startswith(magic):
            raise ValueError(f"{path}:1: {name}; {remedy}")


def _open_gzip(raw: BinaryIO) -> Any:
    return gzip.GzipFile(fileobj=raw)


def _open_zstd(raw: BinaryIO) -> Any:
    for module in ("compression.zstd", "backports.zstd", "pyzstd"):
        try:
            library = importlib.import_module(module)
        except ImportError:
            continue
        DAMAGED.append(library.ZstdError)
        return library.ZstdFile(raw)
    try:
        library = importlib.import_module("zstandard")
    except ImportError:
        raise ValueError(
            f"{getattr(raw, 'name', 'file')}: is compressed by Zstandard, which needs Python 3.14 "
            "or the package zstandard; unpack it with `zstd -d`"
        ) from None
    DAMAGED.append(library.ZstdError)
    reader = library.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
    return io.BufferedReader(reader)
