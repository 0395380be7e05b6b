// One iteration, by scaling or in the log domain; solver.h says why and when.
#pragma once

#include "state.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

template <typename T>
struct Iteration : State<T> {
    typedef State<T> Base;
    typedef Simd<T> S;
    typedef typename S::Vector Vector;
    typedef typename S::Mask Mask;
    typedef Number<T> C;
    typedef typename Base::Range Range;
    typedef typename Base::Report Report;
    typedef typename Base::Holding Holding;
    static constexpr int width = S::width, block = Base::block, groups = Base::groups;
    static constexpr int64_t woven_bytes = 512;  // of a row: measured, half as wide gains nothing
    using Base::col_count, Base::m, Base::n, Base::row_count, Base::team, Base::epsilon,
        Base::inverse_epsilon, Base::dead_mass, Base::dead_rows, Base::dead_columns, Base::rho_a,
        Base::rho_b, Base::alpha, Base::share_a, Base::share_b, Base::relaxed, Base::holding,
        Base::parity, Base::panels, Base::mass_a, Base::log_a, Base::pad_a, Base::weight_a,
        Base::base_f, Base::f, Base::f_next, Base::u, Base::u_next, Base::au, Base::miss_a,
        Base::mass_b, Base::log_b, Base::pad_b, Base::weight_b, Base::base_g, Base::g,
        Base::g_next, Base::v, Base::v_next, Base::bv, Base::miss_b, Base::part, Base::reports,
        Base::chunks, Base::build_kernel, Base::cost_tile, Base::kernel_tile,
        Base::own_chunks, Base::own_columns, Base::own_rows, Base::sum_of, Base::tile;

    // ------------------------------------------------------------------------------- the base

