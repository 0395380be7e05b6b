// Cost tiles of one problem, gathered from a given matrix or computed from vectors.
//
// From vectors, with base, factor and minimum depending on the kind:
//
//     C_ij = max(base_i + base_j - factor x_i.y_j, minimum)
//
//     cosine        1 - x.y of vectors scaled to length 1, and 1 if one of them is zero
//     sqeuclidean   |x|^2 + |y|^2 - 2 x.y, at least 0, of clouds moved to their common mean;
//                   without the shift, the difference of large squares would cancel
//     dot           -x.y
#pragma once

#include "problem.h"
#include "small_gemm.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

// The cost of a larger problem is not stored; its tiles are recomputed wherever they are needed.
constexpr int64_t stored_entries = (int64_t)1 << 20;

template <typename T>
struct Cost {
    typedef Simd<T> S;
    typedef SmallGemm<T> Gemm;
    typedef typename S::Vector Vector;
    typedef typename S::Mask Mask;
    typedef Number<T> C;
    static constexpr int width = S::width, block = Tiling<T>::block;

    const Problem<T>& problem;
    int32_t kind;
    // A given cost, and whether its valid columns are contiguous.
    const T* given;
    int64_t stride_row, stride_column;
    bool contiguous;
    // Vectors by row and by column, normalised or centred, zero-padded to whole SIMD vectors, and
    // packed copies of both as the left and the right side of their product.
    int64_t dim, dim_padded;
    T *x, *y, *x_left, *y_right, *base_a, *base_b, *length_a, *length_b;
    double* centre;
    T factor, minimum;
    bool stored;  // all tiles are kept in `tiles`
    T* tiles;

    explicit Cost(const Problem<T>& p) : problem(p) {}

    void lay_out(Arena& shared, const optical_problem& batch, int64_t max_n, int64_t max_m,
                 bool keep) {
        const int64_t rows = round_up(max_n, block), cols = round_up(max_m, block);
        kind = batch.kind, dim = batch.dim, dim_padded = round_up(batch.dim, width);
        stored = keep && rows * cols <= stored_entries;
        if (stored) tiles = shared.take<T>(rows * cols);
        if (kind == OPTICAL_GIVEN) return;
        x = shared.take<T>(rows * dim_padded), y = shared.take<T>(cols * dim_padded);
        x_left = shared.take<T>(rows * dim_padded), y_right = shared.take<T>(cols * dim_padded);
        base_a = shared.take<T>(rows), base_b = shared.take<T>(cols);
        length_a = shared.take<T>(rows), length_b = shared.take<T>(cols);
        centre = shared.take<double>(dim_padded);
    }

    void use_matrix(const void* cost, int64_t between_rows, int64_t between_columns) {
        const int64_t* const index = problem.col_index;
        given = (const T*)cost, stride_row = between_rows, stride_column = between_columns;
        contiguous = stride_column == 1 && index[problem.m - 1] - index[0] == problem.m - 1;
    }

    void set_kind() {
        factor = kind == OPTICAL_SQEUCLIDEAN ? 2 : 1;
        minimum = kind == OPTICAL_SQEUCLIDEAN ? 0 : -C::infinity;
    }

    // Reads the vectors of both sides. False: a valid one, or its squared length, is not finite.
    bool read_vectors(const Side& a, const Side& b) {
        set_kind();
        bool finite = read_side(a, problem.row_index, problem.n, problem.row_count, x, base_a,
                                length_a, 0);
        finite &= read_side(b, problem.col_index, problem.m, round_up(problem.m, block), y, base_b,
                            length_b, kind == OPTICAL_COSINE ? 1 : 0);
        if (kind == OPTICAL_SQEUCLIDEAN) finite &= centre_clouds();
        pack();
        return finite;
    }

    // -------------------------------------------------------------------------------- tiles

    T* tile_of(T* matrix, int64_t b) const { return matrix + b * block * problem.col_count; }

    // Tile b, computed into `panel` unless it is stored.
    const T* tile(int64_t b, T* panel) const {
        if (stored) return tile_of(tiles, b);
        fill(b, b + 1, panel);
        return panel;
    }

    // Computes tiles `from` to `end`, one after another. False: a given cost is NaN or -inf, or one
    // of vectors is not finite.
    bool fill(int64_t from, int64_t end, T* to) const {
        if (kind != OPTICAL_GIVEN) return fill_product(from, end, to);
        bool valid = true;
        for (int64_t b = from; b < end; ++b, to += block * problem.col_count)
            valid &= fill_given(b, to);
        return valid;
    }

    // Computes this thread's tiles, and stores them if they are kept. False: as in `fill`.
    bool fill_own(T* panel) const {
        bool valid = true;
        problem.own_chunks([&](int64_t, int64_t from, int64_t to) {
            if (stored) valid &= fill(from, to, tile_of(tiles, from));
            else
                for (int64_t b = from; b < to; ++b) valid &= fill(b, b + 1, panel);
        });
        return valid;
    }

