// The iteration.
//
// The iteration of sinkhorn.h spends an exponential per entry and half-step. The same iterates come
// from scaling: with base potentials F, G and K_ij = exp((F_i + G_j - C_ij) / epsilon),
//
//     u_i = 1 / sum_j K_ij b_j v_j        f_i = F_i + epsilon log u_i
//     v_j = 1 / sum_i K_ij a_i u_i        g_j = G_j + epsilon log v_j
//
// one multiply-add per entry and half-step. The base of scaling.cuh is
// built anew when u or v has drifted by 2^30, and when a sum falls outside 2^46, where underflow
// could show; then the iteration is repeated. If a sum is outside right after that, masses are
// extreme, and the iteration is done in the log domain, from the cost in shared memory.
//
// Penalties and over-relaxation need the potentials themselves after every half-step, a logarithm
// and an exponential per line ("relaxed" below). Without them u and v are enough, and K may be in
// half precision until the last iterations ("halves"), which are those of the cost again.
#pragma once

#include "halves.cuh"

namespace optical {
namespace cuda {

enum class Mode { plain, relaxed, halves };
enum Flag : unsigned { NOT_CALM = 1, ROWS_LOST = 2, COLUMNS_LOST = 4 };

// Numbers are compared as bits, which orders the positive ones and keeps NaN out.
OPTICAL_DEVICE bool within(float x, unsigned exponent) {
    const unsigned low = (127u - exponent) << 23, high = (127u + exponent) << 23;
    return bits_of(x) - low <= high - low;
}
OPTICAL_DEVICE unsigned loss(float x, unsigned lost) { return within(x, 46) ? 0u : lost; }

template <typename G>
struct Solver : Halves<G> {
    typedef Halves<G> Base;
    static constexpr int RI = G::RI, RJ = G::RJ, OI = G::OI, OJ = G::OJ;
    using Base::a;
    using Base::add_times;
    using Base::add_times_transposed;
    using Base::alpha;
    using Base::au;
    using Base::b;
    using Base::boltzmann;
    using Base::bv;
    using Base::bv_all;
    using Base::column;
    using Base::columns_of;
    using Base::cost;
    using Base::dead_mass;
    using Base::epsilon;
    using Base::g;
    using Base::heat_log;
    using Base::inverse_epsilon;
    using Base::lift_a;
    using Base::lift_b;
    using Base::p;
    using Base::penalty_a;
    using Base::penalty_b;
    using Base::rebase;
    using Base::relaxed;
    using Base::rho_a;
    using Base::rho_b;
    using Base::row;
    using Base::row_share;
    using Base::rows_of;
    using Base::scale;
    using Base::set_step;
    using Base::set_temperature;
    using Base::share_a;
    using Base::share_b;
    using Base::target;
    using Base::u;
    using Base::u_next;
    using Base::v;
    using Base::v_next;
    using Base::weight_a;
    using Base::weight_b;

    OPTICAL_DEVICE Solver(const optical_problem& problem) : Base(problem) {}

    // --------------------------------------------------------------------------- one iteration

    template <bool halves = false>
    OPTICAL_DEVICE static unsigned drift(float x) {
        return (halves ? Base::trusted(x, 0) : within(x, 30)) ? 0u : NOT_CALM;
    }
    // The mass a line is asked to carry, given its potential: as one exponential where the factor
    // would be too large for a number, and the mass possibly too small for one.
    OPTICAL_DEVICE static float asked(float weight, float log_mass, float potential, float rho,
                                      bool penalty) {
        const float exponent = potential * (-OPTICAL_LOG2E / rho);
        if (!penalty) return weight;
        if (exponent > 115) return exp2_fast(OPTICAL_LOG2E * log_mass + exponent);
        return weight * exp2_fast(exponent);
    }