    // Chooses the base potentials for the current g and rebuilds K, v and b v from them, and a u
    // too, from which the stopping rule has the row sums.
    void rebase(bool first) {
        holding = Holding::kernel;
        own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            T* nearest = part + chunk * col_count;
            for (int64_t j = 0; j < col_count; j += width) S::store(nearest + j, S::all(C::infinity));
            for (int64_t b = from; b < to; ++b) {
                const T* tiles = cost_tile(b, panels);
                Vector least[block];
                for (int r = 0; r < block; ++r) least[r] = S::all(C::infinity);
                const T* c = tiles;
                for (int64_t j = 0; j < col_count; j += width, c += block * width) {
                    const Vector gj = S::load(g + j);
                    for (int r = 0; r < block; ++r)
                        least[r] = S::min(least[r], S::load(c + r * width) - gj);
                }
                for (int q = 0; q < groups; ++q) {
                    const int64_t i = b * block + q * width;
                    const Vector base = S::template across<typename S::Minimum>(least + q * width);
                    if (first) mark_dead(base, mass_a + i, pad_a + i, weight_a + i);
                    S::store(base_f + i, S::select(S::load(pad_a + i) > 0, S::all(0), base));
                }
                c = tiles;
                for (int64_t j = 0; j < col_count; j += width, c += block * width) {
                    Vector best = S::load(nearest + j);
                    for (int r = 0; r < block; ++r)
                        best = S::min(best, S::load(c + r * width) - base_f[b * block + r]);
                    S::store(nearest + j, best);
                }
            }
        });
        sync(team);
        own_columns([&](int64_t j) {
            Vector base = S::load(part + j);
            for (int64_t c = 1; c < chunks; ++c)
                base = S::min(base, S::load(part + c * col_count + j));
            if (first) mark_dead(base, mass_b + j, pad_b + j, weight_b + j);
            S::store(base_g + j, S::select(S::load(pad_b + j) > 0, S::all(0), base));
            if (first) S::store(g + j, S::select(S::load(pad_b + j) > 0, S::all(0), S::load(g + j)));
            scale_columns(j);
        });
        sync(team);
        build_kernel();
        own_rows([&](int64_t i) {
            if (first) S::store(f + i, S::select(S::load(pad_a + i) > 0, S::all(0), S::load(f + i)));
            scale_rows(i);
        });
        if (first) {
            dead_mass = 0, dead_rows = dead_columns = false;
            for (int64_t i = 0; i < n; ++i) {
                dead_mass += (double)(mass_a[i] - weight_a[i]);
                dead_rows |= pad_a[i] > 0;
            }
            for (int64_t j = 0; j < m; ++j) dead_columns |= pad_b[j] > 0;
        }
    }

    // v and b v from g; a u from f: together with the mass, since apart, with extreme masses, one
    // could be 0 and the other infinite.
    void scale_columns(int64_t j) {
        const Vector scaling = S::exp((S::load(g + j) - S::load(base_g + j)) * inverse_epsilon);
        S::store(v + j, scaling);
        S::store(bv + j, S::load(weight_b + j) * scaling);
    }
    void scale_rows(int64_t i) { S::store(au + i, row_share(i, S::load(f + i), S::load(base_f + i))); }

    // a exp((f - origin) / epsilon) of a vector of rows, 0 for rows without an allowed pair.
    Vector row_share(int64_t i, Vector potential, Vector origin) const {
        const Vector exponent = (potential - origin) * inverse_epsilon + S::load(log_a + i);
        return S::select(S::load(pad_a + i) > 0, S::all(0), S::exp(exponent));
    }

    // A line whose least cost is +inf has no allowed pair.
    static void mark_dead(Vector least, const T* mass, T* pad, T* weight) {
        const Mask dead = least == C::infinity;
        S::store(pad, S::select(dead, S::all(1), S::all(0)));
        S::store(weight, S::select(dead, S::all(0), S::load(mass)));
    }

    // -------------------------------------------------------------------------- reading K once

    // Adds a vector of columns of some rows of K, each row times its weight, to their sum. Two
    // chains: one would mostly wait for its own last addition.
    template <int lines>
    static __attribute__((always_inline)) Vector added(Vector sum, const T* k, const Vector* weight) {
        Vector other = S::all(0);
        for (int r = 0; r < lines; r += 2) {
            sum += S::load(k + r * width) * weight[r];
            other += S::load(k + (r + 1) * width) * weight[r + 1];
        }
        return sum + other;
    }

    // Adds some rows of a tile of K, each row times its weight, to the column sums.
    template <int lines = block>
    static __attribute__((always_inline)) void add_rows(const T* k, const T* weights, int64_t cols,
                                                        T* sums) {
        Vector weight[lines];
        for (int r = 0; r < lines; ++r) weight[r] = S::all(weights[r]);
        for (int64_t j = 0; j < cols; j += width, k += block * width)
            S::store(sums + j, added<lines>(S::load(sums + j), k, weight));
    }

    // The sums of rows i and so on, from a vector of lanes for each, go to `row`, which answers
    // with the weights of these rows in the sums of the columns.
    template <typename Lanes, int lines, typename Row>
    static __attribute__((always_inline)) inline void finish_rows(int64_t i, Vector* line,
                                                                  T* row_weights, const Row& row) {
        for (int r = 0; r < lines; r += Lanes::width)
            Lanes::store(row_weights + i + r,
                         row(Lanes(), i + r,
                             S::template across_into<typename S::Sum, Lanes>(line + r)));
    }

    // Reads each tile twice in quick succession. A tile's column pass follows the next tile's row
    // pass, so that what `row` computes is off the critical path.
    template <typename Row>
    __attribute__((always_inline)) inline void read_in_turn(int64_t from, int64_t to,
                                                            const T* column_weights,
                                                            T* row_weights, T* sums,
                                                            const Row& row) {
        const int64_t cols = col_count;
        const T* last = nullptr;
        for (int64_t b = from; b < to; ++b) {
            const T *const tile = kernel_tile(b), *k = tile;
            Vector line[block];
            for (int r = 0; r < block; ++r) line[r] = S::all(0);
            for (int64_t j = 0; j < cols; j += width, k += block * width) {
                const Vector weight = S::load(column_weights + j);
                for (int r = 0; r < block; ++r) line[r] += S::load(k + r * width) * weight;
            }
            finish_rows<S, block>(b * block, line, row_weights, row);
            if (last) add_rows(last, row_weights + (b - 1) * block, cols, sums);
            last = tile;
        }
        add_rows(last, row_weights + (to - 1) * block, cols, sums);
    }

    // The same, where registers suffice, eight rows at a time, with the column pass of the last
    // ones woven into the row pass of the next: so what comes from the outer cache is waited for
    // while there is work from the inner one, which needs to hold no more than these rows.
    static constexpr int few = 8;
    typedef Simd<T, few * (int)sizeof(T) < OPTICAL_VECTOR_BYTES ? few * (int)sizeof(T)
                                                                : OPTICAL_VECTOR_BYTES> Few;
    template <typename Row>
    __attribute__((always_inline)) inline void read_woven(int64_t from, int64_t to,
                                                          const T* column_weights, T* row_weights,
                                                          T* sums, const Row& row) {
        const int64_t cols = col_count;
        const T *tile = nullptr, *last = nullptr;
        for (int64_t i = from * block; i < to * block; i += few) {
            if (i % block == 0) tile = kernel_tile(i / block);
            const T *const first = tile + i % block * width, *k = first;
            Vector line[few], weight[few];
            for (int r = 0; r < few; ++r) line[r] = S::all(0);
            // The first rows have none before them, and read themselves with weights of zero.
            for (int r = 0; r < few; ++r) weight[r] = S::all(last ? row_weights[i - few + r] : 0);
            const T* before = last ? last : first;
            for (int64_t j = 0; j < cols; j += width, k += block * width, before += block * width) {
                const Vector of_column = S::load(column_weights + j);
                for (int r = 0; r < few; ++r) line[r] += S::load(k + r * width) * of_column;
                S::store(sums + j, added<few>(S::load(sums + j), before, weight));
            }
            finish_rows<Few, few>(i, line, row_weights, row);
            last = first;
        }
        add_rows<few>(last, row_weights + to * block - few, cols, sums);
    }

    // The sums of the rows of K, weighted by `column_weights`, go to `row`, with the vectors to use
    // and the place of the first row; it answers with the weights of these rows in the sums of the
    // columns, which go to `column`. Threads have to meet before the results of `column` are read.
    template <typename Row, typename Column>
    __attribute__((always_inline)) inline void sweep(const T* column_weights, T* row_weights,
                                                     Row row, Column column) {
        // Stores could change members, for all the compiler knows; not these.
        const int64_t cols = col_count, count = chunks;
        T* const parts = part;
        own_chunks([&](int64_t c, int64_t from, int64_t to) __attribute__((always_inline)) {
            T* sums = parts + c * cols;
            for (int64_t j = 0; j < cols; j += width) S::store(sums + j, S::all(0));
            if constexpr (OPTICAL_MANY_REGISTERS)
                if (cols * (int64_t)sizeof(T) >= woven_bytes)
                    return read_woven(from, to, column_weights, row_weights, sums, row);
            read_in_turn(from, to, column_weights, row_weights, sums, row);
        });
        sync(team);
        own_columns([&](int64_t j) __attribute__((always_inline)) {
            Vector sum = S::load(parts + j);
            for (int64_t c = 1; c < count; ++c) sum += S::load(parts + c * cols + j);
            column(j, sum);
        });
    }

    // --------------------------------------------------------------------------- one iteration

    enum class Measure { nothing, rows, columns };
    struct Step {
        bool rows_trusted, trusted, calm;
        double residual;
    };

    // The mass a row or column is asked to carry, given its potential: as one exponential where the
    // factor would be too large for a number, and the mass possibly too small for one.
    template <typename Lanes = S>
    static typename Lanes::Vector asked(const T* log_mass, const T* weight,
                                        typename Lanes::Vector potential, T rho) {
        const typename Lanes::Vector mass = Lanes::load(weight);
        if (!(rho < C::infinity)) return mass;
        const typename Lanes::Vector exponent = potential * (-1 / rho);
        const typename Lanes::Vector apart = mass * Lanes::exp(exponent);
        const typename Lanes::Mask small = exponent < Bounds<T>::exponent;
        if (Lanes::every(small)) return apart;
        return Lanes::select(small, apart, Lanes::exp(Lanes::load(log_mass) + exponent));
    }

    // One iteration by scaling, into u_next and v_next, or f_next and g_next.
    template <Measure measure, bool potentials>
    __attribute__((noinline)) Step iterate() {
        const T *const pad_of_row = pad_a, *const weight_of_row = weight_a, *const old_f = f;
        const T *const pad_of_col = pad_b, *const weight_of_col = weight_b, *const old_g = g;
        const T *const log_of_row = log_a, *const log_of_col = log_b;
        const T *const origin_f = base_f, *const origin_g = base_g;
        T *const new_u = potentials ? f_next : u_next, *const new_v = potentials ? g_next : v_next;
        T *const row_weights = au, *const col_weights = bv;
        T *const row_miss = miss_a + parity * row_count, *const col_miss = miss_b + parity * col_count;
        const T keep = alpha, take_a = share_a, take_b = share_b, scale = inverse_epsilon;
        const T eps = epsilon, strength_a = rho_a, strength_b = rho_b;

        Range rows, all;
        sweep(
            col_weights, row_weights,
            [&](auto lanes, int64_t i, auto sum) __attribute__((always_inline)) {
                typedef decltype(lanes) L;
                const auto total = sum + L::load(pad_of_row + i), mass = L::load(weight_of_row + i);
                rows.template add_lanes<L>(total);
                if constexpr (measure == Measure::rows) {
                    auto wanted = mass;
                    if constexpr (potentials)
                        wanted = asked<L>(log_of_row + i, weight_of_row + i, L::load(old_f + i),
                                          strength_a);
                    L::store(row_miss + i, L::absolute(L::load(row_weights + i) * total - wanted));
                }
                auto scaling = T(1) / total;
                if constexpr (potentials) {
                    const auto origin = L::load(origin_f + i);
                    const auto next =
                        keep * L::load(old_f + i) + take_a * (origin - eps * L::log(total));
                    scaling = L::exp((next - origin) * scale);
                    rows.template add_lanes<L>(scaling);
                    L::store(new_u + i, next);
                } else {
                    L::store(new_u + i, scaling);
                }
                return mass * scaling;
            },
            [&](int64_t j, Vector sum) __attribute__((always_inline)) {
                const Vector total = sum + S::load(pad_of_col + j);
                const Vector mass = S::load(weight_of_col + j);
                all.add(total);
                if constexpr (measure == Measure::columns)
                    S::store(col_miss + j,
                             S::absolute(S::load(col_weights + j) * total -
                                         asked(log_of_col + j, weight_of_col + j,
                                               S::load(old_g + j), strength_b)));
                Vector scaling = T(1) / total;
                if constexpr (potentials) {
                    const Vector origin = S::load(origin_g + j);
                    const Vector next = keep * S::load(old_g + j) + take_b * (origin - eps * S::log(total));
                    scaling = S::exp((next - origin) * scale);
                    all.add(scaling);
                    S::store(new_v + j, next);
                } else {
                    S::store(new_v + j, scaling);
                }
                S::store(col_weights + j, mass * scaling);
            });
        all.add(rows);
        if (team.size > 1) {
            Report* shared = reports + parity * team.size;
            shared[team.rank].rows = rows, shared[team.rank].all = all;
            sync(team);
            for (int t = 0; t < team.size; ++t) rows.add(shared[t].rows), all.add(shared[t].all);
        }
        Step step = {true, true, all.within(Bounds<T>::drift), 0};
        if (!step.calm) {
            step.rows_trusted = rows.within(Bounds<T>::trusted);
            step.trusted = all.within(Bounds<T>::trusted);
        }
        if (measure == Measure::rows)
            step.residual = sum_of(row_miss, n) + (rho_a < C::infinity ? 0 : dead_mass);
        if (measure == Measure::columns) step.residual = sum_of(col_miss, m) + dead_columns_mass();
        parity ^= 1;
        return step;
    }

    double dead_columns_mass() const {
        double missing = 0;
        if (!dead_columns || rho_b < C::infinity) return 0;
        for (int64_t j = 0; j < m; ++j) missing += (double)(mass_b[j] - weight_b[j]);
        return missing;
    }

    // The potentials of the current u and v.
    void absorb() {
        if (relaxed) return;
        own_rows([&](int64_t i) {
            S::store(f + i, S::load(base_f + i) + epsilon * S::log(S::load(u + i)));
        });
        own_columns([&](int64_t j) {
            S::store(g + j, S::load(base_g + j) + epsilon * S::log(S::load(v + j)));
        });
        sync(team);
    }

    // The same iteration in the log domain, from f and g into f_next and g_next.
    double iterate_log_domain(bool measure_columns) {
        T *const row_miss = miss_a + parity * row_count, *const col_miss = miss_b + parity * col_count;
        own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            T* lowest = part + chunk * col_count;
            for (int64_t j = 0; j < col_count; j += width) S::store(lowest + j, S::all(C::infinity));
            for (int64_t b = from; b < to; ++b) {
                const T* c = cost_tile(b, panels);
                Vector line[block], least[block];
                for (int r = 0; r < block; ++r) {
                    least[r] = S::all(C::infinity);
                    for (int64_t j = 0; j < col_count; j += width)
                        least[r] = S::min(least[r], row_exponent(c, r, j));
                }
                T origin[block];
                for (int q = 0; q < groups; ++q) {
                    const int64_t i = b * block + q * width;
                    const Vector x = S::template across<typename S::Minimum>(least + q * width);
                    S::store_unaligned(origin + q * width,
                                       S::select(S::load(pad_a + i) > 0, S::all(0), x));
                }
                for (int r = 0; r < block; ++r) {
                    line[r] = S::all(0);
                    for (int64_t j = 0; j < col_count; j += width)
                        line[r] += S::exp(origin[r] - row_exponent(c, r, j));
                }
                for (int q = 0; q < groups; ++q) {
                    const int64_t i = b * block + q * width;
                    const Vector total =
                        S::template across<typename S::Sum>(line + q * width) + S::load(pad_a + i);
                    const Vector softmin =
                        epsilon * (S::load_unaligned(origin + q * width) - S::log(total));
                    const Vector old = S::load(f + i);
                    S::store(row_miss + i, S::absolute(row_share(i, old, softmin) -
                                                       asked(log_a + i, weight_a + i, old, rho_a)));
                    S::store(f_next + i, alpha * old + share_a * softmin);
                }
                for (int r = 0; r < block; ++r)
                    for (int64_t j = 0; j < col_count; j += width)
                        S::store(lowest + j, S::min(S::load(lowest + j), column_exponent(c, b, r, j)));
            }
        });
        sync(team);
        // The least exponent of every column goes into g_next for a while.
        own_columns([&](int64_t j) {
            Vector least = S::load(part + j);
            for (int64_t c = 1; c < chunks; ++c)
                least = S::min(least, S::load(part + c * col_count + j));
            S::store(g_next + j, S::select(S::load(pad_b + j) > 0, S::all(0), least));
        });
        sync(team);
        own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            T* sums = part + chunk * col_count;
            for (int64_t j = 0; j < col_count; j += width) S::store(sums + j, S::all(0));
            for (int64_t b = from; b < to; ++b) {
                const T* c = cost_tile(b, panels);
                for (int64_t j = 0; j < col_count; j += width) {
                    const Vector origin = S::load(g_next + j);
                    Vector sum = S::load(sums + j);
                    for (int r = 0; r < block; ++r)
                        sum += S::exp(origin - column_exponent(c, b, r, j));
                    S::store(sums + j, sum);
                }
            }
        });
        sync(team);
        own_columns([&](int64_t j) {
            Vector total = S::load(pad_b + j);
            for (int64_t c = 0; c < chunks; ++c) total += S::load(part + c * col_count + j);
            const Vector softmin = epsilon * (S::load(g_next + j) - S::log(total));
            const Vector old = S::load(g + j);
            const Vector exponent = (old - softmin) * inverse_epsilon + S::load(log_b + j);
            const Vector share = S::select(S::load(pad_b + j) > 0, S::all(0), S::exp(exponent));
            S::store(col_miss + j,
                     S::absolute(share - asked(log_b + j, weight_b + j, old, rho_b)));
            S::store(g_next + j, alpha * old + share_b * softmin);
        });
        sync(team);
        const double residual = measure_columns ? sum_of(col_miss, m) + dead_columns_mass()
                                                : sum_of(row_miss, n) + (rho_a < C::infinity ? 0 : dead_mass);
        parity ^= 1;
        return residual;
    }

    __attribute__((always_inline)) inline Vector row_exponent(const T* c, int r, int64_t j) const {
        const Vector cost = S::load(c + j * block + r * width);
        return (cost - S::load(g + j)) * inverse_epsilon - S::load(log_b + j);
    }
    __attribute__((always_inline)) inline Vector column_exponent(const T* c, int64_t b, int r,
                                                                 int64_t j) const {
        const Vector cost = S::load(c + j * block + r * width);
        return (cost - f_next[b * block + r]) * inverse_epsilon - log_a[b * block + r];
    }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
