// Gradients of the vectors: products of G = dL/dC with the vectors of the other side.
//
//     s_i = sum_j G_ij y_j
//     cosine        dL/dx_i = -(s_i - (x_i . s_i) x_i) / |x_i|    on the right: unit x, y
//     sqeuclidean   dL/dx_i = 2 ((sum_j G_ij) x_i - s_i)
//     dot           dL/dx_i = -s_i
//
// and the same for y with G'.
#pragma once

#include "cost.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

// Rows of consecutive tiles, and columns of consecutive tiles, as left sides of products. `size` is
// the number of entries of a tile.
template <typename T>
struct TileRows {
    static constexpr int width = Tiling<T>::width, block = Tiling<T>::block;
    const T* tile;
    int64_t size;
    OPTICAL_INLINE_MEMBER const T* operator()(int64_t group, int64_t j) const {
        const int64_t row = group * SmallGemm<T>::rows;
        return tile + row / block * size + j / width * (block * width) + row % block * width +
               j % width;
    }
    OPTICAL_INLINE_MEMBER int64_t row(int r) const { return r * width; }
};
template <typename T>
struct TileColumns {
    static constexpr int width = Tiling<T>::width, block = Tiling<T>::block;
    const T* tile;
    int64_t size;
    OPTICAL_INLINE_MEMBER const T* operator()(int64_t group, int64_t i) const {
        const int64_t j = group * SmallGemm<T>::rows;
        return tile + i / block * size + j / width * (block * width) + i % block * width +
               j % width;
    }
    OPTICAL_INLINE_MEMBER int64_t row(int r) const { return r; }
};

template <typename T>
struct VectorGradient {
    typedef SmallGemm<T> Gemm;
    typedef Simd<T> S;
    typedef typename S::Vector Vector;
    static constexpr int width = Tiling<T>::width, block = Tiling<T>::block;

    const Problem<T>& problem;
    const Cost<T>& cost;

    VectorGradient(const Problem<T>& p, const Cost<T>& c) : problem(p), cost(c) {}

    void lay_out(Arena& shared, const optical_problem& batch, int64_t rows, int64_t cols) {
        const int64_t padded = batch.kind == OPTICAL_GIVEN ? 0 : round_up(batch.dim, width);
        x_packed = shared.take<T>(rows * padded), x_product = shared.take<T>(rows * padded);
        y_packed = shared.take<T>(cols * padded), y_product = shared.take<T>(cols * padded);
    }

    // Packs the vectors of a side as the right side of a product; the team shares the vectors.
    void pack_x() const { pack(cost.x, problem.n, x_packed); }
    void pack_y() const { pack(cost.y, problem.m, y_packed); }

    // Gradients of x from tiles `b` to `end` of G, which start at `tile`.
    __attribute__((noinline)) void multiply_rows(const T* tile, int64_t b, int64_t end,
                                                 T* out) const {
        const int64_t first = b * block, last = end * block < problem.n ? end * block : problem.n;
        const int64_t dim_padded = cost.dim_padded, size = block * problem.col_count;
        T* const product = x_product + first * dim_padded;
        multiply(TileRows<T>{tile, size}, last - first, y_packed, problem.m, product);
        for (int64_t i = first; i < last; ++i) {
            Vector total = S::all(0);
            const T* from = tile + (i - first) / block * size + i % block * width;
            if (cost.kind == OPTICAL_SQEUCLIDEAN)
                for (int64_t j = 0; j < problem.col_count; j += width, from += block * width)
                    total += S::load(from);
            finish(product + (i - first) * dim_padded, cost.x + i * dim_padded, cost.length_a[i],
                   S::sum(total), out + problem.row_index[i] * cost.dim);
        }
    }

    // Gradients of y from columns `first` to `end` of all tiles of G.
    __attribute__((noinline)) void multiply_columns(const T* tiles, int64_t first, int64_t end,
                                                    T* out) const {
        const int64_t last = end < problem.m ? end : problem.m, size = block * problem.col_count;
        const int64_t dim_padded = cost.dim_padded;
        const T* column = tiles + first * block;
        T* const product = y_product + first * dim_padded;
        multiply(TileColumns<T>{column, size}, last - first, x_packed, problem.n, product);
        for (int64_t j = first; j < last; ++j) {
            T total = 0;
            const int64_t at = (j - first) / width * (block * width) + j % width;
            if (cost.kind == OPTICAL_SQEUCLIDEAN)
                for (int64_t i = 0; i < problem.n; ++i)
                    total += column[i / block * size + i % block * width + at];
            finish(product + (j - first) * dim_padded, cost.y + j * dim_padded, cost.length_b[j],
                   total, out + problem.col_index[j] * cost.dim);
        }
    }

private:
    T *x_packed, *y_packed, *x_product, *y_product;

    void pack(const T* vectors, int64_t number, T* to) const {
        const int64_t dim_padded = cost.dim_padded, count = dim_padded / width;
        for (int64_t i = problem.team.rank; i < number; i += problem.team.size)
            for (int64_t v = 0; v < count; ++v)
                S::store(to + Gemm::packed(i, v, number, count),
                         S::load(vectors + i * dim_padded + v * width));
    }

    template <typename Left>
    OPTICAL_INLINE_MEMBER void multiply(Left left, int64_t rows, const T* right, int64_t depth,
                                        T* to) const {
        const int64_t padded = cost.dim_padded;
        Gemm::multiply((rows + Gemm::rows - 1) / Gemm::rows, left, right, depth, padded / width,
                       [&](int64_t group, int r, int64_t v, Vector sum, bool more)
                           __attribute__((always_inline)) {
                               T* const at = to + (group * Gemm::rows + r) * padded + v * width;
                               if (more) sum += S::load(at);
                               S::store(at, sum);
                           });
    }

    // From product = sum_j G_ij y_j to the gradient of x_i = vector; `total` is sum_j G_ij.
    void finish(T* product, const T* vector, T length, T total, T* out) const {
        const int64_t padded = cost.dim_padded;
        if (cost.kind == OPTICAL_COSINE) {
            Vector sum = S::all(0);
            for (int64_t k = 0; k < padded; k += width)
                sum += S::load(product + k) * S::load(vector + k);
            const T along = S::sum(sum), scale = length > 0 ? -1 / length : (T)0;
            for (int64_t k = 0; k < padded; k += width)
                S::store(product + k, scale * (S::load(product + k) - along * S::load(vector + k)));
        } else if (cost.kind == OPTICAL_SQEUCLIDEAN) {
            // Both terms rounded, as one already is: they cancel where no mass moves.
            for (int64_t k = 0; k < padded; k += width)
                S::store(product + k, T(2) * (S::opaque(total * S::load(vector + k)) -
                                              S::load(product + k)));
        } else {
            for (int64_t k = 0; k < padded; k += width)
                S::store(product + k, -S::load(product + k));
        }
        memcpy(out, product, (size_t)cost.dim * sizeof(T));
    }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
