"""Compiles the Triton kernels for GPUs, without one, and compares them with the resource table."""

import importlib.util
import os
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip(reason="triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip(reason="kernels are interpreted here, not compiled", allow_module_level=True)

import triton

from benchmarks.machine_code import triton as resources

if not (resources.TOOLS / "cuobjdump").is_file():
    pytest.skip(reason="this triton has no cuobjdump", allow_module_level=True)

TABLE = Path(resources.__file__).parents[1] / "results" / "triton_resources.csv"
ROWS = resources.read(TABLE)
ALL = list(resources.configurations())
# Compiled in a minute on a busy two-core machine: the main kernels, and one of each other kind.
QUICK = [
    ("resident", "64x64", "given", "fp32", ""),
    ("resident", "128x128", "cosine", "bf16", ""),
    ("adjoint", "64x64", "given", "fp32", ""),
    ("vector_gradient", "64x128x64", "cosine", "bf16", "whole"),
    ("walk", "64x64", "cosine", "bf16", "seen=0"),
    ("walk", "64x64", "cosine", "bf16", "fast rows"),
    ("finish", "lines", "", "fp32", ""),
    ("turn", "lines", "", "fp32", ""),
    ("cost_gradient", "32x64", "given", "fp32", ""),
    ("back", "64x64", "cosine", "bf16", ""),
    ("unrolled_gradient", "64x64", "cosine", "bf16", ""),
    ("norm", "16x128", "cosine", "bf16", ""),
    ("centre", "32x64", "sqeuclidean", "bf16", ""),
]
# The largest tiles may spill a few registers outside of their loops; no kernel spills in a loop of
# iterations. The kernels with more spills are listed: float64 sums, products of three TF32 dots,
# two tiles of up to 128 x 128 entries at once, and tiles of twice that size.
SPILLS, MORE = 16, 1536
CROWDED = {
    *(("adjoint", "128x128"), ("unrolled", "64x64"), ("unrolled", "128x128")),
    *(("resident", "128x128"), ("resident", "128x256"), ("resident", "256x128")),
    ("product", "64x64"),
}


def check(row):
    fits(row)
    crowded = (row.kernel, row.tile) in CROWDED or (row.kind, row.dtype) == ("cosine", "fp32")
    # The tiles were chosen by the registers of NVIDIA's GPUs.
    crowded = crowded or row.target == "gfx942"
    assert row.spills <= (MORE if crowded else SPILLS), row


def fits(row):
    """Check the limits that hold for every version of the compiler."""
    assert row.shared_bytes <= resources.SHARED[row.target] and row.loop_spills == 0, row


def measured(configuration, target):
    row = resources.measure(configuration, target)
    # Spills outside of loops are bounded only for the version of Triton that made the table.
    fits(row)
    if row.triton == ROWS[row.key].triton:
        assert row == ROWS[row.key], (
            "run benchmarks.machine_code.triton again and inspect the difference"
        )


@pytest.mark.parametrize("identified", QUICK, ids="-".join)
def test_main_kernels_match_the_table(identified):
    (configuration,) = [c for c in ALL if resources.identity(c) == identified]
    measured(configuration, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("target", resources.TARGETS)
@pytest.mark.parametrize("configuration", ALL, ids=lambda c: "-".join(resources.identity(c)))
def test_every_kernel_matches_the_table(configuration, target):
    measured(configuration, target)


def test_the_table_is_complete_and_within_the_limits():
    assert set(ROWS) == {
        (*resources.identity(c), target) for c in ALL for target in resources.TARGETS
    }
    for row in ROWS.values():
        check(row)


@pytest.mark.parametrize(("n", "m"), [(64, 64), (128, 128), (128, 256), (256, 128)])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_an_iteration_takes_at_most_two_and_a_half_times_its_multiply_adds(target, n, m):
    for kind, dtype in (("given", "fp32"), ("cosine", "bf16")):
        row = ROWS["resident", f"{n}x{m}", kind, dtype, "", target]
        # The count of multiply-adds shows that the loop of iterations was identified.
        assert 0.75 * n * m * 2 / 32 <= row.ffma * row.warps <= n * m * 2 / 32, row
        assert row.floor_clocks <= row.clocks <= 2.5 * row.floor_clocks, row


def test_instructions_of_a_loop_are_counted():
    lines = [".L_x_0:", *(f"/*{i:04x}*/ FFMA R0, R1, R2, R0 ;" for i in range(60))]
    lines += [f"/*{i:04x}*/ SHFL.BFLY PT, R0, R1, 0x1, 0x1f ;" for i in range(12)]
    lines += ["/*0100*/ @P0 BRA `(.L_x_0) ;", "/*0110*/ STL [R1], R2 ;"]
    row = resources.Row("resident", "", "", "", "", 2, "sm_90", triton=triton.__version__)
    resources._count(row, "\n".join(lines), steps=1)
    assert (row.ffma, row.shuffles, row.instructions, row.loop_spills) == (60, 12, 73, 0)
    assert row.clocks == round(73 / 4 * 2, 1)
