// The cost, read or computed from vectors into the private arrays in shared memory.
//
// Products of vectors are sums over chunks of the dimension that pass through shared memory. Half
// vectors go to the tensor cores, whose products of halves are exact and whose sums are in float32.
// For the cosine, other vectors do so too: each number of a vector scaled to a length near 1 is
// split into two float16, and of the four products of two numbers the one below 2^-24 is omitted.
// Squared distances, whose vectors are shifted first, and dot products of float32 vectors are
// computed in float32.
#pragma once

#include "problem.cuh"

namespace optical {
namespace cuda {

template <typename G>
struct Cost {
    static constexpr int RI = G::RI, RJ = G::RJ;
    // Numbers are multiplied by this before they are split. What underflows in float16 is then far
    // below 2^-24.
    static constexpr float split_scale = 4096.0f;

    Problem<G>& problem;
    const G& grid;

    OPTICAL_DEVICE explicit Cost(Problem<G>& problem) : problem(problem), grid(problem.grid) {}

    // Fills the private cost. Returns false if this thread found NaN or -inf among its valid pairs.
    OPTICAL_DEVICE bool fill() {
        unsigned valid_rows = 0, valid_columns = 0;
        OPTICAL_KEEP_LOOP
        for (int r = 0; r < RI; ++r) valid_rows |= (unsigned)problem.valid_row(grid.row(r)) << r;
        OPTICAL_UNROLL_LOOP
        for (int c = 0; c < RJ; ++c)
            valid_columns |= (unsigned)problem.valid_column(grid.column(c)) << c;
        return problem.batch.kind == OPTICAL_GIVEN ? read(valid_rows, valid_columns)
                                       : multiply(valid_rows, valid_columns);
    }

    OPTICAL_DEVICE bool read(unsigned valid_rows, unsigned valid_columns) const {
        const float* const from =
            (const float*)problem.batch.x + problem.index * problem.batch.x_stride_batch;
        bool usable = true;
        OPTICAL_KEEP_LOOP
        for (int r = 0; r < RI; ++r)
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c) {
                float value = infinity();
                if ((valid_rows >> r & 1u) & (valid_columns >> c & 1u)) {
                    value = from[grid.row(r) * problem.batch.x_stride_row +
                                 grid.column(c) * problem.batch.x_stride_entry];
                    usable &= value > -infinity();
                }
                problem.cost(r, c) = value;
            }
        return usable;
    }

    // ------------------------------------------------------------------------- vectors, in float32

    OPTICAL_DEVICE int pitch() const { return problem.block_rows + problem.block_columns + 2; }

    // Stages components k to k + chunk of the entries from `from` to `end` in shared memory.
    OPTICAL_DEVICE void stage_chunk(float* to, int from, int end, int64_t k, int at) const {
        constexpr int parts = G::lanes < chunk ? G::lanes : chunk;
        OPTICAL_UNROLL_LOOP
        for (int part = grid.thread % parts, end_part = part + chunk; part < end_part;
             part += parts) {
            const float shift =
                k + part < problem.batch.dim ? problem.origin_component(at, k + part) : 0.0f;
            for (int entry = from + grid.thread / parts; entry < end;
                 entry += grid.threads / parts) {
                float x = 0;
                if (k + part < problem.batch.dim && problem.prescale[entry] != 0.0f)
                    x = problem.component(entry, k + part) - shift;
                to[part * pitch() + entry] = x;
            }
        }
    }

