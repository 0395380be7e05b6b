// Gradients of one problem in all three modes, from the potentials of its solution.
//
// G = dL/dC of a problem is made tile by tile: from the plan P with, in the envelope mode,
//
//     G_ij = (grad_value + grad_value_linear) P_ij
//
// in the implicit mode plus grad_value_linear / epsilon P_ij (w_i + z_j - C_ij), and from the
// reverse sweep of unrolled.h. G is the gradient of a given cost. From vectors, each tile is
// multiplied with them at once, or all tiles are kept for both sides where the problem is small; a
// large problem takes a second pass with its sides exchanged.
#pragma once

#include "unrolled.h"
#include "vector_gradient.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

template <typename T>
struct Gradient {
    typedef Simd<T> S;
    typedef typename S::Vector Vector;
    typedef Number<T> C;
    static constexpr int width = Tiling<T>::width, block = Tiling<T>::block;

    Solver<T> solver;
    Unrolled<T> unrolled{solver};
    VectorGradient<T> vectors{solver.problem, solver.cost};

    explicit Gradient(const Team& team) : solver(team) {}

    void lay_out(Arena& shared, Arena& own, const optical_problem& batch, bool swapped) {
        const bool unroll = batch.gradient == OPTICAL_UNROLL;
        solver.lay_out(shared, own, batch, swapped, unroll, unroll);
        const int64_t rows = round_up(swapped ? batch.m : batch.n, block);
        const int64_t cols = round_up(swapped ? batch.n : batch.m, block);
        tiles = keeps_tiles(batch) ? shared.take<T>(rows * cols) : nullptr;
        if (unroll) unrolled.lay_out(shared, rows, cols);
        vectors.lay_out(shared, batch, rows, cols);
    }

    // The gradients of problem `index`.
    static void run(const optical_problem& batch, const optical_gradient& out, int64_t index,
                    void* shared, void* own, const Team& team) {
        // If G is not kept, the vectors of the columns take a second pass, as rows.
        const bool twice = batch.kind != OPTICAL_GIVEN && !keeps_tiles(batch);
        for (int pass = 0; pass < (twice ? 2 : 1); ++pass) {
            Gradient gradient(team);
            Arena of_team = {(uintptr_t)shared}, of_thread = {(uintptr_t)own};
            gradient.lay_out(of_team, of_thread, batch, pass == 1);
            gradient.differentiate(batch, out, index, pass == 1, twice);
            sync(team);
        }
    }

private:
    Problem<T>& problem = solver.problem;
    const Cost<T>& cost = solver.cost;
    ScalingKernel<T>& kernel = solver.kernel;
    Workspace<T>& work = solver.work;
    T* tiles;  // G, or null
    Upstream<T> up;

    // One problem in the caller's arrays, rows first, or columns first if the sides are exchanged.
    struct Arrays {
        Side a, b;
        T *grad_x, *grad_y, *grad_a, *grad_b;
        const T *f, *g, *w, *z;

        Arrays(const optical_problem& batch, const optical_gradient& out, int64_t index,
               bool swapped)
            : a(rows_of(batch, index)), b(columns_of(batch, index)) {
            const bool implicit = batch.gradient == OPTICAL_IMPLICIT;
            grad_x = (T*)out.grad_x, grad_y = (T*)out.grad_y;
            if (grad_x)
                grad_x += batch.kind == OPTICAL_GIVEN ? index * batch.n * batch.m
                                                      : a.first * batch.dim;
            if (grad_y) grad_y += b.first * batch.dim;
            grad_a = out.grad_log_a ? (T*)out.grad_log_a + a.first : nullptr;
            grad_b = out.grad_log_b ? (T*)out.grad_log_b + b.first : nullptr;
            f = (const T*)out.f + a.first, g = (const T*)out.g + b.first;
            w = implicit ? (const T*)out.w + a.first : nullptr;
            z = implicit ? (const T*)out.z + b.first : nullptr;
            if (!swapped) return;
            exchange(a, b), exchange(grad_x, grad_y), exchange(grad_a, grad_b);
            exchange(f, g), exchange(w, z);
        }
    };

    static bool keeps_tiles(const optical_problem& batch) {
        if (batch.gradient == OPTICAL_UNROLL) return true;
        return batch.kind != OPTICAL_GIVEN &&
               round_up(batch.n, block) * round_up(batch.m, block) <= stored_entries;
    }

