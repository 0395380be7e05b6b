// The scaling kernel K of one problem: its base potentials, its tiles, and products with it.
//
// The iteration of sinkhorn.h takes one exponential per entry and half-step. Scaling (Cuturi,
// NeurIPS 2013) yields the same iterates with one multiply-add: with base potentials F, G and
//
//     K_ij = exp((F_i + G_j - C_ij) / epsilon)
//     u_i  = 1 / sum_j K_ij b_j v_j        f_i = F_i + epsilon log u_i
//     v_j  = 1 / sum_i K_ij a_i u_i        g_j = G_j + epsilon log v_j
//
// The choice of the base makes this as safe as the log domain (Schmitzer, arXiv 1610.06519). Given
// g, it is the pair of transforms at temperature zero:
//
//     F_i = min_j (C_ij - g_j)      G_j = min_i (C_ij - F_i)      v_j = exp((g_j - G_j) / epsilon)
//
// Then K <= 1, and every row and every column holds an entry that is exactly 1: in row i it is the
// column that attains the minimum, which there also attains G_j = g_j, so v_j = 1. Every sum of
// the next iteration is therefore at least the mass of one entry: nothing overflows, and terms that
// underflow are below rounding. solver.h decides when the base is rebuilt.
//
// Between rebuilds a sweep reads K from cache once per full iteration: a block of rows is
// multiplied with b v, its u follows, and the same rows, still in the L1 cache, are added into the
// column sums. Rows are cut into chunks of fixed size whose column sums are added in order, so the
// result does not depend on the number of threads.
#pragma once

#include "cost.h"
#include "workspace.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

template <typename T>
struct ScalingKernel {
    typedef Simd<T> S;
    typedef typename S::Vector Vector;
    typedef typename S::Mask Mask;
    typedef Number<T> C;
    static constexpr int width = Tiling<T>::width, block = Tiling<T>::block;
    static constexpr int groups = Tiling<T>::groups;
    static constexpr int together = 4;  // exponentials computed side by side

    const Problem<T>& problem;
    const Cost<T>& cost;
    Workspace<T>& work;

    T epsilon, inverse_epsilon;  // temperature of K; above problem.epsilon while annealing
    T *base_f, *base_g;
    // Content of the tiles: K; K times b_j or times a_i, whose rows or columns sum to about 1; or
    // the plan, with f and g as the base.
    enum class Content { kernel, row_softmax, column_softmax, plan } content = Content::kernel;
    bool stored;  // all tiles are kept in `tiles`
    T* tiles;

    ScalingKernel(const Problem<T>& p, const Cost<T>& c, Workspace<T>& w)
        : problem(p), cost(c), work(w) {}

    void lay_out(Arena& shared, int64_t max_n, int64_t max_m, bool keep) {
        const int64_t rows = round_up(max_n, block), cols = round_up(max_m, block);
        base_f = shared.take<T>(rows), base_g = shared.take<T>(cols);
        stored = keep;
        if (stored) tiles = shared.take<T>(rows * cols);
    }

    void set_temperature(T value) {
        epsilon = value;
        inverse_epsilon = 1 / value;
    }

    // -------------------------------------------------------------------------------- tiles

    // Tile b, computed into a panel of the workspace unless it is stored.
    const T* tile(int64_t b) const {
        if (stored) return cost.tile_of(tiles, b);
        T* const panel = work.panel(b);
        make_tile(b, panel);
        return panel;
    }

    void build() {
        if (!stored) return;
        problem.own_chunks([&](int64_t, int64_t from, int64_t to) {
            for (int64_t b = from; b < to; ++b) make_tile(b, cost.tile_of(tiles, b));
        });
    }

    // The exponent of mass * exp(x / epsilon), for x = potentials - cost, and the factor beside it.
    // If the exponent is small against the logarithm of the mass, the factor is the mass, whose
    // rounding is relative; otherwise it is 1 and everything is in the exponent, rounded once.
    OPTICAL_INLINE Vector weigh(Vector& x, T inverse_epsilon, Vector log_mass, Vector mass) {
        const Vector alone = x * inverse_epsilon, whole = x * inverse_epsilon + log_mass;
        const Mask apart = (S::absolute(alone) < T(-0.75) * log_mass) &
                           (log_mass > -Bounds<T>::exponent);
        x = S::select(apart, alone, whole);
        return S::select(apart, mass, S::all(1));
    }

