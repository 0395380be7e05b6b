// The iteration. Each thread of a team has its own Solver, whose arrays are the team's.
//
// The iteration of sinkhorn.h spends an exponential per entry and half-step. The same iterates
// come from scaling: with base potentials F, G and K_ij = exp((F_i + G_j - C_ij) / epsilon),
//
//     u_i = 1 / sum_j K_ij b_j v_j        f_i = F_i + epsilon log u_i
//     v_j = 1 / sum_i K_ij a_i u_i        g_j = G_j + epsilon log v_j
//
// which is one multiply-add per entry and half-step. What makes this as safe as the log domain is
// the choice of the base: given g, take the transforms of zero temperature
//
//     F_i = min_j (C_ij - g_j)      G_j = min_i (C_ij - F_i)      v_j = exp((g_j - G_j) / epsilon)
//
// Then K <= 1, and every row and every column holds an entry that is exactly 1: in row i the
// column where the first minimum is attained, which there also attains G_j = g_j, so v_j = 1. So
// the sums of the next iteration are at least the mass of one entry: nothing overflows, and what
// underflows was invisible. The base is rebuilt when u or v has drifted past `drift`, and also
// when a sum falls outside `trusted`, where underflow could show: then the iteration is repeated.
// If a sum is outside right after a rebuild, the masses themselves are extreme (say 1e-20), or the
// potentials far from these transforms, and the iteration is done in the log domain.
//
// Unbalanced marginals, over-relaxation and Anderson acceleration change vectors only: they need
// the potentials themselves after every half-step, a logarithm and an exponential per line
// ("relaxed" below). Without them the scalings u and v are enough.
//
// Between rebuilds K is read from cache once per full iteration: a block of rows is multiplied
// with b v, its u follows, and the same rows, still in the first cache level, are added into the
// column sums. Rows are cut into chunks of a fixed size, whose column sums are added in order: so
// a team can share a problem, and no bit depends on its size.
#pragma once

#include "iteration.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

template <typename T>
struct Mixer;  // anderson.h

template <typename T>
struct Solver : Iteration<T> {
    typedef Iteration<T> Base;
    typedef Simd<T> S;
    typedef typename S::Vector Vector;
    typedef Number<T> C;
    typedef typename Base::Range Range;
    static constexpr int width = S::width, block = Base::block;
    typedef typename Base::Holding Holding;
    typedef typename Base::Step Step;
    typedef typename Base::Measure Measure;
    using Base::col_count, Base::row_count, Base::team, Base::epsilon, Base::target, Base::rho_a,
        Base::rho_b, Base::relaxed, Base::holding, Base::weight_a, Base::base_f, Base::f,
        Base::f_next, Base::u, Base::u_next, Base::au, Base::weight_b, Base::base_g, Base::g,
        Base::g_next, Base::v, Base::v_next, Base::bv, Base::history, Base::agreed,
        Base::build_kernel, Base::exchange, Base::own_columns, Base::own_rows, Base::set_step,
        Base::set_temperature, Base::absorb, Base::iterate_log_domain,
        Base::rebase, Base::scale_columns;

    struct Options {
        int32_t max_iter;
        double tol;
        T omega;
        int anderson;
        double anneal_start, anneal_ratio;
    };

