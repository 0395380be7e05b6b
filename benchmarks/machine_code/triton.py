"""What the Triton kernels need of a chip, read off their machine code: no GPU is asked.

Every tile of ``optical.kernels.tuning`` is compiled ahead of time for each target. A row says how
many registers and bytes of stack a thread needs, how many registers it stores there (on AMD's, how
many it lacks), and how much shared memory a program needs. For the kernels of the iterations on
chip, the instructions of the innermost loop are counted too, which gives the clocks that one
iteration takes if every unit of a multiprocessor is kept busy:

    clocks = max(instructions / 4, shuffles, 2 exponentials or reciprocals) per warp, times warps

and beside them the floor, n m 2 / 128 clocks, of its multiply-adds alone.

    python -m benchmarks.machine_code.triton --output benchmarks/results/triton_resources.csv
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from optical.kernels import batch, gradients, plan_products, tuning
from optical.kernels.onchip import adjoint, solve, unrolled
from optical.kernels.streamed import adjoint as streamed_adjoint
from optical.kernels.streamed import (
    single_launch,
    stepwise,
    unrolled_backward,
    unrolled_replay,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that a program may have.
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INTEGERS = {
    *("n", "m", "dim", "max_iter", "least", "most", "width", "is_first"),
    *("plane", "remaining", "k", "row_count", "total_rows", "total_columns"),
    *("stride_batch", "stride_n", "stride_m"),
}
POINTERS = {"cu_ptr": "*i64", "cu_a_ptr": "*i64", "cu_b_ptr": "*i64"}
POINTERS |= dict.fromkeys(("n_iter_ptr", "status_ptr", "stopped_ptr", "state_ptr"), "*i32")
POINTERS |= {"steps_ptr": "*i32"}
POINTERS |= {"plan_ptr": "*fp16"}
KINDS = {"given": 0, "cosine": 1, "sqeuclidean": 2, "dot": 3}


@dataclass(frozen=True)
class Configuration:
    """A kernel with everything that is known when it is compiled."""

    kernel: Any
    tile: str
    kind: str
    dtype: str
    constants: dict[str, Any]
    warps: int
    stages: int
    options: str = ""

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.removesuffix("_kernel")


@dataclass
class Row:
    """One configuration on one target."""

    kernel: str
    tile: str
    kind: str
    dtype: str
    options: str
    warps: int
    target: str
    registers: int = 0
    stack_bytes: int = 0
    spills: int = 0
    loop_spills: int = 0
    shared_bytes: int = 0
    ffma: int = 0
    shuffles: int = 0
    mufu: int = 0
    barriers: int = 0
    instructions: int = 0
    clocks: float = 0.0
    floor_clocks: float = 0.0
    triton: str = field(default=triton.__version__)

    @property
    def key(self) -> tuple[str, ...]:
        return self.kernel, self.tile, self.kind, self.dtype, self.options, self.target


def identity(c: Configuration) -> tuple[str, ...]:
    """The key of a configuration's rows but for the target."""
    return c.name, c.tile, c.kind, c.dtype, c.options


