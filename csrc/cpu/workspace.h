// Arrays in which a problem is solved: potentials, scalings, marginals and partial sums. They are
// shared by a team of threads; each thread has a Workspace object that points at them.
#pragma once

#include "problem.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

// Bounds of u, v and the sums. An entry lost to underflow is below the least normal number, and
// weighs at most `trusted` times the mass in a sum of at least 1 / trusted: with these numbers
// that is under half a unit in the last place while the masses of a side sum to less than 2^8.
template <typename T>
struct Bounds;
template <>
struct Bounds<float> {
    static constexpr float drift = 0x1p30f, trusted = 0x1p46f;
    static constexpr float exponent = 80;          // exp is far from 0 and +inf up to this size
    static constexpr float rounding = 0x1p-18f;     // relative change of u and v; see iteration.h
    static constexpr float least_divisor = 1e-30f;  // masses above this may be divided by
    static constexpr double ridge = 1e-6;           // of the Anderson least squares, relative
    static constexpr double adjoint_noise = 1e-7;   // relative residual below rounding
    static constexpr float largest_potential = 0x1p18f;  // in units of epsilon: last digit is 1/32
};
template <>
struct Bounds<double> {
    static constexpr double drift = 0x1p300, trusted = 0x1p470;
    static constexpr double exponent = 700;
    static constexpr double rounding = 0x1p-42;
    static constexpr double least_divisor = 1e-280;
    static constexpr double ridge = 1e-10;
    static constexpr double adjoint_noise = 1e-14;
    static constexpr double largest_potential = 0x1p47;
};

constexpr int max_anderson = 16;

// Range of positive numbers, compared as bit patterns: these are ordered like the numbers, and
// those of NaN of either sign lie outside every range. One minimum and one maximum per vector
// check a whole sweep.
template <typename T>
struct BitRange {
    typedef Simd<T> S;
    typedef typename S::Vector Vector;
    typedef typename S::Mask Mask;
    Mask least = (Mask)S::all(1), greatest = (Mask)S::all(1);

    template <typename Lanes>
    __attribute__((always_inline)) void add_lanes(typename Lanes::Vector x) {
        const Mask bits = S::repeated((typename Lanes::Mask)x);
        add(bits, bits);
    }
    __attribute__((always_inline)) void add(Vector x) { add_lanes<S>(x); }
    __attribute__((always_inline)) void add(const BitRange& other) {
        add(other.least, other.greatest);
    }
    __attribute__((always_inline)) void add(Mask low, Mask high) {
        least = low < least ? low : least;
        greatest = high > greatest ? high : greatest;
    }
    // All numbers are between 1 / bound and bound.
    bool within(T bound) const {
        return S::every((least >= (Mask)S::all(1 / bound)) & (greatest <= (Mask)S::all(bound)));
    }
};

// Sums of the objective: sum P C, sum P (f + g), sum P, the marginal errors and the penalties.
struct Totals {
    double linear = 0, dual = 0, mass = 0, error = 0, divergence = 0;
};

template <typename T>
struct Workspace {
    typedef BitRange<T> Range;
    static constexpr int width = Tiling<T>::width, block = Tiling<T>::block;

    const Problem<T>& problem;

    // By row, then by column. `unmatched` is 1 for entries without an allowed pair, padding
    // included, and 0 elsewhere: added to the sum of such an entry, which is 0, it yields u = 1 and
    // f = 0. `weight` is the mass, or 0 for unmatched entries. au and bv are a u and b v.
    T *unmatched_a, *weight_a, *f, *f_next, *u, *u_next, *au, *row_error;
    T *unmatched_b, *weight_b, *g, *g_next, *v, *v_next, *bv, *col_error;
    // Sums of the plan P and of P C. row_mass shares the memory of row_error, which is not needed
    // once the iterations have ended.
    T *row_mass, *row_cost, *col_mass, *col_cost;
    T *w, *z, *cg_r, *cg_p, *cg_q;  // adjoint system: solution, and conjugate gradients
    T* partial;                     // column sums by chunk
    T* anderson;                    // history of the acceleration
    T* history;                     // potentials of every iteration, or null
    Totals *row_totals, *col_totals;

    // Valid entries without an allowed pair: their mass on the side of the rows, and whether any
    // exist.
    double unmatched_mass_a;
    bool unmatched_rows, unmatched_columns;

    bool relaxed;  // the state of the iteration is f and g, not u and v
    // Of the double-buffered reports and errors: a fast thread may be one step ahead.
    int parity = 0;

    explicit Workspace(const Problem<T>& p) : problem(p) {}

