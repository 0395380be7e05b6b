// The derivative of the iterations, by a reverse sweep.
//
// The iterations run again and store f_k and g_k; the sweep then reverses them one by one. With f
// and g of a step,
//
//     pi_ij    = a_i exp((f_i + g_j - C_ij) / epsilon)
//     sigma_ij = b_j exp((f_i + g_j - C_ij) / epsilon)
//
// all products are with K, and a step adds K times a matrix of rank two to the gradient of the
// cost.
#pragma once

#include "objective.cuh"

namespace optical {
namespace cuda {

// The upstream gradients of value and value_linear, and their sum.
struct Upstream {
    float value, linear, total;
};

template <typename G>
struct Unrolled {
    static constexpr int RI = G::RI, RJ = G::RJ, OI = G::OI, OJ = G::OJ;

    // Fields of the sweep: the gradients of the potentials and of the log-masses, the inverse sums
    // of the replayed step, and the slope of the dual.
    enum { BAR = SCRATCH_1, BAR_MASS = SCRATCH_2, INVERSE_SUM = SCRATCH_3, SLOPE = SCRATCH_4 };
    enum { MISSING = INVERSE_SUM };  // mass - sum, before the sweep

    Solver<G>& solver;
    Problem<G>& problem;
    Workspace<G>& work;
    ScalingKernel<G>& kernel;
    G& grid;
    const optical_gradient& out;
    const Upstream up;
    float* const history;

    OPTICAL_DEVICE Unrolled(Solver<G>& solver, const optical_gradient& out,
                            const Upstream& up, float* history)
        : solver(solver),
          problem(solver.problem),
          work(solver.work),
          kernel(solver.kernel),
          grid(problem.grid),
          out(out),
          up(up),
          history(history) {}

    OPTICAL_DEVICE void differentiate() {
        const int32_t n_iter = out.n_iter[problem.index], limit = problem.batch.max_iter;
        const int32_t count = n_iter < 0 ? 0 : n_iter < limit ? n_iter : limit;
        const int32_t steps = solver.solve(count, 0.0f, history);
        Objective<G>(solver).evaluate();
        begin_sweep(steps);
        bool base_usable = false;
        OPTICAL_KEEP_LOOP
        for (int32_t k = steps - 1; k >= 0; --k) {
            const float *const f = solver.history_rows(history, k + 1);
            const float *const new_g = solver.history_columns(history, k + 1);
            const float *const old_g = solver.history_columns(history, k);
            work.set_step(k == 0 ? 1.0f : (float)problem.batch.omega);
            // Tries the current base, then a new one, and finally each half-step with pi or sigma
            // itself as K.
            OPTICAL_KEEP_LOOP
            for (int attempt = base_usable ? 0 : 1; attempt < 4; ++attempt) {
                if (attempt == 1) {
                    load_potentials(f, old_g);
                    kernel.rebase(problem, work);
                }
                if (attempt >= 2)
                    exact_base(solver.history_rows(history, k), f, old_g, new_g, attempt == 2);
                const bool trusted = replay(f, old_g, attempt >= 2);
                if (attempt < 2 && !trusted) continue;
                base_usable = attempt < 2;
                reverse(attempt != 3, attempt != 2);
                if (base_usable) break;
            }
        }
    }

    OPTICAL_DEVICE float row_mass_gradient(int o) const { return problem.row(BAR_MASS, o); }
    OPTICAL_DEVICE float column_mass_gradient(int o) const { return problem.column(BAR_MASS, o); }
    // The gradient of the cost so far, behind the other private arrays.
    OPTICAL_DEVICE float& cost_bar(int r, int c) const {
        return problem.private_values[(Problem<G>::private_floats + r * RJ + c) * grid.threads];
    }

