"""Every backend on every problem by the one tolerance rule, and the choice between backends."""

import warnings
from dataclasses import replace

import pytest
import torch

from optical import BackendUnsupported, backends, ops, sinkhorn
from optical.testing import (
    FIELDS,
    TOLERANCE,
    assert_backend_correct,
    assert_close_to_truth,
    poisoned,
    problems,
    random_problem,
    solve,
)

ALL = {problem.name: problem for problem in problems()}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def skip_unless_supported(backend, cost):
    reason = backends.BACKENDS[backend].supports(cost)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.fixture(params=[(b, d) for b in backends.BACKENDS for d in DEVICES], ids="-".join)
def place(request):
    """A backend and a device it serves."""
    backend, device = request.param
    skip_unless_supported(backend, torch.zeros(1, 1, 1, device=device))
    return backend, device


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ALL)
def test_every_problem_by_the_tolerance_rule(place, name, dtype, poisoned_memory):
    backend, device = place
    skip_unless_supported(backend, ALL[name].to(dtype, device).cost)
    assert_backend_correct(backend, ALL[name], dtype, device)


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
            if not single.cost.numel():
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


@pytest.mark.parametrize("name", ["ragged", "nan_padding", "clusters", "marginals"])
def test_is_deterministic_and_independent_of_the_batch(place, name):
    backend, device = place
    problem = ALL[name].to(torch.float32, device)
    together, again = solve(backend, problem), solve(backend, problem)
    for field in FIELDS:
        assert torch.equal(together[field], again[field])
    if backend == "reference":
        return  # PyTorch chooses its reductions by the shape of the whole batch.
    for i in range(len(problem.cost)):
        one = {k: getattr(problem, k)[i : i + 1] for k in ("cost", "log_a", "log_b", "epsilon")}
        alone = solve(backend, replace(problem, **one))
        for field in FIELDS:
            assert torch.equal(alone[field], together[field][i : i + 1]), field


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
def test_the_content_of_padding_changes_no_bit(place, dtype):
    backend, device = place
    problem = random_problem("padded", 4, 9, 11, rows=[9, 3, 0, 5], columns=[2, 11, 4, 8])
    problem = problem.to(dtype, device)
    skip_unless_supported(backend, problem.cost)
    clean, dirty = solve(backend, problem), solve(backend, poisoned(problem))
    for field in clean:
        assert torch.equal(clean[field], dirty[field]), field


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


COST = torch.zeros(2, 3, 4)


def stub(name, automatic_on, reason):
    reference = backends.BACKENDS["reference"]
    return replace(reference, name=name, automatic_on=automatic_on, supports=lambda cost: reason)


@pytest.fixture
def table(monkeypatch):
    """A table of our own, so that these tests do not depend on what is installed."""

    def install(*entries):
        entries = (*entries, stub("reference", (), None))
        monkeypatch.setattr(backends, "BACKENDS", {entry.name: entry for entry in entries})
        backends._warn_once.cache_clear()

    monkeypatch.delenv("OPTICAL_BACKEND", raising=False)
    yield install
    backends._warn_once.cache_clear()


def test_auto_takes_the_first_backend_of_the_device_that_supports_the_problem(table):
    table(stub("gpu", ("cuda",), None), stub("fast", ("cpu",), None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose("auto", COST).name == "fast"
        assert backends.choose("gpu", COST).name == "gpu"


def test_falling_back_to_the_reference_warns_once_per_reason(table):
    table(stub("fast", ("cpu",), "too small"))
    with pytest.warns(RuntimeWarning, match="plain PyTorch reference: fast: too small"):
        assert backends.choose("auto", COST).name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose("auto", COST).name == "reference"
    backends.BACKENDS["fast"] = stub("fast", ("cpu",), "too big")
    with pytest.warns(RuntimeWarning, match="too big"):
        backends.choose("auto", COST)


def test_a_backend_asked_for_by_name_never_falls_back(table):
    table(stub("fast", ("cpu",), "it is Sunday"))
    with pytest.raises(BackendUnsupported, match=r"backend 'fast' cannot .*: it is Sunday"):
        backends.choose("fast", COST)


def test_the_environment_variable_replaces_auto_only_and_is_read_at_each_call(table, monkeypatch):
    table(stub("fast", ("cpu",), None))
    assert backends.choose("auto", COST).name == "fast"
    monkeypatch.setenv("OPTICAL_BACKEND", "reference")
    assert backends.choose("auto", COST).name == "reference"
    assert backends.choose("fast", COST).name == "fast"
    monkeypatch.setenv("OPTICAL_BACKEND", "auto")
    assert backends.choose("auto", COST).name == "fast"
    monkeypatch.setenv("OPTICAL_BACKEND", "fastest")
    wanted = "OPTICAL_BACKEND is 'fastest'; expected one of 'auto', 'fast', 'reference'"
    with pytest.raises(ValueError, match=wanted):
        backends.choose("auto", COST)


def test_unknown_names_are_answered_with_the_known_ones():
    wanted = "backend is 'gpu'; expected one of 'auto', 'triton', 'cpu', 'reference'"
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
    assert backends.explain(COST).splitlines() == [
        "cost (2, 3, 4) float32 on cpu, backend='auto'",
        "   gpu        no device",
        "-> fast       supported",
        "   reference  supported",
    ]
    monkeypatch.setenv("OPTICAL_BACKEND", "gpu")
    lines = backends.explain(COST).splitlines()
    assert lines[0].endswith("backend='auto' (OPTICAL_BACKEND=gpu)")
    assert not any(line.startswith("->") for line in lines)


def test_reasons_say_what_was_found_and_what_is_possible():
    supports = {name: backend.supports for name, backend in backends.BACKENDS.items()}
    assert "float16" in supports["cpu"](COST.half())
    assert "meta" in supports["cpu"](COST.to("meta"))
    triton = supports["triton"](COST)
    assert triton is None or "CUDA" in triton or "not installed" in triton


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
    arguments = (COST, torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2), 1, 0.0)
    with pytest.raises(ValueError, match="nowhere"):
        ops.sinkhorn(*arguments, "nowhere")
