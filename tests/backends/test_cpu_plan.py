"""The plan and the equal log-masses that the CPU library computes in one pass."""

import math
from dataclasses import replace

import pytest
import torch

from optical.backends import cpu, library, reference
from optical.backends.dense import PaddedProblem
from optical.backends.problem import example_problem
from optical.testing.cases import all_cases, random_case, random_vector_case

MISSING = library.load_cpu().reason
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"CPU library: {MISSING}")
PADDED = [case for case in all_cases() if case.cu_a is None]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", PADDED, ids=lambda case: case.name)
def test_plans_are_those_of_the_reference(case, dtype, log):
    problem = case.to(dtype).problem()
    if problem.anderson or problem.anneal_start:
        problem = problem._replace(anderson=0, anneal_start=0.0)
    solution = cpu.forward(problem)
    found = cpu.plan(problem, solution.f, solution.g, log)
    # Of vectors, both compute the cost in `dtype`, but add its products in another order.
    double = case.to(dtype).to(torch.float64).problem()
    truth = PaddedProblem(double).plan(solution.f.double(), solution.g.double(), log=log)
    assert found.dtype == dtype and found.is_contiguous()
    nothing = -math.inf if log else 0.0
    assert torch.equal(found == nothing, found.double() == nothing)
    assert torch.equal((truth == nothing) & (found != nothing), torch.zeros_like(found).bool())
    eps = torch.finfo(dtype).eps
    size = 0.0 if problem.y is None else 20 * case.scale
    slack = eps * (size / problem.epsilon.double().clamp(min=1e-300))[:, None, None]
    scale = truth.abs().masked_fill(truth.isinf(), 0.0)
    if log:
        # The exponent is a difference of terms of this size, exact in double precision.
        slack = slack + eps * scale + 1e-12 * case.scale / problem.epsilon[:, None, None]
    else:
        slack = scale * (2 * eps + slack + 4e-12 / problem.epsilon[:, None, None])
        slack = slack + torch.finfo(dtype).tiny
    same = (found.double() == truth) | (found.isnan() & truth.isnan())
    assert (same | ((found.double() - truth).abs() <= slack)).all()


def test_a_plan_of_large_costs_keeps_its_digits():
    """In float32 arithmetic the exponent would be off by 6e-5 / epsilon: 0.6 % of the plan."""
    cost = random_case("large", 3, 30, 40).x + 1000
    problem = random_case("large", 3, 30, 40, epsilon=0.01, max_iter=50)
    problem = replace(problem, x=cost).to(torch.float32).problem()
    solution = cpu.forward(problem)
    found = cpu.plan(problem, solution.f, solution.g, False).double()
    f, g, cost = solution.f.double(), solution.g.double(), problem.x.double()
    exponent = (f[:, :, None] + g[:, None, :] - cost) / problem.epsilon.double()[:, None, None]
    exponent += problem.log_a.double()[:, :, None] + problem.log_b.double()[:, None, :]
    torch.testing.assert_close(found, exponent.exp(), rtol=1.2e-7, atol=1.2e-38)


@pytest.mark.parametrize("log", [False, True])
def test_masks_anywhere_and_strides_change_no_bit(log):
    generator = torch.Generator().manual_seed(3)
    case = random_case("masks", 4, 21, 37, rows=[21, 9, 0, 1], columns=[37, 20, 5, 3])
    rows, columns = (torch.randperm(k, generator=generator) for k in (21, 37))
    problem = case.to(torch.float32).problem()
    solution = cpu.forward(problem)
    expected = cpu.plan(problem, solution.f, solution.g, log)
    mixed = problem._replace(log_a=problem.log_a[:, rows], log_b=problem.log_b[:, columns])
    valid = (mixed.log_a > -math.inf)[:, :, None] & (mixed.log_b > -math.inf)[:, None]
    cost = problem.x[:, rows][:, :, columns].masked_fill(~valid, math.nan)
    wide = torch.full((4, 40, 60), math.nan)
    wide[:, 3:24, 5:42] = cost
    for x in (cost, cost.mT.contiguous().mT, wide[:, 3:24, 5:42]):
        found = cpu.plan(mixed._replace(x=x), solution.f[:, rows], solution.g[:, columns], log)
        assert torch.equal(found, expected[:, rows][:, :, columns])
    alone = cpu.plan(
        problem._replace(x=problem.x[:1].expand(4, 21, 37)), solution.f, solution.g, log
    )
    assert torch.equal(alone[0], expected[0])


@pytest.mark.parametrize("field", ["x", "log_a", "log_b", "epsilon", "f0"])
@pytest.mark.parametrize("log", [False, True])
def test_malformed_problems_are_nan_alone(field, log):
    case = random_case("malformed", 3, 9, 10, rows=[9, 6, 9], columns=[10, 10, 4])
    problem = case.to(torch.float32).problem()
    problem = problem._replace(f0=torch.zeros(3, 9), g0=torch.zeros(3, 10))
    f, g = torch.zeros(3, 9), torch.zeros(3, 10)
    clean = cpu.plan(problem, f, g, log)
    broken = getattr(problem, field).clone()
    broken[(1,) + (2,) * (broken.dim() - 1)] = math.nan
    problem = problem._replace(**{field: broken})
    for module in (cpu, reference):
        found = module.plan(problem, f, g, log)
        assert found[1, :6].isnan().all()
        assert (found[1, 6:] == (-math.inf if log else 0.0)).all()
        assert torch.equal(found[::2], clean[::2]) or module is reference


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["cosine", "sqeuclidean", "dot"])
def test_plans_of_vectors_in_half_precision(kind, half):
    case = random_vector_case("", kind, n=14, m=15, dim=7, rows=[14, 3, 0])
    problem = case.to(torch.float32, vectors=half).problem()
    single = case.to(torch.float32, vectors=half).to(torch.float32).problem()
    solution = cpu.forward(problem)
    found = cpu.plan(problem, solution.f, solution.g, False)
    assert torch.equal(found, cpu.plan(single, solution.f, solution.g, False))


