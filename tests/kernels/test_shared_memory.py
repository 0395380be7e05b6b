"""Every variant of the Triton kernels that a call can launch fits in the memory of its devices."""

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
# Capability of the code, bytes per block, devices. Code for 8.0 also runs on 8.6 and 8.9.
DEVICES = [
    (80, 101376, "RTX 30 and 40, A10, L4, L40"),
    (80, 166912, "A100"),
    (90, 232448, "H100, H200"),
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


@pytest.fixture(scope="module")
def variants():
    return triton_shared.reachable()


def test_every_variant_has_a_row(variants):
    expected = {(key, capability) for key in variants for capability in triton_shared.LIMITS}
    assert set(ROWS) == expected, (
        "run python -m benchmarks.machine_code.triton_shared --missing: "
        f"{sorted(set(ROWS) ^ expected)[:5]}"
    )


@pytest.mark.parametrize(("capability", "limit", "devices"), DEVICES, ids=[d[2] for d in DEVICES])
def test_every_variant_fits(capability, limit, devices):
    too_large = {row: size for row, size in ROWS.items() if row[1] == capability and size > limit}
    assert not too_large


@pytest.mark.parametrize("key", SAMPLE, ids=" ".join)
def test_rows_are_what_the_compiler_allocates(key, variants):
    for capability in triton_shared.LIMITS:
        found = triton_shared.shared_bytes(variants[key], capability)
        assert found == ROWS[key, capability]


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("kind", ["cosine", "dot"])
def test_every_pair_of_dtypes_compiles(kind, dtypes):
    case = random_vector_case("", kind, batch=1, n=5, m=6, dim=16, max_iter=1).to(torch.float32)
    x, y = (z.to(dtype) for z, dtype in zip((case.x, case.y), dtypes, strict=True))
    with triton_shared.recording() as variants:
        solve("triton", replace(case, x=x, y=y))
    (resident,) = [variant for key, variant in variants.items() if key[0] == "resident"]
    assert resident.signature["x_ptr"] != resident.signature["y_ptr"]
    triton_shared.shared_bytes(resident, 90)


@pytest.mark.slow
def test_every_row_is_what_the_compiler_allocates(variants):
    for key, capability in ROWS:
        found = triton_shared.shared_bytes(variants[key], capability)
        assert found == ROWS[key, capability], key
