"""Gradients of malformed problems: NaN for their valid entries, so that the caller notices."""

import math

import pytest
import torch

import optical
from optical.backends import library, registry
from optical.backends.dense import PaddedProblem
from optical.testing.cases import random_case, random_vector_case

INF, NAN = math.inf, math.nan
BACKENDS = ["reference", "cpu"] if library.load_cpu().reason is None else ["reference"]
WRONG = [
    *(("x", NAN), ("x", -INF), ("log_a", NAN), ("log_b", INF), ("epsilon", NAN), ("epsilon", 0.0)),
    *(("f0", NAN), ("g0", INF)),
]


def gradients(backend, problem, upstream):
    """All four gradients, with upstream gradients (B,) of both values."""
    chosen = registry.BACKENDS[backend]
    module, padded = chosen.load(), PaddedProblem(problem)
    solution = padded.forward(module.forward) if chosen.dense else module.forward(problem)
    saved = solution.f, solution.g, solution.w, solution.z, solution.n_iter
    arguments = upstream, 2 * upstream, None, None
    if chosen.dense:
        return solution, padded.backward(module.backward, *arguments, *saved, True, True)
    return solution, module.backward(*arguments, problem, *saved, True, True)


def spoiled_pair(kind, field, value, dtype=torch.float32, **options):
    """Three ragged problems, and the same with one wrong entry in the second."""
    lengths = {"rows": [9, 5, 9], "columns": [11, 7, 3]}
    if kind == "given":
        case = random_case("", 3, 9, 11, max_iter=4, **lengths)
    else:
        case = random_vector_case("", kind, n=9, m=11, dim=4, max_iter=4, **lengths)
    problem = case.to(dtype).problem()._replace(**options)
    problem = problem._replace(
        f0=torch.zeros_like(problem.log_a), g0=torch.zeros_like(problem.log_b)
    )
    broken = getattr(problem, field).clone()
    broken[(1,) + (2,) * (broken.dim() - 1)] = value
    return problem, problem._replace(**{field: broken})


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("gradient", ["envelope", "implicit", "unroll"])
@pytest.mark.parametrize("kind", ["given", "cosine", "sqeuclidean", "dot"])
@pytest.mark.parametrize(("field", "value"), WRONG)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_nan_for_the_valid_entries(backend, field, value, kind, gradient, low_memory):
    clean, broken = spoiled_pair(kind, field, value, gradient=gradient, low_memory=low_memory)
    ones = torch.ones(3)
    _, expected = gradients(backend, clean, ones)
    solution, found = gradients(backend, broken, ones)
    assert solution.value[1].isnan()
    for grad, truth in zip(found, expected, strict=True):
        if grad is None:
            continue
        assert torch.equal(grad[::2], truth[::2])
    rows, columns = (x[1] != -INF for x in (broken.log_a, broken.log_b))
    grad_x, grad_y, grad_a, grad_b = found
    valid = rows[:, None] & columns if kind == "given" else rows[:, None].expand(-1, 4)
    assert torch.equal(grad_x[1].isnan(), valid) and not grad_x[1][~valid].any()
    assert torch.equal(grad_a[1].isnan(), rows) and not grad_a[1][~rows].any()
    assert torch.equal(grad_b[1].isnan(), columns) and not grad_b[1][~columns].any()
    if kind != "given":
        assert torch.equal(grad_y[1].isnan(), columns[:, None].expand(-1, 4))
        assert not grad_y[1][~columns].any()


@pytest.mark.parametrize("gradient", ["envelope", "implicit", "unroll"])
@pytest.mark.parametrize("kind", ["given", "cosine"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_unused_problems_are_zero(backend, kind, gradient):
    """Whoever selects the problems that are not NaN gets their gradients alone."""
    _, broken = spoiled_pair(kind, "x", NAN, gradient=gradient)
    _, found = gradients(backend, broken, torch.tensor([1.0, 0.0, 1.0]))
    for grad in found:
        if grad is not None:
            assert grad.isfinite().all() and not grad[1].any() and grad[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients_of_the_potentials_count(backend):
    cost = torch.rand(2, 3, 4)
    cost[1, 0, 0] = NAN
    cost.requires_grad_()
    result = optical.sinkhorn(cost, epsilon=0.1, gradient="unroll", backend=backend)
    (grad,) = torch.autograd.grad(result.g[:, 1].sum(), cost)
    assert grad[1].isnan().all() and grad[0].isfinite().all()


@pytest.mark.parametrize("kind", ["cosine", "sqeuclidean", "dot"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_problems_of_vectors_take_two_passes(backend, kind):
    """Beyond 2 ** 20 entries the CPU library computes the gradients of either side by itself."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, k, 2, generator=generator) for k in (1100, 1000))
    y[0, 3, 1] = NAN
    x.requires_grad_(), y.requires_grad_()
    result = optical.sinkhorn_vectors(
        x, y, epsilon=1.0, cost=kind, max_iter=1, init=(torch.zeros(1, 1100), torch.zeros(1, 1000)),
        backend=backend,
    )  # fmt: skip
    for grad in torch.autograd.grad(result.value.sum(), (x, y)):
        assert grad.isnan().all()


@pytest.mark.parametrize("gradient", ["envelope", "implicit", "unroll"])
@pytest.mark.parametrize("kind", ["sqeuclidean", "dot"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_costs_of_vectors_that_overflow_are_malformed(backend, kind, gradient):
    x, y = torch.ones(1, 5, 4), torch.ones(1, 6, 4)
    x[0, 1], y[0, 2] = 1e25, -1e25  # the product of the dot cost is -inf, the cost +inf
    x.requires_grad_()
    result = optical.sinkhorn_vectors(
        x, y, epsilon=1.0, cost=kind, gradient=gradient, backend=backend
    )
    assert result.value.isnan() and result.status == optical.Status.INFEASIBLE
    result.value.sum().backward()
    assert x.grad.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_scaler_notices_an_overflow(backend):
    """A student whose half-precision output overflows: the step is skipped, the scale halved."""
    student = torch.randn(3, 5, 8)
    student[1, 2, 3] = INF
    student.requires_grad_()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD([student], lr=1.0)
    loss = optical.OTAlignmentLoss(backend=backend)(student, torch.randn(3, 6, 8))
    scaler.scale(loss).backward()
    before = student.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(student.detach(), before) and scaler.get_scale() == 512.0


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_products_with_the_plan_and_their_gradients_are_nan(backend, transpose):
    _, broken = spoiled_pair("given", "x", NAN)
    chosen = registry.BACKENDS[backend].load()
    f, g = torch.zeros(3, 9), torch.zeros(3, 11)
    sizes, masses = ((9, 11), (broken.log_a, broken.log_b))
    target, source = (1, 0) if transpose else (0, 1)
    found = chosen.apply_plan(broken, f, g, torch.ones(3, sizes[source], 2), transpose)
    valid = (masses[target] != -INF)[:, :, None].expand(-1, -1, 2)
    assert torch.equal(found[1].isnan(), valid[1]) and not found[~valid].any()
    assert found[::2].isfinite().all()
    result = optical.sinkhorn(
        broken.x, broken.log_a, broken.log_b, epsilon=broken.epsilon, backend=backend
    )
    v = torch.ones(3, sizes[source], 2, requires_grad=True)
    result.apply_plan(v, transpose).sum().backward()
    valid = (masses[source] != -INF)[:, :, None].expand(-1, -1, 2)
    assert torch.equal(v.grad[1].isnan(), valid[1]) and not v.grad[~valid].any()
