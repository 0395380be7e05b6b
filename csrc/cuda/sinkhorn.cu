// The C interface on devices: pointers are the device's, and a call queues its kernels on a stream.
// Compiled by nvcc for GPUs, and as C++ with OPTICAL_ON_HOST for the tests on the CPU.
#include "kernels.cuh"

#include <cfloat>

#if !defined(OPTICAL_ON_HOST)
#include <cuda_runtime.h>
#endif

#ifndef OPTICAL_SOURCE_HASH
#define OPTICAL_SOURCE_HASH "unknown"
#endif

namespace optical {
namespace cuda {
namespace {

// Beside those of sinkhorn.h.
enum { out_of_reach = 3, launch_failed = 4, deadlock = 5 };

#if defined(OPTICAL_ON_HOST)

typedef void* Stream;

// As a device with the shared memory of an H100.
int shared_memory_of_device() { return 227 << 10; }
int blocks_of_cluster() { return 8; }

template <typename... Arguments>
int launch(void (*kernel)(Arguments...), int64_t grid, int blocks, int threads, int bytes, Stream,
           Arguments... arguments) {
    const std::function<void()> body = [&] { kernel(arguments...); };
    for (int64_t first = 0; first < grid; first += blocks)
        if (!host::run_cluster((int)first, blocks, threads, (size_t)bytes, body)) return deadlock;
    return OPTICAL_OK;
}

#else

typedef cudaStream_t Stream;

int attribute(cudaDeviceAttr name) {
    int device = 0, value = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&value, name, device);
    return value;
}

int shared_memory_of_device() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
int blocks_of_cluster() { return attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? 8 : 1; }

template <typename... Arguments>
int launch(void (*kernel)(Arguments...), int64_t grid, int blocks, int threads, int bytes,
           Stream stream, Arguments... arguments) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = (unsigned)blocks;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)grid), config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = (size_t)bytes, config.stream = stream;
    config.attrs = &cluster, config.numAttrs = blocks > 1 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, arguments...) == cudaSuccess ? OPTICAL_OK
                                                                            : launch_failed;
}

#endif

bool valid(const optical_problem& p) {
    const bool sizes = p.batch >= 0 && p.n >= 0 && p.m >= 0 && p.dim >= 0 && p.max_iter >= 0;
    const bool choices = p.kind >= OPTICAL_GIVEN && p.kind <= OPTICAL_DOT &&
                         p.precision == OPTICAL_F32 && p.x_type != OPTICAL_F64 &&
                         p.y_type != OPTICAL_F64 && p.gradient >= OPTICAL_ENVELOPE &&
                         p.gradient <= OPTICAL_UNROLL;
    const bool numbers = p.rho_a > 0 && p.rho_b > 0 && p.omega > 0 && p.omega < 2 &&
                         p.anderson == 0 && p.batch < ((int64_t)1 << 27);
    return sizes && choices && numbers && !p.offset_a == !p.offset_b && !p.init_f == !p.init_g;
}

enum class Operation { forward, backward };

// Whether iterations use half precision: not those that need potentials, and few do not pay for it.
bool in_halves(const optical_problem& p) {
    const bool penalty = p.rho_a <= DBL_MAX || p.rho_b <= DBL_MAX;
    return p.fast && p.max_iter >= 16 && !penalty && p.omega == 1 && !(p.anneal_start > 0);
}

template <typename G>
int shared_bytes(const optical_problem& p, Operation operation, int down, int across) {
    // Of packed problems any grid of so many warps may turn up; in one row it needs the most.
    if (p.offset_a && G::warps_at_once == 1) across *= down, down = 1;
    return operation == Operation::forward
               ? Cost<G>::shared_bytes(down, across, p.kind)
               : Gradient<G>::shared_bytes(down, across, p.kind, p.gradient);
}

