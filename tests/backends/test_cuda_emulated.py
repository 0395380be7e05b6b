"""The CUDA kernels on the CPU, under the thread emulator of ``tests/cuda_emulator``.

The tests build the same sources with the C++ compiler. Emulated threads switch at barriers and
shuffles, in an order drawn from a seed, and shared memory starts as NaN: a race gives a wrong
result under some order, and a deadlock is reported. ``test_cuda_build.py`` checks registers and
instructions, which the emulator cannot show.
"""

import ctypes
import itertools
import math
from dataclasses import replace

import pytest
import torch

from optical.backends import cuda, library, nvrtc, structs
from optical.backends.problem import GRADIENTS, Status
from optical.ot import sinkhorn_vectors
from optical.testing.cases import all_cases, packed, poisoned, random_case, random_vector_case
from optical.testing.tolerance import FIELDS, assert_backend_correct, assert_close_to_truth, solve
from tests.cuda_emulator.build import build, use
from tests.kernels.failing import (
    MALFORMED,
    RELAXED,
    assert_masses_are_optional,
    assert_unused_is_zero,
    errors_of_iterates,
    malformed,
    mixed,
    overflowing,
    own_entries,
)

ALL = {problem.name: problem for problem in all_cases()}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return library.open_library(build(tmp_path_factory.mktemp("host"), "-O1", "-Werror"), None)


@pytest.fixture(params=["rounded", pytest.param("pessimistic", marks=pytest.mark.slow)])
def kernels(compiled, monkeypatch, request):
    """The emulated library, with rounded and with pessimistic arithmetic."""
    use(compiled, monkeypatch.setattr)
    compiled.optical_emulator_seed(1)
    compiled.optical_emulator_arithmetic(request.param == "pessimistic")
    yield compiled
    compiled.optical_emulator_arithmetic(0)
    compiled.optical_emulator_device(227 << 10, 8)
    compiled.optical_emulator_withhold(0)
    cuda._fits.cache_clear()


def skip_unless_supported(problem, gradient):
    reason = cuda.supports(problem.to(torch.float32).problem(gradient))
    if reason is not None:
        pytest.skip(reason=reason)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", ALL)
def test_every_problem_within_tolerance(name, gradient, kernels, poisoned_memory):
    problem = ALL[name]
    if len(problem.epsilon) > 100:
        problem = replace(problem, **{k: getattr(problem, k)[:99] for k in ("x", "log_a", "log_b")})
        problem = replace(problem, epsilon=problem.epsilon[:99])
    skip_unless_supported(problem, gradient)
    assert_backend_correct("cuda", problem, torch.float32, gradients=(gradient,))


# One size per regime: a warp of either tile, blocks of two to eight warps, clusters of two to eight
# blocks.
SHAPES = [(5, 33), (65, 7), (3, 129), (128, 100), (70, 250), (130, 200), (513, 5), (140, 400)]
LARGE = [(1025, 3), (300, 500), (512, 512)]


