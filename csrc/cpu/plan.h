// The plan of given potentials, or its exponent, in the layout of the caller.
//
//     log P_ij = (f_i + g_j - C_ij) / epsilon + log a_i + log b_j
//
// The terms of the exponent are large where its sum is small, so it is computed in double precision
// and the result is rounded once. Costs are computed or read block by block, and only the output
// has n x m entries.
#pragma once

#include "solver.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

template <typename T>
struct Plan {
    typedef Simd<double> D;
    typedef typename D::Vector Vector;
    typedef Simd<T, D::width * (int)sizeof(T)> Narrow;  // as many lanes
    static constexpr int width = D::width, block = Tiling<T>::block;
    static constexpr int parts = Tiling<T>::width / width;  // of a vector of costs
    static constexpr int together = 4;                      // exponentials computed side by side
    static constexpr int rows = together / parts;

    Solver<T>& solver;
    const Problem<T>& problem;
    Workspace<T>& work;

    explicit Plan(Solver<T>& s) : solver(s), problem(s.problem), work(s.work) {}

    void write(const optical_problem& batch, const PlanOutput& output, int64_t index) {
        const Side a = rows_of(batch, index), b = columns_of(batch, index);
        log = output.log != 0, columns = b.count;
        to = (T*)output.out + index * batch.n * batch.m;
        int32_t status;
        bool valid = solver.read_but_costs(batch, index, false, status);
        if (problem.n < a.count || problem.m < b.count || status == OPTICAL_EMPTY)
            fill_rows(a.count);
        sync(problem.team);
        if (status == OPTICAL_EMPTY) return;
        work.set_potentials((const T*)output.f + a.first, (const T*)output.g + b.first);
        problem.own_chunks([&](int64_t, int64_t from, int64_t end) {
            for (int64_t k = from; k < end; ++k) {
                valid &= solver.cost.fill(k, k + 1, work.panel(0));
                write_block(k, work.panel(0));
            }
        });
        if (work.all_valid(valid)) return;
        problem.own_chunks([&](int64_t, int64_t from, int64_t end) {
            for (int64_t i = from * block; i < end * block && i < problem.n; ++i)
                for (int64_t j = 0; j < problem.m; ++j)
                    row(i)[problem.col_index[j]] = (T)__builtin_nan("");
        });
    }

private:
    bool log;
    int64_t columns;
    T* to;

    T* row(int64_t i) const { return to + problem.row_index[i] * columns; }

    // What padding and forbidden pairs hold, in all rows.
    void fill_rows(int64_t count) const {
        const T nothing = log ? -Number<T>::infinity : (T)0;
        for (int64_t i = problem.team.rank; i < count; i += problem.team.size)
            for (int64_t j = 0; j < columns; ++j) to[i * columns + j] = nothing;
    }

    __attribute__((noinline)) void write_block(int64_t b, const T* costs) const {
        for (int r = 0; r < block && b * block + r < problem.n; r += rows)
            write_rows(b * block + r, costs + r * Tiling<T>::width);
    }

    // Some rows from row i on, whose costs begin at `costs`.
    OPTICAL_INLINE_MEMBER void write_rows(int64_t i, const T* costs) const {
        constexpr int step = Tiling<T>::width;
        const int64_t *const index = problem.col_index, m = problem.m;
        const bool adjacent = index[m - 1] - index[0] == m - 1, exponentiate = !log;
        const double scale = 1 / (double)problem.epsilon;
        const T *const g = work.g, *const log_b = problem.log_b;
        double f[rows], log_a[rows];
        T* out[rows];
        int count = 0;
        for (; count < rows && i + count < problem.n; ++count) out[count] = row(i + count);
        for (int r = 0; r < rows; ++r)
            f[r] = (double)work.f[i + r], log_a[r] = (double)problem.log_a[i + r];
        for (int64_t j = 0; j < m; j += step, costs += block * step) {
            Vector x[together];
            for (int p = 0; p < parts; ++p) {
                const Vector gj = load(g + j + p * width), log_bj = load(log_b + j + p * width);
                for (int r = 0; r < rows; ++r) {
                    const Vector cost = load(costs + r * step + p * width);
                    const Vector exponent = ((f[r] + gj) - cost) * scale + (log_a[r] + log_bj);
                    x[r * parts + p] = D::select(cost < Number<double>::infinity, exponent,
                                                 D::all(-Number<double>::infinity));
                }
            }
            if (exponentiate) D::template exp<together>(x);
            for (int r = 0; r < count; ++r)
                for (int p = 0; p < parts; ++p) {
                    const int64_t at = j + p * width;
                    const auto values =
                        __builtin_convertvector(x[r * parts + p], typename Narrow::Vector);
                    if (adjacent && at + width <= m) {
                        Narrow::store_unaligned(out[r] + index[0] + at, values);
                        continue;
                    }
                    for (int lane = 0; lane < width && at + lane < m; ++lane)
                        out[r][index[at + lane]] = values[lane];
                }
        }
    }

    OPTICAL_INLINE Vector load(const T* from) {
        return __builtin_convertvector(Narrow::load(from), Vector);
    }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
