"""Tolerance rule for every backend on every case, and the choice of a backend."""

import math
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from optical import BackendUnsupported, Status, sinkhorn
from optical.backends import reference, registry
from optical.backends.problem import GRADIENTS, cost_problem, example_problem
from optical.ot import autograd
from optical.testing.cases import all_cases, packed, poisoned, random_case, random_vector_case
from optical.testing.tolerance import (
    FIELDS,
    TOLERANCE,
    assert_backend_correct,
    assert_close_to_truth,
    solve,
)

ALL = {case.name: case for case in all_cases()}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float64, torch.float32]


def named(dtype):
    return str(dtype).removeprefix("torch.")


def skip_unless_supported(backend, case, gradient="envelope"):
    reason = registry.BACKENDS[backend].supports(case.problem(gradient))
    if reason is not None:
        pytest.skip(reason=f"{backend}: {reason}")


@pytest.fixture(params=[(b, d) for b in registry.BACKENDS for d in DEVICES], ids="-".join)
def backend_and_device(request):
    """A backend and a device that it supports."""
    backend, device = request.param
    skip_unless_supported(backend, random_case("", 1, 1, 1).to(torch.float32, device))
    return backend, device


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("name", ALL)
def test_every_case_meets_the_tolerance_rule(
    backend_and_device, name, dtype, gradient, poisoned_memory
):
    backend, device = backend_and_device
    case = ALL[name]
    if case.anderson and gradient == "unroll":
        pytest.skip(reason="no derivative of Anderson acceleration, in any backend")
    skip_unless_supported(backend, case.to(dtype, device), gradient)
    if backend_and_device == ("reference", "cpu"):
        pytest.skip(reason="the others are compared with it")
    assert_backend_correct(backend, case, dtype, device, (gradient,))


@pytest.mark.parametrize("name", ALL)
def test_the_float32_reference_has_the_status_and_iterations_of_float64(name, poisoned_memory):
    """The rule is trivial for it, except for status, iterations and zero gradients of padding."""
    case = ALL[name]
    gradient = "implicit" if case.anderson else "unroll"
    assert_backend_correct("reference", case, torch.float32, gradients=(gradient,))


HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("half", HALVES, ids=named)
@pytest.mark.parametrize("kind", ["cosine", "sqeuclidean", "dot"])
def test_half_precision_vectors_meet_the_tolerance_rule(backend_and_device, kind, half, gradient):
    """The truth is the solution of the rounded vectors; no further error may be added."""
    backend, device = backend_and_device
    epsilon = 1.0 if kind == "cosine" else 16.0
    clouds = random_vector_case(kind, kind, batch=2, n=7, m=6, dim=24, epsilon=epsilon)
    if backend_and_device == ("reference", "cpu"):
        pytest.skip(reason="the others are compared with it")
    for case in (clouds, packed(clouds)):
        skip_unless_supported(backend, case.to(torch.float32, device, half), gradient)
        half_case = case.to(torch.float32, device, half)
        out = solve(backend, half_case, gradient)
        same = solve("reference", half_case.to(torch.float32, "cpu"), gradient)
        truth = solve("reference", half_case.to(torch.float64, "cpu"), gradient)
        for field in truth:
            # Gradients are rounded to the dtype of the vectors.
            dtype = half if field in ("grad_x", "grad_y") else torch.float32
            assert out[field].dtype == dtype or field in ("n_iter", "status")
            scale = max(1.0, truth[field].abs().max().item())
            rule = {"dtype": dtype, "scale": scale, "name": f"{backend} {case.name} {field}"}
            assert_close_to_truth(out[field].cpu(), truth[field], same[field], **rule)


def test_tol_stops_each_problem_at_the_iteration_of_the_reference(backend_and_device):
    backend, device = backend_and_device
    hard = ALL["epsilon_per_problem"]
    for case in (hard, ALL["ragged"], ALL["one_fully_masked"], ALL["marginals"]):
        case = replace(case, max_iter=60, tol=1e-3)
        out = solve(backend, case.to(torch.float32, device))
        n_iter = out["n_iter"].cpu()
        # A float32 error may round to the other side of tol, within this interval.
        early = solve("reference", replace(case, tol=1.001e-3 + 1e-6))["n_iter"]
        late = solve("reference", replace(case, tol=0.999e-3 - 1e-6))["n_iter"]
        assert ((early <= n_iter) & (n_iter <= late)).all(), (early, n_iter, late)
        for i, count in enumerate(n_iter.tolist()):
            same = {"max_iter": count, "tol": 0.0}
            single = case.without_padding(i)
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
                    name=f"{backend} {case.name}[{i}] {field}",
                )


