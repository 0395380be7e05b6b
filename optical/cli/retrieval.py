"""The command `search`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from optical.cli.arguments import (
    at_least,
    check_inputs,
    check_not_input,
    check_passages,
    check_tag,
)
from optical.cli.shared import (
    add_command,
    add_device_argument,
    add_encoding_arguments,
    add_identical_argument,
    add_json_argument,
    add_split_argument,
    check_device,
    check_installed,
    load_model,
    report_output,
)

logger = logging.getLogger("optical")

# The recall of an approximate search is that of this many best documents.
RECALL_DEPTH = 100


def register(subparsers: Any) -> None:
    command = add_command(
        subparsers,
        "search",
        search,
        "Search a collection exactly and write a TREC run.",
        "optical search runs/sw/final --collection wikiclir/sw --output sw.run",
    )
    command.add_argument(
        "model", help="Model of the queries and documents: a Hugging Face name or a folder."
    )
    command.add_argument(
        "--document-model",
        help="Model of the documents, if it is another one than that of the queries.",
    )
    command.add_argument("--collection", help="Collection: an ir_datasets id or a BEIR folder.")
    add_split_argument(command)
    command.add_argument(
        "--query-field",
        action="append",
        metavar="FIELD",
        help="Field that forms the query, such as title, desc or narr; may be repeated (default: "
        "the title of TREC topics, the text of other queries).",
    )
    add_identical_argument(command)
    command.add_argument(
        "--queries",
        help="File of queries: TSV, JSON lines or TREC topics. Replaces those of the collection.",
    )
    command.add_argument(
        "--documents",
        help="File of documents: TSV, JSON lines or TREC documents. Replaces those "
        "of the collection.",
    )
    command.add_argument(
        "--depth",
        type=at_least(1),
        default=1000,
        help="Number of documents per query (default: 1000).",
    )
    add_encoding_arguments(command)
    add_device_argument(command)
    _add_index_arguments(command)
    command.add_argument("--output", required=True, help="Run to write; .gz compresses it.")
    add_json_argument(command)
    command.add_argument(
        "--tag", help="Name in the last column of the run (default: the name of the model)."
    )


def _add_index_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--index",
        help="Search token vectors written by `export` or `index`: a folder or an address.",
    )
    command.add_argument(
        "--any-model",
        action="store_true",
        help="With --index, do not check that the model shares the vector space of the index.",
    )
    command.add_argument(
        "--approximate",
        action="store_true",
        help="With --index, use the approximate index of `optical index --approximate`; the recall "
        "against exact search is measured on 20 queries.",
    )
    command.add_argument(
        "--refine",
        type=at_least(1),
        help="With --approximate, number of candidates that are scored by their vectors, as a "
        "multiple of --depth (default: 10, or as many as make 1000). More of them raise the recall "
        "and the time.",
    )


def search(
    model: str,
    document_model: str | None,
    collection: str | None,
    split: str,
    query_field: list[str] | None,
    ignore_identical_ids: bool,
    queries: str | None,
    documents: str | None,
    depth: int,
    batch_size: int,
    passage_length: int | None,
    passage_stride: int | None,
    device: str | None,
    index: str | None,
    any_model: bool,
    approximate: bool,
    refine: int | None,
    output: str,
    as_json: bool,
    tag: str | None,
) -> int:
    """Search a collection, or an index of its token vectors, and write a run."""
    from optical.data.texts import read_texts
    from optical.data.trec import without_identical_ids, write_run
    from optical.io.files import writable_file

    check_installed("sentence_transformers", "train", "a search")
    tag = check_tag(tag, model)
    check_passages(passage_length, passage_stride)
    writable_file(output)
    check_not_input(output, [queries, documents])
    check_device(device)
    if any_model and not index:
        raise ValueError("any_model: given without --index, which alone records a model")
    if approximate and not index:
        raise ValueError("approximate: given without --index, which alone has such an index")
    if refine and not approximate:
        raise ValueError("refine: given without --approximate, whose candidates it counts")
    # The document that is left out must not shorten the ranking.
    searched_depth = depth + ignore_identical_ids
    fields = tuple(query_field or ())
    if index:
        refused = {
            "collection": collection,
            "documents": documents,
            "document_model": document_model,
            "passage_length": passage_length,
        }
        for name, value in refused.items():
            if value:
                raise ValueError(f"{name}: given with --index, which already holds its documents")
        if not queries:
            raise ValueError("queries: none given; with --index expected a file of queries")
        run, counts = _search_index(
            model,
            index,
            read_texts(queries, topic_fields=fields),
            depth=searched_depth,
            batch_size=batch_size,
            any_model=any_model,
            approximate=approximate,
            refine=refine,
            device=device,
        )
    else:
        run, counts = _search_collection(
            model,
            _load_texts(collection, queries, documents, (model, document_model), split, fields),
            document_model=document_model,
            device=device,
            depth=searched_depth,
            batch_size=batch_size,
            passage_length=passage_length,
            passage_stride=passage_stride,
        )
    if ignore_identical_ids:
        run = without_identical_ids(run, depth)
    write_run(run, output, tag=tag)
    return report_output(output, {"queries": len(run), **counts}, as_json)


def _load_texts(
    collection: str | None,
    queries: str | None,
    documents: str | None,
    models: tuple[str | None, ...],
    split: str,
    fields: tuple[str, ...],
) -> Any:
    """Return the collection to search, which needs no relevance judgements."""
    from optical.data.collection import Collection, load_collection
    from optical.data.texts import read_texts

    if not collection and not (queries and documents):
        raise ValueError("nothing to search; expected --collection, or --queries with --documents")
    check_inputs([queries, documents])
    logger.info("reading the queries and documents")
    from optical.models.retriever import check_model

    for name in models:
        if name is not None:
            check_model(name)
    if collection:
        return load_collection(
            collection,
            queries=queries,
            documents=documents,
            split=split,
            topic_fields=fields,
            judged=False,
        )
    assert queries is not None and documents is not None
    texts = read_texts(queries, topic_fields=fields)
    return Collection(Path(documents).stem, texts, read_texts(documents), {})


def _search_collection(
    model: str, collection: Any, *, document_model: str | None, device: str | None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Encode and search a collection; return the run and the number of documents."""
    query_model = load_model(model, device)
    from optical.retrieval.exact_search import search

    logger.info(
        "searching %d documents for %d queries", len(collection.documents), len(collection.queries)
    )
    run = search(
        query_model,
        collection,
        document_model=load_model(document_model, device) if document_model else None,
        progress=True,
        **options,
    )
    return run, {"documents searched": len(collection.documents)}


