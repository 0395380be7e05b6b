"""Token stores: teacher vectors on disk equal the teacher's own, and writes resume."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("sentence_transformers", reason="needs the extra `train`")

from optical.data.pairs import read_bitext_pairs
from optical.models.retriever import load_retriever
from optical.models.token_store import StoredVectors, StoreWriter, read_shard, write_vectors
from optical.training import recipes, runner


@pytest.fixture(scope="module")
def teacher(tiny_models):
    return load_retriever(tiny_models.teacher)


@pytest.fixture(scope="module")
def texts(world):
    return [english for english, _ in read_bitext_pairs(world / "bitext/en-sw.tsv")][:30]


@pytest.fixture
def store(teacher, texts, tmp_path):
    return write_vectors(teacher, texts, tmp_path / "store", role="document", shard_texts=8)


def test_stored_vectors_equal_the_teachers(store, teacher, texts):
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


def test_a_store_has_documented_files_and_tensors(store, texts):
    shards = [f"{number:05d}.safetensors" for number in range(4)]
    index = json.loads((store / "index.json").read_text())
    assert list(index["files"]) == shards and index["documents"] == 30
    assert sorted(os.listdir(store)) == sorted(
        ["index.json", "options.json", *shards, *(f"{number:05d}.json" for number in range(4))]
    )
    tensors = load_file(store / "00003.safetensors")
    assert set(tensors) == {"vectors", "lengths", "token_ids"}
    assert (tensors["vectors"].dtype, tensors["token_ids"].dtype) == (torch.float16, torch.int32)
    assert len(tensors["vectors"]) == len(tensors["token_ids"]) == int(tensors["lengths"].sum())
    ids, tokens = read_shard(store / "00003.safetensors")
    assert len(set(ids)) == len(tokens) == len(texts) - 3 * 8


def record_writes(monkeypatch, stop_at=None):
    """Return a list that collects the numbers of written shards; optionally interrupt one."""
    numbers, write = [], StoreWriter.write

    def recorded(self, number, *rest):
        if number == stop_at:
            raise KeyboardInterrupt
        numbers.append(number)
        write(self, number, *rest)

    monkeypatch.setattr(StoreWriter, "write", recorded)
    return numbers


def test_an_interrupted_write_resumes(store, teacher, texts, tmp_path, monkeypatch):
    folder = tmp_path / "parts"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        record_writes(patch, stop_at=2)
        write_vectors(teacher, texts, folder, role="document", shard_texts=8)
    with pytest.raises(ValueError, match="no finished store of token vectors"):
        StoredVectors([folder], role="document")
    # A damaged shard is written again, whole ones are kept.
    (folder / "00001.safetensors").write_bytes(b"torn")
    written = record_writes(monkeypatch)
    write_vectors(teacher, texts, folder, role="document", shard_texts=8)
    assert written == [1, 2, 3]
    for name in ("00001.safetensors", "00003.safetensors", "00003.json", "index.json"):
        assert (folder / name).read_bytes() == (store / name).read_bytes()


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_shard_with_a_damaged_checksum_file_is_written_again(
    store, teacher, texts, monkeypatch, content
):
    (store / "00002.json").write_text(content)
    written = record_writes(monkeypatch)
    write_vectors(teacher, texts, store, role="document", shard_texts=8)
    assert written == [2]
    assert len(StoredVectors([store], role="document")) == 30


def test_stores_of_other_settings_and_damaged_shards_are_refused(store, teacher, texts):
    with pytest.raises(ValueError, match=r"role 'document' .* but the training reads role 'query'"):
        StoredVectors([store], role="query")
    with pytest.raises(ValueError, match=r"max_length None, but .* max_length 7"):
        StoredVectors([store], role="document", max_length=7)
    with pytest.raises(ValueError, match="no stored vectors of 'never seen'"):
        StoredVectors([store], role="document").batch(["never seen"])
    with pytest.raises(ValueError, match="holds vectors of another text or order of texts"):
        write_vectors(teacher, texts[:3], store, role="document", shard_texts=8)
    with pytest.raises(ValueError, match="texts: none given"):
        write_vectors(teacher, [], store, role="document")
    shard = store / "00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\7")
    with pytest.raises(ValueError, match=r"00002\.safetensors: does not match its checksum"):
        StoredVectors([store], role="document")
    shard.unlink()
    with pytest.raises(ValueError, match=r"00002\.safetensors: does not match its checksum"):
        StoredVectors([store], role="document")


def test_training_on_stored_vectors_equals_training_with_the_teacher(
    world, tiny_models, tmp_path, teacher
):
    bitext = str(world / "bitext/en-sw.tsv")
    english = [sentence for sentence, _ in read_bitext_pairs(bitext)]
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


def test_several_workers_write_one_store(teacher, texts, store, tmp_path):
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


def test_a_store_belongs_to_one_model_by_content(store, teacher, texts):
    assert len(StoredVectors([store], role="document", model=teacher)) == 30
    # A model trained again has the same name, settings and dimension.
    with torch.no_grad():
        next(teacher.parameters()).mul_(1.5)
    with pytest.raises(ValueError, match="store: vectors of another teacher"):
        StoredVectors([store], role="document", model=teacher)
    with pytest.raises(ValueError, match="holds vectors of another model, by its content"):
        write_vectors(teacher, texts, store, role="document", shard_texts=8)


def test_a_damaged_record_of_the_options_loses_no_shard(store, teacher, texts, monkeypatch):
    (store / "options.json").write_text('{"role": "docu')
    written = record_writes(monkeypatch)
    write_vectors(teacher, texts, store, role="document", shard_texts=8)
    assert written == [] and len(StoredVectors([store], role="document")) == 30
    with pytest.raises(ValueError, match="holds vectors of other texts or options"):
        write_vectors(teacher, texts, store, role="query", shard_texts=8)
