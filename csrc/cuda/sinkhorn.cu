// The C interface of the CUDA kernels: device pointers in, kernels queued on a stream.
//
// nvcc compiles this file for GPUs. With OPTICAL_EMULATED the C++ compiler builds it for the CPU,
// as the tests do.
#include "kernels.cuh"

#include <cfloat>

#if !defined(OPTICAL_EMULATED)
#include <cuda_runtime.h>

#include <atomic>
#include <cstdio>
#include <mutex>
#include <set>
#include <utility>
#endif

#ifndef OPTICAL_SOURCE_HASH
#define OPTICAL_SOURCE_HASH "unknown"
#endif

namespace optical {
namespace cuda {
namespace {

// Error codes in addition to those of sinkhorn.h.
enum { out_of_reach = 3, launch_failed = 4, deadlock = 5, overrun = 6 };

#if defined(OPTICAL_EMULATED)

typedef void* Stream;

int shared_memory_of_device() { return emulator::machine().shared_memory; }
int blocks_of_cluster() { return emulator::machine().max_cluster; }

struct Call {};
bool has_failed() { return false; }
const char* failure_text() { return ""; }

template <typename... Arguments>
int launch(void (*kernel)(Arguments...), int64_t grid, int blocks, int threads, int bytes, Stream,
           Arguments... arguments) {
    const std::function<void()> body = [&] { kernel(arguments...); };
    for (int64_t first = 0; first < grid; first += blocks) {
        const emulator::Run run =
            emulator::run_cluster((int)first, blocks, threads, (size_t)bytes, body);
        if (run != emulator::Run::finished)
            return run == emulator::Run::deadlock ? deadlock : overrun;
    }
    return OPTICAL_OK;
}

#else

typedef cudaStream_t Stream;

// The last error of the CUDA runtime in this thread, kept until the next call of the interface.
thread_local cudaError_t failure = cudaSuccess;

bool has_failed() { return failure != cudaSuccess; }

// A call of the interface. While it lasts, this thread may load kernels although a CUDA graph is
// being captured, as at a first use.
struct Call {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    bool exchanged;

    Call() : exchanged(cudaThreadExchangeStreamCaptureMode(&mode) == cudaSuccess) {
        failure = cudaSuccess;
        if (!exchanged) cudaGetLastError();
    }
    ~Call() {
        if (exchanged) cudaThreadExchangeStreamCaptureMode(&mode);
    }
};

const char* failure_text() {
    thread_local char text[256];
    if (!has_failed()) return "";
    snprintf(text, sizeof text, "%s: %s", cudaGetErrorName(failure), cudaGetErrorString(failure));
    return text;
}
bool succeeds(cudaError_t status) {
    if (status == cudaSuccess) return true;
    failure = status;
    cudaGetLastError();  // the runtime would report it again after a later call
    return false;
}

int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    return succeeds(cudaDeviceGetAttribute(&value, name, device)) ? value : 0;
}

// The largest power of two of blocks that the device can schedule as one cluster. Every device of
// compute capability 9.0 or newer has clusters of 8, but a slice of one (MIG), or a small one, may
// have too few multiprocessors side by side.
int largest_cluster(int device, int shared) {
    if (attribute(cudaDevAttrComputeCapabilityMajor, device) < 9) return 1;
    const auto kernel = optical_forward_cluster;
    if (!succeeds(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)))
        return 1;
    for (int blocks = 8; blocks > 1; blocks /= 2) {
        cudaLaunchAttribute cluster;
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = (unsigned)blocks;
        cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3((unsigned)blocks), config.blockDim = dim3(32 * max_warps);
        config.dynamicSmemBytes = (size_t)shared;
        config.attrs = &cluster, config.numAttrs = 1;
        int count = 0;
        const cudaError_t status = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
        if (status == cudaSuccess && count > 0) return blocks;
        cudaGetLastError();  // a refusal is an answer
    }
    return 1;
}

// Shared memory per block and blocks per cluster of the current device, asked once.
struct DeviceLimits {
    int shared, blocks;
};
DeviceLimits limits_of_device() {
    enum { count = 64 };
    static std::atomic<int> shared[count], blocks[count];
    int device = 0;
    if (!succeeds(cudaGetDevice(&device))) return {0, 0};
    const bool kept = device < count;
    if (kept && blocks[device] > 0) return {shared[device], blocks[device]};
    const int bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (has_failed()) return {0, 0};
    const DeviceLimits limits = {bytes, largest_cluster(device, bytes)};
    if (has_failed()) return {0, 0};
    if (kept) shared[device] = limits.shared, blocks[device] = limits.blocks;
    return limits;
}
int shared_memory_of_device() { return limits_of_device().shared; }
int blocks_of_cluster() { return limits_of_device().blocks; }

// Allows a kernel all shared memory of the current device, once. The limit is the same for every
// launch: another thread may launch the kernel with more bytes at the same time.
bool allow_shared_memory(const void* kernel) {
    static std::mutex lock;
    static std::set<std::pair<const void*, int>> allowed;
    int device = 0;
    if (!succeeds(cudaGetDevice(&device))) return false;
    const int most = shared_memory_of_device();
    const std::lock_guard<std::mutex> guard(lock);
    if (allowed.count({kernel, device})) return true;
    if (!succeeds(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)))
        return false;
    allowed.insert({kernel, device});
    return true;
}

