// What each instruction-set build of kernel.cpp offers to the dispatcher.
#pragma once

#include <stdint.h>

namespace optical {

template <typename T>
struct ForwardArguments {
    int64_t n, m;
    const T* cost;
    int64_t cost_stride_batch, cost_stride_row;
    const T *log_a, *log_b, *epsilon;
    int32_t max_iter;
    double tol;
    T *value, *value_linear, *f, *g, *marginal_error;
    int32_t* n_iter;
};

template <typename T>
struct BackwardArguments {
    int64_t n, m;
    const T* cost;
    int64_t cost_stride_batch, cost_stride_row;
    const T *log_a, *log_b, *epsilon, *f, *g, *grad_value, *grad_value_linear;
    T* grad_cost;
};

// One problem of the batch, in scratch memory that one thread keeps for all its problems.
template <typename T>
struct Kernel {
    int64_t (*scratch_bytes)(int64_t n, int64_t m);
    void (*forward)(const ForwardArguments<T>& arguments, int64_t problem, void* scratch);
    void (*backward)(const BackwardArguments<T>& arguments, int64_t problem, void* scratch);
};

struct Kernels {
    const char* isa;
    Kernel<float> f32;
    Kernel<double> f64;
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

}  // namespace optical
