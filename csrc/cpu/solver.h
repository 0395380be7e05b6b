// The iteration. Each thread of a team has its own Solver, whose arrays are the team's.
//
// The iteration of sinkhorn.h spends an exponential per entry and half-step. The same iterates
// come from scaling: with base potentials F, G and K_ij = exp((F_i + G_j - C_ij) / epsilon),
//
//     u_i = 1 / sum_j K_ij b_j v_j        f_i = F_i + epsilon log u_i
//     v_j = 1 / sum_i K_ij a_i u_i        g_j = G_j + epsilon log v_j
//
// which is one multiply-add per entry and half-step. What makes this as safe as the log domain is
// the choice of the base: given g, take the transforms of zero temperature
//
//     F_i = min_j (C_ij - g_j)      G_j = min_i (C_ij - F_i)      v_j = exp((g_j - G_j) / epsilon)
//
// Then K <= 1, and every row and every column holds an entry that is exactly 1: in row i the
// column where the first minimum is attained, which there also attains G_j = g_j, so v_j = 1. So
// the sums of the next iteration are at least the mass of one entry: nothing overflows, and what
// underflows was invisible. The base is rebuilt when u or v has drifted past `drift`, and also
// when a sum falls outside `trusted`, where underflow could show: then the iteration is repeated.
// If a sum is outside right after a rebuild, the masses themselves are extreme (say 1e-20), or the
// potentials far from these transforms, and the iteration is done in the log domain.
//
// Unbalanced marginals, over-relaxation and Anderson acceleration change vectors only: they need
// the potentials themselves after every half-step, a logarithm and an exponential per line
// ("relaxed" below). Without them the scalings u and v are enough.
//
// Between rebuilds K is read from cache once per full iteration: a block of rows is multiplied
// with b v, its u follows, and the same rows, still in the first cache level, are added into the
// column sums. Rows are cut into chunks of a fixed size, whose column sums are added in order: so
// a team can share a problem, and no bit depends on its size.
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
    static constexpr double ridge = 1e-6, solved = 1e-7;
};
template <>
struct Bounds<double> {
    static constexpr double drift = 0x1p300, trusted = 0x1p470;
    static constexpr double ridge = 1e-10, solved = 1e-14;
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
struct Solver : Cost<T> {
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
        __attribute__((always_inline)) void add(Vector x) { add((Mask)x, (Mask)x); }
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
    bool plan_is_kernel = false;
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
        int64_t line = p.x_stride_line, entry = p.x_stride_entry;
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

    // K, or with `plan_is_kernel` the plan of f and g, which replaces it with weights of 1.
    __attribute__((noinline)) void make_kernel(int64_t b, T* to) const {
        const T* c = cost_tile(b, to);
        const T* rows = plan_is_kernel ? f : base_f;
        const T* columns = plan_is_kernel ? g : base_g;
        T row[block], extra[block];
        for (int r = 0; r < block; ++r) {
            row[r] = rows[b * block + r];
            extra[r] = plan_is_kernel ? log_a[b * block + r] : 0;
        }
        for (int64_t j = 0; j < col_count; j += width) {
            const Vector gj = S::load(columns + j);
            const Vector log_bj = plan_is_kernel ? S::load(log_b + j) : S::all(0);
            for (int r = 0; r < block; r += together, c += together * width) {
                Vector x[together];
                for (int i = 0; i < together; ++i) {
                    x[i] = (row[r + i] - S::load(c + i * width)) + gj;
                    x[i] = x[i] * inverse_epsilon + (extra[r + i] + log_bj);
                }
                S::template exp<together>(x);
                for (int i = 0; i < together; ++i, to += width) S::store(to, x[i]);
            }
        }
    }

    void build_kernel() {
        if (!stored) return;
        own_chunks([&](int64_t, int64_t from, int64_t to) {
            for (int64_t b = from; b < to; ++b) make_kernel(b, tile(kernel_tiles, b));
        });
    }

    // ------------------------------------------------------------------------------- the base

