"""The updates of potentials, and the outputs of a streamed run."""

import triton
import triton.language as tl
from optical.kernels.tiles import (
    CONVERGED,
    EMPTY,
    INFEASIBLE,
    INFINITY,
    LOG2_E,
    MASS_TOLERANCE,
    MAX_ITER,
    NO_PAIR,
    load_log_mass,
    penalties,
    wanted,
)


@triton.jit
def miss(own, n, ratio, strength, BLOCK: tl.constexpr):
    """How far the sums behind found minima are from those wanted, in L1."""
    log_mass_ptr = own[0]
    F_ptr = own[1]
    found_ptr = own[2]
    missed = tl.zeros((BLOCK,), tl.float32)
    for zero in range(0, n, BLOCK):
        index = zero + tl.arange(0, BLOCK)
        A = load_log_mass(log_mass_ptr, index, n)
        F = tl.load(F_ptr + index, mask=index < n, other=0.0)
        found = tl.load(found_ptr + index, mask=index < n, other=NO_PAIR)
        alive = found < NO_PAIR
        sums = tl.where(alive, tl.exp2(A + (F - found) * ratio), 0.0)
        missed += tl.abs(sums - wanted(A, alive, F, strength))
    return tl.sum(missed, 0)


@triton.jit
def relax(own, n, relaxation, beta, state, FAST: tl.constexpr, BLOCK: tl.constexpr):
    """Move the potentials of one side towards the minima found; those of dead lines are 0.

    With FAST, return how far they end from where an exact iteration found them, or in the states
    of ``kept`` above 0 from where K was written; and note where an exact one leaves them.
    """
    F_ptr = own[1]
    found_ptr = own[2]
    moved = tl.zeros((BLOCK,), tl.float32)
    for zero in range(0, n, BLOCK):
        index = zero + tl.arange(0, BLOCK)
        origin = tl.load(F_ptr + index, mask=index < n, other=0.0)
        found = tl.load(found_ptr + index, mask=index < n, other=NO_PAIR)
        F = tl.where(found == NO_PAIR, 0.0, (1 - relaxation) * origin + beta * found)
        tl.store(F_ptr + index, F, mask=index < n)
        if FAST:
            start = tl.load(own[4] + index, mask=index < n, other=NO_PAIR)
            origin = tl.where(state > 0, start, origin)
            moved = tl.maximum(moved, tl.where(found == NO_PAIR, 0.0, tl.abs(F - origin)))
            start = tl.where(found == NO_PAIR, NO_PAIR, F)
            tl.store(own[4] + index, start, mask=(index < n) & (state <= 0))
    return tl.max(moved, 0)


@triton.jit
def begin(F_ptr, start_ptr, n, scale, START: tl.constexpr, BLOCK: tl.constexpr):
    """Write where one side begins."""
    for zero in range(0, n, BLOCK):
        index = zero + tl.arange(0, BLOCK)
        F = tl.zeros((BLOCK,), tl.float32)
        if START:
            F = tl.load(start_ptr + index, mask=index < n, other=0.0) * scale
            # What stands at an absent line may be no number; it has no plan to be multiplied with.
            F = tl.where(tl.abs(F) < INFINITY, F, 0.0)
        tl.store(F_ptr + index, F, mask=index < n)


