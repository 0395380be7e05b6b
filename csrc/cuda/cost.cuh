// One problem of the batch: its lines, its masses, and its cost, which stays in shared memory.
//
// Every thread keeps the cost of its own entries, and what belongs to the lines it owns, in a
// private column of shared memory, value k at mine[k * threads]: no bank conflicts, no barriers.
// Absent lines have no mass and cost +inf; what stands in them is never loaded.
//
// From vectors, products are summed over chunks of the dimension that pass through shared memory
// before the cost is written there. Vectors are used as they are: for the cosine the
// inverse lengths multiply the sums, and a vector whose squares would leave the range is scaled by
// a power of two first; for the squared distance both clouds are moved so that one of the points
// is the origin, without which the difference of large squares would lose every digit.
#pragma once

#include "group.cuh"

namespace optical {
namespace cuda {

// Masses that differ by more than this part have no plan between them.
constexpr double unequal = 1e-3;
constexpr int chunk = 16;  // of the dimension

// Names of what a thread keeps for each row, and for each column, that it owns. `PAD` is 1 where
// no pair is allowed and 0 elsewhere: added to a sum that is 0 there, it makes a scaling 1 and a
// potential 0. `WEIGHT` is the mass, but 0 where PAD is 1.
enum Kept { LOG, MASS, WEIGHT, PAD, BASE, POTENTIAL, NEXT, SUMS, SPENT, SOLUTION, KEEP_1, KEEP_2,
            KEEP_3, KEEP_4, kept_count };

struct Lines {
    int64_t first;  // in arrays by line
    int count;
    const char* vectors;
    int32_t type;
    int64_t stride;
};

OPTICAL_DEVICE int bytes_of(int32_t type) { return type == OPTICAL_F32 ? 4 : 2; }

OPTICAL_DEVICE Lines lines_a(const optical_problem& p, int64_t index) {
    const int64_t* const offset = p.offset_a;
    Lines s = {offset ? offset[index] : index * p.n,
               (int)(offset ? offset[index + 1] - offset[index] : p.n), nullptr, p.x_type,
               p.x_stride_line};
    const int64_t start = offset ? s.first * p.x_stride_line : index * p.x_stride_batch;
    s.vectors = (const char*)p.x + start * bytes_of(p.x_type);
    return s;
}
OPTICAL_DEVICE Lines lines_b(const optical_problem& p, int64_t index) {
    const int64_t* const offset = p.offset_b;
    Lines s = {offset ? offset[index] : index * p.m,
               (int)(offset ? offset[index + 1] - offset[index] : p.m), nullptr, p.y_type,
               p.y_stride_line};
    const int64_t start = offset ? s.first * p.y_stride_line : index * p.y_stride_batch;
    s.vectors = (const char*)p.y + start * bytes_of(p.y_type);
    return s;
}

template <typename G>
struct Cost {
    static constexpr int RI = G::RI, RJ = G::RJ, OI = G::OI, OJ = G::OJ;
    static constexpr int private_floats = RI * RJ + (OI + OJ) * kept_count;
    // Of half vectors, whose chunks are two in memory: with lines this far apart no two lanes of a
    // fragment meet in a bank.
    static constexpr int half_chunk = G::tile_rows > 32 ? 32 : 16, half_pitch = half_chunk + 8;

    const optical_problem& p;
    G g;
    Lines a, b;
    int64_t index;
    bool is_there;  // otherwise this team has no problem, and plays one without lines
    float* mine;
    // Of the vectors of this block's rows, then of all columns: the power of two that scales them,
    // and the inverse of their length (0 for the zero vector) or their squared length.
    float *unit, *measure;
    unsigned* half_words;
    char* stage;
    int block_rows, block_columns, base_row;

    static OPTICAL_ANYWHERE int line_bytes(int down, int across, int32_t kind) {
        if (kind == OPTICAL_GIVEN) return 0;
        return 2 * 4 * (down * G::tile_rows + across * G::tile_columns);
    }
    // What stands before the private arrays.
    static OPTICAL_ANYWHERE int fixed_bytes(int down, int across, int32_t kind) {
        return G::exchange_bytes(down, across) + line_bytes(down, across, kind) +
               4 * G::half_words * down * across;
    }
    // Of all teams; their private columns lie in different banks.
    static OPTICAL_ANYWHERE int shared_bytes(int down, int across, int32_t kind) {
        return G::teams * bytes_of_team(down, across, kind);
    }
    static OPTICAL_ANYWHERE int bytes_of_team(int down, int across, int32_t kind) {
        const int bytes = bytes_of_problem(down, across, kind);
        return G::teams == 1 ? bytes : (bytes + 127) / 128 * 128 + 4 * G::lanes;
    }
    static OPTICAL_ANYWHERE int bytes_of_problem(int down, int across, int32_t kind) {
        const int lines = down * G::tile_rows + across * G::tile_columns;
        int work = private_floats * G::lanes * down * across * 4;
        const int staged = kind == OPTICAL_GIVEN ? 0 : chunk * (lines + 4) * 4;
        const int ahead = kind == OPTICAL_GIVEN ? 0 : 2 * half_pitch * lines * 2;
        if (staged > work) work = staged;
        if (ahead > work) work = ahead;
        return fixed_bytes(down, across, kind) + work;
    }

