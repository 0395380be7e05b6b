"""Shared memory of every variant of the Triton kernels that a call can launch, without a GPU.

Calls of every size class, kind of cost, pair of dtypes and option are made on CPU tensors, while a
stand-in for Triton's driver records what they would compile, specialised arguments included: once
for NVIDIA devices and once for AMD ones, which have other precisions and fewer warps. Of each
variant only the shared memory is computed, by the passes of the compiler that allocate it;
registers and instructions are in ``triton_resources.csv``. Compute capabilities 8.0 and 9.0 have
rows of all variants, other targets those that need most of it, by kernel and tile.

Variants of one key differ by options that add loads or stores of vectors only: packed problems,
initial potentials, annealing, which gradients are needed, which side is swapped, which dtype of 16
bits the vectors have, and which side has which of two dtypes. The key's row is that of the variant
with most options.

    python -m benchmarks.machine_code.triton_shared --output benchmarks/results/triton_shared.csv
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton._C.libtriton import amd, ir, nvidia, passes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.csv_files import write_table
from optical.backends import registry
from optical.kernels import tuning
from optical.kernels.tokens import masses
from optical.ot import autograd
from optical.testing.cases import Case, packed, random_case, random_vector_case
from optical.testing.tolerance import solve

# Triton compiles the same code for 8.6 and 8.9 as for 8.0, and for 10.3 as for 10.0.
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Targets with rows of all variants, and the bytes from which on others have rows of the largest.
COMPLETE, LARGE = ("sm_80", "sm_90"), 32768
KINDS = ("given", "cosine", "sqeuclidean", "dot")
# One size of each class: the tiles of TILES, both OBLONG ones, and streamed problems.
SIZES = ((9, 12), (20, 30), (50, 60), (100, 128), (100, 200), (200, 100), (140, 150))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Options that are part of a key.
OPTIONS = ("GENERAL", "SPLIT", "REDUCE", "ROWS", "FAST", "WHOLE", "INIT", "LOG")
FIELDS = ("kernel", "tile", "kind", "vectors", "options")
Key = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Variant:
    """A kernel with the arguments that Triton's launcher hands to its compiler."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    warps: int
    stages: int

    @property
    def named(self) -> dict[str, Any]:
        """The constants by the names of the parameters."""
        return {self.kernel.arg_names[i]: value for (i, *_), value in self.constants.items()}

    @property
    def options(self) -> int:
        """The number of options that are set, and of arguments known to be divisible."""
        flags = sum(value is True for value in self.named.values())
        return 100 * flags + len(self.attributes)

    @property
    def key(self) -> Key:
        """The identity of the row."""
        named = self.named
        tile = "x".join(str(named[x]) for x in ("BLOCK_N", "BLOCK_M", "BLOCK_G") if x in named)
        options = [name for name in OPTIONS if named.get(name)]
        if "DOT_DTYPE" in named:
            bfloat = str(named["DOT_DTYPE"]) == "bf16"
            options.append("bf16" if bfloat else named["DOT_PRECISION"])
        kind = KINDS[named["KIND"]] if "KIND" in named else ""
        name = self.kernel.fn.__name__.removesuffix("_kernel")
        return name, f"{tile} {self.warps}".strip(), kind, self._operands(), " ".join(options)

    def _operands(self) -> str:
        """The vectors: two sides of one half-precision dtype, float32, or two dtypes."""
        pointers = [self.signature.get(x, "") for x in ("x_ptr", "y_ptr", "vectors_ptr")]
        found = {x.removeprefix("*") for x in pointers if x.startswith("*")}
        if len(found) > 1:
            return "mixed" if "fp32" in found else "two halves"
        return "half" if found & {"bf16", "fp16"} else "".join(found)


