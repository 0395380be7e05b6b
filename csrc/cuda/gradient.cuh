// Gradients: what is read off the potentials of a solution.
//
// G = dL/dC of a problem is made in registers. For a given cost it is written as it is; from vectors
// it is multiplied with them, so that neither the plan nor G is ever in device memory.
#pragma once

#include "products.cuh"

namespace optical {
namespace cuda {

template <typename G>
struct Gradient : Products<G> {
    typedef Products<G> Result;
    static constexpr int RI = G::RI, RJ = G::RJ, OI = G::OI, OJ = G::OJ;
    using Result::a;
    using Result::b;
    using Result::column;
    using Result::cost;
    using Result::g;
    using Result::index;
    using Result::out;
    using Result::p;
    using Result::price;
    using Result::row;
    using Result::target;

    float up, linear, grad_value;  // upstream: of both values together, and of each

    OPTICAL_DEVICE Gradient(const optical_problem& problem, const optical_gradient& gradient)
        : Result(problem, gradient) {}

    // Memory behind that of the solver: a second private array for the reverse sweep; or that of the
    // products.
    static OPTICAL_ANYWHERE int shared_bytes(int down, int across, int32_t kind, int32_t gradient) {
        const int threads = 32 * down * across;
        int bytes = Cost<G>::private_floats * threads * 4;
        if (gradient == OPTICAL_UNROLL) bytes += RI * RJ * threads * 4;
        const int more = kind == OPTICAL_GIVEN ? 0 : Result::product_bytes(down, across);
        return Cost<G>::fixed_bytes(down, across, kind) + (more > bytes ? more : bytes);
    }

    OPTICAL_DEVICE void differentiate() {
        int32_t status;
        if (!this->read(status)) return clear();
        take_upstream();
        at_solution();
        write();
    }

    OPTICAL_DEVICE void take_upstream() {
        grad_value = ((const float*)out.grad_value)[index];
        linear = ((const float*)out.grad_value_linear)[index];
        up = grad_value + linear;
    }

    // G stands where the cost stood.
    OPTICAL_DEVICE void write() {
        if (p.kind == OPTICAL_GIVEN) {
            if (out.grad_x) write_cost((float*)out.grad_x + index * p.n * p.m);
        } else if (out.grad_x || out.grad_y) {
            this->multiply_vectors();
        }
    }

    // ------------------------------------------------------------------------- at the potentials

