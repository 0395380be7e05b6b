"""What a million sentence pairs cost: measured on a small sample, and multiplied.

    python -m benchmarks.scaling

Time is that of the process, summed over its threads, so that other programs on the machine count
little. The models have random weights: what they cost does not depend on what they say.
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

# Name, width, layers, heads: the models of the demonstration's size, and of a MiniLM's.
MODELS = (("2 layers of 128", 128, 2, 2), ("6 layers of 384", 384, 6, 6))
WORDS, DIMENSION, STEPS = 20, 128, 4


class Clock(TrainerCallback):
    """Time of the process at the end of every step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.process_time())


def sentences(count: int) -> list[str]:
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioubdkmnst", k=draw.randint(2, 8))) for _ in range(3000)]
    return [" ".join(draw.choices(words, k=WORDS)) for _ in range(count)]


def rows(name: str, width: int, layers: int, heads: int, pairs: int, batch: int) -> list[list[str]]:
    """The costs with one model: a teacher's vectors, training on them, encoding for a search."""
    texts = sentences(2 * pairs)
    english, other = texts[:pairs], texts[pairs:]
    made = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tokenizer = tokenizers.train_tokenizer(iter(texts), 4000, 128)
        options = pretraining.EncoderOptions(hidden_size=width, layers=layers, heads=heads)
        pretraining.new_encoder(options, len(tokenizer)).save_pretrained(folder / "encoder")
        tokenizer.save_pretrained(folder / "encoder")
        teacher = load_retriever(folder / "encoder", dimension=DIMENSION)
        teacher.save_pretrained(str(folder / "teacher"))
        (folder / "bitext.tsv").write_text(
            "".join(f"{one}\t{two}\n" for one, two in zip(english, other, strict=True))
        )

        def add(what: str, seconds: float, peak_mb: float, stored: float = 0.0) -> None:
            hours, gigabytes = 1e6 * seconds / pairs / 3600, 1e6 * stored / pairs / 1e9
            room = f"{gigabytes:.1f} GB" if stored else ""
            made.append([name, what, f"{hours:.1f} h", f"{peak_mb:.0f} MB", room])

        encode(teacher, english[:batch], "document")  # what PyTorch does once
        begun = time.process_time()
        with peak_memory() as peak:
            write_vectors(teacher, english, folder / "store", role="document", batch_size=batch)
        size = sum(path.stat().st_size for path in (folder / "store").iterdir())
        add("the teacher's vectors, stored", time.process_time() - begun, peak[0], size)

        for stored in ([str(folder / "store")], []):
            chosen = recipes.DistillOptions(
                teacher=str(folder / "teacher"),
                bitext=[str(folder / "bitext.tsv")],
                role="document",
                teacher_vectors=stored,
            )
            args = recipes.trainer_arguments(
                folder / f"run{len(stored)}",
                max_steps=STEPS,
                per_device_train_batch_size=batch,
                disable_tqdm=True,
                save_strategy="no",
            )
            trainer, clock = recipes.distill(chosen, args), Clock()
            trainer.add_callback(clock)
            with peak_memory() as peak:
                trainer.train()
            steps = (clock.ends[-1] - clock.ends[0]) / (STEPS - 1)
            what = "one pass of distillation, " + ("stored teacher" if stored else "teacher too")
            add(what, steps * pairs / batch, peak[0])
    return made


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args(arguments)
    print(f"per million pairs of {WORDS} words, {torch.get_num_threads()} thread(s)\n")
    print("| model | | time | peak memory | on disk |\n|---|---|---|---|---|")
    for model in MODELS:
        for row in rows(*model, options.pairs, options.batch):
            print("| " + " | ".join(row) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
