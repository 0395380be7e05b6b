"""Text files: one-line errors for unreadable files, and atomic writes."""

import gzip
import os
import re
import stat

import pytest

from optical.io.files import read_lines, writable_folder, write_text


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
