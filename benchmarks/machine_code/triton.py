"""Registers, spills, shared memory and loop instructions of the Triton kernels, without a GPU.

Every tile of ``optical.kernels.tuning`` is compiled ahead of time for each target. A row holds the
registers and stack bytes of a thread, its spills (store instructions to the stack on NVIDIA,
spilled registers on AMD), and the shared memory of a program. For the on-chip solver, it also holds
the instruction counts of the innermost loop, and the clocks of one iteration on a multiprocessor
whose units are all fully used:

    clocks = max(instructions / 4, shuffles, 2 * (exponentials and reciprocals)) per warp * warps

``floor_clocks`` is the bound 2 n m / 128 of the multiply-adds alone.

    python -m benchmarks.machine_code.triton --output benchmarks/results/triton_resources.csv
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.csv_files import write_table
from benchmarks.machine_code.triton_configurations import Configuration, configurations, identity
from optical.kernels import tuning

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Limit of the shared memory of a program, in bytes.
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Parameters of type int32; scalars are float32 otherwise, and pointers point to float32.
INTEGERS = {
    *("n", "m", "dim", "max_iter", "least", "most", "width", "iteration"),
    *("plane", "remaining", "parts", "k", "row_count", "total_rows", "total_columns"),
    *("stride_batch", "stride_n", "stride_m"),
    *("stride_a_batch", "stride_a_entry", "stride_b_batch", "stride_b_entry", "epsilon_bits"),
}
POINTERS = {"cu_ptr": "*i64", "cu_a_ptr": "*i64", "cu_b_ptr": "*i64"}
POINTERS |= dict.fromkeys(("n_iter_ptr", "status_ptr", "stopped_ptr", "state_ptr"), "*i32")
POINTERS |= {"steps_ptr": "*i32"}
POINTERS |= {"mask_a_ptr": "*u8", "mask_b_ptr": "*u8", "lengths_b_ptr": "*i64"}
POINTERS |= {"plan_ptr": "*fp16"}
INSTRUCTION = r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9.]*)(.*?);"
UNITS = ("FFMA", "SHFL", "MUFU", "BAR")


@dataclass
class Row:
    """A row of the table: one configuration on one target.

    Instructions and clocks are those of one iteration; see the module's docstring.
    """

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
        """The identity of the row; ``identity`` of the configuration with the target."""
        return self.kernel, self.tile, self.kind, self.dtype, self.options, self.target


def measure(configuration: Configuration, target: str) -> Row:
    """Compile one configuration for one target and read its row off the machine code."""
    c = configuration
    nvidia = TARGETS[target].backend == "cuda"
    warps = c.warps if nvidia else min(c.warps, tuning.AMD_WARPS)
    constants = _target_constants(c.constants, nvidia)
    # Triton's launcher marks these arguments as multiples of 16 for the compiler, unless the kernel
    # is not specialised for them.
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, parameter in enumerate(c.kernel.params)
        if not parameter.do_not_specialize
        and (parameter.name.endswith("_ptr") or parameter.name in ("dim", "width", "plane"))
    }
    compiled = triton.compile(
        ASTSource(c.kernel, _signature(c, constants), constants, attributes),
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


def _target_constants(constants: dict[str, Any], nvidia: bool) -> dict[str, Any]:
    """The constants with the target's precisions of dot products."""
    exact = "tf32x3" if nvidia else "ieee"
    result = {}
    for name, value in constants.items():
        if name == "NVIDIA":
            value = nvidia
        elif isinstance(value, str) and value != "half":
            value = exact if value == "exact" or not nvidia else value
        result[name] = value
    return result


def _signature(configuration: Configuration, constants: dict[str, Any]) -> dict[str, str]:
    """The type of every parameter of the kernel, in Triton's notation."""
    of_vectors = {"x_ptr", "y_ptr", "vectors_ptr"}
    if configuration.name in ("vector_gradient", "unrolled_gradient"):
        of_vectors.add("grad_ptr")
    signature = {}
    for name in configuration.kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in of_vectors:
            signature[name] = "*" + configuration.dtype
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*fp32")
        else:
            signature[name] = "i32" if name in INTEGERS else "fp32"
    return signature


