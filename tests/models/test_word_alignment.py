"""Word links from transport plans, their formats, and the alignment error rate."""

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the extra `train`")

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from optical.data.pairs import read_bitext_pairs
from optical.models.encoding import encode
from optical.models.retriever import load_retriever
from optical.models.tokenizers import token_spans
from optical.models.word_alignment import (
    _token_starts,
    _word_indices_by_position,
    _word_mass,
    _words_of_tokens,
    align_tokens,
    align_words,
    alignment_error_rate,
    format_pharaoh,
    word_links,
)


@pytest.fixture(scope="module")
def teacher(tiny_models):
    return load_retriever(tiny_models.teacher)


@pytest.mark.parametrize("epsilon", [1e-300, 1e-10])
def test_an_epsilon_beyond_float32_is_refused(teacher, epsilon):
    """The plan is NaN, or holds a mass of thousands, and no link of it means anything."""
    pairs = [("the teacher buys the bread", "the lamp carries a fish")]
    with pytest.raises(ValueError, match=r"epsilon: 1e-\d+, which is beyond the precision"):
        list(align_words(teacher, teacher, pairs, epsilon=epsilon))
    with pytest.raises(ValueError, match=r"epsilon: 1e-\d+, which is beyond the precision"):
        align_tokens(teacher, teacher, *pairs[0], epsilon=epsilon)


def test_identical_sentences_link_identical_words(teacher):
    pairs = [("the teacher buys the bread", "the teacher buys the bread"), ("the lamp", "the lamp")]
    for role in ("document", "query"):
        first, second = word_links(teacher, teacher, pairs, role=role, epsilon=0.005)
        assert set(first) == {(word, word) for word in ("the", "teacher", "buys", "bread")}
        assert set(second) == {("the", "the"), ("lamp", "lamp")}
        assert all(0 < share <= 1 + 1e-5 for share in first.values())


def test_links_are_the_strongest_entries_of_the_plan(tiny_models, teacher):
    """Compare with the plan of `align_tokens` for words of one token each."""
    student = load_retriever(tiny_models.mixed, dimension=16)
    english, other = "the teacher buys bread", "mwalimu ananunua mkate"
    (found,) = word_links(student, teacher, [(english, other)], max_iter=200)
    aligned = align_tokens(student, teacher, other, english)
    if any(token.startswith("##") for token in aligned["other_tokens"]):
        pytest.fail("each word of this test must be one token")
    for i, word in enumerate(aligned["other_tokens"]):
        masses = dict(zip(aligned["english_tokens"], aligned["plan"][i], strict=True))
        best = max(masses, key=masses.get)
        if word.startswith("["):
            assert not [link for link in found if link[1] == word]
        elif not best.startswith("["):
            share = masses[best] / sum(masses.values())
            assert found[best, word] == pytest.approx(share, abs=1e-4)


def test_the_tokens_of_a_word_form_one_link(teacher):
    # The tokenizer splits unfamiliar words into subwords or maps them to [UNK].
    (found,) = word_links(teacher, teacher, [("teacherlamp, bread!", "teacherlamp, bread!")])
    assert {word for link in found for word in link} <= {"teacherlamp", "bread"}


LEXICON = {"red": ["Rot"], "book": ["Buch", "Heft"], "sea": ["Meer"]}


@pytest.mark.parametrize(
    ("links", "expected"),
    [
        ([("red", "rot"), ("book", "buch")], 0.0),
        ([("book", "rot"), ("red", "buch")], 1.0),
        ([("red", "rot"), ("red", "buch")], 0.5),
        # One link is missing: 1 - 2 * 1 / (1 + 2).
        ([("red", "rot")], pytest.approx(1 / 3)),
        # Words outside the lexicon are ignored.
        ([("red", "rot"), ("book", "buch"), ("the", "das")], 0.0),
    ],
)
def test_alignment_error_rate(links, expected):
    pairs = [("The red book", "Das rot Buch")]
    found = [dict.fromkeys(links, 1.0)]
    assert alignment_error_rate(found, pairs, LEXICON) == (expected, 2)


def test_the_error_rate_is_undefined_without_a_lexicon_word():
    assert alignment_error_rate([{}], [("sky", "himmel")], LEXICON) == (None, 0)


