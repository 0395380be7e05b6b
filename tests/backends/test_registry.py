"""Every backend on every problem by the one tolerance rule, and the choice between backends."""

import math
import warnings
from dataclasses import replace

import pytest
import torch

from optical import BackendUnsupported, Status, sinkhorn
from optical.backends import reference, registry
from optical.backends.problem import GRADIENTS, example, given
from optical.ot import operator
from optical.testing.cases import packed, poisoned, problems, random_clouds, random_problem
from optical.testing.tolerance import (
    FIELDS,
    TOLERANCE,
    assert_backend_correct,
    assert_close_to_truth,
    solve,
)

ALL = {problem.name: problem for problem in problems()}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float64, torch.float32]


def named(dtype):
    return str(dtype).removeprefix("torch.")


def skip_unless_supported(backend, problem, gradient="envelope"):
    reason = registry.BACKENDS[backend].supports(problem.arguments(gradient))
    if reason is not None:
        pytest.skip(reason=f"{backend}: {reason}")


@pytest.fixture(params=[(b, d) for b in registry.BACKENDS for d in DEVICES], ids="-".join)
def place(request):
    """A backend and a device it serves."""
    backend, device = request.param
    skip_unless_supported(backend, random_problem("", 1, 1, 1).to(torch.float32, device))
    return backend, device


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("name", ALL)
def test_every_problem_by_the_tolerance_rule(place, name, dtype, gradient, poisoned_memory):
    backend, device = place
    problem = ALL[name]
    if problem.anderson and gradient == "unroll":
        pytest.skip(reason="no derivative of Anderson acceleration, in any backend")
    skip_unless_supported(backend, problem.to(dtype, device), gradient)
    if place == ("reference", "cpu"):
        pytest.skip(reason="it is what the others are compared with")
    assert_backend_correct(backend, problem, dtype, device, (gradient,))


@pytest.mark.parametrize("name", ALL)
def test_the_reference_in_float32_stops_and_ends_as_in_float64(name, poisoned_memory):
    """The rest of the rule holds by itself: exact zeros, the same status, nothing but numbers."""
    problem = ALL[name]
    gradient = "implicit" if problem.anderson else "unroll"
    assert_backend_correct("reference", problem, torch.float32, gradients=(gradient,))


HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("half", HALVES, ids=named)
@pytest.mark.parametrize("kind", ["cosine", "sqeuclidean", "dot"])
def test_half_vectors_by_the_tolerance_rule(place, kind, half, gradient):
    """The truth is that of the rounded vectors: after their own rounding nothing is lost."""
    backend, device = place
    epsilon = 1.0 if kind == "cosine" else 16.0
    clouds = random_clouds(kind, kind, batch=2, n=7, m=6, dim=24, epsilon=epsilon)
    if place == ("reference", "cpu"):
        pytest.skip(reason="it is what the others are compared with")
    for problem in (clouds, packed(clouds)):
        skip_unless_supported(backend, problem.to(torch.float32, device, half), gradient)
        given_half = problem.to(torch.float32, device, half)
        out = solve(backend, given_half, gradient)
        same = solve("reference", given_half.to(torch.float32, "cpu"), gradient)
        truth = solve("reference", given_half.to(torch.float64, "cpu"), gradient)
        for field in truth:
            # A gradient is rounded to the vectors' dtype at the end.
            dtype = half if field in ("grad_x", "grad_y") else torch.float32
            assert out[field].dtype == dtype or field in ("n_iter", "status")
            scale = max(1.0, truth[field].abs().max().item())
            rule = {"dtype": dtype, "scale": scale, "name": f"{backend} {problem.name} {field}"}
            assert_close_to_truth(out[field].cpu(), truth[field], same[field], **rule)


