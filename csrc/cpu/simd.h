// SIMD vectors on the vector extensions of GCC and Clang, with exp, log and reductions over lanes.
//
// This header is compiled once per instruction set. Everything in it is `static` and forced inline,
// and no code of the C++ library is used: the linker would merge a template shared by two builds,
// and a machine without AVX-512 could then run the AVX-512 copy.
#pragma once

#include <stdint.h>
#include <string.h>

#include <utility>  // integer_sequence: a type without code

#ifndef OPTICAL_VECTOR_BYTES
#error "OPTICAL_VECTOR_BYTES gives the width of a vector register: 16, 32 or 64"
#endif

// 32 vector registers of 64 bytes, instead of 16 or fewer registers.
#define OPTICAL_MANY_REGISTERS (OPTICAL_VECTOR_BYTES == 64)

#if (OPTICAL_VECTOR_BYTES == 16 && defined(__SSE2__)) || \
    (OPTICAL_VECTOR_BYTES == 32 && defined(__AVX__)) ||  \
    (OPTICAL_VECTOR_BYTES == 64 && defined(__AVX512F__))
#define OPTICAL_X86_REGISTERS  // a vector is one register
#endif

#define OPTICAL_INLINE_MEMBER inline __attribute__((always_inline))
#define OPTICAL_INLINE static OPTICAL_INLINE_MEMBER

// Bit layout, range and polynomial coefficients of each number type. The polynomials are minimax on
// the reduced range (Remez exchange at 50 digits), with relative errors of 3e-9 and 4e-18 for exp
// and 8e-10 and 8e-21 for log (float and double): well below the rounding of the last step.
template <typename T>
struct Number;

template <>
struct Number<float> {
    typedef int32_t Bits;
    static constexpr int mantissa = 23;
    static constexpr float round_shift = 0x1.8p23f;  // adding it rounds to an integer
    static constexpr float log2e = 0x1.715476p+0f;
    static constexpr float ln2_high = 0x1.62e4p-1f;  // few enough bits that k * ln2_high is exact
    static constexpr float ln2_low = 0x1.7f7d1cp-20f;
    static constexpr float exp_zero = -88.1f;      // rounds to k = -127, whose 2^k reads as 0
    static constexpr float exp_infinity = 88.8f;   // rounds to k = 128, whose 2^k reads as inf
    static constexpr float infinity = __builtin_huge_valf();
    static constexpr Bits one_bits = 0x3f800000;
    static constexpr Bits sqrt_half_bits = 0x3f3504f3;
    static constexpr int exp_terms = 5;
    static constexpr float exp_coefficient[exp_terms] = {
        0.49999993431924189732f, 0.16666520398943396875f, 0.041668390849856805566f,
        0.0083687451277194032265f, 0.0013814536182351297325f};
    static constexpr int log_terms = 3;
    static constexpr float log_coefficient[log_terms] = {
        0.66666777051573332154f, 0.39977449663568688931f, 0.29874416457813262732f};
};

template <>
struct Number<double> {
    typedef int64_t Bits;
    static constexpr int mantissa = 52;
    static constexpr double round_shift = 0x1.8p52;
    static constexpr double log2e = 0x1.71547652b82fep+0;
    static constexpr double ln2_high = 0x1.62e42fefa3800p-1;
    static constexpr double ln2_low = 0x1.ef35793c76730p-45;
    static constexpr double exp_zero = -709.1;
    static constexpr double exp_infinity = 709.8;
    static constexpr double infinity = __builtin_huge_val();
    static constexpr Bits one_bits = 0x3ff0000000000000;
    static constexpr Bits sqrt_half_bits = 0x3fe6a09e667f3bcd;
    static constexpr int exp_terms = 10;
    static constexpr double exp_coefficient[exp_terms] = {
        0.50000000000000106702,  0.16666666666666411558,    0.041666666666529715806,
        0.0083333333334949469741, 0.0013888888943763143527,  0.00019841269505838310108,
        0.000024801492446942949973, 2.7557586745904070209e-6, 2.7630307351420194529e-7,
        2.5000037466882046302e-8};
    static constexpr int log_terms = 8;
    static constexpr double log_coefficient[log_terms] = {
        0.66666666666666660887, 0.40000000000006331769, 0.28571428569058572564,
        0.22222222650929780369, 0.18181775333279709628, 0.15387105348878245847,
        0.13249787679682680861, 0.13254346977546325782};
};

