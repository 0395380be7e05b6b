"""Ordinary situations of PyTorch: checkpointing, compilation, transforms, in-place changes."""

import copy
import math
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from optical import (
    OTAlignmentLoss,
    ot_alignment,
    sinkhorn,
    sinkhorn_divergence,
    sinkhorn_vectors,
)
from optical.backends.problem import GRADIENTS

pytestmark = pytest.mark.filterwarnings("ignore:the plan is a constant")

TEACHER = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))


def costs(x):
    return 1 - x @ TEACHER.to(x).mT / 8


def product(x, gradient):
    result = sinkhorn_vectors(x, TEACHER, epsilon=0.1, max_iter=60, gradient=gradient)
    return result.apply_plan(x @ x.mT @ TEACHER[:, :5], transpose=True).square().sum((1, 2))


# Every public function as a function of token vectors (2, 5, 8) and the gradient's name.
FUNCTIONS = {
    "sinkhorn": lambda x, gradient: sinkhorn(costs(x), epsilon=0.1, gradient=gradient).value,
    "value_linear": lambda x, gradient: (
        sinkhorn(costs(x), epsilon=0.1, gradient=gradient).value_linear
    ),
    "vectors": lambda x, gradient: (
        sinkhorn_vectors(x, TEACHER, epsilon=0.1, gradient=gradient).value_linear
    ),
    "alignment": lambda x, gradient: ot_alignment(
        x, TEACHER, torch.ones(2, 5).bool(), gradient=gradient
    ),
    "loss": lambda x, gradient: OTAlignmentLoss(gradient=gradient)(x, TEACHER),
    "divergence": lambda x, gradient: sinkhorn_divergence(
        x, TEACHER, epsilon=0.5, cost="sqeuclidean", max_iter=50, tol=0.0, gradient=gradient
    ),
    "plan": lambda x, gradient: (
        sinkhorn(costs(x), epsilon=0.1, gradient=gradient).plan().mul(costs(x)).sum((1, 2))
    ),
    "apply_plan": product,
}


def student():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.fixture(params=FUNCTIONS)
def function(request):
    return FUNCTIONS[request.param]


# ---------------------------------------------------------------------------------- checkpointing


