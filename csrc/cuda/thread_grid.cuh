// The threads that solve one problem, and the reductions and exchanges between them.
//
// A problem is a grid of warp tiles. The lanes of a warp form a grid of 4 x 8, and each lane holds
// RI x RJ entries of the tile in registers: RI rows, shared with the 8 lanes of its row of the
// grid, and RJ columns, shared with the 4 lanes of its column. The warps of a block form a grid of
// `down` x `across`; the blocks of a cluster divide the rows. Small problems share a warp: each has
// a team of 16 lanes (4 x 4) or of 8 lanes (2 x 4), and teams may diverge.
//
// A lane stores its rows in permuted slots, row = first + (slot ^ lane bits). A sum over lanes is
// then a butterfly in which every lane sends its upper slots and keeps its lower slots, without a
// select, and ends with OI = RI / 8 rows that the lane owns. The reverse butterfly broadcasts
// values from their owners to all lanes. Columns work alike.
//
// Every warp that needs the values of owned rows or columns computes them itself. Only partial sums
// pass through shared memory, with one barrier each.
#pragma once

#include "primitives.cuh"

namespace optical {
namespace cuda {

// The threads that solve a problem: one warp, one block, or a cluster of blocks.
enum class Span { warp, block, cluster };

struct Sum {
    static OPTICAL_DEVICE float of(float x, float y) { return x + y; }
};
struct Minimum {
    static OPTICAL_DEVICE float of(float x, float y) { return smaller(x, y); }
};

// The values that a warp exchanges with the others in addition to its partial sums.
struct Report {
    unsigned flags;
    float residual;
};

constexpr int max_warps = 8, max_blocks = 8;

// Template parameters: RI_ x RJ_ entries per lane; DOWN x ACROSS, the grid of warps if it is known
// at compile time, else 0; `fast_`, iterations in half precision (half_precision.cuh); `lanes_`,
// the lanes of a warp that share a problem.
template <int RI_, int RJ_, Span span_, int DOWN = 0, int ACROSS = 0, bool fast_ = false,
          int lanes_ = 32>
struct ThreadGrid {
    static constexpr int lanes = lanes_, teams = 32 / lanes;
    static constexpr int lanes_across = lanes == 32 ? 8 : 4, lanes_down = lanes / lanes_across;
    static constexpr int RI = RI_, RJ = RJ_;
    static constexpr Span span = span_;
    static constexpr bool fast = fast_;
    // Per warp: sixteen rows of K and two vectors.
    static constexpr int half_words = fast ? 16 * 36 + 2 * 64 : 0;
    static constexpr int OI = RI / lanes_across, OJ = RJ / lanes_down;
    static constexpr int warps_at_once = DOWN * ACROSS > 0 ? DOWN * ACROSS : 1;
    static constexpr int tile_rows = lanes_down * RI, tile_columns = lanes_across * RJ;
    // Votes of a part of a warp are slow: the compiler cannot know that the parts run together. A
    // lane that found drift makes its part of b v NaN instead, and with it all row sums of the
    // team.
    static constexpr bool marks_drift = teams > 1;

    static_assert(span == Span::warp || teams == 1, "a team is a part of one warp");
    static_assert(OI * lanes_across == RI && OJ * lanes_down == RJ,
                  "every lane owns rows and columns");

    int thread, threads, team, lane, lane_down, lane_across, warp, warp_down, warp_across;
    int down, across;  // the grid of warps of this block
    int rank, blocks;  // in the cluster
    int first_row, first_column;  // of this lane
    int row_turn, column_turn, scalar_turn;
    // Exchange buffers, twice each: some warps may still read one copy while others write the next.
    float *row_parts, *column_parts;
    Report* reports;
    double* scalars;
    static constexpr int scalars_per_warp = 6;

    static OPTICAL_HOST_DEVICE int exchange_bytes(int down, int across) {
        if (span == Span::warp) return 0;
        const int warps = down * across;
        return 2 * (warps * (32 * (OI + OJ) * 4 + (int)sizeof(Report) + scalars_per_warp * 8));
    }