    OPTICAL_DEVICE void multiply_floats(float (&x)[RI][RJ]) {
        const int at = problem.batch.kind == OPTICAL_SQEUCLIDEAN ? problem.origin() : 0;
        float* const staged = (float*)problem.stage;
        OPTICAL_UNROLL_LOOP
        for (int r = 0; r < RI; ++r)
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c) x[r][c] = 0;
        for (int64_t k = 0; k < problem.batch.dim; k += chunk) {
            stage_chunk(staged, 0, problem.block_rows + problem.block_columns, k, at);
            grid.sync_own_block();
            for (int part = 0; part < chunk; ++part) {
                const float* const components = staged + part * pitch();
                float of_row[RI], of_column[RJ];
                OPTICAL_UNROLL_LOOP
                for (int r = 0; r < RI; ++r)
                    of_row[r] = components[grid.row(r) - problem.block_first_row];
                OPTICAL_UNROLL_LOOP
                for (int c = 0; c < RJ; ++c)
                    of_column[c] = components[problem.block_rows + grid.column(c)];
                OPTICAL_UNROLL_LOOP
                for (int r = 0; r < RI; ++r)
                    OPTICAL_UNROLL_LOOP
                    for (int c = 0; c < RJ; ++c)
                        x[r][c] = fused(of_row[r], of_column[c], x[r][c]);
            }
            grid.sync_own_block();
        }
    }

    // ---------------------------------------------------------------- vectors, on the tensor cores

    // A copy of the problem of another team for the whole warp, since all lanes of a warp multiply
    // fragments together.
    OPTICAL_DEVICE Problem<G> of_team(int team) const {
        Problem<G> other = problem;
        const int bytes = (team - grid.team) * Problem<G>::team_bytes(1, 1, problem.batch.kind);
        other.choose(shuffle(problem.has_problem ? (int)problem.index : -1, team * G::lanes));
        other.scaled = shuffle((int)problem.scaled, team * G::lanes) != 0;
        other.stage = problem.stage + bytes;
        other.prescale = (float*)((char*)problem.prescale + bytes);
        other.norm = (float*)((char*)problem.norm + bytes);
        other.grid.thread = other.grid.lane = thread_index(), other.grid.threads = 32;
        return other;
    }
    OPTICAL_DEVICE void sync_together() const {
        if (G::teams > 1) sync_warp();
        else grid.sync_own_block();
    }

    // The position of eight components of an entry in a staged chunk. Eight entries that one load
    // of fragments reads lie in different banks, and the permutation repeats every eight entries.
    template <int components>
    OPTICAL_DEVICE static int place(int entry, int eighth) {
        constexpr int parts = components / 8;
        return entry * components + (eighth ^ entry / (8 / parts) % parts) * 8;
    }

    // Starts copying components k to k + components of all entries into shared memory. The copy is
    // complete after wait_for_copies() and a barrier.
    template <int components>
    OPTICAL_DEVICE void stage_halves(uint16_t* to, int64_t k) const {
        stage_side<components, Route::halves>(to, 0, problem.block_rows, problem.a,
                                              problem.block_first_row, k);
        stage_side<components, Route::halves>(to, problem.block_rows, problem.block_columns,
                                              problem.b, 0, k);
    }
    // Stages split numbers: the upper halves of all entries, then the lower halves.
    template <int components>
    OPTICAL_DEVICE void stage_split(uint16_t* to, int64_t k) const {
        stage_side<components, Route::split>(to, 0, problem.block_rows, problem.a,
                                             problem.block_first_row, k);
        stage_side<components, Route::split>(to, problem.block_rows, problem.block_columns,
                                             problem.b, 0, k);
    }

