// The C interface of the CPU Sinkhorn: pointers, sizes, an error code, and nothing of PyTorch or
// Python, so that one binary serves every version of both.
//
// For each problem b of a batch: cost C (n x m), log-masses log a (n) and log b (m), epsilon > 0.
//
//     P_ij  = exp((f_i + g_j - C_ij) / epsilon + log a_i + log b_j)
//     f_i  <- -epsilon log sum_j exp(log b_j + (g_j - C_ij) / epsilon)        one iteration:
//     g_j  <- -epsilon log sum_i exp(log a_i + (f_i - C_ij) / epsilon)        f, then g; from zero
//
//     value_linear   = sum P C
//     value          = value_linear + epsilon KL(P | a b)                     generalised KL
//     marginal_error = sum_i |(P 1)_i - a_i| + sum_j |(P' 1)_j - b_j|
//
// A log-mass of -inf marks an absent row or column: its cost is never read as a number, its
// potential is 0 and its gradient is exactly 0. A cost of +inf forbids a pair. A problem with a
// side that is absent altogether yields zeros after 0 iterations. A problem with NaN among its
// present inputs, a cost of -inf, or an epsilon that is not a positive number yields NaN, and no
// other problem of the batch notices.
//
// Every array is contiguous except `cost`, whose rows and problems may lie apart by any stride.
// A problem is solved by one thread in a fixed order, so its result has the same bits alone, in
// any batch, and with any number of threads.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define OPTICAL_API __declspec(dllexport)
#else
#define OPTICAL_API __attribute__((visibility("default")))
#endif

// Changes whenever a signature below changes its meaning.
#define OPTICAL_ABI_VERSION 1

enum { OPTICAL_OK = 0, OPTICAL_INVALID_ARGUMENT = 1, OPTICAL_OUT_OF_MEMORY = 2 };

#ifdef __cplusplus
extern "C" {
#endif

// cost: strides in elements, columns adjacent. log_a, f: (batch, n). log_b, g: (batch, m).
// epsilon, value, value_linear, marginal_error, n_iter: (batch).
//
// tol <= 0 runs exactly max_iter iterations. tol > 0 stops a problem at the first iterate, after
// the first iteration, whose rows miss their masses by at most tol: sum_i |(P 1)_i - a_i| <= tol.
OPTICAL_API int optical_sinkhorn_forward_f32(
    int64_t batch, int64_t n, int64_t m, const float* cost, int64_t cost_stride_batch,
    int64_t cost_stride_row, const float* log_a, const float* log_b, const float* epsilon,
    int32_t max_iter, double tol, float* value, float* value_linear, float* f, float* g,
    float* marginal_error, int32_t* n_iter, int32_t num_threads);

OPTICAL_API int optical_sinkhorn_forward_f64(
    int64_t batch, int64_t n, int64_t m, const double* cost, int64_t cost_stride_batch,
    int64_t cost_stride_row, const double* log_a, const double* log_b, const double* epsilon,
    int32_t max_iter, double tol, double* value, double* value_linear, double* f, double* g,
    double* marginal_error, int32_t* n_iter, int32_t num_threads);

// grad_cost = (grad_value + grad_value_linear) P, contiguous (batch, n, m), with P from f and g:
// the gradient that holds the plan fixed. grad_value and grad_value_linear: (batch).
OPTICAL_API int optical_sinkhorn_backward_f32(
    int64_t batch, int64_t n, int64_t m, const float* cost, int64_t cost_stride_batch,
    int64_t cost_stride_row, const float* log_a, const float* log_b, const float* epsilon,
    const float* f, const float* g, const float* grad_value, const float* grad_value_linear,
    float* grad_cost, int32_t num_threads);

OPTICAL_API int optical_sinkhorn_backward_f64(
    int64_t batch, int64_t n, int64_t m, const double* cost, int64_t cost_stride_batch,
    int64_t cost_stride_row, const double* log_a, const double* log_b, const double* epsilon,
    const double* f, const double* g, const double* grad_value, const double* grad_value_linear,
    double* grad_cost, int32_t num_threads);

// The instruction set chosen for this machine: "avx512", "avx2" or "baseline".
OPTICAL_API const char* optical_cpu_isa(void);

OPTICAL_API int optical_abi_version(void);

// The hash of the sources this library was built from, as given by the build.
OPTICAL_API const char* optical_source_hash(void);

#ifdef __cplusplus
}
#endif
