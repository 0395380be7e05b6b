"""Code switching: seed and key determine the draws, and only lexicon words are replaced."""

import gzip

import pytest

from optical.data.lexicon import CodeSwitcher, read_lexicon

SW = {
    "water": ["maji"],
    "life": ["uhai"],
    "is": ["ni"],
    "don't": ["usi"],
    "well-known": ["maarufu"],
}
DE = {"water": ["Wasser"], "life": ["Leben"], "is": ["ist"]}
TEXT = "Water is life, and life is water; without water no life is."
GOLDEN = [
    "Water ni life, and life is water; without Wasser no uhai ist.",
    "Water ist life, and Leben is maji; without water no uhai is.",
    "Wasser ni life, and life ni Wasser; without water no Leben ist.",
]


def test_golden_outputs():
    # Recorded in another process: output must not depend on hash seeds, versions or machines.
    switch = CodeSwitcher({"sw": SW, "de": DE}, probability=0.5, seed=13)
    assert [switch(TEXT, key) for key in (0, 1, "0:7:query")] == GOLDEN


def test_probability_zero_and_one():
    assert CodeSwitcher({"sw": SW}, probability=0.0)(TEXT, 1) == TEXT
    assert CodeSwitcher({"sw": SW}, probability=1.0)(TEXT, 1) == (
        "maji ni uhai, and uhai ni maji; without maji no uhai ni."
    )


def test_output_depends_on_seed_and_key_but_not_on_order():
    switch = CodeSwitcher({"sw": SW}, probability=0.5, seed=1)
    texts = [TEXT] * 20
    first = [switch(text, key) for key, text in enumerate(texts)]
    again = [switch(text, key) for key, text in reversed(list(enumerate(texts)))]
    assert first == again[::-1]
    assert len(set(first)) > 10
    other = CodeSwitcher({"sw": SW}, probability=0.5, seed=2)
    assert [other(text, key) for key, text in enumerate(texts)] != first


def test_the_share_of_replaced_words_equals_the_probability():
    switch = CodeSwitcher({"sw": SW}, probability=0.3)
    words = switch(" ".join(["water"] * 5000), 0).split()
    assert words.count("maji") / len(words) == pytest.approx(0.3, abs=0.03)
    # Words outside the lexicon are kept, so the overall share is lower.
    words = switch(" ".join(["water", "unknown"] * 2500), 0).split()
    assert words.count("maji") / len(words) == pytest.approx(0.15, abs=0.03)


def test_the_language_is_drawn_for_each_word():
    switch = CodeSwitcher({"sw": SW, "de": DE}, probability=1.0)
    words = switch(" ".join(["water"] * 400), 0).split()
    assert words.count("maji") + words.count("Wasser") == 400
    assert 140 < words.count("maji") < 260
    # The order of the languages does not matter.
    assert CodeSwitcher({"de": DE, "sw": SW}, probability=1.0)(TEXT, 3) == switch(TEXT, 3)


def test_all_translations_of_a_word_are_used():
    switch = CodeSwitcher({"sw": {"rice": ["wali", "mchele"]}}, probability=1.0)
    assert set(switch(" ".join(["rice"] * 50), 0).split()) == {"wali", "mchele"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("WATER Water water", "maji maji maji"),
        ("don't; Don't", "usi; usi"),
        ("well-known water-life", "maarufu water-life"),
        ("underwater waters", "underwater waters"),
        ("water's 'water' \u2018water\u2019", "water's 'maji' \u2018maji\u2019"),
        ("H2water 3 water_life\tno\nlife\n", "H2maji 3 maji_uhai\tno\nuhai\n"),
        ("", ""),
        ("पानी, Ärzte", "पानी, Ärzte"),
    ],
)
def test_word_boundaries(text, expected):
    assert CodeSwitcher({"sw": SW}, probability=1.0)(text, 0) == expected


def test_coverage():
    switch = CodeSwitcher({"sw": {"water": ["maji"]}, "de": {"life": ["Leben"]}})
    assert switch.coverage(["Water is LIFE", "no water"]) == pytest.approx(3 / 5)
    assert switch.coverage([]) == switch.coverage(["12 %"]) == 0.0


@pytest.mark.parametrize("probability", [-0.1, 1.5, float("nan")])
def test_a_probability_outside_0_to_1_is_refused(probability):
    with pytest.raises(ValueError, match=r"probability: .*, expected a number from 0 to 1"):
        CodeSwitcher({"sw": SW}, probability=probability)


def test_an_empty_set_of_lexicons_is_refused():
    with pytest.raises(ValueError, match="lexicons: none given"):
        CodeSwitcher({})


def test_reads_a_lexicon(tmp_path):
    path = tmp_path / "en-sw.tsv"
    text = "Water\tmaji\n\nrice\twali\t0.9\nrice\tmchele\nrice\twali\n mother tongue \t lugha \n"
    path.write_text(text, encoding="utf-8")
    expected = {"water": ["maji"], "rice": ["wali", "mchele"], "mother tongue": ["lugha"]}
    assert read_lexicon(path) == expected
    path.write_bytes(gzip.compress(text.encode()))
    assert read_lexicon(path) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"en-sw\.tsv: an empty lexicon; expected lines"),
        (b"water\tmaji\nlife uhai\n", r"en-sw\.tsv:2: expected .*found 'life uhai'"),
        (b"water\t\n", r"en-sw\.tsv:1: expected `English TAB foreign`"),
        (b"\tmaji\n", r"en-sw\.tsv:1: expected `English TAB foreign`"),
        ("water\tWäßrig\n".encode("latin-1"), r"en-sw\.tsv:1: not UTF-8"),
    ],
)
def test_errors_of_a_malformed_lexicon_name_file_and_line(tmp_path, data, message):
    path = tmp_path / "en-sw.tsv"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_lexicon(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "water maji\nlife uhai\nwater mvua\n",
        "water   maji \nlife uhai\nwater mvua\n",
        "english\tswahili\nwater\tmaji\nlife\tuhai\t0.5\nwater\tmvua\n",
        "\ufeffsource target\nwater maji\nlife uhai\nwater mvua\n",
    ],
    ids=["spaces", "several spaces", "header", "header of words"],
)
def test_reads_the_dictionaries_of_muse_and_skips_headers(tmp_path, text):
    (tmp_path / "en-sw.txt").write_text(text)
    expected = {"water": ["maji", "mvua"], "life": ["uhai"]}
    assert read_lexicon(tmp_path / "en-sw.txt") == expected


def test_three_words_without_a_tab_are_refused(tmp_path):
    (tmp_path / "en-sw.txt").write_text("water maji\nmother tongue lugha\n")
    with pytest.raises(ValueError, match=r"en-sw\.txt:2: expected `English TAB foreign`"):
        read_lexicon(tmp_path / "en-sw.txt")
