"""The compiled CPU backend: accuracy, bitwise invariance, edge cases, and how it is built."""

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
from optical.backends import cpu, reference, registry
from optical.backends import library as native
from optical.backends.problem import GRADIENTS, Status
from optical.testing.cases import all_cases, random_case
from optical.testing.tolerance import assert_backend_correct, assert_close_to_truth, solve

ROOT = Path(__file__).resolve().parents[2]
ALL = {problem.name: problem for problem in all_cases()}
DTYPES = [torch.float32, torch.float64]

MISSING = native.load_cpu().reason
needs_library = pytest.mark.skipif(MISSING is not None, reason=f"CPU library: {MISSING}")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def forgotten():
    """Clear the cached library of ``native`` before the test, on demand, and after it."""

    def forget():
        native.load_cpu.cache_clear()
        registry._warn_once.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def quick_compiler(monkeypatch):
    """A compiler with flags that compile within seconds, for tests of the build itself."""
    compiler = native.find_compiler()
    if compiler is None:
        pytest.skip(reason="no C++ compiler")
    quick = tuple("-O1" if flag == "-O3" else flag for flag in native.CPU_FLAGS)
    monkeypatch.setattr(native, "CPU_FLAGS", quick)
    monkeypatch.setattr(native, "cpu_variants", lambda: [native.BASELINE])
    return compiler


def run(problem, gradient="envelope"):
    return cpu.forward(problem.problem(gradient))


def backward(problem, outputs, gradient="envelope", value=1.0, need_y=False):
    """Gradients of ``value`` times the value plus ``value_linear``, weighted across the batch."""
    upstream = torch.linspace(0.5, 2, len(problem.epsilon), dtype=problem.epsilon.dtype)
    saved = (outputs.f, outputs.g, outputs.w, outputs.z, outputs.n_iter)
    arguments = problem.problem(gradient)
    return cpu.backward(value * upstream, upstream, None, None, arguments, *saved, True, need_y)


def gradient(problem, f, g):
    """Gradient of the value alone with respect to a given cost."""
    ones = torch.ones_like(problem.epsilon)
    saved = (f, g, f[:0], g[:0], torch.zeros(len(ones), dtype=torch.int32))
    arguments = problem.problem()
    return cpu.backward(ones, 0 * ones, None, None, arguments, *saved, True, False)[0]


def assert_same_bits(left, right):
    for x, y in zip(left, right, strict=True):
        assert torch.equal(x.nan_to_num(nan=1e30), y.nan_to_num(nan=1e30))


