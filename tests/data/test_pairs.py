"""Bitext: every accepted format, datasets and streams, and one-line errors for malformed files."""

import gzip
import json
import logging
import os
from pathlib import Path

import pytest

from optical.data import formats
from optical.data import pairs as bitext
from optical.data.pairs import read_bitext, read_bitext_pairs, stream_bitext

PAIRS = [("cold water", "maji baridi"), ("life", "uhai"), ("the star's light", "पानी")]


def write(path, lines, encoding="utf-8"):
    data = "".join(f"{line}\n" for line in lines).encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def json_rows(*names):
    return [json.dumps(dict(zip(names, pair, strict=True)), ensure_ascii=False) for pair in PAIRS]


FORMATS = {
    "two columns": ("en-sw.tsv", ["\t".join(pair) for pair in PAIRS]),
    "three columns": ("en-sw.tsv", ["\t".join([*pair, "0.93"]) for pair in PAIRS]),
    "no ending": ("en-sw", ["\t".join(pair) for pair in PAIRS]),
    "Windows line ends": ("en-sw.tsv", ["\t".join(pair) + "\r" for pair in PAIRS]),
    "gzip": ("en-sw.tsv.gz", ["\t".join(pair) for pair in PAIRS]),
    "Sentence Transformers": ("train.jsonl", json_rows("english", "non_english")),
    "source and target": ("train.json", json_rows("source", "target")),
    "JSON in gzip": ("train.jsonl.gz", json_rows("source", "target")),
    "OPUS": (
        "train.jsonl",
        [json.dumps({"id": "1", "translation": {"en": a, "sw": b}}) for a, b in PAIRS],
    ),
    "OPUS, English last": (
        "train.jsonl",
        [json.dumps({"translation": {"sw": b, "en": a}}) for a, b in PAIRS],
    ),
    "blank lines": ("en-sw.tsv", ["", *("\t".join(pair) for pair in PAIRS), "  "]),
}


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_same_pairs(tmp_path, format):
    name, lines = FORMATS[format]
    assert read_bitext_pairs(write(tmp_path / name, lines)) == PAIRS


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_aligned_files_give_the_same_pairs(tmp_path, ending):
    paths = [
        write(tmp_path / f"corpus.{language}{ending}", side)
        for language, side in zip(("en", "sw"), zip(*PAIRS, strict=True), strict=True)
    ]
    assert read_bitext_pairs(",".join(map(str, paths))) == PAIRS


def test_the_name_of_a_single_file_may_contain_a_comma(tmp_path):
    assert read_bitext_pairs(write(tmp_path / "en,sw.tsv", FORMATS["two columns"][1])) == PAIRS


def test_empty_sides_and_duplicates_are_dropped_and_counted(tmp_path, caplog):
    lines = ["a\tb", " a \tb ", "\tb", "a\t", "a\tc", "a\tb"]
    with caplog.at_level(logging.INFO, "optical"):
        assert read_bitext_pairs(write(tmp_path / "x.tsv", lines)) == [("a", "b"), ("a", "c")]
    assert "2 pairs (dropped 2 with an empty side and 2 duplicates)" in caplog.text


def test_read_bitext_returns_a_dataset_for_the_trainer(tmp_path):
    pytest.importorskip("datasets")
    path = write(tmp_path / "x.tsv", FORMATS["two columns"][1])
    dataset = read_bitext(path, max_pairs=2)
    # The trainer assigns columns to models by their order.
    assert dataset.column_names == ["source", "target"]
    assert dataset.to_list() == [{"source": a, "target": b} for a, b in PAIRS[:2]]
    assert len(read_bitext(path)) == 3


