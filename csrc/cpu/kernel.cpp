// One Sinkhorn problem on one thread. Compiled once per instruction set, with OPTICAL_ISA naming
// the build and OPTICAL_VECTOR_BYTES giving its vector width.
//
// The iteration of sinkhorn.h spends an exponential per entry and half-step. The same iterates
// come from scaling: with base potentials F, G and K_ij = exp((F_i + G_j - C_ij) / epsilon),
//
//     u_i = 1 / sum_j K_ij b_j v_j        f_i = F_i + epsilon log u_i
//     v_j = 1 / sum_i K_ij a_i u_i        g_j = G_j + epsilon log v_j
//
// which is one multiply-add per entry and half-step. What makes this as safe as the log domain is
// the choice of the base: given g, take the transforms of zero temperature
//
//     F_i = min_j (C_ij - g_j)      G_j = min_i (C_ij - F_i)      v_j = exp((g_j - G_j) / epsilon)
//
// Then K <= 1, and every row and every column holds an entry that is exactly 1: in row i the
// column where the first minimum is attained, which there also attains G_j = g_j, so v_j = 1. So
// the sums of the next iteration are at least the mass of one entry: nothing overflows, and what
// underflows was invisible. The base is rebuilt when u or v has drifted past `drift`, and also
// when a sum falls outside `trusted`, where underflow could show: then the iteration is repeated.
// If a sum is outside right after a rebuild, the masses themselves are extreme (say 1e-20), and
// the problem continues in the log domain.
//
// Between rebuilds K is read from cache once per full iteration: a block of rows is multiplied
// with b v, its u follows, and the same rows, still in the first cache level, are added into the
// column sums. K is stored in that order: block, column vector, row of the block, lane.
#include "kernel.h"

#include "simd.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

// Denormal numbers cost x86 hundreds of cycles and are worth nothing here.
struct FlushDenormals {
#if defined(__x86_64__)
    const unsigned saved = __builtin_ia32_stmxcsr();
    FlushDenormals() { __builtin_ia32_ldmxcsr(saved | 0x8040); }
    ~FlushDenormals() { __builtin_ia32_ldmxcsr(saved); }
#else
    FlushDenormals() {}
#endif
};

// Bounds of u, v and the sums. An entry lost to underflow is below the least normal number, and
// weighs at most `trusted` times the mass in a sum of at least 1 / trusted: with these numbers
// that is under half a unit in the last place while the masses of a side sum to less than 2^8.
template <typename T>
struct Bounds;
template <>
struct Bounds<float> {
    static constexpr float drift = 0x1p30f, trusted = 0x1p46f;
};
template <>
struct Bounds<double> {
    static constexpr double drift = 0x1p300, trusted = 0x1p470;
};

template <typename T>
class Problem {
    typedef Simd<T> S;
    typedef typename S::Vector Vector;
    typedef typename S::Mask Mask;
    typedef Number<T> C;
    static constexpr int width = S::width;
    static constexpr int block = width > 8 ? width : 8;  // rows worked on together: hides latency
    static constexpr int groups = block / width;
    static constexpr int together = 4;  // exponentials computed side by side

    int64_t n, m;                  // present rows and columns
    int64_t row_count, col_count;  // rounded up to whole blocks and vectors
    int64_t blocks;
    T epsilon, inverse_epsilon;
    double total_a, total_b, dead_mass;  // dead: present rows without an allowed pair

    // Blocked as described above; padding costs +inf.
    T *cost, *kernel;
    // By row, then by column. `pad` is 1 where no pair is allowed, padding included, and 0
    // elsewhere: added to a sum that is 0 there, it makes u = 1 and f = 0. `weight` is the mass,
    // but 0 where pad is 1.
    T *mass_a, *log_a, *pad_a, *weight_a, *base_f, *f, *u, *u_next, *au;
    T *mass_b, *log_b, *pad_b, *weight_b, *base_g, *g, *v, *v_next, *bv, *col_sum;
    int64_t *row_index, *col_index;

    static int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

    template <typename Element>
    static Element* take(uintptr_t& next, int64_t count) {
        const uintptr_t taken = next;
        next += (uintptr_t)round_up(count * (int64_t)sizeof(Element), 64);
        return (Element*)taken;
    }

