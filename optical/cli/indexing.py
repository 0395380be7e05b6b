"""The commands `index` and `vectors`, which several processes may run on one output together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optical.cli.arguments import (
    ROLES,
    at_least,
    check_inputs,
    check_output_folder,
    check_passages,
)
from optical.cli.models import BITEXT_HELP
from optical.cli.shared import (
    add_command,
    add_device_argument,
    add_encoding_arguments,
    add_json_argument,
    add_worker_arguments,
    check_device,
    check_installed,
    load_model,
    report_output,
    workers_of,
)


def register(subparsers: Any) -> None:
    _register_index(subparsers)
    _register_vectors(subparsers)


def _register_index(subparsers: Any) -> None:
    command = add_command(
        subparsers,
        "index",
        index,
        "Encode documents into a vector database (LanceDB).",
        "optical index runs/teacher/final --documents documents.jsonl --output runs/base",
    )
    command.add_argument("model", help="Model: a Hugging Face name or a folder.")
    command.add_argument("--collection", help="Collection: an ir_datasets id or a BEIR folder.")
    command.add_argument(
        "--documents", help="File of documents: TSV, JSON lines or TREC documents."
    )
    add_encoding_arguments(command)
    add_device_argument(command)
    add_worker_arguments(command)
    command.add_argument(
        "--approximate",
        action="store_true",
        help="Then build an index for approximate search, which exact search ignores.",
    )
    command.add_argument(
        "--output", required=True, help="Database: a folder, s3://bucket/name or db://name."
    )
    add_json_argument(command)


def _register_vectors(subparsers: Any) -> None:
    command = add_command(
        subparsers,
        "vectors",
        vectors,
        "Store a teacher's token vectors of the English sentences of bitext.",
        "optical vectors runs/teacher/final --bitext en-sw.tsv --role document --output v",
    )
    command.add_argument("model", help="The teacher: a Hugging Face name or a folder.")
    command.add_argument("--bitext", required=True, help=BITEXT_HELP)
    command.add_argument(
        "--role", required=True, choices=ROLES, help="Role of the texts, as in training."
    )
    command.add_argument(
        "--max-length",
        type=at_least(1),
        help="Maximum length of a text in tokens, as in training (default: the model's length).",
    )
    command.add_argument(
        "--output", required=True, help="Folder to write; an interrupted run continues in it."
    )
    add_device_argument(command)
    add_worker_arguments(command)
    add_json_argument(command)


def index(
    model: str,
    collection: str | None,
    documents: str | None,
    batch_size: int,
    passage_length: int | None,
    passage_stride: int | None,
    device: str | None,
    worker: int | None,
    workers: int | None,
    approximate: bool,
    output: str,
    as_json: bool,
) -> int:
    """Encode documents into a vector database."""
    from optical.data.collection import load_documents
    from optical.data.texts import iter_texts
    from optical.models.retriever import check_model

    check_installed("sentence_transformers", "train", "an index")
    check_installed("lancedb", "index", "a vector database")
    if not collection and not documents:
        raise ValueError("nothing to index; expected --collection or --documents")
    if collection and documents:
        raise ValueError("documents: given with --collection, expected one of them")
    check_passages(passage_length, passage_stride)
    check_device(device)
    share = workers_of(worker, workers)
    if approximate and share[1] > 1:
        raise ValueError(
            "approximate: given to several processes; when all have finished, run the command once "
            "more in one process, which adds no document and builds the index"
        )
    check_model(model)
    if "://" not in output:
        check_output_folder(output)
    check_inputs([documents])
    texts: Iterable[tuple[str, str]] = (
        load_documents(collection) if collection else iter_texts(str(documents))
    )
    retriever = load_model(model, device)
    from optical.retrieval.index import LanceIndex, build_approximate, write_database

    added = write_database(
        retriever,
        texts,
        output,
        batch_size=batch_size,
        passage_length=passage_length,
        passage_stride=passage_stride,
        worker=share[0],
        workers=share[1],
    )
    if approximate:
        build_approximate(output)
    return report_output(output, {"added": added, "documents": len(LanceIndex(output))}, as_json)


def vectors(
    model: str,
    bitext: str,
    role: str,
    max_length: int | None,
    output: str,
    device: str | None,
    worker: int | None,
    workers: int | None,
    as_json: bool,
) -> int:
    """Store the teacher's token vectors."""
    check_installed("sentence_transformers", "train", "the storing of token vectors")
    from optical.data.pairs import iter_distinct_pairs
    from optical.models.retriever import check_model

    check_model(model)
    check_output_folder(output)
    check_device(device)
    share = workers_of(worker, workers)
    texts = [english for english, _ in iter_distinct_pairs(bitext)]
    teacher = load_model(model, device)
    from optical.models.token_store import write_vectors

    folder = write_vectors(
        teacher,
        texts,
        output,
        role=role,
        max_length=max_length,
        worker=share[0],
        workers=share[1],
    )
    return report_output(str(folder), {}, as_json)
