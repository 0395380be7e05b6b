// Products of small matrices, in registers and the first cache level.
#pragma once

#include "simd.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

// Products of small matrices. `rows` x `vectors` accumulators stay in registers: with 16 of these,
// 4 x 3 leave one for each vector of the right side and one to broadcast the left. `rows` divides
// the width, so that a group of rows never crosses a vector of a tile.
//
// The right side (depth x columns) is packed: cut in depth into chunks and in columns into panels of
// at most `vectors` vectors, small enough together that one panel stays in the first cache level
// while all rows of the left side pass by.
template <typename T>
struct Product {
    typedef Simd<T> S;
    typedef typename S::Vector Vector;
    static constexpr int width = S::width;
    static constexpr int rows = OPTICAL_VECTOR_BYTES == 64 ? 8 : width < 4 ? width : 4;
    static constexpr int vectors = 3;
    static constexpr int64_t chunk = 192;

    // Where vector v of row k of the right side lies, of `count` vectors per row.
    OPTICAL_INLINE int64_t packed(int64_t k, int64_t v, int64_t depth, int64_t count) {
        const int64_t top = k / chunk * chunk, first = v / vectors * vectors;
        const int64_t deep = least(depth - top, chunk), wide = least(count - first, vectors);
        return (top * count + first * deep + (k - top) * wide + (v - first)) * width;
    }

    // out(group, row, vector, sum, more) for groups of `rows` rows of the left side times all of
    // the right side; `more`: the sums add to those of earlier chunks. left(group, k) points at the
    // entry of a group's first row, from which its other rows are left.row(r) away.
    template <typename Left, typename Out>
    OPTICAL_INLINE void multiply(int64_t groups, Left left, const T* right, int64_t depth,
                                 int64_t count, Out out) {
        for (int64_t k = 0; k < depth; k += chunk) {
            const int64_t deep = least(depth - k, chunk);
            for (int64_t v = 0; v < count; v += vectors) {
                const int64_t wide = least(count - v, vectors);
                for (int64_t group = 0; group < groups; ++group) {
                    if (wide == 3) panel<3>(group, left, right, k, deep, v, out);
                    else if (wide == 2) panel<2>(group, left, right, k, deep, v, out);
                    else panel<1>(group, left, right, k, deep, v, out);
                }
                right += deep * wide * width;
            }
        }
    }

private:
    OPTICAL_INLINE int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

    template <int some, typename Left, typename Out>
    OPTICAL_INLINE void panel(int64_t group, const Left& left, const T* right, int64_t top,
                              int64_t deep, int64_t v, const Out& out) {
        Vector sum[rows * some];
        accumulate<some>(left, group, top, deep, right, sum);
        for (int r = 0; r < rows; ++r)
            for (int i = 0; i < some; ++i) out(group, r, v + i, sum[r * some + i], top > 0);
    }

    // Apart from its callers, whose variables would push accumulators out of their registers.
    template <int some, typename Left>
    static __attribute__((noinline)) void accumulate(const Left& left, int64_t group, int64_t top,
                                                     int64_t deep, const T* right, Vector* to) {
        const Left from = left;
        Vector sum[rows][some];
        for (int r = 0; r < rows; ++r)
            for (int i = 0; i < some; ++i) sum[r][i] = S::all(0);
        for (int64_t k = 0; k < deep; ++k, right += some * width) {
            const T* const column = from(group, top + k);
            Vector y[some];
            for (int i = 0; i < some; ++i) y[i] = S::load(right + i * width);
            for (int r = 0; r < rows; ++r) {
                const Vector x = S::all(column[from.row(r)]);
                for (int i = 0; i < some; ++i) sum[r][i] += x * y[i];
            }
        }
        for (int r = 0; r < rows; ++r)
            for (int i = 0; i < some; ++i) S::store((T*)(to + r * some + i), sum[r][i]);
    }
};

// Left sides of products: a matrix by row, and one by blocks of rows, in which the entries of a
// block that are wanted together lie together.
template <typename T>
struct Rows {
    const T* start;
    int64_t stride;
    OPTICAL_INLINE_MEMBER const T* operator()(int64_t group, int64_t k) const {
        return start + group * Product<T>::rows * stride + k;
    }
    OPTICAL_INLINE_MEMBER int64_t row(int r) const { return r * stride; }
};

template <typename T, int block>
struct Blocks {
    const T* start;
    int64_t columns;
    OPTICAL_INLINE_MEMBER const T* operator()(int64_t group, int64_t k) const {
        const int64_t row = group * Product<T>::rows;
        return start + (row / block * columns + k) * block + row % block;
    }
    OPTICAL_INLINE_MEMBER int64_t row(int r) const { return r; }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
