"""Shared building blocks of the kernels: offsets, masses, cost tiles, plan tiles, numerics.

A tile of the cost is loaded from memory or computed from token vectors: tensor cores multiply the
raw half-precision vectors into float32 sums, and the norms of the tokens are applied afterwards in
registers. Entries outside the problem hold +inf, the cost of a forbidden pair; values of padding
are replaced before they enter an arithmetic operation.

Potentials F, G and scores are in units of epsilon / log2(e) and masses A, B are log2 masses, so
that one exp2 replaces an exp and a division.

Layouts: reductions of a tile cost shuffles, and their number depends on the lanes that hold its
entries. A warp does best as 4 x 8 lanes of 16 x 8 entries each (64 shuffles for both sums of
64 x 64). Dots of at most 32 rows come close to that. A stored cost is loaded in six dimensions:
the first two become the lanes, the next two the warps, the others the entries of a thread.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))
GIVEN = tl.constexpr(0)
COSINE = tl.constexpr(1)
SQEUCLIDEAN = tl.constexpr(2)
DOT = tl.constexpr(3)
# Relative difference of total masses above which two fixed marginals are infeasible.
MASS_TOLERANCE = tl.constexpr(1e-3)
# Values of the Status enumeration.
CONVERGED = tl.constexpr(0)
MAX_ITER = tl.constexpr(1)
EMPTY = tl.constexpr(2)
INFEASIBLE = tl.constexpr(3)
# Relative residual of the adjoint system below which only rounding errors remain.
ADJOINT_TOLERANCE = tl.constexpr(1e-14)
# Iterations without a halved residual after which conjugate gradients stop.
ADJOINT_PATIENCE = tl.constexpr(10)
# Sentinel potential of a row or column without an allowed pair.
NO_PAIR = tl.constexpr(3e38)


@triton.jit
def extent(cu_ptr, problem, size, PACKED: tl.constexpr):
    """Return the offset of a problem's rows or columns in the batch, and their number."""
    if PACKED:
        start = tl.load(cu_ptr + problem)
        length = (tl.load(cu_ptr + problem + 1) - start).to(tl.int32)
    else:
        start = problem * size
        length = size
    return start, length


@triton.jit
def load_epsilon(epsilon_ptr, problem):
    """Load the epsilon of a problem, or 1 where it is not positive and finite."""
    epsilon = tl.load(epsilon_ptr + problem)
    return tl.where((epsilon > 0) & (epsilon < INFINITY), epsilon, 1.0)


@triton.jit
def load_log_mass(log_mass_ptr, index, size):
    """Load log2 masses, -inf outside the problem."""
    return tl.load(log_mass_ptr + index, mask=index < size, other=-INFINITY) * LOG2_E


@triton.jit
def load_used_mass(log_mass_ptr, index, size, upstream, upstream_linear):
    """Load log2 masses for a gradient: -inf, as for padding, if both upstream gradients are 0.

    The gradients are then 0 even if the problem is malformed.
    """
    A = load_log_mass(log_mass_ptr, index, size)
    return tl.where((upstream != 0) | (upstream_linear != 0), A, -INFINITY)


@triton.jit
def load_vectors(tokens, centre_ptr, index, d, dim, SPEC: tl.constexpr):
    """Load a tile of token vectors as an operand of a dot, zero outside the problem.

    Operands are float32, except with the precision "half", for two sides of one half-precision
    dtype.
    """
    vectors_ptr, _, scale_ptr, _, size = tokens
    KIND: tl.constexpr = SPEC[0]
    SCALED: tl.constexpr = SPEC[1]
    WIDE: tl.constexpr = SPEC[2]
    PRECISION: tl.constexpr = SPEC[3]
    inside = (index < size)[:, None] & (d < dim)[None, :]
    if WIDE:
        index = index.to(tl.int64)
    offsets = index[:, None] * dim + d[None, :]
    x = tl.load(vectors_ptr + offsets, mask=inside, other=0.0)
    if PRECISION != "half":
        x = x.to(tl.float32)
    if KIND == SQEUCLIDEAN:
        x = x - tl.load(centre_ptr + d, mask=d < dim, other=0.0)[None, :]
    elif SCALED:
        x = x * tl.load(scale_ptr + index, mask=index < size, other=1.0)[:, None]
    return x


