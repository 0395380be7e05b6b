// A machine for PTX: runs the blocks of a grid one after another, with the memory of the host.
//
// Warps are interleaved at random between barriers. Every byte of shared memory and every second
// byte of global memory records who touched it since the last barrier: two threads race if one of
// them writes, no barrier lies between, and the byte changes. Lanes of one warp are ordered by
// bar.warp.sync only. Blocks may not exchange anything. Reads and writes must be aligned and stay
// within the tensors of the launch.
//
// Not modelled: the asynchronous proxy (wgmma reads its operands where it is issued, and cp.async
// reads global memory there), clusters, TMA, mbarriers, atomics.
#include <cstdarg>
#include <cstdio>
#include <random>
#include <unordered_map>
#include <vector>

#include "arithmetic.h"

using std::vector;

struct Operand { int32_t reg, negated; u64 immediate; };
struct Program { vector<Instruction> code; vector<Operand> operands; int registers; };
struct Range { u64 from, to; };
struct Report { char text[4096]; int64_t races, faults, instructions; };
struct Launch {
    int32_t grid[3], threads, shared, seed, watch, noise;
    const unsigned char* parameters;
    const Range* tensors;
    int64_t tensor_count;
};

// Shared memory starts here; the runtime keeps the addresses below for itself.
constexpr u32 shared_origin = 1024;
// Registers of %ctaid, %nctaid, %tid and %ntid come first, three each.
enum { CTAID = 0, NCTAID = 3, TID = 6, NTID = 9 };

struct Access { int thread = -1; u32 block_epoch = 0, warp_epoch = 0; };
struct Shadow { Access write, first_read, last_read; };
struct BlockShadow { int64_t writer = -1, reader = -1; bool many_readers = false; };
struct Copy { u32 to; int bytes, thread; unsigned char data[16]; };

struct Block {
    const Program& program;
    const Launch& launch;
    Report& report;
    std::unordered_map<u64, BlockShadow>& other_blocks;
    const int64_t index;
    const int threads = launch.threads, warps = launch.threads / 32;
    const int end = program.code.size();
    vector<u64> registers = vector<u64>(size_t(program.registers) * threads, 0xdeadbeefdeadbeef);
    // Memory that nothing has written is NaN.
    vector<unsigned char> shared = vector<unsigned char>(shared_origin + launch.shared, 0xff);
    vector<Shadow> shared_shadow = vector<Shadow>(launch.watch ? shared.size() : 0);
    std::unordered_map<u64, Shadow> global_shadow = {};
    vector<int> at = vector<int>(threads, 0), waits = vector<int>(warps, -1);
    vector<u32> warp_epoch = vector<u32>(warps, 0);
    u32 block_epoch = 0;
    vector<vector<Copy>> open = vector<vector<Copy>>(warps);
    vector<vector<vector<Copy>>> committed = vector<vector<vector<Copy>>>(warps);

    // The instruction that a warp carries out, and its lanes that do.
    const Instruction* in = nullptr;
    const Operand *result = nullptr, *source = nullptr;
    int first_thread = 0;
    u32 active = 0;

    void say(int64_t& count, const char* what, ...) {
        const size_t used = strlen(report.text);
        if (++count > 6 || used > sizeof report.text - 256) return;
        va_list values;
        va_start(values, what);
        char* text = report.text + used;
        text += snprintf(text, 64, "line %d: ", in ? in->line : 0);
        text += vsnprintf(text, 160, what, values);
        snprintf(text, 16, "\n");
        va_end(values);
    }
    bool fault(const char* what, int64_t a = 0, int64_t b = 0) {
        say(report.faults, what, a, b);
        return false;
    }

    u64& reg(int number, int thread) { return registers[size_t(number) * threads + thread]; }
    u64 get(const Operand& x, int thread) {
        return x.reg < 0 ? x.immediate : reg(x.reg, thread) ^ x.negated;
    }
    void set(const Operand& x, int thread, u64 value) {
        if (x.reg >= 0) reg(x.reg, thread) = value;
    }
    template <class Function> void each(Function f) {
        for (int lane = 0; lane < 32; ++lane)
            if (active >> lane & 1) f(first_thread + lane);
    }

    // --- memory ---------------------------------------------------------------------------------

