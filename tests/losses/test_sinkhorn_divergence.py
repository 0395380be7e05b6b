"""SinkhornDivergence: defaults, reductions, options and gradients."""

import doctest

import pytest
import torch

from optical import sinkhorn_divergence
from optical.losses import SinkhornDivergence, divergence


def test_examples_in_the_docstring():
    failed, tried = doctest.testmod(divergence, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried and not failed


def test_replaces_geomloss():
    geomloss = pytest.importorskip("geomloss", reason="needs the extra `bench`")
    x, y = torch.rand(3, 40, 3), torch.rand(3, 30, 3) + 0.3
    loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.3, scaling=0.99, backend="tensorized")
    actual = SinkhornDivergence(2 * 0.3**2, reduction="none")(x, y) / 2
    torch.testing.assert_close(actual, loss(x, y), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reduces_the_values_of_the_problems(reduction):
    x, y = torch.randn(3, 5, 8), torch.randn(3, 7, 8)
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
    options = {"epsilon": 4.0, "tol": 1e-6, "rho": 2.0}
    actual = SinkhornDivergence(**options, reduction=reduction)(x, y, mask_a=mask)
    values = sinkhorn_divergence(x, y, mask_a=mask, cost="sqeuclidean", **options)
    expected = {"mean": values.mean(), "sum": values.sum(), "none": values}[reduction]
    assert torch.equal(actual, expected) and values[2] == 0


def test_masses_and_packed_vectors_are_arguments_of_the_call():
    x, y = torch.randn(2, 5, 2), torch.randn(2, 6, 2)
    log_a, log_b = torch.randn(2, 5).log_softmax(1), torch.randn(2, 6).log_softmax(1)
    loss = SinkhornDivergence(0.5, reduction="none")
    offsets = {"cu_seqlens_a": torch.tensor([0, 5, 10]), "cu_seqlens_b": torch.tensor([0, 6, 12])}
    flat = (t.flatten(0, 1) for t in (x, y, log_a, log_b))
    torch.testing.assert_close(loss(*flat, **offsets), loss(x, y, log_a, log_b))


def test_has_no_state_and_prints_its_options():
    loss = SinkhornDivergence(0.1, rho=2.0)
    assert not list(loss.parameters()) and not loss.state_dict()
    assert repr(loss) == (
        "SinkhornDivergence(epsilon=0.1, cost='sqeuclidean', rho=2.0, reduction='mean')"
    )


def test_descent_moves_one_set_onto_the_other():
    x, y = torch.randn(1, 20, 2, requires_grad=True), torch.rand(1, 20, 2)
    loss = SinkhornDivergence(0.05)
    start = loss(x, y).item()
    for _ in range(10):
        (gradient,) = torch.autograd.grad(loss(x, y), x)
        x = (x - 20 / 2 * gradient).detach().requires_grad_()  # 1 / (2 * mass) of a point
    assert loss(x, y).item() < 1e-2 * start


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"reduction": "max"}, "reduction is 'max'; expected one of 'mean', 'sum'"),
        (ValueError, {"epsilon": 0.0}, "epsilon is 0.0"),
        (ValueError, {"cost": "manhattan"}, "cost is 'manhattan'; expected one of"),
        (ValueError, {"rho": (1.0, 2.0)}, r"rho is \(1.0, 2.0\); expected one strength"),
        (ValueError, {"max_iter": -2}, "max_iter is -2"),
        (TypeError, {"blur": 0.1}, "blur"),
    ],
)
def test_invalid_options_raise_in_the_constructor(error, options, message):
    with pytest.raises(error, match=message):
        SinkhornDivergence(**{"epsilon": 0.1} | options)
