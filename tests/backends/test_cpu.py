"""The compiled CPU library: accuracy, invariance to batch and threads, edge cases, builds."""

import math
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import optical
from optical.backends import cpu, library, reference, registry
from optical.backends.problem import GRADIENTS, Status
from optical.testing.cases import all_cases, random_case
from optical.testing.tolerance import assert_backend_correct, assert_close_to_truth

ROOT = Path(__file__).resolve().parents[2]
ALL = {case.name: case for case in all_cases()}
DTYPES = [torch.float32, torch.float64]

MISSING = library.load_cpu().reason
needs_library = pytest.mark.skipif(MISSING is not None, reason=f"CPU library: {MISSING}")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def unloaded():
    """Make the next call look for the library again, during the test and after it."""

    def forget():
        library.load_cpu.cache_clear()
        registry._warn_once.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def quick_compiler(monkeypatch):
    """A compiler, with flags that compile in a second, for tests that build the library."""
    compiler = library.find_compiler()
    if compiler is None:
        pytest.skip(reason="no C++ compiler")
    quick = tuple("-O1" if flag == "-O3" else flag for flag in library.CPU_FLAGS)
    monkeypatch.setattr(library, "CPU_FLAGS", quick)
    monkeypatch.setattr(library, "cpu_variants", lambda: [library.BASELINE])
    return compiler


def run(case, gradient="envelope"):
    return cpu.forward(case.problem(gradient))


def backward(case, solution, gradient="envelope", value=1.0, need_y=False):
    """Gradients of value * case value + transport cost, with weights that differ in the batch."""
    upstream = torch.linspace(0.5, 2, len(case.epsilon), dtype=case.epsilon.dtype)
    saved = (solution.f, solution.g, solution.w, solution.z, solution.n_iter)
    problem = case.problem(gradient)
    return cpu.backward(value * upstream, upstream, None, None, problem, *saved, True, need_y)


def gradient(case, f, g):
    """Gradient of the value with respect to a given cost."""
    ones = torch.ones_like(case.epsilon)
    saved = (f, g, f[:0], g[:0], torch.zeros(len(ones), dtype=torch.int32))
    problem = case.problem()
    return cpu.backward(ones, 0 * ones, None, None, problem, *saved, True, False)[0]


def assert_same_bits(left, right):
    for x, y in zip(left, right, strict=True):
        assert torch.equal(x.nan_to_num(nan=1e30), y.nan_to_num(nan=1e30))


