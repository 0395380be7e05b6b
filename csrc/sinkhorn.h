// The C interface of the CPU Sinkhorn: pointers, sizes, an error code, and nothing of PyTorch or
// Python, so that one binary serves every version of both.
//
// For each problem of a batch: cost C (n x m), masses a (n) and b (m), epsilon > 0, and a strength
// rho > 0 per side with which its marginal is asked for (infinite: exactly).
//
//     P_ij  = exp((f_i + g_j - C_ij) / epsilon + log a_i + log b_j)
//     f_i  <- -lambda_a epsilon log sum_j exp(log b_j + (g_j - C_ij) / epsilon)    one iteration:
//     g_j  <- -lambda_b epsilon log sum_i exp(log a_i + (f_i - C_ij) / epsilon)    f, then g
//
// with lambda = rho / (rho + epsilon), from f = g = 0 or from given potentials.
//
//     value_linear   = sum P C
//     value          = value_linear + epsilon KL(P | a b) + rho_a KL(P 1 | a) + rho_b KL(P' 1 | b)
//     marginal_error = sum_i |(P 1)_i - a_i exp(-f_i / rho_a)| + the same for the columns
//
// A log-mass of -inf marks an absent line: its cost is never read as a number, its potential is 0
// and its gradient is exactly 0. A cost of +inf forbids a pair. A problem with NaN among its
// present inputs, a cost of -inf, or an epsilon that is not a positive number yields NaN, and no
// other problem of the batch notices.
//
// The order of every sum follows from the shape of its problem alone, so a result has the same
// bits alone, in any batch, and with any number of threads.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define OPTICAL_API __declspec(dllexport)
#else
#define OPTICAL_API __attribute__((visibility("default")))
#endif

// Changes whenever something below changes its meaning.
#define OPTICAL_ABI_VERSION 3

#ifdef __cplusplus
extern "C" {
#endif

enum { OPTICAL_OK = 0, OPTICAL_INVALID_ARGUMENT = 1, OPTICAL_OUT_OF_MEMORY = 2 };

enum { OPTICAL_F32 = 0, OPTICAL_F64 = 1, OPTICAL_F16 = 2, OPTICAL_BF16 = 3 };

// Where the cost comes from. cosine: 1 - x.y / (|x| |y|), and 1 for a zero vector. sqeuclidean:
// |x - y|^2. dot: -x.y.
enum { OPTICAL_GIVEN = 0, OPTICAL_COSINE = 1, OPTICAL_SQEUCLIDEAN = 2, OPTICAL_DOT = 3 };

enum { OPTICAL_ENVELOPE = 0, OPTICAL_IMPLICIT = 1, OPTICAL_UNROLL = 2 };

enum {
    OPTICAL_CONVERGED = 0,
    OPTICAL_MAX_ITER = 1,
    OPTICAL_EMPTY = 2,       // one side has no present line: all results are 0
    OPTICAL_INFEASIBLE = 3,  // no plan has these marginals, or the inputs are not numbers
};

// Arrays are in `precision` (F32 or F64) and contiguous, unless said otherwise. "Lines of side a"
// are n per problem, or, with offset_a, those from offset_a[b] to offset_a[b + 1] of one long list.
typedef struct {
    int64_t batch, n, m, dim;  // with offsets, n and m are the largest of the batch
    int32_t kind, precision;
    // kind GIVEN: x is the cost (batch, n, m) in `precision`, of any strides; y is not used.
    // Otherwise x and y are vectors, `dim` adjacent elements per line, of the types given.
    const void *x, *y;
    int32_t x_type, y_type;
    int64_t x_stride_batch, x_stride_row, x_stride_entry;  // in elements; batch: without offsets
    int64_t y_stride_batch, y_stride_column;
    const int64_t *offset_a, *offset_b;  // (batch + 1), or null
    const void *log_a, *log_b;           // by line
    const void* epsilon;                 // (batch)
    const void *init_f, *init_g;         // by line, or null for zero
    int32_t max_iter;
    // tol <= 0 runs exactly max_iter iterations. tol > 0 stops a problem at the first iterate,
    // after the first iteration, whose rows miss what is asked of them by at most tol in L1.
    double tol;
    double rho_a, rho_b;  // +inf: balanced
    double omega;         // over-relaxation in (0, 2), after the first iteration; 1: none
    int32_t anderson;     // memory of Anderson acceleration; 0: none
    double anneal_start, anneal_ratio;  // iteration k runs at max(epsilon, start ratio^k)
    int32_t gradient;
    int32_t low_memory;  // vectors only: keep no n x m array, compute the cost again when needed
    int32_t num_threads;
    int32_t fast;  // iterations may use half precision, all but the last
} optical_problem;

typedef struct {
    void *value, *value_linear, *marginal_error;  // (batch)
    void *f, *g;                                  // by line
    int32_t *n_iter, *status;                     // (batch)
    // Only with gradient IMPLICIT: the solution of the adjoint system for value_linear,
    //     [diag(r (1 + epsilon / rho_a)), P; P', diag(c (1 + epsilon / rho_b))] [w; z]
    //         = [sum_j P C; sum_i P C]       r, c: the plan's row and column sums
    // by line, and the relative residual it was solved to (batch).
    void *w, *z, *residual;
} optical_solution;

OPTICAL_API int optical_sinkhorn_forward(const optical_problem* problem,
                                         const optical_solution* solution);

// Gradients of sum_b grad_value value + grad_value_linear value_linear (+ grad_f f + grad_g g).
// ENVELOPE: the plan is held fixed. IMPLICIT: of the fixed point. UNROLL: of the n_iter iterations
// that were run, which are run again. Null outputs are not computed.
typedef struct {
    const void *grad_value, *grad_value_linear;  // (batch)
    const void *grad_f, *grad_g;                 // by line, or null; UNROLL only
    const void *f, *g, *w, *z;                   // of the solution; w and z with IMPLICIT
    const int32_t* n_iter;                       // of the solution; UNROLL only
    void *grad_x, *grad_y;                       // contiguous, in `precision`, shaped like x and y
    void *grad_log_a, *grad_log_b;               // by line
} optical_gradient;

OPTICAL_API int optical_sinkhorn_backward(const optical_problem* problem,
                                          const optical_gradient* gradient);

// out = P v, v: `width` adjacent elements per line of side b, out per line of side a; transposed:
// out = P' v, with the sides exchanged. The plan is that of the potentials f and g.
OPTICAL_API int optical_apply_plan(const optical_problem* problem, const void* f, const void* g,
                                   const void* v, int64_t width, int32_t transpose, void* out);

// The instruction set chosen for this machine: "avx512", "avx2" or "baseline".
OPTICAL_API const char* optical_cpu_isa(void);

OPTICAL_API int optical_abi_version(void);

// The hash of the sources this library was built from, as given by the build.
OPTICAL_API const char* optical_source_hash(void);

#ifdef __cplusplus
}
#endif