    // The plan held fixed, or with w and z the fixed point.
    OPTICAL_DEVICE void at_solution() {
        const bool implicit = p.gradient == OPTICAL_IMPLICIT;
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) {
            const int i = g.own_row(o);
            const bool here = this->present_a(i);
            row(POTENTIAL, o) = here ? ((const float*)out.f)[a.first + i] : 0.0f;
            row(SOLUTION, o) = here && implicit ? ((const float*)out.w)[a.first + i] : 0.0f;
        }
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) {
            const int j = g.own_column(o);
            const bool here = this->present_b(j);
            column(POTENTIAL, o) = here ? ((const float*)out.g)[b.first + j] : 0.0f;
            column(SOLUTION, o) = here && implicit ? ((const float*)out.z)[b.first + j] : 0.0f;
        }
        float of_row[OI], of_column[OJ];
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o)
            of_row[o] = mass_gradient(row(MASS, o), row(LOG, o), row(PAD, o), row(POTENTIAL, o),
                                      this->rho_a, this->penalty_a, this->total_b);
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o)
            of_column[o] =
                mass_gradient(column(MASS, o), column(LOG, o), column(PAD, o),
                              column(POTENTIAL, o), this->rho_b, this->penalty_b, this->total_a);
        float f[OI], log_row[OI], w[OI], g_all[RJ], log_column[RJ], z[RJ];
        float sums[RJ], sum_row[OI] = {}, sum_column[OJ];
        this->columns_of(POTENTIAL, g_all);
        this->columns_of(LOG, log_column);
        this->columns_of(SOLUTION, z);
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o)
            f[o] = row(POTENTIAL, o), log_row[o] = row(LOG, o), w[o] = row(SOLUTION, o);
        OPTICAL_EACH
        for (int c = 0; c < RJ; ++c) sums[c] = 0;
        const float slope = implicit ? linear * this->inverse_epsilon : 0.0f;
        this->begin_along();
        OPTICAL_ROLLED
        for (int q = 0; q < RI; ++q) {
            const int r = g.slot_of(q);
            const float f_i = g.row_value(f, q), log_i = g.row_value(log_row, q);
            const float w_i = g.row_value(w, q);
            float sum = 0, along = 0;
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c) {
                const float flow = this->plan_of(r, c, f_i, log_i, g_all[c], log_column[c]);
                const float cost_ij = price(r, c);
                sum += flow, sums[c] += flow;
                this->set(r, c, flow * (up + slope * ((w_i + z[c]) - cost_ij)), cost_ij, along);
            }
            g.template fold_row<Sum>(sum, q, sum_row);
            this->end_row(along, q);
        }
        if (implicit) {
            g.template combine_rows<Sum>(sum_row);
            g.template columns<Sum>(sums, sum_column);
            const float relief_a = this->penalty_a ? 1.0f + target / this->rho_a : 1.0f;
            const float relief_b = this->penalty_b ? 1.0f + target / this->rho_b : 1.0f;
            OPTICAL_EACH
            for (int o = 0; o < OI; ++o)
                of_row[o] += linear * relief_a * sum_row[o] * row(SOLUTION, o);
            OPTICAL_EACH
            for (int o = 0; o < OJ; ++o)
                of_column[o] += linear * relief_b * sum_column[o] * column(SOLUTION, o);
        }
        write_masses(of_row, of_column);
    }

    // The partial derivative of the dual; a line without a pair gives all its mass up.
    OPTICAL_DEVICE float mass_gradient(float mass, float log_mass, float pad, float potential,
                                       float rho, bool penalty, double other) const {
        float slope = potential + target * (float)(other - 1);
        if (penalty) {
            const float given_up = pad > 0 ? 1.0f : one_minus_exp(potential / rho);
            slope = rho * given_up + target * ((float)other - (1.0f - given_up));
            // The factor may be too large for a number where the mass is too small for one.
            if (potential < -80 * rho) {
                const float kept = Result::asked(mass, log_mass, potential, rho, penalty);
                return grad_value * (rho * (mass - kept) + target * (mass * (float)other - kept));
            }
        }
        return grad_value * mass * slope;
    }

    // 1 - exp(-x), also where that is small.
    OPTICAL_DEVICE static float one_minus_exp(float x) {
        if (absolute(x) > 0.1f) return 1.0f - exp2_fast(-OPTICAL_LOG2E * x);
        const float series = fused(x, fused(x, fused(x, 1.0f / 120, -1.0f / 24), 1.0f / 6), -0.5f);
        return fused(x * x, series, x);
    }

    // ------------------------------------------------------------------------------ what is written

    OPTICAL_DEVICE void write_masses(const float (&of_row)[OI], const float (&of_column)[OJ]) {
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) {
            const int i = g.own_row(o);
            if (g.warp_across == 0 && i < a.count)
                ((float*)out.grad_log_a)[a.first + i] = this->present_a(i) ? of_row[o] : 0.0f;
        }
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) {
            const int j = g.own_column(o);
            if (g.warp_down == 0 && g.rank == 0 && j < b.count)
                ((float*)out.grad_log_b)[b.first + j] = this->present_b(j) ? of_column[o] : 0.0f;
        }
    }

    OPTICAL_DEVICE void write_cost(float* to) {
        OPTICAL_ROLLED
        for (int r = 0; r < RI; ++r)
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c)
                if (g.row(r) < a.count && g.column(c) < b.count)
                    to[g.row(r) * p.m + g.column(c)] = cost(r, c);
    }

    // The gradients of a problem that could not be read, or of none at all.
    OPTICAL_DEVICE void clear() {
        float of_row[OI], of_column[OJ];
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) of_row[o] = 0;
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) of_column[o] = 0;
        write_masses(of_row, of_column);
        const int64_t parts = g.blocks, start = g.rank * g.threads + g.thread;
        const int64_t step = parts * g.threads;
        const bool given = p.kind == OPTICAL_GIVEN;
        const int64_t first = given ? index * p.n * p.m : a.first * p.dim;
        const int64_t count = given ? p.n * p.m : a.count * p.dim;
        const int32_t type = given ? OPTICAL_F32 : p.x_type;
        for (int64_t k = start; out.grad_x && k < count; k += step)
            store(out.grad_x, type, first + k, 0);
        for (int64_t k = start; out.grad_y && k < b.count * p.dim; k += step)
            store(out.grad_y, p.y_type, b.first * p.dim + k, 0);
    }
};

}  // namespace cuda
}  // namespace optical
