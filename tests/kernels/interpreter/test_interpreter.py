"""The Triton kernels on CPU tensors, in Triton's interpreter, against the tolerance rule.

Run as ``TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreter``. The interpreter
does not cover layouts, races or TF32; ``test_triton_compile.py`` compiles the kernels for GPUs.
"""

import importlib
import math
from dataclasses import replace

import pytest
import torch

from optical import BackendUnsupported, kernels, ot_alignment, sinkhorn
from optical.backends import registry
from optical.backends.problem import example_problem
from optical.kernels import tuning
from optical.kernels.batch import LaunchProblem
from optical.ot import autograd
from optical.testing.cases import all_cases, packed, random_case, random_vector_case
from optical.testing.tolerance import FIELDS, assert_backend_correct, assert_close_to_truth, solve

# import_module, because the package re-exports functions of the same names.
FORWARD = importlib.import_module("optical.kernels.forward")
BACKWARD_UNROLLED = importlib.import_module("optical.kernels.backward_unrolled")

# The interpreter warns of divisions by zero in discarded branches of tl.where.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# The implicit mode includes the run and the envelope gradients.
MODES = ("implicit",)
# An interpreted iteration takes milliseconds, and eight iterations reach every branch but one.
FULL_LENGTH = {
    problem.name: problem
    for problem in all_cases()
    if max(problem.cost.shape[1:]) <= 128 and len(problem.cost) <= 4 and not problem.anderson
}
ALL = {name: replace(p, max_iter=min(8, p.max_iter)) for name, p in FULL_LENGTH.items()}


@pytest.mark.parametrize("name", ALL)
def test_every_problem_by_the_tolerance_rule(name, poisoned_memory):
    assert_backend_correct("triton", ALL[name], torch.float32, gradients=MODES)


ENVELOPE = ["ragged", "no_allowed_pair", "nan_padding", "marginals", "everything", "cosine_ragged"]
ENVELOPE += ["sqeuclidean_ragged", "dot_ragged_packed"]


@pytest.mark.parametrize("name", ENVELOPE)
def test_envelope_gradients_by_the_tolerance_rule(name, poisoned_memory):
    problem = replace(ALL[name], max_iter=min(4, ALL[name].max_iter))
    assert_backend_correct("triton", problem, torch.float32, gradients=("envelope",))


UNROLLED = ["ragged", "rho_no_allowed_pair", "nan_padding", "init", "anneal_unfinished", "rho"]
UNROLLED += ["rho_mass_0", "rho_no_iteration"]
UNROLLED += ["everything", "omega_1.8_forbidden", "no_iteration", "cosine_all", "zero_vectors"]
UNROLLED += ["cosine_ragged_packed", "sqeuclidean_ragged", "dot_ragged", "epsilon_0.001"]


@pytest.mark.parametrize("name", UNROLLED)
def test_unrolled_gradients_by_the_tolerance_rule(name, poisoned_memory):
    problem = replace(ALL[name], max_iter=min(6, ALL[name].max_iter))
    assert_backend_correct("triton", problem, torch.float32, gradients=("unroll",))


def test_an_overflowing_plan_is_not_an_empty_one():
    problem = random_case("overflow", 1, 260, 3, max_iter=0)
    out = solve("triton", replace(problem, x=problem.x - 50).to(torch.float32))
    assert out["marginal_error"].isinf().all() and not out["value"].isfinite().any()


