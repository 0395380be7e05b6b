"""Random calls of the public functions, each drawn from its seed alone."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

from tests.stress.calls import Call, largest
from tests.stress.spoil import spoil


class Dice:
    """The source of all randomness of one call."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.chance = lambda share: self.random.random() < share
        self.pick = lambda *choices: self.random.choice(choices)
        self.between = self.random.randint

    def power(self, low: float, high: float) -> float:
        return 10 ** self.random.uniform(low, high)

    def size(self) -> int:
        """Length of a side: mostly small, 0 in 3% of the draws."""
        return 0 if self.chance(0.03) else self.between(1, self.pick(2, 5, 9, 9, 18, 35, 70))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def some(self, share: float, *shape: int) -> Tensor:
        """A mask in which each entry is true with probability ``share``."""
        return torch.rand(shape, generator=self.generator) < share

    def layout(self, x: Tensor) -> Tensor:
        """The same values in another memory layout."""
        layout = self.pick("dense", "dense", "transposed", "strided", "offset")
        if layout == "transposed" and x.dim() > 1:
            return x.mT.contiguous().mT
        if layout == "strided" and x.dim():
            storage = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), 99)
            storage[..., 1::2] = x
            return storage[..., 1::2]
        if layout == "offset":
            return torch.cat([x.new_full((1,), 99), x.reshape(-1)])[1:].view(x.shape)
        return x


def draw(seed: int) -> Call:
    """The call of this seed: valid with probability 1/2."""
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
    if d.chance(0.003):  # a single large problem is split among threads
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
    valid = sides["a"], sides["b"]

    if kind == "given":
        x = _costs(d, call, batch, n, m)
        if d.chance(0.5):
            x = _poison(d, x, ~(valid[0][:, :, None] & valid[1][:, None, :]))
            x = d.layout(x)
        elif batch and d.chance(0.2):
            x = x[:1].expand_as(x)
        half = d.chance(0.1) and dtype == torch.float32 and call.scale < 100
        call.arguments["cost"] = x.to(d.pick(torch.float16, torch.bfloat16) if half else dtype)
    else:
        _clouds(d, call, kind, valid)

    temperature = _temperature(d, call, batch)
    _options(d, call, balanced, valid, temperature)
    _differentiate(d, call, valid, batch)
    call.scale = max(temperature, _largest_cost(call, kind, valid))
    return call


def _side(
    d: Dice, call: Call, letter: str, batch: int, size: int, packed: bool, total: float
) -> Tensor:
    """Draw the masses of one side; returns the mask of its valid entries, padded or packed."""
    lengths = [d.between(0 if d.chance(0.1) else min(1, size), size) for _ in range(batch)]
    inside = torch.arange(size) < torch.tensor(lengths, dtype=torch.int64).view(-1, 1)
    style = d.pick("none", "none", "lengths", "mask", "log", "log", "log mask", "log lengths")
    if call.function == "ot_alignment":
        style = d.pick("none", "mask")
    if "mask" in style:
        inside = inside if d.chance(0.5) else d.some(0.7, batch, size)
        name = {"a": "student_mask", "b": "teacher_mask"}[letter]
        name = name if call.function == "ot_alignment" else f"mask_{letter}"
        mask_dtype = d.pick(torch.bool, torch.int64, torch.uint8, torch.float32)
        if not packed:
            call.arguments[name] = d.layout(inside.to(mask_dtype))
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
    valid = inside
    if "log" in style:
        valid = inside & d.some(d.pick(0.7, 1.0), batch, size)
        log_mass = log_mass.masked_fill(~valid, -math.inf)
        log_mass = log_mass - log_mass.logsumexp(1, keepdim=True).nan_to_num(neginf=0.0) + total
        call.mass = max(call.mass, math.exp(total))
        log_mass = _poison(d, log_mass, ~inside)
        if size and d.chance(0.01):
            log_mass[:1, 0] = d.pick(math.nan, math.inf)
    if packed:
        ends = torch.tensor([0, *lengths]).cumsum(0).to(d.pick(torch.int64, torch.int32))
        call.arguments[f"cu_seqlens_{letter}"] = ends
        valid, log_mass = valid[inside], log_mass[inside]
    if "log" in style:
        call.arguments[f"log_{letter}"] = d.layout(log_mass.to(call.dtype))
    return valid


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


