// K in float16 for `precision="fast"`, with products on the tensor cores.
//
// K <= 1 is stored in float16 as 2^14 K, with a relative error of 2^-11 for K >= 2^-28. Registers
// hold it twice, as fragments of K and of its transpose. Both hold the same rounded numbers, so the
// iteration is exact for costs that are off by epsilon 2^-11. A vector is the sum of two halves, 22
// bits: the upper half is in the even columns of B, the lower half in the odd columns, and two
// adjacent float32 sums add up to the result of a row or column. The assignment of rows and columns
// to fragment indices is free; this one gives a lane the sums of the rows and columns it owns, and
// puts the vector components it needs into 32 adjacent bytes.
#pragma once

#include "scaling_kernel.cuh"

namespace optical {
namespace cuda {

template <typename G>
struct HalfKernel {

    // Fragments of 16 x 16 entries. With lane = 4 second + first, `fragments` holds rows 8 second +
    // 2 i + (0, 1) and columns 16 k + 2 first + (0, 1, 8, 9) of K. `fragments_transposed` holds
    // columns 32 (second % 2) + 8 i + 2 (second / 2) + (0, 1) and rows 16 first + 4 k + (0, 1, 2,
    // 3).
    unsigned fragments[4][4][4], fragments_transposed[4][4][4];
    // The scaled weights of owned rows and columns, and the factors that scale row and column sums.
    float weight_a[G::OI], weight_b[G::OJ], unit_a, unit_b;

    // Bounds of the sums within which no component of b v or a u overflows float16, and sums are
    // exact to 2^-13 in spite of underflow in up to 512 terms.
    static constexpr int column_scale = 9, row_scale = 3, lowest = 11, highest = 29;
    OPTICAL_DEVICE static bool trusted(float sum, int more) {
        const unsigned low = (unsigned)(127 + lowest - more) << 23;
        return bits_of(sum) - low <= (unsigned)(highest - lowest + 2 * more) << 23;
    }

    // Converts weights, scalings and K. Returns false if the masses are out of range.
    OPTICAL_DEVICE bool begin(const Problem<G>& problem, Workspace<G>& work,
                              const ScalingKernel<G>& kernel) {
        const float total = (float)work.total_b;
        if (!(total > 1e-15f && total < 1e15f)) return false;
        // A power of two of at most 2^9 / total.
        const float scale = float_of((254u + column_scale - (bits_of(total) >> 23) - 1u) << 23);
        unit_a = scale * 16384.0f, unit_b = (float)(1 << row_scale) * 16384.0f;
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < G::OI; ++o) {
            weight_a[o] = work.weight_a[o] * unit_a * (1 << row_scale);
            work.u[o] /= unit_a;
        }
        OPTICAL_UNROLL_LOOP
        for (int o = 0; o < G::OJ; ++o) {
            weight_b[o] = work.weight_b[o] * unit_b * scale;
            work.v[o] /= unit_b, work.bv[o] *= scale;
        }
        build_fragments(problem, kernel);
        return true;
    }

    // Builds the fragments. Sixteen rows of K at a time pass through shared memory, in words of two
    // columns.
    static constexpr int word_pitch = 36;
    OPTICAL_DEVICE static unsigned* words(const Problem<G>& problem) {
        return problem.half_words + problem.grid.warp * G::half_words;
    }
    OPTICAL_DEVICE void build_fragments(const Problem<G>& problem, const ScalingKernel<G>& kernel) {
        const G& grid = problem.grid;
        unsigned* const staged = words(problem);
        const int first = grid.lane % 4, second = grid.lane / 4;
        OPTICAL_UNROLL_LOOP
        for (int pass = 0; pass < 4; ++pass) {
            if (grid.lane_down == pass) {
                OPTICAL_UNROLL_LOOP
                for (int r = 0; r < G::RI; ++r)
                    OPTICAL_UNROLL_LOOP
                    for (int c = 0; c < G::RJ; c += 2)
                        staged[(r ^ (grid.lane_across * G::OI)) * word_pitch +
                               (grid.lane_across * G::RJ + (c ^ (grid.lane_down * G::OJ))) / 2] =
                            pack_halves(16384.0f * kernel.K[r][c], 16384.0f * kernel.K[r][c + 1]);
            }
            sync_warp();
            if (second / 2 == pass) {
                const unsigned* const rows = staged + second % 2 * 8 * word_pitch + first;
                OPTICAL_UNROLL_LOOP
                for (int i = 0; i < 4; ++i)
                    OPTICAL_UNROLL_LOOP
                    for (int k = 0; k < 4; ++k)
                        OPTICAL_UNROLL_LOOP
                        for (int e = 0; e < 4; ++e)
                            fragments[i][k][e] =
                                rows[(2 * i + e % 2) * word_pitch + 8 * k + e / 2 * 4];
            }
            if (first == pass) {
                const unsigned* const columns = staged + second % 2 * 16 + second / 2;
                OPTICAL_UNROLL_LOOP
                for (int i = 0; i < 4; ++i)
                    OPTICAL_UNROLL_LOOP
                    for (int k = 0; k < 4; ++k)
                        OPTICAL_UNROLL_LOOP
                        for (int e = 0; e < 2; ++e) {
                            const unsigned* const word =
                                columns + 4 * i + (4 * k + 2 * e) * word_pitch;
                            fragments_transposed[i][k][2 * e] =
                                low_halves(word[0], word[word_pitch]);
                            fragments_transposed[i][k][2 * e + 1] =
                                high_halves(word[0], word[word_pitch]);
                        }
            }
            sync_warp();
        }
    }

    // Multiplies K or its transpose, given as fragments, by a vector of owned columns or rows.
    OPTICAL_DEVICE static void multiply(const Problem<G>& problem,
                                        const unsigned (&matrix)[4][4][4], const float (&x)[2],
                                        float (&sum)[2], unsigned* pairs) {
        const G& grid = problem.grid;
        const int first = grid.lane % 4, second = grid.lane / 4;
        const unsigned upper = pack_halves(x[0], x[1]);
        pairs[grid.lane] = upper;
        pairs[32 + grid.lane] = pack_halves(x[0] - low_half(upper), x[1] - high_half(upper));
        sync_warp();
        struct alignas(16) Four {
            unsigned word[4];
        };
        const unsigned* const own_pairs = pairs + second % 2 * 32 + first * 8;
        const Four loaded[2] = {*(const Four*)own_pairs, *(const Four*)(own_pairs + 4)};
        float d[4][4];
        OPTICAL_UNROLL_LOOP
        for (int i = 0; i < 4; ++i)
            OPTICAL_UNROLL_LOOP
            for (int e = 0; e < 4; ++e) d[i][e] = 0;
        OPTICAL_UNROLL_LOOP
        for (int k = 0; k < 4; ++k) {
            const unsigned b[2] = {loaded[k / 2].word[k % 2 * 2],
                                   loaded[k / 2].word[k % 2 * 2 + 1]};
            OPTICAL_UNROLL_LOOP
            for (int i = 0; i < 4; ++i) multiply_fragments(d[i], matrix[i][k], b, false);
        }
        float sums[4];
        OPTICAL_UNROLL_LOOP
        for (int e = 0; e < 4; ++e) {
            const float even = first & 2 ? d[2][e] : d[0][e], odd = first & 2 ? d[3][e] : d[1][e];
            sums[e] = first & 1 ? odd : even;
        }
        sum[0] = sums[0] + sums[1], sum[1] = sums[2] + sums[3];
    }
};

}  // namespace cuda
}  // namespace optical
