// The state of a solve in registers: temperature, step sizes, total masses and scalings.
#pragma once

#include "cost.cuh"

namespace optical {
namespace cuda {

template <typename G>
struct Workspace {
    static constexpr int RI = G::RI, RJ = G::RJ, OI = G::OI, OJ = G::OJ;

    float epsilon, scale, inverse_epsilon, target;
    float rho_a, rho_b, alpha, share_a, share_b;
    bool relaxed, penalty_a, penalty_b;
    double total_a, total_b;
    float unmatched_mass;
    // With over-relaxation and `tol`, the error of the columns of the current iterate, and of the
    // next one.
    float column_error, next_column_error;
    bool unmatched_rows, unmatched_columns;
    // Of owned rows and columns; bv_all is b v of all columns of this lane.
    float u[OI], v[OJ], u_next[OI], v_next[OJ], au[OI], bv[OJ], bv_all[RJ];
    float weight_a[OI], weight_b[OJ];
    // UNMATCHED, in the one warp that adds it to the sums of a row or column, and 0 in the others.
    float unmatched_a[OI], unmatched_b[OJ];

    // -------------------------------------------------------------------------------------- set-up

    OPTICAL_DEVICE void set_epsilon(float value) {
        epsilon = value;
        inverse_epsilon = 1.0f / value;
        scale = OPTICAL_LOG2E / value;
    }
    // The step sizes of f <- alpha f + share softmin at the current temperature.
    OPTICAL_DEVICE void set_step(float omega) {
        alpha = 1.0f - omega;
        share_a = omega * (penalty_a ? rho_a / (rho_a + epsilon) : 1.0f);
        share_b = omega * (penalty_b ? rho_b / (rho_b + epsilon) : 1.0f);
    }
    // epsilon log x.
    OPTICAL_DEVICE float epsilon_log(float x) const {
        return epsilon * (OPTICAL_LN2 * log2_fast(x));
    }
    OPTICAL_DEVICE float boltzmann(float energy) const { return exp2_fast(energy * scale); }

    // Reads the problem. Returns false if a side is empty or an input is not a number, with the
    // reason in `status`.
    OPTICAL_DEVICE bool read(Problem<G>& problem, int32_t& status) {
        G& grid = problem.grid;
        enum { HAS_ROW = 1, HAS_COLUMN = 2, INVALID = 4 };
        unsigned flags = Cost<G>(problem).fill() ? 0 : INVALID;
        rho_a = (float)problem.batch.rho_a, rho_b = (float)problem.batch.rho_b;
        penalty_a = rho_a < infinity(), penalty_b = rho_b < infinity();
        relaxed = problem.batch.omega != 1 || penalty_a || penalty_b;
        target = ((const float*)problem.batch.epsilon)[problem.index];
        set_epsilon(target);
        const bool usable =
            (target > 0) & (target < infinity()) & (inverse_epsilon < infinity());
        flags |= usable ? 0 : INVALID;
        double mass_a[1] = {0}, mass_b[1] = {0};
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) {
            const float log_mass = problem.log_a(grid.own_row(o));
            const bool is_valid = log_mass != -infinity();
            flags |= (is_valid ? HAS_ROW : 0) | (log_mass < infinity() ? 0 : INVALID);
            const float mass = is_valid ? exp2_fast(log_mass * OPTICAL_LOG2E) : 0.0f;
            problem.row(LOG, o) = is_valid ? log_mass : 0.0f;
            problem.row(MASS, o) = mass;
            mass_a[0] += mass;
            const float start =
                is_valid && problem.batch.init_f
                    ? ((const float*)problem.batch.init_f)[problem.a.first + grid.own_row(o)]
                    : 0.0f;
            flags |= is_finite(start) ? 0 : INVALID;
            problem.row(POTENTIAL, o) = start;
        }
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) {
            const float log_mass = problem.log_b(grid.own_column(o));
            const bool is_valid = log_mass != -infinity();
            flags |= (is_valid ? HAS_COLUMN : 0) | (log_mass < infinity() ? 0 : INVALID);
            const float mass = is_valid ? exp2_fast(log_mass * OPTICAL_LOG2E) : 0.0f;
            problem.column(LOG, o) = is_valid ? log_mass : 0.0f;
            problem.column(MASS, o) = mass;
            mass_b[0] += mass;
            const float start =
                is_valid && problem.batch.init_g
                    ? ((const float*)problem.batch.init_g)[problem.b.first + grid.own_column(o)]
                    : 0.0f;
            flags |= is_finite(start) ? 0 : INVALID;
            problem.column(POTENTIAL, o) = start;
        }
        grid.total(mass_a, true);
        grid.total(mass_b, false);
        total_a = mass_a[0], total_b = mass_b[0];
        flags |= (total_a - total_a == 0) & (total_b - total_b == 0) ? 0 : INVALID;
        flags = grid.union_of(flags);
        const bool empty = !(flags & HAS_ROW) || !(flags & HAS_COLUMN);
        status = empty                ? OPTICAL_EMPTY
                 : (flags & INVALID) ? OPTICAL_INFEASIBLE
                                     : OPTICAL_MAX_ITER;
        if (status != OPTICAL_MAX_ITER) return false;
        mark_unmatched(problem);
        return true;
    }