SOME = ["ragged", "nan_padding", "clusters", "everything", "cosine_ragged", "dot_ragged_packed"]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", SOME)
def test_results_are_deterministic_and_independent_of_the_batch(backend_and_device, name, gradient):
    backend, device = backend_and_device
    case = ALL[name].to(torch.float32, device)
    skip_unless_supported(backend, case, gradient)
    together, again = solve(backend, case, gradient), solve(backend, case, gradient)
    for field in together:
        assert torch.equal(together[field], again[field]), field
    if backend == "reference":
        return  # The reductions of PyTorch depend on the shape of the batch.
    for i in range(len(case.epsilon)):
        alone = solve(backend, case.select(i), gradient)
        for field in FIELDS:
            part = slice(i, i + 1)
            if case.cu_a is not None and field in "fg":
                offsets = case.cu_a if field == "f" else case.cu_b
                part = slice(int(offsets[i]), int(offsets[i + 1]))
            assert torch.equal(alone[field], together[field][part]), field


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", ["given", "cosine", "sqeuclidean", "dot"])
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
def test_values_of_padding_change_no_bit(backend_and_device, dtype, kind, gradient):
    backend, device = backend_and_device
    lengths = {"rows": [9, 3, 0, 5], "columns": [2, 11, 4, 8]}
    case = random_case("padded", 4, 9, 11, **lengths)
    if kind != "given":
        case = random_vector_case("padded", kind, batch=4, n=9, m=11, **lengths)
    dirty = poisoned(case)
    padding = case.log_a == -math.inf
    clean = replace(case, f0=padding * 0.0, g0=torch.zeros_like(case.log_b), max_iter=8)
    dirty = replace(dirty, f0=torch.where(padding, math.nan, 0.0), g0=clean.g0, max_iter=8)
    options = {"rho_a": 0.5, "omega": 1.2, "anneal_start": 1.0}
    if registry.BACKENDS[backend].supports(clean.to(dtype, device).problem(gradient)):
        clean, dirty = (replace(x, f0=None, g0=None) for x in (clean, dirty))
    else:
        clean, dirty = (replace(x, **options) for x in (clean, dirty))
    skip_unless_supported(backend, clean.to(dtype, device), gradient)
    clean, dirty = (solve(backend, x.to(dtype, device), gradient) for x in (clean, dirty))
    for field in clean:
        assert torch.equal(clean[field], dirty[field]), field


MALFORMED = [
    (field, value) for field in ("x", "log_a", "log_b", "epsilon") for value in (math.nan,)
]
MALFORMED += [("x", -math.inf), ("log_b", math.inf), ("epsilon", 0.0), ("epsilon", -1.0)]


@pytest.mark.parametrize("kind", ["given", "cosine"])
@pytest.mark.parametrize(("field", "value"), MALFORMED)
def test_a_malformed_problem_does_not_affect_the_others(backend_and_device, kind, field, value):
    backend, device = backend_and_device
    case = random_case("", 3, 5, 6) if kind == "given" else random_vector_case("", kind, n=5, m=6)
    case = case.to(torch.float32, device)
    malformed = getattr(case, field).clone()
    malformed[1].view(-1)[0] = value
    clean, out = (solve(backend, x) for x in (case, replace(case, **{field: malformed})))
    assert out["status"].tolist() == [Status.MAX_ITER, Status.INFEASIBLE, Status.MAX_ITER]
    assert out["n_iter"].tolist() == [case.max_iter] * 3
    for name in ("value", "value_linear", "marginal_error", "f", "g"):
        assert out[name][1].isnan().all(), name
    for name in clean:
        for i in (0, 2):
            assert torch.equal(out[name][i], clean[name][i]), name


def test_status_is_that_of_the_reference(backend_and_device):
    backend, device = backend_and_device
    for name in ("one_fully_masked", "unequal_mass", "no_allowed_pair", "epsilon_per_problem"):
        for tol in (0.0, 1e-2):
            case = replace(ALL[name], tol=tol, max_iter=60).to(torch.float32, device)
            expected = solve("reference", case)["status"]
            assert torch.equal(solve(backend, case)["status"], expected), (name, tol)


def test_removing_padding_does_not_change_the_value(backend_and_device):
    backend, device = backend_and_device
    padded = ALL["ragged"].to(torch.float32, device)
    out = solve(backend, padded)
    for i in range(4):
        alone = solve(backend, padded.without_padding(i))
        for field in ("value", "value_linear"):
            torch.testing.assert_close(alone[field], out[field][i : i + 1], rtol=1e-5, atol=1e-6)


