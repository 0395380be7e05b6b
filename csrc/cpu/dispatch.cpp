// The C interface: checks sizes, chooses the instruction set once, shares problems out to threads.
#include "../sinkhorn.h"

#include <stdlib.h>

#include <atomic>
#if !defined(_OPENMP)
#include <system_error>
#include <thread>
#include <vector>
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

template <typename T>
const Kernel<T>& kernel();
template <>
const Kernel<float>& kernel() {
    return kernels().f32;
}
template <>
const Kernel<double>& kernel() {
    return kernels().f64;
}

// Calls solve(problem, scratch) for every problem, each on one of at most num_threads threads.
template <typename Solve>
int for_each_problem(int64_t batch, int64_t scratch_bytes, int32_t num_threads, Solve solve) {
    std::atomic<int64_t> next{0};
    std::atomic<int> status{OPTICAL_OK};
    // Small enough shares that ragged problems balance, large enough that sharing is free.
    const int64_t threads = num_threads < batch ? num_threads : batch;
    const int64_t share = batch / (threads * 16) > 1 ? batch / (threads * 16) : 1;
    const auto work = [&]() {
        void* scratch = nullptr;
        if (scratch_bytes > 0 && posix_memalign(&scratch, 64, (size_t)scratch_bytes) != 0) {
            status = OPTICAL_OUT_OF_MEMORY;
            return;
        }
        for (int64_t start; (start = next.fetch_add(share)) < batch;)
            for (int64_t b = start; b < start + share && b < batch; ++b) solve(b, scratch);
        free(scratch);
    };
    if (threads <= 1) {
        work();
        return status;
    }
#if defined(_OPENMP)
#pragma omp parallel num_threads((int)threads)
    work();
#else
    std::vector<std::thread> others;
    try {
        for (int64_t t = 1; t < threads; ++t) others.emplace_back(work);
    } catch (const std::system_error&) {
        // No more threads to be had: those that run share the work.
    }
    work();
    for (std::thread& other : others) other.join();
#endif
    return status;
}

bool valid(int64_t batch, int64_t n, int64_t m, int32_t num_threads) {
    return batch >= 0 && n >= 0 && m >= 0 && num_threads >= 1;
}

template <typename T>
int forward(int64_t batch, const ForwardArguments<T>& arguments, int32_t num_threads) {
    if (!valid(batch, arguments.n, arguments.m, num_threads) || arguments.max_iter < 0)
        return OPTICAL_INVALID_ARGUMENT;
    if (batch == 0) return OPTICAL_OK;
    const Kernel<T>& chosen = kernel<T>();
    const int64_t bytes = chosen.scratch_bytes(arguments.n, arguments.m);
    return for_each_problem(batch, bytes, num_threads, [&](int64_t problem, void* scratch) {
        chosen.forward(arguments, problem, scratch);
    });
}

template <typename T>
int backward(int64_t batch, const BackwardArguments<T>& arguments, int32_t num_threads) {
    if (!valid(batch, arguments.n, arguments.m, num_threads)) return OPTICAL_INVALID_ARGUMENT;
    if (batch == 0) return OPTICAL_OK;
    const Kernel<T>& chosen = kernel<T>();
    return for_each_problem(batch, 0, num_threads, [&](int64_t problem, void* scratch) {
        chosen.backward(arguments, problem, scratch);
    });
}

}  // namespace
}  // namespace optical

#define OPTICAL_DEFINE(suffix, T)                                                               \
    int optical_sinkhorn_forward_##suffix(                                                      \
        int64_t batch, int64_t n, int64_t m, const T* cost, int64_t cost_stride_batch,          \
        int64_t cost_stride_row, const T* log_a, const T* log_b, const T* epsilon,              \
        int32_t max_iter, double tol, T* value, T* value_linear, T* f, T* g, T* marginal_error, \
        int32_t* n_iter, int32_t num_threads) {                                                 \
        return optical::forward<T>(                                                             \
            batch,                                                                              \
            {n, m, cost, cost_stride_batch, cost_stride_row, log_a, log_b, epsilon, max_iter,   \
             tol, value, value_linear, f, g, marginal_error, n_iter},                           \
            num_threads);                                                                       \
    }                                                                                           \
    int optical_sinkhorn_backward_##suffix(                                                     \
        int64_t batch, int64_t n, int64_t m, const T* cost, int64_t cost_stride_batch,          \
        int64_t cost_stride_row, const T* log_a, const T* log_b, const T* epsilon, const T* f,  \
        const T* g, const T* grad_value, const T* grad_value_linear, T* grad_cost,              \
        int32_t num_threads) {                                                                  \
        return optical::backward<T>(                                                            \
            batch,                                                                              \
            {n, m, cost, cost_stride_batch, cost_stride_row, log_a, log_b, epsilon, f, g,       \
             grad_value, grad_value_linear, grad_cost},                                         \
            num_threads);                                                                       \
    }

OPTICAL_DEFINE(f32, float)
OPTICAL_DEFINE(f64, double)

const char* optical_cpu_isa(void) { return optical::kernels().isa; }

int optical_abi_version(void) { return OPTICAL_ABI_VERSION; }

const char* optical_source_hash(void) { return OPTICAL_SOURCE_HASH; }
