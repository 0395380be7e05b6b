"""Compile the Triton kernels for real GPUs without having one: they build, and spill nothing."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process, not compiled", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from optical.kernels.sinkhorn_backward import BLOCK_M, BLOCK_N, _sinkhorn_backward_kernel
from optical.kernels.sinkhorn_forward import _sinkhorn_forward_kernel, tile

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Integers of the launchers as Triton types them; every other argument is a float32 pointer.
TYPES = {"n_iter_ptr": "*i32", "n": "i32", "m": "i32", "max_iter": "i32", "tol": "fp32"}
TYPES |= {"stride_batch": "i32", "stride_n": "i32", "stride_m": "constexpr"}


def resources(kernel, capability, num_warps, blocks, aligned, tmp_path):
    """Registers and bytes of stack per thread of the kernel compiled for one architecture."""
    constants = {"stride_m": 1, "BLOCK_N": blocks[0], "BLOCK_M": blocks[1]}
    signature = {
        name: "constexpr" if name in constants else TYPES.get(name, "*fp32")
        for name in kernel.arg_names
    }
    # The launch of Triton tells the compiler which arguments are multiples of 16.
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr") or (aligned and name in ("stride_batch", "stride_n"))
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps},
    )
    if not CUOBJDUMP.is_file():
        pytest.skip("cuobjdump is not part of this triton")
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "-res-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return found["REG"], found["STACK"]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("size", [32, 64])
def test_forward_compiles_without_spills(size, capability, tmp_path):
    *blocks, num_warps = tile(size, size, aligned=True)
    _, stack = resources(_sinkhorn_forward_kernel, capability, num_warps, blocks, True, tmp_path)
    assert stack == 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_forward_of_unaligned_rows_spills_at_most_a_register_or_two(size, capability, tmp_path):
    *blocks, num_warps = tile(size, size, aligned=False)
    _, stack = resources(_sinkhorn_forward_kernel, capability, num_warps, blocks, False, tmp_path)
    assert stack <= 16


@pytest.mark.parametrize("capability", [80, 90])
def test_backward_compiles_without_spills(capability, tmp_path):
    registers, stack = resources(
        _sinkhorn_backward_kernel, capability, 4, (BLOCK_N, BLOCK_M), False, tmp_path
    )
    assert registers <= 128 and stack == 0, (registers, stack)
