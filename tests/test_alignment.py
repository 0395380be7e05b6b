"""Words that transport plans link, and how far they agree with a word table."""

import pytest

pytest.importorskip("sentence_transformers", reason="needs the extra `train`")

from optical.alignment import align, alignment_error_rate, word_links
from optical.encoder import load_retriever


@pytest.fixture(scope="module")
def teacher(tiny_models):
    return load_retriever(tiny_models.teacher)


def test_equal_sentences_link_equal_words(teacher):
    pairs = [("the teacher buys the bread", "the teacher buys the bread"), ("the lamp", "the lamp")]
    for role in ("document", "query"):
        first, second = word_links(teacher, teacher, pairs, role=role, epsilon=0.005)
        assert set(first) == {(word, word) for word in ("the", "teacher", "buys", "bread")}
        assert set(second) == {("the", "the"), ("lamp", "lamp")}
        assert all(0 < share <= 1 + 1e-5 for share in first.values())


def test_links_are_those_of_the_plan(tiny_models, teacher):
    """Sums of the plan of `align` over the tokens of the words, where each word is one token."""
    student = load_retriever(tiny_models.mixed, dimension=16)
    english, other = "the teacher buys bread", "mwalimu ananunua mkate"
    (found,) = word_links(student, teacher, [(english, other)], max_iter=200)
    aligned = align(student, teacher, other, english)
    if any(token.startswith("##") for token in aligned["other_tokens"]):
        pytest.fail("the words of this test are units of the tokenizer")
    for i, word in enumerate(aligned["other_tokens"]):
        masses = dict(zip(aligned["english_tokens"], aligned["plan"][i], strict=True))
        best = max(masses, key=masses.get)
        if word.startswith("["):
            assert not [link for link in found if link[1] == word]
        elif not best.startswith("["):
            share = masses[best] / sum(masses.values())
            assert found[best, word] == pytest.approx(share, abs=1e-4)


def test_words_of_several_tokens_are_whole(teacher):
    # Words that the tokenizer does not know are cut into units, or unknown as a whole.
    (found,) = word_links(teacher, teacher, [("teacherlamp, bread!", "teacherlamp, bread!")])
    assert {word for link in found for word in link} <= {"teacherlamp", "bread"}


LEXICON = {"red": ["Rot"], "book": ["Buch", "Heft"], "sea": ["Meer"]}


@pytest.mark.parametrize(
    ("links", "expected"),
    [
        ([("red", "rot"), ("book", "buch")], 0.0),
        ([("book", "rot"), ("red", "buch")], 1.0),
        ([("red", "rot"), ("red", "buch")], 0.5),
        # A link that is missing: 1 - 2 * 1 / (1 + 2).
        ([("red", "rot")], pytest.approx(1 / 3)),
        # What the table does not know counts nothing.
        ([("red", "rot"), ("book", "buch"), ("the", "das")], 0.0),
    ],
)
def test_alignment_error_rate(links, expected):
    pairs = [("The red book", "Das rot Buch")]
    found = [dict.fromkeys(links, 1.0)]
    assert alignment_error_rate(found, pairs, LEXICON) == (expected, 2)


def test_no_rate_without_a_known_word():
    assert alignment_error_rate([{}], [("sky", "himmel")], LEXICON) == (None, 0)
