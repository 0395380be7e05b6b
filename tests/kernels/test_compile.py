"""Compile the Triton kernels for real GPUs without having one, and hold them to their table."""

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
# What a busy two-core machine compiles in a minute: the headline kernels, and one of each other.
QUICK = [
    ("resident", "64x64", "given", "fp32", ""),
    ("resident", "128x128", "cosine", "bf16", ""),
    ("adjoint", "32x32", "given", "fp32", ""),
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
# A few registers may be stored once around the loops of the largest tiles; in a loop of iterations
# none. Those that crowd are known by name: float64 sums, products of three TF32 dots, two tiles of
# up to 128 x 128 entries at once, and tiles of twice that.
SPILLS, MORE = 16, 1536
CROWDED = {
    *(("adjoint", "128x128"), ("unrolled", "64x64"), ("unrolled", "128x128")),
    *(("resident", "128x128"), ("resident", "128x256"), ("resident", "256x128")),
    ("product", "64x64"),
}


def check(row):
    fits(row)
    crowded = (row.kernel, row.tile) in CROWDED or (row.kind, row.dtype) == ("cosine", "fp32")
    # The tiles were chosen by NVIDIA's registers.
    crowded = crowded or row.target == "gfx942"
    assert row.spills <= (MORE if crowded else SPILLS), row


def fits(row):
    """What every compiler has to make of a kernel."""
    assert row.shared_bytes <= resources.SHARED[row.target] and row.loop_spills == 0, row


def measured(configuration, target):
    row = resources.measure(configuration, target)
    # The bounds of spills outside of loops are those of the Triton that made the table.
    fits(row)
    if row.triton == ROWS[row.key].triton:
        assert row == ROWS[row.key], (
            "run benchmarks.machine_code.triton again and look at the difference"
        )


@pytest.mark.parametrize("identified", QUICK, ids="-".join)
def test_the_headline_kernels_are_what_the_table_says(identified):
    (configuration,) = [c for c in ALL if resources.identity(c) == identified]
    measured(configuration, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("target", resources.TARGETS)
@pytest.mark.parametrize("configuration", ALL, ids=lambda c: "-".join(resources.identity(c)))
def test_every_kernel_is_what_the_table_says(configuration, target):
    measured(configuration, target)


def test_the_table_holds_every_kernel_and_nothing_that_a_chip_does_not():
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
        # The count of one iteration's multiply-adds says that the right loop was found.
        assert 0.75 * n * m * 2 / 32 <= row.ffma * row.warps <= n * m * 2 / 32, row
        assert row.floor_clocks <= row.clocks <= 2.5 * row.floor_clocks, row


def test_a_loop_is_counted_as_the_assembly_has_it():
    lines = [".L_x_0:", *(f"/*{i:04x}*/ FFMA R0, R1, R2, R0 ;" for i in range(60))]
    lines += [f"/*{i:04x}*/ SHFL.BFLY PT, R0, R1, 0x1, 0x1f ;" for i in range(12)]
    lines += ["/*0100*/ @P0 BRA `(.L_x_0) ;", "/*0110*/ STL [R1], R2 ;"]
    row = resources.Row("resident", "", "", "", "", 2, "sm_90", triton=triton.__version__)
    resources._count(row, "\n".join(lines), steps=1)
    assert (row.ffma, row.shuffles, row.instructions, row.loop_spills) == (60, 12, 73, 0)
    assert row.clocks == round(73 / 4 * 2, 1)