def test_strided_inputs_and_expanded_upstream_gradients(backend_and_device):
    backend, device = backend_and_device
    base = torch.rand(5, 8, 12, device=device)
    cost = base.permute(1, 2, 0)[::2, 1::3].requires_grad_()  # (4, 4, 5), no adjacent dimension
    (gradient,) = torch.autograd.grad(
        sinkhorn(cost, epsilon=0.2, backend=backend).value.sum(), cost
    )
    truth = sinkhorn(cost.detach().cpu().double(), epsilon=0.2, backend="reference").plan()
    torch.testing.assert_close(gradient.cpu().double(), truth, rtol=1e-4, atol=1e-6)


def test_the_tolerance_rule_reports_the_worst_entry():
    truth = torch.zeros(2, 3, dtype=torch.float64)
    wrong = truth.clone()
    wrong[1, 2] = 0.25
    rule = {"dtype": torch.float32, "scale": 1.0, "name": "the case"}
    with pytest.raises(AssertionError, match=r"the case: worst at \(1, 2\): 0.25, truth 0.0"):
        assert_close_to_truth(wrong, truth, truth, **rule)
    assert_close_to_truth(wrong, truth, wrong, **rule)  # plain PyTorch is as inaccurate
    wrong[1, 2] = float("nan")
    with pytest.raises(AssertionError, match="nan"):
        assert_close_to_truth(wrong, truth, truth, **rule)
    with pytest.raises(AssertionError, match="shape"):
        assert_close_to_truth(truth[:1], truth, truth, **rule)
    assert TOLERANCE[torch.float32] == 1e-5


@pytest.mark.parametrize("name", ["7x5", "marginals", "epsilon_0.01"])
def test_fast_allows_the_error_of_a_rounded_plan_and_no_more(name, monkeypatch):
    """Errors of the cost of epsilon / 2048 pass only as "fast", larger ones never."""
    wave = torch.arange(ALL[name].x.numel()).view_as(ALL[name].x).sin()

    def check(share, precision):
        def forward(p):
            cost = p.x + share * p.epsilon[:, None, None] * wave.to(p.x)
            first = reference.forward(p._replace(x=cost, max_iter=p.max_iter - 1))
            last = reference.forward(p._replace(f0=first.f, g0=first.g, max_iter=1))
            return last._replace(n_iter=last.n_iter + p.max_iter - 1)

        monkeypatch.setitem(registry.BACKENDS, "rounding", stub("rounding", forward=forward))
        case = replace(ALL[name], precision=precision)
        assert_backend_correct("rounding", case, torch.float32)

    check(2**-11, "fast")
    for share, precision in ((2**-11, "exact"), (0.1, "fast")):
        with pytest.raises(AssertionError, match=r"rounding .*: worst at"):
            check(share, precision)


COST = torch.zeros(2, 3, 4)
PROBLEM = example_problem(COST)


def stub(name, automatic_on=(), reason=None, dense=True, **functions):
    """Make a backend of functions; the others are those of the reference."""
    module = SimpleNamespace(
        supports=lambda case: reason,
        forward=reference.forward,
        backward=reference.backward,
        apply_plan=reference.apply_plan,
    )
    vars(module).update(functions)
    return registry.Backend(name, lambda: module, automatic_on, dense)


@pytest.fixture
def table(monkeypatch):
    """Replace the table of backends, so that these tests do not depend on the installation."""

    def install(*entries):
        entries = (*entries, stub("reference"))
        monkeypatch.setattr(registry, "BACKENDS", {entry.name: entry for entry in entries})
        registry._warn_once.cache_clear()

    monkeypatch.delenv("OPTICAL_BACKEND", raising=False)
    yield install
    registry._warn_once.cache_clear()


