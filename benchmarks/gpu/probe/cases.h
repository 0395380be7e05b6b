// The cases of the probe: sizes, costs and variants, and their inputs.
#pragma once

#include <math.h>
#include <stdint.h>

#include <string>

#include "memory.h"
#include "sinkhorn.h"

struct Random {
    uint32_t state;
    float uniform() {
        state = state * 1664525u + 1013904223u;
        return (float)(state >> 8) * 0x1p-24f;
    }
    // Sums of uniform numbers have no tails, which float16 might not hold.
    float normal() {
        float sum = -6;
        for (int i = 0; i < 12; ++i) sum += uniform();
        return sum;
    }
};

inline int bytes_of(int type) { return type == OPTICAL_F32 ? 4 : 2; }

// Stores a normal number, rounded to nearest; numbers that float16 cannot hold as such become 0.
inline void store(char* to, int type, float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (type == OPTICAL_F32) {
        memcpy(to, &value, 4);
        return;
    }
    uint16_t half = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    if (type == OPTICAL_F16) {
        const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
        const uint32_t rounded = magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1);
        half = (uint16_t)(magnitude < 0x38800000 ? sign : sign | rounded >> 13);
    }
    memcpy(to, &half, 2);
}

inline float load(const char* from, int type) {
    float value;
    if (type == OPTICAL_F32) {
        memcpy(&value, from, 4);
        return value;
    }
    uint16_t half;
    memcpy(&half, from, 2);
    if (type == OPTICAL_F16) {
        const int exponent = half >> 10 & 31, fraction = half & 1023;
        const float sign = half & 0x8000 ? -1.0f : 1.0f;
        if (exponent == 31) return fraction ? NAN : sign * INFINITY;
        return sign * (exponent ? ldexpf((float)(1024 + fraction), exponent - 25)
                                : ldexpf((float)fraction, -24));
    }
    const uint32_t bits = (uint32_t)half << 16;
    memcpy(&value, &bits, 4);
    return value;
}

enum Variant { envelope, packed, stopped, annealed, unrolled, misaligned, fast, variants };
const char* const VARIANTS[variants] = {"envelope", "packed",     "tol-rho", "implicit-anneal",
                                        "unroll",   "unroll-omega-misaligned", "fast"};
// One size for every regime of csrc/cuda/kernels.cuh, and three for its clusters.
const struct Size {
    const char* name;
    int n, m;
} SIZES[] = {{"four", 9, 12},      {"pair", 20, 30},      {"warp", 60, 50},
             {"square", 100, 120}, {"block", 130, 60},    {"cluster2", 70, 300},
             {"cluster4", 300, 140}, {"cluster8", 512, 450}};
const struct Cost {
    const char* name;
    int kind, x_type, y_type;
} COSTS[] = {{"given", OPTICAL_GIVEN, OPTICAL_F32, OPTICAL_F32},
             {"cosine-f32", OPTICAL_COSINE, OPTICAL_F32, OPTICAL_F32},
             {"cosine-bf16", OPTICAL_COSINE, OPTICAL_BF16, OPTICAL_BF16},
             {"cosine-f16", OPTICAL_COSINE, OPTICAL_F16, OPTICAL_F16},
             {"cosine-mixed", OPTICAL_COSINE, OPTICAL_F32, OPTICAL_BF16},
             {"sqeuclidean-f32", OPTICAL_SQEUCLIDEAN, OPTICAL_F32, OPTICAL_F32},
             {"dot-bf16", OPTICAL_DOT, OPTICAL_BF16, OPTICAL_BF16}};

struct Case {
    Size size;
    Cost cost;
    Variant variant;
    int64_t batch;

    std::string name() const {
        return std::string(size.name) + " " + cost.name + " " + VARIANTS[variant];
    }
    bool is_packed() const { return variant == packed && cost.kind != OPTICAL_GIVEN; }
    bool is_unrolled() const { return variant == unrolled || variant == misaligned; }
    bool has_halves() const { return cost.x_type != OPTICAL_F32 || cost.y_type != OPTICAL_F32; }
};

inline std::vector<Case> all_cases() {
    std::vector<Case> cases;
    for (const Size& size : SIZES)
        for (const Cost& cost : COSTS)
            for (int variant = 0; variant < variants; ++variant) {
                const bool large = size.n * size.m > 4000, huge = size.n * size.m > 30000;
                Case one = {size, cost, (Variant)variant, large ? 1 : 5};
                // The emulation of the largest clusters takes seconds a case.
                if (huge && cost.kind != OPTICAL_GIVEN && cost.x_type != OPTICAL_BF16) continue;
                // A second matrix does not fit beside the first one.
                if (huge && one.is_unrolled() && size.m > 320) continue;
                if (one.is_packed() && large) one.batch = 3;
                cases.push_back(one);
            }
    return cases;
}