    // Hands out the memory from address `start` on; returns its end.
    uintptr_t lay_out(uintptr_t start, int64_t max_n, int64_t max_m) {
        uintptr_t next = start;
        const int64_t rows = round_up(max_n, block), cols = round_up(max_m, width);
        cost = take<T>(next, rows * cols), kernel = take<T>(next, rows * cols);
        mass_a = take<T>(next, rows), log_a = take<T>(next, rows);
        pad_a = take<T>(next, rows), weight_a = take<T>(next, rows);
        base_f = take<T>(next, rows), f = take<T>(next, rows);
        u = take<T>(next, rows), u_next = take<T>(next, rows), au = take<T>(next, rows);
        mass_b = take<T>(next, cols), log_b = take<T>(next, cols);
        pad_b = take<T>(next, cols), weight_b = take<T>(next, cols);
        base_g = take<T>(next, cols), g = take<T>(next, cols);
        v = take<T>(next, cols), v_next = take<T>(next, cols), bv = take<T>(next, cols);
        col_sum = take<T>(next, cols);
        row_index = take<int64_t>(next, rows), col_index = take<int64_t>(next, cols);
        return next;
    }

    T* tile(T* matrix, int64_t b) const { return matrix + b * block * col_count; }

    static int64_t list_present(const T* log_mass, int64_t count, int64_t* index) {
        int64_t present = 0;
        for (int64_t i = 0; i < count; ++i) {
            index[present] = i;
            present += log_mass[i] != -C::infinity;
        }
        return present;
    }

    // Gathers the masses of one side; padding gets mass 0 and log-mass 0. False: not finite.
    static bool gather_masses(const T* from, const int64_t* index, int64_t count, int64_t padded,
                              T* log_mass, T* mass, double& total) {
        for (int64_t i = 0; i < count; ++i) log_mass[i] = from[index[i]];
        for (int64_t i = count; i < padded; ++i) log_mass[i] = 0;
        for (int64_t i = 0; i < padded; i += width)
            S::store(mass + i, S::exp(S::load(log_mass + i)));
        for (int64_t i = count; i < padded; ++i) mass[i] = 0;
        total = 0;
        for (int64_t i = 0; i < count; ++i) total += (double)mass[i];
        return total - total == 0;
    }

    // Gathers the present rows and columns of the cost. False: NaN or -inf among them.
    bool gather_cost(const T* from, int64_t stride_row) {
        const bool adjacent = col_index[m - 1] - col_index[0] == m - 1;
        Mask valid = S::all(0) == S::all(0);
        for (int64_t i = 0; i < row_count; ++i) {
            T* to = tile(cost, i / block) + i % block * width;
            const T* row = i < n ? from + row_index[i] * stride_row : nullptr;
            for (int64_t j = 0; j < col_count; j += width, to += block * width) {
                Vector x = S::all(C::infinity);
                if (row && adjacent && j + width <= m) {
                    x = S::load_unaligned(row + col_index[0] + j);
                } else if (row) {
                    for (int lane = 0; lane < width && j + lane < m; ++lane)
                        x[lane] = row[col_index[j + lane]];
                }
                valid &= x > -C::infinity;
                S::store(to, x);
            }
        }
        return S::every(valid);
    }

