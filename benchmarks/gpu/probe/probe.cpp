// Runs every CUDA kernel on small problems, without Python: seconds, also under compute-sanitizer.
//
//   c++ -O1 -std=c++17 -Icsrc benchmarks/gpu/probe/probe.cpp -ldl -o probe
//   ./probe LIBRARY cpu  write FILE [--shard I/N]              the emulated kernels
//   ./probe LIBRARY cuda check FILE [--runs N] [--only TEXT]   the kernels on a device
//
// `write` stores the outputs of all cases. `check` compares with stored outputs, and further runs
// with the first one bit by bit; with "-" for the file only the bits are compared. A case is a
// size, a cost and a variant, and its name holds all three.
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "cases.h"

namespace {

// A named output of a case.
struct Output {
    std::string name;
    std::vector<float> values;
};
typedef std::vector<Output> Outputs;

struct Kernels {
    int (*forward)(const optical_problem*, const optical_solution*, void*);
    int (*backward)(const optical_problem*, const optical_gradient*, void*, void*);
};

void keep(Outputs& outputs, const char* name, Array<float>& values) {
    outputs.push_back({name, values.fetch()});
}
void keep(Outputs& outputs, const char* name, Array<int32_t>& values) {
    values.fetch();
    outputs.push_back({name, std::vector<float>(values.host.begin(), values.host.end())});
}
void keep(Outputs& outputs, const char* name, Array<char>& values, int type) {
    values.fetch();
    Output output = {name, {}};
    for (size_t i = 0; i < values.host.size(); i += (size_t)bytes_of(type))
        output.values.push_back(load(&values.host[i], type));
    outputs.push_back(output);
}

// Solves and differentiates a case; the error code of the library.
int run(const Kernels& kernels, const Case& c, Outputs& outputs) {
    Data data(c);
    const size_t batch = (size_t)c.batch, count_a = data.count_a, count_b = data.count_b;
    Array<float> value(batch, NAN), linear(batch, NAN), error(batch, NAN), residual(batch, NAN);
    Array<float> f(count_a, NAN), g(count_b, NAN), w(count_a, NAN), z(count_b, NAN);
    Array<int32_t> n_iter(batch, -7), status(batch, -7);
    const optical_problem problem = data.problem();
    const optical_solution solution = {value.data(),  linear.data(), error.data(), f.data(),
                                       g.data(),      n_iter.data(), status.data(), w.data(),
                                       z.data(),      residual.data()};
    if (const int code = kernels.forward(&problem, &solution, nullptr)) return code;
    memory.wait();
    keep(outputs, "value", value), keep(outputs, "value_linear", linear);
    keep(outputs, "marginal_error", error), keep(outputs, "f", f), keep(outputs, "g", g);
    keep(outputs, "n_iter", n_iter), keep(outputs, "status", status);

    const bool unroll = c.is_unrolled();
    const size_t history_size = unroll ? (size_t)(data.max_iter + 1) * (count_a + count_b) : 0;
    Array<float> history(history_size, NAN), grad_a(count_a, NAN), grad_b(count_b, NAN);
    Array<float> up_value(batch, 0.7f), up_linear(batch, -0.4f);
    Array<float> up_f(count_a, 0.01f), up_g(count_b, 0.02f);
    const char nan = (char)0xff;
    const bool given = data.is_given();
    Array<char> grad_x(given ? data.entries_x * 4 : data.entries_x * bytes_of(c.cost.x_type), nan);
    Array<char> grad_y(data.entries_y * (size_t)bytes_of(c.cost.y_type), nan);
    const optical_gradient gradient = {up_value.data(),
                                       up_linear.data(),
                                       unroll ? up_f.data() : nullptr,
                                       unroll ? up_g.data() : nullptr,
                                       f.data(),
                                       g.data(),
                                       w.data(),
                                       z.data(),
                                       n_iter.data(),
                                       grad_x.data(),
                                       given ? nullptr : grad_y.data(),
                                       grad_a.data(),
                                       grad_b.data()};
    if (const int code = kernels.backward(&problem, &gradient, history.data(), nullptr)) return code;
    memory.wait();
    keep(outputs, "grad_log_a", grad_a), keep(outputs, "grad_log_b", grad_b);
    keep(outputs, "grad_x", grad_x, given ? OPTICAL_F32 : c.cost.x_type);
    keep(outputs, "grad_y", grad_y, c.cost.y_type);
    return 0;
}

// ------------------------------------------------------------------------------------ compare

// Allowed difference between the device and the emulation, relative to the largest entry of an
// output: approximations and tensor cores of a device round differently, and gradients have the
// type of the vectors.
double tolerance(const Case& c) {
    return c.variant == fast ? 1e-2 : c.has_halves() ? 8e-3 : 3e-4;
}

// The share of its tolerance that the worst output of a case uses; `worst` becomes its name.
double compare(const Case& c, const Outputs& outputs, const Outputs& expected, std::string& worst) {
    double most = 0;
    for (size_t k = 0; k < expected.size(); ++k) {
        const std::vector<float>&out = outputs[k].values, &truth = expected[k].values;
        double share = out.size() == truth.size() ? 0 : INFINITY, off = 0;
        const bool error = outputs[k].name == "marginal_error";
        double scale = error ? 1 : 1e-3;
        for (float entry : truth)
            if (isfinite(entry)) scale = std::max(scale, (double)fabsf(entry));
        for (size_t i = 0; i < truth.size() && share < INFINITY; ++i) {
            if (isfinite(out[i]) != isfinite(truth[i])) share = INFINITY;
            if (isfinite(truth[i])) off = std::max(off, fabs((double)out[i] - truth[i]));
        }
        share = std::max(share, off / (tolerance(c) * scale));
        // Under a tolerance, a run may stop one iteration earlier or later.
        const bool counted = c.variant == stopped && outputs[k].name == "n_iter" && off <= 1;
        if (!counted && share > most) most = share, worst = outputs[k].name;
    }
    return most;
}

bool same_bits(const Outputs& a, const Outputs& b, std::string& worst) {
    for (size_t k = 0; k < a.size(); ++k) {
        const size_t bytes = a[k].values.size() * sizeof(float);
        if (bytes && memcmp(a[k].values.data(), b[k].values.data(), bytes)) {
            worst = a[k].name;
            return false;
        }
    }
    return true;
}

// A file is a sequence of cases: its number, and for every output a length and the numbers.
void write(FILE* file, int number, const Outputs& outputs) {
    fwrite(&number, sizeof number, 1, file);
    for (const Output& output : outputs) {
        const uint64_t length = output.values.size();
        fwrite(&length, sizeof length, 1, file);
        fwrite(output.values.data(), sizeof(float), length, file);
    }
}

const size_t outputs_per_case = 11;

std::map<int, Outputs> read(FILE* file) {
    std::map<int, Outputs> result;
    for (int number; fread(&number, sizeof number, 1, file) == 1;) {
        Outputs& outputs = result[number];
        for (size_t k = 0; k < outputs_per_case; ++k) {
            uint64_t length = 0;
            if (fread(&length, sizeof length, 1, file) != 1) length = 0;
            outputs.push_back({"", std::vector<float>(length)});
            if (fread(outputs.back().values.data(), sizeof(float), length, file) != length)
                return result.erase(number), result;  // the file ends in this case
        }
    }
    return result;
}

struct Arguments {
    std::string library, place, action, file, only;
    int runs = 1, shard = 0, shards = 1;
};

bool parse(int count, char** texts, Arguments& arguments) {
    if (count < 5) return false;
    arguments.library = texts[1], arguments.place = texts[2];
    arguments.action = texts[3], arguments.file = texts[4];
    for (int i = 5; i + 1 < count; i += 2) {
        const std::string name = texts[i];
        if (name == "--only")
            arguments.only = texts[i + 1];
        else if (name == "--runs")
            arguments.runs = atoi(texts[i + 1]);
        else if (name != "--shard" ||
                 sscanf(texts[i + 1], "%d/%d", &arguments.shard, &arguments.shards) != 2)
            return false;
    }
    return true;
}

// Runs a case and compares it; prints a line unless it passes. The share of its tolerance.
double check(const Kernels& kernels, const Case& c, const Outputs* expected, int runs) {
    std::string worst;
    Outputs outputs;
    int code = run(kernels, c, outputs);
    double share = 0;
    if (code == 0 && expected) share = compare(c, outputs, *expected, worst);
    bool equal = true;
    for (int k = 1; k < runs && code == 0 && equal; ++k) {
        Outputs again;
        code = run(kernels, c, again);
        equal = code == 0 && same_bits(outputs, again, worst);
    }
    if (code)
        printf("FAILED %s: error %d of the library\n", c.name().c_str(), code);
    else if (!equal)
        printf("FAILED %s: %s has other bits in another run\n", c.name().c_str(), worst.c_str());
    else if (!(share <= 1))
        printf("FAILED %s: %s is off by %.3g times its tolerance\n", c.name().c_str(),
               worst.c_str(), share);
    fflush(stdout);
    return code || !equal ? INFINITY : share;
}

}  // namespace

