"""Every variant of the Triton kernels that a call can launch fits in the memory of its devices."""

import functools
import os
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip(reason="kernels are interpreted here, not compiled", allow_module_level=True)

import torch

from benchmarks.machine_code import triton_shared
from optical.testing.cases import random_vector_case
from optical.testing.tolerance import solve

TABLE = Path(triton_shared.__file__).parents[1] / "results" / "triton_shared.csv"
ROWS = triton_shared.read(TABLE)
# Target of the code, bytes per block, devices. Code for 8.0 also runs on 8.6 and 8.9.
DEVICES = [
    ("sm_80", 101376, "RTX 30 and 40, A10, L4, L40"),
    ("sm_80", 166912, "A100"),
    ("sm_90", 232448, "H100, H200"),
    ("sm_100", 232448, "B200, B300"),
    ("sm_120", 101376, "RTX 50, RTX PRO 6000"),
    ("gfx942", 65536, "MI300"),
]
# Compiled anew as far as the allocation of shared memory: the largest, and one of each way to
# multiply.
SAMPLE = [
    ("unrolled", "128x128x32 8", "cosine", "fp32", "ROWS tf32x3"),
    ("unrolled", "64x64x32 4", "cosine", "mixed", "ROWS tf32x3"),
    ("resident", "64x64 1", "cosine", "half", ""),
    ("vector_gradient", "64x64x64 8", "dot", "two halves", "WHOLE bf16"),
    ("walk", "64x64 4", "given", "fp32", ""),
]
HALVES = torch.bfloat16, torch.float16
MIXED = [(torch.float32, half) for half in HALVES] + [(half, torch.float32) for half in HALVES]
MIXED += [HALVES, HALVES[::-1]]


reachable = functools.cache(triton_shared.reachable)
vendors = pytest.mark.parametrize("vendor", ["cuda", pytest.param("hip", marks=pytest.mark.slow)])


def targets(vendor):
    return [name for name, target in triton_shared.TARGETS.items() if target.backend == vendor]


@vendors
def test_every_variant_has_a_row(vendor):
    found = {row for row in ROWS if row[1] in targets(vendor)}
    expected = {
        (key, target)
        for target in targets(vendor)
        for key in triton_shared.wanted(reachable(vendor), target, ROWS)
    }
    assert found == expected, (
        "run python -m benchmarks.machine_code.triton_shared --missing: "
        f"{sorted(found ^ expected)[:5]}"
    )


@pytest.mark.parametrize(("target", "limit", "devices"), DEVICES, ids=[d[2] for d in DEVICES])
def test_every_variant_fits(target, limit, devices):
    sizes = {row: size for row, size in ROWS.items() if row[1] == target}
    assert sizes
    assert not {row: size for row, size in sizes.items() if size > limit}


def test_every_target_has_a_limit():
    assert {target for target, *_ in DEVICES} == set(triton_shared.TARGETS)


@pytest.mark.parametrize("key", SAMPLE, ids=" ".join)
def test_rows_are_what_the_compiler_allocates(key):
    for target in targets("cuda"):
        if (key, target) in ROWS:
            found = triton_shared.shared_bytes(reachable("cuda")[key], target)
            assert found == ROWS[key, target]


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("kind", ["cosine", "dot"])
def test_every_pair_of_dtypes_compiles(kind, dtypes):
    case = random_vector_case("", kind, batch=1, n=5, m=6, dim=16, max_iter=1).to(torch.float32)
    x, y = (z.to(dtype) for z, dtype in zip((case.x, case.y), dtypes, strict=True))
    with triton_shared.recording() as variants:
        solve("triton", replace(case, x=x, y=y))
    (resident,) = [variant for key, variant in variants.items() if key[0] == "resident"]
    assert resident.signature["x_ptr"] != resident.signature["y_ptr"]
    triton_shared.shared_bytes(resident, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("target", triton_shared.TARGETS)
def test_every_row_is_what_the_compiler_allocates(target):
    variants = reachable(triton_shared.TARGETS[target].backend)
    for key, of in ROWS:
        if of == target:
            assert triton_shared.shared_bytes(variants[key], target) == ROWS[key, target], key