def configurations() -> Iterator[Configuration]:
    """Everything in the tuned tables, with the options that change the generated code."""
    plain = {"PACKED": False, "START": False, "GENERAL": False, "ANNEAL": False}
    every = {"PACKED": False, "START": True, "GENERAL": True, "ANNEAL": True, "STEPS": 1}
    for side, tile in tuning.TILES.items():
        name = f"{side}x{side}"
        roomy = tuning.ROOMY[side]
        options = plain | {"STEPS": tuning.STEPS}
        yield _tiled(solve.resident_kernel, name, tile, "given", "fp32", **options)
        yield _tiled(solve.resident_kernel, name, tile, "cosine", "bf16", **options)
        yield _tiled(solve.resident_kernel, name, roomy, "cosine", "fp32", **options)
        yield _tiled(solve.resident_kernel, name, roomy, "cosine", "bf16", "every", **every)
    for tile in tuning.OBLONG:
        name, options = f"{tile.rows}x{tile.columns}", plain | {"STEPS": tuning.STEPS}
        yield _tiled(solve.resident_kernel, name, tile, "given", "fp32", **options)
        yield _tiled(solve.resident_kernel, name, tile, "cosine", "bf16", **options)
        options = plain | {"STEPS": 1}
        yield _tiled(solve.resident_kernel, name, tile, "cosine", "bf16", "tol", **options)
    for side, tile in tuning.ADJOINT.items():
        for kind, dtype in (("given", "fp32"), ("cosine", "bf16")):
            options = {"PACKED": False}
            yield _tiled(adjoint.adjoint_kernel, f"{side}x{side}", tile, kind, dtype, **options)
            options |= {"START": False, "POTENTIALS": True, "NEED_X": True}
            options |= {"NEED_Y": kind != "given", "BLOCK_G": 32}
            options |= {"DOT_DTYPE": tl.bfloat16, "DOT_PRECISION": "tf32"}
            name = f"{side}x{side}"
            yield _tiled(unrolled.unrolled_kernel, name, tile, kind, dtype, **options)
    for table, partial, dtypes in (
        (tuning.WHOLE, tuning.PARTIAL, ("bf16", "fp16")),
        (tuning.SINGLE, tuning.SINGLE_PARTIAL, ("fp32",)),
    ):
        for grain in (*table.values(), partial):
            for dtype in dtypes:
                yield _gradient(grain, dtype)
    stream = {"PACKED": False}
    for kind, dtype in (("given", "fp32"), ("cosine", "bf16"), ("cosine", "fp32")):
        for seen in (0, 1):
            tile = tuning.STREAM
            options = stream | {"SPLIT": False, "REDUCE": seen, "ROWS": False, "FAST": False}
            yield _tiled(
                stepwise.walk_kernel, "64x64", tile, kind, dtype, f"seen={seen}", **options
            )
        options = stream | {"SPLIT": True, "REDUCE": 0, "ROWS": False, "FAST": False}
        yield _tiled(stepwise.walk_kernel, "64x64", tile, kind, dtype, "split", **options)
        options = stream | {"START": False, "BLOCK": tuning.VECTOR_BLOCK, "FAST": False}
        yield _tiled(single_launch.loop_kernel, "64x64", tuning.STREAM, kind, dtype, **options)
        apart = tuning.ADJOINT_STREAM[kind != "given" and dtype == "fp32"]
        options = stream | {"BLOCK": apart.rows, "VECTOR_BLOCK": tuning.VECTOR_BLOCK}
        kernel = streamed_adjoint.adjoint_loop_kernel
        name = f"{apart.rows}x{apart.columns}"
        yield _tiled(kernel, name, apart, kind, dtype, **options)
        options = stream | {"IMPLICIT": True, "READ_COST": True}
        yield _tiled(
            plan_products.mass_gradient_kernel, "64x64", tuning.PLAN_PRODUCT, kind, dtype, **options
        )
        options = stream | {"DOT_PRECISION": "exact", "BLOCK_G": 64}
        yield _tiled(
            plan_products.product_kernel, "64x64", tuning.PLAN_PRODUCT, kind, dtype, **options
        )
        yield from _unrolled(kind, dtype)
    tile, fast = tuning.STREAM, stream | {"FAST": True}
    for rows in (True, False):
        options = fast | {"SPLIT": False, "REDUCE": 0, "ROWS": rows}
        what = "fast rows" if rows else "fast columns"
        yield _tiled(stepwise.walk_kernel, "64x64", tile, "cosine", "bf16", what, **options)
    yield _tiled(stepwise.keep_kernel, "64x64", tile, "cosine", "bf16", **stream)
    options = fast | {"START": False, "BLOCK": tuning.VECTOR_BLOCK}
    yield _tiled(single_launch.loop_kernel, "64x64", tile, "cosine", "bf16", "fast", **options)
    lines = {"PACKED": False, "START": False, "BLOCK": tuning.VECTOR_BLOCK}
    yield Configuration(stepwise.finish_kernel, "lines", "", "fp32", lines, 4, 3)
    gather = {"PACKED": False, "BLOCK": tuning.VECTOR_BLOCK}
    yield Configuration(stepwise.gather_kernel, "lines", "", "fp32", gather, 4, 3)
    turn = lines | {"ROWS": True, "INIT": False, "FAST": False}
    yield Configuration(stepwise.turn_kernel, "lines", "", "fp32", turn, 4, 3)
    cells = {"IMPLICIT": True, "BLOCK_N": 32, "BLOCK_M": 64, "stride_m": 1}
    yield Configuration(gradients.cost_gradient_kernel, "32x64", "given", "fp32", cells, 4, 3)
    survey = {"PACKED": False, "BLOCK": tuning.VECTOR_BLOCK}
    yield Configuration(unrolled_replay.survey_kernel, "lines", "", "fp32", survey, 4, 3)
    norms = {"KIND": 1, "PACKED": False, "SCALED": False, "BLOCK_T": 16, "BLOCK_D": 128}
    yield Configuration(batch.norm_kernel, "16x128", "cosine", "bf16", norms, 4, 3)
    centre = {"PACKED": False, "BLOCK_T": 32, "BLOCK_D": 64}
    yield Configuration(batch.centre_kernel, "32x64", "sqeuclidean", "bf16", centre, 4, 3)