    // One iteration by scaling, into u_next and v_next, or the next potentials, given the sums of
    // rows. With `measure` the residual is that of the rows of the iterate from which it starts.
    template <Mode mode>
    OPTICAL_DEVICE void iterate(const float (&total_row)[OI], bool measure, Note& note) {
        constexpr bool relaxed = mode == Mode::relaxed, halves = mode == Mode::halves;
        float total_column[OJ];
        note.flags = 0;
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) {
            const float total = total_row[o];
            note.flags |= drift<halves>(total);
            if (relaxed) {
                const float origin = row(BASE, o);
                const float next =
                    alpha * row(POTENTIAL, o) + share_a * (origin - heat_log(total));
                row(NEXT, o) = next;
                u_next[o] = boltzmann(next - origin);
                note.flags |= drift(u_next[o]) | loss(total, ROWS_LOST | COLUMNS_LOST);
            } else {
                u_next[o] = reciprocal(total);
            }
            au[o] = (halves ? this->share_of_row[o] : weight_a[o]) * u_next[o];
        }
        sum_columns<mode>(total_column);
        g.exchange_columns(total_column, note, measure, [&] {
            float missed = 0;
            OPTICAL_EACH
            for (int o = 0; o < OI; ++o) {
                const float weight = halves ? row(WEIGHT, o) : weight_a[o];
                const float wanted =
                    relaxed ? asked(weight, row(LOG, o), row(POTENTIAL, o), rho_a, penalty_a)
                            : weight;
                missed += absolute(weight * u[o] * total_row[o] - wanted);
            }
            return missed;
        });
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) {
            const float total = total_column[o];
            note.flags |= drift<halves>(total);
            if (relaxed) {
                const float origin = column(BASE, o);
                const float next =
                    alpha * column(POTENTIAL, o) + share_b * (origin - heat_log(total));
                column(NEXT, o) = next;
                v_next[o] = boltzmann(next - origin);
                note.flags |= drift(v_next[o]) | loss(total, COLUMNS_LOST);
            } else {
                v_next[o] = reciprocal(total);
            }
            bv[o] = (halves ? this->share_of_column[o] : weight_b[o]) * v_next[o];
        }
        if (!halves) g.spread_columns(bv, bv_all);
    }
    // What this warp adds to the sums of its rows, and of its columns.
    template <Mode mode>
    OPTICAL_DEVICE void sum_rows(float (&out)[OI]) {
        if constexpr (mode == Mode::halves) {
            this->multiply_fast(this->straight, bv, out, this->words() + 16 * Base::word_pitch);
            OPTICAL_EACH
            for (int o = 0; o < OI; ++o) out[o] = fused(lift_a[o], this->unit_a, out[o]);
        } else {
            float sum[RI];
            OPTICAL_EACH
            for (int r = 0; r < RI; ++r) sum[r] = r < OI ? lift_a[r % OI] : 0.0f;
            add_times(bv_all, sum);
            g.template fold_rows<Sum>(sum, out);
        }
    }
    template <Mode mode>
    OPTICAL_DEVICE void sum_columns(float (&out)[OJ]) {
        if constexpr (mode == Mode::halves) {
            this->multiply_fast(this->turned, au, out, this->words() + 16 * Base::word_pitch + 64);
            OPTICAL_EACH
            for (int o = 0; o < OJ; ++o) out[o] = fused(lift_b[o], this->unit_b, out[o]);
        } else {
            float of_row[RI], sum[RJ];
            g.spread_rows(au, of_row);
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c) sum[c] = c < OJ ? lift_b[c % OJ] : 0.0f;
            add_times_transposed(of_row, sum);
            g.template fold_columns<Sum>(sum, out);
        }
    }
    // What was lost, once it is known that something drifted: bounds are the same for a sum and
    // its inverse.
    template <Mode mode>
    OPTICAL_DEVICE unsigned lost(unsigned flags) {
        const auto kept_well = [&](float x) {
            return mode == Mode::halves ? Base::trusted(reciprocal(x), 3) : within(x, 46);
        };
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) flags |= kept_well(u_next[o]) ? 0u : ROWS_LOST | COLUMNS_LOST;
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) flags |= kept_well(v_next[o]) ? 0u : COLUMNS_LOST;
        return g.united(flags);
    }

    // The potentials of the current u and v.
    OPTICAL_DEVICE void absorb(float unit_of_row, float unit_of_column) {
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o)
            row(POTENTIAL, o) = row(BASE, o) + heat_log(u[o] * unit_of_row);
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o)
            column(POTENTIAL, o) = column(BASE, o) + heat_log(v[o] * unit_of_column);
    }

    // The same iteration in the log domain, from the potentials into the next ones.
    OPTICAL_DEVICE float iterate_log_domain() {
        float of_column[RJ], log_column[RJ], low[OI] = {}, total[OI] = {};
        columns_of(POTENTIAL, of_column);
        columns_of(LOG, log_column);
        const auto row_exponent = [&](int r, int c) {
            return (cost(r, c) - of_column[c]) * inverse_epsilon - log_column[c];
        };
        OPTICAL_ROLLED
        for (int q = 0; q < RI; ++q) {
            const int r = g.slot_of(q);
            float least = infinity();
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c) least = smaller(least, row_exponent(r, c));
            g.template fold_row<Least>(least, q, low);
        }
        g.template combine_rows<Least>(low);
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) low[o] = row(PAD, o) > 0 ? 0.0f : low[o];
        OPTICAL_ROLLED
        for (int q = 0; q < RI; ++q) {
            const int r = g.slot_of(q);
            const float origin = g.row_value(low, q);
            float sum = 0;
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c)
                sum += exp2_fast(OPTICAL_LOG2E * (origin - row_exponent(r, c)));
            g.template fold_row<Sum>(sum, q, total);
        }
        g.template combine_rows<Sum>(total);
        double missed[1] = {0};
        float next_row[OI];
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) {
            const float softmin =
                epsilon * (low[o] - OPTICAL_LN2 * log2_fast(total[o] + row(PAD, o)));
            const float old = row(POTENTIAL, o);
            missed[0] += absolute(row_share(o, old, softmin) -
                                  asked(weight_a[o], row(LOG, o), old, rho_a, penalty_a));
            next_row[o] = alpha * old + share_a * softmin;
            row(NEXT, o) = next_row[o];
        }
        float log_row[OI], lowest[RJ], bottom[OJ], sum_column[RJ], total_column[OJ];
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) log_row[o] = row(LOG, o);
        OPTICAL_EACH
        for (int c = 0; c < RJ; ++c) lowest[c] = infinity(), sum_column[c] = 0;
        OPTICAL_ROLLED
        for (int q = 0; q < RI; ++q) {
            const float f = g.row_value(next_row, q), log_mass = g.row_value(log_row, q);
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c)
                lowest[c] = smaller(
                    lowest[c], (cost(g.slot_of(q), c) - f) * inverse_epsilon - log_mass);
        }
        g.template columns<Least>(lowest, bottom);
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) bottom[o] = column(PAD, o) > 0 ? 0.0f : bottom[o];
        g.spread_columns(bottom, lowest);
        OPTICAL_ROLLED
        for (int q = 0; q < RI; ++q) {
            const float f = g.row_value(next_row, q), log_mass = g.row_value(log_row, q);
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c) {
                const float exponent =
                    (cost(g.slot_of(q), c) - f) * inverse_epsilon - log_mass;
                sum_column[c] += exp2_fast(OPTICAL_LOG2E * (lowest[c] - exponent));
            }
        }
        g.template columns<Sum>(sum_column, total_column);
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) {
            const float softmin =
                epsilon * (bottom[o] - OPTICAL_LN2 * log2_fast(total_column[o] + column(PAD, o)));
            column(NEXT, o) = alpha * column(POTENTIAL, o) + share_b * softmin;
        }
        g.total(missed, true);
        return (float)missed[0] + (penalty_a ? 0.0f : dead_mass);
    }

    // Iterates from the potentials; returns the number of iterations, and whether `tol` was met.
    // With a history, keeps the potentials of every iteration there. K belongs to the inner loop
    // alone, so that no register holds it anywhere else.
    OPTICAL_DEVICE int32_t solve(int32_t max_iter, float tol, bool& converged, float* history) {
        bool halves = G::fast;
        bool cold = false;  // the last iteration was at the temperature of the problem
        int failures = 0;   // of the scaling: after a few, only the log domain is used
        double heat = p.anneal_start;
        int32_t done = 0;
        converged = false;
        record(history, 0, false);
        while (done < max_iter && !converged) {
            set_temperature(heat > (double)target ? (float)heat : target);
            bool log_domain = failures >= 4;
            if (!log_domain) {
                rebase();
                if constexpr (G::fast) {
                    // The iterations that remain after those in half precision see the cost as it
                    // is: the last one, or where `tol` was met, all until it is met again.
                    halves = halves && done + 1 < max_iter && this->begin_halves();
                    if (halves) {
                        const int32_t before = done;
                        const Run run = scale_on<Mode::halves>(max_iter - 1, tol, done, cold, heat,
                                                               history);
                        halves = run == Run::over && done >= before + 4;
                        continue;
                    }
                }
                const Run run =
                    relaxed && !G::fast
                        ? scale_on<Mode::relaxed>(max_iter, tol, done, cold, heat, history)
                        : scale_on<Mode::plain>(max_iter, tol, done, cold, heat, history);
                converged = run == Run::met;
                log_domain = run == Run::lost;
                failures += log_domain;
            }
            if (!log_domain) continue;
            set_step(done == 0 || epsilon != target ? 1.0f : (float)p.omega);
            const bool test = tol > 0 && done > 0 && cold && epsilon == target;
            converged = iterate_log_domain() <= tol && test;
            if (converged) break;
            take_next();
            record(history, ++done, false);
            cold = epsilon == target;
            heat *= p.anneal_ratio;
        }
        set_temperature(target);
        return done;
    }

    // Iterations on one base, until it no longer serves. `met`: `tol` is; `lost`: not even the
    // first could be trusted.
    //
    // Whether an iteration may be taken is asked at the barrier of the next one's rows, which costs
    // nothing: until then it is `pending`, and u and v are those before it.
    enum class Run { met, lost, over };
    template <Mode mode>
    OPTICAL_DEVICE Run scale_on(int32_t max_iter, float tol, int32_t& done, bool& cold,
                                double& heat, float* history) {
        constexpr bool relaxed = mode == Mode::relaxed;
        const bool at_target = epsilon == target;
        const float omega = at_target ? (float)p.omega : 1.0f;
        const int32_t before = done;
        // The next iteration of an annealed run is at another temperature.
        const int32_t last = kept((heat > (double)target ? done + 1 : max_iter) - 1);
        const float bound = tol - (penalty_a ? 0.0f : dead_mass);
        const float limit = kept(tol > 0 && at_target ? bound : -1.0f);
        bool measure = limit >= 0 && done > 0 && cold;
        Note note = {0, 0};
        Run run = Run::over;
        --done;  // the iterate from which this run starts is taken first
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) u_next[o] = u[o];
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) v_next[o] = v[o];
        if (relaxed) stay();
        while (true) {
            float total_row[OI];
            sum_rows<mode>(total_row);
            if (g.exchange_rows(total_row, note.flags != 0)) {
                const unsigned flags = lost<mode>(note.flags);
                if (flags & COLUMNS_LOST) {
                    if (done == before) run = Run::lost;
                    break;
                }
                // A state that is not calm even on a base of its own gains nothing from another.
                if (!(relaxed && done == before)) {
                    accept<relaxed>(done, history);
                    break;
                }
            }
            accept<relaxed>(done, done < before ? nullptr : history);
            if (relaxed) set_step(done == 0 ? 1.0f : omega);
            iterate<mode>(total_row, measure, note);
            // Of an iteration that lost a sum of its rows, the weights before belong to no state.
            if (measure && g.residual(note.residual) <= limit &&
                !(lost<mode>(note.flags) & ROWS_LOST)) {
                run = Run::met;
                break;
            }
            if (done == last) {
                if (!g.any(note.flags != 0) || !(lost<mode>(note.flags) & COLUMNS_LOST))
                    accept<relaxed>(done, history);
                else if (done == before) run = Run::lost;
                break;
            }
            measure = limit >= 0;
        }
        if (done > before) cold = at_target;
        if (done > before && heat > (double)target) heat *= p.anneal_ratio;
        if (!relaxed && done > before) {
            if (mode == Mode::halves) absorb(this->unit_a, this->unit_b);
            else absorb(1.0f, 1.0f);
        }
        return run;
    }
    // Takes the iteration that was pending.
    template <bool relaxed>
    OPTICAL_DEVICE void accept(int32_t& done, float* history) {
        if (relaxed) take_next();
        take_scalings_next();
        record(history, ++done, !relaxed);
    }
    OPTICAL_DEVICE void take_scalings_next() {
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) u[o] = u_next[o];
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) v[o] = v_next[o];
    }
    OPTICAL_DEVICE void stay() {
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) row(NEXT, o) = row(POTENTIAL, o);
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) column(NEXT, o) = column(POTENTIAL, o);
    }
    OPTICAL_DEVICE void take_next() {
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) row(POTENTIAL, o) = row(NEXT, o);
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) column(POTENTIAL, o) = column(NEXT, o);
    }

    // ------------------------------------------------------------------------------ the history

    OPTICAL_DEVICE int64_t all_lines_a() const {
        return p.offset_a ? p.offset_a[p.batch] : p.batch * p.n;
    }
    OPTICAL_DEVICE int64_t all_lines_b() const {
        return p.offset_b ? p.offset_b[p.batch] : p.batch * p.m;
    }
    // Where the potentials of rows, and of columns, after iteration `done` are kept.
    OPTICAL_DEVICE float* kept_rows(float* history, int32_t done) const {
        return history + done * (all_lines_a() + all_lines_b()) + a.first;
    }
    OPTICAL_DEVICE float* kept_columns(float* history, int32_t done) const {
        return history + done * (all_lines_a() + all_lines_b()) + all_lines_a() + b.first;
    }
    OPTICAL_DEVICE void record(float* history, int32_t done, bool scaled) {
        if (!history) return;
        // Every warp writes the same and reads only what it wrote itself.
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o)
            if (g.own_row(o) < a.count)
                kept_rows(history, done)[g.own_row(o)] =
                    scaled ? row(BASE, o) + heat_log(u[o]) : row(POTENTIAL, o);
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o)
            if (g.own_column(o) < b.count)
                kept_columns(history, done)[g.own_column(o)] =
                    scaled ? column(BASE, o) + heat_log(v[o]) : column(POTENTIAL, o);
    }
};

}  // namespace cuda
}  // namespace optical