@triton.jit
def locate_cost(tokens, sizes, problem, offset_a, offset_b, KIND: tl.constexpr):
    """Return ``costs``, the pointers, strides and sizes from which a problem's cost is computed.

    Functions that compute costs take this tuple, SPEC = (KIND, SCALED, WIDE, PRECISION) and
    TILE = (BLOCK_N, BLOCK_M, BLOCK_D, PART, WARPS_N, WARPS_M).
    """
    x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr = tokens
    stride_batch, stride_n, stride_m, n, m, dim = sizes
    if KIND == GIVEN:
        x_ptr += problem * stride_batch
        y_ptr = x_ptr
    else:
        x_ptr += offset_a * dim
        y_ptr += offset_b * dim
        norm_x_ptr += offset_a
        norm_y_ptr += offset_b
        scale_x_ptr += offset_a
        scale_y_ptr += offset_b
        centre_ptr += problem * dim
    x = (x_ptr, norm_x_ptr, scale_x_ptr, stride_n, n)
    y = (y_ptr, norm_y_ptr, scale_y_ptr, stride_m, m)
    return x, y, centre_ptr, dim


@triton.jit
def swap_sides(costs):
    """Exchange the rows and columns of ``costs``."""
    x, y, centre_ptr, dim = costs
    return y, x, centre_ptr, dim


