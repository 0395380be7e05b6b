// Objective values and marginals of a solution: sums over its plan.
//
// The plan is P_ij = K_ij (a u)_i (b v)_j. With r = P 1 and c = P' 1, `value` of sinkhorn.h is
//
//     sum_ij P_ij (f_i + g_j) + epsilon (|a| |b| - |P|) + rho_a KL(r | a) + rho_b KL(c | b)
#pragma once

#include "solver.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

// Relative difference of the masses above which no plan has both marginals.
constexpr double unequal = 1e-3;

template <typename T>
struct Objective {
    typedef Simd<T> S;
    typedef typename S::Vector Vector;
    typedef Number<T> C;
    static constexpr int width = Tiling<T>::width, block = Tiling<T>::block;
    static constexpr int groups = Tiling<T>::groups;

    const Problem<T>& problem;
    const Cost<T>& cost;
    const ScalingKernel<T>& kernel;
    Workspace<T>& work;

    explicit Objective(Solver<T>& solver)
        : problem(solver.problem), cost(solver.cost), kernel(solver.kernel), work(solver.work) {}

    // Sums over the plan, finished in double precision. Leaves the sums of P in row_mass and
    // col_mass, those of P C in row_cost and, with `columns`, in col_cost.
    Totals sum_up(bool columns) {
        problem.own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            T* sums = work.partial + chunk * problem.col_count;
            for (int64_t j = 0; j < problem.col_count; j += width) S::store(sums + j, S::all(0));
            for (int64_t b = from; b < to; ++b) add_block(b, sums);
            work.row_totals[chunk] = totals_of_rows(from * block, to * block);
        });
        sync(problem.team);
        problem.own_segments([&](int64_t segment, int64_t from, int64_t to) {
            for (int64_t j = from; j < to; j += width)
                S::store(work.col_mass + j, S::load(work.bv + j) * kernel.column_sum(j));
            work.col_totals[segment] = totals_of_columns(from, to);
        });
        sync(problem.team);
        if (columns) sum_column_costs();
        Totals all;
        for (int64_t c = 0; c < problem.chunks; ++c) accumulate(all, work.row_totals[c]);
        for (int64_t s = 0; s < problem.segments; ++s) accumulate(all, work.col_totals[s]);
        return all;
    }

    // The marginal error of the plan of f and g, where the sums are those of u and v.
    double error_of_potentials() {
        T *const rows = work.f_next, *const columns = work.g_next, *const au = work.u_next;
        const T* const bv = work.v_next;
        kernel.sweep(
            bv, work.w,
            [&](auto lanes, int64_t i, auto sum) {
                typedef decltype(lanes) L;
                const auto share = L::load(au + i);
                L::store(rows + i, share * sum);
                return share;
            },
            [&](int64_t j, Vector sum) { S::store(columns + j, S::load(bv + j) * sum); });
        sync(problem.team);
        double error = 0;
        for (int64_t i = 0; i < problem.n; ++i)
            error += marginal_error((double)rows[i], problem.mass_a[i], problem.log_a[i],
                                    work.unmatched_a[i], work.f[i], problem.rho_a);
        for (int64_t j = 0; j < problem.m; ++j)
            error += marginal_error((double)columns[j], problem.mass_b[j], problem.log_b[j],
                                    work.unmatched_b[j], work.g[j], problem.rho_b);
        sync(problem.team);
        return error;
    }

    double value(const Totals& t) const {
        const double excess = problem.total_a * problem.total_b - t.mass;
        return t.dual + (double)problem.epsilon * excess + t.divergence;
    }

    // False: no plan has the marginals that are fixed.
    bool feasible() const {
        const bool fixed_a = !problem.penalty_a(), fixed_b = !problem.penalty_b();
        const double a = problem.total_a, b = problem.total_b, larger = a > b ? a : b;
        if (fixed_a && fixed_b && __builtin_fabs(a - b) > unequal * larger) return false;
        return !(fixed_a && work.unmatched_rows) && !(fixed_b && work.unmatched_columns);
    }

    // log(sum / mass), of which a large rho magnifies every error. The quotient is preferred: `sum`
    // is a multiple of the mass, whose rounding cancels. Logarithms are subtracted if the mass is
    // denormal or the quotient infinite.
    static double log_ratio(double sum, T mass, T log_mass) {
        const double ratio = sum / (double)mass;
        return mass > Bounds<T>::least_divisor && ratio < Number<double>::infinity
                   ? __builtin_log(ratio)
                   : __builtin_log(sum) - (double)log_mass;
    }

