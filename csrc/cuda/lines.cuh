// One problem of the batch: its lines, and where its threads keep what they know of them.
//
// Every thread keeps the cost of its own entries, and what belongs to the lines it owns, in a
// private column of shared memory, value k at mine[k * threads]: no bank conflicts, no barriers.
// Absent lines have no mass and cost +inf; what stands in them is never loaded.
//
// Vectors are used as they are: for the cosine the inverse lengths multiply the products, and a vector
// whose squares would leave the range is scaled by a power of two first; for the squared distance both
// clouds are moved so that one of the points is the origin, without which the difference of large
// squares would lose every digit.
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

// Of problem `index`: `count` lines, or as many as the offsets say.
OPTICAL_DEVICE Lines lines_of(int64_t index, int64_t count, const int64_t* offset, const void* vectors,
                              int32_t type, int64_t stride_batch, int64_t stride_line) {
    const int64_t first = offset ? offset[index] : index * count;
    const int64_t start = offset ? first * stride_line : index * stride_batch;
    return {first, (int)(offset ? offset[index + 1] - first : count),
            (const char*)vectors + start * bytes_of(type), type, stride_line};
}

// How vectors are multiplied.
enum class Route { floats, halves, split };

template <typename G>
struct Problem {
    static constexpr int RI = G::RI, RJ = G::RJ, OI = G::OI, OJ = G::OJ;
    static constexpr int private_floats = RI * RJ + (OI + OJ) * kept_count;
    // Entries of half vectors that are in shared memory at a time, twice.
    static constexpr int half_chunk = G::tile_rows > 32 ? 32 : 16;

