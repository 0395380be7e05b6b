"""A trained student in MTEB, on one of its tasks or on a collection of your own.

The teacher encodes the queries and the student the documents, or the reverse for a student that was
trained with `--role query`; a Router combines both into one model. Needs mteb 2.22 or newer.

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
    """Return one model in which the student encodes the texts of its role."""
    models = {"query": load_retriever(teacher), "document": load_retriever(teacher)}
    models[role] = load_retriever(student)
    prompts = {side: model.prompts[side] for side, model in models.items()}
    router = Router.for_query_document(*map(list, models.values()))
    return MultiVectorEncoder(modules=[router], prompts=prompts)


def local_task(collection):
    """Return an MTEB task whose queries, documents and judgements are those of a collection."""

    class LocalTask(AbsTaskRetrieval):
        metadata = mteb.TaskMetadata(
            name="".join(filter(str.isalnum, collection.name)).capitalize() + "Retrieval",
            description=collection.name,
            dataset={"path": "local", "revision": "1"},
            type="Retrieval",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, num_proc=None, **kwargs):
            sides = {"queries": collection.queries, "corpus": collection.documents}
            texts = {
                side: Dataset.from_list([{"id": key, "text": text} for key, text in found.items()])
                for side, found in sides.items()
            }
            split = {**texts, "relevant_docs": collection.qrels, "top_ranked": None}
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return LocalTask()


def main(teacher, student, role, task, output):
    model = combine(teacher, student, role)
    if Path(task).is_dir():
        tasks = [local_task(load_collection(task))]
    else:
        tasks = list(mteb.get_tasks([task]))
    # Results of other models with no name on the hub must not be taken from the cache.
    results = mteb.evaluate(model, tasks, cache=None, prediction_folder=output)
    for result in results.task_results:
        print(result.task_name, result.get_score())
    return results


if __name__ == "__main__":
    main(*sys.argv[1:])