@pytest.mark.parametrize("way", ["on chip", "streamed"])
def test_unrolled_gradients_stop_at_the_iteration_of_the_run(way, monkeypatch):
    if way == "streamed":
        stream_everything(monkeypatch, "loop")
    problem = replace(ALL["epsilon_per_problem"], max_iter=12, tol=1e-2).to(torch.float32)
    out, expected = (solve(name, problem, "unroll") for name in ("triton", "reference"))
    assert torch.equal(out["n_iter"], expected["n_iter"]) and out["n_iter"].min() < 12
    torch.testing.assert_close(out["grad_x"], expected["grad_x"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n", "m"), [(16, 16), (17, 16), (33, 5), (128, 128), (100, 127)])
def test_every_tile_size(n, m):
    problem = random_case(f"{n}x{m}", 1, n, m, max_iter=6)
    assert_backend_correct("triton", problem, torch.float32, gradients=("implicit",))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["cosine", "sqeuclidean", "dot"])
def test_half_vectors_by_the_tolerance_rule(kind, half):
    epsilon = 1.0 if kind == "cosine" else 16.0
    clouds = random_vector_case(kind, kind, batch=2, n=7, m=6, dim=24, epsilon=epsilon, max_iter=6)
    for problem in (clouds, packed(clouds)):
        rounded = problem.to(torch.float32, vectors=half)
        out = solve("triton", rounded, "implicit")
        same = solve("reference", rounded.to(torch.float32), "implicit")
        truth = solve("reference", rounded.to(torch.float64), "implicit")
        for field in truth:
            dtype = half if field in ("grad_x", "grad_y") else torch.float32
            assert out[field].dtype == dtype or field in ("n_iter", "status")
            scale = max(1.0, truth[field].abs().max().item())
            rule = {"dtype": dtype, "scale": scale, "name": f"{problem.name} {field}"}
            assert_close_to_truth(out[field], truth[field], same[field], **rule)


def stream_everything(monkeypatch, way):
    """Stream problems of any size, in one launch ("loop") or stepwise ("steps")."""
    monkeypatch.setattr(tuning, "RESIDENT", 0)
    for module in (FORWARD, BACKWARD_UNROLLED):
        monkeypatch.setattr(module, "choose_tiles", lambda launch, table: [])
    monkeypatch.setattr(tuning, "PROGRAMS", {"loop": 0, "steps": 10**6}[way])


STREAMED = ["ragged", "no_allowed_pair", "nan_padding", "init", "rho_no_allowed_pair", "anneal"]
STREAMED += ["everything", "one_fully_masked", "no_iteration", "cosine_all", "zero_vectors"]
STREAMED += ["far_from_the_origin", "rho_strong", "omega_1.8_forbidden", "tiny_mass"]


@pytest.mark.parametrize("way", ["loop", "steps"])
@pytest.mark.parametrize("name", STREAMED)
def test_streamed_problems_by_the_tolerance_rule(name, way, monkeypatch, poisoned_memory):
    stream_everything(monkeypatch, way)
    problem = replace(ALL[name], max_iter=min(5, ALL[name].max_iter))
    assert_backend_correct("triton", problem, torch.float32, gradients=("envelope",))


@pytest.mark.parametrize("name", ["ragged", "rho_no_allowed_pair", "cosine_ragged_packed"])
def test_implicit_gradients_of_streamed_problems(name, monkeypatch, poisoned_memory):
    stream_everything(monkeypatch, "loop")
    problem = replace(ALL[name], max_iter=min(5, ALL[name].max_iter))
    assert_backend_correct("triton", problem, torch.float32, gradients=("implicit",))


@pytest.mark.parametrize("name", UNROLLED)
def test_unrolled_gradients_of_streamed_problems(name, monkeypatch, poisoned_memory):
    stream_everything(monkeypatch, "loop")
    problem = replace(ALL[name], max_iter=min(5, ALL[name].max_iter))
    assert_backend_correct("triton", problem, torch.float32, gradients=("unroll",))


def test_unrolled_gradients_of_several_tiles(poisoned_memory):
    problem = replace(random_case("131x70", 1, 131, 70, max_iter=3), rho_a=0.5)
    assert_backend_correct("triton", problem, torch.float32, gradients=("unroll",))
    clouds = random_vector_case(
        "mixed", "cosine", batch=3, n=140, m=20, dim=40, epsilon=0.1, max_iter=2
    )
    lengths = torch.tensor([140, 5, 66])[:, None]
    padding = torch.arange(140) >= lengths
    clouds = replace(clouds, log_a=clouds.log_a.masked_fill(padding, -math.inf))
    problem = packed(clouds)
    assert_backend_correct("triton", problem, torch.float32, gradients=("unroll",))


def fast(name, **changes):
    """A named problem with enough iterations to store a plan in half precision."""
    return replace(FULL_LENGTH[name], precision="fast", **({"max_iter": 9} | changes))


@pytest.mark.parametrize(
    ("name", "way"),
    [("7x5", "loop"), ("no_allowed_pair", "steps"), ("cosine_ragged", "steps")],
)
def test_fast_problems_by_their_own_rule(name, way, monkeypatch, poisoned_memory):
    stream_everything(monkeypatch, way)
    problem = fast(name).select(0)
    assert_backend_correct("triton", problem, torch.float32, gradients=("envelope",))
    fast_result = solve("triton", problem.to(torch.float32))
    exact = solve("triton", replace(problem, precision="exact").to(torch.float32))
    assert not torch.equal(fast_result["f"], exact["f"]), "no plan was stored in half precision"


def test_a_stored_plan_is_replaced_when_potentials_drift(monkeypatch):
    from optical.kernels.streamed import half_precision, single_launch

    stream_everything(monkeypatch, "loop")
    stored = []
    store_plan = single_launch.store_plan.rewrite()
    monkeypatch.setattr(
        single_launch, "store_plan", lambda *arguments: stored.append(store_plan(*arguments))
    )
    problem = fast("epsilon_0.01", max_iter=24).select(0)
    for drift, least, most in ((6.0, 1, 1), (0.6, 2, 8), (1e-4, 0, 0)):
        monkeypatch.setattr(half_precision, "DRIFT", type(half_precision.DRIFT)(drift))
        stored.clear()
        assert_backend_correct("triton", problem, torch.float32, gradients=("envelope",))
        assert least <= len(stored) <= most, (drift, len(stored))


@pytest.mark.parametrize("tol", [1e-2, pytest.param(1e-6, marks=pytest.mark.slow)])
def test_fast_problems_stop_by_exact_iterations(tol, monkeypatch):
    """Convergence in half precision is confirmed, or continued, by exact iterations."""
    problem = fast("epsilon_per_problem", max_iter=20, tol=tol).to(torch.float32)
    ways = []
    for way in ("loop", "steps"):
        stream_everything(monkeypatch, way)
        ways.append(solve("triton", problem))
    for field in FIELDS:
        assert torch.equal(ways[0][field], ways[1][field]), field
    expected = solve("reference", problem)
    assert torch.equal(ways[0]["status"], expected["status"])
    stopped = expected["status"] == 0
    assert stopped.any() and (ways[0]["marginal_error"][stopped] <= 1.01 * tol + 1e-6).all()
    assert ((ways[0]["n_iter"] - expected["n_iter"]).abs() <= 1 + 8 * (tol < 1e-4)).all()


REFUSED = {"rho": {"rho_a": 1.0}, "omega": {"omega": 1.2}, "short": {"max_iter": 7}}
REFUSED |= {"low_memory": {"low_memory": True}, "exact": {"precision": "exact"}}


def test_where_half_precision_does_not_apply():
    def served(problem):
        return FORWARD.allocate_plan(LaunchProblem(problem.to(torch.float32).problem())).fast

    assert served(fast("7x5"))
    assert not served(packed(fast("cosine_ragged")))
    for what, changes in REFUSED.items():
        assert not served(replace(fast("7x5"), **changes)), what


def test_light_rows_have_the_bits_of_exact_problems(monkeypatch):
    stream_everything(monkeypatch, "loop")
    problem = fast("mass_1e-30").select(0).to(torch.float32)
    fast_result, exact = (solve("triton", replace(problem, precision=p)) for p in ("fast", "exact"))
    for field in FIELDS:
        assert torch.equal(fast_result[field], exact[field]), field


def test_stepwise_and_single_launch_runs_have_the_same_bits(monkeypatch):
    problem = replace(ALL["epsilon_per_problem"].to(torch.float32), max_iter=30, tol=1e-2)
    results = []
    for way in ("loop", "steps"):
        stream_everything(monkeypatch, way)
        results.append(solve("triton", problem))
    assert len(set(results[0]["n_iter"].tolist())) > 1
    for field in FIELDS:
        assert torch.equal(results[0][field], results[1][field]), field


def test_split_columns_have_the_same_bits(monkeypatch, poisoned_memory):
    problem = random_case("5x1100", 2, 5, 1100, max_iter=2)
    log_b = problem.log_b.clone()
    log_b[0, 512:1024] = -math.inf  # a whole segment
    problem = replace(problem, log_b=log_b)
    results = []
    # One program for everything, one for the rows, two for three segments, one per segment.
    for way, filled in (("loop", 1), ("steps", 1), ("steps", 4), ("steps", 6)):
        stream_everything(monkeypatch, way)
        monkeypatch.setattr(tuning, "FILLED", filled)
        results.append(solve("triton", problem.to(torch.float32)))
    for field in FIELDS:
        for other in results[1:]:
            assert torch.equal(results[0][field], other[field]), field
    assert_backend_correct("triton", problem, torch.float32, gradients=("envelope",))


def test_problems_larger_than_a_chip():
    tall = replace(random_case("140x20", 1, 140, 20, max_iter=3), omega=1.2)
    wide = replace(random_case("20x140", 1, 20, 140, max_iter=3), rho_a=0.5)
    lengths = {"rows": [150, 20, 40], "columns": [30, 140, 33]}
    mixed = random_vector_case("mixed", "cosine", batch=3, n=150, m=140, max_iter=3, **lengths)
    for problem in (tall, wide, packed(mixed)):
        assert_backend_correct("triton", problem, torch.float32, gradients=("envelope",))


@pytest.mark.parametrize(("n", "m"), [(9, 140), (140, 9)])
def test_one_long_side_stays_on_chip(n, m, monkeypatch):
    clouds = random_vector_case(f"{n}x{m}", "cosine", batch=1, n=n, m=m, dim=5, max_iter=6)
    given = random_case(f"{n}x{m}", 1, n, m, max_iter=6)
    monkeypatch.setattr(FORWARD, "StepwiseSolve", None)
    for problem, half in ((given, None), (clouds, torch.float16)):
        moved = problem.to(torch.float32, vectors=half)
        out, truth = solve("triton", moved), solve("reference", moved.to(torch.float64))
        for field in ("value", "value_linear", "f", "g", "marginal_error"):
            torch.testing.assert_close(out[field].double(), truth[field], rtol=1e-5, atol=1e-5)


def test_drifting_scalings_are_rebuilt_or_repeated_exactly():
    """The scalings pass 2^30 within one run, so that every branch of the loop is taken."""
    ramp = torch.linspace(0, 6, 12, dtype=torch.float64)
    cost = (ramp[:, None] * ramp[None, :])[None] + torch.rand(1, 12, 12).double()
    problem = replace(random_case("ramp", 1, 12, 12, epsilon=0.05, max_iter=40), x=cost)
    mode = ("envelope",)
    assert_backend_correct("triton", problem, torch.float32, gradients=mode)
    log_a = torch.linspace(0, -300, 12, dtype=torch.float64).log_softmax(0)[None]
    lost = replace(problem, name="lost", log_a=log_a, max_iter=10)
    assert_backend_correct("triton", lost, torch.float32, gradients=mode)
    relaxed = replace(problem, name="relaxed", omega=1.5, rho_b=5.0, max_iter=20)
    assert_backend_correct("triton", relaxed, torch.float32, gradients=mode)


def test_scalings_past_the_limit_are_discarded(monkeypatch):
    """With equal limits every drifting scaling is discarded and repeated exactly."""
    from optical.kernels.onchip import solve as onchip

    for name in ("DISCARD_LIMIT", "REBUILD_LIMIT"):
        monkeypatch.setattr(onchip, name, type(onchip.DISCARD_LIMIT)(1.5))
    problem = replace(ALL["marginals"], max_iter=12)
    assert_backend_correct("triton", problem, torch.float32, gradients=("envelope",))


@pytest.mark.parametrize("way", ["resident", "loop", "steps"])
def test_stops_each_problem_at_its_own_iteration(way, monkeypatch):
    if way != "resident":
        stream_everything(monkeypatch, way)
    problem = replace(ALL["epsilon_per_problem"], max_iter=40, tol=1e-3).to(torch.float32)
    out, expected = solve("triton", problem), solve("reference", problem)
    assert (out["n_iter"] - expected["n_iter"]).abs().max() <= 1
    assert len(set(out["n_iter"].tolist())) == 3
    fixed = [replace(problem, max_iter=k, tol=0.0) for k in out["n_iter"].tolist()]
    for i, same in enumerate(fixed):
        truth = solve("reference", same.to(torch.float64))
        torch.testing.assert_close(
            out["value"][i].double(), truth["value"][i], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", ["ragged", "cosine_ragged", "dot_ragged_packed"])
def test_results_do_not_depend_on_the_batch(name):
    problem = ALL[name].to(torch.float32)
    together = solve("triton", problem, "implicit")
    for i in (0, 3):
        alone = solve("triton", problem.select(i), "implicit")
        for field in FIELDS:
            part = slice(i, i + 1)
            if problem.cu_a is not None and field in "fg":
                offsets = problem.cu_a if field == "f" else problem.cu_b
                part = slice(int(offsets[i]), int(offsets[i + 1]))
            assert torch.equal(alone[field], together[field][part]), field


@pytest.mark.parametrize("name", ["ragged", "no_allowed_pair", "cosine_ragged_packed"])
@pytest.mark.parametrize("transpose", [False, True])
def test_products_with_the_plan(name, transpose, poisoned_memory):
    problem = ALL[name].to(torch.float32)
    ours, reference = (problem.problem("envelope", name) for name in ("triton", "reference"))
    solved = autograd.solve(reference)
    lines = ours.log_a if transpose else ours.log_b
    v = torch.randn(*lines.shape, 5).masked_fill((lines == -math.inf)[..., None], math.nan)
    products = [autograd.apply_plan(x, solved.f, solved.g, v, transpose) for x in (ours, reference)]
    torch.testing.assert_close(*products, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient", ["envelope", "implicit", "unroll"])
def test_gradient_through_the_loss(gradient):
    gradients = []
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
    teacher = torch.randn(3, 7, 8)
    for backend in ("triton", "reference"):
        student = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
        student = student.masked_fill(~mask[:, :, None], math.nan).requires_grad_()
        options = {"max_iter": 8, "gradient": gradient, "backend": backend}
        ot_alignment(student, teacher, mask, **options).sum().backward()
        assert not student.grad[~mask].any()
        gradients.append(student.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_refusals_name_the_reason():
    supports = registry.BACKENDS["triton"].supports
    cost = torch.zeros(1, 200, 4)
    assert supports(example_problem(cost)) is None
    assert supports(example_problem(cost, gradient="implicit")) is None
    assert supports(example_problem(cost, gradient="unroll")) is None
    with pytest.raises(BackendUnsupported, match="do not support anderson"):
        sinkhorn(cost, epsilon=0.1, anderson=5, backend="triton")
    with pytest.raises(BackendUnsupported, match=r"the problem is float64; .* float32"):
        sinkhorn(cost.double(), epsilon=0.1, backend="triton")


def test_auto_never_picks_the_interpreter():
    assert registry.choose("auto", example_problem(torch.zeros(1, 3, 4))).name != "triton"
    assert kernels.supports(example_problem(torch.zeros(1, 3, 4))) is None
