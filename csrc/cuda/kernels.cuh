// The kernels: the assignment of problems to threads, and the three operations on one problem.
#pragma once

#include "adjoint.cuh"
#include "gradient.cuh"

namespace optical {
namespace cuda {

// A problem belongs to the first regime that fits its size n x m, which is its own size or its
// padded size, never the largest of the batch. The tile of a warp is 64 x 64, or 32 x 32 for small
// problems. Forward, the tile of each of several problems in a warp is 32 x 32 or 16 x 16.
enum : int { NO_REGIME = -1, FOUR, PAIR, WARP, SQUARE, BLOCK, CLUSTER };
struct Regime {
    int number;
    int down, across, blocks;
    int problems;  // per warp
};

// The limits of a device: warps of the large tile per block, given its shared memory; blocks per
// cluster; and whether problems may share a warp.
struct Limits {
    int warps, blocks, warp_teams;
};

// The number of large tiles along a side. An empty side has one empty tile.
OPTICAL_HOST_DEVICE int64_t tiles_of(int64_t size) { return size > 64 ? (size + 63) / 64 : 1; }

OPTICAL_HOST_DEVICE Regime regime_of(int64_t n, int64_t m, const Limits& limits) {
    if (limits.warps < 1) return {NO_REGIME, 0, 0, 0, 0};
    if (n <= 16 && m <= 16 && limits.warp_teams) return {FOUR, 1, 1, 1, 4};
    if (n <= 32 && m <= 32) return {PAIR, 1, 1, 1, limits.warp_teams ? 2 : 1};
    const int64_t down = tiles_of(n), across = tiles_of(m);
    if (down * across == 1) return {WARP, 1, 1, 1, 1};
    if (down == 2 && across == 2 && limits.warps >= 4) return {SQUARE, 2, 2, 1, 1};
    if (down * across <= limits.warps) return {BLOCK, (int)down, (int)across, 1, 1};
    for (int blocks = 2; blocks <= limits.blocks; blocks *= 2) {
        const int64_t part = (down + blocks - 1) / blocks;
        if (part * across <= limits.warps) return {CLUSTER, (int)part, (int)across, blocks, 1};
    }
    return {NO_REGIME, 0, 0, 0, 0};
}

template <typename G>
OPTICAL_DEVICE void write_entries(const Problem<G>& problem, void* to_a, void* to_b, int name,
                                  bool solvable, int32_t status) {
    const G& grid = problem.grid;
    const float otherwise = status == OPTICAL_EMPTY ? 0.0f : not_a_number();
    OPTICAL_UNROLL_LOOP
    for (int o = 0; o < G::OI; ++o) {
        const int i = grid.own_row(o);
        if (grid.warp_across != 0 || i >= problem.a.count) continue;
        const float x = solvable ? problem.row(name, o) : otherwise;
        ((float*)to_a)[problem.a.first + i] = problem.valid_row(i) ? x : 0.0f;
    }
    OPTICAL_UNROLL_LOOP
    for (int o = 0; o < G::OJ; ++o) {
        const int j = grid.own_column(o);
        if (grid.warp_down != 0 || grid.rank != 0 || j >= problem.b.count) continue;
        const float x = solvable ? problem.column(name, o) : otherwise;
        ((float*)to_b)[problem.b.first + j] = problem.valid_column(j) ? x : 0.0f;
    }
}

template <typename G>
OPTICAL_DEVICE void forward(const optical_problem& batch, const optical_solution& out,
                            int64_t index, const Regime& regime) {
    Solver<G> solver(batch);
    Problem<G>& problem = solver.problem;
    G& grid = problem.grid;
    problem.start(index, regime.down, regime.across);
    const bool implicit = batch.gradient == OPTICAL_IMPLICIT;
    int32_t status, n_iter = 0;
    const bool solvable = solver.work.read(problem, status);
    float value = 0, linear = 0, error = 0, residual = 0;
    if (solvable) {
        n_iter = solver.solve(batch.max_iter, (float)batch.tol, nullptr);
        Objective<G> objective(solver);
        objective.evaluate();
        value = (float)objective.value, linear = (float)objective.linear;
        error = (float)objective.error;
        // A potential that is not finite makes the value not finite. Otherwise the error of the
        // returned potentials decides, whatever ended the run.
        const bool usable = is_finite(value) && is_finite(linear) && is_finite(error);
        status = !usable || !objective.feasible()                ? OPTICAL_INFEASIBLE
                 : batch.tol > 0 && error <= (float)batch.tol ? OPTICAL_CONVERGED
                                                                 : OPTICAL_MAX_ITER;
        if (implicit) residual = Adjoint<G>(solver).solve();
    } else if (status == OPTICAL_INFEASIBLE) {
        value = linear = error = not_a_number();
        residual = implicit ? value : 0.0f;
        n_iter = batch.max_iter;
    }
    if (grid.thread == 0 && grid.rank == 0 && problem.has_problem) {
        ((float*)out.value)[index] = value;
        ((float*)out.value_linear)[index] = linear;
        ((float*)out.marginal_error)[index] = error;
        ((float*)out.residual)[index] = residual;
        out.n_iter[index] = n_iter, out.status[index] = status;
    }
    write_entries(problem, out.f, out.g, POTENTIAL, solvable, status);
    if (implicit) write_entries(problem, out.w, out.z, SOLUTION, solvable, status);
    // A block must not exit while another block of its cluster reads its shared memory.
    if (G::span == Span::cluster) grid.sync();
}

template <typename G>
OPTICAL_DEVICE void backward(const optical_problem& batch, const optical_gradient& out, float*,
                             int64_t index, const Regime& regime) {
    Solver<G> solver(batch);
    solver.problem.start(index, regime.down, regime.across);
    SelfTerms<G> self;
    VectorGradient<G> vectors(solver, self, out);
    Gradient<G>(solver, vectors).differentiate();
    if (G::span == Span::cluster) solver.problem.grid.sync();
}

template <typename G>
OPTICAL_DEVICE void unroll(const optical_problem& batch, const optical_gradient& out,
                           float* history, int64_t index, const Regime& regime) {
    Solver<G> solver(batch);
    solver.problem.start(index, regime.down, regime.across);
    SelfTerms<G> self;
    VectorGradient<G> vectors(solver, self, out);
    Gradient<G>(solver, vectors).differentiate(history);
    if (G::span == Span::cluster) solver.problem.grid.sync();
}

// Calls run(problem, regime) for the problem of this block, or team, if its regime is `number`. The
// host does not know the sizes of packed problems, so every regime launches all of them, and blocks
// of another regime exit. Teams of a warp stay together; a team without a problem gets -1.
template <typename G, typename Run>
OPTICAL_DEVICE void for_problem(const optical_problem& batch, int number, const Limits& limits,
                                Run run) {
    if constexpr (G::teams > 1) {
        const int64_t index = (int64_t)block_index() * G::teams + thread_index() / G::lanes;
        bool member = index < batch.batch;
        if (member && batch.offset_a)
            member = regime_of(batch.offset_a[index + 1] - batch.offset_a[index],
                             batch.offset_b[index + 1] - batch.offset_b[index], limits)
                       .number == number;
        if (warp_any(member)) run(member ? index : -1, {number, 1, 1, 1, G::teams});
        return;
    }
    const int64_t index = number == CLUSTER ? block_index() / cluster_size() : block_index();
    int64_t n = batch.n, m = batch.m;
    if (batch.offset_a) {
        n = batch.offset_a[index + 1] - batch.offset_a[index];
        m = batch.offset_b[index + 1] - batch.offset_b[index];
    }
    const Regime regime = regime_of(n, m, limits);
    if (regime.number != number) return;
    if (number == CLUSTER && regime.blocks != cluster_size()) return;
    if (thread_index() >= 32 * regime.down * regime.across) return;
    run(index, regime);
}

typedef ThreadGrid<8, 4, Span::warp, 0, 0, false, 8> FourInWarp;
typedef ThreadGrid<8, 8, Span::warp, 0, 0, false, 16> PairInWarp;
typedef ThreadGrid<8, 4, Span::warp> SmallWarp;
typedef ThreadGrid<16, 8, Span::warp> LargeWarp;
typedef ThreadGrid<16, 8, Span::block, 2, 2> SquareBlock;
typedef ThreadGrid<16, 8, Span::block> OneBlock;
typedef ThreadGrid<16, 8, Span::cluster> Cluster;
typedef ThreadGrid<16, 8, Span::warp, 0, 0, true> FastWarp;
typedef ThreadGrid<16, 8, Span::block, 2, 2, true> FastSquare;
typedef ThreadGrid<16, 8, Span::block, 0, 0, true> FastBlock;
typedef ThreadGrid<16, 8, Span::cluster, 0, 0, true> FastCluster;

#define OPTICAL_FORWARD(name, G, warps)                                                        \
    OPTICAL_KERNEL(optical_forward_##name, 32 * warps)                                         \
    (OPTICAL_CONSTANT optical_problem batch, OPTICAL_CONSTANT optical_solution out,                \
     const Limits limits, int number) {                                                          \
        for_problem<G>(batch, number, limits, [&](int64_t index, const Regime& regime) {             \
            forward<G>(batch, out, index, regime);                                                 \
        });                                                                                    \
    }
#define OPTICAL_BACKWARD(name, G, warps, backward)                                             \
    OPTICAL_KERNEL(optical_##name, 32 * warps)                                                 \
    (OPTICAL_CONSTANT optical_problem batch, OPTICAL_CONSTANT optical_gradient out,                \
     float* history, const Limits limits, int number) {                                          \
        for_problem<G>(batch, number, limits, [&](int64_t index, const Regime& regime) {             \
            backward<G>(batch, out, history, index, regime);                                       \
        });                                                                                    \
    }

// For compilation at first use, OPTICAL_ONLY replaces the list below by one of its entries.
#if defined(OPTICAL_ONLY)
OPTICAL_ONLY
#else
OPTICAL_FORWARD(four, FourInWarp, 1)
OPTICAL_FORWARD(pair, PairInWarp, 1)
OPTICAL_FORWARD(warp, LargeWarp, 1)
OPTICAL_FORWARD(square, SquareBlock, 4)
OPTICAL_FORWARD(block, OneBlock, 8)
OPTICAL_FORWARD(cluster, Cluster, 8)
OPTICAL_FORWARD(fast_warp, FastWarp, 1)
OPTICAL_FORWARD(fast_square, FastSquare, 4)
OPTICAL_FORWARD(fast_block, FastBlock, 8)
OPTICAL_FORWARD(fast_cluster, FastCluster, 8)
OPTICAL_BACKWARD(backward_small, SmallWarp, 1, backward)
OPTICAL_BACKWARD(backward_warp, LargeWarp, 1, backward)
OPTICAL_BACKWARD(backward_block, OneBlock, 8, backward)
OPTICAL_BACKWARD(backward_cluster, Cluster, 8, backward)
OPTICAL_BACKWARD(unroll_small, SmallWarp, 1, unroll)
OPTICAL_BACKWARD(unroll_warp, LargeWarp, 1, unroll)
OPTICAL_BACKWARD(unroll_block, OneBlock, 8, unroll)
OPTICAL_BACKWARD(unroll_cluster, Cluster, 8, unroll)
#endif

}  // namespace cuda
}  // namespace optical