    bool concurrent(const Access& other, int thread) const {
        if (other.thread < 0 || other.thread == thread) return false;
        if (other.block_epoch != block_epoch) return false;
        const bool one_warp = other.thread / 32 == thread / 32;
        return !one_warp || other.warp_epoch == warp_epoch[thread / 32];
    }
    void touch(Shadow& shadow, int thread, bool write, const char* space) {
        const Access now = {thread, block_epoch, warp_epoch[thread / 32]};
        const Access* other = concurrent(shadow.write, thread) ? &shadow.write : nullptr;
        if (write && concurrent(shadow.first_read, thread)) other = &shadow.first_read;
        if (write && concurrent(shadow.last_read, thread)) other = &shadow.last_read;
        if (other)
            say(report.races, "threads %d and %d race in %s memory", other->thread, thread, space);
        if (write) shadow.write = now;
        else if (concurrent(shadow.first_read, thread)) shadow.last_read = now;
        else shadow.first_read = now;
    }
    void watch_shared(u32 address, int bytes, int thread, bool write) {
        if (!launch.watch) return;
        for (int i = 0; i < bytes; ++i) touch(shared_shadow[address + i], thread, write, "shared");
    }
    void watch_global(u64 address, int bytes, int thread, bool write) {
        if (!launch.watch) return;
        for (u64 half = address / 2; half < (address + bytes + 1) / 2; ++half) {
            touch(global_shadow[half], thread, write, "global");
            BlockShadow& blocks = other_blocks[half];
            bool race = blocks.writer >= 0 && blocks.writer != index;
            race |= write && blocks.reader >= 0 && (blocks.reader != index || blocks.many_readers);
            if (race) say(report.races, "block %d races with another one", int(index));
            if (write) blocks.writer = index;
            else if (blocks.reader >= 0 && blocks.reader != index) blocks.many_readers = true;
            if (!write) blocks.reader = index;
        }
    }
    // The host's address of a location, or null with a report of what is wrong with it.
    unsigned char* locate(bool in_shared, u64 address, int bytes, int thread) {
        if (address % bytes) fault("address %lld is not a multiple of %lld", address, bytes);
        if (in_shared) {
            if (address >= shared_origin && address + bytes <= shared.size())
                return &shared[address];
        } else {
            const Range *from = launch.tensors, *to = from + launch.tensor_count;
            const auto after = [](u64 x, const Range& range) { return x < range.from; };
            const Range* next = std::upper_bound(from, to, address, after);
            if (next != from && address + bytes <= next[-1].to) return (unsigned char*)address;
        }
        fault(in_shared ? "thread %lld is outside shared memory, at %lld"
                        : "thread %lld is outside every tensor", thread, address);
        return nullptr;
    }
    bool read(bool in_shared, u64 address, int bytes, int thread, void* data) {
        const unsigned char* place = locate(in_shared, address, bytes, thread);
        if (!place) return false;
        in_shared ? watch_shared(address, bytes, thread, false)
                  : watch_global(address, bytes, thread, false);
        memcpy(data, place, bytes);
        return true;
    }
    // Storing what is there already is no race: lanes may hold copies of one value.
    bool write(bool in_shared, u64 address, int bytes, int thread, const void* data) {
        unsigned char* place = locate(in_shared, address, bytes, thread);
        if (!place) return false;
        if (!memcmp(place, data, bytes)) return true;
        in_shared ? watch_shared(address, bytes, thread, true)
                  : watch_global(address, bytes, thread, true);
        memcpy(place, data, bytes);
        return true;
    }

    // ld and st; mode: whether in shared memory. The last sources of st are the values.
    void access_memory() {
        const int bytes = in->type.bits / 8, all = bytes * in->vector;
        unsigned char data[16];
        each([&](int thread) {
            const u64 address = get(source[0], thread) + source[1].immediate;
            const u64 place = in->mode ? u32(address) : address;
            if (in->operation == LOAD && read(in->mode, place, all, thread, data)) {
                for (int i = 0; i < in->vector; ++i) {
                    u64 value = 0;
                    memcpy(&value, data + i * bytes, bytes);
                    set(result[i], thread, u64(integer(in->type, value)));
                }
            } else if (in->operation == STORE) {
                for (int i = 0; i < in->vector; ++i) {
                    const u64 value = get(source[2 + i], thread);
                    memcpy(data + i * bytes, &value, bytes);
                }
                write(in->mode, place, all, thread, data);
            }
        });
    }

