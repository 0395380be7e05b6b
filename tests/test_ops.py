"""The operators as PyTorch sees them: registration, derivatives, compilation, autocast."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from optical import OTAlignmentLoss, ot_alignment, sinkhorn
from optical.testing import problems, random_problem

ALL = {problem.name: problem for problem in problems()}
FORWARD = torch.ops.optical.sinkhorn.default
BACKWARD = torch.ops.optical.sinkhorn_backward.default


def arguments(problem, backend="reference"):
    p = problem
    return [p.cost, p.log_a, p.log_b, p.epsilon, p.max_iter, p.tol, backend]


@pytest.mark.parametrize("name", ["7x5", "ragged", "transposed_strides", "no_problem"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_opcheck_forward(name, backend):
    problem = ALL[name]
    inputs = arguments(problem, backend)
    inputs[0] = inputs[0].clone(memory_format=torch.preserve_format).requires_grad_()
    inputs[1:3] = [x.clone().requires_grad_() for x in inputs[1:3]]
    torch.library.opcheck(FORWARD, tuple(inputs))


@pytest.mark.parametrize("name", ["7x5", "transposed_strides"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_opcheck_backward(name, backend):
    problem = ALL[name]
    _, _, f, g, *_ = FORWARD(*arguments(problem))
    upstream = torch.rand(2, len(f), dtype=torch.float64)
    inputs = (*upstream, problem.cost, problem.log_a, problem.log_b, problem.epsilon, f, g)
    torch.library.opcheck(BACKWARD, (*inputs, backend))


def test_gradcheck_of_the_value_at_convergence():
    problem = random_problem("", 2, 3, 4)

    def value(cost, logits_a, logits_b):
        # Only normalised masses are feasible, so the marginals move on the simplex.
        a, b = logits_a.log_softmax(1), logits_b.log_softmax(1)
        return sinkhorn(cost, a, b, epsilon=0.5, max_iter=60).value

    logits = [torch.randn(2, size, dtype=torch.float64, requires_grad=True) for size in (3, 4)]
    assert torch.autograd.gradcheck(value, (problem.cost.requires_grad_(), *logits))


@pytest.mark.parametrize("name", ["7x5", "ragged", "one_fully_masked", "forbidden_pairs"])
def test_envelope_equals_unroll_at_convergence(name):
    problem = ALL[name]
    gradients = []
    for gradient in ("envelope", "unroll"):
        cost = problem.cost.clone().requires_grad_()
        result = sinkhorn(
            cost, problem.log_a, problem.log_b, epsilon=0.2, max_iter=600, gradient=gradient
        )
        gradients.append(torch.autograd.grad(result.value.sum(), cost)[0])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-10)


def test_the_envelope_of_the_transport_part_is_the_plan_and_not_its_total_derivative():
    cost = ALL["7x5"].cost.clone().requires_grad_()
    gradients = []
    for gradient in ("envelope", "unroll"):
        result = sinkhorn(cost, epsilon=0.1, max_iter=400, gradient=gradient)
        gradients.append(torch.autograd.grad(result.value_linear.sum(), cost)[0])
    envelope, total = gradients
    torch.testing.assert_close(envelope, result.plan().detach())
    assert 0.1 < (envelope - total).abs().sum() / total.abs().sum() < 1


def test_upstream_gradients_of_both_values_add_up():
    problem = ALL["ragged"]
    cost, log_a = problem.cost.clone().requires_grad_(), problem.log_a.clone().requires_grad_()
    result = sinkhorn(cost, log_a, problem.log_b, epsilon=0.1)
    up_value, up_linear = torch.tensor([[0.0, 1.0, -2.0, 3.0], [0.0, 5.0, 2.0, 0.5]]).double()
    (result.value * up_value + result.value_linear * up_linear).sum().backward()
    expected = (up_value + up_linear)[:, None, None] * result.plan()
    torch.testing.assert_close(cost.grad, expected)
    assert not cost.grad[0].any() and not cost.grad[2].any()
    torch.testing.assert_close(log_a.grad, up_value[:, None] * log_a.detach().exp() * result.f)
    assert not log_a.grad[problem.log_a == -math.inf].any()


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_one_input_needs_a_gradient(wanted):
    problem = ALL["7x5"]
    inputs = [problem.cost.clone(), problem.log_a.clone(), problem.log_b.clone()]
    inputs[wanted].requires_grad_()
    sinkhorn(*inputs, epsilon=0.1).value.sum().backward()
    assert [x.grad is not None for x in inputs] == [i == wanted for i in range(3)]


def test_only_the_values_are_differentiable():
    cost = torch.rand(2, 3, 4, requires_grad=True)
    result = sinkhorn(cost, epsilon=0.1)
    assert result.value.requires_grad and result.value_linear.requires_grad
    for tensor in (result.f, result.g, result.marginal_error, result.n_iter, result.plan()):
        assert not tensor.requires_grad


def test_a_second_derivative_is_refused_in_words():
    cost = torch.rand(2, 3, 4, requires_grad=True)
    loss = sinkhorn(cost, epsilon=0.1).value.sum()
    (gradient,) = torch.autograd.grad(loss, cost, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative with gradient='envelope'"):
        gradient.sum().backward()


def test_unroll_has_a_second_derivative():
    cost = torch.rand(1, 3, 3, dtype=torch.float64, requires_grad=True)

    def value(cost):
        return sinkhorn(cost, epsilon=0.5, max_iter=3, gradient="unroll").value

    assert torch.autograd.gradgradcheck(value, cost)


def test_outputs_share_no_memory():
    problem = ALL["no_iteration"]
    outputs = FORWARD(*arguments(problem))
    addresses = [x.data_ptr() for x in (*outputs, problem.cost, problem.log_a, problem.log_b)]
    assert len(set(addresses)) == len(addresses)


def loss_of(student, teacher, mask):
    return OTAlignmentLoss(max_iter=10, backend="reference")(student, teacher, mask)


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiles_as_one_graph(compiler):
    teacher, mask = torch.randn(3, 7, 8), torch.arange(5)[None, :] < torch.tensor([[5], [2], [0]])
    results = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True, backend=compiler)):
        student = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss = function(student, teacher, mask)
        loss.backward()
        results.append((loss.detach(), student.grad))
    torch.testing.assert_close(*results)


def test_a_compiled_function_may_return_the_result_object():
    cost = torch.rand(2, 3, 4)
    solve = torch.compile(
        lambda cost: sinkhorn(cost, epsilon=0.1, tol=1e-3), fullgraph=True, backend="aot_eager"
    )
    expected = sinkhorn(cost, epsilon=0.1, tol=1e-3)
    result = solve(cost)
    assert torch.equal(result.value, expected.value)
    assert torch.equal(result.plan(), expected.plan())


def test_autocast_changes_nothing():
    student, teacher = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 7, 8)
    expected = ot_alignment(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ot_alignment(student, teacher)
        cost = torch.randn(2, 5, 8) @ torch.randn(2, 8, 7)
        assert cost.dtype == torch.bfloat16
        result = sinkhorn(cost, epsilon=1.0)
        unrolled = sinkhorn(cost, epsilon=1.0, gradient="unroll")
    assert torch.equal(found, expected)
    assert result.value.dtype == result.f.dtype == unrolled.value.dtype == torch.float32
    gradient = torch.autograd.grad(found.sum(), student)[0]
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(result.value, unrolled.value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradient", ["envelope", "unroll"])
def test_nothing_waits_for_a_device(gradient):
    """A fake tensor has no values, so reading one on the host, as a check might, would raise."""
    with FakeTensorMode():
        student, teacher = torch.randn(3, 5, 8, requires_grad=True), torch.randn(3, 7, 8)
        mask = torch.ones(3, 5, dtype=torch.int64)
        options = {"epsilon": torch.full((3,), 0.1), "tol": 1e-3, "max_iter": 3}
        loss = ot_alignment(student, teacher, mask, **options, gradient=gradient).sum()
        loss.backward()
        assert student.grad.shape == student.shape