    // Chooses the base potentials for the current g and rebuilds K and v from them; `measure`
    // rebuilds a u too, from which the stopping rule has the row sums.
    void rebase(bool first, bool measure) {
        for (int64_t b = 0; b < blocks; ++b) {
            Vector least[block];
            for (int r = 0; r < block; ++r) least[r] = S::all(C::infinity);
            const T* c = tile(cost, b);
            for (int64_t j = 0; j < col_count; j += width, c += block * width) {
                const Vector gj = S::load(g + j);
                for (int r = 0; r < block; ++r)
                    least[r] = S::min(least[r], S::load(c + r * width) - gj);
            }
            for (int q = 0; q < groups; ++q) {
                const int64_t i = b * block + q * width;
                const Vector base = S::template across<typename S::Minimum>(least + q * width);
                if (first) mark_dead(base, mass_a + i, pad_a + i, weight_a + i);
                S::store(base_f + i, S::select(S::load(pad_a + i) > 0, S::all(0), base));
            }
        }
        for (int64_t j = 0; j < col_count; j += width) S::store(base_g + j, S::all(C::infinity));
        for (int64_t b = 0; b < blocks; ++b) {
            const T* c = tile(cost, b);
            for (int64_t j = 0; j < col_count; j += width, c += block * width) {
                Vector least = S::load(base_g + j);
                for (int r = 0; r < block; ++r)
                    least = S::min(least, S::load(c + r * width) - base_f[b * block + r]);
                S::store(base_g + j, least);
            }
        }
        for (int64_t j = 0; j < col_count; j += width) {
            const Vector base = S::load(base_g + j);
            if (first) mark_dead(base, mass_b + j, pad_b + j, weight_b + j);
            const Vector kept = S::select(S::load(pad_b + j) > 0, S::all(0), base);
            const Vector scaling = S::exp((S::load(g + j) - kept) * inverse_epsilon);
            S::store(base_g + j, kept);
            S::store(v + j, scaling);
            S::store(bv + j, S::load(weight_b + j) * scaling);
        }
        for (int64_t b = 0; b < blocks; ++b) {
            const T* c = tile(cost, b);
            T* k = tile(kernel, b);
            for (int64_t j = 0; j < col_count; j += width) {
                const Vector gj = S::load(base_g + j);
                for (int r = 0; r < block; r += together, c += together * width) {
                    Vector x[together];
                    for (int i = 0; i < together; ++i) {
                        x[i] = (base_f[b * block + r + i] - S::load(c + i * width)) + gj;
                        x[i] *= inverse_epsilon;
                    }
                    S::template exp<together>(x);
                    for (int i = 0; i < together; ++i, k += width) S::store(k, x[i]);
                }
            }
        }
        // a u together: apart, with extreme masses, one could be 0 and the other infinite.
        if (measure)
            for (int64_t i = 0; i < row_count; i += width)
                S::store(au + i, row_share(i, S::load(base_f + i)));
        if (first) {
            dead_mass = 0;
            for (int64_t i = 0; i < n; ++i) dead_mass += (double)(mass_a[i] - weight_a[i]);
        }
    }

    // a exp((f - origin) / epsilon) of a vector of rows, 0 for rows without an allowed pair.
    Vector row_share(int64_t i, Vector origin) const {
        const Vector exponent = (S::load(f + i) - origin) * inverse_epsilon + S::load(log_a + i);
        return S::select(S::load(pad_a + i) > 0, S::all(0), S::exp(exponent));
    }

    // A line whose least cost is +inf has no allowed pair.
    static void mark_dead(Vector least, const T* mass, T* pad, T* weight) {
        const Mask dead = least == C::infinity;
        S::store(pad, S::select(dead, S::all(1), S::all(0)));
        S::store(weight, S::select(dead, S::all(0), S::load(mass)));
    }

    // Bit patterns of positive numbers are ordered like the numbers, and those of NaN of either
    // sign lie outside every range of them: one minimum and one maximum check a whole pass.
    struct Range {
        Mask least = (Mask)S::all(1), greatest = (Mask)S::all(1);
        __attribute__((always_inline)) void add(Vector x) {
            least = (Mask)x < least ? (Mask)x : least;
            greatest = (Mask)x > greatest ? (Mask)x : greatest;
        }
        bool within(T bound) const {
            return S::every((least >= (Mask)S::all(1 / bound)) &
                            (greatest <= (Mask)S::all(bound)));
        }
    };

    // Weighted sums of a block of rows of K; lane r of group q is row q * width + r.
    static __attribute__((always_inline)) void row_sums(const T* k, const T* weights, int64_t cols,
                                                        Vector* sum) {
        Vector line[block];
        for (int r = 0; r < block; ++r) line[r] = S::all(0);
        for (int64_t j = 0; j < cols; j += width, k += block * width) {
            const Vector weight = S::load(weights + j);
            for (int r = 0; r < block; ++r) line[r] += S::load(k + r * width) * weight;
        }
        for (int q = 0; q < groups; ++q)
            sum[q] = S::template across<typename S::Sum>(line + q * width);
    }

