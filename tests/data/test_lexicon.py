"""Lexicons: word tokenization, induction, files, inversion and translation."""

import random
import subprocess
import sys
from unittest import mock

import pytest

from optical.data.ibm_model_1 import ibm_model_1
from optical.data.lexicon import (
    induce_lexicon,
    invert_lexicon,
    lexicon_from_links,
    read_lexicon,
    share_unseen,
    tokenize_words,
    translate,
    write_lexicon,
)
from optical.io.progress import Progress

PAIRS = [
    ("the red book", "kitabu chekundu"),
    ("the book", "kitabu"),
    ("the red cup", "kikombe chekundu"),
    ("the cup", "kikombe"),
    ("red water", "maji chekundu"),
    ("the water", "maji"),
]


def test_words_include_combining_marks():
    assert tokenize_words("Maji, 42% ya-moto!") == ["maji", "42", "ya", "moto"]
    # Vowel signs are combining marks, not letters.
    assert tokenize_words("हिन्दी किताब") == ["हिन्दी", "किताब"]
    assert tokenize_words("İstanbul") == [*tokenize_words("i̇stanbul")]
    assert tokenize_words(" ... ") == []


def test_ibm_model_1_finds_the_translations():
    entries = {(e, f): p for e, f, p in induce_lexicon(PAIRS, least_count=1)}
    best = {
        word: max((p, f) for (e, f), p in entries.items() if e == word)[1]
        for word in ("red", "book", "cup", "water")
    }
    assert best == {"red": "chekundu", "book": "kitabu", "cup": "kikombe", "water": "maji"}
    assert all(0.3 <= p <= 1 for p in entries.values())


def by_hand(pairs, iterations):
    """Textbook IBM model 1, with dictionaries and loops."""
    table = {}
    split = [(["", *tokenize_words(e)], tokenize_words(f)) for e, f in pairs]
    for e, f in split:
        for x in e:
            for y in f:
                table[x, y] = 1.0
    for _ in range(iterations):
        counts, totals = {}, {}
        for e, f in split:
            for y in f:
                norm = sum(table[x, y] for x in e)
                for x in e:
                    share = table[x, y] / norm
                    counts[x, y] = counts.get((x, y), 0.0) + share
                    totals[x] = totals.get(x, 0.0) + share
        table = {key: count / totals[key[0]] for key, count in counts.items()}
    return table


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_ibm_model_1_matches_the_textbook_implementation(iterations):
    draw = random.Random(3)
    pairs = [
        (
            " ".join(draw.choices("abcdef", k=draw.randint(1, 5))),
            " ".join(draw.choices("uvwxyz", k=draw.randint(1, 5))),
        )
        for _ in range(20)
    ]
    expected = {key: p for key, p in by_hand(pairs, iterations).items() if key[0]}
    entries = induce_lexicon(pairs, iterations=iterations, least_probability=0.0, least_count=0)
    assert {(e, f): pytest.approx(p, rel=1e-4) for e, f, p in entries} == expected


def test_rare_words_and_improbable_pairs_are_left_out():
    assert {e for e, _, _ in induce_lexicon(PAIRS, least_count=3)} <= {"the", "red"}
    assert induce_lexicon(PAIRS, least_count=1, least_probability=1.1) == []
    with pytest.raises(ValueError, match="no sentence pair with words on both sides"):
        induce_lexicon([("...", "kitabu")])


def test_a_lexicon_is_read_back_as_written(tmp_path):
    path = tmp_path / "table.tsv"
    write_lexicon([("b", "x", 0.4), ("a", "y", 0.5), ("b", "z", 0.6)], path)
    assert path.read_text() == "a\ty\t0.500\nb\tz\t0.600\nb\tx\t0.400\n"
    assert read_lexicon(path) == {"a": ["y"], "b": ["z", "x"]}
    with pytest.raises(
        ValueError, match="no pair of words is probable enough for a lexicon; lower"
    ):
        write_lexicon([], tmp_path / "empty.tsv")
    assert not (tmp_path / "empty.tsv").exists()


def test_translation_with_a_lexicon_and_its_inverse():
    lexicon = {"red": ["Rot", "Röte"], "book": ["Buch"]}
    assert translate("The red Book!", lexicon) == "the Rot Buch"
    assert translate("red", lexicon, senses=2) == "Rot Röte"
    assert translate("Das rot buch", invert_lexicon(lexicon)) == "das red book"


def test_a_lexicon_from_links_holds_shares_of_their_weights():
    links = [("a", "x", 2.0), ("a", "y", 1.0), ("a", "x", 1.0), ("b", "x", 2.0)]
    assert lexicon_from_links(links) == [("a", "x", 0.75)]
    assert lexicon_from_links(links, least_probability=0.2, least_count=1) == [
        ("a", "x", 0.75),
        ("a", "y", 0.25),
        ("b", "x", 1.0),
    ]


def random_pairs(count, words=400, length=8):
    draw = random.Random(1)
    # Frequent words are drawn more often, as in text.
    names, weights = [f"w{i}" for i in range(words)], [1 / (i + 1) for i in range(words)]
    sides = [draw.choices(names, weights, k=length) for _ in range(2 * count)]
    return [(" ".join(e), " ".join(f)) for e, f in zip(sides[::2], sides[1::2], strict=True)]


def test_the_division_into_blocks_does_not_change_the_result():
    pairs = [(e.split(), f.split()) for e, f in random_pairs(300)]
    limits = {"iterations": 4, "least_probability": 0.05, "least_count": 2}
    whole = sorted(ibm_model_1(pairs, **limits))
    assert len(whole) > 100
    for block_size in (1, 500):
        divided = sorted(ibm_model_1(pairs, **limits, block_size=block_size))
        assert [entry[:2] for entry in divided] == [entry[:2] for entry in whole]
        assert [entry[2] for entry in divided] == pytest.approx([entry[2] for entry in whole])


PEAK = """
import random, resource, sys
from optical.cli.main import main
code = main(["lexicon", sys.argv[1], "--output", sys.argv[2], "--least-probability", "0.1"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


def peak_megabytes(tmp_path, count):
    file = tmp_path / f"{count}.tsv"
    file.write_text("".join(f"{e}\t{f}\n" for e, f in random_pairs(count)))
    command = [sys.executable, "-c", PEAK, str(file), str(tmp_path / "lexicon.tsv")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1]) / 1024


@pytest.mark.skipif(sys.platform == "darwin", reason="ru_maxrss has another unit on macOS")
def test_memory_does_not_grow_with_the_number_of_pairs(tmp_path):
    # 18,000 pairs more. They took 200 MB when all candidates were in memory.
    growth = peak_megabytes(tmp_path, 20_000) - peak_megabytes(tmp_path, 2_000)
    assert growth < 60


def test_progress_is_logged_at_intervals(caplog):
    now = iter(range(0, 1000, 15))
    with (
        mock.patch("optical.io.progress.time.monotonic", lambda: next(now)),
        caplog.at_level("INFO", logger="optical"),
    ):
        progress = Progress("count", 100, "pairs")
        for _ in range(4):
            progress.add(25)
    assert caplog.messages == ["count: 50 of 100 pairs, 30 s left"]


def test_share_of_unseen_running_words():
    # "Moto" is known in another case, "zuri" occurs twice and is not known.
    assert share_unseen(["Maji zuri", "MOTO zuri."], ["maji, moto"]) == 0.5
    assert share_unseen([], ["maji"]) == 0.0
    assert share_unseen(["maji"], []) == 1.0