def test_stops_each_problem_at_the_iteration_the_truth_stops_at(place):
    backend, device = place
    hard = ALL["epsilon_per_problem"]
    for problem in (hard, ALL["ragged"], ALL["one_fully_masked"], ALL["marginals"]):
        problem = replace(problem, max_iter=60, tol=1e-3)
        out = solve(backend, problem.to(torch.float32, device))
        n_iter = out["n_iter"].cpu()
        # In float32 a residual may round to the other side of tol, but not by more than this.
        early = solve("reference", replace(problem, tol=1.001e-3 + 1e-6))["n_iter"]
        late = solve("reference", replace(problem, tol=0.999e-3 - 1e-6))["n_iter"]
        assert ((early <= n_iter) & (n_iter <= late)).all(), (early, n_iter, late)
        for i, count in enumerate(n_iter.tolist()):
            same = {"max_iter": count, "tol": 0.0}
            single = problem.without_padding(i)
            if not single.x.numel():
                continue
            truth = solve("reference", replace(single, **same))
            in_dtype = solve("reference", replace(single.to(torch.float32), **same))
            for field in ("value", "value_linear", "marginal_error"):
                assert_close_to_truth(
                    out[field][i : i + 1].cpu(),
                    truth[field],
                    in_dtype[field],
                    dtype=torch.float32,
                    scale=1.0,
                    name=f"{backend} {problem.name}[{i}] {field}",
                )


SOME = ["ragged", "nan_padding", "clusters", "everything", "cosine_ragged", "dot_ragged_packed"]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", SOME)
def test_is_deterministic_and_independent_of_the_batch(place, name, gradient):
    backend, device = place
    problem = ALL[name].to(torch.float32, device)
    skip_unless_supported(backend, problem, gradient)
    together, again = solve(backend, problem, gradient), solve(backend, problem, gradient)
    for field in together:
        assert torch.equal(together[field], again[field]), field
    if backend == "reference":
        return  # PyTorch chooses its reductions by the shape of the whole batch.
    for i in range(len(problem.epsilon)):
        alone = solve(backend, problem.one(i), gradient)
        for field in FIELDS:
            part = slice(i, i + 1)
            if problem.cu_a is not None and field in "fg":
                offsets = problem.cu_a if field == "f" else problem.cu_b
                part = slice(int(offsets[i]), int(offsets[i + 1]))
            assert torch.equal(alone[field], together[field][part]), field


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", ["given", "cosine", "sqeuclidean", "dot"])
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_the_content_of_padding_changes_no_bit(place, dtype, kind, gradient):
    backend, device = place
    lengths = {"rows": [9, 3, 0, 5], "columns": [2, 11, 4, 8]}
    problem = random_problem("padded", 4, 9, 11, **lengths)
    if kind != "given":
        problem = random_clouds("padded", kind, batch=4, n=9, m=11, **lengths)
    dirty = poisoned(problem)
    absent = problem.log_a == -math.inf
    clean = replace(problem, f0=absent * 0.0, g0=torch.zeros_like(problem.log_b), max_iter=8)
    dirty = replace(dirty, f0=torch.where(absent, math.nan, 0.0), g0=clean.g0, max_iter=8)
    options = {"rho_a": 0.5, "omega": 1.2, "anneal_start": 1.0}
    if registry.BACKENDS[backend].supports(clean.to(dtype, device).arguments(gradient)):
        clean, dirty = (replace(x, f0=None, g0=None) for x in (clean, dirty))
    else:
        clean, dirty = (replace(x, **options) for x in (clean, dirty))
    skip_unless_supported(backend, clean.to(dtype, device), gradient)
    clean, dirty = (solve(backend, x.to(dtype, device), gradient) for x in (clean, dirty))
    for field in clean:
        assert torch.equal(clean[field], dirty[field]), field


BROKEN = [(field, value) for field in ("x", "log_a", "log_b", "epsilon") for value in (math.nan,)]
BROKEN += [("x", -math.inf), ("log_b", math.inf), ("epsilon", 0.0), ("epsilon", -1.0)]