    // Adds a block of rows of K, each times its weight, to the column sums.
    static __attribute__((always_inline)) void add_rows(const T* k, const T* weights, int64_t cols,
                                                        T* sums) {
        Vector weight[block];
        for (int r = 0; r < block; ++r) weight[r] = S::all(weights[r]);
        for (int64_t j = 0; j < cols; j += width, k += block * width) {
            Vector sum = S::load(sums + j);
            for (int r = 0; r < block; ++r) sum += S::load(k + r * width) * weight[r];
            S::store(sums + j, sum);
        }
    }

    struct Step {
        bool rows_trusted, trusted, calm;
        double residual;
    };

    // One iteration by scaling, into u_next and v_next. A block's column pass follows the next
    // block's row pass, so that its division and broadcasts are off the critical path.
    template <bool measure>
    __attribute__((noinline)) Step iterate() {
        // Stores could change members, for all the compiler knows; not these.
        const T *const pad_of_row = pad_a, *const weight_of_row = weight_a;
        const T *const pad_of_col = pad_b, *const weight_of_col = weight_b;
        T *const new_u = u_next, *const new_v = v_next, *const row_weights = au;
        T *const col_weights = bv, *const sums = col_sum;
        const int64_t cols = col_count, count = blocks, step_size = block * col_count;
        const T* k = kernel;

        Range range;
        Vector miss = S::all(0);
        for (int64_t j = 0; j < cols; j += width) S::store(sums + j, S::all(0));
        for (int64_t b = 0; b < count; ++b, k += step_size) {
            Vector sum[groups];
            row_sums(k, col_weights, cols, sum);
            for (int q = 0; q < groups; ++q) {
                const int64_t i = b * block + q * width;
                const Vector total = sum[q] + S::load(pad_of_row + i);
                const Vector mass = S::load(weight_of_row + i);
                const Vector scaling = T(1) / total;
                range.add(total);
                if constexpr (measure)
                    miss += S::absolute(S::load(row_weights + i) * total - mass);
                S::store(new_u + i, scaling);
                S::store(row_weights + i, mass * scaling);
            }
            if (b > 0) add_rows(k - step_size, row_weights + (b - 1) * block, cols, sums);
        }
        add_rows(k - step_size, row_weights + (count - 1) * block, cols, sums);
        const Range rows = range;
        for (int64_t j = 0; j < cols; j += width) {
            const Vector total = S::load(sums + j) + S::load(pad_of_col + j);
            const Vector scaling = T(1) / total;
            range.add(total);
            S::store(new_v + j, scaling);
            S::store(col_weights + j, S::load(weight_of_col + j) * scaling);
        }
        Step step = {true, true, range.within(Bounds<T>::drift), 0};
        if (!step.calm) {
            step.rows_trusted = rows.within(Bounds<T>::trusted);
            step.trusted = range.within(Bounds<T>::trusted);
        }
        if (measure) step.residual = (double)S::sum(miss) + dead_mass;
        return step;
    }

    // The potentials of the current u and v.
    void absorb() {
        for (int64_t i = 0; i < row_count; i += width)
            S::store(f + i, S::load(base_f + i) + epsilon * S::log(S::load(u + i)));
        for (int64_t j = 0; j < col_count; j += width)
            S::store(g + j, S::load(base_g + j) + epsilon * S::log(S::load(v + j)));
    }

