// Registers of PTX, and the instructions that compute a lane's result from its own operands.
//
// A register is 64 bits wide here, whatever its type; instructions read and write the low bits.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

using u32 = uint32_t;
using u64 = uint64_t;
using Wide = __int128;

enum Kind { BITS, SIGNED, UNSIGNED, FLOAT, BFLOAT, TFLOAT, PREDICATE };

// assembly.py reads these names. PACK and those after it are carried out by machine.cpp.
enum Operation {
    MOV, ADD, SUB, MUL, MULWIDE, MAD, MADWIDE, FMA, DIV, REM, MIN, MAX, NEG, ABS, AND, OR,
    XOR, NOT, SHL, SHR, BFE, PRMT, SETP, SELP, CVT, CVTPACK, EX2, LG2, RCP, SQRT, RSQRT,
    PACK, UNPACK, PARAM, LOAD, STORE, SHFL, REDUX, BRA, RET, BAR, WARPBAR, MMA, WGMMA,
    LDMATRIX, STMATRIX, CPASYNC, CPCOMMIT, CPWAIT,
};
// Modes of single operations.
enum Compare { EQ, NE, LT, LE, GT, GE, NUM, NAN_, UNORDERED = 8 };
enum Combine { ONE, BOTH, EITHER, DIFFERENT };
enum Round { NEAREST, FLOOR, CEIL, TRUNCATE, INTEGER };
enum Precision { EXACT_UNIT, APPROXIMATE };

struct Type { int32_t kind, bits; };

struct Instruction {
    int32_t operation;
    Type type, from;          // of the result, and of a source that differs
    int32_t flush;            // subnormal numbers become 0
    int32_t mode, detail;     // of the operation, as assembly.py documents them
    int32_t predicate, unless;  // register that enables the lane (-1: none), or disables it
    int32_t results, sources, first;  // operands
    int32_t vector, line;
};

// Errors of approximate units and tensor cores; bits of an option.
enum Noise { NOISY_UNITS = 1, TRUNCATED_SUMS = 2 };
inline int noise = 0;

template <class To, class From> To reinterpret(From from) {
    To to{};
    memcpy(&to, &from, std::min(sizeof to, sizeof from));
    return to;
}

inline u64 truncate(Type type, u64 x) {
    return type.bits >= 64 ? x : x & ((u64(1) << type.bits) - 1);
}
inline Wide integer(Type type, u64 x) {
    const int unused = 64 - type.bits;
    return type.kind == SIGNED ? Wide(int64_t(x << unused) >> unused) : Wide(truncate(type, x));
}
inline bool is_real(Type type) { return type.kind >= FLOAT && type.kind <= TFLOAT; }

// Every sum, product and quotient of two float32 numbers is rounded correctly from its double.
inline double real(Type type, u64 x) {
    if (type.kind == TFLOAT) return reinterpret<float>(u32(x) & 0xffffe000u);
    if (type.kind == BFLOAT) return reinterpret<float>(u32(x) << 16);
    if (type.bits == 16) return (double)reinterpret<_Float16>(uint16_t(x));
    return type.bits == 32 ? reinterpret<float>(u32(x)) : reinterpret<double>(x);
}
inline u64 pack(Type type, double x) {
    const u32 bits = reinterpret<u32>(float(x));
    const bool finite = (bits & 0x7f800000) != 0x7f800000;
    if (type.kind == TFLOAT) return (finite ? bits + 0x1000 : bits) & 0xffffe000u;
    if (type.kind == BFLOAT) return x != x ? 0x7fff : (bits + (bits >> 16 & 1) + 0x7fff) >> 16;
    if (type.bits == 16) return reinterpret<uint16_t>((_Float16)x);
    return type.bits == 32 ? bits : reinterpret<u64>(x);
}
inline double flushed(const Instruction& in, double x) {
    return in.flush && std::fabs(x) < 0x1p-126 ? std::copysign(0, x) : x;
}

// An error of up to `units` units in the last place, the same whenever the input is.
inline double approximated(double exact, double input, double units) {
    if (!(noise & NOISY_UNITS) || !std::isfinite(exact) || exact == 0) return exact;
    u32 hash = reinterpret<u32>(float(input));
    for (u32 factor : {0x7feb352du, 0x846ca68bu}) hash = (hash ^ hash >> 16) * factor;
    const double share = ((hash ^ hash >> 16) & 0xffff) / 32768.0 - 1;
    return float(exact) + share * units * std::ldexp(1, std::ilogb(exact) - 23);
}

// The approximate units, with the largest errors that the manual of PTX allows. Powers of two are
// exact in the hardware, although the manual does not say so.
inline double unit(const Instruction& in, double x) {
    int exponent;
    const bool power = std::frexp(x, &exponent) == 0.5;
    switch (in.operation) {
        case EX2: return x == std::floor(x) ? std::exp2(x) : approximated(std::exp2(x), x, 2);
        case LG2: {
            const double y = std::log2(x), bound = x > 0.5 && x < 2 ? 1 : std::fabs(y);
            const bool exact = power || !std::isfinite(y);
            return exact ? y : y + (approximated(1, x, 2) - 1) * bound;
        }
        case RCP: return power ? 1 / x : approximated(1 / x, x, 1);
        case SQRT: return in.mode ? approximated(std::sqrt(x), x, 1) : std::sqrt(x);
        default: return approximated(1 / std::sqrt(x), x, 2);
    }
}

inline double quotient(const Instruction& in, double x, double y) {
    if (in.mode != APPROXIMATE) return x / y;
    if (std::fabs(y) > 0x1p126 && std::isfinite(y)) return std::isinf(x) ? NAN : x * y * 0;
    return approximated(x / y, x + y, 2);
}

