"""Random calls of the public functions, as many as the time allows.

    python tests/fuzz.py --calls 100000 --seconds 300 --seed 0

Call number ``seed + i`` is drawn from that number alone. A valid one must agree with the reference
in float64 by the rule of ``optical.testing.tolerance``, an invalid one must raise an error that names the
argument that was made invalid, and none may crash or hang. What fails is printed with the
number that draws it again.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import math
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import optical
from optical.backends import library
from optical.backends.dense import PaddedProblem
from optical.backends.iterations import MaskedProblem
from optical.backends.problem import Status
from optical.backends.reference import log_ratio
from optical.backends.registry import BackendUnsupported
from optical.ot.result import SinkhornResult
from optical.testing.tolerance import FAST, TOLERANCE

REFUSALS = (TypeError, ValueError, BackendUnsupported)
LONGEST = 600  # seconds after which a call is taken to hang: other programs may run beside it
FAMILY = 8  # runs of the reference on inputs rounded differently
MARGIN = 4  # times whose largest error is allowed
KERNELS = ("cuda", "triton")
OUTPUTS = ("value", "value_linear", "f", "g", "marginal_error", "n_iter", "status")
OF_VECTORS = ("grad_x", "grad_y", "grad_student", "grad_teacher")
OF_ROWS = ("f", "grad_x", "grad_log_a", "apply_plan", "grad_w")
OF_PROBLEMS = ("value", "value_linear", "marginal_error", "plan")


class Dice:
    """All that is random about one call."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.chance = lambda share: self.random.random() < share
        self.pick = lambda *choices: self.random.choice(choices)
        self.between = self.random.randint

    def power(self, low: float, high: float) -> float:
        return 10 ** self.random.uniform(low, high)

    def size(self) -> int:
        """Mostly small; 0 now and then."""
        return 0 if self.chance(0.03) else self.between(1, self.pick(2, 5, 9, 9, 18, 35, 70))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def some(self, share: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) < share

    def layout(self, x: Tensor) -> Tensor:
        """The same numbers, laid out in memory in another way."""
        way = self.pick("dense", "dense", "turned", "spread", "shifted")
        if way == "turned" and x.dim() > 1:
            return x.mT.contiguous().mT
        if way == "spread" and x.dim():
            room = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), 99)
            room[..., 1::2] = x
            return room[..., 1::2]
        if way == "shifted":
            return torch.cat([x.new_full((1,), 99), x.reshape(-1)])[1:].view(x.shape)
        return x


@dataclass
class Call:
    """A function of the package and its arguments.

    Attributes:
        function: its name.
        arguments: by name; what ``cotangents`` are differentiated by requires a gradient.
        wrong: the argument that was made invalid, if any.
        cotangents: upstream gradients of the outputs, by name.
        vectors: what the plan and its transpose are applied to.
        threads: of PyTorch, which the library respects.
        scale, mass, slope: of the costs, of the masses and of the costs' derivative: what errors
            are measured against.
        dtype: in which it is computed.
        device: where it is; the tensors are the CPU's, as the reference's are.
    """

    function: str
    arguments: dict[str, Any]
    wrong: str = ""
    cotangents: dict[str, Tensor] = field(default_factory=dict)
    vectors: tuple[Tensor, Tensor] | None = None
    threads: int = 1
    scale: float = 1.0
    mass: float = 1.0
    slope: float = 1.0
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    def __str__(self) -> str:
        given = ", ".join(f"{name}={_words(value)}" for name, value in self.arguments.items())
        return f"optical.{self.function}({given})  # {self.threads} threads"

    def option(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)

    def but(self, **changes: Any) -> Call:
        return replace(self, arguments=self.arguments | changes)

    def rounded(self, dtype: torch.dtype | None = None, nudge: int = 0) -> Call:
        """The same call of the reference, in ``dtype`` if it is another.

        With ``nudge`` every number that goes in is moved by a few units in its last place: what
        this changes, no implementation can know.
        """
        generator = torch.Generator().manual_seed(nudge)

        def other(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(other, value))
            if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            moved = value.detach().to(dtype)
            if nudge:
                move = torch.rand(value.shape, generator=generator, dtype=dtype) * 4 - 2
                moved = moved * (1 + torch.finfo(dtype).eps * move)
            return moved.requires_grad_(value.requires_grad)

        # The temperature is rounded to the dtype of the call, for the truth too.
        epsilon = torch.as_tensor(self.arguments["epsilon"], dtype=self.dtype)
        batch = len(self.cotangents["value"])
        arguments = self.arguments | {"epsilon": epsilon.expand(batch)}
        changed = {name: other(value) for name, value in arguments.items()}
        changed["backend"] = "reference"
        return replace(self, arguments=changed, vectors=other(self.vectors), device="cpu")

    def placed(self, value: Any) -> Any:
        """What is a tensor, or a pair of them, on the device of the call."""
        if isinstance(value, tuple):
            return tuple(map(self.placed, value))
        return value.to(self.device) if isinstance(value, Tensor) else value

    @property
    def in_halves(self) -> bool:
        """Whether kernels may keep the plan in half precision."""
        plain = self.option("rho") is None and self.option("omega", 1) == 1
        fast = plain and self.option("precision") == "fast"
        return fast and self.option("backend") in KERNELS

    def run(self) -> Any:
        arguments = self.arguments
        if self.device != "cpu":
            arguments = {name: self.placed(value) for name, value in arguments.items()}
        return getattr(optical, self.function)(**arguments)


def _words(value: Any) -> str:
    if isinstance(value, Tensor):
        numbers = "" if value.numel() > 6 else f" {value.tolist()}"
        leaf = " with a gradient" if value.requires_grad else ""
        what = f"{tuple(value.shape)} {str(value.dtype)[6:]} strides {value.stride()}"
        return f"<{what}{numbers}{leaf}>"
    if isinstance(value, tuple):
        return f"({', '.join(map(_words, value))})"
    return repr(value)