    // The log-domain half-step in f, into u_next; returns the row residual of the old f.
    double log_domain_rows() {
        Vector miss = S::all(0);
        for (int64_t b = 0; b < blocks; ++b) {
            Vector line[block], least[block];
            for (int r = 0; r < block; ++r) {
                least[r] = S::all(C::infinity);
                for (int64_t j = 0; j < col_count; j += width)
                    least[r] = S::min(least[r], row_exponent(b, r, j));
            }
            T origin[block];
            for (int q = 0; q < groups; ++q) {
                const int64_t i = b * block + q * width;
                const Vector x = S::template across<typename S::Minimum>(least + q * width);
                S::store_unaligned(origin + q * width,
                                   S::select(S::load(pad_a + i) > 0, S::all(0), x));
            }
            for (int r = 0; r < block; ++r) {
                line[r] = S::all(0);
                for (int64_t j = 0; j < col_count; j += width)
                    line[r] += S::exp(origin[r] - row_exponent(b, r, j));
            }
            for (int q = 0; q < groups; ++q) {
                const int64_t i = b * block + q * width;
                const Vector total =
                    S::template across<typename S::Sum>(line + q * width) + S::load(pad_a + i);
                const Vector next =
                    epsilon * (S::load_unaligned(origin + q * width) - S::log(total));
                miss += S::absolute(row_share(i, next) - S::load(weight_a + i));
                S::store(u_next + i, next);
            }
        }
        return (double)S::sum(miss) + dead_mass;
    }

    __attribute__((always_inline)) inline Vector row_exponent(int64_t b, int r, int64_t j) const {
        const Vector c = S::load(tile(cost, b) + j * block + r * width);
        return (c - S::load(g + j)) * inverse_epsilon - S::load(log_b + j);
    }

    // The log-domain half-step in g.
    void log_domain_columns() {
        for (int64_t j = 0; j < col_count; j += width) {
            Vector least = S::all(C::infinity);
            for (int64_t i = 0; i < row_count; ++i) least = S::min(least, column_exponent(i, j));
            const Vector pad = S::load(pad_b + j);
            const Vector origin = S::select(pad > 0, S::all(0), least);
            Vector total = pad;
            for (int64_t i = 0; i < row_count; ++i)
                total += S::exp(origin - column_exponent(i, j));
            S::store(g + j, epsilon * (origin - S::log(total)));
        }
    }

    __attribute__((always_inline)) inline Vector column_exponent(int64_t i, int64_t j) const {
        const Vector c = S::load(tile(cost, i / block) + j * block + i % block * width);
        return (c - f[i]) * inverse_epsilon - log_a[i];
    }

    // Puts the plan of f and g in place of K, with weights 1.
    void build_plan() {
        for (int64_t i = 0; i < row_count; ++i) au[i] = 1;
        for (int64_t j = 0; j < col_count; ++j) bv[j] = 1;
        for (int64_t b = 0; b < blocks; ++b) {
            const T* c = tile(cost, b);
            T* k = tile(kernel, b);
            for (int64_t j = 0; j < col_count; j += width)
                for (int r = 0; r < block; r += together, c += together * width) {
                    Vector x[together];
                    for (int i = 0; i < together; ++i) {
                        const int64_t row = b * block + r + i;
                        x[i] = (f[row] - S::load(c + i * width)) + S::load(g + j);
                        x[i] = x[i] * inverse_epsilon + (log_a[row] + S::load(log_b + j));
                    }
                    S::template exp<together>(x);
                    for (int i = 0; i < together; ++i, k += width) S::store(k, x[i]);
                }
        }
    }

    // Sums over the plan K_ij (a u)_i (b v)_j, finished in double precision.
    void sum_up(T& value, T& value_linear, T& marginal_error) {
        double linear = 0, dual = 0, mass = 0, error = 0;
        for (int64_t j = 0; j < col_count; j += width) S::store(col_sum + j, S::all(0));
        for (int64_t b = 0; b < blocks; ++b) {
            Vector sum[groups], spent[block];
            row_sums(tile(kernel, b), bv, col_count, sum);
            for (int r = 0; r < block; ++r) spent[r] = S::all(0);
            const T *c = tile(cost, b), *k = tile(kernel, b);
            for (int64_t j = 0; j < col_count; j += width) {
                const Vector weight = S::load(bv + j);
                for (int r = 0; r < block; ++r, c += width, k += width) {
                    // A forbidden pair costs nothing, because nothing moves there.
                    const Vector price = S::load(c);
                    const Vector finite = S::select(price < C::infinity, price, S::all(0));
                    spent[r] += (S::load(k) * weight) * finite;
                }
            }
            add_rows(tile(kernel, b), au + b * block, col_count, col_sum);
            for (int q = 0; q < groups; ++q) {
                T sums[width], spends[width];
                S::store_unaligned(sums, sum[q]);
                S::store_unaligned(spends, S::template across<typename S::Sum>(spent + q * width));
                const int64_t first = b * block + q * width;
                for (int lane = 0; lane < width && first + lane < n; ++lane) {
                    const int64_t i = first + lane;
                    const double row = (double)au[i] * (double)sums[lane];
                    linear += (double)au[i] * (double)spends[lane];
                    dual += row * (double)f[i];
                    mass += row;
                    error += __builtin_fabs(row - (double)mass_a[i]);
                }
            }
        }
        for (int64_t j = 0; j < m; ++j) {
            const double column = (double)bv[j] * (double)col_sum[j];
            dual += column * (double)g[j];
            error += __builtin_fabs(column - (double)mass_b[j]);
        }
        value = (T)(dual + (double)epsilon * (total_a * total_b - mass));
        value_linear = (T)linear;
        marginal_error = (T)error;
    }

