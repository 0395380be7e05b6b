"""Named transport problems, ordinary and difficult, on which every backend is tested."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from optical.backends.dense import PaddedProblem
from optical.backends.problem import Problem

# L1 marginal error at which runs that are compared at convergence stop.
CONVERGED = {torch.float64: 1e-13, torch.float32: 3e-6}


@dataclass(frozen=True)
class Case:
    """A named batch of transport problems in float64.

    Attributes:
        name: unique among ``all_cases``.
        x: a cost (B, n, m), or with ``y`` and another ``kind`` the vectors of the rows.
        converged: backends may take different iterations and are compared at convergence.
        singular: entries of the plan that round to 0 determine the mass exchanged between blocks
            of the problem. Backends then solve the linear system of implicit gradients, but the
            digits of its solution are not compared.

    The other attributes are fields of ``optical.backends.Problem``.
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

    def problem(self, gradient: str = "envelope", backend: str = "auto") -> Problem:
        """Return the case as the operator receives it."""
        fields = {name: getattr(self, name) for name in Problem._fields if hasattr(self, name)}
        return Problem(**fields, gradient=gradient, backend=backend)

    @property
    def cost(self) -> Tensor:
        """The padded cost (B, n, m), computed if the case has vectors."""
        return PaddedProblem(self.problem()).with_cost.x

    @property
    def scale(self) -> float:
        """Magnitude of the costs, to which errors of values and potentials are relative."""
        padded = PaddedProblem(self.problem()).with_cost
        valid = (padded.log_a > -math.inf)[:, :, None] & (padded.log_b > -math.inf)[:, None, :]
        costs = padded.x[valid & padded.x.isfinite()]
        largest = [x.abs().max().item() for x in (costs, self.epsilon) if x.numel()]
        return max(largest, default=1.0)

    def to(
        self,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        vectors: torch.dtype | None = None,
    ) -> Case:
        """Convert to a dtype and device; ``vectors`` is the dtype of token vectors, if another."""
        moved = {}
        for name in ("x", "y", "log_a", "log_b", "epsilon", "f0", "g0", "cu_a", "cu_b"):
            value = getattr(self, name)
            if value is not None:
                target = dtype if value.is_floating_point() else value.dtype
                if name in ("x", "y") and self.kind != "given":
                    target = vectors or dtype
                moved[name] = value.to(device, target)
        return replace(self, **moved)

    def select(self, index: int) -> Case:
        """Return problem ``index`` as a batch of one."""
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
        """Return problem ``index`` as a batch of one, without its padding."""
        single = self.select(index)
        rows, columns = single.log_a[0] > -math.inf, single.log_b[0] > -math.inf
        return replace(
            single,
            x=single.x[:, rows] if single.y is not None else single.x[:, rows][:, :, columns],
            y=None if single.y is None else single.y[:, columns],
            log_a=single.log_a[:, rows],
            log_b=single.log_b[:, columns],
            f0=None if single.f0 is None else single.f0[:, rows],
            g0=None if single.g0 is None else single.g0[:, columns],
        )


def uniform_log_mass(batch: int, size: int, lengths: list[int] | None = None) -> Tensor:
    """Return (batch, size) log-masses: uniform over the first ``lengths`` entries, then -inf."""
    counts = torch.tensor(lengths if lengths is not None else [size] * batch, dtype=torch.float64)
    valid = torch.arange(size)[None, :] < counts[:, None]
    return torch.where(valid, -counts.clamp(min=1).log()[:, None], -math.inf)


