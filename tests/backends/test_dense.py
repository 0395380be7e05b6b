"""Costs of token vectors and their gradients, compared with plain formulas and autograd."""

import math

import pytest
import torch

from optical.backends import dense
from optical.testing.cases import random_vector_case

KINDS = ["cosine", "sqeuclidean", "dot"]
D = torch.float64


def clouds(kind, **options):
    case = random_vector_case("", kind, n=4, m=5, dim=3, rows=[4, 2, 0], **options)
    return case.x, case.y, case.log_a, case.log_b


def plain(x, y, kind):
    x, y = x[:, :, None], y[:, None]
    if kind == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(x, y, dim=-1)
    return ((x - y) ** 2).sum(-1) if kind == "sqeuclidean" else -(x * y).sum(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_costs_agree_with_the_plain_formula(kind):
    x, y, log_a, log_b = clouds(kind)
    valid = (log_a > -math.inf)[:, :, None]
    actual = dense.cost_matrix(x, y, log_a, log_b, kind)
    torch.testing.assert_close(actual * valid, plain(x, y, kind) * valid)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_autograd(kind):
    x, y, log_a, log_b = clouds(kind)
    valid = ((log_a > -math.inf)[:, :, None]).double()
    weights = torch.randn(3, 4, 5, dtype=D) * valid
    leaves = [v.clone().requires_grad_() for v in (x, y)]

    def total(x, y):
        return (dense.cost_matrix(x, y, log_a, log_b, kind) * weights).sum()

    # Vectors of padding are not used, so that gradcheck measures a gradient of zero there.
    assert torch.autograd.gradcheck(total, leaves)
    by_autograd = torch.autograd.grad(total(*leaves), leaves)
    actual = dense.cost_backward(weights, x, y, log_a, log_b, kind, True, True)
    for grad, truth in zip(actual, by_autograd, strict=True):
        torch.testing.assert_close(grad, truth)
    assert dense.cost_backward(weights, x, y, log_a, log_b, kind, False, True)[0] is None
    assert dense.cost_backward(weights, x, y, log_a, log_b, kind, True, False)[1] is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filling", [math.nan, math.inf, 1e30])
def test_vectors_of_padding_are_not_used(kind, filling):
    x, y, log_a, log_b = clouds(kind)
    padding = (log_a == -math.inf)[:, :, None]
    weights = torch.randn(3, 4, 5, dtype=D).masked_fill(padding, 0.0)
    dirty = x.masked_fill(padding, filling)
    clean = dense.cost_matrix(x, y, log_a, log_b, kind).masked_fill(padding, 0.0)
    assert torch.equal(
        dense.cost_matrix(dirty, y, log_a, log_b, kind).masked_fill(padding, 0.0), clean
    )
    grads = dense.cost_backward(weights, x, y, log_a, log_b, kind, True, True)
    dirty_grads = dense.cost_backward(weights, dirty, y, log_a, log_b, kind, True, True)
    for grad, truth in zip(dirty_grads, grads, strict=True):
        assert torch.equal(grad, truth)
    assert not dirty_grads[0][padding.expand_as(x)].any()


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_norms_neither_overflow_nor_underflow(size):
    x, y, log_a, log_b = (v.float() for v in clouds("cosine"))
    valid = (log_a > -math.inf)[:, :, None]
    actual = dense.cost_matrix(x * size, y / size, log_a, log_b, "cosine")
    expected = dense.cost_matrix(x, y, log_a, log_b, "cosine")
    torch.testing.assert_close(actual * valid, expected * valid, rtol=0, atol=1e-6)
    weights = torch.rand(3, 4, 5) * valid
    grad = dense.cost_backward(weights, x * size, y, log_a, log_b, "cosine", True, False)[0]
    truth = dense.cost_backward(weights, x, y, log_a, log_b, "cosine", True, False)[0]
    torch.testing.assert_close(grad * size, truth, rtol=1e-4, atol=1e-6)


def test_a_zero_vector_has_cosine_cost_one_and_gradient_zero():
    x, y, log_a, log_b = clouds("cosine")
    x[0, 1] = 0
    weights = torch.rand(3, 4, 5, dtype=D)
    assert (dense.cost_matrix(x, y, log_a, log_b, "cosine")[0, 1] == 1).all()
    grads = dense.cost_backward(weights, x, y, log_a, log_b, "cosine", True, True)
    assert not grads[0][0, 1].any() and all(grad.isfinite().all() for grad in grads)
    leaf = x.clone().requires_grad_()
    dense.cost_matrix(leaf, y, log_a, log_b, "cosine").sum().backward()
    assert not leaf.grad[0, 1].any() and leaf.grad.isfinite().all()


def test_squared_distances_are_accurate_far_from_the_origin():
    x, y, log_a, log_b = (v.float() for v in clouds("sqeuclidean"))
    valid = (log_a > -math.inf)[:, :, None]
    # Integers, so that shifting them is exact in float32.
    x, y = x.round(decimals=0), y.round(decimals=0)
    expected = plain(x, y, "sqeuclidean") * valid
    actual = dense.cost_matrix(x + 2**20, y + 2**20, log_a, log_b, "sqeuclidean") * valid
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.5)
    assert (actual >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_vectors_that_are_not_finite_have_nan_costs(kind, value):
    x, y, log_a, log_b = clouds(kind)
    x[0, 1, 2] = value
    cost = dense.cost_matrix(x, y, log_a, log_b, kind)
    assert cost[0, 1].isnan().all() and cost[1, :2].isfinite().all()


def test_squared_distances_that_overflow_are_nan():
    x, y, log_a, log_b = (v.float() for v in clouds("sqeuclidean"))
    x[0, 1] = 1e30
    assert dense.cost_matrix(x, y, log_a, log_b, "sqeuclidean")[0, 1].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted_before_the_computation(kind, half):
    x, y, log_a, log_b = (v.float() for v in clouds(kind))
    x, y = x.to(half), y.to(half)
    cost = dense.cost_matrix(x, y, log_a, log_b, kind)
    assert torch.equal(cost, dense.cost_matrix(x.float(), y.float(), log_a, log_b, kind))
    grads = dense.cost_backward(torch.rand(3, 4, 5), x, y, log_a, log_b, kind, True, True)
    assert [grad.dtype for grad in grads] == [half, half]
