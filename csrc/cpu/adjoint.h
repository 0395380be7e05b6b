// The adjoint linear system behind implicit gradients, solved by conjugate gradients.
//
// With r' = r (1 + epsilon / rho_a) and c' = c (1 + epsilon / rho_b), the system of sinkhorn.h is
//
//     r' w + P z = s,   P' w + c' z = t        s = sum_j P C, t = sum_i P C
//
// and eliminating w leaves (diag(c') - P' diag(1 / r') P) z = t - P' (s / r'), which is solved with
// the preconditioner diag(c'). Balanced, the system has the null vector (1, -1): the right side is
// orthogonal to it, and finally w is shifted to mean 0 under the row sums.
#pragma once

#include "solver.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

// Conjugate-gradient steps that may pass without halving the energy of the residual.
constexpr int64_t patience = 10;

template <typename T>
struct Adjoint {
    typedef Simd<T> S;
    typedef typename S::Vector Vector;
    static constexpr int width = Tiling<T>::width, block = Tiling<T>::block;

    const Problem<T>& problem;
    const ScalingKernel<T>& kernel;
    Workspace<T>& work;

    explicit Adjoint(Solver<T>& solver)
        : problem(solver.problem), kernel(solver.kernel), work(solver.work) {}

    // Solves for w and z after Objective::sum_up(true). Returns the relative residual.
    __attribute__((noinline)) double solve() {
        singular = !problem.penalty_a() && !problem.penalty_b();
        inverse_r = work.u_next, diagonal = work.v_next, best_z = work.g_next;
        set_up();
        const double scale = energy(work.col_cost), start = settle();
        // Only rounding is left where the parts of the right side cancel.
        const double noise = Bounds<T>::adjoint_noise * Bounds<T>::adjoint_noise * scale;
        problem.own_columns([&](int64_t j) {
            S::store(work.cg_p + j, preconditioned(j));
            S::store(best_z + j, S::all(0));
        });
        const double best = iterate(start, noise);
        problem.own_columns([&](int64_t j) { S::store(work.z + j, S::load(best_z + j)); });
        sync(problem.team);
        recover_w();
        shift();
        return start > noise ? __builtin_sqrt(best / start) : 0;
    }

private:
    bool singular;
    T* inverse_r;  // 1 / r', 0 for rows without mass
    T* diagonal;   // c'
    T* best_z;

    // The diagonals, z = 0, and the right side in cg_r.
    void set_up() {
        const T epsilon = problem.epsilon;
        const T factor_a = problem.penalty_a() ? 1 + epsilon / problem.rho_a : (T)1;
        const T factor_b = problem.penalty_b() ? 1 + epsilon / problem.rho_b : (T)1;
        problem.own_rows([&](int64_t i) {
            const Vector r = S::load(work.row_mass + i) * factor_a;
            S::store(inverse_r + i, S::select(r > 0, 1 / r, S::all(0)));
        });
        problem.own_columns([&](int64_t j) {
            S::store(diagonal + j, S::load(work.col_mass + j) * factor_b);
            S::store(work.z + j, S::all(0));
        });
        sync(problem.team);
        problem.own_rows([&](int64_t i) {
            S::store(work.w + i, S::load(work.au + i) * S::load(work.row_cost + i) *
                                     S::load(inverse_r + i));
        });
        kernel.multiply_transposed(work.w, [&](int64_t j, Vector sum) {
            const Vector c = S::load(diagonal + j);
            const Vector q = S::load(work.col_cost + j) - S::load(work.bv + j) * sum;
            S::store(work.cg_r + j, S::select(c > 0, q, S::all(0)));
            S::store(work.cg_p + j, S::all(0));
        });
        sync(problem.team);
    }

    // Conjugate gradients. Leaves the best z in best_z and returns the energy of its residual.
    double iterate(double start, double noise) {
        double rho = start, best = start;
        for (int64_t step = 0, stale = 0; rho > noise && stale < patience; ++step) {
            if (step == 4 * problem.m + 100) break;
            work.ask(step);
            apply_matrix();
            if (work.stopped(step)) break;
            const double curvature = dot(work.cg_p, work.cg_q);
            // Near the solution rounding may dominate: take no step along such a direction.
            const double length = rho / curvature;
            if (!(curvature > 0) || !(length - length == 0)) break;
            problem.own_columns([&](int64_t j) {
                S::store(work.z + j, S::load(work.z + j) + (T)length * S::load(work.cg_p + j));
                S::store(work.cg_r + j,
                         S::load(work.cg_r + j) - (T)length * S::load(work.cg_q + j));
            });
            const double next = settle();
            if (!(next - next == 0)) break;
            stale = next < best / 2 ? 0 : stale + 1;
            if (next < best) {
                best = next;
                problem.own_columns([&](int64_t j) { S::store(best_z + j, S::load(work.z + j)); });
            }
            const T turn = (T)(next / rho);
            rho = next;
            problem.own_columns([&](int64_t j) {
                S::store(work.cg_p + j, preconditioned(j) + turn * S::load(work.cg_p + j));
            });
        }
        return best;
    }

