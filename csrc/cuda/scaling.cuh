// A problem that was read, and K in registers.
//
// With base potentials F, G and K_ij = exp((F_i + G_j - C_ij) / epsilon), the choice of the base is
// what makes scaling safe. For the current g it is that of zero temperature,
// F_i = min_j (C_ij - g_j) and G_j = min_i (C_ij - F_i): then K <= 1, and every row and column holds
// an entry that is exactly 1, so nothing overflows and what underflows was invisible.
//
// What is rare runs in loops over rows that are not unrolled.
#pragma once

#include "cost.cuh"

namespace optical {
namespace cuda {

// K and what it is made of: the masses, the base, and products.
template <typename G>
struct Scaling : Cost<G> {
    typedef Cost<G> Base;
    static constexpr int RI = G::RI, RJ = G::RJ, OI = G::OI, OJ = G::OJ;
    using Base::b;
    using Base::a;
    using Base::column;
    using Base::columns_of;
    using Base::cost;
    using Base::g;
    using Base::index;
    using Base::p;
    using Base::price;
    using Base::row;
    using Base::rows_of;

    float K[RI][RJ];
    float epsilon, scale, inverse_epsilon, target;
    float rho_a, rho_b, alpha, share_a, share_b;
    bool relaxed, penalty_a, penalty_b;
    double total_a, total_b;
    float dead_mass;
    bool dead_rows, dead_columns;
    // Of owned lines, and b v of all columns of this lane.
    float u[OI], v[OJ], u_next[OI], v_next[OJ], au[OI], bv[OJ], bv_all[RJ];
    float weight_a[OI], weight_b[OJ];
    // PAD, in the one warp that adds it to the sums of a line.
    float lift_a[OI], lift_b[OJ];

    OPTICAL_DEVICE Scaling(const optical_problem& problem) : Base(problem) {}

    // -------------------------------------------------------------------------------- the set-up

    OPTICAL_DEVICE void set_temperature(float value) {
        epsilon = value;
        inverse_epsilon = 1.0f / value;
        scale = OPTICAL_LOG2E / value;
    }
    // f <- alpha f + share softmin, with the shares of the present temperature.
    OPTICAL_DEVICE void set_step(float omega) {
        alpha = 1.0f - omega;
        share_a = omega * (penalty_a ? rho_a / (rho_a + epsilon) : 1.0f);
        share_b = omega * (penalty_b ? rho_b / (rho_b + epsilon) : 1.0f);
    }
    // epsilon log x.
    OPTICAL_DEVICE float heat_log(float x) const { return epsilon * (OPTICAL_LN2 * log2_fast(x)); }
    OPTICAL_DEVICE float boltzmann(float energy) const { return exp2_fast(energy * scale); }