    // Chooses the base potentials for the current g and rebuilds K, v and b v from them, and a u
    // too, from which the stopping rule has the row sums.
    void rebase(bool first) {
        plan_is_kernel = false;
        own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            T* nearest = part + chunk * col_count;
            for (int64_t j = 0; j < col_count; j += width) S::store(nearest + j, S::all(C::infinity));
            for (int64_t b = from; b < to; ++b) {
                const T* tiles = cost_tile(b, panels);
                Vector least[block];
                for (int r = 0; r < block; ++r) least[r] = S::all(C::infinity);
                const T* c = tiles;
                for (int64_t j = 0; j < col_count; j += width, c += block * width) {
                    const Vector gj = S::load(g + j);
                    for (int r = 0; r < block; ++r)
                        least[r] = S::min(least[r], S::load(c + r * width) - gj);
                }
                for (int q = 0; q < groups; ++q) {
                    const int64_t i = b * block + q * width;
                    const Vector base = S::template across<typename S::Minimum>(least + q * width);
                    if (first) mark_dead(base, mass_a + i, pad_a + i, weight_a + i);
                    S::store(base_f + i, S::select(S::load(pad_a + i) > 0, S::all(0), base));
                }
                c = tiles;
                for (int64_t j = 0; j < col_count; j += width, c += block * width) {
                    Vector best = S::load(nearest + j);
                    for (int r = 0; r < block; ++r)
                        best = S::min(best, S::load(c + r * width) - base_f[b * block + r]);
                    S::store(nearest + j, best);
                }
            }
        });
        sync(team);
        own_columns([&](int64_t j) {
            Vector base = S::load(part + j);
            for (int64_t c = 1; c < chunks; ++c)
                base = S::min(base, S::load(part + c * col_count + j));
            if (first) mark_dead(base, mass_b + j, pad_b + j, weight_b + j);
            S::store(base_g + j, S::select(S::load(pad_b + j) > 0, S::all(0), base));
            if (first) S::store(g + j, S::select(S::load(pad_b + j) > 0, S::all(0), S::load(g + j)));
            scale_columns(j);
        });
        sync(team);
        build_kernel();
        own_rows([&](int64_t i) {
            if (first) S::store(f + i, S::select(S::load(pad_a + i) > 0, S::all(0), S::load(f + i)));
            scale_rows(i);
        });
        if (first) {
            dead_mass = 0, dead_rows = dead_columns = false;
            for (int64_t i = 0; i < n; ++i) {
                dead_mass += (double)(mass_a[i] - weight_a[i]);
                dead_rows |= pad_a[i] > 0;
            }
            for (int64_t j = 0; j < m; ++j) dead_columns |= pad_b[j] > 0;
        }
    }

    // v and b v from g; a u from f: together with the mass, since apart, with extreme masses, one
    // could be 0 and the other infinite.
    void scale_columns(int64_t j) {
        const Vector scaling = S::exp((S::load(g + j) - S::load(base_g + j)) * inverse_epsilon);
        S::store(v + j, scaling);
        S::store(bv + j, S::load(weight_b + j) * scaling);
    }
    void scale_rows(int64_t i) { S::store(au + i, row_share(i, S::load(f + i), S::load(base_f + i))); }

    // a exp((f - origin) / epsilon) of a vector of rows, 0 for rows without an allowed pair.
    Vector row_share(int64_t i, Vector potential, Vector origin) const {
        const Vector exponent = (potential - origin) * inverse_epsilon + S::load(log_a + i);
        return S::select(S::load(pad_a + i) > 0, S::all(0), S::exp(exponent));
    }

    // A line whose least cost is +inf has no allowed pair.
    static void mark_dead(Vector least, const T* mass, T* pad, T* weight) {
        const Mask dead = least == C::infinity;
        S::store(pad, S::select(dead, S::all(1), S::all(0)));
        S::store(weight, S::select(dead, S::all(0), S::load(mass)));
    }

    // -------------------------------------------------------------------------- reading K once

    // Weighted sums of a block of rows of K; lane r of group q is row q * width + r.
    static __attribute__((always_inline)) void row_sums(const T* k, const T* weights, int64_t cols,
                                                        Vector* sum) {
        Vector line[block];
        for (int r = 0; r < block; ++r) line[r] = S::all(0);
        for (int64_t j = 0; j < cols; j += width, k += block * width) {
            const Vector weight = S::load(weights + j);
            for (int r = 0; r < block; ++r) line[r] += S::load(k + r * width) * weight;
        }
        for (int q = 0; q < groups; ++q)
            sum[q] = S::template across<typename S::Sum>(line + q * width);
    }

    // Adds a block of rows of K, each times its weight, to the column sums.
    static __attribute__((always_inline)) void add_rows(const T* k, const T* weights, int64_t cols,
                                                        T* sums) {
        Vector weight[block];
        for (int r = 0; r < block; ++r) weight[r] = S::all(weights[r]);
        for (int64_t j = 0; j < cols; j += width, k += block * width) {
            Vector sum = S::load(sums + j);
            for (int r = 0; r < block; ++r) sum += S::load(k + r * width) * weight[r];
            S::store(sums + j, sum);
        }
    }

    // The sums of the rows of K, weighted by `column_weights`, go to `row`, which answers with the
    // weight of these rows in the sums of the columns, which go to `column`. A block's column pass
    // follows the next block's row pass, so that what `row` computes is off the critical path.
    // Threads have to meet before the results of `column` are read.
    template <typename Row, typename Column>
    __attribute__((always_inline)) inline void sweep(const T* column_weights, T* row_weights,
                                                     Row row, Column column) {
        // Stores could change members, for all the compiler knows; not these.
        const int64_t cols = col_count, count = chunks;
        T* const parts = part;
        own_chunks([&](int64_t c, int64_t from, int64_t to) __attribute__((always_inline)) {
            T* sums = parts + c * cols;
            for (int64_t j = 0; j < cols; j += width) S::store(sums + j, S::all(0));
            const T* last = nullptr;
            for (int64_t b = from; b < to; ++b) {
                const T* k = kernel_tile(b);
                Vector sum[groups];
                row_sums(k, column_weights, cols, sum);
                for (int q = 0; q < groups; ++q) {
                    const int64_t i = b * block + q * width;
                    S::store(row_weights + i, row(i, sum[q]));
                }
                if (last) add_rows(last, row_weights + (b - 1) * block, cols, sums);
                last = k;
            }
            add_rows(last, row_weights + (to - 1) * block, cols, sums);
        });
        sync(team);
        own_columns([&](int64_t j) __attribute__((always_inline)) {
            Vector sum = S::load(parts + j);
            for (int64_t c = 1; c < count; ++c) sum += S::load(parts + c * cols + j);
            column(j, sum);
        });
    }

    // --------------------------------------------------------------------------- one iteration

    enum class Measure { nothing, rows, columns };
    struct Step {
        bool rows_trusted, trusted, calm;
        double residual;
    };

    // The mass a row or column is asked to carry, given its potential.
    static Vector asked(const T* weight, Vector potential, T rho) {
        if (!(rho < C::infinity)) return S::load(weight);
        return S::load(weight) * S::exp(potential * (-1 / rho));
    }

    // One iteration by scaling, into u_next and v_next, or f_next and g_next.
    template <Measure measure, bool potentials>
    __attribute__((noinline)) Step iterate() {
        const T *const pad_of_row = pad_a, *const weight_of_row = weight_a, *const old_f = f;
        const T *const pad_of_col = pad_b, *const weight_of_col = weight_b, *const old_g = g;
        const T *const origin_f = base_f, *const origin_g = base_g;
        T *const new_u = potentials ? f_next : u_next, *const new_v = potentials ? g_next : v_next;
        T *const row_weights = au, *const col_weights = bv;
        T *const row_miss = miss_a + parity * row_count, *const col_miss = miss_b + parity * col_count;
        const T keep = alpha, take_a = share_a, take_b = share_b, scale = inverse_epsilon;
        const T eps = epsilon, strength_a = rho_a, strength_b = rho_b;

        Range rows, all;
        sweep(
            col_weights, row_weights,
            [&](int64_t i, Vector sum) __attribute__((always_inline)) {
                const Vector total = sum + S::load(pad_of_row + i);
                const Vector mass = S::load(weight_of_row + i);
                rows.add(total);
                if constexpr (measure == Measure::rows) {
                    const Vector wanted =
                        potentials ? asked(weight_of_row + i, S::load(old_f + i), strength_a) : mass;
                    S::store(row_miss + i, S::absolute(S::load(row_weights + i) * total - wanted));
                }
                if constexpr (potentials) {
                    const Vector origin = S::load(origin_f + i);
                    const Vector next = keep * S::load(old_f + i) + take_a * (origin - eps * S::log(total));
                    const Vector scaling = S::exp((next - origin) * scale);
                    rows.add(scaling);
                    S::store(new_u + i, next);
                    return mass * scaling;
                } else {
                    const Vector scaling = T(1) / total;
                    S::store(new_u + i, scaling);
                    return mass * scaling;
                }
            },
            [&](int64_t j, Vector sum) __attribute__((always_inline)) {
                const Vector total = sum + S::load(pad_of_col + j);
                const Vector mass = S::load(weight_of_col + j);
                all.add(total);
                if constexpr (measure == Measure::columns)
                    S::store(col_miss + j,
                             S::absolute(S::load(col_weights + j) * total -
                                         asked(weight_of_col + j, S::load(old_g + j), strength_b)));
                Vector scaling = T(1) / total;
                if constexpr (potentials) {
                    const Vector origin = S::load(origin_g + j);
                    const Vector next = keep * S::load(old_g + j) + take_b * (origin - eps * S::log(total));
                    scaling = S::exp((next - origin) * scale);
                    all.add(scaling);
                    S::store(new_v + j, next);
                } else {
                    S::store(new_v + j, scaling);
                }
                S::store(col_weights + j, mass * scaling);
            });
        all.add(rows);
        if (team.size > 1) {
            Report* shared = reports + parity * team.size;
            shared[team.rank].rows = rows, shared[team.rank].all = all;
            sync(team);
            for (int t = 0; t < team.size; ++t) rows.add(shared[t].rows), all.add(shared[t].all);
        }
        Step step = {true, true, all.within(Bounds<T>::drift), 0};
        if (!step.calm) {
            step.rows_trusted = rows.within(Bounds<T>::trusted);
            step.trusted = all.within(Bounds<T>::trusted);
        }
        if (measure == Measure::rows)
            step.residual = sum_of(row_miss, n) + (rho_a < C::infinity ? 0 : dead_mass);
        if (measure == Measure::columns) step.residual = sum_of(col_miss, m) + dead_columns_mass();
        parity ^= 1;
        return step;
    }

    double dead_columns_mass() const {
        double missing = 0;
        if (!dead_columns || rho_b < C::infinity) return 0;
        for (int64_t j = 0; j < m; ++j) missing += (double)(mass_b[j] - weight_b[j]);
        return missing;
    }

    // The potentials of the current u and v.
    void absorb() {
        if (relaxed) return;
        own_rows([&](int64_t i) {
            S::store(f + i, S::load(base_f + i) + epsilon * S::log(S::load(u + i)));
        });
        own_columns([&](int64_t j) {
            S::store(g + j, S::load(base_g + j) + epsilon * S::log(S::load(v + j)));
        });
        sync(team);
    }

    // The same iteration in the log domain, from f and g into f_next and g_next.
    double iterate_log_domain(bool measure_columns) {
        T *const row_miss = miss_a + parity * row_count, *const col_miss = miss_b + parity * col_count;
        own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            T* lowest = part + chunk * col_count;
            for (int64_t j = 0; j < col_count; j += width) S::store(lowest + j, S::all(C::infinity));
            for (int64_t b = from; b < to; ++b) {
                const T* c = cost_tile(b, panels);
                Vector line[block], least[block];
                for (int r = 0; r < block; ++r) {
                    least[r] = S::all(C::infinity);
                    for (int64_t j = 0; j < col_count; j += width)
                        least[r] = S::min(least[r], row_exponent(c, r, j));
                }
                T origin[block];
                for (int q = 0; q < groups; ++q) {
                    const int64_t i = b * block + q * width;
                    const Vector x = S::template across<typename S::Minimum>(least + q * width);
                    S::store_unaligned(origin + q * width,
                                       S::select(S::load(pad_a + i) > 0, S::all(0), x));
                }
                for (int r = 0; r < block; ++r) {
                    line[r] = S::all(0);
                    for (int64_t j = 0; j < col_count; j += width)
                        line[r] += S::exp(origin[r] - row_exponent(c, r, j));
                }
                for (int q = 0; q < groups; ++q) {
                    const int64_t i = b * block + q * width;
                    const Vector total =
                        S::template across<typename S::Sum>(line + q * width) + S::load(pad_a + i);
                    const Vector softmin =
                        epsilon * (S::load_unaligned(origin + q * width) - S::log(total));
                    const Vector old = S::load(f + i);
                    S::store(row_miss + i, S::absolute(row_share(i, old, softmin) -
                                                       asked(weight_a + i, old, rho_a)));
                    S::store(f_next + i, alpha * old + share_a * softmin);
                }
                for (int r = 0; r < block; ++r)
                    for (int64_t j = 0; j < col_count; j += width)
                        S::store(lowest + j, S::min(S::load(lowest + j), column_exponent(c, b, r, j)));
            }
        });
        sync(team);
        // The least exponent of every column goes into g_next for a while.
        own_columns([&](int64_t j) {
            Vector least = S::load(part + j);
            for (int64_t c = 1; c < chunks; ++c)
                least = S::min(least, S::load(part + c * col_count + j));
            S::store(g_next + j, S::select(S::load(pad_b + j) > 0, S::all(0), least));
        });
        sync(team);
        own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            T* sums = part + chunk * col_count;
            for (int64_t j = 0; j < col_count; j += width) S::store(sums + j, S::all(0));
            for (int64_t b = from; b < to; ++b) {
                const T* c = cost_tile(b, panels);
                for (int64_t j = 0; j < col_count; j += width) {
                    const Vector origin = S::load(g_next + j);
                    Vector sum = S::load(sums + j);
                    for (int r = 0; r < block; ++r)
                        sum += S::exp(origin - column_exponent(c, b, r, j));
                    S::store(sums + j, sum);
                }
            }
        });
        sync(team);
        own_columns([&](int64_t j) {
            Vector total = S::load(pad_b + j);
            for (int64_t c = 0; c < chunks; ++c) total += S::load(part + c * col_count + j);
            const Vector softmin = epsilon * (S::load(g_next + j) - S::log(total));
            const Vector old = S::load(g + j);
            const Vector share = S::load(weight_b + j) * S::exp((old - softmin) * inverse_epsilon);
            S::store(col_miss + j, S::absolute(share - asked(weight_b + j, old, rho_b)));
            S::store(g_next + j, alpha * old + share_b * softmin);
        });
        sync(team);
        const double residual = measure_columns ? sum_of(col_miss, m) + dead_columns_mass()
                                                : sum_of(row_miss, n) + (rho_a < C::infinity ? 0 : dead_mass);
        parity ^= 1;
        return residual;
    }

    __attribute__((always_inline)) inline Vector row_exponent(const T* c, int r, int64_t j) const {
        const Vector cost = S::load(c + j * block + r * width);
        return (cost - S::load(g + j)) * inverse_epsilon - S::load(log_b + j);
    }
    __attribute__((always_inline)) inline Vector column_exponent(const T* c, int64_t b, int r,
                                                                 int64_t j) const {
        const Vector cost = S::load(c + j * block + r * width);
        return (cost - f_next[b * block + r]) * inverse_epsilon - log_a[b * block + r];
    }

    // ----------------------------------------------------------------------------- the solution

    struct Options {
        int32_t max_iter;
        double tol;
        T omega;
        int anderson;
        double anneal_start, anneal_ratio;
    };

    // Iterates from f and g; returns the number of iterations, and whether `tol` was reached.
    int32_t solve(const Options& options, bool& converged) {
        relaxed = options.omega != 1 || rho_a < C::infinity || rho_b < C::infinity ||
                  options.anderson > 0;
        Mixer mixer(*this, options.anderson);
        bool scaled = false;    // the state is u and v; otherwise it is f and g
        bool current = false;   // base, a u and b v belong to the state
        bool first = true;
        bool cold = false;      // the last iteration was at the temperature of the problem
        int failures = 0;       // of the scaling: after a few, only the log domain is used
        double heat = options.anneal_start;
        int32_t done = 0;
        converged = false;
        record(0, scaled);
        while (done < options.max_iter) {
            const T temperature = heat > (double)target ? (T)heat : target;
            if (temperature != epsilon) {
                if (scaled) absorb();
                scaled = current = false;
                set_temperature(temperature);
            }
            const bool plain = done == 0 || temperature != target;
            set_step(plain ? (T)1 : options.omega);
            const bool test = options.tol > 0 && done > 0 && cold && temperature == target;
            const bool fresh = !current;
            Step step = {false, false, true, 0};
            if (fresh) {
                if (scaled) absorb();
                scaled = false;
                if (failures < 4 || first) rebase(first);
                current = true, first = false;
            }
            bool log_domain = failures >= 4;
            if (!log_domain) {
                step = mixer.memory > 0 ? iterate<Measure::columns, true>()
                       : relaxed ? (test ? iterate<Measure::rows, true>() : iterate<Measure::nothing, true>())
                                 : (test ? iterate<Measure::rows, false>() : iterate<Measure::nothing, false>());
                if (!step.trusted && !(test && mixer.memory == 0 && step.rows_trusted &&
                                       step.residual <= options.tol)) {
                    // Its weights belong to no state.
                    current = false;
                    if (!fresh) continue;
                    ++failures;
                    log_domain = true;
                }
            }
            if (log_domain) {
                step = {true, true, false, iterate_log_domain(mixer.memory > 0)};
            }
            if (test && mixer.memory == 0 && step.rows_trusted && step.residual <= options.tol) {
                converged = true;
                current = false;  // the iteration is not taken
                break;
            }
            if (relaxed || log_domain) {
                exchange(f, f_next);
                exchange(g, g_next);
                scaled = false;
            } else {
                exchange(u, u_next);
                exchange(v, v_next);
                scaled = true;
            }
            // A state that is not calm even on a base of its own gains nothing from another.
            current = !log_domain && (step.calm || (fresh && relaxed));
            ++done;
            record(done, scaled);
            if (mixer.memory > 0) {
                const bool enough = options.tol > 0 && !plain && step.residual <= options.tol;
                if (mixer.next(plain, step.residual) && !enough && done < options.max_iter) {
                    // g is an input of the mixer's choice.
                    Range range;
                    own_columns([&](int64_t j) {
                        scale_columns(j);
                        range.add(S::load(v + j));
                    });
                    if (!agreed(range).within(Bounds<T>::drift)) current = false;
                }
                if (enough) {
                    converged = true;
                    break;
                }
            }
            cold = temperature == target;
            heat *= options.anneal_ratio;
        }
        if (mixer.memory > 0 && done > 0) {
            own_columns([&](int64_t j) { S::store(g + j, S::load(mixer.image + j)); });
            sync(team);
            current = false;
        }
        finish(scaled, current && epsilon == target, first);
        return done;
    }

    // Leaves f and g, and K, a u and b v (or the plan with weights 1) that belong to them.
    void finish(bool scaled, bool current, bool first) {
        if (scaled) {
            // Of the last iteration taken: one that was tried and dropped has left its weights.
            own_rows([&](int64_t i) { S::store(au + i, S::load(weight_a + i) * S::load(u + i)); });
            own_columns([&](int64_t j) { S::store(bv + j, S::load(weight_b + j) * S::load(v + j)); });
            const bool here = epsilon == target;
            absorb();
            if (here) return;
            current = false;
        }
        if (current) return;
        if (first) rebase(true);  // marks the lines without a pair
        set_temperature(target);
        plan_is_kernel = true;
        own_rows([&](int64_t i) { S::store(au + i, S::all(1)); });
        own_columns([&](int64_t j) { S::store(bv + j, S::all(1)); });
        sync(team);
        build_kernel();
        sync(team);
    }

    // Keeps the potentials after iteration `done` for the reverse sweep.
    void record(int32_t done, bool scaled) {
        if (!history) return;
        T* to = history + (int64_t)done * (row_count + col_count);
        own_rows([&](int64_t i) {
            S::store(to + i, scaled ? S::load(base_f + i) + epsilon * S::log(S::load(u + i)) : S::load(f + i));
        });
        to += row_count;
        own_columns([&](int64_t j) {
            S::store(to + j, scaled ? S::load(base_g + j) + epsilon * S::log(S::load(v + j)) : S::load(g + j));
        });
    }

    // Anderson acceleration of the map from g to the g of the next iteration (type II, safeguarded
    // by the residual: a mixture that made it grow is taken back).
    struct Mixer {
        Solver& s;
        const int memory;
        T *image = nullptr, *last_g = nullptr, *last_r = nullptr, *differences = nullptr;
        bool has_last = false, extrapolated = false;
        int count = 0, oldest = 0;
        double last_residual = 0;

        Mixer(Solver& solver, int depth) : s(solver), memory(depth) {
            if (depth == 0) return;
            image = s.memory, last_g = image + s.col_count, last_r = last_g + s.col_count;
            differences = last_r + s.col_count;
        }
        T* dg(int k) const { return differences + 2 * k * s.col_count; }
        T* dr(int k) const { return dg(k) + s.col_count; }

        // After an iteration: g holds its image and g_next its input. Puts the next input into g;
        // true when that is not the image itself.
        bool next(bool plain, double residual) {
            bool chosen = false;
            // Every thread decides alike; only one writes.
            if (plain) {
                count = oldest = 0, has_last = extrapolated = false;
                s.alone([&] { copy(image, s.g); });
                return false;
            }
            if (extrapolated && !(residual <= last_residual)) {
                count = oldest = 0, has_last = extrapolated = false;
                s.alone([&] {
                    copy(image, s.g);
                    // The plain image of the last accepted input.
                    for (int64_t j = 0; j < s.col_count; j += width)
                        S::store(s.g + j, S::load(last_g + j) + S::load(last_r + j));
                });
                return true;
            }
            const int slot = (oldest + count) % memory;
            const bool push = has_last;
            s.alone([&] {
                copy(image, s.g);
                for (int64_t j = 0; j < s.col_count; j += width) {
                    const Vector input = S::load(s.g_next + j), r = S::load(s.g + j) - input;
                    if (push) {
                        S::store(dg(slot) + j, input - S::load(last_g + j));
                        S::store(dr(slot) + j, r - S::load(last_r + j));
                    }
                    S::store(last_g + j, input);
                    S::store(last_r + j, r);
                }
            });
            if (push) {
                if (count == memory) oldest = (oldest + 1) % memory;
                else ++count;
            }
            has_last = true, last_residual = residual;
            extrapolated = chosen = false;
            if (count > 0) {
                double gamma[max_anderson];
                chosen = solve_weights(gamma);
                if (chosen) {
                    s.alone([&] {
                        for (int64_t j = 0; j < s.col_count; j += width) {
                            Vector mixed = S::load(image + j);
                            for (int k = 0; k < count; ++k)
                                mixed -= (T)gamma[k] * (S::load(dg(k) + j) + S::load(dr(k) + j));
                            S::store(s.g + j, mixed);
                        }
                    });
                    bool finite = true;
                    for (int64_t j = 0; j < s.col_count; ++j) finite &= s.g[j] - s.g[j] == 0;
                    extrapolated = finite;
                    if (!finite) {
                        count = oldest = 0, has_last = false;
                        s.alone([&] { copy(s.g, image); });
                    }
                }
            }
            return chosen;
        }

        void copy(T* to, const T* from) const {
            for (int64_t j = 0; j < s.col_count; j += width) S::store(to + j, S::load(from + j));
        }

        // Least squares in the norm with weights b: (A + ridge) gamma = c by Cholesky. With a full
        // ring the order of the differences does not matter.
        bool solve_weights(double* gamma) const {
            double a[max_anderson][max_anderson], trace = 0;
            for (int k = 0; k < count; ++k) {
                for (int l = 0; l <= k; ++l) a[k][l] = product(dr(k), dr(l));
                gamma[k] = product(dr(k), last_r);
                trace += a[k][k];
            }
            if (!(trace > 0)) return false;
            for (int k = 0; k < count; ++k) a[k][k] += Bounds<T>::ridge * trace / count;
            for (int k = 0; k < count; ++k)
                for (int l = 0; l <= k; ++l) {
                    double sum = a[k][l];
                    for (int i = 0; i < l; ++i) sum -= a[k][i] * a[l][i];
                    if (k == l && !(sum > 0)) return false;
                    a[k][l] = k == l ? __builtin_sqrt(sum) : sum / a[l][l];
                }
            for (int k = 0; k < count; ++k) {
                for (int i = 0; i < k; ++i) gamma[k] -= a[k][i] * gamma[i];
                gamma[k] /= a[k][k];
            }
            for (int k = count - 1; k >= 0; --k) {
                for (int i = k + 1; i < count; ++i) gamma[k] -= a[i][k] * gamma[i];
                gamma[k] /= a[k][k];
            }
            return true;
        }

        double product(const T* x, const T* y) const {
            double sum = 0;
            for (int64_t j = 0; j < s.m; ++j)
                sum += (double)s.weight_b[j] * (double)x[j] * (double)y[j];
            return sum;
        }
    };

    // ------------------------------------------------------------------------------ the results

    // Sums over the plan K_ij (a u)_i (b v)_j, finished in double precision. Leaves the row sums
    // of P C in row_spent and the plan's column sums in col_mass; with `columns` also the column
    // sums of P C in col_spent. row sums of the plan go to miss_a.
    Totals sum_up(bool columns) {
        T* const row_mass = miss_a;
        own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            Totals t;
            T *sums = part + chunk * col_count;
            for (int64_t j = 0; j < col_count; j += width) S::store(sums + j, S::all(0));
            for (int64_t b = from; b < to; ++b) {
                Vector sum[groups], spent[block];
                const T *k = kernel_tile(b), *c = cost_tile(b, panels + (b + 1) % 2 * block * col_count);
                row_sums(k, bv, col_count, sum);
                add_rows(k, au + b * block, col_count, sums);
                for (int r = 0; r < block; ++r) spent[r] = S::all(0);
                for (int64_t j = 0; j < col_count; j += width) {
                    const Vector weight = S::load(bv + j);
                    for (int r = 0; r < block; ++r, c += width, k += width)
                        spent[r] += (S::load(k) * weight) * price(c);
                }
                for (int q = 0; q < groups; ++q) {
                    const int64_t i = b * block + q * width;
                    const Vector share = S::load(au + i);
                    S::store(row_mass + i, share * sum[q]);
                    S::store(row_spent + i,
                             share * S::template across<typename S::Sum>(spent + q * width));
                }
            }
            for (int64_t i = from * block; i < to * block && i < n; ++i) {
                const double row = (double)row_mass[i];
                t.linear += (double)row_spent[i];
                t.dual += row * (double)f[i];
                t.mass += row;
                add_marginal(t, row, mass_a[i], weight_a[i], f[i], rho_a);
            }
            row_totals[chunk] = t;
        });
        sync(team);
        own_segments([&](int64_t s, int64_t from, int64_t to) {
            Totals t;
            for (int64_t j = from; j < to; j += width) {
                Vector sum = S::load(part + j);
                for (int64_t c = 1; c < chunks; ++c) sum += S::load(part + c * col_count + j);
                S::store(col_mass + j, S::load(bv + j) * sum);
            }
            for (int64_t j = from; j < to && j < m; ++j) {
                t.dual += (double)col_mass[j] * (double)g[j];
                add_marginal(t, (double)col_mass[j], mass_b[j], weight_b[j], g[j], rho_b);
            }
            col_totals[s] = t;
        });
        sync(team);
        if (columns) spend_columns();
        Totals all;
        for (int64_t c = 0; c < chunks; ++c) accumulate(all, row_totals[c]);
        for (int64_t s = 0; s < segments; ++s) accumulate(all, col_totals[s]);
        return all;
    }

    // A forbidden pair costs nothing, because nothing moves there.
    static __attribute__((always_inline)) Vector price(const T* c) {
        const Vector cost = S::load(c);
        return S::select(cost < C::infinity, cost, S::all(0));
    }

    void spend_columns() {
        own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            T* sums = part + chunk * col_count;
            for (int64_t j = 0; j < col_count; j += width) S::store(sums + j, S::all(0));
            for (int64_t b = from; b < to; ++b) {
                const T *k = kernel_tile(b), *c = cost_tile(b, panels + (b + 1) % 2 * block * col_count);
                const T* weight = au + b * block;
                for (int64_t j = 0; j < col_count; j += width) {
                    Vector sum = S::load(sums + j);
                    for (int r = 0; r < block; ++r, c += width, k += width)
                        sum += (S::load(k) * weight[r]) * price(c);
                    S::store(sums + j, sum);
                }
            }
        });
        sync(team);
        own_columns([&](int64_t j) {
            Vector sum = S::load(part + j);
            for (int64_t c = 1; c < chunks; ++c) sum += S::load(part + c * col_count + j);
            S::store(col_spent + j, S::load(bv + j) * sum);
        });
        sync(team);
    }

    static void accumulate(Totals& to, const Totals& t) {
        to.linear += t.linear, to.dual += t.dual, to.mass += t.mass;
        to.error += t.error, to.divergence += t.divergence;
    }

    // How far a line's mass is from what its potential asks for, and what that costs.
    static void add_marginal(Totals& t, double found, T mass, T weight, T potential, T rho) {
        if (!(rho < C::infinity)) {
            t.error += __builtin_fabs(found - (double)mass);
            return;
        }
        const double wanted = (double)weight * __builtin_exp(-(double)potential / (double)rho);
        t.error += __builtin_fabs(found - wanted);
        const double logs = found > 0 ? found * __builtin_log(found / (double)mass) : 0;
        t.divergence += (double)rho * (logs - found + (double)mass);
    }

    double value(const Totals& t) const {
        return t.dual + (double)target * (total_a * total_b - t.mass) + t.divergence;
    }

    bool feasible() const {
        const bool fixed_a = !(rho_a < C::infinity), fixed_b = !(rho_b < C::infinity);
        const double larger = total_a > total_b ? total_a : total_b;
        if (fixed_a && fixed_b && __builtin_fabs(total_a - total_b) > unequal * larger) return false;
        return !(fixed_a && dead_rows) && !(fixed_b && dead_columns);
    }

    // --------------------------------------------------------------------- the adjoint system

    // Solves the system of sinkhorn.h for w and z by conjugate gradients on what is left when w is
    // eliminated, preconditioned by the column masses, after sum_up(true). Returns the relative
    // residual. Balanced, the system has the null vector (1, -1): the right side is orthogonal to
    // it, and in the end w is shifted to have mean 0 under the row sums.
    double solve_adjoint() {
        const T relief_a = rho_a < C::infinity ? 1 + target / rho_a : (T)1;
        const T relief_b = rho_b < C::infinity ? 1 + target / rho_b : (T)1;
        T* const row_mass = miss_a;
        T* const inverse_r = u_next;  // of the relieved row sums, 0 where nothing moves
        T *const diagonal = v_next, *const best_z = g_next;
        own_rows([&](int64_t i) {
            const Vector r = S::load(row_mass + i) * relief_a;
            S::store(inverse_r + i, S::select(r > 0, 1 / r, S::all(0)));
        });
        own_columns([&](int64_t j) {
            S::store(diagonal + j, S::load(col_mass + j) * relief_b);
            S::store(z + j, S::all(0));
        });
        sync(team);
        // The right side: t - P' (s / r).
        own_rows([&](int64_t i) {
            S::store(w + i, S::load(au + i) * S::load(row_spent + i) * S::load(inverse_r + i));
        });
        columns_of(w, [&](int64_t j, Vector sum) {
            const Vector live = S::load(diagonal + j);
            const Vector q = S::load(col_spent + j) - S::load(bv + j) * sum;
            S::store(cg_r + j, S::select(live > 0, q, S::all(0)));
            S::store(cg_p + j, S::all(0));
        });
        const bool singular = !(rho_a < C::infinity) && !(rho_b < C::infinity);
        sync(team);
        const double scale = energy(col_spent, diagonal), start = settle(diagonal, singular);
        // Nothing but rounding is left where the parts of the right side cancel.
        const double noise = Bounds<T>::solved * Bounds<T>::solved * scale;
        double rho = start, best = start;
        own_columns([&](int64_t j) {
            const Vector live = S::load(diagonal + j);
            S::store(cg_p + j, S::select(live > 0, S::load(cg_r + j) / live, S::all(0)));
            S::store(best_z + j, S::all(0));
        });
        for (int64_t step = 0, stale = 0; rho > noise && stale < patience; ++step) {
            if (step == 4 * m + 100) break;
            // q = diag(c') p - P' (P p / r')
            T* const scaled = col_spent;  // no longer needed
            own_columns([&](int64_t j) {
                S::store(scaled + j, S::load(bv + j) * S::load(cg_p + j));
            });
            sync(team);
            sweep(
                scaled, w,
                [&](int64_t i, Vector sum) {
                    const Vector share = S::load(au + i);
                    return share * (share * sum * S::load(inverse_r + i));
                },
                [&](int64_t j, Vector sum) {
                    S::store(cg_q + j,
                             S::load(diagonal + j) * S::load(cg_p + j) - S::load(bv + j) * sum);
                });
            sync(team);
            const double curvature = dot(cg_p, cg_q);
            // Rounding has the last word near the solution: no step along a direction it decides.
            const double length = rho / curvature;
            if (!(curvature > 0) || !(length - length == 0)) break;
            own_columns([&](int64_t j) {
                S::store(z + j, S::load(z + j) + (T)length * S::load(cg_p + j));
                S::store(cg_r + j, S::load(cg_r + j) - (T)length * S::load(cg_q + j));
            });
            const double next = settle(diagonal, singular);
            if (!(next - next == 0)) break;
            stale = next < best / 2 ? 0 : stale + 1;
            if (next < best) {
                best = next;
                own_columns([&](int64_t j) { S::store(best_z + j, S::load(z + j)); });
            }
            const T turn = (T)(next / rho);
            rho = next;
            own_columns([&](int64_t j) {
                const Vector live = S::load(diagonal + j);
                S::store(cg_p + j, S::select(live > 0, S::load(cg_r + j) / live, S::all(0)) +
                                       turn * S::load(cg_p + j));
            });
        }
        own_columns([&](int64_t j) { S::store(z + j, S::load(best_z + j)); });
        sync(team);
        // w = (s - P z) / r'
        T* const scaled = col_spent;
        own_columns([&](int64_t j) { S::store(scaled + j, S::load(bv + j) * S::load(z + j)); });
        sync(team);
        sweep(
            scaled, cg_w(),
            [&](int64_t i, Vector sum) {
                const Vector found = S::load(row_spent + i) - S::load(au + i) * sum;
                S::store(w + i, found * S::load(inverse_r + i));
                return S::all(0);
            },
            [&](int64_t, Vector) {});
        sync(team);
        if (singular) {
            double mean = 0, mass = 0;
            for (int64_t i = 0; i < n; ++i) {
                mean += (double)row_mass[i] * (double)w[i];
                mass += (double)row_mass[i];
            }
            const T shift = mass > 0 ? (T)(mean / mass) : (T)0;
            sync(team);
            own_rows([&](int64_t i) { S::store(w + i, S::load(w + i) - shift); });
            own_columns([&](int64_t j) { S::store(z + j, S::load(z + j) + shift); });
            sync(team);
        }
        return start > noise ? __builtin_sqrt(best / start) : 0;
    }

    // Takes the part of the residual along the null vector away, and returns its energy.
    double settle(const T* diagonal, bool singular) {
        sync(team);
        double sum = 0, mass = 0;
        for (int64_t j = 0; singular && j < m; ++j) {
            sum += (double)cg_r[j];
            mass += (double)diagonal[j];
        }
        sync(team);
        if (singular && mass > 0)
            own_columns([&](int64_t j) {
                S::store(cg_r + j, S::load(cg_r + j) - (T)(sum / mass) * S::load(diagonal + j));
            });
        sync(team);
        return energy(cg_r, diagonal);
    }

    T* cg_w() { return f_next; }

    // The column sums of K with given weights of its rows.
    template <typename Column>
    void columns_of(const T* row_weights, Column column) {
        own_chunks([&](int64_t chunk, int64_t from, int64_t to) {
            T* sums = part + chunk * col_count;
            for (int64_t j = 0; j < col_count; j += width) S::store(sums + j, S::all(0));
            for (int64_t b = from; b < to; ++b)
                add_rows(kernel_tile(b), row_weights + b * block, col_count, sums);
        });
        sync(team);
        own_columns([&](int64_t j) {
            Vector sum = S::load(part + j);
            for (int64_t c = 1; c < chunks; ++c) sum += S::load(part + c * col_count + j);
            column(j, sum);
        });
    }

    double dot(const T* x, const T* y) const {
        double sum = 0;
        for (int64_t j = 0; j < m; ++j) sum += (double)x[j] * (double)y[j];
        return sum;
    }
    double energy(const T* x, const T* diagonal) const {
        double sum = 0;
        for (int64_t j = 0; j < m; ++j)
            if (diagonal[j] > 0) sum += (double)x[j] * (double)x[j] / (double)diagonal[j];
        return sum;
    }
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
