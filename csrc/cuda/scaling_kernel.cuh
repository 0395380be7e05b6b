// The scaling kernel K in registers, the choice of its base, and products with it.
//
// With base potentials F and G, K_ij = exp((F_i + G_j - C_ij) / epsilon). The base is chosen for
// the current g at zero temperature, F_i = min_j (C_ij - g_j) and G_j = min_i (C_ij - F_i). Then K
// <= 1, and every row and column has an entry that is exactly 1: nothing overflows, and entries
// that underflow are negligible.
//
// Rare operations loop over rows without unrolling.
#pragma once

#include "workspace.cuh"

namespace optical {
namespace cuda {

template <typename G>
struct ScalingKernel {
    static constexpr int RI = G::RI, RJ = G::RJ, OI = G::OI, OJ = G::OJ;

    float K[RI][RJ];

    // Builds K from the base potentials, or, with `plan`, the transport plan of the current
    // potentials in its place.
    OPTICAL_DEVICE void build(const Problem<G>& problem, const Workspace<G>& work, bool plan) {
        float of_row[RI], of_column[RJ], more_row[RI], more_column[RJ];
        problem.rows_of(plan ? POTENTIAL : BASE, of_row);
        problem.columns_of(plan ? POTENTIAL : BASE, of_column);
        problem.rows_of(LOG, more_row);
        problem.columns_of(LOG, more_column);
        const float logs = plan ? OPTICAL_LOG2E : 0.0f;
        OPTICAL_UNROLL_LOOP
        for (int r = 0; r < RI; ++r)
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c) {
                const float total = (of_row[r] - problem.cost(r, c)) + of_column[c];
                K[r][c] =
                    exp2_fast(fused(total, work.scale, logs * (more_row[r] + more_column[c])));
            }
    }
    // One entry of the plan, computed by the same operations as build(), so that sums agree to the
    // bit.
    OPTICAL_DEVICE static float plan_of(const Problem<G>& problem, const Workspace<G>& work, int r,
                                        int c, float f, float log_i, float g_j, float log_j) {
        const float total = (f - problem.cost(r, c)) + g_j;
        return exp2_fast(fused(total, work.scale, OPTICAL_LOG2E * (log_i + log_j)));
    }

    // Chooses the base for the current g and builds K, b v and u from it. The stopping rule needs u
    // to know the row marginals.
    OPTICAL_DEVICE void rebase(Problem<G>& problem, Workspace<G>& work) {
        G& grid = problem.grid;
        float of_column[RJ], column_minimum[RJ], base_row[OI] = {}, base_column[OJ];
        problem.columns_of(POTENTIAL, of_column);
        OPTICAL_KEEP_LOOP
        for (int q = 0; q < RI; ++q) {
            const int r = grid.slot_of(q);
            float minimum = infinity();
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c)
                minimum = smaller(minimum, problem.cost(r, c) - of_column[c]);
            grid.template fold_row<Minimum>(minimum, q, base_row);
        }
        grid.template combine_rows<Minimum>(base_row);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OI; ++o)
            problem.row(BASE, o) = base_row[o] = problem.row(UNMATCHED, o) > 0 ? 0.0f : base_row[o];
        OPTICAL_UNROLL_LOOP
        for (int c = 0; c < RJ; ++c) column_minimum[c] = infinity();
        OPTICAL_KEEP_LOOP
        for (int q = 0; q < RI; ++q) {
            const int r = grid.slot_of(q);
            const float of_row = grid.row_value(base_row, q);
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c)
                column_minimum[c] = smaller(column_minimum[c], problem.cost(r, c) - of_row);
        }
        grid.template columns<Minimum>(column_minimum, base_column);
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < OJ; ++o)
            problem.column(BASE, o) = problem.column(UNMATCHED, o) > 0 ? 0.0f : base_column[o];
        build(problem, work, false);
        work.start_scalings(problem);
    }

    // ----------------------------------------------------------------------------- products with K

    // sum += K x, and sum += K' x.
    OPTICAL_DEVICE void add_times(const float (&x)[RJ], float (&sum)[RI]) const {
        OPTICAL_UNROLL_LOOP
        for (int c = 0; c < RJ; ++c)
            OPTICAL_UNROLL_LOOP
            for (int r = 0; r < RI; ++r) sum[r] = fused(K[r][c], x[c], sum[r]);
    }
    OPTICAL_DEVICE void add_times_transposed(const float (&x)[RI], float (&sum)[RJ]) const {
        OPTICAL_UNROLL_LOOP
        for (int r = 0; r < RI; ++r)
            OPTICAL_UNROLL_LOOP
            for (int c = 0; c < RJ; ++c) sum[c] = fused(K[r][c], x[r], sum[c]);
    }
    // K x for x by owned columns, and K' x for x by owned rows, reduced over all threads.
    OPTICAL_DEVICE void rows_times(Problem<G>& problem, const float (&x)[OJ], float (&out)[OI]) {
        G& grid = problem.grid;
        float all[RJ], sum[RI] = {};
        grid.spread_columns(x, all);
        add_times(all, sum);
        grid.template rows<Sum>(sum, out);
    }
    OPTICAL_DEVICE void columns_times(Problem<G>& problem, const float (&x)[OI], float (&out)[OJ]) {
        G& grid = problem.grid;
        float all[RI], sum[RJ] = {};
        grid.spread_rows(x, all);
        add_times_transposed(all, sum);
        grid.template columns<Sum>(sum, out);
    }
};

}  // namespace cuda
}  // namespace optical
