// Small matrices scaled until their rows and columns sum to 1, one matrix per lane of a vector.
//
// An iteration divides by the row sums, then by the column sums. With K_ij = exp(l_ij + f_i + g_j)
// of the logits l and base potentials f and g, the iterates are
//
//     u_i = 1 / sum_j K_ij v_j        v_j = 1 / sum_i K_ij u_i        P_ij = u_i K_ij v_j
//
// The first iteration runs in the log domain and makes its potentials the base. A later iteration
// whose u or v leave a safe range is repeated in the log domain as well, and rebases its matrix.
// Lanes never mix, so the result of a matrix does not depend on its neighbours.
#pragma once

#include "workspace.h"

namespace optical {
namespace OPTICAL_ISA {
namespace {

// `fixed`: the number of rows and columns if it is known to the compiler, else 0.
template <typename T, int fixed>
struct DoublyStochastic {
    typedef Simd<T> S;
    typedef typename S::Vector Vector;
    typedef typename S::Mask Mask;
    static constexpr int width = S::width;
    static constexpr int tile = 4;     // rows that share the loads of v
    static constexpr int window = 16;  // iterations whose gradients are added at once
    static constexpr T drift = Bounds<T>::drift;

    const Matrices& batch;
    const int n, size, iterations;
    const bool backward;

    // By entry: the logits minus the maximum of their row, K, and the gradient of the logits.
    Vector *logits, *kernel, *gradient;
    // By row, then by column. `unmatched` is 1 for rows and columns without an allowed entry, whose
    // sum is 0, and 0 elsewhere: added to such a sum it yields u = 1.
    Vector *unmatched_a, *f, *grad_u, *first_grad_u;
    Vector *unmatched_b, *g, *grad_v, *column, *shift;
    Vector *us, *vs;            // u and v: two of each, or with `backward` those of every iteration
    Vector *u_grads, *v_grads;  // u and v times their gradients, of a window of iterations
    Mask* rebased;              // by iteration: the lanes that it rebased
    Vector* bases;              // by iteration: f and g before
    Mask poisoned;              // lanes with an entry that is NaN or +inf

    DoublyStochastic(const Matrices& matrices, Arena& arena)
        : batch(matrices),
          n(fixed ? fixed : (int)matrices.n),
          size(n * n),
          iterations(matrices.iterations),
          backward(matrices.grad != nullptr) {
        const int kept = backward ? iterations + 1 : 2;
        Vector** by_entry[] = {&logits, &kernel};
        for (Vector** array : by_entry) *array = arena.take<Vector>(size);
        Vector** by_row[] = {&unmatched_a, &f, &grad_u, &first_grad_u};
        for (Vector** array : by_row) *array = arena.take<Vector>(n);
        Vector** by_column[] = {&unmatched_b, &g, &grad_v, &column, &shift};
        for (Vector** array : by_column) *array = arena.take<Vector>(n);
        us = arena.take<Vector>((int64_t)kept * n), vs = arena.take<Vector>((int64_t)kept * n);
        if (!backward) return;
        gradient = arena.take<Vector>(size);
        u_grads = arena.take<Vector>(window * n), v_grads = arena.take<Vector>(window * n);
        rebased = arena.take<Mask>(kept);
        bases = arena.take<Vector>((int64_t)kept * 2 * n);
    }

    Vector* u(int k) const { return us + (int64_t)(backward ? k : k % 2) * n; }
    Vector* v(int k) const { return vs + (int64_t)(backward ? k : k % 2) * n; }
    Vector* base(int k) const { return bases + (int64_t)k * 2 * n; }

    OPTICAL_INLINE bool any(Mask lanes) { return !S::every(~lanes); }

    // Calls part(i, count) for blocks of `tile` rows, then for single rows.
    template <typename Part>
    OPTICAL_INLINE void by_tiles(int count, Part part) {
        int i = 0;
        for (; i + tile <= count; i += tile) part(i, std::integral_constant<int, tile>{});
        for (; i < count; ++i) part(i, std::integral_constant<int, 1>{});
    }

    // --------------------------------------------------------------- entries and the lanes

