// The Sinkhorn iteration.
//
// The iteration of sinkhorn.h costs one exponential per entry and half-step. Scaling computes the
// same iterates: with base potentials F, G and K_ij = exp((F_i + G_j - C_ij) / epsilon),
//
//     u_i = 1 / sum_j K_ij b_j v_j        f_i = F_i + epsilon log u_i
//     v_j = 1 / sum_i K_ij a_i u_i        g_j = G_j + epsilon log v_j
//
// at one multiply-add per entry and half-step. The base (scaling_kernel.cuh) is chosen again when u
// or v has drifted by 2^30, or when a sum leaves the range 2^-46 ... 2^46 in which underflow is
// negligible; the iteration is then repeated. If a sum is outside this range on a new base, the
// masses are extreme, and the iteration runs in the log domain, from the cost in shared memory.
//
// Penalties and over-relaxation need the potentials after every half-step, at a logarithm and an
// exponential per row or column (Mode::relaxed). Without them u and v suffice, and K may be in half
// precision for all but the last iterations (Mode::halves).
#pragma once

#include "half_precision.cuh"

namespace optical {
namespace cuda {

enum class Mode { plain, relaxed, halves };
enum Flag : unsigned { DRIFTED = 1, ROWS_LOST = 2, COLUMNS_LOST = 4 };

// Compares bit patterns, which are ordered like positive numbers and exclude NaN.
OPTICAL_DEVICE bool within(float x, unsigned exponent) {
    const unsigned low = (127u - exponent) << 23, high = (127u + exponent) << 23;
    return bits_of(x) - low <= high - low;
}
OPTICAL_DEVICE unsigned loss_flag(float x, unsigned lost_sums) {
    return within(x, 46) ? 0u : lost_sums;
}

// The solver of one problem, which owns all of its state.
//
// Everything must stay in registers, and the compiler keeps an object there only if no pointer to
// it is stored before its loops are unrolled. Therefore the members below hold no references to
// each other and pass each other as arguments. Objective, Adjoint, Gradient and Unrolled hold
// references to the solver, and no arrays.
template <typename G>
struct Solver {
    static constexpr int RI = G::RI, RJ = G::RJ, OI = G::OI, OJ = G::OJ;

    Problem<G> problem;
    Workspace<G> work;
    ScalingKernel<G> kernel;
    HalfKernel<G> half;

    OPTICAL_DEVICE explicit Solver(const optical_problem& batch) : problem(batch) {}

    // ------------------------------------------------------------------------------- one iteration

    template <bool halves = false>
    OPTICAL_DEVICE static unsigned drift_flag(float x) {
        return (halves ? HalfKernel<G>::trusted(x, 0) : within(x, 30)) ? 0u : DRIFTED;
    }
    // The mass that a row or column must carry, given its potential. For large exponents, mass and
    // factor are combined in one exponential: the factor may overflow where the mass underflows.
    OPTICAL_DEVICE static float required_mass(float weight, float log_mass, float potential,
                                              float rho, bool penalty) {
        const float exponent = potential * (-OPTICAL_LOG2E / rho);
        if (!penalty) return weight;
        if (exponent > 115) return exp2_fast(OPTICAL_LOG2E * log_mass + exponent);
        return weight * exp2_fast(exponent);
    }

