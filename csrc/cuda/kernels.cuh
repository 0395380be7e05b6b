// The kernels: which threads solve which problem, and what they write.
#pragma once

#include "unroll.cuh"

namespace optical {
namespace cuda {

// A problem belongs to the first regime whose threads it fits; n and m are its own sizes, or those
// it was padded to, never those of its batch. Tiles of a warp are 64 x 64, or 32 x 32; forward they
// are 32 x 32 or 16 x 16 for each of several problems.
enum : int { NO_REGIME = -1, FOUR, PAIR, WARP, SQUARE, BLOCK, CLUSTER };
struct Regime {
    int number;
    int down, across, blocks;
    int problems;  // in a warp
};

// What a device offers: warps of the large tile in a block, by its shared memory, and blocks in a
// cluster; and whether a warp may have several problems.
struct Limits {
    int warps, blocks, several;
};

// Large tiles along a side; a side without lines has one that is empty.
OPTICAL_ANYWHERE int64_t tiles_of(int64_t lines) { return lines > 64 ? (lines + 63) / 64 : 1; }

OPTICAL_ANYWHERE Regime regime_of(int64_t n, int64_t m, const Limits& most) {
    if (most.warps < 1) return {NO_REGIME, 0, 0, 0, 0};
    if (n <= 16 && m <= 16 && most.several) return {FOUR, 1, 1, 1, 4};
    if (n <= 32 && m <= 32) return {PAIR, 1, 1, 1, most.several ? 2 : 1};
    const int64_t down = tiles_of(n), across = tiles_of(m);
    if (down * across == 1) return {WARP, 1, 1, 1, 1};
    if (down == 2 && across == 2 && most.warps >= 4) return {SQUARE, 2, 2, 1, 1};
    if (down * across <= most.warps) return {BLOCK, (int)down, (int)across, 1, 1};
    for (int blocks = 2; blocks <= most.blocks; blocks *= 2) {
        const int64_t part = (down + blocks - 1) / blocks;
        if (part * across <= most.warps) return {CLUSTER, (int)part, (int)across, blocks, 1};
    }
    return {NO_REGIME, 0, 0, 0, 0};
}

template <typename G>
OPTICAL_DEVICE void write_lines(Results<G>& s, void* to_a, void* to_b, int name, bool valid,
                                int32_t status) {
    const float otherwise = status == OPTICAL_EMPTY ? 0.0f : not_a_number();
    OPTICAL_EACH
    for (int o = 0; o < G::OI; ++o) {
        const int i = s.g.own_row(o);
        if (s.g.warp_across != 0 || i >= s.a.count) continue;
        const float x = valid ? s.row(name, o) : otherwise;
        ((float*)to_a)[s.a.first + i] = s.present_a(i) ? x : 0.0f;
    }
    OPTICAL_EACH
    for (int o = 0; o < G::OJ; ++o) {
        const int j = s.g.own_column(o);
        if (s.g.warp_down != 0 || s.g.rank != 0 || j >= s.b.count) continue;
        const float x = valid ? s.column(name, o) : otherwise;
        ((float*)to_b)[s.b.first + j] = s.present_b(j) ? x : 0.0f;
    }
}

template <typename G>
OPTICAL_DEVICE void forward(const optical_problem& p, const optical_solution& out, int64_t index,
                            const Regime& regime) {
    Results<G> s(p);
    s.start(index, regime.down, regime.across);
    const bool implicit = p.gradient == OPTICAL_IMPLICIT;
    int32_t status, ran = 0;
    const bool valid = s.read(status);
    float value = 0, linear = 0, error = 0, residual = 0;
    if (valid) {
        bool converged;
        ran = s.solve(p.max_iter, (float)p.tol, converged, nullptr);
        s.sum_up();
        value = (float)s.value, linear = (float)s.linear, error = (float)s.error;
        status = !s.feasible() ? OPTICAL_INFEASIBLE
                 : converged   ? OPTICAL_CONVERGED
                               : OPTICAL_MAX_ITER;
        if (implicit) residual = s.adjoint();
    } else if (status == OPTICAL_INFEASIBLE) {
        value = linear = error = not_a_number();
        residual = implicit ? value : 0.0f;
        ran = p.max_iter;
    }
    if (s.g.thread == 0 && s.g.rank == 0 && s.is_there) {
        ((float*)out.value)[index] = value;
        ((float*)out.value_linear)[index] = linear;
        ((float*)out.marginal_error)[index] = error;
        ((float*)out.residual)[index] = residual;
        out.n_iter[index] = ran, out.status[index] = status;
    }
    write_lines(s, out.f, out.g, POTENTIAL, valid, status);
    if (implicit) write_lines(s, out.w, out.z, SOLUTION, valid, status);
    // No block leaves while another one of its cluster reads its shared memory.
    if (G::span == Span::cluster) s.g.sync();
}

template <typename G>
OPTICAL_DEVICE void backward(const optical_problem& p, const optical_gradient& out, float*,
                             int64_t index, const Regime& regime) {
    Gradient<G> s(p, out);
    s.start(index, regime.down, regime.across);
    s.differentiate();
    if (G::span == Span::cluster) s.g.sync();
}

template <typename G>
OPTICAL_DEVICE void unroll(const optical_problem& p, const optical_gradient& out, float* history,
                           int64_t index, const Regime& regime) {
    Unrolled<G> s(p, out, history);
    s.start(index, regime.down, regime.across);
    s.differentiate();
    if (G::span == Span::cluster) s.g.sync();
}

// Calls run(problem, regime) for the problem of this block, or team, if it belongs to `number`. Of
// packed problems, whose sizes only the device knows, all blocks come and some leave. Teams come
// together, with problem -1 where they have none.
template <typename G, typename Run>
OPTICAL_DEVICE void for_problem(const optical_problem& p, int number, const Limits& most, Run run) {
    if constexpr (G::teams > 1) {
        const int64_t index = (int64_t)block_index() * G::teams + thread_index() / G::lanes;
        bool here = index < p.batch;
        if (here && p.offset_a)
            here = regime_of(p.offset_a[index + 1] - p.offset_a[index],
                             p.offset_b[index + 1] - p.offset_b[index], most)
                       .number == number;
        if (warp_any(here)) run(here ? index : -1, {number, 1, 1, 1, G::teams});
        return;
    }
    const int64_t index = number == CLUSTER ? block_index() / cluster_size() : block_index();
    int64_t n = p.n, m = p.m;
    if (p.offset_a) {
        n = p.offset_a[index + 1] - p.offset_a[index];
        m = p.offset_b[index + 1] - p.offset_b[index];
    }
    const Regime regime = regime_of(n, m, most);
    if (regime.number != number) return;
    if (number == CLUSTER && regime.blocks != cluster_size()) return;
    if (thread_index() >= 32 * regime.down * regime.across) return;
    run(index, regime);
}

typedef Group<8, 4, Span::warp, 0, 0, false, 8> FourInWarp;
typedef Group<8, 8, Span::warp, 0, 0, false, 16> PairInWarp;
typedef Group<8, 4, Span::warp> SmallWarp;
typedef Group<16, 8, Span::warp> LargeWarp;
typedef Group<16, 8, Span::block, 2, 2> SquareBlock;
typedef Group<16, 8, Span::block> OneBlock;
typedef Group<16, 8, Span::cluster> Cluster;
typedef Group<16, 8, Span::warp, 0, 0, true> FastWarp;
typedef Group<16, 8, Span::block, 2, 2, true> FastSquare;
typedef Group<16, 8, Span::block, 0, 0, true> FastBlock;
typedef Group<16, 8, Span::cluster, 0, 0, true> FastCluster;

#define OPTICAL_FORWARD(name, G, warps)                                                        \
    OPTICAL_KERNEL(optical_forward_##name, 32 * warps)                                         \
    (OPTICAL_CONSTANT optical_problem p, OPTICAL_CONSTANT optical_solution out,                \
     const Limits most, int number) {                                                          \
        for_problem<G>(p, number, most, [&](int64_t index, const Regime& regime) {             \
            forward<G>(p, out, index, regime);                                                 \
        });                                                                                    \
    }
#define OPTICAL_BACKWARD(name, G, warps, backward)                                             \
    OPTICAL_KERNEL(optical_##name, 32 * warps)                                                 \
    (OPTICAL_CONSTANT optical_problem p, OPTICAL_CONSTANT optical_gradient out,                \
     float* history, const Limits most, int number) {                                          \
        for_problem<G>(p, number, most, [&](int64_t index, const Regime& regime) {             \
            backward<G>(p, out, history, index, regime);                                       \
        });                                                                                    \
    }

// Some of the lines below, where a kernel is compiled at its first use.
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