    OPTICAL_DEVICE void start(char* memory, int warps_down, int warps_across) {
        thread = teams > 1 ? thread_index() % lanes : thread_index();
        team = teams > 1 ? thread_index() / lanes : 0;
        lane = thread % lanes, warp = thread / lanes;
        lane_down = lane / lanes_across, lane_across = lane % lanes_across;
        down = DOWN > 0 ? DOWN : warps_down, across = ACROSS > 0 ? ACROSS : warps_across;
        threads = lanes * down * across;
        warp_down = span == Span::warp ? 0 : warp / across;
        warp_across = span == Span::warp ? 0 : warp % across;
        rank = span == Span::cluster ? cluster_rank() : 0;
        blocks = span == Span::cluster ? cluster_size() : 1;
        first_row = (rank * down + warp_down) * tile_rows + lane_down * RI;
        first_column = warp_across * tile_columns + lane_across * RJ;
        row_turn = column_turn = scalar_turn = 0;
        const int warps = down * across;
        scalars = (double*)memory;
        reports = (Report*)(scalars + 2 * warps * scalars_per_warp);
        row_parts = (float*)(reports + 2 * warps);
        column_parts = row_parts + 2 * warps * 32 * OI;
    }

    OPTICAL_DEVICE int row(int slot) const { return first_row + (slot ^ (lane_across * OI)); }
    OPTICAL_DEVICE int column(int slot) const { return first_column + (slot ^ (lane_down * OJ)); }
    OPTICAL_DEVICE int own_row(int o) const { return first_row + lane_across * OI + o; }
    OPTICAL_DEVICE int own_column(int o) const { return first_column + lane_down * OJ + o; }

    OPTICAL_DEVICE void sync() const {
        if (span == Span::warp) sync_warp<lanes>();
        else if (span == Span::block) sync_block();
        else sync_cluster();
    }
    OPTICAL_DEVICE void sync_own_block() const {
        if (span == Span::warp) sync_warp<lanes>();
        else sync_block();
    }
    template <typename Element>
    OPTICAL_DEVICE const Element* at_block(const Element* local, int block) const {
        return span == Span::cluster ? remote(local, block) : local;
    }

    // ------------------------------------------------------------------------------- within a warp

