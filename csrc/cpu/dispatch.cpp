// The C interface: checks sizes, chooses the instruction set once, shares problems out to threads.
#include <stdlib.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(_OPENMP)
#include <omp.h>
#include <pthread.h>
#endif

#include "kernel.h"

#ifndef OPTICAL_SOURCE_HASH
#define OPTICAL_SOURCE_HASH "unknown"
#endif

namespace optical {
namespace {

const Kernels& kernels() {
#if defined(OPTICAL_X86)
    static const Kernels& chosen = []() -> const Kernels& {
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("fma"))
            return kernels_avx512;
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kernels_avx2;
        return kernels_baseline;
    }();
    return chosen;
#else
    return kernels_baseline;
#endif
}

// Where the threads of a team wait for one another: spinning for as long as the others usually
// need, then asleep, since there may be fewer cores than threads.
struct Meeting {
    int size = 0;
    std::atomic<int> arrived{0}, round{0};
    std::mutex door;
    std::condition_variable opened;

    static void meet(void* self) {
        Meeting& m = *(Meeting*)self;
        const int round = m.round.load(std::memory_order_relaxed);
        if (m.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == m.size) {
            m.arrived.store(0, std::memory_order_relaxed);
            {
                const std::lock_guard<std::mutex> lock(m.door);
                m.round.store(round + 1, std::memory_order_release);
            }
            m.opened.notify_all();
            return;
        }
        for (int spin = 0; spin < 20000; ++spin)
            if (m.round.load(std::memory_order_acquire) != round) return;
        std::unique_lock<std::mutex> lock(m.door);
        m.opened.wait(lock, [&] { return m.round.load(std::memory_order_acquire) != round; });
    }
};

#if defined(_OPENMP)
// The threads of OpenMP do not survive a fork, and it would wait for them for ever in the child.
std::atomic<bool> forked{false};
const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

// Runs work(rank, size) on `threads` threads, or on fewer where no more are to be had.
template <typename Work>
void on_threads(int threads, Work work) {
    if (threads <= 1) return work(0, 1);
#if defined(_OPENMP)
    if (!forked && watching == 0) {
#pragma omp parallel num_threads(threads)
        work(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    std::atomic<int> size{0};  // 0 until it is known
    std::vector<std::thread> others;
    try {
        others.reserve((size_t)threads);
        for (int rank = 1; rank < threads; ++rank)
            others.emplace_back([&size, &work, rank] {
                while (size == 0) std::this_thread::yield();
                work(rank, size);
            });
    } catch (const std::system_error&) {
        // Those that run share the work.
    }
    size = 1 + (int)others.size();
    work(0, size);
    for (std::thread& other : others) other.join();
}

constexpr int64_t large_page = (int64_t)2 << 20;

// Fewer pages to ask for and to look up where the system has large ones. Those at both ends are shared
// with neighbours, to whom it makes no difference; what is not there is left alone.
void ask_for_large_pages(void* start, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    if (!start || bytes < 2 * large_page) return;
    const uintptr_t from = (uintptr_t)start / large_page * large_page;
    const uintptr_t end = ((uintptr_t)start + (uintptr_t)bytes + large_page - 1) / large_page * large_page;
    madvise((void*)from, (size_t)(end - from), MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}

// Aligned memory, freed at the end of its scope.
struct Memory {
    void* start = nullptr;
    explicit Memory(int64_t bytes) {
        const bool large = bytes >= 2 * large_page;
        const size_t size = (size_t)(bytes > 0 ? bytes : 64);
        if (posix_memalign(&start, large ? large_page : 64, size) != 0) start = nullptr;
        ask_for_large_pages(start, bytes);
    }
    Memory(const Memory&) = delete;
    ~Memory() { free(start); }
};

// Entries and iterations worth a thread of their own, and entries of a problem worth a team.
constexpr double least_work = 1 << 15, least_entries = 1 << 20;

// Calls solve(index, shared, own, team) for every problem: several problems at a time, one thread
// each, or, where they are large or few, one after another by all threads together.
template <typename Solve>
int for_each_problem(const optical_problem& p, const Scratch& scratch, double visits, Solve solve) {
    const double entries = (double)p.n * (double)p.m;
    const double work = (double)p.batch * entries * (visits + (double)p.dim / 8);
    int64_t threads = p.num_threads;
    if (work < least_work * (double)threads) threads = (int64_t)(work / least_work);
    if (threads < 1) threads = 1;

    // Rows are shared out 256 at a time.
    if (threads > 1 && p.n > 256 && (entries >= least_entries || p.batch < threads)) {
        // One piece for all: a team must not lose a member to a lack of memory.
        const Memory memory(scratch.shared + threads * scratch.own);
        if (!memory.start) return OPTICAL_OUT_OF_MEMORY;
        Meeting meeting;
        std::once_flag counted;
        on_threads((int)threads, [&](int rank, int size) {
            std::call_once(counted, [&] { meeting.size = size; });
            char* const own = (char*)memory.start + scratch.shared + rank * scratch.own;
            const Team team = {rank, size, &meeting, Meeting::meet};
            for (int64_t b = 0; b < p.batch; ++b) {
                solve(b, memory.start, own, team);
                if (size > 1) Meeting::meet(&meeting);
            }
        });
        return OPTICAL_OK;
    }

    std::atomic<int64_t> next{0};
    std::atomic<int> status{OPTICAL_OK};
    if (threads > p.batch) threads = p.batch;
    // Small enough shares that ragged problems balance, large enough that sharing is free.
    const int64_t share = p.batch / (threads * 16) > 1 ? p.batch / (threads * 16) : 1;
    on_threads((int)threads, [&](int, int) {
        const Memory memory(scratch.shared + scratch.own);
        if (!memory.start) {
            status = OPTICAL_OUT_OF_MEMORY;
            return;
        }
        const Team team = {0, 1, nullptr, nullptr};
        for (int64_t start; (start = next.fetch_add(share)) < p.batch;)
            for (int64_t b = start; b < start + share && b < p.batch; ++b)
                solve(b, memory.start, (char*)memory.start + scratch.shared, team);
    });
    return status;
}

bool valid(const optical_problem& p) {
    const bool sizes = p.batch >= 0 && p.n >= 0 && p.m >= 0 && p.dim >= 0 && p.max_iter >= 0;
    const bool choices = p.kind >= OPTICAL_GIVEN && p.kind <= OPTICAL_DOT &&
                         (p.precision == OPTICAL_F32 || p.precision == OPTICAL_F64) &&
                         p.x_type >= OPTICAL_F32 && p.x_type <= OPTICAL_BF16 &&
                         p.y_type >= OPTICAL_F32 && p.y_type <= OPTICAL_BF16 &&
                         p.gradient >= OPTICAL_ENVELOPE && p.gradient <= OPTICAL_UNROLL;
    const bool numbers = p.rho_a > 0 && p.rho_b > 0 && p.omega > 0 && p.omega < 2 &&
                         p.anderson >= 0 && p.anderson <= 16;
    const bool pairs = !p.offset_a == !p.offset_b && !p.init_f == !p.init_g;
    return sizes && choices && numbers && pairs && p.num_threads >= 1;
}

const Kernel& kernel(const optical_problem& p) {
    return p.precision == OPTICAL_F64 ? kernels().f64 : kernels().f32;
}

}  // namespace
}  // namespace optical

using namespace optical;

int optical_sinkhorn_forward(const optical_problem* problem, const optical_solution* solution) {
    const optical_problem& p = *problem;
    if (!valid(p)) return OPTICAL_INVALID_ARGUMENT;
    if (p.batch == 0) return OPTICAL_OK;
    const Kernel& chosen = kernel(p);
    return for_each_problem(p, chosen.scratch(p, Operation::forward, 0), p.max_iter,
                            [&](int64_t b, void* shared, void* own, const Team& team) {
                                chosen.forward(p, *solution, b, shared, own, team);
                            });
}

int optical_sinkhorn_backward(const optical_problem* problem, const optical_gradient* gradient) {
    const optical_problem& p = *problem;
    const bool unroll = p.gradient == OPTICAL_UNROLL;
    if (!valid(p) || (unroll && (p.anderson > 0 || p.anneal_start > 0)))
        return OPTICAL_INVALID_ARGUMENT;
    if (p.batch == 0) return OPTICAL_OK;
    // Gradients are the largest arrays, and new ones in each step of a training.
    const int64_t bytes = p.precision == OPTICAL_F64 ? 8 : 4;
    const int64_t rows = p.offset_a ? p.offset_a[p.batch] : p.batch * p.n;
    const int64_t columns = p.offset_b ? p.offset_b[p.batch] : p.batch * p.m;
    const int64_t width = p.kind == OPTICAL_GIVEN ? p.m : p.dim;
    ask_for_large_pages(gradient->grad_x, rows * width * bytes);
    ask_for_large_pages(gradient->grad_y, columns * p.dim * bytes);
    const Kernel& chosen = kernel(p);
    return for_each_problem(p, chosen.scratch(p, Operation::backward, 0),
                            unroll ? 3.0 * p.max_iter : 1,
                            [&](int64_t b, void* shared, void* own, const Team& team) {
                                chosen.backward(p, *gradient, b, shared, own, team);
                            });
}

int optical_apply_plan(const optical_problem* problem, const void* f, const void* g, const void* v,
                       int64_t width, int32_t transpose, void* out) {
    const optical_problem& p = *problem;
    if (!valid(p) || width < 0) return OPTICAL_INVALID_ARGUMENT;
    if (p.batch == 0 || width == 0) return OPTICAL_OK;
    const Kernel& chosen = kernel(p);
    const Apply call = {f, g, v, width, transpose, out};
    return for_each_problem(p, chosen.scratch(p, Operation::apply, transpose ? -width : width), 1,
                            [&](int64_t b, void* shared, void* own, const Team& team) {
                                chosen.apply(p, call, b, shared, own, team);
                            });
}

const char* optical_cpu_isa(void) { return kernels().isa; }

int optical_abi_version(void) { return OPTICAL_ABI_VERSION; }

const char* optical_source_hash(void) { return OPTICAL_SOURCE_HASH; }