    // Reads the problem. False: a side is absent, or an input is not a number; `status` says which.
    OPTICAL_DEVICE bool read(int32_t& status) {
        enum { HAS_ROW = 1, HAS_COLUMN = 2, INVALID = 4 };
        unsigned found = Base::fill() ? 0 : INVALID;
        rho_a = (float)p.rho_a, rho_b = (float)p.rho_b;
        penalty_a = rho_a < infinity(), penalty_b = rho_b < infinity();
        relaxed = p.omega != 1 || penalty_a || penalty_b;
        target = ((const float*)p.epsilon)[index];
        set_temperature(target);
        const bool usable =
            (target > 0) & (target < infinity()) & (inverse_epsilon < infinity());
        found |= usable ? 0 : INVALID;
        double mass_a[1] = {0}, mass_b[1] = {0};
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) {
            const float log_mass = Base::log_a(g.own_row(o));
            const bool here = log_mass != -infinity();
            found |= (here ? HAS_ROW : 0) | (log_mass < infinity() ? 0 : INVALID);
            const float mass = here ? exp2_fast(log_mass * OPTICAL_LOG2E) : 0.0f;
            row(LOG, o) = here ? log_mass : 0.0f;
            row(MASS, o) = mass;
            mass_a[0] += mass;
            const float start =
                here && p.init_f ? ((const float*)p.init_f)[a.first + g.own_row(o)] : 0.0f;
            found |= is_finite(start) ? 0 : INVALID;
            row(POTENTIAL, o) = start;
        }
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) {
            const float log_mass = Base::log_b(g.own_column(o));
            const bool here = log_mass != -infinity();
            found |= (here ? HAS_COLUMN : 0) | (log_mass < infinity() ? 0 : INVALID);
            const float mass = here ? exp2_fast(log_mass * OPTICAL_LOG2E) : 0.0f;
            column(LOG, o) = here ? log_mass : 0.0f;
            column(MASS, o) = mass;
            mass_b[0] += mass;
            const float start =
                here && p.init_g ? ((const float*)p.init_g)[b.first + g.own_column(o)] : 0.0f;
            found |= is_finite(start) ? 0 : INVALID;
            column(POTENTIAL, o) = start;
        }
        g.total(mass_a, true);
        g.total(mass_b, false);
        total_a = mass_a[0], total_b = mass_b[0];
        found |= (total_a - total_a == 0) & (total_b - total_b == 0) ? 0 : INVALID;
        found = g.united(found);
        const bool empty = !(found & HAS_ROW) || !(found & HAS_COLUMN);
        status = empty                ? OPTICAL_EMPTY
                 : (found & INVALID) ? OPTICAL_INFEASIBLE
                                     : OPTICAL_MAX_ITER;
        if (status != OPTICAL_MAX_ITER) return false;
        mark_dead();
        return true;
    }

    // ---------------------------------------------------------------------------------- the base

