// What a solver has at hand: the arrays of a problem, its reading, its tiles of K, and the sharing of
// all that with a team of threads. Each thread has its own State, whose arrays are the team's.
#pragma once

#include "cost.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

// Denormal numbers cost x86 hundreds of cycles and are worth nothing here.
struct FlushDenormals {
#if defined(__x86_64__)
    const unsigned saved = __builtin_ia32_stmxcsr();
    FlushDenormals() { __builtin_ia32_ldmxcsr(saved | 0x8040); }
    ~FlushDenormals() { __builtin_ia32_ldmxcsr(saved); }
#else
    FlushDenormals() {}
#endif
};

// Bounds of u, v and the sums. An entry lost to underflow is below the least normal number, and
// weighs at most `trusted` times the mass in a sum of at least 1 / trusted: with these numbers
// that is under half a unit in the last place while the masses of a side sum to less than 2^8.
template <typename T>
struct Bounds;
template <>
struct Bounds<float> {
    static constexpr float drift = 0x1p30f, trusted = 0x1p46f;
    static constexpr float exponent = 80;  // of this size, exp is far from 0 and from +inf
    static constexpr float some = 1e-30f;  // a mass that may be divided by
    static constexpr double ridge = 1e-6, solved = 1e-7;
    static constexpr float farthest = 0x1p18f;  // temperatures of which the last digit is 1/32
};
template <>
struct Bounds<double> {
    static constexpr double drift = 0x1p300, trusted = 0x1p470;
    static constexpr double exponent = 700, some = 1e-280;
    static constexpr double ridge = 1e-10, solved = 1e-14;
    static constexpr double farthest = 0x1p47;
};

// Masses that differ by more than this part have no plan between them.
constexpr double unequal = 1e-3;
// The most that is kept of a problem as a whole; a larger one keeps one array only, K.
constexpr int64_t kept_entries = (int64_t)1 << 20;
constexpr int max_anderson = 16;
// Steps of conjugate gradients that may pass without halving the energy of the residual.
constexpr int64_t patience = 10;

OPTICAL_INLINE void sync(const Team& team) {
    if (team.size > 1) team.meet(team.meeting);
}

template <typename T>
struct State : Cost<T> {
    typedef Cost<T> Base;
    typedef Simd<T> S;
    typedef typename S::Vector Vector;
    typedef typename S::Mask Mask;
    typedef Number<T> C;
    static constexpr int width = S::width;
    static constexpr int block = Base::block;
    static constexpr int groups = block / width;
    static constexpr int together = 4;  // exponentials computed side by side
    static constexpr int64_t chunk_blocks = 256 / block;
    static constexpr int64_t segment = 512;  // columns that one thread finishes
    using Base::blocks;
    using Base::col_count;
    using Base::col_index;
    using Base::m;
    using Base::n;
    using Base::row_count;
    using Base::row_index;

    // Bit patterns of positive numbers are ordered like the numbers, and those of NaN of either
    // sign lie outside every range of them: one minimum and one maximum check a whole pass.
    struct Range {
        Mask least = (Mask)S::all(1), greatest = (Mask)S::all(1);
        template <typename Lanes>
        __attribute__((always_inline)) void add_lanes(typename Lanes::Vector x) {
            const Mask bits = S::repeated((typename Lanes::Mask)x);
            add(bits, bits);
        }
        __attribute__((always_inline)) void add(Vector x) { add_lanes<S>(x); }
        __attribute__((always_inline)) void add(const Range& other) {
            add(other.least, other.greatest);
        }
        __attribute__((always_inline)) void add(Mask low, Mask high) {
            least = low < least ? low : least;
            greatest = high > greatest ? high : greatest;
        }
        bool within(T bound) const {
            return S::every((least >= (Mask)S::all(1 / bound)) &
                            (greatest <= (Mask)S::all(bound)));
        }
    };

    struct Totals {
        double linear = 0, dual = 0, mass = 0, error = 0, divergence = 0;
    };
    // What a thread found out, for the others. Two, since a fast thread may be a step ahead.
    struct Report {
        Range rows, all;
        Mask valid;
    };

    Team team;
    T epsilon, inverse_epsilon, target;
    double total_a, total_b, dead_mass;  // dead: present rows without an allowed pair
    bool dead_rows, dead_columns;
    T rho_a, rho_b, alpha, share_a, share_b;
    bool relaxed;  // the state is f and g, not u and v
    bool whole;    // the cost is stored, and so is K
    bool stored;   // K is stored
    // What the tiles of K hold: exp((F_i + G_j - C_ij) / epsilon); the same with b_j or with a_i in
    // it, for rows or columns that sum to about 1; or the plan of f and g.
    enum class Holding { kernel, rows, columns, plan } holding = Holding::kernel;
    int parity = 0;

