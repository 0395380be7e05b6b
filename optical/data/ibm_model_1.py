"""IBM model 1 in bounded memory: translation probabilities of units, counted in pieces on disk.

Expectation maximisation compares the candidates of a target unit, which are the source units of its
sentence, and normalises the counts of a source unit over all target units. The target units are
divided into blocks. A block needs its own probabilities alone, besides one total for each source
unit, so one block is in memory at a time. The result does not depend on the division.

Memory grows with the vocabularies. The disk holds 4 bytes for each combination of a source and a
target unit in a sentence pair, and 16 while they are sorted, in the folder of temporary files
(``TMPDIR``).
"""

from __future__ import annotations

import array
import collections
import itertools
import tempfile
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import torch
from torch import Tensor

from optical.io.files import disk_full_errors
from optical.io.progress import Progress

Unit = TypeVar("Unit", bound=Hashable)
# This many units of a sentence are read: the cost grows with the square of the length, and long
# sentences contribute little.
MAX_UNITS = 60
# Candidates in memory at a time, and probabilities of a block. A unit is never divided.
BATCH, BLOCK = 2**19, 2**20


def ibm_model_1(
    pairs: Iterable[tuple[Sequence[Unit], Sequence[Unit]]],
    *,
    iterations: int,
    least_probability: float,
    least_count: int = 1,
    block_size: int = BLOCK,
) -> list[tuple[Unit, Unit, float]]:
    """Estimate IBM model 1 on pairs of sequences of words, subwords or any other units.

    Expectation maximisation of p(target unit | source unit) under alignments that ignore order. An
    empty source unit accounts for target units without a counterpart. Progress is logged.

    Args:
        pairs: sequences of source and of target units, read once.
        iterations: rounds of expectation and maximisation.
        least_probability: minimum probability of a returned entry.
        least_count: minimum number of pairs that contain the source unit of an entry.
        block_size: probabilities in memory at a time.

    Returns:
        (source unit, target unit, probability), unsorted.

    Raises:
        ValueError: no pair has units on both sides.
        OSError: no room for the temporary files.

    Source: Brown et al., "The Mathematics of Statistical Machine Translation" (1993), section 4.2.
    """
    with tempfile.TemporaryDirectory(prefix="optical-") as name, disk_full_errors(name):
        sentences = _Sentences(pairs, Path(name))
        if len(sentences.source) < 2 or not len(sentences.target):
            raise ValueError("no sentence pair with words on both sides; expected at least one")
        blocks = _divide(sentences, Path(name), block_size)
        work = iterations * sum(sum(block.candidates) for block in blocks)
        progress = Progress("IBM model 1", work, "word pairs")
        totals = None
        for _ in range(iterations):
            # Counts accumulate in float64, one after the other, so equal input gives equal bits.
            sums = torch.zeros(len(sentences.source), dtype=torch.float64)
            for block in blocks:
                block.iterate(totals, sums, progress)
            totals = sums
        kept = [block.entries(totals, least_probability) for block in blocks]
    source, target = sentences.source, sentences.target
    return [
        (source.units[e], target.units[f], p)
        for e, f, p in itertools.chain.from_iterable(kept)
        if e and sentences.occurrences[e] >= least_count
    ]


class _Vocabulary(Generic[Unit]):
    """Units and their indices, in order of first occurrence."""

    def __init__(self) -> None:
        self.units: list[Unit] = []
        self._indices: dict[Unit, int] = {}

    def __len__(self) -> int:
        return len(self.units)

    def index(self, unit: Unit) -> int:
        index = self._indices.setdefault(unit, len(self.units))
        if index == len(self.units):
            self.units.append(unit)
        return index


