// Upper bound that load bandwidth and multiply-add rate set on the CPU iteration. A sweep reads a
// matrix K of the problem's size once from the outer cache, takes the dot product of each row, and
// adds the scaled row to the column sums. It has no division, no sum across lanes and no
// bookkeeping: only the memory traffic and multiply-adds of a Sinkhorn iteration.
#include <stdint.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

typedef float Vector __attribute__((vector_size(OPTICAL_VECTOR_BYTES)));
static const int64_t width = sizeof(Vector) / sizeof(float);
static const int64_t block = 8;    // rows per block: independent chains hide the latency
static const int64_t columns = 4;  // column vectors per step of the second half, likewise

static void sweep(const Vector* k, const Vector* v, Vector* sums, int64_t blocks, int64_t vectors) {
    for (int64_t j = 0; j < vectors; ++j) sums[j] = Vector{};
    for (int64_t b = 0; b < blocks; ++b, k += block * vectors) {
        Vector u[block] = {};
        for (int64_t j = 0; j < vectors; ++j)
            for (int r = 0; r < block; ++r) u[r] += k[j * block + r] * v[j];
        int64_t j = 0;
        for (; j + columns <= vectors; j += columns) {
            Vector sum[columns];
            for (int q = 0; q < columns; ++q) sum[q] = sums[j + q];
            for (int r = 0; r < block; ++r)
                for (int q = 0; q < columns; ++q) sum[q] += k[(j + q) * block + r] * u[r];
            for (int q = 0; q < columns; ++q) sums[j + q] = sum[q];
        }
        for (; j < vectors; ++j) {
            Vector sum = sums[j];
            for (int r = 0; r < block; ++r) sum += k[j * block + r] * u[r];
            sums[j] = sum;
        }
    }
}

static int64_t block_count(int64_t n) { return (n + block - 1) / block; }
static int64_t vector_count(int64_t m) { return (m + width - 1) / width; }

// Number of floats that `optical_ceiling_sweep` needs for an n x m problem, 64-byte aligned.
EXPORT int64_t optical_ceiling_workspace(int64_t n, int64_t m) {
    return (block_count(n) * block + 2) * vector_count(m) * width;
}

// Runs `iterations` sweeps on each of `count` problems in turn; `sizes` holds their n and m.
EXPORT void optical_ceiling_sweep(float* workspace, const int64_t* sizes, int64_t count,
                                  int64_t iterations) {
    for (const int64_t* size = sizes; size != sizes + 2 * count; size += 2) {
        const int64_t vectors = vector_count(size[1]);
        const int64_t tiles = block_count(size[0]) * block * vectors;
        Vector *k = (Vector*)workspace, *v = k + tiles, *sums = v + vectors;
        // This value keeps all numbers near 1. Consecutive problems of one size share the matrix.
        const float value = 1 / __builtin_sqrtf((float)tiles);
        if (size == sizes || size[0] != size[-2] || size[1] != size[-1])
            for (int64_t i = 0; i < tiles; ++i) k[i] = Vector{} + value;
        for (int64_t j = 0; j < vectors; ++j) v[j] = Vector{} + 1;
        for (int64_t t = 0; t < iterations; ++t) {
            sweep(k, v, sums, block_count(size[0]), vectors);
            Vector* next = sums;
            sums = v, v = next;
        }
    }
}

// At least `count` single-float multiply-adds on registers alone.
EXPORT float optical_ceiling_fma(int64_t count) {
    enum { chains = 12 };
    Vector x[chains];
    for (int c = 0; c < chains; ++c) x[c] = Vector{} + (float)c;
    const Vector y = Vector{} + 0.999f, z = Vector{} + 1e-3f;
    for (int64_t i = 0; i < count; i += chains * width)
        for (int c = 0; c < chains; ++c) x[c] = x[c] * y + z;
    float sum = 0;
    for (int c = 0; c < chains; ++c) sum += x[c][0];
    return sum;
}
