// The linear system of implicit gradients.
#pragma once

#include "objective.cuh"

namespace optical {
namespace cuda {

template <typename G>
struct Adjoint {
    static constexpr int RI = G::RI, RJ = G::RJ, OI = G::OI, OJ = G::OJ;
    // Fields of the conjugate gradients, in place of fields that are no longer needed.
    enum { ROW_INVERSE = NEXT, DIAGONAL = NEXT, RESIDUAL = SCRATCH_1, DIRECTION = SCRATCH_2,
           IMAGE = SCRATCH_3, BEST = SCRATCH_4 };

    Problem<G>& problem;
    Workspace<G>& work;
    ScalingKernel<G>& kernel;
    G& grid;

    OPTICAL_DEVICE explicit Adjoint(Solver<G>& solver)
        : problem(solver.problem),
          work(solver.work),
          kernel(solver.kernel),
          grid(solver.problem.grid) {}

    // Solves the system of sinkhorn.h for w and z and returns the relative residual. Call after
    // Objective::evaluate().
    //
    // Eliminating w leaves a system for z, which conjugate gradients solve, preconditioned by the
    // column masses. For a balanced problem the system has the null vector (1, -1): the right side
    // is orthogonal to it, and w is shifted at the end to have mean 0 under the row sums. K holds
    // the plan.
    OPTICAL_DEVICE float solve() {
        kernel.build(problem, work, true);
        const float diagonal_factor_a = work.penalty_a ? 1.0f + work.target / work.rho_a : 1.0f;
        const float diagonal_factor_b = work.penalty_b ? 1.0f + work.target / work.rho_b : 1.0f;
        // Recomputes the sums with the products used below, so that terms that cancel do so
        // exactly.
        float x[OI], y[OJ], ones[OJ];
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) ones[o] = 1;
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) x[o] = 1;
        kernel.columns_times(problem, x, y);
        kernel.rows_times(problem, ones, x);
        problem.set_rows(SUMS, x);
        problem.set_columns(SUMS, y);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) {
            const float r = problem.row(SUMS, o) * diagonal_factor_a;
            problem.row(ROW_INVERSE, o) = r > 0 ? 1.0f / r : 0.0f;
            x[o] = problem.row(SPENT, o) * problem.row(ROW_INVERSE, o);
        }
        // The right side: t - P' (s / r).
        kernel.columns_times(problem, x, y);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) {
            const float diagonal = problem.column(SUMS, o) * diagonal_factor_b;
            problem.column(DIAGONAL, o) = diagonal;
            problem.column(RESIDUAL, o) = diagonal > 0 ? problem.column(SPENT, o) - y[o] : 0.0f;
            problem.column(SOLUTION, o) = problem.column(BEST, o) = 0;
        }
        const bool singular = !work.penalty_a && !work.penalty_b;
        const double scale = energy(SPENT), start = project(singular);
        // Below this, the parts of the right side cancel to rounding errors.
        const double rounding = 1e-14 * scale;
        double rho = start, best = start;
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) problem.column(DIRECTION, o) = preconditioned(o);
        for (int step = 0, stale = 0; rho > rounding && stale < 10; ++step) {
            if (step == 4 * problem.b.count + 100) break;
            // q = diag(c') p - P' (P p / r')
            OPTICAL_UNROLL_LOOP
            for (int o = 0; o < OJ; ++o) y[o] = problem.column(DIRECTION, o);
            kernel.rows_times(problem, y, x);
            OPTICAL_UNROLL_LOOP
            for (int o = 0; o < OI; ++o) x[o] *= problem.row(ROW_INVERSE, o);
            kernel.columns_times(problem, x, y);
            double curvature[1] = {0};
            OPTICAL_UNROLL_LOOP
            for (int o = 0; o < OJ; ++o) {
                const float p_j = problem.column(DIRECTION, o);
                const float q_j = problem.column(DIAGONAL, o) * p_j - y[o];
                problem.column(IMAGE, o) = q_j;
                curvature[0] += (double)p_j * (double)q_j;
            }
            grid.total(curvature, false);
            // Stops when rounding errors determine the direction.
            const double length = rho / curvature[0];
            if (!(curvature[0] > 0) || !(length - length == 0)) break;
            OPTICAL_UNROLL_LOOP
            for (int o = 0; o < OJ; ++o) {
                problem.column(SOLUTION, o) += (float)length * problem.column(DIRECTION, o);
                problem.column(RESIDUAL, o) -= (float)length * problem.column(IMAGE, o);
            }
            const double next = project(singular);
            if (!(next - next == 0)) break;
            stale = next < best / 2 ? 0 : stale + 1;
            if (next < best) {
                best = next;
                OPTICAL_UNROLL_LOOP
                for (int o = 0; o < OJ; ++o) problem.column(BEST, o) = problem.column(SOLUTION, o);
            }
            const float beta = (float)(next / rho);
            rho = next;
            OPTICAL_UNROLL_LOOP
            for (int o = 0; o < OJ; ++o)
                problem.column(DIRECTION, o) =
                    preconditioned(o) + beta * problem.column(DIRECTION, o);
        }
        // w = (s - P z) / r'
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) y[o] = problem.column(BEST, o);
        kernel.rows_times(problem, y, x);
        double of_rows[2] = {0, 0}, of_columns[2] = {0, 0};
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) {
            const float w = (problem.row(SPENT, o) - x[o]) * problem.row(ROW_INVERSE, o);
            problem.row(SOLUTION, o) = w;
            of_rows[0] += (double)problem.row(SUMS, o) * (double)w;
            of_rows[1] += (double)problem.row(SUMS, o);
        }
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) {
            of_columns[0] += (double)problem.column(SUMS, o) * (double)problem.column(BEST, o);
            of_columns[1] += (double)problem.column(SUMS, o);
        }
        grid.total(of_rows, true);
        grid.total(of_columns, false);
        const float shift = common_shift(of_rows, of_columns, singular);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) problem.row(SOLUTION, o) -= shift;
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) problem.column(SOLUTION, o) = problem.column(BEST, o) + shift;
        return start > rounding ? (float)square_root(best / start) : 0.0f;
    }

    // The shift along (1, -1) from the sums r w and r, and c z and c. The difference of the two
    // halves of the system is
    //
    //     sum_i r w / rho_a = sum_j c z / rho_b,
    //
    // which holds whatever the plan. With large penalties the system is nearly singular in this
    // direction, and conjugate gradients in float32 miss it. Without penalties, w gets mean 0.
    OPTICAL_DEVICE float common_shift(const double (&of_rows)[2], const double (&of_columns)[2],
                                      bool singular) const {
        const double by_a = work.penalty_a ? 1.0 / (double)work.rho_a : singular ? 1.0 : 0.0,
                     by_b = work.penalty_b ? 1.0 / (double)work.rho_b : 0.0;
        const double stiffness = by_a * of_rows[1] + by_b * of_columns[1];
        return stiffness > 0 ? (float)((by_a * of_rows[0] - by_b * of_columns[0]) / stiffness)
                             : 0.0f;
    }
    OPTICAL_DEVICE float preconditioned(int o) const {
        const float diagonal = problem.column(DIAGONAL, o);
        return diagonal > 0 ? problem.column(RESIDUAL, o) / diagonal : 0.0f;
    }
    // Removes the component of the residual along the null vector and returns the residual's
    // energy.
    OPTICAL_DEVICE double project(bool singular) {
        double sums[2] = {0, 0};
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) {
            sums[0] += (double)problem.column(RESIDUAL, o);
            sums[1] += (double)problem.column(DIAGONAL, o);
        }
        grid.total(sums, false);
        const float part = singular && sums[1] > 0 ? (float)(sums[0] / sums[1]) : 0.0f;
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o)
            problem.column(RESIDUAL, o) -= part * problem.column(DIAGONAL, o);
        return energy(RESIDUAL);
    }
    OPTICAL_DEVICE double energy(int name) {
        double sum[1] = {0};
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) {
            const double x = problem.column(name, o), diagonal = problem.column(DIAGONAL, o);
            if (diagonal > 0) sum[0] += x * x / diagonal;
        }
        grid.total(sum, false);
        return sum[0];
    }
};

}  // namespace cuda
}  // namespace optical
