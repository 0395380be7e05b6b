"""The command line: `optical train | search | evaluate | compare | study | …`; see --help."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from optical.evaluation import DEFAULT_MEASURES

# What `optical train RECIPE --help` shows of the trainer's hundred arguments.
COMMON_ARGUMENTS = (
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "warmup_steps",
    "seed",
    "bf16",
    "fp16",
    "save_steps",
    "logging_steps",
)
RECIPES = {
    "teacher": "train an English late-interaction retriever from (query, passage) pairs",
    "distill": "pull a student onto a frozen teacher through parallel sentences",
    "codeswitch": "train a retriever on text with words replaced through lexicons",
    "encoder": "train a tokenizer and a small multilingual encoder from plain text",
}
EXAMPLES = """examples:
  optical study                                   the embedded demonstration, a few minutes
  optical study examples/clir_pack.yaml
  optical train distill --teacher runs/teacher/final --bitext en-sw.tsv --role document \\
                        --output_dir runs/sw
  optical search runs/sw/final --collection wikiclir/sw --output sw.run
  optical evaluate sw.run --qrels wikiclir/sw
  optical compare zeroshot.run sw.run --qrels wikiclir/sw
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command: 0, 1 for a failed self-test, 2 for an error of the user's, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("optical").setLevel(logging.INFO)
    try:
        if arguments[:1] == ["train"]:
            return _train(arguments[1:])
        parser = _parser()
        options = parser.parse_args(arguments)
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
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=exact)
    commands.add_parser("train", help="train a model: " + ", ".join(RECIPES), add_help=False)

    command = commands.add_parser("study", help="train, search, evaluate, compare and report")
    command.add_argument("config", nargs="?", help="YAML file; without it, the demonstration")
    command.add_argument("--output", help="output folder, in place of the configuration's")
    command.set_defaults(command=_study)

    command = commands.add_parser("search", help="search a collection exactly, write a TREC run")
    command.add_argument("model", help="model for queries and documents: name or folder")
    command.add_argument("--document-model", help="another model for the documents")
    _collection_arguments(command)
    command.add_argument("--depth", type=int, default=1000, help="documents per query")
    command.add_argument("--batch-size", type=int, default=32, help="texts in one forward pass")
    command.add_argument("--passage-length", type=int, help="cut documents, in tokens (MaxP)")
    command.add_argument("--passage-stride", type=int, help="default: half the length")
    command.add_argument("--output", required=True, help="the run to write; .gz compresses")
    command.add_argument("--tag", help="name in the run's last column (default: the model's)")
    command.set_defaults(command=_search)

    command = commands.add_parser("evaluate", help="measures of a run")
    command.add_argument("run", help="TREC run, plain or gzip")
    _judgement_arguments(command)
    command.add_argument("--per-query", action="store_true", help="with the values of each query")
    command.set_defaults(command=_evaluate)

    command = commands.add_parser("compare", help="test runs against each other, query by query")
    command.add_argument("runs", nargs="+", help="TREC runs; the first is the baseline")
    _judgement_arguments(command)
    command.add_argument("--baseline", help="another baseline, one of the runs")
    command.add_argument("--test", default="randomization", help="randomization or t")
    command.add_argument("--correction", default="holm", help="holm, bonferroni or none")
    command.add_argument("--samples", type=int, default=100_000, help="random sign patterns")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(command=_compare)

    command = commands.add_parser("lexicon", help="learn a word table from parallel sentences")
    command.add_argument("bitext", nargs="+", help="files of `English TAB other`")
    command.add_argument("--max-pairs", type=int, help="the first so many pairs of each file")
    command.add_argument("--least-probability", type=float, default=0.3)
    command.add_argument("--least-count", type=int, default=3, help="pairs that have the word")
    command.add_argument("--output", required=True, help="the table to write; .gz compresses")
    command.set_defaults(command=_lexicon)

    command = commands.add_parser("vectors", help="store a teacher's token vectors of bitext")
    command.add_argument("model", help="the teacher: name or folder")
    command.add_argument("--bitext", required=True, help="file of `English TAB other`")
    command.add_argument("--role", required=True, help="query or document, as in training")
    command.add_argument("--max-length", type=int, help="in tokens, as in training")
    command.add_argument("--output", required=True, help="folder to write; continues in it")
    command.set_defaults(command=_vectors)

    command = commands.add_parser("figures", help="draw a study's figures from its results.csv")
    command.add_argument("results", help="results.csv of a study")
    command.add_argument("--output", required=True, help="folder for the figures")
    command.set_defaults(command=_figures)

    command = commands.add_parser("info", help="what works here, with a test of ten seconds")
    command.add_argument(
        "--seconds", type=float, default=10.0, help="for the test; 0 leaves it out"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(command=_info)
    return parser


def _collection_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--collection", help="ir_datasets id or BEIR folder")
    command.add_argument("--queries", help="file: TSV, JSON lines or TREC topics")
    command.add_argument("--documents", help="file: TSV, JSON lines or TREC documents")


def _judgement_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--qrels", required=True, help="judgements: file, or ir_datasets id")
    command.add_argument("--measures", default=" ".join(DEFAULT_MEASURES))
    command.add_argument("--json", action="store_true", help="print JSON")


def _study(options: argparse.Namespace) -> int:
    _quiet_libraries()
    from optical.study import run_study

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
    from optical.collections import Collection, load_collection
    from optical.encoder import load_retriever
    from optical.files import writable_folder
    from optical.runs import write_run
    from optical.search import search
    from optical.texts import read_texts

    writable_folder(Path(options.output).parent)
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
    _quiet_libraries()
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
        progress=sys.stderr.isatty(),
    )
    write_run(run, options.output, tag=options.tag or _run_name(options.model))
    print(f"{options.output}: {len(run)} queries, {len(collection.documents)} documents searched")
    return 0