def scrambled(batch=23, n=40, m=37, dtype=torch.float32, **options):
    """A ragged batch whose padding is at random positions, not only at the end."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(0, n + 1, (batch,), generator=generator).tolist()
    columns = torch.randint(1, m + 1, (batch,), generator=generator).tolist()
    case = random_case("scrambled", batch, n, m, rows=rows, columns=columns, **options)
    log_a = case.log_a[:, torch.randperm(n, generator=generator)]
    log_b = case.log_b[:, torch.randperm(m, generator=generator)]
    return replace(case, log_a=log_a, log_b=log_b).to(dtype)


# --------------------------------------------------------------------------------- accuracy


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 15, 17, 24, 33])
@pytest.mark.parametrize("m", [1, 3, 4, 5, 8, 9, 16, 31])
def test_sizes_with_every_remainder_of_blocks_and_vectors(n, m, dtype):
    assert_backend_correct("cpu", random_case(f"{n}x{m}", 2, n, m, max_iter=9), dtype)


@needs_library
def test_agrees_with_a_scalar_loop():
    """An implementation of the equations that shares no code with the reference."""
    case = random_case("scalar", 1, 4, 3, epsilon=0.2, max_iter=6)
    cost, epsilon = case.cost[0].tolist(), 0.2
    a, b = [0.25] * 4, [1 / 3] * 3
    f, g = [0.0] * 4, [0.0] * 3
    for _ in range(6):
        for i in range(4):
            terms = [b[j] * math.exp((g[j] - cost[i][j]) / epsilon) for j in range(3)]
            f[i] = -epsilon * math.log(sum(terms))
        for j in range(3):
            terms = [a[i] * math.exp((f[i] - cost[i][j]) / epsilon) for i in range(4)]
            g[j] = -epsilon * math.log(sum(terms))
    pairs = [(i, j) for i in range(4) for j in range(3)]
    plan = {(i, j): a[i] * b[j] * math.exp((f[i] + g[j] - cost[i][j]) / epsilon) for i, j in pairs}
    linear = sum(plan[p] * cost[p[0]][p[1]] for p in pairs)
    kl = sum(plan[i, j] * math.log(plan[i, j] / (a[i] * b[j])) for i, j in pairs)
    kl += 1 - sum(plan.values())
    value, value_linear, f_out, g_out, _, n_iter, *_ = run(case)
    assert value.item() == pytest.approx(linear + epsilon * kl, abs=1e-14)
    assert value_linear.item() == pytest.approx(linear, abs=1e-14)
    assert f_out[0].tolist() == pytest.approx(f, abs=1e-14)
    assert g_out[0].tolist() == pytest.approx(g, abs=1e-14)
    assert n_iter.item() == 6
    expected = torch.tensor([[plan[i, j] for j in range(3)] for i in range(4)]).double()
    assert torch.allclose(gradient(case, f_out, g_out)[0], expected, atol=1e-14)


@needs_library
@pytest.mark.parametrize("epsilon", [1.0, 1e-1, 1e-2, 1e-3])
def test_costs_of_order_1000(epsilon):
    """In float32 only: with exponents of 10 ** 6, the float64 truth itself has ten digits."""
    case = random_case("thousand", 3, 20, 33, epsilon=epsilon, max_iter=30)
    case = replace(case, x=1e3 * case.x, singular=True)
    # With exponents of 10 ** 6, thirty unrolled steps lose all digits in both backends.
    gradients = ("envelope", "implicit") if epsilon == 1e-3 else GRADIENTS
    assert_backend_correct("cpu", case, torch.float32, gradients=gradients)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_masses_are_iterated_in_the_log_domain(dtype):
    """With masses far below 1 / m, sums of the scaling form lose their accuracy."""
    case = random_case("masses", 3, 19, 23, epsilon=0.05, max_iter=40)
    ladder = torch.linspace(0, -2000 if dtype == torch.float64 else -150, 23).double()
    log_b = ladder.expand(3, 23).log_softmax(1)
    # The heavy columns are expensive: the nearest columns of every row have almost no mass.
    cost = case.x + torch.linspace(3, 0, 23).double()
    assert_backend_correct("cpu", replace(case, x=cost, log_b=log_b), dtype)


@needs_library
@pytest.mark.parametrize(("tol", "seed"), [(1e-1, 8), (1e-2, 14), (1e-3, 17)])
def test_extreme_masses_do_not_stop_early(tol, seed):
    """Masses below e^-87 underflow in float32, but the marginal errors of their rows do not."""
    case = random_case("stop", 64, 25, 21, epsilon=0.003, max_iter=60, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    log_a, log_b = (
        torch.randn(64, size, generator=generator, dtype=torch.float64).mul(40).log_softmax(1)
        for size in (25, 21)
    )
    case = replace(case, log_a=log_a, log_b=log_b, tol=tol)
    rounded = case.to(torch.float32).to(torch.float64)
    n_iter = run(case.to(torch.float32))[5]
    early = run(replace(rounded, tol=tol * 1.01 + 1e-6))[5]
    late = run(replace(rounded, tol=tol * 0.99 - 1e-6))[5]
    assert ((early <= n_iter) & (n_iter <= late)).all()


@needs_library
def test_the_penalty_is_finite_if_sums_far_exceed_masses():
    """The second row has mass e^-100 and sum e^650, so that their ratio overflows."""
    log_a, cost = torch.tensor([0.0, -100.0]).double(), torch.tensor([[0.0], [-7.5]]).double()
    actual = optical.sinkhorn(
        cost[None], epsilon=0.01, log_a=log_a[None], rho=(1.0, None), max_iter=0, backend="cpu"
    )
    # With f = g = 0, the value is epsilon (1 - P) plus the penalty, sum P log(P / a) - P + a.
    plan = (log_a - cost[:, 0] / 0.01).exp()
    expected = (0.01 * (log_a.exp() - plan) - cost[:, 0] / 0.01 * plan - plan + log_a.exp()).sum()
    torch.testing.assert_close(actual.value, expected[None], rtol=1e-12, atol=0)


@needs_library
def test_diverging_potentials_are_rebased():
    """Infeasible blocks push the potentials apart by far more than the range of float32."""
    forbidden = (torch.arange(12)[:, None] < 6) ^ (torch.arange(12)[None, :] < 3)
    case = random_case("infeasible", 2, 12, 12, epsilon=0.5, max_iter=700)
    case = replace(case, x=case.x.masked_fill(forbidden, math.inf))
    assert_backend_correct("cpu", case, torch.float32)
    assert run(case.to(torch.float32))[2].abs().max() > 0.5 * 200


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_at_any_position(dtype):
    assert_backend_correct("cpu", scrambled(dtype=torch.float64), dtype)


# -------------------------------------------------------------------------------- invariance


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tol", [0.0, 1e-3])
def test_results_do_not_depend_on_batch_and_threads(dtype, tol, threads):
    case = replace(scrambled(dtype=dtype, epsilon=0.05), tol=tol, max_iter=80)
    threads(1)
    expected = run(case)
    for count in (2, 3):
        threads(count)
        assert_same_bits(run(case), expected)
    for i in range(len(case.epsilon)):
        alone = run(case.select(i))
        assert_same_bits(alone[:7], [x[i : i + 1] for x in expected[:7]])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_padding_change_no_bit(dtype):
    case = scrambled(dtype=dtype)
    padding = (case.log_a == -math.inf)[:, :, None] | (case.log_b == -math.inf)[:, None, :]
    expected = run(case)
    for poison in (math.nan, math.inf, -math.inf, 1e30):
        filled = replace(case, x=case.x.masked_fill(padding, poison))
        assert_same_bits(run(filled), expected)
        out = gradient(filled, expected[2], expected[3])
        assert_same_bits([out], [gradient(case, expected[2], expected[3])])
        assert not out[padding].any()
    for i in range(len(case.epsilon)):
        cut = case.without_padding(i)
        if not cut.x.numel():
            continue
        value, value_linear, f, g, error, n_iter, *_ = run(cut)
        rows, columns = case.log_a[i] > -math.inf, case.log_b[i] > -math.inf
        assert_same_bits(
            (value, value_linear, f[0], g[0], error, n_iter),
            (
                *(x[i : i + 1] for x in expected[:2]),
                expected[2][i, rows],
                expected[3][i, columns],
                *(x[i : i + 1] for x in expected[4:6]),
            ),
        )


@needs_library
def test_costs_of_any_strides():
    case = random_case("strides", 4, 11, 13).to(torch.float32)
    expected = run(case)
    wide = torch.full((4, 15, 32), math.nan)
    wide[:, 2:13, 9:22] = case.x
    every_other = torch.full((8, 11, 13), math.nan)
    every_other[::2] = case.x
    turned = case.x.mT.contiguous().mT
    for cost in (wide[:, 2:13, 9:22], every_other[::2], turned):
        assert not cost.is_contiguous()
        assert_same_bits(run(replace(case, x=cost)), expected)
        out = gradient(replace(case, x=cost), expected[2], expected[3])
        assert_same_bits([out], [gradient(case, expected[2], expected[3])])
    single = replace(case, x=case.x[:1].expand(4, 11, 13))
    assert_same_bits([x[3] for x in run(single)[:7]], [x[0] for x in expected[:7]])


@needs_library
def test_vectors_of_any_strides():
    case = clouds("cosine", 3, 9, 12, 10).to(torch.float32)
    expected = run(case)
    wide = torch.full((3, 12, 25), math.nan)
    wide[:, :, 5:15] = case.y
    strided = replace(case, y=wide[:, :, 5:15], x=case.x.transpose(0, 1).contiguous().mT.mT)
    strided = replace(strided, x=strided.x.transpose(0, 1))
    assert not strided.y.is_contiguous()
    assert not strided.x.is_contiguous()
    assert_same_bits(run(strided), expected)
    out = backward(strided, expected, need_y=True)
    assert_same_bits(out, backward(case, expected, need_y=True))


# ----------------------------------------------------------------- one problem on many threads


def clouds(kind, batch, n, m, dim, **options):
    """Token vectors of length near 1, a ninth of them padding."""
    generator = torch.Generator().manual_seed(11)
    x, y = (torch.randn(batch, k, dim, generator=generator).double() for k in (n, m))
    scale = 1 if kind == "cosine" else 2 * dim**0.5
    rows, columns = ([k - k // 9] * batch for k in (n, m))
    case = random_case("clouds", batch, n, m, rows=rows, columns=columns, **options)
    return replace(case, x=x / scale, y=y / scale, kind=kind)


@needs_library
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("gradient", ["envelope", "implicit", "unroll"])
@pytest.mark.parametrize("kind", ["given", "cosine", "sqeuclidean"])
def test_one_problem_on_several_threads_has_the_same_bits(kind, gradient, low_memory, threads):
    """All threads share one problem of more than 1024 x 1024 entries, in chunks of rows."""
    case = clouds("cosine" if kind == "given" else kind, 1, 1200, 1030, 6, max_iter=4)
    if kind == "given":
        case = replace(case, x=case.cost, y=None, kind="given")
    case = replace(case, low_memory=low_memory).to(torch.float32)
    threads(1)
    expected = run(case, gradient)
    need_y = kind != "given"
    slopes = [x for x in backward(case, expected, gradient, need_y=need_y) if x is not None]
    v = torch.randn(1, 1030, 3)
    product = cpu.apply_plan(case.problem(), expected.f, expected.g, v, False)
    for count in (2, 3):
        threads(count)
        assert_same_bits(run(case, gradient), expected)
        actual = backward(case, expected, gradient, need_y=need_y)
        assert_same_bits([x for x in actual if x is not None], slopes)
        same = cpu.apply_plan(case.problem(), expected.f, expected.g, v, False)
        assert_same_bits([same], [product])


@needs_library
@pytest.mark.parametrize("kind", ["cosine", "sqeuclidean"])
def test_a_large_problem_meets_the_tolerance_rule(kind):
    """The problem exceeds the size up to which the cost is stored."""
    case = clouds(kind, 1, 1040, 1050, 4, max_iter=3)
    assert_backend_correct("cpu", case, torch.float32, gradients=["envelope", "unroll"])
    low = replace(case, low_memory=True)
    assert_backend_correct("cpu", low, torch.float32, gradients=["envelope"])


@needs_library
@pytest.mark.parametrize("gradient", ["envelope", "implicit", "unroll"])
@pytest.mark.parametrize("name", ["everything", "cosine_ragged", "rho", "omega", "clusters"])
def test_gradients_do_not_depend_on_threads(name, gradient, threads):
    matching = [case for key, case in ALL.items() if name in key and not case.anderson]
    assert matching
    for case in matching:
        if case.anneal_start > 0 and gradient == "unroll":
            continue
        case = case.to(torch.float32)
        threads(1)
        solution = run(case, gradient)
        need_y = case.y is not None
        slopes = [x for x in backward(case, solution, gradient, need_y=need_y) if x is not None]
        threads(3)
        assert_same_bits(run(case, gradient), solution)
        again = backward(case, solution, gradient, need_y=need_y)
        assert_same_bits([x for x in again if x is not None], slopes)


@needs_library
def test_in_a_forked_process_with_threads():
    """OpenMP deadlocks in a forked process, where the library starts its own threads."""
    script = (
        "import os, torch\n"
        "from optical import sinkhorn\n"
        "torch.set_num_threads(2)\n"
        "cost = torch.rand(64, 40, 40)\n"
        "expected = sinkhorn(cost, epsilon=0.1).value\n"
        "large = torch.rand(1, 1100, 1100)\n"
        "expected_large = sinkhorn(large, epsilon=0.1, max_iter=5).value\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    same = torch.equal(sinkhorn(cost, epsilon=0.1).value, expected)\n"
        "    same &= torch.equal(sinkhorn(large, epsilon=0.1, max_iter=5).value, expected_large)\n"
        "    os._exit(0 if same else 3)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert result.stdout == "0\n", result.stderr


@needs_library
def test_memory_does_not_grow_with_the_number_of_problems():
    """From vectors, memory is O(B (n + m)) plus one problem per thread, no (B, n, m) tensor."""
    script = (
        "import resource, sys, torch\n"
        "from optical import sinkhorn_vectors\n"
        "torch.set_num_threads(1)\n"
        "x, y = torch.randn(2, 2000, 64, 8).unbind(0)\n"
        "sinkhorn_vectors(x[:9], y[:9], epsilon=0.1, max_iter=2)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "sinkhorn_vectors(x, y, epsilon=0.1, max_iter=2)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    grown = int(result.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 2000 * 64 * 64 * 4 / 3, "more than a third of one (B, n, m) tensor"


# -------------------------------------------------------------------------------- edge cases


@needs_library
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0), (0, 0, 0)])
def test_batches_without_entries(shape):
    batch, n, m = shape
    case = random_case("empty", *shape).to(torch.float32)
    solution = run(case)
    shapes = [(batch,), (batch,), (batch, n), (batch, m), (batch,), (batch,), (batch,)]
    assert [tuple(x.shape) for x in solution[:7]] == shapes
    assert not any(x.any() for x in solution[:6])
    assert (solution.status == Status.EMPTY).all()
    assert gradient(case, solution[2], solution[3]).shape == shape


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tol", [0.0, 1e-4])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("x", math.nan), ("x", -math.inf)),
        *(("log_a", math.nan), ("log_b", math.inf)),
        *(("epsilon", math.nan), ("epsilon", 0.0), ("epsilon", -1.0)),
    ],
)
def test_a_malformed_problem_does_not_affect_the_others(field, value, tol, dtype):
    case = replace(random_case("", 3, 9, 10), tol=tol).to(dtype)
    expected = run(case)
    malformed = getattr(case, field).clone()
    malformed[(1,) + (2,) * (malformed.dim() - 1)] = value
    solution = run(replace(case, **{field: malformed}))
    for out, clean in zip(solution[:7], expected[:7], strict=True):
        assert_same_bits([out[::2]], [clean[::2]])
    assert all(x[1].isnan().all() for x in solution[:5])
    assert solution.n_iter[1] == case.max_iter
    assert solution.status[1] == Status.INFEASIBLE
    grad = gradient(replace(case, **{field: malformed}), solution[2], solution[3])
    assert not grad[1].any()
    assert grad[::2].isfinite().all()


@needs_library
def test_rows_and_columns_without_an_allowed_pair_have_potential_zero():
    case = random_case("isolated", 1, 9, 10).to(torch.float64)
    cost = case.x.clone()
    cost[0, 4] = math.inf
    cost[0, :, 7] = math.inf
    value, value_linear, f, g, error, *_ = run(replace(case, x=cost))
    assert f[0, 4] == 0
    assert g[0, 7] == 0
    assert all(x.isfinite().all() for x in (value, value_linear, f, g, error))
    assert error >= 1 / 9 - 1e-12  # the mass of the row is not transported
    grad = gradient(replace(case, x=cost), f, g)
    assert not grad[cost == math.inf].any()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tol_stops_each_problem_at_a_different_iteration(dtype):
    epsilon = torch.tensor([1.0, 0.1, 0.02]).double()
    case = random_case("stop", 3, 30, 25, max_iter=500)
    case = replace(case, epsilon=epsilon, tol=1e-3)
    solution = run(case.to(dtype))
    count = solution[5].tolist()
    assert count[0] < count[1] < count[2] < 500
    assert count == reference.forward(case.problem()).n_iter.tolist()
    for i, iterations in enumerate(count):
        same = replace(case.without_padding(i), tol=0.0, max_iter=iterations)
        truth = run(same)
        for name, out, exact in zip(("value", "linear", "f", "g"), solution, truth, strict=False):
            assert_close_to_truth(
                out[i : i + 1], exact, exact, dtype=dtype, scale=1.0, name=f"{name}[{i}]"
            )
        before = run(replace(same, max_iter=iterations - 1))[4]
        assert before.item() > 1e-3 >= solution[4][i].item() - 1e-6


@needs_library
def test_wrong_dtypes_and_options_raise():
    case = random_case("", 1, 2, 2)
    with pytest.raises(TypeError, match=r"torch\.float16"):
        run(case.to(torch.float16))
    with pytest.raises(TypeError, match=r"expected torch\.float32"):
        run(replace(case.to(torch.float32), log_a=case.log_a))
    with pytest.raises(ValueError, match="refused its arguments"):
        run(replace(case, max_iter=-1))


# ------------------------------------------------------------------------------------- build


@pytest.mark.parametrize("width", [16, 32, 64])
def test_every_vector_width_meets_the_tolerance_rule(width, quick_compiler, tmp_path, monkeypatch):
    """The compiler splits vectors that are wider than those of the machine."""
    variant = ("baseline", (f"-DOPTICAL_VECTOR_BYTES={width}", "-Wno-psabi"))
    monkeypatch.setattr(library, "cpu_variants", lambda: [variant])
    path = tmp_path / f"width{width}.so"
    library.build_cpu(ROOT / "csrc", path, quick_compiler)
    loaded = library.Loaded(
        library.open_library(path, library.cpu_source_hash(ROOT / "csrc")), None
    )
    monkeypatch.setattr(library, "load_cpu", lambda: loaded)
    for name in ("ragged", "no_allowed_pair", "31x33", "clusters", "one_fully_masked", "tiny_mass"):
        for dtype in DTYPES:
            assert_backend_correct("cpu", ALL[name], dtype)


def test_compiles_without_a_warning(tmp_path, monkeypatch):
    compiler = library.find_compiler()
    if compiler is None:
        pytest.skip(reason="no C++ compiler")
    monkeypatch.setattr(library, "CPU_FLAGS", (*library.CPU_FLAGS, "-O1", "-Werror"))
    library.build_cpu(ROOT / "csrc", tmp_path / "library.so", compiler)


def test_without_a_compiler_the_reference_runs_with_one_warning(monkeypatch, unloaded):
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setattr(library, "CPU_LIBRARY", "no-such-library.so")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optical.sinkhorn(torch.rand(1, 2, 2), epsilon=1.0)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "no C++ compiler was found (looked for /nonexistent)" in message
    assert "plain PyTorch reference" in message
    assert "\n" not in message
    assert library.load_cpu().reason in message
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        run(random_case("", 1, 2, 2))


def test_a_failed_build_gives_a_reason_in_one_line(quick_compiler, monkeypatch, tmp_path, unloaded):
    folder = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", folder)
    (folder / "cpu" / "simd.h").write_text("#error deliberately broken\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "source_folder", lambda: folder)
    monkeypatch.setattr(library, "CPU_LIBRARY", "no-such-library.so")
    assert "deliberately broken" in library.load_cpu().reason
    assert "\n" not in library.load_cpu().reason


def test_a_library_of_other_sources_is_refused(quick_compiler, monkeypatch, tmp_path):
    path = tmp_path / "old.so"
    library.build_cpu(ROOT / "csrc", path, quick_compiler)
    library.open_library(path, library.cpu_source_hash(ROOT / "csrc"))
    with pytest.raises(library.BuildError, match="other sources"):
        library.open_library(path, "0123456789abcdef")
    monkeypatch.setattr(library, "ABI_VERSION", -1)
    with pytest.raises(library.BuildError, match="interface"):
        library.open_library(path, None)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["no library", "cut short", "one bit"])
def test_a_damaged_library_in_the_cache_is_rebuilt(quick_compiler, monkeypatch, tmp_path, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.open_cached_cpu(ROOT / "csrc", quick_compiler)
    (cached,) = (tmp_path / "cache" / "optical").glob("cpu-*")
    assert cached.stat().st_mode & 0o777 == 0o755
    good = cached.read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    # A new file, since this process has mapped the good one. A mapped file that is truncated
    # crashes the process that reads beyond its end.
    cached.unlink()
    cached.write_bytes({"no library": b"no", "cut short": good[:8192], "one bit": bad}[damage])
    library.open_cached_cpu(ROOT / "csrc", quick_compiler)
    (actual,) = (tmp_path / "cache" / "optical").glob("cpu-*")
    assert actual.stem.endswith(library._short_hash(actual.read_bytes())) and len(
        actual.read_bytes()
    ) == len(good)


@pytest.mark.slow
def test_concurrent_processes_build_the_library_once(tmp_path):
    if library.find_compiler() is None:
        pytest.skip(reason="no C++ compiler")
    script = (
        "from optical.backends import library; library.CPU_LIBRARY = 'no-such-library.so';"
        "library.CPU_FLAGS = (*library.CPU_FLAGS, '-O1');"
        "library.cpu_variants = lambda: [library.BASELINE];"
        "print(library.instruction_set(library.load_cpu().require()))"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", script]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    names = [process.communicate()[0].strip() for process in processes]
    assert names == ["baseline"] * 3
    assert len(list((tmp_path / "optical").glob("cpu-*"))) == 1


def test_the_cache_falls_back_to_the_temporary_folder(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(library.tempfile, "tempdir", str(tmp_path))
    assert library.cache_folder().parent == tmp_path
    # Code must not be loaded from a folder that others can write.
    shared = tmp_path / "shared" / "optical"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert library.cache_folder().parent == tmp_path
