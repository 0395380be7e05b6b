"""Token and word alignments of parallel sentences, from the transport plans of two models."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optical.data.lexicon import Lexicon, tokenize_words
from optical.models.encoding import encode
from optical.models.tokenizers import token_spans
from optical.ot.functional import sinkhorn, sinkhorn_vectors

# Text positions of tokens outside the text.
_SPECIAL, _PROMPT = -1, -2


def align_tokens(
    student: Any,
    teacher: Any,
    other: str,
    english: str,
    *,
    role: str = "document",
    epsilon: float = 0.05,
    max_iter: int = 200,
) -> dict[str, Any]:
    """Align the tokens of a sentence and its English translation by optimal transport.

    Args:
        student, teacher: ``MultiVectorEncoder`` models with vectors of the same dimension.
        other: sentence that the student reads.
        english: its translation, which the teacher reads.
        role: "query" or "document", how both models read.
        epsilon, max_iter: see ``optical.sinkhorn``.

    Returns:
        ``other_tokens`` (n strings), ``english_tokens`` (m strings), ``plan`` (n lists of m masses,
        which sum to 1) and ``value_linear`` (mean transported cosine distance).
    """
    other_tokens, x = _encode_sentence(student, other, role)
    english_tokens, y = _encode_sentence(teacher, english, role)
    result = sinkhorn((1 - x @ y.T)[None], epsilon=epsilon, max_iter=max_iter)
    _check_mass(result.plan()[0], epsilon)
    return {
        "other_tokens": other_tokens,
        "english_tokens": english_tokens,
        "plan": result.plan()[0].tolist(),
        "value_linear": result.value_linear.item(),
    }


def _encode_sentence(model: Any, text: str, role: str) -> tuple[list[str], Tensor]:
    """Return the scored tokens of a text and their unit vectors."""
    encoded = encode(model, [text], role, token_ids=True)
    (ids,) = encoded.split_token_ids()
    tokens: list[str] = model.tokenizer.convert_ids_to_tokens(ids)
    return tokens, torch.nn.functional.normalize(encoded.vectors, dim=-1)


def word_links(
    student: Any,
    teacher: Any,
    bitext: Sequence[tuple[str, str]],
    *,
    role: str = "document",
    epsilon: float = 0.05,
    max_iter: int = 50,
    batch_size: int = 64,
) -> Iterator[dict[tuple[str, str], float]]:
    """Yield the word links of each sentence pair, by the mass that the plan moves between words.

    Args:
        student, teacher, role, epsilon, max_iter: see :func:`align_tokens`.
        bitext: (English, other) sentence pairs; the teacher reads English, the student the other.
        batch_size: sentence pairs per solve.

    Yields:
        (English word, foreign word) -> share of the foreign word's mass. Each foreign word is
        linked to the one English word that receives most of its mass. Tokens outside words, such
        as special tokens, are left out; words are those of
        :func:`optical.data.lexicon.tokenize_words`.
    """
    for plan, other_starts, english_starts, (english, other) in _plans(
        student, teacher, bitext, role, epsilon, max_iter, batch_size
    ):
        other_words = _words_of_tokens(_words_by_position(other), other_starts)
        english_words = _words_of_tokens(_words_by_position(english), english_starts)
        yield _strongest_links(plan, other_words, english_words)


def align_words(
    student: Any,
    teacher: Any,
    bitext: Iterable[tuple[str, str]],
    *,
    role: str = "document",
    epsilon: float = 0.05,
    max_iter: int = 50,
    mutual: bool = False,
    batch_size: int = 64,
) -> Iterator[list[tuple[int, int, float]]]:
    """Yield the links of each sentence pair between words separated by white space.

    Args:
        student, teacher, role, epsilon, max_iter: see :func:`align_tokens`.
        bitext: (English, other) sentence pairs, read lazily; the teacher reads English, the student
            the other.
        mutual: keep a link only if the English word also receives most of its mass from the foreign
            one, which gives fewer but more precise links.
        batch_size: sentence pairs per solve.

    Yields:
        (index of the English word, index of the foreign word, share of the foreign word's mass),
        from 0 and sorted: each foreign word with the English word that receives most of its mass.
        Words that a model does not read, such as those beyond its length limit, have no link.
    """
    for plan, other_starts, english_starts, (english, other) in _plans(
        student, teacher, bitext, role, epsilon, max_iter, batch_size
    ):
        rows = _words_of_tokens(_word_indices_by_position(other), other_starts)
        columns = _words_of_tokens(_word_indices_by_position(english), english_starts)
        mass, other_words, english_words = _word_mass(plan, rows, columns)
        if not mass.numel():
            yield []
            continue
        share = mass / mass.sum(1, keepdim=True).clamp(min=1e-30)
        best_column, best_row = share.argmax(1).tolist(), mass.argmax(0).tolist()
        yield sorted(
            (english_words[column], other_words[row], float(share[row, column]))
            for row, column in enumerate(best_column)
            if other_words[row] is not None
            and english_words[column] is not None
            and (not mutual or best_row[column] == row)
        )


def format_pharaoh(links: Iterable[tuple[int, int, float]]) -> str:
    """Format the links of a sentence pair in Pharaoh format: English index, foreign index.

    Examples:
        >>> format_pharaoh([(0, 1, 0.9), (1, 0, 0.7)])
        '0-1 1-0'
    """
    return " ".join(f"{english}-{other}" for english, other, _ in links)


def alignment_error_rate(
    links: Iterable[Mapping[tuple[str, str], float]],
    bitext: Sequence[tuple[str, str]],
    lexicon: Lexicon,
) -> tuple[float | None, int]:
    """Compare predicted word links with the translations of a lexicon.

    Let S be the word pairs of a sentence pair that the lexicon contains, and A the predicted links
    of the foreign words in S. The rate is 1 - 2 |A and S| / (|A| + |S|), summed over all sentence
    pairs: that of Och and Ney (2003) without merely possible links. Words outside the lexicon are
    ignored.

    Args:
        links: the output of :func:`word_links` for `bitext`.
        bitext: (English, other) sentence pairs.
        lexicon: lower-case English word to its translations.

    Returns:
        The rate, or None if the lexicon covers no word of the bitext, and the number of links in S.
    """
    correct = predicted = sure = 0
    for sentence_links, (english, foreign) in zip(links, bitext, strict=True):
        foreign_words = set(tokenize_words(foreign))
        reference = {
            (word, translation.lower())
            for word in set(tokenize_words(english))
            for translation in lexicon.get(word, ())
            if translation.lower() in foreign_words
        }
        scored_words = {word for _, word in reference}
        scored_links = {link for link in sentence_links if link[1] in scored_words}
        correct += len(scored_links & reference)
        predicted += len(scored_links)
        sure += len(reference)
    return (1 - 2 * correct / (predicted + sure) if sure else None), sure


def _plans(
    student: Any,
    teacher: Any,
    bitext: Iterable[tuple[str, str]],
    role: str,
    epsilon: float,
    max_iter: int,
    batch_size: int,
) -> Iterator[tuple[Tensor, list[int], list[int], tuple[str, str]]]:
    """Yield the plan of each pair, the text positions of its rows' and columns' tokens, the pair.

    Rows are tokens of the other language and columns English tokens. Positions are those of
    :func:`_token_starts`.
    """
    source = iter(bitext)
    while batch := list(itertools.islice(source, batch_size)):
        x, x_starts = _encode_batch(student, [other for _, other in batch], role)
        y, y_starts = _encode_batch(teacher, [english for english, _ in batch], role)
        result = sinkhorn_vectors(
            x,
            y,
            mask_a=_valid_tokens(x, x_starts),
            mask_b=_valid_tokens(y, y_starts),
            epsilon=epsilon,
            max_iter=max_iter,
        )
        for plan, rows, columns, pair in zip(result.plan(), x_starts, y_starts, batch, strict=True):
            if rows and columns:
                _check_mass(plan, epsilon)
            yield plan[: len(rows), : len(columns)], rows, columns, pair


def _check_mass(plan: Tensor, epsilon: float) -> None:
    """Raise ValueError for a plan that float32 could not compute, whose links would be random."""
    mass = float(plan.sum())
    if not 0.9 < mass < 1.1:
        raise ValueError(
            f"epsilon: {epsilon}, which is beyond the precision of float32 (the plan holds a mass "
            f"of {mass:.3g}, expected 1); choose a value such as 0.05"
        )


def _encode_batch(model: Any, texts: Sequence[str], role: str) -> tuple[Tensor, list[list[int]]]:
    """Return padded unit vectors (texts, tokens, dim) and the text positions of the tokens.

    Tokens of the prompt are left out: they are equal in all texts and would draw mass from words.
    """
    prompt = (getattr(model, "prompts", None) or {}).get(role) or ""
    encoded = encode(model, texts, role, token_ids=True)
    vectors, starts = [], []
    for text, ids, x in zip(texts, encoded.split_token_ids(), encoded.split(), strict=True):
        positions = _token_starts(model.tokenizer, text, ids, prompt)
        kept = [token for token, position in enumerate(positions) if position != _PROMPT]
        vectors.append(torch.nn.functional.normalize(x[kept], dim=-1).cpu())
        starts.append([positions[token] for token in kept])
    return torch.nn.utils.rnn.pad_sequence(vectors, batch_first=True), starts


def _valid_tokens(vectors: Tensor, starts: Sequence[Sequence[int]]) -> Tensor:
    valid = torch.zeros(vectors.shape[:2], dtype=torch.bool)
    for row, tokens in enumerate(starts):
        valid[row, : len(tokens)] = True
    return valid


def _token_starts(tokenizer: Any, text: str, ids: Sequence[int], prompt: str = "") -> list[int]:
    """Return the position in the text at which each token starts.

    Args:
        tokenizer: a fast Transformers tokenizer.
        text: the text.
        ids: tokens that the model has read.
        prompt: prompt that the model has put before the text.

    Returns:
        A position for each token: `_SPECIAL` for special tokens, `_PROMPT` for those of the prompt.

    Raises:
        ValueError: the tokenizer gives no positions.
    """
    read = prompt + text
    spans = token_spans(tokenizer, read, special_tokens=True)
    read_ids = [token_id for token_id, _ in spans]
    starts, next_token = [], 0
    for token_id in ids:
        # A model may add tokens (expansion) or drop tokens (skipped ones), but keeps the order.
        try:
            index = read_ids.index(token_id, next_token)
        except ValueError:
            starts.append(_SPECIAL)
            continue
        next_token = index + 1
        starts.append(_start(read, spans[index][1], len(prompt)))
    return starts


def _start(read: str, span: tuple[int, int] | None, prompt: int) -> int:
    """Return the position in the text of a token with a span in prompt and text.

    The span may include the space before a word. A token of space alone, such as a lone "▁", is the
    beginning of the word after it, wherever it stands.
    """
    if span is None:
        return _SPECIAL
    start, end = span
    first = _next_letter(read, start)
    if first < prompt and end > prompt:
        first = _next_letter(read, prompt)
    return first - prompt if first >= prompt else _PROMPT


def _next_letter(text: str, position: int) -> int:
    """Return the position of the first character from `position` that is not white space."""
    return next((i for i in range(position, len(text)) if not text[i].isspace()), len(text))


def _word_mass(
    plan: Tensor, row_words: Sequence[Any], column_words: Sequence[Any]
) -> tuple[Tensor, list[Any], list[Any]]:
    """Sum the plan over the tokens of each word; returns the mass and its row and column words."""
    rows, columns = list(dict.fromkeys(row_words)), list(dict.fromkeys(column_words))
    mass = torch.zeros(len(rows), len(columns), dtype=plan.dtype)
    row = torch.tensor([rows.index(word) for word in row_words], dtype=torch.int64)
    column = torch.tensor([columns.index(word) for word in column_words], dtype=torch.int64)
    indices = (row[:, None].expand_as(plan), column[None].expand_as(plan))
    mass.index_put_(indices, plan, accumulate=True)
    return mass, rows, columns


def _strongest_links(
    plan: Tensor, row_words: Sequence[Any], column_words: Sequence[Any]
) -> dict[tuple[str, str], float]:
    mass, rows, columns = _word_mass(plan, row_words, column_words)
    links = {}
    for word, shares in zip(rows, mass / mass.sum(1, keepdim=True).clamp(min=1e-30), strict=True):
        if word is not None and len(columns):
            best = int(shares.argmax())
            if columns[best] is not None:
                links[columns[best], word] = float(shares[best])
    return links


def _words_of_tokens(words: Mapping[int, Any], starts: Sequence[int]) -> list[Any]:
    """Return the word at the start of each token, or None for a token outside words."""
    return [words.get(start) for start in starts]


def _words_by_position(text: str) -> dict[int, str]:
    """Map positions in a text to lower-case words, as of `tokenize_words`."""
    marked = "".join(c if w else " " for c, w in ((c, tokenize_words(c)) for c in text))
    return _by_position(marked, lambda index, word: word.lower())


def _word_indices_by_position(text: str) -> dict[int, int]:
    """Map positions in a text to the index of the word there; white space separates words."""
    return _by_position(text, lambda index, word: index)


def _by_position(text: str, value: Callable[[int, str], Any]) -> dict[int, Any]:
    values: dict[int, Any] = {}
    for index, match in enumerate(re.finditer(r"\S+", text)):
        values.update(dict.fromkeys(range(*match.span()), value(index, match.group())))
    return values
