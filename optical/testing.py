"""The named problems and the one tolerance rule, shared by the tests and the benchmarks.

The rule: an implementation may be as wrong as plain PyTorch in the same dtype, plus a little:

    max |out - truth| <= max |same-dtype reference - truth| + TOLERANCE[dtype] * scale

where truth is the float64 reference run for the same number of iterations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optical import ops

# A change of this table is a decision about the project, never a way to make one test pass.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
FIELDS = ("value", "value_linear", "f", "g", "marginal_error", "n_iter")


@dataclass(frozen=True)
class Problem:
    """A batch of transport problems in float64, and how far to iterate."""

    name: str
    cost: Tensor
    log_a: Tensor
    log_b: Tensor
    epsilon: Tensor
    max_iter: int = 20
    tol: float = 0.0

    @property
    def scale(self) -> float:
        """The size of a cost, against which errors of values and potentials are measured."""
        present = (self.log_a > -math.inf)[:, :, None] & (self.log_b > -math.inf)[:, None, :]
        readable = self.cost[present & self.cost.isfinite()]
        largest = [x.abs().max().item() for x in (readable, self.epsilon) if x.numel()]
        return max(largest, default=1.0)

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Problem:
        """The same problem as an implementation of that dtype and device receives it."""
        names = ("cost", "log_a", "log_b", "epsilon")
        return replace(self, **{name: getattr(self, name).to(device, dtype) for name in names})

    def without_padding(self, index: int) -> Problem:
        """Problem ``index`` alone, as a batch of one from which absent entries were cut."""
        rows, columns = self.log_a[index] > -math.inf, self.log_b[index] > -math.inf
        return replace(
            self,
            name=f"{self.name}[{index}]",
            cost=self.cost[index, rows][:, columns][None],
            log_a=self.log_a[index, rows][None],
            log_b=self.log_b[index, columns][None],
            epsilon=self.epsilon[index : index + 1],
        )


def uniform(batch: int, size: int, lengths: list[int] | None = None) -> Tensor:
    """(batch, size) log-masses, uniform over the first ``lengths`` entries and -inf after them."""
    counts = torch.tensor(lengths if lengths is not None else [size] * batch, dtype=torch.float64)
    present = torch.arange(size)[None, :] < counts[:, None]
    return torch.where(present, -counts.clamp(min=1).log()[:, None], -math.inf)


def random_problem(
    name: str,
    batch: int,
    n: int,
    m: int,
    *,
    epsilon: float = 0.1,
    rows: list[int] | None = None,
    columns: list[int] | None = None,
    max_iter: int = 20,
    seed: int = 0,
) -> Problem:
    """Uniform random costs in [0, 1) with uniform marginals over the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(batch, n, m, generator=generator, dtype=torch.float64)
    temperature = torch.full((batch,), epsilon, dtype=torch.float64)
    log_a, log_b = uniform(batch, n, rows), uniform(batch, m, columns)
    return Problem(name, cost, log_a, log_b, temperature, max_iter)


def problems() -> Iterator[Problem]:
    """Every named problem: shapes, ragged batches, degenerate ones, hard ones."""
    yield random_problem("1x1", 2, 1, 1)
    yield random_problem("1x9", 2, 1, 9)
    yield random_problem("9x1", 2, 9, 1)
    yield random_problem("7x5", 3, 7, 5)
    yield random_problem("32x32", 2, 32, 32, epsilon=0.05)
    yield random_problem("31x33", 2, 31, 33)
    yield random_problem("63x64", 2, 63, 64, epsilon=0.05)
    yield random_problem("252x123", 1, 252, 123, epsilon=0.05, max_iter=10)
    yield random_problem("no_problem", 0, 7, 5)
    yield random_problem("4099_problems", 4099, 3, 2, max_iter=5)
    yield random_problem("ragged", 4, 12, 17, rows=[12, 1, 7, 9], columns=[3, 17, 16, 1])
    yield random_problem("one_fully_masked", 3, 6, 8, rows=[6, 0, 4], columns=[8, 5, 0])
    yield random_problem("one_token_sides", 3, 5, 5, rows=[1, 5, 1], columns=[5, 1, 1])
    for epsilon in (1.0, 0.01, 0.001):
        yield random_problem(f"epsilon_{epsilon:g}", 2, 20, 24, epsilon=epsilon, max_iter=50)
    yield random_problem("no_iteration", 2, 7, 5, max_iter=0)
    yield random_problem("one_iteration", 2, 7, 5, max_iter=1)

    base = random_problem("", 3, 13, 10, seed=1)
    yield replace(base, name="equal_costs", cost=torch.full_like(base.cost, 0.5))
    yield replace(base, name="large_costs", cost=1e3 * base.cost, epsilon=100 * base.epsilon)
    yield replace(base, name="negative_costs", cost=base.cost - 2)
    yield replace(base, name="transposed_strides", cost=base.cost.mT.contiguous().mT)
    yield replace(base, name="epsilon_per_problem", epsilon=torch.tensor([1.0, 0.1, 0.01]).double())
    generator = torch.Generator().manual_seed(2)
    log_a = torch.randn(3, 13, generator=generator, dtype=torch.float64).mul(3).log_softmax(1)
    log_b = torch.randn(3, 10, generator=generator, dtype=torch.float64).mul(3).log_softmax(1)
    yield replace(base, name="marginals", log_a=log_a, log_b=log_b)
    yield replace(base, name="unequal_mass", log_a=log_a + math.log(2), log_b=log_b, max_iter=5)
    yield replace(base, name="tiny_mass", log_a=log_a.sub(log_a.min()).neg().mul(8).log_softmax(1))
    forbidden = torch.rand(3, 13, 10, generator=generator) < 0.3
    forbidden[:, range(10), range(10)] = False
    yield replace(base, name="forbidden_pairs", cost=base.cost.masked_fill(forbidden, math.inf))
    forbidden[0, 4, :] = True
    forbidden[1, :, 3] = True
    forbidden[2] = True
    yield replace(base, name="forbidden_lines", cost=base.cost.masked_fill(forbidden, math.inf))
    yield poisoned(
        random_problem("nan_padding", 4, 9, 11, rows=[9, 3, 0, 5], columns=[2, 11, 4, 8])
    )
    # Two far clusters whose masses differ: the potentials move far before the plan settles.
    blocks = (torch.arange(16)[:, None] < 8) ^ (torch.arange(16)[None, :] < 4)
    clusters = random_problem("clusters", 2, 16, 16, epsilon=0.02, max_iter=60, seed=3)
    yield replace(clusters, cost=0.1 * clusters.cost + 2 * blocks)