@pytest.mark.parametrize("kind", ["given", "cosine"])
@pytest.mark.parametrize(("field", "value"), BROKEN)
def test_what_is_not_a_number_spoils_its_own_problem_alone(place, kind, field, value):
    backend, device = place
    problem = random_problem("", 3, 5, 6) if kind == "given" else random_clouds("", kind, n=5, m=6)
    problem = problem.to(torch.float32, device)
    broken = getattr(problem, field).clone()
    broken[1].view(-1)[0] = value
    clean, out = (solve(backend, x) for x in (problem, replace(problem, **{field: broken})))
    assert out["status"].tolist() == [Status.MAX_ITER, Status.INFEASIBLE, Status.MAX_ITER]
    assert out["n_iter"].tolist() == [problem.max_iter] * 3
    for name in ("value", "value_linear", "marginal_error", "f", "g"):
        assert out[name][1].isnan().all(), name
    for name in clean:
        for i in (0, 2):
            assert torch.equal(out[name][i], clean[name][i]), name


def test_status_agrees_with_the_reference(place):
    backend, device = place
    for name in ("one_fully_masked", "unequal_mass", "forbidden_lines", "epsilon_per_problem"):
        for tol in (0.0, 1e-2):
            problem = replace(ALL[name], tol=tol, max_iter=60).to(torch.float32, device)
            expected = solve("reference", problem)["status"]
            assert torch.equal(solve(backend, problem)["status"], expected), (name, tol)


def test_a_problem_is_the_same_with_and_without_padding(place):
    backend, device = place
    padded = ALL["ragged"].to(torch.float32, device)
    out = solve(backend, padded)
    for i in range(4):
        alone = solve(backend, padded.without_padding(i))
        for field in ("value", "value_linear"):
            torch.testing.assert_close(alone[field], out[field][i : i + 1], rtol=1e-5, atol=1e-6)


def test_strided_inputs_and_expanded_upstream_gradients(place):
    backend, device = place
    base = torch.rand(5, 8, 12, device=device)
    cost = base.permute(1, 2, 0)[::2, 1::3].requires_grad_()  # (4, 4, 5), no dense dimension
    (gradient,) = torch.autograd.grad(
        sinkhorn(cost, epsilon=0.2, backend=backend).value.sum(), cost
    )
    truth = sinkhorn(cost.detach().cpu().double(), epsilon=0.2, backend="reference").plan()
    torch.testing.assert_close(gradient.cpu().double(), truth, rtol=1e-4, atol=1e-6)


def test_the_tolerance_rule_names_the_worst_entry():
    truth = torch.zeros(2, 3, dtype=torch.float64)
    wrong = truth.clone()
    wrong[1, 2] = 0.25
    rule = {"dtype": torch.float32, "scale": 1.0, "name": "the problem"}
    with pytest.raises(AssertionError, match=r"the problem: worst at \(1, 2\): 0.25, truth 0.0"):
        assert_close_to_truth(wrong, truth, truth, **rule)
    assert_close_to_truth(wrong, truth, wrong, **rule)  # plain PyTorch is as wrong
    wrong[1, 2] = float("nan")
    with pytest.raises(AssertionError, match="nan"):
        assert_close_to_truth(wrong, truth, truth, **rule)
    with pytest.raises(AssertionError, match="shape"):
        assert_close_to_truth(truth[:1], truth, truth, **rule)
    assert TOLERANCE[torch.float32] == 1e-5


@pytest.mark.parametrize("name", ["7x5", "marginals", "epsilon_0.01"])
def test_fast_problems_may_be_off_by_a_rounded_plan_and_no_more(name, monkeypatch):
    """Iterations on costs off by epsilon / 2048 pass as "fast" only, on costs off by more not."""
    wave = torch.arange(ALL[name].x.numel()).view_as(ALL[name].x).sin()

    def check(share, precision):
        def forward(p):
            cost = p.x + share * p.epsilon[:, None, None] * wave.to(p.x)
            first = reference.forward(p._replace(x=cost, max_iter=p.max_iter - 1))
            last = reference.forward(p._replace(f0=first.f, g0=first.g, max_iter=1))
            return last._replace(n_iter=last.n_iter + p.max_iter - 1)

        rounding = replace(registry.BACKENDS["reference"], name="rounding", forward=forward)
        monkeypatch.setitem(registry.BACKENDS, "rounding", rounding)
        problem = replace(ALL[name], precision=precision)
        assert_backend_correct("rounding", problem, torch.float32)

    check(2**-11, "fast")
    for share, precision in ((2**-11, "exact"), (0.1, "fast")):
        with pytest.raises(AssertionError, match=r"rounding .*: worst at"):
            check(share, precision)


