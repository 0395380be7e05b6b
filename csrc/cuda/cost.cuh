// The cost, which stays in shared memory: as it is given, or from vectors.
//
// Products of vectors are summed over chunks of the dimension that pass through shared memory. Half
// vectors as they are go to the tensor cores, whose products of halves are exact and whose sums are in
// float32. So do others, for the cosine: scaled to a length near 1, each number is the sum of two
// float16, and of the four products of two numbers the one below 2^-24 is left out. What has to be
// moved first, and dot products of float32, are multiplied in float32.
#pragma once

#include "lines.cuh"

namespace optical {
namespace cuda {

template <typename G>
struct Cost : Problem<G> {
    typedef Problem<G> Base;
    static constexpr int RI = G::RI, RJ = G::RJ;
    // By which numbers are multiplied before they are split: what underflows is far below 2^-24.
    static constexpr float split_scale = 4096.0f;
    using Base::a;
    using Base::b;
    using Base::base_row;
    using Base::block_columns;
    using Base::block_rows;
    using Base::cost;
    using Base::entry;
    using Base::g;
    using Base::half_chunk;
    using Base::index;
    using Base::measure;
    using Base::of_rows;
    using Base::origin;
    using Base::origin_entry;
    using Base::p;
    using Base::stage;
    using Base::unit;

    OPTICAL_DEVICE Cost(const optical_problem& problem) : Base(problem) {}

    // Fills the private cost. False, for this thread: NaN or -inf among present pairs.
    OPTICAL_DEVICE bool fill() {
        unsigned rows_here = 0, columns_here = 0;
        OPTICAL_ROLLED
        for (int r = 0; r < RI; ++r) rows_here |= (unsigned)this->present_a(g.row(r)) << r;
        OPTICAL_EACH
        for (int c = 0; c < RJ; ++c) columns_here |= (unsigned)this->present_b(g.column(c)) << c;
        return p.kind == OPTICAL_GIVEN ? read(rows_here, columns_here)
                                       : multiply(rows_here, columns_here);
    }

    OPTICAL_DEVICE bool read(unsigned rows_here, unsigned columns_here) const {
        const float* const from = (const float*)p.x + index * p.x_stride_batch;
        bool valid = true;
        OPTICAL_ROLLED
        for (int r = 0; r < RI; ++r)
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c) {
                float value = infinity();
                if ((rows_here >> r & 1u) & (columns_here >> c & 1u)) {
                    value = from[g.row(r) * p.x_stride_row + g.column(c) * p.x_stride_entry];
                    valid &= value > -infinity();
                }
                cost(r, c) = value;
            }
        return valid;
    }

    // --------------------------------------------------------------------------- vectors, in float32

    OPTICAL_DEVICE int pitch() const { return block_rows + block_columns + 2; }

    // Puts entries k to k + chunk of the lines from `from` to `end` into shared memory.
    OPTICAL_DEVICE void stage_chunk(float* to, int from, int end, int64_t k, int at) const {
        constexpr int parts = G::lanes < chunk ? G::lanes : chunk;
        OPTICAL_EACH
        for (int part = g.thread % parts, end_part = part + chunk; part < end_part; part += parts) {
            const float shift = k + part < p.dim ? origin_entry(at, k + part) : 0.0f;
            for (int l = from + g.thread / parts; l < end; l += g.threads / parts) {
                float x = 0;
                if (k + part < p.dim && unit[l] != 0.0f) x = entry(l, k + part) - shift;
                to[part * pitch() + l] = x;
            }
        }
    }

    OPTICAL_DEVICE void multiply_floats(float (&x)[RI][RJ]) {
        const int at = p.kind == OPTICAL_SQEUCLIDEAN ? origin() : 0;
        float* const staged = (float*)stage;
        OPTICAL_EACH
        for (int r = 0; r < RI; ++r)
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c) x[r][c] = 0;
        for (int64_t k = 0; k < p.dim; k += chunk) {
            stage_chunk(staged, 0, block_rows + block_columns, k, at);
            g.sync_own_block();
            for (int part = 0; part < chunk; ++part) {
                const float* const line = staged + part * pitch();
                float of_row[RI], of_column[RJ];
                OPTICAL_EACH
                for (int r = 0; r < RI; ++r) of_row[r] = line[g.row(r) - base_row];
                OPTICAL_EACH
                for (int c = 0; c < RJ; ++c) of_column[c] = line[block_rows + g.column(c)];
                OPTICAL_EACH
                for (int r = 0; r < RI; ++r)
                    OPTICAL_EACH
                    for (int c = 0; c < RJ; ++c)
                        x[r][c] = fused(of_row[r], of_column[c], x[r][c]);
            }
            g.sync_own_block();
        }
    }