    OPTICAL_DEVICE Cost(const optical_problem& problem) : p(problem) {}

    // `problem` may be -1 where a warp has several teams: none.
    OPTICAL_DEVICE void start(int64_t problem, int down, int across) {
        choose(problem);
        char* memory = shared_memory();
        g.start(memory, down, across);
        if (G::teams > 1) memory += g.team * bytes_of_team(down, across, p.kind);
        block_rows = down * G::tile_rows, block_columns = across * G::tile_columns;
        base_row = g.rank * block_rows;
        unit = (float*)(memory + G::exchange_bytes(down, across));
        measure = unit + block_rows + block_columns;
        stage = memory + fixed_bytes(down, across, p.kind);
        half_words = (unsigned*)stage - G::half_words * down * across;
        mine = (float*)stage + g.thread;
    }

    OPTICAL_DEVICE void choose(int64_t problem) {
        is_there = G::teams == 1 || problem >= 0;
        index = is_there ? problem : 0;
        a = lines_a(p, index), b = lines_b(p, index);
        if (!is_there) a.count = b.count = 0;
    }

    OPTICAL_DEVICE float& cost(int r, int c) const { return mine[(r * RJ + c) * g.threads]; }
    OPTICAL_DEVICE float& row(int name, int o) const {
        return mine[(RI * RJ + name * OI + o) * g.threads];
    }
    OPTICAL_DEVICE float& column(int name, int o) const {
        return mine[(RI * RJ + kept_count * OI + name * OJ + o) * g.threads];
    }
    OPTICAL_DEVICE void rows_of(int name, float (&x)[RI]) const {
        float own[OI];
        OPTICAL_EACH
        for (int o = 0; o < OI; ++o) own[o] = row(name, o);
        g.spread_rows(own, x);
    }
    OPTICAL_DEVICE void columns_of(int name, float (&x)[RJ]) const {
        float own[OJ];
        OPTICAL_EACH
        for (int o = 0; o < OJ; ++o) own[o] = column(name, o);
        g.spread_columns(own, x);
    }

    // The log-mass of a line of this problem, -inf past its end.
    OPTICAL_DEVICE float log_a(int i) const {
        return i < a.count ? ((const float*)p.log_a)[a.first + i] : -infinity();
    }
    OPTICAL_DEVICE float log_b(int j) const {
        return j < b.count ? ((const float*)p.log_b)[b.first + j] : -infinity();
    }
    OPTICAL_DEVICE bool present_a(int i) const { return log_a(i) != -infinity(); }
    OPTICAL_DEVICE bool present_b(int j) const { return log_b(j) != -infinity(); }

    // A forbidden pair costs nothing, because nothing moves there.
    OPTICAL_DEVICE float price(int r, int c) const {
        const float x = cost(r, c);
        return x < infinity() ? x : 0.0f;
    }

    // Fills the private cost. False, for this thread: NaN or -inf among present pairs.
    OPTICAL_DEVICE bool fill() {
        unsigned rows_here = 0, columns_here = 0;
        OPTICAL_ROLLED
        for (int r = 0; r < RI; ++r) rows_here |= (unsigned)present_a(g.row(r)) << r;
        OPTICAL_EACH
        for (int c = 0; c < RJ; ++c) columns_here |= (unsigned)present_b(g.column(c)) << c;
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
                    value = from[g.row(r) * p.x_stride_line + g.column(c) * p.x_stride_entry];
                    valid &= value > -infinity();
                }
                cost(r, c) = value;
            }
        return valid;
    }

    // ---------------------------------------------------------------------------------- vectors

