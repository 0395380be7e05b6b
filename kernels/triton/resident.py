"""Batched Sinkhorn, one program per problem, the whole plan in registers.

    plan_ij = exp((f_i + g_j - C_ij) / epsilon + log a_i + log b_j)

Inside, logarithms are binary and potentials are in units of epsilon / log2(e): F, G, S = C in those
units, A = log2 a, B = log2 b, so that one exp2 replaces an exp and a division.

An *exact* iteration is the pair of log-sum-exps of the definition; it spends one exp2 per entry and
half-step. It leaves K = exp2(F + G - S + A + B), and a *scaling* iteration then gets the same
iterates from multiplications alone (Schmitzer, arXiv 1610.06519, section 3):

    u_i = a_i / sum_j K_ij v_j,    v_j = b_j / sum_i u_i K_ij,    F + log2 u, G + log2 v

K is rebuilt by an exact iteration when a scaling has drifted past 2^+-30, and while the temperature
falls. After an exact iteration of fixed marginals no exponent exceeds A or B, so nothing overflows;
should a sum leave 2^+-100 all the same, the scaling iteration is discarded and done again exactly.

Registers: K (n x m) and a few vectors. Device memory: vectors or cost are read once, and once more
for each rebuilding of K.
"""

import triton
import triton.language as tl

from optical.kernels.tiles import GIVEN, INFINITY, LOG2_E, NAN
from optical.kernels.tiles import cost_tile, extent, load_log_mass, quotient

DRIFT = tl.constexpr(2.0**30)
WEAK = tl.constexpr(2.0**-100)
STRONG = tl.constexpr(2.0**100)
# Masses that differ by more than this share of the larger have no plan with both marginals fixed.
MASS_TOLERANCE = tl.constexpr(1e-3)
# The values of optical.arguments.Status.
CONVERGED = tl.constexpr(0)
MAX_ITER = tl.constexpr(1)
EMPTY = tl.constexpr(2)
INFEASIBLE = tl.constexpr(3)


@triton.jit
def half_step(score, axis: tl.constexpr):
    """-log2 sum exp2 of the scores along the axis, and 0 where every one of them is -inf."""
    peak = tl.max(score, axis)
    alive = peak > -INFINITY
    peak = tl.where(alive, peak, 0.0)
    total = tl.sum(tl.exp2(score - tl.expand_dims(peak, axis)), axis)
    return tl.where(alive, -(peak + tl.log2(tl.where(alive, total, 1.0))), 0.0)


@triton.jit
def load_start(start_ptr, index, log_mass, size):
    """The potentials to start from and whether one at a present line is not finite."""
    inside = (index < size) & (log_mass != -INFINITY)
    start = tl.load(start_ptr + index, mask=inside, other=0.0)
    return start, tl.max((tl.abs(start) < INFINITY).to(tl.int32) ^ 1, 0) > 0


@triton.jit
def penalty(sums, log_mass, mass, inverse_rho):
    """What the sums of one side of a plan cost, for inverse_rho > 0."""
    some = (sums > 0) & (mass > 0)
    ratio = tl.log2(tl.where(sums > 0, sums, 1.0)) - tl.where(sums > 0, log_mass, 0.0)
    apart = sums * ratio / LOG2_E - sums + mass
    # Sums that nearly are the masses cancel; there the series of (1 + x) log(1 + x) - x is taken.
    x = tl.where(some, sums / tl.where(some, mass, 1.0) - 1, 1.0)
    series = 0.5 + x * (-1 / 6 + x * (1 / 12 + x * (-1 / 20 + x * (1 / 30 - x / 42))))
    near = mass * x * x * series
    return tl.sum(tl.where(tl.abs(x) < 0.125, near, apart), 0) / inverse_rho


@triton.jit
def wanted(mass, alive, F, strength):
    """The sums of an optimal plan; strength is epsilon / rho, 0 for a fixed marginal."""
    return tl.where(strength > 0, tl.where(alive, mass * tl.exp2(-F * strength), 0.0), mass)


@triton.jit
def drifted(scaling):
    return (tl.max(scaling, 0) > DRIFT) | (tl.min(scaling, 0) < 1 / DRIFT)