    // Iterates from f and g; returns the number of iterations, and whether `tol` was reached.
    int32_t solve(const Options& options, bool& converged) {
        relaxed = options.omega != 1 || rho_a < C::infinity || rho_b < C::infinity ||
                  options.anderson > 0;
        Mixer<T> mixer(*this, options.anderson);
        bool scaled = false;    // the state is u and v; otherwise it is f and g
        bool current = false;   // base, a u and b v belong to the state
        bool first = true;
        bool cold = false;      // the last iteration was at the temperature of the problem
        int failures = 0;       // of the scaling: after a few, only the log domain is used
        double heat = options.anneal_start;
        int32_t done = 0;
        converged = false;
        record(0, scaled);
        while (done < options.max_iter) {
            const T temperature = heat > (double)target ? (T)heat : target;
            if (temperature != epsilon) {
                if (scaled) absorb();
                scaled = current = false;
                set_temperature(temperature);
            }
            const bool plain = done == 0 || temperature != target;
            set_step(plain ? (T)1 : options.omega);
            const bool test = options.tol > 0 && done > 0 && cold && temperature == target;
            const bool fresh = !current;
            Step step = {false, false, true, 0};
            if (fresh) {
                if (scaled) absorb();
                scaled = false;
                if (failures < 4 || first) rebase(first);
                current = true, first = false;
            }
            bool log_domain = failures >= 4;
            if (!log_domain) {
                step = mixer.memory > 0 ? this->template iterate<Measure::columns, true>()
                       : relaxed && test ? this->template iterate<Measure::rows, true>()
                       : relaxed         ? this->template iterate<Measure::nothing, true>()
                       : test            ? this->template iterate<Measure::rows, false>()
                                         : this->template iterate<Measure::nothing, false>();
                if (!step.trusted && !(test && mixer.memory == 0 && step.rows_trusted &&
                                       step.residual <= options.tol)) {
                    // Its weights belong to no state.
                    current = false;
                    if (!fresh) continue;
                    ++failures;
                    log_domain = true;
                }
            }
            if (log_domain) {
                step = {true, true, false, iterate_log_domain(mixer.memory > 0)};
            }
            if (test && mixer.memory == 0 && step.rows_trusted && step.residual <= options.tol) {
                converged = true;
                current = false;  // the iteration is not taken
                break;
            }
            if (relaxed || log_domain) {
                exchange(f, f_next);
                exchange(g, g_next);
                scaled = false;
            } else {
                exchange(u, u_next);
                exchange(v, v_next);
                scaled = true;
            }
            // A state that is not calm even on a base of its own gains nothing from another.
            current = !log_domain && (step.calm || (fresh && relaxed));
            ++done;
            record(done, scaled);
            if (mixer.memory > 0) {
                const bool enough = options.tol > 0 && !plain && step.residual <= options.tol;
                if (mixer.next(plain, step.residual) && !enough && done < options.max_iter) {
                    // g is an input of the mixer's choice.
                    Range range;
                    own_columns([&](int64_t j) {
                        scale_columns(j);
                        range.add(S::load(v + j));
                    });
                    if (!agreed(range).within(Bounds<T>::drift)) current = false;
                }
                if (enough) {
                    converged = true;
                    break;
                }
            }
            cold = temperature == target;
            heat *= options.anneal_ratio;
        }
        if (mixer.memory > 0 && done > 0) {
            own_columns([&](int64_t j) { S::store(g + j, S::load(mixer.image + j)); });
            sync(team);
            current = false;
        }
        finish(scaled, current && epsilon == target, first);
        return done;
    }

    // Leaves f and g, and K, a u and b v (or the plan with weights 1) that belong to them.
    void finish(bool scaled, bool current, bool first) {
        if (scaled) {
            // Of the last iteration taken: one that was tried and dropped has left its weights.
            own_rows([&](int64_t i) { S::store(au + i, S::load(weight_a + i) * S::load(u + i)); });
            own_columns([&](int64_t j) { S::store(bv + j, S::load(weight_b + j) * S::load(v + j)); });
            const bool here = epsilon == target;
            absorb();
            if (here) return;
            current = false;
        }
        if (current) return;
        if (first) rebase(true);  // marks the lines without a pair
        set_temperature(target);
        holding = Holding::plan;
        own_rows([&](int64_t i) { S::store(au + i, S::all(1)); });
        own_columns([&](int64_t j) { S::store(bv + j, S::all(1)); });
        sync(team);
        build_kernel();
        sync(team);
    }

    // Keeps the potentials after iteration `done` for the reverse sweep.
    void record(int32_t done, bool scaled) {
        if (!history) return;
        T* to = history + (int64_t)done * (row_count + col_count);
        own_rows([&](int64_t i) {
            S::store(to + i, scaled ? S::load(base_f + i) + epsilon * S::log(S::load(u + i)) : S::load(f + i));
        });
        to += row_count;
        own_columns([&](int64_t j) {
            S::store(to + j, scaled ? S::load(base_g + j) + epsilon * S::log(S::load(v + j)) : S::load(g + j));
        });
    }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