    // Line `l` of this block: its rows, then all columns.
    OPTICAL_DEVICE bool of_rows(int l) const { return l < block_rows; }
    OPTICAL_DEVICE bool present(int l) const {
        return of_rows(l) ? present_a(base_row + l) : present_b(l - block_rows);
    }
    OPTICAL_DEVICE float entry(int l, int64_t k) const {
        return of_rows(l) ? load(a.vectors, a.type, (base_row + l) * a.stride + k)
                          : load(b.vectors, b.type, (l - block_rows) * b.stride + k);
    }
    // The point that becomes the origin: the first column that is there.
    OPTICAL_DEVICE int origin() const {
        for (int j = 0; j < b.count; ++j)
            if (present_b(j)) return j;
        return 0;
    }
    OPTICAL_DEVICE float origin_entry(int at, int64_t k) const {
        return p.kind == OPTICAL_SQEUCLIDEAN ? load(b.vectors, b.type, at * b.stride + k) : 0.0f;
    }

    // Units and measures of all lines, a warp, or a team, for each line in turn. True, for this thread:
    // there is a unit other than 1.
    OPTICAL_DEVICE bool measure_lines() {
        bool scaled = false;
        const int at = p.kind == OPTICAL_SQEUCLIDEAN ? origin() : 0;
        for (int l = g.warp; l < block_rows + block_columns; l += g.down * g.across) {
            float scale = 1, sum = 0;
            if (p.kind != OPTICAL_DOT && present(l)) {
                float peak = 0;
                for (int64_t k = g.lane; k < p.dim; k += G::lanes) {
                    const float x = entry(l, k) - origin_entry(at, k);
                    sum = fused(x, x, sum);
                    peak = larger(peak, absolute(x));
                }
                sum = G::over_lanes(sum);
                if (p.kind == OPTICAL_COSINE && !(sum > 1e-30f && sum < 1e37f)) {
                    OPTICAL_EACH
                    for (int mask = G::lanes / 2; mask > 0; mask /= 2)
                        peak = larger(peak, shuffle_xor<G::lanes>(peak, mask));
                    // The power of two below 1 / peak; exponents stay within the normal range.
                    const int exponent = (int)(bits_of(peak) >> 23 & 0xffu);
                    const int wanted = 253 - exponent;
                    scale = float_of((unsigned)(wanted < 1 ? 1 : wanted > 253 ? 253 : wanted) << 23);
                    sum = 0;
                    for (int64_t k = g.lane; k < p.dim; k += G::lanes) {
                        const float x = entry(l, k) * scale;
                        sum = fused(x, x, sum);
                    }
                    sum = G::over_lanes(sum);
                }
            }
            if (g.lane == 0) {
                scaled |= scale != 1.0f;
                unit[l] = scale;
                measure[l] = p.kind != OPTICAL_COSINE ? sum : sum > 0 ? inverse_root(sum) : 0.0f;
            }
        }
        return scaled;
    }

    OPTICAL_DEVICE int pitch() const { return block_rows + block_columns + 2; }

