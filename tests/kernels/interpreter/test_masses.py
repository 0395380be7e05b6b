"""Equal masses by one Triton kernel, against torch operations."""

import math

import pytest
import torch

from optical.kernels.tokens.masses import equal_masses

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SIZES = 5, 300, 7  # more rows than a block


def expected(valid, dtype):
    count = valid.sum(1, keepdim=True).clamp(min=1).double()
    return torch.where(valid, -count.log(), -math.inf).to(dtype)


def masks():
    generator = torch.Generator().manual_seed(1)
    batch, n, m = SIZES
    rows, columns = (torch.rand(batch, k, generator=generator) < 0.6 for k in (n, m))
    columns[2] = False
    return rows, columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_entries_are_valid_by_default(dtype, poisoned_memory):
    log_a, log_b, epsilon = equal_masses(*SIZES, dtype, 0.1, device="cpu")
    for log_mass, size in ((log_a, 300), (log_b, 7)):
        assert log_mass.dtype == dtype and log_mass.is_contiguous()
        torch.testing.assert_close(log_mass, expected(torch.ones(5, size) > 0, dtype))
    assert torch.equal(epsilon, torch.full((5,), 0.1, dtype=dtype))


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_masks_of_any_dtype_and_strides(kind, poisoned_memory):
    rows, columns = masks()
    log_a, log_b, _ = equal_masses(*SIZES, torch.float32, 1.0, rows.to(kind), columns.to(kind))
    assert torch.equal(log_a, expected(rows, torch.float32))
    torch.testing.assert_close(log_b, expected(columns, torch.float32), rtol=1e-7, atol=0)
    transposed, shared = rows.to(kind).T.contiguous().T, columns[:1].to(kind).expand(5, 7)
    log_a, log_b, _ = equal_masses(*SIZES, torch.float32, 1.0, transposed, shared)
    assert torch.equal(log_a, expected(rows, torch.float32))
    assert torch.equal(log_b, expected(columns[:1].expand(5, 7), torch.float32))


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_lengths(kind, poisoned_memory):
    lengths = torch.tensor([300, 0, 1, 256, 257], dtype=kind)
    log_a, log_b, _ = equal_masses(*SIZES, torch.float32, 1.0, None, None, lengths)
    assert torch.equal(log_a, expected(torch.arange(300) < lengths[:, None], torch.float32))
    assert log_b.isfinite().all()
    _, log_b, _ = equal_masses(*SIZES, torch.float32, 1.0, lengths_b=lengths % 8)
    valid = torch.arange(7) < (lengths % 8)[:, None]
    torch.testing.assert_close(log_b, expected(valid, torch.float32), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("kind", "number"), [(torch.int64, 2), (torch.int8, -1), (torch.float32, 0.5)]
)
def test_other_numbers_make_their_row_nan(kind, number, poisoned_memory):
    """An additive mask (0 and -inf), or one of scores, is never taken for its opposite."""
    rows, _ = masks()
    numbers = rows.to(kind)
    numbers[1, 299] = number
    log_a, log_b, _ = equal_masses(*SIZES, torch.float32, 1.0, mask_a=numbers)
    assert log_a[1].isnan().all() and log_b.isfinite().all()
    others = [0, 2, 3, 4]
    assert torch.equal(log_a[others], expected(rows, torch.float32)[others])
    for bad in (math.nan, -math.inf):
        additive = torch.where(rows, 0.0, bad)
        log_a, _, _ = equal_masses(*SIZES, torch.float32, 1.0, mask_a=additive)
        assert log_a.isnan().all()


def test_lengths_out_of_range_make_their_row_nan():
    lengths = torch.tensor([300, 301, -1, 2**32 + 5, 4])
    log_a, _, _ = equal_masses(*SIZES, torch.float32, 1.0, lengths_a=lengths)
    assert log_a.isnan().all(1).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 3), (2, 3, 0)])
def test_empty_batches_and_sides(sizes):
    log_a, log_b, epsilon = equal_masses(*sizes, torch.float64, 1e-300)
    batch, n, m = sizes
    assert log_a.shape == (batch, n) and log_b.shape == (batch, m)
    assert torch.equal(epsilon, torch.full((batch,), 1e-300, dtype=torch.float64))