def checkpointed(kind):
    if kind != "selective":
        return lambda function, x: checkpoint(function, x, use_reentrant=kind == "reentrant")

    def policy(_context, op, *_args, **_kwargs):
        ours = str(op).startswith("optical")
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    return lambda function, x: checkpoint(
        function,
        x,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant", "selective"])
def test_checkpointing_gives_the_same_gradient(function, kind, gradient):
    expected, actual = student(), student()
    function(expected, gradient).sum().backward()
    checkpointed(kind)(lambda x: function(x, gradient), actual).sum().backward()
    torch.testing.assert_close(actual.grad, expected.grad)


# ------------------------------------------------------------------------------------- compilation


def compiled_graphs(function, inputs, **options):
    """Number of graphs compiled for the inputs, whose results are compared with the eager ones."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, fullgraph=True, **options)
    for values in inputs:
        torch.testing.assert_close(compiled(*values), function(*values))
    return counter.frame_count


def mask(size):
    return torch.arange(size) < torch.tensor([[size], [2], [1]])


def vectors(n):
    return torch.randn(3, n, 8), torch.randn(3, n + 2, 8)


CALLS = {
    "no mask": (ot_alignment, vectors),
    "student mask": (ot_alignment, lambda n: (*vectors(n), mask(n))),
    "teacher mask": (
        lambda x, y, m: OTAlignmentLoss()(x, y, None, m),
        lambda n: (*vectors(n), mask(n + 2)),
    ),
    "both masks": (ot_alignment, lambda n: (*vectors(n), mask(n), mask(n + 2).float())),
    "cost": (lambda c: sinkhorn(c, epsilon=0.1).value, lambda n: (torch.rand(3, n, n + 1),)),
    "lengths": (
        lambda c, k: sinkhorn(c, epsilon=0.1, lengths_b=k).value,
        lambda n: (torch.rand(3, n, n + 1), torch.tensor([1, n, n])),
    ),
    "leading dimensions": (
        lambda c: sinkhorn(c, epsilon=0.1).plan(),
        lambda n: (torch.rand(2, 3, n, n + 1),),
    ),
    "one problem": (lambda c: sinkhorn(c, epsilon=0.1).log_plan(), lambda n: (torch.rand(n, 4),)),
    "masses": (
        lambda c, a: sinkhorn(c, a=a, epsilon=0.1).f,
        lambda n: (torch.rand(3, n, 4), torch.full((3, n), 1 / n)),
    ),
    "euclidean": (
        lambda x, y: sinkhorn_vectors(x, y, epsilon=0.1, cost="euclidean").value,
        vectors,
    ),
    "divergence": (
        lambda x, y: sinkhorn_divergence(
            x, y, epsilon=0.5, cost="sqeuclidean", max_iter=20, tol=0.0
        ),
        vectors,
    ),
}


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("call", CALLS)
def test_one_compilation_serves_all_lengths(call, dynamic):
    function, inputs = CALLS[call]
    count = compiled_graphs(function, [inputs(n) for n in range(5, 20)], dynamic=dynamic)
    # Without `dynamic`, the second length makes PyTorch compile once more, for any length.
    assert count == (1 if dynamic else 2)


class Alignment(torch.nn.Module):
    def forward(self, x, y):
        return ot_alignment(x, y)


class Plan(torch.nn.Module):
    def forward(self, cost):
        return sinkhorn(cost, epsilon=0.1).plan()


def test_exports_with_dynamic_batch_rows_and_columns():
    shapes = ({0: Dim("b"), 1: Dim("n")}, {0: Dim("b"), 1: Dim("m")})
    program = export(
        Alignment(), (torch.randn(3, 5, 8), torch.randn(3, 7, 8)), dynamic_shapes=shapes
    )
    other = torch.randn(4, 9, 8), torch.randn(4, 3, 8)
    torch.testing.assert_close(program.module()(*other), ot_alignment(*other))
    shapes = ({0: Dim("b"), 1: Dim("n"), 2: Dim("m")},)
    program = export(Plan(), (torch.rand(3, 5, 7),), dynamic_shapes=shapes)
    cost = torch.rand(2, 9, 4)
    torch.testing.assert_close(program.module()(cost), Plan()(cost))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("masked", [False, True])
def test_a_trace_is_right_at_another_length(masked):
    def inputs(n, m):
        return torch.randn(2, n, 8), torch.randn(2, m, 8), torch.arange(n).expand(2, n) < n - 1

    def function(x, y, m):
        return ot_alignment(x, y, m if masked else None)

    traced = torch.jit.trace(function, inputs(5, 6), check_trace=False)
    other = inputs(10, 3)
    torch.testing.assert_close(traced(*other), function(*other))


# -------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_transforms_of_reverse_mode(function, gradient):
    x = student()
    (expected,) = torch.autograd.grad(function(x, gradient).sum(), x)

    def scalar(x):
        return function(x, gradient).sum()

    torch.testing.assert_close(torch.func.grad(scalar)(x.detach()), expected)
    _, pull = torch.func.vjp(scalar, x.detach())
    torch.testing.assert_close(pull(torch.tensor(1.0))[0], expected)
    torch.testing.assert_close(torch.func.jacrev(scalar)(x.detach()), expected)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_per_sample_gradients(gradient):
    student, weight = torch.randn(3, 5, 8), torch.randn(8, 8)
    teacher, mask = torch.randn(3, 6, 8), torch.arange(5) < torch.tensor([[5], [2], [4]])

    def loss(weight, x, y, m):
        value = ot_alignment((x @ weight)[None], y[None], m[None], gradient=gradient)
        result = sinkhorn_vectors(x @ weight, y, epsilon=0.3, mask_a=m, gradient=gradient)
        return value[0] + (result.plan() ** 2).sum()

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))
    actual = per_sample(weight, student, teacher, mask)
    for i in range(3):
        leaf = weight.clone().requires_grad_()
        loss(leaf, student[i], teacher[i], mask[i]).backward()
        torch.testing.assert_close(actual[i], leaf.grad)


FORWARD = ["sinkhorn", "value_linear", "vectors", "alignment", "loss", "divergence"]


@pytest.mark.parametrize("gradient", ["envelope", "implicit"])
@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_is_the_transpose_of_reverse_mode(name, gradient):
    def scalar(x):
        return FUNCTIONS[name](x, gradient).sum()

    x, tangent = student().detach(), torch.randn(2, 5, 8)
    expected = (torch.func.grad(scalar)(x) * tangent).sum()
    torch.testing.assert_close(torch.func.jvp(scalar, (x,), (tangent,))[1], expected)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(scalar(forward_ad.make_dual(x, tangent)))
        torch.testing.assert_close(dual.tangent, expected)
    torch.testing.assert_close(
        torch.func.jacfwd(scalar)(x), torch.func.jacrev(scalar)(x), rtol=1e-4, atol=1e-6
    )


def test_forward_mode_with_respect_to_masses():
    cost, log_a = torch.rand(2, 3, 4).double(), torch.randn(2, 3).double().log_softmax(1)

    def value(log_a):
        return sinkhorn(cost, log_a, epsilon=0.1, max_iter=300, rho=1.0).value

    tangent = torch.randn(2, 3).double()
    actual = torch.func.jvp(value, (log_a,), (tangent,))[1]
    step = 1e-6 * tangent
    torch.testing.assert_close(
        actual, (value(log_a + step) - value(log_a - step)) / 2e-6, rtol=1e-5, atol=1e-8
    )


def test_forward_mode_of_apply_plan_is_linear():
    result = sinkhorn(torch.rand(2, 3, 4), epsilon=0.1)
    v, tangent = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    actual = torch.func.jvp(result.apply_plan, (v,), (tangent,))[1]
    torch.testing.assert_close(actual, result.plan() @ tangent)


@pytest.mark.parametrize("name", ["plan", "apply_plan"])
def test_forward_mode_of_plans_is_refused(name):
    x = student().detach()
    with pytest.raises(RuntimeError, match="a plan has no forward-mode derivative"):
        torch.func.jvp(lambda x: FUNCTIONS[name](x, "implicit"), (x,), (x,))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda c: sinkhorn(c, epsilon=0.1, gradient="unroll").value, "no forward-mode derivative"),
        (lambda c: sinkhorn(c, epsilon=0.1).plan(), "a plan has no forward-mode derivative"),
    ],
)
def test_forward_mode_is_refused_and_never_zero(function, message):
    cost = torch.rand(2, 3, 4)
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(function, (cost,), (cost,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        function(forward_ad.make_dual(cost, cost))


def test_second_derivatives_by_transforms_are_refused():
    def value(cost):
        return sinkhorn(cost, epsilon=0.1).value.sum()

    for hessian in (
        torch.func.hessian(value),
        torch.func.jacfwd(torch.func.jacfwd(value)),
        torch.func.jacrev(torch.func.jacrev(value)),
    ):
        with pytest.raises(RuntimeError, match="no second derivative"):
            hessian(torch.rand(2, 3, 4))


# -------------------------------------------------------------------------------- in-place changes


@pytest.mark.parametrize("name", ["epsilon", "log_a", "log_b"])
def test_an_in_place_change_of_one_problem_reaches_no_other(name):
    cost = torch.rand(2, 3, 4)
    expected = sinkhorn(cost, epsilon=0.1)
    getattr(sinkhorn(cost, epsilon=0.1).problem, name).add_(1)
    found = sinkhorn(cost, epsilon=0.1)
    assert torch.equal(found.f, expected.f)
    assert torch.equal(found.value, expected.value)


def changed_cost(c, x, result):
    c.add_(1)


def changed_epsilon(c, x, result):
    result.problem.epsilon.mul_(2)


def changed_potential(c, x, result):
    result.f.detach().add_(1)


@pytest.mark.parametrize("read", ["plan", "log_plan", "apply_plan", "assignment", "sample"])
@pytest.mark.parametrize(
    ("change", "name"),
    [(changed_cost, "cost"), (changed_epsilon, "epsilon"), (changed_potential, "f")],
)
def test_reading_a_plan_after_an_in_place_change_is_refused(read, change, name):
    cost = torch.rand(2, 3, 4)
    result = sinkhorn(cost, epsilon=0.1)
    arguments = {"apply_plan": (torch.rand(2, 4, 1),), "sample": (3,)}.get(read, ())
    getattr(result, read)(*arguments)
    change(cost, None, result)
    with pytest.raises(RuntimeError, match=f"reads {name}, which has been modified in place"):
        getattr(result, read)(*arguments)


def test_a_step_of_the_optimiser_is_noticed():
    x = torch.nn.Parameter(torch.randn(2, 5, 8))
    result = sinkhorn_vectors(x, TEACHER, epsilon=0.1)
    result.value.sum().backward()
    torch.optim.SGD([x], lr=1.0).step()
    with pytest.raises(RuntimeError, match="reads x, which"):
        result.plan()


def test_inference_tensors_have_plans():
    with torch.inference_mode():
        result = sinkhorn(torch.rand(2, 3, 4), epsilon=0.1)
        assert result.plan().shape == (2, 3, 4)
    assert math.isclose(float(result.plan().sum()), 2, rel_tol=1e-5)


# ------------------------------------------------------------------------------ offsets and memory

BAD_OFFSETS = [[0, 4, 2_000_000], [0, 4, 12], [-100_000, 4, 9], [0, 10, 9], [2, 4, 9], [0, 4, 8]]
BAD_OFFSETS += [[0, 2**62, 9], [0, -(2**62), 9]]
PACKED = torch.randn(9, 8), torch.randn(7, 8)


def packed(offsets_a, offsets_b):
    return sinkhorn_vectors(*PACKED, epsilon=0.1, cu_seqlens_a=offsets_a, cu_seqlens_b=offsets_b).f


@pytest.mark.parametrize("values", BAD_OFFSETS, ids=str)
@pytest.mark.parametrize("seen", ["eager", "parameter", "compiled", "exported"])
def test_wrong_offsets_never_reach_the_kernels(seen, values):
    good, bad, other = torch.tensor([0, 4, 9]), torch.tensor(values), torch.tensor([0, 3, 7])
    call = packed
    if seen == "parameter":
        bad = torch.nn.Parameter(bad, requires_grad=False)
    elif seen == "compiled":
        call = torch.compile(packed, backend="eager", fullgraph=True)
    elif seen == "exported":

        class Packed(torch.nn.Module):
            def forward(self, a, b):
                return packed(a, b)

        call = export(Packed(), (good, other)).module()
    assert call(good, other).isfinite().all()
    with pytest.raises(ValueError, match="cu_seqlens_a"):
        call(bad, other)


@pytest.mark.parametrize("read", ["plan", "apply_plan", "backward"])
def test_offsets_that_change_after_the_solve_are_noticed(read):
    offsets, x = torch.tensor([0, 4, 9]), PACKED[0].clone().requires_grad_()
    result = sinkhorn_vectors(
        x, PACKED[1], epsilon=0.1, cu_seqlens_a=offsets, cu_seqlens_b=torch.tensor([0, 3, 7])
    )
    offsets[2] = 2_000_000
    with pytest.raises(RuntimeError, match=r"modified (in place|by an inplace operation)"):
        if read == "backward":
            result.value.sum().backward()
        else:
            getattr(result, read)(*([PACKED[1]] if read == "apply_plan" else []))


# --------------------------------------------------------------------------------- mixed precision


def found_inf(gradient, kind):
    """Whether GradScaler would skip the step of a batch in which one pair is not finite."""
    weight = torch.nn.Parameter(torch.eye(8))
    student, teacher = torch.randn(3, 5, 8), torch.randn(3, 6, 8)
    student[1, 2, 3] = kind
    tokens = student @ weight
    tokens.retain_grad()
    loss = OTAlignmentLoss(gradient=gradient)(tokens, teacher)
    loss.backward()
    assert loss.isnan()
    assert tokens.grad[1].isnan().all() and tokens.grad[[0, 2]].isfinite().all()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))  # initialises the scale
    before = weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    return torch.equal(weight, before) and scaler.get_scale() == 4.0


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", [math.nan, math.inf])
def test_the_scaler_skips_the_step_of_a_batch_with_an_overflow(kind, gradient):
    assert found_inf(gradient, kind)


# ------------------------------------------------------------------------------- other situations


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_a_result_has_the_plan_and_notices_changes(copied):
    result = sinkhorn(torch.rand(2, 3, 4), epsilon=0.1)
    other = copied(result)
    assert torch.equal(other.plan(), result.plan())
    other.problem.x.add_(1)
    with pytest.raises(RuntimeError, match="reads cost"):
        other.plan()
    result.plan()


def test_meta_tensors_have_shapes():
    cost = torch.rand(2, 3, 4, device="meta")
    result = sinkhorn(cost, epsilon=0.1)
    assert result.value.shape == (2,) and result.f.device.type == "meta"
    assert ot_alignment(torch.rand(2, 3, 8, device="meta"), TEACHER.to("meta")).shape == (2,)


def test_values_may_be_changed_in_place():
    cost = torch.rand(2, 3, 4, requires_grad=True)
    result = sinkhorn(cost, epsilon=0.1)
    result.value.mul_(2).sum().backward()
    torch.testing.assert_close(cost.grad, 2 * result.plan())