// Which grids of warps fit in a block of this device.
Limits limits(const optical_problem& p, Operation operation, int bytes, int blocks) {
    Limits most = {max_warps, blocks, operation == Operation::forward};
    // The longest grid has the most lines.
    while (most.warps > 0 && shared_bytes<Cluster>(p, operation, 1, most.warps) > bytes)
        --most.warps;
    return most;
}
Limits limits(const optical_problem& p, Operation operation) {
    return limits(p, operation, shared_memory_of_device(), blocks_of_cluster());
}

// Queues what `queue(regime, most)` queues for every regime that a problem of the batch may belong
// to. With offsets, n and m are bounds of the sizes.
template <typename Queue>
int for_regimes(const optical_problem& p, Operation operation, Queue queue) {
    if (!valid(p)) return OPTICAL_INVALID_ARGUMENT;
    if (p.batch == 0) return OPTICAL_OK;
    const Limits most = limits(p, operation);
    const Regime largest = regime_of(p.n, p.m, most);
    if (largest.number == NO_REGIME) return out_of_reach;
    if (!p.offset_a) return queue(largest, most);
    int status = OPTICAL_OK;
    const auto also = [&](bool possible, const Regime& regime) {
        if (possible && status == OPTICAL_OK) status = queue(regime, most);
    };
    const int64_t longest = p.n > p.m ? p.n : p.m;
    also(most.several, {FOUR, 1, 1, 1, 4});
    also(longest > 16 || !most.several, {PAIR, 1, 1, 1, most.several ? 2 : 1});
    also(longest > 32, {WARP, 1, 1, 1, 1});
    also(longest > 64 && most.warps >= 4, {SQUARE, 2, 2, 1, 1});
    also(longest > 64, {BLOCK, 1, most.warps, 1, 1});
    for (int blocks = 2; blocks <= largest.blocks; blocks *= 2)
        also(true, {CLUSTER, 1, most.warps, blocks, 1});
    return status;
}

}  // namespace
}  // namespace cuda
}  // namespace optical

using namespace optical::cuda;

