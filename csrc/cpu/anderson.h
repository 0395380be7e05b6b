// Acceleration of the iteration, in vectors only.
#pragma once

#include "solver.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

// Anderson acceleration of the map from g to the g of the next iteration (type II, safeguarded
// by the residual: a mixture that made it grow is taken back).
template <typename T>
struct Mixer {
    typedef Simd<T> S;
    typedef typename S::Vector Vector;
    static constexpr int width = S::width;

    Solver<T>& s;
    const int memory;
    T *image = nullptr, *last_g = nullptr, *last_r = nullptr, *differences = nullptr;
    bool has_last = false, extrapolated = false;
    int count = 0, oldest = 0;
    double last_residual = 0;

    Mixer(Solver<T>& solver, int depth) : s(solver), memory(depth) {
        if (depth == 0) return;
        image = s.memory, last_g = image + s.col_count, last_r = last_g + s.col_count;
        differences = last_r + s.col_count;
    }
    T* dg(int k) const { return differences + 2 * k * s.col_count; }
    T* dr(int k) const { return dg(k) + s.col_count; }

    // After an iteration: g holds its image and g_next its input. Puts the next input into g;
    // true when that is not the image itself.
    bool next(bool plain, double residual) {
        bool chosen = false;
        // Every thread decides alike; only one writes.
        if (plain) {
            count = oldest = 0, has_last = extrapolated = false;
            s.alone([&] { copy(image, s.g); });
            return false;
        }
        if (extrapolated && !(residual <= last_residual)) {
            count = oldest = 0, has_last = extrapolated = false;
            s.alone([&] {
                copy(image, s.g);
                // The plain image of the last accepted input.
                for (int64_t j = 0; j < s.col_count; j += width)
                    S::store(s.g + j, S::load(last_g + j) + S::load(last_r + j));
            });
            return true;
        }
        const int slot = (oldest + count) % memory;
        const bool push = has_last;
        s.alone([&] {
            copy(image, s.g);
            for (int64_t j = 0; j < s.col_count; j += width) {
                const Vector input = S::load(s.g_next + j), r = S::load(s.g + j) - input;
                if (push) {
                    S::store(dg(slot) + j, input - S::load(last_g + j));
                    S::store(dr(slot) + j, r - S::load(last_r + j));
                }
                S::store(last_g + j, input);
                S::store(last_r + j, r);
            }
        });
        if (push) {
            if (count == memory) oldest = (oldest + 1) % memory;
            else ++count;
        }
        has_last = true, last_residual = residual;
        extrapolated = chosen = false;
        if (count > 0) {
            double gamma[max_anderson];
            chosen = solve_weights(gamma);
            if (chosen) {
                s.alone([&] {
                    for (int64_t j = 0; j < s.col_count; j += width) {
                        Vector taken = S::all(0);
                        for (int k = 0; k < count; ++k)
                            taken += (T)gamma[k] * (S::load(dg(k) + j) + S::load(dr(k) + j));
                        S::store(s.g + j, taken);
                    }
                    const Vector mean = S::all(drift());
                    for (int64_t j = 0; j < s.col_count; j += width) {
                        const Vector taken = S::load(s.g + j), dead = S::load(s.pad_b + j);
                        S::store(s.g + j, S::load(image + j) - S::select(dead > 0, taken, taken - mean));
                    }
                });
                // Where no plan exists mixtures run away, and potentials whose last digit is worth a
                // temperature satisfy anything.
                const T most = s.epsilon * Bounds<T>::farthest;
                bool usable = true;
                for (int64_t j = 0; j < s.col_count; ++j) usable &= s.g[j] <= most && s.g[j] >= -most;
                extrapolated = usable;
                if (!usable) {
                    count = oldest = 0, has_last = false;
                    s.alone([&] { copy(s.g, image); });
                }
            }
        }
        return chosen;
    }

    // With both marginals fixed a constant may move between f and g: left alone, it would grow until
    // digits are lost. Its part of what is taken off the image, which is in g.
    T drift() const {
        double sum = 0, mass = 0;
        if (s.rho_a < Number<T>::infinity || s.rho_b < Number<T>::infinity) return 0;
        for (int64_t j = 0; j < s.m; ++j) {
            sum += (double)s.weight_b[j] * (double)s.g[j];
            mass += (double)s.weight_b[j];
        }
        return mass > 0 ? (T)(sum / mass) : (T)0;
    }

    void copy(T* to, const T* from) const {
        for (int64_t j = 0; j < s.col_count; j += width) S::store(to + j, S::load(from + j));
    }

    // Least squares in the norm with weights b: (A + ridge) gamma = c by Cholesky. With a full
    // ring the order of the differences does not matter.
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
        for (int64_t j = 0; j < s.m; ++j)
            sum += (double)s.weight_b[j] * (double)x[j] * (double)y[j];
        return sum;
    }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