    // Stages `count` entries from `first_entry` on, which are rows or columns `first_of_side` on of
    // a side. A thread copies the same eighth of every eighth entry, or of a multiple of eight, so
    // its address increments are constant.
    template <int components, Route route>
    OPTICAL_DEVICE void stage_side(uint16_t* to, int first_entry, int count, const Side& side,
                                   int first_of_side, int64_t k) const {
        constexpr int parts = components / 8;
        const int part = grid.thread % parts, step = grid.threads / parts,
                  bytes = bytes_of(side.type);
        const int64_t rest = problem.batch.dim - k - 8 * part, stride = side.stride * bytes;
        int entry = grid.thread / parts;
        const char* from = side.vectors + (first_of_side + entry) * stride + (k + 8 * part) * bytes;
        entry += first_entry;
        to += place<components>(entry, part);
        const bool aligned = ((uintptr_t)from & 15) == 0;
        const int lower = (problem.block_rows + problem.block_columns) * components;
        OPTICAL_KEEP_LOOP
        for (; entry < first_entry + count;
             entry += step, from += step * stride, to += step * components) {
            const bool valid = problem.prescale[entry] != 0.0f;
            if (route == Route::split) {
                float x[8];
                load_eight(from, side.type, aligned, valid ? rest : 0, x);
                split_eight(x, problem.prescale[entry] * split_scale, to, to + lower);
            } else if (aligned && rest >= 8) {
                copy_async(to, from, valid);
            } else {
                *(Eight*)to = few(from, valid ? rest : 0);
            }
        }
    }
    OPTICAL_DEVICE static Eight few(const char* from, int64_t count) {
        Eight eight = {};
        OPTICAL_UNROLL_LOOP
        for (int e = 0; e < 8; ++e)
            if (e < count) eight.values[e] = ((const uint16_t*)from)[e];
        return eight;
    }
    OPTICAL_DEVICE static void split_eight(const float (&x)[8], float scale, uint16_t* upper,
                                           uint16_t* lower) {
        Eight high, low;
        OPTICAL_UNROLL_LOOP
        for (int e = 0; e < 8; ++e)
            split_number<false>(x[e] * scale, high.values[e], low.values[e]);
        *(Eight*)upper = high, *(Eight*)lower = low;
    }

    // Adds the squares of a staged chunk to the norms: each group of sixteen entries is multiplied
    // with itself, and the diagonal is kept.
    template <int components, bool bfloat>
    OPTICAL_DEVICE void add_squares(const uint16_t* staged) const {
        const int diagonal_row = grid.lane / 4, odd = diagonal_row % 2;
        const uint16_t *left[components / 16], *right[components / 16];
        OPTICAL_UNROLL_LOOP
        for (int k = 0; k < components / 16; ++k) {
            left[k] = staged + place<components>(grid.lane % 16, 2 * k + grid.lane / 16);
            right[k] = staged + place<components>(grid.lane / 16 * 8 + grid.lane % 8,
                                                  2 * k + grid.lane / 8 % 2);
        }
        OPTICAL_KEEP_LOOP
        for (int first = 16 * grid.warp; first < problem.block_rows + problem.block_columns;
             first += 16 * grid.down * grid.across) {
            float upper[4] = {0, 0, 0, 0}, lower[4] = {0, 0, 0, 0};
            OPTICAL_UNROLL_LOOP
            for (int k = 0; k < components / 16; ++k) {
                unsigned x[4], y[4];
                load_matrices<false>(x, left[k] + first * components);
                load_matrices<false>(y, right[k] + first * components);
                const unsigned low[2] = {y[0], y[1]}, high[2] = {y[2], y[3]};
                optical::cuda::multiply_fragments(upper, x, low, bfloat);
                optical::cuda::multiply_fragments(lower, x, high, bfloat);
            }
            if (diagonal_row / 2 != grid.lane % 4) continue;
            problem.norm[first + diagonal_row] += odd ? upper[1] : upper[0];
            problem.norm[first + 8 + diagonal_row] += odd ? lower[3] : lower[2];
        }
    }

