// Products of G = dL/dC with the vectors, which are the gradients of the vectors. With G, for the cosine
// and unit vectors x and y,
//
//     dL/dx_i = (x_i sum_j G_ij (1 - C_ij) - sum_j G_ij y_j) / |x_i|
//
// G is laid out in shared memory, in place of the cost, and multiplied with chunks of the vectors, and
// each gradient is written once. Where the cost came from fragments, so do these: a number of G is the
// sum of two halves, and multiplied with half vectors as they are, or with the halves of numbers. In
// float16 G is scaled so that its largest entry is near 2^13, and is right to 2^-24 of that; in bfloat16
// each entry is right to 2^-16 of itself, where the gradient is rounded to 2^-9.
#pragma once

#include "results.cuh"

namespace optical {
namespace cuda {

template <typename G>
struct Products : Results<G> {
    typedef Results<G> Result;
    static constexpr int RI = G::RI, RJ = G::RJ, OI = G::OI, OJ = G::OJ;
    static constexpr int together = 4;  // rows or columns of G that a thread multiplies at once
    using Result::a;
    using Result::b;
    using Result::base_row;
    using Result::block_columns;
    using Result::block_rows;
    using Result::cost;
    using Result::g;
    using Result::K;
    using Result::measure;
    using Result::p;
    using Result::stage;
    using Result::unit;

    const optical_gradient& out;

    OPTICAL_DEVICE Products(const optical_problem& problem, const optical_gradient& gradient)
        : Result(problem), out(gradient) {}

    // In place of the private arrays: what each line has along itself, G, chunks of the vectors, and of
    // the sums that the blocks of a cluster add. In float32 G and the vectors need less.
    static OPTICAL_ANYWHERE int product_bytes(int down, int across) {
        const int rows = down * G::tile_rows, columns = across * G::tile_columns;
        const int shares = G::span == Span::cluster ? chunk * columns * 4 : 0;
        return 4 * (rows + columns) + 4 * rows * (columns + 8) + 2 * chunk * (rows + columns) * 2 +
               shares;
    }

    // G takes the place of the cost, entry by entry, while what it weighs along each line is added:
    // sum G (1 - C) for the cosine, sum G for the squared distance.
    float row_along[OI], column_along[RJ];
    OPTICAL_DEVICE void begin_along() {
        OPTICAL_EACH
        for (int c = 0; c < RJ; ++c) column_along[c] = 0;
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) row_along[o] = 0;
    }
    OPTICAL_DEVICE void set(int r, int c, float slope, float cost_ij, float& along) {
        const float weight = p.kind == OPTICAL_COSINE ? 1.0f - cost_ij : 1.0f;
        along = fused(slope, weight, along);
        column_along[c] = fused(slope, weight, column_along[c]);
        cost(r, c) = slope;
    }
    OPTICAL_DEVICE void end_row(float along, int q) {
        g.template fold_row<Sum>(along, q, row_along);
    }

