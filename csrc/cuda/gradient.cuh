// The backward pass of one problem: gradients of the cost or the vectors, and of the log-masses.
//
// G = dL/dC is computed in registers. For a given cost it is the output. For vectors it is
// multiplied with them, so that neither the plan nor G is ever in device memory.
#pragma once

#include "unrolled.cuh"
#include "vector_gradient.cuh"

namespace optical {
namespace cuda {

template <typename G>
struct Gradient {
    static constexpr int RI = G::RI, RJ = G::RJ, OI = G::OI, OJ = G::OJ;

    Solver<G>& solver;
    Problem<G>& problem;
    Workspace<G>& work;
    G& grid;
    VectorGradient<G>& vectors;
    const optical_gradient& out;
    Upstream up;

    OPTICAL_DEVICE Gradient(Solver<G>& solver, VectorGradient<G>& vectors)
        : solver(solver),
          problem(solver.problem),
          work(solver.work),
          grid(problem.grid),
          vectors(vectors),
          out(vectors.out) {}

    // Shared memory. The private arrays grow by the cost gradient for UNROLL; VectorGradient reuses
    // their memory.
    static OPTICAL_HOST_DEVICE int shared_bytes(int down, int across, int32_t kind,
                                                int32_t gradient) {
        const int threads = 32 * down * across;
        int bytes = Problem<G>::private_floats * threads * 4;
        if (gradient == OPTICAL_UNROLL) bytes += RI * RJ * threads * 4;
        const int more = kind == OPTICAL_GIVEN ? 0 : VectorGradient<G>::product_bytes(down, across);
        return Problem<G>::fixed_bytes(down, across, kind) + (more > bytes ? more : bytes);
    }

