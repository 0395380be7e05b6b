// The linear system behind implicit gradients.
#pragma once

#include "solver.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

template <typename T>
struct Adjoint {
    typedef Simd<T> S;
    typedef typename S::Vector Vector;
    typedef Number<T> C;
    static constexpr int width = S::width, block = Solver<T>::block;

    Solver<T>& s;

    // Solves the system of sinkhorn.h for w and z by conjugate gradients on what is left when w is
    // eliminated, preconditioned by the column masses, after sum_up(true). Returns the relative
    // residual. Balanced, the system has the null vector (1, -1): the right side is orthogonal to
    // it, and in the end w is shifted to have mean 0 under the row sums.
    double solve() {
        const T relief_a = s.rho_a < C::infinity ? 1 + s.target / s.rho_a : (T)1;
        const T relief_b = s.rho_b < C::infinity ? 1 + s.target / s.rho_b : (T)1;
        T* const row_mass = s.miss_a;
        T* const inverse_r = s.u_next;  // of the relieved row sums, 0 where nothing moves
        T *const diagonal = s.v_next, *const best_z = s.g_next;
        s.own_rows([&](int64_t i) {
            const Vector r = S::load(row_mass + i) * relief_a;
            S::store(inverse_r + i, S::select(r > 0, 1 / r, S::all(0)));
        });
        s.own_columns([&](int64_t j) {
            S::store(diagonal + j, S::load(s.col_mass + j) * relief_b);
            S::store(s.z + j, S::all(0));
        });
        sync(s.team);
        // The right side: t - P' (s / r).
        s.own_rows([&](int64_t i) {
            S::store(s.w + i, S::load(s.au + i) * S::load(s.row_spent + i) * S::load(inverse_r + i));
        });
        columns_of(s.w, [&](int64_t j, Vector sum) {
            const Vector live = S::load(diagonal + j);
            const Vector q = S::load(s.col_spent + j) - S::load(s.bv + j) * sum;
            S::store(s.cg_r + j, S::select(live > 0, q, S::all(0)));
            S::store(s.cg_p + j, S::all(0));
        });
        const bool singular = !(s.rho_a < C::infinity) && !(s.rho_b < C::infinity);
        sync(s.team);
        const double scale = energy(s.col_spent, diagonal), start = settle(diagonal, singular);
        // Nothing but rounding is left where the parts of the right side cancel.
        const double noise = Bounds<T>::solved * Bounds<T>::solved * scale;
        double rho = start, best = start;
        s.own_columns([&](int64_t j) {
            const Vector live = S::load(diagonal + j);
            S::store(s.cg_p + j, S::select(live > 0, S::load(s.cg_r + j) / live, S::all(0)));
            S::store(best_z + j, S::all(0));
        });
        for (int64_t step = 0, stale = 0; rho > noise && stale < patience; ++step) {
            if (step == 4 * s.m + 100) break;
            // q = diag(c') p - P' (P p / r')
            T* const scaled = s.col_spent;  // no longer needed
            s.own_columns([&](int64_t j) {
                S::store(scaled + j, S::load(s.bv + j) * S::load(s.cg_p + j));
            });
            sync(s.team);
            s.sweep(
                scaled, s.w,
                [&](auto lanes, int64_t i, auto sum) {
                    typedef decltype(lanes) L;
                    const auto share = L::load(s.au + i);
                    return share * (share * sum * L::load(inverse_r + i));
                },
                [&](int64_t j, Vector sum) {
                    S::store(s.cg_q + j,
                             S::load(diagonal + j) * S::load(s.cg_p + j) - S::load(s.bv + j) * sum);
                });
            sync(s.team);
            const double curvature = dot(s.cg_p, s.cg_q);
            // Rounding has the last word near the solution: no step along a direction it decides.
            const double length = rho / curvature;
            if (!(curvature > 0) || !(length - length == 0)) break;
            s.own_columns([&](int64_t j) {
                S::store(s.z + j, S::load(s.z + j) + (T)length * S::load(s.cg_p + j));
                S::store(s.cg_r + j, S::load(s.cg_r + j) - (T)length * S::load(s.cg_q + j));
            });
            const double next = settle(diagonal, singular);
            if (!(next - next == 0)) break;
            stale = next < best / 2 ? 0 : stale + 1;
            if (next < best) {
                best = next;
                s.own_columns([&](int64_t j) { S::store(best_z + j, S::load(s.z + j)); });
            }
            const T turn = (T)(next / rho);
            rho = next;
            s.own_columns([&](int64_t j) {
                const Vector live = S::load(diagonal + j);
                S::store(s.cg_p + j, S::select(live > 0, S::load(s.cg_r + j) / live, S::all(0)) +
                                       turn * S::load(s.cg_p + j));
            });
        }
        s.own_columns([&](int64_t j) { S::store(s.z + j, S::load(best_z + j)); });
        sync(s.team);
        // w = (s - P z) / r'
        T* const scaled = s.col_spent;
        s.own_columns([&](int64_t j) { S::store(scaled + j, S::load(s.bv + j) * S::load(s.z + j)); });
        sync(s.team);
        s.sweep(
            scaled, s.f_next,
            [&](auto lanes, int64_t i, auto sum) {
                typedef decltype(lanes) L;
                const auto found = L::load(s.row_spent + i) - L::load(s.au + i) * sum;
                L::store(s.w + i, found * L::load(inverse_r + i));
                return L::all(0);
            },
            [&](int64_t, Vector) {});
        sync(s.team);
        if (singular) {
            double mean = 0, mass = 0;
            for (int64_t i = 0; i < s.n; ++i) {
                mean += (double)row_mass[i] * (double)s.w[i];
                mass += (double)row_mass[i];
            }
            const T shift = mass > 0 ? (T)(mean / mass) : (T)0;
            sync(s.team);
            s.own_rows([&](int64_t i) { S::store(s.w + i, S::load(s.w + i) - shift); });
            s.own_columns([&](int64_t j) { S::store(s.z + j, S::load(s.z + j) + shift); });
            sync(s.team);
        }
        return start > noise ? __builtin_sqrt(best / start) : 0;
    }

