"""Shapes, masks, masses and options that the public functions accept; methods of a result."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from optical import (
    OTAlignmentLoss,
    Status,
    ot_alignment,
    sinkhorn,
    sinkhorn_divergence,
    sinkhorn_vectors,
)
from optical.ot import masses

INF, NAN = math.inf, math.nan
FIELDS = ("value", "value_linear", "f", "g", "marginal_error", "n_iter", "status")


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def assert_same_result(actual, expected, lead):
    for name in FIELDS:
        tensor, folded = getattr(actual, name), getattr(expected, name)
        assert tensor.shape == (*lead, *folded.shape[1:])
        assert torch.equal(tensor.reshape(folded.shape), folded)
    assert torch.equal(actual.plan().reshape(expected.plan().shape), expected.plan())
    assert actual.plan().shape[:-2] == lead


# ------------------------------------------------------------------------------ leading dimensions


@pytest.mark.parametrize("lead", [(), (2, 3), (1,), (2, 0), (2, 1, 3)])
def test_leading_dimensions_of_a_cost(lead):
    batch = math.prod(lead)
    cost, mask = random(*lead, 4, 5), random(*lead, 4, seed=1) > 0.3
    log_b, epsilon = random(*lead, 5).log_softmax(-1), 0.1 + random(*lead, seed=2)
    init = (random(*lead, 4), random(*lead, 5))
    actual = sinkhorn(cost, None, log_b, epsilon=epsilon, mask_a=mask, init=init, tol=1e-3)
    expected = sinkhorn(
        cost.view(batch, 4, 5),
        None,
        log_b.view(batch, 5),
        epsilon=epsilon.view(batch),
        mask_a=mask.view(batch, 4),
        init=(init[0].view(batch, 4), init[1].view(batch, 5)),
        tol=1e-3,
    )
    assert_same_result(actual, expected, lead)
    v = random(*lead, 5, 2)
    product = expected.apply_plan(v.view(batch, 5, 2))
    assert torch.equal(actual.apply_plan(v).view(product.shape), product)
    assert actual.assignment().shape == (*lead, 4)
    assert actual.sample(7)[0].shape == (*lead, 7)


@pytest.mark.parametrize("cost", ["cosine", "sqeuclidean", "dot", "euclidean"])
@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_leading_dimensions_of_vectors_and_their_gradient(lead, cost):
    batch = math.prod(lead)
    leaves, gradients = [], []
    for shape in ((*lead,), (batch,)):
        x = random(*lead, 4, 3).view(*shape, 4, 3).requires_grad_()
        y, lengths = random(*lead, 5, 3, seed=1).view(*shape, 5, 3), torch.full(shape, 3)
        options = {"cost": cost, "epsilon": 0.1, "lengths_b": lengths, "gradient": "implicit"}
        result = sinkhorn_vectors(x, y, **options)
        (result.value.sum() + result.plan().square().sum()).backward()
        leaves.append(result)
        gradients.append(x.grad.view(batch, 4, 3))
    assert_same_result(leaves[0], leaves[1], lead)
    assert torch.equal(*gradients) and gradients[0].any()


def test_one_set_of_vectors_meets_many_without_a_copy():
    x, y = random(4, 3).requires_grad_(), random(6, 5, 3, seed=1)
    result = sinkhorn_vectors(x, y, epsilon=0.1, mask_a=torch.tensor([1, 1, 0, 1]))
    repeated = sinkhorn_vectors(
        x.expand(6, 4, 3).clone(),
        y,
        epsilon=0.1,
        mask_a=torch.tensor([1, 1, 0, 1]).expand(6, 4),
    )
    assert torch.equal(result.value, repeated.value) and result.value.shape == (6,)
    assert result.problem.x.data_ptr() == x.data_ptr()
    result.value.sum().backward()
    assert x.grad.shape == (4, 3) and not x.grad[2].any()
    assert sinkhorn_vectors(x[None], y, epsilon=0.1).plan().shape == (6, 4, 5)


def test_the_loss_does_not_broadcast():
    """Pooled vectors (batch, dim) in the place of tokens would otherwise pass unnoticed."""
    with pytest.raises(ValueError, match=r"teacher has shape \(3, 5, 8\)"):
        ot_alignment(torch.rand(3, 8), torch.rand(3, 5, 8))
    assert ot_alignment(torch.rand(4, 8), torch.rand(5, 8)).shape == ()
    assert OTAlignmentLoss()(torch.rand(2, 3, 4, 8), torch.rand(2, 3, 5, 8)).shape == ()


# -------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("bad", [-INF, torch.finfo(torch.float32).min, NAN, 0.5, -1.0, 2.0])
def test_a_mask_of_other_numbers_is_refused(bad):
    mask = torch.tensor([[0.0, 0.0, bad]])
    with pytest.raises(ValueError, match=r"mask_a holds .*; expected 0 \(padding\) and 1"):
        sinkhorn(random(1, 3, 4), epsilon=0.1, mask_a=mask)
    with pytest.raises(ValueError, match="student_mask holds"):
        OTAlignmentLoss()(random(1, 3, 8), random(1, 4, 8), mask)
    with pytest.raises(ValueError, match="mask_b holds"):
        sinkhorn_vectors(
            random(1, 4, 8), random(1, 3, 8), None, torch.zeros(1, 3), epsilon=0.1, mask_b=mask
        )
    if bad == int(bad if math.isfinite(bad) else 0) and abs(bad) < 100:
        with pytest.raises(ValueError, match="mask_a holds"):
            sinkhorn(random(1, 3, 4), epsilon=0.1, mask_a=mask.long())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int64, torch.half])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_mask_of_any_dtype_and_strides_means_the_same(dtype, transposed):
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    expected = sinkhorn(random(3, 4, 5), epsilon=0.1, mask_a=mask.bool())
    given = mask.to(dtype)
    given = given.T.contiguous().T if transposed else given
    actual = sinkhorn(random(3, 4, 5), epsilon=0.1, mask_a=given)
    assert torch.equal(actual.f, expected.f) and torch.equal(actual.value, expected.value)


def test_a_mask_that_nobody_can_inspect_spoils_its_problem_and_is_never_inverted():
    function = torch.compile(
        lambda cost, mask: sinkhorn(cost, epsilon=0.1, mask_a=mask),
        backend="eager",
        fullgraph=True,
    )
    mask = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, -INF], [1.0, NAN, 1.0]])
    result = function(random(3, 3, 4), mask)
    assert result.value.isnan().tolist() == [False, True, True]
    assert result.status[1:].tolist() == [Status.INFEASIBLE] * 2


# ------------------------------------------------------------------------------------------- masses


def test_masses_as_probabilities():
    cost = random(2, 3, 4).double()
    a, b = random(2, 3, seed=1).double(), random(2, 4, seed=2).double()
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    a, log_a = a.requires_grad_(), a.log().detach().requires_grad_()
    options = {"epsilon": 0.1, "max_iter": 300}
    actual = sinkhorn(cost, a=a, b=b, **options)
    expected = sinkhorn(cost, log_a, b.log(), **options)
    torch.testing.assert_close(actual.value, expected.value)
    actual.value.sum().backward()
    expected.value.sum().backward()
    torch.testing.assert_close(a.grad, log_a.grad / a.detach())
    x, y = random(2, 3, 8), random(2, 4, 8, seed=3)
    torch.testing.assert_close(
        sinkhorn_vectors(x, y, a=a.float(), epsilon=0.1).value,
        sinkhorn_vectors(x, y, log_a.float(), epsilon=0.1).value,
    )


@pytest.mark.parametrize("gradient", ["envelope", "implicit", "unroll"])
def test_the_gradient_of_a_mass_of_zero_is_finite(gradient):
    a = torch.tensor([[0.5, 0.5, 0.0, 0.0]], requires_grad=True)
    b = torch.tensor([[0.0, 0.25, 0.75]], requires_grad=True)
    result = sinkhorn(random(1, 4, 3), a=a, b=b, epsilon=0.1, gradient=gradient)
    (result.value + result.value_linear).sum().backward()
    assert a.grad.isfinite().all() and b.grad.isfinite().all()
    assert not a.grad[0, 2:].any() and a.grad[0, :2].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a": torch.full((1, 3), 1 / 3), "log_a": torch.zeros(1, 3)}, "a is given together with"),
        ({"a": torch.tensor([[0.5, 0.7, -0.2]])}, r"a holds -0.2.*; expected masses >= 0"),
        ({"b": torch.tensor([[0.5, 0.5, NAN, 0.0]])}, "b holds nan"),
        ({"a": torch.ones(1, 4)}, r"a has shape \(1, 4\); expected \(1, 3\)"),
        ({"log_a": torch.full((1, 3), 1 / 3)}, "log_a is non-negative and sums to 1.*pass .*a="),
        ({"log_b": torch.tensor([[0.5, 0.5, 0.0, 0.0]])}, "log_b is non-negative and sums to 1"),
    ],
)
def test_wrong_masses_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(random(1, 3, 4), epsilon=0.1, **arguments)


def test_log_masses_that_are_no_probabilities_are_accepted():
    cost = random(2, 3, 4)
    for arguments in (
        {"log_a": torch.zeros(2, 3), "log_b": torch.full((2, 4), math.log(3 / 4))},
        {"log_a": torch.full((2, 3), 1 / 3), "rho": 1.0},
    ):
        assert sinkhorn(cost, epsilon=0.1, **arguments).value.isfinite().all()


# ------------------------------------------------------------------------------------------ options


def test_numpy_scalars_are_numbers():
    expected = sinkhorn(random(1, 3, 4), epsilon=0.5, max_iter=7, tol=0.25, rho=(0.5, None))
    actual = sinkhorn(
        random(1, 3, 4),
        epsilon=np.float32(0.5),
        max_iter=np.int64(7),
        tol=np.float16(0.25),
        rho=(np.float64(0.5), None),
        omega=np.float32(1.0),
    )
    assert torch.equal(actual.value, expected.value)
    for wrong in ({"max_iter": np.float32(7)}, {"tol": np.bool_(True)}, {"max_iter": np.bool_(1)}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            sinkhorn(random(1, 3, 4), epsilon=0.5, **wrong)


X = torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sinkhorn(X, epsilon=1.0, max_itr=3), "sinkhorn has no option 'max_itr'.*max_iter"),
        (lambda: sinkhorn(X, epsilon=1.0, reg=3), "sinkhorn has no option 'reg'.*'epsilon'"),
        (lambda: sinkhorn_vectors(X, X, epsilon=1.0, maskb=0), "sinkhorn_vectors .*'mask_b'"),
        (lambda: ot_alignment(X, X, eps=0.1), "ot_alignment has no option 'eps'.*'epsilon'"),
        (lambda: OTAlignmentLoss(eps=0.1), "OTAlignmentLoss has no option 'eps'.*'epsilon'"),
        (lambda: OTAlignmentLoss(gradients="x"), "OTAlignmentLoss has no .*'gradient'"),
        (
            lambda: sinkhorn_divergence(X, X, epsilon=1.0, anderssen=1),
            "sinkhorn_divergence has no option 'anderssen'.*'anderson'",
        ),
    ],
)
def test_a_mistyped_option_names_the_function_and_the_nearest_option(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: OTAlignmentLoss(anneal=(1.0, 0.95)),
            r"anneal is \(1.0, 0.95\), which reaches epsilon=0.05 at iteration 60; "
            "expected max_iter >= 60, not 50",
        ),
        (lambda: sinkhorn(X, epsilon=0.1, anneal=(2.0, 0.99)), "max_iter >= 300, not 100"),
        (
            lambda: sinkhorn(X, epsilon=torch.tensor([0.1]), anneal=(2.0, 0.99)),
            "whose temperature is still 0.739 at the last of 100 iterations",
        ),
    ],
)
def test_annealing_that_does_not_reach_epsilon_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_iterations_that_the_message_asks_for_are_enough():
    for start, ratio, epsilon in ((1.0, 0.95, 0.05), (2.0, 0.5, 0.125), (7.0, 0.9, 1e-3)):
        with pytest.raises(ValueError, match="expected max_iter >= ") as error:
            sinkhorn(X, epsilon=epsilon, anneal=(start, ratio), max_iter=1)
        needed = int(str(error.value).split(">= ")[1].split(",")[0])
        sinkhorn(X, epsilon=epsilon, anneal=(start, ratio), max_iter=needed)
        with pytest.raises(ValueError, match=f"max_iter >= {needed}, not {needed - 1}"):
            sinkhorn(X, epsilon=epsilon, anneal=(start, ratio), max_iter=needed - 1)


def test_temperatures_that_nobody_can_inspect_make_their_problem_infeasible():
    function = torch.compile(
        lambda epsilon: sinkhorn(random(2, 3, 4), epsilon=epsilon, anneal=(2.0, 0.9), max_iter=20),
        backend="eager",
    )
    result = function(torch.tensor([0.5, 0.01]))
    assert result.status.tolist() == [Status.MAX_ITER, Status.INFEASIBLE]
    assert result.value.isnan().tolist() == [False, True]


# ------------------------------------------------------------------------------ epsilon's gradient


@pytest.mark.parametrize("gradient", ["envelope", "implicit"])
@pytest.mark.parametrize("rho", [None, 0.7, (None, 0.4)])
@pytest.mark.parametrize("shape", [(), (2,)])
def test_the_gradient_of_epsilon_is_the_divergence_of_the_plan(shape, rho, gradient):
    cost, mask = random(2, 4, 5).double(), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    options = {"max_iter": 2000, "mask_a": mask, "rho": rho, "gradient": gradient}
    epsilon = torch.full(shape, 0.2, dtype=torch.float64, requires_grad=True)

    def value(epsilon):
        return sinkhorn(cost, epsilon=epsilon, **options).value.sum()

    assert torch.autograd.gradcheck(value, epsilon, atol=1e-6)
    result = sinkhorn(cost, epsilon=epsilon.detach().expand(2), **options)
    plan = result.plan()
    product = torch.exp(result.problem.log_a)[:, :, None] * torch.exp(result.problem.log_b)[:, None]
    terms = torch.where(plan > 0, plan * (plan / product.clamp(min=1e-300)).log(), 0.0)
    expected = (terms - plan + product).sum((1, 2))
    (actual,) = torch.autograd.grad(value(epsilon), epsilon)
    torch.testing.assert_close(actual, expected.sum() if shape == () else expected)
    vectors = sinkhorn_vectors(cost, cost, epsilon=epsilon, cost="sqeuclidean")
    assert vectors.value.requires_grad and not vectors.value_linear.requires_grad


def test_the_transport_cost_has_no_gradient_of_epsilon():
    epsilon = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(ValueError, match="epsilon requires grad, which the transport cost"):
        ot_alignment(torch.rand(1, 3, 4), torch.rand(1, 5, 4), epsilon=epsilon)


# ---------------------------------------------------------------------------------- Euclidean costs


def test_the_euclidean_cost_is_the_distance():
    x, y = random(2, 4, 3).double().requires_grad_(), random(2, 5, 3, seed=1).double()
    x.data[0, 0] = y[0, 0]  # a distance of 0, whose gradient is 0
    options = {"epsilon": 0.05, "max_iter": 300, "lengths_a": torch.tensor([4, 2])}
    result = sinkhorn_vectors(x, y, cost="euclidean", **options)
    distances = (x.detach()[:, :, None] - y[:, None]).norm(dim=-1)
    expected = sinkhorn(distances, **options)
    torch.testing.assert_close(result.value, expected.value)
    result.value_linear.sum().backward()
    difference = x.detach()[:, :, None] - y[:, None]
    direction = difference / distances.clamp(min=1e-300)[..., None]
    torch.testing.assert_close(x.grad, (expected.plan()[..., None] * direction).sum(2))


def test_the_vectors_of_padding_do_not_touch_a_euclidean_cost():
    x, y = random(2, 4, 3), random(2, 5, 3, seed=1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    spoilt = x.masked_fill(mask[..., None] == 0, NAN).requires_grad_()
    result = sinkhorn_vectors(spoilt, y, cost="euclidean", epsilon=0.1, mask_a=mask)
    clean = sinkhorn_vectors(x, y, cost="euclidean", epsilon=0.1, mask_a=mask)
    assert torch.equal(result.value, clean.value)
    result.value.sum().backward()
    assert not spoilt.grad[mask == 0].any() and spoilt.grad.isfinite().all()


def test_a_euclidean_cost_of_packed_vectors_is_refused():
    offsets = torch.tensor([0, 4])
    with pytest.raises(ValueError, match="cost is 'euclidean' with cu_seqlens"):
        sinkhorn_vectors(
            random(4, 3),
            random(4, 3),
            epsilon=1.0,
            cost="euclidean",
            cu_seqlens_a=offsets,
            cu_seqlens_b=offsets,
        )


# -------------------------------------------------------------------------- what a result offers


def test_the_logarithm_of_a_plan_is_exact_where_the_plan_underflows():
    cost = random(2, 4, 5) * 100
    cost[0, 1, 2] = INF
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    result = sinkhorn(cost, epsilon=0.1, mask_a=mask, max_iter=50)
    problem = result.problem
    log_plan = (result.f[:, :, None].double() + result.g[:, None].double() - cost.double()) / 0.1
    log_plan = log_plan + problem.log_a[:, :, None].double() + problem.log_b[:, None].double()
    torch.testing.assert_close(result.log_plan().double(), log_plan, rtol=1e-6, atol=1e-5)
    assert result.log_plan()[0, 1, 2] == -INF and result.log_plan()[1, 3].max() == -INF
    assert (result.plan() == 0).sum() > (result.log_plan() == -INF).sum()


@pytest.mark.parametrize("gradient", ["implicit", "unroll"])
@pytest.mark.parametrize("rho", [None, 0.5, (None, 0.5)])
@pytest.mark.parametrize("read", ["plan", "log_plan", "apply_plan", "transposed"])
def test_gradients_of_plans(read, rho, gradient):
    """Against finite differences; with fixed marginals the masses keep their sums."""
    cost = random(2, 4, 5).double().requires_grad_()
    logits = random(2, 4, seed=1).double().requires_grad_()
    v, mask = random(2, 5, 3).double(), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    options = {"epsilon": 0.2, "gradient": gradient, "rho": rho, "mask_b": mask}
    options["max_iter"] = 400 if gradient == "implicit" else 5

    def output(cost, logits):
        result = sinkhorn(cost, logits.log_softmax(1), **options)
        if read == "plan":
            return result.plan()
        if read == "log_plan":
            return result.log_plan().masked_fill(mask[:, None] == 0, 0.0)
        if read == "apply_plan":
            return result.apply_plan(v)
        return result.apply_plan(v[:, :4], transpose=True)

    assert torch.autograd.gradcheck(output, (cost, logits), atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("gradient", ["implicit", "unroll"])
@pytest.mark.parametrize("kind", ["cosine", "sqeuclidean", "dot"])
def test_gradients_of_plans_of_packed_vectors(kind, gradient):
    x, y = random(7, 3).double().requires_grad_(), random(6, 3, seed=1).double().requires_grad_()
    offsets = {"cu_seqlens_a": torch.tensor([0, 4, 7]), "cu_seqlens_b": torch.tensor([0, 2, 6])}
    options = {"cost": kind, "epsilon": 0.3, "gradient": gradient} | offsets
    options["max_iter"] = 500 if gradient == "implicit" else 4
    v = random(6, 2).double()

    def outputs(x, y):
        result = sinkhorn_vectors(x, y, **options)
        return result.plan(), result.apply_plan(v)

    assert torch.autograd.gradcheck(outputs, (x, y), atol=1e-6, fast_mode=True)


def test_the_plan_warns_once_that_it_is_a_constant():
    from optical.ot.result import _warn_constant

    _warn_constant.cache_clear()
    cost = random(1, 3, 4).requires_grad_()
    with pytest.warns(UserWarning, match="constant with gradient='envelope'"):
        plan = sinkhorn(cost, epsilon=0.1).plan()
    assert not plan.requires_grad
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkhorn(cost, epsilon=0.1).plan()
        _warn_constant.cache_clear()
        sinkhorn(cost.detach(), epsilon=0.1).plan()
        with torch.no_grad():
            sinkhorn(cost, epsilon=0.1).plan()


def test_the_result_of_an_envelope_does_not_keep_the_graph():
    cost = random(1, 3, 4).requires_grad_() * 1
    result = sinkhorn(cost, epsilon=0.1)
    assert not result.problem.x.requires_grad


def test_assignments():
    cost = random(3, 4, 5)
    cost[0, 2] = INF
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]])
    result = sinkhorn(cost, epsilon=0.05, mask_a=mask, rho=1.0)
    rows = result.assignment()
    assert rows[0, 2] == -1 and rows[1, 3] == -1 and (rows[2] == -1).all()
    kept = rows >= 0
    assert torch.equal(rows[kept], result.plan().argmax(2)[kept])
    single = result.assignment(one_to_one=True)
    for i, row in enumerate(single):
        used = row[row >= 0]
        assert len(set(used.tolist())) == len(used) == [3, 3, 0][i]
    square = sinkhorn(random(2, 6, 6), epsilon=0.02, max_iter=500)
    for cost, row in zip(random(2, 6, 6), square.assignment(one_to_one=True), strict=True):
        assert row.tolist() == linear_sum_assignment(cost.numpy())[1].tolist()


def test_samples_follow_the_plan():
    cost, mask = random(2, 3, 4), torch.tensor([[1, 1, 1], [1, 1, 0]])
    result = sinkhorn(cost, epsilon=0.1, mask_a=mask, max_iter=200)
    rows, columns = result.sample(40_000, torch.Generator().manual_seed(0))
    counts = torch.zeros(2, 12).scatter_add_(1, rows * 4 + columns, torch.ones(2, 40_000))
    expected = result.plan().flatten(1)
    assert not counts[expected == 0].any()
    torch.testing.assert_close(counts / 40_000, expected, atol=0.012, rtol=0)
    again = result.sample(40_000, torch.Generator().manual_seed(0))
    assert torch.equal(rows, again[0]) and torch.equal(columns, again[1])
    empty = sinkhorn(cost, epsilon=0.1, lengths_a=torch.tensor([0, 2])).sample(5)
    assert (empty[0][0] == -1).all() and (empty[1][1] >= 0).all()
    for wrong, error in ((-1, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="k is"):
            result.sample(wrong)


# ------------------------------------------------------------------------------ one rho per problem


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("kind", ["given", "cosine", "sqeuclidean", "euclidean"])
def test_one_strength_per_problem_agrees_with_one_problem_at_a_time(kind, one_sided):
    strengths = torch.tensor([0.3, 2.0, 50.0]).double()
    x, y = random(3, 4, 5).double(), random(3, 6, 5, seed=1).double()
    init = random(3, 4).double(), random(3, 6 if kind != "given" else 5).double()
    options = {"max_iter": 30, "gradient": "implicit", "tol": 1e-6}

    def solve(x, y, rho, epsilon, init):
        rho = (rho, None) if one_sided else rho
        if kind == "given":
            return sinkhorn(x, epsilon=epsilon, rho=rho, init=init, **options)
        return sinkhorn_vectors(x, y, cost=kind, epsilon=epsilon, rho=rho, init=init, **options)

    def outputs(result):
        return (result.value, result.value_linear, result.f, result.g, result.plan(), result.n_iter)

    x.requires_grad_()
    epsilon = torch.tensor([0.1, 0.2, 0.3]).double().requires_grad_()
    together = solve(x, y, strengths, epsilon, init)
    weights = random(3, 4, together.g.shape[1], seed=2)
    loss = together.value.sum() + (together.plan() * weights).sum()
    gradients = torch.autograd.grad(loss, (x, epsilon))
    for i, rho in enumerate(strengths.tolist()):
        own, temperature = x.detach()[i : i + 1].requires_grad_(), epsilon.detach()[i : i + 1]
        temperature.requires_grad_()
        start = tuple(v[i : i + 1] for v in init)
        alone = solve(own, y[i : i + 1], rho, temperature, start)
        for actual, expected in zip(outputs(together), outputs(alone), strict=True):
            torch.testing.assert_close(actual[i : i + 1], expected)
        loss = alone.value.sum() + (alone.plan() * weights[i]).sum()
        for actual, expected in zip(
            gradients, torch.autograd.grad(loss, (own, temperature)), strict=True
        ):
            torch.testing.assert_close(actual[i : i + 1], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": torch.ones(2)}, r"rho has shape \(2,\); expected \(1,\)"),
        ({"rho": torch.tensor([-1.0])}, "rho holds -1.0; expected finite strengths > 0"),
        ({"rho": torch.tensor([INF])}, "rho holds inf; expected finite"),
        ({"rho": torch.ones(1, requires_grad=True)}, "rho requires grad"),
        ({"rho": (torch.ones(1), 2.0)}, "rho holds a tensor and another strength"),
        ({"rho": torch.ones(1), "anneal": (2.0, 0.5)}, "rho is a tensor with anneal"),
    ],
)
def test_wrong_strengths_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(random(1, 3, 4), epsilon=0.1, **arguments)


def test_int32_offsets_are_converted_once_per_content():
    def converted(offsets):
        side = masses.Masses(masses.X, offsets=offsets)
        return masses.offsets_of(side, torch.zeros(7, 2))

    offsets = torch.tensor([0, 4, 7], dtype=torch.int32)
    first = converted(offsets)
    assert first.dtype == torch.int64 and converted(offsets) is first
    offsets[1] = 3
    second = converted(offsets)
    assert first.tolist() == [0, 4, 7] and second.tolist() == [0, 3, 7]
    second[1] = 5  # a copy that has been written to is replaced
    assert converted(offsets).tolist() == [0, 3, 7]
    with torch.inference_mode():  # without a version, a change cannot be seen
        offsets = torch.tensor([0, 4, 7], dtype=torch.int32)
        assert converted(offsets) is not converted(offsets)
    kept = len(masses._copies)
    del offsets
    converted(torch.tensor([0, 7], dtype=torch.int32))
    assert len(masses._copies) <= kept