def _output(tool: str, *arguments: Any) -> str:
    command = [TOOLS / tool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match.group(1)) if match else 0


def _count(row: Row, assembly: str, steps: int) -> None:
    """Count the instructions of one iteration: the smallest loop with sums over a warp's lanes.

    With ``steps`` > 1 that loop is nested in another one, whose additional instructions are divided
    by ``steps``.
    """
    operations, loops = _parse_loops(assembly)

    def iterates(loop: tuple[int, int]) -> bool:
        body = operations[slice(*loop)]
        # Reductions shuffle; loops over the entries of vectors use tensor cores instead.
        shuffles = sum(operation.startswith("SHFL") for operation in body)
        tensor_cores = any("HMMA" in operation or "HGMMA" in operation for operation in body)
        return shuffles >= 10 and not tensor_cores

    iterations = sorted(filter(iterates, loops), key=lambda loop: loop[1] - loop[0])
    if not iterations:
        return
    inner = iterations[0]
    enclosing = [loop for loop in iterations if loop[0] <= inner[0] and inner[1] <= loop[1]]
    body = Counter(operations[slice(*inner)])
    counts = {unit: float(_count_unit(body, unit)) for unit in UNITS}
    total = float(sum(body.values()))
    if steps > 1 and len(enclosing) > 1:
        outer = Counter(operations[slice(*enclosing[1])])
        for unit in UNITS:
            counts[unit] += (_count_unit(outer, unit) - counts[unit]) / steps
        total += (sum(outer.values()) - total) / steps
    row.loop_spills = sum(body[name] for name in body if name.startswith(("STL", "LDL")))
    row.ffma, row.shuffles = round(counts["FFMA"]), round(counts["SHFL"])
    row.mufu, row.barriers = round(counts["MUFU"]), round(counts["BAR"])
    row.instructions = round(total)
    row.clocks = round(max(total / 4, counts["SHFL"], 2 * counts["MUFU"]) * row.warps, 1)


def _parse_loops(assembly: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The operation of every instruction, and the range of every loop (a backward branch)."""
    labels: dict[str, int] = {}
    operations: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in assembly.splitlines():
        label = re.match(r"^\.(L_x_\d+):", line)
        if label:
            labels[label.group(1)] = len(operations)
        instruction = re.search(INSTRUCTION, line)
        if not instruction:
            continue
        operation, operands = instruction.groups()
        operations.append(operation)
        target = re.search(r"`\(\.(L_x_\d+)\)", operands)
        if operation.startswith("BRA") and target and target.group(1) in labels:
            loops.append((labels[target.group(1)], len(operations)))
    return operations, loops


def _count_unit(operations: Counter[str], unit: str) -> int:
    return sum(count for operation, count in operations.items() if operation.startswith(unit))


def read(path: Path) -> dict[tuple[str, ...], Row]:
    """Read the rows of a table, by their key."""
    rows = {}
    types = {
        item.name: {"int": int, "float": float}.get(str(item.type), str) for item in fields(Row)
    }
    with path.open(encoding="utf-8", newline="") as file:
        for record in csv.DictReader(file):
            row = Row(**{name: types[name](value) for name, value in record.items()})
            rows[row.key] = row
    return rows


def write(path: Path, rows: dict[tuple[str, ...], Row]) -> None:
    """Write a table, sorted by key."""
    write_table(
        path, [item.name for item in fields(Row)], (vars(rows[key]) for key in sorted(rows))
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.machine_code.triton",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="CSV to update; rows not compiled are kept"
    )
    parser.add_argument(
        "--target", choices=TARGETS, action="append", help="repeatable (default: all targets)"
    )
    parser.add_argument("--kernel", help="compile only kernels whose name contains this text")
    parser.add_argument(
        "--missing", action="store_true", help="compile only rows missing in the CSV"
    )
    args = parser.parse_args()
    rows = read(args.output) if args.output.exists() else {}
    for target in args.target or TARGETS:
        for configuration in configurations():
            if args.kernel and args.kernel not in configuration.name:
                continue
            if args.missing and (*identity(configuration), target) in rows:
                continue
            row = measure(configuration, target)
            rows[row.key] = row
            print(*vars(row).values(), flush=True)
            write(args.output, rows)


if __name__ == "__main__":
    main()
