// Equal log-masses of one side of a batch, from a mask or from lengths.
#pragma once

#include <stdint.h>

#include "../sinkhorn.h"

namespace optical {
namespace {

struct Float16 {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

// An entry of a mask is 0, 1 or, with code 2, neither.
enum Code { padding, present, unknown };
inline Code by_bits(uint16_t bits, uint16_t one) {
    return (bits & 0x7fff) == 0 ? padding : bits == one ? present : unknown;
}
inline Code code_of(Float16 entry) { return by_bits(entry.bits, 0x3c00); }
inline Code code_of(BFloat16 entry) { return by_bits(entry.bits, 0x3f80); }
template <typename Entry>
Code code_of(Entry entry) {
    return entry == 0 ? padding : entry == 1 ? present : unknown;
}

struct MassShape {
    int64_t batch, size, stride_batch, stride_entry;
};

template <typename T>
T equal_mass(int64_t count) {
    return (T)-__builtin_log((double)(count > 1 ? count : 1));
}

// One row of a mask, whose entries are adjacent if `stride` is 1. False: an entry is unknown.
template <typename T, typename Entry>
inline __attribute__((always_inline)) bool row_of_mask(const Entry* mask, int64_t size,
                                                       int64_t stride, T* log_mass) {
    int64_t count = 0, others = 0;
    for (int64_t i = 0; i < size; ++i) {
        const Code code = code_of(mask[i * stride]);
        count += code == present, others += code == unknown;
    }
    const T mass = equal_mass<T>(count);
    for (int64_t i = 0; i < size; ++i)
        log_mass[i] = code_of(mask[i * stride]) == present ? mass : -(T)__builtin_huge_val();
    return others == 0;
}

template <typename Entry, typename T>
int masses_of_mask(const MassShape& shape, const void* mask, T* log_mass) {
    bool known = true;
    for (int64_t b = 0; b < shape.batch; ++b) {
        const Entry* const row = (const Entry*)mask + b * shape.stride_batch;
        T* const to = log_mass + b * shape.size;
        if (shape.stride_entry == 1) known &= row_of_mask(row, shape.size, 1, to);
        else known &= row_of_mask(row, shape.size, shape.stride_entry, to);
    }
    return known ? OPTICAL_OK : OPTICAL_INVALID_MASK;
}

// Lengths beyond the size count as the size, negative ones as 0.
template <typename Length, typename T>
int masses_of_lengths(const MassShape& shape, const void* lengths, int64_t stride, T* log_mass) {
    for (int64_t b = 0; b < shape.batch; ++b) {
        const int64_t given = lengths ? (int64_t)((const Length*)lengths)[b * stride] : shape.size;
        const int64_t length = given < shape.size ? given : shape.size;
        const T mass = equal_mass<T>(length);
        T* const to = log_mass + b * shape.size;
        for (int64_t i = 0; i < shape.size; ++i)
            to[i] = i < length ? mass : -(T)__builtin_huge_val();
    }
    return OPTICAL_OK;
}

template <typename T>
int equal_masses(const MassShape& shape, const void* mask, int32_t mask_type, const void* lengths,
                 int32_t lengths_type, int64_t lengths_stride, T* log_mass) {
    if (!mask && lengths && lengths_type == OPTICAL_I32)
        return masses_of_lengths<int32_t>(shape, lengths, lengths_stride, log_mass);
    if (!mask && (!lengths || lengths_type == OPTICAL_I64))
        return masses_of_lengths<int64_t>(shape, lengths, lengths_stride, log_mass);
    if (!mask || lengths) return OPTICAL_INVALID_ARGUMENT;
    switch (mask_type) {
        case OPTICAL_F32: return masses_of_mask<float>(shape, mask, log_mass);
        case OPTICAL_F64: return masses_of_mask<double>(shape, mask, log_mass);
        case OPTICAL_F16: return masses_of_mask<Float16>(shape, mask, log_mass);
        case OPTICAL_BF16: return masses_of_mask<BFloat16>(shape, mask, log_mass);
        case OPTICAL_U8: return masses_of_mask<uint8_t>(shape, mask, log_mass);
        case OPTICAL_I8: return masses_of_mask<int8_t>(shape, mask, log_mass);
        case OPTICAL_I16: return masses_of_mask<int16_t>(shape, mask, log_mass);
        case OPTICAL_I32: return masses_of_mask<int32_t>(shape, mask, log_mass);
        case OPTICAL_I64: return masses_of_mask<int64_t>(shape, mask, log_mass);
        default: return OPTICAL_INVALID_ARGUMENT;
    }
}

}  // namespace
}  // namespace optical