// Offsets of the problems of one side. Those of a packed batch differ in length, and one is empty.
inline std::vector<int64_t> offsets(const Case& c, int size, int shorter, bool with_empty) {
    std::vector<int64_t> result(1, 0);
    for (int64_t b = 0; b < c.batch; ++b) {
        const int64_t length = with_empty && b == 1 ? 0 : std::max<int64_t>(1, size - shorter * b);
        result.push_back(result.back() + (c.is_packed() ? length : size));
    }
    return result;
}

// The inputs of a case; the outputs of `solution` and `gradient` start as NaN.
struct Data {
    const Case& c;
    const std::vector<int64_t> rows, columns;
    const int dim, max_iter, shift;
    const size_t count_a, count_b, entries_x, entries_y;
    Array<char> x, y;
    Array<int64_t> offset_a, offset_b;
    Array<float> log_a, log_b, epsilon;

    explicit Data(const Case& c_)
        : c(c_),
          rows(offsets(c, c.size.n, 3, true)),
          columns(offsets(c, c.size.m, 5, false)),
          // Odd dimensions cannot be loaded in whole words. Half precision needs 16 iterations.
          dim(c.variant % 2 ? 21 : 24),
          max_iter(c.variant == fast ? 17 : 3),
          shift(c.variant == misaligned ? 1 : 0),
          count_a((size_t)rows.back()),
          count_b((size_t)columns.back()),
          entries_x(count_a * (size_t)(is_given() ? c.size.m : dim)),
          entries_y(is_given() ? 0 : count_b * (size_t)dim),
          x((entries_x + (size_t)shift) * (size_t)bytes_of(c.cost.x_type), 0),
          y((entries_y + (size_t)shift) * (size_t)bytes_of(c.cost.y_type), 0),
          offset_a(rows.size(), 0),
          offset_b(columns.size(), 0),
          log_a(count_a, 0),
          log_b(count_b, 0),
          epsilon((size_t)c.batch, c.cost.kind == OPTICAL_SQEUCLIDEAN ? 12.0f
                                   : c.cost.kind == OPTICAL_DOT       ? 3.0f
                                                                      : 0.2f) {
        Random random = {12345u + (uint32_t)(c.size.n * 7 + c.size.m + c.cost.kind * 1000)};
        fill(x, c.cost.x_type, random), fill(y, c.cost.y_type, random);
        offset_a.host = rows, offset_b.host = columns;
        offset_a.send(), offset_b.send();
        // The last row of a padded problem is padding.
        fill_masses(log_a, rows, !c.is_packed() && c.size.n > 4), fill_masses(log_b, columns, false);
    }
    bool is_given() const { return c.cost.kind == OPTICAL_GIVEN; }

    static void fill(Array<char>& array, int type, Random& random) {
        const int size = bytes_of(type);
        for (size_t i = 0; i < array.host.size(); i += (size_t)size)
            store(&array.host[i], type, random.normal());
        array.send();
    }
    static void fill_masses(Array<float>& masses, const std::vector<int64_t>& starts, bool pad) {
        for (size_t b = 0; b + 1 < starts.size(); ++b) {
            const int64_t valid = starts[b + 1] - starts[b] - pad;
            for (int64_t i = starts[b]; i < starts[b + 1]; ++i)
                masses.host[(size_t)i] = -logf((float)valid);
            if (pad) masses.host[(size_t)starts[b + 1] - 1] = -INFINITY;
        }
        masses.send();
    }
    optical_problem problem() const {
        optical_problem p = {};
        p.batch = c.batch, p.n = c.size.n, p.m = c.size.m, p.dim = is_given() ? 0 : dim;
        p.kind = c.cost.kind, p.x_type = c.cost.x_type, p.y_type = c.cost.y_type;
        p.x = x.data() + shift * bytes_of(p.x_type);
        p.y = is_given() ? nullptr : y.data() + shift * bytes_of(p.y_type);
        p.x_stride_entry = 1, p.x_stride_row = is_given() ? p.m : dim;
        p.y_stride_column = is_given() ? 0 : dim;
        if (c.is_packed()) {
            p.offset_a = offset_a.data(), p.offset_b = offset_b.data();
        } else {
            p.x_stride_batch = p.n * p.x_stride_row, p.y_stride_batch = p.m * p.y_stride_column;
        }
        p.log_a = log_a.data(), p.log_b = log_b.data(), p.epsilon = epsilon.data();
        p.total_a = (int64_t)count_a, p.total_b = (int64_t)count_b;
        p.max_iter = max_iter, p.tol = c.variant == stopped ? 1e-3 : 0;
        p.rho_a = c.variant == stopped || c.variant == misaligned ? 0.5 : INFINITY;
        p.rho_b = INFINITY, p.omega = c.variant == misaligned ? 1.3 : 1.0;
        p.anneal_start = c.variant == annealed ? 0.6 : 0, p.anneal_ratio = 0.5;
        p.fast = c.variant == fast;
        p.gradient = c.variant == annealed ? OPTICAL_IMPLICIT
                     : c.is_unrolled()     ? OPTICAL_UNROLL
                                           : OPTICAL_ENVELOPE;
        return p;
    }
};
