// The machine interface of the kernels: thread indices, shuffles, barriers, copies, tensor cores
// and fast arithmetic.
//
// Everything else in this folder is written against these functions. nvcc and NVRTC compile the
// definitions below. With OPTICAL_EMULATED, the build must provide emulator.cuh on its include path
// (tests/cuda_emulator), which implements the same functions on the CPU.
#pragma once

#if !defined(__CUDACC_RTC__)
#include <stdint.h>
#endif

#include "../sinkhorn.h"

#define OPTICAL_LOG2E 1.4426950408889634f
#define OPTICAL_LN2 0.6931471805599453f

#if defined(OPTICAL_EMULATED)
#include "emulator.cuh"
#else

#define OPTICAL_DEVICE __device__ __forceinline__
#define OPTICAL_HOST_DEVICE __host__ __device__ __forceinline__
#define OPTICAL_KERNEL(name, threads) extern "C" __global__ void __launch_bounds__(threads) name
// A kernel parameter that is read in place and never copied into local memory.
#define OPTICAL_CONSTANT const __grid_constant__
#define OPTICAL_UNROLL_LOOP _Pragma("unroll")
#define OPTICAL_KEEP_LOOP _Pragma("unroll 1")
#define OPTICAL_UNROLL_WARPS _Pragma("unroll warps_at_once")

namespace optical {
namespace cuda {

OPTICAL_DEVICE int thread_index() { return (int)threadIdx.x; }
OPTICAL_DEVICE int thread_count() { return (int)blockDim.x; }
OPTICAL_DEVICE int block_index() { return (int)blockIdx.x; }

OPTICAL_DEVICE char* shared_memory() {
    extern __shared__ __align__(16) char optical_shared[];
    return optical_shared;
}

// Copies 16 bytes from device memory to shared memory asynchronously, or writes zeros if
// `predicate` is false. Both addresses are multiples of 16.
OPTICAL_DEVICE void copy_async(void* to, const void* from, bool predicate) {
    const unsigned place = (unsigned)__cvta_generic_to_shared(to), bytes = predicate ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(bytes)
                 : "memory");
}
// Completes the asynchronous copies of this thread. Other threads see them after a barrier.
OPTICAL_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The lanes that share a problem: the whole warp or an aligned part of it. Parts may diverge.
template <int lanes>
OPTICAL_DEVICE unsigned lane_mask() {
    return lanes == 32 ? 0xffffffffu
                       : ((1u << lanes % 32) - 1u) << (threadIdx.x % 32 / lanes * lanes);
}
template <int lanes = 32, typename Value>
OPTICAL_DEVICE Value shuffle_xor(Value x, int mask) {
    return __shfl_xor_sync(lane_mask<lanes>(), x, mask);
}
template <int lanes = 32, typename Value>
OPTICAL_DEVICE Value shuffle(Value x, int lane) {
    return __shfl_sync(lane_mask<lanes>(), x, lane, lanes);
}
template <int lanes = 32>
OPTICAL_DEVICE bool warp_any(bool predicate) {
    return __any_sync(lane_mask<lanes>(), predicate) != 0;
}
template <int lanes = 32>
OPTICAL_DEVICE unsigned warp_or(unsigned bits) {
    return __reduce_or_sync(lane_mask<lanes>(), bits);
}
template <int lanes = 32>
OPTICAL_DEVICE void sync_warp() {
    __syncwarp(lane_mask<lanes>());
}
OPTICAL_DEVICE void sync_block() { __syncthreads(); }
OPTICAL_DEVICE bool sync_block_or(bool predicate) { return __syncthreads_or(predicate) != 0; }

#if __CUDA_ARCH__ >= 900
constexpr bool has_clusters = true;
OPTICAL_DEVICE int cluster_rank() {
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return (int)rank;
}
OPTICAL_DEVICE int cluster_size() {
    unsigned size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return (int)size;
}
OPTICAL_DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The address in block `rank` of the cluster that corresponds to `local` in this block.
template <typename Element>
OPTICAL_DEVICE const Element* remote(const Element* local, int rank) {
    uint64_t address;
    asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"((uint64_t)local), "r"(rank));
    return (const Element*)address;
}
#else
// Devices before sm_90 have no clusters.
constexpr bool has_clusters = false;
OPTICAL_DEVICE int cluster_rank() { return 0; }
OPTICAL_DEVICE int cluster_size() { return 1; }
OPTICAL_DEVICE void sync_cluster() { __syncthreads(); }
template <typename Element>
OPTICAL_DEVICE const Element* remote(const Element* local, int) {
    return local;
}
#endif

// d += A B on the tensor cores, with A (16 x 16) and B (16 x 8) in half precision, in the fragment
// layout of mma.m16n8k16. With g = lane / 4 and t = lane % 4, `a` holds the pairs at columns 2t and
// 2t + 8 of rows g and g + 8, `b` the pairs at rows 2t and 2t + 8 of column g, and `d` columns 2t
// and 2t + 1 of rows g and g + 8. All lanes must take part: volatile keeps the compiler from moving
// the product into code that only some lanes reach.
OPTICAL_DEVICE void multiply_fragments(float (&d)[4], const unsigned (&a)[4],
                                       const unsigned (&b)[2], bool bfloat) {
#define OPTICAL_MMA(type)                                                                        \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, "     \
                 "%3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                            \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
    if (bfloat) OPTICAL_MMA("bf16");
    else OPTICAL_MMA("f16");
#undef OPTICAL_MMA
}

// Loads four 8 x 8 matrices of halves from shared memory. Each lane passes the address of row lane
// % 8 of matrix lane / 8, 16 aligned bytes. pairs[i] receives columns 2t and 2t + 1 of row g of
// matrix i, or, `transposed`, rows 2t and 2t + 1 of column g.
template <bool transposed>
OPTICAL_DEVICE void load_matrices(unsigned (&pairs)[4], const void* row) {
    const unsigned place = (unsigned)__cvta_generic_to_shared(row);
#define OPTICAL_LOAD(how)                                                                        \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" how ".shared.b16 {%0, %1, %2, %3}, [%4];"       \
                 : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])                \
                 : "r"(place)                                                                    \
                 : "memory")
    if (transposed) OPTICAL_LOAD(".trans");
    else OPTICAL_LOAD("");