    // Takes the part of the residual along the null vector away, and returns its energy.
    double settle(const T* diagonal, bool singular) {
        sync(s.team);
        double sum = 0, mass = 0;
        for (int64_t j = 0; singular && j < s.m; ++j) {
            sum += (double)s.cg_r[j];
            mass += (double)diagonal[j];
        }
        sync(s.team);
        if (singular && mass > 0)
            s.own_columns([&](int64_t j) {
                S::store(s.cg_r + j, S::load(s.cg_r + j) - (T)(sum / mass) * S::load(diagonal + j));
            });
        sync(s.team);
        return energy(s.cg_r, diagonal);
    }

    // The column sums of K with given weights of its rows.
    template <typename Column>
    void columns_of(const T* row_weights, Column column) {
        s.own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            T* sums = s.part + chunk * s.col_count;
            for (int64_t j = 0; j < s.col_count; j += width) S::store(sums + j, S::all(0));
            for (int64_t b = from; b < to; ++b)
                s.add_rows(s.kernel_tile(b), row_weights + b * block, s.col_count, sums);
        });
        sync(s.team);
        s.own_columns([&](int64_t j) {
            Vector sum = S::load(s.part + j);
            for (int64_t c = 1; c < s.chunks; ++c) sum += S::load(s.part + c * s.col_count + j);
            column(j, sum);
        });
    }

    double dot(const T* x, const T* y) const {
        double sum = 0;
        for (int64_t j = 0; j < s.m; ++j) sum += (double)x[j] * (double)y[j];
        return sum;
    }
    double energy(const T* x, const T* diagonal) const {
        double sum = 0;
        for (int64_t j = 0; j < s.m; ++j)
            if (diagonal[j] > 0) sum += (double)x[j] * (double)x[j] / (double)diagonal[j];
        return sum;
    }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
