// Table of operations that every instruction-set build of operations.cpp exports to dispatch.cpp.
#pragma once

#include <stdint.h>

#include "../sinkhorn.h"

namespace optical {

// The threads that solve one problem together. All run the same code, each on its own chunks of
// rows and segments of columns, and synchronise at barriers; a one-thread team skips them.
struct Team {
    int rank, size;
    void* barrier;
    void (*wait)(void* barrier);
};

// Whether the caller wants the call to end early. Another thread sets the flag.
static inline __attribute__((always_inline)) bool is_cancelled(const int32_t* flag) {
    return flag && __atomic_load_n(flag, __ATOMIC_RELAXED) != 0;
}

enum class Operation { forward, backward, apply, plan };

// Arguments of optical_apply_plan beside the problem.
struct PlanProduct {
    const void *f, *g, *v;
    int64_t width;
    int32_t transpose;
    void* out;
};

// Arguments of optical_plan beside the problem.
struct PlanOutput {
    const void *f, *g;
    int32_t log;
    void* out;
};

// Arguments of optical_doubly_stochastic but its precision and number of threads.
struct Matrices {
    int64_t batch, n;
    int32_t iterations;
    double temperature;
    const void *logits, *grad;
    void* out;
};

// Bytes of scratch memory for a block of matrices, and the number of blocks of a batch.
struct MatrixBlocks {
    int64_t bytes, count;
};

// Bytes of scratch memory for one problem: shared by its team, and private to each thread.
struct Scratch {
    int64_t shared, own;
};

// Operations on problem `index` of a batch, in one precision. The caller provides the scratch
// memory and reuses it for the next problem.
struct Operations {
    // `width` is that of the vectors of `apply`, negative for the transposed product.
    Scratch (*scratch)(const optical_problem& batch, Operation operation, int64_t width);
    void (*forward)(const optical_problem& batch, const optical_solution& solution, int64_t index,
                    void* shared, void* own, const Team& team);
    void (*backward)(const optical_problem& batch, const optical_gradient& gradient, int64_t index,
                     void* shared, void* own, const Team& team);
    void (*apply)(const optical_problem& batch, const PlanProduct& product, int64_t index,
                  void* shared, void* own, const Team& team);
    void (*plan)(const optical_problem& batch, const PlanOutput& output, int64_t index,
                 void* shared, void* own, const Team& team);
    // Scales the matrices of a block; without scratch memory, returns what it needs.
    MatrixBlocks (*doubly_stochastic)(const Matrices& batch, int64_t block, void* scratch);
};

struct InstructionSet {
    const char* name;
    Operations f32, f64;
};

extern const InstructionSet isa_baseline, isa_avx2, isa_avx512;

}  // namespace optical