    // Reads matrices `first` to `first` + width - 1 of an array, entry by entry. Lanes past the
    // last matrix repeat it.
    void read(const T* from, int64_t first, Vector* to) const {
        const T* matrix[width];
        for (int lane = 0; lane < width; ++lane) {
            const int64_t index = first + lane < batch.batch ? first + lane : batch.batch - 1;
            matrix[lane] = from + index * size;
        }
        for (int e = 0; e < size; e += width) {
            const int count = size - e < width ? size - e : width;
            Vector rows[width];
            for (int lane = 0; lane < width; ++lane) {
                rows[lane] = S::all(0);
                if (count == width) rows[lane] = S::load_unaligned(matrix[lane] + e);
                else memcpy(&rows[lane], matrix[lane] + e, (size_t)count * sizeof(T));
            }
            S::transpose(rows);
            for (int k = 0; k < count; ++k) to[e + k] = rows[k];
        }
    }
    // The inverse; value(e) is entry e of every lane.
    template <typename Value>
    OPTICAL_INLINE_MEMBER void write(T* to, int64_t first, Value value) const {
        const int lanes = batch.batch - first < width ? (int)(batch.batch - first) : width;
        for (int e = 0; e < size; e += width) {
            const int count = size - e < width ? size - e : width;
            Vector rows[width];
            for (int k = 0; k < width; ++k) rows[k] = k < count ? value(e + k) : S::all(0);
            S::transpose(rows);
            for (int lane = 0; lane < lanes; ++lane) {
                T* const matrix = to + (first + lane) * size + e;
                if (count == width) S::store_unaligned(matrix, rows[lane]);
                else memcpy(matrix, &rows[lane], (size_t)count * sizeof(T));
            }
        }
    }
    // An entry of an output: NaN in poisoned lanes, and 0 for a forbidden entry.
    OPTICAL_INLINE_MEMBER Vector marked(Vector value, Vector logit) const {
        value = S::select(poisoned, S::all((T)__builtin_nan("")), value);
        return S::select(logit == -Number<T>::infinity, S::all(0), value);
    }

    // Divides the logits by the temperature and subtracts the maximum of each row, which changes
    // nothing but saves digits.
    void start(int64_t first) {
        const Vector infinity = S::all(Number<T>::infinity);
        read((const T*)batch.logits, first, logits);
        const Vector temperature = S::all((T)batch.temperature);
        Mask valid = S::all(0) == S::all(0);
        for (int j = 0; j < n; ++j) unmatched_b[j] = S::all(1);
        for (int i = 0; i < n; ++i) {
            Vector highest = -infinity;
            for (int j = 0; j < n; ++j) {
                Vector& entry = logits[i * n + j];
                if (batch.temperature != 1) entry = entry / temperature;
                const Mask usable = entry < infinity;
                valid &= usable;
                entry = S::select(usable, entry, S::all(0));
                highest = S::max(entry, highest);
                unmatched_b[j] = S::select(entry == -infinity, unmatched_b[j], S::all(0));
            }
            const Mask unmatched = highest == -infinity;
            unmatched_a[i] = S::select(unmatched, S::all(1), S::all(0));
            highest = S::select(unmatched, S::all(0), highest);
            for (int j = 0; j < n; ++j) logits[i * n + j] = logits[i * n + j] - highest;
        }
        poisoned = ~valid;
        for (int i = 0; i < n; ++i) f[i] = S::all(0), u(0)[i] = S::all(1);
        for (int j = 0; j < n; ++j) g[j] = S::all(0), v(0)[j] = S::all(1);
    }

    // ------------------------------------------------------------------------- iterations

    // exp of logits[i][j] + row + shift[j], for all j.
    template <typename Use>
    OPTICAL_INLINE_MEMBER void exp_of_row(int i, Vector row, Use use) const {
        int j = 0;
        for (; j + 4 <= n; j += 4) {
            Vector x[4];
            for (int c = 0; c < 4; ++c) x[c] = logits[i * n + j + c] + (row + shift[j + c]);
            S::template exp<4>(x);
            for (int c = 0; c < 4; ++c) use(j + c, x[c]);
        }
        for (; j < n; ++j) use(j, S::exp(logits[i * n + j] + (row + shift[j])));
    }