def random_case(
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
    """Make uniform random costs in [0, 1) with uniform marginals over the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(batch, n, m, generator=generator, dtype=torch.float64)
    temperature = torch.full((batch,), epsilon, dtype=torch.float64)
    log_a, log_b = uniform_log_mass(batch, n, rows), uniform_log_mass(batch, m, columns)
    return Case(name, cost, log_a, log_b, temperature, max_iter)


def random_vector_case(
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
    """Make normal random vectors, exact in every floating-point dtype, with uniform marginals."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, dim, generator=generator).bfloat16().double()
    y = torch.randn(batch, m, dim, generator=generator).bfloat16().double()
    temperature = torch.full((batch,), epsilon, dtype=torch.float64)
    log_a, log_b = uniform_log_mass(batch, n, rows), uniform_log_mass(batch, m, columns)
    return Case(name, x, log_a, log_b, temperature, max_iter, y=y, kind=kind)


def packed(case: Case) -> Case:
    """Convert padded problems of vectors to packed ones."""

    def offsets(valid: Tensor) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.int64), valid.sum(1).cumsum(0)])

    rows, columns = case.log_a > -math.inf, case.log_b > -math.inf
    assert case.y is not None, "only vectors can be packed"
    return replace(
        case,
        name=f"{case.name}_packed",
        x=case.x[rows],
        y=case.y[columns],
        cu_a=offsets(rows),
        cu_b=offsets(columns),
        log_a=case.log_a[rows],
        log_b=case.log_b[columns],
        f0=None if case.f0 is None else case.f0[rows],
        g0=None if case.g0 is None else case.g0[columns],
    )


def all_cases() -> Iterator[Case]:
    """Yield every named case."""
    yield from plain_cases()
    yield from option_cases()
    yield from vector_cases()


def plain_cases() -> Iterator[Case]:
    """Yield given costs without options: shapes, ragged, degenerate and difficult problems."""
    yield random_case("1x1", 2, 1, 1)
    yield random_case("1x9", 2, 1, 9)
    yield random_case("9x1", 2, 9, 1)
    yield random_case("7x5", 3, 7, 5)
    yield random_case("32x32", 2, 32, 32, epsilon=0.05)
    yield random_case("31x33", 2, 31, 33)
    yield random_case("63x64", 2, 63, 64, epsilon=0.05)
    yield random_case("252x123", 1, 252, 123, epsilon=0.05, max_iter=10)
    yield random_case("no_problem", 0, 7, 5)
    yield random_case("4099_problems", 4099, 3, 2, max_iter=5)
    yield random_case("ragged", 4, 12, 17, rows=[12, 1, 7, 9], columns=[3, 17, 16, 1])
    yield random_case("one_fully_masked", 3, 6, 8, rows=[6, 0, 4], columns=[8, 5, 0])
    yield random_case("one_token_sides", 3, 5, 5, rows=[1, 5, 1], columns=[5, 1, 1])
    for epsilon in (1.0, 0.01, 0.001):
        case = random_case(f"epsilon_{epsilon:g}", 2, 20, 24, epsilon=epsilon, max_iter=50)
        yield replace(case, singular=epsilon == 0.001)
    yield random_case("no_iteration", 2, 7, 5, max_iter=0)
    yield random_case("one_iteration", 2, 7, 5, max_iter=1)

    base = random_case("", 3, 13, 10, seed=1)
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
    yield replace(base, name="no_allowed_pair", x=base.x.masked_fill(forbidden, math.inf))
    yield poisoned(random_case("nan_padding", 4, 9, 11, rows=[9, 3, 0, 5], columns=[2, 11, 4, 8]))
    # Two distant clusters of different mass: the potentials change a lot before the plan converges.
    blocks = (torch.arange(16)[:, None] < 8) ^ (torch.arange(16)[None, :] < 4)
    clusters = random_case("clusters", 2, 16, 16, epsilon=0.02, max_iter=60, seed=3)
    yield replace(clusters, x=0.1 * clusters.x + 2 * blocks, singular=True)