def _unrolled(kind: str, dtype: str) -> Iterator[Configuration]:
    """The kernels of streamed unrolled gradients."""
    options: dict[str, Any] = {"PACKED": False}
    yield _tiled(unrolled_replay.forth_kernel, "64x64", tuning.STREAM, kind, dtype, **options)
    yield _tiled(unrolled_replay.weight_kernel, "64x64", tuning.STREAM, kind, dtype, **options)
    back = options | {"COLUMNS": False, "POTENTIALS": True}
    for begin in (True, False):
        what = "begin" if begin else ""
        back["INIT"] = begin
        yield _tiled(
            unrolled_backward.back_kernel, "64x64", tuning.STREAM, kind, dtype, what, **back
        )
    grain = tuning.SINGLE_PARTIAL if dtype == "fp32" else tuning.PARTIAL
    tile = tuning.ADJOINT_STREAM[False]
    if kind != "given":
        tile = tuning.Tile(grain.rows, grain.columns, grain.depth, grain.rows, grain.warps, 1, 2)
    options |= {"COLUMNS": False, "BLOCK_G": grain.entries}
    options["DOT_DTYPE"] = tl.bfloat16 if dtype == "bf16" else tl.float32
    options["DOT_PRECISION"] = "exact" if dtype == "fp32" else "tf32"
    name = f"{tile.rows}x{tile.columns}"
    yield _tiled(unrolled_backward.unrolled_gradient_kernel, name, tile, kind, dtype, **options)


def _tiled(
    kernel: Any,
    name: str,
    tile: tuning.Tile,
    kind: str,
    dtype: str,
    options: str = "",
    **constants: Any,
) -> Configuration:
    constants |= {"KIND": KINDS[kind], "SCALED": kind == "cosine" and dtype == "fp32"}
    constants |= {"WIDE": False, "PRECISION": "exact" if dtype == "fp32" else "ieee"}
    constants |= {"BLOCK_N": tile.rows, "BLOCK_M": tile.columns, "BLOCK_D": tile.depth}
    constants |= {"PART": tile.part, "WARPS_N": tile.warps_n, "WARPS_M": tile.warps_m}
    constants |= {"NVIDIA": True}
    constants = {key: constants[key] for key in constants if key in kernel.arg_names}
    return Configuration(kernel, name, kind, dtype, constants, tile.warps, tile.stages, options)


def _gradient(tile: tuning.GradientTile, dtype: str) -> Configuration:
    constants = {"KIND": 1, "PACKED": False, "IMPLICIT": True, "WHOLE": tile.whole}
    constants |= {"SCALED": dtype == "fp32", "WIDE": False}
    constants |= {"PRECISION": "exact" if dtype == "fp32" else "ieee"}
    constants |= {"DOT_DTYPE": tl.bfloat16 if dtype == "bf16" else tl.float32}
    constants |= {"DOT_PRECISION": "exact" if dtype == "fp32" else "tf32"}
    constants |= {"BLOCK_N": tile.rows, "BLOCK_M": tile.columns, "BLOCK_D": tile.depth}
    constants |= {"BLOCK_G": tile.entries}
    name = f"{tile.rows}x{tile.columns}x{tile.entries}"
    options = "whole" if tile.whole else "partial"
    kernel = gradients.vector_gradient_kernel
    return Configuration(kernel, name, "cosine", dtype, constants, tile.warps, tile.stages, options)


def measure(configuration: Configuration, target: str) -> Row:
    """Compile one configuration for one target and read the row off the result."""
    c = configuration
    nvidia = TARGETS[target].backend == "cuda"
    exact = "tf32x3" if nvidia else "ieee"
    warps = c.warps if nvidia else min(c.warps, tuning.AMD_WARPS)
    constants = {}
    for name, value in c.constants.items():
        if name == "NVIDIA":
            value = nvidia
        elif isinstance(value, str):
            value = exact if value == "exact" or not nvidia else value
        constants[name] = value
    vectors, signature = "*" + c.dtype, {}
    of_vectors = {"x_ptr", "y_ptr", "vectors_ptr"}
    if c.name in ("vector_gradient", "unrolled_gradient"):
        of_vectors.add("grad_ptr")
    for name in c.kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in of_vectors:
            signature[name] = vectors
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*fp32")
        else:
            signature[name] = "i32" if name in INTEGERS else "fp32"
    # The launch of Triton tells the compiler which arguments are multiples of 16.
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(c.kernel.arg_names)
        if name.endswith("_ptr") or name in ("dim", "width", "plane")
    }
    compiled = triton.compile(
        ASTSource(c.kernel, signature, constants, attributes),
        target=TARGETS[target],
        options={"num_warps": warps, "num_stages": c.stages},
    )
    row = Row(c.name, c.tile, c.kind, c.dtype, c.options, warps, target)
    row.shared_bytes = compiled.metadata.shared
    if not nvidia:
        text = compiled.asm["amdgcn"]
        row.registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        row.stack_bytes = _number(r"\.private_segment_fixed_size:\s+(\d+)", text)
        row.spills = _number(r"\.vgpr_spill_count:\s+(\d+)", text)
        return row
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = _output("cuobjdump", "-res-usage", binary)
        row.registers = _number(r"REG:(\d+)", usage)
        row.stack_bytes = _number(r"STACK:(\d+)", usage)
        assembly = ""
        if row.stack_bytes or c.name == "resident":
            assembly = _output("nvdisasm", "-c", binary)
            row.spills = len(re.findall(r"\bSTL\b", assembly))
        if c.name == "resident":
            _count(row, assembly, c.constants["STEPS"])
            row.floor_clocks = c.constants["BLOCK_N"] * c.constants["BLOCK_M"] * 2 / 128
    return row


