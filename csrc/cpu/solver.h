// The solver of one problem: reads it, iterates until it converges, and leaves f, g and the plan.
//
// Iterations run by scaling on the base of scaling_kernel.h. The base is rebuilt when u or v has
// drifted past Bounds::drift, and when a sum leaves Bounds::trusted, where underflow could show; in
// the second case the iteration is repeated. If a sum leaves `trusted` right after a rebuild, the
// masses are extreme (say 1e-20) or the potentials far from the transforms of the base, and the
// iteration is done in the log domain.
#pragma once

#include "anderson.h"
#include "iteration.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

template <typename T>
struct Solver {
    typedef Simd<T> S;
    typedef typename S::Vector Vector;
    typedef Number<T> C;
    typedef BitRange<T> Range;
    typedef typename Iteration<T>::Step Step;
    typedef typename Iteration<T>::Measure Measure;
    typedef typename ScalingKernel<T>::Content Content;
    static constexpr int width = Tiling<T>::width, block = Tiling<T>::block;
    static constexpr int max_failures = 4;  // of scaling, before only the log domain is used

    Problem<T> problem;
    Cost<T> cost{problem};
    Workspace<T> work{problem};
    ScalingKernel<T> kernel{problem, cost, work};
    Iteration<T> iteration{problem, cost, work, kernel};
    bool moved = false;  // f and g have lost digits of u and v: see Iteration::round_potentials

    struct Options {
        int32_t max_iter;
        double tol;
        T omega;
        int anderson;
        double anneal_start, anneal_ratio;
    };

    explicit Solver(const Team& team) { problem.team = team; }
    Solver(const Solver&) = delete;

    // Takes memory from both arenas; the same call with arenas at address 0 measures it. `swapped`
    // exchanges rows and columns, `keep` allows to store tiles, `keep_history` all potentials.
    void lay_out(Arena& shared, Arena& own, const optical_problem& batch, bool swapped, bool keep,
                 bool keep_history) {
        const int64_t max_n = swapped ? batch.m : batch.n, max_m = swapped ? batch.n : batch.m;
        problem.lay_out(shared, max_n, max_m);
        cost.lay_out(shared, batch, max_n, max_m, keep);
        const bool keep_kernel = !batch.low_memory || batch.kind == OPTICAL_GIVEN || cost.stored;
        kernel.lay_out(shared, max_n, max_m, keep && keep_kernel);
        work.lay_out(shared, own, batch, max_n, max_m, keep_history);
    }

    // Reads problem `index`. False: a side is empty or an input is not a number, as `status` says.
    bool read(const optical_problem& batch, int64_t index, bool swapped, int32_t& status) {
        const bool valid = read_but_costs(batch, index, swapped, status);
        if (status == OPTICAL_EMPTY) return false;
        if (work.all_valid(valid & cost.fill_own(work.panel(0)))) return true;
        status = OPTICAL_INFEASIBLE;
        return false;
    }

