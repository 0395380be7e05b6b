"""All iterations of a problem larger than a chip's registers in one program and one launch.

This is what packed problems need, whose sizes nobody knows when kernels are launched, and what many
problems do best with. The bits are those of ``streaming``.
"""

import triton
import triton.language as tl
from optical.kernels.streamed.half_precision import (
    EXACT,
    NEVER,
    WRITE,
    consider,
    half_step,
    keep,
    proceed,
)
from optical.kernels.streamed.logsumexp import SUMS, walk
from optical.kernels.streamed.potentials import begin, finish, miss, relax
from optical.kernels.tiles import INFINITY, LOG2_E, extent, place, swapped


@triton.jit(do_not_specialize=["n", "m", "stride_n", "stride_m", "max_iter", "least"])
def loop_kernel(
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
    f_ptr,
    g_ptr,
    found_a_ptr,
    found_b_ptr,
    spent_a_ptr,
    spent_b_ptr,
    start_a_ptr,
    start_b_ptr,
    kept_ptr,
    value_ptr,
    value_linear_ptr,
    marginal_error_ptr,
    n_iter_ptr,
    status_ptr,
    stride_batch,
    stride_n,
    stride_m,
    n,
    m,
    dim,
    width,
    plane,
    max_iter,
    tol,
    inverse_rho_a,
    inverse_rho_b,
    omega,
    anneal_start,
    anneal_ratio,
    least,
    KIND: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_M: tl.constexpr,
    FAST: tl.constexpr,
    START: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All iterations of a problem in one program, for those of more than ``least`` lines a side."""
    problem = tl.program_id(0).to(tl.int64)
    zero_a, n = extent(cu_a_ptr, problem, n, PACKED)
    zero_b, m = extent(cu_b_ptr, problem, m, PACKED)
    if tl.maximum(n, m) <= least:
        return
    starts = (f0_ptr + zero_a, g0_ptr + zero_b)
    rows = (
        log_a_ptr + zero_a,
        f_ptr + zero_a,
        found_a_ptr + zero_a,
        spent_a_ptr + zero_a,
        start_a_ptr + zero_a,
    )
    columns = (
        log_b_ptr + zero_b,
        g_ptr + zero_b,
        found_b_ptr + zero_b,
        spent_b_ptr + zero_b,
        start_b_ptr + zero_b,
    )
    kept = (kept_ptr + problem * plane, width)
    rows_kept = (rows[0], rows[4])
    columns_kept = (columns[0], columns[4])
    outputs = (value_ptr, value_linear_ptr, marginal_error_ptr, n_iter_ptr, status_ptr)
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = place(tokens, sizes, problem, zero_a, zero_b, KIND)
    HOW: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    TILE: tl.constexpr = (BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_N, WARPS_N, WARPS_M)
    epsilon = tl.load(epsilon_ptr + problem)
    readable = (epsilon > 0) & (epsilon < INFINITY)
    epsilon = tl.where(readable, epsilon, 1.0)
    scale = LOG2_E / epsilon
    begin(rows[1], starts[0], n, scale, START, BLOCK)
    begin(columns[1], starts[1], m, scale, START, BLOCK)
    iteration = 0
    stop = False
    settled = False
    annealing = anneal_start
    running = max_iter > 0
    state = 0
    if FAST:
        state = consider(rows[0], n, BLOCK)
    while running:
        temperature = tl.maximum(epsilon, annealing)
        annealing *= anneal_ratio
        ratio = epsilon / temperature
        relaxation = tl.where((iteration == 0) | (temperature != epsilon), 1.0, omega)
        tl.debug_barrier()
        if FAST and state == WRITE:
            keep(costs, rows_kept, columns_kept, kept, 0, BLOCK_N, scale, HOW, TILE)
            tl.debug_barrier()
        half_step(
            costs, rows, columns, kept, state, 0, BLOCK_N, scale, ratio, True, FAST, HOW, TILE
        )
        tl.debug_barrier()
        if (tol > 0) & settled:
            missed = miss(rows, n, ratio, epsilon * inverse_rho_a, BLOCK)
            stop = missed <= tol
            if FAST:
                # An exact iteration decides.
                kept_alone = stop & (state > EXACT)
                state = tl.where(kept_alone, NEVER, state)
                stop = stop & (kept_alone == 0)
        settled = temperature == epsilon
        if stop == 0:
            tl.debug_barrier()
            beta = relaxation / (1 + temperature * inverse_rho_a)
            moved = relax(rows, n, relaxation, beta, state, FAST, BLOCK)
            tl.debug_barrier()
            half_step(
                swapped(costs),
                columns,
                rows,
                kept,
                state,
                0,
                BLOCK_N,
                scale,
                ratio,
                False,
                FAST,
                HOW,
                TILE,
            )
            tl.debug_barrier()
            beta = relaxation / (1 + temperature * inverse_rho_b)
            moved_b = relax(columns, m, relaxation, beta, state, FAST, BLOCK)
            iteration += 1
            if FAST:
                moved = tl.maximum(moved, moved_b)
                state = proceed(state, moved, settled, max_iter - iteration)
        running = (iteration < max_iter) & (stop == 0)
    tl.debug_barrier()
    walk(costs, rows, columns, 0, BLOCK_N, scale, 1.0, SUMS, HOW, TILE)
    walk(swapped(costs), columns, rows, 0, BLOCK_N, scale, 1.0, SUMS, HOW, TILE)
    tl.debug_barrier()
    finish(
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
        START,
        BLOCK,
    )
