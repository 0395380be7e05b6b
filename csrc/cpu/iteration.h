// One Sinkhorn iteration, f then g: in the log domain (plain), and by scaling (fast).
//
// Both compute the half-steps of sinkhorn.h, over-relaxed by omega (Thibault et al., arXiv
// 1711.01851):
//
//     f_i <- (1 - omega) f_i + omega lambda_a softmin_j(C_ij - g_j)     and the same for g
//
// with softmin_j x_j = -epsilon log sum_j b_j exp(-x_j / epsilon). Penalties, over-relaxation and
// Anderson acceleration need the potentials themselves after every half-step ("relaxed"), at a
// logarithm and an exponential per row and column; otherwise the scalings u and v suffice.
#pragma once

#include "scaling_kernel.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

template <typename T>
struct Iteration {
    typedef Simd<T> S;
    typedef typename S::Vector Vector;
    typedef Number<T> C;
    typedef BitRange<T> Range;
    static constexpr int width = Tiling<T>::width, block = Tiling<T>::block;
    static constexpr int groups = Tiling<T>::groups;

    const Problem<T>& problem;
    const Cost<T>& cost;
    Workspace<T>& work;
    const ScalingKernel<T>& kernel;

    // Which marginal error an iteration measures: that of the rows of its input; of the columns
    // between its half-steps, for Anderson acceleration; or, since over-relaxed columns are not
    // exact, that of the rows of its input and of the columns of its result.
    enum class Measure { nothing, rows, columns, relaxed };

    // Whether the sums of the rows, and all sums, can be trusted; whether u and v need no new base
    // yet ("calm"); and the marginal error. Small enough to be returned in registers.
    struct Step {
        bool rows_trusted, trusted, calm;
        double error;
    };

    Iteration(const Problem<T>& p, const Cost<T>& c, Workspace<T>& w, const ScalingKernel<T>& k)
        : problem(p), cost(c), work(w), kernel(k) {}

    T alpha, share_a, share_b;  // potential <- alpha potential + share softmin
    double result_error;        // with Measure::relaxed: of the columns of the result

    // At the temperature of the kernel.
    void set_step(T omega) {
        const T epsilon = kernel.epsilon;
        alpha = 1 - omega;
        share_a = omega * (problem.penalty_a() ? problem.rho_a / (problem.rho_a + epsilon) : (T)1);
        share_b = omega * (problem.penalty_b() ? problem.rho_b / (problem.rho_b + epsilon) : (T)1);
    }

    // ------------------------------------------------------------------- in the log domain

