// The reverse sweep: G = dL/dC of the iterations as they ran. They run again, keeping f_k and g_k,
// and are then undone one by one. With pi_ij = a_i exp((f_i + g_j - C_ij) / epsilon) and
// sigma_ij = b_j exp(...) at the values of a step, all products are with K, and the sum over the
// steps of what the cost receives is K times a matrix of rank two per step.
#pragma once

#include "anderson.h"
#include "results.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

template <typename T>
struct Unrolled {
    typedef Solver<T> Solve;
    typedef Product<T> P;
    typedef Simd<T> S;
    typedef typename S::Vector Vector;
    typedef Number<T> C;
    static constexpr int width = S::width;
    static constexpr int block = Solve::block;
    static constexpr int rank = 32;  // columns of the low-rank sum

    Solve s;
    T* tiles;      // G
    T up, linear;  // upstream: of both values together, of value_linear
    T *bar_f, *bar_g, *bar_a, *bar_b, *from_f, *from_g, *to_f, *to_g, *left, *right;

    // Of a solver, of G where it is kept, and of the sweep where there is one.
    void lay_out(Arena& shared, Arena& own, const optical_problem& p, bool swapped, bool keep) {
        const bool unroll = p.gradient == OPTICAL_UNROLL;
        s.lay_out(shared, own, p, swapped, unroll, unroll);
        const int64_t rows = round_up(swapped ? p.m : p.n, block);
        const int64_t cols = round_up(swapped ? p.n : p.m, block);
        tiles = keep ? shared.take<T>(rows * cols) : nullptr;
        if (!unroll) return;
        T** by_row[] = {&bar_f, &bar_a, &from_f, &to_f};
        for (T** array : by_row) *array = shared.take<T>(rows);
        T** by_column[] = {&bar_g, &bar_b, &from_g, &to_g};
        for (T** array : by_column) *array = shared.take<T>(cols);
        left = shared.take<T>(rank * rows), right = shared.take<T>(rank * cols);
    }

    static void fill(T* to, int64_t count, T value) {
        for (int64_t i = 0; i < count; ++i) to[i] = value;
    }

