"""Registers, spills and hot loops of the compiled CUDA kernels, without a GPU.

``python -m benchmarks.machine_code.cuda`` compiles the kernels for every architecture and writes
the rows of ``benchmarks/results/cuda_resources.csv``. ``--predict`` prints the run times on an
H200 that these rows imply, which ``docs/dev/cuda.md`` quotes.

The hot loop of a kernel is its innermost loop with a multiply-add for each entry of the tile and
half-step, or, in half precision, a product of fragments for each 256 of them. The column "loop"
counts all instructions of the loop. "taken" counts those of an undisturbed iteration with
``tol=0``, which skips the forward branches within the loop: the residual and the handling of
underflow.
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

from benchmarks.csv_files import write_table
from optical.backends import library

TABLE = Path(__file__).parents[1] / "results" / "cuda_resources.csv"
COLUMNS = (
    *("architecture", "kernel", "registers", "stack", "spill_stores", "spill_loads"),
    *("loop", "taken", "ffma", "shfl", "mufu", "bar", "lds_sts", "ldl_stl", "hmma"),
)
# Multiply-adds per iteration of one lane.
ITERATION = dict.fromkeys(("warp", "square", "block", "cluster"), 2 * 16 * 8)
ITERATION |= {"small": 2 * 8 * 4, "four": 2 * 8 * 4, "pair": 2 * 8 * 8}
# Products of fragments per iteration of one warp in half precision.
FRAGMENTS = 32


def compile_kernels(
    architecture: str, folder: Path, *flags: str, source: Path | None = None
) -> tuple[Path, str]:
    """Compile all kernels, or ``source``, to a cubin in ``folder``.

    Returns:
        The path of the cubin and the output of ``ptxas -v``.

    Raises:
        RuntimeError: nvcc was not found or failed.
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


def resources(output: str) -> dict[str, dict[str, int]]:
    """Parse registers, stack and spills of each kernel from the output of ``ptxas -v``."""
    usage = {}
    for block in output.split("Compiling entry function '")[1:]:
        name = block.split("'", 1)[0]
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", block)
        registers = re.search(r"Used (\d+) registers", block)
        if numbers is None or registers is None:
            raise ValueError(f"no resources of {name} in the output of ptxas")
        stack, stores, loads = map(int, numbers.groups())
        usage[name] = {"registers": int(registers.group(1)), "stack": stack}
        usage[name] |= {"spill_stores": stores, "spill_loads": loads}
    return usage


def disassembler() -> Path | None:
    """Find nvdisasm in the installed Triton."""
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.origin:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return path if path.is_file() else None


