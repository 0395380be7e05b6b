"""Invalid calls: a valid call with one argument made wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tests.stress.calls import Call

if TYPE_CHECKING:
    from tests.stress.draw import Dice

NAN, INF = math.nan, math.inf
# Values that every function refuses for an option.
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
    "cost": ("manhattan", None, 2),
    "surprise": (1,),
}


def _longer(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(*x.shape[:-1], 1)], -1)


def _elsewhere(x: Tensor) -> Tensor:
    return x.to("meta")


def _deeper(x: Tensor) -> Tensor:
    return x.unsqueeze(0)


def _total(x: Tensor) -> Tensor:
    return x.sum()


# Changes that make a tensor argument invalid: another type, dtype, shape or device.
WRONG_TENSORS: tuple[Callable[[Tensor], Any], ...] = (
    lambda x: x.tolist() or [0.0],
    _deeper,
    _total,
    lambda x: x.to(torch.complex64),
    _longer,
    _elsewhere,
    lambda x: "tensor",
)


def spoil(d: Dice, call: Call) -> Call:
    """Make one argument of the call invalid; ``wrong`` holds its name."""
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
    shared = name in ("cost", "x", "y", "student", "teacher")
    if shared and change in (_longer, _elsewhere, _deeper):
        return None  # another argument might be reported as the one that does not match
    if name == "epsilon" and change is _total:
        return None  # one temperature for all problems
    return _wrong(call, name, change(call.arguments[name].detach()))


def _contradiction(d: Dice, call: Call) -> Call | None:
    """Combine arguments that exclude each other, or give one an invalid value."""
    packed = call.option("cu_seqlens_a") is not None
    letter = d.pick("a", "b")
    tokens = call.option({"a": "x", "b": "y"}[letter])
    way = d.pick("anderson", "unroll", "both", "lengths", "ends", "init", "dim", "epsilon", "rho")
    if way == "anderson" and call.function != "ot_alignment":
        return _wrong(call, "omega", 1.5, anderson=2, gradient="envelope")
    if way == "unroll":
        return _wrong(call, "gradient", "unroll", anderson=3, omega=1.0)
    if way == "epsilon":
        learnt = torch.ones(call.batch, requires_grad=True)
        return _wrong(call, "epsilon", learnt, gradient="unroll", anderson=0)
    if way == "rho" and call.function == "sinkhorn_divergence":
        return _wrong(call, "rho", (1.0, 2.0))
    if way == "dim" and tokens is not None:
        return _wrong(call, d.pick("x", "y"), tokens.detach()[..., :0])
    if call.function == "ot_alignment":
        return None
    if way == "both":
        lengths = torch.zeros(call.batch, dtype=torch.int64)
        mask = call.option(f"mask_{letter}")
        if packed or mask is not None:
            return _wrong(call, f"lengths_{letter}", lengths)
    if way == "lengths" and call.option(f"lengths_{letter}") is not None:
        lengths = call.arguments[f"lengths_{letter}"].clone()
        if len(lengths):
            lengths[-1] = d.pick(-1, 1000)
            return _wrong(call, f"lengths_{letter}", lengths)
    if way == "ends" and packed:
        return _wrong_ends(d, call, letter)
    if way == "init" and call.function != "sinkhorn_divergence":
        start = torch.zeros(3, 99, 99)
        return _wrong(call, "init", d.pick(1.0, (), (start,), (start, start), (None, None), "fg"))
    return None


def _wrong_ends(d: Dice, call: Call, letter: str) -> Call:
    """Make the offsets of packed problems invalid."""
    ends = call.arguments[f"cu_seqlens_{letter}"].clone()
    way = d.pick("first", "last", "middle", "float", "shorter", "none")
    if way == "none":
        return _wrong(call, f"cu_seqlens_{letter}", None)
    if way == "shorter" and len(ends) > 1:
        other = {"a": "b", "b": "a"}[letter]
        offsets = call.arguments[f"cu_seqlens_{other}"]
        shorter = torch.cat([offsets[:1], offsets[2:]]) if len(offsets) > 2 else offsets[:0]
        return _wrong(call, f"cu_seqlens_{other}", shorter)
    if way == "float":
        return _wrong(call, f"cu_seqlens_{letter}", ends.double())
    if way == "middle" and len(ends) > 2:
        ends[1] = ends[-1] + 1
    elif way == "first":
        ends[0] = 1
    else:
        ends[-1] += 1
    return _wrong(call, f"cu_seqlens_{letter}", ends)
