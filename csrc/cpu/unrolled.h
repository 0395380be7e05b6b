// The reverse sweep of the iterations as they ran: G = dL/dC and the gradients of the log-masses.
//
// The iterations run again, keeping f_k and g_k, and are then undone one by one. At the values of a
// step, with
//
//     sigma_ij = b_j exp((f_i + g_j - C_ij) / epsilon)    of the half-step to f: rows sum to 1
//     pi_ij    = a_i exp((f_i + g_j - C_ij) / epsilon)    of the half-step to g: columns sum to 1
//
// a step adds products with pi and sigma' to the adjoints `bar` of f and g, and to G the
// entrywise product of K with a matrix of rank two. The low-rank parts of several steps are
// collected and added at once.
#pragma once

#include "objective.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

// Gradients that arrive from the caller; total = value + linear.
template <typename T>
struct Upstream {
    T value, linear, total;
};

template <typename T>
struct Unrolled {
    typedef SmallGemm<T> Gemm;
    typedef Simd<T> S;
    typedef typename S::Vector Vector;
    typedef typename ScalingKernel<T>::Content Content;
    static constexpr int width = Tiling<T>::width, block = Tiling<T>::block;
    static constexpr int rank = 32;  // columns of the low-rank sum

    Solver<T>& solver;
    const Problem<T>& problem;
    const Cost<T>& cost;
    ScalingKernel<T>& kernel;
    Workspace<T>& work;
    Iteration<T>& iteration;

    Upstream<T> up;
    T* tiles;          // G, kept by the Gradient
    T *bar_a, *bar_b;  // gradients of the log-masses

    explicit Unrolled(Solver<T>& s)
        : solver(s), problem(s.problem), cost(s.cost), kernel(s.kernel), work(s.work),
          iteration(s.iteration) {}

    void lay_out(Arena& shared, int64_t rows, int64_t cols) {
        T** by_row[] = {&bar_f, &bar_a, &row_scale, &row_flow};
        for (T** array : by_row) *array = shared.take<T>(rows);
        T** by_column[] = {&bar_g, &bar_b, &col_scale, &col_flow};
        for (T** array : by_column) *array = shared.take<T>(cols);
        left = shared.take<T>(rank * rows), right = shared.take<T>(rank * cols);
    }

    void differentiate(const optical_problem& batch, const optical_gradient& out, int64_t index,
                       const Side& a, const Side& b) {
        const int32_t steps = run_again(batch, out.n_iter[index], a, b);
        const T omega = (T)batch.omega;
        iteration.set_step(steps == 1 ? (T)1 : omega);
        // Without over-relaxation, the last iteration says what the sums are: those of columns are b
        // exp(-g / rho), and those of rows were a exp(-f / rho) before g changed.
        sums_known = steps == 1 || (steps > 1 && omega == 1);
        if (sums_known && problem.penalty_a())
            measure_changes(history_at(steps - 1) + problem.row_count);
        start(out, a.first, b.first, steps > 0 ? iteration.share_b : (T)0);

        int used = 0;        // columns of the low-rank sum
        bool based = false;  // K is that of a base near the current step
        for (int32_t k = steps - 1; k >= 0; --k) {
            const T *before = history_at(k), *after = history_at(k + 1);
            const T *f = after, *g = after + problem.row_count;
            const T* old_g = before + problem.row_count;
            iteration.set_step(k == 0 ? (T)1 : omega);
            work.ask(k);
            if (!based || !replay(f, old_g)) {
                flush(used);
                used = 0;
                rebase_at(f, old_g);
                based = replay(f, old_g);
            }
            if (based) {
                reverse(used, true, true);
                used += 2;
            } else {
                // One half-step after the other, with pi or sigma itself in the place of K.
                replay_half(before, f, old_g, g, true), reverse(0, true, false), flush(2);
                replay_half(before, f, old_g, g, false), reverse(0, false, true), flush(2);
            }
            if (work.stopped(k)) break;
            if (k == steps - 1) add_deferred();
            if (used == rank) {
                flush(used);
                used = 0;
            }
        }
        flush(used);
        sync(problem.team);
    }

private:
    T *bar_f, *bar_g;
    // Scales of a replayed step: sigma_ij = row_scale_i K_ij (b v)_j, pi_ij = (a u)_i K_ij
    // col_scale_j.
    T *row_scale, *col_scale;
    T *row_flow, *col_flow;  // scaled adjoints of the rows and the columns, to be multiplied with K
    T *left, *right;  // factors of the low-rank sum
    bool sums_known;

