"""Vocabulary transfer: extend an English retriever to other languages without training.

The layers of the encoder stay unchanged. A new vocabulary is learnt from text of all languages. The
input vector of each unit starts as a mean of the English retriever's input vectors, with their mean
length:

by spelling    the units into which the English tokenizer splits the letters of the new unit;
by bitext      the English units of the same sentence pairs, weighted by their probabilities under
               IBM model 1 (trans-tokenization: Remy et al., arXiv 2408.04303).

Both sources are weighted by how often they observe the unit: in English text, or in the foreign
sentences of the pairs. A multilingual retriever has vectors of its own for units of other
languages, which a prior weight keeps. Such a student still needs vocabulary training but keeps the
teacher's encoder.
"""

from __future__ import annotations

import collections
import copy
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from optical.data.ibm_model_1 import ibm_model_1
from optical.data.pairs import balance_bitexts, read_bitext_pairs
from optical.data.texts import read_sentences
from optical.models.fingerprint import fingerprints, partners, set_partners
from optical.models.retriever import load_retriever
from optical.models.tokenizers import (
    SPECIAL_TOKENS,
    extend_tokenizer,
    model_kind,
    token_counts,
    train_tokenizer,
)
from optical.training.options import TransferOptions

logger = logging.getLogger("optical")

# Iterations of IBM model 1.
ITERATIONS = 6
# IBM model 1 ignores word order; below this probability its links are noise.
LEAST_PROBABILITY = 0.02
# WordPiece prefix of a unit inside a word.
CONTINUATION = "##"
# Attributes of tokenizers and configurations that hold the ids of special tokens.
SPECIAL_IDS = [f"{token.strip('[]').lower()}_token_id" for token in SPECIAL_TOKENS]
# Tokens in the place of [CLS] and [SEP], as of T5.
_SUBSTITUTES = {"cls_token_id": "bos_token_id", "sep_token_id": "eos_token_id"}


def transfer(options: TransferOptions) -> Any:
    """Give a retriever a vocabulary of the languages of the texts.

    Args:
        options: the retriever, texts and sentence pairs. Pairs contribute units and input vectors;
            files in ``text`` contribute units only.

    Returns:
        The retriever with the new tokenizer and input vectors, for ``optical.training.save``.

    Raises:
        FileNotFoundError, ValueError: no such model or file, or a file without text or pairs.
    """
    options.validate()
    model = load_retriever(options.model)
    set_partners(model, [*fingerprints(model).values(), *partners(model)])
    reader = model[0]
    old, encoder = reader.tokenizer, reader.auto_model
    bitext = [read_bitext_pairs(path)[: options.max_pairs] for path in options.bitext]
    texts = [text for path in options.text for text in read_sentences(path)]
    english = [source for pairs in bitext for source, _ in pairs]
    new = _train_vocabulary(options, old, texts, bitext, _padding_of_positions(encoder))
    # The length limit is a property of the encoder's positions.
    new.model_max_length = old.model_max_length
    vectors = encoder.get_input_embeddings().weight.detach().float().cpu()
    means = _Means(len(new), vectors)
    for pairs in bitext if options.initialize_from == "bitext" else ():
        means.add_pairs(_token_ids(pairs, new, old))
    paired = int((means.weights > 0).sum())
    means.add_spelling(new, old, token_counts(new, english or texts), options.prior)
    new_vectors = means.means()
    for name in SPECIAL_IDS:
        special_id = _special_id(old, name)
        if special_id is not None and getattr(new, name) is not None:
            new_vectors[getattr(new, name)] = vectors[special_id]
    _replace_vocabulary(reader, new, new_vectors)
    logger.info("transfer: %d units, %d of them from pairs", len(new), paired)
    return model


def _padding_of_positions(encoder: Any) -> int:
    """Return the padding id from which an encoder numbers positions, as RoBERTa and MPNet do.

    Other encoders accept any id; theirs is 0.
    """
    for name, module in encoder.named_modules():
        padding: int | None = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return padding
    return 0


def _train_vocabulary(
    options: TransferOptions,
    old: Any,
    texts: list[str],
    bitext: list[list[tuple[str, str]]],
    padding_id: int,
) -> Any:
    """Learn the new tokenizer; with the option `keep` it contains the units of the old one."""
    pairs = itertools.chain.from_iterable(balance_bitexts(bitext) if options.balance else bitext)
    if options.keep and not options.vocabulary_size:
        return copy.deepcopy(old)
    # English needs no new units if the old ones are kept.
    sentences = (pair[1:] if options.keep else pair for pair in pairs)
    read = itertools.chain(texts, itertools.chain.from_iterable(sentences))
    if options.keep and model_kind(old) != "WordPiece":
        return extend_tokenizer(old, read, options.vocabulary_size)
    return train_tokenizer(
        read,
        options.vocabulary_size,
        old.model_max_length,
        _units(old) if options.keep else (),
        padding_id=padding_id,
    )


def _units(tokenizer: Any) -> list[str]:
    """Return the units of a tokenizer in the order of their ids, which the new ids follow."""
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _special_id(tokenizer: Any, name: str) -> int | None:
    """Return the id of a special token, or of the one with its place in the template."""
    found: int | None = getattr(tokenizer, name)
    if found is None and name in _SUBSTITUTES:
        found = getattr(tokenizer, _SUBSTITUTES[name])
    return found


