// What a solution is worth, and the linear system behind implicit gradients.
#pragma once

#include "solver.cuh"

namespace optical {
namespace cuda {

template <typename G>
struct Results : Solver<G> {
    typedef Solver<G> Solve;
    static constexpr int RI = G::RI, RJ = G::RJ, OI = G::OI, OJ = G::OJ;
    using Solve::column;
    using Solve::g;
    using Solve::K;
    using Solve::p;
    using Solve::price;
    using Solve::row;
    using Solve::target;

    // Sums of the adjoint system, of which each takes the place of one no longer needed.
    enum { ROW_INVERSE = NEXT, DIAGONAL = NEXT, RESIDUAL = KEEP_1, DIRECTION = KEEP_2,
           IMAGE = KEEP_3, BEST = KEEP_4 };

    double value, linear, error;

    OPTICAL_DEVICE Results(const optical_problem& problem) : Solve(problem) {}

    // log(found / mass), 0 where nothing is transported: in double precision, since a large rho
    // magnifies every error. The mass may be too small for a number where its logarithm is not.
    OPTICAL_DEVICE static double log_ratio(float found, float mass, float log_mass) {
        if (!(found > 0)) return 0;
        return mass > 1e-30f ? logarithm((double)found / (double)mass)
                             : logarithm((double)found) - (double)log_mass;
    }

    // Adds to linear, dual, mass, error and divergence: how far a line's mass is from what its
    // potential asks for, and what that costs.
    OPTICAL_DEVICE static void add_line(double (&t)[5], float found, float spent, float mass,
                                        float log_mass, float weight, float potential, float rho,
                                        bool penalty) {
        const double sum = found;
        t[0] += spent, t[1] += sum * potential, t[2] += sum;
        const float wanted = Solve::asked(weight, log_mass, potential, rho, penalty);
        t[3] += absolute(found - (penalty ? wanted : mass));
        if (!penalty) return;
        const double ratio = log_ratio(found, mass, log_mass);
        t[4] += (double)rho * (sum * ratio - sum + (double)mass);
    }