    // The potentials after iteration k: f, then g.
    const T* history_at(int32_t k) const {
        return work.history + k * (problem.row_count + problem.col_count);
    }

    // Runs the iterations of the forward pass again, with their history. Returns their number.
    int32_t run_again(const optical_problem& batch, int32_t ran, const Side& a, const Side& b) {
        solver.start(batch, a, b);
        typename Solver<T>::Options options = {0, 0, (T)batch.omega, 0, 0, 1};
        options.max_iter = ran < 0 ? 0 : ran < batch.max_iter ? ran : batch.max_iter;
        const int32_t steps = solver.solve(options);
        Objective<T>(solver).sum_up(false);
        return steps;
    }

    // ---------------------------------------------------------------------------- the start

    // Adjoints of the values before any iteration is undone: G = total P - P M / epsilon with
    // M_ij = value (p_i + q_j) + linear C_ij, and sums of P M. The first half-step to be undone
    // subtracts the share `taken` of the mean of M in each column, since there pi_ij = P_ij / c_j.
    // Under a strong penalty that is nearly all of M: it is left out from the beginning, and the
    // rest of it is deferred in col_cost.
    void start(const optical_gradient& out, int64_t first_a, int64_t first_b, T taken) {
        const T *grad_f = out.grad_f ? (const T*)out.grad_f + first_a : nullptr;
        const T *grad_g = out.grad_g ? (const T*)out.grad_g + first_b : nullptr;
        T *const slope = row_scale, *const mean = col_scale, *const shift = col_flow;
        const double common = common_slope(slope);
        set_row_slopes(slope, common);
        sum_moments(slope);
        problem.own_columns([&](int64_t j) {
            const Vector sum = kernel.column_sum(j), mass = S::load(work.col_mass + j);
            Vector deviation =
                S::select(mass > Bounds<T>::least_divisor, sum / mass, S::all(0));
            deviation =
                S::select(S::absolute(deviation) < Number<T>::infinity, deviation, S::all(0));
            const Vector q = up.value * column_slope(j, -common);
            S::store(mean + j, q + deviation);
            S::store(shift + j, (1 - taken) * q - taken * deviation);
        });
        sync(problem.team);
        fill_tiles(slope, shift);
        const T scale = kernel.inverse_epsilon, epsilon = problem.epsilon;
        problem.own_rows([&](int64_t i) {
            const Vector mass = S::load(work.row_mass + i), moved = S::load(row_flow + i);
            S::store(bar_f + i, moved * scale + gathered(grad_f, problem.row_index, i, problem.n));
            Vector direct = epsilon * (S::load(problem.mass_a + i) * (T)problem.total_b - mass);
            if (problem.penalty_a())
                direct += penalty_slope(work.f, work.row_mass, problem.mass_a, work.row_cost, i,
                                        problem.rho_a);
            S::store(bar_a + i, moved + up.value * direct);
        });
        problem.own_columns([&](int64_t j) {
            const Vector moved = kernel.column_sum(j);
            const Vector mass = S::load(work.col_mass + j), all = mass * S::load(mean + j);
            // Rounding, and columns without mass.
            const Vector rest = moved - (1 - taken) * all;
            S::store(bar_g + j, rest * scale + gathered(grad_g, problem.col_index, j, problem.m));
            S::store(work.col_cost + j, all * scale);
            Vector direct = epsilon * (S::load(problem.mass_b + j) * (T)problem.total_a - mass);
            if (problem.penalty_b())
                direct += penalty_slope(work.g, work.col_mass, problem.mass_b, nullptr, j,
                                        problem.rho_b);
            S::store(bar_b + j, (all + rest) + up.value * direct);
        });
    }