    // ENVELOPE and IMPLICIT: differentiates at the solution.
    OPTICAL_DEVICE void differentiate() {
        int32_t status;
        read_upstream();
        if (!work.read(problem, status)) return clear(status == OPTICAL_INFEASIBLE);
        if (!solution_is_finite()) return clear(true);
        at_solution();
        write();
    }
    // UNROLL: differentiates the iterations.
    OPTICAL_DEVICE void differentiate(float* history) {
        int32_t status;
        read_upstream();
        if (!work.read(problem, status)) return clear(status == OPTICAL_INFEASIBLE);
        if (!solution_is_finite()) return clear(true);
        Unrolled<G> unrolled(solver, out, up, history);
        unrolled.differentiate();
        float of_row[OI], of_column[OJ];
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) of_row[o] = unrolled.row_mass_gradient(o);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) of_column[o] = unrolled.column_mass_gradient(o);
        write_masses(of_row, of_column);
        vectors.begin();
        OPTICAL_KEEP_LOOP
        for (int q = 0; q < RI; ++q) {
            const int r = grid.slot_of(q);
            float self_term = 0;
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c)
                vectors.set(r, c, unrolled.cost_bar(r, c), problem.finite_cost(r, c), self_term);
            vectors.end_row(self_term, q);
        }
        write();
    }

    // Whether all potentials of the solution are finite; otherwise the outputs overflowed.
    OPTICAL_DEVICE bool solution_is_finite() {
        bool finite = true;
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) {
            const int i = grid.own_row(o);
            finite &= i >= problem.a.count || is_finite(((const float*)out.f)[problem.a.first + i]);
        }
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) {
            const int j = grid.own_column(o);
            finite &= j >= problem.b.count || is_finite(((const float*)out.g)[problem.b.first + j]);
        }
        return grid.union_of(finite ? 0u : 1u) == 0;
    }

    OPTICAL_DEVICE void read_upstream() {
        up.value = ((const float*)out.grad_value)[problem.index];
        up.linear = ((const float*)out.grad_value_linear)[problem.index];
        up.total = up.value + up.linear;
    }

    // Writes the gradient of the cost or of the vectors from G, which is in place of the cost.
    OPTICAL_DEVICE void write() {
        if (problem.batch.kind == OPTICAL_GIVEN) {
            if (out.grad_x)
                write_cost_gradient((float*)out.grad_x +
                                    problem.index * problem.batch.n * problem.batch.m);
        } else if (out.grad_x || out.grad_y) {
            vectors.multiply();
        }
    }

    // ----------------------------------------------------------------------------- at the solution

    // Differentiates with the plan held fixed (ENVELOPE), or through the fixed point with w and z.
    OPTICAL_DEVICE void at_solution() {
        const bool implicit = problem.batch.gradient == OPTICAL_IMPLICIT;
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) {
            const int i = grid.own_row(o);
            const bool is_valid = problem.valid_row(i);
            problem.row(POTENTIAL, o) =
                is_valid ? ((const float*)out.f)[problem.a.first + i] : 0.0f;
            problem.row(SOLUTION, o) =
                is_valid && implicit ? ((const float*)out.w)[problem.a.first + i] : 0.0f;
        }
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) {
            const int j = grid.own_column(o);
            const bool is_valid = problem.valid_column(j);
            problem.column(POTENTIAL, o) =
                is_valid ? ((const float*)out.g)[problem.b.first + j] : 0.0f;
            problem.column(SOLUTION, o) =
                is_valid && implicit ? ((const float*)out.z)[problem.b.first + j] : 0.0f;
        }
        float of_row[OI], of_column[OJ];
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o)
            of_row[o] = mass_gradient(problem.row(MASS, o), problem.row(LOG, o),
                                      problem.row(UNMATCHED, o), problem.row(POTENTIAL, o),
                                      work.rho_a, work.penalty_a, work.total_b);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o)
            of_column[o] = mass_gradient(problem.column(MASS, o), problem.column(LOG, o),
                                         problem.column(UNMATCHED, o), problem.column(POTENTIAL, o),
                                         work.rho_b, work.penalty_b, work.total_a);
        float f[OI], log_row[OI], w[OI], g_all[RJ], log_column[RJ], z[RJ];
        float sums[RJ], sum_row[OI] = {}, sum_column[OJ];
        problem.columns_of(POTENTIAL, g_all);
        problem.columns_of(LOG, log_column);
        problem.columns_of(SOLUTION, z);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o)
            f[o] = problem.row(POTENTIAL, o), log_row[o] = problem.row(LOG, o),
            w[o] = problem.row(SOLUTION, o);
        OPTICAL_UNROLL_LOOP
        for (int c = 0; c < RJ; ++c) sums[c] = 0;
        const float slope = implicit ? up.linear * work.inverse_epsilon : 0.0f;
        vectors.begin();
        OPTICAL_KEEP_LOOP
        for (int q = 0; q < RI; ++q) {
            const int r = grid.slot_of(q);
            const float f_i = grid.row_value(f, q), log_i = grid.row_value(log_row, q);
            const float w_i = grid.row_value(w, q);
            float sum = 0, self_term = 0;
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c) {
                const float flow = ScalingKernel<G>::plan_of(problem, work, r, c, f_i, log_i,
                                                             g_all[c], log_column[c]);
                const float cost_ij = problem.finite_cost(r, c);
                sum += flow, sums[c] += flow;
                vectors.set(r, c, flow * (up.total + slope * ((w_i + z[c]) - cost_ij)),
                            cost_ij, self_term);
            }
            grid.template fold_row<Sum>(sum, q, sum_row);
            vectors.end_row(self_term, q);
        }
        if (implicit) {
            grid.template combine_rows<Sum>(sum_row);
            grid.template columns<Sum>(sums, sum_column);
            const float diagonal_factor_a =
                work.penalty_a ? 1.0f + work.target / work.rho_a : 1.0f;
            const float diagonal_factor_b =
                work.penalty_b ? 1.0f + work.target / work.rho_b : 1.0f;
            OPTICAL_UNROLL_LOOP
            for (int o = 0; o < OI; ++o)
                of_row[o] +=
                    up.linear * diagonal_factor_a * sum_row[o] * problem.row(SOLUTION, o);
            OPTICAL_UNROLL_LOOP
            for (int o = 0; o < OJ; ++o)
                of_column[o] += up.linear * diagonal_factor_b * sum_column[o] *
                                problem.column(SOLUTION, o);
        }
        write_masses(of_row, of_column);
    }

    // The partial derivative of the dual. A row or column without an allowed pair destroys all its
    // mass.
    OPTICAL_DEVICE float mass_gradient(float mass, float log_mass, float pad, float potential,
                                       float rho, bool penalty, double other) const {
        float slope = potential + work.target * (float)(other - 1);
        if (penalty) {
            const float destroyed = pad > 0 ? 1.0f : one_minus_exp(potential / rho);
            slope = rho * destroyed + work.target * ((float)other - (1.0f - destroyed));
            // The factor may overflow where the mass underflows.
            if (potential < -80 * rho) {
                const float kept_mass =
                    Solver<G>::required_mass(mass, log_mass, potential, rho, penalty);
                return up.value * (rho * (mass - kept_mass) +
                                         work.target * (mass * (float)other - kept_mass));
            }
        }
        return up.value * mass * slope;
    }

    // -------------------------------------------------------------------------------------- output

    OPTICAL_DEVICE void write_masses(const float (&of_row)[OI], const float (&of_column)[OJ]) {
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) {
            const int i = grid.own_row(o);
            if (out.grad_log_a && grid.warp_across == 0 && i < problem.a.count)
                ((float*)out.grad_log_a)[problem.a.first + i] =
                    problem.valid_row(i) ? of_row[o] : 0.0f;
        }
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) {
            const int j = grid.own_column(o);
            if (out.grad_log_b && grid.warp_down == 0 && grid.rank == 0 && j < problem.b.count)
                ((float*)out.grad_log_b)[problem.b.first + j] =
                    problem.valid_column(j) ? of_column[o] : 0.0f;
        }
    }

    OPTICAL_DEVICE void write_cost_gradient(float* to) {
        OPTICAL_KEEP_LOOP
        for (int r = 0; r < RI; ++r)
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c)
                if (grid.row(r) < problem.a.count && grid.column(c) < problem.b.count)
                    to[grid.row(r) * problem.batch.m + grid.column(c)] = problem.cost(r, c);
    }

    // Whether an upstream gradient is not 0.
    OPTICAL_DEVICE bool is_used() {
        bool used = up.value != 0 || up.linear != 0;
        const float* const from_f = (const float*)out.grad_f;
        const float* const from_g = (const float*)out.grad_g;
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) {
            const int i = grid.own_row(o);
            used |= from_f && i < problem.a.count && from_f[problem.a.first + i] != 0;
        }
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) {
            const int j = grid.own_column(o);
            used |= from_g && j < problem.b.count && from_g[problem.b.first + j] != 0;
        }
        return grid.union_of(used ? 1u : 0u) != 0;
    }

    // Writes the gradients of a problem without a solution: NaN for valid entries if it is
    // malformed and its outputs were used, otherwise 0.
    OPTICAL_DEVICE void clear(bool malformed) {
        const float x = malformed && is_used() ? not_a_number() : 0.0f;
        float of_row[OI], of_column[OJ];
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) of_row[o] = x;
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) of_column[o] = x;
        write_masses(of_row, of_column);
        const int64_t blocks = grid.blocks, start = grid.rank * grid.threads + grid.thread;
        const int64_t step = blocks * grid.threads;
        const int64_t dim = problem.batch.dim, m = problem.batch.m;
        if (problem.batch.kind == OPTICAL_GIVEN) {
            const int64_t first = problem.index * problem.batch.n * m;
            for (int64_t k = start; out.grad_x && k < problem.batch.n * m; k += step)
                ((float*)out.grad_x)[first + k] =
                    problem.valid_row((int)(k / m)) && problem.valid_column((int)(k % m)) ? x
                                                                                          : 0.0f;
            return;
        }
        for (int64_t k = start; out.grad_x && k < problem.a.count * dim; k += step)
            store(out.grad_x, problem.batch.x_type, problem.a.first * dim + k,
                  problem.valid_row((int)(k / dim)) ? x : 0.0f);
        for (int64_t k = start; out.grad_y && k < problem.b.count * dim; k += step)
            store(out.grad_y, problem.batch.y_type, problem.b.first * dim + k,
                  problem.valid_column((int)(k / dim)) ? x : 0.0f);
    }
};

}  // namespace cuda
}  // namespace optical