def poisoned(problem: Problem) -> Problem:
    """The same problem with NaN and infinities wherever a row or a column is absent."""
    absent = (problem.log_a == -math.inf)[:, :, None] | (problem.log_b == -math.inf)[:, None, :]
    poison = torch.tensor([math.nan, math.inf, -math.inf, 1e30], dtype=problem.cost.dtype)
    pattern = poison.to(problem.cost.device)[torch.arange(problem.cost[0].numel()) % 4]
    return replace(
        problem, cost=torch.where(absent, pattern.view_as(problem.cost[0]), problem.cost)
    )


def assert_close_to_truth(
    out: Tensor, truth: Tensor, same_dtype: Tensor, *, dtype: torch.dtype, scale: float, name: str
) -> None:
    """Apply the tolerance rule of this module; on failure, show the worst entry.

    Args:
        out: what the implementation returned.
        truth: the float64 reference.
        same_dtype: the reference in ``dtype``.
        dtype: which tolerance applies.
        scale: the size of the quantity, multiplied by the tolerance.
        name: the problem and the quantity, for the message.
    """
    out, same_dtype = out.to(truth), same_dtype.to(truth)
    if out.shape != truth.shape:
        raise AssertionError(f"{name}: shape {tuple(out.shape)}; expected {tuple(truth.shape)}")
    if not truth.numel():
        return
    error = (out - truth).abs().nan_to_num(nan=math.inf)
    allowed = (same_dtype - truth).abs().max().item() + TOLERANCE[dtype] * scale
    worst = int(error.argmax())
    if not error.view(-1)[worst].item() <= allowed:
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
        values = [x.reshape(-1)[worst].item() for x in (out, truth, same_dtype)]
        raise AssertionError(
            f"{name}: worst at {index}: {values[0]!r}, truth {values[1]!r}, reference in "
            f"{dtype} {values[2]!r}; error {error.view(-1)[worst].item():.3g} > {allowed:.3g}"
        )


def assert_backend_correct(
    backend: str, problem: Problem, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> None:
    """Run forward and backward on ``problem`` and apply the tolerance rule to every output."""
    given = problem.to(dtype, device)
    truth = solve("reference", given.to(torch.float64, "cpu"))
    same_dtype = solve("reference", given)
    out = solve(backend, given)
    if not torch.equal(out["n_iter"].cpu(), truth["n_iter"]):
        raise AssertionError(f"{problem.name}: n_iter {out['n_iter']}; expected {truth['n_iter']}")
    mass = max(1.0, given.log_a.exp().sum(1).max().item() if given.cost.numel() else 1.0)
    scales = {"marginal_error": mass, "grad_cost": mass, "n_iter": 1.0}
    for field, expected in truth.items():
        scale = scales.get(field, problem.scale)
        assert_close_to_truth(
            out[field].cpu(),
            expected,
            same_dtype[field].cpu(),
            dtype=dtype,
            scale=scale,
            name=f"{backend} {problem.name} {field}",
        )
    absent = (given.log_a == -math.inf)[:, :, None] | (given.log_b == -math.inf)[:, None, :]
    if out["grad_cost"][absent].any():
        raise AssertionError(f"{problem.name}: gradient of absent entries is not exactly 0")


def solve(backend: str, problem: Problem) -> dict[str, Tensor]:
    """All outputs and gradients of the registered operator, under fixed upstream gradients."""
    inputs = [x.detach().requires_grad_() for x in (problem.cost, problem.log_a, problem.log_b)]
    cost, log_a, log_b = inputs
    outputs = ops.sinkhorn(
        cost, log_a, log_b, problem.epsilon, problem.max_iter, problem.tol, backend
    )
    value, value_linear = outputs[:2]
    upstream = torch.linspace(0, 1, len(value), dtype=value.dtype, device=value.device)
    gradients = torch.autograd.grad([value, value_linear], inputs, [upstream, 1 - 3 * upstream])
    results = dict(zip(FIELDS, (x.detach() for x in outputs), strict=True))
    names = ("grad_cost", "grad_log_a", "grad_log_b")
    return results | dict(zip(names, gradients, strict=True))


__all__ = [
    "FIELDS",
    "TOLERANCE",
    "Problem",
    "assert_backend_correct",
    "assert_close_to_truth",
    "poisoned",
    "problems",
    "random_problem",
    "solve",
    "uniform",
]