@triton.jit
def dot_products(costs, row_start, column_start, SPEC: tl.constexpr, TILE: tl.constexpr):
    """Compute x_i . y_j (BLOCK_N, BLOCK_M) by dots of PART rows each."""
    x_side, y_side, centre_ptr, dim = costs
    PRECISION: tl.constexpr = "ieee" if SPEC[3] == "half" else SPEC[3]
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_M: tl.constexpr = TILE[1]
    BLOCK_D: tl.constexpr = TILE[2]
    PART: tl.constexpr = TILE[3]
    PARTS: tl.constexpr = BLOCK_N // PART
    rows = row_start + tl.arange(0, PART)
    columns = column_start + tl.arange(0, BLOCK_M)
    sum0 = tl.zeros((PART, BLOCK_M), tl.float32)
    if PARTS >= 2:
        sum1 = tl.zeros((PART, BLOCK_M), tl.float32)
    if PARTS >= 4:
        sum2 = tl.zeros((PART, BLOCK_M), tl.float32)
        sum3 = tl.zeros((PART, BLOCK_M), tl.float32)
    for d0 in range(0, dim, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        y = load_vectors(y_side, centre_ptr, columns, d, dim, SPEC)
        y = tl.trans(y)
        x = load_vectors(x_side, centre_ptr, rows, d, dim, SPEC)
        sum0 = tl.dot(x, y, sum0, input_precision=PRECISION)
        if PARTS >= 2:
            x = load_vectors(x_side, centre_ptr, rows + PART, d, dim, SPEC)
            sum1 = tl.dot(x, y, sum1, input_precision=PRECISION)
        if PARTS >= 4:
            x = load_vectors(x_side, centre_ptr, rows + 2 * PART, d, dim, SPEC)
            sum2 = tl.dot(x, y, sum2, input_precision=PRECISION)
            x = load_vectors(x_side, centre_ptr, rows + 3 * PART, d, dim, SPEC)
            sum3 = tl.dot(x, y, sum3, input_precision=PRECISION)
    if PARTS == 1:
        product = sum0
    elif PARTS == 2:
        product = tl.reshape(tl.permute(tl.join(sum0, sum1), (2, 0, 1)), (BLOCK_N, BLOCK_M))
    else:
        pairs = tl.join(tl.join(sum0, sum2), tl.join(sum1, sum3))
        product = tl.reshape(tl.permute(pairs, (2, 3, 0, 1)), (BLOCK_N, BLOCK_M))
    return product


@triton.jit
def load_cost(
    cost_ptr,
    stride_n,
    stride_m,
    row_start,
    column_start,
    n,
    m,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_M: tl.constexpr,
):
    """Load a tile of a stored cost in a layout of 4 x 8 lanes; +inf outside the problem."""
    N: tl.constexpr = BLOCK_N // (4 * WARPS_N)
    M: tl.constexpr = BLOCK_M // (8 * WARPS_M)
    i = tl.reshape(tl.arange(0, BLOCK_N), (N, WARPS_N, 4))
    i = tl.reshape(tl.permute(i, (2, 1, 0)), (1, 4, 1, WARPS_N, 1, N)) + row_start
    j = tl.reshape(tl.arange(0, BLOCK_M), (M, WARPS_M, 8))
    j = tl.reshape(tl.permute(j, (2, 1, 0)), (8, 1, WARPS_M, 1, M, 1)) + column_start
    if WIDE:
        i = i.to(tl.int64)
        j = j.to(tl.int64)
    offsets = i * stride_n + j * stride_m
    cost = tl.load(cost_ptr + offsets, mask=(i < n) & (j < m), other=INFINITY)
    return tl.reshape(tl.permute(cost, (5, 3, 1, 4, 2, 0)), (BLOCK_N, BLOCK_M))


@triton.jit
def cost_tile(costs, row_start, column_start, SPEC: tl.constexpr, TILE: tl.constexpr):
    """Compute a tile of the cost of one problem.

    A non-finite cost of vectors becomes NaN, so that it is never mistaken for a forbidden pair.
    """
    x_ptr, norm_x_ptr, _, stride_n, n = costs[0]
    _, norm_y_ptr, _, stride_m, m = costs[1]
    KIND: tl.constexpr = SPEC[0]
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_M: tl.constexpr = TILE[1]
    if KIND == GIVEN:
        cost = load_cost(
            x_ptr,
            stride_n,
            stride_m,
            row_start,
            column_start,
            n,
            m,
            SPEC[2],
            BLOCK_N,
            BLOCK_M,
            TILE[4],
            TILE[5],
        )
    else:
        cost = dot_products(costs, row_start, column_start, SPEC, TILE)
        if KIND == DOT:
            cost = -cost
        else:
            rows = row_start + tl.arange(0, BLOCK_N)
            columns = column_start + tl.arange(0, BLOCK_M)
            norm_x = tl.load(norm_x_ptr + rows, mask=rows < n, other=0.0)[:, None]
            norm_y = tl.load(norm_y_ptr + columns, mask=columns < m, other=0.0)[None, :]
            if KIND == COSINE:
                cost = 1 - cost * (norm_x * norm_y)
            else:
                cost = norm_x + norm_y - 2 * cost
                cost = tl.where(cost < 0, 0.0, cost)
        cost = tl.where(tl.abs(cost) < INFINITY, cost, float("nan"))
    return cost


@triton.jit
def quotient(x, y, NVIDIA: tl.constexpr):
    """Divide normal numbers, within two units in the last place.

    Triton's division takes six instructions, some of them on a unit that reductions wait for.
    NVIDIA's approximate reciprocal takes one.
    """
    if NVIDIA:
        assembly: tl.constexpr = "rcp.approx.ftz.f32 $0, $1;"
        y = tl.inline_asm_elementwise(assembly, "=f,f", [y], tl.float32, is_pure=True, pack=1)
        z = x * y
    else:
        z = x / y
    return z


@triton.jit
def step_factor(relaxation, temperature, inverse_rho):
    """Compute the factor of the soft-min in an update of a potential: relaxation / (1 + T / rho).

    It is rounded correctly. Triton's division may be off by two units in the last place, which
    over-relaxation and reverse sweeps would multiply in every iteration.
    """
    return tl.div_rn(relaxation, 1 + temperature * inverse_rho)


@triton.jit
def times_exp2(log_mass, exponent):
    """Multiply a log2 mass with 2 ** exponent; the mass may underflow, the power overflow."""
    excess = tl.maximum(exponent - 115, 0.0)
    return tl.exp2(log_mass + excess) * tl.exp2(exponent - excess)


@triton.jit
def times_log2(x, NVIDIA: tl.constexpr):
    """Compute x log2 x of numbers >= 0, and 0 for 0.

    Inline assembly keeps it one instruction sequence, so that x does not stay in a register.
    """
    if NVIDIA:
        assembly: tl.constexpr = """{ .reg .f32 t;
            max.f32 t, $1, 0f00800000;
            lg2.approx.ftz.f32 t, t;
            mul.f32 $0, t, $1; }"""
        y = tl.inline_asm_elementwise(assembly, "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        y = tl.where(x > 0, x * tl.log2(tl.where(x > 0, x, 1.0)), 0.0)
    return y


@triton.jit
def plan_tile(cost, A, B, f, g, scale):
    """Compute a tile of the plan from log2 masses and potentials, 0 for padding.

    It is NaN where a potential is, as those of a malformed problem are.
    """
    valid = (A != -INFINITY)[:, None] & (B != -INFINITY)[None, :]
    score = (f[:, None] + g[None, :] - cost) * scale + (A[:, None] + B[None, :])
    return tl.exp2(tl.where(valid, score, -INFINITY))


@triton.jit
def log_sum_exp2(score, axis: tl.constexpr):
    """Return log2 sum exp2 along the axis, 0 where all scores are -inf, and a mask of the rest."""
    peak = tl.max(score, axis)
    has_finite = peak > -INFINITY
    peak = tl.where(has_finite, peak, 0.0)
    total = tl.sum(tl.exp2(score - tl.expand_dims(peak, axis)), axis)
    return tl.where(has_finite, peak + tl.log2(tl.where(has_finite, total, 1.0)), 0.0), has_finite


@triton.jit
def kl_penalty(sums, log_mass, mass):
    """Compute the KL divergence of the marginal of a plan from its masses, per row or column."""
    positive = (sums > 0) & (mass > 0)
    ratio = tl.log2(tl.where(sums > 0, sums, 1.0)) - tl.where(sums > 0, log_mass, 0.0)
    divergence = sums * ratio / LOG2_E - sums + mass
    # Sums close to the masses cancel; the series of (1 + x) log(1 + x) - x does not.
    x = tl.where(positive, sums / tl.where(positive, mass, 1.0) - 1, 1.0)
    series = 0.5 + x * (-1 / 6 + x * (1 / 12 + x * (-1 / 20 + x * (1 / 30 - x / 42))))
    small_divergence = mass * x * x * series
    return tl.where(tl.abs(x) < 0.125, small_divergence, divergence)


@triton.jit
def target_marginal(log_mass, has_pair, F, strength):
    """Return the marginal of an optimal plan, ``strength`` = epsilon / rho, 0 for a fixed marginal.

    With a penalty it is 0 for rows and columns without an allowed pair (``has_pair``).
    """
    penalised = tl.where(has_pair, times_exp2(log_mass, -F * strength), 0.0)
    return tl.where(strength > 0, penalised, tl.exp2(log_mass))


@triton.jit
def penalty_gradient(log_mass, mass, potential, inverse_rho):
    """Compute rho (a - a exp(-f / rho)), the derivative of a penalty by the logarithm of a mass a.

    Under a strong penalty the two terms cancel; the series of 1 - exp(-x) does not.
    """
    x = potential * inverse_rho
    series = 1 - x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5 * (1 - x / 6))))
    difference = (mass - times_exp2(log_mass, -x * LOG2_E)) / inverse_rho
    return tl.where(tl.abs(x) < 0.125, mass * potential * series, difference)