private:
    // Row sums of P and P C of a block, and its part of the column sums of K' (a u).
    OPTICAL_INLINE_MEMBER void add_block(int64_t b, T* sums) {
        const int64_t cols = problem.col_count;
        const T* const bv = work.bv;
        Vector mass[block], spent[block];
        const T *k = kernel.tile(b), *c = cost.tile(b, work.panel(b + 1));
        kernel.add_rows(k, work.au + b * block, cols, sums);
        for (int r = 0; r < block; ++r) mass[r] = spent[r] = S::all(0);
        for (int64_t j = 0; j < cols; j += width) {
            const Vector weight = S::load(bv + j);
            for (int r = 0; r < block; ++r, c += width, k += width) {
                const Vector share = S::load(k) * weight;
                mass[r] += share;
                spent[r] += share * Cost<T>::finite(c);
            }
        }
        for (int q = 0; q < groups; ++q) {
            const int64_t i = b * block + q * width;
            const Vector share = S::load(work.au + i);
            S::store(work.row_mass + i,
                     share * S::template across<typename S::Sum>(mass + q * width));
            S::store(work.row_cost + i,
                     share * S::template across<typename S::Sum>(spent + q * width));
        }
    }

    Totals totals_of_rows(int64_t from, int64_t to) const {
        Totals t;
        for (int64_t i = from; i < to && i < problem.n; ++i) {
            const double mass = (double)work.row_mass[i];
            t.linear += (double)work.row_cost[i];
            t.dual += mass * (double)work.f[i];
            t.mass += mass;
            add_marginal(t, mass, problem.mass_a[i], problem.log_a[i], work.unmatched_a[i],
                         work.f[i], problem.rho_a);
        }
        return t;
    }

    Totals totals_of_columns(int64_t from, int64_t to) const {
        Totals t;
        for (int64_t j = from; j < to && j < problem.m; ++j) {
            t.dual += (double)work.col_mass[j] * (double)work.g[j];
            add_marginal(t, (double)work.col_mass[j], problem.mass_b[j], problem.log_b[j],
                         work.unmatched_b[j], work.g[j], problem.rho_b);
        }
        return t;
    }

    void sum_column_costs() {
        problem.own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            const int64_t cols = problem.col_count;
            T* sums = work.partial + chunk * cols;
            for (int64_t j = 0; j < cols; j += width) S::store(sums + j, S::all(0));
            for (int64_t b = from; b < to; ++b) {
                const T *k = kernel.tile(b), *c = cost.tile(b, work.panel(b + 1));
                const T* weight = work.au + b * block;
                for (int64_t j = 0; j < cols; j += width) {
                    Vector sum = S::load(sums + j);
                    for (int r = 0; r < block; ++r, c += width, k += width)
                        sum += (S::load(k) * weight[r]) * Cost<T>::finite(c);
                    S::store(sums + j, sum);
                }
            }
        });
        sync(problem.team);
        problem.own_columns([&](int64_t j) {
            S::store(work.col_cost + j, S::load(work.bv + j) * kernel.column_sum(j));
        });
        sync(problem.team);
    }

    static void accumulate(Totals& to, const Totals& t) {
        to.linear += t.linear, to.dual += t.dual, to.mass += t.mass;
        to.error += t.error, to.divergence += t.divergence;
    }

    // Error of one marginal `sum`, against the mass its potential asks for (none for unmatched
    // entries). In double precision no float32 mass underflows here.
    static double marginal_error(double sum, T mass, T log_mass, T unmatched, T potential, T rho) {
        if (!(rho < C::infinity)) return __builtin_fabs(sum - (double)mass);
        const double exponent = (double)log_mass - (double)potential / (double)rho;
        return __builtin_fabs(sum - (unmatched > 0 ? 0 : __builtin_exp(exponent)));
    }

    // Adds the error of one marginal and its penalty.
    static void add_marginal(Totals& t, double sum, T mass, T log_mass, T unmatched, T potential,
                             T rho) {
        t.error += marginal_error(sum, mass, log_mass, unmatched, potential, rho);
        if (!(rho < C::infinity)) return;
        const double logs = sum > 0 ? sum * log_ratio(sum, mass, log_mass) : 0;
        t.divergence += (double)rho * (logs - sum + (double)mass);
    }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
