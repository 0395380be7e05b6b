"""A trained student in MTEB (2.22 or newer), on one of its tasks or on a collection of your own.

The student encodes the texts of its role, the teacher the others; a Router combines both.

python examples/mteb_student.py TEACHER STUDENT document BelebeleRetrieval OUTPUT
python examples/mteb_student.py TEACHER STUDENT document FOLDER_IN_BEIR_LAYOUT OUTPUT
"""

import sys
from pathlib import Path

import mteb
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Router

from optical.data import load_collection
from optical.models.retriever import load_retriever


def combine(teacher, student, role):
    models = {"query": load_retriever(teacher), "document": load_retriever(teacher)}
    models[role] = load_retriever(student)
    prompts = {side: model.prompts[side] for side, model in models.items()}
    router = Router.for_query_document(*map(list, models.values()))
    return MultiVectorEncoder(modules=[router], prompts=prompts)


class LocalTask(AbsTaskRetrieval):
    folder = ""
    metadata = mteb.TaskMetadata(
        name="LocalRetrieval", description="A folder in BEIR layout.", type="Retrieval",
        dataset={"path": "local", "revision": "1"}, eval_splits=["test"], eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
    )  # fmt: skip

    def load_data(self, num_proc=None, **kwargs):
        found = load_collection(self.folder)
        split = {"relevant_docs": found.qrels, "top_ranked": None}
        for name, texts in (("queries", found.queries), ("corpus", found.documents)):
            split[name] = Dataset.from_dict({"id": list(texts), "text": list(texts.values())})
        self.dataset, self.data_loaded = {"default": {"test": split}}, True


def main(teacher, student, role, task, output):
    LocalTask.folder = task
    tasks = [LocalTask()] if Path(task).is_dir() else list(mteb.get_tasks([task]))
    # No cache: it knows models by their names, and a combined model has none.
    model = combine(teacher, student, role)
    results = mteb.evaluate(model, tasks, cache=None, prediction_folder=output)
    for result in results.task_results:
        print(result.task_name, result.get_score())
    return results


if __name__ == "__main__":
    main(*sys.argv[1:])
