"""Sinkhorn for problems larger than a chip's registers.

    F_i <- -log2 sum_j exp2(B_j + G_j - S_ij)        in the units of ``resident``

``walk_kernel`` and ``turn_kernel`` are one half-step: any number of programs per problem, which
share the rows, and where these are too few for a GPU the columns as well, with ``gather_kernel``
in between. A problem that has stopped costs the launches and no more. ``loop`` is the other way to
run it, with the same bits.

With FAST, most iterations are products with a plan that is kept in half precision: see ``kept``.
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
from optical.kernels.streamed.logsumexp import SEGMENT, SUMS, join, minimum, walk, walk_segments
from optical.kernels.streamed.potentials import begin, finish, miss, relax
from optical.kernels.tiles import INFINITY, LOG2_E, extent, place, temperature_of


@triton.jit(do_not_specialize=["n", "m", "stride_n", "stride_m", "lines"])
def walk_kernel(
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
    f_ptr,
    g_ptr,
    found_ptr,
    spent_ptr,
    start_a_ptr,
    start_b_ptr,
    kept_ptr,
    part_ptr,
    state_ptr,
    stopped_ptr,
    stride_batch,
    stride_n,
    stride_m,
    n,
    m,
    dim,
    lines,
    width,
    plane,
    annealing,
    SPLIT: tl.constexpr,
    SEEN: tl.constexpr,
    ROWS: tl.constexpr,
    FAST: tl.constexpr,
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
):
    """A walk of all programs of a problem; for the columns the two sides change places.

    With SPLIT the programs share the columns too, and ``gather_kernel`` has to follow.
    """
    problem = tl.program_id(0).to(tl.int64)
    if tl.load(stopped_ptr + problem) != 0 and SEEN != SUMS:
        return
    zero_a, n = extent(cu_a_ptr, problem, n, PACKED)
    zero_b, m = extent(cu_b_ptr, problem, m, PACKED)
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = place(tokens, sizes, problem, zero_a, zero_b, KIND)
    HOW: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    TILE: tl.constexpr = (BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_N, WARPS_N, WARPS_M)
    epsilon = temperature_of(epsilon_ptr, problem)
    own = (
        log_a_ptr + zero_a,
        f_ptr + zero_a,
        found_ptr + zero_a,
        spent_ptr + zero_a,
        start_a_ptr + zero_a,
    )
    other = (log_b_ptr + zero_b, g_ptr + zero_b, own[2], own[3], start_b_ptr + zero_b)
    first = tl.program_id(1) * BLOCK_N
    step = tl.num_programs(1) * BLOCK_N
    scale = LOG2_E / epsilon
    ratio = epsilon / tl.maximum(epsilon, annealing)
    if SEEN == SUMS:
        walk(costs, own, other, first, step, scale, 1.0, SUMS, HOW, TILE)
    elif SPLIT:
        segment = tl.program_id(2)
        segments = tl.num_programs(2)
        part_ptr += zero_a
        walk_segments(
            costs,
            own,
            other,
            part_ptr,
            lines,
            first,
            step,
            segment,
            segments,
            scale,
            ratio,
            HOW,
            TILE,
        )
    else:
        kept = (kept_ptr + problem * plane, width)
        state = 0
        if FAST:
            state = tl.load(state_ptr + problem)
        half_step(costs, own, other, kept, state, first, step, scale, ratio, ROWS, FAST, HOW, TILE)


@triton.jit(do_not_specialize=["n", "m", "lines"])
def gather_kernel(
    cu_a_ptr,
    cu_b_ptr,
    epsilon_ptr,
    part_ptr,
    found_ptr,
    stopped_ptr,
    n,
    m,
    lines,
    annealing,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The minima of rows from those of their segments."""
    problem = tl.program_id(0).to(tl.int64)
    if tl.load(stopped_ptr + problem) != 0:
        return
    zero_a, n = extent(cu_a_ptr, problem, n, PACKED)
    _zero_b, m = extent(cu_b_ptr, problem, m, PACKED)
    epsilon = temperature_of(epsilon_ptr, problem)
    ratio = epsilon / tl.maximum(epsilon, annealing)
    for zero in range(tl.program_id(1) * BLOCK, n, tl.num_programs(1) * BLOCK):
        rows = zero + tl.arange(0, BLOCK)
        inside = rows < n
        peak = tl.full((BLOCK,), -INFINITY, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        lowest = tl.full((BLOCK,), INFINITY, tl.float32)
        source = part_ptr + zero_a + rows
        for _ in range(0, m, SEGMENT):
            more_peak = tl.load(source, mask=inside, other=-INFINITY)
            more_total = tl.load(source + lines, mask=inside, other=0.0)
            more_lowest = tl.load(source + 2 * lines, mask=inside, other=INFINITY)
            peak, total = join(peak, total, more_peak, more_total)
            lowest = tl.minimum(lowest, more_lowest)
            source += 3 * lines
        tl.store(found_ptr + zero_a + rows, minimum(peak, total, lowest, ratio), mask=inside)


@triton.jit(do_not_specialize=["n", "m", "stride_n", "stride_m"])
def keep_kernel(
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
    start_a_ptr,
    start_b_ptr,
    kept_ptr,
    state_ptr,
    stopped_ptr,
    stride_batch,
    stride_n,
    stride_m,
    n,
    m,
    dim,
    width,
    plane,
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
):
    """Write K of the problems that are about to use one."""
    problem = tl.program_id(0).to(tl.int64)
    if (tl.load(stopped_ptr + problem) != 0) | (tl.load(state_ptr + problem) != WRITE):
        return
    zero_a, n = extent(cu_a_ptr, problem, n, PACKED)
    zero_b, m = extent(cu_b_ptr, problem, m, PACKED)
    tokens = (x_ptr, y_ptr, norm_x_ptr, norm_y_ptr, scale_x_ptr, scale_y_ptr, centre_ptr)
    sizes = (stride_batch, stride_n, stride_m, n, m, dim)
    costs = place(tokens, sizes, problem, zero_a, zero_b, KIND)
    HOW: tl.constexpr = (KIND, SCALED, WIDE, PRECISION)
    TILE: tl.constexpr = (BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_N, WARPS_N, WARPS_M)
    epsilon = tl.load(epsilon_ptr + problem)
    rows = (log_a_ptr + zero_a, start_a_ptr + zero_a)
    columns = (log_b_ptr + zero_b, start_b_ptr + zero_b)
    kept = (kept_ptr + problem * plane, width)
    first = tl.program_id(1) * BLOCK_N
    step = tl.num_programs(1) * BLOCK_N
    keep(costs, rows, columns, kept, first, step, LOG2_E / epsilon, HOW, TILE)


@triton.jit(do_not_specialize=["n", "first", "left"])
def turn_kernel(
    cu_ptr,
    log_mass_ptr,
    epsilon_ptr,
    start_ptr,
    f_ptr,
    found_ptr,
    kept_start_ptr,
    state_ptr,
    moved_ptr,
    stopped_ptr,
    n_iter_ptr,
    n,
    first,
    left,
    tol,
    inverse_rho,
    omega,
    annealing,
    before,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    FAST: tl.constexpr,
    START: tl.constexpr,
    BEGIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """After a walk: whether the problem stops here, if not, the potentials of one side.

    ``before`` is the temperature of the annealing one iteration earlier. With BEGIN there was no
    walk yet, and the side is given its start. ``left`` iterations are to come after this one.
    """
    problem = tl.program_id(0).to(tl.int64)
    zero, n = extent(cu_ptr, problem, n, PACKED)
    epsilon = temperature_of(epsilon_ptr, problem)
    if BEGIN:
        begin(f_ptr + zero, start_ptr + zero, n, LOG2_E / epsilon, START, BLOCK)
        tl.store(stopped_ptr + problem, 0)
        tl.store(n_iter_ptr + problem, 0)
        if FAST and ROWS:
            tl.store(state_ptr + problem, consider(log_mass_ptr + zero, n, BLOCK))
        return
    if tl.load(stopped_ptr + problem) != 0:
        return
    own = (
        log_mass_ptr + zero,
        f_ptr + zero,
        found_ptr + zero,
        found_ptr + zero,
        kept_start_ptr + zero,
    )
    state = 0
    if FAST:
        state = tl.load(state_ptr + problem)
    temperature = tl.maximum(epsilon, annealing)
    stop = False
    if ROWS and tol > 0:
        missed = miss(own, n, epsilon / temperature, epsilon * inverse_rho, BLOCK)
        stop = (missed <= tol) & (tl.maximum(epsilon, before) == epsilon)
        if FAST:
            # An exact iteration decides.
            kept_alone = stop & (state > EXACT)
            state = tl.where(kept_alone, NEVER, state)
            stop = stop & (kept_alone == 0)
    if stop:
        tl.store(stopped_ptr + problem, 1)
    else:
        relaxation = tl.where((first != 0) | (temperature != epsilon), 1.0, omega)
        beta = relaxation / (1 + temperature * inverse_rho)
        tl.debug_barrier()
        moved = relax(own, n, relaxation, beta, state, FAST, BLOCK)
        if FAST and ROWS:
            tl.store(moved_ptr + problem, moved)
            tl.store(state_ptr + problem, state)
        elif FAST:
            moved = tl.maximum(moved, tl.load(moved_ptr + problem))
            state = proceed(state, moved, temperature == epsilon, left)
            tl.store(state_ptr + problem, state)
        if not ROWS:
            tl.store(n_iter_ptr + problem, tl.load(n_iter_ptr + problem) + 1)


@triton.jit(do_not_specialize=["n", "m", "max_iter"])
def finish_kernel(
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
    value_ptr,
    value_linear_ptr,
    marginal_error_ptr,
    n_iter_ptr,
    status_ptr,
    stopped_ptr,
    n,
    m,
    max_iter,
    inverse_rho_a,
    inverse_rho_b,
    PACKED: tl.constexpr,
    START: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The outputs of each problem, after the last walks, which were for sums."""
    problem = tl.program_id(0).to(tl.int64)
    zero_a, n = extent(cu_a_ptr, problem, n, PACKED)
    zero_b, m = extent(cu_b_ptr, problem, m, PACKED)
    epsilon = tl.load(epsilon_ptr + problem)
    readable = (epsilon > 0) & (epsilon < INFINITY)
    epsilon = tl.where(readable, epsilon, 1.0)
    starts = (f0_ptr + zero_a, g0_ptr + zero_b)
    rows = (log_a_ptr + zero_a, f_ptr + zero_a, found_a_ptr + zero_a, spent_a_ptr + zero_a)
    columns = (log_b_ptr + zero_b, g_ptr + zero_b, found_b_ptr + zero_b, spent_b_ptr + zero_b)
    outputs = (value_ptr, value_linear_ptr, marginal_error_ptr, n_iter_ptr, status_ptr)
    iteration = tl.load(n_iter_ptr + problem)
    stop = tl.load(stopped_ptr + problem) != 0
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