    // After the last iteration is undone: the rest of the mean of M.
    void add_deferred() {
        problem.own_columns([&](int64_t j) {
            S::store(bar_g + j,
                     S::load(bar_g + j) + iteration.alpha * S::load(work.col_cost + j));
        });
    }

    void set_row_slopes(T* slope, double origin) {
        problem.own_rows([&](int64_t i) {
            S::store(slope + i, dual_slope(work.f, work.row_mass, problem.mass_a, problem.log_a, i,
                                           work.row_cost, problem.rho_a, origin));
        });
        sync(problem.team);
    }

    // The mean slope of the rows. It is moved to the columns, in double precision until then.
    double common_slope(T* slope) {
        set_row_slopes(slope, 0);
        double common = 0, mass = 0;
        for (int64_t i = 0; i < problem.n; ++i) {
            common += (double)work.row_mass[i] * (double)slope[i];
            mass += (double)work.row_mass[i];
        }
        common /= mass;
        // One row that is not a number must not spoil the others.
        if (!(__builtin_fabs(common) < (double)(1 / Bounds<T>::least_divisor))) common = 0;
        sync(problem.team);
        return common;
    }

    Vector column_slope(int64_t j, double origin) const {
        return dual_slope(work.g, work.col_mass, problem.mass_b, problem.log_b, j, nullptr,
                          problem.rho_b, origin);
    }

    // The changes of the row sums since g was old_g, relative to the sums before, in row_cost. The
    // changes are the sums of P (1 - exp((old_g - g) / epsilon)), and add up to the difference of
    // the masses of both sides, which removes the rounding errors that they share.
    void measure_changes(const T* old_g) {
        T *const change = work.row_cost, *const moved = col_scale;
        problem.own_columns([&](int64_t j) {
            for (int64_t k = j; k < j + width; ++k) {
                const double exponent = ((double)old_g[k] - (double)work.g[k]) / problem.epsilon;
                moved[k] = work.bv[k] * (T)-__builtin_expm1(exponent);
            }
        });
        sync(problem.team);
        kernel.sweep(
            moved, work.f_next,
            [&](auto lanes, int64_t i, auto sum) {
                typedef decltype(lanes) L;
                L::store(change + i, L::load(work.au + i) * sum);
                return L::all(0);
            },
            [&](int64_t, Vector) {});
        sync(problem.team);
        double missing = 0, mass = 0;
        for (int64_t j = 0; j < problem.m; ++j)
            if (work.unmatched_b[j] == 0)
                missing += required_mass(problem.log_b[j], work.g[j], problem.rho_b);
        for (int64_t i = 0; i < problem.n; ++i)
            if (work.unmatched_a[i] == 0) {
                missing -= required_mass(problem.log_a[i], work.f[i], problem.rho_a);
                missing -= (double)change[i], mass += (double)work.row_mass[i];
            }
        sync(problem.team);
        problem.own_rows([&](int64_t i) {
            const Vector sum = S::load(work.row_mass + i);
            const Vector all = S::load(change + i) + (T)(missing / mass) * sum;
            S::store(change + i, all / (sum - all));
        });
        sync(problem.team);
    }
    static double required_mass(T log_mass, T potential, T rho) {
        return __builtin_exp((double)log_mass - (double)potential / (double)rho);
    }
    // sum / (mass exp(-potential / rho)) - 1, or infinity if the last iteration does not say.
    // `changes` is null where it is 0.
    double known_change(T sum, T mass, const T* changes, int64_t i) const {
        const double change = changes && sums_known ? (double)changes[i] : 0;
        const bool known = sums_known && sum > 0 && mass > Bounds<T>::least_divisor;
        return known && __builtin_fabs(change) < 0.25 ? change : Number<double>::infinity;
    }
    // Derivative of the dual value with respect to the mass of a marginal: the potential and the
    // contribution of a penalty, less `origin`. A large rho magnifies the rounding errors of the
    // sum, so a known change is preferred.
    Vector dual_slope(const T* potential, const T* sum, const T* mass, const T* log_mass, int64_t i,
                      const T* changes, T rho, double origin) const {
        Vector slope;
        for (int lane = 0; lane < width; ++lane, ++i) {
            double all = (double)potential[i] - origin;
            if (rho < Number<T>::infinity && sum[i] > 0) {
                const double change = known_change(sum[i], mass[i], changes, i);
                if (change == 0)
                    all = -origin;
                else if (change < 1)
                    all = (double)rho * __builtin_log1p(change) - origin;
                else
                    all += (double)rho * Objective<T>::log_ratio(sum[i], mass[i], log_mass[i]);
            }
            slope[lane] = (T)all;
        }
        return slope;
    }
    // Derivative of a penalty with respect to the log-mass, with opposite sign: rho (mass - sum).
    Vector penalty_slope(const T* potential, const T* sum, const T* mass, const T* changes,
                         int64_t i, T rho) const {
        Vector slope;
        for (int lane = 0; lane < width; ++lane, ++i) {
            double missing = (double)mass[i] - (double)sum[i];
            const double change = known_change(sum[i], mass[i], changes, i);
            if (change < 1) {
                const double factor = __builtin_expm1(-(double)potential[i] / (double)rho);
                missing = -(double)mass[i] * (factor + (1 + factor) * change);
            }
            slope[lane] = (T)((double)rho * missing);
        }
        return slope;
    }

