// One problem of a batch: its valid rows and columns, masses, penalties and temperature, and how a
// team of threads divides the rows and columns.
//
// Padding is dropped here: everything below this header sees n valid rows and m valid columns,
// rounded up to whole blocks and vectors whose entries have mass 0 and cost +inf.
#pragma once

#include "operations.h"
#include "simd.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

// Denormal numbers cost x86 hundreds of cycles and contribute nothing to the results.
struct FlushDenormals {
#if defined(__x86_64__)
    const unsigned saved = __builtin_ia32_stmxcsr();
    FlushDenormals() { __builtin_ia32_ldmxcsr(saved | 0x8040); }
    ~FlushDenormals() { __builtin_ia32_ldmxcsr(saved); }
#else
    FlushDenormals() {}
#endif
};

OPTICAL_INLINE void sync(const Team& team) {
    if (team.size > 1) team.wait(team.barrier);
}

OPTICAL_INLINE int64_t round_up(int64_t size, int64_t unit) {
    return (size + unit - 1) / unit * unit;
}

template <typename Element>
OPTICAL_INLINE void exchange(Element& x, Element& y) {
    const Element copy = x;
    x = y, y = copy;
}

// Bump allocator over a block of memory; starting from address 0 it only measures.
struct Arena {
    uintptr_t next;
    template <typename Element>
    Element* take(int64_t count) {
        const uintptr_t start = next;
        next += (uintptr_t)round_up(count * (int64_t)sizeof(Element), 64);
        return (Element*)start;
    }
};

// Sizes of the tiles in which matrices are stored and work is divided. A tile holds `block` rows
// and all columns, ordered by column vector, row within the block, lane: the order in which the
// sweeps of scaling_kernel.h read it.
template <typename T>
struct Tiling {
    static constexpr int width = Simd<T>::width;
    static constexpr int block = width > 8 ? width : 8;  // rows processed together hide latency
    static constexpr int groups = block / width;
    static constexpr int64_t chunk_blocks = 256 / block;  // one partial column sum per chunk
    static constexpr int64_t segment = 512;               // columns that one thread finishes
};

// The rows or the columns of one problem in the caller's memory.
struct Side {
    int64_t first, count;  // position in arrays by row (or column), and size with padding
    const char* vectors;
    int32_t type;
    int64_t stride;  // between vectors, in elements
};

OPTICAL_INLINE int64_t bytes_of(int32_t type) {
    return type == OPTICAL_F64 ? 8 : type == OPTICAL_F32 ? 4 : 2;
}

// For a given cost, `vectors` is the first entry of the matrix.
OPTICAL_INLINE Side rows_of(const optical_problem& batch, int64_t index) {
    const int64_t* offset = batch.offset_a;
    Side side = {offset ? offset[index] : index * batch.n,
                 offset ? offset[index + 1] - offset[index] : batch.n, nullptr, batch.x_type,
                 batch.x_stride_row};
    const int64_t start = offset ? side.first * batch.x_stride_row : index * batch.x_stride_batch;
    const int32_t type = batch.kind == OPTICAL_GIVEN ? batch.precision : batch.x_type;
    side.vectors = (const char*)batch.x + start * bytes_of(type);
    return side;
}

OPTICAL_INLINE Side columns_of(const optical_problem& batch, int64_t index) {
    const int64_t* offset = batch.offset_b;
    Side side = {offset ? offset[index] : index * batch.m,
                 offset ? offset[index + 1] - offset[index] : batch.m, nullptr, batch.y_type,
                 batch.y_stride_column};
    const int64_t start =
        offset ? side.first * batch.y_stride_column : index * batch.y_stride_batch;
    side.vectors = (const char*)batch.y + start * bytes_of(batch.y_type);
    return side;
}

template <typename T>
struct Problem {
    typedef Simd<T> S;
    typedef Number<T> C;
    static constexpr int width = Tiling<T>::width, block = Tiling<T>::block;

    Team team;
    int64_t n, m;                      // valid rows and columns
    int64_t row_count, col_count;      // rounded up to whole blocks and whole vectors
    int64_t blocks, chunks, segments;  // of rows, of blocks, of columns
    int64_t *row_index, *col_index;    // positions of the valid entries among those of the side
    T *mass_a, *log_a, *mass_b, *log_b;
    double total_a, total_b;  // masses of the two sides
    T epsilon, rho_a, rho_b;
    int64_t* broadcast;  // from thread 0 to the team

    void lay_out(Arena& shared, int64_t max_n, int64_t max_m) {
        const int64_t rows = round_up(max_n, block), cols = round_up(max_m, block);
        row_index = shared.take<int64_t>(rows + 1), col_index = shared.take<int64_t>(cols + 1);
        mass_a = shared.take<T>(rows), log_a = shared.take<T>(rows);
        mass_b = shared.take<T>(cols), log_b = shared.take<T>(cols);
        broadcast = shared.take<int64_t>(3);
    }