    void differentiate(const optical_problem& batch, const optical_gradient& out, int64_t index,
                       bool swapped, bool twice) {
        const Arrays at(batch, out, index, swapped);
        const bool from_matrix = batch.kind == OPTICAL_GIVEN;
        int32_t status;
        bool valid = solver.read(batch, index, swapped, status);
        if (valid && batch.gradient == OPTICAL_UNROLL && has_nan(at.f)) {
            // Its iterations overflowed: dispatch.cpp has left no memory to run them again.
            valid = false, status = OPTICAL_INFEASIBLE;
        }
        clear(batch, at, valid, twice);
        if (status == OPTICAL_INFEASIBLE && problem.team.rank == 0)
            spoil(batch, out, index, at, twice);
        sync(problem.team);
        if (!valid) return;
        if (at.grad_x && !from_matrix) vectors.pack_y();
        if (at.grad_y && !from_matrix && !twice) vectors.pack_x();
        sync(problem.team);

        up.value = entry(out.grad_value, index), up.linear = entry(out.grad_value_linear, index);
        up.total = up.value + up.linear;
        if (batch.gradient == OPTICAL_UNROLL) unroll(batch, out, index, at);
        else of_solution(batch, at, twice);
        if (from_matrix || twice) return;
        sync(problem.team);
        if (at.grad_x)
            problem.own_chunks([&](int64_t, int64_t from, int64_t to) {
                vectors.multiply_rows(cost.tile_of(tiles, from), from, to, at.grad_x);
            });
        if (at.grad_y)
            problem.own_segments([&](int64_t, int64_t from, int64_t to) {
                vectors.multiply_columns(tiles, from, to, at.grad_y);
            });
    }

    // Zeros the gradients of padding and of malformed problems, which no later step writes.
    void clear(const optical_problem& batch, const Arrays& at, bool valid, bool twice) const {
        if (problem.team.rank != 0) return;
        const int64_t width_x = batch.kind == OPTICAL_GIVEN ? batch.m : batch.dim;
        const bool full = valid && problem.n == at.a.count && problem.m == at.b.count;
        if (at.grad_x && !full) fill(at.grad_x, at.a.count * width_x, 0);
        if (at.grad_y && !full && !twice) fill(at.grad_y, at.b.count * batch.dim, 0);
        fill(at.grad_a, at.a.count, 0);
        if (!twice) fill(at.grad_b, at.b.count, 0);
    }

    // The gradients of a malformed problem: NaN for its valid entries, as its outputs are, so that
    // the caller notices. Without an upstream gradient its outputs were not used: 0.
    void spoil(const optical_problem& batch, const optical_gradient& out, int64_t index,
               const Arrays& at, bool twice) const {
        const T nan = (T)__builtin_nan("");
        const int64_t n = problem.n, m = problem.m, dim = batch.dim;
        const int64_t *const rows = problem.row_index, *const columns = problem.col_index;
        if (!is_used(batch, out, index)) return;
        const bool given = batch.kind == OPTICAL_GIVEN;
        for (int64_t i = 0; at.grad_x && i < n; ++i) {
            if (!given) fill(at.grad_x + rows[i] * dim, dim, nan);
            else
                for (int64_t j = 0; j < m; ++j) at.grad_x[rows[i] * batch.m + columns[j]] = nan;
        }
        for (int64_t i = 0; at.grad_a && i < n; ++i) at.grad_a[rows[i]] = nan;
        if (twice) return;
        for (int64_t j = 0; at.grad_y && j < m; ++j) fill(at.grad_y + columns[j] * dim, dim, nan);
        for (int64_t j = 0; at.grad_b && j < m; ++j) at.grad_b[columns[j]] = nan;
    }

    bool has_nan(const T* f) const {
        bool nan = false;
        for (int64_t i = 0; i < problem.n; ++i)
            nan |= f[problem.row_index[i]] != f[problem.row_index[i]];
        return nan;
    }

    // Whether any upstream gradient of a problem differs from 0.
    static bool is_used(const optical_problem& batch, const optical_gradient& out, int64_t index) {
        const Side a = rows_of(batch, index), b = columns_of(batch, index);
        bool used = entry(out.grad_value, index) != 0;
        used |= entry(out.grad_value_linear, index) != 0;
        const T *const f = (const T*)out.grad_f, *const g = (const T*)out.grad_g;
        for (int64_t i = a.first; f && i < a.first + a.count; ++i) used |= f[i] != 0;
        for (int64_t j = b.first; g && j < b.first + b.count; ++j) used |= g[j] != 0;
        return used;
    }