    // ------------------------------------------------------------------------- vectors, as fragments

    // The problem of another team, for all lanes of the warp: only together they multiply fragments.
    OPTICAL_DEVICE Cost of_team(int team) const {
        Cost other = *this;
        const int bytes = (team - g.team) * Base::bytes_of_team(1, 1, p.kind);
        other.choose(shuffle(this->is_there ? (int)index : -1, team * G::lanes));
        other.scaled = shuffle((int)this->scaled, team * G::lanes) != 0;
        other.stage = stage + bytes;
        other.unit = (float*)((char*)unit + bytes), other.measure = (float*)((char*)measure + bytes);
        other.g.thread = other.g.lane = thread_index(), other.g.threads = 32;
        return other;
    }
    OPTICAL_DEVICE void sync_together() const {
        if (G::teams > 1) sync_warp();
        else g.sync_own_block();
    }

    // Where eight entries of a line are, of chunks of so many: eight lines, which a load of fragments
    // takes at once, lie in different banks, and every eighth line is turned alike.
    template <int entries>
    OPTICAL_DEVICE static int place(int l, int eighth) {
        constexpr int parts = entries / 8;
        return l * entries + (eighth ^ l / (8 / parts) % parts) * 8;
    }

    // Has entries k to k + entries of all lines come into shared memory: after wait_for_copies() of
    // every thread they are there.
    template <int entries>
    OPTICAL_DEVICE void stage_halves(uint16_t* to, int64_t k) const {
        stage_lines<entries, Route::halves>(to, 0, block_rows, a, base_row, k);
        stage_lines<entries, Route::halves>(to, block_rows, block_columns, b, 0, k);
    }
    // The same of numbers that are split: upper halves, and behind those of all lines the lower ones.
    template <int entries>
    OPTICAL_DEVICE void stage_split(uint16_t* to, int64_t k) const {
        stage_lines<entries, Route::split>(to, 0, block_rows, a, base_row, k);
        stage_lines<entries, Route::split>(to, block_rows, block_columns, b, 0, k);
    }

    // Lines `first` and further, which are those of a side from `line`. A thread has the same eighth of
    // the chunk in every eighth line or a multiple of that: what it adds to addresses is the same.
    template <int entries, Route way>
    OPTICAL_DEVICE void stage_lines(uint16_t* to, int first, int count, const Lines& side, int line,
                                    int64_t k) const {
        constexpr int parts = entries / 8;
        const int part = g.thread % parts, step = g.threads / parts, bytes = bytes_of(side.type);
        const int64_t rest = p.dim - k - 8 * part, stride = side.stride * bytes;
        int l = g.thread / parts;
        const char* from = side.vectors + (line + l) * stride + (k + 8 * part) * bytes;
        l += first;
        to += place<entries>(l, part);
        const bool aligned = ((uintptr_t)from & 15) == 0;
        const int lower = (block_rows + block_columns) * entries;
        OPTICAL_ROLLED
        for (; l < first + count; l += step, from += step * stride, to += step * entries) {
            const bool here = unit[l] != 0.0f;
            if (way == Route::split) {
                float x[8];
                load_eight(from, side.type, aligned, here ? rest : 0, x);
                split_eight(x, unit[l] * split_scale, to, to + lower);
            } else if (aligned && rest >= 8) {
                copy_ahead(to, from, here);
            } else {
                *(Eight*)to = few(from, here ? rest : 0);
            }
        }
    }
    OPTICAL_DEVICE static Eight few(const char* from, int64_t count) {
        Eight eight = {};
        OPTICAL_EACH
        for (int e = 0; e < 8; ++e)
            if (e < count) eight.entry[e] = ((const uint16_t*)from)[e];
        return eight;
    }
    OPTICAL_DEVICE static void split_eight(const float (&x)[8], float scale, uint16_t* upper,
                                           uint16_t* lower) {
        Eight high, low;
        OPTICAL_EACH
        for (int e = 0; e < 8; ++e) split_number<false>(x[e] * scale, high.entry[e], low.entry[e]);
        *(Eight*)upper = high, *(Eight*)lower = low;
    }