    T *cost_tiles, *kernel_tiles, *panels;
    // By row, then by column. `pad` is 1 where no pair is allowed, padding included, and 0
    // elsewhere: added to a sum that is 0 there, it makes u = 1 and f = 0. `weight` is the mass,
    // but 0 where pad is 1.
    T *mass_a, *log_a, *pad_a, *weight_a, *base_f, *f, *f_next, *u, *u_next, *au, *miss_a;
    T *mass_b, *log_b, *pad_b, *weight_b, *base_g, *g, *g_next, *v, *v_next, *bv, *miss_b;
    T *row_spent, *col_spent, *col_mass;
    T* part;  // column sums, by chunk
    T* memory;  // of Anderson acceleration
    Report* reports;
    Totals *row_totals, *col_totals;
    T *w, *z, *cg_r, *cg_p, *cg_q;  // of the adjoint system
    double* cg_scalars;
    T* history;
    int64_t chunks, segments;

    // Hands out the team's memory and the thread's own; the same order measures and uses it.
    void lay_out(Arena& shared, Arena& own, const optical_problem& p, bool swapped, bool keep,
                 bool reversible) {
        const int64_t max_n = swapped ? p.m : p.n, max_m = swapped ? p.n : p.m;
        Base::lay_out(shared, max_n, max_m, p.kind, p.dim);
        const int64_t rows = round_up(max_n, block), cols = round_up(max_m, block);
        const int64_t entries = rows * cols;
        whole = keep && entries <= kept_entries;
        stored = keep && (whole || !p.low_memory || p.kind == OPTICAL_GIVEN);
        if (whole) cost_tiles = shared.take<T>(entries);
        if (stored) kernel_tiles = shared.take<T>(entries);
        panels = own.take<T>(2 * block * cols);
        T** by_row[] = {&mass_a, &log_a, &pad_a, &weight_a, &base_f, &f, &f_next,
                        &u,      &u_next, &au,   &miss_a,   &row_spent, &w};
        for (T** array : by_row) *array = shared.take<T>(array == &miss_a ? 2 * rows : rows);
        T** by_column[] = {&mass_b, &log_b, &pad_b, &weight_b, &base_g, &g, &g_next, &v, &v_next,
                           &bv, &miss_b, &col_spent, &col_mass, &z, &cg_r, &cg_p, &cg_q};
        for (T** array : by_column) *array = shared.take<T>(array == &miss_b ? 2 * cols : cols);
        part = shared.take<T>(round_up(rows / block, chunk_blocks) / chunk_blocks * cols);
        if (p.anderson > 0) memory = shared.take<T>((2 * p.anderson + 3) * cols);
        reports = shared.take<Report>(2 * (int64_t)p.num_threads);
        row_totals = shared.take<Totals>(rows / block / chunk_blocks + 1);
        col_totals = shared.take<Totals>(cols / segment + 1);
        cg_scalars = shared.take<double>(8);
        history = nullptr;
        if (reversible) history = shared.take<T>((rows + cols) * ((int64_t)p.max_iter + 1));
    }

    // ---------------------------------------------------------------- sharing work in the team

    template <typename Work>
    __attribute__((always_inline)) inline void own_chunks(Work work) const {
        for (int64_t c = team.rank; c < chunks; c += team.size) {
            const int64_t end = (c + 1) * chunk_blocks;
            work(c, c * chunk_blocks, end < blocks ? end : blocks);
        }
    }
    template <typename Work>
    __attribute__((always_inline)) inline void own_rows(Work work) const {
        own_chunks([&](int64_t, int64_t from, int64_t to) __attribute__((always_inline)) {
            for (int64_t i = from * block; i < to * block; i += width) work(i);
        });
    }
    template <typename Work>
    __attribute__((always_inline)) inline void own_segments(Work work) const {
        for (int64_t s = team.rank; s < segments; s += team.size) {
            const int64_t end = (s + 1) * segment;
            work(s, s * segment, end < col_count ? end : col_count);
        }
    }
    template <typename Work>
    __attribute__((always_inline)) inline void own_columns(Work work) const {
        own_segments([&](int64_t, int64_t from, int64_t to) __attribute__((always_inline)) {
            for (int64_t j = from; j < to; j += width) work(j);
        });
    }
    template <typename Work>
    void alone(Work work) const {
        sync(team);
        if (team.rank == 0) work();
        sync(team);
    }

    // ------------------------------------------------------------------------------ the set-up

