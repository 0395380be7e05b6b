// C interface of the compiled Sinkhorn backends (CPU and CUDA): plain pointers, sizes and error
// codes. It includes no header of PyTorch or Python, so one binary serves every version of both.
//
// Each problem of a batch has a cost C (n x m), masses a (n) and b (m), a temperature epsilon > 0,
// and per side a strength rho > 0 of the penalty on its marginal (infinite: the marginal is fixed).
// One Sinkhorn iteration (Cuturi, NeurIPS 2013; penalties: Chizat et al., arXiv 1607.05816) updates
// f, then g:
//
//     P_ij  = exp((f_i + g_j - C_ij) / epsilon + log a_i + log b_j)
//     f_i  <- -lambda_a epsilon log sum_j exp(log b_j + (g_j - C_ij) / epsilon)
//     g_j  <- -lambda_b epsilon log sum_i exp(log a_i + (f_i - C_ij) / epsilon)
//
// with lambda = rho / (rho + epsilon), starting from f = g = 0 or from given potentials.
//
//     value_linear   = sum P C
//     value          = value_linear + epsilon KL(P | a b) + rho_a KL(P 1 | a) + rho_b KL(P' 1 | b)
//     marginal_error = sum_i |(P 1)_i - a_i exp(-f_i / rho_a)| + the same for the columns
//
// Rows and columns with log-mass -inf are padding: their costs are never used, their potentials are
// 0 and their gradients are exactly 0. A given cost of +inf forbids a pair. A problem is malformed if
// a valid input is NaN, a valid cost is -inf, or epsilon is not a positive finite number. Its outputs
// are NaN, and so are the gradients of its valid entries, unless all its upstream gradients are 0:
// then they are 0. The other problems of the batch are unaffected.
//
// The order of every sum depends only on the shape of its problem. Results are therefore bitwise
// identical alone, in any batch, and for any number of threads.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define OPTICAL_API __declspec(dllexport)
#else
#define OPTICAL_API __attribute__((visibility("default")))
#endif

// Incremented whenever the meaning or the layout of this interface changes.
#define OPTICAL_ABI_VERSION 4

