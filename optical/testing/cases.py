"""Named transport problems, ordinary and hard, on which every implementation is tested."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from optical.backends.dense import PaddedProblem
from optical.backends.problem import Problem

# The L1 error at which runs that are compared at convergence stop: what the dtype can reach.
CONVERGED = {torch.float64: 1e-13, torch.float32: 3e-6}


@dataclass(frozen=True)
class Case:
    """A batch of transport problems in float64: a name and the fields of ``Problem``.

    ``x`` is a cost (B, n, m), or with ``y`` and another ``kind`` the vectors of the rows. With
    ``converged``, implementations may take different ways and are compared where they stop. With
    ``singular``, entries of the plan that round to 0 decide how much mass flows between parts of
    the problem: the linear system behind implicit gradients is then solved, but its solution has
    no digits to compare.
    """

    name: str
    x: Tensor
    log_a: Tensor
    log_b: Tensor
    epsilon: Tensor
    max_iter: int = 20
    tol: float = 0.0
    y: Tensor | None = None
    kind: str = "given"
    cu_a: Tensor | None = None
    cu_b: Tensor | None = None
    f0: Tensor | None = None
    g0: Tensor | None = None
    rho_a: float = math.inf
    rho_b: float = math.inf
    omega: float = 1.0
    anderson: int = 0
    anneal_start: float = 0.0
    anneal_ratio: float = 0.5
    low_memory: bool = False
    precision: str = "exact"
    converged: bool = False
    singular: bool = False

    def arguments(self, gradient: str = "envelope", backend: str = "auto") -> Problem:
        own = {name: getattr(self, name) for name in Problem._fields if hasattr(self, name)}
        return Problem(**own, gradient=gradient, backend=backend)

    @property
    def cost(self) -> Tensor:
        """(B, n, m), built and padded where the problem has vectors."""
        return PaddedProblem(self.arguments()).given.x

    @property
    def scale(self) -> float:
        """The size of a cost, against which errors of values and potentials are measured."""
        p = PaddedProblem(self.arguments()).given
        present = (p.log_a > -math.inf)[:, :, None] & (p.log_b > -math.inf)[:, None, :]
        readable = p.x[present & p.x.isfinite()]
        largest = [x.abs().max().item() for x in (readable, self.epsilon) if x.numel()]
        return max(largest, default=1.0)

    def to(
        self,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        vectors: torch.dtype | None = None,
    ) -> Case:
        """The same problem as an implementation of that dtype and device receives it.

        ``vectors`` is the dtype of x and y where they are vectors, if another.
        """
        moved = {}
        for name in ("x", "y", "log_a", "log_b", "epsilon", "f0", "g0", "cu_a", "cu_b"):
            value = getattr(self, name)
            if value is not None:
                wanted = dtype if value.is_floating_point() else value.dtype
                if name in ("x", "y") and self.kind != "given":
                    wanted = vectors or dtype
                moved[name] = value.to(device, wanted)
        return replace(self, **moved)

    def one(self, index: int) -> Case:
        """Problem ``index`` alone, as a batch of one."""
        rows = columns = slice(index, index + 1)
        changes: dict[str, Any] = {"epsilon": self.epsilon[rows]}
        if self.cu_a is not None and self.cu_b is not None:
            rows = slice(int(self.cu_a[index]), int(self.cu_a[index + 1]))
            columns = slice(int(self.cu_b[index]), int(self.cu_b[index + 1]))
            changes["cu_a"] = self.cu_a[index : index + 2] - self.cu_a[index]
            changes["cu_b"] = self.cu_b[index : index + 2] - self.cu_b[index]
        for name, part in (("x", rows), ("log_a", rows), ("f0", rows)):
            changes[name] = None if getattr(self, name) is None else getattr(self, name)[part]
        for name, part in (("y", columns), ("log_b", columns), ("g0", columns)):
            changes[name] = None if getattr(self, name) is None else getattr(self, name)[part]
        return replace(self, name=f"{self.name}[{index}]", **changes)

    def without_padding(self, index: int) -> Case:
        """Problem ``index`` alone, as a batch of one from which absent entries were cut."""
        p = self.one(index)
        rows, columns = p.log_a[0] > -math.inf, p.log_b[0] > -math.inf
        return replace(
            p,
            x=p.x[:, rows] if p.y is not None else p.x[:, rows][:, :, columns],
            y=None if p.y is None else p.y[:, columns],
            log_a=p.log_a[:, rows],
            log_b=p.log_b[:, columns],
            f0=None if p.f0 is None else p.f0[:, rows],
            g0=None if p.g0 is None else p.g0[:, columns],
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
) -> Case:
    """Uniform random costs in [0, 1) with uniform marginals over the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(batch, n, m, generator=generator, dtype=torch.float64)
    temperature = torch.full((batch,), epsilon, dtype=torch.float64)
    log_a, log_b = uniform(batch, n, rows), uniform(batch, m, columns)
    return Case(name, cost, log_a, log_b, temperature, max_iter)