@contextmanager
def recording(vendor: str = "cuda") -> Iterator[dict[Key, Variant]]:
    """Record the variants that calls of the "triton" backend would compile; nothing is run.

    ``vendor`` is "cuda" or "hip". All devices of one have the same variants.
    """
    found: dict[Key, Variant] = {}

    def record(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        variant = Variant(
            fn.jit_function,
            compile["signature"],
            compile["constants"],
            compile["configs"][0],
            compile["num_warps"],
            compile["num_stages"],
        )
        known = found.get(variant.key)
        if known is None or known.options < variant.options:
            found[variant.key] = variant
        return True

    stand_in = mock.Mock()
    stand_in.get_current_device.return_value = 0
    stand_in.get_current_target.return_value = next(
        target for target in TARGETS.values() if target.backend == vendor
    )
    with (
        mock.patch.object(torch.version, "hip", "7.0" if vendor == "hip" else None),
        mock.patch.object(driver, "_active", stand_in),
        mock.patch.object(registry, "runs_triton", lambda tensor: True),
        mock.patch.object(knobs.runtime, "jit_cache_hook", record),
    ):
        _forget_targets()
        yield found
    _forget_targets()


def _forget_targets() -> None:
    for function in gc.get_objects():
        if type(function) is JITFunction:
            function.device_caches.clear()


def reachable(vendor: str) -> dict[Key, Variant]:
    """Every variant of the kernels that a call can reach on devices of a vendor, one per key."""
    with recording(vendor) as found:
        for case in _cases():
            _call(case)
        for programs in (0, 10**6):
            with mock.patch.object(tuning, "PROGRAMS", programs):
                for case in _streamed_cases():
                    _call(case)
        mask, lengths = torch.ones(2, 5, dtype=torch.bool), torch.tensor([3, 5])
        masses.equal_masses(2, 5, 5, torch.float32, 0.1, mask_a=mask, lengths_b=lengths)
    return found


def _cases() -> Iterator[Case]:
    for n, m in SIZES:
        yield random_case("", 2, n, m, max_iter=1).to(torch.float32)
        for kind, x, y in itertools.product(KINDS[1:], DTYPES.values(), DTYPES.values()):
            case = random_vector_case("", kind, batch=2, n=n, m=m, dim=64, max_iter=1)
            # Packed problems run on every tile up to the largest that their size may need.
            for layout in (case, packed(case)) if max(n, m) in (128, 150) else (case,):
                moved = layout.to(torch.float32)
                assert moved.y is not None
                yield replace(moved, x=moved.x.to(x), y=moved.y.to(y))


def _streamed_cases() -> Iterator[Case]:
    """Cases for runs in one launch and stepwise, with split columns and half precision."""
    for case in _cases():
        if case.log_a.shape[-1] == SIZES[-1][0] and case.cu_a is None:
            yield case
            yield replace(case, precision="fast", max_iter=tuning.KEPT_ITERATIONS)
    yield random_case("", 1, 9, 1100, max_iter=1).to(torch.float32)


def _call(case: Case) -> None:
    for gradient in ("envelope", "implicit", "unroll"):
        solve("triton", case, gradient)
    general = replace(case, omega=1.2, rho_a=0.5, anneal_start=1.0, tol=1e-3)
    general = replace(general, f0=torch.zeros_like(case.log_a), g0=torch.zeros_like(case.log_b))
    solve("triton", general)
    if case.log_a.shape[-1] != SIZES[0][0]:
        return
    # These kernels have one tile for all sizes.
    solve("triton", replace(case, anneal_start=1.0), "unroll")
    problem = case.problem("envelope", "triton")
    v = torch.zeros(*case.log_b.shape, 64)
    autograd.apply_plan(problem, case.log_a, case.log_b, v, False)
    if case.cu_a is None:
        autograd.plan(problem, case.log_a, case.log_b, False)


def shared_bytes(variant: Variant, name: str) -> int:
    """Compile a variant for the target ``name`` as far as the allocation of its shared memory."""
    target = TARGETS[name]
    backend = make_backend(target)
    chosen = {"num_warps": variant.warps, "num_stages": variant.stages}
    options = backend.parse_options(chosen)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(
        variant.kernel,
        dict(variant.signature),
        dict(variant.constants),
        dict(variant.attributes),
    )
    generators = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, generators, backend.get_module_map(), context)
    metadata = {"target": target, **options.__dict__}
    amd_target = target.backend == "hip"
    # Only NVIDIA's passes take the compute capability.
    capability = () if amd_target else (target.arch,)
    module = backend.make_ttir(module, metadata, options, *capability)
    module = backend.make_ttgir(module, metadata, options, *capability)
    manager = ir.pass_manager(module.context)
    if amd_target:
        amd.passes.ttgpuir.add_update_async_wait_count(manager, target.arch)
        amd.passes.ttgpuir.add_optimize_lds_usage(manager, target.arch, 0)
        passes.convert.add_scf_to_cf(manager)
        passes.convert.add_index_to_llvmir(manager)
        amd.passes.ttgpuir.add_allocate_shared_memory(manager)
    else:
        passes.ttgpuir.add_combine_tensor_select_and_if(manager)
        passes.ttgpuir.add_allocate_warp_groups(manager)
        passes.convert.add_scf_to_cf(manager)
        nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, target.arch, 80)
    manager.run(module, "allocate")
    return int(module.get_int_attr("ttg.shared"))


def wanted(
    variants: dict[Key, Variant], target: str, rows: dict[tuple[Key, str], int]
) -> dict[Key, Variant]:
    """The variants, of a target's vendor, that the table holds for it, from its complete rows."""
    if target in COMPLETE:
        return variants
    largest: dict[tuple[str, ...], tuple[int, tuple[str, ...]]] = {}
    for (key, of), size in rows.items():
        if of in COMPLETE and size >= LARGE:
            place = _operands(key)[:2]
            largest[place] = min(largest.get(place, (0, ())), (-size, _operands(key)))
    chosen = {operands for _, operands in largest.values()}
    return {key: variant for key, variant in variants.items() if _operands(key) in chosen}


def _operands(key: Key) -> tuple[str, ...]:
    """Kernel, tile, cost and vectors of a key: warps and options differ between vendors."""
    kernel, tile, kind, vectors, _ = key
    return kernel, tile.split()[0], kind, vectors


def read(path: Path) -> dict[tuple[Key, str], int]:
    """Read a table: bytes by key and target."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    keys: list[Key] = [tuple(row[name] for name in FIELDS) for row in rows]  # type: ignore[misc]
    return {(key, row["target"]): int(row["bytes"]) for key, row in zip(keys, rows, strict=True)}


def write(path: Path, rows: dict[tuple[Key, str], int]) -> None:
    """Write a table, sorted by key."""
    columns = (*FIELDS, "target", "bytes")
    cells = ((*key, target, size) for (key, target), size in sorted(rows.items()))
    write_table(path, columns, (dict(zip(columns, row, strict=True)) for row in cells))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.machine_code.triton_shared",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="CSV to write")
    parser.add_argument(
        "--missing", action="store_true", help="compile only rows that are missing in the CSV"
    )
    args = parser.parse_args()
    rows = read(args.output) if args.missing and args.output.exists() else {}
    variants = {vendor: reachable(vendor) for vendor in ("cuda", "hip")}
    kept: dict[tuple[Key, str], int] = {}
    for name, target in TARGETS.items():
        for key, variant in sorted(wanted(variants[target.backend], name, kept).items()):
            known = rows.get((key, name))
            kept[key, name] = shared_bytes(variant, name) if known is None else known
            if known is None:
                print(*key, name, kept[key, name], flush=True)
        write(args.output, {**rows, **kept})
    write(args.output, kept)


if __name__ == "__main__":
    main()