def scrambled(batch=23, n=40, m=37, dtype=torch.float32, **options):
    """A ragged batch whose padding rows and columns lie anywhere, not only at the end."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(0, n + 1, (batch,), generator=generator).tolist()
    columns = torch.randint(1, m + 1, (batch,), generator=generator).tolist()
    problem = random_case("scrambled", batch, n, m, rows=rows, columns=columns, **options)
    log_a = problem.log_a[:, torch.randperm(n, generator=generator)]
    log_b = problem.log_b[:, torch.randperm(m, generator=generator)]
    return replace(problem, log_a=log_a, log_b=log_b).to(dtype)


# --------------------------------------------------------------------------------- accuracy


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 15, 17, 24, 33])
@pytest.mark.parametrize("m", [1, 3, 4, 5, 8, 9, 16, 31])
def test_every_remainder_of_block_and_vector(n, m, dtype):
    assert_backend_correct("cpu", random_case(f"{n}x{m}", 2, n, m, max_iter=9), dtype)


@needs_library
def test_against_a_scalar_loop():
    """The definition as a scalar loop without tensors, independent of the float64 reference."""
    problem = random_case("scalar", 1, 4, 3, epsilon=0.2, max_iter=6)
    cost, epsilon = problem.cost[0].tolist(), 0.2
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
    value, value_linear, f_out, g_out, _, n_iter, *_ = run(problem)
    assert value.item() == pytest.approx(linear + epsilon * kl, abs=1e-14)
    assert value_linear.item() == pytest.approx(linear, abs=1e-14)
    assert f_out[0].tolist() == pytest.approx(f, abs=1e-14)
    assert g_out[0].tolist() == pytest.approx(g, abs=1e-14)
    assert n_iter.item() == 6
    expected = torch.tensor([[plan[i, j] for j in range(3)] for i in range(4)]).double()
    assert torch.allclose(gradient(problem, f_out, g_out)[0], expected, atol=1e-14)


@needs_library
@pytest.mark.parametrize("epsilon", [1.0, 1e-1, 1e-2, 1e-3])
def test_costs_of_a_thousand(epsilon):
    """In float32 only: exponents of a million leave the float64 reference ten correct digits."""
    problem = random_case("thousand", 3, 20, 33, epsilon=epsilon, max_iter=30)
    problem = replace(problem, x=1e3 * problem.x, singular=True)
    # At exponents of a million, thirty unrolled steps lose all digits in both precisions.
    gradients = ("envelope", "implicit") if epsilon == 1e-3 else GRADIENTS
    assert_backend_correct("cpu", problem, torch.float32, gradients=gradients)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_masses_continue_in_the_log_domain(dtype):
    """Masses far below the share of one column make the scaled sums untrustworthy."""
    problem = random_case("masses", 3, 19, 23, epsilon=0.05, max_iter=40)
    ladder = torch.linspace(0, -2000 if dtype == torch.float64 else -150, 23).double()
    log_b = ladder.expand(3, 23).log_softmax(1)
    # The heavy columns are far away: the nearest column of every row has almost no mass.
    cost = problem.x + torch.linspace(3, 0, 23).double()
    assert_backend_correct("cpu", replace(problem, x=cost, log_b=log_b), dtype)


@needs_library
@pytest.mark.parametrize(("tol", "seed"), [(1e-1, 8), (1e-2, 14), (1e-3, 17)])
def test_extreme_masses_do_not_stop_early(tol, seed):
    """Masses below e^-87 underflow in float32 sums, but the shares of such rows do not."""
    problem = random_case("stop", 64, 25, 21, epsilon=0.003, max_iter=60, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    log_a, log_b = (
        torch.randn(64, size, generator=generator, dtype=torch.float64).mul(40).log_softmax(1)
        for size in (25, 21)
    )
    problem = replace(problem, log_a=log_a, log_b=log_b, tol=tol)
    rounded = problem.to(torch.float32).to(torch.float64)  # the same problem for both
    n_iter = run(problem.to(torch.float32))[5]
    early = run(replace(rounded, tol=tol * 1.01 + 1e-6))[5]
    late = run(replace(rounded, tol=tol * 0.99 - 1e-6))[5]
    assert ((early <= n_iter) & (n_iter <= late)).all()


@needs_library
def test_the_penalty_of_a_plan_many_times_its_mass_is_finite():
    """Rows of mass 1 and e^-100, the second with a plan of e^650: their ratio overflows."""
    log_a, cost = torch.tensor([0.0, -100.0]).double(), torch.tensor([[0.0], [-7.5]]).double()
    found = optical.sinkhorn(
        cost[None], epsilon=0.01, log_a=log_a[None], rho=(1.0, None), max_iter=0, backend="cpu"
    )
    # f = g = 0 contribute nothing: the value is epsilon (1 - P) plus sum P log(P / a) - P + a.
    plan = (log_a - cost[:, 0] / 0.01).exp()
    expected = (0.01 * (log_a.exp() - plan) - cost[:, 0] / 0.01 * plan - plan + log_a.exp()).sum()
    torch.testing.assert_close(found.value, expected[None], rtol=1e-12, atol=0)


@needs_library
def test_long_runs_that_drift_are_rebased():
    """Infeasible blocks drive the potentials apart, far beyond the range of float32 scalings."""
    forbidden = (torch.arange(12)[:, None] < 6) ^ (torch.arange(12)[None, :] < 3)
    problem = random_case("infeasible", 2, 12, 12, epsilon=0.5, max_iter=700)
    problem = replace(problem, x=problem.x.masked_fill(forbidden, math.inf))
    assert_backend_correct("cpu", problem, torch.float32)
    assert run(problem.to(torch.float32))[2].abs().max() > 0.5 * 200


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_anywhere(dtype):
    assert_backend_correct("cpu", scrambled(dtype=torch.float64), dtype)


# -------------------------------------------------------------------------------- invariance


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tol", [0.0, 1e-3])
def test_alone_in_a_batch_and_on_any_thread_has_the_same_bits(dtype, tol, threads):
    problem = replace(scrambled(dtype=dtype, epsilon=0.05), tol=tol, max_iter=80)
    threads(1)
    expected = run(problem)
    for count in (2, 3):
        threads(count)
        assert_same_bits(run(problem), expected)
    for i in range(len(problem.epsilon)):
        alone = run(problem.select(i))
        assert_same_bits(alone[:7], [x[i : i + 1] for x in expected[:7]])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_changes_no_bit(dtype):
    problem = scrambled(dtype=dtype)
    padding = (problem.log_a == -math.inf)[:, :, None] | (problem.log_b == -math.inf)[:, None, :]
    expected = run(problem)
    for poison in (math.nan, math.inf, -math.inf, 1e30):
        filled = replace(problem, x=problem.x.masked_fill(padding, poison))
        assert_same_bits(run(filled), expected)
        out = gradient(filled, expected[2], expected[3])
        assert_same_bits([out], [gradient(problem, expected[2], expected[3])])
        assert not out[padding].any()
    for i in range(len(problem.epsilon)):
        cut = problem.without_padding(i)
        if not cut.x.numel():
            continue
        value, value_linear, f, g, error, n_iter, *_ = run(cut)
        rows, columns = problem.log_a[i] > -math.inf, problem.log_b[i] > -math.inf
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
def test_strides():
    problem = random_case("strides", 4, 11, 13).to(torch.float32)
    expected = run(problem)
    wide = torch.full((4, 15, 32), math.nan)
    wide[:, 2:13, 9:22] = problem.x
    every_other = torch.full((8, 11, 13), math.nan)
    every_other[::2] = problem.x
    turned = problem.x.mT.contiguous().mT
    for cost in (wide[:, 2:13, 9:22], every_other[::2], turned):
        assert not cost.is_contiguous()
        assert_same_bits(run(replace(problem, x=cost)), expected)
        out = gradient(replace(problem, x=cost), expected[2], expected[3])
        assert_same_bits([out], [gradient(problem, expected[2], expected[3])])
    one = replace(problem, x=problem.x[:1].expand(4, 11, 13))
    assert_same_bits([x[3] for x in run(one)[:7]], [x[0] for x in expected[:7]])


@needs_library
def test_strides_of_vectors():
    problem = clouds("cosine", 3, 9, 12, 10).to(torch.float32)
    expected = run(problem)
    wide = torch.full((3, 12, 25), math.nan)
    wide[:, :, 5:15] = problem.y
    strided = replace(problem, y=wide[:, :, 5:15], x=problem.x.transpose(0, 1).contiguous().mT.mT)
    strided = replace(strided, x=strided.x.transpose(0, 1))
    assert not strided.y.is_contiguous()
    assert not strided.x.is_contiguous()
    assert_same_bits(run(strided), expected)
    out = backward(strided, expected, need_y=True)
    assert_same_bits(out, backward(problem, expected, need_y=True))


# ---------------------------------------------------------------------- one problem, many threads


def clouds(kind, batch, n, m, dim, **options):
    """Token vectors of norm about 1, a few of them padding."""
    generator = torch.Generator().manual_seed(11)
    x, y = (torch.randn(batch, k, dim, generator=generator).double() for k in (n, m))
    scale = 1 if kind == "cosine" else 2 * dim**0.5
    rows, columns = ([k - k // 9] * batch for k in (n, m))
    problem = random_case("clouds", batch, n, m, rows=rows, columns=columns, **options)
    return replace(problem, x=x / scale, y=y / scale, kind=kind)


@needs_library
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("gradient", ["envelope", "implicit", "unroll"])
@pytest.mark.parametrize("kind", ["given", "cosine", "sqeuclidean"])
def test_a_team_of_threads_gives_the_same_bits(kind, gradient, low_memory, threads):
    """A team of threads shares problems of more than 1024 x 1024 entries, in chunks of rows."""
    problem = clouds("cosine" if kind == "given" else kind, 1, 1200, 1030, 6, max_iter=4)
    if kind == "given":
        problem = replace(problem, x=problem.cost, y=None, kind="given")
    problem = replace(problem, low_memory=low_memory).to(torch.float32)
    threads(1)
    expected = run(problem, gradient)
    need_y = kind != "given"
    slopes = [x for x in backward(problem, expected, gradient, need_y=need_y) if x is not None]
    v = torch.randn(1, 1030, 3)
    product = cpu.apply_plan(problem.problem(), expected.f, expected.g, v, False)
    for count in (2, 3):
        threads(count)
        assert_same_bits(run(problem, gradient), expected)
        found = backward(problem, expected, gradient, need_y=need_y)
        assert_same_bits([x for x in found if x is not None], slopes)
        same = cpu.apply_plan(problem.problem(), expected.f, expected.g, v, False)
        assert_same_bits([same], [product])


@needs_library
@pytest.mark.parametrize("kind", ["cosine", "sqeuclidean"])
def test_a_large_problem_by_the_tolerance_rule(kind):
    """Larger than the problems whose cost is stored."""
    problem = clouds(kind, 1, 1040, 1050, 4, max_iter=3)
    assert_backend_correct("cpu", problem, torch.float32, gradients=["envelope", "unroll"])
    low = replace(problem, low_memory=True)
    assert_backend_correct("cpu", low, torch.float32, gradients=["envelope"])


@needs_library
@pytest.mark.parametrize(("memory", "seed", "iterations"), [(1, 2, 5), (2, 0, 6), (5, 3, 8)])
def test_anderson_rejects_a_mixture_that_raises_the_residual(memory, seed, iterations):
    """The first rejection of a run, before rounding is amplified; without it f is off by 0.01."""
    costs = random_case("rejected", 3, 12, 15, epsilon=0.02, rows=[12, 12, 5], seed=seed)
    case = replace(costs, anderson=memory, max_iter=iterations)
    truth, out = solve("reference", case), solve("cpu", case)
    for name in ("f", "g", "value"):
        torch.testing.assert_close(out[name], truth[name], rtol=0, atol=1e-9)


@needs_library
@pytest.mark.parametrize("rho", [1e3, 1e4, 1e5])
def test_implicit_gradients_of_large_penalties(rho):
    """The adjoint system is nearly singular along (1, -1)."""
    problem = replace(ALL["rho_strong"], rho_a=rho, rho_b=2 * rho).to(torch.float32)
    out = solve("cpu", problem, "implicit")
    truth = solve("reference", problem.to(torch.float64), "implicit")
    for name in ("grad_x", "grad_log_a", "grad_log_b"):
        torch.testing.assert_close(out[name].double(), truth[name], rtol=0, atol=1e-6)


@needs_library
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("rho", [1e3, 1e5, 1e7])
def test_unrolled_gradients_of_large_penalties(rho, both):
    """They do not magnify the rounding errors of the sums."""
    problem = random_case("strong", 3, 40, 50, epsilon=0.05, max_iter=10, seed=0)
    problem = replace(problem, rho_a=rho, rho_b=2 * rho if both else math.inf).to(torch.float32)
    out, single = solve("cpu", problem, "unroll"), solve("reference", problem, "unroll")
    truth = solve("reference", problem.to(torch.float64), "unroll")
    for name in ("grad_x", "grad_log_a", "grad_log_b"):
        scale = max(1.0, truth[name].abs().max().item())
        options = {"dtype": torch.float32, "scale": scale, "name": name}
        assert_close_to_truth(out[name], truth[name], single[name], **options)


@needs_library
@pytest.mark.parametrize("gradient", ["envelope", "implicit", "unroll"])
@pytest.mark.parametrize("name", ["everything", "cosine_ragged", "rho", "omega", "clusters"])
def test_gradients_have_the_same_bits_alone_and_on_any_thread(name, gradient, threads):
    matching = [problem for key, problem in ALL.items() if name in key and not problem.anderson]
    assert matching
    for problem in matching:
        if problem.anneal_start > 0 and gradient == "unroll":
            continue
        problem = problem.to(torch.float32)
        threads(1)
        outputs = run(problem, gradient)
        need_y = problem.y is not None
        slopes = [x for x in backward(problem, outputs, gradient, need_y=need_y) if x is not None]
        threads(3)
        assert_same_bits(run(problem, gradient), outputs)
        again = backward(problem, outputs, gradient, need_y=need_y)
        assert_same_bits([x for x in again if x is not None], slopes)


@needs_library
def test_in_a_forked_process_with_threads():
    """OpenMP deadlocks in a forked child, so the library starts threads without it."""
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
    """From vectors: O(B (n + m)) outputs and one problem per thread, no (B, n, m) tensor."""
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
    assert grown < 2000 * 64 * 64 * 4 / 3, "a third of one (B, n, m) tensor"


# -------------------------------------------------------------------------------- edge cases


@needs_library
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0), (0, 0, 0)])
def test_nothing_to_do(shape):
    batch, n, m = shape
    problem = random_case("empty", *shape).to(torch.float32)
    outputs = run(problem)
    shapes = [(batch,), (batch,), (batch, n), (batch, m), (batch,), (batch,), (batch,)]
    assert [tuple(x.shape) for x in outputs[:7]] == shapes
    assert not any(x.any() for x in outputs[:6])
    assert (outputs.status == Status.EMPTY).all()
    assert gradient(problem, outputs[2], outputs[3]).shape == shape


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
def test_an_invalid_problem_is_nan_alone(field, value, tol, dtype):
    problem = replace(random_case("", 3, 9, 10), tol=tol).to(dtype)
    expected = run(problem)
    broken = getattr(problem, field).clone()
    broken[(1,) + (2,) * (broken.dim() - 1)] = value
    outputs = run(replace(problem, **{field: broken}))
    for out, clean in zip(outputs[:7], expected[:7], strict=True):
        assert_same_bits([out[::2]], [clean[::2]])
    assert all(x[1].isnan().all() for x in outputs[:5])
    assert outputs.n_iter[1] == problem.max_iter
    assert outputs.status[1] == Status.INFEASIBLE
    grad = gradient(replace(problem, **{field: broken}), outputs[2], outputs[3])
    assert grad[1].isnan().all()
    assert grad[::2].isfinite().all()


@needs_library
def test_a_row_or_column_without_an_allowed_pair_keeps_potential_zero():
    problem = random_case("unmatched", 1, 9, 10).to(torch.float64)
    cost = problem.x.clone()
    cost[0, 4] = math.inf
    cost[0, :, 7] = math.inf
    value, value_linear, f, g, error, *_ = run(replace(problem, x=cost))
    assert f[0, 4] == 0
    assert g[0, 7] == 0
    assert all(x.isfinite().all() for x in (value, value_linear, f, g, error))
    assert error >= 1 / 9 - 1e-12  # the row's mass has nowhere to go
    grad = gradient(replace(problem, x=cost), f, g)
    assert not grad[cost == math.inf].any()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stops_each_problem_at_its_own_iteration(dtype):
    epsilon = torch.tensor([1.0, 0.1, 0.02]).double()
    problem = random_case("stop", 3, 30, 25, max_iter=500)
    problem = replace(problem, epsilon=epsilon, tol=1e-3)
    outputs = run(problem.to(dtype))
    count = outputs[5].tolist()
    assert count[0] < count[1] < count[2] < 500
    assert count == reference.forward(problem.problem()).n_iter.tolist()
    for i, iterations in enumerate(count):
        same = replace(problem.without_padding(i), tol=0.0, max_iter=iterations)
        truth = run(same)
        for name, out, exact in zip(("value", "linear", "f", "g"), outputs, truth, strict=False):
            assert_close_to_truth(
                out[i : i + 1], exact, exact, dtype=dtype, scale=1.0, name=f"{name}[{i}]"
            )
        before = run(replace(same, max_iter=iterations - 1))[4]
        assert before.item() > 1e-3 >= outputs[4][i].item() - 1e-6


@needs_library
def test_refuses_what_it_cannot_read():
    problem = random_case("", 1, 2, 2)
    with pytest.raises(TypeError, match=r"torch\.float16"):
        run(problem.to(torch.float16))
    with pytest.raises(TypeError, match=r"expected torch\.float32"):
        run(replace(problem.to(torch.float32), log_a=problem.log_a))
    with pytest.raises(ValueError, match="refused its arguments"):
        run(replace(problem, max_iter=-1))


# ------------------------------------------------------------------------------------- build


@pytest.mark.parametrize("width", [16, 32, 64])
def test_every_vector_width_meets_the_truth(width, quick_compiler, tmp_path, monkeypatch):
    """The compiler splits vectors wider than the machine supports: slow but equivalent."""
    variant = ("baseline", (f"-DOPTICAL_VECTOR_BYTES={width}", "-Wno-psabi"))
    monkeypatch.setattr(native, "cpu_variants", lambda: [variant])
    path = tmp_path / f"width{width}.so"
    native.build_cpu(ROOT / "csrc", path, quick_compiler)
    library = native.open_library(path, native.cpu_source_hash(ROOT / "csrc"))
    monkeypatch.setattr(native, "load_cpu", lambda: native.Loaded(library, None))
    for name in ("ragged", "no_allowed_pair", "31x33", "clusters", "one_fully_masked", "tiny_mass"):
        for dtype in DTYPES:
            assert_backend_correct("cpu", ALL[name], dtype)


def test_compiles_without_a_warning(tmp_path, monkeypatch):
    compiler = native.find_compiler()
    if compiler is None:
        pytest.skip(reason="no C++ compiler")
    monkeypatch.setattr(native, "CPU_FLAGS", (*native.CPU_FLAGS, "-O1", "-Werror"))
    native.build_cpu(ROOT / "csrc", tmp_path / "library.so", compiler)


def test_without_a_compiler_the_reference_runs_with_one_warning(monkeypatch, forgotten):
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setattr(native, "CPU_LIBRARY", "no-such-library.so")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optical.sinkhorn(torch.rand(1, 2, 2), epsilon=1.0)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "no C++ compiler was found (looked for /nonexistent)" in message
    assert "plain PyTorch reference" in message
    assert "\n" not in message
    assert native.load_cpu().reason in message
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        run(random_case("", 1, 2, 2))


def test_a_build_that_fails_is_a_reason_in_one_line(
    quick_compiler, monkeypatch, tmp_path, forgotten
):
    folder = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", folder)
    (folder / "cpu" / "simd.h").write_text("#error deliberately broken\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "source_folder", lambda: folder)
    monkeypatch.setattr(native, "CPU_LIBRARY", "no-such-library.so")
    assert "deliberately broken" in native.load_cpu().reason
    assert "\n" not in native.load_cpu().reason


def test_a_stale_library_is_not_used(quick_compiler, monkeypatch, tmp_path):
    library = tmp_path / "old.so"
    native.build_cpu(ROOT / "csrc", library, quick_compiler)
    native.open_library(library, native.cpu_source_hash(ROOT / "csrc"))
    with pytest.raises(native.BuildError, match="other sources"):
        native.open_library(library, "0123456789abcdef")
    monkeypatch.setattr(native, "ABI_VERSION", -1)
    with pytest.raises(native.BuildError, match="interface"):
        native.open_library(library, None)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["no library", "cut short", "one bit"])
def test_a_damaged_library_in_the_cache_is_built_anew(
    quick_compiler, monkeypatch, tmp_path, damage
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.open_cached_cpu(ROOT / "csrc", quick_compiler)
    (cached,) = (tmp_path / "cache" / "optical").glob("cpu-*")
    assert cached.stat().st_mode & 0o777 == 0o755
    good = cached.read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    # A new file, because this process has mapped the good one: truncating that one would crash the
    # process at its next access past the end.
    cached.unlink()
    cached.write_bytes({"no library": b"no", "cut short": good[:8192], "one bit": bad}[damage])
    native.open_cached_cpu(ROOT / "csrc", quick_compiler)
    (found,) = (tmp_path / "cache" / "optical").glob("cpu-*")
    contents = found.read_bytes()
    assert found.stem.endswith(native._short_hash(contents)) and len(contents) == len(good)


@pytest.mark.slow
def test_processes_that_build_together_agree(tmp_path):
    if native.find_compiler() is None:
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


def test_a_cache_that_cannot_be_written_moves_to_the_temporary_folder(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path))
    assert native.cache_folder().parent == tmp_path
    # A world-writable folder: code must not be loaded from it.
    shared = tmp_path / "shared" / "optical"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert native.cache_folder().parent == tmp_path
