"""Whether Triton can compile for a device: a kernel without work, compiled and loaded."""

import contextlib
import io

import torch

import triton
import triton.language as tl


@triton.jit
def probe_kernel(out_ptr):
    """Store a number."""
    tl.store(out_ptr, 1)


def obstacle(device: int) -> str | None:
    """Return the error with which Triton fails to compile or load a kernel, or None.

    Such an error is a missing C compiler, which Triton needs, or a device that its assembler does
    not know.
    """
    try:
        # Triton prints the whole program that its assembler refuses.
        with torch.cuda.device(device), contextlib.redirect_stdout(io.StringIO()):
            # Reading `run` loads the kernel; nothing is launched.
            _ = probe_kernel.warmup(torch.int32, grid=(1,)).run
    except Exception as error:  # Triton has no base class of its errors
        lines = str(error).strip().splitlines() or [""]
        line = next((line for line in lines if "fatal" in line), lines[0]).strip()
        return f"Triton cannot compile for this device ({type(error).__name__}: {line})"
    return None