    // Iteration k in the log domain, for some lanes: f and g become its potentials, K its matrix.
    void rebase(int k, Mask lanes) {
        const Vector infinity = S::all(Number<T>::infinity);
        if (backward) {
            rebased[k] = lanes;
            for (int i = 0; i < n; ++i) base(k)[i] = f[i];
            for (int j = 0; j < n; ++j) base(k)[n + j] = g[j];
        }
        for (int j = 0; j < n; ++j) shift[j] = g[j] + S::log(v(k - 1)[j]);
        for (int j = 0; j < n; ++j) column[j] = S::all(0);
        for (int i = 0; i < n; ++i) {
            Vector highest = -infinity, sum = unmatched_a[i];
            for (int j = 0; j < n; ++j) highest = S::max(logits[i * n + j] + shift[j], highest);
            highest = S::select(highest == -infinity, S::all(0), highest);
            Vector* const row = grad_v;  // free outside of the reverse sweep
            exp_of_row(i, -highest, [&](int j, Vector x) { row[j] = x, sum += x; });
            f[i] = S::select(lanes, -(highest + S::log(sum)), f[i]);
            const Vector inverse = T(1) / sum;
            for (int j = 0; j < n; ++j) {
                row[j] = row[j] * inverse, column[j] = column[j] + row[j];
                kernel[i * n + j] = S::select(lanes, row[j], kernel[i * n + j]);
            }
            u(k)[i] = S::select(lanes, S::all(1), u(k)[i]);
        }
        Mask low = lanes & ~lanes;
        for (int j = 0; j < n; ++j) {
            column[j] = column[j] + unmatched_b[j];
            // Below, what a sum has lost to underflow may matter.
            low |= lanes & (column[j] < 1 / drift);
            g[j] = S::select(lanes, shift[j] - S::log(S::max(column[j], S::all(1 / drift))), g[j]);
            v(k)[j] = S::select(lanes, S::all(1), v(k)[j]);
            column[j] = S::select(lanes, T(1) / column[j], S::all(1));
        }
        for (int i = 0; i < n; ++i)
            for (int j = 0; j < n; ++j) kernel[i * n + j] = kernel[i * n + j] * column[j];
        if (any(low)) normalize_columns(low);
    }

    // g and K from the potentials f alone, each column relative to its largest entry.
    void normalize_columns(Mask lanes) {
        const Vector infinity = S::all(Number<T>::infinity);
        for (int j = 0; j < n; ++j) {
            Vector highest = -infinity, sum = unmatched_b[j];
            for (int i = 0; i < n; ++i) highest = S::max(logits[i * n + j] + f[i], highest);
            highest = S::select(highest == -infinity, S::all(0), highest);
            for (int i = 0; i < n; ++i) sum += S::exp(logits[i * n + j] + (f[i] - highest));
            g[j] = S::select(lanes, -(highest + S::log(sum)), g[j]);
        }
        restore_kernel(lanes);
    }
    void restore_kernel(Mask lanes) {
        for (int j = 0; j < n; ++j) shift[j] = g[j];
        for (int i = 0; i < n; ++i)
            exp_of_row(i, f[i], [&](int j, Vector x) {
                kernel[i * n + j] = S::select(lanes, x, kernel[i * n + j]);
            });
    }

    // Iteration k by products with K. Returns the lanes whose u and v are in a safe range.
    Mask scale(int k) {
        const Vector* const before = v(k - 1);
        Vector *const rows = u(k), *const columns = v(k), *const sums = column;
        Vector least = S::all(1), greatest = S::all(1);
        for (int j = 0; j < n; ++j) sums[j] = unmatched_b[j];
        by_tiles(n, [&](int i, auto number) {
            constexpr int count = decltype(number)::value;
            const Vector* const entries = kernel + i * n;
            Vector sum[count];
            for (int r = 0; r < count; ++r) sum[r] = unmatched_a[i + r];
            for (int j = 0; j < n; ++j) {
                const Vector x = before[j];
                for (int r = 0; r < count; ++r) sum[r] += entries[r * n + j] * x;
            }
            for (int r = 0; r < count; ++r) {
                rows[i + r] = sum[r] = T(1) / sum[r];
                least = S::min(sum[r], least), greatest = S::max(sum[r], greatest);
            }
            for (int j = 0; j < n; ++j) {
                Vector x = sums[j];
                for (int r = 0; r < count; ++r) x += entries[r * n + j] * sum[r];
                sums[j] = x;
            }
        });
        for (int j = 0; j < n; ++j) {
            const Vector x = T(1) / sums[j];
            columns[j] = x;
            least = S::min(x, least), greatest = S::max(x, greatest);
        }
        return (least >= 1 / drift) & (greatest <= drift);
    }

