// The threads, warps and blocks of the emulated machine, and their scheduler.
//
// A fiber runs until it waits for others. Then the scheduler picks another one at random, from a
// seed.
#pragma once

#include <stdlib.h>
#include <string.h>

#include <functional>
#include <vector>

#include "fibers.cuh"

namespace optical {
namespace cuda {
namespace emulator {

struct Thread;

// A barrier of `expected` threads. Successive barriers have different tokens, so that one does not
// order what follows the next.
struct Meeting {
    int expected = 0;
    std::vector<Thread*> waiting;
    unsigned generation = 0;
    char tokens[4];
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
    char* shared;
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
    // The limits of an H100: bytes of shared memory per block, and blocks per cluster.
    int shared_memory = 227 << 10, max_cluster = 8;
    Meeting cluster;
    int cluster_size, threads;
    std::vector<Thread*> ready;
    Thread* self = nullptr;
    Context scheduler;
    const std::function<void()>* body;
    uint64_t random = 1;

    uint64_t next() {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        return random;
    }
};

OPTICAL_EMULATOR inline Machine& machine() {
    static Machine the;
    return the;
}
OPTICAL_EMULATOR inline Thread& this_thread() { return *machine().self; }

inline void release(Meeting& meeting) {
    Machine& m = machine();
    ++meeting.generation;
    for (Thread* thread : meeting.waiting) m.ready.push_back(thread);
    meeting.waiting.clear();
}

// Waits for the others. Shuffles and votes also wait, but do not order memory.
inline void meet(Meeting& meeting, bool orders_memory) {
    Unwatched unwatched;
    Machine& m = machine();
    Thread* const self = m.self;
    char* const token = meeting.tokens + meeting.generation % 4;
    if (orders_memory) release_order(token);
    meeting.waiting.push_back(self);
    if ((int)meeting.waiting.size() == meeting.expected) release(meeting);
    Context::change(self->context, m.scheduler);
    if (orders_memory) acquire_order(token);
}

// Removes a thread that has returned from a barrier.
inline void leave(Meeting& meeting) {
    --meeting.expected;
    if (meeting.expected > 0 && (int)meeting.waiting.size() == meeting.expected) release(meeting);
}

inline void enter() {
    Machine& m = machine();
    (*m.body)();
    {
        Unwatched unwatched;
        Thread* const self = m.self;
        self->warp->visit(self->index % 32, [](Meeting& meeting, int) { leave(meeting); });
        leave(self->block->meeting), leave(m.cluster);
    }
    Context::change(this_thread().context, m.scheduler, true);
}

// Shared memory of exactly `bytes` bytes. The address sanitizer watches its ends; without it, a
// guard behind the end shows writes, and reads give NaN.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t guard_bytes = 0;
#else
constexpr size_t guard_bytes = 4096;
#endif
inline char* allocate_shared(size_t bytes) {
    void* memory;
    if (posix_memalign(&memory, 64, bytes + guard_bytes + !bytes) != 0) abort();
    memset(memory, 0xff, bytes + guard_bytes);
    return (char*)memory;
}
// Returns whether the guard is intact.
inline bool release_shared(char* memory, size_t bytes) {
    bool intact = true;
    for (size_t i = bytes; i < bytes + guard_bytes; ++i) intact &= memory[i] == (char)0xff;
    free(memory);
    return intact;
}

enum class Run { finished, deadlock, overrun };

// Runs one cluster of blocks.
inline Run run_cluster(int first, int size, int threads, size_t bytes,
                       const std::function<void()>& body) {
    Machine& m = machine();
    static std::vector<char> stacks;
    if (stacks.size() < (size_t)(size * threads) * stack_bytes)
        stacks.resize((size_t)(size * threads) * stack_bytes);
    forget_frames(stacks.data(), stacks.size());
    const int warps = threads / 32;
    std::vector<Block> blocks((size_t)size);
    std::vector<Warp> of_warp((size_t)(size * warps));
    std::vector<Thread> of_thread((size_t)(size * threads));
    m.cluster_size = size, m.threads = threads, m.body = &body;
    m.cluster.expected = size * threads, m.cluster.waiting.clear();
    m.ready.clear();
    for (int b = 0; b < size; ++b) {
        blocks[b].index = first + b, blocks[b].rank = b, blocks[b].meeting.expected = threads;
        blocks[b].shared = allocate_shared(bytes);
        for (int t = 0; t < threads; ++t) {
            Thread& thread = of_thread[b * threads + t];
            thread.block = &blocks[b], thread.index = t;
            thread.warp = &of_warp[b * warps + t / 32];
            thread.warp->visit(t % 32, [](Meeting& meeting, int all) { meeting.expected = all; });
            thread.context.prepare(stacks.data() + (size_t)(b * threads + t) * stack_bytes,
                                   stack_bytes, enter);
            thread.context.identity.create();
            m.ready.push_back(&thread);
        }
    }
    m.scheduler.identity.adopt();
    while (!m.ready.empty()) {
        const size_t pick = (size_t)(m.next() % m.ready.size());
        m.self = m.ready[pick];
        m.ready[pick] = m.ready.back();
        m.ready.pop_back();
        Context::change(m.scheduler, m.self->context);
    }
    bool intact = true;
    for (Block& block : blocks) intact &= release_shared(block.shared, bytes);
    for (Thread& thread : of_thread) thread.context.identity.destroy();
    return m.cluster.expected > 0 ? Run::deadlock : intact ? Run::finished : Run::overrun;
}

}  // namespace emulator
}  // namespace cuda
}  // namespace optical