# ------------------------------------------------------------------------------------ valid calls


def draw(seed: int) -> Call:
    """Call number ``seed``."""
    dice = Dice(seed)
    call = draw_valid(dice)
    return spoil(dice, call) if dice.chance(0.5) else call


def draw_valid(d: Dice) -> Call:
    kind = d.pick("given", "cosine", "sqeuclidean", "dot")
    function = "sinkhorn"
    if kind != "given":
        function = d.pick(*["sinkhorn_vectors"] * 4, "ot_alignment", "sinkhorn_divergence")
    n, m = d.size(), d.size()
    batch = d.pick(0, 1, 2, 3, 3, 4, 5, 23 if n * m < 200 else 2)
    if d.chance(0.003):  # one large problem is shared out to several threads
        n, m, batch = 300, d.between(1, 60), 1
    dtype = d.pick(torch.float32, torch.float64)
    call = Call(function, {}, threads=d.pick(1, 1, 2, 3), dtype=dtype)

    packed = function != "sinkhorn" and function != "ot_alignment" and d.chance(0.3)
    balanced = function == "ot_alignment" or d.chance(0.6)
    total = 0.0 if d.chance(0.7) else d.random.uniform(-4, 4)
    sides = {}
    for letter, size in (("a", n), ("b", m)):
        if (not balanced and d.chance(0.5)) or d.chance(0.03):
            total += d.random.uniform(-1, 1)
        sides[letter] = _side(d, call, letter, batch, size, packed, total)
    present = sides["a"], sides["b"]

    if kind == "given":
        x = _costs(d, call, batch, n, m)
        if d.chance(0.5):
            x = _poison(d, x, ~(present[0][:, :, None] & present[1][:, None, :]))
            x = d.layout(x)
        elif batch and d.chance(0.2):
            x = x[:1].expand_as(x)
        half = d.chance(0.1) and dtype == torch.float32 and call.scale < 100
        call.arguments["cost"] = x.to(d.pick(torch.float16, torch.bfloat16) if half else dtype)
    else:
        _clouds(d, call, kind, present)

    temperature = call.scale * d.power(-2.5, 0.5) if d.chance(0.95) else d.power(-4, 2)
    epsilon: Any = temperature
    if d.chance(0.3):
        epsilon = temperature * d.normal(batch).abs().clamp(min=0.03)
        epsilon = d.layout(epsilon.to(d.pick(torch.float32, torch.float64)))
        if batch and d.chance(0.05):
            epsilon[0] = d.pick(0.0, -1.0, math.nan, math.inf)
    call.arguments["epsilon"] = epsilon
    _options(d, call, balanced, present, temperature)
    _differentiate(d, call, present, batch)
    call.scale = max(temperature, _largest_cost(call, kind, present))
    return call


def _side(
    d: Dice, call: Call, letter: str, batch: int, size: int, packed: bool, total: float
) -> Tensor:
    """Draws the masses of one side; returns which lines are present, padded or packed."""
    lengths = [d.between(0 if d.chance(0.1) else min(1, size), size) for _ in range(batch)]
    inside = torch.arange(size) < torch.tensor(lengths, dtype=torch.int64).view(-1, 1)
    style = d.pick("none", "none", "lengths", "mask", "log", "log", "log mask", "log lengths")
    if call.function == "ot_alignment":
        style = d.pick("none", "mask")
    if "mask" in style:
        inside = inside if d.chance(0.5) else d.some(0.7, batch, size)
        name = {"a": "student_mask", "b": "teacher_mask"}[letter]
        name = name if call.function == "ot_alignment" else f"mask_{letter}"
        numbers = d.pick(torch.bool, torch.int64, torch.uint8, torch.float32)
        if not packed:
            call.arguments[name] = d.layout(inside.to(numbers))
    elif "lengths" in style and not packed:
        integers = d.pick(torch.int64, torch.int32)
        call.arguments[f"lengths_{letter}"] = torch.tensor(lengths, dtype=integers)
    elif not packed:
        inside = torch.ones(batch, size, dtype=torch.bool)

    log_mass = d.normal(batch, size) * d.pick(0.0, 1.0, 5.0, 30.0)
    if d.chance(0.1):
        log_mass = torch.where(d.some(0.3, batch, size), log_mass - d.pick(60, 200, 1e4), log_mass)
    if packed:
        inside = torch.arange(size) < torch.tensor(lengths, dtype=torch.int64).view(-1, 1)
    present = inside
    if "log" in style:
        present = inside & d.some(d.pick(0.7, 1.0), batch, size)
        log_mass = log_mass.masked_fill(~present, -math.inf)
        log_mass = log_mass - log_mass.logsumexp(1, keepdim=True).nan_to_num(neginf=0.0) + total
        call.mass = max(call.mass, math.exp(total))
        log_mass = _poison(d, log_mass, ~inside)
        if size and d.chance(0.01):
            log_mass[:1, 0] = d.pick(math.nan, math.inf)
    if packed:
        ends = torch.tensor([0, *lengths]).cumsum(0).to(d.pick(torch.int64, torch.int32))
        call.arguments[f"cu_seqlens_{letter}"] = ends
        present, log_mass = present[inside], log_mass[inside]
    if "log" in style:
        call.arguments[f"log_{letter}"] = d.layout(log_mass.to(call.dtype))
    return present