COST = torch.zeros(2, 3, 4)
PROBLEM = example(COST)


def stub(name, automatic_on, reason):
    reference = registry.BACKENDS["reference"]
    return replace(
        reference, name=name, automatic_on=automatic_on, supports=lambda arguments: reason
    )


@pytest.fixture
def table(monkeypatch):
    """A table of our own, so that these tests do not depend on what is installed."""

    def install(*entries):
        entries = (*entries, stub("reference", (), None))
        monkeypatch.setattr(registry, "BACKENDS", {entry.name: entry for entry in entries})
        registry._warn_once.cache_clear()

    monkeypatch.delenv("OPTICAL_BACKEND", raising=False)
    yield install
    registry._warn_once.cache_clear()


def test_auto_takes_the_first_backend_of_the_device_that_supports_the_problem(table):
    table(stub("gpu", ("cuda",), None), stub("fast", ("cpu",), None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.choose("auto", PROBLEM).name == "fast"
        assert registry.choose("gpu", PROBLEM).name == "gpu"


def test_auto_asks_in_the_order_of_the_table(table, monkeypatch):
    table(stub("one", ("cpu",), None), stub("two", ("cpu",), None), stub("late", ("cpu",), None))
    orders = (
        registry.Order("gradients", lambda p, gradient: gradient, ("two", "one"), "predicted"),
        registry.Order("the rest", lambda p, gradient: True, ("late",), "predicted"),
    )
    monkeypatch.setattr(registry, "ORDERS", orders)
    assert registry.choose("auto", PROBLEM).name == "late"
    assert registry.choose("auto", PROBLEM, gradient=True).name == "two"
    assert registry.choose("one", PROBLEM, gradient=True).name == "one"
    registry.BACKENDS["late"] = stub("late", ("cpu",), "too late")
    assert registry.choose("auto", PROBLEM).name == "one"


def test_the_order_names_backends_that_exist_and_where_it_comes_from():
    assert registry.ORDERS[-1].applies(PROBLEM, False)
    for order in registry.ORDERS:
        assert set(order.names) <= set(registry.BACKENDS)
        assert order.provenance in ("predicted", "measured")
    x = torch.zeros(2, 3, 300)
    cosine, half = (example(v, v, "cosine") for v in (x, x.half()))
    others = PROBLEM, cosine, half, example(x, x, "dot")
    first = [[registry._ordered(p, g)[1][0].name for p in others] for g in (False, True)]
    assert first == [["cuda", "cuda", "cuda", "triton"], ["cuda", "triton", "triton", "triton"]]


def test_falling_back_to_the_reference_warns_once_per_reason(table):
    table(stub("fast", ("cpu",), "too small"))
    with pytest.warns(RuntimeWarning, match="plain PyTorch reference: fast: too small"):
        assert registry.choose("auto", PROBLEM).name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.choose("auto", PROBLEM).name == "reference"
    registry.BACKENDS["fast"] = stub("fast", ("cpu",), "too big")
    with pytest.warns(RuntimeWarning, match="too big"):
        registry.choose("auto", PROBLEM)


def test_a_backend_asked_for_by_name_never_falls_back(table):
    table(stub("fast", ("cpu",), "it is Sunday"))
    with pytest.raises(BackendUnsupported, match=r"backend 'fast' cannot .*: it is Sunday"):
        registry.choose("fast", PROBLEM)


def test_the_environment_variable_replaces_auto_only_and_is_read_at_each_call(table, monkeypatch):
    table(stub("fast", ("cpu",), None))
    assert registry.choose("auto", PROBLEM).name == "fast"
    monkeypatch.setenv("OPTICAL_BACKEND", "reference")
    assert registry.choose("auto", PROBLEM).name == "reference"
    assert registry.choose("fast", PROBLEM).name == "fast"
    monkeypatch.setenv("OPTICAL_BACKEND", "auto")
    assert registry.choose("auto", PROBLEM).name == "fast"
    monkeypatch.setenv("OPTICAL_BACKEND", "fastest")
    wanted = "OPTICAL_BACKEND is 'fastest'; expected one of 'auto', 'fast', 'reference'"
    with pytest.raises(ValueError, match=wanted):
        registry.choose("auto", PROBLEM)


def test_unknown_names_are_answered_with_the_known_ones():
    wanted = "backend is 'gpu'; expected one of 'auto', 'cuda', 'triton', 'cpu', 'reference'"
    with pytest.raises(ValueError, match=wanted):
        sinkhorn(COST, epsilon=0.1, backend="gpu")


def test_an_error_inside_a_backend_reaches_the_user(table):
    def broken(*arguments):
        raise ZeroDivisionError("a bug")

    table(replace(stub("fast", ("cpu",), None), forward=broken))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        sinkhorn(COST, epsilon=0.1)


def test_explain_prints_the_table_with_reasons(table, monkeypatch):
    table(stub("gpu", ("cuda",), "no device"), stub("fast", ("cpu",), None))
    assert registry.explain(COST).splitlines() == [
        "cost (2, 3, 4) float32 on cpu, backend='auto'",
        "   gpu        no device",
        "-> fast       supported",
        "   reference  supported",
    ]
    monkeypatch.setenv("OPTICAL_BACKEND", "gpu")
    lines = registry.explain(COST).splitlines()
    assert lines[0].endswith("backend='auto' (OPTICAL_BACKEND=gpu)")
    assert not any(line.startswith("->") for line in lines)


def test_explain_takes_vectors_and_options(table):
    table(
        replace(stub("fast", ("cpu",), None), supports=lambda p: f"no {p.kind}, {p.gradient}"),
    )
    x, y = torch.zeros(2, 3, 8).half(), torch.zeros(2, 4, 8)
    lines = registry.explain(x, y=y, kind="cosine", gradient="implicit").splitlines()
    assert lines == [
        "cosine cost of x (2, 3, 8) and y (2, 4, 8) float16 on cpu, backend='auto'",
        "   fast       no cosine, implicit",
        "-> reference  supported",
    ]


def test_reasons_say_what_was_found_and_what_is_possible():
    supports = {name: backend.supports for name, backend in registry.BACKENDS.items()}
    assert "meta" in supports["cpu"](example(COST.to("meta")))
    triton = supports["triton"](PROBLEM)
    assert triton is None or "CUDA" in triton or "not installed" in triton


def test_triton_says_which_options_it_does_not_know(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    supports = registry.BACKENDS["triton"].supports
    assert "anderson" in supports(PROBLEM._replace(anderson=4))
    assert "float64" in supports(example(COST.double()))
    wide = example(torch.zeros(1, 200, 4), gradient="unroll")
    for served in (PROBLEM, wide, PROBLEM._replace(gradient="implicit", rho_a=1.0, omega=1.5)):
        assert supports(served) is None


def test_empty_batches_never_reach_a_kernel(table):
    def broken(*arguments):
        raise AssertionError("launched")

    table(replace(stub("fast", ("cpu",), None), forward=broken, backward=broken))
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        cost = torch.zeros(shape, requires_grad=True)
        result = sinkhorn(cost, epsilon=0.1)
        result.value.sum().backward()
        assert cost.grad.shape == shape and not result.value.any() and not result.n_iter.any()


def test_the_registered_operator_knows_the_backend_by_name():
    masses = torch.zeros(2, 3), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="nowhere"):
        operator.sinkhorn(given(COST, *masses, torch.ones(2), 1, backend="nowhere"))


def test_a_backend_that_is_not_dense_sees_vectors_and_offsets_as_they_are(table):
    seen = []

    def forward(arguments):
        seen.append(arguments)
        raise ZeroDivisionError("seen enough")

    table(replace(stub("fast", ("cpu",), None), forward=forward, dense=False))
    problem = ALL["dot_ragged_packed"]
    with pytest.raises(ZeroDivisionError):
        operator.sinkhorn(problem.arguments())
    (found,) = seen
    assert found.kind == "dot" and found.x.dim() == 2 and found.cu_a is not None
