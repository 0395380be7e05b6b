// The cost of one problem, tile by tile: gathered from a given matrix, or multiplied from vectors.
//
// A tile is `block` rows by all columns, stored as column vector, row of the block, lane: the order
// in which the iteration of solver.h reads it. Only present lines exist here; padding up to whole
// blocks and vectors costs +inf.
//
// From vectors, C_ij = base_i + base_j - factor x_i.y_j (not below `least`), where for the cosine
// x and y are scaled to length 1, and for the squared distance both clouds are moved to their
// common mean, without which the difference of large squares would lose every digit.
#pragma once

#include "kernel.h"
#include "product.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

OPTICAL_INLINE int64_t round_up(int64_t size, int64_t unit) {
    return (size + unit - 1) / unit * unit;
}

// Hands out pieces of a block of memory; from address 0 it only measures.
struct Arena {
    uintptr_t next;
    template <typename Element>
    Element* take(int64_t count) {
        const uintptr_t taken = next;
        next += (uintptr_t)round_up(count * (int64_t)sizeof(Element), 64);
        return (Element*)taken;
    }
};

// One side of one problem in the caller's memory.
struct Side {
    int64_t first, full;  // its lines: the first, in arrays by line, and how many
    const char* vectors;
    int32_t type;
    int64_t stride;  // between vectors, in elements
};

OPTICAL_INLINE int64_t bytes_of(int32_t type) {
    return type == OPTICAL_F64 ? 8 : type == OPTICAL_F32 ? 4 : 2;
}

OPTICAL_INLINE Side side_a(const optical_problem& p, int64_t index) {
    const int64_t* offset = p.offset_a;
    Side s = {offset ? offset[index] : index * p.n, offset ? offset[index + 1] - offset[index] : p.n,
              nullptr, p.x_type, p.x_stride_row};
    const int64_t start = offset ? s.first * p.x_stride_row : index * p.x_stride_batch;
    s.vectors = (const char*)p.x + start * bytes_of(p.kind == OPTICAL_GIVEN ? p.precision : p.x_type);
    return s;
}

OPTICAL_INLINE Side side_b(const optical_problem& p, int64_t index) {
    const int64_t* offset = p.offset_b;
    Side s = {offset ? offset[index] : index * p.m, offset ? offset[index + 1] - offset[index] : p.m,
              nullptr, p.y_type, p.y_stride_column};
    const int64_t start = offset ? s.first * p.y_stride_column : index * p.y_stride_batch;
    s.vectors = (const char*)p.y + start * bytes_of(p.y_type);
    return s;
}

template <typename T>
struct Cost {
    typedef Simd<T> S;
    typedef Product<T> P;
    typedef typename S::Vector Vector;
    typedef typename S::Mask Mask;
    typedef Number<T> C;
    static constexpr int width = S::width;
    static constexpr int block = width > 8 ? width : 8;  // rows worked on together: hides latency

    int64_t n, m;                  // present rows and columns
    int64_t row_count, col_count;  // rounded up to whole blocks and vectors
    int64_t blocks;
    int64_t *row_index, *col_index;  // of the present lines among all lines of the side

    int32_t kind;
    // A given cost, and whether its present columns lie side by side.
    const T* given;
    int64_t stride_row, stride_column;
    bool adjacent;
    // Vectors by row and by column, scaled or moved, in whole SIMD vectors with zeros behind; and
    // both once more as the left and the right side of their products.
    int64_t dim, dim_padded;
    T *x, *y, *x_left, *y_right, *base_a, *base_b, *length_a, *length_b;
    double* centre;
    T factor, least;

    void lay_out(Arena& arena, int64_t max_n, int64_t max_m, int32_t cost_kind, int64_t max_dim) {
        const int64_t rows = round_up(max_n, block), cols = round_up(max_m, block);
        row_index = arena.take<int64_t>(rows + 1), col_index = arena.take<int64_t>(cols + 1);
        kind = cost_kind, dim = max_dim, dim_padded = round_up(max_dim, width);
        if (kind == OPTICAL_GIVEN) return;
        x = arena.take<T>(rows * dim_padded), y = arena.take<T>(cols * dim_padded);
        x_left = arena.take<T>(rows * dim_padded), y_right = arena.take<T>(cols * dim_padded);
        base_a = arena.take<T>(rows), base_b = arena.take<T>(cols);
        length_a = arena.take<T>(rows), length_b = arena.take<T>(cols);
        centre = arena.take<double>(dim_padded);
    }

