"""Token stores: token vectors on disk in sharded safetensors files with checksums.

A document index (:mod:`optical.retrieval.index`) and the stored vectors of a frozen teacher
(:func:`write_vectors`) share one format. A store is a folder of

    00000.safetensors   vectors of a few thousand texts (a shard), see :func:`read_shard`
    00000.json          its SHA-256 and a hash of texts and options, written after the shard
    options.json        options of the store, written first
    index.json          options of the store and SHA-256 of all shards, written last

The options include the fingerprint of the model (:mod:`optical.models.fingerprint`).

An interrupted write keeps the shards that match their SHA-256. Several processes may read or write
one store: equal vectors give equal files, and readers map shards into memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optical.io.files import (
    atomic_file,
    checksum,
    folder_lock,
    read_json,
    writable_folder,
    write_json,
)
from optical.models import fingerprint
from optical.models.encoding import TokenVectors, check_worker, encode_for_training
from optical.models.retriever import check_length

logger = logging.getLogger("optical")

PRECISIONS = {"float32": torch.float32, "float16": torch.float16}
# Names of options in messages, where they are not those of the options.
_OPTION_NAMES = {"model": "model, by its content", "texts": "text or order of texts"}


class StoreWriter:
    """Write a token store shard by shard, or resume an interrupted write.

    Args:
        folder: folder of the store; created if it does not exist.
        options: settings that determine the vectors, with the key "precision"; saved in
            ``index.json``.
        partners: fingerprints of the partners of the model, saved there too.

    Raises:
        ValueError: the precision is neither "float32" nor "float16", or the folder holds vectors
            that were written with other options.
        OSError: the folder cannot be written.
    """

    def __init__(
        self, folder: str | Path, options: Mapping[str, Any], partners: Sequence[str] = ()
    ) -> None:
        precision = options["precision"]
        if precision not in PRECISIONS:
            raise ValueError(f"precision: {precision!r}, expected 'float32' or 'float16'")
        self.folder = writable_folder(folder)
        if any(self.folder.glob("*.lance")):
            raise ValueError(
                f"{self.folder}: holds a database of `optical index`; choose another folder"
            )
        self.options = dict(options)
        self.partners = list(partners)
        self.checksums: dict[str, str] = {}
        # Of two writers that start together, the second sees the options of the first.
        with folder_lock(self.folder, wait=True):
            self._check_options()

    def _check_options(self) -> None:
        """Compare the options with those of the folder, or record them in a new one."""
        path = self.folder / "options.json"
        try:
            stored = read_json(path)
        except (FileNotFoundError, ValueError):
            # Shards without the file may have other options; is_written compares each of them.
            if not any(self.folder.glob("*.safetensors")):
                write_json(path, self.options)
            return
        for name in dict.fromkeys([*self.options, *stored]):
            if stored.get(name) != self.options.get(name):
                raise ValueError(
                    f"{self.folder}: holds vectors of another {_OPTION_NAMES.get(name, name)} "
                    f"({stored.get(name)}, now {self.options.get(name)}); choose another folder, "
                    "or remove this one"
                )

    def is_written(self, number: int, texts: Any) -> bool:
        """Return whether shard `number` is whole and holds these texts (any JSON value).

        Raises:
            ValueError: the shard holds other texts or was written with other options.
        """
        return self.has_shard(number, self.key(texts))

    def has_shard(self, number: int, key: str) -> bool:
        """Return whether shard `number` is whole and has the :meth:`key` of its texts.

        Raises:
            ValueError: the shard has another key.
        """
        path = self._path(number)
        record = _shard_record(path)
        if record is None:
            return False
        if record.get("key") != key:
            raise ValueError(
                f"{self.folder}: holds vectors of other texts or options; choose another folder, "
                "or remove this one"
            )
        digest = record.get("sha256")
        if digest is None or digest != _checksum_or_none(path):
            return False
        self.checksums[path.name] = digest
        return True

    def write(self, number: int, texts: Any, ids: Sequence[str], tokens: TokenVectors) -> None:
        """Write shard `number`; `ids` name the rows of `tokens`, and `texts` are as above."""
        from safetensors.torch import save

        path = self._path(number)
        dtype = PRECISIONS[self.options["precision"]]
        tensors = {"vectors": tokens.vectors.cpu().to(dtype), "lengths": tokens.lengths}
        if tokens.token_ids is not None:
            tensors["token_ids"] = tokens.token_ids.cpu().to(torch.int32)
        with atomic_file(path) as file:
            # safetensors writes several metadata entries in random order; one keeps files equal.
            file.write(save(tensors, metadata={"ids": "\n".join(ids)}))
        self.checksums[path.name] = checksum(path)
        record = {"key": self.key(texts), "sha256": self.checksums[path.name]}
        write_json(path.with_suffix(".json"), record)

    def finish(self, documents: int) -> Path:
        """Write ``index.json`` with the number of texts and return the folder."""
        files = dict(sorted(self.checksums.items()))
        record = {"partners": self.partners, "documents": documents, "files": files}
        write_json(self.folder / "index.json", {**self.options, **record})
        return self.folder

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def key(self, texts: Any) -> str:
        """Return a digest of the options and the texts of a shard (any JSON value)."""
        return hashlib.sha256(json.dumps([self.options, texts]).encode()).hexdigest()


def read_store(folder: str | Path, *, verify: bool) -> dict[str, Any]:
    """Read the ``index.json`` of a finished token store.

    Args:
        folder: folder of the store.
        verify: compare every shard with its checksum, which reads all of them.

    Returns:
        The options of the store, "documents" (number of texts) and "files" (name to SHA-256).

    Raises:
        ValueError: there is no finished store, its ``index.json`` is none of this package, or a
            shard does not match its checksum.
    """
    folder = Path(folder)
    path = folder / "index.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no finished store of token vectors; write it first")
    index: Any = read_json(path)
    files = index.get("files") if isinstance(index, dict) else None
    if (
        not isinstance(files, dict)
        or not files
        or not all(name == Path(name).name for name in files)
        or not isinstance(index.get("dimension"), int)
        or not isinstance(index.get("role"), str)
    ):
        raise ValueError(f"{path}: is no index of token vectors; write the store again")
    for name, digest in files.items():
        if verify:
            check_shard(folder, name, digest)
    checked: dict[str, Any] = index
    return checked


def check_shard(folder: Path, name: str, digest: str) -> None:
    """Raise ValueError if a shard does not match its checksum."""
    if digest != _checksum_or_none(folder / name):
        raise ValueError(
            f"{folder / name}: does not match its checksum; remove {folder / 'index.json'} and "
            "write the store again: whole shards are kept"
        )


def read_shard(path: str | Path) -> tuple[list[str], TokenVectors]:
    """Read the row ids and token vectors of a shard; the vectors are memory-mapped.

    The file holds the tensors ``vectors`` (tokens, dim) in float32 or float16, ``lengths`` (rows,)
    in int64 and, for a teacher's vectors, ``token_ids`` (tokens,) in int32. Its metadata entry
    ``ids`` holds one row id per line. A text has one row, or one for each of its passages, next to
    each other.
    """
    from safetensors.torch import load_file

    tensors = load_file(path)
    tokens = TokenVectors(tensors["vectors"], tensors["lengths"], tensors.get("token_ids"))
    return read_ids(path), tokens


def read_ids(path: str | Path) -> list[str]:
    """Read the row ids of a shard.

    Raises:
        ValueError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    reader: Any = safe_open
    try:
        with reader(path, framework="pt") as file:
            ids: str = file.metadata()["ids"]
    except (OSError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}); remove it and write it again"
        ) from None
    return ids.split("\n")


