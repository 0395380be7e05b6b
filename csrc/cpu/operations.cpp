// Forward, backward and plan product of one problem. Compiled once per instruction set, with
// OPTICAL_ISA naming the build and OPTICAL_VECTOR_BYTES giving its vector width.
#include "operations.h"

#include "adjoint.h"
#include "doubly_stochastic.h"
#include "gradient.h"
#include "plan.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

// Writes the valid entries of an array by row or by column; zeros elsewhere, NaN without `values`.
template <typename T>
void write_entries(void* array, const Side& side, const int64_t* index, int64_t count,
                   const T* values) {
    T* to = (T*)array + side.first;
    for (int64_t i = 0; i < side.count; ++i) to[i] = 0;
    for (int64_t i = 0; i < count; ++i) to[index[i]] = values ? values[i] : (T)__builtin_nan("");
}

// Whether the results are numbers: on overflow no status but INFEASIBLE is true.
template <typename T>
bool all_finite(const Solver<T>& solver, T value, T linear, T error) {
    typedef Simd<T> S;
    const Problem<T>& problem = solver.problem;
    typename S::Mask finite = S::all((value - value) + (linear - linear) + (error - error)) == 0;
    const auto add = [&](const T* potential) __attribute__((always_inline)) {
        finite &= S::load(potential) - S::load(potential) == 0;
    };
    for (int64_t i = 0; i < problem.row_count; i += S::width) add(solver.work.f + i);
    for (int64_t j = 0; j < problem.col_count; j += S::width) add(solver.work.g + j);
    return S::every(finite);
}

template <typename T>
void forward(const optical_problem& batch, const optical_solution& out, int64_t index,
             void* shared, void* own, const Team& team) {
    const FlushDenormals mode;
    Solver<T> solver(team);
    Arena of_team = {(uintptr_t)shared}, of_thread = {(uintptr_t)own};
    solver.lay_out(of_team, of_thread, batch, false, true, false);
    const Side a = rows_of(batch, index), b = columns_of(batch, index);
    const bool implicit = batch.gradient == OPTICAL_IMPLICIT;

    int32_t status, iterations = 0;
    const bool valid = solver.read(batch, index, false, status);
    double value = 0, linear = 0, error = 0, residual = 0;
    if (valid) {
        solver.start(batch, a, b);
        iterations = solver.solve({batch.max_iter, batch.tol, (T)batch.omega, batch.anderson,
                                   batch.anneal_start, batch.anneal_ratio});
        Objective<T> objective(solver);
        const Totals totals = objective.sum_up(implicit);
        value = objective.value(totals), linear = totals.linear;
        error = solver.moved ? objective.error_of_potentials() : totals.error;
        const bool converged = batch.tol > 0 && (double)(T)error <= batch.tol;
        status = !objective.feasible() ? OPTICAL_INFEASIBLE
                 : converged           ? OPTICAL_CONVERGED
                                       : OPTICAL_MAX_ITER;
        if (implicit) residual = Adjoint<T>(solver).solve();
    } else if (status == OPTICAL_INFEASIBLE) {
        value = linear = error = __builtin_nan("");
        residual = implicit ? value : 0;
        iterations = batch.max_iter;
    }
    sync(team);
    if (team.rank != 0) return;
    if (valid && !all_finite(solver, (T)value, (T)linear, (T)error)) status = OPTICAL_INFEASIBLE;
    ((T*)out.value)[index] = (T)value;
    ((T*)out.value_linear)[index] = (T)linear;
    if (out.marginal_error) ((T*)out.marginal_error)[index] = (T)error;
    if (out.residual) ((T*)out.residual)[index] = (T)residual;
    if (out.n_iter) out.n_iter[index] = iterations;
    if (out.status) out.status[index] = status;
    const Problem<T>& problem = solver.problem;
    const Workspace<T>& work = solver.work;
    const bool empty = status == OPTICAL_EMPTY;
    const auto write = [&](void* rows, const T* of_rows, void* columns, const T* of_columns) {
        write_entries(rows, a, problem.row_index, empty ? 0 : problem.n,
                      valid ? of_rows : nullptr);
        write_entries(columns, b, problem.col_index, empty ? 0 : problem.m,
                      valid ? of_columns : nullptr);
    };
    write(out.f, work.f, out.g, work.g);
    if (implicit) write(out.w, work.w, out.z, work.z);
}

template <typename T>
void backward(const optical_problem& batch, const optical_gradient& out, int64_t index,
              void* shared, void* own, const Team& team) {
    const FlushDenormals mode;
    Gradient<T>::run(batch, out, index, shared, own, team);
}

// Memory for the vectors v, packed as the right side of a product.
template <typename T>
T* lay_out_vectors(Arena& arena, const optical_problem& batch, bool transpose, int64_t size) {
    const int64_t number = round_up(transpose ? batch.n : batch.m, Tiling<T>::block);
    return arena.take<T>(number * round_up(size, Tiling<T>::width));
}

// Packs the valid vectors of v, (count, size), into `to`.
template <typename T>
void pack_vectors(const T* v, const int64_t* index, int64_t count, int64_t size, T* to) {
    typedef Simd<T> S;
    constexpr int width = S::width;
    const int64_t padded = round_up(size, width);
    for (int64_t j = 0; j < count; ++j) {
        const T* from = v + index[j] * size;
        for (int64_t k = 0; k < padded; k += width) {
            typename S::Vector values = S::all(0);
            for (int lane = 0; lane < width && k + lane < size; ++lane)
                values[lane] = from[k + lane];
            S::store(to + SmallGemm<T>::packed(j, k / width, count, padded / width), values);
        }
    }
}