class _Sentences(Generic[Unit]):
    """Sentence pairs as indices of units in a file; two bytes a pair remain in memory.

    Attributes:
        source, target: the vocabularies; source unit 0 is the empty one.
        occurrences: number of pairs that contain a source unit.
        candidates: (target units,), occurrences of a target unit times the source units beside it.
    """

    def __init__(self, pairs: Iterable[tuple[Sequence[Unit], Sequence[Unit]]], folder: Path):
        self.source, self.target = _Vocabulary[Unit](), _Vocabulary[Unit]()
        # A fresh object equals no unit, so it can represent the empty source unit.
        empty: Any = object()
        self.source.index(empty)
        self.occurrences: collections.Counter[int] = collections.Counter()
        candidates: collections.Counter[int] = collections.Counter()
        self._path = folder / "sentences"
        lengths = array.array("B"), array.array("B")
        progress = Progress("IBM model 1", None, "sentence pairs read")
        with self._path.open("wb") as file:
            for source_units, target_units in pairs:
                e = [0, *map(self.source.index, source_units[:MAX_UNITS])]
                f = [*map(self.target.index, target_units[:MAX_UNITS])]
                self.occurrences.update(set(e))
                for unit in f:
                    candidates[unit] += len(e)
                file.write(array.array("i", [*e, *f]))
                lengths[0].append(len(e))
                lengths[1].append(len(f))
                progress.add()
        self._lengths = [torch.tensor(side, dtype=torch.uint8) for side in lengths]
        self.candidates = torch.tensor([candidates[f] for f in range(len(self.target))])

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (units, numbers of source units, numbers of target units) of some pairs."""
        with self._path.open("rb") as file:
            # A thousand pairs have at most a thousand times 61 times 60 candidates.
            for e, f in zip(*(torch.split(side, 1000) for side in self._lengths), strict=True):
                yield _read(file, int(e.sum() + f.sum()), torch.int32), e.long(), f.long()


def _divide(sentences: _Sentences[Any], folder: Path, block_size: int) -> list[_Block]:
    """Divide the target units into blocks, and write the candidates of each block."""
    # A unit has no more probabilities than candidates, nor than there are source units.
    width = sentences.candidates.clamp(max=len(sentences.source))
    block_of: list[int] = []
    number = size = 0
    for entries in width.tolist():
        if size and size + entries > block_size:
            number, size = number + 1, 0
        size += entries
        block_of.append(number)
    blocks = [_Block(folder / str(i), len(sentences.target)) for i in range(number + 1)]
    division = torch.tensor(block_of)
    progress = Progress("IBM model 1", int(sentences.candidates.sum()), "word pairs listed")
    for units, source_count, target_count in sentences.batches():
        target, width, first = _slots(units, source_count, target_count)
        in_block, order = division[target].sort(stable=True)
        sizes = torch.bincount(in_block, minlength=len(blocks)).tolist()
        for block, members in zip(blocks, torch.split(order, sizes), strict=True):
            # Every part of a batch fits into memory like the batch.
            for part in torch.split(members, BATCH // (MAX_UNITS + 1)):
                progress.add(block.add(units, target[part], width[part], first[part]))
    for block in blocks:
        block.sort()
    return blocks


def _slots(units: Tensor, source_count: Tensor, target_count: Tensor) -> tuple[Tensor, ...]:
    """Return the target unit of each slot, the number of its candidates, and the first's place.

    A slot is one target unit of one sentence; its candidates are neighbours in `units`.
    """
    ends = (source_count + target_count).cumsum(0)
    first = torch.repeat_interleave(ends - source_count - target_count, target_count)
    width = torch.repeat_interleave(source_count, target_count)
    return units[first + width + _within(target_count)].long(), width, first


def _within(counts: Tensor) -> Tensor:
    """Return 0, 1, ... count - 1 for each count, concatenated."""
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.arange(len(starts)) - starts


class _Block:
    """Some target units: their slots, and the probabilities of their candidates, in files.

    Files: ``keys`` (int64, the candidates as they come), then ``candidates`` (int32, their places
    among the distinct keys), ``widths`` (uint8, candidates of a slot), ``distinct`` (int64, the
    distinct keys) and ``counts`` (float64, their expected counts). A key is
    ``source unit * target units + target unit``.
    """

    def __init__(self, folder: Path, targets: int) -> None:
        folder.mkdir()
        self.folder, self.targets = folder, targets
        # Number of slots and of candidates of each batch.
        self.slots: list[int] = []
        self.candidates: list[int] = []
        self.entry_count = 0

    def add(self, units: Tensor, target: Tensor, width: Tensor, first: Tensor) -> int:
        """Append slots; return the number of their candidates."""
        place = torch.repeat_interleave(first, width) + _within(width)
        keys = units[place].long() * self.targets + torch.repeat_interleave(target, width)
        self._append("keys", keys)
        self._append("widths", width.to(torch.uint8))
        if self.candidates and self.candidates[-1] + len(keys) <= BATCH:
            self.slots[-1] += len(width)
            self.candidates[-1] += len(keys)
        elif len(keys):
            self.slots.append(len(width))
            self.candidates.append(len(keys))
        return len(keys)

    def sort(self) -> None:
        """Number the distinct keys, and write the number of each candidate."""
        distinct = torch.zeros(0, dtype=torch.int64)
        for keys in self._batches("keys", torch.int64):
            distinct = _distinct(torch.cat([distinct, _distinct(keys)]))
        self.entry_count = len(distinct)
        self._append("distinct", distinct)
        for keys in self._batches("keys", torch.int64):
            self._append("candidates", torch.searchsorted(distinct, keys).to(torch.int32))
        (self.folder / "keys").unlink()

    def iterate(self, totals: Tensor | None, sums: Tensor, progress: Progress) -> None:
        """Replace the expected counts, and add them to `sums`, (source units,)."""
        source, _, probability = self._table(totals)
        expected = torch.zeros_like(probability)
        with (self.folder / "widths").open("rb") as widths:
            candidates = self._batches("candidates", torch.int32)
            for slots, candidate in zip(self.slots, candidates, strict=True):
                width = _read(widths, slots, torch.uint8).long()
                slot = torch.repeat_interleave(torch.arange(slots, dtype=torch.int32), width)
                likelihood = probability[candidate]
                sum_of_slot = torch.zeros(slots, dtype=torch.float64)
                sum_of_slot.index_add_(0, slot, likelihood)
                expected.index_add_(0, candidate, likelihood / sum_of_slot[slot])
                progress.add(len(candidate))
        sums.index_add_(0, source, expected)
        (self.folder / "counts").unlink(missing_ok=True)
        self._append("counts", expected)

    def entries(self, totals: Tensor | None, least: float) -> list[tuple[int, int, float]]:
        """Return (source unit, target unit, probability) of the probable entries."""
        source, target, probability = self._table(totals)
        probability = probability.float()
        probable = probability >= least
        columns = (column[probable].tolist() for column in (source, target, probability))
        return list(zip(*columns, strict=True))

    def _table(self, totals: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return source unit, target unit and probability of the distinct keys; at first all 1."""
        with (self.folder / "distinct").open("rb") as file:
            keys = _read(file, self.entry_count, torch.int64)
        source, target = keys // self.targets, keys % self.targets
        if totals is None:
            return source, target, torch.ones(len(keys), dtype=torch.float64)
        with (self.folder / "counts").open("rb") as file:
            counts = _read(file, self.entry_count, torch.float64)
        return source, target, counts.div_(totals[source])

    def _batches(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        if not self.candidates:
            return
        with (self.folder / name).open("rb") as file:
            for count in self.candidates:
                yield _read(file, count, dtype)

    def _append(self, name: str, values: Tensor) -> None:
        # PyTorch shares memory with a buffer of Python, which a file can write.
        buffer = bytearray(values.numel() * values.element_size())
        if buffer:
            torch.frombuffer(buffer, dtype=values.dtype).copy_(values)
        with (self.folder / name).open("ab") as file:
            file.write(buffer)


def _distinct(keys: Tensor) -> Tensor:
    """Return the distinct values in ascending order."""
    keys = keys.sort().values
    new = torch.ones(len(keys), dtype=torch.bool)
    new[1:] = keys[1:] != keys[:-1]
    return keys[new]


def _read(file: BinaryIO, count: int, dtype: torch.dtype) -> Tensor:
    """Read the next values of a file."""
    buffer = bytearray(count * dtype.itemsize)
    file.readinto(buffer)  # type: ignore[attr-defined]
    return torch.frombuffer(buffer, dtype=dtype) if buffer else torch.zeros(0, dtype=dtype)