    // Reads the problem. False: a side is absent, or an input is not a number; `status` says which.
    bool read(const optical_problem& p, int64_t index, bool swapped, int32_t& status) {
        Side a = side_a(p, index), b = side_b(p, index);
        const T *from_a = (const T*)p.log_a, *from_b = (const T*)p.log_b;
        int64_t line = p.x_stride_row, entry = p.x_stride_entry;
        const char* matrix = a.vectors;
        rho_a = (T)p.rho_a, rho_b = (T)p.rho_b;
        if (swapped) {
            exchange(a, b), exchange(from_a, from_b), exchange(line, entry);
            exchange(rho_a, rho_b);
        }
        bool listed = false, finite = true;
        if (team.rank == 0) {
            listed = Base::list(from_a + a.first, a.full, from_b + b.first, b.full);
            if (listed && p.kind != OPTICAL_GIVEN) finite = Base::read(a, b);
            ((int64_t*)cg_scalars)[0] = n, ((int64_t*)cg_scalars)[1] = m;
            ((int64_t*)cg_scalars)[2] = finite;
        }
        sync(team);
        n = ((int64_t*)cg_scalars)[0], m = ((int64_t*)cg_scalars)[1];
        finite = ((int64_t*)cg_scalars)[2];
        sync(team);
        row_count = round_up(n, block), col_count = round_up(m, width);
        blocks = row_count / block;
        chunks = (blocks + chunk_blocks - 1) / chunk_blocks;
        segments = (col_count + segment - 1) / segment;
        status = OPTICAL_EMPTY;
        if (n == 0 || m == 0) return false;
        if (p.kind == OPTICAL_GIVEN) {
            Base::point_at(matrix, line, entry);
        } else {
            Base::set_kind();
        }

        target = ((const T*)p.epsilon)[index];
        set_temperature(target);
        bool valid = finite & (target > 0) & (target < C::infinity) & (inverse_epsilon < C::infinity);
        if (team.rank == 0) {
            gather_masses(from_a + a.first, row_index, n, row_count, log_a, mass_a);
            gather_masses(from_b + b.first, col_index, m, col_count, log_b, mass_b);
        }
        sync(team);
        total_a = sum_of(mass_a, n), total_b = sum_of(mass_b, m);
        valid &= (total_a - total_a == 0) & (total_b - total_b == 0);
        if (p.init_f && !swapped) {
            valid &= finite_at((const T*)p.init_f + a.first, row_index, n);
            valid &= finite_at((const T*)p.init_g + b.first, col_index, m);
        }
        Mask tiles_valid = S::all(0) == S::all(0);
        own_chunks([&](int64_t, int64_t from, int64_t to) {
            bool numbers = true;
            if (whole) numbers = Base::fill(from, to, tile(cost_tiles, from));
            else
                for (int64_t b = from; b < to; ++b) numbers &= Base::fill(b, b + 1, panels);
            if (!numbers) tiles_valid &= S::all(0) != S::all(0);
        });
        valid &= agreed(tiles_valid);
        status = valid ? OPTICAL_MAX_ITER : OPTICAL_INFEASIBLE;
        return valid;
    }

    // Takes potentials from arrays by line; rows and columns are the sides of this solver.
    void take_potentials(const T* from_f, const T* from_g) {
        own_rows([&](int64_t i) {
            for (int lane = 0; lane < width; ++lane)
                f[i + lane] = from_f && i + lane < n ? from_f[row_index[i + lane]] : 0;
        });
        own_columns([&](int64_t j) {
            for (int lane = 0; lane < width; ++lane)
                g[j + lane] = from_g && j + lane < m ? from_g[col_index[j + lane]] : 0;
        });
        sync(team);
    }

    // Zero, or the potentials given.
    void start(const optical_problem& p, const Side& a, const Side& b) {
        take_potentials(p.init_f ? (const T*)p.init_f + a.first : nullptr,
                        p.init_g ? (const T*)p.init_g + b.first : nullptr);
    }

    // Every cost was readable, whoever read it.
    bool agreed(Mask valid) {
        if (team.size == 1) return S::every(valid);
        reports[parity * team.size + team.rank].valid = valid;
        sync(team);
        for (int t = 0; t < team.size; ++t) valid &= reports[parity * team.size + t].valid;
        parity ^= 1;
        return S::every(valid);
    }

    // What all threads saw, and a meeting of them.
    Range agreed(Range range) {
        if (team.size == 1) return range;
        Report* shared = reports + parity * team.size;
        shared[team.rank].all = range;
        sync(team);
        for (int t = 0; t < team.size; ++t) range.add(shared[t].all);
        parity ^= 1;
        return range;
    }

    template <typename Element>
    static void exchange(Element& x, Element& y) {
        const Element kept = x;
        x = y, y = kept;
    }

