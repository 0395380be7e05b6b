// The approximate instructions and the sums of the tensor cores: rounded, or as wrong as allowed.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace optical {
namespace cuda {
namespace emulator {

// Whether results carry errors up to the largest that the PTX manual allows.
inline bool& pessimistic() {
    static bool is = false;
    return is;
}

// Between -1 and 1, a hash of the bits of x: the error of an argument is always the same share of
// the largest. (With the largest error at every argument, scalings of an iteration at its fixed
// point would drift in one direction.)
inline double error_share(float x) {
    uint32_t hash;
    memcpy(&hash, &x, sizeof hash);
    hash ^= hash >> 16, hash *= 0x7feb352du, hash ^= hash >> 15, hash *= 0x846ca68bu;
    return (double)(hash ^ hash >> 16) / 2147483648.0 - 1.0;
}
// The instructions with .ftz read and write subnormal numbers as zero.
inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

// ex2.approx.ftz: a relative error of 2^-22; 1 at 0.
inline float approximate_exp2(float x) {
    if (!pessimistic()) return flushed(exp2f(flushed(x)));
    if (!(fabsf(x) < INFINITY) || flushed(x) == 0) return exp2f(x);
    return flushed((float)(exp2((double)x) * (1 + 0x1p-22 * error_share(x))));
}
// lg2.approx.ftz: an absolute error of 2^-22 between 1/2 and 2, else a relative one.
inline float approximate_log2(float x) {
    x = flushed(x);
    if (!pessimistic() || !(x > 0) || !(x < INFINITY)) return log2f(x);
    const double exact = log2((double)x), error = 0x1p-22 * error_share(x);
    return (float)(x > 0.5f && x < 2.0f ? exact + error : exact * (1 + error));
}
// rcp.approx.ftz: one unit in the last place.
inline float approximate_reciprocal(float x) {
    const float rounded = flushed(1 / flushed(x));
    if (!pessimistic() || !(fabsf(rounded) < INFINITY) || rounded == 0) return rounded;
    return flushed((float)(1 / (double)x * (1 + 0x1p-23 * error_share(x))));
}
// rsqrt.approx: a relative error of 2^-22.4.
inline float approximate_inverse_root(float x) {
    if (!pessimistic() || !(x > 0) || !(x < INFINITY)) return 1 / sqrtf(x);
    return (float)(1 / sqrt((double)x) * (1 + 1.8e-7 * error_share(x)));
}

// The sum of d and sixteen products, as mma computes it. The terms are aligned to the largest and
// cut off two bits below its last; the sum is cut to float32. NVIDIA documents neither; published
// measurements of tensor cores from Volta to Hopper agree on both.
inline float truncated_sum(float d, const float (&products)[16]) {
    float largest = fabsf(d);
    bool finite = fabsf(d) < INFINITY;
    for (float x : products)
        largest = fmaxf(largest, fabsf(x)), finite = finite && fabsf(x) < INFINITY;
    if (!finite || largest == 0) {
        for (float x : products) d += x;
        return d;
    }
    int exponent;
    frexp(largest, &exponent);  // largest < 2^exponent
    const double scale = ldexp(1.0, 26 - exponent);
    int64_t sum = (int64_t)(d * scale);
    for (float x : products) sum += (int64_t)(x * scale);
    const double total = (double)sum / scale;
    const float rounded = (float)total;
    return fabs((double)rounded) > fabs(total) ? nextafterf(rounded, 0.0f) : rounded;
}
inline float tensor_core_sum(float d, const float (&products)[16]) {
    if (pessimistic()) return truncated_sum(d, products);
    for (float x : products) d += x;
    return d;
}

}  // namespace emulator
}  // namespace cuda
}  // namespace optical