template <typename... Arguments>
int launch(void (*kernel)(Arguments...), int64_t grid, int blocks, int threads, int bytes,
           Stream stream, Arguments... arguments) {
    if (!allow_shared_memory((const void*)kernel)) return launch_failed;
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = (unsigned)blocks;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)grid), config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = (size_t)bytes, config.stream = stream;
    config.attrs = &cluster, config.numAttrs = blocks > 1 ? 1 : 0;
    return succeeds(cudaLaunchKernelEx(&config, kernel, arguments...)) ? (int)OPTICAL_OK
                                                                       : (int)launch_failed;
}

#endif

bool is_valid(const optical_problem& problem) {
    const bool sizes = problem.batch >= 0 && problem.n >= 0 && problem.m >= 0 &&
                       problem.dim >= 0 && problem.max_iter >= 0;
    const bool choices = problem.kind >= OPTICAL_GIVEN && problem.kind <= OPTICAL_DOT &&
                         problem.precision == OPTICAL_F32 && problem.x_type != OPTICAL_F64 &&
                         problem.y_type != OPTICAL_F64 && problem.gradient >= OPTICAL_ENVELOPE &&
                         problem.gradient <= OPTICAL_UNROLL;
    const bool numbers = problem.rho_a > 0 && problem.rho_b > 0 && problem.omega > 0 &&
                         problem.omega < 2 && problem.anderson == 0 &&
                         problem.batch < ((int64_t)1 << 27);
    return sizes && choices && numbers && !problem.offset_a == !problem.offset_b &&
           !problem.init_f == !problem.init_g;
}

enum class Operation { forward, backward };

// Half precision serves iterations that need no potentials. Below 16 iterations its set-up costs
// more than it saves. optical/backends/nvrtc.py repeats this rule.
bool use_half_precision(const optical_problem& problem) {
    const bool penalty = problem.rho_a <= DBL_MAX || problem.rho_b <= DBL_MAX;
    return problem.fast && problem.max_iter >= 16 && !penalty && problem.omega == 1 &&
           !(problem.anneal_start > 0);
}

template <typename G>
int shared_bytes(const optical_problem& problem, Operation operation, int down, int across) {
    return operation == Operation::forward
               ? Problem<G>::shared_bytes(down, across, problem.kind)
               : Gradient<G>::shared_bytes(down, across, problem.kind, problem.gradient);
}
// The most that any grid of at most `warps` warps needs. One row of warps has the most columns to
// exchange, one column of warps the largest products of vectors.
template <typename G>
int largest_shared_bytes(const optical_problem& problem, Operation operation, int warps) {
    int largest = 0;
    for (int down = 1; down <= warps; ++down)
        for (int across = 1; down * across <= warps; ++across) {
            const int bytes = shared_bytes<G>(problem, operation, down, across);
            if (bytes > largest) largest = bytes;
        }
    return largest;
}
// Shared memory of a launch. A block that serves a packed batch may use any grid with the warps of
// the regime.
template <typename G>
int shared_bytes(const optical_problem& problem, Operation operation, const Regime& regime) {
    if (problem.offset_a && regime.number >= BLOCK)
        return largest_shared_bytes<G>(problem, operation, regime.down * regime.across);
    return shared_bytes<G>(problem, operation, regime.down, regime.across);
}

// The launch limits of a device with `bytes` of shared memory per block and clusters of `blocks`.
Limits limits_of(const optical_problem& problem, Operation operation, int bytes, int blocks) {
    Limits limits = {max_warps, blocks, operation == Operation::forward};
    while (limits.warps > 0 &&
           largest_shared_bytes<Cluster>(problem, operation, limits.warps) > bytes)
        --limits.warps;
    return limits;
}
Limits limits_of(const optical_problem& problem, Operation operation) {
    return limits_of(problem, operation, shared_memory_of_device(), blocks_of_cluster());
}