    // The values and the marginal error. Leaves the sums of the plan, and those of P C, with the
    // lines.
    OPTICAL_DEVICE void sum_up() {
        float f[OI], log_row[OI], g_all[RJ], log_column[RJ], sums[RJ], spends[RJ];
        this->columns_of(POTENTIAL, g_all);
        this->columns_of(LOG, log_column);
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) f[o] = row(POTENTIAL, o), log_row[o] = row(LOG, o);
        OPTICAL_EACH
        for (int c = 0; c < RJ; ++c) sums[c] = spends[c] = 0;
        float by_row[OI] = {}, paid_by_row[OI] = {}, by_column[OJ];
        OPTICAL_ROLLED
        for (int q = 0; q < RI; ++q) {
            const int r = g.slot_of(q);
            const float f_i = g.row_value(f, q), log_i = g.row_value(log_row, q);
            float sum = 0, spent = 0;
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c) {
                const float flow = this->plan_of(r, c, f_i, log_i, g_all[c], log_column[c]);
                const float paid = flow * price(r, c);
                sum += flow, sums[c] += flow, spent += paid, spends[c] += paid;
            }
            g.template fold_row<Sum>(sum, q, by_row);
            g.template fold_row<Sum>(spent, q, paid_by_row);
        }
        g.template combine_rows<Sum>(by_row);
        keep_rows(SUMS, by_row);
        g.template combine_rows<Sum>(paid_by_row);
        keep_rows(SPENT, paid_by_row);
        g.template columns<Sum>(sums, by_column);
        keep_columns(SUMS, by_column);
        g.template columns<Sum>(spends, by_column);
        keep_columns(SPENT, by_column);
        double t[5] = {0, 0, 0, 0, 0}, s[5] = {0, 0, 0, 0, 0};
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o)
            add_line(t, row(SUMS, o), row(SPENT, o), row(MASS, o), row(LOG, o), row(WEIGHT, o),
                     row(POTENTIAL, o), this->rho_a, this->penalty_a);
        g.total(t, true);
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o)
            add_line(s, column(SUMS, o), 0.0f, column(MASS, o), column(LOG, o),
                     column(WEIGHT, o), column(POTENTIAL, o), this->rho_b, this->penalty_b);
        g.total(s, false);
        linear = t[0];
        error = t[3] + s[3];
        const double excess = (double)target * (this->total_a * this->total_b - t[2]);
        value = t[1] + s[1] + excess + t[4] + s[4];
    }
    OPTICAL_DEVICE void keep_rows(int name, const float (&x)[OI]) {
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) row(name, o) = x[o];
    }
    OPTICAL_DEVICE void keep_columns(int name, const float (&x)[OJ]) {
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) column(name, o) = x[o];
    }

    OPTICAL_DEVICE bool feasible() const {
        const bool fixed_a = !this->penalty_a, fixed_b = !this->penalty_b;
        const double a = this->total_a, b = this->total_b;
        const double difference = a > b ? a - b : b - a;
        if (fixed_a && fixed_b && difference > unequal * (a > b ? a : b)) return false;
        return !(fixed_a && this->dead_rows) && !(fixed_b && this->dead_columns);
    }

    // ---------------------------------------------------------------------------- implicit gradients

    // Solves the system of sinkhorn.h for w and z by conjugate gradients on what is left when w is
    // eliminated, preconditioned by the column masses, after sum_up. Returns the relative residual.
    // Balanced, the system has the null vector (1, -1): the right side is orthogonal to it, and in
    // the end w is shifted to have mean 0 under the row sums. K is the matrix of every product.
    OPTICAL_DEVICE float adjoint() {
        this->build(true);
        const float relief_a = this->penalty_a ? 1.0f + target / this->rho_a : 1.0f;
        const float relief_b = this->penalty_b ? 1.0f + target / this->rho_b : 1.0f;
        // The sums as the products below form them: what cancels in them must cancel here.
        float x[OI], y[OJ], ones[OJ];
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) ones[o] = 1;
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) x[o] = 1;
        this->columns_times(x, y);
        this->rows_times(ones, x);
        keep_rows(SUMS, x);
        keep_columns(SUMS, y);
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) {
            const float r = row(SUMS, o) * relief_a;
            row(ROW_INVERSE, o) = r > 0 ? 1.0f / r : 0.0f;
            x[o] = row(SPENT, o) * row(ROW_INVERSE, o);
        }
        // The right side: t - P' (s / r).
        this->columns_times(x, y);
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) {
            const float live = column(SUMS, o) * relief_b;
            column(DIAGONAL, o) = live;
            column(RESIDUAL, o) = live > 0 ? column(SPENT, o) - y[o] : 0.0f;
            column(SOLUTION, o) = column(BEST, o) = 0;
        }
        const bool singular = !this->penalty_a && !this->penalty_b;
        const double scale = energy(SPENT), start = settle(singular);
        // Nothing but rounding is left where the parts of the right side cancel.
        const double noise = 1e-14 * scale;
        double rho = start, best = start;
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) column(DIRECTION, o) = preconditioned(o);
        for (int step = 0, stale = 0; rho > noise && stale < 10; ++step) {
            if (step == 4 * this->b.count + 100) break;
            // q = diag(c') p - P' (P p / r')
            OPTICAL_EACH
            for (int o = 0; o < OJ; ++o) y[o] = column(DIRECTION, o);
            this->rows_times(y, x);
            OPTICAL_EACH
            for (int o = 0; o < OI; ++o) x[o] *= row(ROW_INVERSE, o);
            this->columns_times(x, y);
            double curvature[1] = {0};
            OPTICAL_EACH
            for (int o = 0; o < OJ; ++o) {
                const float p_j = column(DIRECTION, o);
                const float q_j = column(DIAGONAL, o) * p_j - y[o];
                column(IMAGE, o) = q_j;
                curvature[0] += (double)p_j * (double)q_j;
            }
            g.total(curvature, false);
            // Rounding has the last word near the solution: no step along a direction it decides.
            const double length = rho / curvature[0];
            if (!(curvature[0] > 0) || !(length - length == 0)) break;
            OPTICAL_EACH
            for (int o = 0; o < OJ; ++o) {
                column(SOLUTION, o) += (float)length * column(DIRECTION, o);
                column(RESIDUAL, o) -= (float)length * column(IMAGE, o);
            }
            const double next = settle(singular);
            if (!(next - next == 0)) break;
            stale = next < best / 2 ? 0 : stale + 1;
            if (next < best) {
                best = next;
                OPTICAL_EACH
                for (int o = 0; o < OJ; ++o) column(BEST, o) = column(SOLUTION, o);
            }
            const float turn = (float)(next / rho);
            rho = next;
            OPTICAL_EACH
            for (int o = 0; o < OJ; ++o)
                column(DIRECTION, o) = preconditioned(o) + turn * column(DIRECTION, o);
        }
        // w = (s - P z) / r'
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) y[o] = column(BEST, o);
        this->rows_times(y, x);
        double mean[2] = {0, 0};
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) {
            const float w = (row(SPENT, o) - x[o]) * row(ROW_INVERSE, o);
            row(SOLUTION, o) = w;
            mean[0] += (double)row(SUMS, o) * (double)w;
            mean[1] += (double)row(SUMS, o);
        }
        g.total(mean, true);
        const float shift = singular && mean[1] > 0 ? (float)(mean[0] / mean[1]) : 0.0f;
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) row(SOLUTION, o) -= shift;
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) column(SOLUTION, o) = column(BEST, o) + shift;
        return start > noise ? (float)square_root(best / start) : 0.0f;
    }

    OPTICAL_DEVICE float preconditioned(int o) const {
        const float live = column(DIAGONAL, o);
        return live > 0 ? column(RESIDUAL, o) / live : 0.0f;
    }
    // Takes the part of the residual along the null vector away, and returns its energy.
    OPTICAL_DEVICE double settle(bool singular) {
        double sums[2] = {0, 0};
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) {
            sums[0] += (double)column(RESIDUAL, o);
            sums[1] += (double)column(DIAGONAL, o);
        }
        g.total(sums, false);
        const float part = singular && sums[1] > 0 ? (float)(sums[0] / sums[1]) : 0.0f;
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) column(RESIDUAL, o) -= part * column(DIAGONAL, o);
        return energy(RESIDUAL);
    }
    OPTICAL_DEVICE double energy(int name) {
        double sum[1] = {0};
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) {
            const double x = column(name, o), live = column(DIAGONAL, o);
            if (live > 0) sum[0] += x * x / live;
        }
        g.total(sum, false);
        return sum[0];
    }
};

}  // namespace cuda
}  // namespace optical
