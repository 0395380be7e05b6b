"""The commands `align`, `export` and `lexicon`, which use models and bitext."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optical.cli.arguments import (
    FIGURE_SUFFIXES,
    ROLES,
    at_least,
    check_inputs,
    check_not_input,
    check_output_folder,
    check_passages,
    number,
)
from optical.cli.shared import (
    add_command,
    add_device_argument,
    add_encoding_arguments,
    add_json_argument,
    add_worker_arguments,
    check_device,
    check_installed,
    load_model,
    quiet_libraries,
    report_output,
    workers_of,
)
from optical.io.files import atomic_text, writable_file

ALIGNMENT_FORMATS = ("pharaoh", "tsv", "lexicon", "figure")
EXPORT_FORMATS = ("pylate", "tokens")
PRECISIONS = ("float32", "float16")
BITEXT_HELP = "File of parallel sentences, `English TAB other`."


def register(subparsers: Any) -> None:
    _register_lexicon(subparsers)
    _register_align(subparsers)
    _register_export(subparsers)


def _register_lexicon(subparsers: Any) -> None:
    command = add_command(
        subparsers,
        "lexicon",
        lexicon,
        "Learn a bilingual lexicon from parallel sentences.",
        "optical lexicon en-sw.tsv --output en-sw.lexicon.tsv",
    )
    command.add_argument(
        "bitext", nargs="+", help="Files of parallel sentences, `English TAB other`."
    )
    _add_max_pairs_argument(command)
    command.add_argument(
        "--least-probability",
        type=number(0, 1),
        default=0.3,
        help="Minimum probability of a translation (default: 0.3).",
    )
    command.add_argument(
        "--least-count",
        type=at_least(1),
        default=3,
        help="Minimum number of pairs that contain the word (default: 3).",
    )
    command.add_argument("--output", required=True, help="Lexicon to write; .gz compresses it.")
    add_json_argument(command)


def _register_align(subparsers: Any) -> None:
    command = add_command(
        subparsers,
        "align",
        align,
        "Align the words of bitext with two models.",
        "optical align runs/sw/final --teacher runs/teacher/final --bitext en-sw.tsv "
        "--output en-sw.align",
    )
    command.add_argument("model", help="The student, which encodes the other language.")
    command.add_argument("--teacher", help="The model that encodes English (default: the student).")
    command.add_argument("--bitext", required=True, help=BITEXT_HELP)
    command.add_argument(
        "--format",
        choices=ALIGNMENT_FORMATS,
        default="pharaoh",
        help="Format of the output (default: pharaoh).",
    )
    command.add_argument(
        "--role",
        choices=ROLES,
        default="document",
        help="Role of the texts, as in training (default: document).",
    )
    command.add_argument(
        "--epsilon",
        type=number(0, include_low=False),
        default=0.05,
        help="Entropic regularisation of the transport plan (default: 0.05).",
    )
    command.add_argument(
        "--mutual", action="store_true", help="Keep only links that are best in both directions."
    )
    _add_max_pairs_argument(command)
    command.add_argument(
        "--pair",
        type=at_least(1),
        default=1,
        help="Number of the pair to draw with --format figure, from 1 (default: 1).",
    )
    command.add_argument(
        "--output", required=True, help="File to write; a figure needs a name such as plan.png."
    )
    add_device_argument(command)
    add_json_argument(command)


def _register_export(subparsers: Any) -> None:
    command = add_command(
        subparsers,
        "export",
        export,
        "Write a model for PyLate, or the token vectors of documents.",
        "optical export runs/sw/final --format pylate --output runs/sw/pylate",
    )
    command.add_argument("model", help="Model: a Hugging Face name or a folder.")
    command.add_argument(
        "--format",
        required=True,
        choices=EXPORT_FORMATS,
        help="pylate: a model that PyLate loads; tokens: token vectors of documents.",
    )
    command.add_argument(
        "--role",
        choices=ROLES,
        help="With pylate, the part of a Router to export; with tokens, the role of the documents "
        "(default: document).",
    )
    command.add_argument(
        "--documents",
        help="File of documents for --format tokens: TSV, JSON lines or TREC documents.",
    )
    command.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="Precision of the token vectors (default: float32).",
    )
    add_encoding_arguments(command)
    add_device_argument(command)
    add_worker_arguments(command)
    command.add_argument("--output", required=True, help="Folder to write.")
    add_json_argument(command)


def _add_max_pairs_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--max-pairs",
        type=at_least(1),
        help="Maximum number of pairs read from each file (default: all).",
    )


def lexicon(
    bitext: list[str],
    max_pairs: int | None,
    least_probability: float,
    least_count: int,
    output: str,
    as_json: bool,
) -> int:
    """Learn a lexicon by IBM model 1."""
    from optical.data.lexicon import induce_lexicon, write_lexicon
    from optical.data.pairs import check_bitext, iter_distinct_pairs

    writable_file(output)
    check_not_input(output, bitext)
    for path in bitext:
        check_bitext(path, max_pairs)
    pair_count = itertools.count()
    pairs = (
        pair
        for path in bitext
        for pair in iter_distinct_pairs(path, max_pairs=max_pairs)
        if next(pair_count) >= 0
    )
    entries = induce_lexicon(pairs, least_probability=least_probability, least_count=least_count)
    write_lexicon(entries, output)
    counts = {"entries": len(entries), "pairs": next(pair_count)}
    return report_output(output, counts, as_json)


def align(
    model: str,
    teacher: str | None,
    bitext: str,
    format: str,
    role: str,
    epsilon: float,
    mutual: bool,
    max_pairs: int | None,
    pair: int,
    output: str,
    device: str | None,
    as_json: bool,
) -> int:
    """Write the word alignments of bitext, or a lexicon or a figure made from them."""
    check_installed("sentence_transformers", "train", "word alignment")
    if format == "figure":
        check_installed("matplotlib", "study", "drawing figures")
        if Path(output).suffix.lower() not in FIGURE_SUFFIXES:
            raise ValueError(f"output: {output}, expected a name in {', '.join(FIGURE_SUFFIXES)}")
    from optical.data.pairs import check_bitext, iter_bitext_pairs
    from optical.models.retriever import check_model

    writable_file(output)
    check_not_input(output, [bitext])
    check_device(device)
    for name in (model, teacher):
        if name is not None:
            check_model(name)
    check_bitext(bitext, max_pairs)
    pairs = itertools.islice(iter_bitext_pairs(bitext), max_pairs)
    student = load_model(model, device)
    models = student, load_model(teacher, device) if teacher else student
    options: dict[str, Any] = {"role": role, "epsilon": epsilon}
    if format == "figure":
        counts = _draw_alignment(models, pairs, pair, bitext, output, options)
    elif format == "lexicon":
        counts = _write_aligned_lexicon(models, list(pairs), output, options)
    else:
        counts = _write_links(models, pairs, format, output, options | {"mutual": mutual})
        if not counts["pairs"]:
            raise ValueError(f"{bitext}: no sentence pair in it")
    return report_output(output, counts, as_json)


def _write_links(
    models: tuple[Any, Any],
    pairs: Iterable[Any],
    format: str,
    output: str,
    options: dict[str, Any],
) -> dict[str, int]:
    """Write word links in the format of Pharaoh, or as TSV with words and shares."""
    from optical.models.word_alignment import align_words, format_pharaoh

    pairs, shown = itertools.tee(pairs)
    pair_count = link_count = 0
    with atomic_text(Path(output)) as file:
        if format == "tsv":
            file.write("pair\tenglish_number\tenglish\tother_number\tother\tshare\n")
        aligned = align_words(*models, pairs, **options)
        for pair_count, (links, pair) in enumerate(zip(aligned, shown, strict=True), start=1):
            link_count += len(links)
            if format == "pharaoh":
                file.write(format_pharaoh(links) + "\n")
                continue
            english, other = (text.split() for text in pair)
            for e, o, share in links:
                file.write(f"{pair_count}\t{e}\t{english[e]}\t{o}\t{other[o]}\t{share:.4f}\n")
    return {"pairs": pair_count, "links": link_count}


def _draw_alignment(
    models: tuple[Any, Any],
    pairs: Iterable[Any],
    pair: int,
    bitext: str,
    output: str,
    options: dict[str, Any],
) -> dict[str, int]:
    from optical.models.word_alignment import align_tokens
    from optical.report.figures import draw_alignment
    from optical.report.style import save
    from optical.report.table import plan_rows

    sentences = next(itertools.islice(pairs, pair - 1, None), None) if pair > 0 else None
    if sentences is None:
        raise ValueError(f"pair: {pair}, expected the number of a pair in {bitext}")
    english, other = sentences
    aligned = align_tokens(*models, other, english, **options)
    path = Path(output)
    figure = draw_alignment(plan_rows({"language": "", **aligned}))
    save(figure, path, (path.suffix[1:],))
    return {
        "English tokens": len(aligned["english_tokens"]),
        "other tokens": len(aligned["other_tokens"]),
    }


def _write_aligned_lexicon(
    models: tuple[Any, Any], pairs: list[Any], output: str, options: dict[str, Any]
) -> dict[str, int]:
    from optical.data.lexicon import lexicon_from_links, write_lexicon
    from optical.models.word_alignment import word_links

    links = [
        (english, other, share)
        for pair_links in word_links(*models, pairs, **options)
        for (english, other), share in pair_links.items()
    ]
    entries = lexicon_from_links(links)
    write_lexicon(entries, output)
    return {"pairs": len(pairs), "entries": len(entries)}


def export(
    model: str,
    format: str,
    role: str | None,
    documents: str | None,
    precision: str,
    batch_size: int,
    passage_length: int | None,
    passage_stride: int | None,
    device: str | None,
    worker: int | None,
    workers: int | None,
    output: str,
    as_json: bool,
) -> int:
    """Write a model for PyLate, or the token vectors of documents for other programs."""
    if (format == "tokens") != bool(documents):
        raise ValueError("documents: expected a file with --format tokens, and none with pylate")
    if format == "pylate" and passage_length:
        raise ValueError("passage_length: given with --format pylate, which writes no documents")
    check_passages(passage_length, passage_stride)
    check_device(device)
    check_installed("sentence_transformers", "train", "an export")
    from optical.models.retriever import check_model

    check_model(model)
    check_output_folder(output)
    if format == "pylate" and Path(output).is_dir() and any(Path(output).iterdir()):
        raise ValueError(f"{output}: not empty; choose another folder")
    check_inputs([documents])
    share = workers_of(worker, workers) if format == "tokens" else (0, 1)
    if format == "pylate":
        quiet_libraries()
        from optical.models.pylate import export_pylate

        return report_output(str(export_pylate(model, output, role=role or "")), {}, as_json)
    retriever = load_model(model, device)
    from optical.data.texts import iter_texts
    from optical.retrieval.index import FileIndex, write_index

    assert documents is not None
    folder = write_index(
        retriever,
        iter_texts(documents),
        output,
        role=role or "document",
        precision=precision,
        batch_size=batch_size,
        passage_length=passage_length,
        passage_stride=passage_stride,
        worker=share[0],
        workers=share[1],
    )
    # The process that finishes last writes this file.
    finished = (folder / "index.json").is_file()
    counts = {"documents": len(FileIndex(folder))} if finished else {}
    return report_output(str(folder), counts, as_json)