// Calls queue(regime, limits) once for padded problems. For packed problems, n and m are upper
// bounds, and queue is called for every regime that a problem of the batch may belong to.
template <typename Queue>
int for_regimes(const optical_problem& problem, Operation operation, Queue queue) {
    const Call call{};
    (void)call;
    if (!is_valid(problem)) return OPTICAL_INVALID_ARGUMENT;
    if (problem.batch == 0) return OPTICAL_OK;
    const Limits limits = limits_of(problem, operation);
    const Regime largest = regime_of(problem.n, problem.m, limits);
    if (has_failed()) return launch_failed;
    if (largest.number == NO_REGIME) return out_of_reach;
    if (!problem.offset_a) return queue(largest, limits);
    int status = OPTICAL_OK;
    const auto queue_if = [&](bool possible, const Regime& regime) {
        if (possible && status == OPTICAL_OK) status = queue(regime, limits);
    };
    const bool teams = limits.warp_teams;
    const int64_t longest = problem.n > problem.m ? problem.n : problem.m;
    queue_if(teams, {FOUR, 1, 1, 1, 4});
    queue_if(longest > 16 || !teams, {PAIR, 1, 1, 1, teams ? 2 : 1});
    queue_if(longest > 32, {WARP, 1, 1, 1, 1});
    queue_if(longest > 64 && limits.warps >= 4, {SQUARE, 2, 2, 1, 1});
    queue_if(longest > 64, {BLOCK, 1, limits.warps, 1, 1});
    for (int blocks = 2; blocks <= largest.blocks; blocks *= 2)
        queue_if(true, {CLUSTER, 1, limits.warps, blocks, 1});
    return status;
}

}  // namespace
}  // namespace cuda
}  // namespace optical

using namespace optical::cuda;