    // sum += the products of sixteen components of TALL x 16 rows and WIDE x 8 columns.
    template <int TALL, int WIDE>
    OPTICAL_DEVICE static void add_products(float (&sum)[TALL][WIDE][4], const uint16_t* rows,
                                            const uint16_t* columns, bool bfloat) {
        constexpr int components = Problem<G>::half_chunk;
        unsigned right[WIDE][2];
        OPTICAL_UNROLL_LOOP
        for (int j = 0; j < WIDE / 2; ++j) {
            unsigned pairs[4];
            load_matrices<false>(pairs, columns + j * 16 * components);
            right[2 * j][0] = pairs[0], right[2 * j][1] = pairs[1];
            right[2 * j + 1][0] = pairs[2], right[2 * j + 1][1] = pairs[3];
        }
        OPTICAL_UNROLL_LOOP
        for (int i = 0; i < TALL; ++i) {
            unsigned left[4];
            load_matrices<false>(left, rows + i * 16 * components);
            OPTICAL_UNROLL_LOOP
            for (int j = 0; j < WIDE; ++j)
                optical::cuda::multiply_fragments(sum[i][j], left, right[j], bfloat);
        }
    }
    // Adds the products of a staged chunk of split numbers. The product of the two lower halves is
    // below the last digit and omitted.
    //
    // Tensor cores cut their sums off instead of rounding them. Therefore a chunk has accumulators
    // of its own, in blocks that fit in registers, and float32 additions sum up the chunks.
    template <int TALL, int WIDE>
    OPTICAL_DEVICE void add_split_products(float (&sum)[TALL][WIDE][4], const uint16_t* staged,
                                           int plane, int lane_row, int lane_column) const {
        constexpr int components = Problem<G>::half_chunk;
        constexpr int tall = TALL < 2 ? TALL : 2, wide = WIDE < 4 ? WIDE : 4;
        OPTICAL_UNROLL_LOOP
        for (int i = 0; i < TALL; i += tall)
            OPTICAL_UNROLL_LOOP
            for (int j = 0; j < WIDE; j += wide) {
                float part[tall][wide][4] = {};
                OPTICAL_KEEP_LOOP
                for (int step = 0; step < 3 * (components / 16); ++step) {
                    const int product = step / (components / 16), k = step % (components / 16);
                    const uint16_t* const rows =
                        staged + (product == 1 ? plane : 0) +
                        place<components>(lane_row + 16 * i, 2 * k + grid.lane / 16);
                    const uint16_t* const columns =
                        staged + (product == 2 ? plane : 0) +
                        place<components>(lane_column + 8 * j, 2 * k + grid.lane / 8 % 2);
                    add_products<tall, wide>(part, rows, columns, false);
                }
                OPTICAL_UNROLL_LOOP
                for (int e = 0; e < tall * wide * 4; ++e)
                    sum[i + e / 4 / wide][j + e / 4 % wide][e % 4] +=
                        part[e / 4 / wide][e / 4 % wide][e % 4];
            }
    }

