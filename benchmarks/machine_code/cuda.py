"""What the CUDA compiler makes of the kernels, without a GPU: registers, spills, hot loops.

``python -m benchmarks.machine_code.cuda`` compiles them for every architecture and writes the rows of
``benchmarks/results/cuda_resources.csv``; ``--predict`` prints what these let one expect of an
H200, as in ``docs/cuda.md``. The hot loop of a kernel is the innermost one with a
multiply-add for each entry of the tile and half-step, or a product of fragments for each 256 of
them. "loop" counts all of its instructions, "taken" those of a calm iteration with ``tol=0``: what
a branch forward within the loop jumps over, the residual and what is lost to underflow, is not run.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from optical.backends import library

TABLE = Path(__file__).parents[1] / "results" / "cuda_resources.csv"
COLUMNS = (
    *("architecture", "kernel", "registers", "stack", "spill_stores", "spill_loads"),
    *("loop", "taken", "ffma", "shfl", "mufu", "bar", "lds_sts", "ldl_stl", "hmma"),
)
# Multiply-adds of one iteration on the tile of a lane.
ITERATION = dict.fromkeys(("warp", "square", "block", "cluster"), 2 * 16 * 8)
ITERATION |= {"small": 2 * 8 * 4, "four": 2 * 8 * 4, "pair": 2 * 8 * 8}
# Products of fragments of one iteration in half precision.
FRAGMENTS = 32


def compile_kernels(
    architecture: str, folder: Path, *flags: str, source: Path | None = None
) -> tuple[Path, str]:
    """A cubin in ``folder`` of all kernels, or of another source, and what ptxas says of it.

    Raises:
        RuntimeError: there is no nvcc, or it failed.
    """
    nvcc, sources = library.find_nvcc(), library.source_folder()
    if nvcc is None or sources is None:
        raise RuntimeError("nvcc was not found")
    cubin = folder / f"{architecture}.cubin"
    command = [*nvcc, "-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v"]
    source = source or sources / "cuda" / "sinkhorn.cu"
    command += [*flags, f"-I{sources / 'cuda'}", str(source), "-o", str(cubin)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(result.stderr)
    return cubin, result.stderr


def resources(said: str) -> dict[str, dict[str, int]]:
    """Kernel -> registers, stack and spills, out of the output of ``ptxas -v``."""
    found = {}
    for block in said.split("Compiling entry function '")[1:]:
        name = block.split("'", 1)[0]
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", block)
        registers = re.search(r"Used (\d+) registers", block)
        if numbers is None or registers is None:
            raise ValueError(f"no resources of {name} in the output of ptxas")
        stack, stores, loads = map(int, numbers.groups())
        found[name] = {"registers": int(registers.group(1)), "stack": stack}
        found[name] |= {"spill_stores": stores, "spill_loads": loads}
    return found


def disassembler() -> Path | None:
    """nvdisasm, as the package triton brings it."""
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.origin:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return path if path.is_file() else None


def hot_loops(cubin: Path) -> dict[str, Counter[str]]:
    """Kernel -> instructions of its hot loop by name, and "loop" and "taken" of them all."""
    tool = disassembler()
    if tool is None:
        return {}
    text = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    pieces = re.split(r"\n\.text\.(\w+):", text)
    found = {}
    for name, body in zip(pieces[1::2], pieces[2::2], strict=True):
        kind = name.rsplit("_", 1)[-1]
        iterates = kind in ITERATION and "_backward_" not in name
        work = ("HMMA", FRAGMENTS) if "_fast_" in name else ("FFMA", ITERATION.get(kind, 0))
        loop = _hot_loop(body, *work) if iterates else None
        if loop is not None:
            counts = Counter(operation.split()[0].split(".")[0] for operation in loop.operations)
            counts["loop"], counts["taken"] = len(loop.operations), loop.taken
            found[name] = counts
    return found


class _Loop(NamedTuple):
    operations: list[str]
    taken: int


def _hot_loop(body: str, work: str, count: int) -> _Loop | None:
    labels: dict[str, int] = {}
    operations: list[str] = []
    conditional: list[bool] = []
    for line in body.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?(.*?);", line)
        if label:
            labels[label.group(1)] = len(operations)
        elif instruction:
            operations.append(instruction.group(2))
            conditional.append(instruction.group(1) is not None)
    jumps = {}
    for at, operation in enumerate(operations):
        target = re.search(r"\.L_x_\d+", operation)
        if target and re.match(r"BRA\b(?!\.DIV)", operation):
            jumps[at] = labels.get(target.group(0), at)
    loops = []
    for end, start in jumps.items():
        loop = operations[start : end + 1]
        # Reciprocals tell an iteration from the loops that multiply vectors.
        if sum(x.startswith(work) for x in loop) >= count and any(
            x.startswith("MUFU.RCP") for x in loop
        ):
            at, taken = start, 0
            while at <= end:
                taken += 1
                forward = conditional[at] and at < jumps.get(at, at) <= end
                at = jumps[at] if forward else at + 1
            loops.append(_Loop(loop, taken))
    return min(loops, key=lambda loop: len(loop.operations), default=None)


def rows(
    architecture: str, folder: Path, *flags: str, source: Path | None = None
) -> list[dict[str, Any]]:
    """The rows of the table for one architecture."""
    cubin, said = compile_kernels(architecture, folder, *flags, source=source)
    loops = hot_loops(cubin)
    table = []
    for name, numbers in sorted(resources(said).items()):
        row: dict[str, Any] = {"architecture": architecture, "kernel": name, **numbers}
        counts = loops.get(name)
        if counts:
            row |= {"loop": counts["loop"], "taken": counts["taken"]}
            row |= {"ffma": counts["FFMA"], "shfl": counts["SHFL"]}
            row |= {"mufu": counts["MUFU"], "bar": counts["BAR"] + counts["UCGABAR_ARV"]}
            row |= {"lds_sts": counts["LDS"] + counts["STS"]}
            row |= {"ldl_stl": counts["LDL"] + counts["STL"], "hmma": counts["HMMA"]}
        table.append(row)
    return table


def write(output: Path, architecture: str, new: list[dict[str, Any]]) -> None:
    """Put the rows of an architecture in the place of those that the table has of it."""
    table: list[dict[str, Any]] = []
    if output.is_file():
        with open(output, newline="") as file:
            table = [row for row in csv.DictReader(file) if row["architecture"] != architecture]
    table = sorted(
        table + new, key=lambda row: library.CUDA_ARCHITECTURES.index(row["architecture"])
    )
    with open(output, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


class Shape(NamedTuple):
    """Problems, and how they are solved: ``warps`` of each; instructions of a warp for a chunk of
    so many entries, counted in the code for sm_90a; entries of a lane; products of fragments for 16
    entries of the vectors; how busy a multiprocessor is kept."""

    batch: int
    dim: int
    iterations: int
    kernel: str
    warps: float
    per_chunk: int
    chunk: int
    entries: int
    fragments: int
    busy: float
    blocks: int = 1
    barrier: float = 0.0  # seconds, of a cluster


SHAPES = {
    "T1": Shape(4096, 128, 20, "pair", 1 / 2, 2 * 280, 16, 64, 2 * 16, 0.8),
    "T2": Shape(1024, 256, 50, "warp", 1, 540, 32, 128, 48, 0.8),
    "T3": Shape(512, 768, 50, "square", 4, 467, 32, 128, 40, 0.8),
    "T4": Shape(512, 768, 50, "block", 6, 467, 32, 128, 40, 0.6),
    "T5": Shape(256, 1024, 100, "cluster", 16, 467, 32, 128, 38, 0.6, 2, 0.7e-6),
    "T6": Shape(64, 768, 100, "cluster", 64, 467, 32, 128, 38, 0.6, 8, 1e-6),
    "T7": Shape(32, 1024, 200, "cluster", 64, 467, 32, 128, 38, 0.6, 8, 1e-6),
}
MULTIPROCESSORS, CLOCK, PER_ENTRY, PER_FRAGMENT = 132, 1.98e9, 80, 8


def predicted(shape: Shape, taken: int) -> tuple[float, float]:
    """Seconds of a forward pass: with the tensor cores beside the rest, and one after the other."""
    s, slots = shape, 4 * MULTIPROCESSORS * CLOCK
    instructions = s.iterations * taken + -(-s.dim // s.chunk) * s.per_chunk + PER_ENTRY * s.entries
    issue = s.batch * s.warps * instructions / slots
    tensor = s.batch * s.warps * s.dim / 16 * s.fragments * PER_FRAGMENT / slots
    waits = -(-s.batch * s.blocks // MULTIPROCESSORS) * s.iterations * s.barrier
    return max(issue, tensor) / s.busy + waits, (issue + tensor) / s.busy + waits


def predictions(table: Path = TABLE) -> dict[str, tuple[float, float]]:
    """Shape -> microseconds, from and to."""
    with open(table, newline="") as file:
        rows = {row["kernel"]: row for row in csv.DictReader(file) if row["architecture"] == "90a"}
    found = {}
    for name, shape in SHAPES.items():
        low, high = predicted(shape, int(rows[f"optical_forward_{shape.kernel}"]["taken"]))
        found[name] = (low * 1e6, high * 1e6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", nargs="+", default=list(library.CUDA_ARCHITECTURES))
    parser.add_argument("--output", type=Path, default=TABLE)
    parser.add_argument("--predict", action="store_true")
    options = parser.parse_args()
    if options.predict:
        for name, (low, high) in predictions(options.output).items():
            print(f"{name} {low:.0f} ... {high:.0f} us")
        return
    for architecture in options.architectures:
        with tempfile.TemporaryDirectory() as folder:
            write(options.output, architecture, rows(architecture, Path(folder)))


if __name__ == "__main__":
    main()