@triton.jit(do_not_specialize=["n", "m", "dim", "stride_n", "stride_m", "max_iter", "least", "most"])
def resident_kernel(
    x_ptr,
    y_ptr,
    norm_x_ptr,
    norm_y_ptr,
    scale_x_ptr,
    scale_y_ptr,
    centre_ptr,
    cu_a_ptr,
    cu_b_ptr,
    log_a_ptr,
    log_b_ptr,
    epsilon_ptr,
    f0_ptr,
    g0_ptr,
    value_ptr,
    value_linear_ptr,
    f_ptr,
    g_ptr,
    marginal_error_ptr,
    n_iter_ptr,
    status_ptr,
    stride_batch,
    stride_n,
    stride_m,
    n,
    m,
    dim,
    max_iter,
    tol,
    inverse_rho_a,
    inverse_rho_b,
    omega,
    anneal_start,
    anneal_ratio,
    least,
    most,
    KIND: tl.constexpr,
    PACKED: tl.constexpr,
    START: tl.constexpr,
    GENERAL: tl.constexpr,
    ANNEAL: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    NVIDIA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_M: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    zero_a, n = extent(cu_a_ptr, problem, n, PACKED)
    zero_b, m = extent(cu_b_ptr, problem, m, PACKED)
    if PACKED:
        # The same grid is launched for each size of tile; a problem belongs to one of them.
        longest = tl.maximum(n, m)
        if (longest < least) | (longest > most):
            return
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_M)
    log_a_ptr += zero_a
    log_b_ptr += zero_b
    if KIND == GIVEN:
        x_ptr += problem * stride_batch
    else:
        x_ptr += zero_a * dim
        y_ptr += zero_b * dim
        norm_x_ptr += zero_a
        norm_y_ptr += zero_b
        scale_x_ptr += zero_a
        scale_y_ptr += zero_b
        centre_ptr += problem * dim
    epsilon = tl.load(epsilon_ptr + problem)
    readable = (epsilon > 0) & (epsilon < INFINITY)
    epsilon = tl.where(readable, epsilon, 1.0)
    scale = LOG2_E / epsilon
    strength_a = epsilon * inverse_rho_a
    strength_b = epsilon * inverse_rho_b

    # Vectors cost as many registers per thread as the tile has rows there, so only these live on.
    A = load_log_mass(log_a_ptr, rows, n)
    B = load_log_mass(log_b_ptr, columns, m)
    empty = (tl.max((A != -INFINITY).to(tl.int32), 0) == 0) | (
        tl.max((B != -INFINITY).to(tl.int32), 0) == 0
    )
    unreadable = tl.max((A < INFINITY).to(tl.int32) ^ 1, 0) > 0
    unreadable = unreadable | (tl.max((B < INFINITY).to(tl.int32) ^ 1, 0) > 0)
    broken = (readable == 0) | unreadable
    F = tl.zeros((BLOCK_N,), tl.float32)
    G = tl.zeros((BLOCK_M,), tl.float32)
    if START:
        F, unreadable = load_start(f0_ptr + zero_a, rows, A, n)
        broken = broken | unreadable
        G, unreadable = load_start(g0_ptr + zero_b, columns, B, m)
        broken = broken | unreadable
        F = F * scale
        G = G * scale
    a = tl.exp2(A)
    b = tl.exp2(B)
    u = tl.zeros((BLOCK_N,), tl.float32) + 1.0
    v = tl.zeros((BLOCK_M,), tl.float32) + 1.0
    K = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    dead_a = False
    dead_b = False
    iteration = 0
    stop = False
    exact = True
    running = True
    temperature = epsilon
    if ANNEAL:
        temperature = tl.maximum(epsilon, anneal_start)
    annealing = anneal_start
    settled = False
    while running:
        relaxation = tl.where((iteration == 0) | (temperature != epsilon), 1.0, omega)
        beta_a = relaxation / (1 + temperature * inverse_rho_a)
        beta_b = relaxation / (1 + temperature * inverse_rho_b)
        if exact:
            # Addresses that seem to depend on the loop stay out of the registers between rebuilds.
            zero = tl.multiple_of(tl.minimum(iteration, 0), 16)
            A = load_log_mass(log_a_ptr, rows + zero, n)
            B = load_log_mass(log_b_ptr, columns + zero, m)
            S = cost_tile(
                x_ptr,
                y_ptr,
                norm_x_ptr,
                norm_y_ptr,
                scale_x_ptr,
                scale_y_ptr,
                centre_ptr,
                stride_n,
                stride_m,
                zero,
                zero,
                n,
                m,
                dim,
                KIND,
                SCALED,
                PRECISION,
                BLOCK_N,
                BLOCK_M,
                BLOCK_D,
                PART,
                WARPS_N,
                WARPS_M,
            )
            S = tl.where((A != -INFINITY)[:, None] & (B != -INFINITY)[None, :], S, INFINITY) * scale
            # NaN compares with nothing, and -inf is no cost either.
            lowest = tl.min(tl.where(S > -INFINITY, 1, 0), 1)
            broken = broken | (tl.min(lowest, 0) == 0)
            row_alive = tl.min(S, 1) < INFINITY
            column_alive = tl.min(S, 0) < INFINITY
            dead_a = tl.max(tl.where(row_alive, 0, tl.where(A != -INFINITY, 1, 0)), 0) > 0
            dead_b = tl.max(tl.where(column_alive, 0, tl.where(B != -INFINITY, 1, 0)), 0) > 0
            F = tl.where(row_alive, F + tl.log2(u), 0.0)
            G = tl.where(column_alive, G + tl.log2(v), 0.0)
            if ANNEAL:
                ratio = epsilon / temperature
                F_next = half_step(B[None, :] + (G[None, :] - S) * ratio, 1) / ratio
            else:
                ratio = 1.0
                F_next = half_step((B + G)[None, :] - S, 1)
            row_sum = tl.where(row_alive, a * tl.exp2((F - F_next) * ratio), 0.0)
            error = tl.sum(tl.abs(row_sum - wanted(a, row_alive, F, strength_a)), 0)
            stop = settled & (tol > 0) & (error <= tol)
            halt = stop | empty | broken | (iteration >= max_iter)
            F = tl.where(halt, F, (1 - relaxation) * F + beta_a * F_next)
            if ANNEAL:
                G_next = half_step(A[:, None] + (F[:, None] - S) * ratio, 0) / ratio
            else:
                G_next = half_step((A + F)[:, None] - S, 0)
            G = tl.where(halt, G, (1 - relaxation) * G + beta_b * G_next)
            K = tl.exp2((A + F)[:, None] + (B + G)[None, :] - S)
            u = tl.full((BLOCK_N,), 1.0, tl.float32)
            v = tl.full((BLOCK_M,), 1.0, tl.float32)
            # A line that may carry mass, but whose K is lost below float32, needs exact steps.
            row_sum = tl.where(row_alive, tl.sum(K, 1), 1.0)
            column_sum = tl.where(column_alive, tl.sum(K, 0), 1.0)
            exact = (tl.min(row_sum, 0) < WEAK) | (tl.min(column_sum, 0) < WEAK)
            if GENERAL:
                exact = exact | (tl.max(row_sum, 0) > STRONG) | (tl.max(column_sum, 0) > STRONG)
        else:
            # Here only a dead line sums to 0; its scaling stays 1.
            Kv = tl.sum(K * v[None, :], 1)
            Kv = tl.where(Kv == 0, INFINITY, Kv)
            weak = tl.min(Kv, 0) < WEAK
            if (tol > 0) & settled:
                # The f half-step measures the row sums u * Kv of the iterate it starts from.
                row_sum = tl.where(Kv == INFINITY, 0.0, u * Kv)
                goal = a
                if GENERAL:
                    goal = wanted(a, Kv != INFINITY, F + tl.log2(u), strength_a)
                stop = (tl.sum(tl.abs(row_sum - goal), 0) <= tol) & (weak == 0)
            if GENERAL:
                Kv = tl.log2(Kv)
                weak = weak | (tl.max(tl.where(Kv < INFINITY, Kv, 0.0), 0) > 100)
                drift = (1 - relaxation) * (F + tl.log2(u)) + beta_a * (F + tl.log2(a) - Kv) - F
                u_next = tl.where(Kv < INFINITY, tl.exp2(drift), 1.0)
            else:
                u_next = tl.where(Kv == INFINITY, 1.0, quotient(a, Kv, NVIDIA))
            Ku = tl.sum(K * u_next[:, None], 0)
            Ku = tl.where(Ku == 0, INFINITY, Ku)
            weak = weak | (tl.min(Ku, 0) < WEAK)
            if GENERAL:
                Ku = tl.log2(Ku)
                weak = weak | (tl.max(tl.where(Ku < INFINITY, Ku, 0.0), 0) > 100)
                drift = (1 - relaxation) * (G + tl.log2(v)) + beta_b * (G + tl.log2(b) - Ku) - G
                v_next = tl.where(Ku < INFINITY, tl.exp2(drift), 1.0)
            else:
                v_next = tl.where(Ku == INFINITY, 1.0, quotient(b, Ku, NVIDIA))
            keep = stop | weak
            u = tl.where(keep, u, u_next)
            v = tl.where(keep, v, v_next)
            exact = weak | drifted(u) | drifted(v)
            iteration -= tl.where(weak, 1, 0)
        iteration += tl.where(stop, 0, 1)
        settled = temperature == epsilon
        if ANNEAL:
            annealing *= anneal_ratio
            temperature = tl.maximum(epsilon, annealing)
            exact = exact | (temperature != epsilon) | (settled == 0)
        running = (iteration < max_iter) & (stop == 0) & (empty == 0) & (broken == 0)

    plan = K * u[:, None] * v[None, :]
    row_sum = tl.sum(plan, 1)
    column_sum = tl.sum(plan, 0)
    # K holds the cost too, S = A + B + F + G - log2 K, so nothing is read from memory again.
    A = load_log_mass(log_a_ptr, rows, n)
    B = load_log_mass(log_b_ptr, columns, m)
    transported = -tl.sum(tl.sum(tl.where(K > 0, plan * tl.log2(K), 0.0), 1), 0)
    transported += tl.sum(tl.where(row_sum > 0, row_sum * (A + F), 0.0), 0)
    transported += tl.sum(tl.where(column_sum > 0, column_sum * (B + G), 0.0), 0)
    F += tl.log2(u)
    G += tl.log2(v)
    total = tl.sum(row_sum, 0)
    mass_a = tl.sum(a, 0)
    mass_b = tl.sum(b, 0)
    dual = tl.sum(row_sum * F, 0) + tl.sum(column_sum * G, 0)
    value = dual / scale + epsilon * (mass_a * mass_b - total)
    # A line without an allowed pair has an empty row of K, as has one whose pairs all underflow.
    goal_a = a
    goal_b = b
    if GENERAL:
        goal_a = wanted(a, (row_sum > 0) | (F != 0), F, strength_a)
        goal_b = wanted(b, (column_sum > 0) | (G != 0), G, strength_b)
        if inverse_rho_a > 0:
            value += penalty(row_sum, A, a, inverse_rho_a)
        if inverse_rho_b > 0:
            value += penalty(column_sum, B, b, inverse_rho_b)
    error = tl.sum(tl.abs(row_sum - goal_a), 0) + tl.sum(tl.abs(column_sum - goal_b), 0)
    fixed_a = inverse_rho_a == 0
    fixed_b = inverse_rho_b == 0
    unequal = tl.abs(mass_a - mass_b) > MASS_TOLERANCE * tl.maximum(mass_a, mass_b)
    infeasible = (fixed_a & dead_a) | (fixed_b & dead_b) | (fixed_a & fixed_b & unequal)
    broken = broken & (empty == 0)
    status = tl.where(stop, CONVERGED, MAX_ITER)
    status = tl.where(broken | infeasible, INFEASIBLE, status)
    status = tl.where(empty, EMPTY, status)
    iteration = tl.where(empty, 0, tl.where(broken, max_iter, tl.minimum(iteration, max_iter)))
    tl.store(value_ptr + problem, tl.where(empty, 0.0, tl.where(broken, NAN, value)))
    transported = tl.where(empty, 0.0, tl.where(broken, NAN, transported / scale))
    tl.store(value_linear_ptr + problem, transported)
    tl.store(marginal_error_ptr + problem, tl.where(empty, 0.0, tl.where(broken, NAN, error)))
    tl.store(n_iter_ptr + problem, iteration)
    tl.store(status_ptr + problem, status)
    F = tl.where(A == -INFINITY, 0.0, tl.where(empty, 0.0, tl.where(broken, NAN, F / scale)))
    G = tl.where(B == -INFINITY, 0.0, tl.where(empty, 0.0, tl.where(broken, NAN, G / scale)))
    tl.store(f_ptr + zero_a + rows, F, mask=rows < n)
    tl.store(g_ptr + zero_b + columns, G, mask=columns < m)