def _costs(d: Dice, call: Call, batch: int, n: int, m: int) -> Tensor:
    call.scale = d.pick(1.0, 1.0, 1.0, 1e-3, 1e3)
    cost = call.scale * d.pick(d.normal(batch, n, m), d.normal(batch, n, m).abs())
    if d.chance(0.2):
        cost = cost.masked_fill(d.some(d.pick(0.1, 0.5, 0.9), batch, n, m), math.inf)
    if d.chance(0.1):
        cost = cost.masked_fill(d.some(0.2, batch, n, 1) | d.some(0.2, batch, 1, m), math.inf)
    if cost.numel() and d.chance(0.03):
        cost[0, 0, 0] = d.pick(math.nan, -math.inf)
    return cost


def _clouds(d: Dice, call: Call, kind: str, present: tuple[Tensor, Tensor]) -> None:
    dim = d.pick(1, 2, 3, 7, 8, 16, 17, 33, 65, 200)
    half = d.chance(0.3)
    size = d.pick(1.0, 1.0, 0.1, 3.0)
    if kind == "cosine" and not half and d.chance(0.1):
        size = d.pick(1e-25, 1e-18, 1e18)
    call.scale = {"cosine": 1.0, "sqeuclidean": 2 * dim * size**2, "dot": dim**0.5 * size**2}[kind]
    names = ("student", "teacher") if call.function == "ot_alignment" else ("x", "y")
    away = d.normal(dim) * d.pick(0, 0, 0, 10) * size
    for name, there in zip(names, present, strict=True):
        vectors = d.normal(*there.shape, dim) * size + away
        if d.chance(0.2):
            vectors = vectors.masked_fill(d.some(0.2, *there.shape, 1), 0.0)
        if d.chance(0.2):
            vectors = torch.where(d.some(0.3, *there.shape, 1), vectors[..., :1, :], vectors)
        vectors = _poison(d, vectors, ~there[..., None])
        if vectors.numel() and d.chance(0.02):
            vectors.view(-1, dim)[0, 0] = d.pick(math.nan, math.inf, -math.inf)
        numbers = call.dtype
        if half and (d.chance(0.7) or call.dtype == torch.float32):
            numbers = d.pick(torch.float16, torch.bfloat16, torch.float32)
        call.arguments[name] = d.layout(vectors.to(numbers))
    if torch.float64 not in [call.arguments[name].dtype for name in names]:
        call.dtype = torch.float32
    if kind != "cosine" or d.chance(0.5):
        call.arguments["cost"] = kind


def _largest_cost(call: Call, kind: str, present: tuple[Tensor, Tensor]) -> float:
    """A bound of the costs, and of what is added and subtracted on the way to them.

    Also leaves a bound of their derivative with respect to the vectors.
    """
    if kind == "given":
        pairs = present[0][:, :, None] & present[1][:, None, :]
        return _largest(call.arguments["cost"].detach()[pairs])
    names = ("student", "teacher") if call.function == "ot_alignment" else ("x", "y")
    lengths = [
        call.arguments[name].detach().double().norm(dim=-1)[there]
        for name, there in zip(names, present, strict=True)
    ]
    if kind == "cosine":
        call.slope = 1 / min((x[x > 0].min().item() for x in lengths if (x > 0).any()), default=1)
        return 1.0
    longest = max(map(_largest, lengths))
    call.slope = 2 * longest
    return longest**2 if kind == "dot" else (2 * longest) ** 2


def _largest(x: Tensor) -> float:
    readable = x[x.isfinite()].abs()
    return readable.max().item() if readable.numel() else 0.0


def _poison(d: Dice, x: Tensor, absent: Tensor) -> Tensor:
    """What nobody may read."""
    return torch.where(absent, d.pick(math.nan, math.inf, -math.inf, 1e30, 0.0), x)


def _options(
    d: Dice, call: Call, balanced: bool, present: tuple[Tensor, Tensor], temperature: float
) -> None:
    options = call.arguments
    options["gradient"] = d.pick("envelope", "implicit", "unroll")
    options["max_iter"] = d.pick(0, 1, 2, 3, 5, 8, 8, 12, 12, 20, 40)
    options["backend"] = d.pick("auto", "cpu")
    options["precision"] = d.pick("exact", "fast")
    one_rho = call.function == "sinkhorn_divergence"
    if not balanced:
        strengths = [call.scale * d.power(-2, 3) for _ in range(2)]
        options["rho"] = strengths[0]
        if not one_rho and d.chance(0.6):
            options["rho"] = d.pick(
                tuple(strengths), (strengths[0], None), (math.inf, strengths[1])
            )
    if d.chance(0.2):
        options["omega"] = d.random.uniform(0.5, 1.9)
    elif call.function.startswith("sinkhorn") and not one_rho and d.chance(0.2):
        options["anderson"] = d.pick(1, 2, 5, 16)
        options["gradient"] = d.pick("envelope", "implicit")
    if d.chance(0.2):
        options["anneal"] = (temperature * d.power(-1, 2), d.random.uniform(0.2, 0.9))
    if options["gradient"] == "unroll" and "anneal" in options:
        options["backend"] = "auto"
    if d.chance(0.3):
        options["tol"] = call.mass * d.power(-8 if call.dtype == torch.float64 else -3, -1)
        options["max_iter"] = d.pick(0, 1, 5, 20, 60)
    if call.function.startswith("sinkhorn") and not one_rho and d.chance(0.2):
        options["init"] = tuple(
            d.layout(_poison(d, d.normal(*there.shape) * call.scale, ~there)).to(call.dtype)
            for there in present
        )
    if call.function != "sinkhorn" and d.chance(0.3):
        options["low_memory"] = True