inline bool compare(const Instruction& in, u64 a, u64 b) {
    const auto holds = [&](auto x, auto y) {
        switch (in.mode & 7) {
            case EQ: return x == y;
            case NE: return x != y;
            case LT: return x < y;
            case LE: return x <= y;
            case GT: return x > y;
            default: return x >= y;
        }
    };
    if (!is_real(in.type)) return holds(integer(in.type, a), integer(in.type, b));
    const double x = flushed(in, real(in.type, a)), y = flushed(in, real(in.type, b));
    const bool unordered = x != x || y != y;
    if (in.mode == NUM || in.mode == NAN_) return unordered == (in.mode == NAN_);
    return unordered ? in.mode & UNORDERED : holds(x, y);
}

inline u64 convert(const Instruction& in, u64 a) {
    const Type to = in.type, from = in.from;
    if (!is_real(from)) {
        const Wide x = integer(from, a);
        return is_real(to) ? pack(to, double(x)) : u64(x);
    }
    double x = flushed(in, real(from, a));
    if (in.mode == FLOOR) x = std::floor(x);
    if (in.mode == CEIL) x = std::ceil(x);
    if (in.mode == TRUNCATE) x = std::trunc(x);
    if (in.mode == INTEGER) x = std::nearbyint(x);
    if (is_real(to)) return pack(to, x);
    // Out of range numbers become the nearest integer, and NaN becomes 0.
    const int digits = to.bits - (to.kind == SIGNED);
    const Wide most = (Wide(1) << digits) - 1, least = to.kind == SIGNED ? -most - 1 : 0;
    if (x != x) return 0;
    return u64(std::fabs(x) < 0x1p100 ? std::clamp(Wide(x), least, most) : x < 0 ? least : most);
}

template <class Function> u64 arithmetic(const Instruction& in, u64 a, u64 b, Function f) {
    const Type t = in.type;
    if (!is_real(t)) return u64(f(integer(t, a), integer(t, b)));
    return pack(t, flushed(in, f(flushed(in, real(t, a)), flushed(in, real(t, b)))));
}

inline u64 compute(const Instruction& in, u64 a, u64 b, u64 c) {
    const Type type = in.type;
    const Wide x = integer(type, a), y = integer(type, b);
    const u64 amount = std::min<u64>(u32(b), 64);
    switch (in.operation) {
        case ADD: return arithmetic(in, a, b, [](auto p, auto q) { return p + q; });
        case SUB: return arithmetic(in, a, b, [](auto p, auto q) { return p - q; });
        case MUL: return arithmetic(in, a, b, [](auto p, auto q) {
            // Of integers only the low bits count; their products may exceed 127 bits.
            if constexpr (std::is_floating_point_v<decltype(p)>) return p * q;
            else return Wide(u64(p) * u64(q));
        });
        // fmin and fmax drop NaN, as PTX does.
        case MIN: return arithmetic(in, a, b, [](auto p, auto q) {
            if constexpr (std::is_floating_point_v<decltype(p)>) return std::fmin(p, q);
            else return std::min(p, q);
        });
        case MAX: return arithmetic(in, a, b, [](auto p, auto q) {
            if constexpr (std::is_floating_point_v<decltype(p)>) return std::fmax(p, q);
            else return std::max(p, q);
        });
        case DIV: return arithmetic(in, a, b, [&](auto p, auto q) {
            if constexpr (std::is_floating_point_v<decltype(p)>) return quotient(in, p, q);
            else return q ? p / q : Wide(-1);
        });
        case REM: return u64(y ? x % y : x);
        case MULWIDE: return u64(x * y);
        case MAD: return u64(x) * u64(y) + c;
        case MADWIDE: return u64(x * y) + c;
        case FMA: {
            const double p = flushed(in, real(type, a)), q = flushed(in, real(type, b));
            const double r = flushed(in, real(type, c));
            const bool single = type.bits == 32;
            return pack(type, flushed(in, single ? std::fmaf(p, q, r) : std::fma(p, q, r)));
        }
        case NEG: return is_real(type) ? a ^ u64(1) << (type.bits - 1) : u64(-x);
        case ABS: return is_real(type) ? a & ~(u64(1) << (type.bits - 1)) : u64(x < 0 ? -x : x);
        case AND: return a & b;
        case OR: return a | b;
        case XOR: return a ^ b;
        case NOT: return ~a;
        case SHL: return amount >= u64(type.bits) ? 0 : a << amount;
        case SHR: return u64(x >> std::min<u64>(amount, type.bits - (type.kind == SIGNED)));
        case BFE: {
            const Type field = {type.kind, std::clamp(int(c & 255), 1, 32)};
            return (c & 255) ? u64(integer(field, truncate(type, a) >> (b & 255))) : 0;
        }
        case PRMT: {
            u64 result = 0;
            for (int i = 0; i < 4; ++i) {
                const u32 chosen = c >> 4 * i & 15;
                u64 byte = (u64(u32(b)) << 32 | u32(a)) >> 8 * (chosen & 7) & 255;
                if (chosen & 8) byte = byte & 128 ? 255 : 0;
                result |= byte << 8 * i;
            }
            return result;
        }
        case SETP: {
            const bool holds = compare(in, a, b);
            if (in.detail == ONE) return holds;
            return in.detail == BOTH ? holds & c : in.detail == EITHER ? holds | c : holds ^ c;
        }
        case SELP: return c & 1 ? a : b;
        case CVT: return convert(in, a);
        case CVTPACK: return pack(type, real(in.from, a)) << 16 | pack(type, real(in.from, b));
        case EX2: case LG2: case RCP: case SQRT: case RSQRT:
            return pack(type, flushed(in, unit(in, flushed(in, real(type, a)))));
        default: return a;
    }
}
