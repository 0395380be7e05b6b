"""Restrict training to the input vectors of the subwords that occur in the training data.

Of the 250,000 subwords of a multilingual vocabulary, a training in a few languages reads a fifth.
The others have no gradient, but an optimizer keeps two moments of each entry and updates all of
them in every step: for a small encoder half of the memory of a training. Their input vectors are
frozen here, in the module and not in the vocabulary, so that the tokenizer, the segmentation of
every text and the saved model stay those of the whole table.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

logger = logging.getLogger("optical")

# Optimizers whose update of an entry depends on the gradients of that entry alone, so that entries
# without a gradient stay unchanged.
_ENTRYWISE = (
    *("adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "adamw_anyprecision"),
    *("sgd", "adagrad", "rmsprop"),
)
# Largest share of a table that may occur for "auto" to restrict training to it.
_LARGEST_SHARE = 0.5
# Texts that are tokenised at a time.
_CHUNK = 1024


class PartialEmbedding(nn.Module):
    """A table of input vectors of which only some rows are trained.

    It computes what the ``nn.Embedding`` computes that it replaces, and its state is that of the
    whole table: checkpoints and saved models are those of the original module.

    Args:
        full: the table, whose weight is not copied.
        ids: (rows,) int64, distinct rows to train. The padding row, which has no gradient, is left
            out.

    Attributes:
        weight: (rows, dim) parameter, the trained rows in the order of ``ids``.
        table: (vocabulary size, dim) parameter without gradient. Its trained rows are outdated.
    """

    weight: nn.Parameter
    table: nn.Parameter
    ids: Tensor
    rows: Tensor

    def __init__(self, full: nn.Embedding, ids: Tensor) -> None:
        super().__init__()
        table = full.weight.detach()
        ids = ids.to(table.device)
        ids = ids if full.padding_idx is None else ids[ids != full.padding_idx]
        self.weight = nn.Parameter(table[ids])
        # A parameter and no buffer: data-parallel training sends buffers to all processes in
        # every step.
        self.table = nn.Parameter(table, requires_grad=False)
        rows = torch.full((len(table),), -1, dtype=torch.int64, device=table.device)
        rows[ids] = torch.arange(len(ids), device=table.device)
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the input vectors of token ids: (...) int64 to (..., dim)."""
        rows = self.rows[input_ids]
        trained = functional.embedding(rows.clamp(min=0), self.weight)
        frozen = functional.embedding(input_ids, self.table)
        return torch.where((rows < 0).unsqueeze(-1), frozen, trained)

    def full_weight(self) -> Tensor:
        """Return the whole table, (vocabulary size, dim), as a detached copy."""
        return self.table.detach().index_copy(0, self.ids, self.weight.detach())

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[prefix + "weight"] = self.full_weight()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        loaded = state_dict.get(key)
        if loaded is None:
            missing_keys.append(key)
        elif loaded.shape != self.table.shape:
            error_msgs.append(
                f"{key} has the shape {tuple(loaded.shape)}, expected {tuple(self.table.shape)}"
            )
        else:
            with torch.no_grad():
                self.table.copy_(loaded)
                self.weight.copy_(self.table[self.ids])


def restrict_embeddings(
    model: Any, choice: str, trainer_args: Any, dataset: Any, role: str | None = None
) -> None:
    """Choose the input vectors of a model that its training updates.

    Args:
        model: a ``MultiVectorEncoder``, changed in place.
        choice: "all"; "occurring", the subwords of the training data; "none"; or "auto",
            "occurring" where it gives the result of "all" and leaves out half of the table or more.
        trainer_args: arguments of the training, with the prompts of the columns.
        dataset: the training data.
        role: role in which the model reads all columns but the first, which is the teacher's; None
            if it reads the first as queries and the others as documents.

    Raises:
        ValueError: "occurring" with a stream, whose texts are not known, or with an encoder whose
            input vectors cannot be trained in part.
    """
    if choice == "all":
        return
    encoder: Any = getattr(model[0], "auto_model", None)
    full: Any = None if encoder is None else encoder.get_input_embeddings()
    if choice == "none" and full is not None:
        full.requires_grad_(False)
        return
    cause = _obstacle(encoder, full, dataset)
    if choice == "auto" and (cause or not _leaves_others_unchanged(trainer_args)):
        return
    if cause:
        raise ValueError(f"embeddings: 'occurring', but {cause}; expected 'all' or 'none'")
    size = len(full.weight)
    limit = int(size * _LARGEST_SHARE) if choice == "auto" else size
    ids = _occurring(_batches(model, trainer_args, dataset, role), size, limit)
    if ids is None:
        return
    encoder.set_input_embeddings(PartialEmbedding(full, ids))
    logger.info("embeddings: %d of %d input vectors occur in the texts, and train", len(ids), size)


def trained_rows(model: Any) -> int | None:
    """Return how many input vectors of a model are trained, or None if all are."""
    for module in model.modules():
        if isinstance(module, PartialEmbedding):
            return len(module.ids)
    return None


def _obstacle(encoder: Any, full: Any, dataset: Any) -> str:
    """Return why the input vectors of an encoder cannot be trained in part, or ""."""
    if full is None:
        return "the model does not begin with an encoder"
    if not hasattr(dataset, "__len__"):
        return "the texts of a stream are not known before the training"
    # Subclasses scale their vectors; the other rules concern several rows at once.
    plain = type(full) is nn.Embedding and full.max_norm is None
    if not plain or full.sparse or full.scale_grad_by_freq:
        return f"the {type(full).__name__} of the encoder is more than a table"
    uses = sum(
        weight is full.weight for _, weight in encoder.named_parameters(remove_duplicate=False)
    )
    return "" if uses == 1 else f"the encoder uses its input vectors in {uses} places"


def _leaves_others_unchanged(trainer_args: Any) -> bool:
    """Return whether the optimizer leaves rows without a gradient unchanged."""
    optimizer = getattr(trainer_args.optim, "value", trainer_args.optim)
    sharded = bool(trainer_args.fsdp or trainer_args.deepspeed)
    return optimizer in _ENTRYWISE and not trainer_args.weight_decay and not sharded


def _batches(model: Any, trainer_args: Any, dataset: Any, role: str | None) -> Iterator[Tensor]:
    """Yield the token ids of the training texts as the collators of the trainings read them."""
    prompts, limits = trainer_args.prompts or {}, trainer_args.max_length
    for position, name in enumerate(dataset.column_names):
        if role is not None and not position:
            continue
        task = role or ("document" if position else "query")
        prompt = prompts.get(name) if role is None else model.prompts.get(role)
        limit = limits.get(task) if isinstance(limits, dict) else limits
        length = {} if limit is None else {"max_length": limit}
        # Texts of similar length share a batch, which keeps padding low.
        texts = sorted(set(dataset[name]), key=len)
        for start in range(0, len(texts), _CHUNK):
            chunk = texts[start : start + _CHUNK]
            yield model.preprocess(chunk, prompt=prompt, task=task, **length)["input_ids"]


def _occurring(batches: Iterable[Tensor], size: int, limit: int) -> Tensor | None:
    """Return the distinct token ids of batches, sorted; None for more than `limit`."""
    occurs = torch.zeros(size, dtype=torch.bool)
    for input_ids in batches:
        occurs[input_ids.flatten()] = True
        if int(occurs.sum()) > limit:
            return None
    return occurs.nonzero()[:, 0]
