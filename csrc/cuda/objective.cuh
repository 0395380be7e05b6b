// The objective values and marginals of a solution.
#pragma once

#include "solver.cuh"

namespace optical {
namespace cuda {

template <typename G>
struct Objective {
    static constexpr int RI = G::RI, RJ = G::RJ, OI = G::OI, OJ = G::OJ;

    Solver<G>& solver;
    Problem<G>& problem;
    Workspace<G>& work;
    G& grid;
    double value, linear, error;

    OPTICAL_DEVICE explicit Objective(Solver<G>& solver)
        : solver(solver), problem(solver.problem), work(solver.work), grid(solver.problem.grid) {}

    // log(marginal / mass), or 0 if the marginal is 0. Double precision, because a large rho
    // magnifies rounding errors. The mass may underflow where its logarithm does not.
    OPTICAL_DEVICE static double log_ratio(float marginal, float mass, float log_mass) {
        if (!(marginal > 0)) return 0;
        return mass > 1e-30f ? logarithm((double)marginal / (double)mass)
                             : logarithm((double)marginal) - (double)log_mass;
    }

    // Adds one row or column to the sums of linear cost, dual value, mass, marginal error and
    // divergence.
    OPTICAL_DEVICE static void add_entry(double (&t)[5], float marginal, float spent, float mass,
                                        float log_mass, float weight, float potential, float rho,
                                        bool penalty) {
        const double sum = marginal;
        t[0] += spent, t[1] += sum * potential, t[2] += sum;
        const float required = Solver<G>::required_mass(weight, log_mass, potential, rho, penalty);
        t[3] += absolute(marginal - (penalty ? required : mass));
        if (!penalty) return;
        const double ratio = log_ratio(marginal, mass, log_mass);
        t[4] += (double)rho * (sum * ratio - sum + (double)mass);
    }

    // Computes the values and the marginal error. Leaves the sums of P and of P C in SUMS and
    // SPENT.
    OPTICAL_DEVICE void evaluate() {
        float f[OI], log_row[OI], g_all[RJ], log_column[RJ], sums[RJ], spends[RJ];
        problem.columns_of(POTENTIAL, g_all);
        problem.columns_of(LOG, log_column);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o)
            f[o] = problem.row(POTENTIAL, o), log_row[o] = problem.row(LOG, o);
        OPTICAL_UNROLL_LOOP
        for (int c = 0; c < RJ; ++c) sums[c] = spends[c] = 0;
        float by_row[OI] = {}, paid_by_row[OI] = {}, by_column[OJ];
        OPTICAL_KEEP_LOOP
        for (int q = 0; q < RI; ++q) {
            const int r = grid.slot_of(q);
            const float f_i = grid.row_value(f, q), log_i = grid.row_value(log_row, q);
            float sum = 0, spent = 0;
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c) {
                const float flow = solver.kernel.plan_of(problem, work, r, c, f_i, log_i, g_all[c],
                                                         log_column[c]);
                const float paid = flow * problem.finite_cost(r, c);
                sum += flow, sums[c] += flow, spent += paid, spends[c] += paid;
            }
            grid.template fold_row<Sum>(sum, q, by_row);
            grid.template fold_row<Sum>(spent, q, paid_by_row);
        }
        grid.template combine_rows<Sum>(by_row);
        problem.set_rows(SUMS, by_row);
        grid.template combine_rows<Sum>(paid_by_row);
        problem.set_rows(SPENT, paid_by_row);
        grid.template columns<Sum>(sums, by_column);
        problem.set_columns(SUMS, by_column);
        grid.template columns<Sum>(spends, by_column);
        problem.set_columns(SPENT, by_column);
        double t[5] = {0, 0, 0, 0, 0}, s[5] = {0, 0, 0, 0, 0};
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o)
            add_entry(t, problem.row(SUMS, o), problem.row(SPENT, o), problem.row(MASS, o),
                      problem.row(LOG, o), problem.row(WEIGHT, o), problem.row(POTENTIAL, o),
                      work.rho_a, work.penalty_a);
        grid.total(t, true);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o)
            add_entry(s, problem.column(SUMS, o), 0.0f, problem.column(MASS, o),
                      problem.column(LOG, o), problem.column(WEIGHT, o),
                      problem.column(POTENTIAL, o), work.rho_b, work.penalty_b);
        grid.total(s, false);
        linear = t[0];
        error = t[3] + s[3];
        const double excess = (double)work.target * (work.total_a * work.total_b - t[2]);
        value = t[1] + s[1] + excess + t[4] + s[4];
    }
    OPTICAL_DEVICE bool feasible() const {
        const bool fixed_a = !work.penalty_a, fixed_b = !work.penalty_b;
        const double a = work.total_a, b = work.total_b;
        const double difference = a > b ? a - b : b - a;
        if (fixed_a && fixed_b && difference > unequal * (a > b ? a : b)) return false;
        return !(fixed_a && work.unmatched_rows) && !(fixed_b && work.unmatched_columns);
    }

};

}  // namespace cuda
}  // namespace optical
