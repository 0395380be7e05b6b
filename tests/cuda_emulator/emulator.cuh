// An emulator of CUDA threads on the CPU: the functions of csrc/cuda/primitives.cuh for tests.
//
// Every thread is a fiber, and one scheduler runs them on one core (machine.cuh). Shared memory has
// exactly the requested size and starts as NaN. A missing barrier shows as a wrong result or NaN
// under some schedule; a barrier that some threads never reach shows as a deadlock; a write past
// the end of shared memory is reported.
//
// Three switches make it stricter:
// -fsanitize=thread    reports all accesses to memory that no barrier orders (fibers.cuh);
// -fsanitize=address   reports accesses outside of shared memory, and of inputs of exact size;
// optical_emulator_arithmetic(1), at run time, gives the approximate instructions errors up to the
//                      largest that PTX allows and lets the tensor cores truncate (arithmetic.cuh).
#pragma once

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arithmetic.cuh"
#include "machine.cuh"

#define OPTICAL_DEVICE inline
#define OPTICAL_HOST_DEVICE inline
#define OPTICAL_KERNEL(name, threads) inline void name
#define OPTICAL_CONSTANT const
#define OPTICAL_UNROLL_LOOP
#define OPTICAL_KEEP_LOOP
#define OPTICAL_UNROLL_WARPS