    static double sum_of(const T* values, int64_t count) {
        double total = 0;
        for (int64_t i = 0; i < count; ++i) total += (double)values[i];
        return total;
    }

    static bool finite_at(const T* values, const int64_t* index, int64_t count) {
        bool finite = true;
        for (int64_t i = 0; i < count; ++i) finite &= values[index[i]] - values[index[i]] == 0;
        return finite;
    }

    // Gathers the masses of one side; padding gets mass 0 and log-mass 0.
    static void gather_masses(const T* from, const int64_t* index, int64_t count, int64_t padded,
                              T* log_mass, T* mass) {
        for (int64_t i = 0; i < count; ++i) log_mass[i] = from[index[i]];
        for (int64_t i = count; i < padded; ++i) log_mass[i] = 0;
        for (int64_t i = 0; i < padded; i += width)
            S::store(mass + i, S::exp(S::load(log_mass + i)));
        for (int64_t i = count; i < padded; ++i) mass[i] = 0;
    }

    void set_temperature(T value) {
        epsilon = value;
        inverse_epsilon = 1 / value;
    }

    // f <- alpha f + share softmin, with the shares of the present temperature.
    void set_step(T omega) {
        alpha = 1 - omega;
        share_a = omega * (rho_a < C::infinity ? rho_a / (rho_a + epsilon) : (T)1);
        share_b = omega * (rho_b < C::infinity ? rho_b / (rho_b + epsilon) : (T)1);
    }

    T* tile(T* matrix, int64_t b) const { return matrix + b * block * col_count; }

    const T* cost_tile(int64_t b, T* panel) const {
        if (whole) return tile(cost_tiles, b);
        Base::fill(b, b + 1, panel);
        return panel;
    }

    const T* kernel_tile(int64_t b) const {
        if (stored) return tile(kernel_tiles, b);
        T* panel = panels + b % 2 * block * col_count;
        make_kernel(b, panel);
        return panel;
    }

    __attribute__((noinline)) void make_kernel(int64_t b, T* to) const {
        const T* c = cost_tile(b, to);
        const bool plan = holding == Holding::plan;
        const bool with_a = plan || holding == Holding::columns;
        const bool with_b = plan || holding == Holding::rows;
        const T *rows = plan ? f : base_f, *columns = plan ? g : base_g;
        T row[block], extra[block], mass[block];
        for (int r = 0; r < block; ++r) {
            row[r] = rows[b * block + r];
            extra[r] = with_a ? log_a[b * block + r] : 0;
            mass[r] = with_a ? mass_a[b * block + r] : 1;
        }
        for (int64_t j = 0; j < col_count; j += width) {
            const Vector gj = S::load(columns + j);
            const Vector log_bj = with_b ? S::load(log_b + j) : S::all(0);
            const Vector mass_bj = with_b ? S::load(mass_b + j) : S::all(1);
            for (int r = 0; r < block; r += together, c += together * width) {
                Vector x[together];
                for (int i = 0; i < together; ++i)
                    x[i] = (row[r + i] - S::load(c + i * width)) + gj;
                if (with_a || with_b) {
                    Vector factor[together];
                    for (int i = 0; i < together; ++i)
                        factor[i] = weigh(x[i], inverse_epsilon, extra[r + i] + log_bj,
                                          mass[r + i] * mass_bj);
                    S::template exp<together>(x);
                    for (int i = 0; i < together; ++i) x[i] *= factor[i];
                } else {
                    for (int i = 0; i < together; ++i) x[i] *= inverse_epsilon;
                    S::template exp<together>(x);
                }
                for (int i = 0; i < together; ++i, to += width) S::store(to, x[i]);
            }
        }
    }

    // The exponent of a mass times exp(x / epsilon), for x of potentials and a cost, and the factor
    // beside it: the mass, whose rounding is relative, where the exponent is small beside its
    // logarithm; otherwise 1, with everything in the exponent, rounded once.
    static __attribute__((always_inline)) inline Vector weigh(Vector& x, T inverse_epsilon,
                                                              Vector log_mass, Vector mass) {
        const Vector alone = x * inverse_epsilon, whole = x * inverse_epsilon + log_mass;
        const Mask apart = (S::absolute(alone) < T(-0.75) * log_mass) & (log_mass > -Bounds<T>::exponent);
        x = S::select(apart, alone, whole);
        return S::select(apart, mass, S::all(1));
    }

    void build_kernel() {
        if (!stored) return;
        own_chunks([&](int64_t, int64_t from, int64_t to) {
            for (int64_t b = from; b < to; ++b) make_kernel(b, tile(kernel_tiles, b));
        });
    }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
