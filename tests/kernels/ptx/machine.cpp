// A machine for PTX: runs the clusters of a grid one after another, with the memory of the host.
//
// Warps are interleaved at random between barriers. Every byte of memory that threads share records
// who touched it and when: two threads race if one of them writes, the byte changes, and they have
// not met at a barrier since. Lanes of one warp meet at barriers only, clusters never. Accesses
// must be aligned and stay within the tensors of the launch, shared memory, or the stack.
//
// Not modelled: the asynchronous proxy (wgmma reads its operands where it is issued, and cp.async
// reads global memory there), TMA, mbarriers, atomics.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "arithmetic.h"

using std::vector;

struct Operand { int64_t reg; u64 immediate; };
struct Access { u32 thread, time; };  // threads count from 1; 0: none
struct Shadow { Access write, first_read, last_read; };
struct Region { u64 from, to; unsigned char* host; Shadow* shadow; };  // addresses and their memory
struct Copy { u64 to; int bytes, thread, group; unsigned char data[16]; };
struct Report { int64_t races, faults, instructions; char text[4096]; };
struct Launch {
    const Instruction* code;
    int64_t length;
    const Operand* operands;
    int64_t register_count, grid[3], blocks, threads, shared, stack, seed, noise;
    unsigned char* parameters;
    int64_t parameter_bytes;
    const u64* tensors;  // first address and end of each
    int64_t tensor_count;
};

// Memory other than that of the host is mapped here. Shared memory of a block begins at an offset:
// the runtime keeps the bytes below for itself.
constexpr u64 SHARED_AT = u64(1) << 60, STACK_AT = u64(2) << 60, PARAMETERS_AT = u64(3) << 60;
constexpr u64 WINDOW = 1 << 24, SHARED_ORIGIN = 1024;

// The blocks of a cluster, which run together. A launch without clusters has one block in each.
struct Cluster {
    const Launch& launch;
    Report& report;
    const vector<Region>& tensors;
    const int64_t index;
    const int threads = launch.threads, blocks = launch.blocks, size = threads * blocks;
    const int warps = size / 32, end = launch.length;
    const u64 block_bytes = SHARED_ORIGIN + launch.shared;
    vector<u64> registers = vector<u64>(launch.register_count * size, 0xdeadbeefdeadbeef);
    // Memory that nothing has written is NaN.
    vector<unsigned char> shared = vector<unsigned char>(block_bytes * blocks, 0xff);
    vector<unsigned char> stack = vector<unsigned char>(launch.stack * size, 0xff);
    vector<Shadow> shadows = vector<Shadow>(shared.size());
    // Of each thread its place in the program, of each warp the barrier that it waits at.
    vector<int> at = vector<int>(size), waits = vector<int>(warps), votes = vector<int>(blocks);
    vector<vector<Copy>> copies = vector<vector<Copy>>(warps);
    vector<int> groups = vector<int>(warps);
    // When two lanes of a warp, the threads of a block, and all threads met last.
    vector<u32> lanes_met = vector<u32>(32 * size), block_met = vector<u32>(blocks);
    u32 cluster_met = 0;

    // The instruction that a warp carries out, and its lanes that do.
    const Instruction* in = nullptr;
    const Operand *result = nullptr, *source = nullptr;
    int first_thread = 0;
    u32 active = 0;

    template <class... Values> bool say(int64_t& count, const char* what, Values... values) {
        const size_t used = strlen(report.text), left = sizeof report.text - used;
        if (++count > 6 || left < 256) return false;
        const int line = snprintf(report.text + used, left, "line %d: ", in ? in->line : 0);
        snprintf(report.text + used + line, left - line - 1, what, values...);
        strcat(report.text, "\n");
        return false;
    }

    u64& reg(int64_t number, int thread) { return registers[number * size + thread]; }
    u64 get(const Operand& x, int thread) { return x.reg < 0 ? x.immediate : reg(x.reg, thread); }
    void set(const Operand& x, int thread, u64 value) {
        if (x.reg >= 0) reg(x.reg, thread) = low_bits(value, in->to.bits);
    }
    template <class Function> void each(Function f) {
        for (int lane = 0; lane < 32; ++lane)
            if (active >> lane & 1) f(first_thread + lane);
    }

    // --- memory ---------------------------------------------------------------------------------

