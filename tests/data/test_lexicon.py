"""Lexicons: word tokenization, induction, files, inversion and translation."""

import random

import pytest

from optical.data.lexicon import (
    induce_lexicon,
    invert_lexicon,
    lexicon_from_links,
    read_lexicon,
    tokenize_words,
    translate,
    write_lexicon,
)

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