    // Column sums of P_ij (value p_i + linear C_ij).
    void sum_moments(const T* slope) {
        problem.own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            const int64_t cols = problem.col_count;
            T* sums = work.partial + chunk * cols;
            for (int64_t j = 0; j < cols; j += width) S::store(sums + j, S::all(0));
            for (int64_t b = from; b < to; ++b) {
                const T *k = kernel.tile(b), *c = cost.tile(b, work.panel(b + 1));
                const T *const share = work.au + b * block, *const p = slope + b * block;
                for (int64_t j = 0; j < cols; j += width) {
                    const Vector weight = S::load(work.bv + j);
                    Vector column = S::load(sums + j);
                    for (int r = 0; r < block; ++r, k += width, c += width)
                        column += (S::load(k) * share[r]) * weight *
                                  (up.value * p[r] + up.linear * Cost<T>::finite(c));
                    S::store(sums + j, column);
                }
            }
        });
        sync(problem.team);
    }

    // G, and the row and column sums of P M. One rounded number goes into G and both sums, since
    // the sweep subtracts much of it again: separate roundings would remain.
    void fill_tiles(const T* slope, const T* shift) {
        const T scale = kernel.inverse_epsilon;
        problem.own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            const int64_t cols = problem.col_count;
            T* sums = work.partial + chunk * cols;
            for (int64_t j = 0; j < cols; j += width) S::store(sums + j, S::all(0));
            for (int64_t b = from; b < to; ++b) {
                const T *k = kernel.tile(b), *c = cost.tile(b, work.panel(b + 1));
                const T *const share = work.au + b * block, *const p = slope + b * block;
                T* tile = cost.tile_of(tiles, b);
                Vector row[block];
                for (int r = 0; r < block; ++r) row[r] = S::all(0);
                for (int64_t j = 0; j < cols; j += width) {
                    const Vector weight = S::load(work.bv + j), of_column = S::load(shift + j);
                    Vector column = S::load(sums + j);
                    for (int r = 0; r < block; ++r, k += width, c += width, tile += width) {
                        const Vector plan = (S::load(k) * share[r]) * weight;
                        const Vector moved = plan * ((up.value * p[r] + of_column) +
                                                     up.linear * Cost<T>::finite(c));
                        row[r] += moved, column += moved;
                        S::store(tile, up.total * plan - scale * moved);
                    }
                    S::store(sums + j, column);
                }
                for (int q = 0; q < Tiling<T>::groups; ++q)
                    S::store(row_flow + b * block + q * width,
                             S::template across<typename S::Sum>(row + q * width));
            }
        });
        sync(problem.team);
    }

    static Vector gathered(const T* gradient, const int64_t* index, int64_t at, int64_t count) {
        Vector values = S::all(0);
        for (int lane = 0; gradient && lane < width && at + lane < count; ++lane)
            values[lane] = gradient[index[at + lane]];
        return values;
    }

    // ------------------------------------------------------------------------ undoing a step

    // Runs one iteration again on the current base, from g to f: leaves a u, b v, and the scales
    // with which the rows of sigma and the columns of pi sum to 1 regardless of rounding. False: a
    // number left the trusted range, or would when multiplied with an adjoint.
    bool replay(const T* f, const T* g) {
        // Adjoints have less room than scales: one product holds two scales and an adjoint.
        constexpr T room = Bounds<T>::trusted / Bounds<T>::drift;
        BitRange<T> range;
        const bool relaxed = work.relaxed;
        problem.own_columns([&](int64_t j) {
            const Vector scale =
                S::exp((S::load(g + j) - S::load(kernel.base_g + j)) * kernel.inverse_epsilon);
            const Vector weight = S::load(work.weight_b + j);
            // A mass that underflowed counts for nothing, unless its scale is large.
            range.add(S::select(weight > 0, scale, S::max(scale, S::all(1))));
            range.add(S::max(S::absolute(S::load(bar_g + j)), S::all(1)) * room);
            S::store(work.bv + j, S::select(weight > 0, weight * scale, S::all(0)));
        });
        sync(problem.team);
        kernel.sweep(
            work.bv, work.au,
            [&](auto lanes, int64_t i, auto sum) {
                typedef decltype(lanes) L;
                const auto total = sum + L::load(work.unmatched_a + i);
                const auto weight = L::load(work.weight_a + i);
                auto scale = T(1) / total;
                range.template add_lanes<L>(total);
                range.template add_lanes<L>(
                    L::max(L::absolute(L::load(bar_f + i)), L::all(1)) * room);
                L::store(row_scale + i, scale);
                if (relaxed) {
                    scale = L::exp((L::load(f + i) - L::load(kernel.base_f + i)) *
                                   kernel.inverse_epsilon);
                    range.template add_lanes<L>(
                        L::select(weight > 0, scale, L::max(scale, L::all(1))));
                }
                return L::select(weight > 0, weight * scale, L::all(0));
            },
            [&](int64_t j, Vector sum) {
                const Vector total = sum + S::load(work.unmatched_b + j);
                range.add(total);
                S::store(col_scale + j, T(1) / total);
            });
        return work.merged(range).within(Bounds<T>::trusted);
    }

    void rebase_at(const T* f, const T* g) {
        sync(problem.team);
        problem.own_rows([&](int64_t i) { S::store(work.f + i, S::load(f + i)); });
        problem.own_columns([&](int64_t j) { S::store(work.g + j, S::load(g + j)); });
        sync(problem.team);
        kernel.rebase(false);
        sync(problem.team);
    }

    // Builds pi of the half-step from f to g, or sigma of the one from old_g to f, from its input
    // and its softmin, (result - alpha previous) / share. With the masses inside, no entry exceeds
    // 1, however small they are; the weights are 1.
    void replay_half(const T* old_f, const T* f, const T* old_g, const T* g, bool of_columns) {
        const T alpha = iteration.alpha;
        sync(problem.team);
        problem.own_rows([&](int64_t i) {
            const Vector softmin =
                (S::load(f + i) - alpha * S::load(old_f + i)) / iteration.share_a;
            S::store(kernel.base_f + i, of_columns ? S::load(f + i) : softmin);
        });
        problem.own_columns([&](int64_t j) {
            const Vector softmin =
                (S::load(g + j) - alpha * S::load(old_g + j)) / iteration.share_b;
            S::store(kernel.base_g + j, of_columns ? softmin : S::load(old_g + j));
            S::store(work.bv + j, S::all(1));
        });
        sync(problem.team);
        kernel.content = of_columns ? Content::column_softmax : Content::row_softmax;
        kernel.build();
        sync(problem.team);
        kernel.sweep(
            work.bv, work.au,
            [&](auto lanes, int64_t i, auto sum) {
                typedef decltype(lanes) L;
                L::store(row_scale + i, T(1) / (sum + L::load(work.unmatched_a + i)));
                return L::all(1);
            },
            [&](int64_t j, Vector sum) {
                S::store(col_scale + j, T(1) / (sum + S::load(work.unmatched_b + j)));
            });
        sync(problem.team);
    }

    // Undoes the replayed half-step that found g, the one that found f, or both, and appends their
    // share of G to the low-rank sum: a u (v bar_g)' and u bar_f (b v)'.
    void reverse(int used, bool of_columns, bool of_rows) {
        const T epsilon = problem.epsilon;
        const T alpha = iteration.alpha, share_a = iteration.share_a, share_b = iteration.share_b;
        const int64_t count = problem.col_count / width;
        const Vector none = S::all(0);
        problem.own_columns([&](int64_t j) {
            const Vector flow = S::load(col_scale + j) * (share_b * S::load(bar_g + j));
            S::store(col_flow + j, of_columns ? flow : none);
            S::store(right + Gemm::packed(used, j / width, rank, count), of_columns ? flow : none);
            S::store(right + Gemm::packed(used + 1, j / width, rank, count),
                     of_rows ? S::load(work.bv + j) : none);
        });
        sync(problem.team);
        kernel.sweep(
            col_flow, row_flow,
            [&](auto lanes, int64_t i, auto sum) {
                typedef decltype(lanes) L;
                const auto nothing = L::all(0);
                const auto share = of_columns ? L::load(work.au + i) : nothing;
                const auto received = of_columns ? share * sum : nothing;
                const auto bar = L::load(bar_f + i) - received;
                const auto flow = of_rows ? L::load(row_scale + i) * (share_a * bar) : nothing;
                L::store(bar_a + i, L::load(bar_a + i) - epsilon * received);
                L::store(bar_f + i, of_rows ? alpha * bar : bar);
                for (int lane = 0; lane < L::width; ++lane) {
                    left[(i + lane) * rank + used] = share[lane];
                    left[(i + lane) * rank + used + 1] = flow[lane];
                }
                return flow;
            },
            [&](int64_t j, Vector sum) {
                const Vector received = of_rows ? S::load(work.bv + j) * sum : none;
                const Vector bar = S::load(bar_g + j);
                S::store(bar_b + j, S::load(bar_b + j) - epsilon * received);
                S::store(bar_g + j, (of_columns ? alpha * bar : bar) - received);
            });
        sync(problem.team);
    }

    // Adds K times the low-rank sum, entry by entry, to G.
    void flush(int used) {
        if (used == 0) return;
        const int64_t count = problem.col_count / width;
        problem.own_rows([&](int64_t i) {
            for (int lane = 0; lane < width; ++lane)
                for (int k = used; k < rank; ++k) left[(i + lane) * rank + k] = 0;
        });
        problem.own_columns([&](int64_t j) {
            for (int k = used; k < rank; ++k)
                S::store(right + Gemm::packed(k, j / width, rank, count), S::all(0));
        });
        sync(problem.team);
        problem.own_chunks([&](int64_t, int64_t from, int64_t to) {
            for (int64_t b = from; b < to; ++b) {
                const T* k = kernel.tile(b);
                T* tile = cost.tile_of(tiles, b);
                Gemm::multiply(block / Gemm::rows, Rows<T>{left + b * block * rank, rank}, right,
                               rank, count,
                               [&](int64_t group, int r, int64_t v, Vector sum, bool)
                                   __attribute__((always_inline)) {
                                       const int64_t at =
                                           (v * block + group * Gemm::rows + r) * width;
                                       S::store(tile + at,
                                                S::load(tile + at) + S::load(k + at) * sum);
                                   });
            }
        });
        sync(problem.team);
    }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
