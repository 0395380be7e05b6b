"""WordPiece tokenizers learnt from text, and token statistics of any tokenizer."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import Any

from optical.data.lexicon import tokenize_words

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_tokenizer(
    texts: Iterable[str],
    vocabulary_size: int,
    max_tokens: int,
    extra_tokens: Iterable[str] = (),
) -> Any:
    """Learn a lower-casing WordPiece tokenizer that keeps accents and vowel signs.

    Equal texts give equal tokenizers in every process, so that a resumed training finds the
    vocabulary it started with.

    Args:
        texts: training texts.
        vocabulary_size: tokens to learn, special tokens included.
        max_tokens: length limit of the model; the tokenizer's limit is at least 512.
        extra_tokens: tokens to add to the learnt ones. Tokens that cannot occur in a normalised
            text, such as special tokens and those with capital letters, are left out.

    Returns:
        A ``transformers.PreTrainedTokenizerFast``.
    """
    vocabulary, learner = _learn_vocabulary(list(texts), vocabulary_size)
    for token in extra_tokens:
        word = token.removeprefix("##")
        pieces = learner.pre_tokenizer.pre_tokenize_str(learner.normalizer.normalize_str(word))
        if [piece for piece, _ in pieces] == [word]:
            vocabulary.setdefault(token, len(vocabulary))
    return _word_piece_tokenizer(vocabulary, learner, max(max_tokens, 512))


def _learn_vocabulary(texts: list[str], size: int) -> tuple[dict[str, int], Any]:
    """Return a WordPiece vocabulary and a tokenizer with the normaliser and pre-tokenizer used."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters, inner_letters = _alphabet(map(learner.normalizer.normalize_str, texts))
    learner.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(
            vocab_size=size,
            # The trainer numbers word-internal letters in the order of a randomly seeded hash map
            # and breaks ties by these numbers. Listing the letters first makes it deterministic.
            special_tokens=[*SPECIAL_TOKENS, *(f"##{letter}" for letter in inner_letters)],
            initial_alphabet=letters,
            limit_alphabet=len(letters),
            show_progress=False,
        ),
    )
    return learner.get_vocab(), learner


def _word_piece_tokenizer(vocabulary: dict[str, int], learner: Any, max_length: int) -> Any:
    """Build a tokenizer in which word-internal letters are ordinary, not special, tokens."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = learner.normalizer
    tokenizer.pre_tokenizer = learner.pre_tokenizer
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )


def _alphabet(texts: Iterable[str], limit: int = 1_000) -> tuple[list[str], list[str]]:
    """Return the most frequent letters, and those that occur inside words, both sorted."""
    words = collections.Counter(word for text in texts for word in text.split())
    counts: collections.Counter[str] = collections.Counter()
    for word, occurrences in words.items():
        for letter in word:
            counts[letter] += occurrences
    letters = sorted(sorted(counts, key=lambda letter: (-counts[letter], letter))[:limit])
    inner = {letter for word in words for letter in word[1:]}
    return letters, [letter for letter in letters if letter in inner]


def frequent_tokens(tokenizer: Any, texts: Sequence[str], count: int) -> list[str]:
    """Return the `count` most frequent tokens of `texts`; ties are in vocabulary order."""
    counts = token_counts(tokenizer, texts)
    ordered = sorted(counts, key=lambda token: (-counts[token], token))
    return [str(token) for token in tokenizer.convert_ids_to_tokens(ordered[:count])]


def token_counts(
    tokenizer: Any, texts: Sequence[str], *, per_text: bool = False, special_tokens: bool = False
) -> collections.Counter[int]:
    """Count token ids.

    Args:
        tokenizer: a Transformers tokenizer.
        texts: any number of texts.
        per_text: count the texts that contain a token (document frequency), not its occurrences.
        special_tokens: count the special tokens that the tokenizer adds to each text.
    """
    counts: collections.Counter[int] = collections.Counter()
    for start in range(0, len(texts), 1000):
        batch = list(texts[start : start + 1000])
        encoded = tokenizer(batch, add_special_tokens=special_tokens, verbose=False)
        for ids in encoded["input_ids"]:
            counts.update(set(ids) if per_text else ids)
    return counts


def fertility(tokenizer: Any, texts: Sequence[str]) -> dict[str, float]:
    """Return ``tokens``, the mean tokens per word, and ``unknown``, the unknown tokens' share."""
    counts = token_counts(tokenizer, texts)
    total = sum(counts.values())
    words = sum(len(tokenize_words(text)) for text in texts)
    unknown = counts[tokenizer.unk_token_id] if tokenizer.unk_token_id is not None else 0
    return {"tokens": total / max(words, 1), "unknown": unknown / max(total, 1)}
