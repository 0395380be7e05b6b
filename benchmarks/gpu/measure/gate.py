"""The accuracy gate of the timings: no time is written for a wrong result.

Truth is the float64 reference, computed on the device for the first problems of a batch. The last
problems must have the bits of a batch of their own, which ties the rest to the checked ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.measure.shapes import MACHINE
from optical.testing import tolerance
from optical.testing.cases import Case

# Problems compared with float64, and problems whose bits are compared.
CHECKED = 4
Errors = dict[str, Any]


def part(case: Case, problems: slice) -> Case:
    """Some problems of a padded batch, as a batch of their own."""
    names = ("x", "y", "log_a", "log_b", "epsilon")
    return replace(case, **{name: getattr(case, name)[problems] for name in names})


class Truth(NamedTuple):
    """The first problems of a batch, and the reference's results for them.

    Attributes:
        problems: the problems as the backends get them.
        exact: the same in float64.
        outputs: the reference in float64.
        same_dtype: the reference in float32, which sets the tolerated rounding.
    """

    problems: Case
    exact: Case
    outputs: dict[str, Tensor]
    same_dtype: dict[str, Tensor]


def truth_of(case: Case, gradient: str) -> Truth:
    """Solve the first problems of a batch by the reference, on the device."""
    few = part(case, slice(CHECKED))
    exact = few.to(torch.float64, MACHINE.device)
    single = few.to(torch.float32, MACHINE.device)
    outputs, same = (tolerance.solve("reference", run, gradient) for run in (exact, single))
    return Truth(few, exact, outputs, same)


def check(known: Truth, backend: str, gradient: str, precision: str) -> Errors:
    """Hold a backend to the tolerance rule; its errors, by column of ``Row``.

    Raises:
        AssertionError: an output or a gradient is wrong.
    """
    few, exact = (replace(c, precision=precision) for c in (known.problems, known.exact))
    truth, same_dtype = known.outputs, known.same_dtype
    out = tolerance.solve(backend, few, gradient)
    for field, expected in truth.items():
        if field in ("n_iter", "status"):
            if not torch.equal(out[field], expected):
                raise AssertionError(f"{field} is {out[field]}; expected {expected}")
            continue
        if field == "residual":
            continue
        vectors = field in ("grad_x", "grad_y")
        scale, more = tolerance.scale_and_allowance(field, exact, expected)
        tolerance.assert_close_to_truth(
            out[field],
            expected,
            same_dtype[field],
            dtype=few.x.dtype if vectors else torch.float32,
            scale=scale,
            name=f"{backend} {few.name} {gradient} {field}",
            more=more,
        )
    return _errors(out, truth, few.epsilon[0].item())


def _errors(out: dict[str, Tensor], truth: dict[str, Tensor], epsilon: float) -> Errors:
    def off(*names: str) -> float:
        return max((out[name].double() - truth[name]).abs().max().item() for name in names)

    def relative(*names: str) -> float:
        return max(off(name) / max(truth[name].abs().max().item(), 1e-30) for name in names)

    return {
        "error_value": relative("value"),
        "error_potentials": off("f", "g") / epsilon,
        "error_gradient": relative("grad_x", "grad_y"),
    }


def same_bits(whole: tuple[Tensor, ...], alone: tuple[Tensor, ...]) -> bool:
    """Whether the last problems have the same bits in the whole batch and alone.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    equal = True
    for all_values, expected in zip(whole, alone, strict=True):
        values = all_values[-len(expected) :]
        if torch.equal(values, expected):
            continue
        equal = False
        scale = max(1.0, expected.abs().max().item())
        difference = (values.double() - expected.double()).abs().max().item()
        if not difference <= tolerance.TOLERANCE[expected.dtype] * scale:
            raise AssertionError(f"the last problems differ by {difference:.3g} in a larger batch")
    return equal