    __attribute__((noinline)) void make_tile(int64_t b, T* to) const {
        const T* c = cost.tile(b, to);
        const bool plan = content == Content::plan;
        const bool with_a = plan || content == Content::column_softmax;
        const bool with_b = plan || content == Content::row_softmax;
        const T *const rows = plan ? work.f : base_f, *const columns = plan ? work.g : base_g;
        const T *const log_b = problem.log_b, *const mass_b = problem.mass_b;
        const int64_t col_count = problem.col_count;
        const T scale = inverse_epsilon;
        T row[block], extra[block], mass[block];
        for (int r = 0; r < block; ++r) {
            row[r] = rows[b * block + r];
            extra[r] = with_a ? problem.log_a[b * block + r] : 0;
            mass[r] = with_a ? problem.mass_a[b * block + r] : 1;
        }
        for (int64_t j = 0; j < col_count; j += width) {
            const Vector gj = S::load(columns + j);
            const Vector log_bj = with_b ? S::load(log_b + j) : S::all(0);
            const Vector mass_bj = with_b ? S::load(mass_b + j) : S::all(1);
            for (int r = 0; r < block; r += together, c += together * width) {
                Vector x[together];
                for (int i = 0; i < together; ++i)
                    x[i] = (row[r + i] - S::load(c + i * width)) + gj;
                if (with_a || with_b) {
                    Vector factor[together];
                    for (int i = 0; i < together; ++i)
                        factor[i] =
                            weigh(x[i], scale, extra[r + i] + log_bj, mass[r + i] * mass_bj);
                    S::template exp<together>(x);
                    for (int i = 0; i < together; ++i) x[i] *= factor[i];
                } else {
                    for (int i = 0; i < together; ++i) x[i] *= scale;
                    S::template exp<together>(x);
                }
                for (int i = 0; i < together; ++i, to += width) S::store(to, x[i]);
            }
        }
    }

    // ----------------------------------------------------------------------------- the base

    // Chooses the base for the current g, and rebuilds K, v, b v and a u from it; the stopping rule
    // takes the row sums from a u. `first` also finds the unmatched entries.
    void rebase(bool first) {
        content = Content::kernel;
        problem.own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            T* nearest = work.partial + chunk * problem.col_count;
            for (int64_t j = 0; j < problem.col_count; j += width)
                S::store(nearest + j, S::all(C::infinity));
            for (int64_t b = from; b < to; ++b) rebase_rows(b, nearest, first);
        });
        sync(problem.team);
        problem.own_columns([&](int64_t j) { rebase_columns(j, first); });
        sync(problem.team);
        build();
        problem.own_rows([&](int64_t i) {
            if (first) clear_unmatched(work.f + i, work.unmatched_a + i);
            S::store(work.au + i, share_of_rows(i, S::load(work.f + i), S::load(base_f + i)));
        });
        if (first) count_unmatched();
    }

    // v and b v from g.
    void scale_columns(int64_t j) const {
        const Vector scaling =
            S::exp((S::load(work.g + j) - S::load(base_g + j)) * inverse_epsilon);
        S::store(work.v + j, scaling);
        S::store(work.bv + j, S::load(work.weight_b + j) * scaling);
    }

    // mass exp((potential - origin) / epsilon), 0 for unmatched entries. A single exponential,
    // because an extreme mass could be 0 and the exponential beside it infinite.
    Vector share_of_rows(int64_t i, Vector potential, Vector origin) const {
        const Vector exponent = (potential - origin) * inverse_epsilon + S::load(problem.log_a + i);
        return S::select(S::load(work.unmatched_a + i) > 0, S::all(0), S::exp(exponent));
    }
    Vector share_of_columns(int64_t j, Vector potential, Vector origin) const {
        const Vector exponent = (potential - origin) * inverse_epsilon + S::load(problem.log_b + j);
        return S::select(S::load(work.unmatched_b + j) > 0, S::all(0), S::exp(exponent));
    }

    // --------------------------------------------------------------------- products with K

    // Adds rows of a tile, each times its weight, to the column sums.
    template <int rows = block>
    OPTICAL_INLINE void add_rows(const T* k, const T* weights, int64_t cols, T* sums) {
        Vector weight[rows];
        for (int r = 0; r < rows; ++r) weight[r] = S::all(weights[r]);
        for (int64_t j = 0; j < cols; j += width, k += block * width)
            S::store(sums + j, weighted_sum<rows>(S::load(sums + j), k, weight));
    }

    // Multiplies K with the column weights and hands the row sums to row(lanes, i, sums), where
    // `lanes` is the vector type and i the first row. `row` returns the weights of these rows;
    // K' times them goes to column(j, sums). Results of `column` may be read after a barrier.
    template <typename Row, typename Column>
    OPTICAL_INLINE_MEMBER void sweep(const T* column_weights, T* row_weights, Row row,
                                     Column column) const {
        // Copies, because the compiler must assume that stores change members.
        const Problem<T> p = problem;
        const int64_t cols = p.col_count, chunks = p.chunks;
        T* const partial = work.partial;
        const T* const kept = stored ? tiles : nullptr;
        const auto tile_at = [&](int64_t b) __attribute__((always_inline)) {
            return kept ? kept + b * block * cols : tile(b);
        };
        p.own_chunks([&](int64_t c, int64_t from, int64_t to) __attribute__((always_inline)) {
            T* sums = partial + c * cols;
            for (int64_t j = 0; j < cols; j += width) S::store(sums + j, S::all(0));
            if constexpr (OPTICAL_MANY_REGISTERS)
                if (cols * (int64_t)sizeof(T) >= interleaved_bytes)
                    return sweep_interleaved(from, to, cols, tile_at, column_weights, row_weights,
                                             sums, row);
            sweep_blocks(from, to, cols, tile_at, column_weights, row_weights, sums, row);
        });
        sync(p.team);
        p.own_columns([&](int64_t j) __attribute__((always_inline)) {
            Vector sum = S::load(partial + j);
            for (int64_t c = 1; c < chunks; ++c) sum += S::load(partial + c * cols + j);
            column(j, sum);
        });
    }

    // column(j, sum) with the column sums of K, its rows weighted.
    template <typename Column>
    void multiply_transposed(const T* row_weights, Column column) const {
        const int64_t cols = problem.col_count;
        problem.own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            T* sums = work.partial + chunk * cols;
            for (int64_t j = 0; j < cols; j += width) S::store(sums + j, S::all(0));
            for (int64_t b = from; b < to; ++b)
                add_rows(tile(b), row_weights + b * block, cols, sums);
        });
        sync(problem.team);
        problem.own_columns([&](int64_t j) { column(j, column_sum(j)); });
    }

    // The column sums of all chunks.
    OPTICAL_INLINE_MEMBER Vector column_sum(int64_t j) const {
        Vector sum = S::load(work.partial + j);
        for (int64_t c = 1; c < problem.chunks; ++c)
            sum += S::load(work.partial + c * problem.col_count + j);
        return sum;
    }