    // ldmatrix and stmatrix: 8 x 8 matrices of 16 bits, one row per address of eight lanes each;
    // a lane holds two neighbours of a row, with mode = 1 of a column.
    void move_matrices() {
        for (int matrix = 0; matrix < in->vector; ++matrix)
            for (int lane = 0; lane < 32; ++lane) {
                const int thread = first_thread + lane;
                const bool load = in->operation == LDMATRIX;
                uint16_t pair[2];
                if (!load) {
                    const u32 held = get(source[2 + matrix], thread);
                    memcpy(pair, &held, 4);
                }
                for (int k = 0; k < 2; ++k) {
                    const int along = 2 * (lane % 4) + k, across = lane / 4;
                    const int row = in->mode ? along : across, column = in->mode ? across : along;
                    const u32 start = get(source[0], first_thread + 8 * matrix + row);
                    const u32 address = start + source[1].immediate + 2 * column;
                    if (start % 16) fault("the row at %lld is not aligned", start);
                    load ? read(true, address, 2, thread, pair + k)
                         : write(true, address, 2, thread, pair + k);
                }
                if (load) set(result[matrix], thread, u32(pair[1]) << 16 | pair[0]);
            }
    }

    // cp.async: the bytes arrive when their group is awaited; until then they are NaN.
    void copy_async() {
        each([&](int thread) {
            Copy copy = {u32(get(source[0], thread) + source[1].immediate), in->mode, thread, {}};
            const u64 from = get(source[2], thread) + source[3].immediate;
            const u64 bytes = in->sources > 4 ? u32(get(source[4], thread)) : copy.bytes;
            unsigned char missing[16];
            memset(missing, 0xff, sizeof missing);
            if (bytes && !read(false, from, bytes, thread, copy.data)) return;
            if (!write(true, copy.to, copy.bytes, thread, missing)) return;
            open[first_thread / 32].push_back(copy);
        });
    }
    void await_copies() {
        auto& groups = committed[first_thread / 32];
        for (; int(groups.size()) > in->mode; groups.erase(groups.begin()))
            for (const Copy& copy : groups.front())
                write(true, copy.to, copy.bytes, copy.thread, copy.data);
    }

    // --- tensor cores ---------------------------------------------------------------------------

