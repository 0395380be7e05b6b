"""Batches of bitext: texts of similar length, and each column tokenised for its own model."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.multi_vector_encoder.data_collator import MultiVectorEncoderDataCollator

from optical.models.encoding import ROLES
from optical.models.retriever import check_length
from optical.models.token_store import StoredVectors

logger = logging.getLogger("optical")

# Names of columns that hold no sentence.
_METADATA = re.compile(
    r"(.*_)?(id|ids|idx|index|lang|language|langs|url|uri)|domain|dataset|corpus|split|source_file"
)

# Batches among which sentences are sorted by length.
_POOL = 50


class LengthBatchSampler(DefaultBatchSampler):
    """Batch sampler that puts sentences of similar length into a batch, which keeps padding low.

    In each epoch the rows are shuffled. Of each pool of 50 batches the rows are sorted by the
    characters of the columns that the student reads, all but the first, and cut into batches. The
    batches are shuffled. Use it as trainer argument ``batch_sampler``.
    """

    def __init__(self, dataset: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(dataset, *args, **kwargs)
        columns = [dataset[name] for name in dataset.column_names[1:]]
        self.lengths = [sum(map(len, texts)) for texts in zip(*columns, strict=True)]

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        rows = torch.randperm(len(self.lengths), generator=generator).tolist()
        if self.drop_last:
            del rows[len(rows) - len(rows) % self.batch_size :]
        batches = []
        for start in range(0, len(rows), _POOL * self.batch_size):
            pool = rows[start : start + _POOL * self.batch_size]
            pool.sort(key=self.lengths.__getitem__)
            batches += [
                pool[first : first + self.batch_size]
                for first in range(0, len(pool), self.batch_size)
            ]
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)


class BitextCollator(MultiVectorEncoderDataCollator):
    """Tokenise parallel sentences: the first column for the teacher, the others for the student.

    Args:
        student, teacher: two ``MultiVectorEncoder`` or two dense ``SentenceTransformer`` models.
        role: "query" or "document", the role of the student in retrieval. It selects prompts,
            length limits and mask-token expansion for both models.
        max_length: maximum length of a sentence in tokens (None: the limits of the models).
        vectors: token store of the teacher for the first column, used instead of running the
            teacher. With None the column is tokenised for the teacher.
        columns: names of the columns to read, the teacher's first. None reads all but labels, and
            refuses those whose name is of metadata, such as ``id`` or ``lang``.

    Prompts are those of the models. The columns that each model reads are logged once.

    Raises:
        ValueError: the role is neither "query" nor "document", or a model has fewer positions than
            ``max_length``; in a call, a column holds metadata or something else than text.
    """

    def __init__(
        self,
        student: MultiVectorEncoder,
        teacher: MultiVectorEncoder,
        *,
        role: str,
        max_length: int | None = None,
        vectors: StoredVectors | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        if role not in ROLES:
            raise ValueError(f"role: {role!r}, expected 'query' or 'document'")
        for model in (student, teacher):
            check_length(model, max_length)
        super().__init__(preprocess_fn=student.preprocess, max_length=max_length)
        self.student = student
        self.teacher = teacher
        self.role = role
        self.vectors = vectors
        self.columns = None if columns is None else list(columns)
        self._checked_columns: dict[tuple[str, ...], list[str]] = {}

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the tensors of a batch, keyed ``{column}_{name}`` as the trainer expects."""
        batch: dict[str, Any] = {}
        limit = {} if self.max_length is None else {"max_length": self.max_length}
        columns = self._columns_of(tuple(features[0]))
        if "dataset_name" in features[0]:
            batch["dataset_name"] = features[0]["dataset_name"]
        for position, column in enumerate(columns):
            model = self.student if position else self.teacher
            texts = [row[column] for row in features]
            for text in texts:
                if not isinstance(text, str):
                    raise ValueError(
                        f"column {column!r} holds {type(text).__name__}, expected text; remove the "
                        "column or the row, or name the columns to read with `columns`"
                    )
            if self.vectors is not None and not position:
                tokens = self.vectors.batch(texts)
            else:
                tokens = model.preprocess(
                    texts, prompt=model.prompts.get(self.role), task=self.role, **limit
                )
            batch.update({f"{column}_{name}": value for name, value in tokens.items()})
            batch[f"{column}_task"] = self.role
        return batch

    def _columns_of(self, names: tuple[str, ...]) -> list[str]:
        """Return the columns to read of a batch, the teacher's first; checked and logged once."""
        if names not in self._checked_columns:
            labels = {"dataset_name", *self.valid_label_columns}
            columns = self.columns or [name for name in names if name not in labels]
            missing = [name for name in columns if name not in names]
            if missing or len(columns) < 2:
                raise ValueError(
                    f"columns {', '.join(columns)} of {', '.join(names)}: expected two or more "
                    "that the dataset has, the teacher's first"
                )
            metadata = [name for name in columns if _METADATA.fullmatch(name.lower())]
            if metadata and self.columns is None:
                raise ValueError(
                    f"column {metadata[0]!r} would be read as a text; remove it from the dataset, "
                    "or name the columns to read with `columns`"
                )
            logger.info(
                "bitext: the teacher reads %s, the student %s%s",
                columns[0],
                ", ".join(columns[1:]),
                "".join(f"; {name} is not read" for name in names if name not in columns),
            )
            self._checked_columns[names] = columns
        return self._checked_columns[names]