def _output(tool: str, *arguments: Any) -> str:
    command = [TOOLS / tool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def _count(row: Row, assembly: str, steps: int) -> None:
    """The instructions of one iteration: the smallest loop with sums over the lanes of a warp.

    With ``steps`` > 1 that loop stands in another one, whose surplus is shared out to the steps.
    """
    labels: dict[str, int] = {}
    operations: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in assembly.splitlines():
        label = re.match(r"^\.(L_x_\d+):", line)
        if label:
            labels[label.group(1)] = len(operations)
        found = re.search(
            r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9.]*)(.*?);", line
        )
        if not found:
            continue
        operations.append(found.group(1))
        back = re.search(r"`\(\.(L_x_\d+)\)", found.group(2))
        if found.group(1).startswith("BRA") and back and back.group(1) in labels:
            loops.append((labels[back.group(1)], len(operations)))

    def iterates(loop: tuple[int, int]) -> bool:
        body = operations[slice(*loop)]
        # Loops over the entries of vectors multiply in tensor cores; reductions shuffle.
        sums = sum(x.startswith("SHFL") for x in body)
        return sums >= 10 and not any("HMMA" in x or "HGMMA" in x for x in body)

    eligible = sorted(filter(iterates, loops), key=lambda loop: loop[1] - loop[0])
    if not eligible:
        return
    inner = eligible[0]
    around = [loop for loop in eligible if loop[0] <= inner[0] and inner[1] <= loop[1]]
    body = Counter(operations[slice(*inner)])
    counts = {name: float(sum(v for k, v in body.items() if k.startswith(name))) for name in UNITS}
    total = float(sum(body.values()))
    if steps > 1 and len(around) > 1:
        outer = Counter(operations[slice(*around[1])])
        for name in UNITS:
            more = sum(v for k, v in outer.items() if k.startswith(name)) - counts[name]
            counts[name] += more / steps
        total += (sum(outer.values()) - total) / steps
    row.loop_spills = sum(body[name] for name in body if name.startswith(("STL", "LDL")))
    row.ffma, row.shuffles = round(counts["FFMA"]), round(counts["SHFL"])
    row.mufu, row.barriers = round(counts["MUFU"]), round(counts["BAR"])
    row.instructions = round(total)
    row.clocks = round(max(total / 4, counts["SHFL"], 2 * counts["MUFU"]) * row.warps, 1)


INSTRUCTION = r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9.]*)(.*?);"
UNITS = ("FFMA", "SHFL", "MUFU", "BAR")


def read(path: Path) -> dict[tuple[str, ...], Row]:
    """The rows of a committed table by their key."""
    rows = {}
    types = {
        item.name: {"int": int, "float": float}.get(str(item.type), str) for item in fields(Row)
    }
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            row = Row(**{name: types[name](value) for name, value in line.items()})
            rows[row.key] = row
    return rows


def write(path: Path, rows: dict[tuple[str, ...], Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [item.name for item in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(vars(rows[key]) for key in sorted(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a CSV; its other rows stay")
    parser.add_argument("--target", choices=TARGETS, action="append", help="all of them if absent")
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--missing", action="store_true", help="only rows that the CSV lacks")
    arguments = parser.parse_args()
    rows = read(arguments.output) if arguments.output.exists() else {}
    for target in arguments.target or TARGETS:
        for configuration in configurations():
            if arguments.kernel and arguments.kernel not in configuration.name:
                continue
            if arguments.missing and (*identity(configuration), target) in rows:
                continue
            row = measure(configuration, target)
            rows[row.key] = row
            print(*vars(row).values(), flush=True)
            write(arguments.output, rows)


if __name__ == "__main__":
    main()