    // K of the base, or in its place the plan of the potentials.
    OPTICAL_DEVICE void build(bool plan) {
        float of_row[RI], of_column[RJ], more_row[RI], more_column[RJ];
        rows_of(plan ? POTENTIAL : BASE, of_row);
        columns_of(plan ? POTENTIAL : BASE, of_column);
        rows_of(LOG, more_row);
        columns_of(LOG, more_column);
        const float logs = plan ? OPTICAL_LOG2E : 0.0f;
        OPTICAL_EACH
        for (int r = 0; r < RI; ++r)
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c) {
                const float total = (of_row[r] - cost(r, c)) + of_column[c];
                K[r][c] = exp2_fast(fused(total, scale, logs * (more_row[r] + more_column[c])));
            }
    }
    // One entry of the plan, by the same operations: sums must be those of the same numbers.
    OPTICAL_DEVICE float plan_of(int r, int c, float f, float log_i, float g_j, float log_j) const {
        const float total = (f - cost(r, c)) + g_j;
        return exp2_fast(fused(total, scale, OPTICAL_LOG2E * (log_i + log_j)));
    }

    // Finds the lines without an allowed pair: their potentials are 0 and they carry nothing.
    OPTICAL_DEVICE void mark_dead() {
        float by_column[RJ], row_least[OI] = {}, column_least[OJ];
        OPTICAL_EACH
        for (int c = 0; c < RJ; ++c) by_column[c] = infinity();
        OPTICAL_ROLLED
        for (int q = 0; q < RI; ++q) {
            const int r = g.slot_of(q);
            float least = infinity();
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c) {
                least = smaller(least, cost(r, c));
                by_column[c] = smaller(by_column[c], cost(r, c));
            }
            g.template fold_row<Least>(least, q, row_least);
        }
        g.template combine_rows<Least>(row_least);
        g.template columns<Least>(by_column, column_least);
        double missing[2] = {0, 0}, lost[1] = {0};
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) {
            const bool dead = row_least[o] == infinity();
            const float mass = row(MASS, o);
            row(PAD, o) = dead ? 1.0f : 0.0f;
            row(WEIGHT, o) = weight_a[o] = dead ? 0.0f : mass;
            lift_a[o] = g.warp_across == 0 ? row(PAD, o) : 0.0f;
            missing[0] += dead ? mass : 0.0f;
            missing[1] += dead && Base::present_a(g.own_row(o));
            if (dead) row(POTENTIAL, o) = 0;
        }
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) {
            const bool dead = column_least[o] == infinity();
            column(PAD, o) = dead ? 1.0f : 0.0f;
            column(WEIGHT, o) = weight_b[o] = dead ? 0.0f : column(MASS, o);
            lift_b[o] = g.rank == 0 && g.warp_down == 0 ? column(PAD, o) : 0.0f;
            lost[0] += dead && Base::present_b(g.own_column(o));
            if (dead) column(POTENTIAL, o) = 0;
        }
        g.total(missing, true);
        g.total(lost, false);
        dead_mass = (float)missing[0], dead_rows = missing[1] > 0, dead_columns = lost[0] > 0;
    }

    // Chooses the base for the current g and builds K, b v and u from it: with u the stopping rule
    // knows what the rows carry.
    OPTICAL_DEVICE void rebase() {
        float of_column[RJ], nearest[RJ], base_row[OI] = {}, base_column[OJ];
        columns_of(POTENTIAL, of_column);
        OPTICAL_ROLLED
        for (int q = 0; q < RI; ++q) {
            const int r = g.slot_of(q);
            float least = infinity();
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c) least = smaller(least, cost(r, c) - of_column[c]);
            g.template fold_row<Least>(least, q, base_row);
        }
        g.template combine_rows<Least>(base_row);
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o)
            row(BASE, o) = base_row[o] = row(PAD, o) > 0 ? 0.0f : base_row[o];
        OPTICAL_EACH
        for (int c = 0; c < RJ; ++c) nearest[c] = infinity();
        OPTICAL_ROLLED
        for (int q = 0; q < RI; ++q) {
            const int r = g.slot_of(q);
            const float of_row = g.row_value(base_row, q);
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c) nearest[c] = smaller(nearest[c], cost(r, c) - of_row);
        }
        g.template columns<Least>(nearest, base_column);
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) column(BASE, o) = column(PAD, o) > 0 ? 0.0f : base_column[o];
        build(false);
        take_scalings();
    }

    OPTICAL_DEVICE void take_scalings() {
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) u[o] = boltzmann(row(POTENTIAL, o) - row(BASE, o));
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) {
            v[o] = boltzmann(column(POTENTIAL, o) - column(BASE, o));
            bv[o] = weight_b[o] * v[o];
        }
        g.spread_columns(bv, bv_all);
    }
    OPTICAL_DEVICE float row_share(int o, float potential, float origin) const {
        const float exponent = (potential - origin) * scale + row(LOG, o) * OPTICAL_LOG2E;
        return row(PAD, o) > 0 ? 0.0f : exp2_fast(exponent);
    }

    // ------------------------------------------------------------------------ products with K

    // To what is in `sum`.
    OPTICAL_DEVICE void add_times(const float (&x)[RJ], float (&sum)[RI]) const {
        OPTICAL_EACH
        for (int c = 0; c < RJ; ++c)
            OPTICAL_EACH
            for (int r = 0; r < RI; ++r) sum[r] = fused(K[r][c], x[c], sum[r]);
    }
    OPTICAL_DEVICE void add_times_transposed(const float (&x)[RI], float (&sum)[RJ]) const {
        OPTICAL_EACH
        for (int r = 0; r < RI; ++r)
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c) sum[c] = fused(K[r][c], x[r], sum[c]);
    }
    // K x for x by owned columns, and K' x for x by owned rows.
    OPTICAL_DEVICE void rows_times(const float (&x)[OJ], float (&out)[OI]) {
        float all[RJ], sum[RI] = {};
        g.spread_columns(x, all);
        add_times(all, sum);
        g.template rows<Sum>(sum, out);
    }
    OPTICAL_DEVICE void columns_times(const float (&x)[OI], float (&out)[OJ]) {
        float all[RI], sum[RJ] = {};
        g.spread_rows(x, all);
        add_times_transposed(all, sum);
        g.template columns<Sum>(sum, out);
    }
};

}  // namespace cuda
}  // namespace optical