def _search_index(
    model: str,
    index: str,
    texts: dict[str, str],
    *,
    depth: int,
    batch_size: int,
    any_model: bool,
    approximate: bool,
    refine: int | None,
    device: str | None,
) -> tuple[Any, dict[str, Any]]:
    """Search stored token vectors; return the run, and the number of documents or the recall."""
    logger.info("opening the index %s", index)
    from optical.models.retriever import check_model
    from optical.retrieval.index import LanceIndex, open_index

    check_model(model)
    opened = open_index(index)
    if approximate:
        if not isinstance(opened, LanceIndex):
            raise ValueError(f"approximate: {index} is no database of `optical index`")
        opened.check_approximate()
    if not len(opened):
        raise ValueError(f"{index}: the index holds no documents; write it again")
    retriever = load_model(model, device)
    from optical.models.encoding import encode

    dimension = retriever.get_embedding_dimension()
    if dimension != opened.dimension:
        raise ValueError(
            f"{index}: vectors of size {opened.dimension}, expected the size of the model's "
            f"vectors, {dimension}"
        )
    if not any_model:
        opened.origin.check_searchable(retriever, index)
    logger.info("searching %d documents for %d queries", len(opened), len(texts))
    vectors = encode(retriever, list(texts.values()), "query", batch_size=batch_size)
    if not approximate or not isinstance(opened, LanceIndex):
        return opened.search(list(texts), vectors, depth=depth), {"documents searched": len(opened)}
    run = opened.search(list(texts), vectors, depth=depth, approximate=True, refine=refine)
    best = min(depth, RECALL_DEPTH)
    recall = opened.recall(list(texts), vectors, run, depth=best)
    logger.info("recall of the %d best documents of an exact search: %.3f", best, recall)
    return run, {"documents": len(opened), "recall": round(recall, 4)}
