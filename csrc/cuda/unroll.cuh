// The derivative of the iterations as they ran: they run again, keeping f_k and g_k, and are then
// undone one by one. With pi_ij = a_i exp((f_i + g_j - C_ij) / epsilon) and sigma_ij = b_j exp(...)
// at the values of a step, all products are with K, and a step gives the cost K times a matrix of
// rank two.
#pragma once

#include "gradient.cuh"

namespace optical {
namespace cuda {

template <typename G>
struct Unrolled : Gradient<G> {
    typedef Gradient<G> Result;
    static constexpr int RI = G::RI, RJ = G::RJ, OI = G::OI, OJ = G::OJ;
    using Result::a;
    using Result::b;
    using Result::column;
    using Result::g;
    using Result::grad_value;
    using Result::index;
    using Result::K;
    using Result::linear;
    using Result::out;
    using Result::p;
    using Result::price;
    using Result::row;
    using Result::target;
    using Result::up;

    // What the sweep keeps for its lines.
    enum { BAR = KEEP_1, BAR_MASS = KEEP_2, FROM = KEEP_3, SLOPE = KEEP_4 };

    float* const history;

    OPTICAL_DEVICE Unrolled(const optical_problem& problem, const optical_gradient& gradient,
                            float* potentials)
        : Result(problem, gradient), history(potentials) {}

    OPTICAL_DEVICE void differentiate() {
        int32_t status;
        if (!this->read(status)) return this->clear();
        this->take_upstream();
        unroll();
        this->write();
    }