    OPTICAL_DEVICE void multiply_vectors() {
        float sum_along[OJ];
        g.template combine_rows<Sum>(row_along);
        g.template columns<Sum>(column_along, sum_along);
        OPTICAL_EACH
        for (int r = 0; r < RI; ++r)
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c) K[r][c] = cost(r, c);
        // From here on the private arrays make room.
        g.sync_own_block();
        float* const along = (float*)stage;
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o)
            if (g.warp_across == 0) along[g.own_row(o) - base_row] = row_along[o];
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o)
            if (g.warp_down == 0) along[block_rows + g.own_column(o)] = sum_along[o];
        float* const room = along + block_rows + block_columns;
        Route way = this->route();
        if (way == Route::halves && lengths_differ()) {
            this->bring_near_one();
            way = Route::split;
        }
        if (way == Route::floats) multiply_in_float(along, room);
        else if (way == Route::split) multiply_fragments<false, Route::split>(along, room);
        else if (p.x_type == OPTICAL_BF16) multiply_fragments<true, Route::halves>(along, room);
        else multiply_fragments<false, Route::halves>(along, room);
    }

    // Whether G with the inverse lengths of its lines has too wide a range for float16: the entries of
    // long lines would have no digits beside those of short ones.
    OPTICAL_DEVICE bool lengths_differ() {
        if (p.kind != OPTICAL_COSINE || p.x_type != OPTICAL_F16) return false;
        bool far = false;
        for (int l = g.thread; l < block_rows + block_columns; l += g.threads)
            far |= measure[l] != 0.0f && !(measure[l] > 1.0f / 256 && measure[l] < 4.0f);
        return g.united(far) != 0;
    }

    OPTICAL_DEVICE int count_of_rows() const {
        const int rest = a.count - base_row;
        return rest < block_rows ? rest : block_rows;
    }
    OPTICAL_DEVICE int count_of_columns() const {
        return b.count < block_columns ? b.count : block_columns;
    }

    // ------------------------------------------------------------------------------- as fragments

    // G has the inverse lengths of both its lines, so that vectors are used as they are:
    //     dL/dx_i = x_i |x_i|^-2 sum_j G_ij (1 - C_ij) - sum_j (G_ij / |x_i| |y_j|) y_j
    template <bool brain, Route way>
    OPTICAL_DEVICE void multiply_fragments(float* along, float* room) {
        constexpr bool split = way == Route::split;
        const int lines = block_rows + block_columns;
        uint16_t* const upper = (uint16_t*)room;
        uint16_t* const lower = upper + block_rows * (block_columns + 8);
        uint16_t* const staged = lower + block_rows * (block_columns + 8);
        float* const shares = (float*)(staged + 2 * chunk * lines);
        float largest = 0;
        OPTICAL_EACH
        for (int r = 0; r < RI; ++r)
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c) {
                if (p.kind == OPTICAL_COSINE)
                    K[r][c] *= measure[g.row(r) - base_row] * measure[block_rows + g.column(c)];
                largest = larger(largest, absolute(K[r][c]));
            }
        float scale = 1, inverse = split ? 1 / Result::split_scale : 1.0f;
        if (!brain) {
            // The power of two that takes the largest into 2^13 .. 2^14, if it is one.
            const int exponent = 267 - (int)(bits_of(largest_of_block(largest, (float*)staged)) >> 23);
            const unsigned bits = exponent > 253 ? 253u : (unsigned)exponent;
            scale = float_of(bits << 23), inverse *= float_of((254u - bits) << 23);
        }
        OPTICAL_EACH
        for (int r = 0; r < RI; ++r)
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c) {
                const int at = (g.row(r) - base_row) * (block_columns + 8) + g.column(c);
                split_number<brain>(K[r][c] * scale, upper[at], lower[at]);
            }
        g.sync_own_block();
        take_factors<way>(along);
        const int rows = count_of_rows(), columns = count_of_columns();
        OPTICAL_ROLLED
        for (int64_t k = 0; k < p.dim; k += chunk) {
            g.sync_own_block();
            if (split) this->template stage_split<chunk>(staged, k);
            else this->template stage_halves<chunk>(staged, k);
            wait_for_copies();
            g.sync_own_block();
            const int part = g.lane % 4 * 2;
            for (int i = 16 * g.warp; out.grad_x && i < rows; i += 16 * g.down * g.across) {
                float sum[2][2][2];
                add_products<brain, way, false>(sum, upper, staged, i, columns, inverse);
                OPTICAL_EACH
                for (int half = 0; half < 2; ++half)
                    write<brain, way>(sum[half], staged, along, i + g.lane / 4 + 8 * half, part, k);
            }
            for (int j = 16 * g.warp; out.grad_y && j < columns; j += 16 * g.down * g.across) {
                float sum[2][2][2];
                add_products<brain, way, true>(sum, upper, staged, j, rows, inverse);
                OPTICAL_EACH
                for (int half = 0; half < 2; ++half) {
                    const int line = j + g.lane / 4 + 8 * half;
                    if (G::span != Span::cluster)
                        write<brain, way>(sum[half], staged, along, block_rows + line, part, k);
                    else
                        OPTICAL_EACH
                        for (int e = 0; e < 4; ++e)
                            shares[line * chunk + part + e / 2 * 8 + e % 2] = sum[half][e / 2][e % 2];
                }
            }
            if (G::span != Span::cluster || !out.grad_y) continue;
            // The blocks add what each has of dY, in order, each for some of the columns.
            g.sync();
            for (int quad = g.rank * g.threads + g.thread; quad < columns * (chunk / 4);
                 quad += g.blocks * g.threads) {
                const int line = quad / 4, first = quad % 4 * 2;
                float sum[2][2] = {{0, 0}, {0, 0}};
                for (int block = 0; block < g.blocks; ++block) {
                    const float* const from = g.at_block(shares, block) + line * chunk + first;
                    OPTICAL_EACH
                    for (int e = 0; e < 4; ++e) sum[e / 2][e % 2] += from[e / 2 * 8 + e % 2];
                }
                write<brain, way>(sum, staged, along, block_rows + line, first, k);
            }
            g.sync();
        }
    }

    // The largest of what all threads of the block have; `room` for one number a warp.
    OPTICAL_DEVICE float largest_of_block(float x, float* room) const {
        OPTICAL_EACH
        for (int mask = 16; mask > 0; mask /= 2) x = larger(x, shuffle_xor(x, mask));
        if (G::span == Span::warp) return x;
        if (g.lane == 0) room[g.warp] = x;
        g.sync_own_block();
        for (int w = 0; w < g.down * g.across; ++w) x = larger(x, room[w]);
        return x;
    }

    // Of 16 rows of G from `first`, or columns, times a chunk of the vectors of the other side, of which
    // there are `count`: what is past them is 0. What a lane has of two fragments: of two lines two
    // entries and the two that are 8 further.
    template <bool brain, Route way, bool turned>
    OPTICAL_DEVICE void add_products(float (&found)[2][2][2], const uint16_t* upper,
                                     const uint16_t* staged, int first, int count,
                                     float factor) const {
        const int pitch = block_columns + 8, plane = (block_rows + block_columns) * chunk;
        const int inner = g.lane / 16 * 8, outer = g.lane % 16;
        const uint16_t* vectors =
            staged + (turned ? 0 : block_rows) * chunk + Result::template place<chunk>(outer, g.lane / 16);
        const uint16_t* from = turned ? upper + (inner + g.lane % 8) * pitch + first + g.lane / 8 % 2 * 8
                                      : upper + (first + outer) * pitch + inner;
        float sum[2][4], more[2][4];
        OPTICAL_EACH
        for (int t = 0; t < 2; ++t)
            OPTICAL_EACH
            for (int e = 0; e < 4; ++e) sum[t][e] = more[t][e] = 0;
        OPTICAL_ROLLED
        for (int line = 0; line < count; line += 16) {
            unsigned high[4], low[4], right[4];
            load_matrices<turned>(high, from);
            load_matrices<turned>(low, from + block_rows * pitch);
            load_matrices<true>(right, vectors);
            OPTICAL_EACH
            for (int t = 0; t < 2; ++t) {
                const unsigned pairs[2] = {right[2 * t], right[2 * t + 1]};
                optical::cuda::multiply_fragments(sum[t], high, pairs, brain);
                optical::cuda::multiply_fragments(more[t], low, pairs, brain);
            }
            if (way == Route::split) {
                load_matrices<true>(right, vectors + plane);
                OPTICAL_EACH
                for (int t = 0; t < 2; ++t) {
                    const unsigned pairs[2] = {right[2 * t], right[2 * t + 1]};
                    optical::cuda::multiply_fragments(more[t], high, pairs, brain);
                }
            }
            from += turned ? 16 * pitch : 16;
            vectors += 16 * chunk;
        }
        OPTICAL_EACH
        for (int t = 0; t < 2; ++t)
            OPTICAL_EACH
            for (int e = 0; e < 4; ++e) found[e / 2][t][e % 2] = factor * (sum[t][e] + more[t][e]);
    }

    // What the sums of a line are multiplied with, in place of its measure, and its own entries, in place
    // of what it has along itself.
    template <Route way>
    OPTICAL_DEVICE void take_factors(float* along) const {
        constexpr float entry = way == Route::split ? 1 / Result::split_scale : 1.0f;
        for (int l = g.thread; l < block_rows + block_columns; l += g.threads) {
            const float own = p.kind == OPTICAL_COSINE ? along[l] * measure[l] * measure[l] : 0.0f;
            along[l] = unit[l] != 0.0f ? own * unit[l] * entry : 0.0f;
            measure[l] = unit[l];
        }
    }

    // The gradient of line `l` at the entries that this lane has of a fragment, from their sums.
    template <bool brain, Route way>
    OPTICAL_DEVICE void write(const float (&sum)[2][2], const uint16_t* staged, const float* along,
                              int l, int part, int64_t k) const {
        const bool of_rows = this->of_rows(l);
        // Not a reference to one of the sides, for which both would have to be in memory.
        const int line = of_rows ? base_row + l : l - block_rows;
        if (line >= (of_rows ? a.count : b.count)) return;
        const int32_t type = way == Route::split ? (of_rows ? a.type : b.type)
                                                 : brain ? OPTICAL_BF16 : OPTICAL_F16;
        const int64_t place = ((of_rows ? a.first : b.first) + line) * p.dim + k + part;
        const float weight = along[l], factor = measure[l];
        void* const to = of_rows ? out.grad_x : out.grad_y;
        OPTICAL_EACH
        for (int t = 0; t < 2; ++t) {
            const int at = Result::template place<chunk>(l, t) + part;
            const int plane = (block_rows + block_columns) * chunk;
            float own[2], more[2];
            unpack(*(const unsigned*)(staged + at), brain, own[0], own[1]);
            if (way == Route::split) {
                unpack(*(const unsigned*)(staged + at + plane), brain, more[0], more[1]);
                own[0] += more[0], own[1] += more[1];
            }
            const float x = factor != 0.0f ? fused(weight, own[0], -factor * sum[t][0]) : 0.0f;
            const float y = factor != 0.0f ? fused(weight, own[1], -factor * sum[t][1]) : 0.0f;
            store_pair(to, type, place + 8 * t, x, y, (int)(p.dim - k) - part - 8 * t);
        }
    }
    // x and y, one behind the other, of which there is room for so many.
    OPTICAL_DEVICE static void store_pair(void* to, int32_t type, int64_t at, float x, float y,
                                          int room) {
        struct alignas(8) Two {
            float x, y;
        };
        if (room < 2 || at % 2 != 0) {
            if (room > 0) store(to, type, at, x);
            if (room > 1) store(to, type, at + 1, y);
        } else if (type == OPTICAL_F32) {
            *(Two*)((float*)to + at) = {x, y};
        } else {
            *(unsigned*)((uint16_t*)to + at) =
                type == OPTICAL_BF16 ? pack_brains(x, y) : pack_halves(x, y);
        }
    }

    // ---------------------------------------------------------------------------------- in float32

    OPTICAL_DEVICE void multiply_in_float(float* along, float* room) {
        const int pitch = block_columns, lines = block_rows + block_columns;
        float* const matrix = room;
        float* const staged = matrix + block_rows * pitch;
        float* const shares = staged + chunk * this->pitch();
        OPTICAL_EACH
        for (int r = 0; r < RI; ++r)
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c)
                matrix[(g.row(r) - base_row) * pitch + g.column(c)] = K[r][c];
        const int at = p.kind == OPTICAL_SQEUCLIDEAN ? this->origin() : 0;
        for (int64_t k = 0; k < p.dim; k += chunk) {
            g.sync_own_block();
            this->stage_chunk(staged, 0, lines, k, at);
            g.sync_own_block();
            if (out.grad_x) times_columns(matrix, staged, along, k);
            if (out.grad_y) times_rows(matrix, staged, along, shares, k);
        }
    }

    // The gradient at an entry of line `l`, from its sum.
    OPTICAL_DEVICE float finished(float sum, const float* staged, const float* along, int l,
                                  int part) const {
        if (p.kind == OPTICAL_DOT) return -sum;
        return 2.0f * (staged[part * this->pitch() + l] * along[l] - sum);
    }

    OPTICAL_DEVICE void times_columns(const float* matrix, const float* staged, const float* along,
                                      int64_t k) {
        const int part = g.thread % chunk, pitch = block_columns;
        const int rows = count_of_rows(), columns = count_of_columns();
        const float* const vectors = staged + part * this->pitch() + block_rows;
        for (int i = g.thread / chunk * together; i < rows; i += g.threads / chunk * together) {
            float sum[together] = {0, 0, 0, 0};
            for (int j = 0; j < columns; ++j)
                OPTICAL_EACH
                for (int t = 0; t < together; ++t)
                    sum[t] = fused(matrix[(i + t) * pitch + j], vectors[j], sum[t]);
            OPTICAL_EACH
            for (int t = 0; t < together; ++t) {
                if (i + t >= rows || k + part >= p.dim) continue;
                const float x = finished(sum[t], staged, along, i + t, part);
                store(out.grad_x, p.x_type, (a.first + base_row + i + t) * p.dim + k + part,
                      this->present_a(base_row + i + t) ? x : 0.0f);
            }
        }
    }

    OPTICAL_DEVICE void times_rows(const float* matrix, const float* staged, const float* along,
                                   float* shares, int64_t k) {
        const int part = g.thread % chunk, pitch = block_columns;
        const int rows = count_of_rows(), columns = count_of_columns();
        const float* const vectors = staged + part * this->pitch();
        for (int j = g.thread / chunk * together; j < columns; j += g.threads / chunk * together) {
            float sum[together] = {0, 0, 0, 0};
            for (int i = 0; i < rows; ++i)
                OPTICAL_EACH
                for (int t = 0; t < together; ++t)
                    sum[t] = fused(matrix[i * pitch + j + t], vectors[i], sum[t]);
            OPTICAL_EACH
            for (int t = 0; t < together; ++t) {
                if (G::span == Span::cluster) shares[(j + t) * chunk + part] = sum[t];
                else write_column(sum[t], staged, along, j + t, part, k);
            }
        }
        if (G::span != Span::cluster) return;
        g.sync();
        for (int j = g.rank * (g.threads / chunk) + g.thread / chunk; j < columns;
             j += g.blocks * (g.threads / chunk)) {
            float sum = 0;
            for (int block = 0; block < g.blocks; ++block)
                sum += g.at_block(shares, block)[j * chunk + part];
            write_column(sum, staged, along, j, part, k);
        }
        g.sync();
    }
    OPTICAL_DEVICE void write_column(float sum, const float* staged, const float* along, int j,
                                     int part, int64_t k) {
        if (j >= b.count || k + part >= p.dim) return;
        const float y = finished(sum, staged, along, block_rows + j, part);
        store(out.grad_y, p.y_type, (b.first + j) * p.dim + k + part,
              this->present_b(j) ? y : 0.0f);
    }
};

}  // namespace cuda
}  // namespace optical