    void iterate() {
        rebase(1, S::all(0) == S::all(0));
        for (int k = 2; k <= iterations; ++k) {
            const Mask unsafe = ~scale(k);
            if (backward) rebased[k] = unsafe;
            if (any(unsafe)) rebase(k, unsafe);
        }
    }

    void forward(int64_t first) {
        start(first);
        iterate();
        const Vector *const rows = u(iterations), *const columns = v(iterations);
        int row = 0, j = 0;  // of the next entry
        write((T*)batch.out, first, [&](int e) {
            const Vector value = rows[row] * kernel[e] * columns[j];
            if (++j == n) j = 0, ++row;
            return marked(value, logits[e]);
        });
    }

    // ---------------------------------------------------------------------------- gradient
    //
    // With c_j and r_i the gradients of log v_j and log u_i of an iteration, and v' its previous v:
    //
    //     grad l_ij -= K_ij u_i v_j c_j + K_ij u_i v'_j r_i
    //     r_i -= sum_j K_ij u_i v_j c_j        c'_j = -sum_i K_ij u_i v'_j r_i
    //
    // The two terms of grad l are outer products of u, v' and `u_grads` = u r, `v_grads` = v c.

    void differentiate(int64_t first) {
        start(first);
        iterate();
        start_gradient(first);
        const Mask all = S::all(0) == S::all(0);
        int pending = 0;
        for (int k = iterations; k >= 1; --k) {
            reverse(k, pending++, rebased[k]);
            if (pending == window) add_pending(k, pending, all), pending = 0;
            if (!any(rebased[k])) continue;
            if (pending > 0) add_pending(k, pending, rebased[k]);
            undo(k, rebased[k]);
        }
        const Vector temperature = S::all((T)batch.temperature);
        write((T*)batch.out, first, [&](int e) {
            return marked(gradient[e] / temperature, logits[e]);
        });
    }

    // The derivative through P = u K v with fixed K, which is that of its logits.
    void start_gradient(int64_t first) {
        const Vector *const rows = u(iterations), *const columns = v(iterations);
        read((const T*)batch.grad, first, gradient);
        for (int j = 0; j < n; ++j) grad_v[j] = S::all(0);
        for (int i = 0; i < n; ++i) {
            Vector sum = S::all(0);
            for (int j = 0; j < n; ++j) {
                const int e = i * n + j;
                const Vector x = rows[i] * kernel[e] * columns[j] * gradient[e];
                gradient[e] = S::select(logits[e] == -Number<T>::infinity, S::all(0), x);
                sum += gradient[e], grad_v[j] = grad_v[j] + gradient[e];
            }
            first_grad_u[i] = sum;
        }
    }

    // From the gradient of log v of iteration k to that of iteration k - 1.
    void reverse(int k, int slot, Mask lanes) {
        const Vector *const rows = u(k), *const columns = v(k), *const before = v(k - 1);
        Vector *const u_grad = u_grads + slot * n, *const v_grad = v_grads + slot * n;
        Vector* const sums = column;
        for (int j = 0; j < n; ++j) v_grad[j] = columns[j] * grad_v[j], sums[j] = S::all(0);
        by_tiles(n, [&](int i, auto number) {
            constexpr int count = decltype(number)::value;
            const Vector* const entries = kernel + i * n;
            Vector sum[count];
            for (int r = 0; r < count; ++r) sum[r] = S::all(0);
            for (int j = 0; j < n; ++j) {
                const Vector x = v_grad[j];
                for (int r = 0; r < count; ++r) sum[r] += entries[r * n + j] * x;
            }
            for (int r = 0; r < count; ++r) {
                const Vector later = k == iterations ? first_grad_u[i + r] : S::all(0);
                grad_u[i + r] = later - rows[i + r] * sum[r];
                // In rebased lanes, K does not hold the matrix that divided by the row sums.
                sum[r] = S::select(lanes, S::all(0), rows[i + r] * grad_u[i + r]);
                u_grad[i + r] = sum[r];
            }
            for (int j = 0; j < n; ++j) {
                Vector x = sums[j];
                for (int r = 0; r < count; ++r) x += entries[r * n + j] * sum[r];
                sums[j] = x;
            }
        });
        for (int j = 0; j < n; ++j) grad_v[j] = -before[j] * sums[j];
    }