    // The cost in a sum of plan times cost: 0 for a forbidden pair, which transports nothing.
    OPTICAL_INLINE Vector finite(const T* c) {
        const Vector cost = S::load(c);
        return S::select(cost < C::infinity, cost, S::all(0));
    }

private:
    // -------------------------------------------------------------------------- from vectors

    // float16, or bfloat16 with `brain`, to T.
    OPTICAL_INLINE T half(uint16_t bits, bool brain) {
        uint32_t wide = (uint32_t)bits << 16;
        if (!brain) {
            const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, size = bits & 0x7fff;
            if (size < 0x400) {  // zero and subnormal: a multiple of 2^-24
                const float value = (float)size * 0x1p-24f;
                memcpy(&wide, &value, sizeof wide);
                wide |= sign;
            } else {
                wide = sign | (size >= 0x7c00 ? 0x7f800000u | (size & 0x3ff) << 13
                                              : (size << 13) + 0x38000000u);
            }
        }
        float value;
        memcpy(&value, &wide, sizeof value);
        return (T)value;
    }

    template <typename From>
    OPTICAL_INLINE void convert(const char* from, int64_t count, T* to) {
        for (int64_t k = 0; k < count; ++k) {
            From value;
            memcpy(&value, from + k * (int64_t)sizeof value, sizeof value);
            to[k] = (T)value;
        }
    }

    // Reads the vectors of one side and sets their bases: `common`, which sqeuclidean later
    // replaces by the squared length; +inf past the last one. The cosine also normalises each
    // vector; a zero vector stays zero. False: a vector is not finite.
    bool read_side(const Side& side, const int64_t* index, int64_t count, int64_t padded, T* to,
                   T* base, T* length, T common) const {
        bool finite = true;
        const int64_t bytes = side.stride * bytes_of(side.type);
        for (int64_t i = 0; i < padded; ++i, to += dim_padded) {
            base[i] = i < count ? common : C::infinity;
            for (int64_t k = i < count ? dim : 0; k < dim_padded; ++k) to[k] = 0;
            if (i >= count) continue;
            convert_vector(side.vectors + index[i] * bytes, side.type, to);
            const T sum = square(to);
            if (!(sum < Range::high)) finite &= each_finite(to);
            if (kind == OPTICAL_COSINE) length[i] = normalise(to, sum);
        }
        return finite;
    }

    OPTICAL_INLINE_MEMBER void convert_vector(const char* from, int32_t type, T* to) const {
        if (type == OPTICAL_F32) {
            convert<float>(from, dim, to);
        } else if (type == OPTICAL_F64) {
            convert<double>(from, dim, to);
        } else {
            for (int64_t k = 0; k < dim; ++k) {
                uint16_t bits;
                memcpy(&bits, from + 2 * k, sizeof bits);
                to[k] = half(bits, type == OPTICAL_BF16);
            }
        }
    }

    bool each_finite(const T* vector) const {
        bool finite = true;
        for (int64_t k = 0; k < dim; ++k) finite &= vector[k] - vector[k] == 0;
        return finite;
    }

    // Moves both clouds to their common mean, and sets the bases to the squared lengths.
    // False: a squared length overflows.
    bool centre_clouds() {
        const int64_t n = problem.n, m = problem.m;
        for (int64_t k = 0; k < dim_padded; ++k) centre[k] = 0;
        for (int64_t i = 0; i < n; ++i) add_to_centre(x + i * dim_padded);
        for (int64_t j = 0; j < m; ++j) add_to_centre(y + j * dim_padded);
        for (int64_t k = 0; k < dim; ++k) centre[k] /= (double)(n + m);
        bool finite = true;
        for (int64_t i = 0; i < n; ++i) {
            base_a[i] = centred(x + i * dim_padded);
            finite &= base_a[i] < C::infinity;
        }
        for (int64_t j = 0; j < m; ++j) {
            base_b[j] = centred(y + j * dim_padded);
            finite &= base_b[j] < C::infinity;
        }
        return finite;
    }
    void add_to_centre(const T* vector) {
        for (int64_t k = 0; k < dim; ++k) centre[k] += (double)vector[k];
    }
    T centred(T* vector) const {
        for (int64_t k = 0; k < dim; ++k) vector[k] = (T)((double)vector[k] - centre[k]);
        return square(vector);
    }

    // |x|^2.
    T square(const T* vector) const {
        Vector sum[4] = {S::all(0), S::all(0), S::all(0), S::all(0)};
        int64_t k = 0;
        for (; k + 4 * width <= dim_padded; k += 4 * width)
            for (int i = 0; i < 4; ++i) {
                const Vector entry = S::load(vector + k + i * width);
                sum[i] += entry * entry;
            }
        for (; k < dim_padded; k += width) {
            const Vector entry = S::load(vector + k);
            sum[0] += entry * entry;
        }
        return S::sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }

