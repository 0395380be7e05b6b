"""Updates of the potentials after a reduction, stopping criterion, and outputs of streamed runs.

``side`` is a tuple of pointers to the log-masses, potentials, reduction results, cost sums and
base potentials of the rows or columns of one problem.
"""

import triton
import triton.language as tl
from optical.kernels.tiles import (
    EMPTY,
    INFINITY,
    LOG2_E,
    MASS_TOLERANCE,
    NO_PAIR,
    final_status,
    kl_penalty,
    load_log_mass,
    overflows,
    target_marginal,
)


@triton.jit
def marginal_error(side, n, ratio, strength, BLOCK: tl.constexpr):
    """Return the L1 error of the marginal implied by the soft-mins of one side."""
    log_mass_ptr = side[0]
    F_ptr = side[1]
    softmin_ptr = side[2]
    error = tl.zeros((BLOCK,), tl.float32)
    for block_start in range(0, n, BLOCK):
        index = block_start + tl.arange(0, BLOCK)
        A = load_log_mass(log_mass_ptr, index, n)
        F = tl.load(F_ptr + index, mask=index < n, other=0.0)
        softmin = tl.load(softmin_ptr + index, mask=index < n, other=NO_PAIR)
        has_pair = softmin < NO_PAIR
        sums = tl.where(has_pair, tl.exp2(A + (F - softmin) * ratio), 0.0)
        error += tl.abs(sums - target_marginal(A, has_pair, F, strength))
    return tl.sum(error, 0)


@triton.jit
def update_potential(side, n, relaxation, beta, state, FAST: tl.constexpr, BLOCK: tl.constexpr):
    """Move the potentials of one side towards their soft-mins; 0 without an allowed pair.

    With FAST, return the largest move: from the previous iterate in an exact iteration, otherwise
    (``state`` > 0) from the base potentials of the stored plan. Exact iterations record their
    iterate as the base.
    """
    F_ptr = side[1]
    softmin_ptr = side[2]
    change = tl.zeros((BLOCK,), tl.float32)
    for block_start in range(0, n, BLOCK):
        index = block_start + tl.arange(0, BLOCK)
        origin = tl.load(F_ptr + index, mask=index < n, other=0.0)
        softmin = tl.load(softmin_ptr + index, mask=index < n, other=NO_PAIR)
        F = tl.where(softmin == NO_PAIR, 0.0, (1 - relaxation) * origin + beta * softmin)
        tl.store(F_ptr + index, F, mask=index < n)
        if FAST:
            base = tl.load(side[4] + index, mask=index < n, other=NO_PAIR)
            origin = tl.where(state > 0, base, origin)
            change = tl.maximum(change, tl.where(softmin == NO_PAIR, 0.0, tl.abs(F - origin)))
            base = tl.where(softmin == NO_PAIR, NO_PAIR, F)
            tl.store(side[4] + index, base, mask=(index < n) & (state <= 0))
    return tl.max(change, 0)


@triton.jit
def init_potential(F_ptr, start_ptr, n, scale, START: tl.constexpr, BLOCK: tl.constexpr):
    """Store the initial potentials of one side, 0 without START."""
    for block_start in range(0, n, BLOCK):
        index = block_start + tl.arange(0, BLOCK)
        F = tl.zeros((BLOCK,), tl.float32)
        if START:
            F = tl.load(start_ptr + index, mask=index < n, other=0.0) * scale
            # Initial potentials of padding may be NaN, which would spread to the scores.
            F = tl.where(tl.abs(F) < INFINITY, F, 0.0)
        tl.store(F_ptr + index, F, mask=index < n)