def random_clouds(
    name: str,
    kind: str,
    *,
    batch: int = 3,
    n: int = 9,
    m: int = 12,
    dim: int = 8,
    epsilon: float = 0.1,
    rows: list[int] | None = None,
    columns: list[int] | None = None,
    max_iter: int = 20,
    seed: int = 0,
) -> Case:
    """Normal random vectors, exact in every floating type, with uniform marginals."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, dim, generator=generator).bfloat16().double()
    y = torch.randn(batch, m, dim, generator=generator).bfloat16().double()
    temperature = torch.full((batch,), epsilon, dtype=torch.float64)
    log_a, log_b = uniform(batch, n, rows), uniform(batch, m, columns)
    return Case(name, x, log_a, log_b, temperature, max_iter, y=y, kind=kind)


def packed(problem: Case) -> Case:
    """The same problems behind one another, without padding."""

    def ends(present: Tensor) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.int64), present.sum(1).cumsum(0)])

    rows, columns = problem.log_a > -math.inf, problem.log_b > -math.inf
    assert problem.y is not None, "only vectors can be packed"
    return replace(
        problem,
        name=f"{problem.name}_packed",
        x=problem.x[rows],
        y=problem.y[columns],
        cu_a=ends(rows),
        cu_b=ends(columns),
        log_a=problem.log_a[rows],
        log_b=problem.log_b[columns],
        f0=None if problem.f0 is None else problem.f0[rows],
        g0=None if problem.g0 is None else problem.g0[columns],
    )


def problems() -> Iterator[Case]:
    """Every named problem."""
    yield from plain_problems()
    yield from option_problems()
    yield from vector_problems()


def plain_problems() -> Iterator[Case]:
    """Given costs without options: shapes, ragged batches, degenerate ones, hard ones."""
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
        problem = random_problem(f"epsilon_{epsilon:g}", 2, 20, 24, epsilon=epsilon, max_iter=50)
        yield replace(problem, singular=epsilon == 0.001)
    yield random_problem("no_iteration", 2, 7, 5, max_iter=0)
    yield random_problem("one_iteration", 2, 7, 5, max_iter=1)

    base = random_problem("", 3, 13, 10, seed=1)
    yield replace(base, name="equal_costs", x=torch.full_like(base.x, 0.5))
    yield replace(base, name="large_costs", x=1e3 * base.x, epsilon=100 * base.epsilon)
    yield replace(base, name="negative_costs", x=base.x - 2)
    yield replace(base, name="transposed_strides", x=base.x.mT.contiguous().mT)
    yield replace(base, name="epsilon_per_problem", epsilon=torch.tensor([1.0, 0.1, 0.01]).double())
    generator = torch.Generator().manual_seed(2)
    log_a = torch.randn(3, 13, generator=generator, dtype=torch.float64).mul(3).log_softmax(1)
    log_b = torch.randn(3, 10, generator=generator, dtype=torch.float64).mul(3).log_softmax(1)
    yield replace(base, name="marginals", log_a=log_a, log_b=log_b)
    yield replace(base, name="unequal_mass", log_a=log_a + math.log(2), log_b=log_b, max_iter=5)
    yield replace(base, name="tiny_mass", log_a=log_a.sub(log_a.min()).neg().mul(8).log_softmax(1))
    light = log_a.clone()
    light[:, ::3] = math.log(1e-30)
    yield replace(base, name="mass_1e-30", log_a=light.log_softmax(1))
    forbidden = torch.rand(3, 13, 10, generator=generator) < 0.3
    forbidden[:, range(10), range(10)] = False
    yield replace(base, name="forbidden_pairs", x=base.x.masked_fill(forbidden, math.inf))
    forbidden[0, 4, :] = True
    forbidden[1, :, 3] = True
    forbidden[2] = True
    yield replace(base, name="forbidden_lines", x=base.x.masked_fill(forbidden, math.inf))
    yield poisoned(
        random_problem("nan_padding", 4, 9, 11, rows=[9, 3, 0, 5], columns=[2, 11, 4, 8])
    )
    # Two far clusters whose masses differ: the potentials move far before the plan settles.
    blocks = (torch.arange(16)[:, None] < 8) ^ (torch.arange(16)[None, :] < 4)
    clusters = random_problem("clusters", 2, 16, 16, epsilon=0.02, max_iter=60, seed=3)
    yield replace(clusters, x=0.1 * clusters.x + 2 * blocks, singular=True)


def option_problems() -> Iterator[Case]:
    """Given costs with every option, alone and together."""
    base = random_problem("", 3, 11, 14, rows=[11, 6, 9], columns=[14, 14, 5], seed=4)
    generator = torch.Generator().manual_seed(5)
    f0 = torch.randn(3, 11, generator=generator, dtype=torch.float64)
    g0 = torch.randn(3, 14, generator=generator, dtype=torch.float64)
    # What stands at absent lines is not read.
    g0[:, -1] = torch.where(base.log_b[:, -1] > -math.inf, g0[:, -1], math.nan)
    forbidden = base.x.clone()
    forbidden[0, 2], forbidden[1, :, 3], forbidden[2, 1, 1] = math.inf, math.inf, math.inf
    heavy = replace(base, log_a=base.log_a + 0.7, log_b=base.log_b - 0.4)
    yield replace(base, name="init", f0=f0, g0=g0)
    yield replace(base, name="init_no_iteration", f0=0.1 * f0, g0=0.1 * g0, max_iter=0)
    yield replace(base, name="rho", rho_a=0.5, rho_b=0.5)
    yield replace(heavy, name="rho_of_each_side", rho_a=0.3, rho_b=2.0)
    yield replace(heavy, name="rho_of_rows", rho_a=0.3)
    yield replace(heavy, name="rho_of_columns", rho_b=1.0)
    yield replace(heavy, name="rho_weak", rho_a=0.01, rho_b=0.02)
    yield replace(base, name="rho_strong", rho_a=1e3, rho_b=1e3, max_iter=60)
    yield replace(heavy, name="rho_forbidden_lines", rho_a=0.5, rho_b=0.5, x=forbidden)
    yield replace(
        heavy, name="rho_large_costs", rho_a=50.0, x=1e3 * base.x, epsilon=base.epsilon * 100
    )
    # Masses that are 0 in float32, with potentials by which a penalty asks for a part of 1 all the
    # same: a number that is 0 times one that is infinite.
    weak: dict[str, Any] = {"rho_a": 0.01, "rho_b": 0.01, "tol": 1e-4}
    cheap, light_a, light_b = base.x.clone(), base.log_a.clone(), base.log_b.clone()
    cheap[0, 2], light_a[0, 2], cheap[1, :, 3], light_b[1, 3] = -11, -105, -11, -105
    yield replace(base, name="rho_mass_0", x=cheap, log_a=light_a, log_b=light_b, **weak)
    # Every entry of the plan is 0, of lines that have allowed pairs all the same.
    cold: dict[str, Any] = {"x": base.x + 20, "max_iter": 0, "rho_a": 0.5, "rho_b": 0.5}
    yield replace(base, name="rho_no_iteration", **cold)
    yield replace(base, name="omega", omega=1.5)
    yield replace(heavy, name="omega_below_one", omega=0.6, rho_b=0.4)
    yield replace(base, name="omega_1.8_forbidden", omega=1.8, x=forbidden)
    yield replace(base, name="anneal", anneal_start=5.0, anneal_ratio=0.5)
    yield replace(base, name="anneal_unfinished", anneal_start=0.5, anneal_ratio=0.95)
    per_problem = torch.tensor([2.0, 0.1, 0.02], dtype=torch.float64)
    everything = replace(heavy, epsilon=per_problem, f0=f0, g0=g0, rho_a=0.7, x=forbidden)
    everything = replace(everything, omega=1.3, anneal_start=1.0, anneal_ratio=0.6)
    yield replace(everything, name="everything")
    stopping: dict[str, Any] = {"tol": CONVERGED[torch.float64], "max_iter": 300}
    stopping["converged"] = True
    hard = random_problem("", 3, 12, 15, epsilon=0.05, rows=[12, 12, 5], seed=6)
    for memory in (1, 5, 16):
        yield replace(hard, name=f"anderson_{memory}", anderson=memory, **stopping)
    yield replace(hard, name="anderson_rho", anderson=6, rho_a=0.5, rho_b=1.0, **stopping)
    yield replace(hard, name="anderson_anneal", anderson=6, anneal_start=1.0, **stopping)


def vector_problems() -> Iterator[Case]:
    """Token vectors of each kind, padded and packed, ordinary and hard."""
    lengths: dict[str, Any] = {"batch": 4, "rows": [9, 3, 0, 5], "columns": [2, 12, 4, 7]}
    for kind in ("cosine", "sqeuclidean", "dot"):
        epsilon = 0.1 if kind == "cosine" else 2.0
        yield random_clouds(f"{kind}_1x1", kind, n=1, m=1, epsilon=epsilon)
        yield random_clouds(f"{kind}_1x5", kind, n=1, m=5, dim=1, epsilon=epsilon)
        yield random_clouds(f"{kind}_6x1", kind, n=6, m=1, dim=3, epsilon=epsilon)
        yield random_clouds(f"{kind}_33x31", kind, n=33, m=31, dim=65, epsilon=4 * epsilon, seed=1)
        ragged = random_clouds(f"{kind}_ragged", kind, epsilon=epsilon, seed=2, **lengths)
        yield poisoned(ragged)
        yield packed(ragged)
        yield replace(packed(ragged), name=f"{kind}_packed_rho", rho_a=0.5, rho_b=math.inf)
        yield replace(ragged, name=f"{kind}_low_memory", low_memory=True)
    lengths = {"rows": [3, 0, 2, 0], "columns": [48, 40, 0, 70]}
    yield packed(random_clouds("empty_sides", "cosine", batch=4, n=3, m=70, **lengths))
    clouds = random_clouds("", "cosine", n=10, m=10, dim=16, seed=3)
    x, y = clouds.x, clouds.y
    assert y is not None
    zero = x.clone()
    zero[0, 3] = zero[1, 0] = zero[2] = 0
    yield replace(clouds, name="zero_vectors", x=zero)
    twins = x.clone()
    twins[:, 1], twins[:, 2] = x[:, 0], -x[:, 0]
    yield replace(clouds, name="duplicate_points", x=twins, y=twins.clone())
    yield replace(
        clouds, name="duplicates_sqeuclidean", x=twins, y=twins.clone(), kind="sqeuclidean"
    )
    sign = torch.where(torch.arange(10) < 5, 1.0, -1.0).double()[:, None]
    axis = x[:, :1] + 0.05 * torch.randn(3, 10, 16, generator=torch.Generator().manual_seed(4))
    yield replace(
        clouds,
        name="antipodal_clusters",
        x=sign * axis,
        y=-sign * axis.flip(1),
        epsilon=clouds.epsilon / 2,
    )
    yield replace(
        clouds,
        name="cosine_epsilon_0.001",
        epsilon=clouds.epsilon / 100,
        max_iter=50,
        singular=True,
    )
    sizes = torch.logspace(-18, 18, 10, dtype=torch.float64)[:, None]
    yield replace(clouds, name="norms_1e-18_to_1e18", x=x * sizes, y=y / sizes)
    far = replace(clouds, kind="sqeuclidean", epsilon=clouds.epsilon * 100)
    yield replace(far, name="far_from_the_origin", x=x + 4096, y=y + 4096)
    yield replace(far, name="vectors_x1e3", x=1e3 * x, y=1e3 * y, epsilon=1e6 * far.epsilon)
    generator = torch.Generator().manual_seed(7)
    log_a = torch.randn(3, 10, generator=generator, dtype=torch.float64).mul(3).log_softmax(1)
    everything = replace(clouds, log_a=log_a, f0=log_a, g0=-log_a, rho_b=0.4, omega=1.2)
    yield replace(everything, name="cosine_all", anneal_start=0.5, anneal_ratio=0.7)
    converged = replace(packed(clouds), tol=CONVERGED[torch.float64], max_iter=300, converged=True)
    yield replace(converged, name="packed_anderson", anderson=5)


def poisoned(problem: Case) -> Case:
    """The same problem with NaN and infinities wherever a row or a column is absent."""
    absent_a, absent_b = problem.log_a == -math.inf, problem.log_b == -math.inf
    if problem.y is None:
        return replace(problem, x=_poison(problem.x, absent_a[:, :, None] | absent_b[:, None, :]))
    x, y = _poison(problem.x, absent_a[..., None]), _poison(problem.y, absent_b[..., None])
    return replace(problem, x=x, y=y)


def _poison(values: Tensor, where: Tensor) -> Tensor:
    bad = torch.tensor([math.nan, math.inf, -math.inf, 1e30], dtype=values.dtype)
    pattern = bad.to(values.device)[torch.arange(values[0].numel()) % 4].view_as(values[0])
    return torch.where(where, pattern, values)
