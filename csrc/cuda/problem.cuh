// One problem of the batch, its threads, and the layout of their shared memory.
//
// Every thread stores the cost of its own entries and the fields of its owned rows and columns in a
// private array, value k at private_values[k * threads]: no bank conflicts, no barriers. Padding
// has no mass and cost +inf; its values are never loaded.
//
// Vectors are used without normalisation. For the cosine, inverse lengths multiply the products,
// and a vector whose squared length would leave the range of float32 is first scaled by a power of
// two. For the squared distance, both sides are shifted so that one of the points is the origin;
// without the shift, the difference of large squares would lose all digits.
#pragma once

#include "thread_grid.cuh"

namespace optical {
namespace cuda {

// Balanced problems whose total masses differ by more than this fraction are infeasible.
constexpr double unequal = 1e-3;
constexpr int chunk = 16;  // components of float32 vectors per staged chunk

// The fields that a thread stores for each row, and each column, that it owns. UNMATCHED is 1 for a
// row or column without an allowed pair and 0 otherwise: added to a sum that is 0 there, it makes
// the scaling 1 and the potential 0. WEIGHT is the mass, or 0 where UNMATCHED is 1. SUMS and SPENT
// are the sums of P and of P C. The SCRATCH fields serve Adjoint and Unrolled.
enum Field {
    LOG,
    MASS,
    WEIGHT,
    UNMATCHED,
    BASE,
    POTENTIAL,
    NEXT,
    SUMS,
    SPENT,
    SOLUTION,
    SCRATCH_1,
    SCRATCH_2,
    SCRATCH_3,
    SCRATCH_4,
    field_count
};

struct Side {
    int64_t first;  // in arrays by row or column
    int count;
    const char* vectors;
    int32_t type;
    int64_t stride;
};

OPTICAL_DEVICE int bytes_of(int32_t type) { return type == OPTICAL_F32 ? 4 : 2; }

// The rows or columns of problem `index`: `count` of them, or the number that the offsets give.
OPTICAL_DEVICE Side side_of(int64_t index, int64_t count, const int64_t* offset,
                            const void* vectors, int32_t type, int64_t stride_batch,
                            int64_t stride_entry) {
    const int64_t first = offset ? offset[index] : index * count;
    const int64_t start = offset ? first * stride_entry : index * stride_batch;
    return {first, (int)(offset ? offset[index + 1] - first : count),
            (const char*)vectors + start * bytes_of(type), type, stride_entry};
}

// How vectors are multiplied: in float32, as half vectors on the tensor cores, or as numbers that
// are split into two halves.
enum class Route { floats, halves, split };

template <typename G>
struct Problem {
    static constexpr int RI = G::RI, RJ = G::RJ, OI = G::OI, OJ = G::OJ;
    static constexpr int private_floats = RI * RJ + (OI + OJ) * field_count;
    // Components of half vectors per staged chunk; two chunks are in shared memory at a time.
    static constexpr int half_chunk = G::tile_rows > 32 ? 32 : 16;

    const optical_problem& batch;
    G grid;
    Side a, b;
    int64_t index;
    bool has_problem;  // if false, this team acts on a problem without rows and columns
    float* private_values;
    // For the rows of this block, then for all columns: `prescale` is the power of two that scales
    // the vector, 0 for padding. `norm` is the inverse length (0 for the zero vector) for the
    // cosine, and the squared length for the squared distance.
    float *prescale, *norm;
    unsigned* half_words;
    char* stage;
    bool scaled;  // some prescale is neither 0 nor 1
    bool norms_known;  // `norm` is complete
    int block_rows, block_columns, block_first_row;