def _shard_record(path: Path) -> dict[str, Any] | None:
    """Return the JSON object beside a shard, or None if there is none or it is damaged."""
    try:
        record = read_json(path.with_suffix(".json"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "key" in record else None


def _checksum_or_none(path: Path) -> str | None:
    try:
        return checksum(path)
    except OSError:
        return None


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
    """Store the token vectors of a frozen teacher in float16, encoded as in training.

    Args:
        model: a ``MultiVectorEncoder``.
        texts: any number of texts; duplicates are stored once.
        folder: folder of the store; whole shards of an interrupted write of the same texts are
            kept.
        role: "query" or "document", as in training.
        max_length: length limit in tokens, as in training (None: the model's own limit).
        batch_size: texts per forward pass.
        shard_texts: texts per shard.
        worker, workers: index of this process, from 0, and number of processes that write the store
            together, on one machine or on several with a shared folder. Each writes every
            ``workers``-th shard; the last one to finish writes ``index.json``.

    Returns:
        The folder.

    Raises:
        ValueError: no text; the folder holds vectors of other texts or options; or ``worker`` is
            not below ``workers``.
        OSError: the folder cannot be written.
    """
    check_worker(worker, workers)
    texts = list(dict.fromkeys(texts))
    if not texts:
        raise ValueError("texts: none given; expected at least one")
    check_length(model, max_length)
    options = {
        "role": role,
        "max_length": max_length,
        "precision": "float16",
        "dimension": model.get_embedding_dimension(),
        "model": fingerprint.fingerprints(model)[role],
        "shard_texts": shard_texts,
        "texts": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
    }
    store = StoreWriter(folder, options, fingerprint.partners(model))
    model.eval()
    parts = [texts[start : start + shard_texts] for start in range(0, len(texts), shard_texts)]
    for number in range(worker, len(parts), workers):
        part = parts[number]
        if not store.is_written(number, part):
            tokens = encode_for_training(
                model, part, role, max_length=max_length, batch_size=batch_size, dtype=torch.float16
            )
            store.write(number, part, [_text_id(text) for text in part], tokens)
            end = min((number + 1) * shard_texts, len(texts))
            logger.info("%s: %d of %d texts", store.folder, end, len(texts))
    # Two workers that finish together write the same index.
    if workers == 1 or all(store.is_written(*shard) for shard in enumerate(parts)):
        store.finish(len(texts))
    return store.folder


class StoredVectors:
    """Teacher vectors written by :func:`write_vectors`, in batches for a trainer.

    Args:
        folders: one or more stores, which together hold all texts.
        role, max_length: settings of the training; the stores must have been written with them.
        model: the teacher, whose content must be that of the model that wrote the stores; None
            skips the comparison.
        verify: compare every file with its checksum first, which reads all of them.

    Raises:
        ValueError: a folder holds no finished store, one of another model, role, length or
            dimension, or a file that does not match its checksum.
    """

    def __init__(
        self,
        folders: Sequence[str | Path],
        *,
        role: str,
        max_length: int | None = None,
        model: Any = None,
        verify: bool = True,
    ) -> None:
        expected = None if model is None else fingerprint.fingerprints(model)[role]
        self._shards: list[tuple[TokenVectors, list[int]]] = []
        self._positions: dict[str, tuple[int, int]] = {}
        dimensions = set()
        for folder in map(Path, folders):
            index = read_store(folder, verify=verify)
            stored = (index["role"], index.get("max_length"))
            if stored != (role, max_length):
                raise ValueError(
                    f"{folder}: vectors of role {stored[0]!r} and max_length {stored[1]}, but the "
                    f"training reads role {role!r} and max_length {max_length}; write them again"
                )
            if expected not in (None, index.get("model", expected)):
                raise ValueError(
                    f"{folder}: vectors of another teacher (fingerprint {index['model']}, that of "
                    f"the training is {expected}); write them again"
                )
            dimensions.add(index["dimension"])
            for name in index["files"]:
                self._add_shard(folder / name)
        if len(dimensions) != 1:
            raise ValueError(f"stores of dimensions {sorted(dimensions)}; expected one dimension")
        self.dimension: int = dimensions.pop()

    def _add_shard(self, path: Path) -> None:
        ids, tokens = read_shard(path)
        if tokens.token_ids is None:
            raise ValueError(f"{path}: holds no token ids, so it is not a teacher's store")
        for row, text_id in enumerate(ids):
            self._positions.setdefault(text_id, (len(self._shards), row))
        offsets = [0, *itertools.accumulate(tokens.lengths.tolist())]
        self._shards.append((tokens, offsets))

    def __len__(self) -> int:
        return len(self._positions)

    def batch(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return features of the texts as the model returns them, padded with masked zeros.

        Returns:
            ``token_embeddings`` (texts, tokens, dim) in float32, ``input_ids`` and
            ``attention_mask`` (texts, tokens) in int64.

        Raises:
            ValueError: a text is in none of the stores.
        """
        rows = [self._row(text) for text in texts]
        longest = max(len(token_ids) for _, token_ids in rows)
        embeddings = torch.zeros(len(rows), longest, self.dimension)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        for row, (vectors, token_ids) in enumerate(rows):
            embeddings[row, : len(vectors)] = vectors
            ids[row, : len(vectors)] = token_ids
            mask[row, : len(vectors)] = 1
        return {"input_ids": ids, "attention_mask": mask, "token_embeddings": embeddings}

    def _row(self, text: str) -> tuple[Tensor, Tensor]:
        try:
            shard, row = self._positions[_text_id(text)]
        except KeyError:
            raise ValueError(
                f"no stored vectors of {text[:60]!r}; write the store for this bitext"
            ) from None
        tokens, offsets = self._shards[shard]
        assert tokens.token_ids is not None
        span = slice(offsets[row], offsets[row + 1])
        return tokens.vectors[span], tokens.token_ids[span]


def _text_id(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