@triton.jit
def penalty_slopes(share, sums, log_mass, mass, inverse_rho):
    """Derivatives of rho KL(sums | mass): by the sums, rho log(sums / mass), and by log(mass).

    ``share`` is sums / mass, summed without the mass; it may overflow. Near 1, under a strong
    penalty, both slopes would magnify the rounding errors of the sums and of the mass.
    """
    x = share - 1
    series = 1 - x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x * (1 / 5 - x * (1 / 6 - x / 7)))))
    near = tl.abs(x) < 0.125
    positive = sums > 0
    ratio = (tl.log2(tl.where(positive, sums, 1.0)) - tl.where(positive, log_mass, 0.0)) / LOG2_E
    by_sums = tl.where(near, x * series, ratio) / inverse_rho
    by_mass = tl.where(near, -mass * x, mass - sums) / inverse_rho
    return by_sums, by_mass


@triton.jit
def without_mass(log_mass):
    """Replace every mass by 1, except for those of 0."""
    return tl.where(log_mass != -INFINITY, 0.0, -INFINITY)


@triton.jit
def overflows(value, transported, error):
    """Return whether an output of a problem is NaN or infinite."""
    finite = (tl.abs(value) < INFINITY) & (tl.abs(transported) < INFINITY) & (error < INFINITY)
    return finite == 0


@triton.jit
def final_status(error, tol, infeasible):
    """Return the status of a problem that is not empty, from the error of its reported plan."""
    status = tl.where((tol > 0) & (error <= tol), CONVERGED, MAX_ITER)
    return tl.where(infeasible, INFEASIBLE, status)