    // Adds the squares of a chunk to the measures of its lines: sixteen lines times themselves, of which
    // the diagonal counts.
    template <int entries, bool brain>
    OPTICAL_DEVICE void add_squares(const uint16_t* staged) const {
        const int line = g.lane / 4, odd = line % 2;
        const uint16_t *left[entries / 16], *right[entries / 16];
        OPTICAL_EACH
        for (int k = 0; k < entries / 16; ++k) {
            left[k] = staged + place<entries>(g.lane % 16, 2 * k + g.lane / 16);
            right[k] = staged + place<entries>(g.lane / 16 * 8 + g.lane % 8, 2 * k + g.lane / 8 % 2);
        }
        OPTICAL_ROLLED
        for (int first = 16 * g.warp; first < block_rows + block_columns;
             first += 16 * g.down * g.across) {
            float upper[4] = {0, 0, 0, 0}, lower[4] = {0, 0, 0, 0};
            OPTICAL_EACH
            for (int k = 0; k < entries / 16; ++k) {
                unsigned x[4], y[4];
                load_matrices<false>(x, left[k] + first * entries);
                load_matrices<false>(y, right[k] + first * entries);
                const unsigned low[2] = {y[0], y[1]}, high[2] = {y[2], y[3]};
                optical::cuda::multiply_fragments(upper, x, low, brain);
                optical::cuda::multiply_fragments(lower, x, high, brain);
            }
            if (line / 2 != g.lane % 4) continue;
            measure[first + line] += odd ? upper[1] : upper[0];
            measure[first + 8 + line] += odd ? lower[3] : lower[2];
        }
    }