// GCC requires a literal as the size of a vector of a fixed type.
template <int bytes>
struct Words;
template <>
struct Words<16> {
    typedef int64_t Type __attribute__((vector_size(16)));
};
template <>
struct Words<32> {
    typedef int64_t Type __attribute__((vector_size(32)));
};
template <>
struct Words<64> {
    typedef int64_t Type __attribute__((vector_size(64)));
};

// Vectors of a whole register, or of `bytes` bytes.
template <typename T, int bytes = OPTICAL_VECTOR_BYTES>
struct Simd {
    typedef typename Number<T>::Bits Bits;
    typedef T Vector __attribute__((vector_size(bytes)));
    typedef T Memory __attribute__((vector_size(bytes), may_alias));
    typedef Bits Mask __attribute__((vector_size(bytes)));
    static constexpr int width = bytes / (int)sizeof(T);

    OPTICAL_INLINE Vector all(T x) { return x - Vector{}; }  // x - 0 keeps the sign of a zero
    OPTICAL_INLINE Vector load(const T* from) { return *(const Memory*)from; }
    OPTICAL_INLINE void store(T* to, Vector x) { *(Memory*)to = x; }
    OPTICAL_INLINE Vector load_unaligned(const T* from) {
        Vector x;
        memcpy(&x, from, sizeof x);
        return x;
    }
    OPTICAL_INLINE void store_unaligned(T* to, Vector x) { memcpy(to, &x, sizeof x); }

    OPTICAL_INLINE Vector select(Mask condition, Vector yes, Vector no) {
        return condition ? yes : no;
    }
    // Stops GCC from swapping the operands of a comparison with a constant, which hides minimum and
    // maximum instructions from it, and from fusing a product with a sum.
    OPTICAL_INLINE Vector opaque(Vector x) {
#if defined(OPTICAL_X86_REGISTERS)
        asm("" : "+v"(x));
#endif
        return x;
    }
    // If x or y is NaN the result is y, as in the x86 instructions.
    OPTICAL_INLINE Vector min(Vector x, Vector y) { return select(x < y, x, y); }
    OPTICAL_INLINE Vector max(Vector x, Vector y) { return select(x > y, x, y); }
    OPTICAL_INLINE Vector absolute(Vector x) { return select(x < 0, -x, x); }
    OPTICAL_INLINE bool every(Mask condition) {
        const typename Words<bytes>::Type words = (typename Words<bytes>::Type)condition;
        int64_t result = -1;
        for (int i = 0; i < bytes / 8; ++i) result &= words[i];
        return result == -1;
    }
    // x / y to half a unit in the last place, without a vector division: one fused multiply-add
    // computes the rounding error of x times the inverse of y, a second corrects it.
    OPTICAL_INLINE Vector quotient(Vector x, T y, T inverse) {
#if defined(__FMA__) || defined(__aarch64__)
        const Vector rough = x * inverse;
        return rough + (x - rough * y) * inverse;
#else
        (void)inverse;
        return x / y;
#endif
    }
    OPTICAL_INLINE T sum(Vector x) {
        T total = 0;
        for (int lane = 0; lane < width; ++lane) total += x[lane];
        return total;
    }