extern "C" {

// Whether problems of these sizes can be solved, and differentiated, on the current device.
OPTICAL_API int optical_cuda_reach(const optical_problem* problem) {
    const optical_problem& p = *problem;
    return regime_of(p.n, p.m, limits(p, Operation::forward)).number != NO_REGIME &&
           regime_of(p.n, p.m, limits(p, Operation::backward)).number != NO_REGIME;
}

// As optical_sinkhorn_forward, on a stream.
OPTICAL_API int optical_cuda_forward(const optical_problem* problem,
                                     const optical_solution* solution, void* stream) {
    const optical_problem& p = *problem;
    return for_regimes(p, Operation::forward, [&](const Regime& r, const Limits& most) {
        const auto queue = [&](auto kernel, int bytes) {
            const int64_t grid = (p.batch + r.problems - 1) / r.problems * r.blocks;
            return launch(kernel, grid, r.blocks, 32 * r.down * r.across, bytes,
                          (Stream)stream, p, *solution, most, r.number);
        };
        const Operation what = Operation::forward;
        const bool fast = in_halves(p) && shared_bytes<FastCluster>(p, what, r.down, r.across) <=
                                              shared_memory_of_device();
        if (r.number == FOUR)
            return queue(optical_forward_four, shared_bytes<FourInWarp>(p, what, 1, 1));
        if (r.number == PAIR)
            return queue(optical_forward_pair, shared_bytes<PairInWarp>(p, what, 1, 1));
        if (r.number == WARP)
            return fast ? queue(optical_forward_fast_warp, shared_bytes<FastWarp>(p, what, 1, 1))
                        : queue(optical_forward_warp, shared_bytes<LargeWarp>(p, what, 1, 1));
        if (r.number == SQUARE)
            return fast ? queue(optical_forward_fast_square,
                                shared_bytes<FastSquare>(p, what, 2, 2))
                        : queue(optical_forward_square, shared_bytes<SquareBlock>(p, what, 2, 2));
        if (r.number == CLUSTER)
            return fast ? queue(optical_forward_fast_cluster,
                                shared_bytes<FastCluster>(p, what, r.down, r.across))
                        : queue(optical_forward_cluster,
                                shared_bytes<Cluster>(p, what, r.down, r.across));
        return fast ? queue(optical_forward_fast_block,
                            shared_bytes<FastBlock>(p, what, r.down, r.across))
                    : queue(optical_forward_block,
                            shared_bytes<OneBlock>(p, what, r.down, r.across));
    });
}

// As optical_sinkhorn_backward, on a stream. grad_x and grad_y have the types of x and y. For
// UNROLL, `history` has room for the potentials of all lines after 0 to max_iter iterations.
OPTICAL_API int optical_cuda_backward(const optical_problem* problem,
                                      const optical_gradient* gradient, void* history,
                                      void* stream) {
    const optical_problem& p = *problem;
    if (p.gradient == OPTICAL_UNROLL && p.anneal_start > 0) return OPTICAL_INVALID_ARGUMENT;
    return for_regimes(p, Operation::backward, [&](const Regime& r, const Limits& most) {
        const auto queue = [&](auto kernel, int bytes) {
            const int64_t grid = (p.batch + r.problems - 1) / r.problems * r.blocks;
            return launch(kernel, grid, r.blocks, 32 * r.down * r.across, bytes,
                          (Stream)stream, p, *gradient, (float*)history, most, r.number);
        };
        const Operation what = Operation::backward;
        const bool unroll = p.gradient == OPTICAL_UNROLL;
        if (r.number == PAIR)
            return queue(unroll ? optical_unroll_small : optical_backward_small,
                         shared_bytes<SmallWarp>(p, what, 1, 1));
        if (r.number == WARP)
            return queue(unroll ? optical_unroll_warp : optical_backward_warp,
                         shared_bytes<LargeWarp>(p, what, 1, 1));
        if (r.number == CLUSTER)
            return queue(unroll ? optical_unroll_cluster : optical_backward_cluster,
                         shared_bytes<Cluster>(p, what, r.down, r.across));
        return queue(unroll ? optical_unroll_block : optical_backward_block,
                     shared_bytes<OneBlock>(p, what, r.down, r.across));
    });
}

// What is launched for a padded problem: down, across, blocks, bytes of shared memory, and problems
// in a warp.
OPTICAL_API int optical_cuda_plan(const optical_problem* problem, int backward, int shared,
                                  int clusters, int* plan) {
    const optical_problem& p = *problem;
    const Operation what = backward ? Operation::backward : Operation::forward;
    const Regime r = regime_of(p.n, p.m, limits(p, what, shared, clusters));
    plan[0] = r.down, plan[1] = r.across, plan[2] = r.blocks;
    plan[4] = r.problems;
    plan[3] = r.number == FOUR      ? shared_bytes<FourInWarp>(p, what, 1, 1)
              : r.number == CLUSTER ? shared_bytes<Cluster>(p, what, r.down, r.across)
              : r.number > WARP     ? shared_bytes<OneBlock>(p, what, r.down, r.across)
              : r.number == WARP    ? shared_bytes<LargeWarp>(p, what, 1, 1)
              : backward            ? shared_bytes<SmallWarp>(p, what, 1, 1)
                                    : shared_bytes<PairInWarp>(p, what, 1, 1);
    return r.number;
}

OPTICAL_API int optical_abi_version(void) { return OPTICAL_ABI_VERSION; }

OPTICAL_API const char* optical_source_hash(void) { return OPTICAL_SOURCE_HASH; }

#if defined(OPTICAL_ON_HOST)
// Chooses the order in which threads run.
OPTICAL_API void optical_host_seed(uint64_t seed) { host::machine().random = seed * 2 + 1; }
#endif

}  // extern "C"
