"""Equal masses of both sides of a batch, and its temperatures, in one launch."""

import functools
import struct

import torch
from torch import Tensor

import triton
import triton.language as tl
from optical.kernels import tuning
from optical.kernels.launch import KeptLaunch
from optical.kernels.tiles import INFINITY


@triton.jit
def fill_side(
    log_mass_ptr,
    mask_ptr,
    lengths_ptr,
    problem,
    stride_batch,
    stride_entry,
    size,
    MASK: tl.constexpr,
    LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store -log(count) at the valid entries of one side of a problem, and -inf elsewhere.

    All entries are NaN if one of the mask is neither 0 nor 1, or a length is out of range.
    """
    count = size
    invalid = False
    if MASK:
        mask_ptr += problem * stride_batch
        ones = tl.zeros((BLOCK,), tl.int32)
        others = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, size, BLOCK):
            index = start + tl.arange(0, BLOCK)
            offsets = index.to(tl.int64) * stride_entry
            entry = tl.load(mask_ptr + offsets, mask=index < size, other=0)
            ones += (entry == 1).to(tl.int32)
            others += ((entry == 0) | (entry == 1)).to(tl.int32) ^ 1
        count = tl.sum(ones, 0)
        invalid = tl.sum(others, 0) > 0
    elif LENGTHS:
        length = tl.load(lengths_ptr + problem)
        invalid = (length < 0) | (length > size)
        count = length.to(tl.int32)
    # In float64, so that the rounded logarithm is that of the exact one in any dtype.
    log_mass = -tl.log(tl.maximum(count, 1).to(tl.float64))
    log_mass = tl.where(invalid, float("nan"), log_mass)
    outside = tl.where(invalid, float("nan"), -INFINITY)
    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        if MASK:
            offsets = index.to(tl.int64) * stride_entry
            valid = tl.load(mask_ptr + offsets, mask=index < size, other=0) == 1
        else:
            valid = index < count
        target = log_mass_ptr + problem * size + index
        tl.store(target, tl.where(valid, log_mass, outside), mask=index < size)


@triton.jit(do_not_specialize=["epsilon_bits", "n", "m", "stride_a_batch", "stride_b_batch"])
def equal_masses_kernel(
    mask_a_ptr,
    mask_b_ptr,
    lengths_a_ptr,
    lengths_b_ptr,
    log_a_ptr,
    log_b_ptr,
    epsilon_ptr,
    epsilon_bits,
    n,
    m,
    stride_a_batch,
    stride_a_entry,
    stride_b_batch,
    stride_b_entry,
    MASK_A: tl.constexpr,
    MASK_B: tl.constexpr,
    LENGTHS_A: tl.constexpr,
    LENGTHS_B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fill one side of one problem; programs of the rows also store its temperature."""
    problem = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        epsilon = epsilon_bits.to(tl.int64).to(tl.float64, bitcast=True)
        tl.store(epsilon_ptr + problem, epsilon)
        fill_side(
            log_a_ptr,
            mask_a_ptr,
            lengths_a_ptr,
            problem,
            stride_a_batch,
            stride_a_entry,
            n,
            MASK_A,
            LENGTHS_A,
            BLOCK,
        )
    else:
        fill_side(
            log_b_ptr,
            mask_b_ptr,
            lengths_b_ptr,
            problem,
            stride_b_batch,
            stride_b_entry,
            m,
            MASK_B,
            LENGTHS_B,
            BLOCK,
        )


def equal_masses(
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    epsilon: float,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    lengths_a: Tensor | None = None,
    lengths_b: Tensor | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-masses (batch, n) and (batch, m) of equal valid entries, and ``epsilon`` (batch,).

    The valid entries of a problem have -log of their number, the others -inf. Without a mask and
    lengths all entries are valid. The three tensors share one allocation.

    Args:
        batch, n, m: sizes.
        dtype: float32 or float64.
        epsilon: temperature of every problem.
        mask_a, mask_b: (batch, n) and (batch, m), of any dtype and strides; 1 marks a valid entry
            and 0 padding. Any other number makes the masses of its problem and side NaN.
        lengths_a, lengths_b: (batch,) integers instead of masks; entries from this index on are
            padding. Lengths below 0 or above the size make the masses NaN.
        device: where the tensors are allocated.
    """
    given = _numbers(mask_a), _numbers(mask_b), _adjacent(lengths_a), _adjacent(lengths_b)
    facts = [None if tensor is None else (tensor.dtype, tensor.stride()) for tensor in given]
    start_b, start_epsilon, launch = _launch(batch, n, m, dtype, epsilon, *facts)
    memory = torch.empty(start_epsilon + batch, dtype=dtype, device=device)
    log_a = memory.as_strided((batch, n), (n, 1), 0)
    log_b = memory.as_strided((batch, m), (m, 1), start_b)
    temperatures = memory.as_strided((batch,), (1,), start_epsilon)
    if batch:
        tensors = [memory if tensor is None else tensor for tensor in given]
        with torch.cuda.device_of(memory):
            launch(*tensors, log_a, log_b, temperatures)
    return log_a, log_b, temperatures


_Facts = tuple[torch.dtype, tuple[int, ...]] | None


@functools.lru_cache(maxsize=4096)
def _launch(
    batch: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    epsilon: float,
    mask_a: _Facts,
    mask_b: _Facts,
    lengths_a: _Facts,
    lengths_b: _Facts,
) -> tuple[int, int, KeptLaunch]:
    """Where log_b and the temperatures start, and the launch, by dtypes and strides of the input.

    Each tensor starts at a multiple of 128 bytes.
    """
    unit = 128 // dtype.itemsize
    start_b = -(-batch * n // unit) * unit
    start_epsilon = start_b + -(-batch * m // unit) * unit
    launch = KeptLaunch(
        equal_masses_kernel,
        (batch, 2),
        # A float argument would be rounded to float32.
        struct.unpack("<q", struct.pack("<d", epsilon))[0],
        *(n, m),
        *(mask_a[1] if mask_a else (0, 0)),
        *(mask_b[1] if mask_b else (0, 0)),
        MASK_A=mask_a is not None,
        MASK_B=mask_b is not None,
        LENGTHS_A=lengths_a is not None,
        LENGTHS_B=lengths_b is not None,
        BLOCK=tuning.VECTOR_BLOCK,
    )
    return start_b, start_epsilon, launch


def _numbers(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.dtype != torch.bool else mask.view(torch.uint8)


def _adjacent(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.contiguous()
