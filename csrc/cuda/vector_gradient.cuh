// The gradients of the vectors: products of G = dL/dC with them.
//
// For the cosine, with unit vectors x and y,
//
//     dL/dx_i = (x_i sum_j G_ij (1 - C_ij) - sum_j G_ij y_j) / |x_i|
//
// G replaces the cost in shared memory and is multiplied with chunks of the vectors; each gradient
// is written once. If the cost was computed on the tensor cores, so are these products: each entry
// of G is the sum of two halves, multiplied with half vectors, or with the two halves of split
// numbers. In float16, G is scaled so that its largest entry is near 2^13, with errors of 2^-24 of
// that entry. In bfloat16 each entry has a relative error of 2^-16; the gradient is rounded to
// 2^-9.
#pragma once

#include "solver.cuh"

namespace optical {
namespace cuda {

// The factor of each vector in its own gradient; in registers, apart from the references below.
template <typename G>
struct SelfTerms {
    float rows[G::OI], columns[G::RJ];
};

template <typename G>
struct VectorGradient {
    static constexpr int RI = G::RI, RJ = G::RJ, OI = G::OI, OJ = G::OJ;
    static constexpr int together = 4;  // rows or columns of G that a thread multiplies at once

    Problem<G>& problem;
    ScalingKernel<G>& kernel;
    Cost<G> vectors;
    G& grid;
    SelfTerms<G>& self;
    const optical_gradient& out;

    OPTICAL_DEVICE VectorGradient(Solver<G>& solver, SelfTerms<G>& self,
                                  const optical_gradient& out)
        : problem(solver.problem),
          kernel(solver.kernel),
          vectors(solver.problem),
          grid(problem.grid),
          self(self),
          out(out) {}

    // Shared memory in place of the private arrays: self terms, G, chunks of the vectors, and the
    // partial sums that the blocks of a cluster add. In float32, G and the vectors need less.
    static OPTICAL_HOST_DEVICE int product_bytes(int down, int across) {
        const int rows = down * G::tile_rows, columns = across * G::tile_columns;
        const int partial_columns = G::span == Span::cluster ? chunk * columns * 4 : 0;
        return 4 * (rows + columns) + 4 * rows * (columns + 8) + 2 * chunk * (rows + columns) * 2 +
               partial_columns;
    }

    // The functions below replace the cost by G entry by entry and accumulate the factor of each
    // vector in its own gradient: sum G (1 - C) for the cosine, sum G for the squared distance.
    OPTICAL_DEVICE void begin() {
        OPTICAL_UNROLL_LOOP
        for (int c = 0; c < RJ; ++c) self.columns[c] = 0;
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) self.rows[o] = 0;
    }
    OPTICAL_DEVICE void set(int r, int c, float slope, float cost_ij, float& self_term) {
        const float weight = problem.batch.kind == OPTICAL_COSINE ? 1.0f - cost_ij : 1.0f;
        self_term = fused(slope, weight, self_term);
        self.columns[c] = fused(slope, weight, self.columns[c]);
        problem.cost(r, c) = slope;
    }
    OPTICAL_DEVICE void end_row(float self_term, int q) {
        grid.template fold_row<Sum>(self_term, q, self.rows);
    }