def test_the_mass_of_tokens_is_summed_over_words():
    """A plan by hand: masses of a word's tokens add up, tokens outside words stay separate."""
    assert _word_indices_by_position("ab  c") == {0: 0, 1: 0, 4: 1}
    others = _words_of_tokens(_word_indices_by_position("ab c"), [-1, 0, 1, 3])
    assert others == [None, 0, 0, 1]
    plan = torch.tensor([[0.9, 0.0], [0.2, 0.1], [0.2, 0.0], [0.0, 0.3]])
    mass, rows, columns = _word_mass(plan, others, [0, 1])
    assert rows == [None, 0, 1] and columns == [0, 1]
    torch.testing.assert_close(mass, torch.tensor([[0.9, 0.0], [0.4, 0.1], [0.0, 0.3]]))

    def read(text, **_):
        return {
            "input_ids": [1, 7, 8, 2],
            "offset_mapping": [(0, 0), (0, 2), (2, 4), (0, 0)],
            "special_tokens_mask": [1, 0, 0, 1],
        }

    # The second token's span includes the space before its word.
    assert _token_starts(read, "ab c", [1, 7, 8, 2]) == [-1, 0, 3, -1]


def test_links_by_word_index_and_their_pharaoh_format(world, tiny_models):
    pairs = read_bitext_pairs(world / "bitext/en-sw.tsv")[:6]
    model = load_retriever(tiny_models.teacher)
    # English aligned with itself links every word to itself only.
    same = [(english, english) for english, _ in pairs] + [("", "")]
    for mutual in (False, True):
        found = list(align_words(model, model, same, mutual=mutual, batch_size=4))
        assert len(found) == 7 and found[-1] == []
        for links, (english, _) in zip(found[:-1], same, strict=False):
            ids = [(e, f) for e, f, _ in links]
            assert ids == sorted(ids) and all(0 < share <= 1 for _, _, share in links)
            words = english.split()
            assert len(words) == 5 and all(words[e] == words[f] for e, f in ids)
    assert format_pharaoh([(0, 1, 0.9), (1, 0, 0.7)]) == "0-1 1-0"
    loose, mutual = (
        [len(x) for x in align_words(model, model, pairs, mutual=m)] for m in (False, True)
    )
    assert all(a >= b for a, b in zip(loose, mutual, strict=True))


def make_lookup(folder, learn, texts):
    """Return a retriever whose token vectors depend on the token alone."""
    backend = Tokenizer(models.Unigram() if learn == "unigram" else models.BPE())
    if learn == "unigram":
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>")
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=alphabet, special_tokens=SPECIAL
        )
    backend.train_from_iterator(texts, trainer)
    if learn == "trimmed":
        backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    else:
        template = [("<s>", 0), ("</s>", 2)]
        backend.post_processor = processors.TemplateProcessing("<s> $A </s>", None, template)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", model_max_length=64
    )
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=64, **sizes)
    torch.manual_seed(1)
    encoder = transformers.BertModel(config)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "position" in name or "token_type" in name or "output.dense" in name:
                parameter.zero_()
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_retriever(folder)


SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
# English, other language, links checked by hand.
CHECKED = [
    ("water bread book table", "water bread book table", "0-0 1-1 2-2 3-3"),
    ("water bread book", "book water bread", "0-1 1-2 2-0"),
    ("naïve café 😀 x", "x 😀 café naïve", "0-3 1-2 2-1 3-0"),
    ("  7 book", "book 7 ", "0-1 1-0"),
]


@pytest.mark.parametrize("prompt", ["", "book: ", "query:", "😀 "])
@pytest.mark.parametrize("learn", ["unigram", "byte level", "trimmed"])
def test_links_of_any_tokenizer_and_prompt_equal_a_checked_list(learn, prompt, world, tmp_path):
    texts = (world / "text/en.txt").read_text(encoding="utf-8").splitlines()
    # Words that were never seen are cut into pieces, of which one is a lone mark of a space.
    model = make_lookup(tmp_path, learn, [*texts, "naïve café 😀 x 7 table query: passage"])
    assert any(token in ("▁", "Ġ") for token in model.tokenizer.tokenize("naïve 😀 table"))
    model.prompts["document"] = prompt
    for text, _, _ in CHECKED:
        # Every token of a text belongs to a word, a lone mark to the word after it.
        (ids,) = encode(model, [text], "document", token_ids=True).split_token_ids()
        starts = [
            start for start in _token_starts(model.tokenizer, text, ids, prompt) if start >= 0
        ]
        assert None not in _words_of_tokens(_word_indices_by_position(text), starts)
    pairs = [(english, other) for english, other, _ in CHECKED]
    found = list(align_words(model, model, pairs, epsilon=0.01, max_iter=500))
    assert [format_pharaoh(links) for links in found] == [links for _, _, links in CHECKED]


def test_a_tokenizer_without_positions_is_refused():
    class ByteTokenizer:
        def __call__(self, text, **options):
            return {"input_ids": list(text.encode())}

    with pytest.raises(ValueError, match="a ByteTokenizer, records no positions in the text"):
        token_spans(ByteTokenizer(), "the child")
