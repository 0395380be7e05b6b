"""Measure the time, memory and disk space of distillation and of a large index.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --documents 100000 --output benchmarks/results/passages.csv
    python -m benchmarks.scaling --index runs/base --model MODEL --ask queries.tsv \\
        --output benchmarks/results/recall.csv

The costs of a million sentence pairs are measured on a small sample and extrapolated linearly. The
index holds the given number of synthetic passages and is measured as a whole. With `--index`, a
database of `optical index --approximate` is searched with real queries. CPU times of the process
are summed over its threads, so other programs on the machine have little effect. The models of the
first two have random weights, because the cost does not depend on the weights.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.csv_files import append_row
from benchmarks.operator.rows import current_commit, device_name
from optical.data.texts import read_texts
from optical.io.environment import version
from optical.models import tokenizers
from optical.models.encoding import encode
from optical.models.retriever import load_retriever
from optical.models.token_store import write_vectors
from optical.retrieval.index import LanceIndex, build_approximate, write_database
from optical.study.tasks import peak_memory
from optical.training import pretraining, recipes

# Label, width, layers, heads: the size of the demonstration's models and that of a MiniLM.
MODELS = (("2 layers of 128", 128, 2, 2), ("6 layers of 384", 384, 6, 6))
WORDS_PER_SENTENCE, DIMENSION, STEPS = 20, 128, 4
# Candidates of an approximate search as multiples of its depth.
REFINE = (10, 50, 200)
RECALLED = ((10, 1), (10, 10), (10, 50), (10, 100), (100, 1), (100, 10))


class StepClock(TrainerCallback):
    """Record the CPU time of the process at the end of every training step."""

    def __init__(self) -> None:
        self.step_ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_ends.append(time.process_time())


def random_sentences(count: int) -> list[str]:
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioubdkmnst", k=draw.randint(2, 8))) for _ in range(3000)]
    return [" ".join(draw.choices(words, k=WORDS_PER_SENTENCE)) for _ in range(count)]


def costs(
    label: str, width: int, layers: int, heads: int, pairs: int, batch: int
) -> list[list[str]]:
    """Table rows of one model: storing the teacher's vectors, and a pass with and without them."""
    texts = random_sentences(2 * pairs)
    english, other = texts[:pairs], texts[pairs:]
    table = []

    def add(operation: str, seconds: float, peak_mb: float, stored_bytes: float = 0.0) -> None:
        hours, gigabytes = 1e6 * seconds / pairs / 3600, 1e6 * stored_bytes / pairs / 1e9
        disk = f"{gigabytes:.1f} GB" if stored_bytes else ""
        table.append([label, operation, f"{hours:.1f} h", f"{peak_mb:.0f} MB", disk])

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher = _write_inputs(folder, english, other, width, layers, heads)
        encode(teacher, english[:batch], "document")  # warm-up
        start = time.process_time()
        with peak_memory() as peak:
            write_vectors(teacher, english, folder / "store", role="document", batch_size=batch)
        size = sum(path.stat().st_size for path in (folder / "store").iterdir())
        add("the teacher's vectors, stored", time.process_time() - start, peak[0], size)
        for stores in ([str(folder / "store")], []):
            seconds_per_step, peak_mb = _distillation_step(folder, stores, batch)
            teacher_cost = "stored teacher" if stores else "teacher too"
            operation = f"one pass of distillation, {teacher_cost}"
            add(operation, seconds_per_step * pairs / batch, peak_mb)
    return table


def _write_inputs(
    folder: Path,
    english: Sequence[str],
    other: Sequence[str],
    width: int,
    layers: int,
    heads: int,
    dimension: int = DIMENSION,
) -> Any:
    """Write a random encoder, a teacher and the bitext into a folder; the teacher."""
    tokenizer = tokenizers.train_tokenizer(iter([*english, *other]), 4000, 128)
    options = pretraining.EncoderOptions(hidden_size=width, layers=layers, heads=heads)
    pretraining.new_encoder(options, len(tokenizer)).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    teacher = load_retriever(folder / "encoder", dimension=dimension)
    teacher.save_pretrained(str(folder / "teacher"))
    (folder / "bitext.tsv").write_text(
        "".join(f"{source}\t{target}\n" for source, target in zip(english, other, strict=True))
    )
    return teacher


def _distillation_step(folder: Path, stores: list[str], batch: int) -> tuple[float, float]:
    """Mean CPU seconds of a distillation step, and the peak memory of the run in MB."""
    options = recipes.DistillOptions(
        teacher=str(folder / "teacher"),
        bitext=[str(folder / "bitext.tsv")],
        role="document",
        teacher_vectors=stores,
    )
    trainer_args = recipes.trainer_arguments(
        folder / f"run{len(stores)}",
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer, clock = recipes.distill(options, trainer_args), StepClock()
    trainer.add_callback(clock)
    with peak_memory() as peak:
        trainer.train()
    return (clock.step_ends[-1] - clock.step_ends[0]) / (STEPS - 1), peak[0]


def synthetic_texts(count: int, words: int) -> Iterator[tuple[str, str]]:
    """Yield ids and texts whose words are drawn like those of a language: few are frequent."""
    draw = random.Random(0)
    names = ["".join(draw.choices("aeioubdkmnst", k=draw.randint(2, 8))) for _ in range(3000)]
    weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(len(names))))
    for number in range(count):
        yield f"p{number}", " ".join(draw.choices(names, cum_weights=weights, k=words))