int main(int count, char** texts) {
    Arguments arguments;
    if (!parse(count, texts, arguments)) {
        printf("usage: probe LIBRARY cpu|cuda write|check FILE [--runs N] [--only TEXT] "
               "[--shard I/N]\n");
        return unusable;
    }
    if (arguments.place == "cuda") memory.open();
    void* library = dlopen(arguments.library.c_str(), RTLD_NOW);
    if (!library) return printf("%s\n", dlerror()), unusable;
    // Another hash than that of the sources is that of a library that has not been rebuilt.
    const auto hash = (const char* (*)())dlsym(library, "optical_source_hash");
    printf("library of the sources %s\n", hash ? hash() : "unknown");
    Kernels kernels;
    *(void**)&kernels.forward = dlsym(library, "optical_cuda_forward");
    *(void**)&kernels.backward = dlsym(library, "optical_cuda_backward");
    const bool writes = arguments.action == "write";
    FILE* file = nullptr;
    if (arguments.file != "-") {
        file = fopen(arguments.file.c_str(), writes ? "wb" : "rb");
        if (!file) printf("%s cannot be opened: bits are compared only\n", arguments.file.c_str());
        if (!file && writes) return unusable;
    }
    std::map<int, Outputs> expected;
    if (file && !writes) expected = read(file);
    const std::vector<Case> cases = all_cases();
    int ran = 0, wrong = 0, missing = 0;
    double most = 0;
    for (int number = arguments.shard; number < (int)cases.size(); number += arguments.shards) {
        const Case& c = cases[(size_t)number];
        if (c.name().find(arguments.only) == std::string::npos) continue;
        ++ran;
        if (writes) {
            Outputs outputs;
            if (const int code = run(kernels, c, outputs))
                printf("FAILED %s: error %d of the library\n", c.name().c_str(), code), ++wrong;
            else if (file)
                write(file, number, outputs);
            continue;
        }
        const auto found = expected.find(number);
        missing += found == expected.end();
        const double share =
            check(kernels, c, found == expected.end() ? nullptr : &found->second, arguments.runs);
        if (share <= 1)
            most = std::max(most, share);
        else
            ++wrong;
    }
    if (file) fclose(file);
    printf("%d cases, %d runs each: %d failed, %d without expected outputs; at most %.3f of the "
           "tolerance is used\n", ran, arguments.runs, wrong, missing, most);
    return wrong || !ran || (missing && arguments.file != "-") ? failed : passed;
}