def option_cases() -> Iterator[Case]:
    """Yield given costs with each option, alone and combined."""
    base = random_case("", 3, 11, 14, rows=[11, 6, 9], columns=[14, 14, 5], seed=4)
    generator = torch.Generator().manual_seed(5)
    f0 = torch.randn(3, 11, generator=generator, dtype=torch.float64)
    g0 = torch.randn(3, 14, generator=generator, dtype=torch.float64)
    # Initial potentials of padding are not used.
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
    yield replace(heavy, name="rho_no_allowed_pair", rho_a=0.5, rho_b=0.5, x=forbidden)
    yield replace(
        heavy, name="rho_large_costs", rho_a=50.0, x=1e3 * base.x, epsilon=base.epsilon * 100
    )
    # Masses that underflow in float32, with potentials for which the penalised sums a exp(-f / rho)
    # are of order 1: the product of a zero and an infinite factor.
    weak: dict[str, Any] = {"rho_a": 0.01, "rho_b": 0.01, "tol": 1e-4}
    cheap, light_a, light_b = base.x.clone(), base.log_a.clone(), base.log_b.clone()
    cheap[0, 2], light_a[0, 2], cheap[1, :, 3], light_b[1, 3] = -11, -105, -11, -105
    yield replace(base, name="rho_mass_0", x=cheap, log_a=light_a, log_b=light_b, **weak)
    # Every entry of the plan underflows although pairs are allowed.
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
    hard = random_case("", 3, 12, 15, epsilon=0.05, rows=[12, 12, 5], seed=6)
    for memory in (1, 5, 16):
        yield replace(hard, name=f"anderson_{memory}", anderson=memory, **stopping)
    yield replace(hard, name="anderson_rho", anderson=6, rho_a=0.5, rho_b=1.0, **stopping)
    yield replace(hard, name="anderson_anneal", anderson=6, anneal_start=1.0, **stopping)


def vector_cases() -> Iterator[Case]:
    """Yield token vectors of each kind of cost, padded and packed, ordinary and difficult."""
    lengths: dict[str, Any] = {"batch": 4, "rows": [9, 3, 0, 5], "columns": [2, 12, 4, 7]}
    for kind in ("cosine", "sqeuclidean", "dot"):
        epsilon = 0.1 if kind == "cosine" else 2.0
        yield random_vector_case(f"{kind}_1x1", kind, n=1, m=1, epsilon=epsilon)
        yield random_vector_case(f"{kind}_1x5", kind, n=1, m=5, dim=1, epsilon=epsilon)
        yield random_vector_case(f"{kind}_6x1", kind, n=6, m=1, dim=3, epsilon=epsilon)
        yield random_vector_case(
            f"{kind}_33x31", kind, n=33, m=31, dim=65, epsilon=4 * epsilon, seed=1
        )
        ragged = random_vector_case(f"{kind}_ragged", kind, epsilon=epsilon, seed=2, **lengths)
        yield poisoned(ragged)
        yield packed(ragged)
        yield replace(packed(ragged), name=f"{kind}_packed_rho", rho_a=0.5, rho_b=math.inf)
        yield replace(ragged, name=f"{kind}_low_memory", low_memory=True)
    lengths = {"rows": [3, 0, 2, 0], "columns": [48, 40, 0, 70]}
    yield packed(random_vector_case("empty_sides", "cosine", batch=4, n=3, m=70, **lengths))
    clouds = random_vector_case("", "cosine", n=10, m=10, dim=16, seed=3)
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


def poisoned(case: Case) -> Case:
    """Replace the padding of costs or vectors by NaN, infinities and large numbers."""
    padding_a, padding_b = case.log_a == -math.inf, case.log_b == -math.inf
    if case.y is None:
        return replace(case, x=_poison(case.x, padding_a[:, :, None] | padding_b[:, None, :]))
    x, y = _poison(case.x, padding_a[..., None]), _poison(case.y, padding_b[..., None])
    return replace(case, x=x, y=y)


def _poison(values: Tensor, where: Tensor) -> Tensor:
    fillings = torch.tensor([math.nan, math.inf, -math.inf, 1e30], dtype=values.dtype)
    index = torch.arange(values[0].numel()) % 4
    pattern = fillings.to(values.device)[index].view_as(values[0])
    return torch.where(where, pattern, values)
