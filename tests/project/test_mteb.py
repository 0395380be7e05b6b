"""A student runs in MTEB and gets the measures that this package computes."""

import json
import runpy
from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers", reason="needs the extra `train`")
mteb = pytest.importorskip("mteb", minversion="2.22", reason="needs the package mteb 2.22 or newer")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "mteb_student.py"


def test_a_student_runs_in_mteb(world, tiny_models, tmp_path):
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
    example = runpy.run_path(str(EXAMPLE))
    arguments = (tiny_models.teacher, str(tmp_path / "student"), "document", str(folder))
    results = example["main"](*arguments, str(tmp_path / "out"))
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