@triton.jit
def check_inputs(start_ptr, log_mass_ptr, n, START: tl.constexpr, BLOCK: tl.constexpr):
    """Return whether an input is not finite, whether an entry is valid, and the mass."""
    any_valid = tl.zeros((BLOCK,), tl.float32)
    not_finite = tl.zeros((BLOCK,), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for block_start in range(0, n, BLOCK):
        index = block_start + tl.arange(0, BLOCK)
        A = load_log_mass(log_mass_ptr, index, n)
        if START:
            F = tl.load(start_ptr + index, mask=(index < n) & (A != -INFINITY), other=0.0)
            not_finite = tl.maximum(not_finite, tl.where(tl.abs(F) < INFINITY, 0.0, 1.0))
        not_finite = tl.maximum(not_finite, tl.where(A < INFINITY, 0.0, 1.0))
        any_valid = tl.maximum(any_valid, tl.where(A != -INFINITY, 1.0, 0.0))
        mass += tl.exp2(A)
    return tl.max(not_finite, 0) > 0, tl.max(any_valid, 0) > 0, tl.sum(mass, 0)


@triton.jit
def side_objective(side, n, scale, inverse_rho, strength, BLOCK: tl.constexpr):
    """Return the contribution of one side to the outputs, from the marginal of its plan.

    In order: dual value, penalty, L1 error of the marginal, total mass, transport cost, whether a
    valid row or column has no allowed pair, whether a cost is not finite, and whether a potential
    in the units of the cost is not.
    """
    log_mass_ptr = side[0]
    F_ptr = side[1]
    marginal_ptr = side[2]
    cost_sum_ptr = side[3]
    dual = tl.zeros((BLOCK,), tl.float32)
    penalty = tl.zeros((BLOCK,), tl.float32)
    error = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    transported = tl.zeros((BLOCK,), tl.float32)
    isolated = tl.zeros((BLOCK,), tl.float32)
    not_finite = tl.zeros((BLOCK,), tl.float32)
    diverged = tl.zeros((BLOCK,), tl.float32)
    for block_start in range(0, n, BLOCK):
        index = block_start + tl.arange(0, BLOCK)
        A = load_log_mass(log_mass_ptr, index, n)
        marginal = tl.load(marginal_ptr + index, mask=index < n, other=NO_PAIR)
        # A sum that overflows float32 to +inf still counts as a sum.
        has_pair = marginal != NO_PAIR
        F = tl.load(F_ptr + index, mask=index < n, other=0.0)
        F = tl.where(marginal == NO_PAIR, 0.0, F)
        tl.store(F_ptr + index, F, mask=index < n)
        a = tl.exp2(A)
        sums = tl.where(has_pair, marginal, 0.0)
        dual += sums * F
        total += sums
        error += tl.abs(sums - target_marginal(A, has_pair, F, strength))
        transported += tl.load(cost_sum_ptr + index, mask=index < n, other=0.0)
        isolated = tl.maximum(
            isolated, tl.where((A != -INFINITY) & (marginal == NO_PAIR), 1.0, 0.0)
        )
        not_finite = tl.maximum(not_finite, tl.where(marginal == marginal, 0.0, 1.0))
        diverged = tl.maximum(diverged, tl.where(tl.abs(F / scale) < INFINITY, 0.0, 1.0))
        if inverse_rho > 0:
            penalty += kl_penalty(sums, A, a) / inverse_rho
    return (
        tl.sum(dual, 0),
        tl.sum(penalty, 0),
        tl.sum(error, 0),
        tl.sum(total, 0),
        tl.sum(transported, 0),
        tl.max(isolated, 0) > 0,
        tl.max(not_finite, 0) > 0,
        tl.max(diverged, 0) > 0,
    )


@triton.jit
def write_outputs(
    problem,
    epsilon,
    valid_epsilon,
    starts,
    rows,
    columns,
    outputs,
    n,
    m,
    iteration,
    tol,
    max_iter,
    inverse_rho_a,
    inverse_rho_b,
    START: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the outputs of one problem after the sums of both sides have been reduced.

    ``rows`` and ``columns`` are sides with marginals and cost sums. The status follows from the
    marginal error of the returned potentials, whatever ended the run.
    """
    value_ptr, value_linear_ptr, marginal_error_ptr, n_iter_ptr, status_ptr, residual_ptr = outputs
    strength_a = epsilon * inverse_rho_a
    strength_b = epsilon * inverse_rho_b
    scale = LOG2_E / epsilon
    not_finite_a, any_valid_a, mass_a = check_inputs(starts[0], rows[0], n, START, BLOCK)
    not_finite_b, any_valid_b, mass_b = check_inputs(starts[1], columns[0], m, START, BLOCK)
    empty = (any_valid_a == 0) | (any_valid_b == 0)
    dual, penalty, error, total, transported, isolated_a, not_finite, diverged_a = side_objective(
        rows, n, scale, inverse_rho_a, strength_a, BLOCK
    )
    value = dual / scale + penalty + epsilon * (mass_a * mass_b - total)
    dual, penalty, error_b, total, _, isolated_b, _, diverged_b = side_objective(
        columns, m, scale, inverse_rho_b, strength_b, BLOCK
    )
    value += dual / scale + penalty
    error += error_b
    fixed_a = inverse_rho_a == 0
    fixed_b = inverse_rho_b == 0
    unbalanced = tl.abs(mass_a - mass_b) > tl.maximum(mass_a, mass_b) * MASS_TOLERANCE
    infeasible = (fixed_a & isolated_a) | (fixed_b & isolated_b) | (fixed_a & fixed_b & unbalanced)
    invalid = (valid_epsilon == 0) | not_finite | not_finite_a | not_finite_b
    invalid = invalid & (empty == 0)
    diverged = diverged_a | diverged_b | overflows(value, transported, error)
    status = final_status(error, tol, invalid | infeasible | diverged)
    status = tl.where(empty, EMPTY, status)
    iteration = tl.where(empty, 0, tl.where(invalid, max_iter, iteration))
    tl.store(value_ptr + problem, tl.where(empty, 0.0, tl.where(invalid, float("nan"), value)))
    transported = tl.where(empty, 0.0, tl.where(invalid, float("nan"), transported))
    tl.store(value_linear_ptr + problem, transported)
    tl.store(
        marginal_error_ptr + problem, tl.where(empty, 0.0, tl.where(invalid, float("nan"), error))
    )
    tl.store(n_iter_ptr + problem, iteration)
    tl.store(status_ptr + problem, status)
    tl.store(residual_ptr + problem, 0.0)
    rescale_potential(rows[1], rows[0], n, scale, empty, invalid, BLOCK)
    rescale_potential(columns[1], columns[0], m, scale, empty, invalid, BLOCK)


@triton.jit
def rescale_potential(F_ptr, log_mass_ptr, n, scale, empty, invalid, BLOCK: tl.constexpr):
    """Convert the potentials of one side to the units of the cost."""
    tl.debug_barrier()
    for block_start in range(0, n, BLOCK):
        index = block_start + tl.arange(0, BLOCK)
        A = load_log_mass(log_mass_ptr, index, n)
        F = tl.load(F_ptr + index, mask=index < n, other=0.0) / scale
        F = tl.where(invalid, float("nan"), F)
        F = tl.where((A == -INFINITY) | empty, 0.0, F)
        tl.store(F_ptr + index, F, mask=index < n)
