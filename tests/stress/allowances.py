"""The tolerance rule for random calls: one table of allowances, and how they combine.

``optical.testing.tolerance`` allows the error of the same-dtype reference plus ``TOLERANCE`` of the
size of an output. Random calls reach corners where that is too strict for any implementation. Each
corner is an entry of ``ALLOWANCES``: when it applies, how much it allows, and why. ``verdict``
applies the table to one output, ``ending_verdict`` to iteration counts and statuses.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optical.backends.problem import Status
from optical.testing.tolerance import FAST, TOLERANCE
from tests.stress.calls import difference, differences, largest
from tests.stress.comparison import Ending, Output, transported

SAMPLES = 8  # runs of the reference on differently rounded inputs


class Stage(enum.Enum):
    """Where in the rule an allowance acts, and the meaning of its size.

    The limit of an error is (SHARE * unit + ERROR) * FACTOR + REFERENCE + LATE. Stages from FACTOR
    on cost further runs of the reference; they are evaluated only when the rest does not suffice.
    """

    EQUAL = "mask of entries that count as equal to the truth"
    NO_DIGITS = "only overflow is judged; the size is True"
    OVERFLOW = "without digits, mask of entries that may overflow"
    UNKNOWN = "mask of entries that are not compared"
    SHARE = "allowed error, as a share of the unit of the output"
    ERROR = "allowed error"
    REFERENCE = "multiple of the largest error of the same-dtype reference"
    FACTOR = "factor of the errors allowed so far, but for those of the reference"
    LATE = "allowed error, added last"
    ENDING = "allowed distance of the residual from tol where runs stop at different iterations"
    ACCELERATED = "largest marginal error of a problem that an accelerated run reports converged"
    THREADS = "allowed difference between runs with different numbers of threads"


@dataclass(frozen=True)
class Allowance:
    """One entry of the table.

    Attributes:
        name: name of the allowance.
        stage: where the size enters the rule.
        applies: whether it applies to an ``Output`` (or an ``Ending``, or a name, by stage).
        size: its size, of the kind that the stage names.
        reason: why a correct implementation needs it.
    """

    name: str
    stage: Stage
    applies: Callable[[Any], bool]
    size: Callable[[Any], Any]
    reason: str


# ---------------------------------------------------------------------- conditions and sizes


def _subtracts(output: Output) -> bool:
    divergence = output.call.function == "sinkhorn_divergence"
    return output.name == "value" or output.call.on_kernels or divergence


def _has_no_digits(output: Output) -> bool:
    return output.comparison.exponents > 1e-2


def _near_the_largest(dtype: torch.dtype) -> float:
    return 1e-4 * torch.finfo(dtype).max


def _reference_overflows(output: Output) -> Tensor:
    first = output.comparison.sample(0)[output.name]
    return ~(first.abs() < _near_the_largest(output.value.dtype))


def _value_overflows(output: Output) -> Tensor:
    value = output.comparison.sample(0)["value"]
    overflown = ~(value.abs() < _near_the_largest(output.value.dtype))
    return output.comparison.of_problems(output.name, overflown)


def _sweep_overflows(output: Output) -> bool:
    """Intermediate numbers of a sweep are as large as the squares of its results."""
    large = 1e-3 * math.sqrt(torch.finfo(output.call.dtype).max)
    swept = output.comparison.sweeps_in_float32 and output.is_gradient
    return swept and largest(output.truth) > large


def _exponents_overflow(output: Output) -> bool:
    range_of_exponents = math.log(torch.finfo(output.value.dtype).max)
    return not output.is_plain and not output.comparison.exponents < range_of_exponents


def _may_overflow_on_the_way(output: Output) -> Tensor:
    near = _near_the_largest(output.call.dtype)
    if output.name == "value":  # a temperature times a mass, which is the larger number
        near *= min(output.comparison.coldest, 1.0)
    return output.truth.isfinite() & ~(output.truth.abs() < near)


def _malformed(output: Output) -> Tensor:
    return output.comparison.of_problems(output.name, output.comparison.malformed)


def _penalty_error(output: Output) -> float:
    comparison = output.comparison
    slope = comparison.penalty[0]
    return comparison.exponents * slope * output.call.mass * comparison.largest_plan


def _half_precision_error(output: Output) -> float:
    share = FAST.get(output.name, max(FAST.values()))
    return share * output.comparison.fast_unit(output.name)


def _hot_potential_error(output: Output) -> float:
    factor = output.comparison.upstream if output.is_gradient else 1.0
    return output.comparison.hot_rounding * factor


def _carries_the_plan(output: Output) -> bool:
    linear = output.name == "value_linear" or output.call.function == "ot_alignment"
    return linear or output.name == "marginal_error" or output.is_gradient


def _gradient_of(gradient: str) -> Callable[[Output], bool]:
    return lambda output: output.is_gradient and output.call.option("gradient") == gradient


def _ends_by_tol(ending: Ending) -> bool:
    return ending.tol > 0 and {*ending.statuses} <= {Status.CONVERGED, Status.MAX_ITER}


def _converged_residual(ending: Ending) -> float:
    call = ending.call
    mass = call.mass * max(1.0, transported(call))
    rounding = 1e3 * torch.finfo(call.dtype).eps * mass * call.scale
    return 2 * ending.tol + rounding / call.temperature(ending.problem)


# --------------------------------------------------------------------------------- the table

ALLOWANCES = (
    Allowance(
        "overflow of a difference",
        Stage.EQUAL,
        _subtracts,
        lambda output: output.truth.isinf() & output.value.isnan(),
        "These outputs are differences. Where one of the terms overflows, another one may overflow "
        "too, and the result is NaN instead of infinite.",
    ),
    Allowance(
        "no digits",
        Stage.NO_DIGITS,
        _has_no_digits,
        lambda output: True,
        "If the rounding of a cost exceeds a hundredth of epsilon, neighbouring numbers are "
        "different costs to the plan, and the outputs have no digits to compare.",
    ),
    Allowance(
        "overflow of the reference",
        Stage.OVERFLOW,
        lambda output: True,
        _reference_overflows,
        "Where the same-dtype reference is within four orders of magnitude of overflow, so "
        "is every implementation.",
    ),
    Allowance(
        "overflow of the value",
        Stage.OVERFLOW,
        lambda output: True,
        _value_overflows,
        "Where the value of a problem overflows, so may every output made of the same plan.",
    ),
    Allowance(
        "overflow of a sweep, without digits",
        Stage.OVERFLOW,
        _sweep_overflows,
        lambda output: ~output.value.isfinite(),
        "Before they are weighted, numbers of an unrolled sweep are as large as the squares of the "
        "gradients.",
    ),
    Allowance(
        "range of exponents",
        Stage.OVERFLOW,
        _exponents_overflow,
        lambda output: ~output.value.isfinite(),
        "If the rounding of an exponent exceeds the range of exponents, the plan and the gradients "
        "have no order of magnitude.",
    ),
    Allowance(
        "overflow of the truth",
        Stage.UNKNOWN,
        lambda output: not output.is_plain,
        lambda output: ~output.truth.isfinite(),
        "Where float64 overflows there is no truth to compare gradients and plans with.",
    ),
    Allowance(
        "overflow on the way",
        Stage.UNKNOWN,
        lambda output: True,
        _may_overflow_on_the_way,
        "A number within four orders of magnitude of the largest may overflow while it is "
        "computed. A value is a temperature times the mass of the plan, which may be larger.",
    ),
    Allowance(
        "overflow of a sweep",
        Stage.UNKNOWN,
        _sweep_overflows,
        lambda output: ~output.value.isfinite(),
        "As without digits: squares of the gradients overflow in float32.",
    ),
    Allowance(
        "rounding of the dtype",
        Stage.SHARE,
        lambda output: True,
        lambda output: TOLERANCE[output.value.dtype],
        "The rule of optical.testing.tolerance.",
    ),
    Allowance(
        "rounding of the costs",
        Stage.SHARE,
        lambda output: True,
        lambda output: output.comparison.exponents,
        "Costs and potentials are rounded to their dtype before they are divided by epsilon.",
    ),
    Allowance(
        "penalty of rounded costs",
        Stage.ERROR,
        lambda output: output.name == "value" and output.call.on_kernels,
        _penalty_error,
        "Kernels sum the costs of the final plan in another order. The marginal penalty multiplies "
        "the change of the plan by its slope.",
    ),
    Allowance(
        "half precision",
        Stage.ERROR,
        lambda output: output.call.in_half_precision,
        _half_precision_error,
        'Kernels may store the plan in half precision with precision="fast".',
    ),
    Allowance(
        "half precision before convergence",
        Stage.ERROR,
        lambda output: (
            output.call.in_half_precision
            and output.name == "value"
            and output.call.option("tol", 0.0) > 0
        ),
        lambda output: FAST["value_linear"] * output.comparison.fast_unit("value_linear"),
        "A run that stops by tol may stop while the value still depends on the potentials in first "
        "order.",
    ),
    Allowance(
        "hot potentials",
        Stage.ERROR,
        lambda output: output.name in ("f", "g", "grad_log_a", "grad_log_b"),
        _hot_potential_error,
        "A rounding error at a high temperature of an annealed run may be a shift of one side's "
        "potentials, which later iterations do not correct.",
    ),
    Allowance(
        "log-masses in scores",
        Stage.ERROR,
        lambda output: output.name in ("f", "g") and output.call.option("backend") == "triton",
        lambda output: torch.finfo(output.value.dtype).eps * output.comparison.magnitudes_of_masses,
        "The scores of the Triton kernels include the log-masses, and are rounded relative to the "
        "largest of them.",
    ),
    Allowance(
        "rounding of the reference",
        Stage.REFERENCE,
        lambda output: True,
        lambda output: 4.0,
        "The tolerance rule allows the error of the same-dtype reference. One run is one sample of "
        "that error, which is small by luck in some of many calls, so the largest error "
        f"of up to {SAMPLES} runs on nudged inputs counts. In float64 the truth is such a sample.",
    ),
    Allowance(
        "plan larger than the masses",
        Stage.FACTOR,
        _carries_the_plan,
        lambda output: output.comparison.largest_plan,
        "An unfinished run may transport far more than the given masses. Each unit pays costs that "
        "are rounded differences, including exact zeros of the truth.",
    ),
    Allowance(
        "singular linear system",
        Stage.LATE,
        _gradient_of("implicit"),
        lambda output: output.comparison.unit(output.name) * output.comparison.implicit_uncertainty,
        "The linear system of implicit gradients amplifies errors by the inverse of its smallest "
        "eigenvalue.",
    ),
    Allowance(
        "slopes of the penalty",
        Stage.LATE,
        _gradient_of("unroll"),
        lambda output: output.comparison.unit(output.name) * output.comparison.rounding_of_slopes,
        "An unrolled sweep carries the slope of the marginal penalty over epsilon, and subtracts "
        "nearly all of it at the end.",
    ),
    Allowance(
        "half-precision stopping",
        Stage.ENDING,
        lambda ending: ending.call.in_half_precision and ending.tol > 0,
        lambda ending: math.inf,
        "A plan in half precision reaches tol some iterations earlier or later.",
    ),
    Allowance(
        "stopping at the tolerance",
        Stage.ENDING,
        _ends_by_tol,
        lambda ending: 1e-2 * ending.tol + ending.rounding,
        "Where the residual of an iterate is within rounding of tol, rounding decides whether the "
        "run stops. The outputs then belong to different iterates and are not compared.",
    ),
    Allowance(
        "accelerated residual",
        Stage.ACCELERATED,
        lambda ending: ending.tol > 0,
        _converged_residual,
        "Anderson acceleration amplifies rounding without bound until it converges, so two correct "
        "runs differ. Only the residual of a converged problem and the outputs that the returned "
        "potentials determine are defined.",
    ),
    Allowance(
        "plan by PyTorch",
        Stage.THREADS,
        lambda name: name == "plan",
        lambda name: math.inf,
        "PyTorch computes the plan. Its exponential depends on where the share of a thread begins.",
    ),
)
BY_NAME = {allowance.name: allowance for allowance in ALLOWANCES}

# ---------------------------------------------------------------------------------- the rule


def applying(table: Sequence[Allowance], stage: Stage, item: Any) -> Iterator[Allowance]:
    """The allowances of a stage that apply to an output, an ending or a name."""
    return (entry for entry in table if entry.stage is stage and entry.applies(item))


def verdict(output: Output, table: Sequence[Allowance] = ALLOWANCES) -> str:
    """Judge one output; returns an error message, empty if the output is right."""
    if output.value.shape != output.truth.shape:
        return f"shape {tuple(output.value.shape)}; expected {tuple(output.truth.shape)}"
    if not output.truth.numel():
        return ""
    for entry in applying(table, Stage.EQUAL, output):
        output = output.equal_where(entry.size(output))
    spoiled = output.value.isnan() != output.truth.isnan()
    if spoiled.any() and (spoiled := spoiled & _malformed(output)).any():
        return f"{output.value[spoiled][0].item()} where the truth of a malformed problem is not"
    if any(applying(table, Stage.NO_DIGITS, output)):
        return _overflow(output, table)
    return _excess(output, table)


def _overflow(output: Output, table: Sequence[Allowance]) -> str:
    """Judge an output without digits: it must be finite where nothing lets it overflow."""
    wrong = ~output.value.isfinite()
    for entry in applying(table, Stage.OVERFLOW, output):
        wrong &= ~entry.size(output)
    return f"{output.value[wrong][0].item()} where the truth is a number" if wrong.any() else ""


def compared_entries(output: Output, table: Sequence[Allowance] = ALLOWANCES) -> Tensor:
    """Mask of the entries that have a truth to compare with."""
    compared = torch.ones_like(output.truth, dtype=torch.bool)
    for entry in applying(table, Stage.UNKNOWN, output):
        compared &= ~entry.size(output)
    return compared


def allowed_errors(output: Output, table: Sequence[Allowance] = ALLOWANCES) -> Iterator[float]:
    """Limits of the error of an output, each at the price of another run of the reference.

    An error within any of them is allowed. The last one is the limit of the complete rule.
    """
    comparison, name = output.comparison, output.name
    compared = compared_entries(output, table)
    base = sum(entry.size(output) for entry in applying(table, Stage.SHARE, output))
    base *= comparison.unit(name)
    for entry in applying(table, Stage.ERROR, output):
        base += entry.size(output)
    of_reference = 0.0
    for reference in applying(table, Stage.REFERENCE, output):
        worst = 0.0
        for k in range(SAMPLES):
            yield base + reference.size(output) * worst
            error = difference(comparison.sample(k)[name][compared], output.truth[compared])
            worst = max(worst, error)
        of_reference = reference.size(output) * worst
    for entry in applying(table, Stage.FACTOR, output):
        base *= entry.size(output)
    limit = base + of_reference
    for entry in applying(table, Stage.LATE, output):
        limit += entry.size(output)
    yield limit


def _excess(output: Output, table: Sequence[Allowance]) -> str:
    """Judge an output by its largest error."""
    compared, limit = compared_entries(output, table), 0.0
    error = difference(output.value[compared], output.truth[compared])
    for limit in allowed_errors(output, table):
        if error <= limit:
            return ""
    each = torch.where(compared.reshape(-1), differences(output.value, output.truth), 0.0)
    worst, same_dtype = each.argmax(), output.comparison.sample(0)[output.name]
    value, truth, reference = (
        x.reshape(-1)[worst].item() for x in (output.value, output.truth, same_dtype)
    )
    return (
        f"{value!r} where the truth is {truth!r} and the same-dtype reference {reference!r}; "
        f"error {error:.3g} > {limit:.3g}"
    )


def ending_verdict(ending: Ending, table: Sequence[Allowance] = ALLOWANCES) -> str:
    """Judge a problem that ends unlike the truth; returns an error message or an empty string."""
    ends = zip(ending.statuses, ending.counts, strict=True)
    message = " and the truth ".join(f"{status.name} after {count}" for status, count in ends)
    message = f"problem {ending.problem} is {message}"
    sizes = [entry.size(ending) for entry in applying(table, Stage.ENDING, ending)]
    if math.inf in sizes:
        return ""
    if not sizes:
        return message
    residual = ending.residual()
    if abs(residual - ending.tol) <= max(sizes):
        return ""
    return f"{message}, and after {min(ending.counts)} the residual is {residual}, not {ending.tol}"


def residual_verdict(
    ending: Ending, marginal_error: float, table: Sequence[Allowance] = ALLOWANCES
) -> str:
    """Judge a problem that Anderson acceleration reports as converged; as ``ending_verdict``."""
    limits = [entry.size(ending) for entry in applying(table, Stage.ACCELERATED, ending)]
    if not limits:
        return f"problem {ending.problem} is CONVERGED; expected none without tol"
    if marginal_error <= max(limits):
        return ""
    message = f"problem {ending.problem} is CONVERGED with marginal_error {marginal_error}"
    return f"{message}; expected at most {max(limits)}"


def threads_verdict(
    name: str, value: Tensor, other: Tensor, table: Sequence[Allowance] = ALLOWANCES
) -> str:
    """Judge an output of two runs with different numbers of threads; as ``ending_verdict``."""
    limits = [entry.size(name) for entry in applying(table, Stage.THREADS, name)]
    if difference(value, other) <= max(limits, default=0.0):
        return ""
    return f"{name} depends on the number of threads"
