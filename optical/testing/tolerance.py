"""The one tolerance rule, shared by the tests and the benchmarks, and all that it is applied to.

The rule: an implementation may be as wrong as plain PyTorch in the same dtype, plus a little:

    max |out - truth| <= max |same-dtype reference - truth| + TOLERANCE[dtype] * scale

where truth is the float64 reference run for the same number of iterations. Problems with
``precision="fast"`` are allowed ``FAST`` on top, in units of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from optical.backends.problem import GRADIENTS
from optical.ot import operator
from optical.testing.cases import (
    CONVERGED,
    Case,
)

# A change of this table is a decision about the project, never a way to make one test pass.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# What precision="fast" adds for these problems: a plan rounded by a share of 2**-11 is the plan of
# costs that are off by epsilon * 2**-11. Shares of, in this order: epsilon times the mass; the
# largest cost times the mass; the mass; epsilon, twice; the largest entry of each gradient. Where a
# run stops by ``tol``, the iteration at which it does is not compared.
FAST = {"value": 2**-10, "value_linear": 5e-4, "marginal_error": 5e-4, "f": 5e-3, "g": 5e-3}
FAST |= dict.fromkeys(("grad_x", "grad_y", "grad_log_a", "grad_log_b"), 5e-3)
FIELDS = ("value", "value_linear", "f", "g", "marginal_error", "n_iter", "status")


def assert_close_to_truth(
    out: Tensor,
    truth: Tensor,
    same_dtype: Tensor,
    *,
    dtype: torch.dtype,
    scale: float,
    name: str,
    more: float = 0.0,
) -> None:
    """Apply the tolerance rule of this module; on failure, show the worst entry.

    Args:
        out: what the implementation returned.
        truth: the float64 reference.
        same_dtype: the reference in ``dtype``.
        dtype: which tolerance applies.
        scale: the size of the quantity, multiplied by the tolerance.
        name: the problem and the quantity, for the message.
        more: what is allowed besides, for ``precision="fast"``.
    """
    out, same_dtype = out.to(truth), same_dtype.to(truth)
    if out.shape != truth.shape:
        raise AssertionError(f"{name}: shape {tuple(out.shape)}; expected {tuple(truth.shape)}")
    if not truth.numel():
        return
    error = (out - truth).abs().nan_to_num(nan=math.inf)
    allowed = (same_dtype - truth).abs().max().item() + TOLERANCE[dtype] * scale + more
    worst = int(error.argmax())
    if not error.view(-1)[worst].item() <= allowed:
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
        values = [x.reshape(-1)[worst].item() for x in (out, truth, same_dtype)]
        raise AssertionError(
            f"{name}: worst at {index}: {values[0]!r}, truth {values[1]!r}, reference in "
            f"{dtype} {values[2]!r}; error {error.view(-1)[worst].item():.3g} > {allowed:.3g}"
        )


def assert_backend_correct(
    backend: str,
    problem: Case,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    gradients: Sequence[str] = GRADIENTS,
    vectors: torch.dtype | None = None,
) -> None:
    """Run ``problem`` forward and backward and apply the tolerance rule to every output.

    Args:
        backend: the implementation.
        problem: what it solves.
        dtype: what it computes in.
        device: where.
        gradients: the modes to run; "unroll" is left out under Anderson, which has none.
        vectors: the dtype of token vectors, if another.
    """
    given = problem.to(dtype, device, vectors)
    exact = given.to(torch.float64, "cpu")
    skipped = {"residual"}
    if problem.converged:
        # Masses rounded to float32 sum to different totals, and no truth gets below that.
        exact = replace(exact, tol=min(1e-6, CONVERGED[dtype]))
        given = replace(given, tol=CONVERGED[dtype])
        skipped.add("n_iter")
        if problem.rho_a == problem.rho_b == math.inf:
            # Then (f + t, g - t) is a solution for every t, and each way ends at its own.
            skipped |= {"f", "g", "grad_log_a", "grad_log_b"}
    fast = problem.precision == "fast"
    if fast and given.tol > 0:
        skipped |= {"n_iter", "status"}
    mass = max(1.0, *(_mass(log_mass) for log_mass in (exact.log_a, exact.log_b)))
    for gradient in gradients:
        if gradient == "unroll" and problem.anderson:
            continue
        truth = solve("reference", exact, gradient)
        is_truth = dtype == torch.float64 and given.x.device.type == "cpu" and vectors is None
        same_dtype = truth if is_truth else solve("reference", given, gradient)
        out = solve(backend, given, gradient)
        label = f"{backend} {problem.name} {gradient}"
        ignored = skipped
        if problem.singular and gradient == "implicit":
            ignored = skipped | {"grad_x", "grad_y", "grad_log_a", "grad_log_b"}
            if not (out["residual"] <= 1e-2).all():
                raise AssertionError(f"{label} residual: {out['residual']}; expected <= 0.01")
        for field in {"status", "n_iter"} - skipped:
            if not torch.equal(out[field].cpu(), truth[field]):
                raise AssertionError(f"{label} {field}: {out[field]}; expected {truth[field]}")
        for field, expected in truth.items():
            if field in ignored:
                continue
            scale = mass if field in ("marginal_error", "grad_x") else exact.scale
            if field.startswith("grad") and expected.numel():
                scale = max(scale, expected.abs().max().item())
            assert_close_to_truth(
                out[field].cpu(),
                expected,
                same_dtype[field].cpu(),
                dtype=dtype,
                scale=scale,
                name=f"{label} {field}",
                more=FAST.get(field, 0.0) * _fast_unit(field, exact, mass, expected)
                if fast
                else 0.0,
            )
        _assert_absent_gradients_are_zero(given, out, label)


def _fast_unit(field: str, problem: Case, mass: float, expected: Tensor) -> float:
    """What an entry of ``FAST`` is a share of."""
    if field.startswith("grad"):
        return expected.abs().max().item() if expected.numel() else 0.0
    epsilon = problem.epsilon.max().item() if problem.epsilon.numel() else 0.0
    units = {"value": epsilon * mass, "value_linear": problem.scale * mass, "marginal_error": mass}
    return units.get(field, epsilon)


def _mass(log_mass: Tensor) -> float:
    total = log_mass.exp().sum(-1)
    return total.max().item() if total.numel() else 1.0


def _assert_absent_gradients_are_zero(problem: Case, out: dict[str, Tensor], label: str) -> None:
    rows, columns = problem.log_a == -math.inf, problem.log_b == -math.inf
    absent = {"grad_log_a": rows, "grad_log_b": columns, "grad_x": rows, "grad_y": columns}
    if problem.y is None:
        absent["grad_x"] = rows[:, :, None] | columns[:, None, :]
    for field, where in absent.items():
        if field in out and out[field][where].any():
            raise AssertionError(f"{label}: {field} of absent entries is not exactly 0")


def solve(backend: str, problem: Case, gradient: str = "envelope") -> dict[str, Tensor]:
    """All outputs and gradients of the registered operator, under fixed upstream gradients."""
    arguments = problem.arguments(gradient, backend)
    names = [name for name in ("x", "y", "log_a", "log_b") if getattr(arguments, name) is not None]
    inputs = {name: getattr(arguments, name).detach().requires_grad_() for name in names}
    outputs = operator.sinkhorn(arguments._replace(**inputs))
    upstream = torch.linspace(0, 1, len(outputs.value)).to(outputs.value)
    differentiated = {"value": upstream, "value_linear": 1 - 3 * upstream}
    if gradient == "unroll":
        for name in ("f", "g"):
            potential = getattr(outputs, name)
            wave = torch.arange(potential.numel(), device=potential.device).to(potential).sin()
            differentiated[name] = wave.view_as(potential)
    gradients = torch.autograd.grad(
        [getattr(outputs, name) for name in differentiated],
        list(inputs.values()),
        list(differentiated.values()),
    )
    results = {name: getattr(outputs, name).detach() for name in (*FIELDS, "residual")}
    return results | {f"grad_{name}": grad for name, grad in zip(names, gradients, strict=True)}
