"""Token vectors of a frozen teacher, computed once and kept in files, for any number of trainings.

A store is a folder of shards, each of a few thousand texts:

    00000.vectors.npy   (tokens, dim) float16, read by memory mapping
    00000.tokens.npy    (tokens,) int32, the token of each vector
    00000.lengths.npy   (texts,) int32, tokens of each text
    00000.texts.npy     (texts,) uint64, a hash of each text
    00000.json          sizes and SHA-256 of the four; written last, so a shard with it is whole
    index.json          what the store holds; written after the last shard

An interrupted writing continues after its last whole shard. Several processes may read one store.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optical.io.files import atomic_file, checksum, read_json, writable_folder, write_text

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray


logger = logging.getLogger("optical")

PARTS = ("vectors", "tokens", "lengths", "texts")


def write_vectors(
    model: Any,
    texts: Sequence[str],
    folder: str | Path,
    *,
    role: str,
    max_length: int | None = None,
    batch_size: int = 64,
    shard_texts: int = 4096,
    worker: int = 0,
    workers: int = 1,
) -> Path:
    """Encode texts as a teacher encodes them in training, and keep the vectors in a folder.

    Args:
        model: a ``MultiVectorEncoder``.
        texts: any number of texts; repetitions are kept once.
        folder: where to write; whole shards of an interrupted writing of the same texts are kept.
        role: "query" or "document", as in training.
        max_length: longest text in tokens, as in training (None: the model's own limit).
        batch_size: texts in one forward pass.
        shard_texts: texts in one shard.
        worker, workers: the number of this process, from 0, among so many that write the store
            together, on one machine or on several with a common folder. Each writes every
            ``workers``-th shard; the last one to finish finishes the store.

    Returns:
        The folder.

    Raises:
        ValueError: no text; the folder holds vectors of other texts or options; or ``worker`` is
            not one of ``workers``.
        OSError: the folder cannot be written.
    """
    if not 0 <= worker < workers:
        raise ValueError(f"worker: {worker}, expected a number from 0 to {workers - 1}")
    folder = writable_folder(folder)
    texts = list(dict.fromkeys(texts))
    if not texts:
        raise ValueError("texts: none given; expected at least one")
    made = {
        "role": role,
        "max_length": max_length,
        "dimension": model.get_embedding_dimension(),
        "texts": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        "shard_texts": shard_texts,
    }
    started = folder / "started.json"
    if started.exists() and read_json(started) != made:
        raise ValueError(
            f"{folder}: holds vectors of other texts or options; choose another folder"
        )
    write_text(started, json.dumps(made) + "\n")
    model.eval()
    names = []
    for start in range(0, len(texts), shard_texts):
        number = start // shard_texts
        name = f"{number:05d}"
        names.append(name)
        if number % workers == worker and not _whole(folder, name):
            part = texts[start : start + shard_texts]
            _write_shard(folder, name, part, model, role, max_length, batch_size)
            logger.info("%s: %d of %d texts", folder, start + len(part), len(texts))
    # Two workers that finish together write the same.
    if workers == 1 or all(_whole(folder, name) for name in names):
        write_text(folder / "index.json", json.dumps({**made, "shards": names}) + "\n")
    return folder


class StoredVectors:
    """Vectors that :func:`write_vectors` wrote, as batches for a trainer.

    Args:
        folders: one or more stores; a text may be in any of them.
        role, max_length: how the training reads; the stores must have been written so.
        verify: compare every file with its checksum first, which reads them whole.

    Raises:
        ValueError: a folder holds no finished store, one of another role, length or dimension, or
            a file that does not fit its checksum.
    """

    def __init__(
        self,
        folders: Sequence[str | Path],
        *,
        role: str,
        max_length: int | None = None,
        verify: bool = True,
    ) -> None:
        import numpy as np

        self._shards: list[tuple[NDArray[numpy.float16], NDArray[numpy.int32], list[int]]] = []
        self._places: dict[int, tuple[int, int]] = {}
        dimensions = set()
        for folder in map(Path, folders):
            index = folder / "index.json"
            if not index.is_file():
                raise ValueError(f"{folder}: no finished store of token vectors; write it first")
            made = read_json(index)
            if (made["role"], made["max_length"]) != (role, max_length):
                raise ValueError(
                    f"{folder}: vectors of role {made['role']!r} and max_length "
                    f"{made['max_length']}, but the training reads role {role!r} and max_length "
                    f"{max_length}; write them anew"
                )
            dimensions.add(made["dimension"])
            for name in made["shards"]:
                if verify and not _whole(folder, name):
                    raise ValueError(
                        f"{folder}: shard {name} does not fit its checksum; remove {index} and "
                        "write the store again: whole shards are kept"
                    )
                parts = {part: folder / f"{name}.{part}.npy" for part in PARTS}
                lengths = np.load(parts["lengths"]).astype(np.int64)
                ends = np.cumsum(lengths).tolist()
                self._shards.append(
                    (
                        np.load(parts["vectors"], mmap_mode="r"),
                        np.load(parts["tokens"], mmap_mode="r"),
                        [0, *ends],
                    )
                )
                for row, key in enumerate(np.load(parts["texts"]).tolist()):
                    self._places.setdefault(key, (len(self._shards) - 1, row))
        if len(dimensions) != 1:
            raise ValueError(f"stores of dimensions {sorted(dimensions)}; expected one dimension")
        self.dimension: int = dimensions.pop()

    def __len__(self) -> int:
        return len(self._places)

    def batch(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The texts' vectors as a model returns them, with padding: zeros, behind a mask.

        Raises:
            ValueError: a text is in none of the stores.
        """
        rows = [self._row(text) for text in texts]
        longest = max(len(tokens) for _, tokens in rows)
        vectors = torch.zeros(len(rows), longest, self.dimension)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        for row, (x, tokens) in enumerate(rows):
            vectors[row, : len(x)] = torch.from_numpy(x.astype("float32"))
            ids[row, : len(x)] = torch.from_numpy(tokens.astype("int64"))
            mask[row, : len(x)] = 1
        return {"input_ids": ids, "attention_mask": mask, "token_embeddings": vectors}

    def _row(self, text: str) -> tuple[Any, Any]:
        try:
            shard, row = self._places[_hash(text)]
        except KeyError:
            raise ValueError(
                f"no stored vectors of {text[:60]!r}; write the store for this bitext"
            ) from None
        vectors, tokens, ends = self._shards[shard]
        return vectors[ends[row] : ends[row + 1]], tokens[ends[row] : ends[row + 1]]


def _write_shard(
    folder: Path,
    name: str,
    texts: Sequence[str],
    model: Any,
    role: str,
    max_length: int | None,
    batch_size: int,
) -> None:
    import numpy as np

    limit = {} if max_length is None else {"max_length": max_length}
    # Texts of similar length share a batch, so that little of it is padding.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: list[tuple[Any, Any]] = [(None, None)] * len(texts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        features = model.preprocess(
            [texts[i] for i in chosen], prompt=model.prompts.get(role), task=role, **limit
        )
        features = {
            key: value.to(model.device) if isinstance(value, Tensor) else value
            for key, value in features.items()
        }
        with torch.no_grad():
            output = model(features, task=role)
        mask = output["attention_mask"].bool()
        for i, kept, vectors, ids in zip(
            chosen, mask, output["token_embeddings"], output["input_ids"], strict=True
        ):
            found[i] = (
                vectors[kept].to(torch.float16).cpu().numpy(),
                ids[kept].to(torch.int32).cpu().numpy(),
            )
    arrays = {
        "vectors": np.concatenate([vectors for vectors, _ in found]),
        "tokens": np.concatenate([ids for _, ids in found]),
        "lengths": np.array([len(ids) for _, ids in found], dtype=np.int32),
        "texts": np.array([_hash(text) for text in texts], dtype=np.uint64),
    }
    checksums = {}
    for part, array in arrays.items():
        path = folder / f"{name}.{part}.npy"
        with atomic_file(path) as file:
            np.save(file, array, allow_pickle=False)
        checksums[part] = checksum(path)
    write_text(folder / f"{name}.json", json.dumps(checksums) + "\n")


def _whole(folder: Path, name: str) -> bool:
    """Whether a shard is complete and what it was when it was written."""
    try:
        checksums = read_json(folder / f"{name}.json")
        return all(checksums[part] == checksum(folder / f"{name}.{part}.npy") for part in PARTS)
    except (OSError, ValueError, KeyError):
        return False


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
