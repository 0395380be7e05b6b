"""Text files: one-line errors for unreadable files, and atomic writes."""

import bz2
import gzip
import lzma
import os
import re
import stat
import subprocess
import sys
import threading

import pytest

from optical.io.files import (
    read_json_lines,
    read_lines,
    writable_file,
    writable_folder,
    write_text,
)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_lines_are_read_without_their_ends(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeffmaji\r\n\nuhai \u2028 anga\nmwisho".encode())
    assert list(read_lines(path)) == [(1, "maji"), (2, ""), (3, "uhai \u2028 anga"), (4, "mwisho")]


def test_an_empty_file_has_no_lines(tmp_path):
    (tmp_path / "empty").touch()
    assert list(read_lines(tmp_path / "empty")) == []


@pytest.mark.parametrize("name", ["words.gz", "words.txt"])
def test_gzip_is_detected_from_the_content(tmp_path, name):
    # Two gzip members, as from `cat a.gz b.gz`.
    data = gzip.compress(b"maji\n") + gzip.compress("पानी\n".encode())
    (tmp_path / name).write_bytes(data)
    assert list(read_lines(tmp_path / name)) == [(1, "maji"), (2, "पानी")]


def test_a_file_named_gz_may_be_plain_text(tmp_path):
    (tmp_path / "words.gz").write_text("maji\n")
    assert list(read_lines(tmp_path / "words.gz")) == [(1, "maji")]


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_errors_of_other_encodings_name_file_line_and_remedy(tmp_path, compress, encoding):
    path = tmp_path / "words.txt"
    line = {"latin-1": 2, "utf-16": 1}[encoding]
    path.write_bytes(compress("maji\nÄpfel\n".encode(encoding)))
    with pytest.raises(ValueError, match=rf"words\.txt:{line}: not UTF-8.*iconv") as error:
        list(read_lines(path))
    one_line(error)


@pytest.mark.parametrize("damage", ["cut", "flipped", "header", "tail"])
def test_errors_of_damaged_gzip_name_file_line_and_remedy(tmp_path, damage):
    path = tmp_path / "words.gz"
    lines = "".join(f"{i * 7919 % 1000003}\n" for i in range(2000))
    data = bytearray(gzip.compress(lines.encode()))
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[-8] ^= 0xFF  # the checksum
    elif damage == "header":
        data = data[:2]
    else:
        data += b"rest of another file"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"words\.gz:\d+: damaged gzip.*again") as error:
        list(read_lines(path))
    number = int(re.search(r"gz:(\d+)", one_line(error)).group(1))
    assert number <= 2001 and (number > 1) == (damage != "header")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt: no such file") as error:
        list(read_lines(tmp_path / "nothing.txt"))
    one_line(error)
    with pytest.raises(ValueError, match="is a folder, expected a text file") as error:
        list(read_lines(tmp_path))
    one_line(error)


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz"])
def test_text_is_read_back_as_written(tmp_path, name):
    path = tmp_path / name
    write_text(path, "old\n")
    write_text(path, "maji\nपानी\n")
    assert list(read_lines(path)) == [(1, "maji"), (2, "पानी")]
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == (path.suffix == ".gz")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == [name]


def test_equal_text_gives_equal_compressed_bytes(tmp_path, monkeypatch):
    written = []
    for moment in (1e9, 2e9):
        monkeypatch.setattr("time.time", lambda moment=moment: moment)
        write_text(tmp_path / "a.gz", "maji\n")
        written.append((tmp_path / "a.gz").read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupted_write_leaves_only_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "text.txt"
    write_text(path, "old\n")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new\n")
    assert path.read_text() == "old\n"
    assert os.listdir(tmp_path) == ["text.txt"]


def test_a_folder_is_created_with_its_parents(tmp_path):
    folder = writable_folder(tmp_path / "a" / "b")
    assert folder.is_dir() and not list(folder.iterdir())
    assert writable_folder(str(folder)) == folder


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "runs").touch()
    for folder in (tmp_path / "runs", tmp_path / "runs" / "deeper"):
        with pytest.raises(OSError, match=r"cannot be written .*; choose another one") as error:
            writable_folder(folder)
        assert str(folder) in one_line(error)