    // The same, without a look at the costs.
    bool read_but_costs(const optical_problem& batch, int64_t index, bool swapped,
                        int32_t& status) {
        const bool from_matrix = batch.kind == OPTICAL_GIVEN;
        Side a = rows_of(batch, index), b = columns_of(batch, index);
        const T *log_a = (const T*)batch.log_a, *log_b = (const T*)batch.log_b;
        int64_t stride_row = batch.x_stride_row, stride_entry = batch.x_stride_entry;
        const char* matrix = a.vectors;
        problem.rho_a = (T)batch.rho_a, problem.rho_b = (T)batch.rho_b;
        if (swapped) {
            exchange(a, b), exchange(log_a, log_b), exchange(stride_row, stride_entry);
            exchange(problem.rho_a, problem.rho_b);
        }
        log_a += a.first, log_b += b.first;
        bool finite = true;
        if (problem.team.rank == 0) {
            const bool any = problem.find_valid(log_a, a.count, log_b, b.count);
            if (any && !from_matrix) finite = cost.read_vectors(a, b);
        }
        finite = problem.agree_on_sizes(finite);
        status = OPTICAL_EMPTY;
        if (problem.n == 0 || problem.m == 0) return false;
        if (from_matrix) cost.use_matrix(matrix, stride_row, stride_entry);
        else cost.set_kind();

        const T epsilon = ((const T*)batch.epsilon)[index];
        problem.epsilon = epsilon;
        kernel.set_temperature(epsilon);
        bool valid = finite & (epsilon > 0) & (epsilon < C::infinity) &
                     (kernel.inverse_epsilon < C::infinity);
        valid &= problem.read_masses(log_a, log_b);
        if (batch.init_f) {
            const T *f = (const T*)batch.init_f, *g = (const T*)batch.init_g;
            if (swapped) exchange(f, g);
            valid &= problem.finite_at(f + a.first, problem.row_index, problem.n);
            valid &= problem.finite_at(g + b.first, problem.col_index, problem.m);
        }
        status = valid ? OPTICAL_MAX_ITER : OPTICAL_INFEASIBLE;
        return valid;
    }

    // Sets f and g to the initial potentials of the problem, zero by default.
    void start(const optical_problem& batch, const Side& a, const Side& b) {
        work.set_potentials(batch.init_f ? (const T*)batch.init_f + a.first : nullptr,
                            batch.init_g ? (const T*)batch.init_g + b.first : nullptr);
    }

    // Iterates from f and g. Returns the number of iterations.
    int32_t solve(const Options& options) {
        const T target = problem.epsilon;
        work.relaxed = options.omega != 1 || problem.penalty_a() || problem.penalty_b() ||
                       options.anderson > 0;
        Anderson<T> anderson(problem, work, options.anderson);
        scaled = current = false, first = true, failures = 0;
        over_relaxed = options.omega != 1 && !anderson.active() && options.tol > 0;
        column_error = 0;
        bool at_target = false;  // the last iteration was at the temperature of the problem
        double annealed = options.anneal_start;
        int32_t done = 0;
        record(0);
        while (done < options.max_iter) {
            const T temperature = annealed > (double)target ? (T)annealed : target;
            if (temperature != kernel.epsilon) {
                leave_scaling();
                current = false;
                kernel.set_temperature(temperature);
            }
            const bool plain = done == 0 || temperature != target;
            iteration.set_step(plain ? (T)1 : options.omega);
            const bool test = options.tol > 0 && done > 0 && at_target && temperature == target;
            const bool measure_input = test && !anderson.active();
            const double tol = measure_input ? options.tol : -1;
            work.ask(done);
            const Taken taken = iterate(anderson.active(), measure_input, tol);
            if (work.stopped(done)) {
                current = false;
                break;
            }
            if (measure_input && taken.step.rows_trusted && taken.step.error <= tol) {
                current = false;  // the input has converged: the iteration is dropped
                break;
            }
            accept(taken);
            record(++done);
            if (anderson.active()) {
                const double error = taken.step.error;
                const bool met = options.tol > 0 && !plain && error <= options.tol;
                if (anderson.next(plain, error, kernel.epsilon) && !met && done < options.max_iter)
                    enter_extrapolated();
                if (met) break;
            }
            at_target = temperature == target;
            annealed *= options.anneal_ratio;
        }
        if (anderson.active() && done > 0) {
            problem.own_columns(
                [&](int64_t j) { S::store(work.g + j, S::load(anderson.image + j)); });
            sync(problem.team);
            current = false;
        }
        finish();
        return done;
    }

private:
    bool scaled;   // the state is u and v; otherwise it is f and g
    bool current;  // base, a u and b v belong to the state
    bool first;    // no base was built yet
    int failures;  // of scaling right after a rebuild
    // Whether the stopping rule needs the errors of over-relaxed columns, and that of the state.
    bool over_relaxed;
    double column_error;