    void unroll(const optical_problem& p, const optical_gradient& out, int64_t index, const Side& a,
                const Side& b, T grad_value) {
        s.start(p, a, b);
        typename Solve::Options options = {0, 0, (T)p.omega, 0, 0, 1};
        const int32_t ran = out.n_iter[index];
        options.max_iter = ran < 0 ? 0 : ran < p.max_iter ? ran : p.max_iter;
        bool converged;
        const int32_t steps = s.solve(options, converged);
        Results<T>{s}.sum_up(false);
        s.set_step(steps == 1 ? (T)1 : (T)p.omega);
        start(out, a.first, b.first, grad_value, steps > 0 ? s.share_b : (T)0);

        int used = 0;
        bool based = false;
        for (int32_t k = steps - 1; k >= 0; --k) {
            const int64_t size = s.row_count + s.col_count;
            const T *before = s.history + k * size, *after = before + size;
            const T *f = after, *g = after + s.row_count, *old_g = before + s.row_count;
            s.set_step(k == 0 ? (T)1 : (T)p.omega);
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
                // One half after the other, each with pi or sigma itself in the place of K.
                replay_half(before, f, old_g, g, true), reverse(0, true, false), flush(2);
                replay_half(before, f, old_g, g, false), reverse(0, false, true), flush(2);
            }
            if (k == steps - 1)
                s.own_columns([&](int64_t j) {
                    S::store(bar_g + j, S::load(bar_g + j) + s.alpha * S::load(s.col_spent + j));
                });
            if (used == rank) {
                flush(used);
                used = 0;
            }
        }
        flush(used);
        sync(s.team);
    }

    // What the results receive before any iteration is undone: G = up P - P M / epsilon, with
    // M_ij = grad_value (p_i + q_j) + linear C_ij, and sums of P M. The first half step to be undone
    // takes a share of the mean of M in each column off again, since there pi_ij = P_ij / c_j. Under
    // a strong penalty that is nearly all of M: here it is left out from the beginning, and the rest
    // of it is left in col_spent.
    void start(const optical_gradient& out, int64_t first_a, int64_t first_b, T grad_value, T taken) {
        const T *grad_f = out.grad_f ? (const T*)out.grad_f + first_a : nullptr;
        const T *grad_g = out.grad_g ? (const T*)out.grad_g + first_b : nullptr;
        const T scale = s.inverse_epsilon, eps = s.target;
        T *const p_row = from_f, *const mean = from_g, *const of_column = to_g;
        const auto slopes_of_rows = [&](double origin) {
            s.own_rows([&](int64_t i) {
                S::store(p_row + i, dual_slope(s.f, s.miss_a, s.mass_a, s.log_a, i, s.rho_a, origin));
            });
            sync(s.team);
        };
        // What the rows have in common belongs to the columns, in double precision until then.
        slopes_of_rows(0);
        double common = 0, mass_of_rows = 0;
        for (int64_t i = 0; i < s.n; ++i) {
            common += (double)s.miss_a[i] * (double)p_row[i];
            mass_of_rows += (double)s.miss_a[i];
        }
        common /= mass_of_rows;
        // One line without a number must not take it from the others.
        if (!(__builtin_fabs(common) < (double)(1 / Bounds<T>::some))) common = 0;
        sync(s.team);
        slopes_of_rows(common);
        s.own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            T* sums = s.part + chunk * s.col_count;
            fill(sums, s.col_count, 0);
            for (int64_t b = from; b < to; ++b) {
                const T *kernel = s.kernel_tile(b), *cost = s.cost_tile(b, s.panels + (b + 1) % 2 * block * s.col_count);
                const T *const share = s.au + b * block, *const p_of_row = p_row + b * block;
                for (int64_t j = 0; j < s.col_count; j += width) {
                    const Vector weight = S::load(s.bv + j);
                    Vector column = S::load(sums + j);
                    for (int r = 0; r < block; ++r, kernel += width, cost += width)
                        column += (S::load(kernel) * share[r]) * weight *
                                  (grad_value * p_of_row[r] + linear * Solve::price(cost));
                    S::store(sums + j, column);
                }
            }
        });
        sync(s.team);
        s.own_columns([&](int64_t j) {
            Vector sum = S::load(s.part + j);
            for (int64_t c = 1; c < s.chunks; ++c) sum += S::load(s.part + c * s.col_count + j);
            const Vector mass = S::load(s.col_mass + j);
            Vector deviation = S::select(mass > Bounds<T>::some, sum / mass, S::all(0));
            deviation = S::select(S::absolute(deviation) < C::infinity, deviation, S::all(0));
            const Vector q =
                grad_value * dual_slope(s.g, s.col_mass, s.mass_b, s.log_b, j, s.rho_b, -common);
            S::store(mean + j, q + deviation);
            S::store(of_column + j, (1 - taken) * q - taken * deviation);
        });
        sync(s.team);
        // P M goes into G and into both sums from one number, since the sweep takes much of it off
        // again: numbers that were rounded apart would leave their roundings there.
        s.own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            T* sums = s.part + chunk * s.col_count;
            fill(sums, s.col_count, 0);
            for (int64_t b = from; b < to; ++b) {
                const T *kernel = s.kernel_tile(b), *cost = s.cost_tile(b, s.panels + (b + 1) % 2 * block * s.col_count);
                const T *const share = s.au + b * block, *const p_of_row = p_row + b * block;
                T* tile = s.tile(tiles, b);
                Vector line[block];
                for (int r = 0; r < block; ++r) line[r] = S::all(0);
                for (int64_t j = 0; j < s.col_count; j += width) {
                    const Vector weight = S::load(s.bv + j), shift = S::load(of_column + j);
                    Vector column = S::load(sums + j);
                    for (int r = 0; r < block; ++r, kernel += width, cost += width, tile += width) {
                        const Vector plan = (S::load(kernel) * share[r]) * weight;
                        const Vector moved = plan * ((grad_value * p_of_row[r] + shift) +
                                                     linear * Solve::price(cost));
                        line[r] += moved, column += moved;
                        S::store(tile, up * plan - scale * moved);
                    }
                    S::store(sums + j, column);
                }
                for (int q = 0; q < Solve::groups; ++q)
                    S::store(to_f + b * block + q * width,
                             S::template across<typename S::Sum>(line + q * width));
            }
        });
        sync(s.team);
        s.own_rows([&](int64_t i) {
            const Vector mass = S::load(s.miss_a + i), moved = S::load(to_f + i);
            S::store(bar_f + i, moved * scale + given(grad_f, s.row_index, i, s.n));
            Vector direct = eps * (S::load(s.mass_a + i) * (T)s.total_b - mass);
            if (s.rho_a < C::infinity) direct += s.rho_a * (S::load(s.mass_a + i) - mass);
            S::store(bar_a + i, moved + grad_value * direct);
        });
        s.own_columns([&](int64_t j) {
            Vector moved = S::load(s.part + j);
            for (int64_t c = 1; c < s.chunks; ++c) moved += S::load(s.part + c * s.col_count + j);
            const Vector mass = S::load(s.col_mass + j), all = mass * S::load(mean + j);
            const Vector left = moved - (1 - taken) * all;  // rounding, and of columns without mass
            S::store(bar_g + j, left * scale + given(grad_g, s.col_index, j, s.m));
            S::store(s.col_spent + j, all * scale);
            Vector direct = eps * (S::load(s.mass_b + j) * (T)s.total_a - mass);
            if (s.rho_b < C::infinity) direct += s.rho_b * (S::load(s.mass_b + j) - mass);
            S::store(bar_b + j, (all + left) + grad_value * direct);
        });
    }

    // The potential and what a penalty adds to it, less a number.
    static Vector dual_slope(const T* potential, const T* found, const T* mass, const T* log_mass,
                             int64_t i, T rho, double origin) {
        Vector slope;
        for (int lane = 0; lane < width; ++lane, ++i) {
            double all = (double)potential[i] - origin;
            if (rho < C::infinity && found[i] > 0)
                all += (double)rho * Results<T>::log_ratio(found[i], mass[i], log_mass[i]);
            slope[lane] = (T)all;
        }
        return slope;
    }

    static Vector given(const T* gradient, const int64_t* index, int64_t at, int64_t count) {
        Vector values = S::all(0);
        for (int lane = 0; gradient && lane < width && at + lane < count; ++lane)
            values[lane] = gradient[index[at + lane]];
        return values;
    }

    // Runs one iteration again on the present base, from g to f: leaves the scales with which the
    // rows of sigma and the columns of pi sum to 1 whatever was rounded, and a u and b v. False: a
    // number on the way was not harmless, or is not when it is multiplied with what is swept.
    bool replay(const T* f, const T* g) {
        // What is swept has less room than a scale: one product holds two scales and it.
        constexpr T dear = Bounds<T>::trusted / Bounds<T>::drift;
        typename Solve::Range range;
        T *const of_row = from_f, *const of_column = from_g;
        const bool moved = s.relaxed;
        s.own_columns([&](int64_t j) {
            const Vector scale = S::exp((S::load(g + j) - S::load(s.base_g + j)) * s.inverse_epsilon);
            const Vector weight = S::load(s.weight_b + j);
            // A mass too small for a number counts for nothing, unless its scale is large.
            range.add(S::select(weight > 0, scale, S::max(scale, S::all(1))));
            range.add(S::max(S::absolute(S::load(bar_g + j)), S::all(1)) * dear);
            S::store(s.bv + j, S::select(weight > 0, weight * scale, S::all(0)));
        });
        sync(s.team);
        s.sweep(
            s.bv, s.au,
            [&](auto lanes, int64_t i, auto sum) {
                typedef decltype(lanes) L;
                const auto total = sum + L::load(s.pad_a + i), weight = L::load(s.weight_a + i);
                auto scale = T(1) / total;
                range.template add_lanes<L>(total);
                range.template add_lanes<L>(
                    L::max(L::absolute(L::load(bar_f + i)), L::all(1)) * dear);
                L::store(of_row + i, scale);
                if (moved) {
                    scale = L::exp((L::load(f + i) - L::load(s.base_f + i)) * s.inverse_epsilon);
                    range.template add_lanes<L>(
                        L::select(weight > 0, scale, L::max(scale, L::all(1))));
                }
                return L::select(weight > 0, weight * scale, L::all(0));
            },
            [&](int64_t j, Vector sum) {
                const Vector total = sum + S::load(s.pad_b + j);
                range.add(total);
                S::store(of_column + j, T(1) / total);
            });
        return s.agreed(range).within(Bounds<T>::trusted);
    }

    void rebase_at(const T* f, const T* g) {
        sync(s.team);
        s.own_rows([&](int64_t i) { S::store(s.f + i, S::load(f + i)); });
        s.own_columns([&](int64_t j) { S::store(s.g + j, S::load(g + j)); });
        sync(s.team);
        s.rebase(false);
        sync(s.team);
    }

    // Makes pi of the half step that found g from f, or sigma of the one that found f from old_g,
    // out of what was given to it and the minimum that it found, of which it kept a share. With the
    // masses inside, no entry exceeds 1, however small they are. Weights are 1.
    void replay_half(const T* old_f, const T* f, const T* old_g, const T* g, bool of_columns) {
        T *const of_row = from_f, *const of_column = from_g;
        sync(s.team);
        s.own_rows([&](int64_t i) {
            const Vector found = (S::load(f + i) - s.alpha * S::load(old_f + i)) / s.share_a;
            S::store(s.base_f + i, of_columns ? S::load(f + i) : found);
        });
        s.own_columns([&](int64_t j) {
            const Vector found = (S::load(g + j) - s.alpha * S::load(old_g + j)) / s.share_b;
            S::store(s.base_g + j, of_columns ? found : S::load(old_g + j));
            S::store(s.bv + j, S::all(1));
        });
        sync(s.team);
        s.holding = of_columns ? Solve::Holding::columns : Solve::Holding::rows;
        s.build_kernel();
        sync(s.team);
        s.sweep(
            s.bv, s.au,
            [&](auto lanes, int64_t i, auto sum) {
                typedef decltype(lanes) L;
                L::store(of_row + i, T(1) / (sum + L::load(s.pad_a + i)));
                return L::all(1);
            },
            [&](int64_t j, Vector sum) {
                S::store(of_column + j, T(1) / (sum + S::load(s.pad_b + j)));
            });
        sync(s.team);
    }

    // Undoes the step that was replayed, the half that made g, the half that made f, or both, and
    // appends what the cost receives to the low-rank sum: a u (v Gbar)' and u Fbar (b v)'.
    void reverse(int used, bool of_columns, bool of_rows) {
        const T eps = s.target;
        const int64_t count = s.col_count / width;
        const Vector none = S::all(0);
        s.own_columns([&](int64_t j) {
            const Vector moved = S::load(from_g + j) * (s.share_b * S::load(bar_g + j));
            S::store(to_g + j, of_columns ? moved : none);
            S::store(right + P::packed(used, j / width, rank, count), of_columns ? moved : none);
            S::store(right + P::packed(used + 1, j / width, rank, count),
                     of_rows ? S::load(s.bv + j) : none);
        });
        sync(s.team);
        s.sweep(
            to_g, to_f,
            [&](auto lanes, int64_t i, auto sum) {
                typedef decltype(lanes) L;
                const auto nothing = L::all(0);
                const auto share = of_columns ? L::load(s.au + i) : nothing;
                const auto received = of_columns ? share * sum : nothing;
                const auto bar = L::load(bar_f + i) - received;
                const auto moved = of_rows ? L::load(from_f + i) * (s.share_a * bar) : nothing;
                L::store(bar_a + i, L::load(bar_a + i) - eps * received);
                L::store(bar_f + i, of_rows ? s.alpha * bar : bar);
                for (int lane = 0; lane < L::width; ++lane) {
                    left[(i + lane) * rank + used] = share[lane];
                    left[(i + lane) * rank + used + 1] = moved[lane];
                }
                return moved;
            },
            [&](int64_t j, Vector sum) {
                const Vector received = of_rows ? S::load(s.bv + j) * sum : none;
                const Vector bar = S::load(bar_g + j);
                S::store(bar_b + j, S::load(bar_b + j) - eps * received);
                S::store(bar_g + j, (of_columns ? s.alpha * bar : bar) - received);
            });
        sync(s.team);
    }

    // Adds K times the low-rank sum to G.
    void flush(int used) {
        if (used == 0) return;
        const int64_t count = s.col_count / width;
        s.own_rows([&](int64_t i) {
            for (int lane = 0; lane < width; ++lane)
                fill(left + (i + lane) * rank + used, rank - used, 0);
        });
        s.own_columns([&](int64_t j) {
            for (int k = used; k < rank; ++k)
                S::store(right + P::packed(k, j / width, rank, count), S::all(0));
        });
        sync(s.team);
        s.own_chunks([&](int64_t, int64_t from, int64_t to) {
            for (int64_t b = from; b < to; ++b) {
                const T* kernel = s.kernel_tile(b);
                T* tile = s.tile(tiles, b);
                P::multiply(block / P::rows, Rows<T>{left + b * block * rank, rank}, right, rank,
                            count,
                            [&](int64_t group, int r, int64_t v, Vector sum, bool)
                                __attribute__((always_inline)) {
                                    const int64_t at = (v * block + group * P::rows + r) * width;
                                    S::store(tile + at,
                                             S::load(tile + at) + S::load(kernel + at) * sum);
                                });
            }
        });
        sync(s.team);
    }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