    OPTICAL_DEVICE void unroll() {
        const int32_t ran = out.n_iter[index];
        bool converged;
        const int32_t steps =
            this->solve(ran < 0 ? 0 : ran < p.max_iter ? ran : p.max_iter, 0.0f, converged,
                        history);
        this->sum_up();
        begin_sweep();
        bool based = false;
        OPTICAL_ROLLED
        for (int32_t k = steps - 1; k >= 0; --k) {
            const float *const f = this->kept_rows(history, k + 1);
            const float *const new_g = this->kept_columns(history, k + 1);
            const float *const old_g = this->kept_columns(history, k);
            this->set_step(k == 0 ? 1.0f : (float)p.omega);
            // On the base at hand, on a new one, or else each half with pi or sigma itself as K.
            OPTICAL_ROLLED
            for (int attempt = based ? 0 : 1; attempt < 4; ++attempt) {
                if (attempt == 1) {
                    take(f, old_g);
                    this->rebase();
                }
                if (attempt >= 2)
                    exact_base(this->kept_rows(history, k), f, old_g, new_g, attempt == 2);
                const bool harmless = replay(f, old_g, attempt >= 2);
                if (attempt < 2 && !harmless) continue;
                based = attempt < 2;
                reverse(attempt != 3, attempt != 2);
                if (based) break;
            }
        }
        float of_row[OI], of_column[OJ];
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) of_row[o] = row(BAR_MASS, o);
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) of_column[o] = column(BAR_MASS, o);
        this->write_masses(of_row, of_column);
        this->begin_along();
        OPTICAL_ROLLED
        for (int q = 0; q < RI; ++q) {
            const int r = g.slot_of(q);
            float along = 0;
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c) this->set(r, c, received(r, c), price(r, c), along);
            this->end_row(along, q);
        }
    }

    // What the cost has received so far, behind everything else that is private.
    OPTICAL_DEVICE float& received(int r, int c) const {
        return this->mine[(Result::private_floats + r * RJ + c) * g.threads];
    }

    // What the results receive, before any iteration is undone.
    OPTICAL_DEVICE void begin_sweep() {
        const float scale = this->inverse_epsilon;
        float slope_row[OI], slope_column[OJ], by_row[OI], by_column[OJ];
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o)
            row(SLOPE, o) = slope_row[o] = dual_slope(row(POTENTIAL, o), row(SUMS, o), row(MASS, o),
                                                      row(LOG, o), this->rho_a, this->penalty_a);
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o)
            column(SLOPE, o) = slope_column[o] =
                dual_slope(column(POTENTIAL, o), column(SUMS, o), column(MASS, o), column(LOG, o),
                           this->rho_b, this->penalty_b);
        this->build(true);
        this->rows_times(slope_column, by_row);
        this->columns_times(slope_row, by_column);
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) {
            const int i = g.own_row(o);
            const float sum = row(SUMS, o), mass = row(MASS, o);
            const float slope =
                grad_value * (slope_row[o] * sum + by_row[o]) + linear * row(SPENT, o);
            float direct = target * (mass * (float)this->total_b - sum);
            if (this->penalty_a) direct += this->rho_a * (mass - sum);
            const bool given = out.grad_f && this->present_a(i) && row(PAD, o) == 0;
            row(BAR, o) = slope * scale + (given ? ((const float*)out.grad_f)[a.first + i] : 0.0f);
            row(BAR_MASS, o) = slope + grad_value * direct;
        }
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) {
            const int j = g.own_column(o);
            const float sum = column(SUMS, o), mass = column(MASS, o);
            const float slope =
                grad_value * (slope_column[o] * sum + by_column[o]) + linear * column(SPENT, o);
            float direct = target * (mass * (float)this->total_a - sum);
            if (this->penalty_b) direct += this->rho_b * (mass - sum);
            const bool given = out.grad_g && this->present_b(j) && column(PAD, o) == 0;
            column(BAR, o) =
                slope * scale + (given ? ((const float*)out.grad_g)[b.first + j] : 0.0f);
            column(BAR_MASS, o) = slope + grad_value * direct;
        }
        float of_row[RI], of_column[RJ];
        this->rows_of(SLOPE, of_row);
        this->columns_of(SLOPE, of_column);
        OPTICAL_EACH
        for (int r = 0; r < RI; ++r)
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c) {
                const float slope =
                    grad_value * (of_row[r] + of_column[c]) + linear * price(r, c);
                received(r, c) = K[r][c] * (up - slope * scale);
            }
    }
    OPTICAL_DEVICE static float dual_slope(float potential, float found, float mass, float log_mass,
                                           float rho, bool penalty) {
        if (!penalty) return potential;
        return (float)(potential + (double)rho * Result::log_ratio(found, mass, log_mass));
    }

    // Kept potentials as those of the state.
    OPTICAL_DEVICE void take(const float* f, const float* old_g) {
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) {
            const int i = g.own_row(o);
            row(POTENTIAL, o) = i < a.count ? f[i] : 0.0f;
        }
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) {
            const int j = g.own_column(o);
            column(POTENTIAL, o) = j < b.count ? old_g[j] : 0.0f;
        }
    }
    // Makes K pi of the half step that found new_g from f, or sigma of the one that found f from
    // old_g, out of what was given to it and the minimum that it found, of which it kept a share.
    // With the masses inside, no entry exceeds 1, however small they are.
    OPTICAL_DEVICE void exact_base(const float* old_f, const float* f, const float* old_g,
                                   const float* new_g, bool of_columns) {
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) {
            const int i = g.own_row(o);
            const float next = i < a.count ? f[i] : 0.0f, old = i < a.count ? old_f[i] : 0.0f;
            row(BASE, o) = of_columns ? next + target * row(LOG, o)
                                      : (next - this->alpha * old) / this->share_a;
        }
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) {
            const int j = g.own_column(o);
            const float next = j < b.count ? new_g[j] : 0.0f, old = j < b.count ? old_g[j] : 0.0f;
            column(BASE, o) = of_columns ? (next - this->alpha * old) / this->share_b
                                         : old + target * column(LOG, o);
        }
        this->build(false);
    }

    // Runs one iteration again on the present base, from old_g to f: leaves the scales with which
    // the rows of sigma and the columns of pi sum to 1 whatever was rounded, and a u and b v, which
    // are 1 where K is pi or sigma. False: a number on the way was not harmless.
    OPTICAL_DEVICE bool replay(const float* f, const float* old_g, bool exact) {
        unsigned flags = 0;
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) {
            const int j = g.own_column(o);
            const float scaling =
                this->boltzmann((j < b.count ? old_g[j] : 0.0f) - column(BASE, o));
            this->bv[o] = exact ? 1.0f : share(this->weight_b[o], scaling, flags);
        }
        float by_row[OI], by_column[OJ];
        this->rows_times(this->bv, by_row);
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) {
            const int i = g.own_row(o);
            const float total = by_row[o] + row(PAD, o);
            flags |= loss(total, COLUMNS_LOST);
            row(FROM, o) = 1.0f / total;
            this->au[o] = this->weight_a[o] / total;
            if (this->relaxed)
                this->au[o] = share(this->weight_a[o],
                                    this->boltzmann((i < a.count ? f[i] : 0.0f) - row(BASE, o)),
                                    flags);
            if (exact) this->au[o] = 1;
        }
        this->columns_times(this->au, by_column);
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) {
            const float total = by_column[o] + column(PAD, o);
            flags |= loss(total, COLUMNS_LOST);
            column(FROM, o) = 1.0f / total;
        }
        return g.united(flags) == 0;
    }

    // A mass too small for a number counts for nothing, unless its scale is large.
    OPTICAL_DEVICE static float share(float weight, float scaling, unsigned& flags) {
        if (weight > 0 || scaling > 1) flags |= loss(scaling, COLUMNS_LOST);
        return weight > 0 ? weight * scaling : 0.0f;
    }

    // Undoes the step that was replayed, the half that made g, the half that made f, or both.
    OPTICAL_DEVICE void reverse(bool of_columns, bool of_rows) {
        float to_column[OJ], to_row[OI], by_row[OI], by_column[OJ];
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o)
            to_column[o] =
                of_columns ? column(FROM, o) * (this->share_b * column(BAR, o)) : 0.0f;
        this->rows_times(to_column, by_row);
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) {
            if (!of_columns) this->au[o] = 0;
            const float got = of_columns ? this->au[o] * by_row[o] : 0.0f;
            const float bar = row(BAR, o) - got;
            to_row[o] = of_rows ? row(FROM, o) * (this->share_a * bar) : 0.0f;
            row(BAR_MASS, o) -= target * got;
            row(BAR, o) = of_rows ? this->alpha * bar : bar;
        }
        this->columns_times(to_row, by_column);
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) {
            if (!of_rows) this->bv[o] = 0;
            const float got = of_rows ? this->bv[o] * by_column[o] : 0.0f;
            const float bar = column(BAR, o);
            column(BAR_MASS, o) -= target * got;
            column(BAR, o) = (of_columns ? this->alpha * bar : bar) - got;
        }
        float au[RI], bv[RJ], from_row[RI], from_column[RJ];
        g.spread_rows(this->au, au);
        g.spread_rows(to_row, from_row);
        g.spread_columns(this->bv, bv);
        g.spread_columns(to_column, from_column);
        OPTICAL_EACH
        for (int r = 0; r < RI; ++r)
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c)
                received(r, c) += K[r][c] * (au[r] * from_column[c] + from_row[r] * bv[c]);
    }
};

}  // namespace cuda
}  // namespace optical