def test_threads_change_no_bit():
    before = torch.get_num_threads()
    many = random_case("many", 50, 30, 20).to(torch.float32).problem()
    large = random_case("large", 1, 1200, 1030, max_iter=2).to(torch.float32).problem()
    try:
        for problem in (many, large):
            torch.set_num_threads(1)
            solution = cpu.forward(problem)
            expected = cpu.plan(problem, solution.f, solution.g, False)
            for count in (2, 3):
                torch.set_num_threads(count)
                assert torch.equal(cpu.plan(problem, solution.f, solution.g, False), expected)
    finally:
        torch.set_num_threads(before)


def test_plans_of_packed_problems_are_refused():
    offsets = torch.tensor([0, 3, 6])
    packed = example_problem(torch.rand(1, 6, 4), torch.rand(1, 6, 4), "cosine")._replace(
        x=torch.rand(6, 4), y=torch.rand(6, 4), cu_a=offsets, cu_b=offsets
    )
    with pytest.raises(ValueError, match="refused"):
        cpu.plan(packed, torch.zeros(2, 3), torch.zeros(2, 3), False)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_plans_without_entries(shape):
    batch, n, m = shape
    problem = random_case("empty", *shape).to(torch.float32).problem()
    assert cpu.plan(problem, torch.zeros(batch, n), torch.zeros(batch, m), False).shape == shape


# ------------------------------------------------------------------------------------- masses

MASK_DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
]


def expected_masses(valid, dtype):
    count = valid.sum(1, keepdim=True).clamp(min=1).double()
    return torch.where(valid, -count.log(), -math.inf).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
def test_equal_masses_of_a_mask(mask_dtype, dtype):
    valid = torch.rand(5, 19, generator=torch.Generator().manual_seed(0)) < 0.6
    valid[2] = False
    mask, expected = valid.to(mask_dtype), expected_masses(valid, dtype)
    for layout in (mask, mask.T.contiguous().T, torch.stack([mask, 1 - mask.to(torch.int8)], 2)):
        strided = layout if layout.dim() == 2 else layout[:, :, 0].to(mask_dtype)
        found = cpu.equal_masses(5, 19, dtype, strided)
        torch.testing.assert_close(
            found, expected, rtol=2e-7 if dtype == torch.float32 else 1e-15, atol=0
        )
    one = cpu.equal_masses(4, 19, dtype, mask[:1].expand(4, 19))
    assert torch.equal(one, cpu.equal_masses(5, 19, dtype, mask)[:1].expand(4, 19))


@pytest.mark.parametrize("length_dtype", [torch.int32, torch.int64], ids=str)
def test_equal_masses_of_lengths(length_dtype):
    lengths = torch.tensor([3, 0, 7, 9, -2])
    valid = torch.arange(7) < lengths[:, None]
    found = cpu.equal_masses(5, 7, torch.float64, lengths=lengths.to(length_dtype))
    torch.testing.assert_close(found, expected_masses(valid, torch.float64), rtol=1e-15, atol=0)
    every_other = torch.stack([lengths, lengths + 1], 1).to(length_dtype)[:, 0]
    assert torch.equal(cpu.equal_masses(5, 7, torch.float64, lengths=every_other), found)


def test_equal_masses_without_a_mask():
    found = cpu.equal_masses(2, 5, torch.float32)
    assert torch.equal(found, torch.full((2, 5), -math.log(5)))
    assert cpu.equal_masses(2, 0, torch.float32).shape == (2, 0)
    assert cpu.equal_masses(0, 3, torch.float32).shape == (0, 3)


@pytest.mark.parametrize("mask_dtype", [d for d in MASK_DTYPES if d != torch.bool], ids=str)
def test_masks_that_are_neither_0_nor_1_are_reported(mask_dtype):
    mask = torch.ones(3, 9, dtype=mask_dtype)
    cpu.equal_masses(3, 9, torch.float32, mask)
    values = [2, 3] if mask_dtype == torch.uint8 else [2, -1]
    values += [0.5, math.nan, -math.inf, 5e-5] if mask_dtype.is_floating_point else []
    for value in values:
        broken = mask.clone()
        broken[2, 8] = value
        with pytest.raises(cpu.InvalidMask):
            cpu.equal_masses(3, 9, torch.float32, broken)


def test_equal_masses_refuse_what_they_cannot_read():
    with pytest.raises(ValueError, match=r"expected \(3, 9\)"):
        cpu.equal_masses(3, 9, torch.float32, torch.ones(3, 8))
    with pytest.raises(ValueError, match=r"expected \(3,\)"):
        cpu.equal_masses(3, 9, torch.float32, lengths=torch.ones(2, dtype=torch.int64))
    with pytest.raises(TypeError):
        cpu.equal_masses(3, 9, torch.float32, torch.ones(3, 9, dtype=torch.complex64))
    with pytest.raises(TypeError):
        cpu.equal_masses(3, 9, torch.float32, lengths=torch.ones(3, dtype=torch.int8))