    static int64_t list_present(const T* log_mass, int64_t count, int64_t* index) {
        int64_t present = 0;
        for (int64_t i = 0; i < count; ++i) {
            index[present] = i;
            present += log_mass[i] != -C::infinity;
        }
        return present;
    }

    // Decides the sizes; returns false where a side is absent altogether.
    bool list(const T* log_a, int64_t full_n, const T* log_b, int64_t full_m) {
        n = list_present(log_a, full_n, row_index);
        m = list_present(log_b, full_m, col_index);
        row_count = round_up(n, block), col_count = round_up(m, width);
        blocks = row_count / block;
        return n > 0 && m > 0;
    }

    void point_at(const void* cost, int64_t between_rows, int64_t between_columns) {
        given = (const T*)cost, stride_row = between_rows, stride_column = between_columns;
        adjacent = stride_column == 1 && col_index[m - 1] - col_index[0] == m - 1;
    }

    // Reads the vectors of both sides. False: a present one is not finite.
    bool read(const Side& a, const Side& b) {
        set_kind();
        bool finite = read_side(a, row_index, n, row_count, x, base_a, length_a, 0);
        finite &= read_side(b, col_index, m, round_up(m, block), y, base_b, length_b,
                            kind == OPTICAL_COSINE ? 1 : 0);
        if (kind == OPTICAL_SQEUCLIDEAN) move();
        pack();
        return finite;
    }

    void set_kind() {
        factor = kind == OPTICAL_SQEUCLIDEAN ? 2 : 1;
        least = kind == OPTICAL_SQEUCLIDEAN ? 0 : -C::infinity;
    }

    // A forbidden pair costs nothing, because nothing moves there.
    static __attribute__((always_inline)) Vector price(const T* c) {
        const Vector cost = S::load(c);
        return S::select(cost < C::infinity, cost, S::all(0));
    }

    // Some tiles of the cost, one behind the other. False: NaN or -inf in them.
    bool fill(int64_t from, int64_t end, T* to) const {
        if (kind != OPTICAL_GIVEN) return fill_product(from, end, to);
        bool valid = true;
        for (int64_t b = from; b < end; ++b, to += block * col_count) valid &= fill_given(b, to);
        return valid;
    }

private:
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

    // Reads the vectors of one side, and their bases: `common`, or the squared length; +inf for
    // padding. For the cosine also divides each by its length; a vector of zeros stays, at cosine 0
    // to everything.
    bool read_side(const Side& side, const int64_t* index, int64_t count, int64_t padded, T* to,
                   T* base, T* length, T common) const {
        bool finite = true;
        const int64_t bytes = side.stride * bytes_of(side.type);
        for (int64_t i = 0; i < padded; ++i, to += dim_padded) {
            base[i] = i < count ? common : C::infinity;
            for (int64_t k = i < count ? dim : 0; k < dim_padded; ++k) to[k] = 0;
            if (i >= count) continue;
            const char* from = side.vectors + index[i] * bytes;
            if (side.type == OPTICAL_F32) {
                convert<float>(from, dim, to);
            } else if (side.type == OPTICAL_F64) {
                convert<double>(from, dim, to);
            } else {
                for (int64_t k = 0; k < dim; ++k) {
                    uint16_t bits;
                    memcpy(&bits, from + 2 * k, sizeof bits);
                    to[k] = half(bits, side.type == OPTICAL_BF16);
                }
            }
            const T sum = square(to);
            if (!(sum < Range::high)) finite &= each_finite(to);
            if (kind == OPTICAL_COSINE) length[i] = normalise(to, sum);
        }
        return finite;
    }

    bool each_finite(const T* vector) const {
        bool finite = true;
        for (int64_t k = 0; k < dim; ++k) finite &= vector[k] - vector[k] == 0;
        return finite;
    }

