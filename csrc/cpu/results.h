// What a solution is worth: sums over its plan.
#pragma once

#include "solver.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

template <typename T>
struct Results {
    typedef Simd<T> S;
    typedef typename S::Vector Vector;
    typedef Number<T> C;
    static constexpr int width = S::width, block = Solver<T>::block;
    static constexpr int groups = Solver<T>::groups;
    typedef typename Solver<T>::Totals Totals;

    Solver<T>& s;

    // Sums over the plan K_ij (a u)_i (b v)_j, finished in double precision. Leaves the row sums
    // of P C in row_spent and the plan's column sums in col_mass; with `columns` also the column
    // sums of P C in col_spent. row sums of the plan go to miss_a.
    Totals sum_up(bool columns) {
        T* const row_mass = s.miss_a;
        s.own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            Totals t;
            T *sums = s.part + chunk * s.col_count;
            for (int64_t j = 0; j < s.col_count; j += width) S::store(sums + j, S::all(0));
            for (int64_t b = from; b < to; ++b) {
                Vector line[block], spent[block];
                const T *k = s.kernel_tile(b), *c = s.cost_tile(b, s.panels + (b + 1) % 2 * block * s.col_count);
                s.add_rows(k, s.au + b * block, s.col_count, sums);
                for (int r = 0; r < block; ++r) line[r] = spent[r] = S::all(0);
                for (int64_t j = 0; j < s.col_count; j += width) {
                    const Vector weight = S::load(s.bv + j);
                    for (int r = 0; r < block; ++r, c += width, k += width) {
                        const Vector share = S::load(k) * weight;
                        line[r] += share;
                        spent[r] += share * Solver<T>::price(c);
                    }
                }
                for (int q = 0; q < groups; ++q) {
                    const int64_t i = b * block + q * width;
                    const Vector share = S::load(s.au + i);
                    S::store(row_mass + i,
                             share * S::template across<typename S::Sum>(line + q * width));
                    S::store(s.row_spent + i,
                             share * S::template across<typename S::Sum>(spent + q * width));
                }
            }
            for (int64_t i = from * block; i < to * block && i < s.n; ++i) {
                const double row = (double)row_mass[i];
                t.linear += (double)s.row_spent[i];
                t.dual += row * (double)s.f[i];
                t.mass += row;
                add_marginal(t, row, s.mass_a[i], s.log_a[i], s.pad_a[i], s.f[i], s.rho_a);
            }
            s.row_totals[chunk] = t;
        });
        sync(s.team);
        s.own_segments([&](int64_t place, int64_t from, int64_t to) {
            Totals t;
            for (int64_t j = from; j < to; j += width) {
                Vector sum = S::load(s.part + j);
                for (int64_t c = 1; c < s.chunks; ++c) sum += S::load(s.part + c * s.col_count + j);
                S::store(s.col_mass + j, S::load(s.bv + j) * sum);
            }
            for (int64_t j = from; j < to && j < s.m; ++j) {
                t.dual += (double)s.col_mass[j] * (double)s.g[j];
                add_marginal(t, (double)s.col_mass[j], s.mass_b[j], s.log_b[j], s.pad_b[j], s.g[j],
                             s.rho_b);
            }
            s.col_totals[place] = t;
        });
        sync(s.team);
        if (columns) spend_columns();
        Totals all;
        for (int64_t c = 0; c < s.chunks; ++c) accumulate(all, s.row_totals[c]);
        for (int64_t p = 0; p < s.segments; ++p) accumulate(all, s.col_totals[p]);
        return all;
    }

    void spend_columns() {
        s.own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            T* sums = s.part + chunk * s.col_count;
            for (int64_t j = 0; j < s.col_count; j += width) S::store(sums + j, S::all(0));
            for (int64_t b = from; b < to; ++b) {
                const T *k = s.kernel_tile(b), *c = s.cost_tile(b, s.panels + (b + 1) % 2 * block * s.col_count);
                const T* weight = s.au + b * block;
                for (int64_t j = 0; j < s.col_count; j += width) {
                    Vector sum = S::load(sums + j);
                    for (int r = 0; r < block; ++r, c += width, k += width)
                        sum += (S::load(k) * weight[r]) * Solver<T>::price(c);
                    S::store(sums + j, sum);
                }
            }
        });
        sync(s.team);
        s.own_columns([&](int64_t j) {
            Vector sum = S::load(s.part + j);
            for (int64_t c = 1; c < s.chunks; ++c) sum += S::load(s.part + c * s.col_count + j);
            S::store(s.col_spent + j, S::load(s.bv + j) * sum);
        });
        sync(s.team);
    }

    static void accumulate(Totals& to, const Totals& t) {
        to.linear += t.linear, to.dual += t.dual, to.mass += t.mass;
        to.error += t.error, to.divergence += t.divergence;
    }

    // How far a line's mass is from what its potential asks for, and what that costs; of a line
    // without a pair nothing is asked. In double precision no mass of float32 is too small here.
    static void add_marginal(Totals& t, double found, T mass, T log_mass, T pad, T potential, T rho) {
        if (!(rho < C::infinity)) {
            t.error += __builtin_fabs(found - (double)mass);
            return;
        }
        const double exponent = (double)log_mass - (double)potential / (double)rho;
        t.error += __builtin_fabs(found - (pad > 0 ? 0 : __builtin_exp(exponent)));
        const double logs = found > 0 ? found * log_ratio(found, mass, log_mass) : 0;
        t.divergence += (double)rho * (logs - found + (double)mass);
    }

    // log(found / mass), which a large rho magnifies with every error of it. The mass, where it is
    // no subnormal number and the ratio no infinite one: found was made with it, and its rounding
    // cancels.
    static double log_ratio(double found, T mass, T log_mass) {
        const double ratio = found / (double)mass;
        return mass > Bounds<T>::some && ratio < Number<double>::infinity
                   ? __builtin_log(ratio)
                   : __builtin_log(found) - (double)log_mass;
    }

    double value(const Totals& t) const {
        return t.dual + (double)s.target * (s.total_a * s.total_b - t.mass) + t.divergence;
    }

    bool feasible() const {
        const bool fixed_a = !(s.rho_a < C::infinity), fixed_b = !(s.rho_b < C::infinity);
        const double larger = s.total_a > s.total_b ? s.total_a : s.total_b;
        if (fixed_a && fixed_b && __builtin_fabs(s.total_a - s.total_b) > unequal * larger) return false;
        return !(fixed_a && s.dead_rows) && !(fixed_b && s.dead_columns);
    }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