    // Iterates from f = g = 0; returns the number of iterations.
    template <bool measure>
    int32_t solve(int32_t max_iter, double tol) {
        bool log_domain = false;
        bool scaled = false;   // the state is base, u and v; otherwise it is f and g
        bool drifted = true;   // the base has to be chosen anew before the next iteration
        int32_t done = 0;
        while (done < max_iter) {
            if (log_domain) {
                const double residual = log_domain_rows();
                if (measure && done > 0 && residual <= tol) break;
                T* next = u_next;
                u_next = f, f = next;
                log_domain_columns();
                ++done;
                continue;
            }
            if (drifted) {
                if (scaled) absorb();
                rebase(done == 0, measure && done > 0);
                scaled = drifted = false;
            }
            const Step step = iterate<measure>();
            if (measure && done > 0 && step.rows_trusted && step.residual <= tol) break;
            if (step.trusted) {
                T *next_u = u_next, *next_v = v_next;
                u_next = u, u = next_u;
                v_next = v, v = next_v;
                scaled = true;
                ++done;
            } else if (!scaled) {
                log_domain = true;
            }
            drifted = !step.calm;
        }
        if (scaled) {
            absorb();
            for (int64_t i = 0; i < row_count; ++i) au[i] = weight_a[i] * u[i];
            for (int64_t j = 0; j < col_count; ++j) bv[j] = weight_b[j] * v[j];
        } else {
            build_plan();
        }
        return done;
    }

public:
    static int64_t scratch_bytes(int64_t n, int64_t m) {
        Problem sizing;
        return (int64_t)sizing.lay_out(0, n, m);
    }

    static void forward(const ForwardArguments<T>& arguments, int64_t problem, void* scratch) {
        const FlushDenormals mode;
        const int64_t full_n = arguments.n, full_m = arguments.m;
        const T* log_a_in = arguments.log_a + problem * full_n;
        const T* log_b_in = arguments.log_b + problem * full_m;
        T* f_out = arguments.f + problem * full_n;
        T* g_out = arguments.g + problem * full_m;
        T& value = arguments.value[problem];
        T& value_linear = arguments.value_linear[problem];
        T& marginal_error = arguments.marginal_error[problem];
        int32_t& n_iter = arguments.n_iter[problem];

        Problem p;
        p.lay_out((uintptr_t)scratch, full_n, full_m);
        p.n = list_present(log_a_in, full_n, p.row_index);
        p.m = list_present(log_b_in, full_m, p.col_index);
        p.row_count = round_up(p.n, block), p.col_count = round_up(p.m, width);
        p.blocks = p.row_count / block;
        for (int64_t i = 0; i < full_n; ++i) f_out[i] = 0;
        for (int64_t j = 0; j < full_m; ++j) g_out[j] = 0;
        value = value_linear = marginal_error = 0;
        n_iter = 0;
        if (p.n == 0 || p.m == 0) return;

        p.epsilon = arguments.epsilon[problem];
        p.inverse_epsilon = 1 / p.epsilon;
        bool valid = p.epsilon > 0 && p.epsilon < C::infinity && p.inverse_epsilon < C::infinity;
        valid &= gather_masses(log_a_in, p.row_index, p.n, p.row_count, p.log_a, p.mass_a,
                               p.total_a);
        valid &= gather_masses(log_b_in, p.col_index, p.m, p.col_count, p.log_b, p.mass_b,
                               p.total_b);
        const T* cost_in = arguments.cost + problem * arguments.cost_stride_batch;
        valid &= p.gather_cost(cost_in, arguments.cost_stride_row);
        for (int64_t i = 0; i < p.row_count; ++i) p.f[i] = 0;
        for (int64_t j = 0; j < p.col_count; ++j) p.g[j] = 0;
        if (valid) {
            n_iter = arguments.tol > 0 ? p.template solve<true>(arguments.max_iter, arguments.tol)
                                       : p.template solve<false>(arguments.max_iter, 0);
            p.sum_up(value, value_linear, marginal_error);
        } else {
            const T nan = (T)__builtin_nan("");
            value = value_linear = marginal_error = nan;
            n_iter = arguments.max_iter;
            for (int64_t i = 0; n_iter > 0 && i < p.n; ++i) p.f[i] = nan;
            for (int64_t j = 0; n_iter > 0 && j < p.m; ++j) p.g[j] = nan;
        }
        for (int64_t i = 0; i < p.n; ++i) f_out[p.row_index[i]] = p.f[i];
        for (int64_t j = 0; j < p.m; ++j) g_out[p.col_index[j]] = p.g[j];
    }

