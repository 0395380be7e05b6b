// The three operations on one problem. Compiled once per instruction set, with OPTICAL_ISA naming
// the build and OPTICAL_VECTOR_BYTES giving its vector width.
#include "kernel.h"

#include "adjoint.h"
#include "gradient.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

template <typename T>
void forward(const optical_problem& p, const optical_solution& out, int64_t index, void* shared,
             void* own, const Team& team) {
    const FlushDenormals mode;
    typedef Solver<T> Solve;
    Solve s;
    s.team = team;
    Arena of_team = {(uintptr_t)shared}, of_thread = {(uintptr_t)own};
    s.lay_out(of_team, of_thread, p, false, true, false);
    const Side a = side_a(p, index), b = side_b(p, index);
    const bool implicit = p.gradient == OPTICAL_IMPLICIT;

    int32_t status, ran = 0;
    const bool valid = s.read(p, index, false, status);
    double value = 0, linear = 0, error = 0, residual = 0;
    if (valid) {
        s.start(p, a, b);
        bool converged;
        ran = s.solve({p.max_iter, p.tol, (T)p.omega, p.anderson, p.anneal_start, p.anneal_ratio},
                      converged);
        Results<T> results{s};
        const typename Solve::Totals totals = results.sum_up(implicit);
        value = results.value(totals), linear = totals.linear, error = totals.error;
        status = !results.feasible() ? OPTICAL_INFEASIBLE
                 : converged   ? OPTICAL_CONVERGED
                               : OPTICAL_MAX_ITER;
        if (implicit) residual = Adjoint<T>{s}.solve();
    } else if (status == OPTICAL_INFEASIBLE) {
        value = linear = error = __builtin_nan("");
        residual = implicit ? value : 0;
        ran = p.max_iter;
    }
    sync(team);
    if (team.rank != 0) return;
    ((T*)out.value)[index] = (T)value;
    ((T*)out.value_linear)[index] = (T)linear;
    ((T*)out.marginal_error)[index] = (T)error;
    ((T*)out.residual)[index] = (T)residual;
    out.n_iter[index] = ran, out.status[index] = status;
    const auto lines = [&](void* array, const Side& side, const int64_t* present, int64_t count,
                           const T* values) {
        T* to = (T*)array + side.first;
        for (int64_t i = 0; i < side.full; ++i) to[i] = 0;
        if (status == OPTICAL_EMPTY) return;
        for (int64_t i = 0; i < count; ++i)
            to[present[i]] = valid ? values[i] : (T)__builtin_nan("");
    };
    lines(out.f, a, s.row_index, s.n, s.f);
    lines(out.g, b, s.col_index, s.m, s.g);
    if (!implicit) return;
    lines(out.w, a, s.row_index, s.n, s.w);
    lines(out.z, b, s.col_index, s.m, s.z);
}

template <typename T>
void backward(const optical_problem& p, const optical_gradient& out, int64_t index, void* shared,
              void* own, const Team& team) {
    const FlushDenormals mode;
    Gradient<T>::run(p, out, index, shared, own, team);
}

// The vectors of v, packed as the right side of a product.
template <typename T>
T* lay_out_vectors(Arena& arena, const optical_problem& p, bool transpose, int64_t size) {
    const int64_t lines = round_up(transpose ? p.n : p.m, Solver<T>::block);
    return arena.take<T>(lines * round_up(size, Simd<T>::width));
}

