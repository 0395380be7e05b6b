"""Estimate the time, memory and disk space of distillation on a million sentence pairs.

    python -m benchmarks.scaling

The costs are measured on a small sample and extrapolated linearly. Times are CPU times of the
process, summed over its threads, so other programs on the machine have little effect. The models
have random weights, because the cost does not depend on the weights.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from optical.models import tokenizers
from optical.models.encoding import encode
from optical.models.retriever import load_retriever
from optical.models.token_store import write_vectors
from optical.study.tasks import peak_memory
from optical.training import pretraining, recipes

# Label, width, layers, heads: the size of the demonstration's models and that of a MiniLM.
MODELS = (("2 layers of 128", 128, 2, 2), ("6 layers of 384", 384, 6, 6))
WORDS_PER_SENTENCE, DIMENSION, STEPS = 20, 128, 4


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
) -> Any:
    """Write a random encoder, a teacher and the bitext into a folder; the teacher."""
    tokenizer = tokenizers.train_tokenizer(iter([*english, *other]), 4000, 128)
    options = pretraining.EncoderOptions(hidden_size=width, layers=layers, heads=heads)
    pretraining.new_encoder(options, len(tokenizer)).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    teacher = load_retriever(folder / "encoder", dimension=DIMENSION)
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
    args = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    print(f"per million pairs of {WORDS_PER_SENTENCE} words, {threads} thread(s)\n")
    print("| model | | time | peak memory | on disk |\n|---|---|---|---|---|")
    for model in MODELS:
        for row in costs(*model, args.pairs, args.batch):
            print("| " + " | ".join(row) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