    static OPTICAL_HOST_DEVICE int norm_bytes(int down, int across, int32_t kind) {
        if (kind == OPTICAL_GIVEN) return 0;
        return 2 * 4 * (down * G::tile_rows + across * G::tile_columns);
    }
    // Shared memory before the private arrays.
    static OPTICAL_HOST_DEVICE int fixed_bytes(int down, int across, int32_t kind) {
        return G::exchange_bytes(down, across) + norm_bytes(down, across, kind) +
               4 * G::half_words * down * across;
    }
    // Shared memory of all teams. The offset between teams puts their private arrays in different
    // banks.
    static OPTICAL_HOST_DEVICE int shared_bytes(int down, int across, int32_t kind) {
        return G::teams * team_bytes(down, across, kind);
    }
    static OPTICAL_HOST_DEVICE int team_bytes(int down, int across, int32_t kind) {
        const int bytes = problem_bytes(down, across, kind);
        return G::teams == 1 ? bytes : (bytes + 127) / 128 * 128 + 4 * G::lanes;
    }
    static OPTICAL_HOST_DEVICE int problem_bytes(int down, int across, int32_t kind) {
        const int entries = down * G::tile_rows + across * G::tile_columns;
        int work = private_floats * G::lanes * down * across * 4;
        const int staged = kind == OPTICAL_GIVEN ? 0 : chunk * (entries + 4) * 4;
        const int ahead = kind == OPTICAL_GIVEN ? 0 : 2 * half_chunk * entries * 2;
        if (staged > work) work = staged;
        if (ahead > work) work = ahead;
        return fixed_bytes(down, across, kind) + work;
    }

    OPTICAL_DEVICE Problem(const optical_problem& batch) : batch(batch) {}

    // Lays out shared memory and selects problem `problem`. A team of a shared warp may get -1, no
    // problem.
    OPTICAL_DEVICE void start(int64_t problem, int down, int across) {
        choose(problem);
        char* memory = shared_memory();
        grid.start(memory, down, across);
        if (G::teams > 1) memory += grid.team * team_bytes(down, across, batch.kind);
        block_rows = down * G::tile_rows, block_columns = across * G::tile_columns;
        block_first_row = grid.rank * block_rows;
        prescale = (float*)(memory + G::exchange_bytes(down, across));
        norm = prescale + block_rows + block_columns;
        stage = memory + fixed_bytes(down, across, batch.kind);
        half_words = (unsigned*)stage - G::half_words * down * across;
        private_values = (float*)stage + grid.thread;
    }

    OPTICAL_DEVICE void choose(int64_t problem) {
        has_problem = G::teams == 1 || problem >= 0;
        index = has_problem ? problem : 0;
        a = side_of(index, batch.n, batch.offset_a, batch.x, batch.x_type, batch.x_stride_batch,
                    batch.x_stride_row);
        b = side_of(index, batch.m, batch.offset_b, batch.y, batch.y_type, batch.y_stride_batch,
                    batch.y_stride_column);
        if (!has_problem) a.count = b.count = 0;
    }

    OPTICAL_DEVICE float& cost(int r, int c) const {
        return private_values[(r * RJ + c) * grid.threads];
    }
    OPTICAL_DEVICE float& row(int name, int o) const {
        return private_values[(RI * RJ + name * OI + o) * grid.threads];
    }
    OPTICAL_DEVICE float& column(int name, int o) const {
        return private_values[(RI * RJ + field_count * OI + name * OJ + o) * grid.threads];
    }
    OPTICAL_DEVICE void set_rows(int name, const float (&x)[OI]) {
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) row(name, o) = x[o];
    }
    OPTICAL_DEVICE void set_columns(int name, const float (&x)[OJ]) {
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) column(name, o) = x[o];
    }

