"""Encode texts or their passages into token vectors with a ``MultiVectorEncoder``."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optical.models.tokenizers import token_spans

ROLES = ("query", "document")


@dataclass(frozen=True)
class TokenVectors:
    """Token vectors of several texts, concatenated.

    Attributes:
        vectors: (total tokens, dim), floating point.
        lengths: (texts,), int64 on the CPU: tokens of each text, possibly 0.
        token_ids: (total tokens,), vocabulary index of each token; None if not recorded.
    """

    vectors: Tensor
    lengths: Tensor
    token_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def dim(self) -> int:
        return self.vectors.shape[-1]

    def split(self) -> list[Tensor]:
        """Return the vectors of each text, (tokens, dim), as views."""
        return list(torch.split(self.vectors, self.lengths.tolist()))

    def split_token_ids(self) -> list[list[int]]:
        """Return the token ids of each text.

        Raises:
            ValueError: token ids were not recorded.
        """
        if self.token_ids is None:
            raise ValueError("token_ids were not recorded; encode with token_ids=True")
        return [ids.tolist() for ids in torch.split(self.token_ids, self.lengths.tolist())]


def encode(
    model: Any,
    texts: Sequence[str],
    role: str,
    *,
    batch_size: int = 32,
    token_ids: bool = False,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> TokenVectors:
    """Encode texts for retrieval.

    Args:
        model: a ``sentence_transformers.MultiVectorEncoder``. Only its ``encode_query`` and
            ``encode_document`` are called. The model is left in ``eval`` mode.
        texts: any number of texts, which may be empty strings.
        role: "query" or "document"; selects prompt, length limit, expansion and skip list.
        batch_size: texts per forward pass.
        token_ids: also record the vocabulary index of each token.
        device: device to encode on; ``None`` leaves the model where it is.
        progress: show a progress bar.

    Returns:
        Vectors in the order of ``texts``, in float32 regardless of the model's precision, on the
        device that encoded them, detached from autograd.

    Raises:
        ValueError: ``role`` is neither "query" nor "document".
        TypeError: the model does not return token vectors.
    """
    if role not in ROLES:
        raise ValueError(f"role must be 'query' or 'document', found {role!r}")
    method = getattr(model, f"encode_{role}", None)
    if method is None:
        raise TypeError(
            "model must be a sentence_transformers.MultiVectorEncoder, "
            f"found {type(model).__name__}"
        )
    output: dict[str, None] = {"output_value": None} if token_ids else {}
    # `show_progress_bar=None` would show a bar whenever the application logs at INFO.
    encoded = method(
        list(texts), batch_size=batch_size, device=device, show_progress_bar=progress, **output
    )
    if token_ids:
        return _concatenate([_scored_tokens(features) for features in encoded])
    pieces = [torch.as_tensor(piece) for piece in encoded]
    if any(piece.ndim != 2 for piece in pieces):
        raise TypeError(
            "model returns one vector for each text, but token vectors are needed; load it with "
            "sentence_transformers.MultiVectorEncoder"
        )
    return _concatenate([(piece, None) for piece in pieces])


def use_bfloat16(model: Any) -> None:
    """Make the encoder of a model compute in bfloat16, with weights and results in float32.

    Faster on GPUs and on processors with AVX512-BF16 or AMX, and slower on others.
    """
    encoder = model[0]
    forward = encoder.forward

    def in_bfloat16(features: Any, **options: Any) -> Any:
        with torch.autocast(model.device.type, torch.bfloat16):
            output = forward(features, **options)
        for name, value in output.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                output[name] = value.float()
        return output

    encoder.forward = in_bfloat16


def encode_for_training(
    model: Any,
    texts: Sequence[str],
    role: str,
    *,
    max_length: int | None = None,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> TokenVectors:
    """Encode texts exactly as a teacher reads them in training, with token ids, on the CPU.

    Unlike :func:`encode`, this applies the trainer's prompt and length limit.

    Args:
        model: a ``MultiVectorEncoder`` in ``eval`` mode.
        texts: at least one text.
        role: "query" or "document".
        max_length: length limit in tokens; None is the model's own limit.
        batch_size: texts per forward pass.
        dtype: precision of the returned vectors.
    """
    limit = {} if max_length is None else {"max_length": max_length}
    # Texts of similar length share a batch, which keeps padding low.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    encoded: dict[int, tuple[Tensor, Tensor | None]] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        features = model.preprocess(
            [texts[i] for i in batch], prompt=model.prompts.get(role), task=role, **limit
        )
        features = {
            key: value.to(model.device) if isinstance(value, Tensor) else value
            for key, value in features.items()
        }
        with torch.no_grad():
            output = model(features, task=role)
        for row, i in enumerate(batch):
            text_features = {name: output[name][row] for name in _FEATURES}
            vectors, token_ids = _scored_tokens(text_features)
            encoded[i] = vectors.to(dtype).cpu(), token_ids.cpu()
    return _concatenate([encoded[i] for i in range(len(texts))], dtype)


_FEATURES = ("attention_mask", "token_embeddings", "input_ids")


def _scored_tokens(features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return vectors and token ids of one text, without padding and skipped tokens."""
    mask = features["attention_mask"].bool()
    return features["token_embeddings"][mask], features["input_ids"][mask]