def _differentiate(d: Dice, call: Call, present: tuple[Tensor, Tensor], batch: int) -> None:
    """Chooses what is differentiated by what."""
    for name in ("cost", "x", "y", "student", "teacher", "log_a", "log_b"):
        value = call.option(name)
        if isinstance(value, Tensor) and d.chance(0.6):
            call.arguments[name] = value.detach().requires_grad_()
    call.cotangents = {name: d.normal(batch) for name in ("value", "value_linear")}
    call.cotangents[d.pick("value", "value_linear")] *= d.pick(0.0, 1.0, 1.0)
    if call.function in ("ot_alignment", "sinkhorn_divergence"):
        del call.cotangents["value_linear"]
        return
    if call.option("gradient") == "unroll":
        for name, there in (("f", present[0]), ("g", present[1])):
            if d.chance(0.5):
                call.cotangents[name] = d.normal(*there.shape)
    if d.chance(0.5):
        return
    width = d.pick(0, 1, 2, 5, 9, 17)
    v, w = (_poison(d, d.normal(*there.shape, width), ~there[..., None]) for there in present[::-1])
    call.vectors = d.layout(v.to(call.dtype)), d.layout(w.to(call.dtype))


# -------------------------------------------------------------------------------------- their truth


def outputs(call: Call) -> dict[str, Tensor]:
    """All that the call returns, gradients and products with the plan, by name."""
    result = call.run()
    found = {"value": result}
    if isinstance(result, SinkhornResult):
        found = {name: getattr(result, name) for name in (*OUTPUTS, "gradient_residual")}
        found["plan"] = result.plan()
    if isinstance(result, SinkhornResult) and call.vectors is not None:
        v, w = (call.placed(x.detach()).requires_grad_() for x in call.vectors)
        found["apply_plan"] = result.apply_plan(v)
        found["apply_plan_transposed"] = result.apply_plan(w, transpose=True)
        product = found["apply_plan"].sum() + 2 * found["apply_plan_transposed"].sum()
        found["grad_v"], found["grad_w"] = torch.autograd.grad(product, (v, w))
    leaves = {k: x for k, x in call.arguments.items() if isinstance(x, Tensor) and x.requires_grad}
    if leaves:
        differentiated = [found[name] for name in call.cotangents]
        upstream = [x.to(found["value"]) for x in call.cotangents.values()]
        gradients = torch.autograd.grad(differentiated, list(leaves.values()), upstream)
        found |= {f"grad_{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {name: x.detach().cpu() for name, x in found.items()}


def referred(call: Call, dtype: torch.dtype | None = None, nudge: int = 0) -> dict[str, Tensor]:
    """The outputs of the reference, computed in ``dtype``; see ``Call.rounded``."""
    return outputs(call.rounded(dtype, nudge))


def check_valid(call: Call) -> None:
    """Raises AssertionError unless the outputs are those of the reference in float64."""
    found = outputs(call)
    of_library = call.option("gradient") != "unroll" or call.option("anneal") is None
    if call.threads > 1 and of_library:
        _check_threads(call, found)
    accelerated = bool(call.option("anderson"))
    if accelerated:
        _check_residuals(call, found)
        # Until it has converged, the acceleration amplifies rounding without bound: two correct
        # runs differ. What follows from the potentials that it returned is defined all the same.
        start = (found["f"], found["g"])
        options: dict[str, Any] = {"max_iter": 0, "anderson": 0, "tol": 0.0, "anneal": None}
        call = call.but(init=start, **options)
    truth = referred(call, torch.float64)
    if "n_iter" in found and not accelerated and not _same_decisions(call, found, truth):
        return
    family = _Family(call, found, truth)
    for name in found.keys() - {"n_iter", "status", "gradient_residual"}:
        error = family.excess(name, found[name])
        assert not error, f"{name}: {error}"


class _Family:
    """How wrong the reference itself may be, in the dtype of a call.

    The rule of ``optical.testing.tolerance`` allows the error of the same-dtype reference. One run of it is
    one sample of that error, and among many calls some sample is small by luck: where the first
    does not suffice, the largest error of several counts. In float64 the truth is such a sample.
    """

    def __init__(self, call: Call, found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
        self.call, self.found, self.truth = call, found, truth
        self.members: list[dict[str, Tensor]] = []
        # A cost is rounded to its dtype before it is divided by epsilon.
        temperatures = [_temperature(call, i) for i in range(len(call.cotangents["value"]))]
        self.temperatures = [epsilon for epsilon in temperatures if 0 < epsilon < INF]
        largest = max(call.scale, *self.potentials)
        # A potential is a temperature times the logarithm of a sum, whose own rounding is a share
        # of 1 however small the logarithm: where a run ends before it has cooled down, that is an
        # error of the hot potential, but the plan divides it by the cold temperature.
        self.shift = 0.0
        if call.option("anneal") is not None and call.arguments["max_iter"] > 0:
            start, ratio = call.arguments["anneal"]
            largest = max(largest, start * ratio ** (call.arguments["max_iter"] - 1))
            # No later iteration mends what is common to one side and missing from the other.
            self.shift = torch.finfo(call.dtype).eps * start / (1 - ratio)
        self.coldest = min(self.temperatures, default=1.0)
        amplified = largest / self.coldest
        # The plan of potentials that kernels found, or the library from vectors, is one of costs
        # summed in another order.
        given = call.function == "sinkhorn" and call.option("backend") not in KERNELS
        vectors = call.option("x", call.option("student"))
        units = (4 if given else 8) + (0 if vectors is None else math.sqrt(vectors.shape[-1]))
        self.exponents = units * torch.finfo(call.dtype).eps * amplified

    def excess(self, name: str, found: Tensor) -> str:
        """What is wrong with this output, in words; nothing where nothing is."""
        truth = self.truth[name]
        if found.shape != truth.shape:
            return f"shape {tuple(found.shape)}; expected {tuple(truth.shape)}"
        if not truth.numel():
            return ""
        of_kernels = self.call.option("backend") in KERNELS
        if name == "value" or of_kernels or self.call.function == "sinkhorn_divergence":
            # It is a difference, or made of some: what overflows in one term may in another.
            found = torch.where(truth.isinf() & found.isnan(), truth.to(found.dtype), found)
        if self.exponents > 1e-2:
            # Neighbouring numbers are different costs to the plan: it has no digits to compare.
            self.members = self.members or [referred(self.call)]
            # Nor do they have an order of size, and half precision ends early.
            near = 1e-4 * torch.finfo(found.dtype).max
            lost = (self.members[0][name].abs() < near) & ~found.isfinite()
            # Where a value itself overflows, so may all that is made of the same plan.
            overflown = self.of_problems(name, ~(self.members[0]["value"].abs() < near))
            overflown |= self.overflows_on_the_way(name)
            lost &= ~overflown.view(-1, *[1] * (truth.dim() - 1))
            # And where the rounding of an exponent is as long as the range of exponents.
            lost &= (name in OUTPUTS) | (self.exponents < math.log(torch.finfo(found.dtype).max))
            return "" if not lost.any() else f"{found[lost][0].item()} where the truth is a number"
        known = torch.ones_like(truth, dtype=torch.bool)
        if name not in OUTPUTS:
            # A problem with an input that is not a number may have any gradient and plan, and where
            # float64 overflows there is no truth.
            known = truth.isfinite() & ~self.unreadable(name).view(-1, *[1] * (truth.dim() - 1))
        # A number near the largest of its dtype may overflow on the way to it. A value is a
        # temperature times the mass of the plan, and the mass may be that number.
        near = 1e-4 * torch.finfo(self.call.dtype).max
        near *= min(self.coldest, 1.0) if name == "value" else 1.0
        known &= ~truth.isfinite() | (truth.abs() < near)
        if self.overflows_on_the_way(name):
            known &= found.isfinite()
        error = _difference(found[known], truth[known])
        own = (TOLERANCE[found.dtype] + self.exponents) * self.size(name)
        if name == "value" and self.call.option("backend") in KERNELS:
            # What other costs change about the plan, the penalty multiplies.
            own += self.exponents * self.slopes[0] * self.call.mass * self.largest_plan
        if self.call.in_halves:
            own += FAST.get(name, max(FAST.values())) * self.fast_unit(name)
            if name == "value" and self.call.option("tol", 0.0) > 0:
                # It may have stopped where a value still depends on potentials in the first order.
                own += FAST["value_linear"] * self.fast_unit("value_linear")
        if name in ("f", "g", "grad_log_a", "grad_log_b"):
            own += self.shift * (self.upstream if name.startswith("grad") else 1.0)
        if name in ("f", "g") and self.call.option("backend") == "triton":
            # Its scores hold the logarithms of the masses, and are rounded as the largest of them.
            masses = [self.call.option(f"log_{side}", torch.zeros(0)).detach() for side in "ab"]
            exponent = max(map(_largest, masses)) * max(self.temperatures, default=0.0)
            own += torch.finfo(found.dtype).eps * exponent
        largest = 0.0
        for k in range(FAMILY):
            if error <= own + MARGIN * largest:
                return ""
            if k == len(self.members):
                # The dtypes of the call itself come first, so that half precision is rounded alike.
                same = None if k == 0 else self.call.dtype
                self.members.append(referred(self.call, same, k))
            largest = max(largest, _difference(self.members[k][name][known], truth[known]))
        linear = name == "value_linear" or self.call.function == "ot_alignment"
        if linear or name == "marginal_error" or name.startswith("grad"):
            # A run that ends early may carry far more than its masses, and every unit of it pays
            # costs that are differences of what is rounded: exact zeros of the truth among them.
            own *= self.largest_plan
        allowed = own + MARGIN * largest
        implicit = self.call.option("gradient") == "implicit"
        if implicit and name.startswith("grad"):
            allowed += self.size(name) * max(_uncertainty(c) for c in _solved_by(self.call))
        if self.call.option("gradient") == "unroll" and name.startswith("grad"):
            allowed += self.size(name) * self.rounding_of_slopes
        if error <= allowed:
            return ""
        worst = torch.where(known.reshape(-1), _differences(found, truth), 0.0).argmax()
        values = [x.reshape(-1)[worst].item() for x in (found, truth, self.members[0][name])]
        return "{!r} where the truth is {!r} and the same-dtype reference {!r}; ".format(
            *values
        ) + (f"error {error:.3g} > {allowed:.3g}")

    def unreadable(self, name: str) -> Tensor:
        """Whether the first index of this output is one of a problem whose value is NaN."""
        return self.of_problems(name, self.truth["value"].isnan())

    def of_problems(self, name: str, chosen: Tensor) -> Tensor:
        """Whether the first index of this output is one of a problem that was chosen."""
        ends = self.call.option("cu_seqlens_" + ("a" if name in OF_ROWS else "b"))
        alone = ends is None or name in OF_PROBLEMS
        return chosen if alone else chosen.repeat_interleave(ends.diff())

    @property
    def sweeps_in_float32(self) -> bool:
        of_kernels = self.call.option("backend") in KERNELS
        return of_kernels and self.call.option("gradient") == "unroll"

    def overflows_on_the_way(self, name: str) -> bool:
        """Before they are weighed, numbers of a sweep are as large as squares of what comes out."""
        large = 1e-3 * math.sqrt(torch.finfo(self.call.dtype).max)
        return (
            self.sweeps_in_float32
            and name.startswith("grad")
            and _largest(self.truth[name]) > large
        )

    @functools.cached_property
    def potentials(self) -> tuple[float, ...]:
        """The largest, which run away where masses differ and no plan has them."""
        if "f" in self.truth:
            return tuple(_largest(self.truth[name]) for name in "fg")
        solved = [call.rounded(torch.float64).run() for call in _solved_by(self.call)]
        return tuple(_largest(x.detach()) for result in solved for x in (result.f, result.g))

    @functools.cached_property
    def upstream(self) -> float:
        """By which potentials are multiplied to become gradients of log-masses."""
        return self.call.mass * sum(map(_largest, self.call.cotangents.values()))

    @functools.cached_property
    def largest_plan(self) -> float:
        return max(1.0, *(_transported(c) for c in _solved_by(self.call)))

    @functools.cached_property
    def slopes(self) -> tuple[float, float]:
        """The largest slope of a marginal penalty, and its strength."""
        slope = strength = 0.0
        for call in _solved_by(self.call):
            result = call.rounded(torch.float64).run()
            given, plan = PaddedProblem(result.problem).with_cost, result.plan().detach()
            for rho, sums, log_mass in (
                (given.rho_a, plan.sum(2), given.log_a),
                (given.rho_b, plan.sum(1), given.log_b),
            ):
                if rho != INF:
                    slope = max(slope, rho * _largest(log_ratio(sums, log_mass)))
                    strength = max(strength, rho)
        return slope, strength

    @property
    def rounding_of_slopes(self) -> float:
        """What the largest slope of a marginal penalty over epsilon loses.

        An unrolled gradient of the truth holds it, with its rounding, until the sweep takes nearly
        all of it off again, and so do those of the kernels in float32. The CPU library leaves it
        out from the beginning. The slope is a logarithm, whose rounding in the truth is a share of
        1 however small it is.
        """
        slope, strength = self.slopes
        holds = torch.float32 if self.sweeps_in_float32 else torch.float64
        lost = torch.finfo(holds).eps * slope + torch.finfo(torch.float64).eps * strength
        return lost / self.coldest

    def fast_unit(self, name: str) -> float:
        """What an entry of ``FAST`` is a share of."""
        call, epsilon = self.call, max(self.temperatures, default=0.0)
        mass = call.mass * self.largest_plan
        units = {"value": epsilon * mass, "value_linear": call.scale * mass, "f": epsilon}
        units |= {"marginal_error": mass, "g": epsilon}
        return units.get(name) or self.size(name)

    def size(self, name: str) -> float:
        call, truth = self.call, self.truth[name].nan_to_num(0.0, 0.0, 0.0)
        epsilon = torch.as_tensor(call.arguments["epsilon"]).nan_to_num(0.0, 0.0, 0.0)
        if name == "value":  # it holds epsilon times the product of both masses
            floor = (
                call.scale * call.mass + epsilon.max().item() * call.mass**2
                if epsilon.numel()
                else 1.0
            )
        elif name in ("f", "g", "value_linear", "grad_log_a", "grad_log_b"):
            floor = call.scale * call.mass
        else:
            floor = call.mass * (call.slope if name in OF_VECTORS else 1.0)
        if name.startswith("grad") and call.function == "sinkhorn_divergence":
            # Terms of the size of the plans may cancel in it.
            floor *= self.largest_plan
        return max(floor, truth.abs().max().item())


def _differences(x: Tensor, y: Tensor) -> Tensor:
    """Of equal infinities, and of NaN and NaN, the difference is 0; with one NaN it is infinite."""
    x, y = x.double(), y.double()
    same = (x == y) | (x.isnan() & y.isnan())
    return torch.where(same, 0.0, (x - y).abs().nan_to_num(math.inf, math.inf)).reshape(-1)


def _difference(x: Tensor, y: Tensor) -> float:
    return _differences(x, y).max().item() if x.numel() else 0.0


def _same_decisions(call: Call, found: dict[str, Tensor], truth: dict[str, Tensor]) -> bool:
    """False where rounding decided when to stop, so that the numbers belong to another iterate."""
    agreed = (found["n_iter"] == truth["n_iter"]) & (found["status"] == truth["status"])
    if agreed.all():
        return True
    tol = call.option("tol", 0.0)
    if call.in_halves and tol > 0:
        return False
    for i in (~agreed).nonzero()[:, 0].tolist():
        counts = [int(x["n_iter"][i]) for x in (found, truth)]
        ends = [Status(int(x["status"][i])) for x in (found, truth)]
        message = " and the truth ".join(
            f"{end.name} after {count}" for end, count in zip(ends, counts, strict=True)
        )
        message = f"problem {i} is {message}"
        assert tol > 0 and {*ends} <= {Status.CONVERGED, Status.MAX_ITER}, message
        error = _row_residual(call.but(tol=0.0, max_iter=min(counts)), i)
        mass = call.mass * max(1.0, _transported(call.but(tol=0.0, max_iter=min(counts))))
        rounding = 1e3 * torch.finfo(call.dtype).eps * mass
        amplified = call.scale / _temperature(call, i)
        assert abs(error - tol) <= 1e-2 * tol + rounding * max(1.0, amplified), (
            f"{message}, and after {min(counts)} the residual is {error}, not {tol}"
        )
    return False


def _row_residual(call: Call, i: int) -> float:
    """How far the reference's rows of problem i are from those wanted, after ``max_iter``."""
    result = call.rounded(torch.float64).run()
    dense = PaddedProblem(result.problem)
    problems = MaskedProblem(dense.with_cost)
    wanted = problems.optimal_sums(dense.a.pad(result.f), dense.b.pad(result.g))[0]
    return (result.plan().sum(2) - wanted).abs().sum(1)[i].item()


def _temperature(call: Call, i: int) -> float:
    epsilon = call.arguments["epsilon"]
    return float(epsilon[i]) if isinstance(epsilon, Tensor) else epsilon


def _check_residuals(call: Call, found: dict[str, Tensor]) -> None:
    """A problem that Anderson acceleration calls converged is."""
    tol = call.option("tol", 0.0)
    converged = found["status"] == int(Status.CONVERGED)
    assert not converged.any() or tol > 0, "CONVERGED without tol"
    mass = call.mass * max(1.0, _transported(call))
    rounding = 1e3 * torch.finfo(call.dtype).eps * mass * call.scale
    for i in converged.nonzero()[:, 0].tolist():
        error, limit = found["marginal_error"][i].item(), 2 * tol + rounding / _temperature(call, i)
        assert error <= limit, f"problem {i} is CONVERGED with marginal_error {error} > {limit}"


def _uncertainty(call: Call) -> float:
    """How far implicit gradients may be off, as a share of their size.

    Their linear system is singular up to the shift of the potentials, and nearly so where parts of
    a problem hardly exchange mass. An error of the right side grows by the inverse of the smallest
    eigenvalue that is not 0; below a threshold that every implementation sets elsewhere, the
    solution is not defined. Nor is there a fixed point to speak of where the sums of the plan are
    far from any that were asked for.
    """
    found, truth = call.run(), call.rounded(torch.float64).run()
    missed = truth.marginal_error.detach().nan_to_num(0.0)
    if len(missed) and missed.max() > 10 * call.mass:
        return INF
    plan = truth.plan().detach()
    rows, columns = plan.sum(2), plan.sum(1)
    epsilon = torch.as_tensor(call.arguments["epsilon"]).double().expand(len(plan))
    stiff = [1 + epsilon[:, None] / rho for rho in (truth.problem.rho_a, truth.problem.rho_b)]
    share_a, share_b = ((x * y).rsqrt() for x, y in zip((rows, columns), stiff, strict=True))
    scaled = share_a.nan_to_num(0, 0)[:, :, None] * plan * share_b.nan_to_num(0, 0)[:, None, :]
    values = 1 - torch.linalg.svdvals(scaled.nan_to_num(0, 0, 0)) ** 2
    balanced = truth.problem.rho_a == truth.problem.rho_b == INF
    # In descending order of singular values: the first is that of the shift.
    values = values[:, 1:] if balanced else values
    least = values.min().item() if values.numel() else 1.0
    residual = found.gradient_residual.nan_to_num(0).max().item()
    rounding = 1e2 * torch.finfo(call.dtype).eps
    amplified = call.scale / epsilon[epsilon > 0].min().item()
    return INF if least < 1e-7 else (residual + rounding) * amplified / least


def _transported(call: Call) -> float:
    """The largest plan of the call, as a multiple of the masses it was given."""
    totals = _solved_by(call)[0].rounded(torch.float64).run().plan().detach().sum((1, 2))
    return _largest(totals) / call.mass


def _solved_by(call: Call) -> list[Call]:
    """The problems behind a call, as calls that return a ``SinkhornResult``."""
    names = {"student": "x", "teacher": "y", "student_mask": "mask_a", "teacher_mask": "mask_b"}
    arguments = {names.get(name, name): value for name, value in call.arguments.items()}
    if call.function == "sinkhorn":
        return [call]
    solved = [replace(call, function="sinkhorn_vectors", arguments=arguments)]
    if call.function == "sinkhorn_divergence":
        for own, other in (("a", "b"), ("b", "a")):
            within = {name: x for name, x in arguments.items() if not name.endswith(f"_{other}")}
            within |= {
                f"{name[:-1]}{other}": x for name, x in within.items() if name.endswith(f"_{own}")
            }
            within["x"] = within["y"] = arguments[{"a": "x", "b": "y"}[own]]
            solved.append(replace(call, function="sinkhorn_vectors", arguments=within))
    return solved


def _check_threads(call: Call, found: dict[str, Tensor]) -> None:
    """Not one bit depends on the number of threads."""
    torch.set_num_threads(1)
    for name, x in outputs(call).items():
        if (
            name == "plan"
        ):  # computed by PyTorch, whose exp depends on where a thread's share begins
            continue
        assert _difference(x, found[name]) == 0, f"{name} depends on the number of threads"
    torch.set_num_threads(call.threads)


# ---------------------------------------------------------------------------------- invalid calls

NAN, INF = math.nan, math.inf
# What none of the functions takes for an option.
WRONG_VALUES: dict[str, tuple[Any, ...]] = {
    "epsilon": (0, 0.0, -1.0, NAN, INF, "0.1", None, True, torch.ones(9, 9), torch.ones(99)),
    "max_iter": (-1, 1.0, "3", None, True, NAN),
    "tol": (-1e-3, NAN, INF, "1", None, True),
    "omega": (0.0, 2, -1.0, NAN, INF, "1", None, False),
    "rho": (0.0, -1.0, NAN, "1", True, (1.0,), (1.0, 1.0, 1.0), (0.0, 1.0), (1.0, "1"), {}),
    "anderson": (-1, 17, 1.0, "1", None, True),
    "anneal": ((0.0, 0.5), (1.0, 1.0), (1.0, 0.0), (NAN, 0.5), (INF, 0.5), 1.0, (1.0,), ("1", 0.5)),
    "gradient": ("none", None, 1, "Envelope"),
    "backend": ("gpu", None, 1, "triton"),
    "low_memory": (1, None, "yes"),
    "precision": ("half", None, 1, torch.float16),
    "cost": ("euclidean", None, 2),
    "surprise": (1,),
}


def _longer(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(*x.shape[:-1], 1)], -1)


def _elsewhere(x: Tensor) -> Tensor:
    return x.to("meta")


# What no tensor may become: of another type, dtype, shape or device.
WRONG_TENSORS: tuple[Callable[[Tensor], Any], ...] = (
    lambda x: x.tolist() or [0.0],
    lambda x: x.unsqueeze(0),
    lambda x: x.sum(),
    lambda x: x.to(torch.complex64),
    _longer,
    _elsewhere,
    lambda x: "tensor",
)


def spoil(d: Dice, call: Call) -> Call:
    """The same call with one argument made invalid."""
    ways = [_wrong_option, _wrong_tensor, _wrong_tensor, _contradiction]
    while True:
        spoiled = d.pick(*ways)(d, call)
        if spoiled is not None:
            return spoiled


def _wrong(call: Call, name: str, value: Any, **others: Any) -> Call:
    return replace(call.but(**{name: value}, **others), wrong=name)


def _wrong_option(d: Dice, call: Call) -> Call | None:
    name = d.pick(*WRONG_VALUES)
    vectors_only = name in ("low_memory", "cost")
    if vectors_only and call.function == "sinkhorn":
        return None
    return _wrong(call, name, d.pick(*WRONG_VALUES[name]))


def _wrong_tensor(d: Dice, call: Call) -> Call | None:
    tensors = [name for name, value in call.arguments.items() if isinstance(value, Tensor)]
    name = d.pick(*tensors)
    change = d.pick(*WRONG_TENSORS)
    if name in ("cost", "x", "y", "student", "teacher") and change in (_longer, _elsewhere):
        return None  # then it may be another argument that does not match
    return _wrong(call, name, change(call.arguments[name].detach()))


def _contradiction(d: Dice, call: Call) -> Call | None:
    """Problem that are wrong together, or in their values."""
    packed = call.option("cu_seqlens_a") is not None
    letter = d.pick("a", "b")
    tokens = call.option({"a": "x", "b": "y"}[letter])
    way = d.pick("anderson", "unroll", "both", "lengths", "ends", "init", "dim", "epsilon", "rho")
    if way == "anderson" and call.function != "ot_alignment":
        return _wrong(call, "omega", 1.5, anderson=2, gradient="envelope")
    if way == "unroll":
        return _wrong(call, "gradient", "unroll", anderson=3, omega=1.0)
    if way == "epsilon":
        batch = len(call.cotangents["value"])
        return _wrong(call, "epsilon", torch.ones(batch, requires_grad=True))
    if way == "rho" and call.function == "sinkhorn_divergence":
        return _wrong(call, "rho", (1.0, 2.0))
    if way == "dim" and tokens is not None:
        return _wrong(call, d.pick("x", "y"), tokens.detach()[..., :0])
    if call.function == "ot_alignment":
        return None
    if way == "both":
        lengths = torch.zeros(len(call.cotangents["value"]), dtype=torch.int64)
        mask = call.option(f"mask_{letter}")
        if packed or mask is not None:
            return _wrong(call, f"lengths_{letter}", lengths)
    if way == "lengths" and call.option(f"lengths_{letter}") is not None:
        lengths = call.arguments[f"lengths_{letter}"].clone()
        if len(lengths):
            lengths[-1] = d.pick(-1, 1000)
            return _wrong(call, f"lengths_{letter}", lengths)
    if way == "ends" and packed:
        ends = call.arguments[f"cu_seqlens_{letter}"].clone()
        wrong = d.pick("first", "last", "middle", "float", "shorter", "none")
        if wrong == "none":
            return _wrong(call, f"cu_seqlens_{letter}", None)
        if wrong == "shorter" and len(ends) > 1:
            other = {"a": "b", "b": "a"}[letter]
            shorter = call.arguments[f"cu_seqlens_{other}"]
            kept = torch.cat([shorter[:1], shorter[2:]]) if len(shorter) > 2 else shorter[:0]
            return _wrong(call, f"cu_seqlens_{other}", kept)
        if wrong == "float":
            return _wrong(call, f"cu_seqlens_{letter}", ends.double())
        if wrong == "middle" and len(ends) > 2:
            ends[1] = ends[-1] + 1
        elif wrong == "first":
            ends[0] = 1
        else:
            ends[-1] += 1
        return _wrong(call, f"cu_seqlens_{letter}", ends)
    if way == "init" and call.function != "sinkhorn_divergence":
        start = torch.zeros(3, 99, 99)
        return _wrong(call, "init", d.pick(1.0, (), (start,), (start, start), (None, None), "fg"))
    return None


def check_invalid(call: Call) -> None:
    """Raises AssertionError unless the call is refused and the wrong argument named."""
    try:
        call.run()
    except REFUSALS as error:
        assert call.wrong in str(error), f"does not name {call.wrong}: {error!r}"
    else:
        raise AssertionError(f"{call.wrong} was accepted")


# ------------------------------------------------------------------------------------------ the run


def check(call: Call) -> None:
    torch.set_num_threads(call.threads)
    (check_invalid if call.wrong else check_valid)(call)


def main(
    arguments: Sequence[str],
    draw: Callable[[int], Call] = draw,
    check: Callable[[Call], None] = check,
) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--seed", type=int, default=0, help="the first call's number")
    parser.add_argument("--failures", type=int, default=10, help="stop after so many")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # that the reference serves what the library cannot
    faulthandler.enable()
    sys.stdout.reconfigure(line_buffering=True)  # what was found outlives a crash
    if library.load_cpu().reason is not None:  # builds the library, which takes its time
        parser.error(f"there is no library to compare: {library.load_cpu().reason}")
    start = time.monotonic()
    done = failures = 0
    for seed in range(options.seed, options.seed + options.calls):
        if time.monotonic() - start > options.seconds or failures == options.failures:
            break
        # After a crash the last number on the terminal is that of the call.
        print(f"\r{seed}", end="", file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        call = draw(seed)
        done += 1
        try:
            check(call)
        except Exception:
            failures += 1
            print(f"\nFAILED: python {sys.argv[0]} --seed {seed} --calls 1\n{call}")
            traceback.print_exc(limit=-4, file=sys.stdout)
    faulthandler.cancel_dump_traceback_later()
    elapsed = time.monotonic() - start
    print(f"\n{done} calls, {failures} failed, {elapsed:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