// out = P v for this thread's rows, with v packed and `out` (n, size).
template <typename T>
void multiply_plan(const Solver<T>& solver, const T* packed, int64_t size, T* out) {
    typedef SmallGemm<T> Gemm;
    typedef typename Simd<T>::Vector Vector;
    constexpr int width = Tiling<T>::width, block = Tiling<T>::block;
    const Problem<T>& problem = solver.problem;
    problem.own_chunks([&](int64_t, int64_t from, int64_t to) {
        for (int64_t b = from; b < to; ++b) {
            const T* tile = solver.kernel.tile(b);
            Gemm::multiply(block / Gemm::rows, TileRows<T>{tile, 0}, packed, problem.m,
                           round_up(size, width) / width,
                           [&](int64_t group, int r, int64_t v, Vector sum, bool more) {
                               const int64_t i = b * block + group * Gemm::rows + r;
                               if (i >= problem.n) return;
                               T* row = out + problem.row_index[i] * size + v * width;
                               for (int lane = 0; lane < width && v * width + lane < size; ++lane)
                                   row[lane] = more ? row[lane] + sum[lane] : sum[lane];
                           });
        }
    });
}

template <typename T>
void apply(const optical_problem& batch, const PlanProduct& product, int64_t index, void* shared,
           void* own, const Team& team) {
    const FlushDenormals mode;
    Solver<T> solver(team);
    const Problem<T>& problem = solver.problem;
    Arena of_team = {(uintptr_t)shared}, of_thread = {(uintptr_t)own};
    const bool transpose = product.transpose != 0;
    solver.lay_out(of_team, of_thread, batch, transpose, false, false);
    const int64_t size = product.width;
    T* const packed = lay_out_vectors<T>(of_team, batch, transpose, size);
    Side a = rows_of(batch, index), b = columns_of(batch, index);
    const T *f = (const T*)product.f + a.first, *g = (const T*)product.g + b.first;
    if (transpose) exchange(a, b), exchange(f, g);
    T* const out = (T*)product.out + a.first * size;

    int32_t status;
    const bool valid = solver.read(batch, index, transpose, status);
    if (team.rank == 0) {
        for (int64_t i = 0; i < a.count * size; ++i) out[i] = 0;
        if (status == OPTICAL_INFEASIBLE)
            for (int64_t i = 0; i < problem.n; ++i)
                for (int64_t k = 0; k < size; ++k)
                    out[problem.row_index[i] * size + k] = (T)__builtin_nan("");
        const T* const v = (const T*)product.v + b.first * size;
        if (valid) pack_vectors(v, problem.col_index, problem.m, size, packed);
    }
    sync(team);
    if (!valid) return;
    solver.work.set_potentials(f, g);
    solver.kernel.content = ScalingKernel<T>::Content::plan;
    multiply_plan(solver, packed, size, out);
}

template <typename T>
void plan(const optical_problem& batch, const PlanOutput& output, int64_t index, void* shared,
          void* own, const Team& team) {
    const FlushDenormals mode;
    Solver<T> solver(team);
    Arena of_team = {(uintptr_t)shared}, of_thread = {(uintptr_t)own};
    solver.lay_out(of_team, of_thread, batch, false, false, false);
    Plan<T>(solver).write(batch, output, index);
}

template <typename T>
Scratch scratch(const optical_problem& batch, Operation operation, int64_t size) {
    const Team alone = {0, 1, nullptr, nullptr};
    Arena shared = {0}, own = {0};
    if (operation == Operation::forward) {
        Solver<T>(alone).lay_out(shared, own, batch, false, true, false);
    } else if (operation == Operation::backward) {
        // A second pass has its sides exchanged, and panels of the other length.
        Gradient<T>(alone).lay_out(shared, own, batch, false);
        Arena shared_again = {0}, own_again = {0};
        Gradient<T>(alone).lay_out(shared_again, own_again, batch, true);
        if (shared_again.next > shared.next) shared = shared_again;
        if (own_again.next > own.next) own = own_again;
    } else if (operation == Operation::plan) {
        Solver<T>(alone).lay_out(shared, own, batch, false, false, false);
    } else {
        Solver<T>(alone).lay_out(shared, own, batch, size < 0, false, false);
        lay_out_vectors<T>(shared, batch, size < 0, size < 0 ? -size : size);
    }
    return {(int64_t)shared.next, (int64_t)own.next};
}

}  // namespace
}  // namespace OPTICAL_ISA

#define OPTICAL_NAME(isa) OPTICAL_JOIN(isa_, isa)
#define OPTICAL_JOIN(left, right) left##right
#define OPTICAL_TEXT(name) OPTICAL_QUOTE(name)
#define OPTICAL_QUOTE(name) #name

extern const InstructionSet OPTICAL_NAME(OPTICAL_ISA) = {
    OPTICAL_TEXT(OPTICAL_ISA),
    {OPTICAL_ISA::scratch<float>, OPTICAL_ISA::forward<float>, OPTICAL_ISA::backward<float>,
     OPTICAL_ISA::apply<float>, OPTICAL_ISA::plan<float>, OPTICAL_ISA::doubly_stochastic<float>},
    {OPTICAL_ISA::scratch<double>, OPTICAL_ISA::forward<double>, OPTICAL_ISA::backward<double>,
     OPTICAL_ISA::apply<double>, OPTICAL_ISA::plan<double>,
     OPTICAL_ISA::doubly_stochastic<double>}};

}  // namespace optical