    // Puts entries k to k + chunk of the lines from `from` to `end` into shared memory.
    OPTICAL_DEVICE void stage_chunk(float* to, int from, int end, int64_t k, int at) const {
        constexpr int parts = G::lanes < chunk ? G::lanes : chunk;
        OPTICAL_EACH
        for (int part = g.thread % parts, end_part = part + chunk; part < end_part; part += parts) {
            const float shift = k + part < p.dim ? origin_entry(at, k + part) : 0.0f;
            for (int l = from + g.thread / parts; l < end; l += g.threads / parts) {
                float x = 0;
                if (k + part < p.dim && present(l)) x = (entry(l, k + part) - shift) * unit[l];
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

    // The problem of another team, for all lanes of the warp.
    OPTICAL_DEVICE Cost of_team(int team) const {
        Cost other = *this;
        if (G::teams == 1) return other;
        other.choose(shuffle(is_there ? (int)index : -1, team * G::lanes));
        other.stage = stage + (team - g.team) * bytes_of_team(1, 1, p.kind);
        other.g.thread = other.g.lane = thread_index(), other.g.threads = 32;
        return other;
    }
    OPTICAL_DEVICE void sync_together() const {
        if (G::teams > 1) sync_warp();
        else g.sync_own_block();
    }

    // Has entries k to k + half_chunk of all lines come into shared memory: after wait_for_copies()
    // of every thread they are there.
    OPTICAL_DEVICE void stage_halves(uint16_t* to, int64_t k) const {
        struct alignas(16) Eight {
            uint16_t entry[8];
        };
        const int parts = half_chunk / 8;
        for (int piece = g.thread; piece < (block_rows + block_columns) * parts;
             piece += g.threads) {
            const int l = piece / parts;
            const int64_t first = k + piece % parts * 8;
            const int64_t line = of_rows(l) ? (base_row + l) * a.stride : (l - block_rows) * b.stride;
            const uint16_t* const from =
                (const uint16_t*)(of_rows(l) ? a.vectors : b.vectors) + line + first;
            Eight* const place = (Eight*)(to + l * half_pitch + piece % parts * 8);
            const bool here = present(l);
            if (here && first + 8 <= p.dim && ((uintptr_t)from & 15) == 0) {
                copy_ahead(place, from);
                continue;
            }
            Eight eight = {};
            OPTICAL_EACH
            for (int e = 0; e < 8; ++e)
                if (here && first + e < p.dim) eight.entry[e] = from[e];
            *place = eight;
        }
    }

    // Products of half vectors, from fragments into a matrix in shared memory: a whole warp is needed
    // for each problem, so teams are there together, for the problem of one after the other.
    template <bool brain>
    OPTICAL_DEVICE void multiply_halves() const {
        constexpr int tall = G::tile_rows / 16, wide = G::tile_columns / 8;
        uint16_t* const staged = (uint16_t*)stage;
        const int first = g.lane / 4, second = g.lane % 4;
        float sum[tall][wide][4];
        OPTICAL_EACH
        for (int i = 0; i < tall; ++i)
            OPTICAL_EACH
            for (int j = 0; j < wide; ++j)
                OPTICAL_EACH
                for (int e = 0; e < 4; ++e) sum[i][j][e] = 0;
        const uint16_t* const rows =
            staged + (g.warp_down * G::tile_rows + first) * half_pitch + 2 * second;
        const uint16_t* const columns =
            staged + (block_rows + g.warp_across * G::tile_columns + first) * half_pitch +
            2 * second;
        // While one chunk is multiplied the next one is on its way, into the memory of the last.
        int here = 0, next = (block_rows + block_columns) * half_pitch;
        stage_halves(staged, 0);
        OPTICAL_ROLLED
        for (int64_t k = 0; k < p.dim; k += half_chunk) {
            wait_for_copies();
            sync_together();
            if (k + half_chunk < p.dim) stage_halves(staged + next, k + half_chunk);
            OPTICAL_ROLLED
            for (int part = here; part < here + half_chunk; part += 16) {
                unsigned right[wide][2];
                OPTICAL_EACH
                for (int j = 0; j < wide; ++j)
                    OPTICAL_EACH
                    for (int e = 0; e < 2; ++e)
                        right[j][e] =
                            *(const unsigned*)(columns + j * 8 * half_pitch + part + 8 * e);
                OPTICAL_EACH
                for (int i = 0; i < tall; ++i) {
                    unsigned left[4];
                    OPTICAL_EACH
                    for (int e = 0; e < 4; ++e)
                        left[e] = *(const unsigned*)(rows + (i * 16 + e % 2 * 8) * half_pitch +
                                                     part + e / 2 * 8);
                    OPTICAL_EACH
                    for (int j = 0; j < wide; ++j)
                        multiply_fragments(sum[i][j], left, right[j], brain);
                }
            }
            const int last = here;
            here = next, next = last;
        }
        sync_together();
        // From fragments to the tile of a lane, by way of shared memory.
        float* const matrix = (float*)stage;
        const int corner = (g.warp_down * G::tile_rows + first) * block_columns +
                           g.warp_across * G::tile_columns + 2 * second;
        OPTICAL_EACH
        for (int i = 0; i < tall; ++i)
            OPTICAL_EACH
            for (int j = 0; j < wide; ++j)
                OPTICAL_EACH
                for (int e = 0; e < 4; ++e)
                    matrix[corner + (i * 16 + e / 2 * 8) * block_columns + j * 8 + e % 2] =
                        sum[i][j][e];
        sync_together();
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

    // Half vectors as they are go through the tensor cores, whose products are exact and whose sums
    // are in float32; what has to be moved or scaled first, and float32, does not.
    OPTICAL_DEVICE bool multiply(unsigned rows_here, unsigned columns_here) {
        float x[RI][RJ];
        const bool scaled = g.any(measure_lines());
        const bool halves = p.x_type != OPTICAL_F32 && p.x_type == p.y_type;
        const bool fragments = halves && p.kind != OPTICAL_SQEUCLIDEAN;
        if (fragments && (G::teams > 1 || !scaled)) {
            OPTICAL_ROLLED
            for (int team = 0; team < G::teams; ++team) {
                const Cost one = of_team(team);
                if (p.x_type == OPTICAL_BF16) one.template multiply_halves<true>();
                else one.template multiply_halves<false>();
            }
            take_products(x);
        }
        if (!fragments || scaled) multiply_floats(x);
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
