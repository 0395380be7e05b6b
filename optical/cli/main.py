"""The command line: `optical train | search | evaluate | compare | study | …`; see --help."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from optical.cli import models
from optical.cli.models import quiet_libraries
from optical.cli.train import RECIPES, train
from optical.io.settings import nearest
from optical.retrieval.evaluation import DEFAULT_MEASURES

EXAMPLES = """examples:
  optical study                                   the embedded demonstration, a few minutes
  optical study examples/clir_pack.yaml
  optical train distill --teacher runs/teacher/final --bitext en-sw.tsv --role document \\
                        --output_dir runs/sw
  optical search runs/sw/final --collection wikiclir/sw --output sw.run
  optical evaluate sw.run --qrels wikiclir/sw
  optical compare zeroshot.run sw.run --qrels wikiclir/sw
"""

# At the end of each command's own help.
EXAMPLE = {
    "study": "optical study examples/clir_pack.yaml --output runs/pack",
    "search": "optical search runs/sw/final --collection wikiclir/sw --output sw.run",
    "evaluate": 'optical evaluate sw.run --qrels wikiclir/sw --measures "AP nDCG@10" --json',
    "compare": "optical compare zeroshot.run sw.run --qrels wikiclir/sw",
    "lexicon": "optical lexicon en-sw.tsv --output en-sw.lexicon.tsv",
    "vectors": "optical vectors runs/teacher/final --bitext en-sw.tsv --role document --output v",
    "align": "optical align runs/sw/final --teacher runs/teacher/final --bitext en-sw.tsv "
    "--output en-sw.align",
    "export": "optical export runs/sw/final --format pylate --output runs/sw/pylate",
    "index": "optical index runs/teacher/final --documents documents.jsonl --output runs/base",
    "figures": "optical figures runs/pack/results.csv --output figures",
    "info": "optical info",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command: 0, 1 for a failed self-test, 2 for an error of the user's, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("optical").setLevel(logging.INFO)
    try:
        if arguments[:1] == ["train"]:
            return train(arguments[1:])
        # argparse lists every command and leaves the search to the reader.
        if arguments and arguments[0] not in EXAMPLE and not arguments[0].startswith("-"):
            meant = nearest(arguments[0], ("train", *EXAMPLE))
            raise ValueError(f"command {arguments[0]!r} is unknown{meant}")
        options, unknown = _parser().parse_known_args(arguments)
        if unknown:
            known = [name for action in options.parser._actions for name in action.option_strings]
            word = unknown[0].split("=")[0]
            meant = nearest(word, known) if word.startswith("--") else ""
            options.parser.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        result: int = options.command(options)
        return result
    except KeyboardInterrupt:
        print(f"interrupted; {_after_interrupt(arguments)}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe, `head` for one, has what it wanted.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        if sys.flags.dev_mode:  # python -X dev -m optical.cli ...
            raise
        print(f"optical: error: {error}", file=sys.stderr)
        return 2


def _after_interrupt(arguments: list[str]) -> str:
    if arguments[:1] == ["train"]:
        return "with --resume the same command continues from its last checkpoint"
    if arguments[:1] in (["study"], ["vectors"]):
        return "the same command continues where it stopped"
    return "nothing was written"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="optical",
        description="Cross-lingual retrieval by optimal-transport distillation.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    exact: Any = functools.partial(argparse.ArgumentParser, allow_abbrev=False)
    named = parser.add_subparsers(required=True, metavar="command", parser_class=exact)
    named.add_parser("train", help="train a model: " + ", ".join(RECIPES), add_help=False)

    command = named.add_parser("study", help="train, search, evaluate, compare and report")
    command.add_argument("config", nargs="?", help="YAML file; without it, the demonstration")
    command.add_argument("--output", help="output folder, in place of the configuration's")
    command.set_defaults(command=_study)

    command = named.add_parser("search", help="search a collection exactly, write a TREC run")
    command.add_argument("model", help="model for queries and documents: name or folder")
    command.add_argument("--document-model", help="another model for the documents")
    _collection_arguments(command)
    command.add_argument("--depth", type=int, default=1000, help="documents per query")
    command.add_argument("--batch-size", type=int, default=32, help="texts in one forward pass")
    _passage_arguments(command)
    command.add_argument("--index", help="search vectors of `export` or `index`: folder or address")
    command.add_argument("--output", required=True, help="the run to write; .gz compresses")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--tag", help="name in the run's last column (default: the model's)")
    command.set_defaults(command=_search)

    command = named.add_parser("evaluate", help="measures of a run")
    command.add_argument("run", help="TREC run, plain or gzip")
    _judgement_arguments(command)
    command.add_argument("--per-query", action="store_true", help="with the values of each query")
    command.set_defaults(command=_evaluate)

    command = named.add_parser("compare", help="test runs against each other, query by query")
    command.add_argument("runs", nargs="+", help="TREC runs; the first is the baseline")
    _judgement_arguments(command)
    command.add_argument("--baseline", help="another baseline, one of the runs")
    command.add_argument("--test", default="randomization", help="randomization or t")
    command.add_argument("--correction", default="holm", help="holm, bonferroni or none")
    command.add_argument("--samples", type=int, default=100_000, help="random sign patterns")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(command=_compare)

    command = named.add_parser("lexicon", help="learn a word table from parallel sentences")
    command.add_argument("bitext", nargs="+", help="files of `English TAB other`")
    command.add_argument("--max-pairs", type=int, help="the first so many pairs of each file")
    command.add_argument("--least-probability", type=float, default=0.3)
    command.add_argument("--least-count", type=int, default=3, help="pairs that have the word")
    command.add_argument("--output", required=True, help="the table to write; .gz compresses")
    command.set_defaults(command=_lexicon)

    command = named.add_parser("vectors", help="store a teacher's token vectors of bitext")
    command.add_argument("model", help="the teacher: name or folder")
    command.add_argument("--bitext", required=True, help="file of `English TAB other`")
    command.add_argument("--role", required=True, help="query or document, as in training")
    command.add_argument("--max-length", type=int, help="in tokens, as in training")
    command.add_argument("--output", required=True, help="folder to write; continues in it")
    for name, meaning in (("worker", "number of this process, from 0"), ("workers", "processes")):
        variable = {"worker": "RANK", "workers": "WORLD_SIZE"}[name]
        command.add_argument(f"--{name}", type=int, help=f"{meaning} (default: ${variable})")
    command.set_defaults(command=_vectors)

    _model_commands(named)

    command = named.add_parser("figures", help="draw a study's figures from its results.csv")
    command.add_argument("results", help="results.csv of a study")
    command.add_argument("--output", required=True, help="folder for the figures")
    command.set_defaults(command=_figures)

    command = named.add_parser("info", help="what works here, with a test of ten seconds")
    command.add_argument(
        "--seconds", type=float, default=10.0, help="for the test; 0 leaves it out"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(command=_info)
    for name, example in EXAMPLE.items():
        command = named.choices[name]
        command.epilog = f"example:\n  {example}"
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.set_defaults(parser=command)
    return parser


def _model_commands(named: Any) -> None:
    command = named.add_parser("align", help="align words of bitext with a pair of models")
    command.add_argument("model", help="the student, which reads the other language")
    command.add_argument("--teacher", help="the model that reads English (default: the student)")
    command.add_argument("--bitext", required=True, help="file of `English TAB other`")
    command.add_argument("--format", default="pharaoh", help=" | ".join(models.ALIGNMENTS))
    command.add_argument("--role", default="document", help="query or document, as in training")
    command.add_argument("--epsilon", type=float, default=0.05, help="temperature of the plan")
    command.add_argument("--mutual", action="store_true", help="links that both sides choose only")
    command.add_argument("--max-pairs", type=int, help="the first so many pairs")
    command.add_argument("--pair", type=int, default=1, help="of a figure: which pair, from 1")
    command.add_argument("--output", required=True, help="file to write; .png for a figure")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(command=models.align)

    command = named.add_parser("export", help="write a model for PyLate, or vectors of documents")
    command.add_argument("model", help="name or folder")
    command.add_argument("--format", required=True, help=" | ".join(models.FORMATS))
    command.add_argument("--side", help="query or document: of a Router, or how vectors are made")
    command.add_argument("--documents", help="with vectors: TSV, JSON lines or TREC documents")
    command.add_argument("--precision", default="float32", help="of vectors: float32 | float16")
    command.add_argument("--batch-size", type=int, default=32, help="texts in one forward pass")
    _passage_arguments(command)
    command.add_argument("--output", required=True, help="folder to write")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(command=models.export)

    command = named.add_parser("index", help="keep documents in a vector database (LanceDB)")
    command.add_argument("model", help="name or folder")
    command.add_argument("--collection", help="ir_datasets id or BEIR folder")
    command.add_argument("--documents", help="file: TSV, JSON lines or TREC documents")
    command.add_argument("--batch-size", type=int, default=32, help="texts in one forward pass")
    _passage_arguments(command)
    command.add_argument("--output", required=True, help="folder, s3://bucket/name or db://name")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(command=models.index)


def _collection_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--collection", help="ir_datasets id or BEIR folder")
    command.add_argument("--queries", help="file: TSV, JSON lines or TREC topics")
    command.add_argument("--documents", help="file: TSV, JSON lines or TREC documents")


def _passage_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--passage-length", type=int, help="cut documents, in tokens (MaxP)")
    command.add_argument("--passage-stride", type=int, help="default: half the length")


def _judgement_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--qrels", required=True, help="judgements: file, or ir_datasets id")
    command.add_argument("--measures", default=" ".join(DEFAULT_MEASURES))
    command.add_argument("--json", action="store_true", help="print JSON")


def _study(options: argparse.Namespace) -> int:
    quiet_libraries()
    from optical.study.study import run_study

    with _without_bars():
        print(run_study(options.config, options.output))
    return 0


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """A study logs a line per cell, and the libraries' bars would tear it apart.

    The variable that turns them off is read when tqdm is imported, which torch has done by now.
    """
    from tqdm.std import tqdm

    make = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(make, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = make


def _search(options: argparse.Namespace) -> int:
    from optical.data.collection import Collection, load_collection
    from optical.data.texts import read_texts
    from optical.data.trec import write_run
    from optical.io.files import writable_folder
    from optical.models.retriever import load_retriever
    from optical.retrieval.exact_search import search

    writable_folder(Path(options.output).parent)
    tag = options.tag or _run_name(options.model)
    if options.index:
        run, total = models.search_index(options)
        write_run(run, options.output, tag=tag)
        return _searched(options, run, total)
    if options.collection:
        collection = load_collection(
            options.collection, queries=options.queries, documents=options.documents
        )
    elif options.queries and options.documents:
        # Judgements are not needed to search.
        texts = read_texts(options.queries), read_texts(options.documents)
        collection = Collection(Path(options.documents).stem, *texts, {})
    else:
        raise ValueError("--collection, or --queries with --documents, says what to search")
    quiet_libraries()
    model = load_retriever(options.model)
    documents = load_retriever(options.document_model) if options.document_model else None
    run = search(
        model,
        collection,
        depth=options.depth,
        batch_size=options.batch_size,
        document_model=documents,
        passage_length=options.passage_length,
        passage_stride=options.passage_stride,
        progress=True,
    )
    write_run(run, options.output, tag=tag)
    return _searched(options, run, len(collection.documents))


def _searched(options: argparse.Namespace, run: Any, total: int) -> int:
    found = {"output": options.output, "queries": len(run), "documents searched": total}
    return models.done(options, found)


def _run_name(path: str) -> str:
    parts = [part for part in Path(path).parts if part not in ("final", "/")]
    return parts[-1] if parts else "optical"


def _qrels(source: str) -> Any:
    from optical.data.collection import load_collection
    from optical.data.trec import read_qrels

    return read_qrels(source) if Path(source).is_file() else load_collection(source).qrels


def _evaluate(options: argparse.Namespace) -> int:
    from optical.data.trec import read_run
    from optical.retrieval.evaluation import evaluate

    found = evaluate(read_run(options.run), _qrels(options.qrels), options.measures)
    if options.json:
        print(json.dumps(found.to_dict(per_query=options.per_query), indent=1))
        return 0
    print(found.to_table())
    if options.per_query:
        print("\t".join(["query", *found.measures]))
        for query in found.queries:
            values = [f"{found.per_query[measure][query]:.4f}" for measure in found.measures]
            print("\t".join([query, *values]))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from optical.data.trec import read_run
    from optical.retrieval.evaluation import compare, evaluate

    if len(set(options.runs)) < 2:
        raise ValueError("runs: one given, expected at least two different ones")
    qrels = _qrels(options.qrels)
    found = {path: evaluate(read_run(path), qrels, options.measures) for path in options.runs}
    comparison = compare(
        found,
        baseline=options.baseline,
        test=options.test,
        correction=options.correction,
        samples=options.samples,
        seed=options.seed,
    )
    if options.json:
        print(json.dumps(comparison.to_dict(), indent=1))
    else:
        print(comparison.to_markdown())
    return 0


def _lexicon(options: argparse.Namespace) -> int:
    from optical.data.lexicon import induce_lexicon, write_lexicon
    from optical.data.pairs import read_bitext_pairs

    pairs = [
        pair for path in options.bitext for pair in read_bitext_pairs(path)[: options.max_pairs]
    ]
    entries = induce_lexicon(
        pairs,
        least_probability=options.least_probability,
        least_count=options.least_count,
    )
    write_lexicon(entries, options.output)
    print(f"{options.output}: {len(entries)} entries from {len(pairs)} sentence pairs")
    return 0


def _vectors(options: argparse.Namespace) -> int:
    from optical.data.pairs import read_bitext_pairs
    from optical.models.encoding import ROLES

    if options.role not in ROLES:
        raise ValueError(f"role: {options.role!r}, expected 'query' or 'document'")
    texts = [english for english, _ in read_bitext_pairs(options.bitext)]
    quiet_libraries()
    from optical.models.retriever import load_retriever
    from optical.models.token_store import write_vectors

    model = load_retriever(options.model)
    limits = {"role": options.role, "max_length": options.max_length}
    # Under torchrun each process has its number in these variables.
    limits["worker"] = int(os.environ.get("RANK", 0)) if options.worker is None else options.worker
    limits["workers"] = options.workers or int(os.environ.get("WORLD_SIZE", 1))
    print(write_vectors(model, texts, options.output, **limits))
    return 0


def _figures(options: argparse.Namespace) -> int:
    from optical.io.files import writable_folder
    from optical.report.figures import draw_figures

    folder = writable_folder(options.output)
    for path in draw_figures(Path(options.results), folder).values():
        print(path)
    return 0


def _info(options: argparse.Namespace) -> int:
    from optical.testing import selftest

    found = selftest.inspect(options.seconds)
    print(json.dumps(found, indent=1) if options.json else selftest.to_text(found))
    return 1 if found["passed"] is False else 0


if __name__ == "__main__":
    sys.exit(main())
