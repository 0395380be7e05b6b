"""Stored vectors: what the teacher says, whole or not there, and the same training with them."""

import json
import os

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the extra `train`")

from optical.data.pairs import read_pairs
from optical.models import token_store
from optical.models.retriever import load_retriever
from optical.models.token_store import StoredVectors, write_vectors
from optical.training import recipes, runner


@pytest.fixture(scope="module")
def teacher(tiny_models):
    return load_retriever(tiny_models.teacher)


@pytest.fixture(scope="module")
def texts(world):
    return [english for english, _ in read_pairs(world / "bitext/en-sw.tsv")][:30]


@pytest.fixture
def store(teacher, texts, tmp_path):
    return write_vectors(teacher, texts, tmp_path / "store", role="document", shard_texts=8)


def test_they_are_the_teachers_own(store, teacher, texts):
    stored = StoredVectors([store], role="document")
    assert len(stored) == 30 and stored.dimension == 16
    batch = stored.batch([texts[20], texts[3]])
    features = teacher.preprocess([texts[20], texts[3]], prompt=None, task="document")
    with torch.no_grad():
        expected = teacher(features, task="document")
    mask = expected["attention_mask"].bool()
    assert torch.equal(batch["attention_mask"].bool(), mask)
    assert torch.equal(batch["input_ids"][mask], expected["input_ids"][mask])
    assert batch["token_embeddings"].dtype == torch.float32
    difference = (batch["token_embeddings"] - expected["token_embeddings"])[mask]
    assert difference.abs().max() < 1e-3


def test_shards_are_mapped_and_half_precision(store):
    assert json.loads((store / "index.json").read_text())["shards"] == [
        "00000", "00001", "00002", "00003"
    ]  # fmt: skip
    array = np.load(store / "00001.vectors.npy", mmap_mode="r")
    assert isinstance(array, np.memmap) and array.dtype == np.float16
    assert not [name for name in os.listdir(store) if name.startswith(".")]


def test_an_interrupted_writing_goes_on(store, teacher, texts, tmp_path, monkeypatch):
    folder = tmp_path / "parts"
    write_shard = token_store._write_shard

    def stop(folder, name, *rest):
        if name == "00002":
            raise KeyboardInterrupt
        write_shard(folder, name, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(token_store, "_write_shard", stop)
        write_vectors(teacher, texts, folder, role="document", shard_texts=8)
    with pytest.raises(ValueError, match="no finished store of token vectors"):
        StoredVectors([folder], role="document")
    # A shard that was torn is written again, whole ones are not.
    (folder / "00001.vectors.npy").write_bytes(b"torn")
    made = []

    def note(folder, name, *rest):
        made.append(name)
        write_shard(folder, name, *rest)

    monkeypatch.setattr(token_store, "_write_shard", note)
    write_vectors(teacher, texts, folder, role="document", shard_texts=8)
    assert made == ["00001", "00002", "00003"]
    for name in ("00001.vectors.npy", "00003.tokens.npy"):
        assert (folder / name).read_bytes() == (store / name).read_bytes()


def test_what_does_not_fit_is_refused(store, teacher, texts):
    with pytest.raises(ValueError, match=r"role 'document' .* but the training reads role 'query'"):
        StoredVectors([store], role="query")
    with pytest.raises(ValueError, match=r"max_length None, but .* max_length 7"):
        StoredVectors([store], role="document", max_length=7)
    with pytest.raises(ValueError, match="no stored vectors of 'never seen'"):
        StoredVectors([store], role="document").batch(["never seen"])
    with pytest.raises(ValueError, match="holds vectors of other texts or options"):
        write_vectors(teacher, texts[:3], store, role="document", shard_texts=8)
    with pytest.raises(ValueError, match="texts: none given"):
        write_vectors(teacher, [], store, role="document")
    shard = store / "00002.lengths.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\7")
    with pytest.raises(ValueError, match="shard 00002 does not fit its checksum"):
        StoredVectors([store], role="document")


def test_a_training_with_them_is_the_training_without(world, tiny_models, tmp_path, teacher):
    bitext = str(world / "bitext/en-sw.tsv")
    english = [one for one, _ in read_pairs(bitext)]
    store = write_vectors(teacher, english, tmp_path / "store", role="document", max_length=12)

    def losses(name, stored):
        options = recipes.DistillOptions(
            teacher=tiny_models.teacher,
            student=tiny_models.wide,
            bitext=[bitext],
            role="document",
            mass="idf",
            teacher_vectors=stored,
        )
        args = recipes.trainer_arguments(
            tmp_path / name, max_steps=3, logging_steps=1, max_length=12, disable_tqdm=True,
            learning_rate=1e-2, per_device_train_batch_size=8,
        )  # fmt: skip
        trainer = recipes.distill(options, args)
        if stored:
            trainer.loss.teacher.forward = None
        runner.run(trainer, options, resume=False)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    expected = losses("plain", [])
    assert losses("stored", [str(store)]) == pytest.approx(expected, abs=1e-3)


def test_many_workers_write_one_store(teacher, texts, store, tmp_path):
    folder = tmp_path / "shared"
    together = {"role": "document", "shard_texts": 8, "workers": 2}
    write_vectors(teacher, texts, folder, worker=1, **together)
    assert sorted(path.name for path in folder.glob("0000?.json")) == ["00001.json", "00003.json"]
    with pytest.raises(ValueError, match="no finished store"):
        StoredVectors([folder], role="document")
    write_vectors(teacher, texts, folder, worker=0, **together)
    shared, alone = (StoredVectors([path], role="document") for path in (folder, store))
    for name, value in alone.batch(texts).items():
        assert torch.equal(shared.batch(texts)[name], value)
    with pytest.raises(ValueError, match="worker: 2, expected a number from 0 to 1"):
        write_vectors(teacher, texts, folder, worker=2, **together)