    Vector preconditioned(int64_t j) const {
        const Vector c = S::load(diagonal + j);
        return S::select(c > 0, S::load(work.cg_r + j) / c, S::all(0));
    }

    // q = diag(c') p - P' (P p / r')
    void apply_matrix() {
        T* const scaled = work.col_cost;  // no longer needed
        problem.own_columns([&](int64_t j) {
            S::store(scaled + j, S::load(work.bv + j) * S::load(work.cg_p + j));
        });
        sync(problem.team);
        kernel.sweep(
            scaled, work.w,
            [&](auto lanes, int64_t i, auto sum) {
                typedef decltype(lanes) L;
                const auto share = L::load(work.au + i);
                return share * (share * sum * L::load(inverse_r + i));
            },
            [&](int64_t j, Vector sum) {
                S::store(work.cg_q + j, S::load(diagonal + j) * S::load(work.cg_p + j) -
                                            S::load(work.bv + j) * sum);
            });
        sync(problem.team);
    }

    // w = (s - P z) / r'
    void recover_w() {
        T* const scaled = work.col_cost;
        problem.own_columns([&](int64_t j) {
            S::store(scaled + j, S::load(work.bv + j) * S::load(work.z + j));
        });
        sync(problem.team);
        kernel.sweep(
            scaled, work.f_next,
            [&](auto lanes, int64_t i, auto sum) {
                typedef decltype(lanes) L;
                const auto rest = L::load(work.row_cost + i) - L::load(work.au + i) * sum;
                L::store(work.w + i, rest * L::load(inverse_r + i));
                return L::all(0);
            },
            [&](int64_t, Vector) {});
        sync(problem.team);
    }

    // Shifts the solution along (1, -1). The difference of the two halves of the system is
    //
    //     sum_i r w / rho_a = sum_j c z / rho_b,
    //
    // which holds whatever the plan. With large penalties the system is nearly singular in this
    // direction, and conjugate gradients miss it. Without penalties, w gets mean 0.
    void shift() {
        const double by_a = problem.penalty_a() ? 1 / (double)problem.rho_a : singular ? 1.0 : 0.0;
        const double by_b = problem.penalty_b() ? 1 / (double)problem.rho_b : 0.0;
        double excess = 0, stiffness = 0;
        for (int64_t i = 0; i < problem.n; ++i) {
            excess += by_a * (double)work.row_mass[i] * (double)work.w[i];
            stiffness += by_a * (double)work.row_mass[i];
        }
        for (int64_t j = 0; j < problem.m; ++j) {
            excess -= by_b * (double)work.col_mass[j] * (double)work.z[j];
            stiffness += by_b * (double)work.col_mass[j];
        }
        const T offset = stiffness > 0 ? (T)(excess / stiffness) : (T)0;
        sync(problem.team);
        problem.own_rows([&](int64_t i) { S::store(work.w + i, S::load(work.w + i) - offset); });
        problem.own_columns([&](int64_t j) { S::store(work.z + j, S::load(work.z + j) + offset); });
        sync(problem.team);
    }

    // Removes the component of the residual along the null vector, and returns its energy.
    double settle() {
        sync(problem.team);
        double sum = 0, mass = 0;
        for (int64_t j = 0; singular && j < problem.m; ++j) {
            sum += (double)work.cg_r[j];
            mass += (double)diagonal[j];
        }
        sync(problem.team);
        if (singular && mass > 0)
            problem.own_columns([&](int64_t j) {
                S::store(work.cg_r + j,
                         S::load(work.cg_r + j) - (T)(sum / mass) * S::load(diagonal + j));
            });
        sync(problem.team);
        return energy(work.cg_r);
    }

    double dot(const T* x, const T* y) const {
        double sum = 0;
        for (int64_t j = 0; j < problem.m; ++j) sum += (double)x[j] * (double)y[j];
        return sum;
    }
    // x' diag(1 / c') x
    double energy(const T* x) const {
        double sum = 0;
        for (int64_t j = 0; j < problem.m; ++j)
            if (diagonal[j] > 0) sum += (double)x[j] * (double)x[j] / (double)diagonal[j];
        return sum;
    }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