    bool concurrent(const Access& other, u32 thread) const {
        if (!other.thread || other.thread == thread) return false;
        const u32 first = other.thread - 1, second = thread - 1, local = second % size;
        if (first / size != second / size) return true;
        u32 met = cluster_met;
        if (first / threads == second / threads) met = std::max(met, block_met[local / threads]);
        if (first / 32 == second / 32) met = std::max(met, lanes_met[32 * local + first % 32]);
        return other.time >= met;
    }
    void touch(Shadow& shadow, u32 thread, bool write, const char* space) {
        const Access now = {thread, u32(report.instructions)};
        const Access* other = concurrent(shadow.write, thread) ? &shadow.write : nullptr;
        if (write && concurrent(shadow.first_read, thread)) other = &shadow.first_read;
        if (write && concurrent(shadow.last_read, thread)) other = &shadow.last_read;
        if (other)
            say(report.races, "threads %u and %u of blocks %u and %u race in %s memory",
                (other->thread - 1) % threads, (thread - 1) % threads,
                (other->thread - 1) / threads, (thread - 1) / threads, space);
        if (write) shadow.write = now;
        else if (concurrent(shadow.first_read, thread)) shadow.last_read = now;
        else shadow.first_read = now;
    }
    // Where an address is mapped: its region, or one without memory.
    Region region(u64 address) {
        const u64 parameters_end = PARAMETERS_AT + launch.parameter_bytes;
        if (address >= PARAMETERS_AT)
            return {PARAMETERS_AT, parameters_end, launch.parameters, nullptr};
        if (address >= STACK_AT) return {STACK_AT, STACK_AT + stack.size(), stack.data(), nullptr};
        if (address >= SHARED_AT) {
            const u64 rank = (address - SHARED_AT) / WINDOW, from = SHARED_AT + rank * WINDOW;
            if (rank >= u64(blocks) || address < from + SHARED_ORIGIN) return {};
            const u64 first = rank * block_bytes;
            return {from, from + block_bytes, &shared[first], &shadows[first]};
        }
        const auto after = [](u64 x, const Region& tensor) { return x < tensor.from; };
        const auto next = std::upper_bound(tensors.begin(), tensors.end(), address, after);
        return next == tensors.begin() ? Region{} : next[-1];
    }
    // Every access of a thread to memory. Returns false, with a report, where it is not allowed.
    bool access(int thread, u64 address, int bytes, void* data, bool write) {
        const Region place = region(address);
        const bool is_global = address < SHARED_AT, is_shared = !is_global && address < STACK_AT;
        const char* space = is_global ? "global" : is_shared ? "shared" : "other";
        if (address % bytes)
            return say(report.faults, "%llx in %s memory is not aligned", address, space);
        if (address < place.from || address + bytes > place.to)
            return say(report.faults, "thread %d is outside every tensor, at %llx in %s memory",
                       thread, address, space);
        unsigned char* const host = place.host + (address - place.from);
        // Storing what is there already is no race: lanes may hold copies of one value.
        if (write && !memcmp(host, data, bytes)) return true;
        for (int i = 0; place.shadow && i < bytes; ++i)
            touch(place.shadow[address - place.from + i], index * size + thread + 1, write, space);
        write ? memcpy(host, data, bytes) : memcpy(data, host, bytes);
        return true;
    }
    // Three operands give an address: the base of the memory, a register and an offset.
    u64 address(const Operand* from, int thread) {
        const u64 offset = get(from[1], thread) + from[2].immediate;
        return from[0].reg < 0 ? offset : get(from[0], thread) + u32(offset);
    }

