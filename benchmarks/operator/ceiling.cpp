// What a core's load bandwidth and multiply-add rate allow for the iteration: over a matrix K of
// the same size, the dot product of each row, then the row's addition into the column sums, with
// one read of K from the outer cache per sweep. No division, no sum across lanes, no bookkeeping:
// this is not a Sinkhorn iteration, only its memory traffic and its multiply-adds.
#include <stdint.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

typedef float Vector __attribute__((vector_size(OPTICAL_VECTOR_BYTES)));
static const int64_t width = sizeof(Vector) / sizeof(float);
static const int64_t block = 8;    // rows worked on together: hides the latency of one chain
static const int64_t columns = 4;  // in the second half, for the same reason

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

static int64_t blocks_of(int64_t n) { return (n + block - 1) / block; }
static int64_t vectors_of(int64_t m) { return (m + width - 1) / width; }

// Floats that `optical_ceiling_sweep` needs for a problem, from an address divisible by 64.
EXPORT int64_t optical_ceiling_room(int64_t n, int64_t m) {
    return (blocks_of(n) * block + 2) * vectors_of(m) * width;
}

// Sweeps over `count` problems one after the other; `sizes` holds n and m of each.
EXPORT void optical_ceiling_sweep(float* work, const int64_t* sizes, int64_t count,
                                  int64_t iterations) {
    for (const int64_t* size = sizes; size != sizes + 2 * count; size += 2) {
        const int64_t vectors = vectors_of(size[1]), tiles = blocks_of(size[0]) * block * vectors;
        Vector *k = (Vector*)work, *v = k + tiles, *sums = v + vectors;
        // A value that keeps all numbers near 1; problems of one size share the matrix.
        const float value = 1 / __builtin_sqrtf((float)tiles);
        if (size == sizes || size[0] != size[-2] || size[1] != size[-1])
            for (int64_t i = 0; i < tiles; ++i) k[i] = Vector{} + value;
        for (int64_t j = 0; j < vectors; ++j) v[j] = Vector{} + 1;
        for (int64_t t = 0; t < iterations; ++t) {
            sweep(k, v, sums, blocks_of(size[0]), vectors);
            Vector* next = sums;
            sums = v, v = next;
        }
    }
}

// At least `count` multiply-adds of one float each, from registers alone.
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