    // An entry of an array that may be null, for zeros.
    static T entry(const void* array, int64_t index) {
        return array ? ((const T*)array)[index] : (T)0;
    }

    // Null arrays are left out here and in `scatter`.
    static void fill(T* to, int64_t count, T value) {
        for (int64_t i = 0; to && i < count; ++i) to[i] = value;
    }

    static void scatter(T* to, const int64_t* index, int64_t at, int64_t count, Vector values) {
        for (int lane = 0; to && lane < width && at + lane < count; ++lane)
            to[index[at + lane]] = values[lane];
    }

    void unroll(const optical_problem& batch, const optical_gradient& out, int64_t index,
                const Arrays& at) {
        unrolled.up = up, unrolled.tiles = tiles;
        unrolled.differentiate(batch, out, index, at.a, at.b);
        problem.own_rows([&](int64_t i) {
            scatter(at.grad_a, problem.row_index, i, problem.n, S::load(unrolled.bar_a + i));
        });
        problem.own_columns([&](int64_t j) {
            scatter(at.grad_b, problem.col_index, j, problem.m, S::load(unrolled.bar_b + j));
        });
        if (batch.kind == OPTICAL_GIVEN && at.grad_x)
            problem.own_chunks([&](int64_t, int64_t from, int64_t to) {
                for (int64_t k = from; k < to; ++k)
                    write(cost.tile_of(tiles, k), k, at.grad_x, batch.m);
            });
    }

    // ------------------------------------------------------- envelope and implicit gradients

