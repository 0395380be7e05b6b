"""Every example script runs on small untrained models, reduces its loss, and stays short."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
ENGLISH = ["the book is old", "the house is big", "a child reads", "water is cold", "we eat bread"]
SWAHILI = ["kitabu ni cha zamani", "nyumba ni kubwa", "mtoto anasoma", "maji ni baridi", "tunakula"]


def example(name):
    """The global names of an example script, without running it as the main program."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with an untrained encoder and tokenizer per language, and a bitext."""
    pytest.importorskip("sentence_transformers", reason="the extra `train` is not installed")
    from optical.models import tokenizers
    from optical.training import pretraining

    folder = tmp_path_factory.mktemp("examples")
    torch.manual_seed(0)
    for name, texts in (("english", ENGLISH), ("swahili", SWAHILI)):
        tokenizer = tokenizers.train_tokenizer(texts, 100, 32)
        options = pretraining.EncoderOptions(hidden_size=16, layers=1, heads=2)
        pretraining.new_encoder(options, len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lines = [f"{source}\t{target}\n" for source, target in zip(ENGLISH, SWAHILI, strict=True)]
    (folder / "en-sw.tsv").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def bitext():
    """The sentence pairs as a dataset."""
    datasets = pytest.importorskip("datasets", reason="the extra `train` is not installed")
    return datasets.Dataset.from_dict({"english": ENGLISH, "non_english": SWAHILI})


SHORT_RUN = {
    "max_steps": 20,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 5,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}
EVALUATED_RUN = {**SHORT_RUN, "eval_strategy": "steps", "eval_steps": 10}


def logged(trainer, name="loss"):
    """The logged values of a quantity, in the order of the steps."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_examples_have_less_than_sixty_lines(path):
    assert len(path.read_text().splitlines()) < 60


def test_every_example_has_a_test():
    tested = re.findall(r'example\("(\w+)"\)', Path(__file__).read_text())
    assert set(tested) == {path.stem for path in SCRIPTS}


def test_dropin():
    losses = example("dropin")["main"]()
    assert sum(losses[-10:]) < sum(losses[:10]) / 2


def test_hugging_face_trainer(models, tmp_path):
    script = example("huggingface_trainer")
    files = [str(models / name) for name in ("english", "swahili", "en-sw.tsv")]
    trainer = script["main"](*files, str(tmp_path), **SHORT_RUN)
    first, *_, last = logged(trainer)
    assert last < first / 2
    assert not any(parameter.requires_grad for parameter in trainer.teacher.parameters())
    from transformers import AutoModel, AutoTokenizer

    reloaded = AutoModel.from_pretrained(tmp_path).state_dict()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(reloaded[name], value, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(tmp_path).tokenize("kitabu") == ["kitabu"]


def test_lightning(models, tmp_path):
    pytest.importorskip("lightning", reason="the extra `lightning` is not installed")
    script = example("lightning_module")
    files = [str(models / name) for name in ("english", "swahili", "en-sw.tsv")]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu"}
    final_costs = []
    for epochs in (1, 20):
        torch.manual_seed(0)
        module = script["main"](
            *files, str(tmp_path), learning_rate=1e-2, batch_size=5, max_epochs=epochs, **quiet
        )
        final_costs.append(float(module.trainer.callback_metrics["ot_cost"]))
    assert final_costs[1] < final_costs[0] / 2
    # Lightning must leave the teacher in evaluation mode, without dropout.
    assert not any(part.training for part in module.teacher.modules())
    assert (tmp_path / "config.json").is_file()


def test_multi_vector_trainer(models, bitext, tmp_path):
    script = example("multi_vector_trainer")
    folders = [str(models / name) for name in ("english", "swahili")]
    trainer = script["main"](*folders, str(tmp_path), bitext, bitext, **EVALUATED_RUN)
    first, *_, last = logged(trainer)
    assert last < first / 2
    assert logged(trainer, "eval_held-out_maxsim_accuracy@1")[-1] >= 0.8
    card = (tmp_path / "final" / "README.md").read_text()
    assert "OTDistillationLoss" in card and "huang2023optical" in card
    assert "<code>english</code> and <code>non_english</code>" in card


def test_dense_student(models, bitext, tmp_path):
    pytest.importorskip("sentence_transformers", reason="the extra `train` is not installed")
    from sentence_transformers import SentenceTransformer

    script = example("dense_student")
    folders = [str(models / name) for name in ("english", "swahili")]
    trainer = script["main"](*folders, str(tmp_path), bitext, bitext, **EVALUATED_RUN)
    first, *_, last = logged(trainer)
    assert last < first / 2
    halfway, at_end = logged(trainer, "eval_held-out_negative_mse")
    assert halfway < at_end < 0
    reloaded = SentenceTransformer(str(tmp_path / "final"))
    assert reloaded.encode(SWAHILI).shape == (5, 16)
    assert "huang2023optical" in (tmp_path / "final" / "README.md").read_text()


def test_router(models, tmp_path):
    script = example("router")
    for name, texts, key in (("documents", ENGLISH, "d"), ("queries", SWAHILI, "q")):
        rows = [{"id": f"{key}{i}", "text": text} for i, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from optical.models.retriever import load_retriever

    load_retriever(models / "english").save_pretrained(str(tmp_path / "teacher"))
    files = [tmp_path / "teacher", models / "swahili", models / "en-sw.tsv"]
    files += [tmp_path / "documents.jsonl", tmp_path / "queries.jsonl", tmp_path / "out"]
    model, (ids, indexed), run = script["main"](*map(str, files), **SHORT_RUN)
    # The trained student retrieves from the index that was built before its training.
    assert sum(next(iter(run[f"q{i}"])) == f"d{i}" for i in range(5)) >= 4
    from optical.models.encoding import encode

    encoded = encode(model, ENGLISH, "document")
    assert ids == [f"d{i}" for i in range(5)]
    assert torch.equal(encoded.vectors, indexed.vectors)
    assert (tmp_path / "out" / "router.run").is_file()


def test_mteb_student(world, tiny_models, tmp_path):
    """A student gets the measures in MTEB that this package computes."""
    pytest.importorskip("mteb", minversion="2.22", reason="needs the package mteb 2.22 or newer")
    from optical.data import load_collection
    from optical.models.retriever import load_retriever
    from optical.retrieval.evaluation import evaluate
    from optical.retrieval.exact_search import search

    folder = tmp_path / "tiny"
    (folder / "qrels").mkdir(parents=True)
    documents = (world / "documents/sw.jsonl").read_text().splitlines()
    with open(folder / "corpus.jsonl", "w") as file:
        for line in documents:
            document = json.loads(line)
            print(json.dumps({"_id": document["id"], "text": document["text"]}), file=file)
    with open(folder / "queries.jsonl", "w") as file:
        for line in (world / "queries.tsv").read_text().splitlines():
            query, text = line.split("\t")
            print(json.dumps({"_id": query, "text": text}), file=file)
    with open(folder / "qrels/test.tsv", "w") as file:
        print("query-id\tcorpus-id\tscore", file=file)
        for line in (world / "qrels.txt").read_text().splitlines():
            query, _, document, grade = line.split()
            print(query, document, grade, sep="\t", file=file)

    # The teacher stands for the student with a prompt, so that the sides differ.
    student = load_retriever(tiny_models.teacher)
    student.prompts = {"query": "lamp ", "document": "kitabu taa "}
    student.save_pretrained(str(tmp_path / "student"))
    arguments = (tiny_models.teacher, str(tmp_path / "student"), "document", str(folder))
    results = example("mteb_student")["main"](*arguments, str(tmp_path / "out"))
    (found,) = results.task_results[0].scores["test"]

    collection = load_collection(folder)
    run = search(
        load_retriever(tiny_models.teacher),
        collection,
        document_model=load_retriever(str(tmp_path / "student")),
    )
    expected = evaluate(run, collection.qrels, ["nDCG@10", "AP@100", "R@10"]).mean
    for name, measure in (("ndcg_at_10", "nDCG@10"), ("map_at_100", "AP@100")):
        assert found[name] == pytest.approx(expected[measure], abs=1e-4)
    assert found["main_score"] == found["ndcg_at_10"]
    assert found["recall_at_10"] == pytest.approx(expected["R@10"], abs=1e-4)