def _clouds(d: Dice, call: Call, kind: str, valid: tuple[Tensor, Tensor]) -> None:
    """Draw the token vectors of both sides."""
    dim = d.pick(1, 2, 3, 7, 8, 16, 17, 33, 65, 200)
    half = d.chance(0.3)
    size = d.pick(1.0, 1.0, 0.1, 3.0)
    if kind == "cosine" and not half and d.chance(0.1):
        size = d.pick(1e-25, 1e-18, 1e18)
    call.scale = {"cosine": 1.0, "sqeuclidean": 2 * dim * size**2, "dot": dim**0.5 * size**2}[kind]
    names = ("student", "teacher") if call.function == "ot_alignment" else ("x", "y")
    offset = d.normal(dim) * d.pick(0, 0, 0, 10) * size
    for name, entries in zip(names, valid, strict=True):
        vectors = d.normal(*entries.shape, dim) * size + offset
        if d.chance(0.2):
            vectors = vectors.masked_fill(d.some(0.2, *entries.shape, 1), 0.0)
        if d.chance(0.2):
            vectors = torch.where(d.some(0.3, *entries.shape, 1), vectors[..., :1, :], vectors)
        vectors = _poison(d, vectors, ~entries[..., None])
        if vectors.numel() and d.chance(0.02):
            vectors.view(-1, dim)[0, 0] = d.pick(math.nan, math.inf, -math.inf)
        dtype = call.dtype
        if half and (d.chance(0.7) or call.dtype == torch.float32):
            dtype = d.pick(torch.float16, torch.bfloat16, torch.float32)
        call.arguments[name] = d.layout(vectors.to(dtype))
    if torch.float64 not in [call.arguments[name].dtype for name in names]:
        call.dtype = torch.float32
    if kind != "cosine" or d.chance(0.5):
        call.arguments["cost"] = kind


def _temperature(d: Dice, call: Call, batch: int) -> float:
    """Draw epsilon, a number or one per problem; returns its order of magnitude."""
    temperature = call.scale * d.power(-2.5, 0.5) if d.chance(0.95) else d.power(-4, 2)
    epsilon: Any = temperature
    if d.chance(0.3):
        epsilon = temperature * d.normal(batch).abs().clamp(min=0.03)
        epsilon = d.layout(epsilon.to(d.pick(torch.float32, torch.float64)))
        if batch and d.chance(0.05):
            epsilon[0] = d.pick(0.0, -1.0, math.nan, math.inf)
    call.arguments["epsilon"] = epsilon
    return temperature


def _largest_cost(call: Call, kind: str, valid: tuple[Tensor, Tensor]) -> float:
    """A bound on the costs and on the terms that they are sums of.

    Sets ``call.slope``, a bound on the derivative of the costs with respect to the vectors.
    """
    if kind == "given":
        pairs = valid[0][:, :, None] & valid[1][:, None, :]
        return largest(call.arguments["cost"].detach()[pairs])
    names = ("student", "teacher") if call.function == "ot_alignment" else ("x", "y")
    norms = [
        call.arguments[name].detach().double().norm(dim=-1)[entries]
        for name, entries in zip(names, valid, strict=True)
    ]
    if kind == "cosine":
        call.slope = 1 / min((x[x > 0].min().item() for x in norms if (x > 0).any()), default=1)
        return 1.0
    longest = max(map(largest, norms))
    call.slope = 2 * longest
    return longest**2 if kind == "dot" else (2 * longest) ** 2


def _poison(d: Dice, x: Tensor, padding: Tensor) -> Tensor:
    """Fill the padding with a value that must never be read."""
    return torch.where(padding, d.pick(math.nan, math.inf, -math.inf, 1e30, 0.0), x)


def _options(
    d: Dice, call: Call, balanced: bool, valid: tuple[Tensor, Tensor], temperature: float
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
    if "anneal" in options and options["max_iter"]:
        # Annealing that does not reach epsilon is refused.
        start, ratio = options["anneal"]
        epsilon = options["epsilon"]
        values = epsilon.tolist() if isinstance(epsilon, Tensor) else [epsilon]
        coldest = min((value for value in values if value > 0), default=start)
        while start * ratio ** (options["max_iter"] - 1) > coldest * (1 - 1e-6):
            options["max_iter"] += 1
    if call.function.startswith("sinkhorn") and not one_rho and d.chance(0.2):
        options["init"] = tuple(
            d.layout(_poison(d, d.normal(*entries.shape) * call.scale, ~entries)).to(call.dtype)
            for entries in valid
        )
    if call.function != "sinkhorn" and d.chance(0.3):
        options["low_memory"] = True


def _differentiate(d: Dice, call: Call, valid: tuple[Tensor, Tensor], batch: int) -> None:
    """Draw the tensors that require a gradient, the cotangents and the operands of the plan."""
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
        for name, entries in (("f", valid[0]), ("g", valid[1])):
            if d.chance(0.5):
                call.cotangents[name] = d.normal(*entries.shape)
    if d.chance(0.5):
        return
    width = d.pick(0, 1, 2, 5, 9, 17)
    v, w = (
        _poison(d, d.normal(*entries.shape, width), ~entries[..., None]) for entries in valid[::-1]
    )
    call.vectors = d.layout(v.to(call.dtype)), d.layout(w.to(call.dtype))