@triton.jit
def inspect(start_ptr, log_mass_ptr, n, START: tl.constexpr, BLOCK: tl.constexpr):
    """Whether the numbers of one side cannot be read, whether it has a line, and its mass."""
    some = tl.zeros((BLOCK,), tl.float32)
    unreadable = tl.zeros((BLOCK,), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for zero in range(0, n, BLOCK):
        index = zero + tl.arange(0, BLOCK)
        A = load_log_mass(log_mass_ptr, index, n)
        if START:
            F = tl.load(start_ptr + index, mask=(index < n) & (A != -INFINITY), other=0.0)
            unreadable = tl.maximum(unreadable, tl.where(tl.abs(F) < INFINITY, 0.0, 1.0))
        unreadable = tl.maximum(unreadable, tl.where(A < INFINITY, 0.0, 1.0))
        some = tl.maximum(some, tl.where(A != -INFINITY, 1.0, 0.0))
        mass += tl.exp2(A)
    return tl.max(unreadable, 0) > 0, tl.max(some, 0) > 0, tl.sum(mass, 0)


@triton.jit
def account(own, n, inverse_rho, strength, BLOCK: tl.constexpr):
    """What one side has: its part of the dual value, its penalty, its error, its sums, and costs.

    The last two say whether a fixed line is dead and whether a cost is no number.
    """
    log_mass_ptr = own[0]
    F_ptr = own[1]
    found_ptr = own[2]
    spent_ptr = own[3]
    dual = tl.zeros((BLOCK,), tl.float32)
    price = tl.zeros((BLOCK,), tl.float32)
    missed = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    paid = tl.zeros((BLOCK,), tl.float32)
    dead = tl.zeros((BLOCK,), tl.float32)
    unreadable = tl.zeros((BLOCK,), tl.float32)
    for zero in range(0, n, BLOCK):
        index = zero + tl.arange(0, BLOCK)
        A = load_log_mass(log_mass_ptr, index, n)
        found = tl.load(found_ptr + index, mask=index < n, other=NO_PAIR)
        # A sum beyond float32 is a sum.
        alive = found != NO_PAIR
        F = tl.load(F_ptr + index, mask=index < n, other=0.0)
        F = tl.where(found == NO_PAIR, 0.0, F)
        tl.store(F_ptr + index, F, mask=index < n)
        a = tl.exp2(A)
        sums = tl.where(alive, found, 0.0)
        dual += sums * F
        total += sums
        missed += tl.abs(sums - wanted(A, alive, F, strength))
        paid += tl.load(spent_ptr + index, mask=index < n, other=0.0)
        dead = tl.maximum(dead, tl.where((A != -INFINITY) & (found == NO_PAIR), 1.0, 0.0))
        unreadable = tl.maximum(unreadable, tl.where(found == found, 0.0, 1.0))
        if inverse_rho > 0:
            price += penalties(sums, A, a) / inverse_rho
    return (
        tl.sum(dual, 0),
        tl.sum(price, 0),
        tl.sum(missed, 0),
        tl.sum(total, 0),
        tl.sum(paid, 0),
        tl.max(dead, 0) > 0,
        tl.max(unreadable, 0) > 0,
    )


@triton.jit
def finish(
    problem,
    epsilon,
    readable,
    starts,
    rows,
    columns,
    outputs,
    n,
    m,
    iteration,
    stop,
    max_iter,
    inverse_rho_a,
    inverse_rho_b,
    START: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The outputs of one problem, after a walk for the sums of each side.

    ``rows`` and ``columns``: masses, potentials, and what the walks found and saw spent.
    """
    value_ptr, value_linear_ptr, marginal_error_ptr, n_iter_ptr, status_ptr = outputs
    strength_a = epsilon * inverse_rho_a
    strength_b = epsilon * inverse_rho_b
    scale = LOG2_E / epsilon
    unreadable_a, some_a, mass_a = inspect(starts[0], rows[0], n, START, BLOCK)
    unreadable_b, some_b, mass_b = inspect(starts[1], columns[0], m, START, BLOCK)
    empty = (some_a == 0) | (some_b == 0)
    dual, price, error, total, transported, dead_a, unreadable = account(
        rows, n, inverse_rho_a, strength_a, BLOCK
    )
    value = dual / scale + price + epsilon * (mass_a * mass_b - total)
    dual, price, error_b, total, _, dead_b, _ = account(
        columns, m, inverse_rho_b, strength_b, BLOCK
    )
    value += dual / scale + price
    error += error_b
    fixed_a = inverse_rho_a == 0
    fixed_b = inverse_rho_b == 0
    unequal = tl.abs(mass_a - mass_b) > tl.maximum(mass_a, mass_b) * MASS_TOLERANCE
    infeasible = (fixed_a & dead_a) | (fixed_b & dead_b) | (fixed_a & fixed_b & unequal)
    broken = (readable == 0) | unreadable | unreadable_a | unreadable_b
    broken = broken & (empty == 0)
    status = tl.where(stop, CONVERGED, MAX_ITER)
    status = tl.where(broken | infeasible, INFEASIBLE, status)
    status = tl.where(empty, EMPTY, status)
    iteration = tl.where(empty, 0, tl.where(broken, max_iter, iteration))
    tl.store(value_ptr + problem, tl.where(empty, 0.0, tl.where(broken, float("nan"), value)))
    transported = tl.where(empty, 0.0, tl.where(broken, float("nan"), transported))
    tl.store(value_linear_ptr + problem, transported)
    tl.store(
        marginal_error_ptr + problem, tl.where(empty, 0.0, tl.where(broken, float("nan"), error))
    )
    tl.store(n_iter_ptr + problem, iteration)
    tl.store(status_ptr + problem, status)
    end(rows[1], rows[0], n, scale, empty, broken, BLOCK)
    end(columns[1], columns[0], m, scale, empty, broken, BLOCK)


@triton.jit
def end(F_ptr, log_mass_ptr, n, scale, empty, broken, BLOCK: tl.constexpr):
    """Potentials in the units of the cost."""
    tl.debug_barrier()
    for zero in range(0, n, BLOCK):
        index = zero + tl.arange(0, BLOCK)
        A = load_log_mass(log_mass_ptr, index, n)
        F = tl.load(F_ptr + index, mask=index < n, other=0.0) / scale
        F = tl.where(broken, float("nan"), F)
        F = tl.where((A == -INFINITY) | empty, 0.0, F)
        tl.store(F_ptr + index, F, mask=index < n)