def _run_name(path: str) -> str:
    parts = [part for part in Path(path).parts if part not in ("final", "/")]
    return parts[-1] if parts else "optical"


def _qrels(source: str) -> Any:
    from optical.collections import load_collection
    from optical.runs import read_qrels

    return read_qrels(source) if Path(source).is_file() else load_collection(source).qrels


def _evaluate(options: argparse.Namespace) -> int:
    from optical.evaluation import evaluate
    from optical.runs import read_run

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
    from optical.evaluation import evaluate
    from optical.runs import read_run
    from optical.significance import compare

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
    from optical.bitext import read_pairs
    from optical.lexicon import induce, write_lexicon

    pairs = [pair for path in options.bitext for pair in read_pairs(path)[: options.max_pairs]]
    entries = induce(
        pairs,
        least_probability=options.least_probability,
        least_count=options.least_count,
    )
    write_lexicon(entries, options.output)
    print(f"{options.output}: {len(entries)} entries from {len(pairs)} sentence pairs")
    return 0


def _vectors(options: argparse.Namespace) -> int:
    from optical.bitext import read_pairs
    from optical.options import ROLES

    if options.role not in ROLES:
        raise ValueError(f"role: {options.role!r}, expected 'query' or 'document'")
    texts = [english for english, _ in read_pairs(options.bitext)]
    _quiet_libraries()
    from optical.encoder import load_retriever
    from optical.vectors import write_vectors

    model = load_retriever(options.model)
    limits = {"role": options.role, "max_length": options.max_length}
    print(write_vectors(model, texts, options.output, **limits))
    return 0


def _figures(options: argparse.Namespace) -> int:
    from optical.figures import draw_figures
    from optical.files import writable_folder

    folder = writable_folder(options.output)
    for path in draw_figures(Path(options.results), folder).values():
        print(path)
    return 0


def _info(options: argparse.Namespace) -> int:
    from optical import selftest

    found = selftest.inspect(options.seconds)
    print(json.dumps(found, indent=1) if options.json else selftest.to_text(found))
    return 1 if found["passed"] is False else 0


