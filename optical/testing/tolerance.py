"""The tolerance rule for backends, shared by tests and benchmarks.

A backend may be as inaccurate as plain PyTorch in the same dtype, plus a small tolerance:

    max |out - truth| <= max |same-dtype reference - truth| + TOLERANCE[dtype] * scale

where truth is the float64 reference run for the same number of iterations. Problems with
``precision="fast"`` are allowed ``FAST`` in addition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from optical.backends.problem import GRADIENTS
from optical.ot import autograd
from optical.testing.cases import CONVERGED, Case

# Do not change this table to make a single test pass.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# Additional tolerance for precision="fast". A plan rounded to a relative precision of 2**-11 is the
# plan of costs that are off by epsilon * 2**-11. The units are: value, epsilon times mass;
# value_linear, largest cost times mass; marginal_error, mass; f and g, epsilon; gradients, their
# largest entry. With ``tol``, the iteration at which a problem stops is not compared.
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
    """Apply the tolerance rule to one output; a failure reports its worst entry.

    Args:
        out: the output of the backend.
        truth: the float64 reference.
        same_dtype: the reference in ``dtype``.
        dtype: the key of ``TOLERANCE``.
        scale: magnitude of the quantity, multiplied by the tolerance.
        name: the case and the quantity, for the message.
        more: additional absolute tolerance, for ``precision="fast"``.

    Raises:
        AssertionError: the shape or a value is wrong.
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
    case: Case,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    gradients: Sequence[str] = GRADIENTS,
    vectors: torch.dtype | None = None,
) -> None:
    """Run a case forward and backward and apply the tolerance rule to every output.

    Args:
        backend: name of the backend.
        case: the problems.
        dtype: dtype of the computation.
        device: device of the computation.
        gradients: gradient modes to test; "unroll" is skipped under Anderson acceleration, which
            does not support it.
        vectors: dtype of the token vectors, if it differs.

    Raises:
        AssertionError: an output is wrong.
    """
    run = case.to(dtype, device, vectors)
    exact = run.to(torch.float64, "cpu")
    skipped = {"residual"}
    if case.converged:
        # Masses rounded to float32 have unequal totals, below which no error can get.
        exact = replace(exact, tol=min(1e-6, CONVERGED[dtype]))
        run = replace(run, tol=CONVERGED[dtype])
        skipped.add("n_iter")
        if case.rho_a == case.rho_b == math.inf:
            # (f + t, g - t) is a solution for every t, and each backend converges to a different t.
            skipped |= {"f", "g", "grad_log_a", "grad_log_b"}
    if case.precision == "fast" and run.tol > 0:
        skipped |= {"n_iter", "status"}
    for gradient in gradients:
        if gradient == "unroll" and case.anderson:
            continue
        truth = solve("reference", exact, gradient)
        is_truth = dtype == torch.float64 and run.x.device.type == "cpu" and vectors is None
        same_dtype = truth if is_truth else solve("reference", run, gradient)
        out = solve(backend, run, gradient)
        label = f"{backend} {case.name} {gradient}"
        ignored = skipped
        if case.singular and gradient == "implicit":
            ignored = skipped | {"grad_x", "grad_y", "grad_log_a", "grad_log_b"}
            if not (out["residual"] <= 1e-2).all():
                raise AssertionError(f"{label} residual: {out['residual']}; expected <= 0.01")
        for field in {"status", "n_iter"} - skipped:
            if not torch.equal(out[field].cpu(), truth[field]):
                raise AssertionError(f"{label} {field}: {out[field]}; expected {truth[field]}")
        for field, expected in truth.items():
            if field in ignored:
                continue
            scale, more = scale_and_allowance(field, exact, expected)
            assert_close_to_truth(
                out[field].cpu(),
                expected,
                same_dtype[field].cpu(),
                dtype=dtype,
                scale=scale,
                name=f"{label} {field}",
                more=more,
            )
        _assert_zero_gradients_of_padding(run, out, label)


def scale_and_allowance(field: str, case: Case, truth: Tensor) -> tuple[float, float]:
    """Magnitude of an output, and its additional tolerance for ``precision="fast"``."""
    mass = max(1.0, *(_largest_mass(log_mass) for log_mass in (case.log_a, case.log_b)))
    scale = mass if field in ("marginal_error", "grad_x") else case.scale
    largest = truth.abs().max().item() if truth.numel() else 0.0
    if field.startswith("grad"):
        scale = max(scale, largest)
    if case.precision != "fast":
        return scale, 0.0
    unit = epsilon = case.epsilon.max().item() if case.epsilon.numel() else 0.0
    if field.startswith("grad"):
        unit = largest
    elif field == "value":
        unit = epsilon * mass
    elif field == "value_linear":
        unit = case.scale * mass
    elif field == "marginal_error":
        unit = mass
    return scale, FAST.get(field, 0.0) * unit


def _largest_mass(log_mass: Tensor) -> float:
    total = log_mass.exp().sum(-1)
    return total.max().item() if total.numel() else 1.0


def _assert_zero_gradients_of_padding(case: Case, out: dict[str, Tensor], label: str) -> None:
    rows, columns = case.log_a == -math.inf, case.log_b == -math.inf
    padding = {"grad_log_a": rows, "grad_log_b": columns, "grad_x": rows, "grad_y": columns}
    if case.y is None:
        padding["grad_x"] = rows[:, :, None] | columns[:, None, :]
    for field, where in padding.items():
        if field in out and out[field][where].any():
            raise AssertionError(f"{label}: {field} of padding is not exactly 0")


def solve(backend: str, case: Case, gradient: str = "envelope") -> dict[str, Tensor]:
    """Return all outputs of the operator and its gradients for fixed upstream gradients.

    Keys are ``FIELDS``, "residual" and "grad_" followed by x, y, log_a or log_b.
    """
    problem = case.problem(gradient, backend)
    names = [name for name in ("x", "y", "log_a", "log_b") if getattr(problem, name) is not None]
    inputs = {name: getattr(problem, name).detach().requires_grad_() for name in names}
    solution = autograd.solve(problem._replace(**inputs))
    # Made on the device: a copy from the host would be refused while a CUDA graph is captured.
    like: dict[str, Any] = {"dtype": solution.value.dtype, "device": solution.value.device}
    ramp = torch.linspace(0, 1, len(solution.value), **like)
    upstream = {"value": ramp, "value_linear": 1 - 3 * ramp}
    if gradient == "unroll":
        for name in ("f", "g"):
            potential = getattr(solution, name)
            wave = torch.arange(potential.numel(), device=potential.device).to(potential).sin()
            upstream[name] = wave.view_as(potential)
    gradients = torch.autograd.grad(
        [getattr(solution, name) for name in upstream],
        list(inputs.values()),
        list(upstream.values()),
    )
    results = {name: getattr(solution, name).detach() for name in (*FIELDS, "residual")}
    return results | {f"grad_{name}": grad for name, grad in zip(names, gradients, strict=True)}
