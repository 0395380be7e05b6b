"""Words that transport plans link, and how far they agree with a word table."""

import pytest

pytest.importorskip("sentence_transformers", reason="needs the extra `train`")

from optical.models.retriever import load_retriever
from optical.models.word_alignment import align, alignment_error_rate, word_links


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


def test_links_between_numbered_words():
    """A plan by hand: tokens of a word count together, tokens of no word count nothing."""
    import torch

    from optical.models.word_alignment import _begins, _named, _numbered, _word_mass

    assert _numbered("ab  c") == {0: 0, 1: 0, 4: 1}
    others = _named(_numbered("ab c"), [-1, 0, 1, 3])
    assert others == [None, 0, 0, 1]
    plan = torch.tensor([[0.9, 0.0], [0.2, 0.1], [0.2, 0.0], [0.0, 0.3]])
    mass, rows, columns = _word_mass(plan, others, [0, 1])
    assert rows == [None, 0, 1] and columns == [0, 1]
    torch.testing.assert_close(mass, torch.tensor([[0.9, 0.0], [0.4, 0.1], [0.0, 0.3]]))

    def read(text, **_):
        return {"input_ids": [7, 8], "offset_mapping": [(0, 2), (2, 4)]}

    # The second token's span has the space before its word.
    assert _begins(read, "ab c", [1, 7, 8, 2]) == [-1, 0, 3, -1]


def test_pharaoh_lines(world, tiny_models):
    from optical.data.pairs import read_pairs
    from optical.models.retriever import load_retriever
    from optical.models.word_alignment import align_words, pharaoh

    pairs = read_pairs(world / "bitext/en-sw.tsv")[:6]
    model = load_retriever(tiny_models.teacher)
    # English with itself: every word with itself, and nothing else.
    same = [(english, english) for english, _ in pairs] + [("", "")]
    for mutual in (False, True):
        found = list(align_words(model, model, same, mutual=mutual, batch_size=4))
        assert len(found) == 7 and found[-1] == []
        for links, (english, _) in zip(found[:-1], same, strict=False):
            ids = [(e, f) for e, f, _ in links]
            assert ids == sorted(ids) and all(0 < share <= 1 for _, _, share in links)
            words = english.split()
            assert len(words) == 5 and all(words[e] == words[f] for e, f in ids)
    assert pharaoh([(0, 1, 0.9), (1, 0, 0.7)]) == "0-1 1-0"
    loose, mutual = (
        [len(x) for x in align_words(model, model, pairs, mutual=m)] for m in (False, True)
    )
    assert all(a >= b for a, b in zip(loose, mutual, strict=True))