    static void backward(const BackwardArguments<T>& arguments, int64_t problem, void*) {
        const FlushDenormals mode;
        const int64_t n = arguments.n, m = arguments.m;
        const T* log_b = arguments.log_b + problem * m;
        const T* g = arguments.g + problem * m;
        const T inverse_epsilon = 1 / arguments.epsilon[problem];
        const T upstream = arguments.grad_value[problem] + arguments.grad_value_linear[problem];
        for (int64_t i = 0; i < n; ++i) {
            T* to = arguments.grad_cost + (problem * n + i) * m;
            const T log_a = arguments.log_a[problem * n + i];
            if (log_a == -C::infinity) {
                for (int64_t j = 0; j < m; ++j) to[j] = 0;
                continue;
            }
            const T f = arguments.f[problem * n + i];
            const T* cost = arguments.cost + problem * arguments.cost_stride_batch +
                            i * arguments.cost_stride_row;
            const auto gradient = [&](Vector c, Vector gj, Vector log_bj) {
                const Vector exponent = ((f - c) + gj) * inverse_epsilon + (log_a + log_bj);
                return S::select(log_bj == -C::infinity, S::all(0), S::exp(exponent) * upstream);
            };
            int64_t j = 0;
            for (; j + width <= m; j += width)
                S::store_unaligned(to + j, gradient(S::load_unaligned(cost + j),
                                                    S::load_unaligned(g + j),
                                                    S::load_unaligned(log_b + j)));
            if (j < m) {
                Vector c = S::all(0), gj = S::all(0), log_bj = S::all(-C::infinity);
                for (int lane = 0; j + lane < m; ++lane) {
                    c[lane] = cost[j + lane];
                    gj[lane] = g[j + lane];
                    log_bj[lane] = log_b[j + lane];
                }
                const Vector tail = gradient(c, gj, log_bj);
                for (int lane = 0; j + lane < m; ++lane) to[j + lane] = tail[lane];
            }
        }
    }
};

}  // namespace
}  // namespace OPTICAL_ISA

#define OPTICAL_NAME(isa) OPTICAL_JOIN(kernels_, isa)
#define OPTICAL_JOIN(left, right) left##right
#define OPTICAL_TEXT(name) OPTICAL_QUOTE(name)
#define OPTICAL_QUOTE(name) #name

extern const Kernels OPTICAL_NAME(OPTICAL_ISA) = {
    OPTICAL_TEXT(OPTICAL_ISA),
    {OPTICAL_ISA::Problem<float>::scratch_bytes, OPTICAL_ISA::Problem<float>::forward,
     OPTICAL_ISA::Problem<float>::backward},
    {OPTICAL_ISA::Problem<double>::scratch_bytes, OPTICAL_ISA::Problem<double>::forward,
     OPTICAL_ISA::Problem<double>::backward}};

}  // namespace optical