    // Where element (outer, k) of an operand of wgmma is in shared memory, by its descriptor. Rows
    // of K, or with `transposed` of the other dimension, are swizzled in units of 16 bytes.
    u32 wgmma_address(u64 descriptor, bool transposed, int outer, int k, int bytes) const {
        const u32 start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
        const u32 stride = (descriptor >> 32 & 0x3fff) << 4, swizzle = descriptor >> 62 & 3;
        const u32 row = swizzle ? 256 >> swizzle : 16;
        const u32 along = (transposed ? outer : k) * bytes, across = transposed ? k : outer;
        u32 address = start + across / 8 * stride + across % 8 * row;
        address += along / row * leading + along % row;
        return swizzle ? address ^ (address >> 7 & ((16 >> swizzle) - 1)) << 4 : address;
    }
    double shared_element(u64 descriptor, bool transposed, int outer, int k) {
        const int bytes = in->from.bits / 8;
        u32 value = 0;
        const u32 address = wgmma_address(descriptor, transposed, outer, k, bytes);
        read(true, address, bytes, first_thread, &value);
        return real(in->from, value);
    }
    double register_element(const Operand& x, int thread, int k) {
        const u64 value = get(x, thread);
        return real(in->from, in->from.bits == 32 ? value : value >> 16 * k);
    }
    // D = A B + D of 16 rows per warp and `vector` columns, exact until it is rounded to float32.
    // mma takes A, B and C from registers. wgmma takes B and, unless detail & 1, A from shared
    // memory, transposed by detail & 4 and 2; its D is its C.
    void multiply() {
        const bool group = in->operation == WGMMA, in_registers = !group || in->detail & 1;
        const int depth = 256 / in->from.bits, columns = in->vector, pairs = in->from.bits == 32;
        const int row0 = group ? first_thread / 32 % 4 * 16 : 0, a_count = in_registers ? 4 : 1;
        vector<double> a(16 * depth), b(depth * columns);
        for (int lane = 0; in_registers && lane < 32; ++lane)
            for (int r = 0; r < 4; ++r)
                for (int k = 0; k < 2 - pairs; ++k) {
                    const int row = lane / 4 + 8 * (r & 1), step = pairs ? 1 : 2;
                    const int column = lane % 4 * step + depth / 2 * (r >> 1) + k;
                    const int thread = first_thread + lane;
                    a[row * depth + column] = register_element(source[r], thread, k);
                }
        for (int row = 0; !in_registers && row < 16; ++row)
            for (int k = 0; k < depth; ++k)
                a[row * depth + k] = shared_element(get(source[0], first_thread), in->detail & 2,
                                                    row0 + row, k);
        for (int column = 0; column < columns; ++column)
            for (int k = 0; k < depth; ++k) {
                const int half = depth / 2, step = pairs ? 1 : 2, inner = k % half;
                const int thread = first_thread + column * 4 + inner / step;
                b[k * columns + column] =
                    group ? shared_element(get(source[a_count], first_thread), in->detail & 4,
                                           column, k)
                          : register_element(source[4 + k / half], thread, inner % step);
            }
        for (int lane = 0; lane < 32; ++lane)
            for (int r = 0; r < columns / 2; ++r) {
                const int row = lane / 4 + 8 * (r >> 1 & 1), thread = first_thread + lane;
                const int column = 8 * (r >> 2) + 2 * (lane % 4) + (r & 1);
                const bool adds = !group || get(source[a_count + 1], thread) & 1;
                const Operand& before = group ? result[r] : source[6 + r];
                double sum = adds ? reinterpret<float>(u32(get(before, thread))) : 0;
                for (int k = 0; k < depth; ++k)
                    sum += a[row * depth + k] * b[k * columns + column];
                float rounded = sum;
                if (noise & TRUNCATED_SUMS && std::fabs(rounded) > std::fabs(sum))
                    rounded = std::nextafterf(rounded, 0);
                set(result[r], thread, reinterpret<u32>(rounded));
            }
    }

    // --- lanes and warps ------------------------------------------------------------------------

    // shfl; mode: 0 butterfly, 1 index.
    void shuffle() {
        u64 values[32];
        for (int lane = 0; lane < 32; ++lane) values[lane] = get(source[0], first_thread + lane);
        each([&](int thread) {
            const int by = get(source[1], thread);
            set(result[0], thread, values[(in->mode ? by : thread ^ by) & 31]);
        });
    }
    // redux; mode: the operation that combines two values.
    void reduce() {
        Instruction combine = *in;
        combine.operation = in->mode;
        u64 total = get(source[0], first_thread);
        for (int thread = first_thread + 1; thread < first_thread + 32; ++thread)
            total = truncate(in->type, compute(combine, total, get(source[0], thread), 0));
        each([&](int thread) { set(result[0], thread, total); });
    }