@pytest.mark.parametrize("kind", ["given", "cosine"])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_every_regime(n, m, gradient, kind, kernels):
    options = {"rows": [n - n // 5], "columns": [m - m // 4], "max_iter": 3}
    problem = random_case(f"{n}x{m}", 1, n, m, **options)
    if kind == "cosine":
        problem = random_vector_case(f"{n}x{m}", kind, batch=1, n=n, m=m, dim=19, **options)
    skip_unless_supported(problem, gradient)
    assert_backend_correct("cuda", problem, torch.float32, gradients=(gradient,))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["given", "cosine", "sqeuclidean", "dot"])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(("n", "m"), LARGE)
def test_clusters_of_many_blocks(n, m, gradient, kind, kernels):
    problem = random_case(f"{n}x{m}", 1, n, m, max_iter=3)
    if kind != "given":
        options = {"dim": 17, "max_iter": 3, "epsilon": 1.0}
        problem = random_vector_case(f"{n}x{m}", kind, batch=1, n=n, m=m, **options)
    skip_unless_supported(problem, gradient)
    assert_backend_correct("cuda", problem, torch.float32, gradients=(gradient,))


# Cases of every regime, cost and mode that are quick; the slow tests run all others.
PESSIMISTIC = ["ragged", "rho_strong", "rho_weak", "omega_below_one", "cosine_ragged"]
PESSIMISTIC += ["sqeuclidean_packed_rho", "dot_ragged_packed", "one_fully_masked"]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", PESSIMISTIC)
def test_pessimistic_arithmetic_is_within_tolerance(name, gradient, compiled, monkeypatch):
    """Errors as large as PTX allows, and tensor cores that truncate."""
    use(compiled, monkeypatch.setattr)
    compiled.optical_emulator_arithmetic(1)
    try:
        assert_backend_correct("cuda", ALL[name], torch.float32, gradients=(gradient,))
    finally:
        compiled.optical_emulator_arithmetic(0)


def test_truncation_does_not_grow_with_the_dimension(kernels):
    """Chunks of split vectors have accumulators of their own."""
    kernels.optical_emulator_arithmetic(1)
    clouds = random_vector_case("long", "cosine", batch=1, n=60, m=50, dim=1024, epsilon=0.05)
    y = clouds.x[:, :50] + 0.5 * clouds.y  # a shared direction: products do not cancel
    problem = replace(clouds, y=y, max_iter=5).to(torch.float32)
    out, truth = solve("cuda", problem), solve("reference", problem.to(torch.float64))
    error = (out["f"] - truth["f"]).abs().max() / truth["f"].abs().max()
    assert error < 1e-6


@pytest.mark.parametrize("gradient", ["implicit", "unroll"])
@pytest.mark.parametrize("rho", [1e3, 1e4, 1e5])
def test_large_penalties_do_not_magnify_rounding_errors(rho, gradient, kernels):
    problem = replace(ALL["rho_strong"], rho_a=rho, rho_b=2 * rho).to(torch.float32)
    out = solve("cuda", problem, gradient)
    truth = solve("reference", problem.to(torch.float64), gradient)
    for name in ("grad_x", "grad_log_a", "grad_log_b"):
        largest = max(1.0, truth[name].abs().max())
        torch.testing.assert_close(out[name].double(), truth[name], rtol=0, atol=1e-5 * largest)


HALVES = [torch.float16, torch.bfloat16]


def assert_within_tolerance(name, problem, gradient):
    """Check results against the float64 reference and gradients for the types of their vectors."""
    out = solve("cuda", problem, gradient)
    single = solve("reference", problem.to(torch.float32), gradient)
    truth = solve("reference", problem.to(torch.float64), gradient)
    for field in truth:
        dtype = {"grad_x": problem.x.dtype, "grad_y": problem.y.dtype}.get(field, torch.float32)
        assert out[field].dtype == dtype or field in ("n_iter", "status")
        scale = max(1.0, truth[field].abs().max().item())
        options = {"dtype": dtype, "scale": scale, "name": f"{name} {field}"}
        assert_close_to_truth(out[field], truth[field], single[field], **options)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("kind", ["cosine", "sqeuclidean", "dot"])
def test_half_vectors_within_tolerance(kind, half, gradient, kernels):
    epsilon = 1.0 if kind == "cosine" else 16.0
    # Three regimes, with vectors of several chunks.
    for n, m, dim in ((7, 6, 40), (40, 50, 72), (66, 40, 104)):
        clouds = random_vector_case(
            kind, kind, batch=2, n=n, m=m, dim=dim, epsilon=epsilon, max_iter=5
        )
        for problem in (clouds, packed(clouds)):
            assert_within_tolerance(kind, problem.to(torch.float32, "cpu", half), gradient)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_gradients_of_half_vectors_in_a_cluster(half, kernels):
    clouds = random_vector_case("cluster", "cosine", batch=1, n=140, m=400, dim=18, max_iter=2)
    assert_within_tolerance("cluster", clouds.to(torch.float32, "cpu", half), "envelope")


SPLIT = [(9, 12), (20, 30), (70, 100)]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(("n", "m"), SPLIT)
def test_vectors_of_two_types(n, m, gradient, kernels):
    clouds = random_vector_case("two", "cosine", batch=2, n=n, m=m, dim=37, max_iter=6)
    mixed = clouds.to(torch.float32, "cpu", torch.bfloat16)
    assert_within_tolerance("two", replace(mixed, x=mixed.x.float()), gradient)


@pytest.mark.parametrize(("n", "m"), SPLIT)
def test_cosines_do_not_depend_on_lengths(n, m, kernels):
    """Values are invariant; gradients shrink as vectors grow."""
    clouds = random_vector_case("long", "cosine", batch=2, n=n, m=m, dim=37, max_iter=6)
    scales = torch.logspace(-35, 37.9, 2 * n).view(2, n, 1)
    scaled = replace(clouds.to(torch.float32), x=(clouds.x * scales).float())
    out, unscaled = solve("cuda", scaled), solve("cuda", clouds.to(torch.float32))
    torch.testing.assert_close(out["value"], unscaled["value"], rtol=1e-6, atol=0)
    expected = unscaled["grad_x"].double() / scales
    representable = (expected.abs() > 1e-36) & (expected.abs() < 1e37)
    rescaled = out["grad_x"].double() * scales
    gradient = torch.where(representable, rescaled, unscaled["grad_x"].double())
    torch.testing.assert_close(gradient, unscaled["grad_x"].double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n", "m"), SPLIT)
def test_short_vectors_do_not_reduce_the_precision_of_long_ones(n, m, kernels):
    clouds = random_vector_case("short", "cosine", batch=2, n=n, m=m, dim=37, max_iter=6)
    halves = clouds.to(torch.float32, "cpu", torch.float16)
    x, y = halves.x * 256, halves.y * 256
    x[:, 1], y[:, 2] = halves.x[:, 1] * 2.0**-20, halves.y[:, 2] * 2.0**-20
    halves = replace(halves, x=x, y=y)
    out, truth = solve("cuda", halves), solve("reference", halves.to(torch.float64))
    for name, short in (("grad_x", 1), ("grad_y", 2)):
        others = [i for i in range(out[name].shape[1]) if i != short]
        gradient, expected = out[name].double()[:, others], truth[name][:, others]
        # The smallest positive float16 is 6e-8.
        atol = 1e-3 * expected.abs().max() + 6e-8
        torch.testing.assert_close(gradient, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("n", "m"), SPLIT)
def test_half_vectors_whose_squares_underflow(n, m, kernels):
    clouds = random_vector_case("tiny", "cosine", batch=2, n=n, m=m, dim=37, max_iter=6)
    halves = clouds.to(torch.float32, "cpu", torch.bfloat16)
    tiny = halves.x.clone()
    tiny[0, 3] *= 2.0**-70
    out, unscaled = solve("cuda", replace(halves, x=tiny)), solve("cuda", clouds.to(torch.float32))
    torch.testing.assert_close(out["value"], unscaled["value"], rtol=1e-6, atol=0)
    gradient = out["grad_x"].float()
    gradient[0, 3] *= 2.0**-70
    torch.testing.assert_close(gradient, unscaled["grad_x"], rtol=1e-2, atol=1e-4)


# Problems for half precision: one per regime that supports it, and difficult ones.
FAST = {
    "warp": random_case("warp", 2, 60, 50, epsilon=0.05, rows=[60, 33], max_iter=16),
    "square": random_case("square", 1, 90, 128, epsilon=0.02, max_iter=16),
    "block": random_case("block", 1, 130, 60, epsilon=0.05, max_iter=16),
    "cluster": random_case("cluster", 1, 300, 130, epsilon=0.1, max_iter=16),
    "cold": random_case("cold", 1, 40, 50, epsilon=0.002, max_iter=30),
    "tol": replace(random_case("tol", 1, 40, 64, epsilon=0.05, max_iter=60), tol=1e-5),
}
FAST["forbidden"] = replace(
    FAST["warp"],
    name="forbidden",
    x=FAST["warp"].x.masked_fill(torch.arange(50) % 7 == 3, math.inf),
)
FAST["masses"] = replace(
    FAST["warp"], name="masses", log_b=torch.linspace(0, -60, 50).double().expand(2, 50)
)


@pytest.mark.parametrize("name", FAST)
def test_fast_iterations_within_their_tolerance(name, kernels):
    fast, exact = (replace(FAST[name], precision=precision) for precision in ("fast", "exact"))
    assert_backend_correct("cuda", fast, torch.float32, gradients=("envelope",))
    out, other = (solve("cuda", problem.to(torch.float32)) for problem in (fast, exact))
    # Masses out of range fall back to float32, bit for bit.
    assert torch.equal(out["f"], other["f"]) == (name == "masses")
    assert_same_bits(out, solve("cuda", fast.to(torch.float32)))
    one = solve("cuda", fast.select(0).to(torch.float32))
    assert torch.equal(one["f"][0], out["f"][0])


def test_fast_costs_of_vectors_and_implicit_gradients(kernels):
    clouds = random_vector_case("clouds", "cosine", batch=1, n=66, m=50, dim=9, max_iter=16)
    for problem in (clouds, packed(clouds)):
        fast = replace(problem, precision="fast")
        assert_backend_correct("cuda", fast, torch.float32, gradients=("implicit",))


def test_fast_is_exact_for_relaxed_or_few_iterations(kernels):
    warp = FAST["warp"]
    for exact in (replace(warp, omega=1.2), replace(warp, rho_a=1.0), replace(warp, max_iter=15)):
        fast = replace(exact, precision="fast").to(torch.float32)
        assert_same_bits(solve("cuda", fast), solve("cuda", exact.to(torch.float32)))


def results(problem, gradient="unroll"):
    return solve("cuda", problem.to(torch.float32), gradient)


def assert_same_bits(left, right):
    for field, value in left.items():
        assert torch.equal(value.nan_to_num(nan=1e30), right[field].nan_to_num(nan=1e30)), field


RACES = [("ragged", (12, 17)), ("block", (130, 100)), ("cluster", (300, 130))]


@pytest.mark.parametrize(("name", "size"), RACES)
def test_any_order_of_threads_gives_the_same_bits(name, size, kernels):
    problem = random_vector_case(name, "cosine", batch=1, n=size[0], m=size[1], dim=9, max_iter=2)
    expected = results(problem)
    for seed in range(2, 5):
        kernels.optical_emulator_seed(seed)
        assert_same_bits(expected, results(problem))


def test_a_missing_barrier_is_detected(tmp_path, kernels, monkeypatch):
    """Build without the barrier between the warps that add column sums."""
    problem = random_case("barrier", 1, 100, 120, max_iter=4)
    assert_backend_correct("cuda", problem, torch.float32, gradients=("envelope",))
    broken = library.open_library(build(tmp_path, "-O1", "-DOPTICAL_WITHOUT_BARRIER"), None)
    use(broken, monkeypatch.setattr)
    with pytest.raises((AssertionError, RuntimeError)):
        assert_backend_correct("cuda", problem, torch.float32, gradients=("envelope",))


def test_a_missing_wait_for_copies_is_detected(tmp_path, kernels, monkeypatch):
    problem = random_vector_case("copies", "cosine", batch=1, n=20, m=30, dim=48, max_iter=2)
    problem = problem.to(torch.float32, "cpu", torch.bfloat16)
    assert solve("cuda", problem)["value"].isfinite().all()
    broken = library.open_library(build(tmp_path, "-O1", "-DOPTICAL_WITHOUT_WAIT"), None)
    use(broken, monkeypatch.setattr)
    assert solve("cuda", problem)["value"].isnan().all()


def test_deadlocks_are_reported(tmp_path):
    source = tmp_path / "deadlock.cu"
    source.write_text(
        '#include "primitives.cuh"\n'
        "using namespace optical::cuda;\n"
        'extern "C" __attribute__((visibility("default"))) int met(int all) {\n'
        "    const std::function<void()> body = [&] {\n"
        "        if (all || thread_index() != 33) sync_block();\n"
        "        else sync_warp();\n"
        "    };\n"
        "    return emulator::run_cluster(0, 1, 64, 0, body) == emulator::Run::finished;\n"
        "}\n"
    )
    compiled = ctypes.CDLL(str(build(tmp_path, "-O1", source=source)))
    assert compiled.met(1) == 1
    assert compiled.met(0) == 0


def test_a_shortage_of_shared_memory_is_reported(kernels):
    problem = random_case("short", 1, 100, 120, max_iter=2).to(torch.float32)
    solve("cuda", problem, "unroll")
    kernels.optical_emulator_withhold(64)
    with pytest.raises(RuntimeError, match="failed with"):
        solve("cuda", problem, "unroll")


ARITHMETIC = """
#include "primitives.cuh"
using namespace optical::cuda;
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void arithmetic(int pessimistic) { emulator::pessimistic() = pessimistic != 0; }
EXPORT float exp2_of(float x) { return exp2_fast(x); }
EXPORT float log2_of(float x) { return log2_fast(x); }
EXPORT float reciprocal_of(float x) { return reciprocal(x); }
EXPORT float sum_of(float d, const float* x) {
    return emulator::tensor_core_sum(d, *(const float(*)[16])x);
}
"""


def test_pessimistic_arithmetic_has_the_errors_that_ptx_allows(tmp_path):
    source = tmp_path / "arithmetic.cu"
    source.write_text(ARITHMETIC)
    compiled = ctypes.CDLL(str(build(tmp_path, "-O1", source=source)))
    for name in ("exp2_of", "log2_of", "reciprocal_of", "sum_of"):
        getattr(compiled, name).restype = ctypes.c_float
    compiled.sum_of.argtypes = [ctypes.c_float, ctypes.POINTER(ctypes.c_float)]

    def worst(function, exact, inputs):
        values = ((function(ctypes.c_float(x)), exact(x)) for x in inputs)
        return max(abs(value / truth - 1) for value, truth in values)

    inputs = [2.5 + i / 64 for i in range(200)]
    products = (ctypes.c_float * 16)(*[2.0**-25] * 16)
    for pessimistic, low, high in ((0, 0.0, 2**-23), (1, 2**-23.1, 2**-21.6)):
        compiled.arithmetic(pessimistic)
        for name, exact in (
            ("exp2_of", lambda x: 2.0**x),
            ("log2_of", math.log2),
            ("reciprocal_of", lambda x: 1 / x),
        ):
            assert low <= worst(getattr(compiled, name), exact, inputs) <= high, name
        # Terms of a quarter of the last digit survive, those below are cut off.
        assert compiled.sum_of(1.0, products) == (1 + 2.0**-21 if pessimistic else 1.0)
        tiny = (ctypes.c_float * 16)(*[2.0**-26] * 16)
        assert compiled.sum_of(1.0, tiny) == 1.0
        assert compiled.sum_of(0.0, tiny) == 2.0**-22
        assert compiled.sum_of(1.0, (ctypes.c_float * 16)(3 * 2.0**-25)) == (
            1.0 if pessimistic else 1 + 2.0**-23
        )


@pytest.mark.slow
def test_no_undefined_behaviour(tmp_path, monkeypatch, kernels):
    flags = ("-O1", "-fsanitize=undefined", "-fno-sanitize-recover=all", "-static-libubsan")
    use(library.open_library(build(tmp_path, *flags), None), monkeypatch.setattr)
    for n, m in ((7, 5), (40, 60), (130, 70), (200, 300)):
        clouds = random_vector_case("clouds", "cosine", batch=1, n=n, m=m, dim=18, max_iter=2)
        for problem in (clouds, packed(clouds), random_case("given", 1, n, m, max_iter=2)):
            for gradient in GRADIENTS:
                assert_backend_correct("cuda", problem, torch.float32, gradients=(gradient,))
    for name in ("warp", "block"):
        fast = replace(FAST[name], precision="fast")
        assert_backend_correct("cuda", fast, torch.float32, gradients=("envelope",))


SOME = ["ragged", "nan_padding", "clusters", "rho", "cosine_ragged", "dot_ragged_packed"]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", SOME)
def test_results_are_deterministic_and_independent_of_the_batch(name, gradient, kernels):
    problem = ALL[name].to(torch.float32)
    together, again = solve("cuda", problem, gradient), solve("cuda", problem, gradient)
    assert_same_bits(together, again)
    for i in range(len(problem.epsilon)):
        alone = solve("cuda", problem.select(i), gradient)
        for field in FIELDS:
            part = slice(i, i + 1)
            if problem.cu_a is not None and field in "fg":
                offsets = problem.cu_a if field == "f" else problem.cu_b
                part = slice(int(offsets[i]), int(offsets[i + 1]))
            assert torch.equal(alone[field], together[field][part]), field


def test_packed_problems_have_the_same_bits_in_any_batch(kernels):
    """A problem's regime depends on its own size, not on the largest of the batch."""
    lengths = {"rows": [3, 130, 40], "columns": [9, 70, 60]}
    clouds = random_vector_case(
        "mixed", "cosine", batch=3, n=130, m=70, dim=9, max_iter=4, **lengths
    )
    problem = packed(clouds).to(torch.float32)
    together = solve("cuda", problem)
    for i in range(3):
        rows = slice(int(problem.cu_a[i]), int(problem.cu_a[i + 1]))
        alone = solve("cuda", problem.select(i))
        assert torch.equal(alone["value"][0], together["value"][i])
        assert torch.equal(alone["f"], together["f"][rows])
    assert_backend_correct("cuda", packed(clouds), torch.float32, gradients=("envelope",))


TEAMS = {
    "rows": [3, 16, 30, 0, 9, 17, 40, 1, 12, 32, 5],
    "columns": [16, 1, 32, 4, 0, 6, 35, 1, 13, 20, 7],
}


@pytest.mark.parametrize("kind", ["cosine", "dot"])
@pytest.mark.parametrize("half", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"rho_a": 0.3, "omega": 1.4}], ids=["plain", "relaxed"])
def test_problems_that_share_a_warp_are_independent(options, half, kind, kernels):
    """Two or four problems per warp: some empty, some with small epsilon, which choose new bases
    when others do not. Each stops at its own iteration."""
    clouds = random_vector_case("teams", kind, batch=11, n=40, m=35, dim=21, max_iter=50, **TEAMS)
    clouds = replace(clouds, epsilon=torch.logspace(-2.5, 0.5, 11).double(), tol=1e-3, **options)
    problem = packed(clouds).to(torch.float32, "cpu", half)
    expected, stopped = [problem.select(i) for i in range(11)], set()
    for seed in (1, 2):
        kernels.optical_emulator_seed(seed)
        together = solve("cuda", problem, "implicit")
        stopped |= set(together["n_iter"].tolist())
        for i, one in enumerate(expected):
            alone = solve("cuda", one, "implicit")
            for field in ("value", "value_linear", "marginal_error", "n_iter", "status"):
                same = torch.equal(alone[field][0].nan_to_num(7), together[field][i].nan_to_num(7))
                assert same, (field, i)
            rows = slice(int(problem.cu_a[i]), int(problem.cu_a[i + 1]))
            assert torch.equal(alone["f"], together["f"][rows])
    assert len(stopped) > 4


