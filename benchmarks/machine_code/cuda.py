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
    with open(output, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


class Shape(NamedTuple):
    """A batch of problems and the cost of solving it.

    Attributes:
        batch, dim, iterations: the problems.
        kernel: the forward kernel.
        warps: warps per problem.
        per_chunk: instructions of a warp per chunk of the vectors, counted in the sm_90a code.
        chunk: components of the vectors per chunk.
        entries: entries of the cost per lane.
        fragments: products of fragments of a warp per 16 components of the vectors.
        busy: the assumed utilisation of a multiprocessor.
        blocks: blocks per problem.
        barrier: seconds per iteration for the barrier of a cluster.
    """

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
    barrier: float = 0.0


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
    """Predict the seconds of a forward pass, with tensor cores overlapped and not overlapped."""
    s, slots = shape, 4 * MULTIPROCESSORS * CLOCK
    instructions = s.iterations * taken + -(-s.dim // s.chunk) * s.per_chunk + PER_ENTRY * s.entries
    issue = s.batch * s.warps * instructions / slots
    tensor = s.batch * s.warps * s.dim / 16 * s.fragments * PER_FRAGMENT / slots
    waits = -(-s.batch * s.blocks // MULTIPROCESSORS) * s.iterations * s.barrier
    return max(issue, tensor) / s.busy + waits, (issue + tensor) / s.busy + waits


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