def _concatenate(
    texts: Sequence[tuple[Tensor, Tensor | None]], dtype: torch.dtype = torch.float32
) -> TokenVectors:
    if not texts:
        return TokenVectors(torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64))
    lengths = torch.tensor([len(vectors) for vectors, _ in texts])
    token_ids = [ids for _, ids in texts if ids is not None]
    return TokenVectors(
        torch.cat([vectors for vectors, _ in texts]).to(dtype),
        lengths,
        torch.cat(token_ids) if token_ids else None,
    )


def cut_passages(
    text: str, tokenizer: Any, length: int, stride: int, prompt: str = ""
) -> list[str]:
    """Cut a text into overlapping passages of `length` tokens that start every `stride` tokens.

    The special tokens that the tokenizer adds count towards `length`, as in a model's limits, and
    so do those of the prompt that the model reads before each passage. The last passage ends with
    the text. A text that fits is its only passage.

    Raises:
        ValueError: the passages would leave gaps or hold no token.
    """
    before = len(token_spans(tokenizer, prompt)) - len(token_spans(tokenizer, "")) if prompt else 0
    room = length - tokenizer.num_special_tokens_to_add() - before
    if room < 1 or not 1 <= stride <= room:
        raise ValueError(
            f"passage_length is {length} and passage_stride {stride}; expected a length above the "
            f"{length - room} special tokens and tokens of the prompt, and a stride from 1 to the "
            "length without them"
        )
    spans = [span for _, span in token_spans(tokenizer, text) if span is not None]
    if len(spans) <= room:
        return [text]
    starts = range(0, len(spans) - room + stride, stride)
    return [text[spans[start][0] : spans[min(start + room, len(spans)) - 1][1]] for start in starts]


def encode_passages(
    model: Any,
    texts: Sequence[str],
    role: str = "document",
    *,
    passage_length: int | None,
    passage_stride: int | None = None,
    batch_size: int = 32,
    device: str | torch.device | None = None,
) -> tuple[TokenVectors, list[int]]:
    """Cut texts into passages and encode them.

    Args:
        model, texts, role, batch_size, device: see :func:`encode`.
        passage_length: length of a passage in tokens; None encodes each text whole, up to the
            model's limit.
        passage_stride: tokens between the starts of neighbouring passages; None is half the length.

    Returns:
        Vectors of all passages in text order, and the number of passages of each text.
    """
    if passage_length is None:
        passages = [[text] for text in texts]
    else:
        stride = passage_stride or max(passage_length // 2, 1)
        prompt = (getattr(model, "prompts", None) or {}).get(role) or ""
        passages = [
            cut_passages(text, model.tokenizer, passage_length, stride, prompt) for text in texts
        ]
    flat = [passage for text in passages for passage in text]
    tokens = encode(model, flat, role, batch_size=batch_size, device=device)
    return tokens, [len(text) for text in passages]


def check_worker(worker: int, workers: int) -> None:
    """Raise ValueError unless `worker` is the index of one of `workers` processes."""
    if not 0 <= worker < workers:
        raise ValueError(f"worker: {worker}, expected a number from 0 to {workers - 1}")


def chunks(
    documents: Iterable[tuple[str, str]], size: int
) -> Iterator[tuple[list[str], list[str]]]:
    """Yield ids and texts of the next `size` documents at a time."""
    source = iter(documents)
    while chunk := list(itertools.islice(source, size)):
        yield [key for key, _ in chunk], [text for _, text in chunk]


def encode_rows(
    model: Any,
    ids: Sequence[str],
    texts: Sequence[str],
    role: str,
    batch_size: int,
    passage_length: int | None,
    passage_stride: int | None,
) -> tuple[list[str], TokenVectors]:
    """Encode the passages of some documents: the document id and the vectors of each."""
    tokens, counts = encode_passages(
        model,
        texts,
        role,
        passage_length=passage_length,
        passage_stride=passage_stride,
        batch_size=batch_size,
    )
    row_ids = [key for key, count in zip(ids, counts, strict=True) for _ in range(count)]
    return row_ids, tokens