    void of_solution(const optical_problem& batch, const Arrays& at, bool twice) {
        const bool implicit = batch.gradient == OPTICAL_IMPLICIT;
        work.set_potentials(at.f, at.g);
        if (problem.penalty_a() || problem.penalty_b()) {
            kernel.rebase(true);  // finds the unmatched entries
            kernel.content = ScalingKernel<T>::Content::plan;
            sync(problem.team);
        }
        work.gather_rows(at.w, work.w);
        work.gather_columns(at.z, work.z);
        sync(problem.team);
        const bool rows_only = twice || !implicit;
        problem.own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            T* sums = work.partial + chunk * problem.col_count;
            if (!rows_only) fill(sums, problem.col_count, 0);
            if (tiles) cost.fill(from, to, cost.tile_of(tiles, from));
            for (int64_t k = from; k < to; ++k) {
                T* tile = tiles ? cost.tile_of(tiles, k) : work.panel(0);
                if (!tiles) cost.fill(k, k + 1, tile);
                make_tile(k, tile, implicit, rows_only ? nullptr : sums);
                if (at.grad_x && batch.kind == OPTICAL_GIVEN) write(tile, k, at.grad_x, batch.m);
                if (at.grad_x && twice) vectors.multiply_rows(tile, k, k + 1, at.grad_x);
            }
        });
        sync(problem.team);
        write_mass_gradients(at, implicit, twice);
    }

    void write_mass_gradients(const Arrays& at, bool implicit, bool twice) {
        const Problem<T>& p = problem;
        p.own_rows([&](int64_t i) {
            Vector d = mass_gradient(p.log_a, p.mass_a, work.unmatched_a, work.f, i, p.rho_a,
                                     p.total_b);
            if (implicit) d += adjoint_gradient(work.row_mass, work.w, i, p.rho_a);
            scatter(at.grad_a, p.row_index, i, p.n, d);
        });
        if (twice) return;
        p.own_columns([&](int64_t j) {
            Vector d = mass_gradient(p.log_b, p.mass_b, work.unmatched_b, work.g, j, p.rho_b,
                                     p.total_a);
            if (implicit) {
                S::store(work.col_mass + j, kernel.column_sum(j));
                d += adjoint_gradient(work.col_mass, work.z, j, p.rho_b);
            }
            scatter(at.grad_b, p.col_index, j, p.m, d);
        });
    }

    // Turns tile b of the cost into one of G. Implicit: the plan's row sums go to row_mass, and its
    // column sums are added to `sums`.
    __attribute__((noinline)) void make_tile(int64_t b, T* to, bool implicit, T* sums) {
        if (implicit) make_tile<true>(b, to, sums);
        else make_tile<false>(b, to, sums);
    }

    template <bool implicit>
    OPTICAL_INLINE_MEMBER void make_tile(int64_t b, T* to, T* sums) {
        static constexpr int together = ScalingKernel<T>::together;
        const T scale = kernel.inverse_epsilon, upstream = up.total, slope = up.linear * scale;
        const T *const f = work.f + b * block, *const g = work.g;
        const T *const w = work.w + b * block, *const z = work.z;
        const T *const log_a = problem.log_a + b * block, *const log_b = problem.log_b;
        const T *const mass_a = problem.mass_a + b * block, *const mass_b = problem.mass_b;
        const int64_t col_count = problem.col_count;
        Vector row[block];
        for (int r = 0; r < block; ++r) row[r] = S::all(0);
        for (int64_t j = 0; j < col_count; j += width) {
            const Vector gj = S::load(g + j), log_bj = S::load(log_b + j), zj = S::load(z + j);
            const Vector mass_bj = S::load(mass_b + j);
            Vector column = S::all(0);
            for (int r = 0; r < block; r += together, to += together * width) {
                Vector x[together], mass[together], factor[together];
                for (int i = 0; i < together; ++i) {
                    const Vector cost_ij = S::load(to + i * width);
                    x[i] = (f[r + i] - cost_ij) + gj;
                    mass[i] = ScalingKernel<T>::weigh(x[i], scale, log_a[r + i] + log_bj,
                                                      mass_a[r + i] * mass_bj);
                    if constexpr (implicit)
                        factor[i] = upstream + slope * ((w[r + i] + zj) -
                                                        Cost<T>::finite(to + i * width));
                    else
                        factor[i] = S::all(upstream);
                }
                S::template exp<together>(x);
                for (int i = 0; i < together; ++i) {
                    x[i] *= mass[i];
                    if constexpr (implicit) row[r + i] += x[i], column += x[i];
                    S::store(to + i * width, x[i] * factor[i]);
                }
            }
            if (implicit && sums) S::store(sums + j, S::load(sums + j) + column);
        }
        if constexpr (implicit)
            for (int q = 0; q < Tiling<T>::groups; ++q)
                S::store(work.row_mass + b * block + q * width,
                         S::template across<typename S::Sum>(row + q * width));
    }

    // Partial derivative of the dual value by a log-mass; an unmatched entry gives up all its mass.
    // Under a strong penalty nearly all mass is left, so the mass given up is computed directly.
    Vector mass_gradient(const T* log_mass, const T* mass, const T* unmatched,
                         const T* potential, int64_t i, T rho, double other_total) const {
        const Vector masses = S::load(mass + i);
        const T epsilon = problem.epsilon;
        if (!(rho < C::infinity))
            return up.value * masses * (S::load(potential + i) + epsilon * (T)(other_total - 1));
        Vector gradient;
        for (int lane = 0; lane < width; ++lane, ++i) {
            const double held = masses[lane], exponent = -(double)potential[i] / (double)rho;
            double given_up = held;
            if (!(unmatched[i] > 0))
                given_up = exponent < Bounds<T>::exponent
                               ? -held * __builtin_expm1(exponent)
                               : held - __builtin_exp((double)log_mass[i] + exponent);
            const double excess = held * other_total - (held - given_up);
            gradient[lane] = (T)((double)up.value *
                                 ((double)rho * given_up + (double)epsilon * excess));
        }
        return gradient;
    }

    Vector adjoint_gradient(const T* sums, const T* solution, int64_t i, T rho) const {
        const T factor = rho < C::infinity ? 1 + problem.epsilon / rho : (T)1;
        return (up.linear * factor) * S::load(sums + i) * S::load(solution + i);
    }

    // Writes a tile into rows of an (n, m) matrix.
    void write(const T* tile, int64_t b, T* to, int64_t columns) const {
        const int64_t* const index = problem.col_index;
        const int64_t m = problem.m;
        const bool contiguous = index[m - 1] - index[0] == m - 1;
        for (int r = 0; r < block && b * block + r < problem.n; ++r) {
            T* row = to + problem.row_index[b * block + r] * columns;
            const T* from = tile + r * width;
            for (int64_t j = 0; j < m; j += width, from += block * width) {
                const Vector values = S::load(from);
                if (contiguous && j + width <= m) S::store_unaligned(row + index[0] + j, values);
                else scatter(row, index, j, m, values);
            }
        }
    }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