    // Returns a vector whose lane k is the sum (or minimum) of the lanes of rows[k], k < width.
    // Adding halves of neighbours transposes while it reduces, in width - 1 additions.
    struct Sum {
        template <typename Any>
        OPTICAL_INLINE Any of(Any x, Any y) { return x + y; }
    };
    struct Minimum {
        template <typename Any>
        OPTICAL_INLINE Any of(Any x, Any y) { return x < y ? x : y; }
    };
    template <typename Operation>
    OPTICAL_INLINE Vector across(Vector* rows) {
        fold<Operation, width / 2>(rows);
        return rows[0];
    }

    // The same for as many rows as a Narrow vector has lanes, into such a vector.
    template <typename Operation, typename Narrow>
    OPTICAL_INLINE typename Narrow::Vector across_into(Vector* rows) {
        if constexpr (Narrow::width == width) return across<Operation>(rows);
        else {
            static_assert(2 * Narrow::width == width, "half a vector");
            fold<Operation, width / 4>(rows);
            return Operation::of(part<Narrow, 0>(rows[0]), part<Narrow, 1>(rows[0]));
        }
    }
    // The lower (0) or the upper half (1) of the lanes; all lanes if the width is the same.
    template <typename Narrow, int which>
    OPTICAL_INLINE typename Narrow::Vector part(Vector x) {
        if constexpr (Narrow::width == width) return x;
        else
            return lanes_of<Narrow, which * Narrow::width>(
                x, std::make_integer_sequence<int, Narrow::width>{});
    }
    // A mask that repeats the lanes of a narrower one.
    template <typename Narrow>
    OPTICAL_INLINE Mask repeated(Narrow x) {
        if constexpr (sizeof x == sizeof(Mask)) return (Mask)x;
        else return repeated(x, std::make_integer_sequence<int, width>{});
    }

    // rows[k][lane] <-> rows[lane][k], for k < width.
    OPTICAL_INLINE void transpose(Vector* rows) { exchange<width / 2>(rows); }

    // exp to about one unit in the last place; 0 below the normal range, +inf above the range, NaN
    // for NaN. Cody and Waite: x = k ln 2 + r with |r| <= ln 2 / 2. `count` vectors take each step
    // together, because a single one would wait for its own previous step.
    template <int count>
    OPTICAL_INLINE void exp(Vector* x) {
        typedef Number<T> C;
        const Vector lowest = opaque(all(C::exp_zero)), highest = opaque(all(C::exp_infinity));
        Vector shifted[count], r[count], p[count];
        for (int i = 0; i < count; ++i) {
            r[i] = min(highest, max(lowest, x[i]));
            shifted[i] = r[i] * C::log2e + C::round_shift;
        }
        for (int i = 0; i < count; ++i) {
            const Vector k = shifted[i] - C::round_shift;
            r[i] = (r[i] - k * C::ln2_high) - k * C::ln2_low;
            p[i] = all(C::exp_coefficient[C::exp_terms - 1]);
        }
        for (int term = C::exp_terms - 2; term >= 0; --term)
            for (int i = 0; i < count; ++i) p[i] = p[i] * r[i] + C::exp_coefficient[term];
        for (int i = 0; i < count; ++i) p[i] = p[i] * r[i] + T(1);
        for (int i = 0; i < count; ++i) p[i] = p[i] * r[i] + T(1);
        // The low bits of `shifted` hold the integer k: shift it into the exponent of 2^k.
        for (int i = 0; i < count; ++i)
            x[i] = p[i] * (Vector)(((Mask)shifted[i] << C::mantissa) + C::one_bits);
    }
    OPTICAL_INLINE Vector exp(Vector x) {
        exp<1>(&x);
        return x;
    }

