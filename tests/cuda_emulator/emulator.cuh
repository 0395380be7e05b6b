// An emulator of CUDA threads on the CPU: the functions of csrc/cuda/primitives.cuh for tests.
//
// Every thread is a fiber, and one scheduler runs them on one core. A fiber runs until it reaches a
// shuffle, a vote or a barrier; then the scheduler picks another one at random, from a seed. Shared
// memory starts as NaN. A missing barrier shows as a wrong result or NaN under some schedule; a
// barrier that some threads never reach shows as a deadlock.
#pragma once

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

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

#if defined(__x86_64__)
// Saves the callee-saved registers and switches stacks.
extern "C" void optical_switch(void** save, void* load);
asm(R"(
.text
.type optical_switch,@function
optical_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size optical_switch,.-optical_switch
)");
struct Context {
    void* stack = nullptr;
    void prepare(char* bottom, size_t size, void (*entry)()) {
        void** top = (void**)((uintptr_t)(bottom + size) & ~(uintptr_t)15);
        *--top = nullptr;  // keeps the stack aligned as after a call
        *--top = (void*)entry;
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        stack = top;
    }
    static void change(Context& from, Context& to) { optical_switch(&from.stack, to.stack); }
};
#else
struct Context {
    ucontext_t context;
    void prepare(char* bottom, size_t size, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = bottom, context.uc_stack.ss_size = size;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

struct Thread;

// A barrier of `expected` threads.
struct Meeting {
    int expected = 0;
    std::vector<Thread*> waiting;
};

// Lanes that work together, and the values that they exchange.
struct Team {
    Meeting meeting;
    uint64_t values[2][32];
    unsigned fragments[2][32][6];
};

// A warp with its teams of 32, 16 and 8 lanes.
struct Warp {
    Team all, halves[2], quarters[4];

    template <int lanes>
    Team& team(int lane) {
        static_assert(lanes == 32 || lanes == 16 || lanes == 8, "no such team");
        return lanes == 32 ? all : lanes == 16 ? halves[lane / 16] : quarters[lane / 8];
    }
    template <typename Visit>
    void visit(int lane, Visit visit) {
        visit(all.meeting, 32), visit(halves[lane / 16].meeting, 16);
        visit(quarters[lane / 8].meeting, 8);
    }
};

struct Block {
    Meeting meeting;
    std::vector<char> shared;
    char* aligned;
    int index, rank;
    unsigned votes[3] = {0, 0, 0};
};

struct Copy {
    void* to;
    const void* from;
};

struct Thread {
    Context context;
    Block* block;
    Warp* warp;
    int index, block_turn = 0;
    int turns[3] = {0, 0, 0};  // counts exchanges in the teams of 32, 16 and 8 lanes
    std::vector<Copy> ahead;
};

constexpr size_t stack_bytes = 96 << 10;

struct Machine {
    Meeting cluster;
    int cluster_size, threads;
    std::vector<Thread*> ready;
    Thread* self = nullptr;
    Context scheduler;
    const std::function<void()>* body;
    uint64_t random = 1;
    bool failed = false;

    uint64_t next() {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        return random;
    }
};

inline Machine& machine() {
    static Machine the;
    return the;
}

inline void release(Meeting& meeting) {
    Machine& m = machine();
    for (Thread* thread : meeting.waiting) m.ready.push_back(thread);
    meeting.waiting.clear();
}

inline void meet(Meeting& meeting) {
    Machine& m = machine();
    Thread* const self = m.self;
    meeting.waiting.push_back(self);
    if ((int)meeting.waiting.size() == meeting.expected) release(meeting);
    Context::change(self->context, m.scheduler);
}

// Removes a thread that has returned from a barrier.
inline void leave(Meeting& meeting) {
    --meeting.expected;
    if (meeting.expected > 0 && (int)meeting.waiting.size() == meeting.expected) release(meeting);
}

inline void enter() {
    Machine& m = machine();
    (*m.body)();
    Thread* const self = m.self;
    self->warp->visit(self->index % 32, [](Meeting& meeting, int) { leave(meeting); });
    leave(self->block->meeting), leave(m.cluster);
    Context::change(self->context, m.scheduler);
}

// Runs one cluster of blocks. Returns false on a deadlock.
inline bool run_cluster(int first, int size, int threads, size_t bytes,
                        const std::function<void()>& body) {
    Machine& m = machine();
    static std::vector<char> stacks;
    if (stacks.size() < (size_t)(size * threads) * stack_bytes)
        stacks.resize((size_t)(size * threads) * stack_bytes);
    const int warps = threads / 32;
    std::vector<Block> blocks((size_t)size);
    std::vector<Warp> of_warp((size_t)(size * warps));
    std::vector<Thread> of_thread((size_t)(size * threads));
    m.cluster_size = size, m.threads = threads, m.body = &body;
    m.cluster.expected = size * threads, m.cluster.waiting.clear();
    m.ready.clear();
    for (int b = 0; b < size; ++b) {
        blocks[b].index = first + b, blocks[b].rank = b, blocks[b].meeting.expected = threads;
        blocks[b].shared.assign(bytes + 64, (char)0xff);
        blocks[b].aligned = (char*)(((uintptr_t)blocks[b].shared.data() + 63) & ~(uintptr_t)63);
        for (int t = 0; t < threads; ++t) {
            Thread& thread = of_thread[b * threads + t];
            thread.block = &blocks[b], thread.index = t;
            thread.warp = &of_warp[b * warps + t / 32];
            thread.warp->visit(t % 32, [](Meeting& meeting, int all) { meeting.expected = all; });
            thread.context.prepare(stacks.data() + (size_t)(b * threads + t) * stack_bytes,
                                   stack_bytes, enter);
            m.ready.push_back(&thread);
        }
    }
    while (!m.ready.empty()) {
        const size_t pick = (size_t)(m.next() % m.ready.size());
        m.self = m.ready[pick];
        m.ready[pick] = m.ready.back();
        m.ready.pop_back();
        Context::change(m.scheduler, m.self->context);
    }
    return m.cluster.expected == 0;
}

// The team of this thread, and the exchange slot that is free.
template <int lanes>
inline Team& next_turn(int& turn) {
    Thread& self = *machine().self;
    turn = self.turns[lanes == 32 ? 0 : lanes == 16 ? 1 : 2]++ & 1;
    return self.warp->team<lanes>(self.index % 32);
}

template <int lanes, typename Value>
inline Value exchanged(Value value, int lane) {
    int turn;
    Team& team = next_turn<lanes>(turn);
    const int own = machine().self->index % 32;
    memcpy(team.values[turn] + own, &value, sizeof value);
    meet(team.meeting);
    Value result;
    memcpy(&result, team.values[turn] + own / lanes * lanes + lane % lanes, sizeof result);
    return result;
}

}  // namespace emulator

inline int thread_index() { return emulator::machine().self->index; }
inline int thread_count() { return emulator::machine().threads; }
inline int block_index() { return emulator::machine().self->block->index; }
inline int cluster_rank() { return emulator::machine().self->block->rank; }
inline int cluster_size() { return emulator::machine().cluster_size; }
inline char* shared_memory() { return emulator::machine().self->block->aligned; }

// Copies as late as the hardware may: in wait_for_copies().
inline void copy_async(void* to, const void* from, bool predicate) {
    emulator::machine().self->ahead.push_back({to, predicate ? from : nullptr});
}
inline void wait_for_copies() {
#if !defined(OPTICAL_WITHOUT_WAIT)
    std::vector<emulator::Copy>& ahead = emulator::machine().self->ahead;
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
    int turn;
    emulator::Team& team = emulator::next_turn<lanes>(turn);
    const int own = thread_index() % 32, first = own / lanes * lanes;
    team.values[turn][own] = bits;
    emulator::meet(team.meeting);
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
    emulator::Thread& self = *emulator::machine().self;
    emulator::meet(self.warp->team<lanes>(self.index % 32).meeting);
}
template <bool transposed>
inline void load_matrices(unsigned (&pairs)[4], const void* row) {
    int turn;
    emulator::Team& team = emulator::next_turn<32>(turn);
    unsigned (*const all)[6] = team.fragments[turn];
    const int lane = thread_index() % 32, first = lane / 4, second = lane % 4;
    if ((uintptr_t)row % 16 != 0) abort();
    memcpy(all[lane], row, 16);
    emulator::meet(team.meeting);
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
    int turn;
    emulator::Team& team = emulator::next_turn<32>(turn);
    unsigned (*const all)[6] = team.fragments[turn];
    const int lane = thread_index() % 32, first = lane / 4, second = lane % 4;
    memcpy(all[lane], a, sizeof a);
    memcpy(all[lane] + 4, b, sizeof b);
    emulator::meet(team.meeting);
    for (int i = 0; i < 4; ++i) {
        const int low = i / 2, column = 2 * second + i % 2;  // rows g and g + 8
        for (int k = 0; k < 16; ++k) {
            const unsigned x = all[first * 4 + k % 8 / 2][low + k / 8 * 2] >> k % 2 * 16;
            const unsigned y = all[column * 4 + k % 8 / 2][4 + k / 8] >> k % 2 * 16;
            d[i] += from_half(x & 0xffffu, bfloat) * from_half(y & 0xffffu, bfloat);
        }
    }
}
inline void sync_block() { emulator::meet(emulator::machine().self->block->meeting); }
inline bool sync_block_or(bool predicate) {
    // Three slots: while some threads read one, others may vote in the next, and the third is
    // cleared.
    emulator::Thread& self = *emulator::machine().self;
    unsigned* const votes = self.block->votes;
    unsigned& vote = votes[self.block_turn % 3];
    votes[(self.block_turn + 1) % 3] = 0;
    ++self.block_turn;
    vote |= predicate;
    emulator::meet(self.block->meeting);
    return vote != 0;
}
inline void sync_cluster() { emulator::meet(emulator::machine().cluster); }

template <typename Element>
inline const Element* remote(const Element* local, int rank) {
    emulator::Thread& self = *emulator::machine().self;
    // The blocks of a cluster are consecutive.
    emulator::Block* const other = self.block - self.block->rank + rank;
    return (const Element*)(other->aligned + ((const char*)local - self.block->aligned));
}

inline int opaque(int x) { return x; }
inline float opaque(float x) { return x; }
inline float exp2_fast(float x) { return x < -126 ? 0 : exp2f(x); }
inline float log2_fast(float x) { return log2f(x); }
inline float reciprocal(float x) { return 1 / x; }
inline float inverse_root(float x) { return 1 / sqrtf(x); }
inline double square_root(double x) { return sqrt(x); }
inline double logarithm(double x) { return log(x); }
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
