"""models.tokenizers."""

from __future__ import annotations

import collections
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from optical.data.lexicon import words

logger = logging.getLogger("optical")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_tokenizer(
    texts: Iterable[str], vocabulary_size: int, max_tokens: int, units: Iterable[str] = ()
) -> Any:
    """Learn a lower-casing WordPiece tokenizer; accents and vowel signs are kept.

    Equal texts give equal tokenizers, in every process: a training that is resumed finds the units
    that it began with. ``units`` stand beside those that it learns, as far as they can be met in a
    text: no capital letter, no special unit.
    """
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    texts = list(texts)
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters, inner = _alphabet(map(learner.normalizer.normalize_str, texts))
    learner.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(
            vocab_size=vocabulary_size,
            # The trainer numbers letters inside of words in the order of a randomly seeded hash
            # map, and breaks ties by these numbers, unless it is given them first.
            special_tokens=[*SPECIAL_TOKENS, *(f"##{letter}" for letter in inner)],
            initial_alphabet=letters,
            limit_alphabet=len(letters),
            show_progress=False,
        ),
    )
    # A tokenizer anew, in which those letters are units like all others.
    vocabulary = learner.get_vocab()
    for unit in units:
        word = unit.removeprefix("##")
        cut = learner.pre_tokenizer.pre_tokenize_str(learner.normalizer.normalize_str(word))
        if [piece for piece, _ in cut] == [word]:
            vocabulary.setdefault(unit, len(vocabulary))
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
        model_max_length=max(max_tokens, 512),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )


def _alphabet(texts: Iterable[str], limit: int = 1_000) -> tuple[list[str], list[str]]:
    """The most frequent letters, and those of them that stand inside of words; both in order."""
    words = collections.Counter(word for text in texts for word in text.split())
    count: collections.Counter[str] = collections.Counter()
    for word, times in words.items():
        for letter in word:
            count[letter] += times
    letters = sorted(sorted(count, key=lambda letter: (-count[letter], letter))[:limit])
    inner = {letter for word in words for letter in word[1:]}
    return letters, [letter for letter in letters if letter in inner]


def frequent_tokens(tokenizer: Any, texts: Sequence[str], count: int) -> list[str]:
    """The `count` most frequent tokens of `texts`, as the tokenizer spells them."""
    seen = token_counts(tokenizer, texts)
    # Equal counts in the order of the vocabulary, so that the list is the same everywhere.
    ordered = sorted(seen, key=lambda token: (-seen[token], token))
    return [str(token) for token in tokenizer.convert_ids_to_tokens(ordered[:count])]


def token_counts(
    tokenizer: Any, texts: Sequence[str], *, once: bool = False, special: bool = False
) -> collections.Counter[int]:
    """How often each token occurs in `texts`; `once`: in how many texts; `special` ones count."""
    seen: collections.Counter[int] = collections.Counter()
    for start in range(0, len(texts), 1000):
        part = list(texts[start : start + 1000])
        for ids in tokenizer(part, add_special_tokens=special, verbose=False)["input_ids"]:
            seen.update(set(ids) if once else ids)
    return seen


def fertility(tokenizer: Any, texts: Sequence[str]) -> dict[str, float]:
    """How a tokenizer cuts texts: ``tokens`` per word, and the share of ``unknown`` tokens."""
    counts = token_counts(tokenizer, texts)
    total = sum(counts.values())
    found = sum(len(words(text)) for text in texts)
    unknown = counts[tokenizer.unk_token_id] if tokenizer.unk_token_id is not None else 0
    return {"tokens": total / max(found, 1), "unknown": unknown / max(total, 1)}