    // All products of rows and columns, into a matrix in shared memory.
    template <bool brain, Route way>
    OPTICAL_DEVICE void multiply_fragments() const {
        constexpr bool split = way == Route::split;
        constexpr int tall = G::tile_rows / 16, wide = G::tile_columns / 8, entries = half_chunk;
        uint16_t* const staged = (uint16_t*)stage;
        const int plane = (block_rows + block_columns) * entries;
        float sum[tall][wide][4];
        OPTICAL_EACH
        for (int i = 0; i < tall; ++i)
            OPTICAL_EACH
            for (int j = 0; j < wide; ++j)
                OPTICAL_EACH
                for (int e = 0; e < 4; ++e) sum[i][j][e] = 0;
        const int lane_row = g.warp_down * G::tile_rows + g.lane % 16;
        const int lane_column =
            block_rows + g.warp_across * G::tile_columns + g.lane / 16 * 8 + g.lane % 8;
        // While one chunk of halves is multiplied the next one is on its way, into the memory of the
        // last; numbers that are split have both for their halves.
        int here = 0;
        if (!split) stage_halves<entries>(staged, 0);
        OPTICAL_ROLLED
        for (int64_t k = 0; k < p.dim; k += entries) {
            if (split) {
                sync_together();
                stage_split<entries>(staged, k);
                sync_together();
            } else {
                wait_for_copies();
                sync_together();
                if (k + entries < p.dim) stage_halves<entries>(staged + (plane - here), k + entries);
                if (!this->measured) add_squares<entries, brain>(staged + here);
            }
            // The product of the lower halves is below the last digit.
            OPTICAL_ROLLED
            for (int step = 0; step < (split ? 3 : 1) * (entries / 16); ++step) {
                const int product = step / (entries / 16), sixteen = step % (entries / 16);
                const uint16_t* const rows =
                    staged + here + (product == 1 ? plane : 0) +
                    place<entries>(lane_row, 2 * sixteen + g.lane / 16);
                const uint16_t* const columns =
                    staged + here + (product == 2 ? plane : 0) +
                    place<entries>(lane_column, 2 * sixteen + g.lane / 8 % 2);
                unsigned right[wide][2];
                OPTICAL_EACH
                for (int j = 0; j < wide / 2; ++j) {
                    unsigned pairs[4];
                    load_matrices<false>(pairs, columns + j * 16 * entries);
                    right[2 * j][0] = pairs[0], right[2 * j][1] = pairs[1];
                    right[2 * j + 1][0] = pairs[2], right[2 * j + 1][1] = pairs[3];
                }
                OPTICAL_EACH
                for (int i = 0; i < tall; ++i) {
                    unsigned left[4];
                    load_matrices<false>(left, rows + i * 16 * entries);
                    OPTICAL_EACH
                    for (int j = 0; j < wide; ++j)
                        optical::cuda::multiply_fragments(sum[i][j], left, right[j], brain);
                }
            }
            if (!split) here = plane - here;
        }
        sync_together();
        float* const matrix = (float*)stage;
        const int corner = (g.warp_down * G::tile_rows + g.lane / 4) * block_columns +
                           g.warp_across * G::tile_columns + 2 * (g.lane % 4);
        constexpr float scale = split ? 1 / (split_scale * split_scale) : 1.0f;
        OPTICAL_EACH
        for (int i = 0; i < tall; ++i)
            OPTICAL_EACH
            for (int j = 0; j < wide; ++j)
                OPTICAL_EACH
                for (int e = 0; e < 4; ++e)
                    matrix[corner + (i * 16 + e / 2 * 8) * block_columns + j * 8 + e % 2] =
                        scale * sum[i][j][e];
        sync_together();
    }
    OPTICAL_DEVICE void multiply_fragments() const {
        if (this->route() == Route::split) multiply_fragments<false, Route::split>();
        else if (p.x_type == OPTICAL_BF16) multiply_fragments<true, Route::halves>();
        else multiply_fragments<false, Route::halves>();
    }
    OPTICAL_DEVICE void multiply_together() const {
        if constexpr (G::teams == 1) {
            multiply_fragments();
        } else {
            OPTICAL_ROLLED
            for (int team = 0; team < G::teams; ++team) of_team(team).multiply_fragments();
        }
    }
    OPTICAL_DEVICE void take_products(float (&x)[RI][RJ]) const {
        const float* const matrix = (const float*)stage;
        OPTICAL_EACH
        for (int r = 0; r < RI; ++r)
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c)
                x[r][c] = matrix[(g.row(r) - base_row) * block_columns + g.column(c)];
        g.sync_own_block();
    }

    // ----------------------------------------------------------------------------------- both ways

    OPTICAL_DEVICE bool multiply(unsigned rows_here, unsigned columns_here) {
        float x[RI][RJ];
        const bool halves = this->half_products();
        if (!halves && p.kind != OPTICAL_COSINE) {
            this->measure_lines();
            multiply_floats(x);
        } else {
            // Once more where squares left the range, of one team or another.
            bool again = true, expect = halves;
            OPTICAL_ROLLED
            while (G::teams == 1 ? again : warp_any(again)) {
                if (again && expect) this->expect_lines();
                else if (again) this->measure_lines();
                expect = false;
                const bool known = this->measured;
                multiply_together();
                again = !known && !this->take_measures();
            }
            take_products(x);
        }
        OPTICAL_EACH
        for (int r = 0; r < RI; ++r)
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c) cost(r, c) = x[r][c];
        bool valid = true;
        float of_column[RJ];
        OPTICAL_EACH
        for (int c = 0; c < RJ; ++c) of_column[c] = measure[block_rows + g.column(c)];
        OPTICAL_ROLLED
        for (int r = 0; r < RI; ++r) {
            const float of_row = measure[g.row(r) - base_row];
            OPTICAL_EACH
            for (int c = 0; c < RJ; ++c) {
                float value = -cost(r, c);
                if (p.kind == OPTICAL_COSINE) {
                    value = 1.0f + value * of_row * of_column[c];
                } else if (p.kind == OPTICAL_SQEUCLIDEAN) {
                    value = of_row + of_column[c] + 2.0f * value;
                    value = value < 0.0f ? 0.0f : value;
                }
                const bool pair = (rows_here >> r & 1u) & (columns_here >> c & 1u);
                valid &= is_finite(value) | !pair;
                cost(r, c) = pair ? value : infinity();
            }
        }
        return valid;
    }
};

}  // namespace cuda
}  // namespace optical