    // One iteration from f and g into f_next and g_next. Sums in the log domain can be trusted.
    Step iterate_log_domain(Measure measure) {
        const int64_t cols = problem.col_count;
        problem.own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            T* lowest = work.partial + chunk * cols;
            for (int64_t j = 0; j < cols; j += width) S::store(lowest + j, S::all(C::infinity));
            for (int64_t b = from; b < to; ++b) softmin_rows(b, lowest);
        });
        sync(problem.team);
        // g_next holds the least exponent of every column until the sums are known.
        problem.own_columns([&](int64_t j) {
            Vector least = S::load(work.partial + j);
            for (int64_t c = 1; c < problem.chunks; ++c)
                least = S::min(least, S::load(work.partial + c * cols + j));
            S::store(work.g_next + j,
                     S::select(S::load(work.unmatched_b + j) > 0, S::all(0), least));
        });
        sync(problem.team);
        problem.own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            T* sums = work.partial + chunk * cols;
            for (int64_t j = 0; j < cols; j += width) S::store(sums + j, S::all(0));
            for (int64_t b = from; b < to; ++b) add_exponentials(b, sums);
        });
        sync(problem.team);
        const bool of_result = measure == Measure::relaxed;
        problem.own_columns([&](int64_t j) { softmin_columns(j, of_result); });
        sync(problem.team);
        if (of_result) result_error = column_error();
        const double error = measure == Measure::columns ? column_error() : total_row_error();
        work.parity ^= 1;
        return {true, true, false, error};
    }

    // -------------------------------------------------------------------------- by scaling

    // One iteration into u_next and v_next, or with `potentials` into f_next and g_next. The
    // lambdas use locals only, because the compiler must assume that stores change members.
    template <Measure measure, bool potentials>
    __attribute__((noinline)) Step iterate() {
        const Workspace<T>& w = work;
        const T *const unmatched_a = w.unmatched_a, *const weight_a = w.weight_a, *const f = w.f;
        const T *const unmatched_b = w.unmatched_b, *const weight_b = w.weight_b, *const g = w.g;
        const T *const log_a = problem.log_a, *const log_b = problem.log_b;
        const T *const base_f = kernel.base_f, *const base_g = kernel.base_g;
        T *const new_a = potentials ? w.f_next : w.u_next;
        T *const new_b = potentials ? w.g_next : w.v_next;
        T *const au = w.au, *const bv = w.bv;
        T *const error_a = row_error(), *const error_b = col_error();
        const T keep = alpha, take_a = share_a, take_b = share_b;
        const T epsilon = kernel.epsilon, scale = kernel.inverse_epsilon;
        const T rho_a = problem.rho_a, rho_b = problem.rho_b;

        Range rows, all;
        kernel.sweep(
            bv, au,
            [&](auto lanes, int64_t i, auto sum) __attribute__((always_inline)) {
                typedef decltype(lanes) L;
                const auto total = sum + L::load(unmatched_a + i), mass = L::load(weight_a + i);
                rows.template add_lanes<L>(total);
                if constexpr (measure == Measure::rows || measure == Measure::relaxed) {
                    auto target = mass;
                    if constexpr (potentials)
                        target = target_mass<L>(log_a + i, weight_a + i, L::load(f + i), rho_a);
                    L::store(error_a + i, L::absolute(L::load(au + i) * total - target));
                }
                auto scaling = T(1) / total;
                if constexpr (potentials) {
                    const auto base = L::load(base_f + i);
                    const auto next =
                        keep * L::load(f + i) + take_a * (base - epsilon * L::log(total));
                    scaling = L::exp((next - base) * scale);
                    rows.template add_lanes<L>(scaling);
                    L::store(new_a + i, next);
                } else {
                    L::store(new_a + i, scaling);
                }
                return mass * scaling;
            },
            [&](int64_t j, Vector sum) __attribute__((always_inline)) {
                const Vector total = sum + S::load(unmatched_b + j), mass = S::load(weight_b + j);
                all.add(total);
                if constexpr (measure == Measure::columns)
                    S::store(error_b + j,
                             S::absolute(S::load(bv + j) * total -
                                         target_mass(log_b + j, weight_b + j,
                                                     S::load(g + j), rho_b)));
                Vector scaling = T(1) / total;
                if constexpr (potentials) {
                    const Vector base = S::load(base_g + j);
                    const Vector next =
                        keep * S::load(g + j) + take_b * (base - epsilon * S::log(total));
                    scaling = S::exp((next - base) * scale);
                    all.add(scaling);
                    S::store(new_b + j, next);
                    if constexpr (measure == Measure::relaxed)
                        S::store(error_b + j,
                                 S::absolute(mass * scaling * total -
                                             target_mass(log_b + j, weight_b + j, next, rho_b)));
                } else {
                    S::store(new_b + j, scaling);
                }
                S::store(bv + j, mass * scaling);
            });
        all.add(rows);
        work.merge(rows, all);
        Step step = {true, true, all.within(Bounds<T>::drift), 0};
        if (!step.calm) {
            step.rows_trusted = rows.within(Bounds<T>::trusted);
            step.trusted = all.within(Bounds<T>::trusted);
        }
        if (measure == Measure::columns) step.error = column_error();
        else if (measure != Measure::nothing) step.error = total_row_error();
        if (measure == Measure::relaxed) result_error = column_error();
        work.parity ^= 1;
        return step;
    }

    // f and g of the current u and v.
    void absorb() {
        if (work.relaxed) return;
        problem.own_rows([&](int64_t i) { S::store(work.f + i, row_potential(i)); });
        problem.own_columns([&](int64_t j) { S::store(work.g + j, column_potential(j)); });
        sync(problem.team);
    }
    // f and g of u and v, which end the run. Rounding moves the scalings of f and g away from u and
    // v: a u and b v become those of f and g, so that they belong to the potentials that are
    // returned. True: the change exceeds Bounds::rounding, which would show in the values. Then au
    // and bv are those of u and v, and those of f and g are in u_next and v_next.
    bool round_potentials() {
        typename S::Mask close = S::all(0) == S::all(0);
        const auto round = [&](T* potential, T* to, const T* mass, const T* base, Vector scaling)
            __attribute__((always_inline)) {
                const Vector rounded = S::load(base) + kernel.epsilon * S::log(scaling);
                const Vector moved = S::exp((rounded - S::load(base)) * kernel.inverse_epsilon);
                close &= S::absolute(moved - scaling) <= Bounds<T>::rounding * scaling;
                S::store(potential, rounded);
                S::store(to, S::load(mass) * moved);
            };
        problem.own_rows([&](int64_t i) __attribute__((always_inline)) {
            round(work.f + i, work.au + i, work.weight_a + i, kernel.base_f + i,
                  S::load(work.u + i));
        });
        problem.own_columns([&](int64_t j) __attribute__((always_inline)) {
            round(work.g + j, work.bv + j, work.weight_b + j, kernel.base_g + j,
                  S::load(work.v + j));
        });
        const bool moved = !work.all_valid(S::every(close));
        if (moved) {
            const auto keep = [&](T* weights, T* copy, const T* mass, const T* scaling) {
                S::store(copy, S::load(weights));
                S::store(weights, S::load(mass) * S::load(scaling));
            };
            problem.own_rows([&](int64_t i) {
                keep(work.au + i, work.u_next + i, work.weight_a + i, work.u + i);
            });
            problem.own_columns([&](int64_t j) {
                keep(work.bv + j, work.v_next + j, work.weight_b + j, work.v + j);
            });
        }
        sync(problem.team);
        return moved;
    }
    Vector row_potential(int64_t i) const {
        return S::load(kernel.base_f + i) + kernel.epsilon * S::log(S::load(work.u + i));
    }
    Vector column_potential(int64_t j) const {
        return S::load(kernel.base_g + j) + kernel.epsilon * S::log(S::load(work.v + j));
    }