def _train(argv: list[str]) -> int:
    if not argv or argv[0] not in RECIPES:
        lines = [f"  {name:11} {text}" for name, text in RECIPES.items()]
        print("usage: optical train RECIPE [options]\n\n" + "\n".join(lines))
        if argv and argv[0] not in ("-h", "--help"):
            raise ValueError(f"recipe {argv[0]!r} is unknown; expected one of {', '.join(RECIPES)}")
        return 0 if argv else 2
    from transformers import HfArgumentParser, TrainingArguments

    from optical import encoder, training
    from optical.files import writable_folder

    recipe, argv = argv[0], argv[1:]
    kinds: dict[str, tuple[Any, Any]] = {
        "teacher": (training.TeacherOptions, training.teacher),
        "distill": (training.DistillOptions, training.distill),
        "codeswitch": (training.CodeswitchOptions, training.codeswitch),
        "encoder": (encoder.EncoderOptions, encoder.encoder_trainer),
    }
    options_kind, make_trainer = kinds[recipe]
    arguments_kind: Any = (
        TrainingArguments if recipe == "encoder" else training.CommandLineArguments
    )
    make_parser: Any = HfArgumentParser
    parser = make_parser(
        (options_kind, arguments_kind),
        prog=f"optical train {recipe}",
        add_help=False,
        allow_abbrev=False,
    )
    parser.set_defaults(**training.ARGUMENT_DEFAULTS)
    if "--help-all" in argv:
        parser.print_help()
        return 0
    if "-h" in argv or "--help" in argv:
        _train_help(recipe, options_kind, arguments_kind)
        return 0
    argv = _with_config(argv, parser)
    parser.set_defaults(output_dir=None)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        from optical.config import nearest

        known = [f"--{action.dest}" for action in parser._actions]
        raise ValueError(f"unknown option {unknown[0]}{nearest(unknown[0].split('=')[0], known)}")
    if not namespace.output_dir:
        raise ValueError("output_dir: none given; expected a folder to write to")
    values = vars(namespace)
    names = {entry.name for entry in dataclasses.fields(options_kind)}
    options = options_kind(**{name: values[name] for name in names})
    options.validate()
    # Before anything is read: the trainer would say it late and in its own words.
    writable_folder(namespace.output_dir)
    _quiet_libraries()
    init = {entry.name for entry in dataclasses.fields(arguments_kind) if entry.init}
    args = arguments_kind(**{name: values[name] for name in init & set(values)})
    print(training.run(make_trainer(options, args), options, resume=options.resume))
    return 0


def _with_config(argv: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Take `--config FILE` out of the arguments and make its keys the parser's defaults."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--config")
    given, rest = reader.parse_known_args(argv)
    if given.config is None:
        return rest
    from optical.config import nearest, read_yaml

    settings, _ = read_yaml(given.config)
    known = {action.dest for action in parser._actions}
    for key in settings:
        if key not in known:
            raise ValueError(f"{given.config}: unknown key `{key}`{nearest(key, known)}")
    # As arguments in front, so that the parser converts them and the command line wins.
    words: list[str] = []
    for key, value in settings.items():
        values = value if isinstance(value, list) else [value]
        text = [json.dumps(one) if isinstance(one, dict) else str(one) for one in values]
        words += [f"--{key}", *text]
    return [*words, *rest]


def _train_help(recipe: str, options_kind: Any, arguments_kind: Any) -> None:
    print(f"usage: optical train {recipe} [--config FILE.yaml] [options]\n\n{RECIPES[recipe]}\n")
    shown = [*dataclasses.fields(options_kind)]
    by_name = {entry.name: entry for entry in dataclasses.fields(arguments_kind)}
    shown += [by_name[name] for name in COMMON_ARGUMENTS]
    for entry in shown:
        text = " ".join(str(entry.metadata.get("help", "")).split())
        print(f"  --{entry.name:28} {text[:110]}")
    print("\n--config holds the same names in YAML; --help-all lists every option of the trainer")


def _quiet_libraries() -> None:
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


if __name__ == "__main__":
    sys.exit(main())
