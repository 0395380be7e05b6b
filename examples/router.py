"""A fixed English index: index first, train later, search with foreign queries.

The teacher encodes the documents once. A student trained later encodes queries in another language.
A Router combines both into one model, whose document vectors equal the teacher's bit for bit.

python examples/router.py TEACHER STUDENT en-sw.tsv documents.en.jsonl queries.sw.tsv OUTPUT
"""

import sys

from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Router

from optical.data.texts import read_texts
from optical.data.trec import write_run
from optical.models.encoding import encode
from optical.models.retriever import load_retriever
from optical.retrieval.exact_search import search_vectors
from optical.training import recipes, runner


def index(teacher, documents):
    """Return ids and token vectors of the English documents; no student exists yet."""
    texts = read_texts(documents)
    return list(texts), encode(load_retriever(teacher), list(texts.values()), "document")


def train(teacher, student, bitext, output, **changes):
    """Distil a student for queries; save and return the model that encodes both sides."""
    options = recipes.DistillOptions(
        teacher=teacher, student=student, bitext=[bitext], role="query"
    )
    args = recipes.trainer_arguments(f"{output}/student", **changes)
    student = runner.run(recipes.distill(options, args), options, resume=True)
    sides = [list(load_retriever(name)) for name in (student, teacher)]
    model = MultiVectorEncoder(modules=[Router.for_query_document(*sides)])
    model.save_pretrained(f"{output}/router")
    return MultiVectorEncoder(f"{output}/router")


def main(teacher, student, bitext, documents, queries, output, **changes):
    indexed = index(teacher, documents)
    model = train(teacher, student, bitext, output, **changes)
    texts = read_texts(queries)
    asked = list(texts), encode(model, list(texts.values()), "query")
    run = search_vectors(asked, indexed, depth=100)
    write_run(run, f"{output}/router.run", tag="router")
    return model, indexed, run


if __name__ == "__main__":
    main(*sys.argv[1:])