def test_auto_chooses_the_first_backend_of_the_device_that_supports_the_problem(table):
    table(stub("gpu", ("cuda",)), stub("fast", ("cpu",)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.choose("auto", PROBLEM).name == "fast"
        assert registry.choose("gpu", PROBLEM).name == "gpu"


def test_auto_follows_the_first_order_that_applies(table, monkeypatch):
    table(stub("one", ("cpu",)), stub("two", ("cpu",)), stub("late", ("cpu",)))
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


def test_orders_name_existing_backends_and_their_provenance():
    assert registry.ORDERS[-1].applies(PROBLEM, False)
    for order in registry.ORDERS:
        assert set(order.names) <= set(registry.BACKENDS)
        assert order.provenance in ("predicted", "measured")
    x = torch.zeros(2, 3, 300)
    cosine, half = (example_problem(v, v, "cosine") for v in (x, x.half()))
    others = PROBLEM, cosine, half, example_problem(x, x, "dot")
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


def test_a_backend_requested_by_name_never_falls_back(table):
    table(stub("fast", ("cpu",), "it is Sunday"))
    with pytest.raises(BackendUnsupported, match=r"backend 'fast' cannot .*: it is Sunday"):
        registry.choose("fast", PROBLEM)


def test_the_environment_variable_replaces_only_auto_and_is_read_at_each_call(table, monkeypatch):
    table(stub("fast", ("cpu",)))
    assert registry.choose("auto", PROBLEM).name == "fast"
    monkeypatch.setenv("OPTICAL_BACKEND", "reference")
    assert registry.choose("auto", PROBLEM).name == "reference"
    assert registry.choose("fast", PROBLEM).name == "fast"
    monkeypatch.setenv("OPTICAL_BACKEND", "auto")
    assert registry.choose("auto", PROBLEM).name == "fast"
    monkeypatch.setenv("OPTICAL_BACKEND", "fastest")
    message = "OPTICAL_BACKEND is 'fastest'; expected one of 'auto', 'fast', 'reference'"
    with pytest.raises(ValueError, match=message):
        registry.choose("auto", PROBLEM)


def test_an_unknown_name_raises_with_the_known_names():
    message = "backend is 'gpu'; expected one of 'auto', 'cuda', 'triton', 'cpu', 'reference'"
    with pytest.raises(ValueError, match=message):
        sinkhorn(COST, epsilon=0.1, backend="gpu")


def test_errors_inside_a_backend_are_not_caught(table):
    def broken(*arguments):
        raise ZeroDivisionError("a bug")

    table(stub("fast", ("cpu",), forward=broken))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        sinkhorn(COST, epsilon=0.1)


def test_explain_lists_the_backends_with_reasons(table, monkeypatch):
    table(stub("gpu", ("cuda",), "no device"), stub("fast", ("cpu",)))
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


def test_explain_accepts_vectors_and_options(table):
    table(stub("fast", ("cpu",), supports=lambda p: f"no {p.kind}, {p.gradient}"))
    x, y = torch.zeros(2, 3, 8).half(), torch.zeros(2, 4, 8)
    lines = registry.explain(x, y=y, kind="cosine", gradient="implicit").splitlines()
    assert lines == [
        "cosine cost of x (2, 3, 8) and y (2, 4, 8) float16 on cpu, backend='auto'",
        "   fast       no cosine, implicit",
        "-> reference  supported",
    ]


def test_reasons_name_the_device():
    supports = {name: backend.supports for name, backend in registry.BACKENDS.items()}
    assert "meta" in supports["cpu"](example_problem(COST.to("meta")))
    triton = supports["triton"](PROBLEM)
    assert triton is None or "CUDA" in triton or "not installed" in triton


def test_triton_reports_unsupported_options(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    supports = registry.BACKENDS["triton"].supports
    assert "anderson" in supports(PROBLEM._replace(anderson=4))
    assert "float64" in supports(example_problem(COST.double()))
    wide = example_problem(torch.zeros(1, 200, 4), gradient="unroll")
    for backend_and_device in (
        PROBLEM,
        wide,
        PROBLEM._replace(gradient="implicit", rho_a=1.0, omega=1.5),
    ):
        assert supports(backend_and_device) is None


def test_empty_batches_are_solved_by_the_reference(table):
    def broken(*arguments):
        raise AssertionError("launched")

    table(stub("fast", ("cpu",), forward=broken, backward=broken))
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        cost = torch.zeros(shape, requires_grad=True)
        result = sinkhorn(cost, epsilon=0.1)
        result.value.sum().backward()
        assert cost.grad.shape == shape and not result.value.any() and not result.n_iter.any()


def test_the_registered_op_checks_the_name_of_the_backend():
    masses = torch.zeros(2, 3), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="nowhere"):
        autograd.solve(cost_problem(COST, *masses, torch.ones(2), 1, backend="nowhere"))


def test_a_backend_that_is_not_dense_receives_vectors_and_offsets(table):
    seen = []

    def forward(arguments):
        seen.append(arguments)
        raise ZeroDivisionError("seen enough")

    table(stub("fast", ("cpu",), forward=forward, dense=False))
    case = ALL["dot_ragged_packed"]
    with pytest.raises(ZeroDivisionError):
        autograd.solve(case.problem())
    (actual,) = seen
    assert actual.kind == "dot" and actual.x.dim() == 2 and actual.cu_a is not None
