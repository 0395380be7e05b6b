"""Mixed calls for minutes: what they return stays right, and memory, files and threads stay level.

    python tests/soak.py --minutes 30

One round is some random calls of fuzz.py, a few steps of training with the loss, a search, and a
run written, read and measured. What grows from the second quarter of the time to the last one is
reported, and ends the program with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import fuzz
import torch

from optical import OTAlignmentLoss
from optical.data.trec import read_run, write_run
from optical.retrieval.evaluation import evaluate
from optical.retrieval.exact_search import search_vectors

# What may come and go without a leak: the allocator's arenas, caches that fill up once.
ALLOWED = {"MB": 16.0, "tensors": 20, "files": 0, "threads": 0}
CALLS = 20


class Sample(NamedTuple):
    seconds: float
    MB: float
    tensors: int
    files: int
    threads: int


def sample(begun: float) -> Sample:
    """What the process holds now."""
    gc.collect()
    # Freed memory that the allocator keeps would look like memory in use.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Sample(
        time.monotonic() - begun,
        pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()),
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
    )


def growth(samples: Sequence[Sample]) -> dict[str, float]:
    """How much each quantity grew from the second quarter to the last, by medians."""
    end = samples[-1].seconds
    early = [one for one in samples if end / 4 <= one.seconds < end / 2]
    late = [one for one in samples if one.seconds >= 3 * end / 4]
    if not early:
        raise ValueError(f"{len(samples)} samples: too few to tell; give more time")
    return {
        name: statistics.median(getattr(one, name) for one in late)
        - statistics.median(getattr(one, name) for one in early)
        for name in ALLOWED
    }


def train(words: torch.nn.Embedding, seed: int) -> None:
    loss = OTAlignmentLoss(epsilon=0.05)
    optimizer = torch.optim.SGD(words.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        ids = torch.randint(0, 200, (8, 12 + seed % 7), generator=generator)
        teacher = torch.randn(8, 15, 16, generator=generator)
        optimizer.zero_grad()
        loss(words(ids), teacher).backward()
        optimizer.step()


def retrieve(words: torch.nn.Embedding, folder: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def texts(letter: str, count: int, longest: int) -> dict[str, torch.Tensor]:
        lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
        draw = (torch.randint(0, 200, (length,), generator=generator) for length in lengths)
        return {f"{letter}{i}": words(ids).detach() for i, ids in enumerate(draw)}

    run = search_vectors(texts("q", 5, 8), texts("d", 40, 30), depth=20)
    path = folder / f"{seed % 3}.run.gz"
    write_run(run, path, tag="soak")
    found = evaluate(read_run(path), {f"q{i}": {f"d{i}": 1} for i in range(5)}, "AP nDCG@10")
    assert len(found.queries) == 5


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0, help="the first random call's number")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # that the reference serves what the library cannot
    words, begun, told, seed = torch.nn.Embedding(200, 16), time.monotonic(), 0.0, options.seed
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() - begun < 60 * options.minutes:
            for number in range(seed, seed + CALLS):
                fuzz.check(fuzz.draw(number))
            seed += CALLS
            train(words, seed)
            retrieve(words, Path(folder), seed)
            samples.append(sample(begun))
            if samples[-1].seconds - told > 60:
                told = samples[-1].seconds
                print(f"{told / 60:5.1f} min  {samples[-1].MB:7.1f} MB", flush=True)
    grown = growth(samples)
    last = samples[-1]
    print(f"{seed - options.seed} random calls, {len(samples)} rounds, {last.seconds:.0f} s")
    for name, allowed in ALLOWED.items():
        word = "grew" if grown[name] > allowed else "level"
        print(f"{name:8} {getattr(last, name):10.1f}  {grown[name]:+8.1f}  {word}")
    return 1 if any(grown[name] > allowed for name, allowed in ALLOWED.items()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
