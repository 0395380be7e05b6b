"""models.encoding."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("optical")


def encode(
    model: Any,
    texts: Sequence[str],
    role: str,
    *,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> TokenVectors:
    """Encode texts into token vectors with a ``MultiVectorEncoder``.

    Args:
        model: a ``sentence_transformers.MultiVectorEncoder``. Only its ``encode_query`` and
            ``encode_document`` are used. It is left in ``eval`` mode.
        texts: any number of texts; a text may be empty.
        role: ``"query"`` or ``"document"``; decides prompt, length, expansion and skip list.
        batch_size: texts in one forward pass.
        device: where to encode; ``None`` leaves the model where it is.
        progress: show a progress bar.

    Returns:
        Vectors in the order of ``texts``, float32 whatever the model's precision, on the device
        that encoded them, without gradients.

    Raises:
        ValueError: ``role`` is neither of the two.
        TypeError: the model does not return token vectors.
    """
    if role not in ("query", "document"):
        raise ValueError(f"role must be 'query' or 'document', found {role!r}")
    method = getattr(model, f"encode_{role}", None)
    if method is None:
        raise TypeError(
            "model must be a sentence_transformers.MultiVectorEncoder, "
            f"found {type(model).__name__}"
        )
    # `show_progress_bar=None` would show a bar whenever the application logs at INFO.
    encoded = method(list(texts), batch_size=batch_size, device=device, show_progress_bar=progress)
    pieces = [torch.as_tensor(piece) for piece in encoded]
    if any(piece.ndim != 2 for piece in pieces):
        raise TypeError(
            "model returns one vector for each text, but token vectors are needed; load it with "
            "sentence_transformers.MultiVectorEncoder"
        )
    if not pieces:
        return TokenVectors(torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64))
    lengths = torch.tensor([len(piece) for piece in pieces])
    return TokenVectors(torch.cat(pieces).float(), lengths)


def passages(text: str, tokenizer: Any, length: int, stride: int) -> list[str]:
    """Cut a text into overlapping passages of `length` tokens that begin every `stride` tokens.

    The special tokens that the tokenizer adds count, as they do in a model's limits. The last
    passage ends with the text. A text that fits is its own only passage.

    Raises:
        ValueError: the passages would leave gaps, or hold no token.
    """
    room = length - tokenizer.num_special_tokens_to_add()
    if room < 1 or not 1 <= stride <= room:
        raise ValueError(
            f"passage_length is {length} and passage_stride {stride}; expected a length above the "
            f"{length - room} special tokens, and a stride from 1 to the length without them"
        )
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
        "offset_mapping"
    ]
    if len(spans) <= room:
        return [text]
    starts = range(0, len(spans) - room + stride, stride)
    return [text[spans[start][0] : spans[min(start + room, len(spans)) - 1][1]] for start in starts]


def cut_texts(
    texts: Sequence[str], model: Any, length: int | None, stride: int | None = None
) -> list[list[str]]:
    """The passages of each text, or the text itself; the usual stride is half the length."""
    if length is None:
        return [[text] for text in texts]
    stride = stride or max(length // 2, 1)
    return [passages(text, model.tokenizer, length, stride) for text in texts]


def _steps(total: int, size: int, progress: bool) -> Iterator[int]:
    steps = range(0, total, size)
    if not progress:
        yield from steps
    elif sys.stderr.isatty():
        from tqdm.auto import tqdm  # comes with sentence-transformers

        yield from tqdm(steps, desc="Searching", unit="batch")
    else:
        told = time.monotonic()
        for start in steps:
            yield start
            if time.monotonic() - told > 20:
                told = time.monotonic()
                logger.info("searched %d of %d texts", min(start + size, total), total)


def _unpack(
    texts: Mapping[str, Tensor] | tuple[Sequence[str], TokenVectors], what: str
) -> tuple[list[str], TokenVectors]:
    if isinstance(texts, Mapping):
        pieces = list(texts.values())
        lengths = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
        vectors = torch.cat(pieces).float() if pieces else torch.zeros(0, 0)
        return list(texts), TokenVectors(vectors, lengths)
    ids, packed = texts
    if len(ids) != len(packed):
        raise ValueError(f"{what}: {len(ids)} ids but vectors of {len(packed)} texts")
    if len(set(ids)) != len(ids):
        raise ValueError(f"{what}: an id appears a second time; ids must be unique")
    return list(ids), packed


def _require_positive(**arguments: int | None) -> None:
    for name, value in arguments.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}")


@dataclass(frozen=True)
class TokenVectors:
    """Token vectors of several texts, one after the other.

    Attributes:
        vectors: (total tokens, dim), float32.
        lengths: (texts,), int64 on the CPU: how many rows belong to each text; may be 0.
    """

    vectors: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def dim(self) -> int:
        return self.vectors.shape[-1]

    def split(self) -> list[Tensor]:
        """The vectors of each text, (tokens, dim); views, nothing is copied."""
        return list(torch.split(self.vectors, self.lengths.tolist()))


ROLES = ("query", "document")
