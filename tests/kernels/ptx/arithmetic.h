// The values of PTX, and the operations that compute a lane's result from its own operands.
//
// A value has 64 bits here, whatever its type; operations read the low ones. assembly.py reads the
// names of the enumerations.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

using u32 = uint32_t;
using u64 = uint64_t;
using Wide = __int128;

enum Kind { UNSIGNED, SIGNED, FLOAT, BFLOAT, TFLOAT };
enum Operation {
    FMA, DIV, REM, MIN, MAX, AND, OR, XOR, SHL, SHR, BFE, BFI, PRMT, SELP, SETP, CVT, JOIN, EX2,
    LG2, RCP, SQRT, RSQRT, LOAD, STORE, JUMP, COPY, COMMIT, AWAIT,
    // Carried out by all lanes of a mask together; the mask is their last source.
    SHUFFLE, REDUCE, MULTIPLY, LDMATRIX, STMATRIX, MEET_LANES, MEET_BLOCK, MEET_CLUSTER,
};
// The first registers. VOTE: of the last barrier; SHARED, STACK: where these are mapped.
enum Special {
    CTAID_X, CTAID_Y, CTAID_Z, NCTAID_X, NCTAID_Y, NCTAID_Z, TID_X, NTID_X, CLUSTER_CTARANK,
    CLUSTER_NCTARANK, VOTE, SHARED, STACK, CALLER,
};
enum Comparison { LESS = 1, EQUAL = 2, GREATER = 4, UNORDERED = 8 };
enum Mode { EXACT, APPROXIMATE, FLOOR, TRUNCATE };

struct Type { int32_t kind, bits; };
struct Instruction {
    int32_t operation;
    Type type, to;              // of the sources, and of the result
    int32_t flush;              // subnormal numbers become 0
    int32_t mode;               // of single operations
    int32_t predicate, unless;  // the register that enables the lane (-1: none), or disables it
    int32_t results, sources, first;  // operands
    int32_t line;
};

// The largest errors that PTX allows approximate units, and tensor cores that truncate sums.
enum Noise { NOISY_UNITS = 1, TRUNCATED_SUMS = 2 };
inline int noise = 0;

template <class To, class From> To reinterpret(From from) {
    To to{};
    memcpy(&to, &from, std::min(sizeof to, sizeof from));
    return to;
}
inline u64 low_bits(u64 x, int bits) { return bits >= 64 ? x : x & ((u64(1) << bits) - 1); }
inline Wide integer(Type type, u64 x) {
    const int unused = 64 - type.bits;
    return type.kind == SIGNED ? Wide(int64_t(x << unused) >> unused) : low_bits(x, type.bits);
}
inline double real(Type type, u64 x) {
    if (type.kind == TFLOAT) return reinterpret<float>(u32(x) & 0xffffe000u);
    if (type.kind == BFLOAT) return reinterpret<float>(u32(x) << 16);
    if (type.bits == 16) return double(reinterpret<_Float16>(uint16_t(x)));
    return type.bits == 32 ? reinterpret<float>(u32(x)) : reinterpret<double>(x);
}
inline u64 pack(Type type, double x) {
    const u32 bits = reinterpret<u32>(float(x));
    const bool finite = (bits & 0x7f800000) != 0x7f800000;
    if (type.kind == TFLOAT) return (finite ? bits + 0x1000 : bits) & 0xffffe000u;
    if (type.kind == BFLOAT) return x != x ? 0x7fff : (bits + (bits >> 16 & 1) + 0x7fff) >> 16;
    if (type.bits == 16) return reinterpret<uint16_t>(_Float16(x));
    return type.bits == 32 ? bits : reinterpret<u64>(x);
}
inline double flushed(const Instruction& in, double x) {
    return in.flush && std::fabs(x) < 0x1p-126 ? std::copysign(0, x) : x;
}

// `exact` with an error of up to `units` units in the last place, the same whenever the input is.
inline double approximated(double exact, double input, double units) {
    if (!(noise & NOISY_UNITS) || !std::isfinite(exact) || exact == 0) return exact;
    u32 hash = reinterpret<u32>(float(input));
    for (u32 factor : {0x7feb352du, 0x846ca68bu}) hash = (hash ^ hash >> 16) * factor;
    const double share = ((hash ^ hash >> 16) & 0xffff) / 32768.0 - 1;
    return float(exact) + share * units * std::ldexp(1, std::ilogb(exact) - 23);
}
// The approximate units. Powers of two are exact in the hardware, although the manual of PTX does
// not say so.
inline double unit(const Instruction& in, double x) {
    int exponent;
    const bool power = std::frexp(x, &exponent) == 0.5;
    if (in.operation == EX2) return x == std::floor(x) ? std::exp2(x)
                                                       : approximated(std::exp2(x), x, 2);
    if (in.operation == RCP) return power ? 1 / x : approximated(1 / x, x, 1);
    if (in.operation == RSQRT) return approximated(1 / std::sqrt(x), x, 2);
    if (in.operation == SQRT)
        return in.mode == APPROXIMATE ? approximated(std::sqrt(x), x, 1) : std::sqrt(x);
    const double y = std::log2(x), bound = x > 0.5 && x < 2 ? 1 : std::fabs(y);
    return power || !std::isfinite(y) ? y : y + (approximated(1, x, 2) - 1) * bound;
}
inline double quotient(const Instruction& in, double x, double y) {
    if (in.mode != APPROXIMATE) return x / y;
    if (std::fabs(y) > 0x1p126 && std::isfinite(y)) return std::isinf(x) ? NAN : x * y * 0;
    return approximated(x / y, x + y, 2);
}