    // Multiplies all rows and columns into a matrix in shared memory.
    template <bool bfloat, Route route>
    OPTICAL_DEVICE void multiply_fragments() const {
        constexpr bool split = route == Route::split;
        constexpr int tall = G::tile_rows / 16, wide = G::tile_columns / 8,
                      components = Problem<G>::half_chunk;
        uint16_t* const staged = (uint16_t*)problem.stage;
        const int plane = (problem.block_rows + problem.block_columns) * components;
        float sum[tall][wide][4];
        OPTICAL_UNROLL_LOOP
        for (int i = 0; i < tall; ++i)
            OPTICAL_UNROLL_LOOP
            for (int j = 0; j < wide; ++j)
                OPTICAL_UNROLL_LOOP
                for (int e = 0; e < 4; ++e) sum[i][j][e] = 0;
        const int lane_row = grid.warp_down * G::tile_rows + grid.lane % 16;
        const int lane_column = problem.block_rows + grid.warp_across * G::tile_columns +
                                grid.lane / 16 * 8 + grid.lane % 8;
        // While one chunk of halves is multiplied, the next one is copied into the other buffer.
        // Split numbers use both buffers for their two halves.
        int current = 0;
        if (!split) stage_halves<components>(staged, 0);
        OPTICAL_KEEP_LOOP
        for (int64_t k = 0; k < problem.batch.dim; k += components) {
            if (split) {
                sync_together();
                stage_split<components>(staged, k);
                sync_together();
            } else {
                wait_for_copies();
                sync_together();
                if (k + components < problem.batch.dim)
                    stage_halves<components>(staged + (plane - current), k + components);
                if (!problem.norms_known) add_squares<components, bfloat>(staged + current);
            }
            if (split) {
                add_split_products(sum, staged, plane, lane_row, lane_column);
                continue;
            }
            OPTICAL_KEEP_LOOP
            for (int sixteen = 0; sixteen < components / 16; ++sixteen) {
                const uint16_t* const rows =
                    staged + current + place<components>(lane_row, 2 * sixteen + grid.lane / 16);
                const uint16_t* const columns =
                    staged + current +
                    place<components>(lane_column, 2 * sixteen + grid.lane / 8 % 2);
                add_products<tall, wide>(sum, rows, columns, bfloat);
            }
            current = plane - current;
        }
        sync_together();
        float* const matrix = (float*)problem.stage;
        const int corner = (grid.warp_down * G::tile_rows + grid.lane / 4) * problem.block_columns +
                           grid.warp_across * G::tile_columns + 2 * (grid.lane % 4);
        constexpr float scale = split ? 1 / (split_scale * split_scale) : 1.0f;
        OPTICAL_UNROLL_LOOP
        for (int i = 0; i < tall; ++i)
            OPTICAL_UNROLL_LOOP
            for (int j = 0; j < wide; ++j)
                OPTICAL_UNROLL_LOOP
                for (int e = 0; e < 4; ++e)
                    matrix[corner + (i * 16 + e / 2 * 8) * problem.block_columns + j * 8 + e % 2] =
                        scale * sum[i][j][e];
        sync_together();
    }
    OPTICAL_DEVICE void multiply_fragments() const {
        if (problem.route() == Route::split) multiply_fragments<false, Route::split>();
        else if (problem.batch.x_type == OPTICAL_BF16) multiply_fragments<true, Route::halves>();
        else multiply_fragments<false, Route::halves>();
    }
    OPTICAL_DEVICE void multiply_together() const {
        if constexpr (G::teams == 1) {
            multiply_fragments();
        } else {
            // All lanes read the prescales that each team wrote for itself.
            sync_together();
            OPTICAL_KEEP_LOOP
            for (int team = 0; team < G::teams; ++team) {
                Problem<G> other = of_team(team);
                Cost<G>(other).multiply_fragments();
            }
        }
    }
    OPTICAL_DEVICE void take_products(float (&x)[RI][RJ]) const {
        const float* const matrix = (const float*)problem.stage;
        OPTICAL_UNROLL_LOOP
        for (int r = 0; r < RI; ++r)
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c)
                x[r][c] = matrix[(grid.row(r) - problem.block_first_row) * problem.block_columns +
                                 grid.column(c)];
        grid.sync_own_block();
    }

    // --------------------------------------------------------------------------------- all vectors

    OPTICAL_DEVICE bool multiply(unsigned valid_rows, unsigned valid_columns) {
        float x[RI][RJ];
        const bool halves = problem.uses_half_vectors();
        if (!halves && problem.batch.kind != OPTICAL_COSINE) {
            problem.compute_norms();
            multiply_floats(x);
        } else {
            // Repeats with scaled vectors if squared lengths left the range, in any team of the
            // warp.
            bool again = true, during_products = halves;
            OPTICAL_KEEP_LOOP
            while (G::teams == 1 ? again : warp_any(again)) {
                if (again && during_products) problem.begin_norms();
                else if (again) problem.compute_norms();
                during_products = false;
                const bool had_norms = problem.norms_known;
                multiply_together();
                again = !had_norms && !problem.finish_norms();
            }
            take_products(x);
        }
        OPTICAL_UNROLL_LOOP
        for (int r = 0; r < RI; ++r)
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c) problem.cost(r, c) = x[r][c];
        bool usable = true;
        float of_column[RJ];
        OPTICAL_UNROLL_LOOP
        for (int c = 0; c < RJ; ++c)
            of_column[c] = problem.norm[problem.block_rows + grid.column(c)];
        OPTICAL_KEEP_LOOP
        for (int r = 0; r < RI; ++r) {
            const float of_row = problem.norm[grid.row(r) - problem.block_first_row];
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c) {
                float value = -problem.cost(r, c);
                if (problem.batch.kind == OPTICAL_COSINE) {
                    value = 1.0f + value * of_row * of_column[c];
                } else if (problem.batch.kind == OPTICAL_SQEUCLIDEAN) {
                    value = of_row + of_column[c] + 2.0f * value;
                    value = value < 0.0f ? 0.0f : value;
                }
                const bool valid_pair = (valid_rows >> r & 1u) & (valid_columns >> c & 1u);
                usable &= is_finite(value) | !valid_pair;
                problem.cost(r, c) = valid_pair ? value : infinity();
            }
        }
        return usable;
    }
};

}  // namespace cuda
}  // namespace optical
