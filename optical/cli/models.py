"""What the commands around a trained model do: align, export, index, and search an index."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optical.io.files import atomic_text, writable_folder

ALIGNMENTS = ("pharaoh", "tsv", "lexicon", "figure")
FORMATS = ("pylate", "vectors")


def align(options: argparse.Namespace) -> int:
    """Write the word alignments of bitext, or a word table or a picture made of them."""
    from optical.data.pairs import iter_bitext_pairs
    from optical.models.word_alignment import align_words, format_pharaoh

    _one_of("format", options.format, ALIGNMENTS)
    _one_of("role", options.role, ("query", "document"))
    output = Path(options.output)
    writable_folder(output.parent)
    read = itertools.islice(iter_bitext_pairs(options.bitext), options.max_pairs)
    quiet_libraries()
    from optical.models.retriever import load_retriever

    student = load_retriever(options.model)
    teacher = load_retriever(options.teacher) if options.teacher else student
    reads: dict[str, Any] = {"role": options.role, "epsilon": options.epsilon}
    if options.format == "figure":
        return _draw(student, teacher, read, options, reads)
    if options.format == "lexicon":
        return _write_lexicon(student, teacher, list(read), options, reads)
    pairs, shown = itertools.tee(read)
    count = linked = 0
    with atomic_text(output) as file:
        if options.format == "tsv":
            file.write("pair\tenglish_number\tenglish\tother_number\tother\tshare\n")
        aligned = align_words(student, teacher, pairs, mutual=options.mutual, **reads)
        for count, (links, pair) in enumerate(zip(aligned, shown, strict=True), start=1):
            linked += len(links)
            if options.format == "pharaoh":
                file.write(format_pharaoh(links) + "\n")
                continue
            english, other = (text.split() for text in pair)
            for e, o, share in links:
                file.write(f"{count}\t{e}\t{english[e]}\t{o}\t{other[o]}\t{share:.4f}\n")
    if not count:
        raise ValueError(f"{options.bitext}: no sentence pair in it")
    return done(options, {"output": str(output), "pairs": count, "links": linked})


def _draw(
    student: Any, teacher: Any, pairs: Iterable[Any], options: argparse.Namespace, reads: Any
) -> int:
    from optical.models.word_alignment import align_tokens
    from optical.report.figures import draw_alignment
    from optical.report.table import plan_rows

    chosen = None
    if options.pair > 0:
        chosen = next(itertools.islice(pairs, options.pair - 1, None), None)
    if chosen is None:
        raise ValueError(f"pair: {options.pair}, expected the number of a pair in {options.bitext}")
    english, other = chosen
    found = align_tokens(student, teacher, other, english, **reads)
    draw_alignment(plan_rows({"language": "", **found}), Path(options.output))
    tokens = len(found["english_tokens"]), len(found["other_tokens"])
    drawn = {"output": options.output, "English tokens": tokens[0], "other tokens": tokens[1]}
    return done(options, drawn)


def _write_lexicon(
    student: Any, teacher: Any, pairs: list[Any], options: argparse.Namespace, reads: Any
) -> int:
    from optical.data.lexicon import lexicon_from_links, write_lexicon
    from optical.models.word_alignment import word_links

    links = [
        (english, other, share)
        for found in word_links(student, teacher, pairs, **reads)
        for (english, other), share in found.items()
    ]
    entries = lexicon_from_links(links)
    write_lexicon(entries, options.output)
    written = {"output": options.output, "pairs": len(pairs), "entries": len(entries)}
    return done(options, written)


def export(options: argparse.Namespace) -> int:
    """Write a model for PyLate, or the vectors of documents for any other program."""
    _one_of("format", options.format, FORMATS)
    if (options.format == "vectors") != bool(options.documents):
        raise ValueError("documents: expected a file with --format vectors, and none with pylate")
    if options.format == "pylate" and options.passage_length:
        raise ValueError("passage_length: given with --format pylate, which writes no documents")
    quiet_libraries()
    if options.format == "pylate":
        from optical.models.pylate import export_pylate

        folder = export_pylate(options.model, options.output, role=options.side or "")
        return done(options, {"output": str(folder)})
    from optical.data.texts import iter_texts
    from optical.models.retriever import load_retriever
    from optical.retrieval.index import FileIndex, write_index

    folder = write_index(
        load_retriever(options.model),
        iter_texts(options.documents),
        options.output,
        role=options.side or "document",
        precision=options.precision,
        batch_size=options.batch_size,
        passage_length=options.passage_length,
        passage_stride=options.passage_stride,
    )
    return done(options, {"output": str(folder), "documents": len(FileIndex(folder))})


def index(options: argparse.Namespace) -> int:
    """Encode documents into a vector database."""
    from optical.data.texts import iter_texts

    if options.collection:
        from optical.data.collection import load_collection

        documents: Iterable[tuple[str, str]] = load_collection(options.collection).documents.items()
    elif options.documents:
        documents = iter_texts(options.documents)
    else:
        raise ValueError("--collection or --documents says what to index")
    quiet_libraries()
    from optical.models.retriever import load_retriever
    from optical.retrieval.index import LanceIndex, write_database

    model = load_retriever(options.model)
    added = write_database(
        model,
        documents,
        options.output,
        batch_size=options.batch_size,
        passage_length=options.passage_length,
        passage_stride=options.passage_stride,
    )
    total = len(LanceIndex(options.output))
    return done(options, {"output": options.output, "added": added, "documents": total})


def search_index(options: argparse.Namespace) -> tuple[Any, int]:
    """Search vectors that were written before; returns the run and the number of documents."""
    from optical.data.texts import read_texts
    from optical.retrieval.index import open_index

    if not options.queries:
        raise ValueError("queries: none given; with --index expected a file of queries")
    for name in ("collection", "documents", "document_model", "passage_length"):
        if getattr(options, name):
            raise ValueError(f"{name}: given with --index, which holds its documents already")
    texts = read_texts(options.queries)
    found = open_index(options.index)
    quiet_libraries()
    from optical.models.encoding import encode
    from optical.models.retriever import load_retriever

    model = load_retriever(options.model)
    if model.get_embedding_dimension() != found.dimension:
        raise ValueError(
            f"{options.index}: vectors of size {found.dimension}, the model makes them of size "
            f"{model.get_embedding_dimension()}"
        )
    asked = encode(model, list(texts.values()), "query", batch_size=options.batch_size)
    return found.search(list(texts), asked, depth=options.depth), len(found)


def done(options: argparse.Namespace, found: dict[str, Any]) -> int:
    """Say what was written, for a reader or with --json for a program; returns the exit code 0."""
    if options.json:
        print(json.dumps(found))
    else:
        (_, output), *counts = found.items()
        told = ", ".join(f"{value} {name}" for name, value in counts)
        print(f"{output}: {told}" if told else output)
    return 0


def quiet_libraries() -> None:
    """Loading reports and shard bars of the libraries would hide the project's own lines."""
    import warnings

    from transformers.utils import logging as transformers_logging

    silence: Any = transformers_logging
    silence.set_verbosity_error()
    silence.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    import datasets

    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def _one_of(name: str, value: str, wanted: tuple[str, ...]) -> None:
    if value not in wanted:
        raise ValueError(f"{name}: {value!r}, expected {' or '.join(wanted)}")