    // Natural logarithm of a positive normal number, to a few units in the last place:
    // x = 2^k y with y near 1, and log y = 2 artanh((y - 1) / (y + 1)).
    OPTICAL_INLINE Vector log(Vector x) {
        typedef Number<T> C;
        const Mask k_bits = ((Mask)x - C::sqrt_half_bits) >> C::mantissa;
        const Vector y = (Vector)((Mask)x - (k_bits << C::mantissa));
        const Vector k = (Vector)(k_bits + (Mask)all(C::round_shift)) - C::round_shift;
        const Vector s = (y - T(1)) / (y + T(1));
        const Vector z = s * s;
        Vector p = all(C::log_coefficient[C::log_terms - 1]);
        for (int i = C::log_terms - 2; i >= 0; --i) p = p * z + C::log_coefficient[i];
        return k * C::ln2_high + (k * C::ln2_low + ((s * z) * p + T(2) * s));
    }

private:
    template <int half, int odd, int... lane>
    OPTICAL_INLINE Vector interleave(Vector x, Vector y, std::integer_sequence<int, lane...>) {
#if defined(__clang__) || __GNUC__ >= 12
        return __builtin_shufflevector(x, y, source<half, odd>(lane)...);
#else
        return __builtin_shuffle(x, y, Mask{source<half, odd>(lane)...});
#endif
    }
    template <int half, int odd>
    static constexpr int source(int lane) {
        const int block = lane / half;
        return (block % 2) * width + (block / 2) * 2 * half + odd * half + lane % half;
    }
    // Exchanges the off-diagonal blocks of every pair of rows `half` apart, then recurses.
    template <int half>
    OPTICAL_INLINE void exchange(Vector* rows) {
        if constexpr (half > 0) {
            const std::make_integer_sequence<int, width> lanes{};
            for (int k = 0; k < width; ++k) {
                if (k & half) continue;
                const Vector low = interleave<half, 0>(rows[k], rows[k + half], lanes);
                const Vector high = interleave<half, 1>(rows[k], rows[k + half], lanes);
                rows[k] = low, rows[k + half] = high;
            }
            exchange<half / 2>(rows);
        }
    }
    template <typename Narrow, int first, int... lane>
    OPTICAL_INLINE typename Narrow::Vector lanes_of(Vector x, std::integer_sequence<int, lane...>) {
#if defined(__clang__) || __GNUC__ >= 12
        return __builtin_shufflevector(x, x, (first + lane)...);
#else
        return typename Narrow::Vector{x[first + lane]...};
#endif
    }
    template <typename Narrow, int... lane>
    OPTICAL_INLINE Mask repeated(Narrow x, std::integer_sequence<int, lane...>) {
        constexpr int few = width * (int)sizeof(Narrow) / (int)sizeof(Mask);
#if defined(__clang__) || __GNUC__ >= 12
        return __builtin_shufflevector(x, x, (lane % few)...);
#else
        return Mask{x[lane % few]...};
#endif
    }
    // Lanes whose index has the bit `half` set come from y, the rest from x; with `crossed`, from
    // the lane with that bit flipped.
    template <int half, bool crossed, int... lane>
    OPTICAL_INLINE Vector mixed(Vector x, Vector y, std::integer_sequence<int, lane...>) {
#if defined(__clang__) || __GNUC__ >= 12
        return __builtin_shufflevector(x, y, mixed_source<half, crossed>(lane)...);
#else
        return __builtin_shuffle(x, y, Mask{mixed_source<half, crossed>(lane)...});
#endif
    }
    template <int half, bool crossed>
    static constexpr int mixed_source(int lane) {
        return (lane & half ? width : 0) + (crossed ? lane ^ half : lane);
    }
    // Reduces `half` pairs of rows to one vector each, then recurses.
    template <typename Operation, int half>
    OPTICAL_INLINE void fold(Vector* rows) {
        if constexpr (half > 0) {
            const std::make_integer_sequence<int, width> lanes{};
            for (int k = 0; k < half; ++k) {
                // A blend and one shuffle: cores execute fewer shuffles than blends per cycle.
                const Vector own = mixed<half, false>(rows[k], rows[k + half], lanes);
                const Vector other = mixed<half, true>(rows[k], rows[k + half], lanes);
                rows[k] = Operation::of(own, other);
            }
            fold<Operation, half / 2>(rows);
        }
    }
};