private:
    // Errors of the current parity.
    T* row_error() const { return work.row_error + work.parity * problem.row_count; }
    T* col_error() const { return work.col_error + work.parity * problem.col_count; }

    // The marginal that a penalty asks for, mass exp(-potential / rho). A single exponential where
    // the factor could overflow while the mass underflows.
    template <typename Lanes = S>
    static typename Lanes::Vector target_mass(const T* log_mass, const T* weight,
                                              typename Lanes::Vector potential, T rho) {
        const typename Lanes::Vector mass = Lanes::load(weight);
        if (!(rho < C::infinity)) return mass;
        const typename Lanes::Vector exponent = potential * (-1 / rho);
        const typename Lanes::Vector apart = mass * Lanes::exp(exponent);
        const typename Lanes::Mask small = exponent < Bounds<T>::exponent;
        if (Lanes::every(small)) return apart;
        return Lanes::select(small, apart, Lanes::exp(Lanes::load(log_mass) + exponent));
    }

    // L1 errors of the marginals. Fixed marginals miss the mass of unmatched entries.
    double total_row_error() const {
        return problem.sum_of(row_error(), problem.n) +
               (problem.penalty_a() ? 0 : work.unmatched_mass_a);
    }
    double column_error() const {
        return problem.sum_of(col_error(), problem.m) + unmatched_mass_b();
    }
    double unmatched_mass_b() const {
        double mass = 0;
        if (!work.unmatched_columns || problem.penalty_b()) return 0;
        for (int64_t j = 0; j < problem.m; ++j)
            mass += (double)(problem.mass_b[j] - work.weight_b[j]);
        return mass;
    }

    // Log-domain half-step of the rows of block b: f_next, the errors, and the least exponents of
    // the columns.
    void softmin_rows(int64_t b, T* lowest) {
        const int64_t cols = problem.col_count;
        const T epsilon = kernel.epsilon;
        const T* c = cost.tile(b, work.panel(0));
        Vector sum[block], least[block];
        for (int r = 0; r < block; ++r) {
            least[r] = S::all(C::infinity);
            for (int64_t j = 0; j < cols; j += width)
                least[r] = S::min(least[r], row_exponent(c, r, j));
        }
        T* const error = row_error();
        T origin[block];
        for (int q = 0; q < groups; ++q) {
            const int64_t i = b * block + q * width;
            const Vector x = S::template across<typename S::Minimum>(least + q * width);
            S::store_unaligned(origin + q * width,
                               S::select(S::load(work.unmatched_a + i) > 0, S::all(0), x));
        }
        for (int r = 0; r < block; ++r) {
            sum[r] = S::all(0);
            for (int64_t j = 0; j < cols; j += width)
                sum[r] += S::exp(origin[r] - row_exponent(c, r, j));
        }
        for (int q = 0; q < groups; ++q) {
            const int64_t i = b * block + q * width;
            const Vector total = S::template across<typename S::Sum>(sum + q * width) +
                                 S::load(work.unmatched_a + i);
            const Vector softmin =
                epsilon * (S::load_unaligned(origin + q * width) - S::log(total));
            const Vector f = S::load(work.f + i);
            S::store(error + i, S::absolute(kernel.share_of_rows(i, f, softmin) -
                                            target_mass(problem.log_a + i, work.weight_a + i, f,
                                                        problem.rho_a)));
            S::store(work.f_next + i, alpha * f + share_a * softmin);
        }
        for (int r = 0; r < block; ++r)
            for (int64_t j = 0; j < cols; j += width)
                S::store(lowest + j, S::min(S::load(lowest + j), column_exponent(c, b, r, j)));
    }

    // Adds exp(least - exponent) of the rows of block b to the column sums.
    void add_exponentials(int64_t b, T* sums) const {
        const T* c = cost.tile(b, work.panel(0));
        for (int64_t j = 0; j < problem.col_count; j += width) {
            const Vector origin = S::load(work.g_next + j);
            Vector sum = S::load(sums + j);
            for (int r = 0; r < block; ++r) sum += S::exp(origin - column_exponent(c, b, r, j));
            S::store(sums + j, sum);
        }
    }

    // Log-domain half-step of a vector of columns: g_next, and the errors of g or of g_next.
    void softmin_columns(int64_t j, bool of_result) {
        Vector total = S::load(work.unmatched_b + j);
        for (int64_t c = 0; c < problem.chunks; ++c)
            total += S::load(work.partial + c * problem.col_count + j);
        const Vector softmin = kernel.epsilon * (S::load(work.g_next + j) - S::log(total));
        const Vector g = S::load(work.g + j), next = alpha * g + share_b * softmin;
        const Vector of = of_result ? next : g;
        S::store(col_error() + j,
                 S::absolute(kernel.share_of_columns(j, of, softmin) -
                             target_mass(problem.log_b + j, work.weight_b + j, of, problem.rho_b)));
        S::store(work.g_next + j, next);
    }

    OPTICAL_INLINE_MEMBER Vector row_exponent(const T* c, int r, int64_t j) const {
        const Vector cost_ij = S::load(c + j * block + r * width);
        return (cost_ij - S::load(work.g + j)) * kernel.inverse_epsilon -
               S::load(problem.log_b + j);
    }
    OPTICAL_INLINE_MEMBER Vector column_exponent(const T* c, int64_t b, int r, int64_t j) const {
        const Vector cost_ij = S::load(c + j * block + r * width);
        const int64_t i = b * block + r;
        return (cost_ij - work.f_next[i]) * kernel.inverse_epsilon - problem.log_a[i];
    }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