#ifdef __cplusplus
extern "C" {
#endif

enum {
    OPTICAL_OK = 0,
    OPTICAL_INVALID_ARGUMENT = 1,
    OPTICAL_OUT_OF_MEMORY = 2,
    OPTICAL_INVALID_OFFSETS = 3,  // offset_a or offset_b do not divide an array into problems
    OPTICAL_INTERRUPTED = 4,      // `cancelled` was set; the outputs are undefined
    OPTICAL_INVALID_MASK = 5,     // an entry of a mask is neither 0 nor 1
};

enum { OPTICAL_F32 = 0, OPTICAL_F64 = 1, OPTICAL_F16 = 2, OPTICAL_BF16 = 3 };

// Further types of masks and lengths. A boolean is a U8.
enum { OPTICAL_U8 = 4, OPTICAL_I8 = 5, OPTICAL_I16 = 6, OPTICAL_I32 = 7, OPTICAL_I64 = 8 };

// Kind of cost. given: the matrix C. cosine: 1 - x.y / (|x| |y|), and 1 for a zero vector.
// sqeuclidean: |x - y|^2. dot: -x.y.
enum { OPTICAL_GIVEN = 0, OPTICAL_COSINE = 1, OPTICAL_SQEUCLIDEAN = 2, OPTICAL_DOT = 3 };

enum { OPTICAL_ENVELOPE = 0, OPTICAL_IMPLICIT = 1, OPTICAL_UNROLL = 2 };

enum {
    OPTICAL_CONVERGED = 0,
    OPTICAL_MAX_ITER = 1,
    OPTICAL_EMPTY = 2,       // one side has no valid entry: all results are 0
    OPTICAL_INFEASIBLE = 3,  // no plan has these marginals, or an input is not a finite number
};

// A batch of problems. Arrays are contiguous and in `precision` (F32 or F64) unless stated
// otherwise. An array "by row" has n entries per problem, one "by column" m; packed batches (with
// offsets) concatenate their problems, and rows offset_a[b] to offset_a[b + 1] belong to problem b.
typedef struct {
    // With offsets, n and m are the largest sizes of the batch; the CPU library finds them itself.
    int64_t batch, n, m, dim;
    int32_t kind, precision;
    // kind GIVEN: x is the cost (batch, n, m) in `precision` with arbitrary strides; y is unused.
    // Otherwise: x and y hold one vector of `dim` contiguous elements per row and per column.
    const void *x, *y;
    int32_t x_type, y_type;
    // Strides in elements. x_stride_batch and y_stride_batch are unused with offsets.
    int64_t x_stride_batch, x_stride_row, x_stride_entry;
    int64_t y_stride_batch, y_stride_column;
    // (batch + 1), or null. The CPU library checks that they rise from 0 to total_a and total_b.
    const int64_t *offset_a, *offset_b;
    const void *log_a, *log_b;           // by row, by column
    const void* epsilon;                 // (batch)
    const void *init_f, *init_g;         // by row, by column; null starts from zero
    int32_t max_iter;
    // tol <= 0 runs exactly max_iter iterations. tol > 0 stops a problem at the first iterate after
    // the first iteration whose row marginals have an L1 error of at most tol.
    double tol;
    double rho_a, rho_b;  // +inf: balanced
    double omega;         // over-relaxation in (0, 2), from the second iteration on; 1: none
    int32_t anderson;     // history length of Anderson acceleration; 0: none
    double anneal_start, anneal_ratio;  // iteration k runs at max(epsilon, start ratio^k)
    int32_t gradient;
    int32_t low_memory;  // vectors only: store no n x m array, recompute the cost instead
    int32_t num_threads;
    int32_t fast;  // all iterations but the last may use half precision
    // The rest is for the CPU library alone. Lengths of the arrays by row and by column: with
    // offsets the sums of all sizes, otherwise batch n and batch m.
    int64_t total_a, total_b;
    // Null, or a flag that another thread may set to a nonzero value to end the call early.
    const int32_t* cancelled;
} optical_problem;

// Output arrays of the forward pass. On a CPU, marginal_error, n_iter, status and residual may be
// null.
typedef struct {
    void *value, *value_linear, *marginal_error;  // (batch)
    void *f, *g;                                  // by row, by column
    int32_t *n_iter, *status;                     // (batch)
    // Written only with gradient IMPLICIT: the solution of the adjoint system of value_linear,
    //     [diag(r (1 + epsilon / rho_a)), P; P', diag(c (1 + epsilon / rho_b))] [w; z]
    //         = [sum_j P C; sum_i P C]       r, c: row and column sums of the plan
    // by row and by column, and its relative residual (batch).
    void *w, *z, *residual;
} optical_solution;

OPTICAL_API int optical_sinkhorn_forward(const optical_problem* problem,
                                         const optical_solution* solution);

// Gradients of sum_b grad_value value + grad_value_linear value_linear (+ grad_f f + grad_g g).
// ENVELOPE holds the plan fixed, IMPLICIT differentiates the fixed point, and UNROLL reruns the
// n_iter iterations of the forward pass and differentiates them. Null outputs are not computed.
typedef struct {
    const void *grad_value, *grad_value_linear;  // (batch); null, on a CPU: zeros
    const void *grad_f, *grad_g;                 // by row, by column, or null; UNROLL only
    const void *f, *g, *w, *z;                   // of the solution; w and z with IMPLICIT
    const int32_t* n_iter;                       // of the solution; UNROLL only
    void *grad_x, *grad_y;                       // contiguous, in `precision`, shaped like x and y
    void *grad_log_a, *grad_log_b;               // by row, by column
} optical_gradient;

OPTICAL_API int optical_sinkhorn_backward(const optical_problem* problem,
                                          const optical_gradient* gradient);

// out = P v for v (by column, `width` contiguous elements each) and out by row; with `transpose`,
// out = P' v for v by row and out by column. P is the plan of the potentials f and g.
OPTICAL_API int optical_apply_plan(const optical_problem* problem, const void* f, const void* g,
                                   const void* v, int64_t width, int32_t transpose, void* out);

// out = the plan P (batch, n, m) of the potentials f and g, or with `log` its exponent: exactly 0
// (-inf) for padding and forbidden pairs, NaN for the valid entries of a malformed problem. The
// exponent is computed in double precision and the result rounded once. Padded problems only.
OPTICAL_API int optical_plan(const optical_problem* problem, const void* f, const void* g,
                             int32_t log, void* out);

// Log-masses of one side, (batch, size) in `precision`: -log(count) for the valid entries of a
// problem, where `count` is their number, and -inf for padding. Valid are the entries of a mask
// that are 1, with strides in elements; or the first lengths[b], of type I32 or I64; or, if both
// are null, all.
OPTICAL_API int optical_equal_masses(int64_t batch, int64_t size, int32_t precision,
                                     const void* mask, int32_t mask_type,
                                     int64_t mask_stride_batch, int64_t mask_stride_entry,
                                     const void* lengths, int32_t lengths_type,
                                     int64_t lengths_stride, void* log_mass);

// Instruction set selected for this machine: "avx512", "avx2" or "baseline".
OPTICAL_API const char* optical_cpu_isa(void);

OPTICAL_API int optical_abi_version(void);

// Hash of the sources this library was built from, set by the build.
OPTICAL_API const char* optical_source_hash(void);

// Scales exp(logits / temperature), `batch` contiguous matrices of n x n entries in `precision`,
// until their columns sum to 1: each of the `iterations` divides by the row sums, then by the
// column sums. out: the matrices; or, if `grad` is not null, the gradient of the logits given
// `grad`, that of the matrices. A logit of -inf forbids an entry; rows and columns without allowed
// entries stay 0. A matrix with NaN or +inf becomes NaN. n is at most 1024.
OPTICAL_API int optical_doubly_stochastic(int64_t batch, int64_t n, int32_t precision,
                                          int32_t iterations, double temperature,
                                          int32_t num_threads, const void* logits, const void* grad,
                                          void* out);

#ifdef __cplusplus
}
#endif