    // Reduces the rows of the lanes across. `out` receives the rows that the lane owns.
    template <typename Op>
    OPTICAL_DEVICE void fold_rows(float (&x)[RI], float (&out)[OI]) const {
        OPTICAL_UNROLL_LOOP
        for (int half = RI / 2; half >= OI; half /= 2)
            OPTICAL_UNROLL_LOOP
            for (int s = 0; s < RI / 2; ++s)
                if (s < half) x[s] = Op::of(x[s], shuffle_xor<lanes>(x[s + half], half / OI));
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) out[o] = x[o];
    }
    template <typename Op>
    OPTICAL_DEVICE void fold_columns(float (&x)[RJ], float (&out)[OJ]) const {
        OPTICAL_UNROLL_LOOP
        for (int half = RJ / 2; half >= OJ; half /= 2)
            OPTICAL_UNROLL_LOOP
            for (int s = 0; s < RJ / 2; ++s)
                if (s < half)
                    x[s] = Op::of(x[s], shuffle_xor<lanes>(x[s + half], half / OJ * lanes_across));
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) out[o] = x[o];
    }
    OPTICAL_DEVICE void spread_rows(const float (&owned)[OI], float (&x)[RI]) const {
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) x[o] = owned[o];
        OPTICAL_UNROLL_LOOP
        for (int half = OI; half < RI; half *= 2)
            OPTICAL_UNROLL_LOOP
            for (int s = 0; s < RI / 2; ++s)
                if (s < half) x[s + half] = shuffle_xor<lanes>(x[s], half / OI);
    }
    OPTICAL_DEVICE void spread_columns(const float (&owned)[OJ], float (&x)[RJ]) const {
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) x[o] = owned[o];
        OPTICAL_UNROLL_LOOP
        for (int half = OJ; half < RJ; half *= 2)
            OPTICAL_UNROLL_LOOP
            for (int s = 0; s < RJ / 2; ++s)
                if (s < half) x[s + half] = shuffle_xor<lanes>(x[s], half / OJ * lanes_across);
    }

    // The functions below process one row at a time, in loops that are not unrolled. Code outside
    // the iteration uses them: they save registers, code size and compile time. slot_of(q) is the
    // slot that holds row q of the lanes across.
    OPTICAL_DEVICE int slot_of(int q) const { return q ^ (lane_across * OI); }
    OPTICAL_DEVICE float row_value(const float (&owned)[OI], int q) const {
        float x = owned[0];
        OPTICAL_UNROLL_LOOP
        for (int o = 1; o < OI; ++o) x = q % OI == o ? owned[o] : x;
        return shuffle<lanes>(x, lane_down * lanes_across + q / OI);
    }
    template <typename Op>
    OPTICAL_DEVICE void fold_row(float x, int q, float (&out)[OI]) const {
        OPTICAL_UNROLL_LOOP
        for (int mask = 1; mask < lanes_across; mask *= 2)
            x = Op::of(x, shuffle_xor<lanes>(x, mask));
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) out[o] = q == lane_across * OI + o ? x : out[o];
    }

    // ------------------------------------------------------------------------------- between warps

    // Reduces over all columns of the problem, for the rows that a lane owns.
    template <typename Op>
    OPTICAL_DEVICE void rows(float (&x)[RI], float (&out)[OI]) {
        fold_rows<Op>(x, out);
        combine_rows<Op>(out);
    }
    template <typename Op>
    OPTICAL_DEVICE void combine_rows(float (&out)[OI]) {
        if (span == Span::warp) return;
        float* const parts = row_parts + row_turn * down * across * 32 * OI;
        row_turn ^= 1;
        put_rows(parts, out);
        sync_block();
        add_rows<Op>(parts, out);
    }
    OPTICAL_DEVICE void put_rows(float* parts, const float (&x)[OI]) const {
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) parts[thread * OI + o] = x[o];
    }
    template <typename Op>
    OPTICAL_DEVICE void add_rows(const float* parts, float (&out)[OI]) const {
        const float* from = parts + (warp_down * across * 32 + lane) * OI;
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o) out[o] = from[o];
        OPTICAL_UNROLL_WARPS
        for (int w = 1; w < across; ++w) {
            from += 32 * OI;
            OPTICAL_UNROLL_LOOP
            for (int o = 0; o < OI; ++o) out[o] = Op::of(out[o], from[o]);
        }
    }

    // Reduces over all rows of the problem, for the columns that a lane owns.
    template <typename Op>
    OPTICAL_DEVICE void columns(float (&x)[RJ], float (&out)[OJ]) {
        fold_columns<Op>(x, out);
        if (span == Span::warp) return;
        float* const parts = next_column_parts();
        put_columns(parts, out);
        sync();
        add_columns<Op>(parts, out);
    }
    OPTICAL_DEVICE float* next_column_parts() {
        column_turn ^= 1;
        return column_parts + column_turn * down * across * 32 * OJ;
    }
    OPTICAL_DEVICE void put_columns(float* parts, const float (&x)[OJ]) const {
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) parts[thread * OJ + o] = x[o];
    }
    template <typename Op>
    OPTICAL_DEVICE void add_columns(const float* parts, float (&out)[OJ]) const {
        const float* const own_part = parts + (warp_across * 32 + lane) * OJ;
        OPTICAL_KEEP_LOOP
        for (int b = 0; b < blocks; ++b) {
            const float* const remote_part = at_block(own_part, b);
            OPTICAL_UNROLL_WARPS
            for (int w = 0; w < down; ++w)
                OPTICAL_UNROLL_LOOP
                for (int o = 0; o < OJ; ++o) {
                    const float part = remote_part[w * across * 32 * OJ + o];
                    out[o] = b == 0 && w == 0 ? part : Op::of(out[o], part);
                }
        }
    }
    // The same sums for the iteration of a cluster. A trip through the network between
    // multiprocessors takes about 200 clocks, so all blocks are asked before the first answer is
    // used: the zero that starts the sums depends on all answers, or the compiler would use one
    // answer before it asks for the next. One loop serves 2, 4 and 8 blocks, where absent ones add
    // zeros: a loop for each number doubled the code of the iteration.
    OPTICAL_DEVICE void add_blocks(const float* parts, float (&out)[OJ]) const {
        struct alignas(4 * OJ) Part {
            float values[OJ];
        };
        const float* local = parts + (warp_across * 32 + lane) * OJ;
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o) out[o] = 0;
        OPTICAL_KEEP_LOOP
        for (int w = 0; w < down; ++w, local += across * 32 * OJ) {
            Part of_block[max_blocks] = {};
            unsigned bits = 0;
            OPTICAL_UNROLL_LOOP
            for (int b = 0; b < 2; ++b) of_block[b] = *remote((const Part*)local, b);
            if (blocks > 2) {
                OPTICAL_UNROLL_LOOP
                for (int b = 2; b < 4; ++b) of_block[b] = *remote((const Part*)local, b);
                if (blocks > 4)
                    OPTICAL_UNROLL_LOOP
                    for (int b = 4; b < 8; ++b) of_block[b] = *remote((const Part*)local, b);
            }
            OPTICAL_UNROLL_LOOP
            for (int b = 0; b < max_blocks; ++b) bits ^= bits_of(of_block[b].values[0]);
            const float zero = bits == 0x7fffffffu ? 0.0f : -0.0f;
            OPTICAL_UNROLL_LOOP
            for (int o = 0; o < OJ; ++o) {
                out[o] += zero;
                OPTICAL_UNROLL_LOOP
                for (int b = 0; b < max_blocks; ++b) out[o] += of_block[b].values[o];
            }
        }
    }
    OPTICAL_DEVICE void add_all_columns(const float* parts, float (&out)[OJ]) const {
        if (span == Span::cluster && has_clusters) add_blocks(parts, out);
        else add_columns<Sum>(parts, out);
    }
    // Calls use(report) in one lane for every warp w < count of every block: report w * step.
    template <typename Use>
    OPTICAL_DEVICE void for_reports(int count, int step, Use use) const {
        const int w = lane % max_warps;
        OPTICAL_UNROLL_LOOP
        for (int first = 0; first < max_blocks; first += 32 / max_warps) {
            const int b = first + lane / max_warps;
            if (w < count && b < blocks) use(*at_block(own_reports() + w * step, b));
        }
    }

    // The exchanges of the iteration, which add reports to the sums. Rows and columns alternate,
    // and all threads of the block meet between two exchanges of rows, so a single buffer at a
    // fixed address suffices. Column sums of a cluster need two buffers: other blocks may still
    // read the last one.
    //
    // Returns whether any thread of the block passed `flag`, or, for teams, whether any of the team
    // marked its sums.
    OPTICAL_DEVICE bool exchange_rows(float (&out)[OI], bool flag) const {
        if (marks_drift) return out[0] != out[0];
        if (span == Span::warp) return warp_any<lanes>(flag);
        put_rows(row_parts, out);
        const bool any = sync_block_or(flag);
        add_rows<Sum>(row_parts, out);
        return any;
    }
    // With `measure`, stores the mismatch of the rows of this warp for residual() below. In a
    // cluster, also hands the flags of all warps to the lanes of each warp.
    template <typename Mismatch>
    OPTICAL_DEVICE void exchange_columns(float (&out)[OJ], Report& report, bool measure,
                                         Mismatch mismatch) {
        float* const parts = span == Span::cluster ? next_column_parts() : column_parts;
        if (measure) {
            report.residual = over_lanes(mismatch());
            if (span != Span::warp && lane == 0) own_reports()[warp].residual = report.residual;
        }
        if (span == Span::warp) return;
        put_columns(parts, out);
        if (span == Span::cluster) {
            report.flags = warp_or<lanes>(report.flags);
            if (lane == 0) own_reports()[warp].flags = report.flags;
        }
        sync_exchange();
        unsigned flags = 0;
        if (span == Span::cluster)
            for_reports(down * across, 1, [&](const Report& of_warp) { flags |= of_warp.flags; });
        add_all_columns(parts, out);
        report.flags |= flags;
    }
    OPTICAL_DEVICE Report* own_reports() const {
        return span == Span::cluster ? reports + column_turn * down * across : reports;
    }
    // The mismatch of all rows, after an exchange of columns that measured it.
    OPTICAL_DEVICE float residual(float of_warp) const {
        if (span == Span::warp) return of_warp;
        float sum = 0;
        if (span == Span::cluster) {
            for_reports(down, across, [&](const Report& of_row) { sum += of_row.residual; });
            return over_lanes(sum);
        }
        OPTICAL_KEEP_LOOP
        for (int w = 0; w < down; ++w) sum += own_reports()[w * across].residual;
        return sum;
    }
    // Whether any thread of the block passed `flag`.
    OPTICAL_DEVICE bool any(bool flag) const {
        return span == Span::warp ? warp_any<lanes>(flag) : sync_block_or(flag);
    }

    // Tests build without this barrier to check that the emulator detects the race.
    OPTICAL_DEVICE void sync_exchange() const {
#if !defined(OPTICAL_WITHOUT_BARRIER)
        sync();
#endif
    }

    // ------------------------------------------------------------------------------------- scalars

    template <typename Value>
    OPTICAL_DEVICE static Value over_lanes(Value x) {
        OPTICAL_UNROLL_LOOP
        for (int mask = lanes / 2; mask > 0; mask /= 2) x += shuffle_xor<lanes>(x, mask);
        return x;
    }

    // Adds scalars over the owners of all rows, or of all columns.
    template <int N>
    OPTICAL_DEVICE void total(double (&x)[N], bool over_rows) {
        OPTICAL_UNROLL_LOOP
        for (int k = 0; k < N; ++k) x[k] = over_lanes(x[k]);
        if (span == Span::warp) return;
        double* const all = scalars + scalar_turn * down * across * scalars_per_warp;
        scalar_turn ^= 1;
        OPTICAL_UNROLL_LOOP
        for (int k = 0; k < N; ++k)
            if (lane == k) all[warp * scalars_per_warp + k] = x[k];
        sync();
        OPTICAL_UNROLL_LOOP
        for (int k = 0; k < N; ++k) x[k] = 0;
        const int count = over_rows ? down : across, step = over_rows ? across : 1;
        OPTICAL_KEEP_LOOP
        for (int b = 0; b < (over_rows ? blocks : 1); ++b) {
            const double* const from = at_block(all, b);
            OPTICAL_UNROLL_WARPS
            for (int w = 0; w < count; ++w)
                OPTICAL_UNROLL_LOOP
                for (int k = 0; k < N; ++k) x[k] += from[w * step * scalars_per_warp + k];
        }
    }

    // The bitwise or over all threads of the problem.
    OPTICAL_DEVICE unsigned union_of(unsigned bits) {
        bits = warp_or<lanes>(bits);
        if (span == Span::warp) return bits;
        const int warps = down * across;
        double* const all = scalars + scalar_turn * warps * scalars_per_warp;
        scalar_turn ^= 1;
        if (lane == 0) all[warp * scalars_per_warp] = (double)bits;
        sync();
        unsigned bits_of_all = 0;
        OPTICAL_KEEP_LOOP
        for (int b = 0; b < blocks; ++b)
            if (lane < warps) bits_of_all |= (unsigned)at_block(all, b)[lane * scalars_per_warp];
        return warp_or<lanes>(bits_of_all);
    }
};

}  // namespace cuda
}  // namespace optical