    // Divides a vector by its length and returns the length; `sum` is the sum of its squares.
    T normalise(T* vector, T sum) const {
        T unit = 1;
        // The sum overflowed or underflowed: scale by the largest entry first.
        if (!(sum > Range::low && sum < Range::high)) {
            unit = 0;
            for (int64_t k = 0; k < dim; ++k) {
                const T size = vector[k] < 0 ? -vector[k] : vector[k];
                unit = size > unit ? size : unit;
            }
            if (unit == 0 || !(unit < C::infinity)) return 0;
            for (int64_t k = 0; k < dim; ++k) vector[k] /= unit;
            sum = square(vector);
        }
        const T size = root(sum), inverse = 1 / size;
        for (int64_t k = 0; k < dim_padded; k += width)
            S::store(vector + k, S::quotient(S::load(vector + k), size, inverse));
        return size * unit;
    }
    OPTICAL_INLINE float root(float value) { return __builtin_sqrtf(value); }
    OPTICAL_INLINE double root(double value) { return __builtin_sqrt(value); }
    // Sums of squares that neither overflowed nor lost digits to underflow.
    struct Range {
        static constexpr T low = sizeof(T) == 4 ? (T)1e-30 : (T)1e-280;
        static constexpr T high = sizeof(T) == 4 ? (T)1e37 : (T)1e300;
    };

    // Packs x as the left and y as the right side of their product.
    void pack() {
        const int64_t row_count = problem.row_count;
        for (int64_t i = 0; i < row_count; i += width)
            for (int64_t k = 0; k < dim_padded; k += width) {
                T* const to = x_left + (i / block * dim_padded + k) * block + i % block;
                transpose(x + i * dim_padded + k, [&](int lane, Vector entries) {
                    S::store(to + lane * block, entries);
                });
            }
        const int64_t count = problem.col_count / width;
        for (int64_t v = 0; v < count; ++v)
            for (int64_t k = 0; k < dim_padded; k += width)
                transpose(y + v * width * dim_padded + k, [&](int lane, Vector entries) {
                    if (k + lane < dim)
                        S::store(y_right + Gemm::packed(k + lane, v, dim, count), entries);
                });
    }

    // Transposes `width` vectors of `width` entries; out(entry, values) receives each column.
    template <typename Out>
    OPTICAL_INLINE_MEMBER void transpose(const T* from, Out out) const {
        Vector square[width];
        for (int i = 0; i < width; ++i) square[i] = S::load(from + i * dim_padded);
        S::transpose(square);
        for (int lane = 0; lane < width; ++lane) out(lane, square[lane]);
    }

    __attribute__((noinline)) bool fill_product(int64_t from, int64_t end, T* to) const {
        Mask valid = S::all(0) == S::all(0);
        const Vector scale = S::all(factor), lowest = S::all(minimum);
        const T *const of_row = base_a + from * block, *const of_column = base_b;
        const int64_t col_count = problem.col_count, tile = block * col_count, depth = dim;
        Gemm::multiply((end - from) * (block / Gemm::rows),
                       Blocks<T, block>{x_left + from * block * dim_padded, dim_padded}, y_right,
                       depth, col_count / width,
                       [&, depth](int64_t group, int r, int64_t v, Vector dot, bool more)
                           __attribute__((always_inline)) {
                               const int64_t row = group * Gemm::rows + r;
                               T* const at =
                                   to + row / block * tile + (v * block + row % block) * width;
                               if (more) dot += S::load(at);
                               S::store(at, dot);
                           });
        for (int64_t row = 0; row < (end - from) * block; row += block)
            for (int64_t j = 0; j < col_count; j += width)
                for (int r = 0; r < block; ++r, to += width) {
                    const Vector base = of_row[row + r] + S::load(of_column + j);
                    const Vector cost = base - scale * S::load(to);
                    // The base of padding is +inf; elsewhere an infinite cost has overflowed.
                    valid &= (cost > -C::infinity) &
                             ((cost < C::infinity) | (base == C::infinity));
                    S::store(to, S::select(cost < lowest, lowest, cost));
                }
        return S::every(valid);
    }

    // -------------------------------------------------------------------- from a given matrix

    __attribute__((noinline)) bool fill_given(int64_t b, T* to) const {
        Mask valid = S::all(0) == S::all(0);
        const int64_t n = problem.n, m = problem.m, col_count = problem.col_count;
        const int64_t* const col_index = problem.col_index;
        const int64_t between = stride_column;
        const bool adjacent = contiguous;
        for (int r = 0; r < block; ++r) {
            const int64_t i = b * block + r;
            const T* row = i < n ? given + problem.row_index[i] * stride_row : nullptr;
            T* next = to + r * width;
            for (int64_t j = 0; j < col_count; j += width, next += block * width) {
                Vector cost = S::all(C::infinity);
                if (row && adjacent && j + width <= m) {
                    cost = S::load_unaligned(row + col_index[0] + j);
                } else if (row) {
                    for (int lane = 0; lane < width && j + lane < m; ++lane)
                        cost[lane] = row[col_index[j + lane] * between];
                }
                valid &= cost > -C::infinity;
                S::store(next, cost);
            }
        }
        return S::every(valid);
    }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