class _Means:
    """Weighted means of English input vectors, one for each unit of the new vocabulary.

    Directions and lengths are averaged separately. The mean of several vectors is short, and
    position embeddings would dominate it where the two are added.
    """

    def __init__(self, size: int, vectors: Tensor) -> None:
        # The last column holds the lengths.
        self.vectors = torch.cat([vectors, vectors.norm(dim=1, keepdim=True)], dim=1)
        self.sums = torch.zeros(size, self.vectors.shape[1])
        self.weights = torch.zeros(size)

    def add_pairs(self, pairs: Iterable[tuple[list[int], list[int]]]) -> None:
        """Add the English units that explain each unit of the other language under IBM model 1."""
        count: collections.Counter[int] = collections.Counter()

        def counted() -> Iterator[tuple[list[int], list[int]]]:
            for other, english in pairs:
                count.update(other)
                yield other, english

        links = ibm_model_1(counted(), iterations=ITERATIONS, least_probability=LEAST_PROBABILITY)
        # Some links at a time: each of them takes a vector.
        for start in range(0, len(links), 4096):
            columns = zip(*links[start : start + 4096], strict=True)
            unit, counterpart, share = (torch.tensor(column) for column in columns)
            weight = share * torch.tensor([float(count[index]) for index in unit.tolist()])
            self.sums.index_add_(0, unit, weight[:, None] * self.vectors[counterpart])
            self.weights.index_add_(0, unit, weight)

    def add_spelling(
        self, new: Any, old: Any, count: collections.Counter[int], prior: float
    ) -> None:
        """Add the English units that spell a new unit, weighted by its count in English text.

        Units without any vector so far are always spelt. A unit of the old vocabulary spells
        itself, with the weight `prior` at least.
        """
        old_vocabulary = old.get_vocab()
        for text, unit in new.get_vocab().items():
            own = prior if text in old_vocabulary else 0.0
            if not count[unit] and not own and self.weights[unit]:
                continue
            pieces = _spelling(text, new, old, old_vocabulary)
            if pieces:
                weight = float(max(count[unit], own or 1.0))
                self.sums[unit] += weight * self.vectors[pieces].mean(0)
                self.weights[unit] += weight

    def means(self) -> Tensor:
        """Return the vectors; a unit without any source gets the mean of all English vectors."""
        means = self.sums / self.weights.clamp(min=1e-30)[:, None]
        means = torch.where(self.weights[:, None] > 0, means, self.vectors.mean(0))
        return torch.nn.functional.normalize(means[:, :-1]) * means[:, -1:]


def _spelling(text: str, new: Any, old: Any, old_vocabulary: dict[str, int]) -> list[int]:
    """Return the ids of the English units that spell a new unit; empty if letters are unknown."""
    if text in old_vocabulary:
        return [old_vocabulary[text]]
    if model_kind(new) == model_kind(old) != "WordPiece":
        # The old model reads the units of an extended tokenizer, with their marks of spaces.
        return _model_pieces(text, old)
    letters = text.removeprefix(CONTINUATION)
    pieces: list[int] = old(letters, add_special_tokens=False)["input_ids"]
    if old.unk_token_id in pieces:
        return []
    if letters != text and pieces:
        # Inside a word the first piece is another unit, if the vocabulary has it.
        first = CONTINUATION + str(old.convert_ids_to_tokens(pieces[0]))
        pieces = [old_vocabulary.get(first, pieces[0]), *pieces[1:]]
    return pieces


def _model_pieces(text: str, old: Any) -> list[int]:
    """Return the ids into which the model of a tokenizer splits a unit, without preparation."""
    pieces = [token.id for token in old.backend_tokenizer.model.tokenize(text)]
    return [] if old.unk_token_id in pieces else pieces


def _token_ids(
    pairs: Sequence[tuple[str, str]], new: Any, old: Any
) -> Iterator[tuple[list[int], list[int]]]:
    """Tokenise the foreign sentences with the new tokenizer and the English ones with the old."""
    plain = {"add_special_tokens": False, "verbose": False}
    for start in range(0, len(pairs), 1024):
        english, other = map(list, zip(*pairs[start : start + 1024], strict=True))
        yield from zip(
            new(other, **plain)["input_ids"], old(english, **plain)["input_ids"], strict=True
        )


def _replace_vocabulary(reader: Any, tokenizer: Any, vectors: Tensor) -> None:
    """Replace the tokenizer and the input vectors of a retriever."""
    encoder = reader.auto_model
    before = encoder.get_input_embeddings()
    after = torch.nn.Embedding(len(vectors), vectors.shape[1], tokenizer.pad_token_id)
    after.weight = torch.nn.Parameter(vectors.to(before.weight))
    encoder.set_input_embeddings(after)
    encoder.config.vocab_size = len(tokenizer)
    for name in SPECIAL_IDS:
        if hasattr(encoder.config, name) and getattr(tokenizer, name) is not None:
            setattr(encoder.config, name, getattr(tokenizer, name))
    for name, substitute in _SUBSTITUTES.items():
        if getattr(encoder.config, substitute, None) is not None:
            special_id = getattr(tokenizer, substitute)
            setattr(
                encoder.config,
                substitute,
                getattr(tokenizer, name) if special_id is None else special_id,
            )
    reader.processor = tokenizer