    // Moves both clouds to their common mean; the bases are squared lengths then.
    void move() {
        for (int64_t k = 0; k < dim_padded; ++k) centre[k] = 0;
        for (int64_t i = 0; i < n; ++i) add_to_centre(x + i * dim_padded);
        for (int64_t j = 0; j < m; ++j) add_to_centre(y + j * dim_padded);
        for (int64_t k = 0; k < dim; ++k) centre[k] /= (double)(n + m);
        for (int64_t i = 0; i < n; ++i) base_a[i] = move(x + i * dim_padded);
        for (int64_t j = 0; j < m; ++j) base_b[j] = move(y + j * dim_padded);
    }
    void add_to_centre(const T* vector) {
        for (int64_t k = 0; k < dim; ++k) centre[k] += (double)vector[k];
    }
    T move(T* vector) const {
        for (int64_t k = 0; k < dim; ++k) vector[k] = (T)((double)vector[k] - centre[k]);
        return square(vector);
    }

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

    // Divides a vector by its length, which it returns, given the sum of its squares.
    T normalise(T* vector, T sum) const {
        T unit = 1;
        // Squares of entries beyond the square root of the range need a smaller unit, or a larger.
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
    struct Range {
        static constexpr T low = sizeof(T) == 4 ? (T)1e-30 : (T)1e-280;
        static constexpr T high = sizeof(T) == 4 ? (T)1e37 : (T)1e300;
    };

    void pack() {
        for (int64_t i = 0; i < row_count; i += width)
            for (int64_t k = 0; k < dim_padded; k += width) {
                T* const to = x_left + (i / block * dim_padded + k) * block + i % block;
                turn(x + i * dim_padded + k, [&](int lane, Vector entries) {
                    S::store(to + lane * block, entries);
                });
            }
        const int64_t count = col_count / width;
        for (int64_t v = 0; v < count; ++v)
            for (int64_t k = 0; k < dim_padded; k += width)
                turn(y + v * width * dim_padded + k, [&](int lane, Vector entries) {
                    if (k + lane < dim)
                        S::store(y_right + P::packed(k + lane, v, dim, count), entries);
                });
    }

    // A square of `width` vectors by entry.
    template <typename Out>
    OPTICAL_INLINE_MEMBER void turn(const T* from, Out out) const {
        Vector square[width];
        for (int i = 0; i < width; ++i) square[i] = S::load(from + i * dim_padded);
        S::transpose(square);
        for (int lane = 0; lane < width; ++lane) out(lane, square[lane]);
    }

    __attribute__((noinline)) bool fill_product(int64_t from, int64_t end, T* to) const {
        Mask valid = S::all(0) == S::all(0);
        const Vector scale = S::all(factor), bottom = S::all(least);
        const T *const of_row = base_a + from * block, *const of_column = base_b;
        const int64_t tile = block * col_count, depth = dim;
        P::multiply((end - from) * (block / P::rows),
                    Blocks<T, block>{x_left + from * block * dim_padded, dim_padded}, y_right, depth,
                    col_count / width,
                    [&, depth](int64_t group, int r, int64_t v, Vector dot, bool more)
                        __attribute__((always_inline)) {
                            const int64_t row = group * P::rows + r;
                            T* const at = to + row / block * tile + (v * block + row % block) * width;
                            if (more) dot += S::load(at);
                            S::store(at, dot);
                        });
        for (int64_t row = 0; row < (end - from) * block; row += block)
            for (int64_t j = 0; j < col_count; j += width)
                for (int r = 0; r < block; ++r, to += width) {
                    const Vector base = of_row[row + r] + S::load(of_column + j);
                    const Vector cost = base - scale * S::load(to);
                    valid &= cost > -C::infinity;
                    S::store(to, S::select(cost < bottom, bottom, cost));
                }
        return S::every(valid);
    }

    __attribute__((noinline)) bool fill_given(int64_t b, T* to) const {
        Mask valid = S::all(0) == S::all(0);
        for (int r = 0; r < block; ++r) {
            const int64_t i = b * block + r;
            const T* row = i < n ? given + row_index[i] * stride_row : nullptr;
            T* next = to + r * width;
            for (int64_t j = 0; j < col_count; j += width, next += block * width) {
                Vector cost = S::all(C::infinity);
                if (row && adjacent && j + width <= m) {
                    cost = S::load_unaligned(row + col_index[0] + j);
                } else if (row) {
                    for (int lane = 0; lane < width && j + lane < m; ++lane)
                        cost[lane] = row[col_index[j + lane] * stride_column];
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
