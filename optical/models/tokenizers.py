"""Tokenizers learnt from text, extended tokenizers, and token statistics of any tokenizer."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable, Sequence
from typing import Any

from optical.data.lexicon import tokenize_words

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_tokenizer(
    texts: Iterable[str],
    vocabulary_size: int,
    max_tokens: int,
    extra_tokens: Iterable[str] = (),
    padding_id: int = 0,
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
        padding_id: id of the padding token. Some architectures number positions from it.

    Returns:
        A ``transformers.PreTrainedTokenizerFast``.

    Raises:
        ValueError: the vocabulary has no such id.
    """
    vocabulary, learner = _learn_vocabulary(list(texts), vocabulary_size)
    for token in extra_tokens:
        word = token.removeprefix("##")
        pieces = learner.pre_tokenizer.pre_tokenize_str(learner.normalizer.normalize_str(word))
        if [piece for piece, _ in pieces] == [word]:
            vocabulary.setdefault(token, len(vocabulary))
    _swap_padding(vocabulary, padding_id)
    return _word_piece_tokenizer(vocabulary, learner, max(max_tokens, 512))


def _swap_padding(vocabulary: dict[str, int], padding_id: int) -> None:
    """Give the padding token an id, and its own id to the token that had that id."""
    if not padding_id < len(vocabulary):
        raise ValueError(
            f"vocabulary_size: {len(vocabulary)} units, and the padding token of the model has the "
            f"id {padding_id}, which it must keep; expected a larger vocabulary"
        )
    padding = SPECIAL_TOKENS[0]
    for token, index in vocabulary.items():
        if index == padding_id:
            vocabulary[token], vocabulary[padding] = vocabulary[padding], padding_id
            return


def extend_tokenizer(tokenizer: Any, texts: Iterable[str], units: int) -> Any:
    """Add units of other languages to a Unigram or BPE tokenizer; its own units keep their ids.

    The new units are learnt from texts after the normalisation and splitting of the tokenizer. A
    Unigram tokenizer gets them with their log-probabilities, a BPE tokenizer after its own merges.

    Args:
        tokenizer: a fast Transformers tokenizer.
        texts: texts of the other languages.
        units: units to learn, those that the tokenizer has already included.

    Returns:
        A ``transformers.PreTrainedTokenizerFast`` with the special tokens and the template of the
        tokenizer.

    Raises:
        ValueError: the tokenizer is neither a Unigram nor a BPE.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    kind = model_kind(tokenizer)
    if kind not in _EXTENSIONS:
        raise ValueError(
            f"keep: the retriever's tokenizer is a {kind}, expected WordPiece, Unigram or BPE"
        )
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules |= {"truncation": None, "padding": None}
    untrained, extend = _EXTENSIONS[kind]
    model = {**rules["model"], **untrained}
    bare: dict[str, Any] = {"added_tokens": [], "post_processor": None, "model": model}
    learnt = Tokenizer.from_str(json.dumps({**rules, **bare}))
    learnt.train_from_iterator(texts, _trainer(kind, units, rules))
    _inline_added_tokens(rules)
    extend(rules["model"], json.loads(learnt.to_str())["model"])
    special = {
        name: str(token)
        for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str)
    }
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(json.dumps(rules)),
        model_max_length=tokenizer.model_max_length,
        model_input_names=list(tokenizer.model_input_names),
        **special,
    )


def model_kind(tokenizer: Any) -> str:
    """Return the kind of a tokenizer's model: "WordPiece", "BPE", "Unigram" or another name."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return type(tokenizer).__name__ if backend is None else type(backend.model).__name__


def _trainer(kind: str, units: int, rules: dict[str, Any]) -> Any:
    from tokenizers import pre_tokenizers, trainers

    if kind == "Unigram":
        return trainers.UnigramTrainer(
            vocab_size=units, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        )
    # The unit of each byte, for tokenizers that split text into bytes.
    bytes_only = '"ByteLevel"' in json.dumps([rules["pre_tokenizer"], rules["normalizer"]])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if bytes_only else []
    return trainers.BpeTrainer(vocab_size=units, initial_alphabet=alphabet, show_progress=False)


def _inline_added_tokens(rules: dict[str, Any]) -> None:
    """Give every added token an entry in the model, so that new units do not shift its id."""
    model = rules["model"]
    listed = model["vocab"]
    known = dict(listed) if isinstance(listed, dict) else {t: i for i, (t, _) in enumerate(listed)}
    added = {token["id"]: token["content"] for token in rules["added_tokens"]}
    last = max([*known.values(), *added])
    lowest = None if isinstance(listed, dict) else min((score for _, score in listed), default=0.0)
    ids = set(known.values())
    for index in range(last + 1):
        if index in ids:
            continue
        # Ids without a token get one that no text contains.
        content = added.get(index, f"<unused {index}>")
        if isinstance(listed, dict):
            listed[content] = index
        else:
            listed.append([content, lowest])


def _extend_unigram(model: dict[str, Any], learnt: dict[str, Any]) -> None:
    known = {piece for piece, _ in model["vocab"]} | {"<unk>"}
    # The learner sums in the order of a randomly seeded hash map; rounding makes it deterministic.
    new = [(round(score, 6), piece) for piece, score in learnt["vocab"] if piece not in known]
    model["vocab"] += [[piece, score] for score, piece in sorted(new, key=lambda e: (-e[0], e[1]))]


def _extend_bpe(model: dict[str, Any], learnt: dict[str, Any]) -> None:
    vocabulary = model["vocab"]
    for token in sorted(learnt["vocab"], key=learnt["vocab"].__getitem__):
        vocabulary.setdefault(token, len(vocabulary))
    merges = [_merge(entry) for entry in model["merges"]]
    known = set(map(tuple, merges))
    model["merges"] = merges + [
        merge for merge in map(_merge, learnt["merges"]) if tuple(merge) not in known
    ]


def _merge(entry: Any) -> list[str]:
    """Return a merge as two tokens; older files join them by a space."""
    return entry.split(" ") if isinstance(entry, str) else list(entry)


# Kind of model -> what of it is learnt, emptied, and the function that adds what was learnt.
_EXTENSIONS: dict[str, tuple[dict[str, Any], Any]] = {
    "Unigram": ({"vocab": [["<unk>", 0.0]], "unk_id": 0}, _extend_unigram),
    "BPE": ({"vocab": {}, "merges": [], "unk_token": None}, _extend_bpe),
}


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


def token_spans(
    tokenizer: Any, text: str, *, special_tokens: bool = False
) -> list[tuple[int, tuple[int, int] | None]]:
    """Return the id of each token of a text and its span of characters.

    Args:
        tokenizer: a fast Transformers tokenizer.
        text: the text.
        special_tokens: include the special tokens that the tokenizer adds; their span is None.

    Raises:
        ValueError: the tokenizer does not record spans, as those written in Python.
    """
    options = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    try:
        encoding = tokenizer(text, add_special_tokens=special_tokens, verbose=False, **options)
        spans = encoding["offset_mapping"]
    except (KeyError, NotImplementedError):
        raise ValueError(
            f"the tokenizer, a {type(tokenizer).__name__}, records no positions in the text; "
            "words and passages need a model with a fast tokenizer"
        ) from None
    ids = encoding["input_ids"]
    special = encoding["special_tokens_mask"] if special_tokens else [0] * len(ids)
    return [
        (token_id, None if is_special else tuple(span))
        for token_id, span, is_special in zip(ids, spans, special, strict=True)
    ]