namespace optical {
namespace cuda {
namespace emulator {

// The team of this thread, and the exchange slot that is free.
template <int lanes>
inline Team& next_turn(int& turn) {
    Thread& self = this_thread();
    turn = self.turns[lanes == 32 ? 0 : lanes == 16 ? 1 : 2]++ & 1;
    return self.warp->team<lanes>(self.index % 32);
}

template <int lanes, typename Value>
inline Value exchanged(Value value, int lane) {
    Unwatched unwatched;
    int turn;
    Team& team = next_turn<lanes>(turn);
    const int own = this_thread().index % 32;
    memcpy(team.values[turn] + own, &value, sizeof value);
    meet(team.meeting, false);
    Value result;
    memcpy(&result, team.values[turn] + own / lanes * lanes + lane % lanes, sizeof result);
    return result;
}

}  // namespace emulator

constexpr bool has_clusters = true;
OPTICAL_EMULATOR inline int thread_index() { return emulator::machine().self->index; }
OPTICAL_EMULATOR inline int thread_count() { return emulator::machine().threads; }
OPTICAL_EMULATOR inline int block_index() { return emulator::machine().self->block->index; }
OPTICAL_EMULATOR inline int cluster_rank() { return emulator::machine().self->block->rank; }
OPTICAL_EMULATOR inline int cluster_size() { return emulator::machine().cluster_size; }
OPTICAL_EMULATOR inline char* shared_memory() { return emulator::machine().self->block->shared; }

// Copies as late as the hardware may, in wait_for_copies(). For the thread sanitizer, also as
// early.
inline void copy_async(void* to, const void* from, bool predicate) {
#if defined(__SANITIZE_THREAD__)
    if (predicate) memcpy(to, from, 16);
    else memset(to, 0, 16);
#endif
    emulator::Unwatched unwatched;
    emulator::this_thread().ahead.push_back({to, predicate ? from : nullptr});
}
inline void wait_for_copies() {
#if !defined(OPTICAL_WITHOUT_WAIT)
    std::vector<emulator::Copy>& ahead = emulator::this_thread().ahead;
    for (const emulator::Copy& copy : ahead) {
        if (((uintptr_t)copy.to | (uintptr_t)copy.from) % 16 != 0) abort();
        if (copy.from) memcpy(copy.to, copy.from, 16);
        else memset(copy.to, 0, 16);
    }
    ahead.clear();
#endif
}

template <int lanes = 32, typename Value>
inline Value shuffle_xor(Value x, int mask) {
    return emulator::exchanged<lanes>(x, (thread_index() % lanes) ^ mask);
}
template <int lanes = 32, typename Value>
inline Value shuffle(Value x, int lane) {
    return emulator::exchanged<lanes>(x, lane);
}
template <int lanes = 32>
inline unsigned warp_or(unsigned bits) {
    emulator::Unwatched unwatched;
    int turn;
    emulator::Team& team = emulator::next_turn<lanes>(turn);
    const int own = thread_index() % 32, first = own / lanes * lanes;
    team.values[turn][own] = bits;
    emulator::meet(team.meeting, false);
    unsigned all = 0;
    for (int lane = first; lane < first + lanes; ++lane) all |= (unsigned)team.values[turn][lane];
    return all;
}
template <int lanes = 32>
inline bool warp_any(bool predicate) {
    return warp_or<lanes>(predicate) != 0;
}
template <int lanes = 32>
inline void sync_warp() {
    emulator::Thread& self = emulator::this_thread();
    emulator::meet(self.warp->team<lanes>(self.index % 32).meeting, true);
}
template <bool transposed>
inline void load_matrices(unsigned (&pairs)[4], const void* row) {
    if ((uintptr_t)row % 16 != 0) abort();
    unsigned words[4];
    for (int i = 0; i < 4; ++i) words[i] = ((const unsigned*)row)[i];
    emulator::Unwatched unwatched;
    int turn;
    emulator::Team& team = emulator::next_turn<32>(turn);
    unsigned (*const all)[6] = team.fragments[turn];
    const int lane = thread_index() % 32, first = lane / 4, second = lane % 4;
    memcpy(all[lane], words, sizeof words);
    emulator::meet(team.meeting, false);
    for (int i = 0; i < 4; ++i) {
        uint16_t low, high;
        const int row_low = 8 * i + (transposed ? 2 * second : first);
        const int row_high = transposed ? row_low + 1 : row_low;
        const int column = transposed ? first : 2 * second;
        memcpy(&low, (const char*)all[row_low] + 2 * column, 2);
        memcpy(&high, (const char*)all[row_high] + 2 * (transposed ? column : column + 1), 2);
        pairs[i] = low | (unsigned)high << 16;
    }
}
float from_half(unsigned bits, bool bfloat);
unsigned to_half(float value, bool bfloat);
inline unsigned pack_halves(float x, float y) {
    return to_half(x, false) | to_half(y, false) << 16;
}
inline unsigned pack_bfloats(float x, float y) {
    return to_half(x, true) | to_half(y, true) << 16;
}
inline float low_half(unsigned pair) { return from_half(pair & 0xffffu, false); }
inline float high_half(unsigned pair) { return from_half(pair >> 16, false); }
inline void multiply_fragments(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                               bool bfloat) {
    emulator::Unwatched unwatched;
    int turn;
    emulator::Team& team = emulator::next_turn<32>(turn);
    unsigned (*const all)[6] = team.fragments[turn];
    const int lane = thread_index() % 32, first = lane / 4, second = lane % 4;
    memcpy(all[lane], a, sizeof a);
    memcpy(all[lane] + 4, b, sizeof b);
    emulator::meet(team.meeting, false);
    for (int i = 0; i < 4; ++i) {
        const int low = i / 2, column = 2 * second + i % 2;  // rows g and g + 8
        float products[16];
        for (int k = 0; k < 16; ++k) {
            const unsigned x = all[first * 4 + k % 8 / 2][low + k / 8 * 2] >> k % 2 * 16;
            const unsigned y = all[column * 4 + k % 8 / 2][4 + k / 8] >> k % 2 * 16;
            products[k] = from_half(x & 0xffffu, bfloat) * from_half(y & 0xffffu, bfloat);
        }
        d[i] = emulator::tensor_core_sum(d[i], products);
    }
}
inline void sync_block() {
    emulator::Unwatched unwatched;
    emulator::meet(emulator::this_thread().block->meeting, true);
}
inline bool sync_block_or(bool predicate) {
    emulator::Unwatched unwatched;
    // Three slots: while some threads read one, others may vote in the next, and the third is
    // cleared.
    emulator::Thread& self = emulator::this_thread();
    unsigned* const votes = self.block->votes;
    unsigned& vote = votes[self.block_turn % 3];
    votes[(self.block_turn + 1) % 3] = 0;
    ++self.block_turn;
    vote |= predicate;
    emulator::meet(self.block->meeting, true);
    return vote != 0;
}
inline void sync_cluster() { emulator::meet(emulator::machine().cluster, true); }

template <typename Element>
OPTICAL_EMULATOR inline const Element* remote(const Element* local, int rank) {
    emulator::Thread& self = *emulator::machine().self;
    // The blocks of a cluster are consecutive.
    emulator::Block* const other = self.block - self.block->rank + rank;
    return (const Element*)(other->shared + ((const char*)local - self.block->shared));
}

inline int opaque(int x) { return x; }
inline float opaque(float x) { return x; }
inline float exp2_fast(float x) { return emulator::approximate_exp2(x); }
inline float log2_fast(float x) { return emulator::approximate_log2(x); }
inline float reciprocal(float x) { return emulator::approximate_reciprocal(x); }
inline float inverse_root(float x) { return emulator::approximate_inverse_root(x); }
inline double square_root(double x) { return sqrt(x); }
inline double logarithm(double x) { return log(x); }
inline double exponential(double x) { return exp(x); }
inline float fused(float x, float y, float z) { return x * y + z; }
inline unsigned bits_of(float x) {
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float float_of(unsigned bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

}  // namespace cuda
}  // namespace optical