    // ld and st of one or several values; those of st follow the address.
    void load_or_store() {
        const bool write = in->operation == STORE;
        const int bytes = in->type.bits / 8, count = write ? in->sources - 3 : in->results;
        each([&](int thread) {
            u64 data[2] = {};
            for (int i = 0; write && i < count; ++i) {
                const u64 value = get(source[3 + i], thread);
                memcpy((char*)data + i * bytes, &value, bytes);
            }
            if (!access(thread, address(source, thread), bytes * count, data, write)) return;
            for (int i = 0; i < in->results; ++i) {
                u64 value = 0;
                memcpy(&value, (char*)data + i * bytes, bytes);
                set(result[i], thread, u64(integer(in->type, value)));
            }
        });
    }
    // ldmatrix and stmatrix of 8 x 8 matrices of 16 bits, one row per address of eight lanes each.
    // A lane holds two neighbours of a row, or with `mode` of a column.
    void move_matrices() {
        const bool write = in->operation == STMATRIX;
        for (int item = 0; item < 32 * (write ? in->sources - 4 : in->results); ++item) {
            const int lane = item % 32, matrix = item / 32, thread = first_thread + lane;
            u32 pair = write ? get(source[3 + matrix], thread) : 0;
            for (int k = 0; k < 2; ++k) {
                const int along = 2 * (lane % 4) + k, across = lane / 4;
                const int row = in->mode ? along : across, column = in->mode ? across : along;
                const u64 start = address(source, first_thread + 8 * matrix + row);
                if (start % 16) say(report.faults, "the row at %llx is not aligned", start);
                access(thread, start + 2 * column, 2, (char*)&pair + 2 * k, write);
            }
            if (!write) set(result[matrix], thread, pair);
        }
    }
    // cp.async: to, from, bytes, and how many of them exist. They arrive when their group is
    // awaited and are NaN until then.
    void copy_async() {
        each([&](int thread) {
            const int bytes = get(source[6], thread), warp = thread / 32;
            Copy copy = {address(source, thread), bytes, thread, groups[warp], {}};
            unsigned char missing[16];
            memset(missing, 0xff, sizeof missing);
            const int present = get(source[7], thread);
            if (!present || access(thread, address(source + 3, thread), present, copy.data, false))
                if (access(thread, copy.to, bytes, missing, true)) copies[warp].push_back(copy);
        });
    }
    // Completes the groups of a warp but the last ones; if but -1: and what is in no group yet.
    void await_copies(int warp) {
        const int last = groups[warp] - int(source[0].immediate);
        for (Copy& copy : copies[warp])
            if (copy.group < last) access(copy.thread, copy.to, copy.bytes, copy.data, true);
        std::erase_if(copies[warp], [&](const Copy& copy) { return copy.group < last; });
    }

    // --- tensor cores ---------------------------------------------------------------------------

    // Where element (outer, k) of an operand of wgmma is in shared memory, by its descriptor. Rows
    // of K, or with `transposed` of the other dimension, are swizzled in units of 16 bytes.
    u64 wgmma_address(u64 descriptor, bool transposed, int outer, int k, int bytes) {
        const u32 start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
        const u32 stride = (descriptor >> 32 & 0x3fff) << 4, swizzle = descriptor >> 62 & 3;
        const u32 row = swizzle ? 256 >> swizzle : 16;
        const u32 along = (transposed ? outer : k) * bytes, across = transposed ? k : outer;
        u32 place = start + across / 8 * stride + across % 8 * row;
        place += along / row * leading + along % row;
        if (swizzle) place ^= (place >> 7 & ((16 >> swizzle) - 1)) << 4;
        return reg(SHARED, first_thread) + place;
    }
    // Element (outer, k) of A or B: in registers, of which each holds its part of eight rows, of
    // `tiles` times eight rows in all; or, with bit 0 of `where`, in shared memory (1: transposed).
    double element(const Operand* from, int tiles, int where, int outer, int k) {
        const int bits = in->type.bits, packed = 32 / bits, half = 4 * packed;
        u32 value = 0;
        if (where & 1) {
            const u64 descriptor = get(*from, first_thread);
            const u64 place = wgmma_address(descriptor, where & 2, outer, k, bits / 8);
            access(first_thread, place, bits / 8, &value, false);
        } else {
            const int lane = outer % 8 * 4 + k % half / packed;
            value = get(from[outer / 8 + tiles * (k / half)], first_thread + lane);
            value >>= bits * (k % packed) % 32;
        }
        return real(in->type, value);
    }
    // D = A B + C of 16 rows per warp and 8 columns per four results, exact until it is rounded to
    // float32. `mode` says where A (2 bits) and B (2 bits) are. The sources are those of A, of B,
    // the predicate that adds C, and C.
    void multiply() {
        const int depth = 256 / in->type.bits, columns = 2 * in->results;
        const int where_a = in->mode & 3, where_b = in->mode >> 2;
        const int first_row = where_a ? first_thread / 32 % 4 * 16 : 0;
        const Operand *of_b = source + (where_a ? 1 : 4), *adds = of_b + (where_b ? 1 : 2);
        vector<double> a(16 * depth), b(columns * depth);
        for (int i = 0; i < 16 * depth; ++i)
            a[i] = element(source, 2, where_a, first_row + i / depth, i % depth);
        for (int i = 0; i < columns * depth; ++i)
            b[i] = element(of_b, 1, where_b, i / depth, i % depth);
        for (int i = 0; i < 16 * columns; ++i) {
            const int row = i / columns, column = i % columns;
            const int thread = first_thread + row % 8 * 4 + column % 8 / 2;
            const int r = column / 8 * 4 + row / 8 * 2 + column % 2;
            const u32 before = get(*adds, thread) & 1 ? get(adds[1 + r], thread) : 0;
            double sum = reinterpret<float>(before);
            for (int k = 0; k < depth; ++k) sum += a[row * depth + k] * b[column * depth + k];
            float rounded = sum;
            if (noise & TRUNCATED_SUMS && std::fabs(rounded) > std::fabs(sum))
                rounded = std::nextafterf(rounded, 0);
            set(result[r], thread, reinterpret<u32>(rounded));
        }
    }