#undef OPTICAL_LOAD
}

// Packs two float16 into a word, the first in the lower half.
OPTICAL_DEVICE unsigned pack_halves(float x, float y) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
    return pair;
}
// Packs two bfloat16 into a word, the first in the lower half.
OPTICAL_DEVICE unsigned pack_bfloats(float x, float y) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
    return pair;
}
OPTICAL_DEVICE float low_half(unsigned pair) {
    float x;
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}"
        : "=f"(x)
        : "r"(pair));
    return x;
}
OPTICAL_DEVICE float high_half(unsigned pair) {
    float x;
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}"
        : "=f"(x)
        : "r"(pair));
    return x;
}

// Hides the origin of a value, so that the compiler keeps it in a register instead of recomputing
// it at every use.
OPTICAL_DEVICE int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
OPTICAL_DEVICE float opaque(float x) {
    asm volatile("" : "+f"(x));
    return x;
}

// These functions flush denormals, which cost instructions and never matter here.
OPTICAL_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
OPTICAL_DEVICE float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 / x with an error of one unit in the last place.
OPTICAL_DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
OPTICAL_DEVICE float inverse_root(float x) { return rsqrtf(x); }
OPTICAL_DEVICE double square_root(double x) { return sqrt(x); }
OPTICAL_DEVICE double logarithm(double x) { return log(x); }
OPTICAL_DEVICE double exponential(double x) { return exp(x); }
OPTICAL_DEVICE float fused(float x, float y, float z) { return __fmaf_rn(x, y, z); }
OPTICAL_DEVICE unsigned bits_of(float x) { return __float_as_uint(x); }
OPTICAL_DEVICE float float_of(unsigned bits) { return __uint_as_float(bits); }

}  // namespace cuda
}  // namespace optical
#endif