template <class Number> int outcome(Number x, Number y) {
    return x < y ? LESS : x == y ? EQUAL : x > y ? GREATER : UNORDERED;
}
// Of numbers out of range, the nearest integer; of NaN, 0.
inline u64 saturated(Type to, double x) {
    const Wide most = (Wide(1) << (to.bits - (to.kind == SIGNED))) - 1;
    const Wide least = to.kind == SIGNED ? -most - 1 : 0;
    if (x != x) return 0;
    return u64(std::fabs(x) < 0x1p100 ? std::clamp(Wide(x), least, most) : x < 0 ? least : most);
}

inline double of_reals(const Instruction& in, double x, double y, double z) {
    switch (in.operation) {
        case FMA: return in.type.bits == 32 ? std::fmaf(x, y, z) : std::fma(x, y, z);
        case DIV: return quotient(in, x, y);
        case MIN: return std::fmin(x, y);  // drops NaN, as PTX does
        case MAX: return std::fmax(x, y);
        case CVT:
            return in.mode == FLOOR ? std::floor(x) : in.mode == TRUNCATE ? std::trunc(x) : x;
        default: return unit(in, x);
    }
}
inline u64 of_integers(const Instruction& in, Wide x, Wide y, const u64* raw) {
    switch (in.operation) {
        case FMA: return u64(x) * u64(y) + raw[2];
        case DIV: return u64(y ? x / y : Wide(-1));
        case REM: return u64(y ? x % y : x);
        case MIN: return u64(std::min(x, y));
        case MAX: return u64(std::max(x, y));
        case AND: return raw[0] & raw[1];
        case OR: return raw[0] | raw[1];
        case XOR: return raw[0] ^ raw[1];
        case SHL: return u64(Wide(raw[0]) << std::min<u64>(raw[1], 64));
        case SHR: return u64(x >> std::min<u64>(raw[1], 64));
        case BFE: return u64(integer({in.type.kind, int(raw[2])}, raw[0] >> raw[1]));
        case SELP: return raw[2] & 1 ? raw[0] : raw[1];
        case CVT: return in.to.kind >= FLOAT ? pack(in.to, double(x)) : u64(x);
        case BFI: {  // a field, the number that receives it, position, length
            const u64 mask = low_bits(~u64(0), raw[3]) << raw[2];
            return (raw[1] & ~mask) | (raw[0] << raw[2] & mask);
        }
        default: {  // PRMT
            u64 result = 0;
            for (int i = 0; i < 4; ++i) {
                const u32 chosen = raw[2] >> 4 * i & 15;
                u64 byte = (raw[1] << 32 | u32(raw[0])) >> 8 * (chosen & 7) & 255;
                if (chosen & 8) byte = byte & 128 ? 255 : 0;
                result |= byte << 8 * i;
            }
            return result;
        }
    }
}
// Joins values of one width, the lowest first.
inline u64 join(const Instruction& in, const u64* raw) {
    const Type part = {in.to.kind, in.to.bits / in.sources};
    u64 joined = 0;
    for (int i = 0; i < in.sources; ++i) {
        const u64 x = in.type.kind < FLOAT ? raw[i] : pack(part, real(in.type, raw[i]));
        joined |= low_bits(x, part.bits) << part.bits * i;
    }
    return joined;
}
inline u64 compute(const Instruction& in, const u64* raw) {
    const Type type = in.type;
    if (in.operation == JOIN) return join(in, raw);
    if (type.kind < FLOAT) {
        const Wide x = integer(type, raw[0]), y = integer(type, raw[1]);
        return in.operation == SETP ? (in.mode & outcome(x, y)) != 0 : of_integers(in, x, y, raw);
    }
    double x[3];
    for (int i = 0; i < 3; ++i) x[i] = flushed(in, real(type, raw[i]));
    if (in.operation == SETP) return (in.mode & outcome(x[0], x[1])) != 0;
    const double y = flushed(in, of_reals(in, x[0], x[1], x[2]));
    return in.to.kind >= FLOAT ? pack(in.to, y) : saturated(in.to, y);
}