    OPTICAL_DEVICE void multiply() {
        float column_terms[OJ];
        grid.template combine_rows<Sum>(self.rows);
        grid.template columns<Sum>(self.columns, column_terms);
        OPTICAL_UNROLL_LOOP
        for (int r = 0; r < RI; ++r)
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c) kernel.K[r][c] = problem.cost(r, c);
        // From here on, the products use the memory of the private arrays.
        grid.sync_own_block();
        float* const self_terms = (float*)problem.stage;
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o)
            if (grid.warp_across == 0)
                self_terms[grid.own_row(o) - problem.block_first_row] = self.rows[o];
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o)
            if (grid.warp_down == 0)
                self_terms[problem.block_rows + grid.own_column(o)] = column_terms[o];
        float* const memory = self_terms + problem.block_rows + problem.block_columns;
        Route route = problem.route();
        if (route == Route::halves && lengths_differ()) {
            problem.scale_near_one();
            route = Route::split;
        }
        if (route == Route::floats) multiply_in_float(self_terms, memory);
        else if (route == Route::split) multiply_fragments<false, Route::split>(self_terms, memory);
        else if (problem.batch.x_type == OPTICAL_BF16)
            multiply_fragments<true, Route::halves>(self_terms, memory);
        else multiply_fragments<false, Route::halves>(self_terms, memory);
    }

    // Whether the inverse lengths give G too wide a range for float16: rows and columns of long
    // vectors would lose all digits next to those of short vectors.
    OPTICAL_DEVICE bool lengths_differ() {
        if (problem.batch.kind != OPTICAL_COSINE || problem.batch.x_type != OPTICAL_F16)
            return false;
        bool out_of_range = false;
        for (int entry = grid.thread; entry < problem.block_rows + problem.block_columns;
             entry += grid.threads)
            out_of_range |= problem.norm[entry] != 0.0f &&
                            !(problem.norm[entry] > 1.0f / 256 && problem.norm[entry] < 4.0f);
        return grid.union_of(out_of_range) != 0;
    }

    OPTICAL_DEVICE int count_of_rows() const {
        const int rest = problem.a.count - problem.block_first_row;
        return rest < problem.block_rows ? rest : problem.block_rows;
    }
    OPTICAL_DEVICE int count_of_columns() const {
        return problem.b.count < problem.block_columns ? problem.b.count : problem.block_columns;
    }

    // ------------------------------------------------------------------------- on the tensor cores

    // G includes the inverse lengths of both sides, so that vectors are used without normalisation:
    //
    //     dL/dx_i = x_i |x_i|^-2 sum_j G_ij (1 - C_ij) - sum_j (G_ij / |x_i| |y_j|) y_j
    template <bool bfloat, Route route>
    OPTICAL_DEVICE void multiply_fragments(float* self_terms, float* memory) {
        constexpr bool split = route == Route::split;
        const int entries_of_block = problem.block_rows + problem.block_columns;
        uint16_t* const upper = (uint16_t*)memory;
        uint16_t* const lower = upper + problem.block_rows * (problem.block_columns + 8);
        uint16_t* const staged = lower + problem.block_rows * (problem.block_columns + 8);
        float* const partial_columns = (float*)(staged + 2 * chunk * entries_of_block);
        float largest = 0;
        OPTICAL_UNROLL_LOOP
        for (int r = 0; r < RI; ++r)
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c) {
                if (problem.batch.kind == OPTICAL_COSINE)
                    kernel.K[r][c] *= problem.norm[grid.row(r) - problem.block_first_row] *
                                      problem.norm[problem.block_rows + grid.column(c)];
                largest = larger(largest, absolute(kernel.K[r][c]));
            }
        float scale = 1, inverse = split ? 1 / Cost<G>::split_scale : 1.0f;
        if (!bfloat) {
            // The power of two, if representable, that takes the largest entry into 2^13 ... 2^14.
            const int exponent =
                267 - (int)(bits_of(largest_of_block(largest, (float*)staged)) >> 23);
            const unsigned bits = exponent > 253 ? 253u : (unsigned)exponent;
            scale = float_of(bits << 23), inverse *= float_of((254u - bits) << 23);
        }
        OPTICAL_UNROLL_LOOP
        for (int r = 0; r < RI; ++r)
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c) {
                const int at =
                    (grid.row(r) - problem.block_first_row) * (problem.block_columns + 8) +
                    grid.column(c);
                split_number<bfloat>(kernel.K[r][c] * scale, upper[at], lower[at]);
            }
        grid.sync_own_block();
        take_factors<route>(self_terms);
        const int rows = count_of_rows(), columns = count_of_columns();
        OPTICAL_KEEP_LOOP
        for (int64_t k = 0; k < problem.batch.dim; k += chunk) {
            grid.sync_own_block();
            if (split) vectors.template stage_split<chunk>(staged, k);
            else vectors.template stage_halves<chunk>(staged, k);
            wait_for_copies();
            grid.sync_own_block();
            const int part = grid.lane % 4 * 2;
            for (int i = 16 * grid.warp; out.grad_x && i < rows;
                 i += 16 * grid.down * grid.across) {
                float sum[2][2][2];
                add_products<bfloat, route, false>(sum, upper, staged, i, columns, inverse);
                OPTICAL_UNROLL_LOOP
                for (int half = 0; half < 2; ++half)
                    write<bfloat, route>(sum[half], staged, self_terms,
                                         i + grid.lane / 4 + 8 * half, part, k);
            }
            for (int j = 16 * grid.warp; out.grad_y && j < columns;
                 j += 16 * grid.down * grid.across) {
                float sum[2][2][2];
                add_products<bfloat, route, true>(sum, upper, staged, j, rows, inverse);
                OPTICAL_UNROLL_LOOP
                for (int half = 0; half < 2; ++half) {
                    const int index = j + grid.lane / 4 + 8 * half;
                    if (G::span != Span::cluster)
                        write<bfloat, route>(sum[half], staged, self_terms,
                                             problem.block_rows + index, part, k);
                    else
                        OPTICAL_UNROLL_LOOP
                        for (int e = 0; e < 4; ++e)
                            partial_columns[index * chunk + part + e / 2 * 8 + e % 2] =
                                sum[half][e / 2][e % 2];
                }
            }
            if (G::span != Span::cluster || !out.grad_y) continue;
            // The blocks add the partial sums of dY in order; each block handles a part of the
            // columns.
            grid.sync();
            for (int quad = grid.rank * grid.threads + grid.thread; quad < columns * (chunk / 4);
                 quad += grid.blocks * grid.threads) {
                const int index = quad / 4, first = quad % 4 * 2;
                float sum[2][2] = {{0, 0}, {0, 0}};
                for (int block = 0; block < grid.blocks; ++block) {
                    const float* const from =
                        grid.at_block(partial_columns, block) + index * chunk + first;
                    OPTICAL_UNROLL_LOOP
                    for (int e = 0; e < 4; ++e) sum[e / 2][e % 2] += from[e / 2 * 8 + e % 2];
                }
                write<bfloat, route>(sum, staged, self_terms, problem.block_rows + index, first, k);
            }
            grid.sync();
        }
    }

    // The maximum over all threads of the block. `memory` holds one float per warp.
    OPTICAL_DEVICE float largest_of_block(float x, float* memory) const {
        OPTICAL_UNROLL_LOOP
        for (int mask = 16; mask > 0; mask /= 2) x = larger(x, shuffle_xor(x, mask));
        if (G::span == Span::warp) return x;
        if (grid.lane == 0) memory[grid.warp] = x;
        grid.sync_own_block();
        for (int w = 0; w < grid.down * grid.across; ++w) x = larger(x, memory[w]);
        return x;
    }

    // Multiplies 16 rows of G from `first` on, or `transposed` 16 columns, with a staged chunk of
    // the `count` vectors of the other side; G is 0 past them. A lane receives two fragments: of
    // two rows or columns, two components and the two that are 8 further.
    template <bool bfloat, Route route, bool transposed>
    OPTICAL_DEVICE void add_products(float (&products)[2][2][2], const uint16_t* upper,
                                     const uint16_t* staged, int first, int count,
                                     float factor) const {
        const int pitch = problem.block_columns + 8,
                  plane = (problem.block_rows + problem.block_columns) * chunk;
        const int inner = grid.lane / 16 * 8, outer = grid.lane % 16;
        const uint16_t* other = staged + (transposed ? 0 : problem.block_rows) * chunk +
                                Cost<G>::template place<chunk>(outer, grid.lane / 16);
        const uint16_t* matrix =
            transposed ? upper + (inner + grid.lane % 8) * pitch + first + grid.lane / 8 % 2 * 8
                       : upper + (first + outer) * pitch + inner;
        float sum[2][4], correction[2][4];
        OPTICAL_UNROLL_LOOP
        for (int t = 0; t < 2; ++t)
            OPTICAL_UNROLL_LOOP
            for (int e = 0; e < 4; ++e) sum[t][e] = correction[t][e] = 0;
        OPTICAL_KEEP_LOOP
        for (int inner_first = 0; inner_first < count; inner_first += 16) {
            unsigned high[4], low[4], right[4];
            load_matrices<transposed>(high, matrix);
            load_matrices<transposed>(low, matrix + problem.block_rows * pitch);
            load_matrices<true>(right, other);
            OPTICAL_UNROLL_LOOP
            for (int t = 0; t < 2; ++t) {
                const unsigned pairs[2] = {right[2 * t], right[2 * t + 1]};
                optical::cuda::multiply_fragments(sum[t], high, pairs, bfloat);
                optical::cuda::multiply_fragments(correction[t], low, pairs, bfloat);
            }
            if (route == Route::split) {
                load_matrices<true>(right, other + plane);
                OPTICAL_UNROLL_LOOP
                for (int t = 0; t < 2; ++t) {
                    const unsigned pairs[2] = {right[2 * t], right[2 * t + 1]};
                    optical::cuda::multiply_fragments(correction[t], high, pairs, bfloat);
                }
            }
            matrix += transposed ? 16 * pitch : 16;
            other += 16 * chunk;
        }
        OPTICAL_UNROLL_LOOP
        for (int t = 0; t < 2; ++t)
            OPTICAL_UNROLL_LOOP
        for (int e = 0; e < 4; ++e)
            products[e / 2][t][e % 2] = factor * (sum[t][e] + correction[t][e]);
    }

    // Replaces the norm of each entry by the factor of its sums, and its self term by the factor of
    // its own vector.
    template <Route route>
    OPTICAL_DEVICE void take_factors(float* self_terms) const {
        constexpr float component_scale = route == Route::split ? 1 / Cost<G>::split_scale : 1.0f;
        for (int entry = grid.thread; entry < problem.block_rows + problem.block_columns;
             entry += grid.threads) {
            const float self_factor =
                problem.batch.kind == OPTICAL_COSINE
                    ? self_terms[entry] * problem.norm[entry] * problem.norm[entry]
                    : 0.0f;
            self_terms[entry] = problem.prescale[entry] != 0.0f
                                    ? self_factor * problem.prescale[entry] * component_scale
                                    : 0.0f;
            problem.norm[entry] = problem.prescale[entry];
        }
    }

    // Writes the gradient of an entry at the components that this lane holds of a fragment.
    template <bool bfloat, Route route>
    OPTICAL_DEVICE void write(const float (&sum)[2][2], const uint16_t* staged,
                              const float* self_terms, int entry, int part, int64_t k) const {
        const bool is_row = problem.is_row(entry);
        // A reference to one of the sides would force both into local memory.
        const int index = is_row ? problem.block_first_row + entry : entry - problem.block_rows;
        if (index >= (is_row ? problem.a.count : problem.b.count)) return;
        const int32_t type = route == Route::split ? (is_row ? problem.a.type : problem.b.type)
                                                 : bfloat ? OPTICAL_BF16 : OPTICAL_F16;
        const int64_t offset =
            ((is_row ? problem.a.first : problem.b.first) + index) * problem.batch.dim + k + part;
        const float self_factor = self_terms[entry], scale = problem.norm[entry];
        void* const to = is_row ? out.grad_x : out.grad_y;
        OPTICAL_UNROLL_LOOP
        for (int t = 0; t < 2; ++t) {
            const int staged_at = Cost<G>::template place<chunk>(entry, t) + part;
            const int plane = (problem.block_rows + problem.block_columns) * chunk;
            float component[2], lower[2];
            unpack(*(const unsigned*)(staged + staged_at), bfloat, component[0], component[1]);
            if (route == Route::split) {
                unpack(*(const unsigned*)(staged + staged_at + plane), bfloat, lower[0], lower[1]);
                component[0] += lower[0], component[1] += lower[1];
            }
            const float x =
                scale != 0.0f ? fused(self_factor, component[0], -scale * sum[t][0]) : 0.0f;
            const float y =
                scale != 0.0f ? fused(self_factor, component[1], -scale * sum[t][1]) : 0.0f;
            store_pair(to, type, offset + 8 * t, x, y, (int)(problem.batch.dim - k) - part - 8 * t);
        }
    }
    // Stores x and y at consecutive components, of which `available` exist.
    OPTICAL_DEVICE static void store_pair(void* to, int32_t type, int64_t at, float x, float y,
                                          int available) {
        struct alignas(8) Two {
            float x, y;
        };
        if (available < 2 || at % 2 != 0) {
            if (available > 0) store(to, type, at, x);
            if (available > 1) store(to, type, at + 1, y);
        } else if (type == OPTICAL_F32) {
            *(Two*)((float*)to + at) = {x, y};
        } else {
            *(unsigned*)((uint16_t*)to + at) =
                type == OPTICAL_BF16 ? pack_bfloats(x, y) : pack_halves(x, y);
        }
    }

    // ---------------------------------------------------------------------------------- in float32

    OPTICAL_DEVICE void multiply_in_float(float* self_terms, float* memory) {
        const int pitch = problem.block_columns,
                  entries_of_block = problem.block_rows + problem.block_columns;
        float* const matrix = memory;
        float* const staged = matrix + problem.block_rows * pitch;
        float* const partial_columns = staged + chunk * vectors.pitch();
        OPTICAL_UNROLL_LOOP
        for (int r = 0; r < RI; ++r)
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c)
                matrix[(grid.row(r) - problem.block_first_row) * pitch + grid.column(c)] =
                    kernel.K[r][c];
        const int at = problem.batch.kind == OPTICAL_SQEUCLIDEAN ? problem.origin() : 0;
        for (int64_t k = 0; k < problem.batch.dim; k += chunk) {
            grid.sync_own_block();
            vectors.stage_chunk(staged, 0, entries_of_block, k, at);
            grid.sync_own_block();
            if (out.grad_x) times_columns(matrix, staged, self_terms, k);
            if (out.grad_y) times_rows(matrix, staged, self_terms, partial_columns, k);
        }
    }

    // The gradient of one component of an entry, from its sum.
    OPTICAL_DEVICE float finished(float sum, const float* staged, const float* self_terms,
                                  int entry, int part) const {
        if (problem.batch.kind == OPTICAL_DOT) return -sum;
        return 2.0f * (staged[part * vectors.pitch() + entry] * self_terms[entry] - sum);
    }

    OPTICAL_DEVICE void times_columns(const float* matrix, const float* staged,
                                      const float* self_terms, int64_t k) {
        const int part = grid.thread % chunk, pitch = problem.block_columns;
        const int rows = count_of_rows(), columns = count_of_columns();
        const float* const other = staged + part * vectors.pitch() + problem.block_rows;
        for (int i = grid.thread / chunk * together; i < rows;
             i += grid.threads / chunk * together) {
            float sum[together] = {0, 0, 0, 0};
            for (int j = 0; j < columns; ++j)
                OPTICAL_UNROLL_LOOP
                for (int t = 0; t < together; ++t)
                    sum[t] = fused(matrix[(i + t) * pitch + j], other[j], sum[t]);
            OPTICAL_UNROLL_LOOP
            for (int t = 0; t < together; ++t) {
                if (i + t >= rows || k + part >= problem.batch.dim) continue;
                const float x = finished(sum[t], staged, self_terms, i + t, part);
                store(out.grad_x, problem.batch.x_type,
                      (problem.a.first + problem.block_first_row + i + t) * problem.batch.dim + k +
                          part,
                      problem.valid_row(problem.block_first_row + i + t) ? x : 0.0f);
            }
        }
    }

    OPTICAL_DEVICE void times_rows(const float* matrix, const float* staged,
                                   const float* self_terms, float* partial_columns, int64_t k) {
        const int part = grid.thread % chunk, pitch = problem.block_columns;
        const int rows = count_of_rows(), columns = count_of_columns();
        const float* const other = staged + part * vectors.pitch();
        for (int j = grid.thread / chunk * together; j < columns;
             j += grid.threads / chunk * together) {
            float sum[together] = {0, 0, 0, 0};
            for (int i = 0; i < rows; ++i)
                OPTICAL_UNROLL_LOOP
                for (int t = 0; t < together; ++t)
                    sum[t] = fused(matrix[i * pitch + j + t], other[i], sum[t]);
            OPTICAL_UNROLL_LOOP
            for (int t = 0; t < together; ++t) {
                if (G::span == Span::cluster) partial_columns[(j + t) * chunk + part] = sum[t];
                else write_column(sum[t], staged, self_terms, j + t, part, k);
            }
        }
        if (G::span != Span::cluster) return;
        grid.sync();
        for (int j = grid.rank * (grid.threads / chunk) + grid.thread / chunk; j < columns;
             j += grid.blocks * (grid.threads / chunk)) {
            float sum = 0;
            for (int block = 0; block < grid.blocks; ++block)
                sum += grid.at_block(partial_columns, block)[j * chunk + part];
            write_column(sum, staged, self_terms, j, part, k);
        }
        grid.sync();
    }
    OPTICAL_DEVICE void write_column(float sum, const float* staged, const float* self_terms, int j,
                                     int part, int64_t k) {
        if (j >= problem.b.count || k + part >= problem.batch.dim) return;
        const float y = finished(sum, staged, self_terms, problem.block_rows + j, part);
        store(out.grad_y, problem.batch.y_type,
              (problem.b.first + j) * problem.batch.dim + k + part,
              problem.valid_column(j) ? y : 0.0f);
    }
};

}  // namespace cuda
}  // namespace optical