    // One instruction of a warp: of the lanes that are furthest behind. Whether the warp can go on.
    bool step(int warp) {
        first_thread = 32 * warp;
        const auto lanes = at.begin() + first_thread;
        const int place = *std::min_element(lanes, lanes + 32);
        if (place >= end) return false;
        in = &program.code[place];
        result = &program.operands[in->first];
        source = result + in->results;
        u32 together = active = 0;
        for (int lane = 0; lane < 32; ++lane) {
            if (lanes[lane] != place) continue;
            together |= 1u << lane;
            ++lanes[lane];
            const bool on = in->predicate < 0 || (reg(in->predicate, first_thread + lane) & 1)
                                                     != u64(in->unless);
            active |= u32(on) << lane;
        }
        ++report.instructions;
        const int operation = in->operation;
        const bool collective = operation >= SHFL && operation != BRA && operation < CPASYNC;
        if (collective && operation != RET && ~active)
            return fault("lanes %llx of warp %lld take part in a warp's instruction", active, warp);
        switch (operation) {
            case PARAM: {
                u64 value = 0;
                memcpy(&value, launch.parameters + source[0].immediate, in->type.bits / 8);
                each([&](int thread) { set(result[0], thread, value); });
                break;
            }
            case PACK:
                each([&](int thread) {
                    u64 value = 0;
                    for (int i = 0; i < in->sources; ++i)
                        value |= truncate(in->type, get(source[i], thread)) << in->type.bits * i;
                    set(result[0], thread, value);
                });
                break;
            case UNPACK:
                each([&](int thread) {
                    const u64 value = get(source[0], thread);
                    for (int i = 0; i < in->results; ++i)
                        set(result[i], thread, truncate(in->type, value >> in->type.bits * i));
                });
                break;
            case LOAD: case STORE: access_memory(); break;
            case LDMATRIX: case STMATRIX: move_matrices(); break;
            case CPASYNC: copy_async(); break;
            case CPCOMMIT:
                committed[warp].push_back(open[warp]);
                open[warp].clear();
                break;
            case CPWAIT: await_copies(); break;
            case MMA: case WGMMA: multiply(); break;
            case SHFL: shuffle(); break;
            case REDUX: reduce(); break;
            case BRA: each([&](int thread) { at[thread] = in->mode; }); break;
            case RET: each([&](int thread) { at[thread] = end; }); break;
            case WARPBAR: ++warp_epoch[warp]; break;
            case BAR: waits[warp] = in->mode; break;
            default: {
                const int width = operation == MULWIDE || operation == MADWIDE ? 2 : 1;
                const Type type = {in->type.kind, in->type.bits * width};
                const Type stored = operation == SETP ? Type{PREDICATE, 1}
                                    : operation == CVTPACK ? Type{BITS, 32} : type;
                each([&](int thread) {
                    u64 x[3] = {};
                    for (int i = 0; i < in->sources && i < 3; ++i) x[i] = get(source[i], thread);
                    set(result[0], thread, truncate(stored, compute(*in, x[0], x[1], x[2])));
                });
            }
        }
        return waits[warp] < 0 && !report.faults;
    }

    // Releases the warps that wait, once all that have not ended do.
    void barrier() {
        int name = -1;
        for (int warp = 0; warp < warps; ++warp) {
            if (waits[warp] < 0) fault("warp %lld has ended before a barrier of others", warp);
            else if (name >= 0 && name != waits[warp]) fault("warps wait at different barriers");
            if (waits[warp] >= 0) name = waits[warp];
            waits[warp] = -1;
            ++warp_epoch[warp];
        }
        ++block_epoch;
    }

    void run(std::mt19937& random) {
        const int64_t x = index % launch.grid[0], rest = index / launch.grid[0];
        const u64 block[] = {u64(x), u64(rest % launch.grid[1]), u64(rest / launch.grid[1])};
        for (int thread = 0; thread < threads; ++thread)
            for (int d = 0; d < 3; ++d) {
                reg(CTAID + d, thread) = block[d];
                reg(NCTAID + d, thread) = launch.grid[d];
                reg(TID + d, thread) = d ? 0 : thread;
                reg(NTID + d, thread) = d ? 1 : threads;
            }
        while (!report.faults) {
            vector<int> ready;
            bool waiting = false;
            for (int warp = 0; warp < warps; ++warp) {
                const auto lanes = at.begin() + 32 * warp;
                if (waits[warp] >= 0) waiting = true;
                else if (*std::min_element(lanes, lanes + 32) < end) ready.push_back(warp);
            }
            if (ready.empty() && !waiting) break;
            if (ready.empty()) {
                barrier();
                continue;
            }
            const int warp = ready[random() % ready.size()];
            for (int left = 1 + random() % 200; left > 0 && step(warp); --left) {}
            if (report.instructions > 4'000'000'000) fault("the program does not end");
        }
    }
};

extern "C" {
Program* ptx_program(const Instruction* code, int64_t length, const Operand* operands,
                     int64_t count, int registers) {
    return new Program{{code, code + length}, {operands, operands + count}, registers};
}

void ptx_run(const Program* program, const Launch* launch, Report* report) {
    noise = launch->noise;
    std::unordered_map<u64, BlockShadow> shadows;
    std::mt19937 random(launch->seed);
    const int64_t blocks = int64_t(launch->grid[0]) * launch->grid[1] * launch->grid[2];
    for (int64_t i = 0; i < blocks && !report->faults; ++i)
        Block{*program, *launch, *report, shadows, i}.run(random);
}
}