MALFORMED = {
    "empty": ("x.tsv", [], r"x\.tsv: no sentence pair in 0 lines; expected"),
    "blank": ("x.tsv", ["", " "], r"x\.tsv: no sentence pair in 0 lines; expected"),
    "empty sides": ("x.tsv", ["a\t", "\tb"], r"x\.tsv: no sentence pair in 2 lines; expected"),
    "one column": ("x.tsv", ["a\tb", "a b"], r"x\.tsv:2: 1 column, expected 2 or more.*TAB"),
    "not JSON": ("x.jsonl", ['{"source": "a", "target": "b"}', "{"], r"x\.jsonl:2: not JSON"),
    "other keys": (
        "x.jsonl",
        ['{"text": "a"}'],
        r"x\.jsonl:1: keys \['text'\], expected source/target, english/non_english or translation",
    ),
    "a list": ("x.jsonl", ['["a", "b"]'], r"x\.jsonl:1: keys list, expected source/target"),
    "not text": ("x.jsonl", ['{"source": 1, "target": "b"}'], r"x\.jsonl:1: keys .*, expected"),
    "only a null": (
        "x.jsonl",
        ['{"translation": {"en": "a", "sw": null}}'],
        "no sentence pair in 1",
    ),
    "no dict": ("x.jsonl", ['{"translation": "a"}'], r"x\.jsonl:1: keys \['translation'\]"),
    "three languages": (
        "x.jsonl",
        ['{"translation": {"en": "a", "sw": "b", "so": "c"}}'],
        r"x\.jsonl:1: keys",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_errors_of_malformed_bitext_name_file_line_and_remedy(tmp_path, case):
    name, lines, message = MALFORMED[case]
    with pytest.raises(ValueError, match=message) as error:
        read_bitext_pairs(write(tmp_path / name, lines))
    assert "\n" not in str(error.value)


def test_invalid_utf8_and_damaged_gzip_are_refused(tmp_path):
    path = write(tmp_path / "x.tsv", ["a\tb", "a\tÄpfel"], encoding="latin-1")
    with pytest.raises(ValueError, match=r"x\.tsv:2: not UTF-8"):
        read_bitext_pairs(path)
    path = write(tmp_path / "x.tsv.gz", ["a\tb"] * 100)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"x\.tsv\.gz:\d+: damaged gzip"):
        read_bitext_pairs(path)


def test_inconsistent_aligned_files_are_refused(tmp_path):
    english, other = (write(tmp_path / f"c.{x}", ["a"] * n) for x, n in (("en", 3), ("sw", 2)))
    with pytest.raises(ValueError, match=r"c\.sw: 2 lines, but .*c\.en has 3; aligned files"):
        read_bitext_pairs(f"{english},{other}")
    with pytest.raises(ValueError, match="3 files, expected two"):
        read_bitext_pairs(f"{english},{other},{other}")
    with pytest.raises(FileNotFoundError, match=r"c\.so: no such file"):
        read_bitext_pairs(f"{english},{tmp_path / 'c.so'}")
    with pytest.raises(FileNotFoundError, match=r"nothing\.tsv: no such file"):
        read_bitext_pairs(tmp_path / "nothing.tsv")


@pytest.mark.skipif(not os.environ.get("OPTICAL_DATA"), reason="OPTICAL_DATA names no data pack")
def test_real_bitext_is_read():
    paths = sorted((Path(os.environ["OPTICAL_DATA"]) / "bitext").glob("*.train.tsv*"))
    assert paths
    for path in paths:
        pairs = read_bitext_pairs(path)
        assert pairs and all(english and other for english, other in pairs)


def test_a_stream_yields_every_pair_once_and_alternates_files(tmp_path):
    pytest.importorskip("datasets", reason="the extra `train` is not installed")
    for name, count in (("a", 40), ("b", 10)):
        lines = "".join(f"{name}{i}\t{name}{i} x\n" for i in range(count))
        (tmp_path / f"{name}.tsv").write_text(lines + " \tempty\n")
    paths = [tmp_path / "a.tsv", tmp_path / "b.tsv"]
    rows = list(stream_bitext(paths, seed=1, buffer=8))
    names = [row["source"] for row in rows]
    assert sorted(names) == sorted([*(f"a{i}" for i in range(40)), *(f"b{i}" for i in range(10))])
    assert all(row["target"] == row["source"] + " x" for row in rows)
    assert sum(name.startswith("b") for name in names[:24]) >= 6
    assert names == [row["source"] for row in stream_bitext(paths, seed=1, buffer=8)]
    assert names != [row["source"] for row in stream_bitext(paths, seed=2, buffer=8)]


def test_a_stream_reads_few_pairs_ahead(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="the extra `train` is not installed")
    (tmp_path / "a.tsv").write_text("".join(f"a{i}\tb{i}\n" for i in range(1000)))
    read = []
    lines = formats.read_lines

    def counted(path):
        for number, line in lines(path):
            read.append(number)
            yield number, line

    monkeypatch.setattr(formats, "read_lines", counted)
    stream = iter(bitext.stream_bitext([tmp_path / "a.tsv"], buffer=16))
    for _ in range(10):
        next(stream)
    assert 10 <= len(read) <= 40
