"""Vocabulary transfer: an English retriever that reads other languages' units, without training.

The layers stay as they are. A new vocabulary is learnt from text of all languages, and each of its
units starts as a mean of the English retriever's own input vectors, as long as they are:

by spelling    of the units into which the English tokenizer cuts its letters;
by bitext      of the English units that stand in the same sentence pairs, by their probabilities
               under IBM model 1 (trans-tokenization: Remy et al., arXiv 2408.04303).

What both say of a unit counts by how often it was met, in English text or in the foreign side of a
pair. A student that starts here has words to learn, and no language model.
"""

from __future__ import annotations

import collections
import itertools
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from optical.data.lexicon import ibm_model_1
from optical.data.pairs import balance_bitexts, read_bitext_pairs
from optical.data.texts import read_sentences
from optical.models.retriever import load_retriever
from optical.models.tokenizers import SPECIAL_TOKENS, token_counts, train_tokenizer
from optical.training.options import TransferOptions
from optical.training.runner import Finished

logger = logging.getLogger("optical")

ITERATIONS = 6
# Unlikelier counterparts are noise of a model that knows no order.
LEAST_PROBABILITY = 0.02
CONTINUED = "##"
# What tokenizers and configurations call the numbers of special units.
SPECIAL_IDS = [f"{token.strip('[]').lower()}_token_id" for token in SPECIAL_TOKENS]


def transfer(options: TransferOptions, args: Any) -> Finished:
    """Give a retriever a vocabulary of the texts' languages.

    Args:
        options: the retriever, texts and sentence pairs. Pairs give the units of both sides their
            vectors; a file in ``text`` gives units alone.
        args: training arguments, of which only the folder to write to is read.

    Returns:
        What ``training.run`` saves: the retriever with new tokenizer and input vectors.

    Raises:
        FileNotFoundError, ValueError: no such model or file, or a file without text or pairs.
    """
    options.validate()
    model = load_retriever(options.model)
    reader = model[0]
    old, encoder = reader.tokenizer, reader.auto_model
    bitext = [read_bitext_pairs(path)[: options.max_pairs] for path in options.bitext]
    texts = [text for path in options.text for text in read_sentences(path)]
    english = [one for pairs in bitext for one, _ in pairs]
    files = balance_bitexts(bitext) if options.balance else bitext
    pairs_read = itertools.chain.from_iterable(files)
    # English needs no new units where the old ones stay.
    read = (pair[1:] if options.keep else pair for pair in pairs_read)
    new = train_tokenizer(
        itertools.chain(texts, itertools.chain.from_iterable(read)),
        options.vocabulary_size,
        old.model_max_length,
        _word_pieces(old) if options.keep else (),
    )
    vectors = encoder.get_input_embeddings().weight.detach().float().cpu()
    found = _Means(len(new), vectors)
    for pairs in bitext if options.vectors == "bitext" else ():
        found.add_pairs(*_units(pairs, new, old))
    paired = int((found.weights > 0).sum())
    found.add_spelling(new, old, token_counts(new, english or texts))
    learnt = found.means()
    for name in SPECIAL_IDS:
        known = getattr(old, name)
        if known is not None:
            learnt[getattr(new, name)] = vectors[known]
    _replace(reader, new, learnt)
    logger.info("transfer: %d units, %d of them from pairs", len(new), paired)
    return Finished(model, args)


def _word_pieces(tokenizer: Any) -> list[str]:
    """A tokenizer's units by their numbers, so that they get new ones in the same order."""
    model = type(tokenizer.backend_tokenizer.model).__name__
    if model != "WordPiece":
        raise ValueError(f"keep: the retriever's units are those of a {model}, expected WordPiece")
    known = tokenizer.get_vocab()
    return sorted(known, key=known.__getitem__)


class _Means:
    """Weighted means of English input vectors, one for each unit of the new vocabulary.

    A mean of several vectors is short, and where input vectors meet positions the positions would
    drown it: directions and lengths are averaged apart.
    """

    def __init__(self, size: int, vectors: Tensor) -> None:
        # The last column is the length.
        self.vectors = torch.cat([vectors, vectors.norm(dim=1, keepdim=True)], dim=1)
        self.sums = torch.zeros(size, self.vectors.shape[1])
        self.weights = torch.zeros(size)

    def add_pairs(self, other: list[list[int]], english: list[list[int]]) -> None:
        """Units of the other language, as the English units that explain them."""
        count = collections.Counter(unit for units in other for unit in units)
        links = ibm_model_1(
            zip(other, english, strict=True),
            iterations=ITERATIONS,
            least_probability=LEAST_PROBABILITY,
        )
        unit, counterpart, share = (torch.tensor(column) for column in zip(*links, strict=True))
        weight = share * torch.tensor([float(count[one]) for one in unit.tolist()])
        self.sums.index_add_(0, unit, weight[:, None] * self.vectors[counterpart])
        self.weights.index_add_(0, unit, weight)

    def add_spelling(self, new: Any, old: Any, count: collections.Counter[int]) -> None:
        """Units by their letters: as often as English text has them, and all that have nothing."""
        known = old.get_vocab()
        for text, unit in new.get_vocab().items():
            if not count[unit] and self.weights[unit]:
                continue
            pieces = _spelt(text, old, known)
            if pieces:
                weight = float(max(count[unit], 1))
                self.sums[unit] += weight * self.vectors[pieces].mean(0)
                self.weights[unit] += weight

    def means(self) -> Tensor:
        """The vectors; a unit of which nothing is known gets the mean of all English ones."""
        means = self.sums / self.weights.clamp(min=1e-30)[:, None]
        means = torch.where(self.weights[:, None] > 0, means, self.vectors.mean(0))
        return torch.nn.functional.normalize(means[:, :-1]) * means[:, -1:]


def _spelt(text: str, old: Any, known: dict[str, int]) -> list[int]:
    """The English tokenizer's units in the letters of a new one, without unknown ones."""
    if text in known:
        return [known[text]]
    letters = text.removeprefix(CONTINUED)
    pieces: list[int] = old(letters, add_special_tokens=False)["input_ids"]
    if old.unk_token_id in pieces:
        return []
    if letters != text and pieces:
        # Inside of a word the first piece is another unit, where the vocabulary has such.
        first = CONTINUED + str(old.convert_ids_to_tokens(pieces[0]))
        pieces = [known.get(first, pieces[0]), *pieces[1:]]
    return pieces


def _units(
    pairs: Iterable[tuple[str, str]], new: Any, old: Any
) -> tuple[list[list[int]], list[list[int]]]:
    english, other = (list(side) for side in zip(*pairs, strict=True))
    plain = {"add_special_tokens": False, "verbose": False}
    return new(other, **plain)["input_ids"], old(english, **plain)["input_ids"]


def _replace(reader: Any, tokenizer: Any, vectors: Tensor) -> None:
    """Put tokenizer and input vectors in the place of a retriever's own."""
    encoder = reader.auto_model
    before = encoder.get_input_embeddings()
    after = torch.nn.Embedding(len(vectors), vectors.shape[1], tokenizer.pad_token_id)
    after.weight = torch.nn.Parameter(vectors.to(before.weight))
    encoder.set_input_embeddings(after)
    encoder.config.vocab_size = len(tokenizer)
    for name in SPECIAL_IDS:
        if hasattr(encoder.config, name):
            setattr(encoder.config, name, getattr(tokenizer, name))
    reader.processor = tokenizer