def hot_loops(cubin: Path) -> dict[str, Counter[str]]:
    """Count the instructions of each kernel's hot loop: by name, all ("loop") and "taken"."""
    tool = disassembler()
    if tool is None:
        return {}
    text = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    pieces = re.split(r"\n\.text\.(\w+):", text)
    counters = {}
    for name, body in zip(pieces[1::2], pieces[2::2], strict=True):
        kind = name.rsplit("_", 1)[-1]
        iterates = kind in ITERATION and "_backward_" not in name
        work = ("HMMA", FRAGMENTS) if "_fast_" in name else ("FFMA", ITERATION.get(kind, 0))
        loop = _hot_loop(body, *work) if iterates else None
        if loop is not None:
            counts = Counter(operation.split()[0].split(".")[0] for operation in loop.operations)
            counts["loop"], counts["taken"] = len(loop.operations), loop.taken
            counters[name] = counts
    return counters


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
        # Only an iteration computes reciprocals; loops that multiply vectors do not. The conjugate
        # gradients of the adjoint also divide, but in double precision.
        if (
            sum(x.startswith(work) for x in loop) >= count
            and any(x.startswith("MUFU.RCP ") for x in loop)
            and not any(x.startswith("DADD") for x in loop)
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
    """Compile for one architecture and return its rows of the table."""
    cubin, output = compile_kernels(architecture, folder, *flags, source=source)
    loops = hot_loops(cubin)
    table = []
    for name, numbers in sorted(resources(output).items()):
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
    """Replace the rows of one architecture in the table ``output``."""
    table: list[dict[str, Any]] = []
    if output.is_file():
        with open(output, newline="") as file:
            table = [row for row in csv.DictReader(file) if row["architecture"] != architecture]
    table = sorted(
        table + new, key=lambda row: library.CUDA_ARCHITECTURES.index(row["architecture"])
    )
    write_table(output, COLUMNS, table)


class Shape(NamedTuple):
    """A batch of problems and how it runs on an H200.

    Attributes:
        batch, tokens, dim, iterations: the problems; ``tokens`` is the sum of both sides.
        kernel: the forward kernel.
        problems: problems per block, or per cluster.
        warps: warps per block.
        resident: blocks per multiprocessor, from registers and shared memory.
        per_chunk: instructions of a warp per chunk of the vectors, counted in the sm_90a code.
        chunk: components of the vectors per chunk.
        entries: entries of the cost per lane.
        fragments: products of fragments of a warp per 16 components of the vectors.
        blocks: blocks per cluster.
        trips: dependent trips to other blocks per iteration.
    """

    batch: int
    tokens: int
    dim: int
    iterations: int
    kernel: str
    problems: int
    warps: int
    resident: int
    per_chunk: int
    chunk: int
    entries: int
    fragments: int
    blocks: int = 1
    trips: int = 0


SHAPES = {
    "T1": Shape(4096, 64, 128, 20, "pair", 2, 1, 12, 2 * 280, 16, 64, 2 * 16),
    "T2": Shape(1024, 128, 256, 50, "warp", 1, 1, 8, 540, 32, 128, 48),
    "T3": Shape(512, 256, 768, 50, "square", 1, 4, 2, 467, 32, 128, 40),
    "T4": Shape(512, 256, 768, 50, "block", 1, 6, 1, 467, 32, 128, 40),
    "T5": Shape(256, 512, 1024, 100, "cluster", 1, 8, 1, 467, 32, 128, 38, 2, 3),
    "T6": Shape(64, 1024, 768, 100, "cluster", 1, 8, 1, 467, 32, 128, 38, 8, 2),
    "T7": Shape(32, 1024, 1024, 200, "cluster", 1, 8, 1, 467, 32, 128, 38, 8, 2),
}
MULTIPROCESSORS, SCHEDULERS, CLOCK, BANDWIDTH = 132, 4, 1.98e9, 4.2e12
PER_ENTRY, PER_FRAGMENT = 72, 8
# Clocks per instruction of a warp that runs alone on its scheduler: in the iteration (about 820
# clocks for the 373 instructions of T3), and in the set-up, whose loads, shuffles and exponentials
# depend on one another.
ITERATION_CLOCKS, SETUP_CLOCKS = 2.2, 2.5
# Clocks per iteration of a cluster: a fence for the whole GPU with the barrier, and a trip to
# another block. The lower figures are latencies that others measured on H100.
FENCE, TRIP = (700, 2000), (200, 300)


def predicted(shape: Shape, taken: int) -> tuple[float, float]:
    """Predict the seconds of a forward pass.

    The lower figure overlaps instructions, tensor cores and memory, the higher one adds them.
    """
    s = shape
    setup = -(-s.dim // s.chunk) * s.per_chunk + PER_ENTRY * s.entries
    groups, at_once = -(-s.batch // s.problems), MULTIPROCESSORS * s.resident // s.blocks
    waves = [at_once] * (groups // at_once) + ([groups % at_once] if groups % at_once else [])
    seconds = []
    for fence, trip in zip(FENCE, TRIP, strict=True):
        exchange = s.iterations * (fence + s.trips * trip) if s.blocks > 1 else 0
        clocks = 0.0
        for wave in waves:
            # Warps on the busiest scheduler.
            blocks = -(-wave * s.blocks // MULTIPROCESSORS)
            warps = -(-blocks * s.warps // SCHEDULERS)
            clocks += s.iterations * taken * max(warps, ITERATION_CLOCKS)
            clocks += setup * max(warps, SETUP_CLOCKS) + exchange
        seconds.append(clocks / CLOCK)
    all_warps = groups * s.blocks * s.warps
    tensor = all_warps * s.dim / 16 * s.fragments * PER_FRAGMENT
    tensor /= SCHEDULERS * MULTIPROCESSORS * CLOCK
    memory = s.batch * s.tokens * s.dim * 2 / BANDWIDTH
    return max(seconds[0], tensor, memory), seconds[1] + tensor + memory


def predictions(table: Path = TABLE) -> dict[str, tuple[float, float]]:
    """Predict the microseconds of each shape, as a lower and an upper figure."""
    with open(table, newline="") as file:
        rows = {row["kernel"]: row for row in csv.DictReader(file) if row["architecture"] == "90a"}
    microseconds = {}
    for name, shape in SHAPES.items():
        low, high = predicted(shape, int(rows[f"optical_forward_{shape.kernel}"]["taken"]))
        microseconds[name] = (low * 1e6, high * 1e6)
    return microseconds


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
