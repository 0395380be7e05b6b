// Gradients, and products with the plan: what is read off the potentials of a solution.
//
// G = dL/dC of a problem is made tile by tile and multiplied with the vectors at once, or kept for
// both sides where it is small; a large problem is passed a second time with its sides exchanged
// instead. With G, for the cosine and unit vectors,
//
//     dL/dx_i = -(sum_j G_ij y_j - (x_i . sum_j G_ij y_j) x_i) / |x_i|
#pragma once

#include "unroll.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

template <typename T>
struct Gradient : Unrolled<T> {
    typedef Unrolled<T> Base;
    typedef Solver<T> Solve;
    typedef Product<T> P;
    typedef Simd<T> S;
    typedef typename S::Vector Vector;
    typedef Number<T> C;
    static constexpr int width = S::width;
    static constexpr int block = Solve::block;
    using Base::bar_a, Base::bar_b, Base::fill, Base::linear, Base::s, Base::tiles, Base::unroll,
        Base::up;

    // The vectors of both sides as right sides of products, and the products.
    T *x_packed, *y_packed, *x_product, *y_product;

    static bool keeps(const optical_problem& p) {
        if (p.gradient == OPTICAL_UNROLL) return true;
        return p.kind != OPTICAL_GIVEN &&
               round_up(p.n, block) * round_up(p.m, block) <= kept_entries;
    }

    void lay_out(Arena& shared, Arena& own, const optical_problem& p, bool swapped) {
        Base::lay_out(shared, own, p, swapped, keeps(p));
        const int64_t rows = round_up(swapped ? p.m : p.n, block);
        const int64_t cols = round_up(swapped ? p.n : p.m, block);
        const int64_t padded = p.kind == OPTICAL_GIVEN ? 0 : round_up(p.dim, width);
        x_packed = shared.take<T>(rows * padded), x_product = shared.take<T>(rows * padded);
        y_packed = shared.take<T>(cols * padded), y_product = shared.take<T>(cols * padded);
    }

    static void run(const optical_problem& p, const optical_gradient& out, int64_t index,
                    void* shared, void* own, const Team& team) {
        // The vectors of the other side get theirs in a second pass when G is not kept.
        const bool twice = p.kind != OPTICAL_GIVEN && !keeps(p);
        for (int pass = 0; pass < (twice ? 2 : 1); ++pass) {
            Gradient gradient;
            gradient.s.team = team;
            Arena of_team = {(uintptr_t)shared}, of_thread = {(uintptr_t)own};
            gradient.lay_out(of_team, of_thread, p, pass == 1);
            gradient.differentiate(p, out, index, pass == 1, twice);
            sync(team);
        }
    }