namespace optical {
namespace cuda {

// The word of the lower halves of two words, and the word of their upper halves.
OPTICAL_DEVICE unsigned low_halves(unsigned x, unsigned y) { return (x & 0xffffu) | y << 16; }
OPTICAL_DEVICE unsigned high_halves(unsigned x, unsigned y) { return x >> 16 | (y & 0xffff0000u); }

// Splits x into the sum of two halves, exact to 24 bits in float16 and to 16 bits in bfloat16.
template <bool bfloat>
OPTICAL_DEVICE void split_number(float x, uint16_t& upper, uint16_t& lower) {
    if (bfloat) {
        upper = (uint16_t)(bits_of(x) >> 16);
        lower = (uint16_t)(bits_of(x - float_of((unsigned)upper << 16)) >> 16);
    } else {
        const unsigned pair = pack_halves(x, 0.0f);
        upper = (uint16_t)pair;
        lower = (uint16_t)pack_halves(x - low_half(pair), 0.0f);
    }
}

OPTICAL_DEVICE float infinity() { return float_of(0x7f800000u); }
OPTICAL_DEVICE float not_a_number() { return float_of(0x7fc00000u); }
OPTICAL_DEVICE bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }
OPTICAL_DEVICE float absolute(float x) { return float_of(bits_of(x) & 0x7fffffffu); }
OPTICAL_DEVICE float smaller(float x, float y) { return x < y ? x : y; }
OPTICAL_DEVICE float larger(float x, float y) { return x > y ? x : y; }
// 1 - exp(-x), accurate for small x.
OPTICAL_DEVICE float one_minus_exp(float x) {
    if (absolute(x) > 0.1f) return 1.0f - exp2_fast(-OPTICAL_LOG2E * x);
    const float series = fused(x, fused(x, fused(x, 1.0f / 120, -1.0f / 24), 1.0f / 6), -0.5f);
    return fused(x * x, series, x);
}

// Converts a half from its bit pattern. Integer arithmetic avoids the headers of the toolkit, which
// NVRTC does not find.
OPTICAL_DEVICE float from_half(unsigned bits, bool bfloat) {
    if (bfloat) return float_of(bits << 16);
    const unsigned sign = (bits & 0x8000u) << 16, size = bits & 0x7fffu;
    if (size < 0x400u) {  // zero or subnormal: a multiple of 2^-24
        const float value = (float)size * 5.9604644775390625e-8f;
        return float_of(bits_of(value) | sign);
    }
    return float_of(sign | (size >= 0x7c00u ? 0x7f800000u | (size & 0x3ffu) << 13
                                            : (size << 13) + 0x38000000u));
}

// Converts to the bit pattern of a half, rounding to nearest even.
OPTICAL_DEVICE unsigned to_half(float value, bool bfloat) {
    const unsigned bits = bits_of(value), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
    if (bfloat) {
        if (size > 0x7f800000u) return bits >> 16 | 0x40u;
        return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    }
    if (size > 0x7f800000u) return sign | 0x7e00u;
    if (size >= 0x477ff000u) return sign | 0x7c00u;
    if (size < 0x38800000u) {
        // Adding 1/2 leaves the multiple of 2^-24 in the last bits.
        return sign | (bits_of(float_of(size) + 0.5f) & 0x7ffu);
    }
    return sign | ((size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13);
}

OPTICAL_DEVICE float load(const void* from, int32_t type, int64_t at) {
    if (type == OPTICAL_F32) return ((const float*)from)[at];
    return from_half(((const uint16_t*)from)[at], type == OPTICAL_BF16);
}
// Eight halves, or four floats, that one instruction loads or stores.
struct alignas(16) Eight {
    uint16_t values[8];
};
struct alignas(16) Four {
    float values[4];
};
// Converts the two halves of a word.
OPTICAL_DEVICE void unpack(unsigned pair, bool bfloat, float& low, float& high) {
    low = bfloat ? float_of(pair << 16) : low_half(pair);
    high = bfloat ? float_of(pair & 0xffff0000u) : high_half(pair);
}
// Loads eight consecutive components as floats, with one or two instructions if `aligned`.
// Components from `count` on are zero.
OPTICAL_DEVICE void load_eight(const char* from, int32_t type, bool aligned, int64_t count,
                               float (&x)[8]) {
    if (aligned && count >= 8 && type == OPTICAL_F32) {
        const Four low = ((const Four*)from)[0], high = ((const Four*)from)[1];
        OPTICAL_UNROLL_LOOP
        for (int e = 0; e < 4; ++e) x[e] = low.values[e], x[e + 4] = high.values[e];
    } else if (aligned && count >= 8) {
        const Eight all = *(const Eight*)from;
        OPTICAL_UNROLL_LOOP
        for (int e = 0; e < 8; e += 2)
            unpack(all.values[e] | (unsigned)all.values[e + 1] << 16, type == OPTICAL_BF16, x[e],
                   x[e + 1]);
    } else {
        OPTICAL_UNROLL_LOOP
        for (int e = 0; e < 8; ++e) x[e] = e < count ? load(from, type, e) : 0.0f;
    }
}
OPTICAL_DEVICE void store(void* to, int32_t type, int64_t at, float value) {
    if (type == OPTICAL_F32) ((float*)to)[at] = value;
    else ((uint16_t*)to)[at] = (uint16_t)to_half(value, type == OPTICAL_BF16);
}

}  // namespace cuda
}  // namespace optical