def test_longest_lengths_are_read_once_and_never_under_capture(kernels, monkeypatch):
    clouds = random_vector_case("long", "cosine", batch=40, n=20, m=15, dim=4, max_iter=2)
    problem, read = packed(clouds).to(torch.float32), []
    longest = cuda._longest
    monkeypatch.setattr(cuda, "_longest", lambda *cu: read.append(cu) or longest(*cu))
    assert cuda.supports(problem.problem()) is None
    solve("cuda", problem)
    assert len(read) == 1
    problem.cu_a[1] -= 1  # other lengths in the same place
    assert cuda.supports(problem.problem()) is None
    assert len(read) == 2
    monkeypatch.setattr(cuda, "_capturing", lambda: True)
    assert "a CUDA graph is being captured" in cuda.supports(problem.problem())
    few = packed(random_vector_case("few", "cosine", batch=2, n=20, m=15, dim=4)).to(torch.float32)
    assert cuda.supports(few.problem()) is None
    assert len(read) == 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets_of_either_type_are_read_once(dtype, kernels, monkeypatch):
    """FlashAttention's offsets are int32; the kernels take int64."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 4, generator=generator) for n in (800, 600))
    x.requires_grad_()
    offsets = [torch.arange(0, n + 1, n // 40, dtype=dtype) for n in (800, 600)]
    read, longest = [], cuda._longest
    monkeypatch.setattr(cuda, "_longest", lambda *cu: read.append(cu) or longest(*cu))

    def value():
        result = sinkhorn_vectors(
            x,
            y,
            epsilon=0.1,
            max_iter=1,
            backend="cuda",
            cu_seqlens_a=offsets[0],
            cu_seqlens_b=offsets[1],
        )
        torch.autograd.grad(result.value.sum(), x)
        return result.value

    values = [value() for _ in range(5)]
    assert len(read) == 1
    assert all(torch.equal(values[0], other) for other in values)
    offsets[0][1] -= 1  # other lengths in the same place
    assert not torch.equal(values[0], value())
    assert len(read) == 2


def test_short_packed_problems_are_supported_for_any_total_length(kernels):
    """One problem of the total length would fit in the forward pass, but not in UNROLL."""
    many = packed(random_vector_case("many", "cosine", batch=9, n=2, m=45, dim=4, max_iter=2))
    whole = random_case("whole", 1, 18, 405).to(torch.float32)
    assert cuda.supports(whole.problem()) is None
    assert "does not fit" in cuda.supports(whole.problem("unroll"))
    assert_backend_correct("cuda", many, torch.float32, gradients=("envelope", "unroll"))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", ["given", "cosine", "sqeuclidean", "dot"])
def test_the_content_of_padding_changes_no_bit(kind, gradient, kernels):
    lengths = {"rows": [9, 3, 0, 5], "columns": [2, 11, 4, 8]}
    problem = random_case("padded", 4, 9, 11, **lengths)
    if kind != "given":
        problem = random_vector_case("padded", kind, batch=4, n=9, m=11, **lengths)
    problem = replace(problem, max_iter=8, rho_a=0.5, omega=1.2)
    padding = problem.log_a == -math.inf
    clean = replace(problem, f0=padding * 0.0, g0=torch.zeros_like(problem.log_b))
    dirty = replace(poisoned(clean), f0=torch.where(padding, math.nan, 0.0))
    assert_same_bits(results(clean, gradient), results(dirty, gradient))


BROKEN = [("x", math.nan), ("x", -math.inf), ("log_a", math.nan), ("log_b", math.inf)]
BROKEN += [("epsilon", math.nan), ("epsilon", 0.0), ("epsilon", -1.0)]


@pytest.mark.parametrize("kind", ["given", "cosine"])
@pytest.mark.parametrize(("field", "value"), BROKEN)
def test_invalid_numbers_affect_only_their_own_problem(kind, field, value, kernels):
    problem = (
        random_case("", 3, 5, 6) if kind == "given" else random_vector_case("", kind, n=5, m=6)
    )
    problem = problem.to(torch.float32)
    broken = getattr(problem, field).clone()
    broken[1].view(-1)[0] = value
    clean, out = (solve("cuda", x) for x in (problem, replace(problem, **{field: broken})))
    expected = solve("reference", replace(problem, **{field: broken}))
    assert out["status"].tolist() == expected["status"].tolist()
    assert out["n_iter"].tolist() == expected["n_iter"].tolist()
    for name in ("value", "value_linear", "marginal_error", "f", "g"):
        assert out[name][1].isnan().all(), name
    for name in clean:
        for i in (0, 2):
            assert torch.equal(out[name][i], clean[name][i]), name


def test_each_problem_stops_at_the_iteration_of_the_reference(kernels):
    for name in ("epsilon_per_problem", "ragged", "one_fully_masked", "marginals"):
        problem = replace(ALL[name], max_iter=60, tol=1e-3)
        n_iter = solve("cuda", problem.to(torch.float32))["n_iter"]
        early = solve("reference", replace(problem, tol=1.001e-3 + 1e-6))["n_iter"]
        late = solve("reference", replace(problem, tol=0.999e-3 - 1e-6))["n_iter"]
        assert ((early <= n_iter) & (n_iter <= late)).all(), (early, n_iter, late)


def test_extreme_masses_continue_in_the_log_domain(kernels):
    problem = random_case("masses", 2, 19, 23, epsilon=0.05, max_iter=12)
    log_b = torch.linspace(0, -150, 23).double().expand(2, 23).log_softmax(1)
    cost = problem.x + torch.linspace(3, 0, 23).double()
    assert_backend_correct("cuda", replace(problem, x=cost, log_b=log_b), torch.float32)


@pytest.mark.parametrize("shared", [99, 163])
@pytest.mark.parametrize("size", [(190, 60), (60, 190)])
def test_packed_problems_stay_within_shared_memory(size, shared, kernels):
    """A tall grid of warps needs more shared memory for products than a wide one."""
    n, m = size
    kernels.optical_emulator_device(shared << 10, 1)
    clouds = packed(random_vector_case("tall", "cosine", batch=1, n=n, m=m, dim=9, max_iter=2))
    assert_backend_correct("cuda", clouds, torch.float32, gradients=("envelope",))


@pytest.mark.parametrize("kilobytes", [99, 163, 227])
def test_packed_launches_have_room_for_every_grid(kilobytes):
    device = nvrtc.Device(kilobytes << 10, 8)
    for kind, backward in itertools.product((0, 1), (None, 0, 1, 2)):
        problem = structs.ProblemStruct(batch=3, n=512, m=64, kind=kind, offset_a=1, offset_b=1)
        for launch in nvrtc.choose_launches(problem, backward, device):
            warps = launch.down * launch.across
            assert launch.bytes <= device.shared
            for down, across in itertools.product(range(1, warps + 1), repeat=2):
                if launch.number >= nvrtc.BLOCK and down * across <= warps:
                    needed = nvrtc.shared_bytes(launch.number, down, across, kind, backward)
                    assert needed <= launch.bytes, (launch, down, across)


def test_launch_configurations_agree_with_nvrtc(kernels):
    """The library and ``optical.backends.nvrtc`` choose the same regimes and shared memory."""
    sides = (1, 16, 17, 32, 33, 64, 65, 128, 129, 320, 512, 513, 2000)
    for shared, clusters in ((227 << 10, 8), (163 << 10, 1), (99 << 10, 8)):
        device = nvrtc.Device(shared, clusters)
        for kind, backward, n, m in itertools.product((0, 1), (None, 0, 1, 2), sides, sides):
            problem = structs.ProblemStruct(batch=1, n=n, m=m, kind=kind, gradient=backward or 0)
            config = (ctypes.c_int * 5)()
            number = kernels.optical_cuda_launch_config(
                ctypes.byref(problem), backward is not None, shared, clusters, config
            )
            expected = None if number < 0 else (number, *config)
            assert nvrtc.choose_launch(n, m, kind, backward, device) == expected, (
                n,
                m,
                kind,
                backward,
            )


def test_refusals_name_their_reason(kernels):
    double = random_case("", 1, 2, 2)
    refused = {
        "compute in float32": double,
        "do not support anderson": replace(double, anderson=3).to(torch.float32),
        "700 x 700 does not fit": random_case("", 1, 700, 700).to(torch.float32),
    }
    for reason, problem in refused.items():
        assert reason in cuda.supports(problem.problem())
    annealed = replace(double, anneal_start=1.0).to(torch.float32)
    assert "does not undo annealing" in cuda.supports(annealed.problem("unroll"))


# In a team of lanes, one warp, a block and a cluster; the last with penalties.
STATUS = {(9, 7): math.inf, (40, 50): math.inf, (100, 70): 0.7, (140, 400): math.inf}


@pytest.mark.parametrize(("size", "rho"), STATUS.items())
def test_relaxed_runs_stop_by_both_marginals(size, rho, kernels):
    case = replace(random_case("relaxed", 2, *size), omega=1.6, tol=1e-3, max_iter=40, rho_b=rho)
    case = replace(case, epsilon=torch.tensor([0.5, 0.1]).double())
    out, errors = solve("cuda", case.to(torch.float32)), errors_of_iterates(case, 40)
    reached = errors <= case.tol
    expected = torch.where(reached.any(0), reached.int().argmax(0) + 1, 40)
    assert (out["n_iter"] - expected).abs().max() <= 1 and expected.min() < 40
    for i, k in enumerate(out["n_iter"].tolist()):
        assert math.isclose(out["marginal_error"][i], errors[k - 1, i], rel_tol=1e-2, abs_tol=1e-6)
    assert torch.equal(out["status"] == Status.CONVERGED, out["marginal_error"] <= case.tol)


def test_relaxed_runs_in_the_log_domain_stop_by_both_marginals(kernels):
    case = random_case("masses", 2, 19, 23, epsilon=0.05, max_iter=80)
    log_b = torch.linspace(0, -150, 23).double().expand(2, 23).log_softmax(1)
    case = replace(case, x=case.x + torch.linspace(3, 0, 23).double(), log_b=log_b)
    case = replace(case, omega=1.3, tol=1e-3)
    out, errors = solve("cuda", case.to(torch.float32)), errors_of_iterates(case, 80)
    expected = (errors <= case.tol).int().argmax(0) + 1
    assert (out["n_iter"] - expected).abs().max() <= 1 and (out["status"] == 0).all()


@pytest.mark.parametrize("omega", [1.0, 1.6])
def test_the_last_iterate_is_tested(omega, kernels):
    case = replace(RELAXED, omega=omega).select(1)
    first = int(solve("cuda", case.to(torch.float32))["n_iter"])
    for count, status in ((first - 1, Status.MAX_ITER), (first, Status.CONVERGED)):
        out = solve("cuda", replace(case, max_iter=count).to(torch.float32))
        assert out["n_iter"].tolist() == [count] and out["status"].tolist() == [status]
    unlimited = solve("cuda", replace(case, max_iter=first, tol=0.0).to(torch.float32))
    assert unlimited["status"].tolist() == [Status.MAX_ITER]


@pytest.mark.parametrize("gradient", ["envelope", "unroll"])
def test_outputs_that_overflow_are_infeasible(gradient, kernels):
    for tol in (0.0, 1e-3):
        out = solve("cuda", replace(overflowing(), tol=tol).to(torch.float32), gradient)
        # Errors of marginals of e^-50 are below any tolerance.
        first = Status.CONVERGED if tol > 0 else Status.MAX_ITER
        assert out["status"].tolist() == [first, Status.INFEASIBLE]
        for name in ("grad_x", "grad_log_a", "grad_log_b"):
            assert out[name][0].isfinite().all() and not out[name][1].isfinite().any(), name
    case = replace(random_case("plan", 2, 5, 4, max_iter=0), tol=1e-3)
    case = replace(case, x=case.x - torch.tensor([0.0, 1e4])[:, None, None])
    out = solve("cuda", case.to(torch.float32), gradient)
    assert out["status"].tolist() == [Status.MAX_ITER, Status.INFEASIBLE]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", ["given", "cosine", "sqeuclidean", "packed dot"])
def test_gradients_of_malformed_problems_are_nan(kind, gradient, kernels, poisoned_memory):
    clean = mixed(kind.removeprefix("packed ")).to(torch.float32)
    if kind == "packed dot":
        clean = packed(clean)
    for rho_a, (field, value) in zip((math.inf, 0.5, math.inf, 0.5), MALFORMED, strict=True):
        clean = replace(clean, rho_a=rho_a)
        broken = malformed(clean, field, value)
        out, expected = (solve("cuda", case, gradient) for case in (broken, clean))
        assert out["status"][1] == Status.INFEASIBLE and out["status"][3] == Status.EMPTY
        for name, (own, padding) in own_entries(clean).items():
            grad, other = out[f"grad_{name}"], expected[f"grad_{name}"]
            assert grad[own].isnan().all(), (field, name)
            assert not grad[padding].any(), (field, name)
            assert torch.equal(grad[~own], other[~own]) and grad[~own].isfinite().all()


@pytest.mark.parametrize(("n", "m"), [(100, 70), (140, 400)])
def test_gradients_of_malformed_problems_in_blocks_and_clusters(n, m, kernels):
    given = random_case("large", 1, n, m, rows=[n - 3], columns=[m - 5], max_iter=1)
    vectors = random_vector_case("large", "cosine", batch=1, n=n, m=m, dim=5, max_iter=1)
    for case in (given, vectors):
        out = solve("cuda", replace(case, epsilon=-case.epsilon).to(torch.float32))
        for name in ("x", "y", "log_a", "log_b"):
            if f"grad_{name}" in out:
                grad = out[f"grad_{name}"]
                valid = getattr(case, name) > -math.inf
                if name == "x" and case.y is None:
                    valid = (case.log_a > -math.inf)[:, :, None] & (case.log_b > -math.inf)[:, None]
                assert torch.equal(grad.isnan(), valid) and not grad[~valid].any(), name


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", ["given", "cosine", "packed dot"])
def test_gradients_of_unused_problems_are_zero(kind, gradient, kernels, poisoned_memory):
    assert_unused_is_zero("cuda", kind, gradient)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_masses_are_optional(gradient, kernels, poisoned_memory):
    assert_masses_are_optional(cuda, gradient)