    struct Taken {
        Step step;
        bool log_domain, fresh;  // fresh: on a base built for this iteration
    };

    void leave_scaling() {
        if (scaled) iteration.absorb();
        scaled = false;
    }

    // One iteration, on a base that can be trusted or in the log domain. A result whose input meets
    // `tol` needs trusted rows only, because it will be dropped.
    Taken iterate(bool accelerated, bool test, double tol) {
        for (;;) {
            const bool fresh = !current;
            if (fresh) {
                leave_scaling();
                if (failures < max_failures || first) kernel.rebase(first);
                current = true, first = false;
            }
            if (failures < max_failures) {
                Step step = iterate_scaling(accelerated, test);
                if (over_relaxed) step.error += column_error;
                const bool dropped = test && step.rows_trusted && step.error <= tol;
                if (step.trusted || dropped) return {step, false, fresh};
                current = false;  // a u and b v belong to no state
                if (!fresh) continue;
                ++failures;
            }
            Step step = iteration.iterate_log_domain(accelerated    ? Measure::columns
                                                     : over_relaxed ? Measure::relaxed
                                                                    : Measure::rows);
            if (over_relaxed) step.error += column_error;
            return {step, true, fresh};
        }
    }

    Step iterate_scaling(bool accelerated, bool test) {
        if (accelerated) return iteration.template iterate<Measure::columns, true>();
        if (over_relaxed) return iteration.template iterate<Measure::relaxed, true>();
        if (work.relaxed && test) return iteration.template iterate<Measure::rows, true>();
        if (work.relaxed) return iteration.template iterate<Measure::nothing, true>();
        if (test) return iteration.template iterate<Measure::rows, false>();
        return iteration.template iterate<Measure::nothing, false>();
    }

    // Makes the result of an iteration the state.
    void accept(const Taken& taken) {
        if (over_relaxed) column_error = iteration.result_error;
        if (work.relaxed || taken.log_domain) {
            exchange(work.f, work.f_next);
            exchange(work.g, work.g_next);
            scaled = false;
        } else {
            exchange(work.u, work.u_next);
            exchange(work.v, work.v_next);
            scaled = true;
        }
        // A relaxed state that drifts even on a fresh base gains nothing from another rebuild.
        current = !taken.log_domain && (taken.step.calm || (taken.fresh && work.relaxed));
    }

    // After an extrapolation of g: v and b v, and a rebuild if v has drifted.
    void enter_extrapolated() {
        Range range;
        problem.own_columns([&](int64_t j) {
            kernel.scale_columns(j);
            range.add(S::load(work.v + j));
        });
        if (!work.merged(range).within(Bounds<T>::drift)) current = false;
    }

    // Leaves f and g at the temperature of the problem, and K with its a u and b v; or, if these
    // are not current, the plan in the place of K with weights 1.
    void finish() {
        moved = scaled && iteration.round_potentials();
        const bool at_target = kernel.epsilon == problem.epsilon;
        if (at_target && (scaled || current)) return;
        if (first) kernel.rebase(true);  // finds the unmatched entries
        kernel.set_temperature(problem.epsilon);
        kernel.content = Content::plan;
        problem.own_rows([&](int64_t i) { S::store(work.au + i, S::all(1)); });
        problem.own_columns([&](int64_t j) { S::store(work.bv + j, S::all(1)); });
        sync(problem.team);
        kernel.build();
        sync(problem.team);
    }

    // Keeps the potentials after iteration `done` for the reverse sweep.
    void record(int32_t done) {
        if (!work.history) return;
        T* to = work.history + (int64_t)done * (problem.row_count + problem.col_count);
        problem.own_rows([&](int64_t i) {
            S::store(to + i, scaled ? iteration.row_potential(i) : S::load(work.f + i));
        });
        to += problem.row_count;
        problem.own_columns([&](int64_t j) {
            S::store(to + j, scaled ? iteration.column_potential(j) : S::load(work.g + j));
        });
    }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