extern "C" {

// The text of the error that the last call of this thread met, or "".
OPTICAL_API const char* optical_cuda_error(void) { return failure_text(); }

// Whether the current device runs these kernels: loads one of them and returns 0, or an error.
// Writes shared memory per block, blocks per cluster, the versions of CUDA that the driver and the
// runtime support, such as 13000, and the compute capability, such as 90.
OPTICAL_API int optical_cuda_probe(int* answers) {
    const Call call{};
    (void)call;
    for (int i = 0; i < 5; ++i) answers[i] = 0;
#if !defined(OPTICAL_EMULATED)
    cudaDriverGetVersion(&answers[2]);
    cudaRuntimeGetVersion(&answers[3]);
    cudaFuncAttributes ignored;
    int device = 0;
    if (!succeeds(cudaFuncGetAttributes(&ignored, optical_forward_four)) ||
        !succeeds(cudaGetDevice(&device)))
        return launch_failed;
    answers[4] = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                 attribute(cudaDevAttrComputeCapabilityMinor, device);
#endif
    answers[0] = shared_memory_of_device(), answers[1] = blocks_of_cluster();
    return has_failed() ? (int)launch_failed : (int)OPTICAL_OK;
}

// Whether problems of these sizes can be solved and differentiated on the current device; negative
// if it cannot be asked.
OPTICAL_API int optical_cuda_reach(const optical_problem* pointer) {
    const Call call{};
    (void)call;
    const optical_problem& problem = *pointer;
    const auto fits = [&](Operation operation) {
        return regime_of(problem.n, problem.m, limits_of(problem, operation)).number != NO_REGIME;
    };
    const bool reached = fits(Operation::forward) && fits(Operation::backward);
    return has_failed() ? -launch_failed : reached;
}

// optical_sinkhorn_forward on a stream.
OPTICAL_API int optical_cuda_forward(const optical_problem* pointer,
                                     const optical_solution* solution, void* stream) {
    const optical_problem& problem = *pointer;
    constexpr Operation forward = Operation::forward;
    return for_regimes(problem, forward, [&](const Regime& r, const Limits& limits) {
        const auto queue = [&](auto kernel, int bytes) {
            const int64_t grid = (problem.batch + r.problems - 1) / r.problems * r.blocks;
            return launch(kernel, grid, r.blocks, 32 * r.down * r.across, bytes, (Stream)stream,
                          problem, *solution, limits, r.number);
        };
        const bool fast = use_half_precision(problem) &&
                          shared_bytes<FastCluster>(problem, forward, r) <=
                              shared_memory_of_device();
        if (r.number == FOUR)
            return queue(optical_forward_four, shared_bytes<FourInWarp>(problem, forward, r));
        if (r.number == PAIR)
            return queue(optical_forward_pair, shared_bytes<PairInWarp>(problem, forward, r));
        if (r.number == WARP)
            return fast ? queue(optical_forward_fast_warp,
                                shared_bytes<FastWarp>(problem, forward, r))
                        : queue(optical_forward_warp,
                                shared_bytes<LargeWarp>(problem, forward, r));
        if (r.number == SQUARE)
            return fast ? queue(optical_forward_fast_square,
                                shared_bytes<FastSquare>(problem, forward, r))
                        : queue(optical_forward_square,
                                shared_bytes<SquareBlock>(problem, forward, r));
        if (r.number == CLUSTER)
            return fast ? queue(optical_forward_fast_cluster,
                                shared_bytes<FastCluster>(problem, forward, r))
                        : queue(optical_forward_cluster,
                                shared_bytes<Cluster>(problem, forward, r));
        return fast ? queue(optical_forward_fast_block,
                            shared_bytes<FastBlock>(problem, forward, r))
                    : queue(optical_forward_block,
                            shared_bytes<OneBlock>(problem, forward, r));
    });
}

// optical_sinkhorn_backward on a stream. grad_x and grad_y have the types of x and y. For UNROLL,
// `history` has room for the potentials of all rows and columns after 0 to max_iter iterations.
OPTICAL_API int optical_cuda_backward(const optical_problem* pointer,
                                      const optical_gradient* gradient, void* history,
                                      void* stream) {
    const optical_problem& problem = *pointer;
    const bool unroll = problem.gradient == OPTICAL_UNROLL;
    if (unroll && problem.anneal_start > 0) return OPTICAL_INVALID_ARGUMENT;
    constexpr Operation backward = Operation::backward;
    return for_regimes(problem, backward, [&](const Regime& r, const Limits& limits) {
        const auto queue = [&](auto kernel, int bytes) {
            const int64_t grid = (problem.batch + r.problems - 1) / r.problems * r.blocks;
            return launch(kernel, grid, r.blocks, 32 * r.down * r.across, bytes, (Stream)stream,
                          problem, *gradient, (float*)history, limits, r.number);
        };
        if (r.number == PAIR)
            return queue(unroll ? optical_unroll_small : optical_backward_small,
                         shared_bytes<SmallWarp>(problem, backward, r));
        if (r.number == WARP)
            return queue(unroll ? optical_unroll_warp : optical_backward_warp,
                         shared_bytes<LargeWarp>(problem, backward, r));
        if (r.number == CLUSTER)
            return queue(unroll ? optical_unroll_cluster : optical_backward_cluster,
                         shared_bytes<Cluster>(problem, backward, r));
        return queue(unroll ? optical_unroll_block : optical_backward_block,
                     shared_bytes<OneBlock>(problem, backward, r));
    });
}

// The launch configuration of a padded problem on a device with `shared` bytes per block and
// clusters of `clusters` blocks. Writes down, across, blocks, bytes of shared memory and problems
// per warp; returns the regime. A test compares this with optical/backends/nvrtc.py.
OPTICAL_API int optical_cuda_launch_config(const optical_problem* pointer, int is_backward,
                                           int shared, int clusters, int* config) {
    const optical_problem& problem = *pointer;
    const Operation operation = is_backward ? Operation::backward : Operation::forward;
    const Limits limits = limits_of(problem, operation, shared, clusters);
    const Regime r = regime_of(problem.n, problem.m, limits);
    config[0] = r.down, config[1] = r.across, config[2] = r.blocks;
    config[3] = r.number == FOUR      ? shared_bytes<FourInWarp>(problem, operation, r)
                : r.number == CLUSTER ? shared_bytes<Cluster>(problem, operation, r)
                : r.number > WARP     ? shared_bytes<OneBlock>(problem, operation, r)
                : r.number == WARP    ? shared_bytes<LargeWarp>(problem, operation, r)
                : is_backward         ? shared_bytes<SmallWarp>(problem, operation, r)
                                      : shared_bytes<PairInWarp>(problem, operation, r);
    config[4] = r.problems;
    return r.number;
}

OPTICAL_API int optical_abi_version(void) { return OPTICAL_ABI_VERSION; }

OPTICAL_API const char* optical_source_hash(void) { return OPTICAL_SOURCE_HASH; }

#if defined(OPTICAL_EMULATED)
// Seeds the order in which emulated threads run.
OPTICAL_API void optical_emulator_seed(uint64_t seed) {
    emulator::machine().random = seed * 2 + 1;
}
// Gives approximate arithmetic errors as large as PTX allows, or rounds it.
OPTICAL_API void optical_emulator_arithmetic(int pessimistic) {
    emulator::pessimistic() = pessimistic != 0;
}
// Sets the shared memory per block, in bytes, and the blocks per cluster of the emulated device.
OPTICAL_API void optical_emulator_device(int shared, int clusters) {
    emulator::machine().shared_memory = shared, emulator::machine().max_cluster = clusters;
}
// Gives launches fewer bytes of shared memory than they ask for.
OPTICAL_API void optical_emulator_withhold(int bytes) { emulator::machine().withheld = bytes; }
#endif

}  // extern "C"