    void differentiate(const optical_problem& p, const optical_gradient& out, int64_t index,
                       bool swapped, bool twice) {
        Side a = side_a(p, index), b = side_b(p, index);
        T *x_out = (T*)out.grad_x, *y_out = (T*)out.grad_y;
        T *a_out = (T*)out.grad_log_a + a.first, *b_out = (T*)out.grad_log_b + b.first;
        const T *f = (const T*)out.f + a.first, *g = (const T*)out.g + b.first;
        const bool implicit = p.gradient == OPTICAL_IMPLICIT;
        const T *w = implicit ? (const T*)out.w + a.first : nullptr;
        const T *z = implicit ? (const T*)out.z + b.first : nullptr;
        if (x_out) x_out += p.kind == OPTICAL_GIVEN ? index * p.n * p.m : a.first * p.dim;
        if (y_out) y_out += b.first * p.dim;
        if (swapped) {
            Solve::exchange(a, b), Solve::exchange(x_out, y_out), Solve::exchange(a_out, b_out);
            Solve::exchange(f, g), Solve::exchange(w, z);
        }
        int32_t status;
        const bool valid = s.read(p, index, swapped, status);
        const int64_t width_x = p.kind == OPTICAL_GIVEN ? p.m : p.dim;
        if (s.team.rank == 0) {
            const bool full = valid && s.n == a.full && s.m == b.full;
            if (x_out && !full) fill(x_out, a.full * width_x, 0);
            if (y_out && !full && !twice) fill(y_out, b.full * p.dim, 0);
            fill(a_out, a.full, 0);
            if (!twice) fill(b_out, b.full, 0);
        }
        sync(s.team);
        if (!valid) return;
        if (x_out && p.kind != OPTICAL_GIVEN) pack(s.y, s.m, y_packed);
        if (y_out && p.kind != OPTICAL_GIVEN && !twice) pack(s.x, s.n, x_packed);
        sync(s.team);

        const T grad_value = ((const T*)out.grad_value)[index];
        linear = ((const T*)out.grad_value_linear)[index];
        up = grad_value + linear;
        if (p.gradient == OPTICAL_UNROLL) {
            unroll(p, out, index, a, b, grad_value);
            s.own_rows([&](int64_t i) { scatter(a_out, s.row_index, i, s.n, S::load(bar_a + i)); });
            s.own_columns([&](int64_t j) { scatter(b_out, s.col_index, j, s.m, S::load(bar_b + j)); });
            if (p.kind == OPTICAL_GIVEN && x_out)
                s.own_chunks([&](int64_t, int64_t from, int64_t to) {
                    for (int64_t k = from; k < to; ++k) write(s.tile(tiles, k), k, x_out, p.m);
                });
        } else {
            s.take_potentials(f, g);
            if (s.rho_a < C::infinity || s.rho_b < C::infinity) {
                s.rebase(true);  // finds the lines without a pair
                s.holding = Solve::Holding::plan;
                sync(s.team);
            }
            for_lines(w, z);
            const bool rows_only = twice || !implicit;
            s.own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
                T* sums = s.part + chunk * s.col_count;
                if (!rows_only) fill(sums, s.col_count, 0);
                if (tiles) s.fill(from, to, s.tile(tiles, from));
                for (int64_t k = from; k < to; ++k) {
                    T* tile = tiles ? s.tile(tiles, k) : s.panels;
                    if (!tiles) s.fill(k, k + 1, tile);
                    make(k, tile, implicit, rows_only ? nullptr : sums);
                    if (x_out && p.kind == OPTICAL_GIVEN) write(tile, k, x_out, p.m);
                    if (x_out && twice) multiply_rows(tile, k, k + 1, x_out, p.dim);
                }
            });
            sync(s.team);
            s.own_rows([&](int64_t i) {
                Vector d = mass_gradient(grad_value, s.log_a, s.mass_a, s.pad_a, s.f, i, s.rho_a,
                                         s.total_b);
                if (implicit) d += adjoint_mass(s.miss_a, s.w, i, s.rho_a);
                scatter(a_out, s.row_index, i, s.n, d);
            });
            if (!twice)
                s.own_columns([&](int64_t j) {
                    Vector d = mass_gradient(grad_value, s.log_b, s.mass_b, s.pad_b, s.g, j, s.rho_b,
                                             s.total_a);
                    if (implicit) {
                        Vector sum = S::load(s.part + j);
                        for (int64_t c = 1; c < s.chunks; ++c)
                            sum += S::load(s.part + c * s.col_count + j);
                        S::store(s.col_mass + j, sum);
                        d += adjoint_mass(s.col_mass, s.z, j, s.rho_b);
                    }
                    scatter(b_out, s.col_index, j, s.m, d);
                });
        }
        if (p.kind == OPTICAL_GIVEN || twice) return;
        sync(s.team);
        if (x_out)
            s.own_chunks([&](int64_t, int64_t from, int64_t to) {
                multiply_rows(s.tile(tiles, from), from, to, x_out, p.dim);
            });
        if (y_out)
            s.own_segments(
                [&](int64_t, int64_t from, int64_t to) { multiply_columns(from, to, y_out, p.dim); });
    }

    // The vectors of a side as the right side of a product, vectors shared out to the team.
    void pack(const T* vectors, int64_t lines, T* to) const {
        const int64_t count = s.dim_padded / width;
        for (int64_t i = s.team.rank; i < lines; i += s.team.size)
            for (int64_t v = 0; v < count; ++v)
                S::store(to + P::packed(i, v, lines, count),
                         S::load(vectors + i * s.dim_padded + v * width));
    }

    static void scatter(T* to, const int64_t* index, int64_t at, int64_t count, Vector values) {
        for (int lane = 0; lane < width && at + lane < count; ++lane)
            to[index[at + lane]] = values[lane];
    }

    void for_lines(const T* w, const T* z) {
        s.own_rows([&](int64_t i) {
            for (int lane = 0; lane < width; ++lane)
                s.w[i + lane] = w && i + lane < s.n ? w[s.row_index[i + lane]] : 0;
        });
        s.own_columns([&](int64_t j) {
            for (int lane = 0; lane < width; ++lane)
                s.z[j + lane] = z && j + lane < s.m ? z[s.col_index[j + lane]] : 0;
        });
        sync(s.team);
    }

    // The plan held fixed, or with w and z the fixed point; row sums of the plan go to miss_a and
    // column sums are added to `sums`.
    __attribute__((noinline)) void make(int64_t b, T* to, bool implicit, T* sums) {
        if (implicit) make<true>(b, to, sums);
        else make<false>(b, to, sums);
    }

    template <bool implicit>
    __attribute__((always_inline)) inline void make(int64_t b, T* to, T* sums) {
        static constexpr int together = Solve::together;
        const T scale = s.inverse_epsilon, upstream = up, slope = linear * scale;
        const T *const fs = s.f + b * block, *const gs = s.g, *const zs = s.z;
        const T *const logs = s.log_a + b * block, *const masses = s.mass_a + b * block;
        Vector line[block];
        for (int r = 0; r < block; ++r) line[r] = S::all(0);
        for (int64_t j = 0; j < s.col_count; j += width) {
            const Vector gj = S::load(gs + j), log_bj = S::load(s.log_b + j), zj = S::load(zs + j);
            const Vector mass_bj = S::load(s.mass_b + j);
            Vector column = S::all(0);
            for (int r = 0; r < block; r += together, to += together * width) {
                Vector x[together], mass[together], factor[together];
                for (int i = 0; i < together; ++i) {
                    const Vector cost = S::load(to + i * width);
                    x[i] = (fs[r + i] - cost) + gj;
                    mass[i] = Solve::weigh(x[i], scale, logs[r + i] + log_bj,
                                           masses[r + i] * mass_bj);
                    if constexpr (implicit)
                        factor[i] = upstream + slope * ((s.w[b * block + r + i] + zj) - Solve::price(to + i * width));
                    else
                        factor[i] = S::all(upstream);
                }
                S::template exp<together>(x);
                for (int i = 0; i < together; ++i) {
                    x[i] *= mass[i];
                    if constexpr (implicit) line[r + i] += x[i], column += x[i];
                    S::store(to + i * width, x[i] * factor[i]);
                }
            }
            if (implicit && sums) S::store(sums + j, S::load(sums + j) + column);
        }
        if constexpr (implicit)
            for (int q = 0; q < Solve::groups; ++q)
                S::store(s.miss_a + b * block + q * width,
                         S::template across<typename S::Sum>(line + q * width));
    }

    // The partial derivative of the dual; a line without a pair gives all its mass up. What is left
    // of a mass under a strong penalty is nearly all of it, and the difference must not be.
    Vector mass_gradient(T grad_value, const T* log_mass, const T* mass, const T* pad,
                         const T* potential, int64_t i, T rho, double other) const {
        const Vector own = S::load(mass + i);
        if (!(rho < C::infinity))
            return grad_value * own * (S::load(potential + i) + s.target * (T)(other - 1));
        Vector gradient;
        for (int lane = 0; lane < width; ++lane, ++i) {
            const double held = own[lane], exponent = -(double)potential[i] / (double)rho;
            double given_up = held;
            if (!(pad[i] > 0))
                given_up = exponent < Bounds<T>::exponent
                               ? -held * __builtin_expm1(exponent)
                               : held - __builtin_exp((double)log_mass[i] + exponent);
            const double excess = held * other - (held - given_up);
            gradient[lane] =
                (T)((double)grad_value * ((double)rho * given_up + (double)s.target * excess));
        }
        return gradient;
    }

    Vector adjoint_mass(const T* sums, const T* solution, int64_t i, T rho) const {
        const T relief = rho < C::infinity ? 1 + s.target / rho : (T)1;
        return (linear * relief) * S::load(sums + i) * S::load(solution + i);
    }

    // A tile into the rows of a (n, m) matrix.
    void write(const T* tile, int64_t b, T* to, int64_t columns) const {
        const bool adjacent = s.col_index[s.m - 1] - s.col_index[0] == s.m - 1;
        for (int r = 0; r < block && b * block + r < s.n; ++r) {
            T* line = to + s.row_index[b * block + r] * columns;
            const T* from = tile + r * width;
            for (int64_t j = 0; j < s.m; j += width, from += block * width) {
                const Vector values = S::load(from);
                if (adjacent && j + width <= s.m) S::store_unaligned(line + s.col_index[0] + j, values);
                else scatter(line, s.col_index, j, s.m, values);
            }
        }
    }

    // Rows of tiles that lie one behind the other, and columns of them, as left sides of products.
    struct TileRows {
        const T* tile;
        int64_t size;
        OPTICAL_INLINE_MEMBER const T* operator()(int64_t group, int64_t j) const {
            const int64_t row = group * P::rows;
            return tile + row / block * size + j / width * (block * width) + row % block * width + j % width;
        }
        OPTICAL_INLINE_MEMBER int64_t row(int r) const { return r * width; }
    };
    struct TileColumns {
        const T* tile;
        int64_t size;
        OPTICAL_INLINE_MEMBER const T* operator()(int64_t group, int64_t i) const {
            const int64_t j = group * P::rows;
            return tile + i / block * size + j / width * (block * width) + i % block * width + j % width;
        }
        OPTICAL_INLINE_MEMBER int64_t row(int r) const { return r; }
    };

    template <typename Left>
    void multiply(Left left, int64_t lines, const T* right, int64_t depth, T* to) const {
        const int64_t padded = s.dim_padded;
        P::multiply((lines + P::rows - 1) / P::rows, left, right, depth, padded / width,
                    [&](int64_t group, int r, int64_t v, Vector sum, bool more)
                        __attribute__((always_inline)) {
                            T* const at = to + (group * P::rows + r) * padded + v * width;
                            if (more) sum += S::load(at);
                            S::store(at, sum);
                        });
    }

    __attribute__((noinline)) void multiply_rows(const T* tile, int64_t b, int64_t end, T* out,
                                                 int64_t dim) {
        const int64_t first = b * block, last = end * block < s.n ? end * block : s.n;
        T* const product = x_product + first * s.dim_padded;
        const int64_t size = block * s.col_count;
        multiply(TileRows{tile, size}, last - first, y_packed, s.m, product);
        for (int64_t i = first; i < last; ++i) {
            Vector total = S::all(0);
            const T* from = tile + (i - first) / block * size + i % block * width;
            if (s.kind == OPTICAL_SQEUCLIDEAN)
                for (int64_t j = 0; j < s.col_count; j += width, from += block * width)
                    total += S::load(from);
            finish(product + (i - first) * s.dim_padded, s.x + i * s.dim_padded, s.length_a[i],
                   S::sum(total), out + s.row_index[i] * dim);
        }
    }

    __attribute__((noinline)) void multiply_columns(int64_t first, int64_t end, T* out, int64_t dim) {
        const int64_t last = end < s.m ? end : s.m, size = block * s.col_count;
        const T* column = tiles + first * block;
        T* const product = y_product + first * s.dim_padded;
        multiply(TileColumns{column, size}, last - first, x_packed, s.n, product);
        for (int64_t j = first; j < last; ++j) {
            T total = 0;
            const int64_t at = (j - first) / width * (block * width) + j % width;
            if (s.kind == OPTICAL_SQEUCLIDEAN)
                for (int64_t i = 0; i < s.n; ++i)
                    total += column[i / block * size + i % block * width + at];
            finish(product + (j - first) * s.dim_padded, s.y + j * s.dim_padded, s.length_b[j], total,
                   out + s.col_index[j] * dim);
        }
    }

    // From sum_j G_ij y_j to the gradient of x_i; `total` is sum_j G_ij.
    void finish(T* product, const T* vector, T length, T total, T* out) const {
        const int64_t padded = s.dim_padded;
        if (s.kind == OPTICAL_COSINE) {
            Vector sum = S::all(0);
            for (int64_t k = 0; k < padded; k += width) sum += S::load(product + k) * S::load(vector + k);
            const T along = S::sum(sum), scale = length > 0 ? -1 / length : (T)0;
            for (int64_t k = 0; k < padded; k += width)
                S::store(product + k, scale * (S::load(product + k) - along * S::load(vector + k)));
        } else if (s.kind == OPTICAL_SQEUCLIDEAN) {
            // Both rounded, as one is already: then they cancel where all mass stays in its place.
            for (int64_t k = 0; k < padded; k += width)
                S::store(product + k, T(2) * (S::opaque(total * S::load(vector + k)) -
                                              S::load(product + k)));
        } else {
            for (int64_t k = 0; k < padded; k += width) S::store(product + k, -S::load(product + k));
        }
        memcpy(out, product, (size_t)s.dim * sizeof(T));
    }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