    OPTICAL_DEVICE void rows_of(int name, float (&x)[RI]) const {
        float owned[OI];
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) owned[o] = row(name, o);
        grid.spread_rows(owned, x);
    }
    OPTICAL_DEVICE void columns_of(int name, float (&x)[RJ]) const {
        float owned[OJ];
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) owned[o] = column(name, o);
        grid.spread_columns(owned, x);
    }

    // The log-mass of a row or column of this problem, -inf past its end.
    OPTICAL_DEVICE float log_a(int i) const {
        return i < a.count ? ((const float*)batch.log_a)[a.first + i] : -infinity();
    }
    OPTICAL_DEVICE float log_b(int j) const {
        return j < b.count ? ((const float*)batch.log_b)[b.first + j] : -infinity();
    }
    OPTICAL_DEVICE bool valid_row(int i) const { return log_a(i) != -infinity(); }
    OPTICAL_DEVICE bool valid_column(int j) const { return log_b(j) != -infinity(); }

    // The cost as a factor of the plan: 0 for a forbidden pair, which carries no mass.
    OPTICAL_DEVICE float finite_cost(int r, int c) const {
        const float x = cost(r, c);
        return x < infinity() ? x : 0.0f;
    }

    // ------------------------------------------------------------------------------------- vectors

    // An entry is a row of this block (0 to block_rows - 1) or any column (from block_rows on).
    OPTICAL_DEVICE bool is_row(int entry) const { return entry < block_rows; }
    OPTICAL_DEVICE bool valid(int entry) const {
        return is_row(entry) ? valid_row(block_first_row + entry)
                             : valid_column(entry - block_rows);
    }
    OPTICAL_DEVICE float component(int entry, int64_t k) const {
        return is_row(entry) ? load(a.vectors, a.type, (block_first_row + entry) * a.stride + k)
                          : load(b.vectors, b.type, (entry - block_rows) * b.stride + k);
    }
    // The point that the squared distance uses as origin: the first valid column.
    OPTICAL_DEVICE int origin() const {
        for (int j = 0; j < b.count; ++j)
            if (valid_column(j)) return j;
        return 0;
    }
    OPTICAL_DEVICE float origin_component(int at, int64_t k) const {
        return batch.kind == OPTICAL_SQEUCLIDEAN ? load(b.vectors, b.type, at * b.stride + k)
                                                 : 0.0f;
    }

    // Starts the norms of half vectors, whose squares are added while they are multiplied.
    OPTICAL_DEVICE void begin_norms() {
        for (int entry = grid.thread; entry < block_rows + block_columns; entry += grid.threads)
            prescale[entry] = valid(entry) ? 1.0f : 0.0f, norm[entry] = 0;
        scaled = false, norms_known = batch.kind != OPTICAL_COSINE;
        grid.sync_own_block();
    }
    // Turns the sums of squares into norms. Returns false if some are outside the safe range of
    // float32.
    OPTICAL_DEVICE bool finish_norms() {
        bool out_of_range = false;
        for (int entry = grid.thread; entry < block_rows + block_columns; entry += grid.threads) {
            const float sum = norm[entry];
            out_of_range |= prescale[entry] != 0.0f && !(sum > 1e-30f && sum < 1e37f);
            norm[entry] = sum > 0 ? inverse_root(sum) : 0.0f;
        }
        out_of_range = grid.union_of(out_of_range) != 0;
        grid.sync_own_block();
        norms_known = true;
        return !out_of_range;
    }

    // Computes all prescales and norms, one entry per warp or team at a time.
    OPTICAL_DEVICE void compute_norms() {
        bool any_scaled = false;
        const int at = batch.kind == OPTICAL_SQEUCLIDEAN ? origin() : 0;
        for (int entry = grid.warp; entry < block_rows + block_columns;
             entry += grid.down * grid.across) {
            const bool is_valid = valid(entry);
            float power = is_valid ? 1.0f : 0.0f, sum = 0;
            if (is_valid && batch.kind == OPTICAL_SQEUCLIDEAN) {
                for (int64_t k = grid.lane; k < batch.dim; k += G::lanes) {
                    const float x = component(entry, k) - origin_component(at, k);
                    sum = fused(x, x, sum);
                }
                sum = G::over_lanes(sum);
            } else if (is_valid && batch.kind == OPTICAL_COSINE) {
                sum = squared_length(entry, 1.0f);
                if (!(sum > 1e-30f && sum < 1e37f)) {
                    // The power of two below 1 / (largest component), within the normal range.
                    const int exponent = 253 - (int)(bits_of(largest_component(entry)) >> 23);
                    power = float_of((unsigned)(exponent < 1     ? 1
                                                : exponent > 253 ? 253
                                                                 : exponent)
                                     << 23);
                    sum = squared_length(entry, power);
                    if (sum == 0) power = 1;
                }
            }
            if (grid.lane == 0) {
                any_scaled |= is_valid && power != 1.0f;
                prescale[entry] = power;
                norm[entry] = batch.kind != OPTICAL_COSINE ? sum
                              : sum > 0                    ? inverse_root(sum)
                                                           : 0.0f;
            }
        }
        scaled = grid.union_of(any_scaled) != 0, norms_known = true;
        grid.sync_own_block();
        if (route() == Route::split) scale_near_one();
    }

    // The squared length of the scaled vector of an entry.
    OPTICAL_DEVICE float squared_length(int entry, float scale) const {
        const int32_t type = is_row(entry) ? a.type : b.type;
        const int64_t offset =
            is_row(entry) ? (block_first_row + entry) * a.stride : (entry - block_rows) * b.stride;
        const char* const from =
            (is_row(entry) ? a.vectors : b.vectors) + (offset + 8 * grid.lane) * bytes_of(type);
        const bool aligned = ((uintptr_t)from & 15) == 0;
        float sum = 0;
        OPTICAL_KEEP_LOOP
        for (int64_t k = 8 * grid.lane; k < batch.dim; k += 8 * G::lanes) {
            float x[8];
            load_eight(from + (k - 8 * grid.lane) * bytes_of(type), type, aligned, batch.dim - k,
                       x);
            OPTICAL_UNROLL_LOOP
            for (int e = 0; e < 8; ++e) sum = fused(x[e] * scale, x[e] * scale, sum);
        }
        return G::over_lanes(sum);
    }
    OPTICAL_DEVICE float largest_component(int entry) const {
        float peak = 0;
        for (int64_t k = grid.lane; k < batch.dim; k += G::lanes)
            peak = larger(peak, absolute(component(entry, k)));
        OPTICAL_UNROLL_LOOP
        for (int mask = G::lanes / 2; mask > 0; mask /= 2)
            peak = larger(peak, shuffle_xor<G::lanes>(peak, mask));
        return peak;
    }

    OPTICAL_DEVICE bool uses_half_vectors() const {
        return batch.x_type != OPTICAL_F32 && batch.x_type == batch.y_type &&
               batch.kind != OPTICAL_SQEUCLIDEAN;
    }
    // Half vectors need no conversion. For the cosine, other vectors are split into halves; for the
    // other costs they are multiplied in float32.
    OPTICAL_DEVICE Route route() const {
        if (uses_half_vectors() && !scaled) return Route::halves;
        return batch.kind == OPTICAL_COSINE ? Route::split : Route::floats;
    }

    OPTICAL_DEVICE void scale_near_one() const {
        for (int entry = grid.thread; entry < block_rows + block_columns; entry += grid.threads)
            scale_near_one(entry);
        grid.sync_own_block();
    }
    // Scales a vector by a power of two to a length between 1/2 and 1, or as close as the range
    // allows. The prescale leaves room for another factor of 2^12.
    OPTICAL_DEVICE void scale_near_one(int entry) const {
        const int exponent = (int)(bits_of(norm[entry]) >> 23),
                  current = (int)(bits_of(prescale[entry]) >> 23);
        if (exponent == 0 || exponent == 255) return;  // zero, infinite or NaN
        int shift = exponent - 127;
        if (shift > 241 - current) shift = 241 - current;
        if (shift < 1 - current) shift = 1 - current;
        prescale[entry] = float_of(bits_of(prescale[entry]) + ((unsigned)shift << 23));
        norm[entry] = float_of(bits_of(norm[entry]) - ((unsigned)shift << 23));
    }
};

}  // namespace cuda
}  // namespace optical