    // Adds the outer products of iterations k to k + pending - 1, the last of which is in slot 0,
    // and clears them. The other lanes keep theirs, because the order of a sum must not depend on
    // neighbours.
    void add_pending(int k, int pending, Mask lanes) {
        by_tiles(n, [&](int i, auto rows) {
            by_tiles(n, [&](int j, auto columns) {
                constexpr int height = decltype(rows)::value, length = decltype(columns)::value;
                Vector sum[height][length];
                for (int r = 0; r < height; ++r)
                    for (int c = 0; c < length; ++c) sum[r][c] = S::all(0);
                for (int slot = 0; slot < pending; ++slot) {
                    const int of = k + pending - 1 - slot;
                    const Vector *const u_now = u(of) + i, *const u_grad = u_grads + slot * n + i;
                    const Vector* const v_old = v(of - 1) + j;
                    const Vector* const v_grad = v_grads + slot * n + j;
                    for (int c = 0; c < length; ++c)
                        for (int r = 0; r < height; ++r)
                            sum[r][c] += u_now[r] * v_grad[c] + u_grad[r] * v_old[c];
                }
                for (int r = 0; r < height; ++r)
                    for (int c = 0; c < length; ++c) {
                        const int e = (i + r) * n + j + c;
                        const Vector change = kernel[e] * sum[r][c];
                        gradient[e] = gradient[e] - S::select(lanes, change, S::all(0));
                    }
            });
        });
        for (int e = 0; e < pending * n; ++e) {
            u_grads[e] = S::select(lanes, S::all(0), u_grads[e]);
            v_grads[e] = S::select(lanes, S::all(0), v_grads[e]);
        }
    }

    // The row sums of a rebased iteration, whose matrix is exp(l + f + log v') with the old g in
    // v'; then f, g and K as they were before it.
    void undo(int k, Mask lanes) {
        const Vector *const old_f = base(k), *const old_g = base(k) + n;
        for (int j = 0; j < n; ++j) shift[j] = old_g[j] + S::log(v(k - 1)[j]);
        for (int j = 0; j < n; ++j) column[j] = S::all(0);
        for (int i = 0; i < n; ++i)
            exp_of_row(i, f[i], [&](int j, Vector x) {
                const Vector change = S::select(lanes, x * grad_u[i], S::all(0));
                column[j] = column[j] + change;
                gradient[i * n + j] = gradient[i * n + j] - change;
            });
        for (int j = 0; j < n; ++j) grad_v[j] = S::select(lanes, -column[j], grad_v[j]);
        if (k == 1) return;
        for (int i = 0; i < n; ++i) f[i] = old_f[i];
        for (int j = 0; j < n; ++j) g[j] = old_g[j];
        restore_kernel(lanes);
    }
};

template <typename T, int fixed>
MatrixBlocks scale_matrices(const Matrices& batch, int64_t block, void* scratch) {
    Arena arena = {(uintptr_t)scratch};
    DoublyStochastic<T, fixed> matrices(batch, arena);
    constexpr int width = DoublyStochastic<T, fixed>::width;
    if (!scratch) return {(int64_t)arena.next, (batch.batch + width - 1) / width};
    const FlushDenormals mode;
    if (batch.grad) matrices.differentiate(block * width);
    else matrices.forward(block * width);
    return {};
}

template <typename T>
MatrixBlocks doubly_stochastic(const Matrices& batch, int64_t block, void* scratch) {
    if (batch.n == 4) return scale_matrices<T, 4>(batch, block, scratch);
    return scale_matrices<T, 0>(batch, block, scratch);
}

}  // namespace
}  // namespace OPTICAL_ISA
}  // namespace optical