private:
    // F of the rows of block b, and the contribution of these rows to G.
    void rebase_rows(int64_t b, T* nearest, bool first) {
        const int64_t cols = problem.col_count;
        const T *const tile = cost.tile(b, work.panel(0)), *const g = work.g;
        Vector least[block];
        for (int r = 0; r < block; ++r) least[r] = S::all(C::infinity);
        const T* c = tile;
        for (int64_t j = 0; j < cols; j += width, c += block * width) {
            const Vector gj = S::load(g + j);
            for (int r = 0; r < block; ++r)
                least[r] = S::min(least[r], S::load(c + r * width) - gj);
        }
        for (int q = 0; q < groups; ++q) {
            const int64_t i = b * block + q * width;
            const Vector base = S::template across<typename S::Minimum>(least + q * width);
            if (first)
                mark_unmatched(base, problem.mass_a + i, work.unmatched_a + i, work.weight_a + i);
            S::store(base_f + i, S::select(S::load(work.unmatched_a + i) > 0, S::all(0), base));
        }
        c = tile;
        const T* const base = base_f + b * block;
        for (int64_t j = 0; j < cols; j += width, c += block * width) {
            Vector best = S::load(nearest + j);
            for (int r = 0; r < block; ++r) best = S::min(best, S::load(c + r * width) - base[r]);
            S::store(nearest + j, best);
        }
    }

    // G of a vector of columns, and their v and b v.
    void rebase_columns(int64_t j, bool first) {
        Vector base = S::load(work.partial + j);
        for (int64_t c = 1; c < problem.chunks; ++c)
            base = S::min(base, S::load(work.partial + c * problem.col_count + j));
        if (first)
            mark_unmatched(base, problem.mass_b + j, work.unmatched_b + j, work.weight_b + j);
        S::store(base_g + j, S::select(S::load(work.unmatched_b + j) > 0, S::all(0), base));
        if (first) clear_unmatched(work.g + j, work.unmatched_b + j);
        scale_columns(j);
    }

    // An entry whose least cost is +inf has no allowed pair.
    static void mark_unmatched(Vector least, const T* mass, T* unmatched, T* weight) {
        const Mask forbidden = least == C::infinity;
        S::store(unmatched, S::select(forbidden, S::all(1), S::all(0)));
        S::store(weight, S::select(forbidden, S::all(0), S::load(mass)));
    }
    static void clear_unmatched(T* potential, const T* unmatched) {
        S::store(potential, S::select(S::load(unmatched) > 0, S::all(0), S::load(potential)));
    }
    void count_unmatched() {
        work.unmatched_mass_a = 0, work.unmatched_rows = work.unmatched_columns = false;
        for (int64_t i = 0; i < problem.n; ++i) {
            work.unmatched_mass_a += (double)(problem.mass_a[i] - work.weight_a[i]);
            work.unmatched_rows |= work.unmatched_a[i] > 0;
        }
        for (int64_t j = 0; j < problem.m; ++j) work.unmatched_columns |= work.unmatched_b[j] > 0;
    }

    // Adds one column vector of some rows, each times its weight, to their sum. Two accumulators,
    // because a single one would wait for its own previous addition.
    template <int rows>
    OPTICAL_INLINE Vector weighted_sum(Vector sum, const T* k, const Vector* weight) {
        Vector other = S::all(0);
        for (int r = 0; r < rows; r += 2) {
            sum += S::load(k + r * width) * weight[r];
            other += S::load(k + (r + 1) * width) * weight[r + 1];
        }
        return sum + other;
    }

    // Reduces one accumulator per row to the sums of rows i, i + 1, ..., and stores the weights
    // that `row` returns for them.
    template <typename Lanes, int rows, typename Row>
    OPTICAL_INLINE void finish_rows(int64_t i, Vector* lane_sums, T* row_weights, const Row& row) {
        for (int r = 0; r < rows; r += Lanes::width)
            Lanes::store(row_weights + i + r,
                         row(Lanes(), i + r,
                             S::template across_into<typename S::Sum, Lanes>(lane_sums + r)));
    }

    // Plain sweep: reads each tile twice in quick succession. The column pass of a tile follows the
    // row pass of the next one, which hides the latency of `row`.
    template <typename Tile, typename Row>
    OPTICAL_INLINE void sweep_blocks(int64_t from, int64_t to, int64_t cols, const Tile& tile_at,
                                     const T* column_weights, T* row_weights, T* sums,
                                     const Row& row) {
        const T* last = nullptr;
        for (int64_t b = from; b < to; ++b) {
            const T *const current = tile_at(b), *k = current;
            Vector lane_sums[block];
            for (int r = 0; r < block; ++r) lane_sums[r] = S::all(0);
            for (int64_t j = 0; j < cols; j += width, k += block * width) {
                const Vector weight = S::load(column_weights + j);
                for (int r = 0; r < block; ++r) lane_sums[r] += S::load(k + r * width) * weight;
            }
            finish_rows<S, block>(b * block, lane_sums, row_weights, row);
            if (last) add_rows(last, row_weights + (b - 1) * block, cols, sums);
            last = current;
        }
        add_rows(last, row_weights + (to - 1) * block, cols, sums);
    }

    // Fast sweep, for 32 registers and rows of at least this many bytes (measured: half as wide
    // gains nothing). Eight rows at a time, with the column pass of the previous eight interleaved
    // with the row pass of the next: loads from the L2 cache overlap work on the L1 cache, which
    // has to hold only these rows.
    static constexpr int64_t interleaved_bytes = 512;
    static constexpr int few = 8;
    typedef Simd<T, few * (int)sizeof(T) < OPTICAL_VECTOR_BYTES ? few * (int)sizeof(T)
                                                                : OPTICAL_VECTOR_BYTES> Few;
    template <typename Tile, typename Row>
    OPTICAL_INLINE void sweep_interleaved(int64_t from, int64_t to, int64_t cols,
                                          const Tile& tile_at, const T* column_weights,
                                          T* row_weights, T* sums, const Row& row) {
        const T *current = nullptr, *last = nullptr;
        for (int64_t i = from * block; i < to * block; i += few) {
            if (i % block == 0) current = tile_at(i / block);
            const T *const first = current + i % block * width, *k = first;
            Vector lane_sums[few], weight[few];
            for (int r = 0; r < few; ++r) lane_sums[r] = S::all(0);
            // The first eight rows have no predecessor: they add themselves with weights of zero.
            for (int r = 0; r < few; ++r) weight[r] = S::all(last ? row_weights[i - few + r] : 0);
            const T* before = last ? last : first;
            for (int64_t j = 0; j < cols; j += width, k += block * width, before += block * width) {
                const Vector of_column = S::load(column_weights + j);
                for (int r = 0; r < few; ++r) lane_sums[r] += S::load(k + r * width) * of_column;
                S::store(sums + j, weighted_sum<few>(S::load(sums + j), before, weight));
            }
            finish_rows<Few, few>(i, lane_sums, row_weights, row);
            last = first;
        }
        add_rows<few>(last, row_weights + to * block - few, cols, sums);
    }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