    // --- lanes and warps ------------------------------------------------------------------------

    // shfl of a value, by a lane or with `mode` a mask of lanes, within the segments of a warp that
    // the third operand describes.
    void shuffle() {
        u64 values[32];
        each([&](int thread) { values[thread % 32] = get(source[0], thread); });
        each([&](int thread) {
            const u32 by = get(source[1], thread), segment = get(source[2], thread);
            const int lane = thread % 32, fixed = segment >> 8 & 31, clamp = segment & 31;
            const int last = (lane & fixed) | (clamp & ~fixed);
            int from = in->mode ? lane ^ by : (lane & fixed) | (by & 31 & ~fixed);
            if (from > last) from = lane;
            if (!(active >> from & 1)) say(report.faults, "lane %d is not there to shuffle", from);
            set(result[0], thread, values[from]);
        });
    }
    // redux and vote: `mode` is the operation that combines the values of all lanes of a mask.
    void reduce() {
        Instruction combine = *in;
        combine.operation = in->mode;
        u64 totals[32];
        each([&](int thread) {
            const u32 mask = get(source[1], thread);
            const int first = std::countr_zero(mask);
            u64& total = totals[thread % 32] = get(source[0], first_thread + first);
            for (int lane = first + 1; lane < 32; ++lane) {
                const u64 value = get(source[0], first_thread + lane);
                const u64 operands[] = {total, in->mode == FMA ? 1 : value, value};
                if (mask >> lane & 1) total = compute(combine, operands);
            }
        });
        each([&](int thread) { set(result[0], thread, totals[thread % 32]); });
    }
    // Barriers. That of a block may collect the votes of its threads.
    void meet(int warp) {
        each([&](int thread) {
            const u32 mask = get(source[in->sources - 1], thread);
            for (int lane = 0; lane < 32; ++lane)
                if (mask >> lane & 1) lanes_met[32 * thread + lane] = report.instructions;
            if (in->sources > 1) votes[thread / threads] |= get(source[0], thread);
        });
        if (in->operation != MEET_LANES) waits[warp] = in->operation;
    }
    // Lets the warps of a block, or of all, go on if all of them that have not ended wait.
    bool release(int block, int first, int stop, int barrier) {
        int waiting = 0;
        for (int warp = first; warp < stop; ++warp) {
            if (waits[warp] != barrier && at[32 * warp] < end) return false;
            waiting += waits[warp] == barrier;
        }
        std::fill(&waits[first], &waits[first] + (stop - first), 0);
        (barrier == MEET_BLOCK ? block_met[block] : cluster_met) = report.instructions;
        for (int i = 32 * first; i < 32 * stop; ++i) reg(VOTE, i) = votes[block];
        votes[block] = 0;
        return waiting;
    }

