"""Word alignments out of a pair of models: what their transport plans link, token by token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        x, x_words = _read_words(student, [other for _, other in batch], role)
        y, y_words = _read_words(teacher, [english for english, _ in batch], role)
        masks = [torch.zeros(v.shape[:2], dtype=torch.bool) for v in (x, y)]
        for mask, found in zip(masks, (x_words, y_words), strict=True):
            for row, owners in enumerate(found):
                mask[row, : len(owners)] = True
        result = sinkhorn_vectors(
            x, y, mask_a=masks[0], mask_b=masks[1], epsilon=epsilon, max_iter=max_iter
        )
        for plan, others, englishes in zip(result.plan(), x_words, y_words, strict=True):
            yield _strongest(plan[: len(others), : len(englishes)], others, englishes)


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


def _strongest(
    plan: torch.Tensor, others: Sequence[str], englishes: Sequence[str]
) -> dict[tuple[str, str], float]:
    rows, columns = list(dict.fromkeys(others)), list(dict.fromkeys(englishes))
    mass = torch.zeros(len(rows), len(columns), dtype=plan.dtype)
    row = torch.tensor([rows.index(word) for word in others], dtype=torch.int64)
    column = torch.tensor([columns.index(word) for word in englishes], dtype=torch.int64)
    at = (row[:, None].expand_as(plan), column[None].expand_as(plan))
    mass.index_put_(at, plan, accumulate=True)
    links = {}
    for word, shares in zip(rows, mass / mass.sum(1, keepdim=True).clamp(min=1e-30), strict=True):
        if word and len(columns):
            best = int(shares.argmax())
            if columns[best]:
                links[columns[best], word] = float(shares[best])
    return links


def _read_words(
    model: Any, texts: Sequence[str], role: str
) -> tuple[torch.Tensor, list[list[str]]]:
    """Unit vectors of the texts' scored tokens, padded, and the word of each ("" for none)."""
    encode = model.encode_query if role == "query" else model.encode_document
    outputs = encode(list(texts), output_value=None, show_progress_bar=False)
    vectors, owners = [], []
    for text, output in zip(texts, outputs, strict=True):
        mask = output["attention_mask"].bool()
        ids = output["input_ids"][mask].tolist()
        vectors.append(
            torch.nn.functional.normalize(output["token_embeddings"][mask].float(), dim=-1).cpu()
        )
        owners.append(_words_of(model.tokenizer, text, ids))
    return torch.nn.utils.rnn.pad_sequence(vectors, batch_first=True), owners


def _words_of(tokenizer: Any, text: str, ids: Sequence[int]) -> list[str]:
    """The word that each token is part of, "" for tokens that are no part of the text."""
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # Words of the text with their places, so that each token finds the one it lies in.
    marked = "".join(c if w else " " for c, w in ((c, words(c)) for c in text))
    place: dict[int, str] = {}
    for match in re.finditer(r"\S+", marked):
        place.update(dict.fromkeys(range(*match.span()), match.group().lower()))
    ids_read, spans = read["input_ids"], read["offset_mapping"]
    found, here = [], 0
    for one in ids:
        # Tokens that a model adds or leaves out break the sequence, never its order.
        try:
            at = ids_read.index(one, here)
        except ValueError:
            found.append("")
            continue
        found.append(place.get(spans[at][0], ""))
        here = at + 1
    return found