def test_a_folder_without_write_permission_is_refused(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    # Permission bits do not bind a privileged user.
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OSError, match=r"cannot be written \(Permission denied\)") as error:
        writable_folder(tmp_path)
    one_line(error)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compression_is_detected_from_the_content(tmp_path, compress):
    # Two members, as from concatenated files; the second starts with a byte-order mark.
    data = compress(b"maji\n") + compress("\ufeffपानी\n".encode())
    (tmp_path / "words").write_bytes(data)
    assert list(read_lines(tmp_path / "words")) == [(1, "maji"), (2, "पानी")]
    (tmp_path / "words").write_bytes(data[: len(data) // 3])
    with pytest.raises(ValueError, match=r"words:\d: damaged (gzip|bz2|xz) data"):
        list(read_lines(tmp_path / "words"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04...", "is a ZIP archive; unpack it with `unzip`"),
        (b"\x1f\x9d\x90", "is compressed by `compress`; unpack it with `gzip -d`"),
        (b"PAR1\x15\x04", "is a Parquet file; convert it to JSON lines"),
        ("a\tb\n".encode("utf-16"), "not UTF-8 but UTF-16; convert it with `iconv -f UTF-16"),
        ("a\tb\n".encode("utf-32"), "not UTF-8 but UTF-32; convert it with `iconv -f UTF-32"),
        ("a\tb\n".encode("utf-16-le"), "holds NUL characters.*UTF-16LE"),
        (gzip.compress(b"PK\x03\x04...", mtime=0), "is a ZIP archive"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path, data, message):
    (tmp_path / "words").write_bytes(data)
    with pytest.raises(ValueError, match=rf"words:1: {message}") as error:
        list(read_lines(tmp_path / "words"))
    one_line(error)


def test_zstandard_is_read_or_refused_by_name(tmp_path):
    (tmp_path / "a.zst").write_bytes(b"\x28\xb5\x2f\xfd\x04\x00\x29\x00\x00maji\n\x00\x00\x00\x00")
    with pytest.raises(ValueError, match=r"Zstandard.*`zstd -d`|damaged zst data"):
        list(read_lines(tmp_path / "a.zst"))
    with pytest.raises(ValueError, match=r"\.zst is not written; expected a name in \.gz"):
        writable_file(tmp_path / "b.zst")


@pytest.mark.parametrize(("suffix", "magic"), [(".bz2", b"BZh"), (".xz", b"\xfd7zXZ")])
def test_names_of_other_compressions_are_compressed(tmp_path, suffix, magic):
    path = tmp_path / f"text{suffix}"
    write_text(path, "maji\n")
    assert path.read_bytes().startswith(magic) and list(read_lines(path)) == [(1, "maji")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": "\\ud83d"}', "half of a character"),
        ('{"a": 1', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("1" * 5000, "not JSON"),
    ],
)
def test_json_lines_that_are_no_text_are_refused(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(f'{{"a": "\\ud83d\\ude00"}}\n\n{line}\n')
    rows = read_json_lines(tmp_path / "a.jsonl")
    assert next(rows) == (1, {"a": "\U0001f600"})
    with pytest.raises(ValueError, match=rf"a\.jsonl:3: .*{message}") as error:
        next(rows)
    one_line(error)


# --- devices, pipes and links --------------------------------------------------------------------


def test_a_link_is_followed_and_an_older_file_keeps_its_mode(tmp_path):
    real, link = tmp_path / "deep" / "real.txt", tmp_path / "link.txt"
    real.parent.mkdir()
    link.symlink_to(real)
    for text in ("new\n", "newer\n"):  # the first one through a dangling link
        write_text(writable_file(link), text)
        assert link.is_symlink() and real.read_text() == text
        real.chmod(0o600)
    assert stat.S_IMODE(real.stat().st_mode) == 0o600
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(OSError, match="circle cannot be written"):
        write_text(tmp_path / "circle", "x")
    with pytest.raises(OSError, match="circle: cannot be read"):
        list(read_lines(tmp_path / "circle"))


def test_a_pipe_is_written_and_read_and_stays_a_pipe(tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.extend(read_lines(pipe)))
    reader.start()
    write_text(writable_file(pipe), "maji\nuhai\n")
    reader.join()
    assert found == [(1, "maji"), (2, "uhai")]
    assert stat.S_ISFIFO(pipe.stat().st_mode) and os.listdir(tmp_path) == ["pipe"]


def test_devices_are_never_replaced(monkeypatch):
    monkeypatch.setattr(os, "replace", None)
    write_text(writable_file("/dev/null"), "maji\n")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OSError, match=r"^/dev/full cannot be written \(No space left"):
        write_text(writable_file("/dev/full"), "maji\n")


def test_standard_output_is_appended_to(tmp_path):
    code = (
        "from optical.io.files import write_text\n"
        "print('first')\nwrite_text('/dev/stdout', 'second\\n')\nprint('third')\n"
    )
    with (tmp_path / "out").open("w") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
    assert (tmp_path / "out").read_text() == "first\nsecond\nthird\n"


def test_names_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("", ".", str(tmp_path), f"{tmp_path}/a\0b", "x" * 300):
        with pytest.raises(OSError, match="cannot be written") as error:
            writable_file(name)
        one_line(error)
    write_text(writable_file("x" * 250), "maji\n")
    assert os.listdir(tmp_path) == ["x" * 250]