    // Finds rows and columns without an allowed pair, sets their potentials to 0 and excludes their
    // mass.
    OPTICAL_DEVICE void mark_unmatched(Problem<G>& problem) {
        G& grid = problem.grid;
        float row_minimum[OI] = {}, column_minimum[OJ];
        find_minima(problem, row_minimum, column_minimum);
        double unmatched[2] = {0, 0}, unmatched_column_count[1] = {0};
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) {
            const bool is_unmatched = row_minimum[o] == infinity();
            const float mass = problem.row(MASS, o);
            problem.row(UNMATCHED, o) = is_unmatched ? 1.0f : 0.0f;
            problem.row(WEIGHT, o) = weight_a[o] = is_unmatched ? 0.0f : mass;
            unmatched_a[o] = grid.warp_across == 0 ? problem.row(UNMATCHED, o) : 0.0f;
            unmatched[0] += is_unmatched ? mass : 0.0f;
            unmatched[1] += is_unmatched && problem.valid_row(grid.own_row(o));
            if (is_unmatched) problem.row(POTENTIAL, o) = 0;
        }
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) {
            const bool is_unmatched = column_minimum[o] == infinity();
            problem.column(UNMATCHED, o) = is_unmatched ? 1.0f : 0.0f;
            problem.column(WEIGHT, o) = weight_b[o] = is_unmatched ? 0.0f : problem.column(MASS, o);
            unmatched_b[o] =
                grid.rank == 0 && grid.warp_down == 0 ? problem.column(UNMATCHED, o) : 0.0f;
            unmatched_column_count[0] += is_unmatched && problem.valid_column(grid.own_column(o));
            if (is_unmatched) problem.column(POTENTIAL, o) = 0;
        }
        grid.total(unmatched, true);
        grid.total(unmatched_column_count, false);
        unmatched_mass = (float)unmatched[0], unmatched_rows = unmatched[1] > 0,
        unmatched_columns = unmatched_column_count[0] > 0;
    }

    // The least cost of each row and column, infinite if it has no allowed pair. Costs of vectors
    // are finite for all pairs of valid rows and columns, so any number stands for them.
    OPTICAL_DEVICE void find_minima(Problem<G>& problem, float (&row_minimum)[OI],
                                    float (&column_minimum)[OJ]) {
        G& grid = problem.grid;
        if (problem.batch.kind != OPTICAL_GIVEN) {
            OPTICAL_UNROLL_LOOP
            for (int o = 0; o < OI; ++o)
                row_minimum[o] = problem.valid_row(grid.own_row(o)) ? 0.0f : infinity();
            OPTICAL_UNROLL_LOOP
            for (int o = 0; o < OJ; ++o)
                column_minimum[o] = problem.valid_column(grid.own_column(o)) ? 0.0f : infinity();
            return;
        }
        float by_column[RJ];
        OPTICAL_UNROLL_LOOP
        for (int c = 0; c < RJ; ++c) by_column[c] = infinity();
        OPTICAL_KEEP_LOOP
        for (int q = 0; q < RI; ++q) {
            const int r = grid.slot_of(q);
            float minimum = infinity();
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c) {
                minimum = smaller(minimum, problem.cost(r, c));
                by_column[c] = smaller(by_column[c], problem.cost(r, c));
            }
            grid.template fold_row<Minimum>(minimum, q, row_minimum);
        }
        grid.template combine_rows<Minimum>(row_minimum);
        grid.template columns<Minimum>(by_column, column_minimum);
    }

    OPTICAL_DEVICE void start_scalings(const Problem<G>& problem) {
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o)
            u[o] = boltzmann(problem.row(POTENTIAL, o) - problem.row(BASE, o));
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) {
            v[o] = boltzmann(problem.column(POTENTIAL, o) - problem.column(BASE, o));
            bv[o] = weight_b[o] * v[o];
        }
        problem.grid.spread_columns(bv, bv_all);
    }
    OPTICAL_DEVICE float row_share(const Problem<G>& problem, int o, float potential,
                                   float origin) const {
        const float exponent = (potential - origin) * scale + problem.row(LOG, o) * OPTICAL_LOG2E;
        return problem.row(UNMATCHED, o) > 0 ? 0.0f : exp2_fast(exponent);
    }
    OPTICAL_DEVICE float column_share(const Problem<G>& problem, int o, float potential,
                                      float origin) const {
        const float exponent =
            (potential - origin) * scale + problem.column(LOG, o) * OPTICAL_LOG2E;
        return problem.column(UNMATCHED, o) > 0 ? 0.0f : exp2_fast(exponent);
    }
};

}  // namespace cuda
}  // namespace optical
