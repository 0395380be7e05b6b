// What each instruction-set build of kernel.cpp offers to the dispatcher.
#pragma once

#include <stdint.h>

#include "../sinkhorn.h"

namespace optical {

// The threads that work on one problem together. They run the same code, each on its share of the
// rows and columns, and meet at barriers; alone, a thread meets nobody.
struct Team {
    int rank, size;
    void* meeting;
    void (*meet)(void* meeting);
};

enum class Operation { forward, backward, apply };

struct Apply {
    const void *f, *g, *v;
    int64_t width;
    int32_t transpose;
    void* out;
};

// Memory of one problem, and of one thread working on it.
struct Scratch {
    int64_t shared, own;
};

// One problem of the batch. Memory is given by the caller and reused from problem to problem.
struct Kernel {
    // width: of the vectors of `apply`, negative for the transposed product.
    Scratch (*scratch)(const optical_problem& problem, Operation operation, int64_t width);
    void (*forward)(const optical_problem& problem, const optical_solution& solution,
                    int64_t index, void* shared, void* own, const Team& team);
    void (*backward)(const optical_problem& problem, const optical_gradient& gradient,
                     int64_t index, void* shared, void* own, const Team& team);
    void (*apply)(const optical_problem& problem, const Apply& apply, int64_t index, void* shared,
                  void* own, const Team& team);
};

struct Kernels {
    const char* isa;
    Kernel f32, f64;
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

}  // namespace optical