    void lay_out(Arena& shared, Arena& own, const optical_problem& batch, int64_t max_n,
                 int64_t max_m, bool keep_history) {
        const int64_t rows = round_up(max_n, block), cols = round_up(max_m, block);
        panels = own.take<T>(2 * block * cols);
        T** by_row[] = {&unmatched_a, &weight_a, &f,         &f_next,   &u,
                        &u_next,      &au,       &row_error, &row_cost, &w};
        for (T** array : by_row)
            *array = shared.take<T>(array == &row_error ? 2 * rows : rows);
        T** by_column[] = {&unmatched_b, &weight_b,  &g,        &g_next,   &v, &v_next, &bv,
                           &col_error,   &col_cost,  &col_mass, &z,        &cg_r, &cg_p, &cg_q};
        for (T** array : by_column)
            *array = shared.take<T>(array == &col_error ? 2 * cols : cols);
        row_mass = row_error;
        const int64_t blocks = rows / block, chunk_blocks = Tiling<T>::chunk_blocks;
        partial = shared.take<T>(round_up(blocks, chunk_blocks) / chunk_blocks * cols);
        if (batch.anderson > 0) anderson = shared.take<T>((2 * batch.anderson + 3) * cols);
        reports = shared.take<Report>(2 * (int64_t)batch.num_threads);
        cancelled = batch.cancelled, answers = shared.take<bool>(2);
        row_totals = shared.take<Totals>(blocks / chunk_blocks + 1);
        col_totals = shared.take<Totals>(cols / Tiling<T>::segment + 1);
        history = nullptr;
        if (keep_history) history = shared.take<T>((rows + cols) * ((int64_t)batch.max_iter + 1));
    }

    // This thread's memory for a tile of the parity of b; two tiles are in use at a time.
    T* panel(int64_t b) const { return panels + b % 2 * block * problem.col_count; }

    // Potentials from arrays by row and by column, or zero for null.
    void set_potentials(const T* from_f, const T* from_g) {
        gather_rows(from_f, f);
        gather_columns(from_g, g);
        sync(problem.team);
    }
    // The valid entries of an array by row or by column, 0 past the last one and for null.
    void gather_rows(const T* from, T* to) const {
        const Problem<T>& p = problem;
        p.own_rows([&](int64_t i) {
            for (int lane = 0; lane < width; ++lane)
                to[i + lane] = from && i + lane < p.n ? from[p.row_index[i + lane]] : 0;
        });
    }
    void gather_columns(const T* from, T* to) const {
        const Problem<T>& p = problem;
        p.own_columns([&](int64_t j) {
            for (int lane = 0; lane < width; ++lane)
                to[j + lane] = from && j + lane < p.m ? from[p.col_index[j + lane]] : 0;
        });
    }

    // ------------------------------------------------------------------------- cancellation

    // Thread 0 reads the caller's flag before the barriers of a step, and the team follows its
    // answer after them: all leave a loop in the same step. Two answers suffice, because a thread
    // is at most one step ahead.
    void ask(int64_t step) const {
        if (cancelled && problem.team.rank == 0) answers[step % 2] = is_cancelled(cancelled);
    }
    bool stopped(int64_t step) const { return cancelled && answers[step % 2]; }

    // -------------------------------------------------------------- results of all threads

    // Every thread found its part valid. A barrier.
    bool all_valid(bool valid) {
        const Team& team = problem.team;
        if (team.size == 1) return valid;
        Report* const all = reports + parity * team.size;
        all[team.rank].valid = valid;
        sync(team);
        for (int t = 0; t < team.size; ++t) valid &= all[t].valid;
        parity ^= 1;
        return valid;
    }

    // The range of all threads. A barrier.
    Range merged(Range range) {
        const Team& team = problem.team;
        if (team.size == 1) return range;
        Report* const all = reports + parity * team.size;
        all[team.rank].all = range;
        sync(team);
        for (int t = 0; t < team.size; ++t) range.add(all[t].all);
        parity ^= 1;
        return range;
    }

    // The ranges of the rows and of everything, of all threads. A barrier; the caller flips parity.
    OPTICAL_INLINE_MEMBER void merge(Range& rows, Range& everything) const {
        const Team& team = problem.team;
        if (team.size == 1) return;
        Report* const all = reports + parity * team.size;
        all[team.rank].rows = rows, all[team.rank].all = everything;
        sync(team);
        for (int t = 0; t < team.size; ++t) rows.add(all[t].rows), everything.add(all[t].all);
    }

private:
    const int32_t* cancelled;  // the caller's flag, or null
    bool* answers;
    struct Report {
        Range rows, all;
        bool valid;
    };
    T* panels;
    Report* reports;
};

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
