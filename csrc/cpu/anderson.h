// Anderson acceleration of the map from g to the g of the next iteration.
#pragma once

#include "scaling_kernel.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

// Type II (Walker and Ni 2011): with r = image - input of the map, the next input is
//
//     image - sum_k gamma_k (dg_k + dr_k),   gamma = argmin |r - sum_k gamma_k dr_k|
//
// over the last `depth` differences dg of inputs and dr of residuals, in the norm weighted with b.
// Safeguard: if the marginal error grew after an extrapolation, the plain image is used instead.
template <typename T>
struct Anderson {
    typedef Simd<T> S;
    typedef typename S::Vector Vector;
    static constexpr int width = Tiling<T>::width;

    const Problem<T>& problem;
    Workspace<T>& work;
    const int depth;
    T* image = nullptr;  // g after the last iteration, before any extrapolation

    Anderson(const Problem<T>& p, Workspace<T>& w, int history)
        : problem(p), work(w), depth(history) {
        if (depth == 0) return;
        image = work.anderson, last_g = image + problem.col_count;
        last_r = last_g + problem.col_count, differences = last_r + problem.col_count;
    }

    bool active() const { return depth > 0; }

    // Call after an iteration at temperature `epsilon` from g_next to g, with its marginal error.
    // Replaces g by the next input; true if that is not the image. `plain` restarts the history.
    bool next(bool plain, double error, T epsilon) {
        // Every thread takes the same decisions; only one writes.
        if (plain) {
            restart();
            problem.alone([&] { copy(image, work.g); });
            return false;
        }
        if (extrapolated && !(error <= last_error)) {
            restart();
            problem.alone([&] {
                copy(image, work.g);
                // The plain image of the last accepted input.
                for (int64_t j = 0; j < problem.col_count; j += width)
                    S::store(work.g + j, S::load(last_g + j) + S::load(last_r + j));
            });
            return true;
        }
        push();
        last_error = error;
        extrapolated = false;
        double gamma[max_anderson];
        if (count == 0 || !solve_weights(gamma)) return false;
        problem.alone([&] { extrapolate(gamma); });
        // Without a feasible plan extrapolations diverge, and potentials whose last digit is worth
        // a temperature satisfy any stopping rule.
        const T bound = epsilon * Bounds<T>::largest_potential;
        bool usable = true;
        for (int64_t j = 0; j < problem.col_count; ++j)
            usable &= work.g[j] <= bound && work.g[j] >= -bound;
        extrapolated = usable;
        if (!usable) {
            restart();
            problem.alone([&] { copy(work.g, image); });
        }
        return true;
    }

private:
    T *last_g = nullptr, *last_r = nullptr, *differences = nullptr;
    bool has_last = false, extrapolated = false;
    int count = 0, oldest = 0;  // of the differences, a ring
    double last_error = 0;

    T* dg(int k) const { return differences + 2 * k * problem.col_count; }
    T* dr(int k) const { return dg(k) + problem.col_count; }

    void restart() { count = oldest = 0, has_last = extrapolated = false; }

    // Appends the differences to the previous input and residual.
    void push() {
        const int slot = (oldest + count) % depth;
        const bool full = count == depth, append = has_last;
        problem.alone([&] {
            copy(image, work.g);
            for (int64_t j = 0; j < problem.col_count; j += width) {
                const Vector input = S::load(work.g_next + j), r = S::load(work.g + j) - input;
                if (append) {
                    S::store(dg(slot) + j, input - S::load(last_g + j));
                    S::store(dr(slot) + j, r - S::load(last_r + j));
                }
                S::store(last_g + j, input);
                S::store(last_r + j, r);
            }
        });
        has_last = true;
        if (append && full) oldest = (oldest + 1) % depth;
        else if (append) ++count;
    }

    void extrapolate(const double* gamma) const {
        for (int64_t j = 0; j < problem.col_count; j += width) {
            Vector correction = S::all(0);
            for (int k = 0; k < count; ++k)
                correction += (T)gamma[k] * (S::load(dg(k) + j) + S::load(dr(k) + j));
            S::store(work.g + j, correction);
        }
        const Vector mean = S::all(mean_correction());
        for (int64_t j = 0; j < problem.col_count; j += width) {
            const Vector correction = S::load(work.g + j);
            const Vector unmatched = S::load(work.unmatched_b + j);
            S::store(work.g + j, S::load(image + j) -
                                     S::select(unmatched > 0, correction, correction - mean));
        }
    }

    // With both marginals fixed, a constant may move between f and g, and would grow until digits
    // are lost: the mean of the correction, which is in g, is left out.
    T mean_correction() const {
        double sum = 0, mass = 0;
        if (problem.penalty_a() || problem.penalty_b()) return 0;
        for (int64_t j = 0; j < problem.m; ++j) {
            sum += (double)work.weight_b[j] * (double)work.g[j];
            mass += (double)work.weight_b[j];
        }
        return mass > 0 ? (T)(sum / mass) : (T)0;
    }

    void copy(T* to, const T* from) const {
        for (int64_t j = 0; j < problem.col_count; j += width) S::store(to + j, S::load(from + j));
    }

    // Least squares: (A + ridge) gamma = c by Cholesky. The order of the differences in the ring
    // does not matter. False: the matrix is not positive.
    bool solve_weights(double* gamma) const {
        double a[max_anderson][max_anderson], trace = 0;
        for (int k = 0; k < count; ++k) {
            for (int l = 0; l <= k; ++l) a[k][l] = product(dr(k), dr(l));
            gamma[k] = product(dr(k), last_r);
            trace += a[k][k];
        }
        if (!(trace > 0)) return false;
        for (int k = 0; k < count; ++k) a[k][k] += Bounds<T>::ridge * trace / count;
        for (int k = 0; k < count; ++k)
            for (int l = 0; l <= k; ++l) {
                double sum = a[k][l];
                for (int i = 0; i < l; ++i) sum -= a[k][i] * a[l][i];
                if (k == l && !(sum > 0)) return false;
                a[k][l] = k == l ? __builtin_sqrt(sum) : sum / a[l][l];
            }
        for (int k = 0; k < count; ++k) {
            for (int i = 0; i < k; ++i) gamma[k] -= a[k][i] * gamma[i];
            gamma[k] /= a[k][k];
        }
        for (int k = count - 1; k >= 0; --k) {
            for (int i = k + 1; i < count; ++i) gamma[k] -= a[i][k] * gamma[i];
            gamma[k] /= a[k][k];
        }
        return true;
    }

    double product(const T* x, const T* y) const {
        double sum = 0;
        for (int64_t j = 0; j < problem.m; ++j)
            sum += (double)work.weight_b[j] * (double)x[j] * (double)y[j];
        return sum;
    }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
