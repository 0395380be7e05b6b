// Matrix products of a few hundred rows and columns, in registers and the L1 cache.
//
// out = left right is computed `rows` x `vectors` accumulators at a time. With 16 registers, 4 x 3
// accumulators leave one register per vector of the right side and one to broadcast the left.
// `rows` divides the vector width, so a group of rows never crosses a vector of a tile.
//
// The right side (depth x columns) is packed: cut in depth into chunks and in columns into panels
// of at most `vectors` vectors, so that one panel stays in the L1 cache while every row of the left
// side is multiplied with it.
#pragma once

#include "simd.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

template <typename T>
struct SmallGemm {
    typedef Simd<T> S;
    typedef typename S::Vector Vector;
    static constexpr int width = S::width;
    static constexpr int rows = OPTICAL_VECTOR_BYTES == 64 ? 8 : width < 4 ? width : 4;
    static constexpr int vectors = 3;
    static constexpr int64_t chunk = 192;

    // Offset of vector v of row k in the packed right side, with `count` vectors per row.
    OPTICAL_INLINE int64_t packed(int64_t k, int64_t v, int64_t depth, int64_t count) {
        const int64_t top = k / chunk * chunk, first = v / vectors * vectors;
        const int64_t deep = least(depth - top, chunk), wide = least(count - first, vectors);
        return (top * count + first * deep + (k - top) * wide + (v - first)) * width;
    }

    // Calls out(group, row, vector, sum, more) for every group of `rows` rows of the left side and
    // every vector of columns. With `more`, the sum is to be added to that of the earlier chunks.
    // left(group, k) points at entry k of the group's first row; row r is left.row(r) further on.
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

    // Not inlined: the caller's variables would spill the accumulators.
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

// Left side stored by row.
template <typename T>
struct Rows {
    const T* start;
    int64_t stride;
    OPTICAL_INLINE_MEMBER const T* operator()(int64_t group, int64_t k) const {
        return start + group * SmallGemm<T>::rows * stride + k;
    }
    OPTICAL_INLINE_MEMBER int64_t row(int r) const { return r * stride; }
};

// Left side stored by blocks of rows; within a block, the entries of one column are contiguous.
template <typename T, int block>
struct Blocks {
    const T* start;
    int64_t columns;
    OPTICAL_INLINE_MEMBER const T* operator()(int64_t group, int64_t k) const {
        const int64_t row = group * SmallGemm<T>::rows;
        return start + (row / block * columns + k) * block + row % block;
    }
    OPTICAL_INLINE_MEMBER int64_t row(int r) const { return r; }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