template <typename T>
void apply(const optical_problem& p, const Apply& call, int64_t index, void* shared, void* own,
           const Team& team) {
    const FlushDenormals mode;
    typedef Solver<T> Solve;
    typedef Product<T> P;
    typedef Simd<T> S;
    constexpr int block = Solve::block, width = S::width;
    Solve s;
    s.team = team;
    Arena of_team = {(uintptr_t)shared}, of_thread = {(uintptr_t)own};
    const bool transpose = call.transpose != 0;
    s.lay_out(of_team, of_thread, p, transpose, false, false);
    const int64_t size = call.width, padded = round_up(size, width);
    T* const vectors = lay_out_vectors<T>(of_team, p, transpose, size);
    Side a = side_a(p, index), b = side_b(p, index);
    const T *f = (const T*)call.f + a.first, *g = (const T*)call.g + b.first;
    if (transpose) Solve::exchange(a, b), Solve::exchange(f, g);
    const T* const v = (const T*)call.v + b.first * size;
    T* const out = (T*)call.out + a.first * size;

    int32_t status;
    const bool valid = s.read(p, index, transpose, status);
    if (team.rank == 0) {
        for (int64_t i = 0; i < a.full * size; ++i) out[i] = 0;
        if (status == OPTICAL_INFEASIBLE)
            for (int64_t i = 0; i < s.n; ++i)
                for (int64_t k = 0; k < size; ++k)
                    out[s.row_index[i] * size + k] = (T)__builtin_nan("");
        for (int64_t j = 0; valid && j < s.m; ++j) {
            const T* line = v + s.col_index[j] * size;
            for (int64_t k = 0; k < padded; k += width) {
                typename S::Vector values = S::all(0);
                for (int lane = 0; lane < width && k + lane < size; ++lane)
                    values[lane] = line[k + lane];
                S::store(vectors + P::packed(j, k / width, s.m, padded / width), values);
            }
        }
    }
    sync(team);
    if (!valid) return;
    s.take_potentials(f, g);
    s.holding = Solve::Holding::plan;
    s.own_chunks([&](int64_t, int64_t from, int64_t to) {
        for (int64_t k = from; k < to; ++k) {
            const T* tile = s.kernel_tile(k);
            P::multiply(block / P::rows, typename Gradient<T>::TileRows{tile, 0}, vectors, s.m,
                        padded / width,
                        [&](int64_t group, int r, int64_t at, typename S::Vector sum, bool more) {
                            const int64_t i = k * block + group * P::rows + r;
                            if (i >= s.n) return;
                            T* line = out + s.row_index[i] * size + at * width;
                            for (int lane = 0; lane < width && at * width + lane < size; ++lane)
                                line[lane] = more ? line[lane] + sum[lane] : sum[lane];
                        });
        }
    });
}

template <typename T>
Scratch scratch(const optical_problem& p, Operation operation, int64_t size) {
    Arena shared = {0}, own = {0};
    if (operation == Operation::forward) {
        Solver<T> sizing;
        sizing.lay_out(shared, own, p, false, true, false);
    } else if (operation == Operation::backward) {
        // A second pass has the sides exchanged, and panels of the other length.
        Gradient<T> sizing;
        sizing.lay_out(shared, own, p, false);
        Arena shared_again = {0}, own_again = {0};
        sizing.lay_out(shared_again, own_again, p, true);
        if (shared_again.next > shared.next) shared = shared_again;
        if (own_again.next > own.next) own = own_again;
    } else {
        Solver<T> sizing;
        sizing.lay_out(shared, own, p, size < 0, false, false);
        lay_out_vectors<T>(shared, p, size < 0, size < 0 ? -size : size);
    }
    return {(int64_t)shared.next, (int64_t)own.next};
}

}  // namespace
}  // namespace OPTICAL_ISA

#define OPTICAL_NAME(isa) OPTICAL_JOIN(kernels_, isa)
#define OPTICAL_JOIN(left, right) left##right
#define OPTICAL_TEXT(name) OPTICAL_QUOTE(name)
#define OPTICAL_QUOTE(name) #name

extern const Kernels OPTICAL_NAME(OPTICAL_ISA) = {
    OPTICAL_TEXT(OPTICAL_ISA),
    {OPTICAL_ISA::scratch<float>, OPTICAL_ISA::forward<float>, OPTICAL_ISA::backward<float>,
     OPTICAL_ISA::apply<float>},
    {OPTICAL_ISA::scratch<double>, OPTICAL_ISA::forward<double>, OPTICAL_ISA::backward<double>,
     OPTICAL_ISA::apply<double>}};

}  // namespace optical