    const optical_problem& p;
    G g;
    Lines a, b;
    int64_t index;
    bool is_there;  // otherwise this team has no problem, and plays one without lines
    float* mine;
    // Of the vectors of this block's rows, then of all columns: the power of two that scales them (0
    // for those that are absent), and the inverse of their length (0 for the zero vector) or their
    // squared length.
    float *unit, *measure;
    unsigned* half_words;
    char* stage;
    bool scaled;    // some unit is not 1
    bool measured;  // measures are known
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
        const int ahead = kind == OPTICAL_GIVEN ? 0 : 2 * half_chunk * lines * 2;
        if (staged > work) work = staged;
        if (ahead > work) work = ahead;
        return fixed_bytes(down, across, kind) + work;
    }

    OPTICAL_DEVICE Problem(const optical_problem& problem) : p(problem) {}

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
        a = lines_of(index, p.n, p.offset_a, p.x, p.x_type, p.x_stride_batch, p.x_stride_row);
        b = lines_of(index, p.m, p.offset_b, p.y, p.y_type, p.y_stride_batch, p.y_stride_column);
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

    // Units of half vectors, whose squares are added up to their measures while they are multiplied.
    OPTICAL_DEVICE void expect_lines() {
        for (int l = g.thread; l < block_rows + block_columns; l += g.threads)
            unit[l] = present(l) ? 1.0f : 0.0f, measure[l] = 0;
        scaled = false, measured = p.kind != OPTICAL_COSINE;
        g.sync_own_block();
    }
    // Measures, from the sums of squares. False: some are too large or too small for numbers.
    OPTICAL_DEVICE bool take_measures() {
        bool lost = false;
        for (int l = g.thread; l < block_rows + block_columns; l += g.threads) {
            const float sum = measure[l];
            lost |= unit[l] != 0.0f && !(sum > 1e-30f && sum < 1e37f);
            measure[l] = sum > 0 ? inverse_root(sum) : 0.0f;
        }
        lost = g.united(lost) != 0;
        g.sync_own_block();
        measured = true;
        return !lost;
    }

    // Units and measures of all lines, a warp, or a team, for each line in turn.
    OPTICAL_DEVICE void measure_lines() {
        bool other = false;
        const int at = p.kind == OPTICAL_SQEUCLIDEAN ? origin() : 0;
        for (int l = g.warp; l < block_rows + block_columns; l += g.down * g.across) {
            const bool here = present(l);
            float scale = here ? 1.0f : 0.0f, sum = 0;
            if (here && p.kind == OPTICAL_SQEUCLIDEAN) {
                for (int64_t k = g.lane; k < p.dim; k += G::lanes) {
                    const float x = entry(l, k) - origin_entry(at, k);
                    sum = fused(x, x, sum);
                }
                sum = G::over_lanes(sum);
            } else if (here && p.kind == OPTICAL_COSINE) {
                sum = squares(l, 1.0f);
                if (!(sum > 1e-30f && sum < 1e37f)) {
                    // The power of two below 1 / the largest entry, within the normal range.
                    const int wanted = 253 - (int)(bits_of(largest_entry(l)) >> 23);
                    scale = float_of((unsigned)(wanted < 1 ? 1 : wanted > 253 ? 253 : wanted) << 23);
                    sum = squares(l, scale);
                    if (sum == 0) scale = 1;
                }
            }
            if (g.lane == 0) {
                other |= here && scale != 1.0f;
                unit[l] = scale;
                measure[l] = p.kind != OPTICAL_COSINE ? sum : sum > 0 ? inverse_root(sum) : 0.0f;
            }
        }
        scaled = g.united(other) != 0, measured = true;
        g.sync_own_block();
        if (route() == Route::split) bring_near_one();
    }

    // The squared length of a line, scaled.
    OPTICAL_DEVICE float squares(int l, float scale) const {
        const int32_t type = of_rows(l) ? a.type : b.type;
        const int64_t line = of_rows(l) ? (base_row + l) * a.stride : (l - block_rows) * b.stride;
        const char* const from =
            (of_rows(l) ? a.vectors : b.vectors) + (line + 8 * g.lane) * bytes_of(type);
        const bool aligned = ((uintptr_t)from & 15) == 0;
        float sum = 0;
        OPTICAL_ROLLED
        for (int64_t k = 8 * g.lane; k < p.dim; k += 8 * G::lanes) {
            float x[8];
            load_eight(from + (k - 8 * g.lane) * bytes_of(type), type, aligned, p.dim - k, x);
            OPTICAL_EACH
            for (int e = 0; e < 8; ++e) sum = fused(x[e] * scale, x[e] * scale, sum);
        }
        return G::over_lanes(sum);
    }
    OPTICAL_DEVICE float largest_entry(int l) const {
        float peak = 0;
        for (int64_t k = g.lane; k < p.dim; k += G::lanes) peak = larger(peak, absolute(entry(l, k)));
        OPTICAL_EACH
        for (int mask = G::lanes / 2; mask > 0; mask /= 2)
            peak = larger(peak, shuffle_xor<G::lanes>(peak, mask));
        return peak;
    }

    OPTICAL_DEVICE bool half_products() const {
        return p.x_type != OPTICAL_F32 && p.x_type == p.y_type && p.kind != OPTICAL_SQEUCLIDEAN;
    }
    // Half vectors as they are; others, for the cosine, as halves of numbers; or float32.
    OPTICAL_DEVICE Route route() const {
        if (half_products() && !scaled) return Route::halves;
        return p.kind == OPTICAL_COSINE ? Route::split : Route::floats;
    }

    OPTICAL_DEVICE void bring_near_one() const {
        for (int l = g.thread; l < block_rows + block_columns; l += g.threads) bring_near_one(l);
        g.sync_own_block();
    }
    // Scales a line by a power of two, to a length in 1/2 .. 1, or as near to that as the range allows:
    // the unit may be multiplied by 2^12 once more.
    OPTICAL_DEVICE void bring_near_one(int l) const {
        const int exponent = (int)(bits_of(measure[l]) >> 23), own = (int)(bits_of(unit[l]) >> 23);
        if (exponent == 0 || exponent == 255) return;  // zero, or not a number
        int shift = exponent - 127;
        if (shift > 241 - own) shift = 241 - own;
        if (shift < 1 - own) shift = 1 - own;
        unit[l] = float_of(bits_of(unit[l]) + ((unsigned)shift << 23));
        measure[l] = float_of(bits_of(measure[l]) - ((unsigned)shift << 23));
    }
};

}  // namespace cuda
}  // namespace optical