    bool penalty_a() const { return rho_a < C::infinity; }
    bool penalty_b() const { return rho_b < C::infinity; }

    // ------------------------------------------------------------------------------ reading

    // Lists the valid rows and columns. False: a side has none.
    bool find_valid(const T* log_mass_a, int64_t count_a, const T* log_mass_b, int64_t count_b) {
        n = list_valid(log_mass_a, count_a, row_index);
        m = list_valid(log_mass_b, count_b, col_index);
        set_sizes();
        return n > 0 && m > 0;
    }

    // Thread 0 has found n, m and whether the vectors are finite; all threads leave with them.
    bool agree_on_sizes(bool finite) {
        if (team.rank == 0) broadcast[0] = n, broadcast[1] = m, broadcast[2] = finite;
        sync(team);
        n = broadcast[0], m = broadcast[1], finite = broadcast[2];
        sync(team);
        set_sizes();
        return finite;
    }

    // False: a mass is not a finite number.
    bool read_masses(const T* log_mass_a, const T* log_mass_b) {
        if (team.rank == 0) {
            gather_masses(log_mass_a, row_index, n, row_count, log_a, mass_a);
            gather_masses(log_mass_b, col_index, m, col_count, log_b, mass_b);
        }
        sync(team);
        total_a = sum_of(mass_a, n), total_b = sum_of(mass_b, m);
        return (total_a - total_a == 0) & (total_b - total_b == 0);
    }

    // True if all valid entries are finite.
    static bool finite_at(const T* values, const int64_t* index, int64_t count) {
        bool finite = true;
        for (int64_t i = 0; i < count; ++i) finite &= values[index[i]] - values[index[i]] == 0;
        return finite;
    }

    static double sum_of(const T* values, int64_t count) {
        double total = 0;
        for (int64_t i = 0; i < count; ++i) total += (double)values[i];
        return total;
    }

    // ------------------------------------------------------------- dividing work in the team

    // work(chunk, first block, end block) for the chunks of this thread.
    template <typename Work>
    OPTICAL_INLINE_MEMBER void own_chunks(Work work) const {
        constexpr int64_t chunk_blocks = Tiling<T>::chunk_blocks;
        for (int64_t c = team.rank; c < chunks; c += team.size) {
            const int64_t end = (c + 1) * chunk_blocks;
            work(c, c * chunk_blocks, end < blocks ? end : blocks);
        }
    }
    // work(i) for every vector of this thread's rows.
    template <typename Work>
    OPTICAL_INLINE_MEMBER void own_rows(Work work) const {
        own_chunks([&](int64_t, int64_t from, int64_t to) __attribute__((always_inline)) {
            for (int64_t i = from * block; i < to * block; i += width) work(i);
        });
    }
    // work(segment, first column, end column) for the segments of this thread.
    template <typename Work>
    OPTICAL_INLINE_MEMBER void own_segments(Work work) const {
        constexpr int64_t segment = Tiling<T>::segment;
        for (int64_t s = team.rank; s < segments; s += team.size) {
            const int64_t end = (s + 1) * segment;
            work(s, s * segment, end < col_count ? end : col_count);
        }
    }
    // work(j) for every vector of this thread's columns.
    template <typename Work>
    OPTICAL_INLINE_MEMBER void own_columns(Work work) const {
        own_segments([&](int64_t, int64_t from, int64_t to) __attribute__((always_inline)) {
            for (int64_t j = from; j < to; j += width) work(j);
        });
    }
    // work() on one thread, between two barriers.
    template <typename Work>
    void alone(Work work) const {
        sync(team);
        if (team.rank == 0) work();
        sync(team);
    }

private:
    static int64_t list_valid(const T* log_mass, int64_t count, int64_t* index) {
        int64_t valid = 0;
        for (int64_t i = 0; i < count; ++i) {
            index[valid] = i;
            valid += log_mass[i] != -C::infinity;
        }
        return valid;
    }

    void set_sizes() {
        constexpr int64_t chunk_blocks = Tiling<T>::chunk_blocks, segment = Tiling<T>::segment;
        row_count = round_up(n, block), col_count = round_up(m, width);
        blocks = row_count / block;
        chunks = (blocks + chunk_blocks - 1) / chunk_blocks;
        segments = (col_count + segment - 1) / segment;
    }

    // Gathers the masses of one side; the entries after them get mass 0 and log-mass 0.
    static void gather_masses(const T* from, const int64_t* index, int64_t count, int64_t padded,
                              T* log_mass, T* mass) {
        for (int64_t i = 0; i < count; ++i) log_mass[i] = from[index[i]];
        for (int64_t i = count; i < padded; ++i) log_mass[i] = 0;
        for (int64_t i = 0; i < padded; i += width)
            S::store(mass + i, S::exp(S::load(log_mass + i)));
        for (int64_t i = count; i < padded; ++i) mass[i] = 0;
    }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