    // One scaling iteration into u_next and v_next, or into the next potentials, given the row
    // sums. With `measure`, the report receives the residual of the rows of the current iterate;
    // with `relaxed_tol`, the error of the columns of the next iterate is computed.
    template <Mode mode>
    OPTICAL_DEVICE void scaling_step(const float (&total_row)[OI], bool measure, bool relaxed_tol,
                                     Report& report) {
        G& grid = problem.grid;
        constexpr bool uses_potentials = mode == Mode::relaxed, halves = mode == Mode::halves;
        float total_column[OJ];
        report.flags = 0;
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) {
            const float total = total_row[o];
            report.flags |= drift_flag<halves>(total);
            if (uses_potentials) {
                const float origin = problem.row(BASE, o);
                const float next = work.alpha * problem.row(POTENTIAL, o) +
                                   work.share_a * (origin - work.epsilon_log(total));
                problem.row(NEXT, o) = next;
                work.u_next[o] = work.boltzmann(next - origin);
                report.flags |=
                    drift_flag(work.u_next[o]) | loss_flag(total, ROWS_LOST | COLUMNS_LOST);
            } else {
                work.u_next[o] = reciprocal(total);
            }
            work.au[o] = (halves ? half.weight_a[o] : work.weight_a[o]) * work.u_next[o];
        }
        sum_columns<mode>(total_column);
        grid.exchange_columns(total_column, report, measure, [&] {
            float mismatch = 0;
            OPTICAL_UNROLL_LOOP
            for (int o = 0; o < OI; ++o) {
                const float weight = halves ? problem.row(WEIGHT, o) : work.weight_a[o];
                const float required = uses_potentials ? required_mass(weight, problem.row(LOG, o),
                                                                       problem.row(POTENTIAL, o),
                                                                       work.rho_a, work.penalty_a)
                                                       : weight;
                mismatch += absolute(weight * work.u[o] * total_row[o] - required);
            }
            return mismatch;
        });
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) {
            const float total = total_column[o];
            report.flags |= drift_flag<halves>(total);
            if (uses_potentials) {
                const float origin = problem.column(BASE, o);
                const float next = work.alpha * problem.column(POTENTIAL, o) +
                                   work.share_b * (origin - work.epsilon_log(total));
                problem.column(NEXT, o) = next;
                work.v_next[o] = work.boltzmann(next - origin);
                report.flags |= drift_flag(work.v_next[o]) | loss_flag(total, COLUMNS_LOST);
            } else {
                work.v_next[o] = reciprocal(total);
            }
            work.bv[o] = (halves ? half.weight_b[o] : work.weight_b[o]) * work.v_next[o];
        }
        if (G::marks_drift) {
            OPTICAL_UNROLL_LOOP
            for (int o = 0; o < OJ; ++o) work.bv[o] = report.flags ? not_a_number() : work.bv[o];
        }
        if (!halves) grid.spread_columns(work.bv, work.bv_all);
        if (uses_potentials && relaxed_tol) {
            float sums[OJ];
            OPTICAL_UNROLL_LOOP
            for (int o = 0; o < OJ; ++o)
                sums[o] = work.weight_b[o] * work.v_next[o] * total_column[o];
            work.next_column_error = column_mismatch(sums);
        }
    }
    // The L1 error of the columns, given their sums, at the next potentials.
    OPTICAL_DEVICE float column_mismatch(const float (&sums)[OJ]) {
        double mismatch[1] = {0};
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) {
            const float required =
                work.penalty_b ? required_mass(work.weight_b[o], problem.column(LOG, o),
                                               problem.column(NEXT, o), work.rho_b, true)
                               : problem.column(MASS, o);
            mismatch[0] += absolute(sums[o] - required);
        }
        problem.grid.total(mismatch, false);
        return (float)mismatch[0];
    }
    // The contributions of this warp to the sums of its rows, and of its columns.
    template <Mode mode>
    OPTICAL_DEVICE void sum_rows(float (&out)[OI]) {
        if constexpr (mode == Mode::halves) {
            half.multiply(problem, half.fragments, work.bv, out,
                          half.words(problem) + 16 * HalfKernel<G>::word_pitch);
            OPTICAL_UNROLL_LOOP
            for (int o = 0; o < OI; ++o) out[o] = fused(work.unmatched_a[o], half.unit_a, out[o]);
        } else {
            float sum[RI];
            OPTICAL_UNROLL_LOOP
            for (int r = 0; r < RI; ++r) sum[r] = r < OI ? work.unmatched_a[r % OI] : 0.0f;
            kernel.add_times(work.bv_all, sum);
            problem.grid.template fold_rows<Sum>(sum, out);
        }
    }
    template <Mode mode>
    OPTICAL_DEVICE void sum_columns(float (&out)[OJ]) {
        G& grid = problem.grid;
        if constexpr (mode == Mode::halves) {
            half.multiply(problem, half.fragments_transposed, work.au, out,
                          half.words(problem) + 16 * HalfKernel<G>::word_pitch + 64);
            OPTICAL_UNROLL_LOOP
            for (int o = 0; o < OJ; ++o) out[o] = fused(work.unmatched_b[o], half.unit_b, out[o]);
        } else {
            float of_row[RI], sum[RJ];
            grid.spread_rows(work.au, of_row);
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c) sum[c] = c < OJ ? work.unmatched_b[c % OJ] : 0.0f;
            kernel.add_times_transposed(of_row, sum);
            grid.template fold_columns<Sum>(sum, out);
        }
    }
    // The sums that were lost to underflow or overflow, given that some sum drifted. The bounds are
    // symmetric, so a sum and its inverse give the same answer.
    template <Mode mode>
    OPTICAL_DEVICE unsigned lost_sums(unsigned flags) {
        const auto in_range = [&](float x) {
            return mode == Mode::halves ? HalfKernel<G>::trusted(reciprocal(x), 3) : within(x, 46);
        };
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o)
            flags |= in_range(work.u_next[o]) ? 0u : ROWS_LOST | COLUMNS_LOST;
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) flags |= in_range(work.v_next[o]) ? 0u : COLUMNS_LOST;
        return problem.grid.union_of(flags);
    }

    // Computes the potentials from u and v.
    OPTICAL_DEVICE void update_potentials(float unit_of_row, float unit_of_column) {
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o)
            problem.row(POTENTIAL, o) =
                problem.row(BASE, o) + work.epsilon_log(work.u[o] * unit_of_row);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o)
            problem.column(POTENTIAL, o) =
                problem.column(BASE, o) + work.epsilon_log(work.v[o] * unit_of_column);
    }

    // The same iteration in the log domain, from the current potentials to the next.
    OPTICAL_DEVICE float log_domain_step(bool relaxed_tol) {
        G& grid = problem.grid;
        float of_column[RJ], log_column[RJ], low[OI] = {}, total[OI] = {};
        problem.columns_of(POTENTIAL, of_column);
        problem.columns_of(LOG, log_column);
        const auto row_exponent = [&](int r, int c) {
            return (problem.cost(r, c) - of_column[c]) * work.inverse_epsilon - log_column[c];
        };
        OPTICAL_KEEP_LOOP
        for (int q = 0; q < RI; ++q) {
            const int r = grid.slot_of(q);
            float least = infinity();
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c) least = smaller(least, row_exponent(r, c));
            grid.template fold_row<Minimum>(least, q, low);
        }
        grid.template combine_rows<Minimum>(low);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) low[o] = problem.row(UNMATCHED, o) > 0 ? 0.0f : low[o];
        OPTICAL_KEEP_LOOP
        for (int q = 0; q < RI; ++q) {
            const int r = grid.slot_of(q);
            const float origin = grid.row_value(low, q);
            float sum = 0;
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c)
                sum += exp2_fast(OPTICAL_LOG2E * (origin - row_exponent(r, c)));
            grid.template fold_row<Sum>(sum, q, total);
        }
        grid.template combine_rows<Sum>(total);
        double mismatch[1] = {0};
        float next_row[OI];
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) {
            const float softmin =
                work.epsilon *
                (low[o] - OPTICAL_LN2 * log2_fast(total[o] + problem.row(UNMATCHED, o)));
            const float old = problem.row(POTENTIAL, o);
            mismatch[0] += absolute(work.row_share(problem, o, old, softmin) -
                                    required_mass(work.weight_a[o], problem.row(LOG, o), old,
                                                  work.rho_a, work.penalty_a));
            next_row[o] = work.alpha * old + work.share_a * softmin;
            problem.row(NEXT, o) = next_row[o];
        }
        float log_row[OI], lowest[RJ], bottom[OJ], sum_column[RJ], total_column[OJ];
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) log_row[o] = problem.row(LOG, o);
        OPTICAL_UNROLL_LOOP
        for (int c = 0; c < RJ; ++c) lowest[c] = infinity(), sum_column[c] = 0;
        OPTICAL_KEEP_LOOP
        for (int q = 0; q < RI; ++q) {
            const float f = grid.row_value(next_row, q), log_mass = grid.row_value(log_row, q);
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c)
                lowest[c] = smaller(
                    lowest[c],
                    (problem.cost(grid.slot_of(q), c) - f) * work.inverse_epsilon - log_mass);
        }
        grid.template columns<Minimum>(lowest, bottom);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o)
            bottom[o] = problem.column(UNMATCHED, o) > 0 ? 0.0f : bottom[o];
        grid.spread_columns(bottom, lowest);
        OPTICAL_KEEP_LOOP
        for (int q = 0; q < RI; ++q) {
            const float f = grid.row_value(next_row, q), log_mass = grid.row_value(log_row, q);
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c) {
                const float exponent =
                    (problem.cost(grid.slot_of(q), c) - f) * work.inverse_epsilon - log_mass;
                sum_column[c] += exp2_fast(OPTICAL_LOG2E * (lowest[c] - exponent));
            }
        }
        grid.template columns<Sum>(sum_column, total_column);
        float sums[OJ];
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) {
            const float softmin =
                work.epsilon * (bottom[o] - OPTICAL_LN2 * log2_fast(total_column[o] +
                                                                     problem.column(UNMATCHED, o)));
            const float next = work.alpha * problem.column(POTENTIAL, o) + work.share_b * softmin;
            problem.column(NEXT, o) = next;
            sums[o] = work.column_share(problem, o, next, softmin);
        }
        if (relaxed_tol) work.next_column_error = column_mismatch(sums);
        grid.total(mismatch, true);
        return (float)mismatch[0] + (work.penalty_a ? 0.0f : work.unmatched_mass);
    }

    // Iterates from the current potentials and returns the number of iterations. With `history`,
    // stores the potentials after every iteration there. Only the inner loop uses K, so that no
    // registers hold it elsewhere.
    OPTICAL_DEVICE int32_t solve(int32_t max_iter, float tol, float* history) {
        bool in_half_precision = G::fast;
        bool last_at_target = false;  // the previous iteration ran at the target epsilon
        int failures = 0;  // of scaling; after four, every iteration runs in the log domain
        double temperature = problem.batch.anneal_start;
        int32_t done = 0;
        bool converged = false;
        work.column_error = work.next_column_error = 0;
        record(history, 0, false);
        while (done < max_iter && !converged) {
            work.set_epsilon(temperature > (double)work.target ? (float)temperature
                                                                 : work.target);
            bool log_domain = failures >= 4;
            if (!log_domain) {
                kernel.rebase(problem, work);
                if constexpr (G::fast) {
                    // The iterations after those in half precision use the exact cost: the last
                    // one, or, once `tol` is met, all until it is met again.
                    in_half_precision = in_half_precision && done + 1 < max_iter &&
                                        half.begin(problem, work, kernel);
                    if (in_half_precision) {
                        const int32_t before = done;
                        const Outcome outcome = iterate_scaling<Mode::halves>(
                            max_iter - 1, tol, done, last_at_target, temperature, history);
                        in_half_precision = outcome == Outcome::finished && done >= before + 4;
                        continue;
                    }
                }
                const Outcome outcome =
                    work.relaxed && !G::fast
                        ? iterate_scaling<Mode::relaxed>(max_iter, tol, done, last_at_target,
                                                         temperature, history)
                        : iterate_scaling<Mode::plain>(max_iter, tol, done, last_at_target,
                                                       temperature, history);
                converged = outcome == Outcome::converged;
                log_domain = outcome == Outcome::untrusted;
                failures += log_domain;
            }
            if (!log_domain) continue;
            work.set_step(done == 0 || work.epsilon != work.target ? 1.0f
                                                                      : (float)problem.batch.omega);
            const bool test_residual =
                tol > 0 && done > 0 && last_at_target && work.epsilon == work.target;
            const bool relaxed_tol = tol > 0 && problem.batch.omega != 1;
            converged = log_domain_step(relaxed_tol) + work.column_error <= tol && test_residual;
            if (converged) break;
            take_next_potentials();
            record(history, ++done, false);
            last_at_target = work.epsilon == work.target;
            temperature *= problem.batch.anneal_ratio;
        }
        work.set_epsilon(work.target);
        return done;
    }

    // Iterates on one base until it is exhausted. `converged`: `tol` is met. `untrusted`: not even
    // the first iteration can be trusted.
    //
    // The barrier of the next row exchange also decides whether an iteration is accepted, at no
    // extra cost. Until then the iteration is pending, and u and v belong to the iterate before it.
    // Teams, which have no cheap vote, mark b v instead (ThreadGrid::marks_drift).
    enum class Outcome { converged, untrusted, finished };
    template <Mode mode>
    OPTICAL_DEVICE Outcome iterate_scaling(int32_t max_iter, float tol, int32_t& done,
                                           bool& last_at_target, double& temperature,
                                           float* history) {
        G& grid = problem.grid;
        constexpr bool uses_potentials = mode == Mode::relaxed;
        const bool at_target = work.epsilon == work.target;
        const float omega = at_target ? (float)problem.batch.omega : 1.0f;
        const int32_t before = done;
        // The next iteration of an annealed run has another temperature.
        const int32_t last_step =
            opaque((temperature > (double)work.target ? done + 1 : max_iter) - 1);
        const float row_tolerance = tol - (work.penalty_a ? 0.0f : work.unmatched_mass);
        const float residual_limit = opaque(tol > 0 && at_target ? row_tolerance : -1.0f);
        bool measure_residual = residual_limit >= 0 && done > 0 && last_at_target;
        Report report = {0, 0};
        Outcome outcome = Outcome::finished;
        --done;  // the iterate that this run starts from is accepted first
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) work.u_next[o] = work.u[o];
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) work.v_next[o] = work.v[o];
        if (uses_potentials) keep_potentials();
        const bool relaxed_tol = uses_potentials && tol > 0 && problem.batch.omega != 1;
        while (true) {
            float total_row[OI];
            sum_rows<mode>(total_row);
            if (grid.exchange_rows(total_row, report.flags != 0)) {
                unsigned flags = lost_sums<mode>(report.flags);
                // A sum that is not a number although nothing was marked.
                if (G::marks_drift && flags == 0) flags = COLUMNS_LOST;
                if (flags & COLUMNS_LOST) {
                    if (G::marks_drift && done < before) ++done;
                    if (done == before) outcome = Outcome::untrusted;
                    break;
                }
                // A relaxed state that drifts on its own new base gains nothing from another base.
                if (!(uses_potentials && done == before)) {
                    accept<uses_potentials>(done, history);
                    break;
                }
                if (G::marks_drift) {
                    report.flags = 0;
                    unmark();
                    continue;
                }
            }
            accept<uses_potentials>(done, done < before ? nullptr : history);
            if (uses_potentials) work.set_step(done == 0 ? 1.0f : omega);
            scaling_step<mode>(total_row, measure_residual, relaxed_tol, report);
            // If an iteration lost a row sum, its residual belongs to no iterate.
            if (measure_residual && residual_of<mode>(report) <= residual_limit &&
                !(lost_sums<mode>(report.flags) & ROWS_LOST)) {
                outcome = Outcome::converged;
                break;
            }
            if (done == last_step) {
                if (!grid.any(report.flags != 0) || !(lost_sums<mode>(report.flags) & COLUMNS_LOST))
                    accept<uses_potentials>(done, history);
                else if (done == before) outcome = Outcome::untrusted;
                break;
            }
            measure_residual = residual_limit >= 0;
        }
        if (done > before) last_at_target = at_target;
        if (done > before && temperature > (double)work.target)
            temperature *= problem.batch.anneal_ratio;
        if (!uses_potentials && done > before) {
            if (mode == Mode::halves) update_potentials(half.unit_a, half.unit_b);
            else update_potentials(1.0f, 1.0f);
        }
        return outcome;
    }
    // Restores b v after scaling_step() marked it.
    OPTICAL_DEVICE void unmark() {
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) work.bv[o] = work.weight_b[o] * work.v_next[o];
        problem.grid.spread_columns(work.bv, work.bv_all);
    }
    // The marginal error of the current iterate.
    template <Mode mode>
    OPTICAL_DEVICE float residual_of(const Report& report) const {
        const float rows = problem.grid.residual(report.residual);
        return mode == Mode::relaxed ? rows + work.column_error : rows;
    }
    // Accepts the pending iteration.
    template <bool uses_potentials>
    OPTICAL_DEVICE void accept(int32_t& done, float* history) {
        if (uses_potentials) take_next_potentials();
        take_next_scalings();
        record(history, ++done, !uses_potentials);
    }
    OPTICAL_DEVICE void take_next_scalings() {
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) work.u[o] = work.u_next[o];
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) work.v[o] = work.v_next[o];
    }
    OPTICAL_DEVICE void keep_potentials() {
        work.next_column_error = work.column_error;
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) problem.row(NEXT, o) = problem.row(POTENTIAL, o);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) problem.column(NEXT, o) = problem.column(POTENTIAL, o);
    }
    OPTICAL_DEVICE void take_next_potentials() {
        work.column_error = work.next_column_error;
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) problem.row(POTENTIAL, o) = problem.row(NEXT, o);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) problem.column(POTENTIAL, o) = problem.column(NEXT, o);
    }

    // ------------------------------------------------------------------------------------- history

    OPTICAL_DEVICE int64_t total_rows() const {
        return problem.batch.offset_a ? problem.batch.offset_a[problem.batch.batch]
                                      : problem.batch.batch * problem.batch.n;
    }
    OPTICAL_DEVICE int64_t total_columns() const {
        return problem.batch.offset_b ? problem.batch.offset_b[problem.batch.batch]
                                      : problem.batch.batch * problem.batch.m;
    }
    // The potentials of rows, and of columns, after iteration `done`.
    OPTICAL_DEVICE float* history_rows(float* history, int32_t done) const {
        return history + done * (total_rows() + total_columns()) + problem.a.first;
    }
    OPTICAL_DEVICE float* history_columns(float* history, int32_t done) const {
        return history + done * (total_rows() + total_columns()) + total_rows() + problem.b.first;
    }
    // One warp writes each value. Others read it after the barriers of Objective::evaluate().
    OPTICAL_DEVICE void record(float* history, int32_t done, bool scaled) {
        G& grid = problem.grid;
        if (!history) return;
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o)
            if (grid.warp_across == 0 && grid.own_row(o) < problem.a.count)
                history_rows(history, done)[grid.own_row(o)] =
                    scaled ? problem.row(BASE, o) + work.epsilon_log(work.u[o])
                           : problem.row(POTENTIAL, o);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o)
            if (grid.warp_down == 0 && grid.rank == 0 && grid.own_column(o) < problem.b.count)
                history_columns(history, done)[grid.own_column(o)] =
                    scaled ? problem.column(BASE, o) + work.epsilon_log(work.v[o])
                           : problem.column(POTENTIAL, o);
    }
};

}  // namespace cuda
}  // namespace optical
