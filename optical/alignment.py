"""Word alignments out of a pair of models: what their transport plans link, token by token."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from optical.functional import sinkhorn, sinkhorn_vectors
from optical.lexicon import Lexicon, words


def align(
    student: Any,
    teacher: Any,
    other: str,
    english: str,
    *,
    role: str = "document",
    epsilon: float = 0.05,
    max_iter: int = 200,
) -> dict[str, Any]:
    """Align a sentence with its English translation by optimal transport.

    Args:
        student, teacher: ``MultiVectorEncoder`` models with vectors of one size.
        other: the sentence that the student reads.
        english: its translation, which the teacher reads.
        role: "query" or "document", how both models read.
        epsilon, max_iter: see ``optical.sinkhorn``.

    Returns:
        ``other_tokens`` (n strings), ``english_tokens`` (m strings), ``plan`` (n rows of m masses,
        which sum to 1) and ``value_linear`` (the mean transported cosine distance).
    """
    other_tokens, x = _read(student, other, role)
    english_tokens, y = _read(teacher, english, role)
    result = sinkhorn((1 - x @ y.T)[None], epsilon=epsilon, max_iter=max_iter)
    return {
        "other_tokens": other_tokens,
        "english_tokens": english_tokens,
        "plan": result.plan()[0].tolist(),
        "value_linear": result.value_linear.item(),
    }


def _read(model: Any, text: str, role: str) -> tuple[list[str], torch.Tensor]:
    """Tokens that a model scores, and their unit vectors."""
    encode = model.encode_query if role == "query" else model.encode_document
    output = encode([text], output_value=None, show_progress_bar=False)[0]
    mask = output["attention_mask"].bool()
    tokens = model.tokenizer.convert_ids_to_tokens(output["input_ids"][mask].tolist())
    vectors = output["token_embeddings"][mask].float()
    return tokens, torch.nn.functional.normalize(vectors, dim=-1)


def word_links(
    student: Any,
    teacher: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    role: str = "document",
    epsilon: float = 0.05,
    max_iter: int = 50,
    batch_size: int = 64,
) -> Iterator[dict[tuple[str, str], float]]:
    """Yield for each (English, foreign) pair the mass that the plan moves between their words.

    Args:
        student, teacher, role, epsilon, max_iter: see :func:`align`.
        pairs: parallel sentences; the teacher reads the first side, the student the second.
        batch_size: pairs in one solve.

    Yields:
        (English word, foreign word) -> share of the foreign word's mass; of each foreign word only
        the English word that it sends most to. Tokens that belong to no word, such as special
        ones, are left out; words are those of :func:`optical.lexicon.words`.
    """
    for plan, x, y, (english, other) in _plans(
        student, teacher, pairs, role, epsilon, max_iter, batch_size
    ):
        yield _strongest(plan, _named(_spelled(other), x), _named(_spelled(english), y))


def align_words(
    student: Any,
    teacher: Any,
    pairs: Iterable[tuple[str, str]],
    *,
    role: str = "document",
    epsilon: float = 0.05,
    max_iter: int = 50,
    mutual: bool = False,
    batch_size: int = 64,
) -> Iterator[list[tuple[int, int, float]]]:
    """Yield the links of each (English, foreign) pair, between words that spaces separate.

    Args:
        student, teacher, role, epsilon, max_iter: see :func:`align`.
        pairs: parallel sentences, read as they are needed; the teacher reads the first side.
        mutual: keep a link only where the English word, too, gets most from the foreign one: fewer
            links, and surer ones.
        batch_size: pairs in one solve.

    Yields:
        (number of the English word, number of the foreign word, share of the foreign word's mass)
        from 0, in order: each foreign word with the English word that it sends most to. A word of
        which the models read nothing, at the end of a long sentence say, has no link.
    """
    for plan, x, y, (english, other) in _plans(
        student, teacher, pairs, role, epsilon, max_iter, batch_size
    ):
        rows, columns = _named(_numbered(other), x), _named(_numbered(english), y)
        mass, others, englishes = _word_mass(plan, rows, columns)
        if not mass.numel():
            yield []
            continue
        share = mass / mass.sum(1, keepdim=True).clamp(min=1e-30)
        best, back = share.argmax(1).tolist(), mass.argmax(0).tolist()
        yield sorted(
            (englishes[column], others[row], float(share[row, column]))
            for row, column in enumerate(best)
            if others[row] is not None
            and englishes[column] is not None
            and (not mutual or back[column] == row)
        )


def pharaoh(links: Iterable[tuple[int, int, float]]) -> str:
    """The links of a pair of sentences in one line, ``0-1 1-0``: English number, foreign number.

    Examples:
        >>> pharaoh([(0, 1, 0.9), (1, 0, 0.7)])
        '0-1 1-0'
    """
    return " ".join(f"{english}-{other}" for english, other, _ in links)


def alignment_error_rate(
    links: Iterable[Mapping[tuple[str, str], float]],
    pairs: Sequence[tuple[str, str]],
    lexicon: Lexicon,
) -> tuple[float | None, int]:
    """Compare the links of sentence pairs with those that a word table calls translations.

    With S the pairs of words in a sentence pair that the table has, and A the links of the foreign
    words in S, the rate is 1 - 2 |A and S| / (|A| + |S|) over all sentence pairs: that of Och and
    Ney (2003) with no links that are merely possible. Words that the table lacks count nothing.

    Args:
        links: what :func:`word_links` yields for `pairs`.
        pairs: the parallel sentences.
        lexicon: lower-case English word to its translations.

    Returns:
        The rate, or None where the table knows no word of the pairs, and the number of links in S.
    """
    both = predicted = sure = 0
    for found, (english, foreign) in zip(links, pairs, strict=True):
        there = set(words(foreign))
        known = {
            (word, translation.lower())
            for word in set(words(english))
            for translation in lexicon.get(word, ())
            if translation.lower() in there
        }
        answered = {link for link in found if any(link[1] == other for _, other in known)}
        both += len(answered & known)
        predicted += len(answered)
        sure += len(known)
    return (1 - 2 * both / (predicted + sure) if sure else None), sure


def _plans(
    student: Any,
    teacher: Any,
    pairs: Iterable[tuple[str, str]],
    role: str,
    epsilon: float,
    max_iter: int,
    batch_size: int,
) -> Iterator[tuple[torch.Tensor, list[int], list[int], tuple[str, str]]]:
    """The plan of each pair, and where in their texts the tokens of its rows and columns begin."""
    source = iter(pairs)
    while batch := list(itertools.islice(source, batch_size)):
        x, x_places = _read_places(student, [other for _, other in batch], role)
        y, y_places = _read_places(teacher, [english for english, _ in batch], role)
        masks = [torch.zeros(v.shape[:2], dtype=torch.bool) for v in (x, y)]
        for mask, found in zip(masks, (x_places, y_places), strict=True):
            for row, places in enumerate(found):
                mask[row, : len(places)] = True
        result = sinkhorn_vectors(
            x, y, mask_a=masks[0], mask_b=masks[1], epsilon=epsilon, max_iter=max_iter
        )
        for plan, others, englishes, pair in zip(
            result.plan(), x_places, y_places, batch, strict=True
        ):
            yield plan[: len(others), : len(englishes)], others, englishes, pair


def _word_mass(
    plan: torch.Tensor, others: Sequence[Any], englishes: Sequence[Any]
) -> tuple[torch.Tensor, list[Any], list[Any]]:
    """The mass between words, and the words of its rows and columns: tokens of a word together."""
    rows, columns = list(dict.fromkeys(others)), list(dict.fromkeys(englishes))
    mass = torch.zeros(len(rows), len(columns), dtype=plan.dtype)
    row = torch.tensor([rows.index(word) for word in others], dtype=torch.int64)
    column = torch.tensor([columns.index(word) for word in englishes], dtype=torch.int64)
    at = (row[:, None].expand_as(plan), column[None].expand_as(plan))
    mass.index_put_(at, plan, accumulate=True)
    return mass, rows, columns


def _strongest(
    plan: torch.Tensor, others: Sequence[Any], englishes: Sequence[Any]
) -> dict[tuple[str, str], float]:
    mass, rows, columns = _word_mass(plan, others, englishes)
    links = {}
    for word, shares in zip(rows, mass / mass.sum(1, keepdim=True).clamp(min=1e-30), strict=True):
        if word is not None and len(columns):
            best = int(shares.argmax())
            if columns[best] is not None:
                links[columns[best], word] = float(shares[best])
    return links


def _read_places(
    model: Any, texts: Sequence[str], role: str
) -> tuple[torch.Tensor, list[list[int]]]:
    """Unit vectors of the texts' scored tokens, padded, and where each begins (-1: nowhere)."""
    encode = model.encode_query if role == "query" else model.encode_document
    outputs = encode(list(texts), output_value=None, show_progress_bar=False)
    vectors, places = [], []
    for text, output in zip(texts, outputs, strict=True):
        mask = output["attention_mask"].bool()
        ids = output["input_ids"][mask].tolist()
        vectors.append(
            torch.nn.functional.normalize(output["token_embeddings"][mask].float(), dim=-1).cpu()
        )
        places.append(_begins(model.tokenizer, text, ids))
    return torch.nn.utils.rnn.pad_sequence(vectors, batch_first=True), places


def _begins(tokenizer: Any, text: str, ids: Sequence[int]) -> list[int]:
    """Where in the text each token begins, -1 for tokens that are no part of it."""
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids_read, spans = read["input_ids"], read["offset_mapping"]
    found, here = [], 0
    for one in ids:
        # Tokens that a model adds or leaves out break the sequence, never its order.
        try:
            at = ids_read.index(one, here)
        except ValueError:
            found.append(-1)
            continue
        start, end = spans[at]
        # Some tokenizers count the space before a word to its first token.
        found.append(next((i for i in range(start, end) if not text[i].isspace()), start))
        here = at + 1
    return found


def _named(names: Mapping[int, Any], places: Sequence[int]) -> list[Any]:
    return [names.get(place) for place in places]


def _spelled(text: str) -> dict[int, str]:
    """The lower-case word at each place of a text, by :func:`optical.lexicon.words`."""
    marked = "".join(c if w else " " for c, w in ((c, words(c)) for c in text))
    return _spans(marked, lambda number, word: word.lower())


def _numbered(text: str) -> dict[int, int]:
    """The number of the word at each place of a text; spaces separate words."""
    return _spans(text, lambda number, word: number)


def _spans(text: str, name: Callable[[int, str], Any]) -> dict[int, Any]:
    place: dict[int, Any] = {}
    for number, match in enumerate(re.finditer(r"\S+", text)):
        place.update(dict.fromkeys(range(*match.span()), name(number, match.group())))
    return place
