"""Soak test: mixed calls for minutes, checked, while memory, files and threads must stay level.

    python -m tests.stress.soak --minutes 30

A round is some random calls, a few training steps with the loss, a search, and a run file written,
read and evaluated. A quantity that grows from the second quarter of the time to the last is
reported, and the exit status is 1.
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

import torch

from optical import OTAlignmentLoss
from optical.data.trec import read_run, write_run
from optical.retrieval.evaluation import evaluate
from optical.retrieval.exact_search import search_vectors
from tests.stress.check import check
from tests.stress.draw import draw

# Growth that is no leak: arenas of the allocator, caches that fill up once.
ALLOWED = {"MB": 16.0, "tensors": 20, "files": 0, "threads": 0}
CALLS = 20


class Sample(NamedTuple):
    """The resources of the process at one time."""

    seconds: float
    MB: float
    tensors: int
    files: int
    threads: int


def sample(start: float) -> Sample:
    """Measure the process; ``start`` is the monotonic time at which the test began."""
    gc.collect()
    # Otherwise freed memory that the allocator keeps would count as memory in use.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Sample(
        time.monotonic() - start,
        pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()),
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
    )


def growth(samples: Sequence[Sample]) -> dict[str, float]:
    """Growth of the median of each quantity from the second quarter of the time to the last."""
    end = samples[-1].seconds
    early = [sample for sample in samples if end / 4 <= sample.seconds < end / 2]
    late = [sample for sample in samples if sample.seconds >= 3 * end / 4]
    if not early:
        raise ValueError(f"{len(samples)} samples: too few to compare; expected a longer run")
    return {
        name: statistics.median(getattr(sample, name) for sample in late)
        - statistics.median(getattr(sample, name) for sample in early)
        for name in ALLOWED
    }


def train(words: torch.nn.Embedding, seed: int) -> None:
    """Take three optimisation steps with the alignment loss."""
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
    """Search random documents; write, read and evaluate the run."""
    generator = torch.Generator().manual_seed(seed)

    def texts(letter: str, count: int, longest: int) -> dict[str, torch.Tensor]:
        lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
        tokens = (torch.randint(0, 200, (length,), generator=generator) for length in lengths)
        return {f"{letter}{i}": words(ids).detach() for i, ids in enumerate(tokens)}

    run = search_vectors(texts("q", 5, 8), texts("d", 40, 30), depth=20)
    path = folder / f"{seed % 3}.run.gz"
    write_run(run, path, tag="soak")
    evaluation = evaluate(read_run(path), {f"q{i}": {f"d{i}": 1} for i in range(5)}, "AP nDCG@10")
    assert len(evaluation.queries) == 5


def main(arguments: Sequence[str]) -> int:
    """Run rounds until the time is up; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.stress.soak", description="Watch resources during mixed calls."
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="time to run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first random call")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # the reference replaces the library where it must
    words, start, printed, seed = torch.nn.Embedding(200, 16), time.monotonic(), 0.0, options.seed
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() - start < 60 * options.minutes:
            for number in range(seed, seed + CALLS):
                check(draw(number))
            seed += CALLS
            train(words, seed)
            retrieve(words, Path(folder), seed)
            samples.append(sample(start))
            if samples[-1].seconds - printed > 60:
                printed = samples[-1].seconds
                print(f"{printed / 60:5.1f} min  {samples[-1].MB:7.1f} MB", flush=True)
    last = samples[-1]
    print(f"{seed - options.seed} random calls, {len(samples)} rounds, {last.seconds:.0f} s")
    return _report(last, growth(samples))


def _report(last: Sample, grown: dict[str, float]) -> int:
    for name, allowed in ALLOWED.items():
        word = "grew" if grown[name] > allowed else "level"
        print(f"{name:8} {getattr(last, name):10.1f}  {grown[name]:+8.1f}  {word}")
    return 1 if any(grown[name] > allowed for name, allowed in ALLOWED.items()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