    // The gradients that the outputs pass to the last potentials, to the masses and to the cost.
    OPTICAL_DEVICE void begin_sweep(int32_t steps) {
        const float scale = work.inverse_epsilon;
        float slope_row[OI], slope_column[OJ], by_row[OI], by_column[OJ];
        kernel.build(problem, work, true);
        measure_slopes(steps, slope_row, slope_column);
        kernel.rows_times(problem, slope_column, by_row);
        kernel.columns_times(problem, slope_row, by_column);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) {
            const int i = grid.own_row(o);
            const float sum = problem.row(SUMS, o), missing = problem.row(MISSING, o);
            const float slope = up.value * (slope_row[o] * sum + by_row[o]) +
                                up.linear * problem.row(SPENT, o);
            float explicit_part =
                work.target * (problem.row(MASS, o) * (float)work.total_b - sum);
            if (work.penalty_a) explicit_part += work.rho_a * missing;
            const bool has_grad =
                out.grad_f && problem.valid_row(i) && problem.row(UNMATCHED, o) == 0;
            problem.row(BAR, o) =
                slope * scale + (has_grad ? ((const float*)out.grad_f)[problem.a.first + i] : 0.0f);
            problem.row(BAR_MASS, o) = slope + up.value * explicit_part;
        }
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) {
            const int j = grid.own_column(o);
            const float sum = problem.column(SUMS, o), missing = problem.column(MISSING, o);
            const float slope = up.value * (slope_column[o] * sum + by_column[o]) +
                                up.linear * problem.column(SPENT, o);
            float explicit_part =
                work.target * (problem.column(MASS, o) * (float)work.total_a - sum);
            if (work.penalty_b) explicit_part += work.rho_b * missing;
            const bool has_grad =
                out.grad_g && problem.valid_column(j) && problem.column(UNMATCHED, o) == 0;
            problem.column(BAR, o) =
                slope * scale + (has_grad ? ((const float*)out.grad_g)[problem.b.first + j] : 0.0f);
            problem.column(BAR_MASS, o) = slope + up.value * explicit_part;
        }
        float of_row[RI], of_column[RJ];
        problem.rows_of(SLOPE, of_row);
        problem.columns_of(SLOPE, of_column);
        OPTICAL_UNROLL_LOOP
        for (int r = 0; r < RI; ++r)
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c) {
                const float slope = up.value * (of_row[r] + of_column[c]) +
                                    up.linear * problem.finite_cost(r, c);
                cost_bar(r, c) = kernel.K[r][c] * (up.total - slope * scale);
            }
    }
    // The derivatives of the dual along the potentials into SLOPE, and the masses that the sums
    // miss into MISSING. K is the plan.
    //
    // A large rho magnifies the rounding errors of the sums. The last iteration says what they are:
    // column sums are b exp(-g / rho), and row sums were a exp(-f / rho) before g changed. This
    // does not hold with over-relaxation.
    OPTICAL_DEVICE void measure_slopes(int32_t steps, float (&slope_row)[OI],
                                       float (&slope_column)[OJ]) {
        const bool plain = steps == 1 || (steps > 1 && problem.batch.omega == 1);
        float change[OI] = {};
        if (plain && work.penalty_a)
            measure_changes(solver.history_columns(history, steps - 1), change);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) {
            const bool known = plain && work.penalty_a && problem.row(UNMATCHED, o) == 0;
            measure_slope(problem.row(POTENTIAL, o), problem.row(SUMS, o), problem.row(MASS, o),
                          problem.row(LOG, o), work.rho_a, work.penalty_a,
                          known ? change[o] : infinity(), slope_row[o], problem.row(MISSING, o));
            problem.row(SLOPE, o) = slope_row[o];
        }
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) {
            const bool known = plain && problem.column(UNMATCHED, o) == 0;
            measure_slope(problem.column(POTENTIAL, o), problem.column(SUMS, o),
                          problem.column(MASS, o), problem.column(LOG, o), work.rho_b,
                          work.penalty_b, known ? 0.0f : infinity(), slope_column[o],
                          problem.column(MISSING, o));
            problem.column(SLOPE, o) = slope_column[o];
        }
    }
    // The changes of the row sums since g was old_g: the sums of P (1 - exp((old_g - g) /
    // epsilon)). They add up to the difference of the masses of both sides, which removes the
    // rounding errors that they share.
    OPTICAL_DEVICE void measure_changes(const float* old_g, float (&change)[OI]) {
        float moved[OJ];
        double rows[3] = {0, 0, 0}, columns[1] = {0};
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) {
            const int j = grid.own_column(o);
            const float g = problem.column(POTENTIAL, o);
            moved[o] = one_minus_exp((g - (j < problem.b.count ? old_g[j] : 0.0f)) *
                                     work.inverse_epsilon);
            if (problem.column(UNMATCHED, o) == 0)
                columns[0] += wanted_mass(problem.column(LOG, o), g, work.rho_b);
        }
        kernel.rows_times(problem, moved, change);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o)
            if (problem.row(UNMATCHED, o) == 0) {
                rows[0] +=
                    wanted_mass(problem.row(LOG, o), problem.row(POTENTIAL, o), work.rho_a);
                rows[1] += change[o], rows[2] += problem.row(SUMS, o);
            }
        grid.total(rows, true);
        grid.total(columns, false);
        const float shared = (float)((columns[0] - rows[0] - rows[1]) / rows[2]);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) change[o] += shared * problem.row(SUMS, o);
    }
    OPTICAL_DEVICE static double wanted_mass(float log_mass, float potential, float rho) {
        return exponential((double)log_mass - (double)potential / (double)rho);
    }
    // `change`: the difference between the sum and mass exp(-potential / rho), if it is known.
    OPTICAL_DEVICE static void measure_slope(float potential, float sum, float mass, float log_mass,
                                             float rho, bool penalty, float change, float& slope,
                                             float& missing) {
        slope = potential, missing = mass - sum;
        if (!penalty) return;
        const float wanted = Solver<G>::required_mass(mass, log_mass, potential, rho, true);
        if (absolute(change) < 0.25f * wanted && mass > 1e-30f) {
            slope = (float)((double)rho * logarithm(1.0 + (double)change / (double)wanted));
            missing = mass * one_minus_exp(potential / rho) - change;
        } else {
            slope = (float)(potential +
                            (double)rho * Objective<G>::log_ratio(sum, mass, log_mass));
        }
    }

    // Loads stored potentials as the current ones.
    OPTICAL_DEVICE void load_potentials(const float* f, const float* old_g) {
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) {
            const int i = grid.own_row(o);
            problem.row(POTENTIAL, o) = i < problem.a.count ? f[i] : 0.0f;
        }
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) {
            const int j = grid.own_column(o);
            problem.column(POTENTIAL, o) = j < problem.b.count ? old_g[j] : 0.0f;
        }
    }
    // Makes K equal to pi of the half-step from f to new_g, or to sigma of the half-step from old_g
    // to f, from the input of the half-step and its soft-min, recovered from the relaxed result. K
    // includes the masses, so that no entry exceeds 1, however small they are.
    OPTICAL_DEVICE void exact_base(const float* old_f, const float* f, const float* old_g,
                                   const float* new_g, bool of_columns) {
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) {
            const int i = grid.own_row(o);
            const float next = i < problem.a.count ? f[i] : 0.0f,
                        old = i < problem.a.count ? old_f[i] : 0.0f;
            problem.row(BASE, o) = of_columns ? next + work.target * problem.row(LOG, o)
                                      : (next - work.alpha * old) / work.share_a;
        }
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) {
            const int j = grid.own_column(o);
            const float next = j < problem.b.count ? new_g[j] : 0.0f,
                        old = j < problem.b.count ? old_g[j] : 0.0f;
            problem.column(BASE, o) = of_columns ? (next - work.alpha * old) / work.share_b
                                         : old + work.target * problem.column(LOG, o);
        }
        kernel.build(problem, work, false);
    }

    // Replays the iteration from old_g to f on the current base. Leaves inverse sums with which the
    // rows of sigma and the columns of pi sum to 1 in spite of rounding, and a u and b v, which are
    // 1 if K is pi or sigma (`exact`). Returns false if a number left the trusted range.
    OPTICAL_DEVICE bool replay(const float* f, const float* old_g, bool exact) {
        unsigned flags = 0;
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) {
            const int j = grid.own_column(o);
            const float scaling =
                work.boltzmann((j < problem.b.count ? old_g[j] : 0.0f) - problem.column(BASE, o));
            work.bv[o] = exact ? 1.0f : weighted(work.weight_b[o], scaling, flags);
        }
        float by_row[OI], by_column[OJ];
        kernel.rows_times(problem, work.bv, by_row);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) {
            const int i = grid.own_row(o);
            const float total = by_row[o] + problem.row(UNMATCHED, o);
            flags |= loss_flag(total, COLUMNS_LOST);
            problem.row(INVERSE_SUM, o) = 1.0f / total;
            work.au[o] = work.weight_a[o] / total;
            if (work.relaxed)
                work.au[o] = weighted(
                    work.weight_a[o],
                    work.boltzmann((i < problem.a.count ? f[i] : 0.0f) - problem.row(BASE, o)),
                    flags);
            if (exact) work.au[o] = 1;
        }
        kernel.columns_times(problem, work.au, by_column);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) {
            const float total = by_column[o] + problem.column(UNMATCHED, o);
            flags |= loss_flag(total, COLUMNS_LOST);
            problem.column(INVERSE_SUM, o) = 1.0f / total;
        }
        return grid.union_of(flags) == 0;
    }

    // weight * scaling. A mass that underflows to 0 is negligible unless its scaling is large.
    OPTICAL_DEVICE static float weighted(float weight, float scaling, unsigned& flags) {
        if (weight > 0 || scaling > 1) flags |= loss_flag(scaling, COLUMNS_LOST);
        return weight > 0 ? weight * scaling : 0.0f;
    }

    // Reverses the replayed step: the half-step that produced g, the one that produced f, or both.
    OPTICAL_DEVICE void reverse(bool of_columns, bool of_rows) {
        float to_column[OJ], to_row[OI], by_row[OI], by_column[OJ];
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o)
            to_column[o] = of_columns ? problem.column(INVERSE_SUM, o) *
                                            (work.share_b * problem.column(BAR, o))
                                      : 0.0f;
        kernel.rows_times(problem, to_column, by_row);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) {
            if (!of_columns) work.au[o] = 0;
            const float received = of_columns ? work.au[o] * by_row[o] : 0.0f;
            const float bar = problem.row(BAR, o) - received;
            to_row[o] = of_rows ? problem.row(INVERSE_SUM, o) * (work.share_a * bar) : 0.0f;
            problem.row(BAR_MASS, o) -= work.target * received;
            problem.row(BAR, o) = of_rows ? work.alpha * bar : bar;
        }
        kernel.columns_times(problem, to_row, by_column);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) {
            if (!of_rows) work.bv[o] = 0;
            const float received = of_rows ? work.bv[o] * by_column[o] : 0.0f;
            const float bar = problem.column(BAR, o);
            problem.column(BAR_MASS, o) -= work.target * received;
            problem.column(BAR, o) = (of_columns ? work.alpha * bar : bar) - received;
        }
        float au[RI], bv[RJ], from_row[RI], from_column[RJ];
        grid.spread_rows(work.au, au);
        grid.spread_rows(to_row, from_row);
        grid.spread_columns(work.bv, bv);
        grid.spread_columns(to_column, from_column);
        OPTICAL_UNROLL_LOOP
        for (int r = 0; r < RI; ++r)
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c)
                cost_bar(r, c) += kernel.K[r][c] * (au[r] * from_column[c] + from_row[r] * bv[c]);
    }
};

}  // namespace cuda
}  // namespace optical
