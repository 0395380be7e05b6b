// Implementation of the C interface: validates arguments, selects the instruction set once, and
// distributes the problems of a batch over threads.
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

#include "masses.h"
#include "operations.h"

#ifndef OPTICAL_SOURCE_HASH
#define OPTICAL_SOURCE_HASH "unknown"
#endif

namespace optical {
namespace {

const InstructionSet& instruction_set() {
#if defined(OPTICAL_X86)
    static const InstructionSet& selected = []() -> const InstructionSet& {
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("fma"))
            return isa_avx512;
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return isa_avx2;
        return isa_baseline;
    }();
    return selected;
#else
    return isa_baseline;
#endif
}

// Barrier of a team. A waiting thread spins for roughly the time the others usually need, then
// sleeps, because there may be fewer cores than threads.
struct Barrier {
    int size = 0;
    std::atomic<int> arrived{0}, round{0};
    std::mutex mutex;
    std::condition_variable next_round;

    static void wait(void* self) {
        Barrier& b = *(Barrier*)self;
        const int round = b.round.load(std::memory_order_relaxed);
        if (b.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == b.size) {
            b.arrived.store(0, std::memory_order_relaxed);
            {
                const std::lock_guard<std::mutex> lock(b.mutex);
                b.round.store(round + 1, std::memory_order_release);
            }
            b.next_round.notify_all();
            return;
        }
        for (int spin = 0; spin < 20000; ++spin)
            if (b.round.load(std::memory_order_acquire) != round) return;
        std::unique_lock<std::mutex> lock(b.mutex);
        b.next_round.wait(lock, [&] { return b.round.load(std::memory_order_acquire) != round; });
    }
};

#if defined(_OPENMP)
// The threads of OpenMP do not survive a fork: a parallel region in the child would deadlock.
std::atomic<bool> forked{false};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

// Runs work(rank, size) on `threads` threads, or on fewer if the system refuses to start them.
template <typename Work>
void on_threads(int threads, Work work) {
    if (threads <= 1) return work(0, 1);
#if defined(_OPENMP)
    if (!forked && fork_handler == 0) {
#pragma omp parallel num_threads(threads)
        work(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    std::atomic<int> size{0};  // 0 until all threads have started
    std::vector<std::thread> others;
    try {
        others.reserve((size_t)threads);
        for (int rank = 1; rank < threads; ++rank)
            others.emplace_back([&size, &work, rank] {
                while (size == 0) std::this_thread::yield();
                work(rank, size);
            });
    } catch (const std::system_error&) {
        // The threads that did start share the work.
    }
    size = 1 + (int)others.size();
    work(0, size);
    for (std::thread& other : others) other.join();
}

constexpr int64_t large_page = (int64_t)2 << 20;

// Asks the kernel for large pages, which take fewer page faults and TLB entries. The first and last
// page may be shared with neighbouring allocations, which is harmless.
void ask_for_large_pages(void* start, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    if (!start || bytes < 2 * large_page) return;
    const uintptr_t from = (uintptr_t)start / large_page * large_page;
    const uintptr_t past = (uintptr_t)start + (uintptr_t)bytes + large_page - 1;
    const uintptr_t end = past / large_page * large_page;
    madvise((void*)from, (size_t)(end - from), MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}

// Aligned memory, freed at the end of the scope; `start` is null if there was none.
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

// Work that justifies one more thread (entries times iterations), and the number of entries from
// which a problem is shared by a team.
constexpr double least_work = 1 << 15, least_entries = 1 << 20;
// Rows that a team shares come in chunks of 256; problems below that leave it nothing to share.
constexpr int64_t team_rows = 256;

// Threads worth starting for a batch, given how often each entry is visited.
int64_t useful_threads(const optical_problem& batch, double visits) {
    const double entries = (double)batch.n * (double)batch.m;
    const double work = (double)batch.batch * entries * (visits + (double)batch.dim / 8);
    int64_t threads = batch.num_threads;
    if (work < least_work * (double)threads) threads = (int64_t)(work / least_work);
    return threads < 1 ? 1 : threads;
}

// Solves one problem after another, each by all threads together.
template <typename Solve>
int solve_by_team(const optical_problem& batch, const Scratch& scratch, int64_t threads,
                  Solve solve) {
    // One allocation for all threads: a team must not lose a member to a lack of memory.
    const Memory memory(scratch.shared + threads * scratch.own);
    if (!memory.start) return OPTICAL_OUT_OF_MEMORY;
    Barrier barrier;
    std::once_flag counted;
    bool stop[2];  // thread 0 answers before the barrier, for this problem or the next one
    on_threads((int)threads, [&](int rank, int size) {
        std::call_once(counted, [&] { barrier.size = size; });
        char* const own = (char*)memory.start + scratch.shared + rank * scratch.own;
        const Team team = {rank, size, &barrier, Barrier::wait};
        for (int64_t b = 0; b < batch.batch; ++b) {
            solve(b, memory.start, own, team);
            if (rank == 0) stop[b % 2] = is_cancelled(batch.cancelled);
            if (size > 1) Barrier::wait(&barrier);
            if (stop[b % 2]) break;
        }
    });
    return OPTICAL_OK;
}

// Solves several problems at a time, each by one thread.
template <typename Solve>
int solve_by_problem(const optical_problem& batch, const Scratch& scratch, int64_t threads,
                     Solve solve) {
    std::atomic<int64_t> next{0};
    std::atomic<int> status{OPTICAL_OK};
    if (threads > batch.batch) threads = batch.batch;
    // Shares small enough to balance ragged problems, large enough that taking one costs nothing.
    const int64_t share = batch.batch / (threads * 16) > 1 ? batch.batch / (threads * 16) : 1;
    on_threads((int)threads, [&](int, int) {
        const Memory memory(scratch.shared + scratch.own);
        if (!memory.start) {
            status = OPTICAL_OUT_OF_MEMORY;
            return;
        }
        const Team team = {0, 1, nullptr, nullptr};
        for (int64_t start; (start = next.fetch_add(share)) < batch.batch;)
            for (int64_t b = start; b < start + share && b < batch.batch; ++b) {
                if (is_cancelled(batch.cancelled)) return;
                solve(b, memory.start, (char*)memory.start + scratch.shared, team);
            }
    });
    return status;
}

// Calls solve(index, shared, own, team) for every problem. Teams serve large problems, and batches
// of fewer problems than threads.
template <typename Solve>
int for_each_problem(const optical_problem& batch, const Scratch& scratch, double visits,
                     Solve solve) {
    const int64_t threads = useful_threads(batch, visits);
    const bool large = (double)batch.n * (double)batch.m >= least_entries;
    const bool team = threads > 1 && batch.n > team_rows && (large || batch.batch < threads);
    const int status = team ? solve_by_team(batch, scratch, threads, solve)
                            : solve_by_problem(batch, scratch, threads, solve);
    return status == OPTICAL_OK && is_cancelled(batch.cancelled) ? OPTICAL_INTERRUPTED : status;
}

bool one_of(int32_t value, int32_t last) { return value >= 0 && value <= last; }

bool valid(const optical_problem& p) {
    const bool sizes = p.batch >= 0 && p.n >= 0 && p.m >= 0 && p.dim >= 0 && p.max_iter >= 0;
    const bool choices = one_of(p.kind, OPTICAL_DOT) && one_of(p.precision, OPTICAL_F64) &&
                         one_of(p.x_type, OPTICAL_BF16) && one_of(p.y_type, OPTICAL_BF16) &&
                         one_of(p.gradient, OPTICAL_UNROLL);
    const bool numbers = p.rho_a > 0 && p.rho_b > 0 && p.omega > 0 && p.omega < 2 &&
                         p.anderson >= 0 && p.anderson <= 16;
    const bool pairs = !p.offset_a == !p.offset_b && !p.init_f == !p.init_g;
    return sizes && choices && numbers && pairs && p.total_a >= 0 && p.total_b >= 0 &&
           p.num_threads >= 1;
}

// The largest difference of `count` + 1 offsets, or -1 if they do not rise from 0 to `total`.
int64_t largest_size(const int64_t* offset, int64_t count, int64_t total) {
    int64_t largest = offset[0] == 0 && offset[count] == total ? 0 : -1;
    for (int64_t b = 0; b < count && largest >= 0; ++b) {
        const bool rises = offset[b + 1] >= offset[b] && offset[b + 1] <= total;
        const int64_t size = rises ? offset[b + 1] - offset[b] : -1;
        largest = size < 0 || size > largest ? size : largest;
    }
    return largest;
}

// Checks a batch, since its pointers are about to be followed, and finds its largest sizes.
int check(optical_problem& batch) {
    if (!valid(batch)) return OPTICAL_INVALID_ARGUMENT;
    if (!batch.offset_a) return OPTICAL_OK;
    batch.n = largest_size(batch.offset_a, batch.batch, batch.total_a);
    batch.m = largest_size(batch.offset_b, batch.batch, batch.total_b);
    return batch.n < 0 || batch.m < 0 ? OPTICAL_INVALID_OFFSETS : OPTICAL_OK;
}

template <typename T>
bool any_nan(const void* array, int64_t from, int64_t end) {
    bool nan = false;
    for (int64_t i = from; i < end; ++i) nan |= ((const T*)array)[i] != ((const T*)array)[i];
    return nan;
}

// The most iterations that a problem of the batch ran. Problems with potentials that are NaN, which
// report max_iter and whose iterations are not run again, do not count.
int32_t most_iterations(const optical_problem& batch, const optical_gradient& gradient) {
    int32_t most = 0;
    for (int64_t b = 0; b < batch.batch; ++b) {
        const int32_t ran = gradient.n_iter[b] < batch.max_iter ? gradient.n_iter[b]
                                                                : batch.max_iter;
        if (ran <= most) continue;
        const int64_t from = batch.offset_a ? batch.offset_a[b] : b * batch.n;
        const int64_t end = batch.offset_a ? batch.offset_a[b + 1] : from + batch.n;
        const bool nan = batch.precision == OPTICAL_F64 ? any_nan<double>(gradient.f, from, end)
                                                        : any_nan<float>(gradient.f, from, end);
        if (!nan) most = ran;
    }
    return most;
}

const Operations& operations(const optical_problem& batch) {
    return batch.precision == OPTICAL_F64 ? instruction_set().f64 : instruction_set().f32;
}

}  // namespace
}  // namespace optical

using namespace optical;

int optical_sinkhorn_forward(const optical_problem* problem, const optical_solution* solution) {
    optical_problem batch = *problem;
    if (const int error = check(batch)) return error;
    if (batch.batch == 0) return OPTICAL_OK;
    const Operations& run = operations(batch);
    return for_each_problem(batch, run.scratch(batch, Operation::forward, 0), batch.max_iter,
                            [&](int64_t b, void* shared, void* own, const Team& team) {
                                run.forward(batch, *solution, b, shared, own, team);
                            });
}

int optical_sinkhorn_backward(const optical_problem* problem, const optical_gradient* gradient) {
    optical_problem batch = *problem;
    const bool unroll = batch.gradient == OPTICAL_UNROLL;
    if (const int error = check(batch)) return error;
    if (unroll && (batch.anderson > 0 || batch.anneal_start > 0)) return OPTICAL_INVALID_ARGUMENT;
    if (batch.batch == 0) return OPTICAL_OK;
    // Memory for the potentials of the iterations that ran: max_iter may be any number.
    if (unroll) batch.max_iter = most_iterations(batch, *gradient);
    // The gradients are the largest arrays, and every training step allocates new ones.
    const int64_t bytes = batch.precision == OPTICAL_F64 ? 8 : 4;
    const int64_t width = batch.kind == OPTICAL_GIVEN ? batch.m : batch.dim;
    ask_for_large_pages(gradient->grad_x, batch.total_a * width * bytes);
    ask_for_large_pages(gradient->grad_y, batch.total_b * batch.dim * bytes);
    const Operations& run = operations(batch);
    return for_each_problem(batch, run.scratch(batch, Operation::backward, 0),
                            unroll ? 3.0 * batch.max_iter : 1,
                            [&](int64_t b, void* shared, void* own, const Team& team) {
                                run.backward(batch, *gradient, b, shared, own, team);
                            });
}

int optical_apply_plan(const optical_problem* problem, const void* f, const void* g, const void* v,
                       int64_t width, int32_t transpose, void* out) {
    optical_problem batch = *problem;
    if (const int error = check(batch)) return error;
    if (width < 0) return OPTICAL_INVALID_ARGUMENT;
    if (batch.batch == 0 || width == 0) return OPTICAL_OK;
    const Operations& run = operations(batch);
    const PlanProduct product = {f, g, v, width, transpose, out};
    const Scratch scratch = run.scratch(batch, Operation::apply, transpose ? -width : width);
    return for_each_problem(batch, scratch, 1,
                            [&](int64_t b, void* shared, void* own, const Team& team) {
                                run.apply(batch, product, b, shared, own, team);
                            });
}

int optical_plan(const optical_problem* problem, const void* f, const void* g, int32_t log,
                 void* out) {
    const optical_problem& batch = *problem;
    if (!valid(batch) || batch.offset_a) return OPTICAL_INVALID_ARGUMENT;
    if (batch.batch == 0 || batch.n == 0 || batch.m == 0) return OPTICAL_OK;
    const int64_t bytes = batch.precision == OPTICAL_F64 ? 8 : 4;
    ask_for_large_pages(out, batch.batch * batch.n * batch.m * bytes);
    const Operations& run = operations(batch);
    const PlanOutput output = {f, g, log, out};
    return for_each_problem(batch, run.scratch(batch, Operation::plan, 0), 4,
                            [&](int64_t b, void* shared, void* own, const Team& team) {
                                run.plan(batch, output, b, shared, own, team);
                            });
}

int optical_equal_masses(int64_t batch, int64_t size, int32_t precision, const void* mask,
                         int32_t mask_type, int64_t mask_stride_batch, int64_t mask_stride_entry,
                         const void* lengths, int32_t lengths_type, int64_t lengths_stride,
                         void* log_mass) {
    if (batch < 0 || size < 0 || !one_of(precision, OPTICAL_F64)) return OPTICAL_INVALID_ARGUMENT;
    const MassShape shape = {batch, size, mask_stride_batch, mask_stride_entry};
    const auto fill = [&](auto* to) {
        return equal_masses(shape, mask, mask_type, lengths, lengths_type, lengths_stride, to);
    };
    return precision == OPTICAL_F64 ? fill((double*)log_mass) : fill((float*)log_mass);
}

const char* optical_cpu_isa(void) { return instruction_set().name; }

int optical_abi_version(void) { return OPTICAL_ABI_VERSION; }

const char* optical_source_hash(void) { return OPTICAL_SOURCE_HASH; }

int optical_doubly_stochastic(int64_t batch, int64_t n, int32_t precision, int32_t iterations,
                              double temperature, int32_t num_threads, const void* logits,
                              const void* grad, void* out) {
    const bool sizes = batch >= 0 && n >= 1 && n <= 1024 && iterations >= 1;
    if (!sizes || !one_of(precision, OPTICAL_F64) || !(temperature > 0) || num_threads < 1)
        return OPTICAL_INVALID_ARGUMENT;
    if (batch == 0) return OPTICAL_OK;
    const Matrices matrices = {batch, n, iterations, temperature, logits, grad, out};
    const InstructionSet& isa = instruction_set();
    const auto run = (precision == OPTICAL_F64 ? isa.f64 : isa.f32).doubly_stochastic;
    const MatrixBlocks blocks = run(matrices, 0, nullptr);
    // One lane of a block does the work of a problem.
    optical_problem share = {};
    share.batch = batch, share.n = n, share.m = n, share.num_threads = num_threads;
    const int64_t threads = useful_threads(share, (grad ? 3.0 : 1.0) * iterations);
    share.batch = blocks.count;
    return solve_by_problem(share, {0, blocks.bytes}, threads,
                            [&](int64_t block, void*, void* scratch, const Team&) {
                                run(matrices, block, scratch);
                            });
}