def index_costs(count: int, words: int, width: int, queries: int) -> dict[str, Any]:
    """Write a database of synthetic passages, index it, and search it in both ways."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sample = [text for _, text in synthetic_texts(5000, words)]
        model = _write_inputs(folder, sample, sample, width, layers=1, heads=2, dimension=width)
        location = folder / "base"
        row: dict[str, Any] = {"passages": count, "words": words, "dimension": width}
        clock = _Clock(row)
        with clock.step("write"):
            added = write_database(model, synthetic_texts(count, words), location, batch_size=256)
        assert added == count
        row["write_gb"] = _gigabytes(location)
        with clock.step("build"):
            build_approximate(location)
        row["build_gb"] = _gigabytes(location) - row["write_gb"]
        with clock.step("open"):
            index = LanceIndex(location)
            row["rows"] = len(index)
        # Other words of the same language: a query is half a passage that is not in the index.
        asked = dict(itertools.islice(synthetic_texts(count + queries, words // 2), count, None))
        ids, vectors = list(asked), encode(model, list(asked.values()), "query")
        with clock.step("exact"):
            exact = index.search(ids, vectors, depth=100)
        row["queries"] = queries
        for refine in REFINE:
            with clock.step(f"refine_{refine}"):
                found = index.search(ids, vectors, depth=100, approximate=True, refine=refine)
            kept = sum(key in found[query] for query in ids for key in exact[query])
            row[f"recall_{refine}"] = kept / (100 * queries)
        return row


def recall_rows(location: str, model: str, queries: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield time and recall of an approximate search for each depth and refine factor."""
    index, texts = LanceIndex(location), list(read_texts(queries).values())
    chosen = texts[:: -(-len(texts) // count)]
    ids = [f"q{number}" for number in range(len(chosen))]
    vectors = encode(load_retriever(model), chosen, "query")
    start = time.process_time()
    exact = index.search(ids, vectors, depth=100)
    exact_seconds = (time.process_time() - start) / len(ids)
    for depth, refine in RECALLED:
        start = time.process_time()
        found = index.search(ids, vectors, depth=depth, approximate=True, refine=refine)
        seconds = (time.process_time() - start) / len(ids)
        kept = sum(key in found[query] for query in ids for key in list(exact[query])[:depth])
        yield {
            "model": Path(model).parent.name if Path(model).name == "model" else Path(model).name,
            "passages": len(index), "dimension": index.dimension, "queries": len(ids),
            "exact_cpu_s": exact_seconds, "depth": depth, "refine": refine,
            "recall": kept / (depth * len(ids)), "cpu_s": seconds,
        }  # fmt: skip


class _Clock:
    """Add wall-clock seconds, CPU seconds and peak memory of named steps to a row."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.row = row

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        wall, cpu = time.monotonic(), time.process_time()
        with peak_memory() as peak:
            yield
        self.row[f"{name}_s"] = time.monotonic() - wall
        self.row[f"{name}_cpu_s"] = time.process_time() - cpu
        self.row[f"{name}_mb"] = peak[0]
        print(f"{name}: {self.row[f'{name}_s']:.1f} s, {peak[0]:.0f} MB", file=sys.stderr)


def _gigabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def measure_index(args: argparse.Namespace) -> None:
    """Print a row of :func:`index_costs`, and append it to the table of `--output`."""
    load = os.getloadavg()[0]
    _report(index_costs(args.documents, args.words, args.width, args.queries), load, args.output)


def measure_recall(args: argparse.Namespace) -> None:
    """Print the rows of :func:`recall_rows`, and append them to the table of `--output`."""
    for row in recall_rows(args.index, args.model, args.ask, args.queries):
        _report(row, os.getloadavg()[0], args.output)


def _report(row: dict[str, Any], load: float, output: str | None) -> None:
    """Add the machine and versions to a row, print it and append it to a table."""
    row |= {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "load": load}
    row |= {"device": device_name("cpu"), "commit": current_commit()}
    row |= {
        "torch": version("torch"),
        "lancedb": version("lancedb"),
        "date": time.strftime("%Y-%m-%d"),
    }
    shown = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()}
    print("\n".join(f"{name}: {value}" for name, value in shown.items()))
    if output:
        append_row(Path(output), shown)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--pairs", type=int, default=256, help="sentence pairs of the sample (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=int, default=32, help="sentence pairs of a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--documents", type=int, help="measure an index of this many synthetic passages instead"
    )
    parser.add_argument(
        "--words", type=int, default=12, help="words of a passage (default: %(default)s)"
    )
    parser.add_argument(
        "--width", type=int, default=32, help="size of a token vector (default: %(default)s)"
    )
    parser.add_argument(
        "--queries", type=int, default=50, help="queries of the index (default: %(default)s)"
    )
    parser.add_argument("--index", help="measure the recall in this database instead")
    parser.add_argument("--model", help="model that encoded the database of --index")
    parser.add_argument("--ask", help="file of queries for --index")
    parser.add_argument("--output", help="table of results to append the row of the index to")
    args = parser.parse_args(arguments)
    if args.documents or args.index:
        (measure_index if args.documents else measure_recall)(args)
        return 0
    threads = torch.get_num_threads()
    print(f"per million pairs of {WORDS_PER_SENTENCE} words, {threads} thread(s)\n")
    print("| model | | time | peak memory | on disk |\n|---|---|---|---|---|")
    for model in MODELS:
        for row in costs(*model, args.pairs, args.batch):
            print("| " + " | ".join(row) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
