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
struct Mixer;  // anderson.h

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
    static constexpr int64_t woven_bytes = 512;  // of a row: measured, half as wide gains nothing
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

    __attribute__((noinline)) void make_kernel(int64_t b, T* to) const {
        const T* c = cost_tile(b, to);
        const bool plan = holding == Holding::plan;
        const bool with_a = plan || holding == Holding::columns;
        const bool with_b = plan || holding == Holding::rows;
        const T *rows = plan ? f : base_f, *columns = plan ? g : base_g;
        T row[block], extra[block];
        for (int r = 0; r < block; ++r) {
            row[r] = rows[b * block + r];
            extra[r] = with_a ? log_a[b * block + r] : 0;
        }
        for (int64_t j = 0; j < col_count; j += width) {
            const Vector gj = S::load(columns + j);
            const Vector log_bj = with_b ? S::load(log_b + j) : S::all(0);
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
        holding = Holding::kernel;
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

    // Adds a vector of columns of some rows of K, each row times its weight, to their sum. Two
    // chains: one would mostly wait for its own last addition.
    template <int lines>
    static __attribute__((always_inline)) Vector added(Vector sum, const T* k, const Vector* weight) {
        Vector other = S::all(0);
        for (int r = 0; r < lines; r += 2) {
            sum += S::load(k + r * width) * weight[r];
            other += S::load(k + (r + 1) * width) * weight[r + 1];
        }
        return sum + other;
    }

    // Adds some rows of a tile of K, each row times its weight, to the column sums.
    template <int lines = block>
    static __attribute__((always_inline)) void add_rows(const T* k, const T* weights, int64_t cols,
                                                        T* sums) {
        Vector weight[lines];
        for (int r = 0; r < lines; ++r) weight[r] = S::all(weights[r]);
        for (int64_t j = 0; j < cols; j += width, k += block * width)
            S::store(sums + j, added<lines>(S::load(sums + j), k, weight));
    }

    // The sums of rows i and so on, from a vector of lanes for each, go to `row`, which answers
    // with the weights of these rows in the sums of the columns.
    template <typename Lanes, int lines, typename Row>
    static __attribute__((always_inline)) inline void finish_rows(int64_t i, Vector* line,
                                                                  T* row_weights, const Row& row) {
        for (int r = 0; r < lines; r += Lanes::width)
            Lanes::store(row_weights + i + r,
                         row(Lanes(), i + r,
                             S::template across_into<typename S::Sum, Lanes>(line + r)));
    }

    // Reads each tile twice in quick succession. A tile's column pass follows the next tile's row
    // pass, so that what `row` computes is off the critical path.
    template <typename Row>
    __attribute__((always_inline)) inline void read_in_turn(int64_t from, int64_t to,
                                                            const T* column_weights,
                                                            T* row_weights, T* sums,
                                                            const Row& row) {
        const int64_t cols = col_count;
        const T* last = nullptr;
        for (int64_t b = from; b < to; ++b) {
            const T *const tile = kernel_tile(b), *k = tile;
            Vector line[block];
            for (int r = 0; r < block; ++r) line[r] = S::all(0);
            for (int64_t j = 0; j < cols; j += width, k += block * width) {
                const Vector weight = S::load(column_weights + j);
                for (int r = 0; r < block; ++r) line[r] += S::load(k + r * width) * weight;
            }
            finish_rows<S, block>(b * block, line, row_weights, row);
            if (last) add_rows(last, row_weights + (b - 1) * block, cols, sums);
            last = tile;
        }
        add_rows(last, row_weights + (to - 1) * block, cols, sums);
    }

    // The same, where registers suffice, eight rows at a time, with the column pass of the last
    // ones woven into the row pass of the next: so what comes from the outer cache is waited for
    // while there is work from the inner one, which needs to hold no more than these rows.
    static constexpr int few = 8;
    typedef Simd<T, few * (int)sizeof(T) < OPTICAL_VECTOR_BYTES ? few * (int)sizeof(T)
                                                                : OPTICAL_VECTOR_BYTES> Few;
    template <typename Row>
    __attribute__((always_inline)) inline void read_woven(int64_t from, int64_t to,
                                                          const T* column_weights, T* row_weights,
                                                          T* sums, const Row& row) {
        const int64_t cols = col_count;
        const T *tile = nullptr, *last = nullptr;
        for (int64_t i = from * block; i < to * block; i += few) {
            if (i % block == 0) tile = kernel_tile(i / block);
            const T *const first = tile + i % block * width, *k = first;
            Vector line[few], weight[few];
            for (int r = 0; r < few; ++r) line[r] = S::all(0);
            // The first rows have none before them, and read themselves with weights of zero.
            for (int r = 0; r < few; ++r) weight[r] = S::all(last ? row_weights[i - few + r] : 0);
            const T* before = last ? last : first;
            for (int64_t j = 0; j < cols; j += width, k += block * width, before += block * width) {
                const Vector of_column = S::load(column_weights + j);
                for (int r = 0; r < few; ++r) line[r] += S::load(k + r * width) * of_column;
                S::store(sums + j, added<few>(S::load(sums + j), before, weight));
            }
            finish_rows<Few, few>(i, line, row_weights, row);
            last = first;
        }
        add_rows<few>(last, row_weights + to * block - few, cols, sums);
    }

    // The sums of the rows of K, weighted by `column_weights`, go to `row`, with the vectors to use
    // and the place of the first row; it answers with the weights of these rows in the sums of the
    // columns, which go to `column`. Threads have to meet before the results of `column` are read.
    template <typename Row, typename Column>
    __attribute__((always_inline)) inline void sweep(const T* column_weights, T* row_weights,
                                                     Row row, Column column) {
        // Stores could change members, for all the compiler knows; not these.
        const int64_t cols = col_count, count = chunks;
        T* const parts = part;
        own_chunks([&](int64_t c, int64_t from, int64_t to) __attribute__((always_inline)) {
            T* sums = parts + c * cols;
            for (int64_t j = 0; j < cols; j += width) S::store(sums + j, S::all(0));
            if constexpr (OPTICAL_MANY_REGISTERS)
                if (cols * (int64_t)sizeof(T) >= woven_bytes)
                    return read_woven(from, to, column_weights, row_weights, sums, row);
            read_in_turn(from, to, column_weights, row_weights, sums, row);
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
    template <typename Lanes = S>
    static typename Lanes::Vector asked(const T* weight, typename Lanes::Vector potential, T rho) {
        if (!(rho < C::infinity)) return Lanes::load(weight);
        return Lanes::load(weight) * Lanes::exp(potential * (-1 / rho));
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
            [&](auto lanes, int64_t i, auto sum) __attribute__((always_inline)) {
                typedef decltype(lanes) L;
                const auto total = sum + L::load(pad_of_row + i), mass = L::load(weight_of_row + i);
                rows.template add_lanes<L>(total);
                if constexpr (measure == Measure::rows) {
                    auto wanted = mass;
                    if constexpr (potentials)
                        wanted = asked<L>(weight_of_row + i, L::load(old_f + i), strength_a);
                    L::store(row_miss + i, L::absolute(L::load(row_weights + i) * total - wanted));
                }
                auto scaling = T(1) / total;
                if constexpr (potentials) {
                    const auto origin = L::load(origin_f + i);
                    const auto next =
                        keep * L::load(old_f + i) + take_a * (origin - eps * L::log(total));
                    scaling = L::exp((next - origin) * scale);
                    rows.template add_lanes<L>(scaling);
                    L::store(new_u + i, next);
                } else {
                    L::store(new_u + i, scaling);
                }
                return mass * scaling;
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
        Mixer<T> mixer(*this, options.anderson);
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
        holding = Holding::plan;
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
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
