// Runs the emulated kernels on small problems of every regime, cost and gradient, for the
// sanitizers: all arrays have exactly the size that the kernels may use.
//
//   exercise [part of the name [seed [kilobytes of shared memory [blocks per cluster [bytes of
//            shared memory withheld from launches]]]]]
//
// Prints a line for each run, and fails if a call failed or a result is not finite.
#include "sinkhorn.cu"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

namespace {

using namespace optical::cuda;
constexpr int bytes_per_type[] = {4, 8, 2, 2};

template <typename T>
struct Array {
    T* data;
    size_t size;
    explicit Array(size_t count, T value = T()) : size(count) {
        void* memory;
        if (posix_memalign(&memory, 64, size * sizeof(T) + !size) != 0) abort();
        data = (T*)memory;
        for (size_t i = 0; i < size; ++i) data[i] = value;
    }
    ~Array() { free(data); }
    Array(const Array&) = delete;
    double total() const {
        double sum = 0;
        for (size_t i = 0; i < size; ++i) sum += (double)data[i];
        return sum;
    }
};

struct Size {
    const char* name;
    int n, m;
};
struct CostCase {
    const char* name;
    int kind, x_type, y_type;
};
// What a run asks for in addition. `shift`: elements before the first vector, which misalign it.
struct Options {
    const char* name;
    int gradient = OPTICAL_ENVELOPE, max_iter = 3, dim = 37, shift = 0, fast = 0;
    double tol = 0, rho_a = INFINITY, omega = 1, anneal_start = 0;
    bool packed = false;
};

const Size sizes[] = {{"four", 9, 12},    {"pair", 20, 30},   {"warp", 60, 50},
                      {"square", 100, 120}, {"block", 130, 60}, {"cluster", 70, 300},
                      {"tall", 190, 60}};
const CostCase costs[] = {{"given", OPTICAL_GIVEN, OPTICAL_F32, OPTICAL_F32},
                      {"cosine-f32", OPTICAL_COSINE, OPTICAL_F32, OPTICAL_F32},
                      {"cosine-bf16", OPTICAL_COSINE, OPTICAL_BF16, OPTICAL_BF16},
                      {"cosine-f16", OPTICAL_COSINE, OPTICAL_F16, OPTICAL_F16},
                      {"cosine-mixed", OPTICAL_COSINE, OPTICAL_F32, OPTICAL_BF16},
                      {"sqeuclidean-f32", OPTICAL_SQEUCLIDEAN, OPTICAL_F32, OPTICAL_F32},
                      {"dot-bf16", OPTICAL_DOT, OPTICAL_BF16, OPTICAL_BF16}};

std::vector<Options> all_options() {
    std::vector<Options> all(7);
    all[0].name = "envelope", all[0].dim = 40;
    all[1].name = "packed", all[1].packed = true;
    all[2].name = "tol", all[2].dim = 40, all[2].tol = 1e-3, all[2].rho_a = 0.5;
    all[3].name = "implicit", all[3].gradient = OPTICAL_IMPLICIT, all[3].anneal_start = 0.3;
    all[4].name = "unroll-packed", all[4].gradient = OPTICAL_UNROLL, all[4].packed = true;
    all[5].name = "unroll-relaxed", all[5].gradient = OPTICAL_UNROLL, all[5].shift = 1;
    all[5].rho_a = 0.5, all[5].omega = 1.3;
    all[6].name = "fast", all[6].fast = 1, all[6].max_iter = 17;
    return all;
}

std::mt19937 generator(7);

void draw(const Array<char>& to, int type) {
    std::normal_distribution<float> normal;
    const int64_t count = (int64_t)to.size / bytes_per_type[type];
    for (int64_t i = 0; i < count; ++i) store(to.data, type, i, normal(generator));
}
double total_of(const Array<char>& x, int type) {
    double sum = 0;
    const int64_t count = (int64_t)x.size / bytes_per_type[type];
    for (int64_t i = 0; i < count; ++i) sum += (double)load(x.data, type, i);
    return sum;
}

// The offsets and log-masses of one side. A packed batch has an empty problem, a padded one masks
// the last entry of each problem.
struct Masses {
    std::vector<int64_t> offset = {0};
    Array<float> log_mass;
    static std::vector<int64_t> lengths_of(int batch, int size, int shrink, bool packed) {
        std::vector<int64_t> lengths(batch, size);
        for (int b = 0; packed && b < batch; ++b)
            lengths[b] = b == 1 ? 0 : std::max(1, size - shrink * b);
        return lengths;
    }
    static size_t sum(const std::vector<int64_t>& x) {
        size_t sum = 0;
        for (int64_t y : x) sum += (size_t)y;
        return sum;
    }
    Masses(int batch, int size, int shrink, bool packed)
        : log_mass(sum(lengths_of(batch, size, shrink, packed))) {
        for (int64_t length : lengths_of(batch, size, shrink, packed)) {
            for (int64_t i = 0; i < length; ++i)
                log_mass.data[offset.back() + i] = !packed && i > 4 && i == length - 1
                                                       ? -INFINITY
                                                       : -std::log((float)length);
            offset.push_back(offset.back() + length);
        }
    }
};

bool run(const Size& size, const CostCase& cost, const Options& options) {
    const bool given = cost.kind == OPTICAL_GIVEN, large = size.n * size.m > 4000;
    const int batch = large ? (options.packed ? 3 : 1) : 5, dim = given ? 0 : options.dim;
    const Masses a(batch, size.n, 3, options.packed), b(batch, size.m, 5, options.packed);
    const size_t rows = a.log_mass.size, columns = b.log_mass.size;
    const size_t x_count = given ? (size_t)batch * size.n * size.m : rows * dim;
    const size_t y_count = columns * dim;
    const int x_bytes = bytes_per_type[cost.x_type], y_bytes = bytes_per_type[cost.y_type];
    const size_t shift = given ? 0 : options.shift;
    Array<char> x((x_count + shift) * x_bytes), y((y_count + shift) * y_bytes);
    draw(x, cost.x_type), draw(y, cost.y_type);
    const Array<float> epsilon(batch, 0.1f);

    optical_problem problem = {};
    problem.batch = batch, problem.n = size.n, problem.m = size.m, problem.dim = dim;
    problem.kind = cost.kind, problem.precision = OPTICAL_F32;
    problem.x = x.data + shift * x_bytes, problem.y = given ? nullptr : y.data + shift * y_bytes;
    problem.x_type = cost.x_type, problem.y_type = cost.y_type;
    problem.x_stride_row = given ? size.m : dim, problem.x_stride_entry = 1;
    problem.y_stride_column = dim;
    problem.x_stride_batch = problem.x_stride_row * size.n;
    problem.y_stride_batch = (int64_t)dim * size.m;
    if (options.packed) problem.offset_a = a.offset.data(), problem.offset_b = b.offset.data();
    problem.log_a = a.log_mass.data, problem.log_b = b.log_mass.data;
    problem.epsilon = epsilon.data, problem.max_iter = options.max_iter;
    problem.tol = options.tol, problem.rho_a = options.rho_a, problem.rho_b = INFINITY;
    problem.omega = options.omega, problem.gradient = options.gradient, problem.fast = options.fast;
    problem.anneal_start = options.anneal_start, problem.anneal_ratio = 0.5;

    const Array<float> value(batch), linear(batch), error(batch), residual(batch);
    const Array<float> f(rows), g(columns), w(rows), z(columns);
    const Array<int32_t> n_iter(batch), status(batch);
    const optical_solution solution = {value.data, linear.data, error.data,  f.data, g.data,
                                       n_iter.data, status.data, w.data, z.data, residual.data};
    const int forward = optical_cuda_forward(&problem, &solution, nullptr);
    double sum = value.total() + linear.total() + error.total() + residual.total();

    const bool unroll = options.gradient == OPTICAL_UNROLL;
    const Array<float> up_value(batch, 0.7f), up_linear(batch, -0.4f), up_f(rows, 0.01f),
        up_g(columns, 0.02f);
    const Array<float> grad_a(rows), grad_b(columns);
    const Array<float> history(unroll ? (options.max_iter + 1) * (rows + columns) : 0);
    const Array<char> grad_x(x_count * x_bytes), grad_y(y_count * y_bytes);
    const optical_gradient gradient = {
        up_value.data, up_linear.data, unroll ? up_f.data : nullptr, unroll ? up_g.data : nullptr,
        f.data, g.data, w.data, z.data, n_iter.data,
        grad_x.data, given ? nullptr : grad_y.data, grad_a.data, grad_b.data};
    const int backward = forward != 0 ? forward
                                      : optical_cuda_backward(&problem, &gradient, history.data,
                                                              nullptr);
    sum += total_of(grad_x, cost.x_type) + total_of(grad_y, cost.y_type) + grad_a.total();
    const bool in_reach = forward != out_of_reach && backward != out_of_reach;
    const bool right = !in_reach || (forward == 0 && backward == 0 && std::isfinite(sum));
    printf("%s %s %s: forward %d backward %d sum %.7g%s\n", size.name, cost.name, options.name,
           forward, backward, sum, right ? "" : " WRONG");
    fflush(stdout);
    return right;
}

}  // namespace

int main(int argc, char** argv) {
    const std::string part = argc > 1 ? argv[1] : "";
    optical_emulator_seed(argc > 2 ? (uint64_t)atoi(argv[2]) : 1);
    optical_emulator_device((argc > 3 ? atoi(argv[3]) : 227) << 10, argc > 4 ? atoi(argv[4]) : 8);
    optical_emulator_withhold(argc > 5 ? atoi(argv[5]) : 0);
    bool right = true;
    for (const Size& size : sizes)
        for (const CostCase& cost : costs)
            for (const Options& options : all_options()) {
                const std::string name =
                    std::string(size.name) + " " + cost.name + " " + options.name;
                if (name.find(part) != std::string::npos) right &= run(size, cost, options);
            }
    return right ? 0 : 1;
}