    // The lanes at a place that can carry out its instruction now: an instruction of several lanes
    // waits for all lanes of its mask. Writes the lanes at the place to `together`.
    u32 lanes_at(int place, u32& together) {
        in = &launch.code[place];
        result = &launch.operands[in->first], source = result + in->results;
        u32 enabled = together = 0;
        for (int lane = 0; lane < 32; ++lane) {
            if (at[first_thread + lane] != place) continue;
            together |= 1u << lane;
            const bool on = in->predicate < 0 || (reg(in->predicate, first_thread + lane) & 1)
                                                     != u64(in->unless);
            enabled |= u32(on) << lane;
        }
        if (in->operation < SHUFFLE) return enabled;
        u32 ready = 0;
        for (int lane = 0; lane < 32; ++lane) {
            const u32 mask = get(source[in->sources - 1], first_thread + lane);
            if (enabled >> lane & 1 && !(mask & ~enabled)) ready |= 1u << lane;
        }
        if (enabled && !ready) together = 0;
        else together &= ~enabled | ready;
        return ready;
    }
    // One instruction of a warp: of the lanes furthest behind that can go on. Whether the warp can.
    bool step(int warp) {
        first_thread = 32 * warp;
        u32 together = 0;
        for (int place = -1; !together;) {
            int next = end;
            for (int lane = 0; lane < 32; ++lane)
                if (const int x = at[first_thread + lane]; x > place) next = std::min(next, x);
            if (next == end && place < 0) return false;
            if (next == end) return say(report.faults, "warp %d waits for lanes elsewhere", warp);
            active = lanes_at(place = next, together);
        }
        for (int lane = 0; lane < 32; ++lane) at[first_thread + lane] += together >> lane & 1;
        ++report.instructions;
        switch (in->operation) {
            case LOAD: case STORE: load_or_store(); break;
            case JUMP: each([&](int thread) { at[thread] = get(source[0], thread); }); break;
            case COPY: copy_async(); break;
            case COMMIT: ++groups[warp]; break;
            case AWAIT: await_copies(warp); break;
            case SHUFFLE: shuffle(); break;
            case REDUCE: reduce(); break;
            case MEET_LANES: case MEET_BLOCK: case MEET_CLUSTER: meet(warp); break;
            case MULTIPLY: if (active) multiply(); break;
            case LDMATRIX: case STMATRIX: if (active) move_matrices(); break;
            default:
                each([&](int thread) {
                    u64 raw[4] = {};
                    for (int i = 0; i < in->sources; ++i) raw[i] = get(source[i], thread);
                    set(result[0], thread, compute(*in, raw));
                });
        }
        return !waits[warp] && !report.faults;
    }

    void run(std::mt19937& random) {
        for (int thread = 0; thread < size; ++thread) {
            const int64_t rank = thread / threads, block = index * blocks + rank;
            const int64_t x = launch.grid[0], y = launch.grid[1];
            const u64 values[] = {
                u64(block % x), u64(block / x % y), u64(block / x / y), u64(x), u64(y),
                u64(launch.grid[2]), u64(thread % threads), u64(threads), u64(rank), u64(blocks), 0,
                SHARED_AT + rank * WINDOW, STACK_AT + u64(thread) * launch.stack};
            for (int i = CTAID_X; i <= STACK; ++i) reg(i, thread) = values[i];
        }
        while (!report.faults) {
            vector<int> ready;
            bool ended = true, released = false;
            for (int warp = 0; warp < warps; ++warp) {
                const auto lanes = at.begin() + 32 * warp;
                const bool runs = *std::min_element(lanes, lanes + 32) < end;
                if (runs && !waits[warp]) ready.push_back(warp);
                ended &= !runs && !waits[warp];
            }
            if (ended) return;
            const int each = warps / blocks;
            for (int i = 0; ready.empty() && i < blocks; ++i)
                released |= release(i, i * each, (i + 1) * each, MEET_BLOCK);
            if (ready.empty() && !released && !release(0, 0, warps, MEET_CLUSTER))
                say(report.faults, "warps wait at a barrier that others do not reach");
            if (ready.empty()) continue;
            const int warp = ready[random() % ready.size()];
            for (int left = 1 + random() % 200; left > 0 && step(warp); --left) {}
            if (report.instructions > 4'000'000'000) say(report.faults, "the program does not end");
        }
    }
};

extern "C" void ptx_run(const Launch* launch, Report* report) {
    noise = launch->noise;
    u64 bytes = 0;
    const u64 *first = launch->tensors, *last = first + 2 * launch->tensor_count;
    for (const u64* x = first; x < last; x += 2) bytes += x[1] - x[0];
    // The system gives memory, which is zero, only to what is touched.
    Shadow *const shadows = (Shadow*)calloc(bytes + 1, sizeof(Shadow)), *next = shadows;
    vector<Region> tensors;
    for (const u64* x = first; x < last; next += x[1] - x[0], x += 2)
        tensors.push_back({x[0], x[1], (unsigned char*)x[0], next});
    std::mt19937 random(launch->seed);
    const int64_t clusters = launch->grid[0] * launch->grid[1] * launch->grid[2] / launch->blocks;
    for (int64_t i = 0; i < clusters && !report->faults; ++i)
        Cluster{*launch, *report, tensors, i}.run(random);
    free(shadows);
}
